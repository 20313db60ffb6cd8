"""What trains, what is frozen, what carries adapters: every combination, on tiny models."""

import copy
import itertools

import pytest
import torch
from helpers import noise

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.errors import UserError
from self1e.model.weights import HEAD, save_checkpoint
from self1e.training.adapters import (
    LLM,
    LLM_LINEARS,
    PROJECTOR,
    VISION,
    VISION_LINEARS,
    adapt,
    merge_added_tokens,
    optimizer_groups,
    train_added_tokens,
)

COMBINATIONS = [
    dict(zip(("use_llm_lora", "optimize_vision", "use_vision_lora", "freeze_llm"), values))
    for values in itertools.product((False, True), repeat=4)
    if (values[1] or not values[2]) and not (values[0] and values[3])
]


def batch_of(version):
    """Two images: a conversation with a mask, one of text."""
    return Self1EProcessor.from_pretrained(version)(
        images=[noise(60, 40), noise(40, 60, seed=1)],
        conversations=[[["<image>\nthe cat?", "Sure, [SEG]."]], [["<image>\nhow many?", "two"]]],
        mask_targets=[torch.ones(1, 40, 60, dtype=torch.uint8), [torch.zeros(0, 60, 40, dtype=torch.uint8)]],
    )


def expected_kind(name: str, *, use_llm_lora, optimize_vision, use_vision_lora, freeze_llm) -> str:
    """The words of the documentation, by the parameter's name."""
    if ".lora_" in name:
        return "adapters"
    if name.startswith((VISION, PROJECTOR)):
        if not optimize_vision or (use_vision_lora and name.startswith(VISION)):
            return "frozen"
    elif (use_llm_lora or freeze_llm) and name.startswith((LLM + "layers.", LLM + "norm.")):
        return "frozen"
    return "trained"


