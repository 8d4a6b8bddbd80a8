"""The nearest name to a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

USUAL = {
    "rounds": "trainer.max_steps",
    "num_rounds": "trainer.max_steps",
    "max_steps": "trainer.max_steps",
    "epochs": "trainer.max_steps (rounds), or model.algorithm.epochs (of a client)",
    "seed": "seed_everything",
    "clients": "data.num_clients",
    "num_clients": "data.num_clients",
    "cohort_size": "data.sampler.cohort_size",
    "lr": "model.algorithm.lr",
    "learning_rate": "model.algorithm.lr",
    "batch_size": "model.algorithm.batch_size",
    "codec": "model.codec",
}
"""The field's usual words that are no options of a run, and the options that are meant."""


def did_you_mean_option(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for a run's option that a usual word stands for, or else for the nearest one known.

    >>> did_you_mean_option("rounds", ["trainer"]), did_you_mean_option("trainr", ["trainer"])
    ('; did you mean trainer.max_steps?', '; did you mean trainer?')
    """
    usual = USUAL.get(name.replace("-", "_"))
    return f"; did you mean {usual}?" if usual else did_you_mean(name, known)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name nearest to ``name``, regardless of case, or nothing if none is near.

    >>> did_you_mean("transfromcodec", ["TransformCodec", "LinearCodec"]), did_you_mean("xyz", ["TransformCodec"])
    ('; did you mean TransformCodec?', '')
    """
    by_lower = {one.lower(): one for one in known}
    found = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[found[0]]}?" if found else ""
