"""Well-known server optimizers of federated learning: each is a torch optimizer that takes the aggregate as a gradient.

FedAvgM (Hsu et al. 2019, arXiv 1909.06335, section 4.3) is `torch.optim.SGD` with a momentum.
"""

from fedlight.servers.adaptive import FedAdagrad, FedAdam, FedYogi

__all__ = ["FedAdagrad", "FedAdam", "FedYogi"]
