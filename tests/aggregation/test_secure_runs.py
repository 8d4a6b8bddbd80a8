"""Federated runs through SecureAggregator: the same sums, models and rounds as without it, and nothing that tells of a client."""

from __future__ import annotations

import logging
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlight.aggregation import AggregationSetting, SecureAggregator
from fedlight.aggregation.base import TRAIN, Held
from fedlight.aggregation.secure import Session, SumFormat
from fedlight.aggregation.secure import messages as wire
from fedlight.aggregation.secure.messages import Stage
from fedlight.aggregation.secure.primitives import Identity, KeyPair, split
from fedlight.aggregation.secure_aggregator import ADVERTISE_KEYS, UNMASKING
from fedlight.callbacks import CodecRefresh, FederatedCallback
from fedlight.clients import FedAvg
from fedlight.codecs import (
    ChainCodec,
    CountSketchCodec,
    HalfCodec,
    IdentityCodec,
    LinearCodec,
    PowerSGDCodec,
    QSGDCodec,
    QuantizeCodec,
    StackedCodec,
    TopKCodec,
    TransformCodec,
    TwoSidedCodec,
    WindowCodec,
)
from fedlight.core.codec import Context
from fedlight.core.digest import digest_context
from fedlight.core.errors import ConfigurationError, RoundFailedError
from fedlight.core.pretraining import ProxyFederation
from fedlight.data import ClientSampler, Digits, FederatedDataModule, Poisson, Uniform
from fedlight.modules import MLP
from fedlight.rounds import CatchUp, Clients, StageDropOut
from tests.aggregation.parties import read_keys, write_keys
from tests.federation import Fixed, History, Spy, federated, federated_data, learned, mlp, pretraining, run, trainer, weights_of

BAD = 3
CLIENTS = 8  # of tests.federation.federated_data, everybody in every round


class Replay(ClientSampler):
    """The cohorts that are given, by round and attempt."""

    def __init__(self, cohorts: dict[tuple[int, int], list[int]]) -> None:
        self.cohorts = cohorts

    def sample(self, num_clients: int, seed: int, round: int, attempt: int) -> np.ndarray:
        return np.array(sorted(self.cohorts[round, attempt]), dtype=np.int64)


class Arrived(FederatedCallback):
    """Remembers what the server's side is given."""

    def __init__(self) -> None:
        self.replies = []

    def on_client_message(self, trainer, pl_module, round, reply):
        self.replies.append(reply)


class Carried(Clients):
    """Adds up what passes between the server and simulated clients, as bytes, by stage."""

    def __init__(self) -> None:
        self.up: dict[str, int] = {}
        self.down: dict[str, int] = {}
        self.payloads: dict[str, int] = {}
        self.codecs = 0

    def attach(self, run):
        self.simulated = run.simulated()
        return self

    def exchange(self, requests):
        for request in requests:
            self.down[request.stage] = self.down.get(request.stage, 0) + len(request.to_bytes())
            self.payloads[request.stage] = self.payloads.get(request.stage, 0) + len(request.payload)
            self.codecs += 0 if request.download is None else request.download.codec_bytes
        for reply in self.simulated.exchange(requests):
            self.up[reply.stage] = self.up.get(reply.stage, 0) + len(reply.to_bytes())
            yield reply

    def settle(self, key, counted):
        self.simulated.settle(key, counted)


def same_rounds(one: Spy, other: Spy) -> None:
    assert one.totals.keys() == other.totals.keys() and len(one.totals) > 1
    for number in one.totals:
        assert one.totals[number].dtype == torch.int64 and torch.equal(one.totals[number], other.totals[number])
        assert torch.equal(one.aggregates[number], other.aggregates[number])
        assert torch.equal(one.weights[number], other.weights[number])
        assert one.broadcast[number] == other.broadcast[number]


