"""What needs no Lightning, TorchMetrics or data set library imports none."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import pytest

from tests.federation import environment

HEAVY = {"lightning", "torchmetrics", "torchvision", "sklearn", "matplotlib", "tensorboard", "jsonargparse"}
LIGHT = [
    *("fedlight", "fedlight.core.export", "fedlight.data", "fedlight.data.sampling", "fedlight.data.partition", "fedlight.clients"),
    *("fedlight.codecs", "fedlight.aggregation", "fedlight.privacy", "fedlight.servers", "fedlight.metrics", "fedlight.metrics.traffic"),
]
LAZY = {
    "fedlight.data": ["FederatedDataModule", "LightningData"],
    "fedlight.metrics": ["ClientSpread", "ReconstructionError"],
}


@pytest.fixture(scope="module")
def heavy_imports() -> dict[str, list[str]]:
    """What each of ``LIGHT`` has made an interpreter import that imported those before it."""
    code = "import importlib, json, sys; found = {}\n"
    code += f"for name in {LIGHT!r}:\n    importlib.import_module(name); found[name] = sorted({HEAVY!r} & {{*sys.modules}})\n"
    code += "print(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIGHT)
def test_a_light_package_imports_nothing_heavy(name: str, heavy_imports: dict[str, list[str]]) -> None:
    assert heavy_imports[name] == []


@pytest.mark.parametrize("package", LAZY)
def test_names_that_are_imported_on_demand_are_names_like_others(package: str) -> None:
    module = import_module(package)
    for name in LAZY[package]:
        assert name in module.__all__ and name in dir(module)
        assert getattr(module, name).__name__ == name
        assert vars(module)[name] is getattr(module, name), "looked up once"
    assert {*module.__all__} <= {*dir(module)} and all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("package", LAZY)
def test_an_unknown_name_is_told_as_python_tells_it(package: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'NoSuchName'"):
        import_module(package).NoSuchName  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'NoSuchName'"):
        exec(f"from {package} import NoSuchName")
