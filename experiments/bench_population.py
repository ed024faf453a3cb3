"""Trials an hour: a population beside the same trials one after another, and beside Optuna with PyTorch workers.

    python -m experiments.bench_population [--trials=12] [--methods=population,processes,torch]
    python -m experiments.bench_population --methods=scaling [--sizes=1,2,4,8,16,32,64]

Every method trains the same networks on the same 10,000 examples of MNIST for one epoch with the same learning rates,
and validates on the same 5,000. Times are from the start of the first process to the end of the last, compilation
included: nothing was compiled before. `scaling` compares sizes of one population, its compilation apart. PyTorch
comes with the extra `peers`.
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from mnist_flax.configs.studies import throughput
from mnist_flax.data import datasets
from mnist_flax.experiments.benchmarks import cores
from mnist_flax.experiments.benchmarks.contenders import TORCH_ENVIRONMENT
from mnist_flax.experiments.research import extra
from mnist_flax.runtime import cli, devices, terminal

CONFIG = "configs/studies/throughput.py"

_METHODS = flags.DEFINE_list("methods", ["population", "processes", "torch"], "what to measure, in this order.")
_TRIALS = flags.DEFINE_integer("trials", 12, "number of trials.", lower_bound=2)
_SIZES = flags.DEFINE_list("sizes", ["1", "2", "4", "8", "16", "32", "64"], "populations of `scaling`.")
_WORKER = flags.DEFINE_string("worker", None, "internal: database of which this process is a PyTorch worker.")


def learning_rates(trials: int) -> list[float]:
    return [entry["optimizer.learning_rate"] for entry in itertools.islice(throughput.sweep(), trials)]


def population(trials: int, place: Path) -> list[float]:
    """The study command of this project, one worker; gives the validation accuracies."""
    import optuna

    size = (f"--trials={trials}", f"--population={trials}")
    _run("mnist_flax.experiments.study", f"--config={CONFIG}", f"--workdir={place / 'study'}", *size, place=place)
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{place / 'study' / 'study.db'}")
    return [1 - trial.value for trial in study.trials if trial.value is not None]


def processes(trials: int, place: Path) -> list[float]:
    """The same runs by the training command, one after another; the first one's compiled program serves the others."""
    accuracies = []
    for number, rate in enumerate(learning_rates(trials)):
        workdir = place / str(number)
        override = f"--config.optimizer.learning_rate={rate}"
        _run("mnist_flax.main", f"--config={CONFIG}", override, f"--workdir={workdir}", place=place)
        accuracies.append(json.loads((workdir / "summary.json").read_text())["validation_accuracy"])
    return accuracies


