"""Processes forked by the scripts of tests: as `torchrun` starts them, but imports are paid for once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

TIME_LIMIT = 120  # seconds a process or a world: nothing here can hang the tests
GRACE = 5  # seconds that the others have to end when one process has failed


def fork(job: Callable[[], int | None], output: Path) -> int:
    """Run `job` in a child that ends as the command would: its process id. What it says goes to `output`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if child := os.fork():
        return child
    code = 1
    try:
        said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = job() or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def world(n: int, folder: Path, job: Callable[[int], int | None]) -> list[int]:
    """Run `job(rank)` in n processes; their exit codes (minus the signal for those that were killed)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": n}

    def process(rank: int) -> int | None:
        mine = here | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n}
        os.environ.update({key: str(value) for key, value in mine.items()})
        return job(rank)

    return wait([fork(lambda rank=rank: process(rank), folder / f"output-{rank}.txt") for rank in range(n)])


def wait(children: list[int]) -> list[int]:
    """The exit codes of all. As under torchrun, when one fails the others are ended."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + TIME_LIMIT
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG)) != (0, 0):
                codes[child] = os.waitstatus_to_exitcode(ended[1])
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)
    return [codes[child] for child in children]
