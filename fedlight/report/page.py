"""The page of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import yaml

from fedlight.core.figures import Row, format_bytes, rows
from fedlight.core.metric_names import own_validation
from fedlight.report.read import RunData
from fedlight.report.svg import bars, line_chart

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d00")

_PARTS_COLOURS = ("#5b5f97", "#9a9ac0", "#c58a00", "#c0504d")

_STYLE = (
    """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --soft: #666666; --line: #dddddd; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181c; --soft: #a0a4ab; --line: #363a42; --card: #1f2228; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 24px 20px 48px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 10px; } h3 { font-size: 15px; margin: 0 0 6px; }
p { margin: 4px 0 10px; } .soft { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 18px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 12px 6px;
  break-inside: avoid; }
figcaption { color: var(--soft); font-size: 13px; margin: 2px 0 6px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font-size: 11px; } svg .label { fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; min-width: 100%; }
th, td { text-align: right; padding: 5px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0 12px; padding: 0; list-style: none; font-size: 14px; }
.key i { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin-right: 7px; vertical-align: middle; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 8px 12px; }
@media print {
  :root { color-scheme: light; --ink: #1a1a1a; --paper: #ffffff; --soft: #666666; --line: #dddddd; --card: #f6f7f9; }
  body { max-width: none; padding: 0; } .charts { grid-template-columns: 1fr 1fr; } h2 { break-after: avoid; }
  .scroll { overflow: visible; break-inside: avoid; } tr { break-inside: avoid; } pre { white-space: pre-wrap; break-inside: avoid; }
  th, td { white-space: normal; } .key i, figure, pre { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
    + "\n".join(
        f".line.c{i} {{ stroke: {colour}; }} .dot.c{i}, .bar.c{i} {{ fill: {colour}; }} i.c{i} {{ background: {colour}; }}"
        for i, colour in enumerate(_COLOURS)
    )
    + "\n".join(f".bar.p{i} {{ fill: {colour}; }} i.p{i} {{ background: {colour}; }}" for i, colour in enumerate(_PARTS_COLOURS))
)


def page(runs: Sequence[RunData], title: str) -> str:
    """Return the report of these runs as one HTML page that needs no other file."""
    sections = [make(runs) for make in (_accuracy, _clients, _bytes, _privacy, _codec, _table, _repeat)]
    key = "".join(f'<li><i class="c{i % 7}"></i>{escape(run.name)}</li>' for i, run in enumerate(runs))
    body = "\n".join(section for section in sections if section)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>"
        f'<p class="soft">A colour is one run on the whole page. Accuracies are of the server\'s validation data unless it '
        f'says otherwise; bytes are those of serialised messages.</p><ul class="key">{key}</ul>\n{body}\n</body></html>\n'
    )


def percent(share: float) -> str:
    """Return a share in per cent."""
    return f"{100 * share:.3g} %"


def _figure(heading: str, note: str, chart: str) -> str:
    return f"<figure><h3>{escape(heading)}</h3><figcaption>{escape(note)}</figcaption>{chart}</figure>" if chart else ""


def _section(heading: str, figures: Sequence[str], before: str = "") -> str:
    inside = "\n".join(one for one in figures if one)
    return f'<h2>{escape(heading)}</h2>{before}<div class="charts">{inside}</div>' if inside else ""


def _curves(runs: Sequence[RunData], heading: str, note: str, metric: str, y_label: str, over_bytes: bool = False, **options: Any) -> str:
    """Return the figure of a metric by rounds, or over bytes, a curve a run."""
    curves = [(run.name, run.over_bytes(metric) if over_bytes else run.series.get(metric, [])) for run in runs]
    if over_bytes:
        options |= {"show_x": format_bytes, "log_x": True}
    return _figure(heading, note, line_chart(curves, "bytes sent both ways (log scale)" if over_bytes else "rounds", y_label, **options))


_OVER_BYTES = "the same, over everything sent so far, up and down"


def _accuracy(runs: Sequence[RunData]) -> str:
    seen = "mean of the cohort; a simulation sees it, a real server would not"
    figures = []
    for metric in own_validation(metric for run in runs for metric in run.series):  # which the user's own module logs
        figures.append(_curves(runs, f"{metric} by rounds", "of the module's own validation", metric, metric))
        figures.append(_curves(runs, f"{metric} by bytes", _OVER_BYTES, metric, metric, over_bytes=True))
    figures += [
        _curves(runs, "Accuracy by rounds", "global model, validation data", "val/accuracy", "accuracy", show_y=percent),
        _curves(runs, "Accuracy by bytes", _OVER_BYTES, "val/accuracy", "accuracy", over_bytes=True, show_y=percent),
        _curves(runs, "Validation loss", "global model", "val/loss", "validation loss", from_zero=True),
        _curves(runs, "Loss of local training", seen, "sim/loss", "loss of local training", from_zero=True),
    ]
    return _section("Accuracy and loss", figures)


def _clients(runs: Sequence[RunData]) -> str:
    sizes = {i: f"val/client_accuracy_size_{i}" for i in range(1, 5)}
    quarters = [(run.name, [(float(i), points[-1][1]) for i, name in sizes.items() if (points := run.series.get(name))]) for run in runs]
    by_size = line_chart(quarters, "quarter of the clients, the smallest first", "accuracy", show_y=percent)
    worst, of = "mean of the tenth of clients with the lowest accuracy", "val/client_accuracy"
    figures = [
        _curves(runs, "Mean over clients", "the global model on what each client holds out", f"{of}_mean", "accuracy", show_y=percent),
        _curves(runs, "Worst tenth of clients", worst, f"{of}_worst", "accuracy", show_y=percent),
        _curves(runs, "Spread", "standard deviation over clients", f"{of}_std", "standard deviation", show_y=percent, from_zero=True),
        _figure("By size of client", "at the end; quarter 1 are the clients with the fewest samples", by_size),
    ]
    return _section("Clients", figures)


_ALL = 0.9999  # of the energy

_PARTS: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
    ("messages up", lambda s: s["uplink_bytes"] - s.get("handshake_uplink_bytes", 0)),
    ("models and sums down", lambda s: s["downlink_bytes"] - s["codec_bytes"] - s.get("handshake_downlink_bytes", 0)),
    ("encoders down", lambda s: s["codec_bytes"]),
    ("keys and shares", lambda s: s.get("handshake_uplink_bytes", 0) + s.get("handshake_downlink_bytes", 0)),
)


