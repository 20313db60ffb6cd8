"""Training from flags to `ckpt_model`: data, model, adapters, the loop, merge, evaluation."""

import contextlib
import gc
import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar

from self1e import distributed
from self1e.data.families import select
from self1e.data.mixture import Mixture, Stream
from self1e.data.samples import require_paths
from self1e.data.splits import evaluation_keys, split_readers
from self1e.evaluation.results import evaluated, weights_identity
from self1e.evaluation.segmentation.run import evaluate_splits
from self1e.files import alone_in, check_utf8, check_writable
from self1e.flags import DTYPES
from self1e.model.config import LOSS_FLAGS, SWITCHES
from self1e.model.inference import check_head
from self1e.model.modeling import Self1EForSegmentation, selective_checkpointing_kwargs
from self1e.model.processor import HIGH_RES_TILES, Self1EProcessor
from self1e.model.prompts import IMAGE_TAG, SEG
from self1e.model.weights import check_published, save_checkpoint
from self1e.stop import Stopped, stop_requests
from self1e.training import checkpoints
from self1e.training.adapters import ADAPTERS, adapt, keep_frozen_in, merge_added_tokens, train_added_tokens
from self1e.training.args import parse
from self1e.training.card import write_card
from self1e.training.curves import Record
from self1e.training.loop import fit, make_accelerator, make_optimizer, micro_batches
from self1e.training.speed import compile_layers


def main(argv: list[str]) -> int:
    """Train and evaluate, or evaluate alone; returns the exit code, docs/training.md lists them."""
    args = parse(argv)
    prepare_libraries()
    main, trains = distributed.is_main(), not args.eval_only
    if main:
        check_utf8(args.run_dir)
        check_writable(args.run_dir)
    alone = alone_in(args.run_dir) if trains and main else contextlib.nullcontext()
    with alone, stop_requests(args.run_dir) as asked_to_stop:
        anew = trains and train(args, asked_to_stop)
        if trains:
            gc.collect()  # the trained model goes before the evaluation loads its own
            args.splits, args.model_weights = args.final_splits, None
        if not args.no_eval:
            evaluate(args, asked_to_stop, overwrite=args.overwrite_eval or anew)
    return 0


