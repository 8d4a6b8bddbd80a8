"""A client's training loop is Lightning's: the same hooks in the same order, epochs, steps, rates, modes, samples and weights."""

from __future__ import annotations

import copy
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import fedlight
from fedlight.aggregation.base import TRAIN
from fedlight.clients import ClientOptimizer
from fedlight.core.codec import Context
from fedlight.core.errors import ConfigurationError, LocalTrainingError
from fedlight.data import Everyone
from fedlight.modules import FederatedModule
from fedlight.rounds import Download, Request
from tests.federation import weights_of
from tests.integration.test_own_module import fit

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Line(LightningDataModule):
    """Forty samples in order, four batches of ten."""

    def __init__(self, **loader) -> None:
        super().__init__()
        x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
        self.set = TensorDataset(x, x.sum(1, keepdim=True))
        self.options = loader

    def train_dataloader(self):
        return DataLoader(self.set, **{"batch_size": 10} | self.options)


DIARIES: dict[str, list] = {}
"""What modules have written down, by name: outside of them, because every client begins with what a module held."""


class Own(LightningModule):
    """Writes down what happens to it."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 1)
        self.name = name or f"module {len(DIARIES)}"
        DIARIES.setdefault(self.name, [])

    @property
    def diary(self) -> list:
        return DIARIES[self.name]

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def plainly(own: LightningModule, data: LightningDataModule, epochs: int) -> LightningModule:
    torch.manual_seed(0)
    Trainer(**QUIET, max_epochs=epochs, limit_val_batches=0).fit(own, data)
    return own


def federated(own: LightningModule, data: LightningDataModule, rounds: int, epochs: int | None = 1, steps: int | None = None, **more):
    algorithm = ClientOptimizer(batch_size=10, epochs=None if steps else epochs, steps=steps)
    module = fedlight.federate(own, data, num_clients=1, algorithm=algorithm, **more)
    fit(module, rounds=rounds)
    return own


HOOKS = ("on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad")
HOOKS += ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_batch_transfer", "on_after_batch_transfer")


AFTER_ZERO_GRAD = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end")


def noting(hook: str):
    """Return a hook that notes its name, the epoch, the step and what it can see of the trainer."""

    def note(self, *arguments):
        seen = [p.grad for p in self.parameters() if p.grad is not None and hook in AFTER_ZERO_GRAD]
        grads = sum(float(grad.abs().sum()) for grad in seen)
        batch = arguments[0][0].sum().item() if hook.endswith("transfer") else None
        rate = self.optimizers().param_groups[0]["lr"]
        self.diary.append((hook, self.current_epoch, self.global_step, self.trainer.is_last_batch, round(grads, 4), batch, round(rate, 6)))
        return arguments[0] if hook.endswith("transfer") else None

    return note


@pytest.mark.parametrize("local", [{"epochs": 1}, {"epochs": 2}, {"steps": 4}], ids=str)
def test_one_client_calls_what_the_trainer_calls_in_its_order(local):
    class Noting(Own):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]

    for hook in HOOKS:
        setattr(Noting, hook, noting(hook))
    rounds = 4 // local.get("epochs", 1)
    plain, own = plainly(Noting(), Line(), epochs=4), federated(Noting(), Line(), rounds, **local)
    # The Trainer fetches a batch ahead, so that transfers alone come earlier.
    hooks, transfers = ([[e for e in one.diary if e[0].endswith("transfer") == moved] for one in (own, plain)] for moved in (False, True))
    assert hooks[0] == hooks[1] and len(hooks[0]) == 4 * (2 + 4 * 6)
    assert [entry[5] for entry in transfers[0]] == [entry[5] for entry in transfers[1]]
    torch.testing.assert_close(weights_of(own), weights_of(plain), rtol=1e-6, atol=1e-6)


def constant(optimizer):
    return []


def warm_up(optimizer):
    return {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10)), "interval": "step"}


def one_cycle(optimizer):
    return {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=33, cycle_momentum=False), "interval": "step"}


def linear(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=5)


def every_other(optimizer):
    return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "frequency": 2}


def in_turn(optimizer):
    first = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    then = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {"scheduler": torch.optim.lr_scheduler.SequentialLR(optimizer, [first, then], [3]), "interval": "step"}


@pytest.mark.parametrize("local", [{"epochs": 1}, {"steps": 4}, {"epochs": 4}], ids=str)
@pytest.mark.parametrize("schedule", [constant, warm_up, one_cycle, linear, every_other, in_turn])
def test_schedules_go_on_from_round_to_round(schedule, local):
    class Scheduled(Own):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            made = schedule(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": made} if made else optimizer

    plain = plainly(Scheduled(), Line(), epochs=8)
    own = federated(Scheduled(), Line(), 8 // local.get("epochs", 1), **local)
    torch.testing.assert_close(weights_of(own), weights_of(plain), rtol=1e-5, atol=1e-6)


def test_a_schedule_knows_how_long_the_run_is():
    class Long(Own):
        def configure_optimizers(self):
            self.diary.append((self.trainer.estimated_stepping_batches, self.trainer.max_epochs, self.trainer.num_training_batches))
            return super().configure_optimizers()

    own = federated(Long(), Line(), 6, steps=4)
    assert own.diary[-1] == (24, 6, 4)


def test_a_teacher_that_hooks_move_moves_on_a_client():
    """As far as a client goes: its copy's teacher follows, batch by batch."""

    class Teacher(Own):
        def __init__(self) -> None:
            super().__init__()
            self.slow = copy.deepcopy(self.net).requires_grad_(False)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert set(outputs) == {"loss"} and not outputs["loss"].requires_grad
            with torch.no_grad():
                self.slow.weight.lerp_(self.net.weight, 0.5)
            self.diary.append(self.slow.weight.clone())

    plain, own = plainly(Teacher(), Line(), epochs=1), federated(Teacher(), Line(), 1)
    torch.testing.assert_close(torch.stack([*own.diary]), torch.stack([*plain.diary]))


