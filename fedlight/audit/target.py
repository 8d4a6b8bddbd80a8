"""The target of an audit: a model at given weights, its clients' images, and fitted codecs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fedlight.audit.attacks import Attack, Auxiliary
from fedlight.audit.plan import Parts
from fedlight.audit.victim import ManyRounds, Pixels, Victim
from fedlight.audit.views import CodeView, NoisyView, Observation, RoundsView, View
from fedlight.clients.algorithms import FedAvg
from fedlight.clients.local_model import LocalModel
from fedlight.clients.proxy import record_bank
from fedlight.core.bank import UpdateBank
from fedlight.core.checkpoint import read_checkpoint
from fedlight.core.codec import Codec
from fedlight.core.errors import ConfigurationError, require
from fedlight.core.layout import Layout
from fedlight.core.random import derive_seed, numpy_generator, torch_generator
from fedlight.data import FederatedDataModule
from fedlight.data.arrays import shift_and_scale

COHORT = 10
"""Number of clients whose mean update moves the global model between the rounds of an observation."""

CLIP_COHORT = 20
"""Number of public images whose median code length is the default clip norm."""


class Target:
    """The model under audit at some weights, with all that is built once for it: victims, views, codecs fitted to recorded rounds."""

    def __init__(self, parts: Parts, network: nn.Module, codecs: dict[str, Codec], lr: float, proxy_rounds: int) -> None:
        self.parts = parts
        self.network = network
        self.codecs = codecs
        self.lr = lr
        self.proxy_rounds = proxy_rounds
        self.pixels = pixel_constants(parts.data)
        if parts.data.proxy is None:
            raise ConfigurationError("Expected public proxy data for attackers and codecs but there is none: raise `data.proxy_samples`")
        x, y = parts.data.proxy
        self.context = Auxiliary(self.pixels.images(x).clamp(0, 1), y, parts.data.num_classes)
        self._victims: dict[tuple[str, int, int], Victim] = {}
        self._banks: dict[tuple[str, int, int], UpdateBank] = {}
        self._views: dict[tuple[str, Observation], View | ConfigurationError] = {}

    def victim(self, attack: Attack | None, observation: Observation) -> Victim:
        """Return the clients' computation; the network is the server's tampered one if the attack tampers."""
        key = (_tampering(attack), observation.local_steps, observation.rounds)
        if key not in self._victims:
            plain = self._plain_victim(self.network, observation)
            sent = attack.tamper(plain, self.context) if attack is not None else None
            require(sent is None or observation.rounds == 1, "an attack that changes the model was not written for several `rounds`")
            victim = plain if sent is None else self._plain_victim(sent, observation)
            self._victims[key] = victim if observation.rounds == 1 else ManyRounds(self._successive(victim, observation))
        return self._victims[key]

    def _plain_victim(self, network: nn.Module, observation: Observation) -> Victim:
        return Victim(network, self.parts.loss, self.pixels, self.lr, observation.local_steps)

    def _successive(self, first: Victim, observation: Observation) -> list[Victim]:
        """Return the clients' computation in successive rounds; between them the server steps by the mean update of real clients."""
        victims, seed = [first], derive_seed(self.parts.seed, "audit rounds")
        for number in range(observation.rounds - 1):
            images, labels = self.draw(seed, number, min(COHORT, self.parts.data.num_population), observation.batch_size)
            step = first.layout.split(victims[-1].mean_update(images, labels))
            network = copy.deepcopy(victims[-1].network)
            weights = [p for p in network.parameters() if p.requires_grad]
            with torch.no_grad():
                for weight, change in zip(weights, step, strict=True):
                    weight.sub_(change)
            victims.append(self._plain_victim(network, observation))
        return victims

    def view(self, attack: Attack | None, observation: Observation) -> View:
        """Return the observation's view of updates; raises ``ConfigurationError`` if the audit cannot handle its codec."""
        key = (_tampering(attack), observation)
        if key not in self._views:
            try:
                self._views[key] = self._make_view(attack, observation)
            except ConfigurationError as error:
                self._views[key] = error
        view = self._views[key]
        if isinstance(view, ConfigurationError):
            raise view
        return view

    def _make_view(self, attack: Attack | None, observation: Observation) -> View:
        if observation.rounds > 1:
            return RoundsView(self.view(attack, replace(observation, rounds=1)), observation.rounds)
        if observation.noise:
            one = Observation(observation.codec, 1, observation.batch_size, observation.local_steps)
            view = self.view(attack, one)
            return NoisyView(view, observation.clip or self.typical_length(attack, one, view), observation.noise)
        if observation.codec is None:
            return View()
        if observation.clients > 1:  # the same codec, fitted once
            return self.view(attack, Observation(observation.codec, 1, observation.batch_size, observation.local_steps))
        codec = copy.deepcopy(self.codecs[observation.codec])
        bank = self._bank(attack, observation)
        if codec.needs_fit:
            self.parts.fit(codec, bank)
        else:
            codec.bind(bank.layout)
        return CodeView(codec)

    def typical_length(self, attack: Attack | None, observation: Observation, view: View) -> float:
        """Return the median length of the messages of public images."""
        victim, size = self.victim(attack, observation), observation.batch_size
        batches = min(CLIP_COHORT, len(self.context.labels) // size)
        lengths = []
        for i in range(max(batches, 1)):
            x, y = self.context.images[i * size : (i + 1) * size], self.context.labels[i * size : (i + 1) * size]
            lengths.append(view.observe(victim.update(x, y)[None], torch_generator("audit", "clip", i)).norm())
        return float(torch.stack(lengths).median())

    def _bank(self, attack: Attack | None, observation: Observation) -> UpdateBank:
        """Return updates on proxy data of the observed kind, starting from the audited weights."""
        key = (_tampering(attack), observation.batch_size, observation.local_steps)
        if key not in self._banks:
            network = copy.deepcopy(self.victim(attack, observation).network).float()
            model = LocalModel(network, lambda net, x, y: self.parts.loss(net(x), y))
            algorithm = FedAvg(lr=self.lr, batch_size=observation.batch_size, steps=observation.local_steps)
            assert self.parts.data.proxy is not None
            self._banks[key] = record_bank(
                model,
                model.weights.clone(),
                model.buffers.clone(),
                algorithm,
                self.parts.data.proxy,
                self.parts.data.num_classes,
                rounds=self.proxy_rounds,
                clients=COHORT,
                samples=observation.batch_size,
                alpha=0.5,
                seed=derive_seed(self.parts.seed, "audit"),
            )
        return self._banks[key]

    def draw(self, seed: int, trial: int, clients: int, size: int) -> tuple[Tensor, Tensor]:
        """Return images ``[clients, size, c, h, w]`` and labels of a cohort of real clients; a larger cohort contains the smaller."""
        data, rng = self.parts.data, numpy_generator(seed, "audit", trial)
        able = [client for client in rng.permutation(data.num_population).tolist() if data.client_size(client) >= size]
        require(len(able) >= clients, f"Expected {clients} clients with at least {size} images each but the data has {len(able)}")
        images, labels = [], []
        for client in able[:clients]:
            x, y = data.client_data(client)
            rows = torch.from_numpy(numpy_generator(seed, "audit", trial, client).permutation(len(y))[:size])
            images.append(self.pixels.images(x[rows]).clamp(0, 1))
            labels.append(y[rows])
        return torch.stack(images), torch.stack(labels)

    def others(self, count: int, seed: int, trial: int) -> tuple[Tensor, Tensor]:
        """Return ``count`` test images ``[count, c, h, w]``, which no client has, and their labels."""
        x, y = self.parts.data.test
        rows = torch.from_numpy(numpy_generator(seed, "audit others", trial).permutation(len(y))[:count])
        return self.pixels.images(x[rows]).clamp(0, 1), y[rows]


def _tampering(attack: Attack | None) -> str:
    """Return a key for the network that an attack sends, "" for the clients' own."""
    changes = attack is not None and type(attack).tamper is not Attack.tamper
    return f"{type(attack).__name__} {vars(attack)}" if changes else ""


def pixel_constants(data: FederatedDataModule) -> Pixels:
    """Return the constants that the data module standardizes images with; raises ``ConfigurationError`` if the data is not images."""
    if len(data.input_shape) != 3:
        raise ConfigurationError(f"Expected images [channels, height, width] to audit but the data has inputs {list(data.input_shape)}")
    channels = data.input_shape[0]
    if not data.normalize:
        return Pixels(torch.zeros(1, channels, 1, 1), torch.ones(1, channels, 1, 1))
    return Pixels(*shift_and_scale(data.source.load(data.root).x_train))


def trained_network(network: nn.Module, path: str) -> nn.Module:
    """Return a copy of the network with a checkpoint's weights; raises ``ConfigurationError`` if the file holds no such network."""
    require(Path(path).is_file(), f"Expected `ckpt_path` to be a checkpoint but there is no file {path}: correct the path")
    stored = read_checkpoint(Path(path)).get("state_dict", {})
    trained = copy.deepcopy(network)
    prefixed = {key.removeprefix("network."): value for key, value in stored.items() if key.startswith("network.")}
    state = stored if set(stored) == set(trained.state_dict()) else prefixed  # a LightningModule's own names, or those of a part
    own = Layout(tuple(trained.state_dict()), tuple(tuple(value.shape) for value in trained.state_dict().values()))
    got = Layout(tuple(state), tuple(tuple(value.shape) for value in state.values()))
    require(own == got, f"Expected a checkpoint of the network in `base` but {path} holds another: set the same `overrides`")
    trained.load_state_dict(state)
    return trained
