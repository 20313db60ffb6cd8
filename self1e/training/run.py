"""Training from flags to `ckpt_model`: data, model, adapters, Trainer, merge, evaluation."""

import contextlib
import gc
import logging
import os
import sys
import warnings
from argparse import Namespace
from datetime import timedelta
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from transformers import TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar

from self1e import distributed
from self1e.data.families import DataConfig
from self1e.data.loader import Encode, build_mixture
from self1e.data.paths import require_paths
from self1e.data.samples import SampleError
from self1e.data.splits import get_splits, load_split, split_paths
from self1e.evaluation.segmentation.run import evaluate_splits
from self1e.evaluation.watchdog import Watchdog
from self1e.flags import REQUEUE, check_writable, counted
from self1e.model.config import DTYPES, LOSS_FLAGS, SWITCHES
from self1e.model.modeling import Self1EForSegmentation
from self1e.model.processor import HIGH_RES_TILES, Self1EProcessor
from self1e.model.weights import save_checkpoint, weights_identity
from self1e.training.adaptation import adapt, training_table
from self1e.training.args import LLM_LINEARS, parse
from self1e.training.card import write_card
from self1e.training.checkpoint import alone_in, check_unused, checkpoints_in, defining_settings, find_checkpoint
from self1e.training.curves import write_curves
from self1e.training.healthy import recipe_of
from self1e.training.new_rows import merge_new_rows, train_new_rows
from self1e.training.stop import StopRequest
from self1e.training.stream import TooManyBroken, broken_list
from self1e.training.trainer import NotSaved, Self1ETrainer

CHAT_TOKENS = 30  # system text, role headers and a few words: the least a row needs beside its image


def main(argv: list[str]) -> int:
    """Run the program and return its exit code; docs/training.md lists them."""
    return start(parse(argv))


def start(args: Namespace) -> int:
    """As `main`, from flags that are parsed already."""
    quiet_libraries()
    expected = (ValueError, OSError, SampleError, NotSaved, TooManyBroken, FloatingPointError, torch.OutOfMemoryError)
    return distributed.run_program(lambda: run(args), expected=expected)


def run(args: Namespace) -> int:
    """Train and evaluate, or evaluate alone; returns the exit code. Ctrl-C is raised with what to do next."""
    try:
        return train_and_evaluate(args)
    except KeyboardInterrupt:
        if args.eval_only:
            raise KeyboardInterrupt("interrupted; the same command continues") from None
        kept = checkpoints_in(args.run_dir / "checkpoints")
        where = f"continue from {kept[-1]} with --auto_resume" if kept else "no checkpoint was written yet"
        raise KeyboardInterrupt(f"interrupted; {where}") from None


def train_and_evaluate(args: Namespace) -> int:
    """As `run`, without a word about Ctrl-C."""
    if distributed.is_main():
        check_writable(args.run_dir)
    if args.eval_only:
        evaluate(args)
        return 0
    alone = alone_in(args.run_dir) if distributed.is_main() else contextlib.nullcontext()
    with StopRequest() as stop, alone:
        stopped = train(args, stop)
        gc.collect()  # the trained model goes before the evaluation loads its own
        if stopped:
            if distributed.is_main():
                kept = checkpoints_in(args.run_dir / "checkpoints")[-1]
                message = f"\nstopped by {stopped}; {kept} is saved, continue with --auto_resume"
                print(message, file=sys.stderr, flush=True)
            return REQUEUE
        if not args.no_eval:
            args.splits, args.model_weights = args.final_splits, None
            args.version = str(args.run_dir / "ckpt_model")
            evaluate(args, skip_missing=True)
    return 0


def quiet_libraries() -> None:
    """Leave one rank's voice, and drop warnings that a user can do nothing about."""
    first = distributed.is_main()
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s")
    logging.getLogger("self1e").setLevel(logging.INFO if first else logging.WARNING)  # broken samples of any rank
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # the hub's requests
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)  # accumulation is the Trainer's, not its own
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's calls
    warnings.filterwarnings("ignore", "OMP_NUM_THREADS/MKL_NUM_THREADS unset", UserWarning)  # it is set, they say
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # --workers suits a larger machine
    distributed.quiet_deepspeed()
    disable_progress_bar()  # of loading and writing shards, amid our own


def check_length(args: Namespace, tile_tokens: int) -> None:
    """Refuse a length limit that no row can keep."""
    tiles = HIGH_RES_TILES if args.high_res else 1
    least = tiles * tile_tokens + CHAT_TOKENS
    if args.model_max_length < least:
        raise ValueError(
            f"--model_max_length {args.model_max_length} cannot hold {tiles} tiles of {tile_tokens} image "
            f"tokens and a question; give at least {least}"
        )


