"""The figure of augmentations: its rows are the kinds that a recipe has on."""

import pytest
from PIL import Image

from tests.commands import command, refusal


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        ((), 5),  # as it is, moved, and three in training
        (("--config.augment.tone=0.5", "--config.augment.specks=0.5", "--config.augment.probability=0.5"), 7),
        ([f"--config.augment.{kind}=0.0" for kind in ("rotation", "shift", "zoom", "shear")], 4),
    ],
)
def test_rows_are_the_kinds_that_are_on(overrides, rows, tmp_path, digits_data_dir):
    path = tmp_path / "place" / "augmentations.png"
    recipe = ("--config=configs/digits.py", f"--config.data_dir={digits_data_dir}")
    out = command("experiments.augmentations", *recipe, *overrides, f"--output={path.parent}").stdout
    assert out.splitlines()[-1] == f"written: {path}"
    with Image.open(path) as image:
        assert image.height == pytest.approx(0.64 * 160 * rows, abs=2)
        pixels = image.convert("L")
    side = image.width - 10 * 0.62 * 160  # beside the digits are names
    darkest, _ = pixels.crop((0, 0, int(side), image.height)).getextrema()
    assert darkest < 50


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--output={}/file/place", "cannot be made (Not a directory)"),
        ("--output={}", "it is a directory"),
        ("--output={}/file", "name a directory"),
        ("--config.augment.tone=2.0", "out of range: use a number from 0.0 to 1.0"),
        ("--config.augment.tones=0.5", "did you mean"),
        ("--config.augment.final_epochs=99.0", "longer than the run"),
        ("record", "is no flag"),
    ],
)
def test_wrong_inputs_get_one_line(argument, message, tmp_path):
    (tmp_path / "augmentations.png").mkdir()
    (tmp_path / "file").touch()
    assert message in refusal("experiments.augmentations", argument.format(tmp_path))
