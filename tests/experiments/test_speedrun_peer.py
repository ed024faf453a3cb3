import pytest

from tests.commands import finish, refusal, start


@pytest.mark.parametrize("arguments", [["one"], ["0", "1"], ["1.5"], ["1" * 5_000]], ids=lambda words: words[0][:3])
def test_what_is_no_seed_of_the_peer_gets_one_line(arguments):
    assert "is no seed" in refusal("experiments.speedrun_peer", *arguments)


def test_the_peer_times_no_preparation_of_data(tmp_path):
    code = (
        "import runpy, sys; sys.modules['torch'] = sys; sys.argv = ['it']; "  # PyTorch is not reached
        "runpy.run_module('experiments.speedrun_peer', run_name='__main__')"
    )
    error = finish(start(code, option="-c", TFDS_DATA_DIR=str(tmp_path)), 2).stderr
    assert "MNIST is not prepared: run python -m mnist_flax.main once" in error and len(error.splitlines()) == 1
