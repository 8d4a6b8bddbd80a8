"""What `import fedlight` gives: every name that a run is made of, typed, and nothing imported before it is used."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import get_type_hints

import jsonargparse
import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

import fedlight
from fedlight.core.kinds import kinds_of
from fedlight.modules.federate import ModuleSettings
from tests.federation import environment
from tests.own import LitClassifier, Points

PACKAGES = ("aggregation", "callbacks", "clients", "codecs", "data", "metrics", "modules", "privacy", "rounds", "servers")

# What only those need who write a codec, an algorithm, a data source or a report; it stays in its subpackage.
FOR_AUTHORS = {
    "Connection",
    "FederatedData",
    *("AccountingSetting", "AggregationSetting", "Arrays", "ClientTask", "Ledger", "LocalModel", "LocalResult", "Memory", "Objective"),
    *("Call", "ClientHost", "ClientUpdate", "Collector", "Download", "GlobalModel", "Held", "Reply", "ReplyFormat", "Request"),
    *("Sealer", "Server", "ServerState", "Simulated", "TRAIN", "Watch", "run_round"),
    *("Partition", "RunningSum", "accuracy_by_size", "build_arrays", "check_partition", "cosine", "explained"),
    *("format_bytes", "record_bank", "relative_error", "spread", "standardize"),
}

SCRIPT = '''\
"""A user's script: a module, data, settings, a round loop."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule

import fedlight


def main(module: LightningModule, data: LightningDataModule) -> float:
    model: fedlight.FederatedModule = fedlight.federate(
        module,
        data,
        num_clients=3,
        partitioner=fedlight.Dirichlet(alpha=0.5),
        codec=fedlight.TransformCodec(ratio=8),
        privacy=fedlight.CentralDP(clip=1.0, noise_multiplier=0.5),
        availability=fedlight.DropOut(0.1),
        server_optimizer=lambda params: torch.optim.SGD(params, lr=0.5),
        seed=1,
    )
    own = fedlight.FederatedDataModule(fedlight.Digits(), partitioner=fedlight.IID(), num_clients=3)
    refresh = fedlight.callbacks.CodecRefresh(every_n_rounds=2)
    trainer = fedlight.FederatedTrainer(max_steps=2, callbacks=[refresh, fedlight.RoundProgressBar()])
    trainer.fit(model, datamodule=own)
    return float(trainer.callback_metrics["train/loss"])
