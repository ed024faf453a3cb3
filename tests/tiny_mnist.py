"""A small stand-in for MNIST's archives: random images in the same form, for tests that prepare often."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

SIZES = {"train": 200, "test": 60}


def contents() -> dict[str, bytes]:
    """The four IDX files, by archive name."""
    from mnist_flax.data import idx

    generator = np.random.default_rng(0)
    files = {}
    for split, names in idx.ARCHIVES.items():
        for name, shape, top in zip(names, [(SIZES[split], 28, 28), (SIZES[split],)], [256, 10], strict=True):
            header = struct.pack(f">I{len(shape)}I", 0x0800 + len(shape), *shape)
            files[name] = header + generator.integers(0, top, shape, np.uint8).tobytes()
    return files


def write(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in contents().items():
        (directory / name).write_bytes(gzip.compress(content))
    return directory


def sums() -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents().items()}


def examples(split: str) -> list[bytes]:
    """The split's examples, sorted: 784 pixels and the label."""
    from mnist_flax.data import idx

    images, labels = (contents()[name] for name in idx.ARCHIVES[split])
    return sorted(images[16 + 784 * i : 800 + 784 * i] + labels[8 + i : 9 + i] for i in range(SIZES[split]))


def install(setattr=setattr) -> None:
    """Makes `mnist` mean these archives, in this process; `setattr` may be pytest's monkeypatch.setattr."""
    from mnist_flax.data import datasets, idx, prepare

    setattr(idx, "SPLIT_SIZES", SIZES)
    setattr(prepare, "CONTENT_SHA256", {"mnist": sums()})
    setattr(datasets, "EXAMPLES_SHA256", {})
