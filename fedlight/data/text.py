"""A text with many speakers as a data set of characters, with one client per speaker."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from fedlight.core.errors import DataError, require, require_choice, require_counts
from fedlight.data.arrays import Arrays, build_arrays
from fedlight.data.sources import DataSource

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
"""The characters with their own class: end of line and printable ASCII; all others share one more class."""

CLASSES = len(ALPHABET) + 1


class SpeakerText(DataSource):
    """A text file of speeches: the task is to predict every character from the ``length`` before it (McMahan et al. 2017).

    The file is UTF-8, with blank lines between speeches. The first line of a speech is its speaker's name and a colon, which text may
    follow; further lines are text::

        MENDER:
        The kettle leaks.

        TINKER: Then bring it here.

    Each speaker is one client: the first part of their text is for training, the last for testing. Inputs ``[samples, length]`` are
    character numbers (see `encode`), labels the number of the next character; there are 97. Speakers with too little text are left out.

    Args:
        path: The file, relative to the data root, or absolute.
        length: Number of characters before the predicted one.
        stride: Number of characters between the starts of samples.
        test_fraction: Share of each speaker's text, at its end, for testing.
        speakers: Which speakers to read: all, or every other one in the order of names, from the first (even) or the second (odd): one half
            to train a model on, the other to adapt it to.
    """

    def __init__(
        self, path: str, length: int = 80, stride: int = 4, test_fraction: float = 0.2, speakers: Literal["all", "even", "odd"] = "all"
    ) -> None:
        require_counts(length=length, stride=stride)
        require(0 < test_fraction < 1, f"test_fraction: expected a share between 0 and 1, got {test_fraction}.")
        self.path = path
        self.length = length
        self.stride = stride
        self.test_fraction = test_fraction
        require_choice("speakers", speakers, ("all", "even", "odd"))
        self.speakers = speakers

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return Path(self.path).name

    def load(self, root: Path) -> Arrays:
        """Read the file; raises DataError if it is missing, not such a text, or no speaker has enough text."""
        path = root / Path(self.path).expanduser()
        try:
            said = read_speeches(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as speeches in UTF-8: {error}. Correct the path or the file.") from error
        parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
        clients: dict[str, list[str]] = {"train": [], "test": []}
        first, step = {"all": (0, 1), "even": (0, 2), "odd": (1, 2)}[self.speakers]
        for speaker, text in sorted(said.items())[first::step]:
            codes = encode(text)
            border = len(codes) - round(self.test_fraction * len(codes))
            for split, part in (("train", codes[:border]), ("test", codes[border:])):
                parts[split].append(windows(part, self.length, self.stride))
                clients[split] += [speaker] * len(parts[split][-1])
        if not clients["train"] or not clients["test"]:
            raise DataError(
                f"{path}: expected a speaker with more than {self.length} characters to train and to test on, got none among {len(said)}; "
                "lower `length`."
            )
        pairs = [(found[:, :-1].astype(np.float32), found[:, -1]) for found in map(np.concatenate, parts.values())]
        ids = {f"client_{split}": np.array(names) for split, names in clients.items()}
        return build_arrays(*pairs[0], *pairs[1], CLASSES, source=str(path), **ids)


def read_speeches(text: str) -> dict[str, str]:
    r"""Return the text of each speaker by name, one speech after another.

    Raises:
        ValueError: if a speech does not begin with a name and a colon, naming its line.

    >>> read_speeches("A:\nOne.\n\nB: Two.\n\nA:\nThree.\n")
    {'A': 'One.\nThree.\n', 'B': 'Two.\n'}
    """
    said: dict[str, str] = {}
    speaker: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            speaker = None
        elif speaker is None:
            name, colon, rest = line.partition(":")
            speaker = name.strip()
            if not colon or not speaker:
                raise ValueError(f"line {number} begins a speech but has no name and colon: {line[:40]!r}")
            said[speaker] = said.get(speaker, "") + (f"{rest.strip()}\n" if rest.strip() else "")
        else:
            said[speaker] += f"{line}\n"
    return said


def encode(text: str) -> np.ndarray:
    r"""Return the number of every character ``[characters]``, int64: its index in `ALPHABET`, or 96 if it is not there.

    >>> encode("\n ~é").tolist()
    [0, 1, 95, 96]
    """
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)
    codes = np.where((points >= 32) & (points < 127), points - 31, len(ALPHABET))
    return np.where(points == ord("\n"), 0, codes)


def windows(codes: np.ndarray, length: int, stride: int) -> np.ndarray:
    """Return samples ``[samples, length + 1]`` of a text: ``length`` characters and the next one.

    >>> windows(np.arange(6), 3, 2).tolist()
    [[0, 1, 2, 3], [2, 3, 4, 5]]
    """
    if len(codes) <= length:
        return np.empty((0, length + 1), dtype=np.int64)
    return np.lib.stride_tricks.sliding_window_view(codes, length + 1)[::stride]
