"""The subcommand `fedlight compare`: settings in, runs, then a table, two files and two pictures."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from fedlight.compare.execute import Fit, Job, Outcome, execute
from fedlight.compare.picture import draw_pictures
from fedlight.compare.plan import Comparison, Run, choose_rate, digest, effective, first_runs, further_runs, number_of_runs, read_base
from fedlight.compare.results import Row, make_row, show_rows, unequal_starts, write_rows
from fedlight.console.arguments import Tree
from fedlight.console.errors import told
from fedlight.console.settings import read_settings, settings_parser
from fedlight.core.errors import ConfigurationError
from fedlight.core.progress import Advance, progress

FILE_WIDTH = 160  # characters, if the table does not go to a terminal

DryRun = Callable[[list[str]], Tree]
"""Parses `fedlight` arguments, builds everything they name, runs nothing, and returns the whole configuration."""


def compare(args: list[str], dry_run: DryRun, fit: Fit) -> int:
    """Run a comparison and return the exit status: 1 if a run failed, 0 otherwise. Finished runs are not repeated.

    Raises:
        ConfigurationError: if a setting or the configuration of a codec cannot work; no run has started then.
    """
    comparison, path = settings_of(args)
    output = Path(comparison.output or f"logs/compare/{path.stem if path else 'comparison'}")
    base = read_base(comparison.base, path.parent if path else None)
    parsed = check_codecs(comparison, base, dry_run)
    output.mkdir(parents=True, exist_ok=True)
    session = Session(comparison, base, parsed, output)
    with _stopping():
        session.run(fit)
    return session.report()


def settings_of(args: list[str]) -> tuple[Comparison, Path | None]:
    """Return the settings in arguments and file, and the file if there is one; raises ``ConfigurationError`` for a mistake."""
    given, path = read_settings("compare", settings_parser("compare", Comparison), args)
    return Comparison(**given.as_dict()), path


def check_codecs(comparison: Comparison, base: Tree, dry_run: DryRun) -> dict[str, Tree]:
    """Return the whole configuration of every codec's runs, by name; the reference's has to be uncompressed."""
    parsed = {name: _parse_entry(comparison, base, name, dry_run) for name in comparison.codecs}
    name, model = comparison.reference, parsed[comparison.reference]["model"]
    codec = model.get("codec")
    if model.get("codec_path") or (codec is not None and not codec["class_path"].endswith(".IdentityCodec")):
        raise ConfigurationError(f"Expected `reference` to be uncompressed but {name!r} has a codec: write `{name}: null` in `codecs`")
    return parsed


def _parse_entry(comparison: Comparison, base: Tree, codec: str, dry_run: DryRun) -> Tree:
    """Return the whole configuration of a codec's runs, at a fixed seed and rate, so that only the codecs' settings differ."""
    run = Run(codec, 0, 1.0)
    try:
        config = effective(base, comparison.overrides, comparison.codecs[codec], run, Path("."))
        parsed = dry_run(["fit", "--config", json.dumps(config)])
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"codecs.{codec}: {told(error)}") from error
    if unknown := set(config) - set(parsed):  # the parser accepts an empty part
        raise ConfigurationError(f"codecs.{codec}: Expected parts of a `fit` configuration but got {', '.join(sorted(unknown))}")
    return parsed


class Session:
    """A comparison in progress: the runs that ended so far, and the chosen rates."""

    def __init__(self, comparison: Comparison, base: Tree, parsed: dict[str, Tree], output: Path) -> None:
        self.comparison = comparison
        self.base = base
        self.parsed = parsed
        self.output = output
        self.console = Console()
        if not self.console.is_terminal:
            self.console.width = FILE_WIDTH
        self.outcomes: dict[str, list[Outcome]] = {name: [] for name in comparison.codecs}
        self.rates: dict[str, float] = {}
        self.advance: Advance

    def run(self, fit: Fit) -> None:
        """Run everything that is not finished yet."""
        first = [self._job(run) for codec in self.comparison.codecs for run in first_runs(self.comparison, codec)]
        with progress("Run", number_of_runs(self.comparison)) as self.advance:
            execute(first, fit, self.comparison.jobs, self._take, lambda run: self.advance(f"{run}: running", done=0))

    def _job(self, run: Run) -> Job:
        folder = run.folder(self.output)
        config = effective(self.base, self.comparison.overrides, self.comparison.codecs[run.codec], run, folder)
        return Job(run, json.dumps(config), folder, digest(self.parsed[run.codec], run))

    def _take(self, outcome: Outcome) -> list[Job]:
        """Record an outcome; once all rates of its codec have been tried, return the jobs with the best one."""
        codec = outcome.run.codec
        own = self.outcomes[codec]
        own.append(outcome)
        self.advance(f"{outcome.run}: {outcome.told}", timed=not outcome.again)
        if codec in self.rates or len(own) < len(first_runs(self.comparison, codec)):
            return []
        rate = self._choose(own)
        lr = self.comparison.server_lrs[0] if rate is None else rate
        further = further_runs(self.comparison, codec, lr)
        if rate is None:  # no rate worked, so further runs would fail too
            self.advance(done=len(further), timed=False)
            return []
        self.rates[codec] = rate
        return [self._job(run) for run in further]

    def _choose(self, outcomes: list[Outcome]) -> float | None:
        if len(self.comparison.server_lrs) == 1:
            return self.comparison.server_lrs[0]
        accuracies: dict[float, list[float]] = {lr: [] for lr in self.comparison.server_lrs}
        for outcome in outcomes:
            if outcome.ok and "val_accuracy" in outcome.summary:
                accuracies[outcome.run.lr].append(outcome.summary["val_accuracy"])
        return choose_rate(accuracies, len(self.comparison.tuning_seeds))

    def results(self) -> dict[str, list[Outcome]]:
        """Return, for each codec with results, its runs over ``seeds`` with the chosen rate."""
        chosen = {
            codec: [o for o in outcomes if o.ok and o.run.lr == self.rates.get(codec) and o.run.seed in self.comparison.seeds]
            for codec, outcomes in self.outcomes.items()
        }
        return {codec: outcomes for codec, outcomes in chosen.items() if outcomes}

    def _training(self, codec: str) -> str:
        """Return an entry's training settings as text: entries that differ in them may start with different losses."""
        model = self.parsed[codec]["model"]
        return json.dumps([model.get("algorithm"), model.get("availability")], sort_keys=True, default=str)

    def report(self) -> int:
        """Write table, files and pictures of the results so far, print the failures, and return the exit status."""
        results = self.results()
        reference = results.get(self.comparison.reference, [])
        rows = [make_row(codec, outcomes, reference, self.comparison.target) for codec, outcomes in results.items()]
        if rows:
            self._write(rows, results)
        everything = [outcome for outcomes in self.outcomes.values() for outcome in outcomes]
        for seed, losses in unequal_starts((o for o in everything if o.ok), self._training):
            starts = "; ".join(f"{', '.join(names)}: {loss:.6g}" for loss, names in losses.items())
            self._warn(
                f"seed {seed}: the first round's loss should be the same in every run but was {starts}: they differ in more than codecs"
            )
        failed = [outcome for outcome in everything if not outcome.ok]
        for outcome in failed:
            self._warn(f"failed: {outcome.run}: {outcome.error} (see {outcome.folder})")
        for codec in (name for name in self.comparison.codecs if name not in results):
            self._warn(
                f"{codec}: no results" + ("" if codec in self.rates else ": no rate had a validation accuracy for every tuning seed")
            )
        return 1 if failed or len(results) < len(self.comparison.codecs) else 0

    def _write(self, rows: list[Row], results: dict[str, list[Outcome]]) -> None:
        summary = next(iter(results.values()))[0].summary
        source = self.parsed[self.comparison.reference]["data"]["source"]
        seeds = sorted({outcome.run.seed for outcomes in results.values() for outcome in outcomes})
        title = f"{_name(source)}, {summary['clients']} clients, {summary['rounds']} rounds, seeds {', '.join(map(str, seeds))}"
        self.console.print(show_rows(rows, title, self.comparison.reference, self.comparison.target))
        paths = write_rows(rows, self.output)
        (self.output / "settings.json").write_text(json.dumps(asdict(self.comparison), indent=2) + "\n")
        try:
            paths += draw_pictures(rows, self.output, self.comparison.reference, title)
        except ConfigurationError as error:
            self._warn(str(error))
        for path in paths:
            self.console.print(str(path), soft_wrap=True, highlight=False)
        self.console.print(f"Curves of every run: [bold]tensorboard --logdir {self.output}[/bold]", soft_wrap=True)

    def _warn(self, text: str) -> None:
        print(f"fedlight compare: {text}", file=sys.stderr)


def _name(source: Tree | str | None) -> str:
    """Return the name of a data source: its data set, else its class."""
    if not isinstance(source, dict):
        return str(source or "Digits").rpartition(".")[2]
    arguments = source.get("init_args") or {}
    return str(arguments.get("dataset") or source["class_path"].rpartition(".")[2])


@contextmanager
def _stopping() -> Iterator[None]:
    """End the block, and its worker processes, with exit status 130 on Ctrl-C and 143 on SIGTERM, and print how to resume."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stopped:
        print("fedlight compare: stopped: the same command resumes with the unfinished runs", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT if isinstance(stopped, KeyboardInterrupt) else stopped.code) from None
    finally:
        signal.signal(signal.SIGTERM, before)
