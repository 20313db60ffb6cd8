"""Processes, the choice of weights, files of evaluation programs."""

import pytest

from self1e.evaluation.runtime import Ranks, fingerprint, markdown_table, trained_weights, write_text


@pytest.mark.parametrize("items, size", [(7, 3), (2, 5), (6, 2), (0, 2), (9, 1)])
def test_blocks_cover_everything_once(monkeypatch, items, size):
    blocks = []
    for rank in range(size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        blocks.append(list(Ranks().share(range(items))))
    assert [item for block in blocks for item in block] == list(range(items))
    lengths = [len(block) for block in blocks]
    assert lengths == sorted(lengths, reverse=True) and max(lengths) - min(lengths) <= 1


def test_a_failure_of_any_rank_is_a_value_error():
    def work():
        raise FileNotFoundError("there is no such file")

    with Ranks() as ranks, pytest.raises(ValueError, match="no such file"):
        ranks.run(work)


def test_weights_flag_wins_over_the_experiment(tmp_path):
    assert trained_weights(None, tmp_path, "e") is None
    (tmp_path / "e" / "ckpt_model").mkdir(parents=True)
    assert trained_weights(None, tmp_path, "e") == str(tmp_path / "e" / "ckpt_model")
    assert trained_weights("w", tmp_path, "e") == "w"


def test_fingerprint_follows_content_not_place(tmp_path):
    content = bytes(range(256)) * 4000
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    assert fingerprint(str(tmp_path / "a")) == fingerprint(str(tmp_path / "b"))
    (tmp_path / "b" / "model.safetensors").write_bytes(bytes(len(content)))
    assert fingerprint(str(tmp_path / "a")) != fingerprint(str(tmp_path / "b"))
    assert fingerprint("OpenGVLab/InternVL3-2B") == "OpenGVLab/InternVL3-2B"


def test_failed_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "new" / "f.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "new" / "f.txt", "\ud800")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f.txt"]
    assert (tmp_path / "new" / "f.txt").read_text() == "old"


def test_table_lines_up():
    lines = markdown_table(["name", "x"], [["a|b", "1.00"], ["c", "10.00"]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[2] == "| a\\|b |  1.00 |"
