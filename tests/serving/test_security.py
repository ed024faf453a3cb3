"""What comes from a stranger is data: run directories, checkpoints, datasets, studies and exports execute nothing."""

import ast
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import optuna
import pytest

from mnist_flax.data import prepare
from mnist_flax.evaluation import metrics, report
from mnist_flax.experiments import report as study_report
from mnist_flax.experiments.research import confirm, directory, space, study_axes
from mnist_flax.runtime import metrics_log, run_dir
from mnist_flax.runtime.config import default_config
from tests.commands import ROOT, command, environment, refusal

# In the words of pickle's protocol 0: touch the file that the process was told of.
PAYLOAD = b"cos\nsystem\n(S'touch \"$MARKER\"'\ntR."

# Tries every loader on every file, each replaced by a pickle that would leave a mark, and on the file as it should be.
LOADERS = """
import json, os, pathlib, shutil, sys
import numpy as np

# Imported before anybody listens: some packages find classes by pickle's means while they are imported.
import jax, optuna
from mnist_flax.data import datasets, idx, prepare
from mnist_flax.experiments import report as study_report
from mnist_flax.experiments.research import directory, storage
from mnist_flax.inference import classifier, formats
from mnist_flax.inference.run import load_run
from mnist_flax.runtime import metrics_log, run_dir
from orbax.checkpoint import v1

place, payload = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).read_bytes()
heard = []
WATCHED = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")
sys.addaudithook(lambda event, arguments: heard.append((event, arguments)) if event in WATCHED else None)
os.environ["MARKER"] = str(place / "marker")

def attempt(function, *arguments):
    try:
        function(*arguments)
        return True
    except Exception:
        return False

def readers(trained):
    config = run_dir.read_config(trained)
    return [
        lambda: run_dir.read_summary(trained) or 1 / 0, lambda: metrics_log.read_records(trained / "metrics.jsonl"),
        lambda: load_run(trained, "last"), lambda: load_run(trained, "best"),
        lambda: classifier.load_classifier(load_run(trained)), lambda: datasets.load(config),
    ]

def read_all(trained):
    return [attempt(reader) for reader in readers(trained)] if attempt(run_dir.read_config, trained) else []

counts = {"files": 0, "refused": 0}
trained = place / "run"
assert all(read_all(trained)), "a sound run directory is read by every loader"
for path in sorted(p for p in [*trained.rglob("*"), *(place / "data").rglob("*")] if p.is_file()):
    if path.suffix == ".lock" or path.name == ".lock" or path.parts[-2] in ("tb", "figures"):
        continue
    before = path.read_bytes()
    path.write_bytes(payload)
    counts["files"] += 1
    counts["refused"] += not all(read_all(trained) or [False])
    path.write_bytes(before)

# The decoded copy of a dataset: an array of objects is a pickle inside a sound .npz file.
class Evil:
    def __reduce__(self):
        return os.system, ('touch "$MARKER"',)

prepared = prepare.prepare("digits", str(place / "data"))
cache = prepared.work / "digits.npz"
evil = np.array([Evil()], object)
np.savez(cache, fingerprint=np.array(datasets._fingerprint(prepared.directory)), train_images=evil, train_labels=evil,
         test_images=evil, test_labels=evil)
assert b"touch" in cache.read_bytes()
datasets.load(run_dir.read_config(trained))
np.save(cache.with_suffix(".npy"), evil, allow_pickle=True)
os.replace(cache.with_suffix(".npy"), cache)
datasets.load(run_dir.read_config(trained))

# Exports, sound and not.
reader = load_run(trained)
images = np.zeros((2, 28, 28), np.uint8)
for name in ("stablehlo", "safetensors"):
    kind = formats.FORMATS[name]
    kind.write(reader, images, place / kind.file_name)
    assert kind.load(place / kind.file_name)(images).shape == (2, 10)
for kind in formats.FORMATS.values():
    (place / kind.file_name).write_bytes(payload)
    assert not attempt(kind.load, place / kind.file_name), kind.file_name

# A study: sound, then each of its files.
study_place = place / "study"
record = directory.read(study_place)
study_report.read_trials(directory.open_study(record, storage.connect(record.storage, 60)), "validation_error")
for name in ("study.db", "study.json", "config.json"):
    before = (study_place / name).read_bytes()
    (study_place / name).write_bytes(payload)
    assert not attempt(lambda: directory.open_study(directory.read(study_place), storage.connect(record.storage, 60)))
    (study_place / name).write_bytes(before)

heard_by_name = [event for event, _ in heard]
print(json.dumps({**counts, "heard": heard_by_name, "details": [str(h)[:200] for h in heard][:5]}))
"""