CODES = {
    "room for any sum": lambda: TransformCodec(16, secure_cohort=8, encoder_share=1.0),
    "windows": lambda: ChainCodec([TwoSidedCodec(2.5, encoder_share=1.0), WindowCodec(6.4, 8, tails=5)]),
}


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_a_run_on_digits_is_the_run_without_it_bit_for_bit(code):
    """With a learned code whose coordinates have several widths, a refresh that changes them, and clients that catch up on sums."""

    def digits(aggregator) -> Spy:
        torch.manual_seed(0)
        data = FederatedDataModule(source=Digits(), num_clients=20, sampler=Uniform(8), proxy_samples=200, seed=3)
        algorithm = FedAvg(lr=0.2, steps=5, batch_size=16)
        module = federated(MLP(64, [16], 10), codec=code(), algorithm=algorithm, aggregator=aggregator, downlink=CatchUp())
        return run(module, 5, data, callbacks=[CodecRefresh(3, ProxyFederation(rounds=8, clients=4))])

    same_rounds(digits(None), digits(SecureAggregator(8)))


def test_any_additive_codec_of_integers_will_do():
    def chain() -> ChainCodec:
        return ChainCodec([LinearCodec(2, "random", block_size=16), QuantizeCodec(5)])

    for codec in (learned, chain, lambda: QuantizeCodec(12)):
        same_rounds(run(federated(codec=codec())), run(federated(codec=codec(), aggregator=SecureAggregator(CLIENTS))))


def test_weights_travel_inside_the_sum():
    data = federated_data()
    data.setup()
    sizes = {client: data.client_size(client) for client in range(CLIENTS)}
    assert len(set(sizes.values())) > 1
    weights = []

    class Weighs(FederatedCallback):
        def on_cohort_end(self, trainer, pl_module, round):
            weights.append((round.codes.weight, round.codes.count))

    plain = run(federated(codec=learned(), weighting="samples"), 1, callbacks=[Weighs()])
    arrived = Arrived()
    aggregator = SecureAggregator(CLIENTS, max_weight=max(sizes.values()))
    module = federated(codec=learned(), weighting="samples", aggregator=aggregator)
    secure = run(module, 1, callbacks=[Weighs(), arrived])
    assert weights == [(sum(sizes.values()), CLIENTS)] * 2
    assert torch.equal(plain.totals[0], secure.totals[0]) and torch.equal(plain.weights[0], secure.weights[0])
    assert {reply.weight for reply in arrived.replies} == {None}
    masked, traffic = sum(len(reply.payload) for reply in arrived.replies), module.server_state.traffic
    assert traffic.uplink == masked + traffic.handshake_up  # and no weight beside the masked codes


DROP_OUTS = [
    StageDropOut(clients=2, seed=0),
    StageDropOut(advertise_keys=0.1, seed=0),
    StageDropOut(share_keys=0.1, seed=0),
    StageDropOut(train=0.15, seed=0),
    StageDropOut(consistency_check=0.15, unmasking=0.1, seed=0),
]


@pytest.mark.quick(2)
@pytest.mark.parametrize("drop_outs", DROP_OUTS, ids=["two at any stage", "keys", "shares", "codes", "late"])
def test_with_drop_outs_it_is_the_plain_run_of_the_survivors(drop_outs):
    """Whose attempts that failed are repeated: the later attempt's numbers are part of what clients draw."""
    aggregator, history = SecureAggregator(CLIENTS, threshold=5), History()
    secure = run(federated(codec=learned(), aggregator=aggregator, availability=drop_outs, max_attempts=10), 4, logger=history)
    attempts = {number: int(count) - 1 for number, count in history.rounds("round/attempts").items()}
    survivors = {key: [] for key in secure.replies}
    for number, attempt, client in secure.replies:
        survivors.setdefault((number, attempt), []).append(client)
    assert any(len(survivors[number, attempt]) < CLIENTS for number, attempt in attempts.items()) or drop_outs.unmasking

    class Later(FederatedCallback):
        """Takes the aggregate away in attempts that the secure run had to repeat."""

        def on_cohort_end(self, trainer, pl_module, round):
            if round.context.attempt < attempts[round.context.round]:
                round.aggregate = None

    cohorts = {(number, attempt): survivors.get((number, attempt)) or [0] for number in range(4) for attempt in range(10)}
    data = federated_data(sampler=Replay(cohorts))
    plain_history = History()
    module = federated(codec=learned(), max_attempts=10)
    plain = Spy()
    runner = trainer(4, callbacks=[pretraining(), plain, *ordered(module, Later())], logger=plain_history)
    runner.fit(module, datamodule=data)
    same_rounds(secure, plain)
    assert plain_history.rounds("round/attempts") == history.rounds("round/attempts")
    assert plain_history.rounds("round/clients") == history.rounds("round/clients")
    for number, attempt in attempts.items():
        silent = list(drop_outs.draw(number, attempt, range(CLIENTS)).values())
        # Whoever fell silent once its code had arrived is in the sum, and neither absent nor dropped.
        assert history.rounds("round/absent")[number] == silent.count("advertise_keys")
        assert history.rounds("round/dropped")[number] == silent.count("share_keys") + silent.count("train")


