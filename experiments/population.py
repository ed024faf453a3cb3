"""One config under many seeds at once: mean, standard deviation and interval.

python -m experiments.population --config=configs/default.py --seeds=16 --config.num_epochs=3
"""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from mnist_flax.experiments.research import outputs
from mnist_flax.experiments.summarize import add_means, shown
from mnist_flax.runtime import cli, config_flag, run_dir, terminal

if TYPE_CHECKING:
    from mnist_flax.experiments.research import members

_CONFIG, _ARGUMENTS = config_flag.define_flag()
_SEEDS = flags.DEFINE_integer("seeds", 8, "number of members, with seeds from config.seed on.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write the results of all members to.")

SCORES = ("train_loss", "validation_accuracy", "test_accuracy")


def train(population: "members.Population", num_epochs: int) -> list[dict]:
    """Trains all members, a line an epoch, and scores the test split once: seed, step of divergence and SCORES."""
    everyone = np.ones(len(population.members), bool)
    for epoch in range(1, num_epochs + 1):
        population.advance(epoch / num_epochs, everyone)
        latest = [records[-1] for records in population.records]
        alive = [record for record, gone in zip(latest, population.diverged, strict=True) if not gone]
        if not alive:
            break
        loss, accuracy = (np.mean([getattr(r, name) for r in alive]) for name in ("train_loss", "accuracy"))
        line = f"epoch {epoch:3d}/{num_epochs}  {len(alive)} members  mean train loss {loss:.4f}"
        terminal.console.print(line + ("" if np.isnan(accuracy) else f"  validation accuracy {accuracy:.2%}"))
    results = []
    for member, records, test in zip(population.members, population.records, population.test(), strict=True):
        last = records[-1]
        scores = (last.train_loss, None if np.isnan(last.accuracy) else last.accuracy, test and test["accuracy"])
        place = {"seed": member.config.seed, "diverged_at_step": None if test else last.step}
        results.append(place | dict(zip(SCORES, scores if test else (None,) * 3, strict=True)))
    return results


def print_results(results: Sequence[dict], title: str) -> None:
    """A row a member, then number, mean, deviation and interval over those that did not diverge."""
    headings = (name.replace("_accuracy", "").replace("_", " ") for name in SCORES)
    table = terminal.table("seed", *headings, title=title)
    for result in results:
        step = result["diverged_at_step"]
        cells = (shown(name, result[name]) for name in SCORES)
        table.add_row(str(result["seed"]), *((f"diverged at step {step}", "", "") if step is not None else cells))
    add_means(table, results, SCORES)
    terminal.console.print(table)


def main(argv: list[str]) -> None:
    config_flag.refuse_arguments(argv)
    config = _CONFIG.value
    from mnist_flax.experiments.research import members  # JAX: a setting that it refuses is a user's mistake

    members.check_population([config])
    if _OUTPUT.value:
        outputs.check_output("output", Path(_OUTPUT.value))
    members.use_all_cores()
    configs = [members.with_fields(config, {"seed": config.seed + i}) for i in range(_SEEDS.value)]
    population = members.Population(configs, members.Programs.load(config))
    results = train(population, config.num_epochs)
    title = (
        f"{config.dataset}, {Path(config_flag.recipe_path()).stem}, {config.num_epochs} epochs, {len(configs)} seeds"
    )
    print_results(results, title)
    if _OUTPUT.value:
        run_dir.write_json(Path(_OUTPUT.value), {"config": config.to_dict(), "members": results})


if __name__ == "__main__":
    cli.run(main, _ARGUMENTS)
