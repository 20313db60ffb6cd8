"""Configurations of every layout and size, and back."""

import json

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from self1e import Self1EConfig, Self1EForSegmentation
from self1e.errors import UserError
from self1e.evaluation.results import weights_identity
from self1e.model.config import LOSS_WEIGHTS, SWITCHES, original_config

# Published sizes: LLM (type, width, layers, heads, key/value heads, MLP width, vocabulary) over InternViT-300M.
RELEASES = {
    "InternVL3-1B": ("qwen2", 896, 24, 14, 2, 4864, 151674),
    "InternVL3-2B": ("qwen2", 1536, 28, 12, 2, 8960, 151674),
    "InternVL3-8B": ("qwen2", 3584, 28, 28, 4, 18944, 151674),
    "InternVL3_5-8B": ("qwen3", 4096, 36, 32, 8, 12288, 151936),
}


def release(name: str, **changes) -> dict:
    """config.json of a release, layout `internvl`, its keys that matter here."""
    kind, width, layers, heads, kv_heads, mlp, vocabulary = RELEASES[name]
    llm = {
        "model_type": kind, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocabulary, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": False,
        "architectures": ["any"], "_name_or_path": "somewhere", "top_k": 50, "use_bfloat16": True,
    }  # fmt: skip
    if kind == "qwen3":
        llm |= {"head_dim": 128, "attention_bias": False}
    vision = {
        "model_type": "intern_vit_6b", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096, "image_size": 448, "patch_size": 14, "qkv_bias": True, "qk_normalization": False,
        "norm_type": "layer_norm", "layer_norm_eps": 1e-6, "hidden_act": "gelu", "drop_path_rate": 0.1, "dropout": 0.0,
        "attention_dropout": 0.0, "initializer_factor": 1.0, "initializer_range": 0.02, "num_channels": 3,
    }  # fmt: skip
    config = {
        "model_type": "internvl_chat", "llm_config": llm, "vision_config": vision, "force_image_size": 448,
        "downsample_ratio": 0.5, "select_layer": -1, "torch_dtype": "bfloat16", "template": "internvl2_5",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    }  # fmt: skip
    return config | changes


def read(folder, config: dict) -> Self1EConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return Self1EConfig.from_pretrained(folder)


def on_meta(config: Self1EConfig) -> Self1EForSegmentation:
    with torch.device("meta"):
        return Self1EForSegmentation(config)


def test_internvl3_2b_has_its_published_size(tmp_path):
    model = on_meta(read(tmp_path, release("InternVL3-2B")))
    head = sum(x.numel() for x in model.segmentation_head.parameters())
    assert (model.num_parameters() - head) // 1000 == 2_088_957
    width = 1536
    assert head == 2 * (5 * width**2 + 5 * width) + 2 * (width**2 + width)  # f_llm and f_vit, f_out


@pytest.mark.parametrize(
    ("name", "billions"), [("InternVL3-1B", 0.94), ("InternVL3-8B", 7.94), ("InternVL3_5-8B", 8.53)]
)
def test_other_releases_build_from_their_config_alone(tmp_path, name, billions):
    config = read(tmp_path, release(name))
    model = on_meta(config)
    head = sum(x.numel() for x in model.segmentation_head.parameters())
    assert (model.num_parameters() - head) / 1e9 == pytest.approx(billions, abs=0.005)
    assert (config.tile_size, config.tile_side, config.tile_tokens, config.ratio) == (448, 16, 256, 2)
    norms = [name for name, _ in model.named_parameters() if name.endswith("self_attn.q_norm.weight")]
    assert len(norms) == (RELEASES[name][2] if RELEASES[name][0] == "qwen3" else 0)


