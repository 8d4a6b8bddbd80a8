"""The searches find maximum a posteriori estimates: where these have a closed form, the search ends there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedlight.audit.attacks import DLG, Case, LastLayerLabels, LikelyLabels
from fedlight.audit.attacks.matching import weighed_misfit
from fedlight.audit.attacks.public import likely_images
from fedlight.audit.metrics import psnr
from fedlight.audit.networks import SigmoidLeNet
from fedlight.audit.priors import Gaussian, Pixels
from fedlight.audit.victim import ManyRounds, Victim
from fedlight.audit.victim import Pixels as Constants
from fedlight.audit.views import CodeView, NoisyView, RoundsView, View
from fedlight.codecs import ChainCodec, GridCodec, LinearCodec
from fedlight.core.random import torch_generator

CONSTANTS = Constants(torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), 0.37))


def victim_of(network: nn.Module | None = None) -> Victim:
    torch.manual_seed(0)
    return Victim(network or SigmoidLeNet(1, 8), nn.CrossEntropyLoss(), CONSTANTS)


class LinearVictim(Victim):
    """Clients whose update is a fixed matrix ``[dim, pixels]`` times the mean image."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(nn.Linear(2, 2), nn.CrossEntropyLoss(), CONSTANTS)
        self.matrix = matrix

    def update(self, images: Tensor, targets: Tensor, unroll: bool = True) -> Tensor:
        return self.matrix @ images.double().flatten(1).mean(0)


class NoisyNumbers(View):
    """Numbers with independent errors of known, different deviations."""

    def __init__(self, errors: Tensor) -> None:
        self.errors = errors

    def deviation(self, seen: Tensor, clients: int) -> Tensor:
        return self.errors


def linear_case(digits, context, errors: Tensor) -> Case:
    matrix = torch.randn(40, 64, generator=torch_generator("matrix"), dtype=torch.float64)
    victim, (x, y) = LinearVictim(matrix), (part[:1] for part in digits)
    seen = victim.update(x, y) + errors * torch.randn(40, generator=torch_generator("errors"), dtype=torch.float64)
    return Case(victim, NoisyNumbers(errors), seen, y[:, None], context)


def closed_form(case: Case, errors: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Return mean and observation combined by their precisions: the posterior mean of a linear model with Gaussian prior and noise."""
    assert isinstance(case.victim, LinearVictim)
    matrix = case.victim.matrix
    gain = covariance @ matrix.T @ torch.linalg.inv(matrix @ covariance @ matrix.T + errors.square().diag())
    return mean + gain @ (case.seen - matrix @ mean)


def test_the_estimate_of_a_linear_model_is_the_closed_form_and_weights_matter(digits, context):
    errors = torch.logspace(-2, 2, 40, dtype=torch.float64)  # from exact to useless
    case = linear_case(digits, context, errors)
    attack = DLG(300, 2, prior=Gaussian()).prepare(context, torch_generator())
    found = attack.run(case, torch_generator("attack")).images
    assert isinstance(attack.prior, Gaussian) and found is not None
    label = int(case.labels)
    mean, basis = (part[label] for part in attack.prior.classes)
    expected = closed_form(case, errors, mean, basis.T @ basis)
    torch.testing.assert_close(found.flatten(), expected, atol=1e-4, rtol=0)
    equal = torch.full_like(errors, float(errors.square().mean().sqrt()))
    blind = closed_form(case, equal, mean, basis.T @ basis)
    truth = digits[0][0].flatten().double()
    assert (found.flatten() - truth).norm() < 0.9 * (blind - truth).norm()


def test_without_a_prior_the_estimate_is_that_of_weighed_least_squares(digits, context):
    errors = torch.logspace(-2, 0, 100, dtype=torch.float64)
    matrix = torch.randn(100, 64, generator=torch_generator("tall"), dtype=torch.float64)
    victim, (x, y) = LinearVictim(matrix), (part[:1] for part in digits)
    seen = victim.update(x, y) + errors * torch.randn(100, generator=torch_generator("errors"), dtype=torch.float64)
    found = (
        DLG(300, 1)
        .prepare(context, torch_generator())
        .run(Case(victim, NoisyNumbers(errors), seen, y[:, None], context), torch_generator())
    )
    assert found.images is not None
    expected = torch.linalg.lstsq(matrix / errors[:, None], seen / errors).solution
    torch.testing.assert_close(found.images.flatten(), expected, atol=1e-4, rtol=0)


def test_the_misfit_of_the_truth_is_half_a_unit_a_number_whatever_is_rounded(digits):
    """So it is a log likelihood, and a prior's log density can be added as it is."""
    victim, (x, y) = victim_of(), (part[:4, None] for part in digits)
    updates = victim.updates(x, y)
    view = CodeView(ChainCodec([LinearCodec(4, "random", "rows", 32), GridCodec(0.003)]).bind(victim.layout))
    for one in (view, NoisyView(view, 0.05, 0.3)):
        seen = one.observe(updates, torch_generator("seen"))
        misfit = weighed_misfit(one.predict(updates), seen, one.deviation(seen, 4))
        assert float(misfit) / len(seen) == pytest.approx(0.5, rel=0.15)


def coarse(victim: Victim, step: float = 0.03) -> CodeView:
    """Return the view of a code in which rounding is larger than most numbers."""
    return CodeView(ChainCodec([LinearCodec(8, "random", "rows", 32), GridCodec(step)]).bind(victim.layout))


def seen_case(victim: Victim, view: View, digits, context, first: int, clients: int = 1) -> Case:
    x, y = (part[first : first + clients, None] for part in digits)
    return Case(victim, view, view.observe(victim.updates(x, y), torch_generator("seen", first)), y, context)


def test_labels_are_read_by_likelihood_where_the_sign_rule_fails(digits, context):
    victim = victim_of()
    view = coarse(victim)
    cases = [seen_case(victim, view, digits, context, first) for first in range(30)]
    right = {
        type(attack).__name__: sum(attack.run(case, torch_generator()).labels.tolist() == case.labels.flatten().tolist() for case in cases)
        for attack in (LikelyLabels(), LastLayerLabels())
    }
    assert right["LikelyLabels"] >= 29
    assert right["LastLayerLabels"] <= 24


def test_labels_of_a_sum_are_counted_by_likelihood(digits, context):
    victim = victim_of()
    for first in (0, 40):
        case = seen_case(victim, coarse(victim, 0.003), digits, context, first, clients=5)
        assert sorted(LikelyLabels().run(case, torch_generator()).labels.tolist()) == sorted(case.labels.flatten().tolist())


def test_labels_need_no_last_layer(digits, context):
    victim = victim_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Tanh()))
    case = seen_case(victim, View(), digits, context, 3)
    assert LikelyLabels().run(case, torch_generator()).labels.tolist() == case.labels.flatten().tolist()
    found = DLG(20, 1, "inferred").prepare(context, torch_generator()).run(case, torch_generator())
    assert found.labels is not None and found.labels.tolist() == case.labels.flatten().tolist()


