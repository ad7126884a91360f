"""Which weights of a model are trained: frozen parts, and LoRA in the language model's layers.

Parts of a unified model go by the names that transformers gives them. LoRA replaces the training of the
language model only: aligners, generation embedding and head are trained in full unless they are frozen.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minimal_aia.console import nearest
from minimal_aia.train.config import TASKS, TrainConfig

PARTS = {
    "vq": ("vqmodel",),
    "vision": ("vision_model",),
    "aligner": ("aligner", "generation_aligner"),
    "generation": ("generation_embeddings", "generation_head"),
    "language": ("language_model", "text_model"),
}
# Parts of Janus that only one task uses.
ONLY = {
    "generation": ("generation_aligner", "generation_embeddings", "generation_head"),
    "understanding": ("aligner", "vision_model"),
}


def freeze(model: Any, parts: str, tasks: Collection[str] = TASKS) -> list[nn.Module]:
    """Switch off the gradients of the named parts, of the VQ tokenizer, and of what no task of the run uses.

    The VQ tokenizer makes the labels: nothing that is trained may change it. Parts that no task uses would
    get weight decay alone in a distributed run. Returns what was frozen; ValueError for unknown names.
    """
    names = {"vq", *(name.strip() for name in parts.split(",") if name.strip())}
    if unknown := sorted(names - PARTS.keys()):
        close = nearest(unknown[0], PARTS)
        raise ValueError(f"freeze: there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}{close}")
    inner = model.model
    unused = [attribute for task in TASKS if task not in tasks for attribute in ONLY[task]]
    wanted = [*unused, *(attribute for name in sorted(names) for attribute in PARTS[name])]
    frozen = [part for name in wanted if (part := getattr(inner, name, None)) is not None]
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    two_heads = hasattr(inner, "generation_head")
    if "language" in names:
        flat = not any(hasattr(inner, name) for name in PARTS["language"])
        frozen += [head, *([inner] if flat else [])]
    elif "understanding" not in tasks and two_heads and head.weight is not words.weight:
        frozen.append(head)
    for part in frozen:
        part.requires_grad_(False).eval()
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"freeze {parts!r}: nothing is left to train")
    return frozen


def add_lora(model: Any, layers: list[nn.Module], config: TrainConfig) -> None:
    """Put LoRA into linear modules of the decoder layers, in place; then only it and whole parts are trained.

    Call it after `freeze`. LoRA's own weights are float32 whatever the model's are, and under `bf16` autocast
    so are the whole parts: in bfloat16 small updates would be lost.

    Raises:
        ValueError: no linear module has one of the names.
        ImportError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"lora_rank {config.lora_rank} needs the package peft: pip install peft")
    from peft import LoraConfig, inject_adapter_in_model

    prefix = next(name for name, module in model.named_modules() if module is layers[0]).rpartition(".")[0]
    names = "|".join(lora_targets(layers[0], config.lora_target_modules))
    whole = [p for p in beside_language(model) if p.requires_grad]
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=rf"{re.escape(prefix)}\.\d+\..*\b({names})",
    )
    inject_adapter_in_model(settings, model)  # also freezes everything else
    for p in whole:
        p.requires_grad_(True)
    for name, p in model.named_parameters():
        if p.requires_grad and (config.bf16 or ".lora_" in name):
            p.data = p.data.float()


def lora_targets(layer: nn.Module, asked: str) -> dict[str, nn.Linear]:
    """The linear modules of a decoder layer that `lora_target_modules` names, by name."""
    linear = {n.rpartition(".")[2]: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    if asked.strip() == "all-linear":
        return linear
    wanted = {name.strip() for name in asked.split(",")}
    if unknown := sorted(wanted - linear.keys()):
        raise ValueError(
            f"lora_target_modules: no linear module {unknown[0]!r} in the decoder layers;"
            f" choose all-linear or some of {', '.join(linear)}"
        )
    return {name: module for name, module in linear.items() if name in wanted}


def beside_language(model: Any) -> list[nn.Parameter]:
    """The weights of aligners and of what draws, which a LoRA run trains in full."""
    parts = [getattr(model.model, name, None) for part in ("aligner", "generation") for name in PARTS[part]]
    return [p for part in parts if part is not None for p in part.parameters()]


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state dictionary without LoRA: W + scale · B A in the place of W, under the model's own names."""
    plain = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix(".base_layer.weight")
            down, up = (state[f"{stem}.lora_{half}.default.weight"].float() for half in "AB")
            with torch.no_grad():
                tensor = (tensor.float() + scale * (up @ down)).to(tensor.dtype)
        plain[name.replace(".base_layer.", ".")] = tensor
    return plain


def untie(model: Any, state: dict[str, Tensor]) -> list[str]:
    """Keep tied weights once; if training had two unlike ones, say so in the configuration and in a note."""
    notes = []
    for target, source in model.all_tied_weights_keys.items():
        if target not in state:
            continue
        if torch.equal(state[target], state[source]):
            del state[target]
        else:
            model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
            notes.append(f"{target} and {source} differ: wrote tie_word_embeddings=false")
    return notes
