"""What was tried on the command line: wrong_arguments.txt has one line a case,

    command | kind | arguments | what the message says

The arguments are relative to the folder that wrong_files.py fills; OUT is a fresh folder beside it.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

KINDS = {
    "usage": "option or argument missing, unknown, contradictory",
    "path": "a path where nothing is",
    "folder/file": "a folder for a file, a file for a folder",
    "empty": "an empty file or folder",
    "name": "a task, model, target, preset, device that does not exist",
    "number": "0, negative, huge, NaN, not a number",
    "key": "YAML: unknown, ill-typed, repeated keys, not YAML",
    "stages": "a stage specification that does not hold",
    "row": "one bad row or picture in the data",
    "damaged": "binary garbage, truncated weights",
    "output": "an output that cannot be written",
    "no space": "the disk is full",
    "no permission": "a folder that may not be written",
    "interrupted": "^C, once and twice",
    "no GPU": "cuda asked for where there is none",
    "works": "Windows newlines, a BOM, non-ASCII paths with spaces: must work",
}

PROFILE = "profile --model lab/unified --task understanding --samples"
LAB = "--model 'models/ünï mödel'"
WRITES = {  # the command (twice where it writes in two ways) -> what writes OUT and nothing else
    "profile": f"{PROFILE} both.jsonl --out OUT.csv",
    "profile, parquet": f"{PROFILE} both.jsonl --out OUT.parquet",
    "profile, plot": f"{PROFILE} both.jsonl --plot OUT.png",
    "train": f"train good.yaml {LAB} --max-steps 1 --curve-steps 0 --output-dir OUT",
    "convert": "convert models/janus OUT --to-original",
    "convert, pth": "convert models/janus OUT.pth --to-original",
    "export": "export 'models/ünï mödel' OUT",
    "evaluate generation": f"evaluate generation {LAB} --prompts metadata.jsonl --images 1 --out OUT",
    "import-scores": "import-scores many.jsonl --model m --out OUT.csv",
    "check-data": f"check-data many.yaml {LAB} --quick --out OUT.csv",
}
# what is started, how often ^C is pressed
INTERRUPTED = [("profile", 1), ("profile", 2), ("train", 1), ("train", 2)]


class Case(NamedTuple):
    command: str
    kind: str
    argv: list[str]
    said: str

    def __str__(self) -> str:
        return re.sub(r"[^\w./=:-]+", "-", f"{self.command}-{self.kind}-{' '.join(self.argv)}")[:110]


# python -m minimal_aia.NAME
SCRIPTS = ("course", "lab.train", "lab.results_figure", "evaluation.interleaved")

SHORT = {
    "PROFILE": "--model lab/unified --task generation --samples",
    "DRAW": "--model lab/unified --prompts metadata.jsonl --out OUT/pictures",
    "ASK": "--model lab/unified --tasks pope",
}


def cases() -> list[Case]:
    found = []
    text = Path(__file__).with_name("wrong_arguments.txt").read_text(encoding="utf-8")
    for line in filter(None, text.splitlines()):
        command, kind, argv, said = (part.strip() for part in line.format(**SHORT).split("|"))
        assert kind in KINDS, line
        found.append(Case(command, kind, shlex.split(argv), said))
    return found


def writing(name: str, out: str) -> list[str]:
    """The arguments of one of WRITES, for an output `out` (and its suffix)."""
    return [part.replace("OUT", out) for part in shlex.split(WRITES[name])]


def count() -> str:
    """The Markdown table of tests/README.md: cases by command (rows) and kind of wrongness."""
    commands = list(dict.fromkeys(case.command for case in cases()))
    lines = ["| command | " + " | ".join(KINDS) + " | all |", "|---" * (len(KINDS) + 2) + "|"]
    tried = [(case.command, case.kind) for case in cases()]
    tried += [(name.split(",")[0], kind) for name in WRITES for kind in ("no space", "no permission")]
    tried += [(command, "interrupted") for command, _ in INTERRUPTED]
    for command in [*commands, "all"]:
        mine = [kind for other, kind in tried if command in (other, "all")]
        numbers = [str(mine.count(kind) or "") for kind in KINDS]
        lines.append(f"| {command} | {' | '.join(numbers)} | {len(mine)} |")
    return "\n".join(lines) + "\n"
