"""RefCOCOm: expressions for parts of objects in RefCOCO's photos, each with a mask of its own. For evaluation.

refer_seg/refcocom/{val, testA, testB}.json     records with `img_name`, `segment_id` and `sentences`
refer_seg/refcocom/masks/<segment_id>.png       masks, 0 and 255, of the photo's size
refer_seg/images/mscoco/images/train2014        photos

Keys and masks follow code that reads the set, the names of the JSON files are a convention of this project: the
files themselves were not seen.
"""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from self1e.data.masks import decode_each, load_label_map, orient
from self1e.data.readers import expected_schema, stream_json, take
from self1e.data.sample import EvalImage, EvalSplit, PhotoFolder, SampleError, forged, image_keys
from self1e.data.sets.referring import unique


class RefCOCOmSplit(EvalSplit):
    """One split; `name` is "refcocom|<split>". The photos are sorted by name; a unit is one sentence."""

    def __init__(self, name: str, dataset_dir: Path, *, allow_outside: bool = False):
        self.name = name
        source, masks, photos = self.paths(name, dataset_dir)
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
        self.expressions = sorted((photo, asked) for photo, asked in found.items() if asked)

    @staticmethod
    def paths(name: str, dataset_dir: Path) -> list[Path]:
        """Records, masks, photos."""
        root = Path(dataset_dir) / "refer_seg"
        own = root / "refcocom"
        return [own / f"{name.split('|')[1]}.json", own / "masks", root / "images/mscoco/images/train2014"]

    def __len__(self) -> int:
        return len(self.expressions)

    def keys(self) -> np.ndarray:
        return image_keys(photo for photo, _ in self.expressions)

    def read(self, item: int) -> EvalImage:
        photo, asked = self.expressions[item]
        return EvalImage(
            image_id=photo,
            sentences=[text for _, text in asked],
            is_sentence=[False] * len(asked),
            unit_ids=unique([f"{photo}/{segment}/{text}" for segment, text in asked]),
            no_target=[False] * len(asked),
            lower=True,
            load=partial(self._load, photo, [segment for segment, _ in asked]),
        )

    def _load(self, photo: str, segments: list[str]) -> tuple[Image.Image, np.ndarray]:
        id = f"{self.name}/{photo}"
        image, orientation = self.photos.load(photo, id)
        masks = decode_each(
            dict.fromkeys(segments), partial(self._mask, image=image, orientation=orientation, id=id), id
        )
        return image, np.stack([masks[segment] for segment in segments])

    def _mask(self, segment: str, image: Image.Image, orientation: int, id: str) -> np.ndarray:
        path = self.masks.path(f"{segment}.png", id)
        mask = orient((load_label_map(path, id) > 0).astype(np.uint8), image, orientation)
        if mask.shape != (image.height, image.width):
            sizes = f"{mask.shape[1]} x {mask.shape[0]}, the photo {image.width} x {image.height}"
            raise SampleError(id, f"{path}: the mask's size is {sizes} pixels")
        return mask
