"""What a codec spends on each layer of the model and what it keeps of it."""

from __future__ import annotations

from fedlight.codecs.matrices import Matrices
from fedlight.codecs.selection import Selection, split_grids
from fedlight.core.codec import Codec
from fedlight.core.layout import Layout


def bits_by_layer(codec: Codec) -> dict[str, int]:
    """Return the bits of one message by weight tensor (a bias counts with its weight); empty for codecs that do not share them out."""
    inner: Codec = getattr(codec, "codec", codec)  # of an algorithm that sends more than the update
    part: Codec = next(iter(getattr(inner, "codecs", ())), inner)  # of a chain the first sees the model
    plan, layout = getattr(part, "plan", None) or {}, part.layout
    if layout is None or not {"grids", "bits"} <= {*plan}:
        return {}
    selection = Selection.from_plan(plan)
    grids = split_grids(selection.bits, selection.grids)
    items = Matrices.of(layout).items
    return {layout.names[item.tensors[0]]: int(bits.sum()) for item, bits in zip(items, grids, strict=True)}


def layer_figures(codec: Codec, layout: Layout, energy: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return, by parameter, its numbers, the share of the true update's energy that was kept (`energy_kept`) and the bits spent on it."""
    bits = bits_by_layer(codec)
    told: dict[str, dict[str, float]] = {}
    for name, length in zip(layout.names, layout.sizes, strict=True):
        told[name] = {"numbers": length} | ({"energy_kept": energy[name]} if name in energy else {})
        told[name] |= {"bits": bits[name]} if name in bits else {}
    return told
