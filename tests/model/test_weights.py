"""The four checkpoint layouts: read, refused, resized, written; what strangers put into them never runs."""

import json
import os
import pickle
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from helpers import Calls, each_pack, files, make_trained, noise, read_json
from safetensors.torch import load_file, save_file
from transformers.utils.logging import set_tqdm_hook

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.distributed import run_program
from self1e.errors import UserError
from self1e.evaluation.results import checkpoint_folder, weights_identity
from self1e.model.config import LOSS_WEIGHTS
from self1e.model.head import HEADS
from self1e.model.weights import HEAD, save_checkpoint

HEAD_NAMES = {"f_llm": "combine_decode_proj_all", "f_vit": "combine_decode_proj_ori", "f_out": "combine_decode_proj"}


def load(version, **options) -> Self1EForSegmentation:
    return Self1EForSegmentation.from_pretrained(version, **options)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def rewritten(folder: Path, target: Path, change) -> Path:
    """A copy of a checkpoint in one file, its tensors passed through `change`."""
    ignored = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(folder, target, ignore=ignored, dirs_exist_ok=True)
    weights = {name: x.clone().contiguous() for name, x in change(read_weights(folder)).items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def edit(folder: Path, **values) -> None:
    """Add values to `config.json`, and to each configuration in it."""
    config = read_json(folder / "config.json")
    for part in [config, *(value for name, value in config.items() if name.endswith("_config"))]:
        part.update(values)
    (folder / "config.json").write_text(json.dumps(config))


def same_weights(a, b, *, but: tuple[str, ...] = (HEAD,)) -> bool:
    """Equal tensors, except those whose name starts with `but` (a fresh head is random)."""
    a, b = ({k: x for k, x in m.state_dict().items() if not k.startswith(but)} for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


@torch.no_grad()
def outputs(model, processor) -> list[torch.Tensor]:
    conversations = [["<image>\nhi", "[SEG] and [SEG]."], ["<image>\nwhat is this", "It."]]
    out = model.eval()(**processor(images=[noise(110, 50)], conversations=[conversations], max_tiles=2))
    return [out.loss, *out.mask_logits]


def same_outputs(a, b, processor) -> bool:
    return all(torch.equal(x, y) for x, y in zip(outputs(a, processor), outputs(b, processor), strict=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint of our own. Not to be written to."""
    return make_trained(tmp_path_factory.mktemp("weights") / "trained")


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.mark.parametrize("llm", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_layouts_shards_and_namings_give_one_model(make_tiny, tmp_path, llm, tied):
    options = {"llm": llm, "tie_word_embeddings": tied}
    chat = make_tiny(**options)
    expected = load(chat)
    assert expected.dtype == torch.float32 and not expected.training and not expected.trained_head
    original = load_file(chat / "model.safetensors")
    vocabulary = len(original["language_model.model.embed_tokens.weight"])
    rows = expected.get_input_embeddings().weight[:vocabulary]
    assert torch.equal(rows, original["language_model.model.embed_tokens.weight"].float())
    assert (expected.lm_head.weight is expected.get_input_embeddings().weight) == tied
    assert same_weights(load(make_tiny(shards=3, **options)), expected)

    native = make_tiny(layout="hf", **options)

    def first_hf(weights):
        """Names of the first -hf repositories: submodules without `model.`, the LLM's classes nested."""
        old = {}
        for name, x in newest(weights).items():
            name = re.sub(r"^model\.(vision_tower|multi_modal_projector)", r"\1", name)
            name = re.sub(r"^model\.language_model", "language_model.model", name)
            old[re.sub(r"^lm_head", "language_model.lm_head", name)] = x
        return old

    def newest(weights):
        """Names of the model's own modules, whatever the library wrote."""
        names = {}
        for name, x in weights.items():
            name = re.sub(r"^(vision_tower|multi_modal_projector)", r"model.\1", name)
            name = re.sub(r"^language_model\.lm_head", "lm_head", name)
            names[re.sub(r"^language_model\.(?:model\.)?", "model.language_model.", name)] = x
        assert all(name.startswith(("model.", "lm_head.")) for name in names)
        return names

    for folder in (native, rewritten(native, tmp_path / "old", first_hf), rewritten(native, tmp_path / "new", newest)):
        assert same_weights(load(folder), expected), folder


def test_new_tokens_start_at_the_mean_of_the_old(tiny_version, tiny_processor):
    model = load(tiny_version)
    old = load_file(tiny_version / "model.safetensors")
    size = len(tiny_processor.tokenizer)
    assert model.config.text_config.vocab_size == size == len(model.lm_head.weight)
    assert (model.config.seg_token_id, model.config.image_token_id) == (
        tiny_processor.seg_token_id, tiny_processor.image_token_id
    )  # fmt: skip
    matrices = {"model.embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    for name, module in matrices.items():
        matrix = old[f"language_model.{name}.weight"].float()
        assert torch.equal(module.weight[:-2], matrix)
        assert torch.allclose(module.weight[-2:], matrix.mean(0).expand(2, -1), atol=1e-6)


@pytest.mark.parametrize("extra", [1, 2, 60])
def test_vocabulary_larger_than_the_tokenizer_shrinks(make_tiny, tmp_path, tiny_processor, extra):
    """Qwen3's embedding has rows that no token uses; [SEG] and [SEGT] must not start from those."""

    def pad(weights):
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            weights[name] = torch.cat([weights[name], 100 * torch.ones(extra, 32, dtype=torch.bfloat16)])
        return weights

    base = make_tiny(llm="qwen3")
    folder = rewritten(base, tmp_path, pad)
    config = read_json(folder / "config.json")
    config["llm_config"]["vocab_size"] += extra
    (folder / "config.json").write_text(json.dumps(config))
    expected, found = load(base), load(folder)
    assert found.config.text_config.vocab_size == len(tiny_processor.tokenizer)
    assert same_weights(found, expected)


def test_dtype(tiny_version, tiny_processor):
    assert load(tiny_version).dtype == torch.float32  # whatever the file says
    model = load(tiny_version, dtype=torch.bfloat16)
    assert {x.dtype for x in model.state_dict().values()} == {torch.bfloat16}
    assert load(tiny_version, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert all(torch.isfinite(x).all() for x in outputs(model, tiny_processor))


def test_a_given_config_is_left_alone(tiny_version):
    config = Self1EForSegmentation.config_class.from_pretrained(tiny_version)
    before = config.to_dict()
    models = [load(tiny_version, config=config, mask_features="rfr", loss_weights={"ce": 0}) for _ in range(2)]
    assert config.to_dict() == before
    assert [m.config.mask_features for m in models] == ["rfr", "rfr"]
    assert models[0].config.loss_weights == LOSS_WEIGHTS | {"ce": 0}
    assert same_weights(*models) and models[0].config.seg_token_id is not None


def test_loading_names_large_weights_and_programs_are_silent_otherwise(tiny_version, capfd, monkeypatch):
    def program():
        load(tiny_version)
        return 0

    hook = set_tqdm_hook(None)
    assert run_program(program) == 0
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("self1e.model.weights.LARGE", 1000)
    assert run_program(program) == 0
    set_tqdm_hook(hook)
    assert re.fullmatch(rf"loading {re.escape(str(tiny_version))} \(0\.\d GB\)\n", capfd.readouterr().err)


def test_unknown_keywords_are_named(tiny_version):
    with pytest.raises(TypeError, match="mask_feature"):
        load(tiny_version, mask_feature="rfr")
    with pytest.raises(UserError, match="bce.*known: ce, "):
        load(tiny_version, loss_weights={"bce": 1})


def test_a_checkpoint_of_an_earlier_version_loads(copy, trained):
    """It names the loss weights otherwise, and holds sums of its files."""
    config = read_json(copy / "config.json")
    del config["loss_weights"], config["weights_id"]
    config |= {"ce_loss_weight": 0.25, "bce_loss_weight": 3.0, "dice_loss_weight": 0.0}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "checksums.json").write_text('{"model.safetensors": {"bytes": 1, "sha256": "0"}}')
    model = load(copy)
    assert model.trained_head and same_weights(model, load(trained), but=())
    assert model.config.loss_weights == LOSS_WEIGHTS | {"ce": 0.25, "mask_bce": 3.0, "mask_dice": 0.0}


MISFITS = {
    "missing": (
        lambda w: {k: x for k, x in w.items() if k != "mlp1.1.bias" and not k.endswith(".ls2")},
        ["missing     model.multi_modal_projector.linear_1.bias",
         "missing     model.vision_tower.encoder.layer.{0, 1}.lambda_2"],
    ),
    "unexpected": (
        lambda w: w | {"extra.weight": torch.ones(1), "language_model.model.other": torch.ones(1)},
        ["unexpected  extra.weight", "unexpected  model.language_model.other"],
    ),
    "shape": (
        lambda w: w | {"mlp1.0.bias": torch.ones(7), "language_model.model.norm.weight": torch.ones(9)},
        ["shape       model.language_model.norm.weight: checkpoint (9,), model (32,)",
         "shape       model.multi_modal_projector.layer_norm.bias: checkpoint (7,), model (128,)"],
    ),
}  # fmt: skip


def test_every_misfit_is_in_one_error(tiny_version, tmp_path):
    folder = tiny_version
    for kind, (change, _) in MISFITS.items():
        folder = rewritten(folder, tmp_path / kind, change)
    with pytest.raises(UserError, match="nothing was loaded") as error:
        load(folder)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[0].startswith(f"{folder}: weights do not fit")
    assert sorted(lines[1:]) == sorted(line for _, found in MISFITS.values() for line in found)


def test_heads_in_pieces_or_of_another_kind_are_refused(trained, tmp_path, tiny_version):
    dropped = f"{HEAD}f_vit.0.bias"
    folder = rewritten(trained, tmp_path / "e", lambda w: {k: x for k, x in w.items() if k != dropped})
    with pytest.raises(UserError, match=f"weights do not fit(.|\n)*missing     {dropped}"):
        load(folder)
    with pytest.raises(UserError, match=rf"unexpected  {HEAD}f_llm.\{{0, 2\}}.bias"):
        load(trained, mask_features="rfr")
    with pytest.raises(UserError, match="weights do not fit"):
        load(tiny_version, weights=tiny_version)  # a base is no trained model


def test_absent_files_are_named(make_tiny, tiny_version, tmp_path):
    with pytest.raises(UserError, match="absent is no folder"):
        load(tiny_version, weights=tmp_path / "absent")
    shards = make_tiny(shards=3)
    second = sorted(shards.glob("model-*"))[1]
    second.unlink()
    with pytest.raises(UserError, match=second.name):
        load(shards)
    for path in shards.glob("model*"):
        path.unlink()
    with pytest.raises(UserError, match="model.safetensors"):
        load(shards)


def test_a_fault_of_the_head_keeps_its_traceback(trained, monkeypatch):
    """Whoever edits the head sees the line that is wrong."""

    def faulty(*args, **kwargs):
        raise AttributeError("no attribute f_lmm")

    monkeypatch.setitem(HEADS, "rfa", faulty)
    with pytest.raises(AttributeError, match="f_lmm"):
        load(trained)


def test_adapters_and_pointers_are_refused(copy, tiny_version):
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "somebody/model"}')
    with pytest.raises(UserError, match=f"{copy} holds a PEFT adapter"):
        load(copy)
    (copy / "adapter_config.json").unlink()
    for name in "model.safetensors", "tokenizer_config.json", "config.json":  # each beside those before
        (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
        for given in {"version": copy}, {"version": tiny_version, "weights": copy}:
            with pytest.raises(UserError, match="git lfs pull"):
                load(**given)
        with pytest.raises(UserError, match="git lfs pull"):
            weights_identity(tiny_version, copy)


def test_no_checkpoint_chooses_kernels_or_other_weights(copy):
    """The library would run an attention kernel of the hub, and read the file that `transformers_weights` names."""
    names = "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"
    edit(copy, **dict.fromkeys(names, "somebody/kernel"), transformers_weights="none.safetensors")
    model = load(copy)
    configs = model.config, model.config.text_config, model.config.vision_config
    assert {config._attn_implementation for config in configs} <= {"sdpa", "eager"}


def test_code_of_a_checkpoint_never_runs(copy, tmp_path):
    """A pickle as weights, `auto_map` with a module beside it, and a chat template that would loop."""
    mark = tmp_path / "was run"
    evil = Calls(os.mkdir, str(mark))
    edit(copy, auto_map=dict.fromkeys(("AutoConfig", "AutoModel"), "evil.Evil"))
    (copy / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (copy / "chat_template.jinja").write_text("{% for i in range(10 ** 12) %}x{% endfor %}")
    assert "range" not in Self1EProcessor.from_pretrained(copy).chat_template
    assert load(copy).trained_head
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({"a": evil}))
    with pytest.raises(Exception, match="(?i)weights.only|pickle"):
        load(copy)
    torch.save({"a": evil}, copy / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only|pickle"):
        load(copy)
    assert not mark.exists()


TIED = {"tie_word_embeddings": True}
SAVED = [
    ("internvl", {"llm": "qwen3", "drop_path_rate": 0.2}),
    ("internvl", TIED),
    ("hf", {"llm": "qwen3"}),
    ("hf", TIED),
]


@pytest.mark.parametrize(("layout", "options"), SAVED)
def test_both_written_layouts_read_back_to_the_bit(make_tiny, load_tiny, tmp_path, layout, options):
    base = make_tiny(**options)
    processor, model = Self1EProcessor.from_pretrained(base), load_tiny(make_tiny(layout=layout, **options))
    with torch.no_grad():
        model.get_input_embeddings().weight[-2:] += 1  # [SEG] has learned
    save_checkpoint(model, processor, tmp_path / "published", published=True)
    save_checkpoint(model, processor, tmp_path / "own")  # whatever was written or read before
    names = read_weights(tmp_path / "published").keys()
    assert names >= read_weights(base).keys()
    assert {name.split(".")[0] for name in names - read_weights(base).keys()} == set(HEAD_NAMES.values())
    found = {
        "own": load(tmp_path / "own"),
        "own over base": load(base, weights=tmp_path / "own"),
        "published over base": load(base, weights=tmp_path / "published"),
        "published with its tokenizer": load(tmp_path / "published"),
    }
    for name, again in found.items():
        assert again.trained_head, name
        assert same_weights(again, model, but=()), name
        assert same_outputs(again, model, processor), name
        assert again.config.drop_path_rate == options.get("drop_path_rate", 0), name
    assert read_json(tmp_path / "published" / "config.json")["model_type"] == "internvl_chat"
    assert all(name.startswith(("model.", "lm_head", HEAD)) for name in read_weights(tmp_path / "own"))


@each_pack
def test_published_names_and_shapes_are_the_golden_ones(pack, tmp_path):
    base, trained = (pack / name for name in ("base_internvl_chat", "trained_self1e"))
    model = load(base, weights=trained, dtype=torch.bfloat16)
    save_checkpoint(model, Self1EProcessor.from_pretrained(base), tmp_path / "c", published=True)
    theirs, ours = read_weights(trained), read_weights(tmp_path / "c")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name].to(x.dtype)) for name, x in ours.items())
    written, given = (read_json(folder / "config.json") for folder in (tmp_path / "c", trained))
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "rope_theta", "tie_word_embeddings"):
        assert written["llm_config"][key] == given["llm_config"][key]
    with pytest.raises(UserError, match="no tokenizer there.*--version"):
        load(trained)


@pytest.mark.parametrize("mask_features", ["baseline", "replication", "rfr"])
def test_heads_without_parameters_know_if_trained(tiny_version, tiny_processor, tmp_path, mask_features):
    model = load(tiny_version, mask_features=mask_features)
    assert not model.trained_head
    save_checkpoint(model, tiny_processor, tmp_path / "d")
    for again in (load(tmp_path / "d"), load(tiny_version, weights=tmp_path / "d")):
        assert again.trained_head and again.config.mask_features == mask_features
        assert same_outputs(again, model, tiny_processor)
    with pytest.raises(UserError, match="full method only"):
        save_checkpoint(model, tiny_processor, tmp_path / "c", published=True)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("published", [False, True])
def test_a_full_disk_leaves_what_was_there(load_tiny, tiny_processor, tmp_path, published):
    """The limit on file sizes stands for the disk: the weights do not fit, the small files do."""
    model = load_tiny()
    target = tmp_path / "ckpt_model"
    save_checkpoint(model, tiny_processor, target)
    before = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for folder in (target, tmp_path / "new"):
            with pytest.raises(Exception, match="(?i)file too large"):
                save_checkpoint(model, tiny_processor, folder, published=published)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["ckpt_model"]


@pytest.mark.parametrize("size", ["50GB", "100KB"])
def test_save_pretrained_into_any_folder_leaves_a_checkpoint_that_loads(make_tiny, trained, tmp_path, size):
    """One file or several, after one file or several, in another layout, or a pickle and a list of lost shards."""
    model = load(trained)
    other = load(make_tiny(seed=5), loss_weights={"ce": 0.1})
    for kind in ("one", "shards", "published", "pickle"):
        folder = tmp_path / kind
        if kind == "pickle":
            folder.mkdir()
            torch.save(other.state_dict(), folder / "pytorch_model.bin")
            (folder / "model.fp32.safetensors.index.json").write_text('{"weight_map": {"x": "lost.safetensors"}}')
        elif kind == "published":
            shutil.copytree(make_tiny(shards=3), folder)
        else:
            other.save_pretrained(folder, max_shard_size="50GB" if kind == "one" else "100KB")
        model.save_pretrained(folder, max_shard_size=size)
        assert same_weights(load(folder), model, but=()), kind


def test_a_run_s_folder_means_its_checkpoint(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run / "ckpt_model")
    assert checkpoint_folder(str(run)) == str(run / "ckpt_model")
    for text in (str(trained), "OpenGVLab/InternVL3-2B", str(tmp_path / "none")):
        assert checkpoint_folder(text) == text


def test_weights_are_told_apart_wherever_they_lie(trained, tiny_version, make_tiny, copy, tmp_path):
    ours = weights_identity(trained)
    assert ours == weights_identity(copy) and ours["base"] is None
    assert weights_identity(tiny_version, trained) == ours | {"base": weights_identity(tiny_version)["weights"]}
    load(trained).save_pretrained(copy)  # every save is another one
    assert weights_identity(copy)["weights"] != ours["weights"]
    moved = shutil.copytree(tiny_version, tmp_path / "moved")
    assert weights_identity(moved) == weights_identity(tiny_version)
    assert weights_identity(make_tiny(seed=9)) != weights_identity(tiny_version)
    with pytest.raises(UserError, match="no folder"):
        weights_identity(tmp_path / "absent")
