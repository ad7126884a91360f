"""One page of text, tables and figures: a single HTML file, or Markdown with its pictures beside it."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem 0; color: #444; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; font-weight: normal;
         white-space: nowrap; }
thead th { border-bottom: 2px solid #888; font-weight: 600; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; } figcaption { color: #444; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


class Page:
    """Parts in the order in which they are added; `write` chooses the format by the suffix."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[tuple[str, Any]] = []

    def heading(self, text: str) -> None:
        self.parts.append(("heading", text))

    def text(self, text: str) -> None:
        self.parts.append(("text", text))

    def code(self, text: str) -> None:
        self.parts.append(("code", text))

    def table(self, frame: pd.DataFrame, caption: str) -> None:
        self.parts.append(("table", (frame, caption)))

    def figure(self, figure: Any, name: str, alt: str, caption: str) -> None:
        """name: of the picture's file; alt: what readers need who cannot see it. Closes the figure."""
        data = io.BytesIO()
        # Without the software's version in it, the same figure gives the same bytes.
        figure.savefig(data, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        self.parts.append(("figure", (data.getvalue(), name, alt, caption)))

    def write(self, path: Path) -> None:
        text = self.html() if path.suffix == ".html" else self.markdown(path)
        path.write_text(text, encoding="utf-8")

    def html(self) -> str:
        body = "\n".join(_HTML[kind](content) for kind, content in self.parts)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
            f"<body>\n<main>\n<h1>{escape(self.title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
        )

    def markdown(self, path: Path) -> str:
        """The text; its pictures go into the folder NAME_files beside `path`."""
        lines = [f"# {self.title}"]
        for kind, content in self.parts:
            if kind == "heading":
                lines.append(f"## {content}")
            elif kind == "text":
                lines.append(content)
            elif kind == "code":
                lines.append(f"```\n{content.rstrip()}\n```")
            elif kind == "table":
                frame, caption = content
                lines.append(f"{caption}\n\n{frame.to_markdown(index=False)}")
            else:
                data, name, alt, caption = content
                folder = path.parent / f"{path.stem}_files"
                folder.mkdir(exist_ok=True)
                (folder / f"{name}.png").write_bytes(data)
                lines.append(f"![{alt}]({folder.name}/{name}.png)\n\n*{caption}*")
        return "\n\n".join(lines) + "\n"


def _html_table(content: tuple[pd.DataFrame, str]) -> str:
    frame, caption = content
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in frame.columns)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row) + "</tr>"
        for row in frame.itertuples(index=False)
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}">\n<table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n"
        "</table>\n</div>"
    )


def _html_figure(content: tuple[bytes, str, str, str]) -> str:
    data, _, alt, caption = content
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    below = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure><img src="{source}" alt="{escape(alt)}">\n{below}</figure>'


_HTML: dict[str, Any] = {
    "heading": lambda text: f"<h2>{escape(text)}</h2>",
    "text": lambda text: f"<p>{escape(text)}</p>",
    "code": lambda text: f"<pre><code>{escape(text)}</code></pre>",
    "table": _html_table,
    "figure": _html_figure,
}
