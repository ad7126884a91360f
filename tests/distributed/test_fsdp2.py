"""FSDP2 equals one process: PyTorch's own on a CPU mesh, and through accelerate and the Trainer.

On a CPU accelerate makes DDP of FSDP (the command refuses that, see test_ddp.py). The worlds here tell
accelerate that they are a GPU's; what is then sharded, saved and gathered is the real thing.
"""

from __future__ import annotations

import os

import pytest
from safetensors.torch import load_file
from worlds import assert_logs_equal, assert_tensors_equal, codes, logs

from minimal_aia.models import load_adapter
from minimal_aia.train import checkpoints as ck

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.xdist_group("worlds"),  # they share what `made` has made
    pytest.mark.skipif(not hasattr(os, "fork"), reason="worlds are forked: not on Windows"),
]


WORLDS = ("alone", "FSDP gradients", "FSDP resumes", "plain")


# --- PyTorch's fully_shard, with recomputed activations -----------------------------------------------------


def test_fully_sharded_gradients_and_steps_are_those_of_one_process(made):
    assert codes(made / "plain")["two"] == [0, 0]
    for file in ("gradients.safetensors", "weights.safetensors"):
        assert_tensors_equal(made / "plain" / "two" / file, made / "plain" / "one" / file)


def test_the_aia_loss_alone_trains_a_sharded_model(made):
    """FSDP2 hooks the outputs of layers, which the intensities bypass: the loss must keep hold of them."""
    two, one = (made / "plain" / name / "AIA alone.safetensors" for name in ("two", "one"))
    assert_tensors_equal(two, one)


def test_four_processes_go_on_from_what_two_saved(made):
    assert codes(made / "plain")["two, then four"] == [0] * 4
    four, one = (made / "plain" / name / "weights.safetensors" for name in ("two, then four", "one"))
    assert_tensors_equal(four, one)


# --- through accelerate and the Trainer ---------------------------------------------------------------------


@pytest.mark.parametrize(("case", "n"), [("both", 2), ("lacking", 4), ("lora", 2)])
def test_gradients_and_logs_are_those_of_one_process(made, case, n):
    """Also when some processes lack a task: a stand-in keeps their passes alike, and counts nothing."""
    mine, alone = made / "FSDP gradients" / case, made / "alone" / case
    assert codes(made / "FSDP gradients")[case] == [0] * n
    for rank in range(n):
        assert_tensors_equal(mine / f"gradients-{rank}.safetensors", alone / "gradients-0.safetensors")
    assert logs(mine)[1] == pytest.approx(logs(alone)[1], rel=1e-5)


def test_all_processes_write_their_shards_and_the_manifest_covers_them(made):
    folder = made / "FSDP resumes"
    assert codes(folder)["stopped"] == [143, 143]
    checkpoint = folder / "stopped" / "run" / "checkpoint-2"
    assert ck.problems(checkpoint) == []
    manifest = ck.read_manifest(checkpoint)
    assert (manifest["world_size"], manifest["layout"]) == (2, "fsdp")
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        assert {f"{part}/__0_0.distcp", f"{part}/__1_0.distcp", f"{part}/.metadata"} <= manifest[
            "files"
        ].keys()
    shard = checkpoint / "optimizer_0" / "__1_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert ck.problems(checkpoint) == [
        f"optimizer_0/__1_0.distcp has {len(whole) - 1} bytes instead of {len(whole)}"
    ]
    shard.write_bytes(whole)


def test_on_as_many_processes_the_run_goes_on_to_the_last_bit(made):
    folder = made / "FSDP resumes"
    assert codes(folder)["on 2"] == [0, 0]
    assert logs(folder / "on 2").keys() == set(range(1, 5))
    assert_logs_equal(folder / "on 2", folder / "whole", relative=0)
    assert_tensors_equal(
        *(folder / run / "run" / "model.safetensors" for run in ("on 2", "whole")), relative=0
    )


@pytest.mark.parametrize("n", [1, 4])
def test_on_another_number_of_processes_the_losses_are_the_same(made, n):
    folder = made / "FSDP resumes"
    assert codes(folder)[f"on {n}"] == [0] * n
    assert logs(folder / f"on {n}").keys() == set(range(1, 5))
    assert_logs_equal(folder / f"on {n}", folder / "whole")
    assert_tensors_equal(*(folder / run / "run" / "model.safetensors" for run in (f"on {n}", "whole")))


def test_the_trained_model_is_gathered_into_one_folder_that_loads(made):
    """With the weights of the run, not of the model it began with; tied ones once."""
    folder = made / "FSDP resumes" / "whole" / "run"
    trained = load_file(folder / "model.safetensors")
    loaded = load_adapter(str(folder), device="cpu").model
    begun = load_adapter("lab/unified", device="cpu").model.state_dict()
    assert "lm_head.weight" not in trained
    for name, tensor in loaded.state_dict().items():
        assert (tensor == trained.get(name, trained["model.embed_tokens.weight"])).all()
        assert (tensor != begun[name]).any()
