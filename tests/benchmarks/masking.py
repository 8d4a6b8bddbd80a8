"""B6: what secure aggregation costs a client and the server, over codes and over the uncompressed update."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlight.aggregation.secure import Identities, SecureClient, SecureServer, Session, SumFormat, default_threshold
from fedlight.aggregation.secure.sums import add_mask

COHORTS = (10, 50, 100)
DIM = 61_706


@dataclass(frozen=True)
class Vector:
    """What is summed: ``length`` integers of ``bits`` bits."""

    title: str
    length: int
    bits: int


VECTORS = (
    Vector("code of 1,024 x 4 bits", 1_024, 4),
    Vector("code of 16,384 x 4 bits", 16_384, 4),
    Vector("LeNet-5's update, 61,706 x 16 bits", DIM, 16),
)


class Spent:
    """Seconds by whom they were spent."""

    def __init__(self) -> None:
        self.seconds: dict[Any, float] = {}

    def on(self, whom: Any, call: Callable[[], Any]) -> Any:
        """Call and note the seconds."""
        begin = time.perf_counter()
        result = call()
        self.seconds[whom] = self.seconds.get(whom, 0.0) + time.perf_counter() - begin
        return result


def session(vector: Vector, cohort: int) -> dict[str, Any]:
    """Run one session in which every tenth client sends no code, and return seconds and bytes of a client and of the server."""
    limit = (1 << (vector.bits - 1)) - 1
    format = SumFormat(((limit, vector.length),), cohort)
    settings = Session(bytes(16), 0, format, default_threshold(cohort), 0, *4 * [bytes(32)])
    codes = np.random.default_rng(0).integers(-limit, limit + 1, (cohort, vector.length))
    identities, spent = Identities(), Spent()
    directory = {i: identities[i] for i in range(cohort)}
    clients = {i: SecureClient(settings, i, identities.of(i), directory) for i in range(cohort)}
    server = SecureServer(settings, range(cohort), directory)
    up = dict.fromkeys(clients, 0)

    def said(i: int, message: bytes, collect: Callable[[int, bytes], None]) -> None:
        up[i] += len(message)
        spent.on("server", lambda: collect(i, message))

    for i, client in clients.items():
        said(i, spent.on(i, client.advertise), server.collect_keys)
    roster = spent.on("server", server.roster)
    for i, client in clients.items():
        said(i, spent.on(i, lambda client=client: client.share(roster)), server.collect_shares)
    inboxes = {i: spent.on("server", lambda i=i: server.inbox(i)) for i in spent.on("server", server.sharers)}
    there = [i for i in clients if i % 10]
    for i in there:
        message = spent.on(i, lambda i=i: clients[i].masked_code(inboxes[i], codes[i]))
        up[i] -= len(message)  # counted by itself
        said(i, message, server.collect_masked)
    survivors = spent.on("server", server.survivor_list)
    for i in there:
        said(i, spent.on(i, lambda i=i: clients[i].consistency(survivors)), server.collect_signature)
    request = spent.on("server", server.request)
    for i in there:
        said(i, spent.on(i, lambda i=i: clients[i].unmask(request)), server.collect_unmasking)
    total, _ = spent.on("server", server.total)
    assert (total == codes[there].sum(0)).all()
    down = len(roster) + len(inboxes[there[0]]) + len(survivors) + len(request)
    return {
        "client_seconds": statistics.median(spent.seconds[i] for i in there),
        "server_seconds": spent.seconds["server"],
        "vector_seconds": vector_seconds(format, codes[0]),
        "message_bytes": len(message),
        "handshake_bytes_up": up[there[0]],
        "handshake_bytes_down": down,
    }


def vector_seconds(format: SumFormat, code: np.ndarray) -> float:
    """Return the seconds of the part of a client's work that goes with the length of the vector: masks of the whole cohort, packing."""
    keys = [bytes([i]) * 32 for i in range(format.clients)]
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        words = format.words(code, 1)
        for key in keys:
            add_mask(words, key, format.modulus)
        format.pack(words)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure(repeats: int) -> tuple[list[dict[str, Any]], str]:
    """Return a row for each cohort and vector, and a line on what was run."""
    rows = []
    for cohort in COHORTS:
        times = repeats if cohort == COHORTS[0] else 1  # the larger ones take minutes, most of it one arithmetic loop
        results = {vector: [session(vector, cohort) for _ in range(times)] for vector in VECTORS}
        found = {vector: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for vector, runs in results.items()}
        raw = found[VECTORS[-1]]
        for vector, measured in found.items():
            rows.append(
                {
                    "benchmark": "B6",
                    "system": vector.title,
                    "cohort": cohort,
                    "threshold": default_threshold(cohort),
                    "code_dim": vector.length,
                    "raw_over_this": raw["vector_seconds"] / measured["vector_seconds"],
                    "dim_over_code_dim": DIM / vector.length,
                    "runs": [run["client_seconds"] for run in results[vector]],
                    **measured,
                }
            )
    return rows, "B6: every tenth client sends keys and shares and no code; thresholds are the default"


COLUMNS = (
    "benchmark",
    "clients",
    "vector",
    "client ms",
    "server s",
    "masks ms",
    "raw / this",
    "dim / code",
    "message B",
    "keys up B",
    "keys down B",
)


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row's figures as text."""
    return [
        row["benchmark"],
        f"{row['cohort']}, t {row['threshold']}",
        row["system"],
        f"{1e3 * row['client_seconds']:.1f}",
        f"{row['server_seconds']:.2f}",
        f"{1e3 * row['vector_seconds']:.2f}",
        f"{row['raw_over_this']:.1f}",
        f"{row['dim_over_code_dim']:.1f}",
        f"{row['message_bytes']:,.0f}",
        f"{row['handshake_bytes_up']:,.0f}",
        f"{row['handshake_bytes_down']:,.0f}",
    ]
