"""Server optimizers that are known by name in federated learning: each is a torch optimizer that takes the aggregate for a gradient."""

from fedlight.servers.adaptive import FedAdagrad, FedAdam, FedYogi
from fedlight.servers.momentum import FedAvgM

__all__ = ["FedAdagrad", "FedAdam", "FedAvgM", "FedYogi"]
