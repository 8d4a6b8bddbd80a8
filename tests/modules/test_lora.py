"""Adapters on a frozen network: they alone are trained, encoded, sent, counted and saved."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fedlight
from fedlight.clients import ClientOptimizer, FedAvg
from fedlight.codecs import HalfCodec, QSGDCodec
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout
from fedlight.data import Everyone
from fedlight.modules import MLP, CharTransformer, LoRA
from fedlight.rounds import CatchUp, ThroughBytes
from tests.federation import federated, federated_data, pretraining, trainer
from tests.own import TEXT, Characters


def small() -> CharTransformer:
    torch.manual_seed(0)
    return CharTransformer(width=8, heads=2, layers=1, length=12)


def test_an_adapted_network_is_the_network_at_first_and_only_adapters_train() -> None:
    x = torch.randint(97, (3, 12), generator=torch.Generator().manual_seed(1))
    made, base = LoRA(small(), rank=2), small()
    assert torch.equal(made(x), base(x))
    names = Layout.of(made).names
    assert len(names) == 2 * 7 and all(name.endswith((".a", ".b")) for name in names)
    assert len(Layout.of(LoRA(small(), layers=["query", "value"])).names) == 4
    more = Layout.of(LoRA(small(), layers=["query"], trained=["classifier.bias", "norm.weight"])).names
    assert {name for name in more if not name.endswith((".a", ".b"))} == {"network.classifier.bias", "network.norm.weight"}


def test_adapters_are_float32_on_a_base_of_any_type() -> None:
    made = LoRA(nn.Sequential(nn.Linear(4, 3)).bfloat16(), rank=1)
    assert {p.dtype for p in made.parameters() if p.requires_grad} == {torch.float32}
    assert made(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="`layers` to end the name of a linear layer of CharTransformer but got \\['nothing'\\]"):
        LoRA(small(), layers=["nothing"])
    with pytest.raises(ConfigurationError, match="`rank` >= 1"):
        LoRA(small(), rank=0)
    torch.save(MLP(4, [], 2).state_dict(), tmp_path / "other.pt")
    for name, message in (("none.pt", "cannot be read"), ("other.pt", "the weights of a CharTransformer")):
        with pytest.raises(ConfigurationError, match=message):
            LoRA(small(), str(tmp_path / name))


def network(base: str | None = None) -> nn.Module:
    torch.manual_seed(1)
    return LoRA(MLP(6, [16], 3), base, rank=2)


def test_only_adapters_travel_and_are_saved_and_a_run_resumes_from_them(tmp_path) -> None:
    """The base is a checkpoint of a run of its own."""
    torch.manual_seed(0)
    first = trainer(2, callbacks=[pretraining()])
    first.fit(federated(MLP(6, [16], 3)), datamodule=federated_data())
    base = str(tmp_path / "base.ckpt")
    first.save_checkpoint(base)

    def run(rounds: int, ckpt_path: str | None = None) -> tuple[nn.Module, fedlight.FederatedModule, str]:
        own = network(base)
        module = federated(own, algorithm=FedAvg(lr=0.2, steps=3, batch_size=8), codec=QSGDCodec(8))
        made, path = trainer(rounds, callbacks=[pretraining()]), str(tmp_path / f"{rounds}.ckpt")
        made.fit(module, datamodule=federated_data(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        made.save_checkpoint(path)
        return own, module, path

    own, module, path = run(2)
    held = {
        f"network.{name}": tensor
        for name, tensor in torch.load(base, weights_only=True)["state_dict"].items()
        if name.startswith("network.")
    }
    frozen = {name: p for name, p in own.named_parameters() if not p.requires_grad}
    assert {name.replace("base.", "") for name in frozen} == {name.removeprefix("network.") for name in held}
    assert all(torch.equal(p, held[f"network.{name.replace('base.', '')}"]) for name, p in frozen.items())
    adapters = 2 * (6 + 16) + 2 * (16 + 3)
    assert module.layout.dim == adapters
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert sum(tensor.numel() for tensor in saved.values()) == adapters
    sent = module.server_state.traffic
    assert sent.mean_message < adapters + 60  # about a byte a number
    whole, resumed = run(4)[0], run(4, path)[0]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert any(bool(p.any()) for name, p in whole.named_parameters() if name.endswith(".b"))


# -- a LightningModule with dict batches and adapters of its own, as with other libraries -------------------------------


class Adapter(nn.Module):
    """Somebody's adapter."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Model(nn.Module):
    """Takes and returns dicts; its frozen part is in bfloat16, with a table and a mask as buffers."""

    def __init__(self) -> None:
        super().__init__()
        letters = len(set(TEXT))
        self.embed = nn.Embedding(letters, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(16, letters)
        self.register_buffer("positions", torch.randn(12, 16))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(12))
        self.requires_grad_(False)
        self.embed.bfloat16()
        self.head = Adapter(self.head)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embed(tokens).float() + self.positions
        hidden = hidden + self.attend(hidden, hidden, hidden, attn_mask=self.mask, need_weights=False)[0]
        logits = self.head(hidden)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}
        return {"logits": logits, **loss}


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Model()

    def training_step(self, batch, batch_idx):
        return self.model(batch["tokens"], labels=batch["next"])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(batch["tokens"], labels=batch["next"])["loss"])

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.03)


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Characters(TEXT[:-100]), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Characters(TEXT[-100:]), batch_size=8)


@pytest.mark.parametrize("downlink", [None, CatchUp])
def test_somebody_elses_adapters_in_a_module_of_dict_batches(downlink) -> None:
    own, first = Lit(), Lit()
    more = {"codec": QSGDCodec(8)} if downlink is None else {"downlink": downlink(), "clients": ThroughBytes(), "codec": HalfCodec()}
    algorithm = ClientOptimizer(steps=5, batch_size=16)
    module = fedlight.federate(own, Data(), num_clients=4, sampler=Everyone(), algorithm=algorithm, **more)
    trainer(8).fit(module)
    trained = [name for name, p in own.named_parameters() if p.requires_grad]
    assert trained == ["model.head.lora_A.weight", "model.head.lora_B.weight"] == list(module.layout.names)
    assert module.layout.dim == 2 * 16 + 2 * len(set(TEXT)) and not module.server_state.extras
    for name, tensor in first.state_dict().items():
        same = torch.equal(own.state_dict()[name], tensor)
        assert same != (name in trained), name
    losses = []
    for lit in (first.eval(), own.eval()):
        losses.append(torch.stack([lit.training_step(batch, 0)["loss"].detach() for batch in Data().val_dataloader()]).mean())
    assert losses[1] < losses[0] - 0.3
