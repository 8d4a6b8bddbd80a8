"""The ClientApp of a federated run: one client, which its `node.yaml` describes. No Lightning."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlight.deploy import Node, NodeConfig
from fedlight.deploy.protocol import Status, answer
from fedlight.flower.clients import read_letter

log = logging.getLogger(__name__)

app = ClientApp()


@cache
def node_of(path: str) -> Node:
    """Return the client that a `node.yaml` describes, made once a process."""
    return Node(NodeConfig.read(Path(path)))


@app.train("letter")
def reply(message: Message, context: Context) -> Message:
    """Answer a letter of the server."""
    try:
        node = node_of(str(context.node_config["fedlight"]))
        content = node.answer(read_letter(message.content))
    except Exception:  # Flower would send the error's own words to the server
        log.exception("This node cannot answer: set --node-config 'fedlight=\"/path/of/node.yaml\"', and see below")
        content = answer(Status.FAILED)
    return Message(RecordDict({"answer": ConfigRecord({"answer": content})}), reply_to=message)
