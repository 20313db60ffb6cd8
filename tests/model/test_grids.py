"""Grids: every reshape against index arithmetic on small grids."""

import pytest
import torch
from torch.nn.functional import interpolate

from self1e.model.grids import REPLICATIONS, compress, expand, resize, stitch_tiles


def grid(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize(("h", "w"), [(2, 2), (1, 3), (3, 2)])
def test_compress_and_expand_are_inverse_and_row_major(h, w, ratio):
    x = grid(2, h * ratio, w * ratio, 5)
    small = compress(x, ratio)
    assert small.shape == (2, h, w, 5 * ratio**2)
    for i in range(h):
        for j in range(w):
            block = x[:, i * ratio : (i + 1) * ratio, j * ratio : (j + 1) * ratio]
            assert torch.equal(small[:, i, j], block.reshape(2, -1))  # (p q c)
    assert torch.equal(expand(small, ratio), x)


def test_stitched_tiles_stand_row_by_row():
    tiles = torch.arange(2 * 6).reshape(12, 1, 1, 1).expand(12, 2, 2, 1)  # two images of 2 x 3 tiles
    image = stitch_tiles(tiles, (2, 3))
    assert image.shape == (2, 4, 6, 1)
    assert image[0, ::2, ::2, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert image[1, 1::2, 1::2, 0].tolist() == [[6, 7, 8], [9, 10, 11]]


def test_tile_repeats_the_channels():
    x = torch.tensor([[[[1.0, 2.0]]]])
    assert REPLICATIONS["tile"](x).flatten().tolist() == [1, 2, 1, 2, 1, 2, 1, 2]


def test_window_by_hand():
    x = torch.tensor([[0.0, 1, 2], [3, 4, 5], [6, 7, 8]]).reshape(1, 3, 3, 1)
    # 2 x 2 windows at stride 1, resized 2 -> 3 bilinearly without aligned corners: ends kept, centre the mean.
    windows = torch.tensor([[[0.0, 1, 3, 4], [1, 2, 4, 5]], [[3, 4, 6, 7], [4, 5, 7, 8]]])
    found = REPLICATIONS["window"](x)[0]
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert torch.allclose(found[2 * i, 2 * j], windows[i, j])
    assert torch.allclose(found[1, 1], windows.mean((0, 1)))
    assert torch.allclose(found[0, 1], windows[0].mean(0))


def test_interpolate_by_hand():
    x = torch.tensor([[0.0, 4.0], [8.0, 12.0]]).reshape(1, 2, 2, 1)
    # A row [0, 4] enlarged: [0, 1, 3, 4], a column [0, 8]: [0, 2, 6, 8]; each cell holds its own 2 x 2 block.
    blocks = [[[0, 1, 2, 3], [3, 4, 5, 6]], [[6, 7, 8, 9], [9, 10, 11, 12]]]
    assert REPLICATIONS["interpolate"](x)[0].tolist() == blocks


def test_resize_is_channels_last_bilinear():
    x = grid(2, 3, 4, 5)
    expected = interpolate(x.permute(0, 3, 1, 2), size=(5, 9), mode="bilinear", align_corners=False)
    assert torch.equal(resize(x, (5, 9)), expected.permute(0, 2, 3, 1))
