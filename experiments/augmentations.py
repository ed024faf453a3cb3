"""Draws what the augmentation of a recipe makes of digits: `python -m experiments.augmentations`.

    python -m experiments.augmentations [--config=configs/record.py] [--config.KEY=VALUE ...] [--output=DIR]

One example of each class, in rows: as it is; moved, all geometric kinds together; under each other kind that the recipe
has on, at the strength it sets, but every example; and three times as training sees it.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags
from jaxtyping import Float

from mnist_flax.evaluation.figures import styled
from mnist_flax.experiments.research import outputs
from mnist_flax.runtime import cli, config_flag
from mnist_flax.runtime import config as config_lib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CONFIG, _ARGUMENTS = config_flag.define_flag()
_OUTPUT = flags.DEFINE_string("output", ".", "directory to write augmentations.png to.")
_TRAINED = 3  # rows

Images = Float[np.ndarray, "examples 28 28"]


def rows(images: Images, fields: dict[str, float], seed: int) -> dict[str, Images]:
    """What becomes of images in [0, 1], by the name of the row; `fields` are those of config.augment that are not 0."""
    import jax

    from mnist_flax.ops.random import make_key
    from mnist_flax.runtime.settings import pinned
    from mnist_flax.training.augment import KINDS, MOVES, augment

    @pinned()
    def drawn(strength: dict[str, float], number: int) -> Images:
        keys = jax.random.split(jax.random.fold_in(make_key(seed), number), len(images))
        return np.asarray(augment(keys, jax.numpy.asarray(images), strength))

    strength = {kind: fields[kind] for kind in KINDS if kind in fields}
    found = {"as it is": images}
    if moved := {kind: strength[kind] for kind in MOVES if kind in strength}:
        found["moved"] = drawn(moved, 0)
    for number, kind in enumerate(kind for kind in strength if kind not in (*MOVES, "probability")):
        found[kind] = drawn({kind: strength[kind], "probability": 1.0}, 1 + number)
    for number in range(_TRAINED):
        found[f"in training{' ' * number}"] = drawn(strength, 100 + number)
    return found


@styled
def figure_augmentations(found: dict[str, Images]) -> "Figure":
    from matplotlib.figure import Figure

    columns = len(next(iter(found.values())))
    figure = Figure(figsize=(1.3 + 0.62 * columns, 0.64 * len(found)))
    axes = figure.subplots(len(found), columns, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for (name, images), line in zip(found.items(), axes, strict=True):
        for image, place in zip(images, line, strict=True):
            place.imshow(image, cmap="gray", vmin=0, vmax=1)
            place.set_axis_off()
        line[0].text(-0.15, 0.5, name.strip(), ha="right", va="center", transform=line[0].transAxes)
    return figure


def main(argv: list[str]) -> None:
    config_flag.refuse_arguments(argv)
    config = _CONFIG.value
    config_lib.check_config(config)
    (path,) = outputs.check_directory("output", Path(_OUTPUT.value), "augmentations.png")
    from mnist_flax.data import datasets
    from mnist_flax.runtime import devices

    devices.available()
    train = datasets.load(config).train
    first = [int(np.flatnonzero(train.labels == label)[0]) for label in np.unique(train.labels)]
    fields = {name: value for name, value in config.augment.items() if value}
    found = rows(train.images[first].astype(np.float32) / 255, fields, config.seed)
    figure_augmentations(found).savefig(path, format="png")
    print(f"written: {path.resolve()}")


if __name__ == "__main__":
    cli.run(main, _ARGUMENTS)
