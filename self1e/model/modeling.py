"""Self1E: InternVL that segments by itself. The model is transformers' InternVL plus a head and a mask overlay.

Shape legend: T tiles of all images, I images, R rows (conversations), N tokens per row, S patches and L = S/r image
tokens per side of a tile, h w an image's stitched grid of image tokens, Cv and C widths of ViT and LLM, m `[SEG]`s.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.internvl.modeling_internvl import InternVLVisionLayer
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    ModelOutput,
)

from self1e import distributed
from self1e.model.attention import perception_mask
from self1e.model.config import Self1EConfig
from self1e.model.grids import REPLICATIONS, compress, stitch_tiles
from self1e.model.head import HEADS, INITIAL_STD, ImageSide, SegmentationHead
from self1e.model.inference import InferenceMixin
from self1e.model.layout import Grid, Group, HeadGroup, Layout, PackedMasks, as_grids, read_layout, take
from self1e.model.losses import mask_losses
from self1e.model.recomputation import recompute_mlps
from self1e.model.weights import load_checkpoint


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

    `tokens`: (T, L*L, C) image tokens (V1); `grids`: per image (rows, columns) of tiles; `sides`: per image what the
    head shares among rows, None when no mask was asked for; `spare`: of runs of the head that other ranks need.
    """

    tokens: Tensor
    grids: list[Grid]
    sides: list[ImageSide] | None
    spare: list[ImageSide] = field(default_factory=list)


