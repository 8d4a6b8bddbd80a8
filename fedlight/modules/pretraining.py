"""The pretraining phase: an ordinary Lightning fit of a codec's two halves on recorded updates."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from torch import Tensor, nn

from fedlight.callbacks.base import FederatedRun
from fedlight.callbacks.board import RunBoard
from fedlight.clients.proxy import record_bank
from fedlight.codecs.stacked import StackedCodec
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, Private, State, TrainCodec
from fedlight.core.errors import ConfigurationError
from fedlight.core.pretraining import CodecTraining, ProxyFederation
from fedlight.core.process import quiet
from fedlight.core.progress import is_terminal
from fedlight.core.progress import progress as shown_progress
from fedlight.core.random import derive_seed, torch_generator
from fedlight.metrics import ReconstructionError
from fedlight.modules.notices import tell_ratio


class Cohorts:
    """An endless loader of cohorts: updates ``[rounds, clients, dim]`` with weights ``[rounds, clients, 1]`` that add up to 1."""

    def __init__(self, bank: UpdateBank, training: CodecTraining, seed: int) -> None:
        self.bank = bank
        self.training = training
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        step, rounds, clients = 0, self.bank.rounds, self.bank.clients
        while True:
            generator = torch_generator(self.seed, "pretraining cohort", step)
            chosen = torch.randint(rounds, (self.training.rounds_per_step,), generator=generator)
            size = clients if self.training.all_clients else int(torch.randint(1, clients + 1, (1,), generator=generator))
            members = torch.rand(len(chosen), clients, generator=generator).argsort(1)[:, :size]
            weights = torch.rand(len(chosen), size, 1, generator=generator) + 0.1
            if self.training.all_clients:
                weights = torch.ones_like(weights)
            yield self.bank.take(chosen[:, None], members), weights / weights.sum(1, keepdim=True)
            step += 1


def cohort_loss(codec: Codec, updates: Tensor, weights: Tensor, norm: Tensor | None = None) -> Tensor:
    """Return ``||D(sum_i a_i E(u_i)) - sum_i a_i u_i||^2`` averaged over rounds, relative to ``norm`` or to each target's own square.

    ``updates`` ``[rounds, clients, dim]``, ``weights`` ``[rounds, clients, 1]`` adding up to 1 over clients.
    """
    private = Private(torch_generator("pretraining"))
    target = (updates * weights).sum(-2)
    mean_code = (codec.encoder.encode(updates, Context(), private) * weights).sum(-2)
    error = (codec.decoder.decode(mean_code, Context(), {}) - target).square().sum(-1)
    return (error / (target.square().sum(-1).clamp(min=1e-30) if norm is None else norm)).mean()


class CodecPretrainingModule(LightningModule):
    """Trains encoder and decoder jointly so that the decoded mean code is the mean update, and keeps the best weights seen.

    Args:
        codec: a codec bound to the bank's layout.
        bank: recorded updates to train on.
        held_out: recorded updates that decide when to stop.
        training: how to train.
        seed: seed of the cohorts.
    """

    def __init__(self, codec: Codec, bank: UpdateBank, held_out: UpdateBank, training: CodecTraining, seed: int = 0) -> None:
        super().__init__()
        self.codec = codec
        self.halves = nn.ModuleList([codec.encoder, codec.decoder])
        self.bank = bank
        self.held_out = held_out
        self.training_settings = training
        self.seed = seed
        self.norm = None if training.relative else torch.stack([updates.mean(0).square().sum() for updates in bank]).mean()
        self.errors: list[float] = []
        self.best = float("inf")
        self.best_state: dict[str, Tensor] = {}

    def train_dataloader(self) -> Cohorts:
        """Return an endless loader of cohorts."""
        return Cohorts(self.bank, self.training_settings, self.seed)

    def val_dataloader(self) -> UpdateBank:
        """Return the held-out rounds, updates ``[clients, dim]`` each."""
        return self.held_out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the relative squared error of a batch of cohorts."""
        loss = cohort_loss(self.codec, *batch, norm=self.norm)
        self.log("pretrain/loss", loss, prog_bar=True, batch_size=1)
        return loss

    def validation_step(self, updates: Tensor, batch_idx: int) -> None:
        """Measure what training minimises on one held-out round ``[clients, dim]``: stopping on another error would undo it."""
        weights = updates.new_full((1, len(updates), 1), 1 / len(updates))
        self.errors.append(float(cohort_loss(self.codec, updates[None], weights, self.norm).detach()))

    def on_validation_epoch_end(self) -> None:
        """Remember the best weights so far."""
        error = (sum(self.errors) / len(self.errors)) ** 0.5
        self.errors.clear()
        self.log("pretrain/held_out_error", error, prog_bar=True)
        if error < self.best:
            self.best = error
            self.best_state = {name: value.detach().clone() for name, value in self.halves.state_dict().items()}

    def on_fit_end(self) -> None:
        """Put the best weights back."""
        if self.best_state:
            self.halves.load_state_dict(self.best_state)

    def configure_optimizers(self) -> Any:
        """Return Adam with a warm-up and a cosine decay, stepped every batch."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.training_settings.lr)
        steps = max(self.training_settings.steps, 2)
        steps += steps == 10  # a tenth of these is one step, which OneCycleLR would divide by
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.training_settings.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def layer_trainer(
    training: CodecTraining, held_out: UpdateBank, device: torch.device, log_dir: Path | None, progress: bool, seed: int
) -> TrainCodec:
    """Return what trains a codec with a Lightning Trainer of its own on one device, and stops early on the ``held_out`` updates.

    TensorBoard's events go under `pretrain/` in ``log_dir``, if there is one; the seed is that of the cohorts.
    """

    def train(codec: Codec, bank: UpdateBank) -> dict[str, float]:
        if not training.steps:
            return {"pretrain_steps": 0.0}
        bank, held = (bank, held_out) if bank.layout == held_out.layout else bank.split(training.holdout)  # later stages see codes
        show = progress and is_terminal(sys.stderr)
        bar = [RichProgressBar(theme=RichProgressBarTheme(metrics_format=".3f"))] if show else []
        with quiet("lightning.pytorch.utilities.rank_zero", level=logging.WARNING):  # the list of devices was printed before
            trainer = Trainer(
                accelerator=device.type,
                devices=1 if device.type == "cpu" else [device.index or 0],
                max_steps=training.steps,
                val_check_interval=min(training.check_every, training.steps),
                check_val_every_n_epoch=None,
                num_sanity_val_steps=-1,
                logger=RunBoard(str(log_dir), name="pretrain", version="") if log_dir else False,
                log_every_n_steps=10,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=show,
                callbacks=[EarlyStopping("pretrain/held_out_error", patience=training.patience), *bar],
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(does not have many workers|num_workers|sync_dist).*")
            trainer.fit(CodecPretrainingModule(codec, bank, held, training, seed))
        codec.to("cpu")
        return {"pretrain_steps": float(trainer.global_step)}

    return train


def fit_codec(
    codec: Codec, bank: UpdateBank, training: CodecTraining, device: torch.device, log_dir: Path | None, progress: bool, seed: int
) -> dict[str, float]:
    """Fit a codec to a bank; return its error on rounds that neither training nor stopping saw, and its references' errors there."""
    fit, rest = bank.split(max(2 * training.holdout, 1 / (bank.rounds // 2)))  # a round for each of the two, however few there are
    stop, report = rest.split(0.5)
    # A codec that trains layers has a bar of its own on a terminal; the others measure and solve in one go.
    with shown_progress(f"Fitting {type(codec).__name__}", None, progress and not is_terminal(sys.stderr)):
        figures = codec.fit(fit, layer_trainer(training, stop, device, log_dir, progress, seed))
        codec.to("cpu")
        figures["held_out_error"] = reconstruction_error(codec, report)
        if codec.version == 1:  # a refresh asks for the same again
            tell_ratio(codec)
        for name, reference in codec.references().items():
            reference.fit(fit, lambda *_: {})
            figures[f"held_out_error_{name}"] = reconstruction_error(reference, report)
    return figures


def reconstruction_error(codec: Codec, bank: UpdateBank, cohort: int | None = None, server_state: State | None = None) -> float:
    """Return the relative error of ``decode(mean_i encode(u_i))`` over the bank's rounds (over their first ``cohort`` clients).

    The rounds follow one another from ``server_state``, which is left as it is (from a new server's if not given). Of uploads of several
    vectors the first is measured, the update: what goes with it may be many times as long.
    """
    dim = codec.codec.encoder.dim if isinstance(codec, StackedCodec) else bank.layout.dim
    metric = ReconstructionError(sync_on_compute=False)
    state = copy.deepcopy(server_state) or {}
    with torch.no_grad():
        for updates in bank:
            metric.update(codec.reconstruct(updates[:cohort], state)[..., :dim], updates[:cohort].mean(0)[..., :dim])
    return float(metric.compute())


def errors_by_cohort(codec: Codec, bank: UpdateBank, sizes: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)) -> dict[int, float]:
    """Return the relative error for cohorts of several sizes, as far as the bank has so many clients a round."""
    return {size: reconstruction_error(codec, bank, size) for size in sizes if size <= bank.clients}


def record_for(
    module: FederatedRun,
    proxy: ProxyFederation,
    progress: bool,
    seed: int | None = None,
    first_round: int = 0,
    history: Tensor | None = None,
) -> UpdateBank:
    """Record updates of simulated clients on the module's proxy data, from the module's current weights and its own algorithm.

    ``history`` ``[k, dim]``, past aggregates, become rounds of the bank (``fedlight.clients.proxy.record_bank``).
    """
    data, device = module.data, module.device
    if data.proxy is None:
        raise ConfigurationError(
            f"Expected proxy data to train {type(module.codec).__name__} on but there is none: raise `data.proxy_samples`, set "
            "`data.proxy_source`, or give a trained codec with `model.codec_path`"
        )
    data.to(device)
    model = module.local_model(data.proxy_augmentation)
    module.algorithm.check(model)
    samples = proxy.samples or max(1, round(len(data.y) / data.num_population))
    with shown_progress("Recording updates on proxy data, round", proxy.rounds, progress) as advance:
        return record_bank(
            model,
            model.weights.clone(),
            model.buffers.clone(),
            module.algorithm,
            data.proxy,
            data.num_classes,
            **(asdict(proxy) | {"samples": samples}),
            seed=derive_seed(module.seed if seed is None else seed, "proxy"),
            first_round=first_round,
            on_round=lambda _: advance(),
            history=history,
        )
