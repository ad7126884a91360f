"""The explorer as a reader meets it: in JupyterLab, by mouse and keyboard; then in the saved notebook."""

from __future__ import annotations

import ast
import base64
import symtable
import time
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from minimal_aia import IntensityProfile

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
TASKS = ("generation", "understanding")
CALL = "aia.explore("
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
# Two stages of four layers, (T, δ). 0.1 is a trap: a browser's slider sends it back as 0.0999….
STAGES = {"generation": [(0.4, 0.1), (0.2, 0.05)], "understanding": [(0.1, 0.05), (0.3, 0.1)]}
CODE = f"""
import minimal_aia as aia

profiles = [aia.IntensityProfile.load(f"{{task}}.csv") for task in {TASKS}]
stages = {STAGES}
targets = aia.StageTargets(
    **{{task: tuple(aia.Stage(4 * i, 4 * i + 3, *s) for i, s in enumerate(stages[task])) for task in stages}},
    name="mine",
)
aia.explore([*profiles, aia.published("fig1")], targets)
"""


# --- notebooks to open --------------------------------------------------------------------------------------


def small_notebook(folder: Path) -> dict[str, np.ndarray]:
    """small.ipynb and the two profiles it shows; task -> intensity [8 layers, 12 samples]."""
    found = {}
    for seed, task in enumerate(TASKS):
        value = np.random.default_rng(seed).uniform(0.1, 0.6, (12, 8, 2))
        axes = [range(n) for n in value.shape]
        index = pd.MultiIndex.from_product(axes, names=["sample", "layer", "head"])
        table = pd.DataFrame({"value": value.reshape(-1)}, index=index).reset_index()
        table["type"] = np.where(table["sample"] % 2, "short", "dense")
        table["sample"] = "s:" + table["sample"].astype(str)
        table = table.assign(model="lab/small", task=task, n_query=6, n_key=3, uniform=0.3)
        IntensityProfile(table).save(folder / f"{task}.csv")
        found[task] = value.mean(2).T
    write([nbformat.v4.new_markdown_cell("# Small"), nbformat.v4.new_code_cell(CODE)], folder / "small.ipynb")
    return found


def write(cells: list, path: Path) -> None:
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), path)


def needed_cells(cells: list) -> list:
    """The explorer's cell and those that define what it uses. What only other cells use, such as fine-tuning,
    is left out: `make nbval` runs whole notebooks."""
    code = [cell for cell in cells if cell.cell_type == "code"]
    last = next(i for i, cell in enumerate(code) if CALL in cell.source)
    kept, wanted = [], set()
    for cell in reversed(code[: last + 1]):
        bound, used = names(cell.source)
        if not kept or bound & wanted:
            kept.append(nbformat.v4.new_code_cell(cell.source))
            wanted = (wanted - bound) | used
    return kept[::-1]


def names(source: str) -> tuple[set[str], set[str]]:
    """(global names a cell binds, those it reads before it binds them)."""
    bound, needed = set(), set()
    for statement in ast.parse(source).body:
        top = symtable.symtable(ast.unparse(statement), "cell", "exec")
        new = {
            symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()
        }
        block = isinstance(statement, (ast.For, ast.While, ast.With, ast.If, ast.Try))  # binds, then reads
        needed |= _read(top, top) - bound - (new if block else set())
        bound |= new
    return bound, needed


def _read(scope: symtable.SymbolTable, top: symtable.SymbolTable) -> set[str]:
    here = {
        s.get_name() for s in scope.get_symbols() if s.is_referenced() and (s.is_global() or scope is top)
    }
    return here.union(*(_read(child, top) for child in scope.get_children()))


def course() -> list[Path]:
    return [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if CALL in path.read_text(encoding="utf-8")]


# --- the page -----------------------------------------------------------------------------------------------


def until(page, check, what: str, seconds: float = 60) -> None:
    """Wait for something that a message between kernel and browser brings about."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        page.wait_for_timeout(200)  # unlike time.sleep, lets the page's requests through


def open_notebook(page, lab, name: str) -> None:
    page.goto(f"{lab.url}/lab/tree/notebooks/{name}?token={lab.token}&reset")
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for(timeout=120_000)  # the kernel is there


def run_all(page) -> None:
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    explorer = page.locator(".aia-explorer")
    trouble = page.locator(".jp-OutputArea-output").filter(has_text="Traceback (most recent call last)")
    explorer.or_(trouble).first.wait_for(state="attached", timeout=300_000)
    assert trouble.count() == 0, trouble.first.inner_text()
    page.locator(".aia-explorer .widget-slider").last.wait_for()


def picture(page) -> np.ndarray:
    script = """async image => {
        const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
        return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(""));
    }"""
    data = page.locator(".aia-explorer img").evaluate(script)
    return np.asarray(Image.open(BytesIO(base64.b64decode(data)))).astype(int)


def moved(page, before: np.ndarray) -> bool:
    """The figure differs in more than a few pixels."""
    now = picture(page)
    return now.shape == before.shape and bool((np.abs(now - before).max(-1) > 8).mean() > 5e-4)


def losses(page) -> dict[str, str]:
    rows = page.locator(".aia-explorer .widget-html tr").all()
    return {row.locator("td").first.inner_text(): row.locator("b").inner_text() for row in rows}


def slider(page, stage: int, column: int):
    """(handle, readout) of a stage's slider; columns: end, T, δ."""
    one = page.locator(".aia-explorer .widget-slider").nth(3 * stage + column)
    one.scroll_into_view_if_needed()
    return one.locator("[role=slider]"), one.locator(".widget-readout")


