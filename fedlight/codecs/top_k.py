"""Top-k sparsification with error feedback: clients send the largest entries and add the rest to the next update.

Stich, Cordonnier & Jaggi 2018, "Sparsified SGD with Memory" (arXiv 1809.07599), Algorithm 1, and Aji & Heafield 2017, "Sparse
Communication for Distributed Gradient Descent" (arXiv 1704.05021), for each client i::

    g = top_k(m_i + u_i);   send g;   m_i <- m_i + u_i - g
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedlight.core.codec import Codec, Context, Decoder, Encoder, Plan, Private, State
from fedlight.core.errors import ConfigurationError, MessageError, require, require_choice
from fedlight.core.layout import Layout
from fedlight.core.wire import CodeFormat, JointFormat

Values = Literal["float32", "float16"]
_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}


def sparse_format(dim: int, ratio: float, dtype: torch.dtype) -> JointFormat:
    """Return the format with as many values and indices as fit ``4 * dim / ratio`` bytes.

    An index takes ``ceil(log2(dim + 1))`` bits: an integer of b bits has 2^b - 1 values in a message.

    Raises:
        ConfigurationError: if no entry fits.
    """
    bits = max(2, dim.bit_length())

    def format(k: int) -> JointFormat:
        return JointFormat((CodeFormat(k, dtype=dtype), CodeFormat(k, bits)))

    budget = int(4 * dim / ratio)
    k = min(dim, budget * 8 // (dtype.itemsize * 8 + bits))
    while format(k).payload_bytes > budget:  # indices fill whole bytes
        k -= 1
    if k < 1:
        raise ConfigurationError(
            f"Expected room for an entry of {format(1).payload_bytes} bytes but `ratio` {ratio:g} leaves {budget} for an update of "
            f"{dim:,} numbers: choose a smaller `ratio`"
        )
    return format(k)


class TopKEncoder(Encoder):
    """Sends the largest entries of the update plus what earlier messages left out."""

    def __init__(self, layout: Layout, format: JointFormat, feedback: bool) -> None:
        super().__init__(layout, format)
        self.values, self.indices = format.parts
        self.feedback = feedback

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return k values, then their k indices in ascending order ``[..., 2 k]`` (float64); ``private.state`` keeps the rest."""
        total = update
        if self.feedback and "residual" in private.state:
            most = torch.finfo(update.dtype).max
            total = (update + private.state["residual"].to(update)).clamp(-most, most)
        chosen = total.abs().topk(self.values.length, dim=-1).indices.sort(dim=-1).values
        most = torch.finfo(self.values.dtype).max
        sent = total.gather(-1, chosen).clamp(-most, most).to(self.values.dtype)
        if self.feedback:
            # On the CPU, because it outlives this round's device.
            private.state["residual"] = total.scatter(-1, chosen, total.gather(-1, chosen) - sent.to(total)).cpu()
        return torch.cat([sent.double(), (chosen - self.indices.limit).double()], dim=-1)


class TopKDecoder(Decoder):
    """Scatters every client's values to their indices, and averages the results."""

    def __init__(self, layout: Layout, format: JointFormat) -> None:
        super().__init__(layout, format)
        self.values, self.indices = format.parts

    def open(self, code: Tensor) -> Tensor:
        """Return the decoded update ``[..., dim]``, float32; raises ``MessageError`` if an index is out of range or repeated."""
        places = code[..., self.values.length :].long() + self.indices.limit
        if (places >= self.dim).any() or (places[..., 1:] <= places[..., :-1]).any():
            raise MessageError(f"Expected ascending indices below {self.dim:,} but the message holds others")
        sent = code[..., : self.values.length].float()
        return sent.new_zeros(*code.shape[:-1], self.dim).scatter_(-1, places, sent)

    def sum_length(self, step: int = 0) -> int:
        """Return the length of an update, because the server sums decoded updates."""
        return self.dim

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return the mean of the decoded updates ``[..., dim]``."""
        return mean_code


class TopKCodec(Codec):
    """Sends the entries of largest magnitude with their indices, and remembers the rest for the client's next round.

    Clients choose different entries, so codes cannot be summed: the server decodes every message and its running sum has ``dim``
    entries, not ``code_dim`` (the stated exception of law 3). A client's residual has ``dim`` numbers and stays with the client.

    Args:
        ratio: bytes of the float32 update divided by those of a message, values and indices included; as many entries are sent as
            fit.
        feedback: whether a client adds the unsent entries to its next update (error feedback).
        values: `float32`, or `float16` for more entries in the same bytes (clamped to +-65504; feedback keeps the rounding error).
    """

    additive = False

    def __init__(self, ratio: float = 32.0, feedback: bool = True, values: Values = "float32") -> None:
        require(ratio >= 1, f"Expected `ratio` >= 1 but got {ratio}")
        require_choice("values", values, tuple(_DTYPES))
        self.ratio = ratio
        self.feedback = feedback
        self.values: Values = values
        self.client_state = feedback

    def _format(self, layout: Layout) -> JointFormat:
        return sparse_format(layout.dim, self.ratio, _DTYPES[self.values])

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the encoder."""
        return TopKEncoder(layout, self._format(layout), self.feedback)

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the decoder."""
        return TopKDecoder(layout, self._format(layout))
