"""A URL is not a path: it is refused before anything is written, by every command."""

import pytest

from mnist_flax.data import prepare
from mnist_flax.inference.run import load_run
from mnist_flax.runtime import config as config_lib
from mnist_flax.runtime.cli import UserError
from tests.commands import command


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("mnist_flax.main", ["--workdir=gs://bucket/run"], "--workdir=gs://bucket/run is a URL, not a path: name one"),
        ("mnist_flax.main", ["--workdir=file:///data/my%20run"], "write /data/my run"),
        ("mnist_flax.main", ["--config.data_dir=gs://bucket/data"], "config.data_dir=gs://bucket/data is a URL"),
        (
            "mnist_flax.main",
            ["--config.archive_dir=https://a.example"],
            "config.archive_dir=https://a.example is a URL",
        ),
        ("mnist_flax.predict", ["run", "https://a.example/form.png"], "https://a.example/form.png is a URL"),
        ("mnist_flax.export", ["S3://bucket/run", "--format=onnx"], "S3://bucket/run is a URL"),
        ("mnist_flax.export", ["run", "--format=onnx", "--output=s3://bucket"], "--output=s3://bucket is a URL"),
        ("mnist_flax.ensemble", ["a", "b", "--workdir=gs://bucket/e"], "--workdir=gs://bucket/e is a URL"),
        ("experiments.study", ["--config=configs/studies/adam.py", "--workdir=gs://b/study"], "--workdir=gs://b/study"),
        ("experiments.study", ["confirm", "gs://bucket/study"], "gs://bucket/study is a URL"),
        ("experiments.population", ["--output=gs://bucket/all.json"], "--output=gs://bucket/all.json is a URL"),
    ],
)
def test_a_url_is_refused_in_one_line_and_nothing_is_written(module, arguments, said, tmp_path):
    done = command(module, *arguments, status=2, cwd=tmp_path)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert not any(tmp_path.iterdir()) and done.stdout == ""


def test_the_library_refuses_it_too():
    with pytest.raises(UserError, match="gs://bucket/run is a URL"):
        load_run("gs://bucket/run")
    with pytest.raises(UserError, match="archive_dir file:///data is a URL, not a path: write /data"):
        prepare.prepare("mnist", None, "file:///data")
    config = config_lib.default_config()
    config.data_dir = "memory://data"
    with pytest.raises(UserError, match="memory://data is a URL"):
        config_lib.check_config(config)