def windows(tails: float = 4.0, clients: int = CLIENTS) -> WindowCodec:
    return WindowCodec(6, clients, tails)


@pytest.mark.parametrize(("tails", "drop_outs"), [(4.0, StageDropOut(clients=2, seed=0)), (2.5, None)], ids=["drop-outs", "overflows"])
def test_sums_in_windows_are_those_in_the_clear(tails, drop_outs):
    """Whoever drops out, and where sums leave their windows: they are put right, counted, and the model is the same to the last bit."""
    history = History()
    aggregator = SecureAggregator(CLIENTS, threshold=5, sim_logs=True)
    module = federated(MLP(64, [16], 10), codec=windows(tails), aggregator=aggregator, availability=drop_outs, sim_every=1)
    torch.manual_seed(0)
    data = FederatedDataModule(source=Digits(), num_clients=CLIENTS, sampler=Uniform(CLIENTS), proxy_samples=200, seed=3)
    secure = run(module, 6, data, logger=history)
    wrapped, lost = history.rounds("round/wrapped"), history.rounds("round/lost")
    assert len(wrapped) == len(lost) == 6 and set(lost.values()) == {0.0}
    if drop_outs is None:
        assert sum(wrapped.values()) > 0
        data = FederatedDataModule(source=Digits(), num_clients=CLIENTS, sampler=Uniform(CLIENTS), proxy_samples=200, seed=3)
        same_rounds(secure, run(federated(MLP(64, [16], 10), codec=windows(tails), sim_every=1), 6, data))
    else:
        assert set(history.rounds("round/clients").values()) <= {6, 7, 8} and min(history.rounds("round/clients").values()) < 8


@pytest.mark.parametrize(("clients", "weight"), [(CLIENTS - 1, 1), (CLIENTS, 50)])
def test_windows_of_fewer_clients_or_of_equal_weights_are_refused(clients, weight):
    with pytest.raises(ConfigurationError, match="at most the .* codes that the codec has room for, all of weight 1"):
        run(federated(codec=windows(clients=clients), aggregator=SecureAggregator(CLIENTS, max_weight=weight)), 1)


def ordered(module, last: FederatedCallback) -> list[FederatedCallback]:
    """Return the codec's pair and a callback that comes after it."""
    from fedlight.callbacks import codec_callbacks

    return [*codec_callbacks(module.codec), last]


def test_a_cohort_below_the_threshold_fails_and_the_run_says_why(caplog):
    module = federated(codec=learned(), aggregator=SecureAggregator(CLIENTS), availability=StageDropOut(train=1.0))
    start = weights_of(module)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(RoundFailedError, match=r"in 3 attempts .*it fell silent at stage train.*: declare cohorts"),
    ):
        run(module, 1)
    assert "Round 0: attempt 2 ended without a sum. Expected at least 6 clients that sent a masked code but got 0" in caplog.text
    assert torch.equal(weights_of(module), start)
    traffic = module.server_state.traffic
    assert traffic.handshake_up > 0 and traffic.messages == 0 and traffic.ratio(10) == 0


