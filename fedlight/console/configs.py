"""The configurations that ship with fedlight: found by name, listed, copied."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from fedlight.console.names import did_you_mean
from fedlight.console.parser import OneSentence
from fedlight.core.errors import ConfigurationError, require

_FLAGS = ("--config", "-c")


def folder() -> Path:
    """Return the folder of the shipped configurations: in an installed package inside it, in a checkout beside it."""
    package = Path(__file__).parents[1]
    return next((place for place in (package / "configs", package.parent / "configs") if place.is_dir()), package / "configs")


def shipped() -> dict[str, Path]:
    """Return the shipped configurations by name, in alphabetical order."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def find(name: str, option: str = "config") -> Path:
    """Return the file that ``name`` means: a path that exists, else the shipped configuration of that name (`digits`, `digits.yaml`)."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = shipped()
    plain = path.name.removesuffix(".yaml")
    if path.parent in (Path("."), Path("configs")) and plain in known:
        return known[plain]
    raise ConfigurationError(
        f"Expected `{option}` to be a YAML file or the name of a shipped configuration but there is no file {name}"
        f"{did_you_mean(plain, known)} (`fedlight configs` lists them)"
    )


def with_files(args: Sequence[str]) -> list[str]:
    """Return arguments whose `--config` values are files, where a name of a shipped configuration was given."""
    files, follows = [], False
    for argument in args:
        flag, equals, value = argument.partition("=")
        files.append(_file(argument) if follows else f"{flag}={_file(value)}" if equals and flag in _FLAGS else argument)
        follows = not follows and argument in _FLAGS
    return files


def _file(value: str) -> str:
    """Return the file of a `--config` value; a configuration written out, or a flag where a value is missing, stays as it is."""
    return value if not value or value.lstrip().startswith(("{", "-")) or "\n" in value else str(find(value))


def summary(path: Path) -> str:
    """Return the first sentence of the comment that a configuration begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("# ") and not line.startswith("#   "), path.read_text().splitlines())
    return " ".join(line.removeprefix("# ") for line in lines).partition(". ")[0].removesuffix(".")


def command_of(path: Path) -> str:
    """Return the subcommand that a shipped configuration is for, as the comment it begins with has it."""
    return next(iter(re.findall(rf"^#   fedlight (\w+) --config configs/{path.name}", path.read_text(), re.MULTILINE)), "fit")


def require_command(path: Path, subcommand: str, other: Collection[str]) -> None:
    """Raise ``ConfigurationError`` for a shipped configuration of another kind of command: one of ``other`` has options of its own."""
    meant = command_of(path) if path.absolute() in shipped().values() else subcommand
    if meant != subcommand and {meant, subcommand} & set(other):
        raise ConfigurationError(f"{path.stem} is for `fedlight {meant} --config {path.stem}`, not for `fedlight {subcommand}`")


def command(args: Sequence[str]) -> None:
    """Run `fedlight configs`: list the shipped configurations, or copy those named; raises ``ConfigurationError`` for an unknown name."""
    parser = OneSentence("fedlight configs", description="List the shipped configurations, or copy some to edit them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="configurations to copy; without any, all are listed")
    parser.add_argument("--to", default=".", metavar="FOLDER", help="folder to copy to (the current one if not given)")
    given = parser.parse_args(args)
    if not given.names:
        known = shipped()
        width = max(map(len, known), default=0)
        for what in dict.fromkeys(("fit", "compare", "audit", *map(command_of, known.values()))):
            print(f"For `fedlight {what} --config NAME`:")
            print("\n".join(f"  {name:{width}}  {summary(path)}" for name, path in known.items() if command_of(path) == what) + "\n")
        print("Copy one to edit it with `fedlight configs NAME`.")
        return
    files = [find(name) for name in given.names]
    target = Path(given.to).expanduser()
    for new in (target / file.name for file in files):
        require(not new.exists(), f"Expected no file {new} but there is one: remove it, or copy with `--to` elsewhere")
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, target / file.name)
        print(target / file.name)
