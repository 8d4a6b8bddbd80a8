"""What damaged and forged files do: error classes, most seconds of CPU and most memory of thousands of codec files, banks, checkpoints.

Run ``python -m tests.benchmarks.mutations --codecs 20000 --banks 3000 --checkpoints 2000``. Half of the mutations change bytes: bits,
bytes, pieces, the end. The other half forge: a value becomes another, and the file's own digest is made to fit where that takes no secret.
A run goes on from each checkpoint, or refuses to.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import struct
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from fedlight.codecs import (
    AutoencoderCodec,
    ChainCodec,
    CountSketchCodec,
    GridCodec,
    LinearCodec,
    PowerSGDCodec,
    QSGDCodec,
    QuantizeCodec,
    StackedCodec,
    TopKCodec,
    TransformCodec,
    TwoSidedCodec,
)
from fedlight.core import export
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec
from fedlight.core.export import DECODER_FILE, ENCODER_FILE, load_codec, load_decoder, load_encoder, save_codec
from fedlight.core.layout import Layout
from tests.benchmarks.mutated_checkpoints import checkpoint_files, forge_bytes, forge_value, resume

LAYOUT = Layout(("w", "b", "v", "c"), ((12, 10), (12,), (4, 12), (4,)))
CODECS: tuple[Callable[[], Codec], ...] = (
    lambda: ChainCodec([AutoencoderCodec(3, block_size=12, width=4), QuantizeCodec(5)]),
    lambda: LinearCodec(3, block_size=12),
    lambda: LinearCodec(3, "random", block_size=12),
    lambda: TransformCodec(6),
    lambda: TwoSidedCodec(4),
    lambda: CountSketchCodec(4, rows=3),
    lambda: PowerSGDCodec(1),
    lambda: QSGDCodec(4, 16),
    lambda: TopKCodec(4),
    lambda: ChainCodec([LinearCodec(3, "random", block_size=12), GridCodec(0.01)]),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 1.5, 1e9, 1e308, 10**6, 10**9, 10**12, 10**18, 10**30, float("nan"), float("inf")),
    *("", "x", "torch.nn.Linear", "no_such_module.Codec", "fedlight.codecs.IdentityCodec", "[[]]", [], [0], [[]], {}, {"a": 1}),
)


@dataclass
class Found:
    """What came of loading: how often each class of error, and the most that one file took."""

    classes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    megabytes: float = 0.0


def change_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Return a file with a bit, a byte or a piece of it changed, three times in four within its header."""
    data = bytearray(raw)
    header = len(raw) if raw.startswith(b"PK") else 8 + struct.unpack_from("<Q", raw)[0]
    place = draw.randrange(header if draw.random() < 0.75 else len(raw))
    kind, count = draw.randrange(6), draw.randint(1, 40)
    if kind == 0:
        data[place] ^= 1 << draw.randrange(8)
    elif kind == 1:
        data[place] = draw.choice(b'0123456789[]{}",:.-eE \x00\xff')
    elif kind == 2:
        del data[place : place + count]
    elif kind == 3:
        data[place:place] = draw.randbytes(count)
    elif kind == 4:
        data[place:place] = data[place : place + count]
    else:
        del data[place:]
    return bytes(data)


def forge(raw: bytes, draw: random.Random) -> bytes:
    """Return a file that describes something else, in one value, and is otherwise as sound as it can be made."""
    metadata = json.loads(raw[8 : 8 + struct.unpack_from("<Q", raw)[0]])["__metadata__"]
    tensors = load(raw)
    if "layout" in metadata:
        metadata["layout"] = json.dumps(_other(json.loads(metadata["layout"]), draw))
        return save(tensors, metadata)
    description = json.loads(metadata["codec"])
    description["layout"] = json.loads(description["layout"])
    for stage in description["plan"].get("stages", ()):
        stage["layout"] = json.loads(stage["layout"])
    description = _other(description, draw)
    if isinstance(description, dict):
        description = {key: json.dumps(value) if key == "layout" else value for key, value in description.items()}
        plan = description.get("plan")
        stages = plan.get("stages") if isinstance(plan, dict) else None
        for stage in stages if isinstance(stages, list) else ():
            if isinstance(stage, dict) and "layout" in stage:
                stage["layout"] = json.dumps(stage["layout"])
    metadata["codec"] = json.dumps(description)
    if "own" in metadata:
        metadata["own"] = export._decoder_digest(description, metadata["digest"], tensors)
    return save(tensors, metadata)


def forged(path: Path, raw: bytes, draw: random.Random) -> bytes:
    """Return a forged file of any kind."""
    if not raw.startswith(b"PK"):
        return forge(raw, draw)
    return forge_bytes(raw, draw) if draw.random() < 0.5 else forge_value(path, draw, _other)


