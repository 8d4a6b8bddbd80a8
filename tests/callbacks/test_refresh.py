from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from fedlight.callbacks import CodecRefresh, FederatedCallback
from fedlight.codecs import AutoencoderCodec, ChainCodec, IdentityCodec, LinearCodec, QuantizeCodec, TopKCodec, TransformCodec
from fedlight.core.errors import ConfigurationError
from fedlight.core.export import codec_state, encoder_file
from fedlight.core.pretraining import CodecTraining, ProxyFederation
from fedlight.data import Uniform
from tests.federation import History, federated, federated_data, mlp, pretraining, run, trainer, weights_of


def transform() -> TransformCodec:
    return TransformCodec(2, encoder_share=2.0)


def learned() -> ChainCodec:
    return ChainCodec([AutoencoderCodec(ratio=2, block_size=16, width=4), QuantizeCodec(6)])


def refresh(every: int = 3, **changes: Any) -> CodecRefresh:
    return CodecRefresh(every, ProxyFederation(rounds=6, clients=3, samples=10), CodecTraining(steps=2, check_every=1), **changes)


class Watch(FederatedCallback):
    """Keeps the version, fingerprint, gain and encoder's weight of every round, and how often updates were recorded."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.fingerprints: list[int] = []
        self.broadcast: list[dict[str, Any]] = []
        self.encoders: list[int] = []
        self.clients: list[list[int]] = []

    def on_round_end(self, trainer, pl_module, round):
        codec = pl_module.codec
        self.versions.append(codec.version)
        self.fingerprints.append(codec.encoder.fingerprint)
        self.broadcast.append(dict(round.context.broadcast))
        self.encoders.append(len(encoder_file(codec)))
        self.clients.append(list(round.cohort))


def watched(callback: CodecRefresh | None, rounds: int = 8, make: Any = transform, data: Any = None, **changes: Any):
    module, watch = federated(codec=make()), Watch()
    run(module, rounds, data=data, callbacks=[watch, *([callback] if callback else [])], **changes)
    return module, watch


@pytest.mark.parametrize("make", [transform, learned])
def test_it_happens_before_every_n_th_round_and_raises_the_version(make):
    _, watch = watched(refresh(3), 8, make)
    assert watch.versions == [1, 1, 1, 2, 2, 2, 3, 3]
    assert len(set(watch.fingerprints)) == 3 and watch.fingerprints[2] != watch.fingerprints[3] == watch.fingerprints[5]


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("every", "stop_after", "versions"),
    [(1, None, [1, 2, 3, 4, 5, 6]), (2, 2, [1, 1, 2, 2, 2, 2]), (2, 3, [1, 1, 2, 2, 2, 2]), (2, 4, [1, 1, 2, 2, 3, 3]), (9, None, [1] * 6)],
)
def test_rounds_between_and_the_last(every, stop_after, versions):
    _, watch = watched(refresh(every, stop_after=stop_after), 6)
    assert watch.versions == versions


def test_clients_that_take_part_afterwards_download_the_new_encoder():
    module, watch = watched(refresh(3), 8, data=federated_data(sampler=Uniform(3)))
    have: dict[int, int] = {}
    expected = 0
    for version, encoder, clients in zip(watch.versions, watch.encoders, watch.clients, strict=True):
        expected += encoder * sum(have.get(client, 0) < version for client in clients)
        have |= dict.fromkeys(clients, version)
    assert module.server_state.traffic.codec == expected > 0
    assert expected > sum({client: watch.encoders[0] for clients in watch.clients for client in clients}.values())


def test_updates_are_recorded_from_the_model_of_the_moment(monkeypatch):
    """And numbered on from the round, so that they are other clients and another place in a learning-rate schedule."""
    import fedlight.modules.federated as module_of

    seen = []
    record = module_of.record_for

    def spy(module, proxy, progress, **changes):
        seen.append((changes["first_round"], weights_of(module).clone(), proxy.rounds))
        return record(module, proxy, progress, **changes)

    monkeypatch.setattr(module_of, "record_for", spy)
    module, watch = federated(codec=transform()), Watch()
    spied = run(module, 5, callbacks=[watch, refresh(2)])
    assert [(number, rounds) for number, _, rounds in seen] == [(0, 10), (2, 6), (4, 6)]
    for number, weights, _ in seen[1:]:
        assert torch.equal(weights, spied.weights[number - 1])


def test_the_model_the_data_and_the_generators_are_left_alone():
    """A refresh that is thrown away changes nothing in the run."""
    plain, _ = watched(None, 5, IdentityLike)

    class Fits(FederatedCallback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            state = torch.get_rng_state()
            weights = weights_of(pl_module).clone()
            pl_module.pretrain(ProxyFederation(rounds=6, clients=3), CodecTraining(steps=2), first_round=3)
            assert torch.equal(torch.get_rng_state(), state) and torch.equal(weights, weights_of(pl_module))

    module = federated(codec=IdentityLike())
    run(module, 5, callbacks=[Fits()])
    assert torch.equal(weights_of(module), weights_of(plain)) and module.codec.version == 6


class IdentityLike(IdentityCodec):
    """Says that it learns and sends everything."""

    needs_fit = True


@pytest.mark.quick(2)
@pytest.mark.parametrize("make", [transform, learned])
@pytest.mark.parametrize(("at", "growth"), [(3, None), (4, None), (6, None), (3, 1.0)])
def test_a_resumed_run_is_a_straight_run_bit_for_bit(make, at, growth, tmp_path):
    """Cut off just before a refresh, after one, and between the two."""

    def fit(rounds: int, ckpt_path: Any = None) -> Any:
        module = federated(mlp(dropout=0.2), codec=make())
        runner = trainer(rounds, callbacks=[refresh(3, growth=growth), pretraining()])
        runner.fit(module, datamodule=federated_data(sampler=Uniform(4)), ckpt_path=ckpt_path, weights_only=False)
        return module, runner

    straight, _ = fit(8)
    _, runner = fit(at)
    runner.save_checkpoint(tmp_path / "some.ckpt")
    resumed, _ = fit(8, tmp_path / "some.ckpt")
    assert torch.equal(weights_of(resumed), weights_of(straight))
    one, two = codec_state(resumed.codec), codec_state(straight.codec)
    assert one["description"] == two["description"] and (growth or straight.codec.version == 3)
    assert all(torch.equal(one[half][key], two[half][key]) for half in ("encoder", "decoder") for key in one[half])
    assert resumed.codec_error == straight.codec_error
    assert resumed.server_state.traffic == straight.server_state.traffic
    assert resumed.server_state.decoder == straight.server_state.decoder != {}


def gain_of(broadcast: dict[str, Any]) -> float:
    return float(broadcast["1"]["gain"])


def test_the_gain_begins_anew_from_the_new_bank():
    module, watch = watched(refresh(5), 6)
    decoder = module.codec.decoder
    assert gain_of(watch.broadcast[5]) == gain_of(decoder.broadcast({}))
    assert gain_of(watch.broadcast[4]) != gain_of(watch.broadcast[5])


def grown(growth: float, error: float, monkeypatch) -> tuple[Any, Watch, list[Any]]:
    """A run in which the codec's error at the refresh of round 3 is ``error`` and was 0.5 when it was fitted."""
    import fedlight.modules.federated as module_of

    asked = []

    def measured(codec, bank, cohort=None, server_state=None):
        asked.append(server_state)
        return error

    fit = module_of.fit_codec
    monkeypatch.setattr(module_of, "reconstruction_error", measured)
    monkeypatch.setattr(module_of, "fit_codec", lambda *a: fit(*a) | {"held_out_error": 0.5})
    history = History()
    _, watch = watched(refresh(3, growth=growth), 5, logger=history)
    return history, watch, asked


