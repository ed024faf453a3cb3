"""Reads digits from images: `python -m mnist_flax.predict RUN FILE... [--layout=digit|line|page]`.

FILE is an image, a directory of images, or `-` for a list of names on standard input.
"""

import codecs
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from mnist_flax.inference import model_flags
from mnist_flax.runtime import cli, threshold

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(threshold)
_LAYOUT = flags.DEFINE_enum(
    "layout", "digit", ["digit", "line", "page"], "one digit an image, one line of numbers, or a page of lines."
)
_JSON = flags.DEFINE_bool("json", False, "print a JSON object a line for each image, instead of text.")
_ANNOTATE = flags.DEFINE_string("annotate", None, "directory for copies of the images with the answers drawn in.")

_SPANS_AT_ONCE, _FILES_AT_ONCE = 500, 32  # images are read together until there are as many of either


class Item(NamedTuple):
    """An image on its way: what was found in it, or why it could not be read."""

    name: str
    sheet: Any = None  # mnist_flax.ocr.page_reader.Sheet
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
    from mnist_flax.ocr.decode import EXTENSIONS

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


def find(item: Item, layout: str) -> Item:
    """Decodes an image and finds its digits."""
    from mnist_flax.ocr import decode, page_reader

    if item.error:
        return item
    try:
        return Item(item.name, page_reader.find(decode.load(item.name), layout))
    except cli.UserError as error:
        return Item(item.name, error=str(error))


def batches(items: Iterable[Item]) -> Iterator[list[Item]]:
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


def show(name: str, reading: Any, layout: str) -> str:
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


def check_apart(items: Iterable[Item], directory: Path) -> None:
    """Raises UserError for an image in the directory of annotated copies, of which one may get its name."""
    place = os.path.realpath(directory)
    for name in (item.name for item in items if os.path.exists(item.name)):
        if place in (os.path.dirname(os.path.realpath(name)), os.path.realpath(os.path.dirname(name))):
            raise cli.UserError(f"--annotate={directory} holds {name}, which is to be read: name another directory")


def write_annotated(item: Item, reading: Any, directory: Path, taken: set[str]) -> None:
    """Writes `<directory>/<name of the image>.png`; images of the same name get numbers."""
    from mnist_flax.ocr import annotate, decode

    stem = Path(item.name).stem
    name = next(n for n in itertools.chain([stem], (f"{stem}.{i}" for i in itertools.count(2))) if n not in taken)
    taken.add(name)
    path = directory / f"{name}.png"
    copy = annotate.annotate(decode.load(item.name), reading)
    path.unlink(missing_ok=True)  # a link there may lead to what the user drew
    copy.save(path)


def main(argv: list[str]) -> int:
    if len(argv) < 3:
        raise cli.UserError("name a run directory and images: python -m mnist_flax.predict RUN FILE...")
    from mnist_flax.inference import classifier as recogniser_lib
    from mnist_flax.ocr import page_reader
    from mnist_flax.runtime import devices

    page_reader.require_packages()
    devices.available()  # before a directory is made
    devices.keep_compiled_programs()
    layout = _LAYOUT.value
    directory = Path(_ANNOTATE.value) if _ANNOTATE.value else None
    listed = listed_names(sys.stdin.buffer.read()) if "-" in argv and sys.stdin else []
    items: Iterable[Item] = image_names(argv[2:], listed)
    if directory:
        items = list(items)  # all of them, before a copy is written
        check_apart(items, directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cli.UserError(f"--annotate={directory} cannot be made ({error.strerror}): name another") from error
    reader = recogniser_lib.load_reader(model_flags.load(argv[1]), threshold.FLAG.value)

    failed = False
    taken: set[str] = set()
    for batch in batches(find(item, layout) for item in items):
        sheets = [item.sheet for item in batch if item.sheet]
        results = iter(page_reader.recognise(sheets, reader.recogniser, reader.threshold))
        for item in batch:
            if item.sheet is None:
                failed = True
                cli.print_error(item.error)
                if _JSON.value:
                    print(json.dumps({"file": item.name, "error": item.error}), flush=True)
                continue
            result = next(results)
            if directory:
                write_annotated(item, result, directory, taken)
            shown = {"file": item.name, "layout": layout, **page_reader.to_json(result)}
            print(json.dumps(shown) if _JSON.value else show(item.name, result, layout), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
