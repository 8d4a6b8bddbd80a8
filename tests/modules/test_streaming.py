"""A bank in a file: two-sided codecs are fitted to it one round after another, to the same bits as from memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedlight.callbacks import CodecPretraining
from fedlight.codecs import ChainCodec, QuantizeCodec, TransformCodec, TwoSidedCodec
from fedlight.codecs.moments import round_rows
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec
from fedlight.core.errors import ConfigurationError
from fedlight.core.export import codec_state
from fedlight.core.layout import Layout
from fedlight.core.pretraining import CodecTraining, ProxyFederation
from fedlight.modules.pretraining import fit_codec
from tests.federation import federated, federated_data, trainer

LAYOUT = Layout(("a.weight", "a.bias", "b.weight", "c"), ((32, 150), (32,), (16, 1200), (9,)))
ROUNDS, CLIENTS = 20, 4
ROUND = CLIENTS * LAYOUT.dim

CODECS: dict[str, Callable[[], Codec]] = {
    "two-sided": lambda: TwoSidedCodec(64, rank=8),
    "two-sided, energy corrected": lambda: TwoSidedCodec(64, rank=8, correct_energy=True, cohort=0),
    "transform": lambda: TransformCodec(64, rank=8),
    "transform, energy corrected": lambda: TransformCodec(64, rank=8, correct_energy=True, relative=False),
    "two-sided and quantize": lambda: ChainCodec([TwoSidedCodec(64, rank=8), QuantizeCodec(4)]),
}


@pytest.fixture(scope="module")
def bank() -> UpdateBank:
    """Most energy in a few directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(6, LAYOUT.dim, generator=generator)
    weights = torch.randn(ROUNDS, CLIENTS, 6, generator=generator)
    return UpdateBank(weights @ directions + 0.1 * torch.randn(ROUNDS, CLIENTS, LAYOUT.dim, generator=generator), LAYOUT)


@pytest.fixture(scope="module")
def filed(bank: UpdateBank, tmp_path_factory: pytest.TempPathFactory) -> UpdateBank:
    """The same bank in a file."""
    path: Path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    bank.save(path)
    return UpdateBank.load(path)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that was made while it is on, views of the bank's own memory aside."""

    def __init__(self, bank: UpdateBank) -> None:
        super().__init__()
        self.own = bank.recorded.untyped_storage().data_ptr()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() != self.own:
                self.numbers = max(self.numbers, made.numel())
        return result


def fit(codec: Codec, bank: UpdateBank) -> dict[str, float]:
    return fit_codec(codec, bank, CodecTraining(), torch.device("cpu"), None, False, 0)


@pytest.mark.parametrize("name", CODECS)
def test_a_bank_in_a_file_gives_the_same_bits(name: str, bank: UpdateBank, filed: UpdateBank) -> None:
    codecs = [CODECS[name]() for _ in range(2)]
    figures = [fit(codec, source) for codec, source in zip(codecs, (bank, filed), strict=True)]
    assert figures[0] == figures[1]
    assert codecs[0].describe() == codecs[1].describe()
    first, second = (codec_state(codec) for codec in codecs)
    for half in ("encoder", "decoder"):
        assert all(torch.equal(first[half][key], second[half][key]) for key in first[half])


@pytest.mark.parametrize("name", CODECS)
def test_no_more_than_a_round_is_held_at_a_time(name: str, filed: UpdateBank) -> None:
    """Splitting, checking, fitting and the held-out error: no tensor is larger than one round of updates."""
    with Largest(filed) as seen:
        fit(CODECS[name](), UpdateBank(filed.recorded, filed.layout))
    assert 0 < seen.numbers <= ROUND


@pytest.mark.parametrize("cohort", [0, 1, 3, 10])
def test_rows_have_the_second_moment_of_a_cohorts_mean(cohort: int, bank: UpdateBank) -> None:
    """``m m^T`` and, over the cohort, the clients' scatter around ``m``."""
    for updates, rows in zip(bank, round_rows(bank, cohort, relative=False), strict=True):
        u, m = updates[:, ::97].double(), updates[:, ::97].double().mean(0)
        expected = torch.outer(m, m) + ((u - m).T @ (u - m) / CLIENTS / cohort if cohort else 0)
        sampled = rows[:, ::97].double()
        torch.testing.assert_close(sampled.T @ sampled, expected, atol=1e-5, rtol=1e-4)
    for rows in round_rows(bank, cohort, relative=True):
        torch.testing.assert_close(rows.norm(), torch.tensor(1.0))


def test_a_run_that_records_to_a_file_ends_with_the_same_codec() -> None:
    states = []
    for in_memory_mb in (1024.0, 0.0):
        module = federated(codec=TwoSidedCodec(8, rank=8))
        proxy = ProxyFederation(rounds=6, clients=2, samples=8, in_memory_mb=in_memory_mb)
        trainer(1, callbacks=[CodecPretraining(proxy)]).fit(module, datamodule=federated_data())
        states.append(codec_state(module.codec))
    for half in ("encoder", "decoder"):
        assert states[0][half] and all(torch.equal(states[0][half][name], states[1][half][name]) for name in states[0][half])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_memory_mb": -1}, "`in_memory_mb` >= 0 but got -1"),
        ({"trajectories": 0}, "`trajectories` >= 1 but got 0"),
        ({"rounds": 6, "trajectories": 7}, "`trajectories` of at most `rounds`, 6, but got 7"),
    ],
)
def test_a_recording_out_of_range_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ProxyFederation(**arguments)
