"""The flags of training, each declared once; their defaults are the recipe of the paper.

A field of a dataclass below is a flag of its name: its type and default are the flag's, its help and choices stand in
the field's metadata. The switches of the method and the weights of the losses are declared in the model's
configuration. A YAML file of `--config` is a command line that comes before the typed one.
"""

import argparse
import contextlib
import importlib.util
import io
import shlex
import sys
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from self1e import distributed
from self1e.data.families import DEFAULT_FAMILIES, FAMILIES
from self1e.data.mixture import MODES
from self1e.data.splits import DEFAULT_SPLITS
from self1e.model.config import LOSS_FLAGS, LOSS_WEIGHTS, SWITCHES, check_source
from self1e.model.weights import checkpoint_folder
from self1e.training.deepspeed_config import read_deepspeed, zero_stage

ROOT = Path(__file__).resolve().parents[2]
LLM_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # that take adapters
KEPT = ("full", "selective")
METAVARS = {int: "N", float: "X", Path: "PATH"}
YES, NO, UNSET = ("true", "yes", "on"), ("false", "no", "off"), ("null", "~", "")  # words of YAML


def flag(default: Any, help: str, **options: Any) -> Any:
    """A field that is a flag. options: further arguments of `add_argument`."""
    return field(default=default, metadata={"help": help, **options})


# fmt: off
# A flag is a few lines.
@dataclass
class Model:
    version: str | None = flag(None, "checkpoint: its folder, its run's folder or a hub id (InternVL3, -hf, or "
        "Self1E); an evaluation of a run that holds its model needs none", type=checkpoint_folder, metavar="PATH")
    model_weights: str | None = flag(None, "folder whose weights replace those of --version", type=checkpoint_folder,
        metavar="PATH")
    precision: str | None = flag(None, "precision of the computation; unset: bf16, but fp32 when evaluating on a CPU",
        choices=("fp32", "bf16", "fp16"))
    model_max_length: int = flag(512, "the most tokens of a conversation")
    high_res: bool = flag(False, "cut a photo into up to 4 tiles")
    attn_implementation: str = flag("sdpa", "attention kernel of LLM and ViT", choices=("sdpa", "eager"))


@dataclass
class Trained:
    use_llm_lora: bool = flag(False, "train adapters in the LLM; without it the whole LLM trains, unless --freeze_llm")
    freeze_llm: bool = flag(False, "freeze the LLM's layers, without adapters; its token embeddings and lm_head train "
        "as --trainable_embeddings says")
    optimize_vision: bool = flag(False, "train ViT and projector; without it, both are frozen")
    use_vision_lora: bool = flag(False, "train adapters in the ViT; without it, the whole ViT trains")
    lora_r: int = flag(128, "rank of the adapters")
    lora_alpha: int | None = flag(None, "scale of the adapters; unset: twice --lora_r")
    lora_dropout: float = flag(0.05, "share of its inputs that an adapter drops")
    lora_target_modules: str | None = flag(None, "linears of the LLM with adapters, joined by commas; unset: "
        + ", ".join(LLM_LINEARS), metavar="NAMES")
    trainable_embeddings: str = flag("all", "rows of the token embeddings and of lm_head that train: all, or those of "
        "the added tokens only", choices=("all", "new"))
    lora_from_layer: int = flag(0, "the first LLM layer with adapters")


@dataclass
class Data:
    dataset_dir: Path = flag(Path("dataset"), "folder of the segmentation sets and LLaVA-Instruct")
    data_dir: Path = flag(Path("data"), "folder of the VQA sets")
    dataset: str = flag(DEFAULT_FAMILIES, "families of training sets, joined by ||; the family custom is own data",
        metavar="FAMILIES")
    sample_rates: str | None = flag(None, "one rate per family, joined by commas; unset: 1 for each", metavar="RATES")
    explanatory: float = flag(-1.0, "share of the explained samples that are text only; -1 turns explanations off")
    num_classes_per_sample: int = flag(3, "the most conversations per photo")
    exclude_val: bool = flag(False, "leave out training photos that an evaluation split uses")
    allow_outside: bool = flag(False, "take photos that annotations name outside their folder")
    mixture: str = flag("published", "published draws some samples anew; exact reads each sample once per epoch",
        choices=MODES)
    workers: int | None = flag(None, "data-loading processes per rank; unset: up to 4, as the cores allow")
    seed: int = flag(42, "seed of the stream of samples, of a fresh head and of dropout")


