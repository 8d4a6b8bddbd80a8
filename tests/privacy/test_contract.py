"""Every law of fedlight/privacy/mechanism.py, on every mechanism. A new mechanism is one more row in ``MECHANISMS``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from fedlight.codecs import ChainCodec, GridCodec, IdentityCodec, TwoSidedCodec
from fedlight.core.codec import Codec, Context, Private
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout
from fedlight.modules.checks import private_codec
from fedlight.privacy import AccountingSetting, AdaptiveClipping, CentralDP, DistributedDP, LocalDP, PrivacyMechanism, mechanism
from fedlight.privacy.noise import SystemNoise

DIM = 300
LAYOUT = Layout.vector(DIM)
SETTING = AccountingSetting(rate=0.1, cohort=50, rounds=20, length=DIM, integer=False)


@dataclass(frozen=True)
class Row:
    make: Callable[..., PrivacyMechanism]
    share: bool = False  # whether clients add noise
    counted: float = 1.0  # what a multiplier is worth in the ledger
    rate: float = 1.0


MECHANISMS = {
    "central": Row(CentralDP, rate=0.1),
    "central, adaptive": Row(lambda clip, **more: CentralDP(clip, adaptive=AdaptiveClipping(), **more), rate=0.1),
    "distributed": Row(lambda clip, **more: DistributedDP(clip, threshold=40, colluding=4, **more), share=True),
    "local": Row(LocalDP, share=True, counted=0.5),
}

rows = pytest.mark.parametrize("row", MECHANISMS.values(), ids=MECHANISMS)
calibrated = pytest.mark.parametrize(  # finding the noise of a sampled cohort takes seconds
    "row", [pytest.param(row, marks=[pytest.mark.slow] * (row.rate < 1)) for row in MECHANISMS.values()], ids=MECHANISMS
)


def begun(row: Row, clip: float = 2.0, multiplier: float | None = 0.8, **more) -> tuple[PrivacyMechanism, Codec]:
    privacy = row.make(clip, noise_multiplier=multiplier, **{"simulation_seed": 5} | more)
    codec = private_codec(IdentityCodec(), privacy)
    assert codec is not None
    codec.bind(LAYOUT)
    privacy.calibrate(replace(SETTING, integer=codec.integer, bits=codec.encoder.format.bits), population=1000)
    return privacy, codec


def send(privacy: PrivacyMechanism, codec: Codec, update: torch.Tensor, client: int, silent: bool = False, number: int = 0) -> torch.Tensor:
    """Return what the server reads of one client, in the units of the update."""
    context = Context(round=number, broadcast=codec.decoder.broadcast({}) | privacy.broadcast())
    private = Private(torch.Generator().manual_seed(client))
    code = codec.encoder.encode(update, context, private)
    code, _ = privacy.protect(torch.zeros_like(code) if silent else code, codec.encoder, context, private, client)
    message = codec.encoder.message(code, context)
    unit = codec.encoder.common_step(context)
    assert unit is not None
    return codec.decoder.read_message(message, context).double() * unit


@rows
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e30])
def test_what_is_in_a_message_is_clipped_and_has_the_noise_of_its_share(row, scale):
    privacy, codec = begun(row)
    update = scale * torch.randn(DIM, generator=torch.Generator().manual_seed(1))
    received = torch.stack([send(privacy, codec, update, client) for client in range(60)])
    if not row.share:
        assert (received.norm(dim=1) <= 2.0 * (1 + 1e-12)).all()
        return
    assert received.mean(0).norm() < 2.0 + 1.3 * privacy.sum_deviation(1.0, 60) * math.sqrt(DIM) / 60
    noise = received - received.mean(0)
    assert float(noise.std()) == pytest.approx(privacy.sum_deviation(1.0, 1), rel=0.03)


@rows
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_client_with_nothing_usable_sends_zeros_and_its_noise(row, bad):
    privacy, codec = begun(row)
    update = torch.full((DIM,), bad)
    silent = send(privacy, codec, torch.zeros(DIM), 3, silent=True)
    nothing = send(privacy, codec, torch.zeros(DIM), 3)
    assert torch.equal(silent, nothing)
    assert silent.any() == row.share
    if not codec.integer:  # a float code that is not finite is caught once more
        assert torch.equal(send(privacy, codec, update, 3), nothing)


@rows
def test_noise_of_a_sum_has_the_deviation_that_the_ledger_says(row):
    """Server's and clients' noise together, at the least number of clients that a round goes on with."""
    privacy, codec = begun(row)
    clients = privacy.least_clients(1) or 7
    sums = []
    for number in range(12):
        total = torch.stack([send(privacy, codec, torch.zeros(DIM), client, number=number) for client in range(clients)]).sum(0)
        noise = privacy.sum_noise(DIM, 1.0, Context(round=number))
        sums.append(total if noise is None else total + noise)
    measured = float(torch.stack(sums).std())
    assert measured == pytest.approx(privacy.sum_deviation(1.0, clients), rel=0.04)
    assert measured >= 0.96 * 0.8 * 2.0
    privacy.record_release(0.0)
    ((multiplier, rate, times),) = privacy.ledger.lines
    assert (rate, times) == (row.rate, 1)
    assert multiplier == pytest.approx(row.counted * 0.8)


@rows
def test_noise_differs_by_round_attempt_and_client_and_repeats_with_the_seed(row):
    privacy, _ = begun(row)
    places = [(Context(round=r, attempt=a), c) for r in (0, 1) for a in (0, 1) for c in (-1, 0, 1)]
    draws = [privacy.source(context, client).gaussian(4, 1.0) for context, client in places]
    assert len({tuple(draw) for draw in draws}) == len(places)
    assert all(
        (privacy.source(context, client).gaussian(4, 1.0) == draw).all() for (context, client), draw in zip(places, draws, strict=True)
    )


@rows
def test_without_a_simulation_seed_no_seed_is_ever_used(row, monkeypatch):
    def refuse(*path):
        raise AssertionError("seeded noise in a run that is no simulation")

    monkeypatch.setattr(mechanism, "SeededNoise", refuse)
    privacy, codec = begun(row, simulation_seed=None)
    assert isinstance(privacy.source(Context()), SystemNoise)
    one, two = send(privacy, codec, torch.zeros(DIM), 0), send(privacy, codec, torch.zeros(DIM), 0)
    assert torch.equal(one, two) != row.share
    noises = [privacy.sum_noise(DIM, 1.0, Context()) for _ in range(2)]
    assert noises[0] is None or not torch.equal(noises[0], noises[1])
    assert privacy.report()["privacy"]["noise"] == "operating system"


@calibrated
def test_a_target_is_kept_and_stops_the_run(row):
    privacy, _ = begun(row, multiplier=None, target_epsilon=6.0)
    releases = 0
    while privacy.affordable():
        privacy.record_release(0.0)
        releases += 1
        assert privacy.epsilon() <= 6.0 and privacy.epsilon() <= privacy.epsilon(amplified=False)
    assert releases == SETTING.rounds == len(privacy.ledger)
    assert privacy.epsilon() > 5.9


@calibrated
def test_state_survives_and_settings_are_plain(row):
    privacy, _ = begun(row, multiplier=None, target_epsilon=6.0)
    for _ in range(3):
        privacy.record_release(-9.0)
    state = json.loads(json.dumps(privacy.state_dict()))
    other, _ = begun(row, multiplier=1.5)
    other.load_state_dict(state)
    assert other.state_dict() == privacy.state_dict()
    assert (other.epsilon(), other.norm, other.multiplier) == (privacy.epsilon(), privacy.norm, privacy.multiplier)
    assert json.loads(json.dumps(privacy.settings()))["target_epsilon"] == 6.0


@rows
def test_the_report_says_everything_that_a_statement_needs(row):
    privacy, _ = begun(row)
    privacy.record_release(0.0)
    report = json.loads(json.dumps(privacy.report()))
    assert {"epsilon", "epsilon_if_cohorts_secret", "delta", "noise_multiplier", "clip"} < set(report)
    details = report["privacy"]
    assert details["unit"] == "user" and details["rounds"] == 1 and details["sampling_rate"] == row.rate
    assert details["neighbouring_relation"] and details["accountant"] in ("pld", "rdp") and "simulation" in details["noise"]


@rows
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": 0.0}, "`clip` > 0"),
        ({"delta": 0.0}, "`delta` between 0 and 1"),
        ({"multiplier": None}, "`noise_multiplier` or `target_epsilon` but got neither"),
        ({"multiplier": 0.0}, "`noise_multiplier` >= 0.05"),
        ({"target_epsilon": -1.0}, "`target_epsilon` > 0"),
        ({"delta": 0.01}, "`delta` below 1 / 1,000 clients"),
        ({"target_epsilon": 0.01}, "allows one round but one costs"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_is_refused(row, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        begun(row, **changes)


@pytest.mark.parametrize(
    ("make", "setting", "message"),
    [
        (lambda: CentralDP(1.0, 1.0), {"rate": None}, "set `data.sampler` to Poisson or Everyone"),
        (lambda: CentralDP(1.0, 1.0, accountant="pld"), {"integer": True}, "rdp .or auto. for integer codes"),
        (lambda: CentralDP(1.0, target_epsilon=1.0), {"rounds": None}, "`trainer.max_steps` to calibrate"),
        (lambda: CentralDP(1.0, 6.0, adaptive=AdaptiveClipping()), {}, "`bit_noise` above half the noise multiplier"),
        (lambda: LocalDP(1.0, 1.0), {"integer": True}, "float codes for LocalDP"),
        (lambda: DistributedDP(1.0, 40, noise_multiplier=1.0), {"integer": True, "bits": 12}, "`bits` >= 13 for 1024 steps"),
        (lambda: DistributedDP(1.0, 40, noise_multiplier=1.0, grid=3), {"integer": True, "bits": 18}, "3 is too coarse"),
        (
            lambda: DistributedDP(1.0, 51, noise_multiplier=1.0),
            {"integer": True, "bits": 18},
            "at least `threshold` clients .51. but they have 50",
        ),
        (lambda: DistributedDP(1.0, 4, 4, 1.0), {}, "`colluding` < `threshold`"),
        (lambda: CentralDP(1.0, 1.0, accountant="moments"), {}, "`accountant` to be one of auto, pld, rdp"),
        (lambda: AdaptiveClipping(quantile=1.0), {}, "`quantile` between 0 and 1"),
    ],
    ids=range(11),
)
def test_what_a_mechanism_cannot_do_is_refused(make, setting, message):
    with pytest.raises(ConfigurationError, match=message):
        make().calibrate(replace(SETTING, **setting), population=1000)


def test_the_adaptive_norm_follows_the_clients_norms_under_noise():
    """Half of the clients' norms lie below 1."""
    norms = torch.distributions.LogNormal(0.0, 0.4).sample((1000,))
    for start in (0.05, 20.0):
        privacy, _ = begun(MECHANISMS["central, adaptive"], clip=start)
        generator = torch.Generator().manual_seed(0)
        for number in range(150):
            cohort = norms[torch.rand(1000, generator=generator) < 0.1 / 2]
            bits = float((cohort <= privacy.norm).sum()) - len(cohort) / 2
            privacy.record_release(bits + privacy.bit_noise(Context(round=number)))
        assert privacy.norm == pytest.approx(float(norms.median()), rel=0.15)
        assert privacy.broadcast() == {"clip": privacy.norm}


