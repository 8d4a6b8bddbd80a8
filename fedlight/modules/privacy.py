"""What a privacy mechanism needs of a run, and what a run needs of it: checks, the noisy release of a round's sum, figures."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedlight.codecs.chain import ChainCodec
from fedlight.codecs.grid import GridCodec
from fedlight.codecs.identity import IdentityCodec
from fedlight.core.codec import Codec, Context, ServerContext, require_additive
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import float_buffers
from fedlight.core.rounds import Round
from fedlight.core.running_sum import RunningSum
from fedlight.data import ClientSampler, Everyone, FederatedDataModule, Poisson
from fedlight.modules.exchange import reduce_sum, several_processes
from fedlight.privacy import AccountingSetting, DistributedDP, PrivacyMechanism

if TYPE_CHECKING:
    from fedlight.modules.federated import FederatedModule

log = logging.getLogger(__name__)


def private_codec(codec: Codec | None, privacy: PrivacyMechanism | None) -> Codec | None:
    """Return the codec, rounded to the mechanism's own integer grid where it has one.

    Raises:
        ConfigurationError: if the codec's codes are integers already, and not on that grid.
    """
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


def expected_cohort(data: FederatedDataModule) -> int:
    """Return the fixed number that sums are divided by: the expected size of a cohort, or the size where that is fixed."""
    rate = sampling_rate(data.sampler)
    size = rate * data.num_population if rate is not None else len(data.cohort(0))
    return max(1, round(size))


def start_privacy(module: FederatedModule) -> None:
    """Check that the run is one whose privacy can be accounted for, and begin the mechanism.

    Raises:
        ConfigurationError: naming what has to change.
    """
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
    rounds = module.trainer.max_steps
    setting = AccountingSetting(
        sampling_rate(module.data.sampler),
        expected_cohort(module.data),
        rounds if rounds > 0 else None,
        codec.decoder.sum_length(),
        codec.integer,
        codec.encoder.format.bits,
    )
    privacy.calibrate(setting, module.data.num_population)


def _check_codec(codec: Codec, name: str) -> None:
    """Refuse codecs whose codes no one norm bounds, or that take several releases a round."""
    require_additive(codec, name)
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


def _check_beside_the_code(module: FederatedModule, privacy: PrivacyMechanism) -> None:
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


def _check_aggregator(module: FederatedModule, privacy: PrivacyMechanism) -> None:
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


def least_clients(module: FederatedModule) -> int:
    """Return how many codes a sum must have to be used."""
    return module.min_clients if module.privacy is None else module.privacy.least_clients(module.min_clients)


def counted_clients(module: FederatedModule, round: Round) -> int:
    """Return how many clients' codes the mean stands for; under privacy the fixed denominator, because the exact number is not noisy."""
    return round.codes.count if module.privacy is None else module.privacy.setting.cohort


def release(module: FederatedModule, round: Round) -> None:
    """Put the noise on the cohort's sum, enter it in the ledger, and fix the denominator; in place, the same on every process."""
    privacy, codec = module.privacy, module.codec
    assert privacy is not None
    context, codes = round.context, round.codes
    unit = codec.encoder.common_step(context)
    assert unit is not None
    kind = torch.int64 if codec.integer else torch.float64
    total = codes.total if codes.total is not None else torch.zeros(codec.decoder.sum_length(), dtype=kind, device=module.device)
    noise = privacy.sum_noise(len(total), unit, context)
    if noise is not None:
        total = total + shared(module, noise).to(total)
    bits = round.inside - codes.count / 2 + float(shared(module, torch.tensor([privacy.bit_noise(context)], dtype=torch.float64)))
    cohort = privacy.setting.cohort
    round.context = ServerContext.of(context, 0, (privacy.sum_deviation(unit, codes.count) / cohort) ** 2)
    round.codes = RunningSum()
    round.codes.total, round.codes.count = total, codes.count
    round.codes.weight = round.codes.squares = cohort
    privacy.record_release(bits)


def shared(module: FederatedModule, noise: Tensor) -> Tensor:
    """Return the noise that the first process drew: the others' own would be another."""
    if not several_processes():
        return noise
    mine = noise if module.trainer.is_global_zero else torch.zeros_like(noise)
    return reduce_sum(mine.to(module.device)).cpu()


SEEN_BY_SERVER_ALONE = ("round/clients", "round/absent", "round/dropped", "bytes/uplink_round", "bytes/handshake")
"""Exact counts of who took part, which nothing that is published under differential privacy may hold."""


def privacy_figures(module: FederatedModule, figures: dict[str, float]) -> dict[str, float]:
    """Return a round's figures with those of privacy; what noise does not cover is marked `sim/`."""
    privacy = module.privacy
    if privacy is None:
        return figures
    kept = {f"sim/{name.split('/')[1]}" if name in SEEN_BY_SERVER_ALONE else name: value for name, value in figures.items()}
    return kept | {
        "privacy/epsilon": privacy.epsilon(),
        "privacy/epsilon_unamplified": privacy.epsilon(amplified=False),
        "privacy/delta": privacy.delta,
        "privacy/noise_multiplier": privacy.multiplier,
        "privacy/clip": privacy.norm,
    }
