"""Dual perception pathways (paper, section 3.3): what image tokens may see beyond the causal past.

A pathway is an overlay on the causal mask, for rows that hold a `[SEG]`: `causal OR overlay`. Queries that are not
image tokens stay causal, padding keys are never seen, rows without `[SEG]` stay plain causal. The library builds the
mask for eager, SDPA and FlexAttention from the predicate alone. To add a pathway, add one predicate to `PATHWAYS`
and its name to `switches.SWITCHES`. A pathway adds to what the causal mask allows; one that forbids would pass an
`and_mask_function` to `create_causal_mask`.
"""

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def image_to_image(is_image: Tensor, is_seg: Tensor) -> Predicate:
    """Image tokens see every image token of their row."""
    two_way = is_image & is_seg.any(1, keepdim=True)
    return lambda b, head, q, k: two_way[b, q] & two_way[b, k]


def image_to_image_and_seg(is_image: Tensor, is_seg: Tensor) -> Predicate:
    """Image tokens see every image token and every `[SEG]` of their row."""
    seeing = is_image & is_seg.any(1, keepdim=True)
    seen = seeing | is_seg
    return lambda b, head, q, k: seeing[b, q] & seen[b, k]


PATHWAYS = {"causal": None, "image": image_to_image, "image+seg": image_to_image_and_seg}


def perception_mask(
    pathway: str,
    *,
    config: PreTrainedConfig,
    embeds: Tensor,
    padding_mask: Tensor | None,
    is_image: Tensor,
    is_seg: Tensor,
):
    """The LLM's attention mask in its backend's format, for `attention_mask={"full_attention": mask}`.

    Args:
        pathway: a key of `PATHWAYS`.
        config: the LLM's configuration; its attention implementation decides the mask's format.
        embeds: (rows, N, C), for size, dtype and device.
        padding_mask: (rows, N), 1 at tokens; None without padding, so that the host need not wait for the
            GPU.
        is_image, is_seg: (rows, N) bool, image tokens and `[SEG]` tokens.
    """
    overlay = PATHWAYS[pathway]
    if overlay is not None and "flash" in config._attn_implementation:
        raise ValueError(
            f"--attn_implementation {config._attn_implementation} knows causal masks only, the pathway {pathway!r} is "
            "not causal: use sdpa or eager"
        )
    return create_causal_mask(
        config,
        embeds,
        padding_mask,
        past_key_values=None,
        or_mask_function=None if overlay is None else overlay(is_image, is_seg),
        allow_is_causal_skip=padding_mask is None,
    )
