"""The files of a deployment: the app that the server runs, a `node.yaml` for each client, and on one machine certificates and keys."""

from __future__ import annotations

import datetime
import inspect
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedlight.core.errors import require
from fedlight.core.files import write_private
from fedlight.deploy.keys import make_key

DAYS = 365

APP = """\
# The app that `flwr run` sends to the SuperLink. All of it is in fedlight, so that this folder holds no code.
[project]
name = "{name}"
version = "1.0.0"
description = "A federated run of fedlight"
license = "Apache-2.0"
dependencies = ["fedlight[flower]"]

[tool.flwr.app]
publisher = "fedlight"

[tool.flwr.app.components]
serverapp = "fedlight.flower.server:app"
clientapp = "fedlight.flower.client:app"

[tool.flwr.app.config]
config = "run.yaml"    # in this folder: model, codec, server
out = "{out}"  # folder of checkpoints and TensorBoard files, at the server
resume = false         # go on from the newest checkpoint below `out`
options = ""           # further options of `fedlight fit`, such as "--trainer.max_steps 50"
"""

RUN = """\
# What the server does: a configuration of `fedlight fit` whose clients are nodes. No client's data is named here.
experiment: deployed
seed_everything: 0
threads: 1
trainer:
  accelerator: cpu
  max_steps: {rounds}
  val_check_interval: 5
checkpoint:
  every_n_rounds: 1             # a round over a network takes seconds: lose none
data:                           # the server's own: public proxy data and the test set; its training samples are used by nobody
  source: Digits
  partitioner:
    class_path: Dirichlet
    init_args: {{alpha: 0.5}}
  num_clients: {count}
  sampler: Everyone
  proxy_fraction: 0.2
model:
  clients:
    class_path: fedlight.flower.clients.FlowerClients
    init_args:
      nodes: [{nodes}]
      keys: {keys}              # public identity keys, for secure aggregation
      timeout: 120.0            # seconds that a stage of a round waits for a node
      reproducible: false       # true: batches from the public seed, as in a simulation
  downlink: CatchUp             # nodes download the sums that they missed, and not the model
  network:
    class_path: fedlight.modules.MLP
    init_args: {{in_features: 64, hidden: [64, 32], num_classes: 10}}
  algorithm:
    class_path: FedAvg
    init_args: {{lr: 0.1, batch_size: 16, steps: 10}}
  codec:
    class_path: TransformCodec
    init_args: {{ratio: 16, cohort: {count}}}
  min_clients: 2
pretraining:
  proxy: {{rounds: 40, clients: 5}}
"""

NODE = """\
# One client: what its owner decides. The server never sees this file.
node:
  name: {name}
  data:                         # public digits, to try things out; for data of yours: docs/reference/deployment.md
    class_path: fedlight.deploy.Share
    init_args:
      client: {client}
      data:
        class_path: fedlight.data.FederatedData
        init_args:
          source: Digits
          partitioner:
            class_path: Dirichlet
            init_args: {{alpha: 0.5}}
          num_clients: {count}
          proxy_fraction: 0.2
  state: state/{name}           # what the client keeps between messages
  identity: keys/{name}         # its own key for secure aggregation
  directory: {directory}        # the public keys of all clients: from their owners, not from the server
  allow: []                     # classes beyond fedlight's that a run may name
flower:
  superlink: {superlink}
  root_certificates: ca.crt
  key: keys/{name}.node
  port: {port}
"""

CONNECTION = """\
[superlink]
default = "lab"

[superlink.lab]
address = "{superlink}"
root-certificates = "{root}/ca.crt"
"""


def write_app(folder: Path, nodes: Sequence[str], out: str, keys: Path, rounds: int = 20) -> None:
    """Write the two files of an app."""
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(APP.format(name="digits", out=out))
    (folder / "run.yaml").write_text(RUN.format(nodes=", ".join(nodes), count=len(nodes), keys=keys, rounds=rounds))


def write_lab(folder: Path, nodes: Sequence[str], superlink: str = "127.0.0.1:8000", ports: Sequence[int] = ()) -> None:
    """Write a whole deployment for one machine: app, certificates, keys, a `node.yaml` for each node, and Flower's connection.

    Raises:
        ConfigurationError: if the folder is there already.
    """
    require(not folder.exists(), f"Expected a new folder but {folder} is there already: choose another name")
    root = folder.absolute()
    (root / "keys").mkdir(parents=True, mode=0o700)
    (root / "directory").mkdir()
    make_authority(root)
    write_app(root / "app", nodes, str(root / "logs"), root / "directory")
    for client, name in enumerate(nodes):
        make_key(root / "keys" / name)
        (root / "directory" / f"{name}.pub").write_bytes((root / "keys" / f"{name}.pub").read_bytes())
        make_key(root / "keys" / f"{name}.node", "flower.key")
        port = ports[client] if ports else 9094 + client
        text = NODE.format(name=name, client=client, count=len(nodes), directory="directory", superlink=superlink, port=port)
        (root / f"{name}.yaml").write_text(text)
    (root / "flower").mkdir()
    (root / "flower" / "config.toml").write_text(CONNECTION.format(superlink=superlink, root=root))


def make_authority(folder: Path) -> None:
    """Write `ca.crt`, and `superlink.crt` and `superlink.key` that it signed for 127.0.0.1 and localhost.

    The authority's own key is not kept.
    """
    key, name = ec.generate_private_key(ec.SECP384R1()), _name("fedlight lab")
    authority = _certificate(name, key, name, key, authority=True)
    own = ec.generate_private_key(ec.SECP384R1())
    hosts = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
    certificate = _certificate(_name("superlink"), own, name, key, authority=False, hosts=hosts)
    (folder / "ca.crt").write_bytes(authority.public_bytes(Encoding.PEM))
    (folder / "superlink.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    write_private(folder / "superlink.key", own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    signer: ec.EllipticCurvePrivateKey,
    authority: bool,
    hosts: Sequence[x509.GeneralName] = (),
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(authority, 0 if authority else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if authority:
        nothing = dict.fromkeys(inspect.signature(x509.KeyUsage).parameters, False)
        usage = x509.KeyUsage(**{**nothing, "key_cert_sign": True, "crl_sign": True})
        builder = builder.add_extension(usage, critical=True)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return builder.sign(signer, hashes.SHA256())
