"""The model end to end on tiny weights: switches, batching, gradients, losses, stochastic depth."""

from itertools import product

import numpy as np
import pytest
import torch
from helpers import noise
from torch.utils.flop_counter import FlopCounterMode

from self1e import Self1EForSegmentation
from self1e.model.batch import pack
from self1e.model.config import LOSS_WEIGHTS
from self1e.model.grids import REPLICATIONS
from self1e.model.head import HEADS
from self1e.model.losses import mask_losses
from self1e.model.modeling import selective_checkpointing_kwargs
from self1e.training.adapters import adapt

SIDE = 2  # image tokens a tile side of the tiny model
ENLARGED = {"baseline": 1, "replication": 2, "rfr": 2, "rfa": 4}
# Images by their tile grid (rows, cols), and conversations with 1, 0, 2 and 3 [SEG].
SIZES = {(1, 2): (112, 56), (2, 1): (56, 112), (1, 3): (168, 56), (2, 2): (112, 112)}
CONVERSATIONS = [
    [["<image>\nthe cat", "[SEG]."], ["<image>\nhow many?", "two"]],
    [["<image>\nboth of them", "[SEG] and [SEG]."]],
    [["<image>\nwhat is it?", "a thing"]],
    [["<image>\nall", "[SEG][SEG] [SEG]", "why?", "so"], ["<image>\nthe large dog on the left", "It is [SEG]."]],
]
COUNTS = [1, 0, 2, 0, 3, 1]
PRODUCTS = torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm


