"""What all commands share: errors of one line, exit codes, arguments that are checked when they are read."""

from __future__ import annotations

import argparse
import difflib
import errno
import math
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

# Errors that our own code raises to tell the user something: their text is the message.
_EXPECTED = (ValueError, OSError, ImportError, MemoryError)
_WHAT_TO_DO = {
    errno.EISDIR: "is a folder; give a file",
    errno.ENOTDIR: "is below a file; give another place",
    errno.EEXIST: "is a file; give a folder",
    errno.ENOENT: "no such file or folder",
    errno.EACCES: "no permission to read or write here",
    errno.EROFS: "the file system is read-only; write elsewhere",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The same as safetensors (in Rust) and torch.save (in C++) say it.
_SIGNS_OF_FULL = (
    *(f"os error {number}" for number in _FULL),
    "PytorchStreamWriter failed",
    "unexpected pos",
)


def nearest(word: str, choices: Iterable[str]) -> str:
    """'; did you mean ...?' with the most similar choice, or nothing if none is similar."""
    found = difflib.get_close_matches(word, list(choices), 1, 0.6)
    return f"; did you mean {found[0]}?" if found else ""


class Parser(argparse.ArgumentParser):
    """argparse, but with the error alone on one line and the nearest word: `--help` has the usage."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += nearest(found[1], found[2].replace("'", "").split(", "))
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {line} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but what is unknown to a command is that command's error."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument {rest[0]}{nearest(rest[0].split('=')[0], options)}")
        return found, rest


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    text: str,
    abbreviations: bool = True,
) -> argparse.ArgumentParser:
    """A sub-command: its line in the list of commands, and its `--help` text with its lines as they are.

    abbreviations: take `--lim` for `--limit`. Not for a run of days, which must not hang on a guess.
    """
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=abbreviations,
    )
    command.set_defaults(run=run)
    return command


def guarded(name: str, run: Callable[[], int | None], debug: bool = False) -> int:
    """Run a command: its exit code, 2 with one message on stderr for an error, 130 when it was interrupted.

    debug: raise the error instead, with its traceback.
    """
    try:
        return run() or 0
    except KeyboardInterrupt:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second ^C ends what is left without a word
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        _end_bars()
        print(f"{name}: error: {_message(error)}", file=sys.stderr)
        return 2


def start(name: str, main: Callable[[], int | None]) -> NoReturn:
    """Run the `main` of a script as `guarded` does, and end the process; --debug shows tracebacks."""
    debug = "--debug" in sys.argv
    sys.argv[:] = [argument for argument in sys.argv if argument != "--debug"]
    sys.exit(guarded(name, main, debug))


def _end_bars() -> None:
    """Close progress bars that an error has left open: what follows starts on a line of its own."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


def _message(error: Exception) -> str:
    if getattr(error, "errno", None) in _FULL or any(sign in str(error) for sign in _SIGNS_OF_FULL):
        where = getattr(error, "filename", None)
        return f"{where or 'the output'}: no space left to write to; free some, or write elsewhere"
    if isinstance(error, OSError) and error.errno and error.filename is not None:
        return f"{error.filename}: {_WHAT_TO_DO.get(error.errno, error.strerror)}"
    message = str(error).strip()
    if isinstance(error, _EXPECTED) and message:
        return message
    line = message.splitlines()[0] if message else ""
    return f"{type(error).__name__}: {line} (a bug? --debug shows where it came from)"


# --- types of arguments: argparse puts the option's name before the message ---------------------------------


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, 1)


def not_negative(text: str) -> int:
    """A whole number from 0 on: a seed, a count."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:  # longer ones fit no tensor's size
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} on")
    return int(text)


def number(text: str, least: float = 0.0, above: bool = False) -> float:
    """A finite number from `least` on, or only above it."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < least or (above and value == least):
        raise argparse.ArgumentTypeError(f"{text} is not a number {'above' if above else 'from'} {least:g}")
    return value


def a_device(text: str) -> str:
    """A device that torch knows and this machine has."""
    import torch

    try:
        asked = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text} is no device; choose cpu, cuda, cuda:1, mps") from None
    there = torch.cuda.device_count() if asked.type == "cuda" else None
    if there is not None and (asked.index or 0) >= there:
        has = f"{there} GPUs, counted from 0" if there else "no GPU that torch can use"
        raise argparse.ArgumentTypeError(f"{text}: this machine has {has}; choose another, or cpu")
    return text
