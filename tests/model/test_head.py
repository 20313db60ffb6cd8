"""The heads against the paper's formulas written cell by cell, and their documented shapes."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import interpolate

from self1e.model.head import HEADS, Masked, SegmentationHead

C, L = 8, 2
# Two images of 1 and 6 tiles; conversations about both, with one and two masks.
GRIDS = [(1, 1), (2, 3)]
ASKED = [(1, 2), (0, 1), (1, 1)]  # image, masks
CONVERSATIONS = [Masked([0, 1][image], GRIDS[image], masks) for image, masks in ASKED]
SWITCHES = [("baseline", False), ("replication", False), ("rfr", False), ("rfa", False), ("rfa", True)]
USED = {"baseline": ("img", "seg"), "replication": ("vhq", "img", "seg")}


def make(mask_features: str, auxiliary_projection: bool) -> SegmentationHead:
    torch.manual_seed(0)
    head = HEADS[mask_features](C, ratio=2, auxiliary_projection=auxiliary_projection).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"v1": (7, L, L, C), "vhq": (7, 2 * L, 2 * L, C), "img": (13, L, L, C), "seg": (4, C)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


def stitch(tiles: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return torch.cat([torch.cat(list(row), 1) for row in tiles.view(*grid, *tiles.shape[1:])], 0)


def expand(x: torch.Tensor) -> torch.Tensor:
    """(h, w, 4 c) -> (2 h, 2 w, c), the channels of a cell being its 2 x 2 patches, row-major."""
    h, w, c = x.shape[0], x.shape[1], x.shape[2] // 4
    out = x.new_zeros(2 * h, 2 * w, c)
    for i, j, p, q in itertools.product(range(h), range(w), range(2), range(2)):
        n = 2 * p + q
        out[2 * i + p, 2 * j + q] = x[i, j, n * c : (n + 1) * c]
    return out


def enlarge(x: torch.Tensor) -> torch.Tensor:
    x = interpolate(x.permute(2, 0, 1)[None], scale_factor=2, mode="bilinear", align_corners=False)
    return x[0].permute(1, 2, 0)


def by_formula(head, mask_features: str, img, v1, vhq, seg):
    """Mask and auxiliary mask of one query on one grid, as in the table of the paper's method."""
    if mask_features == "baseline":
        return img @ seg / math.sqrt(C), None
    if mask_features == "replication":
        return vhq @ seg / math.sqrt(C), img @ seg / math.sqrt(C)
    if mask_features == "rfr":
        return (vhq + enlarge(img - v1)) @ seg / math.sqrt(C), img @ seg / math.sqrt(C)
    query = head.f_out(head.f_llm(seg).reshape(4, C).mean(0))
    own = expand(head.f_llm(img))
    residual = own - expand(head.f_vit(v1))
    features = head.f_out(expand(head.f_vit(vhq)) + enlarge(residual))
    auxiliary = head.f_out(own) if head.auxiliary_projection else own
    return features @ query / math.sqrt(C), auxiliary @ query / math.sqrt(C)


def expected_of(head, mask_features: str, x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What the head must return: masks of all conversations, then their auxiliary masks."""
    masks, auxiliary, own, query = [], [], 0, 0
    for tile, grid, count in CONVERSATIONS:
        tiles = grid[0] * grid[1]
        sides = [stitch(x["img"][own : own + tiles], grid)]
        sides += [stitch(x[name][tile : tile + tiles], grid) for name in ("v1", "vhq")]
        pairs = [by_formula(head, mask_features, *sides, seg) for seg in x["seg"][query : query + count]]
        masks.append(torch.stack([mask for mask, _ in pairs]))
        auxiliary += [torch.stack([other for _, other in pairs])] if pairs[0][1] is not None else []
        own, query = own + tiles, query + count
    return masks + auxiliary


@pytest.mark.parametrize(("mask_features", "projection"), SWITCHES)
def test_masks_and_gradients_follow_the_formulas(mask_features, projection):
    head, x = make(mask_features, projection), inputs()
    logits, expected = head(*x.values(), CONVERSATIONS), expected_of(head, mask_features, x)
    assert isinstance(logits, tuple) and len(logits) == (1 if mask_features == "baseline" else 2)
    found = [
        part.view_as(mask) for part, mask in zip(torch.cat(logits).split([x.numel() for x in expected]), expected)
    ]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    wanted = [*head.parameters(), *(value for name, value in x.items() if name in USED.get(mask_features, x))]
    losses = [sum(mask.pow(2).sum() for mask in masks) for masks in (found, expected)]
    for ours, theirs in zip(*(torch.autograd.grad(loss, wanted) for loss in losses)):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(ours, theirs)


def test_mlps_run_once_whatever_the_number_of_conversations():
    head, calls = make("rfa", False), {"f_llm": 0, "f_vit": 0}
    for name in calls:
        head.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    head(*inputs().values(), CONVERSATIONS)
    assert calls == {"f_llm": 2, "f_vit": 2}  # image tokens and [SEG]; V1 and VHQ
