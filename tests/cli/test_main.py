import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mnist_flax.data import datasets
from mnist_flax.runtime import cli, devices, run_dir, terminal
from mnist_flax.training import finalize, loop
from tests.commands import ROOT, command, environment, final_state, finish, records, refusal, start, wait_for

# A small network with everything on that could depend on where a run was stopped.
SMALL = (
    "--config=configs/digits.py",
    "--config.model.channels=(4,8)",
    "--config.model.dense=(16,)",
    "--config.model.dropout_rate=0.2",
    "--config.model.compute_dtype=float32",  # whatever the processor: tolerances are of it
    "--config.optimizer.learning_rate=0.01",
    "--config.model.batch_norm=True",
    "--config.optimizer.ema_decay=0.9",
    "--config.optimizer.accumulate_steps=2",
    "--config.augment.rotation=10.0",
    "--config.augment.shift=2.0",
    "--config.augment.clouds=0.5",
    "--config.num_epochs=3",
)
SUMMARY = {
    "dataset": str,
    "parameters": int,
    "steps": int,
    "epochs": int,
    "train_accuracy": float,
    "validation_accuracy": float,
    "test_accuracy": float,
    "test_loss": float,
    "test_errors": int,
    "train_seconds": float,
    "total_seconds": float,
    "compile_seconds": float,
    "images_per_second": float,
    "device": str,
}


