"""The Hub format: round trips to the bit, shards, Auto classes, device maps, quantization, push, the model card."""

import importlib.util
import json
import os

import pytest
import torch
import yaml
from helpers import make_trained
from huggingface_hub import parse_eval_result_entries
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from self1e import Self1EConfig, Self1EForSegmentation, Self1EProcessor
from self1e.apps.loading import load
from self1e.data.sets.parquet import READY
from self1e.files import write_json
from self1e.training.model_card import main as model_card
from self1e.training.model_card import write_model_card

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


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_widths_that_four_bits_do_not_fit_are_named(folder):
    with pytest.raises(ValueError, match=r"(?s)--quantize 4 on a CPU needs widths.*use --quantize 8"):
        load(str(folder), device="cpu", bits=4)


def test_figures_in_the_form_of_the_hub(folder, tmp_path, capsys):
    checkpoint = tmp_path / "exp/ckpt_model"
    Self1EForSegmentation.from_pretrained(folder).save_pretrained(checkpoint)
    figures = {"protocol": "lisa", "n": 20, "giou": 0.5, "ciou": 0.41237}
    ready = "parquet|reasonseg_val|test"
    splits = {
        ready: {"note": "another copy"},
        "ReasonSeg|val": {},
        "parquet|mine/shards|val": {},
        "refcoco|unc|val": {},
    }
    write_json(tmp_path / "exp/eval/summary.json", {split: figures | more for split, more in splits.items()})
    started = "2026-03-01T10:00:00+00:00"
    write_json(tmp_path / "exp/eval/settings.json", {ready: {"figures": {}, "run": {"started": started}}})
    own = "ReasonSeg|val=org/reasonseg:short"
    assert model_card([str(checkpoint), "--benchmarks", own]) == 0
    file = checkpoint / ".eval_results/self1e.yaml"
    hub, named = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    expected = (READY["reasonseg_val"].source, "test", 41.24, started)
    assert (hub.dataset_id, hub.task_id, hub.value, hub.date) == expected
    assert hub.notes == "cIoU in percent; gIoU 50.0; 20 sentences; protocol lisa; another copy"
    assert (named.dataset_id, named.task_id, named.value) == ("org/reasonseg", "short", 50.0)
    assert named.notes.startswith("gIoU in percent; cIoU 41.24;")

    for benchmark, message in (
        ("grefcoco|unc|val=org/g", "grefcoco.unc.val; the splits evaluated with these weights: "),
        ("ReasonSeg|val=a b/c", "a b/c"),
    ):
        with pytest.raises(ValueError, match=message):
            model_card([str(checkpoint), "--benchmarks", benchmark])
    with pytest.raises(SystemExit):
        model_card([str(checkpoint), "--benchmarks", "org/reasonseg"])
    assert "--benchmarks 'org/reasonseg': expected SPLIT=DATASET" in capsys.readouterr().err
    os.utime(tmp_path / "exp/eval/summary.json", (0, 0))
    write_model_card(checkpoint)
    assert not file.exists(), "figures of weights that are replaced now"


def test_model_card(folder, tmp_path, capsys):
    Self1EForSegmentation.from_pretrained(folder).save_pretrained(tmp_path / "exp/ckpt_model")
    checkpoint = tmp_path / "exp/ckpt_model"
    command = "deepspeed train_hf_ivl_seq.py --version base \\\n    --exp_name exp"
    card = write_model_card(checkpoint, base="org/base", command=command).read_text()
    assert (
        "base_model: org/base\n" in card
        and f"```bash\n{command}\n```" in card
        and card.startswith("---\nlibrary_name: transformers")
    )
    assert "# exp\n" in card and card.count("Not evaluated yet.") == 2
    table = "| split | gIoU |\n|-------|-----:|\n| ReasonSeg\\|val | 59.4 |\n"
    (tmp_path / "exp/eval").mkdir()
    (tmp_path / "exp/eval/summary.md").write_text(table)
    assert model_card([str(checkpoint)]) == 0
    card = (checkpoint / "README.md").read_text()
    assert table.strip() in card and card.count("Not evaluated yet.") == 1
    assert "base_model: org/base\n" in card and command in card, "what an earlier card knew is kept"
    os.utime(tmp_path / "exp/eval/summary.md", (0, 0))
    assert "59.4" not in write_model_card(checkpoint).read_text(), "scores of weights that are replaced now"
    assert "59.4" in write_model_card(checkpoint, results=tmp_path / "exp").read_text()
    for header in "a: [", "- a", "a: " + "[" * 100_000:
        (checkpoint / "README.md").write_text(f"---\n{header}\n---\n")
        with pytest.raises(ValueError, match="README.md: its header is no YAML"):
            write_model_card(checkpoint)
    with pytest.raises(SystemExit):
        model_card([str(tmp_path)])
    assert "config.json is missing" in capsys.readouterr().err
