import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax, random
from skimage.transform import AffineTransform
from sklearn.datasets import load_digits

from mnist_flax.configs import default
from mnist_flax.training import augment as aug
from mnist_flax.training.photometric import KINDS as PHOTOMETRIC
from mnist_flax.training.state import hyperparameters
from mnist_flax.training.step import Batch, prepare_batch

SHAPE = (28, 28)
CENTRE = 13.5
EVERYTHING = {
    "rotation": 20.0,
    "shift": 3.0,
    "zoom": 0.2,
    "shear": 0.3,
    **dict.fromkeys(PHOTOMETRIC, 0.7),
    "probability": 0.5,
}


run = jax.jit(aug.augment)  # one compilation for each set of kinds and shape of batch


def keys_of(n: int, seed: int = 0):
    return random.split(random.key(seed), n)


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """64 real digits, 24 x 24 in a frame of background."""
    small = load_digits().images[:64] / 16
    return np.pad(small.repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2))).astype(np.float32)


def sources(strength: dict, n: int) -> np.ndarray:
    """Where pixels of augmented images come from, [n, 2, 28, 28] less the border, seen from outside.

    An image whose values are its own row (column) numbers gives, after a warp, the sources' rows (columns).
    """
    ramps = [np.broadcast_to(ramp, (n, *SHAPE)) for ramp in np.mgrid[:28, :28].astype(np.float32)]
    warped = [run(keys_of(n), jnp.asarray(ramp), strength) for ramp in ramps]
    return np.stack(warped, axis=1)


def recovered_matrices(**strength: float) -> np.ndarray:
    """The inverse affine maps [2000, 2, 3] about the centre that `augment` used, read off `sources`."""
    n, middle = 2_000, slice(10, 18)
    off = dict.fromkeys(("rotation", "shift", "zoom", "shear"), 0.0)
    seen = sources(off | strength, n)[:, :, middle, middle].reshape(n, 2, -1) - CENTRE
    grid = np.mgrid[middle, middle].reshape(2, -1) - CENTRE
    points = np.concatenate([grid, np.ones((1, grid.shape[1]))])
    return seen @ np.linalg.pinv(points)


