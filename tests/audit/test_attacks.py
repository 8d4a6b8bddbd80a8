"""The laws of each attack on tiny models, and the contract of the family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedlight.audit.attacks import (
    DLG,
    Attack,
    BiasTrick,
    Case,
    FedAvgInversion,
    InvertingGradients,
    LastLayerLabels,
    LearnedInverter,
    LikelyLabels,
    RobbingTheFed,
)
from fedlight.audit.metrics import matched, psnr
from fedlight.audit.networks import SigmoidLeNet
from fedlight.audit.plan import Canaries
from fedlight.audit.priors import Gaussian, Pixels, Prior, SmallVAE, TotalVariation
from fedlight.audit.victim import Pixels as Constants
from fedlight.audit.victim import Victim
from fedlight.audit.views import CodeView, View
from fedlight.codecs import LinearCodec
from fedlight.core.errors import ConfigurationError
from fedlight.core.random import torch_generator
from fedlight.modules import MLP

CONSTANTS = Constants(torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), 0.37))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP(64, [48, 24], 10)


def lenet() -> nn.Module:
    torch.manual_seed(0)
    return SigmoidLeNet(1, 8)


def case_of(attack: Attack, network: nn.Module, digits, context, clients=1, batch=1, steps=1, first=0, view: View | None = None):
    """Return the case, the true images and their labels."""
    victim = Victim(network, nn.CrossEntropyLoss(), CONSTANTS, 0.1, steps)
    tampered = attack.tamper(victim, context)
    victim = victim if tampered is None else Victim(tampered, nn.CrossEntropyLoss(), CONSTANTS, 0.1, steps)
    x, y = (part[first : first + clients * batch].unflatten(0, (clients, batch)) for part in digits)
    view = view or View()
    seen = view.observe(victim.updates(x, y), torch_generator("seen"))
    return Case(victim, view, seen, y, context), x.flatten(0, 1), y.flatten()


def quality(attack: Attack, network: nn.Module, digits, context, **options) -> Tensor:
    attack = attack.prepare(context, torch_generator("prior"))
    case, images, _ = case_of(attack, network, digits, context, **options)
    attack.check(case)
    found = attack.run(case, torch_generator("attack"))
    assert found.images is not None
    return psnr(matched(found.images.float(), images), images)


def test_the_bias_trick_is_exact(digits, context):
    assert quality(BiasTrick(), mlp(), digits, context).min() > 60
    assert quality(BiasTrick(), mlp(), digits, context, steps=5).min() > 60  # every step has the same image


def test_the_bias_trick_finds_images_that_a_unit_has_for_itself(digits, context):
    assert quality(BiasTrick(), mlp(), digits, context, clients=2, batch=2).median() > 60


def test_the_bias_trick_refuses_a_network_that_begins_with_a_convolution(digits, context):
    case, _, _ = case_of(BiasTrick(), lenet(), digits, context)
    with pytest.raises(ConfigurationError, match="no linear first layer"):
        BiasTrick().check(case)


@pytest.mark.parametrize("first", range(0, 50, 10))
def test_labels_of_one_image_are_right(first, digits, context):
    for network in (mlp(), lenet()):
        case, _, labels = case_of(LastLayerLabels(), network, digits, context, first=first + first // 10)
        assert LastLayerLabels().run(case, torch_generator()).labels.tolist() == labels.tolist()


def test_labels_of_a_batch_are_right_whatever_their_order(digits, context):
    case, _, labels = case_of(LastLayerLabels(), mlp(), digits, context, clients=4, batch=3, first=30)
    assert sorted(LastLayerLabels().run(case, torch_generator()).labels.tolist()) == sorted(labels.tolist())


def test_labels_without_a_bias_are_read_from_the_weights_of_one_image(digits, context):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10, bias=False))
    case, _, labels = case_of(LastLayerLabels(), network, digits, context, first=7)
    assert LastLayerLabels().run(case, torch_generator()).labels.tolist() == labels.tolist()
    case, _, _ = case_of(LastLayerLabels(), network, digits, context, batch=2)
    with pytest.raises(ConfigurationError, match="no bias"):
        LastLayerLabels().check(case)


@pytest.mark.quick(1)
@pytest.mark.parametrize("labels", ["known", "inferred", "joint"])
def test_dlg_inverts_the_plain_gradient_of_a_sigmoid_lenet(labels, digits, context):
    assert quality(DLG(200, 3, labels), lenet(), digits, context).min() > 30


def test_dlg_inverts_a_sum_of_gradients(digits, context):
    assert quality(DLG(200, 1), lenet(), digits, context, clients=3).min() > 30


def test_dlg_goes_through_an_encoder_that_keeps_more_numbers_than_there_are_pixels(digits, context):
    """And its prediction is what arrives: a float code has no rounding."""
    victim = Victim(lenet(), nn.CrossEntropyLoss(), CONSTANTS)
    view = CodeView(LinearCodec(16, "random", "rows", 32).bind(victim.layout))
    updates = victim.updates(digits[0][:2, None], digits[1][:2, None])
    torch.testing.assert_close(view.predict(updates), view.observe(updates, torch_generator()))
    assert view.codec.encoder.code_dim > 2 * 64
    assert quality(DLG(300, 1), lenet(), digits, context, view=view).min() > 30


def test_matching_through_local_steps_beats_taking_them_for_one(digits, context):
    through = quality(FedAvgInversion(100, 1), lenet(), digits, context, batch=2, steps=3)
    assert through.min() > 30
    assert through.median() > quality(DLG(100, 1), lenet(), digits, context, batch=2, steps=3).median()


def test_cosine_matching_beats_the_class_mean(digits, context):
    attack = InvertingGradients(steps=300)
    means = context.images[context.labels == digits[1][0]].mean(0, keepdim=True)
    assert quality(attack, lenet(), digits, context).min() > psnr(means, digits[0][:1]).item() + 3


def test_an_imprint_reads_images_that_are_alone_in_their_bin(digits, context):
    found = quality(RobbingTheFed(bins=100), lenet(), digits, context, clients=4, batch=2)
    assert found.median() > 60


def test_an_imprint_changes_what_the_model_says_only_a_little(digits, context):
    victim = Victim(lenet(), nn.CrossEntropyLoss(), CONSTANTS)
    tampered = RobbingTheFed().tamper(victim, context)
    x = CONSTANTS.inputs(digits[0][:20]).double()
    assert (tampered(x) - victim.network(x)).abs().max() < 0.1 * victim.network(x).std()


@pytest.mark.slow
def test_an_inverter_learns_more_than_the_label_from_plain_gradients(digits, context):
    attack = LearnedInverter(steps=400, pairs=300)
    values, means = [], []
    case, _, _ = case_of(attack, lenet(), digits, context)
    for first in range(8):
        x, y = digits[0][first : first + 1], digits[1][first : first + 1]
        seen = case.view.observe(case.victim.updates(x[None], y[None]), torch_generator())
        one = Case(case.victim, case.view, seen, y[None], context)
        values.append(psnr(attack.run(one, torch_generator()).images, x))
        means.append(psnr(context.images[context.labels == y].mean(0, keepdim=True), x))
    assert torch.cat(values).median() > torch.cat(means).median() + 1
    case, _, _ = case_of(attack, lenet(), digits, context, batch=2)
    with pytest.raises(ConfigurationError, match="one image of one client"):
        attack.check(case)


PRIORS: dict[str, Callable[[], Prior]] = {
    "pixels": Pixels,
    "TV": TotalVariation,
    "Gaussian": Gaussian,
    "VAE": lambda: SmallVAE(steps=50),
}


@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_maps_coordinates_to_images_with_gradients(name, context):
    prior = PRIORS[name]().fit(context.images, context.labels, torch_generator("prior"))
    latent = prior.start(3, torch_generator("start")).requires_grad_()
    images = prior.images(latent)
    assert images.shape == (3, 1, 8, 8)
    gradient = torch.autograd.grad(images.square().sum() + prior.penalty(latent), latent)[0]
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    with torch.no_grad():
        prior.project(latent)
    again = PRIORS[name]().fit(context.images, context.labels, torch_generator("prior"))
    torch.testing.assert_close(again.start(3, torch_generator("start")), prior.start(3, torch_generator("start")))


@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_has_coordinates_for_any_image(name, digits, context):
    """Also for images that it was not fitted to: no prior keeps an attack from the truth."""
    prior = PRIORS[name]().fit(context.images, context.labels, torch_generator("prior"))
    images, labels = digits[0][:5].double(), digits[1][:5]
    for one in (prior, prior.given(labels)):
        torch.testing.assert_close(one.images(one.latent(images)), images, atol=1e-9, rtol=0)


def test_the_gaussian_priors_penalty_is_the_negative_log_density_of_the_class(context):
    images, labels = context.images[:4].double(), context.labels[:4]
    prior = Gaussian(share=0.2, least=1e-2).fit(context.images, context.labels, torch_generator())
    flat = context.images.double().flatten(1)
    means = torch.stack([flat[context.labels == c].mean(0) for c in range(10)])
    rest = flat - means[context.labels]
    common = rest.T @ rest / (len(flat) - 10)
    expected = 0.0
    for image, label in zip(images.flatten(1), labels, strict=True):
        own = rest[context.labels == label]
        values, vectors = torch.linalg.eigh(0.8 * own.T @ own / (len(own) - 1) + 0.2 * common)
        expected += 0.5 * float(((image - means[label]) @ vectors / values.clamp(min=1e-4).sqrt()).square().sum())
    given = prior.given(labels)
    assert float(given.penalty(given.latent(images))) == pytest.approx(expected, rel=1e-6)


def test_total_variation_is_counted_in_units_of_public_images(context):
    prior = TotalVariation().fit(context.images, context.labels, torch_generator())
    differences = 2 * 7 * 8
    assert float(prior.penalty(prior.latent(context.images))) == pytest.approx(differences * len(context.images))


ATTACKS: dict[str, Callable[[], Attack]] = {
    "bias trick": BiasTrick,
    "labels": LastLayerLabels,
    "likely labels": LikelyLabels,
    "DLG": lambda: DLG(5, 2),
    "DLG, joint": lambda: DLG(5, 1, "joint"),
    "DLG, Gaussian": lambda: DLG(5, 1, prior=Gaussian()),
    "FedAvg": lambda: FedAvgInversion(3, 1, "inferred"),
    "inverting gradients": lambda: InvertingGradients(5),
    "imprint": lambda: RobbingTheFed(8),
    "inverter": lambda: LearnedInverter(8, 5, 16, 20),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_returns_as_many_guesses_as_there_are_images_and_the_same_again(name, digits, context):
    attack = ATTACKS[name]().shortened().prepare(context, torch_generator("prior"))
    assert attack.name
    clients = 1 if name == "inverter" else 3
    case, images, labels = case_of(attack, mlp(), digits, context, clients=clients)
    attack.check(case)
    first, second = (attack.run(case, torch_generator("attack")) for _ in range(2))
    assert first.images is not None or first.labels is not None
    for guess, again, true in ((first.images, second.images, images), (first.labels, second.labels, labels)):
        if guess is not None:
            assert guess.shape == true.shape and torch.isfinite(guess.double()).all()
            assert torch.equal(guess, again)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_goes_through_an_encoder(name, digits, context):
    attack = ATTACKS[name]().prepare(context, torch_generator("prior"))
    plain, _, _ = case_of(attack, mlp(), digits, context)
    view = CodeView(LinearCodec(8, "random", "rows", 32).bind(plain.victim.layout))
    case, images, _ = case_of(attack, mlp(), digits, context, view=view)
    guess = attack.run(case, torch_generator("attack"))
    assert guess.labels is not None or (guess.images is not None and guess.images.shape == images.shape)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DLG(0),
        lambda: DLG(labels="guessed"),
        lambda: InvertingGradients(lr=0.0),
        lambda: RobbingTheFed(1),
        lambda: RobbingTheFed(strength=0.0),
        lambda: LearnedInverter(0),
        lambda: InvertingGradients(weight=-1.0),
        lambda: Gaussian(0.0),
        lambda: Gaussian(least=0.0),
        lambda: SmallVAE(0),
        lambda: SigmoidLeNet(0),
        lambda: SigmoidLeNet(init=0.0),
        lambda: Canaries(noise=[1.0, -1.0]),
        lambda: Canaries(delta=1.0),
    ],
)
def test_options_out_of_range_are_refused_and_named_alone(make):
    with pytest.raises(ConfigurationError, match="^Expected `[a-z_]+`[^`]*$"):
        make()
