"""The server's side of a round: invite, broadcast, sum, decode, step. No Lightning, no clients, no transport."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedlight.aggregation.base import Aggregator
from fedlight.clients.algorithms import Algorithm
from fedlight.core.buffers import combine
from fedlight.core.codec import Codec, Context, Decoder, Key, State, exactly
from fedlight.core.model import Model
from fedlight.metrics.traffic import TrafficCounter
from fedlight.privacy import PrivacyMechanism
from fedlight.rounds.call import Call, Watch
from fedlight.rounds.downlink import Downlink, GlobalModel
from fedlight.rounds.reduce import gather, weighted_mean
from fedlight.rounds.stop import Stop

log = logging.getLogger(__name__)

Decode = Callable[[Decoder, Tensor, Context, State], Tensor]
"""Maps (decoder, mean code ``[code_dim]``, context, server state) to an aggregated update ``[dim]``: what `GradientDecoder` provides."""


def decode_mean(decoder: Decoder, mean: Tensor, context: Context, state: State) -> Tensor:
    """Return the aggregated update ``[dim]`` of a mean code ``[code_dim]``, in full precision whatever the process trains in."""
    with exactly(mean.device):
        return decoder.decode(mean, context, state)


@dataclass
class ServerState:
    """What the server remembers from round to round; all of it is in the checkpoint.

    Attributes:
        rounds: how many rounds succeeded.
        decoder: the codec's own state, such as a gain.
        algorithm: the algorithm's, such as a control variate.
        traffic: bytes so far.
        settled: the last attempt in which each client counted.
        extras: names of what else of the model training has changed since it was made; another fit goes on from it.
    """

    rounds: int = 0
    decoder: State = field(default_factory=dict)
    algorithm: State = field(default_factory=dict)
    traffic: TrafficCounter = field(default_factory=TrafficCounter)
    settled: dict[int, Key] = field(default_factory=dict)
    extras: set[str] = field(default_factory=set)

    def reset(self) -> None:
        """Begin a run."""
        self.rounds, self.decoder, self.algorithm, self.traffic, self.settled = 0, {}, {}, TrafficCounter(), {}

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain data and tensors."""
        return {**vars(self), "traffic": asdict(self.traffic), "settled": dict(self.settled), "extras": sorted(self.extras)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.rounds, self.decoder, self.algorithm = state["rounds"], dict(state["decoder"]), dict(state["algorithm"])
        self.traffic = TrafficCounter(**state["traffic"])
        self.settled = {client: (key[0], key[1]) for client, key in state["settled"].items()}
        self.extras = set(state["extras"])


@dataclass(eq=False)
class Server:
    """Invites clients, adds up what they send, decodes the sum once and takes the server's step.

    Args:
        model: the global model.
        codec: the codec, bound to the layout of what clients upload.
        algorithm: what the server makes of the mean, beside the clients' training.
        aggregator: makes the sums.
        downlink: makes the downloads.
        cohort: maps (round, attempt) to the invited clients.
        population: how many clients there are.
        privacy: the mechanism that noises sums, if any.
        state: what the server remembers.
        min_clients: codes that a sum must have to be used.
        max_attempts: attempts at a round.
        seed: the public seed.
        decode: the decoding step.
        watch: who follows.
        compares: whether a simulation compares with the true aggregate in a round.
        stop: a request to stop, which processes tell each other of.
        takes_extras: whether clients may send what else training changes in the model (``fedlight.core.buffers``).
    """

    model: GlobalModel
    codec: Codec
    algorithm: Algorithm
    aggregator: Aggregator
    downlink: Downlink
    cohort: Callable[[int, int], Iterable[int]]
    population: int
    privacy: PrivacyMechanism | None = None
    state: ServerState = field(default_factory=ServerState)
    min_clients: int = 1
    max_attempts: int = 3
    seed: int = 0
    decode: Decode = decode_mean
    watch: Watch = field(default_factory=Watch)
    compares: Callable[[int], bool] = lambda number: False
    stop: Stop = field(default_factory=Stop)
    takes_extras: bool = False

    @property
    def least_clients(self) -> int:
        """How many codes a sum must have to be used."""
        return self.min_clients if self.privacy is None else self.privacy.least_clients(self.min_clients)

    @property
    def names_clients(self) -> bool:
        """Whether logs may name clients: not where privacy counts on nobody knowing who took part."""
        return self.privacy is None or not self.privacy.amplified

    @property
    def affordable(self) -> bool:
        """Whether one more attempt stays within the privacy budget."""
        return self.privacy is None or self.privacy.affordable()

    def read(self) -> Model:
        """Return the current model, with what else training has changed in it."""
        model = self.model.read()
        return replace(model, extras=self.model.extras(sorted(self.state.extras))) if self.state.extras else model

    def finish(self, call: Call) -> bool:
        """Take the server's step, if the attempt has an aggregate that can be trusted; return whether it was taken."""
        if call.aggregate is None:
            return False
        call.refused = self._distrust(call)
        if call.refused:
            log.warning("Round %d: the decoded aggregate was refused, %s", call.context.round, call.refused)
            return False
        with self.watch.section("server_step"):
            counted = call.codes.count if self.privacy is None else self.privacy.setting.cohort  # the exact number is not noisy
            update = self.algorithm.step(call.aggregate, counted / self.population, self.state.algorithm)
            lr = self._step(call, update)
            self.downlink.finished(call.current, call.context, call.codes, lr, self.model)
        self.state.decoder = call.decoder_state
        self.state.rounds = call.context.round + 1
        self.state.settled.update(dict.fromkeys(call.counted, call.context.key))
        self.watch.on_round_end(call)
        return True

    def _step(self, call: Call, update: Tensor) -> float:
        """Take the server's step and set what is averaged beside the weights; return the step's learning rate."""
        sent = gather(call.buffers) if len(call.current.model.buffers) or self.takes_extras else []
        statistics = [(client, weight, buffers) for client, weight, buffers, _ in sent if len(buffers)]
        extras = combine([(client, weight, values) for client, weight, _, values in sent], self.seed, call.context.round)
        for name in sorted(extras.keys() - self.state.extras):
            log.info("Training changes %s, which is no trained parameter: clients send it in full, in its own type", name)
        self.state.extras |= extras.keys()
        return self.model.step(update, weighted_mean(statistics) if statistics else None, *([extras] if extras else []))

    def _distrust(self, call: Call) -> str | None:
        """Return why the decoded aggregate must not be applied, or None."""
        assert call.aggregate is not None
        length = float(call.aggregate.norm())
        if not math.isfinite(length):
            return "it is not finite"
        if self.codec.passes == 1 and self.codec.additive:
            with torch.no_grad():
                bound = self.codec.decoder.norm_bound(call.codes.mean(), call.context)
            if length > bound:
                return f"it is {length:.3g} long where the sum of codes explains {bound:.3g}"
        return None
