"""Self1E: InternVL that segments by itself. The model is transformers' InternVL plus a head and a mask overlay.

Shape legend: T tiles of all images, I images, R rows (conversations), N tokens a row, S patches and L = S/r image
tokens a tile side, h w an image's stitched grid of image tokens, Cv and C widths of ViT and LLM, m `[SEG]`s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import DropPath
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.models.internvl.modeling_internvl import InternVLVisionLayer
from transformers.utils import ModelOutput

from self1e.model import checkpoints
from self1e.model.attention import perception_mask
from self1e.model.configuration import Self1EConfig
from self1e.model.grids import REPLICATIONS, compress, stitch_tiles, tile_offsets
from self1e.model.head import INITIAL_STD, ImageSide, SegmentationHead
from self1e.model.inference import InferenceMixin
from self1e.model.losses import IGNORE_INDEX, mask_losses


@dataclass
class Self1EOutput(ModelOutput):
    """What `forward` returns; absent entries are None.

    `loss`: weighted sum of `losses` {"ce", "mask_bce", "mask_dice"} (scalars). `logits`: (R, k, vocabulary), where
    `logits_to_keep=k` asked for them. `mask_logits`: per row (n_seg, height, width) before any resize.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    mask_logits: list[Tensor] | None = None
    past_key_values: Cache | None = None


@dataclass(frozen=True)
class ImageFeatures:
    """Photos, encoded once for all their rows.

    `tokens`: (T, L*L, C) image tokens (V1); `tile_grids`: (I, 2) as (rows, cols); `sides`: per image what the head
    shares among rows, None when no mask was asked for.
    """

    tokens: Tensor
    tile_grids: Tensor
    sides: list[ImageSide] | None


