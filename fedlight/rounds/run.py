"""A round from the first invitation to the server's step, whoever the clients are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing

from fedlight.core.errors import RoundFailedError
from fedlight.rounds.call import Call
from fedlight.rounds.clients import Clients
from fedlight.rounds.host import AT_FIRST, BESIDE, NOT_IN_BUFFERS
from fedlight.rounds.server import Server

log = logging.getLogger(__name__)


def run_round(server: Server, clients: Clients, number: int) -> Call | None:
    """Run round ``number`` and return the attempt that succeeded, None if the privacy budget does not allow one.

    Raises:
        RoundFailedError: if no attempt had a sum of enough clients.
    """
    reasons: list[str] = []
    unsummed, refused = 0, False
    for attempt in range(server.max_attempts):
        if not server.affordable:
            return None
        call = Call(server, number, attempt)
        while not call.over:
            with closing(clients.exchange(call.requests)) as replies:  # closed on any error: nobody goes on training
                for reply in replies:
                    call.receive(reply)
            call.advance()
        reasons += _told(call, clients)
        done = server.finish(call)
        clients.settle(call.context.key, call.counted if done else ())
        if done:
            return call
        reasons += [f"the decoded aggregate was refused, {call.refused}"] if call.refused else []
        unsummed, refused = unsummed + bool(call.failed), bool(call.refused)
    if not server.affordable:
        return None
    shown = reasons if server.names_clients else []
    raise RoundFailedError(
        f"Round {number} had no usable aggregate of at least {server.least_clients} clients in {server.max_attempts} attempts "
        f"({'; '.join(shown[:5]) or 'the cohorts were too small'}): {way_out(reasons, refused, unsummed == server.max_attempts)}"
    )


def _told(call: Call, clients: Clients) -> list[str]:
    """Log who was dropped in an attempt, and why it failed if it did; return the same."""
    number, attempt, names_clients = call.context.round, call.context.attempt, call.server.names_clients
    dropped = [(clients.name(client), clients.named(reason)) for client, reason in call.dropped]
    for name, reason in dropped if names_clients else ():
        log.warning("Round %d: %s was dropped: %s", number, name, reason)
    failed = [clients.named(call.failed)] if call.failed else []
    for reason in failed:
        log.warning("Round %d: attempt %d ended without a sum. %s", number, attempt, reason)
    return [f"{name}: {reason}" for name, reason in dropped] + failed


def way_out(reasons: Sequence[str], refused: bool, unsummed: bool) -> str:
    """Return what to do about a round that failed for these reasons: its last aggregate was refused, or no attempt came to a sum."""
    if refused:
        return "refresh the codec or choose another"
    if unsummed:
        return "declare cohorts in `model.aggregator` as `data.sampler` draws them, and a threshold that they reach"
    if any(reason.endswith(AT_FIRST) for reason in reasons):
        return "look for NaN or Inf in clients' samples, in the loss and in the network"
    if any(reason.endswith((NOT_IN_BUFFERS, BESIDE)) for reason in reasons):
        return "look for NaN or Inf in the network's buffers and frozen parameters, which clients send if training changes them"
    if any("its loss is" in reason or "its update is not finite" in reason for reason in reasons):
        return "lower the client learning rate, or sample more clients"
    return "mend that at the clients, or sample more clients" if reasons else "sample more clients"
