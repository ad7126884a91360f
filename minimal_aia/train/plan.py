"""Memory and time of a run before anyone rents a GPU: `minimal-aia plan RECIPE`.

    print(plan_text(config, Layout.of("fsdp2", 8), "h100"))

Memory is followed through an optimizer step, in bytes a GPU, and its peak is the highest of these moments:

    encode    images become codes or features (no gradients)
    forward   the end of the forward pass: everything kept for backward, and the largest logits
    between   backward of one task done, the other's still kept (one forward holds both, one backward both)
    backward  its end: all gradients and one layer's working space
    step      AdamW

Assumptions, with their sources:

- Weights are counted tensor by tensor on the meta device (`train.shapes`); what a layer keeps is by formula,
  to the byte (`train.activations`). Rows are as long as `max_length`, if there is one: the worst batch.
- AdamW keeps two numbers a trained weight, in the weight's own precision (torch.optim.AdamW, fused).
- bf16 without sharding is autocast: weights, gradients and moments stay fp32 and a bf16 copy of every trained
  matrix is kept as well (PyTorch's autocast cache). DDP keeps a second copy of the gradients in its buckets
  (DistributedDataParallel, gradient_as_bucket_view=False).
- FSDP2 through accelerate 1.15 (`fsdp2_prepare_model`): trained weights are sharded in fp32, gathered in
  bf16; decoder layers one by one, with the next one prefetched, all other weights together and kept gathered.
- ZeRO-3: bf16 weights and gradients, fp32 weights and moments, all sharded (Rajbhandari et al., arXiv
  1910.02054); at most `memory.LIVE` weights are gathered, as recipes/zero3.json says.
- A weight that both tasks use gets its gradient when both have gone backward (autograd sums first). Until
  then FSDP2 and ZeRO-3 cannot shard it: the whole gradient waits, in bf16. The same holds, under FSDP2, for
  gradient accumulation, which defers the reduction. Seen on two processes on a CPU.
- RESERVE for the CUDA context and NCCL and FRAGMENTATION of the peak for the allocator are guesses.

Time: matrix products and attention only, causal attention as half; backward twice forward, 2.5 times for
attention, once for frozen weights; gradient checkpointing runs the layers' forward again. `mfu` is the share
of the GPU's bf16 peak that all executed operations are assumed to reach (recomputation included, unlike the
MFU of PaLM, arXiv 2204.02311, appendix B, which is printed beside it). torchtitan reports 57 % for Llama 3 8B
with FSDP2 on 64 A100 at 8 192 tokens (its docs/performance.md); the default here is a guess below that.
Communication and waiting for data are in `mfu`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from minimal_aia.train.activations import Rows
from minimal_aia.train.config import TrainConfig, task_counts
from minimal_aia.train.layout import GIB, MFU, Gpu, Layout, find_gpu
from minimal_aia.train.memory import AUTHORS, compared, moments, on_disk, total
from minimal_aia.train.shapes import Shape, Weights, count_weights, read_shape
from minimal_aia.train.work import Work, work_of

if TYPE_CHECKING:
    from collections.abc import Mapping

RESERVE = int(1.5 * GIB)
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Lengths:
    """Tokens of the texts of a typical sample, for the time and, without `max_length`, for the memory.

    prompt: of generation. question, answer: of understanding, all turns together. template: what the chat
    format adds.
    """

    prompt: int = 128
    question: int = 64
    answer: int = 256
    template: int = 32

    def __post_init__(self) -> None:
        if wrong := [name for name, tokens in vars(self).items() if tokens < 0]:
            raise ValueError(f"{wrong[0]} of {getattr(self, wrong[0])} tokens: a length is not negative")

    def rows(self, shape: Shape, config: TrainConfig, task: str, n: int, longest: bool = False) -> Rows:
        """n sequences: typical ones, or as long as the recipe lets them be."""
        fixed = shape.image_tokens + self.template
        bound = config.max_length if longest and config.max_length else 0
        if 0 < bound <= fixed:
            raise ValueError(f"max_length {bound}: a picture and the chat format alone take {fixed} tokens")
        text = self.prompt if task == "generation" else self.question + self.answer
        length = bound or fixed + text
        answers = length - fixed if bound else self.answer
        return Rows(n, length, shape.image_tokens if task == "generation" else answers)


@dataclass(frozen=True)
class Plan:
    """memory: bytes a GPU by moment and part; comparison: of what is not done here; disk: of one checkpoint.

    rows: the sequences of the worst micro-batch, by task. work: of one GPU in one optimizer step.
    """

    model: str
    layout: Layout
    gpu: Gpu
    mfu: float
    weights: Weights
    memory: dict[str, dict[str, int]]
    comparison: dict[str, int]
    rows: dict[str, Rows]
    work: Work
    steps: int
    disk: int
    notes: list[str] = field(default_factory=list)

    def at(self, moment: str) -> int:
        return sum(self.memory[moment].values())

    @property
    def moment(self) -> str:
        """When most memory is held."""
        return max(self.memory, key=self.at)

    @property
    def peak(self) -> int:
        """Bytes that tensors take then."""
        return self.at(self.moment)

    @property
    def needed(self) -> int:
        """The same with reserve and fragmentation."""
        return int(self.peak * (1 + FRAGMENTATION)) + RESERVE

    @property
    def margin(self) -> float:
        """Share of the GPU's memory that is left; negative: it does not fit."""
        return 1 - self.needed / (self.gpu.memory * GIB)

    @property
    def fits(self) -> bool:
        return self.margin >= 0

    @property
    def step_seconds(self) -> float | None:
        """None for a GPU of which only the memory is known."""
        peak = self.gpu.teraflops
        return None if peak is None else self.work.executed / (self.mfu * peak * 1e12)

    @property
    def hours(self) -> float | None:
        return None if self.step_seconds is None else self.steps * self.step_seconds / 3600


