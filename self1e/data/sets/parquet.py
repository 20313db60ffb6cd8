"""Evaluation of sets that exist as Parquet files, on disk or on the hub: the split "parquet|<source>|<split>".

    parquet|mine/shards|val                     a folder of Parquet files, or one file
    parquet|Ricky06662/ReasonSeg_test|test      a data set on the hub

A row is a photo (`image`) with a text or several (`text`) and the mask that is meant (`mask`: an array of rows, or a
PNG). Rows with one `image_id`, where there is such a column, are about one photo, and `ann_id` names a row.
"""

import io
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from self1e.data.masks import load_label_map
from self1e.data.sets.expressions import Expression, ExpressionSet
from self1e.errors import UserError, check_known
from self1e.model.prompts import looks_like_sentence

log = logging.getLogger(__name__)
COLUMNS = ("image", "text", "mask")


def open_rows(source: str, split: str) -> Any:
    """The rows of a split, a `datasets.Dataset`, memory-mapped from a copy in HF_DATASETS_CACHE. Raises UserError."""
    try:
        import datasets
    except ImportError as error:
        raise UserError('Parquet files need datasets: pip install "self1e[parquet]"') from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    local = Path(source)
    try:
        files = {"data_files": {split: source}} if local.is_file() else {}
        builder = datasets.load_dataset_builder("parquet" if files else source, **files)
        size = builder.info.download_size or sum(file.stat().st_size for file in [local, *local.rglob("*.parquet")])
        if not Path(builder.cache_dir).exists():
            log.info(f"copying {source} ({size / 1e9:.2g} GB) to {builder.cache_dir}")
        builder.download_and_prepare()  # one process of a machine, the others wait for it
        rows = builder.as_dataset(split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"cannot open the split {split!r} of the Parquet set {source}: {error}") from error
    check_known(f"{source} has no column", COLUMNS, rows.column_names)
    for name in "image", "mask":  # a file is {bytes, path}, whether stored so or as its bytes
        if isinstance(rows.features[name], (datasets.Image, datasets.Value, dict)):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


class ParquetSplit(ExpressionSet):
    """The photos of one split of a Parquet set; a target is a row."""

    lower = False

    def open(self) -> None:
        if len(parts := self.name.split("|")) != 3 or not all(parts):
            raise UserError(f"{self.name!r} is no parquet|SOURCE|SPLIT, such as parquet|own/x|val")
        self.rows = open_rows(*parts[1:])
        groups: dict[str, list[int]] = {}
        for row, photo in enumerate(self._column("image_id")):
            groups.setdefault(str(photo), []).append(row)
        self.photos = list(groups.items())

    def _column(self, name: str) -> Any:
        """A column or, where there is none, the numbers of the rows."""
        return self.rows[name] if name in self.rows.column_names else range(len(self.rows))

    def __len__(self) -> int:
        return len(self.photos)

    def file_name(self, index: int) -> str:
        return self.photos[index][0]

    def where(self, target: int) -> str:
        return f"row {target}"

    def expressions(self, index: int) -> list[Expression]:
        return [
            Expression(text, [row], f"/{self._column('ann_id')[row]}", looks_like_sentence(text))
            for row in self.photos[index][1]
            for cell in [self.rows["text"][row]]
            for text in ([cell] if isinstance(cell, str) else cell)
        ]

    def photo(self, index: int) -> io.BytesIO:
        return io.BytesIO(self.rows["image"][self.photos[index][1][0]]["bytes"])

    def mask(self, index: int, target: int, image: Image.Image) -> np.ndarray:
        cell = self.rows["mask"][target]
        try:
            labels = load_label_map(io.BytesIO(cell["bytes"])) if isinstance(cell, dict) else np.array(cell)
        except ValueError as error:  # rows of different lengths
            raise UserError(f"malformed mask ({error})") from error
        return (labels > 0).astype(np.uint8)
