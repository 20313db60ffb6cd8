"""Exported graphs against PyTorch and the published outputs, and the example that runs them without PyTorch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import PACKS, ROOT
from PIL import Image

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.export import inputs_of, main, write_graph

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.14",
    reason="the extra `export` asks for torch 2.14: older ones may not trace the attention mask",
)


@pytest.mark.parametrize("pack", [PACKS[::2][-1], PACKS[1]], ids=["qwen2", "qwen3"])
def test_graphs_give_the_published_masks_and_those_of_four_tiles(pack, tmp_path):
    """In fp32 within 1e-4, for numbers of conversations, tokens and `[SEG]`s that were not traced."""
    base = pack / "base_internvl_chat"
    model = Self1EForSegmentation.from_pretrained(base, weights=pack / "trained_self1e").eval()
    processor = Self1EProcessor.from_pretrained(base)
    cases = json.loads((pack / "cases.json").read_text(encoding="utf-8"))["cases"]

    def run(batch) -> np.ndarray:
        grid = "x".join(map(str, batch["tile_grids"][0].tolist()))
        session = onnxruntime.InferenceSession(tmp_path / f"grid_{grid}.onnx")
        return session.run(None, {name: value.numpy() for name, value in inputs_of(batch, processor).items()})[0]

    for grid in ((1, 1), (2, 2)):
        difference, largest = write_graph(model, processor, grid, tmp_path)
        assert difference <= 1e-4 < 0.1 < largest
    for case in cases:
        golden = np.load(pack / f"{case['name']}.npz")
        for number, row in enumerate(case["rows"]):
            if "[SEG]" in row["conversation"][1]:
                photo = Image.open(pack / "photos" / row["photo"])
                found = run(processor([photo], [[row["conversation"]]]))
                assert np.abs(found - golden[f"mask_logits_{number}"]).max() <= 1e-4
    answers = ["No.", "It is [SEG].", "Both, [SEG] and [SEG].", "[SEG]."]
    batch = processor([photo.resize((900, 900))], [[["<image>\nWhich one?", text] for text in answers]], max_tiles=4)
    with torch.no_grad():
        expected = torch.cat(model(**batch).mask_logits).numpy()
    assert len(expected) == 4 and np.abs(run(batch) - expected).max() <= 1e-4


def test_the_example_runs_without_pytorch(version, tmp_path):
    """With weights in bf16, against the model with the same weights."""
    photo, prompts = tmp_path / "photo.png", ["the red {} car", "Which one rolls?"]
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (120, 150, 3), np.uint8)).save(photo)
    assert main([version, str(tmp_path / "out"), "--to", "onnx", "--precision", "bf16"]) == 0
    missing = "import runpy, sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'self1e'));"
    arguments = [str(ROOT / "examples/run_onnx.py"), str(tmp_path / "out"), str(photo), *prompts]
    command = f"{missing} sys.argv = {arguments}; runpy.run_path(sys.argv[0])"
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True, timeout=300)
    model = Self1EForSegmentation.from_pretrained(version, dtype=torch.bfloat16).float()
    for number, result in enumerate(
        model.segment(Self1EProcessor.from_pretrained(version), Image.open(photo), prompts)
    ):
        found = np.asarray(Image.open(tmp_path / f"mask_{number}.png"))
        assert found.shape == (120, 150) and 0.1 < found.mean() < 0.9 and (found == result.mask).mean() > 0.999
