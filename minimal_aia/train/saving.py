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
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from minimal_aia.train import checkpoints as ck
from minimal_aia.train.callbacks import StopAtStepBoundary
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.module import SFTModule

# Another value of these is another run: steps would hold other samples.
SAME_DATA = """seed task_ratio per_device_train_batch_size prompt_dropout max_length
    length_window""".split()
# These may change without a word.
FREE = """output_dir resume num_processes gradient_accumulation_steps save_steps save_total_limit
    logging_steps curve_steps report_to dataloader_num_workers use_cpu""".split()
OTHER_ORDER = "the data would come in another order. Set it back, or choose another output_dir"
_LOG_STATE = "log_state_{}.json"  # one a process: what was logged in part


class SafeTrainer(Trainer):
    """A `Trainer` whose checkpoints are sealed, and whole or absent, and which stops at a step boundary.

    Needs `config` before its own `__init__`; `_sums` is what the subclass gathers for its next log entry.
    """

    config: TrainConfig
    _sums: dict[str, Tensor]
    _staging = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_launched()
        self.stop = StopAtStepBoundary(self.accelerator)
        self.add_callback(self.stop)

    def _check_launched(self) -> None:
        """ValueError if accelerate has quietly made something else of what the launcher asked for."""
        kind = self.accelerator.distributed_type.value
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.args.world_size != world:
            raise ValueError(
                f"{world} processes came up, but accelerate ({kind}) counts {self.args.world_size}: each"
                " would train alone, into the same output_dir. Set use_cpu, or start one process"
            )
        asked = {"FSDP": self.is_fsdp_enabled, "DEEPSPEED": self.is_deepspeed_enabled}
        for name, enabled in asked.items():
            if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true") and not enabled:
                raise ValueError(f"{name} was asked for, but accelerate runs {kind}: it shards on GPUs only")

    @property
    def module(self) -> SFTModule:
        return self.accelerator.unwrap_model(self.model)

    @property
    def sharding(self) -> str:
        """How checkpoints are laid out: "fsdp", "deepspeed", or "plain" (one process and DDP)."""
        return "fsdp" if self.is_fsdp_enabled else "deepspeed" if self.is_deepspeed_enabled else "plain"

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train; `self.stop.exit_code` says afterwards whether a signal ended it before the last step."""
        if resume_from_checkpoint:
            self.add_callback(_RestoreLog(self, Path(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint, **kwargs)

    def export(self, folder: str | Path) -> None:
        """Write the trained model as one folder that `from_pretrained` reads, gathered if it is sharded."""
        plain = self.sharding == "plain"
        state = None if plain else self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            self.module.export(folder, state)
        self.accelerator.wait_for_everyone()

    # ---- checkpoints -----------------------------------------------------------------------------------

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
                facts = {"step": step, "world_size": self.args.world_size, "layout": self.sharding}
                data: Any = getattr(self.train_dataset, "fingerprints", dict)()
                ck.seal(staged, config=asdict(self.config), data=data, **facts)
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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A folder that `load_adapter` reads, not a bare state dictionary and pickled arguments."""
        if self.args.should_save:
            self.module.save(output_dir or self.args.output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.module.load(resume_from_checkpoint)

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
        files = sorted(folder.glob(_LOG_STATE.format("*")), key=lambda p: int(p.stem.rpartition("_")[2]))
        states = [json.loads(file.read_text()) for file in files]
        rank, device = self.args.process_index, self.args.device
        self._globalstep_last_logged = states[0]["last_logged"]
        if len(states) == self.args.world_size:
            states, shares = [states[rank]], 1
        else:
            shares = len(states)
        self._tr_loss += sum(state["loss"] for state in states) / shares
        self._sums = {}
        if shares == 1 or rank == 0:
            for name, row in (item for state in states for item in state["sums"].items()):
                self._sums[name] = self._sums.get(name, 0.0) + torch.tensor(row, device=device)


class _RestoreLog(TrainerCallback):
    """`Trainer` sets its sums to zero just before training begins: this puts the saved ones back."""

    def __init__(self, trainer: SafeTrainer, checkpoint: Path) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.load_log_state(self.checkpoint)


# --- which checkpoint to go on from -------------------------------------------------------------------------


def resume_point(trainer: SafeTrainer, say: Callable[[str], None] = print) -> str | None:
    """The checkpoint that `config.resume` asks for, checked by the first process for all; or None.

    Raises:
        ValueError: there are checkpoints but `resume` is "no"; the named one is broken; it was made with
            other data, another batch, another kind of launcher, or so many processes that the same steps
            cannot be formed.
        OSError: there are checkpoints, none of them whole.
    """
    found, failure = None, None
    if trainer.accelerator.is_main_process:
        try:
            if found := _asked_for(trainer.config, say):
                manifest = ck.read_manifest(found)
                check_same_run(found, manifest, trainer.config, trainer.args.world_size, say)
                check_same_layout(found, manifest, trainer)
                check_same_files(found, manifest, trainer.train_dataset)
                say(f"going on from {found}")
        except (ValueError, OSError) as error:
            failure = error
    shared: list[Any] = [found and str(found), failure is not None]
    broadcast_object_list(shared)
    if failure:
        raise failure
    if shared[1]:
        raise SystemExit(2)  # the first process has said why
    return shared[0]


def _asked_for(config: TrainConfig, say: Callable[[str], None]) -> Path | None:
    run = Path(config.output_dir)
    if config.resume == "auto":
        return ck.last_good(run, say)
    if config.resume == "no":
        if found := ck.checkpoints(run):
            holds = f"output_dir {run} holds {found[-1].name} of an earlier run"
            raise ValueError(f"{holds}: go on with --resume auto, or choose another output_dir")
        return None
    if not Path(config.resume).is_dir():
        raise ValueError(f"resume {config.resume}: no such checkpoint folder (or say auto)")
    if wrong := ck.problems(config.resume):
        raise ValueError(f"resume {config.resume}: {wrong[0]}")
    return Path(config.resume)


def check_same_run(
    checkpoint: Path,
    manifest: Mapping[str, Any],
    config: TrainConfig,
    world_size: int,
    say: Callable[[str], None],
) -> None:
    """ValueError if the coming steps would hold other samples than the run's; says what else differs."""
    was, now = manifest["config"], asdict(config)
    for key in SAME_DATA:
        if was.get(key) != now[key]:
            differs = f"{key} was {was.get(key)}, now it is {now[key]}"
            raise ValueError(f"resume {checkpoint}: {differs}; {OTHER_ORDER}")
    before, micro = manifest["world_size"], config.gradient_accumulation_steps
    a_step = was["gradient_accumulation_steps"] * before
    if a_step != micro * world_size:
        per_process, rest = divmod(a_step, world_size)
        fits = f"a number of processes that divides {a_step}"
        raise ValueError(
            f"resume {checkpoint}: a step had {a_step} micro-batches ({before} processes with"
            f" {was['gradient_accumulation_steps']}), now {micro * world_size} ({world_size} processes with"
            f" {micro}). Use {fits if rest else f'--gradient-accumulation-steps {per_process}'}"
        )
    for key in sorted(now.keys() - set(SAME_DATA) - set(FREE)):
        if key in was and was[key] != now[key]:
            say(f"resume {checkpoint.name}: {key} was {was[key]}, now it is {now[key]}")


def check_same_layout(checkpoint: Path, manifest: Mapping[str, Any], trainer: SafeTrainer) -> None:
    """ValueError if a checkpoint's files are not of the kind that this trainer reads."""
    was, now = manifest["layout"], trainer.sharding
    if was != now:
        raise ValueError(
            f"resume {checkpoint}: it was written by a {was} run and this is a {now} run; launch it as before"
            " or export the model and start a new run from it"
        )
    if was == "deepspeed" and manifest["world_size"] != trainer.args.world_size:
        raise ValueError(
            f"resume {checkpoint}: DeepSpeed goes on with as many processes as wrote it,"
            f" {manifest['world_size']}, not {trainer.args.world_size}; FSDP2 can change their number"
        )


def check_same_files(checkpoint: Path, manifest: Mapping[str, Any], dataset: Any) -> None:
    """ValueError if the data files are not those of the checkpoint's run. (Lab scenes are no files.)"""
    now: Any = getattr(dataset, "fingerprints", dict)()
    for task, was in manifest.get("data", {}).items():
        if was != now.get(task):
            differs = f"{task}_data holds other samples than when it was written"
            raise ValueError(f"resume {checkpoint}: {differs}; {OTHER_ORDER}")


def _disk_full(run: Path, step: int, error: BaseException) -> str:
    found = [path for path in ck.checkpoints(run) if not ck.problems(path, hashes=False)]
    kept = f"{found[-1].name} is whole: free some space, then --resume auto" if found else "there is none yet"
    text = (isinstance(error, OSError) and error.strerror) or str(error).strip() or type(error).__name__
    why = f"{text.splitlines()[0]}; {shutil.disk_usage(run).free / 1e9:.3g} GB free"
    return f"disk full: {run} cannot hold the checkpoint of step {step} ({why}); {kept}"
