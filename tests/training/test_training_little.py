"""Runs that train little: what their models hold, and that a checkpoint continues one."""

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


def test_a_run_of_adapters_in_the_vit_alone_leaves_the_llm_as_it_was(tiny_version, shapes, runs):
    base = Self1EForSegmentation.from_pretrained(tiny_version)
    flags = ("--no-use_llm_lora", "--freeze_llm", "--trainable_embeddings", "new", "--max_steps", "2", "--no_eval")
    train(tiny_version, shapes, runs, "vit_alone", *flags, "--warmup_steps", "0")
    before, token = base.state_dict(), base.config.seg_token_id
    after = Self1EForSegmentation.from_pretrained(runs / "vit_alone" / "ckpt_model").state_dict()
    for name in before:
        if "language_model." in name or name == "lm_head.weight":
            added = 0 if "layers." in name or "norm." in name else len(before[name]) - token
            kept = len(before[name]) - added
            assert torch.equal(after[name][:kept], before[name][:kept])
            assert not added or not torch.equal(after[name][token], before[name][token])
    for part in ("vision_tower.encoder.layer.0.attention.q_proj.weight", "multi_modal_projector.linear_1.weight"):
        assert not torch.equal(after[f"model.{part}"], before[f"model.{part}"])
