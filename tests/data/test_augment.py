import pytest
import torch

from fedlight.core.errors import ConfigurationError
from fedlight.core.random import torch_generator
from fedlight.data import Affine, CropFlip


def images(n: int = 6) -> torch.Tensor:
    return torch.arange(n * 2 * 5 * 7, dtype=torch.float32).reshape(n, 2, 5, 7) + 1


def test_same_generator_same_images_whatever_happens_between():
    x, change = images(), CropFlip(2)
    clients = {}
    for client in (0, 1, 2):
        clients[client] = change(x, torch_generator("augment", client))
    torch.rand(3)
    for client in (2, 0, 1):  # another order of clients
        assert torch.equal(clients[client], change(x, torch_generator("augment", client)))
    assert not torch.equal(clients[0], clients[1])


def test_each_image_is_a_crop_of_its_padded_self_or_of_the_mirror_image():
    x, padding = images(40), 2
    changed = CropFlip(padding)(x, torch_generator(0))
    assert changed.shape == x.shape
    seen = set()
    for before, after in zip(x, changed, strict=True):
        padded = torch.nn.functional.pad(before, [padding] * 4)
        windows = {(i, j): padded[:, i : i + 5, j : j + 7] for i in range(5) for j in range(5)}
        found = [(*at, flip) for at, window in windows.items() for flip in (0, 1) if torch.equal(window.flip(2) if flip else window, after)]
        assert len(found) == 1
        seen |= set(found)
    assert {flip for *_, flip in seen} == {0, 1}
    assert len({place[:2] for place in seen}) > 5


def test_nothing_to_change_is_the_identity_and_input_is_not_written():
    x = images()
    assert torch.equal(CropFlip(0, flip=False)(x, torch_generator(0)), x)
    CropFlip()(x, torch_generator(0))
    assert torch.equal(x, images())


def test_an_empty_batch_stays_empty():
    assert CropFlip()(images()[:0], torch_generator(0)).shape == (0, 2, 5, 7)


def test_features_are_refused():
    with pytest.raises(ConfigurationError, match="expected images"):
        CropFlip()(torch.zeros(3, 9), torch_generator(0))
    with pytest.raises(ConfigurationError, match="padding"):
        CropFlip(-1)


def test_small_affine_changes_keep_the_image_and_large_ones_turn_it():
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, :] = 1  # a horizontal bar through the middle
    still = Affine(0, 0, 0, 0)(x, torch_generator(0))
    assert torch.allclose(still, x, atol=1e-6)

    class Quarter(Affine):
        def __init__(self):
            super().__init__(90, 0, 0)

    turned = [Quarter()(x.expand(50, -1, -1, -1), torch_generator(i)) for i in range(4)]
    vertical = torch.cat(turned)[:, 0, :, 4].mean(1)
    assert vertical.max() > 0.8 and vertical.min() < 0.3


def test_affine_draws_one_change_an_image_and_brings_in_the_darkest_value():
    x = images(6)
    changed = Affine(10, 0.1, 2)(x, torch_generator(3))
    assert changed.shape == x.shape and torch.isfinite(changed).all()
    assert changed.min() >= x.min() - 1e-3 and changed.max() <= x.max() + 1e-3
    assert torch.equal(changed, Affine(10, 0.1, 2)(x, torch_generator(3)))
    assert len({tuple((after - before).flatten()[:5].tolist()) for before, after in zip(x, changed, strict=True)}) == 6
    shifted = Affine(0, 0, 2)(x, torch_generator(1))
    assert (shifted == x.min()).any()


def test_affine_refuses_what_cannot_be():
    with pytest.raises(ConfigurationError, match="Affine expected images"):
        Affine()(torch.zeros(3, 9), torch_generator(0))
    with pytest.raises(ConfigurationError, match="`scale` in"):
        Affine(scale=1.0)
    assert Affine()(images()[:0], torch_generator(0)).shape == (0, 2, 5, 7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_on_a_gpu():
    x = images()
    assert torch.equal(CropFlip()(x.cuda(), torch_generator(0)).cpu(), CropFlip()(x, torch_generator(0)))
