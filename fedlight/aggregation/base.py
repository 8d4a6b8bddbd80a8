"""How the server comes by the sum of a cohort's codes: the extension point, and the running sum, which is the default."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlight.core.codec import Codec, Decoder
from fedlight.core.rounds import Round, Upload


@dataclass(frozen=True)
class AggregationSetting:
    """What is known of a run before it begins: what an aggregator may refuse.

    Args:
        codec: the codec, maybe not fitted yet.
        cohort: clients of the first round.
        largest_weight: the largest weight of any client; 1 if all count equally.
        buffers: whether clients send statistics of BatchNorm layers beside their codes.
        processes: how many processes share the cohort.
        training: what a client's local training goes by, as text.
        min_clients: codes that a sum must have to be used.
        algorithm: name of the algorithm of local training.
        vectors: vectors that its clients upload; 1 if the update is all.
        scalars: numbers that they upload beside these.
    """

    codec: Codec
    cohort: int
    largest_weight: int
    buffers: bool
    processes: int
    training: str = ""
    min_clients: int = 1
    algorithm: str = "the algorithm"
    vectors: int = 1
    scalars: int = 0


class Aggregator(ABC):
    """Carries codes from the clients of an attempt to their sum. Constructor arguments are kept as attributes of the same names.

    The order in an attempt: ``open``; for every client ``leave`` (on the client's side) and ``arrive`` (on the server's); ``close``. Laws:
    after ``close`` ``round.codes`` holds the sum of ``weight * code`` over the clients whose codes arrived, exactly for integers, whatever
    their order; and what the server held on the way is no longer than a few codes, whatever the size of the cohort.

    Attributes:
        conceals: whether the server must not see single codes, so that it is given nothing but what left the client.
        sums: whether what is left is the sum of the codes, so that bounding each bounds what a client can change.
        sim_logs: whether the simulation may log what needs single clients' updates or losses.
    """

    hides_messages: bool = False
    sums: bool = True
    sim_logs: bool = True

    def check(self, setting: AggregationSetting) -> None:  # noqa: B027 (most have nothing to refuse)
        """Refuse, with a ``ConfigurationError``, a run that cannot work: before anything is trained."""

    def open(self, round: Round, codec: Codec, weights: Tensor) -> None:  # noqa: B027 (most have nothing to prepare)
        """Prepare an attempt that starts from the global ``weights`` ``[dim]``; may take clients out of ``round.mine``.

        Raises:
            MessageError: if the attempt cannot go on.
        """

    def leave(self, round: Round, upload: Upload) -> None:  # noqa: B027 (most send codes as they are)
        """Turn ``upload.message``, the client's encoded update, into what leaves the client.

        Raises:
            MessageError: if nothing does.
        """

    @abstractmethod
    def arrive(self, round: Round, upload: Upload, decoder: Decoder, device: torch.device) -> Tensor | None:
        """Take a message that arrived into account, and return its code if the server sees it.

        Raises:
            MessageError: if the message is malformed or was meant for another round or codec.
        """

    def close(self, round: Round, device: torch.device) -> None:  # noqa: B027 (a running sum is ready)
        """Leave the sum in ``round.codes``, on ``device``.

        Raises:
            MessageError: if there is none.
        """

    def describe(self) -> str:
        """Return class and constructor arguments as text: what must be equal for a run to be resumed. Nothing secret is in it."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name not in ("self", "args", "kwargs")]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


class PlainAggregator(Aggregator):
    """Adds up codes as they arrive, in the clear: the server could look at each, and does not."""

    def arrive(self, round: Round, upload: Upload, decoder: Decoder, device: torch.device) -> Tensor | None:
        """Add one client's code to the running sum."""
        term = decoder.read_message(upload.message, round.context, device)
        round.codes.add(term, upload.weight)
        return term
