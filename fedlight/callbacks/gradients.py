"""Codes for data-parallel gradients, in an ordinary Trainer with an ordinary LightningModule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from fedlight.callbacks.base import tell
from fedlight.core.codec import Codec, exactly
from fedlight.core.codec_needs import require_additive, require_fixed_width
from fedlight.core.collectives import LARGEST_BYTE, Reduce
from fedlight.core.errors import ConfigurationError, require_least
from fedlight.core.gradients import Channel, exchange, wide
from fedlight.core.layout import as_is, as_real, piece, put_piece

STATE_KEY = "fedlight_gradients"


@dataclass(eq=False)
class GradientCodes(Callback):
    """Encodes every gradient and decodes the mean of the codes: under DDP codes are what processes all-reduce.

    The data-parallel sibling of `GradientEncoder` and `GradientDecoder`: every process is client and server at once. On one device
    gradients are encoded and decoded before the optimizer step. Under DDP a communication hook does it, on the CPU (gloo) as on a GPU.
    There is one codec for each parameter tensor, so buckets may be grouped anew; a complex tensor is one of pairs of real numbers, and
    what is sent in full keeps float64. Clipping and logging see the decoded gradient. Bytes
    given to all-reduces are logged as `gradients/bytes` (of the last step) and `gradients/ratio` (of all steps so far).

    A codec that has to be fitted is fitted by rank 0 to the last gradients of its own, after the warm-up and every `refit_every` steps,
    and sent to the others (counted as well).

    Args:
        codec: Any codec whose codes can be summed; every parameter tensor gets one of its own.
        warmup_steps: First optimizer steps, in which gradients travel in full (a codec that is fitted needs at least one).
        feedback: Whether what a code leaves out is added to the next gradient.
        refit_every: Optimizer steps between fits of a codec that is fitted; 0 for the one after the warm-up alone.
        window: Recent gradients that it is fitted to.
        min_size: Parameter tensors of fewer numbers travel in full.
        seed: Seed of what encoders draw.
        int8: Whether float codes travel as integers of one byte, on steps that processes agree on first (one short message more for
            each of the codec's passes). The sum has to fit the byte as well: two processes have 63 steps on either side of zero, 16
            have 7.

    Raises:
        ConfigurationError: if a number is out of range, or (before training) codec, strategy or module cannot work together.
    """

    codec: Codec
    warmup_steps: int = 10
    feedback: bool = True
    refit_every: int = 100
    window: int = 8
    min_size: int = 1024
    seed: int = 0
    int8: bool = False

    def __post_init__(self) -> None:
        codec = self.codec
        require_additive(codec, "all-reducing gradients")
        require_fixed_width(codec, "all-reducing gradients")
        if codec.trained:
            raise ConfigurationError(
                f"Expected a codec that is fitted in closed form but {type(codec).__name__} is trained step by step, for which there is no "
                "time between steps of the model: choose another, such as TwoSidedCodec"
            )
        require_least(self, warmup_steps=int(codec.needs_fit), refit_every=0, window=1, min_size=0)
        self.steps = 0
        self.bytes = 0
        self.bytes_full = 0
        self._step_bytes = 0
        self._channels: dict[str, Channel] = {}
        self._names: dict[int, str] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._resumed: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before training starts."""
        if stage != "fit":
            return
        if hasattr(pl_module, "store") and hasattr(pl_module, "codec"):
            raise ConfigurationError(
                "Expected an ordinary LightningModule but got a FederatedModule, whose clients' updates are encoded: set `model.codec` "
                "and remove GradientCodes from `trainer.callbacks`"
            )
        kind = type(trainer.strategy)
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ConfigurationError(
                f"Expected `trainer.strategy` auto or ddp but got {kind.__name__}: no process of it holds whole gradients to encode. "
                "Use ddp, or remove GradientCodes from `trainer.callbacks`"
            )
        if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
            raise ConfigurationError(
                "Expected a DDPStrategy without `ddp_comm_hook`, of which there can be one, but it has one: remove it, or GradientCodes"
            )
        if self.codec.integer and trainer.precision == "16-mixed":
            raise ConfigurationError(
                "Expected `trainer.precision` 32-true or bf16-mixed with integer codes but got 16-mixed: an overflow, by which the loss "
                "is scaled, could not be seen in them"
            )
        if self.int8 and trainer.world_size > LARGEST_BYTE:
            raise ConfigurationError(
                f"Expected at most {LARGEST_BYTE} processes with `int8`, whose codes add up in one byte, but got {trainer.world_size}: "
                "set `int8` to false"
            )
        if any(getattr(part, "sparse", False) is True for part in pl_module.modules()):
            raise ConfigurationError("Expected dense gradients but an embedding has sparse=True: set it to False")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make one channel a parameter tensor, take over what a checkpoint held, and register the hook where there is DDP."""
        if not pl_module.automatic_optimization and len(trainer.optimizers) > 1:
            raise ConfigurationError(
                f"Expected one optimizer under manual optimization but got {len(trainer.optimizers)}: which gradients a backward pass "
                "brings cannot be told apart. Train the networks with a Trainer each, or combine the losses in one optimizer"
            )
        self._parameters = dict(pl_module.named_parameters())
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._channels = {name: self._channel(name) for name, p in self._parameters.items() if p.requires_grad}
        if all(channel.codec is None for channel in self._channels.values()):
            tell(
                f"GradientCodes encodes nothing: no parameter tensor has `min_size` ({self.min_size}) numbers and a code that is shorter, "
                "so that gradients travel in full. Lower `min_size`, or remove GradientCodes"
            )
        wide = [name for name, channel in self._channels.items() if channel.codec and self._parameters[name].dtype == torch.float64]
        if wide:
            tell(f"Codes are float32 at most, gradients of {wide[0]} float64: what a code rounds off is in the next gradient, if any")
        self._step_bytes = 0
        if self._resumed is not None:
            self._restore(self._resumed, trainer)
        if isinstance(trainer.strategy, DDPStrategy):
            model: Any = trainer.strategy.model  # not through the strategy, which leaves hooks out on the CPU
            model.register_comm_hook(None, lambda _, bucket: self._reduce_bucket(trainer, bucket))  # DDP refuses annotations as text

    def _channel(self, name: str) -> Channel:
        shape = tuple(as_real(self._parameters[name]).shape)
        recipe = self.codec if math.prod(shape) >= max(self.min_size, 1) else None
        return Channel(name, shape, recipe, self.feedback, self.seed)

    def _reduce_bucket(self, trainer: Trainer, bucket: Any) -> torch.futures.Future[Tensor]:
        """Replace a bucket of this process's gradients by the decoded mean of all processes' codes."""
        parameters, views = bucket.parameters(), bucket.gradients()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None else 1.0  # what is remembered must not depend on it
        means = self._exchange([self._names[id(p)] for p in parameters], [wide(piece(g)) / scale for g in views], trainer)
        for view, mean in zip(views, means, strict=True):
            view.copy_(as_is(mean.view(as_real(view).shape) * scale, view))
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Encode and decode on one device; under DDP the hook has done so."""
        if isinstance(trainer.strategy, DDPStrategy):
            return
        named = [(name, p, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None]
        means = self._exchange([name for name, _, _ in named], [piece(gradient) for _, _, gradient in named], trainer)
        for (_, parameter, _), mean in zip(named, means, strict=True):
            put_piece(parameter, mean)

    def _exchange(self, names: list[str], gradients: list[Tensor], trainer: Trainer) -> list[Tensor]:
        if not names:
            return []
        near = any(self._fit_due(self.steps + ahead) for ahead in range(1, self.window + 1))  # a fit that looks at gradients of this step
        for name in names:
            if name not in self._channels:  # its training has begun since
                self._channels[name] = self._channel(name)
        channels = [self._channels[name] for name in names]
        full, window = self.steps < self.warmup_steps, self.window if near and trainer.global_rank == 0 else 0
        rank, world = trainer.global_rank, trainer.world_size
        reduce: Reduce = distributed.all_reduce if world > 1 else lambda message: None  # the sum over one process
        with exactly(gradients[0].device):
            means, sent = exchange(channels, gradients, self.steps, rank, world, reduce, full, window, self.int8)
        self._step_bytes += sent
        self.bytes_full += sum(gradient.numel() * max(gradient.element_size(), 4) for gradient in gradients)
        return means

    def _fit_due(self, done: int) -> bool:
        """Whether the codecs are fitted once so many steps are done."""
        since = done - self.warmup_steps
        return self.codec.needs_fit and (since == 0 or (since > 0 and self.refit_every > 0 and since % self.refit_every == 0))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step if there was one, fit the codecs where that is due, and log the bytes."""
        if not self._step_bytes:  # gradients are still being accumulated
            return
        self.steps += 1
        if self._fit_due(self.steps):
            self._fit(trainer)
        self.bytes += self._step_bytes
        figures = {"gradients/bytes": float(self._step_bytes), "gradients/ratio": self.bytes_full / self.bytes}
        pl_module.log_dict(figures, batch_size=1)
        self._step_bytes = 0

    def _fit(self, trainer: Trainer) -> None:
        """Fit every codec on rank 0 and send it to the others."""
        fitted = {name: channel for name, channel in self._channels.items() if channel.codec is not None}
        packed = [channel.fit() for channel in fitted.values()] if trainer.global_rank == 0 else []
        if trainer.world_size > 1:
            packed = trainer.strategy.broadcast(packed)
            if trainer.global_rank:
                for channel, one in zip(fitted.values(), packed, strict=True):
                    channel.take_over(one)
        self._step_bytes += sum(map(len, packed))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add counters, codecs, and what every process has left out so far (called on all of them)."""
        mine = {name: channel.state() for name, channel in self._channels.items()}
        everyone: list[Any] = [mine]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            distributed.all_gather_object(everyone, mine)
        checkpoint[STATE_KEY] = {"steps": self.steps, "bytes": self.bytes, "bytes_full": self.bytes_full, "processes": everyone}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the state until there are parameters."""
        self._resumed = checkpoint.get(STATE_KEY)

    def _restore(self, state: dict[str, Any], trainer: Trainer) -> None:
        """Go on from a checkpoint; with another number of processes, what they had left out is forgotten."""
        self.steps, self.bytes, self.bytes_full = state["steps"], state["bytes"], state["bytes_full"]
        same = len(state["processes"]) == trainer.world_size
        mine = state["processes"][trainer.global_rank if same else 0]
        unknown = (mine.keys() - self._parameters.keys()) | (self._channels.keys() - mine.keys())
        if unknown:
            raise ConfigurationError(
                "Expected a checkpoint of a module with the same trainable parameters but names differ: "
                f"{sorted(unknown)[:3]}. Resume with the module it was made with, or without `ckpt_path`"
            )
        for name, one in mine.items():
            self._channels.setdefault(name, self._channel(name)).restore(one, same)
        self._resumed = None
