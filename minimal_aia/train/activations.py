"""Bytes that autograd keeps between forward and backward, by formula.

What is counted is what the modules of transformers 5 save (RMSNorm in float32, SDPA, SwiGLU) and what
`minimal_aia.capture` adds. Each line below was read off the code and holds to the byte against
`torch.autograd.graph.saved_tensors_hooks` on the CPU (tests/train/test_activations.py). Widths: h hidden,
f feed-forward, a and k query and key heads, d head size; c bytes of a computed number, r of the residual.

Like Korthikanti et al. (arXiv 2205.05198, section 4), but for these layers: no dropout, no stored attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minimal_aia.train.shapes import Shape

INDICATOR_COLUMNS = 8  # that `attention_with_intensity` adds to q, k and v


@dataclass(frozen=True)
class Precision:
    """compute: bytes of a number in a matrix product. residual: in the stream between layers.

    bf16 autocast over fp32 weights is (2, 4): every linear map then keeps its own bf16 copy of its input.
    Weights that are bf16 themselves, or that FSDP2 gathers in bf16, are (2, 2), and plain fp32 is (4, 4).
    """

    compute: int = 4
    residual: int = 4

    @property
    def autocast(self) -> bool:
        return self.compute != self.residual


@dataclass(frozen=True)
class Rows:
    """Sequences of one task in a micro-batch: `count`, each of `length` tokens with `labels` labels."""

    count: int
    length: int
    labels: int

    @property
    def tokens(self) -> int:
        return self.count * self.length

    @property
    def padded(self) -> bool:
        """Rows of different lengths need a mask; one row alone does not."""
        return self.count > 1


@dataclass(frozen=True)
class Lora:
    """casts: its weights are float32 and the model's are not, so every adapter casts its input."""

    rank: int
    targets: tuple[str, ...]
    casts: bool = False
    dropout: bool = False


SHARE_AN_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def layer_bytes(shape: Shape, rows: Rows, precision: Precision, lora: Lora | None = None) -> int:
    """What one decoder layer keeps for backward, plain fused attention."""
    h, f, out = shape.hidden, shape.feed_forward, shape.heads * shape.head_dim
    c, r = precision.compute, precision.residual
    norms = 2 * (4 + 4 * h + r * h)  # 1/rms, the input in fp32, the normalised one (if the norm learns)
    mlp = c * 3 * f  # gate, its activation, up
    if shape.attention_dropout and shape.family == "emu3":
        norms += 2 * h  # its layers also drop out what they add to the residual; a byte each says what
    if lora:
        norms -= 2 * r * h
        # The frozen maps keep nothing. Adapters keep their input, and the few numbers between their halves.
        inputs = {"o_proj": out, "down_proj": f}
        wide = 0
        for names in SHARE_AN_INPUT:
            adapted = len(set(names) & set(lora.targets))
            each = inputs.get(names[0], h)
            if lora.dropout:  # a cast, a dropped copy (kept) and a byte a number that says what was dropped
                wide += adapted * each * (c + 1)
            elif lora.casts:
                wide += adapted * each * c
            elif adapted and names != ("o_proj",):  # (attention keeps that one anyway)
                wide += each * c
        linear = wide + c * lora.rank * len(lora.targets)
    elif precision.autocast:
        linear = c * (3 * h + 2 * h + f)  # o_proj shares its input with the attention's own output
    else:
        linear = c * (h + h + f)  # q, k, v share one input, gate and up another
    return rows.tokens * (norms + attention_bytes(shape, rows, precision) + linear + mlp)


def attention_bytes(shape: Shape, rows: Rows, precision: Precision) -> int:
    """A token's share of what fused attention keeps: q, k, v, output, log-sum-exp; with padding a mask.

    A mask is one number a pair of tokens: PyTorch turns transformers' boolean one into numbers in every
    layer, and grouped key heads are then repeated.
    """
    k = shape.heads if rows.padded else shape.kv_heads
    mask = precision.compute * rows.length if rows.padded else 0
    return precision.compute * (2 * shape.heads + 2 * k) * shape.head_dim + 4 * shape.heads + mask


def intensity_bytes(shape: Shape, rows: Rows, precision: Precision) -> int:
    """AIA's own: what a layer that reports its intensity keeps beyond `layer_bytes`.

    Eight more columns in q, k, v and output; the output is kept twice (with them for the attention, without
    for the map behind it), and the query mask. With attention dropout a second fused call keeps its output,
    log-sum-exp and an indicator as wide as a head (and under autocast one more cast copy of q and k).
    """
    a, d = shape.heads, shape.head_dim
    k = a if rows.padded else shape.kv_heads
    if shape.attention_dropout:
        wide = (2 if precision.autocast else 1) * (a + k) * d
        return rows.tokens * (precision.compute * wide + 4 * a + 1)
    return rows.tokens * (precision.compute * (INDICATOR_COLUMNS * (2 * a + 2 * k) + a * d) + 1)


def checkpoint_bytes(shape: Shape, rows: Rows, precision: Precision) -> int:
    """What a checkpointed layer keeps: its input."""
    return rows.tokens * precision.residual * shape.hidden


def ends_bytes(shape: Shape, rows: Rows, precision: Precision, task: str) -> int:
    """What is kept before the first and after the last layer, without logits.

    The last norm, the states at label positions, and for Janus the aligners' hidden states and the head's.
    """
    h, c, r = shape.hidden, precision.compute, precision.residual
    total = rows.tokens * (4 + 4 * h + r * h) + rows.labels * rows.count * c * h
    if shape.family == "janus":
        image = rows.count * shape.image_tokens
        total += image * c * (2 * h + h)  # aligner: first map, activation, second map
        if task == "generation":
            total += rows.labels * rows.count * c * 2 * h  # the generation head's own hidden layer
    return total


def backward_bytes(shape: Shape, rows: Rows, precision: Precision) -> int:
    """Working space of one layer's backward beyond what it saved: the MLP's gradients, less what is freed."""
    h, f = shape.hidden, shape.feed_forward
    return rows.tokens * (precision.compute * (2 * f + h) + 4 * h)


def logits_bytes(
    vocab: int, labels: int, precision: Precision, at_once: int, whole: bool = False
) -> tuple[int, int]:
    """(kept, at the peak) of the cross-entropy over `labels` positions and `vocab` classes, in float32.

    In backward: the kept log-softmax, the gradient of the loss and that of the logits, 4 bytes each; the
    logits themselves in compute precision. at_once: numbers that `label_loss` holds at a time (then nothing
    is kept: each piece is recomputed). whole: all at once, as `labels=` of transformers does.
    """
    numbers = vocab * labels
    piece = numbers if whole else min(numbers, max(vocab, at_once // vocab * vocab))
    return (4 * numbers if piece == numbers else 0), (12 + precision.compute) * piece


def eager_bytes(shape: Shape, rows: Rows, precision: Precision) -> tuple[int, int]:
    """(matrices alone, all that autograd keeps of them) over all layers with eager attention.

    The softmax is taken in float32 and cast: with bf16 both are kept, 6 bytes a pair of tokens and head.
    """
    pairs = shape.layers * shape.heads * rows.count * rows.length**2
    return precision.compute * pairs, (4 + (precision.compute if precision.compute != 4 else 0)) * pairs
