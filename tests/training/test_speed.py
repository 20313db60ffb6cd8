"""Operations of a training pass and the memory that checkpointing saves, against the counts of `apps.costs`."""

from collections import Counter
from unittest.mock import patch

import pytest
import torch
from helpers import noise

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps import costs
from self1e.training.adapters import adapt, keep_frozen_in
from self1e.training.speed import advice, compile_layers, count_work, peak_flops


@pytest.fixture
def batch(tiny_version):
    """Two images, with two masks and with text alone."""
    texts = [["<image>\nthe cat?", "Sure, [SEG]."], ["<image>\nit?", "[SEG]."]], [["<image>\nhow many?", "two"]]
    masks = [torch.ones(2, 40, 60, dtype=torch.uint8), None]
    return Self1EProcessor.from_pretrained(tiny_version)([noise(60, 40), noise(40, 60, seed=1)], [*texts], masks)


def test_operations_and_memory_are_those_that_are_counted_one_by_one():
    """Of the 1B, with a third of its layers."""
    work: list[Counter] = []

    def watched(model, **flags):
        adapt(model, **flags)
        work.append(count_work(model, torch.bfloat16))

    with patch.object(costs, "adapt", watched), patch.dict(costs.SIZES, {"1B": (896, 8, 14, 2, 4864)}):
        found = {kind: costs.training_cost("1B", kind) for kind in costs.CHECKPOINTING}
    saved, flops = work[0]["saved"] / 2, work[0]["flops"] / 2  # the pass runs twice
    assert [found[kind].flops for kind in ("none", "selective")] == pytest.approx([flops, flops], rel=0.03)
    more = [found[kind].activations - found["full"].activations for kind in ("none", "selective")]
    assert more == pytest.approx([1.5 * saved, saved], rel=0.1)


def test_validation_does_not_count(tiny_version, batch):
    model = Self1EForSegmentation.from_pretrained(tiny_version)
    work = count_work(model, torch.float32)
    with torch.no_grad():
        model(**batch)
    assert not work
    model.train()(**batch)
    assert work["flops"] > work["saved"] > 0


def test_advice_names_what_fits():
    saved, spare = 18 * 10**9, 10**9
    assert "--no-gradient_checkpointing would take about 27 GB" in advice("full", saved, 40 * spare)
    assert "selective would take about 18 GB of them and save about 30%" in advice("full", saved, 25 * spare)
    assert "--gradient_checkpointing full is the fastest" in advice("full", saved, 10 * spare)
    assert "--gradient_checkpointing full is the fastest" in advice("full", saved, 25 * spare, compiled=True)
    assert "--no-gradient_checkpointing would take about 9 GB" in advice("selective", saved, 25 * spare)
    assert "--no-gradient_checkpointing is the fastest" in advice(None, saved, spare)


def test_the_peak_is_measured():
    assert 1e8 < peak_flops(torch.device("cpu"), "fp32") < 1e14


def test_compiled_layers_give_the_same_losses_and_gradients(tiny_version, batch):
    losses, gradients = [], []
    for compiled in False, True:
        torch.manual_seed(0)
        model = Self1EForSegmentation.from_pretrained(tiny_version).train()
        names = list(model.state_dict())
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if compiled:
            compile_layers(model, backend="aot_eager")  # inductor takes a minute
        torch.manual_seed(1)
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([x.grad for x in model.parameters() if x.grad is not None])
        assert list(model.state_dict()) == names
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def test_frozen_weights_in_bf16_change_nothing_under_autocast(tiny_version, batch):
    """Nor the trained model, where the checkpoint is in bf16, as published ones are."""
    losses, merged = [], []
    for dtype in torch.float32, torch.bfloat16:
        torch.manual_seed(0)
        model = Self1EForSegmentation.from_pretrained(tiny_version, dtype=torch.bfloat16).float().train()
        tuner = adapt(model, use_llm_lora=True, use_vision_lora=True, optimize_vision=True, lora_r=4, lora_dropout=0)
        before = sum(x.nbytes for x in model.parameters())
        keep_frozen_in(dtype, model)
        frozen = sum(x.numel() for name, x in model.named_parameters() if "base_layer.weight" in name)
        assert before - sum(x.nbytes for x in model.parameters()) == (2 * frozen if dtype == torch.bfloat16 else 0)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(**batch).loss)
        losses[-1].backward()
        with torch.no_grad():
            for x in model.parameters():
                x.sub_(0.1 * x.grad if x.grad is not None else 0)
        keep_frozen_in(torch.float32, model)
        merged.append(tuner.merge_and_unload().state_dict())
    assert losses[0].item() == losses[1].item()
    torch.testing.assert_close(merged[1], merged[0], rtol=1e-3, atol=1e-5)
