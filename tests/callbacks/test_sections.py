"""The profiler's report has the steps of a round, once a client or once a round each, and costs nothing where there is none."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler

from fedlight.callbacks import CodecRefresh
from fedlight.clients import FedAvg
from fedlight.codecs import PowerSGDCodec
from fedlight.core.pretraining import ProxyFederation
from fedlight.modules.sides import CallbackWatch
from tests.federation import federated, learned, run, trainer

CLIENTS, ROUNDS = 8, 2


def sections(codec=None, steps: int = 3, **changes) -> Counter[str]:
    """Return how often each step of a round was entered in two rounds of eight clients."""
    profiler = SimpleProfiler()
    run(federated(codec=codec, algorithm=FedAvg(lr=0.1, steps=steps, batch_size=8)), ROUNDS, profiler=profiler, **changes)
    durations = {name.removeprefix("[Round]"): times for name, times in profiler.recorded_durations.items() if name.startswith("[Round]")}
    assert all(time >= 0 for times in durations.values() for time in times)
    assert not profiler.current_actions, "a section was left open"
    return Counter({name: len(times) for name, times in durations.items()})


def test_the_steps_of_a_round_are_listed():
    cohorts = CLIENTS * ROUNDS
    expected = {
        "train_client": cohorts + ROUNDS,  # and the end of each cohort
        "encode": cohorts,
        "sum": cohorts + ROUNDS,  # and what comes out
        **dict.fromkeys(("downlink", "all_reduce", "decode", "server_step", "log"), ROUNDS),
    }
    assert sections() == expected
    assert sections(steps=6) == expected, "a section is entered once a local step"


@pytest.mark.slow
def test_pretraining_refresh_and_validation_are_listed_where_they_take_place():
    refresh = CodecRefresh(1, ProxyFederation(rounds=10, clients=4, samples=10))
    found = sections(learned(), callbacks=[refresh], limit_val_batches=1.0, val_check_interval=1, num_sanity_val_steps=0)
    assert (found["pretraining"], found["refresh"], found["validation"]) == (1, ROUNDS - 1, ROUNDS)


def test_every_pass_of_a_codec_is_listed():
    found = sections(PowerSGDCodec(rank=1))
    assert found["train_client"] == (CLIENTS + 1) * ROUNDS
    assert (found["encode"], found["decode"], found["server_step"]) == (2 * CLIENTS * ROUNDS, 2 * ROUNDS, ROUNDS)


def test_without_a_profiler_none_is_asked(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(PassThroughProfiler, "start", lambda self, name: asked.append(name))
    run(federated())
    assert asked, "Lightning's own sections"
    assert not [name for name in asked if name.startswith("[Round]")]


def test_an_iterable_that_fails_leaves_no_section_open():
    def work():
        yield 1
        raise ValueError("the second")

    profiler = SimpleProfiler()
    watch = CallbackWatch(SimpleNamespace(trainer=trainer(profiler=profiler)))
    items = watch.each_in_section("work", work())
    assert next(items) == 1
    with pytest.raises(ValueError, match="the second"):
        next(items)
    assert not profiler.current_actions
    assert len(profiler.recorded_durations["[Round]work"]) == 2
