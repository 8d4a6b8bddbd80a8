"""Hooks of a federated round, on top of Lightning's."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from fedlight.core.rounds import Round, Upload


class FederatedCallback(Callback):
    """A Lightning callback that also hears of rounds. `FederatedModule` calls these hooks on callbacks of this class only.

    The order in a round: ``on_round_start``; for every client ``on_client_update`` (on the client's side of the wire) and
    ``on_client_message`` (on the server's); ``on_cohort_end`` after each pass, once the sums of all processes have been added;
    ``on_round_end``. Between a client's two hooks the next client may be trained, while a thread encodes the message.
    """

    def on_round_start(self, trainer: Trainer, pl_module: LightningModule, round: Round) -> None:
        """Called before the first client of an attempt (and before each further pass of a codec with several)."""

    def on_client_update(self, trainer: Trainer, pl_module: LightningModule, round: Round, upload: Upload) -> None:
        """Called with a client's update, on the client's side: may read it, change it (before the encoder) and set ``upload.message``."""

    def on_client_message(self, trainer: Trainer, pl_module: LightningModule, round: Round, upload: Upload) -> None:
        """Called when the client's message has arrived, on the server's side: use ``upload.message`` and ``upload.weight`` alone."""

    def on_cohort_end(self, trainer: Trainer, pl_module: LightningModule, round: Round) -> None:
        """Called with the sum of the whole cohort in ``round.codes``: sets ``round.aggregate``."""

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule, round: Round) -> None:
        """Called when the server has taken its step."""
