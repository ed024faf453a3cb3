"""One model of several runs, which answers with the mean of their class probabilities (Lakshminarayanan et al. 2017).

Each member weighs the same. The directory of an ensemble holds copies of their parameters and serves every other tool
as that of a run does; nothing is chosen by the test split, which is scored once.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mnist_flax.inference.run import Run, load_run
from mnist_flax.runtime import cli, run_dir, terminal
from mnist_flax.runtime.settings import pinned

Member = dict[str, Any]  # what `read_member` gives


def read_member(path: Path) -> Member:
    """What an ensemble records of a finished run.

    Raises:
      UserError: there is no such run, it is not finished, it is an ensemble, or its files are damaged.
    """
    config = run_dir.read_config(path)
    if run_dir.read_members(path):
        raise cli.UserError(f"{path} is an ensemble: name the runs that it was made of")
    summary = run_dir.read_summary(path)
    if summary is None:
        raise cli.UserError(f"{path} is not finished: run its training command again, then this one")
    try:
        scores = {name: float(summary[name]) for name in ("test_accuracy", "train_seconds")}
    except KeyError as error:
        raise cli.UserError(f"{path / 'summary.json'} is damaged: restore it, or train anew") from error
    revision = run_dir.read_recorded(path).get("git_revision")
    return {"path": str(path), "seed": config.seed, "git_revision": revision, **scores, "config": config.to_dict()}


def check_members(members: Sequence[Member]) -> None:
    """Raises UserError unless they agree in what the ensemble is scored and calibrated on."""
    first = members[0]
    for field, consequence in (
        ("dataset", "an ensemble is of one dataset"),
        ("validation_examples", "an ensemble is calibrated on examples that no member was trained on"),
    ):
        for member in members:
            values = [each["config"][field] for each in (first, member)]
            if values[0] != values[1]:
                both = f"{values[0]} in {first['path']} and {values[1]} in {member['path']}"
                raise cli.UserError(f"config.{field} is {both}: {consequence}")


def check_directory(directory: Path, paths: Sequence[Path]) -> None:
    """Raises UserError for a directory that holds something else than an ensemble of these very runs."""
    if not run_dir.is_recorded(directory, "an ensemble"):
        return
    recorded = [member["path"] for member in run_dir.read_members(directory)]
    if not recorded:
        raise cli.UserError(f"{directory} holds a run: use another directory")
    if sorted(recorded) != sorted(map(str, paths)):
        raise cli.UserError(f"{directory} holds an ensemble of other runs: use another directory")
    for member in run_dir.read_recorded(directory)["members"] if run_dir.read_summary(directory) else ():
        now = run_dir.read_summary(Path(member["path"]))  # None if the run is gone, as it may
        if now and now["train_seconds"] != member.get("train_seconds"):
            raise cli.UserError(
                f"{directory} is of {member['path']} as it was before it was trained anew: use another directory"
            )


@pinned()
def check_different(runs: Sequence[Run]) -> None:
    """Raises UserError for two runs that are one and the same network, such as a run and its copy."""
    import jax

    seen: dict[tuple[bytes, ...], Path] = {}
    for each in runs:
        content = tuple(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(each.variables["params"]))
        if content in seen:
            raise cli.UserError(f"{seen[content]} and {each.directory} are the same network: name it once")
        seen[content] = each.directory


def make(
    directory: Path, members: Sequence[Member], started: float, console: Console = terminal.QUIET
) -> dict[str, Any]:
    """Writes an ensemble of runs into a directory, summary.json last; gives the summary.

    Its `total_seconds` are from `started` on, as `time.perf_counter()` gives it.

    Raises:
      UserError: two runs are the same network, or the directory or the dataset cannot be used.
      RunError: a member's checkpoint cannot be read, or the ensemble's not be written.
    """
    import jax

    from mnist_flax.data import datasets
    from mnist_flax.models import cnn
    from mnist_flax.runtime import devices
    from mnist_flax.training import checkpoint, finalize

    mesh = devices.make_mesh()
    runs = [load_run(member["path"]) for member in members]
    check_different(runs)
    splits = datasets.load(runs[0].config)
    with run_dir.claim(directory):
        check_directory(directory, [each.directory for each in runs])  # another process may have come first
        shutil.rmtree(directory / run_dir.CHECKPOINTS, ignore_errors=True)  # of one that was not finished
        run_dir.write_config(directory, runs[0].config, devices.describe(mesh), members)
        checkpoints = checkpoint.Checkpoints(directory / run_dir.CHECKPOINTS, keep=1)
        checkpoints.save(0, cnn.join([each.variables for each in runs]), {}, None)
        checkpoints.close()
        ensemble = load_run(directory)
        variables, config = ensemble.variables, ensemble.config
        about = {
            "members": len(members),
            "seed": config.seed,  # of the first member
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
            "members_test_accuracy": float(np.mean([member["test_accuracy"] for member in members])),
            "train_seconds": sum(member["train_seconds"] for member in members),
        }
        # The training split would take longer than all the rest; `evaluate --split=train` scores it.
        place = (config, splits, directory, mesh)
        return finalize.finalize(ensemble.model, variables, *place, about, started, console, also=("validation",))


def score_disjoint(ensemble: Run, size: int) -> dict[str, Any]:
    """Test accuracy of disjoint ensembles of `size` members, the first ones, the next ones and so on.

    Gives `size`, `test_accuracies`, their `mean` and sample standard `deviation`.
    """
    from mnist_flax.data import datasets
    from mnist_flax.evaluation import metrics
    from mnist_flax.training import scoring

    test = datasets.load(ensemble.config).test
    members = ensemble.model.members
    logits_of = {member: scoring.make_logits(member, ensemble.config.eval_batch_size) for member in members}
    parts = ensemble.model.split(ensemble.variables)
    logits = [logits_of[member](variables, test) for member, variables in zip(members, parts, strict=True)]
    accuracies = metrics.ensemble_accuracies(np.stack(logits), test.labels, size)
    return {
        "size": size,
        "test_accuracies": accuracies.tolist(),
        "mean": float(accuracies.mean()),
        "deviation": float(accuracies.std(ddof=1)),
    }
