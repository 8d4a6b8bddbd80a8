from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlight.aggregation import PlainAggregator, SecureAggregator
from fedlight.core.codec import Context
from fedlight.core.errors import ConfigurationError
from fedlight.rounds import DropOut, Several, StageDropOut
from fedlight.rounds.availability import STAGES


def test_so_many_clients_fall_silent_in_every_cohort_at_stages_of_all_kinds():
    schedule = StageDropOut(clients=2)
    drawn = [schedule.draw(number, 0, range(10, 20)) for number in range(200)]
    assert {len(silent) for silent in drawn} == {2}
    counts = np.unique([stage for silent in drawn for stage in silent.values()], return_counts=True)
    assert set(counts[0]) == set(STAGES) and counts[1].min() > 50
    assert {client for silent in drawn for client in silent} == set(range(10, 20))


@pytest.mark.parametrize("stage", STAGES)
def test_probabilities_are_those_of_reaching_the_stage_and_failing_there(stage):
    schedule = StageDropOut(**{stage: 0.3})
    drawn = schedule.draw(0, 0, range(2000))
    assert set(drawn.values()) == {stage} and 500 < len(drawn) < 700


def test_the_first_stage_that_fails_is_the_one_that_counts():
    assert set(StageDropOut(share_keys=1.0, unmasking=1.0).draw(0, 0, range(5)).values()) == {"share_keys"}


def test_a_draw_depends_on_seed_round_attempt_and_client_alone():
    schedule = StageDropOut(train=0.5)
    whole = schedule.draw(3, 1, range(50))
    assert whole == StageDropOut(train=0.5).draw(3, 1, range(50))
    assert {client: stage for client, stage in whole.items() if client < 20} == schedule.draw(3, 1, range(20))
    others = [schedule.draw(4, 1, range(50)), schedule.draw(3, 0, range(50)), StageDropOut(train=0.5, seed=1).draw(3, 1, range(50))]
    assert all(other != whole for other in others)


def test_no_more_clients_than_there_are():
    assert len(StageDropOut(clients=9).draw(0, 0, [1, 2])) == 2 and StageDropOut().draw(0, 0, range(9)) == {}


@pytest.mark.parametrize("changes", [{"clients": -1}, {"train": 1.5}, {"unmasking": -0.1}])
def test_numbers_out_of_range_are_refused(changes):
    with pytest.raises(ConfigurationError, match="probabilities"):
        StageDropOut(**changes)


# -- as an availability ----------------------------------------------------------------------------------------------------


COHORT, NOW = np.arange(300), Context(0, 3, 1)
WORK = np.ones(300, dtype=np.int64)
EVERY_STAGE = StageDropOut(**dict.fromkeys(STAGES, 0.1))


def test_the_stages_are_those_of_secure_aggregation():
    assert SecureAggregator.stages == STAGES


def test_with_all_stages_clients_fall_silent_as_drawn_from_the_runs_seed_or_one_of_their_own():
    own = replace(EVERY_STAGE, seed=5)
    drawn = own.draw(NOW.round, NOW.attempt, COHORT.tolist())
    assert set(drawn.values()) == set(STAGES)
    for seed in (0, 1, 5):
        now = Context(seed, NOW.round, NOW.attempt)
        assert own.silent_from(COHORT, WORK, now, STAGES) == drawn
        assert (EVERY_STAGE.silent_from(COHORT, WORK, now, STAGES) == drawn) == (seed == 5)


def test_where_a_code_is_all_that_is_sent_who_falls_silent_later_sends_it():
    drawn = EVERY_STAGE.draw(NOW.round, NOW.attempt, COHORT.tolist())
    silent = EVERY_STAGE.silent_from(COHORT, WORK, NOW, PlainAggregator.stages)
    before = {client for client, stage in drawn.items() if STAGES.index(stage) <= STAGES.index("train")}
    assert silent == dict.fromkeys(before, "train") and len(before) < len(drawn)
    assert EVERY_STAGE.present(COHORT, WORK, NOW).tolist() == [client for client in COHORT.tolist() if client not in before]


def test_of_several_models_the_earliest_stage_counts():
    """Who does not answer at all meets no further part."""
    first, second = StageDropOut(train=0.5), StageDropOut(share_keys=0.3, unmasking=0.3, seed=1)
    expected = second.draw(NOW.round, NOW.attempt, COHORT.tolist())
    for client, stage in first.draw(NOW.round, NOW.attempt, COHORT.tolist()).items():
        expected[client] = min(stage, expected.get(client, stage), key=STAGES.index)
    assert Several([first, second]).silent_from(COHORT, WORK, NOW, STAGES) == expected
    assert Several([second, first]).silent_from(COHORT, WORK, NOW, STAGES) == expected
    gone = DropOut(0.4).silent_from(COHORT, WORK, NOW, STAGES)
    both = Several([DropOut(0.4), first]).silent_from(COHORT, WORK, NOW, STAGES)
    assert set(gone.values()) == {"advertise_keys"} and both.items() > gone.items()


def test_a_fixed_number_depends_on_who_is_invited_and_probabilities_do_not():
    assert StageDropOut(train=0.5).independent and not StageDropOut(clients=1, train=0.5).independent
