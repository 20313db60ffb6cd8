"""Dual perception pathways (paper, section 3.3): what each token may see in a conversation with a `[SEG]`.

A pathway is one rule: may query q of conversation b see key k? It answers for the causal past, too, so that it can
forbid as well as add. Those of the paper add: image tokens see more, every other query stays causal. Two things hold
under any pathway: padding is never seen; conversations without `[SEG]`, and generation, are plain causal. The library
builds the mask for eager, SDPA and FlexAttention from the rule alone.

To add a pathway, add one function to `PATHWAYS`. Each token must see itself: a query without any key has no attention
weights. Image tokens must not see the words of an answer: training would show them what generation does not have.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

# Conversation, head, query and key, as 0-d index tensors -> bool, True where the query sees the key.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Token ids, (R, N), and the `Self1EConfig`, which knows those with a meaning -> the rule for these conversations.
Pathway = Callable[[Tensor, Any], Rule]


def image_to_image(ids: Tensor, config: Any) -> Rule:
    """Image tokens see every image token of their conversation."""
    image = ids == config.image_token_id
    return lambda b, head, q, k: (k <= q) | (image[b, q] & image[b, k])


def image_to_image_and_seg(ids: Tensor, config: Any) -> Rule:
    """Image tokens see every image token and every `[SEG]` of their conversation."""
    image = ids == config.image_token_id
    seen = image | (ids == config.seg_token_id)
    return lambda b, head, q, k: (k <= q) | (image[b, q] & seen[b, k])


# None is the library's causal mask, which it need not build where nothing is padded.
PATHWAYS: dict[str, Pathway | None] = {"causal": None, "image": image_to_image, "image+seg": image_to_image_and_seg}


def perception_mask(pathway: str, config: Any, ids: Tensor, *, embeds: Tensor, padding_mask: Tensor | None):
    """The LLM's attention mask in its backend's format, for every type of its layers.

    Args:
        pathway: a key of `PATHWAYS`.
        config: a `Self1EConfig`; the attention implementation of its `text_config` decides the mask's format.
        ids: (R, N), for what the tokens mean. embeds: (R, N, C), for size, dtype and device.
        padding_mask: (R, N), 1 at tokens; None without padding, so that the host need not wait.
    """
    make_rule, llm = PATHWAYS[pathway], config.text_config
    if make_rule is None:
        return create_causal_mask(llm, embeds, padding_mask, None, allow_is_causal_skip=padding_mask is None)
    if "flash" in (name := llm._attn_implementation):
        raise ValueError(f"--attn_implementation {name} knows causal masks only: use sdpa or eager for {pathway!r}")
    rule, with_seg = make_rule(ids, config), (ids == config.seg_token_id).any(1)

    def seen(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return with_seg[b] & rule(b, head, q, k) | ~with_seg[b] & (k <= q)  # onnxruntime has no `where` of booleans

    # The library's bidirectional mask forbids nothing but padding: the rule alone decides about the rest.
    return create_bidirectional_mask(llm, embeds, padding_mask, and_mask_function=seen)
