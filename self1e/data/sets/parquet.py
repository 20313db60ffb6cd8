"""Evaluation of sets that exist as Parquet files, on disk or on the hub: the split "parquet|<source>|<split>".

    parquet|reasonseg_val|test            an entry of READY
    parquet|mine/shards|val               a folder of Parquet files (or one file) with the columns image, text, mask
    parquet|USER/NAME|test                the same of a data set on the hub
    parquet|mine/set.yaml|val             a description with the fields of `ParquetSet`

A row is a photo with a text (or several) and the mask that is meant. `datasets` reads the files, and copies them into
its cache once (HF_DATASETS_CACHE), from which they are memory-mapped:  pip install "self1e[parquet]"
"""

import io
import logging
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from PIL import Image

from self1e.data.masks import decode_segmentation, load_label_map, orient
from self1e.data.paths import inside
from self1e.data.samples import EvalImage, EvalSplit, SampleError, image_keys, load_oriented
from self1e.data.sets.expressions import unique
from self1e.errors import UserError, check_known
from self1e.model.prompts import looks_like_sentence

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)
COLUMNS = ("image", "text", "mask", "photo", "id")


@dataclass(frozen=True, kw_only=True)
class ParquetSet:
    """Where a set is, and what its columns are called.

    source:  folder, Parquet file or hub id; a relative path is one below the working folder
    columns: `image`, `text`, `mask` under the set's own names, each by default under this one; also `photo`, whose
             equal values mark rows about one photo, and `id`, the row's own name
    note:    what a reader of the figures must know; it stands in the results
    """

    source: str
    columns: dict[str, str] = field(default_factory=dict)
    note: str = ""


_OURS = {"photo": "image_id", "id": "ann_id"}
_NOTE = "pixels that ReasonSeg marks as ignored are target in this copy, so its figures are not those of ReasonSeg"
# Sets whose columns and split names their authors' evaluation code reads.
READY = {
    "reasonseg_val": ParquetSet(source="Ricky06662/ReasonSeg_val", columns=_OURS, note=_NOTE),
    "reasonseg_test": ParquetSet(source="Ricky06662/ReasonSeg_test", columns=_OURS, note=_NOTE),
}


