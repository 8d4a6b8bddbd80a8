"""Data sources: one class per kind of source, each with the same checked `Arrays`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlight.core.errors import ConfigurationError, DataError, require
from fedlight.core.random import numpy_generator
from fedlight.data.arrays import Arrays, build_arrays
from fedlight.data.splits import stratified_choice


class DataSource(ABC):
    """A data set that can be loaded into memory.

    Attributes:
        has_loaders: whether evaluation uses loaders of the source's own.
    """

    has_loaders: bool = False

    @property
    def name(self) -> str:
        """Short name for errors, logs and the fingerprint of a run; free of machine-specific paths."""
        return type(self).__name__

    def prepare(self, root: Path) -> None:  # noqa: B027  (most sources have nothing to fetch)
        """Download what `load` needs into ``root``; called by one process per machine before any `load`."""

    def require_files(self, root: Path) -> None:  # noqa: B027  (most sources need none, or fetch them)
        """Raise DataError if a file is missing that `prepare` will not fetch; nothing is read."""

    @abstractmethod
    def load(self, root: Path) -> Arrays:
        """Return the checked data set, from files under ``root``; raises DataError if it cannot be read."""

    def with_labels(self, data: Arrays) -> Arrays:
        """Return the loaded data with labels to split it by; raises ConfigurationError if there are none."""
        return data

    def offers(self, stage: str) -> bool:
        """Return whether the source has loaders of its own for a stage."""
        return False

    def loaders(self, stage: str) -> Any:
        """Return the source's own loaders for a stage (`val`, `test` or `predict`); None to make batches from the arrays."""
        return None


class Digits(DataSource):
    """Scikit-learn's 1,797 handwritten digits as ``[n, 1, 8, 8]`` images in 0..1; needs no files.

    Args:
        test_fraction: Share of the images held out as the test set: stratified, and the same for every seed of a run.
    """

    def __init__(self, test_fraction: float = 0.2) -> None:
        require(0 < test_fraction < 1, f"test_fraction: expected a share between 0 and 1, got {test_fraction}.")
        self.test_fraction = test_fraction

    def load(self, root: Path) -> Arrays:
        """Return the digits; ``root`` is not used."""
        digits = importlib.import_module("sklearn.datasets").load_digits()
        x = (digits.images[:, None] / 16).astype(np.float32)
        y = digits.target.astype(np.int64)
        test = np.zeros(len(y), dtype=bool)
        count = max(1, min(len(y) - 1, round(self.test_fraction * len(y))))
        test[stratified_choice(y, count, numpy_generator("digits", "test"))] = True
        return build_arrays(x[~test], y[~test], x[test], y[test], 10, source=self.name)


class ArrayFile(DataSource):
    """Arrays in an ``.npz`` file: ``x_train, y_train, x_test, y_test`` and optionally ``client_train, client_test``.

    uint8 images are ``[n, h, w]``, ``[n, c, h, w]`` or ``[n, h, w, c]`` (c 1 or 3) and are divided by 255; float
    features of any shape are unchanged. Pickled objects are never loaded.

    Args:
        path: The file, relative to the data root, or absolute.
        num_classes: Number of classes; the largest label plus one if not given.
        more_test: Number of training samples, from the end, to use as test samples, if a file has too few to compare codecs.
    """

    def __init__(self, path: str, num_classes: int | None = None, more_test: int = 0) -> None:
        require(more_test >= 0, f"more_test: expected at least 0, got {more_test}.")
        self.path = path
        self.num_classes = num_classes
        self.more_test = more_test

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return Path(self.path).name

    def require_files(self, root: Path) -> None:
        """Raise DataError if there is no such file."""
        require_npz(root / Path(self.path).expanduser())

    def load(self, root: Path) -> Arrays:
        """Read and check the file; raises DataError if it is missing, corrupt, incomplete or inconsistent."""
        path = root / Path(self.path).expanduser()
        parts = read_npz(path, required=("x_train", "y_train", "x_test", "y_test"), optional=("client_train", "client_test"))
        data = build_arrays(**parts, num_classes=self.num_classes, source=str(path))
        return _move_to_test(data, self.more_test, str(path)) if self.more_test else data