def test_an_epoch_that_its_hook_ends_early_is_over():
    class Short(Own):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    plain, own = plainly(Short(), Line(), epochs=3), federated(Short(), Line(), 3)
    torch.testing.assert_close(weights_of(own), weights_of(plain), rtol=1e-6, atol=1e-6)


def test_gradients_are_those_that_hooks_leave():
    class Clipped(Own):
        def on_before_optimizer_step(self, optimizer):
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)

    plain, own = plainly(Clipped(), Line(), epochs=2), federated(Clipped(), Line(), 2)
    torch.testing.assert_close(weights_of(own), weights_of(plain), rtol=1e-6, atol=1e-6)


class Frozen(Own):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).requires_grad_(False).eval()

    def training_step(self, batch, batch_idx):
        assert self.net.training and not any(part.training for part in self.backbone.modules())
        return nn.functional.mse_loss(self.net(self.backbone(batch[0])), batch[1])


def test_parts_that_were_left_in_evaluation_mode_stay_in_it():
    own = federated(Frozen(), Line(), 2)
    assert not own.backbone[1].running_mean.any() and not own.backbone[1].num_batches_tracked
    torch.testing.assert_close(weights_of(own), weights_of(plainly(Frozen(), Line(), epochs=2)), rtol=1e-6, atol=1e-6)


def test_layers_of_a_plain_network_too():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval().requires_grad_(False), nn.Linear(4, 1))
    module = fedlight.federate(network, Line(), num_clients=2, loss=nn.MSELoss())
    fit(module, rounds=2)
    assert not network[1].running_mean.any()


# -- data ------------------------------------------------------------------------------------------------------------------


class Numbers(Own):
    """Notes which samples a client sees, by their number in the second tensor."""

    def training_step(self, batch, batch_idx):
        self.diary.append(batch[1].flatten().tolist())
        return self.net(batch[0]).square().mean()


class Numbered(Line):
    def __init__(self, **loader) -> None:
        super().__init__(**loader)
        self.set = TensorDataset(self.set.tensors[0], torch.arange(40)[:, None])


@pytest.mark.parametrize("local", [{"epochs": 1}, {"steps": 3}, {"steps": 4}], ids=str)
def test_samples_come_in_order_where_the_loader_does_not_shuffle_and_go_on_in_the_next_round(local):
    own = federated(Numbers(), Numbered(), 4, **local)
    seen = [number for batch in own.diary for number in batch]
    assert seen == [i % 40 for i in range(len(seen))] and len(seen) == (160 if local != {"steps": 3} else 120)


def test_a_loader_that_shuffles_does():
    own = federated(Numbers(), Numbered(shuffle=True), 2)
    first, second = ([number for batch in own.diary[part : part + 4] for number in batch] for part in (0, 4))
    assert first != second and sorted(first) == sorted(second) == list(range(40)) != first


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"sampler": SubsetRandomSampler(range(5, 25))}, {1: 20}),
        ({"sampler": list(range(5, 25))}, {1: 20}),
        ({"drop_last": True, "sampler": SubsetRandomSampler(range(5, 30))}, {1: 20}),
        ({"sampler": RandomSampler(range(40), num_samples=20)}, {1: 20}),
    ],
    ids=["subset", "list", "drop_last", "fewer"],
)
def test_only_samples_that_the_sampler_gives_are_trained_on(options, counts):
    own = federated(Numbers(), Numbered(**options), 1)
    seen = [number for batch in own.diary for number in batch]
    assert len(seen) == len({*seen}) == counts[1] and all(len(batch) == 10 for batch in own.diary)
    if not isinstance(options["sampler"], RandomSampler):
        assert {*seen} <= {*range(5, 30)}


