"""How a cohort's codes become one."""

from fedlight.aggregation.base import AggregationSetting, Aggregator, PlainAggregator
from fedlight.aggregation.drop_outs import DropOuts
from fedlight.aggregation.robust import Median, NormBound, TrimmedMean
from fedlight.aggregation.secure_aggregator import SecureAggregator
from fedlight.core.running_sum import RunningSum

__all__ = [
    "AggregationSetting",
    "Aggregator",
    "DropOuts",
    "Median",
    "NormBound",
    "PlainAggregator",
    "RunningSum",
    "SecureAggregator",
    "TrimmedMean",
]
