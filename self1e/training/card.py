"""The model card of a checkpoint, its README.md: how to use it, how it was trained, what it scored.

    self1e card runs/exp        # after an evaluation, to fill in its figures

Training writes the card with the weights, and `hf upload USER/NAME runs/exp/ckpt_model` carries both to the hub. What
you write into the card stays, such as the license in its header; only the section "Evaluation" is renewed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from self1e.evaluation.results import checkpoint_folder, weights_identity
from self1e.files import read_json
from self1e.flags import Help
from self1e.model.config import SWITCHES, Self1EConfig

TEXT = """---
library_name: transformers
pipeline_tag: image-segmentation
tags: [self1e, referring-segmentation, reasoning-segmentation]
---
# {title}

A multimodal LLM that segments by itself: one `[SEG]` token, no mask decoder (SELF1E, arXiv 2603.19026).
Head `{config.mask_features}`, replication `{config.replication}`, attention pathway `{config.attention_pathway}`.

## Use

```python
from self1e import Self1EForSegmentation, Self1EProcessor

processor = Self1EProcessor.from_pretrained("{title}")
model = Self1EForSegmentation.from_pretrained("{title}")
result = model.segment(processor, "photo.jpg", "the red car")[0]
result.mask, result.score                     # bool (height, width), mean foreground probability
```

## Training

{training}
"""
EVALUATION = "\n## Evaluation\n"


def write_card(folder: str | Path, *, base_model: str | None = None, command: str | None = None) -> Path:
    """Write or renew `README.md` in the folder of a checkpoint, layout `self1e`; returns its path.

    For a new card, base_model: the hub id or folder of what the training started from. command: that trained it.
    """
    folder = Path(folder).resolve()
    path, config = folder / "README.md", Self1EConfig.from_pretrained(folder)
    if path.is_file():
        card = ModelCard.load(path)
    else:
        title = folder.parent.name if folder.name == "ckpt_model" else folder.name
        training = f"```bash\n{command}\n```" if command else "The command is not known."
        card = ModelCard(TEXT.format(title=title, config=config, training=training))
        if base_model:  # of a folder its name: a path of this machine tells nobody anything
            card.data["base_model"] = Path(base_model).name if Path(base_model).is_dir() else base_model
    before, _, after = card.text.partition(EVALUATION)
    _, more, rest = after.partition("\n## ")
    card.text = f"{before.rstrip()}\n{EVALUATION}\n{evaluation(folder)}\n{more}{rest}"
    card.save(path)
    return path


def evaluation(folder: Path) -> str:
    """The section's text: the results beside the checkpoint that its own weights and switches made."""
    config, tables = Self1EConfig.from_pretrained(folder), ""
    own = {name: getattr(config, name) for name in SWITCHES} | {"weights": weights_identity(folder)["weights"]}
    for title, results in {"Segmentation": "eval", "Visual question answering": "eval_vqa"}.items():
        table = folder.parent / results / "summary.md"
        settings = read_json(table.with_name("settings.json"), dict) if table.is_file() else {"weights": None}
        if all(settings.get(name, value) == value for name, value in own.items()):
            tables += f"### {title}\n\n{table.read_text(encoding='utf-8')}\n"
    return tables or "These weights have not been evaluated yet.\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("self1e card", None, __doc__, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("folder", type=checkpoint_folder, help="folder of a run, or of its checkpoint")
    print(f"written: {write_card(parser.parse_args(argv).folder)}")
    return 0
