"""Which decoded aggregates the server takes, and what is said of those it does not."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlight.aggregation import PlainAggregator
from fedlight.callbacks import CodecPretraining, FederatedCallback
from fedlight.clients import FedAvg
from fedlight.codecs import (
    AutoencoderCodec,
    ChainCodec,
    CountSketchCodec,
    IdentityCodec,
    LinearCodec,
    PowerSGDCodec,
    QuantizeCodec,
    TransformCodec,
    TwoSidedCodec,
)
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Context, Private
from fedlight.core.errors import MessageError, RoundFailedError
from fedlight.core.layout import Layout
from fedlight.core.model import Model
from fedlight.core.pretraining import CodecTraining, ProxyFederation
from fedlight.core.running_sum import RunningSum
from fedlight.data import Digits, FederatedDataModule, Uniform
from fedlight.modules import MLP
from fedlight.rounds import FullModel, Server
from fedlight.rounds.host import AT_FIRST
from fedlight.rounds.run import way_out
from tests.federation import History, federated, mlp, run, trainer, weights_of


def learned(**changes) -> ChainCodec:
    return ChainCodec([AutoencoderCodec(**{"ratio": 2, "block_size": 16, "width": 4} | changes), QuantizeCodec(8)])


class BlowUp(FederatedCallback):
    """Multiplies the decoder's weights before some rounds' attempts."""

    def __init__(self, factor: float, *attempts: tuple[int, int]) -> None:
        self.factor, self.attempts = factor, attempts

    def on_round_start(self, trainer, pl_module, round):
        wanted = (round.context.round, round.context.attempt) in self.attempts
        before = (round.context.round, round.context.attempt - 1) in self.attempts
        with torch.no_grad():
            for parameter in pl_module.codec.decoder.parameters():
                parameter.mul_(self.factor if wanted and not before else 1 / self.factor if before and not wanted else 1)


def test_a_decoder_whose_weights_are_blown_up_is_refused_and_the_run_stops(caplog):
    module = federated(codec=learned())
    start = weights_of(module)
    with caplog.at_level(logging.WARNING), pytest.raises(RoundFailedError) as failed:
        run(module, 3, callbacks=[BlowUp(1e3, (1, 0), (1, 1), (1, 2))])
    assert "Round 1 had no usable aggregate" in str(failed.value) and "refresh the codec or choose another" in str(failed.value)
    assert "the decoded aggregate was refused, it is" in str(failed.value) and "where the sum of codes explains" in str(failed.value)
    warned = [record.message for record in caplog.records if "was refused" in record.message]
    assert len(warned) == 3 and all(message.startswith("Round 1: the decoded aggregate was refused, it is") for message in warned)
    assert torch.isfinite(weights_of(module)).all() and (weights_of(module) - start).norm() < 10


def test_a_round_whose_aggregate_is_refused_is_repeated_and_leaves_no_trace(caplog):
    """Neither the model nor the server's gain moves by what was refused."""
    history = History()
    plain, spy = federated(codec=learned()), None
    spy = run(plain, 2)
    module = federated(codec=learned())
    blown = BlowUp(1e3, (1, 0))
    with caplog.at_level(logging.WARNING):
        again = run(module, 2, callbacks=[blown], logger=history)
    assert history.rounds("round/attempts") == {0: 1, 1: 2}
    assert sum("was refused" in record.message for record in caplog.records) == 1
    assert torch.equal(again.weights[0], spy.weights[0]) and torch.equal(weights_of(module), again.weights[1])
    assert again.broadcast[1] == spy.broadcast[1]


def test_what_is_not_finite_is_refused(caplog):
    class Poison(FederatedCallback):
        def on_round_start(self, trainer, pl_module, round):
            with torch.no_grad():
                next(pl_module.codec.decoder.parameters()).fill_(math.nan)

    with caplog.at_level(logging.WARNING), pytest.raises(RoundFailedError, match="refused, it is not finite"):
        run(federated(codec=learned()), 1, callbacks=[Poison()])


def call_of(codec, updates) -> Any:
    """An attempt with these updates ``[clients, dim]``, decoded."""
    context = Context(broadcast=codec.decoder.broadcast({}))
    codes = RunningSum()
    with torch.no_grad():
        for i, update in enumerate(updates):
            codes.add(codec.encoder.encode(update, context, Private(torch.Generator().manual_seed(i))))
        aggregate = codec.decoder.decode(codes.mean(), context, {})
    current = SimpleNamespace(model=Model(torch.zeros(LAYOUT.dim), torch.empty(0)))
    return SimpleNamespace(
        context=context,
        codes=codes,
        aggregate=aggregate,
        current=current,
        buffers=[],
        decoder_state={},
        answered={0},
        counted={0},
        refused=None,
    )


