"""Which optimizer reaches 99 % on validation data in the fewest epochs, each tuned with an equal budget?

    python -m experiments.study --config=configs/studies/optimizers.py --population=8

Scientific: the optimizer. Nuisance: its learning rate, momentum (b1 of Adam, AdamW and Lion) and decoupled weight decay
where it has one, over ranges of its own: 8 quasi-random points each, of which the better half (a population is one
optimizer) is trained for more than one epoch. Fixed: at most two epochs of MNIST, batch 64, cosine to a hundredth with
a tenth of an epoch of warm-up, a small network without other regularisation.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from mnist_flax.configs import default
from mnist_flax.experiments.research import samplers, space

TRIALS = 8  # an optimizer
BETA = {"optimizer.b1": space.uniform(0.7, 0.95)}
MOMENTUM = {"optimizer.momentum": space.uniform(0.8, 0.97)}
DECAY = {"optimizer.weight_decay": space.log_uniform(1e-3, 0.3)}
SPACES = {
    "adam": {"optimizer.learning_rate": space.log_uniform(3e-4, 3e-2), **BETA},
    "adamw": {"optimizer.learning_rate": space.log_uniform(3e-4, 3e-2), **BETA, **DECAY},
    "sgd": {"optimizer.learning_rate": space.log_uniform(1e-2, 1.0), **MOMENTUM},
    "lion": {"optimizer.learning_rate": space.log_uniform(5e-5, 5e-3), **BETA, **DECAY},
    "muon": {"optimizer.learning_rate": space.log_uniform(3e-4, 3e-2), **MOMENTUM, **DECAY},
}


def get_config() -> ConfigDict:
    config = default.get_config()
    config.num_epochs = 2
    config.batch_size = 64
    config.model.channels = (16, 32)
    config.model.pool_sizes = (2,)
    config.model.dense = (64,)
    config.model.dropout_rate = 0.0
    config.model.compute_dtype = "float32"
    config.optimizer.warmup_epochs = 0.1
    config.optimizer.ema_decay = 0.0
    config.augment.rotation = config.augment.shift = config.augment.zoom = config.augment.shear = 0.0
    return config


def sweep() -> Iterator[dict]:
    for name, ranges in SPACES.items():
        for point in samplers.points(ranges, TRIALS, seed=0):
            yield {"optimizer.name": name, **point}


def plan() -> space.Plan:
    return space.Plan(
        question="Which optimizer reaches 99 % validation accuracy in the fewest epochs, at equal tuning budget?",
        scientific=("optimizer.name",),
        objective="epochs_to_target",
        target=0.99,
        evaluations=8,
        rounds=2,
    )