def aia_loss(intensity: np.ndarray, stages: list[tuple[int, int, float, float]]) -> str:
    """Eq. 2 by hand, as the explorer prints it. stages: (first layer, last, T, δ)."""
    total = 0.0
    for first, last, target, delta in stages:
        far = np.abs(intensity[first : last + 1] - target)
        total += np.where(far <= delta, far**2 / 2, delta * far - delta**2 / 2).sum()
    return f"{total / intensity.size:.5f}"


# --- tests --------------------------------------------------------------------------------------------------


def test_sliders_move_the_loss_and_the_figure_by_keyboard_and_mouse(lab, page):
    intensity = small_notebook(lab.root / "notebooks")
    open_notebook(page, lab, "small.ipynb")
    run_all(page)
    stages = {task: [(0, 3, *STAGES[task][0]), (4, 7, *STAGES[task][1])] for task in TASKS}

    def expect_loss(what: str) -> None:
        expected = {f"lab/small, {task}": aia_loss(intensity[task], stages[task]) for task in TASKS}
        until(page, lambda: losses(page) == expected, f"{what}: {losses(page)} is not {expected}")

    expect_loss("at the start")
    page.wait_for_timeout(1500)  # what a browser sends back on its own would be here by now
    assert "(edited)" not in page.locator(".aia-explorer").inner_text()

    before = picture(page)
    handle, readout = slider(page, 0, 1)
    slider(page, 0, 0)[0].focus()
    for _ in range(2):  # from the end's handle over its number to T's handle
        page.keyboard.press("Tab")
    assert handle.evaluate("handle => handle === document.activeElement")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    until(page, lambda: readout.inner_text() == "0.43", "T follows the arrow keys")
    stages["generation"][0] = (0, 3, 0.43, 0.1)
    expect_loss("T by keyboard")
    until(page, lambda: moved(page, before), "the figure after a key")
    assert "mine (edited)" in page.locator(".aia-explorer").inner_text()

    before = picture(page)
    slider(page, 0, 0)[0].press("ArrowRight")
    stages["generation"] = [(0, 4, 0.43, 0.1), (5, 7, *STAGES["generation"][1])]
    expect_loss("a stage's end by keyboard")
    until(page, lambda: moved(page, before), "the figure after a stage's end moved")

    before = picture(page)
    handle, readout = slider(page, 1, 1)
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y, steps=5)
    until(page, lambda: moved(page, before), "the figure while the mouse drags")
    page.mouse.up()
    target = float(readout.inner_text())
    assert target > 0.3
    stages["generation"][1] = (5, 7, target, 0.05)
    expect_loss("T by mouse")
    assert page.outside == []  # everything comes from this machine


def test_a_saved_notebook_shows_a_picture_and_no_error(lab, page):
    small_notebook(lab.root / "notebooks")
    path = lab.root / "notebooks" / "small.ipynb"
    open_notebook(page, lab, path.name)
    run_all(page)
    copy = page.locator(".jp-OutputArea-child > .jp-RenderedImage img")
    assert not copy.is_visible()  # the live widget is enough

    def outputs() -> list:
        return nbformat.read(path, as_version=4).cells[1].outputs

    page.keyboard.press("Control+s")
    until(page, outputs, "the notebook is saved")
    nbformat.validate(nbformat.read(path, as_version=4))
    png = next(output.data["image/png"] for output in outputs() if "image/png" in output.data)
    assert np.asarray(Image.open(BytesIO(base64.b64decode(png)))).std() > 5  # a drawing, not an empty page

    page.goto("about:blank")
    lab.end_kernels()
    open_notebook(page, lab, path.name)
    copy.wait_for()
    assert copy.evaluate("image => image.naturalWidth") > 300
    error = page.get_by_text("Error displaying widget")
    error.wait_for(state="attached")  # JupyterLab writes it a while later; the copy's style hides it
    assert not error.is_visible()
    assert copy.is_visible()


@pytest.mark.parametrize("path", course(), ids=lambda path: path.stem)
def test_the_explorer_of_a_course_notebook_answers(lab, page, path):
    cells = needed_cells(nbformat.read(path, as_version=4).cells)
    write(cells, lab.root / "notebooks" / path.name)
    open_notebook(page, lab, path.name)
    run_all(page)
    until(page, lambda: losses(page), "a loss is shown")
    losses_before, before = losses(page), picture(page)
    slider(page, 0, 1)[0].focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    until(page, lambda: losses(page) != losses_before, "the loss after a key")
    until(page, lambda: moved(page, before), "the figure after a key")
    lab.end_kernels()
    assert page.outside == []
    assert (
        path.name != "00_start_here.ipynb" or len(losses_before) == 6
    )  # four models, two of them with both tasks


def test_the_first_notebook_has_an_explorer():
    assert "00_start_here" in {path.stem for path in course()}
