"""Draw what the parts of the method do to one photo.

    self1e pictures --version runs/NAME/ckpt_model --image photo.jpg --prompt "the red circle" --output pictures

writes, in seconds on a CPU, three pictures into the folder:

    similarity.png   the query of the `[SEG]` token times the image side: the LLM's own image tokens, the
                     self-replicated features before refilling, the refilled features (the mask's logits)
    features.png     the first three principal components as red, green and blue: self-replicated features, the LLM's
                     residual, refilled features
    attention.png    per layer of the LLM, how much each image token attends to `[SEG]`, mean over heads
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
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The parts of the method (paper, equations 3 to 6) for one photo and prompt, from what the head is given.

    The model must be loaded with `attn_implementation="eager"`, which alone tells its attention.

    Returns:
        Mask logits by name, (h, w); features by name, (h, w, C); attention of image tokens to `[SEG]`, (layers, L, L).
    """
    batch = processor([image], [[[evaluation_prompt(prompt, False, True), ANSWER]]])
    head = model.segmentation_head
    given: list[tuple] = []
    attention: list[Tensor] = []
    head.register_forward_pre_hook(lambda module, args: given.append(args))
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, out: attention.append(out[1][0]))
    model.eval()(**{name: value for name, value in batch.items() if name != "labels"})
    v1, vhq, img, query = head.project(*given[0][:4])
    nothing_refilled, refilled = head.features(v1, vhq, v1), head.features(v1, vhq, img)
    sides = {"LLM's image tokens": img, "before refilling": nothing_refilled, "refilled (logits)": refilled}
    features = {"self-replicated": vhq[0], "residual": (img - v1)[0], "refilled": refilled[0]}
    is_image = batch["input_ids"][0] == model.config.image_token_id
    position = int((batch["input_ids"][0] == model.config.seg_token_id).nonzero())
    to_seg = torch.stack([layer.mean(0)[is_image, position] for layer in attention])
    similarity = {name: head.logits(side, query)[0] for name, side in sides.items()}
    return similarity, features, rearrange(to_seg, "n (h w) -> n h w", h=given[0][0].shape[1])


def components(features: Tensor) -> Tensor:
    """The first three principal components of (h, w, C) features, each scaled to 0..1: (h, w, 3)."""
    flat = rearrange(features, "h w c -> (h w) c").double()
    centred = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    values = centred @ directions[:3].T
    low, high = values.min(0).values, values.max(0).values
    return rearrange((values - low) / (high - low), "(h w) c -> h w c", h=features.shape[0]).float()


def draw(path: Path, image: Image.Image, title: str, panels: dict[str, Tensor], **options) -> None:
    """Write the photo and, beside it, each panel with its name. options: of matplotlib's `imshow`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * (len(panels) + 1), 2.8), layout="constrained")
    first, *axes = figure.subplots(1, len(panels) + 1)
    first.imshow(image)
    first.set_title(title, fontsize=8)
    for axis, (name, values) in zip(axes, panels.items()):
        drawn = axis.imshow(values.numpy(), **options)
        axis.set_title(name, fontsize=8)
        if values.ndim == 2:
            figure.colorbar(drawn, ax=axis, fraction=0.046)
    for axis in (first, *axes):
        axis.set_axis_off()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> int:
    """Run `self1e pictures`; 0 when the pictures are written."""
    parser = argparse.ArgumentParser(
        prog="self1e pictures", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
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
    model = Self1EForSegmentation.from_pretrained(args.version, attn_implementation="eager")
    similarity, features, attention = compute_parts(model, processor, image, args.prompt)
    args.output.mkdir(parents=True, exist_ok=True)
    draw(args.output / "similarity.png", image, args.prompt, similarity, cmap="coolwarm")
    coloured = {name: components(values) for name, values in features.items()}
    draw(args.output / "features.png", image, args.prompt, coloured)
    layers = {f"layer {number}": layer for number, layer in enumerate(attention, 1)}
    draw(args.output / "attention.png", image, args.prompt, layers, cmap="viridis")
    print(f"similarity.png, features.png and attention.png are in {args.output}")
    return 0
