"""Networks for characters: a recurrent one and a small transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedlight.core.errors import require, require_counts


class CharLSTM(nn.Module):
    """Two LSTM layers on embedded characters, that tell the next one (after McMahan et al. 2017, arXiv 1602.05629): 824,425 parameters.

    Args:
        num_classes: characters that there are, of inputs and output.
        embedding: width of a character's embedding.
        hidden: width of each LSTM layer.
        layers: number of LSTM layers.

    Raises:
        ConfigurationError: if a number is less than 1.
    """

    def __init__(self, num_classes: int = 97, embedding: int = 8, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        require_counts(num_classes=num_classes, embedding=embedding, hidden=hidden, layers=layers)
        self.embedding = nn.Embedding(num_classes, embedding)
        self.recurrent = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[batch, num_classes]`` of the character after ``x`` ``[batch, length]``, numbers of characters."""
        hidden, _ = self.recurrent(self.embedding(x.long()))
        logits: Tensor = self.classifier(hidden[:, -1])
        return logits


class CharTransformer(nn.Module):
    """A decoder of characters that tells the next one (after Vaswani et al. 2017, arXiv 1706.03762; norms first, learned positions).

    Its layers are plain ``nn.Linear``, which `LoRA` can adapt: 431,969 parameters.

    Args:
        num_classes: characters that there are, of inputs and output.
        width: width of an embedded character.
        heads: heads of attention, which divide the width.
        layers: number of blocks.
        length: the longest text that it looks at.

    Raises:
        ConfigurationError: if a number is less than 1, or ``heads`` does not divide ``width``.
    """

    def __init__(self, num_classes: int = 97, width: int = 128, heads: int = 4, layers: int = 2, length: int = 80) -> None:
        super().__init__()
        require_counts(num_classes=num_classes, width=width, heads=heads, layers=layers, length=length)
        require(width % heads == 0, f"Expected `heads` to divide `width` but got {heads} and {width}")
        self.characters = nn.Embedding(num_classes, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[batch, num_classes]`` of the character after ``x`` ``[batch, length]``, numbers of characters."""
        places = torch.arange(x.shape[1], device=x.device)
        hidden = self.blocks(self.characters(x.long()) + self.positions(places))
        logits: Tensor = self.classifier(self.norm(hidden[:, -1]))
        return logits


class _Block(nn.Module):
    """Causal attention, then a perceptron, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[batch, length, width]`` of ``x`` in the same shape."""
        normal = self.before(x)
        parts = [layer(normal).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        seen = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(-2))
        added: Tensor = x + self.down(nn.functional.gelu(self.up(self.between(x))))
        return added
