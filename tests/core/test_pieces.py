"""Every kind of gradient that autograd makes, in the client algorithms and in GradientCodes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedlight.callbacks import GradientCodes
from fedlight.clients import Algorithm, ClientOptimizer, FedAvg, FedProx, FedSGD, LocalModel, Scaffold, Vectorized
from fedlight.clients.engine import ClientTask
from fedlight.codecs import HalfCodec, IdentityCodec, LinearCodec, PowerSGDCodec, QSGDCodec, TopKCodec, TransformCodec, TwoSidedCodec
from fedlight.core.codec import Codec
from fedlight.core.layout import FlatModel, Layout, absent, as_is, as_real, derivatives, flat_gradient, flatten

ITEMS = torch.randint(12, (40,), generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """An embedding and two heads, of which the second is never used; ``kind`` says what else is odd."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.items = nn.Embedding(12, 4, sparse=kind == "sparse")
        self.used, self.unused = nn.Linear(4, 1), nn.Linear(4, 3)
        self.factor = nn.Parameter(torch.tensor(0.5 + 0.5j) if kind == "complex" else torch.tensor(1.0))
        self.nothing = nn.Parameter(torch.ones(0, 7) if kind == "empty" else torch.ones(1))
        if kind == "double":
            self.double()

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.factor * (1 - 2j)).real if self.kind == "complex" else self.factor
        items = nn.functional.embedding(x, self.items.weight, sparse=True) if self.kind == "functional" else self.items(x)
        return self.used(items) * scale + self.nothing.sum()


DENSE = ["", "complex", "empty", "double"]
KINDS = [*DENSE, "sparse"]


def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x)[:, 0] - y.to(model.used.weight)).square().mean()


def local(kind: str = "") -> LocalModel:
    made = LocalModel(Net(kind), objective)
    made.load(made.weights.clone(), made.buffers.clone())
    return made


def test_layout_counts_real_numbers_and_leaves_out_what_holds_none() -> None:
    layout = Layout.of(Net("complex"))
    assert layout.shapes[layout.names.index("factor")] == (2,)
    assert "nothing" not in Layout.of(Net("empty")).names
    flat = FlatModel(Net("complex"))
    flat.weights.fill_(3)
    assert complex(flat.module.factor) == 3 + 3j
    assert as_is(as_real(flat.module.factor), flat.module.factor).is_complex()


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_what_torch_has_for_a_gradient(kind: str) -> None:
    made, y = local(kind), torch.ones(40)
    loss, gradients = made.gradients(ITEMS, y)
    net = Net(kind)
    objective(net, ITEMS, y).backward()
    named = [(p, p.grad) for p in net.parameters() if p.numel()]
    expected = flatten(torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g for p, g in named)
    torch.testing.assert_close(flat_gradient(gradients), expected)
    assert made.reached == [g is not None for _, g in named] and len(made.absent) == 2
    assert loss.dtype == made.weights.dtype


def test_a_parameter_that_ceases_to_be_trained_has_no_gradient() -> None:
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    b.requires_grad_(False)
    found = derivatives((a * b).sum(), torch.ones(()), [a, b])
    assert found[1] is None and torch.equal(found[0], torch.ones(2))
    assert absent(Layout(("a", "b"), ((2,), (2,))), [True, False]) == [slice(2, 4)]


TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


def trained(algorithm: Algorithm, kind: str = "", half: bool = False) -> nn.Module:
    """Return the network that one client ends with, and torch itself."""
    made = local(kind)
    algorithm.run(made, ITEMS, torch.ones(40), 0, torch.Generator().manual_seed(1))
    return made.module


def by_hand(make: Callable[..., torch.optim.Optimizer], kind: str) -> nn.Module:
    net = Net(kind)
    optimizer = make(net.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        objective(net, ITEMS, torch.ones(40)).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("make", TORCH.values(), ids=TORCH)
def test_a_sparse_gradient_that_torch_refuses_is_refused_in_its_words(make: Callable[..., torch.optim.Optimizer]) -> None:
    with pytest.raises(RuntimeError, match=r"[Ss]parse") as torchs:
        by_hand(make, "sparse")
    with pytest.raises(RuntimeError) as ours:
        trained(ClientOptimizer(make, steps=5, batch_size=40), "sparse")
    assert str(ours.value) == str(torchs.value)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "FedAvg"])
def test_local_steps_are_torchs_own(name: str, kind: str) -> None:
    """Batches are the whole set, whose order does not matter but for rounding."""
    algorithm = FedAvg(lr=0.1, momentum=0.9, weight_decay=0.1, steps=5, batch_size=40) if name == "FedAvg" else None
    make = TORCH["SGD" if name == "FedAvg" else name]
    found = trained(algorithm or ClientOptimizer(make, steps=5, batch_size=40), kind).state_dict()
    for part, tensor in by_hand(make, kind).state_dict().items():
        torch.testing.assert_close(found[part], tensor, rtol=1e-4, atol=1e-5)
    assert torch.equal(found["unused.weight"], Net(kind).unused.weight)  # None, not zero: neither decay nor momentum


