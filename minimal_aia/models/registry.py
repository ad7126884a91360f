"""Which families there are, and `load_adapter`, which finds the right one from a folder's config."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimal_aia.models.base import Adapter, AdapterError

BOTH = ("generation", "understanding")
GENERATION, UNDERSTANDING = ("generation",), ("understanding",)

TINY = "tiny random model through `from_pretrained`, against eager attention"
STAND_IN = "our stand-in module with the same attention entry point; the remote code itself was not run"


@dataclass(frozen=True)
class Family:
    """One row of the support table.

    adapter: "module:class" inside `minimal_aia.models`.
    model_types: `model_type` in config.json (or `_class_name` in a diffusers model_index.json) that select it.
    needs: packages beside torch.
    """

    name: str
    systems: str
    library: str
    tasks: tuple[str, ...]
    adapter: str
    model_types: tuple[str, ...]
    needs: tuple[str, ...] = ("transformers",)
    remote_code: bool = False
    tested: str = TINY


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "janus",
            "Janus, Janus-Pro 1B/7B",
            "transformers `JanusForConditionalGeneration`",
            BOTH,
            "janus:JanusAdapter",
            ("janus",),
        ),
        Family(
            "emu3",
            "Emu3 (Chat, Gen, Stage1)",
            "transformers `Emu3ForConditionalGeneration`",
            BOTH,
            "emu3:Emu3Adapter",
            ("emu3",),
        ),
    )
}


def support_table() -> str:
    """The supported systems as a Markdown table: family, library class, tasks, how tested."""
    lines = ["| family | systems | library class | tasks | tested how |", "|---|---|---|---|---|"]
    for f in FAMILIES.values():
        tasks = "both" if f.tasks == BOTH else ", ".join(f.tasks)
        lines.append(f"| `{f.name}` | {f.systems} | {f.library} | {tasks} | {f.tested} |")
    return "\n".join(lines) + "\n"


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

    name_or_path: "lab/unified", "lab/janus", "lab/generation", "lab/understanding"; else a folder in Hugging Face
        layout or a hub id.
    family: a name from `FAMILIES`; by default read from the folder's config. "decoder" takes any decoder-only
        vision-language model, given `image_token_id=`.
    device, dtype: where and in what precision (default: CPU or the current GPU; the checkpoint's own dtype).
    device_map: passed to transformers, to spread a model over several devices (needs accelerate).
    load_in_4bit: quantise the weights while loading (needs bitsandbytes and a GPU).
    trust_remote_code: required, from you, for families whose code lives beside their weights.
    options: passed to the family's adapter (see its docstring).

    Raises AdapterError, naming the remedy: no such folder, no weights in it, a family that does not fit, a missing
    package, too little memory, remote code without consent.
    """
    name = str(name_or_path)
    if name.startswith("lab/"):
        lab = importlib.import_module("minimal_aia.models.lab")
        adapter: Adapter = lab.load_lab(name)
        return adapter.to(device, dtype)
    raise AdapterError(f"{name}: no adapter yet")


def read_config(name: str) -> tuple[str, dict[str, Any]]:
    """The model type that selects a family, and the config; from a folder or the hub. AdapterError if neither."""
    folder = Path(name)
    for file, key in (("model_index.json", "_class_name"), ("config.json", "model_type")):
        if (folder / file).is_file():
            config = json.loads((folder / file).read_text())
            return str(config.get(key, "")), config
    raise AdapterError(f"{name}: no config")
