"""The pictures of the method show what the model itself computes."""

import pytest
import torch
from helpers import noise
from PIL import Image

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.pictures import components, compute_parts, main
from self1e.errors import UserError


def test_the_parts_are_the_models_own(version):
    model = Self1EForSegmentation.from_pretrained(version)
    processor = Self1EProcessor.from_pretrained(version)
    image = noise(60, 40)
    similarity, features = compute_parts(model, processor, image, "it")
    own, before, after = similarity.values()
    logits = torch.as_tensor(model.segment(processor, image, "it")[0].logits)
    assert torch.allclose(after, logits.float(), atol=1e-4)
    side = model.config.tile_size // model.config.vision_config.patch_size[0]
    assert own.shape == (side, side) and before.shape == features["refilled"].shape[:2] == (2 * side, 2 * side)


def test_components_tell_regions_apart():
    features = torch.zeros(4, 4, 8)
    features[:2] = torch.randn(8, generator=torch.Generator().manual_seed(0))
    first = components(features + 1e-6 * torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(1)))[..., 0]
    assert (first[:2] - first[2:]).abs().min() > 0.99


def test_one_command_writes_the_pictures(version, tmp_path):
    noise(60, 40).save(tmp_path / "photo.png")
    flags = ["--version", str(version), "--prompt", "it", "--output", str(tmp_path / "out")]
    assert main([*flags, "--image", str(tmp_path / "photo.png")]) == 0
    names = {"similarity.png", "features.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert all(Image.open(tmp_path / "out" / name).width > 400 for name in names)
    with pytest.raises(UserError, match="none.png"):
        main([*flags, "--image", str(tmp_path / "none.png")])