def test_a_weighted_sampler_weighs_within_a_client():
    weights = [9.0 if i % 10 == 0 else 1.0 for i in range(40)]
    sampler = WeightedRandomSampler(weights, 40)
    own = Numbers()
    fit(fedlight.federate(own, Numbered(sampler=sampler), num_clients=2, algorithm=ClientOptimizer(batch_size=10, epochs=50)), rounds=1)
    seen = [number for batch in own.diary for number in batch]
    assert len(seen) == 2000 and 0.44 < sum(i % 10 == 0 for i in seen) / 2000 < 0.56


class Backwards(torch.utils.data.Sampler):
    def __iter__(self):
        return iter(range(39, -1, -1))

    def __len__(self):
        return 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": Backwards()}, "`sampler` of Numbered's.*got Backwards: give `shuffle`"),
        ({"batch_sampler": [[0, 1], [2]], "batch_size": 1}, "`batch_sampler` of Numbered's.*got list"),
        ({"batch_size": None}, "makes batches but it has `batch_size` None"),
    ],
)
def test_samplers_that_cannot_be_split_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        federated(Numbers(), Numbered(**options), 1)


class Splitting(LightningDataModule):
    """Draws its split in every call of `setup`, and needs the Trainer there."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def setup(self, stage):
        self.calls.append(stage)
        self.batch_size = 10 // self.trainer.world_size
        whole = TensorDataset(torch.randn(60, 4), torch.arange(60)[:, None])
        self.train_set, self.val_set = torch.utils.data.random_split(whole, [40, 20])

    def teardown(self, stage):
        self.calls.append(f"end of {stage.value}")

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(self.val_set, batch_size=self.batch_size)


class Validating(Numbers):
    def __init__(self) -> None:
        super().__init__()
        self.validated: list = []

    def validation_step(self, batch, batch_idx):
        assert self.trainer.datamodule.batch_size == 10
        self.validated.extend(batch[1].flatten().tolist())


def test_a_data_module_is_set_up_once_a_fit_and_sees_the_trainer():
    data, own = Splitting(), Validating()
    fit(fedlight.federate(own, data, num_clients=4), rounds=4)
    trained = {number for batch in own.diary for number in batch}
    assert data.calls == ["fit", "end of fit"]
    assert len(trained) == 40 and not trained & {*own.validated} and len({*own.validated}) == 20


def test_transfer_hooks_of_a_data_module_are_called_on_clients_and_in_evaluation():
    class Doubling(Splitting):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0], 1000 + batch[1]]

    own = Validating()
    fit(fedlight.federate(own, Doubling(), num_clients=4), rounds=1)
    assert min(min(batch) for batch in own.diary) >= 1000 <= min(own.validated)


class Drawing(Dataset):
    """Items with noise from one of the process's generators."""

    def __init__(self, draw) -> None:
        self.x = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
        self.draw = draw

    def __len__(self):
        return 30

    def __getitem__(self, i):
        return self.x[i] * self.draw(), self.x[i].sum(0, keepdim=True)


DRAWS = {"torch": lambda: float(torch.rand(())), "python": random.random, "numpy": lambda: float(np.random.rand())}  # noqa: NPY002


@pytest.mark.parametrize("draw", DRAWS)
def test_what_items_draw_depends_on_client_round_and_seed_alone(draw):
    class Noisy(Line):
        def train_dataloader(self):
            return DataLoader(Drawing(DRAWS[draw]), batch_size=10)

    def updates(order, seed):
        random.seed(seed), np.random.seed(seed)  # noqa: NPY002
        module = fedlight.federate(Own(), Noisy(), num_clients=3, sampler=Everyone(), seed=5)
        fit(module, rounds=1)
        states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        model, host = module.server.model.read(), module._connection.host
        requests = [Request(client, TRAIN, Context(round=1, seed=5), Download(1, model=model, result=model)) for client in order]
        found = {reply.client: reply.simulation.update.clone() for reply in host.answers(requests)}
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002
        return found

    one, other = updates([0, 1, 2], 0), updates([2, 0, 1], 1)
    assert all(torch.equal(one[client], other[client]) for client in range(3))