def describe(source: str) -> ParquetSet:
    """The set that the middle part of a split's name means. Raises UserError for a faulty description."""
    if not source.endswith((".yaml", ".yml")):
        return READY.get(source) or ParquetSet(source=source)
    try:
        described = ParquetSet(**yaml.safe_load(Path(source).read_text(encoding="utf-8")))
        check_known("unknown column", described.columns, COLUMNS)
    except (OSError, yaml.YAMLError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{source} does not describe a Parquet set by source, columns and note ({error})") from error
    return described


def open_rows(source: str, split: str) -> "datasets.Dataset":
    """The rows of a split, memory-mapped. Raises UserError where there is no such set or split."""
    try:
        import datasets
    except ImportError as error:
        raise UserError('Parquet files need datasets: pip install "self1e[parquet]"') from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    place = Path(source)
    try:
        if place.is_file():
            builder = datasets.load_dataset_builder("parquet", data_files={split: source})
        elif place.is_dir():
            builder = datasets.load_dataset_builder("parquet", data_dir=source)
        else:
            builder = datasets.load_dataset_builder(source)
        size = builder.info.download_size or sum(file.stat().st_size for file in [place, *place.rglob("*.parquet")])
        if not Path(builder.cache_dir).exists():
            log.info(f"copying {source} ({size / 1e9:.2g} GB) to {builder.cache_dir}")
        builder.download_and_prepare()  # one process of a machine, the others wait for it
        rows = builder.as_dataset(split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"cannot open the split {split!r} of the Parquet set {source}: {error}") from error
    pictures = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    for name in pictures:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


class ParquetSplit(EvalSplit):
    """One split of a Parquet set; rows about one photo make one `EvalImage`."""

    def __init__(self, name: str, dataset_dir: Path, *, allow_outside: bool = False):
        source, split = _parts(name)
        self.name, self.allow_outside, self.set = name, allow_outside, describe(source)
        self.note = self.set.note
        self.columns = {column: column for column in ("image", "text", "mask")} | self.set.columns
        rows = open_rows(self.set.source, split)
        check_known(f"{self.set.source} has no column", self.columns.values(), rows.column_names)
        self.rows = rows.select_columns([*dict.fromkeys(self.columns.values())])
        names = self.rows[self.columns["photo"]] if "photo" in self.columns else range(len(rows))
        groups: dict[str, list[int]] = {}
        for row, photo in enumerate(names):
            groups.setdefault(str(photo), []).append(row)
        self.photos = list(groups.items())

    @staticmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        """A path that is given must exist; what the hub holds is found when the split is read."""
        source, _ = _parts(name)
        return [Path(source)] if source.endswith((".yaml", ".yml", ".parquet")) or source.count("/") > 1 else []

    def __len__(self) -> int:
        return len(self.photos)

    def image_keys(self) -> np.ndarray:
        return image_keys(photo for photo, _ in self.photos)

    def _texts(self, row: int) -> list[str]:
        text = self.rows[self.columns["text"]][row]
        return text if isinstance(text, list) else [text]

    def read(self, item: int) -> EvalImage:
        photo, rows = self.photos[item]
        texts = {row: self._texts(row) for row in rows}
        ids = {row: self.rows[self.columns["id"]][row] if "id" in self.columns else row for row in rows}
        sentences = [text for row in rows for text in texts[row]]
        return EvalImage(
            image_id=photo,
            sentences=sentences,
            is_sentence=[looks_like_sentence(text) for text in sentences],
            unit_ids=unique([f"{photo}/{ids[row]}" for row in rows for _ in texts[row]]),
            no_target=[False] * len(sentences),
            lower=False,
            load=partial(self._load, photo, {row: len(texts[row]) for row in rows}),
        )

    def _load(self, photo: str, rows: dict[int, int]) -> tuple[Image.Image, np.ndarray]:
        """The photo and the masks (n, H, W) of its rows, each as often as the row has texts."""
        id = f"{self.name}/{photo}"
        cells = [self.rows[row] for row in rows]
        image, orientation = load_oriented(self._file(cells[0][self.columns["image"]], id), id)
        stored = image.size if orientation < 5 else image.size[::-1]
        masks = []
        for cell, (row, count) in zip(cells, rows.items()):
            try:
                mask = read_mask(cell[self.columns["mask"]], stored[1], stored[0], id)
            except ValueError as error:
                raise SampleError(id, f"row {row}: malformed mask ({error})") from error
            mask = orient(mask, image, orientation)
            if mask.shape != (image.height, image.width):
                sizes = f"{mask.shape[1]} x {mask.shape[0]}, the photo {image.width} x {image.height}"
                raise SampleError(id, f"row {row}: the mask's size is {sizes} pixels")
            masks += [mask] * count
        return image, np.stack(masks)

    def _file(self, cell: Any, id: str) -> Path | io.BytesIO:
        """A picture's cell: bytes, the hub's {bytes, path}, or a path beside the Parquet files."""
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, bytes):
            return io.BytesIO(cell)
        place = Path(self.set.source)
        try:
            return inside(place if place.is_dir() else place.parent, str(cell), allow_outside=self.allow_outside)
        except UserError as error:
            raise SampleError(id, str(error)) from error


def read_mask(cell: Any, height: int, width: int, id: str) -> np.ndarray:
    """One cell of a mask column -> uint8 {0, 1} (H, W).

    A cell is an array of rows (bool, or integers of which 0 is background), a PNG (bytes, or the hub's {bytes, path}),
    COCO's RLE, or polygons, which fill `height` x `width`; None is an empty mask. Raises ValueError for anything else.
    """
    if isinstance(cell, dict) and "bytes" in cell:
        cell = cell["bytes"]
    if isinstance(cell, bytes):
        return (load_label_map(io.BytesIO(cell), id) > 0).astype(np.uint8)
    if isinstance(cell, list) and len(cell) == height and all(isinstance(row, list) for row in cell):
        rows = np.array(cell, dtype=object if len({len(row) for row in cell}) > 1 else None)
        if rows.dtype.kind in "biu" and rows.ndim == 2:
            return (rows > 0).astype(np.uint8)
    return decode_segmentation([] if cell is None else cell, height, width)


def _parts(name: str) -> tuple[str, str]:
    """Source and split of "parquet|<source>|<split>". Raises UserError for another form."""
    parts = name.split("|")
    if len(parts) != 3 or not all(parts):
        raise UserError(
            f"{name!r} is no Parquet split; expected parquet|SOURCE|SPLIT, such as parquet|mine/shards|val"
        )
    return parts[1], parts[2]
