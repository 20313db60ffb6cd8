"""A run with `--trainable_embeddings new`: what its model holds, and that its checkpoint continues it."""

import shutil

import torch
from runs import train

from self1e import Self1EForSegmentation


def test_a_run_moves_the_added_rows_only_and_continues(tiny_version, shapes, runs):
    base = Self1EForSegmentation.from_pretrained(tiny_version)
    flags = ("--trainable_embeddings", "new", "--max_steps", "2", "--warmup_steps", "0", "--no_eval")
    train(tiny_version, shapes, runs, "new_rows", *flags)
    first = Self1EForSegmentation.from_pretrained(runs / "new_rows" / "ckpt_model").state_dict()
    token = base.config.seg_token_id
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(first[name][:token], base.state_dict()[name][:token])
        assert not torch.equal(first[name][token], base.state_dict()[name][token])

    shutil.rmtree(runs / "new_rows" / "ckpt_model")
    train(tiny_version, shapes, runs, "new_rows", *flags, "--auto_resume")  # all steps are done: it loads and saves
    again = Self1EForSegmentation.from_pretrained(runs / "new_rows" / "ckpt_model").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
