import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnist_flax.configs import classic
from mnist_flax.data import datasets
from mnist_flax.experiments.benchmarks import contenders
from mnist_flax.models.cnn import make_model, scale_pixels
from mnist_flax.runtime import config as config_lib
from mnist_flax.training.loss import cross_entropy
from mnist_flax.training.state import hyperparameters, init_state


@given(batch_size=st.integers(1, 50), examples=st.integers(50, 200), step=st.integers(0, 500), steps=st.integers(1, 40))
def test_rows_are_the_batches_of_the_projects_own_runs(batch_size, examples, step, steps):
    nothing = np.zeros((examples, 28, 28), np.uint8)
    rows = contenders.Task("float32", batch_size, nothing, np.zeros(examples, np.int32)).rows(step, steps)
    per_epoch = examples // batch_size
    seed = classic.get_config().seed
    for offset, batch in enumerate(rows):
        epoch, place = divmod(step + offset, per_epoch)
        np.testing.assert_array_equal(batch, datasets.epoch_order(seed, epoch, examples, batch_size)[place])
    assert len(rows) == steps


def test_burst_losses_of_the_project_are_means_over_their_steps():
    """Across epochs, against losses of single steps; the first is that of the untrained network."""
    from mnist_flax.experiments.benchmarks.contenders import project

    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (40, 28, 28), np.uint8), np.arange(40, dtype=np.int32) % 10
    task = contenders.Task("float32", 8, images, labels)
    singly = project.make(task)
    losses = [singly(1) for _ in range(16)]  # three epochs of five steps and one
    assert project.make(task)(16) == pytest.approx(np.mean(losses), rel=1e-4)
    config = classic.get_config()
    config.model.compute_dtype = "float32"
    variables = init_state(config, 10, config.seed).variables()
    model = make_model(config.model, hyperparameters(config), 10)
    rows = task.rows(0, 1)[0]
    first = cross_entropy(model.apply(variables, scale_pixels(images[rows])), labels[rows]).mean()
    assert losses[0] == pytest.approx(float(first), rel=1e-4)


def test_network_of_the_comparison_is_the_recipes():
    config = classic.get_config()
    config_lib.check_config(config)
    assert config.optimizer.learning_rate == contenders.LEARNING_RATE
    import jax

    shapes = jax.eval_shape(lambda: init_state(config, 10, 0)).params
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 320 + 18_496 + 803_072 + 2_570


def test_work_of_an_image_is_what_xla_counts():
    """Forward and backward of plain convolutions, as XLA's own cost analysis sees them."""
    import jax
    import jax.numpy as jnp

    from mnist_flax.experiments.benchmarks.contenders.plain_flax import CNN

    model, batch = CNN("float32"), 4
    images = jnp.ones((batch, 28, 28, 1))
    params = model.init(jax.random.key(0), images)
    gradient = jax.jit(jax.grad(lambda params: model.apply(params, images).sum()))
    counted = gradient.lower(params).cost_analysis()["flops"] / batch
    assert pytest.approx(counted, rel=0.1) == contenders.FLOPS_PER_IMAGE  # XLA counts padding, ReLU and pooling too
