"""Which families there are, and `load_adapter`, which finds the right one from a folder's config."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimal_aia.console import nearest
from minimal_aia.models.base import TASKS, Adapter, AdapterError
from minimal_aia.models.loading import ORIGINAL_LAYOUTS, read_types, require


@dataclass(frozen=True)
class Family:
    """One row of the support table.

    model_types: `model_type` or architecture in config.json (or `_class_name` in model_index.json) that
    select it.
    model: name of the library's (or the authors') class.
    adapter: "module:class" inside `minimal_aia.models`; the class has a `load(name, family, **options)`.
    package: what it needs installed.
    """

    name: str
    systems: str
    model_types: tuple[str, ...]
    model: str
    adapter: str = "chat:ChatAdapter"
    tasks: tuple[str, ...] = ("understanding",)
    package: str = "transformers"
    remote_code: bool = False

    @property
    def tested(self) -> str:
        if self.remote_code:
            return "our stand-in with the same attention entry point; the authors' code itself was not run"
        return "tiny random model through `from_pretrained`, against eager attention"


GENERATION = ("generation",)
# fmt: off
_ROWS = (
    Family("janus", "Janus, Janus-Pro 1B/7B", ("janus",), "JanusForConditionalGeneration",
           "janus:JanusAdapter", TASKS),
    Family("emu3", "Emu3 (Chat, Gen, Stage1)", ("emu3",), "Emu3ForConditionalGeneration",
           "emu3:Emu3Adapter", TASKS),
    Family("chameleon", "Chameleon", ("chameleon",), "ChameleonForConditionalGeneration",
           "chat:ChameleonAdapter"),
    Family("qwen2.5-vl", "Qwen2.5-VL", ("qwen2_5_vl",), "Qwen2_5_VLForConditionalGeneration"),
    Family("qwen3-vl", "Qwen3-VL (dense)", ("qwen3_vl",), "Qwen3VLForConditionalGeneration"),
    Family("qwen3-vl-moe", "Qwen3-VL (mixture of experts)", ("qwen3_vl_moe",),
           "Qwen3VLMoeForConditionalGeneration"),
    Family("internvl", "InternVL3", ("internvl",), "InternVLForConditionalGeneration"),
    Family("llava-onevision", "LLaVA-OneVision", ("llava_onevision",),
           "LlavaOnevisionForConditionalGeneration"),
    Family("deepseek-vl", "DeepSeek-VL", ("deepseek_vl",), "DeepseekVLForConditionalGeneration"),
    Family("simplear", "SimpleAR: image tokens in the vocabulary", ("SimpARForCausalLM", "qwen2"),
           "Qwen2ForCausalLM", "simplear:SimpleARAdapter", GENERATION),
    Family("flux", "FLUX.1", ("FluxPipeline",), "FluxPipeline", "diffusion:FluxAdapter", GENERATION,
           "diffusers"),
    Family("qwen-image", "Qwen-Image", ("QwenImagePipeline",), "QwenImagePipeline",
           "diffusion:QwenImageAdapter", GENERATION, "diffusers"),
    Family("deepseek-vl2", "DeepSeek-VL2", ("deepseek_vl_v2", "DeepseekVLV2ForCausalLM"),
           "DeepseekVLV2ForCausalLM", "deepseek_vl2:DeepseekVL2Adapter", remote_code=True),
    Family("hunyuan-image", "HunyuanImage-3.0", ("hunyuan_image_3_moe", "HunyuanImage3ForCausalMM"),
           "HunyuanImage3ForCausalMM", "hunyuan_image:HunyuanImageAdapter", GENERATION, remote_code=True),
    Family("bagel", "BAGEL", ("bagel", "BagelForConditionalGeneration"), "Bagel", "bagel:BagelAdapter",
           TASKS, remote_code=True),
    Family("decoder", "any decoder-only vision-language model, given its image token id", (),
           "AutoModelForImageTextToText"),
)
# fmt: on
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
        raise AdapterError(
            f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}{nearest(family, FAMILIES)}"
        )
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

    Args:
        name_or_path: "lab/unified", "lab/janus", "lab/mot", "lab/generation", "lab/understanding"; else a
            folder that training a lab model wrote, a folder in Hugging Face layout, or a hub id.
        family: a name from `FAMILIES`; by default read from the folder's config. "decoder" takes any
            decoder-only vision-language model of transformers, given `image_token_id=`.
        device, dtype: where and in what precision (default: the GPU if there is one; the checkpoint's own
            dtype).
        device_map: passed to transformers, to spread a model over several devices (needs accelerate).
        load_in_4bit: quantise the weights while loading (needs bitsandbytes and a GPU).
        trust_remote_code: required, from you, for families whose code lives beside their weights.
        options: passed to the family's adapter (see its docstring).

    Raises AdapterError, naming the remedy: no such folder, no weights in it, a family that does not fit, a
    missing package, too little memory, remote code without consent.
    """
    if not isinstance(name_or_path, (str, Path)):
        raise AdapterError(
            f"load_adapter takes a name or a folder, not a {type(name_or_path).__name__}; a model that you "
            "have loaded goes to minimal_aia.capture"
        )
    name = str(name_or_path)
    if isinstance(dtype, str):
        import torch

        dtype = getattr(torch, dtype)
    if is_lab(name):
        if family is not None or load_in_4bit:
            raise AdapterError(
                f"{name}: is a lab model, small and of one family: leave out family and load_in_4bit"
            )
        lab = importlib.import_module("minimal_aia.models.lab")
        adapter: Adapter = lab.load_lab(name, device, dtype)
        return adapter
    row = find_family(name, read_types(name), family)
    require(row.package, name)
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
