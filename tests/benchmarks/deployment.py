"""Runs over Flower on this machine: beside the same runs simulated, on MNIST by writer, and the bytes of networks of several sizes.

python tests/benchmarks/deployment.py equal [--rounds 5]     # weights equal to the simulation's, seconds a round
python tests/benchmarks/deployment.py writers [--rounds 20]  # three nodes that hold twelve writers' digits each
python tests/benchmarks/deployment.py bytes                  # payload against what Flower carries
python tests/benchmarks/deployment.py latency                # a round with `fedlight node` and with Flower's own programs
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from fedlight.flower import program
from fedlight.flower.demo import Lab
from tests.flower.deployed import VARIANTS, configure, give_data, simulated, weights

NAMES = ["north", "south", "west"]


class Wire:
    """A port of this machine that passes everything on to a SuperLink and counts it: what a network carries, TLS and headers included."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.target = host, int(port)
        self.up = self.down = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.create_connection(self.target)
            threading.Thread(target=self._pass, args=(near, far, "up"), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, "down"), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def running(changes: dict[str, Any], data: dict[str, Any] | None = None, counted: bool = False) -> Iterator[tuple[Lab, Path]]:
    """Yield a lab that is up, and a folder beside it; the nodes reach the SuperLink by way of ``lab.wire`` if it is to be counted."""
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder) / "lab", NAMES)
        if counted:
            lab.wire = Wire(lab.address)
            for name in NAMES:
                file = lab.root / f"{name}.yaml"
                file.write_text(file.read_text().replace(f"superlink: {lab.address}", f"superlink: {lab.wire.address}"))
        if data is not None:
            give_data(lab, data)
        configure(lab, changes)
        try:
            lab.start()
            yield lab, Path(folder)
        finally:
            lab.stop()


def summary(folder: Path) -> dict[str, Any]:
    """Return the newest summary below a folder."""
    path = max(folder.glob("**/summary.json"), key=lambda path: path.stat().st_mtime)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def equal(rounds: int) -> list[str]:
    table = []
    for name, changes in VARIANTS.items():
        with running(changes) as (lab, folder):
            status = lab.run("--trainer.max_steps", str(rounds))
            simulation = simulated(lab, folder / "simulated", "--trainer.max_steps", str(rounds))
            same = status == 0 and weights(lab.root / "logs") == weights(simulation)
            seconds = summary(lab.root / "logs")["train_seconds"] / rounds
            table.append(f"{name}: exit {status}, weights equal {same}, {seconds:.1f} s a round. {lab.traffic()}")
    return table


MNIST = {"source": {"class_path": "Torchvision", "init_args": {"dataset": "MNIST"}}}
LENET = {"class_path": "fedlight.modules.LeNet5"}
STEPS = {"class_path": "FedAvg", "init_args": {"lr": 0.05, "batch_size": 32, "steps": 10}}


def writers(rounds: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "writers.json"
        ids = np.load(Path(os.environ["FEDLIGHT_DATA"]) / "mnist_writers.npz")["train"]
        people = np.unique(ids)[: 12 * len(NAMES)]
        groups = [np.flatnonzero(np.isin(ids, people[client :: len(NAMES)])).tolist() for client in range(len(NAMES))]
        file.write_text(json.dumps(groups))
        data = MNIST | {
            "partitioner": {"class_path": "Explicit", "init_args": {"clients": str(file)}},
            "num_clients": None,
            "proxy_samples": 2000,
        }
        codec = {"class_path": "TransformCodec", "init_args": {"ratio": 64, "cohort": 3}}
        changes = {"model": {"network": LENET, "algorithm": STEPS, "codec": codec}}
        with running(changes, data) as (lab, beside):
            status = lab.run("--trainer.max_steps", str(rounds))
            simulation = simulated(lab, beside / "simulated", "--trainer.max_steps", str(rounds))
            same = status == 0 and weights(lab.root / "logs") == weights(simulation)
            one, other = summary(lab.root / "logs"), summary(simulation)
            return [
                f"MNIST, 12 writers a node, {[len(group) for group in groups]} samples: exit {status}, weights equal {same}, "
                f"test accuracy {one['test_accuracy']:.4f} over Flower, {other['test_accuracy']:.4f} simulated, "
                f"{one['train_seconds'] / rounds:.1f} s a round, {one['uplink_bytes']} bytes up, {one['engine_uplink_bytes']} carried"
            ]


CIFAR = {"source": {"class_path": "ArrayFile", "init_args": {"path": "cifar10_20k.npz"}}}
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LeNet-5": (LENET, MNIST),
    "CNN": ({"class_path": "fedlight.modules.BenchmarkCNN"}, CIFAR),
    "ResNet-18": ({"class_path": "fedlight.modules.ResNet18"}, CIFAR),
}


