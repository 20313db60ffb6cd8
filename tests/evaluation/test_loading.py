"""Photos read ahead: in their order, and without the library's advice on the number of workers."""

import os
import warnings

from self1e.evaluation.loading import read_ahead


class Squares:
    def __getitem__(self, number):
        return number**2


def test_items_come_in_order_and_quietly_where_cores_are_few(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(read_ahead(Squares(), [3, 1, 2], workers=2, name=str)) == [9, 1, 4]
