"""What the command line says after a mistake, and how fast: `python tests/benchmarks/misuses.py`.

Runs every command in an empty folder and prints its exit status, the seconds that it takes of a core, and the last line that it wrote. On
an idle machine it takes as long; the seconds on a busy one say nothing of the command.
"""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

FILES = {
    "broken.yaml": "model:\n  network: MLP\n bad: [1\n",
    "unknown_key.yaml": "model:\n  netwrok: MLP\n",
    "list.yaml": "- 1\n- 2\n",
    "own_codec.py": "import nowhere_to_be_found\n\nclass Mine: ...\n",
    "own_thing.py": "class Mine: ...\n",
    "damaged.ckpt": "not a checkpoint\n",
}

DIGITS = "fit --config digits"
CALLBACK = "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor"
MISUSES = {
    "no arguments": "",
    "help": "--help",
    "help of fit": "fit --help",
    "list of codecs": "fit --model.codec.help",
    "options of a codec": "fit --model.codec.help TransformCodec",
    "help of compare": "compare --help",
    "completion by another name": "--print_shtab=bash",
    "completion of an unknown shell": "completion fish",
    "unknown subcommand": "fti",
    "no network": "fit",
    "misspelt option": f"{DIGITS} --trainer.max_step 3",
    "misspelt group": f"{DIGITS} --modle.codec TopKCodec",
    "misspelt argument of a codec": f"{DIGITS} --model.codec.init_args.ratioo 3",
    "misspelt codec": f"{DIGITS} --model.codec TransfromCodec",
    "misspelt network": f"{DIGITS} --model.network LeNet",
    "misspelt algorithm": f"{DIGITS} --model.algorithm FedAvgg",
    "misspelt partitioner": f"{DIGITS} --data.partitioner Dirichelt",
    "wrong class for a codec": f"{DIGITS} --model.codec Dirichlet",
    "a class of torch for a codec": f"{DIGITS} --model.codec torch.nn.Linear",
    "ambiguous network": f"{DIGITS} --model.network MLP",
    "wrong type": f"{DIGITS} --trainer.max_steps many",
    "fraction for a whole number": f"{DIGITS} --trainer.max_steps 2.5",
    "wrong choice": f"{DIGITS} --model.weighting size",
    "no value": f"{DIGITS} --trainer.max_steps",
    "a word too many": f"{DIGITS} digits",
    "unknown configuration": "fit --config digit",
    "unknown file": "fit --config runs/mine.yaml",
    "broken YAML": "fit --config broken.yaml",
    "YAML that is a list": "fit --config list.yaml",
    "unknown key in YAML": "fit --config unknown_key.yaml",
    "no data": "fit --config mnist --data.source.init_args.download false --data.root empty",
    "no such file of data": f"{DIGITS} --data.source ArrayFile --data.source.path none.npz",
    "no GPU": f"{DIGITS} --trainer.accelerator gpu",
    "unknown accelerator": f"{DIGITS} --trainer.accelerator gqu",
    "two devices of a GPU": f"{DIGITS} --trainer.accelerator cuda --trainer.devices 2",
    "missing package": f"{DIGITS} --trainer.logger WandbLogger",
    "misspelt monitor": f"{DIGITS} {CALLBACK} val/acuracy",
    "misspelt callback": f"{DIGITS} --trainer.callbacks EarlyStoping",
    "test without a checkpoint": "test --config digits",
    "checkpoint that is not there": "test --config digits --ckpt_path last.ckpt",
    "damaged checkpoint": f"{DIGITS} --ckpt_path damaged.ckpt",
    "own class that fails to import": f"{DIGITS} --model.codec own_codec.Mine",
    "own class that does not exist": f"{DIGITS} --model.codec own_thing.Mein",
    "own class that is no codec": f"{DIGITS} --model.codec own_thing.Mine",
    "own module that does not exist": f"{DIGITS} --model.codec my_codes.Mine",
    "negative ratio": f"{DIGITS} --model.codec.init_args.ratio -35",
    "batch size 0": f"{DIGITS} --model.algorithm.init_args.batch_size 0",
    "negative learning rate": f"{DIGITS} --model.algorithm.init_args.lr -1",
    "more clients in a round than there are": f"{DIGITS} --data.sampler.init_args.cohort_size 50",
    "no rounds": f"{DIGITS} --trainer.max_steps -1",
    "threads 0": f"{DIGITS} --threads 0",
    "clip gradients of the server": f"{DIGITS} --trainer.gradient_clip_val 1",
    "compare without settings": "compare",
    "report of nothing": "report",
    "report of a folder without runs": "report empty",
    "node without settings": "node",
    "audit of nothing": "audit",
    "secure sum of two": f"{DIGITS} --model.aggregator SecureAggregator --model.aggregator.cohort 2",
    "no subcommand of flower": "flower",
    "misspelt subcommand of flower": "flower dmeo",
    "copy of a configuration that is not there": "configs digitss",
}
"""What is wrong, and the arguments of `fedlight`."""


def run(arguments: str, folder: Path) -> tuple[int, float, list[str]]:
    """Return exit status, seconds of a core, and the lines that a command wrote, those on stderr last."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "fedlight", *shlex.split(arguments)],
        cwd=folder,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, seconds, (done.stdout + done.stderr).splitlines()


def main() -> None:
    """Run all of them, or those whose name contains a word that is given."""
    print("| what | command | status | seconds | lines | last line |\n|---|---|---|---|---|---|")
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "empty").mkdir()
        for path, text in FILES.items():
            (folder / path).write_text(text)
        for what, arguments in MISUSES.items():
            if not sys.argv[1:] or any(word in what for word in sys.argv[1:]):
                status, seconds, lines = run(arguments, folder)
                last = next((line for line in reversed(lines) if line.strip()), "")
                print(f"| {what} | `fedlight {arguments}` | {status} | {seconds:.1f} | {len(lines)} | {last} |", flush=True)


if __name__ == "__main__":
    main()
