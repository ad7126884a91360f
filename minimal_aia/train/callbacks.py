"""What a run shows while it trains: the layer curves, and a progress bar with both losses and |I − T|."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl

if TYPE_CHECKING:
    from minimal_aia.train.trainer import AIATrainer

CURVES = "curves.jsonl"  # in output_dir: one line a measurement and task


class Curves(TrainerCallback):
    """Writes the layer curves of the first samples to `curves.jsonl` and to the loggers."""

    def __init__(self, trainer: AIATrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:  # what lies behind a resumed checkpoint is measured again
            kept = [entry for entry in read_curves(args.output_dir) if entry["step"] <= state.global_step]
            text = "".join(json.dumps(entry) + "\n" for entry in kept if state.global_step)
            (Path(args.output_dir) / CURVES).write_text(text, encoding="utf-8")
        if not state.global_step:
            self.measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.trainer.config.curve_steps == 0 or state.global_step == state.max_steps:
            self.measure(state)

    def measure(self, state: Any) -> None:
        trainer = self.trainer
        found = trainer.measure_curves()
        if not state.is_world_process_zero:
            return
        layers = trainer.module.layers or list(range(len(trainer.module.adapter.layers())))
        logs: dict[str, float] = {}
        with (Path(trainer.args.output_dir) / CURVES).open("a", encoding="utf-8") as file:
            for task, values in found.items():
                entry = {"step": state.global_step, "task": task, "layers": layers, **values}
                file.write(json.dumps(entry) + "\n")
                logs |= {
                    f"curve_{task}/layer_{n:02d}": v for n, v in zip(layers, values["curve"], strict=True)
                }
                logs |= {f"probe_distance/{task}": values["distance"]} if "distance" in values else {}
        # A control of its own: `on_log` marks the step as logged, but its losses are still to come.
        trainer.callback_handler.on_log(trainer.args, state, TrainerControl(), logs)


def read_curves(folder: str | Path) -> list[dict[str, Any]]:
    """The entries of a run's curves.jsonl: step, task, layers, curve, distance."""
    path = Path(folder) / CURVES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Progress(ProgressCallback):
    """The usual bar, with both losses and mean |I − T| at its end."""

    def __init__(self, trainer: AIATrainer) -> None:
        super().__init__()
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            shown = {"ntp": "ntp", "distance": "|I−T|"}
            self.training_bar.set_postfix(
                {
                    f"{shown[name]} {task[:3]}": f"{values[name]:.3f}"
                    for name in shown
                    for task, values in self.trainer.latest.items()
                    if name in values
                },
                refresh=False,
            )
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, *_: Any, **__: Any) -> None:
        """The inherited one prints every log entry above the bar."""
