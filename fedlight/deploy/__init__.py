"""A federation over a network, whatever the network is: what a server and a client in another process say, know and keep.

| file | what it holds |
|---|---|
| ``protocol.py`` | the envelope of a request, and an answer that quotes nothing of the client |
| ``settings.py`` | what the server tells clients of how to train |
| ``nodes.py`` | clients in other processes as one more member of the port ``rounds.Clients`` |
| ``node.py`` | a client: its configuration, and its answer to a letter |
| ``files.py``, ``keys.py``, ``data.py`` | its `node.yaml`, the keys and the samples that it names |
| ``disk.py`` | what it keeps between messages |

Nothing here needs Lightning, and nothing knows which network it is: that is `fedlight.flower`.
"""

from fedlight.deploy.data import ClientData, OwnData, Share
from fedlight.deploy.node import Node, NodeConfig
from fedlight.deploy.nodes import InProcess, Nodes

__all__ = ["ClientData", "InProcess", "Node", "NodeConfig", "Nodes", "OwnData", "Share"]
