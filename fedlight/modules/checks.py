"""What a FederatedModule makes of the parts that it is given; parts that do not go together are refused before training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fedlight.aggregation import AggregationSetting
from fedlight.callbacks.base import FederatedRun
from fedlight.clients.algorithms import Algorithm
from fedlight.clients.local_model import LocalModel
from fedlight.codecs.chain import ChainCodec
from fedlight.codecs.grid import GridCodec
from fedlight.codecs.identity import IdentityCodec
from fedlight.codecs.stacked import StackedCodec
from fedlight.core.codec import Codec, Context
from fedlight.core.codec_needs import require_additive, require_fixed_width, require_room
from fedlight.core.errors import ConfigurationError, require
from fedlight.core.export import load_codec
from fedlight.core.kinds import refuse_other_lightning
from fedlight.core.layout import float_buffers
from fedlight.core.progress import progress
from fedlight.core.random import untouched_generators
from fedlight.data import ClientSampler, Everyone, Poisson, Uniform
from fedlight.modules.state import local_settings
from fedlight.privacy import AccountingSetting, DistributedDP, PrivacyMechanism
from fedlight.privacy.ledger import JOURNAL

log = logging.getLogger(__name__)


def chosen_codec(codec: Codec | None, path: str | None, privacy: PrivacyMechanism | None) -> Codec:
    """Return the codec at ``path``, else the given one on privacy's grid, else that of plain updates; raises ``ConfigurationError``."""
    codec = private_codec(codec, privacy) if codec or not path else codec
    if not path:
        return codec or IdentityCodec()
    trained = load_codec(Path(path))
    if codec and codec.config() != trained.config():
        raise ConfigurationError(
            f"Expected the codec at {path!r} to be the configured {codec.config()} but it is {trained.config()}: leave one out"
        )
    return trained


def check_parts(network: nn.Module, loss: nn.Module | None, server_scheduler: object) -> None:
    """Raise ``ConfigurationError`` for parts that a federated run would not honour: compiled modules, losses and schedules of that kind."""
    refuse_other_lightning("network", network)
    inside = getattr(network, "_orig_mod", None)
    if isinstance(inside, LightningModule):
        raise ConfigurationError(
            f"Expected `network` to be a LightningModule but got torch.compile({type(inside).__name__}), which hides its hooks: compile "
            "the networks within it, such as self.net = torch.compile(self.net)"
        )
    if loss is not None and any(parameter.requires_grad for parameter in loss.parameters()):
        raise ConfigurationError(
            f"Expected a `loss` without parameters of its own but {type(loss).__name__} has some, which no client would train: make it "
            "a part of a LightningModule, whose `training_step` uses it"
        )
    kind = server_scheduler.func if isinstance(server_scheduler, partial) else server_scheduler
    if isinstance(kind, type) and issubclass(kind, ReduceLROnPlateau):
        raise ConfigurationError(
            f"Expected a `server_scheduler` of rounds but got {kind.__name__}, which waits for a metric: choose another, such as "
            "CosineAnnealingLR"
        )


