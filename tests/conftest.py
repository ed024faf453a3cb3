import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def mnist_archives() -> Path:
    """The four original MNIST archives, or a skip: MNIST_ARCHIVES says where, else shared/data/mnist beside the repo."""
    directory = Path(os.environ.get("MNIST_ARCHIVES", ROOT.parent / "shared" / "data" / "mnist"))
    if not (directory / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("real MNIST archives are not at hand: set MNIST_ARCHIVES to their directory")
    return directory
