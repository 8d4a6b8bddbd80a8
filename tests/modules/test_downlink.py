"""What clients download: counted by hand from what a run sent (law 6)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fedlight.modules.downlink import SEED_BYTES, beyond_encoder, broadcast_bytes

from fedlight.callbacks import CodecRefresh, FederatedCallback
from fedlight.codecs import (
    AutoencoderCodec,
    ChainCodec,
    CountSketchCodec,
    IdentityCodec,
    LinearCodec,
    PowerSGDCodec,
    QSGDCodec,
    QuantizeCodec,
    TopKCodec,
    TransformCodec,
)
from fedlight.core.codec import Codec
from fedlight.core.errors import ConfigurationError
from fedlight.core.export import encoder_bytes
from fedlight.core.layout import float_buffers
from fedlight.core.pretraining import CodecTraining, ProxyFederation
from fedlight.data import Poisson, Uniform
from fedlight.modules import CatchUp, FullModel
from fedlight.rounds.sums import write_sum
from tests.federation import federated, federated_data, mlp, pretraining, run, trainer, weights_of

ROUNDS = 12


def transform() -> Codec:
    return TransformCodec(3, encoder_share=0.5)


def learned() -> Codec:
    return ChainCodec([AutoencoderCodec(ratio=4, block_size=16, width=4), QuantizeCodec(4)])


CODECS = {
    "identity": IdentityCodec,
    "fresh projection": lambda: LinearCodec(4, "random", block_size=16, fresh=True),
    "transform": transform,
    "learned": learned,
}


class Ledger(FederatedCallback):
    """Keeps for every round who took part, what was announced, the length of the sum, and what the codec weighed."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, Any]] = []

    def on_round_start(self, trainer, pl_module, round):
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]  # before the schedule moves on

    def on_round_end(self, trainer, pl_module, round):
        codec = pl_module.codec
        self.rounds.append(
            {
                "cohort": round.cohort.tolist(),
                "broadcast": broadcast_bytes(round.context.broadcast),
                "sum": len(write_sum(round.codes, round.context, codec.encoder.fingerprint, self.lr)),
                "version": codec.version,
                "encoder": encoder_bytes(codec) if codec.version else 0,
                "beyond": beyond_encoder(codec) if codec.version else 0,
            }
        )


def refresh(every: int = 4) -> CodecRefresh:
    return CodecRefresh(every, ProxyFederation(rounds=8, clients=3, samples=10), CodecTraining(steps=2, check_every=1))


def downloads(module: Any, rounds: list[dict[str, Any]], catch_up: bool) -> tuple[int, int]:
    """Return (downlink, codec) bytes of a run: every client's cheapest way to the model, told round by round."""
    buffers = 4 * sum(buffer.numel() for buffer in float_buffers(module.network))
    full = 4 * module.layout.dim + buffers
    weighs = {r["version"]: (r["encoder"], r["beyond"]) for r in rounds}
    downlink = codec = 0
    model_before: dict[int, int] = {}  # the last round before which a client held the model
    encoders: dict[int, set[int]] = {}
    decoders: dict[int, set[int]] = {}
    for number, now in enumerate(rounds):
        for client in now["cohort"]:
            downlink += now["broadcast"]
            has_encoders, has_decoders = encoders.setdefault(client, set()), decoders.setdefault(client, set())
            new_encoder = {now["version"]} - has_encoders
            whole = full + sum(weighs[v][0] for v in new_encoder)
            missed = rounds[model_before.get(client, 0) : number]
            replayed = {r["version"] for r in missed}
            needed_encoders, needed_decoders = (replayed | {now["version"]}) - has_encoders, replayed - has_decoders
            halves = sum(weighs[v][0] for v in needed_encoders) + sum(weighs[v][1] for v in needed_decoders)
            sums = sum(r["sum"] for r in missed) + buffers + (0 if client in model_before else SEED_BYTES)
            if catch_up and sums + halves <= whole:
                downlink, codec = downlink + sums + halves, codec + halves
                has_decoders |= replayed
                has_encoders |= needed_encoders
            else:
                downlink, codec = downlink + whole, codec + whole - full
                has_encoders |= new_encoder
            model_before[client] = number
    return downlink, codec


