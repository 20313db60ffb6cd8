"""The model card: what it knows, what stays of it, and whose figures it shows."""

import pytest
from helpers import make_trained, read_json
from huggingface_hub import ModelCard

from self1e import Self1EForSegmentation
from self1e.cli import main
from self1e.evaluation.results import weights_identity
from self1e.files import write_json
from self1e.training.card import write_card

TABLE = "| split | gIoU |\n|-------|-----:|\n| refcoco | 59.4 |\n"


@pytest.fixture
def checkpoint(tmp_path):
    return make_trained(tmp_path / "exp/ckpt_model", tmp_path / "base" if (tmp_path / "base").exists() else None)


def evaluate(checkpoint):
    """Leave what an evaluation of the checkpoint leaves."""
    folder = checkpoint.parent / "eval"
    write_json(folder / "settings.json", weights_identity(checkpoint) | {"precision": "float32"})
    (folder / "summary.md").write_text(TABLE)


def test_a_card_says_how_to_use_it_how_it_was_trained_and_what_it_scored(checkpoint, tmp_path):
    command = "deepspeed train_hf_ivl_seq.py --version base \\\n    --exp_name exp"
    card = ModelCard.load(write_card(checkpoint, base_model=str(tmp_path / "exp"), command=command))
    assert card.data.base_model == "exp" and card.data.library_name == "transformers"
    assert "# exp\n" in card.text and f"```bash\n{command}\n```" in card.text and "not been evaluated yet" in card.text

    path = checkpoint / "README.md"
    text = path.read_text().replace("tags:", "license: mit\ntags:").replace("## Use", "My own sentence.\n\n## Use")
    path.write_text(text + "\n## Thanks\n\nTo all.\n")
    evaluate(checkpoint)
    assert main(["card", str(checkpoint.parent)]) == 0
    card = ModelCard.load(path)
    assert (card.data.base_model, card.data.license) == ("exp", "mit")
    for text in (TABLE, command, "My own sentence.", "## Thanks\n\nTo all."):
        assert card.text.count(text) == 1
    assert "not been evaluated yet" not in card.text
    again = path.read_text()
    assert write_card(checkpoint).read_text() == again


def test_figures_of_other_weights_are_left_out(checkpoint):
    evaluate(checkpoint)
    assert "59.4" in write_card(checkpoint).read_text()
    settings = checkpoint.parent / "eval/settings.json"
    write_json(settings, read_json(settings) | {"attention_pathway": "causal"})  # not the checkpoint's
    assert "59.4" not in write_card(checkpoint).read_text()
    evaluate(checkpoint)
    Self1EForSegmentation.from_pretrained(checkpoint).save_pretrained(checkpoint)  # other weights now
    card = ModelCard.load(write_card(checkpoint))
    assert "59.4" not in card.text


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
