"""One attempt at a round, from the cohort to the decoded aggregate."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedlight.callbacks.sections import each_in_section, section
from fedlight.clients.availability import Attempt
from fedlight.core.codec import Codec, Context
from fedlight.core.errors import MessageError
from fedlight.core.rounds import Round, Upload
from fedlight.core.running_sum import RunningSum
from fedlight.modules.exchange import merge
from fedlight.modules.privacy import least_clients, release
from fedlight.modules.shares import balanced_shares

if TYPE_CHECKING:
    from fedlight.modules.federated import FederatedModule

log = logging.getLogger(__name__)


def attempt_round(module: FederatedModule, number: int, attempt: int, weights: Tensor, buffers: Tensor) -> Round:
    """Run the cohort of (round, attempt) from the global ``weights`` ``[dim]``; the round has an aggregate if enough clients answered.

    Every process runs its share of the cohort. A codec with several passes keeps the clients' updates between them, as clients would.
    """
    round = _invite(module, number, attempt)
    # Closed also where something else fails: nobody goes on training for a round that is over.
    with closing(module.runner.run(round, weights, buffers)) as trained:
        uploads: Iterable[Upload] = each_in_section(module.trainer, "train_client", trained)
        for step in range(module.codec.passes):
            uploads = _run_pass(module, round, step, uploads, weights)
            if round.failed or round.codes.count < least_clients(module):
                round.aggregate = None
                return round
            if module.privacy is not None:
                release(module, round)
            with section(module.trainer, "decode"):
                module.dispatch("on_cohort_end", round)
    round.refused = untrusted(module.codec, round) if round.aggregate is not None else None  # a callback may have taken it away
    if round.refused:
        log.warning("Round %d: the decoded aggregate was refused, %s", number, round.refused)
        round.aggregate = None
    return round


def _invite(module: FederatedModule, number: int, attempt: int) -> Round:
    """Draw a cohort, and which of its clients answer and are run by this process."""
    cohort = module.data.cohort(number, attempt)
    work = np.array([module.algorithm.work(module.data.client_size(client)) for client in cohort.tolist()])
    present = module.availability.present(cohort, work, Attempt(module.seed, number, attempt))
    shares = balanced_shares(present, work[np.isin(cohort, present)], module.trainer.world_size)
    round = Round(Context(module.seed, number, attempt), cohort, shares[module.trainer.global_rank])
    round.absent = len(cohort) - len(present)
    round.server = module.algorithm.broadcast(module.server_state)
    compares = module.aggregator.sim_logs and module.sim_every and number % module.sim_every == 0
    round.true = RunningSum() if compares else None
    return round


def _run_pass(module: FederatedModule, round: Round, step: int, uploads: Iterable[Upload], weights: Tensor) -> list[Upload]:
    """Sum up one pass's codes over all processes, and return the uploads that a codec with another pass will need."""
    trainer, codec, number = module.trainer, module.codec, round.context.round
    round.context, round.codes, round.uplink, round.sent = replace(round.context, step=step), RunningSum(), 0, 0
    round.handshake_up = round.handshake_down = 0
    round.arrived = set()
    known = len(round.dropped) if step else 0
    with section(trainer, "downlink"):
        module.dispatch("on_round_start", round)
        module.downlink.count(module, round)
    kept = []
    try:
        with section(trainer, "sum"):
            module.aggregator.open(round, codec, weights)
        for upload in _exchange(module, round, uploads):
            if step == 0 and upload.usable:
                _note(round, upload)
            if codec.passes > 1:
                kept.append(upload)
        with section(trainer, "sum"):
            module.aggregator.close(round, module.device)
    except MessageError as error:
        round.failed = str(error)
        log.warning("Round %d: attempt %d ended without a sum. %s", number, round.context.attempt, error)
    round.dropped[known:] = sorted(round.dropped[known:])  # which was found first depends on who waits for whom
    for client, reason in round.dropped[known:]:
        log.warning("Round %d: client %d was dropped, %s", number, client, reason)
    with section(trainer, "all_reduce"):
        merge(round, codec, module.device, len(round.dropped) - known)
    module.traffic.add_message(round.uplink, round.sent if step == 0 else 0)
    module.traffic.add_handshake(round.handshake_up, round.handshake_down)
    round.uplink_passes += round.uplink + round.handshake_up
    return kept