@pytest.fixture(scope="module")
def stranger(digits_run, digits_data_dir, tmp_path_factory):
    """A place with a run, its dataset and a study, as an archive from somebody else would hold."""
    place = tmp_path_factory.mktemp("stranger")
    shutil.copytree(digits_run, place / "run")
    shutil.copytree(digits_data_dir / "digits", place / "data" / "digits")
    steps = sorted((path for path in (place / "run" / "checkpoints").iterdir() if path.name.isdigit()), key=by_step)
    for path in steps[:-1]:
        shutil.rmtree(path)
    recorded = json.loads((place / "run" / "config.json").read_text())
    recorded["config"]["data_dir"] = str(place / "data")
    (place / "run" / "config.json").write_text(json.dumps(recorded))
    definition = space.Definition(default_config(), {"seed": space.integer(0, 9)}, [], space.Plan())
    record = directory.prepare(place / "study", definition, None)
    study = optuna.create_study(storage=record.storage, study_name=record.name)
    study.add_trial(optuna.create_trial(value=0.5, params={}, distributions={}, user_attrs={"config": {}}))
    return place


def by_step(path: Path) -> int:
    return int(path.name)


def test_no_loader_executes_what_it_reads(stranger):
    (stranger / "payload").write_bytes(PAYLOAD)
    live = "import pickle, sys; pickle.loads(open(sys.argv[1], 'rb').read())"
    variables = environment() | {"MARKER": str(stranger / "live")}
    subprocess.run([sys.executable, "-c", live, str(stranger / "payload")], env=variables, check=True)
    assert (stranger / "live").exists()  # the trap works

    arguments = [sys.executable, "-c", LOADERS, str(stranger), str(stranger / "payload")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert not (stranger / "marker").exists()
    assert result["heard"] == [], result
    # Of a checkpoint some files are only hints; whatever is read for its content is refused.
    assert result["files"] >= 15 and result["refused"] >= 8, result


def test_nothing_here_can_unpickle_or_evaluate():
    """Neither by the standard library nor by the packages that would do it for us."""
    banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch.load"}
    for path in [*(ROOT / "mnist_flax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
            elif isinstance(node, ast.Call):
                names = [ast.unparse(node.func)]
                assert names[0] not in ("eval", "exec", "compile", "__import__", "os.system"), f"{path}:{node.lineno}"
                unpickles = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
                assert not unpickles, f"{path}:{node.lineno}"
            assert not banned & set(names), f"{path}:{node.lineno} uses {names}"


def test_a_dataset_that_names_a_module_does_not_get_it_imported(stranger, tmp_path):
    """TFDS would import it; a run directory may name the dataset beside itself."""
    directory = shutil.copytree(stranger / "data" / "digits", tmp_path / "data" / "digits") / "1.0.0"
    features = (directory / "features.json").read_text()
    (directory / "features.json").write_text(
        features.replace("tensorflow_datasets.core.features.image_feature.Image", "planted.module.Image")
    )
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "module.py").write_text("import pathlib; pathlib.Path('executed').touch()")
    shutil.copytree(stranger / "run", tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    recorded["config"]["data_dir"] = "data"
    (tmp_path / "run" / "config.json").write_text(json.dumps(recorded))

    trap = f"import tensorflow_datasets as tfds; tfds.builder_from_directory({str(directory)!r})"
    subprocess.run([sys.executable, "-c", trap], capture_output=True, env=environment(), cwd=tmp_path)
    assert (tmp_path / "executed").exists()  # the trap works
    (tmp_path / "executed").unlink()

    assert "359 examples" in command("mnist_flax.evaluate", "run", cwd=tmp_path).stdout
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("change", [{"channels": [8, 17]}, {"channels": [3000, 3000]}, {"batch_norm": True}], ids=str)
def test_a_config_that_does_not_fit_its_checkpoint_gets_one_line(stranger, tmp_path, change):
    """Before a single array is read, so that what a config claims costs nothing."""
    workdir = shutil.copytree(stranger / "run", tmp_path / "run")
    recorded = json.loads((workdir / "config.json").read_text())
    before = dict(recorded["config"]["model"])
    recorded["config"]["model"] |= (
        change if change != {"batch_norm": True} else {"batch_norm": not before["batch_norm"]}
    )
    (workdir / "config.json").write_text(json.dumps(recorded))
    error = command("mnist_flax.evaluate", workdir, status=1).stderr
    assert error.startswith("error: ") and error.count("\n") == 1 and "in a run of this config" in error, error


@pytest.mark.parametrize(
    "planted",
    [
        {"__class__": "os.system"},
        {"config_file": "/tmp/x.py"},
        {"model": {"pythonClassName": "planted.module"}},
        {"optimizer": {"name": "planted.module:optimizer"}},
        {"dataset": "planted.module"},
    ],
    ids=str,
)
def test_a_config_that_names_a_module_is_refused(tmp_path, planted):
    fields = default_config().to_dict()
    for key, value in planted.items():
        fields[key] = {**fields[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps({"config": fields}))
    message = "is no known field|has no key|is unknown|Key .* does not exist|damaged"
    with pytest.raises(run_dir.UserError, match=message):
        run_dir.read_config(tmp_path)


def test_what_is_written_into_a_directory_goes_through_no_link_in_it(stranger, tmp_path):
    """An archive may hold links to files outside; they are replaced, not followed."""
    workdir = shutil.copytree(stranger / "run", tmp_path / "run")
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (workdir / "calibration.json").unlink(missing_ok=True)
    names = ["report.html", "report.html.tmp", "evaluation_test.json.tmp", "metrics.jsonl.tmp", ".lock", ".lock.tmp"]
    names += ["figures/filters.png", "figures/mistakes.png.tmp", "evaluation_test.json", "calibration.json.tmp"]
    for name in names:
        (workdir / name).unlink(missing_ok=True)
        (workdir / name).symlink_to(outside)
    command("mnist_flax.report", workdir)
    command("mnist_flax.evaluate", workdir)
    metrics_log.Metrics(workdir, (workdir / "metrics.jsonl").read_text()).close()
    with run_dir.claim(workdir):
        pass
    assert outside.read_text() == "mine"
    assert json.loads((workdir / "evaluation_test.json").read_text())["examples"] == 359


def test_the_config_that_a_study_writes_holds_no_code_of_its_name(tmp_path):
    name = f'a"""\nopen({str(tmp_path / "executed")!r}, "w")\r\n\x0copen({str(tmp_path / "executed")!r}, "w")\n"""'
    study = optuna.create_study(study_name=name)
    fields = {"optimizer.learning_rate": 0.5, "data_dir": '"""', "model.channels": [3, 3]}
    study.add_trial(optuna.create_trial(value=0.5, params={}, distributions={}, user_attrs={"config": fields}))
    place = tmp_path / 'p"""\nraise SystemExit'
    place.mkdir()
    path = confirm.write_winner(place, study, default_config())
    out = refusal("mnist_flax.main", f"--config={path}", "--config.seed=-1")
    assert "seed" in out  # the file was run, and is a config
    assert not (tmp_path / "executed").exists()


# Reports


class Elements(HTMLParser):
    """Every element of a page, with its attributes; raw text of `script` and `style` as a browser takes it."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</title></style></table><iframe src=javascript:alert(1)>",
    "<!--",
    "<a href=javascript:alert(1)>&lt;b&gt;",
    "\ud800<b>",
)


def is_harmless(page: str, known: set[str]) -> Elements:
    elements = Elements(page)
    for tag, attributes in elements.found:
        assert tag in known, tag
        assert not any(name.startswith("on") or name == "href" for name in attributes), attributes
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    assert [tag for tag, _ in elements.found].count("meta") == 3
    return elements


KNOWN = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2", "p", "code", "b"),
    *("small", "dl", "div", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"),
    *("figure", "img", "figcaption"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_run_report_escapes_whatever_it_shows(attack):
    scores = metrics.evaluate_logits(np.eye(10), np.arange(10))
    summary = {"dataset": attack, "device": attack, "parameters": attack, attack: attack, "test_accuracy": 0.5}
    recorded = {"config": {attack: {attack: attack}, "list": [attack]}, "versions": {"jax": attack}}
    page = report.page(attack, summary, scores, [attack] * 10, recorded, {"filters": b"png"})
    elements = is_harmless(page, KNOWN)
    assert elements.text.count(attack) >= 15  # shown as it is, in every place


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_study_report_escapes_whatever_it_shows(attack):
    scale = {
        "kind": "choice",
        "low": 0,
        "high": 0,
        "log": False,
        "values": [attack, "b"],
        "condition": [attack, [attack]],
    }
    plan = space.Plan(question=attack, scientific=(attack,))
    config = default_config()
    config.dataset = attack
    record = directory.StudyRecord(attack, "sqlite:///x", config, plan, {attack: scale})
    trial = study_axes.Trial(0, {attack: attack}, "complete", 0.1, [])
    failed = optuna.create_trial(state=optuna.trial.TrialState.FAIL, user_attrs={"error": attack})
    page = study_report.page(record, [trial], [failed], [attack], None, {"curves": b"png"})
    assert is_harmless(page, KNOWN).text.count(attack) >= 8


@pytest.mark.parametrize("text", ["$\\frac$", "<b>", "a b", ""])
def test_a_study_that_would_draw_formulas_or_tags_is_refused(stranger, tmp_path, text):
    place = shutil.copytree(stranger / "study", tmp_path / "study")
    details = json.loads((place / "study.json").read_text())
    details["space"]["model.head"] = {"kind": "choice", "values": [text], "log": False, "condition": None}
    (place / "study.json").write_text(json.dumps(details))
    with pytest.raises(run_dir.UserError, match="was damaged"):
        directory.read(place)


def test_nothing_here_unpacks_archives():
    """What is not there cannot write outside its directory: gzip members have no names that are used."""
    for path in (ROOT / "mnist_flax").rglob("*.py"):
        text = path.read_text()
        assert not any(word in text for word in ("tarfile", "extractall", "unpack_archive", "ZipFile(")), path
    assert os.sep not in "".join(name for files in prepare.idx.ARCHIVES.values() for name in files)
