"""logs/RUN/report.html: one page without network access that says where a run stands and shows how its samples grew."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean

from PIL import Image

from common.files import write_text
from common.html import data_uri, figure_uri, render
from training.runlog import METRICS, duration, read_metrics
from training.verdict import History, advise, finite, history, judged_by_training, scored_alike, untested, warnings

REPORT = "report.html"
GRIDS = 24  # on the slider at most
GRID_BYTES = 220_000  # a grid at most: 24 of them and the real one stay below 7.5 MB in base64
GRID_QUALITIES = ((1040, 85), (1040, 70), (900, 55), (700, 45), (500, 40), (350, 30))  # (longest side in pixels, JPEG quality)
POINTS = 400  # of a curve at most; what is denser is averaged
LOSSES = {"loss_d": "discriminator", "loss_g": "generator"}
ACCURACIES = {
    "acc_real": "on training patches, augmented",
    "acc_fake": "on generated patches",
    "acc_held_out": "on held-out patches",
    "acc_trained": "on training patches",
}
INK, COLOURS = "#5a6478", ("#1f77b4", "#d95f02", "#6a3d9a", "#2b8a3e")

_TEMPLATE = """{% extends "page.html" %}
{% block body %}
<style>
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.pair img { width: 100%; border-radius: .3rem; background: #fff } .pair figure { margin: 0 }
.bar { height: .6rem; border-radius: .3rem; background: var(--line) }
.bar div { height: 100%; border-radius: .3rem; background: var(--accent) } #slider { width: 100%; accent-color: var(--accent) }
.control[hidden], figure[hidden] { display: none } td { overflow-wrap: anywhere }
</style>
<section><h2>Where the run stands</h2>
<p><b>{{ status }}</b></p>
<div class="bar"><div style="width: {{ "%.1f"|format(percent) }}%"></div></div>
{% for warning in warnings %}<p class="bad">{{ warning }}</p>{% endfor %}
{% if untested %}<p class="soft">{{ untested }}</p>
{% elif not warnings %}<p class="good">Nothing in the numbers looks wrong.</p>{% endif %}
<p>What to do next, by the numbers: <b>{{ advice.action }}</b>. {{ advice.reasons|reject("in", warnings)|join(" ") }}</p>
<p class="soft">As of {{ written }}<span id="ago"></span>; this page is written anew with every sample picture: reload it.
{% if running %}Where that is long ago, look at the end of train.log whether the run still goes on.{% endif %}</p>
<script>
const minutes = Math.round((Date.now() / 1000 - {{ written_s }}) / 60);
if (minutes > 1) document.getElementById("ago").textContent =
  minutes < 120 ? `, ${minutes} minutes ago` : `, ${Math.round(minutes / 60)} hours ago`;
</script>
</section>
<section><h2>Samples</h2>
{% if grids %}
<div class="control" hidden><label for="slider">Epoch <output id="epoch">{{ grids[-1].epoch }}</output></label>
<input id="slider" type="range" min="0" max="{{ grids|length - 1 }}" value="{{ grids|length - 1 }}" step="1"></div>
<div class="pair"><div id="grids">
{% for grid in grids %}
<figure data-epoch="{{ grid.epoch }}"{% if not loop.last %} hidden{% endif %}><img src="{{ grid.address }}"
alt="generated patches after epoch {{ grid.epoch }}"><figcaption>Generated, epoch {{ grid.epoch }}:
always the same latents</figcaption></figure>
{% endfor %}
</div>
{% if real %}<figure><img src="{{ real }}" alt="real patches"><figcaption>Real training patches</figcaption></figure>{% endif %}
</div>
<script>
const slider = document.getElementById("slider"), figures = [...document.querySelectorAll("#grids figure")];
slider.addEventListener("input", () => {
  figures.forEach((figure, index) => { figure.hidden = index !== Number(slider.value); });
  document.getElementById("epoch").textContent = figures[slider.value].dataset.epoch;
});
slider.value = figures.length - 1;
document.querySelector(".control").hidden = figures.length < 2;
</script>
{% else %}<p class="soft">None yet.</p>{% endif %}
</section>
<section><h2>Curves</h2><div class="pair">
{% for caption, address in curves %}
<figure><figcaption>{{ caption }}</figcaption><img src="{{ address }}" alt="{{ caption }}"></figure>
{% else %}<p class="soft">No log line yet.</p>{% endfor %}
</div></section>
{% if scores %}
<section><h2>Evaluations</h2><table><tr><th>epoch</th><th>KID (standard error)</th><th>precision</th><th>recall</th></tr>
{% for row in scores %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></section>
{% endif %}
<section><h2>Configuration</h2><table>
{% for name, value in settings.items() %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}
</table></section>
{% endblock %}"""


@dataclass(frozen=True)
class Facts:
    """What metrics.jsonl does not hold. state: running, done, or why it stopped. images, images_total: seen and planned.

    epoch, epochs: seen and planned. settings: name -> value, the configuration and the device. growing: whether steps will take
    longer than now.
    """

    state: str
    images: int
    images_total: int
    epoch: float
    epochs: int
    settings: dict
    growing: bool = False


@dataclass(frozen=True)
class Grid:
    """One sample picture: its epoch and the picture as ``data:`` address."""

    epoch: int
    address: str


def write_run_report(log_folder: Path, facts: Facts) -> None:
    """Write ``log_folder``/report.html from its metrics.jsonl and samples/, below 8 MB.

    Raises OSError when a file cannot be read or written, UserError when metrics.jsonl is damaged.
    """
    run = history(read_metrics(log_folder / METRICS)[0])
    page = render(
        _TEMPLATE,
        f"Training run {log_folder.name}",
        status=status(run, facts),
        percent=100 * min(1.0, facts.images / max(facts.images_total, 1)),
        warnings=warnings(run),
        untested=untested(run),
        advice=advise(run),
        written=time.strftime("%Y-%m-%d %H:%M"),
        written_s=round(time.time()),
        running=facts.state == "Running",
        grids=sample_grids(log_folder),
        real=real_patches(log_folder),
        curves=[(caption, figure_uri(figure)) for caption, figure in curves({"": run})] if run.lines else [],
        scores=[score_cells(row, run.scores[-1]) for row in run.scores[-10:][::-1]],
        settings={name.replace("_", " "): plain(value) for name, value in facts.settings.items()},
    )
    write_text(log_folder / REPORT, page)


def status(run: History, facts: Facts) -> str:
    """One sentence: state, epoch, images, speed, time left."""
    text = f"{facts.state}: epoch {facts.epoch:.1f} of {facts.epochs}, {facts.images:,} of {facts.images_total:,} images"
    last = run.lines[-1] if run.lines else {}
    if finite(last.get("img_s")):
        text += f", {last['img_s']:.1f} images/s"
    if facts.state == "Running" and finite(last.get("left_s")):
        text += f", {'over' if facts.growing else 'about'} {duration(last['left_s'])} left"
    return text + "."


def plain(value) -> str:
    """A setting for people: dictionaries and lists without brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def score_cells(row: dict, newest: dict) -> list[str]:
    """An evaluation as cells of a table; a dash for what was not measured. newest: the one whose patches need no mention."""
    kid = f"{row['kid']:.4f}" if finite(row.get("kid")) else "–"
    error = f" ({row['kid_se']:.4f})" if finite(row.get("kid_se")) else ""
    shares = [f"{row[name]:.2f}" if finite(row.get(name)) else "–" for name in ("precision", "recall")]
    others = " (other real patches)" if scored_alike(row, newest) is False else ""
    return [f"{row['epoch']:.0f}{others}", kid + error, *shares]


# -- pictures


def sample_grids(log_folder: Path, most: int = GRIDS) -> list[Grid]:
    """At most ``most`` of samples/epoch_*.png, evenly chosen, the first and the newest always; unreadable ones are left out."""
    found = ((re.fullmatch(r"epoch_(\d+)\.png", path.name), path) for path in (log_folder / "samples").glob("epoch_*.png"))
    files = sorted((int(match[1]), path) for match, path in found if match)
    chosen = [(epoch, picture(path)) for epoch, path in evenly(files, most)]
    return [Grid(epoch, address) for epoch, address in chosen if address]


def real_patches(log_folder: Path) -> str:
    """samples/real.png as ``data:`` address, "" where there is none."""
    return picture(log_folder / "samples" / "real.png")


def evenly(items: list, most: int) -> list:
    """At most ``most`` items, evenly spread, the last always among them (and the first, from two on)."""
    if len(items) <= most:
        return items
    if most == 1:
        return items[-1:]
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def picture(path: Path) -> str:
    """A picture file as ``data:`` address of at most GRID_BYTES, "" when it is absent or damaged."""
    try:
        return _encoded(path, path.stat().st_mtime_ns)
    except (OSError, SyntaxError):  # Pillow raises SyntaxError for a damaged PNG
        return ""


@lru_cache(maxsize=64)  # a page shows the pictures of the page before, and one more
def _encoded(path: Path, changed: int) -> str:
    with Image.open(path) as file:
        image = file.convert("RGB")
    address = ""
    for side, quality in GRID_QUALITIES:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        address = data_uri(image, "JPEG", quality)
        if len(address) * 3 / 4 <= GRID_BYTES:
            break
    return address


# -- curves


def curves(runs: dict[str, History]) -> list[tuple[str, object]]:
    """(caption, matplotlib figure) of losses, D accuracy and, where recorded, KID over epochs; a lone run has the name ""."""
    losses, accuracy = _axes("loss"), _axes("share judged rightly")
    for number, (name, run) in enumerate(runs.items()):
        dash = ("-", "--")[number]
        for axes, names in ((losses, LOSSES), (accuracy, ACCURACIES)):
            for colour, (key, label) in zip(COLOURS, names.items(), strict=False):
                epochs, shown = thinned(run.lines, key)
                if epochs:
                    axes.plot(epochs, shown, dash, color=colour, linewidth=1.2, label=_legend(f"{name} {label}".strip()))
    accuracy.set_ylim(0, 1.02)
    found = [("Losses", losses), ("Accuracy of the discriminator", accuracy)]
    if any(run.kids for run in runs.values()):
        found.append((f"KID against {_judged_by(runs)}, with its standard error: lower is better", kid_axes(runs)))
    return [(caption, _finished(axes)) for caption, axes in found]


def _judged_by(runs: dict[str, History]) -> str:
    """What real patches the newest KIDs are against, in words: by run where the runs differ."""
    words = {
        name: "training patches, which copies have the best of" if judged_by_training(run) else "held-out patches"
        for name, run in runs.items()
        if run.kids
    }
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return "; ".join(f"{text} ({name})" for name, text in words.items())


def kid_axes(runs: dict[str, History]):
    """KID over epochs with error bars, a line a run."""
    axes = _axes("KID")
    for number, (name, run) in enumerate(runs.items()):
        points = [(row["epoch"], row["kid"], row.get("kid_se") or 0.0) for row in run.kids]
        if points:
            epochs, kids, errors = zip(*points, strict=True)
            axes.errorbar(
                epochs, kids, errors, fmt=("o-", "o--")[number], color=COLOURS[number], capsize=3, label=_legend(name) or None
            )
    reachable = [row["kid_real"] for run in runs.values() for row in run.kids[-1:] if finite(row.get("kid_real"))]
    for level in sorted(set(reachable)):
        axes.axhline(level, color=INK, linewidth=1, linestyle=":", label="real training patches")
    axes.set_ylim(bottom=min([0.0, *(row["kid"] for run in runs.values() for row in run.kids)]))
    return axes


def _legend(text: str) -> str:
    """As it stands: matplotlib reads $ as the border of a formula, and leaves out what begins with an underscore."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def thinned(rows: list[dict], name: str, most: int = POINTS) -> tuple[list[float], list[float]]:
    """Epochs and values of the finite numbers called ``name``; neighbours are averaged where there are more than ``most``."""
    points = [(row["epoch"], row[name]) for row in rows if finite(row.get(name)) and finite(row.get("epoch"))]
    step = -(-len(points) // most) or 1
    parts = [points[start : start + step] for start in range(0, len(points), step)]
    return [mean(x for x, _ in part) for part in parts], [mean(y for _, y in part) for part in parts]


def _axes(ylabel: str):
    from matplotlib.figure import Figure  # a second to import, so only when there is something to draw

    axes = Figure(figsize=(7, 2.8)).subplots()
    axes.set_xlabel("epoch", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _finished(axes):
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return axes.figure