# -- the server's side -----------------------------------------------------------------------------------------------------


def test_hooks_of_the_server_are_called_once_and_what_they_make_reaches_clients():
    class Server(Own):
        def on_fit_start(self):
            self.first = torch.zeros(1)
            self.diary.append("fit start")

        def on_train_start(self):
            self.second = torch.zeros(1)
            self.diary.append("train start")

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.first.sum() + self.second.sum()

        def on_train_end(self):
            self.diary.append("train end")

        def on_fit_end(self):
            self.diary.append("fit end")

        def teardown(self, stage):
            self.diary.append(f"end of {stage.value}")

    assert federated(Server(), Line(), 2).diary == ["fit start", "train start", "train end", "fit end", "end of fit"]


def test_hooks_of_evaluation_are_passed_on_in_lightnings_order():
    names = [name for name in fedlight.modules.contract.FORWARDED if "validation" in name] + ["on_validation_epoch_start"]

    class Evaluated(Own):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))
            return {"seen": len(batch[0])}

        def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
            self.diary.append(("on_validation_batch_end", outputs["seen"]))

    for name in names:
        if name not in ("on_validation_batch_end",):
            setattr(Evaluated, name, lambda self, *_, hook=name: self.diary.append(hook))

    class Both(Line):
        def val_dataloader(self):
            return self.train_dataloader()

    plain, own = Evaluated(), Evaluated()
    expected = Trainer(**QUIET).validate(plain, Both(), verbose=False)
    trainer = Trainer(**QUIET)
    assert trainer.validate(fedlight.federate(own, Both(), num_clients=2), verbose=False) == expected
    assert own.diary == plain.diary and len(own.diary) > 10


def test_callbacks_that_the_module_brings_are_used():
    class Stopping(Own):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

        def val_dataloader(self):
            return DataLoader(TensorDataset(torch.zeros(4, 4)))

        def train_dataloader(self):
            return Line().train_dataloader()

        def configure_callbacks(self):
            return EarlyStopping("val_loss", patience=1)

    trainer = fit(fedlight.federate(Stopping(), num_clients=2), rounds=30, val_check_interval=1)
    assert trainer.global_step == 2


class Built(Own):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = nn.Linear(4, 1)


class BuiltInSetup(Built):
    configure_model = LightningModule.configure_model

    def setup(self, stage):
        Built.configure_model(self)


@pytest.mark.parametrize("kind", [Built, BuiltInSetup])
def test_layers_may_be_made_when_lightning_makes_them(kind):
    own = federated(kind(), Line(), 3)
    assert own.net.weight.grad is not None or len(weights_of(own)) == 5


def test_the_epoch_of_the_server_is_the_round():
    class Watching(Own):
        def validation_step(self, batch, batch_idx):
            self.diary.append((self.current_epoch, self.trainer.sanity_checking))

        def val_dataloader(self):
            return DataLoader(TensorDataset(torch.zeros(1, 4)))

        def train_dataloader(self):
            return Line().train_dataloader()

    own = Watching()
    fit(fedlight.federate(own, num_clients=1), rounds=3, val_check_interval=1)
    assert own.diary == [(0, True), (0, False), (1, False), (2, False)]


def test_parts_that_are_modules_themselves_see_the_clients_trainer():
    class Inner(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x):
            self.log("inner", x.mean())
            return self.layer(x) * (1 + 0 * self.trainer.current_epoch + 0 * self.global_step)

    class Outer(Own):
        def __init__(self) -> None:
            super().__init__()
            self.net = Inner()

    federated(Outer(), Line(), 2)


# -- checkpoints -----------------------------------------------------------------------------------------------------------


class Saved(Own):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.strict_loading = False

    def state_dict(self):
        return {name: value for name, value in super().state_dict().items() if not name.startswith("frozen")}

    def on_save_checkpoint(self, checkpoint):
        assert "net.weight" in checkpoint["state_dict"]
        checkpoint["more"] = 7

    def on_load_checkpoint(self, checkpoint):
        self.diary.append(checkpoint["more"])


