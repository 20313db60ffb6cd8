"""The flags: the recipe as default, the published commands, YAML files, and what cannot be meant together."""

import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT

from self1e.data.splits import DEFAULT_SPLITS
from self1e.errors import UserError
from self1e.training.args import make_parser, parse

RECIPE = """
  --version=PATH/InternVL3-2B --dataset_dir=./dataset --exp_name=NAME
  --dataset="sem_seg||refer_seg||reason_seg||vqa" --sample_rates="{rates}" --batch_size 5 --grad_accumulation_steps 8
  --gradient_checkpointing --model_max_length 512 --explanatory -1 --lora_r 128 --lora_alpha 256
  --epochs 1 --lr 1e-4 --vision_lr 1e-4 --optimize_vision --use_llm_lora --use_vision_lora"""
NEEDED = ["--version", "owner/name", "--exp_name", "e"]


@pytest.fixture
def launched(monkeypatch):
    names = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in (names | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)


def refusal(capsys, *flags: str) -> str:
    """What a wrong command line prints before it ends with exit code 2."""
    with pytest.raises(SystemExit, match="2"):
        parse([*flags])
    return capsys.readouterr().err


def test_defaults_are_the_recipe():
    args = parse(NEEDED)
    assert (args.lora_r, args.lora_alpha, args.lora_dropout, args.lr, args.vision_lr) == (128, None, 0.05, 1e-4, 1e-4)
    assert (args.batch_size, args.grad_accumulation_steps, args.epochs, args.warmup_steps) == (5, 8, 1, 100)
    assert (args.beta1, args.beta2, args.precision, args.model_max_length) == (0.9, 0.95, "bf16", 512)
    assert (args.mixture, args.num_classes_per_sample, args.sample_rates) == ("published", 3, None)
    assert args.dataset == "sem_seg||refer_seg||reason_seg||vqa" and args.splits == ["ReasonSeg|val"]
    assert args.ce_loss_weight is None and args.mask_features is None  # unset: as the checkpoint has it
    assert args.run_dir == Path("runs/e") and args.final_splits == list(DEFAULT_SPLITS)


@pytest.mark.parametrize("rates", ["1,1,1,1", "6,20,6,1"])
def test_the_published_commands_parse(rates):
    args = parse(shlex.split(RECIPE.format(rates=rates)))
    assert (args.sample_rates, args.lora_alpha, args.explanatory) == (rates, 256, -1)
    assert args.gradient_checkpointing == "full" and args.optimize_vision and args.use_llm_lora


def test_every_flag_has_a_help(capsys):
    assert all(action.help for action in make_parser()._actions)
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    printed = capsys.readouterr().out
    assert "(default: 0.0001)" in printed and "default: None" not in printed


CONTRADICTIONS = """
--use_vision_lora | --use_llm_lora --freeze_llm | --lora_r 8 | --lora_from_layer 1 | --start_epoch 1
--overwrite --auto_resume | --compile --gradient_checkpointing selective | --deepspeed configs/zero2.json
--keep_best refcoco|unc|val | --custom_data x.json | --dataset custom --custom_data a.csv | --precision fp8
--save_steps 0 | --max_steps 0 | --lora_alpha 0 --use_llm_lora
--attn_implementation flex_attention | --learning_rate 1 | --out_dim 256 | --lora 1
"""


@pytest.mark.parametrize("flags", re.split(r" \| |\n", CONTRADICTIONS.strip()))
def test_what_cannot_be_meant_is_refused(capsys, flags):
    assert flags.split()[0] in refusal(capsys, *NEEDED, *flags.split())


def test_a_launcher_brings_deepspeed(launched):
    assert parse([*NEEDED, "--local_rank=0"]).deepspeed == ROOT / "configs" / "zero2.json"
    assert parse([*NEEDED, "--deepspeed", str(ROOT / "configs/zero3.json")]).zero_stage == 3


