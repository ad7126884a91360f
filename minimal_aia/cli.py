"""The command line: `minimal-aia COMMAND`, one function a command.

Every error is one message on stderr and exit code 2; `--debug` shows the traceback instead. Commands import
what they need when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minimal_aia.bench_command import add_bench
from minimal_aia.console import Parser, guarded
from minimal_aia.convert_command import add_convert
from minimal_aia.evaluation.command import add_evaluate, add_report
from minimal_aia.evaluation.imported import add_import_scores
from minimal_aia.lab.sweep_command import add_sweep
from minimal_aia.profile_command import add_profile
from minimal_aia.train.commands import add_check_data, add_export, add_prepare, add_train
from minimal_aia.train.plan_command import add_plan

if TYPE_CHECKING:
    from collections.abc import Callable


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 a check failed, 2 an error."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    return guarded(f"minimal-aia {args.command}", lambda: run(args), args.debug)


def _parser() -> argparse.ArgumentParser:
    from minimal_aia import __version__

    parser = Parser(prog="minimal-aia", description="Measure and align cross-modal attention (AIA).")
    parser.add_argument("--version", action="version", version=f"minimal-aia {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for add in (
        _add_doctor,
        add_profile,
        add_plan,
        add_train,
        add_convert,
        add_export,
        add_sweep,
        add_evaluate,
        add_report,
        add_import_scores,
        add_check_data,
        add_prepare,
        add_bench,
    ):
        command = add(commands)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


# --- doctor -------------------------------------------------------------------------------------------------


def _add_doctor(commands: argparse._SubParsersAction[Parser]) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "doctor",
        help="say what this machine has and lacks",
        description="Check Python, packages, torch, data, disk, memory and Jupyter; say how to repair.",
    )
    command.set_defaults(run=_doctor)
    return command


def _doctor(args: argparse.Namespace) -> int:
    from minimal_aia.doctor import checks, report

    results = checks()
    print(report(results))
    return 1 if any(check.state == "FAIL" for check in results) else 0


if __name__ == "__main__":
    sys.exit(main())
