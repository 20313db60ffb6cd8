"""Evaluation of sets that exist as Parquet files, on disk or on the hub: the split "parquet|<source>|<split>".

    parquet|reasonseg_val|test      an entry of READY
    parquet|mine/shards|val         a folder of Parquet files, or one file
    parquet|USER/NAME|test          a data set on the hub

A row is a photo (`image`) with a text or several (`text`) and the mask that is meant (`mask`: an array of rows, or a
PNG). Rows with one `image_id`, where there is such a column, are about one photo, and `ann_id` names a row. `datasets`
reads the files, and copies them into its cache once (HF_DATASETS_CACHE), from which they are memory-mapped:
pip install "self1e[parquet]"
"""

import io
import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from self1e.data.masks import load_label_map, orient
from self1e.data.paths import inside
from self1e.data.samples import EvalImage, EvalSplit, SampleError, image_keys, load_oriented
from self1e.data.sets.expressions import unique
from self1e.errors import UserError, check_known
from self1e.model.prompts import looks_like_sentence

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)
COLUMNS, OPTIONAL = ("image", "text", "mask"), ("image_id", "ann_id")
# Sets whose columns and split names their authors' evaluation code reads.
READY = {"reasonseg_val": "Ricky06662/ReasonSeg_val", "reasonseg_test": "Ricky06662/ReasonSeg_test"}
NOTE = "pixels that ReasonSeg marks as ignored are target in this copy, so its figures are not those of ReasonSeg"


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
    check_known(f"{source} has no column", COLUMNS, rows.column_names)
    rows = rows.select_columns([name for name in rows.column_names if name in COLUMNS + OPTIONAL])
    for name, kind in rows.features.items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


class ParquetSplit(EvalSplit):
    """One split of a Parquet set; rows about one photo make one `EvalImage`."""

    def __init__(self, name: str, dataset_dir: Path, *, allow_outside: bool = False):
        source, split = _parts(name)
        self.note = NOTE if source in READY else ""
        self.name, self.allow_outside, self.source = name, allow_outside, READY.get(source, source)
        self.rows = open_rows(self.source, split)
        groups: dict[str, list[int]] = {}
        for row, photo in enumerate(self._column("image_id")):
            groups.setdefault(str(photo), []).append(row)
        self.photos = list(groups.items())

    @staticmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        """A path that is given must exist; what the hub holds is found when the split is read."""
        source, _ = _parts(name)
        return [Path(source)] if source.endswith(".parquet") or source.count("/") > 1 else []

    def _column(self, name: str) -> Any:
        """A column or, where there is none, the numbers of the rows."""
        return self.rows[name] if name in self.rows.column_names else range(len(self.rows))

    def __len__(self) -> int:
        return len(self.photos)

    def image_keys(self) -> np.ndarray:
        return image_keys(photo for photo, _ in self.photos)

    def read(self, item: int) -> EvalImage:
        photo, rows = self.photos[item]
        cells = {row: self.rows["text"][row] for row in rows}
        texts = {row: [cell] if isinstance(cell, str) else cell for row, cell in cells.items()}
        sentences = [text for row in rows for text in texts[row]]
        return EvalImage(
            image_id=photo,
            sentences=sentences,
            is_sentence=[looks_like_sentence(text) for text in sentences],
            unit_ids=unique([f"{photo}/{self._column('ann_id')[row]}" for row in rows for _ in texts[row]]),
            no_target=[False] * len(sentences),
            lower=False,
            load=partial(self._load, photo, {row: len(texts[row]) for row in rows}),
        )

    def _load(self, photo: str, rows: dict[int, int]) -> tuple[Image.Image, np.ndarray]:
        """The photo and the masks (n, H, W) of its rows, each as often as the row has texts."""
        id = f"{self.name}/{photo}"
        cells = [self.rows[row] for row in rows]
        image, orientation = load_oriented(self._file(cells[0]["image"], id), id)
        masks = []
        for cell, (row, count) in zip(cells, rows.items()):
            mask = orient(self._mask(cell["mask"], f"{id}, row {row}"), image, orientation)
            if mask.shape != (image.height, image.width):
                sizes = f"{mask.shape[1]} x {mask.shape[0]}, the photo {image.width} x {image.height}"
                raise SampleError(id, f"row {row}: the mask's size is {sizes} pixels")
            masks += [mask] * count
        return image, np.stack(masks)

    def _mask(self, cell: Any, id: str) -> np.ndarray:
        """A mask's cell: an array of rows, or a PNG as `_file` takes it -> uint8 {0, 1} (H, W)."""
        if isinstance(cell, list):
            try:
                labels = np.array(cell)
            except ValueError as error:  # rows of different lengths
                raise SampleError(id, f"malformed mask ({error})") from error
        else:
            labels = load_label_map(self._file(cell, id), id)
        return (labels > 0).astype(np.uint8)

    def _file(self, cell: Any, id: str) -> Path | io.BytesIO:
        """A picture's cell: bytes, the hub's {bytes, path}, or a path beside the Parquet files."""
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, bytes):
            return io.BytesIO(cell)
        place = Path(self.source)
        try:
            return inside(place if place.is_dir() else place.parent, str(cell), allow_outside=self.allow_outside)
        except UserError as error:
            raise SampleError(id, str(error)) from error


def _parts(name: str) -> tuple[str, str]:
    """Source and split of "parquet|<source>|<split>". Raises UserError for another form."""
    parts = name.split("|")
    if len(parts) != 3 or not all(parts):
        raise UserError(
            f"{name!r} is no Parquet split; expected parquet|SOURCE|SPLIT, such as parquet|mine/shards|val"
        )
    return parts[1], parts[2]
