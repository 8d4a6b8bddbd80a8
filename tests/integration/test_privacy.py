"""Differential privacy in a federated run: what is released is what the ledger says, and nothing else is."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlight.aggregation import SecureAggregator
from fedlight.callbacks import FederatedCallback
from fedlight.clients.algorithms import FedAvg
from fedlight.clients.feddyn import FedDyn
from fedlight.codecs import (
    AutoencoderCodec,
    ChainCodec,
    IdentityCodec,
    LinearCodec,
    PowerSGDCodec,
    QuantizeCodec,
    TopKCodec,
    TransformCodec,
    TwoSidedCodec,
    WindowCodec,
)
from fedlight.codecs.identity import IdentityDecoder
from fedlight.core.checkpoint import read_checkpoint, write_checkpoint
from fedlight.core.errors import ConfigurationError, MessageError, RoundFailedError
from fedlight.core.export import save_codec
from fedlight.core.wire import CodeFormat
from fedlight.data import Everyone, Poisson, Uniform
from fedlight.modules import FederatedModule
from fedlight.privacy import AdaptiveClipping, CentralDP, DistributedDP, LocalDP
from fedlight.privacy.accounting import epsilon
from fedlight.rounds import CatchUp
from fedlight.rounds.availability import DropOut, FirstToAnswer, Several, StageDropOut
from tests.federation import Fixed, History, Spy, federated, federated_data, mlp, pretraining, run_folders, trainer, weights_of
from tests.integration.test_two_processes import fit as in_processes

CLIENTS, DELTA = 8, 1e-2
TARGET = 3.0  # one for all, over 6 or 12 rounds: finding the noise takes seconds, and accountants remember what they have computed


def central(**changes: Any) -> CentralDP:
    return CentralDP(**{"clip": 0.5, "noise_multiplier": 1.0, "delta": DELTA, "simulation_seed": 0} | changes)


def data(**changes: Any):
    return federated_data(**{"sampler": Poisson(0.5), "normalize": False} | changes)


class Reads(Spy):
    """Remembers every code as the server reads it, and the noisy mean that is decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.codes: dict[int, list[torch.Tensor]] = {}
        self.counts: dict[int, int] = {}
        self.means: dict[int, torch.Tensor] = {}
        self.units: dict[int, float] = {}

    def on_round_start(self, trainer, pl_module, round):
        self.codes[round.context.round] = []

    def on_client_message(self, trainer, pl_module, round, reply):
        super().on_client_message(trainer, pl_module, round, reply)
        self.codes[round.context.round].append(pl_module.codec.decoder.read_message(reply.payload, round.context))

    def on_round_end(self, trainer, pl_module, round):
        super().on_round_end(trainer, pl_module, round)
        number = round.context.round
        self.means[number], self.counts[number] = round.codes.mean(), round.codes.count
        self.units[number] = pl_module.codec.encoder.common_step(round.context)

    def noise(self) -> torch.Tensor:
        """Return what was added to the sums beside the codes that arrived, [entries of all rounds], in units of the float code."""
        parts = []
        for number, total in self.totals.items():
            codes = self.codes[number]
            parts.append((total.double() - sum((code.double() for code in codes), torch.zeros(()).double())) * self.units[number])
        return torch.cat(parts)


def fit(module: FederatedModule, rounds: int = 4, federation=None, **changes: Any) -> tuple[Reads, History]:
    reads, history = Reads(), History()
    callbacks = [*changes.pop("callbacks", []), reads, pretraining()]
    trainer(rounds, callbacks=callbacks, logger=history, **changes).fit(module, datamodule=federation or data())
    return reads, history


