"""A conversation about one photo; the model answers, and what it marks with `[SEG]` becomes a mask.

    python examples/chat.py --version V photo.jpg "Please segment the red car." "And the one behind it?"

Each question goes on from the answer before. Prints the answers; masks go to `turn<n>_<m>.png` in `--output`.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from self1e import Self1EForSegmentation, Self1EProcessor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--version", required=True, help="trained model, folder or hub id")
parser.add_argument("photo")
parser.add_argument("questions", nargs="+")
parser.add_argument("--output", type=Path, default=Path("chat"))
parser.add_argument("--max_new_tokens", type=int, default=128)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
processor = Self1EProcessor.from_pretrained(args.version)
model = Self1EForSegmentation.from_pretrained(args.version, dtype=torch.float32).to(device)
photo = Image.open(args.photo)
args.output.mkdir(parents=True, exist_ok=True)

messages = []
for turn, question in enumerate(args.questions):
    messages.append({"role": "user", "content": question})
    reply = model.chat(processor, photo, messages, max_new_tokens=args.max_new_tokens)
    messages.append({"role": "assistant", "content": reply.text})
    print(f"> {question}\n{reply.text}")
    for number, mask in enumerate(reply.masks):  # as many as [SEG] in the answer
        Image.fromarray(mask).save(args.output / f"turn{turn}_{number}.png")
