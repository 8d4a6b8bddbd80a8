"""The client side: local training by an algorithm, and the state that stays on the client."""

from fedlight.clients.algorithms import Algorithm, FedAvg, FedProx, FedSGD, LocalResult, Memory
from fedlight.clients.auto import Auto
from fedlight.clients.ditto import Ditto
from fedlight.clients.engine import ClientTask, Engine, Sequential, Vectorized
from fedlight.clients.feddyn import FedDyn
from fedlight.clients.fednova import FedNova
from fedlight.clients.local_model import LocalModel, Objective
from fedlight.clients.own_optimizer import ClientOptimizer
from fedlight.clients.proxy import record_bank
from fedlight.clients.qfedavg import QFedAvg
from fedlight.clients.scaffold import Scaffold
from fedlight.clients.schedule import Constant, Cosine, Exponential, Schedule
from fedlight.clients.threaded import Threaded

__all__ = [
    "Algorithm",
    "Auto",
    "ClientOptimizer",
    "ClientTask",
    "Constant",
    "Cosine",
    "Ditto",
    "Engine",
    "Exponential",
    "FedAvg",
    "FedDyn",
    "FedNova",
    "FedProx",
    "FedSGD",
    "LocalModel",
    "LocalResult",
    "Memory",
    "Objective",
    "QFedAvg",
    "Scaffold",
    "Schedule",
    "Sequential",
    "Threaded",
    "Vectorized",
    "record_bank",
]