def test_an_adaptive_norm_costs_a_little_more_noise_on_the_codes():
    privacy, _ = begun(MECHANISMS["central, adaptive"])
    assert 0.8 < privacy.code_multiplier < 0.82
    assert privacy.sum_deviation(0.5, 0) == pytest.approx(privacy.code_multiplier * 2.0 / 0.5)


def test_distributed_shares_add_up_when_the_colluding_ones_are_taken_away():
    privacy, _ = begun(MECHANISMS["distributed"])
    assert math.sqrt(40 - 4) * privacy.share_deviation(0.8, 2.0) == pytest.approx(0.8 * 2.0)


def test_the_grid_is_put_behind_float_codes_once_and_refuses_integers():
    privacy = DistributedDP(2.0, 40, noise_multiplier=1.0, grid=512, bits=16)
    once = private_codec(TwoSidedCodec(4), privacy)
    assert isinstance(once, ChainCodec) and once.codecs[-1].config() == GridCodec(2.0 / 512, 16).config()
    assert private_codec(once, privacy) is once
    assert private_codec(once, None) is once and private_codec(None, CentralDP(1.0, 1.0)) is None
    with pytest.raises(ConfigurationError, match="float codes for DistributedDP.*TwoSidedCodec instead of TransformCodec"):
        private_codec(GridCodec(0.1, 8), privacy)
