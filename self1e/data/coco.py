"""Look-ups in a COCO-style annotation file: instances.json of the referring sets, PACO, PASCAL-Part."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from self1e.data.masks import decode_segmentation
from self1e.data.readers import read_coco
from self1e.data.samples import SampleError
from self1e.data.tables import open_tables
from self1e.errors import UserError


class CocoIndex:
    """Images and annotations of a COCO-style file, memory-mapped (see `read_coco`); numbers are places in the file."""

    def __init__(self, path: Path):
        self.path = path
        self._tables = open_tables(path, read_coco)
        self._images, self._annotations = self._tables.records("images"), self._tables.records("annotations")
        self.categories: dict[int, str] = dict(map(tuple, self._tables.meta["categories"]))
        self.problems = [f"{path.name}: {problem}" for problem in self._tables.meta["problems"]]
        self.image_keys = self._tables.array("image_keys")  # `image_key` of each image, int64, in file order
        self._image_ids, self._image_order = (self._tables.array(f"image_{what}") for what in ("ids", "order"))
        self._ids, self._order = (self._tables.array(f"annotation_{what}") for what in ("ids", "order"))
        self._owners, self._owned = (self._tables.array(f"owner_{what}") for what in ("ids", "order"))

    @property
    def image_ids(self) -> np.ndarray:
        """Image ids in file order."""
        ids = np.empty_like(self._image_ids)
        ids[self._image_order] = self._image_ids
        return ids

    def image_numbers(self, image_ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """Number of each image id. Raises UserError for an unknown one."""
        places = np.searchsorted(self._image_ids, image_ids)
        found = np.append(self._image_ids, np.iinfo(np.int64).min)[places] == image_ids
        if not found.all():
            raise UserError(f"{self.path} has no image id {np.asarray(image_ids)[~found][0]}")
        return self._image_order[places]

    def image(self, number: int) -> tuple[str, int, int]:
        """(file name, height, width)."""
        file_name, height, width = self._images[number]
        return file_name, height, width

    def annotation(self, id: int) -> dict:
        """{id, category_id, segmentation} of an annotation. Raises UserError for an unknown id."""
        place = np.searchsorted(self._ids, id)
        if place == len(self._ids) or self._ids[place] != id:
            raise UserError(f"{self.path} has no annotation id {id}")
        return self.annotation_at(self._order[place])

    def annotations_of(self, image_id: int) -> np.ndarray:
        """Numbers of all annotations of an image, in file order; read one with `annotation_at`."""
        start, stop = np.searchsorted(self._owners, image_id), np.searchsorted(self._owners, image_id, side="right")
        return self._owned[start:stop]

    def annotation_at(self, number: int) -> dict:
        return self._annotations[int(number)]

    @staticmethod
    def mask(annotation: dict, height: int, width: int, id: str) -> np.ndarray:
        """The mask of an annotation, uint8 {0, 1} (height, width). Raises SampleError under `id`, naming it."""
        try:
            return decode_segmentation(annotation["segmentation"], height, width)
        except ValueError as error:
            raise SampleError(id, f"annotation {annotation['id']}: malformed segmentation ({error})") from error
