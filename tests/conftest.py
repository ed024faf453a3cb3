import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def mnist_archives() -> Path:
    """The four original archives, or a skip: MNIST_ARCHIVES says where, else shared/data/mnist beside the repo."""
    directory = Path(os.environ.get("MNIST_ARCHIVES", ROOT.parent / "shared" / "data" / "mnist"))
    if not (directory / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("real MNIST archives are not at hand: set MNIST_ARCHIVES to their directory")
    return directory


@pytest.fixture(scope="session")
def digits_data_dir(tmp_path_factory) -> Path:
    """A data_dir in which `digits` is prepared."""
    from mnist_flax import prepare

    directory = tmp_path_factory.mktemp("digits")
    prepare.prepare("digits", str(directory))
    return directory
