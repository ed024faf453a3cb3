from tests.commands import refusal


def test_what_is_no_flag_gets_one_line():
    assert "'bfloat16' is no flag" in refusal("experiments.bench_conv", "bfloat16")
