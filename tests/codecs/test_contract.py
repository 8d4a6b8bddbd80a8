"""Every law of fedlight/core/codec.py, on every codec. A new codec is one more row in ``CODECS``.

Which laws a codec has to keep follows from what it declares: ``additive``, ``linear``, ``unbiased``, ``integer``, ``fixed_width``,
``passes``, ``client_state``, ``needs_fit``. What is said of a message is said of every pass's.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlight.codecs import (
    AutoencoderCodec,
    ChainCodec,
    CountSketchCodec,
    EntropyCodec,
    GridCodec,
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
from fedlight.codecs.chain import ChainEncoder
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, Private, ServerContext, State, TrainCodec
from fedlight.core.codec_needs import require_additive, require_fixed_width
from fedlight.core.errors import ConfigurationError, MessageError
from fedlight.core.export import (
    codec_from_config,
    codec_state,
    encoder_file,
    load_codec,
    load_decoder,
    load_encoder,
    restore_codec,
    save_codec,
)
from fedlight.core.layout import Layout
from fedlight.core.simulate import simulate_round
from fedlight.core.wire import HEADER, CodeFormat, Format

CODECS: dict[str, Callable[[], Codec]] = {
    "identity": IdentityCodec,
    "half": HalfCodec,
    "linear pca rows": lambda: LinearCodec(4, "pca", "rows", 16),
    "linear pca rows, small blocks": lambda: LinearCodec(3, "pca", "rows", 4, cohort=0),
    "linear pca flat": lambda: LinearCodec(4, "pca", "flat", 16),
    "linear pca flat, one block": lambda: LinearCodec(16, "pca", "flat", 0),
    "linear random rows": lambda: LinearCodec(4, "random", "rows", 16),
    "linear random, fresh": lambda: LinearCodec(4, "random", "rows", 16, fresh=True),
    "linear, no compression": lambda: LinearCodec(1, "pca", "rows", 16),
    "autoencoder linear": lambda: AutoencoderCodec(4, block_size=16, depth=0),
    "autoencoder linear, random start": lambda: AutoencoderCodec(4, block_size=16, activation="linear", start="random"),
    "autoencoder skip": lambda: AutoencoderCodec(4, block_size=16, width=8),
    "autoencoder flat": lambda: AutoencoderCodec(4, "flat", 16, width=8),
    "autoencoder without skip": lambda: AutoencoderCodec(4, block_size=16, width=16, skip=False, start="random"),
    "autoencoder relu, bias, deep": lambda: AutoencoderCodec(4, block_size=16, depth=2, width=8, activation="relu", bias=True),
    "quantize 4": lambda: QuantizeCodec(4),
    "quantize 9": lambda: QuantizeCodec(9),
    "grid 12": lambda: GridCodec(1e-2, 12),
    "entropy": lambda: EntropyCodec(4),
    "two-sided and entropy": lambda: ChainCodec([TwoSidedCodec(1.5), EntropyCodec(5)]),
    "autoencoder and entropy": lambda: ChainCodec([AutoencoderCodec(2, block_size=16, width=8), EntropyCodec(5)]),
    "windows": lambda: WindowCodec(6, 5),
    "two-sided and windows": lambda: ChainCodec([TwoSidedCodec(1.5), WindowCodec(6, 5, tails=4)]),
    "qsgd 8": lambda: QSGDCodec(8),
    "qsgd 4, small buckets, max": lambda: QSGDCodec(4, 16, "max"),
    "top-k": lambda: TopKCodec(4),
    "top-k float16, no feedback": lambda: TopKCodec(4, feedback=False, values="float16"),
    "count sketch": lambda: CountSketchCodec(1, 3),
    "count sketch, momentum, as written": lambda: CountSketchCodec(1.5, 1, momentum=0.5, masking=False),
    "transform, probed": lambda: TransformCodec(2, encoder_share=2.0, probes=1),
    "power sgd": lambda: PowerSGDCodec(1),
    "power sgd cold, no feedback": lambda: PowerSGDCodec(2, warm_start=False, feedback=False),
    "two-sided": lambda: TwoSidedCodec(4),
    "two-sided, entropy-coded factors": lambda: TwoSidedCodec(3, factor_bits=5, factor_coding="entropy"),
    "two-sided, few bits, energy corrected": lambda: TwoSidedCodec(3, cohort=0, factor_bits=4, correct_energy=True, relative=False),
    "two-sided, no compression": lambda: TwoSidedCodec(1, rank=3),
    "transform": lambda: TransformCodec(4, cohort=5),
    "transform, entropy-coded factors": lambda: TransformCodec(6, cohort=5, factor_bits=3.5, factor_coding="entropy", probes=1),
    "transform, small, for secure sums": lambda: TransformCodec(6, cohort=5, secure_cohort=5, factor_bits=8, correct_energy=True),
    "two-sided, pca and quantize": lambda: ChainCodec([TwoSidedCodec(2), LinearCodec(2, "pca", "flat", 0), QuantizeCodec(4)]),
    "autoencoder and quantize": lambda: ChainCodec([AutoencoderCodec(4, block_size=16, width=8), QuantizeCodec(6)]),
    "linear and quantize": lambda: ChainCodec([LinearCodec(4, block_size=16), QuantizeCodec(3)]),
    "linear and linear": lambda: ChainCodec([LinearCodec(2, block_size=16), LinearCodec(2, "random", "flat", 8)]),
    "linear and half": lambda: ChainCodec([LinearCodec(4, block_size=16), HalfCodec()]),
    "linear and top-k": lambda: ChainCodec([LinearCodec(2, block_size=16), TopKCodec(2)]),
    "linear and qsgd": lambda: ChainCodec([LinearCodec(4, block_size=16), QSGDCodec(8)]),
}


def stages_of(codec: Codec) -> list[Codec]:
    return codec.codecs if isinstance(codec, ChainCodec) else [codec]


QUICK = {type(make()): name for name, make in reversed(CODECS.items())}
ROWS = [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK.values())) for name in CODECS]
"""`make test` tries the laws on the first row of every class, the whole suite on all rows."""


def draws(codec: Codec) -> bool:
    """Whether encoding draws random numbers: else integers are rounded to nearest, and precision is not lost without bias."""
    last = stages_of(codec)[-1]
    return (last.integer and last.fixed_width and not isinstance(last, WindowCodec)) or (last.unbiased and not last.linear)


def rows(wanted: Callable[[Codec], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [row for row, make in zip(ROWS, CODECS.values(), strict=True) if wanted(make())], indirect=True)


integer = rows(lambda codec: codec.integer)
rounding = rows(lambda codec: codec.integer and draws(codec))
adaptive = rows(lambda codec: codec.integer and not isinstance(stages_of(codec)[-1], GridCodec))
exact = rows(lambda codec: not draws(codec))
linear = rows(lambda codec: codec.linear)
additive = rows(lambda codec: codec.additive)
not_additive = rows(lambda codec: not codec.additive)
unbiased = rows(lambda codec: codec.unbiased)


@dataclass
class Case:
    """A fitted codec with what the laws are tried on.

    ``publics`` and ``states`` hold, for every pass of a round of ``held``'s first cohort, what everybody knows before it and the
    server's state then.
    """

    name: str
    codec: Codec
    fit: UpdateBank
    held: UpdateBank
    publics: list[Context] = field(default_factory=list)
    states: list[State] = field(default_factory=list)

    def __post_init__(self) -> None:
        decoder, state, reply = self.codec.decoder, {}, {}
        for step in range(self.codec.passes):
            self.publics.append(Context(seed=1, round=3, step=step, broadcast={**decoder.broadcast(state), **reply}))
            self.states.append(copy.deepcopy(state))
            mean = torch.stack([decoder.open(self.encode(u, i, step)).double() for i, u in enumerate(self.held.updates[0])]).mean(0)
            reply = {"reply": decoder.decode(mean.float(), ServerContext.of(self.publics[step], 5), state).detach()}

    @property
    def context(self) -> Context:
        """What everybody knows before the first pass."""
        return self.publics[0]

    @property
    def passes(self) -> range:
        return range(self.codec.passes)

    def encode(self, update: Tensor, seed: int = 0, step: int = 0) -> Tensor:
        private = Private(torch.Generator().manual_seed(seed))
        return self.codec.encoder.encode(update, self.publics[step], private).detach()

    def message(self, update: Tensor, seed: int = 0, step: int = 0) -> bytes:
        return self.codec.encoder.encode_message(update, self.publics[step], Private(torch.Generator().manual_seed(seed)))

    def open(self, code: Tensor) -> Tensor:
        return self.codec.decoder.open(code)

    def decode(self, mean: Tensor, step: int = 0) -> Tensor:
        """The decoding of a mean of what ``open`` returned."""
        return self.codec.decoder.decode(mean.float(), self.publics[step], copy.deepcopy(self.states[step])).detach()

    def cohort(self, round: int = 0, step: int = 0) -> list[bytes]:
        return [self.message(update, i, step) for i, update in enumerate(self.held.updates[round])]


@pytest.fixture(scope="module", params=ROWS)
def case(request: pytest.FixtureRequest, banks: tuple[UpdateBank, UpdateBank], adam: TrainCodec) -> Case:
    codec = CODECS[request.param]()
    codec.fit(banks[0], adam)
    return Case(request.param, codec, *banks)


def run(
    codec: Codec, rounds: list[Tensor], server: State | None = None, clients: list[State] | None = None, first: int = 0
) -> list[Tensor]:
    """Return the aggregates of consecutive rounds of one cohort ``[clients, dim]``, which keeps its states."""
    server = {} if server is None else server
    clients = [{} for _ in rounds[0]] if clients is None else clients
    publics = [Context(seed=1, round=number) for number in range(first, first + len(rounds))]
    return [simulate_round(codec, u, context=p, server_state=server, client_states=clients) for u, p in zip(rounds, publics, strict=True)]


def tensors(state: object) -> list[Tensor]:
    """All tensors within a state."""
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors(value)]
    return [state] if isinstance(state, Tensor) else []


def test_shapes(case: Case) -> None:
    codec, dim = case.codec, case.fit.layout.dim
    assert codec.encoder.dim == codec.decoder.dim == dim and codec.encoder.format == codec.decoder.format == codec.encoder.format_at(0)
    for step in case.passes:
        assert codec.encoder.format_at(step) == codec.decoder.format_at(step)
        for lead in ((), (3,), (2, 3)):
            code = case.encode(torch.randn(*lead, dim), 0, step)
            assert code.shape == (*lead, codec.encoder.format_at(step).length)
            opened = case.open(code)
            assert opened.shape == (*lead, codec.decoder.sum_length(step))
            if not lead or codec.passes == 1:
                decoded = case.decode(opened, step)
                assert decoded.dtype == torch.float32 and (step + 1 < codec.passes or decoded.shape == (*lead, dim))
    for lead in ((), (3,)):
        assert codec.reconstruct(torch.randn(*lead, 4, dim)).shape == (*lead, dim)


def test_a_code_is_no_longer_than_the_budget(case: Case) -> None:
    """A `ratio` counts numbers in float codes that are summed, bytes in all others."""
    numbers = case.codec.encoder.dim
    for stage in stages_of(case.codec):
        budget = int(numbers / getattr(stage, "ratio", 1))
        in_bytes = not stage.additive or (stage.integer and hasattr(stage, "ratio"))
        for step in range(stage.passes):
            format = stage.encoder.format_at(step)
            assert format.length >= 1
            if format.fixed_width:
                assert format.payload_bytes <= 4 * budget if in_bytes else format.length <= budget
        numbers = budget


def test_integers_come_from_integer_formats_alone(case: Case) -> None:
    for step in case.passes:
        format = case.codec.encoder.format_at(step)
        code = case.encode(case.held.updates[0], 0, step)
        assert bool(format.bits) == case.codec.integer
        assert code.dtype == (torch.int32 if format.bits else format.dtype if isinstance(format, CodeFormat) else torch.float64)


@exact
def test_a_batch_is_encoded_like_its_members(case: Case) -> None:
    updates = case.held.updates[:2]
    for step in case.passes:
        single = torch.stack([case.encode(update, 0, step) for update in updates.flatten(0, 1)])
        torch.testing.assert_close(case.encode(updates, 0, step).flatten(0, 1), single, rtol=1e-4, atol=1e-6)


def test_a_code_depends_on_the_update_and_the_generator_alone(case: Case) -> None:
    a, b = case.held.updates[0, :2]
    for step in case.passes:
        first = case.encode(a, 5, step)
        case.encode(b, 6, step)
        torch.rand(3)
        assert torch.equal(case.encode(a, 5, step), first)
        assert torch.equal(case.encode(a, 6, step), first) != draws(case.codec)


def test_encoding_leaves_the_update_and_the_global_generator_alone(case: Case) -> None:
    update = case.held.updates[0, 0].clone()
    before = torch.get_rng_state()
    for step in case.passes:
        code = case.encode(update, 0, step)
        kept = code.clone()
        case.decode(case.open(code), step)
        assert torch.equal(update, case.held.updates[0, 0]) and torch.equal(code, kept)
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=12)
@given(scale=st.floats(-30, 30), seed=st.integers(0, 100), sparse=st.booleans())
@example(scale=30.0, seed=0, sparse=False)
@example(scale=-30.0, seed=0, sparse=False)
@example(scale=-math.inf, seed=0, sparse=False)
def test_finite_stays_finite(case: Case, scale: float, seed: int, sparse: bool) -> None:
    """Codes, aggregates and what is kept, in a second round as well; and every message has its length."""
    generator = torch.Generator().manual_seed(seed)
    updates = torch.randn(3, case.fit.layout.dim, generator=generator) * 10.0**scale
    if sparse:
        updates *= torch.rand(updates.shape, generator=generator) < 0.05
    for step in case.passes:
        code = case.encode(updates[0], 0, step)
        assert torch.isfinite(code).all() and torch.isfinite(case.open(code)).all()
        assert torch.isfinite(case.decode(case.open(code), step)).all()
        assert has_its_length(case.message(updates[0], 0, step), case.codec.encoder.format_at(step))
    server: State = {}
    clients: list[State] = [{} for _ in updates]
    for aggregate in run(case.codec, [updates, updates], server, clients):
        assert aggregate.shape == (case.fit.layout.dim,) and torch.isfinite(aggregate).all()
    assert all(torch.isfinite(kept).all() for kept in tensors({"server": server, **dict(enumerate(clients))}))


@linear
def test_zero_stays_zero_in_linear_codecs(case: Case) -> None:
    decoded = case.decode(case.encode(torch.zeros(case.fit.layout.dim)))
    assert not decoded.any()


@rows(lambda codec: not codec.needs_fit)
def test_a_cohort_that_did_not_move_moves_nothing(case: Case) -> None:
    """Nor does it through a codec that is not linear, unless that was trained."""
    still = torch.zeros(3, case.fit.layout.dim)
    assert not any(aggregate.any() for aggregate in run(case.codec, [still, still]))


@linear
@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_linear_codecs_decode_the_mean_code_to_the_decoded_mean(case: Case, weights: list[int], seed: int) -> None:
    updates = torch.randn(len(weights), case.fit.layout.dim, generator=torch.Generator().manual_seed(seed))
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    mean_code = (shares[:, None] * case.encode(updates).double()).sum(0)
    mean = (shares[:, None] * updates.double()).sum(0).float()
    torch.testing.assert_close(case.decode(mean_code), case.decode(case.encode(mean)), rtol=1e-4, atol=1e-5)


def test_a_linear_codec_says_what_linear_codecs_are(case: Case) -> None:
    """One pass, summed, and nothing kept: the other declarations follow."""
    codec = case.codec
    assert not codec.linear or (codec.additive and codec.passes == 1 and not codec.client_state and not codec.integer)


def test_the_decoded_mean_approximates_the_mean_on_held_out_updates(case: Case) -> None:
    decoded = torch.stack([run(case.codec, [updates])[0] for updates in case.held.updates])
    target = case.held.updates.mean(1)
    error = (decoded - target).square().sum() / target.square().sum()
    limit = {"identity": 1e-12, "half": 1e-7, "linear, no compression": 1e-2, "quantize 9": 1e-3, "qsgd 8": 1e-2}
    assert error < limit.get(case.name, 0.9)


@unbiased
def test_unbiased_codecs_decode_to_the_update_on_average(case: Case) -> None:
    update, draws = case.held.updates[0, 0], 2000
    decoded = torch.stack([case.decode(case.open(case.encode(update, seed))) for seed in range(draws)]).double()
    error = decoded.mean(0) - update
    # Five standard errors, as the draws tell them; the share of draws that may never have shown; and what float32 cannot hold.
    unseen = 10 / draws * (decoded.amax(0) - decoded.amin(0)).max()
    allowed = 5 * decoded.std(0) / draws**0.5 + unseen + 1e-6 * update.abs()
    assert (error.abs() <= allowed).all()
    # All entries together see a much smaller bias.
    assert error.sum().abs() <= 5 * decoded.var(0).sum().sqrt() / draws**0.5 + 1e-6 * update.abs().sum()


def test_reconstruct_is_encode_mean_decode(case: Case) -> None:
    state: State = {}
    private, reply = Private(torch.Generator().manual_seed(4)), {}
    for step in case.passes:
        context = Context(step=step, broadcast={**case.codec.decoder.broadcast(state), **reply})
        codes = case.codec.encoder.encode(case.held.updates[0], context, private)
        case.codec.decoder.record_lengths(case.codec.mean_bytes(codes, step), state)
        codes = case.open(codes)
        expected = case.codec.decoder.decode(codes.float().mean(0), ServerContext.of(context, case.held.clients), state)
        reply = {"reply": expected}
    carried: State = {}
    assert torch.equal(case.codec.reconstruct(case.held.updates[0], carried, torch.Generator().manual_seed(4)), expected)
    assert carried.keys() == state.keys()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(tensors(carried), tensors(state), strict=True))


@exact
def test_a_simulated_round_is_what_reconstruct_computes(case: Case) -> None:
    """But for the detour over bytes."""
    for updates, together in zip(case.held.updates, case.codec.reconstruct(case.held.updates), strict=True):
        torch.testing.assert_close(simulate_round(case.codec, updates), together, rtol=1e-3, atol=1e-6)


def has_its_length(message: bytes, format: Format) -> bool:
    """Whether a message has the predicted length, or at most that if lengths differ."""
    predicted = HEADER.size + format.payload_bytes
    return len(message) == predicted if format.fixed_width else len(message) <= predicted


def test_a_message_has_the_predicted_length(case: Case) -> None:
    for step in case.passes:
        message = case.message(case.held.updates[0, 0], 0, step)
        assert has_its_length(message, case.codec.encoder.format_at(step))
        assert case.codec.mean_bytes(case.encode(case.held.updates[0, 0], 0, step), step) == len(message)


def test_a_codec_says_whether_masks_can_hide_its_messages(case: Case) -> None:
    """Those of one length: the others are refused where they must be."""
    assert all(case.codec.encoder.format_at(step).fixed_width == case.codec.fixed_width for step in case.passes)
    if case.codec.fixed_width:
        require_fixed_width(case.codec, "this test")
        return
    assert case.codec.integer and case.codec.additive
    with pytest.raises(ConfigurationError, match="messages have one length, which secure aggregation needs.*choose TransformCodec"):
        require_fixed_width(case.codec, "secure aggregation")
    with pytest.raises(ConfigurationError, match="messages have one length, which an algorithm whose clients upload several"):
        StackedCodec(case.codec)


def test_a_message_carries_the_code_exactly(case: Case) -> None:
    update = case.held.updates[0, 0]
    for step, context in enumerate(case.publics):
        read = case.codec.decoder.read_message(case.message(update, 0, step), context)
        assert torch.equal(read, case.open(case.encode(update, 0, step)))
        assert read.shape == (case.codec.decoder.sum_length(step),)


def test_a_message_of_another_round_or_codec_is_refused(case: Case) -> None:
    for step, context in enumerate(case.publics):
        message = case.message(case.held.updates[0, 0], 0, step)
        with pytest.raises(MessageError, match="Expected round 4"):
            case.codec.decoder.read_message(message, replace(context, round=4))
        other = CODECS[case.name]().bind(case.fit.layout)
        with pytest.raises(MessageError):
            other.decoder.read_message(message[: len(message) // 2], context)
        if case.codec.needs_fit:
            with pytest.raises(MessageError, match="Expected (codec fingerprint|code length|format)"):
                other.decoder.read_message(message, context)
        if case.codec.passes > 1:
            with pytest.raises(MessageError, match="Expected code length"):
                case.codec.decoder.read_message(message, case.publics[step - 1])


@given(data=st.data())
@settings(max_examples=15)
def test_a_message_of_random_bytes_is_refused_or_finite(case: Case, data: st.DataObject) -> None:
    """Law 7: what a client sends on purpose is refused, or adds a finite vector of the right length."""
    for step, context in enumerate(case.publics):
        whole = case.message(case.held.updates[0, 0], 0, step)
        seed = data.draw(st.integers(0, 2**32))
        noise = torch.randint(256, (len(whole) - HEADER.size,), generator=torch.Generator().manual_seed(seed)).tolist()
        try:
            term = case.codec.decoder.read_message(whole[: HEADER.size] + bytes(noise), context)
        except MessageError:
            continue
        assert torch.isfinite(term).all() and term.shape == (case.codec.decoder.sum_length(step),)


@pytest.mark.parametrize("weights", [[1] * 5, [3, 1, 40, 7, 2]])
def test_decode_sum_is_decode_of_the_mean(case: Case, weights: list[int]) -> None:
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    for step, context in enumerate(case.publics):
        opened = torch.stack([case.open(case.encode(update, i, step)) for i, update in enumerate(case.held.updates[0])])
        expected = case.decode((shares[:, None] * opened.double()).sum(0), step)
        decoded = case.codec.decoder.decode_sum(case.cohort(0, step), weights, context, copy.deepcopy(case.states[step]))
        torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-7)
        assert not decoded.requires_grad


def test_decode_sum_refuses_nothing_and_weights_that_are_not_positive(case: Case) -> None:
    decoder, messages = case.codec.decoder, case.cohort()
    with pytest.raises(ConfigurationError, match="at least one message"):
        decoder.decode_sum([], [], case.context, {})
    with pytest.raises(ConfigurationError, match="`weights` >= 1 but got 0"):
        decoder.decode_sum(messages, [1, 1, 0, 1, 1], case.context, {})


def test_integer_sums_do_not_depend_on_the_order(case: Case) -> None:
    messages, weights = case.cohort(), [3, 1, 40, 7, 2]
    order = [4, 2, 0, 3, 1]
    first = case.codec.decoder.decode_sum(messages, weights, case.context, {})
    second = case.codec.decoder.decode_sum([messages[i] for i in order], [weights[i] for i in order], case.context, {})
    if case.codec.integer:
        assert torch.equal(first, second)
    torch.testing.assert_close(first, second)


@additive
def test_an_additive_codec_adds_codes_up_as_they_are(case: Case) -> None:
    require_additive(case.codec, "this test")
    for step in case.passes:
        code = case.encode(case.held.updates[0, 0], 0, step)
        assert torch.equal(case.open(code), code) and case.codec.decoder.sum_length(step) == len(code) <= case.codec.encoder.dim


@not_additive
def test_a_codec_that_cannot_be_summed_is_refused_where_it_must_be(case: Case) -> None:
    """And its sum is as long as what its last stage encodes, not as its code."""
    with pytest.raises(ConfigurationError, match=rf"secure aggregation needs.*{type(case.codec).__name__} by itself: choose an additive"):
        require_additive(case.codec, "secure aggregation")
    assert case.codec.decoder.sum_length() == stages_of(case.codec)[-1].encoder.dim


# State


def test_clients_keep_something_exactly_if_the_codec_says_so(case: Case) -> None:
    clients: list[State] = [{} for _ in range(5)]
    run(case.codec, [case.held.updates[0]], {}, clients)
    assert all(bool(tensors(state)) == case.codec.client_state for state in clients)


def test_a_round_repeated_from_the_same_states_is_the_same(case: Case) -> None:
    """States hold all that a codec remembers: halves keep nothing between rounds."""
    server: State = {}
    clients: list[State] = [{} for _ in range(5)]
    run(case.codec, list(case.held.updates[:2]), server, clients)
    again = copy.deepcopy((server, clients))
    first = run(case.codec, list(case.held.updates[2:5]), server, clients, first=2)
    run(case.codec, list(case.held.updates[5:7]), first=5)
    second = run(case.codec, list(case.held.updates[2:5]), *again, first=2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rounds_go_on_from_what_was_saved(case: Case) -> None:
    """Codec and states through a checkpoint in the middle: the same bits."""
    straight = run(case.codec, list(case.held.updates[:4]))
    server: State = {}
    clients: list[State] = [{} for _ in range(5)]
    run(case.codec, list(case.held.updates[:2]), server, clients)
    buffer = io.BytesIO()
    torch.save((codec_state(case.codec), server, clients), buffer)
    buffer.seek(0)
    saved, server, clients = torch.load(buffer, weights_only=True)
    again = CODECS[case.name]()
    restore_codec(again, saved)
    resumed = run(again, list(case.held.updates[2:4]), server, clients, first=2)
    assert all(torch.equal(a, b) for a, b in zip(straight[2:], resumed, strict=True))


def test_what_is_kept_lies_where_it_can_be_saved_and_moved(case: Case) -> None:
    """Clients' states on the CPU: another process, with another device, may go on with them."""
    clients: list[State] = [{} for _ in range(5)]
    run(case.codec, [case.held.updates[0]], {}, clients)
    assert all(kept.device.type == "cpu" and not kept.requires_grad for state in clients for kept in tensors(state))


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_changes_rounding_at_most(case: Case, device: str) -> None:
    updates = case.held.updates[0]
    expected = run(case.codec, [updates, updates])
    moved = restored(case).to(device)
    for mine, theirs in zip(run(moved, [updates.to(device)] * 2), expected, strict=True):
        assert mine.device.type == device and mine.dtype == torch.float32
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-3, atol=1e-4)


