"""Images to tiles, conversations to ids and labels, both to a padded batch."""

import shutil
import unicodedata

import numpy as np
import pytest
import torch
from helpers import PACKS, noise
from PIL import Image

from self1e import Self1EProcessor
from self1e.errors import UserError
from self1e.model.photos import resize_bicubic
from self1e.model.processor import cut_tiles

SIZE = 56
IMAGE_TOKENS = 4  # a tile of the tiny model


def decode(processor, ids) -> str:
    return processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def supervised(processor, labels) -> str:
    return decode(processor, [x for x in labels if x != -100])


def test_text_is_the_published_chat_format(tiny_processor):
    ids, _ = tiny_processor.encode_conversation(["<image>\nWhat?", "It is [SEG].", "And this?"], n_tiles=2)
    assert decode(tiny_processor, ids) == (
        "<|im_start|>system\nYou are an helpful assistant.<|im_end|>\n<|im_start|>user\n<img>"
        + "<IMG_CONTEXT>" * 2 * IMAGE_TOKENS
        + "</img>\nWhat?<|im_end|>\n<|im_start|>assistant\nIt is [SEG].<|im_end|>\n"
        "<|im_start|>user\nAnd this?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_labels_are_the_answers_and_their_end(tiny_processor):
    conversation = ["<image>\nWhat?", "It is [SEG].", "Is it assistant?", " yes\n", "?", "2"]
    ids, labels = tiny_processor.encode_conversation(conversation, 1)
    assert supervised(tiny_processor, labels) == "It is [SEG].<|im_end|> yes\n<|im_end|>2<|im_end|>"
    assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
    assert labels[-1] == -100 and decode(tiny_processor, ids[-1:]) == "\n"


@pytest.mark.parametrize("text", ["naïve façade 数 🚗", "", "a\u0301", "<|endoftext|>x"])
def test_labels_of_any_text_decode_to_it(tiny_processor, text):
    _, labels = tiny_processor.encode_conversation(["<image>\n" + text, text], 1)
    assert supervised(tiny_processor, labels) == unicodedata.normalize("NFC", text) + "<|im_end|>"  # Qwen2's rule


def test_template_writes_what_the_processor_encodes(tiny_processor):
    conversation = ["<image>\nWhat?", "[SEG].", "And?"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(conversation)]
    text = tiny_processor.apply_chat_template(messages, add_generation_prompt=True)
    picture = "<img>" + "<IMG_CONTEXT>" * IMAGE_TOKENS + "</img>"
    assert text.replace("<image>", picture) == decode(
        tiny_processor, tiny_processor.encode_conversation(conversation, 1)[0]
    )
    messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert tiny_processor.apply_chat_template(messages, add_generation_prompt=True) == text


def test_long_text_is_cut_at_its_end(tiny_processor):
    conversation = ["<image>\nWhat?", "a long answer without any end to it"]
    ids, labels = tiny_processor.encode_conversation(conversation, 1)
    for limit in (len(ids) - 5, len(ids), len(ids) + 1):
        assert tiny_processor.encode_conversation(conversation, 1, limit) == (ids[:limit], labels[:limit])


def test_cutting_seg_or_image_tokens_is_an_error(tiny_processor):
    conversation = ["<image>\nWhat?", "It is [SEG]. Because."]
    ids, _ = tiny_processor.encode_conversation(conversation, 1)
    seg, last_image = ids.index(tiny_processor.seg_token_id), ids.index(tiny_processor.image_token_id) + 3
    assert len(tiny_processor.encode_conversation(conversation, 1, seg + 1)[0]) == seg + 1
    with pytest.raises(UserError, match=rf"{len(ids)} tokens.*--model_max_length {seg}: \[SEG\]"):
        tiny_processor.encode_conversation(conversation, 1, seg)
    with pytest.raises(UserError, match="<IMG_CONTEXT> would be cut"):
        tiny_processor.encode_conversation(conversation, 1, last_image)
    question = ["<image>\nWhat?"]
    assert len(tiny_processor.encode_conversation(question, 1, last_image + 1)[0]) == last_image + 1


@pytest.mark.parametrize("conversation", [["<image>\nA <IMG_CONTEXT>?", "x"], ["<image>\nA?", "<IMG_CONTEXT>", "B?"]])
def test_image_tokens_in_the_text_are_an_error_that_quotes_it(tiny_processor, conversation):
    culprit = next(text for text in conversation if "<IMG_CONTEXT>" in text)
    with pytest.raises(UserError, match="reserved token <IMG_CONTEXT>") as error:
        tiny_processor.encode_conversation(conversation, 1)
    assert repr(culprit) in str(error.value)


@pytest.mark.parametrize("conversation", [["What?", "x"], [], ["What?", "<image>"]])
def test_a_conversation_without_image_is_an_error(tiny_processor, conversation):
    with pytest.raises(UserError, match="must hold <image>"):
        tiny_processor(images=[noise(9, 9)], conversations=[[conversation]])


def test_batch_of_several_images_and_conversations(tiny_processor):
    batch = tiny_processor(
        images=[noise(112, 112), noise(112, 56, 1)],
        conversations=[
            [["<image>\nA?", "[SEG]."], ["<image>\nA much longer question?", "no"]],
            [["<image>\nB?", "[SEG]"]],
        ],
        mask_targets=[[np.ones((1, 5, 6), np.uint8), None], [np.ones((1, 7, 8), np.uint8)]],
        max_tiles=4,
    )
    assert set(batch) == {
        "input_ids", "attention_mask", "labels", "pixel_values", "tile_grids", "row_image", "mask_targets"
    }  # fmt: skip
    assert batch["tile_grids"].tolist() == [[2, 2], [1, 2]] and batch["row_image"].tolist() == [0, 0, 1]
    assert batch["pixel_values"].shape == (6, 3, SIZE, SIZE) and batch["pixel_values"].dtype == torch.float32
    images = (batch["input_ids"] == tiny_processor.image_token_id).sum(1)
    assert images.tolist() == [4 * IMAGE_TOKENS, 4 * IMAGE_TOKENS, 2 * IMAGE_TOKENS]
    assert [None if x is None else tuple(x.shape) for x in batch["mask_targets"]] == [(1, 5, 6), None, (1, 7, 8)]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_by_length_and_keeps_id_zero(tiny_processor, side):
    """Id 0 is `!`, a word like any other."""
    assert tiny_processor.tokenizer.convert_tokens_to_ids("!") == 0
    conversations = [["<image>\nWow !", "!"], ["<image>\nWow ! and a lot more words", "! !"]]
    batch = tiny_processor(images=[noise(9, 9)], conversations=[conversations], padding_side=side)
    for i, conversation in enumerate(conversations):
        ids, labels = tiny_processor.encode_conversation(conversation, 1)
        assert 0 in ids
        n_pad = batch["input_ids"].shape[1] - len(ids)
        assert (n_pad > 0) == (i == 0)
        texts = {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
        fillers = {"input_ids": tiny_processor.tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}
        for name, values in texts.items():
            padding = [fillers[name]] * n_pad
            assert batch[name][i].tolist() == (padding + values if side == "left" else values + padding)


def test_mask_target_forms_are_the_same(tiny_processor):
    masks = (np.random.default_rng(0).random((2, 5, 6)) > 0.5).astype(np.uint8)
    call = {"images": [noise(9, 9)], "conversations": [[["<image>\nA?", "[SEG]."], ["<image>\nB?", "[SEG]."]]]}
    forms = [masks, [masks[:1], masks[1:]], [masks[0], masks[1]], list(torch.from_numpy(masks))]
    forms += [torch.from_numpy(masks), masks[:, :, ::-1].copy()[:, :, ::-1]]  # the last has negative strides
    for form in forms:
        found = tiny_processor(**call, mask_targets=[form])["mask_targets"]
        assert [x.dtype for x in found] == [torch.uint8] * 2
        assert torch.equal(torch.cat(found), torch.from_numpy(masks))
    assert "mask_targets" not in tiny_processor(**call, mask_targets=[None])
    call["conversations"] = [[["<image>\nA?", "[SEG] [SEG]"]]]
    several = tiny_processor(**call, mask_targets=[[masks]])
    assert several["mask_targets"][0].shape == (2, 5, 6)


def test_masks_must_match_the_seg_tokens(tiny_processor):
    masks = [[np.ones((2, 5, 5), np.uint8)]]
    with pytest.raises(ValueError, match=r"1 \[SEG\] but 2 masks"):
        tiny_processor(images=[noise(9, 9)], conversations=[[["<image>\nA?", "[SEG]."]]], mask_targets=masks)


def test_tiles_are_the_photo_row_by_row():
    image = noise(3 * SIZE, 2 * SIZE)  # a grid of its own size: nothing is resampled
    tiles, grid = cut_tiles(image, SIZE, max_tiles=6)
    assert grid == (2, 3)
    for i in range(6):
        y, x = divmod(i, 3)
        part = image.crop((x * SIZE, y * SIZE, (x + 1) * SIZE, (y + 1) * SIZE))
        assert torch.equal(tiles[i], cut_tiles(part, SIZE)[0][0])


def grid_by_rule(width: int, height: int, limit: int) -> tuple[int, int]:
    """(cols, rows): nearest aspect ratio; among equals the largest whose half the photo covers, else the smallest."""
    grids = [(c, r) for c in range(1, limit + 1) for r in range(1, limit + 1) if c * r <= limit]
    distance = {grid: abs(width / height - grid[0] / grid[1]) for grid in grids}
    nearest = sorted((g for g in grids if distance[g] == min(distance.values())), key=lambda g: g[0] * g[1])
    covered = [g for g in nearest if width * height > 0.5 * g[0] * g[1] * SIZE**2]
    return (covered or nearest[:1])[-1]


@pytest.mark.parametrize("limit", [1, 4, 6, 12])
def test_tile_rule(limit):
    rng = np.random.default_rng(limit)
    sizes = [tuple(int(x) for x in rng.integers(10, 300, 2)) for _ in range(40)]
    sizes += [(56, 56), (79, 79), (80, 80), (84, 56), (168, 112), (112, 224), (10, 300), (300, 10), (200, 200)]
    for width, height in sizes:
        cols, rows = grid_by_rule(width, height, limit)
        tiles, grid = cut_tiles(noise(width, height), SIZE, max_tiles=limit)
        assert grid == (rows, cols) and len(tiles) == rows * cols, (width, height)


def test_thumbnail_is_one_more_tile():
    image = noise(2 * SIZE, SIZE)
    tiles, grid = cut_tiles(image, SIZE, max_tiles=6, thumbnail=True)
    plain, _ = cut_tiles(image, SIZE, max_tiles=6)
    assert grid == (3, 1) and torch.equal(tiles[:2], plain)
    assert torch.equal(tiles[2:], cut_tiles(image, SIZE)[0])
    assert len(cut_tiles(noise(SIZE, SIZE), SIZE, max_tiles=1, thumbnail=True)[0]) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(60, 40).save(tmp_path / "p.png", exif=exif)
    turns = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}  # Image.Transpose values
    upright = noise(60, 40)
    for turn in turns[orientation]:
        upright = upright.transpose(Image.Transpose(turn))
    with Image.open(tmp_path / "p.png") as image:
        tiles, grid = cut_tiles(image, SIZE, max_tiles=4)
    wanted, wanted_grid = cut_tiles(upright, SIZE, max_tiles=4)
    assert grid == wanted_grid and torch.equal(tiles, wanted)


@pytest.mark.parametrize(("height", "rows_first"), [(299, False), (300, False), (301, True), (80, False)])
def test_rows_are_shrunk_first_where_they_lose_twice_as_many_pixels(height, rows_first):
    """200 columns become 100: more than 200 rows must go for the rows to go first. The passes round in between."""
    image, bicubic = noise(200, height), Image.Resampling.BICUBIC
    between = (200, 100) if rows_first else (100, height)
    expected = np.asarray(image.resize(between, bicubic).resize((100, 100), bicubic))
    assert np.array_equal(np.asarray(resize_bicubic(image, 100, 100)), expected)


def test_a_tokenizer_without_image_tokens_is_refused(tmp_path):
    for name in ("config.json", "vocab.json", "merges.txt"):
        shutil.copy(PACKS[0] / "base_internvl_chat" / name, tmp_path)
    with pytest.raises(UserError, match="lacks.*<IMG_CONTEXT>.*InternVL3's tokenizer"):
        Self1EProcessor.from_pretrained(tmp_path)


def test_an_unknown_keyword_is_named(tiny_version):
    with pytest.raises(UserError, match="'max_tile'"):
        Self1EProcessor.from_pretrained(tiny_version, max_tile=4)
