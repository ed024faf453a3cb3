"""Commands say in one line which extra they lack, before any work."""

import pytest

from tests.commands import finish, start


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("optuna", ("experiments.report", "runs/studies/adam"), "research"),
        ("optuna", ("experiments.study", "runs/studies/adam"), "research"),
        ("optuna", ("experiments.bench_population", "--methods=processes,population"), "research"),
        ("torch", ("experiments.bench_population", "--methods=torch"), "peers"),
        ("torch", ("experiments.speedrun_peer", "0"), "peers"),
        ("atheris", ("experiments.fuzz", "--targets=idx"), "fuzz"),
        ("skimage.filters", ("mnist_flax.predict", "runs/digits", "x.png"), "predict"),
        ("uvicorn", ("mnist_flax.serve", "runs/digits"), "serve"),
        ("msgspec", ("mnist_flax.serve", "runs/digits"), "serve"),
    ],
)
def test_without_a_package_one_line_says_what_to_install(package, arguments, extra):
    code = (
        f"import runpy, sys; sys.modules[{package!r}] = None; "  # as Python marks what cannot be imported
        f"sys.argv = ['it', *{arguments[1:]}]; runpy.run_module({arguments[0]!r}, run_name='__main__')"
    )
    error = finish(start(code, option="-c"), 2).stderr
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert error.endswith(f": pip install 'mnist_flax[{extra}]'\n") and package in error.lower()
