"""Reading many image files: their names, batches of them, and what is printed of each."""

import codecs
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mnist_flax.inference.classifier import CalibratedClassifier
from mnist_flax.ocr import annotate, decode, page_reader
from mnist_flax.ocr.decode import EXTENSIONS
from mnist_flax.ocr.page_reader import Layout
from mnist_flax.runtime import cli

_SPANS_AT_ONCE, _FILES_AT_ONCE = 500, 32  # images are read together until there are as many of either


class Item(NamedTuple):
    """An image on its way: what was found in it, or why it could not be read."""

    name: str
    sheet: page_reader.Sheet | None = None
    error: str = ""


def listed_names(content: bytes) -> list[str]:
    """The names of a list, one a line, each of any bytes; a byte-order mark may come first.

    Raises:
      UserError: it is in UTF-16, or no list.
    """
    if b"\0" in content:
        raise cli.UserError("the list on standard input holds zero bytes: give a name a line, in UTF-8 (not UTF-16)")
    lines = os.fsdecode(content.removeprefix(codecs.BOM_UTF8)).split("\n")
    return [name for line in lines if (name := line.rstrip("\r")) not in ("", "-")]


def image_names(arguments: Sequence[str], listed: Sequence[str]) -> Iterator[Item]:
    """The images that arguments name: files, images right in a directory, and for `-` those of `listed`."""
    for argument in arguments:
        if argument == "-":
            yield from image_names(listed, ())
            continue
        try:
            path, paths = Path(argument), [argument]
            if path.is_dir():
                paths = sorted(str(each) for each in path.iterdir() if each.suffix.lower() in EXTENSIONS)
        except OSError as error:
            yield Item(argument, error=f"{argument} cannot be looked at ({error.strerror})")
            continue
        yield from map(Item, paths)
        if not paths:
            yield Item(argument, error=f"{argument} holds no image ({', '.join(EXTENSIONS)})")


def _find(item: Item, layout: Layout) -> Item:
    """Decodes an image and finds its digits."""
    if item.error:
        return item
    try:
        return Item(item.name, page_reader.find(decode.load(item.name), layout))
    except cli.UserError as error:
        return Item(item.name, error=str(error))


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Groups images so that their digits fill a batch of the network."""
    batch: list[Item] = []
    spans = 0
    for item in items:
        batch.append(item)
        spans += sum(map(len, item.sheet.lattices)) if item.sheet else 0
        if spans >= _SPANS_AT_ONCE or len(batch) == _FILES_AT_ONCE:
            yield batch
            batch, spans = [], 0
    if batch:
        yield batch


def show(name: str, reading: page_reader.Reading, layout: str) -> str:
    """What is printed of one image."""
    if not reading.digits:
        return f"{name}: nothing found"
    if layout == "page":
        return f"{name}:\n{reading.text}"
    if layout == "line":
        return f"{name}: {reading.text}"
    digit = reading.digits[0]
    certainty = f"{digit.confidence:.1%}"
    return f"{name}: {digit.text} ({certainty if digit.answered else f'likeliest {digit.likeliest}, {certainty}'})"


def make_apart(items: Sequence[Item], directory: Path) -> Sequence[Item]:
    """Makes the directory for annotated copies of images, which are returned.

    Raises:
      UserError: it holds one of the images, of which a copy may get its name, or cannot be made.
    """
    place = os.path.realpath(directory)
    for name in (item.name for item in items if os.path.exists(item.name)):
        if place in (os.path.dirname(os.path.realpath(name)), os.path.realpath(os.path.dirname(name))):
            raise cli.UserError(f"{directory} holds {name}, which is to be read: name another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cli.UserError(f"{directory} cannot be made ({error.strerror}): name another") from error
    return items


def write_annotated(item: Item, reading: page_reader.Reading, directory: Path, taken: set[str]) -> None:
    """Writes `<directory>/<name of the image>.png`; images of the same name get numbers."""
    stem = Path(item.name).stem
    name = next(n for n in itertools.chain([stem], (f"{stem}.{i}" for i in itertools.count(2))) if n not in taken)
    taken.add(name)
    path = directory / f"{name}.png"
    copy = annotate.annotate(decode.load(item.name), reading)
    path.unlink(missing_ok=True)  # a link there may lead to what the user drew
    copy.save(path)


def read_files(
    items: Iterable[Item], classifier: CalibratedClassifier, layout: Layout
) -> Iterator[tuple[Item, page_reader.Reading | None]]:
    """Gives each image with its reading, or None on an error; as many are read together as fill a batch."""
    for batch in _batches(_find(item, layout) for item in items):
        sheets = [item.sheet for item in batch if item.sheet]
        readings = iter(page_reader.recognise(sheets, classifier.log_probabilities, classifier.threshold))
        for item in batch:
            yield item, next(readings) if item.sheet else None


def to_json(item: Item, layout: Layout, reading: page_reader.Reading | None) -> dict[str, Any]:
    """What `predict --json` prints of an image."""
    if reading is None:
        return {"file": item.name, "error": item.error}
    return {"file": item.name, "layout": layout, **page_reader.to_json(reading)}
