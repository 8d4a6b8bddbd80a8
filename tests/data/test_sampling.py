import numpy as np
import pytest

from fedlight.core.errors import ConfigurationError
from fedlight.data import Everyone, Poisson, Uniform

SAMPLERS = [pytest.param(Uniform(7), id="uniform"), pytest.param(Poisson(0.3), id="poisson"), pytest.param(Everyone(), id="everyone")]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("population", [7, 50, 200_000])
def test_cohort_is_sorted_distinct_and_in_range(sampler, population):
    sampler.validate(population)
    cohort = sampler.sample(population, seed=1, round=2, attempt=0)
    assert cohort.dtype == np.int64
    assert np.all(np.diff(cohort) > 0)
    assert len(cohort) == 0 or (cohort[0] >= 0 and cohort[-1] < population)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cohort_depends_on_its_arguments_alone(sampler):
    first = sampler.sample(50, 0, 3, 0)
    np.random.seed(5)  # noqa: NPY002  (global state must not matter)
    sampler.sample(50, 0, 4, 0)
    assert np.array_equal(first, sampler.sample(50, 0, 3, 0))


@pytest.mark.parametrize("sampler", [Uniform(7), Poisson(0.3)])
@pytest.mark.parametrize("other", [(1, 3, 0), (0, 4, 0), (0, 3, 1)])
def test_other_seed_round_or_attempt_gives_another_cohort(sampler, other):
    assert not np.array_equal(sampler.sample(50, 0, 3, 0), sampler.sample(50, *other))


@pytest.mark.parametrize("sampler", [Uniform(10), Poisson(0.2)])
def test_every_client_is_as_likely(sampler):
    rounds = 4000
    counts = np.bincount(np.concatenate([sampler.sample(50, 0, i, 0) for i in range(rounds)]), minlength=50)
    deviation = np.sqrt(rounds * 0.2 * 0.8)
    assert np.abs(counts - 0.2 * rounds).max() < 5 * deviation


def test_poisson_sizes_vary_as_a_binomial_and_may_be_empty():
    sizes = np.array([len(Poisson(0.02).sample(50, 0, i, 0)) for i in range(4000)])
    assert abs(sizes.mean() - 1.0) < 0.1
    assert abs(sizes.var() - 0.98) < 0.15
    assert sizes.min() == 0


def test_uniform_cohort_has_its_size_and_fits_the_population():
    assert len(Uniform(7).sample(7, 0, 0, 0)) == 7
    for call in (lambda: Uniform(8).validate(7), lambda: Uniform(8).sample(7, 0, 0, 0)):
        with pytest.raises(ConfigurationError, match="cohort larger than the population: expected at most 7, got 8"):
            call()


def test_arguments_are_checked():
    with pytest.raises(ConfigurationError, match="cohort_size: expected at least 1, got 0"):
        Uniform(0)
    for rate in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ConfigurationError, match="rate: expected"):
            Poisson(rate)
