"""The README.md of a checkpoint: how to use it, how it was trained, what it scored.

    self1e card runs/exp/ckpt_model        # after an evaluation, to fill in its tables

Trainer and converter write it with the weights; `hf upload USER/NAME runs/exp/ckpt_model` then carries it to the hub.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from self1e.files import write_text
from self1e.model.configuration import Self1EConfig

EVALUATIONS = {"Segmentation": "eval/summary.md", "Visual question answering": "eval_vqa/summary.md"}
COMMAND = re.compile(r"^## Training\n\n```bash\n(.*?)\n```", re.MULTILINE | re.DOTALL)
HEADER = re.compile(r"^base_model: (.+)$", re.MULTILINE)
CARD = """---
library_name: transformers
pipeline_tag: image-segmentation
tags: [self1e, referring-segmentation, reasoning-segmentation]
{base}---

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
) -> Path:
    """Write `<folder>/README.md` and return its path.

    Args:
        folder: of a checkpoint, layout (d).
        title: name of the model; default: the folder's, or the experiment's around a `ckpt_model`.
        base: hub id or folder that training started from; default: what an earlier card there says.
        command: that trained it; default: what an earlier card there says.
        results: folder that holds `eval/summary.md` and `eval_vqa/summary.md`, as evaluations write them; default: the
            checkpoint's parent, where a table older than the weights is of an earlier training and left out.
    """
    folder = Path(folder)
    path = folder / "README.md"
    ages = [file.stat().st_mtime for file in folder.glob("*.safetensors")] if results is None else []
    results, saved = Path(results or folder.parent), max(ages, default=0.0)
    earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
    command = command or next(iter(COMMAND.findall(earlier)), None)
    base = base or next(iter(HEADER.findall(earlier)), None)
    base = Path(base).name if base and Path(base).is_dir() else base  # a path of this machine tells nobody anything
    config, named = Self1EConfig.from_pretrained(folder), folder.resolve()
    tables = []
    for name, file in EVALUATIONS.items():
        usable = (results / file).is_file() and (results / file).stat().st_mtime >= saved
        table = (results / file).read_text(encoding="utf-8").strip() if usable else "Not evaluated yet."
        tables.append(f"### {name}\n\n{table}")
    card = CARD.format(
        base=f"base_model: {base}\n" if base else "",
        title=title or (named.parent.name if named.name == "ckpt_model" else named.name),
        head=config.mask_features,
        replication=config.replication,
        pathway=config.attention_pathway,
        training=f"```bash\n{command}\n```" if command else "The command is not known.",
        evaluation="\n\n".join(tables),
    )
    write_text(path, card)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="self1e card", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint, layout (d)")
    parser.add_argument("--base", help="hub id or folder that training started from; default: the present card's")
    parser.add_argument("--command", help="training command; default: the present card's")
    parser.add_argument("--results", type=Path, help="folder with eval/ and eval_vqa/; default: the one around")
    args = parser.parse_args(argv)
    if not (args.folder / "config.json").is_file():
        parser.error(f"{args.folder}: no checkpoint there (config.json is missing)")
    print(write_model_card(args.folder, base=args.base, command=args.command, results=args.results))
    return 0
