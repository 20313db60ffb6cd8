"""How well a run uses its device: operations of the model, the device's peak, and memory."""

import sys
import time
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from self1e.flags import DTYPES
from self1e.model.modeling import Self1EForSegmentation
from self1e.training.adapters import LLM, VISION

KINDS = {  # of checkpointing: the memory of its activations, in what `selective` saves (counted by `apps.costs`)
    "--no-gradient_checkpointing": 1.5,
    "--gradient_checkpointing selective": 1.0,
    "--gradient_checkpointing full": 0.0,
}


def count_work(model: Self1EForSegmentation, dtype: torch.dtype) -> Counter:
    """Counts what training passes do, from how many rows go through the layers; whoever reads it clears it.

    `flops`: forward and backward, without those of layers that run again. `saved`: bytes that `selective` saves.
    """
    work: Counter = Counter()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    parts: dict[nn.Module, int] = {x: 0 for name, x in linears.items() if not name.startswith((LLM, VISION))}
    stacks: list[tuple[nn.Module, Any]] = [(model.model.language_model, model.config.text_config)]
    stacks += [(model.model.vision_tower, model.config.vision_config)]
    for stack, config in stacks:  # not at its layers, which may be compiled, or run again
        head = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        parts[stack] = config.num_hidden_layers * config.num_attention_heads * head

    def count(width: int, module: nn.Module, _, output) -> None:
        """width: of the queries of all layers together, 0 without attention."""
        if not torch.is_grad_enabled():
            return
        states: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
        rows, tokens = states.shape[:-1].numel(), states.shape[-2]
        layers = [x for x in module.modules() if isinstance(x, nn.Linear)]
        trained = sum(x.in_features * x.out_features for x in layers if x.weight.requires_grad)
        products = sum(x.in_features * x.out_features for x in layers)
        attention = 2 * tokens * width  # scores, and their product with the values
        again = states.requires_grad * (products + 2 * attention) + trained  # backward
        work["flops"] += 2 * rows * (products + attention + again)
        if width:
            work["saved"] += rows * (sum(x.out_features for x in layers) + width) * dtype.itemsize

    for module, width in parts.items():
        module.register_forward_hook(partial(count, width))
    return work


def advice(now: str | None, saved: int, spare: int, *, compiled: bool = False) -> str:
    """Which kind of checkpointing would fit.

    now: the flag's value. saved: bytes that `selective` saves in a pass, at most. spare: free bytes. compiled: layers
    are, so that they cannot be checkpointed selectively.
    """
    current = f"--gradient_checkpointing {now}" if now else "--no-gradient_checkpointing"
    needed = {kind: (factor - KINDS[current]) * saved for kind, factor in KINDS.items()}
    best = next(x for x, more in needed.items() if more < 0.9 * spare and not (compiled and x.endswith("selective")))
    text = f"memory: {spare / 1e9:.0f} GB of the GPU stay free; "
    if needed[best] <= 0:
        return f"{text}{current} is the fastest that fits"
    gain = "about 30% of the operations" if now == "full" else "what is computed again"
    return f"{text}{best} would take about {needed[best] / 1e9:.0f} GB of them and save {gain}"


def compile_layers(model: Self1EForSegmentation, **options) -> None:
    """Compile each layer of ViT and LLM in place, so that weights keep their names. options: of `torch.compile`."""
    torch._dynamo.config.recompile_limit = 128  # layers share their code, but have their own stochastic depth
    for layer in [*model.model.vision_tower.encoder.layer, *model.model.language_model.layers]:
        layer.compile(**options)


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations per second that a large product of matrices reaches on a device."""
    side = 8192 if device.type == "cuda" else 512
    matrix = torch.ones(side, side, device=device, dtype=DTYPES[precision])
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the product
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def peak_memory() -> float:
    """The most bytes that this rank's tensors had on its GPU, or without one its process in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