def test_only_the_first_rank_speaks(launched, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert refusal(capsys, *NEEDED, "--batch_size", "x") == ""


def test_splits_of_an_evaluation():
    assert parse([*NEEDED, "--eval_all_only"]).splits == list(DEFAULT_SPLITS)
    assert parse([*NEEDED, "--val_dataset", "refcoco|unc|val||ReasonSeg|val"]).splits[0] == "refcoco|unc|val"
    own = ["--custom_data", "a.csv", "--val_dataset", "custom|b.csv"]
    assert parse([*NEEDED, "--dataset", "custom||vqa", *own]).final_splits == ["custom|b.csv"]
    assert len(parse([*NEEDED, "--dataset", "custom||refer_seg", *own]).final_splits) == len(DEFAULT_SPLITS) + 1


def test_a_run_that_holds_its_model_needs_no_version(tmp_path, capsys):
    flags = ["--exp_name", "run", "--log_base_dir", str(tmp_path)]
    assert "--version" in refusal(capsys, *flags, "--eval_only")
    (tmp_path / "run/ckpt_model").mkdir(parents=True)
    (tmp_path / "run/ckpt_model/config.json").write_text("{}")
    assert parse([*flags, "--eval_only"]).version == str(tmp_path / "run/ckpt_model")
    assert parse([*flags, "--version", str(tmp_path / "run")]).version == str(tmp_path / "run/ckpt_model")
    assert "--version" in refusal(capsys, *flags)  # training starts from another one
    with pytest.raises(UserError, match="/nowhere"):
        parse([*flags, "--eval_only", "--version", "/nowhere"])


def test_yaml_is_a_command_line_that_comes_first(tmp_path):
    recipe, second = tmp_path / "recipe.yaml", tmp_path / "second.yaml"
    recipe.write_text(
        "version: v\nexp_name: 007\nlr: 2.0e-4\nsample_rates: 6,20,6,1\nuse_llm_lora: true\nno_eval: false\n"
        "max_steps: null\nexplanatory: -1\ngradient_checkpointing: true\n"
    )
    second.write_text("lr: 5.0e-4\ngradient_checkpointing: selective\n")
    args = parse(["--config", str(recipe), "--no-use_llm_lora"])
    assert (args.exp_name, args.lr, args.sample_rates, args.max_steps) == ("007", 2e-4, "6,20,6,1", None)
    assert not args.use_llm_lora and not args.no_eval and args.gradient_checkpointing == "full"
    args = parse(["--config", str(recipe), str(second), "--lr", "3e-4"])
    assert args.lr == 3e-4 and args.gradient_checkpointing == "selective"
    second.write_text("gradient_checkpointing: false\nexp_name: no\n")
    args = parse(["--config", str(recipe), str(second)])
    assert args.gradient_checkpointing is None and args.exp_name == "no"


@pytest.mark.parametrize(
    "text", ["learning_rate: 1", "- lr", "lr: [", "lr: [1]", "lr: !!python/object/apply:os.mkdir [a]"]
)
def test_a_yaml_file_that_is_none_is_named(tmp_path, capsys, text):
    (tmp_path / "recipe.yaml").write_text(text)
    assert "recipe.yaml" in refusal(capsys, *NEEDED, "--config", str(tmp_path / "recipe.yaml"))


def test_every_flag_of_the_configs_and_shell_programs_exists():
    """And of the commands that the configs' first lines tell."""
    known = make_parser()._option_string_actions
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        recipe = [ROOT / "configs" / "self1e_2b.yaml"] if path.stem.startswith("ablation") else []
        parse([*NEEDED, "--config", *map(str, recipe), str(path)])
        command = re.search(r"^# Command: +(.*)$", path.read_text(), re.M)
        assert set(re.findall(r"--\w+", command[1])) <= known.keys(), path
    for path in (ROOT / "eval_all.sh", ROOT / "scripts/train_slurm.sh", ROOT / "scripts/quickstart.sh"):
        used = set(re.findall(r"(?<=[\s(])--[a-z]+_\w+", path.read_text()))
        ours = {"--num_processes", "--nproc_per_node"}
        assert used - ours <= known.keys() | {"--train"}, path
