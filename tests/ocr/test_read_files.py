import numpy as np
import pytest

from mnist_flax.ocr import page_reader, read_files
from mnist_flax.ocr.read_files import Item
from mnist_flax.runtime.cli import UserError


def test_lists_may_begin_with_a_byte_order_mark():
    """And end lines as Windows does; in UTF-16 they are refused, whatever names come first."""
    assert read_files.listed_names("a.png\r\n\r\n-\r\nb\u00e9.png".encode("utf-8-sig")) == ["a.png", "b\u00e9.png"]
    assert read_files.listed_names(b"caf\xe9.png\n") == ["caf\udce9.png"]  # any bytes name a file
    with pytest.raises(UserError, match="UTF-8"):
        read_files.listed_names("a.png\n".encode("utf-16"))


def test_directories_give_their_images_and_lists_their_names(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt", "below/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    found = list(read_files.image_names(["x.png", str(tmp_path), "-", str(tmp_path / "empty")], ["y.png", "-"]))
    named = [item.name for item in found if not item.error]
    assert named == ["x.png", str(tmp_path / "a.jpg"), str(tmp_path / "b.PNG"), "y.png"]
    (failed,) = (item for item in found if item.error)
    assert failed.name == str(tmp_path / "empty") and "holds no image" in failed.error


@pytest.mark.parametrize(
    ("spans", "sizes"), [([0] * 70, [32, 32, 6]), ([200] * 5, [3, 2]), ([900, None, 1], [1, 2]), ([], [])]
)
def test_batches_end_at_enough_digits_or_files(spans, sizes):
    empty = np.zeros((1, 1), bool)
    sheets = [None if n is None else page_reader.Sheet(((None,) * n,), 20.0, empty, np.eye(2, 3)) for n in spans]
    items = [Item(str(i), sheet) for i, sheet in enumerate(sheets)]
    batches = list(read_files._batches(iter(items)))
    assert [len(batch) for batch in batches] == sizes
    assert [item for batch in batches for item in batch] == items
