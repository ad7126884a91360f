"""The table of reference curves: runs that it has are not measured again, and their rows stay as they are."""

import numpy as np
import pandas as pd
import pytest

from minimal_aia.lab import images, models, references

CODEBOOK = np.random.default_rng(0).random((images.N_CODES, 48)).astype(np.float32)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two untrained runs, and a table of its own with few samples a curve."""
    for seed in (0, 1):
        folder = tmp_path / "runs" / f"understanding-seed{seed}"
        models.save(models.build("understanding", seed), CODEBOOK, folder)
        (folder / "training.json").write_text("{}")
    measure = references.measure
    monkeypatch.setattr(references, "FILE", tmp_path / "curves.csv")
    monkeypatch.setattr(references, "measure", lambda *a: measure(*a, count=4))
    return tmp_path / "runs"


def test_a_second_call_measures_only_new_runs_and_leaves_the_others_rows_alone(runs, capsys):
    later = runs / "understanding-seed0"
    later.rename(runs.parent / "later")
    references.main(["--runs", str(runs)])
    first = references.FILE.read_text().splitlines()
    assert "6 new curves" in capsys.readouterr().out  # three definitions, two formats
    (runs.parent / "later").rename(later)
    (runs / "understanding-seed1" / "model.safetensors").unlink()  # it would fail if it were measured again
    references.main(["--runs", str(runs)])
    assert "6 new curves" in capsys.readouterr().out
    both = references.FILE.read_text().splitlines()
    table = pd.read_csv(references.FILE)
    assert table["seed"].is_monotonic_increasing
    assert [line for line in both if line.startswith("understanding,1,")] == first[1:]
    assert len(both) == 1 + 2 * 6 * models.SCALES["laptop"][1]
    references.main(["--runs", str(runs)])
    assert "0 new curves" in capsys.readouterr().out
    assert references.FILE.read_text().splitlines() == both


def test_again_measures_all_runs(runs, capsys):
    references.main(["--runs", str(runs)])
    table = references.FILE.read_text()
    references.FILE.write_text(table.replace(",0.", ",9."))
    references.main(["--runs", str(runs), "--again"])
    assert references.FILE.read_text() == table


def test_targets_of_another_architecture_are_that_model_s_curves():
    for name in ("janus", "mot"):
        targets = references.lab_targets(f"lab-{name}")
        for task in ("generation", "understanding"):
            values, _ = targets.tensors(task)
            curve = references.reference_curve(task, name)
            assert float(values.mean()) == pytest.approx(curve.mean(), abs=0.02)
    with pytest.raises(ValueError, match="unknown lab targets 'lab-emu3'"):
        references.lab_targets("lab-emu3")
