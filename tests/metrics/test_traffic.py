from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from fedlight.metrics import TrafficCounter, format_bytes


def test_counts_stay_exact_beyond_floating_point() -> None:
    traffic = TrafficCounter(uplink=2**53)
    traffic.add(up=1)
    assert traffic.uplink == 2**53 + 1
    assert TrafficCounter(**json.loads(json.dumps(asdict(traffic)))) == traffic


def test_an_encoder_is_part_of_the_downlink() -> None:
    traffic = TrafficCounter()
    traffic.add(down=100, codec=30)
    assert (traffic.downlink, traffic.codec, traffic.uplink) == (130, 30, 0)


def test_ratio_compares_a_float32_update_with_the_mean_message() -> None:
    traffic = TrafficCounter()
    assert traffic.mean_message == traffic.ratio(1000) == 0
    traffic.add(up=30 + 50, messages=2)
    assert traffic.mean_message == 40
    assert traffic.ratio(1000) == 100


def test_handshakes_are_bytes_and_no_part_of_a_message() -> None:
    traffic = TrafficCounter()
    traffic.add(handshake_up=100, handshake_down=400)
    assert traffic.mean_message == traffic.ratio(1000) == 0
    traffic.add(up=40, messages=1)
    assert (traffic.uplink, traffic.downlink, traffic.handshake_up, traffic.handshake_down) == (140, 400, 100, 400)
    assert traffic.mean_message == 40 and traffic.ratio(1000) == 100


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