@dataclass
class Optimisation:
    epochs: int = flag(1, "passes over the mixture")
    start_epoch: int = flag(0, "epochs of the stream that are passed over")
    steps_per_epoch: int | None = flag(None, "optimizer steps per epoch; unset: the whole epoch")
    max_steps: int | None = flag(None, "optimizer steps in all; unset: as many as --epochs has")
    batch_size: int = flag(5, "photos per device in a micro-batch")
    grad_accumulation_steps: int = flag(8, "micro-batches per optimizer step")
    grad_accumulation_reduction: str = flag("sum", "how the gradients of a step's micro-batches are joined before "
        "clipping", choices=("sum", "mean"))
    lr: float = flag(1e-4, "peak rate of the LLM, its embeddings and lm_head")
    vision_lr: float = flag(1e-4, "peak rate of ViT, projector and head")
    beta1: float = flag(0.9, "first beta of AdamW")
    beta2: float = flag(0.95, "second beta of AdamW")
    warmup_steps: int = flag(100, "steps in which the rate rises; it falls to 0 after them")
    gradient_checkpointing: str | None = flag(None, "recompute activations to save memory: all of them (full, also "
        "without a value), or all but products of matrices (selective)", nargs="?", const="full", choices=KEPT)
    deepspeed: Path | None = flag(None, "DeepSpeed JSON, or none; unset: configs/zero2.json under a launcher")


@dataclass
class Logging:
    exp_name: str = flag(MISSING, "name of the run: its files go to LOG_BASE_DIR/EXP_NAME")
    log_base_dir: Path = flag(Path("runs"), "folder of all runs")
    report_to: str = flag("tensorboard", "where the curves go", choices=("tensorboard", "wandb", "none"))
    print_freq: int = flag(10, "steps between log lines")
    save_steps: int = flag(200, "steps between checkpoints")
    save_total_limit: int = flag(1, "how many of the latest checkpoints are kept")
    keep_best: str | None = flag(None, "also keep the best checkpoint by this split's headline figure",
        metavar="SPLIT")
    resume: Path | None = flag(None, "the checkpoint-N folder to continue from")
    auto_resume: bool = flag(False, "continue from the last checkpoint, if any")
    resume_anyway: bool = flag(False, "continue although settings of the run differ")
    overwrite: bool = flag(False, "remove an earlier run of this name and train anew")
    save_published_layout: bool = flag(False, "also write ckpt_model_published")
    timeout: float = flag(1800.0, "seconds that a rank waits for its data or for the other ranks")


@dataclass
class Evaluation:
    val_dataset: str = flag("ReasonSeg|val", "splits to validate on while training, joined by ||; custom|PATH is own "
        "data", metavar="SPLITS")
    eval_steps: int = flag(200, "steps between validations")
    no_eval: bool = flag(False, "do not validate while training, nor evaluate after it")
    eval_only: bool = flag(False, "evaluate --val_dataset without training")
    eval_all_datasets: bool = flag(False, f"all {len(DEFAULT_SPLITS)} splits, whatever --val_dataset says")
    eval_all_only: bool = flag(False, "short for --eval_only --eval_all_datasets")
    eval_visualize: bool = flag(False, "write pictures of the predictions, the worst first")
    overwrite_eval: bool = flag(False, "evaluate anew what the results folder already holds")


