"""Figures of a segmentation evaluation on disk, as a table, and as pictures.

In the results folder, `<split>.jsonl` holds one line per unit (see `metrics.Unit`), `<split>.json` its figures, and
`summary.md` and `summary.json` those of all splits that the folder holds.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from self1e import distributed
from self1e.data.masks import IGNORED, decode_segmentation
from self1e.data.sets.expressions import EvalImage
from self1e.data.splits import MODELS, SPLITS, get_splits
from self1e.evaluation.results import file_stem, markdown_table
from self1e.evaluation.segmentation.metrics import Unit
from self1e.files import read_json, write_json, write_text
from self1e.visualize import GROUND_TRUTH, PREDICTION, grid, overlay, panel

RELA = {"gIoU": "giou", "cIoU": "ciou", "Pr@0.7": "pr@0.7", "Pr@0.8": "pr@0.8", "Pr@0.9": "pr@0.9",
        "N-acc": "n_acc", "T-acc": "t_acc"}  # fmt: skip
REASONING = ["reasoning", "gIoU, 95% interval", "cIoU, 95% interval", "short gIoU / cIoU", "long gIoU / cIoU"]


def save_figures(folder: Path, figures: dict) -> None:
    """Write the figures of one split, and the summary of all that are in the folder. For one process."""
    write_json(folder / f"{file_stem(figures['split'])}.json", figures, indent=2)
    everything = read_figures(folder)
    write_json(folder / "summary.json", everything, indent=2)
    write_text(folder / "summary.md", summary_table(everything))


def read_figures(folder: Path) -> dict[str, dict]:
    """Split -> figures of all splits that a results folder holds, in the order of `SPLITS`."""
    paths = [path.with_suffix(".json") for path in sorted(folder.glob("*.jsonl"))]
    found = [read_json(path, dict) for path in paths if path.is_file()]
    found.sort(key=lambda figures: [*SPLITS, figures["split"]].index(figures["split"]))
    return {figures["split"]: figures for figures in found}


def percent(value: float | None) -> str:
    """A fraction as the tables show it; `-` for a figure over nothing."""
    return "-" if value is None else f"{100 * value:.1f}"


def row_title(figures: Mapping[str, Any]) -> str:
    """The split of some figures, and how much of the benchmark its data holds where that is known not to be all."""
    part = "" if figures["data"] in ("-", "complete") else f" ({figures['data']})"
    return figures["split"].replace("|", " ") + part  # "|" would end a cell


def summary_table(results: Mapping[str, dict]) -> str:
    """Ours beside the published figures, in percent, and the figures that only some splits have.

    Published figures stand beside splits whose data is the whole benchmark, and their columns where there are some.
    """
    entries = get_splits(results)
    whole = {name: entries[name].published for name, figures in results.items() if figures["data"] == "complete"}
    models = [model for model in MODELS if any(model in published for published in whole.values())]
    rows, rela, reasoning = [], [], []
    for name, figures in results.items():
        title = row_title(figures)
        published = [whole.get(name, {}).get(model, ()) for model in models]
        theirs = (" / ".join(f"{value:.1f}" for value in values) or "-" for values in published)
        rows.append([title, str(figures["n"]), percent(figures["giou"]), percent(figures["ciou"]), *theirs])
        if "rela" in figures:
            rela.append([title, *(percent(figures["rela"][key]) for key in RELA.values())])
        if "bootstrap" in figures:
            intervals = [" to ".join(map(percent, figures["bootstrap"][key])) for key in ("giou", "ciou")]
            parts = [f"{percent(figures[q]['giou'])} / {percent(figures[q]['ciou'])}" for q in ("short", "long")]
            reasoning.append([title, *intervals, *parts])
    text = markdown_table(["split", "n", "gIoU", "cIoU", *models], rows)
    if models:
        text += f"\n{models[0]} to {models[-1]}: published figures, cIoU; on ReasonSeg gIoU / cIoU.\n"
    for header, more in ((["ReLA protocol", *RELA], rela), (REASONING, reasoning)):
        text += "\n" + markdown_table(header, more) if more else ""
    return text


def save_pictures(folder: Path, split: Sequence[EvalImage], units: Sequence[Unit]) -> None:
    """Draw the worst units of a split, at most 200, to `NNNN_iouX.XX_<id>.jpg`, in the place of an earlier run's.

    `overview.png` shows the eight worst and the four best. Photos are read and drawn one at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("[0-9]*_iou*.jpg"):
        stale.unlink()
    where = [(photo, sentence) for photo in split for sentence in range(len(photo.unit_ids))]

    def draw(index: int) -> Image.Image:
        return draw_unit(*where[index], units[index])

    order = sorted(range(len(units)), key=lambda index: units[index].iou)
    for rank, index in enumerate(order[:200], 1):
        name = re.sub(r"[^A-Za-z0-9-]+", "_", units[index].id)[-80:]
        draw(index).save(folder / f"{rank:04d}_iou{units[index].iou:.2f}_{name}.jpg", quality=90)
    grid([draw(index) for index in order[:8] + order[max(8, len(order) - 4) :]]).save(folder / "overview.png")
    distributed.say(f"pictures, worst first: {folder / 'overview.png'}")


def draw_unit(photo: EvalImage, sentence: int, unit: Unit) -> Image.Image:
    """Photo, ground truth and prediction of one sentence, with the sentence and the IoU above them."""
    image, targets = photo.load()
    target = targets[sentence]
    image = image.resize(target.shape[::-1])  # annotations are not always at the photo's size
    prediction = decode_segmentation(unit.mask or [], *target.shape)
    truth = "ground truth" if (target == 1).any() else "ground truth: nothing"
    truth += " (grey: ignored)" if (target == IGNORED).any() else ""
    guess = "prediction" if prediction.any() else "prediction: nothing"
    marked, found = overlay(image, target, [GROUND_TRUTH]), overlay(image, prediction, [PREDICTION])
    pictures = {"photo": image, truth: marked, guess: found}
    return panel(pictures, photo.expressions[sentence].text, f"IoU {unit.iou:.2f}")
