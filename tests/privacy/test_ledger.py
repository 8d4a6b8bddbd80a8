"""A ledger without holes: whatever was released is in it, whatever happens afterwards."""

from __future__ import annotations

import pytest

from fedlight.core.errors import ConfigurationError
from fedlight.privacy import CentralDP
from fedlight.privacy.ledger import Ledger
from fedlight.privacy.mechanism import AccountingSetting


def setting(integer: bool = False, rate: float = 0.1) -> AccountingSetting:
    return AccountingSetting(rate, 10, 100, 50, integer, 8 * integer)


def test_a_release_is_in_the_journal_before_it_counts(tmp_path):
    ledger = Ledger()
    ledger.add(1.0, 0.5)
    ledger.keep_journal(tmp_path / "run" / "privacy_ledger.txt")
    ledger.add(1.0, 0.5)
    ledger.add(2.0, 1.0)
    assert (tmp_path / "run" / "privacy_ledger.txt").read_text() == "1.0 0.5\n1.0 0.5\n2.0 1.0\n"
    ledger.journal = tmp_path / "absent" / "ledger.txt"
    with pytest.raises(OSError, match="No such file"):
        ledger.add(1.0, 0.5)
    assert len(ledger) == 3, "what cannot be written is not released"


def test_a_checkpoint_that_missed_releases_gets_them_from_the_journal(tmp_path):
    """As after a kill: the checkpoint is older than the last sums. Two runs that go on from it share one journal."""
    ledger = Ledger()
    ledger.keep_journal(tmp_path / "privacy_ledger.txt")
    ledger.add(1.0, 0.5)
    saved = ledger.state_dict()
    ledger.add(1.0, 0.5)
    ledger.add(2.0, 1.0)
    for releases in (3, 4):
        resumed = Ledger()
        resumed.load_state_dict(saved)
        resumed.keep_journal(tmp_path / "another" / "privacy_ledger.txt")
        assert len(resumed) == releases
        resumed.add(2.0, 1.0)
    assert resumed.lines == [(1.0, 0.5, 2), (2.0, 1.0, 3)]


def test_a_journal_that_is_gone_leaves_the_checkpoints_ledger(tmp_path):
    ledger = Ledger()
    ledger.load_state_dict({"lines": [[1.0, 0.5, 2]], "journal": str(tmp_path / "gone.txt")})
    ledger.keep_journal(tmp_path / "new.txt")
    assert ledger.lines == [(1.0, 0.5, 2)] and (tmp_path / "new.txt").read_text() == "1.0 0.5\n" * 2


def test_a_line_that_a_crash_cut_off_was_not_released_and_is_mended(tmp_path):
    path = tmp_path / "privacy_ledger.txt"
    path.write_text("1.0 0.5\n1.0 0.5\n1.0 0")
    ledger = Ledger()
    ledger.load_state_dict({"lines": [[1.0, 0.5, 1]], "journal": str(path)})
    ledger.keep_journal(tmp_path / "new.txt")
    ledger.add(2.0, 1.0)
    assert path.read_text() == "1.0 0.5\n1.0 0.5\n2.0 1.0\n" and ledger.lines == [(1.0, 0.5, 2), (2.0, 1.0, 1)]


@pytest.mark.parametrize(("text", "said"), [("1.0 0.5\n", "2 releases that the checkpoint knows but it holds 1"), ("1.0\n", "every line")])
def test_a_journal_that_lost_releases_is_refused(tmp_path, text, said):
    (tmp_path / "privacy_ledger.txt").write_text(text)
    ledger = Ledger()
    ledger.load_state_dict({"lines": [[1.0, 0.5, 2]], "journal": str(tmp_path / "privacy_ledger.txt")})
    with pytest.raises(ConfigurationError, match=said):
        ledger.keep_journal(tmp_path / "new.txt")


def test_a_journal_in_a_folder_that_was_moved_is_found(tmp_path):
    (tmp_path / "privacy_ledger.txt").write_text("1.0 0.5\n" * 3)
    ledger = Ledger()
    ledger.load_state_dict({"lines": [[1.0, 0.5, 2]], "journal": str(tmp_path / "before" / "privacy_ledger.txt")})
    ledger.find_journal(tmp_path / "privacy_ledger.txt")
    ledger.keep_journal(tmp_path / "new.txt")
    assert len(ledger) == 3 and not (tmp_path / "new.txt").exists()


def test_epsilon_without_amplification_of_integer_codes_is_not_limited_to_integer_orders():
    """Sampled discrete noise has results at integer orders only; without sampling the other orders hold, and are tighter."""
    found = {}
    for integer in (False, True):
        mechanism = CentralDP(1.0, 0.8, delta=1e-5, accountant="auto" if integer else "rdp", simulation_seed=0)
        mechanism.calibrate(setting(integer), 1000)
        for _ in range(50):
            mechanism.record_release(0.0)
        found[integer] = mechanism.epsilon(amplified=False)
    assert found[True] == pytest.approx(found[False])


def test_cohorts_that_amplify_are_drawn_from_a_secret_that_the_checkpoint_keeps():
    first, second = (CentralDP(1.0, 1.0, delta=1e-5) for _ in range(2))
    for mechanism in (first, second):
        mechanism.calibrate(setting(), 1000)
    assert first.cohort_seed is not None and first.cohort_seed != second.cohort_seed
    assert first.report()["privacy"]["cohorts"] == "secret, in the checkpoints' files of clients"
    second.load_state_dict(first.state_dict())
    second.calibrate(setting(), 1000)
    assert second.cohort_seed == first.cohort_seed
    simulated = CentralDP(1.0, 1.0, delta=1e-5, simulation_seed=1)
    simulated.calibrate(setting(), 1000)
    assert simulated.cohort_seed is None and simulated.report()["privacy"]["cohorts"] == "public"
    assert next(iter(first.report())) == "epsilon"
