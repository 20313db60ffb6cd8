"""Self1E: InternVL that segments by itself. The model is transformers' InternVL plus a head and a mask overlay.

Shape legend: T tiles of all images, I images, R conversations, N tokens each, P tokens of all (`self1e.model.batch`),
S patches and L = S/r image tokens per side of a tile, Cv and C widths of ViT and LLM, m `[SEG]`s.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import SAC_IGNORED_OPS, create_selective_checkpoint_contexts
from transformers import InternVLForConditionalGeneration, initialization
from transformers.modeling_outputs import CausalLMOutputWithPast

from self1e.model.attention import perception_mask
from self1e.model.batch import Packed, pack
from self1e.model.config import Self1EConfig
from self1e.model.grids import REPLICATIONS, compress
from self1e.model.head import HEADS, Masked, SegmentationHead
from self1e.model.inference import InferenceMixin
from self1e.model.losses import MASK_LOSSES, mask_losses
from self1e.model.weights import CheckpointMixin


@dataclass
class Self1EOutput(CausalLMOutputWithPast):
    """What `forward` returns; absent entries are None. `loss`: weighted sum of `losses`, scalars by name.

    `logits`: (R, k, vocabulary), while generating. `mask_logits`: per conversation (n_seg, h, w) before any resize.
    """

    losses: dict[str, Tensor] | None = None
    mask_logits: list[Tensor] | None = None


class ImageFeatures(NamedTuple):
    """Images, encoded once for all their conversations."""

    v1: Tensor  # (T, L, L, C) image tokens
    vhq: Tensor | None  # (T, S, S, C) self-replicated features, None when no mask was asked for
    grids: list[tuple[int, int]]  # per image rows and columns of its tiles


class Self1EForSegmentation(CheckpointMixin, InferenceMixin, InternVLForConditionalGeneration):
    """InternVL with the segmentation head (paper, figure 2). `trained_head` tells if a checkpoint brought the head."""

    config_class = Self1EConfig

    def __init__(self, config: Self1EConfig):
        super().__init__(config)
        if unweighted := MASK_LOSSES.keys() - config.loss_weights:
            raise KeyError(f"losses without an entry in LOSS_WEIGHTS: {', '.join(unweighted)}")
        if config.drop_path_rate:
            layers = self.model.vision_tower.encoder.layer
            for number, layer in enumerate(layers):  # stochastic depth of both branches, where dropout stands
                rate = config.drop_path_rate * number / max(1, len(layers) - 1)
                layer.attention.projection_dropout, layer.dropout = DropPath(rate), DropPath(rate)
        self.segmentation_head = HEADS[config.mask_features](
            config.text_config.hidden_size, ratio=config.ratio, auxiliary_projection=config.auxiliary_projection
        )
        self.trained_head = False
        self.post_init()
        self.round_rope()

    @torch.no_grad()
    def round_rope(self) -> None:
        """Round the LLM's rotary frequencies if the configuration asks for it; angles are computed in fp32 anyway."""
        rotary = self.model.language_model.rotary_emb
        if self.config.rope_precision == "bf16":
            for frequencies in (rotary.inv_freq, rotary.original_inv_freq):
                frequencies.copy_(frequencies.bfloat16())

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SegmentationHead):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    initialization.normal_(layer.weight, std=0.02)
                    initialization.zeros_(layer.bias)

    @property
    def max_groups(self) -> int:
        """Of conversations in a pass: one under ZeRO-3, whose ranks must call the same layers together."""
        return 1 if hasattr(self.lm_head.weight, "ds_id") else 2

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tile_grids: Tensor | None = None,
        row_image: Tensor | None = None,
        mask_targets: Sequence[Tensor | None] | None = None,
        packed: Packed | None = None,
        image_features: ImageFeatures | None = None,
        past_key_values=None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> Self1EOutput:
        """One pass over conversations; masks come from every `[SEG]` in them.

        Args:
            input_ids: (R, N), with `L*L` image tokens per tile of the conversation's image.
            attention_mask: (R, N), 1 at tokens, 0 at padding (either side).
            labels: (R, N), -100 where unsupervised; asks for the CE loss.
            pixel_values, tile_grids: as for `encode_images`; or give `image_features`.
            row_image: (R,), the image of each conversation.
            mask_targets: per conversation uint8 (n_seg, H, W) of any size, or None; asks for the mask losses.
            packed: the batch as the processor's `collate` read it. Without it, it is read here, waiting for a GPU.
            past_key_values, logits_to_keep, kwargs: of `generate`; the pass is plain causal and without masks then.

        Raises ValueError where image tokens and tiles, or masks and `[SEG]`s of a conversation do not match.
        """
        with_images = pixel_values is not None or image_features is not None
        generating = past_key_values is not None or bool(logits_to_keep)
        assert mask_targets is None or with_images and not generating, "masks need images, and no generation"
        if generating or not with_images and labels is None:
            if pixel_values is not None:
                image_features = self.encode_images(pixel_values, tile_grids, for_masks=False)
            if input_ids.shape[1] == 1:  # a token behind the prompt, whose images are in the cache
                image_features = None
            if past_key_values is not None:  # newer releases of the library give it as `cache`
                kwargs["past_key_values"] = past_key_values
            kwargs["logits_to_keep"] = logits_to_keep
            return self.causal_pass(input_ids, attention_mask, image_features, row_image, **kwargs)

        if packed is None:
            grids, limit = tile_grids if image_features is None else image_features.grids, self.max_groups
            packed = pack(input_ids, attention_mask, labels, grids, row_image, tokens=self.config, groups=limit)
        assert len(packed.groups) <= self.max_groups, "under ZeRO-3 collate with groups=1: ranks would wait for ever"
        batch = send_to_device(packed, self.device, non_blocking=True)
        with_masks = with_images and (self.training or any(batch.n_seg))
        # The text comes first, so that the embeddings' large gradient is made last, when the ViT's states are gone.
        embeds = self.get_input_embeddings()(batch.ids[None])[0]  # P C
        if pixel_values is not None:
            image_features = self.encode_images(pixel_values, batch.grids, for_masks=with_masks)
        if image_features is not None:
            tokens = rearrange(take(image_features.v1, batch.tiles), "t h w c -> (t h w) c").to(embeds)
            embeds = embeds.index_copy(0, batch.image.to(embeds.device), tokens)
        states = self.run_llm(embeds, batch)  # P C, normalised
        without = [states.new_zeros(0, 1, 1) for _ in batch.row_image]
        masks, *auxiliary = self.predict_masks(states, image_features, batch) if with_masks else [without]
        losses = {} if labels is None else {"ce": self.text_loss(states, batch)}
        if mask_targets is not None:
            losses |= mask_losses([masks, *auxiliary] if self.config.auxiliary_loss else [masks], mask_targets)
        terms = [self.config.loss_weights[name] * value.to(states.device) for name, value in losses.items()]
        loss = torch.stack(terms).sum() if terms else None
        if loss is not None and self.training and masks:  # every backward pass reaches every weight of the head
            loss = loss + 0.0 * torch.cat([x.flatten() for x in chain(masks, *auxiliary)]).sum().to(loss)
        return Self1EOutput(loss=loss, losses=losses or None, mask_logits=masks if with_images else None)

    def encode_images(
        self, pixel_values: Tensor, tile_grids: Tensor | Sequence, *, for_masks: bool = True
    ) -> ImageFeatures:
        """Encode images once, for any number of conversations: `forward(image_features=...)`.

        pixel_values: (T, 3, size, size), the tiles of all images in order. tile_grids: (I, 2), rows and columns of
        each image's tiles. for_masks: also compute the self-replicated features.
        """
        project, ratio = self.model.multi_modal_projector, self.config.ratio
        patches = self.model.vision_tower(pixel_values=pixel_values.to(self.dtype)).last_hidden_state[:, 1:]  # no CLS
        patches = rearrange(patches, "t (h w) c -> t h w c", h=int(patches.shape[1] ** 0.5))
        v1 = project(compress(patches, ratio))
        vhq = project(REPLICATIONS[self.config.replication](patches, ratio)) if for_masks else None
        grids = tile_grids.tolist() if isinstance(tile_grids, Tensor) else tile_grids
        return ImageFeatures(v1, vhq, grids)

    def run_llm(self, embeds: Tensor, batch: Packed) -> Tensor:
        """The LLM's normalised final states: (P, C) -> (P, C), each group of conversations by itself."""
        llm, config, states = self.model.language_model, self.config, []
        for part, length, padded, segments in batch.groups:
            inputs = rearrange(embeds[part], "(r n) c -> r n c", n=length)
            ids, padding = (x[part].view(inputs.shape[:2]).to(embeds.device) for x in (batch.ids, batch.padding))
            pathway = config.attention_pathway if segments else "causal"
            mask = perception_mask(pathway, config, ids, embeds=inputs, padding_mask=padding if padded else None)
            masks = dict.fromkeys(config.text_config.layer_types, mask)
            with without_dynamic_rope(llm.rotary_emb, length):
                out = llm(inputs_embeds=inputs, attention_mask=masks, use_cache=False)
            states.append(out.last_hidden_state.flatten(0, 1))
        return torch.cat(states)

    def text_loss(self, states: Tensor, batch: Packed) -> Tensor:
        """Next-token cross-entropy, mean over supervised tokens, 0 without any: (P, C) -> scalar."""
        if not len(batch.text):
            return self.lm_head(states[:1]).float().mean() * 0.0  # keeps lm_head in every backward pass
        logits = self.lm_head(take(states, batch.text)).float()
        return F.cross_entropy(logits, batch.text_labels.to(logits.device))

    def predict_masks(self, states: Tensor, features: ImageFeatures, batch: Packed) -> list[list[Tensor]]:
        """Run the head: (P, C), ... -> per conversation mask logits (n_seg, h, w), and auxiliary ones if it has them.

        Without any `[SEG]` it runs on one token and gives nothing: every rank calls it once in a training pass.
        """
        v1, vhq, per_side, ratio = features.v1, features.vhq, self.config.tile_side, self.config.ratio
        grids = [batch.grids[image] for image in batch.row_image]
        tiles = sum(n * math.prod(grid) for n, grid in zip(batch.n_seg, grids))
        if tiles:
            first = [0, *accumulate(map(math.prod, batch.grids))]
            asked = [Masked(first[i], grid, n) for i, grid, n in zip(batch.row_image, grids, batch.n_seg) if n]
            img = rearrange(take(states, batch.seg_image), "(t h w) c -> t h w c", h=per_side, w=per_side)
            logits = self.segmentation_head(v1, vhq, img, take(states, batch.seg), asked)
        else:
            few = v1[:1, :1, :1], vhq[:1, :ratio, :ratio], states[:1, None, None], states[:1]  # type: ignore[index]
            logits = [x[:0] for x in self.segmentation_head(*few, [Masked(0, (1, 1), 1)])]
        masks = []
        for flat in logits:
            side = math.isqrt(len(flat) // tiles) if tiles else 1  # of a tile, in cells
            sizes = [(n, rows * side, cols * side) for n, (rows, cols) in zip(batch.n_seg, grids)]
            masks.append([part.view(size) for part, size in zip(flat.split([*map(math.prod, sizes)]), sizes)])
        return masks

    def causal_pass(self, input_ids: Tensor, attention_mask, features: ImageFeatures | None, row_image, **kwargs):
        """A pass as the library's own model takes it, with vocabulary logits and without masks: for `generate`."""
        embeds = self.get_input_embeddings()(input_ids)
        if features is not None:
            is_image = (input_ids == self.config.image_token_id).to(embeds.device)
            tiles = features.v1.split([*map(math.prod, features.grids)])  # of each image
            tokens = torch.cat([tiles[image].flatten(0, 2) for image in row_image.tolist()]).to(embeds)
            embeds = embeds.masked_scatter(is_image[..., None], tokens)
        return Self1EOutput(**super().forward(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Entries of the first axis, the index moved to where they are."""
    return x.index_select(0, index.to(x.device))


@contextmanager
def without_dynamic_rope(rotary, length: int) -> Iterator[None]:
    """Keep dynamic RoPE from asking the GPU for the longest position, which the host knows."""
    kind = rotary.rope_type
    if kind == "dynamic" and length <= rotary.original_max_seq_len == rotary.max_seq_len_cached:
        rotary.rope_type = "default"
    try:
        yield
    finally:
        rotary.rope_type = kind


def selective_checkpointing_kwargs() -> dict[str, Any]:
    """For `gradient_checkpointing_enable`: keep what is costly and compute the rest again in the backward pass.

    Products of matrices and attention are nearly all of the work, and a part of the memory that activations take. As
    in Korthikanti et al., 2022, "Reducing Activation Recomputation in Large Transformer Models".
    """
    # Autocast casts a weight once per forward pass, though a layer runs for each group of conversations, and casts it
    # anew in each part of the backward pass: such casts are no part of what is compared.
    SAC_IGNORED_OPS.add(torch.ops.aten._to_copy.default)
    return {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, SAVED)}


ATTENTION = "flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"  # keep no scores
PRODUCTS = "mm", "addmm", "bmm", *(f"_scaled_dot_product_{kernel}" for kernel in ATTENTION)
SAVED = [getattr(torch.ops.aten, name).default for name in PRODUCTS]
