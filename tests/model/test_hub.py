"""The Hub format: round trips to the bit, shards, Auto classes, device maps, quantization, push."""

import importlib.util
import json

import pytest
import torch
from helpers import make_trained
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from self1e import Self1EConfig, Self1EForSegmentation, Self1EProcessor
from self1e.apps.loading import load

SENTENCE = "Which one of these rolls?"
FILES = {
    "chat_template.jinja", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


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
    shards = {path.name for path in tmp_path.glob("model-*.safetensors")}
    assert len(shards) > 2
    assert {path.name for path in tmp_path.iterdir()} == FILES | shards | {"model.safetensors.index.json"}
    again = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert type(again) is Self1EForSegmentation and again.trained_head and again.dtype == dtype
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    reread = AutoProcessor.from_pretrained(tmp_path)
    rows = [[[f"<image>\n{SENTENCE} É 猫", "Sure, [SEG]."]]]
    one, other = (p(images=[image], conversations=rows) for p in (processor, reread))
    assert type(reread) is Self1EProcessor and one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    assert reread.chat_template == processor.chat_template
    assert logits(again, reread, image).equal(logits(model, processor, image))


def test_chat_template_is_the_processor_s_own_format(folder):
    processor = AutoProcessor.from_pretrained(folder)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is it?"}]},
        {"role": "assistant", "content": "It is [SEG]."},
        {"role": "user", "content": "Why?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    image_tokens = "<img>" + "<IMG_CONTEXT>" * processor.tile_tokens + "</img>"
    ids = processor.tokenizer(text.replace("<image>", image_tokens), add_special_tokens=False)["input_ids"]
    assert ids == processor.encode_row(["<image>\nWhere is it?", "It is [SEG].", "Why?"], n_tiles=1)[0]


def test_generation_config_ends_answers(folder):
    tokenizer = Self1EProcessor.from_pretrained(folder).tokenizer
    saved = json.loads((folder / "generation_config.json").read_text())
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


def test_push_to_hub_uploads_the_whole_model(folder, monkeypatch):
    """No hub here: what the library hands to its client is recorded instead of sent."""
    from transformers.utils import hub

    class Recorder:
        files: dict[str, set[str]] = {}

        def __getattr__(self, name):
            def call(*args, **kwargs):
                if name == "create_repo":
                    return type("Url", (), {"repo_id": args[0]})
                assert name in ("create_commit", "create_branch"), name
                operations = kwargs.get("operations", ())
                self.files[kwargs["repo_id"]] = {operation.path_in_repo for operation in operations}
                return "sent"

            return call

    class Card:
        def save(self, path):
            pass

    recorder = Recorder()
    monkeypatch.setattr(hub, "hf_api", lambda: recorder)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: Card())
    Self1EForSegmentation.from_pretrained(folder).push_to_hub("someone/model", max_shard_size="200KB")
    sent = recorder.files["someone/model"]
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} < sent
    assert sum(name.endswith(".safetensors") for name in sent) > 1
    Self1EProcessor.from_pretrained(folder).push_to_hub("someone/processor")
    assert recorder.files["someone/processor"] == FILES - {"config.json", "generation_config.json"}


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_model_segments(tmp_path, image, bits):
    """4 and 8 bits round the weights: close to full precision, but not equal.

    The widths are multiples of 64, as every released model's are: bitsandbytes' 4-bit blocks hold 64 weights.
    """
    wide = {"width": 64, "heads": 2, "kv_heads": 2, "vision_width": 64}
    folder = make_trained(tmp_path / "wide", **wide)
    full, processor = load(str(folder), device="cpu")
    model, _ = load(str(folder), device="cpu", bits=bits)
    kinds = {type(module).__name__ for module in model.model.language_model.modules()}
    assert "Linear4bit" in kinds or "Linear8bitLt" in kinds
    assert type(model.segmentation_head.f_out[0]) is torch.nn.Linear is type(model.lm_head)
    one, other = logits(full, processor, image), logits(model, processor, image)
    assert one.shape == other.shape and not one.equal(other)
    assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.9
