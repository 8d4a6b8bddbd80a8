"""How a cohort's codes become one."""

from fedlight.aggregation.base import Aggregator, PlainAggregator, Setting
from fedlight.aggregation.drop_outs import DropOuts
from fedlight.aggregation.robust import Median, NormBound, TrimmedMean
from fedlight.aggregation.secure_aggregator import SecureAggregator
from fedlight.core.running_sum import RunningSum

__all__ = ["Aggregator", "DropOuts", "Median", "NormBound", "PlainAggregator", "RunningSum", "SecureAggregator", "Setting", "TrimmedMean"]