def untrusted(codec: Codec, round: Round) -> str | None:
    """Return why the decoded aggregate must not be applied, or None."""
    assert round.aggregate is not None
    length = float(round.aggregate.norm())
    if not math.isfinite(length):
        return "it is not finite"
    if codec.passes == 1 and codec.additive:
        with torch.no_grad():
            bound = codec.decoder.norm_bound(round.codes.mean(), round.context)
        if length > bound:
            return f"it is {length:.3g} long where the sum of codes explains {bound:.3g}"
    return None


def way_out(refused: str | None, unsummed: bool) -> str:
    """Return what to do about a round that failed: its last aggregate was refused, or none of its attempts came to a sum."""
    if refused:
        return "refresh the codec or choose another"
    if unsummed:
        return "declare cohorts in `model.aggregator` as `data.sampler` draws them, and a threshold that they reach"
    return "lower the client learning rate, or sample more clients"


def _exchange(module: FederatedModule, round: Round, uploads: Iterable[Upload]) -> Iterator[Upload]:
    """Carry uploads over the wire, one after another, and yield those that the server could use.

    Where another thread encodes an upload, the next client is trained before anybody waits for the message: the order of hooks and sums
    is the same, and no more than one update is held for it.
    """
    encoding: Upload | None = None
    for upload in uploads:
        if encoding is not None and _arrive(module, round, encoding):
            yield encoding
        encoding = None
        if not _encode(module, round, upload):
            continue
        if upload.expected:
            encoding = upload
        elif _arrive(module, round, upload):
            yield upload
    if encoding is not None and _arrive(module, round, encoding):
        yield encoding


def _encode(module: FederatedModule, round: Round, upload: Upload) -> bool:
    """Have one upload encoded, or begun to be, and return whether it goes on to the server."""
    upload.message = b""
    if upload.client in round.arrived:
        round.dropped.append((upload.client, "it has answered already"))
        return False
    try:
        with section(module.trainer, "encode"):
            module.dispatch("on_client_update", round, upload)
    except MessageError as error:
        _drop(module, round, upload, error)
        return False
    return True


def _arrive(module: FederatedModule, round: Round, upload: Upload) -> bool:
    """Add one upload's message to the sum and return whether the server could use it; what was sent counts either way."""
    if upload.expected:
        try:
            with section(module.trainer, "wait_encode"):
                upload.settle()
        except MessageError as error:
            _drop(module, round, upload, error)
            return False
    try:
        with section(module.trainer, "sum"):
            module.aggregator.leave(round, upload)
            module.dispatch("on_client_message", round, upload.outside() if module.aggregator.hides_messages else upload)
    except MessageError as error:
        _drop(module, round, upload, error)
        return False
    else:
        round.arrived.add(upload.client)
        round.inside += bool(upload.inside)
        return True
    finally:
        if upload.message:
            round.sent += 1
            round.uplink += len(upload.message) if round.context.step else upload.sent_bytes


def _drop(module: FederatedModule, round: Round, upload: Upload, error: MessageError) -> None:
    module.store.drop(upload.client)
    round.dropped.append((upload.client, str(error)))


def _note(round: Round, upload: Upload) -> None:
    """Note what is read once per client: buffers, and what only a simulation can see."""
    round.loss += upload.loss
    round.trained += 1
    if len(upload.buffers):
        round.buffers.append((upload.client, upload.weight, upload.buffers.cpu()))
    if round.true is not None:
        round.true.add(upload.update, upload.weight)
