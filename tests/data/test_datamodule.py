from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer

from fedlight.core.errors import ConfigurationError, DataError
from fedlight.data import (
    IID,
    ArrayFile,
    CropFlip,
    Digits,
    Explicit,
    FederatedDataModule,
    Natural,
    Shards,
    Torchvision,
    Uniform,
    WithClients,
    check_partition,
)


def name(case: object) -> str:
    """Return a test's name for its case, the same in every process: classes, not addresses."""
    if isinstance(case, dict):
        return ", ".join(
            f"{key}={value if isinstance(value, int | float | str | None) else type(value).__name__}" for key, value in case.items()
        )
    return str(case)


def make(**arguments) -> FederatedDataModule:
    data = FederatedDataModule(**arguments)
    data.setup()
    return data


def rows(*tensors: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for tensor in tensors for row in tensor}


@pytest.fixture
def numbered(tmp_path):
    """A source whose samples can be told apart: the only feature of a sample is its number, 10000 on for the test set."""
    y = np.arange(1000) % 4
    x = np.arange(1000, dtype=np.float32)[:, None]
    np.savez(tmp_path / "numbers.npz", x_train=x, y_train=y, x_test=x[:101] + 10_000, y_test=y[:101], client_train=y + 50)
    return ArrayFile(str(tmp_path / "numbers.npz"))


def numbers(x: torch.Tensor) -> set[int]:
    return set(x.flatten().int().tolist())


def test_defaults_work_without_any_file():
    data = make()
    assert data.num_population == 20
    assert data.num_classes == 10
    assert data.input_shape == (1, 8, 8)
    assert data.proxy is not None and len(data.proxy[1]) == 200
    assert data.val is data.proxy
    assert len(data.y) + 200 + len(data.test[1]) == 1797
    check_partition(data.partition, len(data.y))
    assert sum(data.client_size(client) for client in range(20)) == len(data.y)
    assert len(data.holdout.order) == 0
    assert "1238 samples of 20 clients" in str(data)


def test_all_splits_are_disjoint_and_complete(numbered):
    data = make(source=numbered, proxy_samples=70, val_fraction=0.1, client_holdout=0.25, partitioner=IID())
    assert data.proxy is not None and data.val is not None
    proxy, val = numbers(data.proxy[0]), numbers(data.val[0])
    train = set().union(*(numbers(data.client_data(client)[0]) for client in range(20)))
    held = numbers(data.x[data.holdout.order])
    assert [len(part) for part in (proxy, val)] == [70, 100]
    assert len(held) == pytest.approx(0.25 * 830, abs=20)
    assert proxy | val | train | held == set(range(1000))
    assert len(proxy) + len(val) + len(train) + len(held) == 1000
    assert numbers(data.test[0]) == set(range(10_000, 10_101))
    for x, y in (data.proxy, data.val, data.test, data.client_data(3)):
        assert torch.equal(x.flatten().long() % 10_000 % 4, y)
    assert torch.bincount(data.val[1]).tolist() == [25] * 4


def test_a_clients_data_is_a_part_of_memory_not_a_copy_whatever_is_held_out(numbered):
    data = make(source=numbered, client_holdout=0.25)
    for client in range(data.num_population):
        x, y = data.client_data(client)
        assert x.untyped_storage().data_ptr() == data.x.untyped_storage().data_ptr()
        assert torch.equal(x, data.x[data.train_partition[client]]) and torch.equal(y, data.y[data.train_partition[client]])
    with pytest.raises(IndexError, match="client"):
        data.client_data(data.num_population)


def test_seed_decides_every_split_and_nothing_else_does(numbered):
    def build(seed):
        return make(source=numbered, seed=seed, client_holdout=0.2)

    torch.manual_seed(1)
    first = build(0)
    torch.manual_seed(2)
    again, other = build(0), build(1)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert torch.equal(first.x, again.x)
    assert np.array_equal(first.holdout.order, again.holdout.order)
    assert np.array_equal(first.cohort(3, 1), again.cohort(3, 1))
    assert not np.array_equal(first.cohort(3, 1), other.cohort(3, 1))
    assert torch.equal(first.test[0], other.test[0])


