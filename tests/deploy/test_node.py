"""One client: what it keeps, refuses and never says."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from fedlight.aggregation.secure import Directory
from fedlight.codecs import IdentityCodec, TopKCodec, TransformCodec
from fedlight.core.buffers import constants
from fedlight.core.errors import CodecMismatchError, ConfigurationError, DataError, RoundFailedError
from fedlight.deploy import InProcess, NodeConfig
from fedlight.deploy.disk import RunFolder
from fedlight.deploy.protocol import Envelope, Letter, Status
from fedlight.deploy.settings import NotAllowedError, Terms, read_settings, write_settings
from fedlight.modules import MLP, LoRA
from fedlight.rounds import CatchUp
from tests.deploy.deployment import LOCAL, NODES, answers, class_path, deployment, node
from tests.federation import heavy_imports
from tests.rounds.test_through_bytes import integers

Answer = Callable[[int, Letter], bytes | None]


def nodes_with(answer: Answer, change: Callable[[int, Letter, int], Any]) -> InProcess:
    """Return nodes whose answers to their first, second, ... letters ``change`` may replace (None: leave it)."""
    counts: dict[int, int] = {}

    def changed(client: int, letter: Letter) -> bytes | None:
        counts[client] = counts.get(client, 0) + 1
        made = change(client, letter, counts[client])
        return answer(client, letter) if made is None else made

    return InProcess(changed, NODES, reproducible=True)


def test_a_node_that_lost_its_disk_gets_settings_model_and_encoder_again(tmp_path: Path) -> None:
    answer = answers(tmp_path)

    def lose(client: int, letter: Letter, count: int) -> None:
        if (client, count) == (2, 3):
            for path in (tmp_path / NODES[2]).glob("*/**/*.*"):
                path.unlink()

    kept = deployment(TransformCodec(3, encoder_share=2.0), downlink=CatchUp(), nodes=nodes_with(answers(tmp_path / "a"), lambda *_: None))
    lost = deployment(TransformCodec(3, encoder_share=2.0), downlink=CatchUp(), nodes=nodes_with(answer, lose))
    assert torch.equal(kept.run(6).weights, lost.run(6).weights)
    assert not any(call.dropped for call in lost.calls)


def test_a_server_that_goes_on_from_an_older_round_finds_the_state_of_then(tmp_path: Path) -> None:
    """Error feedback of later rounds, which the server has forgotten, must not enter."""
    whole = deployment(TopKCodec(2), nodes=InProcess(answers(tmp_path / "whole"), NODES, reproducible=True)).run(6)
    first = deployment(TopKCodec(2), nodes=InProcess(answers(tmp_path / "cut"), NODES, reproducible=True)).run(3)
    assert isinstance(first.clients, InProcess)
    saved = first.weights, first.server.state.state_dict(), first.clients.state_dict()
    first.run(2)  # rounds 3 and 4, which are lost
    again = deployment(TopKCodec(2), nodes=InProcess(answers(tmp_path / "cut"), NODES, reproducible=True))
    again.server.state.load_state_dict(saved[1])
    assert isinstance(again.clients, InProcess)
    again.clients.load_state_dict(saved[2])
    torch.nn.utils.vector_to_parameters(saved[0], again.server.model.network.parameters())  # type: ignore[attr-defined]
    assert torch.equal(again.run(3).weights, whole.weights)


SECURE = {"aggregator": class_path("fedlight.aggregation.SecureAggregator", cohort=8, threshold=5)}


def secure(tmp_path: Path, keys: Path, change: Callable[[int, Letter, int], Any]) -> Any:
    nodes = nodes_with(answers(tmp_path, keys), change)
    nodes.keys = str(keys)
    return deployment(integers(), SECURE, nodes=nodes).run(1).calls[0]


def test_every_secret_is_deleted_before_it_is_used(tmp_path: Path, keys: Path) -> None:
    """A node that dies in a stage does not answer it again: what it needed is gone."""

    def die(client: int, letter: Letter, count: int) -> bytes | None:
        if (client, count) == (2, 3):  # the masked code: it begins, and its process ends before it has answered
            [path] = (tmp_path / NODES[2]).glob("*/session")
            copy = path.read_bytes()
            answers(tmp_path, keys)(2, letter)
            [folder] = [path.parent for path in (tmp_path / NODES[2]).glob("*/states")]
            assert (folder / "session").read_bytes() != copy
            (folder / "session").unlink()
        return None

    call = secure(tmp_path, keys, die)
    assert call.dropped[0][0] == 2 and 2 not in call.counted and len(call.counted) == 5


def test_a_stage_that_is_asked_twice_is_answered_once(tmp_path: Path, keys: Path) -> None:
    letters: dict[tuple[int, int], Letter] = {}

    def keep(client: int, letter: Letter, count: int) -> None:
        letters[client, count] = letter

    call = secure(tmp_path, keys, keep)
    assert len(call.counted) == 6
    again = answers(tmp_path, keys)
    for count in (2, 3, 4, 5):
        assert again(2, letters[2, count])[1:] in (b"", b"lacks")


def test_nothing_of_a_clients_error_reaches_the_server(tmp_path: Path) -> None:
    def fail() -> Any:
        raise RuntimeError("patient 42")

    failing = node(2, tmp_path)
    failing.config.data.load = fail  # type: ignore[method-assign]
    nodes = nodes_with(answers(tmp_path), lambda client, letter, _: failing.answer(letter) if client == 2 else None)
    call = deployment(nodes=nodes).run(1).calls[0]
    assert call.dropped == [(2, "it failed, for a reason that only its own log tells")]


@pytest.mark.parametrize("bytes_", [b"", b"\xff", bytes(range(100)), b"\x00", b"\x00" + b"x" * 10_000], ids=len)
def test_garbage_is_dropped_and_named(tmp_path: Path, bytes_: bytes) -> None:
    garbage = nodes_with(answers(tmp_path), lambda client, *_: bytes_ if client == 1 else None)
    call = deployment(integers(), nodes=garbage).run(1).calls[0]
    assert [client for client, _ in call.dropped] == [1] and 1 not in call.counted and len(call.counted) == 5


def test_a_reply_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    nodes = nodes_with(answers(tmp_path), lambda client, *_: bytes(2**20) if client == 1 else None)
    nodes.longest_reply = 0.5
    assert "its reply has 1.0 MiB" in deployment(nodes=nodes).run(1).calls[0].dropped[0][1]


def test_another_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def older(client: int, letter: Letter, count: int) -> bytes | None:
        if client != 1:
            return None
        with monkeypatch.context() as patch:
            patch.setattr("fedlight.deploy.protocol.version", lambda name: "0.0.1")
            return answers(tmp_path)(1, letter)

    call = deployment(nodes=nodes_with(answers(tmp_path), older)).run(1).calls[0]
    assert call.dropped == [(1, "its fedlight has another version")]


def test_a_letter_for_another_node_is_refused(tmp_path: Path) -> None:
    envelope = Envelope("abc", 0, "somebody", b"", "", b"")
    assert node(0, tmp_path).answer(Letter(envelope.to_bytes(), b""))[0] == Status.OTHER_NAME


@pytest.mark.parametrize("run", ["../../etc", "", "a/b", "."])
def test_the_name_of_a_run_leaves_no_folder(tmp_path: Path, run: str) -> None:
    letter = Letter(Envelope(run, 0, NODES[0], b"", "", b"").to_bytes(), b"")
    assert node(0, tmp_path).answer(letter)[0] == Status.FAILED
    assert not list(tmp_path.glob("**/states"))


class LoadedElsewhere(nn.Module):
    """A layer that the owner has imported and allows nobody to name."""

    def __init__(self) -> None:
        super().__init__()
        raise AssertionError("made")


def measures_with(function: str) -> dict[str, Any]:
    return class_path("torch.nn.TripletMarginWithDistanceLoss", distance_function=function)


TERMS = Terms(IdentityCodec().config(), tuple(NODES))


@pytest.mark.parametrize(
    "model",
    [
        {"network": class_path("os.system")},
        {"network": class_path("fedlight.modules.MLP"), "loss": class_path("subprocess.Popen")},
        {"network": class_path("torch.nn.Sequential", args=[class_path("pathlib.Path")])},
        {"network": class_path("fedlightx.Evil")},
        {"network": class_path("torch.hub.load")},
        {"network": class_path("torch.nn.Identity"), "loss": measures_with("fedlight.core.files.os.system")},
        {"network": class_path("torch.nn.Identity"), "loss": measures_with("torch.nn.functional.importlib.import_module")},
        {"network": class_path("torch.nn.Identity"), "loss": measures_with("fedlight.deploy.disk.torch.load")},
        {"network": class_path("fedlight.deploy.disk.Path")},
        {"network": class_path("LoadedElsewhere")},
        {"network": class_path("fedlight.modules.LoRA", network=class_path("LoadedElsewhere"))},
    ],
)
def test_a_class_that_the_owner_does_not_allow_is_not_even_imported(model: dict[str, Any]) -> None:
    with pytest.raises(NotAllowedError, match="add it to `allow`"):
        read_settings(write_settings(model, None, TERMS))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        "[" * 10**5,
        '{"model": {}, "augmentation": null, "terms": {"accounting": null, "nodes": 1}}',
        write_settings({"network": class_path("torch.nn.Identity")}, None, replace(TERMS, codec={"class_path": "os.system"})),
    ],
)
def test_whatever_text_a_server_sends_ends_no_node(text: str, tmp_path: Path) -> None:
    """It stays on the node's disk, and is read again before every message."""
    with pytest.raises((ConfigurationError, CodecMismatchError)):
        read_settings(text)
    folder = tmp_path / NODES[0] / "run"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(text)
    node(0, tmp_path).preload()


