"""Settings of the pretraining phase."""

from __future__ import annotations

from dataclasses import dataclass

from fedlight.core.errors import require, require_least


@dataclass
class ProxyFederation:
    """How to record updates on proxy data.

    Args:
        rounds: number of recorded rounds.
        clients: number of simulated clients per round.
        samples: samples per simulated client (the mean size of a real client if not given).
        alpha: Dirichlet concentration of the simulated clients' label mix.
        server_lr: learning rate of the recorded trajectory along the mean update.
        in_memory_mb: MiB of recorded updates (4 bytes per number) to hold in memory; more of them go to a temporary file. A
            two-sided codec is fitted to a file one round at a time; other codecs read all of it into memory.
        trajectories: how many times recording starts from the current model; they share the rounds. If the model soon fits the proxy
            data, several short trajectories show more of what clients will send than a long one.
    """

    rounds: int = 40
    clients: int = 10
    samples: int | None = None
    alpha: float = 0.5
    server_lr: float = 1.0
    in_memory_mb: float = 1024.0
    trajectories: int = 1

    def __post_init__(self) -> None:
        require_least(self, rounds=6, clients=1, samples=1, in_memory_mb=0, trajectories=1)
        told = f"Expected `trajectories` of at most `rounds`, {self.rounds}, but got {self.trajectories}"
        require(self.trajectories <= self.rounds, told)
        require(self.alpha > 0, f"Expected `alpha` > 0 but got {self.alpha}")


@dataclass
class CodecTraining:
    """How to train a learned codec on the recorded updates.

    Args:
        steps: largest number of optimizer steps; 0 trains nothing.
        lr: peak learning rate of Adam, after a tenth of the steps, followed by cosine decay.
        rounds_per_step: recorded rounds in a batch, one cohort of each.
        check_every: steps between checks on held-out updates.
        patience: checks without improvement before training stops early.
        holdout: share of the recorded rounds for early stopping, and an equal share for the report only.
        all_clients: whether every step takes the whole recorded cohort with equal weights, rather than a random part with
            random weights.
        relative: whether every cohort's error counts relative to its own size, so that late, small updates matter as much as
            early ones; else relative to the bank's mean size, the error that PCA minimizes.
    """

    steps: int = 1000
    lr: float = 1e-3
    rounds_per_step: int = 4
    check_every: int = 100
    patience: int = 5
    holdout: float = 0.1
    all_clients: bool = False
    relative: bool = True

    def __post_init__(self) -> None:
        require_least(self, steps=0, rounds_per_step=1, check_every=1, patience=1)
        require(self.lr > 0, f"Expected `lr` > 0 but got {self.lr}")
        require(0 < self.holdout <= 0.25, f"Expected `holdout` in (0, 0.25] but got {self.holdout}")
