"""What check_data.py shows: a table for the terminal, a JSON file for programs, one HTML page for people."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from common.errors import UserError
from common.files import write_text
from common.html import data_uri, figure_uri, render
from data.findings import SEVERITIES, Assessment, Finding, printable, worst
from data.shards import is_sharded, open_shards

EXAMPLES_IN_TEXT, EXAMPLES_ON_PAGE, ITEM_LENGTH = 3, 20, 300
THUMBNAIL = 128  # pixels
PER_LABEL, PER_FINDING, MAX_LABELS, MAX_PROVIDERS = 24, 12, 12, 4

_PAGE = """{% extends "page.html" %}{% block body %}
<style>
h2 { overflow-wrap: anywhere } .wide { overflow-x: auto } .wide td, .wide th { white-space: nowrap }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(72px, 1fr)); gap: 3px }
.sheet img { width: 100%; display: block; border-radius: 3px }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: .8rem }
.plots img { width: 100%; background: #fff; border-radius: 4px }
details { border-top: 1px solid var(--line); padding: .5rem 0 } summary { cursor: pointer }
h3 { font-size: 1rem; margin: 1rem 0 .4rem }
details ul { margin: .4rem 0; padding-left: 1.2rem; overflow-wrap: anywhere; font-size: .9rem } details p { margin: .4rem 0 }
.badge { display: inline-block; min-width: 4.6rem; font-weight: 600 }
</style>
<p class="soft">{{ made }}. For research, not for diagnosis.</p>
{% for part in parts %}
<section><h2>{{ part.folder }}</h2>
<p>{{ part.summary }}.
{% if part.broken %}<strong class="bad">Something is broken.</strong>
{% elif part.findings %}<strong class="warn">Usable; read the findings.</strong>
{% else %}<strong class="good">Nothing to complain about.</strong>{% endif %}</p>
{% for finding in part.findings %}
<details{% if finding.severity != "note" %} open{% endif %}><summary>
<span class="badge {{ colours[finding.severity] }}">{{ finding.severity }}</span>
<strong>{{ "{:,}".format(finding.count) }}</strong> {{ finding.title }}</summary>
<p class="soft">What to do: {{ finding.advice }}.</p>
<ul>{% for item in finding.examples %}<li>{{ item }}</li>{% endfor %}
{% if finding.more %}<li class="soft">and {{ "{:,}".format(finding.more) }} more (all of them in report.json)</li>{% endif %}</ul>
{% if finding.thumbnails %}<div class="sheet">
{% for picture in finding.thumbnails %}<img src="{{ picture.uri }}" alt="{{ picture.name }}" title="{{ picture.name }}">
{% endfor %}</div>{% endif %}
</details>
{% endfor %}
{% for title, rows in part.tables.items() %}
<h3>{{ title }}</h3><div class="wide"><table><tr>{% for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows[1:] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>
{% endfor %}
{% if part.plots %}<h3>Distributions</h3><div class="plots">
{% for plot in part.plots %}<img src="{{ plot.uri }}" alt="{{ plot.name }}">{% endfor %}</div>{% endif %}
{% for label, thumbnails in part.sheets.items() %}
<h3>{{ label }}</h3><div class="sheet">
{% for picture in thumbnails %}<img src="{{ picture.uri }}" alt="{{ picture.name }}" title="{{ picture.name }}">{% endfor %}</div>
{% endfor %}
</section>
{% endfor %}
{% endblock %}"""
_COLOURS = {"broken": "bad", "warning": "warn", "note": "soft"}


def text_lines(assessment: Assessment) -> Iterator[str]:
    """The findings and tables of one folder as lines for the terminal."""
    yield f"{printable(str(assessment.folder))}: {assessment.summary}"
    for finding in worst(assessment.findings):
        yield f"  {finding.severity:<8}{finding.count:>7,}  {finding.title}"
        yield from (f"{'':19}{_short(item)}" for item in finding.items[:EXAMPLES_IN_TEXT])
        yield f"{'':17}-> {finding.advice}"
    for title, rows in assessment.tables.items():
        yield f"  {title}"
        widths = [max(len(printable(str(cell))) for cell in column) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "    " + "  ".join(f"{printable(str(cell)):<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _short(item: str) -> str:
    return item if len(item) <= ITEM_LENGTH else item[: ITEM_LENGTH - 3] + "..."


def write_report(out: Path, assessments: list[Assessment], made: str) -> None:
    """Write ``out/report.json`` and ``out/report.html``. ``made``: one sentence on how and when the report was made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "report.json", json.dumps(to_json(assessments, made), indent=1))
        parts = [_part(assessment) for assessment in assessments]
        write_text(out / "report.html", render(_PAGE, title="Data check", made=made, parts=parts, colours=_COLOURS))
    except OSError as error:
        raise UserError(f"the report cannot be written to {out} ({error.strerror}); name another folder with --out") from error


def to_json(assessments: list[Assessment], made: str) -> dict:
    """The whole judgement as plain types: every finding with all its items, and the tables as lists of rows."""
    return {
        "made": made,
        "broken": any(assessment.broken for assessment in assessments),
        "folders": [
            {
                "kind": assessment.kind,
                "folder": printable(str(assessment.folder)),
                "summary": assessment.summary,
                "findings": [
                    {
                        "severity": finding.severity,
                        "check": finding.check,
                        "title": finding.title,
                        "advice": finding.advice,
                        "count": finding.count,
                        "items": finding.items,
                    }
                    for finding in worst(assessment.findings)
                ],
                "tables": {title: [list(map(str, row)) for row in rows] for title, rows in assessment.tables.items()},
            }
            for assessment in assessments
        ],
    }


def _part(assessment: Assessment) -> dict:
    by_label = defaultdict(list)
    for path in assessment.scans:
        by_label[assessment.facts[path].label].append(path)
    return {
        "folder": printable(str(assessment.folder)),
        "summary": assessment.summary,
        "broken": assessment.broken,
        "findings": [_finding(assessment.folder, finding) for finding in worst(assessment.findings)],
        "tables": {title: [[printable(str(cell)) for cell in row] for row in rows] for title, rows in assessment.tables.items()},
        "plots": _plots(assessment) if assessment.scans else [],
        "sheets": {
            f"{printable(label)}: {min(PER_LABEL, len(paths))} of {len(paths):,}": _thumbnails(assessment.folder, paths, PER_LABEL)
            for label, paths in sorted(by_label.items())[:MAX_LABELS]
        },
    }


def _finding(folder: Path, finding: Finding) -> dict:
    return {
        "severity": finding.severity,
        "count": finding.count,
        "title": finding.title,
        "advice": finding.advice,
        "examples": [_short(item) for item in finding.items[:EXAMPLES_ON_PAGE]],
        "more": max(finding.count - EXAMPLES_ON_PAGE, 0),
        "thumbnails": _thumbnails(folder, list(finding.pictures[:PER_FINDING]), PER_FINDING),
    }


def _thumbnails(folder: Path, paths: list[str], count: int) -> list[dict]:
    """Small pictures of up to ``count`` patches, evenly spread over ``paths``; one that has vanished meanwhile is left out."""
    chosen = [paths[index] for index in np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)]
    thumbnails = []
    for path in chosen:
        try:
            with Image.open(_picture(folder, path)) as image:
                small = image.convert("RGB")
        except (OSError, KeyError):  # KeyError: shards that were packed anew
            continue
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        thumbnails.append({"uri": data_uri(small, "JPEG", quality=80), "name": printable(path)})
    return thumbnails


