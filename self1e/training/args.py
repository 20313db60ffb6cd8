"""The flags of training, each declared once; their defaults are the recipe of the paper.

The switches of the method and the weights of the losses are declared in the model's configuration. A YAML file of
`--config` is a command line that comes before the typed one.
"""

import argparse
import importlib.util
import shlex
from pathlib import Path
from typing import Any

import torch
import yaml

from self1e import distributed
from self1e.data.families import DEFAULT_FAMILIES, DEFAULTS, FAMILIES
from self1e.data.mixture import MODES
from self1e.data.splits import DEFAULT_SPLITS
from self1e.errors import UserError
from self1e.evaluation.results import checkpoint_folder, evaluated
from self1e.files import read_json
from self1e.flags import Help, precision_on
from self1e.model.config import LOSS_FLAGS, LOSS_WEIGHTS, SWITCHES, check_source

ROOT = Path(__file__).resolve().parents[2]
YES, NO, UNSET = ("true", "yes", "on"), ("false", "no", "off"), ("null", "~", "")  # words of YAML
COUNTS = (  # flags that are 1 or more where they are given
    *("model_max_length", "lora_r", "lora_alpha", "num_classes_per_sample", "epochs", "steps_per_epoch", "max_steps"),
    *("batch_size", "grad_accumulation_steps", "print_freq", "save_steps", "save_total_limit", "eval_steps"),
)
# What DeepSpeed's JSON leaves out, or leaves to flags as "auto".
FLAGS_DECIDE = {
    *("optimizer", "scheduler", "bf16", "fp16", "gradient_clipping"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
}


# fmt: off
def make_parser() -> argparse.ArgumentParser:
    """All flags, in groups."""
    parser = argparse.ArgumentParser(prog="self1e train", allow_abbrev=False, formatter_class=Help,
        usage="%(prog)s --version PATH --exp_name NAME [flags]",
        description="Fine-tune InternVL3 to segment by itself, then evaluate it.")
    parser.add_argument("--config", type=Path, nargs="+", default=[],
        help="YAML files of flags; a later file overrides an earlier one, the command line overrides all")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed adds it

    def flag(name: str, default: Any, help: str, **options: Any) -> None:
        """Of the default's type; a bool makes `--NAME` and `--no-NAME`."""
        kind = options.pop("type", str if default is None else type(default))
        value: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        add(f"--{name}", help=help, default=default, **value | options)

    add = parser.add_argument_group("model").add_argument
    flag("version", None, "checkpoint: its folder, its run's folder or a hub id (InternVL3, -hf, or Self1E); an "
        "evaluation of a run that holds its model needs none", type=checkpoint_folder)
    flag("model_weights", None, "folder whose weights replace those of --version", type=checkpoint_folder)
    flag("precision", None, "precision of the computation; unset: bf16, but fp32 when evaluating on a CPU",
        choices=("fp32", "bf16", "fp16"))
    flag("model_max_length", 512, "the most tokens of a conversation")
    flag("high_res", False, "cut a photo into up to 4 tiles")
    flag("attn_implementation", "sdpa", "attention kernel of LLM and ViT", choices=("sdpa", "eager"))
    for name, switch in SWITCHES.items():
        add(f"--{name}", **switch)
    for name, loss in LOSS_FLAGS.items():
        unset = f"unset: the checkpoint's, or {LOSS_WEIGHTS[loss]}"
        flag(name, None, f"weight of the loss {loss}; {unset}", type=float)

    add = parser.add_argument_group("what is trained").add_argument
    flag("use_llm_lora", False, "train adapters in the LLM; without it the whole LLM trains, unless --freeze_llm")
    flag("freeze_llm", False, "freeze the LLM's layers, without adapters; its token embeddings and lm_head train as "
        "--trainable_embeddings says")
    flag("optimize_vision", False, "train ViT and projector; without it, both are frozen")
    flag("use_vision_lora", False, "train adapters in the ViT; without it, the whole ViT trains")
    flag("lora_r", 128, "rank of the adapters")
    flag("lora_alpha", None, "scale of the adapters; unset: twice --lora_r", type=int)
    flag("lora_dropout", 0.05, "share of its inputs that an adapter drops")
    flag("lora_target_modules", None, "linears of the LLM with adapters, joined by commas; unset: all")
    flag("lora_from_layer", 0, "the first LLM layer with adapters")
    flag("trainable_embeddings", "all", "rows of the token embeddings and of lm_head that train: all, or those of the "
        "added tokens only", choices=("all", "new"))

    add = parser.add_argument_group("data").add_argument
    flag("dataset_dir", Path("dataset"), "folder of the segmentation sets and LLaVA-Instruct", type=Path)
    flag("data_dir", Path("data"), "folder of the VQA sets", type=Path)
    flag("dataset", DEFAULT_FAMILIES, "families of training sets, joined by ||; the family custom is own data")
    for name in FAMILIES:
        flag(f"{name}_data", DEFAULTS.get(name), f"sets of the family {name}, joined by ||")
    flag("sample_rates", None, "one rate per family, joined by commas; unset: 1 for each")
    flag("explanatory", -1.0, "share of the explained samples that are text only; -1 turns explanations off")
    flag("num_classes_per_sample", 3, "the most conversations per photo")
    flag("exclude_val", False, "leave out training photos that an evaluation split uses")
    flag("allow_outside", False, "take photos that annotations name outside their folder")
    flag("mixture", "published", "published draws some samples anew; exact reads each sample once per epoch",
        choices=MODES)
    flag("workers", None, "data-loading processes per rank; unset: up to 4, as the cores allow", type=int)
    flag("seed", 42, "seed of the stream of samples, of a fresh head and of dropout")

    add = parser.add_argument_group("optimisation").add_argument
    flag("epochs", 1, "passes over the mixture")
    flag("start_epoch", 0, "epochs of the stream that are passed over")
    flag("steps_per_epoch", None, "optimizer steps per epoch; unset: the whole epoch", type=int)
    flag("max_steps", None, "optimizer steps in all; unset: as many as --epochs has", type=int)
    flag("batch_size", 5, "photos per device in a micro-batch")
    flag("grad_accumulation_steps", 8, "micro-batches per optimizer step")
    flag("grad_accumulation_reduction", "sum", "how gradients of a step's micro-batches are joined before clipping",
        choices=("sum", "mean"))
    flag("lr", 1e-4, "peak rate of the LLM, its embeddings and lm_head")
    flag("vision_lr", 1e-4, "peak rate of ViT, projector and head")
    flag("beta1", 0.9, "first beta of AdamW")
    flag("beta2", 0.95, "second beta of AdamW")
    flag("warmup_steps", 100, "steps in which the rate rises; it falls to 0 after them")
    flag("gradient_checkpointing", None, "recompute activations to save memory: all of them (full, also without a "
        "value), or all but products of matrices (selective)", nargs="?", const="full", choices=("full", "selective"))
    add("--no-gradient_checkpointing", dest="gradient_checkpointing", action="store_const", const=None,
        help=argparse.SUPPRESS)
    flag("compile", False, "compile each layer of ViT and LLM, which takes minutes in the first steps")
    flag("deepspeed", None, "DeepSpeed JSON, or none; unset: configs/zero2.json under a launcher", type=Path)

    add = parser.add_argument_group("logging and checkpoints").add_argument
    flag("exp_name", None, "name of the run: its files go to LOG_BASE_DIR/EXP_NAME")
    flag("log_base_dir", Path("runs"), "folder of all runs", type=Path)
    flag("report_to", "tensorboard", "where the curves go", choices=("tensorboard", "wandb", "none"))
    flag("print_freq", 10, "steps between log lines")
    flag("save_steps", 200, "steps between checkpoints")
    flag("save_total_limit", 1, "how many of the latest checkpoints are kept")
    flag("keep_best", None, "also keep the best checkpoint by this split's headline figure")
    flag("resume", None, "the checkpoint-N folder to continue from", type=Path)
    flag("auto_resume", False, "continue from the last checkpoint, if any")
    flag("resume_anyway", False, "continue although settings of the run differ")
    flag("overwrite", False, "remove an earlier run of this name and train anew")
    flag("save_published_layout", False, "also write ckpt_model_published")
    flag("timeout", 1800.0, "seconds that a rank waits for its data or for the other ranks")

    add = parser.add_argument_group("evaluation").add_argument
    flag("val_dataset", None, "splits to validate on while training, joined by ||; custom|PATH is own data; unset: "
        "ReasonSeg|val")
    flag("eval_steps", 200, "steps between validations")
    add("--no_eval", action="store_true", help="do not validate while training, nor evaluate after it")
    flag("eval_only", False, "evaluate --val_dataset without training")
    flag("eval_all_datasets", False, f"all {len(DEFAULT_SPLITS)} splits, whatever --val_dataset says")
    flag("eval_all_only", False, "short for --eval_only --eval_all_datasets")
    flag("eval_visualize", False, "write pictures of the predictions, the worst first")
    flag("overwrite_eval", False, "evaluate anew what the results folder already holds")
    return parser
# fmt: on


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
        if f"--{name}" not in known or not isinstance(value, str):
            parser.error(f"--config {path}: {name}: {value} is no flag with one value; see --help")
        word = value.lower() if known[f"--{name}"].nargs in (0, "?") else None  # of a switch
        if word in YES:
            flags.append(f"--{name}")
        elif word in NO:  # which `--no_eval` has no opposite for
            flags += [f"--no-{name}"] if f"--no-{name}" in known else []
        elif value not in UNSET:
            flags.append(f"--{name}={value}")
    return flags


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check a command line; a wrong one is exit code 2 and a message of the first rank."""
    parser = make_parser()
    if not distributed.is_main():
        parser._print_message = lambda *_: None  # type: ignore[method-assign]
    configured = [flag for file in parser.parse_known_args(argv)[0].config for flag in yaml_flags(file, parser)]
    args = parser.parse_args(configured + argv)

    if args.exp_name is None:
        parser.error("--exp_name is needed: a name for the run")
    args.run_dir = args.log_base_dir / args.exp_name
    if args.eval_all_only:
        args.eval_only = args.eval_all_datasets = True
    args.splits = [*DEFAULT_SPLITS] if args.eval_all_datasets else (args.val_dataset or "ReasonSeg|val").split("||")
    if args.eval_only:
        if args.version:
            check_source(args.version)  # which is not loaded where the run holds its model
        args.version = evaluated(args.run_dir, args.version, args.model_weights)
    if str(args.deepspeed) == "none":
        args.deepspeed = None
    elif distributed.launched() and args.deepspeed is None:
        args.deepspeed = ROOT / "configs" / "zero2.json"
    args.zero_stage = read_deepspeed(args.deepspeed)["zero_optimization"]["stage"] if args.deepspeed else 0
    for wrong, message in contradictions(args, argv):
        if wrong:
            parser.error(message)
    families = {*args.dataset.split("||")}
    own = "custom" in families and families <= {"custom", "vqa"}  # what is in the tree is none of its business
    args.final_splits = args.splits if own else list(dict.fromkeys([*DEFAULT_SPLITS, *args.splits]))
    args.eval_precision = args.precision or precision_on(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    args.precision = args.precision or "bf16"
    args.workers = distributed.share_cores(args.workers)
    args.command = shlex.join(["train_hf_ivl_seq.py", *(x for x in argv if not x.startswith("--local_rank"))])
    return args


def contradictions(args: argparse.Namespace, argv: list[str]) -> list[tuple[Any, str]]:
    """What flags cannot say together: whether they do, and the message."""
    families, lora = args.dataset.split("||"), [word for word in argv if word.startswith("--lora_")]
    counts = {name: value for name in COUNTS if (value := getattr(args, name)) is not None}
    return [
        *((value < 1, f"--{name} {value}: expected 1 or more") for name, value in counts.items()),
        (args.version is None, "--version is needed: a checkpoint's folder or hub id"),
        (args.overwrite and (args.resume or args.auto_resume),
         "--overwrite starts anew, --resume and --auto_resume continue: give one of them"),
        (not 0 <= args.start_epoch < args.epochs,
         f"--start_epoch {args.start_epoch}: epochs are 0 to {args.epochs - 1}"),
        (args.keep_best and (args.no_eval or args.keep_best not in args.splits),
         f"--keep_best {args.keep_best}: the split must be one of --val_dataset, which is validated"),
        (args.use_vision_lora and not args.optimize_vision,
         "--use_vision_lora adapts a ViT that stays frozen without --optimize_vision: add it"),
        (args.freeze_llm and args.use_llm_lora,
         "--freeze_llm keeps the LLM's layers as they are, --use_llm_lora adapts them: give one of them"),
        (lora and not (args.use_llm_lora or args.use_vision_lora),
         f"{lora[:1]} is about adapters: add --use_llm_lora, or --optimize_vision --use_vision_lora"),
        (args.compile and (args.gradient_checkpointing == "selective" or args.zero_stage == 3),
         "--compile: compiled layers ignore --gradient_checkpointing selective, and ZeRO-3 works within them"),
        (args.report_to == "wandb" and importlib.util.find_spec("wandb") is None,
         "--report_to wandb: the package is not installed; pip install wandb"),
        (args.custom_data and "custom" not in families,
         '--custom_data is read by the family custom: name it in --dataset, e.g. --dataset "custom||vqa"'),
        (families == ["custom"] and not (args.no_eval or args.val_dataset),
         '--dataset custom: say with --val_dataset "custom|PATH" what to validate on, or --no_eval; the default, '
         "ReasonSeg, is part of the data tree"),
        (args.deepspeed and not distributed.launched(),
         "--deepspeed needs a launcher: start with deepspeed or torchrun instead of python"),
    ]  # fmt: skip


def read_deepspeed(path: Path) -> dict[str, Any]:
    """DeepSpeed's JSON: ZeRO, precision, communication. Raises UserError where it says what flags decide."""
    values = read_json(path, dict)
    for name in values.keys() & FLAGS_DECIDE:
        said = values[name].get("enabled") if isinstance(values[name], dict) else values[name]
        if said != "auto":
            raise UserError(f"{path}: remove {name!r}; flags decide, such as --lr, --batch_size and --precision")
    values = {name: value for name, value in values.items() if name not in ("optimizer", "scheduler")}
    zero = values["zero_optimization"] = {"stage": 0} | values.get("zero_optimization", {})
    if zero["stage"] != 3 and (offloads(values, "offload_optimizer") or offloads(values, "offload_param")):
        # Only there the CPU optimizer was seen to follow both groups' rates, their betas and their schedule.
        raise UserError(f"{path}: offloading is for stage 3 here; start from configs/zero3_offload.json")
    return values


def offloads(values: dict[str, Any], section: str) -> bool:
    """Whether the optimizer ("offload_optimizer") or the parameters ("offload_param") are kept off the GPU."""
    return (values["zero_optimization"].get(section) or {}).get("device", "none") != "none"
