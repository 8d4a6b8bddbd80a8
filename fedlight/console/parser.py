"""argparse's parser for the small subcommands, whose errors are one sentence like all others."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from fedlight.console.names import did_you_mean
from fedlight.core.errors import ConfigurationError


class OneSentence(argparse.ArgumentParser):
    """Raises ``ConfigurationError`` for a mistake; parsers of its subcommands do as well."""

    def error(self, message: str) -> NoReturn:
        """Raise the sentence, which names the nearest choice."""
        usage = f" ({self.prog} --help)"
        if found := re.fullmatch(r"the following arguments are required: (.*)", message):
            raise ConfigurationError(f"Expected {found.group(1)} after `{self.prog}` but got none{usage}")
        if found := re.fullmatch(r"unrecognized arguments: (.*)", message):
            raise ConfigurationError(f"`{self.prog}` takes no {found.group(1)}{usage}")
        if found := re.fullmatch(r"argument (.*): invalid choice: '([^']*)' \(choose from (.*)\)", message):
            what, given, choices = found.group(1), found.group(2), re.findall(r"[\w-]+", found.group(3))
            near = did_you_mean(given, choices)
            raise ConfigurationError(f"Expected {what} after `{self.prog}` to be one of {', '.join(choices)} but got {given}{near}{usage}")
        raise ConfigurationError(f"{self.prog}: {message}{usage}")