def check_trained(network: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise ``ConfigurationError`` if what is trained has changed since the server's optimizer was made, which codecs go by as well."""
    stepped = {id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in network.named_parameters():
        if optimizers and parameter.numel() and parameter.requires_grad != (id(parameter) in stepped):
            what = "begun" if parameter.requires_grad else "ceased"
            raise ConfigurationError(
                f"Expected the same parameters to be trained from the start but {name} has {what} to be, as by `on_fit_start` or "
                f"`on_train_start` of {type(network).__name__}: do it in `__init__`, `setup` or `configure_model`"
            )


def check_batches(module: FederatedRun, model: LocalModel) -> None:
    """Raise ``ConfigurationError`` if some client trains on a batch of one sample that the network's BatchNorm layers cannot take.

    Tries one such batch, where a network has such layers: one sample of an image has many numbers a channel.
    """
    norms = [part for part in model.module.modules() if isinstance(part, _BatchNorm) and part.training]
    size, sizes = getattr(module.algorithm, "batch_size", None), module.data.client_sizes
    if not norms or size is None:
        return
    order = getattr(module.data.x, "order", None)
    drops, steps = order is not None and order.drop_last, getattr(module.algorithm, "steps", None)
    rest = sizes % size
    last = np.where((rest > 0) & ~((sizes > size) & (drops or steps is not None)), rest, np.minimum(sizes, size))
    single = np.flatnonzero(last == 1)
    if not len(single):
        return
    x, y = module.data.client_data(int(single[0]))
    try:
        with torch.no_grad(), untouched_generators():
            model.objective(model.module, next(iter(x.split(1))), y[:1])  # type: ignore[no-untyped-call]
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        kind = type(norms[0]).__name__
        raise ConfigurationError(
            f"Expected local batches of at least two samples for the {kind} layers of {type(model.module).__name__} but "
            f"{len(single)} of {len(sizes)} clients, such as client {single[0]} of size {sizes[single[0]]}, train on one of a "
            "single sample: choose another `batch_size` of `algorithm`, `drop_last=True` in your loader, `min_samples` 2 of the "
            "`partitioner`, or GroupNorm"
        ) from error


def check_algorithm(algorithm: Algorithm, batch_norm: str, privacy: PrivacyMechanism | None) -> None:
    """Raise ``ConfigurationError`` if local training does not go with local BatchNorm layers, or with privacy."""
    if batch_norm == "local" and algorithm.shared:
        raise ConfigurationError(
            f"Expected `batch_norm` mean with {type(algorithm).__name__}, whose correction pulls all weights to common ones, "
            "but got local: choose FedAvg or another `algorithm`"
        )
    if uploads_more(algorithm) and privacy is not None:
        raise ConfigurationError(
            f"Expected no `privacy` with {type(algorithm).__name__}, whose clients upload more than the update, which alone is "
            f"clipped and noised, but got {type(privacy).__name__}: choose FedAvg or another `algorithm` of one vector"
        )


def upload_codec(codec: Codec, algorithm: Algorithm) -> Codec:
    """Return the codec of all that clients upload: of the update, and of what else the algorithm needs the mean of."""
    if not uploads_more(algorithm) or isinstance(codec, StackedCodec):
        return codec
    return StackedCodec(codec, algorithm.vectors, algorithm.scalars)


def uploads_more(algorithm: Algorithm) -> bool:
    """Whether clients upload more than the update."""
    return algorithm.vectors > 1 or algorithm.scalars > 0


def check_cohorts(module: FederatedRun) -> None:
    """Raise ``ConfigurationError`` if no cohort that the sampler can draw has as many clients as a sum needs."""
    sampler, population = module.data.sampler, module.data.num_population
    largest = sampler.cohort_size if isinstance(sampler, Uniform) else population
    drawn = f"`data.sampler` ({type(sampler).__name__}) draws at most {largest} of {population}: sample more, or lower it"
    least = module.min_clients if module.privacy is None else module.privacy.least_clients(module.min_clients)
    require(least <= largest, f"Expected `min_clients` that cohorts can reach but got {least} and {drawn}")
    threshold = getattr(module.aggregator, "threshold", 0)
    name = type(module.aggregator).__name__
    require(threshold <= largest, f"Expected a `threshold` of {name} that cohorts can reach but got {threshold} and {drawn}")


def aggregation_setting(module: FederatedRun, processes: int) -> AggregationSetting:
    """Return what an aggregator may refuse of a run."""
    least = module.min_clients if module.privacy is None else module.privacy.least_clients(module.min_clients)
    return AggregationSetting(
        module.codec,
        cohort=len(module.data.cohort(0, 0)),
        largest_weight=int(module.data.client_sizes.max()) if module.weighting == "samples" else 1,
        buffers=module.batch_norm == "mean" and bool(float_buffers(module.network)),
        processes=processes,
        training=local_settings(module),
        min_clients=least,
        algorithm=type(module.algorithm).__name__,
        vectors=module.algorithm.vectors,
        scalars=module.algorithm.scalars,
    )


def private_codec(codec: Codec | None, privacy: PrivacyMechanism | None) -> Codec | None:
    """Return the codec, on the mechanism's own integer grid if any; raises ``ConfigurationError`` if its codes are integers off that."""
    if privacy is None or not privacy.grid:
        return codec
    codec = codec or IdentityCodec()
    grid = GridCodec(privacy.clip / privacy.grid, privacy.bits)
    last = codec.codecs[-1] if isinstance(codec, ChainCodec) else codec
    if last.config() == grid.config():
        return codec
    if codec.integer:
        raise ConfigurationError(
            f"Expected a codec of float codes for {type(privacy).__name__}, which rounds them to a grid of its own, but the codes of "
            f"{type(codec).__name__} are integers: leave the quantisation out, such as TwoSidedCodec instead of TransformCodec"
        )
    return ChainCodec([codec, grid])


def sampling_rate(sampler: ClientSampler) -> float | None:
    """Return the probability with which a client joins a cohort on its own, None if others decide with it."""
    if isinstance(sampler, Poisson):
        return sampler.rate
    return 1.0 if isinstance(sampler, Everyone) else None


def start_privacy(module: FederatedRun) -> None:
    """Check that the run's privacy can be accounted for, and begin it; raises ``ConfigurationError`` naming what has to change."""
    privacy, codec = module.privacy, module.codec
    if privacy is None:
        return
    if private_codec(codec, privacy) is not codec:  # one that was loaded is taken as it is
        raise ConfigurationError(
            f"Expected the {type(codec).__name__} at `codec_path` to end in the grid of {type(privacy).__name__} (`clip` {privacy.clip}, "
            f"`grid` {privacy.grid}, `bits` {privacy.bits}) but its codes are floats: export one from a run with this privacy, or leave "
            "`codec_path` out"
        )
    _check_codec(codec, type(privacy).__name__)
    _check_beside_the_code(module, privacy)
    _check_aggregator(module, privacy)
    rounds, rate = module.trainer.max_steps, sampling_rate(module.data.sampler)
    # The fixed number that sums are divided by: the expected size of a cohort, or the size where that is fixed.
    cohort = rate * module.data.num_population if rate is not None else len(module.data.cohort(0))
    setting = AccountingSetting(
        rate,
        max(1, round(cohort)),
        rounds if rounds > 0 else None,
        codec.decoder.sum_length(),
        codec.integer,
        codec.encoder.format.bits,
    )
    with progress("Calibrating the noise", show=module.trainer.progress_bar_callback is not None):
        privacy.calibrate(setting, module.data.num_population)


def _check_codec(codec: Codec, name: str) -> None:
    """Refuse codecs whose codes no one norm bounds, or that take several releases a round."""
    require_additive(codec, name)
    require_fixed_width(codec, name)  # a message's length would tell of the code without noise
    require_room(codec, name)  # noise needs some of its own
    if codec.passes > 1:
        raise ConfigurationError(
            f"Expected a one-pass codec under {name} but {type(codec).__name__} takes {codec.passes} passes, each a release of its own: "
            "choose another codec"
        )
    if codec.encoder.common_step(Context(broadcast=codec.decoder.broadcast({}))) is None:
        raise ConfigurationError(
            f"Expected codes of one common step under {name} but the coefficients of {type(codec).__name__} have steps of their own, so "
            "that no one norm bounds them: use TransformCodec, or leave QuantizeCodec out"
        )


def _check_beside_the_code(module: FederatedRun, privacy: PrivacyMechanism) -> None:
    """Refuse what would tell of clients beside their codes, without noise."""
    data, name = module.data, type(privacy).__name__
    if module.weighting != "equal":
        raise ConfigurationError(f"Expected `weighting` equal under {name}, which bounds every client alike, but got {module.weighting}")
    if module.batch_norm == "mean" and float_buffers(module.network):
        raise ConfigurationError(
            f"Expected a `network` without BatchNorm statistics under {name}, which would be sent beside the code without noise: "
            "set `batch_norm` to local, or use GroupNorm"
        )
    if data.normalize:
        raise ConfigurationError(
            f"Expected `data.normalize` false under {name}: it standardises by statistics of the training set, clients' data included, "
            "which would be published without noise"
        )
    if data.client_holdout:
        raise ConfigurationError(
            f"Expected `data.client_holdout` 0 under {name} but got {data.client_holdout}: accuracies on clients' data would be published "
            "without noise"
        )
    if privacy.needs_rate and not module.availability.independent:
        raise ConfigurationError(
            f"Expected an `availability` in which no client takes another's place under {name}, whose sampling it could not account for, "
            f"but got {type(module.availability).__name__}: use DropOut or Deadline, without FirstToAnswer"
        )
    if module.min_clients > 1 and privacy.least_clients(module.min_clients) == 0:
        raise ConfigurationError(
            f"Expected `min_clients` 1 under {name} but got {module.min_clients}: skipping small cohorts would tell who is in them"
        )


def _check_aggregator(module: FederatedRun, privacy: PrivacyMechanism) -> None:
    """Refuse an aggregator whose result has another sensitivity, or that learns more than the mechanism protects."""
    aggregator, name = module.aggregator, type(privacy).__name__
    if not aggregator.sums:
        raise ConfigurationError(
            f"Expected an aggregator that sums codes under {name} but {type(aggregator).__name__} does not, so that clipping bounds "
            "nothing: leave it out"
        )
    if privacy.needs_rate and aggregator.hides_messages:
        raise ConfigurationError(
            f"Expected an aggregator that takes cohorts of any size under {name} but {type(aggregator).__name__} redraws those that are "
            "too small or too large, so that sampling could not be accounted for: set `privacy` to DistributedDP, or leave `aggregator` out"
        )
    if privacy.sends_bits and aggregator.hides_messages:
        raise ConfigurationError(
            f"Expected a fixed `clip` with {type(aggregator).__name__} but got `adaptive`, for which clients send a bit beside the masked "
            "code: leave `adaptive` out"
        )
    if not isinstance(privacy, DistributedDP):
        return
    if not aggregator.hides_messages:
        log.warning(
            "DistributedDP without secure aggregation protects nobody from the server: set `model.aggregator` to SecureAggregator, or take "
            "the run for a simulation of one"
        )
    elif getattr(aggregator, "threshold", 0) < privacy.threshold:
        raise ConfigurationError(
            f"Expected `threshold` of {type(aggregator).__name__} to be at least that of {name} ({privacy.threshold}), or sums with too "
            "little noise would be opened: raise the one or lower the other"
        )


def begin_ledger(module: FederatedRun) -> None:
    """Keep a journal of releases in the run's folder; every process begins with the first one's ledger and cohorts."""
    privacy, trainer = module.privacy, module.trainer
    if privacy is None:
        return
    folder = trainer.log_dir if module.loggers else None  # asked of all processes together
    if trainer.is_global_zero and folder and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        resumed = trainer.ckpt_path
        if resumed and (moved := Path(resumed).absolute().parents[1] / JOURNAL).is_file():
            privacy.ledger.find_journal(moved)
        privacy.ledger.keep_journal(Path(folder).absolute() / JOURNAL)
    if trainer.world_size > 1:
        privacy.ledger.lines, privacy.cohort_seed = trainer.strategy.broadcast((privacy.ledger.lines, privacy.cohort_seed))
        privacy.ledger.journal = privacy.ledger.journal if trainer.is_global_zero else None
