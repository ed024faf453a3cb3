"""Adam on the small digits: a study to start from, in about a minute.

python -m experiments.study --config=configs/studies/adam.py --trials=64
"""

from ml_collections import ConfigDict

from mnist_flax.configs import digits
from mnist_flax.experiments.research import space


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.num_epochs = 5
    config.model.channels = (8, 16)
    config.model.dense = (32,)
    return config


def search_space() -> dict[str, space.Dimension]:
    return {
        "optimizer.learning_rate": space.log_uniform(1e-4, 1e-1),
        "optimizer.b1": space.uniform(0.5, 0.99),
        "optimizer.schedule": space.choice("cosine", "one_cycle", "constant"),
        "optimizer.warmup_epochs": space.uniform(0.1, 3.0).when("optimizer.schedule", "cosine", "one_cycle"),
        "model.dropout_rate": space.uniform(0.0, 0.6),
    }


def plan() -> space.Plan:
    return space.Plan(
        question="Which learning rate does Adam want on small digits, and does its momentum matter?",
        scientific=("optimizer.learning_rate", "optimizer.b1"),
        objective="validation_loss",
    )
