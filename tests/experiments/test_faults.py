import pytest

from mnist_flax.experiments.faults import campaign as faults
from mnist_flax.experiments.faults import sabotage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    return root, faults.prepare(root)


@pytest.mark.parametrize("name", ["test-0", "test-1"])
def test_some_disturbances_are_survived(name, campaign):
    """A short campaign of the same disturbances at every time; `python -m experiments.faults` is the long one."""
    root, reference = campaign
    records = faults.attack(root, name, 5, reference, disks=sabotage.can_mount(root / "mount"))
    assert records and not [record for record in records if record["violations"]], records


def test_what_is_amiss_is_found(campaign, tmp_path):
    """The checks themselves: each finds the harm that it is there for."""
    root, reference = campaign
    site = sabotage.Site(tmp_path / "site", root / "cache", data_dir=root / "data", disks=False)
    ended = site.start().end()
    assert not site.violations(ended, {0}) and not site.differences(reference)

    assert site.violations(ended._replace(status=1), {0}) == ["status 1", "0 lines of error at status 1"]
    assert site.violations(ended._replace(err="Traceback (most recent call last)"), {0}) == ["a traceback"]
    assert site.differences({**reference, "state": "another"}) == ["another state"]
    metrics = site.workdir / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + metrics.read_text().splitlines()[0] + "\n")
    assert "metrics.jsonl has" in site.violations(ended, {0})[0]
    assert site.differences(reference) == ["another metrics"]
    newest = site.workdir / "checkpoints" / str(site.steps()[-1])
    newest.rename(newest.with_name("elsewhere"))
    assert any("was lost" in violation for violation in site.violations(ended, {0}))
    site.close(keep=False)
