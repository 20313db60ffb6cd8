"""Draw held-out scenes of the quickstart: photo, ground truth, prediction; from bad to good, evenly spaced by IoU.

Command:  python scripts/quickstart_picture.py --model FOLDER --dataset_dir FOLDER --split "refcoco|unc|testA" \
          --output FILE.png
Cost:     seconds on a CPU. Expected: a sheet of 8 panels; the IoU stands in each.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.data.splits import load_split
from self1e.visualize import compare, grid

PANELS, COLUMNS = 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--split", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    processor = Self1EProcessor.from_pretrained(args.model)
    model = Self1EForSegmentation.from_pretrained(args.model, dtype=torch.float32)
    found = []
    for scene in load_split(args.split, args.dataset_dir):
        image, targets = scene.load()
        sentences = [sentence.strip().lower() for sentence in scene.sentences]
        for target, result in zip(targets, model.segment(processor, image, sentences)):
            union = (result.mask | (target == 1)).sum()
            iou = float((result.mask & (target == 1)).sum() / union) if union else 1.0
            found.append((iou, image, target, result))
    found.sort(key=lambda entry: entry[0])
    chosen = [found[round(place)] for place in np.linspace(0, len(found) - 1, PANELS)]
    panels = []
    for iou, image, target, result in chosen:
        panels.append(compare(image.resize(target.shape[::-1]), target, result.mask, result.prompt, iou))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    grid(panels, COLUMNS).save(args.output)


if __name__ == "__main__":
    main()