def torch(trials: int, place: Path) -> list[float]:
    """Optuna's own way: as many PyTorch processes as cores, one thread each, on one study."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = f"sqlite:///{place / 'study.db'}"
    study = optuna.create_study(storage=url, study_name="study", direction="maximize")
    for rate in learning_rates(trials):
        study.enqueue_trial({"learning_rate": rate})
    line = [sys.executable, "-m", "mnist_flax.experiments.bench_population", f"--worker={url}"]
    environment = os.environ | TORCH_ENVIRONMENT
    workers = [subprocess.Popen(line, env=environment) for _ in cores.usable()]
    if any([worker.wait() for worker in workers]):
        raise cli.RunError("a PyTorch worker failed")
    return [trial.value for trial in study.trials if trial.value is not None]


def torch_worker(url: str) -> None:
    import optuna
    import torch
    from torch import nn

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    config = throughput.get_config()
    splits = datasets.load(config)
    train, validation = (
        (torch.from_numpy(split.images)[:, None].float() / 255, torch.from_numpy(split.labels).long())
        for split in (splits.train, splits.validation)
    )
    steps = len(splits.train.labels) // config.batch_size
    warmup = max(1, round(config.optimizer.warmup_epochs * steps))

    def scale(step: int) -> float:
        fall = (1 + np.cos(np.pi * max(0, step - warmup) / max(1, steps - warmup))) / 2
        final = config.optimizer.final_scale
        return min((step + 1) / warmup, 1) * (final + (1 - final) * fall)

    def objective(trial) -> float:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        inputs = 1
        for outputs in config.model.channels:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            inputs = outputs
        dense = config.model.dense[0]
        layers += [nn.Flatten(), nn.Linear(49 * inputs, dense), nn.ReLU(), nn.Linear(dense, 10)]
        for layer in layers[:-1]:  # as the project's networks begin
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        rate = trial.suggest_float("learning_rate", 1e-6, 1.0, log=True)
        optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        order = torch.from_numpy(datasets.epoch_order(0, 0, len(splits.train.labels), config.batch_size)).long()
        for rows in order:
            loss = nn.functional.cross_entropy(model(train[0][rows]), train[1][rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            right = [(model(x).argmax(1) == y).sum() for x, y in zip(*(v.split(1000) for v in validation), strict=True)]
        return float(sum(right)) / len(validation[1])

    study = optuna.load_study(study_name="study", storage=url)
    waiting = (optuna.trial.TrialState.WAITING,)
    while study.get_trials(deepcopy=False, states=waiting):
        study.optimize(objective, n_trials=1)


def scaling(sizes: list[int]) -> None:
    """Prints seconds with compilation and without, and trained images a second, of populations of these sizes."""
    from mnist_flax.experiments.research import members

    config = throughput.get_config()
    programs = members.Programs.load(config)
    mesh = programs.mesh.size
    terminal.console.print(f"{mesh} x {devices.describe(programs.mesh)['kind']}, {programs.mapping}")
    one = None
    for size in sizes:
        rates = learning_rates(size)
        configs = [members.with_fields(config, {"optimizer.learning_rate": rate}) for rate in rates]
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            trained = members.Population(configs, programs)
            trained.advance(1.0, np.ones(size, bool))
            seconds.append(time.perf_counter() - started)
        per_second = size * config.train_examples / seconds[1]
        one = one or per_second
        line = f"{size:3d} members: {seconds[0]:6.2f} s, then {seconds[1]:6.2f} s, {per_second:8,.0f} images/s"
        terminal.console.print(f"{line}, {per_second / one:5.2f} times the first")


def _run(module: str, *arguments: str, place: Path) -> None:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(place / "cache")}
    ended = subprocess.run([sys.executable, "-m", module, *arguments], env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise cli.RunError(f"{module} failed: {ended.stderr.strip()[-300:]}")


METHODS = {"population": population, "processes": processes, "torch": torch}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise cli.UserError(f"{argv[1]!r} is no flag")
    if _WORKER.value:
        torch_worker(_WORKER.value)
        return
    if not _METHODS.value or not {*METHODS, "scaling"} >= set(_METHODS.value):
        raise cli.UserError(f"--methods={','.join(_METHODS.value)} must be some of {','.join(METHODS)},scaling")
    most = len(list(throughput.sweep()))
    for size in _SIZES.value or [""]:
        if not size.isdecimal() or not 1 <= int(size[:20]) <= most:
            raise cli.UserError(f"--sizes={size} must be a whole number from 1 to {most}, or several: 1,2,4")
    if {"population", "torch"} & set(_METHODS.value):
        extra.require("optuna")
    if "torch" in _METHODS.value:
        extra.require("torch")
    if "scaling" in _METHODS.value:
        from mnist_flax.experiments.research import members

        members.use_all_cores()
        devices.available()
    datasets.load(throughput.get_config())  # prepared before anything is timed
    table = terminal.table("method", "seconds", "trials/hour", "validation accuracy, mean and best")
    for method in _METHODS.value:
        if method == "scaling":
            scaling([int(size) for size in _SIZES.value])
            continue
        with tempfile.TemporaryDirectory() as place:
            started = time.perf_counter()
            found = METHODS[method](_TRIALS.value, Path(place))
            seconds = time.perf_counter() - started
        scores = f"{np.mean(found):.2%}, {max(found):.2%}"
        table.add_row(f"{method}, {len(found)} trials", f"{seconds:.1f}", f"{3600 * len(found) / seconds:,.0f}", scores)
    if table.rows:
        terminal.console.print(table)


if __name__ == "__main__":
    cli.run(main)
