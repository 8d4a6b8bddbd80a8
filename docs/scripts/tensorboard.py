"""The page of TensorBoard's tags, made from `fedlight.core.metric_names`.

    python docs/scripts/tensorboard.py        # writes docs/reference/tensorboard.md

A test compares the page with what this makes.
"""

from __future__ import annotations

from pathlib import Path

from fedlight.core.metric_names import RESULTS, Shown, metric_names, shown

PAGE = Path(__file__).parents[1] / "reference" / "tensorboard.md"

GROUPS = {
    "accuracy": "How good is the model?",
    "loss": "Does training converge?",
    "communication": "What was sent?",
    "clients": "How are single clients doing, and who took part?",
    "privacy": "What was spent?",
    "codec": "How well does the codec do?",
    "simulation": "What only a simulation sees",
}

INTRODUCTION = """\
# TensorBoard

<!-- Made by docs/scripts/tensorboard.py from fedlight/core/metric_names.py. Edit those. -->

```bash
tensorboard --logdir logs
```

A step is a round. A run is named after what differs: `digits/transform-35x/0`.

- **Time series and scalars**: the tags below, grouped by the question that they answer. Each has a description. Values that never change in
  a run are in its card instead.
- **Custom scalars**: accuracy and bytes beside each other.
- **`by_kilobytes`**: a second run in each run's folder, whose step is kilobytes sent both ways. Select only these, and the curves of
  several runs line up at equal bytes.
- **Images**: accuracy over clients, codes over rounds, energy kept by layer.
- **Text**: a card for each run, with setting, codec, bytes, privacy spent and the command that repeats it.
- **HParams**: settings, and the five results that matter.

`metrics.csv` in a run's folder has the same figures by the names in the second column, one row a logged round. Callbacks such as
`EarlyStopping` monitor these names. A run from Python with Lightning's own logger writes to `lightning_logs/version_<number>`, with these
names as tags; with [`RunBoard`](../tutorials/own_module.md#keep-the-run) you get the tags, text and images of this page.

Names that begin with `sim/` are **what a simulation sees** and a real server would not. They never feed back into training. Secure
aggregation leaves them out unless asked.

The demonstration, `fedlight fit --config digits --baseline true`, in custom scalars, in images, and one of its cards:

![Custom scalars: accuracy, bytes so far and accuracy over kilobytes, with and without a codec](../assets/screens/custom_scalars_light.png)
![Images: the accuracy of each client and the energy kept by layer](../assets/screens/images_light.png)
![Text: the card of a run, with result, bytes and setting](../assets/screens/text_light.png)

Pictures: `python tests/benchmarks/screenshots.py logs/digits docs/assets/screens --only custom_scalars,images,text,report --themes light`
(needs Chromium).
"""


def table(rows: list[tuple[str, Shown]], names: bool = True) -> str:
    """Return the rows of a group."""
    head = "| tag | name | meaning |\n|---|---|---|" if names else "| tag | meaning |\n|---|---|"
    lines = [f"| `{one.tag}` | `{name}` | {one.description} |" if names else f"| `{one.tag}` | {one.description} |" for name, one in rows]
    return "\n".join([head, *lines])


def page() -> str:
    """Return the page."""
    known = [(name, shown(name)) for name in metric_names()]
    parts = [INTRODUCTION]
    for group, question in GROUPS.items():
        parts.append(f"## {group}\n\n{question}\n\n" + table([(name, one) for name, one in known if one.tag.split("/")[0] == group]))
    parts.append("## results\n\nIn HParams, at the end of a run.\n\n" + table(list(RESULTS.items()), names=False))
    parts.append(
        "## gradients\n\nOf [gradient codes](../howto/gradient_codes.md), in an ordinary Trainer: "
        "`gradients/bytes` given to all-reduces in "
        "the last step, and `gradients/ratio` over all steps so far."
    )
    left = {one.tag.split("/")[0] for _, one in known} - {*GROUPS}
    assert not left, f"groups without a section: {left}"
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
