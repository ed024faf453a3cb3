"""Trains a model as a config says: `python -m mnist_flax.main --config=configs/default.py [--workdir=DIR]`."""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import shlex
import sys
from pathlib import Path

from absl import flags

from mnist_flax.runtime import cli, config_flag, distributed, run_dir, terminal
from mnist_flax.runtime import config as config_lib

_CONFIG, _ARGUMENTS = config_flag.define_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "run directory; a new one under runs/ if not given.")
_TRAIN_ONLY = flags.DEFINE_bool("train_only", False, "end before the test set is scored; without it the run goes on.")
distributed.define_flags()
flags.adopt_module_key_flags(distributed)
flags.declare_key_flag("config")


def main(argv: list[str]) -> int:
    config_flag.refuse_arguments(argv)
    config = _CONFIG.value
    config_lib.check_config(config)
    directory = Path(_WORKDIR.value or run_dir.new_directory(Path(config_flag.recipe_path()).stem))
    again = shlex.join(["python", "-m", "mnist_flax.main", *sys.argv[1:]])
    if not _WORKDIR.value:
        again += f" --workdir={shlex.quote(str(directory))}"

    farewell = f"stopped; this command goes on from here:\n{again}"
    with distributed.job(_WORKDIR.value) as is_first:
        if is_first:
            print(directory, flush=True)
        if finished := run_dir.read_finished(directory, config):
            terminal.print_summary(finished)
            return 0

        stop = cli.Stop(farewell)
        from mnist_flax.runtime import devices
        from mnist_flax.training.train import train

        devices.keep_compiled_programs()
        score, started = not _TRAIN_ONLY.value, cli.STARTED
        if train(config, directory, stop=stop, score=score, console=terminal.console, started=started):
            return 0
    if is_first:
        print(farewell)
    return 0


if __name__ == "__main__":
    cli.run(main, _ARGUMENTS)
