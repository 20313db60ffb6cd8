"""A folder that `self1e segment` or `self1e chat` wrote, as a COCO data set or as tasks for Label Studio.

    self1e export out/ --to coco            # out/coco.json: annotations with the masks, a category per prompt
    self1e export out/ --to label-studio    # out/label_studio.json: tasks with brush masks as predictions
    self1e export out/ --to label-studio --image_root https://host/photos/

`COCO("out/coco.json").loadRes("out/predictions.json")` compares other predictions with these; annotation tools (CVAT,
FiftyOne, Roboflow) import the file as it is. Label Studio imports the tasks into a project with the labelling
configuration that is printed. It serves pictures by URL: `--image_root` is put in front of their file names; the
default is its local storage, `/data/local-files/?d=`.

Cost: seconds per thousand masks; no model is loaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from self1e.files import read_json, write_json
from self1e.flags import Parser, check_writable_file, counted

FIELDS = ("image_id", "category_id", "image", "width", "height", "prompt", "segmentation", "bbox", "area", "score")


def read_predictions(folder: Path) -> list[dict]:
    """The records of a folder. Raises ValueError naming the file and the record that is none, OSError without one."""
    path = folder / "predictions.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no predictions.json; expected the --output of self1e segment or chat")
    records = read_json(path, list, remedy="write it with self1e segment")
    for number, record in enumerate(records):
        absent = [name for name in FIELDS if not isinstance(record, dict) or name not in record]
        if absent:
            raise ValueError(f"{path}, entry {number}: {', '.join(absent)} is missing; write it with self1e segment")
    return records


def to_coco(records: list[dict]) -> dict:
    """COCO's data set format: images, a category for each prompt, an annotation for each mask that is not empty."""
    images = {
        r["image_id"]: {name: r[name] for name in ("width", "height")} | {"file_name": r["image"]} for r in records
    }
    prompts = {record["category_id"]: record["prompt"] for record in records}
    shown = [record for record in records if record["area"]]
    kept = ("image_id", "category_id", "segmentation", "bbox", "area", "score")
    return {
        "info": {"description": "masks of self1e segment"},
        "images": [{"id": id, **image} for id, image in images.items()],
        "categories": [{"id": id, "name": prompt} for id, prompt in prompts.items()],
        "annotations": [
            {"id": number, "iscrowd": 0, **{name: record[name] for name in kept}}
            for number, record in enumerate(shown, 1)
        ],
    }


def brush_rle(mask: Any) -> list[int]:
    """A mask, bool (H, W), as the bytes of Label Studio's brush: the RGBA picture's run-length bit stream.

    The stream holds the number of values (32 bits), the bits per value less one (5), four run-length widths less one
    (4 each), and then blocks. A block opens with a bit that tells a run (1) from literal values (0) and two bits that
    choose the width of the length, which is stored less one; a run has one value, literal values follow each other.
    """
    import numpy as np

    widths = (3, 4, 8, 16)
    values = np.repeat(np.asarray(mask, np.uint8).ravel() * 255, 4)
    edges = np.flatnonzero(np.diff(values)) + 1
    starts, ends = np.append(0, edges), np.append(edges, values.size)
    bits = [f"{values.size:032b}", f"{8 - 1:05b}", *(f"{width - 1:04b}" for width in widths)]
    for start, end in zip(starts.tolist(), ends.tolist()):
        length, value = end - start, int(values[start])
        while length:
            part = min(length, 2 ** widths[-1])
            choice = next(index for index, width in enumerate(widths) if part <= 2**width)
            bits.append(f"1{choice:02b}{part - 1:0{widths[choice]}b}{value:08b}")
            length -= part
    stream = "".join(bits)
    stream += "0" * (-len(stream) % 8)
    return list(int(stream, 2).to_bytes(len(stream) // 8, "big"))


def to_label_studio(records: list[dict], root: str) -> list[dict]:
    """One task per picture, with its masks as one prediction."""
    from pycocotools import mask as coco

    tasks: dict[int, dict] = {}
    for record in records:
        image = {"image": root + record["image"]}
        task = tasks.setdefault(
            record["image_id"], {"data": image, "predictions": [{"model_version": "self1e", "result": []}]}
        )
        if not record["area"]:
            continue
        task["predictions"][0]["result"].append({
            "id": f"{record['image_id']}-{len(task['predictions'][0]['result'])}", "type": "brushlabels",
            "from_name": "mask", "to_name": "image", "score": record["score"], "image_rotation": 0,
            "original_width": record["width"], "original_height": record["height"],
            "value": {"format": "rle", "rle": brush_rle(coco.decode(record["segmentation"])),
                      "brushlabels": [record["prompt"]]},
        })  # fmt: skip
    return list(tasks.values())


def labelling_configuration(records: list[dict]) -> str:
    """Label Studio's labelling configuration for these prompts."""
    labels = "".join(f"<Label value={quoteattr(prompt)}/>" for prompt in dict.fromkeys(r["prompt"] for r in records))
    picture, brush = '<Image name="image" value="$image"/>', '<BrushLabels name="mask" toName="image">'
    return f"<View>{picture}{brush}{labels}</BrushLabels></View>"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="self1e export", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="--output of self1e segment or chat")
    add("--to", choices=("coco", "label-studio"), required=True)
    add("--image_root", help="Label Studio: what stands in front of a picture's path in its URL")
    add("--output", type=Path, help="default: FOLDER/coco.json or FOLDER/label_studio.json")
    args = parser.parse_args(argv)
    if args.image_root is not None and args.to == "coco":
        parser.error("--image_root does nothing with --to coco; leave it out")
    records = read_predictions(args.folder)
    target = args.output or args.folder / {"coco": "coco.json", "label-studio": "label_studio.json"}[args.to]
    check_writable_file(target)
    if args.to == "coco":
        write_json(target, to_coco(records))
    else:
        write_json(target, to_label_studio(records, args.image_root or "/data/local-files/?d="), indent=None)
        print(f"labelling configuration: {labelling_configuration(records)}")
    shown = sum(record["area"] > 0 for record in records)
    left_out = f"; {counted(len(records) - shown, 'empty one')} left out" if shown < len(records) else ""
    print(f"{counted(shown, 'mask')} in {target}{left_out}")
    return 0
