"""Small and offline: 1,797 real handwritten digits that scikit-learn bundles.

python -m mnist_flax.main --config=configs/digits.py
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.dataset = "digits"
    config.num_epochs = 30
    config.batch_size = 32
    return config