GROUPS = {"model": Model, "what is trained": Trained, "data": Data, "optimisation": Optimisation,
          "logging and checkpoints": Logging, "evaluation": Evaluation}


# fmt: on


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are some; the help says what an unset flag means."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=119)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser() -> argparse.ArgumentParser:
    """All flags, in groups."""
    here = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(
        prog=here if here.startswith("train") else "self1e train",
        usage="%(prog)s --version PATH --exp_name NAME [flags]",
        description="Fine-tune InternVL3 to segment by itself, then evaluate it.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        default=[],
        help="YAML files of flags; a later file overrides an earlier one, the command line overrides all",
    )
    for title, group in GROUPS.items():
        add = parser.add_argument_group(title).add_argument
        kinds = typing.get_type_hints(group)
        for each in fields(group):
            kind = (typing.get_args(kinds[each.name]) or [kinds[each.name]])[0]  # of `int | None`, int
            action = "store_true" if each.name == "no_eval" else argparse.BooleanOptionalAction
            value = {"type": kind, "metavar": METAVARS.get(kind)}
            options: dict[str, Any] = {"action": action} if kind is bool else value
            options |= {"required": True} if each.default is MISSING else {"default": each.default}
            add(f"--{each.name}", **options | each.metadata)
        if group is Model:
            for name, switch in SWITCHES.items():
                add(f"--{name}", **switch.flag())
            for name, loss in LOSS_FLAGS.items():
                unset = f"unset: the checkpoint's, or {LOSS_WEIGHTS[loss]}"
                add(f"--{name}", type=float, metavar="X", help=f"weight of the loss {loss}; {unset}")
        if group is Data:
            for name, family in FAMILIES.items():
                add(f"--{name}_data", metavar="SETS", default=family.default, help=family.help)
        if group is Optimisation:
            add(
                "--no-gradient_checkpointing",
                dest="gradient_checkpointing",
                action="store_const",
                const=None,
                help=argparse.SUPPRESS,
            )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it
    return parser