def restored(case: Case) -> Codec:
    """The case's codec once more."""
    codec = CODECS[case.name]()
    restore_codec(codec, codec_state(case.codec))
    return codec


# Layouts


def untrained(codec: Codec, bank: UpdateBank) -> dict[str, float]:
    return {}


def refuses(codec: Codec, bank: UpdateBank) -> bool:
    try:
        codec.fit(bank, untrained)
    except ConfigurationError:
        return True
    return False


shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(1, 20)),
    st.tuples(st.integers(1, 12), st.integers(1, 9)),
    st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=8)
@given(shapes=st.lists(shapes, min_size=1, max_size=5))
@example(shapes=[()])
@example(shapes=[(), ()])
@example(shapes=[(17,), (), (3,)])
@example(shapes=[(1, 1)])
@example(shapes=[(2, 1), (1, 2)])
@example(shapes=[(16, 1, 3, 3), (16,), (8, 16, 3, 3), (8,), (10, 8), (10,)])
def test_any_layout_works_or_is_refused_with_a_way_out(name: str, shapes: list[tuple[int, ...]]) -> None:
    """Only a codec with a ratio may refuse, where the code would be too short."""
    layout = Layout(tuple(map(str, range(len(shapes)))), tuple(shapes))
    updates = 0.1 * torch.randn(5, 3, layout.dim, generator=torch.Generator().manual_seed(0))
    codec, bank = CODECS[name](), UpdateBank(updates, layout)
    if refuses(codec, bank):
        assert any(hasattr(stage, "ratio") for stage in stages_of(codec))
        with pytest.raises(ConfigurationError, match="choose a smaller `ratio`"):
            codec.fit(bank, untrained)
        return
    sent: list[tuple[int, bytes]] = []
    server: State = {}
    clients: list[State] = [{} for _ in range(3)]
    for number in range(2):
        aggregate = simulate_round(
            codec, updates[number], [1, 3, 2], Context(round=number), server, clients, lambda step, _, m: sent.append((step, bytes(m)))
        )
        assert aggregate.shape == (layout.dim,) and torch.isfinite(aggregate).all()
    assert all(has_its_length(message, codec.encoder.format_at(step)) for step, message in sent)
    assert len(sent) == 2 * 3 * codec.passes


