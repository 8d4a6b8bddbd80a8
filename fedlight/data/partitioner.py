"""The base of every partitioner: checks and repairs around one method that assigns samples to clients."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from fedlight.core.errors import ConfigurationError, require
from fedlight.data.splits import Partition, fill_small


class Partitioner(ABC):
    """A scheme that gives every sample to exactly one client, and at least ``min_samples`` to each.

    A subclass defines in `assign` the client of each sample; this class checks and repairs the result.

    Args:
        min_samples: Least number of samples per client.

    Attributes:
        by_label: whether the split depends on labels: data without any is refused.
    """

    by_label: bool = True

    def __init__(self, min_samples: int = 1) -> None:
        require(min_samples >= 1, f"min_samples: expected at least 1, got {min_samples}; a client without samples cannot train.")
        self.min_samples = min_samples

    def partition(
        self, labels: np.ndarray, num_clients: int | None, rng: np.random.Generator, client_ids: np.ndarray | None = None
    ) -> Partition:
        """Split samples with ``labels`` (int ``[samples]``) and optional natural ``client_ids`` over the clients.

        Raises:
            ConfigurationError: a number of clients that does not fit the samples or the scheme.
        """
        labels = np.asarray(labels)
        clients = self.count_clients(len(labels), num_clients, client_ids)
        require(clients >= 1, f"num_clients: expected at least 1, got {clients}.")
        if clients * self.min_samples > len(labels):
            raise ConfigurationError(
                f"num_clients: more clients than samples: {clients} clients of at least {self.min_samples} samples need "
                f"{clients * self.min_samples}, got {len(labels)}; set num_clients to {len(labels) // self.min_samples} or less."
            )
        assignment = self.assign(labels, clients, rng, client_ids)
        return Partition.from_assignment(self.enforce(assignment, clients, rng), clients)

    @abstractmethod
    def assign(self, labels: np.ndarray, num_clients: int, rng: np.random.Generator, client_ids: np.ndarray | None) -> np.ndarray:
        """Return the client of every sample, int64 ``[samples]`` in ``0..num_clients - 1``."""

    def count_clients(self, samples: int, num_clients: int | None, client_ids: np.ndarray | None) -> int:
        """Return the number of clients; schemes without given clients need ``num_clients``."""
        if num_clients is None:
            raise ConfigurationError(
                f"num_clients: {type(self).__name__} needs a number, got None; only Natural and Explicit define their own clients."
            )
        return num_clients

    def client_ids(self, samples: int, natural: np.ndarray | None) -> np.ndarray | None:
        """Return the ids for partitioning a whole training set (before hold-outs), ``[samples]`` or None."""
        return natural

    def enforce(self, assignment: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
        """Give every client ``min_samples`` by moving samples from the largest clients, see `fill_small`."""
        return fill_small(assignment, num_clients, self.min_samples, rng)
