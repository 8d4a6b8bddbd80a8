import os
from pathlib import Path

import pytest


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets: FEDLIGHT_DATA, else shared/data beside the repository."""
    root = Path(os.environ.get("FEDLIGHT_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        pytest.skip(f"real data absent: no MNIST/raw under {root}; set FEDLIGHT_DATA")
    return root
