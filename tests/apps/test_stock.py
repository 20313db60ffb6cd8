"""A converted checkpoint in the hands of stock transformers: no class or file of ours is needed to chat with it."""

import copy

import pytest
import torch
from helpers import make_trained, noise
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    pipeline,
)

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.convert import convert
from self1e.model.prompts import SEG
from self1e.model.weights import save_checkpoint

PHOTO = noise(160, 90)
QUESTION = "What is in the picture? Please segment it."
MESSAGES = [{"role": "user", "content": [{"type": "image", "image": PHOTO}, {"type": "text", "text": QUESTION}]}]
TILES = 6  # the photo is cut into 1 x 2 tiles, and its thumbnail is a third


def make_speaking(folder, llm: str):
    """A trained checkpoint whose answer to QUESTION holds `[SEG]`."""
    make_trained(folder, llm=llm, image_size=56, seed=1)
    model, processor = Self1EForSegmentation.from_pretrained(folder), Self1EProcessor.from_pretrained(folder)
    states = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    batch = processor([PHOTO], [[[f"<image>\n{QUESTION}"]]])
    with torch.no_grad():
        logits = model(**batch | {"labels": None}, logits_to_keep=1).logits[0, -1]
        state = states[-1][0, -1]
        model.lm_head.weight[processor.seg_token_id] = state * (logits.max() + 1) / state.square().sum()
    save_checkpoint(model, processor, folder)
    return folder


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def folders(request, tmp_path_factory):
    """Our checkpoint, and what `convert` makes of it, by layout."""
    root = tmp_path_factory.mktemp(request.param)
    ours = make_speaking(root / "ours", request.param)
    for layout in ("hf", "internvl"):
        convert(str(ours), root / layout, layout, drop_head=True)
    return {"self1e": ours, "hf": root / "hf", "internvl": root / "internvl"}


@pytest.fixture(scope="module")
def ours(folders):
    return Self1EForSegmentation.from_pretrained(folders["self1e"]), Self1EProcessor.from_pretrained(folders["self1e"])


def exact_processor(folder) -> InternVLProcessor:
    """The stock processor, resampling with Pillow, as we do, where its default is torchvision."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor


def encode(stock, tiles: int):
    """What the stock processor makes of MESSAGES."""
    cut = {"images_kwargs": {"max_patches": tiles}} if tiles > 1 else {}
    return stock.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs=cut,
    )  # fmt: skip


@pytest.mark.parametrize("tiles", [1, TILES])
@pytest.mark.parametrize("layout", ["hf", "internvl"])
def test_processors_give_the_same_ids_and_pixels(folders, ours, layout, tiles):
    mine = ours[1]([PHOTO], [[[f"<image>\n{QUESTION}"]]], max_tiles=tiles, thumbnail=True)
    assert len(mine["pixel_values"]) == (1 if tiles == 1 else 3)
    stock = AutoProcessor.from_pretrained(folders[layout])
    assert type(stock) is InternVLProcessor
    theirs = encode(stock, tiles)
    assert theirs["input_ids"].tolist() == mine["input_ids"].tolist()
    difference = (theirs["pixel_values"] - mine["pixel_values"]).abs()
    assert difference.max() < 1.5 / 255 / 0.224 and difference.mean() < 1e-3  # a grey level, by another resampling
    exact = encode(exact_processor(folders[layout]), tiles)
    torch.testing.assert_close(exact["pixel_values"], mine["pixel_values"], rtol=0, atol=1e-5)


@torch.inference_mode()
def answer(model, batch: dict, tokenizer, **options) -> str:
    """What a model, ours or the stock one, writes to a batch of one row."""
    ids = model.generate(**batch, max_new_tokens=12, do_sample=False, **options)[0, batch["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("tiles", [1, TILES])
def test_the_stock_model_answers_as_we_do(folders, ours, tiles):
    model, processor = ours
    batch = dict(processor([PHOTO], [[[f"<image>\n{QUESTION}"]]], max_tiles=tiles, thumbnail=True))
    del batch["labels"]
    stock = exact_processor(folders["hf"])
    mine = answer(model, batch, stock.tokenizer, suppress_tokens=[processor.image_token_id])
    plain = AutoModelForImageTextToText.from_pretrained(folders["hf"], dtype=torch.float32)
    assert type(plain) is InternVLForConditionalGeneration
    assert answer(plain, encode(stock, tiles), stock.tokenizer) == mine
    if tiles == 1:
        assert SEG in mine and model.chat(processor, PHOTO, QUESTION, max_new_tokens=12).text == mine


def test_the_pipeline_answers_as_we_do(folders, ours):
    model, processor = ours
    said = model.chat(processor, PHOTO, QUESTION, max_new_tokens=12).text
    stock = exact_processor(folders["hf"])
    piped = pipeline("image-text-to-text", model=str(folders["hf"]), processor=stock, dtype=torch.float32)
    (found,) = piped(text=copy.deepcopy(MESSAGES), max_new_tokens=12, do_sample=False, return_full_text=False)
    assert SEG in said and found["generated_text"] == said
