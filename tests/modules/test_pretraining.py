import re

import pytest
import torch
from torch import nn

from fedlight.callbacks import CodecPretraining
from fedlight.codecs import AutoencoderCodec, ChainCodec, IdentityCodec, LinearCodec, QuantizeCodec, TransformCodec, TwoSidedCodec
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Context, Private
from fedlight.core.errors import ConfigurationError
from fedlight.core.export import codec_state, save_codec
from fedlight.core.layout import Layout
from fedlight.core.pretraining import CodecTraining, ProxyFederation
from fedlight.modules.pretraining import CodecPretrainingModule, Cohorts, cohort_loss, errors_by_cohort, fit_codec
from fedlight.privacy import CentralDP
from tests.federation import Spy, federated, federated_data, learned, mlp, pretraining, run, trainer, weights_of

CPU = torch.device("cpu")


def low_rank_bank(rounds: int = 20, clients: int = 5, dim: int = 64) -> UpdateBank:
    """Updates in four directions."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(4, dim, generator=generator)
    return UpdateBank(torch.randn(rounds, clients, 4, generator=generator) @ basis, Layout.of(nn.Linear(dim, 1, bias=False)))


def test_cohorts_are_of_all_sizes_and_weights_add_up_to_one():
    loader = iter(Cohorts(low_rank_bank(), CodecTraining(rounds_per_step=3), seed=0))
    sizes = set()
    for _ in range(40):
        updates, weights = next(loader)
        assert updates.shape[::2] == (3, 64) and weights.shape == (*updates.shape[:2], 1)
        torch.testing.assert_close(weights.sum(1), torch.ones(3, 1))
        assert (weights > 0).all()
        sizes.add(updates.shape[1])
    assert sizes == {1, 2, 3, 4, 5}


def test_all_clients_with_equal_weights_where_asked():
    updates, weights = next(iter(Cohorts(low_rank_bank(), CodecTraining(all_clients=True), seed=0)))
    assert updates.shape == (4, 5, 64)
    assert (weights == 0.2).all()


def test_cohorts_depend_on_the_seed_alone():
    first, again, other = (next(iter(Cohorts(low_rank_bank(), CodecTraining(), seed)))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_the_loss_is_the_relative_error_of_the_decoded_mean_code():
    """|| D(sum a_i E(u_i)) - sum a_i u_i ||^2 / || sum a_i u_i ||^2, averaged over rounds: decoded once, from the sum."""
    bank = low_rank_bank()
    codec = LinearCodec(ratio=32, basis="random").bind(bank.layout)
    updates, weights = bank.updates[:3], torch.rand(3, 5, 1).softmax(1)
    expected = []
    for u, a in zip(updates, weights, strict=True):
        mean = sum(a[i] * codec.encoder.encode(u[i], Context(), Private(torch.Generator())) for i in range(5))
        target = sum(a[i] * u[i] for i in range(5))
        expected.append(((codec.decoder.decode(mean, Context(), {}) - target) ** 2).sum() / (target**2).sum())
    torch.testing.assert_close(cohort_loss(codec, updates, weights), torch.stack(expected).mean())
    exact = IdentityCodec().bind(bank.layout)
    assert float(cohort_loss(exact, updates, weights)) < 1e-10


def test_training_lowers_the_error_and_keeps_the_best_weights():
    bank = low_rank_bank(40)
    untrained, trained = (AutoencoderCodec(ratio=8, block_size=64, width=8, start="random") for _ in range(2))
    before = fit_codec(untrained, bank, CodecTraining(steps=0), CPU, None, False, 0)
    after = fit_codec(trained, bank, CodecTraining(steps=300, lr=1e-2, check_every=50), CPU, None, False, 0)
    assert after["held_out_error"] < 0.5 * before["held_out_error"]
    assert after["pretrain_steps"] == 300
    assert {"held_out_error_pca", "held_out_error_random"} <= set(after)


def one_direction_bank() -> UpdateBank:
    """Multiples of one matrix of rank 1."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.outer(torch.ones(20), torch.ones(30)).flatten()
    return UpdateBank(torch.rand(20, 5, 1, generator=generator) * direction, Layout(("weight",), ((20, 30),)))


def full_bank() -> UpdateBank:
    """Noise in all directions of a matrix."""
    return UpdateBank(torch.randn(20, 5, 600, generator=torch.Generator().manual_seed(0)), Layout(("weight",), ((20, 30),)))


PAYS = r"`ratio` 8 of \w+ was asked for but its messages are [\d.]+x smaller: `encoder_share` \(0.05\) pays for no more"


