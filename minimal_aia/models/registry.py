"""Which families there are, and `load_adapter`, which finds the right one from a folder's config."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimal_aia.models.base import TASKS, Adapter, AdapterError
from minimal_aia.models.loading import ORIGINAL_LAYOUTS, read_types, require

GENERATION, UNDERSTANDING = ("generation",), ("understanding",)

TINY = "tiny random model through `from_pretrained`, against eager attention"
STAND_IN = "our stand-in with the same attention entry point; the authors' code itself was not run"


@dataclass(frozen=True)
class Family:
    """One row of the support table.

    adapter: "module:class" inside `minimal_aia.models`; the class has a `load(name, family, **options)`.
    model_types: `model_type` or architecture in config.json (or `_class_name` in model_index.json) that
    select it.
    model, processor: names of the library's classes.
    package, extra: what it needs installed, and the optional extra of this project that brings it.
    """

    name: str
    systems: str
    tasks: tuple[str, ...]
    adapter: str
    model_types: tuple[str, ...]
    model: str = "AutoModelForImageTextToText"
    processor: str = "AutoProcessor"
    package: str = "transformers"
    extra: str | None = None
    remote_code: bool = False
    tested: str = TINY


_ROWS = (
    Family(
        "janus",
        "Janus, Janus-Pro 1B/7B",
        TASKS,
        "janus:JanusAdapter",
        ("janus",),
        "JanusForConditionalGeneration",
        "JanusProcessor",
    ),
    Family(
        "emu3",
        "Emu3 (Chat, Gen, Stage1)",
        TASKS,
        "emu3:Emu3Adapter",
        ("emu3",),
        "Emu3ForConditionalGeneration",
        "Emu3Processor",
    ),
    Family(
        "chameleon",
        "Chameleon",
        UNDERSTANDING,
        "chameleon:ChameleonAdapter",
        ("chameleon",),
        "ChameleonForConditionalGeneration",
        "ChameleonProcessor",
    ),
    Family(
        "qwen2.5-vl",
        "Qwen2.5-VL",
        UNDERSTANDING,
        "chat:ChatAdapter",
        ("qwen2_5_vl",),
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLProcessor",
    ),
    Family(
        "qwen3-vl",
        "Qwen3-VL (dense)",
        UNDERSTANDING,
        "chat:ChatAdapter",
        ("qwen3_vl",),
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLProcessor",
    ),
    Family(
        "qwen3-vl-moe",
        "Qwen3-VL (mixture of experts)",
        UNDERSTANDING,
        "chat:ChatAdapter",
        ("qwen3_vl_moe",),
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLProcessor",
    ),
    Family(
        "internvl",
        "InternVL3",
        UNDERSTANDING,
        "chat:ChatAdapter",
        ("internvl",),
        "InternVLForConditionalGeneration",
        "InternVLProcessor",
    ),
    Family(
        "llava-onevision",
        "LLaVA-OneVision",
        UNDERSTANDING,
        "chat:ChatAdapter",
        ("llava_onevision",),
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionProcessor",
    ),
    Family(
        "deepseek-vl",
        "DeepSeek-VL",
        UNDERSTANDING,
        "chat:ChatAdapter",
        ("deepseek_vl",),
        "DeepseekVLForConditionalGeneration",
        "DeepseekVLProcessor",
    ),
    Family(
        "simplear",
        "SimpleAR: image tokens in the vocabulary",
        GENERATION,
        "simplear:SimpleARAdapter",
        ("SimpARForCausalLM", "qwen2"),
        "Qwen2ForCausalLM",
    ),
    Family(
        "flux",
        "FLUX.1",
        GENERATION,
        "diffusion:FluxAdapter",
        ("FluxPipeline",),
        "FluxPipeline",
        package="diffusers",
        extra="diffusers",
    ),
    Family(
        "qwen-image",
        "Qwen-Image",
        GENERATION,
        "diffusion:QwenImageAdapter",
        ("QwenImagePipeline",),
        "QwenImagePipeline",
        package="diffusers",
        extra="diffusers",
    ),
    Family(
        "deepseek-vl2",
        "DeepSeek-VL2",
        UNDERSTANDING,
        "deepseek_vl2:DeepseekVL2Adapter",
        ("deepseek_vl_v2", "DeepseekVLV2ForCausalLM"),
        "DeepseekVLV2ForCausalLM",
        remote_code=True,
        tested=STAND_IN,
    ),
    Family(
        "hunyuan-image",
        "HunyuanImage-3.0",
        GENERATION,
        "hunyuan_image:HunyuanImageAdapter",
        ("hunyuan_image_3_moe", "HunyuanImage3ForCausalMM"),
        "HunyuanImage3ForCausalMM",
        remote_code=True,
        tested=STAND_IN,
    ),
    Family(
        "bagel",
        "BAGEL",
        TASKS,
        "bagel:BagelAdapter",
        ("bagel", "BagelForConditionalGeneration"),
        "Bagel",
        remote_code=True,
        tested=STAND_IN,
    ),
    Family(
        "decoder",
        "any decoder-only vision-language model, given its image token id",
        UNDERSTANDING,
        "chat:ChatAdapter",
        (),
    ),
)
FAMILIES: dict[str, Family] = {row.name: row for row in _ROWS}


def support_table() -> str:
    """The supported systems as a Markdown table: family, library class, tasks, how tested."""
    lines = ["| family | systems | library class | tasks | tested how |", "|---|---|---|---|---|"]
    for f in FAMILIES.values():
        tasks = "both" if set(f.tasks) == set(TASKS) else ", ".join(f.tasks)
        library = "authors' code" if f.remote_code else f.package
        lines.append(f"| `{f.name}` | {f.systems} | {library} `{f.model}` | {tasks} | {f.tested} |")
    return "\n".join(lines) + "\n"


def find_family(name: str, types: list[str], family: str | None = None) -> Family:
    """The row for what a config says it is, or for the family asked for; AdapterError if they do not fit."""
    if family is not None and family not in FAMILIES:
        raise AdapterError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    model_type = types[0] if types else ""
    fitting = [f for f in FAMILIES.values() if set(types) & set(f.model_types)]
    if family is not None:
        row = FAMILIES[family]
        # A config of the authors' own making may say anything: there, only another known family is a
        # contradiction.
        if row.model_types and row not in fitting and (fitting or not row.remote_code):
            found = f"family {fitting[0].name!r}" if fitting else "no family known here"
            raise AdapterError(
                f"{name}: its config says model type {model_type!r} ({found}), not family {family!r}"
            )
        return row
    if fitting:
        return fitting[0]
    if model_type in ORIGINAL_LAYOUTS:
        raise AdapterError(
            f"{name}: model type {model_type!r} is the authors' layout; use {ORIGINAL_LAYOUTS[model_type]}"
        )
    raise AdapterError(
        f"{name}: no adapter for model type {model_type!r}; a decoder-only vision-language model of "
        "transformers works with family='decoder' and its image_token_id="
    )


def is_lab(name: str) -> bool:
    """Whether a name is that of a lab model: "lab/unified", ..., or a folder with a lab picture codebook."""
    return name.startswith("lab/") or (Path(name) / "codebook.safetensors").is_file()


def load_adapter(
    name_or_path: str | Path,
    *,
    family: str | None = None,
    device: Any = None,
    dtype: Any = None,
    device_map: Any = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> Adapter:
    """Load a model and return its adapter.

    name_or_path: "lab/unified", "lab/janus", "lab/mot", "lab/generation", "lab/understanding"; else a folder
        that training a lab model wrote, a folder in Hugging Face layout, or a hub id.
    family: a name from `FAMILIES`; by default read from the folder's config. "decoder" takes any decoder-only
        vision-language model of transformers, given `image_token_id=`.
    device, dtype: where and in what precision (default: the GPU if there is one; the checkpoint's own dtype).
    device_map: passed to transformers, to spread a model over several devices (needs accelerate).
    load_in_4bit: quantise the weights while loading (needs bitsandbytes and a GPU).
    trust_remote_code: required, from you, for families whose code lives beside their weights.
    options: passed to the family's adapter (see its docstring).

    Raises AdapterError, naming the remedy: no such folder, no weights in it, a family that does not fit, a
    missing package, too little memory, remote code without consent.
    """
    name = str(name_or_path)
    if isinstance(dtype, str):
        import torch

        dtype = getattr(torch, dtype)
    if is_lab(name):
        lab = importlib.import_module("minimal_aia.models.lab")
        adapter: Adapter = lab.load_lab(name)
        return adapter.to(device, dtype)
    row = find_family(name, read_types(name), family)
    require(row.package, name, row.extra)
    if row.remote_code and not trust_remote_code:
        raise AdapterError(
            f"{name}: the {row.name} family runs Python code that comes with its weights. Read that code, "
            "then pass trust_remote_code=True if you trust it"
        )
    module, cls_name = row.adapter.split(":")
    cls = getattr(importlib.import_module(f"minimal_aia.models.{module}"), cls_name)
    known = set(inspect.signature(cls).parameters) | set(inspect.signature(cls.load).parameters)
    known -= {"name", "model", "processor", "tokenizer", "pipeline", "inferencer", "family", "options"}
    known -= set() if "generation" in row.tasks else {"draw", "seed"}
    if unknown := sorted(set(options) - known):
        raise AdapterError(
            f"{name}: family {row.name!r} has no option {unknown[0]!r}; it has: {', '.join(sorted(known))}"
        )
    return cls.load(
        name,
        row,
        device=device,
        dtype=dtype,
        device_map=device_map,
        load_in_4bit=load_in_4bit,
        **options,
    )
