"""Everything a training run can be told, in one flat dataclass. A recipe is a YAML file with these keys.

Names that `transformers.TrainingArguments` has too mean the same here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainConfig:
    # model and data
    model: str = "lab/unified"  # a name for `load_adapter`, a folder or a hub name
    output_dir: str = "runs/train"
    generation_data: str = "lab"  # JSONL file, `datasets` folder, ...; "lab": endless fresh lab scenes
    understanding_data: str = "lab"
    task_ratio: str = "1:1"  # generation : understanding, by samples; "1:0" trains one task only
    per_device_train_batch_size: int = 16  # sequences, both tasks together
    gradient_accumulation_steps: int = 1
    max_steps: int = 200
    seed: int = 0
    # AIA
    aia_weight: float = 40.0  # λ of Eq. 3; 0 is plain SFT
    targets: str = "lab"  # "lab..." (see lab.references), "janus-pro", "emu3", "authors-code", a YAML file
    aia_kind: str = "huber"  # huber, l1, l2
    aia_reduction: str = "per-sample"
    aia_schedule: str = "constant"  # of λ over the run: constant, warmup (0 to λ), decay (λ to 0)
    aia_layers: str = "all"  # "all" or 0-based layers and ranges: "0-3,7"
    aia_every: int = 1  # the AIA term in every n-th step only
    spans: str = "paper"  # paper, predicting, and for lab models code
    # optimisation
    learning_rate: float = 1e-3
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-6
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    warmup_steps: int = 10
    lr_scheduler_type: str = "cosine"

    def shares(self) -> dict[str, float]:
        """Share of each task among the samples; a task with none is left out."""
        parts = [float(part) for part in self.task_ratio.split(":")]
        if len(parts) != 2 or min(parts) < 0 or sum(parts) == 0:
            raise ValueError(f"task_ratio {self.task_ratio!r}: expected generation:understanding, like 2:1")
        named = dict(zip(("generation", "understanding"), parts, strict=True))
        return {task: part / sum(parts) for task, part in named.items() if part}


def task_counts(config: TrainConfig, step: int) -> dict[str, int]:
    """How many samples of each task step `step` holds, so that the ratio is exact over the steps.

    The count of generation samples up to any step is the exact share rounded down: every step is within one
    sample of the ratio and no error adds up. Depends on nothing but the step: the same on every process.
    """
    size, share = config.per_device_train_batch_size, config.shares().get("generation", 0.0)
    generation = int((step + 1) * size * share + 1e-9) - int(step * size * share + 1e-9)
    counts = {"generation": generation, "understanding": size - generation}
    return {task: count for task, count in counts.items() if count}


def weight_at(config: TrainConfig, step: int) -> float:
    """λ at a step (0-based): `aia_schedule` over the run, and 0 in steps that `aia_every` leaves out."""
    if step % config.aia_every:
        return 0.0
    done = step / max(1, config.max_steps - 1)
    factor = {"constant": 1.0, "warmup": done, "decay": 1.0 - done}
    if config.aia_schedule not in factor:
        raise ValueError(f"aia_schedule {config.aia_schedule!r}: choose from {', '.join(factor)}")
    return config.aia_weight * factor[config.aia_schedule]
