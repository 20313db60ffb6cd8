"""A synthetic dataset tree in the real formats: coloured shapes on photo-like backgrounds; see `apps.make`."""

from pathlib import Path

from tqdm import tqdm

from self1e.errors import UserError
from self1e.synthetic.reasoning import write_reasoning
from self1e.synthetic.referring import write_referring
from self1e.synthetic.scenes import Scene, draw_scene
from self1e.synthetic.semantic import write_parts, write_semantic
from self1e.synthetic.vqa import write_conversations, write_vqa

SPLITS = ("val", "testA", "testB")  # one group of held-out scenes each


def make_shapes_dataset(
    path: str | Path, *, train: int = 2000, val: int = 100, size: int = 224, simple: bool = False, seed: int = 0
) -> Path:
    """Write the tree into a new or empty folder and return it: `train` training and three times `val` held-out scenes.

    `size`: pixels of a photo's longer side, 48 at least; both counts are 2 at least. `simple`: scenes whose colours
    tell the shapes apart, and one expression a shape, colour and kind: what a model of a million parameters learns in
    minutes.
    """
    root = Path(path)
    if root.exists() and any(root.iterdir()):  # what an earlier tree had more of would stay, under the same numbers
        raise UserError(f"{root} is not empty; name another folder, or remove it")
    counts = {"train": train} | dict.fromkeys(SPLITS, val)
    groups: dict[str, list[Scene]] = {split: [] for split in counts}
    splits = [split for split, n in counts.items() for _ in range(n)]
    for scene_id, split in enumerate(tqdm(splits, desc="scenes", mininterval=1, delay=2), start=1):
        groups[split].append(draw_scene(scene_id, seed=seed, size=size, simple=simple))
    dataset = root / "dataset"
    write_referring(dataset / "refer_seg", groups, seed)
    write_semantic(dataset, groups["train"])
    write_parts(dataset, groups["train"])
    write_reasoning(dataset / "reason_seg/ReasonSeg", groups, seed)
    write_conversations(dataset, groups["train"], seed)
    write_vqa(root / "data", groups["train"], groups["val"], seed)
    return root