def test_public_images_that_explain_a_sum_are_found(context):
    """Here they are the images themselves."""
    victim = victim_of()
    own = context.images[[5, 50, 150]], context.labels[[5, 50, 150]]
    case = seen_case(victim, View(), own, context, 0, clients=3)
    found = likely_images(case, case.labels.flatten(), torch_generator("order"))
    assert sorted(found.flatten(1).sum(1).tolist()) == sorted(own[0].flatten(1).sum(1).tolist())


def quality(victim: Victim, view: View, digits, context, first: int) -> float:
    attack = DLG(150, 2, prior=Gaussian()).prepare(context, torch_generator())
    found = attack.run(seen_case(victim, view, digits, context, first), torch_generator()).images
    assert found is not None
    return float(psnr(found, digits[0][first : first + 1]))


def test_more_rounds_of_a_client_give_more_of_its_image_away(digits, context):
    victim = victim_of()
    moved = [victim]
    for number in range(5):
        torch.manual_seed(number)
        network = SigmoidLeNet(1, 8)
        with torch.no_grad():
            for new, old in zip(network.parameters(), victim.network.parameters(), strict=True):
                new.copy_(old + 0.02 * new)
        moved.append(victim_of(network))
    once = [quality(victim, coarse(victim), digits, context, first) for first in range(3)]
    often = [quality(ManyRounds(moved), RoundsView(coarse(victim), 6), digits, context, first) for first in range(3)]
    assert all(more > less for more, less in zip(often, once, strict=True))
    assert sum(often) / 3 > sum(once) / 3 + 2


def test_an_estimate_under_heavy_noise_is_the_prior_and_no_worse_than_the_class_mean(digits, context):
    victim = victim_of()
    view = NoisyView(View(), clip=0.1, noise=50.0)
    means = [context.images[context.labels == digits[1][first]].mean(0, keepdim=True) for first in range(3)]
    for first, mean in enumerate(means):
        assert quality(victim, view, digits, context, first) > float(psnr(mean, digits[0][first : first + 1])) - 0.5


def test_pixels_have_no_prior(context):
    prior = Pixels().fit(context.images, context.labels, torch_generator())
    assert float(prior.penalty(prior.latent(context.images))) == 0
