"""One attempt at a round, from the cohort to the decoded aggregate."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedlight.core.codec import Public
from fedlight.core.errors import MessageError
from fedlight.core.export import encoder_bytes
from fedlight.core.layout import float_buffers
from fedlight.core.rounds import Round, Upload
from fedlight.core.running_sum import RunningSum
from fedlight.modules.exchange import merge

if TYPE_CHECKING:
    from fedlight.modules.federated import FederatedModule

log = logging.getLogger(__name__)


def attempt_round(module: FederatedModule, number: int, attempt: int, weights: Tensor, buffers: Tensor) -> Round:
    """Run the cohort of (round, attempt) from the global ``weights`` ``[dim]``; the round has an aggregate if enough clients answered.

    Every process runs its share of the cohort. A codec with several passes keeps the clients' updates between them, as clients would.
    """
    cohort = module.data.cohort(number, attempt)
    trainer, codec = module.trainer, module.codec
    round = Round(Public(module.seed, number, attempt), cohort, cohort[trainer.global_rank :: trainer.world_size])
    round.true = RunningSum() if module.sim_every and number % module.sim_every == 0 else None
    uploads: Iterable[Upload] = module.runner.run(round, weights, buffers)
    for step in range(codec.passes):
        round.public, round.codes, round.uplink = replace(round.public, step=step), RunningSum(), 0
        module.dispatch("on_round_start", round)
        _count_downlink(module, round)
        kept = []
        for upload in uploads:
            if not _exchange(module, round, upload):
                continue
            if step == 0:
                _note(round, upload)
            if codec.passes > 1:
                kept.append(upload)
        uploads = kept
        if step == 0:
            round.dropped_count = len(round.dropped)
            for client, reason in round.dropped:
                log.warning("Round %d: client %d was dropped, %s", number, client, reason)
        merge(round, codec, module.device)
        module.traffic.add_message(round.uplink, round.codes.count if step == 0 else 0)
        round.uplink_passes += round.uplink
        if round.codes.count < module.min_clients:
            round.aggregate = None
            return round
        module.dispatch("on_cohort_end", round)
    if round.aggregate is not None and not torch.isfinite(round.aggregate.sum()):
        log.warning("Round %d: the decoded aggregate is not finite and was refused", number)
        round.aggregate = None
    return round


def _exchange(module: FederatedModule, round: Round, upload: Upload) -> bool:
    """Carry one upload over the wire and return whether the server could use it; what was sent counts either way."""
    try:
        module.dispatch("on_client_update", round, upload)
        module.dispatch("on_client_message", round, upload)
    except MessageError as error:
        module.store.drop(upload.client)
        round.dropped.append((upload.client, str(error)))
        return False
    finally:
        round.uplink += upload.sent_bytes if round.public.step == 0 else len(upload.message)
    return True


def _note(round: Round, upload: Upload) -> None:
    """Note what is read once per client: buffers, and what only a simulation can see."""
    round.loss += upload.loss
    if len(upload.buffers):
        round.buffers.append((upload.client, upload.weight, upload.buffers.cpu()))
    if round.true is not None:
        round.true.add(upload.update, upload.weight)


def _count_downlink(module: FederatedModule, round: Round) -> None:
    """Count what every client of the cohort downloads: model, announcements, and the encoder if it lacks this version."""
    announced = announced_bytes(round.public.announced)
    if round.public.step:
        module.traffic.add_download(announced * len(round.cohort))
        return
    model = 4 * (module.layout.dim + sum(buffer.numel() for buffer in float_buffers(module.network)))
    module.traffic.add_download((model + announced) * len(round.cohort))
    if module.codec.version:
        lacking = round.cohort[module.encoder_versions[round.cohort] < module.codec.version]
        if len(lacking):
            module.traffic.add_codec(encoder_bytes(module.codec) * len(lacking))
        module.encoder_versions[lacking] = module.codec.version


def announced_bytes(announced: Mapping[str, Any]) -> int:
    """Return the bytes of what the server announces: tensors at their size, every other number as 8 bytes.

    >>> announced_bytes({"gain": 0.5, "0": {"reply": torch.zeros(3)}})
    20
    """
    total = 0
    for value in announced.values():
        if isinstance(value, Mapping):
            total += announced_bytes(value)
        else:
            total += value.numel() * value.element_size() if isinstance(value, Tensor) else 8
    return total