class StochasticDepthLayer(InternVLVisionLayer):
    """A ViT layer whose two branches are dropped per tile with probability `drop_prob` while training."""

    def __init__(self, config, drop_prob: float):
        super().__init__(config)
        self.drop_path = DropPath(drop_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        attention, _ = self.attention(self.layernorm_before(hidden_states))
        hidden_states = hidden_states + self.drop_path(self.lambda_1 * attention)
        mlp = self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return hidden_states + self.drop_path(self.lambda_2 * mlp)


class Self1EForSegmentation(InferenceMixin, InternVLForConditionalGeneration):
    """InternVL with the segmentation head (paper, figure 2). `trained_head` tells if a checkpoint brought the head."""

    config_class = Self1EConfig

    def __init__(self, config: Self1EConfig):
        super().__init__(config)
        if config.drop_path_rate:
            vision = config.vision_config
            step = config.drop_path_rate / max(1, vision.num_hidden_layers - 1)
            self.model.vision_tower.encoder.layer = nn.ModuleList(
                StochasticDepthLayer(vision, step * i) for i in range(vision.num_hidden_layers)
            )
        self.segmentation_head = SegmentationHead(
            config.text_config.hidden_size,
            mask_features=config.mask_features,
            auxiliary_projection=config.auxiliary_projection,
            ratio=config.ratio,
        )
        self.trained_head = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SegmentationHead):
            for layer in module.modules():
                if isinstance(layer, nn.Linear) and not getattr(layer.weight, "_is_hf_initialized", False):
                    nn.init.normal_(layer.weight, std=INITIAL_STD)
                    nn.init.zeros_(layer.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, weights=None, config=None, **kwargs):
        """Load a checkpoint of any of the four layouts (`self1e.model.checkpoints`), in evaluation mode.

        Args:
            pretrained_model_name_or_path: folder or hub id: original InternVL, `-hf`, or a Self1E folder.
            weights: folder whose weights replace those of the first argument: published SELF1E or our own.
            config: a ready `Self1EConfig`; default: the checkpoint's.
            kwargs: the library's (`dtype`, default float32, `device_map`, `attn_implementation`, ...) and any of
                `configuration.SWITCHES`, e.g. `mask_features="rfr"`.

        Raises:
            FileNotFoundError: no checkpoint there.
            ValueError: another architecture, or missing, unexpected or misshapen weights, all of them listed.
        """
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        return checkpoints.load(
            cls, super().from_pretrained, pretrained_model_name_or_path, weights=weights, config=config, **kwargs
        )

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Write layout (d): native tensor names. `checkpoints.save(..., published=True)` writes layout (c)."""
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)

    def encode_images(self, pixel_values: Tensor, tile_grids: Tensor, *, for_masks: bool = True) -> ImageFeatures:
        """Encode photos once; pass the result to `forward(image_features=...)` for any number of rows.

        Args:
            pixel_values: (T, 3, size, size), the tiles of all images in order.
            tile_grids: (I, 2), rows and columns of each image's tiles.
            for_masks: also compute the head's image side.
        """
        patches = self.model.vision_tower(pixel_values=pixel_values.to(self.dtype)).last_hidden_state[:, 1:]
        patches = rearrange(patches, "t (h w) c -> t h w c", h=int(patches.shape[1] ** 0.5))
        low = self.model.multi_modal_projector(compress(patches, self.config.ratio))  # V1: T L L C
        tokens = rearrange(low, "t h w c -> t (h w) c")
        if not for_masks:
            return ImageFeatures(tokens, tile_grids, None)
        high = self.model.multi_modal_projector(REPLICATIONS[self.config.replication](patches, self.config.ratio))
        sides, offsets = [None] * len(tile_grids), tile_offsets(tile_grids)
        same_grid: dict[tuple[int, int], list[int]] = {}
        for image, grid in enumerate(tile_grids.tolist()):
            same_grid.setdefault(tuple(grid), []).append(image)
        for grid, images in same_grid.items():  # together, so that ranks run the head equally often (ZeRO-3)
            tiles = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in images]).to(low.device)
            side = self.segmentation_head.image_side(stitch_tiles(low[tiles], grid), stitch_tiles(high[tiles], grid))
            for place, image in enumerate(images):
                sides[image] = ImageSide(side.refill[place : place + 1], side.origin[place : place + 1])
        return ImageFeatures(tokens, tile_grids, sides)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tile_grids: Tensor | None = None,
        row_image: Tensor | None = None,
        mask_targets: Sequence[Tensor | None] | None = None,
        image_features: ImageFeatures | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> Self1EOutput:
        """One pass over rows; masks come from every `[SEG]` in them.

        Args:
            input_ids: (R, N), with `L*L` image tokens a tile of the row's image.
            attention_mask: (R, N), 1 at tokens, 0 at padding (either side).
            labels: (R, N), -100 where unsupervised; asks for the CE loss.
            pixel_values, tile_grids: as for `encode_images`; or give `image_features`.
            row_image: (R,), the image of each row.
            mask_targets: per row uint8 (n_seg, H, W) of any size, or None; asks for the mask losses.
            logits_to_keep: vocabulary logits of that many last positions (generation); 0: none.
            past_key_values: a cache makes the pass plain causal and without masks (generation).
            position_ids, inputs_embeds, kwargs: the library's.

        Raises:
            ValueError: image tokens and tiles do not match, or masks and `[SEG]`s of a row do not.
        """
        generating = past_key_values is not None
        is_seg = input_ids == self.config.seg_token_id if input_ids is not None else None
        pictured = image_features is not None or pixel_values is not None
        with_masks = pictured and not generating and (self.training or bool(is_seg.any()))
        if image_features is None and pixel_values is not None:
            image_features = self.encode_images(pixel_values, tile_grids, for_masks=with_masks)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if image_features is not None:
            is_image = input_ids == self.config.image_token_id
            inputs_embeds = place_image_tokens(inputs_embeds, is_image, image_features, row_image)
        mask = attention_mask
        if with_masks:
            mask = perception_mask(
                self.config.attention_pathway,
                config=self.config.text_config,
                embeds=inputs_embeds,
                padding_mask=attention_mask,
                is_image=is_image,
                is_seg=is_seg,
            )
            mask = dict.fromkeys(set(self.config.text_config.layer_types), mask)
        outputs = self.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=generating,
            **{key: value for key, value in kwargs.items() if key not in ("use_cache", "return_dict")},
        )
        states = outputs.last_hidden_state  # R N C, normalised
        result = Self1EOutput(past_key_values=outputs.past_key_values)
        if logits_to_keep:
            result.logits = self.lm_head(states[:, -logits_to_keep:])
        losses = {}
        if labels is not None:
            losses["ce"] = self.text_loss(states, labels)
        if with_masks:
            predictions = self.predict_masks(states, is_image, is_seg, image_features, row_image)
            result.mask_logits = [row[0] for row in predictions]
            if mask_targets is not None:
                check_targets(predictions, mask_targets)
                used = slice(0, 2 if self.config.auxiliary_loss else 1)
                losses |= mask_losses([[x for x in row[used] if x is not None] for row in predictions], mask_targets)
        elif pictured and not generating:
            grids = image_features.tile_grids[row_image].tolist()
            result.mask_logits = [self.no_masks(states, grid) for grid in grids]
        if losses:
            result.losses = losses
            weights = {"ce": self.config.ce_loss_weight, "mask_bce": self.config.bce_loss_weight}
            weights["mask_dice"] = self.config.dice_loss_weight
            result.loss = sum(weights[name] * value for name, value in losses.items())
            masks_train = "mask_bce" in losses and losses["mask_bce"].requires_grad
            if self.training and with_masks and not masks_train:
                result.loss = result.loss + self.touch_head(states, is_image, image_features, row_image)
        return result

    def text_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Next-token cross-entropy, mean over supervised tokens, 0 without any: (R, N, C), (R, N) -> scalar.

        Vocabulary logits are computed at supervised positions only.
        """
        states, labels = states[:, :-1], labels[:, 1:]
        supervised = labels != IGNORE_INDEX
        if not bool(supervised.any()):
            return self.lm_head(states[:1, :1]).float().mean() * 0.0  # keeps lm_head in every backward pass
        return F.cross_entropy(self.lm_head(states[supervised]).float(), labels[supervised])

    def predict_masks(
        self, states: Tensor, is_image: Tensor, is_seg: Tensor, features: ImageFeatures, row_image: Tensor
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Mask and auxiliary logits, per row (n_seg, ., .); rows of one grid are computed together.

        Args:
            states: (R, N, C) final states.
            is_image, is_seg: (R, N) bool.
        """
        is_image, is_seg = is_image.to(states.device), is_seg.to(states.device)  # a device_map may split the LLM
        results: list = [None] * len(states)
        groups: dict[tuple[int, int], list[int]] = {}
        for row, image in enumerate(row_image.tolist()):
            groups.setdefault(tuple(features.tile_grids[image].tolist()), []).append(row)
        predicts = is_seg.roll(-1, 1)  # the position that predicts each [SEG]; a row never starts with one
        for grid, rows in groups.items():
            chosen = [row for row in rows if bool(is_seg[row].any())]
            for row in set(rows) - set(chosen):
                results[row] = (self.no_masks(states, grid), None)
            if not chosen:
                continue
            side = self.config.tile_side
            image = torch.stack([states[row, is_image[row]] for row in chosen])
            image = stitch_tiles(rearrange(image, "n (t h w) c -> (n t) h w c", h=side, w=side), grid)
            seg = torch.cat([states[row, predicts[row]] for row in chosen])
            counts = is_seg[chosen].sum(1).tolist()
            seg_row = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], device=seg.device)
            sides = [features.sides[row_image[row]] for row in chosen]
            shared = ImageSide(torch.cat([x.refill for x in sides]), torch.cat([x.origin for x in sides]))
            mask, auxiliary = self.segmentation_head(image, seg, shared, seg_row)
            auxiliary = auxiliary.split(counts) if auxiliary is not None else [None] * len(chosen)
            for row, *pair in zip(chosen, mask.split(counts), auxiliary):
                results[row] = tuple(pair)
        return results

    def no_masks(self, states: Tensor, grid: Sequence[int]) -> Tensor:
        """(0, height, width) for a row without `[SEG]` about an image of `grid` = (rows, columns) tiles."""
        side = self.config.tile_side * self.segmentation_head.upsampling
        return states.new_zeros(0, grid[0] * side, grid[1] * side)

    def touch_head(self, states: Tensor, is_image: Tensor, features: ImageFeatures, row_image: Tensor) -> Tensor:
        """0, but through every parameter of the head, so that ranks with and without masks stay in step."""
        is_seg = torch.zeros_like(is_image[:1])
        is_seg[:, -1] = True
        ((mask, auxiliary),) = self.predict_masks(states[:1], is_image[:1], is_seg, features, row_image[:1])
        total = mask.float().mean() + (0 if auxiliary is None else auxiliary.float().mean())
        return total * 0.0


def place_image_tokens(embeds: Tensor, is_image: Tensor, features: ImageFeatures, row_image: Tensor) -> Tensor:
    """Put each row's image tokens where `is_image`: (R, N, C), (R, N) -> (R, N, C). ValueError on a mismatch."""
    offsets = tile_offsets(features.tile_grids)
    rows = [features.tokens[offsets[image] : offsets[image + 1]] for image in row_image.tolist()]
    tokens = torch.cat([rearrange(row, "t n c -> (t n) c") for row in rows])
    expected, found = [len(row) * row.shape[1] for row in rows], is_image.sum(1).tolist()
    if expected != found:
        raise ValueError(f"rows hold {found} image tokens, their images fill {expected}: was the text cut or edited?")
    return embeds.masked_scatter(repeat(is_image, "r n -> r n c", c=embeds.shape[-1]), tokens.to(embeds))


def check_targets(predictions: Sequence[tuple[Tensor, ...]], targets: Sequence[Tensor | None]) -> None:
    """Raise ValueError unless every row has a mask for each `[SEG]` (or None)."""
    found = [len(row[0]) for row in predictions]
    given = [count if target is None else len(target) for count, target in zip(found, targets)]
    if len(targets) != len(found) or given != found:
        raise ValueError(f"rows hold {found} [SEG] tokens, mask_targets hold {given} masks")
