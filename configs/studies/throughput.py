"""Short trials that differ in their learning rate, for `experiments.bench_population` to time.

python -m experiments.study --config=configs/studies/throughput.py --trials=8
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from mnist_flax.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.train_examples = 10_000
    config.num_epochs = 1
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
    for k in range(64):  # 0.0005 to 0.01, the good range
        yield {"optimizer.learning_rate": float(f"{5e-4 * 20 ** ((k * 0.6180339887) % 1):.3g}")}
