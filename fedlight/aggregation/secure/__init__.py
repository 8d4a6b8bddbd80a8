"""Secure aggregation of integer codes: the server learns their sum and no summand (Bonawitz et al. 2017, double masking).

Needs the packages of the extra ``secure``; nothing here needs Lightning.
"""

from fedlight.aggregation.secure.client import SecureClient, session_of
from fedlight.aggregation.secure.identities import Directory, Identities
from fedlight.aggregation.secure.primitives import Identity
from fedlight.aggregation.secure.server import SecureServer
from fedlight.aggregation.secure.session import SESSION_BYTES, Session, check_threshold, default_threshold
from fedlight.aggregation.secure.sums import SumFormat

__all__ = [
    "SESSION_BYTES",
    "Directory",
    "Identities",
    "Identity",
    "SecureClient",
    "SecureServer",
    "Session",
    "SumFormat",
    "check_threshold",
    "default_threshold",
    "session_of",
]
