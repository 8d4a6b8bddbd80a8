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
        near, usage = "", f" ({self.prog} --help)"
        if found := re.fullmatch(r"the following arguments are required: (.*)", message):
            raise ConfigurationError(f"Expected {found.group(1)} after `{self.prog}` but got none{usage}")
        if found := re.fullmatch(r"unrecognized arguments: (.*)", message):
            raise ConfigurationError(f"`{self.prog}` takes no {found.group(1)}{usage}")
        if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            near = did_you_mean(found.group(1), re.findall(r"[\w-]+", found.group(2)))
        raise ConfigurationError(f"{self.prog}: {message}{near}{usage}")
