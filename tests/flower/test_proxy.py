"""The reverse proxy of docs/reference/deployment.md in front of a real SuperLink: nodes get through, and nothing else does."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from fedlight.core.errors import ConfigurationError
from fedlight.flower.demo import Lab, free_ports

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "deployment.md"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NGINX is None, reason="nginx is not installed")]


def written(page: str, lab: Lab, port: int) -> str:
    """Return the page's own configuration, for the addresses and files of a lab."""
    found = re.search(r"```nginx\n(.*?)```", page, re.DOTALL)
    assert found is not None
    server = found[1]
    for theirs, ours in (
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("/etc/ssl/fl.crt", f"{lab.root}/superlink.crt"),
        ("/etc/ssl/fl.key", f"{lab.root}/superlink.key"),
        ("127.0.0.1:8000", lab.address),
    ):
        assert theirs in server
        server = server.replace(theirs, ours)
    folder = lab.root / "nginx"
    places = "".join(f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    return f"daemon off; pid {folder}/pid; error_log {folder}/errors; events {{}} http {{ access_log {folder}/log; {places} {server} }}"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[tuple[Lab, str]]:
    """A lab whose nodes know the proxy alone, and the proxy's address."""
    made, port = Lab(tmp_path / "lab", ["north"]), free_ports(1)[0]
    (made.root / "nginx").mkdir()
    (made.root / "nginx" / "conf").write_text(written(PAGE.read_text(), made, port))
    node = made.root / "north.yaml"
    config = yaml.safe_load(node.read_text())
    config["flower"]["superlink"] = f"127.0.0.1:{port}"
    node.write_text(yaml.safe_dump(config))
    proxy = subprocess.Popen([str(NGINX), "-c", str(made.root / "nginx" / "conf"), "-p", str(made.root / "nginx")])
    try:
        yield made, f"127.0.0.1:{port}"
    finally:
        made.stop()
        proxy.terminate()
        proxy.wait(20)


def test_nodes_get_through_and_commands_do_not(lab: tuple[Lab, str]) -> None:
    made, proxy = lab
    made.start()  # until the node, which knows the proxy alone, is online
    connection = made.root / "flower" / "config.toml"
    connection.write_text(connection.read_text().replace(made.address, proxy))
    for command in (("list", "lab"), ("supernode", "list", "lab"), ("run", str(made.root / "app"), "lab")):
        with pytest.raises(ConfigurationError, match="403"):
            made.flwr(*command)
    asked = (made.root / "nginx" / "log").read_text()
    assert '"POST /v1/fleet/pull-messages HTTP/1.1" 200' in asked and '"POST /v1/control/start-run HTTP/1.1" 403' in asked
