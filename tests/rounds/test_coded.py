"""Global models that are codes: changes as bytes, and what server and clients make of them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlight.clients import Scaffold
from fedlight.codecs import AutoencoderCodec, EntropyCodec, IdentityCodec, LinearCodec, PowerSGDCodec, QSGDCodec, TopKCodec, TransformCodec
from fedlight.core.codec import Context
from fedlight.core.entropy import TOP
from fedlight.core.errors import ConfigurationError, MessageError
from fedlight.core.layout import Layout
from fedlight.core.wire import CodeFormat, JointFormat
from fedlight.rounds import Call, CatchUp, CodedModel, FullModel
from fedlight.rounds.coded import HEADER, Change, change_of, levels_of, read_change, unit_exponent, write_change
from tests.codecs.test_contract import CODECS
from tests.federation import federated, federated_data, run, trainer, weights_of
from tests.rounds.federation import federation, fitted, network
from tests.rounds.test_downlink import Tap, pretraining, refresh
from tests.rounds.test_through_bytes import fits

CODEC = 99
LEVELS = np.random.default_rng(0).integers(0, TOP + 1, 40).astype(np.uint8).tobytes()
integers = st.one_of(
    st.integers(-3, 3), st.integers(-5000, 5000), st.integers(-(2**51), 2**51), st.sampled_from([-4096, -4095, 4094, 4095])
)


@given(values=st.lists(integers, max_size=40), exponent=st.integers(-60, 30), since=st.integers(0, 99), rounds=st.integers(1, 99))
def test_changes_come_back_as_they_were(values: list[int], exponent: int, since: int, rounds: int) -> None:
    whole = torch.tensor(values, dtype=torch.int64)
    change = change_of(whole.double() * 2.0**exponent, exponent, since, since + rounds)
    levels = LEVELS[: len(values)]
    read = read_change(write_change(change, levels, CODEC), levels, CODEC)
    assert torch.equal(read.amount, whole.double() * 2.0**exponent)
    assert (read.since, read.until) == (since, since + rounds) and torch.equal(read.values, change.values)
    assert not len(whole.nonzero()) or (read.values % 2 != 0).any(), "the unit could be larger"


def test_a_change_takes_about_its_entropy() -> None:
    """Laplacian integers of one deviation: a quarter of a bit more than Shannon's, at most."""
    deviation = 2.0
    draws = torch.distributions.Laplace(0.0, deviation / 2**0.5).sample((20_000,)).round().long()
    draws[0] = 1
    counts = torch.bincount(draws - draws.min()).double()
    shares = counts[counts > 0] / len(draws)
    entropy = -float((shares * shares.log2()).sum())
    bits = 8 * len(write_change(Change(0, 1, draws, 0), bytes(20_000), CODEC)) / len(draws)
    assert entropy - 0.01 < bits < entropy + 0.25