def test_a_runs_checkpoint_is_one_of_the_users_module(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    own = Saved(lr=0.02)
    module = fedlight.federate(own, Line(), num_clients=2)
    fit(module, rounds=2, enable_checkpointing=True, callbacks=[saver])
    mine = Saved.load_from_checkpoint(saver.best_model_path)
    assert torch.equal(mine.net.weight, own.net.weight) and mine.hparams.lr == 0.02 and [*mine.diary] == [7]
    again = FederatedModule.load_from_checkpoint(saver.best_model_path, network=Saved())
    assert torch.equal(again.module.net.weight, own.net.weight) and again.module is again.network
    with pytest.raises(ConfigurationError, match="Expected `network`.*MyModule.load_from_checkpoint"):
        FederatedModule.load_from_checkpoint(saver.best_model_path)
    resumed = Saved(lr=0.02)
    trainer = Trainer(**QUIET, max_steps=4, max_epochs=-1, limit_val_batches=0)
    trainer.fit(fedlight.federate(resumed, Line(), num_clients=2), ckpt_path=saver.best_model_path)
    assert trainer.global_step == 4 and 7 in resumed.diary
    flip_a_weight(Path(saver.best_model_path), own.net.weight)
    with pytest.raises(ConfigurationError, match="damaged or none"):
        FederatedModule.load_from_checkpoint(saver.best_model_path, network=Saved())
    damaged = Saved.load_from_checkpoint(saver.best_model_path)  # Lightning compares nothing, but zip archives have checksums
    assert not torch.equal(damaged.net.weight, own.net.weight)
    assert zipfile.ZipFile(saver.best_model_path).testzip() is not None


def flip_a_weight(path: Path, weight: torch.Tensor) -> None:
    raw = bytearray(path.read_bytes())
    raw[raw.index(weight.detach().numpy().tobytes()) + 2] ^= 1
    path.write_bytes(raw)


def test_a_federated_module_is_loaded_from_no_url_whose_checkpoint_could_run_code():
    with pytest.raises(ConfigurationError, match="Expected checkpoints to be files of this machine but got http"):
        FederatedModule.load_from_checkpoint("http://localhost:9/last.ckpt", network=Saved())


def test_averages_of_the_global_model_are_saved_and_resumed(tmp_path):
    def run(rounds, **resumed):
        averaging = EMAWeightAveraging(decay=0.5)
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
        trainer = Trainer(**QUIET | {"enable_checkpointing": True}, max_steps=rounds, limit_val_batches=0, callbacks=[averaging, saver])
        own = Own()
        trainer.fit(fedlight.federate(own, Line(), num_clients=2), **resumed)
        return weights_of(own)

    run(2)
    torch.testing.assert_close(run(4, ckpt_path=tmp_path / "last.ckpt"), run(4))


def test_batches_of_several_loaders_reach_hooks_that_ask_which_loader_they_are_of():
    class Several(Own):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            return None

        def on_validation_batch_start(self, batch, batch_idx, dataloader_idx):
            self.diary.append((batch_idx, dataloader_idx))

    class Two(Line):
        def val_dataloader(self):
            return [self.train_dataloader(), self.train_dataloader()]

    own = Several()
    Trainer(**QUIET).validate(fedlight.federate(own, Two(), num_clients=2), verbose=False)
    assert own.diary == [(batch, loader) for loader in range(2) for batch in range(4)]


def test_a_module_pickles_after_training():
    module = fedlight.federate(BoringModel(), num_clients=4)
    fit(module, rounds=1)
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(weights_of(again), weights_of(module))
    assert pickle.dumps(module.module)


# -- what is refused, and said in whose words ------------------------------------------------------------------------------


def optimized(make):
    return type("Optimized", (Own,), {"configure_optimizers": lambda self: make(self.parameters())})()


def with_plateau(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    plateau = {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "val_loss"}
    return {"optimizer": optimizer, "lr_scheduler": plateau}


class Lazy(Own):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optimized(torch.optim.LBFGS), "one gradient a step but got LBFGS.*choose SGD or Adam"),
        (lambda: optimized(with_plateau), "schedule of steps but got ReduceLROnPlateau.*no client has"),
        (Lazy, "net.1.weight of LazyLinear has none: run one batch"),
        (lambda: torch.compile(Own(), backend="eager"), r"got torch.compile\(Own\).*compile the networks within it"),
    ],
)
def test_what_no_client_could_do_is_refused_before_training(make, message):
    with pytest.raises(ConfigurationError, match=message):
        federated(make(), Line(), 1)


def test_a_compiled_round_is_refused():
    module = torch.compile(fedlight.federate(Own(), Line(), num_clients=1), backend="eager")
    with pytest.raises(ConfigurationError, match="a round is no graph.*compile the networks within yours"):
        fit(module, rounds=1)


def test_an_exception_in_a_clients_training_names_client_round_and_step_in_its_own_words():
    class Failing(Own):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 2:
                raise KeyError("no such column")
            return super().training_step(batch, batch_idx)

    with pytest.raises(LocalTrainingError, match="Client 0 failed in round 1, in local step 3 of its training: KeyError: 'no such column'"):
        federated(Failing(), Line(), 3)
