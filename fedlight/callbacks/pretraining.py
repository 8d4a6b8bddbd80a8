"""The pretraining phase as a callback: it trains the codec before round 0, unless there is a trained one."""

from __future__ import annotations

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer

from fedlight.callbacks.base import FederatedRun, section
from fedlight.core.pretraining import CodecTraining, ProxyFederation


class CodecPretraining(Callback):
    """Records updates on proxy data and trains the module's codec on them before round 0.

    Nothing happens if the codec needs no training, was given trained, or comes from a checkpoint. Under several processes
    rank 0 trains and broadcasts.

    Args:
        proxy: How updates are recorded.
        training: How a codec with trainable layers is trained on them.
    """

    def __init__(self, proxy: ProxyFederation | None = None, training: CodecTraining | None = None) -> None:
        self.proxy = proxy or ProxyFederation()
        self.training = training or CodecTraining()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that codec and model go together.

        Raises:
            ConfigurationError: if the codec cannot be made for the model, such as a code longer than the update.
            CodecMismatchError: if the codec was trained for another model.
        """
        if stage != "fit":
            return
        module = cast("FederatedRun", pl_module)
        module.build(stage)
        codec = module.codec
        if codec.layout is not None:
            codec.layout.require_same(module.upload_layout, f"The {type(codec).__name__} given")
            return
        codec.bind(module.upload_layout)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train the codec if it has to be, on rank 0, and send it to all processes.

        Raises:
            ConfigurationError: if it has to be trained and there is no proxy data.
        """
        module = cast("FederatedRun", pl_module)
        if not module.codec.fitted:
            with section(trainer, "pretraining"):
                module.pretrain(self.proxy, self.training)
