"""How does the best learning rate move with the batch size, when every run sees the same examples?

    python -m experiments.study --config=configs/studies/batch_size.py

Scientific: batch size. Nuisance: learning rate, a grid of three a decade. Fixed: Adam, one pass over 20,000 examples of
MNIST, cosine with a tenth of it as warm-up, a small network without regularisation; two seeds.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from mnist_flax.configs import default
from mnist_flax.experiments.research import space


def get_config() -> ConfigDict:
    config = default.get_config()
    config.train_examples = 20_000
    config.num_epochs = 1
    config.model.channels = (8, 16)
    config.model.pool_sizes = (2,)
    config.model.dense = (32,)
    config.model.dropout_rate = 0.0
    config.model.compute_dtype = "float32"
    config.optimizer.warmup_epochs = 0.1
    config.optimizer.ema_decay = 0.0
    config.augment.rotation = config.augment.shift = config.augment.zoom = config.augment.shear = 0.0
    return config


def sweep() -> Iterator[dict]:
    return space.product(
        {
            "batch_size": [32, 64, 128, 256, 512, 1024],
            "seed": [0, 1],
            "optimizer.learning_rate": [float(f"{10 ** (k / 3):.3g}") for k in range(-11, -3)],  # 2.15e-4 to 0.0464
        }
    )


def plan() -> space.Plan:
    return space.Plan(
        question="How does the best learning rate of Adam move with the batch size, at equal examples seen?",
        scientific=("batch_size",),
        objective="validation_error",
        evaluations=2,
    )
