"""Both feeds, against the order of the batches indexed in NumPy."""

import numpy as np
import pytest

from mnist_flax.data import datasets, feed
from mnist_flax.runtime import devices
from tests.data.test_datasets import config_for


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("name", ["device", "stream"])
def test_blocks_hold_the_batches_of_the_order(digits_data_dir, name, first):
    config = config_for(digits_data_dir, feed=name, batch_size=48, num_epochs=2, train_examples=1_000, seed=3)
    splits = datasets.load(config)
    steps_per_epoch = 20  # 1,000 examples fill 20 batches of 48
    # On one device: there the share of a device, within which `order` counts, is the whole block.
    next_block = feed.make_feed(config, splits, devices.make_mesh(devices.available()[:1]), first)
    step, shapes = first, set()
    while step < 2 * steps_per_epoch:
        block = next_block(step, 6)
        images, labels, order = (np.asarray(array) for array in block[:3])
        shapes.add((images.shape, labels.shape, order.shape))
        assert (images.dtype, labels.dtype, order.dtype) == (np.uint8, np.int32, np.int32)
        assert 0 < block.stop - block.start <= (6 if name == "device" else 16)
        images, labels = images.reshape(-1, 28, 28), labels.reshape(-1)
        for rows in order[block.start : block.stop]:
            chosen = datasets.epoch_order(3, step // steps_per_epoch, 1_000, 48)[step % steps_per_epoch]
            np.testing.assert_array_equal(images[rows], splits.train.images[chosen])
            np.testing.assert_array_equal(labels[rows], splits.train.labels[chosen])
            step += 1
    assert step == 2 * steps_per_epoch
    assert len(shapes) == 1  # so that no block compiles the steps anew
