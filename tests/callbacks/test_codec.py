import pytest
import torch

from fedlight.callbacks import FederatedCallback, GradientDecoder, codec_callbacks
from fedlight.core.errors import RoundFailedError
from tests.federation import Spy, federated, federated_data, learned, pretraining, run, trainer, weights_of


class Lossy(FederatedCallback):
    """Loses what arrives in the first attempts, or breaks it."""

    def __init__(self, attempts: int) -> None:
        self.attempts = attempts

    def on_client_update(self, trainer, pl_module, round, upload):
        if round.context.attempt < self.attempts:
            upload.update.fill_(float("nan"))


def test_the_message_alone_reaches_the_server():
    """What the server adds up is what the decoder reads from the message, whatever has become of the plain update."""

    class Forgets(FederatedCallback):
        def on_client_message(self, trainer, pl_module, round, upload):
            upload.update.zero_()

    plain, forgetting = federated(codec=learned()), federated(codec=learned())
    run(plain, 2)
    run(forgetting, 2, callbacks=[Forgets()])
    assert torch.equal(weights_of(plain), weights_of(forgetting))


def test_the_aggregate_is_one_decoding_of_the_mean_code():
    module = federated(codec=learned())
    spy = run(module, 1)
    codec, broadcast = module.codec, spy.broadcast[0]
    from fedlight.core.codec import Context

    context = Context(3, 0, 0, broadcast=broadcast)
    messages = [spy.uploads[0, 0, client].message for client in range(8)]
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

        def on_client_message(self, trainer, pl_module, round, upload):
            self.seen.append((round.context.round, round.context.attempt, str(round.context.broadcast)))

    module, ears = federated(codec=learned(), min_clients=8, max_attempts=4), Announced()

    class Falls(FederatedCallback):
        """Makes the first attempt's aggregate unusable, after decoding."""

        def on_cohort_end(self, trainer, pl_module, round):
            if round.context.attempt == 0:
                round.aggregate = None

    runner = trainer(2, callbacks=[ears, Falls(), *reversed(codec_callbacks(module.codec)), pretraining()])
    order = [callback for callback in runner.callbacks if not isinstance(callback, Falls)]
    runner.callbacks[:] = [*order, *(callback for callback in runner.callbacks if isinstance(callback, Falls))]
    runner.fit(module, datamodule=federated_data())
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
    (decoder,) = (callback for callback in runner.callbacks if isinstance(callback, GradientDecoder))
    saved = torch.load(tmp_path / "two.ckpt", weights_only=False)["callbacks"]["GradientDecoder"]
    assert saved == decoder.state_dict() != {}
