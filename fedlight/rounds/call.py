"""One attempt at a round on the server's side: the requests to send, the replies that arrive, the sum, the decoded aggregate."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedlight.aggregation.base import TRAIN, Collector
from fedlight.core.codec import Context, ServerContext
from fedlight.core.errors import MessageError
from fedlight.core.running_sum import RunningSum, sum_dtype
from fedlight.rounds.downlink import Current
from fedlight.rounds.messages import LACKS, Reply, Request
from fedlight.rounds.privacy import release
from fedlight.rounds.reduce import merge, reduce_total, several_processes
from fedlight.rounds.stop import SIGNALS
from fedlight.rounds.watch import ClientWatch

if TYPE_CHECKING:
    from fedlight.rounds.server import Server


class Watch(ClientWatch):
    """Sees what happens on both sides of a round; this one does nothing. Hooks may change what they are given."""

    def on_round_start(self, call: Call) -> None:
        """Called before the first request of every pass."""

    def on_client_message(self, call: Call, reply: Reply) -> None:
        """Called on the server's side when a code has arrived."""

    def on_cohort_end(self, call: Call) -> None:
        """Called when the sum of a pass has been decoded."""

    def on_round_end(self, call: Call) -> None:
        """Called when the server has taken its step."""


@dataclass
class Observed:
    """What a simulation adds up of its clients, for logs alone (law 9).

    Attributes:
        true: the sum of the plain updates, in the rounds in which the simulation compares.
        loss: sum of the losses of the clients that trained.
        trained: how many did.
        saturation: share of every code at the end of its range, in the same rounds.
    """

    true: RunningSum | None
    loss: float = 0.0
    trained: int = 0
    saturation: list[float] = field(default_factory=list)


