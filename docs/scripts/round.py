"""The figure of one round: docs/assets/round.svg.

    python docs/scripts/round.py

Needs nothing but Python. A test compares the file with what this draws.
"""

from __future__ import annotations

from pathlib import Path

FIGURE = Path(__file__).parents[1] / "assets" / "round.svg"

CLIENT, SERVER, INK, SOFT = "#2f6fd0", "#c2591a", "#1f2733", "#5b6675"
WIDTH, HEIGHT = 960, 452
ROWS = (88, 168, 248)
STYLE = f"""\
  text {{ font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: {INK}; text-anchor: middle; }}
  .head {{ font-size: 17px; font-weight: 600; }}
  .body {{ font-size: 15px; }}
  .note {{ font-size: 13.5px; fill: {SOFT}; }}
  .math {{ font-size: 16px; font-style: italic; font-family: Georgia, "DejaVu Serif", serif; }}
  .line {{ stroke: {SOFT}; stroke-width: 1.6; fill: none; marker-end: url(#tip); }}"""


def text(x: float, y: float, words: str, kind: str = "body") -> str:
    """Return centred text; ``_`` begins a subscript of one character."""
    parts = words.split("_")
    made = parts[0] + "".join(f'<tspan dy="4" font-size="11">{p[0]}</tspan><tspan dy="-4">{p[1:]}&#8203;</tspan>' for p in parts[1:])
    return f'<text class="{kind}" x="{x}" y="{y}">{made}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, words: str, below: str = "") -> str:
    """Return a rounded box around its middle with one or two lines of text."""
    shape = (
        f'<rect x="{x - width / 2}" y="{y - height / 2}" width="{width}" height="{height}" rx="9" '
        f'fill="{colour}" fill-opacity="0.10" stroke="{colour}" stroke-width="1.6"/>'
    )
    lines = text(x, y + 5, words) if not below else text(x, y - 4, words) + text(x, y + 15, below, "note")
    return shape + lines


def arrow(*points: tuple[float, float]) -> str:
    """Return an arrow through points."""
    return f'<path class="line" d="M{" L".join(f"{x} {y}" for x, y in points)}"/>'


def drawing() -> str:
    """Return the figure as SVG."""
    middle = ROWS[1]
    parts = [box(85, middle, 118, 70, SERVER, "global model", "round t"), text(85, middle + 58, "w_t", "math")]
    for number, y in enumerate(ROWS, 1):
        name = str(number) if number < len(ROWS) else "n"
        parts += [
            arrow((146, middle), (196, y)),
            box(262, y, 124, 52, CLIENT, f"client {name}", "trains locally"),
            arrow((326, y), (398, y)),
            text(361, y - 9, f"u_{name}", "math"),
            box(452, y, 100, 52, CLIENT, "encoder E"),
            arrow((504, y), (596, middle + (y - middle) * 0.22)),
            text(536, y - 10 if y <= middle else y + 3, f"c_{name}", "math"),
        ]
    parts += [
        f'<circle cx="618" cy="{middle}" r="21" fill="{SERVER}" fill-opacity="0.10" stroke="{SERVER}" stroke-width="1.6"/>',
        text(618, middle + 7, "+", "head"),
        arrow((640, middle), (714, middle)),
        text(676, middle - 10, "C", "math"),
        box(768, middle, 104, 52, SERVER, "decoder D"),
        arrow((821, middle), (868, middle), (868, 318)),
        text(905, middle + 82, "D(C/n)", "math"),
        box(868, 346, 150, 52, SERVER, "server optimizer"),
        arrow((792, 346), (85, 346), (85, middle + 70)),
        text(420, 337, "new global model"),
        text(357, 36, "each client of the round", "head"),
        text(755, 36, "the server", "head"),
        text(357, 306, "an update u stays with its client; a code c leaves it, as a few bytes", "note"),
        text(700, middle + 48, "sees the sum, decodes once", "note"),
        text(
            480,
            408,
            "Pretraining, before round 0: encoder and decoder learn from updates that simulated clients make on public data,",
            "note",
        ),
        text(480, 428, "so that the decoded mean of the codes is close to the mean of the updates.", "note"),
        f'<line x1="566" y1="20" x2="566" y2="290" stroke="{SOFT}" stroke-width="1" stroke-dasharray="4 5"/>',
    ]
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="One round of federated learning with codes">
<style>
{STYLE}
</style>
<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto-start-reverse">
<path d="M0 0 L10 5 L0 10 z" fill="{SOFT}"/></marker></defs>
<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="#ffffff"/>
{chr(10).join(part for part in parts if part)}
</svg>
"""


if __name__ == "__main__":
    FIGURE.write_text(drawing())
    print(FIGURE)
