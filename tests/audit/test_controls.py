"""Metrics, baselines, verdicts, membership and canaries: the figures that conclusions are drawn from."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fedlight.audit.canaries import audited_mechanism, epsilon_lower_bound, p_value, right_guesses, toss_canaries
from fedlight.audit.metrics import CEILING, Controls, identification_rate, match, matched, psnr, ssim
from fedlight.audit.parties import auc, canary_bounds, cosine_scores, likelihood_scores, tpr_at
from fedlight.audit.plan import Canaries
from fedlight.audit.rows import Row, canary_verdict, inversion_verdict, label_verdict, membership_verdict, show_rows, write_rows
from fedlight.audit.session import Result, fill
from fedlight.core.random import torch_generator
from fedlight.privacy import CentralDP


def images(count: int, name: str = "images") -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch_generator(name))


def test_a_batch_is_matched_whatever_its_order():
    true = images(9)
    order = torch.randperm(9, generator=torch_generator("order"))
    guess = true[order] + 0.01
    assert order[match(guess, true)].tolist() == list(range(9))
    assert (psnr(matched(guess, true), true) > 35).all()


def test_a_guess_serves_one_image_only():
    true = torch.stack([torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.2), torch.ones(1, 4, 4)])
    assert sorted(match(torch.stack([true[0], true[0], true[0]]), true).tolist()) == [0, 1, 2]


def test_psnr_is_of_clamped_images_and_an_exact_copy_has_the_ceiling():
    true = torch.ones(1, 1, 4, 4)
    assert psnr(true + 3, true).item() == CEILING
    assert psnr(true - 0.1, true).item() == pytest.approx(20, abs=1e-3)
    assert ssim(images(3), images(3)).tolist() == pytest.approx([1, 1, 1])
    assert ssim(1 - images(3), images(3)).max() < 0.2
    assert ssim(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).isnan().all()


def test_identification_asks_whether_the_true_image_is_nearest():
    true, pool = images(4), images(50, "others")
    assert identification_rate(true + 0.05, true, pool) == 1
    assert identification_rate(pool[:4], true, pool) == 0


def test_baselines_use_what_they_say_and_no_more():
    labels = torch.arange(30) % 3
    context = images(30) * 0.1 + labels[:, None, None, None] * 0.3
    guesses = Controls.of(context, labels, 4).guesses(torch.tensor([0, 2, 3]))
    assert torch.equal(guesses["mean_image"][0], context.mean(0))
    assert torch.equal(guesses["class_mean"][1], context[labels == 2].mean(0))
    assert torch.equal(guesses["class_mean"][2], context.mean(0))  # no public image of it
    assert any(torch.equal(guesses["label_only"][0], image) for image in context[labels == 0])


def result(values: list[float], class_mean: float = 14.0, labels: float | None = None) -> Result:
    blinds = {"mean_image": 12.0, "class_mean": class_mean, "label_only": 11.0}
    pictures = torch.zeros(len(values), 1, 2, 2)
    return Result(torch.tensor(values), torch.tensor(values), pictures, values, pictures, labels, 0.5, blinds, 1.0)


def row() -> Row:
    return Row("DLG", "code of one client", "linear", 1, "none")


def test_a_failed_positive_control_allows_no_conclusion_even_where_the_attack_got_something():
    for values in ([14.0, 15.0], [30.0, 40.0], [5.0, 5.0]):
        assert fill(row(), result(values), result([14.0, 16.0]), 0.1, plain=False).conclusion.startswith("no conclusion")
    assert inversion_verdict(math.nan, math.nan, math.nan, 14.0, plain=True).startswith("no conclusion")


def test_a_leak_is_what_lies_above_the_class_mean():
    leaking = fill(row(), result([30.0, 32.0, 34.0]), result([60.0]), 0.1, plain=False)
    assert leaking.gain == pytest.approx(18) and leaking.conclusion.startswith("leaks: +18.0 dB")
    assert (leaking.psnr_worst, leaking.psnr_median, leaking.psnr_best, leaking.n) == (30, 32, 34, 3)
    once = fill(row(), result([10.0, 12.0, 34.0]), result([60.0]), 0.1, plain=False)
    assert once.conclusion.startswith("leaks in the best case")
    nothing = fill(row(), result([14.5, 14.5]), result([60.0]), 0.1, plain=False)
    assert "less than the 3 dB that count as a leak, at this budget" in nothing.conclusion
    assert "safe" not in nothing.conclusion


def test_labels_and_membership_have_their_own_controls():
    assert label_verdict(0.9, 1.0, 0.1).startswith("labels leak")
    assert label_verdict(0.9, 0.15, 0.1).startswith("no conclusion")
    labels = fill(row(), result([], labels=0.9), result([], labels=1.0), 0.1, plain=False)
    assert labels.psnr_median is None and labels.label_accuracy == 0.9
    assert membership_verdict(0.9, 0.95).startswith("membership leaks")
    assert membership_verdict(0.5, 0.95).startswith("this attack got")
    assert membership_verdict(0.9, 0.5).startswith("no conclusion")


def test_files_hold_every_row_and_how_to_read_them(tmp_path):
    rows = [fill(row(), result([30.0]), result([60.0]), 0.1, plain=False), Row("x", "y", "z", 2, "none", psnr_best=math.inf)]
    write_rows(rows, tmp_path, "A title")
    written = json.loads((tmp_path / "audit.json").read_text())
    asked = {"attack", "sees", "codec", "clients", "prior", "psnr_median", "psnr_best", "control_psnr", "mean_image_psnr"}
    assert asked | {"class_mean_psnr", "conclusion", "n", "seeds", "psnr_worst"} <= set(written[0])
    assert written[1]["psnr_best"] is None
    assert "does not prove that another would get nothing" in " ".join((tmp_path / "audit.md").read_text().split())
    assert show_rows(rows, "A title").row_count == 2


def test_non_members_are_told_apart_as_often_as_by_a_coin():
    seen = torch.randn(1, 200, generator=torch_generator("sum"))
    codes = torch.randn(2000, 200, generator=torch_generator("codes"))
    scores = cosine_scores(codes, seen)[:, 0]
    assert auc(scores[:1000], scores[1000:]) == pytest.approx(0.5, abs=0.05)
    assert tpr_at(scores[:1000], scores[1000:]) < 0.03


def test_members_of_a_sum_are_told_apart_and_better_with_a_likelihood_ratio():
    """Codes have a common part of their own size: without their own shadows it hides who took part."""
    generator = torch_generator("members")
    codes = torch.randn(400, 300, generator=generator) + torch.rand(400, 1, generator=generator) * 4 * torch.randn(300, generator=generator)
    seen = codes[:8].mean(0, keepdim=True)
    shadows = torch.stack([codes[torch.randint(200, 400, (8,), generator=generator)].mean(0) for _ in range(40)])
    scores = cosine_scores(codes[:200], seen)[:, 0]
    ratio = likelihood_scores(scores, cosine_scores(codes[:200], shadows))
    assert auc(ratio[:8], ratio[8:]) > 0.9
    assert auc(ratio[:8], ratio[8:]) > auc(scores[:8], scores[8:])


def test_tpr_is_that_above_the_threshold_that_one_in_a_hundred_passes():
    others = torch.arange(100.0)
    assert tpr_at(torch.tensor([98.5, 97.5, 200.0]), others) == pytest.approx(2 / 3)
    assert tpr_at(torch.tensor([98.5]), others[:50]) == 1


def test_the_bound_grows_with_right_guesses_and_is_none_at_chance():
    bounds = [epsilon_lower_bound(100, 100, right, 1e-5) for right in (50, 60, 70, 90, 100)]
    assert bounds == sorted(bounds) and bounds[0] == 0 and bounds[1] > 0
    assert epsilon_lower_bound(100, 100, 100, 0.0) == pytest.approx(math.log(0.05**0.01 / (1 - 0.05**0.01)), rel=1e-6)
    assert p_value(100, 100, 80, 1.0, 1e-3) > p_value(100, 100, 80, 1.0, 0.0)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_bound_holds_for_randomised_response_which_is_exactly_epsilon_private(epsilon):
    """The sharpest mechanism there is: the bound may pass the truth in one run of twenty, and comes near it."""
    chance, over, bounds = 1 / (1 + math.exp(-epsilon)), 0, []
    for run in range(60):
        right = int((torch.rand(2000, generator=torch_generator("response", str(epsilon), run)) < chance).sum())
        bounds.append(epsilon_lower_bound(2000, 2000, right, 0.0))
        over += bounds[-1] > epsilon
    assert over <= 8
    assert sum(bounds) / len(bounds) > 0.75 * epsilon


def test_guesses_are_right_without_noise_and_as_good_as_a_coin_with_much():
    scores, inside = toss_canaries(500, 100, 1, torch_generator("quiet"))
    assert right_guesses(scores, inside, 50) == 50
    pytest.importorskip("dp_accounting")
    scores, inside = toss_canaries(500, 1000, 1, torch_generator("loud"), audited_mechanism(300.0, 1e-5, 1000, 1, 500, 0))
    assert abs(right_guesses(scores, inside, 500) - 250) < 60


@pytest.mark.quick(2)
@pytest.mark.parametrize("noise", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("rounds", [1, 10])
def test_canaries_refute_no_epsilon_that_the_accountant_proves(noise, rounds):
    pytest.importorskip("dp_accounting")
    settings = Canaries(rounds=rounds)
    for length in (50, 800):
        pairs = [canary_bounds(length, settings, noise, seed) for seed in range(5)]
        assert all(proved is not None and lower <= proved for lower, proved in pairs)
        bare, none = canary_bounds(length, settings, 0.0, 0)
        assert bare > 0 and none is None
    if noise <= 0.5:
        assert max(lower for lower, _ in pairs) > 0.1  # and they say something


@pytest.mark.parametrize("fault", ["clip_norm", "sum_noise"])
def test_canaries_find_out_a_mechanism_that_clips_or_adds_noise_otherwise_than_its_ledger_says(fault, monkeypatch):
    pytest.importorskip("dp_accounting")
    settings = Canaries(count=400, rounds=10)
    if fault == "clip_norm":
        monkeypatch.setattr("fedlight.audit.canaries.clip_norm", lambda code, bound: code)
    else:
        honest = CentralDP.sum_noise
        monkeypatch.setattr(CentralDP, "sum_noise", lambda self, length, unit, context: honest(self, length, 50 * unit, context))
    lower, proved = canary_bounds(2000, settings, 8.0, 0)
    assert proved is not None and lower > proved


def test_the_ledger_agrees_with_the_published_figure():
    pytest.importorskip("dp_accounting")
    for noise, rounds, epsilon in ((1.0, 1, 4.3772), (5.0, 100, 9.9973)):
        mechanism = audited_mechanism(noise, 1e-5, 10, rounds, 4, 0)
        assert mechanism is not None
        toss_canaries(4, 2, rounds, torch_generator("ledger"), mechanism)
        assert mechanism.epsilon() == pytest.approx(epsilon, abs=2e-3)
    assert audited_mechanism(0.0, 1e-5, 10, 1, 4, 0) is None


def test_canaries_that_refute_the_proof_are_said_to():
    assert canary_verdict(5.0, 4.0).startswith("BROKEN")
    assert canary_verdict(3.0, 4.0).startswith("consistent")
    assert canary_verdict(3.0, None).startswith("no noise")
    assert canary_verdict(0.0, None).startswith("no conclusion")
