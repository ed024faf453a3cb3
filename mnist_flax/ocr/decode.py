"""Decoding: any image file that a person may have, as grey levels, safely."""

import os
import stat
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps

from mnist_flax.runtime.cli import UserError, reason

# Only these decoders are ever tried: others of Pillow's start programs (EPS) or are of no use here.
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".tif", ".tiff", ".webp", ".bmp")
Grey = Float[np.ndarray, "height width"]  # 0 black, 1 white

MAX_PIXELS = 150_000_000  # an A4 page at 1,200 dots an inch has 139 million; 8-bit colour is then 450 MB


class TooManyPixels(UserError):
    """An image that is larger than what was allowed."""


def load(source: Path | str | IO[bytes], name: str | None = None, max_pixels: int = MAX_PIXELS) -> Grey:
    """Grey levels of an image, 0 black to 1 white, upright as EXIF says; of several frames the first.

    Colour becomes luma (ITU-R BT.601); what is transparent shows white paper, or black where the drawing
    itself is white. Size is checked from the header, before any pixel is decoded.

    Args:
      source: a path, or a binary file that is open for reading.
      name: what messages call the image; by default the path.
      max_pixels: what is larger is refused.

    Raises:
      TooManyPixels: (a UserError) more than `max_pixels`.
      UserError: no such file, no image of `FORMATS`, cut off or damaged.
    """
    name = name or str(source)
    try:
        if isinstance(source, str | Path) and not stat.S_ISREG(os.stat(source).st_mode):
            raise UserError(f"{name} is no regular file: name an image")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata and of sizes that are refused just below
            with Image.open(source, formats=FORMATS) as image:
                _check_size(image, name, max_pixels)
                image.load()
                image.getexif()  # kept by the image; the text of it would be written anew, which fails where it is odd
                for text in ("exif", "Raw profile type exif"):
                    image.info.pop(text, None)
                return grey_levels(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise TooManyPixels(f"{name} has too many pixels: the limit is {max_pixels:,}") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except PermissionError:
        raise UserError(f"{name} may not be read: check its permissions") from None
    except MemoryError:
        raise UserError(f"{name} does not fit into memory: reduce it") from None
    except Exception as error:  # damaged content makes decoders raise nearly anything
        raise UserError(f"{name} is cut off or damaged ({reason(error)})") from error


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise TooManyPixels(f"{name} has {width:,} x {height:,} pixels: the limit is {max_pixels:,}")
    if not width * height:
        raise UserError(f"{name} has no pixel")


def grey_levels(image: Image.Image) -> Grey:
    """A decoded image as float32 grey levels in [0, 1]; 16 bits keep their precision.

    Raises:
      ValueError: a colour space that Pillow cannot convert.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey(image)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        return _over_paper(image.convert("RGBA"))
    return _unit(image.convert("RGB").convert("L") if image.mode == "CMYK" else image.convert("L"))


def _unit(image: Image.Image) -> Grey:
    return np.asarray(image, np.float32) / 255


def _deep_grey(image: Image.Image) -> Grey:
    """16 bits over their range; floats and 32 bits, which have no range of their own, over what occurs."""
    levels = np.asarray(image, np.float32)
    if image.mode.startswith("I;16") or (image.mode == "I" and 255 < levels.max() <= 65_535 and levels.min() >= 0):
        return levels / 65_535
    if not np.isfinite(levels).all():
        raise ValueError("some pixels are not finite")
    low, high = float(levels.min()), float(levels.max())
    return (levels - low) / (high - low) if high > low else np.ones_like(levels)


def _over_paper(image: Image.Image) -> Grey:
    """White paper behind what is transparent; black where all that can be seen is light."""
    alpha, luma = _unit(image.getchannel("A")), _unit(image.convert("RGB").convert("L"))
    visible = alpha > 0.5
    paper = 0.0 if not visible.all() and visible.any() and luma[visible].min() > 0.6 else 1.0
    return alpha * luma + (1 - alpha) * paper
