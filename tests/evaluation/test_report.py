"""The page holds the numbers that were measured, is readable without eyes or network, and errors come
early."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from scipy.stats import t as student

from minimal_aia.cli import main
from minimal_aia.evaluation import report as module
from minimal_aia.evaluation.lab_benchmark import benchmark
from minimal_aia.evaluation.page import Page
from minimal_aia.evaluation.report import report
from minimal_aia.evaluation.runs import read_runs
from minimal_aia.evaluation.scores import differences, scores
from minimal_aia.evaluation.subjects import lab_subject
from minimal_aia.lab import models
from minimal_aia.models.lab import CHECKPOINTS

torch.set_num_threads(1)
ITEMS = 3


class Reader(HTMLParser):
    """Tables as lists of rows, pictures, and the tags that were opened but not closed."""

    VOID = ("meta", "img", "br", "!doctype")

    def __init__(self, text):
        super().__init__()
        self.tables, self.images, self.open, self.tags, self.cell = [], [], [], set(), None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self.cell)
            self.cell = None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The shipped unified model, and the same with a little noise on its weights and what a run leaves."""
    folder = tmp_path_factory.mktemp("runs")
    plain, tuned = folder / "unified-seed0", folder / "aia"
    shutil.copytree(CHECKPOINTS / "unified", plain)
    model, codebook = models.load(plain)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * p.std() * torch.randn_like(p))
    models.save(model, codebook, tuned)
    recipe = "model: lab/unified\nseed: 1\naia_weight: 40.0 # <λ>\n"
    (tuned / "recipe.yaml").write_text(recipe, encoding="utf-8")
    on_the_way(tuned)
    return [str(plain), str(tuned)]