def assert_uniform(sample: np.ndarray, bound: float) -> None:
    """Fixed seeds: a right sampler fails this for one seed in a thousand."""
    assert np.abs(sample).max() <= bound * (1 + 1e-4)
    assert scipy.stats.kstest(sample, scipy.stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3


def reference_warp(images: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    return np.stack(
        [
            scipy.ndimage.map_coordinates(image, place, order=1, mode="grid-constant", cval=0.0)
            for image, place in zip(images.astype(np.float64), coordinates, strict=True)
        ]
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(2, 9), st.sampled_from([0.0, 0.5, 1.0]))
def test_warp_is_bilinear_interpolation(seed, height, width, whole):
    rng = np.random.default_rng(seed)
    images = rng.random((3, height, width)).astype(np.float32)
    coordinates = rng.uniform(-3, 12, (3, 2, height, width)).astype(np.float32)
    coordinates = np.where(rng.random(coordinates.shape) < whole, np.round(coordinates), coordinates)
    np.testing.assert_allclose(jax.jit(aug.warp)(images, coordinates), reference_warp(images, coordinates), atol=1e-5)


def test_far_coordinates_are_background():
    images = jnp.ones((1, 5, 5))
    coordinates = jnp.array([1e9, -1e9, 4.0, -1.0, 5.0])[None, None, None].repeat(2, axis=1).repeat(5, axis=2)
    np.testing.assert_array_equal(jax.jit(aug.warp)(images, coordinates)[0, 0], [0, 0, 1, 0, 0])


@pytest.mark.parametrize("shape", [(28, 28), (20, 31)])
def test_affine_matrix_is_scikit_images(shape):
    rng = np.random.default_rng(0)
    rotation, shear = rng.uniform(-60, 60, 8), rng.uniform(-0.5, 0.5, 8)
    zoom, shift = rng.uniform(0.6, 1.5, 8), rng.uniform(-4, 4, (8, 2))
    compiled = jax.jit(aug.affine_matrix, static_argnums=4)
    got = compiled(*(np.float32(x) for x in (rotation, shift, zoom, shear)), shape)
    centre = (np.array(shape)[::-1] - 1) / 2  # (x, y), as scikit-image counts
    for i in range(8):
        forward = (
            AffineTransform(translation=-centre)
            + AffineTransform(scale=zoom[i], rotation=np.deg2rad(rotation[i]), shear=(np.arctan(shear[i]), 0))
            + AffineTransform(translation=centre + shift[i, ::-1])
        )
        inverse = np.linalg.inv(forward.params)
        np.testing.assert_allclose(got[i], inverse[[[1], [0]], [1, 0, 2]], atol=2e-5)


def test_affine_warp_is_scipys(digits):
    rng = np.random.default_rng(1)
    n = len(digits)
    parameters = (
        rng.uniform(-25, 25, n),
        rng.uniform(-3, 3, (n, 2)),
        rng.uniform(0.7, 1.3, n),
        rng.uniform(-0.4, 0.4, n),
    )

    @jax.jit
    def apply(images, *parameters):
        matrices = aug.affine_matrix(*parameters, SHAPE)
        return matrices, aug.warp(images, aug.affine_coordinates(matrices, SHAPE))

    matrices, got = apply(digits, *(np.float32(x) for x in parameters))
    for image, matrix, result in zip(digits, np.asarray(matrices, np.float64), got, strict=True):
        want = scipy.ndimage.affine_transform(image, matrix, order=1, mode="constant", cval=0.0)
        np.testing.assert_allclose(result, want, atol=1e-4)


def test_signs_as_a_person_sees_them():
    image = jnp.zeros((1, 5, 5)).at[0, 0, 2].set(1.0)  # a dot above the centre
    one, zero = jnp.ones(1), jnp.zeros(1)

    def moved(rotation, shift, shear):
        matrix = aug.affine_matrix(rotation, shift, one, shear, (5, 5))
        return np.argwhere(np.asarray(aug.warp(image, aug.affine_coordinates(matrix, (5, 5))))[0] > 0.9).tolist()

    assert moved(90 * one, jnp.zeros((1, 2)), zero) == [[2, 4]]  # clockwise
    assert moved(zero, jnp.array([[3.0, -1.0]]), zero) == [[3, 1]]  # down and left
    assert moved(zero, jnp.zeros((1, 2)), one) == [[0, 4]]  # the top leans right


def test_rotation_is_a_uniform_angle_about_the_centre():
    matrices = recovered_matrices(rotation=15.0)
    linear = matrices[:, :, :2]
    np.testing.assert_allclose(linear @ linear.transpose(0, 2, 1), np.broadcast_to(np.eye(2), (2_000, 2, 2)), atol=1e-4)
    np.testing.assert_allclose(matrices[:, :, 2], 0, atol=1e-4)
    assert_uniform(np.rad2deg(np.arctan2(linear[:, 1, 0], linear[:, 0, 0])), 15.0)


def test_shift_is_uniform_along_each_axis():
    matrices = recovered_matrices(shift=2.0)
    np.testing.assert_allclose(matrices[:, :, :2], np.broadcast_to(np.eye(2), (2_000, 2, 2)), atol=1e-5)
    assert_uniform(matrices[:, 0, 2], 2.0)
    assert_uniform(matrices[:, 1, 2], 2.0)
    assert abs(np.corrcoef(matrices[:, :, 2].T)[0, 1]) < 0.08


def test_zoom_is_a_uniform_scale():
    matrices = recovered_matrices(zoom=0.15)
    np.testing.assert_allclose(matrices[:, 0, 0], matrices[:, 1, 1], atol=1e-4)
    np.testing.assert_allclose(matrices[:, [0, 1, 0, 1], [1, 0, 2, 2]], 0, atol=1e-4)
    assert_uniform(1 / matrices[:, 0, 0] - 1, 0.15)


def test_shear_moves_rows_sideways_by_a_uniform_tangent():
    matrices = recovered_matrices(shear=0.2)
    np.testing.assert_allclose(matrices[:, [0, 0, 1], [0, 1, 1]], [[1, 0, 1]] * 2_000, atol=1e-4)
    np.testing.assert_allclose(matrices[:, :, 2], 0, atol=1e-4)
    assert_uniform(matrices[:, 1, 0], 0.2)


def test_kinds_draw_independently_of_each_other():
    alone = {name: recovered_matrices(**{name: EVERYTHING[name]}) for name in ("rotation", "shift", "zoom", "shear")}
    draws = [
        alone["rotation"][:, 1, 0],
        alone["shift"][:, 0, 2],
        alone["shift"][:, 1, 2],
        alone["zoom"][:, 0, 0],
        alone["shear"][:, 1, 0],
    ]
    correlation = np.corrcoef(draws) - np.eye(5)
    assert np.abs(correlation).max() < 0.08  # 3.6 standard errors
    # ... and the same whatever else is on.
    both = recovered_matrices(shift=3.0, zoom=0.2)
    np.testing.assert_allclose(both[:, 0, 0], alone["zoom"][:, 0, 0], atol=1e-4)
    zoomed = alone["zoom"][:, 0, 0, None] * alone["shift"][:, :, 2]
    np.testing.assert_allclose(both[:, :, 2], zoomed, atol=1e-3)


def test_all_moves_at_once_are_one_warp(digits):
    """The sources seen on ramps, given to SciPy, make the digits that `augment` makes."""
    geometric = {name: EVERYTHING[name] for name in aug.MOVES}
    n = len(digits)
    got = np.asarray(run(keys_of(n), digits, geometric))
    seen = sources(geometric, n)
    inside = np.asarray(run(keys_of(n), jnp.ones((n, *SHAPE)), geometric)) > 0.9999
    inside &= (seen > 1).all(1) & (seen < 26).all(1)  # at the border ramps mix with the background
    assert inside.mean() > 0.6
    np.testing.assert_allclose(got[inside], reference_warp(digits, seen)[inside], atol=1e-4)


def test_compiled_loop_takes_the_right_pixels(digits):
    """Sources near whole pixels: pixel numbers and weights that round apart would be off by a pixel."""
    images = jnp.asarray(digits)
    strength = {"rotation": 1e-5, "zoom": 1e-7}

    @jax.jit
    def run(images, strength):
        def step(i, total):
            return total + aug.augment(keys_of(len(digits), 3), jnp.roll(images, i, axis=2), strength)

        return lax.fori_loop(0, 4, step, jnp.zeros_like(images))

    want = sum(np.roll(digits, i, axis=2) for i in range(4))
    np.testing.assert_allclose(run(images, strength), want, atol=1e-4)


def test_nothing_on_is_nothing_done(digits):
    assert aug.augment(keys_of(len(digits)), digits, {}) is digits
    np.testing.assert_array_equal(run(keys_of(len(digits)), digits, {"tone": 0.5}), digits)  # probability 0 is no field
    # The probability alone turns nothing on: configs/default.py has it.
    assert aug.augment(keys_of(len(digits)), digits, {"probability": 0.2}) is digits


def test_zero_strength_is_the_identity(digits):
    zero = dict.fromkeys(EVERYTHING, 0.0) | {"probability": EVERYTHING["probability"]}
    np.testing.assert_array_equal(run(keys_of(len(digits)), digits, zero), digits)


def test_same_key_same_result_other_key_another(digits):
    first = run(keys_of(64), digits, EVERYTHING)
    np.testing.assert_array_equal(first, run(keys_of(64), digits, EVERYTHING))
    other = np.asarray(run(keys_of(64, seed=1), digits, EVERYTHING))
    assert (np.abs(first - other).max((1, 2)) > 0.1).all()


def test_an_example_does_not_depend_on_its_batch(digits):
    keys = keys_of(64)
    whole = np.asarray(run(keys, digits, EVERYTHING))
    order = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(run(keys[order], digits[order], EVERYTHING), whole[order])
    for size in (1, 24):
        np.testing.assert_allclose(run(keys[:size], digits[:size], EVERYTHING), whole[:size], atol=1e-5)


def test_populations_vary_the_strength(digits):
    """vmap and lax.map over members give what each member gives alone."""
    scale = jnp.array([0.0, 0.5, 1.0])
    members = {name: value * scale for name, value in EVERYTHING.items()}
    keys = keys_of(64)
    batched = jax.jit(jax.vmap(aug.augment, (None, None, 0)))(keys, digits, members)
    mapped = jax.jit(lambda k, x, m: lax.map(lambda one: aug.augment(k, x, one), m))(keys, digits, members)
    for i in range(3):
        alone = run(keys, digits, {name: value[i] for name, value in members.items()})
        np.testing.assert_allclose(batched[i], alone, atol=1e-4)
        np.testing.assert_allclose(mapped[i], alone, atol=1e-4)


def test_augmentation_ends_gently(digits):
    fields = EVERYTHING | {"final_epochs": 2.5, "final_scale": 0.25}
    at = jax.jit(lambda epoch, fields: aug.strength_at(epoch, 10.0, fields))
    assert at(7.49, fields) == EVERYTHING
    gentle = {name: value / 4 for name, value in EVERYTHING.items()}
    assert at(7.5, fields) == pytest.approx(gentle) == at(9.99, fields)
    # Nothing is left where final_scale, at 0, is no field; without final_epochs there is no such end.
    assert at(9.0, {"rotation": 9.0, "final_epochs": 1.0}) == {"rotation": 0.0}
    assert at(9.99, EVERYTHING | {"final_scale": 0.25}) == EVERYTHING


def test_training_ends_on_gentle_images(digits):
    """The images of the real step: as before until the last epochs, then those of weaker augmentation."""
    config = default.get_config()
    config.num_epochs, config.augment.specks = 4, 0.5
    weak = config.copy_and_resolve_references()
    for name in ("rotation", "shift", "zoom", "shear", "specks", "probability"):
        weak.augment[name] *= 0.5
    gentle = config.copy_and_resolve_references()
    gentle.augment.final_epochs, gentle.augment.final_scale = 1.0, 0.5

    def batch(config, step):
        pixels = np.rint(255 * digits).astype(np.uint8)
        whole = Batch(pixels, np.zeros(64), np.arange(64))
        return np.asarray(prepare_batch(config, hyperparameters(config), 0, jnp.int32(step), 10, whole)[0])

    np.testing.assert_allclose(batch(gentle, 29), batch(config, 29), atol=1e-5)
    np.testing.assert_allclose(batch(gentle, 30), batch(weak, 30), atol=1e-5)
    assert np.abs(batch(weak, 30) - batch(config, 30)).max() > 0.1


def test_unknown_kind_is_refused(digits):
    with pytest.raises(ValueError, match="unknown augmentation rotate: choose from rotation"):
        aug.augment(keys_of(64), digits, {"rotate": 10.0})
