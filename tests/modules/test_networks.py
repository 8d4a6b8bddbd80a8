from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedlight.core.errors import ConfigurationError
from fedlight.modules.characters import CharLSTM, CharTransformer
from fedlight.modules.networks import MLP, BenchmarkCNN, LeNet5, ResNet18, SmallCNN


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("network", "count", "image"),
    [
        (MLP(784, [], 10), 7_850, (1, 28, 28)),
        (MLP(3072, [], 10), 30_730, (3, 32, 32)),
        (MLP(64, [32, 16], 10, dropout=0.2), 64 * 32 + 32 + 32 * 16 + 16 + 170, (64,)),
        (LeNet5(), 61_706, (1, 28, 28)),
        (LeNet5(in_channels=3, num_classes=7, image_size=32), 82_871, (3, 32, 32)),
        (BenchmarkCNN(), 1_626_442, (3, 32, 32)),
        (BenchmarkCNN(in_channels=1, image_size=28), 1_199_882, (1, 28, 28)),
        (SmallCNN(), 122_570, (3, 32, 32)),
        (SmallCNN(norm="group"), 122_890, (3, 32, 32)),
        (SmallCNN(norm="batch"), 122_890, (3, 32, 32)),
        (CharLSTM(), 824_425, (80,)),
        (CharTransformer(), 431_969, (80,)),
        (ResNet18(), 11_173_962, (3, 32, 32)),
    ],
)
def test_parameter_count_and_output_shape(network: nn.Module, count: int, image: tuple[int, ...]) -> None:
    assert parameters(network) == count
    logits = network(torch.zeros(5, *image))
    assert logits.ndim == 2
    assert len(logits) == 5
    assert logits.shape[1] == list(network.modules())[-1].out_features
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(("make", "least"), [(LeNet5, 12), (BenchmarkCNN, 6), (SmallCNN, 18)])
def test_smallest_image_works_and_the_next_smaller_is_refused(make: Callable[..., nn.Module], least: int) -> None:
    assert make(in_channels=2, image_size=least).eval()(torch.zeros(1, 2, least, least)).shape == (1, 10)
    with pytest.raises(ConfigurationError, match=rf"`image_size` >= {least} for {make.__name__} but got {least - 1}"):
        make(in_channels=2, image_size=least - 1)
    with pytest.raises(ConfigurationError, match="image_size"):
        make(image_size=0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: MLP(0, [], 10), "in_features"),
        (lambda: MLP(4, [8, 0], 10), r"hidden\[1\]"),
        (lambda: MLP(4, [], 0), "num_classes"),
        (lambda: MLP(4, [8], 2, dropout=1.0), "dropout"),
        (lambda: LeNet5(in_channels=0), "in_channels"),
        (lambda: BenchmarkCNN(num_classes=-1), "num_classes"),
        (lambda: SmallCNN(norm="layer"), "norm"),  # type: ignore[arg-type]
        (lambda: CharLSTM(hidden=0), "hidden"),
        (lambda: CharTransformer(heads=3), "heads"),
        (lambda: ResNet18(groups=3), "groups"),
    ],
)
def test_bad_sizes_name_the_argument(make: Callable[[], nn.Module], name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        make()


def test_group_normalisation_does_not_mix_samples() -> None:
    network = SmallCNN(norm="group")
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(x)[:1], network(x[:1]), rtol=1e-4, atol=1e-5)
