"""As the hub has it: round trips to the bit, shards, Auto classes, device maps, hub ids, bitsandbytes."""

import importlib.util
import shutil
from argparse import Namespace

import pytest
import torch
from helpers import make_trained, read_json
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from self1e import Self1EConfig, Self1EForSegmentation, Self1EProcessor
from self1e.apps.loading import load
from self1e.errors import UserError
from self1e.evaluation.results import weights_identity

SENTENCE = "Which one of these rolls?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("hub") / "trained")


@pytest.fixture(scope="module")
def image():
    return Image.linear_gradient("L").resize((60, 40)).convert("RGB")


def logits(model, processor, image):
    return torch.from_numpy(model.segment(processor, image, SENTENCE)[0].logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_keeps_every_bit_in_shards(folder, image, tmp_path, dtype):
    model = Self1EForSegmentation.from_pretrained(folder, dtype=dtype)
    processor = Self1EProcessor.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert type(again) is Self1EForSegmentation and again.trained_head and again.dtype == dtype
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    reread = AutoProcessor.from_pretrained(tmp_path)
    conversations = [[[f"<image>\n{SENTENCE} É 猫", "Sure, [SEG]."]]]
    one, other = (p(images=[image], conversations=conversations) for p in (processor, reread))
    assert type(reread) is Self1EProcessor and one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    # Kernels round by where tensors lie in memory.
    torch.testing.assert_close(logits(again, reread, image), logits(model, processor, image), rtol=1e-4, atol=1e-5)


def test_generation_config_ends_answers(folder):
    tokenizer = Self1EProcessor.from_pretrained(folder).tokenizer
    saved = read_json(folder / "generation_config.json")
    assert saved["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert saved["pad_token_id"] == tokenizer.pad_token_id
    assert Self1EForSegmentation.from_pretrained(folder).generation_config.eos_token_id == saved["eos_token_id"]


def test_auto_classes_and_device_maps(folder, image, tmp_path):
    assert type(AutoConfig.from_pretrained(folder)) is Self1EConfig
    processor = AutoProcessor.from_pretrained(folder)
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert type(plain) is Self1EForSegmentation
    auto = AutoModel.from_pretrained(folder, device_map="auto", dtype=torch.float32)
    assert auto.trained_head and logits(auto, processor, image).equal(logits(plain, processor, image).to("cpu"))
    parts = {"model": "cpu", "lm_head": "cpu", "segmentation_head": "disk"}  # hooks move weights in and out
    split = AutoModel.from_pretrained(folder, device_map=parts, offload_folder=tmp_path, dtype=torch.float32)
    assert next(split.segmentation_head.parameters()).device.type == "meta"
    torch.testing.assert_close(logits(split, processor, image), logits(plain, processor, image))


def test_hub_ids_are_read_like_folders(folder, image, tmp_path, monkeypatch):
    """From the client's own cache, which a download would have filled."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, source in {"base": folder.with_name("trained_base"), "weights": folder}.items():
        shutil.copytree(source, tmp_path / f"models--org--{name}/snapshots/{commit}")
        (tmp_path / f"models--org--{name}/refs").mkdir()
        (tmp_path / f"models--org--{name}/refs/main").write_text(commit)
    model = Self1EForSegmentation.from_pretrained("org/base", weights="org/weights")
    expected = Self1EForSegmentation.from_pretrained(folder)
    processor = Self1EProcessor.from_pretrained("org/base")
    assert model.trained_head and logits(model, processor, image).equal(logits(expected, processor, image))
    found = weights_identity("org/base", "org/weights")
    assert found == {"weights": f"org/weights@{commit}", "base": f"org/base@{commit}"}
    (tmp_path / f"models--org--weights/snapshots/{commit}/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="org/weights holds a PEFT adapter"):
        Self1EForSegmentation.from_pretrained("org/base", weights="org/weights")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_model_segments(tmp_path, image, bits):
    """4 and 8 bits round the weights: close to full precision, but not equal.

    The widths are multiples of 64, as every released model's are: bitsandbytes' 4-bit blocks hold 64 weights.
    """
    wide = {"width": 64, "heads": 2, "vision_width": 64}
    folder = make_trained(tmp_path / "wide", **wide)
    flags = {"version": str(folder), "model_weights": None, "device": "cpu", "precision": None}
    full, processor = load(Namespace(**flags, quantize=None))
    model, _ = load(Namespace(**flags, quantize=bits))
    kinds = {type(module).__name__ for module in model.model.language_model.modules()}
    assert "Linear4bit" in kinds or "Linear8bitLt" in kinds
    assert type(model.segmentation_head.f_out[0]) is torch.nn.Linear is type(model.lm_head)
    one, other = logits(full, processor, image), logits(model, processor, image)
    assert one.shape == other.shape and not one.equal(other)
    assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.9
