"""`fedlight completion`: a script for the shell that knows every option and name, so that a Tab starts no Python."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from fedlight.console.configs import command_of, shipped
from fedlight.console.help import choices_of, groups
from fedlight.console.options import RUNS, SETTINGS
from fedlight.console.parser import OneSentence
from fedlight.subcommands import SUBCOMMANDS

_SCRIPT = """\
# Completion of fedlight in {shell}; made by `fedlight completion {shell}`, to be made again with another version.
{start}_fedlight() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  if [ "$COMP_CWORD" -eq 1 ]; then
    words={subcommands}
  elif [ "${{word#-}}" = "$word" ]; then
    case "${{COMP_WORDS[1]}} $before" in
{values}
    esac
  else
    case "${{COMP_WORDS[1]}}" in
{options}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _fedlight fedlight
"""
_START = {"bash": "", "zsh": "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"}


def command(args: Sequence[str]) -> None:
    """Run `fedlight completion`: print the script of a shell."""
    parser = OneSentence("fedlight completion", description=SUBCOMMANDS["completion"])
    parser.add_argument("shell", choices=list(_START), help="`source <(fedlight completion bash)` in ~/.bashrc, or of zsh in ~/.zshrc")
    print(script(parser.parse_args(args).shell), end="")


def script(shell: str) -> str:
    """Return the script: after the name of an option its choices, if there are any known, else files."""
    found = {what: [option for _, group in groups(what) for option in group] for what in (*RUNS, *SETTINGS)}
    parts = {name: known for listed in found.values() for name, one in listed if (known := choices_of(name, one.annotation)[1])}
    kinds = {what: (what, "fit") if what in RUNS else (what,) for what in found}
    configs = {what: [name for name, path in shipped().items() if command_of(path) in kinds[what]] for what in found}
    values = [_case(f'"{what} --config"', names) for what, names in configs.items()] + [_case('"configs "*', shipped())]
    values += [_case(f"*' --{name}'", known) for name, known in parts.items()]
    options = [_case(what, [f"--{name}" for name, _ in listed] + ["--help"]) for what, listed in found.items()]
    subcommands = shlex.quote(" ".join(SUBCOMMANDS))
    return _SCRIPT.format(shell=shell, start=_START[shell], subcommands=subcommands, values="\n".join(values), options="\n".join(options))


def _case(pattern: str, words: Iterable[str]) -> str:
    return f"      {pattern}) words={shlex.quote(' '.join(words))} ;;"