def on_the_way(folder):
    """Curves and log as the trainer writes them."""
    entries = [
        {
            "step": step,
            "task": task,
            "layers": [0, 1, 2],
            "curve": [0.1 + step / 100, 0.2, 0.3],
            "distance": 0.1,
        }
        for step in (0, 20)
        for task in ("generation", "understanding")
    ]
    (folder / "curves.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    for step in (10, 20):
        state = folder / f"checkpoint-{step}"
        state.mkdir()
        history = [{"step": s, "ntp/generation": 2.0 - s / 20} for s in range(5, step + 1, 5)]
        (state / "trainer_state.json").write_text(json.dumps({"log_history": history}))


@pytest.fixture(scope="module")
def page(runs):
    made = report(runs, items=ITEMS, samples=2)
    assert not plt.get_fignums()  # figures are closed once they are in the page
    return made


@pytest.fixture(scope="module")
def html(page, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    page.write(path)
    return path.read_text(encoding="utf-8")


def rows(html, header):
    """The table with this column name, as a frame."""
    for table in Reader(html).tables:
        if header in table[0]:
            found = pd.DataFrame(table[1:], columns=table[0])
    return found


def test_scores_in_the_page_are_those_of_the_benchmark(runs, html):
    table = scores(benchmark(lab_subject(runs[0]), ITEMS))
    shown = rows(html, "guesser: blind").set_index(["task", "metric", "group"])["unified, seed 0"]
    for row in table.itertuples():
        cell = shown[row.task, row.metric, row.group]
        assert cell == f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
    assert len(table) > 40


def test_differences_in_the_page_are_paired(runs, html):
    before, after = (benchmark(lab_subject(run), ITEMS) for run in runs)
    table = differences(before, after)
    shown = rows(html, "difference").set_index(["task", "metric", "group"])
    for row in table.itertuples():
        cells = shown.loc[(row.task, row.metric, row.group)]
        assert cells["difference"].split()[0] == f"{row.difference:+.3f}"
        assert cells["95 % interval"] == f"[{row.low:+.3f}, {row.high:+.3f}]"
        assert ("*" in cells["difference"]) == (row.low > 0 or row.high < 0)
    assert re.search(rf"\d+ of {len(shown)} intervals", html)
    apart = shown["difference"].str.contains(r"\*").sum()
    assert f"{apart} of {len(shown)} intervals" in html


def test_the_page_needs_neither_eyes_nor_network_nor_scripts(html):
    reader = Reader(html)
    assert reader.open == []
    assert "script" not in reader.tags
    assert {"main", "h1", "h2", "caption", "figcaption"} <= reader.tags
    assert 'lang="en"' in html
    assert len(reader.images) == 4  # curves, drawings, curves on the way, training
    for image in reader.images:
        assert image["src"].startswith("data:image/png;base64,")
        assert len(image["alt"]) > 30
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    drawings = reader.images[1]["alt"]
    assert drawings.count("right") + drawings.count("wrong") >= 4  # two prompts, two runs


def test_recipes_are_shown_and_escaped(html):
    assert "aia_weight: 40.0 # &lt;λ&gt;" in html
    assert f"torch {torch.__version__}" in html


def test_curves_and_log_of_the_newest_checkpoint(runs):
    run = read_runs(runs)[1]
    assert run.label == "aia, seed 1"
    assert list(run.log["step"]) == [5, 10, 15, 20]
    assert set(run.log["task"]) == {"generation"}
    assert run.log["loss"].iloc[-1] == 1.0
    last = run.curves.query("step == 20 and task == 'generation'")
    assert list(last["intensity"]) == pytest.approx([0.3, 0.2, 0.3])


def test_markdown_has_its_pictures_beside_it(page, tmp_path):
    path = tmp_path / "report.md"
    page.write(path)
    text = path.read_text(encoding="utf-8")
    linked = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", text)
    assert len(linked) == 4
    for alt, file in linked:
        assert alt
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
    assert "| understanding | exact_match" in text
    assert text.startswith("# Runs side by side\n")


def test_a_page_is_the_same_when_it_is_made_again():
    first, again = (report(["lab/generation"], items=1, samples=2).parts for _ in range(2))
    assert first == again
    assert any("drawn_right" in html for html, _ in first)


def test_over_seeds_the_seed_is_the_unit():
    """Two ways of training, three seeds each: the interval by hand."""
    values = {("a", 0): 0.2, ("a", 1): 0.5, ("a", 2): 0.4, ("b", 0): 0.4, ("b", 1): 0.6, ("b", 2): 0.7}
    frames, lab = {}, []
    for (name, seed), value in values.items():
        label = f"{name}, seed {seed}"
        hits = [1] * round(10 * value) + [0] * round(10 - 10 * value)
        frames[label] = pd.DataFrame(
            {"model": label, "seed": seed, "task": "generation", "metric": "drawn_right", "group": "single",
             "item": range(10), "hits": hits, "of": 1, "asked": "x", "truth": "", "said": ""}
        )  # fmt: skip
        lab.append((Named(label), Named(name, seed)))
    page = Page("x")
    module._seeds(page, lab, frames)
    table = rows(page.parts[-1][0], "seeds")
    differences = np.array([0.2, 0.1, 0.3])
    half = student.ppf(0.975, 2) * differences.std(ddof=1) / 3**0.5
    assert table["mean difference"].item() == "+0.200"
    assert table["95 % t-interval"].item() == f"[{0.2 - half:+.3f}, {0.2 + half:+.3f}]"
    assert table["seeds"].item() == "3"


class Named:
    def __init__(self, name, seed=0):
        self.label = self.name = name
        self.seed = seed


def test_a_run_of_another_family_is_shown_without_lab_scores(tmp_path):
    run = tmp_path / "janus-pro"
    run.mkdir()
    (run / "recipe.yaml").write_text("model: weights/janus-pro-7b\nseed: 0\n")
    on_the_way(run)
    table = tmp_path / "scores.csv"
    table.write_text(
        "model,task,metric,group,value,items,harness,version\n"
        "janus-pro,geneval,score,overall,0.8,553,geneval,abc\n"
        "janus-pro,mmbench,accuracy,,65.5,1164,lmms,0.7.3\n"
        "janus-pro,mmbench,accuracy,,79.2,1164,lmms,0.6.0\n"
    )
    report([str(run)], score_files=[table]).write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "exact_match" not in text
    assert "Scores from geneval, version abc" in text
    # two versions of one harness are two tables
    assert {len(t) for t in Reader(text).tables if "metric" in t[0]} == {2}
    assert len([t for t in Reader(text).tables if "metric" in t[0]]) == 3
    assert "weights/janus-pro-7b" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["lab/unified", "lab/unified"], "twice"),
        (["lab/unified", "--scores", "missing.csv"], "missing.csv"),
    ],
)
def test_errors_come_before_work_and_on_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "everything", lambda *_: pytest.fail("work had begun"))
    assert main(["report", *arguments, "--out", str(tmp_path / "r.html")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_suffix_decides_the_format(tmp_path, capsys):
    assert main(["report", "lab/unified", "--out", str(tmp_path / "r.pdf")]) == 2
    assert ".html or .md" in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="neither a lab model"):
        read_runs([str(tmp_path)])


def test_a_table_that_holds_no_scores(tmp_path):
    path = Path(tmp_path) / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no score table: column"):
        report(["lab/unified"], score_files=[path])
