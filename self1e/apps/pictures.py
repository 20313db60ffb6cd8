"""Draw what the parts of the method do to one photo.

    self1e pictures --version runs/NAME/ckpt_model --image photo.jpg --prompt "the red circle" --output pictures

writes, in seconds on a CPU, two pictures into the folder:

    similarity.png   the query of the `[SEG]` token times the image side: the LLM's own image tokens, the
                     self-replicated features before refilling, the refilled features (the mask's logits)
    features.png     the first three principal components as red, green and blue: self-replicated features, the LLM's
                     residual, refilled features
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.segment import prompt_text
from self1e.errors import UserError
from self1e.model.photos import photo_of
from self1e.model.prompts import ANSWER, check_prompt, evaluation_prompt
from self1e.model.weights import checkpoint_folder


@torch.no_grad()
def compute_parts(
    model: Self1EForSegmentation, processor: Self1EProcessor, image: Image.Image, prompt: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parts of the method (paper, equations 3 to 6) for one photo and prompt, from what the head is given.

    Returns mask logits by name, (h, w), and features by name, (h, w, C).
    """
    batch = dict(processor([image], [[[evaluation_prompt(prompt, False, True), ANSWER]]]))
    del batch["labels"]
    head, given = model.segmentation_head, []
    hook = head.register_forward_pre_hook(lambda module, args: given.append(args))
    model.eval()(**batch)
    hook.remove()
    v1, vhq, img, query = head.project(*given[0][:4])
    nothing_refilled, refilled = head.features(v1, vhq, v1), head.features(v1, vhq, img)
    sides = {"LLM's image tokens": img, "before refilling": nothing_refilled, "refilled (logits)": refilled}
    features = {"self-replicated": vhq[0], "residual": (img - v1)[0], "refilled": refilled[0]}
    return {name: head.logits(side, query)[0] for name, side in sides.items()}, features


def components(features: Tensor) -> Tensor:
    """The first three principal components of (h, w, C) features, each scaled to 0..1: (h, w, 3)."""
    flat = rearrange(features, "h w c -> (h w) c").double()
    centred = flat - flat.mean(0)
    values = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    low, high = values.min(0).values, values.max(0).values
    return rearrange((values - low) / (high - low), "(h w) c -> h w c", h=features.shape[0]).float()


def draw(path: Path, image: Image.Image, title: str, panels: dict[str, Tensor]) -> None:
    """Write the photo and, beside it, each panel with its name: colours (h, w, 3), or values (h, w) with a scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * (len(panels) + 1), 2.8), layout="constrained")
    for axis, (name, values) in zip(figure.subplots(1, len(panels) + 1), {title: image, **panels}.items()):
        drawn = axis.imshow(values, cmap="coolwarm")
        axis.set_title(name, fontsize=8)
        axis.set_axis_off()
        if getattr(values, "ndim", 3) == 2:
            figure.colorbar(drawn, ax=axis, fraction=0.046)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="self1e pictures", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--version", required=True, type=checkpoint_folder, help="a trained model's folder, or its run's")
    add("--image", required=True, type=Path, help="one photo")
    add("--prompt", required=True, type=prompt_text, help="what to segment")
    add("--output", type=Path, required=True, help="folder for the pictures")
    args = parser.parse_args(argv)
    if find_spec("matplotlib") is None:
        raise UserError("the pictures need matplotlib: pip install 'self1e[plots]'")
    check_prompt(args.prompt)
    image = photo_of(args.image)
    processor = Self1EProcessor.from_pretrained(args.version)
    similarity, features = compute_parts(
        Self1EForSegmentation.from_pretrained(args.version), processor, image, args.prompt
    )
    args.output.mkdir(parents=True, exist_ok=True)
    draw(args.output / "similarity.png", image, args.prompt, similarity)
    draw(args.output / "features.png", image, args.prompt, {name: components(x) for name, x in features.items()})
    print(f"similarity.png and features.png are in {args.output}")
    return 0