class Counter:
    """A global model that counts the server's steps."""

    steps = 0

    def step(self, update, buffers) -> float:
        self.steps += 1
        return 1.0


def doubt(codec, call) -> str | None:
    """Return why a server refuses an aggregate, None if it takes its step with it: it does the one or the other."""
    model = Counter()
    server = Server(model, codec, FedAvg(steps=1), PlainAggregator(), FullModel(), lambda number, attempt: [0], 1)
    took = server.finish(call)
    assert took == (model.steps == 1) == (call.refused is None) == (server.state.rounds == 1)
    return call.refused


LAYOUT = Layout.of(mlp(hidden=30))
BANK = UpdateBank(0.1 * torch.randn(12, 4, LAYOUT.dim, generator=torch.Generator().manual_seed(0)), LAYOUT)
CODECS = {
    "identity": IdentityCodec,
    "linear": lambda: LinearCodec(4, block_size=16),
    "two-sided, corrected": lambda: TwoSidedCodec(4, correct_energy=True),
    "transform": lambda: TransformCodec(4, encoder_share=1.0),
    "autoencoder": lambda: AutoencoderCodec(4, block_size=16, width=4),
    "autoencoder with biases": lambda: AutoencoderCodec(4, block_size=16, width=4, bias=True),
    "learned integers": learned,
}


def briefly(codec, bank) -> dict[str, float]:
    optimizer = torch.optim.Adam([*codec.encoder.parameters(), *codec.decoder.parameters()], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (codec.reconstruct(bank.updates) - bank.updates.mean(1)).square().mean().backward()
        optimizer.step()
    return {}


@pytest.mark.quick(8)
@pytest.mark.parametrize("make", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 30.0])
def test_what_a_fitted_codec_decodes_is_trusted_however_large_updates_are(make, scale):
    codec = make()
    codec.fit(BANK, briefly)
    for updates in BANK.updates:
        assert doubt(codec, call_of(codec, scale * updates)) is None
        assert doubt(codec, call_of(codec, scale * updates[:1])) is None


def test_what_a_zero_code_is_decoded_to_is_trusted_when_updates_have_become_small():
    """Layers with biases decode nothing to something: late in training that is most of the aggregate, not a decoder gone wrong."""

    def biased(codec, bank) -> dict[str, float]:
        with torch.no_grad():
            for network in codec.decoder.networks:
                network.layers[-1].bias.fill_(0.5)
        return {}

    codec = AutoencoderCodec(4, block_size=16, width=4, bias=True)
    codec.fit(BANK, biased)
    call = call_of(codec, 1e-6 * BANK.updates[0])
    assert call.aggregate.norm() > 1e3 * 1e-6 * BANK.updates[0].norm() and doubt(codec, call) is None
    call.aggregate = 100 * call.aggregate
    assert doubt(codec, call) is not None


@pytest.mark.parametrize("make", CODECS.values(), ids=CODECS)
def test_what_is_much_longer_than_its_code_explains_is_not(make):
    codec = make()
    codec.fit(BANK, briefly)
    call = call_of(codec, BANK.updates[0])
    call.aggregate = 1e3 * call.aggregate
    reason = doubt(codec, call)
    if isinstance(codec, IdentityCodec):
        assert reason is None  # whatever was summed is what comes out
    else:
        assert reason is not None and "long where the sum of codes explains" in reason


def test_looking_at_the_length_moves_no_gain():
    codec = learned()
    codec.fit(BANK, briefly)
    call = call_of(codec, BANK.updates[0])
    before = codec.decoder.broadcast({})
    assert doubt(codec, call) is None
    assert codec.decoder.broadcast({}) == before


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "make",
    [
        lambda: ChainCodec([AutoencoderCodec(8, block_size=64, width=8), QuantizeCodec(6)]),
        lambda: ChainCodec([AutoencoderCodec(8, block_size=64, width=8, bias=True, activation="relu"), QuantizeCodec(6)]),
        lambda: TransformCodec(16, encoder_share=1.0),
    ],
    ids=["tanh", "relu with biases", "transform"],
)
def test_a_healthy_run_is_never_refused(make, caplog):
    """Digits until updates are a tenth of what they were: nothing is repeated."""
    torch.manual_seed(0)
    data = FederatedDataModule(source=Digits(), num_clients=20, sampler=Uniform(8), proxy_samples=200, seed=3)
    module = federated(MLP(64, [16], 10), codec=make(), algorithm=FedAvg(lr=0.2, steps=5, batch_size=16))
    history = History()
    pretrain = CodecPretraining(ProxyFederation(rounds=12, clients=6), CodecTraining(steps=60, check_every=30))
    with caplog.at_level(logging.WARNING):
        trainer(30, callbacks=[pretrain], logger=history).fit(module, datamodule=data)
    assert set(history.rounds("round/attempts").values()) == {1}
    assert not any("refused" in record.message for record in caplog.records)
    norms = list(history.rounds("round/aggregate_norm").values())
    assert sum(norms[-5:]) < 0.5 * sum(norms[:5])


