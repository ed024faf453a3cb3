"""The best accuracy of one network: five convolutions with batch norm, 30 epochs of Muon, much augmentation, averages.

    python -m mnist_flax.main --config=configs/record.py

Test accuracy 99.73 +- 0.04 % (10 seeds), 99.76 +- 0.02 % with `evaluate --views=16`, 98.3 % under corruption (1 seed),
in 20 to 25 minutes a seed on 2 CPU cores (EPYC Zen 5; 71 seconds an epoch on a Zen 4),
18.5 seconds on an H200 (1 seed).

Trained on all 60,000 training examples, nothing chosen on test data: experiments/record says how, and reruns the claim.
"""

from ml_collections import ConfigDict

from mnist_flax.configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.validation_examples = 0

    config.model.channels = (32, 96, 96, 192, 192)
    config.model.kernel_sizes = (5, 3, 3, 3, 3)
    config.model.pool_sizes = (2, 1, 2, 1, 1)
    config.model.batch_norm = True
    config.model.head = "average"
    config.model.dense = ()
    config.model.dropout_rate = 0.0

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "one_cycle"
    config.optimizer.warmup_epochs = 2.0
    config.optimizer.label_smoothing = 0.05

    config.augment.shift = 2.8
    config.augment.filter = 1.0
    config.augment.strokes = 1.0
    config.augment.invert = 1.0
    config.augment.tone = 0.8
    config.augment.clouds = 0.8
    config.augment.specks = 0.4
    config.augment.probability = 0.03
    config.augment.final_epochs = 6.0

    config.num_epochs = 30
    return config
