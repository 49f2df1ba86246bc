"""One self-contained HTML page: a shared style, pictures inside the file, everything escaped."""

from __future__ import annotations

import base64
import io

import jinja2
import numpy as np
from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #5a6478; --line: #d9dee8; --card: #fff; --page: #f5f6fa;
        --good: #1a7f4b; --warn: #a15c00; --bad: #b3261e; --accent: #6a3d9a }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf1; --soft: #a3acbd; --line: #333b4b; --card: #1b2130; --page: #12161f;
        --good: #5cc993; --warn: #e5a54b; --bad: #f2867e; --accent: #b79be0 } }
* { box-sizing: border-box } body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 70rem; margin: 0 auto; padding: 1rem } h1 { font-size: 1.6rem; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 0 0 .6rem }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; margin: 1rem 0; overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th, td { text-align: left; padding: .25rem .8rem .25rem 0; vertical-align: top }
th { color: var(--soft); font-weight: 600 } tr + tr td { border-top: 1px solid var(--line) } img, svg { max-width: 100%; height: auto }
.good { color: var(--good) } .warn { color: var(--warn) } .bad { color: var(--bad) } .soft { color: var(--soft) }
figure { margin: 0 0 1rem } figcaption { color: var(--soft); font-size: .9rem }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ style }}</style></head><body><main><h1>{{ title }}</h1>
{% block body %}{% endblock %}
</main></body></html>
"""

_environment = jinja2.Environment(
    loader=jinja2.DictLoader({"page.html": _PAGE}),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, title: str, **values) -> str:
    """Fill ``template`` (Jinja2, starts with ``{% extends "page.html" %}`` and fills ``{% block body %}``), all values escaped."""
    return _environment.from_string(template).render(title=title, style=jinja2.utils.markupsafe.Markup(_STYLE), **values)


def data_uri(image: np.ndarray | Image.Image, format: str = "PNG", quality: int = 85) -> str:
    """A picture as ``data:`` address for ``<img src>``: uint8 array (H, W) or (H, W, 3), or a PIL image."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": quality} if format != "PNG" else {}))
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def figure_uri(figure) -> str:
    """A matplotlib figure as ``data:`` address (SVG, so that it stays sharp)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
