"""Pictures of what a run shows and of the site, in light and dark. Needs Chromium (or Chrome) on the path.

    python tests/benchmarks/screenshots.py logs/digits logs/screens
    python tests/benchmarks/screenshots.py logs/digits docs/assets/screens --only custom_scalars,images,report --themes light

Serves the runs, and build/site if `make docs` has made it, on this machine alone, opens each page without a window, and writes a PNG a page
and theme.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TABS = ("scalars", "custom_scalars", "images", "text", "hparams")
PAGES = {"site_index": "index.html", "site_first_run": "tutorials/first_run.html", "site_configuration": "reference/configuration.html"}
SIZES = {"": "1400,1000", "_phone": "500,1000"}
SECONDS = 20  # that a page has to load and draw itself
COLOURS = 128  # of a picture: drawings need no more
SITE = Path(__file__).parents[2] / "build" / "site"


def shoot(browser: str, address: str, target: Path, dark: bool, size: str = "") -> None:
    """Write a picture of a page."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"),
                *(f"--window-size={SIZES[size]}", f"--virtual-time-budget={1000 * SECONDS}", f"--screenshot={target}"),
                *(["--blink-settings=preferredColorScheme=0"] if dark else []),
                address,
            ],
            check=True,
            capture_output=True,
            timeout=180,
        )
    with Image.open(target) as picture:
        picture.convert("RGB").quantize(COLOURS).save(target, optimize=True)


@contextmanager
def serving(command: Sequence[str]) -> Iterator[str]:
    """Run a server on a free port, which the command takes as its last argument, and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server = subprocess.Popen([sys.executable, "-m", *command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(60):
            try:
                urllib.request.urlopen(address, timeout=2).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs")
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", default="", help=f"comma-separated, of {', '.join([*TABS, 'report', *PAGES])} (default: all)")
    parser.add_argument("--themes", default="light,dark", help="comma-separated (default: light,dark)")
    given = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"Expected one of {', '.join(BROWSERS)} on the path: install Chromium")
    wanted = [name for name in (*TABS, "report", *PAGES) if not given.only or name in given.only.split(",")]
    given.output.mkdir(parents=True, exist_ok=True)
    pages: list[tuple[str, str, str]] = []  # name, address, size
    with (
        serving(["tensorboard.main", "--logdir", given.logs, "--host", "127.0.0.1", "--port"]) as board,
        serving(["http.server", "--bind", "127.0.0.1", "--directory", str(SITE)]) as site,
        tempfile.TemporaryDirectory() as folder,
    ):
        report = Path(folder) / "report.html"
        subprocess.run([sys.executable, "-m", "fedlight", "report", given.logs, "--output", str(report)], check=True)
        time.sleep(5)  # for the events to be read
        pages += [(name, f"{board}?darkMode=%s#{name}", "") for name in TABS]
        pages += [("report", report.as_uri(), "")]
        pages += [(name, site + path, size) for name, path in PAGES.items() for size in SIZES if SITE.is_dir()]
        for theme in given.themes.split(","):
            for name, address, size in pages:
                if name in wanted:
                    there = address.replace("%s", "true" if theme == "dark" else "false")
                    shoot(browser, there, given.output / f"{name}{size}_{theme}.png", theme == "dark", size)


if __name__ == "__main__":
    main()
