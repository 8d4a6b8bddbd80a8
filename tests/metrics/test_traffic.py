from __future__ import annotations

import json

import pytest

from fedlight.core.errors import ConfigurationError
from fedlight.metrics import TrafficCounter, format_bytes


def test_counts_stay_exact_beyond_floating_point() -> None:
    traffic = TrafficCounter(uplink=2**53)
    traffic.add_message(1)
    assert traffic.uplink == 2**53 + 1
    assert TrafficCounter(**json.loads(json.dumps(traffic.state_dict()))) == traffic


def test_an_encoder_is_part_of_the_downlink() -> None:
    traffic = TrafficCounter()
    traffic.add_download(100)
    traffic.add_codec(30)
    assert (traffic.downlink, traffic.codec, traffic.uplink) == (130, 30, 0)


def test_ratio_compares_a_float32_update_with_the_mean_message() -> None:
    traffic = TrafficCounter()
    assert traffic.mean_message == traffic.ratio(1000) == 0
    traffic.add_message(30)
    traffic.add_message(50)
    assert traffic.mean_message == 40
    assert traffic.ratio(1000) == 100


def test_handshakes_are_bytes_and_no_part_of_a_message() -> None:
    traffic = TrafficCounter()
    traffic.add_handshake(100, 400)
    assert traffic.mean_message == traffic.ratio(1000) == 0
    traffic.add_message(40)
    assert (traffic.uplink, traffic.downlink, traffic.handshake_up, traffic.handshake_down) == (140, 400, 100, 400)
    assert traffic.mean_message == 40 and traffic.ratio(1000) == 100
    with pytest.raises(ConfigurationError, match=">= 0"):
        traffic.add_handshake(1, -1)


def test_state_round_trip_and_refusal() -> None:
    traffic = TrafficCounter(uplink=1, downlink=2, codec=1, messages=1)
    other = TrafficCounter()
    other.load_state_dict(traffic.state_dict())
    assert other == traffic
    for state in ({"uplink": 1}, {**traffic.state_dict(), "more": 1}, {**traffic.state_dict(), "codec": -1}):
        with pytest.raises(ConfigurationError):
            other.load_state_dict(state)
    assert other == traffic


def test_only_whole_numbers_of_bytes_count() -> None:
    traffic = TrafficCounter()
    with pytest.raises(TypeError):
        traffic.add_message(1.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=">= 0"):
        traffic.add_codec(-1)
    assert traffic == TrafficCounter()


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.00 kB"),
        (1000, "1.00 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_600, "1.00 MB"),
        (61_706 * 4, "247 kB"),
        (1.5e9, "1.50 GB"),
        (2e12, "2.00 TB"),
        (5e18, "5000 PB"),
    ],
)
def test_format_bytes(n_bytes: float, text: str) -> None:
    assert format_bytes(n_bytes) == text