def plan(
    config: TrainConfig,
    layout: Layout | None = None,
    gpu: str | Gpu = "h100",
    mfu: float = MFU,
    lengths: Lengths | None = None,
    rows: Mapping[str, Rows] | None = None,
) -> Plan:
    """Memory and time of a run.

    rows: exactly these sequences in every micro-batch, in place of what the recipe and `lengths` say.
    ValueError for an unknown model, GPU, part or linear map.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu {mfu}: a share of the GPU's peak, above 0 and at most 1")
    gpu = find_gpu(gpu) if isinstance(gpu, str) else gpu
    layout, lengths = layout or Layout(), lengths or Lengths()
    shape = read_shape(config.model, config.image_area)
    if config.attention_dropout is not None:
        shape = replace(shape, attention_dropout=config.attention_dropout)
    weights = count_weights(shape, config)
    batches = [rows] if rows else micro_batches(shape, config, lengths)
    memories = [moments(shape, config, layout, weights, batch) for batch in batches]
    worst = max(range(len(batches)), key=lambda i: max(total(parts) for parts in memories[i].values()))
    if rows:
        work = work_of(shape, config, weights, rows)
    else:
        work = Work()
        for task, share in config.shares().items():  # the mean of many micro-batches
            mean = config.per_device_train_batch_size * share
            usual = lengths.rows(shape, config, task, math.ceil(mean))
            work += work_of(shape, config, weights, {task: usual}) * (mean / usual.count)
    return Plan(
        config.model,
        layout,
        gpu,
        mfu,
        weights,
        memories[worst],
        compared(shape, config, layout, batches[worst]),
        dict(batches[worst]),
        work * config.gradient_accumulation_steps,
        config.max_steps,
        on_disk(config, layout, weights),
        notes(shape, config, layout, bool(rows)),
    )


def micro_batches(shape: Shape, config: TrainConfig, lengths: Lengths) -> list[dict[str, Rows]]:
    """The different mixtures of tasks in a run's micro-batches, with sequences as long as they may be."""
    mixes = {tuple(sorted(task_counts(config, step).items())) for step in range(64)}
    return [
        {task: lengths.rows(shape, config, task, n, longest=True) for task, n in mix} for mix in sorted(mixes)
    ]


def notes(shape: Shape, config: TrainConfig, layout: Layout, exact: bool) -> list[str]:
    """What a reader should know about this plan in particular."""
    found = []
    if shape.family == "janus" and not shape.is_lab:
        padded = " and ".join(f"{AUTHORS[task]} ({task})" for task in config.shares())
        found.append(f'"not done here" pads to at least {padded} tokens, as the authors\' code does')
    if not config.max_length and not exact:
        found.append("max_length is not set: a longer sample takes more memory than this")
    if layout.sharded and not config.bf16:
        found.append("bf16 is off: sharded weights are gathered and multiplied in float32, twice the memory")
    if layout.sharding in ("fsdp2", "hsdp") and config.gradient_accumulation_steps > 1:
        found.append(
            "gradient accumulation under FSDP2 keeps whole gradients on every GPU until the step's end"
        )
    if layout.sharded and min(task_counts(config, 0).values()) and len(task_counts(config, 0)) > 1:
        found.append("both tasks in one micro-batch: the gradients of the first wait, whole, for the second")
    if shape.attention_dropout and any(config.weights().values()):
        found.append(
            f"attention dropout {shape.attention_dropout:g} is on: intensities take a second attention call"
        )
    if any(shape.makes_codes(config, task) for task in config.shares()):
        found.append("image codes are made again in every epoch; `minimal-aia prepare` makes them once")
    return found
