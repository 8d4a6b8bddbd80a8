"""GradientCodes on one device: what reaches the optimizer, what is left out, and what is refused."""

from __future__ import annotations

import io
import zipfile
import zlib
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from fedlight.callbacks import GradientCodes
from fedlight.codecs import (
    AutoencoderCodec,
    ChainCodec,
    HalfCodec,
    IdentityCodec,
    LinearCodec,
    PowerSGDCodec,
    QuantizeCodec,
    TopKCodec,
    TwoSidedCodec,
)
from fedlight.core.errors import CodecMismatchError, ConfigurationError
from fedlight.core.gradients import Channel, exchange, pack_codec, unpack_codec
from tests.data_parallel import SmallResNet, SmallTransformer
from tests.federation import federated, federated_data, trainer
from tests.own import LitClassifier, Points


def fit(module, callback, steps=5, data=None, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(**quiet | {"accelerator": "cpu", "devices": 1, "max_steps": steps, "limit_val_batches": 0} | settings, callbacks=callback)
    torch.manual_seed(0)
    run.fit(module, datamodule=data)
    return run


def boring() -> BoringModel:
    torch.manual_seed(0)
    return BoringModel()


def weights(module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def alone(message):
    pass


def test_identity_changes_nothing_and_a_coarse_code_does():
    runs = {}
    for name, callback in {
        "none": [],
        "identity": [GradientCodes(IdentityCodec(), warmup_steps=0, min_size=0)],
        "half": [GradientCodes(HalfCodec(), warmup_steps=0, min_size=0)],
    }.items():
        module = boring()
        fit(module, callback)
        runs[name] = weights(module)
    assert torch.equal(runs["none"], runs["identity"])
    assert not torch.equal(runs["none"], runs["half"])
    torch.testing.assert_close(runs["none"], runs["half"], atol=1e-2, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"}])
def test_a_users_module_learns_with_codes(settings):
    torch.manual_seed(0)
    module, codes = LitClassifier(norm=False), GradientCodes(TwoSidedCodec(ratio=4), warmup_steps=3, refit_every=10, min_size=40)
    run = fit(module, [codes], steps=80, data=Points(), limit_val_batches=1.0, **settings)
    assert run.validate(module, Points(), verbose=False)[0]["val_accuracy"] > 0.9
    assert codes.steps == 80
    assert codes.bytes < codes.bytes_full


def test_what_arrives_and_what_is_left_out_add_up_to_the_gradients():
    """Error feedback loses nothing: sum of decoded + residual = sum of gradients, in every step."""
    channel = Channel("w", (20, 30), LinearCodec(10, "random"), feedback=True, seed=0)
    generator = torch.Generator().manual_seed(0)
    given, arrived = torch.zeros(600), torch.zeros(600)
    for step in range(7):
        gradient = torch.randn(20, 30, generator=generator)
        (mean,), sent = exchange([channel], [gradient], step, 0, 1, alone, plain=step == 4)
        given, arrived = given + gradient.flatten(), arrived + mean
        torch.testing.assert_close(arrived + channel.residual, given, atol=1e-4, rtol=0)
        assert sent == (2400 if step == 4 else 4 * channel.codec.encoder.code_dim)
    assert float(channel.residual.norm()) > 1


@pytest.mark.parametrize("codec", [LinearCodec(10, "random"), PowerSGDCodec(2)])
def test_bytes_lose_nothing_either_what_rounding_takes_away_comes_later(codec):
    """In int8, decoded + left out = gradients in every step, codecs with a memory of their own included; zeros stay zeros."""
    channel = Channel("w", (20, 30), codec, feedback=True, seed=0)
    generator = torch.Generator().manual_seed(0)
    given, arrived, lengths = torch.zeros(600), torch.zeros(600), []
    for step in range(7):
        gradient = torch.randn(20, 30, generator=generator) * (step != 3)
        (mean,), sent = exchange([channel], [gradient], step, 0, 1, alone, plain=step == 5, int8=True)
        lengths.append(sent)
        given, arrived = given + gradient.flatten(), arrived + mean
        left = sum(part for part in (channel.residual, channel.private.get("error")) if part is not None)
        torch.testing.assert_close(arrived + left, given, atol=1e-4, rtol=0)
    codes = [channel.codec.encoder.format_at(number).length for number in range(channel.codec.passes)]
    assert lengths == [2400 if step == 5 else sum(codes) + 8 * len(codes) for step in range(7)]  # a byte a number, a peak a pass
    still = Channel("w", (20, 30), codec, feedback=True, seed=0)
    assert not exchange([still], [torch.zeros(20, 30)], 0, 0, 1, alone, plain=False, int8=True)[0][0].any()


@pytest.mark.parametrize("world", [2, 16, 127])
def test_sums_of_bytes_fit_a_byte_whatever_processes_hold(world):
    """The sum of what the largest entries of all processes become is a byte, and the mean is right to the unit they agreed on."""
    channel, sent = Channel("w", (40, 40), IdentityCodec(), feedback=False, seed=0), []

    def add(message):  # all hold the same
        message *= world
        sent.append(message.clone())

    gradient = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    gradient[0, 0] = 1000.0
    (mean,), count = exchange([channel], [gradient], 0, 0, world, add, plain=False, int8=True)
    power, integers = sent
    assert integers.dtype is torch.int8 and count == 8 + 1600
    unit = float(power * world) ** (1 / 8) / (127 // world)
    assert 0 < int(integers[0]) <= 127 and 1000 <= unit * (127 // world) < 1000 * 1.9
    torch.testing.assert_close(mean, gradient.flatten(), atol=0.51 * unit, rtol=0)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("codec", [PowerSGDCodec(2), ChainCodec([LinearCodec(10, "random"), HalfCodec()]), HalfCodec()])
def test_one_gradient_that_is_not_finite_spoils_no_later_one(codec, int8):
    channel, good = Channel("w", (20, 30), codec, feedback=True, seed=0), torch.ones(20, 30)
    means = []
    for step, gradient in enumerate((good, good * torch.inf, good, good)):
        (mean,), _ = exchange([channel], [gradient], step, 0, 1, alone, plain=False, int8=int8)
        means.append(mean)
    assert [bool(torch.isfinite(mean).all()) for mean in means] == [True, False, True, True]


def test_what_bytes_took_away_is_brought_once_when_bytes_are_no_longer_asked_for():
    channel = Channel("w", (20, 30), PowerSGDCodec(2), feedback=True, seed=0)
    gradient = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    arrived = torch.zeros(600)
    for step in range(40):
        (mean,), _ = exchange([channel], [gradient * (step == 0)], step, 0, 1, alone, plain=False, int8=step == 0)
        arrived += mean
    assert not channel.residual.any()
    torch.testing.assert_close(arrived + channel.private["error"], gradient.flatten(), atol=1e-4, rtol=0)


def test_tensors_that_two_factors_do_not_shrink_travel_in_full():
    assert Channel("b", (2048,), PowerSGDCodec(2), feedback=True, seed=0).codec is None
    assert Channel("w", (1024, 2), PowerSGDCodec(2), feedback=True, seed=0).codec is None
    assert Channel("w", (64, 32), PowerSGDCodec(2), feedback=True, seed=0).codec is not None


@pytest.mark.parametrize(
    ("codec", "int8", "tolerance"),
    [
        (IdentityCodec(), False, 1e-6),
        (HalfCodec(), False, 1e-2),
        (PowerSGDCodec(1), False, 1e-4),
        (IdentityCodec(), True, 0.1),
        (PowerSGDCodec(1), True, 0.1),
    ],
)
def test_two_processes_decode_the_mean(codec, int8, tolerance):
    """Played one after another: each process's message is added to the other's, and both decode the same."""
    generator = torch.Generator().manual_seed(0)
    column = torch.randn(12, 1, generator=generator)
    gradients = [column @ torch.randn(1, 8, generator=generator) for _ in range(2)]
    messages: list[list[torch.Tensor]] = [[], []]
    for _ in range(8):  # again, until what the other one sends in each message is known
        means = []
        for rank in range(2):
            number = iter(range(9))

            def add(message, rank=rank, number=number):
                place, other = next(number), messages[1 - rank]
                messages[rank][place:] = [message.clone()]
                if place < len(other):
                    message += other[place]

            channel = Channel("w", (12, 8), codec, feedback=False, seed=0)
            means.append(exchange([channel], [gradients[rank]], 0, rank, 2, add, plain=False, int8=int8)[0][0])
    assert torch.allclose(means[0], means[1], atol=1e-5)
    torch.testing.assert_close(means[0], sum(gradients).flatten() / 2, atol=tolerance, rtol=0)


@pytest.mark.parametrize("int8", [False, True])
def test_what_is_not_finite_is_seen_by_all_and_never_remembered(int8):
    channel = Channel("w", (20, 30), LinearCodec(10, "random"), feedback=True, seed=0)
    exchange([channel], [torch.ones(20, 30)], 0, 0, 1, alone, plain=False, int8=int8)
    before = channel.residual.clone()
    (mean,), _ = exchange([channel], [torch.full((20, 30), torch.inf)], 1, 0, 1, alone, plain=False, int8=int8)
    assert not torch.isfinite(mean).all()
    assert torch.equal(channel.residual, before)


def test_a_fit_takes_up_directions_that_were_seen():
    """Gradients in one plane, unlike those before: the codec that was fitted to them decodes them, the older one does not."""
    generator = torch.Generator().manual_seed(0)
    channel = Channel("w", (30, 40), TwoSidedCodec(ratio=100), feedback=False, seed=0)
    planes = [(torch.randn(30, 1, generator=generator), torch.randn(1, 40, generator=generator)) for _ in range(2)]
    errors = []
    for a, b in planes:
        exchange([channel], [a @ b], 0, 0, 1, alone, plain=True, window=3)
        if not errors:
            channel.fit()
        (mean,), _ = exchange([channel], [a @ b], 1, 0, 1, alone, plain=False)
        errors.append(float((mean - (a @ b).flatten()).norm() / (a @ b).norm()))
    channel.fit()
    (mean,), _ = exchange([channel], [a @ b], 2, 0, 1, alone, plain=False)
    errors.append(float((mean - (a @ b).flatten()).norm() / (a @ b).norm()))
    assert errors[0] < 0.1 and errors[1] > 0.5 and errors[2] < 0.1, errors


def test_a_packed_codec_is_the_same_codec():
    mine, theirs = (Channel("w", (30, 40), TwoSidedCodec(ratio=10), feedback=True, seed=0) for _ in range(2))
    gradient = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    exchange([mine], [gradient], 0, 0, 1, alone, plain=True, window=3)
    packed = mine.fit()
    theirs.take_over(packed)
    assert theirs.codec.encoder.fingerprint == mine.codec.encoder.fingerprint
    assert torch.equal(theirs.codec.reconstruct(gradient.view(1, -1)), mine.codec.reconstruct(gradient.view(1, -1)))
    unpack_codec(theirs.codec, pack_codec(mine.codec))


def archive(compression: int) -> bytes:
    """What torch would read, of parts that are much longer than it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        file.writestr("archive/data.pkl", bytes(30_000_000))
    return zlib.compress(stream.getvalue())


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (zlib.compress(bytes(150_000_000)), "at most [0-9,]+ compressed bytes"),
        (archive(zipfile.ZIP_DEFLATED), "no archive, or a compressed one"),
        (archive(zipfile.ZIP_STORED), "could not take it over"),
        (zlib.compress(b"nothing"), "no archive"),
        (b"nothing", "could not read them"),
    ],
)
def test_a_packed_codec_takes_no_more_memory_than_it_is_worth(packed: bytes, message: str):
    codec = Channel("w", (30, 40), TwoSidedCodec(ratio=10), feedback=True, seed=0).codec
    with pytest.raises(CodecMismatchError, match=message):
        unpack_codec(codec, packed)


@pytest.mark.slow
@pytest.mark.parametrize("model", [SmallTransformer, SmallResNet])
def test_small_models_learn_with_a_fraction_of_the_numbers(model):
    """Learned codes of fewer bytes than PowerSGD's come near its loss, and below a projection that neither is fitted nor remembers."""
    rows = {
        "learned": GradientCodes(TwoSidedCodec(ratio=32), warmup_steps=4, refit_every=40, min_size=500),
        "power": GradientCodes(PowerSGDCodec(rank=1), warmup_steps=4, min_size=500),
        "fixed": GradientCodes(LinearCodec(32, "random"), warmup_steps=4, min_size=500, feedback=False),
    }
    loss = {}
    for name, codes in rows.items():
        run = fit(model(), [codes], steps=80, max_epochs=-1)
        loss[name] = float(run.callback_metrics["loss"])
    assert rows["learned"].bytes < rows["power"].bytes
    assert loss["learned"] < 1.5 * loss["power"], loss
    assert loss["learned"] < loss["fixed"], loss


def test_short_tensors_travel_in_full():
    codes = GradientCodes(TwoSidedCodec(ratio=4), warmup_steps=1, min_size=40)
    fit(LitClassifier(norm=False), [codes], data=Points(), steps=3)
    assert {name for name, channel in codes._channels.items() if channel.codec is None} == {"net.0.bias", "net.3.bias"}


class TwoOptimizers(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]


class SparseModel(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(3, 2, sparse=True)


def test_codecs_that_must_be_trained_are_refused_and_a_run_without_codes_is_told():
    learned = AutoencoderCodec(ratio=2, block_size=16, width=4)
    for codec in (learned, ChainCodec([learned, QuantizeCodec(6)])):
        with pytest.raises(ConfigurationError, match="closed form.*TwoSidedCodec"):
            GradientCodes(codec)
    with pytest.warns(UserWarning, match="GradientCodes encodes nothing.*`min_size`"):
        fit(boring(), [GradientCodes(IdentityCodec())], steps=1)


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigurationError, match="codes can be summed.*TopKCodec"):
        GradientCodes(TopKCodec(ratio=8))
    with pytest.raises(ConfigurationError, match="`warmup_steps` >= 1"):
        GradientCodes(TwoSidedCodec(), warmup_steps=0)
    with pytest.raises(ConfigurationError, match="one optimizer under manual optimization but got 2.*combine the losses"):
        fit(TwoOptimizers(), [GradientCodes(IdentityCodec())])
    with pytest.raises(ConfigurationError, match="sparse=True"):
        fit(SparseModel(), [GradientCodes(IdentityCodec())])
    with pytest.raises(ConfigurationError, match="set `model.codec`.*remove GradientCodes"):
        trainer(1, callbacks=[GradientCodes(IdentityCodec())]).fit(federated(), datamodule=federated_data())
    sharded = SimpleNamespace(strategy=FSDPStrategy(), precision="32-true")
    with pytest.raises(ConfigurationError, match="auto or ddp but got FSDPStrategy.*Use ddp"):
        GradientCodes(IdentityCodec()).setup(sharded, BoringModel(), "fit")
    scaled = SimpleNamespace(strategy=trainer(1).strategy, precision="16-mixed")
    many = SimpleNamespace(strategy=trainer(1).strategy, precision="32-true", world_size=128)
    with pytest.raises(ConfigurationError, match="at most 127 processes with `int8`.*128"):
        GradientCodes(IdentityCodec(), int8=True).setup(many, BoringModel(), "fit")
    with pytest.raises(ConfigurationError, match="32-true or bf16-mixed with integer codes"):
        GradientCodes(QuantizeCodec()).setup(scaled, BoringModel(), "fit")
