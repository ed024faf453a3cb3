import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import feature, transform

from mnist_flax.evaluation import corruptions
from mnist_flax.evaluation.corruptions import FAMILIES, SEVERITIES

SIZE = corruptions.SIZE


@pytest.fixture(scope="module")
def digits(digits_data_dir):
    from mnist_flax.data import datasets
    from mnist_flax.runtime.config import default_config

    config = default_config()
    config.dataset, config.data_dir = "digits", str(digits_data_dir)
    return datasets.load(config).test.images


def test_the_families_are_those_of_the_paper_with_a_level_a_severity():
    assert len(FAMILIES) == 15
    for family in FAMILIES.values():
        assert len(family.levels) == len(SEVERITIES) and family.published in SEVERITIES


@pytest.mark.parametrize("name", FAMILIES)
def test_what_happens_to_an_image_depends_on_seed_and_number_alone(name, digits):
    images = digits[:23]
    whole = corruptions.corrupt(images, name, 4)
    assert whole.shape == images.shape and whole.dtype == np.uint8
    assert (whole != images).any(axis=(1, 2)).all()
    some = np.array([17, 2, 9])
    np.testing.assert_array_equal(corruptions.corrupt(images[some], name, 4, some), whole[some])
    deterministic = {"scale", "brightness", "stripe", "canny_edges"}
    other_seed, same = (
        corruptions.corrupt(images, name, 4, seed=1),
        corruptions.corrupt(images[:1].repeat(23, 0), name, 4),
    )
    assert (other_seed == whole).all() == (name in deterministic)
    assert (same == same[0]).all() == (name in deterministic)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"spatter", "glass_blur", "fog"}))  # levels of several numbers
def test_more_severe_is_further_from_the_image(name, digits):
    images = digits[:60].astype(float)
    distance = [np.abs(corruptions.corrupt(digits[:60], name, s) - images).mean() for s in SEVERITIES]
    assert distance == sorted(distance) and distance[0] > 0


def test_shot_noise_is_poisson_and_more_severe_noise_is_of_the_same_draw():
    grey = np.repeat(np.array([0, 40, 128, 250], np.uint8), 5_000)
    images = np.resize(grey, (26, SIZE, SIZE))
    numbers = np.arange(len(images))
    photons = 12
    uniform = corruptions._uniform(0, "shot_noise", numbers, SIZE * SIZE).reshape(images.shape)
    want = scipy.stats.poisson.ppf(uniform, images / 255 * photons)
    found = corruptions.corrupt(images, "shot_noise", 3)
    np.testing.assert_array_equal(found, np.rint(255 * np.minimum(want / photons, 1)))
    assert scipy.stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-3


@settings(max_examples=30, deadline=None)
@given(severity=st.sampled_from(SEVERITIES), seed=st.integers(0, 2**64 - 1))
def test_impulse_noise_hits_its_share_half_white_half_black(severity, seed):
    images = np.full((4, SIZE, SIZE), 100, np.uint8)
    found = corruptions.corrupt(images, "impulse_noise", severity, seed=seed)
    amount = FAMILIES["impulse_noise"].levels[severity - 1]
    for value in (0, 255):
        hits = int((found == value).sum())
        assert scipy.stats.binomtest(hits, images.size, amount / 2).pvalue > 1e-6
    assert ((found == 100) | (found == 0) | (found == 255)).all()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_affine_families_agree_with_scikit_image(severity, digits):
    images = digits[:12]
    to_centre, back = (transform.AffineTransform(translation=(s, s)) for s in (-corruptions.CENTRE, corruptions.CENTRE))

    def warped(matrix, shift=(0, 0)):  # of (x, y), about the centre
        inner = np.eye(3)
        inner[:2, :2], inner[:2, 2] = matrix, shift
        inverse = transform.ProjectiveTransform(back.params @ inner @ to_centre.params)
        return np.array([transform.warp(image / 255, inverse, order=1) for image in images])

    angle, size = FAMILIES["rotate"].levels[severity - 1], FAMILIES["scale"].levels[severity - 1]
    cos, sin = np.cos(angle), np.sin(angle)
    candidates = {
        "rotate": [[[cos, -sin], [sin, cos]], [[cos, sin], [-sin, cos]]],
        "shear": [[[1, -sin], [0, cos]], [[1, sin], [0, cos]]],
        "scale": [np.eye(2) / size],
    }
    for name, matrices in candidates.items():
        found = corruptions.corrupt(images, name, severity)
        wanted = np.array([np.rint(255 * np.clip(warped(matrix), 0, 1)) for matrix in matrices])
        nearest = np.abs(wanted - found).max(axis=(2, 3)).min(axis=0)
        assert nearest.max() <= 1, name
    found = corruptions.corrupt(images, "translate", severity)
    for image, moved in zip(images, found, strict=True):
        padded = np.pad(image, severity)
        choices = [padded[r : r + SIZE, c : c + SIZE] for r in (0, 2 * severity) for c in (0, 2 * severity)]
        assert any((moved == choice).all() for choice in choices)


