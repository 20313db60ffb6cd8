"""Masks of one photo from Python.

    python examples/segment.py --version V photo.jpg "the red car" "Which of these can fly?"

Prints a line per prompt and writes `overlay.jpg`, every mask in its own colour.
"""

import argparse

import numpy as np
import torch
from PIL import Image, ImageOps

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.visualize import overlay

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--version", required=True, help="trained model, folder or hub id")
parser.add_argument("photo")
parser.add_argument("prompts", nargs="+")
parser.add_argument("--output", default="overlay.jpg")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
processor = Self1EProcessor.from_pretrained(args.version)
model = Self1EForSegmentation.from_pretrained(args.version, dtype=torch.float32).to(device)

photo = ImageOps.exif_transpose(Image.open(args.photo))
results = model.segment(processor, photo, args.prompts)  # the photo is encoded once for all prompts
for result in results:
    score = "empty mask" if result.score is None else f"score {result.score:.2f}"
    print(f"{result.prompt}: {result.mask.mean():.1%} of the photo, {score}")
overlay(photo, np.stack([result.mask for result in results])).save(args.output)
