"""The disturbances, one function each, and runs that are disturbed by them."""

import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mnist_flax.experiments.faults import sabotage
from mnist_flax.experiments.faults.sabotage import Process, Site
from mnist_flax.runtime import cli, run_dir

_EARLY = {-15, -2, 130}  # a signal before the command can handle it, when there is nothing to save


class Trial(NamedTuple):
    """What was done, how the processes ended, and what was found amiss."""

    kind: str
    phase: str  # in which it was disturbed; "" where that is part of the kind
    statuses: list[int]
    violations: list[str]


def _judge(site: Site, kind: str, phase: str, process: Process, allowed: set[int]) -> Trial:
    ended = process.end()
    return Trial(kind, phase, [ended.status], site.violations(ended, allowed))


def _disturb(site: Site, chance: random.Random, phases: Sequence[str], **variables: str) -> Trial:
    """Sends a random signal, or two, in a random one of `phases`."""
    name = chance.choice(sorted(sabotage.SIGNALS))
    (phase,) = chance.choices(phases, [sabotage.PHASES[phase][1] for phase in phases])
    numbers, allowed = sabotage.SIGNALS[name]
    process = site.start(**variables)
    if process.wait_until(lambda: site.reached(phase, process)):
        process.work(chance.uniform(0, sabotage.PHASES[phase][0]))
    # Until the command installs its handlers, just after it printed the directory, a signal simply ends it.
    ready = "Parameters" in process.out()
    process.send(*numbers, within=0.2, chance=chance)
    return _judge(site, name, phase, process, allowed | {0} | (set() if ready else _EARLY))


def signalled(site: Site, chance: random.Random) -> Trial:
    if site.own_data and not site.processes:
        return _disturb(site, chance, ["preparation"])
    return _disturb(site, chance, [phase for phase in sabotage.PHASES if phase != "preparation"])


def damaged_checkpoint(site: Site, chance: random.Random) -> Trial:
    harm = site.damage_checkpoint(chance)
    trial = _disturb(site, chance, ("compilation", "a step", "a save"))  # all after it was restored
    return trial._replace(kind=f"a checkpoint's file {harm}", phase="")


def cut_metrics(site: Site, chance: random.Random) -> Trial:
    site.cut_metrics(chance)
    trial = _disturb(site, chance, ("compilation", "a step", "the report"))
    return trial._replace(kind="metrics.jsonl cut", phase="")


def cut_program(site: Site, chance: random.Random) -> Trial:
    own = site.root / "cache"
    if site.cache != own:
        shutil.copytree(site.cache, own)
        site.cache = own
    file = chance.choice(sorted(own.glob("*-cache")))
    file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])
    trial = _disturb(site, chance, ("a step", "a save"))
    return trial._replace(kind="a compiled program cut", phase="")


def jumping_clock(site: Site, chance: random.Random) -> Trial:
    def offset() -> str:
        return f"{chance.choice('+-')}{chance.choice((3_600, 86_400, 90 * 86_400, 1_000 * 86_400))}"

    variables, file = site.faked_clock(offset())
    process = site.start(**variables)
    phase = chance.choice(("compilation", "a step", "a save", "the report"))
    process.wait_until(lambda: site.reached("compilation", process))
    file.write_text(offset())
    if process.wait_until(lambda: site.reached(phase, process)):
        process.work(chance.uniform(0, 0.3))
    process.send(chance.choice((signal.SIGKILL, signal.SIGTERM)))
    return _judge(site, "the clock jumps", "", process, {0, -9})


def second_process(site: Site, chance: random.Random) -> Trial:
    phase = chance.choice(("imports", "imports", "compilation", "a step"))
    first = site.start()
    if first.wait_until(lambda: site.reached(phase, first)):
        first.work(chance.uniform(0, 0.3))
    second = site.start()
    ends = [second.end()]
    if chance.random() < 0.9 and first.popen.poll() is None:
        first.send(signal.SIGKILL)
    ends.append(first.end())
    found = [violation for ended in ends for violation in site.violations(ended, {0, 2, -9})]
    refused = [ended for ended in ends if ended.status == 2]
    if len(refused) > 1 or any("another process is training" not in ended.err for ended in refused):
        found.append(f"refused {len(refused)} of 2 processes: {[ended.err[-200:] for ended in refused]}")
    trained = [ended for ended in ends if "compiled in" in ended.out]
    if len(trained) > 1 and not refused:
        found.append("both trained")
    return Trial("a second process", "", [ended.status for ended in ends], found)


