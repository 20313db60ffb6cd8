"""`self1e export`: Label Studio's brush masks, read back by a decoder written from the format's description."""

import json

import numpy as np
import pytest

from self1e.apps.export import brush_rle, labelling_configuration
from self1e.apps.results import describe
from self1e.cli import main


def read_brush(data: list[int], height: int, width: int) -> np.ndarray:
    """The alpha channel of the RGBA picture in a brush's bit stream."""
    stream = "".join(f"{byte:08b}" for byte in data)
    place = 0

    def take(bits: int) -> int:
        nonlocal place
        place += bits
        return int(stream[place - bits : place], 2)

    count, word = take(32), take(5) + 1
    widths = [take(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < count:
        run, length = take(1), take(widths[take(2)]) + 1
        values += [take(word)] * length if run else [take(word) for _ in range(length)]
    assert len(stream) - place < 8
    return np.array(values, np.uint8).reshape(height, width, 4)[..., 3]


@pytest.mark.parametrize("kind", ["empty", "full", "noise", "square"])
def test_brush_masks_come_back(kind):
    mask = np.zeros((37, 523), bool)  # runs beyond every width of the format: 4 * 37 * 523 > 2**16
    if kind == "noise":
        mask = np.random.default_rng(0).random(mask.shape) > 0.5
    elif kind == "full":
        mask[:] = True
    elif kind == "square":
        mask[10:20, 100:300] = True
    assert (read_brush(brush_rle(mask), *mask.shape) == 255 * mask).all()


def test_tasks_for_label_studio(tmp_path, capsys):
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    record = {"image_id": 1, "image": "photos/a.jpg", "width": 6, "height": 4}
    records = [
        record | {"category_id": 1, "prompt": 'the "red" <car>'} | describe(mask, 0.75),
        record | {"category_id": 2, "prompt": "nothing"} | describe(mask & False, None),
    ]
    (tmp_path / "predictions.json").write_text(json.dumps(records))
    assert main(["export", str(tmp_path), "--to", "label-studio", "--image_root", "https://host/"]) == 0
    (task,) = json.loads((tmp_path / "label_studio.json").read_text())
    assert task["data"] == {"image": "https://host/photos/a.jpg"}
    (region,) = task["predictions"][0]["result"]
    assert region["value"]["brushlabels"] == ['the "red" <car>'] and region["score"] == 0.75
    assert (read_brush(region["value"]["rle"], 4, 6) == 255 * mask).all()
    printed = capsys.readouterr().out
    assert "&lt;car&gt;" in labelling_configuration(records) in printed
    assert printed.strip().endswith("label_studio.json; 1 empty one left out")
