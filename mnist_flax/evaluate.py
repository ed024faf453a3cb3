"""Scores a trained model on a whole split.

python -m mnist_flax.evaluate RUN [--split=test] [--views=N | --corruptions]
"""

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
    from mnist_flax.data import datasets
    from mnist_flax.evaluation import metrics
    from mnist_flax.inference import tta
    from mnist_flax.runtime import devices, run_dir, terminal
    from mnist_flax.training import scoring

    if _CORRUPTIONS.value:
        from mnist_flax.ocr import page_reader

        page_reader.require_packages()
    trained = model_flags.load(argv[1])
    config = trained.config
    split = getattr(datasets.load(config), _SPLIT.value)
    if not len(split.labels):
        raise cli.UserError(f"the run has no {_SPLIT.value} examples: choose another --split")
    which = {"dataset": config.dataset, "split": _SPLIT.value, "checkpoint": model_flags.checkpoint(config)}
    devices.keep_compiled_programs()
    if _CORRUPTIONS.value:
        from mnist_flax.evaluation import robustness

        robustness.write(trained, split, which)
        return
    mesh = devices.make_mesh()
    model = trained.model
    name = f"evaluation_{_SPLIT.value}{run_dir.suffix(which, checkpoint=config.checkpoint.select)}"
    if _VIEWS.value > 1:
        model, name = tta.look_again(model, config, _VIEWS.value), f"{name}_{_VIEWS.value}_views"
    evaluation = scoring.make_evaluate(model, mesh)
    logits = scoring.split_logits(evaluation, trained.variables, split, config.eval_batch_size, mesh)
    scores = which | metrics.evaluate_logits(logits, split.labels)
    path = trained.directory / f"{name}.json"
    terminal.print_scores(scores, trained.class_names)
    run_dir.write_json(path, scores)
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
