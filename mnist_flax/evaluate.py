"""Scores a trained model on a whole split.

python -m mnist_flax.evaluate RUN [--split=test] [--views=N | --corruptions]
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
from absl import flags

from mnist_flax.inference import model_flags
from mnist_flax.runtime import cli

flags.adopt_module_key_flags(model_flags)
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "split to score.")
_CORRUPTIONS = flags.DEFINE_bool(
    "corruptions", False, "instead, how well the split is read corrupted, turned, scaled and shifted, and how surely."
)
_VIEWS = flags.DEFINE_integer(
    "views",
    1,
    "copies of each image, slightly moved, whose mean probabilities are the answer; 1 is the image itself.",
    lower_bound=1,
    upper_bound=2**31 - 1,
)


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise cli.UserError("name one run directory: python -m mnist_flax.evaluate RUN")
    if _VIEWS.value > 1 and _CORRUPTIONS.value:
        raise cli.UserError("--corruptions reads each image once: leave out --views")
    if _CORRUPTIONS.value:
        from mnist_flax.ocr import page_reader

        page_reader.require_packages()
    trained = model_flags.load(argv[1])
    from mnist_flax.inference import evaluate
    from mnist_flax.runtime import devices, run_dir, terminal

    devices.keep_compiled_programs()
    checkpoint = model_flags.checkpoint(trained.config)
    selected = trained.config.checkpoint.select
    if _CORRUPTIONS.value:
        from mnist_flax.evaluation import report, robustness

        results, figures = evaluate.evaluate_corruptions(trained, _SPLIT.value, checkpoint)
        # Of anything but what the run is judged by, files have another name, and the report does not show them.
        suffix = run_dir.suffix(results, split="test", checkpoint=selected)
        report.save_figures(trained.directory, {f"{name}{suffix}": figure for name, figure in figures.items()})
        name = f"robustness{suffix}"
        robustness.print_results(results)
    else:
        results = evaluate.evaluate(trained, _SPLIT.value, checkpoint, _VIEWS.value)
        name = f"evaluation_{_SPLIT.value}{run_dir.suffix(results, checkpoint=selected)}"
        name += f"_{_VIEWS.value}_views" if _VIEWS.value > 1 else ""
        terminal.print_scores(results, trained.class_names)
    path = trained.directory / f"{name}.json"
    run_dir.write_json(path, results)
    print(f"written to {path}" + (f" and {path.parent / run_dir.FIGURES}" if _CORRUPTIONS.value else ""))


if __name__ == "__main__":
    cli.run(main)
