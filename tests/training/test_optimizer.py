import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_flax.runtime.config import default_config
from mnist_flax.training.optimizer import make_optimizer, make_schedule, update_ema
from mnist_flax.training.state import hyperparameters

STEPS, EPOCHS = 50, 6
TOTAL = STEPS * EPOCHS


def schedule(name, **values):
    hyper = hyperparameters(default_config()) | {f"optimizer.{key}": value for key, value in values.items()}
    hyper["num_epochs"] = EPOCHS
    return np.asarray(jax.vmap(make_schedule(name, hyper, STEPS))(jnp.arange(TOTAL)))


@given(peak=st.floats(1e-5, 1.0), warmup=st.sampled_from([0.0, 0.5, 1.0, 3.0]), final=st.floats(0.0, 0.5))
@settings(max_examples=30, deadline=None)
def test_schedules_are_those_of_optax(peak, warmup, final):
    steps = int(warmup * STEPS)
    mine = schedule("cosine", learning_rate=peak, warmup_epochs=warmup, final_scale=final)
    falling = optax.cosine_decay_schedule(peak, TOTAL - steps, final)
    rising = optax.linear_schedule(peak / max(steps, 1), peak, max(steps - 1, 1))
    theirs = optax.join_schedules([rising, falling], [steps]) if steps else falling
    np.testing.assert_allclose(mine, jax.vmap(theirs)(jnp.arange(TOTAL)), rtol=2e-4, atol=1e-8)

    if steps and final:
        mine = schedule("one_cycle", learning_rate=peak, warmup_epochs=warmup, final_scale=final)
        theirs = optax.cosine_onecycle_schedule(TOTAL, peak, steps / TOTAL, 25, 1 / (25 * final))
        np.testing.assert_allclose(mine, jax.vmap(theirs)(jnp.arange(TOTAL)), rtol=2e-3, atol=1e-7)


def test_constant_schedule_rises_then_stays():
    values = schedule("constant", learning_rate=0.5, warmup_epochs=2.0)
    np.testing.assert_allclose(values[: 2 * STEPS], 0.5 * np.arange(1, 2 * STEPS + 1) / (2 * STEPS), rtol=1e-5)
    np.testing.assert_allclose(values[2 * STEPS :], 0.5)
    for warmup in (0.0, 0.5 / STEPS, 1 / STEPS):  # no step, less than one, one
        np.testing.assert_allclose(schedule("constant", learning_rate=0.5, warmup_epochs=warmup), 0.5)


@pytest.mark.parametrize("name", ["constant", "cosine", "one_cycle"])
def test_an_optimizer_that_estimates_its_step_size_survives_the_warmup(name):
    """Prodigy (Mishchenko and Defazio 2024) divides by what the learning rates so far add up to."""
    hyper = hyperparameters(default_config()) | {"optimizer.learning_rate": 1.0, "optimizer.warmup_epochs": 1.0}
    optimizer = optax.contrib.prodigy(make_schedule(name, hyper, STEPS))
    params = jnp.ones(3)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(2 * params, state, params)
        params = optax.apply_updates(params, updates)
    assert np.isfinite(params).all()


def orthogonalized(m, key, gradient, momentum, t):
    """Muon's update of a matrix: Nesterov momentum, bias-corrected, through five Newton-Schulz iterations."""
    m[key] = momentum * m[key] + (1 - momentum) * gradient
    x = momentum * m[key] / (1 - momentum ** (t + 1)) + (1 - momentum) * gradient / (1 - momentum**t)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def reference(name, params, grads, config, steps):
    """The update rules as their papers write them, in float64 NumPy; a kernel decays and a bias does not."""
    o = config.optimizer
    params = {key: value.astype(np.float64) for key, value in params.items()}
    m = {key: np.zeros_like(value) for key, value in params.items()}
    v = {key: np.zeros_like(value) for key, value in params.items()}
    for t in range(1, steps + 1):
        norm = np.sqrt(sum(np.square(grads[key].astype(np.float64)).sum() for key in params))
        for key in params:
            g = grads[key].astype(np.float64) * min(1, o.clip_norm / norm)
            decay = o.weight_decay if params[key].ndim > 1 else 0.0
            if name in ("adam", "sgd"):
                g = g + decay * params[key]
            if name in ("adam", "adamw") or (name == "muon" and params[key].ndim == 1):
                m[key] = o.b1 * m[key] + (1 - o.b1) * g
                v[key] = o.b2 * v[key] + (1 - o.b2) * g**2
                update = (m[key] / (1 - o.b1**t)) / (np.sqrt(v[key] / (1 - o.b2**t)) + o.eps)
            elif name == "muon" and params[key].ndim > 1:
                update = 0.2 * np.sqrt(max(g.shape)) * orthogonalized(m, key, g, o.momentum, t)
            elif name == "sgd":
                m[key] = o.momentum * m[key] + g
                update = g + o.momentum * m[key] if o.nesterov else m[key]
            else:
                update = np.sign(o.b1 * m[key] + (1 - o.b1) * g)
                m[key] = o.b2 * m[key] + (1 - o.b2) * g
            if name in ("adamw", "lion", "muon"):
                update = update + decay * params[key]
            params[key] = params[key] - 0.01 * update
    return params


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lion", "muon"])
def test_updates_are_those_of_the_papers(name):
    config = default_config()
    config.optimizer.name = name
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 0.7
    random = np.random.default_rng(0)
    params = {"kernel": random.normal(size=(5, 4)), "bias": random.normal(size=4)}
    grads = {"kernel": random.normal(size=(5, 4)), "bias": random.normal(size=4)}
    params, grads = (jax.tree.map(lambda x: x.astype(np.float32), tree) for tree in (params, grads))

    @jax.jit  # hyperparameters traced, as in training
    def step(params, state, hyper):
        optimizer = make_optimizer(config, hyper, lambda count: 0.01)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    hyper = hyperparameters(config)
    state = make_optimizer(config, hyper, lambda count: 0.01).init(params)
    trained = params
    for _ in range(4):
        trained, state = step(trained, state, hyper)
    expected = reference(name, params, grads, config, 4)
    for key in params:
        np.testing.assert_allclose(trained[key], expected[key], rtol=2e-5, atol=1e-6)


def test_ema_is_short_at_first_and_then_has_its_decay():
    values = np.random.default_rng(1).normal(size=200).astype(np.float32)
    average, expected = jnp.float32(0), 0.0
    for t, value in enumerate(values):
        average = update_ema(average, value, 0.9, t)
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * float(value)
    np.testing.assert_allclose(average, expected, rtol=1e-5)
