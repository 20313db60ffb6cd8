"""What is trained, frozen and adapted (paper, section 4.1): LoRA on LLM and ViT, the rest whole or not at all."""

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import PreTrainedModel

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
    if vision_lora and not optimize_vision:
        raise ValueError("--use_vision_lora adapts a ViT that stays frozen without --optimize_vision: add it")
    if freeze_llm and llm_lora:
        raise ValueError("--freeze_llm and --use_llm_lora contradict each other: give one of them")
    unknown = set(llm_targets) - set(LLM_LINEARS)
    if unknown:
        raise ValueError(f"--lora_target_modules: unknown {sorted(unknown)}; the LLM's linears are {LLM_LINEARS}")
    layers = model.config.text_config.num_hidden_layers
    if not 0 <= from_layer < layers:
        raise ValueError(f"--lora_from_layer {from_layer}: the LLM's layers are 0 to {layers - 1}")
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


def optimizer_groups(model: nn.Module, *, lr: float, vision_lr: float) -> list[dict]:
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
        # ZeRO-3 leaves an empty shell; the true size is kept beside it.
        counts[part][kind] += getattr(parameter, "ds_numel", parameter.numel())
    counts["total"] = {kind: sum(row[kind] for row in counts.values()) for kind in ("trained", "adapters", "frozen")}
    lines = [f"{'parameters, thousands':<24}{'trained':>14}{'adapters':>14}{'frozen':>14}"]
    lines += [f"{part:<24}" + "".join(f"{n / 1e3:>14,.1f}" for n in row.values()) for part, row in counts.items()]
    return "\n".join(lines)
