"""Steps of convolutional networks with the max pooling that clients train with, beside torch's own, in turn, on one thread.

python tests/benchmarks/pooling.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedlight.clients.layers import quicken_pooling
from fedlight.core.process import keep_freed_memory
from fedlight.modules import BenchmarkCNN, LeNet5, SmallCNN

SETTINGS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BenchmarkCNN, 10 images of CIFAR-10's size": (BenchmarkCNN, (10, 3, 32, 32)),
    "SmallCNN, 10 images of CIFAR-10's size": (SmallCNN, (10, 3, 32, 32)),
    "SmallCNN, 32 images of CIFAR-10's size": (SmallCNN, (32, 3, 32, 32)),
    "LeNet5, 32 images of MNIST's size": (LeNet5, (32, 1, 28, 28)),
}


def stepper(network: nn.Module, shape: tuple[int, ...]) -> Callable[[], float]:
    """Return a function that takes a step of SGD on random images and returns its seconds."""
    x, y = torch.randn(shape), torch.arange(shape[0]) % 10
    parameters = list(network.train().parameters())
    pieces = [parameter.data for parameter in parameters]

    def step() -> float:
        begin = time.perf_counter()
        torch._foreach_add_(pieces, torch.autograd.grad(cross_entropy(network(x), y), parameters), alpha=-0.01)
        return time.perf_counter() - begin

    return step


def main() -> None:
    """Print a line for every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each, after 20 that are not timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    for name, (make, shape) in SETTINGS.items():
        plain = make()
        quick = copy.deepcopy(plain)
        quicken_pooling(quick)
        steppers = [stepper(plain, shape), stepper(quick, shape)]
        times = [[step() for step in steppers] for _ in range(arguments.steps + 20)][20:]
        first, second = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        print(f"{name}: {first:.2f} ms a step with torch's layer, {second:.2f} with fedlight's, {first / second:.2f} times as fast")


if __name__ == "__main__":
    main()