def prepare_libraries() -> None:
    """Leave one rank's voice, drop warnings that a user can do nothing about, and let batches differ in size."""
    first = distributed.is_main()
    logging.basicConfig(level=logging.WARNING if first else logging.ERROR, format="%(message)s")
    logging.getLogger("self1e").setLevel(logging.INFO if first else logging.WARNING)  # broken samples of any rank
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's calls
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)  # of 5.23 on
    disable_progress_bar()  # of loading and writing shards, amid our own
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # read at the first use of a GPU; without it, memory fragments
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def train(args: Namespace, asked_to_stop: Callable[[], bool]) -> bool:
    """Train and write `<run_dir>/ckpt_model`; returns False where a finished run is asked to continue.

    Raises `Stopped` when asked to stop before the last step.
    """
    # Everything that can be wrong is looked at first: before the model is loaded and an earlier run is removed.
    distributed.start(timeout=timedelta(seconds=args.timeout))
    checkpoint = distributed.on_main(lambda: checkpoints.find(args))  # on a shared disk nodes may see different ones
    splits = [] if args.no_eval else args.splits
    stream = open_data(args, splits)
    processor, mixture, ranks = stream.processor, stream.mixture, distributed.world_size()
    per_epoch = -(-mixture.epoch_size // (args.batch_size * ranks * args.grad_accumulation_steps))
    per_epoch = min(per_epoch, args.steps_per_epoch or per_epoch)
    steps = args.max_steps or per_epoch * (args.epochs - args.start_epoch)
    settings = checkpoints.settings_of(args, sets=mixture.sizes, ranks=ranks)
    if checkpoint is not None:
        checkpoints.check_resumable(checkpoint, settings, anyway=args.resume_anyway)
    if distributed.on_main(lambda: checkpoints.merged(checkpoint, args.run_dir, steps=steps)):
        distributed.say(f"the run has its {steps} steps, and {args.run_dir / 'ckpt_model'} is their result")
        return False

    set_seed(args.seed)  # the fresh head is the same on every rank
    model = load_model(args, torch.float32 if not args.deepspeed else DTYPES[args.precision])
    if args.save_published_layout:
        check_published(model.config)
    tuner = prepare_model(args, model, processor)
    sizes = [(x.numel() / 1e6, x.requires_grad) for x in model.parameters()]
    distributed.say(
        f"parameters: {sum(n for n, trains in sizes if trains):,.2f} M of {sum(n for n, _ in sizes):,.2f} M train\n"
        f"samples that take part: {', '.join(f'{name} {size:,}' for name, size in mixture.sizes.items())}\n"
        f"an epoch: {mixture.epoch_size:,} samples, {per_epoch:,} steps of "
        f"{args.batch_size} x {args.grad_accumulation_steps} x {ranks} photos (batch x micro-batches x ranks)\n"
        f"{'starting anew' if checkpoint is None else f'continuing from {checkpoint}'}"
    )
    if steps < args.warmup_steps:
        distributed.say(
            f"warning: the run has {steps} steps, fewer than --warmup_steps {args.warmup_steps}, so that the learning "
            "rate never reaches its peak; for little data see configs/small.yaml"
        )
    accelerator = make_accelerator(args, model.lm_head.in_features)
    engine, optimizer = accelerator.prepare(model, make_optimizer(model, args))
    tensors = {"accelerator": accelerator, "model": engine, "optimizer": optimizer}
    set_seed(args.seed)
    step, stopped = 0, False
    if checkpoint is None:
        distributed.on_main(lambda: checkpoints.remove_earlier(args.run_dir, results=args.overwrite))
    else:
        step = checkpoints.load(checkpoint, **tensors)
    record, folder = Record(args, accelerator, per_epoch, step, settings["flags"]), args.run_dir / "checkpoints"
    batches = micro_batches(stream, args, step=step, per_epoch=per_epoch)
    training = fit(accelerator, engine, optimizer, batches, args, asked_to_stop, step=step, steps=steps)
    for step, figures, stopped in training:
        if figures:
            record.log(step, figures)
        due = stopped or step % args.save_steps == 0 or step == steps
        if due:
            checkpoints.save(folder, step, settings, record.best(), **tensors)
        if splits and not stopped and (step % args.eval_steps == 0 or step == steps):
            options = evaluation_flags(args) | {"output_dir": args.run_dir / "validation" / f"step_{step}"}
            if args.zero_stage != 3:  # where no rank can leave alone: the next step meets the request
                options["asked_to_stop"] = asked_to_stop
            try:
                with accelerator.autocast():
                    results = evaluate_splits(model, processor, splits, print_table=False, **options)
                scores = {f"eval_{split}_{key}": results[split][key] for split in splits for key in ("giou", "ciou")}
                record.log(step, scores)
            except Stopped:  # on all ranks
                stopped = True
            best = distributed.on_main(record.best)
            if not due and (stopped or best == step):
                checkpoints.save(folder, step, settings, best, **tensors)
            if stopped:
                break
    if not stopped:
        merge_and_save(args, engine, model, tuner, processor)
        distributed.say(f"saved {args.run_dir / 'ckpt_model'}, the curves are in {args.run_dir / 'curves.png'}")
    distributed.on_main(record.close)
    accelerator.free_memory()
    if stopped:
        raise Stopped
    return True


def open_data(args: Namespace, splits: list[str]) -> Stream:
    """The stream of encoded samples, checked, and so are the splits of validation."""
    selection = select(**vars(args))
    readers = split_readers(splits, args.dataset_dir, allow_outside=args.allow_outside).values()
    require_paths([*(data for sets, _ in selection for data in sets), *readers])
    processor, tiles = Self1EProcessor.from_pretrained(args.version), HIGH_RES_TILES if args.high_res else 1
    processor.encode_conversation([IMAGE_TAG, SEG], tiles, args.model_max_length)  # raises where no question fits
    for reader in readers:  # a faulty one fails here and not hours later
        reader.opened()
    excluded = evaluation_keys(args.dataset_dir) if args.exclude_val else None
    options = {"batch_size": args.batch_size, "seed": args.seed, "mode": args.mixture, "excluded": excluded}
    mixture = Mixture(selection, **options)
    return Stream(mixture, processor, args.model_max_length, tiles, groups=1 if args.zero_stage == 3 else 2)


def load_model(args: Namespace, dtype: torch.dtype) -> Self1EForSegmentation:
    """The model of `--version` and `--model_weights`, with the ablation switches."""
    # Under ZeRO-3 the library would partition weights while it loads them, before vocabulary and adapters are there:
    # the engine does it afterwards, from a whole model on every rank's CPU; the final evaluation has no engine.
    unset_hf_deepspeed_config()
    given = {name: value for name, value in vars(args).items() if value is not None}
    return Self1EForSegmentation.from_pretrained(
        args.version,
        weights=args.model_weights,
        dtype=dtype,
        attn_implementation=args.attn_implementation,
        loss_weights={loss: given[flag] for flag, loss in LOSS_FLAGS.items() if flag in given},
        **{name: given[name] for name in SWITCHES if name in given},
    )


def prepare_model(args: Namespace, model: Self1EForSegmentation, processor: Self1EProcessor) -> LoraModel | None:
    """Adapters, what trains, and how, in place; returns what merges the adapters."""
    tuner = adapt(model, **{name: getattr(args, name) for name in ADAPTERS})
    if args.trainable_embeddings == "new":
        train_added_tokens(model, processor.seg_token_id)
    if not args.deepspeed and args.precision == "bf16":  # DeepSpeed keeps fp32 copies of what trains by itself
        keep_frozen_in(torch.bfloat16, model)
    if args.gradient_checkpointing:
        selective = args.gradient_checkpointing == "selective"
        kwargs = selective_checkpointing_kwargs() if selective else {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if args.compile:
        compile_layers(model)
        distributed.say("the first training steps compile the layers, which takes minutes")
    if args.zero_stage == 3:
        from deepspeed.utils import set_z3_leaf_modules

        # Ranks run the head's layers unequally often, and would wait for each other for ever otherwise.
        set_z3_leaf_modules(model, [type(model.segmentation_head)])
    return tuner


def merge_and_save(args: Namespace, engine, model, tuner: LoraModel | None, processor: Self1EProcessor) -> None:
    """Merge the adapters on every rank and write `ckpt_model` once."""

    def write() -> None:
        if args.save_published_layout:
            save_checkpoint(merged, processor, args.run_dir / "ckpt_model_published", published=True)
        save_checkpoint(merged, processor, args.run_dir / "ckpt_model")  # last: it says that the run is finished
        write_card(args.run_dir / "ckpt_model", base_model=args.version, command=args.command)

    with contextlib.ExitStack() as stack:
        if args.zero_stage == 3:
            import deepspeed

            engine.empty_partition_cache()  # validation leaves prefetched parameters in flight
            stack.enter_context(deepspeed.zero.GatheredParameters(list(model.parameters())))
        if not args.deepspeed:
            keep_frozen_in(torch.float32, model)  # so that the sum with the adapters is not rounded
        merged: Any = tuner.merge_and_unload() if tuner else model
        merge_added_tokens(merged)
        distributed.on_main(write)


def evaluation_flags(args: Namespace) -> dict[str, Any]:
    """The flags that `evaluate_splits` takes under their own names."""
    names = ("dataset_dir", "allow_outside", "workers", "timeout", "model_max_length", "high_res")
    return {name: getattr(args, name) for name in names}


def evaluate(args: Namespace, asked_to_stop: Callable[[], bool], *, overwrite: bool) -> None:
    """Evaluate `args.splits` and write `<run_dir>/eval`. Raises `Stopped` when asked to stop.

    overwrite: delete results of other weights and settings.
    """
    trained, args.version = args.run_dir / "ckpt_model", evaluated(args.run_dir, args.version, args.model_weights)
    distributed.say(f"evaluating {args.model_weights or args.version} on {', '.join(args.splits)}")
    processor = Self1EProcessor.from_pretrained(args.version)
    device = distributed.device()
    if device.type == "cpu":
        torch.set_num_threads(1)  # figures to the pixel on any number of processes; those are what uses more cores
    distributed.start(timeout=timedelta(seconds=args.timeout))
    model = load_model(args, DTYPES[args.eval_precision]).to(device)  # type: ignore[arg-type]  # transformers annotates `self` of `to`
    check_head(model)
    evaluate_splits(
        model, processor, args.splits, output_dir=args.run_dir / "eval", visualize=args.eval_visualize,
        skip_missing=args.eval_all_datasets or not args.eval_only, overwrite=overwrite, asked_to_stop=asked_to_stop,
        weights=weights_identity(args.version, args.model_weights), **evaluation_flags(args),
    )  # fmt: skip
    if args.version == str(trained) and distributed.is_main():
        write_card(trained)  # with the table