def test_a_failed_attempt_is_repeated_with_new_keys_and_leaves_no_trace_in_the_codes():
    history = History()
    module = federated(codec=learned(), aggregator=SecureAggregator(CLIENTS), availability=StageDropOut(train=0.4, seed=1), max_attempts=50)
    secure = run(module, 2, logger=history)
    assert max(history.rounds("round/attempts").values()) > 1
    messages = [reply.payload for reply in secure.replies.values()]
    assert len({message[21:37] for message in messages}) == sum(history.rounds("round/attempts").values())  # a session for each attempt


def test_the_server_side_is_given_masked_codes_alone():
    arrived = Arrived()
    module = federated(codec=learned(), aggregator=SecureAggregator(CLIENTS))
    run(module, 2, callbacks=[arrived])
    plain = Arrived()
    run(federated(codec=learned()), 2, callbacks=[plain])
    assert len(arrived.replies) == len(plain.replies) == 2 * CLIENTS
    for masked, clear in zip(arrived.replies, plain.replies, strict=True):
        assert masked.client == clear.client and masked.simulation is None and masked.weight is None and masked.inside is None
        assert masked.buffers.untyped_storage().nbytes() == 0  # an empty view would still hold what it is a view of
        assert clear.simulation.update.norm() > 0
        assert masked.payload[:2] == b"SA" and masked.payload[3] == 4
        format = module.codec.encoder.format
        sums = SumFormat.of(format, CLIENTS)
        words = sums.integers(sums.unpack(masked.payload[41:]))
        assert (words == format.unpack(clear.payload[16:]).numpy()).mean() < 0.2


def test_every_byte_of_every_stage_is_counted_in_both_directions():
    n, carried, history = CLIENTS, Carried(), History()
    module = federated(codec=learned(), aggregator=SecureAggregator(n), clients=carried)
    spy = run(module, 2, logger=history)
    traffic, up, down = module.server_state.traffic, carried.up, carried.down
    keys, shares, _, signatures, revealed = stages = SecureAggregator.stages
    assert tuple(up) == tuple(down) == stages
    masked = sum(len(reply.payload) for reply in spy.replies.values())
    handshake = {keys: 41 + 160, shares: 41 + 52 * (n - 1), signatures: 41 + 64, revealed: 41 + 20 * n}
    assert up == {stage: 2 * n * size for stage, size in handshake.items()} | {TRAIN: masked}
    assert traffic.uplink == sum(up.values()) and traffic.handshake_up == sum(up.values()) - masked and traffic.messages == 2 * n
    sizes = [16, 41 + 164 * n, 41 + 52 * (n - 1), 41 + 4 * n, 41 + 8 + 4 * n + 68 * n]  # a session, the roster, an inbox, two lists
    assert carried.payloads == {stage: 2 * n * size for stage, size in zip(stages, sizes, strict=True)}
    assert traffic.downlink == sum(down.values()) and traffic.codec == carried.codecs > 0
    later = sum(down.values()) - down[keys]  # without secure aggregation there is the first request alone
    assert traffic.handshake_down == later + carried.payloads[keys]
    assert traffic.mean_message == masked / (2 * n)
    once = traffic.handshake_up / 2
    assert history.rounds("bytes/uplink_round") == {0: masked / 2 + once, 1: masked / 2 + once}
    assert history.rounds("bytes/handshake")[1] == traffic.handshake_up + traffic.handshake_down
    assert history.rounds("bytes/handshake")[0] == pytest.approx(once + traffic.handshake_down / 2, rel=0.02)  # contexts are packed


def test_the_download_is_that_of_a_run_without_it_but_for_the_name_of_its_stage():
    found = []
    for aggregator in (None, SecureAggregator(CLIENTS)):
        module = federated(codec=learned(), aggregator=aggregator)
        run(module, 3)
        found.append(module.server_state.traffic)
    plain, secure = found
    named = len(SecureAggregator.stages[0]) - len(TRAIN)
    assert secure.downlink - secure.handshake_down == plain.downlink + 3 * CLIENTS * named and plain.handshake_down == 0


