"""Noise has the distribution it claims, and comes from nothing predictable unless asked to."""

from __future__ import annotations

import math
from importlib import import_module

import numpy as np
import pytest
import torch
from scipy import stats

from fedlight.core.errors import ConfigurationError
from fedlight.privacy import noise
from fedlight.privacy.noise import NoiseSource, SeededNoise, SystemNoise

SOURCES: dict[str, NoiseSource] = {"system": SystemNoise(), "seeded": SeededNoise(0, "test")}


@pytest.mark.parametrize("deviation", [0.6, 3.0, 40.0])
@pytest.mark.parametrize("kind", SOURCES)
def test_integers_are_discrete_gaussian(kind, deviation):
    """Chi-square over the cells that hold anything; the operating system's draws fail once in a million runs."""
    count = 20_000
    drawn = SeededNoise(1, "integers").discrete(count, deviation) if kind == "seeded" else SystemNoise().discrete(count, deviation)
    assert drawn.dtype == np.int64
    places = np.arange(-math.ceil(12 * deviation), math.ceil(12 * deviation) + 1)
    probability = np.exp(-0.5 * (places / deviation) ** 2)
    probability /= probability.sum()
    expected = count * probability
    full = expected >= 10
    observed = np.array([(drawn == place).sum() for place in places])
    cells = np.append(observed[full], observed[~full].sum())
    hopes = np.append(expected[full], max(expected[~full].sum(), 1e-9))
    statistic = ((cells - hopes) ** 2 / hopes)[: -1 if hopes[-1] < 5 else None].sum()
    assert stats.chi2.sf(statistic, full.sum()) > 1e-6


def test_the_variance_of_integers_is_that_of_the_formula():
    drawn = SeededNoise(2, "variance").discrete(200_000, 5.0)
    assert drawn.var() == pytest.approx(25.0, rel=0.02) and abs(drawn.mean()) < 0.05


@pytest.mark.parametrize("kind", SOURCES)
def test_continuous_noise_is_gaussian(kind):
    drawn = SeededNoise(3, "gaussian").gaussian(50_001, 2.5) if kind == "seeded" else SystemNoise().gaussian(50_001, 2.5)
    assert drawn.shape == (50_001,)
    assert stats.kstest(drawn / 2.5, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(drawn[:25_000], drawn[25_001:50_001])[0, 1]) < 0.04  # the transform's two halves


def test_a_seed_repeats_and_the_system_does_not():
    one, two, other = (SeededNoise(seed, "round", 1) for seed in (7, 7, 8))
    first = one.gaussian(10, 1.0)
    assert (first == two.gaussian(10, 1.0)).all() and not (first == other.gaussian(10, 1.0)).any()
    assert not (SystemNoise().gaussian(10, 1.0) == SystemNoise().gaussian(10, 1.0)).any()
    assert not (SystemNoise().discrete(10, 1e6) == SystemNoise().discrete(10, 1e6)).all()


def test_seeding_everything_does_not_seed_the_system():
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        draws.append((SystemNoise().gaussian(5, 1.0), SystemNoise().discrete(5, 1e6)))
    assert not (draws[0][0] == draws[1][0]).any() and not (draws[0][1] == draws[1][1]).all()


def test_what_is_missing_is_named_with_the_way_out(monkeypatch):
    def absent(module: str):
        raise ImportError(module)

    monkeypatch.setattr(noise, "import_module", absent)
    with pytest.raises(ConfigurationError, match=r"'dp_accounting' to be installed.*pip install 'fedlight\[privacy\]'"):
        noise.import_extra("dp_accounting.rdp")
    monkeypatch.setattr(noise, "import_module", import_module)
    assert noise.import_extra("dp_accounting")
