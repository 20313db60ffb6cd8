"""The maker of tiny checkpoints: real layouts, loadable, seeded."""

import pytest
import torch
from helpers import SHARED, files, needs_shared, read_json
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer

from self1e.synthetic import tiny_internvl as tiny

SMALL = {"image_size": 28, "width": 32, "layers": 2, "vision_width": 32, "vision_layers": 2}
GOLDEN = SHARED / "golden/model/base_internvl_chat"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.make_tiny_internvl(tmp_path_factory.mktemp("internvl"), **SMALL)


def test_shards_hold_the_same_weights(tmp_path, checkpoint):
    folder = tiny.make_tiny_internvl(tmp_path, shards=3, **SMALL)
    index = read_json(folder / "model.safetensors.index.json")
    parts = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    assert len(parts) >= 3
    whole = load_file(checkpoint / "model.safetensors")
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert all(torch.equal(parts[file][name], whole[name]) for name, file in index["weight_map"].items())
    tiny.make_tiny_internvl(folder, **SMALL)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]


def test_checkpoint_is_seeded(tmp_path, checkpoint):
    assert files(tiny.make_tiny_internvl(tmp_path / "same", **SMALL)) == files(checkpoint)
    other = load_file(tiny.make_tiny_internvl(tmp_path / "other", seed=1, **SMALL) / "model.safetensors")
    assert not torch.equal(other["mlp1.1.weight"], load_file(checkpoint / "model.safetensors")["mlp1.1.weight"])


@needs_shared
def test_layout_is_the_golden_checkpoints(tmp_path):
    sizes = {"width": 16, "vision_width": 16, "layers": 2, "vision_layers": 2}
    folder = tiny.make_tiny_internvl(tmp_path, image_size=448, **sizes)
    golden, ours = load_file(GOLDEN / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(ours) == set(golden)
    differ = {name for name in golden if golden[name].shape != ours[name].shape}
    wider = ("embed_tokens", "lm_head", ".mlp.", "merges")  # other vocabulary, other MLP width
    assert all(any(part in name for part in wider) for name in differ), differ
    assert all(golden[name].dtype == ours[name].dtype and golden[name].ndim == ours[name].ndim for name in golden)

    config, reference = read_json(folder / "config.json"), read_json(GOLDEN / "config.json")
    for ours, theirs in ((config, reference), *((config[k], reference[k]) for k in ("llm_config", "vision_config"))):
        assert not set(ours) - set(theirs) - {"torch_dtype"}
    assert config["llm_config"]["rope_scaling"].items() <= reference["llm_config"]["rope_scaling"].items()
    assert config["auto_map"].items() <= reference["auto_map"].items()


def test_tokenizer(checkpoint):
    tokenizer = Qwen2Tokenizer.from_pretrained(checkpoint)
    size = len(tokenizer)
    assert size == read_json(checkpoint / "config.json")["llm_config"]["vocab_size"]
    assert tokenizer.convert_tokens_to_ids("!") == 0
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for text in ("Please segment the red circle in this image.", "  a\tb\n\n\nc ", "日本 café 🙂 \u200b", "x" * 99):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    words = " red green blue yellow purple orange circle square triangle star cross ring leftmost largest".split()
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in words)
    row = tokenizer.encode("<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nhi<|im_end|>\n")
    assert row.count(tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")) == 2
    assert tokenizer.add_tokens(["[SEG]", "[SEGT]"], special_tokens=True) == 2
    assert tokenizer.encode("[SEG].[SEGT]") == [size, tokenizer.encode(".")[0], size + 1]
