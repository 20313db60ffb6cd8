"""Evaluation of sets that exist as Parquet files, on disk or on the hub: the split "parquet|<source>|<split>".

    parquet|reasonseg_val|test            a ready entry of `parquet_sets.yaml`
    parquet|mine/shards|val               a folder of Parquet files (or one file) with the columns image, text, mask
    parquet|USER/NAME|test                the same of a data set on the hub
    parquet|mine/set.yaml|val             a description in the form of an entry of `parquet_sets.yaml`

A row is a photo with a text (or several) and the mask that is meant. Reading needs pyarrow:

    pip install "self1e[parquet]"
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError
from PIL import Image

from self1e.data.masks import check_size, decode_segmentation, orient
from self1e.data.paths import inside
from self1e.data.samples import UNREADABLE, EvalImage, EvalSplit, SampleError, image_keys, load_oriented
from self1e.data.sets.expressions import unique
from self1e.flags import check_known
from self1e.model.photos import open_picture
from self1e.model.prompts import looks_like_sentence

if TYPE_CHECKING:
    import pyarrow

NAME = "parquet"
READY = Path(__file__).with_name("parquet_sets.yaml")
QUERIES = ("auto", "phrase", "sentence")
COLUMNS = ("image", "text", "mask", "photo", "id")


@dataclass(frozen=True, kw_only=True)
class ParquetSet:
    """What a set's columns are called, and how its texts are asked.

    source:  folder, Parquet file or hub id; a relative path is one below the working folder
    columns: `image`, `text`, `mask` under the set's own names, each by default under this one; also `photo`, whose
             equal values mark rows about one photo, and `id`, the row's own name
    query:   "sentence" asks texts as they are, "phrase" as names of things; "auto" decides by the closing mark
    note:    what a reader of the figures must know; it stands in the results
    """

    source: str
    columns: dict[str, str] = field(default_factory=dict)
    query: str = "auto"
    note: str = ""

    def __post_init__(self) -> None:
        texts = [self.source, self.query, self.note, *dict(self.columns), *dict(self.columns).values()]
        if not all(isinstance(text, str) for text in texts):  # of a user's file, or a stranger's
            raise TypeError("one of its values is no text")
        check_known("unknown column", self.columns, COLUMNS)
        if self.query not in QUERIES:
            raise ValueError(f"query is {self.query!r}; expected one of {', '.join(QUERIES)}")

    def column(self, name: str) -> str | None:
        """The set's own name of a column; None for one that it does not have."""
        return self.columns.get(name, name if name in ("image", "text", "mask") else None)


def ready_sets() -> dict[str, ParquetSet]:
    """The ready entries of `parquet_sets.yaml` by name; the source of each is a hub id."""
    return {name: ParquetSet(**values) for name, values in yaml.safe_load(READY.read_text(encoding="utf-8")).items()}


def describe(source: str) -> ParquetSet:
    """The set that the middle part of a split's name means. Raises ValueError or FileNotFoundError naming it."""
    ready = ready_sets()
    if source in ready:
        return ready[source]
    if source.endswith((".yaml", ".yml")):
        try:
            values = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
            return ParquetSet(**values)
        except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
            known = ", ".join(each.name for each in fields(ParquetSet))
            raise ValueError(f"{source} does not describe a Parquet set ({error}); expected: {known}") from error
    if Path(source).exists() or source.count("/") == 1:
        return ParquetSet(source=source)
    raise ValueError(
        f"parquet|{source}: neither a path, nor a hub id such as USER/NAME, nor a ready set ({', '.join(ready)})"
    )


def of_split(names: Iterable[str], split: str) -> list[str]:
    """Those of a set's files that belong to a split: `data/test-00000-of-00004.parquet`, `test/0.parquet`."""
    files = sorted(name for name in names if name.endswith(".parquet"))
    chosen = [
        name
        for name in files
        if any(part == split or part.startswith((f"{split}-", f"{split}_", f"{split}.")) for part in name.split("/"))
    ]
    if not chosen:
        raise ValueError(f"none of its Parquet files is of the split {split!r}: {', '.join(files) or 'there is none'}")
    return chosen


