"""Breaks runs on purpose, and checks that nothing is lost: real training processes, disturbed at random moments.

    python -m experiments.faults [--trials=200] [--minutes=N] [--seed=0] [--workdir=DIR]

A run of a small network on `digits` is disturbed up to twelve times, and its command is given again each time; then it
may end. One disturbance is one trial: a signal in any phase (SIGKILL, SIGTERM, SIGINT, the last two also twice), a disk
that is full or read-only, a checkpoint's file cut, flipped or deleted, metrics.jsonl cut, a compiled program cut, a
clock that jumps, a second process in the same directory. After each: the exit status is one that is allowed, there is
no traceback, no saved checkpoint is gone, metrics.jsonl has each epoch once, and data are prepared whole or not at all.
At the end: parameters, metrics, summary and curves are bit for bit those of a run that nothing disturbed.

Writes `trials.jsonl`, `results.json` and `results.md` to `--workdir`; the same command goes on after the last whole run
found there. Disks are small file systems in memory, for which the command must be root's; clocks jump by libfaketime
(Debian's package `faketime`); what cannot be done is left out and said.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mnist_flax.experiments.faults import sabotage
from mnist_flax.experiments.faults.campaign import attack, prepare, summarise
from mnist_flax.runtime import cli, run_dir, terminal

_TRIALS = flags.DEFINE_integer("trials", 200, "disturbances in all", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", None, "begin no run after this time", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "of what is done when")
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the results; a new one under runs/faults/ if not given")


def _report(root: Path, records: Sequence[dict[str, Any]], skipped: Sequence[str]) -> None:
    runs = len({record["run"] for record in records})
    minutes = sum(record["seconds"] for record in records) / 60
    text = f"{len(records)} trials in {runs} runs, {minutes:.0f} minutes\n"
    in_phases = [record for record in records if record["phase"]]
    for rows in (summarise(records, "kind"), summarise(in_phases, "phase")):
        table = terminal.table(*rows[0])
        for row in rows:
            table.add_row(*map(str, row.values()))
        terminal.console.print(table)
        lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
        text += "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    text += "".join(f"\nleft out: {reason}\n" for reason in skipped)
    terminal.console.print(text.splitlines()[0], *(f"left out: {reason}" for reason in skipped), sep="\n")
    run_dir.write_json(root / "results.json", {"seed": _SEED.value, "trials": list(records), "left_out": list(skipped)})
    (root / "results.md").write_text(text)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise cli.UserError(f"{argv[1]!r} is no flag: see --help")
    root = Path(_WORKDIR.value or run_dir.new_directory("faults")).absolute()
    root.mkdir(parents=True, exist_ok=True)
    print(root, flush=True)
    disks = sabotage.can_mount(root / "mount")
    skipped = [] if disks else ["full and read-only disks, since a small file system can be mounted by root only"]
    if not sabotage.can_fake_clock():
        skipped.append("clocks that jump, since libfaketime is not there (Debian: apt install faketime)")
    reference = prepare(root)
    log = root / "trials.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    began = time.monotonic()
    number = len({record["run"] for record in records})
    while len(records) < _TRIALS.value and (_MINUTES.value is None or time.monotonic() < began + 60 * _MINUTES.value):
        name = f"run-{_SEED.value}-{number}"
        shutil.rmtree(root / name, ignore_errors=True)  # of a campaign that was stopped
        new = attack(root, name, min(12, _TRIALS.value - len(records)), reference, disks=disks)
        with log.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in new))
        records += new
        number += 1
        for record in new:
            what = record["kind"] + (f" in {record['phase']}" if record["phase"] else "")
            amiss = "; ".join(record["violations"]) or "survived"
            terminal.console.print(f"{record['run']}  {what}: {record['statuses']} {amiss}")
    if not records:
        raise cli.UserError("no trial was begun: give it more --minutes")
    _report(root, records, skipped)
    return 0 if all(not record["violations"] for record in records) else 1


if __name__ == "__main__":
    cli.run(main)
