"""Checks for the notebooks' exercises, one module a chapter: `from minimal_aia.exercises import ch01`.

A check runs the reader's function on a few small cases, compares it with the solution and prints one verdict:
all passed, not done yet, or what is wrong with the first case that fails and how to look at it. It never
raises, so that a notebook with open exercises still runs from top to bottom.
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def call(function: Callable, inputs: dict[str, Any]) -> Any:
    """How most cases run: the function on its inputs."""
    return function(**inputs)


@dataclass(frozen=True)
class Case:
    """One case of an exercise.

    name: what it is about, in a few words.
    inputs: keyword arguments of the reader's function.
    expected: what the solution gives: a tensor, a number, or a tuple of these.
    hint: what to think of if this case fails and no known mistake fits.
    mistakes: (wrong result, what leads to it) pairs, compared in this order.
    run: `(function, inputs) -> result`, for a case that looks at more than the returned value.
    """

    name: str
    inputs: dict[str, Any]
    expected: Any
    hint: str
    mistakes: Sequence[tuple[Any, str]] = ()
    run: Callable[[Callable, dict[str, Any]], Any] = call


def checker(module: str, name: str, cases: dict[str, list[Case]]) -> Callable[[Callable], None]:
    """The check function of one exercise: it takes the reader's function and prints the verdict."""

    def check(function: Callable) -> None:
        judge(function, cases[name], f'{module}.CASES["{name}"]')

    check.__name__ = f"check_{name}"
    check.__doc__ = f"Print how your `{name}` compares with the solution."
    return check


def judge(function: Callable, cases: Sequence[Case], where: str, tolerance: float = 1e-5) -> None:
    """Run the cases until one fails and print the verdict.

    where: an expression that gives `cases` in a notebook, for the line that says how to look at a failure.
    """
    name = getattr(function, "__name__", "the function")
    for number, case in enumerate(cases):
        inputs = copy.deepcopy(case.inputs)
        try:
            result = case.run(function, inputs)
        except NotImplementedError:
            result = None
        except Exception as error:
            _fail(name, number, cases, where, _renamed(function, inputs, error) or _raised(function, error))
            return
        if result is None or result is ...:
            if number == 0:
                print(f"{name}: not done yet. Write the function, and return its result, to see the checks.")
                return
            _fail(name, number, cases, where, "it returns nothing here: is a `return` missing?")
            return
        if wrong := difference(result, case.expected, tolerance):
            for mistake, reason in case.mistakes:
                if not difference(result, mistake, tolerance):
                    wrong += f"\n  why      {reason}"
                    break
            else:
                wrong += f"\n  hint     {case.hint}"
            _fail(name, number, cases, where, wrong)
            return
        if any(difference(inputs[key], case.inputs[key], 0.0) for key in inputs):
            _fail(name, number, cases, where, "it changes its input in place: work on a copy")
            return
    print(f"{name}: all checks passed ({len(cases)} of {len(cases)}).")


def difference(result: Any, expected: Any, tolerance: float) -> str:
    """What distinguishes `result` from `expected`, in words; "" if nothing that matters."""
    if isinstance(expected, tuple | list):
        if not isinstance(result, tuple | list) or len(result) != len(expected):
            return f"expected {len(expected)} values, got {_short(result)}"
        parts = (difference(r, e, tolerance) for r, e in zip(result, expected))
        return next((f"value {i + 1}: {part}" for i, part in enumerate(parts) if part), "")
    if not isinstance(expected, Tensor | np.ndarray | int | float):
        # a table compares cell by cell, so `==` gives no yes or no
        same = expected.equals(result) if hasattr(expected, "equals") else result == expected
        return "" if same else f"expected {_short(expected)}, got {_short(result)}"
    expected = torch.as_tensor(expected)
    try:
        result = torch.as_tensor(result)
    except (TypeError, ValueError, RuntimeError):
        return f"expected {_short(expected)}, got {_short(result)}"
    result = result.detach()
    if result.shape != expected.shape:
        return f"expected shape {list(expected.shape)}, got {list(result.shape)}"
    if (result.dtype == torch.bool) != (expected.dtype == torch.bool):
        return f"expected {expected.dtype}, got {result.dtype}"
    if torch.allclose(result.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True):
        return ""
    expected_, got = _short(expected), _short(result)
    if expected_ != got:
        return f"expected {expected_}\n  got      {got}"
    return f"the shape is right, the values are not: they differ by up to {_gap(expected, result):.3g}"


def _gap(expected: Tensor, result: Tensor) -> float:
    """The largest difference; nan if a nan stands where none should, or the other way round."""
    return float((expected.double() - result.double()).abs().max())


def _fail(name: str, number: int, cases: Sequence[Case], where: str, wrong: str) -> None:
    case = cases[number]
    print(
        f"{name}: not right yet. {number} of {len(cases)} checks passed. The next one, {case.name}:\n"
        f"  {wrong}\n"
        f"  see it   {name}(**{where}[{number}].inputs)"
    )


def _renamed(function: Callable, inputs: dict[str, Any], error: Exception) -> str:
    """What to say if the function cannot be called with the names that the exercise gives; else ""."""
    if not (inputs and isinstance(error, TypeError) and "argument" in str(error)):
        return ""
    try:
        inspect.signature(function).bind(**inputs)
    except TypeError:
        return f"it must keep the names of its arguments: {', '.join(inputs)}"
    return ""


def _raised(function: Callable, error: Exception) -> str:
    """`KeyError: 'x', in line 3 of the cell`, where the last line in the reader's own code counts."""
    text = f"it raises {type(error).__name__}: {error}".split("\n")[0]
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{text}, in line {lines[-1]} of the cell" if lines else text


def _short(value: Any) -> str:
    """A value on a line or two."""
    if isinstance(value, Tensor) and value.numel() <= 32:
        return _digits(value.detach().tolist())
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    text = _digits(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _digits(value: Any) -> str:
    """Numbers with six digits, not with what single precision leaves behind them."""
    if isinstance(value, list):
        return f"[{', '.join(_digits(part) for part in value)}]"
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
