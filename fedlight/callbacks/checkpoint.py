"""The checkpoint that a run goes on from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fedlight.core.errors import require


class RoundCheckpoint(Checkpoint):
    """Writes `last.ckpt` before round 0, every few rounds, at the end, and on SIGTERM or Ctrl-C; never a half-written one.

    Args:
        every_n_rounds: Rounds between checkpoints.
        dirpath: Folder; `checkpoints` in the run's folder if not given.

    Attributes:
        written: where the last one is, if there is one.
    """

    def __init__(self, every_n_rounds: int = 10, dirpath: str | None = None) -> None:
        super().__init__()
        require(every_n_rounds >= 1, f"Expected `every_n_rounds` >= 1 but got {every_n_rounds}")
        self.every_n_rounds = every_n_rounds
        self.dirpath = dirpath
        self.written: Path | None = None
        self._saved = -1
        self._between_rounds = False  # where a stop by a signal finds every process

    def path(self, trainer: Trainer) -> Path:
        """Return where the checkpoint of this run is written."""
        return Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints") / "last.ckpt"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew."""
        self._saved, self._between_rounds, self.written = -1, False, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save round 0, so that a run that is killed early does not pretrain again."""
        self._between_rounds = True
        if trainer.global_step == 0:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save again after the validation of a round that was saved, so that a resumed run does not leave it out or repeat it."""
        if trainer.state.fn == "fit" and self._saved == trainer.global_step > 0:
            self._saved = -1
            self._save(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save after every n-th round."""
        if trainer.global_step % self.every_n_rounds == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last round."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if the run was stopped between rounds, by SIGTERM or Ctrl-C, and say how to go on; others may have struck within one."""
        if isinstance(exception, SIGTERMException) and self._between_rounds:
            self._save(trainer)
        if (
            isinstance(exception, (SIGTERMException, KeyboardInterrupt))
            and trainer.is_global_zero
            and (path := self.written) is not None  # the run's folder would be asked of all processes together
        ):
            config = path.parents[1] / "config.yaml"
            again = f"fedlight fit --config {config} --ckpt_path {path}" if config.is_file() else f'trainer.fit(..., ckpt_path="{path}")'
            print(f"\nStopped after {trainer.global_step} rounds; go on with\n  {again}", file=sys.stderr)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run or trainer.sanity_checking or self._saved == trainer.global_step:  # type: ignore[attr-defined]
            return
        path = Path(str(trainer.strategy.broadcast(str(self.path(trainer)))))
        trainer.save_checkpoint(path)
        self._saved, self.written = trainer.global_step, path
