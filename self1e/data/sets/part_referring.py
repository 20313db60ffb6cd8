"""RefCOCOm: expressions for parts of objects in RefCOCO's photos, each with a mask of its own. For evaluation.

refer_seg/refcocom/{val, testA, testB}.json     records with `img_name`, `segment_id` and `sentences`
refer_seg/refcocom/masks/<segment_id>.png       masks, 0 and 255, of the photo's size
refer_seg/images/mscoco/images/train2014        photos

Keys and masks follow code that reads the set, the names of the JSON files are a convention of this project: the
files themselves were not seen.
"""

from pathlib import Path

import numpy as np

from self1e.data.masks import load_label_map
from self1e.data.readers import expected_schema, stream_json, take
from self1e.data.samples import PhotoFolder, forged, image_keys
from self1e.data.sets.expressions import Expression, ExpressionData, ExpressionSplit


class RefCOCOmData(ExpressionData):
    """The photos of one split, sorted by name. A target is a segment's id."""

    def __init__(self, name: str, source: Path, masks: Path, photos: Path, *, allow_outside: bool):
        self.name = name
        self.masks, self.photos = PhotoFolder(masks, allow_outside), PhotoFolder(photos, allow_outside)
        found: dict[str, list[tuple[str, str]]] = {}  # photo -> (segment, sentence)
        count = 0
        with expected_schema(source, lambda: f", record {count} counted from 0"):
            for key, record, _ in stream_json(source):
                if key is not None:
                    raise TypeError("an object, not a list of records")
                photo, segment = take(record, "img_name", str), str(take(record, "segment_id", int, str))
                texts = [take(sentence, "sent", str) for sentence in take(record, "sentences", list)]
                fault = forged([photo, segment])
                if fault:
                    raise TypeError(fault)
                found.setdefault(photo, []).extend((segment, text) for text in texts)
                count += 1
        self._expressions = sorted((photo, asked) for photo, asked in found.items() if asked)

    def __len__(self) -> int:
        return len(self._expressions)

    def keys(self) -> np.ndarray:
        return image_keys(photo for photo, _ in self._expressions)

    def expressions(self, item: int) -> list[Expression]:
        return [Expression(text, [segment], f"{segment}/{text}") for segment, text in self._expressions[item][1]]

    def file_name(self, item: int) -> str:
        return self._expressions[item][0]

    def where(self, target: str) -> str:
        return str(self.masks.folder / f"{target}.png")

    def mask(self, item: int, target: str, id: str) -> np.ndarray:
        return (load_label_map(self.masks.path(f"{target}.png", id), id) > 0).astype(np.uint8)


class RefCOCOmSplit(ExpressionSplit):
    """One split; `name` is "refcocom|<split>". A unit is one sentence."""

    def __init__(self, name: str, dataset_dir: Path, *, allow_outside: bool = False):
        self.name = name
        self.data = RefCOCOmData(name, *self.paths(name, dataset_dir), allow_outside=allow_outside)

    @staticmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        """Records, masks, photos."""
        root = Path(dataset_dir) / "refer_seg"
        own = root / "refcocom"
        return [own / f"{name.split('|')[1]}.json", own / "masks", root / "images/mscoco/images/train2014"]
