"""What is audited: settings of `fedlight audit`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fedlight.audit.attacks import Attack
from fedlight.audit.views import Sight
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec
from fedlight.core.errors import ConfigurationError, require, require_least
from fedlight.data import FederatedDataModule

MOST_TRIALS_FAST = 2


@dataclass
class Membership:
    """How membership inference is measured.

    Args:
        trials: cohorts that are looked at, each with its members and as many other images; 0 leaves it out.
        shadows: cohorts of public images that the likelihood ratio takes its scores without a member from.
    """

    trials: int = 20
    shadows: int = 20

    def __post_init__(self) -> None:
        require_least(self, trials=0, shadows=2)


@dataclass
class Canaries:
    """How epsilon is bounded from below.

    Args:
        count: canaries, each in the sums or not by coin toss; 0 leaves them out.
        rounds: rounds that they take part in.
        noise: noise multipliers; 0 is no differential privacy.
        delta: delta of the epsilons.
        honest: honest clients in every sum.
    """

    count: int = 200
    rounds: int = 1
    noise: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0, 2.0])
    delta: float = 1e-5
    honest: int = 10

    def __post_init__(self) -> None:
        require_least(self, count=0, rounds=1, honest=0)
        valid = all(z >= 0 for z in self.noise) and 0 < self.delta < 1
        require(valid, f"Expected `noise` >= 0 and `delta` in (0, 1) but got {self.noise} and {self.delta}")


@dataclass
class Audit:
    """Attacks, and what they are tried on.

    Args:
        base: Configuration of `fedlight fit` that says model, data and codec; looked for beside this file, then in the current folder.
        overrides: Parts of it that are changed.
        attacks: The attacks, each a class path; every attack is tried on every sight, and on the plain update of the same images.
        sights: What the adversary looks at.
        codecs: Codecs by the name that sights use (the base's own, as `base`, if not given); each is fitted on proxy data to updates
            of the kind that is audited.
        ckpt_path: Checkpoint of a run of `base`: its model is audited beside the initial one.
        trials: Cohorts that each attack is tried on.
        seeds: Seeds of the cohorts and of everything that attacks and noise draw.
        lr: Clients' learning rate (that of the base's algorithm if not given).
        proxy_rounds: Rounds of simulated clients that codecs are fitted to.
        membership: Membership inference on every sight.
        canaries: Canaries in every codec's sums.
        fast: Whether to take two trials, shortened attacks, and no attack that is slow by nature.
        memory_mb: Memory in MiB beyond which an attack is skipped (half of the machine's if not given).
        images: Images of a line in the pictures.
        output: Folder for results (`logs/audit/` and this file's name if not given).

    Raises:
        ConfigurationError: if an argument is empty or out of range, or a sight names no codec.
    """

    base: str
    attacks: list[Attack]
    sights: list[Sight]
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
        for name in ("attacks", "sights", "seeds"):
            require(getattr(self, name), f"Expected `{name}` to name at least one but got an empty list")
        require_least(self, trials=1, proxy_rounds=6, images=1)
        if (self.lr is not None and self.lr <= 0) or (self.memory_mb is not None and self.memory_mb <= 0):
            raise ConfigurationError(f"Expected `lr` and `memory_mb` > 0 but got {self.lr} and {self.memory_mb}")
        known = ["base"] if self.codecs is None else list(self.codecs)
        for sight in self.sights:
            if sight.codec is not None and sight.codec not in known:
                raise ConfigurationError(
                    f"Expected `codec` of a sight to be one of {', '.join(known)} but got {sight.codec!r}: add it to `codecs`"
                )

    @property
    def cohorts(self) -> int:
        """Trials that are made for every seed."""
        return min(self.trials, MOST_TRIALS_FAST) if self.fast else self.trials

    @property
    def tried(self) -> list[Attack]:
        """The attacks that are run, with the budget that they have."""
        return [attack.shortened() for attack in self.attacks if attack.quick] if self.fast else list(self.attacks)

    @property
    def left_out(self) -> list[Attack]:
        """The attacks that a fast audit leaves out."""
        return [attack for attack in self.attacks if self.fast and not attack.quick]

    @property
    def memory_bytes(self) -> float:
        """Memory that an attack may take."""
        if self.memory_mb is not None:
            return self.memory_mb * 2**20
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass
class Parts:
    """What the base configuration makes: the model, its data, and how its codec is fitted to recorded updates."""

    network: nn.Module
    loss: nn.Module
    codec: Codec
    lr: float
    data: FederatedDataModule
    seed: int
    fit: Callable[[Codec, UpdateBank], object]
