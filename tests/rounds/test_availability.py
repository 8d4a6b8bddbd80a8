"""Laws of availability: who answers depends on names alone. A new model is one more row."""

from __future__ import annotations

import numpy as np
import pytest

from fedlight.core.codec import Context
from fedlight.core.errors import ConfigurationError
from fedlight.rounds.availability import STAGES, Deadline, DropOut, FirstToAnswer, Full, Several, StageDropOut, Times

CLIENTS, WORK = np.arange(200), np.full(200, 100)
MODELS = {
    "full": Full,
    "drop-out": lambda: DropOut(0.3),
    "deadline": lambda: Deadline(2.0),
    "first": lambda: FirstToAnswer(50),
    "several, each on its own": lambda: Several([DropOut(0.3), Deadline(2.0)]),
    "several": lambda: Several([DropOut(0.3), FirstToAnswer(50)]),
    "stages": lambda: StageDropOut(share_keys=0.2, train=0.2, unmasking=0.2),
    "so many, at stages": lambda: StageDropOut(clients=60),
    "several, with stages": lambda: Several([DropOut(0.3), StageDropOut(train=0.3)]),
}
NOW = Context(1, 2, 0)


@pytest.fixture(params=MODELS)
def availability(request):
    return MODELS[request.param]()


def test_those_that_answer_are_invited_and_in_order(availability):
    present = availability.present(CLIENTS, WORK, NOW)
    assert 0 < len(present) <= 200 and (np.diff(present) > 0).all() and np.isin(present, CLIENTS).all()
    assert len(availability.present(CLIENTS[:0], WORK[:0], NOW)) == 0


def test_the_draw_is_named_by_seed_round_and_attempt(availability):
    first = availability.present(CLIENTS, WORK, NOW).tolist()
    assert availability.present(CLIENTS, WORK, NOW).tolist() == first
    for other in (Context(1, 3, 0), Context(1, 2, 1), Context(2, 2, 0)):
        assert (availability.present(CLIENTS, WORK, other).tolist() == first) == isinstance(availability, Full)


def test_whether_a_client_answers_depends_on_who_else_is_invited_just_where_it_says_so(availability):
    whole = availability.present(CLIENTS, WORK, NOW)
    half = availability.present(CLIENTS[::2], WORK[::2], NOW)
    assert (half.tolist() == [client for client in whole.tolist() if client % 2 == 0]) == availability.independent


@pytest.mark.parametrize("stages", [("train",), STAGES], ids=["code alone", "secure aggregation"])
def test_whoever_is_not_present_falls_silent_before_its_code_and_nobody_else_does(availability, stages):
    present = set(availability.present(CLIENTS, WORK, NOW).tolist())
    silent = availability.silent_from(CLIENTS, WORK, NOW, stages)
    assert silent.keys() <= set(CLIENTS.tolist()) and set(silent.values()) <= set(stages)
    before = {client for client, stage in silent.items() if stages.index(stage) <= stages.index("train")}
    assert before == set(CLIENTS.tolist()) - present


def test_the_share_that_drops_out_is_the_probability():
    sizes = [len(DropOut(0.3).present(CLIENTS, WORK, Context(1, number, 0))) for number in range(20)]
    assert abs(np.mean(sizes) / 200 - 0.7) < 5 * np.sqrt(0.21 / 4000)


def test_the_first_to_answer_are_the_fastest():
    seconds = Times().seconds(CLIENTS, WORK, NOW)
    present = FirstToAnswer(50).present(CLIENTS, WORK, NOW)
    assert len(present) == 50 and seconds[present].max() <= np.delete(seconds, present).min()
    assert seconds[Deadline(2.0).present(CLIENTS, WORK, NOW)].max() <= 2.0


def test_speed_belongs_to_the_client_and_more_work_takes_longer():
    a, b = (Times(noise=0).seconds(CLIENTS, WORK, Context(1, number, 0)) for number in (0, 5))
    assert np.array_equal(a, b) and len(set(a.tolist())) == 200
    assert (Times().seconds(CLIENTS, 2 * WORK, NOW) > Times().seconds(CLIENTS, WORK, NOW)).all()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: DropOut(1.0), "probability"),
        (lambda: Deadline(0), "seconds"),
        (lambda: FirstToAnswer(0), "count"),
        (lambda: Times(0), "seconds"),
    ],
)
def test_numbers_out_of_range_are_named(make, name):
    with pytest.raises(ConfigurationError, match=f"`{name}"):
        make()
