"""What the files promise: a variant is one class or function, its entry, its name. Tried in a module of its own."""

import pytest
import torch
from helpers import noise

from self1e.model.attention import PATHWAYS, perception_mask
from self1e.model.config import LOSS_WEIGHTS
from self1e.model.grids import REPLICATIONS, replicate_tile
from self1e.model.head import HEADS, SegmentationHead
from self1e.model.losses import MASK_LOSSES
from self1e.training.args import make_parser


class GatedHead(SegmentationHead):
    def __init__(self, hidden_size, **kwargs):
        super().__init__(hidden_size, **kwargs)
        self.gate = torch.nn.Linear(hidden_size, hidden_size)

    def project(self, v1, vhq, img, seg):
        return v1, vhq * self.gate(vhq).sigmoid(), img, seg

    def features(self, v1, vhq, img):
        return vhq


def image_to_turn(ids, config):
    """Image tokens see the question, too: each turn begins with the token that the conversation begins with."""
    image, turn = ids == config.image_token_id, (ids == ids[:, :1]).cumsum(1)
    return lambda b, head, q, k: (k <= q) | (image[b, q] & (turn[b, k] == turn[b, q]))


def image_alone(ids, config):
    """A pathway that forbids: an image token sees itself and nothing else."""
    image = ids == config.image_token_id
    return lambda b, head, q, k: (k == q) | ((k < q) & ~image[b, q])


def replicate_negative(x, ratio=2):
    return -replicate_tile(x, ratio)


@pytest.fixture
def extension(monkeypatch):
    for registry, key, entry in (
        (HEADS, "gated", GatedHead),
        (PATHWAYS, "image+turn", image_to_turn),
        (PATHWAYS, "alone", image_alone),
        (REPLICATIONS, "negative", replicate_negative),
    ):
        monkeypatch.setitem(registry, key, entry)


VARIANTS = [
    {"mask_features": "gated"},
    {"attention_pathway": "image+turn"},
    {"attention_pathway": "alone"},
    {"replication": "negative"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: "-".join(*x.items()))
def test_a_new_variant_trains_and_segments(extension, variant, load_tiny, tiny_processor, tmp_path):
    ((flag, value),) = variant.items()
    args = make_parser().parse_args(["--version", "x", "--exp_name", "y", f"--{flag}", value])
    assert getattr(args, flag) == value
    model, plain = load_tiny(**variant).train(), load_tiny()
    mask = torch.ones(1, 9, 9, dtype=torch.uint8)
    batch = tiny_processor([noise(56, 56)], [[["<image>\nthe cat", "[SEG]."]]], [[mask]])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model(**batch).loss
    before.backward()
    assert all(x.grad is not None for x in model.parameters())
    optimizer.step()
    assert model(**batch).loss < before
    model.trained_head = plain.trained_head = True
    found, usual = (x.segment(tiny_processor, noise(56, 56), "the cat")[0].logits for x in (model, plain))
    assert found.shape != usual.shape or abs(found - usual).max() > 1e-3
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert getattr(again.config, flag) == value and again.trained_head


def test_a_new_loss_needs_its_function_and_its_weight(monkeypatch, load_tiny, tiny_processor):
    monkeypatch.setitem(MASK_LOSSES, "mask_size", lambda x, t: (x.sigmoid().mean((1, 2)) - t.mean((1, 2))).abs())
    mask = torch.ones(1, 9, 9, dtype=torch.uint8)
    batch = tiny_processor([noise(56, 56)], [[["<image>\nthe cat", "[SEG]."]]], [[mask]])
    with pytest.raises(KeyError, match="mask_size"):
        load_tiny()
    monkeypatch.setitem(LOSS_WEIGHTS, "mask_size", 3.0)
    out = load_tiny()(**batch)
    plain = sum(load_tiny().config.loss_weights[name] * x for name, x in out.losses.items() if name != "mask_size")
    torch.testing.assert_close(out.loss, plain + 3 * out.losses["mask_size"])


@torch.no_grad()
def test_a_pathway_can_forbid(extension, load_tiny):
    config = load_tiny().config
    image, seg = config.image_token_id, config.seg_token_id
    ids = torch.tensor([[0, image, image, seg, 0], [0, image, image, 0, 0]])
    mask = perception_mask("alone", config, ids, embeds=torch.zeros(2, 5, 8), padding_mask=None)
    expected = torch.ones(2, 5, 5).tril().bool()
    expected[0, 1:3] = torch.eye(5)[1:3].bool()  # the conversation without `[SEG]` stays causal
    assert torch.equal(mask[:, 0], expected)


@torch.no_grad()
def test_a_pathway_need_not_know_the_side_of_padding(extension, load_tiny, tiny_processor):
    """`chat` pads on the left; what a pathway is given begins with the first token all the same."""
    model, texts = load_tiny(attention_pathway="image+turn"), ("it", "it it", "the large dog in the grass " * 9)
    given = [noise(56, 56)], [[[f"<image>\n{text}", "Sure, it is [SEG]."] for text in texts]]
    left, right = (model(**tiny_processor(*given, padding_side=side)).mask_logits for side in ("left", "right"))
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_rotary_frequencies_can_be_rounded_as_published(load_tiny):
    """At theta 1e6 and head width 128, two tokens 256 apart meet at an angle that differs by up to 0.3 rad."""
    exact, rounded = (
        load_tiny(**options).model.language_model.rotary_emb for options in ({}, {"rope_precision": "bf16"})
    )
    assert exact.inv_freq.dtype == rounded.inv_freq.dtype == torch.float32
    assert torch.equal(rounded.inv_freq, exact.inv_freq.bfloat16().float())
    assert not torch.equal(rounded.inv_freq, exact.inv_freq)
