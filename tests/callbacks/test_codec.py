from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from fedlight.callbacks import FederatedCallback
from fedlight.clients import FedAvg
from fedlight.codecs import IdentityCodec, PowerSGDCodec, QuantizeCodec
from fedlight.codecs.identity import IdentityEncoder
from fedlight.core.codec import Context
from fedlight.core.errors import LocalTrainingError, MessageError, RoundFailedError
from tests.federation import History, Spy, federated, federated_data, learned, pretraining, run, trainer, weights_of


class Lossy(FederatedCallback):
    """Loses what arrives in the first attempts, or breaks it."""

    def __init__(self, attempts: int) -> None:
        self.attempts = attempts

    def on_client_update(self, trainer, pl_module, context, update):
        if context.attempt < self.attempts:
            update.update.fill_(float("nan"))


def test_the_message_alone_reaches_the_server():
    """What the server adds up is what the decoder reads from the message, whatever has become of the plain update."""

    class Forgets(FederatedCallback):
        def on_client_message(self, trainer, pl_module, round, reply):
            reply.simulation.update.zero_()

    plain, forgetting = federated(codec=learned()), federated(codec=learned())
    run(plain, 2)
    run(forgetting, 2, callbacks=[Forgets()])
    assert torch.equal(weights_of(plain), weights_of(forgetting))


def test_the_aggregate_is_one_decoding_of_the_mean_code():
    module = federated(codec=learned())
    spy = run(module, 1)
    codec, broadcast = module.codec, spy.broadcast[0]
    context = Context(3, 0, 0, broadcast=broadcast)
    messages = [spy.replies[0, 0, client].payload for client in range(8)]
    assert torch.equal(codec.decoder.decode_sum(messages, [1] * 8, context, {}), spy.aggregates[0])


def test_what_clients_are_announced_is_known_before_they_send():
    """Law 8: the gain of a round is the same for every client and comes from earlier rounds."""
    module = federated(codec=learned())
    spy = run(module, 3)
    first = federated(codec=learned())
    shorter = run(first, 1)
    assert spy.broadcast[0] == shorter.broadcast[0]
    assert spy.broadcast[1] != spy.broadcast[0]


def test_server_state_of_a_failed_attempt_is_not_kept():
    """A round that needed a second attempt announces in it what it announced in the first."""

    class Announced(FederatedCallback):
        def __init__(self):
            self.seen = []

        def on_client_message(self, trainer, pl_module, round, reply):
            self.seen.append((round.context.round, round.context.attempt, str(round.context.broadcast)))

    module, ears = federated(codec=learned(), min_clients=8, max_attempts=4), Announced()

    class Falls(FederatedCallback):
        """Makes the first attempt's aggregate unusable, after decoding."""

        def on_cohort_end(self, trainer, pl_module, round):
            if round.context.attempt == 0:
                round.aggregate = None

    run(module, 2, callbacks=[ears, Falls()])
    for number in range(2):
        first, second = ({text for n, a, text in ears.seen if (n, a) == (number, attempt)} for attempt in (0, 1))
        assert len(first) == 1 and first == second


def test_an_update_that_another_callback_broke_never_enters_the_sum():
    module, spy = federated(), Spy()
    start = weights_of(module)
    with pytest.raises((RoundFailedError, ValueError)):
        trainer(1, callbacks=[Lossy(99), spy]).fit(module, datamodule=federated_data())
    assert torch.equal(weights_of(module), start)


def test_the_servers_codec_state_is_in_the_checkpoint(tmp_path):
    module = federated(codec=learned())
    runner = trainer(2, callbacks=[pretraining()])
    runner.fit(module, datamodule=federated_data())
    runner.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=False)["fedlight"]["server"]
    assert saved["decoder"] == module.server_state.decoder != {}


# -- what an encoder raises, and the order of hooks ----------------------------------------------------------------------


class _Watched(IdentityEncoder):
    """Does something before it encodes."""

    before: Callable[[], None]

    def encode(self, update, context, private):
        self.before()
        return super().encode(update, context, private)


class Watched(IdentityCodec):
    """Calls a function before every encoding."""

    def __init__(self, before: Callable[[], None]) -> None:
        super().__init__()
        self.before = before

    def config(self):
        return {"class_path": "Watched", "init_args": {}}

    def make_encoder(self, layout, plan):
        encoder = _Watched(layout, super().make_encoder(layout, plan).format)
        encoder.before = self.before
        return encoder


def test_a_client_whose_encoder_refuses_is_dropped_and_named():
    calls = itertools.count()

    def before():
        if next(calls) == 3:
            raise MessageError("no code for this one")

    module, history = federated(codec=Watched(before)), History()
    spy = run(module, 3, logger=history)
    assert spy.clients == {0: [0, 1, 2, 4, 5, 6, 7], 1: list(range(8)), 2: list(range(8))}
    assert history.rounds("round/dropped") == {0: 1.0, 1: 0.0, 2: 0.0}
    assert module.server_state.traffic.uplink == 23 * len(spy.replies[1, 0, 0].payload)


def test_any_other_error_in_the_encoder_ends_the_run_as_it_is():
    def before():
        raise ZeroDivisionError("in the encoder")

    with pytest.raises(ZeroDivisionError, match="in the encoder"):
        run(federated(codec=Watched(before)))


def test_an_error_in_training_ends_the_run_and_names_the_client():
    class Falls(FedAvg):
        def run(self, *args, **kwargs):
            raise ArithmeticError("in a client")

    with pytest.raises(LocalTrainingError, match=r"Client \d+ failed in round 0.*ArithmeticError: in a client"):
        run(federated(algorithm=Falls(steps=1)))


class Hooks(FederatedCallback):
    """Remembers which hook was called for whom."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def on_round_start(self, trainer, pl_module, round):
        self.calls.append(("start", round.context.step))

    def on_client_update(self, trainer, pl_module, context, update):
        self.calls.append(("update", update.client))

    def on_client_message(self, trainer, pl_module, round, reply):
        self.calls.append(("message", reply.client))

    def on_cohort_end(self, trainer, pl_module, round):
        self.calls.append(("cohort end", round.context.step))

    def on_round_end(self, trainer, pl_module, round):
        self.calls.append(("round end", round.context.step))


@pytest.mark.parametrize("passes", [1, 2])
def test_hooks_come_client_by_client_and_pass_by_pass(passes):
    """One update is in memory at a time: a client's message arrives before the next client's update is there."""
    hooks = Hooks()
    run(federated(codec=PowerSGDCodec(1) if passes == 2 else None), 1, callbacks=[hooks])
    expected: list[tuple[str, int]] = []
    for step in range(passes):
        each = [(hook, client) for client in range(8) for hook in ("update", "message")]
        expected += [("start", step), *each, ("cohort end", step)]
    assert hooks.calls == [*expected, ("round end", passes - 1)]


def test_a_callback_is_given_the_message_as_it_arrived():
    module = federated(codec=QuantizeCodec(6))
    spy = run(module, 1)
    assert {len(reply.payload) for reply in spy.replies.values()} == {module.codec.encoder.format.payload_bytes + 16}