def find_files(source: str, split: str) -> list[Path]:
    """The Parquet files of a split; those of a hub set are downloaded to the hub's cache.

    Raises ValueError where a set holds none, and OSError where the hub does not serve it.
    """
    place = Path(source)
    try:
        if place.is_file():
            return [place]
        if place.is_dir():
            inside = (path.relative_to(place).as_posix() for path in place.rglob("*.parquet"))
            return [place / name for name in of_split(inside, split)]
        names = HfApi().list_repo_files(source, repo_type="dataset")
        return [Path(hf_hub_download(source, name, repo_type="dataset")) for name in of_split(names, split)]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    except (HTTPError, OSError) as error:
        raise FileNotFoundError(f"there is no folder {source}, and the hub did not serve it: {error}") from error


@lru_cache(1)  # rows are read in order, so the last group serves many
def _row_group(path: Path, group: int, columns: tuple[str, ...]) -> "pyarrow.Table":
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:  # one thread: this is a forked worker
        return file.read_row_group(group, columns=list(columns), use_threads=False)


class ParquetSplit(EvalSplit):
    """One split of a Parquet set; rows about one photo make one `EvalImage`."""

    def __init__(self, name: str, dataset_dir: Path, *, allow_outside: bool = False):
        self.name, self.allow_outside = name, allow_outside
        source, split = _parts(name)
        self.set = describe(source)
        self.note = self.set.note
        texts, photos, ids = self._read_index(find_files(self.set.source, split))
        groups: dict[Any, list[int]] = {}
        for row, photo in enumerate(photos):
            groups.setdefault(photo, []).append(row)
        self._texts, self._ids, self._groups = texts, ids, list(groups.items())

    @staticmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        """A path that is given must exist; what the hub holds is found when the split is read."""
        source, _ = _parts(name)
        place = Path(source)
        return [place] if source.endswith((".yaml", ".yml", ".parquet")) or place.exists() else []

    def _read_index(self, files: list[Path]) -> tuple[list[list[str]], list[str], list[str]]:
        """Texts, photo and id of every row; where the rows lie is kept."""
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(f'{self.name} needs pyarrow: pip install "self1e[parquet]"') from error
        wanted = {name: column for name in COLUMNS if (column := self.set.column(name)) is not None}
        light = [wanted[name] for name in ("text", "photo", "id") if name in wanted]
        texts: list[list[str]] = []
        photos: list[str] = []
        ids: list[str] = []
        self._places: list[tuple[Path, int, int]] = []
        for path in files:
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    absent = [column for column in wanted.values() if column not in file.schema_arrow.names]
                    if absent:
                        have = ", ".join(file.schema_arrow.names)
                        raise ValueError(f"no column {', '.join(absent)} among {have}; name them in a YAML file")
                    for group in range(file.num_row_groups):
                        rows = file.read_row_group(group, columns=light, use_threads=False).to_pylist()
                        self._places += [(path, group, place) for place in range(len(rows))]
                        for row in rows:
                            number = str(len(texts))
                            text = row[wanted["text"]]
                            texts.append(text if isinstance(text, list) else [text])
                            photos.append(str(row[wanted["photo"]]) if "photo" in wanted else number)
                            ids.append(_id_text(row[wanted["id"]]) if "id" in wanted else number)
            except (pyarrow.ArrowException, ValueError) as error:
                raise ValueError(f"{path}: {error}") from error
        return texts, photos, ids

    def __len__(self) -> int:
        return len(self._groups)

    def keys(self) -> np.ndarray:
        return image_keys(photo for photo, _ in self._groups)

    def read(self, item: int) -> EvalImage:
        photo, rows = self._groups[item]
        sentences = [text for row in rows for text in self._texts[row]]
        long = {"sentence": True, "phrase": False}.get(self.set.query)
        return EvalImage(
            image_id=photo,
            sentences=sentences,
            is_sentence=[looks_like_sentence(text) if long is None else long for text in sentences],
            unit_ids=unique([f"{photo}/{self._ids[row]}" for row in rows for _ in self._texts[row]]),
            no_target=[False] * len(sentences),
            lower=False,
            load=partial(self._load, photo, rows),
        )

    def _load(self, photo: str, rows: list[int]) -> tuple[Image.Image, np.ndarray]:
        id = f"{self.name}/{photo}"
        image_column, mask_column = (str(self.set.column(name)) for name in ("image", "mask"))
        image, orientation, masks = None, 1, []
        for row in rows:
            path, group, place = self._places[row]
            cells = _row_group(path, group, (image_column, mask_column))
            if image is None:
                cell = cells[image_column][place].as_py()
                image, orientation = load_oriented(self._image_source(cell, path.parent, id), id)
            stored = (image.width, image.height) if orientation < 5 else (image.height, image.width)
            try:
                mask = read_mask(_cell(cells[mask_column][place]), stored[1], stored[0])
            except (ValueError, TypeError, *UNREADABLE) as error:
                raise SampleError(id, f"row {row}: malformed mask ({error})") from error
            masks += [orient(mask, image, orientation)] * len(self._texts[row])
        if len({mask.shape for mask in masks}) > 1:
            raise SampleError(id, f"its masks differ in size: {sorted({mask.shape for mask in masks})}")
        assert image is not None
        return image, np.stack(masks)

    def _image_source(self, cell: Any, folder: Path, id: str) -> Path | io.BytesIO:
        """A cell of an image column: bytes, the hub's {bytes, path}, or a path beside the Parquet file."""
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, bytes):
            return io.BytesIO(cell)
        try:
            return inside(folder, str(cell), allow_outside=self.allow_outside)
        except ValueError as error:
            raise SampleError(id, str(error)) from error


