"""From a run's configuration to what `transformers.Trainer` reads."""

from __future__ import annotations

import importlib.util

import torch
from transformers import TrainingArguments

from minimal_aia.train.config import TrainConfig


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The part of a run's configuration that `transformers.Trainer` reads."""
    same = (
        "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "seed",
        "dataloader_num_workers", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay",
        "max_grad_norm", "warmup_steps", "lr_scheduler_type", "bf16", "full_determinism",
        "save_total_limit", "logging_steps",
    )  # fmt: skip
    cpu = config.use_cpu or not torch.cuda.is_available()
    arguments = TrainingArguments(
        **{name: getattr(config, name) for name in same},
        # Unless it is told, accelerate takes each of several processes without a GPU for the only one.
        use_cpu=config.use_cpu or not torch.accelerator.is_available(),
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        report_to=loggers(config.report_to),
        optim="adamw_torch" if cpu else "adamw_torch_fused",
        logging_nan_inf_filter=False,  # a nan is reported, not smoothed over
        ddp_find_unused_parameters=False,  # SFTModule gives every trained weight a gradient
        remove_unused_columns=False,
        disable_tqdm=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process, one GPU: never torch's old DataParallel
    return arguments


def loggers(report_to: str) -> list[str]:
    """`report_to` as the Trainer takes it. ImportError names what must be installed."""
    if report_to == "none":
        return []
    if report_to == "auto":
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    names = [name.strip() for name in report_to.split(",")]
    for name in names:
        if name not in ("tensorboard", "wandb"):
            raise ValueError(f"report_to {report_to!r}: choose auto, none, tensorboard or wandb")
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"report_to {report_to}: {name} is not installed: pip install {name}")
    return names
