from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from fedlight.compare.execute import DONE_FILE, OUTPUT_FILE, Job, Outcome, execute, finished
from fedlight.compare.plan import Run


def pretend(args: list[str]) -> str:
    """A run that does what its configuration says."""
    task = json.loads(args[args.index("--config") + 1])
    print("hello from", task["folder"])
    if task["do"] == "raise":
        raise ValueError("learning rate\ntoo high")
    if task["do"] == "exit":
        raise SystemExit(2)
    if task["do"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    folder = Path(task["folder"]) / "version_0"
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(
        json.dumps({"pid": os.getpid(), "test_f1": 0.4, "total_bytes": 9} | ({} if task["do"] == "stop" else {"test_accuracy": 0.5}))
    )
    return str(folder)


def forbidden(args: list[str]) -> str:
    raise AssertionError("a run that was done is run again")


def job(folder: Path, seed: int, do: str = "work", digest: str = "a") -> Job:
    place = folder / str(seed)
    return Job(Run("mine", seed, 1.0), json.dumps({"do": do, "folder": str(place)}), place, digest)


def run(jobs, fit=pretend, workers=1, then=lambda outcome: []) -> list[Outcome]:
    outcomes = []

    def note(outcome):
        outcomes.append(outcome)
        return then(outcome)

    begun: list[Run] = []
    execute(jobs, fit, workers, note, begun.append)
    assert {*begun} == {outcome.run for outcome in outcomes if not outcome.again}, "those that had ended are not run"
    return sorted(outcomes, key=lambda outcome: outcome.run)


def mark_as_done(job: Job, digest: str = "a", **summary) -> None:
    (job.folder / "version_3").mkdir(parents=True)
    (job.folder / "version_3" / "summary.json").write_text(json.dumps(summary))
    (job.folder / DONE_FILE).write_text(json.dumps({"digest": digest, "folder": "version_3"}))


def test_what_is_done_with_the_same_configuration_is_not_run_again(tmp_path):
    one = job(tmp_path, 0)
    assert finished(one) is None
    mark_as_done(one, test_accuracy=0.7, total_bytes=9)
    (outcome,) = run([one], forbidden)
    assert outcome.ok and outcome.again and outcome.summary["test_accuracy"] == 0.7 and outcome.folder == one.folder / "version_3"


@pytest.mark.parametrize(
    ("digest", "summary"),
    [("b", {"test_accuracy": 0.7, "total_bytes": 9}), ("a", {"val_accuracy": 0.7, "total_bytes": 9}), ("a", {"test_accuracy": 0.7})],
)
def test_another_configuration_or_half_a_summary_does_not_count(digest, summary, tmp_path):
    one = job(tmp_path, 0)
    mark_as_done(one, digest, **summary)
    assert finished(one) is None


def test_half_a_file_does_not_count(tmp_path):
    one = job(tmp_path, 0)
    mark_as_done(one, test_accuracy=0.7, total_bytes=9)
    for text in ('{"digest": "a", "fol', "[1, 2]", "3", '{"digest": "a", "folder": 3}'):
        (one.folder / DONE_FILE).write_text(text)
        assert finished(one) is None


def test_jobs_that_follow_are_run(tmp_path):
    jobs = [job(tmp_path, seed) for seed in range(3)]
    for one in jobs:
        mark_as_done(one, test_accuracy=0.1, total_bytes=9)
    outcomes = run(jobs[:1], forbidden, then=lambda outcome: jobs[outcome.run.seed + 1 : outcome.run.seed + 2])
    assert [outcome.run.seed for outcome in outcomes] == [0, 1, 2]


@pytest.mark.slow
def test_failures_are_outcomes_and_the_rest_goes_on(tmp_path):
    kinds = ["work", "raise", "exit", "die", "stop", "work"]
    outcomes = run([job(tmp_path, seed, do) for seed, do in enumerate(kinds)])
    assert [outcome.ok for outcome in outcomes] == [True, False, False, False, False, True]
    assert outcomes[1].error == "ValueError: learning rate too high"
    assert (
        "SystemExit" in outcomes[2].error
        and "died without an error message" in outcomes[3].error
        and "but it has test_f1: log" in outcomes[4].error
    )
    assert "too high" in (tmp_path / "1" / OUTPUT_FILE).read_text()
    assert f"hello from {tmp_path / '0'}" in (tmp_path / "0" / OUTPUT_FILE).read_text()


@pytest.mark.slow
def test_a_process_does_one_run_after_another(tmp_path):
    outcomes = run([job(tmp_path, seed) for seed in range(3)])
    assert len({outcome.summary["pid"] for outcome in outcomes} - {os.getpid()}) == 1
