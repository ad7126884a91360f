"""SIGTERM and SIGUSR1: finish the step, save, end. For spot instances, Slurm, and a patient `kill`.

The exit code is 128 + the signal's number (143 for SIGTERM, 138 for SIGUSR1), as for a process that the
signal had ended: whoever waits sees that the run is not finished, and `--resume auto` goes on. 0 always means
finished.

Slurm: `#SBATCH --signal=USR1@600` warns ten minutes before the time limit. A launcher between Slurm and the
processes must not die of the warning: `trap '' USR1` before `srun torchrun ...`. torchrun passes SIGTERM on
and kills what still runs 30 seconds later: too soon for a large model's checkpoint, so warn by SIGUSR1.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from transformers import TrainerCallback

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopAtStepBoundary(TrainerCallback):
    """Ends training on all processes after the step in which any of them got a signal; saves before.

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
            if os.getpid() == owner:  # a forked child has this handler too
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
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if state.global_step >= state.max_steps:
            self.received = 0  # it came in the last step: the run is finished

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
