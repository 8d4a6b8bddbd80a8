"""The subcommand `fedlight report`: run folders in, one HTML file out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlight.console.parser import OneSentence
from fedlight.report.page import page
from fedlight.report.read import find_runs, names, one_experiment, read_run
from fedlight.subcommands import SUBCOMMANDS


def command(args: Sequence[str]) -> None:
    """Write the report of the runs named; raises ``ConfigurationError`` if there is no run where one is named."""
    parser = OneSentence("fedlight report", description=SUBCOMMANDS["report"])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a folder with runs below, such as logs/digits")
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE", help="the file to write (report.html if not given)")
    parser.add_argument("--title", help="heading of the page")
    given = parser.parse_args(args)
    folders = find_runs(given.runs)
    runs, experiment = list(map(read_run, folders, names(folders))), one_experiment(folders)
    several = f"{len(runs)} runs" + (f" of {experiment}" if experiment else "")
    title = given.title or (runs[0].name if len(runs) == 1 else several)
    output = Path(given.output).expanduser()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(runs, title), encoding="utf-8")
    print(f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {output}")
