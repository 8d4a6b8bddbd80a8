"""`node.yaml`, section by section. A mistake in it is one sentence with the key and the file, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from fedlight.console.arguments import read_yaml
from fedlight.console.check import check_section
from fedlight.console.errors import told
from fedlight.console.names import did_you_mean
from fedlight.core.errors import ConfigurationError, require
from fedlight.deploy.settings import build

T = TypeVar("T")

SECTIONS = {"node": "what the client's owner decides", "flower": "how the node reaches its SuperLink"}


def read_section(path: Path, name: str, cls: type[T]) -> T:
    """Return what a section of a `node.yaml` describes: an object of ``cls``, whose arguments are the section's keys."""
    require(path.is_file(), f"Expected the configuration of a node but there is no file {path}: `fedlight flower init` writes one")
    tree = read_yaml(path)
    for key in tree:
        require(key in SECTIONS, f"There is no section {key} in {path}{did_you_mean(str(key), SECTIONS)} (there are {', '.join(SECTIONS)})")
    given = tree.get(name)
    if not isinstance(given, dict):
        got = "none" if given is None else repr(given)
        raise ConfigurationError(f"Expected a section `{name}`, {SECTIONS[name]}, in {path} but got {got}")
    check_section(name, cls.__name__, given, path)
    if "LightningData" in str(given):
        import fedlight.data.datamodule  # noqa: F401 (Lightning: its short name is known once it is loaded)
    try:
        return build(cls, given, name)
    except Exception as error:  # whatever is wrong with a file that somebody wrote, or with what it names
        raise ConfigurationError(f"{told(error)} (in {path})") from error


def require_file(path: Path, key: str, file: Path) -> None:
    """Raise ``ConfigurationError`` if the file that a key of a `node.yaml` names is not there."""
    require(file.is_file(), f"Expected {key} in {path} to be a file but there is no {file}: correct the path, which starts from its folder")
