"""What the processes of a run share; several real ones run in the tests of training and evaluation."""

import pytest

from self1e import distributed


@pytest.mark.parametrize("items, size", [(7, 3), (2, 5), (6, 2), (0, 2), (9, 1)])
def test_blocks_cover_everything_once(monkeypatch, items, size):
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    blocks = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        blocks.append(list(distributed.share(range(items))))
    assert [item for block in blocks for item in block] == list(range(items))
    lengths = [len(block) for block in blocks]
    assert lengths == sorted(lengths, reverse=True) and max(lengths) - min(lengths) <= 1
