"""The results of a segmentation evaluation: files that can be taken up again, the summary, and pictures.

In the results folder, `<split>.jsonl` holds one line per unit (see `metrics.Unit`), `<split>.json` the figures,
`summary.md` and `summary.json` all splits of a run, `settings.json` what produced them (see `evaluation.provenance`).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from self1e.data.samples import EvalImage
from self1e.data.splits import MODELS, file_stem, get_splits
from self1e.evaluation.journal import Journal
from self1e.evaluation.provenance import Settings, SettingsFile
from self1e.evaluation.segmentation.metrics import Unit
from self1e.evaluation.tables import markdown_table, percent, protocol_tables
from self1e.files import write_json, write_text
from self1e.visualize import compare, save_worst_first


class SplitResults:
    """The files of one split in `folder`."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self.stem = folder, name, file_stem(name)
        self.journal, self.settings = Journal(folder / f"{self.stem}.jsonl"), SettingsFile(folder)

    def kept(self, split: Sequence[EvalImage], settings: Settings) -> list[Unit]:
        """The units of an earlier run; nothing is written.

        Raises ValueError when there are some that were made with other settings, or of other data.
        """
        units = self.read(split)
        if units:
            self.settings.check(self.name, settings)
        return units

    def open(self, split: Sequence[EvalImage], settings: Settings, *, overwrite: bool) -> list[Unit]:
        """The units of `kept`, or none with `overwrite`. For one process, before any rank appends."""
        units = [] if overwrite else self.kept(split, settings)
        if len(units) < sum(len(photo.unit_ids) for photo in split):
            self.journal.start(unit.record() for unit in units)
            (self.folder / f"{self.stem}.json").unlink(missing_ok=True)
            self.settings.record(self.name, settings)
        return units

    def read(self, split: Sequence[EvalImage]) -> list[Unit]:
        """The units that are written. Raises ValueError when they are of other data."""
        asked = {
            unit_id: (photo.image_id, unit_text(prompt))
            for photo in split
            for unit_id, prompt in zip(photo.unit_ids, photo.prompts)
        }
        units = {}
        for place, record in self.journal.read():
            unit = Unit.read(record, place)
            if asked.get(unit.id) != (unit.image, unit.text):
                raise ValueError(
                    f"{place} is of another sentence than the data holds now; use another --exp_name to keep both, or "
                    "--overwrite_eval to evaluate anew"
                )
            units[unit.id] = unit
        return list(units.values())

    def save(self, units: Sequence[Unit], results: dict[str, dict]) -> None:
        """Write all units and figures of this split, and the summary of `results` so far. For one process."""
        self.journal.finish(unit.record() for unit in units)
        write_json(self.folder / f"{self.stem}.json", results[self.name], indent=2)
        write_json(self.folder / "summary.json", results, indent=2)
        write_text(self.folder / "summary.md", summary_table(results))

    def save_pictures(self, split: Sequence[EvalImage], units: Sequence[Unit]) -> None:
        """Photo, ground truth and prediction of the worst units in `<folder>/<split>/`, and an overview."""
        folder = self.folder / self.stem
        draw = partial(draw_unit, split, units)
        overview = save_worst_first(folder, [unit.iou for unit in units], [unit.id for unit in units], draw)
        tqdm.write(f"pictures, worst first: {overview}")


def draw_unit(split: Sequence[EvalImage], units: Sequence[Unit], index: int, *, width: int = 1200) -> Image.Image:
    """Photo, ground truth and prediction of one unit of a whole split, with its sentence and IoU; pixels of width."""
    photo, row = [(photo, row) for photo in split for row in range(len(photo.unit_ids))][index]
    image, targets = photo.load()
    size = targets.shape[1:]  # height, width
    image = image.resize(size[::-1])  # annotations are not always at the photo's size
    prediction = units[index].decode(*size).astype(bool)
    return compare(image, targets[row], prediction, photo.sentences[row], units[index].iou, width=width)


def examples(split: Sequence[EvalImage], units: Sequence[Unit]) -> dict[str, Image.Image]:
    """Pictures of the worst, the median and the best unit by IoU, from the masks that the units hold.

    Of equals the one with more pixels at stake is taken, so that the best is an empty mask only where all of the best
    are.
    """
    order = sorted(range(len(units)), key=lambda index: units[index].iou)
    worst = min(order, key=lambda index: (units[index].iou, -units[index].U))
    best = max(order, key=lambda index: (units[index].iou, units[index].U))
    chosen = {"worst": worst, "median": order[len(order) // 2], "best": best}
    return {name: draw_unit(split, units, index, width=900) for name, index in chosen.items()}


def unit_text(prompt: str) -> str:
    """A prompt as a unit holds it: without the image."""
    return prompt.removeprefix("<image>").strip()


def summary_table(results: dict[str, dict]) -> str:
    """Ours beside the published figures, in percent, and the figures that only some splits have.

    A column of a published model is there when one of the splits has a figure of it.
    """
    entries = get_splits(results)
    title = {name: name.replace("|", " ") for name in results}  # "|" would end a cell
    models = [model for model in MODELS if any(model in entry.published for entry in entries.values())]
    rows = []
    for name, figures in results.items():
        published = entries[name].published
        theirs = (" / ".join(f"{value:.1f}" for value in published.get(model, ())) or "-" for model in models)
        rows.append([title[name], str(figures["n"]), percent(figures["giou"]), percent(figures["ciou"]), *theirs])
    header = ["split", "n", "gIoU", "cIoU", *models]
    text = markdown_table(header, rows)
    if models:
        text += f"\n{models[0]} to {models[-1]}: published figures, cIoU; on ReasonSeg gIoU / cIoU.\n"
    foreign = [
        f"{title[name]} ({figures['data']})"
        for name, figures in results.items()
        if entries[name].published and figures.get("data", "-") not in ("-", "complete")
    ]
    if foreign:
        text += f"\nNot the whole benchmark, so that its published figures do not compare: {', '.join(foreign)}.\n"

    text += protocol_tables({title[name]: figures for name, figures in results.items()})
    notes = [f"- {title[name]}: {figures['note']}\n" for name, figures in results.items() if "note" in figures]
    return text + ("\n" + "".join(notes) if notes else "")