# Descriptions and files


def test_the_halves_share_no_memory(case: Case) -> None:
    mine = {t.untyped_storage().data_ptr() for t in case.codec.encoder.state_dict().values()}
    theirs = {t.untyped_storage().data_ptr() for t in case.codec.decoder.state_dict().values()}
    assert not mine & theirs


def test_a_codec_describes_itself(case: Case) -> None:
    again = codec_from_config(case.codec.config())
    assert type(again) is type(case.codec) and again.config() == case.codec.config()
    for name in ("additive", "linear", "unbiased", "passes", "needs_fit", "client_state", "integer"):
        assert getattr(again, name) == getattr(case.codec, name)
    assert not again.bound and not again.fitted and case.codec.bound and case.codec.fitted


def test_an_exported_codec_is_the_same_codec(case: Case, tmp_path: Path) -> None:
    save_codec(case.codec, tmp_path)
    again = load_codec(tmp_path)
    assert again.describe() == case.codec.describe() and again.encoder.fingerprint == case.codec.encoder.fingerprint
    for half in ("encoder", "decoder"):
        mine, theirs = getattr(case.codec, half).state_dict(), getattr(again, half).state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_each_half_works_alone_from_its_own_file(case: Case, tmp_path: Path) -> None:
    save_codec(case.codec, tmp_path)
    assert len(encoder_file(case.codec)) == (tmp_path / "encoder.safetensors").stat().st_size
    (tmp_path / "decoder.safetensors").rename(tmp_path / "elsewhere.safetensors")
    encoder = load_encoder(tmp_path / "encoder.safetensors")
    (tmp_path / "encoder.safetensors").unlink()
    decoder = load_decoder(tmp_path / "elsewhere.safetensors")
    assert decoder.broadcast({}) == case.context.broadcast
    for step, context in enumerate(case.publics):
        sent = [
            encoder.encode_message(update, context, Private(torch.Generator().manual_seed(i)))
            for i, update in enumerate(case.held.updates[0])
        ]
        assert sent == case.cohort(0, step)
        expected = case.codec.decoder.decode_sum(sent, [1] * 5, context, copy.deepcopy(case.states[step]))
        assert torch.equal(decoder.decode_sum(sent, [1] * 5, context, copy.deepcopy(case.states[step])), expected)


