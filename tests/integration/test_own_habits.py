"""What people do in a module besides returning a loss: the client's copy does it too, as Lightning's Trainer would, bit for bit."""

from __future__ import annotations

import queue

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchmetrics import MeanMetric, MetricCollection, SumMetric

from fedlight.core.errors import CodecMismatchError, ConfigurationError, DataError, LocalTrainingError
from tests.integration.test_known_modules import InRounds, federated, plainly
from tests.known_modules import BATCH, SAMPLES, fixed


class Habit(LightningModule):
    """A small classifier; each class below adds a habit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def loss(self, x, y):
        return nn.functional.cross_entropy(self.head(torch.tanh(self.body(x))), y)

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def train_dataloader(self):
        x = torch.randn(SAMPLES, 6, generator=fixed())
        return DataLoader(TensorDataset(x, torch.arange(SAMPLES) % 3), batch_size=BATCH, collate_fn=self.collate)

    def collate(self, items):
        return default_collate(items)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class MaskedGradient(Habit):
    """A hook of a parameter, which a copy of the parameter does not have by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.arange(8.0)[:, None] > 3
        self.body.weight.register_hook(lambda gradient: gradient * self.mask)
        self.head.weight.register_hook(self.halved)

    def halved(self, gradient):
        return gradient * self.mask.float().mean()


class ClippedAsItComes(Habit):
    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(clip)


def clip(parameter) -> None:
    parameter.grad.clamp_(-0.01, 0.01)


class HookedWithTheOptimizer(Habit):
    """A hook more in every fit: one in a run of Lightning's, and one in every client's round."""

    def configure_optimizers(self):
        self.body.weight.register_hook(lambda gradient: 0.5 * gradient)
        return super().configure_optimizers()


class Normalised(Habit):
    """Puts other tensors in the places of weights, as `vector_to_parameters` does too."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.body.weight.data = nn.functional.normalize(self.body.weight.data, dim=1)
        nn.utils.vector_to_parameters(0.9 * nn.utils.parameters_to_vector(self.head.parameters()), self.head.parameters())


class NormalisedOnTheWay(Habit):
    def training_step(self, batch, batch_idx):
        self.body.weight.data = nn.functional.normalize(self.body.weight.data, dim=1)
        return super().training_step(batch, batch_idx)


class Checkpointed(Habit):
    """torch's older checkpoints, which call backward within backward."""

    def training_step(self, batch, batch_idx):
        hidden = checkpoint(self.body, batch[0].clone().requires_grad_(), use_reentrant=True)
        return nn.functional.cross_entropy(self.head(torch.tanh(hidden)), batch[1])


class LossOfShapeOne(Habit):
    def training_step(self, batch, batch_idx):
        return self.loss(*batch)[None]


class Queueing(Habit):
    """Holds a queue, whose conditions share one lock."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = queue.Queue()

    def training_step(self, batch, batch_idx):
        self.waiting.put(batch[0])
        return self.loss(self.waiting.get(), batch[1])


class Moved:
    """A batch of one's own kind, which must be told where to go."""

    def __init__(self, items) -> None:
        self.content, self.device = default_collate(items), None

    def to(self, device, **_):
        self.device = device
        return self


class OwnBatches(Habit):
    def collate(self, items):
        return Moved(items)

    def training_step(self, batch, batch_idx):
        assert batch.device == self.device
        return self.loss(*batch.content)


class OddBuffers(Habit):
    """Buffers that torch has no deep copy, no test of numbers or no arithmetic for."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("neighbours", torch.eye(6).to_sparse_csr())
        self.register_buffer("links", torch.eye(6).to_sparse())
        self.register_buffer("byte", torch.ones(3).to(torch.float8_e4m3fn))
        self.register_buffer("word", torch.ones(3, dtype=torch.uint16))

    def training_step(self, batch, batch_idx):
        self.byte = (1.5 * self.byte.float()).to(torch.float8_e4m3fn)
        self.word = (self.word.int() + 1).to(torch.uint16)
        return self.loss((self.links @ (self.neighbours @ batch[0].T)).T, batch[1])


class Norms(Habit):
    """Statistics of several layers, of which one reads its own again on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(8, momentum=None), nn.InstanceNorm1d(1, track_running_stats=True)
        self.third = nn.BatchNorm1d(8)

    def loss(self, x, y):
        hidden = self.second(self.first(self.body(x))[:, None])[:, 0]
        return nn.functional.cross_entropy(self.head(self.third(hidden)), y)


class WarmedUpByHand(Habit):
    """Reads the length of an epoch from the Trainer's loader, and reaches through Lightning's optimizer."""

    def on_train_batch_start(self, batch, batch_idx):
        assert self.trainer.train_dataloader.batch_size == BATCH
        share = (1 + self.global_step) / (3 * len(self.trainer.train_dataloader))
        self.optimizers().optimizer.param_groups[0]["lr"] = 0.1 * share


