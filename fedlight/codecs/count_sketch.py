"""FetchSGD: clients send count sketches, the server unsketches the largest entries and keeps the rest, as a sketch.

Rothchild, Panda, Ullah, Ivkin, Stoica, Braverman, Gonzalez & Arora 2020, "FetchSGD: Communication-Efficient Federated Learning with
Sketching" (arXiv 2007.07682), Algorithm 1; the learning rate is the server optimizer's::

    S   = mean_i S(u_i)                 clients sketch
    S_u = rho S_u + S                   momentum
    S_e = S_e + S_u                     error feedback
    D   = Top-k(U(S_e))                 unsketch
    S_e = S_e - S(D)                    the applied part is not an error

As written, the last line makes the error grow without bound if many entries have the same size: each entry that shares a column is
estimated as the whole column. By default, therefore, the columns that S(D) touches are set to zero in S_e and in S_u, as in the
authors' published code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlight.core.codec import Codec, Context, Decoder, Encoder, Plan, Private, State
from fedlight.core.errors import ConfigurationError, require, require_least
from fedlight.core.layout import Layout
from fedlight.core.random import torch_generator
from fedlight.core.wire import CodeFormat


class CountSketch(nn.Module):
    """A public linear map from ``[..., dim]`` to ``[..., rows * columns]``, drawn from a seed (Charikar, Chen & Farach-Colton 2002).

    In every row a random permutation distributes the signed entries evenly over the columns. Two entries share a column no more
    often than under independent hashing, and sums have a fixed order: the same bits on a GPU as well.
    """

    def __init__(self, dim: int, rows: int, columns: int, seed: int) -> None:
        super().__init__()
        self.dim = dim
        self.rows = rows
        self.columns = columns
        dealt = -(-dim // columns) * columns
        order, signs = torch.empty(rows, dealt, dtype=torch.long), torch.empty(rows, dim, dtype=torch.int8)
        drawn = torch.empty(dim, dtype=torch.long)
        for row in range(rows):
            generator = torch_generator(seed, "count sketch", row)
            torch.randperm(dealt, generator=generator, out=order[row])
            signs[row] = 2 * torch.randint(2, (dim,), generator=generator, out=drawn) - 1
        self.order = nn.Buffer(order, persistent=False)
        self.signs = nn.Buffer(signs, persistent=False)

    def forward(self, update: Tensor) -> Tensor:
        """Return the sketches ``[..., rows * columns]`` of updates ``[..., dim]``."""
        rows = []
        for order, signs in zip(self.order, self.signs, strict=True):
            signed = F.pad(update * signs, (0, len(order) - self.dim))
            dealt = signed.index_select(-1, order)
            rows.append(dealt.reshape(*dealt.shape[:-1], self.columns, -1).sum(-1))
        return torch.cat(rows, dim=-1)

    def estimate(self, sketch: Tensor) -> Tensor:
        """Return the estimates ``[..., dim]`` of the sketched update: the median over rows of an entry's signed column."""
        found = []
        for row, order, signs in zip(torch.split(sketch, self.columns, dim=-1), self.order, self.signs, strict=True):
            dealt = row.repeat_interleave(len(order) // self.columns, dim=-1)
            found.append(torch.empty_like(dealt).index_copy_(-1, order, dealt)[..., : self.dim] * signs)
        ranked = torch.stack(found).sort(dim=0).values
        return (ranked[(self.rows - 1) // 2] + ranked[self.rows // 2]) / 2


class CountSketchEncoder(Encoder):
    """Sketches the update."""

    def __init__(self, layout: Layout, sketch: CountSketch) -> None:
        super().__init__(layout, CodeFormat(sketch.rows * sketch.columns))
        self.sketch = sketch

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return the sketches ``[..., code_dim]`` of updates ``[..., dim]``."""
        sketched: Tensor = self.sketch(update)
        return sketched


class CountSketchDecoder(Decoder):
    """Adds the mean sketch to the rest of earlier ones and extracts the largest entries."""

    replayable = False

    def __init__(self, layout: Layout, sketch: CountSketch, top_k: int, momentum: float, masking: bool) -> None:
        super().__init__(layout, CodeFormat(sketch.rows * sketch.columns))
        self.sketch = sketch
        self.top_k = top_k
        self.momentum = momentum
        self.masking = masking

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return the ``top_k`` largest estimates in their places ``[..., dim]``; ``state`` keeps the error and the momentum."""
        velocity = mean_code
        if self.momentum and "momentum" in state:
            velocity = velocity + self.momentum * state["momentum"].to(mean_code)
        error = velocity + state["error"].to(mean_code) if "error" in state else velocity
        estimates = self.sketch.estimate(error)
        chosen = estimates.abs().topk(self.top_k, dim=-1).indices
        update = torch.zeros_like(estimates).scatter_(-1, chosen, estimates.gather(-1, chosen))
        applied = self.sketch(update)
        state["error"] = error.masked_fill(applied != 0, 0.0) if self.masking else error - applied
        if self.momentum:
            state["momentum"] = velocity.masked_fill(applied != 0, 0.0) if self.masking else velocity
        return update


class CountSketchCodec(Codec):
    """Sends a count sketch of every update; the server extracts the largest entries from the sum and keeps the rest for later rounds.

    Sketches are linear and add up, decoding is not linear. The hash comes from a seed, so clients download nothing. The codec is meant for
    updates with few large entries: otherwise the largest estimates are mostly noise.

    Args:
        ratio: length of the update divided by the length of the sketch.
        rows: independent rows of the sketch, combined by the median (the paper's experiments use 5); fewer rows have
            more columns each, which may do better if no entries stand out.
        top_k: number of entries that the server applies per round; 0 takes half the number of columns.
        momentum: momentum of the mean sketch at the server; the paper's experiments use 0.9 with a smaller learning rate.
        masking: whether the columns of applied entries are set to zero, instead of subtracting the applied values.
        seed: seed of the hash.
    """

    def __init__(
        self, ratio: float = 8.0, rows: int = 5, top_k: int = 0, momentum: float = 0.0, masking: bool = True, seed: int = 0
    ) -> None:
        require(0 <= momentum < 1, f"Expected `momentum` in [0, 1) but got {momentum}")
        self.ratio = ratio
        self.rows = rows
        self.top_k = top_k
        self.momentum = momentum
        self.masking = masking
        self.seed = seed
        require_least(self, ratio=1, rows=1, top_k=0)

    def _sketch(self, layout: Layout) -> CountSketch:
        columns = int(layout.dim / self.ratio) // self.rows
        if columns < 1:
            raise ConfigurationError(
                f"Expected a sketch of at least one column in each of {self.rows} rows but `ratio` {self.ratio:g} leaves "
                f"{int(layout.dim / self.ratio)} numbers: choose a smaller `ratio` or fewer `rows`"
            )
        return CountSketch(layout.dim, self.rows, columns, self.seed)

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the encoder."""
        return CountSketchEncoder(layout, self._sketch(layout))

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the decoder."""
        sketch = self._sketch(layout)
        return CountSketchDecoder(layout, sketch, min(layout.dim, self.top_k or max(1, sketch.columns // 2)), self.momentum, self.masking)