def full_disk_preparing(site: Site, chance: random.Random) -> Trial:
    site.remount("data_disk", f"size={chance.randrange(8, 1_200)}k")
    process = site.start()
    process.wait_until(lambda: site.reached("compilation", process))
    if process.popen.poll() is None:
        process.send(signal.SIGTERM)  # there was room enough, and training goes on
    trial = _judge(site, "a full disk", "preparation", process, {0, 2})
    site.remount("data_disk", "size=64m")
    return trial


def full_disk_training(site: Site, chance: random.Random) -> Trial:
    phase = chance.choice(("imports", "compilation", "a step", "a save", "the last save", "the report"))
    process = site.start()
    if process.wait_until(lambda: site.reached(phase, process)):
        process.work(chance.uniform(0, min(0.3, sabotage.PHASES[phase][0])))
    site.fill(left=chance.choice((0, 4_096, 20_000, 60_000)))
    trial = _judge(site, "a full disk", phase, process, {0, 1, 2})
    site.empty()
    return trial


def read_only(site: Site, chance: random.Random) -> Trial:
    site.remount("disk", "ro")
    trial = _judge(site, "a read-only workdir", "", site.start(), {2})
    site.remount("disk", "rw")
    return trial


# What may be done when, and how often beside the others.
_FAULTS: list[tuple[Callable[[Site, random.Random], Trial], Callable[[Site], bool], int]] = [
    (signalled, lambda site: True, 50),
    (damaged_checkpoint, lambda site: len(site.steps()) > 1, 14),
    (cut_metrics, lambda site: bool((site.workdir / "metrics.jsonl").exists() and site.steps()), 8),
    (cut_program, lambda site: site.steps() != [], 3),
    (jumping_clock, lambda site: sabotage.can_fake_clock(), 8),
    (second_process, lambda site: True, 8),
    (full_disk_preparing, lambda site: site.disks and site.own_data and not site.processes, 60),
    (full_disk_training, lambda site: site.disks, 20),
    (read_only, lambda site: site.disks, 8),
]


def attack(root: Path, name: str, trials: int, reference: dict[str, Any], *, disks: bool) -> list[dict[str, Any]]:
    """Disturbs one run up to `trials` times, lets it end and compares it; gives a record of each trial.

    What the end of the run shows to be wrong is laid to its last trial. All files of a run that went wrong are kept.
    """
    chance = random.Random(name)
    site = Site(
        root / name,
        root / "cache",
        data_dir=None if chance.random() < 0.3 else root / "data",
        disks=disks and chance.random() < 0.4,
    )
    records: list[dict[str, Any]] = []
    try:
        for _ in range(trials):
            possible = [(fault, weight) for fault, may, weight in _FAULTS if may(site)]
            (fault,) = chance.choices([fault for fault, _ in possible], [weight for _, weight in possible])
            began = time.monotonic()
            try:
                trial = fault(site, chance)
            except TimeoutError as error:
                trial = Trial(fault.__name__, "", [], [str(error)])
            records.append({"run": name, **trial._asdict(), "seconds": time.monotonic() - began})
            if site.finished():
                break
        violations = records[-1]["violations"]
        violations += site.violations(site.start().end(), {0}) + site.differences(reference)
        before = {path: path.stat().st_mtime_ns for path in site.workdir.rglob("*")}
        violations += site.violations(site.start().end(), {0})
        if before != {path: path.stat().st_mtime_ns for path in site.workdir.rglob("*")}:
            violations.append("a finished run was changed")
    finally:
        site.close(keep=not records or any(record["violations"] for record in records))
    return records


def prepare(root: Path) -> dict[str, Any]:
    """The undisturbed run that all others must equal; prepares the data and compiles the programs that they share.

    Raises:
      RunError: it failed.
    """
    done = root / "reference.json"
    if not done.exists():
        shutil.rmtree(root / "reference", ignore_errors=True)
        site = Site(root / "reference", root / "cache", data_dir=root / "data", disks=False)
        ended = site.start().end()
        if ended.status:
            raise cli.RunError(f"a run that nothing disturbs fails: {ended.err.strip()[-300:]}")
        run_dir.write_json(done, sabotage.results(site.workdir))
        site.close(keep=False)
    return run_dir.read_json(done)


def summarise(records: Sequence[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """A row for each kind, or each phase, of disturbance, and one of all."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record[by], []).append(record)
    return [
        {
            by: name,
            "trials": len(members),
            "survived": sum(not record["violations"] for record in members),
            "exit statuses": ", ".join(
                map(str, sorted({status for record in members for status in record["statuses"]}))
            ),
            "amiss": "; ".join(sorted({text for record in members for text in record["violations"]})),
        }
        for name, members in [*sorted(groups.items()), ("all", list(records))]
    ]
