"""Two runs side by side, from their log folders: pictures, curves, speed, and what the numbers say to do next."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median

from common.errors import UserError
from common.files import write_text
from common.html import figure_uri, render
from common.progress import say
from training.report import curves, picture, real_patches, sample_grids
from training.runlog import METRICS, duration, read_metrics
from training.verdict import Advice, History, compare, finite, history, judged_like_held_out, side_of, untested, values, warnings

_TEMPLATE = """{% extends "page.html" %}
{% block body %}
<style>
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.pair img { width: 100%; border-radius: .3rem; background: #fff } .pair figure { margin: 0 }
.numbers { table-layout: fixed; width: 100% }
.numbers th { overflow-wrap: anywhere; hyphens: auto }
</style>
<section><h2>What to do, by the numbers: {{ advice.action }}</h2>
<ul>{% for reason in advice.reasons %}<li>{{ reason }}</li>{% endfor %}</ul>
</section>
<section><h2>In numbers</h2><table class="numbers"><tr><th></th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr><th>{{ row[0] }}</th><td>{{ row[1] }}</td><td>{{ row[2] }}</td></tr>{% endfor %}</table>
</section>
<section><h2>Newest samples</h2><div class="pair">
{% for name, epoch, address in grids %}
<figure><img src="{{ address }}" alt="samples of {{ name }}"><figcaption>{{ name }}, epoch {{ epoch }}</figcaption></figure>
{% endfor %}
{% if real %}<figure><img src="{{ real }}" alt="real patches"><figcaption>Real training patches</figcaption></figure>{% endif %}
</div></section>
<section><h2>Curves</h2><div class="pair">
{% for caption, address in curves %}
<figure><figcaption>{{ caption }}</figcaption><img src="{{ address }}" alt="{{ caption }}"></figure>
{% endfor %}
</div></section>
{% endblock %}"""


def compare_runs(a: Path, b: Path, out: Path) -> int:
    """Print what two log folders of train.py say about each other and write ``out``/compare.html; returns the exit code 0.

    Raises UserError when a folder is no log folder or holds no log line yet.
    """
    runs, names = (read_run(a), read_run(b)), distinct_names(a, b)
    advice, rows = compare(names, runs), table(runs)
    for row in [("", *names), *rows]:
        say(f"{row[0]:>28}  {row[1]:<28}  {row[2]}")
    say("\n".join([f"by the numbers: {advice.action}", *(f"  {reason}" for reason in advice.reasons)]))
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "compare.html", page((a, b), names, runs, advice, rows))
    say(f"report: {out / 'compare.html'}")
    return 0


def page(folders: tuple[Path, Path], names: tuple[str, str], runs: tuple[History, History], advice: Advice, rows: list) -> str:
    """The HTML of a comparison."""
    newest = [(name, grid) for name, folder in zip(names, folders, strict=True) for grid in sample_grids(folder, 1)]
    return render(
        _TEMPLATE,
        f"{names[0]} and {names[1]}",
        names=names,
        advice=advice,
        rows=rows,
        grids=[(name, grid.epoch, grid.address) for name, grid in newest],
        real=real_patches(folders[0]) or picture(folders[1] / "samples" / "real.png"),
        curves=[(caption, figure_uri(figure)) for caption, figure in curves(dict(zip(names, runs, strict=True)))],
    )


def read_run(folder: Path) -> History:
    """The numbers of a log folder. Raises UserError when there are none."""
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder} holds no {METRICS}; name two log folders of train.py, such as logs/RUN")
    run = history(read_metrics(folder / METRICS)[0])
    if not run.lines:
        raise UserError(f"{folder / METRICS} has no log line yet; wait for the run's first minute")
    return run


def distinct_names(a: Path, b: Path) -> tuple[str, str]:
    """The folders' own names, their paths where these are the same."""
    names = a.resolve().name, b.resolve().name
    return names if names[0] != names[1] else (str(a), str(b))


def table(runs: tuple[History, History]) -> list[tuple[str, str, str]]:
    """(what, of the first run, of the second run), as text."""
    columns = [column(run) for run in runs]
    return [(what, columns[0][what], columns[1][what]) for what in columns[0]]


def column(run: History) -> dict[str, str]:
    """What a comparison shows of one run; a dash for what was not recorded."""
    last, speed = run.lines[-1], median(values(run.lines, "img_s") or [0.0])
    before = next((row for row in reversed(run.lines) if row["epoch"] < last["epoch"]), {"images": 0, "epoch": 0.0})
    epochs = last["epoch"] - before["epoch"]  # the latest ones: the folder may have had fewer patches once
    epoch_images = (last["images"] - before["images"]) / epochs if epochs else 0.0
    score = run.kids[-1] if run.kids else {}
    best = min(run.kids, key=lambda row: row["kid"], default={})
    return {
        "epochs": f"{last['epoch']:.1f}",
        "images": f"{last['images']:,}",
        "image side, pixels": side_text(run),
        "last KID (standard error)": kid_text(score),
        "best KID (standard error)": kid_text(best),
        "precision, recall": f"{share(score.get('precision'))}, {share(score.get('recall'))}",
        "D right on real, held-out": f"{recent(run, judged_like_held_out(run))}, {recent(run, 'acc_held_out')}",
        "images per second": f"{speed:.1f}" if speed else "–",
        "time per epoch": duration(epoch_images / speed) if speed and epoch_images else "–",
        "warnings": " ".join(filter(None, [*warnings(run), untested(run)])) or "none",
    }


def side_text(run: History) -> str:
    """Side of the images that come out, and that of their painting where it is larger."""
    side, painted = side_of(run), run.lines[-1].get("res")
    if side is None:
        return "–"
    return f"{side}, painted at {painted}" if finite(painted) and painted > side else f"{side}"


def recent(run: History, name: str) -> str:
    """Mean of the newest log lines, as text."""
    numbers = values(run.window or run.lines, name)
    return share(mean(numbers) if numbers else None)


def kid_text(row: dict) -> str:
    """0.2000 (0.0100) at epoch 20."""
    if not finite(row.get("kid")):
        return "–"
    error = f" ({row['kid_se']:.4f})" if finite(row.get("kid_se")) else ""
    return f"{row['kid']:.4f}{error} at epoch {row['epoch']:.0f}"


def share(value) -> str:
    """A share with two decimals, a dash when it is not known."""
    return f"{value:.2f}" if finite(value) else "–"
