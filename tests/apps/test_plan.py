"""The plan of a run against a real step: the live tensors of a small model that trains as under DeepSpeed."""

import argparse
import contextlib
import json
import runpy

import pytest
import torch
from helpers import ROOT

from self1e import Self1EForSegmentation
from self1e.apps.measuring import Peak
from self1e.apps.plan import build, count_activations, fixed_memory, make_batch
from self1e.model.config import DTYPES
from self1e.training.adapters import adapt_as_asked, train_added_tokens
from self1e.training.args import parse

RECIPE = ["--use_llm_lora", "--use_vision_lora", "--optimize_vision", "--gradient_checkpointing"]
TOLERANCE = 0.15
SCRIPT = runpy.run_path(str(ROOT / "scripts/plan.py"))


@pytest.fixture(scope="module")
def small_version(make_tiny):
    """Large enough for weights, optimizer and activations to weigh alike."""
    return make_tiny(width=128, vocab_size=4000)


def flags(version, *given: str) -> argparse.Namespace:
    args = parse([*given, "--version", str(version), "--exp_name", "plan"])
    return argparse.Namespace(**vars(args), answer_tokens=8)


def measured(args: argparse.Namespace, model: Self1EForSegmentation) -> int:
    """Peak bytes of two steps of two micro-batches: weights in `--precision`, all else as ZeRO keeps it, in fp32."""
    trained = [x for x in model.parameters() if x.requires_grad]
    weights = sum(x.nbytes for x in {id(x): x for x in model.parameters()}.values())
    with Peak([*model.parameters(), *model.buffers()]) as peak:
        batch = make_batch(args, model.config, args.batch_size, "cpu")
        master = [x.detach().to(torch.float32, copy=True) for x in trained]
        sums = [torch.zeros_like(x) for x in master]
        optimizer = torch.optim.AdamW(master, lr=1e-4, foreach=False)
        places = {id(x): i for i, x in enumerate(trained)}

        def reduce(x: torch.Tensor) -> None:
            sums[places[id(x)]].add_(x.grad)
            x.grad = None

        for x in trained:
            x.register_post_accumulate_grad_hook(reduce)
        for _ in range(2):
            for _ in range(2):
                model(**batch).loss.backward()
            for x, total in zip(master, sums):
                x.grad = total
            optimizer.step()
            with torch.no_grad():
                for x, value, total in zip(trained, master, sums):
                    x.copy_(value)
                    total.zero_()
    return weights + peak.most


def planned(args: argparse.Namespace) -> tuple[float, float, float]:
    """The same by the plan, ZeRO-2 on one GPU without its buffers: weights, sums and optimizer, activations."""
    model = build(args)
    parameters = sum(x.numel() for x in model.parameters())
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    width = DTYPES[args.precision].itemsize
    fixed = fixed_memory(parameters, trained, width=width, gpus=1, stage=2, offload=False)
    return fixed.parameters, fixed.gradients + fixed.optimizer, count_activations(args, model, args.batch_size)


def checked(args: argparse.Namespace) -> tuple[tuple[float, float, float], int]:
    """The plan's three parts and the measured bytes of the model of `--version`."""
    model = Self1EForSegmentation.from_pretrained(args.version, dtype=DTYPES[args.precision])
    adapt_as_asked(args, model)
    if args.trainable_embeddings == "new":
        train_added_tokens(model, model.config.seg_token_id)
    model.to(DTYPES[args.precision])
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return planned(args), measured(args, model.train())


@pytest.mark.parametrize(
    "given",
    [
        [*RECIPE, "--lora_r", "64"],
        [*RECIPE, "--lora_r", "64", "--trainable_embeddings", "new", "--precision", "fp32"],
        ["--optimize_vision", "--precision", "fp32"],
        [*RECIPE, "--high_res", "--num_classes_per_sample", "1"],
    ],
    ids=["recipe", "new rows, fp32", "everything, fp32", "tiles"],
)
def test_the_plan_is_what_a_real_step_takes(given, small_version):
    parts, found = checked(flags(small_version, *given, "--batch_size", "2", "--model_max_length", "128"))
    assert sum(parts) == pytest.approx(found, rel=TOLERANCE)
    assert parts[1] > TOLERANCE * found and parts[2] > TOLERANCE * found  # neither can be wrong unnoticed


def test_activations_lie_on_a_line(small_version):
    args = flags(small_version, *RECIPE, "--model_max_length", "128")
    model = build(args)
    few, some, many = (count_activations(args, model, photos) for photos in (2, 4, 8))
    assert (many - some) / 4 == pytest.approx((some - few) / 2, rel=0.02)


def test_zero_divides_among_the_gpus():
    def memory(**given):
        return fixed_memory(2_000_000_000, 500_000_000, width=2, gpus=8, **given)

    two, three = memory(stage=2, offload=False), memory(stage=3, offload=False)
    assert (two.parameters, two.gradients, two.optimizer, two.host) == (4e9, 500e6 * 4 / 8, 500e6 * 12 / 8, 0)
    assert (three.parameters, three.gradients, three.optimizer) == (4e9 / 8, two.gradients, two.optimizer)
    offloaded = memory(stage=3, offload=True)
    assert offloaded.gpu == three.buffers and offloaded.gpu + offloaded.host == three.gpu
    assert memory(stage=2, offload=True).gpu == two.parameters + two.buffers


def test_the_published_2b_is_planned_without_weights():
    args = flags("2B", "--config", str(ROOT / "configs/self1e_2b.yaml"))
    model = build(args)
    assert {x.device.type for x in model.parameters()} == {"meta"}
    # docs/memory.md: 2.32 B parameters, of which 707 M are trained
    assert round(sum(x.numel() for x in model.parameters()) / 1e6) == 2322
    assert round(sum(x.numel() for x in model.parameters() if x.requires_grad) / 1e6) == 707


def test_the_script_writes_table_and_json(small_version, tmp_path, capsys):
    given = ["--version", small_version, "--gpus", "2", "--gpu_memory", "3", "--samples", "1000", "--batch_size", "3"]
    given += [*RECIPE, "--model_max_length", "128", "--grad_accumulation_steps", "2", "--output", tmp_path]
    assert SCRIPT["main"](list(map(str, given))) == 0
    printed = capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["steps_per_epoch"] == 84  # 1000 / (3 x 2 x 2)
    seconds = plan["flops_per_micro_batch"] * 2 / (312e12 * 0.35)
    assert plan["seconds_per_step"] == pytest.approx(seconds)
    assert [(case["stage"], case["offload"]) for case in plan["cases"]] == [
        (2, False),
        (2, True),
        (3, False),
        (3, True),
    ]
    for case in plan["cases"]:
        assert f"{case['total'] / 1e9:.1f}" in printed
        used = case["total"] + (case["largest"] - 3) * plan["activations_per_further_photo"]
        assert used <= 3e9 * 0.9 < used + plan["activations_per_further_photo"]
    assert "ASSUMED" in printed


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--gpu_memry", "80"], "--gpu_memry"),
        (["--model_max_length", "200"], "--model_max_length 200 cannot hold"),
        (["--version", "no/such/folder"], "there is no folder no/such/folder"),
    ],
)
def test_wrong_flags_are_one_message(given, says, tmp_path, capsys):
    with contextlib.suppress(SystemExit):
        assert SCRIPT["run_program"](lambda: SCRIPT["main"](["--output", str(tmp_path), *given])) == 1
    assert says in capsys.readouterr().err