# -- saturation --------------------------------------------------------------------------------------------------------


def saturations(codec, rounds: int = 3, **changes) -> dict[int, float]:
    history = History()
    run(federated(codec=codec, sim_every=1, **changes), rounds, logger=history)
    return history.rounds("sim/saturation")


def test_saturation_is_logged_in_rounds_that_the_simulation_compares():
    history = History()
    run(federated(codec=learned(), sim_every=2), 3, logger=history)
    assert set(history.rounds("sim/saturation")) == {0, 2} == set(history.rounds("sim/relative_error"))
    assert all(0 <= share < 0.2 for share in history.rounds("sim/saturation").values())


def test_saturation_tells_a_range_that_is_too_narrow():
    def clipped(clip: float) -> ChainCodec:
        return ChainCodec([LinearCodec(2, block_size=16), QuantizeCodec(6, clip=clip, smoothing=1.0)])

    wide, narrow = saturations(clipped(4.0)), saturations(clipped(0.3))
    assert max(wide.values()) < 0.05 and min(narrow.values()) > 0.3


def test_saturation_is_the_mean_over_clients():
    from fedlight.core.wire import saturation

    shares = {}

    class Reads(FederatedCallback):
        def on_client_message(self, trainer, pl_module, round, reply):
            decoder = pl_module.codec.decoder
            term = decoder.read_message(reply.payload, round.context)
            shares.setdefault(round.context.round, []).append(saturation(term, decoder.format))

    history = History()
    codec = ChainCodec([LinearCodec(2, block_size=16), QuantizeCodec(3, clip=1.0)])
    run(federated(codec=codec, sim_every=1), 2, callbacks=[Reads()], logger=history)
    assert history.rounds("sim/saturation") == pytest.approx({number: sum(s) / len(s) for number, s in shares.items()})


def test_float_codes_do_not_saturate():
    assert set(saturations(None).values()) == {0.0}


class Refuses(FederatedCallback):
    """Finds one client's messages malformed, from a pass on."""

    def __init__(self, client: int, step: int = 0) -> None:
        self.client, self.step = client, step

    def on_client_message(self, trainer, pl_module, round, reply):
        if reply.client == self.client and round.context.step >= self.step:
            raise MessageError("broken on the way")


def test_a_message_that_was_refused_counts_as_sent():
    """The mean message is a mean over what was sent: one that cannot be used makes it neither longer nor shorter."""
    whole, lossy = federated(codec=IdentityCodec()), federated(codec=IdentityCodec())
    run(whole, 2)
    run(lossy, 2, callbacks=[Refuses(3)])
    lost, kept = lossy.server_state.traffic, whole.server_state.traffic
    assert lost.mean_message == kept.mean_message and lost.uplink == kept.uplink


@pytest.mark.parametrize("step", [0, 1])
def test_a_client_that_is_lost_in_any_pass_is_named_and_counted(step, caplog):
    history = History()
    with caplog.at_level(logging.WARNING):
        run(federated(codec=PowerSGDCodec(1)), 2, callbacks=[Refuses(3, step)], logger=history)
    assert history.rounds("round/dropped") == {0: 1.0, 1: 1.0}
    assert [record.message for record in caplog.records if "dropped" in record.message] == [
        f"Round {number}: client 3 was dropped: broken on the way" for number in (0, 1)
    ]
    assert all(0 < loss < 10 for loss in history.rounds("sim/loss").values())


def test_a_chain_that_ends_in_a_codec_with_memory_is_never_refused():
    """What the server remembered may make an aggregate longer than this round's codes explain."""
    codec = ChainCodec([LinearCodec(2, "random", block_size=16), CountSketchCodec(2, 1)])
    run(federated(codec=codec), 6)
    assert codec.decoder.norm_bound(torch.ones(codec.decoder.code_dim), Context()) == math.inf


def test_the_way_out_of_a_failed_round_goes_by_why_it_failed():
    assert "learning rate" in way_out(["client 3: its loss is inf"], refused=False, unsummed=False)
    at_first = way_out([f"client 3: its loss is nan, {AT_FIRST}"], refused=False, unsummed=False)
    assert "NaN or Inf in clients' samples" in at_first and "learning rate" not in at_first
    assert way_out([], refused=False, unsummed=False) == "sample more clients"
    assert "refresh the codec" in way_out([], refused=True, unsummed=False)
    unsummed = way_out([], refused=False, unsummed=True)
    assert "`model.aggregator`" in unsummed and "sample more" not in unsummed