'''


def instantiate(parser: jsonargparse.ArgumentParser, given: list[str]) -> jsonargparse.Namespace:
    return parser.instantiate(parser.parse_args(given))


def public(package: str) -> set[str]:
    return {*import_module(f"fedlight.{package}").__all__}


def test_importing_fedlight_imports_neither_torch_nor_lightning():
    code = (
        "import sys, fedlight; dir(fedlight); fedlight.__version__; hasattr(fedlight, 'nothing');"
        "print({'torch', 'lightning', 'numpy', 'jsonargparse'} & {*sys.modules});"
        "fedlight.TransformCodec, fedlight.FedAvg, fedlight.load_encoder; print({'lightning'} & {*sys.modules});"
        "print(fedlight.metrics.TrafficCounter.__name__, fedlight.core.errors.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["set()", "set()", "TrafficCounter fedlight.core.errors"], done.stderr[-3000:]


def test_every_public_name_is_shown_and_resolves():
    assert len({*fedlight.__all__}) == len(fedlight.__all__)
    assert {*fedlight.__all__, *PACKAGES, "core", "audit", "compare"} <= {*dir(fedlight)}
    for name in fedlight.__all__:
        assert getattr(fedlight, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'fedlight' has no attribute 'FedAverage'"):
        fedlight.FedAverage  # noqa: B018
    with pytest.raises(AttributeError, match="did you mean TransformCodec"):
        fedlight.TransfromCodec  # noqa: B018


def test_what_people_use_of_the_subpackages_is_at_the_top():
    offered = set().union(*map(public, PACKAGES))
    assert offered - {*fedlight.__all__} <= FOR_AUTHORS
    assert not FOR_AUTHORS & {*fedlight.__all__}
    for package in PACKAGES:
        module = getattr(fedlight, package)
        for name in public(package) & {*fedlight.__all__}:
            assert getattr(fedlight, name) is getattr(module, name)


def test_a_star_import_gives_the_public_names():
    given: dict[str, object] = {}
    exec("from fedlight import *", given)
    assert {*given} - {"__builtins__"} == {*fedlight.__all__}


def test_federate_takes_the_arguments_of_the_module_and_their_types():
    """So that the two cannot drift apart."""
    arguments = inspect.signature(fedlight.FederatedModule).parameters
    assert [*ModuleSettings.__annotations__] == [name for name in arguments if name != "network"]
    expected = get_type_hints(fedlight.FederatedModule.__init__)
    assert get_type_hints(ModuleSettings) == {name: expected[name] for name in ModuleSettings.__annotations__}
    assert all(arguments[name].default is not inspect.Parameter.empty for name in ModuleSettings.__annotations__)


def test_every_argument_has_a_kind():
    kinds = kinds_of(fedlight.FederatedModule.__init__)
    assert [*kinds] == [*inspect.signature(fedlight.FederatedModule).parameters]
    assert kinds["weighting"] is str and kinds["min_clients"] is Integral and kinds["metrics"] == Mapping | MetricCollection | None
    assert kinds_of(fedlight.federate)["labels"] == Callable | None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network": LitClassifier}, r"`network` to be a Module but got the class LitClassifier: call it, LitClassifier\(\.\.\.\)"),
        ({"data": Points}, r"`data` to be a LightningDataModule or .* got the class Points: call it, Points\("),
        ({"codec": fedlight.TransformCodec}, r"`codec` to be a Codec but got the class TransformCodec: call it, TransformCodec\("),
        ({"codec": "TransformCodec"}, r"`codec` to be a Codec but got 'TransformCodec': give fedlight\.TransformCodec\("),
        ({"algorithm": 3}, "`algorithm` to be an Algorithm but got 3"),
        ({"engine": fedlight.IID()}, "`engine` to be an Engine but got an object of IID"),
        ({"clients": 20}, "`clients` to be a Clients but got 20; did you mean num_clients?"),
        ({"loss": torch.nn.functional.mse_loss}, "`loss` to be a Module but got an object of function"),
        ({"num_clients": "20"}, "`num_clients` to be a whole number but got '20'$"),
        ({"seed": None}, "`seed` to be a whole number but got None"),
    ],
)
def test_an_argument_of_another_kind_is_named(given, message):
    with pytest.raises(fedlight.ConfigurationError, match=message):
        fedlight.federate(**{"network": LitClassifier(), "data": Points(), **given})


def test_a_cohort_larger_than_the_population_is_refused_as_on_the_command_line():
    data = fedlight.federate(LitClassifier(), Points(), num_clients=4).own_data
    assert data.sampler.cohort_size == 4
    with pytest.raises(fedlight.ConfigurationError, match="cohort larger than the population: expected at most 4, got 8; lower"):
        fedlight.federate(LitClassifier(), Points(), num_clients=4, cohort_size=8).own_data.setup()


def test_numbers_of_numpy_and_classes_of_optimizers_are_of_their_kind():
    fedlight.federate(LitClassifier(), Points(), num_clients=np.int64(4), server_optimizer=torch.optim.SGD)


def test_a_misspelt_argument_is_told_the_nearest():
    with pytest.raises(TypeError, match=r"^There is no argument num_client of federate; did you mean num_clients\?$"):
        fedlight.federate(LitClassifier(), Points(), num_client=20)


def test_a_data_module_given_as_a_class_is_named():
    with pytest.raises(fedlight.ConfigurationError, match="`datamodule` .* got the class Points: call it"):
        fedlight.LightningData(Points)


def test_jsonargparse_reads_the_typed_arguments_of_federate():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(fedlight.federate, fail_untyped=False)
    given = ["--network=tests.own.LitClassifier", "--data=tests.own.Points", "--num_clients=6", "--codec=LinearCodec", "--codec.ratio=4"]
    made = instantiate(parser, [*given, "--seed=3"])
    module = fedlight.federate(**made)
    assert isinstance(module.network, LitClassifier)
    assert isinstance(module.codec, fedlight.LinearCodec) and module.seed == 3
    with pytest.raises(jsonargparse.ArgumentError, match="num_cleints"):
        parser.parse_args([*given, "--num_cleints=3"])


@pytest.mark.parametrize("path", ["fedlight.LinearCodec", "fedlight.codecs.LinearCodec"])
def test_a_class_path_may_name_the_top_level(path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--codec", type=fedlight.Codec)
    made = instantiate(parser, [f"--codec={path}", "--codec.ratio=4"])
    assert type(made.codec) is fedlight.LinearCodec


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed: pip install -e '.[dev]'")
def test_a_users_script_passes_mypy_strict_and_a_misspelt_argument_does_not(tmp_path):
    root = Path(fedlight.__file__).parents[1]
    (tmp_path / "right.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(SCRIPT.replace("num_clients=3,\n", "num_cleints=3,\n", 1))
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports", "--no-error-summary"]
    done = subprocess.run(
        [*command, "--cache-dir", str(root / ".mypy_cache" / "script"), "right.py", "wrong.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    errors = done.stdout.splitlines()
    assert errors and all(line.startswith("wrong.py:") for line in errors), done.stdout + done.stderr
    assert 'Unexpected keyword argument "num_cleints" for "federate"' in errors[0]
