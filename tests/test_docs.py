"""What README and pages say holds: code blocks run, commands and configurations exist, links lead somewhere."""

from __future__ import annotations

import ast
import itertools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedlight
from fedlight.console.configs import shipped, with_files
from fedlight.core.errors import ConfigurationError
from fedlight.subcommands import SUBCOMMANDS
from tests.federation import environment

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), ROOT / "logs" / "README.md", *sorted(DOCS.rglob("*.md"))]
WORDS = 1000  # of the README

FIT = {"experiment", "seed_everything", "baseline", "threads", "trainer", "data", "model", "pretraining", "checkpoint"}
RUN = ["README.md", "docs/tutorials/first_run.md", "docs/tutorials/own_module.md", "docs/howto/own_codec.md", "docs/howto/own_algorithm.md"]
RUN += ["docs/howto/gradient_codes.md", "docs/howto/without_lightning.md", "docs/howto/lora.md"]
BEFORE = {
    "README.md": "import fedlight\nfrom lightning.pytorch import Trainer\nfrom mine import MyDataModule, MyLitModule\n",
    "docs/howto/without_lightning.md": "from fedlight.cli import main\nmain(['fit', '--config', 'digits', '--trainer.max_steps', '1'])\n",
}
"""What a page's reader has done before."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, the file that it is (by title), its text, and the line that it begins in."""

    page: str
    language: str
    title: str
    text: str
    line: int


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    lines = enumerate(page.read_text().splitlines(), 1)
    for number, line in lines:
        if opened := re.match(r"( *)```(\w*)(.*)", line):
            inside = itertools.takewhile(lambda item: item[1].strip() != "```", lines)
            text = textwrap.dedent("\n".join(text for _, text in inside))
            title = re.search(r'title="([^"]+)"', opened[3]) or re.match(r"# (\S+\.yaml)\n", text)
            yield Block(name(page), opened[2], title[1] if title else "", text, number)


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def place(block: Block) -> str:
    return f"{block.page}:{block.line}"


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield place and words of every command: those of bash blocks, and those of `fedlight` in the text."""
    for block in of("bash"):
        text = re.sub(r"\\\n\s*", "", block.text)
        text = re.sub(r"<<(\w+)\n.*?\n\1\n", "\n", text + "\n", flags=re.DOTALL)
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            for end, group in itertools.groupby(words, lambda word: word in ("&&", "&", ";", "do", "done", "|") or word.endswith(";")):
                if not end and (command := [word for word in group if not re.fullmatch(r"\w+=\S*|export", word)]):
                    yield place(block), command
    for page in (page for page in PAGES if page.name != "CHANGELOG.md"):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for found in re.findall(r"`((?:fedlight|make|python) [^`]+)`", text):
            yield name(page), shlex.split(re.sub(r"<[^>]*>", "FILE", found.replace("\n", " ").replace("...", "")))


def files_of(page: str) -> dict[str, str]:
    return {block.title: block.text for block in BLOCKS if block.page == page and block.title}


def write_files(page: str, folder: Path) -> None:
    for title, text in files_of(page).items():
        (folder / title).write_text(text)


@pytest.mark.parametrize("block", of("python"), ids=place)
def test_python_compiles(block):
    ast.parse(block.text)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_python_runs(page, tmp_path):
    for source in ("docs/tutorials/own_module.md", page):
        write_files(source, tmp_path)
    text = BEFORE.get(page, "") + "\n".join(block.text for block in of("python") if block.page == page)
    run_python(text, tmp_path)


def run_python(text: str, folder: Path) -> None:
    (folder / "page.py").write_text(text)
    done = subprocess.run([sys.executable, "page.py"], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def made(script: str) -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "scripts" / f"{script}.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(DOCS.glob("notebooks/*.ipynb")), ids=name)
def test_notebook_runs(path, tmp_path):
    assert made("notebooks")["notebook"](path.stem) == path.read_text(), "run docs/scripts/notebooks.py"
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in (cell for cell in cells if cell.startswith("%%writefile ")):
        first, _, text = cell.partition("\n")
        (tmp_path / first.split()[1]).write_text(text)
    run_python("\n".join(cell for cell in cells if not cell.startswith("%%")), tmp_path)


@pytest.mark.parametrize("block", of("yaml"), ids=place)
def test_yaml_is_a_mapping(block):
    assert isinstance(yaml.safe_load(block.text), dict)


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in of("yaml") if not block.page.startswith("docs/reference")], ids=place)
def test_yaml_is_a_configuration(block, tmp_path, monkeypatch, capsys):
    write_files(block.page, tmp_path)
    path = tmp_path / (block.title or "block.yaml")
    path.write_text(block.text)
    keys = {*yaml.safe_load(block.text)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    if "node" in keys:
        from fedlight.deploy import NodeConfig

        assert NodeConfig.read(path).name
    elif "codecs" in keys or "attacks" in keys:
        command = import_module(f"fedlight.{'compare' if 'codecs' in keys else 'audit'}.command")
        command.settings_of(["--config", str(path)])
    else:
        assert keys <= FIT, f"no section of a configuration: {keys - FIT}"
        print_configuration(["fit", "--config", "digits", "--config", str(path)])


def print_configuration(args: list[str]) -> None:
    from fedlight.cli import main

    with pytest.raises(SystemExit) as stopped:
        main([*with_files(args), "--print_config"])
    assert stopped.value.code == 0


COMMANDS = list(commands())


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[f"{where} {' '.join(words[:4])}" for where, words in COMMANDS])
def test_a_command_names_what_exists(where, words):
    page = where.partition(":")[0]
    if words[0] == "fedlight":
        assert len(words) == 1 or words[1] in SUBCOMMANDS or words[1].startswith("-"), f"no subcommand {words[1]}"
        for flag, value in itertools.pairwise(words):
            if flag == "--config" and not value.startswith(("logs/", "{", "FILE")):
                assert value in files_of(page) or value in {f"{known}.yaml" for known in shipped()} or configuration(value)
        if words[1:2] == ["configs"]:
            assert {word for word in words[2:] if not word.startswith("-")} <= {*shipped(), "NAME"}
        if words[1:2] == ["flower"] and len(words) > 2:
            from fedlight.flower.commands import PROGRAMS, parser

            assert parser().parse_args(words[2:3] if words[2] in PROGRAMS else words[2:])
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif "pip" in words[0] or words[:2] == ["-m", "pip"]:
        extras = yaml.safe_load(
            re.sub(r"(?s).*?\[project.optional-dependencies\]\n(.*?)\n\n.*", r"\1", (ROOT / "pyproject.toml").read_text()).replace(
                " = ", ": "
            )
        )
        asked = re.findall(r"\[([\w,]+)\]", " ".join(words))
        assert {extra for group in asked for extra in group.split(",")} <= {*extras}
    elif words[0].startswith("python") and len(words) > 1 and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), words[1]


def configuration(value: str) -> bool:
    try:
        return bool(with_files(["--config", value]))
    except ConfigurationError:
        return False


ONE_ROUND = ["--trainer.max_steps", "1", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
ONE_ROUND += ["--pretraining.proxy.rounds", "6", "--pretraining.proxy.clients", "2"]
FITS = [(where, words) for where, words in COMMANDS if words[:2] in (["fedlight", "fit"], ["fedlight", "pretrain"])]
FITS = [(where, words) for where, words in FITS if "--config" in words and not re.search(r"logs/|FILE|help", " ".join(words))]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "words"), FITS, ids=[f"{where} {' '.join(words[2:])}" for where, words in FITS])
def test_a_command_parses_and_on_the_digits_it_runs(where, words, tmp_path, monkeypatch, capsys):
    write_files(where.partition(":")[0], tmp_path)
    for known, path in shipped().items():
        if f"{known}.yaml" in words:
            shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    given = words[1:] if "--output" not in words else words[1 : words.index("--output")]
    if words[1] == "fit" and {"digits", "digits.yaml"} & {*words} and "--print_config" not in words:
        from fedlight.cli import main

        main([*with_files(given), *ONE_ROUND])
    else:
        print_configuration([word for word in given if word != "--print_config"])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_configurations_exist(page):
    for found in re.findall(r"configs/(\w+)\.yaml", page.read_text()):
        assert found in shipped(), f"no configs/{found}.yaml"


def slugs(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: nothing there"
        assert not anchor or anchor in slugs(target), f"{link}: no such heading in {target.name}"
        inside = not page.is_relative_to(DOCS) or target.is_relative_to(DOCS)
        assert inside, f"{link}: the site has no page outside of docs/"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= WORDS


def pages_of(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from pages_of(part)


def site() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def test_every_page_is_in_the_navigation():
    listed = list(pages_of(site()["nav"]))
    assert len(listed) == len({*listed})
    assert {*listed} == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(page.read_text() for page in (DOCS / "reference" / "api").glob("*.md"))
    homes = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    shown = {name for home in homes if "federate.federate" not in home for name in getattr(import_module(home), "__all__", ())}
    for public in fedlight.__all__:
        assert public in shown or getattr(fedlight, public).__module__ in homes or public == "federate", public


@pytest.mark.parametrize(
    ("script", "function", "page"),
    [
        ("round", "drawing", "assets/round.svg"),
        ("configuration", "page", "reference/configuration.md"),
        ("tensorboard", "page", "reference/tensorboard.md"),
    ],
)
def test_what_is_made_by_a_script_is_as_it_makes_it(script, function, page):
    if script == "configuration":
        pytest.importorskip("flwr", reason="the page has the deployment's options")
    assert made(script)[function]() == (DOCS / page).read_text(), f"run docs/scripts/{script}.py"


@pytest.mark.slow
def test_the_site_builds_and_fetches_nothing(tmp_path):
    pytest.importorskip("material", reason="needs the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=environment() | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outside = r"<(?:script|img|link|iframe|source)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//"
    for path in (tmp_path / "site").rglob("*.html"):
        assert not re.search(outside, path.read_text()), path
    for path in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(?:https?:)?//", path.read_text()), path