def test_values_reach_their_places(tmp_path):
    config = read(tmp_path, release("InternVL3-2B"))
    assert config.vision_config.attention_bias is True and config.vision_config.use_qk_norm is False
    assert config.text_config.rope_parameters == {
        "rope_type": "dynamic", "type": "dynamic", "factor": 2.0, "rope_theta": 1e6
    }  # fmt: skip
    assert config.drop_path_rate == 0.1 and config.tie_word_embeddings is False and config.seg_token_id is None
    assert config.dtype == torch.bfloat16
    layers = on_meta(config).model.vision_tower.encoder.layer
    assert [layer.dropout.drop_prob for layer in layers] == pytest.approx([0.1 * i / 23 for i in range(24)])


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_follow_the_llm(tmp_path, tied):
    config = release("InternVL3-1B")
    config["llm_config"]["tie_word_embeddings"] = tied
    model = on_meta(read(tmp_path, config))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    native = {"model_type": "internvl", "text_config": {"model_type": "qwen2", "tie_word_embeddings": tied}}
    assert read(tmp_path, native).tie_word_embeddings == tied
    # Without a word in the LLM's config the outer one decides.
    native = {"model_type": "internvl", "text_config": {"model_type": "qwen2"}, "tie_word_embeddings": tied}
    assert read(tmp_path, native).tie_word_embeddings == tied


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("tied", [False, True])
def test_original_config_is_the_inverse(tmp_path, name, tied):
    values = release(name)
    values["llm_config"]["tie_word_embeddings"] = tied
    config = read(tmp_path, values)
    written = json.loads(json.dumps(original_config(config), default=str))
    for key in ("model_type", "force_image_size", "downsample_ratio", "select_layer", "torch_dtype", "template"):
        assert written[key] == values[key]
    ignored = {"torch_dtype", "_name_or_path", "top_k", "use_bfloat16", "rope_scaling", "architectures"}
    for key in values["llm_config"].keys() - ignored:
        assert written["llm_config"][key] == values["llm_config"][key], key
    assert written["llm_config"]["rope_scaling"] | {"type": "dynamic"} == values["llm_config"]["rope_scaling"]
    for key in values["vision_config"].keys() - {"initializer_factor"}:
        assert written["vision_config"][key] == values["vision_config"][key], key
    again, first = read(tmp_path, written).to_dict(), config.to_dict()
    assert again | {"architectures": None} == first


def test_saved_config_reads_back_with_its_switches(tmp_path):
    config = read(tmp_path, release("InternVL3-2B"))
    chosen = {"replication": "window", "attention_pathway": "image", "auxiliary_projection": True, "seg_token_id": 7}
    config.update(chosen | {"loss_weights": LOSS_WEIGHTS | {"ce": 0.1}})
    config.save_pretrained(tmp_path)
    for again in (Self1EConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(again, Self1EConfig)
        assert {name: getattr(again, name) for name in chosen} == chosen
        assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_switches_are_fields_and_their_defaults_are_the_paper():
    config = Self1EConfig(loss_weights={"ce": 0.0})
    assert SWITCHES.keys() <= config.to_dict().keys()
    paper = {"mask_features": "rfa", "replication": "tile", "attention_pathway": "image+seg", "auxiliary_loss": True}
    assert all(getattr(config, name) == value for name, value in paper.items())
    assert config.loss_weights == LOSS_WEIGHTS | {"ce": 0.0}


@pytest.mark.parametrize("name", [name for name, flag in SWITCHES.items() if "choices" in flag])
def test_unknown_switches_are_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=name):
        Self1EConfig(**{name: "none of these"})


@pytest.mark.parametrize("missing", [{"auxiliary_loss": False}, {"mask_features": "rfr"}])
def test_auxiliary_projection_needs_what_it_projects(missing):
    with pytest.raises(UserError, match="auxiliary_projection needs"):
        Self1EConfig(auxiliary_projection=True, **missing)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "bert", "hidden_size": 768}, "model_type='bert'; expected an InternVL3 checkpoint"),
        (release("InternVL3-2B", llm_config={"model_type": "llama"}), "'llama'; expected a qwen2 or qwen3"),
    ],
)
def test_other_architectures_are_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, values)
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


PATHS = ["/no/such/folder", "./runs/none", "../none", "~/weights", "InternVL3-2B", "a/b/c", "{tmp}/none", "runs/base"]


@pytest.mark.parametrize("source", PATHS)
def test_absent_paths_are_refused_without_asking_the_hub(tmp_path, monkeypatch, source):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda *args, **kwargs: pytest.fail("asked"))
    source = source.format(tmp=tmp_path)
    with pytest.raises(UserError, match=f"{source} is no folder"):
        Self1EConfig.from_pretrained(source)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no folder with a config.json"):
        Self1EConfig.from_pretrained(tmp_path)


def test_a_repository_of_several_checkpoints_lists_them(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it asks, again and again
    files = ["README.md", "small/config.json", "small/model.safetensors", "large/config.json"]
    monkeypatch.setattr("self1e.model.config.HfApi.list_repo_files", lambda self, name: files)
    for read_anything in Self1EConfig.from_pretrained, weights_identity:
        with pytest.raises(UserError, match=r"several checkpoints, large, small; hf download nobody/nothing"):
            read_anything("nobody/nothing")


def test_an_absent_repository_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for read_anything in Self1EConfig.from_pretrained, weights_identity:
        with pytest.raises(UserError, match="nobody/nothing"):
            read_anything("nobody/nothing")
