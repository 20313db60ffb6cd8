"""The flags: defaults of the recipe, both published commands, refusals in a screenful, YAML files."""

import json
import shlex
from pathlib import Path

import pytest

from self1e.data.splits import DEFAULT_SPLITS
from self1e.training.arguments import ROOT, make_parser, parse
from self1e.training.checkpoint import FREE, STRUCTURE
from self1e.training.flags import REFUSED

RECIPE = """
  --dataset="sem_seg||refer_seg||reason_seg||vqa" --sample_rates="{rates}" --batch_size 5 --grad_accumulation_steps 8
  --gradient_checkpointing --exp_name=NAME --model_max_length 512 --explanatory -1 --lora_r 128 --lora_alpha 256
  --epochs 1 --lr 1e-4 --vision_lr 1e-4 --optimize_vision --use_llm_lora --use_vision_lora"""
NEEDED = ["--version", "v", "--exp_name", "e"]
DEFAULTS = {
    "model_weights": None,
    "precision": "bf16",
    "model_max_length": 512,
    "high_res": False,
    "attn_implementation": "sdpa",
    "use_llm_lora": False,
    "freeze_llm": False,
    "use_vision_lora": False,
    "optimize_vision": False,
    "lora_r": 128,
    "lora_alpha": None,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "lora_from_layer": 0,
    "dataset_dir": Path("dataset"),
    "data_dir": Path("data"),
    "dataset": "sem_seg||refer_seg||reason_seg||vqa",
    "sample_rates": None,
    "sem_seg_data": "ade20k||cocostuff||pascal_part||paco_lvis",
    "refer_seg_data": "refclef||refcoco||refcoco+||refcocog",
    "reason_seg_data": "ReasonSeg|train",
    "vqa_data": "llava_instruct_150k||vqav2||okvqa||textvqa||vizwiz||gqa",
    "explanatory": -1.0,
    "num_classes_per_sample": 3,
    "exclude_val": False,
    "mixture": "published",
    "workers": 4,
    "epochs": 1,
    "start_epoch": 0,
    "steps_per_epoch": None,
    "max_steps": None,
    "batch_size": 5,
    "grad_accumulation_steps": 8,
    "grad_accumulation_reduction": "sum",
    "lr": 1e-4,
    "vision_lr": 1e-4,
    "beta1": 0.9,
    "beta2": 0.95,
    "warmup_steps": 100,
    "ce_loss_weight": 1.0,
    "bce_loss_weight": 2.0,
    "dice_loss_weight": 0.5,
    "gradient_checkpointing": False,
    "deepspeed": None,
    "local_rank": None,
    "log_base_dir": Path("runs"),
    "report_to": "tensorboard",
    "save_steps": 200,
    "eval_steps": 200,
    "val_batch_size": 1,
    "save_total_limit": 1,
    "keep_best": None,
    "timeout": 1800.0,
    "overwrite": False,
    "resume": None,
    "resume_anyway": False,
    "auto_resume": False,
    "no_eval": False,
    "eval_only": False,
    "eval_all_datasets": False,
    "eval_all_only": False,
    "eval_visualize": False,
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def launch(monkeypatch, rank: str) -> None:
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)


def refusal(capsys, *flags: str, needed=NEEDED) -> str:
    """What a wrong command line prints; it must fit a screen and leave with status 2."""
    with pytest.raises(SystemExit) as stop:
        parse([*needed, *flags])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and len(message.splitlines()) <= 8
    return message


def test_defaults_are_the_recipe():
    args = vars(parse(NEEDED))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS
    assert args["splits"] == ["ReasonSeg|val"] and args["run_dir"] == Path("runs/e")


@pytest.mark.parametrize("rates", ["1,1,1,1", "6,20,6,1"])
def test_the_published_commands_parse(rates):
    args = parse(shlex.split("--version=PATH/InternVL3-2B --dataset_dir=./dataset" + RECIPE.format(rates=rates)))
    assert (args.sample_rates, args.batch_size, args.lora_alpha, args.explanatory) == (rates, 5, 256, -1)
    assert args.gradient_checkpointing and args.optimize_vision and args.use_llm_lora and args.use_vision_lora


