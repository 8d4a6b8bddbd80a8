"""Where a client's samples come from: the section `data` of its `node.yaml`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedlight.data.arrays import Arrays
from fedlight.data.federated import FederatedData
from fedlight.data.sampling import Everyone
from fedlight.data.sources import DataSource

Pair = tuple[Tensor, Tensor]


class ClientData(ABC):
    """The samples of one client."""

    @abstractmethod
    def load(self) -> Pair:
        """Return inputs ``[samples, ...]`` and targets ``[samples]``."""

    def start_from(self, folder: Path) -> None:  # noqa: B027 (some have no paths)
        """Let relative paths in the arguments start from a folder, that of `node.yaml`."""


class OwnData(ClientData):
    """All training samples of a data source on this machine.

    Args:
        source: Where the samples come from.
        root: Folder of data files, from which paths in ``source`` start. In a `node.yaml` a relative one starts from its folder.
        mean: What is taken from every channel of an image (nothing if not given): the same at every client and at the server.
        deviation: What every channel is divided by then.
    """

    def __init__(
        self, source: DataSource, root: str = ".", mean: Sequence[float] | None = None, deviation: Sequence[float] | None = None
    ) -> None:
        self.source = source
        self.root = Path(root).expanduser()
        self.mean = mean
        self.deviation = deviation

    def load(self) -> Pair:
        """Return the samples."""
        self.source.prepare(self.root)
        data: Arrays = self.source.load(self.root)
        x = data.x_train
        if self.mean is not None:
            x = x - torch.tensor(self.mean).view(1, -1, 1, 1)
        if self.deviation is not None:
            x = x / torch.tensor(self.deviation).view(1, -1, 1, 1)
        return x, data.y_train

    def start_from(self, folder: Path) -> None:
        """Let a relative ``root`` start from a folder."""
        self.root = folder / self.root


class Share(ClientData):
    """One client's share of a public data set, as a simulation makes it: to try out a deployment.

    Args:
        data: The data set and its partition, as in the section `data` of a simulation.
        client: Which of its clients this one is.
    """

    def __init__(self, data: FederatedData, client: int) -> None:
        self.data = data
        self.source = data.source
        self.data.sampler = Everyone()  # who takes part in a round is the server's matter
        self.client = client

    def load(self) -> Pair:
        """Return the client's samples, in the simulation's order."""
        self.data.prepare_data()
        self.data.setup()
        return self.data.client_data(self.client)

    def start_from(self, folder: Path) -> None:
        """Let a relative `root` of the data start from a folder."""
        self.data.root = folder / self.data.root
