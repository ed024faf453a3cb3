import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mnist_flax.ocr import decode
from mnist_flax.runtime.cli import UserError

RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64), np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", decode.FORMATS)
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_formats_and_modes(kind, mode, tmp_path):
    if (kind, mode) in {("WEBP", "1"), ("JPEG", "P")}:
        image = Image.fromarray(RAMP).convert("L")
    else:
        image = Image.fromarray(RAMP).convert(mode)
    path = tmp_path / f"ramp.{kind.lower()}"
    image.save(path, format=kind)
    grey = decode.load(path)
    assert grey.dtype == np.float32 and grey.shape == RAMP.shape
    expected = np.asarray(image.convert("L"), np.float64) / 255
    assert np.abs(grey - expected).mean() < (0.02 if kind in ("JPEG", "WEBP") else 1e-6)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_precision(kind):
    levels = np.tile(np.linspace(0, 65_535, 1_000).astype(np.uint16), (3, 1))
    grey = decode.load(encoded(Image.fromarray(levels), kind))
    np.testing.assert_allclose(grey, levels / 65_535, atol=1e-6)
    assert len(np.unique(grey)) == 1_000


def test_floating_point_images_span_what_occurs():
    levels = np.array([[-3.0, 1.0], [5.0, 1.0]], np.float32)
    np.testing.assert_allclose(decode.load(encoded(Image.fromarray(levels), "TIFF")), (levels + 3) / 8)
    levels[0, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        decode.load(encoded(Image.fromarray(levels), "TIFF"))


@pytest.mark.parametrize("ink", [0, 255])
def test_transparent_paper_contrasts_with_the_ink(ink):
    image = np.zeros((20, 20, 4), np.uint8)
    image[5:15, 9:11] = (ink, ink, ink, 255)
    grey = decode.load(encoded(Image.fromarray(image), "PNG"))
    assert (grey[:5] == (1 if ink == 0 else 0)).all() and (grey[5:15, 9:11] == ink / 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(orientation):
    upright = np.arange(6 * 9, dtype=np.uint8).reshape(6, 9) * 4
    # What a camera stores, for each orientation of the EXIF standard (tag 274).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright.T[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        file = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
        np.testing.assert_allclose(decode.load(file), upright / 255, atol=0.01)


@pytest.mark.parametrize("place", ["exif", "Raw profile type exif"])
def test_metadata_that_cannot_be_written_anew_cost_no_picture(place):
    entries = struct.pack("<HHIHH", 274, 3, 1, 6, 0) + struct.pack("<HHI4s", 256, 2, 2, b"6")  # a width that is a text
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4)
    image, options = Image.fromarray(np.rot90(RAMP)), {"exif": exif}
    if place != "exif":  # as ImageMagick has it
        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_text(place, f"\nexif\n{len(exif):8}\n{exif.hex()}\n")
    np.testing.assert_array_equal(decode.load(encoded(image, "PNG", **options)), RAMP / np.float32(255))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is large, and is if it is unpacked."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min((width + 1) * height, 10_000_000)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(20_000, 10_000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_before_they_are_unpacked(width, height):
    import tracemalloc

    body = bomb(width, height)
    tracemalloc.start()
    with pytest.raises(decode.TooManyPixels, match="the limit is 150,000,000"):
        decode.load(io.BytesIO(body), "the image")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_the_limit_can_be_lower():
    file = encoded(Image.fromarray(RAMP), "PNG")
    with pytest.raises(decode.TooManyPixels, match=r"x has 64 x 48 pixels: the limit is 3,000"):
        decode.load(file, "x", max_pixels=3_000)
    assert decode.load(file, max_pixels=64 * 48).shape == (48, 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is no regular file"),
        (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0"), "is no PNG, JPEG, TIFF, WEBP or BMP image"),
        (lambda path: Image.fromarray(RAMP).save(path, format="GIF"), "is no PNG, JPEG, TIFF, WEBP or BMP image"),
        (lambda path: path.write_bytes(encoded(Image.fromarray(NOISE), "PNG").read()[:900]), "is cut off or damaged"),
        (lambda path: path.write_bytes(b""), "is no PNG"),
    ],
)
def test_what_is_no_image_gets_one_line(make, message, tmp_path):
    path = tmp_path / "picture"
    make(path)
    with pytest.raises(UserError, match=message) as error:
        decode.load(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(decode.FORMATS), st.data())
def test_damage_never_raises_anything_else(kind, drawn):
    body = bytearray(encoded(Image.fromarray(RAMP), kind).read())
    for _ in range(drawn.draw(st.integers(1, 10))):
        body[drawn.draw(st.integers(0, len(body) - 1))] = drawn.draw(st.integers(0, 255))
    try:
        grey = decode.load(io.BytesIO(body[: drawn.draw(st.integers(1, len(body)))]), "x", max_pixels=1_000_000)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert grey.ndim == 2 and np.isfinite(grey).all()
