"""Checkpoint folders from strangers: one message that names the folder, no other exception, nothing run."""

import json
import os
import pickle
import shutil

import pytest
import torch
from helpers import make_trained
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from self1e import Self1EForSegmentation, Self1EProcessor

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=True) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)
FUZZ = settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def refused_or_loaded(folder) -> None:
    """Loading works, or is a ValueError or OSError that names the folder."""
    for loader in (Self1EForSegmentation, Self1EProcessor):
        try:
            loader.from_pretrained(folder)
        except (ValueError, OSError) as error:
            assert str(folder) in str(error), error


@pytest.fixture
def copy(tiny_version, tmp_path):
    return shutil.copytree(tiny_version, tmp_path / "copy")


@seed(0)
@FUZZ
@given(data=st.data())
def test_any_value_in_config_json(copy, data):
    path = copy / "config.json"
    kept = path.read_text()
    values = json.loads(kept)
    section = data.draw(st.sampled_from([values, values["llm_config"], values["vision_config"]]))
    name = data.draw(st.sampled_from(sorted(section)))
    section[name] = data.draw(JUNK)
    path.write_text(json.dumps(values))
    refused_or_loaded(copy)
    path.write_text(kept)


@seed(0)
@FUZZ
@given(data=st.data())
def test_flipped_and_cut_bytes_of_the_weights(copy, data):
    path = copy / "model.safetensors"
    kept = path.read_bytes()
    header = int.from_bytes(kept[:8], "little") + 8
    at, flip = data.draw(st.integers(0, header)), data.draw(st.integers(1, 255))
    broken = kept[:at] + bytes([kept[at] ^ flip]) + kept[at + 1 :]
    path.write_bytes(broken[:at] if data.draw(st.booleans()) else broken)
    refused_or_loaded(copy)
    path.write_bytes(kept)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("damaged") / "trained")


@seed(0)
@FUZZ
@given(data=st.data())
def test_one_flipped_byte_of_our_own_weights_is_told(trained, data):
    """Anywhere in the file; flipped in the middle of a tensor, no library would notice."""
    path = trained / "model.safetensors"
    kept = path.read_bytes()
    at, flip = data.draw(st.integers(0, len(kept) - 1)), data.draw(st.integers(1, 255))
    path.write_bytes(kept[:at] + bytes([kept[at] ^ flip]) + kept[at + 1 :])
    with pytest.raises(ValueError, match="model.safetensors holds other bytes .* checksums.json"):
        Self1EForSegmentation.from_pretrained(trained)
    path.write_bytes(kept)


INDICES = {
    "no JSON": "{",
    "nested without end": "[" * 100_000,
    "a list": "[]",
    "no map": "{}",
    "numbers for files": '{"weight_map": {"a": 1}}',
    "outside": '{"weight_map": {"a": "../other/model.safetensors"}}',
    "absolute": '{"weight_map": {"a": "/etc/passwd"}}',
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_is_none_or_points_outside(make_tiny, name):
    folder = make_tiny(shards=3)
    (folder / "model.safetensors.index.json").write_text(INDICES[name])
    with pytest.raises(ValueError, match="model.safetensors.index.json: (damaged|names a file outside)"):
        Self1EForSegmentation.from_pretrained(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"image_size": [1], "tile_tokens": 4}', "{"])
def test_a_damaged_processor_config(copy, text):
    (copy / "processor_config.json").write_text(text)
    with pytest.raises(ValueError, match="processor_config.json: damaged"):
        Self1EProcessor.from_pretrained(copy)


@pytest.mark.parametrize("entry", [5, None, {}, {"bytes": "7"}])
def test_sums_that_are_none(trained, tmp_path, entry):
    folder = shutil.copytree(trained, tmp_path / "copy")
    (folder / "checksums.json").write_text(json.dumps({"model.safetensors": entry}))
    with pytest.raises(ValueError, match=f"{folder}/model.safetensors has no size and sum"):
        Self1EForSegmentation.from_pretrained(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", "null", '{"model": "a"}', "{"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer(copy, name, text):
    (copy / name).write_text(text)
    refused_or_loaded(copy)
    (copy / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=f"{copy}: its tokenizer is damaged"):
        Self1EProcessor.from_pretrained(copy)


def edit(folder, **values) -> None:
    """Add values to the top of `config.json` and to each configuration in it."""
    config = json.loads((folder / "config.json").read_text())
    for part in [config, config["text_config"], config["vision_config"]]:
        part.update(values)
    (folder / "config.json").write_text(json.dumps(config))


def test_no_checkpoint_chooses_kernels_or_other_weights(trained, tmp_path):
    """The library would run an attention kernel of the hub, and read the file that `transformers_weights` names."""
    folder = shutil.copytree(trained, tmp_path / "copy")
    names = "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"
    edit(folder, **dict.fromkeys(names, "somebody/kernel"), transformers_weights="none.safetensors")
    model = Self1EForSegmentation.from_pretrained(folder)
    configs = model.config, model.config.text_config, model.config.vision_config
    assert {config._attn_implementation for config in configs} <= {"sdpa", "eager"}


def test_quantised_weights_and_adapters_are_refused(trained, tmp_path):
    """Both have the library import packages, and change the weights that the sums of the checkpoint hold."""
    folder = shutil.copytree(trained, tmp_path / "copy")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "somebody/model"}')
    with pytest.raises(ValueError, match=f"{folder} holds a PEFT adapter"):
        Self1EForSegmentation.from_pretrained(folder)
    (folder / "adapter_config.json").unlink()
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=f"{folder}: config.json speaks of quantised weights"):
        Self1EForSegmentation.from_pretrained(folder)


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_of_a_checkpoint_never_runs(copy, tmp_path):
    """A pickle as weights, `auto_map` with a module beside it, and a chat template that would loop."""
    mark = tmp_path / "was run"
    values = json.loads((copy / "config.json").read_text())
    values["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel"), "evil.Evil")
    (copy / "config.json").write_text(json.dumps(values))
    (copy / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (copy / "chat_template.jinja").write_text("{% for i in range(10 ** 12) %}x{% endfor %}")
    processor = Self1EProcessor.from_pretrained(copy)
    assert "range" not in processor.chat_template
    assert Self1EForSegmentation.from_pretrained(copy).dtype == torch.float32
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Bomb(mark)}))
    with pytest.raises((ValueError, OSError)):
        Self1EForSegmentation.from_pretrained(copy)
    torch.save({"a": Bomb(mark)}, copy / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError)):
        Self1EForSegmentation.from_pretrained(copy)
    assert not mark.exists()
