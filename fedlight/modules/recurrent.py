"""A recurrent network for characters."""

from __future__ import annotations

from torch import Tensor, nn

from fedlight.core.errors import require_counts


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
