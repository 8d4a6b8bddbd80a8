"""Nodes as the server reaches them, with a SuperLink made of a dictionary."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedlight.aggregation import PlainAggregator
from fedlight.codecs import IdentityCodec
from fedlight.core.errors import ConfigurationError
from fedlight.deploy.protocol import Letter
from fedlight.flower.clients import CHUNKED, FlowerClients, read_letter
from fedlight.flower.server import arguments, last_checkpoint
from fedlight.privacy import AccountingSetting, CentralDP
from fedlight.rounds import Connection, ReplyFormat

NAMES = ["north", "south", "west"]
LETTERS = {client: Letter(b"question %d" % client, b"") for client in range(3)}


@pytest.fixture(autouse=True)
def task() -> None:
    """Give this process the identity without which Flower makes no message."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


class Link(Grid):
    """A SuperLink whose nodes answer at once with ``reply``, or are offline."""

    def __init__(self, online: Iterable[str], reply: Callable[[str, Message], Message | None]) -> None:
        self.online = list(online)
        self.reply = reply
        self.sent: list[Message] = []
        self.ready: dict[str, Message] = {}

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *_: Any, **__: Any) -> Any: ...

    def send_and_receive(self, *_: Any, **__: Any) -> Any: ...

    def get_node_ids(self) -> list[int]:
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> list[Any]:
        return [
            SimpleNamespace(name=name, node_id=100 + place, status="online" if name in self.online else "offline")
            for place, name in enumerate(reversed(NAMES))
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            id = f"m{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = id
            self.sent.append(message)
            answer = self.reply(NAMES[::-1][message.metadata.dst_node_id - 100], message)
            if answer is not None:
                self.ready[id] = answer
            ids.append(id)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        return [self.ready.pop(id) for id in list(ids) if id in self.ready]


def said(what: bytes) -> Callable[[str, Message], Message]:
    return lambda name, message: Message(RecordDict({"answer": ConfigRecord({"answer": what + name.encode()})}), reply_to=message)


def clients(link: Link, **settings: Any) -> FlowerClients:
    made = FlowerClients(NAMES, timeout=0.3, wait=0.3, poll=0.01, **settings)
    made.connect(link)
    return made


def test_a_client_is_known_by_its_registered_name() -> None:
    """Flower's own numbers have another order, and none of ours."""
    answers = dict(clients(Link(NAMES, said(b""))).send(LETTERS, "0/0 train"))
    assert answers == {0: b"north", 1: b"south", 2: b"west"}


def test_who_is_offline_is_not_asked() -> None:
    link = Link(["north", "west"], said(b""))
    assert dict(clients(link).send(LETTERS, "0/0 train")) == {0: b"north", 2: b"west"}
    assert len(link.sent) == 2


def test_present_waits_and_then_goes_on_with_those_who_are_there(caplog: pytest.LogCaptureFixture) -> None:
    assert clients(Link(["south"], said(b""))).present(2) == [1]
    assert "Waiting for 1 of 2 nodes" in caplog.text and "north, west" in caplog.text
    assert clients(Link(NAMES, said(b""))).present(2) == [0, 1, 2]


def test_an_error_is_told_by_its_code_alone(caplog: pytest.LogCaptureFixture) -> None:
    link = Link(
        NAMES, lambda name, message: Message(Error(2, "patient 42"), reply_to=message) if name == "west" else said(b"")(name, message)
    )
    assert dict(clients(link).send(LETTERS, "3/0 train")) == {0: b"north", 1: b"south"}
    assert "its app failed" in caplog.text and "patient" not in caplog.text


def test_a_late_reply_is_taken_from_the_superlink_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    held: list[Message] = []

    def slow(name: str, message: Message) -> Message | None:
        answer = said(b"")(name, message)
        if name == "west" and not held:
            held.append(answer)
            return None
        return answer

    link = Link(NAMES, slow)
    made = clients(link)
    assert sorted(dict(made.send(LETTERS, "0/0 train"))) == [0, 1]
    assert "no reply of west within 0 s" in caplog.text
    link.ready["m2"] = held[0]
    assert sorted(dict(made.send(LETTERS, "1/0 train"))) == [0, 1, 2]
    assert "A reply of west in round 0/0 train came too late" in caplog.text
    assert not link.ready


def test_under_privacy_no_log_names_who_was_asked(caplog: pytest.LogCaptureFixture) -> None:
    """Cohorts are secret: that is what the smaller of both epsilons rests on."""
    held: list[Message] = []

    def reply(name: str, message: Message) -> Message | None:
        if name == "south":
            return Message(Error(2, "its own words"), reply_to=message)
        if name == "west" and not held:
            held.append(said(b"")(name, message))
            return None
        return said(b"")(name, message)

    link = Link(NAMES, reply)
    made = clients(link)
    made.configure({"network": {"class_path": "torch.nn.Identity"}}, None)
    privacy = CentralDP(clip=1.0, noise_multiplier=1.0)
    privacy.setting = AccountingSetting(0.5, 2, 10, length=1, integer=False)
    made.attach(Connection(ReplyFormat(), lambda: made, IdentityCodec(), PlainAggregator(), privacy, len(NAMES)))
    dict(made.send(LETTERS, "0/0 train"))
    link.ready["m2"] = held[0]
    dict(made.send({0: LETTERS[0]}, "1/0 train"))
    assert "no reply of a node within" in caplog.text and "no answer of a node: its app failed" in caplog.text
    assert "A reply of a node in round 0/0 train came too late" in caplog.text
    assert not any(name in caplog.text for name in NAMES)


def test_a_reply_without_an_answer_is_no_status() -> None:
    empty = Link(NAMES, lambda name, message: Message(RecordDict({"answer": ConfigRecord({"other": 1})}), reply_to=message))
    assert set(dict(clients(empty).send(LETTERS, "0/0 train")).values()) == {b"\xff"}


@pytest.mark.parametrize("size", [0, 1, CHUNKED, CHUNKED + 1])
def test_a_letter_arrives_as_it_was_sent(size: int) -> None:
    link = Link(NAMES, said(b""))
    letter = Letter(b"question", bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    dict(clients(link).send({0: letter}, "0/0 train"))
    assert read_letter(link.sent[0].content) == letter
    assert ("download" in link.sent[0].content) == (size > CHUNKED)


def test_what_flower_carries_is_counted_and_goes_on_after_a_resume() -> None:
    link = Link(NAMES, said(b"x" * 1000))
    made = clients(link)
    dict(made.send(LETTERS, "0/0 train"))
    figures = made.figures()
    assert 3000 < figures["engine_uplink"] < 8000 and figures["engine_downlink"] > 3 * len(b"question 0")
    again = clients(link)
    again.load_state_dict(made.state_dict())
    assert again.figures() == figures and again.run == made.run


def test_a_request_dies_with_its_stage() -> None:
    link = Link(NAMES, said(b""))
    dict(clients(link).send(LETTERS, "0/0 train"))
    assert all(message.metadata.ttl == pytest.approx(0.3) for message in link.sent)


def test_without_flower_there_is_a_sentence() -> None:
    with pytest.raises(ConfigurationError, match="flwr run"):
        FlowerClients(NAMES).online()
    for wrong in ({"nodes": []}, {"nodes": ["a", "a"]}, {"nodes": NAMES, "timeout": 0}, {"nodes": NAMES, "wait": -1}):
        with pytest.raises(ConfigurationError):
            FlowerClients(**wrong)


def test_the_configuration_of_a_run_becomes_a_command_line(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("")
    given = {"config": "run.yaml", "out": str(tmp_path / "logs"), "resume": False, "options": "--trainer.max_steps 3 --model.seed '1'"}
    expected = ["fit", "--config", str(tmp_path / "run.yaml"), "--trainer.default_root_dir", str(tmp_path / "logs")]
    assert arguments(given, [tmp_path]) == [*expected, "--trainer.max_steps", "3", "--model.seed", "1"]
    with pytest.raises(ConfigurationError, match=r"no other\.yaml"):
        arguments(given | {"config": "other.yaml"}, [tmp_path])
    with pytest.raises(ConfigurationError, match="set `resume` to false"):
        arguments(given | {"resume": True}, [tmp_path])
    (tmp_path / "logs" / "deployed" / "version_0" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "logs" / "deployed" / "version_0" / "checkpoints" / "last.ckpt"
    path.touch()
    assert last_checkpoint(tmp_path / "logs") == path
    assert arguments(given | {"resume": True}, [tmp_path])[-2:] == ["--ckpt_path", str(path)]


@pytest.mark.parametrize(("name", "value"), [("timeout", 0.0), ("poll", 0.0), ("wait", -1.0)])
def test_a_number_out_of_range_is_named_alone(name, value):
    with pytest.raises(ConfigurationError, match=f"^Expected `{name}` >=? 0 but got"):
        FlowerClients(NAMES, **{name: value})
