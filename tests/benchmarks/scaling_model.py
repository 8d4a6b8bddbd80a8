"""What the measured rounds of `scaling.py` would take on machines that were not measured: a fitted model, and said to be one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import nnls

Rows = list[dict[str, Any]]


class ScalingModel:
    """Seconds of a round = a + b * clients a process (+ l + c * bytes all-reduced, where there are several processes).

    a and b belong to a pair of model size and codec, l and c are common; none is negative; least squares of relative errors.

    Attributes:
        latency: l, seconds.
        per_byte: c, seconds a byte, as between two processes here.
        error: median relative error on the rows it is fitted to.
    """

    def __init__(self, rows: Rows) -> None:
        self.kinds = sorted({(row["parameters"], row["codec"]) for row in rows})
        design = np.array([self._features(row) / row["seconds"] for row in rows])
        self.coefficients, _ = nnls(design, np.ones(len(rows)))
        self.error = float(np.median(np.abs(design @ self.coefficients - 1)))
        self.latency, self.per_byte = map(float, self.coefficients[-2:])

    def _features(self, row: dict[str, Any]) -> np.ndarray:
        features = np.zeros(2 * len(self.kinds) + 2)
        place = 2 * self.kinds.index((row["parameters"], row["codec"]))
        features[place : place + 2] = 1, math.ceil(row["clients"] / row["processes"])
        if row["processes"] > 1:
            features[-2:] = 1, row["bytes_all_reduced"]
        return features

    def predict(self, row: dict[str, Any], workers: int, link: float, speed: float) -> tuple[float, float]:
        """Return the seconds of a row's round on ``workers`` with ``link`` bytes a second between them, and of these the all-reduce's."""
        start, client = self.coefficients[2 * self.kinds.index((row["parameters"], row["codec"])) :][:2]
        exchange = math.log2(workers) * self.latency + 2 * (workers - 1) / workers * row["bytes_all_reduced"] / link
        return float(start + client * math.ceil(row["clients"] / workers) / speed + exchange), exchange


def extrapolate(rows: Rows, machines: Mapping[str, tuple[int, float]], speed: float) -> tuple[Rows, list[str]]:
    """Return what ``machines`` (workers, GB/s between them) would make of the rows of several processes, and what that assumes.

    Cohorts that leave some of the workers without a client are left out.
    """
    model, found = ScalingModel(rows), []
    several = [row for row in rows if row["processes"] > 1]
    for (name, (workers, link)), row in itertools.product(machines.items(), several):
        if row["clients"] >= workers:
            seconds, exchange = model.predict(row, workers, link * 1e9, speed)
            what = {key: row[key] for key in ("parameters", "codec", "clients", "bytes_all_reduced")}
            found.append({"machine": name, **what, "seconds": seconds, "share_of_all_reduce": exchange / seconds})
    loopback = f"{1 / model.per_byte / 1e9:.2f} GB/s" if model.per_byte else "too little to tell"
    links = ", ".join(f"{link:g} GB/s in {name}" for name, (_, link) in machines.items())
    return found, [
        "A MODEL, not a measurement: seconds of a round = a + b * clients a process (+ l + c * bytes all-reduced, for several processes), "
        f"fitted to the measured rows; median error on them {model.error:.0%}; l {1e3 * model.latency:.2f} ms, c {loopback}.",
        f"It assumes: a GPU runs clients {speed:g} times as fast as a core here (assumed, not measured: --worker-speed); equal shares; a "
        f"ring that moves 2 (P - 1) / P of the bytes over links of {links} (assumed: --node-link, --network-link) in place of c; l times "
        "log2(P); a as here.",
    ]
