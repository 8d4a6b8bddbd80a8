"""Small comparisons, and what their command ends with."""

from __future__ import annotations

from pathlib import Path

import yaml

from fedlight.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"

SMALL = {
    "trainer": {"max_steps": 3, "val_check_interval": 1, "accelerator": "cpu", "enable_checkpointing": False},
    "data": {"num_clients": 6, "proxy_samples": 60, "sampler": {"init_args": {"cohort_size": 3}}},
    "model": {"algorithm": {"init_args": {"steps": 1}}},
    "pretraining": {"proxy": {"rounds": 10, "clients": 3, "samples": 12}, "training": {"steps": 4, "check_every": 2}},
}
LINEAR = {"model": {"codec": {"class_path": "LinearCodec", "init_args": {"ratio": 4, "block_size": 32}}}}


def settings(folder: Path, **changes) -> list[str]:
    """Write a small comparison to a file and return the arguments that run it."""
    overrides = {**SMALL, "trainer": {**SMALL["trainer"], "callbacks": [{"class_path": "tests.federation.TrueDump"}]}}
    given = {
        "base": str(CONFIGS / "digits.yaml"),
        "overrides": overrides,
        "codecs": {"none": None, "linear": LINEAR},
        "seeds": [0, 1],
        "server_lrs": [1.0, 1.5],
        "tune_seeds": [0],
        "target": 0.01,
        "output": str(folder / "out"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.yaml").write_text(yaml.safe_dump(given | changes, sort_keys=False))
    return ["compare", "--config", str(folder / "mine.yaml")]


def status(args: list[str]) -> int:
    try:
        main(args)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0