def _other(value: Any, draw: random.Random) -> Any:
    """Return plain data with one value somewhere in it replaced, taken away or doubled."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, copied = draw.choice(keys), value.copy()
        if draw.random() < 0.05:
            del copied[key]
        elif isinstance(copied, list) and draw.random() < 0.05:
            copied.append(copied[key])
        else:
            copied[key] = _other(value[key], draw)
        return copied
    if type(value) in (int, float) and draw.random() < 0.5:
        return value * draw.choice((0, 2, 10, 1000, -1, 10**6)) + draw.choice((0, 1))
    return draw.choice(VALUES)


def mutated(folder: Path, draw: random.Random, make: Callable[[Path], list[Path]]) -> Iterator[Path]:
    """Yield, without end, a file of ``make``'s that was mutated; it is as it was before the next one."""
    files = [(file, file.read_bytes()) for file in make(folder)]
    while True:
        path, raw = draw.choice(files)
        path.write_bytes(change_bytes(raw, draw) if draw.random() < 0.5 else forged(path, raw, draw))
        yield path
        path.write_bytes(raw)


def codec_files(folder: Path) -> list[Path]:
    """Write a pair of files for each of the codecs."""
    generator = torch.Generator().manual_seed(0)
    bank = UpdateBank(torch.randn(6, 4, LAYOUT.dim, generator=generator), LAYOUT)
    files = []
    for number, make in enumerate(CODECS):
        codec = make()
        codec.fit(bank, lambda *_: {})
        save_codec(codec, folder / str(number))
        files += [folder / str(number) / ENCODER_FILE, folder / str(number) / DECODER_FILE]
    stacked = StackedCodec(QuantizeCodec(4), 2, 1).bind(LAYOUT.stacked(2, 1))
    save_codec(stacked, folder / "stacked")
    return [*files, folder / "stacked" / ENCODER_FILE, folder / "stacked" / DECODER_FILE]


def bank_files(folder: Path) -> list[Path]:
    """Write two banks."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for rounds in (2, 5):
        UpdateBank(torch.randn(rounds, 3, LAYOUT.dim, generator=generator), LAYOUT).save(folder / f"bank{rounds}.safetensors")
    return [folder / f"bank{rounds}.safetensors" for rounds in (2, 5)]


def load_it(path: Path, draw: random.Random) -> Any:
    """Load a file by itself, or the folder that it lies in; let a run go on from a checkpoint."""
    if path.name.startswith("last."):
        return resume(path.with_name("last.ckpt"))
    folder = draw.random() < 0.3 and not path.name.startswith("bank")
    return load_codec(path.parent) if folder else load_one(path)


def load_one(path: Path) -> Any:
    """Load a bank or half of a codec."""
    if path.name.startswith("bank"):
        return UpdateBank.load(path)
    return (load_encoder if path.name == ENCODER_FILE else load_decoder)(path)


def measure(path: Path, draw: random.Random, found: Found) -> None:
    """Load a file, and note the class of its error, the seconds and the memory that it made resident for a while."""
    before, begin = resident(), time.process_time()
    try:
        load_it(path, draw)
        outcome = "loads"
    except Exception as error:
        outcome = type(error).__name__
    found.seconds = max(found.seconds, time.process_time() - begin)
    found.megabytes = max(found.megabytes, (resident(most=True) - before) / 1024)
    found.classes[outcome] += 1


def resident(most: bool = False) -> int:
    """Return the kilobytes that are resident, or the most since the last time that it was asked what are (Linux alone)."""
    if not most:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm"))
    return int(lines["VmHWM" if most else "VmRSS"].split()[0])


def run(make: Callable[[Path], list[Path]], count: int, seed: int) -> Found:
    """Measure ``count`` mutated files."""
    draw, found = random.Random(seed), Found()
    with tempfile.TemporaryDirectory() as folder:
        files = mutated(Path(folder), draw, make)
        for path, _ in zip(files, range(count), strict=False):
            measure(path, draw, found)
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codecs", type=int, default=20_000, help="mutated codec files")
    parser.add_argument("--banks", type=int, default=3_000, help="mutated banks")
    parser.add_argument("--checkpoints", type=int, default=2_000, help="mutated checkpoints and files of clients beside them")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # Lightning's, for every run
    kinds = (
        ("codec files", codec_files, options.codecs),
        ("banks", bank_files, options.banks),
        ("checkpoints", checkpoint_files, options.checkpoints),
    )
    for title, make, count in kinds:
        found = run(make, count, options.seed)
        classes = ", ".join(f"{name} {number:,}" for name, number in found.classes.most_common())
        print(f"{count:,} {title}: {classes}; at most {found.seconds:.2f} s and {found.megabytes:.0f} MB for one file", flush=True)


if __name__ == "__main__":
    main()
