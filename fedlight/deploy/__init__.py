"""A federation over a network, whatever the network is: what a server and a client in another process say, know and keep.

Nothing here needs Lightning, and nothing knows which network it is: that is `fedlight.flower`.
"""

from fedlight.deploy.data import ClientData, OwnData, Share
from fedlight.deploy.node import Node, NodeConfig
from fedlight.deploy.nodes import InProcess, Nodes

__all__ = ["ClientData", "InProcess", "Node", "NodeConfig", "Nodes", "OwnData", "Share"]
