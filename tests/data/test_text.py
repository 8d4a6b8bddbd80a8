"""Speeches become samples of characters, and speakers clients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlight.core.errors import ConfigurationError, DataError
from fedlight.data import SpeakerText
from fedlight.data.text import ALPHABET, CLASSES, encode, read_speeches, windows
from tests.federation import write_speeches


def decoded(codes) -> str:
    return "".join(ALPHABET[int(code)] for code in codes)


def test_every_sample_is_a_piece_of_what_its_speaker_says(tmp_path):
    path = write_speeches(tmp_path / "play.txt")
    said = read_speeches(path.read_text())
    data = SpeakerText("play.txt", length=10, stride=3).load(tmp_path)
    assert data.num_classes == CLASSES == 97 and data.x_train.shape[1:] == (10,) and data.x_train.dtype == torch.float32
    assert set(data.client_train) == set(data.client_test) == set(said)
    for x, y, clients in ((data.x_train, data.y_train, data.client_train), (data.x_test, data.y_test, data.client_test)):
        assert len(x) == len(y) == len(clients)
        assert all(decoded([*chars, label]) in said[speaker] for chars, label, speaker in zip(x, y, clients, strict=True))


def test_the_end_of_what_a_speaker_says_is_for_testing_alone(tmp_path):
    (tmp_path / "play.txt").write_text("A:\n" + "abcdefghij" * 3 + "\n" + "klmnopqrst" * 2 + "\n")
    data = SpeakerText("play.txt", length=4, stride=1, test_fraction=0.4).load(tmp_path)
    seen = set(decoded(torch.cat([data.x_train.flatten().long(), data.y_train])))
    later = set(decoded(torch.cat([data.x_test.flatten().long(), data.y_test])))
    assert seen <= set("abcdefghij\n") and later <= set("klmnopqrst\n")


def test_windows_step_by_the_stride_and_never_pass_the_end():
    codes = np.arange(20)
    for stride in (1, 3, 20):
        found = windows(codes, 5, stride)
        assert found[:, 0].tolist() == list(range(0, 15, stride)) and (found == found[:, :1] + np.arange(6)).all()
    assert windows(codes, 19, 1).shape == (1, 20) and windows(codes, 20, 1).shape == (0, 21)


def test_every_character_has_its_number_and_strangers_share_one():
    assert encode(ALPHABET).tolist() == list(range(96))
    assert set(encode("é\t€\U0001f600").tolist()) == {96}


def test_speakers_who_say_too_little_are_left_out(tmp_path):
    (tmp_path / "play.txt").write_text(f"LONG:\n{'well ' * 40}\n\nSHORT: No.\n")
    data = SpeakerText("play.txt", length=20).load(tmp_path)
    assert set(data.client_train) == set(data.client_test) == {"LONG"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A:\nYes.\n\nno name here\n", "line 4 begins a speech"),
        ("A: Yes.\n", "more than 80 characters"),
        ("", "more than 80"),
        (None, "cannot"),
    ],
)
def test_files_that_are_no_speeches_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "play.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        SpeakerText("play.txt").load(tmp_path)


@pytest.mark.parametrize("changes", [{"length": 0}, {"stride": 0}, {"test_fraction": 1.0}], ids=str)
def test_numbers_out_of_range_are_named(changes):
    with pytest.raises(ConfigurationError, match=next(iter(changes))):
        SpeakerText("play.txt", **changes)


def test_every_other_speaker_makes_two_halves(tmp_path):
    (tmp_path / "play.txt").write_text("".join(f"{name}:\n{'well ' * 20}\n\n" for name in "CABDE"))
    halves = [set(SpeakerText("play.txt", length=10, speakers=half).load(tmp_path).client_train) for half in ("even", "odd")]
    assert halves == [{"A", "C", "E"}, {"B", "D"}]
    with pytest.raises(ConfigurationError, match="`speakers` to be one of all, even, odd"):
        SpeakerText("play.txt", speakers="half")
