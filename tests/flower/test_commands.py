"""The files of a deployment, and the sentences that its commands end with."""

from __future__ import annotations

import copy
import functools
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from fedlight.core.errors import ConfigurationError
from fedlight.data import Everyone, FederatedDataModule
from fedlight.deploy import NodeConfig
from fedlight.flower.commands import main
from fedlight.flower.files import write_lab
from fedlight.flower.processes import require_free
from fedlight.flower.worker import Link, Supervisor
from tests.federation import environment, heavy_imports

NAMES = ["north", "south"]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Give this process its signals back: a command that has ended listens to none."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    write_lab(tmp_path / "lab", NAMES)
    return tmp_path / "lab"


def test_a_lab_has_all_that_its_nodes_need(lab: Path) -> None:
    for place, name in enumerate(NAMES):
        config, link = NodeConfig.read(lab / f"{name}.yaml"), Link.read(lab / f"{name}.yaml")
        assert config.name == name and config.identity is not None and config.identity.is_file()
        assert link.port == 9094 + place and link.root_certificates == str(lab / "ca.crt")
        x, y = config.data.load()
        assert len(x) == len(y) > 100
    for private in ("superlink.key", "keys/north", "keys/north.node"):
        assert (lab / private).stat().st_mode & 0o077 == 0


def test_nodes_hold_the_shares_of_the_simulation(lab: Path) -> None:
    """The configuration of the server, run without a network, is the same federation."""
    run = yaml.safe_load((lab / "app" / "run.yaml").read_text())["data"]
    assert run.pop("source") == "Digits" and run.pop("partitioner")["init_args"] == {"alpha": 0.5}
    data = FederatedDataModule(**run | {"sampler": Everyone()})
    data.setup()
    for client, name in enumerate(NAMES):
        mine = NodeConfig.read(lab / f"{name}.yaml").data.load()
        assert all(bool((one == other).all()) for one, other in zip(mine, data.client_data(client), strict=True))


