"""self1e/model/prompts.py: templates and the evaluation prompt."""

import json

import numpy as np
import pytest
from helpers import SHARED, needs_shared

from self1e.data.splits import SPLITS, load_split
from self1e.errors import UserError
from self1e.model import prompts


def test_draws_come_from_the_generator_alone():
    def draw(seed):
        rng = np.random.default_rng(seed)
        return [prompts.question("cat", rng, is_sentence=False) + prompts.answer(rng) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) > 5


def test_braces_in_a_text_are_kept():
    assert "{0} {}" in prompts.question("{0} {}", np.random.default_rng(0), is_sentence=True)


def test_evaluation_prompt():
    phrase = "<image>\n What is the Red car in this image? Please output segmentation mask."
    assert prompts.evaluation_prompt(" the Red car ", False, lower=False) == phrase
    assert prompts.evaluation_prompt(" the Red car ", False, lower=True) == phrase.replace("Red", "red")
    assert prompts.evaluation_prompt("Why?", True, lower=False) == "<image>\n Why? Please output segmentation mask."


@needs_shared
def test_evaluation_prompts_are_the_published_ones():
    scores = json.loads((SHARED / "golden" / "eval_scores.json").read_text())
    for split in set(SPLITS) & set(scores):
        images = load_split(split, SHARED / "minidata" / "dataset")
        ours = sorted(prompt for image in images for prompt in image.prompts)
        assert ours == sorted(f"<image>\n {unit['text']}" for unit in scores[split]["units"])


ENDS = ["?", "!!", "…", "؟", "।", ";", "՞", "？", "﹖", "⁉", "။", "?\u200f", "?”", "。」", "?)"]
EMPTY = ["", " \n", "\u200b", "\ufeff", "\u202e\u202c", "\0"]
CAPITALS = ["<IMG>", "the </Img>", "<IMAGE>", "<|IM_END|>"]


@pytest.mark.parametrize("end", ENDS)
def test_what_ends_like_a_sentence_in_any_script_is_one(end):
    assert prompts.looks_like_sentence(f"哪一个会飞{end}") and not prompts.looks_like_sentence("the red car 🚗")


@pytest.mark.parametrize("text", EMPTY + CAPITALS)
def test_invisible_texts_and_control_tokens_in_capitals_are_refused(text):
    with pytest.raises(UserError):
        prompts.check_prompt(text)
