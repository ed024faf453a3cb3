"""Time to 99.4 %: the network of configs/speedrun.py, its last layer wider, four epochs with augmentation.

python -m mnist_flax.main --config=configs/speedrun_994.py
"""

from ml_collections import ConfigDict

from mnist_flax.configs import speedrun


def get_config() -> ConfigDict:
    config = speedrun.get_config()  # chosen likewise: a mean of 99.4 % on 10,000 held out
    config.model.channels = (24, 32, 96)
    config.augment.rotation = 8.0
    config.augment.shift = 1.5
    config.augment.zoom = 0.1
    config.augment.shear = 0.1
    config.num_epochs = 4
    return config
