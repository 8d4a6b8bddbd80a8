"""One client of a deployed federation: its `node.yaml`, and its answer to a letter of the server."""

from __future__ import annotations

import fcntl
import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedlight.clients.local_model import LocalModel
from fedlight.clients.personal import PersonalNorm
from fedlight.clients.store import ClientStore
from fedlight.core.errors import ConfigurationError, MessageError, require
from fedlight.core.kinds import derives_from, refuse_other_lightning
from fedlight.deploy.data import ClientData, Pair
from fedlight.deploy.disk import RunFolder
from fedlight.deploy.files import read_section
from fedlight.deploy.protocol import Envelope, Letter, OtherVersionError, Status, answer, settings_digest
from fedlight.deploy.settings import NotAllowedError, Parts, read_settings
from fedlight.rounds.held import HeldModels
from fedlight.rounds.host import ClientHost
from fedlight.rounds.messages import Download, Request

log = logging.getLogger(__name__)


class NodeConfig:
    """What the owner of a client decides: the content of `node.yaml`.

    Args:
        name: The client's name in the server's list of nodes.
        data: The client's samples.
        state: Folder of what the client keeps between messages, for its owner alone.
        identity: File of the private identity key, which secure aggregation needs.
        directory: Folder of all clients' public identity keys (``NAME.pub``).
        allow: Further modules or classes that a run may name, beside fedlight's and torch's layers and optimizers.
        device: Where the client trains.
        threads: CPU threads of a training.
        attempts: How many attempts' states are kept, for a server that resumes from an older checkpoint.
    """

    def __init__(
        self,
        name: str,
        data: ClientData,
        state: str,
        identity: str | None = None,
        directory: str | None = None,
        allow: Sequence[str] = (),
        device: str = "cpu",
        threads: int = 1,
        attempts: int = 16,
    ) -> None:
        self.name = name
        self.data = data
        self.state = Path(state).expanduser()
        self.identity = None if identity is None else Path(identity).expanduser()
        self.directory = None if directory is None else Path(directory).expanduser()
        self.allow = tuple(allow)
        self.device = torch.device(device)
        self.threads = threads
        self.attempts = attempts

    @classmethod
    def read(cls, path: Path) -> NodeConfig:
        """Return what the section `node` of a file says; relative paths in it start from the file's folder.

        Raises:
            ConfigurationError: if there is no such file, or something in it is wrong: a key, a class, a file that it names.
        """
        config = read_section(path, "node", cls)
        config.start_from(path.parent)
        if config.identity is not None:
            from fedlight.deploy.keys import require_key  # needs packages that the rest does without

            require_key(path, "node.identity", config.identity)
        if config.directory is not None:
            require(config.directory.is_dir(), f"Expected node.directory in {path} to be a folder but there is no {config.directory}")
        return config

    def start_from(self, folder: Path) -> None:
        """Let relative paths start from a folder."""
        self.state = folder / self.state
        self.identity = None if self.identity is None else folder / self.identity
        self.directory = None if self.directory is None else folder / self.directory
        self.data.start_from(folder)


class NoKeysError(ConfigurationError):
    """The client has no identity key, or no directory of the others'."""


