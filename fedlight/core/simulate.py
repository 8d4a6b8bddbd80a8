"""One round of a codec without Lightning: messages of every pass from a cohort to the decoded aggregate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedlight.core.codec import Codec, Context, Private, State
from fedlight.core.random import torch_generator
from fedlight.core.wire import Message


def simulate_round(
    codec: Codec,
    updates: Tensor,
    weights: Sequence[int] | None = None,
    context: Context | None = None,
    server_state: State | None = None,
    client_states: Sequence[State] | None = None,
    on_message: Callable[[int, int, Message], None] | None = None,
) -> Tensor:
    """Return the aggregate ``[dim]`` that the server decodes from a cohort's messages, whatever the codec's passes and states.

    ``updates`` ``[clients, dim]``; ``weights`` are positive integers, one a client (all 1 if not given). Of ``context`` seed, round and
    attempt count: what is announced comes from the codec. ``server_state`` and ``client_states`` are changed in place, as a round that
    succeeds would change them; without them everybody begins with none. ``on_message(step, client, message)`` sees what is sent.

    Client number i draws what client i would draw in a run of the same seed.
    """
    context = context or Context()
    weights = [1] * len(updates) if weights is None else weights
    state: State = {} if server_state is None else server_state
    private_states: Sequence[State] = [{} for _ in updates] if client_states is None else client_states

    def messages(context: Context) -> Iterator[Message]:
        for client, (update, own) in enumerate(zip(updates, private_states, strict=True)):
            generator = torch_generator(context.seed, context.round, context.attempt, client, "encode", context.step)
            # In memory of its own, as a client's update lies: the rounding of some kernels depends on alignment.
            message = codec.encoder.encode_message(update.clone(), context, Private(generator, own))
            if on_message is not None:
                on_message(context.step, client, message)
            yield message

    reply: dict[str, Any] = {}
    for step in range(codec.passes):
        context = replace(context, step=step, broadcast={**codec.decoder.broadcast(state), **reply})
        reply = {"reply": codec.decoder.decode_sum(messages(context), weights, context, state, updates.device)}
    result: Tensor = reply["reply"]
    return result
