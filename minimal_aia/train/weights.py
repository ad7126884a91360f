"""How many weights a run holds, by what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from minimal_aia.train.config import TrainConfig
from minimal_aia.train.shapes import Shape, count


@dataclass(frozen=True)
class Weights:
    """How many weights there are of each kind.

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
    what = TrainConfig(
        freeze=config.freeze,
        task_ratio=config.task_ratio,
        lora_rank=config.lora_rank,
        lora_target_modules=config.lora_target_modules,
    )
    return _counted(shape, tuple(vars(what).items()))


@lru_cache(maxsize=64)
def _counted(shape: Shape, settings: tuple[tuple[str, object], ...]) -> Weights:
    config = TrainConfig(**dict(settings))  # type: ignore[arg-type]
    trained, inside = shape.trained(config), shape.in_layers()
    layers = count(p for layer in shape.decoder_layers for p in layer.parameters())
    targets: tuple[str, ...] = ()
    lora = 0
    if config.lora_rank:
        linear = {name.rpartition(".")[2]: module for name, module in shape.linears().items()}
        asked = {name.strip() for name in config.lora_target_modules.split(",")}
        if unknown := sorted(asked - linear.keys() - {"all-linear"}):
            choices = ", ".join(linear)
            raise ValueError(
                f"lora_target_modules: no linear map {unknown[0]!r}; choose all-linear or {choices}"
            )
        targets = tuple(name for name in linear if asked == {"all-linear"} or name in asked)
        widths = sum(linear[name].in_features + linear[name].out_features for name in targets)
        lora = shape.layers * config.lora_rank * widths
        whole = {id(p) for part in ("aligner", "generation") for p in shape.part(part)}
        trained = [p for p in trained if id(p) in whole]
    embedding = shape.model.get_input_embeddings().weight
    return Weights(
        total=count(shape.model.parameters()) + lora,
        trained=count(trained),
        in_layers=layers,
        trained_layers=count(p for p in trained if id(p) in inside),
        one_layer=layers // shape.layers,
        largest=max((p.numel() for p in trained), default=0),
        matrices=count(p for p in trained if p.dim() > 1 and p is not embedding),
        lora=lora,
        targets=targets,
    )
