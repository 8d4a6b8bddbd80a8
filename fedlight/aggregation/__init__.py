"""How a cohort's codes become one."""

from fedlight.aggregation.base import TRAIN, AggregationSetting, Aggregator, Collector, Held, PlainAggregator, Sealer
from fedlight.aggregation.robust import Median, NormBound, TrimmedMean
from fedlight.aggregation.secure_aggregator import SecureAggregator
from fedlight.core.running_sum import RunningSum

__all__ = [
    "TRAIN",
    "AggregationSetting",
    "Aggregator",
    "Collector",
    "Held",
    "Median",
    "NormBound",
    "PlainAggregator",
    "RunningSum",
    "Sealer",
    "SecureAggregator",
    "TrimmedMean",
]
