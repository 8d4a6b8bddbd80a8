"""What clients download: counted by hand from what a run sent (law 6)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fedlight.aggregation.base import TRAIN
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
from fedlight.core.export import encoder_file
from fedlight.core.packing import unpack
from fedlight.core.pretraining import CodecTraining, ProxyFederation
from fedlight.data import Poisson, Uniform
from fedlight.rounds import CatchUp, Clients, Download, FullModel, Request
from fedlight.rounds.held import beyond_encoder, write_decoder
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
    """Keeps of every round who took part, and all that a download can be made of, as bytes."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, Any]] = []

    def on_round_start(self, trainer, pl_module, round):
        codec = pl_module.codec
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]  # before the schedule moves on
        self.rounds.append(
            {
                "cohort": list(round.cohort),
                "context": round.context,
                "model": pl_module.server.model.read(),
                "settled": dict(pl_module.server_state.settled),
                "version": codec.version,
                "encoder": encoder_file(codec) if codec.version else b"",
                "beyond": beyond_encoder(codec) if codec.version else b"",
            }
        )

    def on_round_end(self, trainer, pl_module, round):
        self.rounds[-1]["sum"] = write_sum(round.codes, round.context, pl_module.codec.encoder.fingerprint, self.lr)


class Tap(Clients):
    """Keeps every request on its way to simulated clients."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def attach(self, run):
        self.simulated = run.simulated()
        return self

    def exchange(self, requests):
        self.requests += requests
        yield from self.simulated.exchange(requests)

    def settle(self, key, counted):
        self.simulated.settle(key, counted)


def refresh(every: int = 4) -> CodecRefresh:
    return CodecRefresh(every, ProxyFederation(rounds=8, clients=3, samples=10), CodecTraining(steps=2, check_every=1))


def downloads(rounds: list[dict[str, Any]], catch_up: bool) -> tuple[int, int]:
    """Return (downlink, codec) bytes of a run: the shortest message that takes each client to the model, told round by round."""
    files = {r["version"]: (r["encoder"], r["beyond"]) for r in rounds}
    downlink = codec = 0
    held: dict[int, int] = {}  # the last round before which a client held the model
    encoders: dict[int, set[int]] = {}
    decoders: dict[int, set[int]] = {}
    for number, now in enumerate(rounds):
        for client in now["cohort"]:
            has_encoders, has_decoders = encoders.setdefault(client, {0}), decoders.setdefault(client, {0})
            version, model, since = now["version"], now["model"], held.get(client, 0)
            latest = tuple((v, files[v][0]) for v in {version} - has_encoders)
            chosen = Download(number, model=model, encoders=latest, version=version, keep=catch_up)
            missed = rounds[since:number]
            replayed = {r["version"] for r in missed}
            by_sums = Download(
                number,
                since=since,
                sums=tuple((r["version"], r["sum"]) for r in missed),
                encoders=tuple((v, files[v][0]) for v in sorted((replayed | {version}) - has_encoders)),
                decoders=tuple((v, files[v][1]) for v in sorted(replayed - has_decoders)),
                buffers=model.buffers if missed else model.buffers[:0],
                version=version,
                keep=True,
            )
            if catch_up and len(by_sums.to_bytes()) <= len(chosen.to_bytes()):
                chosen = by_sums
                has_decoders |= replayed
            has_encoders |= {v for v, _ in chosen.encoders}
            downlink += len(Request(client, TRAIN, now["context"], chosen, b"", now["settled"].get(client)).to_bytes())
            codec += sum(len(data) for _, data in (*chosen.encoders, *chosen.decoders))
            held[client] = number
    return downlink, codec


def counted(module: Any) -> tuple[int, int]:
    """Return the (downlink, codec) bytes that the run counted."""
    return module.server_state.traffic.downlink, module.server_state.traffic.codec


def fitted(make: Any, downlink: Any, norm: bool = False, refreshed: bool = False, hidden: int = 40, rounds: int = ROUNDS, **changes: Any):
    module = federated(mlp(hidden=hidden, norm=norm), codec=make(), downlink=downlink, **changes)
    ledger = Ledger()
    callbacks = [ledger, *([refresh()] if refreshed else [])]
    run(module, rounds, data=federated_data(sampler=Uniform(3)), callbacks=callbacks)
    return module, ledger.rounds


@pytest.mark.quick(3)
@pytest.mark.parametrize("norm", [False, True], ids=["", "BatchNorm"])
@pytest.mark.parametrize("kind", CODECS)
def test_bytes_are_those_of_a_simulation_of_every_client(kind, norm):
    totals = {}
    for downlink in (FullModel(), CatchUp()):
        module, rounds = fitted(CODECS[kind], downlink, norm)
        assert counted(module) == downloads(rounds, isinstance(downlink, CatchUp))
        totals[type(downlink).__name__] = counted(module)[0], weights_of(module)
    (full, by_full), (caught_up, by_catch_up) = totals["FullModel"], totals["CatchUp"]
    assert torch.equal(by_full, by_catch_up), "how clients get the model changed it"
    assert caught_up <= full
    if kind == "transform":
        assert caught_up < 0.8 * full


@pytest.mark.quick(1)
@pytest.mark.parametrize("hidden", [4, 40])
@pytest.mark.parametrize("make", [transform, learned])
def test_refreshed_codecs_are_paid_for_and_never_make_it_more_than_the_full_model(make, hidden):
    module, rounds = fitted(make, CatchUp(), refreshed=True, hidden=hidden)
    assert [r["version"] for r in rounds] == [1] * 4 + [2] * 4 + [3] * 4
    assert counted(module) == downloads(rounds, True)
    full, _ = fitted(make, FullModel(), refreshed=True, hidden=hidden)
    assert torch.equal(weights_of(module), weights_of(full))
    assert counted(module)[0] <= counted(full)[0] == downloads(rounds, False)[0]
    once, _ = fitted(make, FullModel(), hidden=hidden)
    assert counted(full)[1] > counted(once)[1]


@pytest.mark.parametrize("make", [lambda: LinearCodec(4, "random", block_size=16), transform], ids=["projection", "transform"])
def test_a_client_that_was_there_last_round_downloads_one_sum(make):
    """And nothing else but what is announced: not the encoder again, and the decoder once, before it takes its first step itself."""
    tap = Tap()
    module = federated(mlp(hidden=40), codec=make(), downlink=CatchUp(), clients=tap)
    run(module, 4)
    assert len(tap.requests) == 4 * 8 and all(request.download.model is None for request in tap.requests)
    learns = bool(module.codec.version)
    for request in tap.requests:
        number, download = request.context.round, request.download
        assert len(download.sums) == (number > 0)
        assert len(download.encoders) == (learns and number == 0) and len(download.decoders) == (learns and number == 1)
    assert module.server_state.traffic.downlink == sum(len(request.to_bytes()) for request in tap.requests)
    halves = len(encoder_file(module.codec)) + len(beyond_encoder(module.codec)) if learns else 0
    assert module.server_state.traffic.codec == 8 * halves


def test_a_repeated_attempt_does_not_download_the_model_again():
    """Only the request with what is announced, the gain, goes to everybody of every attempt, and the statistics of BatchNorm."""
    tap = Tap()
    module = federated(mlp(norm=True), codec=transform(), downlink=CatchUp(), clients=tap, min_clients=5, max_attempts=200)
    run(module, 1, data=federated_data(sampler=Poisson(0.4)))
    met: set[int] = set()
    repeated = 0
    for request in tap.requests:
        download = request.download
        assert download.model is None and download.sums == download.decoders == ()
        assert len(download.encoders) == (request.client not in met)
        repeated += request.client in met
        met.add(request.client)
    assert repeated and max(request.context.attempt for request in tap.requests) > 0
    assert module.server_state.traffic.codec == len(met) * len(encoder_file(module.codec))
    assert module.server_state.traffic.downlink == sum(len(request.to_bytes()) for request in tap.requests)


def test_the_learning_rate_in_a_sum_is_that_of_its_round():
    rates = []

    class Watched(CatchUp):
        def finished(self, current, context, codes, lr, model):
            rates.append(lr)
            super().finished(current, context, codes, lr, model)

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
    assert resumed.server_state.traffic == straight.server_state.traffic
    mine, theirs = resumed.downlink, straight.downlink
    assert (mine.held, mine.versions, mine.decoders) == (theirs.held, theirs.versions, theirs.decoders)
    assert mine.sums == theirs.sums and len(mine.sums) > 5
    weigh = [{version: (len(encoder), decoder) for version, (encoder, decoder) in each.files.items()} for each in (mine, theirs)]
    assert weigh[0] == weigh[1] and weigh[0], "an encoder's file may list its header in another order"
    assert torch.equal(weights_of(resumed), weights_of(straight))


def test_a_second_fit_begins_anew():
    """As a new module that starts from the weights that the first one ended with, which no seed gives: everybody downloads them once."""
    module = federated(mlp(hidden=40), codec=LinearCodec(4, "random", block_size=16), downlink=CatchUp())
    run(module, 3)
    fresh = federated(copy.deepcopy(module.network), codec=LinearCodec(4, "random", block_size=16), downlink=CatchUp(drawn=False))
    run(module, 2)
    run(fresh, 2)
    assert module.server_state.rounds == 2 and set(module.downlink.sums) == {0, 1}
    assert module.server_state.state_dict() == fresh.server_state.state_dict()
    assert module.downlink.sums == fresh.downlink.sums and module.downlink.held == fresh.downlink.held
    assert torch.equal(weights_of(module), weights_of(fresh))
    assert module.server_state.traffic.downlink > 8 * 4 * module.layout.dim


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
    versions, decoders = module.downlink.versions, module.downlink.decoders
    assert set(versions.values()) <= {1, 2, 3} and max(versions.values()) == 3
    assert all(decoder <= versions[client] for client, decoder in decoders.items()) and max(decoders.values()) > 0


def test_bytes_beyond_the_encoder_are_those_of_tensors_the_encoder_does_not_hold():
    module, _ = fitted(transform, FullModel(), rounds=1)
    names = {"stages.0.boost", "stages.1.line", "stages.1.moments"}
    state = module.codec.decoder.state_dict()
    assert names < set(state)
    sent = unpack(beyond_encoder(module.codec))
    assert set(sent) == names and all(torch.equal(sent[name], state[name]) for name in names)
    assert unpack(beyond_encoder(IdentityCodec().bind(module.layout))) == {}
    other = copy.deepcopy(module.codec.decoder)
    with torch.no_grad():
        other.load_state_dict({name: value + 1 if name in names else value for name, value in state.items()})
    write_decoder(other, beyond_encoder(module.codec))
    assert all(torch.equal(other.state_dict()[name], value) for name, value in state.items())


def test_weights_by_samples_need_nothing_special():
    module, rounds = fitted(transform, CatchUp(), weighting="samples")
    assert counted(module) == downloads(rounds, True)
