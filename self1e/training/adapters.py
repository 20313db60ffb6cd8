"""What is trained, frozen and adapted (paper, section 4.1): LoRA on LLM and ViT, the rest whole or not at all."""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from self1e.errors import UserError
from self1e.model.weights import HEAD
from self1e.training.args import LLM_LINEARS

VISION_LINEARS = ("q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2")

LLM, VISION, PROJECTOR = "model.language_model.", "model.vision_tower.", "model.multi_modal_projector."
PARTS = {
    "LLM embeddings": LLM + "embed_tokens.",
    "LLM layers": LLM,
    "lm_head": "lm_head.",
    "ViT": VISION,
    "projector": PROJECTOR,
    "segmentation head": HEAD,
}
ADDED = "added_tokens"  # parameter of embedding and lm_head, (added tokens, C), where only these train
HOOK = "added_tokens_hook"


def adapt(
    model: PreTrainedModel,
    *,
    llm_lora: bool,
    vision_lora: bool,
    optimize_vision: bool,
    freeze_llm: bool = False,
    r: int = 128,
    alpha: int | None = None,
    dropout: float = 0.05,
    llm_targets: Sequence[str] = LLM_LINEARS,
    from_layer: int = 0,
) -> LoraModel | None:
    """Put LoRA into `model` in place and set which parameters train.

    Args:
        llm_lora: adapters on the LLM's linears from layer `from_layer` on; its layers are frozen otherwise, embeddings
            and `lm_head` train whole. Without: the whole LLM trains, unless `freeze_llm`.
        vision_lora: adapters on the ViT; needs `optimize_vision`. Without: the whole ViT trains if `optimize_vision`.
        optimize_vision: train ViT (or its adapters) and projector; both are frozen otherwise.
        freeze_llm: freeze the LLM's layers and final norm, without adapters; embeddings and `lm_head` train whole.
        r, alpha, dropout: of the adapters; `alpha` defaults to 2 r.
        llm_targets: linears of the LLM that get an adapter, of `LLM_LINEARS`.

    Returns:
        The tuner, whose `merge_and_unload()` gives the plain model back; None without adapters.
    """
    unknown = set(llm_targets) - set(LLM_LINEARS)
    if unknown:
        raise UserError(f"--lora_target_modules: unknown {sorted(unknown)}; the LLM's linears are {LLM_LINEARS}")
    layers = model.config.text_config.num_hidden_layers
    if not 0 <= from_layer < layers:
        raise UserError(f"--lora_from_layer {from_layer}: the LLM's layers are 0 to {layers - 1}")
    targets = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        leaf = name.rpartition(".")[2]
        if llm_lora and name.startswith(LLM + "layers.") and leaf in llm_targets:
            if int(name.removeprefix(LLM + "layers.").split(".")[0]) >= from_layer:
                targets.append(name)
        elif vision_lora and name.startswith(VISION) and leaf in VISION_LINEARS:
            targets.append(name)
    tuner = None
    if targets:
        config = LoraConfig(r=r, lora_alpha=alpha or 2 * r, lora_dropout=dropout, target_modules=targets)
        tuner = LoraModel(model, config, "default")
    frozen = [LLM + "layers.", LLM + "norm."] if llm_lora or freeze_llm else []
    frozen += [] if optimize_vision else [VISION, PROJECTOR]
    frozen += [VISION] if vision_lora else []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or not name.startswith(tuple(frozen)))
    return tuner


def adapt_as_asked(args: Namespace, model: PreTrainedModel) -> LoraModel | None:
    """`adapt` the model as the flags of training say."""
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


def train_added_tokens(model: PreTrainedModel, first: int) -> None:
    """Freeze embedding and `lm_head` in place, but for the vectors of the tokens from id `first` on.

    These become a parameter of their own, so that the optimizer has states for them alone; `merge_added_tokens` writes
    them back. Tied matrices share them, too. Raises UserError when the vocabulary ends before `first`.
    """
    embedding, lm_head = _matrices(model)
    size = embedding.weight.shape[0]
    if not first < size:
        raise UserError(f"--trainable_embeddings new: the vocabulary of {size} tokens holds none from {first} on")
    added: dict[int, nn.Parameter] = {}  # by matrix
    for module, hook in ((embedding, _embed), (lm_head, _score)):
        matrix = module.weight.requires_grad_(False)
        own = added.setdefault(id(matrix), nn.Parameter(matrix.detach()[first:].clone()))
        module.register_parameter(ADDED, own)
        setattr(module, HOOK, module.register_forward_hook(partial(hook, first)))


def merge_added_tokens(model: PreTrainedModel) -> None:
    """Write the trained vectors into their matrices and leave plain modules; without such it changes nothing."""
    for module in _matrices(model):
        if ADDED not in module._parameters:
            continue
        added = getattr(module, ADDED)
        with torch.no_grad():
            module.weight[-len(added) :] = added
        getattr(module, HOOK).remove()
        delattr(module, HOOK)
        delattr(module, ADDED)


def _matrices(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear]:
    return cast(nn.Embedding, model.get_input_embeddings()), cast(nn.Linear, model.get_output_embeddings())


def _embed(first: int, module: nn.Module, inputs: tuple[Tensor], embedded: Tensor) -> Tensor:
    """Replace the vectors (..., C) of added tokens among those of `ids` (...)."""
    (ids,) = inputs
    added = F.embedding((ids - first).clamp(min=0), getattr(module, ADDED))
    return torch.where((ids >= first).unsqueeze(-1), added, embedded)


def _score(first: int, module: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
    """Replace the logits (..., vocabulary) of added tokens for states (..., C)."""
    (states,) = inputs
    return torch.cat([logits[..., :first], F.linear(states, getattr(module, ADDED))], dim=-1)


def optimizer_groups(model: nn.Module, *, lr: float, vision_lr: float) -> list[dict[str, Any]]:
    """Parameter groups: the LLM with its embeddings and `lm_head` at `lr`, everything else at `vision_lr`."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    llm = [name for name in trained if name.startswith((LLM, "lm_head."))]
    rest = [name for name in trained if name not in set(llm)]
    groups: list[dict[str, Any]] = [
        {"name": name, "params": [trained[key] for key in keys], "lr": rate}
        for name, keys, rate in (("llm", llm, lr), ("vision_and_head", rest, vision_lr))
        if keys
    ]
    covered = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(covered) == len(set(covered)) and set(covered) == {id(parameter) for parameter in trained.values()}
    return groups


def training_table(model: nn.Module) -> str:
    """Parameters of each part of the model, in thousands: trained whole, as adapters, frozen."""
    counts = {part: {"trained": 0, "adapters": 0, "frozen": 0} for part in PARTS}
    for name, parameter in model.named_parameters():
        part = next(part for part, prefix in PARTS.items() if name.startswith(prefix))
        kind = "frozen" if not parameter.requires_grad else "adapters" if ".lora_" in name else "trained"
        counts[part][kind] += parameter.numel()
    counts["total"] = {kind: sum(row[kind] for row in counts.values()) for kind in ("trained", "adapters", "frozen")}
    lines = [f"{'parameters, thousands':<24}{'trained':>14}{'adapters':>14}{'frozen':>14}"]
    lines += [f"{part:<24}" + "".join(f"{n / 1e3:>14,.1f}" for n in row.values()) for part, row in counts.items()]
    return "\n".join(lines)