@pytest.mark.parametrize(
    ("kind", "bank", "share", "told"),
    [
        (TransformCodec, full_bank, 10.0, ""),
        (TwoSidedCodec, full_bank, 10.0, ""),
        (TransformCodec, full_bank, 0.05, PAYS),
        (TwoSidedCodec, full_bank, 0.05, PAYS),
        (TransformCodec, one_direction_bank, 10.0, "`ratio` 8 of .* energy in no more directions"),
    ],
)
def test_a_ratio_far_above_the_one_asked_for_is_told_with_what_limits_it(kind, bank, share, told, recwarn):
    codec = kind(8, encoder_share=share)
    for _ in range(2):  # a refresh says nothing new
        fit_codec(codec, bank(), CodecTraining(steps=0), CPU, None, False, 0)
    said = [str(item.message) for item in recwarn if "asked for" in str(item.message)]
    assert len(said) == bool(told) and re.match(told, "".join(said))
    context = Context(broadcast=codec.decoder.broadcast({}))
    message = codec.encoder.encode_message(bank().updates[0, 0], context, Private(torch.Generator()))
    assert codec.fitted_ratio() == 4 * 600 / len(message)
    assert (codec.fitted_ratio() > 1.25 * 8) == bool(told)


@pytest.mark.parametrize("share", [0.05, 10.0])
def test_a_ratio_within_a_chain_is_told_too(share, recwarn):
    codec = ChainCodec([TwoSidedCodec(8, encoder_share=share), QuantizeCodec(8)])
    fit_codec(codec, full_bank(), CodecTraining(steps=0), CPU, None, False, 0)
    said = [str(item.message) for item in recwarn if "asked for" in str(item.message)]
    assert len(said) == (share < 1)
    assert all("`ratio` 8 of TwoSidedCodec within the chain was asked for but its codes are" in one for one in said)


def test_the_best_weights_are_put_back():
    bank = low_rank_bank()
    codec = AutoencoderCodec(ratio=8, block_size=64, width=8, start="random").bind(bank.layout)
    module = CodecPretrainingModule(codec, bank, bank, CodecTraining())
    module.log = lambda *args, **kwargs: None
    for updates in bank:
        module.validation_step(updates, 0)
    module.on_validation_epoch_end()
    best = {name: value.clone() for name, value in module.halves.state_dict().items()}
    with torch.no_grad():
        for parameter in module.halves.parameters():
            parameter.mul_(100)
    for updates in bank:
        module.validation_step(updates, 0)
    module.on_validation_epoch_end()
    module.on_fit_end()
    assert all(torch.equal(best[name], value) for name, value in module.halves.state_dict().items())


def test_training_stops_early_when_nothing_improves():
    figures = fit_codec(
        AutoencoderCodec(ratio=16, block_size=64, width=4),
        low_rank_bank(),
        CodecTraining(500, 1e-12, check_every=5, patience=2),
        CPU,
        None,
        False,
        0,
    )
    assert figures["pretrain_steps"] <= 20


@pytest.mark.parametrize("rounds", [6, 7, 9, 11, 19])
@pytest.mark.parametrize("holdout", [0.01, 0.1, 0.25])
def test_every_allowed_number_of_rounds_can_be_fitted(rounds, holdout):
    codec = AutoencoderCodec(ratio=8, block_size=64, width=4)
    assert fit_codec(codec, low_rank_bank(rounds), CodecTraining(steps=2, check_every=1, holdout=holdout), CPU, None, False, 0)
    assert codec.fitted


def test_errors_are_told_for_the_cohort_sizes_that_were_recorded():
    bank = low_rank_bank()
    codec = IdentityCodec().bind(bank.layout)
    errors = errors_by_cohort(codec, bank)
    assert list(errors) == [1, 2, 5]
    assert max(errors.values()) < 1e-6


# -- inside a run ------------------------------------------------------------------------------------------------------


def test_the_codec_is_fitted_once_before_round_0_and_belongs_to_the_model():
    module = federated(codec=learned())
    assert not module.codec.fitted
    run(module, 1)
    assert module.codec.fitted and module.codec.version == 1
    assert module.codec.layout == module.layout
    assert module.pretrain_metrics["held_out_error"] >= 0
    assert module.pretrain_seconds > 0


def test_pretraining_leaves_the_model_and_its_rounds_alone():
    """A codec that sends updates in full makes the same run whether or not something was pretrained before."""
    plain, trained = federated(mlp(norm=True)), federated(mlp(norm=True))
    run(plain)

    class Pretrained(CodecPretraining):
        def on_fit_start(self, trainer, pl_module):
            pl_module.pretrain(self.proxy, self.training)

    small = Pretrained(ProxyFederation(rounds=6, clients=2, samples=8), CodecTraining(steps=2, check_every=1))
    trainer(2, callbacks=[small]).fit(trained, datamodule=federated_data())
    assert trained.pretrain_metrics
    assert torch.equal(weights_of(plain), weights_of(trained))


