"""Everything a training run can be told, in one flat dataclass. A recipe is a YAML file with these keys.

Names that `transformers.TrainingArguments` has too mean the same here. Defaults fit the laptop lab; recipes
for real models say what differs. `train.recipe` reads and writes YAML and makes the command line of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

TASKS = ("generation", "understanding")


def option(default: Any, help: str) -> Any:
    """A field with a default and the line that `minimal-aia train --help` shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """One training run. `recipe.check` says what is wrong with its values."""

    # model and data
    model: str = option("lab/unified", "a name for load_adapter: lab/unified, a folder, a hub id")
    output_dir: str = option("runs/train", "where checkpoints, logs and the trained model go")
    generation_data: str = option("lab", "JSONL, parquet or `datasets` folder; lab: endless fresh scenes")
    understanding_data: str = option("lab", "the same for understanding")
    task_ratio: str = option("1:1", "generation : understanding, by samples; 1:0 trains one task only")
    per_device_train_batch_size: int = option(16, "sequences a process and micro-batch, both tasks together")
    gradient_accumulation_steps: int = option(1, "micro-batches an optimizer step")
    max_steps: int = option(200, "optimizer steps")
    seed: int = option(0, "of data order, dropout and new weights")
    max_length: int | None = option(None, "tokens a sample; longer ones are bad samples")
    prompt_dropout: float = option(
        0.0, "share of prompts dropped for guidance; these are not in the AIA loss"
    )
    on_bad_sample: Literal["skip", "fatal"] = option("skip", "what an unusable sample does at run time")
    dataloader_num_workers: int = option(0, "processes that read and tokenise ahead")
    length_window: int = option(0, "steps whose samples are sorted by length against padding; 0: none")
    image_folder: str = option("", "where image paths of the data start; by default each file's own folder")
    image_fit: Literal["crop", "pad"] = option("crop", "square target pictures: cut to size, or with bars")
    image_area: int = option(0, "pixels of Emu3's pictures, about; 0: the processor's own bounds")
    codes: str = option("", "folder of image codes that `minimal-aia prepare` made")
    # AIA
    aia_weight: float = option(40.0, "λ of Eq. 3; 0 is plain SFT")
    aia_weight_generation: float | None = option(None, "λ of this task, if another than aia_weight")
    aia_weight_understanding: float | None = option(None, "λ of this task, if another than aia_weight")
    targets: str = option(
        "lab", "none, lab, lab-..., janus-pro, emu3, authors-code, a YAML file; NAME:rescaled"
    )
    aia_kind: Literal["huber", "l1", "l2"] = option("huber", "penalty on I − T")
    aia_reduction: Literal["per-sample", "batch-mean", "authors-code"] = option(
        "per-sample", "over the samples of a micro-batch (see aia_loss)"
    )
    aia_schedule: Literal["constant", "warmup", "decay"] = option(
        "constant", "λ over the run: 0 to λ, λ to 0"
    )
    aia_layers: str = option("all", 'all, or 0-based layers and ranges: "0-3,7"')
    aia_every: int = option(1, "the AIA term in every n-th step only")
    spans: Literal["paper", "predicting", "code"] = option(
        "paper", "what queries and keys are; code: released"
    )
    # optimisation
    learning_rate: float = option(1e-3, "peak of AdamW's learning rate")
    adam_beta1: float = option(0.9, "AdamW")
    adam_beta2: float = option(0.95, "AdamW")
    adam_epsilon: float = option(1e-6, "AdamW")
    weight_decay: float = option(0.05, "AdamW, on every trained weight")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: never")
    warmup_steps: int = option(10, "steps of linear warm-up")
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup", "constant"] = option(
        "cosine", "learning rate after the warm-up"
    )
    # what is trained, and in which precision
    freeze: str = option(
        "vision", "parts left as they are: vision, aligner, generation, language (VQ always)"
    )
    lora_rank: int = option(0, "rank of LoRA in the language model; 0: full fine-tuning")
    lora_alpha: float = option(32.0, "scale of LoRA: alpha / rank")
    lora_dropout: float = option(0.0, "dropout of LoRA")
    lora_target_modules: str = option("all-linear", "all-linear, or names: q_proj,v_proj")
    attention_dropout: float | None = option(None, "while training; none: the model's own (Emu3: 0.1)")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the weights in memory; LoRA's are float32")
    bf16: bool = option(False, "compute in bfloat16 (autocast), weights as `dtype` says")
    gradient_checkpointing: bool = option(False, "recompute layers in backward: less memory, more time")
    use_liger: bool = option(False, "Liger's cross-entropy kernel, where it is installed and there is a GPU")
    # running
    use_cpu: bool = option(False, "stay on the CPU even if there is a GPU")
    num_processes: int | None = option(None, "refuse to run when another number of processes came up")
    full_determinism: bool = option(False, "deterministic kernels only; slower on a GPU")
    resume: str = option("no", "no; auto: the last good checkpoint in output_dir, if any; or a checkpoint")
    save_steps: int = option(500, "steps between checkpoints; 0: none but the trained model")
    save_total_limit: int = option(2, "checkpoints kept")
    logging_steps: int = option(10, "steps between log entries")
    curve_steps: int = option(50, "steps between layer curves of the first samples; 0: none")
    report_to: str = option(
        "auto", "auto (tensorboard if installed), none, tensorboard, wandb; or several: a,b"
    )

    def __post_init__(self) -> None:
        self.shares()

    def shares(self) -> dict[str, float]:
        """Share of each task among the samples; a task with none is left out."""
        try:
            parts = [float(part) for part in self.task_ratio.split(":")]
        except ValueError:
            parts = []
        if len(parts) != 2 or not min(parts) >= 0 or not 0 < sum(parts) < float("inf"):
            raise ValueError(f"task_ratio {self.task_ratio!r}: expected generation:understanding, like 2:1")
        named = dict(zip(TASKS, parts, strict=True))
        return {task: part / sum(parts) for task, part in named.items() if part}

    def generation_share(self) -> Fraction:
        """Of generation among the samples: exact after any number of them."""
        generation, understanding = map(Fraction, self.task_ratio.split(":"))
        return generation / (generation + understanding)

    def weights(self) -> dict[str, float]:
        """λ by task, before any schedule."""
        own = {task: getattr(self, f"aia_weight_{task}") for task in TASKS}
        return {task: self.aia_weight if weight is None else weight for task, weight in own.items()}


