"""The noisy release of a round's sum: noise, ledger, and a denominator that tells nothing."""

from __future__ import annotations

import torch

from fedlight.core.codec import Codec, Context
from fedlight.core.running_sum import RunningSum
from fedlight.privacy import PrivacyMechanism
from fedlight.rounds.reduce import from_first


def release(
    privacy: PrivacyMechanism,
    codec: Codec,
    context: Context,
    codes: RunningSum,
    inside: int,
    device: torch.device,
    recorded: bool = False,
) -> tuple[RunningSum, float]:
    """Return the noisy sum over the fixed denominator, and the variance of its mean's noise; enter the release in the ledger.

    ``inside`` is how many codes were within the clipping norm, where clients say so; ``recorded``: whether the release is in the ledger
    already, since the clients were asked to open the sum. The result is the same on every process.
    """
    unit = codec.encoder.common_step(context)
    assert unit is not None, "refused before training"
    kind = torch.int64 if codec.integer else torch.float64
    total = codes.total if codes.total is not None else torch.zeros(codec.decoder.sum_length(), dtype=kind, device=device)
    noise = privacy.sum_noise(len(total), unit, context)
    if noise is not None:
        total = total + from_first(noise, device).to(total)
    bits = inside - codes.count / 2 + float(from_first(torch.tensor([privacy.bit_noise(context)], dtype=torch.float64), device))
    cohort = privacy.setting.cohort
    noisy = RunningSum()
    noisy.total, noisy.count = total, codes.count
    noisy.weight = noisy.squares = cohort
    if not recorded:
        privacy.record_release(bits)
    return noisy, (privacy.sum_deviation(unit, codes.count) / cohort) ** 2
