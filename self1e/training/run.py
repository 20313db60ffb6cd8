"""Training from flags to `ckpt_model`: data, model, adapters, Trainer, merge, evaluation."""

import contextlib
import gc
import logging
import os
import sys
import warnings
from argparse import Namespace

import torch
import torch.distributed as dist
from transformers import TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar

from self1e.data.config import DataConfig
from self1e.data.loading import build_mixture
from self1e.data.paths import require_paths
from self1e.data.sample import SampleError
from self1e.data.splits import DEFAULT_SPLITS, load_split, split_paths
from self1e.evaluation.provenance import checkpoint_settings
from self1e.evaluation.segmentation.run import evaluate_splits
from self1e.model import checkpoints
from self1e.model.configuration import DTYPES, SWITCHES
from self1e.model.modeling import Self1EForSegmentation
from self1e.model.processing import HIGH_RES_TILES, Self1EProcessor
from self1e.training.adaptation import LLM_LINEARS, adapt, training_table
from self1e.training.arguments import parse
from self1e.training.model_card import write_model_card
from self1e.training.trainer import (
    Encode,
    NotSaved,
    Self1ETrainer,
    TooManyBroken,
    broken_list,
    checkpoints_in,
)

CHAT_TOKENS = 30  # system text, role headers and a few words: the least a row needs beside its image


def main(argv: list[str]) -> int:
    """Run the program; 0 on success, 1 with one message for a known failure, 130 after Ctrl-C."""
    args = parse(argv)
    quiet_libraries()
    try:
        if args.eval_only:
            evaluate(args)
        else:
            train(args)
            if not args.no_eval:
                args.splits, args.model_weights = list(dict.fromkeys([*DEFAULT_SPLITS, *args.splits])), None
                args.version = str(args.run_dir / "ckpt_model")
                evaluate(args, skip_missing=True)
    except (NotSaved, TooManyBroken, FloatingPointError) as error:  # met by one rank
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return 1
    except (ValueError, OSError, SampleError) as error:  # met by every rank alike
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt as interruption:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 and str(interruption):  # evaluation says what is done
            print(f"\n{interruption}", file=sys.stderr, flush=True)
        elif int(os.environ.get("LOCAL_RANK", 0)) == 0:
            kept = checkpoints_in(args.run_dir / "checkpoints")
            where = f"continue from {kept[-1]} with --auto_resume" if kept else "no checkpoint was written yet"
            print(f"\ninterrupted; {where}", file=sys.stderr, flush=True)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # without it, torch can abort at exit and the launcher reports a failure
    return 0


def quiet_libraries() -> None:
    """Leave one rank's voice, and drop warnings that a user can do nothing about."""
    first = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s")
    logging.getLogger("self1e").setLevel(logging.INFO if first else logging.WARNING)  # broken samples of any rank
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)  # accumulation is the Trainer's, not its own
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's calls
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find out, and warn
    disable_progress_bar()  # of loading and writing shards, amid our own


def check_length(args: Namespace, processor: Self1EProcessor) -> None:
    """Refuse a length limit that no row can keep."""
    tiles = HIGH_RES_TILES if args.high_res else 1
    least = tiles * processor.tile_tokens + CHAT_TOKENS
    if args.model_max_length < least:
        raise ValueError(
            f"--model_max_length {args.model_max_length} cannot hold {tiles} tiles of {processor.tile_tokens} image "
            f"tokens and a question; give at least {least}"
        )