def test_pretraining_is_reproducible():
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = federated(codec=learned())
        torch.manual_seed(seed)
        run(module, 1)
        states.append(codec_state(module.codec))
    for half in ("encoder", "decoder"):
        assert all(torch.equal(states[0][half][name], states[1][half][name]) for name in states[0][half])


def test_a_codec_that_needs_none_is_not_pretrained():
    module = federated()
    trainer(1).fit(module, datamodule=federated_data(proxy_samples=0))
    assert module.pretrain_metrics == {} and module.codec.version == 0


def test_a_codec_given_trained_is_not_trained_again(tmp_path):
    first = federated(codec=learned())
    run(first, 1)
    save_codec(first.codec, tmp_path)
    module = federated(codec_path=str(tmp_path))
    run(module, 1)
    assert module.pretrain_metrics == {} and module.codec.version == 1
    assert torch.equal(weights_of(module), weights_of(first))


def test_a_codec_to_train_without_proxy_data_is_refused():
    with pytest.raises(ConfigurationError, match="Expected proxy data to train ChainCodec on"):
        run(federated(codec=learned()), 1, data=federated_data(proxy_samples=0))


def test_the_pretrain_command_writes_what_fit_uses(tmp_path):
    module = federated(codec=learned())
    report = trainer(0, callbacks=[pretraining()], default_root_dir=tmp_path).pretrain(
        module, federated_data(), str(tmp_path), cohort_rounds=0
    )
    assert report["held_out_error"] >= 0
    used = federated(codec_path=str(tmp_path))
    fresh = federated(codec=learned())
    run(used, 2), run(fresh, 2)
    assert torch.equal(weights_of(used), weights_of(fresh))


def private() -> CentralDP:
    return CentralDP(clip=0.5, target_epsilon=8.0, delta=1e-3, accountant="rdp", simulation_seed=0)


def test_noise_is_calibrated_for_the_configured_rounds_when_the_codec_is_pretrained(tmp_path):
    module, straight = federated(codec=TwoSidedCodec(4), privacy=private()), federated(codec=TwoSidedCodec(4), privacy=private())
    trainer(5, callbacks=[pretraining()]).pretrain(module, federated_data(normalize=False), str(tmp_path), cohort_rounds=0)
    run(straight, 5, federated_data(normalize=False))
    assert module.privacy.setting.rounds == 5
    assert module.privacy.multiplier == straight.privacy.multiplier > 0


@pytest.mark.parametrize("privacy", [None, private])
def test_a_fit_after_pretraining_on_the_same_trainer_runs_the_configured_rounds(privacy, tmp_path):
    """The same run as with the pretrained codec from its files."""
    module, spy = federated(codec=TwoSidedCodec(4), privacy=privacy and privacy()), Spy()
    both = trainer(3, callbacks=[spy, pretraining()])
    both.pretrain(module, federated_data(normalize=False), str(tmp_path), cohort_rounds=0)
    assert module.codec.version == 1 and not spy.aggregates and both.max_steps == 3 and both.limit_train_batches == 1.0
    both.fit(module, datamodule=federated_data(normalize=False))
    used = federated(codec_path=str(tmp_path), privacy=privacy and privacy())
    run(used, 3, federated_data(normalize=False))
    assert module.server_state.rounds == 3 and spy.aggregates.keys() == {0, 1, 2} and module.codec.version == 1
    assert torch.equal(weights_of(module), weights_of(used))


def test_pretraining_needs_no_number_of_rounds(tmp_path):
    runner = trainer(-1, callbacks=[pretraining()])
    runner.pretrain(federated(codec=learned()), federated_data(), str(tmp_path), cohort_rounds=0)
    assert runner.max_steps == -1


def test_pretraining_that_fails_leaves_the_trainer_as_it_was(tmp_path):
    runner = trainer(3, callbacks=[pretraining()])
    with pytest.raises(ConfigurationError, match="Expected proxy data"):
        runner.pretrain(federated(codec=learned()), federated_data(proxy_samples=0), str(tmp_path), cohort_rounds=0)
    assert runner.max_steps == 3 and runner.limit_train_batches == 1.0


@pytest.mark.parametrize("codec", [None, "path"])
def test_pretraining_what_needs_none_is_refused(codec, tmp_path):
    module = federated()
    if codec:
        first = federated(codec=learned())
        run(first, 1)
        save_codec(first.codec, tmp_path)
        module = federated(codec_path=str(tmp_path))
    with pytest.raises(ConfigurationError, match="Expected a codec that has to be trained"):
        trainer(0).pretrain(module, federated_data())
