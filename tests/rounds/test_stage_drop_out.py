from __future__ import annotations

import numpy as np
import pytest
from fedlight.aggregation.drop_outs import STAGES

from fedlight.aggregation import DropOuts
from fedlight.core.errors import ConfigurationError


def test_so_many_clients_fall_silent_in_every_cohort_at_stages_of_all_kinds():
    schedule = DropOuts(clients=2)
    drawn = [schedule.draw(number, 0, range(10, 20)) for number in range(200)]
    assert {len(silent) for silent in drawn} == {2}
    counts = np.unique([stage for silent in drawn for stage in silent.values()], return_counts=True)
    assert set(counts[0]) == set(STAGES) and counts[1].min() > 50
    assert {client for silent in drawn for client in silent} == set(range(10, 20))


@pytest.mark.parametrize("stage", STAGES)
def test_probabilities_are_those_of_reaching_the_stage_and_failing_there(stage):
    schedule = DropOuts(**{stage: 0.3})
    drawn = schedule.draw(0, 0, range(2000))
    assert set(drawn.values()) == {stage} and 500 < len(drawn) < 700


def test_the_first_stage_that_fails_is_the_one_that_counts():
    assert set(DropOuts(share=1.0, unmask=1.0).draw(0, 0, range(5)).values()) == {"share"}


def test_a_draw_depends_on_seed_round_attempt_and_client_alone():
    schedule = DropOuts(masked=0.5)
    whole = schedule.draw(3, 1, range(50))
    assert whole == DropOuts(masked=0.5).draw(3, 1, range(50))
    assert {client: stage for client, stage in whole.items() if client < 20} == schedule.draw(3, 1, range(20))
    others = [schedule.draw(4, 1, range(50)), schedule.draw(3, 0, range(50)), DropOuts(masked=0.5, seed=1).draw(3, 1, range(50))]
    assert all(other != whole for other in others)


def test_no_more_clients_than_there_are():
    assert len(DropOuts(clients=9).draw(0, 0, [1, 2])) == 2 and DropOuts().draw(0, 0, range(9)) == {}


@pytest.mark.parametrize("changes", [{"clients": -1}, {"masked": 1.5}, {"unmask": -0.1}])
def test_numbers_out_of_range_are_refused(changes):
    with pytest.raises(ConfigurationError, match="probabilities"):
        DropOuts(**changes)
