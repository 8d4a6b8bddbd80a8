from types import SimpleNamespace

import pytest
import torch

from fedlight.callbacks import UpdateRecorder
from fedlight.clients import Scaffold
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Context
from fedlight.core.errors import ConfigurationError
from fedlight.rounds import ClientUpdate
from tests.federation import federated, run


def test_the_bank_holds_the_updates_of_the_first_clients(tmp_path):
    module, recorder = federated(), UpdateRecorder(clients=3, every_n_rounds=2, path=str(tmp_path / "sub" / "bank.safetensors"))
    spy = run(module, 5, callbacks=[recorder])
    bank = UpdateBank.load(tmp_path / "sub" / "bank.safetensors")
    assert bank.updates.shape == (3, 3, module.layout.dim)
    assert bank.layout == module.layout
    for row, number in enumerate((0, 2, 4)):
        for client in range(3):
            assert torch.equal(bank.updates[row, client], spy.replies[number, 0, client].simulation.update)
    assert torch.equal(recorder.bank(module.layout).updates, bank.updates)


def test_written_to_the_runs_folder_unless_told_otherwise(tmp_path):
    run(federated(), 1, callbacks=[UpdateRecorder(clients=8)], default_root_dir=tmp_path)
    assert UpdateBank.load(tmp_path / "updates.safetensors").clients == 8


def test_rounds_with_too_few_clients_are_left_out(tmp_path):
    module, recorder = federated(), UpdateRecorder(clients=9, path=str(tmp_path / "bank.safetensors"))
    run(module, 2, callbacks=[recorder])
    assert not (tmp_path / "bank.safetensors").exists()
    with pytest.raises(ConfigurationError, match="no round had 9 usable clients"):
        recorder.bank(module.layout)


def test_a_client_whose_training_failed_is_not_recorded():
    """Under a privacy mechanism it sends zeros, which are no update."""
    module, recorder = federated(), UpdateRecorder(clients=1)
    recorder.on_round_start(None, module, None)
    failed = ClientUpdate(0, torch.full((module.layout.dim,), float("nan")), torch.empty(0), 1, 0.0, usable=False)
    recorder.on_client_update(None, module, Context(), failed)
    recorder.on_round_end(None, module, None)
    with pytest.raises(ConfigurationError, match="no round had 1 usable clients"):
        recorder.bank(module.layout)


def test_recording_changes_nothing(tmp_path):
    plain, recorded = federated(), federated()
    run(plain, 2)
    run(recorded, 2, callbacks=[UpdateRecorder(clients=2, path=str(tmp_path / "bank.safetensors"))])
    assert all(torch.equal(a, b) for a, b in zip(plain.network.parameters(), recorded.network.parameters(), strict=True))


def test_uploads_of_several_vectors_are_written_whole(tmp_path):
    module, recorder = federated(algorithm=Scaffold()), UpdateRecorder(clients=1, path=str(tmp_path / "bank.safetensors"))
    update = ClientUpdate(0, torch.arange(float(2 * module.layout.dim + 1)), torch.empty(0), 1, 0.0)
    recorder.on_round_start(None, module, None)
    recorder.on_client_update(None, module, Context(), update)
    recorder.on_round_end(None, module, None)
    recorder.on_train_end(SimpleNamespace(), module)
    bank = UpdateBank.load(tmp_path / "bank.safetensors")
    assert torch.equal(bank.updates[0, 0], update.update) and bank.layout == module.upload_layout


def test_several_processes_are_refused():
    with pytest.raises(ConfigurationError, match="Expected one process but got 2"):
        UpdateRecorder().setup(SimpleNamespace(world_size=2), federated(), "fit")


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0)])
def test_numbers_below_one_are_refused(arguments):
    with pytest.raises(ConfigurationError, match="^Expected `(clients|every_n_rounds)` >= 1 but got 0$"):
        UpdateRecorder(*arguments)
