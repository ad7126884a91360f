"""Pages made while the documentation is built, so that nothing is written twice."""

from __future__ import annotations

import argparse
import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# They keep their places, so the links between them hold.
COPIED = (
    "data_samples/README.md",
    "data_samples/published/README.md",
    "data_samples/checkpoints/MODEL_CARD.md",
    "data_samples/lab/curves.png",
    "data_samples/results/headline.png",
    "docs/pictures/00_start_here.png",
    "benchmarks/results/plan_check.json",
)


def recipes() -> list[str]:
    """Every recipe with its README: paths relative to the repository."""
    found = (path for path in ROOT.glob("recipes/**/*") if path.is_file())
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def notebooks() -> list[str]:
    """The course in order, the summary, then the solutions: paths relative to the repository."""
    found = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("notebooks/**/*.ipynb")]
    return sorted(
        (name for name in found if ".ipynb_checkpoints" not in name), key=lambda n: (n.count("/"), n)
    )


def on_config(config: Any) -> Any:
    found = notebooks()
    course: list[Any] = ["course.md", *(name for name in found if "/solutions/" not in name)]
    course.append({"Solutions": [name for name in found if "/solutions/" in name]})
    config.nav.insert(1, {"Course": course})
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Any, config: Any) -> Any:
    pages = {"index.md": (ROOT / "README.md").read_text(encoding="utf-8"), "cli.md": command_line()}
    pages["course.md"] = course_page(pages["index.md"])
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for name in (*COPIED, *recipes(), *notebooks()):
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Links between notebooks lead to their pages; a chapter that is not there loses the link.

    On an API page, what only Sphinx reads and a `name: text` outside Args (it becomes a box without the name)
    are warnings, so that `make docs` fails.
    """

    def link(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(page.file.src_uri), match["file"]))
        if files.get_file_from_path(target) is None:
            return match["text"]
        return f'<a href="{match["file"].removesuffix(".ipynb")}.html">{match["text"]}</a>'

    if page.file.src_uri.startswith("api/"):
        for stray in re.findall(r'<details class="\w+"|:(?:class|func|meth|mod):<', html):
            logging.getLogger("mkdocs.hooks").warning("%s: docstring leaves %s", page.file.src_uri, stray)
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(r'<a href="(?P<file>[./\w]+\.ipynb)"[^>]*>(?P<text>.*?)</a>', link, html)


def course_page(readme: str) -> str:
    """README's table of chapters."""
    (section,) = re.findall(r"^## The course\n(.*?)^## ", readme, flags=re.MULTILINE | re.DOTALL)
    intro = "The notebooks as they are stored, with their outputs. `make lab` opens them to work in.\n"
    return f"# The course\n\n{intro}{section}"


def command_line() -> str:
    """`--help` of every command, as a terminal of 100 columns shows it."""
    from minimal_aia import cli

    os.environ["COLUMNS"] = "100"
    parser = cli._parser()
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    parts = ["# Command line\n", _block(parser)]
    for name, command in commands.choices.items():
        parts += [f"\n## minimal-aia {name}\n", _block(command)]
        inner = [a for a in command._actions if isinstance(a, argparse._SubParsersAction)]
        for second, sub in (pair for action in inner for pair in action.choices.items()):
            parts += [f"\n### minimal-aia {name} {second}\n", _block(sub)]
    return "\n".join(parts)


def _block(parser: argparse.ArgumentParser) -> str:
    return f"```text\n{parser.format_help().rstrip()}\n```"
