import json
import sys

import pytest

from tests.commands import command, finish, refusal, start


@pytest.fixture(scope="module")
def sweeps() -> dict[str, list[dict]]:
    """In a process of its own: commands define flags of the same names."""
    code = "import json; from experiments import scaling; print(json.dumps(scaling.SWEEPS))"
    return json.loads(finish(start(code, option="-c")).stdout)


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@needs_linux
def test_what_was_measured_of_one_recipe_is_not_taken_for_another(tmp_path, sweeps):
    """All measurements are there, so that nothing is trained."""
    for recipe, cost in (("classic", 100.0), ("default", 300.0)):
        for fields in (fields for name in ("epochs", "batch") for fields in sweeps[name]):
            measured = {**fields, "images": 60_000, "microseconds_per_image": cost, "compile_seconds": 1.0}
            measured |= {"peak_megabytes": 500.0, "epoch_megabytes": [400.0] * fields["num_epochs"], "device": "cpu"}
            path = tmp_path / f"{recipe}-{'-'.join(map(str, fields.values()))}.json"
            path.write_text(json.dumps(measured))
    for recipe, shown in (("classic", "10,000"), ("default", "3,333")):
        arguments = (f"--config=configs/{recipe}.py", "--sweeps=epochs,batch", f"--output={tmp_path}")
        assert shown in command("experiments.scaling", *arguments).stdout
        results = json.loads((tmp_path / "scaling.json").read_text())
        assert list(results) == ["epochs", "batch"] and len(results["batch"]) == len(sweeps["batch"])
        costs = {row["microseconds_per_image"] for rows in results.values() for row in rows}
        assert costs == {100.0 if recipe == "classic" else 300.0}
        assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("sweeps", ["size", "batch,size"])
def test_a_sweep_that_is_unknown_gets_one_line(tmp_path, sweeps):
    error = refusal("experiments.scaling", f"--sweeps={sweeps}", f"--output={tmp_path / 'out'}")
    assert "must be some of examples,epochs,batch" in error
    assert not (tmp_path / "out").exists()


@needs_linux
def test_what_training_refuses_is_told_once(tmp_path):
    assert "no.py is no file" in refusal("experiments.scaling", "--config=no.py", f"--output={tmp_path}")
