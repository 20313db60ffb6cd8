"""The figures of a checkpoint in the hub's own form, `.eval_results/self1e.yaml` beside its weights.

The hub shows such entries on the model's page, and on the leaderboard of the data set that an entry names. An entry
needs the hub id of that data set, so one is written for each split of a ready Parquet set (`READY` in parquet.py), and
for those splits whose data set the user names.
"""

from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from huggingface_hub.utils import validate_repo_id

from self1e.data.sets.parquet import READY
from self1e.data.splits import get_splits
from self1e.evaluation.provenance import SettingsFile
from self1e.evaluation.tables import TITLES
from self1e.files import read_json, write_text


def write_eval_results(folder: Path, summary: Path | None, benchmarks: Mapping[str, str]) -> None:
    """Write `<folder>/.eval_results/self1e.yaml`, or delete an earlier one where no split has a data set on the hub.

    summary: `summary.json` of a segmentation evaluation; None where there is none of these weights.
    benchmarks: split -> "DATASET" or "DATASET:TASK"; the task is the last part of the split's name by default.

    Raises ValueError for a split that was not evaluated, a name that is no hub id, and a file that is no summary.
    """
    path = folder / EVAL_RESULTS_FOLDER / "self1e.yaml"
    entries = hub_entries(summary, benchmarks) if summary is not None or benchmarks else []
    if entries:
        path.parent.mkdir(exist_ok=True)
        write_text(path, yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))
    else:
        path.unlink(missing_ok=True)


def hub_entries(summary: Path | None, benchmarks: Mapping[str, str]) -> list[EvalResultEntry]:
    """The entries, each with the first figure that its split is reported by, in percent."""
    results = read_json(summary, dict) if summary is not None else {}
    unknown = [split for split in benchmarks if split not in results]
    if unknown:
        known = ", ".join(results) or "none yet"
        raise ValueError(f"--benchmarks names {', '.join(unknown)}; the splits evaluated with these weights: {known}")
    settings = SettingsFile(summary.parent).read() if summary is not None else {}
    entries = []
    for split, figures in results.items():
        dataset, _, task = (benchmarks.get(split) or hub_source(split) or "").partition(":")
        if not dataset:
            continue
        validate_repo_id(dataset)
        headline, *others = dict.fromkeys((*get_splits([split])[split].headline, *TITLES))
        values = {name: round(100 * figures[name], 2) for name in (headline, *others)}
        remarks = [f"{TITLES[headline]} in percent", *(f"{TITLES[name]} {values[name]}" for name in others)]
        remarks += [f"{figures['n']} sentences", f"protocol {figures['protocol']}"]
        entries.append(
            EvalResultEntry(
                dataset_id=dataset,
                task_id=task or split.split("|")[-1],
                value=values[headline],
                date=settings.get(split, {}).get("run", {}).get("started"),
                notes="; ".join([*remarks, *([figures["note"]] if figures.get("note") else [])]),
            )
        )
    return entries


def hub_source(split: str) -> str | None:
    """The hub id behind a ready Parquet set; None for all other splits, which may mean data on some disk."""
    kind, source, *_ = [*split.split("|"), ""]
    return READY[source].source if kind == "parquet" and source in READY else None
