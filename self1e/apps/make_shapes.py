"""Make a synthetic dataset tree in the real formats: coloured shapes on photo-like backgrounds.

For the quickstart and tests: everything that reads COCO, RefCOCO, ReasonSeg, ADE20K, VQAv2 ... reads this.

    self1e make-shapes runs/shapes                        # 2,000 + 300 scenes, 120 MB, 25 s
    self1e make-shapes runs/few --train 8 --val 3         # for a look, 1 s
    self1e make-shapes runs/shapes --benchmark            # scenes of eight difficulties (self1e.synthetic.benchmark)

OUTPUT/dataset holds the segmentation and conversation sets, OUTPUT/data the VQA sets (docs/data.md, section Datasets).
A scene is one photo with two to four shapes, no two alike in colour and kind, which may overlap: an annotation is what
is visible. There are `--train` scenes for training and three groups of `--val` held-out scenes (val, testA or test,
testB); no held-out photo is in a training set. Same options, same bytes (numpy Generators, one per scene).

What the semantic sets call the shapes (index in the set's class list):
    ade20k     by kind:   circle ball 119, square box 41, triangle tent 114, star light 82, cross signboard 43,
                          ring basket 112, background wall 0; outlines are `other`
    cocostuff  by colour: red apple 52, green broccoli 55, blue sea 154, yellow banana 51, purple flower 118,
                          orange orange 54, background wall-other 172; outlines are 255
    mapillary  by colour: "Red Paint" ..., in the order of COLOURS, then "Wall"
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from self1e.flags import Parser, check_writable, whole


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="self1e make-shapes", description=__doc__)
    add = parser.add_argument
    add("path", type=Path, metavar="OUTPUT", help="folder that will hold dataset/ and data/")
    add("--train", type=whole(1), default=2000, help="training scenes")
    add("--val", type=whole(1), default=100, help="scenes in each of the three held-out groups")
    add("--size", type=whole(48, 4096), default=224, help="pixels of a photo's longer side")
    add("--simple", action="store_true", help="three colours per scene, one expression per shape")
    add("--benchmark", action="store_true", help="only OUTPUT/benchmark, --val scenes per family")
    add("--seed", type=whole(0), default=0)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    sizes = {"train": args.train, "val": args.val, "size": args.size, "seed": args.seed}
    if args.benchmark and args.simple:
        parser.error("--simple and --benchmark are two kinds of scenes: give one of them")
    check_writable(args.path)
    try:
        if args.benchmark:
            from self1e.synthetic.benchmark import make_benchmark

            print(f"scenes are in {make_benchmark(args.path / 'benchmark', **sizes, progress=True)}")
        else:
            from self1e.synthetic.shapes_dataset import make_shapes_dataset

            root = make_shapes_dataset(args.path, **sizes, simple=args.simple, progress=True)
            print(f"--dataset_dir {root / 'dataset'} --data_dir {root / 'data'} name the tree to other programs")
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {args.path} is not complete, make it anew") from None
    return 0
