"""The flags of training, their defaults (the recipe of the paper), and the refusal of those that mean nothing here."""

import argparse
import importlib.util
import os
import shlex
from pathlib import Path

import yaml

from self1e.data.families import DEFAULT_FAMILIES, FAMILIES
from self1e.data.mixture import MODES
from self1e.data.splits import DEFAULT_SPLITS
from self1e.flags import Parser, between, checkpoint, told, whole
from self1e.model.switches import SWITCHES
from self1e.training.deepspeed_config import read_deepspeed, zero_stage
from self1e.training.flags import LLM_LINEARS, REFUSED, Help, Refuse

ROOT = Path(__file__).resolve().parents[2]


def make_parser() -> argparse.ArgumentParser:
    """All flags, in groups; defaults show in `--help`."""
    parser = Parser(
        prog="train_hf_ivl_seq.py",
        usage="%(prog)s --version PATH --exp_name NAME [flags]",
        description="Fine-tune InternVL3 to segment by itself, then evaluate it.",
        formatter_class=Help,
        epilog="Refused flags of the published program: " + ", ".join(f"--{name}" for name in REFUSED),
    )
    switch = argparse.BooleanOptionalAction
    count, natural, weight = whole(1), whole(0), between(0, included=True)
    rate, fraction = between(0), between(0, 1, included=True)

    # fmt: off
    # A flag is one line, and where that is too long its help another.
    add = parser.add_argument_group("model").add_argument
    add("--version", type=checkpoint, required=True,
        help="checkpoint: its folder, its run's folder or a hub id (InternVL3, -hf, or Self1E)")
    add("--model_weights", type=checkpoint, help="folder whose weights replace those of --version")
    add("--precision", choices=("fp32", "bf16", "fp16"),
        help="precision of the computation; unset: bf16, but fp32 when evaluating on a CPU")
    add("--model_max_length", type=count, default=512, help="the most tokens of a row")
    add("--high_res", action=switch, default=False, help="cut a photo into up to 4 tiles")
    add("--attn_implementation", choices=("sdpa", "eager"), default="sdpa", help="attention kernel of LLM and ViT")
    for name, entry in SWITCHES.items():
        if isinstance(entry.default, bool):
            text = f"{entry.help}; unset: the checkpoint's, or {'on' if entry.default else 'off'}"
            add(f"--{name}", action=switch, help=text)
        elif entry.choices is not None:
            add(f"--{name}", **entry.flag())
        else:
            add(f"--{name}", type=weight, default=entry.default, help=entry.help)

    add = parser.add_argument_group("what is trained").add_argument
    add("--use_llm_lora", action=switch, default=False,
        help="train adapters in the LLM; without it, the whole LLM trains, unless --freeze_llm")
    add("--freeze_llm", action=switch, default=False,
        help="freeze the LLM's layers, without adapters; its token embeddings and lm_head train as "
             "--trainable_embeddings says")
    add("--optimize_vision", action=switch, default=False, help="train ViT and projector; without it, both are frozen")
    add("--use_vision_lora", action=switch, default=False,
        help="train adapters in the ViT; without it, the whole ViT trains")
    add("--lora_r", type=count, default=128, help="rank of the adapters")
    add("--lora_alpha", type=count, help="scale of the adapters; unset: twice --lora_r")
    add("--lora_dropout", type=fraction, default=0.05, help="share of its inputs that an adapter drops")
    add("--lora_target_modules", metavar="NAMES",
        help="linears of the LLM with adapters, joined by commas; unset: " + ", ".join(LLM_LINEARS))
    add("--trainable_embeddings", choices=("all", "new"), default="all",
        help="rows of the token embeddings and of lm_head that train: all, or those of the added tokens only")
    add("--lora_from_layer", type=natural, default=0, help="the first LLM layer with adapters")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_dir", type=Path, default=Path("./dataset"),
        help="folder of the segmentation sets and LLaVA-Instruct")
    add("--data_dir", type=Path, default=Path("./data"), help="folder of the VQA sets")
    add("--dataset", metavar="FAMILIES", default=DEFAULT_FAMILIES,
        help="families of training sets, joined by ||; the family custom is own data")
    add("--sample_rates", metavar="RATES", help="one rate per family, joined by commas; unset: 1 for each")
    for name, family in FAMILIES.items():
        add(f"--{name}_data", metavar="SETS", default=family.default, help=family.help)
    add("--explanatory", type=float, default=-1.0,
        help="share of the explained samples that are text only; -1 turns explanations off")
    add("--num_classes_per_sample", type=count, default=3, help="the most rows per photo")
    add("--exclude_val", action=switch, default=False, help="leave out training photos that an evaluation split uses")
    add("--allow_outside", action=switch, default=False, help="take photos that annotations name outside their folder")
    add("--mixture", choices=MODES, default="published",
        help="published draws some samples anew; exact reads each sample once per epoch")
    add("--workers", type=natural, default=4, help="data-loading processes per rank")
    add("--seed", type=natural, default=42, help="seed of the stream of samples, of a fresh head and of dropout")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, default=1, help="passes over the mixture")
    add("--start_epoch", type=natural, default=0, help="epochs of the stream that are passed over")
    add("--steps_per_epoch", type=count, help="optimizer steps per epoch; unset: the whole epoch")
    add("--max_steps", type=count, help="optimizer steps in all; unset: as many as --epochs has")
    add("--batch_size", type=count, default=5, help="photos per device in a micro-batch")
    add("--grad_accumulation_steps", type=count, default=8, help="micro-batches per optimizer step")
    add("--grad_accumulation_reduction", choices=("sum", "mean"), default="sum",
        help="how the gradients of a step's micro-batches are joined before clipping")
    add("--lr", type=rate, default=1e-4, help="peak rate of the LLM, its embeddings and lm_head")
    add("--vision_lr", type=rate, default=1e-4, help="peak rate of ViT, projector and head")
    add("--beta1", type=fraction, default=0.9, help="first beta of AdamW")
    add("--beta2", type=fraction, default=0.95, help="second beta of AdamW")
    add("--warmup_steps", type=natural, default=100, help="steps in which the rate rises; it falls to 0 after them")
    add("--gradient_checkpointing", action=switch, default=False, help="recompute activations to save memory")
    add("--deepspeed", type=Path, help="DeepSpeed JSON; unset: configs/zero2.json under a launcher")
    add("--local_rank", type=int, help="launchers set it")

    add = parser.add_argument_group("logging and checkpoints").add_argument
    add("--exp_name", required=True, help="name of the run: its files go to LOG_BASE_DIR/EXP_NAME")
    add("--log_base_dir", type=Path, default=Path("./runs"), help="folder of all runs")
    add("--report_to", default="tensorboard", choices=("tensorboard", "wandb", "none"), help="where the curves go")
    add("--healthy_curves", type=Path, metavar="JSON",
        help="healthy runs of this recipe, drawn beside the run in TensorBoard and curves.png (docs/training.md)")
    add("--print_freq", type=count, default=10, help="steps between log lines")
    add("--save_steps", type=count, default=200, help="steps between checkpoints")
    add("--save_total_limit", type=count, default=1, help="how many of the latest checkpoints are kept")
    add("--keep_best", metavar="SPLIT", help="also keep the best checkpoint by this split's headline figure")
    add("--resume", type=Path, help="the checkpoint-N folder to continue from")
    add("--auto_resume", action=switch, default=False, help="continue from the last checkpoint, if any")
    add("--resume_anyway", action="store_true", help="continue although settings of the run differ")
    add("--overwrite", action="store_true", help="remove an earlier run of this name and train anew")
    add("--save_published_layout", action=switch, default=False, help="also write ckpt_model_published")
    add("--timeout", type=between(1, 1e7), default=1800.0, help="seconds without progress that end the run")

    add = parser.add_argument_group("evaluation").add_argument
    add("--val_dataset", metavar="SPLITS", default="ReasonSeg|val",
        help="splits to validate on while training, joined by ||; custom|PATH is own data")
    add("--eval_steps", type=count, default=200, help="steps between validations")
    add("--val_batch_size", type=int, default=1, choices=(1,), help="photos per forward pass: each goes by itself")
    add("--no_eval", action="store_true", help="do not validate while training, nor evaluate after it")
    add("--eval_only", action="store_true", help="evaluate --val_dataset without training")
    add("--eval_all_datasets", action="store_true",
        help=f"all {len(DEFAULT_SPLITS)} splits, whatever --val_dataset says")
    add("--eval_all_only", action="store_true", help="short for --eval_only --eval_all_datasets")
    add("--eval_visualize", action="store_true", help="write pictures of the predictions, the worst first")
    add("--overwrite_eval", action="store_true", help="evaluate anew what the results folder already holds")

    parser.add_argument("--config", type=Path, nargs="+",
        help="YAML files of flags; a later file overrides an earlier one, the command line overrides all")
    # fmt: on
    for name in REFUSED:
        parser.add_argument(f"--{name}", nargs="?", action=Refuse, help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    return parser


def yaml_flags(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """The flags of a YAML file as a command line."""
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        parser.error(f"--config {told(error)}")
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        parser.error(f"--config {path}: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path}: expected lines of 'flag: value'")
    flags = []
    for name, value in values.items():
        if f"--{name}" not in parser._option_string_actions or name == "config":
            parser.error(f"--config {path}: {name} is no flag of this program; see --help")
        if isinstance(value, (list, dict, set)):  # whose text may grow without end, by aliases of aliases
            parser.error(f"--config {path}: {name} holds several values; expected one")
        if value is True:
            flags.append(f"--{name}")
        elif value is False:
            flags += [f"--no-{name}"] if f"--no-{name}" in parser._option_string_actions else []
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check a command line; exits with status 2 and one message when a flag is wrong."""
    parser = make_parser()
    config = Parser(prog=parser.prog, add_help=False)
    config.add_argument("--config", type=Path, nargs="+", default=[])
    files = config.parse_known_args(argv)[0].config
    configured = [flag for file in files for flag in yaml_flags(file, parser)]
    from_files = {flag.split("=")[0].removeprefix("--") for flag in configured}
    args = parser.parse_args(configured + argv)
    import torch  # no sooner, so that --help is quick

    from self1e import distributed

    if args.eval_all_only:
        args.eval_only = args.eval_all_datasets = True
    args.splits = list(DEFAULT_SPLITS) if args.eval_all_datasets else args.val_dataset.split("||")
    if args.eval_only and args.no_eval:
        parser.error("--eval_only and --no_eval leave nothing to do")
    if args.overwrite and (args.resume or args.auto_resume):
        parser.error("--overwrite starts anew, --resume and --auto_resume continue: give one of them")
    if args.keep_best and (args.no_eval or args.keep_best not in args.splits):
        parser.error(f"--keep_best {args.keep_best}: the split must be one of --val_dataset, which is validated")
    if args.resume and args.auto_resume:
        parser.error("--resume names a checkpoint, --auto_resume looks for one: give one of them")
    if args.start_epoch and (args.resume or args.auto_resume):
        parser.error("--start_epoch is for a run without a checkpoint; a resumed run knows its epoch")
    if not 0 <= args.start_epoch < args.epochs:
        parser.error(f"--start_epoch {args.start_epoch}: epochs are 0 to {args.epochs - 1}")
    if args.use_vision_lora and not args.optimize_vision:
        parser.error("--use_vision_lora adapts a ViT that stays frozen without --optimize_vision: add it")
    if args.freeze_llm and args.use_llm_lora:
        parser.error("--freeze_llm keeps the LLM's layers as they are, --use_llm_lora adapts them: give one of them")
    given = {flag.split("=")[0].removeprefix("--") for flag in argv}
    for flag in ("lora_target_modules", "lora_from_layer"):
        if flag in given and not args.use_llm_lora:
            parser.error(f"--{flag} is about the LLM's adapters: add --use_llm_lora")
    for flag in ("lora_r", "lora_alpha", "lora_dropout"):
        if flag in given and not (args.use_llm_lora or args.use_vision_lora):
            parser.error(f"--{flag} is about adapters: add --use_llm_lora, or --optimize_vision --use_vision_lora")
    if args.eval_visualize and args.no_eval:
        parser.error("--eval_visualize draws what is evaluated, and --no_eval evaluates nothing: give one of them")
    if args.precision == "fp16" and not args.eval_only and not torch.cuda.is_available():
        parser.error("--precision fp16 trains on a GPU only, and torch finds none")
    if args.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        parser.error("--report_to wandb: the package is not installed; pip install wandb")
    if args.custom_data and "custom" not in args.dataset.split("||"):
        parser.error('--custom_data is read by the family custom: name it in --dataset, e.g. --dataset "custom||vqa"')
    families, chosen = args.dataset.split("||"), {*given, *from_files}
    if families == ["custom"] and not args.no_eval and "val_dataset" not in chosen:
        parser.error(
            '--dataset custom: say with --val_dataset "custom|PATH" what to validate on, or --no_eval; the default, '
            "ReasonSeg, is part of the data tree"
        )
    if "custom" in families and "vqa" in families and "vqa_data" not in chosen:
        missing = [path for path in (args.data_dir, args.dataset_dir) if not path.is_dir()]
        if missing:
            parser.error(
                f"--dataset {args.dataset}: {missing[0]} is not there, and the family vqa reads all of its sets; name "
                "those that you have with --vqa_data"
            )
    own = "custom" in families and {*families} <= {"custom", "vqa"}  # what is in the tree is none of its business
    args.final_splits = args.splits if own else list(dict.fromkeys([*DEFAULT_SPLITS, *args.splits]))
    launched = distributed.launched()
    if args.deepspeed and not launched:
        parser.error("--deepspeed needs a launcher: start with deepspeed or torchrun instead of python")
    if args.local_rank is not None and launched and args.local_rank != int(os.environ["LOCAL_RANK"]):
        parser.error(f"--local_rank {args.local_rank} contradicts LOCAL_RANK={os.environ['LOCAL_RANK']}")
    if args.local_rank is not None and not launched:
        parser.error("--local_rank is for launchers: start with deepspeed or torchrun")
    if launched and args.deepspeed is None:
        args.deepspeed = ROOT / "configs" / "zero2.json"
    try:
        args.zero_stage = zero_stage(read_deepspeed(args.deepspeed)) if args.deepspeed else 0
    except ValueError as error:
        parser.error(f"--deepspeed: {error}")
    args.eval_precision = args.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    args.precision = args.precision or "bf16"
    launcher = "python" if not launched else "torchrun" if args.local_rank is None else "deepspeed"
    flags = [flag for flag in argv if not flag.startswith("--local_rank")]
    args.command = shlex.join([launcher, "train_hf_ivl_seq.py", *flags])  # for the model card
    args.run_dir = args.log_base_dir / args.exp_name
    return args