def test_a_checkpoint_restores_the_codec_into_a_new_one(case: Case) -> None:
    again = CODECS[case.name]()
    restore_codec(again, codec_state(case.codec))
    assert again.fitted and again.version == case.codec.version
    encoded = again.encoder.encode_message(case.held.updates[0, 0], case.context, Private(torch.Generator().manual_seed(0)))
    assert encoded == case.message(case.held.updates[0, 0])


def test_fitting_is_deterministic_and_counts_versions(case: Case, adam: TrainCodec) -> None:
    again = CODECS[case.name]()
    again.fit(case.fit, adam)
    assert again.version == 1 and again.encoder.fingerprint == case.codec.encoder.fingerprint
    again.fit(case.fit, adam)
    assert again.version == 2 and again.encoder.fingerprint == again.decoder.fingerprint != case.codec.encoder.fingerprint


def test_a_codec_that_needs_no_fit_works_once_bound(case: Case) -> None:
    codec = CODECS[case.name]()
    assert not codec.fitted
    codec.bind(case.fit.layout)
    assert codec.bound and codec.fitted != codec.needs_fit


def test_references_make_codes_no_longer_than_the_codecs_first_stage(case: Case, adam: TrainCodec) -> None:
    first = case.codec.codecs[0] if isinstance(case.codec, ChainCodec) else case.codec
    for reference in case.codec.references().values():
        reference.fit(case.fit, adam)
        assert reference.encoder.code_dim == first.encoder.code_dim