def task_counts(config: TrainConfig, step: int) -> dict[str, int]:
    """How many samples of each task step `step` holds, so that the ratio is exact over the steps.

    The count of generation samples up to any step is the exact share rounded down: every step is within one
    sample of the ratio and no error adds up. Depends on nothing but the step: the same on every process.
    """
    size = config.per_device_train_batch_size
    share = config.generation_share()
    generation = math.floor((step + 1) * size * share) - math.floor(step * size * share)
    counts = {"generation": generation, "understanding": size - generation}
    return {task: count for task, count in counts.items() if count}


def micro_batch(config: TrainConfig, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> int:
    """The number, over the whole run, of micro-batch `micro` of step `step` on process `rank` of `world`.

    `task_counts` and the data take it as their step. So one optimizer step holds the same samples on one
    process with four micro-batches, on two with two, and on four with one. A process' own micro-batches are
    neighbours: with one sample each, tasks alternate in time, alike on every process. (Under FSDP all
    processes must run the same number of passes.)
    """
    return (step * world + rank) * config.gradient_accumulation_steps + micro


def weight_at(config: TrainConfig, step: int, task: str | None = None) -> float:
    """λ at a step (0-based): `aia_schedule` over the run, and 0 in steps that `aia_every` leaves out."""
    if step % config.aia_every:
        return 0.0
    done = step / max(1, config.max_steps - 1)
    factor = {"constant": 1.0, "warmup": done, "decay": 1.0 - done}[config.aia_schedule]
    return (config.weights()[task] if task else config.aia_weight) * factor


def layer_subset(text: str, n_layers: int | None = None) -> list[int] | None:
    """`aia_layers` as 0-based indices, None for all: "0-3,7" is 0, 1, 2, 3, 7.

    ValueError if it is malformed, or names a layer that a model of `n_layers` does not have.
    """
    if text == "all":
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or ("-" in part and not last.isdecimal()):
            raise ValueError(f'aia_layers {text!r}: expected all, or layers and ranges like "0-3,7"')
        if int(last or first) < int(first):
            raise ValueError(f"aia_layers {text!r}: the range {part.strip()} runs backwards")
        layers.update(range(int(first), int(last or first) + 1))
    if n_layers is not None and max(layers) >= n_layers:
        raise ValueError(f"aia_layers {text!r}: the model's layers are 0 to {n_layers - 1}")
    return sorted(layers)
