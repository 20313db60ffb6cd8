"""The picture of the method shows what the model itself computes."""

import pytest
import torch
from helpers import noise
from PIL import Image

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.pictures import main, similarities
from self1e.errors import UserError


@pytest.mark.parametrize("prompt, tiles", [("it", 1), ("Which one flies?", 2)])
def test_the_parts_are_the_models_own(version, prompt, tiles):
    model = Self1EForSegmentation.from_pretrained(version)
    processor = Self1EProcessor.from_pretrained(version)
    image = noise(80, 40)
    own, before, after = similarities(model, processor, image, prompt, tiles).values()
    logits = torch.as_tensor(model.segment(processor, image, prompt, max_tiles=tiles)[0].logits)
    assert torch.allclose(after, logits.float(), atol=1e-4)
    side = model.config.tile_size // model.config.vision_config.patch_size[0]
    assert own.shape == (side, side * tiles) and before.shape == after.shape == (2 * side, 2 * side * tiles)


def test_one_command_writes_the_picture(version, tmp_path, monkeypatch):
    noise(60, 40).save(tmp_path / "photo.png")
    flags = ["--version", str(version), "--prompt", "it", "--output", str(tmp_path / "out"), "--precision", "bf16"]
    assert main([*flags, "--image", str(tmp_path / "photo.png")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["similarity.png"]
    assert Image.open(tmp_path / "out/similarity.png").width > 400
    with pytest.raises(UserError, match="none.png"):
        main([*flags, "--image", str(tmp_path / "none.png")])
    monkeypatch.setattr("self1e.apps.pictures.find_spec", lambda name: None)
    with pytest.raises(UserError, match="matplotlib"):
        main([*flags, "--image", str(tmp_path / "photo.png")])
