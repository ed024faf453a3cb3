import pytest

from tests.commands import refusal


@pytest.mark.parametrize("sizes", ["a", "2,-1", "0", "1.5", "65", "1" * 5_000])
def test_sizes_of_the_benchmark_that_cannot_be_get_one_line(sizes):
    assert "must be a whole number" in refusal("experiments.bench_population", "--methods=scaling", f"--sizes={sizes}")


@pytest.mark.parametrize("methods", ["scaling,caffe", "caffe"])
def test_methods_of_the_benchmark_that_are_none_get_one_line(methods):
    error = refusal("experiments.bench_population", f"--methods={methods}")
    assert f"--methods={methods} must be some of population," in error


@pytest.mark.parametrize("flag", ["--sizes=", "--methods="])
def test_flags_of_the_benchmark_that_are_empty_get_one_line(flag):
    assert f"{flag} names nothing" in refusal("experiments.bench_population", "--methods=scaling", flag)
