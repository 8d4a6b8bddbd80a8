"""A run through secure aggregation in which clients fall silent, and the plain run of the same survivors: are they the same run?

    python tests/benchmarks/survivors.py --config configs/mnist_secure.yaml

Prints both accuracies, whether every round's sum and the final weights are the same bits, and what a round costs more: seconds of all
clients and the server together, and bytes of a client. No attempt at a round may have failed. Further options go to `fedlight fit`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file

from fedlight.callbacks import FederatedCallback
from fedlight.cli import fit
from fedlight.data import ClientSampler
from fedlight.rounds import Call, Reply


class Record(FederatedCallback):
    """Writes a run's survivors, sums and the aggregator's seconds to a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.survivors: dict[int, list[int]] = {}
        self.sums: dict[int, torch.Tensor] = {}
        self.seconds = 0.0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Put a clock on both halves of the aggregation, before the run makes them."""
        aggregator = pl_module.aggregator
        if stage == "fit":
            aggregator.sealer = self._clock(aggregator.sealer, ("answer", "seal"))
            aggregator.collector = self._clock(aggregator.collector, ("requests", "receive", "finish"))

    def _clock(self, make: Any, names: tuple[str, ...]) -> Any:
        """Return what makes the same half with a clock on it."""

        @wraps(make)
        def made(*arguments: Any) -> Any:
            half = make(*arguments)
            for name in names:
                setattr(half, name, self._timed(getattr(half, name)))
            return half

        return made

    def _timed(self, call: Any) -> Any:
        @wraps(call)
        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = call(*arguments)
            self.seconds += time.perf_counter() - begin
            return result

        return timed

    def on_client_message(self, trainer: Trainer, pl_module: LightningModule, round: Call, reply: Reply) -> None:
        """Note whose code arrived."""
        self.survivors.setdefault(round.context.round, []).append(reply.client)

    def on_round_end(self, trainer: Trainer, pl_module: LightningModule, round: Call) -> None:
        """Note the sum."""
        assert round.codes.total is not None and round.context.attempt == 0, "an attempt failed: lower `model.availability`"
        self.sums[round.context.round] = round.codes.total.clone()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything."""
        self.folder.mkdir(parents=True)
        torch.save(self.sums, self.folder / "sums.pt")
        (self.folder / "rounds.json").write_text(json.dumps({"survivors": self.survivors, "seconds": self.seconds}))


class Survivors(ClientSampler):
    """The cohorts that another run ended up with."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._cohorts = json.loads((Path(folder) / "rounds.json").read_text())["survivors"]

    def sample(self, num_clients: int, seed: int, round: int, attempt: int) -> np.ndarray:
        """Return the round's survivors."""
        return np.array(sorted(self._cohorts[str(round)]), dtype=np.int64)


def run(options: list[str], folder: Path) -> tuple[Path, dict[str, Any]]:
    """Do one run and return its folder and summary."""
    record = ["--trainer.callbacks+", "survivors.Record", "--trainer.callbacks.folder", str(folder)]
    left = fit(["fit", *options, *record])
    assert left is not None
    return Path(left), json.loads((Path(left) / "summary.json").read_text())


def main() -> None:
    """Do both runs and compare."""
    options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        secure, plain = Path(scratch) / "secure", Path(scratch) / "plain"
        one, with_it = run(options, secure)
        sampler = ["--data.sampler", "survivors.Survivors", "--data.sampler.folder", str(secure)]
        other, without = run([*options, "--model.aggregator", "null", "--model.availability", "null", *sampler], plain)
        sums = [torch.load(folder / "sums.pt") for folder in (secure, plain)]
        counted, seconds = (json.loads((secure / "rounds.json").read_text())[name] for name in ("survivors", "seconds"))
    models = [load_file(folder / "model.safetensors") for folder in (one, other)]
    rounds, sizes = with_it["rounds"], [len(clients) for clients in counted.values()]
    equal = sum(torch.equal(sums[0][number], sums[1][number]) for number in sums[0])
    print(f"test accuracy {with_it['test_accuracy']:.4f} with it, {without['test_accuracy']:.4f} without it")
    print(f"{min(sizes)} to {max(sizes)} survivors, {sum(sizes) / len(sizes):.1f} on average")
    print(f"equal sums in {equal} of {rounds} rounds; equal weights: {all(torch.equal(models[0][k], models[1][k]) for k in models[0])}")
    print(f"aggregator {1e3 * seconds / rounds:.0f} ms a round, of {1e3 * with_it['train_seconds'] / rounds:.0f} ms in all")
    print(f"message {with_it['uplink_bytes_per_client']:.0f} B with it ({with_it['uplink_ratio']:.1f}x), ", end="")
    print(f"{without['uplink_bytes_per_client']:.0f} B without ({without['uplink_ratio']:.1f}x)")
    for way in ("uplink", "downlink"):
        print(f"keys, shares, signatures, {way}: {with_it[f'handshake_{way}_bytes'] / rounds:,.0f} B a round")


if __name__ == "__main__":
    main()
