"""What happens on a client: local training by an algorithm, and the state that stays there."""

from fedlight.clients.algorithms import Algorithm, FedAvg, FedProx, FedSGD, LocalResult
from fedlight.clients.local_model import LocalModel, Objective
from fedlight.clients.own_optimizer import ClientOptimizer
from fedlight.clients.proxy import record_bank
from fedlight.clients.schedule import Constant, Cosine, Exponential, Schedule

__all__ = [
    "Algorithm",
    "ClientOptimizer",
    "Constant",
    "Cosine",
    "Exponential",
    "FedAvg",
    "FedProx",
    "FedSGD",
    "LocalModel",
    "LocalResult",
    "Objective",
    "Schedule",
    "record_bank",
]
