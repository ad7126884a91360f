"""README says what is so: its table, its links, its commands."""

import re
from pathlib import Path

from minimal_aia.models import support_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PICTURES = [a or b for a, b in re.findall(r'!\[[^]]*\]\(([^)]+)\)|<img src="([^"]+)"', README)]


def test_the_table_of_models_is_the_registry_s():
    shown = re.search(r"<!-- models:.*?-->\n(.*?)<!-- end of models -->", README, re.DOTALL)
    assert shown is not None
    assert shown[1] == support_table()


def test_every_relative_link_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links + PICTURES if not (ROOT / link).exists()] == []


def test_the_documentation_has_every_picture_of_readme():
    copied = (ROOT / "docs" / "hooks.py").read_text(encoding="utf-8")
    assert len(PICTURES) >= 3
    assert [picture for picture in PICTURES if f'"{picture}"' not in copied] == []


def test_every_make_target_that_readme_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"lab", "test", "course"} <= named
    assert named - targets == set()


def test_the_course_table_lists_the_notebooks_in_order():
    rows = re.findall(r"^\| \[`(\d\d_\w+)`\]\(notebooks/\1\.ipynb\) \|", README, re.MULTILINE)
    assert rows == sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


def block(name: str) -> str:
    """What stands in README between the marks of a generated table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {name}: [^>]*-->\n(.*?)\n<!-- end of {name} -->", text, re.DOTALL)[1]


def test_the_verdicts_are_those_of_the_committed_results():
    import pandas as pd

    from minimal_aia.lab import claims

    stored = pd.read_csv(claims.DATA / "results" / "claims.csv")
    assert block("claims") == claims.overview(stored).to_markdown(index=False)
    again = claims.sweep_claims(pd.read_csv(claims.DATA / "results" / "metrics.csv"))
    kept = stored[stored["claim"].isin(again["claim"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, kept, check_dtype=False, atol=1e-4)


def test_the_cost_table_is_that_of_the_stored_measurements():
    from minimal_aia import bench_command

    assert block("bench") == bench_command.table()
