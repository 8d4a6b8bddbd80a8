"""Settings of `fedlight audit`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fedlight.audit.attacks import Attack
from fedlight.audit.views import Observation
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec
from fedlight.core.errors import ConfigurationError, require, require_least, require_positive
from fedlight.data import FederatedDataModule

MOST_TRIALS_FAST = 2


@dataclass
class Membership:
    """How membership inference is measured.

    Args:
        trials: number of cohorts, each with its members and equally many other images; 0 leaves membership inference out.
        shadows: number of cohorts of public images that give the likelihood ratio its scores without a member.
    """

    trials: int = 20
    shadows: int = 20

    def __post_init__(self) -> None:
        require_least(self, trials=0, shadows=2)


@dataclass
class Canaries:
    """How canaries bound epsilon from below.

    Args:
        count: number of canaries; a coin toss puts each into the sums or not; 0 leaves them out.
        rounds: number of rounds with canaries.
        noise: noise multipliers; 0 means no differential privacy.
        delta: delta of the epsilons.
        honest: number of honest clients in every sum.
    """

    count: int = 200
    rounds: int = 1
    noise: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0, 2.0])
    delta: float = 1e-5
    honest: int = 10

    def __post_init__(self) -> None:
        require_least(self, count=0, rounds=1, honest=0)
        require(min(self.noise, default=0) >= 0, f"Expected `noise` >= 0 but got {self.noise}")
        require(0 < self.delta < 1, f"Expected `delta` in (0, 1) but got {self.delta}")


@dataclass
class Audit:
    """Attacks, and what they run on.

    Args:
        base: Configuration of `fedlight fit` with model, data and codec, in this file's folder or else in the current folder.
        overrides: Changes to it.
        attacks: The attacks, each a class path; every attack runs on every observation, and on the plain update of the same images.
        observations: What the adversary sees.
        codecs: Codecs by the name that observations use (the base's own, as `base`, if not given); each is fitted on proxy data to updates
            of the audited kind.
        ckpt_path: Checkpoint of a run of `base`: the audit covers its model as well as the initial one.
        trials: Number of cohorts for each attack.
        seeds: Seeds of the cohorts, the attacks and the noise.
        lr: Clients' learning rate (that of the base's algorithm if not given).
        proxy_rounds: Rounds of simulated clients to fit codecs to.
        membership: Membership inference on every observation.
        canaries: Canaries in every codec's sums.
        fast: Whether to run two trials, shortened attacks, and no attack that is slow by nature.
        memory_mb: Most memory in MiB for an attack; one that needs more is skipped (half of the machine's memory if not given).
        images: Number of images per row in the pictures.
        output: Folder for results (`logs/audit/` and this file's name if not given).

    Raises:
        ConfigurationError: if an argument is empty or out of range, or an observation names no codec.
    """

    base: str
    attacks: list[Attack]
    observations: list[Observation]
    overrides: dict[str, Any] = field(default_factory=dict)
    codecs: dict[str, Codec] | None = None
    ckpt_path: str | None = None
    trials: int = 5
    seeds: list[int] = field(default_factory=lambda: [0])
    lr: float | None = None
    proxy_rounds: int = 40
    membership: Membership = field(default_factory=Membership)
    canaries: Canaries = field(default_factory=Canaries)
    fast: bool = False
    memory_mb: float | None = None
    images: int = 6
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("attacks", "observations", "seeds"):
            require(getattr(self, name), f"Expected `{name}` to name at least one but got an empty list")
        require_least(self, trials=1, proxy_rounds=6, images=1)
        require_positive(lr=self.lr, memory_mb=self.memory_mb)
        known = ["base"] if self.codecs is None else list(self.codecs)
        for observation in self.observations:
            if observation.codec is not None and observation.codec not in known:
                raise ConfigurationError(
                    f"Expected `codec` of an observation to be one of {', '.join(known)} but got {observation.codec!r}: add it to `codecs`"
                )

    @property
    def cohorts(self) -> int:
        """Number of trials for every seed."""
        return min(self.trials, MOST_TRIALS_FAST) if self.fast else self.trials

    @property
    def tried(self) -> list[Attack]:
        """The attacks to run, with their budgets."""
        return [attack.shortened() for attack in self.attacks if attack.quick] if self.fast else list(self.attacks)

    @property
    def left_out(self) -> list[Attack]:
        """The attacks that a fast audit skips."""
        return [attack for attack in self.attacks if self.fast and not attack.quick]

    @property
    def memory_bytes(self) -> float:
        """Most memory for an attack."""
        if self.memory_mb is not None:
            return self.memory_mb * 2**20
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass
class Parts:
    """What the base configuration builds: the model, its data, and a function that fits its codec to recorded updates."""

    network: nn.Module
    loss: nn.Module
    codec: Codec
    lr: float
    data: FederatedDataModule
    seed: int
    fit: Callable[[Codec, UpdateBank], object]
