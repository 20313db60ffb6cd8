"""The VQA benchmarks by name. One more is a module with a `VQABenchmark`, and an entry here."""

from collections.abc import Iterable

from self1e.errors import check_known
from self1e.evaluation.vqa import gqa, mmbench, mme, open_ended, pope
from self1e.evaluation.vqa.base import VQABenchmark

VQA_BENCHMARKS: dict[str, VQABenchmark] = {
    **open_ended.BENCHMARKS,
    **gqa.BENCHMARKS,
    **pope.BENCHMARKS,
    **mme.BENCHMARKS,
    **mmbench.BENCHMARKS,
}


def get_vqa_benchmarks(names: Iterable[str]) -> dict[str, VQABenchmark]:
    """The entries of `names`, in that order. Raises UserError listing unknown names and the known ones."""
    names = list(names)
    check_known("unknown VQA benchmark", names, VQA_BENCHMARKS)
    return {name: VQA_BENCHMARKS[name] for name in names}
