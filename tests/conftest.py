import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Half of the tests' time would go into optimizing programs that run once; `XLA_FLAGS= pytest` tests optimized ones.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

ROOT = Path(__file__).resolve().parent.parent
MEMORY_MB = {"module": 700, "test": 1400}


@pytest.fixture(scope="module", autouse=True)
def memory_after_a_module() -> Iterator[None]:
    yield
    let_go("module")


@pytest.fixture(autouse=True)
def memory_after_a_test() -> Iterator[None]:
    yield
    let_go("test")


def let_go(after: str) -> None:
    """Lets go of what was compiled, most of which is of no use any more, if a test process has grown large."""
    if resident_mb() > MEMORY_MB[after]:
        import jax

        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.fixture(scope="session")
def mnist_archives() -> Path:
    """The four original MNIST archives, or a skip; MNIST_ARCHIVES, or shared/data/mnist beside the repo."""
    directory = Path(os.environ.get("MNIST_ARCHIVES", ROOT.parent / "shared" / "data" / "mnist"))
    if not (directory / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("real MNIST archives are not at hand: set MNIST_ARCHIVES to their directory")
    return directory


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory) -> Path:
    """A directory of this session that all test processes have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def mnist_data_dir(request, shared_directory) -> Path:
    """A data_dir with the real MNIST prepared: MNIST_DATA_DIR, else prepared once for all test processes."""
    from mnist_flax.data.prepare import prepare

    if given := os.environ.get("MNIST_DATA_DIR"):
        prepare("mnist", given, str(request.getfixturevalue("mnist_archives")))
        return Path(given)
    directory = shared_directory / "mnist_data"
    prepare("mnist", str(directory), str(request.getfixturevalue("mnist_archives")))
    return directory


@pytest.fixture(scope="session")
def digits_data_dir(shared_directory) -> Path:
    """A data_dir with `digits` prepared and decoded, once for all test processes."""
    from mnist_flax.data import datasets
    from mnist_flax.runtime.config import default_config

    directory = shared_directory / "digits_data"
    config = default_config()
    config.dataset, config.data_dir = "digits", str(directory)
    datasets.load(config)
    return directory


@pytest.fixture(scope="session")
def digits_run(digits_data_dir) -> Path:
    """A finished run on `digits`; see `trained.RECIPES`."""
    from tests import trained

    return trained.train("digits", digits_data_dir.with_name("digits_run"), digits_data_dir)


@pytest.fixture(scope="session")
def digits_ensemble(digits_run, digits_data_dir) -> tuple[Path, list[Path]]:
    """A finished ensemble on `digits` and its members; see `trained.ensemble`."""
    from tests import trained

    return trained.ensemble(digits_run, digits_data_dir)


@pytest.fixture(scope="session")
def mnist_run(mnist_data_dir, shared_directory) -> Path:
    """A finished run on the real MNIST, or a skip; see `trained.RECIPES`."""
    from tests import trained

    return trained.train("mnist", shared_directory / "mnist_run", mnist_data_dir)
