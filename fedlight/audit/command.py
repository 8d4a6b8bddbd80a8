"""The subcommand `fedlight audit`: settings in, attacks, then a table, two files and pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from fedlight.audit.parties import canary_rows, membership_rows
from fedlight.audit.picture import Strip, draw, write_pictures
from fedlight.audit.plan import Audit, Parts
from fedlight.audit.rows import READING, Row, show_rows, write_rows
from fedlight.audit.session import Result, Session
from fedlight.audit.target import Target, trained_network
from fedlight.console.errors import told
from fedlight.console.settings import read_settings, settings_parser
from fedlight.core.errors import ConfigurationError
from fedlight.core.progress import progress

FILE_WIDTH = 200  # characters, where the table does not go to a terminal
FAST_TRIALS = 5  # of membership inference

Build = Callable[[str, Path | None, dict[str, Any], float | None], Parts]
"""Builds the parts that a configuration file of `fit` names (path, folder to look in first, overrides, clients' learning rate)."""


def audit(args: list[str], build: Build) -> None:
    """Run an audit and write its report; raises ``ConfigurationError``, before any attack, if settings or base cannot work."""
    settings, path = settings_of(args)
    name = path.stem if path else "audit"
    parts = build(settings.base, path.parent if path else None, settings.overrides, settings.lr)
    networks = {"initial": parts.network}
    if settings.ckpt_path:
        networks["trained"] = trained_network(parts.network, settings.ckpt_path)
    codecs = {"base": parts.codec} if settings.codecs is None else settings.codecs
    targets = {model: Target(parts, network, codecs, parts.lr, settings.proxy_rounds) for model, network in networks.items()}
    trials = min(settings.membership.trials, FAST_TRIALS) if settings.fast else settings.membership.trials
    for attack in settings.left_out:
        print(f"fedlight audit: {attack.name} is left out of a fast audit: a short run of it shows nothing", file=sys.stderr)
    with progress("fedlight audit: attack", len(networks) * len(settings.tried) * len(settings.observations)) as step:

        def advance(words: str) -> None:
            """Show the next step, or, without words, count one attack as done."""
            step(words.partition(": cohort")[0], done=not words)

        session = Session(settings, parts, advance)
        for model, target in targets.items():
            session.run(target, model)
            if trials:
                seed = settings.seeds[0]
                session.rows += membership_rows(target, settings.observations, settings.membership, trials, seed, model, advance)
            if settings.canaries.count:
                session.rows += canary_rows(target, list(codecs), settings.canaries, settings.seeds[0], model)
    output = Path(settings.output or f"logs/audit/{name.removeprefix('audit_')}")
    report(session, settings, output, f"Leakage audit: {name}")


def settings_of(args: list[str]) -> tuple[Audit, Path | None]:
    """Return the settings in arguments and file, and the file if there is one; raises ``ConfigurationError`` for a mistake."""
    parser = settings_parser("audit", Audit)
    given, path = read_settings("audit", parser, args)
    overrides = _plain(given.pop("overrides"))
    try:
        made = parser.instantiate(given).as_dict()
    except Exception as error:
        raise ConfigurationError(f"audit: {told(error)} (options: fedlight audit --help)") from error
    return Audit(**made, overrides=overrides), path  # classes named in overrides are built with the base, not here


def _plain(value: Any) -> Any:
    """Return nested namespaces as plain mappings."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def report(session: Session, settings: Audit, output: Path, title: str) -> None:
    """Print the table and how to read it, and write files and pictures."""
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(show_rows(session.rows, title))
    console.print(READING, highlight=False)
    paths = write_rows(session.rows, output, title)
    grouped: dict[tuple[str, str], list[tuple[Row, Result, Result]]] = {}  # the results that have images, by model and attack
    for row, result, control in session.shown:
        if len(result.psnr):
            name = row.attack if row.prior == "none" else f"{row.attack} {row.prior}"
            grouped.setdefault((row.model, name), []).append((row, result, control))
    try:
        figures = {}
        for (model, attack), shown in grouped.items():
            stem = "_".join(attack.lower().replace("(", "").replace(")", "").split())
            figures[f"{model}_{stem}"] = draw(strips(shown, settings.images), f"{attack}, {model} model")
        paths += write_pictures(figures, output, READING)
    except ConfigurationError as error:
        print(f"fedlight audit: {error}", file=sys.stderr)
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False)


def strips(shown: list[tuple[Row, Result, Result]], images: int) -> list[Strip]:
    """Return the rows of an attack's picture: the true images, then control and observation for every kind of cohort."""
    lines: list[Strip] = []
    truth = None
    for row, result, control in shown:
        if truth is None or truth.shape != result.truth.shape or bool((truth != result.truth).any()):
            truth = result.truth
            lines.append(Strip("true", truth[:images]))
        plain = f"control: plain update\n{row.clients} client(s), batch {row.batch_size}, {row.local_steps} step(s)"
        if all(line.words != plain for line in lines):
            lines.append(Strip(plain, control.firsts[:images], control.first_psnr[:images]))
        if row.codec != "none" or row.noise:
            ratio = f", {row.message_ratio:.0f}x" if row.message_ratio else ""
            words = f"{row.codec}{ratio}\n{row.sees}"
            lines.append(Strip(words, result.firsts[:images], result.first_psnr[:images]))
    return lines
