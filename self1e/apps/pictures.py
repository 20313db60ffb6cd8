"""Draw what the parts of the method do to one photo.

    self1e pictures --version runs/NAME/ckpt_model --image photo.jpg --prompt "the red circle" --output pictures

writes `similarity.png` into the folder, in seconds on a CPU: the query of the `[SEG]` token times the
LLM's own image tokens, the self-replicated features before refilling, and the refilled ones (the mask's logits).
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.loading import add_model_flags, load
from self1e.apps.segment import prompt_text
from self1e.errors import UserError
from self1e.flags import Help
from self1e.model.grids import stitch_tiles
from self1e.model.photos import photo_of


@torch.no_grad()
def similarities(
    model: Self1EForSegmentation, processor: Self1EProcessor, image: Image.Image, prompt: str, max_tiles: int = 1
) -> dict[str, Tensor]:
    """Image side (paper, equations 3 to 6) -> its mask logits (h, w), for one photo and prompt."""
    head, given = model.segmentation_head, []
    with head.register_forward_pre_hook(lambda module, args: given.append(args)):
        model.segment(processor, image, prompt, max_tiles=max_tiles)
    *tokens, (conversation,) = given[0]
    *sides, query = head.project(*tokens)
    v1, vhq, img = (stitch_tiles(side, conversation.grid) for side in sides)
    image_sides = {
        "LLM's image tokens": img,
        "before refilling": head.features(v1, vhq, v1),
        "refilled (logits)": head.features(v1, vhq, img),
    }
    return {name: head.logits(side, query)[0].float().cpu() for name, side in image_sides.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("self1e pictures", None, __doc__, formatter_class=Help, allow_abbrev=False)
    add_model_flags(parser)
    add = parser.add_argument
    add("--image", required=True, type=Path, help="one photo")
    add("--prompt", required=True, type=prompt_text, help="what to segment")
    add("--output", type=Path, required=True, help="folder for the picture")
    args = parser.parse_args(argv)
    if find_spec("matplotlib") is None:
        raise UserError("the picture needs matplotlib: pip install -e '.[plots]'")
    from matplotlib.figure import Figure

    image = photo_of(args.image)
    panels = {args.prompt: image, **similarities(*load(args), image, args.prompt, args.max_tiles)}
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
