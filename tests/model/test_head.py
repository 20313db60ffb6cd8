"""The head against its formulas written cell by cell, and its documented shapes."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import interpolate

from self1e.model.head import INITIAL_STD, MASK_FEATURES, SegmentationHead

C = 8
# Side of the mask over the side of the image-token grid.
ENLARGED = {"baseline": 1, "replication": 2, "rfr": 2, "rfa": 4}


def make(mask_features: str, *, auxiliary_projection: bool = False) -> SegmentationHead:
    torch.manual_seed(0)
    head = SegmentationHead(C, mask_features=mask_features, auxiliary_projection=auxiliary_projection, ratio=2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head


def inputs(rows: int, h: int, w: int, queries: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"image": (rows, h, w, C), "low": (rows, h, w, C), "high": (rows, 2 * h, 2 * w, C), "seg": (queries, C)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def run(head: SegmentationHead, x: dict[str, torch.Tensor], seg_row: list[int]):
    side = head.image_side(x["low"], x["high"])
    return head(x["image"], x["seg"], side, torch.tensor(seg_row))


def expand_by_loops(x: torch.Tensor) -> torch.Tensor:
    """(h, w, 4 c) -> (2 h, 2 w, c), the channels of a cell being its 2 x 2 patches, row-major."""
    h, w, c = x.shape[0], x.shape[1], x.shape[2] // 4
    out = torch.empty(2 * h, 2 * w, c)
    for i, j, p, q in itertools.product(range(h), range(w), range(2), range(2)):
        n = 2 * p + q
        out[2 * i + p, 2 * j + q] = x[i, j, n * c : (n + 1) * c]
    return out


def enlarge(x: torch.Tensor) -> torch.Tensor:
    x = interpolate(x.permute(2, 0, 1)[None], scale_factor=2, mode="bilinear", align_corners=False)
    return x[0].permute(1, 2, 0)


def by_formula(head: SegmentationHead, image, low, high, seg):
    """Mask and auxiliary mask of one query on one grid, as in the table of the paper's method."""
    if head.mask_features == "baseline":
        return image @ seg / math.sqrt(C), None
    if head.mask_features == "replication":
        return high @ seg / math.sqrt(C), image @ seg / math.sqrt(C)
    if head.mask_features == "rfr":
        return (high + enlarge(image - low)) @ seg / math.sqrt(C), image @ seg / math.sqrt(C)
    query = head.f_out(head.f_llm(seg).reshape(4, C).mean(0))
    own = expand_by_loops(head.f_llm(image))
    residual = own - expand_by_loops(head.f_vit(low))
    features = head.f_out(expand_by_loops(head.f_vit(high)) + enlarge(residual))
    auxiliary = head.f_out(own) if head.auxiliary_projection else own
    return features @ query / math.sqrt(C), auxiliary @ query / math.sqrt(C)


SWITCHES = [*((name, False) for name in MASK_FEATURES), ("rfa", True)]


@pytest.mark.parametrize(("mask_features", "projection"), SWITCHES)
@pytest.mark.parametrize(("h", "w"), [(2, 2), (2, 6), (4, 2)])
@torch.no_grad()
def test_masks_follow_the_formulas(mask_features, projection, h, w):
    head = make(mask_features, auxiliary_projection=projection)
    seg_row = [0, 0, 2, 1, 2]
    x = inputs(3, h, w, len(seg_row))
    mask, auxiliary = run(head, x, seg_row)
    times = ENLARGED[mask_features]
    assert mask.shape == (5, times * h, times * w)
    for m, row in enumerate(seg_row):
        wanted = by_formula(head, x["image"][row], x["low"][row], x["high"][row], x["seg"][m])
        assert torch.allclose(mask[m], wanted[0], atol=1e-5)
        if mask_features == "baseline":
            assert auxiliary is None
        else:
            assert torch.allclose(auxiliary[m], wanted[1], atol=1e-5)


@pytest.mark.parametrize(("mask_features", "projection"), SWITCHES)
def test_every_parameter_and_input_gets_a_gradient(mask_features, projection):
    head = make(mask_features, auxiliary_projection=projection)
    x = {name: value.requires_grad_() for name, value in inputs(2, 2, 4, 2).items()}
    mask, auxiliary = run(head, x, [0, 1])
    (mask.pow(2).sum() + (0 if auxiliary is None else auxiliary.pow(2).sum())).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())
    used = {"baseline": ("image", "seg"), "replication": ("image", "high", "seg")}.get(mask_features, tuple(x))
    assert {name for name, value in x.items() if value.grad is not None} == set(used)


def test_ablations_have_no_parameters_and_the_full_head_starts_small():
    assert all(not list(make(name).parameters()) for name in ("baseline", "replication", "rfr"))
    head = SegmentationHead(64, mask_features="rfa", auxiliary_projection=False, ratio=2)
    names = itertools.product(("f_llm", "f_vit", "f_out"), "02", ("weight", "bias"))
    assert set(head.state_dict()) == {".".join(name) for name in names}
    assert head.f_llm[2].weight.shape == head.f_vit[2].weight.shape == (256, 64)
    for name, value in head.state_dict().items():
        if name.endswith("bias"):
            assert not value.any()
        else:
            assert value.std().item() == pytest.approx(INITIAL_STD, rel=0.05)  # thousands of draws
