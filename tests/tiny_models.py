"""A tiny random model that counts as trained, for tests of what users run."""

import runpy
from pathlib import Path

import torch
from conftest import ROOT
from PIL import Image

from self1e import Self1EForSegmentation, Self1EProcessor, checkpoints

SMALL = dict(width=32, heads=2, kv_heads=1, layers=2, vision_width=32, vision_heads=2, vision_layers=2)


def make_base(folder: Path, **options) -> Path:
    """A base checkpoint, layout (a), in `folder`; options of scripts/make_tiny_internvl.py."""
    make = runpy.run_path(str(ROOT / "scripts/make_tiny_internvl.py"))["make_tiny_internvl"]
    return make(folder, **(SMALL | options))


def make_trained(folder: Path, base: Path | None = None, **options) -> Path:
    """A checkpoint with a head, layout (d), in `folder`; its base beside it unless given."""
    base = base or make_base(folder.with_name(f"{folder.name}_base"), **options)
    model, processor = Self1EForSegmentation.from_pretrained(base), Self1EProcessor.from_pretrained(base)
    model.trained_head = True
    photo = Image.linear_gradient("L").convert("RGB")
    for seed in range(100):
        torch.manual_seed(seed)
        for weight in model.segmentation_head.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        if 0.2 < model.segment(processor, photo, "it")[0].mask.mean() < 0.8:  # masks with both kinds of pixels
            break
    else:
        raise AssertionError("no seed gives a head whose masks are partly foreground")
    checkpoints.save(model, processor, folder)
    return folder
