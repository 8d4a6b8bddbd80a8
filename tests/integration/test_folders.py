"""Runs that are started together have folders of their own."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from fedlight.federated_cli import claim_folder, run_loggers
from tests.federation import invoke, run_folders
from tests.processes import fork


@pytest.mark.slow
def test_two_runs_that_are_started_together_have_folders_of_their_own(tmp_path: Path) -> None:
    start = time.time() + 1.0

    def begin(seed: int) -> None:
        time.sleep(max(0.0, start - time.time()))
        invoke("fit", tmp_path, "--trainer.max_steps", "2", "--seed_everything", str(seed), "--experiment", "together")

    pair = [fork(lambda seed=seed: begin(seed), tmp_path / f"{seed}.txt") for seed in (1, 2)]  # type: ignore[misc]
    assert [process.wait() for process in pair] == [0, 0], [process.last_words() for process in pair]
    folders = run_folders(tmp_path / "together")
    assert sorted(folder.name for folder in folders) == ["0", "1"]
    for folder in folders:
        seed = yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"]
        assert json.loads((folder / "summary.json").read_text())["seed"] == seed
        assert len({path.name.split(".")[5] for path in folder.glob("events.out.tfevents.*")}) == 1, "events of several processes"
        assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert {yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"] for folder in folders} == {1, 2}


def test_processes_that_claim_at_the_same_time_get_one_folder_each(tmp_path: Path) -> None:
    start = time.time() + 0.5

    def claim(number: int) -> None:
        loggers = [run_loggers("together", str(tmp_path), "plain") for _ in range(10)]  # all of them choose 0
        time.sleep(max(0.0, start - time.time()))
        for pair in loggers:
            folder = claim_folder(pair)
            assert [Path(logger.log_dir) for logger in pair] == [folder, folder]
            (folder / f"{number}").write_text("")

    processes = [fork(lambda number=number: claim(number), tmp_path / f"{number}.txt") for number in range(4)]  # type: ignore[misc]
    assert [process.wait() for process in processes] == [0] * 4, [process.last_words() for process in processes]
    folders = list((tmp_path / "together" / "plain").iterdir())
    assert {folder.name for folder in folders} == {str(number) for number in range(40)}
    assert all(len(list(folder.iterdir())) == 1 for folder in folders)
