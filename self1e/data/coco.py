"""Look-ups in a COCO-style annotation file: instances.json of the referring sets, PACO, PASCAL-Part."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from self1e.data.readers import read_coco, remarks_on
from self1e.data.samples import Annotation
from self1e.data.tables import open_index


class CocoIndex:
    """Look-ups in a COCO-style file; memory-mapped (see `read_coco`)."""

    def __init__(self, path: Path):
        self.path = path
        self._index = open_index(path, read_coco)
        self._images = self._index.table("images")
        self._annotations = self._index.table("annotations")
        self.categories: dict[int, str] = dict(map(tuple, self._index.meta["categories"]))

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file."""
        return self._index.sha256

    @property
    def image_keys(self) -> np.ndarray:
        """`image_key` of each image, int64, in file order."""
        return self._index.array("image_keys")

    @property
    def image_ids(self) -> np.ndarray:
        """Image ids in file order."""
        ids = np.empty_like(self._index.array("image_ids"))
        ids[self._index.array("image_order")] = self._index.array("image_ids")
        return ids

    def image_rows(self, image_ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """Row of each image id in file order. Raises KeyError for an unknown one."""
        ids = self._index.array("image_ids")
        places = np.searchsorted(ids, image_ids)
        found = np.append(ids, -1)[places] == image_ids if len(ids) else np.zeros(len(places), bool)
        if not found.all():
            raise KeyError(f"image id {np.asarray(image_ids)[~found][0]}")
        return self._index.array("image_order")[places]

    def image(self, row: int) -> tuple[str, int, int]:
        """(file name, height, width)."""
        file_name, height, width = self._images[row]
        return file_name, height, width

    def annotation(self, annotation_id: int) -> dict:
        """An annotation as it stands in the file. Raises KeyError for an unknown id."""
        ids = self._index.array("annotation_ids")
        place = np.searchsorted(ids, annotation_id)
        if place == len(ids) or ids[place] != annotation_id:
            raise KeyError(f"annotation id {annotation_id}")
        return self._annotations[int(self._index.array("annotation_order")[place])]

    def annotation_rows(self, image_id: int) -> np.ndarray:
        """Rows of all annotations of an image, in file order; read one with `annotation_at`."""
        owners = self._index.array("owner_ids")
        start, stop = np.searchsorted(owners, image_id), np.searchsorted(owners, image_id, side="right")
        return self._index.array("owner_order")[start:stop]

    def annotation_at(self, row: int) -> dict:
        return self._annotations[int(row)]

    def placed(self, row: int, annotations: Iterable[dict]) -> Iterator[Annotation]:
        """Annotations of the image in a row, with their frame."""
        _, height, width = self.image(row)
        for annotation in annotations:
            yield Annotation(f"annotation {annotation['id']}", annotation["segmentation"], height, width)

    def faults(self) -> list[str]:
        """Ids that occur twice, and annotations of no image."""
        ids = {what: self._index.array(f"{what}_ids") for what in ("image", "annotation", "owner")}  # sorted
        found = []
        for what in "image", "annotation":
            twice = np.unique(ids[what][1:][np.diff(ids[what]) == 0])
            found += [f"{self.path.name}: {what} id {id} occurs twice" for id in twice]
        lost = np.setdiff1d(ids["owner"], ids["image"])
        return found + [f"{self.path.name}: annotations of image {id}, which is not among its images" for id in lost]

    def remarks(self, *, empty: str) -> list[str]:
        """Annotations whose segmentation is odd; `empty` says what becomes of an empty one."""
        return remarks_on(self._index.meta["oddities"], self.path.name, empty=empty)