# Integer codes


@rounding
def test_rounding_is_unbiased_inside_the_range(case: Case) -> None:
    quantizer, exact = quantizer_of(case)
    gain = gain_of(case)
    limit = quantizer.limit
    inside = exact.abs() / (quantizer.step * gain) <= limit
    draws = 4000
    codes = case.encode(case.held.updates[0, 0].expand(draws, -1))
    mean = codes.double().mean(0) * quantizer.step.double() * gain
    # A rounded value's variance is at most a quarter of a squared step.
    tolerance = 5 * 0.5 / draws**0.5 * quantizer.step.double() * gain
    assert inside.float().mean() > 0.9
    assert ((mean - exact).abs() <= tolerance)[inside].all()
    # All coefficients together see a much smaller bias, in steps.
    overall = ((mean - exact) / (quantizer.step * gain))[inside].mean()
    assert overall.abs() <= 5 * 0.5 / (draws * int(inside.sum())) ** 0.5


@rounding
def test_clients_round_independently(case: Case) -> None:
    quantizer, exact = quantizer_of(case)
    codes = torch.stack([case.encode(case.held.updates[0, 0], seed) for seed in range(200)])
    error = codes.double() - exact / (quantizer.step * gain_of(case))
    inside = error.abs().amax(0) < 1
    correlation = torch.corrcoef(error[:20, inside]) - torch.eye(20)
    assert correlation.abs().max() < 6 / int(inside.sum()) ** 0.5


