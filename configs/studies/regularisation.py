"""Which regularisation helps, with how many training examples, at an equal number of steps?

    python -m experiments.study --config=configs/studies/regularisation.py

Scientific: number of training examples, and one kind of regularisation at a time, weak or strong: dropout (on the dense
layer), decoupled weight decay, augmentation (rotation, with shift, zoom and shear in proportion), label smoothing; and
all four weak at once. Fixed: AdamW at a learning rate of 0.002, about 800 steps of 64 examples, cosine; two seeds.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from mnist_flax.configs import default
from mnist_flax.experiments.research import space

STEPS = 800
KINDS = {
    "model.dropout_rate": (0.3, 0.6),
    "optimizer.weight_decay": (0.03, 0.3),
    "augment.rotation": (7.5, 15.0),
    "optimizer.label_smoothing": (0.05, 0.15),
}


def get_config() -> ConfigDict:
    config = default.get_config()
    config.batch_size = 64
    config.train_examples = 1_000
    config.model.channels = (8, 16)
    config.model.pool_sizes = (2,)
    config.model.dense = (32,)
    config.model.dropout_rate = 0.0
    config.model.compute_dtype = "float32"
    config.optimizer.name = "adamw"
    config.optimizer.ema_decay = 0.0
    config.augment.rotation = 0.0
    return config


def derive(config: ConfigDict) -> None:
    """Equal steps whatever the number of examples; one strength for all of the augmentation."""
    steps_per_epoch = config.train_examples // config.batch_size
    config.num_epochs = max(1, round(STEPS / steps_per_epoch))
    config.optimizer.warmup_epochs = config.num_epochs / 20
    strength = config.augment.rotation / 15.0
    config.augment.shift, config.augment.zoom, config.augment.shear = 2.0 * strength, 0.15 * strength, 0.2 * strength


def sweep() -> Iterator[dict]:
    off = dict.fromkeys(KINDS, 0.0)
    settings = [off, *({**off, key: value} for key, values in KINDS.items() for value in values)]
    settings.append({key: weak for key, (weak, _) in KINDS.items()})
    for examples in (100, 1_000, 10_000, 55_000):
        for setting in settings:
            for seed in (0, 1):
                yield {"train_examples": examples, **setting, "seed": seed}


def plan() -> space.Plan:
    return space.Plan(
        question="Which regularisation helps with how many training examples, at an equal number of steps?",
        scientific=("train_examples", *KINDS),
        objective="validation_error",
        evaluations=2,
    )
