"""`fedlight node` and `fedlight flower`: the commands of a deployment on Flower."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlight.console.parser import OneSentence
from fedlight.core.errors import ConfigurationError
from fedlight.core.progress import waiting

NAMES = ("hospital-0", "hospital-1", "hospital-2")
PROGRAMS = {"superlink": "flower-superlink", "run": "flwr run"}


def parser() -> argparse.ArgumentParser:
    """Return the parser of `fedlight flower`."""
    made = OneSentence("fedlight flower", description="Deploy a federated run on Flower's SuperLink and SuperNodes.")
    commands = made.add_subparsers(dest="command", metavar="<command>", required=True)
    init = commands.add_parser("init", help="write the files of a deployment")
    init.add_argument("folder", type=Path)
    init.add_argument("--nodes", nargs="+", default=list(NAMES), help="the names of the clients")
    init.add_argument("--lab", action="store_true", help="everything for one machine: certificates and keys too")
    demo = commands.add_parser("demo", help="run a SuperLink and three nodes on this machine, train, show the table, and stop them")
    demo.add_argument("--folder", type=Path, default=None, help="where to leave logs and checkpoints (a temporary folder if not given)")
    demo.add_argument("--rounds", type=int, default=20)
    for name, program in PROGRAMS.items():
        commands.add_parser(name, help=f"`{program}`, in the environment in which it calls nobody")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `fedlight node FILE` or `fedlight flower COMMAND` and return the exit status."""
    try:
        return node(arguments[1:]) if arguments[0] == "node" else flower(arguments[1:])
    except (ConfigurationError, OSError) as error:
        print(f"fedlight: error: {error}", file=sys.stderr)
        return 2


def node(arguments: Sequence[str]) -> int:
    """Run a node until it is stopped."""
    made = OneSentence("fedlight node", description="Run one client of a deployed federation until it is stopped.")
    made.add_argument("file", type=Path, help="the node's node.yaml")
    file = made.parse_args(arguments).file
    from fedlight.flower.processes import StopError, stoppable

    try:
        with stoppable():  # from the beginning: a shell lets what it starts in the background ignore Ctrl-C
            with waiting(f"Starting the node of {file.name}"):  # takes seconds: torch
                from fedlight.flower.worker import run_node
            return run_node(file)
    except StopError as stopped:
        return stopped.status


def flower(arguments: Sequence[str]) -> int:
    """Run one of the commands of `fedlight flower`."""
    if arguments and arguments[0] in PROGRAMS:  # its options are the program's own, not ours to parse
        from fedlight.flower.run import run_app
        from fedlight.flower.superlink import run_superlink

        return {"superlink": run_superlink, "run": run_app}[arguments[0]](arguments[1:])
    given = parser().parse_args(arguments)
    if given.command == "init":
        return init(given.folder, given.nodes, given.lab)
    with waiting("Starting the demonstration"):
        from fedlight.flower.demo import demonstrate
    return demonstrate(given.folder, given.rounds)


def init(folder: Path, nodes: Sequence[str], lab: bool) -> int:
    """Write the files of a deployment and say what to do with them."""
    from fedlight.flower.files import write_app, write_lab

    if not lab:
        write_app(folder / "app", nodes, "logs", Path("directory"))
        print(f"{folder}/app: the app of the server. What else a deployment needs: docs/tutorials/deploy.md, 'On four machines'")
        return 0
    write_lab(folder, nodes)
    print(NEXT.format(root=folder.absolute(), nodes=" ".join(nodes)))
    return 0


NEXT = """\
Everything for one machine is in {root}. In four terminals:

  cd {root} && fedlight flower superlink --ssl-ca-certfile ca.crt --ssl-certfile superlink.crt --ssl-keyfile superlink.key \\
      --enable-supernode-auth --database state.db
  export FLWR_HOME={root}/flower FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
      cd {root} && for n in {nodes}; do flwr supernode register keys/$n.node.pub lab --name $n; done
  cd {root} && ( for n in {nodes}; do fedlight node $n.yaml & done; wait )
  export FLWR_HOME={root}/flower && fedlight flower run {root}/app lab --stream

TensorBoard: tensorboard --logdir {root}/logs"""