@rounding
@pytest.mark.parametrize("sign", [1, -1])
def test_values_beyond_the_range_saturate(case: Case, sign: int) -> None:
    quantizer, exact = quantizer_of(case, sign * 1e6 * case.held.updates[0, 0].sign())
    code = case.encode(sign * 1e6 * case.held.updates[0, 0].sign())
    beyond = exact.abs() > quantizer.step * gain_of(case) * quantizer.limit
    assert beyond.any() and torch.equal(code[beyond], (quantizer.limit * exact.sign())[beyond].int())
    assert code.abs().max() == quantizer.limit.max()


@integer
def test_integer_sums_are_exact(case: Case) -> None:
    weights = [10**9 + i for i in range(5)]
    codes = [case.encode(update, i) for i, update in enumerate(case.held.updates[0])]
    exact = [sum(w * int(code[j]) for w, code in zip(weights, codes, strict=True)) for j in range(len(codes[0]))]
    mean = torch.tensor([value / sum(weights) for value in exact], dtype=torch.float64).float()
    assert torch.equal(case.codec.decoder.decode_sum(case.cohort(), weights, case.context, {}), case.decode(mean))


def test_a_gain_is_announced_before_the_round_and_decoding_does_not_change_it(case: Case) -> None:
    decoder = case.codec.decoder
    state: State = {}
    context = ServerContext.of(replace(case.context, broadcast=decoder.broadcast(state)), 5)
    codes = torch.stack([case.encode(10 * update, i) for i, update in enumerate(case.held.updates[0])])
    mean = case.open(codes).float().mean(0)
    decoder.record_lengths(case.codec.mean_bytes(codes), state)
    before = copy.deepcopy(state)
    first = decoder.decode(mean, context, state)
    assert torch.equal(decoder.decode(mean, context, before), first)
    if isinstance(case.codec, GridCodec):
        assert decoder.broadcast(state) == context.broadcast
    elif case.codec.integer:
        assert torch.equal(decoder.decode(mean, context, state), first)  # with the same announcement, whatever the state is by now
        assert gain_in(decoder.broadcast(state)) > gain_in(context.broadcast)
        later = decoder.decode(mean, replace(context, broadcast=decoder.broadcast(state)), state)
        assert not torch.equal(later, first)
    else:
        assert not context.broadcast


