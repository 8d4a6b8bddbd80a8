"""FedLab: its FedAvg handler and serial trainer in its standalone pipeline (https://fedlab.readthedocs.io)."""

# mypy: disable-error-code="import-not-found, misc"
# The package lies in an environment of its own.
from __future__ import annotations

import torch
from fedlab.contrib.algorithm.fedavg import FedAvgSerialClientTrainer, FedAvgServerHandler
from fedlab.contrib.dataset.basic_dataset import FedDataset
from fedlab.core.standalone import StandalonePipeline
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from peers.job import Job, Watch, load_job, options


class Clients(FedDataset):
    """The clients' samples, handed out as FedLab's own data sets do it: a shuffled loader a client."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.num = len(job.y)
        self.sets = [TensorDataset(x, y) for x, y in zip(job.x, job.y, strict=True)]

    def get_dataset(self, id: int, type: str = "train") -> TensorDataset:
        """Return a client's samples."""
        return self.sets[id]

    def get_dataloader(self, id: int, batch_size: int, type: str = "train") -> DataLoader[tuple[Tensor, ...]]:
        """Return a client's batches."""
        return DataLoader(self.sets[id], batch_size=batch_size, shuffle=True)


class Pipeline(StandalonePipeline):
    """The pipeline with a clock in place of its evaluation."""

    def __init__(self, handler: FedAvgServerHandler, trainer: FedAvgSerialClientTrainer, watch: Watch) -> None:
        super().__init__(handler, trainer)
        self.watch = watch

    def evaluate(self) -> None:
        """Note the end of a round."""
        self.watch.round_ends(self.handler.model)


def main() -> None:
    """Run the rounds."""
    arguments = options(__doc__)
    torch.manual_seed(0)
    job, rounds = load_job(arguments.job), arguments.warm + arguments.rounds
    handler = FedAvgServerHandler(job.network, global_round=rounds, sample_ratio=job.cohorts.shape[1] / len(job.y))
    trainer = FedAvgSerialClientTrainer(job.network, num_clients=len(job.y))
    trainer.setup_dataset(Clients(job))
    trainer.setup_optim(epochs=1, batch_size=job.batch_size, lr=job.lr)
    watch = Watch(job.network, arguments.warm, arguments.rounds, job.steps)
    Pipeline(handler, trainer, watch).main()
    watch.print("fedlab")


if __name__ == "__main__":
    main()
