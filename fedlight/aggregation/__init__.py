"""How a cohort's codes become one."""

from fedlight.core.running_sum import RunningSum

__all__ = ["RunningSum"]
