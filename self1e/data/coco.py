"""Look-ups in a COCO-style annotation file: instances.json of the referring sets, PACO, PASCAL-Part."""

from pathlib import Path

import numpy as np

from self1e.data.readers import read_coco
from self1e.data.tables import open_tables
from self1e.errors import UserError


class CocoIndex:
    """Images and annotations of a COCO-style file (see `read_coco`); numbers are places in the file.

    problems: what contradicts itself in the file
    """

    def __init__(self, path: Path):
        self.path = path
        tables = open_tables(path, read_coco)
        self._images, self._annotations = tables.records("images"), tables.records("annotations")
        self.categories: dict[int, str] = dict(map(tuple, tables.meta["categories"]))
        self.problems = [f"{path.name}: {problem}" for problem in tables.meta["problems"]]
        names = "image_ids", "annotation_ids", "owner_ids"
        self.image_ids, self._ids, self._owners = map(tables.array, names)
        self._image_order, self._order, self._owner_order = (
            np.argsort(ids, kind="stable") for ids in (self.image_ids, self._ids, self._owners)
        )

    def _numbers(self, what: str, wanted: np.ndarray, ids: np.ndarray, order: np.ndarray) -> np.ndarray:
        places = np.searchsorted(ids, wanted, sorter=order)
        numbers = order[np.minimum(places, len(order) - 1)]
        if (unknown := wanted[ids[numbers] != wanted]).size:
            raise UserError(f"{self.path} has no {what} id {unknown[0]}")
        return numbers

    def image_numbers(self, image_ids: np.ndarray) -> np.ndarray:
        """Number of each image id. Raises UserError for an unknown one."""
        return self._numbers("image", image_ids, self.image_ids, self._image_order)

    def image(self, number: int) -> tuple[str, int, int]:
        """(file name, height, width)."""
        file_name, height, width = self._images[int(number)]
        return file_name, height, width

    def annotation(self, id: int) -> dict:
        """{id, category_id, segmentation} of an annotation. Raises UserError for an unknown id."""
        return self._annotations[int(self._numbers("annotation", np.array([id]), self._ids, self._order)[0])]

    def annotations_of(self, image_id: int) -> list[dict]:
        """All annotations of an image, in file order."""
        start, stop = (np.searchsorted(self._owners, image_id, side, self._owner_order) for side in ("left", "right"))
        return [self._annotations[int(number)] for number in self._owner_order[start:stop]]
