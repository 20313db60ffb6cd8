"""Masks without PyTorch: a trained model as ONNX graphs, compared with PyTorch through onnxruntime.

    self1e export runs/NAME/ckpt_model exported --to onnx               # photos as one tile
    self1e export runs/NAME/ckpt_model exported --to onnx --high_res    # a graph per grid of up to four tiles

DST receives `grid_ROWSxCOLUMNS.onnx`, `weights.bin` for all of them, `tokenizer.json`, and `export.json` with grids,
prompts and ids; `examples/run_onnx.py` reads all four. A graph answers R conversations about a photo of T tiles:

    pixel_values     (T, 3, size, size) float32   tiles, row by row, normalised by `export.json`'s mean and std
    input_ids        (R, N) int64                 padded at their ends
    image_positions  (R, T * tile_tokens) int64   of the image tokens in each conversation
    seg_positions    (m, 2) int64                 of each `[SEG]`: its conversation, and its place there
    -> mask_logits   (m, h, w) float32            stretch them to the photo bilinearly; foreground is above 0

A graph takes half a minute, and three times the weights in memory. `--precision bf16` halves the files; sums stay in
fp32, since onnxruntime has no bf16 convolution for CPUs.
"""

import argparse
import hashlib
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from self1e.apps.loading import load
from self1e.errors import UserError
from self1e.evaluation.results import checkpoint_folder
from self1e.files import replacing, write_json
from self1e.flags import Help
from self1e.model.attention import perception_mask
from self1e.model.grids import stitch_tiles
from self1e.model.modeling import without_dynamic_rope
from self1e.model.processor import HIGH_RES_TILES, MEAN, STD
from self1e.model.prompts import ANSWER, IMAGE_TAG, IMG_CONTEXT, IMG_END, IMG_START, PADDING, SEG, evaluation_prompt

TOLERANCE = 1e-4  # of mask logits; relative to the largest where that is above 1


class MaskGraph(nn.Module):
    """What is exported: the model's parts, joined for one photo with a fixed grid (rows, columns) of tiles."""

    def __init__(self, model, grid: tuple[int, int]):
        super().__init__()
        self.model, self.grid = model, grid

    def forward(self, pixel_values: Tensor, input_ids: Tensor, image_positions: Tensor, seg_positions: Tensor):
        model, config, head, count = self.model, self.model.config, self.model.segmentation_head, input_ids.shape[0]
        image, (row, seg) = (torch.arange(count)[:, None], image_positions), seg_positions.unbind(1)
        photo = model.encode_images(pixel_values, [self.grid])
        embeds = model.get_input_embeddings()(input_ids)
        embeds = embeds.index_put(image, photo.v1.flatten(0, 2).expand(count, -1, -1))
        options = {"embeds": embeds, "padding_mask": None}  # padding comes last, unseen
        mask = perception_mask(config.attention_pathway, config, input_ids, **options)
        masks = dict.fromkeys(config.text_config.layer_types, mask)
        states = model.model.language_model(inputs_embeds=embeds, attention_mask=masks, use_cache=False)[0]  # R N C
        img = rearrange(states[image], "r (t h w) c -> (r t) h w c", h=config.tile_side, w=config.tile_side)
        *sides, query = head.project(photo.v1, photo.vhq, img, states[row, seg - 1])
        features = head.features(*(stitch_tiles(side, self.grid) for side in sides)).expand(count, -1, -1, -1)
        logits = features[row].flatten(1, 2) @ query[..., None] * head.scale
        return logits.view(-1, *features.shape[1:3])


class Widened(nn.Module):
    """A module that computes in fp32, whatever the precision of its weights."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return functional_call(self.module, {k: v.float() for k, v in self.module.named_parameters()}, (), inputs)


def inputs_of(batch, processor) -> dict[str, Tensor]:
    """A graph's inputs, from a batch of the processor with one photo."""
    ids = batch["input_ids"]
    image = (ids == processor.image_token_id).nonzero()[:, 1].view(len(ids), -1)
    positions = {"image_positions": image, "seg_positions": (ids == processor.seg_token_id).nonzero()}
    return {"pixel_values": batch["pixel_values"], "input_ids": ids, **positions}