def fitted(make: Any, downlink: Any, norm: bool = False, refreshed: bool = False, hidden: int = 40, rounds: int = ROUNDS, **changes: Any):
    module = federated(mlp(hidden=hidden, norm=norm), codec=make(), downlink=downlink, **changes)
    ledger = Ledger()
    callbacks = [ledger, *([refresh()] if refreshed else [])]
    run(module, rounds, data=federated_data(sampler=Uniform(3)), callbacks=callbacks)
    return module, ledger.rounds


@pytest.mark.parametrize("norm", [False, True], ids=["", "BatchNorm"])
@pytest.mark.parametrize("kind", CODECS)
def test_bytes_are_those_of_a_simulation_of_every_client(kind, norm):
    totals = {}
    for downlink in (FullModel(), CatchUp()):
        module, rounds = fitted(CODECS[kind], downlink, norm)
        counted = module.traffic.downlink, module.traffic.codec
        assert counted == downloads(module, rounds, isinstance(downlink, CatchUp))
        totals[type(downlink).__name__] = counted[0], weights_of(module)
    (full, by_full), (caught_up, by_catch_up) = totals["FullModel"], totals["CatchUp"]
    assert torch.equal(by_full, by_catch_up), "how clients get the model changed it"
    assert caught_up <= full
    if kind == "transform":
        assert caught_up < 0.8 * full


@pytest.mark.parametrize("hidden", [4, 40])
@pytest.mark.parametrize("make", [transform, learned])
def test_refreshed_codecs_are_paid_for_and_never_make_it_more_than_the_full_model(make, hidden):
    module, rounds = fitted(make, CatchUp(), refreshed=True, hidden=hidden)
    assert [r["version"] for r in rounds] == [1] * 4 + [2] * 4 + [3] * 4
    assert (module.traffic.downlink, module.traffic.codec) == downloads(module, rounds, True)
    full, _ = fitted(make, FullModel(), refreshed=True, hidden=hidden)
    assert torch.equal(weights_of(module), weights_of(full))
    assert module.traffic.downlink <= full.traffic.downlink == downloads(full, rounds, False)[0]
    once, _ = fitted(make, FullModel(), hidden=hidden)
    assert full.traffic.codec > once.traffic.codec


def test_a_client_that_was_there_last_round_downloads_one_sum():
    """And nothing else but the buffers: not the seed again, nor the encoder."""

    class Each(FederatedCallback):
        def __init__(self):
            self.sizes = []

        def on_round_end(self, trainer, pl_module, round):
            self.sizes.append(len(write_sum(round.codes, round.context, pl_module.codec.encoder.fingerprint, 1.0)))

    for make in (lambda: LinearCodec(4, "random", block_size=16), transform):
        each = Each()
        module = federated(mlp(hidden=40), codec=make(), downlink=CatchUp())
        run(module, 4, callbacks=[each])
        codec = module.codec
        gain = 8 if codec.integer else 0
        halves = encoder_bytes(codec) + beyond_encoder(codec) if codec.version else 0
        assert module.traffic.downlink == 8 * (SEED_BYTES + halves + sum(each.sizes[:3]) + 4 * gain)
        assert module.traffic.codec == 8 * halves


def test_a_repeated_attempt_does_not_download_the_model_again():
    """Only what is announced, the gain, is told to everybody of every attempt."""
    cohorts = []

    class Attempts(FederatedCallback):
        def on_round_start(self, trainer, pl_module, round):
            cohorts.append(set(round.cohort.tolist()))

    module = federated(mlp(norm=True), codec=transform(), downlink=CatchUp(), min_clients=5, max_attempts=200)
    run(module, 1, data=federated_data(sampler=Poisson(0.4)), callbacks=[Attempts()])
    met = set.union(*cohorts)
    assert sum(map(len, cohorts)) > len(met) and len(cohorts) > 1
    once = SEED_BYTES + encoder_bytes(module.codec) + 4 * 16  # seed, encoder and statistics
    assert module.traffic.downlink == len(met) * once + 8 * sum(map(len, cohorts))


