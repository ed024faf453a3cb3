"""Trains a model as a config says: `python -m mnist_flax.main --config=configs/default.py [--workdir=DIR]`."""

import shlex
import sys
from pathlib import Path

from absl import flags

from mnist_flax import cli, progress, run
from mnist_flax import config as config_lib

_CONFIG, _ARGUMENTS = config_lib.define_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "run directory; a new one under runs/ if not given.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise cli.UserError(f"{argv[1]!r} is no flag: override a field with --config.KEY=VALUE")
    recipe, config = config_lib.recipe_path(), _CONFIG.value
    config_lib.check(config)
    directory = Path(_WORKDIR.value or run.new_directory(Path(recipe).stem))
    print(directory, flush=True)
    run.check_directory(directory, config)
    finished = run.read_summary(directory)
    if finished:
        progress.print_summary(finished)
        return 0
    again = shlex.join(["python", "-m", "mnist_flax.main", *sys.argv[1:]])
    if not _WORKDIR.value:
        again += f" --workdir={shlex.quote(str(directory))}"

    farewell = f"stopped; this command goes on from here:\n{again}"
    stop = cli.Stop(farewell)
    from mnist_flax import conclude, data, devices, loop

    splits = data.load(config)
    devices.keep_compiled_programs()
    mesh = devices.make_mesh()
    with run.claim(directory):
        run.check_directory(directory, config)  # another process may have come first
        if finished := run.read_summary(directory):
            progress.print_summary(finished)
            return 0
        run.write_config(directory, config, devices.describe(mesh))
        stop.can_wait = True
        result = loop.fit(config, splits, len(data.CLASS_NAMES[config.dataset]), directory, mesh, stop)
        if result.finished:
            conclude.conclude(config, splits, result, directory, mesh)
            return 0
    print(farewell)
    return 0


if __name__ == "__main__":
    cli.run(main, _ARGUMENTS)
