"""pfl-research: its FederatedAveraging on its SimulatedBackend (https://apple.github.io/pfl-research); `torchrun` for several processes."""

# mypy: disable-error-code="import-not-found, misc"
# The package lies in an environment of its own.
from __future__ import annotations

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from peers.job import Watch, load_job, options


class Network(nn.Sequential):
    """The model with the two methods that pfl asks for."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what a local step descends."""
        return cross_entropy(self.train()(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """Return the loss for evaluations."""
        return {"loss": Weighted(len(y) * cross_entropy(self.eval()(x), y).item(), len(y))}


class Clock(TrainingProcessCallback):
    """Tells the watch of every round."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def after_central_iteration(self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int) -> tuple[bool, Metrics]:
        """Note the end of a round."""
        self.watch.round_ends(model.pytorch_model)
        return False, Metrics()


def main() -> None:
    """Run the rounds."""
    arguments = options(__doc__)
    job, rounds = load_job(arguments.job), arguments.warm + arguments.rounds
    order = iter(job.cohorts.flatten().tolist())
    users = {client: [x, y] for client, (x, y) in enumerate(zip(job.x, job.y, strict=True))}
    dataset = FederatedDataset.from_slices(users, lambda: next(order))
    network = Network(*job.network)
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
    watch = Watch(job.network, arguments.warm, arguments.rounds, job.steps)
    FederatedAveraging().run(
        NNAlgorithmParams(  # the first round alone, which is not timed, evaluates the clients
            central_num_iterations=rounds, evaluation_frequency=rounds, train_cohort_size=job.cohorts.shape[1], val_cohort_size=None
        ),
        SimulatedBackend(dataset, dataset),
        model,
        NNTrainHyperParams(local_batch_size=job.batch_size, local_num_epochs=1, local_learning_rate=job.lr),
        callbacks=[Clock(watch)],
    )
    watch.print("pfl")


if __name__ == "__main__":
    main()