class Signs(torch.optim.Optimizer):
    """Steps by signs, and asks for the loss within its own `no_grad`."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(parameter.grad.sign(), alpha=-self.param_groups[0]["lr"])
        return loss


class SteppedBySigns(Habit):
    def configure_optimizers(self):
        return Signs(self.parameters(), lr=0.01)


OFTEN = (SteppedBySigns, MaskedGradient, ClippedAsItComes, Normalised, NormalisedOnTheWay, Norms, WarmedUpByHand, OddBuffers)
HARMLESS = (Checkpointed, LossOfShapeOne, Queueing, OwnBatches)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = (tensor.to_dense() if tensor.layout != torch.strided else tensor for tensor in (one, other))
    return torch.equal(one, other)


@pytest.mark.parametrize("kind", OFTEN + HARMLESS)
def test_a_client_does_it_too(kind):
    plain, own = plainly(kind(), callbacks=[InRounds()]).state_dict(), federated(kind()).state_dict()
    assert all(same(tensor, own[name]) for name, tensor in plain.items())
    usual = plainly(Habit(), callbacks=[InRounds()]).state_dict()
    assert all(same(plain[name], tensor) for name, tensor in usual.items()) == (kind in HARMLESS)


def test_what_one_client_hooks_to_its_weights_the_next_does_not_meet():
    """Nor does the check before training leave anything behind."""
    plain = plainly(HookedWithTheOptimizer(), epochs=1).state_dict()
    own = HookedWithTheOptimizer()
    federated(own, rounds=1)
    assert all(torch.allclose(tensor, own.state_dict()[name], rtol=1e-6, atol=1e-7) for name, tensor in plain.items())
    again = plainly(HookedWithTheOptimizer(), callbacks=[InRounds()]).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in federated(HookedWithTheOptimizer()).state_dict().items())


class Reads(Habit):
    """Reads in a hook what its step logged."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self):
        self.trainer.callback_metrics["loss"]


class Several(Habit):
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(torch.tanh(self.body(batch[0]))), batch[1], reduction="none")


class NoneUnderLoss(Habit):
    def training_step(self, batch, batch_idx):
        return {"loss": None}


class NoTensor(Habit):
    def training_step(self, batch, batch_idx):
        return float(self.loss(*batch))


class Narrowed(Habit):
    def on_train_epoch_end(self):
        self.body.weight.data = self.body.weight.data[:4]


class NoOptimizer(Habit):
    def configure_optimizers(self):
        return None


class WrongInterval(Habit):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "batch"}]


class ChangingSparse(OddBuffers):
    def training_step(self, batch, batch_idx):
        self.links = 2 * self.links
        return super().training_step(batch, batch_idx)


class WithoutTraining(Habit):
    train_dataloader = LightningModule.train_dataloader


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Reads, LocalTrainingError, "loss: what a client logs is discarded, so keep it in an attribute"),
        (Several, ConfigurationError, r"a loss of one number but got one of shape \[4\]: reduce it"),
        (NoneUnderLoss, ConfigurationError, "a loss under 'loss' but it returned None there: return None alone"),
        (NoTensor, ConfigurationError, "to return a loss, a dict with one, or None but it returned 1"),
        (Narrowed, CodecMismatchError, r"body.weight to stay torch.float32 \[8, 6\] in training but it became torch.float32 \[4, 6\]"),
        (WrongInterval, ConfigurationError, "a schedule with the `interval` 'epoch' or 'step' but got 'batch'"),
        (ChangingSparse, ConfigurationError, "to leave links as it is, or dense, because it is torch.sparse_coo.*persistent=False"),
        (WithoutTraining, DataError, "WithoutTraining: expected a train_dataloader.*with your own module"),
        (NoOptimizer, ConfigurationError, "one optimizer for the clients but it returns none.*set `algorithm`"),
    ],
)
def test_what_no_step_can_be_made_of_is_refused(kind, error, message):
    with pytest.raises(error, match=message):
        federated(kind())


def test_a_number_that_no_round_hands_on_is_told_once():
    class Annealed(Habit):
        def __init__(self) -> None:
            super().__init__()
            self.share, self.kept = 1.0, 2

        def training_step(self, batch, batch_idx):
            self.share *= 0.5
            return self.share * self.kept * super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="Training changes `share` of Annealed.*`register_buffer`") as told:
        federated(Annealed())
    assert sum("Training changes" in str(warning.message) for warning in told) == 1


class Counting(Habit):
    """Adds up losses in a metric over all of training, as if checkpoints kept it."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.losses = MetricCollection({"mean": MeanMetric(), "sum": SumMetric()})
        self.losses["mean"].persistent(persistent)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.update(loss.detach())
        assert self.losses["mean"].update_count == batch_idx + 1
        return loss


def test_a_persistent_metric_of_training_is_told_once_and_stays_with_the_client(recwarn):
    own = federated(Counting())
    federated(Counting(persistent=False))
    told = [str(warning.message) for warning in recwarn if "Training updates" in str(warning.message)]
    assert len(told) == 1 and "`losses.mean` of Counting" in told[0] and not own.state_dict()["losses.mean.weight"]


def freezes(self):
    self.body.requires_grad_(False)


def adds(self):
    self.more = nn.Linear(3, 3)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
@pytest.mark.parametrize(("change", "message"), [(freezes, "body.weight has ceased to be"), (adds, "more.weight has begun to be")])
def test_what_is_trained_is_known_before_a_fit_starts(hook, change, message):
    with pytest.raises(ConfigurationError, match=f"{message}.*do it in `__init__`, `setup` or `configure_model`"):
        federated(type("Late", (Habit,), {hook: change})())
    federated(type("Early", (Habit,), {"configure_model": lambda self: hasattr(self, "more") or change(self)})())
