"""Attacks; a configuration names each by its class path."""

from fedlight.audit.attacks.analytic import BiasTrick, LastLayerLabels, RobbingTheFed
from fedlight.audit.attacks.base import Attack, Auxiliary, Case, Guess
from fedlight.audit.attacks.inverter import LearnedInverter
from fedlight.audit.attacks.matching import DLG, FedAvgInversion, InvertingGradients
from fedlight.audit.attacks.public import LikelyLabels

__all__ = [
    "DLG",
    "Attack",
    "Auxiliary",
    "BiasTrick",
    "Case",
    "FedAvgInversion",
    "Guess",
    "InvertingGradients",
    "LastLayerLabels",
    "LearnedInverter",
    "LikelyLabels",
    "RobbingTheFed",
]
