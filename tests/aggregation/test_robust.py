"""Robust rules withstand what they say they do, are the mean where there is nothing to withstand, and cannot be had with secrecy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.aggregation import Aggregator, Median, NormBound, PlainAggregator, SecureAggregator, TrimmedMean
from fedlight.aggregation.robust import bound_norm, median, trimmed_mean
from fedlight.callbacks import FederatedCallback
from fedlight.clients import FedNova, Scaffold
from fedlight.codecs import ChainCodec, LinearCodec, QuantizeCodec, TopKCodec, TransformCodec
from fedlight.core.errors import ConfigurationError
from fedlight.data import Everyone
from fedlight.privacy import CentralDP
from tests.federation import federated, federated_data, run, weights_of

CODES = st.integers(3, 9).flatmap(
    lambda clients: st.lists(st.lists(st.floats(-1, 1), min_size=4, max_size=4), min_size=clients, max_size=clients)
)


@given(codes=CODES, far=st.sampled_from([1e3, -1e9, 1e30]))
def test_a_minority_moves_no_coordinate_out_of_the_honest_range(codes, far):
    honest = torch.tensor(codes, dtype=torch.float64)
    bad = (len(honest) - 1) // 2
    attacked = torch.cat([honest, torch.full((bad, 4), far, dtype=torch.float64)])
    share = (bad + 0.5) / len(attacked)
    for located in (median(attacked), trimmed_mean(attacked, min(share, 0.49))):
        assert (located >= honest.min(0).values - 1e-12).all() and (located <= honest.max(0).values + 1e-12).all()
    assert attacked.mean(0).abs().max() > 100 * honest.abs().max() / len(attacked)


@given(codes=CODES)
def test_rules_are_what_their_definitions_say(codes):
    values = torch.tensor(codes, dtype=torch.float64)
    assert torch.allclose(median(values), values.quantile(0.5, 0))
    assert torch.allclose(trimmed_mean(values, 0.0), values.mean(0))
    assert torch.allclose(trimmed_mean(values, 0.499), trimmed_mean(values[torch.randperm(len(values))], 0.499))
    if len(values) >= 4:
        assert torch.allclose(trimmed_mean(values, 1 / len(values) + 1e-9), values.sort(0).values[1:-1].mean(0))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_a_bounded_code_is_no_longer_than_the_bound_and_points_the_same_way(values, bound):
    code = torch.tensor(values)
    bounded = bound_norm(code, bound)
    assert float(bounded.norm()) <= bound * (1 + 1e-12)
    if float(code.double().norm()) <= bound:
        assert torch.equal(bounded, code.double())
    else:
        assert torch.allclose(bounded / bounded.norm(), code.double() / code.double().norm())


class Attacks(FederatedCallback):
    """Client 0 sends the opposite of its update, a hundred times."""

    def on_client_update(self, trainer, pl_module, context, update):
        if update.client == 0:
            update.update.mul_(-100)


CODECS = {"none": lambda: None, "linear": lambda: LinearCodec(2, block_size=16), "transform": lambda: TransformCodec(4, encoder_share=1.0)}
RULES = {"norm bound": lambda: NormBound(0.2), "trimmed mean": lambda: TrimmedMean(0.2), "median": Median}


def distance(aggregator: Aggregator | None, codec, attack: bool) -> torch.Tensor:
    module = federated(codec=codec, aggregator=aggregator)
    before = weights_of(module)
    # The attack strikes before the encoder sees the update.
    run(module, 1, callbacks=[Attacks()] if attack else [])
    return weights_of(module) - before


@pytest.mark.quick(3)
@pytest.mark.parametrize("make", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_round_with_an_attacker_goes_about_where_it_goes_without(rule, make):
    honest = distance(None, make(), attack=False)
    plain = distance(None, make(), attack=True)
    robust = distance(rule(), make(), attack=True)
    assert (robust - honest).norm() < 0.7 * (plain - honest).norm()


@pytest.mark.parametrize("rule", [lambda: NormBound(1e6), lambda: TrimmedMean(0.0)], ids=["norm bound", "trimmed mean"])
@pytest.mark.parametrize("make", CODECS.values(), ids=CODECS)
def test_rules_that_cut_nothing_are_the_mean(rule, make):
    plain, robust = federated(codec=make()), federated(codec=make(), aggregator=rule())
    run(plain, 3)
    run(robust, 3)
    assert torch.allclose(weights_of(plain), weights_of(robust), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aggregator": Median(), "weighting": "samples"}, "`model.weighting` equal for Median"),
        ({"aggregator": NormBound(1.0), "weighting": "samples"}, "`model.weighting` equal for NormBound"),
        ({"aggregator": TrimmedMean(), "privacy": CentralDP(1.0, 1.0, delta=0.01)}, "sums codes under CentralDP but TrimmedMean does not"),
        (
            {"aggregator": NormBound(1.0), "codec": ChainCodec([LinearCodec(2, block_size=16), QuantizeCodec(6)])},
            "one common step for NormBound",
        ),
        ({"aggregator": NormBound(1.0), "algorithm": Scaffold()}, "those of Scaffold upload more"),
        ({"aggregator": NormBound(1.0), "algorithm": FedNova(steps=1), "codec": TopKCodec(4)}, "those of FedNova upload more"),
    ],
    ids=range(6),
)
def test_what_a_rule_cannot_do_is_refused_before_training(changes, message):
    module = federated(**changes)
    before = weights_of(module)
    with pytest.raises(ConfigurationError, match=message):
        run(module, 1, data=federated_data(normalize=False, sampler=Everyone()))
    assert torch.equal(weights_of(module), before)


@pytest.mark.parametrize("make", [lambda: TrimmedMean(0.5), lambda: TrimmedMean(-0.1), lambda: NormBound(0.0)], ids=range(3))
def test_arguments_out_of_range_are_refused(make):
    with pytest.raises(ConfigurationError, match="Expected `(share|bound)`"):
        make()


def test_rules_and_secrecy_exclude_one_another_by_type():
    """There is one aggregator: a run cannot have both, and each says which side it is on."""
    for rule in (NormBound(1.0), TrimmedMean(), Median()):
        assert not rule.hides_messages and isinstance(rule, Aggregator)
    assert PlainAggregator.sums and NormBound.sums and not Median.sums and SecureAggregator.hides_messages
