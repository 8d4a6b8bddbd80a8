import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Fixed examples: a run that passed passes again. No deadline: the machine may be shared.
settings.register_profile("fedlight", deadline=None, derandomize=True, database=None, max_examples=40)
settings.register_profile("quick", settings.get_profile("fedlight"), max_examples=12)  # `make test`; all the tests draw all the examples
settings.load_profile("fedlight")


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
