"""Make a synthetic dataset tree in the real formats: coloured shapes on photo-like backgrounds.

For the quickstart and tests: everything that reads COCO, RefCOCO, ReasonSeg, ADE20K, VQAv2 ... reads this.

    self1e make-shapes runs/shapes                        # 2,000 + 300 scenes, 120 MB, 25 s
    self1e make-shapes runs/few --train 8 --val 3         # for a look, 1 s
    self1e make-shapes runs/shapes --benchmark            # scenes of eight difficulties (self1e.synthetic.benchmark)

OUTPUT/dataset holds the segmentation and conversation sets, OUTPUT/data the VQA sets (README, "Datasets"). A scene is
one photo with two to four shapes, no two alike in colour and kind, which may overlap: an annotation is what is
visible. There are `--train` scenes for training and three groups of `--val` held-out scenes (val, testA or test,
testB); no held-out photo is in a training set. Same options, same bytes (numpy Generators, one a scene).

What the semantic sets call the shapes (index in the set's class list):
    ade20k     by kind:   circle ball 119, square box 41, triangle tent 114, star light 82, cross signboard 43,
                          ring basket 112, background wall 0; outlines are `other`
    cocostuff  by colour: red apple 52, green broccoli 55, blue sea 154, yellow banana 51, purple flower 118,
                          orange orange 54, background wall-other 172; outlines are 255
    mapillary  by colour: "Red Paint" ..., in the order of COLOURS, then "Wall"
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from self1e.synthetic.benchmark import make_benchmark
from self1e.synthetic.conversations import write_conversations
from self1e.synthetic.reasoning import write_reasoning
from self1e.synthetic.referring import write_referring
from self1e.synthetic.scenes import Scene, draw_scene
from self1e.synthetic.semantic import write_parts, write_semantic
from self1e.synthetic.vqa import write_vqa

SPLITS = ("val", "testA", "testB")  # one group of held-out scenes each


def make_shapes_dataset(
    path: str | Path,
    *,
    train: int = 2000,
    val: int = 100,
    size: int = 224,
    simple: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write the tree below `path` and return it: `train` training scenes, three times `val` held-out scenes.

    `size`: pixels of a photo's longer side. `simple`: scenes whose colours tell the shapes apart, and one expression
    a shape, colour and kind: what a model of a million parameters learns in minutes. Raises ValueError when there are
    too few scenes or pixels.
    """
    if train < 2 or val < 2:
        raise ValueError(f"--train {train} --val {val}: every set needs two scenes at least")
    if size < 48:
        raise ValueError(f"--size {size}: shapes of a few pixels cannot be told apart, use 48 or more")
    root = Path(path)
    counts = {"train": train} | dict.fromkeys(SPLITS, val)
    groups: dict[str, list[Scene]] = {split: [] for split in counts}
    splits = [split for split, n in counts.items() for _ in range(n)]
    for scene_id, split in enumerate(tqdm(splits, desc="scenes", mininterval=1, disable=not progress), start=1):
        groups[split].append(draw_scene(scene_id, seed=seed, size=size, simple=simple))
    dataset = root / "dataset"
    write_referring(dataset / "refer_seg", groups, seed)
    write_semantic(dataset, groups["train"])
    write_parts(dataset, groups["train"])
    write_reasoning(dataset / "reason_seg/ReasonSeg", groups, seed)
    write_conversations(dataset, groups["train"], seed)
    write_vqa(root / "data", groups["train"], groups["val"], seed)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="self1e make-shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="OUTPUT", help="folder that will hold dataset/ and data/")
    parser.add_argument("--train", type=int, default=2000, help="training scenes")
    parser.add_argument("--val", type=int, default=100, help="scenes in each of the three held-out groups")
    parser.add_argument("--size", type=int, default=224, help="pixels of a photo's longer side")
    parser.add_argument("--simple", action="store_true", help="three colours a scene, one expression a shape")
    parser.add_argument("--benchmark", action="store_true", help="only OUTPUT/benchmark, --val scenes per family")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sizes = {"train": args.train, "val": args.val, "size": args.size, "seed": args.seed}
    if args.benchmark and args.simple:
        parser.error("--simple and --benchmark are two kinds of scenes: give one of them")
    try:
        if args.benchmark:
            print(make_benchmark(Path(args.path) / "benchmark", **sizes, progress=True))
        else:
            print(make_shapes_dataset(args.path, **sizes, simple=args.simple, progress=True))
    except ValueError as error:
        parser.error(str(error))
    return 0