def test_help_shows_each_flag_with_its_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    groups = ("model:", "what is trained:", "data:", "optimisation:", "logging and checkpoints:", "evaluation:")
    places = [shown.index(f"\n{group}\n") for group in groups]
    assert places == sorted(places)
    for action in make_parser()._actions:
        if action.dest not in REFUSED:
            assert action.help and action.option_strings[0] in shown
    assert "default: None" not in shown and "(default: 0.0001)" in shown and "rank of the adapters" in shown


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("form", ["--{}", "--{}=1", "--{} 1"])
def test_published_flags_without_meaning_are_refused(capsys, name, form):
    assert f"--{name} is refused: {REFUSED[name]}" in refusal(capsys, *form.format(name).split())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--use_vision_lora", "--optimize_vision"),
        ("--use_llm_lora --freeze_llm", "--freeze_llm keeps the LLM's layers"),
        ("--freeze_llm --lora_r 8", "--use_llm_lora"),
        ("--lora_r 8", "--use_llm_lora"),
        ("--lora_alpha=8", "--use_llm_lora"),
        ("--lora_dropout 0.1", "--use_llm_lora"),
        ("--lora_from_layer 1", "add --use_llm_lora"),
        ("--optimize_vision --use_vision_lora --lora_target_modules q_proj", "add --use_llm_lora"),
        ("--start_epoch 1", "epochs are 0 to 0"),
        ("--start_epoch 1 --epochs 2 --auto_resume", "without a checkpoint"),
        ("--resume r --auto_resume", "give one of them"),
        ("--eval_only --no_eval", "nothing to do"),
        ("--eval_visualize --no_eval", "give one of them"),
        ("--deepspeed configs/zero2.json", "needs a launcher"),
        ("--local_rank 0", "for launchers"),
        ("--workers -1", "--workers: -1: expected a whole number of at least 0"),
        ("--warmup_steps -1", "at least 0"),
        ("--batch_size 0", "--batch_size: 0: expected a whole number of at least 1"),
        ("--batch_size two", "--batch_size: 'two': expected a whole number"),
        ("--lr 0", "--lr: 0: expected a number above 0"),
        ("--vision_lr nan", "--vision_lr: nan: expected a number above 0"),
        ("--dice_loss_weight -0.5", "-0.5: expected a number from 0 on"),
        ("--lora_dropout 1", "from 0 on and below 1"),
        ("--val_batch_size 2", "choose from"),
        ("--precision fp8", "choose from"),
        ("--mask_features full", "choose from"),
        ("--attn_implementation flex_attention", "invalid choice: 'flex_attention'"),
        ("--custom_data x.json", "--dataset"),
        ("--learning_rate 1", "there is no flag --learning_rate"),
        ("--lora 1", "there is no flag --lora"),
    ],
)
def test_what_cannot_be_meant_is_refused(capsys, flags, says):
    assert says in refusal(capsys, *flags.split())


def test_only_the_first_rank_speaks(capsys, monkeypatch):
    launch(monkeypatch, "1")
    assert refusal(capsys, "--batch_size", "0") == ""


def test_a_launcher_brings_deepspeed(capsys, monkeypatch, tmp_path):
    launch(monkeypatch, "0")
    assert parse([*NEEDED, "--local_rank=0"]).deepspeed == ROOT / "configs" / "zero2.json"
    assert "contradicts" in refusal(capsys, "--local_rank=1")
    assert "no DeepSpeed configuration" in refusal(capsys, "--deepspeed", str(tmp_path / "absent.json"))
    zero3 = str(ROOT / "configs" / "zero3.json")
    assert parse([*NEEDED, "--deepspeed", zero3]).deepspeed == Path(zero3)


def test_evaluation_flags():
    assert len(parse([*NEEDED, "--eval_all_datasets"]).splits) == 13
    args = parse([*NEEDED, "--eval_all_only"])
    assert args.eval_only and len(args.splits) == 13
    assert parse([*NEEDED, "--val_dataset", "refcoco|unc|val||ReasonSeg|val"]).splits[0] == "refcoco|unc|val"