def test_the_ratio_is_that_of_masked_codes_with_their_headroom():
    def ratio(aggregator) -> float:
        module = federated(codec=QuantizeCodec(4), aggregator=aggregator)
        run(module, 1)
        return module.server_state.traffic.ratio(module.layout.dim)

    dim = federated().layout.dim
    assert ratio(None) == 4 * dim / (16 + -(-dim * 4 // 8))
    # 8 clients of +-7: sums have 113 values, six of which lie in 41 bits; of 83 numbers five are left over, in 35.
    assert dim == 83 and ratio(SecureAggregator(CLIENTS)) == 4 * dim / (41 + -(-13 * 41 // 8) + -(-35 // 8))


def test_nothing_under_sim_is_logged_unless_asked_for():
    logs = []
    for asked in (False, True):
        history = History()
        run(federated(codec=learned(), aggregator=SecureAggregator(CLIENTS, sim_logs=asked), sim_every=1), 2, logger=history)
        logs.append({name for metrics in history.steps.values() for name in metrics if name.startswith("sim/")})
    assert logs == [set(), {"sim/loss", "sim/relative_error", "sim/cosine", "sim/saturation"}]


def test_metrics_under_sim_are_those_of_a_run_without_it():
    histories = [History(), History()]
    for history, aggregator in zip(histories, (None, SecureAggregator(CLIENTS, sim_logs=True)), strict=True):
        run(federated(codec=learned(), aggregator=aggregator, sim_every=1), 2, logger=history)
    for name in ("sim/loss", "sim/relative_error", "sim/saturation"):
        assert histories[0].rounds(name) == histories[1].rounds(name)


# -- resume ------------------------------------------------------------------------------------------------------------------------


def secure_run(rounds: int, ckpt=None, silent: int = 1, **changes):
    parts = {"aggregator": SecureAggregator(4, **changes), "availability": StageDropOut(clients=silent)}
    module, history, spy = federated(codec=learned(), **parts), History(), Spy()
    runner = trainer(rounds, logger=history, callbacks=[pretraining(), spy])
    runner.fit(module, datamodule=federated_data(sampler=Uniform(4)), ckpt_path=ckpt, weights_only=False)
    return module, runner, history, spy


def test_a_resumed_run_ends_where_an_uninterrupted_one_does_with_masks_of_its_own(tmp_path):
    straight, _, whole, seen = secure_run(6)
    _, runner, _, _ = secure_run(3)
    runner.save_checkpoint(tmp_path / "three.ckpt")
    resumed, _, rest, again = secure_run(6, tmp_path / "three.ckpt")
    assert torch.equal(weights_of(straight), weights_of(resumed))
    assert straight.server_state.traffic == resumed.server_state.traffic
    for name in ("round/clients", "bytes/uplink", "bytes/handshake"):
        assert {k: v for k, v in whole.rounds(name).items() if k >= 3} == rest.rounds(name)
    for key, reply in again.replies.items():
        assert reply.payload != seen.replies[key].payload and torch.equal(again.totals[key[0]], seen.totals[key[0]])


def test_no_key_or_seed_is_in_a_checkpoint(tmp_path, monkeypatch):
    """Neither a long-lived key, nor a key or seed of any session."""
    kept: list[bytes] = []

    def remember(kind) -> None:
        made = kind.__init__

        def init(self, private: bytes) -> None:
            kept.append(private)
            made(self, private)

        monkeypatch.setattr(kind, "__init__", init)

    def remembered(secret: bytes, threshold: int, shares: int) -> list[bytes]:
        kept.append(secret)
        return split(secret, threshold, shares)

    remember(KeyPair), remember(Identity)
    monkeypatch.setattr("fedlight.aggregation.secure.client.split", remembered)
    _, runner, _, _ = secure_run(2)
    runner.save_checkpoint(tmp_path / "two.ckpt")
    content = (tmp_path / "two.ckpt").read_bytes()
    assert len(set(kept)) > 30 and {len(secret) for secret in kept} == {16, 32}
    assert not [secret for secret in kept if secret in content or secret.hex().encode() in content]


@pytest.mark.parametrize(
    ("changes", "name"), [({"threshold": 4}, "aggregator"), ({"max_weight": 3}, "aggregator"), ({"silent": 0}, "availability")]
)
def test_a_run_is_not_resumed_with_another_aggregator_or_other_drop_outs(changes, name, tmp_path):
    _, runner, _, _ = secure_run(1)
    runner.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ConfigurationError, match=name):
        secure_run(2, tmp_path / "one.ckpt", **changes)


# -- refusals before training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        (IdentityCodec, "integers, which secure aggregation needs, but IdentityCodec sends floats"),
        (HalfCodec, "HalfCodec sends floats"),
        (CountSketchCodec, "CountSketchCodec sends floats"),
        (PowerSGDCodec, "PowerSGDCodec sends floats"),
        (TopKCodec, "can be summed, which secure aggregation needs"),
        (QSGDCodec, "can be summed, which secure aggregation needs"),
    ],
)
def test_codecs_that_cannot_be_summed_or_send_floats_are_refused(codec, said):
    with pytest.raises(ConfigurationError, match=said):
        run(federated(codec=codec(), aggregator=SecureAggregator(CLIENTS)))


def setting(**changes) -> AggregationSetting:
    return AggregationSetting(
        **{"codec": QuantizeCodec(4), "cohort": CLIENTS, "largest_weight": 1, "buffers": False, "processes": 1} | changes
    )


class TwoPasses(QuantizeCodec):
    passes = 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codec": TwoPasses(4)}, "codec of one pass a round but TwoPasses takes 2"),
        (
            {"codec": StackedCodec(QuantizeCodec(4), 2, 1), "algorithm": "Scaffold", "vectors": 2, "scalars": 1},
            "those of Scaffold upload numbers.*set `model.algorithm` to FedAvg",
        ),
        ({"processes": 2}, "Set `trainer.devices` to 1"),
        ({"buffers": True}, "`model.batch_norm` to local"),
        ({"min_clients": 7}, "at most the threshold of 6 but got 7.*Raise `model.aggregator.init_args.threshold`"),
        ({"cohort": 9}, "declared 8 clients but got 9: raise `model.aggregator.init_args.cohort`"),
        ({"largest_weight": 2}, "declared 1 but the largest is 2: raise `model.aggregator.init_args.max_weight`"),
    ],
)
def test_runs_that_cannot_work_are_refused_with_the_way_out(changes, said):
    SecureAggregator(CLIENTS).check(setting())
    with pytest.raises(ConfigurationError, match=said):
        SecureAggregator(CLIENTS).check(setting(**changes))


