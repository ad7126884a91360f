"""`make dist` ends here: look into wheel and sdist, then use the wheel as somebody without a clone would.

    python tests/check_wheel.py dist

The wheel goes into an empty folder, which comes first on the path of a Python that runs elsewhere. What it
depends on is this environment's, so no second torch is downloaded; the data is the unpacked sdist's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = r"minimal_aia/[\w/]+\.py|minimal_aia/py\.typed|minimal_aia/lab/model_card\.md"
SOURCE = (
    "data_samples/generation.jsonl",
    "data_samples/README.md",
    "data_samples/checkpoints/unified/model.safetensors",
    "notebooks/00_start_here.ipynb",
    "tests/test_loss.py",
    "recipes/lab.yaml",
    "Makefile",
    "LICENSE",
)


def main(folder: Path) -> None:
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    strays = [name for name in names if not re.fullmatch(PACKAGE, name)]
    assert not strays, f"these do not belong in a wheel: {strays}"
    assert {"minimal_aia/py.typed", "minimal_aia/lab/model_card.md"} <= set(names)
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory() as place:
        with tarfile.open(sdist) as archive:
            archive.extractall(place)  # ours, made a moment ago
        source = Path(place) / sdist.name.removesuffix(".tar.gz")
        missing = [name for name in SOURCE if not (source / name).is_file()]
        assert not missing, f"the sdist lacks {missing}"
        print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB, with the data of the course")
        use(wheel, source / "data_samples", Path(place))


def use(wheel: Path, data: Path, place: Path) -> None:
    site = place / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    env = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    env.pop("MINIMAL_AIA_DATA", None)

    def aia(*arguments: str, codes: tuple[int, ...] = (0,), **more: str) -> str:
        command = [sys.executable, str(site / "bin" / "minimal-aia"), *arguments]
        done = subprocess.run(command, cwd=place, env={**env, **more}, capture_output=True, text=True)
        assert done.returncode in codes, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        print(f"minimal-aia {arguments[0]}: exit code {done.returncode}")
        return done.stdout + done.stderr

    where = "import minimal_aia; print(minimal_aia.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=place, env=env, check=True, capture_output=True, text=True
    ).stdout
    assert found.startswith(str(site)), f"not the wheel's package but {found}"
    assert "profile" in aia("--help")
    samples = str(data / "generation.jsonl")
    line = ["profile", "--model", "lab/unified", "--task", "generation", "--limit", "2", "--samples", samples]
    said = aia(*line, codes=(2,))
    assert "set MINIMAL_AIA_DATA=" in said, said
    assert len(said.strip().splitlines()) == 1, said
    aia(*line, "--out", "p.csv", MINIMAL_AIA_DATA=str(data))
    assert len((place / "p.csv").read_text().splitlines()) > 8  # a row for each layer and sample at least
    said = aia("doctor", codes=(0, 1), MINIMAL_AIA_DATA=str(data))  # 1: a small disk is not the wheel's fault
    for name in ("generation.jsonl", "understanding.jsonl", "published", "checkpoints"):
        assert f"[OK]   data_samples/{name}" in said, said


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