def masks_for(conversations, seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = [" ".join(conversation).count("[SEG]") for conversation in conversations]
    return [(rng.random((n, 20, 30)) > 0.5).astype(np.uint8) for n in counts]


def mixed_batch(processor, **options):
    images = [noise(*size, seed) for seed, size in enumerate(SIZES.values())]
    targets = [masks_for(conversations, i) for i, conversations in enumerate(CONVERSATIONS)]
    return processor(images, CONVERSATIONS, targets, max_tiles=4, **options)


def one_group(model, batch) -> dict:
    """`packed`, so that all conversations go through the LLM together."""
    text = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    places = {"grids": batch["tile_grids"].tolist(), "row_image": batch["row_image"].tolist()}
    return {"packed": pack(*text, **places, tokens=model.config, groups=1)}


def without_gradient(model) -> list[str]:
    return [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None]


AUXILIARY = {"off": (False, False), "on": (True, False), "projected": (True, True)}
SWITCHES = [x for x in product(ENLARGED, REPLICATIONS, AUXILIARY) if x[0] == "rfa" or x[2] != "projected"]


@pytest.mark.parametrize(("features", "replication", "auxiliary"), SWITCHES)
def test_every_combination_runs_with_its_shapes(tiny_processor, load_tiny, features, replication, auxiliary):
    loss, projection = AUXILIARY[auxiliary]
    switches = {"auxiliary_loss": loss, "auxiliary_projection": projection}
    model = load_tiny(mask_features=features, replication=replication, **switches).train()
    out = model(**mixed_batch(tiny_processor))
    times = ENLARGED[features] * SIDE
    grids = [grid for grid, conversations in zip(SIZES, CONVERSATIONS) for _ in conversations]
    expected = [(n, times * rows, times * cols) for n, (rows, cols) in zip(COUNTS, grids)]
    assert [tuple(x.shape) for x in out.mask_logits] == expected
    assert out.losses.keys() == LOSS_WEIGHTS.keys() and torch.isfinite(out.loss)
    out.loss.backward()
    assert not without_gradient(model)


@torch.no_grad()
def test_conversations_together_equal_conversations_alone(tiny_processor, load_tiny):
    model = load_tiny()
    together = iter(model(**mixed_batch(tiny_processor)).mask_logits)
    for seed, (size, conversations) in enumerate(zip(SIZES.values(), CONVERSATIONS)):
        for conversation in conversations:
            found = next(together)
            alone = model(**tiny_processor([noise(*size, seed)], [[conversation]], max_tiles=4)).mask_logits
            assert len(found) == len(alone[0])
            if len(found):
                assert torch.allclose(found, alone[0], atol=1e-4)  # sums in another order


@torch.no_grad()
def test_several_seg_are_answered_in_order(tiny_processor, load_tiny):
    """The second mask of a conversation is the head's answer to the state before the second [SEG]."""
    model, given, states = load_tiny(), [], []
    model.segmentation_head.register_forward_pre_hook(lambda module, args: given.append(args))
    model.model.language_model.register_forward_hook(lambda module, args, out: states.append(out.last_hidden_state))
    conversations = [["<image>\nboth", "[SEG] and [SEG]."], ["<image>\none", "It is [SEG]."]]
    batch = tiny_processor([noise(56, 56)], [conversations])
    model(**batch | one_group(model, batch))
    ((_, _, _, seg, asked),), (states,) = given, states
    conversations, positions = (batch["input_ids"] == model.config.seg_token_id).nonzero().T
    assert [one.queries for one in asked] == [2, 1] and conversations.tolist() == [0, 0, 1]
    assert torch.equal(seg, states[conversations, positions - 1])


@pytest.mark.parametrize("training", [False, True])
def test_an_image_is_encoded_once_for_all_its_conversations(tiny_processor, load_tiny, training):
    model, tiles = load_tiny().train(training), []
    model.model.vision_tower.register_forward_hook(lambda module, args, out: tiles.append(len(out[0])))
    batch = mixed_batch(tiny_processor)
    model(**batch)
    assert tiles == [sum(rows * cols for rows, cols in SIZES)]


@torch.no_grad()
def test_evaluation_computes_no_vocabulary_logits(tiny_processor, load_tiny):
    model, calls = load_tiny(), []
    model.lm_head.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    batch = mixed_batch(tiny_processor)
    labels = batch.pop("labels")
    out = model(**{name: x for name, x in batch.items() if name != "mask_targets"})
    assert out.loss is None and out.logits is None and not calls
    model(**batch, labels=labels)
    assert [tuple(shape) for shape in calls] == [((labels != -100).sum().item(), len(tiny_processor.tokenizer))]


@torch.no_grad()
def test_loss_is_the_weighted_sum_and_the_auxiliary_mask_counts(tiny_processor, load_tiny):
    batch = mixed_batch(tiny_processor)
    weights = {name: 0.5 + number for number, name in enumerate(LOSS_WEIGHTS)}
    out = load_tiny(loss_weights=weights)(**batch)
    total = sum(weights[name] * value for name, value in out.losses.items())
    assert torch.allclose(out.loss, total)
    alone = load_tiny(auxiliary_loss=False)(**batch)
    expected = mask_losses([alone.mask_logits], batch["mask_targets"])
    assert all(torch.equal(alone.losses[name], value) for name, value in expected.items())
    assert out.losses["mask_bce"] > alone.losses["mask_bce"]


EMPTY = {
    "no [SEG]": ([["<image>\nhow many?", "two"], ["<image>\nwhy?", "because"]], [None, None], False),
    "no [SEG], empty masks": ([["<image>\nhow many?", "two"]], [np.zeros((0, 4, 4), np.uint8)], False),
    "no supervised text": ([["<image>\nit", "[SEG]."]], [np.ones((1, 4, 4), np.uint8)], True),
    "no supervised text, no [SEG]": ([["<image>\nhow many?"]], [None], True),
    "[SEG] without masks": ([["<image>\nit", "[SEG]."]], [None], False),
    "nothing at all": ([["<image>\nit", "[SEG]."]], [None], True),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mask_features", HEADS)
@pytest.mark.parametrize("name", EMPTY)
def test_every_micro_batch_reaches_every_parameter(tiny_processor, load_tiny, name, mask_features, checkpointing):
    """A rank that skipped a parameter would leave the others waiting for its gradient."""
    conversations, targets, unsupervised = EMPTY[name]
    batch = tiny_processor([noise(112, 56)], [conversations], [targets], max_tiles=2)
    if unsupervised:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    model = load_tiny(mask_features=mask_features).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    out = model(**batch)
    assert torch.isfinite(out.loss) and (not unsupervised or out.losses["ce"] == 0)
    out.loss.backward()
    assert not without_gradient(model)
    assert all(torch.isfinite(x.grad).all() for x in model.parameters())
    if all(target is None or not len(target) for target in targets):
        assert not any(x.grad.any() for x in model.segmentation_head.parameters())


CHECKPOINTING = {"full": {"use_reentrant": False}, "selective": selective_checkpointing_kwargs()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_checkpointing_changes_no_bit(tiny_processor, load_tiny, kind, autocast):
    """With adapters and their dropout on both towers, in float32 and under autocast."""
    found = []
    for kwargs in (None, CHECKPOINTING[kind]):
        model = load_tiny().train()
        torch.manual_seed(0)
        adapt(model, use_llm_lora=True, use_vision_lora=True, optimize_vision=True, lora_r=4, lora_dropout=0.3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        if kwargs:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**mixed_batch(tiny_processor)).loss
        loss.backward()
        found.append({"loss": loss} | {name: x.grad for name, x in model.named_parameters() if x.requires_grad})
    assert [name for name, x in found[0].items() if not torch.equal(x, found[1][name])] == []


def test_selective_checkpointing_computes_no_product_twice(tiny_processor, load_tiny):
    flops = {}
    for kind, kwargs in ({"none": None} | CHECKPOINTING).items():
        model = load_tiny().train()
        if kwargs:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        with FlopCounterMode(display=False) as counter:
            model(**mixed_batch(tiny_processor)).loss.backward()
        flops[kind] = sum(counter.get_flop_counts()["Global"][op] for op in PRODUCTS)
    assert flops["none"] == flops["selective"] < flops["full"]


def test_each_branch_of_each_tile_is_kept_twice_as_strong_or_dropped(make_tiny, load_tiny):
    plain = load_tiny().model.vision_tower.encoder.layer[1]
    layer = load_tiny(make_tiny(drop_path_rate=0.5)).model.vision_tower.encoder.layer[1]
    assert all(torch.equal(x, layer.state_dict()[name]) for name, x in plain.state_dict().items())
    torch.manual_seed(0)
    x = torch.randn(32, 5, 32)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), plain(x))
        found, kinds = layer.train()(x), []
        layer.eval()
        for attention in (0, 2):
            h = x + attention * layer.lambda_1 * layer.attention(layer.layernorm_before(x))[0]
            kinds += [h + mlp * layer.lambda_2 * layer.mlp(layer.layernorm_after(h)) for mlp in (0, 2)]
    matches = torch.stack([(kind - found).abs().amax((1, 2)) < 1e-5 for kind in kinds])
    assert (matches.sum(0) == 1).all() and (matches.sum(1) > 0).all()


@pytest.mark.parametrize("training", [False, True])
def test_bfloat16(tiny_processor, load_tiny, training):
    batch = mixed_batch(tiny_processor)
    model = load_tiny(dtype=torch.bfloat16).train(training)
    out, exact = model(**batch), load_tiny()(**batch)
    assert {x.dtype for x in out.mask_logits} == {torch.bfloat16} and out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)  # 8 bits of mantissa, some twenty layers
    out.loss.backward()
    assert all(torch.isfinite(x.grad).all() for x in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_text_alone_runs(tiny_processor, load_tiny, training):
    ids = tiny_processor.tokenizer("no picture here", return_tensors="pt").input_ids
    out = load_tiny().train(training)(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    assert out.loss.item() > 0 and out.mask_logits is None


def test_fresh_heads_follow_the_seed(tiny_version, tiny_processor):
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(Self1EForSegmentation.from_pretrained(tiny_version).segmentation_head.f_llm[0].weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(0.02, rel=0.1)  # a thousand draws