@torch.no_grad()
def write_graph(model, processor, grid: tuple[int, int], folder: Path) -> tuple[float, float]:
    """Write the graph of a grid; the first of a folder brings `weights.bin`, the others refer to it.

    Returns its largest difference from the model, and the model's largest logit.
    """
    import onnx_ir as ir  # an optional package, as onnxruntime
    import onnxruntime
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    noise = Image.effect_noise((grid[1] * processor.image_size, grid[0] * processor.image_size), 100)
    texts = [[f"{IMAGE_TAG}\n{text}", ANSWER] for text in ("the car", "What is it?", "Which of them can fly?")]
    batch = processor([noise], [texts], max_tiles=grid[0] * grid[1])
    inputs = inputs_of(batch, processor)
    sizes: Any = {"pixel_values": None, "input_ids": {0: "conversations", 1: "tokens"}}
    sizes |= {"image_positions": {0: "conversations"}, "seg_positions": {0: "masks"}}
    with without_dynamic_rope(model.model.language_model.rotary_emb, 0), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about the library's code
        program: Any = torch.onnx.export(
            Widened(MaskGraph(model, grid)), kwargs=inputs, dynamic_shapes={"inputs": sizes}, dynamo=True,
            input_names=[*inputs], output_names=["mask_logits"], verbose=False,
        )  # fmt: skip
    onnx = ClearMetadataAndDocStringPass()(program.model).model
    path, first = folder / "grid_{}x{}.onnx".format(*grid), next(folder.glob("*.onnx"), None)
    if first:  # by content: the exporter transposes some weights and names them anew

        def content(x) -> tuple:
            return x.dtype, tuple(x.shape), hashlib.blake2b(x.const_value.tobytes()).digest()

        known = {content(x): x.const_value for x in ir.load(first).graph.initializers.values()}
        for x in onnx.graph.initializers.values():
            x.const_value = known.get(content(x), x.const_value)
    ir.save(onnx, path, external_data=None if first else "weights.bin")

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    batch["labels"] = None  # no loss
    expected = torch.cat(Widened(model)(**batch).mask_logits).numpy()
    return float(np.abs(found - expected).max()), float(np.abs(expected).max())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="self1e export", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("version", metavar="MODEL", type=checkpoint_folder, help="model folder, run folder or hub id")
    add("target", metavar="DST", type=Path, help="folder that does not exist yet")
    add("--to", choices=("onnx",), required=True)
    add("--model_weights", metavar="W", type=checkpoint_folder, help="trained weights over MODEL")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights in the files; sums stay in fp32")
    add("--high_res", action="store_true", help=f"a graph per grid of up to {HIGH_RES_TILES} tiles")
    parser.set_defaults(device="cpu", quantize=None)
    args = parser.parse_args(argv)
    if torch.__version__ < "2.14" or not (find_spec("onnxruntime") and find_spec("onnxscript")):
        raise UserError("export needs torch 2.14 or later, onnxruntime and onnxscript: pip install -e '.[export]'")
    if args.target.exists():
        raise UserError(f"{args.target} exists; choose another folder or remove it")
    model, processor = load(args)
    limit = HIGH_RES_TILES if args.high_res else 1
    grids = [(rows, columns) for rows in range(1, limit + 1) for columns in range(1, limit // rows + 1)]
    with replacing(args.target, folder=True) as folder:
        for grid in grids:
            difference, largest = write_graph(model, processor, grid, folder)
            print(f"{grid[0]} x {grid[1]} tiles: logits up to {largest:.0f}, within {difference:.0e} of PyTorch's")
            if not difference <= TOLERANCE * max(1, largest):
                raise RuntimeError("the graph and PyTorch differ")
        processor.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "export.json", facts(processor, grids))
    print(f"written: {args.target}")
    return 0


def facts(processor, grids: list[tuple[int, int]]) -> dict:
    """What a program needs to know besides the graphs; `{}` in a prompt stands for what is asked for."""
    chat = [{"role": "user", "content": "{}"}, {"role": "assistant", "content": ANSWER}]
    text, picture = processor.apply_chat_template(chat, tokenize=False), IMG_START + IMG_CONTEXT + IMG_END
    asked = {kind: evaluation_prompt("{}", kind == "sentence", lower=False) for kind in ("phrase", "sentence")}
    prompts = {kind: text.replace("{}", question).replace(IMAGE_TAG, picture) for kind, question in asked.items()}
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in (IMG_CONTEXT, SEG, PADDING)}
    sizes = {"tile_size": processor.image_size, "tile_tokens": processor.tile_tokens, "mean": MEAN, "std": STD}
    return {"grids": grids, **sizes, "ids": ids, "prompts": prompts}
