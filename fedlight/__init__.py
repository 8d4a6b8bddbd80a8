"""Federated learning with learned codes, on PyTorch Lightning."""

from importlib.metadata import version
from typing import Any

__version__ = version("fedlight")


def __getattr__(name: str) -> Any:
    """Import `federate`, and Lightning with it, when it is asked for: a phone needs neither."""
    if name == "federate":
        from fedlight.modules.federate import federate

        return federate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
