"""Draws the report of a finished run anew: `python -m mnist_flax.report RUN`."""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
from pathlib import Path

from mnist_flax.runtime import cli, run_dir


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise cli.UserError("name one run directory: python -m mnist_flax.report RUN")
    directory = Path(argv[1])
    run_dir.read_config(directory)
    summary = run_dir.read_summary(directory)
    if summary is None:
        raise cli.UserError(f"{directory} is not finished: run its training command again, then this one")
    from mnist_flax.inference import evaluate
    from mnist_flax.runtime import devices

    devices.keep_compiled_programs()
    print(f"written: {evaluate.write_report(directory, summary)}")


if __name__ == "__main__":
    cli.run(main)
