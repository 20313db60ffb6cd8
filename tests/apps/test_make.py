"""The commands that write synthetic data and tiny models."""

import pytest

from self1e import cli


def test_the_flags_are_the_makers_own(tmp_path, capsys):
    assert (
        cli.main(["make-shapes", str(tmp_path / "shapes"), "--train", "2", "--val", "2", "--size", "48", "--simple"])
        == 0
    )
    assert len(list((tmp_path / "shapes").glob("dataset/refer_seg/images/mscoco/**/*.jpg"))) == 8
    sizes = ["--image_size", "28", "--width", "32", "--layers", "1", "--vision_layers", "1", "--vision_width", "32"]
    assert cli.main(["make-tiny", str(tmp_path / "tiny"), *sizes, "--tie_word_embeddings"]) == 0
    assert (tmp_path / "tiny" / "config.json").is_file()


@pytest.mark.parametrize("words", [["make-shapes", "--size", "20"], ["make-tiny", "--image_size", "42"]])
def test_sizes_that_do_not_fit_are_a_wrong_call(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([words[0], str(tmp_path), *words[1:]])
    assert ended.value.code == 2 and words[1] in capsys.readouterr().err
