"""The client's part of a privacy mechanism, applied to one code between encoding and packing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedlight.core.codec import Context, Encoder
from fedlight.privacy.clipping import clip_integers, clip_norm

if TYPE_CHECKING:
    from fedlight.privacy.mechanism import PrivacyMechanism


class Protection:
    """Clips one client's code between encoding and packing, and adds the client's share of the noise.

    Attributes:
        inside: whether the code was within the norm (known after the call).
    """

    def __init__(
        self, mechanism: PrivacyMechanism, encoder: Encoder, context: Context, generator: torch.Generator, client: int, silent: bool
    ) -> None:
        self.mechanism = mechanism
        self.format = encoder.format_at(context.step)
        unit = encoder.common_step(context)
        assert unit is not None, "refused before training"
        self.bound = float(context.broadcast.get("clip", mechanism.clip)) / unit
        self.context = context
        self.generator = generator
        self.client = client
        self.silent = silent
        self.inside = True

    def __call__(self, code: Tensor) -> Tensor:
        """Return the protected code ``[code_dim]`` on the same device: integers (int64) or floats of the format's type."""
        device = code.device
        code = torch.zeros_like(code) if self.silent else code.detach()
        self.inside = bool(torch.isfinite(code).all()) and float(code.double().norm()) <= self.bound
        limit = 0
        if code.is_floating_point():
            clipped = clip_norm(code, self.bound, self._float_type(code))
        else:
            clipped, limit = clip_integers(code, self.bound, self.generator), (1 << (self.format.bits - 1)) - 1
        return self.mechanism.add_share(clipped, self.bound, limit, self.mechanism.source(self.context, self.client)).to(device)

    def _float_type(self, code: Tensor) -> torch.dtype:
        dtype = getattr(self.format, "dtype", code.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