@pytest.mark.parametrize(
    "change",
    [{"num_clients": 10}, {"partitioner": IID()}, {"proxy_samples": 201}, {"client_holdout": 0.1}, {"normalize": False}, {"seed": 5}],
    ids=name,
)
def test_fingerprint_differs_with_every_setting_of_the_data(change):
    assert make().fingerprint() != make(**change).fingerprint()


def test_fingerprint_and_setup_are_stable():
    data = make()
    before, x = data.fingerprint(), data.x
    data.setup("test")
    assert data.x is x
    assert data.to("cpu").fingerprint() == before


def test_natural_clients_after_holdout(numbered):
    data = make(source=numbered, partitioner=Natural(), num_clients=None, sampler=Uniform(2))
    assert data.num_population == 4
    for client in range(4):
        assert set(data.client_data(client)[1].tolist()) == {client}


def test_explicit_clients_index_the_whole_training_set(numbered):
    lists = [list(range(400)), list(range(400, 900))]
    data = make(source=numbered, partitioner=Explicit(lists), num_clients=None, sampler=Uniform(2))
    assert data.proxy is not None
    for client, whole in enumerate(lists):
        assert numbers(data.client_data(client)[0]) == set(whole) - numbers(data.proxy[0])


def test_foreign_proxy_holds_nothing_out(numbered, tmp_path):
    y = np.arange(30) % 2
    np.savez(tmp_path / "proxy.npz", x_train=-np.ones((30, 1)), y_train=y, x_test=-np.ones((2, 1)), y_test=y[:2])
    source = ArrayFile(str(tmp_path / "proxy.npz"))
    data = make(source=numbered, proxy_source=source, val_fraction=0.1)
    assert data.proxy is not None and numbers(data.proxy[0]) == {-1}
    assert len(data.proxy[1]) == 30
    assert len(data.y) == 900
    fewer = make(source=numbered, proxy_source=source, val_fraction=0.1, proxy_samples=7).proxy
    assert fewer is not None and len(fewer[1]) == 7
    with pytest.raises(ConfigurationError, match="proxy_samples: expected at most the 30"):
        make(source=numbered, proxy_source=source, val_fraction=0.1, proxy_samples=31)
    with pytest.raises(DataError, match=r"proxy_source: expected inputs of shape \(1, 8, 8\) as in Digits, got \(1,\)"):
        make(proxy_source=source, val_fraction=0.1)


def test_no_proxy_at_all():
    data = make(proxy_samples=0)
    assert data.proxy is None
    assert data.val_dataloader() == []
    assert make(proxy_fraction=0.0, val_fraction=0.1).proxy is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"proxy_samples": 1500}, "proxy_samples: expected samples for clients among the 1438"),
        ({"proxy_samples": -1}, "proxy_samples: expected 0 or more"),
        ({"proxy_fraction": 1.0}, "proxy_fraction: expected a share"),
        ({"val_fraction": -0.1}, "val_fraction: expected a share"),
        ({"client_holdout": 1.0}, "client_holdout: expected a share"),
        ({"eval_batch_size": 0}, "eval_batch_size: expected at least 1"),
        ({"proxy_source": Digits()}, "val_fraction: expected above 0 with a proxy_source"),
        ({"proxy_source": Digits(), "val_fraction": 0.1, "proxy_samples": 0}, "proxy_samples: expected more than 0 with a proxy_source"),
        ({"client_holdout": 0.1, "proxy_samples": 0}, "val_fraction: client_holdout needs a global validation set"),
        ({"num_clients": 5}, "cohort larger than the population"),
        ({"num_clients": 5000}, "more clients than samples"),
        ({"num_clients": None}, "needs a number, got None"),
        ({"partitioner": Natural(), "num_clients": None}, "Natural needs client ids"),
    ],
    ids=name,
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        make(**arguments)


def test_augmentation_of_features_is_refused(numbered):
    with pytest.raises(ConfigurationError, match="CropFlip expected images"):
        make(source=numbered, augmentation=CropFlip())


def test_root_is_argument_then_variable_then_data(monkeypatch):
    monkeypatch.setenv("FEDLIGHT_DATA", "from-variable")
    assert str(FederatedDataModule(root="given").root) == "given"
    assert FederatedDataModule().root == Path("from-variable").absolute()
    monkeypatch.delenv("FEDLIGHT_DATA")
    assert str(FederatedDataModule().root) == "data"


