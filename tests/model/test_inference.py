"""`segment` and `chat`: the protocol, batches, one encoding a photo, masks of what was generated, refusals."""

import doctest

import numpy as np
import pytest
import torch
from helpers import make_trained
from PIL import Image
from torch.nn.functional import interpolate
from transformers import LogitsProcessor, LogitsProcessorList

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.errors import UserError
from self1e.model import inference
from self1e.model.prompts import ANSWER, reserved_in

PHRASE, SENTENCE = "the Red circle", "Which of these rolls?"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = make_trained(tmp_path_factory.mktemp("tiny") / "trained")
    model = Self1EForSegmentation.from_pretrained(folder, dtype=torch.float32)
    return model, Self1EProcessor.from_pretrained(folder)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def watch_encoding(model, monkeypatch) -> list[int]:
    """A list that grows by the number of tiles whenever the vision tower runs."""
    encoded, original = [], model.encode_images

    def encode(tiles, *args, **kwargs):
        encoded.append(len(tiles))
        return original(tiles, *args, **kwargs)

    monkeypatch.setattr(model, "encode_images", encode)
    return encoded


def assert_close(found, expected):
    """Up to another order of summation in float32."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


class Dictation(LogitsProcessor):
    """Makes greedy decoding write given tokens, one conversation at a time, and then the end of turn."""

    def __init__(self, tokenizer, texts: list[str], prompt_length: int):
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.answers = [[*tokenizer.encode(text, add_special_tokens=False), end] for text in texts]
        self.start, self.end = prompt_length, end

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -1e9)
        step = input_ids.shape[1] - self.start
        for i, tokens in enumerate(self.answers):
            forced[i, tokens[step] if step < len(tokens) else self.end] = 0.0
        return forced


def dictate(processor, texts, conversations) -> LogitsProcessorList:
    """Dictates answers to `conversations`, generated as one batch; its prompts are as long as the longest."""
    image = photo(20, 20)
    batch = processor(images=[image], conversations=[conversations], padding_side="left")
    return LogitsProcessorList([Dictation(processor.tokenizer, texts, batch["input_ids"].shape[1])])


def test_docstring_examples(tiny):
    model, processor = tiny
    globs = {"model": model, "processor": processor, "image": photo(60, 40)}
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    examples = [test for test in finder.find(inference, globs=globs) if test.examples]
    assert len(examples) >= 2
    for test in examples:
        runner.run(test)
    assert runner.failures == 0 and runner.tries >= 5


def test_segment_is_the_evaluation_protocol(tiny):
    model, processor = tiny
    image = photo(90, 50)
    phrase, sentence = model.segment(processor, image, [PHRASE, SENTENCE])
    conversations = [
        ["<image>\n What is the red circle in this image? Please output segmentation mask.", "[SEG]."],
        [f"<image>\n {SENTENCE} Please output segmentation mask.", "[SEG]."],
    ]
    with torch.no_grad():
        expected = model(**processor(images=[image], conversations=[conversations])).mask_logits
    for result, logits in zip((phrase, sentence), expected):
        assert result.text == ANSWER and result.logits.dtype == np.float32 and result.mask.dtype == bool
        assert_close(result.logits, logits[0].numpy())
        full = interpolate(torch.from_numpy(result.logits)[None, None], (50, 90), mode="bilinear")[0, 0]
        assert (result.mask == (full > 0).numpy()).all() and 0 < result.mask.mean() < 1
        assert result.score == pytest.approx(full.sigmoid()[full > 0].mean().item(), abs=1e-6)
    forced = model.segment(processor, image, SENTENCE, is_sentence=False)[0]
    assert not np.allclose(forced.logits, sentence.logits, atol=1e-3)


def test_batches_do_not_change_results_and_a_photo_is_encoded_once(tiny, monkeypatch):
    model, processor = tiny
    image, prompts = photo(30, 70), ["the ring", "the cross with a long description", "What is it?", "it"]
    alone = [model.segment(processor, image, prompt)[0] for prompt in prompts]
    encoded = watch_encoding(model, monkeypatch)
    for limit in (16, 2):
        together = model.segment(processor, image, prompts, conversations_per_forward=limit)
        assert encoded == [1] and encoded.pop()
        for one, other in zip(alone, together, strict=True):
            assert one.prompt == other.prompt and one.mask.shape == other.mask.shape
            assert_close(one.logits, other.logits)


def test_exif_threshold_tiles_and_mode(tiny):
    model, processor = tiny
    image = photo(80, 40)
    turned = image.transpose(Image.Transpose.ROTATE_90)  # stored on its side, with the tag that says so
    turned.getexif()[0x0112] = 6
    upright, stored = (model.segment(processor, x, PHRASE)[0] for x in (image, turned))
    assert stored.mask.shape == (40, 80)
    np.testing.assert_array_equal(stored.logits, upright.logits)
    full = interpolate(torch.from_numpy(upright.logits)[None, None], (40, 80), mode="bilinear")[0, 0]
    full = full.double().sigmoid()
    low, high = full.quantile(torch.tensor([0.2, 0.8], dtype=full.dtype)).tolist()
    for threshold, share in ((low, 0.8), (high, 0.2)):
        result = model.segment(processor, image, PHRASE, threshold=threshold)[0]
        assert result.mask.mean() == pytest.approx(share, abs=0.01) and result.score > threshold
        assert (result.mask == (full > threshold).numpy()).mean() > 0.999  # the pixel of the quantile itself may round
    nothing = model.segment(processor, image, PHRASE, threshold=(1 + full.max().item()) / 2)[0]
    assert not nothing.mask.any() and nothing.score is None
    side = upright.logits.shape[0]
    assert model.segment(processor, photo(200, 100), PHRASE, max_tiles=4)[0].logits.shape == (side, 2 * side)
    model.train()
    again = model.segment(processor, image.convert("L").convert("RGBA"), PHRASE)[0]
    assert again.mask.shape == (40, 80) and model.training
    model.eval()


def test_chat_masks_are_those_of_the_teacher_forced_text(tiny):
    model, processor = tiny
    image = photo(50, 40)
    question = "<image>\n What is the red circle in this image? Please output segmentation mask."
    reply = model.chat(processor, image, question, logits_processor=dictate(processor, [ANSWER], [[question]]))
    expected = model.segment(processor, image, PHRASE)[0]
    assert reply.text == ANSWER and reply.masks.shape == (1, 40, 50)
    assert_close(reply.logits[0], expected.logits)
    assert reply.scores == [pytest.approx(expected.score, abs=1e-5)]


def test_an_answer_without_seg_takes_no_pass_for_masks(tiny, monkeypatch):
    model, processor = tiny
    image, question = photo(50, 40), "<image>\nhi"
    monkeypatch.setattr(inference, "masks_of", None)  # calling it would raise
    reply = model.chat(processor, image, "hi", logits_processor=dictate(processor, ["No."], [[question]]))
    assert reply.text == "No." and reply.masks.shape == (0, 40, 50) and reply.scores == []


@pytest.mark.parametrize(("options", "given"), [({}, [True, False, False]), ({"use_cache": False}, [True] * 3)])
def test_images_are_given_to_generation_until_they_are_in_the_cache(tiny, monkeypatch, options, given):
    model, processor = tiny
    calls, causal_pass = [], model.causal_pass

    def watched(ids, mask, features, *args, **kwargs):
        calls.append(features is not None)
        return causal_pass(ids, mask, features, *args, **kwargs)

    monkeypatch.setattr(model, "causal_pass", watched)
    model.chat(processor, photo(40, 40), "it?", min_new_tokens=3, max_new_tokens=3, **options)
    assert calls == given


def test_chat_batches_of_different_answers(tiny, monkeypatch):
    model, processor = tiny
    image = photo(50, 40)
    asked = ["Where is it?", "Segment the star and the ring, one after the other, please.", "Name it."]
    answers = ["No such thing.", "The star [SEG], the ring [SEG].", "It is [SEG]."]
    script = dictate(processor, answers, [[f"<image>\n{text}"] for text in asked])
    encoded = watch_encoding(model, monkeypatch)
    replies = model.chat(processor, image, asked, logits_processor=script)
    assert encoded == [1]
    assert [reply.text for reply in replies] == answers
    assert [reply.masks.shape for reply in replies] == [(0, 40, 50), (2, 40, 50), (1, 40, 50)]
    with torch.no_grad():
        for text, answer, reply in list(zip(asked, answers, replies))[1:]:
            batch = processor(images=[image], conversations=[[[f"<image>\n{text}", answer]]])
            assert_close(reply.logits, model(**batch).mask_logits[0].numpy())


def test_chat_history_keeps_its_masks_to_itself(tiny):
    model, processor = tiny
    image = photo(50, 40)
    turns = ["<image>\nPlease segment the ring.", "It is [SEG].", "And the star?"]
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(turns)]
    messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": "Please segment the ring."}]
    reply = model.chat(processor, image, messages, logits_processor=dictate(processor, ["Sure, [SEG]."], [turns]))
    with torch.no_grad():
        whole = model(**processor(images=[image], conversations=[[[*turns, "Sure, [SEG]."]]])).mask_logits[0]
    assert len(whole) == 2 and reply.masks.shape == (1, 40, 50)
    assert_close(reply.logits[0], whole[1].numpy())


def test_a_random_model_writes_no_control_token_but_seg(tiny):
    model, processor = tiny
    options = {"max_new_tokens": 100, "do_sample": True, "temperature": 50.0}
    replies = model.chat(processor, photo(30, 30), ["Describe it."] * 8, **options)
    assert set(reserved_in("".join(reply.text for reply in replies))) <= {"[SEG]"}
    assert all(len(reply.masks) == reply.text.count("[SEG]") for reply in replies)


def test_paths_and_arrays_are_photos_too(tiny, tmp_path):
    model, processor = tiny
    image, path = photo(20, 30), tmp_path / "photo.png"
    image.save(path)
    expected = model.segment(processor, image, PHRASE)[0].logits
    for given in (path, str(path), np.asarray(image)):
        np.testing.assert_array_equal(model.segment(processor, given, PHRASE)[0].logits, expected)
    assert model.chat(processor, str(path), "it", max_new_tokens=2)
    assert model.segment(processor, path, []) == []
    with pytest.raises(UserError, match="a path, a PIL image or a uint8 array"):
        model.segment(processor, [path], "it")


def test_other_refusals(tiny, monkeypatch):
    model, processor = tiny
    image = photo(20, 20)
    cases = [
        ("prompt is empty", lambda: model.segment(processor, image, "  ")),
        ("reserved token", lambda: model.segment(processor, image, "the [SEG] star")),
        ("reserved token", lambda: model.chat(processor, image, "the <image> star")),
        ("threshold", lambda: model.segment(processor, image, "it", threshold=1.0)),
        ("photo.jpg", lambda: model.segment(processor, "photo.jpg", "it")),
        ("roles", lambda: model.chat(processor, image, [{"role": "system", "content": "Be brief."}])),
        ("roles", lambda: model.chat(processor, image, [])),
    ]
    for message, call in cases:
        with pytest.raises(UserError, match=message):
            call()
    model.trained_head = False
    try:
        for call in (model.segment, model.chat):
            with pytest.raises(UserError, match="--model_weights"):
                call(processor, image, "it")
    finally:
        model.trained_head = True
    bias = model.segmentation_head.f_out[-1].bias
    before = bias.detach().clone()
    try:
        bias.data.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="float32: check the weights"):
            model.segment(processor, image, "it")
        with pytest.raises(FloatingPointError, match="float16: it overflows"), torch.autocast("cpu", torch.float16):
            model.segment(processor, image, "it")
        monkeypatch.setattr(type(model), "dtype", torch.float16)
        with pytest.raises(FloatingPointError, match="float16: it overflows"):
            model.segment(processor, image, "it")
    finally:
        bias.data.copy_(before)
