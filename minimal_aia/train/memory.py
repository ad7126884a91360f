"""Bytes a GPU holds at each moment of an optimizer step; `train.plan` says on which assumptions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minimal_aia.train import activations
from minimal_aia.train.activations import Lora, Precision, Rows
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.label_loss import LOGITS_AT_ONCE
from minimal_aia.train.layout import Layout
from minimal_aia.train.shapes import Shape, Weights

LIVE = 500_000_000  # stage3_max_live_parameters of recipes/zero3.json: numbers gathered at once
BUCKETS = 100_000_000  # its reduce and prefetch buckets together
MAPS = 4  # feature maps at once in the VQ encoder: input, normalised, activated, output
# The authors' code pads every sample to these lengths, keeps all attention matrices and makes logits at every
# position.
AUTHORS = {"generation": 1576, "understanding": 3000}


def precision_of(config: TrainConfig, layout: Layout) -> Precision:
    """bf16 weights (their own, or gathered so) compute in bf16 throughout; over fp32 ones it is autocast."""
    if config.dtype == "bfloat16" or (config.bf16 and layout.sharded):
        return Precision(2, 2)
    return Precision(2 if config.bf16 else 4, 4)


@dataclass(frozen=True)
class Held:
    """Bytes that do not depend on the batch.

    whole: gradients that cannot be sharded yet. copies: of weights, by autocast; layer_copies: of one layer.
    step: more in AdamW's step.
    """

    weights: int
    optimizer: int
    gradients: int
    buckets: int
    gathered: int
    whole: int
    copies: int
    layer_copies: int
    step: int


def held(config: TrainConfig, layout: Layout, weights: Weights, layers: int) -> Held:
    n, compute = layout.shard, precision_of(config, layout).compute
    width = 2 if config.dtype == "bfloat16" else 4
    trained, lora = weights.trained, weights.lora
    if layout.sharding == "zero3" and config.bf16:
        own = 2 * weights.total  # the fp32 weights count as the optimizer's
        state, gradients, step = (bytes_each * (trained + lora) for bytes_each in (12, 2, 4))
    else:
        # accelerate casts trained weights up before it shards them, and so does `add_lora`
        of_trained = 4 if config.bf16 and (layout.sharded or config.lora_rank) else width
        own = of_trained * trained + 4 * lora + width * weights.frozen
        gradients = of_trained * trained + 4 * lora
        state, step = 2 * gradients, 0
    gathered = 0
    if layout.sharding == "zero3":
        gathered = compute * (min(weights.total, LIVE) + min(weights.total, BUCKETS) + weights.largest)
    elif layout.sharded:
        # all but the layers; the layer at work, the next one, and one more on its way into or out of place
        outside = weights.total - weights.in_layers - lora
        gathered = compute * (outside + 3 * (weights.one_layer + lora // layers))
    copied, copied_layer = 0, 0
    if config.bf16 and not layout.sharded:  # autocast, over every weight that is float32
        if config.dtype == "float32":
            frozen_layers = weights.in_layers - weights.trained_layers
            copied, copied_layer = weights.matrices + frozen_layers, weights.one_layer
        elif lora:
            copied = weights.matrices
        copied, copied_layer = copied + lora, copied_layer + lora // layers
    return Held(
        weights=own // n,
        optimizer=state // n,
        gradients=gradients // n,
        buckets=gradients if layout.sharding == "ddp" else 0,
        gathered=gathered,
        whole=compute * (weights.trained_layers + lora) if layout.sharded else 0,
        copies=2 * copied,
        layer_copies=2 * copied_layer,
        step=step // n,
    )


@dataclass(frozen=True)
class Kept:
    """Bytes of one task's sequences: kept by the graph, and for a while in backward.

    layer: of one layer while it goes backward, beyond what is kept; end: with what it keeps. logits_peak:
    while the loss goes backward.
    """

    activations: int
    intensity: int
    logits: int
    logits_peak: int
    layer: int
    end: int
    encoder: int


def kept(shape: Shape, config: TrainConfig, layout: Layout, weights: Weights, rows: Rows, task: str) -> Kept:
    precision = precision_of(config, layout)
    lora = None
    if config.lora_rank:  # its weights are float32, unless FSDP2 or ZeRO-3 gathers them in bf16
        casts = precision.compute == 2 and not layout.sharded
        lora = Lora(config.lora_rank, weights.targets, casts, config.lora_dropout > 0)
    layer = activations.layer_bytes(shape, rows, precision, lora)
    own = activations.intensity_bytes(shape, rows, precision) if config.weights()[task] else 0
    ends = activations.ends_bytes(shape, rows, precision, task)
    working = activations.backward_bytes(shape, rows, precision)
    logits, peak = logits_of(shape, config, precision, rows, task)
    stored, intensity, again = shape.layers * layer, shape.layers * own, 0
    if config.gradient_checkpointing:
        stored = shape.layers * activations.checkpoint_bytes(shape, rows, precision)
        intensity, again = 0, layer + own
    return Kept(
        activations=stored + ends,
        intensity=intensity,
        logits=logits,
        logits_peak=peak,
        layer=again + working,
        end=layer + own + working,
        encoder=encoder(shape, config, rows, task),
    )


def logits_of(
    shape: Shape, config: TrainConfig, precision: Precision, rows: Rows, task: str
) -> tuple[int, int]:
    """(kept, at the peak) as `label_loss` makes them."""
    vocab = shape.code_vocab if task == "generation" else shape.vocab
    labels = rows.count * rows.labels
    if config.use_liger and labels:
        # A chunk of rows whose logits are about as large as the states, and the head's gradient, made already
        # in the forward pass (Liger-Kernel, ops/fused_linear_cross_entropy.py).
        chunks = -(-vocab // shape.hidden)
        chunk = 1 << (-(-labels // chunks) - 1).bit_length()
        head = precision.compute * vocab * shape.hidden
        return head, head + (4 + precision.compute) * min(chunk, labels) * vocab
    return activations.logits_bytes(vocab, labels, precision, LOGITS_AT_ONCE)


def encoder(shape: Shape, config: TrainConfig, rows: Rows, task: str) -> int:
    """The frozen encoder's feature maps while it reads a batch's pictures; its norms work in float32."""
    if shape.family == "janus" and task == "understanding":
        settings = shape.model.config.vision_config
        wide = settings.hidden_size * (2 * settings.mlp_ratio + 5)  # the MLP twice, q, k, v, input, output
        return int(4 * rows.count * shape.image_tokens * wide)
    if not shape.makes_codes(config, task):
        return 0
    settings = shape.model.config.vq_config
    pixels = shape.image_size**2 * settings.base_channels
    if shape.family == "emu3":  # one picture at a time, repeated to the frames of a clip
        return 4 * MAPS * pixels * settings.temporal_downsample_factor
    return 4 * MAPS * pixels * rows.count


def moments(
    shape: Shape, config: TrainConfig, layout: Layout, weights: Weights, batch: Mapping[str, Rows]
) -> dict[str, dict[str, int]]:
    """Bytes by moment and part for one micro-batch in the middle of an optimizer step."""
    fixed = held(config, layout, weights, shape.layers)
    parts = {task: kept(shape, config, layout, weights, rows, task) for task, rows in batch.items()}
    tasks = list(parts.values())
    first, both, accumulates = tasks[0], len(tasks) > 1, config.gradient_accumulation_steps > 1
    fsdp_defers = accumulates and layout.sharding in ("fsdp2", "hsdp")

    def moment(gradients: int = 0, whole: int = 0, copies: int = 0, **more: int) -> dict[str, int]:
        found = {
            "weights": fixed.weights,
            "bf16 copies": copies,
            "optimizer": fixed.optimizer,
            "gradients": gradients,
            "whole gradients": whole,
            "DDP buckets": fixed.buckets,
            **{name.replace("_", " "): size for name, size in more.items()},
        }
        return {name: size for name, size in found.items() if size}

    def graph(tasks: list[Kept], **more: int) -> dict[str, int]:
        return {
            "gathered": fixed.gathered,
            "activations": sum(task.activations for task in tasks),
            "intensities": sum(task.intensity for task in tasks),
            "logits": sum(task.logits for task in tasks) + more.pop("logits", 0),
            **more,
        }

    def turning(tasks: list[Kept]) -> list[dict[str, int]]:
        """Backward of the last of these tasks begins: its logits first, then its last layer."""
        return [
            graph(tasks, logits=tasks[-1].logits_peak - tasks[-1].logits),
            graph(tasks, logits=-tasks[-1].logits, working_space=tasks[-1].layer),
        ]

    # what earlier micro-batches of the step have left
    left = {
        "gradients": fixed.gradients if accumulates and not fsdp_defers else 0,
        "whole": fixed.whole if fsdp_defers else 0,
    }
    waiting = dict(left)
    if both:  # the gradients of the task that went backward first
        waiting["whole"] = fixed.whole
        if not layout.sharded:  # in the precision of the product that made them
            waiting["gradients"] += fixed.gradients // 2 if fixed.copies else fixed.gradients
    encodes = [
        moment(**left, copies=fixed.copies, **graph(tasks[:i], image_encoder=task.encoder))
        for i, task in enumerate(tasks)
    ]
    forwards = [moment(**left, copies=fixed.copies, **found) for found in turning(tasks)]
    between = fixed.layer_copies if config.gradient_checkpointing else fixed.copies
    betweens = [moment(**waiting, copies=between, **found) for found in turning([first])] if both else []
    ends = moment(
        fixed.gradients,
        fixed.whole if both or fsdp_defers else 0,
        fixed.layer_copies,
        gathered=fixed.gathered,
        working_space=first.end,
    )
    found = {
        "encode": max(encodes, key=total),
        "forward": max(forwards, key=total),
        "between": max(betweens, key=total, default={}),
        "backward": ends,
        "step": moment(fixed.gradients + fixed.step),
    }
    return {name: parts for name, parts in found.items() if parts}


def total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def compared(shape: Shape, config: TrainConfig, layout: Layout, batch: Mapping[str, Rows]) -> dict[str, int]:
    """What other ways of doing the same would keep, in bytes a GPU, for the same samples."""
    precision = precision_of(config, layout)
    janus = shape.family == "janus" and not shape.is_lab
    matrices, eager, logits = 0, 0, 0
    for task, rows in batch.items():
        length = max(rows.length, AUTHORS[task]) if janus else rows.length
        padded = Rows(rows.count, length, length)
        alone, everything = activations.eager_bytes(shape, padded, precision)
        matrices, eager = matrices + alone, eager + everything
        vocab = shape.code_vocab if task == "generation" else shape.vocab
        logits += activations.logits_bytes(vocab, padded.tokens, precision, LOGITS_AT_ONCE, whole=True)[1]
    return {
        "attention matrices, if eager attention kept them": matrices,
        "the same with all that autograd keeps of the softmax": eager,
        "logits of all positions at once": logits,
    }


def on_disk(config: TrainConfig, layout: Layout, weights: Weights) -> int:
    """One checkpoint: the model's weights and, for what is trained, AdamW's two numbers."""
    width = 2 if config.dtype == "bfloat16" and not (layout.sharded and config.bf16) else 4
    return width * weights.total + 2 * max(width, 4 if weights.lora else width) * (
        weights.trained + weights.lora
    )
