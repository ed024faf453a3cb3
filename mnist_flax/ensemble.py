"""Makes one model of several runs: `python -m mnist_flax.ensemble RUN RUN... [--workdir=DIR] [--disjoint=K]`.

Members are taken as they are named; see `mnist_flax.inference.ensemble`.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
from pathlib import Path

from absl import flags

from mnist_flax.inference import ensemble
from mnist_flax.inference.run import load_run
from mnist_flax.runtime import cli, run_dir, terminal

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the ensemble; a new one under runs/ if not given.")
_DISJOINT = flags.DEFINE_integer(
    "disjoint",
    None,
    "also score ensembles of this many members that share none, in the order of the runs: mean and deviation.",
    lower_bound=1,
)


def main(argv: list[str]) -> None:
    if len(argv) < 3:
        raise cli.UserError("name two or more finished runs: python -m mnist_flax.ensemble RUN RUN...")
    paths, size = run_dir.distinct(argv[1:]), _DISJOINT.value
    if size and len(paths) < 2 * size:
        raise cli.UserError(f"--disjoint={size} needs {2 * size} runs or more to compare ensembles, not {len(paths)}")
    directory = Path(_WORKDIR.value or run_dir.new_directory("ensemble"))
    print(directory, flush=True)
    ensemble.check_directory(directory, paths)
    from mnist_flax.runtime import devices

    devices.keep_compiled_programs()
    summary = run_dir.read_summary(directory)
    if summary is None:
        members = [ensemble.read_member(path) for path in paths]
        ensemble.check_members(members)
        summary = ensemble.make(directory, members, cli.STARTED, terminal.console)
    elif size and [member["path"] for member in run_dir.read_members(directory)] != list(map(str, paths)):
        raise cli.UserError(
            f"--disjoint={size} goes by the order of the runs, and {directory / 'config.json'} has another: "
            "name them in that order, or another --workdir"
        )
    terminal.print_summary(summary)
    if size:
        scores = ensemble.score_disjoint(load_run(directory), size)
        run_dir.write_json(directory / f"disjoint_{size}.json", scores)
        shown = ", ".join(f"{accuracy:.2%}" for accuracy in scores["test_accuracies"])
        print(f"disjoint ensembles of {size}: test accuracy {shown}")
        print(f"mean {scores['mean']:.3%}, standard deviation {scores['deviation']:.3%}, n = {len(paths) // size}")


if __name__ == "__main__":
    cli.run(main)