@adaptive
def test_the_gain_follows_updates_that_grow_and_shrink(case: Case) -> None:
    gains = {}
    for scale in (0.2, 1.0, 5.0):
        state: dict[str, object] = {}
        for round in range(12):
            context = Context(seed=1, round=round, broadcast=case.codec.decoder.broadcast(state))
            messages = [
                case.codec.encoder.encode_message(scale * update, context, Private(torch.Generator().manual_seed(100 * round + i)))
                for i, update in enumerate(case.held.updates[round])
            ]
            case.codec.decoder.decode_sum(messages, [1] * 5, context, state)
        gains[scale] = gain_in(case.codec.decoder.broadcast(state))
    assert gains[0.2] < gains[1.0] < gains[5.0] and all(math.isfinite(gain) and gain > 0 for gain in gains.values())


def test_encoding_changes_no_scale(case: Case) -> None:
    """What a client's own update is like must not reach another client's code but through the sum."""
    before, first = codec_state(case.codec), case.encode(case.held.updates[0, 0])
    case.message(1e6 * case.held.updates[0, 1])
    after = codec_state(case.codec)
    assert torch.equal(case.encode(case.held.updates[0, 0]), first) and case.codec.decoder.broadcast({}) == case.context.broadcast
    assert all(torch.equal(before["encoder"][key], after["encoder"][key]) for key in before["encoder"])


def gain_in(broadcast: object) -> float:
    assert isinstance(broadcast, dict)
    found = broadcast.get("gain")
    return float(found) if found is not None else gain_in(next(value for value in broadcast.values() if value))


def gain_of(case: Case) -> float:
    return gain_in(dict(case.context.broadcast))


def quantizer_of(case: Case, update: Tensor | None = None) -> tuple[torch.nn.Module, Tensor]:
    """The rounding half of the encoder, and what it is given (float64) for an update."""
    update = case.held.updates[0, 0] if update is None else update
    if not isinstance(case.codec.encoder, ChainEncoder):
        return case.codec.encoder, update.double()
    *firsts, last = case.codec.encoder.stages
    for first in firsts:
        update = first.encode(update, replace(case.context, broadcast={}), Private(torch.Generator())).detach()
    return last, update.double()


