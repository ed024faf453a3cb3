"""One target of the input campaign in a process of its own: see `experiments.fuzz`, which starts it.

    python -m experiments.fuzz.worker TARGET DIRECTORY SECONDS

What is counted goes to DIRECTORY/result.json, again and again; a finding goes beside it, as the input and its
traceback, and the campaign goes on.
"""

import hashlib
import importlib
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import atheris

LONGEST = 10.0  # seconds of the processor, for one input
WAIT = 120  # seconds, after which it is a hang whatever the machine was busy with
MOST_MEMORY = 4096  # MiB
MOST_BYTES = 200_000  # of an input


def signature(error: BaseException) -> str:
    """What two findings with the same cause have in common: the kind of error, and where it came up."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "fuzz" not in frame.filename]
    return f"{type(error).__name__} at {' > '.join(ours[-3:])}"


def main(name: str, place: str, seconds: str) -> None:
    directory = Path(place)
    # Modules are imported here so that what the fuzzer follows is the project's code, and Pillow's.
    with atheris.instrument_imports(include=["mnist_flax", "PIL"]):
        from mnist_flax.experiments.fuzz import json_values, targets

        target = targets.TARGETS[name]
        for module in target.modules:
            importlib.import_module(module)
    (directory / "work").mkdir()
    feed = target.make(directory / "work")
    corpus = directory / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(target.seeds()):
        (corpus / f"seed{i}").write_bytes(seed)
    counts = {"inputs": 0, "valid": 0, "refused": 0, "slowest": 0.0}
    found: dict[str, str] = {}
    deadline = time.monotonic() + float(seconds)
    shown = 0.0

    def report() -> None:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        result = {**counts, "memory": memory, "findings": found, "corpus": len(list(corpus.iterdir()))}
        (directory / "result.tmp").write_text(json.dumps(result))
        os.replace(directory / "result.tmp", directory / "result.json")

    def one_input(content: bytes) -> None:
        nonlocal shown
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, LONGEST)
        try:
            counts["valid" if targets.feed_once(feed, content) else "refused"] += 1
        except BaseException as error:
            digest = hashlib.sha256(content).hexdigest()[:12]
            if found.setdefault(signature(error), digest) == digest:
                (directory / f"{digest}.input").write_bytes(content)
                (directory / f"{digest}.txt").write_text(traceback.format_exc(), errors="backslashreplace")
        signal.setitimer(signal.ITIMER_PROF, 0)
        ended = time.monotonic()
        counts["inputs"] += 1
        counts["slowest"] = max(counts["slowest"], time.process_time() - started)
        if ended > deadline or ended > shown + 0.5:
            shown = ended
            report()
        if ended > deadline:
            os._exit(0)

    def too_slow(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {LONGEST:g} s of processor time")

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        generator = random.Random(seed)
        if target.is_json and generator.random() < 0.8:
            content = json_values.mutate(content, generator)
            if len(content) <= most:
                return content
        return atheris.Mutate(content, most)

    signal.signal(signal.SIGPROF, too_slow)
    options = [f"-max_len={MOST_BYTES}", f"-timeout={WAIT}", f"-rss_limit_mb={MOST_MEMORY}", "-seed=1"]
    atheris.Setup(
        ["fuzz", *options, f"-artifact_prefix={directory}/", "-len_control=0", str(corpus)],
        one_input,
        custom_mutator=mutate,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
