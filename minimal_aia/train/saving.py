"""How a run saves and goes on: whole checkpoints in `transformers.Trainer`, and the choice of one to resume.

Single process and DDP write one copy, FSDP2 and ZeRO one shard a process; the first process seals the folder
when all have written. All processes must see the same `output_dir` (a shared file system between nodes).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback

from minimal_aia.train import checkpoints as ck
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.signals import StopAtStepBoundary

# Another value of these is another run: steps would hold other samples.
SAME_DATA = """seed task_ratio per_device_train_batch_size prompt_dropout max_length
    length_window""".split()
# These may change without a word.
FREE = """output_dir resume num_processes gradient_accumulation_steps save_steps save_total_limit
    logging_steps curve_steps report_to dataloader_num_workers use_cpu on_nonfinite""".split()
_LOG_STATE = "log_state_{}.json"  # one a process: what was logged in part


class SafeTrainer(Trainer):
    """A `Trainer` whose checkpoints are sealed, and whole or absent, and which stops at a step boundary.

    Needs `config` before its own `__init__`; `_sums` is what the subclass gathers for its next log entry.
    """

    config: TrainConfig
    _sums: dict[str, torch.Tensor]
    _staging = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_launched(self)
        self.stop = StopAtStepBoundary(self.accelerator)
        self.add_callback(self.stop)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train; `self.stop.exit_code` says afterwards whether a signal ended it before the last step."""
        if resume_from_checkpoint:
            self.add_callback(_RestoreLog(self, Path(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        """Where `Trainer` puts `checkpoint-N`: aside, while it is being written."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / ck.STAGING) if self._staging else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        run = Path(super()._get_output_dir(trial))
        final = run / f"checkpoint-{step}"
        staged = run / ck.STAGING / final.name
        first = self.args.process_index == 0
        try:
            if first:
                ck.clear_staging(run)
                staged.mkdir(parents=True)
                self._check_room(run)
            self.accelerator.wait_for_everyone()
            self._staging = True
            super()._save_checkpoint(model, trial)
            self._save_log_state(staged)
            self.accelerator.wait_for_everyone()
            if first:
                facts = {"step": step, "world_size": self.args.world_size, "layout": layout(self)}
                facts["data"] = data_fingerprints(self)
                ck.seal(staged, config=asdict(self.config), **facts)
                ck.publish(staged, final)
                ck.retain(run, self.config.save_total_limit, sealed=final)
                ck.clear_staging(run)
        except Exception as error:
            # No word to the other processes: they wait, and their launcher ends them when this one ends.
            if not ck.is_disk_full(error):
                raise
            shutil.rmtree(staged, ignore_errors=True)
            raise OSError(_disk_full(run, step, error)) from error
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()

    def _check_room(self, run: Path) -> None:
        """Refuse at once what cannot fit: the last checkpoint's size, or weights and AdamW's two moments."""
        before = ck.checkpoints(run)
        try:
            needed = sum(entry["bytes"] for entry in ck.read_manifest(before[-1])["files"].values())
        except (IndexError, ValueError):
            weights = list(self.model.parameters())
            needed = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in weights)
        if shutil.disk_usage(run).free < needed:
            raise OSError(errno.ENOSPC, f"it needs about {needed / 1e9:.3g} GB")

    # ---- what is logged in part ------------------------------------------------------------------------

    def _save_log_state(self, folder: Path) -> None:
        """A log entry is a mean over steps; what was summed for the next one must not be lost."""
        state = {
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "sums": {name: sums.tolist() for name, sums in self._sums.items()},
        }
        path = folder / _LOG_STATE.format(self.args.process_index)
        path.write_text(json.dumps(state), encoding="utf-8")

    def load_log_state(self, folder: Path) -> None:
        """Take back what `_save_log_state` wrote.

        With another number of processes each gets the mean loss, and the first one all other sums.
        """
        states = [json.loads(p.read_text()) for p in sorted(folder.glob(_LOG_STATE.format("*")), key=_number)]
        if not states:
            return
        rank, device = self.args.process_index, self.args.device
        self._globalstep_last_logged = states[0]["last_logged"]
        if len(states) == self.args.world_size:
            self._tr_loss += states[rank]["loss"]
            sums = {name: torch.tensor(row) for name, row in states[rank]["sums"].items()}
        else:
            self._tr_loss += sum(state["loss"] for state in states) / len(states)
            sums = {}
            for name, row in (item for state in states for item in state["sums"].items() if rank == 0):
                sums[name] = sums.get(name, 0.0) + torch.tensor(row)
        self._sums = {name: row.to(device) for name, row in sums.items()}


class _RestoreLog(TrainerCallback):
    """`Trainer` sets its sums to zero just before training begins: this puts the saved ones back."""

    def __init__(self, trainer: SafeTrainer, checkpoint: Path) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.load_log_state(self.checkpoint)


def resume_point(trainer: SafeTrainer, say: Callable[[str], None] = print) -> str | None:
    """`resume_from` of a run, decided by its first process for all of them."""
    found, failure = "", None
    if trainer.accelerator.is_main_process:
        try:
            checkpoint = resume_from(trainer.config, trainer.args.world_size, say)
            if checkpoint:
                check_layout(checkpoint, trainer)
                check_same_files(checkpoint, trainer)
                found = str(checkpoint)
        except (ValueError, OSError) as error:
            failure = error
    shared: list[Any] = [found, failure is not None]
    broadcast_object_list(shared)
    if failure:
        raise failure
    if shared[1]:
        raise SystemExit(2)  # the first process has said why
    return shared[0] or None


def layout(trainer: Any) -> str:
    """How a trainer lays its checkpoints out: "fsdp", "deepspeed", or "plain" (one process and DDP)."""
    if trainer.is_fsdp_enabled:
        return "fsdp"
    return "deepspeed" if trainer.is_deepspeed_enabled else "plain"


def resume_from(config: TrainConfig, world_size: int, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint that `config.resume` asks for, checked; None to start from the beginning.

    To be called by the first process, which tells the others.

    Raises:
        ValueError: there are checkpoints but `resume` is "no"; the named one is broken; it was made with
            other data, another batch, or so many processes that the same steps cannot be formed.
        OSError: there are checkpoints, none of them whole.
    """
    run = Path(config.output_dir)
    if config.resume == "no":
        if found := ck.checkpoints(run):
            raise ValueError(
                f"output_dir {run} holds {found[-1].name} of an earlier run: go on with --resume auto,"
                " or choose another output_dir"
            )
        return None
    if config.resume == "auto":
        checkpoint = ck.last_good(run, say=say)
        if checkpoint is None:
            return None
    else:
        checkpoint = Path(config.resume)
        if wrong := ck.problems(checkpoint):
            raise ValueError(f"resume {checkpoint}: {wrong[0]}")
    check_same_run(checkpoint, ck.read_manifest(checkpoint), config, world_size, say)
    say(f"going on from {checkpoint}")
    return checkpoint


def check_same_run(
    checkpoint: Path,
    manifest: Mapping[str, Any],
    config: TrainConfig,
    world_size: int,
    say: Callable[[str], None] = print,
) -> None:
    """ValueError if the coming steps would hold other samples than the run's; says what else differs."""
    was, now = manifest["config"], asdict(config)
    for key in SAME_DATA:
        if was.get(key) != now[key]:
            raise ValueError(
                f"resume {checkpoint}: {key} was {was.get(key)}, now it is {now[key]}; the data would come in"
                " another order. Set it back, or start a new run in another output_dir"
            )
    micro = was["gradient_accumulation_steps"] * manifest["world_size"]
    if micro != config.gradient_accumulation_steps * world_size:
        fits = f"--gradient-accumulation-steps {micro // world_size}" if micro % world_size == 0 else ""
        raise ValueError(
            f"resume {checkpoint}: a step had {micro} micro-batches ({manifest['world_size']} processes with"
            f" {was['gradient_accumulation_steps']}), now {config.gradient_accumulation_steps * world_size}"
            f" ({world_size} processes with {config.gradient_accumulation_steps}). "
            + (f"Use {fits}" if fits else f"Use a number of processes that divides {micro}")
        )
    for key in sorted(now.keys() - set(SAME_DATA) - set(FREE)):
        if key in was and was[key] != now[key]:
            say(f"resume {checkpoint.name}: {key} was {was[key]}, now it is {now[key]}")


def data_fingerprints(trainer: Any) -> dict[str, Any]:
    """By task, what tells the run's data files from others; empty for lab scenes, which are no files."""
    dataset: Any = trainer.train_dataset
    return dict(dataset.fingerprint()["sources"]) if hasattr(dataset, "fingerprint") else {}


def check_same_files(checkpoint: Path, trainer: Any) -> None:
    """ValueError if the data files are not those that the checkpoint's run was trained on."""
    was, now = ck.read_manifest(checkpoint).get("data", {}), data_fingerprints(trainer)
    for task in was:
        if was[task] != now.get(task):
            raise ValueError(
                f"resume {checkpoint}: {task}_data holds other samples than when it was written, which would"
                " change their order. Bring them back, or start a new run in another output_dir"
            )


def check_launched(trainer: Any) -> None:
    """ValueError if accelerate has quietly made something else of what the launcher asked for."""
    kind = trainer.accelerator.distributed_type.value
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if trainer.args.world_size != world:
        raise ValueError(
            f"{world} processes came up, but accelerate ({kind}) counts {trainer.args.world_size}: each would"
            " train alone, into the same output_dir. Set use_cpu, or start one process"
        )
    asked = {"FSDP": trainer.is_fsdp_enabled, "DEEPSPEED": trainer.is_deepspeed_enabled}
    for name, enabled in asked.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true") and not enabled:
            raise ValueError(
                f"{name} was asked for, but accelerate runs {kind}: it shards on GPUs and the like only. On"
                " CPUs use DDP: torchrun, or a configuration without it"
            )


def check_layout(checkpoint: Path, trainer: Any) -> None:
    """ValueError if a checkpoint's files are not of the kind that this trainer reads."""
    manifest = ck.read_manifest(checkpoint)
    was, now = manifest["layout"], layout(trainer)
    if was != now:
        raise ValueError(
            f"resume {checkpoint}: it was written by a {was} run and this is a {now} run; go on with the"
            " former launcher configuration, or export the model and start a new run from it"
        )
    if was == "deepspeed" and manifest["world_size"] != trainer.args.world_size:
        raise ValueError(
            f"resume {checkpoint}: DeepSpeed goes on with as many processes as wrote it,"
            f" {manifest['world_size']}, not {trainer.args.world_size}; FSDP2 can change their number"
        )


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _disk_full(run: Path, step: int, error: BaseException) -> str:
    found = [path for path in ck.checkpoints(run) if not ck.problems(path, hashes=False)]
    kept = f"{found[-1].name} is whole: free some space, then --resume auto" if found else "there is none yet"
    text = (isinstance(error, OSError) and error.strerror) or str(error).strip() or type(error).__name__
    why = f"{text.splitlines()[0]}; {shutil.disk_usage(run).free / 1e9:.3g} GB free"
    return f"disk full: {run} cannot hold the checkpoint of step {step} ({why}); {kept}"