def train(args: Namespace) -> None:
    """Train and write `<run_dir>/ckpt_model`."""
    splits = [] if args.no_eval else args.splits
    data = DataConfig.parse(
        dataset_dir=args.dataset_dir,
        data_dir=args.data_dir,
        **{name: getattr(args, name) for name in DataConfig.flags()},
    )
    require_paths(data.paths() + split_paths(splits, args.dataset_dir))
    checkpoint = resume_path(args)
    processor = Self1EProcessor.from_pretrained(args.version)
    check_length(args, processor)
    settings = training_arguments(args)  # starts the process group; before it, no rank may wait for another
    encode = Encode(processor, max_length=args.model_max_length, max_tiles=HIGH_RES_TILES if args.high_res else 1)
    with settings.main_process_first(local=True, desc="index of the data"):
        mixture = build_mixture(data, batch_size=args.batch_size, seed=args.seed, mode=args.mixture, transform=encode)
        for split in splits:
            load_split(
                split, args.dataset_dir, allow_outside=args.allow_outside
            )  # a faulty one fails here and not hours later
    per_epoch = -(-mixture.epoch_size // (args.batch_size * settings.world_size))
    limit = args.steps_per_epoch and args.steps_per_epoch * args.grad_accumulation_steps
    if limit and limit > per_epoch:
        steps = -(-per_epoch // args.grad_accumulation_steps)
        raise ValueError(f"--steps_per_epoch {args.steps_per_epoch}: an epoch has {steps} steps; lower or unset it")

    set_seed(args.seed)  # the fresh head is the same on every rank
    model = load_model(args, training=True)
    tuner = adapt(
        model,
        llm_lora=args.use_llm_lora,
        vision_lora=args.use_vision_lora,
        optimize_vision=args.optimize_vision,
        r=args.lora_r,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        llm_targets=args.lora_target_modules.split(",") if args.lora_target_modules else LLM_LINEARS,
        from_layer=args.lora_from_layer,
    )
    if settings.process_index == 0:
        sizes = ", ".join(f"{name} {size:,}" for name, size in mixture.sizes.items())
        steps = -(-(limit or per_epoch) // args.grad_accumulation_steps)
        size = f"{args.batch_size} photos x {args.grad_accumulation_steps} micro-batches x {settings.world_size} ranks"
        print(
            f"{training_table(model)}\n\nsamples on disk: {sizes}\n"
            f"an epoch: {mixture.epoch_size:,} samples, {steps:,} steps of {size}\n"
            f"{'starting anew' if checkpoint is None else f'continuing from {checkpoint}'}",
            flush=True,
        )

    def validate(step: int) -> dict[str, float]:
        folder = args.run_dir / "validation" / f"step_{step}"
        results = evaluate_splits(model, processor, splits, output_dir=folder, **evaluation_options(args))
        return {f"{split}_{key}": value[key] for split, value in results.items() for key in ("giou", "ciou")}

    trainer = Self1ETrainer(
        model=model,
        args=settings,
        eval_dataset=splits or None,
        mixture=mixture,
        processor=processor,
        lr=args.lr,
        vision_lr=args.vision_lr,
        reduction=args.grad_accumulation_reduction,
        epoch_limit=limit,
        first_epoch=args.start_epoch,
        validate=validate,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    broken = trainer.gather(trainer.broken)
    if broken and settings.process_index == 0:
        print(f"{len(broken)} broken samples were replaced:\n{broken_list(broken)}", flush=True)
    save(args, trainer, model, tuner, processor)


def resume_path(args: Namespace) -> str | None:
    """The checkpoint to continue from, if any."""
    if args.resume:
        if not (args.resume / "trainer_state.json").is_file():
            raise ValueError(f"--resume {args.resume}: no checkpoint there; expected a checkpoint-N folder of a run")
        return str(args.resume)
    found = checkpoints_in(args.run_dir / "checkpoints") if args.auto_resume else []
    return str(found[-1]) if found else None


def training_arguments(args: Namespace) -> TrainingArguments:
    """The Trainer's settings for our flags."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(args.run_dir / "tensorboard")  # the Trainer's only way to say so
    gpu = torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=str(args.run_dir / "checkpoints"),
        num_train_epochs=args.epochs - args.start_epoch,
        max_steps=args.max_steps or -1,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accumulation_steps,
        learning_rate=args.lr,
        adam_beta1=args.beta1,
        adam_beta2=args.beta2,
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        warmup_steps=args.warmup_steps,
        bf16=args.precision == "bf16",
        fp16=args.precision == "fp16",
        activation_checkpointing=args.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if args.gradient_checkpointing else None,
        deepspeed=str(args.deepspeed) if args.deepspeed else None,
        use_cpu=not gpu,
        ddp_backend="gloo" if "LOCAL_RANK" in os.environ and not gpu else None,
        dataloader_num_workers=args.workers,
        remove_unused_columns=False,
        logging_steps=args.print_freq,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=args.save_steps,
        eval_strategy="no" if args.no_eval else "steps",
        eval_steps=args.eval_steps,
        report_to=args.report_to,
        run_name=args.exp_name,
        seed=args.seed,
    )
    if args.deepspeed:
        import deepspeed  # not needed without a launcher

        # Shared-memory collectives of inference on CPUs: training uses none, yet every rank would compile them.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    if settings.n_gpu > 1:  # plain python on a machine with several GPUs: DataParallel cannot split our batches
        raise ValueError("several GPUs: start with deepspeed or torchrun, or set CUDA_VISIBLE_DEVICES to one")
    return settings


def load_model(args: Namespace, *, training: bool) -> Self1EForSegmentation:
    """The model of `--version` and `--model_weights`, with the ablation switches.

    Under DeepSpeed weights are kept in the training precision, the optimizer has its own fp32 copy; without, they stay
    fp32 and autocast computes in lower precision.
    """
    # Under ZeRO-3 the library would partition weights while it loads them, before vocabulary and adapters are there:
    # the engine does it afterwards, from a whole model on every rank's CPU; the final evaluation has no engine.
    unset_hf_deepspeed_config()
    values = {name: getattr(args, name) for name in SWITCHES}
    dtype = DTYPES[args.precision if training else args.eval_precision]
    return Self1EForSegmentation.from_pretrained(
        args.version,
        weights=args.model_weights,
        dtype=torch.float32 if training and not args.deepspeed else dtype,
        attn_implementation=args.attn_implementation,
        **{name: value for name, value in values.items() if value is not None},
    )


def save(args: Namespace, trainer: Self1ETrainer, model, tuner, processor) -> None:
    """Merge the adapters on every rank and write the model once."""
    gathered = contextlib.nullcontext()
    if trainer.is_deepspeed_enabled and trainer.model_wrapped.zero_optimization_stage() == 3:
        import deepspeed

        trainer.model_wrapped.empty_partition_cache()  # validation leaves prefetched parameters in flight
        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with gathered:
        merged = tuner.merge_and_unload() if tuner else model
        if trainer.args.process_index == 0:
            checkpoints.save(merged, processor, args.run_dir / "ckpt_model")
            write_model_card(args.run_dir / "ckpt_model", base=args.version, command=args.command)
            if args.save_published_layout:
                checkpoints.save(merged, processor, args.run_dir / "ckpt_model_published", published=True)
            print(f"saved {args.run_dir / 'ckpt_model'}", flush=True)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = None
    gc.collect()


def evaluation_options(args: Namespace) -> dict:
    names = ("dataset_dir", "allow_outside", "workers", "model_max_length", "high_res")
    return {name: getattr(args, name) for name in names}


def evaluate(args: Namespace, *, skip_missing: bool | None = None) -> None:
    """Evaluate `args.splits` and write `<run_dir>/eval`.

    Weights: `--model_weights`, else `<run_dir>/ckpt_model` if it is there, else the head inside `--version`.
    """
    trained = args.run_dir / "ckpt_model"
    if args.model_weights is None and trained.is_dir():
        args.version = str(trained)
    processor = Self1EProcessor.from_pretrained(args.version)
    check_length(args, processor)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)  # collectives of objects use the current device
    else:
        torch.set_num_threads(1)  # figures to the pixel on any number of processes; those are what uses more cores
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo")
    model = load_model(args, training=False).to(device)
    if not model.trained_head:
        raise ValueError(
            f"{args.version} is a base model without a segmentation head, and {trained} does not exist: train first, "
            "or name trained weights with --model_weights"
        )
    evaluate_splits(
        model,
        processor,
        args.splits,
        output_dir=args.run_dir / "eval",
        visualize=args.eval_visualize,
        skip_missing=args.eval_all_datasets if skip_missing is None else skip_missing,
        checkpoint=checkpoint_settings(args.version, args.model_weights),
        overwrite=args.overwrite_eval or not args.eval_only,  # a training that has just ended made new weights
        **evaluation_options(args),
    )
    if args.version == str(trained) and int(os.environ.get("RANK", 0)) == 0:
        write_model_card(trained)  # with the table
