"""The metrics of a run by name: the tag under which TensorBoard groups each, and what it is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shown:
    """How TensorBoard shows a metric: its tag, whose first part is the group, and a sentence."""

    tag: str
    description: str


_SIMULATED = " A simulation sees it; a real server would not."

METRICS: dict[str, Shown] = {
    "val/accuracy": Shown("accuracy/validation", "Share of the server's validation samples that the global model classifies correctly."),
    "test/accuracy": Shown("accuracy/test", "Share of the test set that the global model classifies correctly."),
    "val/loss": Shown("loss/validation", "Mean loss of the global model on the server's validation samples."),
    "test/loss": Shown("loss/test", "Mean loss of the global model on the test set."),
    "sim/loss": Shown("loss/local_training", "Mean loss of the cohort's local training." + _SIMULATED),
    "bytes/uplink": Shown("communication/uplink_total", "Bytes that clients have sent so far, headers included."),
    "bytes/downlink": Shown("communication/downlink_total", "Bytes that clients were sent so far: models, missed sums, encoders."),
    "bytes/codec": Shown("communication/encoders_total", "The encoders' part of the bytes that clients were sent."),
    "bytes/uplink_round": Shown("communication/uplink_of_round", "Bytes that clients sent in the round."),
    "sim/uplink_round": Shown("simulation/uplink_of_round", "Bytes that clients sent in the round." + _SIMULATED),
    "bytes/ratio": Shown("communication/uplink_ratio", "Bytes of an uncompressed float32 update over the mean message."),
    "bytes/handshake": Shown("communication/handshakes_total", "Bytes of keys, shares and signatures of secure aggregation, both ways."),
    "sim/handshake": Shown("simulation/handshakes_total", "Bytes of keys, shares and signatures, both ways." + _SIMULATED),
    "bytes/engine_uplink": Shown(
        "communication/engine_uplink_total", "Bytes that the network's engine carried up so far, HTTP headers apart."
    ),
    "bytes/engine_downlink": Shown("communication/engine_downlink_total", "Bytes that the engine carried down so far, HTTP headers apart."),
    "round/clients": Shown("clients/counted", "Clients whose codes were added up in the round."),
    "round/absent": Shown("clients/absent", "Invited clients that never answered."),
    "round/dropped": Shown("clients/dropped", "Clients that answered and whose code did not count."),
    "sim/clients": Shown("simulation/counted", "Clients whose codes were added up in the round." + _SIMULATED),
    "sim/absent": Shown("simulation/absent", "Invited clients that never answered." + _SIMULATED),
    "sim/dropped": Shown("simulation/dropped", "Clients that answered and whose code did not count." + _SIMULATED),
    "round/attempts": Shown("clients/attempts", "Attempts that the round took; more than one if too few clients answered."),
    "round/wrapped": Shown("codec/sums_put_right", "Numbers of the sum of codes that had left their window and were put right."),
    "round/lost": Shown("codec/sums_lost", "Share of the sum of codes that left its window, could not be put right and was left out."),
    "round/aggregate_norm": Shown("codec/aggregate_length", "Euclidean length of the decoded aggregate."),
    "pretrain/held_out_error": Shown("codec/held_out_error", "Relative error of the decoded mean on recorded updates that no fit saw."),
    "pretrain/loss": Shown("codec/pretraining_loss", "Squared error of the decoded mean that codec training minimises."),
    "privacy/epsilon": Shown("privacy/epsilon", "Epsilon spent so far at the run's delta, also against whoever knows who took part."),
    "privacy/epsilon_if_cohorts_secret": Shown(
        "privacy/epsilon_if_cohorts_secret", "Epsilon spent so far if nobody knows who took part: with amplification by sampling."
    ),
    "privacy/delta": Shown("privacy/delta", "Delta of the guarantee."),
    "privacy/noise_multiplier": Shown("privacy/noise_multiplier", "Standard deviation of a sum's noise in units of the clipping norm."),
    "privacy/clip": Shown("privacy/clipping_norm", "Norm to which codes are clipped."),
    "sim/relative_error": Shown(
        "simulation/relative_error", "Error of the decoded aggregate, relative to the true mean update." + _SIMULATED
    ),
    "sim/cosine": Shown("simulation/cosine", "Cosine of the decoded aggregate and the true mean update." + _SIMULATED),
    "sim/saturation": Shown("simulation/saturation", "Share of a code's numbers at the end of their range." + _SIMULATED),
}
"""Every metric with a name of its own; ``shown`` knows the families too."""

RESULTS = {
    "results/test_accuracy": Shown("results/test_accuracy", "Share of the test set that the final model classifies correctly."),
    "results/worst_clients_accuracy": Shown(
        "results/worst_clients_accuracy", "Mean accuracy of the worst tenth of clients on their own held-out samples, at the end."
    ),
    "results/megabytes_both_ways": Shown("results/megabytes_both_ways", "Megabytes sent in the whole run, up and down."),
    "results/uplink_ratio": Shown("results/uplink_ratio", "Bytes of an uncompressed float32 update over the mean message."),
    "results/seconds": Shown("results/seconds", "Seconds of pretraining and training."),
}
"""What a run comes to, for TensorBoard's HParams tab, in this order."""

_SPREAD = {"mean": "mean over clients", "std": "standard deviation over clients", "worst": "mean of the worst tenth of clients"}


def shown(name: str) -> Shown:
    """Return how TensorBoard shows a metric; names that nobody here knows, such as a user's own, keep theirs.

    >>> shown("val/accuracy").tag, shown("val/client_accuracy_worst").tag, shown("mine")
    ('accuracy/validation', 'clients/accuracy_worst', Shown(tag='mine', description=''))
    """
    known = METRICS.get(name) or RESULTS.get(name)
    if known is not None:
        return known
    if found := re.fullmatch(r"(val|test)/(client|personal)_accuracy_(\w+)", name):
        stage, whose, what = found.groups()
        words = "Accuracy of " + ("the global model" if whose == "client" else "clients' personal models") + " on what clients hold out"
        tag = f"clients/{'' if whose == 'client' else 'personal_'}accuracy_{what}{'' if stage == 'val' else '_after_the_run'}"
        return Shown(tag, f"{words}: {_SPREAD.get(what, what.replace('_', ' '))}.")
    if name.startswith("lr-"):
        return Shown(f"server/learning_rate_{name[3:]}", "Learning rate of the server optimizer.")
    if found := re.fullmatch(r"pretrain/(\w+)", name):
        return Shown(f"codec/{found.group(1)}", "Of the codec's last fit.")
    if found := re.fullmatch(r"(val|test)/(\w+)", name):
        return Shown(f"accuracy/{found.group(2)}_{'validation' if found.group(1) == 'val' else 'test'}", "A metric of your own.")
    return Shown(name, "")


def own_validation(names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that a user's own module or `model.metrics` gave its validation, in alphabetical order.

    >>> own_validation(["val_f1", "val/accuracy", "lr-SGD", "val/f1", "val_f1"])
    ['val/f1', 'val_f1']
    """
    return sorted({name for name in names if name.startswith("val")} - {*metric_names()})


def metric_names() -> list[str]:
    """Return the names of all metrics that a run with a classifying network may log, the families' included."""
    spread = (*_SPREAD, *(f"size_{quarter}" for quarter in range(1, 5)))
    return [
        *METRICS,
        *(f"{stage}/{whose}_accuracy_{what}" for stage in ("val", "test") for whose in ("client", "personal") for what in spread),
    ]