@pytest.mark.quick(1)
@pytest.mark.parametrize(("growth", "error", "fits"), [(1.2, 0.59, False), (1.2, 0.61, True), (1.0, 0.5, False), (1.0, 0.51, True)])
def test_with_growth_it_fits_only_where_the_error_has_grown(growth, error, fits, monkeypatch):
    history, watch, asked = grown(growth, error, monkeypatch)
    assert watch.versions == ([1, 1, 1, 2, 2] if fits else [1] * 5)
    assert set(history.rounds("pretrain/held_out_error")) == ({0, 3} if fits else {0})
    (state,) = asked
    assert "gain" in state["1"], "the error is that of the server's own gain"
    if not fits:
        assert gain_of(watch.broadcast[3]) == state["1"]["gain"], "a refresh that did not take place changed the gain"


def test_growth_does_not_see_updates_that_only_became_smaller(monkeypatch):
    """The gain of round 0 is wrong by now; the directions are not."""
    import fedlight.modules.federated as module_of

    bank = module_of.record_for
    shrunk = lambda module, *a, **k: type(made := bank(module, *a, **k | {"first_round": 0}))(  # noqa: E731
        made.updates * (0.02 if k["first_round"] else 1.0), made.layout
    )
    monkeypatch.setattr(module_of, "record_for", shrunk)
    _, watch = watched(refresh(2, growth=1.5), 3)
    assert watch.versions[-1] == 2, "without knowing the gain it has grown"

    class Follows(FederatedCallback):
        """As if the server had seen the updates become smaller."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.server_state.decoder["1"]["gain"] = 0.02 * gain_of(pl_module.codec.decoder.broadcast({}))

    module, watch = federated(codec=transform()), Watch()
    run(module, 3, callbacks=[Follows(), watch, refresh(2, growth=1.5)])
    assert watch.versions == [1, 1, 1]


def test_clients_forget_what_the_old_code_left_out():
    """A residual in the old code's coordinates means nothing in the new one's."""
    kept = {}

    class Keeps(FederatedCallback):
        def on_round_start(self, trainer, pl_module, round):
            kept[round.context.round] = [len(pl_module.store.peek(client).get("codec", {})) for client in range(8)]

    module = federated(codec=ChainCodec([LinearCodec(2, block_size=16), TopKCodec(4)]))
    run(module, 4, callbacks=[Keeps(), refresh(2)])
    assert kept[1] == kept[3] == [2] * 8 and kept[2] == [0] * 8
    assert module.codec.version == 2 and all(module.store.peek(client)["codec"] for client in range(8))


def test_a_refresh_is_no_part_of_the_rounds_time():
    module, _ = watched(refresh(2), 5)
    assert module.pretrain_seconds > 0 and module.train_seconds >= 0


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [IdentityCodec, lambda: TopKCodec(8), lambda: LinearCodec(4, "random")])
def test_a_codec_that_has_nothing_to_learn_is_refused_before_training(make):
    with pytest.raises(ConfigurationError, match="learns from updates but .* does not: remove CodecRefresh"):
        run(federated(codec=make()), 1, callbacks=[refresh()])


def test_without_proxy_data_it_is_refused_before_training(tmp_path):
    """Not twenty rounds later: a codec that was given trained needs none until then."""
    from fedlight.core.export import save_codec

    module = federated(codec=transform())
    run(module, 1)
    save_codec(module.codec, tmp_path)
    data = federated_data(proxy_samples=0, val_fraction=0.1)
    with pytest.raises(ConfigurationError, match="Expected proxy data to refresh the codec on.*`data.proxy_samples`"):
        run(federated(codec_path=str(tmp_path)), 1, data=data, callbacks=[refresh()])
    run(federated(codec_path=str(tmp_path)), 1, data=federated_data(proxy_samples=0, val_fraction=0.1))


def test_a_module_without_a_codec_is_refused():
    with pytest.raises(ConfigurationError, match="Expected a FederatedModule but got BoringModel"):
        trainer(callbacks=[refresh()], max_epochs=1).fit(BoringModel())


@pytest.mark.parametrize("changes", [{"every_n_rounds": 0}, {"growth": 0.9}, {"stop_after": 0}])
def test_numbers_out_of_range_are_refused(changes):
    with pytest.raises(ConfigurationError, match=f"`{next(iter(changes))}`"):
        CodecRefresh(**changes)


# -- history -----------------------------------------------------------------------------------------------------------


def probed() -> TransformCodec:
    return TransformCodec(5, encoder_share=2.0, probes=1)


@pytest.mark.parametrize("make", [transform, probed])
def test_past_aggregates_are_fitted_to_as_the_server_saw_them(make, monkeypatch):
    """The last first, at their own length, before what is recorded; clients differ as recorded ones do."""
    import fedlight.modules.federated as module_of

    banks, seen = [], []
    record = module_of.record_for

    def spy(module, proxy, progress, **changes):
        bank = record(module, proxy, progress, **changes)
        if changes["first_round"]:
            banks.append((changes["history"], bank))
        return bank

    class Sees(FederatedCallback):
        def on_round_end(self, trainer, pl_module, round):
            decoder = pl_module.codec.decoder
            seen.append(decoder.observe(round.codes.mean(), round.context, round.aggregate))
            assert torch.equal(seen[-1], round.aggregate) == (make is transform)

    monkeypatch.setattr(module_of, "record_for", spy)
    watched(refresh(4, history=3), 6, make, data=None)
    assert not seen and len(banks) == 1
    module = federated(codec=make())
    run(module, 6, callbacks=[Sees(), refresh(4, history=3)])
    history, bank = banks[1]
    assert torch.equal(history, torch.stack(seen[3:0:-1]))
    assert bank.rounds == 6 + 3
    torch.testing.assert_close(bank.updates[0].mean(0), history[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bank.updates[2].mean(0), history[1], atol=1e-5, rtol=1e-4)
    shapes = [updates - updates.mean(0) for updates in (bank.updates[0], bank.updates[1])]
    ratio = history[0].norm() / bank.updates[1].mean(0).norm()
    torch.testing.assert_close(shapes[0], ratio * shapes[1], atol=1e-5, rtol=1e-3)


@pytest.mark.quick(1)
@pytest.mark.parametrize("at", [2, 4, 5])
def test_a_resumed_run_has_the_same_history(at, tmp_path):
    def fit(rounds: int, ckpt_path: Any = None) -> Any:
        module = federated(codec=probed())
        runner = trainer(rounds, callbacks=[refresh(3, history=2), pretraining()])
        runner.fit(module, datamodule=federated_data(sampler=Uniform(4)), ckpt_path=ckpt_path, weights_only=False)
        return module, runner

    straight, _ = fit(8)
    _, runner = fit(at)
    runner.save_checkpoint(tmp_path / "some.ckpt")
    resumed, _ = fit(8, tmp_path / "some.ckpt")
    assert torch.equal(weights_of(resumed), weights_of(straight))


def test_without_a_history_nothing_is_kept():
    callback = refresh(3)
    watched(callback, 4)
    assert callback.state_dict() == {}
    with pytest.raises(ConfigurationError, match="`history` >= 0"):
        refresh(history=-1)
