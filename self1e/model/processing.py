"""From photos and conversations to a padded batch: tiles, token ids, labels. The only place that pads.

Text follows the published chat format to the token; the system sentence's grammar is part of the trained weights.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF
from transformers import BatchFeature, ProcessorMixin, Qwen2Tokenizer
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from self1e.model.config import Self1EConfig
from self1e.model.layout import IGNORE_INDEX, PackedMasks, read_layout
from self1e.model.photos import as_rgb, resize_bicubic
from self1e.model.prompts import (
    END_OF_TURN,
    IMAGE_TAG,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    SEG,
    SEGT,
    START_OF_TURN,
    SYSTEM,
)

HIGH_RES_TILES = 4  # tiles that `--high_res` cuts a photo into, at most
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
CHAT_TEMPLATE = (
    f"{{{{ '{START_OF_TURN}system\n{SYSTEM}{END_OF_TURN}\n' }}}}"
    f"{{% for m in messages %}}{{{{ '{START_OF_TURN}' + m['role'] + '\n' }}}}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    f"{{{{ '{IMAGE_TAG}\n' if part['type'] == 'image' else part['text'] }}}}{{% endfor %}}{{% endif %}}"
    f"{{{{ '{END_OF_TURN}\n' }}}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{ '{START_OF_TURN}assistant\n' }}}}{{% endif %}}"
)


class RowTooLong(ValueError):
    """A row whose image tokens or `[SEG]` do not fit the length limit."""


def cut_tiles(
    image: Image.Image, size: int, *, max_tiles: int = 1, thumbnail: bool = False
) -> tuple[Tensor, tuple[int, int]]:
    """Resize (stretch) a photo to a grid of square tiles and normalise them.

    Args:
        image: any mode; its EXIF orientation is applied.
        size: pixels per side of a tile.
        max_tiles: the grid nearest the photo's aspect ratio with at most this many tiles wins (InternVL's rule).
        thumbnail: append the whole photo as one more tile when there are several (VQA evaluation).

    Returns:
        float32 (tiles, 3, size, size), row-major, and the grid as (rows, cols); with a thumbnail, which has no place
        in a grid, (tiles, 1).
    """
    image = as_rgb(image)
    cols, rows = get_optimal_tiled_canvas((image.height, image.width), (size, size), 1, max_tiles)
    canvas = resize_bicubic(image, cols * size, rows * size)
    boxes = [(x * size, y * size, (x + 1) * size, (y + 1) * size) for y in range(rows) for x in range(cols)]
    tiles, grid = [canvas.crop(box) for box in boxes], (rows, cols)
    if thumbnail and len(tiles) > 1:
        tiles.append(resize_bicubic(image, size, size))
        grid = (len(tiles), 1)
    return torch.stack([TF.normalize(TF.to_tensor(tile), MEAN, STD) for tile in tiles]), grid


class Self1EProcessor(ProcessorMixin):
    """Tokenizer plus tiling; see `__call__`.

    Args:
        tokenizer: a Qwen2 tokenizer with InternVL's image tokens; `[SEG]` then `[SEGT]` are added where missing.
        image_size: pixels per side of a tile.
        tile_tokens: image tokens per tile.
    """

    def __init__(self, tokenizer=None, image_size: int = 448, tile_tokens: int = 256, chat_template=None, **kwargs):
        absent = [token for token in (IMG_START, IMG_CONTEXT, IMG_END) if token not in tokenizer.get_vocab()]
        if absent:
            raise ValueError(f"{tokenizer.name_or_path}: the tokenizer lacks {absent}; expected InternVL3's tokenizer")
        tokenizer.add_tokens([SEG, SEGT], special_tokens=True)  # or makes those special that are there
        super().__init__(tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)
        self.image_size, self.tile_tokens = image_size, tile_tokens
        self.seg_token_id, self.segt_token_id, self.image_token_id = (
            tokenizer.convert_tokens_to_ids(token) for token in (SEG, SEGT, IMG_CONTEXT)
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Read the processor of any checkpoint layout that has a tokenizer; `[SEG]` is added to a base's.

        Raises FileNotFoundError without a checkpoint, ValueError without a tokenizer of InternVL3's there.
        """
        own = Path(pretrained_model_name_or_path, "processor_config.json")
        try:
            sizes = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
            known = all(isinstance(sizes[name], int) for name in ("image_size", "tile_tokens") if name in sizes)
            assert isinstance(sizes, dict) and known
        except (ValueError, TypeError, RecursionError, AssertionError) as error:
            raise ValueError(f"{own}: damaged; expected image_size and tile_tokens as numbers") from error
        if "tile_tokens" not in sizes:  # not written by `save_pretrained` below
            config = Self1EConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
            sizes = {"image_size": config.tile_size, "tile_tokens": config.tile_tokens}
        try:
            tokenizer = Qwen2Tokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError:
            raise
        except Exception as error:  # of a damaged file, the library of tokenizers raises nothing more special
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{pretrained_model_name_or_path}: its tokenizer is damaged ({reason})") from error
        if tokenizer.vocab_size < 256:  # bytes alone are 256: the library makes an empty one where files are absent
            raise ValueError(
                f"{pretrained_model_name_or_path}: no tokenizer there; a published SELF1E folder goes to "
                "--model_weights, with the InternVL3 it was trained from as --version"
            )
        return cls(tokenizer, image_size=sizes["image_size"], tile_tokens=sizes["tile_tokens"])

    def __call__(
        self,
        images: Sequence[Image.Image],
        conversations: Sequence[Sequence[Sequence[str]]],
        mask_targets: Sequence | None = None,
        *,
        padding_side: str = "right",
        max_tiles: int = 1,
        thumbnail: bool = False,
        max_length: int | None = None,
    ) -> BatchFeature:
        """Make a batch.

        Args:
            images: one photo an entry.
            conversations: per photo its rows; a row is user, assistant, user, ... and its first turn holds `<image>`.
                A row that ends with a user turn is left open for the assistant (generation).
            mask_targets: per photo None, uint8 (rows, H, W), or a list with uint8 (n_seg, H, W) or None per row.
            padding_side: "right" (training, masks) or "left" (generation).
            max_tiles, thumbnail: see `cut_tiles`.
            max_length: longer rows are cut at their end.

        Returns:
            `input_ids`, `attention_mask` and `labels` (rows, N), `pixel_values` (tiles, 3, size, size), `tile_grids`
            (images, 2), `row_image` (rows,), and with targets `mask_targets`, one entry per row.

        Raises:
            RowTooLong: `max_length` would cut image tokens or a `[SEG]`.
            ValueError: a row without `<image>`, or masks that do not match its `[SEG]` tokens.
        """
        targets = [None] * len(images) if mask_targets is None else mask_targets
        if not len(images) == len(conversations) == len(targets):
            raise ValueError("images, conversations and mask_targets must have one entry per photo")
        options: dict[str, Any] = {"max_tiles": max_tiles, "thumbnail": thumbnail, "max_length": max_length}
        encoded = [self.encode(*entry, **options) for entry in zip(images, conversations, targets)]
        batch = self.collate(encoded, padding_side=padding_side)
        del batch["layout"]  # ids may be changed by hand now; the model reads the batch itself
        if "mask_targets" in batch:
            batch["mask_targets"] = list(batch["mask_targets"])
        return batch

    def encode(
        self, image, rows, targets=None, *, max_tiles: int = 1, thumbnail: bool = False, max_length: int | None = None
    ) -> dict:
        """One photo and its rows, ready for `collate`; what data workers do. Arguments as in `__call__`."""
        tiles, grid = cut_tiles(image, self.image_size, max_tiles=max_tiles, thumbnail=thumbnail)
        texts = [self.encode_row(row, len(tiles), max_length) for row in rows]
        targets = [None] * len(rows) if targets is None else [as_masks(target) for target in targets]
        if len(targets) != len(rows):
            raise ValueError(f"{len(rows)} rows but masks for {len(targets)} of them; the first row: {rows[0]}")
        for row, (ids, _), target in zip(rows, texts, targets):
            n_seg = ids.count(self.seg_token_id)
            if target is not None and len(target) != n_seg:
                raise ValueError(f"{n_seg} [SEG] but {len(target)} masks in the row {row}")
        return {"pixel_values": tiles, "tile_grid": grid, "texts": texts, "mask_targets": targets}

    def encode_row(
        self, conversation: Sequence[str], n_tiles: int, max_length: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of one conversation; labels cover each assistant text and its `<|im_end|>`."""
        if not conversation or IMAGE_TAG not in conversation[0]:
            raise ValueError(f"the first turn of a row must hold {IMAGE_TAG}: {list(conversation)}")
        picture = IMG_START + IMG_CONTEXT * (self.tile_tokens * n_tiles) + IMG_END
        turns = [conversation[0].replace(IMAGE_TAG, picture, 1), *conversation[1:]]
        ids, labels = self.encode_message("system", SYSTEM)
        for index, text in enumerate(turns):
            more_ids, more_labels = self.encode_message("assistant" if index % 2 else "user", text)
            ids, labels = ids + more_ids, labels + more_labels
        if len(turns) % 2:
            opening = self.tokenizer.encode(f"{START_OF_TURN}assistant\n", add_special_tokens=False)
            ids, labels = ids + opening, labels + [IGNORE_INDEX] * len(opening)
        if ids.count(self.image_token_id) != self.tile_tokens * n_tiles:
            culprit = next(text for text in conversation if IMG_CONTEXT in text)
            raise ValueError(f"the text itself holds the reserved token {IMG_CONTEXT}: {culprit!r}")
        if max_length is not None and len(ids) > max_length:
            precious = {IMG_CONTEXT: self.image_token_id, SEG: self.seg_token_id}
            lost = [name for name, token in precious.items() if token in ids[max_length:]]
            if lost:
                raise RowTooLong(
                    f"a row of {len(ids)} tokens does not fit --model_max_length {max_length}: {lost[0]} would be cut"
                )
            ids, labels = ids[:max_length], labels[:max_length]
        return ids, labels

    def encode_message(self, role: str, text: str) -> tuple[list[int], list[int]]:
        """Ids and labels of one message, with its role header and closing newline."""
        header = f"{START_OF_TURN}{role}\n"
        encoded = self.tokenizer(
            f"{header}{text}{END_OF_TURN}\n", add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, labels = encoded["input_ids"], [IGNORE_INDEX] * len(encoded["input_ids"])
        if role == "assistant":
            first = next(i for i, (start, _) in enumerate(encoded["offset_mapping"]) if start >= len(header))
            labels[first:-1] = ids[first:-1]  # the last token is the newline after <|im_end|>
        return ids, labels

    def collate(self, encoded: Sequence[dict], *, padding_side: str = "right") -> BatchFeature:
        """Pad rows of several `encode` results to one batch; see `__call__`.

        Besides, for training on a GPU: `layout`, what the model would otherwise read back from these very tensors, and
        the masks of all rows in one tensor (`PackedMasks`).
        """
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r}; expected left or right")
        texts = [text for entry in encoded for text in entry["texts"]]
        length = max(len(ids) for ids, _ in texts)

        def pad(rows, value):
            filler = [[value] * (length - len(row)) for row in rows]
            pairs = zip(rows, filler) if padding_side == "right" else zip(filler, rows)
            return torch.tensor([[*first, *second] for first, second in pairs])

        grids = [entry["tile_grid"] for entry in encoded]
        row_image = [i for i, entry in enumerate(encoded) for _ in entry["texts"]]
        batch = {
            "input_ids": pad([ids for ids, _ in texts], self.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(ids) for ids, _ in texts], 0),
            "labels": pad([labels for _, labels in texts], IGNORE_INDEX),
            "pixel_values": torch.cat([entry["pixel_values"] for entry in encoded]),
            "tile_grids": torch.tensor(grids),
            "row_image": torch.tensor(row_image),
        }
        batch["layout"] = read_layout(
            batch["input_ids"],
            batch["attention_mask"],
            batch["labels"],
            grids=grids,
            row_image=row_image,
            tile_tokens=self.tile_tokens,
            image_token_id=self.image_token_id,
            seg_token_id=self.seg_token_id,
            whole=padding_side == "left",
        )
        targets = [target for entry in encoded for target in entry["mask_targets"]]
        if any(target is not None for target in targets):
            batch["mask_targets"] = PackedMasks(targets)
        return BatchFeature(batch)


def as_masks(target) -> Tensor | None:
    """uint8 (H, W) or (n_seg, H, W), array or tensor -> uint8 tensor (n_seg, H, W)."""
    if target is None:
        return None
    target = torch.as_tensor(np.ascontiguousarray(target) if isinstance(target, np.ndarray) else target)
    return target[None] if target.ndim == 2 else target
