"""Perception pathways: the library's mask against the rule of the paper, written as loops."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from helpers import noise
from transformers import Qwen2Config

from self1e.model.attention import perception_mask

# One letter a token: i image, s [SEG], t other text, . padding.
LAYOUTS = {
    "seg": ["tiiits", "tiitst"],
    "several seg": ["tiiststts", "iissiistt"],
    "padding right": ["tiits...", "tiiittss"],
    "padding left": ["...tiits", "tiiittss"],
    "some without seg": ["tiitt.", "tiitst", "..tiit"],
    "no seg": ["tiit..", "ttiitt"],
    "seg before image": ["stiit", "tsiis"],
}


def allowed_by_rule(conversations: list[str], pathway: str) -> torch.Tensor:
    """(conversations, N, N) bool, query by key."""
    result = torch.zeros(len(conversations), len(conversations[0]), len(conversations[0]), dtype=torch.bool)
    for b, conversation in enumerate(conversations):
        for q, query in enumerate(conversation):
            for k, key in enumerate(conversation):
                seen = k <= q
                if "s" in conversation and query == "i" and pathway != "causal":
                    seen |= key == "i" or (key == "s" and pathway == "image+seg")
                result[b, q, k] = seen and key != "."
    return result


def allowed_by_mask(mask, conversations: list[str]) -> torch.Tensor:
    if mask is None:  # the library's word for plain causal without padding
        n = len(conversations[0])
        return torch.ones(len(conversations), n, n).tril().bool()
    mask = mask[:, 0].expand(len(conversations), -1, -1)
    return mask if mask.dtype == torch.bool else mask == 0


def build(conversations: list[str], pathway: str, implementation: str):
    llm = Qwen2Config(hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    llm._attn_implementation = implementation
    ids = torch.tensor([list(map(ord, conversation)) for conversation in conversations])
    config = SimpleNamespace(text_config=llm, image_token_id=ord("i"), seg_token_id=ord("s"))
    return perception_mask(
        pathway, config, ids, embeds=torch.zeros(*ids.shape, 8), padding_mask=(ids != ord(".")).long()
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("pathway", ["causal", "image", "image+seg"])  # those of the paper
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mask_is_the_rule(layout, pathway, implementation):
    conversations = LAYOUTS[layout]
    found = allowed_by_mask(build(conversations, pathway, implementation), conversations)
    queries = torch.tensor(
        [[letter != "." for letter in conversation] for conversation in conversations]
    )  # what padding sees is nobody's business
    assert torch.equal(found[queries], allowed_by_rule(conversations, pathway)[queries])


def test_flash_attention_is_refused_by_name():
    with pytest.raises(ValueError, match="--attn_implementation flash_attention_2.*sdpa"):
        build(LAYOUTS["seg"], "image+seg", "flash_attention_2")


def example(processor) -> dict:
    conversations = [
        [["<image>\nhi", "It is [SEG]."], ["<image>\nwhat is this thing", "[SEG] and [SEG]."]],
        [["<image>\nhow many?", "two"]],
    ]
    return processor(images=[noise(60, 50), noise(50, 70, 1)], conversations=conversations)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning", "ignore:flex_attention called without")
@torch.no_grad()
def test_implementations_agree(tiny_processor, load_tiny, implementation):
    batch = example(tiny_processor)
    expected = load_tiny(attn_implementation="sdpa")(**batch)
    with torch.compiler.set_stance("force_eager"):  # FlexAttention without its half a minute of compilation
        found = load_tiny(attn_implementation=implementation)(**batch)
    for a, b in zip(found.mask_logits, expected.mask_logits, strict=True):
        assert torch.allclose(a, b, atol=1e-4)  # sums in another order
    assert torch.allclose(found.loss, expected.loss, atol=1e-5)


@torch.no_grad()
def test_pathways_change_the_model(tiny_processor, load_tiny):
    batch = example(tiny_processor)
    by_path = {path: load_tiny(attention_pathway=path)(**batch) for path in ("causal", "image", "image+seg")}
    first = [out.mask_logits[0] for out in by_path.values()]
    assert all((a - b).abs().max() > 1e-3 for a, b in combinations(first, 2))