class Call:
    """One attempt at a round. Send ``requests``, hand every reply to ``receive``, then ``advance``; repeat until it is ``over``.

    A codec with several passes goes through the stages of the aggregation once a pass.

    Attributes:
        context: what everybody knows before the current pass.
        cohort: the invited clients, in the sampler's order.
        stage: the stage that the requests are of.
        requests: what to send next: nothing to an empty cohort.
        over: whether the attempt has ended, with an aggregate or without.
        codes: the sum of the current pass, once its replies are in.
        aggregate: the decoded aggregated update ``[dim]``, once there is one.
        answered: clients whose code is in the sum, of those that this process heard; ``counted`` holds those of all processes.
        dropped: clients that could not be used, with the reason, of those that this process heard; ``dropped_count`` counts all.
        absent: how many of the cohort did not answer the first request.
        failed: why the attempt ended without a sum, if it did.
        refused: why the decoded aggregate was refused, if it was.
        buffers: (client, weight, buffers, extras) of the clients that this process heard.
        inside: clients whose code was within the clipping norm, where they say so.
        decoder_state: the server's state of the codec, as this attempt changes it.
        noise: variance of the noise that privacy put on every entry of the mean code.
        uplink: bytes that arrived so far.
        observed: what a simulation saw.
    """

    def __init__(self, server: Server, number: int, attempt: int) -> None:
        self.server = server
        self.cohort: list[int] = [int(client) for client in server.cohort(number, attempt)]
        self.decoder_state = copy.deepcopy(server.state.decoder)
        self.context = Context(server.seed, number, attempt)
        self.current = Current(number, server.read(), server.codec)
        self.codes = RunningSum()
        self.aggregate: Tensor | None = None
        self.answered: set[int] = set()
        self.counted: set[int] = set()
        self.dropped: list[tuple[int, str]] = []
        self.dropped_count = 0
        self.absent = 0
        self.failed: str | None = None
        self.refused: str | None = None
        self.buffers: list[tuple[int, int, Tensor, Mapping[str, Tensor]]] = []
        self.inside = 0
        self.noise = 0.0
        self.uplink = 0
        self.observed = Observed(RunningSum() if server.compares(number) else None)
        self.stage = ""
        self.requests: list[Request] = []
        self.over = False
        self._collector: Collector
        self._asked: set[int] = set()
        self._replied: set[int] = set()
        self._passed: set[int] = set()  # whose message of this stage was taken in
        self._lacked: set[int] = set()  # who was sent the whole download already
        self._again: list[int] = []
        self._payloads: Mapping[int, bytes] = {}
        self._first_replies = 0
        self._weights: dict[int, int] = {}  # of clients that sent theirs in the first pass
        self._first_bytes = _PassBytes()
        self._bytes = _PassBytes()
        self._reported = 0
        self._begin_pass(0, self.cohort)

    # -- requests --------------------------------------------------------------------------------------------------------------

    def _begin_pass(self, step: int, clients: Sequence[int]) -> None:
        """Tell everybody what they have to know before they encode, and begin the first stage."""
        server = self.server
        broadcast = dict(server.codec.decoder.broadcast(self.decoder_state))
        if server.privacy is not None:
            broadcast |= server.privacy.broadcast()
        if step == 0 and (algorithm := server.algorithm.broadcast(server.state.algorithm)):
            broadcast["algorithm"] = algorithm
        if self.aggregate is not None:
            broadcast["reply"] = self.aggregate
        self.context = replace(self.context, step=step, broadcast=broadcast)
        self.codes, self.answered = RunningSum(), set()
        self._bytes = _PassBytes()
        with server.watch.section("downlink"):
            server.watch.on_round_start(self)
            try:
                self._collector = server.aggregator.collector(self.context, server.codec, clients, self.current.model, server.model.device)
                self._ask(server.aggregator.stages[0], clients)
            except MessageError as error:
                self._fail(error)
                self.over, self.aggregate = True, None

    def _ask(self, stage: str, everybody: Sequence[int]) -> None:
        """Begin a stage: make the requests."""
        payloads = self._collector.requests(stage)
        if self.server.privacy is not None and stage == self.server.aggregator.opened_by:
            # Whoever answers may be all that it takes, also if the attempt then fails.
            self.server.privacy.record_release(0.0)
        self.stage, self._payloads = stage, payloads or {}
        clients = everybody if payloads is None else sorted(payloads)
        self._asked, self._replied, self._passed, self._again = set(clients), set(), set(), []
        self.requests = [self._request(client) for client in clients]

    def _request(self, client: int) -> Request:
        server, first = self.server, self._is_first
        download = server.downlink.download(client, self.current) if first else None
        payload = self._payloads.get(client, b"")
        request = Request(client, self.stage, self.context, download, payload, server.state.settled.get(client))
        codec, handshake = (0 if download is None else download.codec_bytes), self._handshake_bytes(request)
        sent = self._first_bytes if first else self._bytes  # every process makes all first requests, and its own of the later ones
        sent.down += request.nbytes - codec - handshake
        sent.codec += codec
        sent.handshake_down += handshake
        return request

    @property
    def _is_first(self) -> bool:
        """Whether this is the first stage of the attempt, in which clients download."""
        return self.stage == self.server.aggregator.stages[0] and self.context.step == 0

    def _handshake_bytes(self, request: Request) -> int:
        """Return what of a request secure aggregation adds: the payload in the first stage of a pass, and all of later stages."""
        return len(request.payload) if request.stage == self.server.aggregator.stages[0] else request.nbytes

    # -- replies ---------------------------------------------------------------------------------------------------------------

    def receive(self, reply: Reply) -> None:
        """Take one reply into account; what cannot be used is dropped and named, and its bytes count either way."""
        client = reply.client
        if client not in self._asked or reply.stage != self.stage:
            self._drop(client, "it was not asked for this")
        elif reply.key not in (None, self.context.key):
            self._drop(client, "its reply is to an earlier attempt")
        elif client in self._replied:
            self._drop(client, "it has answered already")
        elif reply.payload == LACKS:
            self._bytes.up += len(LACKS)
            self._ask_again(client)
        else:
            self._replied.add(client)
            try:
                self._collect(reply)
                self._passed.add(client)
            except MessageError as error:
                self._drop(client, str(error))
            if self.stage == TRAIN:
                self._bytes.up += reply.nbytes
                self._bytes.sent += bool(reply.payload)
            else:
                self._bytes.handshake_up += reply.nbytes

    def _ask_again(self, client: int) -> None:
        """Have a client that lacks something sent everything, once."""
        if self._is_first and client not in self._lacked:
            self._lacked.add(client)
            self._again.append(client)
        else:
            self._replied.add(client)
            self._drop(client, "it lacks what this attempt builds on")

    def _collect(self, reply: Reply) -> None:
        server, client = self.server, reply.client
        if not reply.payload:
            raise MessageError((reply.simulation and reply.simulation.reason) or "it had nothing usable to send")
        if self.stage != TRAIN:
            self._collector.receive(self.stage, client, reply.payload, 1)
            return
        weight = self._weights.get(client, 1) if reply.weight is None else reply.weight
        if weight < 1:
            raise MessageError(f"Expected a weight of at least 1 but got {weight}")
        if len(reply.buffers) and not math.isfinite(reply.buffers.sum()):
            raise MessageError("its buffers are not finite")
        for name, tensor in (reply.extras or {}).items():
            if bool((tensor != tensor).any()):
                raise MessageError(f"its {name} is not a number")
        server.watch.on_client_message(self, replace(reply, simulation=None) if server.aggregator.hides_messages else reply)
        with server.watch.section("sum"):
            self._collector.receive(TRAIN, client, reply.payload, weight)
        self.answered.add(client)
        self._bytes.codes += len(reply.payload)
        self.inside += bool(reply.inside)
        if self.context.step == 0:
            self._weights[client] = weight
            self._note(reply, weight)

    def _note(self, reply: Reply, weight: int) -> None:
        """Note what is read once a client: buffers, and what only a simulation sees."""
        seen = reply.simulation
        if len(reply.buffers) or reply.extras:
            self.buffers.append((reply.client, weight, reply.buffers, reply.extras or {}))
        if seen is None or seen.update is None:
            return
        self.observed.loss += seen.loss
        self.observed.trained += 1
        if self.observed.true is not None:
            self.observed.true.add(seen.update, weight)
            if seen.saturation is not None and self.server.codec.additive:
                self.observed.saturation.append(seen.saturation)

    def _drop(self, client: int, reason: str) -> None:
        self.dropped.append((client, reason))

    # -- the end of a stage ----------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Close the stage: ask again who lacked something, or go on to the next stage, the next pass, or the end."""
        again, self._again = self._again, []
        if again:
            for client in again:
                self.server.downlink.forget(client)
            self.current.made.clear()
            self.requests = [self._request(client) for client in again]
            return
        if self._is_first:
            self._first_replies = len(self._replied)
        else:
            silent = sorted(self._asked - self._replied - self.answered)  # whose code is in the sum already, is in the sum
            self.dropped += [(client, f"it fell silent at stage {self.stage}") for client in silent]
        self.requests = []
        stages = self.server.aggregator.stages
        following = stages[stages.index(self.stage) + 1 :]
        if following:
            try:
                with self.server.watch.section("sum"):
                    self._ask(following[0], sorted(self._passed))
                return
            except MessageError as error:
                self._fail(error)
        self._finish_pass()

    def _finish_pass(self) -> None:
        """Add up what all processes have, decode the sum, and go on to the codec's next pass if there is one."""
        server = self.server
        if self.failed is None:
            try:
                with server.watch.section("sum"):
                    self.codes = self._collector.finish()
                self.dropped += self._collector.faults.items()
            except MessageError as error:
                self._fail(error)
        # In order: who was found first depends on who waits for whom.
        self.dropped[self._reported :] = sorted(self.dropped[self._reported :])
        self._bytes.dropped, self._reported = len(self.dropped) - self._reported, len(self.dropped)
        self._merge()
        self.over = self.failed is not None or self.codes.count < server.least_clients
        if self.over:
            self.aggregate = None
            return
        server.codec.decoder.record_lengths(self._bytes.codes / max(self.codes.count, 1), self.decoder_state)
        if server.privacy is not None:
            device = server.model.device
            self.codes, self.noise = release(
                server.privacy, server.codec, self.context, self.codes, self.inside, device, server.aggregator.opened_by is not None
            )
        with server.watch.section("decode"):
            known = ServerContext.of(self.context, self.codes.effective_count, self.noise, self.codes.lost)
            self.aggregate = server.decode(server.codec.decoder, self.codes.mean(), known, self.decoder_state)
            server.watch.on_cohort_end(self)
        self.over = self.context.step + 1 == server.codec.passes
        if not self.over:
            self._begin_pass(self.context.step + 1, sorted(self.answered))

    def _merge(self) -> None:
        """Add up what the processes have of this pass."""
        server, own, seen, first = self.server, self._bytes, self.observed, self.context.step == 0
        codec, device = server.codec, server.model.device
        integers = codec.additive and bool(codec.encoder.format_at(self.context.step).bits)
        replies = self._first_replies if first else 0
        counts = [own.up, own.codes, own.sent, own.down, own.dropped, self.inside, replies, seen.loss, seen.trained]
        counts += [*server.stop.votes(), *(client in self.answered for client in self.cohort)]
        with server.watch.section("all_reduce"):
            merged = merge([float(n) for n in counts], self.codes, codec.decoder.sum_length(self.context.step), integers, device)
            own.up, own.codes, own.sent, own.down, dropped, self.inside, replies = map(int, merged[:7])
            first_client = 9 + len(SIGNALS)
            server.stop.count(merged[9:first_client])
            self.counted = {client for client, heard in zip(self.cohort, merged[first_client:], strict=True) if heard}
            if first:
                seen.loss, seen.trained = merged[7], int(merged[8])
                self.absent = len(self.cohort) - replies
                if seen.true is not None and several_processes():
                    kind = sum_dtype(torch.float32)
                    reduce_total(seen.true, codec.encoder.dim, kind, device, kind)
                    seen.true.weight = self.codes.weight
        self.dropped_count += dropped
        common, self._first_bytes = self._first_bytes, _PassBytes()
        server.state.traffic.add(
            up=own.up,
            messages=own.sent if first else 0,
            down=common.down + own.down,
            codec=common.codec + own.codec,
            handshake_up=own.handshake_up,
            handshake_down=common.handshake_down + own.handshake_down,
        )
        self.uplink += own.up + own.handshake_up

    def _fail(self, error: MessageError) -> None:
        self.failed, self.requests = str(error), []


@dataclass
class _PassBytes:
    """What this process counts in a pass: bytes up, those of summed codes, down, of handshakes apart; messages, clients dropped."""

    up: int = 0
    codes: int = 0
    down: int = 0
    codec: int = 0
    sent: int = 0
    dropped: int = 0
    handshake_up: int = 0
    handshake_down: int = 0
