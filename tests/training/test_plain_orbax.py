"""A checkpoint is read by the lines of README, which know nothing of this package."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mnist_flax.inference.run import load_run
from mnist_flax.runtime import config as config_lib
from mnist_flax.training import checkpoint
from mnist_flax.training.state import init_state
from tests.commands import ROOT, command, environment

LINES = re.search(r"```python\n(from pathlib import Path\nfrom orbax.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
SHOW = """
import hashlib, json, sys
import jax
leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
assert jax.device_count() == 1 and "mnist_flax" not in sys.modules
print(json.dumps({jax.tree_util.keystr(path): hashlib.sha256(leaf.tobytes()).hexdigest() for path, leaf in leaves}))
"""


def read_plainly(directory: Path) -> dict[str, str]:
    """Digests of the variables by their place, as README's lines give them in a process of one device."""
    step = max(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())
    code = LINES.replace("RUN/", "").replace("STEP", str(step)) + SHOW
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=directory, env=environment(), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def digests(variables: dict) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    return {jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for path, leaf in leaves}


def test_a_run_on_two_devices_is_read_on_one(digits_data_dir, tmp_path):
    command(
        "mnist_flax.main",
        *("--config=configs/digits.py", "--config.num_epochs=1", "--config.model.channels=(4,)", "--train_only"),
        *(f"--config.data_dir={digits_data_dir}", f"--workdir={tmp_path}", "--config.model.batch_norm=True"),
        devices=2,
    )
    trained = load_run(tmp_path)
    assert read_plainly(tmp_path) == digests(trained.variables)
    assert trained.config.optimizer.ema_decay > 0  # the averages, not the parameters of the last step


@pytest.mark.parametrize("batch_norm", [False, True])
def test_without_averages_the_parameters_are_read(batch_norm, tmp_path):
    config = config_lib.default_config()
    config.optimizer.ema_decay, config.model.batch_norm, config.model.channels = 0.0, batch_norm, (4, 4, 4)
    state = init_state(config, 10, 0)
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", 1)
    checkpoints.save(1, state, {}, None)
    checkpoints.close()
    assert read_plainly(tmp_path) == digests(state.variables())


def test_an_ensemble_is_read(digits_ensemble):
    directory, _ = digits_ensemble
    assert read_plainly(directory) == digests(load_run(directory).variables)