def _picture(folder: Path, path: str) -> Path | io.BytesIO:
    """What Pillow opens to read a patch: its file, or what its shard holds. Raises OSError and KeyError as ``Shards.content``."""
    return io.BytesIO(open_shards(folder).content(path)) if is_sharded(folder) else folder / path


def _plots(assessment: Assessment) -> list[dict]:
    providers = defaultdict(list)
    for path, scan in assessment.scans.items():
        providers[assessment.facts[path].data_provider].append(scan)
    largest = sorted(providers.items(), key=lambda item: -len(item[1]))[:MAX_PROVIDERS]
    quantities: dict[str, Callable] = {
        "optical density, red": lambda scan: scan.od[0],
        "optical density, green": lambda scan: scan.od[1],
        "optical density, blue": lambda scan: scan.od[2],
        "share of stained pixels": lambda scan: scan.stained,
        "sharpness (variance of the Laplacian)": lambda scan: scan.sharpness,
    }
    return [
        {"name": name, "uri": _histogram(name, {provider: [value(scan) for scan in scans] for provider, scans in largest})}
        for name, value in quantities.items()
    ]


def _histogram(name: str, values: dict[str, list[float]]) -> str:
    figure = Figure(figsize=(4.2, 2.6))
    axes = figure.add_subplot()
    bins = np.histogram_bin_edges(np.concatenate(list(values.values())), 40)
    for provider, numbers in values.items():
        label = printable(provider or "provider unknown").replace("$", r"\$")[:40]  # a lone $ would start a formula
        axes.hist(numbers, bins, alpha=0.55, label=label)
    axes.set_xlabel(name)
    axes.set_ylabel("patches")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure_uri(figure)


def verdict(assessments: list[Assessment]) -> str:
    """One line that sums up all folders."""
    counts = dict.fromkeys(SEVERITIES, 0)
    for assessment in assessments:
        for finding in assessment.findings:
            counts[finding.severity] += 1
    return "findings: " + ", ".join(f"{count} {severity}" for severity, count in counts.items())