class Node:
    """Answers the letters of a server, one at a time. All that it keeps between two is on its disk, so that its process may end.

    Args:
        config: what the client's owner decided.
    """

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self._parts: dict[bytes, Parts] = {}

    @cached_property
    def samples(self) -> Pair:
        """The client's samples, loaded once."""
        x, y = self.config.data.load()
        return x.to(self.config.device), y.to(self.config.device)

    def answer(self, letter: Letter) -> bytes:
        """Return the answer to a letter; whatever goes wrong is logged here, and the server is told a fixed reason."""
        torch.set_num_threads(self.config.threads)
        try:
            envelope = Envelope.parse(letter.question)
            if envelope.name != self.config.name:
                log.error("The server's letter is for %r and this node is %r", envelope.name, self.config.name)
                return answer(Status.OTHER_NAME)
            with self._alone():
                return self._answer(envelope, letter.download)
        except Exception as error:  # nothing of a client's errors may reach the server: their words could hold data
            status = next((status for kind, status in _STATUSES if isinstance(error, kind)), Status.FAILED)
            log.error("No answer (%s): %s", status.name, error, exc_info=status is Status.FAILED)
            return answer(status)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep a second process of the same client waiting."""
        self.config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.config.state / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _answer(self, envelope: Envelope, download: bytes) -> bytes:
        folder = RunFolder(self.config.state, envelope.run, self.config.attempts)
        parts = self._settings(envelope, folder)
        if parts is None:
            return answer(Status.LACKS_SETTINGS)
        request = Request.parse(envelope.client, envelope.request)
        if download:
            request = replace(request, download=Download.parse(download))
        host = self._host(parts)
        with _visit(host, folder, request):
            reply = next(host.answers([request]))
        if reply.simulation is not None and reply.simulation.reason:
            log.warning("Round %d: nothing usable to send: %s", request.context.round, reply.simulation.reason)
        log.info("Round %d, %s: %d bytes", request.context.round, request.stage, reply.nbytes)
        return answer(Status.ANSWER, reply.to_bytes())

    def _settings(self, envelope: Envelope, folder: RunFolder) -> Parts | None:
        """Return what the run's settings make, None if they are not here."""
        if envelope.digest not in self._parts:
            text = envelope.settings or folder.text("settings")
            if not text or settings_digest(text) != envelope.digest:
                return None
            if envelope.settings:
                folder.write_bytes("settings.json", text.encode())
            self._parts[envelope.digest] = self._built(text)
        parts = self._parts[envelope.digest]
        if parts.terms.nodes[envelope.client : envelope.client + 1] != (self.config.name,):
            raise ConfigurationError(f"Expected the number of {self.config.name} but got {envelope.client}")
        return parts

    def preload(self) -> None:
        """Read the settings of every run that are on the disk, so that processes forked from this one need not."""
        for path in self.config.state.glob("*/settings.json"):
            text = path.read_text()
            if settings_digest(text) not in self._parts:
                try:
                    self._parts[settings_digest(text)] = self._built(text)
                except Exception as error:  # of whatever a server sent: it must not end the node
                    log.debug("Settings in %s: %s", path, error)  # the process that answers says so

    def _built(self, text: str) -> Parts:
        """Return the parts, with the identity keys where secure aggregation needs them."""
        parts = read_settings(text, self.config.allow, self._set_up)
        if parts.aggregator.hides_messages:
            from fedlight.aggregation.secure import Directory  # needs packages that the rest does without

            if self.config.identity is None or self.config.directory is None:
                raise NoKeysError("Expected `identity` and `directory` in node.yaml, which secure aggregation needs")
            try:
                directory = Directory(self.config.directory, parts.terms.nodes, self.config.identity)
            except ConfigurationError as error:
                raise NoKeysError(str(error)) from error
            parts.aggregator.enroll(directory, settings_digest(text).hex())
        return parts

    def _set_up(self, parts: Parts) -> None:
        """Let a LightningModule make its layers, and give it the data module and a Trainer that it may ask."""
        refuse_other_lightning("network", parts.network)
        if derives_from(parts.network, "lightning"):
            from fedlight.modules.deployed import NodeRun  # Lightning, which other networks do without

            self.samples  # noqa: B018 (loaded first, as a Trainer sets data up before the module)
            network: Any = parts.network
            source = getattr(self.config.data, "source", None)
            run = NodeRun(network, source, parts.algorithm, parts.terms.rounds, self.config.device)
            parts.local_model = run.local_model

    def _local_model(self, parts: Parts) -> LocalModel:
        if parts.local_model is not None:
            return parts.local_model(parts.augmentation)
        network, loss = parts.network.to(self.config.device), parts.loss.to(self.config.device)
        return LocalModel(network, lambda module, x, y: loss(module(x), y), self.config.device, parts.augmentation)

    def _host(self, parts: Parts) -> ClientHost:
        own_seed = secrets.randbits(62)
        return ClientHost(
            self._local_model(parts),
            parts.algorithm,
            lambda client: self.samples,
            HeldModels(parts.codec),
            sealer=parts.aggregator.sealer(),
            hides_messages=parts.aggregator.hides_messages,
            by_samples=parts.weighting == "samples",
            personal=PersonalNorm(parts.network) if parts.batch_norm == "local" else None,
            privacy=parts.privacy,
            store=ClientStore(),
            private_seed=(lambda context: context.seed) if parts.terms.reproducible else (lambda context: own_seed),
        )


@contextmanager
def _visit(host: ClientHost, folder: RunFolder, request: Request) -> Iterator[None]:
    """Read from the disk what a client needs for the block, in which it answers; write what later requests build on, if that went well.

    It begins with the state as the last attempt that counted left it, and what the attempt in progress holds. The answer may leave after.
    """
    client, download, key = request.client, request.download, request.context.key
    held = folder.read("held")
    if held is not None:
        host.held.load_state_dict(held)
    kept = folder.state(request.settled)
    if kept is None and request.settled is not None and host.stateful:
        log.warning("What this client keeps between rounds is gone: it begins anew")
    draft = None if download is not None else folder.state(key)
    host.store.load_state_dict({"kept": {} if kept is None else {client: kept}, "drafts": {} if draft is None else {client: (key, draft)}})
    secret = folder.take_secret("session")  # deleted before it is used
    if download is None and (attempt := folder.read("attempt")) is not None:
        now = host.resume(client, attempt)
        if secret:
            host.sealer.resume(client, secret, now)
    yield
    if download is not None and (download.keep or download.encoders or download.decoders):
        folder.write("held", host.held.state_dict())
    draft = host.store.take_draft([client]).get(client)
    if draft is not None:
        folder.keep_state(key, draft, request.settled)
    secret = host.sealer.suspend(client)
    if secret or host.waits(client):
        folder.write("attempt", host.suspend(client))
    else:
        folder.delete("attempt")
    if secret:
        folder.write_bytes("session", secret)


_STATUSES: tuple[tuple[type[Exception], Status], ...] = (
    (OtherVersionError, Status.OTHER_VERSION),
    (NotAllowedError, Status.NOT_ALLOWED),
    (NoKeysError, Status.NO_KEYS),
    (ConfigurationError, Status.BAD_SETTINGS),
    (MessageError, Status.FAILED),
    (OSError, Status.NO_ROOM),
)
