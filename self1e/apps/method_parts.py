"""What the parts of the method compute of one photo, and how it is drawn; the command is `method_pictures`."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from einops import einsum, rearrange, reduce
from PIL import Image
from torch import Tensor

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.model.grids import REPLICATIONS, compress, expand, resize
from self1e.model.head import AmplifiedHead
from self1e.model.prompts import ANSWER, evaluation_prompt


@dataclass(frozen=True)
class Parts:
    """What the method computes of one photo and one prompt; sides in cells, C is the LLM's width.

    own: (S, S) the query times the LLM's own image features. before, after: (2S, 2S) the query times the features
    before and after refilling; the latter are the mask's logits. high (2S, 2S, C), residual (S, S, C), refilled
    (2S, 2S, C): features. attention: (layers, L, L) of image tokens to `[SEG]`.
    """

    own: Tensor
    before: Tensor
    after: Tensor
    high: Tensor
    residual: Tensor
    refilled: Tensor
    attention: Tensor


@torch.no_grad()
def compute_parts(model: Self1EForSegmentation, processor: Self1EProcessor, image: Image.Image, prompt: str) -> Parts:
    """Compute the method (paper, equations 3 to 6) step by step from what the model's modules give out.

    The model must be loaded with `attn_implementation="eager"`, which alone tells its attention.
    """
    head = cast(AmplifiedHead, model.segmentation_head)
    ratio = model.config.ratio
    if model.config.mask_features != "rfa":
        raise ValueError(
            f"mask_features is {model.config.mask_features!r}: the pictures are about the full method, rfa"
        )
    batch = processor([image], [[[evaluation_prompt(prompt, False, True), ANSWER]]])
    seen: dict[str, Tensor] = {}
    attention: list[Tensor] = []
    llm, vit = model.model.language_model, model.model.vision_tower
    hooks = [
        vit.register_forward_hook(lambda module, args, out: seen.update(patches=out.last_hidden_state[:, 1:])),
        llm.register_forward_hook(lambda module, args, out: seen.update(states=out.last_hidden_state[0])),
        *(
            layer.self_attn.register_forward_hook(lambda module, args, out: attention.append(out[1][0]))
            for layer in llm.layers
        ),
    ]
    try:
        model.eval()(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        for hook in hooks:
            hook.remove()
    ids = batch["input_ids"][0]
    is_image = ids == model.config.image_token_id
    position = int((ids == model.config.seg_token_id).nonzero())
    patches = rearrange(seen["patches"], "t (h w) c -> t h w c", h=int(seen["patches"].shape[1] ** 0.5))
    projector = model.model.multi_modal_projector
    low = projector(compress(patches, ratio))
    high = projector(REPLICATIONS[model.config.replication](patches, ratio))
    img = rearrange(seen["states"][is_image], "(h w) c -> 1 h w c", h=low.shape[1])
    seg = seen["states"][position - 1]  # the state that predicts the token
    query = head.f_out(reduce(head.f_llm(seg), "(n c) -> c", "mean", n=ratio**2))
    own = expand(head.f_llm(img), ratio)
    residual = own - expand(head.f_vit(low), ratio)
    replicated = expand(head.f_vit(high), ratio)
    refilled = head.f_out(replicated + resize(residual, (replicated.shape[1], replicated.shape[2])))

    def similarity(features: Tensor) -> Tensor:
        return einsum(features[0], query, "h w c, c -> h w") / query.shape[0] ** 0.5

    to_seg = torch.stack([layer.mean(0)[is_image, position] for layer in attention])
    return Parts(
        own=similarity(own),
        before=similarity(head.f_out(replicated)),
        after=similarity(refilled),
        high=replicated[0],
        residual=residual[0],
        refilled=refilled[0],
        attention=rearrange(to_seg, "n (h w) -> n h w", h=low.shape[1]),
    )


def components(features: Tensor) -> Tensor:
    """The first three principal components of (h, w, C) features, each scaled to 0..1: (h, w, 3)."""
    flat = rearrange(features, "h w c -> (h w) c").double()
    centred = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    values = centred @ directions[:3].T
    low, high = values.min(0).values, values.max(0).values
    return rearrange((values - low) / (high - low), "(h w) c -> h w c", h=features.shape[0]).float()


def draw(parts: Parts, image: Image.Image, prompt: str, folder: Path) -> None:
    """Write the three pictures."""
    from matplotlib.figure import Figure

    def sheet(panels: dict[str, Tensor], name: str, **options) -> None:
        figure = Figure(figsize=(2.4 * (len(panels) + 1), 2.8), layout="constrained")
        axes = figure.subplots(1, len(panels) + 1)
        axes[0].imshow(image)
        axes[0].set_title(prompt, fontsize=8)
        for place, (title, panel) in zip(axes[1:], panels.items()):
            shown = place.imshow(panel.numpy(), **options)
            place.set_title(title, fontsize=8)
            if panel.ndim == 2:
                figure.colorbar(shown, ax=place, fraction=0.046)
        for place in axes:
            place.set_axis_off()
        figure.savefig(folder / name, dpi=100, metadata={"Software": None})

    folder.mkdir(parents=True, exist_ok=True)
    sides = {"LLM's image tokens": parts.own, "before refilling": parts.before, "refilled (logits)": parts.after}
    sheet(sides, "similarity.png", cmap="coolwarm")
    features = {"self-replicated": parts.high, "residual": parts.residual, "refilled": parts.refilled}
    sheet({title: components(value) for title, value in features.items()}, "features.png")
    sheet({f"layer {i}": layer for i, layer in enumerate(parts.attention, 1)}, "attention.png", cmap="viridis")