def test_functions_of_torch_may_be_named() -> None:
    for name in ("gelu", "relu"):
        loss = measures_with(f"torch.nn.functional.{name}")
        read_settings(write_settings({"network": class_path("torch.nn.Identity"), "loss": loss}, None, TERMS))


class NamesAFile(nn.Module):
    """A layer with a default that looks like a class."""

    def __init__(self, start: str = "start.pt") -> None:
        super().__init__()


def test_defaults_of_the_owners_classes_are_the_owners() -> None:
    network = class_path("tests.deploy.test_node.NamesAFile")
    read_settings(write_settings({"network": network}, None, TERMS), ["tests.deploy"])
    with pytest.raises(NotAllowedError, match=r"names start\.pt"):
        read_settings(
            write_settings({"network": class_path("tests.deploy.test_node.NamesAFile", start="start.pt")}, None, TERMS), ["tests.deploy"]
        )


def test_frozen_parts_that_are_not_the_servers_are_refused_by_name() -> None:
    """They never travel: a client that drew others would train another model."""
    model = {
        "network": class_path("fedlight.modules.LoRA", network=class_path("fedlight.modules.MLP", in_features=4, hidden=[], num_classes=2))
    }
    torch.manual_seed(0)
    terms = replace(TERMS, constants=constants(LoRA(MLP(4, [], 2))))
    torch.manual_seed(0)
    assert read_settings(write_settings(model, None, terms)).terms.constants.keys() == terms.constants.keys()
    with pytest.raises(ConfigurationError, match=r"network.layers.1.base.\w+ of LoRA to hold the same numbers.*`base` of LoRA"):
        read_settings(write_settings(model, None, terms))


