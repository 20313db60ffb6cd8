"""The curves of healthy runs of one recipe, which differ in their seed alone, to lay a new run beside.

A JSON file holds them: `recipe`, what such runs have in common (see `recipe_of`); `seeds`; and `curves`, by the names
of a Trainer's log, each with its `steps` and one list of `values` per seed. `scripts/healthy_curves.py` makes one from
the `curves.json` of finished runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from self1e.files import read_json

# Settings that may differ between runs with the same curves; the last two are joined to the photos per micro-batch.
# Synthetic data is not the same to the byte on all machines.
NOT_OF_THE_RECIPE = ("base", "data", "seed", "zero_stage", "batch_size", "ranks")


class Band(NamedTuple):
    """One figure of healthy runs: optimizer steps and, at each, the mean, lowest and highest value over the seeds."""

    steps: list[int]
    mean: list[float]
    lowest: list[float]
    highest: list[float]


def recipe_of(defining: Mapping[str, Any], *, steps: int, parameters: int) -> dict[str, Any]:
    """What runs must have in common for their curves to be comparable.

    defining: see `checkpoint.defining_settings`. The base counts by its number of parameters, because the weights of a
    drawn base may differ in their last digits between machines. steps: of the whole run, which the rates depend on.
    """
    same = {name: value for name, value in defining.items() if name not in NOT_OF_THE_RECIPE}
    return same | {
        "photos_per_micro_batch": defining["batch_size"] * defining["ranks"],
        "steps": steps,
        "parameters": parameters,
    }


class HealthyCurves:
    """A file of healthy runs. Raises ValueError naming the file when it is none, OSError when it is not there."""

    def __init__(self, path: Path):
        self.path = path
        held = read_json(path, dict)
        if held.keys() != {"recipe", "seeds", "curves"}:
            raise ValueError(f"{path}: expected recipe, seeds and curves, as scripts/healthy_curves.py writes them")
        self.recipe, self.seeds, self.curves = held["recipe"], held["seeds"], held["curves"]

    def check(self, recipe: Mapping[str, Any]) -> None:
        """Raise ValueError with every difference when a run is not of this recipe."""
        names = sorted(self.recipe.keys() | recipe.keys())
        pairs = {name: (recipe.get(name), self.recipe.get(name)) for name in names}
        differences = [
            f"  {name}: {mine!r}, theirs {theirs!r}" for name, (mine, theirs) in pairs.items() if mine != theirs
        ]
        if differences:
            raise ValueError(
                f"--healthy_curves {self.path}: these runs had another recipe than this one; leave the flag out, or "
                "give the curves of runs like this one:\n" + "\n".join(differences)
            )

    def band(self, name: str) -> Band | None:
        """The figure `name` of a Trainer's log over the seeds, or None when the file has none."""
        if name not in self.curves:
            return None
        values = list(zip(*self.curves[name]["values"]))  # steps x seeds
        return Band(
            self.curves[name]["steps"],
            [sum(row) / len(row) for row in values],
            [min(row) for row in values],
            [max(row) for row in values],
        )

    def write_events(self, folder: Path) -> None:
        """Write mean, lowest and highest curve below `folder` as three runs for TensorBoard.

        They have the tags of the run itself, so that a chart shows all four. What is there already stays.
        """
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import rewrite_logs

        for line in ("mean", "lowest", "highest"):
            path = folder / f"healthy_{line}"
            if path.exists():  # of a run that is continued
                continue
            with SummaryWriter(str(path)) as writer:
                for name in self.curves:
                    band = self.band(name)
                    assert band is not None
                    (tag,) = rewrite_logs({name: 0.0})
                    for step, value in zip(band.steps, getattr(band, line)):
                        writer.add_scalar(tag, value, step)


def gather(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the `curves.json` of runs to the content of a file of healthy runs, four digits per value.

    Raises ValueError when their recipes, their steps or their figures differ, or two have the same seed.
    """
    first, *others = runs
    seeds = [run["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {seeds}: each run needs another one")
    for run in others:
        if run["recipe"] != first["recipe"] or _steps(run) != _steps(first):
            raise ValueError(f"the run of seed {run['seed']} differs in more than its seed from that of {seeds[0]}")
    return {
        "recipe": first["recipe"],
        "seeds": seeds,
        "curves": {
            name: {
                "steps": curve["steps"],
                "values": [[float(f"{value:.4g}") for value in run["curves"][name]["values"]] for run in runs],
            }
            for name, curve in first["curves"].items()
        },
    }


def _steps(run: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: curve["steps"] for name, curve in run["curves"].items()}