def yaml_flags(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """The flags of a YAML file as a command line. Values are text, as typed: `007` stays `007`."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path}: expected lines of 'flag: value'")
    known = parser._option_string_actions
    flags = []
    for name, value in values.items():
        if f"--{name}" not in known or name == "config" or not isinstance(value, str):
            parser.error(f"--config {path}: {name}: {value} is no flag with one value; see --help")
        takes_none = known[f"--{name}"].nargs in (0, "?")  # a switch, or gradient_checkpointing
        if takes_none and value.lower() in YES:
            flags.append(f"--{name}")
        elif takes_none and value.lower() in NO:
            flags += [f"--no-{name}"] if f"--no-{name}" in known else []
        elif value not in UNSET:
            flags.append(f"--{name}={value}")
    return flags


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check a command line; a wrong one is exit code 2 and a message of the first rank."""
    with contextlib.nullcontext() if distributed.is_main() else contextlib.redirect_stderr(io.StringIO()):
        return _parse(argv)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser()
    config = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    config.add_argument("--config", type=Path, nargs="+", default=[])
    configured = [flag for file in config.parse_known_args(argv)[0].config for flag in yaml_flags(file, parser)]
    args = parser.parse_args(configured + argv)
    typed = {word.split("=")[0].removeprefix("--") for word in argv}
    given = typed | {word.split("=")[0].removeprefix("--") for word in configured}

    args.run_dir = args.log_base_dir / args.exp_name
    if args.eval_all_only:
        args.eval_only = args.eval_all_datasets = True
    args.splits = list(DEFAULT_SPLITS) if args.eval_all_datasets else args.val_dataset.split("||")
    if args.version is None and args.eval_only and (args.run_dir / "ckpt_model" / "config.json").is_file():
        args.version = str(args.run_dir / "ckpt_model")
    for wrong, message in contradictions(args, typed, given):
        if wrong:
            parser.error(message)
    if args.eval_only:
        check_source(args.version)  # which is not loaded where the run holds its model
    families = {*args.dataset.split("||")}
    own = "custom" in families and families <= {"custom", "vqa"}  # what is in the tree is none of its business
    args.final_splits = args.splits if own else list(dict.fromkeys([*DEFAULT_SPLITS, *args.splits]))
    if distributed.launched() and args.deepspeed is None:
        args.deepspeed = ROOT / "configs" / "zero2.json"
    if str(args.deepspeed) == "none":
        args.deepspeed = None
    args.zero_stage = zero_stage(read_deepspeed(args.deepspeed)) if args.deepspeed else 0
    args.eval_precision = args.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    args.precision = args.precision or "bf16"
    args.workers = distributed.share_cores(args.workers)
    launcher = "python" if not distributed.launched() else "torchrun" if args.local_rank is None else "deepspeed"
    words = [word for word in argv if not word.startswith("--local_rank")]
    args.command = shlex.join([launcher, "train_hf_ivl_seq.py", *words])  # for the model card
    return args


def contradictions(args: argparse.Namespace, typed: set[str], given: set[str]) -> list[tuple[Any, str]]:
    """What flags cannot say together: whether they do, and the message. given: typed, or in a YAML file."""
    resumed = args.resume or args.auto_resume
    adapted = args.use_llm_lora or args.use_vision_lora
    llm_only, lora_only = {"lora_target_modules", "lora_from_layer"}, {"lora_r", "lora_alpha", "lora_dropout"}
    return [
        (args.version is None, "--version is needed: a checkpoint's folder or hub id"),
        (args.eval_only and args.no_eval, "--eval_only and --no_eval leave nothing to do"),
        (args.eval_visualize and args.no_eval, "--eval_visualize draws what --no_eval does not evaluate"),
        (args.overwrite and resumed, "--overwrite starts anew, --resume and --auto_resume continue: give one of them"),
        (args.resume and args.auto_resume, "--resume names a checkpoint, --auto_resume looks for one"),
        (args.start_epoch and resumed, "--start_epoch: a resumed run knows its epoch"),
        (not 0 <= args.start_epoch < args.epochs,
         f"--start_epoch {args.start_epoch}: epochs are 0 to {args.epochs - 1}"),
        (args.keep_best and (args.no_eval or args.keep_best not in args.splits),
         f"--keep_best {args.keep_best}: the split must be one of --val_dataset, which is validated"),
        (args.use_vision_lora and not args.optimize_vision,
         "--use_vision_lora adapts a ViT that stays frozen without --optimize_vision: add it"),
        (args.freeze_llm and args.use_llm_lora,
         "--freeze_llm keeps the LLM's layers as they are, --use_llm_lora adapts them: give one of them"),
        (typed & llm_only and not args.use_llm_lora,
         "--lora_target_modules and --lora_from_layer are about the LLM's adapters: add --use_llm_lora"),
        (typed & lora_only and not adapted,
         "--lora_r, --lora_alpha, --lora_dropout: add --use_llm_lora, or --optimize_vision --use_vision_lora"),
        (args.precision == "fp16" and not args.eval_only and not torch.cuda.is_available(),
         "--precision fp16 trains on a GPU only, and torch finds none"),
        (args.report_to == "wandb" and importlib.util.find_spec("wandb") is None,
         "--report_to wandb: the package is not installed; pip install wandb"),
        (args.custom_data and "custom" not in args.dataset.split("||"),
         '--custom_data is read by the family custom: name it in --dataset, e.g. --dataset "custom||vqa"'),
        (args.dataset == "custom" and not args.no_eval and "val_dataset" not in given,
         '--dataset custom: say with --val_dataset "custom|PATH" what to validate on, or --no_eval; the default, '
         "ReasonSeg, is part of the data tree"),
        (args.deepspeed and str(args.deepspeed) != "none" and not distributed.launched(),
         "--deepspeed needs a launcher: start with deepspeed or torchrun instead of python"),
    ]  # fmt: skip
