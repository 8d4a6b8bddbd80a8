"""A round as two sides and a wire. Read `run.py` first.

| file | what it holds |
|---|---|
| ``run.py`` | the sentence of a round |
| ``messages.py`` | what crosses the wire, and its bytes |
| ``server.py``, ``call.py`` | the server's side, and one attempt on it |
| ``host.py``, ``held.py`` | the clients' side, and what clients hold between rounds |
| ``clients.py`` | the port between: simulated clients, which processes share out, and the same through bytes |
| ``downlink.py``, ``sums.py`` | what clients download |
| ``coded_model.py``, ``coded.py`` | the same where the global model is a code |
| ``availability.py`` | simulations: which of the invited clients answer |
| ``privacy.py``, ``reduce.py`` | the noisy release of a sum, and sums over processes |
| ``stop.py`` | a request to stop, which processes tell each other of |
| ``watch.py`` | hooks on the clients' side (the server's are in ``call.py``) |

Nothing here needs Lightning.
"""

from fedlight.rounds.availability import Availability, Deadline, DropOut, FirstToAnswer, Full, Several, StageDropOut, Times
from fedlight.rounds.call import Call, Watch
from fedlight.rounds.clients import Clients, Connection, Simulated, ThroughBytes
from fedlight.rounds.coded_model import CodedModel
from fedlight.rounds.downlink import CatchUp, Downlink, FullModel, GlobalModel
from fedlight.rounds.host import ClientHost
from fedlight.rounds.messages import ClientUpdate, Download, Reply, ReplyFormat, Request
from fedlight.rounds.run import run_round
from fedlight.rounds.server import Server, ServerState

__all__ = [
    "Availability",
    "Call",
    "CatchUp",
    "ClientHost",
    "ClientUpdate",
    "Clients",
    "CodedModel",
    "Connection",
    "Deadline",
    "Downlink",
    "Download",
    "DropOut",
    "FirstToAnswer",
    "Full",
    "FullModel",
    "GlobalModel",
    "Reply",
    "ReplyFormat",
    "Request",
    "Server",
    "ServerState",
    "Several",
    "Simulated",
    "StageDropOut",
    "ThroughBytes",
    "Times",
    "Watch",
    "run_round",
]
