"""What a run does between its steps: stop when it is told to, measure layer curves, show a progress bar."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl

if TYPE_CHECKING:
    from minimal_aia.train.trainer import AIATrainer

CURVES = "curves.jsonl"  # in output_dir: one line a measurement and task
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)  # finish the step, save, end


class StopAtStepBoundary(TrainerCallback):
    """Ends training on all processes after the step in which any of them got a signal; saves before.

    The exit code is 128 + the signal's number (143 for SIGTERM, 138 for SIGUSR1, 130 for SIGINT), as for a
    process that the signal had ended: whoever waits sees that the run is not finished, and `--resume auto`
    goes on. ^C is SIGINT; a second one does not wait for the step. torchrun passes SIGTERM on and kills what
    still runs 30 seconds later: too soon for a large model's checkpoint, so Slurm should warn by SIGUSR1, as
    recipes/slurm.sh does.

    `received` is the signal's number once all processes have agreed to stop, 0 until then.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.received = 0
        self._pending = 0
        self._before: dict[Any, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.received = self._pending = 0
        owner = os.getpid()

        def remember(number: int, frame: Any) -> None:
            if os.getpid() != owner:  # a forked child has this handler too
                return
            if number == signal.SIGINT:
                if self._pending:
                    raise KeyboardInterrupt
                os.write(2, b"\nstopping after this step; ^C again: at once\n")
            self._pending = number

        self._before = {number: signal.signal(number, remember) for number in SIGNALS}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # One small reduction a step: a process that stops alone leaves the others waiting for its gradients.
        pending = torch.tensor(float(self._pending), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(pending, torch.distributed.ReduceOp.MAX)
        self.received = int(pending)
        if self.received and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            if self.accelerator.is_main_process:
                name = signal.Signals(self.received).name
                print(f"{name}: saving and stopping after step {state.global_step}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()
        if state.global_step >= state.max_steps:
            self.received = 0  # it came in the last step: the run is finished

    def restore(self) -> None:
        """Give the signals back; also needed when training ended by an error."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def exit_code(self) -> int:
        """0 if no signal has stopped the run, else 128 + its number."""
        return 128 + self.received if self.received else 0


def stay_alive_in_worker(worker: int) -> None:
    """`worker_init_fn` of a data loader. Slurm signals every process; without its workers a step cannot end.

    Workers end when their main process does, so nothing is left behind.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


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
