"""Pictures of what a run shows, in light and dark: TensorBoard's tabs and the report. Needs Chromium (or Chrome) on the path.

    python tests/benchmarks/screenshots.py logs/digits docs/screenshots

Serves the runs on this machine alone, opens each page without a window, and writes a PNG a page and theme.
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
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TABS = {"scalars": "#scalars", "custom_scalars": "#custom_scalars", "images": "#images", "text": "#text", "hparams": "#hparams"}
SIZE = "1400,1000"
SECONDS = 20  # that a page has to load and draw itself


def shoot(browser: str, address: str, target: Path, dark: bool) -> None:
    """Write a picture of a page."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"),
                *(f"--window-size={SIZE}", f"--virtual-time-budget={1000 * SECONDS}", f"--screenshot={target}"),
                *(["--blink-settings=preferredColorScheme=0"] if dark else []),
                address,
            ],
            check=True,
            capture_output=True,
            timeout=180,
        )


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Take all the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs")
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"Expected one of {', '.join(BROWSERS)} on the path: install Chromium")
    given.output.mkdir(parents=True, exist_ok=True)
    report = given.output.absolute() / "report.html"
    subprocess.run([sys.executable, "-m", "fedlight", "report", given.logs, "--output", str(report)], check=True)
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", given.logs, "--port", str(port), "--host", "127.0.0.1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(60):
            try:
                urllib.request.urlopen(address, timeout=2).close()
                break
            except OSError:
                time.sleep(1)
        time.sleep(5)  # for the events to be read
        for theme in ("light", "dark"):
            for name, tab in TABS.items():
                shoot(
                    browser,
                    f"{address}?darkMode={'true' if theme == 'dark' else 'false'}{tab}",
                    given.output / f"{name}_{theme}.png",
                    theme == "dark",
                )
            shoot(browser, report.as_uri(), given.output / f"report_{theme}.png", theme == "dark")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
