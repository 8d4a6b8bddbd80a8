"""Federated learning with learned codes, on PyTorch Lightning."""

from importlib.metadata import version

__version__ = version("fedlight")
