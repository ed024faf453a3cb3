"""Photometric augmentation: what each kind does, and how often, seen from outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import random
from sklearn.datasets import load_digits

from mnist_flax.training import photometric as pm

SHAPE = (28, 28)
run = jax.jit(pm.photometric)


def keys_of(n: int, seed: int = 0):
    return random.split(random.key(seed), n)


def always(images, n: int, **strength: float) -> np.ndarray:
    """`n` images, or one `n` times, to each of which the kinds happen."""
    images = jnp.broadcast_to(jnp.asarray(images, jnp.float32), (n, *SHAPE))
    return np.asarray(run(keys_of(n), images, strength, 1.0), np.float64)


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """512 real digits, 24 x 24 in a frame of background."""
    small = load_digits().images[:512] / 16
    return np.pad(small.repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2))).astype(np.float32)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**31 - 1),
    strength=st.fixed_dictionaries(dict.fromkeys(pm.KINDS, st.sampled_from([0.0, 0.3, 1.0]))),
    probability=st.floats(0, 1),
)
def test_images_stay_images(digits, seed, strength, probability):
    images = np.concatenate([digits[:62], np.zeros((1, *SHAPE)), np.ones((1, *SHAPE))]).astype(np.float32)
    got = np.asarray(run(keys_of(64, seed), images, strength, probability))
    assert got.min() >= 0 and got.max() <= 1 + 1e-6  # NaN fails too
    same = not any(strength.values()) or probability == 0
    assert not same or (got == images).all()


@pytest.mark.parametrize("kind", pm.KINDS)
def test_happens_with_its_probability(digits, kind):
    n, probability = 4_000, 0.3
    images = digits[np.arange(n) % len(digits)]
    chosen = run(keys_of(n), images, {kind: 1.0}, probability)
    everywhere = run(keys_of(n), images, {kind: 1.0}, 1.0)
    happened = np.asarray((chosen != images).any((1, 2)))
    # Some draws change nothing, such as four lines none of which is drawn.
    effective = np.asarray((everywhere != images).any((1, 2)))
    assert scipy.stats.binomtest(int(happened.sum()), int(effective.sum()), probability).pvalue > 1e-3
    # An example that is changed is changed in the same way, however often others are.
    np.testing.assert_allclose(chosen[happened], everywhere[happened], atol=1e-6)


def test_kinds_are_independent_and_in_order(digits):
    """Several kinds are each of them alone, one after another."""
    strength = {"tone": 0.5, "specks": 0.3, "filter": 0.8}
    keys = keys_of(512)
    one_by_one = digits
    for kind in ("filter", "tone", "specks"):
        one_by_one = run(keys, one_by_one, {kind: strength[kind]}, 0.5)
    together = np.asarray(run(keys, digits, strength, 0.5))
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)
    alone = [np.asarray(run(keys, digits, {kind: 1.0}, 0.5) != digits).any((1, 2)) for kind in ("tone", "specks")]
    assert abs(np.corrcoef(alone)[0, 1]) < 4 / np.sqrt(512)


def test_tone_is_a_line_through_grey_levels():
    ramp = np.linspace(0, 1, 784).reshape(SHAPE)
    got = always(ramp, 3_000, tone=0.6).reshape(-1, 784)
    black, white = got[:, 0], got[:, -1]
    np.testing.assert_allclose(got, black[:, None] + (white - black)[:, None] * ramp.ravel(), atol=1e-5)
    assert scipy.stats.kstest(black, scipy.stats.uniform(0, 0.6).cdf).pvalue > 1e-3
    loss = 1 - (white - black) / (1 - black)
    assert scipy.stats.kstest(loss, scipy.stats.uniform(0, 0.6).cdf).pvalue > 1e-3


def test_inverts_a_rectangle_or_all_around_it():
    image = np.linspace(0.05, 0.45, 784).reshape(SHAPE)  # no level is its own inverse
    got = always(image, 2_000, invert=1.0)
    amounts = (got - image) / (1 - 2 * image)
    amounts = amounts[amounts.max((1, 2)) > 0.01]  # which tells rounding from being inverted
    most = amounts.max((1, 2))
    inverted = amounts > most[:, None, None] / 2
    np.testing.assert_allclose(amounts, inverted * most[:, None, None], atol=1e-5)

    def is_rectangle(mask):
        return (mask == (mask.any(1)[:, None] & mask.any(0))).all()

    inside, around = (np.array([is_rectangle(m) for m in masks]) for masks in (inverted, ~inverted))
    assert (inside | around).all()
    assert 0.3 < inside[~(inside & around)].mean() < 0.7
    assert most.min() < 0.1 and most.max() > 0.9


def test_clouds_are_a_mixture_with_a_field_from_0_to_1():
    n = 2_000
    on_black, on_white = (always(np.full(SHAPE, grey), n, clouds=0.8) for grey in (0.0, 1.0))
    kept = on_white - on_black
    share = 1 - kept[:, 0, 0]
    np.testing.assert_allclose(kept, (1 - share)[:, None, None] * np.ones(SHAPE), atol=1e-5)
    assert scipy.stats.kstest(share, scipy.stats.uniform(0, 0.8).cdf).pvalue > 1e-3
    clear = share > 0.1
    field = on_black[clear] / share[clear, None, None]
    np.testing.assert_allclose(field.min((1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(field.max((1, 2)), 1, atol=1e-4)
    # From noise to one slope over the image: how alike neighbours are.
    field -= field.mean((1, 2), keepdims=True)
    alike = (field[:, 1:] * field[:, :-1]).mean((1, 2)) / (field**2).mean((1, 2))
    assert np.quantile(alike, 0.1) < 0.6 and np.quantile(alike, 0.9) > 0.95


def test_specks_are_any_grey_in_a_share_of_the_pixels():
    got = always(np.full(SHAPE, -1.0), 2_000, specks=0.4)
    changed = got != -1
    share = changed.mean((1, 2))
    assert scipy.stats.kstest(share, scipy.stats.uniform(0, 0.4).cdf).pvalue > 1e-6  # in steps of a 784th
    levels = np.bincount(np.rint(255 * got[changed]).astype(int), minlength=256)
    assert scipy.stats.chisquare(levels).pvalue > 1e-3
    assert scipy.stats.chisquare(changed.sum(0).ravel()).pvalue > 1e-3


@settings(deadline=None)
@given(seed=st.integers(0, 2**31 - 1), side=st.sampled_from([1, 3, 5]))
def test_filter_is_scipys(seed, side):
    random_numbers = np.random.default_rng(seed)
    image, weights = random_numbers.random((13, 21)), random_numbers.normal(size=(side, side))
    want = scipy.ndimage.correlate(image, weights, mode="constant")
    got = pm.correlate(jnp.asarray(image, jnp.float32), jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_filter_mixes_its_answer_with_the_image():
    """A bright point becomes as wide as the filter; the inside of a plane stays in some answers, and not in others."""
    point = np.zeros(SHAPE)
    point[10, 12] = 1
    got = always(point, 500, filter=1.0)
    near = np.zeros(SHAPE, bool)
    near[8:13, 10:15] = True
    assert (got[:, ~near] == 0).all()
    assert (got[:, near] > 0).mean() > 0.95
    plane = always(np.ones(SHAPE), 2_000, filter=1.0)
    middle = plane[:, 14, 14]
    assert (middle < 0.3).any() and (middle > 0.99).any()


@settings(deadline=None)
@given(ends=st.lists(st.floats(-3, 31), min_size=4, max_size=4), width=st.floats(0.5, 4))
def test_line_covers_what_is_near_it(ends, width):
    ends = np.reshape(ends, (2, 2))
    got = np.asarray(pm.line(jnp.asarray(ends, jnp.float32), width, SHAPE))
    fine = np.mgrid[:280, :280] / 10 - 0.45  # ten points a pixel each way
    start, way = ends[0][:, None, None], (ends[1] - ends[0])[:, None, None]
    along = np.clip(((fine - start) * way).sum(0) / max((way**2).sum(), 1e-9), 0, 1)
    within = np.hypot(*(fine - start - along * way)) < width
    want = within.reshape(28, 10, 28, 10).mean((1, 3))
    assert np.abs(got - want).max() < 0.3  # a corner of a pixel, which the distance of its centre does not tell
    assert np.abs(got - want).mean() < 0.02


def test_strokes_only_add_ink_and_leave_some_digits_alone(digits):
    got = np.asarray(run(keys_of(512), digits, {"strokes": 1.0}, 1.0))
    assert (got >= digits).all()
    untouched = (got == digits).all((1, 2)).mean()
    assert 0.03 < untouched < 0.3  # none of four lines is drawn for a 16th, and some hide in the digit
    ink = always(np.zeros(SHAPE), 2_000, strokes=1.0)
    assert 0.01 < ink.mean() < 0.2
    assert always(np.zeros(SHAPE), 100, strokes=0.0).max() == 0
