import json
import random

from mnist_flax.experiments.fuzz import json_values


def test_one_line_changes_and_stays_json_and_most_changes_tell():
    content = b'{"a": [1, 2.5, {"b": null}], "c": "text"}\n[0, [1]]\n3'
    before, changed = content.split(b"\n"), 0
    for seed in range(400):
        after = json_values.mutate(content, random.Random(seed)).split(b"\n")
        assert after == json_values.mutate(content, random.Random(seed)).split(b"\n")
        others = [line for line, old in zip(after, before, strict=True) if line != old]
        for line in others:
            if not line.startswith(b"[" * 1_000):  # deeper than a parser goes, on purpose
                json.loads(line)
        assert len(others) <= 1
        changed += bool(others)
    assert changed > 200


def test_what_is_no_json_is_left_as_it_is():
    for content in (b"", b"\xff\xfe", b"{", b"[" * 100_000):
        assert json_values.mutate(content, random.Random(0)) == content
