"""What an evaluation program needs around the model: processes, the choice of weights, files that are never half."""

import hashlib
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
BLOCK, BLOCKS = 4096, 64


class Ranks:
    """The processes that torchrun started, or this one alone; a context manager.

    Ranks exchange small Python objects only, so gloo serves CPU and GPU runs alike, and a rank may wait a day for
    another one's share of the work.
    """

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0

    def __enter__(self) -> "Ranks":
        if self.size > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=1))
        return self

    def __exit__(self, *_) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def device(self, name: str = "auto") -> torch.device:
        """`auto`, `cpu` or `cuda` -> this rank's device. Raises ValueError where no GPU is to be had."""
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU here; use --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in rank order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def run(self, work: Callable[[], T], *, main_only: bool = False) -> T:
        """Do `work` on every rank, or on the first one, whose result then is everybody's.

        Raises ValueError on every rank when it raises ValueError or OSError on any of them, so that none waits.
        """
        value, error = None, None
        if self.is_main or not main_only:
            try:
                value = work()
            except (ValueError, OSError) as caught:
                error = caught
        errors = [text for text in self.gather(None if error is None else str(error)) if text is not None]
        if errors:
            raise ValueError(errors[0]) from error
        return self.gather(value)[0] if main_only else value

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's contiguous block; sizes differ by at most one, larger blocks first."""
        small, larger = divmod(len(items), self.size)
        start = self.rank * small + min(self.rank, larger)
        return items[start : start + small + (self.rank < larger)]


def trained_weights(weights: str | None, log_base_dir: Path, exp_name: str) -> str | None:
    """`--model_weights` if given, else `<log_base_dir>/<exp_name>/ckpt_model` if it is there, else None."""
    checkpoint = log_base_dir / exp_name / "ckpt_model"
    return weights or (str(checkpoint) if checkpoint.is_dir() else None)


def fingerprint(checkpoint: str) -> str:
    """Tells checkpoints apart wherever they lie: a folder's file names, sizes, and blocks sampled all over its files.

    A name that is no folder (a hub id) is its own fingerprint.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return checkpoint
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".txt", ".safetensors", ".bin"}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(BLOCK, size // BLOCKS)):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that it appears complete or not at all; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """A Markdown table whose columns also line up in a terminal; all but the first `text_columns` flush right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * w if i < text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    lines = (
        [cell.ljust(w) if i < text_columns else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        for row in cells
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
