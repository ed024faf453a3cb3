"""Small and offline: 1,797 real handwritten digits that scikit-learn bundles.

    python -m mnist_flax.main --config=configs/digits.py

Test accuracy 99.72 +- 0.28 % (5 seeds; 359 test examples), in about a minute on one CPU core.
"""

from ml_collections import ConfigDict

from mnist_flax.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.dataset = "digits"
    config.num_epochs = 30
    config.batch_size = 32
    config.model.channels = (32, 64)
    config.model.pool_sizes = (2,)
    config.optimizer.ema_decay = 0.99  # an epoch has 41 steps
    config.augment.rotation = 10.0
    config.augment.shift = 1.5
    config.augment.zoom = 0.1
    config.augment.shear = 0.1
    return config
