from tests.commands import refusal


def test_a_place_to_save_to_that_is_not_there_gets_one_line():
    assert "--directory=nope/x is no directory" in refusal("experiments.bench_saving", "--directory=nope/x")