@given(data=st.data(), values=st.lists(integers, min_size=1, max_size=40))
def test_damaged_changes_are_refused_or_read_as_others(data: st.DataObject, values: list[int]) -> None:
    levels = LEVELS[: len(values)]
    whole = write_change(Change(3, 7, torch.tensor(values), -2), levels, CODEC)
    with pytest.raises(MessageError):
        read_change(whole[: data.draw(st.integers(0, len(whole) - 1))], levels, CODEC)
    damaged = bytearray(whole)
    damaged[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        read = read_change(bytes(damaged), levels, CODEC)
    except MessageError:
        return
    assert read.since < read.until and torch.isfinite(read.amount).all() and len(read.values) == len(values)


@pytest.mark.parametrize(
    ("name", "value"), [("magic", b"XX"), ("version", 9), ("exponent", 2000), ("since", 9), ("codec", 1), ("large", 7)]
)
def test_headers_of_others_are_refused(name: str, value: Any) -> None:
    names = ("magic", "version", "exponent", "since", "until", "codec", "large")
    whole = write_change(Change(3, 7, torch.tensor([1, -2, 3]), 0), bytes(3), CODEC)
    fields = dict(zip(names, HEADER.unpack_from(whole), strict=True)) | {name: value}
    with pytest.raises(MessageError):
        read_change(HEADER.pack(*fields.values()) + whole[HEADER.size :], bytes(3), CODEC)


def test_more_than_float64_holds_is_refused() -> None:
    with pytest.raises(MessageError, match="within 2\\*\\*52 units but got"):
        change_of(torch.tensor([2.0**53]), 0, 0, 1)


@given(scale=st.floats(-30, 30), error=st.floats(0.001, 0.5), seed=st.integers(0, 99))
def test_rounding_takes_no_more_than_it_may(scale: float, error: float, seed: int) -> None:
    step = torch.randn(1000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2.0**scale
    exponent = unit_exponent(step, error)
    assert exponent is not None
    lost = (step / 2.0**exponent).round() * 2.0**exponent - step
    assert lost.square().sum() < 1.15 * error * step.square().sum()
    assert 2.0 ** (2 * exponent) / 12 > 0.24 * error * step.square().mean(), "the unit is finer than it has to be"


@pytest.mark.parametrize("step", [torch.zeros(3), torch.zeros(0)])
def test_nothing_has_no_unit(step: Tensor) -> None:
    assert unit_exponent(step, 0.1) is None


@pytest.mark.parametrize("entry", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_ends_the_run(entry: float) -> None:
    with pytest.raises(ConfigurationError, match="finite step of `model.server_optimizer`"):
        unit_exponent(torch.tensor([1.0, entry]), 0.1)


def test_levels_follow_the_bits() -> None:
    joint = JointFormat((CodeFormat(2, 5), CodeFormat(3, 2)))
    assert levels_of(joint) == bytes([10, 10, 4, 4, 4]) and levels_of(CodeFormat(4)) == bytes(4)


@pytest.mark.parametrize("name", [name for name, make in CODECS.items() if fits(make())])
def test_coordinates_look_back_along_the_decoder(name: str) -> None:
    """Every codec says whether its decoder is one linear map; if so, coordinates find the code, and the nearest of what it can express."""
    codec = fitted(CODECS[name](), Layout.of(network()))
    decoder = codec.decoder
    if not decoder.linear_map:
        with pytest.raises(ConfigurationError, match="a linear map, which .* is not"):
            decoder.coordinates(torch.zeros(decoder.dim))
        return
    update = torch.randn(3, decoder.dim, generator=torch.Generator().manual_seed(1))
    code = decoder.coordinates(update)
    assert code.shape == (3, decoder.code_dim)
    near = decoder.decode(code, Context(), {})
    again = decoder.decode(decoder.coordinates(near), Context(), {})
    torch.testing.assert_close(again, near, rtol=1e-3, atol=1e-4 * float(near.abs().max()))
    torch.testing.assert_close(((update - near) * near).sum(-1), torch.zeros(3), rtol=0, atol=1e-3 * float(update.square().sum(-1).max()))
    torch.testing.assert_close(decoder.decode(2 * code, Context(round=5), {}), 2 * near, rtol=1e-4, atol=1e-5)


ONE_SUM = TransformCodec(3, encoder_share=2.0)


def test_many_missed_rounds_are_one_message_and_nothing_is_lost() -> None:
    def cohort(number: int, attempt: int) -> list[int]:
        return [0, 1, 5] if number in (0, 12) else [0, 1, 2]

    def downlink(kind: type[CatchUp]) -> tuple[int, Any]:
        federation_run = federation(ONE_SUM.unbound(), downlink=kind(), through_bytes=True, cohort=cohort).run(12)
        before, at_server = federation_run.server.state.traffic.downlink, federation_run.server.model.read()
        federation_run.run(1)
        held = federation_run.host.held._models[5]
        assert torch.equal(federation_run.host.held.model(held).weights, at_server.weights)
        return federation_run.server.state.traffic.downlink - before, federation_run

    merged, coded = downlink(CodedModel)
    apart, _ = downlink(CatchUp)
    assert merged < apart
    assert coded.server.downlink.held[5] == 12


def test_who_was_away_for_longer_than_rounds_are_kept_downloads_the_whole_sum_again() -> None:
    def cohort(number: int, attempt: int) -> list[int]:
        return [0, 1, 5] if number in (1, 9) else [0, 1, 2]

    class Short(CodedModel):
        def _prune(self, dim: int) -> None:
            super()._prune(dim)
            for number in sorted(self.chapters[-1].changes)[:-2]:
                del self.chapters[-1].changes[number]

    made = federation(ONE_SUM.unbound(), downlink=Short(), through_bytes=True, cohort=cohort).run(9)
    at_server = made.server.model.read()
    made.run(1)
    held = made.host.held._models[5]
    assert held.start == 0 and torch.equal(made.host.held.model(held).weights, at_server.weights)


OPTIMIZERS = {"momentum": lambda p: torch.optim.SGD(p, 0.5, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, 0.01)}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("refreshed", [False, True])
def test_any_server_optimizer(make: Any, refreshed: bool) -> None:
    """Every client that any round reaches holds the server's weights, by way of bytes, also from one version of the codec to the next."""
    seen: list[Tensor] = []

    class Followed(Tap):
        def exchange(self, requests):
            held = self.simulated.host.held
            for request in requests:
                through = copy.copy(request.download)
                object.__setattr__(through, "result", None)
                model, _ = held.take(request.client, type(through).parse(through.to_bytes()))
                assert torch.equal(model.weights, request.download.result.weights)
                seen.append(model.weights)
            yield from self.simulated.exchange(requests)

    module = federated(codec=TransformCodec(3, encoder_share=1.0), downlink=CodedModel(), server_optimizer=make, clients=Followed())
    run(module, 9, callbacks=[refresh(4)] if refreshed else [])
    assert len(seen) == 9 * 8 and not torch.equal(seen[0], seen[-1])
    assert len(module.downlink.chapters) <= (3 if refreshed else 1)


def test_with_plain_sgd_it_ends_where_the_full_model_ends_but_for_rounding() -> None:
    ends = {}
    for error in (0.3, 0.01, 1e-6, None):
        module = federated(codec=TransformCodec(3, encoder_share=1.0), downlink=FullModel() if error is None else CodedModel(error=error))
        run(module, 8)
        ends[error] = weights_of(module).detach()
    far = [float((ends[error] - ends[None]).norm()) for error in (0.3, 0.01, 1e-6)]
    assert far[2] < 1e-3 * float(ends[None].norm()) and far[2] < far[1]


def test_nothing_accumulates() -> None:
    """The same step in every round: however coarse the unit, the sum is where all the steps lead, to half a unit."""
    made = federation(IdentityCodec(), downlink=CodedModel(error=0.3))
    server, step = made.server, torch.linspace(-1, 1, len(made.weights))
    start, downlink = made.weights, made.server.downlink
    for number in range(30):
        call = Call(server, number, 0)
        server.model.step(step, None)
        downlink.finished(call.current, call.context, call.codes, 1.0, server.model)
    assert downlink.chapters[-1].exponent == 0, "rounded to whole numbers: what is left of a step has less than 3/7 of its energy"
    torch.testing.assert_close(start - made.weights, 30 * step, rtol=0, atol=0.5 + 1e-4)


def test_five_and_five_rounds_are_ten(tmp_path: Any) -> None:
    def fit(rounds: int, ckpt_path: Any = None) -> Any:
        module = federated(codec=TransformCodec(3, encoder_share=1.0), downlink=CodedModel())
        runner = trainer(rounds, callbacks=[pretraining(), refresh(3)])
        runner.fit(module, datamodule=federated_data(), ckpt_path=ckpt_path, weights_only=False)
        return module, runner

    straight, _ = fit(10)
    _, runner = fit(5)
    runner.save_checkpoint(tmp_path / "five.ckpt")
    resumed, _ = fit(10, tmp_path / "five.ckpt")
    assert torch.equal(weights_of(resumed), weights_of(straight))
    assert resumed.server_state.traffic == straight.server_state.traffic


@pytest.mark.parametrize(
    "codec",
    [
        lambda: LinearCodec(4, "random", block_size=16, fresh=True),
        lambda: AutoencoderCodec(ratio=4, block_size=16, width=4),
        lambda: PowerSGDCodec(1),
        lambda: TopKCodec(8),
        lambda: QSGDCodec(4),
    ],
)
def test_codecs_that_are_no_linear_map_are_refused(codec: Any) -> None:
    with pytest.raises(ConfigurationError, match="`model.downlink` to CatchUp or FullModel"):
        run(federated(codec=codec(), downlink=CodedModel()), 1)


def test_algorithms_that_upload_more_than_an_update_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="Scaffold.*`model.downlink` to FullModel|`model.downlink` to CatchUp or FullModel"):
        run(federated(codec=IdentityCodec(), algorithm=Scaffold(lr=0.1, steps=3, batch_size=8), downlink=CodedModel()), 1)


@pytest.mark.parametrize("error", [0, 1, -1])
def test_an_error_that_is_no_share_is_refused(error: float) -> None:
    with pytest.raises(ConfigurationError, match="Expected `error` between 0 and 1"):
        CodedModel(error=error)


def test_entropy_codes_lend_their_levels() -> None:
    codec = EntropyCodec(4)
    made = federation(codec, downlink=CodedModel()).run(2)
    assert made.server.downlink.chapters[0].levels == codec.encoder.format.levels