CODECS = {
    "none": IdentityCodec,
    "learned": lambda: TwoSidedCodec(2),
    "random projection": lambda: LinearCodec(2, "random", block_size=16),
    "transform": lambda: TransformCodec(4, encoder_share=1.0),
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("system", [False, True], ids=["seeded", "operating system"])
@pytest.mark.parametrize("make", CODECS.values(), ids=CODECS)
def test_the_noise_in_the_sum_is_gaussian_of_the_stated_deviation_and_codes_are_clipped(make, system):
    module = federated(codec=make(), privacy=central(simulation_seed=None if system else 0))
    reads, history = fit(module, 12)
    noise = reads.noise()
    assert len(noise) > 100
    assert float(noise.std()) == pytest.approx(0.5, rel=5 / math.sqrt(2 * len(noise)))
    assert stats.kstest(noise.numpy() / 0.5, "norm").pvalue > (1e-6 if make != CODECS["transform"] else 1e-9)
    for number, codes in reads.codes.items():
        for code in codes:
            assert float(code.double().norm()) * reads.units[number] <= 0.5 * (1 + 1e-9)
    assert module.privacy.ledger.lines == [(1.0, 0.5, 12)]
    assert history.rounds("privacy/epsilon_if_cohorts_secret")[11] == module.privacy.epsilon()


def test_the_denominator_is_the_expected_cohort_whoever_comes():
    module = federated(privacy=central())
    reads, _ = fit(module, 6)
    assert len(set(reads.counts.values())) > 1
    for number, total in reads.totals.items():
        assert torch.allclose(reads.means[number], (total / (CLIENTS // 2)).float())
        assert torch.allclose(reads.aggregates[number], reads.means[number])


def test_what_the_server_adds_up_by_shares_does_not_tell_the_exact_number_of_clients():
    """The expected cohort is half of all clients: FedDyn's sum over rounds takes half of every mean, whoever came."""
    module = federated(privacy=central(), algorithm=FedDyn(lr=0.1, steps=3, batch_size=8))
    reads, _ = fit(module, 6)
    assert len(set(reads.counts.values())) > 1
    assert torch.allclose(module.server_state.algorithm["drift"], sum(reads.aggregates.values()) / 2, atol=1e-6)


class Breaks(FedAvg):
    """Gives some clients an update or a loss that is not finite."""

    def __init__(self, bad: float = math.nan, only_loss: bool = False, **more: Any) -> None:
        super().__init__(lr=0.1, steps=3, batch_size=8)
        self.bad, self.only_loss, self.calls, self.armed = bad, only_loss, 0, False

    def run(self, model, x, y, round, generator, memory=None):
        result = super().run(model, x, y, round, generator, memory)
        self.calls += self.armed
        if self.armed and self.calls % 3 == 0:
            update = result.update if self.only_loss else torch.full_like(result.update, self.bad)
            return type(result)(update, torch.tensor(self.bad), result.steps)
        return result


class Arms(FederatedCallback):
    """Lets clients break once the codec has been fitted."""

    def on_train_start(self, trainer, pl_module):
        pl_module.algorithm.armed = True


@pytest.mark.parametrize("only_loss", [False, True])
@pytest.mark.parametrize("make", [*CODECS.values(), lambda: ChainCodec([AutoencoderCodec(2, block_size=16, width=4, bias=True)])])
def test_a_client_whose_training_failed_answers_like_the_others_and_adds_nothing(make, only_loss, caplog):
    module = federated(codec=make(), privacy=central(), algorithm=Breaks(only_loss=only_loss))
    reads, history = fit(module, 4, data(sampler=Everyone()), callbacks=[Arms()])
    assert set(reads.counts.values()) == {CLIENTS}
    silent = [code for codes in reads.codes.values() for code in codes if not code.any()]
    assert len(silent) == CLIENTS * 4 // 3
    assert set(history.rounds("sim/dropped").values()) == {0.0} and "was dropped" not in caplog.text  # the server cannot tell
    assert len({reply.nbytes for reply in reads.replies.values()}) == 1
    assert len(module.privacy.ledger) == 4 and all(math.isfinite(loss) for loss in history.rounds("sim/loss").values())


def test_an_empty_cohort_is_released_like_any_other():
    """Whether anybody took part must not show."""
    module = federated(privacy=central(), sim_every=1)
    reads, history = fit(module, 5, data(sampler=Poisson(1e-6)))
    assert set(reads.counts.values()) == {0} and module.server_state.rounds == 5 == len(module.privacy.ledger)
    assert set(history.rounds("round/attempts").values()) == {1.0}
    assert float(torch.cat(list(reads.totals.values())).std()) == pytest.approx(0.5, rel=0.15)


def test_an_empty_cohort_of_integers_too():
    module = federated(codec=TransformCodec(4, encoder_share=1.0), privacy=central())
    reads, _ = fit(module, 2, data(sampler=Poisson(1e-6)))
    assert all(total.dtype == torch.int64 and total.any() for total in reads.totals.values())


class BreaksOnce(IdentityCodec):
    """Decodes the first attempt at round 1 to NaN."""

    def make_decoder(self, layout, plan):
        class CodecPart(IdentityDecoder):
            def decode(self, mean_code, context, state):
                return mean_code * (math.nan if (context.round, context.attempt) == (1, 0) else 1.0)

        return CodecPart(layout, CodeFormat(layout.dim))


def test_a_release_that_is_thrown_away_is_in_the_ledger():
    """The noisy sum was seen; that it was decoded to nothing usable does not undo it."""
    module = federated(codec=BreaksOnce(), privacy=central())
    _, history = fit(module, 3)
    assert history.rounds("round/attempts") == {0: 1.0, 1: 2.0, 2: 1.0}
    assert module.server_state.rounds == 3 and len(module.privacy.ledger) == 4


def test_a_budget_that_ends_within_a_round_ends_the_run_there():
    module = federated(codec=BreaksOnce(), privacy=central(target_epsilon=2.2))
    assert fit(module, 3)[1].rounds("round/attempts") == {0: 1.0}
    assert module.server_state.rounds == 1 and len(module.privacy.ledger) == 2 and module.privacy.epsilon() <= 2.2


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["central", "adaptive", "distributed", "local"])
def test_a_resumed_run_keeps_ledger_norm_and_noise(kind, tmp_path):
    def make() -> FederatedModule:
        privacy = {
            "central": lambda: central(noise_multiplier=None, target_epsilon=TARGET),
            "adaptive": lambda: central(adaptive=AdaptiveClipping(bit_noise=1.0)),
            "distributed": lambda: DistributedDP(0.5, 3, noise_multiplier=1.0, delta=DELTA, simulation_seed=0),
            "local": lambda: LocalDP(0.5, 1.0, delta=DELTA, simulation_seed=0),
        }[kind]()
        return federated(privacy=privacy, codec=TwoSidedCodec(2))

    federation = {} if kind in ("central", "adaptive") else {"sampler": Uniform(4)}
    straight = make()
    _, history = fit(straight, 6, data(**federation))
    half = make()
    runner = trainer(3 if kind != "central" else 6, callbacks=[pretraining()])
    if kind == "central":  # the noise is calibrated for six rounds, so the run is cut off rather than shorter
        runner.fit_loop.epoch_loop.max_steps = 6
        runner.callbacks.append(StopAfter(3))
    runner.fit(half, datamodule=data(**federation))
    assert len(half.privacy.ledger) == 3
    runner.save_checkpoint(tmp_path / "three.ckpt")
    resumed, rest = make(), History()
    again = trainer(6, logger=rest, callbacks=[pretraining()])
    again.fit(resumed, datamodule=data(**federation), ckpt_path=tmp_path / "three.ckpt", weights_only=False)
    assert resumed.privacy.state_dict() == straight.privacy.state_dict() and len(resumed.privacy.ledger) == 6
    assert torch.equal(weights_of(resumed), weights_of(straight))
    later = {step: value for step, value in history.rounds("privacy/epsilon_if_cohorts_secret").items() if step >= 3}
    assert rest.rounds("privacy/epsilon_if_cohorts_secret") == later and resumed.privacy.epsilon() == straight.privacy.epsilon()


class StopAfter(FederatedCallback):
    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def on_round_end(self, trainer, pl_module, round):
        trainer.should_stop = trainer.should_stop or round.context.round + 1 >= self.rounds


def test_a_checkpoint_of_another_privacy_is_refused(tmp_path):
    runner = trainer(1, callbacks=[pretraining()])
    runner.fit(federated(privacy=central()), datamodule=data())
    runner.save_checkpoint(tmp_path / "one.ckpt")
    for other in (None, central(clip=1.0), central(noise_multiplier=0.5)):
        with pytest.raises(ConfigurationError, match="differs in: privacy"):
            trainer(2, callbacks=[pretraining()]).fit(
                federated(privacy=other), datamodule=data(), ckpt_path=tmp_path / "one.ckpt", weights_only=False
            )


def test_a_checkpoint_without_a_ledger_is_refused(tmp_path):
    runner = trainer(1, callbacks=[pretraining()])
    runner.fit(federated(privacy=central()), datamodule=data())
    runner.save_checkpoint(tmp_path / "one.ckpt")
    saved = read_checkpoint(tmp_path / "one.ckpt")
    saved["fedlight"]["privacy"] = None
    write_checkpoint(tmp_path / "bare.ckpt", saved)
    with pytest.raises(ConfigurationError, match="checkpoint with the ledger of its privacy"):
        trainer(2, callbacks=[pretraining()]).fit(
            federated(privacy=central()), datamodule=data(), ckpt_path=tmp_path / "bare.ckpt", weights_only=True
        )


def test_cohorts_without_a_simulation_seed_are_drawn_from_a_secret():
    """Nobody can repeat them from the public seed of the run, and a second run has others."""

    class Noted(FederatedCallback):
        def __init__(self) -> None:
            self.cohorts = []

        def on_round_start(self, trainer, pl_module, call):
            self.cohorts.append(call.cohort)

    drawn = []
    for privacy in (central(simulation_seed=None), central(simulation_seed=None), central(), central()):
        noted = Noted()
        fit(federated(privacy=privacy), 6, callbacks=[noted])
        drawn.append(noted.cohorts)
    assert drawn[0] != drawn[1] != drawn[2] == drawn[3]
    federation = data()
    federation.setup()
    assert drawn[2] == [federation.cohort(number).tolist() for number in range(6)]


def test_no_client_is_named_where_nobody_may_know_who_took_part(caplog):
    class Lost(FederatedCallback):
        def on_client_message(self, trainer, pl_module, round, reply):
            raise MessageError("the connection was lost")

    fit(federated(privacy=central()), 1, callbacks=[Lost()])
    assert "client" not in caplog.text


def test_a_run_stops_when_its_budget_is_spent():
    module = federated(privacy=central(target_epsilon=2.7))
    runner = trainer(50, callbacks=[pretraining()])
    runner.fit(module, datamodule=data())
    assert 0 < module.server_state.rounds < 50 and runner.global_step == module.server_state.rounds == len(module.privacy.ledger)
    assert module.privacy.epsilon() <= 2.7 < module.privacy.next_epsilon()


def test_a_finished_budget_allows_no_further_round_after_resume(tmp_path):
    runner = trainer(6, callbacks=[pretraining()])
    runner.fit(federated(privacy=central(noise_multiplier=None, target_epsilon=TARGET)), datamodule=data())
    runner.save_checkpoint(tmp_path / "spent.ckpt")
    more = federated(privacy=central(noise_multiplier=None, target_epsilon=TARGET))
    again = trainer(12, callbacks=[pretraining()])
    again.fit(more, datamodule=data(), ckpt_path=tmp_path / "spent.ckpt", weights_only=False)
    assert again.global_step == 6 == len(more.privacy.ledger) and more.privacy.epsilon() <= TARGET


def test_noise_is_calibrated_to_the_rounds_of_the_run():
    short, long = (federated(privacy=central(noise_multiplier=None, target_epsilon=TARGET)) for _ in range(2))
    fit(short, 6)
    fit(long, 12)
    assert short.privacy.multiplier < long.privacy.multiplier
    for module, rounds in ((short, 6), (long, 12)):
        assert module.server_state.rounds == rounds and TARGET - 0.1 < module.privacy.epsilon() <= TARGET


# -- adaptive, distributed, local --------------------------------------------------------------------------------------


def test_an_adaptive_norm_is_broadcast_moves_and_its_bit_is_counted():
    plain, adaptive = federated(privacy=central()), federated(privacy=central(clip=8.0, adaptive=AdaptiveClipping(bit_noise=0.6)))
    fit(plain, 3)
    reads, history = fit(adaptive, 3)
    norms = history.rounds("privacy/clip")
    assert [reads.broadcast[number]["clip"] for number in range(3)] == [8.0, norms[0], norms[1]]
    assert norms[2] < norms[1] < norms[0] < 8.0
    one, other = plain.server_state.traffic, adaptive.server_state.traffic
    assert other.messages == one.messages > 0 and other.uplink == one.uplink + other.messages
    assert other.downlink > one.downlink
    assert {reply.inside for reply in reads.replies.values()} <= {False, True}
    for number, codes in reads.codes.items():
        assert all(float(code.double().norm()) <= reads.broadcast[number]["clip"] for code in codes)


def test_shares_of_distributed_noise_are_in_the_messages_and_add_up():
    """Zero learning would be zero codes: what is left in them is noise."""
    privacy = DistributedDP(0.5, threshold=5, colluding=1, noise_multiplier=1.0, delta=DELTA, simulation_seed=0, bits=14)
    module = federated(privacy=privacy, algorithm=FedAvg(lr=1e-12, steps=1, batch_size=8))
    reads, history = fit(module, 8, data(sampler=Uniform(6)))
    codes = torch.cat([code.double() * reads.units[number] for number, codes in reads.codes.items() for code in codes])
    sums = torch.cat([total.double() * reads.units[number] for number, total in reads.totals.items()])
    assert float(codes.std()) == pytest.approx(0.5 / 2, rel=0.05)
    assert float(sums.std()) == pytest.approx(0.5 * math.sqrt(6 / 4), rel=0.1)
    assert not reads.noise().any()  # the server adds none
    dim = module.layout.dim
    assert {reply.nbytes for reply in reads.replies.values()} == {16 + (14 * dim + 7) // 8}
    assert module.server_state.traffic.ratio(dim) == pytest.approx(4 * dim / (16 + (14 * dim + 7) // 8))
    assert history.rounds("privacy/epsilon") == history.rounds("privacy/epsilon_if_cohorts_secret")


def test_below_the_threshold_a_round_of_shares_is_repeated_before_its_sum_is_used():
    privacy = DistributedDP(0.5, threshold=4, noise_multiplier=1.0, delta=DELTA, simulation_seed=0)
    module = federated(privacy=privacy)
    with pytest.raises(ConfigurationError, match="at least `threshold` clients"):
        fit(module, 2, data(sampler=Fixed([0, 1, 2])))

    class Lossy(FederatedCallback):
        def on_client_update(self, trainer, pl_module, context, update):
            if update.client > 2:
                raise MessageError("lost")

    module = federated(privacy=DistributedDP(0.5, threshold=4, noise_multiplier=1.0, delta=DELTA, simulation_seed=0))
    with pytest.raises(RoundFailedError):
        fit(module, 2, data(sampler=Everyone()), callbacks=[Lossy()])
    assert len(module.privacy.ledger) == 0


def test_local_noise_is_in_every_message():
    module = federated(privacy=LocalDP(0.5, 2.0, delta=DELTA, simulation_seed=0), algorithm=FedAvg(lr=1e-12, steps=1, batch_size=8))
    reads, _ = fit(module, 3, data(sampler=Uniform(4)))
    codes = torch.cat([code for codes in reads.codes.values() for code in codes])
    assert float(codes.std()) == pytest.approx(1.0, rel=0.1)
    assert not reads.noise().abs().gt(1e-4).any()


def test_clients_that_catch_up_download_noisy_sums():
    module = federated(privacy=central(), codec=TransformCodec(4, encoder_share=1.0), downlink=CatchUp())
    fit(module, 3)
    assert module.server_state.traffic.downlink > 0 and module.server_state.rounds == 3


def shares(**changes: Any) -> DistributedDP:
    settings = {"clip": 0.5, "threshold": 5, "noise_multiplier": 1.0, "delta": DELTA, "simulation_seed": 0}
    return DistributedDP(**settings | changes)


@pytest.mark.parametrize(("stage", "releases"), [("consistency_check", 0), ("unmasking", 3)])
def test_an_attempt_counts_once_its_clients_were_asked_to_open_the_sum(stage, releases):
    """Answers of those that do not reach the server of this run in time may reach somebody who wants the sum."""
    silent = StageDropOut(**{stage: 1.0})
    module = federated(
        codec=TwoSidedCodec(2), privacy=shares(), aggregator=SecureAggregator(cohort=CLIENTS, threshold=6), availability=silent
    )
    with pytest.raises(RoundFailedError, match="in 3 attempts"):
        trainer(1, callbacks=[pretraining()]).fit(module, datamodule=data(sampler=Everyone()))
    privacy = module.privacy
    assert len(privacy.ledger) == releases
    true = epsilon(privacy.accounts, ((privacy.accounted(1.0), 1.0, releases),), DELTA) if releases else 0.0
    assert privacy.epsilon() >= true and privacy.epsilon(amplified=False) >= true


def test_behind_secure_aggregation_the_same_noisy_sums_come_out():
    """The masks cancel; what is left is the clipped codes, with their shares of the noise."""
    runs = []
    for aggregator in (None, SecureAggregator(cohort=CLIENTS, threshold=6)):
        module, spy = federated(codec=TwoSidedCodec(2), privacy=shares(), aggregator=aggregator), Spy()
        runner = trainer(3, callbacks=[pretraining(), spy])
        runner.fit(module, datamodule=data(sampler=Everyone()))
        runs.append((module, spy))
    (plain, seen), (secure, unseen) = runs
    assert all(torch.equal(seen.totals[number], unseen.totals[number]) for number in range(3))
    assert torch.equal(weights_of(plain), weights_of(secure))
    assert plain.privacy.report() == secure.privacy.report()


class SharesAndBits(DistributedDP):
    """Has clients send a bit beside the code."""

    sends_bits = True


def test_shares_without_secure_aggregation_are_said_to_protect_nobody_from_the_server(caplog):
    fit(federated(privacy=shares()), 1, data(sampler=Everyone()))
    assert "DistributedDP without secure aggregation protects nobody from the server" in caplog.text


PROCESSES = {
    "central, integers": (
        {"class_path": "CentralDP", "init_args": {"clip": 0.5, "noise_multiplier": 1.0, "delta": 0.01, "simulation_seed": 1}},
        {"class_path": "TransformCodec", "init_args": {"ratio": 6, "encoder_share": 1.0}},
    ),
    "central, adaptive, operating system": (
        {
            "class_path": "CentralDP",
            "init_args": {"clip": 0.5, "noise_multiplier": 0.5, "delta": 0.01, "adaptive": {"quantile": 0.5, "bit_noise": 1.0}},
        },
        None,
    ),
    "distributed": (
        {
            "class_path": "DistributedDP",
            "init_args": {"clip": 0.5, "threshold": 2, "noise_multiplier": 1.0, "delta": 0.01, "simulation_seed": 1},
        },
        None,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_two_processes_release_one_sum(name, tmp_path):
    """Of seeded noise the same as one process; of the operating system's, that of the first process in both."""
    privacy, codec = PROCESSES[name]
    sampler = json.dumps({"class_path": "Everyone"})
    more = ["--data.normalize", "false", "--data.client_holdout", "0", "--data.sampler", sampler, "--model.privacy", json.dumps(privacy)]
    folders = [tmp_path / "one", tmp_path / "two"]
    runs = [in_processes(folder, count, json.dumps(codec) if codec else None, more) for count, folder in enumerate(folders, 1)]
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in runs)
    for key in ("epsilon", "epsilon_if_cohorts_secret", "privacy", "noise_multiplier", "uplink_bytes"):
        assert one[key] == two[key], key
    sums = [[torch.load(folder / "codes" / f"round_{number}.pt") for number in range(3)] for folder in folders]
    same = [torch.equal(a, b) for a, b in zip(*sums, strict=True)]
    assert same == [name != "central, adaptive, operating system"] * 3


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "federation", "message"),
    [
        ({"weighting": "samples"}, {}, "`weighting` equal under CentralDP"),
        ({"network": mlp(norm=True)}, {}, "without BatchNorm statistics.*`batch_norm` to local"),
        ({"min_clients": 3}, {}, "`min_clients` 1 under CentralDP but got 3"),
        ({"codec": TopKCodec(4)}, {}, "codes can be summed, which CentralDP needs"),
        ({"codec": PowerSGDCodec(1)}, {}, "one-pass codec under CentralDP"),
        ({"codec": ChainCodec([LinearCodec(2, block_size=16), QuantizeCodec(6)])}, {}, "one common step.*TransformCodec"),
        ({"codec": WindowCodec(4, 8)}, {}, "sums have room for any codes, which CentralDP needs"),
        ({}, {"sampler": Uniform(4)}, "`data.sampler` to Poisson or Everyone"),
        ({}, {"normalize": True}, "`data.normalize` false under CentralDP"),
        ({}, {"client_holdout": 0.2}, "`data.client_holdout` 0 under CentralDP"),
        ({"availability": FirstToAnswer(3)}, {}, "no client takes another's place under CentralDP.*got FirstToAnswer"),
        ({"availability": Several([DropOut(0.1), FirstToAnswer(3)])}, {}, "no client takes another's place under CentralDP.*got Several"),
        ({"privacy": central(delta=0.2)}, {}, "`delta` below 1 / 8 clients"),
        ({"privacy": central(target_epsilon=0.1)}, {}, "allows one round but one costs"),
        ({"codec": TransformCodec(4, encoder_share=1.0), "privacy": central(accountant="pld")}, {}, "for integer codes but got pld"),
        (
            {"codec": TransformCodec(4, encoder_share=1.0), "aggregator": SecureAggregator(8, threshold=6)},
            {},
            "cohorts of any size under CentralDP but SecureAggregator.*DistributedDP",
        ),
        (
            {"privacy": SharesAndBits(0.5, 6, noise_multiplier=1.0, delta=DELTA), "aggregator": SecureAggregator(8)},
            {},
            "but got `adaptive`",
        ),
        ({"privacy": shares(threshold=7), "aggregator": SecureAggregator(8, threshold=6)}, {}, r"at least that of DistributedDP \(7\)"),
    ],
    ids=range(18),
)
def test_what_cannot_be_accounted_for_is_refused_before_training(changes, federation, message):
    module = federated(**{"privacy": central()} | changes)
    before = weights_of(module)
    with pytest.raises(ConfigurationError, match=message):
        fit(module, 2, data(**federation))
    assert torch.equal(weights_of(module), before)


def test_a_loaded_codec_without_the_grid_of_distributed_noise_is_refused(tmp_path):
    layout = federated().layout
    save_codec(LinearCodec(2, "random", block_size=16).bind(layout), tmp_path / "floats")
    with pytest.raises(ConfigurationError, match="LinearCodec at `codec_path` to end in the grid of DistributedDP"):
        fit(federated(privacy=shares(), codec_path=str(tmp_path / "floats")), 1, data())
    save_codec(federated(privacy=shares(), codec=LinearCodec(2, "random", block_size=16)).codec.bind(layout), tmp_path / "grid")
    fit(federated(privacy=shares(), codec_path=str(tmp_path / "grid")), 1, federated_data(normalize=False))


def test_batch_norm_that_stays_with_the_clients_is_allowed():
    module = federated(mlp(norm=True), privacy=central(), batch_norm="local")
    fit(module, 2)
    assert module.server_state.rounds == 2


# -- what is left behind -----------------------------------------------------------------------------------------------


def test_exact_counts_of_clients_are_marked_as_the_simulations():
    _, with_privacy = fit(federated(privacy=central(), sim_every=1), 2)
    _, without = fit(federated(sim_every=1), 2)
    names = {name for metrics in with_privacy.steps.values() for name in metrics}
    assert {"round/clients", "round/dropped", "bytes/uplink_round"} <= {name for metrics in without.steps.values() for name in metrics}
    assert not {"round/clients", "round/absent", "round/dropped", "bytes/uplink_round"} & names
    assert {"sim/clients", "sim/absent", "sim/dropped", "sim/uplink_round", "privacy/epsilon", "privacy/epsilon_if_cohorts_secret"} <= names
    assert not any(name.startswith("privacy/") for metrics in without.steps.values() for name in metrics)


def test_the_bytes_of_handshakes_tell_how_many_shook_hands():
    secure = SecureAggregator(cohort=CLIENTS, threshold=6)
    history = History()
    runner = trainer(1, callbacks=[pretraining()], logger=history)
    runner.fit(federated(privacy=shares(), aggregator=secure), datamodule=data(sampler=Everyone()))
    assert "sim/handshake" in history.steps[0] and "bytes/handshake" not in history.steps[0]


def test_the_summary_and_tensorboard_state_the_guarantee(fedlight, tmp_path):
    privacy = {"class_path": "CentralDP", "init_args": {"clip": 0.5, "target_epsilon": TARGET, "delta": 0.01}}
    fedlight(
        *("fit", tmp_path, "--trainer.max_steps", "6", "--data.normalize", "false", "--model.privacy", json.dumps(privacy)),
        *("--data.sampler", json.dumps({"class_path": "Poisson", "init_args": {"rate": 0.5}})),
    )
    (folder,) = run_folders(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert TARGET - 0.1 < summary["epsilon_if_cohorts_secret"] <= TARGET < summary["epsilon"]
    assert summary["delta"] == 0.01 and summary["clip"] == 0.5 and summary["noise_multiplier"] > 0.3
    assert summary["privacy"] == {
        "mechanism": "CentralDP",
        "unit": "user",
        "neighbouring_relation": "add or remove one user",
        "sampling_rate": 0.5,
        "rounds": 6,
        "accountant": "pld",
        "expected_cohort": 3,
        "cohorts": "secret, in the checkpoints' files of clients",
        "noise": "operating system",
    }
    events = EventAccumulator(str(folder))
    events.Reload()
    epsilons = [event.value for event in events.Scalars("privacy/epsilon_if_cohorts_secret")]
    assert (
        epsilons == sorted(epsilons)
        and epsilons[-1] == pytest.approx(summary["epsilon_if_cohorts_secret"], rel=1e-6)
        and len(epsilons) == 6
    )
    assert len(events.Scalars("privacy/epsilon")) == 6


def test_a_run_without_privacy_says_nothing_of_it(finished):
    assert not {"epsilon", "delta", "privacy"} & set(json.loads((finished / "summary.json").read_text()))
