"""What is trained, frozen and adapted (paper, section 4.1): LoRA on LLM and ViT, the rest whole or not at all."""

from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from self1e.errors import UserError, check_known

LLM_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # that take adapters
VISION_LINEARS = ("q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2")
LLM, VISION, PROJECTOR = "model.language_model.", "model.vision_tower.", "model.multi_modal_projector."
ADDED = "added_tokens"  # parameter of embedding and lm_head, (added tokens, C), where only these train


def adapt(
    model: PreTrainedModel,
    *,
    use_llm_lora: bool,
    use_vision_lora: bool,
    optimize_vision: bool,
    freeze_llm: bool = False,
    lora_r: int = 128,
    lora_alpha: int | None = None,
    lora_dropout: float = 0.05,
    lora_target_modules: str | None = None,
    lora_from_layer: int = 0,
) -> LoraModel | None:
    """Put LoRA into `model` in place and set which parameters train; the arguments are flags of training.

    Head, token embeddings and `lm_head` train whole in any case. Returns the tuner, whose `merge_and_unload()` gives
    the plain model back; None without adapters.
    """
    llm_targets = lora_target_modules.split(",") if lora_target_modules else LLM_LINEARS
    check_known("--lora_target_modules: unknown", llm_targets, LLM_LINEARS)
    layers = model.config.text_config.num_hidden_layers
    if not 0 <= lora_from_layer < layers:
        raise UserError(f"--lora_from_layer {lora_from_layer}: the LLM's layers are 0 to {layers - 1}")
    adapted = [f"{LLM}layers.{n}." for n in range(lora_from_layer, layers)] if use_llm_lora else []
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linears if name.startswith(tuple(adapted)) and name.endswith(tuple(llm_targets))]
    if use_vision_lora:
        targets += [name for name in linears if name.startswith(VISION) and name.endswith(VISION_LINEARS)]
    tuner = None
    if targets:
        alpha = lora_alpha or 2 * lora_r
        config = LoraConfig(r=lora_r, lora_alpha=alpha, lora_dropout=lora_dropout, target_modules=targets)
        tuner = LoraModel(model, config, "default")
    frozen = [LLM + "layers.", LLM + "norm."] if use_llm_lora or freeze_llm else []
    frozen += [] if optimize_vision else [VISION, PROJECTOR]
    frozen += [VISION] if use_vision_lora else []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or not name.startswith(tuple(frozen)))
    return tuner


ADAPTERS = [*signature(adapt).parameters][1:]  # its flags


def train_added_tokens(model: PreTrainedModel, first: int) -> None:
    """Freeze embedding and `lm_head` in place, but for the vectors of the tokens from id `first` on.

    These become a parameter of their own, so that the optimizer has states for them alone; `merge_added_tokens` writes
    them back. Tied matrices share them, too.
    """
    added: dict[int, nn.Parameter] = {}  # by matrix
    for module in _matrices(model):
        matrix = module.weight.requires_grad_(False)
        own = added.setdefault(id(matrix), nn.Parameter(matrix.detach()[first:].clone()))
        module.register_parameter(ADDED, own)
        module.added_tokens_hook = module.register_forward_hook(partial(_replace, first))


def merge_added_tokens(model: PreTrainedModel) -> None:
    """Write the trained vectors into their matrices and leave plain modules; without such it changes nothing."""
    for module in _matrices(model):
        if ADDED in module._parameters:
            added = getattr(module, ADDED)
            with torch.no_grad():
                module.weight[-len(added) :] = added
            module.added_tokens_hook.remove()
            del module.added_tokens_hook, module.added_tokens


def _matrices(model: PreTrainedModel) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _replace(first: int, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Replace what added tokens have: the vectors (..., C) of ids (...), or the logits (..., vocabulary) of states."""
    (x,) = inputs
    added = getattr(module, ADDED)
    if isinstance(module, nn.Embedding):
        return torch.where((x >= first).unsqueeze(-1), F.embedding((x - first).clamp(min=0), added), output)
    return torch.cat([output[..., :first], F.linear(x, added)], dim=-1)


def keep_frozen_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Convert the weights of frozen linears, which autocast would otherwise convert at each use."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(dtype)


def optimizer_groups(model: nn.Module, *, lr: float, vision_lr: float) -> list[dict[str, Any]]:
    """Parameter groups: the LLM with its embeddings and `lm_head` at `lr`, everything else at `vision_lr`."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    llm = [parameter for name, parameter in trained.items() if name.startswith((LLM, "lm_head."))]
    rest = [parameter for name, parameter in trained.items() if not name.startswith((LLM, "lm_head."))]
    groups = [{"name": "llm", "params": llm, "lr": lr}, {"name": "vision_and_head", "params": rest, "lr": vision_lr}]
    return [group for group in groups if group["params"]]
