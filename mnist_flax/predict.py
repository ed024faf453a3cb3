"""Reads digits from images: `python -m mnist_flax.predict RUN FILE... [--layout=digit|line|page]`.

FILE is an image, a directory of images, or `-` for a list of names on standard input.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import json
import sys
from pathlib import Path
from typing import Any

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


def main(argv: list[str]) -> int:
    if len(argv) < 3:
        raise cli.UserError("name a run directory and images: python -m mnist_flax.predict RUN FILE...")
    from mnist_flax.inference import classifier
    from mnist_flax.ocr import page_reader, read_files
    from mnist_flax.runtime import devices

    page_reader.require_packages()
    devices.available()  # before a directory is made
    devices.keep_compiled_programs()
    layout: Any = _LAYOUT.value
    directory = Path(_ANNOTATE.value) if _ANNOTATE.value else None
    listed = read_files.listed_names(sys.stdin.buffer.read()) if "-" in argv and sys.stdin else []
    items = read_files.image_names(argv[2:], listed)
    if directory:
        items = iter(read_files.make_apart(list(items), directory))  # all of them, before a copy is written
    reader = classifier.load_classifier(model_flags.load(argv[1]), threshold.FLAG.value)
    failed, taken = False, set[str]()
    for item, reading in read_files.read_files(items, reader, layout):
        if reading is None:
            failed = True
            cli.print_error(item.error)
        elif directory:
            read_files.write_annotated(item, reading, directory, taken)
        if _JSON.value:
            print(json.dumps(read_files.to_json(item, layout, reading)), flush=True)
        elif reading is not None:
            print(read_files.show(item.name, reading, layout), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