def test_decoding_is_replayable_if_it_says_so(case: Case) -> None:
    """Whoever holds the decoder and what was announced decodes what the server decoded, whatever the server remembers."""
    if case.codec.passes > 1:
        return
    decoder, memory = case.codec.decoder, {}
    mean = torch.stack([case.open(case.encode(update, i)) for i, update in enumerate(case.held.updates[0])]).float().mean(0)
    for _ in range(2):
        decoder.decode(mean, case.context, memory)
    same = torch.equal(decoder.decode(mean, case.context, {}), decoder.decode(mean, case.context, memory))
    assert same == decoder.replayable


# Refusals


class Longer(IdentityCodec):
    """Claims a code one number longer than the update."""

    def make_encoder(self, layout: Layout, plan: dict[str, object]):
        return super().make_encoder(Layout.vector(layout.dim + 1), plan)

    def make_decoder(self, layout: Layout, plan: dict[str, object]):
        return super().make_decoder(Layout.vector(layout.dim + 1), plan)


class Disagreeing(Longer):
    """An encoder and a decoder of different codes."""

    def make_decoder(self, layout: Layout, plan: dict[str, object]):
        return IdentityCodec.make_decoder(self, layout, plan)


def test_a_code_longer_than_the_update_is_refused(layout: Layout) -> None:
    codec = Longer()
    with pytest.raises(ConfigurationError, match=r"no longer than the update \(133 numbers\) but Longer makes one of 134"):
        codec.bind(layout)
    assert not codec.bound


def test_halves_that_disagree_are_refused(layout: Layout) -> None:
    with pytest.raises(ConfigurationError, match="Disagreeing: encoder and decoder disagree"):
        Disagreeing().bind(layout)


@pytest.mark.parametrize(
    "codec", [LinearCodec(100, block_size=16), AutoencoderCodec(100, block_size=16), ChainCodec([LinearCodec(100, block_size=16)])]
)
def test_a_code_shorter_than_one_number_a_block_is_refused(
    codec: Codec, layout: Layout, banks: tuple[UpdateBank, UpdateBank], adam: TrainCodec
) -> None:
    with pytest.raises(ConfigurationError, match="one per block.*smaller `ratio` or a larger `block_size`"):
        codec.bind(layout)
    with pytest.raises(ConfigurationError, match="one per block"):
        codec.fit(banks[0], adam)


class TwoPass(IdentityCodec):
    """Claims to take two passes."""

    passes = 2


def test_a_chain_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ConfigurationError, match="one-pass codecs in a chain but PowerSGDCodec takes 2 passes: use it alone"):
        ChainCodec([LinearCodec(), PowerSGDCodec()])
    with pytest.raises(ConfigurationError, match="one-pass codecs in a chain but TwoPass"):
        ChainCodec([TwoPass()])
    for first in (TopKCodec(), QSGDCodec(), QuantizeCodec()):
        with pytest.raises(
            ConfigurationError, match=f"summable codecs with float codes before the last.*{type(first).__name__}: put it last"
        ):
            ChainCodec([first, LinearCodec()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearCodec(ratio=0.5), "`ratio` >= 1.*0.5"),
        (lambda: LinearCodec(block_size=-1), "`block_size` >= 0.*-1"),
        (lambda: LinearCodec(cohort=-1), "`cohort` >= 0.*-1"),
        (lambda: AutoencoderCodec(ratio=0.5), "`ratio` >= 1 but got 0.5"),
        (lambda: AutoencoderCodec(depth=-1), "`depth` >= 0 but got -1"),
        (lambda: AutoencoderCodec(width=0), "`width` >= 1 but got 0"),
        (lambda: AutoencoderCodec(block_size=0), "`block_size` >= 1 but got 0"),
        (lambda: AutoencoderCodec(activation="swish"), "`activation` to be one of .* but got 'swish'"),
        (lambda: AutoencoderCodec(skip=False), "`skip=true` with `start='pca'`"),
        (lambda: QuantizeCodec(bits=1), "`bits` in 2..16.*1"),
        (lambda: QuantizeCodec(bits=17), "`bits` in 2..16.*17"),
        (lambda: QuantizeCodec(clip=0), "`clip` > 0"),
        (lambda: LinearCodec(fresh=True), "`basis` random with `fresh=true` but got 'pca'"),
        (lambda: QSGDCodec(bits=1), "`bits` in 2..16.*1"),
        (lambda: QSGDCodec(bucket=0), "`bucket` >= 1.*0"),
        (lambda: QSGDCodec(norm="l1"), "`norm` to be one of l2, max but got 'l1'"),
        (lambda: TopKCodec(ratio=0.5), "`ratio` >= 1 but got 0.5"),
        (lambda: TopKCodec(values="bfloat16"), "`values` to be one of .* but got 'bfloat16'"),
        (lambda: CountSketchCodec(ratio=0.5), "`ratio` >= 1.*0.5"),
        (lambda: CountSketchCodec(rows=0), "`rows` >= 1.*0"),
        (lambda: CountSketchCodec(top_k=-1), "`top_k` >= 0.*-1"),
        (lambda: CountSketchCodec(momentum=1), "`momentum` in .*1"),
        (lambda: PowerSGDCodec(rank=0), "`rank` >= 1 but got 0"),
        (lambda: ChainCodec([]), "`codecs` to name at least one codec"),
    ],
)
def test_arguments_out_of_range_are_named(make: Callable[[], Codec], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
