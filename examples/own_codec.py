"""A codec of one's own: the mean of every eight neighbouring numbers of the update, decoded by repeating it.

python examples/own_codec.py
"""

from __future__ import annotations

from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

import fedlight
from fedlight.core.codec import Codec, Context, Decoder, Encoder, Plan, Private, State
from fedlight.core.export import register_codec
from fedlight.core.layout import Layout
from fedlight.core.wire import CodeFormat

GROUP = 8


class GroupEncoder(Encoder):
    """The client's half."""

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return the groups' means ``[..., code_dim]`` of updates ``[..., dim]``."""
        padded = nn.functional.pad(update, (0, -self.dim % GROUP))
        return padded.unflatten(-1, (-1, GROUP)).mean(-1)


class GroupDecoder(Decoder):
    """The server's half, which sees nothing but the mean of the clients' codes."""

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return the update ``[..., dim]`` of a mean code ``[..., code_dim]``."""
        return mean_code.repeat_interleave(GROUP, -1)[..., : self.dim]


@register_codec  # so that the files encoder.safetensors and decoder.safetensors may name it
class GroupCodec(Codec):
    """Means of eight numbers: linear, so that the sum of codes is the code of the sum."""

    linear = True

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the client's half for updates of this layout."""
        return GroupEncoder(layout, CodeFormat(-(-layout.dim // GROUP)))

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the server's half for updates of this layout."""
        return GroupDecoder(layout, CodeFormat(-(-layout.dim // GROUP)))


def main(rounds: int = 60) -> float:
    """Train on the digits and return the validation accuracy."""
    seed_everything(0)
    data = fedlight.FederatedDataModule(num_clients=20)
    model = fedlight.FederatedModule(
        fedlight.MLP(64, [32], 10), codec=GroupCodec(), algorithm=fedlight.FedAvg(lr=0.1, steps=10, batch_size=16)
    )
    trainer = Trainer(max_steps=rounds, accelerator="cpu")
    trainer.fit(model, datamodule=data)
    accuracy = float(trainer.callback_metrics["val/accuracy"])
    print(f"accuracy {accuracy:.1%}, messages {float(trainer.callback_metrics['bytes/ratio']):.1f} times shorter than updates")
    return accuracy


if __name__ == "__main__":
    main()
