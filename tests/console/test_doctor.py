"""`fedlight doctor` tells what is there and what would add the rest."""

from __future__ import annotations

from importlib import metadata

import pytest
from packaging.requirements import Requirement

from fedlight.console import doctor


def test_what_is_missing_or_too_old_is_named():
    found = doctor.shortfall([Requirement(text) for text in ("numpy>=1", "numpy>=999", "fedlight-no-such-thing>=1")])
    assert found == [f"numpy {metadata.version('numpy')} where >=999 is wanted", "fedlight-no-such-thing is missing"]


def test_requirements_are_sorted_by_extra():
    wanted = doctor.requirements()
    assert {"torch", "lightning"} <= {one.name for one in wanted[""]}
    assert [one.name for one in wanted["plot"]] == ["matplotlib"]
    assert "cryptography" in {one.name for one in wanted["secure"]} - {one.name for one in wanted[""]}


def test_the_report_says_how_to_add_a_missing_extra(monkeypatch, capsys):
    def version(name: str) -> str:
        if name == "matplotlib":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    known = metadata.version
    monkeypatch.setattr(doctor.metadata, "version", version)
    doctor.command([])
    lines = {" ".join(line.split()[:2]): line for line in capsys.readouterr().out.splitlines()}
    assert "extra privacy" in lines and not {"extra dev", "extra test"} & {*lines}
    assert lines["extra plot"].endswith("matplotlib is missing: pip install 'fedlight[plot]'")
    assert known("fedlight") in next(line for what, line in lines.items() if what.startswith("fedlight "))


def test_help_is_no_report(capsys):
    with pytest.raises(SystemExit):
        doctor.command(["--help"])
    assert "usage: fedlight doctor" in (shown := capsys.readouterr().out) and "torch threads" not in shown


@pytest.mark.parametrize(
    ("named", "expected"), [(True, "has MNIST; "), (False, "(FEDLIGHT_DATA is not set) does not exist yet; not there")]
)
def test_the_data_folder_is_looked_at(named, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDLIGHT_DATA", raising=False)
    (tmp_path / "sets" / "MNIST" / "raw").mkdir(parents=True)
    if named:
        monkeypatch.setenv("FEDLIGHT_DATA", str(tmp_path / "sets"))
    assert expected in dict(doctor.report())["data"]
