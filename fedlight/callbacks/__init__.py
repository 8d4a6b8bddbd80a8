"""Callbacks: the encoder and decoder of a federated run, pretraining, progress, checkpoints and the summary."""

from fedlight.callbacks.base import FederatedCallback
from fedlight.callbacks.board import RunBoard
from fedlight.callbacks.checkpoint import RoundCheckpoint
from fedlight.callbacks.codec import CodecPretraining, CodecRefresh, GradientDecoder, GradientEncoder, codec_callbacks
from fedlight.callbacks.gradients import GradientCodes
from fedlight.callbacks.progress import RoundProgressBar
from fedlight.callbacks.recorder import UpdateRecorder
from fedlight.callbacks.summary import RunSummary

__all__ = [
    "CodecPretraining",
    "CodecRefresh",
    "FederatedCallback",
    "GradientCodes",
    "GradientDecoder",
    "GradientEncoder",
    "RoundCheckpoint",
    "RoundProgressBar",
    "RunBoard",
    "RunSummary",
    "UpdateRecorder",
    "codec_callbacks",
]
