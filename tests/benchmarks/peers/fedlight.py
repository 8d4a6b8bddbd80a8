"""fedlight, as `fedlight fit` runs it: identity codec, progress bar, TensorBoard and CSV each round, checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from terminal import pseudo_terminal
from throughput import STEPS, WORKLOADS, load_data, make_module, make_trainer, quiet

from fedlight.clients import Engine, Sequential, Threaded, Vectorized
from peers.job import Watch, options

ENGINES: dict[str, type[Engine]] = {"Sequential": Sequential, "Threaded": Threaded, "Vectorized": Vectorized}


class Clock(Callback):
    """Tells the watch of every round. First in the list, so that what other callbacks do after a round falls into its time."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the end of the round before this one."""
        if batch_idx:
            self.watch.round_ends(pl_module.network)  # type: ignore[arg-type]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the end of the last round."""
        self.watch.round_ends(pl_module.network)  # type: ignore[arg-type]


def main() -> None:
    """Run the rounds."""
    arguments = options(__doc__)
    work, data = WORKLOADS[arguments.workload], load_data()
    flags = {"devices": arguments.processes, "strategy": "ddp"} if arguments.processes > 1 else {}
    seed_everything(0, workers=True, verbose=False)
    network = work.network()
    watch = Watch(network, arguments.warm, arguments.rounds, STEPS)
    with pseudo_terminal(), quiet():
        trainer = make_trainer(Clock(watch), arguments.warm + arguments.rounds, arguments.rounds, arguments.folder, **flags)
        trainer.fit(make_module(network, ENGINES[arguments.engine]()), datamodule=data)
    watch.print("fedlight", "lightning")


if __name__ == "__main__":
    main()