def read_mask(cell: Any, height: int, width: int) -> np.ndarray:
    """One cell of a mask column -> uint8 {0, 1} (H, W); several masks in a cell give their union.

    A cell is an array of rows (bool, or integers of which 0 is background), the bytes of a PNG, COCO's RLE, polygons
    [x0, y0, x1, y1, ...] (or one of them), or a list of any of these; None is an empty mask. H, W are the mask's own
    where it has a size, and else the photo's as it is stored, `height` and `width`.

    Raises ValueError for anything else.
    """
    if cell is None or (isinstance(cell, list) and not cell):
        return np.zeros((height, width), np.uint8)
    if isinstance(cell, np.ndarray):
        return _binary(cell)
    if isinstance(cell, bytes):
        with open_picture(io.BytesIO(cell)) as picture:
            array = np.asarray(picture)
        return _binary(array if array.ndim == 2 else array[..., 0])
    if isinstance(cell, dict):
        if "bytes" in cell:
            return read_mask(cell["bytes"], height, width)
        if "size" in cell:
            height, width = cell["size"]
            check_size(height, width)
        return decode_segmentation(cell, height, width)
    if isinstance(cell, list):
        if all(isinstance(value, (int, float)) for value in cell):
            return decode_segmentation([cell], height, width)  # one polygon
        if _is_array(cell, height, width):
            return _binary(np.asarray(cell))
        if all(isinstance(part, list) and isinstance(part[0], (int, float)) for part in cell if part):
            return decode_segmentation(cell, height, width)  # polygons
        masks = [read_mask(part, height, width) for part in cell]
        if len({mask.shape for mask in masks}) > 1:
            raise ValueError(f"its parts differ in size: {sorted({mask.shape for mask in masks})}")
        return np.bitwise_or.reduce(masks)
    raise ValueError(f"neither an array, PNG bytes, RLE nor polygons: {type(cell).__name__}")


def _is_array(cell: list, height: int, width: int) -> bool:
    """Whether nested lists are the rows of a mask: bool values always, integers where they cover the photo."""
    first = cell[0][0] if isinstance(cell[0], list) and cell[0] else None
    if isinstance(first, bool):
        return True
    return isinstance(first, int) and len(cell) == height and all(len(row) == width for row in cell)


def _binary(array: np.ndarray) -> np.ndarray:
    if array.ndim != 2:
        raise ValueError(f"an array of shape {array.shape} is no mask")
    return (array > 0).astype(np.uint8)


def _cell(scalar: "pyarrow.Scalar") -> Any:
    """The value of a cell; rows of bool at once as an array, because a million Python objects take their time."""
    import pyarrow.types as kinds

    kind = scalar.type
    if kinds.is_list(kind) and kinds.is_list(kind.value_type) and kinds.is_boolean(kind.value_type.value_type):
        rows = scalar.values
        if rows is not None and len(rows) and len(set(rows.value_lengths().to_pylist())) == 1:
            return rows.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1)
    return scalar.as_py()


def _id_text(value: Any) -> str:
    return "_".join(map(str, value)) if isinstance(value, list) else str(value)


def _parts(name: str) -> tuple[str, str]:
    """Source and split of "parquet|<source>|<split>". Raises ValueError for another form."""
    parts = name.split("|")
    if len(parts) != 3 or not all(parts):
        raise ValueError(f"{name!r} is no Parquet split; expected parquet|SOURCE|SPLIT, such as parquet|muse_val|test")
    return parts[1], parts[2]
