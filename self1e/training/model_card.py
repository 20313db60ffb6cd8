"""The README.md of a checkpoint: how to use it, how it was trained, what it scored; and its scores for the hub.

    self1e card runs/exp/ckpt_model        # after an evaluation, to fill in its tables

Trainer and converter write it with the weights; `hf upload USER/NAME runs/exp/ckpt_model` then carries it to the hub.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from self1e.evaluation.tables import TITLES
from self1e.files import write_text
from self1e.flags import Parser
from self1e.model.weights import checkpoint_folder

EVALUATIONS = {"Segmentation": "eval/summary.md", "Visual question answering": "eval_vqa/summary.md"}
COMMAND = re.compile(r"^## Training\n\n```bash\n(.*?)\n```", re.MULTILINE | re.DOTALL)
HEADER = re.compile(r"\A---\n(.*?)^---\n", re.MULTILINE | re.DOTALL)
CARD = """---
{metadata}---

# {title}

A multimodal LLM that segments by itself: one `[SEG]` token, no mask decoder (SELF1E, arXiv 2603.19026).
Head `{head}`, replication `{replication}`, attention pathway `{pathway}`.

## Use

```python
from PIL import Image
from self1e import Self1EForSegmentation, Self1EProcessor

processor = Self1EProcessor.from_pretrained("{title}")
model = Self1EForSegmentation.from_pretrained("{title}")
result = model.segment(processor, Image.open("photo.jpg"), "the red car")[0]
result.mask, result.score                     # bool (height, width), mean foreground probability
```

## Training

{training}

## Evaluation

{evaluation}
"""


def write_model_card(
    folder: str | Path,
    *,
    title: str | None = None,
    base: str | None = None,
    command: str | None = None,
    results: str | Path | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    benchmarks: Mapping[str, str] | None = None,
) -> Path:
    """Write `<folder>/README.md`, and `.eval_results` beside it, and return the README's path.

    Args:
        folder: of a checkpoint, layout `self1e`.
        title: name of the model; default: the folder's, or the experiment's around a `ckpt_model`.
        base: hub id or folder that training started from; default: what an earlier card there says.
        command: that trained it; default: what an earlier card there says.
        results: folder that holds `eval/summary.md` and `eval_vqa/summary.md`, as evaluations write them; default: the
            checkpoint's parent, where a table older than the weights is of an earlier training and left out.
        license: of the weights, as the hub spells it; datasets: hub ids of the training data. Default: what an earlier
            card there says; nothing is guessed.
        benchmarks: split -> hub data set that its figures are about, see `eval_results.write_eval_results`.
    """
    from self1e.model.config import Self1EConfig  # needs torch, which `--help` does not
    from self1e.training.eval_results import write_eval_results

    folder = Path(folder)
    path = folder / "README.md"
    ages = [file.stat().st_mtime for file in folder.glob("*.safetensors")] if results is None else []
    results, saved = Path(results or folder.parent), max(ages, default=0.0)
    earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
    command = command or next(iter(COMMAND.findall(earlier)), None)
    head = HEADER.match(earlier)
    try:
        before = dict(yaml.safe_load(head[1])) if head else {}
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header is no YAML of names and values; delete the file") from error
    base = base or before.get("base_model")
    base = Path(base).name if base and Path(base).is_dir() else base  # a path of this machine tells nobody anything
    config, named = Self1EConfig.from_pretrained(folder), folder.resolve()
    tables = []
    for name, file in EVALUATIONS.items():
        usable = (results / file).is_file() and (results / file).stat().st_mtime >= saved
        table = (results / file).read_text(encoding="utf-8").strip() if usable else "Not evaluated yet."
        tables.append(f"### {name}\n\n{table}")
    title = title or (named.parent.name if named.name == "ckpt_model" else named.name)
    figures = results / "eval/summary.json"
    usable = figures.is_file() and figures.stat().st_mtime >= saved
    scored = structured_results(figures) if usable else []
    write_eval_results(folder, figures if usable else None, benchmarks or {})
    metadata = {
        "license": license or before.get("license"),
        "library_name": "transformers",
        "pipeline_tag": "image-segmentation",
        "tags": ["self1e", "referring-segmentation", "reasoning-segmentation"],
        "base_model": base,
        "datasets": [*datasets] or before.get("datasets"),
        "model-index": [{"name": title, "results": scored}] if scored else None,
    }
    card = CARD.format(
        metadata=yaml.safe_dump({key: value for key, value in metadata.items() if value}, sort_keys=False),
        title=title,
        head=config.mask_features,
        replication=config.replication,
        pathway=config.attention_pathway,
        training=f"```bash\n{command}\n```" if command else "The command is not known.",
        evaluation="\n\n".join(tables),
    )
    write_text(path, card)
    return path


def structured_results(summary: Path) -> list[dict]:
    """The hub's `model-index` results, in percent, from an evaluation's summary. Raises ValueError naming the file."""
    try:
        splits = json.loads(summary.read_text(encoding="utf-8"))
        return [
            {
                "task": {"type": "image-segmentation", "name": "Segmentation by a sentence"},
                "dataset": dict(zip(("type", "name", "split"), (names[0], " ".join(names), names[-1]))),
                "metrics": [
                    {"type": key, "name": name, "value": round(100 * figures[key], 2)} for key, name in TITLES.items()
                ],
            }
            for split, figures in splits.items()
            for names in [[Path(part).name for part in split.split("|")]]  # without the paths of this machine
        ]
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{summary}: not the summary of an evaluation ({type(error).__name__}: {error})") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="self1e card", description=__doc__)
    add = parser.add_argument
    add("folder", type=checkpoint_folder, help="checkpoint of layout self1e, or the folder of its run")
    add("--base", help="hub id or folder that training started from; default: the present card's")
    add("--command", help="training command; default: the present card's")
    add("--results", type=Path, help="folder with eval/ and eval_vqa/; default: the one around")
    add("--license", help="of the weights, as the hub spells it, such as apache-2.0; default: the present card's")
    add("--datasets", nargs="+", default=[], metavar="ID", help="hub ids of the training data")
    add("--benchmarks", nargs="+", default=[], metavar="SPLIT=DATASET[:TASK]", help="the hub id of a split's data set")
    args = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    texts = args.pop("benchmarks")
    named = [text.rpartition("=") for text in texts]
    wrong = [text for text, parts in zip(texts, named) if not (parts[0] and parts[2])]
    if wrong:
        parser.error(f"--benchmarks {wrong[0]!r}: expected SPLIT=DATASET, such as 'refcoco|unc|val=USER/NAME:val'")
    folder = Path(args.pop("folder"))
    if not (folder / "config.json").is_file():
        parser.error(f"{folder}: no checkpoint there (config.json is missing)")
    if args["results"] is not None and not args["results"].is_dir():
        parser.error(f"--results {args['results']}: no such folder; expected one with eval/ or eval_vqa/")
    print(f"written: {write_model_card(folder, benchmarks={split: dataset for split, _, dataset in named}, **args)}")
    return 0