def test_a_lab_is_never_written_over_another(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flower", "init", str(lab), "--lab"]) == 2
    assert "Expected a new folder" in capsys.readouterr().err


def places(tree: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield where every key of a file is."""
    for key, value in tree.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from places(value, (*at, key))


def refused(file: Path, tree: dict[str, Any]) -> str:
    """Return what `fedlight node` says of a file, before it starts anything."""
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigurationError) as caught:
        NodeConfig.read(file), Link.read(file)
    sentence = str(caught.value)
    assert str(file) in sentence and "\n" not in sentence, sentence
    assert not re.search(r"made\.|object has no|unhashable|<class|abstract|cannot be what", sentence), sentence
    return sentence


def test_every_key_of_node_yaml_that_is_misspelt_or_of_another_kind_is_named(lab: Path) -> None:
    file = lab / "north.yaml"
    good = yaml.safe_load(file.read_text())
    for place in places(good):
        for wrong in ("misspelt", [1, 2], {"a": 1}):
            tree = copy.deepcopy(good)
            inside = functools.reduce(lambda part, key: part[key], place[:-1], tree)
            if wrong == "misspelt":
                inside[f"{place[-1]}x"] = inside.pop(place[-1])
                assert f"{place[-1]}x" in refused(file, tree)
            else:
                inside[place[-1]] = wrong
                shown = [key for key in place if key not in ("class_path", "init_args")]
                assert ".".join(shown[:-1]) in refused(file, tree)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("root_certificates: ca.crt", "root_certificates: no.crt"), "Expected flower.root_certificates in .* but there is no .*/no.crt"),
        (("superlink: 127.0.0.1:8000", "superlink: https://fl.example.org"), "host:port, such as fl.example.org:8000, but got https:"),
        (
            ("key: keys/north.node", "key: keys/north"),
            "flower.key .* an EC key, .* is an Ed25519 key, as node.identity .*-t ecdsa",
        ),
        (
            ("identity: keys/north ", "identity: keys/north.node "),
            "node.identity .* Ed25519 key, .* an EC key, as flower.key.*-t ed25519",
        ),
        (("key: keys/north.node", "key: keys/north.node.pub"), "it is a public key"),
        (("key: keys/north.node", "key: ca.crt"), "it cannot be read"),
    ],
)
def test_files_of_another_kind_are_told_before_anything_starts(lab: Path, capsys: pytest.CaptureFixture[str], change, words: str) -> None:
    path = lab / "north.yaml"
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    assert main(["node", str(path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fedlight: error: ") and re.search(words, error) and str(path) in error


def looking(supervisor: Supervisor, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        supervisor.look()
        time.sleep(0.02)


def test_a_supernode_that_is_refused_is_told_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "print('Exit Code: 305\\nFailed.\\n[code: 2004] Not registered.\\n\\nFor more information, visit: <x>\\nINFO: bye')"
    supervisor = Supervisor([sys.executable, "-c", words], tmp_path / "log")
    monkeypatch.setattr("fedlight.flower.worker.REFUSED", 0.0)
    monkeypatch.setattr("fedlight.flower.worker.AGAIN", 0.0)
    with pytest.raises(ConfigurationError, match=r"\[code: 2004\] Not registered\. Check address"):
        looking(supervisor, 60)
    supervisor.stop()


def test_a_supernode_that_ends_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlight.flower.worker.AGAIN", 0.0)
    supervisor = Supervisor([sys.executable, "-c", "print('once more')"], tmp_path / "log")
    try:
        while (tmp_path / "log").exists() is False or (tmp_path / "log").read_text().count("once more") < 2:
            supervisor.look()
    finally:
        supervisor.stop()


def test_the_client_of_flower_imports_no_lightning() -> None:
    assert heavy_imports("import fedlight.flower.client") == set()


def test_flower_calls_nobody() -> None:
    code = "import fedlight.flower, os; print(*(os.environ[name] for name in fedlight.flower.OFFLINE))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=180)
    assert done.stdout.split() == ["0", "1", "1"]


@pytest.mark.parametrize("name", ["superlink", "run"])
def test_a_program_of_flower_gets_its_own_options(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes first: an option that this command does not have is the program's."""
    got: list[Sequence[str]] = []
    place = {"superlink": "fedlight.flower.superlink.run_superlink", "run": "fedlight.flower.run.run_app"}[name]
    monkeypatch.setattr(place, lambda arguments: got.append(arguments) or 3)
    assert main(["flower", name, "--ssl-ca-certfile", "ca.crt", "app", "--stream"]) == 3
    assert got == [["--ssl-ca-certfile", "ca.crt", "app", "--stream"]]


def test_a_port_that_another_program_has_is_told_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"{port} of 127.0.0.1 is in use.*set `flower.port`"):
            require_free(port, "set `flower.port`")
    require_free(port, "")


@pytest.mark.slow
def test_a_data_module_is_known_by_its_short_name_in_node_yaml(tmp_path: Path) -> None:
    """In an interpreter that has not imported Lightning before."""
    module = {"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"}
    source = {"class_path": "LightningData", "init_args": {"datamodule": module}}
    node = {"name": "north", "state": "state", "data": {"class_path": "fedlight.deploy.OwnData", "init_args": {"source": source}}}
    (tmp_path / "node.yaml").write_text(yaml.safe_dump({"node": node}))
    code = "from pathlib import Path; from fedlight.deploy import NodeConfig; print(len(NodeConfig.read(Path('node.yaml')).data.load()[0]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "64", done.stderr[-2000:]


def test_a_node_that_is_stopped_while_it_starts_ends_at_once(lab: Path) -> None:
    """Also by Ctrl-C where a shell, which has started it in the background, lets it ignore that."""
    command = [sys.executable, "-u", "-m", "fedlight", "node", str(lab / "north.yaml")]
    ignored = f"import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv({sys.executable!r}, {command!r})"
    with subprocess.Popen([sys.executable, "-c", ignored], env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "Starting the node of north.yaml ...\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
        assert "Traceback" not in process.stderr.read()
    assert not (lab / "state").exists()
