"""Masks by an exported model, without PyTorch: numpy, pillow, tokenizers and onnxruntime are enough.

self1e export runs/NAME/ckpt_model exported --to onnx
python examples/run_onnx.py exported photo.jpg "the red car" "Which of these can fly?"    # mask_0.png, mask_1.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

folder, prompts = Path(sys.argv[1]), sys.argv[3:]
facts = json.loads((folder / "export.json").read_text(encoding="utf-8"))
photo, size, ids = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB"), facts["tile_size"], facts["ids"]
shape, area = photo.width / photo.height, photo.width * photo.height / size**2
rows, cols = min(  # the nearest shape; of the same shapes the largest that the photo fills to more than half
    facts["grids"], key=lambda grid: (abs(shape - grid[1] / grid[0]), -np.prod(grid) * (area > np.prod(grid) / 2))
)
pixels = np.asarray(photo.resize((cols * size, rows * size), Image.Resampling.BICUBIC), np.float32) / 255
pixels = (pixels - np.float32(facts["mean"])) / np.float32(facts["std"])
tiles = pixels.reshape(rows, size, cols, size, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, size, size)

tokenizer, token = Tokenizer.from_file(str(folder / "tokenizer.json")), "<IMG_CONTEXT>"
tokenizer.enable_padding(pad_id=ids["<|endoftext|>"], pad_token="<|endoftext|>")
chats = [facts["prompts"]["sentence" if prompt[-1] in ".?!" else "phrase"] for prompt in prompts]
texts = [
    chat.replace(token, token * facts["tile_tokens"] * rows * cols).replace("{}", prompt)
    for chat, prompt in zip(chats, prompts)
]
found = np.array([text.ids for text in tokenizer.encode_batch(texts, add_special_tokens=False)])
positions = np.nonzero(found == ids[token])[1].reshape(len(found), -1)
inputs = {"pixel_values": tiles, "input_ids": found, "image_positions": positions}
session = onnxruntime.InferenceSession(folder / f"grid_{rows}x{cols}.onnx")
masks = session.run(None, inputs | {"seg_positions": np.argwhere(found == ids["[SEG]"])})[0]
for number, logits in enumerate(masks):
    Image.fromarray(np.asarray(Image.fromarray(logits).resize(photo.size, Image.Resampling.BILINEAR)) > 0).save(
        f"mask_{number}.png"
    )