@pytest.fixture(scope="module")
def small(digits_data_dir):
    return (*SMALL, f"--config.data_dir={digits_data_dir}")


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    """A run of `small` that nothing stopped: its directory and what it printed."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    return workdir, command("mnist_flax.main", *small, f"--workdir={workdir}").stdout


def test_leaves_the_run_directory_that_other_tools_rely_on(undisturbed):
    workdir, out = undisturbed
    assert out.splitlines()[0] == str(workdir)
    summary = json.loads((workdir / "summary.json").read_text())
    for key, kind in SUMMARY.items():
        assert isinstance(summary[key], kind), key
    assert summary["dataset"] == "digits" and summary["epochs"] == 3
    assert summary["test_accuracy"] == pytest.approx(1 - summary["test_errors"] / 359, abs=1e-12)
    assert summary["test_accuracy"] > 0.2  # chance is 0.1, and the run is short

    recorded = json.loads((workdir / "config.json").read_text())
    assert recorded["config"]["optimizer"]["ema_decay"] == 0.9
    assert recorded["versions"]["jax"] and recorded["device"]["count"] == 1

    lines = records(workdir)
    assert [(r["epoch"], r["split"]) for r in lines] == [(e, s) for e in (1, 2, 3) for s in ("train", "validation")]
    assert set(lines[0]) == {
        *("step", "epoch", "split", "loss", "accuracy", "learning_rate", "images_per_second", "seconds")
    }
    assert any((workdir / "tb").glob("events.out.tfevents.*"))
    for name in ("learning_curves", "confusion_matrix", "mistakes", "filters", "reliability"):
        assert (workdir / "figures" / f"{name}.png").stat().st_size > 5_000
    assert (workdir / "report.html").stat().st_size > 50_000


def test_the_report_shows_the_summary_as_it_is(undisturbed):
    workdir, _ = undisturbed
    page = (workdir / "report.html").read_text()
    for name, value in json.loads((workdir / "summary.json").read_text()).items():
        assert f">{name.replace('_', ' ')}</th><td>{terminal.shown(name, value)}<" in page, name


def test_a_run_counts_its_own_seconds_whatever_the_process_did_before(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "run", ignore=shutil.ignore_patterns("summary.json"))
    config, mesh = run_dir.read_config(workdir), devices.make_mesh()
    splits = datasets.load(config)
    started = time.perf_counter()
    result = loop.fit(config, splits, 10, workdir, mesh, lambda: False)
    finalize.finalize_training(config, splits, result, workdir, mesh, started, terminal.QUIET)
    spent = time.perf_counter() - started + result.train_seconds
    assert spent < time.perf_counter() - cli.STARTED  # or this shows nothing
    assert json.loads((workdir / "summary.json").read_text())["total_seconds"] <= spent


def test_finished_run_prints_its_summary_and_trains_no_more(undisturbed, small):
    workdir, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    again = command("mnist_flax.main", *small, f"--workdir={workdir}")
    assert "test_accuracy" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_a_path_on_the_command_line_may_begin_at_home(undisturbed, small, tmp_path):
    home = undisturbed[0].parent
    recipe = home / "mine.py"
    recipe.write_text("from mnist_flax.configs.digits import get_config\n")
    arguments = ("--config=~/mine.py", *small[1:], "--workdir=~/run")
    assert "test_accuracy" in finish(start("mnist_flax.main", *arguments, cwd=tmp_path, HOME=str(home))).stdout
    assert not any(tmp_path.iterdir())


def test_evaluate_repeats_the_recorded_score(undisturbed):
    workdir, _ = undisturbed
    out = command("mnist_flax.evaluate", workdir).stdout
    summary = json.loads((workdir / "summary.json").read_text())
    scores = json.loads((workdir / "evaluation_test.json").read_text())
    assert scores["errors"] == summary["test_errors"] and scores["accuracy"] == summary["test_accuracy"]
    assert "95 %" in out
    command("mnist_flax.evaluate", workdir, "--split=validation", "--checkpoint=best")
    best = max(r["accuracy"] for r in records(workdir) if r["split"] == "validation")
    assert not (workdir / "evaluation_validation.json").exists()  # which is of the checkpoint that the config selects
    validation = json.loads((workdir / "evaluation_validation_best.json").read_text())
    assert validation["accuracy"] == pytest.approx(best, abs=1e-6)
    assert (scores["checkpoint"], validation["checkpoint"]) == ("last", "best")


@pytest.mark.slow
@pytest.mark.parametrize("feed", ["device", "stream"])
def test_killed_anywhere_and_started_again_ends_bit_for_bit_the_same(feed, small, undisturbed, tmp_path):
    arguments = (*small, f"--config.feed={feed}", f"--workdir={tmp_path / 'run'}")
    chance = random.Random(feed)
    for epoch in (1, 2):  # killed at a random moment after this epoch was recorded
        process = start("mnist_flax.main", *arguments)
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and f'"epoch": {epoch}' in metrics.read_text(), process)  # noqa: B023
        try:
            process.wait(chance.uniform(0, 0.5))
        except Exception:
            process.kill()
        finish(process, None)
    command("mnist_flax.main", *arguments)
    assert final_state(tmp_path / "run") == final_state(undisturbed[0])
    strip = ("step", "epoch", "split", "loss", "accuracy", "learning_rate")
    for mine, theirs in zip(records(tmp_path / "run"), records(undisturbed[0]), strict=True):
        assert [mine[key] for key in strip] == [theirs[key] for key in strip]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_prints_the_command_that_resumes(number, small, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = start("mnist_flax.main", *small, f"--workdir={workdir}")
    wait_for(lambda: (workdir / "metrics.jsonl").exists(), process)
    process.send_signal(number)
    out = finish(process, 0).stdout
    assert not (workdir / "summary.json").exists()
    resume = out.splitlines()[-1]
    assert resume.startswith("python -m mnist_flax.main ") and str(workdir) in resume
    command("mnist_flax.main", *small, f"--workdir={workdir}")
    assert final_state(workdir) == final_state(undisturbed[0])


def test_damaged_latest_checkpoint_falls_back_with_a_warning(small, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = start("mnist_flax.main", *small, f"--workdir={workdir}")
    checkpoints = workdir / "checkpoints"
    wait_for(lambda: len([p for p in checkpoints.glob("*") if p.name.isdigit()]) == 2, process)
    process.kill()
    finish(process, None)
    latest = max((p for p in checkpoints.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    largest = max((p for p in latest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    again = command("mnist_flax.main", *small, f"--workdir={workdir}")
    assert f"Checkpoint {latest.name} is damaged" in again.stderr
    assert final_state(workdir) == final_state(undisturbed[0])


def test_ended_before_its_summary_and_its_metrics_cut_it_is_made_whole(small, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed[0], workdir)
    (workdir / "summary.json").unlink()
    *_, last = sorted((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for step in range(int(last.name) - 5, int(last.name)):  # as if it had died before it removed what it need not keep
        shutil.copytree(last, last.with_name(str(step)), dirs_exist_ok=True)
    metrics = (workdir / "metrics.jsonl").read_bytes()
    (workdir / "metrics.jsonl").write_bytes(metrics[: len(metrics) * 2 // 3])
    command("mnist_flax.main", *small, f"--workdir={workdir}")
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    assert (workdir / "summary.json").exists()
    assert len(list((workdir / "checkpoints").iterdir())) <= 3


def test_a_run_that_another_process_finished_meanwhile_is_left_as_it_is(small, undisturbed, digits_data_dir, tmp_path):
    data_dir, workdir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(digits_data_dir, data_dir)
    (data_dir / ".mnist_flax" / "digits.npz").unlink(missing_ok=True)
    with (data_dir / ".mnist_flax" / "digits.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the process waits for its data
        process = start("mnist_flax.main", *small, f"--config.data_dir={data_dir}", f"--workdir={workdir}")
        wait_for(lambda: "digits.lock" in _open_files(process.pid), process)
        shutil.copytree(undisturbed[0], workdir)
        before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != ".lock"}
    assert "test_accuracy" in finish(process, 0).stdout
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != ".lock"}


def _open_files(pid: int) -> str:
    names = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            names.append(os.readlink(link))
    return " ".join(names)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--config=configs/nowhere.py"], "nowhere.py"),
        (["--config.optimizer.learning_rat=0.1"], "learning_rate"),
        (["--config.learning_rate=0.1"], "did you mean config.optimizer.learning_rate?"),
        (["--config.optimizer=adam"], "such as config.optimizer."),
        (["--config.optimizer.eps=0"], "at least 1e-30"),
        (["--config.num_epochs=None"], "a whole number"),
        (["--config.num_epochs=ten"], "num_epochs"),
        (["--config.num_epochs=0"], "at least 1"),
        (["--config.optimizer.learning_rate=nan"], "learning_rate"),
        (["--config.optimizer.learning_rate=1e39"], "finite in float32"),
        (["--config.dataset=minst"], "fashion_mnist"),
        (["--config.model.kernel_sizes=(3,3,3)"], "channels"),
        (["--config.batch_size=100000"], "training examples"),
        (["--config.validation_examples=100000"], "validation_examples"),
        (["--config=configs/speedrun.py", "--config.dataset=digits"], "train_examples=50000 does not fit"),
        (["--workdir=README.md"], "README.md"),
        (["--workdir="], "names nothing"),
        (["--workdir=tests"], "tests"),
        (["--workdir", "--train_only"], "--workdir is followed by --train_only"),
        (["train"], "--config.KEY"),
        (["--confg=configs/digits.py"], "confg"),
        (["configs/digits.py"], "did you mean --config=configs/digits.py?"),
        (["classic"], "did you mean --config=configs/classic.py?"),
        (["seed=1"], "did you mean --config.seed=1?"),
        (["config.optimizer.b1=1"], "did you mean --config.optimizer.b1=1?"),
        (["--config.model.batch_norm", "false"], "--config.KEY=false"),
        (["--seed=1"], "did you mean --config.seed=?"),
        (["--num_epochs=2"], "did you mean --config.num_epochs=?"),
        (["--config=configs/digits"], "did you mean --config=configs/digits.py?"),
        (["--config=README.md"], "is not a Python file"),
        (["--config=configs/digits.py:x"], "takes no argument: leave out :x"),
        (["--config=configs/default.py:cifar"], "config.dataset='cifar' is unknown"),
        (["--config", "--train_only"], "--config names nothing before --train_only"),
        (["--config.num_epochs=2.5"], "--config.num_epochs=2.5 must be a whole number"),
        (["--config.num_epochs="], "--config.num_epochs= must be a whole number"),
        (["--config.optimizer.learning_rate=0,001"], "must be a number, such as 0.001"),
        (["--config.optimizer.learning_rate=None"], "must be a number, such as 0.001"),
        (["--config.model.batch_norm=yes"], "--config.model.batch_norm=yes must be true or false"),
        (["--config.model.channels=(32, 64"], "must be numbers in parentheses, such as (3,) or (3,5)"),
        (["--config.model.channels=(True,)"], "must hold whole numbers"),
        (["--config.archive_dir="], "config.archive_dir is empty"),
        (["--distributed=maybe"], "--distributed=maybe must be true or false"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(arguments, hint, digits_data_dir):
    base = () if arguments[0].startswith("--config=") else ("--config=configs/digits.py",)
    assert hint in refusal("mnist_flax.main", *base, f"--config.data_dir={digits_data_dir}", *arguments)


COMMANDS = sorted(
    f"{path.parent.name}.{path.stem}"
    for package in ("mnist_flax", "experiments")
    for path in (ROOT / package).glob("*.py")
    if "cli.run(main" in path.read_text()
)


@pytest.mark.parametrize("module", COMMANDS)
def test_ctrl_c_while_it_imports_ends_it_quietly(module):
    process = start(module)
    wait_for(lambda: "_multiarray_umath" in Path(f"/proc/{process.pid}/maps").read_text(), process)  # NumPy comes early
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" not in finish(process, None).stderr


def test_what_does_not_fit_is_refused_before_data_are_prepared(tmp_path):
    for override, hint in (
        ("--config.batch_size=33", "a multiple of the 2 devices"),
        ("--config.batch_size=2_000", "larger than the 1,319 training examples"),
        ("--config.train_examples=1_400", "1,319 are left"),
    ):
        place = (f"--config.data_dir={tmp_path / 'data'}", f"--workdir={tmp_path / 'run'}")
        ended = command("mnist_flax.main", "--config=configs/digits.py", override, *place, devices=2, status=2)
        assert hint in ended.stderr and ended.stderr.count("\n") == 1
        assert not any(tmp_path.iterdir())


def test_another_program_may_import_the_package_and_is_left_alone(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("import gc, mnist_flax\nprint(gc.get_threshold()[0])\n")
    out = subprocess.run([sys.executable, script, "experiments.csv"], env=environment(), capture_output=True, text=True)
    assert int(out.stdout) < 100_000


def test_help_names_the_flags_that_modules_share():
    for module, shared in (("main", ("--config:", "--num_processes")), ("evaluate", ("--checkpoint", "--data_dir"))):
        out = command(f"mnist_flax.{module}", "--help").stdout
        assert all(flag in out for flag in shared)
    for module in ("predict", "serve"):
        assert "--threshold" in command(f"mnist_flax.{module}", "--help", status=None).stdout
    finish(start("import mnist_flax.predict, mnist_flax.serve", option="-c"))  # a flag is defined once


def test_another_config_in_the_directory_is_refused_and_named(undisturbed, small):
    workdir, _ = undisturbed
    before = (workdir / "config.json").read_bytes()
    assert "seed: 0 -> 1" in refusal("mnist_flax.main", *small, "--config.seed=1", f"--workdir={workdir}")
    assert (workdir / "config.json").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(small, tmp_path):
    workdir = tmp_path / "run"
    arguments = (
        *small,
        "--config.optimizer.name=sgd",
        "--config.optimizer.learning_rate=3e38",
        "--config.optimizer.warmup_epochs=0.0",
    )
    ended = command("mnist_flax.main", *arguments, f"--workdir={workdir}", status=1)
    assert "the loss became" in ended.stderr and "at step " in ended.stderr
    assert not (workdir / "summary.json").exists()


def test_patience_and_target_stop_early(small, tmp_path):
    workdir = tmp_path / "run"
    command("mnist_flax.main", *small, "--config.target_accuracy=0.05", f"--workdir={workdir}")
    assert json.loads((workdir / "summary.json").read_text())["epochs"] == 1


def test_runs_from_any_directory_under_a_new_name(small, tmp_path):
    out = command("mnist_flax.main", *small, "--config.num_epochs=1", cwd=tmp_path).stdout
    workdir = tmp_path / out.splitlines()[0]
    assert workdir.parent == tmp_path / "runs" / "digits"
    assert (workdir / "summary.json").exists()


def test_imports_neither_tensorflow_nor_what_only_tools_need(small, tmp_path):
    code = (
        "import sys; from mnist_flax.training import finalize, loop; from mnist_flax.data import datasets; "
        "bad = {'tensorflow', 'sklearn', 'matplotlib', 'skimage', 'torch', 'optuna'} & set(sys.modules); "
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
