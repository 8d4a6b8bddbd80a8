"""Ordinary data-parallel training in two gloo processes: several fits one after another in the same pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import DataLoader, TensorDataset

from fedlight.callbacks import GradientCodes
from fedlight.codecs import HalfCodec, IdentityCodec, PowerSGDCodec, QuantizeCodec, TwoSidedCodec
from tests.known_modules import KNOWN
from tests.own import LitClassifier, Points

CALLBACK = Callable[[], Callback]


class Hook(Callback):
    """One of torch's own hooks, on the CPU too."""

    def __init__(self, hook: Any, state: Any = None) -> None:
        self.hook = hook
        self.state = state

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(self.state, self.hook)


class SmallTransformer(LightningModule):
    """One layer of attention that learns to repeat what it saw two places before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(8, 32)
        self.position = nn.Parameter(0.1 * torch.randn(10, 32))
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 8)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        hidden = self.layer(self.embedding(x) + self.position, nn.Transformer.generate_square_subsequent_mask(10), is_causal=True)
        loss = nn.functional.cross_entropy(self.head(hidden[:, 2:]).flatten(0, 1), x[:, :-2].flatten())
        self.log("loss", loss, sync_dist=True)
        return loss

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randint(8, (512, 10), generator=torch.Generator().manual_seed(0))), batch_size=32)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class SmallResNet(LightningModule):
    """One residual block with GroupNorm on synthetic images, whose class is where they are bright."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.block = nn.Sequential(
            nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
        )
        self.head = nn.Linear(16 * 16, 4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.stem(x)
        loss = nn.functional.cross_entropy(self.head(nn.functional.avg_pool2d(hidden + self.block(hidden), 2).flatten(1)), y)
        self.log("loss", loss, sync_dist=True)
        return loss

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(4, (512,), generator=generator)
        x = torch.randn(512, 1, 8, 8, generator=generator)
        for image, label in zip(x, y.tolist(), strict=True):
            image[0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 0.7
        return DataLoader(TensorDataset(x, y), batch_size=32)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


def fit(module: LightningModule, callback: Callback | None, data: Any = None, steps: int = 6, **settings: Any) -> dict[str, Any]:
    """Train and return weights, figures and bytes."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
    ckpt_path = settings.pop("ckpt_path", None)
    callbacks = [*settings.pop("more", []), *([callback] if callback is not None else [])]
    trainer = Trainer(**quiet | settings, callbacks=callbacks)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return {
        "weights": nn.utils.parameters_to_vector(module.parameters()).detach().clone(),
        "state": {name: tensor.detach().clone() for name, tensor in module.state_dict().items()},
        "figures": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "bytes": getattr(callback, "bytes", 0),
        "full": getattr(callback, "bytes_full", 0),
    }


def boring() -> BoringModel:
    torch.manual_seed(0)
    return BoringModel()


def lit() -> LitClassifier:
    torch.manual_seed(0)
    return LitClassifier(norm=False)


def conformance() -> dict[str, Any]:
    """Return weights by hook, for a user's module."""
    hooks: dict[str, CALLBACK] = {
        "none": lambda: None,  # type: ignore[dict-item, return-value]
        "allreduce": lambda: Hook(default_hooks.allreduce_hook),
        "fp16": lambda: Hook(default_hooks.fp16_compress_hook),
        "identity": lambda: GradientCodes(IdentityCodec(), warmup_steps=0, min_size=0),
        "half": lambda: GradientCodes(HalfCodec(), warmup_steps=0, min_size=0, feedback=False),
        "bytes": lambda: GradientCodes(PowerSGDCodec(1), warmup_steps=1, min_size=50, int8=True),
        "integers": lambda: GradientCodes(QuantizeCodec(bits=6, smoothing=0.0), warmup_steps=2, min_size=0, refit_every=2),
    }
    results = {name: fit(lit(), make(), Points()) for name, make in hooks.items()}
    more = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"}
    for name in ("none", "identity"):
        results[f"{name}, accumulated"] = fit(lit(), hooks[name](), Points(), steps=3, **more)
    results["boring"] = fit(boring(), hooks["identity"](), BoringDataModule())
    results["boring, none"] = fit(boring(), None, BoringDataModule())
    return results


def known() -> dict[str, Any]:
    """Return weights of modules that everybody knows: plainly, without a code, and with one that loses something."""
    codes: dict[str, CALLBACK] = {
        "none": lambda: None,  # type: ignore[dict-item, return-value]
        "identity": lambda: GradientCodes(IdentityCodec(), warmup_steps=0, min_size=0),
        "coarse": lambda: GradientCodes(PowerSGDCodec(1), warmup_steps=1, min_size=0),
    }
    strategy = {"strategy": "ddp_find_unused_parameters_true"}
    return {f"{kind.__name__}, {name}": fit(kind(), make(), **strategy) for kind in KNOWN for name, make in codes.items()}


def resume(folder: Path) -> dict[str, Any]:
    """Return two epochs of eight steps at once, and one and one, for a codec that is fitted and one that remembers, in bytes."""
    kinds: dict[str, CALLBACK] = {
        "fitted": lambda: GradientCodes(TwoSidedCodec(ratio=8), warmup_steps=2, refit_every=3, min_size=50),
        "bytes": lambda: GradientCodes(PowerSGDCodec(1), warmup_steps=1, min_size=50, int8=True),
    }
    results = {}
    for name, codes in kinds.items():
        results[f"whole, {name}"] = fit(lit(), codes(), Points(), steps=16)
        saver = ModelCheckpoint(folder, filename=name, every_n_train_steps=8)
        fit(lit(), codes(), Points(), steps=8, more=[saver], enable_checkpointing=True)
        results[f"resumed, {name}"] = fit(lit(), codes(), Points(), steps=16, ckpt_path=folder / f"{name}.ckpt")
    return results
