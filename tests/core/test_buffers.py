"""What a model holds beside trained weights: which part travels, and what becomes of several clients' values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedlight.core.buffers import ClientExtras, combine, counters, extras, kept_apart, same_bits, specs, statistics
from fedlight.core.errors import ConfigurationError


class Mixed(nn.Module):
    """One of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.cumulative = nn.BatchNorm1d(2, momentum=None)
        self.frozen_norm = nn.BatchNorm1d(2).eval()
        self.base = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("late", None)


def copied() -> tuple[Mixed, Mixed, ClientExtras]:
    network, module = Mixed(), Mixed()
    module.load_state_dict(network.state_dict())
    return network, module, ClientExtras(module, network)


def test_every_part_has_one_place() -> None:
    module = Mixed()
    assert [p.name for p in statistics(module)] == [f"{n}.running_{k}" for n in ("norm", "cumulative") for k in ("mean", "var")]
    assert [p.name for p in counters(module)] == ["norm.num_batches_tracked", "frozen_norm.num_batches_tracked"]
    assert {p.name for p in kept_apart(module)} == {"cache", "norm.num_batches_tracked", "frozen_norm.num_batches_tracked"}
    named = {"cumulative.num_batches_tracked", "frozen_norm.running_mean", "frozen_norm.running_var", "base.weight", "base.bias"}
    assert extras(module).keys() == named | {"table", "mask", "flag", "late"}
    assert specs(module)["table"] == ((4,), "torch.float32") and specs(module)["late"] is None


def test_statistics_are_of_one_type_and_others_are_extras() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).double())
    assert len(statistics(module)) == 2 and "1.running_mean" in extras(module)


@pytest.mark.parametrize("change", ["in place", "by another tensor"])
def test_what_training_changed_is_found_and_put_back(change: str) -> None:
    network, module, own = copied()
    own.load({})
    assert own.changed() == {}
    if change == "in place":
        module.table += 1
        module.cache.fill_(7)
        with torch.no_grad():
            module.base.weight.add_(1)
    else:
        module.table, module.cache = module.table + 1, torch.full((5,), 7.0)
        module.base.weight.data = module.base.weight.data + 1
    module.mask.copy_(module.mask.clone())  # written to, and the same
    module.late = torch.ones(2)
    found = own.changed()
    assert found.keys() == {"table", "base.weight", "late"} and torch.equal(found["table"], torch.arange(4.0) + 1)
    own.load({})
    for name, tensor in network.state_dict().items():
        assert same_bits(module.state_dict()[name], tensor), name
    assert module.cache.tolist() == [0, 0] and module.late is None and own.changed() == {}


def test_the_servers_values_replace_the_first_ones_until_they_are_gone() -> None:
    _, module, own = copied()
    own.load({"table": torch.full((4,), 9.0), "late": torch.ones(3)})
    assert module.table.tolist() == [9] * 4 and module.late.tolist() == [1] * 3 and own.changed() == {}
    own.load({})
    assert module.table.tolist() == [0, 1, 2, 3] and module.late is None


def test_what_no_message_could_carry_is_refused_by_name() -> None:
    _, module, own = copied()
    kept = module.base
    module.register_buffer("queue", torch.zeros(2))
    with pytest.raises(ConfigurationError, match="training added `queue` to Mixed"):
        own.changed()
    own.load({})
    assert "queue" not in module._buffers and own.changed() == {}
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    assert own.changed() == {}
    module.base = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match="training replaced `base` of Mixed by another Linear"):
        own.changed()
    module.base = kept
    module.norm.weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigurationError, match="training replaced `weight` of BatchNorm1d"):
        own.changed()


def test_only_new_infinities_are_a_fault() -> None:
    _, module, own = copied()
    own.load({})
    module.mask = torch.tensor([1.0, -torch.inf])
    assert own.diverged(own.changed()) is None
    module.mask = torch.tensor([torch.inf, -torch.inf])
    assert own.diverged(own.changed()) == "its mask is not finite"
    module.mask = torch.tensor([0.0, torch.nan])
    assert own.diverged(own.changed()) == "its mask is not finite"


def test_floats_are_averaged_over_those_who_changed_them() -> None:
    parts = [(4, 1, {"x": torch.tensor([1.0, 2.0])}), (0, 3, {"x": torch.tensor([5.0, 6.0])}), (2, 50, {})]
    assert combine(parts, 0, 0)["x"].tolist() == [4.0, 5.0]
    half = combine([(i, 1, {"x": torch.tensor([float(i)], dtype=torch.bfloat16)}) for i in (1, 2)], 0, 0)["x"]
    assert half.dtype == torch.bfloat16 and half.tolist() == [1.5]
    assert combine([(0, 1, {"x": torch.tensor([1 + 2j])}), (1, 1, {"x": torch.tensor([3j])})], 0, 0)["x"].tolist() == [0.5 + 2.5j]


def test_what_has_no_mean_is_one_clients_and_what_goes_together_stays_together() -> None:
    """A queue of vectors of length 1 and its pointer come from the same client, another one in other rounds."""

    def client(i: int) -> dict[str, Tensor]:
        vectors = torch.randn(4, 6, generator=torch.Generator().manual_seed(i))
        return {"queue": vectors / vectors.norm(dim=0), "pointer": torch.tensor(i), "flag": torch.tensor(True)}

    parts = [(i, 1, client(i)) for i in range(5)]
    seen = set()
    for number in range(12):
        made = combine(parts, 0, number)
        chosen = int(made["pointer"])
        seen.add(chosen)
        assert torch.equal(made["queue"], client(chosen)["queue"]) and bool(made["flag"])
        again = combine(parts[::-1], 0, number)
        assert all(torch.equal(again[name], made[name]) for name in made)
    assert len(seen) > 2


def test_a_flag_that_few_clients_set_is_set() -> None:
    assert bool(combine([(0, 1, {}), (1, 1, {}), (2, 1, {"flag": torch.tensor(True)})], 0, 0)["flag"])
