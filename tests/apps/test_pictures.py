"""The picture of the method shows what the model itself computes."""

import pytest
import torch
from helpers import noise
from PIL import Image

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.pictures import main, similarities
from self1e.errors import UserError


def test_the_parts_are_the_models_own(version):
    model = Self1EForSegmentation.from_pretrained(version)
    processor = Self1EProcessor.from_pretrained(version)
    image = noise(60, 40)
    own, before, after = similarities(model, processor, image, "it").values()
    logits = torch.as_tensor(model.segment(processor, image, "it")[0].logits)
    assert torch.allclose(after, logits.float(), atol=1e-4)
    side = model.config.tile_size // model.config.vision_config.patch_size[0]
    assert own.shape == (side, side) and before.shape == after.shape == (2 * side, 2 * side)


def test_one_command_writes_the_picture(version, tmp_path):
    noise(60, 40).save(tmp_path / "photo.png")
    flags = ["--version", str(version), "--prompt", "it", "--output", str(tmp_path / "out")]
    assert main([*flags, "--image", str(tmp_path / "photo.png")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["similarity.png"]
    assert Image.open(tmp_path / "out/similarity.png").width > 400
    with pytest.raises(UserError, match="none.png"):
        main([*flags, "--image", str(tmp_path / "none.png")])
