"""The commands that write synthetic data and tiny models."""

from self1e import cli


def test_the_flags_are_the_makers_own(tmp_path):
    few = ["--train", "2", "--val", "2", "--size", "48", "--simple"]
    assert cli.main(["make-shapes", str(tmp_path / "shapes"), *few]) == 0
    assert len(list((tmp_path / "shapes").glob("dataset/refer_seg/images/mscoco/**/*.jpg"))) == 8
    sizes = ["--image_size", "28", "--width", "32", "--layers", "1", "--vision_layers", "1", "--vision_width", "32"]
    assert cli.main(["make-tiny", str(tmp_path / "tiny"), *sizes, "--tie_word_embeddings"]) == 0
    assert (tmp_path / "tiny" / "config.json").is_file()