def test_runs_are_refused_before_the_codec_is_pretrained():
    with pytest.raises(ConfigurationError, match="declared 7 clients but got 8"):
        run(federated(codec=learned(), aggregator=SecureAggregator(7)), callbacks=[])
    with pytest.raises(ConfigurationError, match="BatchNorm statistics"):
        run(federated(mlp(norm=True), codec=learned(), aggregator=SecureAggregator(8)))
    with pytest.raises(ConfigurationError, match="max_weight"):
        run(federated(codec=learned(), weighting="samples", aggregator=SecureAggregator(8)))


def test_no_sum_is_opened_only_to_be_thrown_away():
    """The sum of an attempt that is then repeated from the same model would tell of the difference, and be in no ledger."""
    with pytest.raises(ConfigurationError, match="threshold of 6 but got 7"):
        run(federated(codec=learned(), min_clients=7, aggregator=SecureAggregator(8)))
    opened: list[int] = []

    class Opens(SecureAggregator):
        def collector(self, *arguments):
            collector = super().collector(*arguments)
            finish = collector.finish

            def noted():
                codes = finish()
                opened.append(codes.count)
                return codes

            collector.finish = noted
            return collector

    history, silent = History(), StageDropOut(train=0.2, seed=1)
    module = federated(codec=learned(), min_clients=7, max_attempts=50, aggregator=Opens(8, threshold=7), availability=silent)
    run(module, 3, logger=history)
    assert max(history.rounds("round/attempts").values()) > 1 and len(opened) == 3 and min(opened) >= 7