def test_normalize():
    assert make().x.min() < 0
    assert make(normalize=False).x.min() == 0


def test_rounds_are_endless():
    loader = make().train_dataloader()
    assert [int(number) for number, _ in zip(loader, range(5), strict=False)] == list(range(5))
    assert not hasattr(loader, "__len__")


def test_validation_loaders_hold_the_proxy_and_the_clients_holdouts(numbered):
    data = make(source=numbered, client_holdout=0.2, eval_batch_size=33)
    whole, clients = data.val_dataloader()
    data.to("cpu")  # loaders follow the tensors
    assert data.val is data.proxy is not None
    assert set().union(*(numbers(batch[0]) for batch in whole)) == numbers(data.val[0])
    seen = set()
    for x, y, client in clients:
        assert torch.equal(x.flatten().long() % 4, y)
        for number, owner in zip(x.flatten().tolist(), client.tolist(), strict=True):
            assert number in data.x[data.partition[owner]]
            seen.add(int(number))
    assert seen == numbers(data.x[data.holdout.order])


class Counting(LightningModule):
    """Counts what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": 0, "val": 0, "clients": 0, "test": 0}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        self.seen["train"] += 1
        self.log("train/loss", self.weight, on_epoch=True)  # the batch size of a round is found, and is 1
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx, dataloader_idx):
        self.seen[("val", "clients")[dataloader_idx]] += len(batch[1])

    def test_step(self, batch, batch_idx):
        self.seen["test"] += len(batch[1])

    def predict_step(self, batch, batch_idx):
        return batch.flatten(1)[:, 0]


@pytest.mark.filterwarnings("error:.*(num_workers|IterableDataset|zero length|batch_size)")
def test_under_a_trainer(tmp_path):
    data = FederatedDataModule(client_holdout=0.2, eval_batch_size=50)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "default_root_dir": tmp_path}
    trainer = Trainer(
        max_steps=4, val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=0, log_every_n_steps=1, **options
    )
    model = Counting()
    trainer.fit(model, data)
    assert trainer.global_step == 4
    trainer.test(model, data, verbose=False)
    assert model.seen == {"train": 4, "val": 200, "clients": int(data.holdout.sizes.sum()), "test": 359}
    assert torch.equal(torch.cat(trainer.predict(model, data)), data.test[0].flatten(1)[:, 0])


def test_built_from_configuration_with_short_names():
    parser = ArgumentParser()
    parser.add_class_arguments(FederatedDataModule, "data")
    config = {
        "source": {"class_path": "WithClients", "init_args": {"source": "Torchvision", "path": "ids.npz"}},
        "partitioner": {"class_path": "Shards", "init_args": {"shards_per_client": 3}},
        "sampler": {"class_path": "fedlight.data.Uniform", "init_args": {"cohort_size": 5}},
        "augmentation": "CropFlip",
        "num_clients": None,
    }
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # renamed in jsonargparse 4.49
    data = instantiate(parser.parse_object({"data": config})).data
    assert isinstance(data.source, WithClients) and isinstance(data.source.source, Torchvision)
    assert isinstance(data.partitioner, Shards) and data.partitioner.shards_per_client == 3
    assert isinstance(data.augmentation, CropFlip)
    assert data.sampler.cohort_size == 5
    help_text = parser.format_help()
    for name in ("source", "partitioner", "num_clients", "proxy_source", "eval_batch_size", "seed"):
        entry = help_text.split(f"--data.{name} ", 1)[1]
        assert not entry.split("\n")[1].strip().startswith("(type"), f"{name} has no help"


def test_mnist_writers_as_clients(real_data):
    source = WithClients(Torchvision("MNIST", download=False), "mnist_writers.npz")
    data = make(source=source, partitioner=Natural(), num_clients=None, root=str(real_data), client_holdout=0.2)
    assert data.num_population == 539
    assert len(data.y) == 57_000
    check_partition(data.partition, 57_000)
    x, y = data.client_data(0)
    assert x.shape[1:] == (1, 28, 28)
    assert len(y) == data.client_size(0)
