"""The clients' side of a round: download, train, encode, protect, seal, for all clients that live in one process. No Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlight.aggregation.base import TRAIN, Held, Sealer
from fedlight.clients.algorithms import Algorithm, LocalResult, Memory
from fedlight.clients.engine import ClientTask, Engine, Sequential
from fedlight.clients.local_model import LocalModel
from fedlight.clients.personal import PersonalNorm
from fedlight.clients.store import ClientStore
from fedlight.core.codec import Context, Encoder, Private, State, exactly
from fedlight.core.errors import ConfigurationError, MessageError
from fedlight.core.model import Model
from fedlight.core.packing import as_bytes, as_tensor
from fedlight.core.random import derive_seed, torch_generator, untouched_generators
from fedlight.core.wire import Message, saturation
from fedlight.privacy import PrivacyMechanism
from fedlight.rounds.held import HeldModels, Lacks
from fedlight.rounds.messages import LACKS, ClientUpdate, Reply, Request, Simulation, context_bytes, parse_context
from fedlight.rounds.watch import ClientWatch

Encode = Callable[[Encoder, Tensor, Context, Private], Tensor]
"""Maps (encoder, update ``[dim]``, context, private) to a code ``[code_dim]``: the step that `GradientEncoder` provides."""


def encode_update(encoder: Encoder, update: Tensor, context: Context, private: Private) -> Tensor:
    """Return the code ``[code_dim]`` of an update ``[dim]``, in full precision whatever the process trains in."""
    with exactly(update.device):
        return encoder.encode(update.float(), context, private)


@dataclass(eq=False)
class ClientHost:
    """Answers for clients; nothing of one reaches another (law 5).

    Args:
        model: the local model of this process, which the engine trains clients with, or makes others like it.
        algorithm: the local training.
        data: maps a client to its samples.
        held: what clients hold of models and codecs; an encoder that is downloaded takes the place of the configured codec's.
        sealer: the clients' half of the aggregation.
        hides_messages: whether the aggregation hides codes, and the weight with them.
        store: the clients' own state.
        by_samples: whether a client's weight is its number of samples (else 1).
        personal: the normalisation layers that stay with the clients, if any do.
        privacy: the mechanism that protects codes, if any.
        engine: how clients are trained, one after another if not given.
        encode: the encoding step.
        watch: who follows.
        compares: whether the simulation looks at codes in a round.
        private_seed: seed of what a client draws for itself, such as batches and rounding: the public one in a simulation.
    """

    model: LocalModel
    algorithm: Algorithm
    data: Callable[[int], tuple[Tensor, Tensor]]
    held: HeldModels
    sealer: Sealer = field(default_factory=Sealer)
    hides_messages: bool = False
    store: ClientStore = field(default_factory=ClientStore)
    by_samples: bool = False
    personal: PersonalNorm | None = None
    privacy: PrivacyMechanism | None = None
    engine: Engine = field(default_factory=Sequential)
    encode: Encode = encode_update
    watch: ClientWatch = field(default_factory=ClientWatch)
    compares: Callable[[int], bool] = lambda number: False
    private_seed: Callable[[Context], int] = lambda context: context.seed

    def __post_init__(self) -> None:
        self.passes = self.held.codec.passes
        self.held.to(self.model.weights.device)
        self._compares = False
        self._pending: dict[int, ClientUpdate] = {}  # updates that a codec with several passes needs again
        self._handshake: dict[int, Held] = {}  # what clients hold in the stages of an attempt

    def receive(self, request: Request) -> Held:
        """Take in what the server sent one client: how its last attempt ended, and the download.

        Raises:
            Lacks: if the download builds on something that the client does not hold.
            MessageError: if the download is damaged.
        """
        self.store.begin(request.client, request.context.key, request.settled)
        if request.download is not None:
            self._handshake.pop(request.client, None)
            self._pending.pop(request.client, None)
            model, encoder = self.held.take(request.client, request.download)
            held = Held(request.context, encoder, model)
        else:
            before = self._handshake.get(request.client)
            if before is None or before.context.key != request.context.key:
                raise Lacks("it has not downloaded the model of this attempt")
            held = before if before.context is request.context else Held(request.context, before.encoder, before.model)
        self._handshake[request.client] = held
        return held

    def answers(self, requests: Sequence[Request]) -> Generator[Reply]:
        """Yield one reply a request, in their order; all are of one stage and one attempt."""
        context, stage = (requests[0].context, requests[0].stage) if requests else (Context(), "")
        self._compares = self.compares(context.round)
        train = stage == TRAIN and not context.step
        return self._train(requests) if train else (self._answer(request) for request in requests)

    def _answer(self, request: Request) -> Reply:
        """Return what a client sends in a handshake, or in a further pass of the codec."""
        try:
            held = self.receive(request)
            if request.stage == TRAIN:
                return self._next_pass(request, held)
            return request.reply(self.sealer.answer(request.stage, request.client, request.payload, held))
        except MessageError as error:
            return self._unable(request, error)

    @property
    def stateful(self) -> bool:
        """Whether clients keep anything between rounds."""
        return self.held.codec.client_state or self.personal is not None or self.algorithm.client_state

    def settle(self, counted: Collection[int], gather: Callable[[dict[int, State]], dict[int, State]] = lambda states: states) -> None:
        """Keep what the counted clients changed in an attempt, and forget what all others did.

        ``gather`` adds what the clients of other processes changed.
        """
        self.store.commit(gather(self.store.take_draft(counted)))
        self._handshake, self._pending = {}, {}

    # -- clients whose process ends between two messages -------------------------------------------------------------------------

    def suspend(self, client: int) -> dict[str, Any]:
        """Return what a client holds in the middle of an attempt, beside secrets, as plain data and tensors."""
        held, update = self._handshake[client], self._pending.get(client)
        return {
            "context": as_tensor(context_bytes(held.context)),
            "version": self.held.version_of(held.encoder),
            "model": (held.model.weights, held.model.buffers, dict(held.model.extras)),
            "update": None if update is None else vars(update),
        }

    def resume(self, client: int, state: Mapping[str, Any]) -> Held:
        """Go on from what ``suspend`` returned, and return what the client holds."""
        encoder = self.held.encoder(state["version"])
        held = self._handshake[client] = Held(parse_context(as_bytes(state["context"])), encoder, Model(*state["model"]))
        if state["update"] is not None:
            self._pending[client] = ClientUpdate(**state["update"])
        return held

    def waits(self, client: int) -> bool:
        """Whether a client keeps its update for another pass of the codec."""
        return client in self._pending

    # -- training and sending ----------------------------------------------------------------------------------------------------

    def _next_pass(self, request: Request, held: Held) -> Reply:
        if request.client not in self._pending:
            raise MessageError("it has no update of this attempt")
        return self._send(request, held, self._pending[request.client])

    def _train(self, requests: Sequence[Request]) -> Generator[Reply]:
        """Train clients and send their codes; a reply says so where there is nothing usable to send."""
        waiting = {request.client: request for request in requests}
        early: list[Reply] = []
        tasks = self._tasks(requests, early)
        devices = [self.model.weights.device] if self.model.weights.is_cuda else []
        # What trains may draw from the process's generators, which are seeded for every client and put back after the cohort.
        with (
            untouched_generators(devices),
            closing(self.engine.train(self.model, self.algorithm, tasks, requests[0].context.round)) as trained,
        ):
            for task, result, model in self.watch.each_in_section("train_client", trained):
                yield from early
                early.clear()
                yield self._reply(waiting[task.client], self._update(task, result, model))
        yield from early

    def _tasks(self, requests: Sequence[Request], early: list[Reply]) -> Generator[ClientTask]:
        """Yield what each client has to do; a client that cannot begin answers early."""
        for request in requests:
            try:
                held = self.receive(request)
            except MessageError as error:
                early.append(self._unable(request, error))
            else:
                yield self._task(request.client, held)

    def _task(self, client: int, held: Held) -> ClientTask:
        context, weights, buffers = held.context, held.model.weights, held.model.buffers
        norm = self._own(client, "norm", self.personal is not None)
        if self.personal:
            weights, buffers = self.personal.restore(norm, weights, buffers)
        own = self._own(client, "algorithm", self.algorithm.client_state)
        x, y = self.data(client)
        seed = self.private_seed(context)
        generator = torch_generator(seed, *context.key, client, "batches")
        noise = derive_seed(seed, *context.key, client, "dropout")
        memory = Memory(own, context.broadcast.get("algorithm", {}))
        device = self.model.weights.device
        extras = {name: tensor.to(device) for name, tensor in held.model.extras.items()}
        return ClientTask(client, x, y, weights.to(device), buffers.to(device), generator, noise, memory, norm, extras)

    def _own(self, client: int, part: str, kept: bool) -> State:
        """Return a part of the client's state, to change in this attempt: of what keeps none, one that is forgotten."""
        return self.store.draft(client).setdefault(part, {}) if kept else {}

    def _update(self, task: ClientTask, result: LocalResult, model: LocalModel) -> ClientUpdate:
        buffers, extras = model.buffers.clone() if len(task.buffers) else task.buffers, model.extras.changed()
        if self.personal:
            extras = {name: tensor for name, tensor in extras.items() if name not in self.personal.counters}
            self.personal.keep(task.norm, model.weights, buffers, result.upload)
            buffers = buffers[:0]
        protected = self.privacy is not None or self.hides_messages
        if extras and protected:
            raise ConfigurationError(
                f"Expected local training that changes trained parameters alone but it changes {next(iter(extras))}, which would be sent "
                "in the clear beside a protected code: register it with persistent=False, so that it stays with the client"
            )
        loss = float(result.loss)
        grew = math.isfinite(loss) or model.first is None or math.isfinite(float(model.first))
        weight, spoilt = len(task.y) if self.by_samples else 1, model.extras.diverged(extras) if extras else None
        sent = extras if model.extras.any_sent and not protected else None
        reason = None if spoilt is None else f"{spoilt}, {BESIDE}"
        return ClientUpdate(task.client, result.upload, buffers, weight, loss, extras=sent, reason=reason, grew=grew)

    def _reply(self, request: Request, update: ClientUpdate) -> Reply:
        """Return the reply of a client that has trained; one whose training failed sends zeros under privacy, and else nothing."""
        reason = unusable(update)
        if reason is not None:
            self.store.drop(update.client)
            if self.privacy is None:
                return self._nothing(request, reason)
            update.usable = False
        if self.passes > 1:
            self._pending[update.client] = update
        try:
            return self._send(request, self._handshake[update.client], update)
        except MessageError as error:
            return self._nothing(request, str(error))

    def _unable(self, request: Request, error: MessageError) -> Reply:
        return request.reply(LACKS) if isinstance(error, Lacks) else self._nothing(request, str(error))

    def _nothing(self, request: Request, reason: str) -> Reply:
        if request.stage == TRAIN:  # of what comes after, the code is in the sum already
            self.store.drop(request.client)
            self._pending.pop(request.client, None)
        return request.reply(b"", simulation=Simulation(reason=reason))

    def _send(self, request: Request, held: Held, update: ClientUpdate) -> Reply:
        """Encode, protect and seal one update."""
        context, client = held.context, update.client
        self.watch.on_client_update(context, update)
        if context.step == self.passes - 1:
            self._pending.pop(client, None)
        with self.watch.section("encode"):
            message, inside, code = self._encoded(request, held, update)
        first = context.step == 0
        seen = Simulation(
            update=update.update if update.usable else None,
            loss=update.loss,
            saturation=saturation(code, held.encoder.format_at(context.step)) if self._compares else None,
        )
        return request.reply(
            message,
            weight=update.weight if first and self.by_samples and not self.hides_messages else None,
            buffers=update.buffers.cpu() if first else update.buffers[:0].cpu(),
            inside=inside,
            simulation=seen,
            extras=update.extras if first else None,
        )

    def _encoded(self, request: Request, held: Held, update: ClientUpdate) -> tuple[Message, bool | None, Tensor]:
        """Return the message, the clipping bit where it is sent, and the code itself."""
        context, encoder, client = held.context, held.encoder, update.client
        generator = torch_generator(self.private_seed(context), *context.key, client, "encode", context.step)
        private = Private(generator, self._own(client, "codec", self.held.codec.client_state or self.passes > 1))
        plain = update.update if update.usable else torch.zeros_like(update.update, dtype=torch.float32)
        code, inside = self.encode(encoder, plain, context, private), None
        if self.privacy is not None:
            code = code if update.usable else torch.zeros_like(code)
            code, within = self.privacy.protect(code, encoder, context, private, client)
            inside = within if self.privacy.sends_bits else None
        return self.sealer.seal(client, code, update.weight, request.payload, held), inside, code


AT_FIRST = "before it has taken a step"
NOT_IN_BUFFERS = "its buffers are not finite"
BESIDE = "which clients send beside their weights"


def unusable(update: ClientUpdate) -> str | None:
    """Return why an update must not enter a sum, or None: one pass over it, for NaN, Inf and what would overflow."""
    if not math.isfinite(update.loss):
        return f"its loss is {update.loss}" if update.grew else f"its loss is {update.loss}, {AT_FIRST}"
    if update.reason is not None:
        return update.reason
    if not math.isfinite(update.update.sum()):
        return "its update is not finite"
    if len(update.buffers) and not math.isfinite(update.buffers.sum()):
        return NOT_IN_BUFFERS
    return None
