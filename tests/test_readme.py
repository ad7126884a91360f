"""README says what is so: its table, its links, its commands."""

import re
from pathlib import Path

from minimal_aia.models import support_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_models_is_the_registry_s():
    shown = re.search(r"<!-- models:.*?-->\n(.*?)<!-- end of models -->", README, re.DOTALL)
    assert shown is not None
    assert shown[1] == support_table()


def test_every_relative_link_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_make_target_that_readme_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"lab", "test", "course"} <= named
    assert named - targets == set()


def test_the_course_table_lists_the_notebooks_in_order():
    rows = re.findall(r"^\| `(\d\d_\w+)` \|", README, re.MULTILINE)
    found = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    assert rows == sorted(rows)
    assert set(found) <= set(rows)
