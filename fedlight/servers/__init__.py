"""Well-known server optimizers of federated learning: each is a torch optimizer that takes the aggregate as a gradient."""

from fedlight.servers.adaptive import FedAdagrad, FedAdam, FedYogi
from fedlight.servers.momentum import FedAvgM

__all__ = ["FedAdagrad", "FedAdam", "FedAvgM", "FedYogi"]