def test_affine_moves_digits_as_its_users_say():
    images = np.zeros((1, SIZE, SIZE))
    images[0, 6, 13:15] = 1  # above the centre
    turned = corruptions.affine(images, corruptions.rotation(np.pi / 2))
    assert np.argwhere(turned[0] > 0.5)[:, 1].mean() > 20  # clockwise: to the right
    shifted = corruptions.affine(images, np.eye(2), np.array([0.0, -3.0]))
    np.testing.assert_array_equal(shifted, np.roll(images, 3, axis=2))


def test_edges_are_mixed_into_the_image(digits):
    for severity, share in zip(SEVERITIES, FAMILIES["canny_edges"].levels, strict=True):
        found = corruptions.corrupt(digits[:8], "canny_edges", severity)
        edges = 255.0 * np.array([feature.canny(image / 255) for image in digits[:8]])
        np.testing.assert_allclose(found, (1 - share) * digits[:8] + share * edges, atol=0.5 + 1e-9)


@pytest.mark.parametrize("name", ["glass_blur", "motion_blur"])
def test_blurs_keep_what_light_there_is(name, digits):
    images = np.zeros_like(digits[:20])
    images[:, 7:21, 7:21] = digits[:20, ::2, ::2]
    for severity in (1, 2):
        found = corruptions.corrupt(images, name, severity).astype(float)
        ratio = found.sum(axis=(1, 2)) / images.sum(axis=(1, 2))
        assert 0.9 < ratio.mean() < 1.02 and found.max(axis=(1, 2)).mean() < images.max(axis=(1, 2)).mean()


def test_a_constant_picture_has_nothing_to_blur():
    images = np.full((3, SIZE, SIZE), 90, np.uint8)
    for name in ("glass_blur", "motion_blur"):
        np.testing.assert_array_equal(corruptions.corrupt(images, name, 5), images)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), decay=st.floats(1.2, 3))
def test_plasma_spans_all_heights_and_is_rougher_with_less_decay(seed, decay):
    uniform = np.random.default_rng(seed).random((32, 4**6 - 1))
    heights = corruptions.plasma(uniform, decay)
    assert heights.shape == (32, 64, 64)
    assert (heights.min(axis=(1, 2)) == 0).all() and (heights.max(axis=(1, 2)) == 1).all()

    def roughness(maps):  # across the torus's seam as well
        return np.abs(maps - np.roll(maps, 1, axis=1)).mean()

    # Maps are stretched to the same heights, which one of little decay may lose some roughness by; many do not.
    assert roughness(heights) < roughness(corruptions.plasma(uniform, decay * 0.8))


def test_stripes_invert_and_invert_back(digits):
    once = corruptions.corrupt(digits[:5], "stripe", 3)
    np.testing.assert_array_equal(once[:, :, 7:21], digits[:5, :, 7:21])
    np.testing.assert_array_equal(once[:, :, :7], 255 - digits[:5, :, :7])
    np.testing.assert_array_equal(corruptions.corrupt(once, "stripe", 3), digits[:5])


@pytest.mark.parametrize("name", ["dotted_line", "zigzag"])
def test_lines_only_add_ink_and_as_many_as_the_severity(name):
    blank = np.zeros((40, SIZE, SIZE), np.uint8)
    ink = [corruptions.corrupt(blank, name, severity) for severity in SEVERITIES]
    for fewer, more in itertools.pairwise(ink):
        assert (more >= fewer).all()
    if name == "dotted_line":
        drawn = ink[0].max(axis=(0, 1)) > 0
        assert drawn[2:27].tolist() == [column // 2 % 2 == 1 for column in range(2, 27)] and not drawn[:2].any()
        for image in ink[0]:  # straight: the centres of its columns lie on a line
            columns = np.flatnonzero(image.sum(axis=0) > 300)
            weights = image[:, columns].astype(float)
            rows = (weights * np.arange(SIZE)[:, None]).sum(axis=0) / weights.sum(axis=0)
            inner = (rows > 3) & (rows < SIZE - 4)
            if inner.sum() > 2:
                residual = np.polyfit(columns[inner], rows[inner], 1, full=True)[1]
                assert residual.size == 0 or residual[0] < 1
