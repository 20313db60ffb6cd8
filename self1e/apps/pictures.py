"""Draw what the parts of the method do to one photo.

    self1e pictures --version runs/NAME/ckpt_model --image photo.jpg --prompt "the red circle" --output pictures

writes `similarity.png` into the folder, in seconds on a CPU: the query of the `[SEG]` token times the
LLM's own image tokens, the self-replicated features before refilling, and the refilled ones (the mask's logits).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.segment import prompt_text
from self1e.model.photos import photo_of
from self1e.model.prompts import ANSWER, check_prompt, evaluation_prompt
from self1e.model.weights import checkpoint_folder


@torch.no_grad()
def similarities(
    model: Self1EForSegmentation, processor: Self1EProcessor, image: Image.Image, prompt: str
) -> dict[str, Tensor]:
    """Image side (paper, equations 3 to 6) -> its mask logits (h, w), for one photo and prompt."""
    batch = dict(processor([image], [[[evaluation_prompt(prompt, False, True), ANSWER]]]))
    del batch["labels"]
    head, given = model.segmentation_head, []
    with head.register_forward_pre_hook(lambda module, args: given.append(args)):
        model.eval()(**batch)
    v1, vhq, img, query = head.project(*given[0][:4])
    sides = {
        "LLM's image tokens": img,
        "before refilling": head.features(v1, vhq, v1),
        "refilled (logits)": head.features(v1, vhq, img),
    }
    return {name: head.logits(side, query)[0] for name, side in sides.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="self1e pictures", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--version", required=True, type=checkpoint_folder, help="a trained model's folder, or its run's")
    add("--image", required=True, type=Path, help="one photo")
    add("--prompt", required=True, type=prompt_text, help="what to segment")
    add("--output", type=Path, required=True, help="folder for the picture")
    args = parser.parse_args(argv)
    from matplotlib.figure import Figure  # of the extra `plots`

    check_prompt(args.prompt)
    image = photo_of(args.image)
    processor = Self1EProcessor.from_pretrained(args.version)
    model = Self1EForSegmentation.from_pretrained(args.version)
    panels = {args.prompt: image, **similarities(model, processor, image, args.prompt)}
    figure = Figure(figsize=(2.4 * len(panels), 2.8), layout="constrained")
    for axis, (name, values) in zip(figure.subplots(1, len(panels)), panels.items()):
        drawn = axis.imshow(values, cmap="coolwarm")
        axis.set_title(name, fontsize=8)
        axis.set_axis_off()
        if values is not image:
            figure.colorbar(drawn, ax=axis, fraction=0.046)
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / "similarity.png", dpi=100)
    print(f"written: {args.output / 'similarity.png'}")
    return 0