@pytest.mark.parametrize("flags", COMBINATIONS, ids=lambda flags: "+".join(k for k, v in flags.items() if v) or "none")
def test_what_trains_moves_and_the_rest_does_not(flags, tiny_version, make_tiny):
    tied = flags == COMBINATIONS[-1]
    version = make_tiny(tie_word_embeddings=True) if tied else tiny_version
    torch.manual_seed(0)
    model = Self1EForSegmentation.from_pretrained(version)
    adapt(model, **flags, lora_r=2, lora_dropout=0.0)
    model.train()
    kinds = {name: expected_kind(name, **flags) for name, _ in model.named_parameters()}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, kind in kinds.items() if kind != "frozen"
    }
    assert any(LLM in name for name in kinds if ".lora_" in name) == flags["use_llm_lora"]
    assert any(VISION in name for name in kinds if ".lora_" in name) == flags["use_vision_lora"]

    groups = {group["name"]: group for group in optimizer_groups(model, lr=1e-2, vision_lr=2e-2)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {name: group["lr"] for name, group in groups.items()} == {"llm": 1e-2, "vision_and_head": 2e-2}
    assert all(names[id(x)].startswith((LLM, "lm_head.")) for x in groups["llm"]["params"])
    assert all(names[id(x)].startswith((VISION, PROJECTOR, HEAD)) for x in groups["vision_and_head"]["params"])
    covered = [names[id(p)] for group in groups.values() for p in group["params"]]
    assert sorted(covered) == sorted(name for name, kind in kinds.items() if kind != "frozen")

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = batch_of(version)
    optimizer = torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(2):  # the first step moves only the B of an adapter: its A is multiplied by B = 0
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    # a bias of the keys shifts all scores of a query alike: softmax does not see it, its gradient is rounding
    assert {name for name in still if not name.endswith("k_proj.bias")} == {
        name for name, kind in kinds.items() if kind == "frozen" and not name.endswith("k_proj.bias")
    }


@pytest.mark.parametrize("flags", [f for f in COMBINATIONS if f["use_llm_lora"] or f["use_vision_lora"]], ids=str)
def test_merged_weights_give_the_adapted_output(flags, tiny_version, load_tiny):
    model = load_tiny()
    plain = set(model.state_dict())
    tuner = adapt(model, **flags, lora_r=4)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.eval()
    batch = batch_of(tiny_version)
    base = load_tiny().eval()(**batch).mask_logits[0]
    with torch.no_grad():
        adapted = model(**batch)
        merged = tuner.merge_and_unload()
        again = merged.eval()(**batch)
    assert merged is model and set(merged.state_dict()) == plain
    assert (adapted.mask_logits[0] - base).abs().max() > 1e-2  # the adapters do something
    torch.testing.assert_close(again.mask_logits[0], adapted.mask_logits[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.loss, adapted.loss, rtol=1e-5, atol=1e-5)


def matrices(model) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_added_tokens_move_as_in_the_whole_matrices_and_the_others_stay(tied, tiny_version, make_tiny, tmp_path):
    version = make_tiny(tie_word_embeddings=True) if tied else tiny_version
    torch.manual_seed(0)
    whole, batch = Self1EForSegmentation.from_pretrained(version), batch_of(version)
    first = whole.config.seg_token_id
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_("embed_tokens" in name or name.startswith("lm_head"))
    apart, before = copy.deepcopy(whole), [matrix.clone() for matrix in matrices(whole)]
    train_added_tokens(apart, first)
    trained = [name for name, parameter in apart.named_parameters() if parameter.requires_grad]
    assert trained and all(name.endswith(".added_tokens") for name in trained)
    for model in (apart, whole):
        optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.1)
        model(**batch).loss.backward()
        optimizer.step()
    expected = apart(**batch).loss.item()
    merge_added_tokens(apart)
    assert apart.state_dict().keys() == whole.state_dict().keys()
    for ours, theirs, start in zip(matrices(apart), matrices(whole), before):
        assert torch.equal(ours[:first], start[:first]) and not torch.equal(theirs[:first], start[:first])
        assert not torch.equal(ours[first:], start[first:])
        torch.testing.assert_close(ours[first:], theirs[first:], rtol=1e-4, atol=1e-7)
    apart.trained_head = True
    save_checkpoint(apart, Self1EProcessor.from_pretrained(version), tmp_path / "saved")
    assert Self1EForSegmentation.from_pretrained(tmp_path / "saved")(**batch).loss.item() == pytest.approx(expected)


def adapted_modules(model) -> set[str]:
    return {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}


def test_every_linear_of_llm_and_vit_gets_an_adapter(load_tiny):
    model = load_tiny()
    adapt(model, use_llm_lora=True, use_vision_lora=True, optimize_vision=True, lora_r=2)
    found = adapted_modules(model)
    layers = model.config.text_config.num_hidden_layers
    assert len([name for name in found if name.startswith(LLM)]) == layers * len(LLM_LINEARS)
    depth = model.config.vision_config.num_hidden_layers
    assert len([name for name in found if name.startswith(VISION)]) == depth * len(VISION_LINEARS)
    q = model.model.language_model.layers[0].self_attn.q_proj
    assert q.scaling["default"] == 2.0 and q.r["default"] == 2  # alpha defaults to twice r
    assert q.lora_dropout["default"].p == 0.05


def test_layers_and_targets_can_be_chosen(load_tiny):
    model = load_tiny()
    flags = {"use_llm_lora": True, "use_vision_lora": False, "optimize_vision": False, "lora_r": 2, "lora_alpha": 2}
    adapt(model, **flags, lora_target_modules="q_proj", lora_from_layer=1)
    assert adapted_modules(model) == {LLM + "layers.1.self_attn.q_proj"}
    assert model.model.language_model.layers[1].self_attn.q_proj.scaling["default"] == 1.0
    # below `from_layer` nothing of the layers trains
    assert not any(p.requires_grad for p in model.model.language_model.layers[0].parameters())


def test_nonsense_is_refused(load_tiny):
    flags = {"use_llm_lora": True, "use_vision_lora": False, "optimize_vision": False}
    with pytest.raises(UserError, match="--lora_target_modules: unknown 'wq'"):
        adapt(load_tiny(), **flags, lora_target_modules="wq")
    with pytest.raises(UserError, match="--lora_from_layer 2: the LLM's layers are 0 to 1"):
        adapt(load_tiny(), **flags, lora_from_layer=2)