class StochasticDepthLayer(InternVLVisionLayer):
    """A ViT layer whose two branches are dropped per tile with probability `drop_prob` while training."""

    def __init__(self, config, drop_prob: float):
        from timm.layers import DropPath  # its import takes a fifth of the time of torch's

        super().__init__(config)
        self.drop_path = DropPath(drop_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        attention, _ = self.attention(self.layernorm_before(hidden_states))
        hidden_states = hidden_states + self.drop_path(self.lambda_1 * attention)
        mlp = self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return hidden_states + self.drop_path(self.lambda_2 * mlp)


class Self1EForSegmentation(InferenceMixin, InternVLForConditionalGeneration):  # type: ignore[misc]  # the library's
    """InternVL with the segmentation head (paper, figure 2). `trained_head` tells if a checkpoint brought the head."""

    config_class = Self1EConfig

    def __init__(self, config: Self1EConfig):
        super().__init__(config)
        if config.drop_path_rate:
            vision = config.vit
            step = config.drop_path_rate / max(1, vision.num_hidden_layers - 1)
            self.model.vision_tower.encoder.layer = nn.ModuleList(
                StochasticDepthLayer(vision, step * i) for i in range(vision.num_hidden_layers)
            )
        recompute_mlps(self.model.language_model, self.model.vision_tower)
        self.segmentation_head = HEADS[config.mask_features](
            config.llm.hidden_size, ratio=config.ratio, auxiliary_projection=config.auxiliary_projection
        )
        self.trained_head = False
        self.post_init()
        self.round_rope()

    @torch.no_grad()
    def round_rope(self) -> None:
        """Round the LLM's rotary frequencies if the configuration asks for it; angles are computed in fp32 anyway."""
        rotary = self.model.language_model.rotary_emb
        if self.config.rope_precision == "bf16" and not rotary.inv_freq.is_meta:
            for frequencies in (rotary.inv_freq, rotary.original_inv_freq):
                frequencies.copy_(frequencies.bfloat16())

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
        """Load a checkpoint of any of the four layouts (`self1e.model.weights`), in evaluation mode.

        Args:
            pretrained_model_name_or_path: folder or hub id: original InternVL, `-hf`, or a Self1E folder.
            weights: folder whose weights replace those of the first argument: published SELF1E or our own.
            config: a ready `Self1EConfig`; default: the checkpoint's.
            kwargs: the library's (`dtype`, default float32, `device_map`, `attn_implementation`, ...) and any of
                `config.SWITCHES`, e.g. `mask_features="rfr"`, and `loss_weights`, a dict of those that change.

        Raises:
            UserError: no checkpoint there, another architecture, or missing, unexpected or misshapen weights, all of
                them listed.
        """
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        return load_checkpoint(
            cls, super().from_pretrained, pretrained_model_name_or_path, weights=weights, config=config, **kwargs
        )

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Write the layout `self1e`, with native tensor names; `save_checkpoint` also writes `published`.

        Weight files of an earlier save there are removed: the library would read those first.
        """
        kwargs.setdefault("save_original_format", False)
        self.config.weights_id = uuid.uuid4().hex
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
            Path(save_directory, name).unlink(missing_ok=True)
        super().save_pretrained(save_directory, *args, **kwargs)

    def encode_images(
        self, pixel_values: Tensor, tile_grids: Tensor | Sequence[Grid], *, for_masks: bool = True, head_runs: int = 0
    ) -> ImageFeatures:
        """Encode photos once; pass the result to `forward(image_features=...)` for any number of rows.

        Args:
            pixel_values: (T, 3, size, size), the tiles of all images in order.
            tile_grids: (I, 2), rows and columns of each image's tiles.
            for_masks: also compute the head's image side. head_runs: its runs at least, see `head_runs`.
        """
        grids = as_grids(tile_grids)
        patches = self.model.vision_tower(pixel_values=pixel_values.to(self.dtype)).last_hidden_state[:, 1:]  # no CLS
        patches = rearrange(patches, "t (h w) c -> t h w c", h=int(patches.shape[1] ** 0.5))
        low = self.model.multi_modal_projector(compress(patches, self.config.ratio))  # V1: T L L C
        tokens = rearrange(low, "t h w c -> t (h w) c")
        if not for_masks:
            return ImageFeatures(tokens, grids, None)
        high = self.model.multi_modal_projector(REPLICATIONS[self.config.replication](patches, self.config.ratio))
        stops = [0, *accumulate(rows * cols for rows, cols in grids)]
        sides: dict[int, ImageSide] = {}
        for grid in dict.fromkeys(grids):
            images = [image for image, other in enumerate(grids) if other == grid]
            tiles = [slice(stops[image], stops[image + 1]) for image in images]
            pair = (stitch_tiles(torch.cat([x[part] for part in tiles]), grid) for x in (low, high))
            sides |= zip(images, self.segmentation_head.image_side(*pair))
        spare = [self.segmentation_head.image_side(low[:1], high[:1]) for _ in range(len(set(grids)), head_runs)]
        return ImageFeatures(tokens, grids, [sides[image] for image in range(len(grids))], sum(spare, []))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tile_grids: Tensor | None = None,
        row_image: Tensor | None = None,
        mask_targets: Sequence[Tensor | None] | None = None,
        layout: Layout | None = None,
        image_features: ImageFeatures | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> Self1EOutput:
        """One pass over rows; masks come from every `[SEG]` in them.

        Args:
            input_ids: (R, N), with `L*L` image tokens per tile of the row's image.
            attention_mask: (R, N), 1 at tokens, 0 at padding (either side).
            labels: (R, N), -100 where unsupervised; asks for the CE loss.
            pixel_values, tile_grids: as for `encode_images`; or give `image_features`.
            row_image: (R,), the image of each row.
            mask_targets: per row uint8 (n_seg, H, W) of any size, or None; asks for the mask losses, in evaluation
                mode too. They are 0 where no row has a mask.
            layout: where things stand in this very batch, as the processor read it on the host. Without one, or when
                ids are on the CPU, it is read here; on a GPU that waits for the device.
            logits_to_keep: vocabulary logits of that many last positions (generation); 0: none.
            past_key_values: a cache makes the pass plain causal and without masks (generation).
            position_ids, inputs_embeds, kwargs: the library's.

        Raises:
            ValueError: image tokens and tiles do not match, or masks and `[SEG]`s of a row do not; or masks are given
                without photos, or with a cache.
        """
        generating = past_key_values is not None
        with_photos = image_features is not None or pixel_values is not None
        if mask_targets is not None and (generating or not with_photos):
            raise ValueError("mask_targets need photos (pixel_values or image_features) and no past_key_values")
        if not with_photos and labels is None:
            embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            out = self.run_llm(embeds, attention_mask, position_ids, past_key_values, **kwargs)
            logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:]) if logits_to_keep else None
            return Self1EOutput(logits=logits, past_key_values=out.past_key_values)
        assert input_ids is not None, "photos and labels need input_ids"
        whole = generating or bool(logits_to_keep) or position_ids is not None or inputs_embeds is not None
        grids = tile_grids if image_features is None else image_features.grids
        layout = self.layout_of(layout, input_ids, attention_mask, labels, grids, row_image, whole=whole)
        layout = layout.to(input_ids.device)
        if mask_targets is not None:
            layout.check_masks(mask_targets)
        with_masks = with_photos and not generating and (self.training or bool(layout.heads))
        runs = self.head_runs(layout)
        # The text comes first, so that the embeddings' large gradient is made last, when the ViT's states are gone.
        ids = take(input_ids.flatten(), layout.part("source"))  # P
        embeds = (self.get_input_embeddings()(ids[None]) if inputs_embeds is None else inputs_embeds).flatten(0, 1)
        if image_features is None and pixel_values is not None:
            for_photos = runs[0] if with_masks else 0
            image_features = self.encode_images(pixel_values, layout.grids, for_masks=with_masks, head_runs=for_photos)
        if image_features is not None:
            embeds = layout.place_image_tokens(embeds, image_features.tokens)
        outputs, padding = [], layout.part("padding_mask")
        for group, part in layout.split():
            rows = rearrange(embeds[part], "(r n) c -> r n c", r=len(group.rows))
            mask = attention_mask if generating else self.attention_mask_of(rows, ids[part], padding[part], group)
            outputs.append(self.run_llm(rows, mask, position_ids, past_key_values, **kwargs))
        states = torch.cat([out.last_hidden_state.flatten(0, 1) for out in outputs])  # P C, normalised
        result = Self1EOutput(past_key_values=outputs[-1].past_key_values)
        if logits_to_keep:
            result.logits = self.lm_head(outputs[-1].last_hidden_state[:, -logits_to_keep:])
        losses = {} if labels is None else {"ce": self.text_loss(states, labels, layout)}
        if image_features is not None and not generating:
            predictions = self.predict_masks(states, image_features, layout)
            result.mask_logits = [row[0] for row in predictions]
            if mask_targets is not None:
                kinds = 2 if self.config.auxiliary_loss else 1  # the mask, and the auxiliary mask where there is one
                kept = [tuple(x for x in row[:kinds] if x is not None) for row in predictions]
                if isinstance(mask_targets, PackedMasks):  # those of a plain list move where they are used
                    mask_targets = mask_targets.to(states.device)
                losses |= mask_losses(kept, mask_targets)
        if losses:
            result.losses = losses
            weights = self.config.loss_weights
            terms = [weights[name] * value.to(states.device) for name, value in losses.items()]
            if self.training and with_masks and image_features is not None:
                terms.append(self.touch_head(states, image_features, layout, predictions, runs[1]))
            result.loss = torch.stack(terms).sum()
        return result

    def layout_of(
        self,
        layout: Layout | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        grids: Tensor | Sequence[Grid] | None,
        row_image: Tensor | Sequence[int] | None,
        *,
        whole: bool,
    ) -> Layout:
        """The given layout, if it fits this pass and the ids are on a GPU; otherwise it is read from the ids."""
        split = not is_deepspeed_zero3_enabled()  # ranks must run the LLM equally often there
        if layout is not None and (layout.whole or not whole) and (split or len(layout.groups) == 1):
            if input_ids.device.type != "cpu":
                return layout
        return read_layout(
            input_ids,
            attention_mask,
            labels,
            grids=() if grids is None else as_grids(grids),
            row_image=row_image.tolist() if isinstance(row_image, Tensor) else row_image or (),
            tile_tokens=self.config.tile_tokens,
            image_token_id=self.config.image_token_id,
            seg_token_id=self.config.seg_token_id,
            split=split,
            whole=whole,
        )

    def attention_mask_of(
        self, embeds: Tensor, ids: Tensor, padding_mask: Tensor, group: Group
    ) -> dict[str, Tensor | None]:
        """The LLM's attention mask for a group: (r, n, C), (r n,), (r n,) 1 at tokens, 0 at padding."""
        ids, padding_mask = (
            rearrange(x.to(embeds.device), "(r n) -> r n", r=len(group.rows)) for x in (ids, padding_mask)
        )
        mask = perception_mask(
            self.config.attention_pathway if group.segments else "causal",
            config=self.config.llm,
            embeds=embeds,
            padding_mask=padding_mask if group.padded else None,
            is_image=ids == self.config.image_token_id,
            is_seg=ids == self.config.seg_token_id,
        )
        return dict.fromkeys(set(self.config.llm.layer_types), mask)

    def run_llm(self, embeds: Tensor, mask, position_ids: Tensor | None, past_key_values: Cache | None, **kwargs):
        """The LLM alone, over embeddings (R, N, C)."""
        llm = self.model.language_model
        options = {name: value for name, value in kwargs.items() if name not in ("use_cache", "return_dict")}
        known = past_key_values is None and position_ids is None
        with steady_rope(llm.rotary_emb, embeds.shape[1]) if known else nullcontext():
            return llm(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
                **options,
            )

    def text_loss(self, states: Tensor, labels: Tensor, layout: Layout) -> Tensor:
        """Next-token cross-entropy, mean over supervised tokens, 0 without any: (P, C), (R, N) -> scalar.

        Vocabulary logits are computed at supervised positions only.
        """
        text = layout.part("text")
        if not len(text):
            return self.lm_head(states[:1]).float().mean() * 0.0  # keeps lm_head in every backward pass
        logits = self.lm_head(take(states, text)).float()
        return F.cross_entropy(logits, take(labels.flatten(), layout.part("labels")).to(logits.device))

    def predict_masks(
        self, states: Tensor, features: ImageFeatures, layout: Layout
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Mask and auxiliary logits, per row (n_seg, ., .); rows of one grid are computed together.

        Args:
            states: (P, C) final states.
        """
        side = self.config.tile_side * self.segmentation_head.upsampling
        grids = [layout.grids[image] for image in layout.row_image]
        results: list[tuple[Tensor, Tensor | None]] = [
            (states.new_zeros(0, rows * side, cols * side), None) for rows, cols in grids
        ]
        for group in layout.heads:
            places = layout.part(f"image {group.name}"), layout.part(f"seg {group.name}")
            mask, auxiliary = self.run_head(states, features, layout, group, *places)
            for place, row in enumerate(group.rows):
                count = slice(0, layout.n_seg[row])
                results[row] = mask[place, count], None if auxiliary is None else auxiliary[place, count]
        return results

    def run_head(
        self, states: Tensor, features: ImageFeatures, layout: Layout, group: HeadGroup, image: Tensor, seg: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The head over rows of one grid; `image`, `seg`: packed positions as `HeadGroup` says."""
        assert features.sides is not None, "the photos were encoded without masks in mind"
        sides = [features.sides[layout.row_image[row]] for row in group.rows]
        length = self.config.tile_side
        tiles = rearrange(take(states, image), "(t h w) c -> t h w c", h=length, w=length)
        queries = rearrange(take(states, seg), "(n k) c -> n k c", k=group.masks)
        device = sides[0].refill.device  # with a device_map, the head's
        return self.segmentation_head(stitch_tiles(tiles, group.grid).to(device), queries.to(device), sides)

    def head_runs(self, layout: Layout) -> list[int]:
        """How often a training pass runs the head: over grids of photos, and over groups of rows with masks.

        Under ZeRO-3 it is as often on every rank as on the one that needs it most, because all ranks gather the
        parameters of every run together.
        """
        runs = [len(set(layout.grids)), max(1, len(layout.heads))]
        return distributed.most(runs) if self.training and is_deepspeed_zero3_enabled() else runs

    def touch_head(
        self, states: Tensor, features: ImageFeatures, layout: Layout, predictions: list, runs: int
    ) -> Tensor:
        """0, but through every parameter of the head and every one of its `runs`, so that ranks stay in step."""
        group = HeadGroup(layout.grids[layout.row_image[0]], rows=(0,), masks=1)
        tokens = self.config.tile_tokens * group.grid[0] * group.grid[1]
        image, first = layout.part("image")[:tokens], layout.part("image")[:1]
        more = [self.run_head(states, features, layout, group, image, first) for _ in range(len(layout.heads), runs)]
        reached = [x.sum() for row in predictions + more for x in row if x is not None]
        idle = features.spare + (features.sides or [] if is_deepspeed_zero3_enabled() else [])  # ranks go back alike
        reached += [x.sum().to(reached[0].device) for side in idle for x in (side.refill, side.origin)]
        return torch.stack(reached).sum().float().to(states.device) * 0.0


@contextmanager
def steady_rope(rotary, length: int) -> Iterator[None]:
    """Keep dynamic RoPE from asking the GPU for the longest position, which the host knows."""
    kind = rotary.rope_type
    if kind == "dynamic" and length <= rotary.original_max_seq_len == rotary.max_seq_len_cached:
        rotary.rope_type = "default"
    try:
        yield
    finally:
        rotary.rope_type = kind
