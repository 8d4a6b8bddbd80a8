"""``constraints.txt`` names one version of everything that the tests need, within the range that ``pyproject.toml`` allows."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def test_every_requirement_has_one_version_that_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(text for name in extras if name != "completion" for text in extras[name])]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pinned) == len(lines) and lines == sorted(lines, key=lambda line: canonicalize_name(line.split("==")[0]))
    for requirement in map(Requirement, needed):
        if requirement.name != "fedlight":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