def test_yaml_is_a_command_line_that_comes_first(capsys, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "version: v\nexp_name: e\nlr: 2.0e-4\nsample_rates: 6,20,6,1\ndataset: sem_seg||vqa\nuse_llm_lora: true\n"
        "gradient_checkpointing: false\nno_eval: false\nmax_steps: null\nexplanatory: -1\n"
    )
    args = parse(["--config", str(config), "--lr", "3e-4", "--no-use_llm_lora"])
    assert (args.version, args.lr, args.sample_rates, args.dataset) == ("v", 3e-4, "6,20,6,1", "sem_seg||vqa")
    assert not args.use_llm_lora and not args.gradient_checkpointing and not args.no_eval
    second = tmp_path / "ablation.yaml"
    second.write_text("lr: 5.0e-4\n")
    assert parse(["--config", str(config), str(second)]).lr == 5e-4
    for text, says in {
        "learning_rate: 1": "learning_rate is no flag",
        "batch_size: 0": "--batch_size: 0: expected a whole number of at least 1",
        "out_dim: 256": "--out_dim is refused",
        "- lr": "expected lines",
        "lr: [": "recipe.yaml",
        "lr: [1]": "lr holds several values; expected one",
        "lr: " + "[" * 100_000: "recipe.yaml",
        "lr: !!python/object/apply:os.mkdir [ran]": "recipe.yaml",
        f"lr: [&a0 [x, x], {', '.join(f'&a{k} [*a{k - 1}, *a{k - 1}]' for k in range(1, 60))}]": "several values",
    }.items():
        config.write_text(text)
        assert says in refusal(capsys, "--config", str(config))
    assert "No such file" in refusal(capsys, "--config", str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_recipes_parse(path):
    recipe = [ROOT / "configs" / "self1e_2b.yaml"] if path.stem.startswith("ablation") else []
    parse([*NEEDED, "--config", *map(str, recipe), str(path)])


def test_the_flag_or_value_that_was_meant_is_named(capsys):
    assert "did you mean --batch_size?" in refusal(capsys, "--batchsize", "3")
    assert "did you mean published?" in refusal(capsys, "--mixture", "publishd")


def test_the_folder_of_a_run_stands_for_its_model(tmp_path):
    (tmp_path / "run/ckpt_model").mkdir(parents=True)
    (tmp_path / "run/ckpt_model/config.json").write_text("{}")
    args = parse(["--version", str(tmp_path / "run"), "--exp_name", "e", "--model_weights", str(tmp_path / "run")])
    assert args.version == args.model_weights == str(tmp_path / "run/ckpt_model")


def test_own_data_says_what_else_it_needs(capsys, tmp_path):
    own = ("--dataset", "custom", "--custom_data", "a.csv")
    assert "--val_dataset" in refusal(capsys, *own) and parse([*NEEDED, *own, "--no_eval"]).no_eval
    mixed = ("--dataset", "custom||vqa", "--custom_data", "a.csv", "--data_dir", str(tmp_path / "none"))
    assert "--vqa_data" in refusal(capsys, *mixed)


def test_own_data_alone_is_evaluated_on_own_data_alone():
    own = ["--custom_data", "a.csv", "--val_dataset", "custom|b.csv", "--vqa_data", "vqav2"]
    for families in ("custom", "custom||vqa"):
        assert parse([*NEEDED, "--dataset", families, *own]).final_splits == ["custom|b.csv"]
    assert parse([*NEEDED, "--dataset", "custom||refer_seg", *own]).final_splits == [*DEFAULT_SPLITS, "custom|b.csv"]


def test_runs_that_contradict_themselves_are_refused(capsys):
    assert "give one of them" in refusal(capsys, "--overwrite", "--auto_resume")
    assert "--keep_best refcoco|unc|val" in refusal(capsys, "--keep_best", "refcoco|unc|val")


@pytest.mark.parametrize("block", ["optimizer", "scheduler"])
def test_a_deepspeed_file_leaves_the_optimizer_to_the_flags(capsys, monkeypatch, tmp_path, block):
    launch(monkeypatch, "0")
    config = tmp_path / "own.json"
    config.write_text(json.dumps({block: {"type": "Lion"}}))
    assert f"remove the section {block!r}" in refusal(capsys, "--deepspeed", str(config))


def test_every_flag_defines_the_run_or_is_known_to_be_free():
    """A new flag defines the run unless it is named in FREE."""
    known = vars(parse(NEEDED)).keys() | {"base", "data", "ranks", "samples"}
    assert FREE <= known and STRUCTURE <= known and not FREE & STRUCTURE
