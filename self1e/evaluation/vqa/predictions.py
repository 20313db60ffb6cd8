"""Replies on disk: written as they are made, by any number of processes, and taken up again after an interruption."""

import json
from collections.abc import Sequence
from pathlib import Path

from self1e.evaluation.runtime import write_text
from self1e.evaluation.vqa.benchmarks import Answer, Question


class Predictions:
    """The replies to one benchmark, on disk: `<name>.jsonl` in file order, `<name>.rank<r>.jsonl` while they are made.

    A line: `index` (place in the question file), `question_id`, `prompt`, `answer`. `<name>.settings.json` says what
    produced them; replies of other settings are never mixed in or reused.
    """

    def __init__(self, folder: Path, name: str, questions: Sequence[Question]):
        self.path, self.settings_path = folder / f"{name}.jsonl", folder / f"{name}.settings.json"
        self.questions = questions

    def _rank_paths(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.rank*.jsonl"))

    def read(self) -> dict[int, str]:
        """Index -> reply. The last line of a file may be torn; anything else wrong raises ValueError with the fix."""
        replies = {}
        for path in [self.path, *self._rank_paths()]:
            lines = path.read_bytes().split(b"\n") if path.is_file() else []
            for number, line in enumerate(lines, 1):
                if not line:
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    if number == len(lines):  # no newline behind it: the run was stopped while writing
                        continue
                    raise ValueError(f"{path}, line {number} is not JSON ({error}); delete the file") from error
                index = row["index"]
                known = self.questions[index] if index < len(self.questions) else None
                if known is None or (row["question_id"], row["prompt"]) != (known.id, known.prompt):
                    raise ValueError(
                        f"{path}, line {number} answers another question than the data folder holds now; delete the "
                        "file or use another --exp_name"
                    )
                replies[index] = row["answer"]
        return replies

    def open(self, settings: dict) -> dict[int, str]:
        """Replies that are there already, after their files were joined to one. For one process only.

        Raises ValueError when they were made with other settings.
        """
        replies = self.read()
        if replies:
            before = json.loads(self.settings_path.read_text()) if self.settings_path.is_file() else {}
            differing = [key for key in settings if settings[key] != before.get(key)]
            if differing:
                changes = ", ".join(f"{key}: {before.get(key)} then, {settings[key]} now" for key in differing)
                raise ValueError(
                    f"{self.path} was made with other settings ({changes}); use the same ones, another --exp_name, "
                    f"or delete {self.path.stem}.*jsonl there"
                )
        write_text(self.settings_path, json.dumps(settings, indent=1) + "\n")
        self.join(replies)
        return replies

    def append(self, rank: int, asked: Sequence[int], replies: Sequence[str]) -> None:
        """Add replies of one rank to its own file."""
        with open(self.path.with_name(f"{self.path.stem}.rank{rank}.jsonl"), "a", encoding="utf-8") as file:
            file.write("".join(self._line(index, reply) for index, reply in zip(asked, replies)))

    def join(self, replies: dict[int, str]) -> None:
        """Write all replies to the one file, in file order, and drop the ranks' files. For one process only."""
        write_text(self.path, "".join(self._line(index, replies[index]) for index in sorted(replies)))
        for path in self._rank_paths():
            path.unlink()

    def _line(self, index: int, reply: str) -> str:
        question = self.questions[index]
        row = {"index": index, "question_id": question.id, "prompt": question.prompt, "answer": reply}
        return json.dumps(row, ensure_ascii=False) + "\n"

    def answers(self) -> list[Answer]:
        """Every question with its reply, in file order. Raises ValueError when some are unanswered."""
        replies = self.read()
        if len(replies) < len(self.questions):
            raise ValueError(
                f"{self.path} answers {len(replies)} of {len(self.questions)} questions; run without --score_only"
            )
        return [Answer(question, replies[index]) for index, question in enumerate(self.questions)]
