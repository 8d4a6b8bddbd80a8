"""Differential privacy on codes: clipping, noise, accounting, and the mechanisms that combine them."""

from fedlight.privacy.central import AdaptiveClipping, CentralDP
from fedlight.privacy.distributed import DistributedDP
from fedlight.privacy.ledger import Ledger
from fedlight.privacy.local import LocalDP
from fedlight.privacy.mechanism import AccountingSetting, PrivacyMechanism

__all__ = ["AccountingSetting", "AdaptiveClipping", "CentralDP", "DistributedDP", "Ledger", "LocalDP", "PrivacyMechanism"]
