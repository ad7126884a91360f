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


FILES = "@files@"  # stands for the folder of pictures until the page's own name is known


class Page:
    """Parts in the order in which they are added, each in both formats; `write` chooses by the suffix."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[tuple[str, str]] = []  # HTML, Markdown
        self.pictures: dict[str, bytes] = {}

    def heading(self, text: str) -> None:
        self.parts.append((f"<h2>{escape(text)}</h2>", f"## {text}"))

    def text(self, text: str) -> None:
        self.parts.append((f"<p>{escape(text)}</p>", text))

    def code(self, text: str) -> None:
        self.parts.append((f"<pre><code>{escape(text)}</code></pre>", f"```\n{text.rstrip()}\n```"))

    def table(self, frame: pd.DataFrame, caption: str) -> None:
        with pd.option_context("display.max_colwidth", None):
            table = frame.astype(str).to_html(index=False, border=0).replace("<th>", '<th scope="col">')
        table = table.replace("<thead>", f"<caption>{escape(caption)}</caption>\n<thead>", 1)
        around = f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}">'
        self.parts.append((f"{around}\n{table}\n</div>", f"{caption}\n\n{frame.to_markdown(index=False)}"))

    def figure(self, figure: Any, name: str, alt: str, caption: str) -> None:
        """name: of the picture's file; alt: what readers need who cannot see it. Closes the figure."""
        data = io.BytesIO()
        # Without the software's version in it, the same figure gives the same bytes.
        figure.savefig(data, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        self.pictures[name] = data.getvalue()
        source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        html = f'<figure><img src="{source}" alt="{escape(alt)}">\n<figcaption>{escape(caption)}</figcaption>'
        self.parts.append((f"{html}</figure>", f"![{alt}]({FILES}/{name}.png)\n\n*{caption}*"))

    def write(self, path: Path) -> None:
        """A single .html file, or Markdown with its pictures in the folder NAME_files beside it."""
        html, markdown = zip(*self.parts)
        if path.suffix == ".html":
            text = (
                '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
                '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
                f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
                f"<h1>{escape(self.title)}</h1>\n" + "\n".join(html) + "\n</main>\n</body>\n</html>\n"
            )
        else:
            folder = path.with_name(f"{path.stem}_files")
            folder.mkdir(exist_ok=True)
            for name, data in self.pictures.items():
                (folder / f"{name}.png").write_bytes(data)
            text = "\n\n".join([f"# {self.title}", *markdown]).replace(FILES, folder.name) + "\n"
        path.write_text(text, encoding="utf-8")