def test_local_batch_norm_goes_with_it():
    plain = run(federated(mlp(norm=True), codec=learned(), batch_norm="local"))
    same_rounds(plain, run(federated(mlp(norm=True), codec=learned(), batch_norm="local", aggregator=SecureAggregator(8))))


def test_a_cohort_that_is_larger_than_declared_sends_nothing_and_is_drawn_again():
    """Cohorts of Poisson sampling differ in size: one that might overflow is as good as one that is too small."""
    data = federated_data(sampler=Poisson(0.6), seed=6)
    data.setup()
    sizes = [len(data.cohort(number, 0)) for number in range(6)]
    declared = max(sizes) - 1
    assert 3 <= sizes[0] <= declared
    history = History()
    aggregator = SecureAggregator(declared, threshold=declared // 2 + 1)
    run(federated(codec=learned(), aggregator=aggregator, max_attempts=20), 6, data, logger=history)
    repeated = [attempts > 1 for attempts in history.rounds("round/attempts").values()]
    assert repeated == [not declared // 2 + 1 <= size <= declared for size in sizes] and any(repeated) and not all(repeated)


@pytest.mark.parametrize(("arguments", "said"), [((2,), "at least 3"), ((10, 5), "more than half"), ((10, 7, 0), "max_weight")])
def test_impossible_settings_are_refused(arguments, said):
    with pytest.raises(ConfigurationError, match=said):
        SecureAggregator(*arguments)


def test_small_cohorts_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        SecureAggregator(10).check(setting())
        assert not caplog.records
        SecureAggregator(9).check(setting())
    assert "the sum of so few codes tells much about each" in caplog.text


def test_sums_of_too_many_bits_are_refused_when_the_codec_is_known():
    codec = QuantizeCodec(16).bind(federated().layout)
    with pytest.raises(ConfigurationError, match="at most 32 bits"):
        SecureAggregator(10, max_weight=10**5).check(setting(codec=codec))


def test_a_message_of_a_run_opens_with_struct():
    module = federated(codec=learned(), aggregator=SecureAggregator(CLIENTS))
    for (number, _, client), reply in run(module, 2).replies.items():
        fields = struct.unpack_from("<2sBBBIIII16sI", reply.payload)
        assert fields[:3] == (b"SA", 2, 4)
        assert fields[4:8] == (number, client, module.codec.encoder.fingerprint, module.codec.encoder.code_dim)


# -- what clients agree on ---------------------------------------------------------------------------------------------------------


class Sessions(SecureAggregator):
    """Remembers every session that the server or a client made of what it holds, with the context."""

    def __init__(self, cohort: int = CLIENTS, max_weight: int = 1) -> None:
        super().__init__(cohort, max_weight=max_weight)
        self.made: list[tuple[Session, Context]] = []

    def session(self, id: bytes, held: Held) -> Session:
        self.made.append((super().session(id, held), held.context))
        return self.made[-1][0]


def sessions_of(**changes) -> dict[int, tuple[Session, Context]]:
    """Return the session of every round and the context in it, after both sides have been found to agree."""
    aggregator = changes.pop("aggregator", None) or Sessions()
    run(federated(**{"codec": learned(), "aggregator": aggregator} | changes), 2)
    by_round = {context.round: (session, context) for session, context in aggregator.made}
    assert len(by_round) == 2 and len(aggregator.made) > 2  # the server's, and one that all clients of this process share
    assert all(session == by_round[context.round][0] for session, context in aggregator.made)
    return by_round


def test_every_session_is_bound_to_what_was_broadcast():
    """A gain that differed between clients would leave one client's code alone in the sum."""
    for session, context in sessions_of().values():
        assert "gain" in str(context.broadcast)
        other = replace(context, broadcast={"1": {"gain": 1e30}})
        assert session.broadcast == digest_context(context) != digest_context(other)


class Announces(FedAvg):
    """An algorithm whose server broadcasts a number before every round."""

    def __init__(self, level: float) -> None:
        super().__init__(lr=0.1, steps=3, batch_size=8)
        self._level = level

    def broadcast(self, state):
        return {"level": torch.tensor(self._level)}


def test_every_session_is_bound_to_what_the_algorithms_server_broadcasts():
    for session, context in sessions_of(algorithm=Announces(2.0)).values():
        digests = [
            digest_context(replace(context, broadcast={**context.broadcast, "algorithm": {"level": torch.tensor(x)}})) for x in (2.0, 3.0)
        ]
        assert session.broadcast == digests[0] != digests[1]


def test_every_session_is_bound_to_the_model():
    (first, _), (second, _) = sessions_of().values()
    assert len(first.model) == 32 and first.model != second.model and first.encoder == second.encoder


def test_every_session_is_bound_to_how_clients_train():
    """So would a learning rate of nearly nothing for all the others."""
    settings = [
        {},
        {"algorithm": FedAvg(lr=1e-9, steps=2, batch_size=8)},
        {"algorithm": FedAvg(lr=1e-9, steps=3, batch_size=8)},
        {"network": mlp(dropout=0.5)},
        {"weighting": "samples", "aggregator": Sessions(max_weight=1000)},
    ]
    assert len({sessions_of(**changes)[0][0].training for changes in settings}) == len(settings)


class Forges(Clients):
    """A wire on which one client's keys, or the shares that it reveals, are not what an honest client sends."""

    def __init__(self, forge: str) -> None:
        self.forge, self.keys = forge, {}

    def attach(self, run):
        self.simulated = run.simulated()
        self.aggregator = run.aggregator
        return self

    @property
    def session(self):
        return self.aggregator.made[-1][0]

    def exchange(self, requests):
        for reply in self.simulated.exchange(requests):
            if reply.payload and reply.stage == ADVERTISE_KEYS and self.forge != "a wrong share":
                self._keys(reply)
            elif reply.payload and reply.stage == UNMASKING and reply.client == BAD and self.forge == "a wrong share":
                shares = dict(wire.read_records(self.session, bytes(reply.payload), Stage.UNMASKING, BAD))
                shares[0] = bytes([shares[0][0] ^ 1]) + shares[0][1:]
                reply.payload = wire.write_records(self.session, Stage.UNMASKING, BAD, shares.items())
            yield reply

    def _keys(self, reply):
        session = self.session
        keys = self.keys[reply.client] = read_keys(session, bytes(reply.payload), reply.client)
        if reply.client == BAD:
            forged = keys._replace(mask=bytes(32) if self.forge == "a key of low order" else self.keys[0].mask)
            signature = self.aggregator.identities.of(BAD).sign(forged.signed(session, BAD))
            reply.payload = write_keys(session, BAD, forged._replace(signature=signature))

    def settle(self, key, counted):
        self.simulated.settle(key, counted)


@pytest.mark.parametrize("forge", ["a key of low order", "a copied key", "a wrong share"])
def test_one_bad_client_costs_nobody_else_the_round(forge, caplog):
    """Whose keys cannot be used is left out; whose shares are wrong is named, and the others' shares open the sum."""
    spy, history = Spy(), History()
    module = federated(codec=learned(), aggregator=Sessions(), clients=Forges(forge))
    cohort = [*range(CLIENTS)]
    trainer(1, logger=history, callbacks=[spy, pretraining()]).fit(module, datamodule=federated_data(sampler=Fixed(cohort)))
    assert history.rounds("round/attempts") == {0: 1.0} and history.rounds("round/dropped") == {0: 1.0}
    counted = cohort if forge == "a wrong share" else [client for client in cohort if client != BAD]
    honest = Spy()
    others = federated(codec=learned(), aggregator=SecureAggregator(CLIENTS))
    trainer(1, callbacks=[honest, pretraining()]).fit(others, datamodule=federated_data(sampler=Fixed(counted)))
    assert torch.equal(spy.totals[0], honest.totals[0]) and torch.equal(weights_of(module), weights_of(others))
    said = {"a key of low order": "low order", "a copied key": "in use already", "a wrong share": "the share that it revealed"}[forge]
    assert f"client {BAD} was dropped" in caplog.text and said in caplog.text