@pytest.mark.parametrize(
    "algorithm", [FedAvg, FedProx, FedSGD, Scaffold, lambda **o: ClientOptimizer(lambda p: torch.optim.SGD(p, 0.1), **o)]
)
def test_a_sparse_gradient_is_the_dense_one(algorithm: Callable[..., Algorithm]) -> None:
    options = {} if algorithm is FedSGD else {"steps": 3, "batch_size": 10}
    updates = []
    for kind in ("", "sparse"):
        made = local(kind)
        updates.append(algorithm(**options).run(made, ITEMS, torch.ones(40), 0, torch.Generator().manual_seed(1)).update)
    torch.testing.assert_close(*updates)


def test_an_optimizer_for_sparse_gradients_gets_them() -> None:
    with pytest.raises(RuntimeError, match="does not support dense"):
        trained(ClientOptimizer(lambda p: torch.optim.SparseAdam([q for q in p if q.shape == (12, 4)], 0.1), steps=1))
    moved = trained(ClientOptimizer(lambda p: torch.optim.SparseAdam([q for q in p if q.shape == (12, 4)], 0.1), steps=1), "sparse")
    assert not torch.equal(moved.items.weight, Net().items.weight)


def test_unused_weights_stand_still_under_momentum_until_they_are_used_and_many_at_once() -> None:
    made = local()
    task = ClientTask(0, ITEMS, torch.ones(40), made.start, made.buffers, torch.Generator().manual_seed(1))
    algorithm = FedAvg(lr=0.1, momentum=0.9, weight_decay=0.1, steps=4, batch_size=10)
    [(_, result, _)] = list(Vectorized(2).train(made, algorithm, [task], 0))
    one = algorithm.run(local(), ITEMS, torch.ones(40), 0, torch.Generator().manual_seed(1)).update
    torch.testing.assert_close(result.update, one)
    assert not result.update[made.absent[0]].any() and result.update.any()


class Lit(LightningModule):
    def __init__(self, kind: str, thaw: int = 0) -> None:
        super().__init__()
        self.net, self.thaw = Net(kind), thaw
        self.net.used.requires_grad_(not thaw)

    def training_step(self, batch, batch_idx):
        if self.thaw and self.global_step >= self.thaw:
            self.net.used.requires_grad_(True)
        return objective(self.net, batch[0], batch[1])

    def train_dataloader(self):
        return DataLoader(TensorDataset(ITEMS, torch.ones(40)), batch_size=20)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(own: Lit, *callbacks: GradientCodes) -> dict[str, Tensor]:
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", max_epochs=3, callbacks=list(callbacks), **off).fit(own)
    return own.state_dict()


@pytest.mark.parametrize("kind", ["", "functional", "complex", "empty", "double"])
@pytest.mark.parametrize("warmup", [0, 99])
def test_gradient_codes_that_lose_nothing_change_nothing(kind: str, warmup: int) -> None:
    codes = GradientCodes(IdentityCodec(), warmup_steps=warmup, min_size=0)
    found, plain = fit(Lit(kind), codes), fit(Lit(kind))
    exact = kind not in ("double", "functional") or (kind == "double" and warmup > 0)  # a code is float32, what is sent in full is not
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    assert codes.bytes_full == 6 * sum(
        p.numel() * (8 if (kind in ("double", "complex") and name == "net.factor") or kind == "double" else 4)
        for name, p in Lit(kind).named_parameters()
        if "unused" not in name
    )


def test_a_parameter_whose_training_begins_later_gets_a_code() -> None:
    codes = GradientCodes(PowerSGDCodec(1), warmup_steps=0, min_size=1)
    found = fit(Lit("", thaw=2), codes)
    assert not torch.equal(found["net.used.weight"], Net().used.weight) and "net.used.weight" in codes._channels


@pytest.mark.parametrize(
    "codec",
    [
        HalfCodec(),
        QSGDCodec(4),
        TopKCodec(ratio=4),
        PowerSGDCodec(1),
        LinearCodec(2),
        LinearCodec(2, "random"),
        TwoSidedCodec(2),
        TransformCodec(2),
    ],
    ids=lambda codec: type(codec).__name__,
)
def test_every_codec_takes_parameters_of_no_axes_and_of_no_numbers(codec: Codec) -> None:
    layout = Layout.of(Net("empty"))
    assert layout.dim == 12 * 4 + 5 + 15 + 1
    from fedlight.core.bank import UpdateBank

    codec = codec.unbound()
    if codec.needs_fit:
        codec.fit(UpdateBank(torch.randn(6, 3, layout.dim, generator=torch.Generator().manual_seed(0)), layout), lambda *_: {})
    else:
        codec.bind(layout)
    assert codec.bound
