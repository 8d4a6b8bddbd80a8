from pathlib import Path

import pytest


@pytest.fixture
def real_data(data_root: Path) -> Path:
    """The folder of real data sets, where MNIST is among them."""
    if not (data_root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        pytest.skip(f"real data absent: no MNIST/raw under {data_root}; set FEDLIGHT_DATA")
    return data_root