def test_the_learning_rate_in_a_sum_is_that_of_its_round():
    rates = []

    class Watched(CatchUp):
        def finished(self, module, round, lr):
            rates.append(lr)
            super().finished(module, round, lr)

    module = federated(downlink=Watched(), server_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    run(module, 3)
    assert rates == [1.0, 0.5, 0.25]


def test_five_and_five_rounds_count_what_ten_do(tmp_path):
    def fit(rounds: int, ckpt_path: Any = None) -> Any:
        module = federated(mlp(hidden=20), codec=transform(), downlink=CatchUp())
        runner = trainer(rounds, callbacks=[pretraining(), refresh(3)])
        data = federated_data(sampler=Uniform(3))
        runner.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
        return module, runner

    straight, _ = fit(10)
    _, runner = fit(5)
    runner.save_checkpoint(tmp_path / "five.ckpt")
    resumed, _ = fit(10, tmp_path / "five.ckpt")
    assert resumed.traffic.state_dict() == straight.traffic.state_dict()
    mine, theirs = resumed.downlink.state_dict(), straight.downlink.state_dict()
    assert mine.keys() == theirs.keys() and all(
        torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in ("held", "decoders")
    )
    assert (mine["sizes"], mine["used"], mine["codecs"]) == (theirs["sizes"], theirs["used"], theirs["codecs"])
    assert torch.equal(weights_of(resumed), weights_of(straight))


def test_a_second_fit_goes_on_counting():
    module = federated(mlp(hidden=40), codec=LinearCodec(4, "random", block_size=16), downlink=CatchUp())
    run(module, 2)
    before = module.traffic.downlink
    run(module, 2)
    sums = module.downlink.sizes
    assert len(sums) == 4 and module.traffic.downlink - before == 8 * (sums[1] + sums[2])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PowerSGDCodec(1), "PowerSGDCodec"),
        (lambda: TopKCodec(8), "TopKCodec"),
        (lambda: QSGDCodec(4), "QSGDCodec"),
        (lambda: CountSketchCodec(2, 3), "CountSketchCodec"),
        (lambda: ChainCodec([LinearCodec(2, "random", block_size=16), CountSketchCodec(2, 3)]), "ChainCodec"),
    ],
)
def test_codecs_whose_sums_do_not_say_all_are_refused(make, named):
    with pytest.raises(ConfigurationError, match=f"sum alone gives the aggregate but {named}.*`model.downlink` to FullModel"):
        run(federated(codec=make(), downlink=CatchUp()), 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=1.0, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=1.0, maximize=True),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=1.0),
    ],
    ids=["momentum", "decay", "maximize", "adam", "groups"],
)
def test_server_optimizers_whose_steps_clients_cannot_take_are_refused(make):
    with pytest.raises(ConfigurationError, match="plain SGD of one learning rate as `model.server_optimizer`"):
        run(federated(downlink=CatchUp(), server_optimizer=make), 1)


def test_clients_end_up_with_the_current_version():
    module, _ = fitted(transform, CatchUp(), refreshed=True, rounds=9)
    assert set(module.downlink.versions.tolist()) <= {0, 1, 2, 3} and module.downlink.versions.max() == 3
    assert (module.downlink.decoders <= module.downlink.versions).all() and module.downlink.decoders.max() > 0


def test_bytes_beyond_the_encoder_are_those_of_tensors_the_encoder_does_not_hold():
    module, _ = fitted(transform, FullModel(), rounds=1)
    names = {"stages.0.boost", "stages.1.line", "stages.1.moments"}
    state = module.codec.decoder.state_dict()
    assert names < set(state)
    assert beyond_encoder(module.codec) == sum(4 * state[name].numel() for name in names)
    assert beyond_encoder(IdentityCodec().bind(module.layout)) == 0


def test_weights_by_samples_need_nothing_special():
    module, rounds = fitted(transform, CatchUp(), weighting="samples")
    assert (module.traffic.downlink, module.traffic.codec) == downloads(module, rounds, True)