def test_settings_of_a_module_that_would_write_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "writes.py").write_text("open('written', 'w')\nclass Net: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = {"network": class_path("writes.Net")}
    run = deployment(nodes=InProcess(answers(tmp_path), NODES))
    run.clients.configure(model, None)  # type: ignore[attr-defined]
    run.clients._settings = write_settings(model, None, TERMS)  # type: ignore[attr-defined]
    run.clients._digest = b"\0" * 32  # type: ignore[attr-defined]
    with pytest.raises(RoundFailedError):
        run.run(1)
    with pytest.raises(NotAllowedError):
        read_settings(write_settings(model, None, TERMS))
    assert not (tmp_path / "written").exists()


def test_only_the_owner_can_read_the_state(tmp_path: Path) -> None:
    deployment(model={"algorithm": class_path("fedlight.clients.Scaffold", **LOCAL)}, nodes=InProcess(answers(tmp_path), NODES)).run(1)
    folders = [path.parent for path in tmp_path.glob("*/*/states")]
    assert folders and all(folder.stat().st_mode & 0o077 == 0 for folder in folders)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files and all(file.stat().st_mode & 0o077 == 0 for file in files)


def test_old_attempts_and_old_runs_go(tmp_path: Path) -> None:
    for number in range(5):
        folder = RunFolder(tmp_path, f"run{number}", attempts=3, runs=2)
        os.utime(folder.folder, (number, number))
        for round in range(6):
            folder.keep_state((round, 0), {"n": round}, (1, 0))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["run3", "run4"]
    assert [folder.state((round, 0)) is not None for round in range(6)] == [False, True, False, True, True, True]


def test_a_node_needs_neither_lightning_nor_flower() -> None:
    assert heavy_imports("import fedlight.deploy; assert 'flwr' not in sys.modules") == set()


GOOD = """
node:
  name: north
  data: {class_path: tests.deploy.deployment.Blobs, init_args: {client: 0}}
  state: here/state
"""


def test_paths_in_node_yaml_start_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of data too: a file beside it is found from wherever the node is started."""
    monkeypatch.delenv("FEDLIGHT_DATA", raising=False)
    (tmp_path / "node.yaml").write_text(GOOD)
    assert NodeConfig.read(tmp_path / "node.yaml").state == tmp_path / "here" / "state"
    x = torch.arange(12.0).view(4, 3).numpy()
    arrays = {"x_train": x, "y_train": [0, 1, 0, 1], "x_test": x, "y_test": [0, 1, 0, 1]}
    (tmp_path / "files").mkdir()
    for file in (tmp_path / "scans.npz", tmp_path / "files" / "scans.npz"):
        np.savez(file, **arrays)
    source = {"class_path": "ArrayFile", "init_args": {"path": "scans.npz"}}
    for root in ({"root": "files"}, {"root": str(tmp_path / "files")}, {}):
        own = class_path("fedlight.deploy.OwnData", source=source, **root)
        share = class_path("fedlight.deploy.Share", client=0, data={"source": source, "num_clients": 1, "proxy_fraction": 0.0, **root})
        for data in (own, share) if root else (own,):
            (tmp_path / "node.yaml").write_text(yaml.safe_dump({"node": {"name": "north", "state": "state", "data": data}}))
            assert NodeConfig.read(tmp_path / "node.yaml").data.load()[0].shape == (4, 3)
    (tmp_path / "scans.npz").unlink()
    (tmp_path / "node.yaml").write_text(
        yaml.safe_dump({"node": {"name": "north", "state": "state", "data": class_path("fedlight.deploy.OwnData", source=source)}})
    )
    with pytest.raises(DataError, match=f"{tmp_path}/scans.npz: no such file"):
        NodeConfig.read(tmp_path / "node.yaml").data.load()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a mapping of options in .* but got NoneType"),
        ("node: [", "line 1, column 8"),
        ("nodes: {}", "no section nodes in .*; did you mean node"),
        ("flower: {}", "a section `node`, what the client's owner decides"),
        (GOOD.replace("name", "nmae"), "no option node.nmae in .*; did you mean node.name"),
        (GOOD.replace("  name: north\n", ""), "Expected node.name in .* but got none"),
        (GOOD.replace("north", "[north]"), r"Expected node.name to be text but got \['north'\]"),
        (GOOD.replace("Blobs", "Blbos"), "node.data: there is no Blbos in tests.deploy.deployment; did you mean Blobs"),
        (GOOD.replace("tests.deploy.deployment.Blobs", "nonsense"), "node.data: there is no data nonsense"),
        (GOOD.replace("class_path", "class_pth"), "no option node.data.class_pth .*; did you mean class_path"),
        (GOOD.replace("init_args", "init_arg"), "no option node.data.init_arg .*; did you mean init_args"),
        (GOOD.replace("{client: 0}", "[0]"), r"node.data.init_args to be arguments by name but got \[0\]"),
        (GOOD.replace("{client: 0}", "{cleint: 0}"), "node.data: .*cleint"),
        (GOOD + "  identity: keys/north\n", "Expected node.identity .* but there is no .*/keys/north"),
        (GOOD + "  directory: keys\n", "Expected node.directory .* but there is no .*/keys"),
        (GOOD + "  allow: scans\n", "Expected node.allow to be a list but got scans"),
        (GOOD + "  threads: many\n", "Expected node.threads to be a whole number but got many"),
    ],
)
def test_a_wrong_node_yaml_is_a_sentence_with_the_key_and_the_file(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=words) as caught:
        NodeConfig.read(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_node_yaml_there_is_a_way_to_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="fedlight flower init"):
        NodeConfig.read(tmp_path / "no.yaml")


def test_keys_of_two_clients_must_differ(tmp_path: Path, keys: Path) -> None:
    assert len(Directory(keys, NODES, keys / NODES[0])) == len(NODES)
    twice = tmp_path / "keys"
    twice.mkdir()
    for name in NODES:
        (twice / f"{name}.pub").write_bytes((keys / f"{NODES[0]}.pub").read_bytes())
    with pytest.raises(ConfigurationError, match="a key of its own"):
        Directory(twice, NODES)
    with pytest.raises(ConfigurationError, match="without a passphrase"):
        Directory(tmp_path, NODES)