def _bytes(runs: Sequence[RunData]) -> str:
    rows = [(run.name, [(what, float(part(run.summary))) for what, part in _PARTS]) for run in runs if "uplink_bytes" in run.summary]
    used = [i for i, (what, _) in enumerate(_PARTS) if any(parts[i][1] > 0 for _, parts in rows)]
    key = "".join(f'<li><i class="p{i}"></i>{_PARTS[i][0]}</li>' for i in used)
    whole = bars(rows, format_bytes)
    look: dict[str, Any] = {"show_y": format_bytes, "from_zero": True}
    figures = [
        _figure("In the whole run", "both directions", f'<ul class="key">{key}</ul>{whole}' if whole else ""),
        _curves(runs, "Sent by clients so far", "codes, with their headers", "bytes/uplink", "bytes up", **look),
        _curves(runs, "Sent to clients so far", "models, missed sums and encoders", "bytes/downlink", "bytes down", **look),
    ]
    return _section("Where the bytes went", figures)


def _privacy(runs: Sequence[RunData]) -> str:
    reported, secret = "also against whoever knows who took part: the figure to report", "Epsilon spent, if cohorts stay secret"
    metric, amplified = "privacy/epsilon_if_cohorts_secret", "with amplification by sampling"
    figures = [
        _curves(runs, "Epsilon spent", reported, "privacy/epsilon", "epsilon", from_zero=True),
        _curves(runs, secret, amplified, metric, "epsilon", from_zero=True),
    ]
    terms = "; ".join(
        f"{run.name}: {run.summary['privacy'].get('mechanism')}, delta {run.summary['delta']:g}, noise multiplier "
        f"{run.summary['noise_multiplier']:.3g}, clip {run.summary['clip']:.3g}"
        for run in runs
        if isinstance(run.summary.get("privacy"), dict) and "delta" in run.summary
    )
    return _section("Differential privacy", figures, f'<p class="soft">{escape(terms)}</p>' if terms else "")


def _codec(runs: Sequence[RunData]) -> str:
    figures = []
    for place, run in enumerate(runs):
        energy = [(layer, [("energy kept", told["energy_kept"])]) for layer, told in run.layers.items() if "energy_kept" in told]
        bits = [(layer, [("bits", told["bits"])]) for layer, told in run.layers.items() if told.get("bits")]
        if all(parts[0][1] > _ALL for _, parts in energy):  # sent as it is
            energy = []
        kept, spent = bars(energy, percent, place), bars(bits, lambda value: f"{value:,.0f}", place)
        figures += [
            _figure(f"Energy kept by layer: {run.name}", "of the true mean update, in the last round compared", kept),
            _figure(f"Bits by layer: {run.name}", "of one message", spent),
        ]
    note = "relative to the true mean update; a simulation sees it"
    error = _curves(runs, "Error of the decoded aggregate", note, "sim/relative_error", "relative error", from_zero=True)
    return _section("The codec", [*figures, error])


_MORE: tuple[Row, ...] = (
    ("worst tenth of clients", "val_client_accuracy_worst", lambda share: f"{100 * share:.2f} %"),
    ("clients", "clients", str),
    ("seed", "seed", str),
)


def _table(runs: Sequence[RunData]) -> str:
    figures = [run.summary for run in runs]
    lines = []
    for title, key, show in (*rows(figures), *_MORE):
        if any(one.get(key) is not None for one in figures):
            cells = "".join(f"<td>{escape(show(one[key]))}</td>" if one.get(key) is not None else "<td></td>" for one in figures)
            lines.append(f"<tr><td>{escape(title)}</td>{cells}</tr>")
    if not lines:
        return ""
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    return f'<h2>Figures</h2><div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>{"".join(lines)}</table></div>'


def _repeat(runs: Sequence[RunData]) -> str:
    lines = [f"fedlight fit --config {run.folder / 'config.yaml'}{_chosen(run)}" for run in runs if (run.folder / "config.yaml").is_file()]
    unfinished = [run.name for run in runs if not run.summary]
    told = f"<p>Not finished, so without a summary: {escape(', '.join(unfinished))}.</p>" if unfinished else ""
    return f"<h2>Repeat them</h2>{told}<pre>{escape(chr(10).join(lines))}</pre>" if lines else told


def _chosen(run: RunData) -> str:
    """Return the options that name what the run chose by itself, so that it is repeated bit for bit."""
    given = yaml.safe_load((run.folder / "config.yaml").read_text())
    threads, engine = run.summary.get("threads"), run.summary.get("engine")
    named = f" --threads {threads}" if threads and given.get("threads") is None else ""
    return named + (f" --model.engine {engine}" if engine and (given.get("model") or {}).get("engine") is None else "")
