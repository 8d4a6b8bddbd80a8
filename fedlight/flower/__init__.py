"""A federation on Flower's deployment engine: SuperLink and SuperNodes carry the letters of `fedlight.deploy`.

Needs the extra ``flower``.
"""

import os
import shutil
import sys
from pathlib import Path

from fedlight.core.errors import ConfigurationError

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""The environment in which no process of Flower calls out or installs anything."""

os.environ.update(OFFLINE)
# Flower finds its own programs by name, also where this environment is not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"

try:
    import flwr  # noqa: F401
except ImportError as error:
    raise ConfigurationError(
        f"Expected the package `flwr`, which a deployment on Flower needs, but could not import it ({error}): install it with "
        "pip install 'fedlight[flower]'"
    ) from error


def program(name: str) -> str:
    """Return the path of one of Flower's programs; raises ``ConfigurationError`` if it is not there."""
    found = shutil.which(name)
    if found is None:
        raise ConfigurationError(f"Expected the program {name} but it is not on the path: pip install 'fedlight[flower]'")
    return found
