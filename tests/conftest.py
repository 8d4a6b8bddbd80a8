import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Fixed examples: a run that passed passes again. No deadline: the machine may be shared.
settings.register_profile("fedlight", deadline=None, derandomize=True, database=None, max_examples=25)
settings.register_profile("quick", settings.get_profile("fedlight"), max_examples=12)  # `make test`; all the tests draw all the examples
settings.load_profile("fedlight")

# A shell's background job ignores Ctrl-C, and so would every run that a test starts and then stops by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``quick(n)``: `make test` runs n of a test's rows, spread evenly over its table; the others are slow."""
    tables: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("quick"):
            tables.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for rows in tables.values():
        mark = rows[0].get_closest_marker("quick")
        assert mark is not None
        kept = {i * len(rows) // mark.args[0] for i in range(mark.args[0])}
        for i, row in enumerate(rows):
            if i not in kept:
                row.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and one thread gives the same bits on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets: FEDLIGHT_DATA, else shared/data beside the repository."""
    root = Path(os.environ.get("FEDLIGHT_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"real data absent: no folder {root}; set FEDLIGHT_DATA")
    return root
