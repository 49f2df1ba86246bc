"""report.html and metrics.json of an evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path

from common.files import write_text
from common.html import render
from metrics.section import Section

_TEMPLATE = """{% extends "page.html" %}
{% block body %}
<p class="soft">{{ subtitle }}</p>
<section><h2>What this evaluation objects to</h2>
{% for text in summary %}<p>{{ text }}</p>{% endfor %}
{% if findings %}
<ul>{% for finding in findings %}<li class="bad">{{ finding.text }}
<span class="soft">({{ finding.test }}: {{ "%.3g"|format(finding.value) }},
limit {{ "%.3g"|format(finding.limit) }})</span></li>{% endfor %}</ul>
{% else %}<p class="good">{{ nothing }}</p>{% endif %}
{% for note in notes + untested %}<p class="warn">{{ note }}</p>{% endfor %}
</section>
{% for section in sections %}
<section id="{{ section.name }}"><h2>{{ section.title }}</h2><p class="soft">{{ section.explanation }}</p>
{% for table in section.tables %}
<figure><figcaption>{{ table.caption }}</figcaption><table><tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></figure>
{% endfor %}
{% for caption, address in section.figures %}
<figure><img src="{{ address }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</section>
{% endfor %}
<section><h2>How this was measured</h2><table>
{% for name, value in settings.items() %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}
</table></section>
{% endblock %}"""


def write_report(folder: Path, title: str, settings: dict, notes: list[str], sections: list[Section]) -> None:
    """Write ``folder``/metrics.json and ``folder``/report.html. settings: how it was measured. notes: what could not be."""
    findings = _all(sections, "findings")
    numbers = {section.name: section.numbers for section in sections}
    untested, summary = _all(sections, "untested"), _all(sections, "summary")
    record = {"settings": settings, "notes": notes, "untested": untested, "findings": [vars(finding) for finding in findings]}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "metrics.json", json.dumps(_plain(record | numbers), indent=1, allow_nan=False) + "\n")
    subtitle = f"{settings['generated']} · {settings['number generated']} images at {settings['compared at']}"
    opening = {"summary": summary, "findings": findings, "nothing": _nothing(notes, untested), "notes": notes, "untested": untested}
    page = render(_TEMPLATE, title, subtitle=subtitle, sections=sections, settings=settings, **opening)
    write_text(folder / "report.html", page)


def headline(notes: list[str], sections: list[Section]) -> list[str]:
    """What the report opens with, as lines for a terminal."""
    found = ["found: " + finding.text for finding in _all(sections, "findings")]
    untested, summary = _all(sections, "untested"), _all(sections, "summary")
    return [*("note: " + text for text in notes + untested), *summary, *(found or [_nothing(notes, untested)])]


def _all(sections: list[Section], name: str) -> list:
    """What the sections hold in one of their lists, in order."""
    return [item for section in sections for item in getattr(section, name)]


def _nothing(notes: list[str], untested: list[str]) -> str:
    return "no fault found" + (" by what was tested; see the notes" if notes or untested else "")


def _plain(value):
    """The same with what JSON knows: numpy scalars become numbers, what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
