"""Secure aggregation as a part of a federated run: `model.aggregator`."""

from __future__ import annotations

import logging
import secrets
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedlight.aggregation.base import AggregationSetting, Aggregator
from fedlight.aggregation.drop_outs import DropOuts
from fedlight.core.codec import Codec, Decoder, require_additive
from fedlight.core.digest import digest_context, digest_tensors, encoder_digest
from fedlight.core.errors import ConfigurationError
from fedlight.core.rounds import Round, Upload
from fedlight.core.running_sum import RunningSum
from fedlight.core.wire import read_message, saturation

if TYPE_CHECKING:
    from fedlight.aggregation.secure import SecureCohort

log = logging.getLogger(__name__)

FEW = 10


class SecureAggregator(Aggregator):
    """The server learns the sum of at least `threshold` clients' integer codes and no single one (Bonawitz et al. 2017).

    In a simulation all clients live in this process; the server's side is given their messages alone. Every attempt at a round has new
    keys and masks, and none of them is kept, so no key or mask is in a checkpoint (the clients' own state is). A round in which too few
    clients answer is repeated. Every byte is counted: the masked code is the client's message, headroom included; keys, shares and
    signatures are counted beside it.

    Args:
        cohort: The declared cohort: no round may have more clients, and sums are wide enough for so many.
        threshold: Clients that must answer at every stage; fewer cannot learn anything together with the server (more than two thirds of
            the cohort if not given).
        max_weight: The largest weight of a client, such as its number of samples; 1 if all count equally.
        drop_outs: Clients that fall silent in the middle of rounds (nobody if not given).
        sim_logs: Whether to log what a simulation sees and the server would not: losses, the true aggregate, saturation.

    Raises:
        ConfigurationError: if a number is out of range, the packages of the extra `secure` are missing, or (before training) the run cannot
            be aggregated securely.
    """

    hides_messages = True

    def __init__(
        self,
        cohort: int,
        threshold: int | None = None,
        max_weight: int = 1,
        drop_outs: DropOuts | None = None,
        sim_logs: bool = False,
    ) -> None:
        from fedlight.aggregation import secure  # needs packages that the rest does without

        if max_weight < 1:
            raise ConfigurationError(f"Expected `max_weight` >= 1 but got {max_weight}")
        self.cohort = cohort
        self.threshold = secure.default_threshold(cohort) if threshold is None else threshold
        secure.check_threshold(cohort, self.threshold)
        self.max_weight = max_weight
        self.drop_outs = drop_outs
        self.sim_logs = sim_logs
        self._identities = secure.Identities()
        self._running: SecureCohort | None = None
        self._codec: Codec
        self._training = ""

    # -- before the run ----------------------------------------------------------------------------------------------------------

    def check(self, setting: AggregationSetting) -> None:
        """Refuse what cannot be summed behind masks, and what would tell of a client beside them."""
        from fedlight.aggregation import secure

        self._training = setting.training
        codec, name = setting.codec, type(setting.codec).__name__
        if setting.scalars:
            raise ConfigurationError(
                f"Expected an algorithm whose clients upload vectors alone, but those of {setting.algorithm} upload "
                "numbers of 32 bits beside them, whose sum takes more than the 32 bits that masked sums have: set `model.algorithm` to "
                "FedAvg or FedProx, or leave `model.aggregator` out"
            )
        require_additive(codec, "secure aggregation")
        if not codec.integer:
            raise ConfigurationError(
                f"Expected a codec of integers, which secure aggregation needs, but {name} sends floats: put a QuantizeCodec behind it "
                "in a ChainCodec, or use TransformCodec"
            )
        if codec.passes > 1:
            raise ConfigurationError(
                f"Expected a codec of one pass a round but {name} takes {codec.passes}: secure aggregation sums one code of each client. "
                "Choose another codec"
            )
        if setting.processes > 1:
            raise ConfigurationError(
                f"Expected one process but got {setting.processes}: the simulated clients keep their secrets in one. Set `trainer.devices` "
                "to 1, or leave `model.aggregator` out"
            )
        if setting.buffers:
            raise ConfigurationError(
                "Expected no BatchNorm statistics to be sent, which would travel in the clear beside the masked code: set "
                "`model.batch_norm` to local, or use a network with another normalisation"
            )
        if setting.cohort > self.cohort:
            raise ConfigurationError(
                f"Expected rounds of at most the declared {self.cohort} clients but got {setting.cohort}: raise "
                "`model.aggregator.init_args.cohort` or sample fewer clients"
            )
        if setting.min_clients > self.threshold:
            raise ConfigurationError(
                f"Expected `model.min_clients` of at most the threshold of {self.threshold} but got {setting.min_clients}: sums of fewer "
                "codes would be opened, and thrown away for those of a repeated round. Raise `model.aggregator.init_args.threshold`"
            )
        if setting.largest_weight > self.max_weight:
            raise ConfigurationError(
                f"Expected weights of at most the declared {self.max_weight} but the largest is {setting.largest_weight}: raise "
                "`model.aggregator.init_args.max_weight`, or set `model.weighting` to equal"
            )
        if codec.bound:
            secure.SumFormat.of(codec.encoder.format, self.cohort, self.max_weight)
        if self.cohort < FEW:
            log.warning(
                "Secure aggregation of %d clients: the sum of so few codes tells much about each; %d or more hide better", self.cohort, FEW
            )

    # -- an attempt --------------------------------------------------------------------------------------------------------------

    def open(self, round: Round, codec: Codec, weights: Tensor) -> None:
        """Have the cohort exchange keys and shares; clients that fall silent meanwhile do not train."""
        from fedlight.aggregation import secure

        self._running, self._codec = None, codec
        context, encoder = round.context, codec.encoder
        told = replace(context, broadcast={**context.broadcast, "server": round.server})  # by the codec's server and the algorithm's
        session = secure.Session(
            secrets.token_bytes(secure.SESSION_BYTES),
            context.round,
            secure.SumFormat.of(encoder.format, self.cohort, self.max_weight),
            self.threshold,
            encoder.fingerprint,
            encoder_digest(encoder),
            digest_tensors({"weights": weights}),
            digest_context(told),
            digest_tensors({}, self._training),
        )
        clients = [int(client) for client in round.cohort]
        silent = self.drop_outs.draw(context.round, context.attempt, clients) if self.drop_outs else {}
        running = secure.SecureCohort(session, clients, self._identities, silent)
        try:
            here = set(running.open())
        finally:
            self._count(round, running)
        self._running = running
        gone = [client for client in clients if client not in here]
        round.dropped += [(client, f"it fell silent at the {silent[client]} stage") for client in gone]
        round.mine = np.array([client for client in round.mine.tolist() if client in here], dtype=np.int64)

    def leave(self, round: Round, upload: Upload) -> None:
        """Put the client's masks on its code: the client's side."""
        assert self._running is not None
        # The code as the encoder packed it never leaves the client.
        encoded, upload.message = upload.message, b""
        encoder = self._codec.encoder
        code = encoder.format.unpack(read_message(encoded, encoder.format, round.context.round, encoder.fingerprint))
        upload.message = self._running.send(upload.client, code.numpy(), upload.weight)
        upload.weighted = False  # the weight travels inside the sum
        if round.true is not None:
            round.saturation.append(saturation(code, encoder.format))

    def arrive(self, round: Round, upload: Upload, decoder: Decoder, device: torch.device) -> Tensor | None:
        """Add the masked code to the sum of masked codes: the server's side."""
        assert self._running is not None
        self._running.receive(upload.client, bytes(upload.message))  # bytes as they were sent: no copy
        return None

    def close(self, round: Round, device: torch.device) -> None:
        """Have the survivors take off the masks of their sum.

        The server learns how many codes are in it and the sum of their weights; where weights differ it does not learn how much, so all
        count equally in the sum's effective number.
        """
        running, self._running = self._running, None
        assert running is not None
        try:
            total, weight = running.close()
        finally:
            self._count(round, running)
        codes = RunningSum()
        codes.total = torch.from_numpy(total).to(device)
        codes.count = len(running.server.alive())
        codes.weight = weight
        codes.squares = Fraction(weight * weight, codes.count)
        round.codes = codes

    @staticmethod
    def _count(round: Round, running: SecureCohort) -> None:
        up, down = running.take_bytes()
        round.handshake_up += up
        round.handshake_down += down
