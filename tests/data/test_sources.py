import io
import zipfile

import numpy as np
import pytest
import torch

from fedlight.core.errors import ConfigurationError, DataError
from fedlight.data import ArrayFile, Digits, RandomFields, Resized, Torchvision, WithClients, build_arrays, standardize


def parts(**changes):
    rng = np.random.default_rng(0)
    base = {
        "x_train": rng.integers(0, 256, (12, 5, 6), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (6, 5, 6), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def saved(folder, **changes) -> ArrayFile:
    np.savez(folder / "set.npz", **parts(**changes))
    return ArrayFile("set.npz")


def test_digits_have_a_fixed_stratified_test_set(tmp_path):
    first, second = Digits().load(tmp_path), Digits().load(tmp_path)
    assert first.x_train.shape == (1438, 1, 8, 8)
    assert first.x_test.shape == (359, 1, 8, 8)
    assert torch.equal(first.x_test, second.x_test)
    assert first.x_train.min() >= 0 and first.x_train.max() == 1
    counts = torch.bincount(first.y_test)
    assert counts.min() >= 33 and counts.max() <= 39
    with pytest.raises(ConfigurationError, match="test_fraction"):
        Digits(1.0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 5, 6), (4, 1, 5, 6)),
        ((4, 3, 5, 6), (4, 3, 5, 6)),
        ((4, 5, 6, 3), (4, 3, 5, 6)),
        ((4, 5, 6, 1), (4, 1, 5, 6)),
        ((4, 3, 6, 3), (4, 3, 6, 3)),
        ((4, 9), (4, 9)),
    ],
)
def test_bytes_become_images_with_the_channel_first(shape, expected):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    arrays = build_arrays(x, np.arange(4), x, np.arange(4), source="test")
    assert arrays.x_train.shape == expected
    assert arrays.x_train.dtype == torch.float32
    assert arrays.x_train.is_contiguous()
    moved = x[0].transpose(2, 0, 1) if len(shape) == 4 and shape[1] == 5 else x[0]
    np.testing.assert_allclose(arrays.x_train[0].numpy().ravel(), moved.ravel() / 255, rtol=1e-6)


def test_array_file_with_clients_and_features(tmp_path):
    ids = np.array(list("aabbccaabbcc"))
    x = np.random.default_rng(0).normal(size=(12, 4, 2, 2, 2))
    data = saved(tmp_path, x_train=x, x_test=x[:6].astype(">f4"), client_train=ids, client_test=ids[:6]).load(tmp_path)
    assert data.x_train.shape == (12, 4, 2, 2, 2)
    torch.testing.assert_close(data.x_test, data.x_train[:6])
    assert data.num_classes == 3
    assert data.client_train is not None and data.client_train.tolist() == ids.tolist()
    assert ArrayFile(str(tmp_path / "set.npz"), num_classes=7).load(tmp_path / "elsewhere").num_classes == 7
    assert ArrayFile(str(tmp_path / "set.npz")).name == "set.npz"


def test_the_last_training_samples_can_be_test_samples_instead(tmp_path):
    ids = np.arange(12)
    whole = saved(tmp_path, client_train=ids, client_test=ids[:6]).load(tmp_path)
    moved = ArrayFile("set.npz", more_test=5).load(tmp_path)
    for name in ("x", "y"):
        train, test = (getattr(whole, f"{name}_{split}") for split in ("train", "test"))
        assert torch.equal(getattr(moved, f"{name}_train"), train[:7])
        assert torch.equal(getattr(moved, f"{name}_test"), torch.cat([test, train[7:]]))
    assert moved.client_train.tolist() == [*range(7)]
    assert moved.client_test.tolist() == [*range(6), *range(7, 12)]
    saved(tmp_path, client_train=ids)
    assert ArrayFile("set.npz", more_test=5).load(tmp_path).client_test is None
    with pytest.raises(ConfigurationError, match="fewer than the 12 training samples"):
        ArrayFile("set.npz", more_test=12).load(tmp_path)
    with pytest.raises(ConfigurationError, match="more_test"):
        ArrayFile("set.npz", more_test=-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "missing array y_test; it has x_train, y_train, x_test"),
        ({"y_train": np.array([{}] * 12, dtype=object)}, "cannot be read as an .npz of plain arrays"),
        ({"y_train": np.arange(12) - 1}, "labels out of range: expected y_train in 0..10, got -1"),
        ({"y_train": np.arange(11) % 3}, "one length above 0, got 12 and 11"),
        ({"x_test": np.zeros((0, 5, 6), np.uint8), "y_test": np.zeros(0, int)}, "one length above 0, got 0 and 0"),
        ({"y_train": np.arange(12) / 2}, "y_train: expected integer labels"),
        ({"y_train": np.eye(12, dtype=int)}, "y_train: expected integer labels of shape"),
        ({"x_train": np.full((12, 5), np.nan)}, "x_train: expected finite values in float32, got 60"),
        ({"x_train": np.full((12, 5), 1e300)}, "x_train: expected finite values"),
        ({"x_train": np.zeros((12, 5), int)}, "x_train: expected uint8 images or float features"),
        ({"x_train": np.zeros(12)}, "at least one feature axis"),
        ({"x_train": np.array(["a"] * 12)}, "x_train: expected numbers"),
        ({"x_test": np.zeros((6, 4, 4), np.uint8)}, "one feature shape, got \\(1, 5, 6\\) and \\(1, 4, 4\\)"),
        ({"client_train": np.arange(5)}, "client_train to hold one integer or string id for each of 12"),
    ],
)
def test_array_file_errors_name_the_file_and_the_fault(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as error:
        saved(tmp_path, **changes).load(tmp_path)
    assert "set.npz" in str(error.value)


def test_labels_beyond_the_given_classes(tmp_path):
    saved(tmp_path)
    with pytest.raises(DataError, match=r"set.npz: labels out of range: expected y_train in 0..1, got 2 \(4 such"):
        ArrayFile("set.npz", num_classes=2).load(tmp_path)


def test_missing_and_corrupt_files(tmp_path):
    with pytest.raises(DataError, match=r"other.npz: no such file; there is no .npz"):
        ArrayFile("other.npz").load(tmp_path)
    source = saved(tmp_path)
    with pytest.raises(DataError, match=r"other.npz: no such file; this folder has set.npz"):
        ArrayFile("other.npz").load(tmp_path)
    content = bytearray((tmp_path / "set.npz").read_bytes())
    (tmp_path / "set.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"set.npz: cannot be read"):
        source.load(tmp_path)
    content[150] ^= 255  # inside the first array: the archive's checksum finds it
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"set.npz: cannot be read"):
        source.load(tmp_path)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"got a single .npy array"):
        ArrayFile("one.npy").load(tmp_path)


