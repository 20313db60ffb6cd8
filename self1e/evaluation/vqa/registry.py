"""The VQA benchmarks by name. One more is a module with a `VQABenchmark`, and an entry here."""

from self1e.evaluation.vqa import gqa, mmbench, mme, open_ended, pope
from self1e.evaluation.vqa.base import VQABenchmark

VQA_BENCHMARKS: dict[str, VQABenchmark] = {
    **open_ended.BENCHMARKS,
    **gqa.BENCHMARKS,
    **pope.BENCHMARKS,
    **mme.BENCHMARKS,
    **mmbench.BENCHMARKS,
}
