"""`self1e convert`: every way between the four layouts, outputs compared, heads neither lost nor made."""

import json
import shutil

import pytest
import torch
from helpers import each_pack, make_base, make_trained
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps import convert as converter
from self1e.apps.convert import convert
from self1e.cli import main
from self1e.errors import UserError


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Layout -> a folder; trained ones hold the same weights, base ones too."""
    root = tmp_path_factory.mktemp("layouts")
    found = {"internvl": make_base(root / "base", shards=3), "self1e": make_trained(root / "trained", root / "base")}
    convert(str(found["internvl"]), root / "hf", "hf")
    convert(str(found["self1e"]), root / "published", "published")
    return found | {"hf": root / "hf", "published": root / "published"}


def weights(folder, **kwargs) -> dict[str, torch.Tensor]:
    return Self1EForSegmentation.from_pretrained(folder, dtype="auto", **kwargs).state_dict()


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].dtype != other[name].dtype or not one[name].equal(other[name])] == []


@pytest.mark.parametrize(
    ("source", "target"),
    [("self1e", "published"), ("published", "self1e"), ("internvl", "hf"), ("hf", "internvl"), ("hf", "hf")],
)
def test_round_trips_keep_every_bit(sources, tmp_path, source, target):
    convert(str(sources[source]), tmp_path / "there", target)
    convert(str(tmp_path / "there"), tmp_path / "back", source)
    for folder in ("there", "back"):
        found = converter.load(str(tmp_path / folder), None, "auto")[0].state_dict()
        expected = converter.load(str(sources[source]), None, "auto")[0].state_dict()
        head = {name for name in found if name.startswith("segmentation_head.") and source in ("internvl", "hf")}
        assert_same(
            {k: v for k, v in found.items() if k not in head}, {k: expected[k] for k in found if k not in head}
        )
    assert not list(tmp_path.glob(".*"))


def test_base_keeps_its_vocabulary_for_the_stock_model(sources):
    base = json.loads((sources["internvl"] / "config.json").read_text())
    stock, report = InternVLForConditionalGeneration.from_pretrained(sources["hf"], output_loading_info=True)
    assert not any(report.values())
    assert stock.config.text_config.vocab_size == base["llm_config"]["vocab_size"]
    assert type(stock.config).model_type == "internvl" and stock.dtype == torch.bfloat16
    tokens = Self1EProcessor.from_pretrained(sources["hf"])
    assert stock.config.image_token_id == tokens.image_token_id
    model = Self1EForSegmentation.from_pretrained(sources["hf"])
    assert not model.trained_head and model.config.seg_token_id == tokens.seg_token_id


@pytest.mark.parametrize("layout", ["hf", "internvl"])
def test_head_is_dropped_on_request_only(sources, tmp_path, layout):
    with pytest.raises(UserError, match="--drop_head"):
        convert(str(sources["self1e"]), tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()
    convert(str(sources["self1e"]), tmp_path / "out", layout, drop_head=True)
    assert not converter.load(str(tmp_path / "out"), None, "auto")[0].trained_head
    assert not Self1EForSegmentation.from_pretrained(tmp_path / "out").trained_head


def test_no_head_is_invented_and_nothing_overwritten(sources, tmp_path, capsys):
    for layout in ("published", "self1e"):
        with pytest.raises(UserError, match="train it first"):
            convert(str(sources["internvl"]), tmp_path / "out", layout)
    (tmp_path / "taken").mkdir()
    assert main(["convert", str(sources["internvl"]), str(tmp_path / "taken"), "--layout", "hf"]) == 1
    assert "exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_published_weights_without_a_tokenizer_need_their_base(sources, tmp_path, capsys):
    bare = shutil.copytree(sources["published"], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    arguments = ["convert", str(bare), str(tmp_path / "out"), "--layout", "self1e"]
    assert main(arguments) == 1 and "--version" in capsys.readouterr().err
    assert main([*arguments, "--version", str(sources["internvl"])]) == 0
    assert "with the weights of its source and " in capsys.readouterr().out
    assert_same(weights(tmp_path / "out"), weights(sources["self1e"]))
    assert "base_model:" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("name", ["lm_head.weight", "pathway"])
def test_a_copy_that_differs_is_not_left_behind(sources, tmp_path, monkeypatch, name):
    """In a tensor, or in its configuration alone."""
    original = converter.write

    def damaged(model, *args):
        if name in model.state_dict():
            model.get_parameter(name).data[0, 0] += 1
        else:
            model.config.attention_pathway = "causal"
        original(model, *args)
        if name in model.state_dict():
            model.get_parameter(name).data[0, 0] -= 1

    monkeypatch.setattr(converter, "write", damaged)
    message = "1 tensors are not as in .* lm_head.weight" if "." in name else "outputs differ"
    with pytest.raises(RuntimeError, match=message):
        convert(str(sources["self1e"]), tmp_path / "out", "self1e")
    assert not list(tmp_path.iterdir())


def test_tied_embeddings_stay_tied(tmp_path):
    source = make_trained(tmp_path / "tied", tie_word_embeddings=True)
    convert(str(source), tmp_path / "published", "published")
    convert(str(tmp_path / "published"), tmp_path / "back", "self1e")
    convert(str(source), tmp_path / "hf", "hf", drop_head=True)
    assert_same(weights(tmp_path / "back"), weights(source))
    assert "lm_head.weight" not in load_file(tmp_path / "hf/model.safetensors")


@each_pack
def test_published_weights_become_ours(pack, tmp_path):
    base, trained = pack / "base_internvl_chat", pack / "trained_self1e"
    convert(str(trained), tmp_path / "ours", "self1e", version=str(base))
    assert_same(weights(tmp_path / "ours"), weights(base, weights=trained))
