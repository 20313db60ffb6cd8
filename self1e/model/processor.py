"""From images and conversations to a padded batch: tiles, token ids, labels. The only place that pads.

Text follows the published chat format to the token; the system sentence's grammar is part of the trained weights.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms import functional as TF
from transformers import BatchFeature, ProcessorMixin, Qwen2Tokenizer
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from self1e.errors import UserError, check_known
from self1e.model.batch import IGNORE_INDEX, pack
from self1e.model.config import Self1EConfig
from self1e.model.photos import photo_of, resize_bicubic
from self1e.model.prompts import CHAT_TEMPLATE, IMAGE_TAG, IMG_CONTEXT, IMG_END, IMG_START, SEG, SEGT, chat_text

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
HIGH_RES_TILES = 4  # tiles that `--high_res` cuts an image into, at most
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet


def cut_tiles(
    image: Image.Image, size: int, *, max_tiles: int = 1, thumbnail: bool = False
) -> tuple[Tensor, tuple[int, int]]:
    """Resize (stretch) an image of any mode to a grid of square tiles, `size` pixels a side, and normalise them.

    max_tiles: the grid nearest the image's aspect ratio with at most this many tiles wins (InternVL's rule).
    thumbnail: append the whole image as one more tile when there are several (VQA evaluation).

    Returns float32 (tiles, 3, size, size), row-major, and the grid as (rows, cols); with a thumbnail, which has no
    place in a grid, (tiles, 1).
    """
    image = photo_of(image)
    cols, rows = get_optimal_tiled_canvas((image.height, image.width), (size, size), 1, max_tiles)
    canvas = resize_bicubic(image, cols * size, rows * size)
    boxes = [(x * size, y * size, (x + 1) * size, (y + 1) * size) for y in range(rows) for x in range(cols)]
    tiles, grid = [canvas.crop(box) for box in boxes], (rows, cols)
    if thumbnail and len(tiles) > 1:
        tiles.append(resize_bicubic(image, size, size))
        grid = (len(tiles), 1)
    return torch.stack([TF.normalize(TF.to_tensor(tile), MEAN, STD) for tile in tiles]), grid


class Self1EProcessor(ProcessorMixin):
    """A Qwen2 tokenizer with InternVL's image tokens and ours, plus tiling; see `__call__`.

    image_size: pixels per side of a tile. tile_tokens: image tokens per tile.
    """

    def __init__(self, tokenizer=None, image_size: int = 448, tile_tokens: int = 256, chat_template=None, **kwargs):
        absent = [token for token in (IMG_START, IMG_CONTEXT, IMG_END) if token not in tokenizer.get_vocab()]
        if absent:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer lacks {absent}; expected InternVL3's tokenizer")
        tokenizer.add_tokens([SEG, SEGT], special_tokens=True)  # or makes those special that are there
        super().__init__(tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)
        self.image_size, self.tile_tokens = image_size, tile_tokens
        self.seg_token_id, self.segt_token_id, self.image_token_id = (
            tokenizer.convert_tokens_to_ids(token) for token in (SEG, SEGT, IMG_CONTEXT)
        )

    @classmethod
    def from_pretrained(cls, source, **kwargs):
        """Read the processor of any checkpoint layout; UserError where there is none, or no tokenizer of InternVL3."""
        check_known("from_pretrained: keyword", kwargs, (*HUB_OPTIONS, "trust_remote_code", "_from_auto"))
        config = Self1EConfig.from_pretrained(source, **kwargs)
        tokenizer = Qwen2Tokenizer.from_pretrained(source, **kwargs)
        if tokenizer.vocab_size < 256:  # bytes alone are 256: the library makes an empty one where files are absent
            raise UserError(f"{source}: no tokenizer there; published weights need their base as --version")
        return cls(tokenizer, image_size=config.tile_size, tile_tokens=config.tile_tokens)

    def __call__(
        self,
        images: Sequence[Image.Image],
        conversations: Sequence[Sequence[Sequence[str]]],
        mask_targets: Sequence | None = None,
        *,
        padding_side: str = "right",
        **limits,
    ) -> BatchFeature:
        """Make a batch.

        Args:
            images: any mode; their EXIF orientation is applied.
            conversations: per image its conversations, each the texts of user, assistant, user, ...; the first one
                holds `<image>`. One that ends with the user's is left open for the assistant (generation).
            mask_targets: per image None, uint8 (conversations, H, W), or a list with uint8 (n_seg, H, W) or None for
                each conversation.
            padding_side: "right" (training, masks) or "left" (generation).
            limits: `max_tiles` and `thumbnail` of `cut_tiles`; `max_length`: of a conversation, which is cut there.

        Returns:
            `input_ids`, `attention_mask` and `labels` (conversations, N), `pixel_values` (tiles, 3, size, size),
            `tile_grids` (images, 2), `row_image` (conversations,), the image of each, and with targets `mask_targets`,
            one entry per conversation.

        Raises UserError where image tokens or a `[SEG]` would be cut and for a conversation without `<image>` or with
        an image token in its text, ValueError for masks that do not match the `[SEG]`s.
        """
        targets = [None] * len(images) if mask_targets is None else mask_targets
        entries = zip(images, conversations, targets, strict=True)
        return self.collate([self.encode(*entry, **limits) for entry in entries], padding_side=padding_side)

    def encode(
        self,
        image: Image.Image,
        conversations: Sequence[Sequence[str]],
        masks: Sequence | None = None,
        *,
        max_length: int | None = None,
        **tiling,
    ) -> dict:
        """One image and its conversations, ready for `collate`; see `__call__`."""
        tiles, grid = cut_tiles(image, self.image_size, **tiling)
        texts = [self.encode_conversation(turns, len(tiles), max_length) for turns in conversations]
        masks = [None] * len(texts) if masks is None else masks
        arrays = [None if x is None else np.ascontiguousarray(x, np.uint8) for x in masks]
        targets = [None if x is None else torch.from_numpy(x.reshape(-1, *x.shape[-2:])) for x in arrays]
        for turns, (ids, _), target in zip(conversations, texts, targets, strict=True):
            n_seg = ids.count(self.seg_token_id)
            if target is not None and len(target) != n_seg:
                raise ValueError(f"{n_seg} [SEG] but {len(target)} masks in the conversation {turns}")
        return {"pixel_values": tiles, "tile_grid": grid, "texts": texts, "mask_targets": targets}

    def encode_conversation(
        self, turns: Sequence[str], n_tiles: int, max_length: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of one conversation; labels cover each assistant text and its `<|im_end|>`."""
        if not turns or IMAGE_TAG not in turns[0] or any(IMG_CONTEXT in turn for turn in turns):
            rule = f"the first turn must hold {IMAGE_TAG}, and none the reserved token {IMG_CONTEXT}"
            raise UserError(f"{rule}: {list(turns)}")
        picture = IMG_START + IMG_CONTEXT * (self.tile_tokens * n_tiles) + IMG_END
        text, answers = chat_text([turns[0].replace(IMAGE_TAG, picture, 1), *turns[1:]])
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        labels = [x if any(start in own for own in answers) else IGNORE_INDEX for x, (start, _) in zip(ids, offsets)]
        if max_length is not None:
            for name, token in ((IMG_CONTEXT, self.image_token_id), (SEG, self.seg_token_id)):
                if token in ids[max_length:]:
                    limit = f"--model_max_length {max_length}"
                    raise UserError(f"{len(ids)} tokens do not fit {limit}: {name} would be cut")
        return ids[:max_length], labels[:max_length]

    def collate(
        self, encoded: Sequence[dict], *, padding_side: str = "right", groups: int | None = None
    ) -> BatchFeature:
        """The batch of several `encode` results, see `__call__`.

        groups: of similar length, in which conversations go through the LLM: 1 under ZeRO-3, else up to 2. Where it is
        given, the batch holds `packed`, too: what the model would read back from it.
        """

        def pad(values: Iterable[list[int]], filler: int) -> Tensor:
            tensors = [torch.tensor(one) for one in values]
            return pad_sequence(tensors, batch_first=True, padding_value=filler, padding_side=padding_side)

        ids, labels = zip(*(text for entry in encoded for text in entry["texts"]))
        text = {
            "input_ids": pad(ids, self.tokenizer.pad_token_id),
            "attention_mask": pad(([1] * len(one) for one in ids), 0),
            "labels": pad(labels, IGNORE_INDEX),
        }
        grids = torch.tensor([entry["tile_grid"] for entry in encoded])
        row_image = torch.tensor([number for number, entry in enumerate(encoded) for _ in entry["texts"]])
        pixels = torch.cat([entry["pixel_values"] for entry in encoded])
        batch: dict[str, Any] = text | {"pixel_values": pixels, "tile_grids": grids, "row_image": row_image}
        if groups is not None:
            batch["packed"] = pack(**text, grids=grids, row_image=row_image, tokens=self, groups=groups)
        targets = [target for entry in encoded for target in entry["mask_targets"]]
        if any(target is not None for target in targets):
            batch["mask_targets"] = targets
        return BatchFeature(batch)