def train(args: Namespace, stop: StopRequest) -> str | None:
    """Train and write `<run_dir>/ckpt_model`; returns what asked the run to stop, or None.

    A request after the last step comes too late to keep `ckpt_model` from being written.
    """
    splits = [] if args.no_eval else args.splits
    data = DataConfig.parse(
        dataset_dir=args.dataset_dir,
        data_dir=args.data_dir,
        **{name: getattr(args, name) for name in DataConfig.flags()},
    )
    require_paths(data.paths() + split_paths(splits, args.dataset_dir))
    if distributed.is_main():  # the others must not look into folders that may be removed here
        continued = args.resume or args.auto_resume and checkpoints_in(args.run_dir / "checkpoints")
        if not continued:
            check_unused(args.run_dir, overwrite=args.overwrite)
    processor = Self1EProcessor.from_pretrained(args.version)
    check_length(args, processor.tile_tokens)
    settings = training_arguments(args)  # starts the process group; before it, no rank may wait for another
    encode = Encode(processor, max_length=args.model_max_length, max_tiles=HIGH_RES_TILES if args.high_res else 1)
    with settings.main_process_first(local=True, desc="index of the data"):
        mixture = build_mixture(data, batch_size=args.batch_size, seed=args.seed, mode=args.mixture)
        for split in splits:  # a faulty one fails here and not hours later
            load_split(split, args.dataset_dir, allow_outside=args.allow_outside)
    per_epoch = -(-mixture.epoch_size // (args.batch_size * settings.world_size * args.grad_accumulation_steps))
    if args.steps_per_epoch and args.steps_per_epoch > per_epoch:
        raise ValueError(
            f"--steps_per_epoch {args.steps_per_epoch}: an epoch has {per_epoch} steps; lower or unset it"
        )
    per_epoch = args.steps_per_epoch or per_epoch
    steps = args.max_steps or per_epoch * (args.epochs - args.start_epoch)
    healthy = None

    defining = defining_settings(
        vars(args),
        ranks=settings.world_size,
        zero_stage=args.zero_stage,
        base=weights_identity(args.version, args.model_weights),
        samples=mixture.sizes,
    )
    checkpoint = find_checkpoint(args, defining)
    set_seed(args.seed)  # the fresh head is the same on every rank
    model = load_model(args, training=True)
    tuner = adapt_as_asked(args, model)
    recipe = recipe_of(defining, steps=steps, parameters=model.num_parameters())
    if healthy:
        healthy.check(recipe)
    if args.trainable_embeddings == "new":
        train_new_rows(model, processor.seg_token_id)
    if args.zero_stage == 3:
        model.set_zero3_leaf()
    sizes = ", ".join(f"{name} {size:,}" for name, size in mixture.sizes.items())
    micro_batches = counted(args.grad_accumulation_steps, "micro-batch", "micro-batches")
    size = f"{counted(args.batch_size, 'photo')} x {micro_batches} x {counted(settings.world_size, 'rank')}"
    distributed.say(
        f"{training_table(model)}\n\n{short_run(args, steps)}samples on disk: {sizes}\n"
        f"an epoch: {counted(mixture.epoch_size, 'sample')}, {counted(per_epoch, 'step')} of {size}\n"
        f"{'starting anew' if checkpoint is None else f'continuing from {checkpoint}'}"
    )

    def validate(step: int) -> dict[str, float]:
        folder = args.run_dir / "validation" / f"step_{step}"
        results = evaluate_splits(
            model,
            processor,
            splits,
            output_dir=folder,
            show=trainer.show,
            asked_to_stop=lambda: stop.cause is not None,
            print_table=False,
            **evaluation_options(args),
        )
        return {f"{split}_{key}": value[key] for split, value in results.items() for key in ("giou", "ciou")}

    if healthy and args.report_to == "tensorboard":
        distributed.on_main(lambda: healthy.write_events(args.run_dir / "tensorboard"))
    with Watchdog(args.run_dir / ".ranks", args.timeout) as watchdog:
        trainer = Self1ETrainer(
            model=model,
            args=settings,
            eval_dataset=splits or None,
            mixture=mixture,
            encode=encode,
            processor=processor,
            groups=1 if args.zero_stage == 3 else 2,
            lr=args.lr,
            vision_lr=args.vision_lr,
            reduction=args.grad_accumulation_reduction,
            epoch_limit=args.steps_per_epoch and args.steps_per_epoch * args.grad_accumulation_steps,
            first_epoch=args.start_epoch,
            validate=validate,
            settings=defining,
            keep=args.save_total_limit,
            best=args.keep_best and f"{args.keep_best}_{get_splits([args.keep_best])[args.keep_best].headline[0]}",
            stop=stop,
            watchdog=watchdog,
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    broken = [pair for part in distributed.gather(trainer.broken) for pair in part]
    if broken:
        distributed.say(f"replaced {counted(len(broken), 'broken sample')}:\n{broken_list(broken)}")
    causes = [cause for cause in distributed.gather(stop.cause) if cause is not None]
    if not trainer.stopped:
        save(args, trainer, model, tuner, processor)
        log, folder = trainer.state.log_history, args.run_dir
        distributed.on_main(lambda: write_curves(log, folder, recipe=recipe, seed=args.seed, healthy=healthy))
        distributed.say(f"saved {folder / 'ckpt_model'}, the curves are in {folder / 'curves.png'}")
    return causes[0] if causes else None


def short_run(args: Namespace, steps: int) -> str:
    """A warning for a run that ends before its learning rate has risen, else nothing."""
    if steps >= args.warmup_steps:
        return ""
    return (
        f"warning: the run has {counted(steps, 'step')}, fewer than --warmup_steps {args.warmup_steps}: the learning "
        "rate never reaches its peak. For little data see configs/small.yaml: more --epochs, a smaller "
        "--grad_accumulation_steps, a shorter warm-up\n\n"
    )


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
        activation_checkpointing=args.gradient_checkpointing is not None,
        activation_checkpointing_kwargs={"use_reentrant": False} if args.gradient_checkpointing else None,
        deepspeed=str(args.deepspeed) if args.deepspeed else None,
        use_cpu=not gpu,
        ddp_backend="gloo" if distributed.launched() and not gpu else None,
        ddp_timeout=int(args.timeout) + 60,  # the watchdog names the rank at fault before a collective gives up
        accelerator_config={"non_blocking": gpu},
        dataloader_pin_memory=gpu,
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
        deepspeed.init_distributed(
            dist_backend="nccl" if gpu else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=args.timeout + 60),
        )
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
    weights = {loss: getattr(args, flag) for flag, loss in LOSS_FLAGS.items() if getattr(args, flag) is not None}
    dtype = DTYPES[args.precision if training else args.eval_precision]
    return Self1EForSegmentation.from_pretrained(
        args.version,
        weights=args.model_weights,
        dtype=torch.float32 if training and not args.deepspeed else dtype,
        attn_implementation=args.attn_implementation,
        loss_weights=weights,
        **{name: value for name, value in values.items() if value is not None},
    )


def adapt_as_asked(args: Namespace, model: Self1EForSegmentation) -> LoraModel | None:
    """`adapt` the model as the flags say."""
    return adapt(
        model,
        llm_lora=args.use_llm_lora,
        vision_lora=args.use_vision_lora,
        optimize_vision=args.optimize_vision,
        freeze_llm=args.freeze_llm,
        r=args.lora_r,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        llm_targets=args.lora_target_modules.split(",") if args.lora_target_modules else LLM_LINEARS,
        from_layer=args.lora_from_layer,
    )


def save(args: Namespace, trainer: Self1ETrainer, model, tuner, processor) -> None:
    """Merge the adapters on every rank and write the model once."""
    gathered: contextlib.AbstractContextManager = contextlib.nullcontext()
    if args.zero_stage == 3:
        import deepspeed

        engine: Any = trainer.model_wrapped
        engine.empty_partition_cache()  # validation leaves prefetched parameters in flight
        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()))

    def write() -> None:
        save_checkpoint(merged, processor, args.run_dir / "ckpt_model")
        write_card(args.run_dir / "ckpt_model", base_model=args.version, command=args.command)
        if args.save_published_layout:
            save_checkpoint(merged, processor, args.run_dir / "ckpt_model_published", published=True)

    with gathered:
        merged = tuner.merge_and_unload() if tuner else model
        merge_new_rows(merged)
        distributed.on_main(write)
    trainer.accelerator.free_memory()


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
    skip_missing = args.eval_all_datasets if skip_missing is None else skip_missing
    if not skip_missing:
        require_paths(split_paths(args.splits, args.dataset_dir))  # before a model is loaded
    processor = Self1EProcessor.from_pretrained(args.version)
    check_length(args, processor.tile_tokens)
    device = distributed.device()
    if device.type == "cpu":
        torch.set_num_threads(1)  # figures to the pixel on any number of processes; those are what uses more cores
    distributed.start(timeout=timedelta(seconds=args.timeout + 60))  # as in training
    model = load_model(args, training=False).to(device)  # type: ignore[arg-type]  # transformers annotates `self` of `to`
    if not model.trained_head:
        raise ValueError(
            f"{args.version} is a base model without a segmentation head, and {trained} does not exist: train first, "
            "or name trained weights with --model_weights"
        )
    distributed.say(f"evaluating {args.model_weights or args.version} on {counted(len(args.splits), 'split')}")
    evaluate_splits(
        model,
        processor,
        args.splits,
        output_dir=args.run_dir / "eval",
        visualize=args.eval_visualize,
        skip_missing=skip_missing,
        weights=weights_identity(args.version, args.model_weights),
        overwrite=args.overwrite_eval or not args.eval_only,  # a training that has just ended made new weights
        **evaluation_options(args),
    )
    if args.version == str(trained) and distributed.is_main():
        write_card(trained)  # with the table