class WithClients(DataSource):
    """Another source with natural client ids attached, read from an ``.npz`` with ``train`` and ``test``: ``[samples]``.

    Args:
        source: The data set.
        path: The file of client ids, relative to the data root, or absolute.
    """

    def __init__(self, source: DataSource, path: str) -> None:
        self.source = source
        self.path = path

    @property
    def name(self) -> str:
        """The source's name and the file of client ids."""
        return f"{self.source.name}+{Path(self.path).name}"

    def prepare(self, root: Path) -> None:
        """Download the wrapped source."""
        self.source.prepare(root)

    def require_files(self, root: Path) -> None:
        """Raise DataError if a file of the wrapped source or that of the ids is missing."""
        self.source.require_files(root)
        require_npz(root / Path(self.path).expanduser())

    def load(self, root: Path) -> Arrays:
        """Load both; raises DataError if the file is unusable or its number of ids differs from the number of samples."""
        path = root / Path(self.path).expanduser()
        ids = read_npz(path, required=("train", "test"))
        data = self.source.load(root)
        for split, samples in (("train", len(data.y_train)), ("test", len(data.y_test))):
            if ids[split].shape != (samples,) or ids[split].dtype.kind not in "iuU":
                raise DataError(
                    f"{path}: expected '{split}' to hold one integer or string client id for each of the {samples} samples of "
                    f"{self.source.name}, got {ids[split].dtype} of shape {ids[split].shape}; is this file for another data set?"
                )
        return replace(data, client_train=ids["train"], client_test=ids["test"])

    def with_labels(self, data: Arrays) -> Arrays:
        """Return what the wrapped source makes of its own data."""
        return self.source.with_labels(data)


class Torchvision(DataSource):
    """A torchvision classification data set, or any class with the same interface.

    It uses files under the data root, and tries a download only if they are missing.

    Args:
        dataset: Name in torchvision.datasets such as MNIST or CIFAR10, or the dotted path of a class.
        download: Whether to download missing files.
        options: Further arguments of the data set's class, for example {split: balanced} for EMNIST.
    """

    def __init__(self, dataset: str = "MNIST", download: bool = True, options: dict[str, Any] | None = None) -> None:
        self.dataset = dataset
        self.download = download
        self.options = dict(options or {})

    @property
    def name(self) -> str:
        """The data set's name, with its options if there are any."""
        options = ",".join(f"{key}={self.options[key]}" for key in sorted(self.options))
        return f"{self.dataset}({options})" if options else self.dataset

    def prepare(self, root: Path) -> None:
        """Download missing files, so that processes started later find them."""
        for train in (True, False):
            self._open(root, train)

    def require_files(self, root: Path) -> None:
        """Raise DataError if files are missing that may not be downloaded."""
        if self.download:
            return
        if not root.is_dir() or not any(root.iterdir()):
            raise self._unusable(root, "there are no files")
        self._open(root, train=True)

    def load(self, root: Path) -> Arrays:
        """Read both splits; raises ConfigurationError for an unknown name or option, DataError if files are unusable."""
        parts: dict[str, Any] = {}
        classes = 0
        for split, train in (("train", True), ("test", False)):
            opened = self._open(root, train)
            try:
                parts[f"x_{split}"], parts[f"y_{split}"] = _read_dataset(opened)
            except Exception as error:  # third-party readers raise any exception; each means unusable data
                raise DataError(f"{self.name}: its {split} samples cannot be used as arrays: {error}") from error
            classes = max(classes, len(getattr(opened, "classes", None) or ()))
        return build_arrays(**parts, num_classes=classes or None, source=self.name)

    def _open(self, root: Path, train: bool) -> Any:
        kind = _find_dataset(self.dataset)
        arguments, can_download = _arguments(kind, self.dataset, self.options, train)
        try:
            return kind(str(root), **arguments)
        except TypeError as error:
            raise ConfigurationError(f"options: {self.dataset} cannot be created with options {self.options}: {error}") from error
        except Exception as absent:  # torchvision raises many types for missing and corrupt files
            reason: Exception = absent
        if self.download and can_download:
            try:
                root.mkdir(parents=True, exist_ok=True)
                return kind(str(root), **arguments, download=True)
            except Exception as failed:
                reason = failed
        raise self._unusable(root, str(reason), self.download and can_download) from reason

    def _unusable(self, root: Path, reason: str, tried: bool = False) -> DataError:
        return DataError(
            f"{self.name}: no usable files under {root}, and {'the download failed' if tried else 'nothing was downloaded'}: {reason}. Put "
            "the files there, point --data.root or the environment variable FEDLIGHT_DATA at the folder that has them, delete a corrupt "
            "copy, or set download to true on a machine with internet."
        )


