"""The network that speed is compared on (experiments/benchmark.py): convolutions of 32 and 64, dense 256; plain Adam.

python -m mnist_flax.main --config=configs/classic.py
"""

from ml_collections import ConfigDict

from mnist_flax.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.model.channels = (32, 64)
    config.model.pool_sizes = (2,)
    config.model.dense = (256,)
    config.model.dropout_rate = 0.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.ema_decay = 0.0
    config.augment.rotation = config.augment.shift = config.augment.zoom = config.augment.shear = 0.0
    return config
