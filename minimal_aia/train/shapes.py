"""The shape of a model, without its weights: widths for the formulas, parameters counted one by one.

    shape = read_shape("deepseek-community/Janus-Pro-7B")   # or a folder, a config.json, lab/unified
    count_weights(shape, config)                            # on the meta device: no memory, no download

Widths of the built-in models come from these configuration files (read, not measured here):

    Janus-Pro-7B, -1B   huggingface.co/deepseek-ai/Janus-Pro-{7B,1B}/config.json; the fields it leaves out are
                        those of transformers' LlamaConfig, JanusVisionConfig and JanusVQVAEConfig, as in
                        transformers' own convert_janus_weights_to_hf.py; 1B also from
                        huggingface.co/hf-internal-testing/tiny-processor-janus/config.json
    Emu3-Chat, -Gen     huggingface.co/BAAI/Emu3-Chat/config.json and BAAI/Emu3-Gen; VQ: Emu3VQVAEConfig

The counts agree with the sizes of the published weight files (tests/train/test_plan.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from minimal_aia.train.config import TrainConfig

EMU3_AREA = 720 * 720  # pixels; the paper trains Emu3 on pictures of about this size


def _janus(hidden: int, feed_forward: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "janus",
        "architectures": ["JanusForConditionalGeneration"],
        "text_config": {
            "model_type": "llama",
            "vocab_size": 102400,
            "hidden_size": hidden,
            "intermediate_size": feed_forward,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 16384,
            "tie_word_embeddings": False,
        },
        "vision_config": {"projection_dim": hidden},
        "vq_config": {"projection_dim": hidden, "image_token_embed_dim": hidden},
        # transformers 5 ties by default, but not when a checkpoint brings two different matrices, as these do
        "tie_word_embeddings": False,
    }


BUILT_IN: dict[str, dict[str, Any]] = {
    "janus-pro-1b": _janus(2048, 5632, 24, 16),
    "janus-pro-7b": _janus(4096, 11008, 30, 32),
    "emu3": {
        "model_type": "emu3",
        "architectures": ["Emu3ForConditionalGeneration"],
        "vocabulary_map": {"<image>": 151851},
    },
}
ARCHITECTURES = {
    "janus": "JanusForConditionalGeneration",
    "emu3": "Emu3ForConditionalGeneration",
    "llama": "LlamaForCausalLM",
}
ALIASES = {f"emu3-{kind}{end}": "emu3" for kind in ("chat", "gen", "stage1", "8b") for end in ("", "-hf")}


class UnknownModel(ValueError):
    """No shape is known of a model; the message says of which, and where to get it."""


@dataclass(frozen=True)
class Shape:
    """What the plan asks of a model. `model` lies on the meta device; sizes are numbers, not bytes.

    code_vocab: rows of the head that predicts image codes. image_tokens: of one picture, by task.
    """

    name: str
    family: str  # janus, emu3, or llama for lab models
    model: Any = field(repr=False)
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    code_vocab: int
    attention_dropout: float
    image_tokens: int
    image_size: int  # pixels a side of the picture that the VQ tokenizer sees; 0: no pictures
    is_lab: bool = False  # its pictures come as codes

    @cached_property
    def decoder_layers(self) -> list[nn.Module]:
        from minimal_aia.models.base import find_layers

        return find_layers(self.part("language_model") or self.part("text_model") or self.model, self.layers)

    def part(self, name: str) -> Any:
        """A part of the model by the name that transformers gives it, or None."""
        return getattr(self.model.model, name, None)

    def makes_codes(self, config: TrainConfig, task: str) -> bool:
        """Whether pictures of a task go through the VQ tokenizer while training."""
        if self.is_lab or config.codes or self.part("vqmodel") is None:
            return False
        return task == "generation" or self.family == "emu3"


@dataclass(frozen=True)
class Weights:
    """How many weights a run holds, by what becomes of them.

    trained: without LoRA's own. in_layers, trained_layers: of the decoder's layers. largest: the largest
    trained tensor. matrices: trained ones, without embeddings, which autocast copies. lora: LoRA's own.
    """

    total: int
    trained: int
    in_layers: int
    trained_layers: int
    one_layer: int
    largest: int
    matrices: int
    lora: int
    targets: tuple[str, ...] = ()

    @property
    def frozen(self) -> int:
        return self.total - self.trained - self.lora


def count_weights(shape: Shape, config: TrainConfig) -> Weights:
    """Count tensor by tensor. ValueError for unknown parts or linear maps."""
    from minimal_aia.train.parts import beside_language, freeze, lora_targets

    model = shape.model.requires_grad_(True)
    freeze(model, config.freeze, config.shares())
    trained = [p for p in model.parameters() if p.requires_grad]
    inside = {id(p) for layer in shape.decoder_layers for p in layer.parameters()}
    layers = count(p for layer in shape.decoder_layers for p in layer.parameters())
    targets: dict[str, nn.Linear] = {}
    if config.lora_rank:
        targets = lora_targets(shape.decoder_layers[0], config.lora_target_modules)
        whole = {id(p) for p in beside_language(model)}
        trained = [p for p in trained if id(p) in whole]
    widths = sum(linear.in_features + linear.out_features for linear in targets.values())
    lora = shape.layers * config.lora_rank * widths
    embedding = model.get_input_embeddings().weight
    return Weights(
        total=count(model.parameters()) + lora,
        trained=count(trained),
        in_layers=layers,
        trained_layers=count(p for p in trained if id(p) in inside),
        one_layer=layers // shape.layers,
        largest=max((p.numel() for p in trained), default=0),
        matrices=count(p for p in trained if p.dim() > 1 and p is not embedding),
        lora=lora,
        targets=tuple(targets),
    )


def count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def read_shape(name: str, image_area: int = 0) -> Shape:
    """The shape of a model given by name, folder or config.json.

    image_area: pixels of a picture for models that take any size (Emu3); 0: the paper's 720 x 720.
    UnknownModel if nothing is known of it, or of its kind.
    """
    from minimal_aia.models.registry import is_lab

    return _shape(name, image_area, *_values(name), is_lab(name))


@lru_cache(maxsize=16)
def _shape(name: str, image_area: int, values: str, own_head: bool, lab: bool) -> Shape:
    """values: the configuration as JSON. own_head: a language head that is tied to nothing."""
    import transformers

    settings = json.loads(values)
    kind = settings.pop("model_type")
    config = transformers.CONFIG_MAPPING[kind](**settings)
    if own_head:
        config.tie_word_embeddings = False
    model_class = getattr(transformers, (config.architectures or [ARCHITECTURES[kind]])[0])
    with torch.device("meta"):
        model = model_class(config).train()
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    code_vocab, tokens, size = text.vocab_size, 36, 0  # a lab model's picture is 36 tokens
    if kind == "janus":
        code_vocab, size = config.vq_config.num_embeddings, config.vision_config.image_size
        tokens = (size // config.vision_config.patch_size) ** 2
    elif kind == "emu3":
        shrink = 2 ** (len(config.vq_config.channel_multiplier) - 1)
        size = math.isqrt(image_area or EMU3_AREA) // shrink * shrink
        tokens = (size // shrink) * (size // shrink + 1)  # a line end closes every row of codes
    return Shape(
        name,
        kind,
        model,
        text.num_hidden_layers,
        text.hidden_size,
        text.intermediate_size,
        text.num_attention_heads,
        text.num_key_value_heads,
        head_dim,
        text.vocab_size,
        code_vocab,
        float(text.attention_dropout),
        tokens,
        size,
        lab,
    )


def _values(name: str) -> tuple[str, bool]:
    """The configuration of a name as JSON, and whether weights beside it have a head of their own."""
    from minimal_aia.models.lab import CHECKPOINTS

    key = name.rstrip("/").rsplit("/", 1)[-1].lower()
    path = Path(name).expanduser()
    if name.startswith("lab/"):
        path = CHECKPOINTS / name.removeprefix("lab/")
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON configuration ({error})") from None
    elif (key := ALIASES.get(key, key)) in BUILT_IN:
        values = BUILT_IN[key]
    else:
        known = ", ".join(("lab/unified", "lab/janus", *BUILT_IN, *ALIASES))
        raise UnknownModel(
            f"model {name!r}: give its folder or config.json, or one of the built-in shapes: {known}"
        )
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in ARCHITECTURES:
        raise UnknownModel(f"model {name!r}: type {kind!r}; plans are made for janus, emu3 and lab models")
    return json.dumps(values), _has_own_head(path.parent)


def _has_own_head(folder: Path) -> bool:
    """Whether weights lie here with a language head of their own: then transformers ties nothing."""
    from safetensors import safe_open

    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as weights:
            if "lm_head.weight" in weights.keys():  # noqa: SIM118 (not a dictionary)
                return True
    return False
