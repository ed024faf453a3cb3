"""The peer of `configs/speedrun.py`: train_mnist_fast's recipe in PyTorch, from process start to test accuracy.

    pip install -e '.[peers]'
    python -m experiments.speedrun_peer [SEED]

One epoch of all 60,000 images: convolutions 5-24 and 3-32, each with ReLU and 2x2 max pooling, dense 256; batches of
256; Adam (0.7, 0.9) under one cycle to 0.01; channels-last, fused optimizer, bfloat16 by autocast; glibc told to keep
freed memory (see `contenders/__init__.py`).
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import os
import sys
import time

from mnist_flax.data import prepare
from mnist_flax.experiments.benchmarks.contenders import TORCH_ENVIRONMENT
from mnist_flax.experiments.research import extra
from mnist_flax.runtime import cli


def train(seed: int) -> None:
    import torch
    from torch import nn
    from torch.nn import functional as F

    from mnist_flax.data import datasets
    from mnist_flax.runtime.config import default_config

    config = default_config()
    config.validation_examples = 0
    splits = datasets.load(config)
    images, test_images = (torch.from_numpy(split.images)[:, None] for split in (splits.train, splits.test))
    labels, test_labels = (torch.from_numpy(split.labels).long() for split in (splits.train, splits.test))
    torch.manual_seed(seed)
    layers = (
        *(nn.Conv2d(1, 24, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(24, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 256), nn.ReLU(), nn.Linear(256, 10)),
    )
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.7, 0.9), fused=True)
    batches = torch.randperm(len(labels))[: len(labels) // 256 * 256].reshape(-1, 256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=len(batches), cycle_momentum=False)

    def logits(pixels):
        with torch.autocast("cpu", torch.bfloat16):
            return model(pixels.to(torch.float32, memory_format=torch.channels_last).div_(255)).float()

    begun = time.perf_counter()
    for rows in batches:
        optimizer.zero_grad()
        F.cross_entropy(logits(images[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    trained = time.perf_counter() - begun
    with torch.no_grad():
        guesses = torch.cat([logits(pixels).argmax(1) for pixels in test_images.split(1000)])
    accuracy = (guesses == test_labels).double().mean().item()
    print(
        f"test accuracy {accuracy:.2%}, {trained:.2f} s of training, {time.perf_counter() - cli.STARTED:.2f} s in all",
        flush=True,
    )


def main(argv: list[str]) -> None:
    seed = argv[1] if len(argv) > 1 else "0"
    if len(argv) > 2 or not seed.isdecimal() or len(seed) > 18:
        raise cli.UserError(f"{' '.join(argv[1:])!r} is no seed: name one whole number, of at most 18 digits")
    extra.require("torch")
    if not prepare.is_prepared("mnist"):  # or that would be timed too
        raise cli.UserError("MNIST is not prepared: run python -m mnist_flax.main once, or set TFDS_DATA_DIR")
    if not TORCH_ENVIRONMENT.items() <= os.environ.items():  # glibc reads them when a process starts
        command = [sys.executable, "-m", "mnist_flax.experiments.speedrun_peer", seed]
        os.execve(sys.executable, command, os.environ | TORCH_ENVIRONMENT)
    train(int(seed))


if __name__ == "__main__":
    cli.run(main)
