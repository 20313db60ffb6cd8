"""Figures of a segmentation evaluation on disk, as a table, and as pictures.

In the results folder, `<split>.jsonl` holds one line per unit (see `metrics.Unit`), `<split>.json` its figures, and
`summary.md` and `summary.json` those of all splits that the folder holds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from self1e import distributed
from self1e.data.masks import decode_segmentation
from self1e.data.samples import EvalImage
from self1e.data.splits import MODELS, SPLITS, file_stem, get_splits
from self1e.evaluation.segmentation.metrics import Unit
from self1e.evaluation.tables import markdown_table, percent
from self1e.files import read_json, write_json, write_text
from self1e.visualize import compare, save_worst_first


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
    order = list(SPLITS)
    found.sort(key=lambda figures: order.index(figures["split"]) if figures["split"] in order else len(order))
    return {figures["split"]: figures for figures in found}


def summary_table(results: Mapping[str, dict]) -> str:
    """Ours beside the published figures, in percent, and the figures that only some splits have.

    Published figures stand beside splits whose data is the whole benchmark, and their columns where there are some.
    """
    entries = get_splits(results)
    title = {name: name.replace("|", " ") for name in results}  # "|" would end a cell
    whole = {name: entries[name].published for name, figures in results.items() if figures["data"] == "complete"}
    models = [model for model in MODELS if any(model in published for published in whole.values())]
    rows = []
    for name, figures in results.items():
        published = [whole.get(name, {}).get(model, ()) for model in models]
        theirs = (" / ".join(f"{value:.1f}" for value in values) or "-" for values in published)
        rows.append([title[name], str(figures["n"]), percent(figures["giou"]), percent(figures["ciou"]), *theirs])
    text = markdown_table(["split", "n", "gIoU", "cIoU", *models], rows)
    if models:
        text += f"\n{models[0]} to {models[-1]}: published figures, cIoU; on ReasonSeg gIoU / cIoU.\n"
    partial = [f"{title[name]} ({f['data']})" for name, f in results.items() if f["data"] not in ("-", "complete")]
    if partial:
        text += f"\nNot the whole benchmark: {', '.join(partial)}.\n"
    rela = {title[name]: figures["rela"] for name, figures in results.items() if "rela" in figures}
    if rela:
        keys = ("giou", "ciou", "pr@0.7", "pr@0.8", "pr@0.9", "n_acc", "t_acc")
        rows = [[name, *(percent(figures[key]) for key in keys)] for name, figures in rela.items()]
        header = ["ReLA protocol", "gIoU", "cIoU", "Pr@0.7", "Pr@0.8", "Pr@0.9", "N-acc", "T-acc"]
        text += "\n" + markdown_table(header, rows)
    reasoning = {title[name]: figures for name, figures in results.items() if "bootstrap" in figures}
    if reasoning:
        rows = []
        for name, figures in reasoning.items():
            intervals = [" to ".join(map(percent, figures["bootstrap"][key])) for key in ("giou", "ciou")]
            parts = [f"{percent(figures[q]['giou'])} / {percent(figures[q]['ciou'])}" for q in ("short", "long")]
            rows.append([name, *intervals, *parts])
        header = ["reasoning", "gIoU, 95% interval", "cIoU, 95% interval", "short gIoU / cIoU", "long gIoU / cIoU"]
        text += "\n" + markdown_table(header, rows)
    return text


def save_pictures(folder: Path, split: Sequence[EvalImage], units: Sequence[Unit]) -> None:
    """Photo, ground truth and prediction of the worst units of a split, and an overview, in `folder`."""
    where = [(number, sentence) for number, photo in enumerate(split) for sentence in range(len(photo.unit_ids))]

    def draw(index: int) -> Image.Image:
        number, sentence = where[index]
        photo, unit = split[number], units[index]
        image, targets = photo.load()
        height, width = targets.shape[1:]
        image = image.resize((width, height))  # annotations are not always at the photo's size
        prediction = decode_segmentation(unit.mask or [], height, width).astype(bool)
        return compare(image, targets[sentence], prediction, photo.sentences[sentence], unit.iou, width=1200)

    values, names = [unit.iou for unit in units], [unit.id for unit in units]
    distributed.say(f"pictures, worst first: {save_worst_first(folder, values, names, draw)}")
