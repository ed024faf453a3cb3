"""Trains a model as a config says: `python -m mnist_flax.main --config=configs/default.py [--workdir=DIR]`."""

import contextlib
import shlex
import sys
from pathlib import Path

from absl import flags

from mnist_flax.runtime import cli, distributed, run_dir, terminal
from mnist_flax.runtime import config as config_lib

_CONFIG, _ARGUMENTS = config_lib.define_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "run directory; a new one under runs/ if not given.")
_TRAIN_ONLY = flags.DEFINE_bool("train_only", False, "end before the test set is scored; without it the run goes on.")
distributed.define_flags()
flags.adopt_module_key_flags(distributed)
flags.declare_key_flag("config")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise cli.UserError(f"{argv[1]!r} is no flag: override a field with --config.KEY=VALUE")
    config = _CONFIG.value
    config_lib.check(config)
    directory = Path(_WORKDIR.value or run_dir.new_directory(Path(config_lib.recipe_path()).stem))
    again = shlex.join(["python", "-m", "mnist_flax.main", *sys.argv[1:]])
    if not _WORKDIR.value:
        again += f" --workdir={shlex.quote(str(directory))}"

    farewell = f"stopped; this command goes on from here:\n{again}"
    with distributed.job(_WORKDIR.value) as is_first:
        if is_first:
            print(directory, flush=True)
        run_dir.check_directory(directory, config)
        if finished := run_dir.read_summary(directory):
            terminal.print_summary(finished)
            return 0

        stop = cli.Stop(farewell)
        from mnist_flax.data import datasets
        from mnist_flax.runtime import devices
        from mnist_flax.training import finalize, loop

        mesh = devices.make_mesh()
        devices.check_batch(config, mesh)
        splits = datasets.load(config)
        devices.keep_compiled_programs()
        with run_dir.claim(directory) if is_first else contextlib.nullcontext():
            if is_first:
                run_dir.check_directory(directory, config)  # another process may have come first
                if finished := run_dir.read_summary(directory):
                    terminal.print_summary(finished)
                    return 0
                run_dir.write_config(directory, config, devices.describe(mesh))
            stop.can_wait = True
            result = loop.fit(config, splits, len(datasets.CLASS_NAMES[config.dataset]), directory, mesh, stop)
            if result.finished:
                if not _TRAIN_ONLY.value:
                    finalize.conclude_training(config, splits, result, directory, mesh)
                return 0
    if is_first:
        print(farewell)
    return 0


if __name__ == "__main__":
    cli.run(main, _ARGUMENTS)