AT_128 = {"class_path": "TransformCodec", "init_args": {"ratio": 128, "cohort": 3, "encoder_share": 0.22}}
RANK_2 = {"class_path": "PowerSGDCodec", "init_args": {"rank": 2}}


def sizes(rounds: int) -> list[str]:
    table = []
    for name, (network, data) in SIZES.items():
        for codec in (None, RANK_2 if name == "ResNet-18" else AT_128):
            short = {"class_path": "FedAvg", "init_args": {"lr": 0.01, "batch_size": 4, "steps": 1}}
            changes = {
                "model": {"network": network, "algorithm": short, "codec": codec, "downlink": "FullModel"},
                "pretraining": {"proxy": {"rounds": 6, "clients": 3}},
                "trainer": {"limit_val_batches": 0, "limit_test_batches": 1},
            }
            with running(changes, {**data, "num_clients": 3, "proxy_samples": 300}, counted=True) as (lab, _):
                wire = lab.wire
                up, down = wire.up, wire.down
                status = lab.run("--trainer.max_steps", str(rounds))
                wired_up, wired_down = wire.up - up, wire.down - down
                found = summary(lab.root / "logs")
            messages = len(NAMES) * rounds
            up, down = found["uplink_bytes"] / messages, found["downlink_bytes"] / messages
            table.append(
                f"{name} ({found['parameters']:,} parameters), {codec['class_path'] if codec else 'no codec'}: exit {status}; "
                f"a message up {up:,.0f} payload, {found['engine_uplink_bytes'] / messages:,.0f} carried; down {down:,.0f} payload, "
                f"{found['engine_downlink_bytes'] / messages:,.0f} carried; on the wire {wired_up / messages:,.0f} up and "
                f"{wired_down / messages:,.0f} down; {found['train_seconds'] / rounds:.1f} s a round"
            )
    return table


class Plain(Lab):
    """A lab whose nodes are Flower's own program, which starts a process for every message."""

    def start_node(self, name: str) -> None:
        import yaml

        link = yaml.safe_load((self.root / f"{name}.yaml").read_text())["flower"]
        command = [program("flower-supernode"), "--superlink", link["superlink"], "--root-certificates", "ca.crt"]
        command += ["--auth-supernode-private-key", link["key"], "--port", str(link["port"]), "--host", "127.0.0.1"]
        self.launch(name, [*command, "--node-config", f'fedlight="{self.root / f"{name}.yaml"}"'])


def latency(rounds: int) -> list[str]:
    table = []
    for kind, what in ((Lab, "fedlight node"), (Plain, "Flower's own flower-supernode")):
        with tempfile.TemporaryDirectory() as folder:
            lab = kind(Path(folder) / "lab", NAMES)
            configure(lab, {})
            try:
                lab.start()
                start = time.monotonic()
                status = lab.run("--trainer.max_steps", str(rounds))
                seconds = summary(lab.root / "logs")["train_seconds"] / rounds
                table.append(f"{what}: exit {status}, {seconds:.1f} s a round, {time.monotonic() - start:.0f} s for {rounds} rounds in all")
            finally:
                lab.stop()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["equal", "writers", "bytes", "latency"])
    parser.add_argument("--rounds", type=int, default=0)
    given = parser.parse_args()
    run, rounds = {"equal": (equal, 5), "writers": (writers, 20), "bytes": (sizes, 2), "latency": (latency, 5)}[given.what]
    print("\n".join(run(given.rounds or rounds)))


if __name__ == "__main__":
    main()
