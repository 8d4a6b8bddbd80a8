"""Checkpoints hold nothing of single clients: that lies in a file of its own, without which no run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from fedlight.aggregation import SecureAggregator
from fedlight.clients.ditto import Ditto
from fedlight.clients.feddyn import FedDyn
from fedlight.clients.scaffold import Scaffold
from fedlight.codecs import TopKCodec
from fedlight.core.checkpoint import read_checkpoint, write_checkpoint
from fedlight.core.errors import ConfigurationError
from fedlight.data import Poisson, Uniform
from fedlight.modules import checkpoints
from fedlight.privacy import CentralDP
from fedlight.rounds import CatchUp
from tests.federation import federated, federated_data, learned, mlp, pretraining, trainer, weights_of

RUNS: dict[str, dict[str, Any]] = {
    "FedDyn, noise": {"algorithm": FedDyn(lr=0.05, steps=2), "privacy": CentralDP(clip=0.5, noise_multiplier=1.0)},
    "Ditto, masks": {"algorithm": Ditto(lr=0.05, steps=2), "aggregator": SecureAggregator(5), "codec": learned},
    "SCAFFOLD": {"algorithm": Scaffold(lr=0.05, steps=2)},
    "error feedback": {"codec": lambda: TopKCodec(4)},
    "local BatchNorm, sums to catch up with": {"batch_norm": "local", "norm": True, "downlink": CatchUp()},
}


def make(kind: str):
    settings = {name: value() if name == "codec" else value for name, value in RUNS[kind].items()}
    return federated(mlp(norm=settings.pop("norm", False)), **settings)


def data(kind: str, **changes: Any):
    return federated_data(**{"sampler": Poisson(0.6) if "noise" in kind else Uniform(5), "normalize": "noise" not in kind} | changes)


def fit(kind: str, rounds: int, path: Path | None = None):
    module, runner = make(kind), trainer(rounds, callbacks=[pretraining()])
    runner.fit(module, datamodule=data(kind), ckpt_path=path)
    return module, runner


def tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    for part in parts:
        yield from tensors(part)


def clients_file(path: Path) -> Path:
    (found,) = path.parent.glob(f"{path.stem}.*.clients.keep-secret")
    return found


@pytest.mark.parametrize("kind", RUNS)
def test_a_checkpoint_holds_nothing_of_single_clients_and_goes_on_with_the_file_beside_it(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "two.ckpt"
    module, runner = fit(kind, 2)
    runner.save_checkpoint(path)
    kept = [tensor for tensor in tensors(module.store.state_dict()) if tensor.numel() > 1]
    assert kept, "the clients keep nothing that could be found"
    public, beside = (list(tensors(read_checkpoint(place))) for place in (path, clients_file(path)))
    assert not any(torch.equal(mine, tensor) for mine in kept for tensor in public)
    assert all(any(torch.equal(mine, tensor) for tensor in beside) for mine in kept)
    assert clients_file(path).stat().st_mode & 0o077 == 0, "others may read it"
    if "privacy" not in RUNS[kind]:  # noise of the operating system
        straight, (resumed, _) = fit(kind, 4)[0], fit(kind, 4, path)
        assert torch.equal(weights_of(resumed), weights_of(straight))


def test_who_took_part_and_what_draws_cohorts_is_in_the_file_of_clients(tmp_path: Path) -> None:
    module, runner = fit("FedDyn, noise", 2)
    runner.save_checkpoint(tmp_path / "two.ckpt")
    secret = read_checkpoint(clients_file(tmp_path / "two.ckpt"))
    assert secret["settled"] == module.server_state.settled and secret["cohort_seed"] == module.privacy.cohort_seed is not None
    assert str(module.privacy.cohort_seed) not in str(read_checkpoint(tmp_path / "two.ckpt"))
    resumed, _ = fit("FedDyn, noise", 2, tmp_path / "two.ckpt")
    assert resumed.privacy.cohort_seed == module.privacy.cohort_seed


def test_a_missing_or_damaged_file_of_clients_ends_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "two.ckpt"
    fit("SCAFFOLD", 2)[1].save_checkpoint(path)
    beside = clients_file(path)
    raw = bytearray(beside.read_bytes())
    raw[len(raw) // 2] ^= 1
    beside.write_bytes(raw)
    with pytest.raises(ConfigurationError, match=f"whole checkpoint at .*{beside.name}"):
        fit("SCAFFOLD", 4, path)
    beside.unlink()
    with pytest.raises(ConfigurationError, match=f"Expected {beside.name} beside the checkpoint"):
        fit("SCAFFOLD", 4, path)


def test_the_global_model_is_evaluated_without_the_file_and_models_of_clients_are_not(tmp_path: Path) -> None:
    path = tmp_path / "two.ckpt"
    _, runner = fit("Ditto, masks", 2)
    runner.save_checkpoint(path)
    whole = trainer().test(make("Ditto, masks"), datamodule=data("Ditto, masks"), ckpt_path=path, verbose=False)
    clients_file(path).unlink()
    assert trainer().test(make("Ditto, masks"), datamodule=data("Ditto, masks"), ckpt_path=path, verbose=False) == whole
    with pytest.raises(ConfigurationError, match="beside the checkpoint, with what clients keep"):
        trainer().test(make("Ditto, masks"), datamodule=data("Ditto, masks", client_holdout=0.3), ckpt_path=path, verbose=False)


def test_a_checkpoint_has_one_file_of_clients_and_goes_with_it(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, "{step}", save_top_k=1, every_n_train_steps=1, monitor="step", mode="max")
    runner = trainer(3, callbacks=[pretraining(), best], enable_checkpointing=True)
    runner.fit(make("SCAFFOLD"), datamodule=data("SCAFFOLD"))
    assert len(list(tmp_path.iterdir())) == 2, sorted(tmp_path.iterdir())
    (path,) = tmp_path.glob("*.ckpt")
    first = clients_file(path)
    runner.save_checkpoint(path)
    assert clients_file(path) != first and len(list(tmp_path.iterdir())) == 2


def test_after_an_error_between_the_two_files_the_earlier_pair_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "two.ckpt"
    _, runner = fit("SCAFFOLD", 2)
    runner.save_checkpoint(path)
    before = {place.name: place.read_bytes() for place in tmp_path.iterdir()}

    def write_the_first(place: Path, content: dict[str, Any], mode: int = 0o666) -> None:
        if place == path:
            raise OSError(28, "No space left on device")
        write_checkpoint(place, content, mode)

    monkeypatch.setattr(checkpoints, "write_checkpoint", write_the_first)
    with pytest.raises(OSError, match="No space"):
        runner.save_checkpoint(path)
    assert {place.name: place.read_bytes() for place in tmp_path.iterdir()} == before


def test_a_plugin_that_writes_checkpoints_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no checkpoint plugin in `trainer.plugins` but got AsyncCheckpointIO"):
        trainer(1, plugins=[AsyncCheckpointIO()]).fit(make("SCAFFOLD"), datamodule=data("SCAFFOLD"))