@pytest.mark.parametrize("count", [10**13, 10**30, None])
def test_an_array_that_claims_more_than_there_is_takes_no_memory(count: int | None, tmp_path):
    header = io.BytesIO(b"no array")
    if count is not None:
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as file:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            file.writestr(f"{name}.npy", header.getvalue())
    with pytest.raises(DataError, match=r"set.npz: cannot be read as an .npz of plain arrays"):
        ArrayFile("set.npz").load(tmp_path)


def test_with_clients_attaches_ids_of_the_right_length(tmp_path):
    np.savez(tmp_path / "ids.npz", train=np.arange(12, dtype=np.int16), test=np.arange(6, dtype=np.int16))
    source = WithClients(saved(tmp_path), "ids.npz")
    data = source.load(tmp_path)
    assert data.client_train is not None and data.client_train.tolist() == list(range(12))
    assert source.name == "set.npz+ids.npz"
    with pytest.raises(DataError, match=r"'train' to hold one .* each of the 1438 samples of Digits, got int16"):
        WithClients(Digits(), "ids.npz").load(tmp_path)


def test_standardize_centres_each_channel_of_images_only(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (12, 3, 5, 6), dtype=np.uint8)
    x[:, 2] = 7
    y = np.arange(12) % 3
    arrays = build_arrays(x, y, x[:4], y[:4], source="test")
    scaled = standardize(arrays)
    torch.testing.assert_close(scaled.x_train.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(scaled.x_train.std((0, 2, 3), correction=0), torch.tensor([1.0, 1, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(scaled.x_test, scaled.x_train[:4])
    assert arrays.x_train.max() <= 1  # the input is not written
    features = build_arrays(np.ones((12, 3)), y, np.ones((4, 3)), y[:4], source="test")
    assert standardize(features) is features


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Torchvision("CIFAR"), "did you mean CIFAR10 or CIFAR100"),
        (Torchvision("mnist"), "did you mean .*MNIST"),
        (Torchvision("nowhere.Data"), "needs the module nowhere"),
        (Torchvision("FakeData"), "cannot be split into train and test"),
        (Torchvision("MNIST", options={"fold": 1}), "options: MNIST does not take fold here"),
        (Torchvision("MNIST", options={"train": False}), "does not take train"),
        (Torchvision("EMNIST"), "options: EMNIST cannot be created with options {}.*'split'"),
    ],
)
def test_torchvision_refuses_wrong_names_and_options(source, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        source.load(tmp_path)


class ByTrain:
    """Looks like CIFAR10: arrays with the channel last."""

    classes = ("a", "b", "c")

    def __init__(self, root, train=True, download=False, shift=0):
        self.data = np.full((4 if train else 2, 5, 6, 3), 51, np.uint8)
        self.targets = [(i + shift) % 3 for i in range(len(self.data))]


class BySplit:
    """Looks like SVHN: a split argument; no arrays, so it must be iterated."""

    def __init__(self, root, split="train"):
        self.samples = {"train": 4, "test": 2}[split]

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        return np.full((5, 6), 51, np.uint8), index % 2


class Fetched(ByTrain):
    """Has its files only after a download, and says what was tried."""

    tried: list[bool] = []  # noqa: RUF012

    def __init__(self, root, train=True, download=False):
        self.tried.append(download)
        if not (download and root.endswith("online")):
            raise RuntimeError("Dataset not found")
        super().__init__(root, train)


@pytest.mark.parametrize(("kind", "channels", "classes"), [(ByTrain, 3, 3), (BySplit, 1, 2)])
def test_any_class_of_either_signature(kind, channels, classes, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.Mine", kind, raising=False)
    data = Torchvision("torchvision.datasets.Mine").load(tmp_path)
    assert data.x_train.shape == (4, channels, 5, 6)
    assert len(data.y_test) == 2
    assert data.num_classes == classes
    torch.testing.assert_close(data.x_test, torch.full_like(data.x_test, 0.2))


def test_options_reach_the_class_and_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.Mine", ByTrain, raising=False)
    source = Torchvision("Mine", options={"shift": 1})
    assert source.load(tmp_path).y_train.tolist() == [1, 2, 0, 1]
    assert source.name == "Mine(shift=1)"


@pytest.mark.parametrize(("download", "folder", "tried"), [(True, "offline", [False, True]), (False, "online", [False])])
def test_absent_files_name_the_way_out(download, folder, tried, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.Mine", Fetched, raising=False)
    monkeypatch.setattr(Fetched, "tried", [])
    with pytest.raises(DataError, match=r"Mine: no usable files .*--data.root.*FEDLIGHT_DATA"):
        Torchvision("Mine", download).prepare(tmp_path / folder)
    assert Fetched.tried == tried


def test_absent_files_are_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.Mine", Fetched, raising=False)
    assert len(Torchvision("Mine").load(tmp_path / "online").y_train) == 4


def test_mnist_from_files_alone(real_data, monkeypatch):
    def refuse(self):
        raise AssertionError("tried to download")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", refuse)
    source = WithClients(Torchvision("MNIST"), "mnist_writers.npz")
    source.prepare(real_data)
    data = source.load(real_data)
    assert data.x_train.shape == (60_000, 1, 28, 28)
    assert data.num_classes == 10
    assert data.client_train is not None and len(np.unique(data.client_train)) == 539
    assert data.client_test is not None and not set(data.client_test) & set(data.client_train)
    assert standardize(data).x_train.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_resized_images_stand_in_for_others_of_that_shape(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
    saved(tmp_path, x_train=colours, x_test=colours[:6])
    grey = Resized(ArrayFile("set.npz"), size=8).load(tmp_path)
    assert grey.x_train.shape == (12, 1, 8, 8)
    np.testing.assert_allclose(grey.x_train[:, 0].numpy(), colours.mean(1) / 255, atol=1e-6)
    small = Resized(ArrayFile("set.npz"), size=4, channels=3).load(tmp_path)
    assert small.x_train.shape == (12, 3, 4, 4)
    assert small.x_test.is_contiguous()
    torch.testing.assert_close(small.x_train.mean((2, 3)), torch.from_numpy(colours / 255).float().mean((2, 3)), atol=0.05, rtol=0)
    threefold = Resized(Resized(ArrayFile("set.npz"), size=8), size=8, channels=3).load(tmp_path)
    assert torch.equal(threefold.x_train[:, 2], grey.x_train[:, 0])
    with pytest.raises(ConfigurationError, match="channels"):
        Resized(ArrayFile("set.npz"), size=8, channels=2)
    saved(tmp_path, x_train=np.zeros((12, 5)), x_test=np.zeros((6, 5)))
    with pytest.raises(DataError, match="expected images"):
        Resized(ArrayFile("set.npz"), size=8).load(tmp_path)


def test_random_fields_are_images_whose_amplitudes_fall_with_frequency(tmp_path):
    data = RandomFields(16, channels=3, num_classes=5, samples=200, power=1.0).load(tmp_path)
    assert data.x_train.shape == (200, 3, 16, 16)
    assert data.x_test.shape == (20, 3, 16, 16)
    assert torch.equal(torch.bincount(data.y_train), torch.full((5,), 40))
    assert abs(float(data.x_train.mean())) < 1e-5
    assert abs(float(data.x_train.std()) - 1) < 1e-5
    energy = torch.fft.fft2(data.x_train).abs().square().mean((0, 1))
    assert float(energy[0, 1] / energy[0, 4]) == pytest.approx(16, rel=0.3)
    assert float(energy[3, 0] / energy[0, 3]) == pytest.approx(1, rel=0.3)
    assert torch.equal(RandomFields(16, 3, 5, 200).load(tmp_path).x_train, data.x_train)
    assert not torch.equal(RandomFields(16, 3, 5, 200, seed=1).load(tmp_path).x_train, data.x_train)
    assert not torch.equal(data.x_train[:20], data.x_test)
    for changes in ({"size": 0}, {"size": 4, "channels": 0}, {"size": 4, "samples": 0}, {"size": 4, "power": -1.0}):
        with pytest.raises(ConfigurationError, match=[*changes][-1]):
            RandomFields(**changes)
