"""The head against its formulas written cell by cell, and its documented shapes."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import interpolate

from self1e.model.head import HEADS, INITIAL_STD, ROWS_AT_ONCE, SegmentationHead

C = 8
# Side of the mask over the side of the image-token grid.
ENLARGED = {"baseline": 1, "replication": 2, "rfr": 2, "rfa": 4}


def make(mask_features: str, *, auxiliary_projection: bool = False) -> SegmentationHead:
    torch.manual_seed(0)
    head = HEADS[mask_features](C, ratio=2, auxiliary_projection=auxiliary_projection)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head


def inputs(rows: int, h: int, w: int, *, photos: int, queries: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"image": (rows, h, w, C), "low": (photos, h, w, C), "high": (photos, 2 * h, 2 * w, C)}
    shapes["seg"] = rows, queries, C
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def run(head: SegmentationHead, x: dict[str, torch.Tensor], row_photo: list[int]):
    sides = head.image_side(x["low"], x["high"])
    return head(x["image"], x["seg"], [sides[photo] for photo in row_photo])


def expand_by_loops(x: torch.Tensor) -> torch.Tensor:
    """(h, w, 4 c) -> (2 h, 2 w, c), the channels of a cell being its 2 x 2 patches, row-major."""
    h, w, c = x.shape[0], x.shape[1], x.shape[2] // 4
    out = x.new_empty(2 * h, 2 * w, c)
    for i, j, p, q in itertools.product(range(h), range(w), range(2), range(2)):
        n = 2 * p + q
        out[2 * i + p, 2 * j + q] = x[i, j, n * c : (n + 1) * c]
    return out


def enlarge(x: torch.Tensor) -> torch.Tensor:
    x = interpolate(x.permute(2, 0, 1)[None], scale_factor=2, mode="bilinear", align_corners=False)
    return x[0].permute(1, 2, 0)


def by_formula(head: SegmentationHead, mask_features: str, image, low, high, seg):
    """Mask and auxiliary mask of one query on one grid, as in the table of the paper's method."""
    if mask_features == "baseline":
        return image @ seg / math.sqrt(C), None
    if mask_features == "replication":
        return high @ seg / math.sqrt(C), image @ seg / math.sqrt(C)
    if mask_features == "rfr":
        return (high + enlarge(image - low)) @ seg / math.sqrt(C), image @ seg / math.sqrt(C)
    query = head.f_out(head.f_llm(seg).reshape(4, C).mean(0))
    own = expand_by_loops(head.f_llm(image))
    residual = own - expand_by_loops(head.f_vit(low))
    features = head.f_out(expand_by_loops(head.f_vit(high)) + enlarge(residual))
    auxiliary = head.f_out(own) if head.auxiliary_projection else own
    return features @ query / math.sqrt(C), auxiliary @ query / math.sqrt(C)


SWITCHES = [*((name, False) for name in HEADS), ("rfa", True)]
ROW_PHOTO = [0] * (ROWS_AT_ONCE + 1) + [1, 2, 2]  # more rows of a photo than are computed together


@pytest.mark.parametrize(("mask_features", "projection"), SWITCHES)
@pytest.mark.parametrize(("h", "w"), [(2, 2), (2, 6), (4, 2)])
@torch.no_grad()
def test_masks_follow_the_formulas(mask_features, projection, h, w):
    head = make(mask_features, auxiliary_projection=projection)
    x = inputs(len(ROW_PHOTO), h, w, photos=3, queries=2)
    mask, auxiliary = run(head, x, ROW_PHOTO)
    times = ENLARGED[mask_features]
    assert mask.shape == (len(ROW_PHOTO), 2, times * h, times * w) and head.upsampling == times
    for (row, photo), k in itertools.product(enumerate(ROW_PHOTO), range(2)):
        photo_side = x["low"][photo], x["high"][photo]
        wanted = by_formula(head, mask_features, x["image"][row], *photo_side, x["seg"][row, k])
        assert torch.allclose(mask[row, k], wanted[0], atol=1e-5)
        if mask_features == "baseline":
            assert auxiliary is None
        else:
            assert torch.allclose(auxiliary[row, k], wanted[1], atol=1e-5)


@pytest.mark.parametrize(("mask_features", "projection"), SWITCHES)
def test_gradients_are_those_of_the_formulas(mask_features, projection):
    """Every parameter and input, the second layer of f_out in the query included, to single precision."""
    head = make(mask_features, auxiliary_projection=projection).double()
    x = {name: value.double().requires_grad_() for name, value in inputs(3, 2, 4, photos=2, queries=1).items()}
    rows = [0, 0, 1]
    gradients = []
    for ours in (True, False):
        if ours:
            pairs = [run(head, x, rows)]
        else:
            pairs = [
                by_formula(head, mask_features, x["image"][n], x["low"][i], x["high"][i], x["seg"][n, 0])
                for n, i in enumerate(rows)
            ]
        loss = sum(part.pow(2).sum() for pair in pairs for part in pair if part is not None)
        inputs_ = {name: value for name, value in x.items() if name in USED.get(mask_features, x)}
        wanted = [*head.parameters(), *inputs_.values()]
        gradients.append(torch.autograd.grad(loss, wanted))
    for found, expected in zip(*gradients):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


USED = {"baseline": ("image", "seg"), "replication": ("image", "high", "seg")}


def test_no_large_tensor_but_the_hidden_layer_of_a_few_rows(monkeypatch):
    """The largest tensor of a pass over many rows of a photo has `ROWS_AT_ONCE` rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(x))
            return out

    head, rows = make("rfa"), 4 * ROWS_AT_ONCE
    x = inputs(rows, 4, 4, photos=1, queries=1)
    with torch.no_grad(), Sizes():
        run(head, x, [0] * rows)
    assert max(sizes) == ROWS_AT_ONCE * 16 * 16 * C


def test_ablations_have_no_parameters_and_the_full_head_starts_small():
    assert all(not list(make(name).parameters()) for name in ("baseline", "replication", "rfr"))
    head = HEADS["rfa"](64, ratio=2)
    names = itertools.product(("f_llm", "f_vit", "f_out"), "02", ("weight", "bias"))
    assert set(head.state_dict()) == {".".join(name) for name in names}
    assert head.f_llm[2].weight.shape == head.f_vit[2].weight.shape == (256, 64)
    for name, value in head.state_dict().items():
        if name.endswith("bias"):
            assert not value.any()
        else:
            assert value.std().item() == pytest.approx(INITIAL_STD, rel=0.05)  # thousands of draws
