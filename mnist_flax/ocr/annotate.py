"""A copy of a picture with what was read drawn on it."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mnist_flax.ocr.decode import Grey
from mnist_flax.ocr.page_reader import Reading

SURE, UNSURE, NUMBER = (0, 114, 178), (213, 94, 0), (0, 158, 115)  # told apart by colour-blind people (Okabe and Ito)


def annotate(picture: Grey, reading: Reading) -> Image.Image:
    """The picture in grey with a box around each digit, the answer above it, and a line under each number.

    Digits that are "?" are orange, with what they most likely are in brackets.
    """
    image = Image.fromarray(np.rint(255 * picture).astype(np.uint8)).convert("RGB")
    draw = ImageDraw.Draw(image)
    for line in reading.lines:
        for number in line:
            boxes = np.array([digit.box for digit in number.digits])
            width = max(1, round(float(boxes[:, 3].max() - boxes[:, 1].min()) / 25))
            bottom = float(boxes[:, 3].max()) + 2 * width
            draw.line((boxes[:, 0].min(), bottom, boxes[:, 2].max(), bottom), NUMBER, width)
            for digit in number.digits:
                colour = SURE if digit.answered else UNSURE
                left, top, right, low = digit.box
                draw.rectangle((left - width, top - width, right + width - 1, low + width - 1), None, colour, width)
                text = digit.text if digit.answered else f"?({digit.likeliest})"
                size = max(10, round(0.45 * float(np.median(boxes[:, 3] - boxes[:, 1]))))
                font = ImageFont.load_default(size)
                half = draw.textlength(text, font) / 2 + 1
                place = (max(half, min((left + right) / 2, image.width - half)), max(0.0, top - 2 * width))
                draw.text(place, text, colour, font, anchor="mb" if place[1] > size else "mt")
    return image
