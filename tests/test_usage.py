"""What the command line imports and makes before it is needed: next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fedlight.cli import DryRun, FederatedCLI, open_cli
from fedlight.subcommands import DESCRIPTION, SUBCOMMANDS
from tests.federation import TINY, environment

FIT = ["fit", *TINY, "--trainer.max_steps", "1", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_subcommand_has_a_line():
    assert {*SUBCOMMANDS} == {
        *FederatedCLI.subcommands(),
        "compare",
        "audit",
        "report",
        "configs",
        "completion",
        "doctor",
        "flower",
        "node",
    }


def test_help_needs_neither_torch_nor_lightning():
    printed = python(
        "import sys; sys.argv = ['fedlight', '--help']; from fedlight.usage import main; main();"
        "print('imported:', *{'torch', 'lightning', 'numpy', 'jsonargparse', 'fedlight.cli'} & {*sys.modules})"
    )
    assert printed.strip().endswith("imported:")
    assert DESCRIPTION.split(":")[0] in printed
    assert all(f"    {name} " in printed for name in SUBCOMMANDS)


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fedlight", "--help"], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and DESCRIPTION.split(":")[0] in done.stdout


@pytest.mark.slow
def test_the_command_line_imports_little_beyond_lightning():
    """No data set, logger, cryptography, accountant or picture before a run asks for it, and no other subcommand."""
    imported = json.loads(
        python(
            "import sys, json, lightning.pytorch.cli; before = {*sys.modules}; import fedlight.cli;"
            "print(json.dumps(sorted({*sys.modules} - before)))"
        )
    )
    foreign = {name.split(".")[0] for name in imported} - {*sys.stdlib_module_names}
    foreign = {name for name in foreign if not name.startswith(("__editable__", "_cython_"))}  # compiled packages share Cython's own
    assert foreign <= {"fedlight", "safetensors", "msgpack", "constriction", "tqdm", "rich", "yaml", "jsonargparse"}
    later = ("fedlight.audit", "fedlight.compare.command", "fedlight.aggregation.secure.")
    assert not [name for name in imported if name.startswith(later)]


def options(cli: FederatedCLI) -> dict[str, bool]:
    """Return the subcommands, and whether each has options of a run."""
    return {name: any(action.dest == "model" for action in parser._actions) for name, parser in cli._subcommand_parsers.items()}


def test_only_the_subcommand_that_is_run_has_its_options_made():
    assert options(open_cli(DryRun, FIT)) == {name: name == "fit" for name in FederatedCLI.subcommands()}


def test_a_file_before_the_subcommand_may_have_a_section_for_each(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text(json.dumps({"fit": {"data": {"num_clients": 7}}, "test": {"data": {"num_clients": 9}}}))
    cli = open_cli(DryRun, ["--config", str(path), *FIT[:1], *FIT[3:]])
    assert all(options(cli).values())
    assert cli.datamodule.num_clients == 7


@pytest.mark.parametrize(("given", "expected"), [("--version", "fedlight 0."), ("configs", "digits ")])
def test_what_needs_no_run_needs_no_torch(given, expected):
    printed = python(
        f"import sys; sys.argv = ['fedlight', {given!r}]; from fedlight.usage import main; main();"
        "print('imported:', *{'torch', 'lightning', 'numpy', 'jsonargparse', 'fedlight.cli'} & {*sys.modules})"
    )
    assert expected in printed and printed.strip().endswith("imported:")


def test_a_configuration_of_no_such_name_ends_before_any_import():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fedlight", "fit", "--config", "digitz"],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "did you mean digits?" in done.stderr.splitlines()[-1]
    assert "| torch" not in done.stderr
