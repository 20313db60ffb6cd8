"""The replies to one benchmark on disk."""

from collections.abc import Sequence
from pathlib import Path

from self1e.evaluation.journal import Journal
from self1e.evaluation.provenance import Settings, SettingsFile
from self1e.evaluation.vqa.base import Answer, Question


class Predictions:
    """The replies to one benchmark: `<name>.jsonl` in the order of the questions, and its entry of `settings.json`.

    A line holds `index` (place in the question file), `question_id`, `prompt` and `answer`. Replies that were made
    with other settings, or to other questions, are never mixed in or reused.
    """

    def __init__(self, folder: Path, name: str, questions: Sequence[Question]):
        self.name, self.questions = name, questions
        self.journal, self.settings = Journal(folder / f"{name}.jsonl"), SettingsFile(folder)

    def read(self) -> dict[int, str]:
        """Index -> reply. Raises ValueError for a line that answers no question of the data folder."""
        replies: dict[int, str] = {}
        for place, record in self.journal.read():
            index, reply = record.get("index"), record.get("answer")
            if isinstance(index, int) and isinstance(reply, str) and 0 <= index < len(self.questions):
                if record == self._record(index, reply):
                    replies[index] = reply
                    continue
            raise ValueError(
                f"{place} answers another question than the data folder holds now; use another --exp_name to keep "
                "both, or --overwrite_eval to evaluate anew"
            )
        return replies

    def open(self, settings: Settings, *, overwrite: bool) -> dict[int, str]:
        """The replies that can be kept, for one process, before any rank appends.

        Raises ValueError when there are replies that were made with other settings, unless `overwrite` drops them.
        """
        replies = {} if overwrite else self.read()
        if replies:
            self.settings.check(self.name, settings)
        if len(replies) < len(self.questions):
            self.journal.start(self._record(index, replies[index]) for index in sorted(replies))
            self.settings.record(self.name, settings)
        return replies

    def append(self, asked: Sequence[int], replies: Sequence[str]) -> None:
        """Add replies of this rank to its own file."""
        self.journal.append(self._record(index, reply) for index, reply in zip(asked, replies, strict=True))

    def finish(self) -> None:
        """Write all replies to the one file. For one process, after all have appended."""
        self.journal.finish(self._record(index, reply) for index, reply in sorted(self.read().items()))

    def _record(self, index: int, reply: str) -> dict:
        question = self.questions[index]
        return {"index": index, "question_id": question.id, "prompt": question.prompt, "answer": reply}

    def answers(self) -> list[Answer]:
        """Every question with its reply, in file order. Raises ValueError when some are unanswered."""
        replies = self.read()
        if len(replies) < len(self.questions):
            raise ValueError(
                f"{self.journal.path} answers {len(replies)} of {len(self.questions)} questions; run without "
                "--score_only"
            )
        return [Answer(question, replies[index]) for index, question in enumerate(self.questions)]