def require_npz(path: Path) -> None:
    """Raise DataError if there is no such file, naming those that there are."""
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.npz")) if path.parent.is_dir() else []
        found = f"this folder has {', '.join(there)}" if there else "there is no .npz file in this folder"
        raise DataError(
            f"{path}: no such file; {found}. Correct the path, or its folder: --data.root, FEDLIGHT_DATA, or `root` in a node.yaml."
        )


def read_npz(path: Path, required: Sequence[str], optional: Sequence[str] | None = ()) -> dict[str, np.ndarray]:
    """Return the named arrays of an ``.npz`` file, ``optional`` ones if present (None: all); never unpickles.

    Raises:
        DataError: the file is missing, corrupt, holds Python objects or lacks a required array.
    """
    require_npz(path)
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise DataError(f"{path}: expected an .npz archive with {', '.join(required)}, got a single .npy array; use numpy.savez.")
        with file:
            missing = [key for key in required if key not in file.files]
            if missing:
                raise DataError(f"{path}: missing array {', '.join(missing)}; it has {', '.join(file.files) or 'nothing'}.")
            wanted = file.files if optional is None else (*required, *optional)
            found = {key: file[key] for key in wanted if key in file.files}
            require(all(isinstance(array, np.ndarray) for array in found.values()), "a part of it is no array")
            return found
    except DataError:
        raise
    except (OSError, ValueError, EOFError, LookupError, RuntimeError, MemoryError, OverflowError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read as an .npz of plain arrays: {error}. Save it again with numpy.savez, no objects."
        ) from error


def _move_to_test(data: Arrays, count: int, source: str) -> Arrays:
    """Return the data with its last ``count`` training samples at the end of the test set."""
    samples = len(data.y_train)
    require(count < samples, f"more_test: expected fewer than the {samples} training samples of {source}, got {count}.")
    kept = samples - count
    clients = data.client_train, data.client_test
    if clients[0] is not None:
        clients = clients[0][:kept], None if clients[1] is None else np.concatenate([clients[1], clients[0][kept:]])
    return Arrays(
        data.x_train[:kept],
        data.y_train[:kept],
        torch.cat([data.x_test, data.x_train[kept:]]),
        torch.cat([data.y_test, data.y_train[kept:]]),
        data.num_classes,
        *clients,
    )


def _find_dataset(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module or "torchvision.datasets"), attribute, None)
    except ImportError as error:
        raise ConfigurationError(f"dataset: {name} needs the module {module or 'torchvision'}, which fails to import: {error}") from error
    if inspect.isclass(found):
        return found
    names = getattr(importlib.import_module(module or "torchvision.datasets"), "__all__", [])
    close = difflib.get_close_matches(attribute.lower(), [n.lower() for n in names], n=3, cutoff=0.5)
    matches = [n for n in names if n.lower() in close]
    hint = f"; did you mean {' or '.join(matches)}?" if matches else "; see torchvision.datasets for the names."
    raise ConfigurationError(f"dataset: expected a class of torchvision.datasets or a dotted class path, got {name!r}{hint}")


def _arguments(kind: type, name: str, options: dict[str, Any], train: bool) -> tuple[dict[str, Any], bool]:
    """Return the constructor's arguments for a split, and whether it can download."""
    accepted: set[str] = set()
    for base in kind.__mro__:  # EMNIST and QMNIST pass **kwargs on to MNIST
        parameters = inspect.signature(vars(base)["__init__"]).parameters if "__init__" in vars(base) else {}
        accepted |= set(parameters)
        if parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    own = accepted - {"self", "root", "train", "download", "args", "kwargs"}
    unknown = sorted(set(options) - own)
    require(not unknown, f"options: {name} does not take {', '.join(unknown)} here; it takes {', '.join(sorted(own))}.")
    if "train" in accepted:
        return {**options, "train": train}, "download" in accepted
    if "split" in accepted and "split" not in options:
        return {**options, "split": "train" if train else "test"}, "download" in accepted
    raise ConfigurationError(
        f"dataset: {name} cannot be split into train and test by train= or split= (options: {options}); use ArrayFile instead."
    )


def _read_dataset(dataset: Any) -> tuple[Any, Any]:
    data = getattr(dataset, "data", None)
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    untouched = getattr(dataset, "transform", None) is None and getattr(dataset, "target_transform", None) is None
    if untouched and data is not None and labels is not None and np.ndim(labels) == 1 and len(data) == len(labels):
        return data, labels
    images, targets = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return np.stack([np.asarray(image) for image in images]), np.asarray([int(target) for target in targets])
