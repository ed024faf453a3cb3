"""The input campaign: `python -m experiments.fuzz [--seconds=300] [--targets=idx,config,...]`.

Feeds what `experiments.fuzz.targets` lists to a coverage-guided fuzzer, each target in a process of its own with a
limit of time and memory for each input, and prints a table. A finding is whatever a user would see as a traceback, a
hang or a lack of memory; the input is kept under --output, and the exit status is 1.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from mnist_flax.experiments.research import extra
from mnist_flax.runtime import cli, terminal

_SECONDS = flags.DEFINE_float("seconds", 300.0, "time for all targets together.", lower_bound=1.0)
_TARGETS = flags.DEFINE_list("targets", [], "which targets; by default all.")
_OUTPUT = flags.DEFINE_string("output", "runs/fuzz", "directory for the inputs that made a finding.")

NOTHING = {"inputs": 0, "valid": 0, "refused": 0, "corpus": 0, "slowest": 0.0, "memory": 0}
START = 300  # seconds that a process may take to import and compile, before its time begins


def campaign(name: str, seconds: float, output: Path) -> dict[str, Any]:
    """Runs one target; gives what its process counted, with `findings` by signature."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        directory = Path(place)
        command = [sys.executable, "-m", "mnist_flax.experiments.fuzz.worker", name, place, str(seconds)]
        # Where the order of a set decides, it decides the same each time.
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "0"}
        with (directory / "log").open("w") as log:
            try:
                ended = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=START + 2 * seconds)
                status: int | str = ended.returncode
            except subprocess.TimeoutExpired:
                status = "did not end"
        result: dict[str, Any] = NOTHING | {"findings": {}}
        if (directory / "result.json").exists():
            result = json.loads((directory / "result.json").read_text())
        for kind in ("timeout", "oom", "crash"):
            for path in directory.glob(f"{kind}-*"):
                result["findings"][f"{kind}, status {status}"] = path.name
        if status != 0 and not result["findings"]:
            result["findings"][f"ended with status {status}"] = "log"
        if result["findings"]:
            kept = output / name
            kept.mkdir(parents=True, exist_ok=True)
            for path in directory.iterdir():
                if path.is_file() and path.name != "result.json":
                    shutil.copy(path, kept)
        return result


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise cli.UserError(f"{argv[1]!r} is no flag: choose with --targets=NAME,NAME")
    from mnist_flax.experiments.fuzz.targets import TARGETS

    names = _TARGETS.value or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        raise cli.UserError(f"--targets={','.join(unknown)} is unknown: choose from {', '.join(TARGETS)}")
    extra.require("atheris")
    output = Path(_OUTPUT.value)
    headings = ("inputs", "valid", "refused", "corpus", "slowest ms", "MiB", "findings")
    table = terminal.table("target", *headings, box=None, collapse_padding=True, pad_edge=False)
    findings = []
    for name in names:
        result = campaign(name, _SECONDS.value / len(names), output)
        findings += [f"{name}: {what} ({output / name / place})" for what, place in result["findings"].items()]
        cells = (f"{result[key]:,}" for key in ("inputs", "valid", "refused", "corpus"))
        cost = f"{1e3 * result['slowest']:.0f}", f"{result['memory']:,}"
        table.add_row(name, *cells, *cost, f"{len(result['findings'])}")
    terminal.console.print(table)
    for finding in findings:
        terminal.console.print(cli.one_line(finding))
    return 1 if findings else 0


if __name__ == "__main__":
    cli.run(main)
