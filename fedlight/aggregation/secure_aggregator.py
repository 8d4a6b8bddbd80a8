"""Secure aggregation as a part of a federated run: `model.aggregator`."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedlight.aggregation.base import TRAIN, AggregationSetting, Aggregator, Collector, Held, Sealer
from fedlight.core.codec import Codec, Context, Encoder
from fedlight.core.codec_needs import require_additive, require_fixed_width
from fedlight.core.digest import digest_context, digest_tensors, encoder_digest
from fedlight.core.errors import ConfigurationError, ProtocolError
from fedlight.core.model import Model
from fedlight.core.running_sum import RunningSum
from fedlight.core.wire import Message

if TYPE_CHECKING:
    from fedlight.aggregation.secure import Directory, Identities, SecureClient, SecureServer, Session

log = logging.getLogger(__name__)

FEW = 10

ADVERTISE_KEYS, SHARE_KEYS, CONSISTENCY_CHECK, UNMASKING = "advertise_keys", "share_keys", "consistency_check", "unmasking"
"""The stages of the handshake, by the names of Bonawitz et al. 2017, Figure 4; masked codes are sent in the stage of training."""


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
        sim_logs: Whether to log what a simulation sees and the server would not: losses, the true aggregate, saturation.

    Raises:
        ConfigurationError: if a number is out of range, the packages of the extra `secure` are missing, or (before training) the run cannot
            be aggregated securely.
    """

    stages = (ADVERTISE_KEYS, SHARE_KEYS, TRAIN, CONSISTENCY_CHECK, UNMASKING)
    hides_messages = True
    opened_by = UNMASKING

    def __init__(self, cohort: int, threshold: int | None = None, max_weight: int = 1, sim_logs: bool = False) -> None:
        from fedlight.aggregation import secure  # needs packages that the rest does without

        if max_weight < 1:
            raise ConfigurationError(f"Expected `max_weight` >= 1 but got {max_weight}")
        self.cohort = cohort
        self.threshold = secure.default_threshold(cohort) if threshold is None else threshold
        secure.check_threshold(cohort, self.threshold)
        self.max_weight = max_weight
        self.sim_logs = sim_logs
        self.identities: Identities | Directory = secure.Identities()
        self._training = ""

    def check(self, setting: AggregationSetting) -> None:
        """Refuse what cannot be summed behind masks, and what would tell of a client beside them."""
        from fedlight.aggregation import secure

        self.enroll(self.identities, setting.training)
        codec, name = setting.codec, type(setting.codec).__name__
        if setting.scalars:
            raise ConfigurationError(
                f"Expected an algorithm whose clients upload vectors alone, but those of {setting.algorithm} upload "
                "numbers of 32 bits beside them, whose sum takes more than the 32 bits that masked sums have: set `model.algorithm` to "
                "FedAvg or FedProx, or leave `model.aggregator` out"
            )
        require_additive(codec, "secure aggregation")
        require_fixed_width(codec, "secure aggregation")
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
        if codec.most_clients and (self.cohort > codec.most_clients or self.max_weight > 1):
            raise ConfigurationError(
                f"Expected sums of at most the {codec.most_clients} codes that the codec has room for, all of weight 1, but the declared "
                f"{self.cohort} clients have weights of up to {self.max_weight}: raise `clients` of WindowCodec and leave "
                "`model.aggregator.init_args.max_weight` out"
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

    def enroll(self, directory: Mapping[int, bytes], settings: str) -> None:
        """Take the clients' identity keys, and the settings that they train by."""
        from fedlight.aggregation import secure

        assert isinstance(directory, (secure.Directory, secure.Identities))
        self.identities, self._training = directory, settings

    def sealer(self) -> Sealer:
        """Return the clients' half; simulated clients get the identities that this object keeps in memory."""
        return SecureSealer(self)

    def collector(self, context: Context, codec: Codec, cohort: Sequence[int], model: Model, device: torch.device) -> Collector:
        """Return the server's half of one session."""
        from fedlight.aggregation import secure

        session = self.session(secrets.token_bytes(secure.SESSION_BYTES), Held(context, codec.encoder, model))
        return SecureCollector(self, session, cohort, device)

    def session(self, id: bytes, held: Held) -> Session:
        """Return the public parameters of one attempt as whoever holds this context, encoder and model knows them."""
        from fedlight.aggregation import secure

        encoder = held.encoder
        return secure.Session(
            id,
            held.context.round,
            secure.SumFormat.of(encoder.format, self.cohort, self.max_weight),
            self.threshold,
            encoder.fingerprint,
            encoder_digest(encoder),
            held.model.digest,
            digest_context(held.context),
            digest_tensors({}, self._training),
        )


class SecureSealer(Sealer):
    """Masks codes: one client of the protocol for every client and attempt.

    Args:
        aggregator: the settings, and the clients' identity keys.
    """

    def __init__(self, aggregator: SecureAggregator) -> None:
        self.aggregator = aggregator
        self._session: tuple[bytes, Encoder, Model, Session] | None = None  # the last, which all clients of an attempt share
        self._clients: dict[int, SecureClient] = {}

    def answer(self, stage: str, client: int, payload: bytes, held: Held) -> bytes:
        """Return the client's keys, shares, signature of the survivors or unmasking shares."""
        if stage == ADVERTISE_KEYS:
            return self._begin(client, payload, held).advertise()
        answers = {SHARE_KEYS: "share", CONSISTENCY_CHECK: "consistency", UNMASKING: "unmask"}
        if stage not in answers or client not in self._clients:
            raise ProtocolError(f"Expected a stage of a session that client {client} takes part in but was asked for {stage!r}")
        message: bytes = getattr(self._clients[client], answers[stage])(payload)
        if stage == UNMASKING:
            del self._clients[client]
        return message

    def seal(self, client: int, code: Tensor, weight: int, payload: bytes, held: Held) -> Message:
        """Return the masked code; the code as the encoder made it never leaves the client."""
        if client not in self._clients:
            raise ProtocolError(f"Expected a session that client {client} takes part in but there is none")
        return self._clients[client].masked_code(payload, code.detach().cpu().numpy(), weight)

    def suspend(self, client: int) -> bytes:
        """Return the client's secrets and forget them."""
        return self._clients.pop(client).suspend() if client in self._clients else b""

    def resume(self, client: int, secrets: bytes, held: Held) -> None:
        """Go on with the session that the secrets are of."""
        from fedlight.aggregation import secure

        self._begin(client, secure.session_of(secrets), held).resume(secrets)

    def _begin(self, client: int, payload: bytes, held: Held) -> SecureClient:
        from fedlight.aggregation import secure

        last = self._session
        if last is None or last[0] != payload or last[1] is not held.encoder or last[2] is not held.model:
            last = self._session = (payload, held.encoder, held.model, self.aggregator.session(payload, held))
        identities = self.aggregator.identities
        begun = secure.SecureClient(last[3], client, identities.of(client), identities)
        self._clients[client] = begun
        return begun


class SecureCollector(Collector):
    """Runs the server of one session: it holds one sum of masked words and the shares, never a code.

    Args:
        aggregator: the settings, and the directory of identity keys.
        session: the attempt's public parameters.
        cohort: the clients of the attempt.
        device: where the sum lies.

    Raises:
        ProtocolError: if the cohort is larger than declared.
    """

    def __init__(self, aggregator: SecureAggregator, session: Session, cohort: Sequence[int], device: torch.device) -> None:
        from fedlight.aggregation import secure

        self.cohort = [int(client) for client in cohort]
        self.server: SecureServer = secure.SecureServer(session, self.cohort, aggregator.identities)
        self.device = device

    def requests(self, stage: str) -> Mapping[int, bytes] | None:
        """Close the stage before, and return what each client needs for this one."""
        server = self.server
        if stage == ADVERTISE_KEYS:
            return dict.fromkeys(self.cohort, server.session.id)
        if stage == TRAIN:
            return {client: server.inbox(client) for client in server.sharers()}
        clients, message = {
            SHARE_KEYS: (server.keys, server.roster),
            CONSISTENCY_CHECK: (server.survivors, server.survivor_list),
            UNMASKING: (server.signatures, server.request),
        }[stage]
        return dict.fromkeys(sorted(clients), message())

    def receive(self, stage: str, client: int, message: Message, weight: int) -> None:
        """Take one client's message of a stage; masked codes are added up, and none is seen."""
        server = self.server
        collect = {
            ADVERTISE_KEYS: server.collect_keys,
            SHARE_KEYS: server.collect_shares,
            TRAIN: server.collect_masked,
            CONSISTENCY_CHECK: server.collect_signature,
            UNMASKING: server.collect_unmasking,
        }
        collect[stage](client, bytes(message))  # bytes as they were sent: no copy

    def finish(self) -> RunningSum:
        """Take the masks off the survivors' sum.

        The server learns how many codes are in it and the sum of their weights; where weights differ it does not learn how much, so all
        count equally in the sum's effective number.
        """
        total, weight, wrapped, lost = self.server.total()
        if lost:
            log.warning("%.3g %% of the sum left its windows and could not be put right: it is left out", 100 * lost)
        self.faults = dict.fromkeys(sorted(self.server.liars), "the share that it revealed, or was dealt, is wrong")
        codes = RunningSum()
        codes.total = torch.from_numpy(total).to(self.device)
        codes.count = len(self.server.survivors)
        codes.weight = weight
        codes.squares = Fraction(weight * weight, codes.count)
        codes.wrapped, codes.lost = wrapped, lost
        return codes
