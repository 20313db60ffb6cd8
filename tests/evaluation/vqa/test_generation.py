"""Replies of a batch are those of single questions, and those of an independent greedy decoder."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from vqa_trees import load_model, write_vqav2

from self1e.evaluation.vqa.generation import (
    answer_questions,
    generate_replies,
    make_batches,
    prepare_batch,
    replies_of,
)
from self1e.evaluation.vqa.run import VQA_BENCHMARKS


def replies(model, processor, questions, **options) -> list[str]:
    with TemporaryDirectory() as folder:
        results = replies_of(Path(folder), "some", questions)
        return answer_questions(model, processor, questions, results, **{"workers": 0, **options})


@pytest.mark.parametrize("max_tiles", [1, 6])
def test_a_batch_answers_what_single_questions_answer(tiny, tmp_path, max_tiles):
    write_vqav2(tmp_path, 7)
    questions = VQA_BENCHMARKS["vqa-vqav2-val"].questions(tmp_path)
    model, processor = load_model(tiny)
    options = {"max_new_tokens": 8, "max_tiles": max_tiles}
    single = replies(model, processor, questions, batch_size=1, **options)
    assert len(set(single)) > 1
    for size, workers in ((2, 0), (7, 0), (3, 1)):
        assert replies(model, processor, questions, batch_size=size, workers=workers, **options) == single


def test_beams_see_the_image_of_their_question(tiny, tmp_path):
    write_vqav2(tmp_path, 7)
    questions = VQA_BENCHMARKS["vqa-vqav2-val"].questions(tmp_path)
    model, processor = load_model(tiny)

    def with_beams(*indices):
        batch = prepare_batch(questions, processor, 1, indices)
        return generate_replies(model, processor.tokenizer, batch, 8, num_beams=2)

    found = [[reply for index in (0, 3, 1, 4) for reply in with_beams(index)], with_beams(0, 3, 1, 4)]
    assert found[0] == found[1] and len(set(found[0])) > 1


def test_generation_is_greedy_and_encodes_each_photo_once(tiny, tmp_path):
    """Against an independent decoder: no cache, no padding, the whole conversation anew for each token."""
    write_vqav2(tmp_path, 3)
    questions = VQA_BENCHMARKS["vqa-vqav2-val"].questions(tmp_path)
    model, processor = load_model(tiny)
    tiles = []
    hook = model.model.vision_tower.register_forward_hook(lambda module, args, out: tiles.append(len(out[0])))
    found = replies(model, processor, questions * 2, batch_size=6, max_new_tokens=6)
    hook.remove()
    assert tiles == [3]  # three photos, six questions, one pass
    stop = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for question, reply in zip(questions, found):
        batch = processor([question.open_image()], [[[f"<image>\n{question.prompt}"]]])
        del batch["labels"]
        new = []
        while len(new) < 6 and new[-1:] != [stop]:
            ids = torch.cat([batch["input_ids"], torch.tensor([new], dtype=torch.long)], 1)
            inputs = dict(batch) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                logits = model(**inputs, logits_to_keep=1).logits[0, -1]
            if not new:
                logits[stop] = -torch.inf
            new.append(int(logits.argmax()))
        assert processor.tokenizer.decode(new, skip_special_tokens=True).strip() == reply


def test_batches_keep_questions_of_a_photo_together(tmp_path):
    write_vqav2(tmp_path, 7)
    questions = VQA_BENCHMARKS["vqa-vqav2-val"].questions(tmp_path)
    assert make_batches(questions, range(7), 3) == [[0, 3, 6], [1, 4, 2], [5]]
