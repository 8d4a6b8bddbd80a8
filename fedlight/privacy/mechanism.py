"""The privacy mechanism of a run: who clips, who adds how much noise, and what it has cost.

All mechanisms clip clients' *codes*, which bounds a client's share in the sum for any encoder, and divide the sum by a fixed number of
clients; decoding, the server's step and all later rounds are post-processing (Dwork & Roth 2014, Proposition 2.1). The guarantee is at
the level of users: it covers all data of a client.

Laws (``tests/privacy/test_contract.py``):

1. Without noise, the output of ``protect`` has norm at most ``clip``, in the units of the noise; a client whose
   training failed sends a code of zeros.
2. The noise of a round has the standard deviation in the ledger.
3. Without ``simulation_seed`` all noise comes from the operating system's generator.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedlight.core.codec import Context, Encoder, Private
from fedlight.core.errors import ConfigurationError, require, require_choice, require_least, require_positive
from fedlight.privacy.accounting import LEAST_MULTIPLIER, calibrate, epsilon
from fedlight.privacy.clipping import clip_integers, clip_norm
from fedlight.privacy.ledger import Ledger
from fedlight.privacy.noise import NoiseSource, SeededNoise, SystemNoise, import_extra


@dataclass(frozen=True)
class AccountingSetting:
    """What determines the cost of a run in addition to the mechanism, all of it public before the first round.

    ``rate``: probability that a client joins a round, independently (None for other samplers); ``cohort``: the fixed divisor of
    sums; ``rounds``: planned rounds (None if unknown); ``length``: numbers in a code; ``integer``: whether
    codes are integers; ``bits``: their width.
    """

    rate: float | None
    cohort: int
    rounds: int | None
    length: int
    integer: bool
    bits: int = 0


class PrivacyMechanism(ABC):
    """Clips codes, adds noise and maintains the ledger.

    Args:
        clip: bound on the L2 norm of a client's code, in the units of the float code (for an orthonormal codec, those of the update).
        noise_multiplier: standard deviation of a sum's noise in units of ``clip``; calibrated to ``target_epsilon`` if not given.
        target_epsilon: the run stops before epsilon exceeds this; with ``noise_multiplier`` and no target, it never stops for privacy.
        delta: probability that epsilon does not hold; below one over the number of clients.
        accountant: ``pld`` (tightest, for continuous noise), ``rdp``, or ``auto``: ``pld`` for float codes, ``rdp`` for integers.
        simulation_seed: seed of the noise, for repeatable simulations: whoever knows it can remove the noise. If not given, noise comes
            from the operating system's generator.

    Raises:
        ConfigurationError: if a number is out of range, or neither a multiplier nor a target is given.
    """

    relation: ClassVar[str]
    """The change of data that the guarantee hides."""
    needs_rate: ClassVar[bool] = False
    """Whether clients have to be sampled independently."""
    amplified: ClassVar[bool] = False
    """Whether the target is an epsilon against adversaries who do not see who takes part."""
    grid: int = 0
    """Number of steps of the mechanism's integer grid within ``clip``, 0 without a grid."""
    bits: int = 0
    """Width of the integers on that grid."""

    sends_bits: bool = False
    """Whether clients also send a bit that says whether their code was within the norm."""

    def __init__(
        self,
        clip: float,
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        delta: float = 1e-5,
        accountant: Literal["auto", "pld", "rdp"] = "auto",
        simulation_seed: int | None = None,
    ) -> None:
        require_choice("accountant", accountant, ("auto", "pld", "rdp"))
        require_positive(clip=clip)
        require(0 < delta < 1, f"Expected `delta` between 0 and 1 but got {delta}")
        if noise_multiplier is None and target_epsilon is None:
            raise ConfigurationError(
                "Expected `noise_multiplier` or `target_epsilon` but got neither: give one, or both to stop at a budget"
            )
        require(target_epsilon is None or target_epsilon > 0, f"Expected `target_epsilon` > 0 but got {target_epsilon}")
        self.clip = clip
        self.noise_multiplier = noise_multiplier
        require_least(self, noise_multiplier=LEAST_MULTIPLIER)
        self.target_epsilon = target_epsilon
        self.delta = delta
        self.accountant = accountant
        self.simulation_seed = simulation_seed
        self.ledger = Ledger()
        self.multiplier = 0.0  # as given, or calibrated
        self.norm = clip  # `clip`, unless it is adaptive
        self.cohort_seed: int | None = None  # what cohorts are drawn from where nobody may know them, instead of the public seed
        self.setting: AccountingSetting

    def settings(self) -> dict[str, Any]:
        """Return the configuration as plain data."""
        names = ("clip", "noise_multiplier", "target_epsilon", "delta", "accountant", "simulation_seed")
        return {"mechanism": type(self).__name__} | {name: getattr(self, name) for name in names}

    def calibrate(self, setting: AccountingSetting, population: int) -> None:
        """Set the properties of the run and calibrate the noise multiplier.

        Raises:
            ConfigurationError: if the mechanism cannot protect such a run, or its target does not allow one round.
        """
        import_extra("dp_accounting")
        if self.delta >= 1 / population:
            raise ConfigurationError(
                f"Expected `delta` below 1 / {population:,} clients but got {self.delta}: publishing one client at random would satisfy it"
            )
        if self.needs_rate and setting.rate is None:
            raise ConfigurationError(
                f"Expected a sampler in which clients join independently but got another, which {type(self).__name__} cannot "
                "account for: set `data.sampler` to Poisson or Everyone"
            )
        if self.accountant == "pld" and setting.integer:
            raise ConfigurationError("Expected `accountant` rdp (or auto) for integer codes but got pld, which is for continuous noise")
        if self.amplified and self.simulation_seed is None and self.cohort_seed is None:
            self.cohort_seed = secrets.randbits(128)
        self.setting = setting
        self.multiplier = self.noise_multiplier or self._calibrated()
        self.check_noise()
        if not self.affordable():
            raise ConfigurationError(
                f"Expected a `target_epsilon` that allows one round but one costs {self.next_epsilon():.4g} at a noise multiplier of "
                f"{self.multiplier:.4g} and the target is {self.target_epsilon}: raise `noise_multiplier`"
            )

    def check_noise(self) -> None:  # noqa: B027  (most need no more than a multiplier)
        """Raise ``ConfigurationError`` if the mechanism cannot add noise of this multiplier in this setting."""

    @property
    def accounts(self) -> str:
        """Name of the accountant in use; for sampled discrete noise, results exist at integer orders only."""
        if self.setting.integer:
            return "rdp" if self.rate == 1 else "rdp of integer orders"
        return "pld" if self.accountant == "auto" else self.accountant

    @property
    def rate(self) -> float:
        """Sampling rate of a release in the ledger: 1 without amplification."""
        return self.setting.rate if self.amplified and self.setting.rate is not None else 1.0

    def accounted(self, multiplier: float) -> float:
        """Return the multiplier in the ledger for noise of ``multiplier * clip``: relative to what one user can change."""
        return multiplier

    def _calibrated(self) -> float:
        assert self.target_epsilon is not None
        if self.setting.rounds is None:
            raise ConfigurationError(
                "Expected `trainer.max_steps` to calibrate the noise but the number of rounds is not set: set it, or `noise_multiplier`"
            )
        needed = calibrate(self.accounts, self.target_epsilon, self.delta, self.rate, self.setting.rounds)
        return needed * (needed / self.accounted(needed))

    def broadcast(self) -> dict[str, Any]:
        """Return the broadcast: what clients must know before a round beyond the configuration."""
        return {}

    def protect(self, code: Tensor, encoder: Encoder, context: Context, private: Private, client: int) -> tuple[Tensor, bool]:
        """Return a client's code ``[code_dim]``, clipped and with its share of the noise, and whether it was within the norm.

        Integer codes become int64, float codes the format's type.
        """
        format, unit = encoder.format_at(context.step), encoder.common_step(context)
        assert unit is not None, "refused before training"
        bound, limit = float(context.broadcast.get("clip", self.clip)) / unit, 0
        inside = bool(torch.isfinite(code).all()) and float(code.double().norm()) <= bound
        if code.is_floating_point():
            clipped = clip_norm(code.detach(), bound, getattr(format, "dtype", code.dtype))
        else:
            clipped, limit = clip_integers(code, bound, private.generator), (1 << (format.bits - 1)) - 1
        return self.add_share(clipped, bound, limit, self.source(context, client)).to(code.device), inside

    def add_share(self, code: Tensor, bound: float, limit: int, source: NoiseSource) -> Tensor:
        """Return the clipped code with the client's own noise, if it adds any; ``bound`` and ``limit`` in the code's units."""
        return code

    def sum_noise(self, length: int, unit: float, context: Context) -> Tensor | None:
        """Return the noise ``[length]`` (int64 or float64) that the server adds to a sum of codes, None if it adds none."""
        return None

    def bit_noise(self, context: Context) -> float:
        """Return the noise that the server adds to the sum of clipping bits."""
        return 0.0

    @abstractmethod
    def sum_deviation(self, unit: float, shares: int) -> float:
        """Return the standard deviation of the noise in a sum of ``shares`` codes, in units of the code."""

    def least_clients(self, asked: int) -> int:
        """Return the least number of clients for a round; ``asked`` is the run's own minimum."""
        return asked

    def record_release(self, bits: float) -> None:
        """Record one release in the ledger; ``bits``: the noisy sum of clipping bits minus one half each, if clients send them."""
        self.ledger.add(self.accounted(self.multiplier), self.rate)

    def epsilon(self, amplified: bool = True) -> float:
        """Return epsilon so far, with or without amplification by sampling."""
        # Without sampling the results for discrete noise are not limited to integer orders.
        name = self.accounts if amplified or not self.setting.integer else "rdp"
        return self.ledger.epsilon(name, self.delta, amplified)

    def next_epsilon(self) -> float:
        """Return epsilon after one more release."""
        return epsilon(self.accounts, self.ledger.after(self.accounted(self.multiplier), self.rate), self.delta)

    def affordable(self) -> bool:
        """Whether one more release stays within the target, if there is one."""
        return self.target_epsilon is None or self.next_epsilon() <= self.target_epsilon

    def report(self) -> dict[str, Any]:
        """Return everything that belongs to a statement of differential privacy, as plain data; empty before ``calibrate``."""
        if not hasattr(self, "setting"):
            return {}
        return {
            "epsilon": self.epsilon(amplified=False),
            "epsilon_if_cohorts_secret": self.epsilon(),
            "delta": self.delta,
            "noise_multiplier": self.multiplier,
            "clip": self.norm,
            "privacy": {
                "mechanism": type(self).__name__,
                "unit": "user",
                "neighbouring_relation": self.relation,
                "sampling_rate": self.rate,
                "rounds": len(self.ledger),
                "accountant": self.accounts,
                "expected_cohort": self.setting.cohort,
                "cohorts": "public" if self.cohort_seed is None else "secret, in the checkpoints' files of clients",
                "noise": "operating system" if self.simulation_seed is None else "seeded simulation, which protects nobody",
            },
        }

    def source(self, context: Context, client: int = -1) -> NoiseSource:
        """Return the noise source of a client (or, below 0, of the server)."""
        if self.simulation_seed is None:
            return SystemNoise()
        return SeededNoise(self.simulation_seed, "privacy", context.round, context.attempt, client)

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger and the calibrated or adapted values, for the checkpoint."""
        return {"ledger": self.ledger.state_dict(), "multiplier": self.multiplier, "norm": self.norm, "cohort_seed": self.cohort_seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from ``state_dict``; the multiplier stays that of the start of the run."""
        self.ledger.load_state_dict(state["ledger"])
        self.multiplier = float(state["multiplier"])
        self.norm = float(state["norm"])
        self.cohort_seed = state["cohort_seed"]
