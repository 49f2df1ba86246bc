"""The page of a run, and what is read out of its numbers, on made-up metrics."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.html import figure_uri
from models.config import dcgan_config
from tests.scripts import run_script
from training import verdict
from training.compare import column, distinct_names, side_text
from training.config import TrainConfig
from training.report import GRID_BYTES, GRIDS, Facts, curves, evenly, picture, sample_grids, thinned, write_run_report
from training.run import Habits, HeldOut, Run
from training.runlog import RunLog
from training.signals import SignalRequests
from training.trainer import Trainer
from training.verdict import History, advise, compare, history, warnings

FACTS = Facts("Running", 3000, 6000, 30.0, 60, {"model": "dcgan", "augmentation": {"flips": 0.5}, "patches": "<b>patches</b>"})


def lines(count=30, **numbers):
    """Log lines of 100 images and one epoch each; a number may be a function of the line's place, 0..1."""
    usual = {"res": 64, "loss_d": 0.8, "loss_g": 3.0, "acc_real": 0.8, "acc_fake": 0.8, "img_s": 50.0, "wait": 0.01}
    rows = []
    for place in range(count):
        row = {name: value(place / count) if callable(value) else value for name, value in (usual | numbers).items()}
        rows.append({"images": 100 * (place + 1), "epoch": place + 1.0} | row)
    return rows


def scores(*kids, error=0.01):
    """Evaluations every five epochs of ``lines``."""
    places = range(5, 5 * len(kids) + 1, 5)
    rows = zip(places, kids, strict=True)
    return [{"images": 100 * n, "epoch": float(n), "kid": kid, "kid_se": error} for n, kid in rows]


def run_of(*kids, error=0.01, held_out=0.78, score=None, **numbers):
    """A run; held_out None: without held-out patches. score: further numbers of each evaluation."""
    numbers |= {} if held_out is None else {"acc_held_out": held_out}
    return History(lines(**numbers), [row | (score or {}) for row in scores(*kids, error=error)])


ALIKE = {"spread": 0.72, "spread_of": "benign"}
FALLING, FLAT = (0.5, 0.4, 0.3, 0.2), (0.201, 0.2, 0.202, 0.2, 0.199)


def test_rows_are_sorted_into_lines_and_evaluations():
    run = history([*lines(2), *scores(0.5), {"images": 1, "epoch": 0.0, "acc_held_out": 0.7}])
    assert len(run.lines) == 2 and len(run.scores) == 1


def test_a_healthy_run_raises_nothing():
    assert warnings(run_of(*FALLING, score=ALIKE)) == []  # images are small yet
    assert warnings(run_of(*FALLING, score=ALIKE | {"images": 20_000, "spread": 0.77})) == []
    assert warnings(run_of(*FALLING)) == []
    assert warnings(History([], [])) == [] and warnings(History(lines(1), [])) == []


@pytest.mark.parametrize(
    "run, words",
    [
        (run_of(held_out=0.95, acc_real=0.97, acc_fake=0.98, loss_g=lambda place: 3 + 5 * place), "discriminator is winning"),
        (run_of(0.5, 0.4, held_out=0.6), "by heart"),
        (run_of(*FALLING, score=ALIKE | {"images": 20_000}), "The images of benign look alike: they vary 72% as much"),
        (run_of(0.4, 0.2, 0.21, 0.22, 0.21), "KID has not improved over the last 3"),
        (run_of(0.03, 0.15, 0.31), "KID was 0.0300 at epoch 5 and is 0.3100 now"),
        (run_of(0.05, 0.03, 0.02, 0.012, 0.31), "best.pt holds the better state"),
        (run_of(diversity=0.3, images=lambda place: 10_000 + 100 * round(30 * place)), "mode collapse"),
        (run_of(wait=0.2), "20% of the time"),
        (History(lines(12)[:-1] + [lines(12)[-1] | {"loss_g": None}], []), "diverged: loss_g"),
        (History(lines(12)[:-1] + [lines(12)[-1] | {"grad_d": float("inf")}], []), "diverged: grad_d"),
    ],
)
def test_each_fault_is_named_and_alone(run, words):
    found = warnings(run)
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize(
    "run",
    [
        run_of(held_out=0.95, acc_real=0.97, acc_fake=0.98),  # strong, and the generator keeps up
        run_of(held_out=0.95, acc_real=0.97, acc_fake=0.6, loss_g=lambda place: 3 + 5 * place),
        run_of(0.5, 0.4, held_out=0.66),
        run_of(0.4, 0.3, 0.21, 0.22, 0.2),  # the newest is the best
        run_of(0.2, 0.21, 0.22),  # too few to say
        run_of(0.2, 0.5, 0.4, 0.35, 0.3),  # worse, and on its way back
        run_of(diversity=0.3),  # a young DCGAN's, which comes back by itself
        run_of(wait=0.05),
    ],
)
def test_what_is_no_fault_is_not_named(run):
    assert warnings(run) == []


def test_the_gap_to_held_out_patches_is_that_of_the_recent_lines_and_unknown_while_they_swing_too_far():
    old, new = lines(10, acc_held_out=0.8), lines(10, acc_held_out=0.5)
    assert verdict.overfit_gap(History(old + new, [])) == pytest.approx(0.3)
    assert verdict.overfit_gap(History(new[:9], [])) is None and verdict.overfit_gap(History(lines(), [])) is None
    swings = [line | {"acc_held_out": 0.1 + 0.8 * (place % 2)} for place, line in enumerate(lines(100))]
    assert verdict.overfit_gap(History(swings[:10], [])) is None  # 0.3 with an error of 0.13
    assert verdict.overfit_gap(History(swings * 10, [])) == pytest.approx(0.3)  # 0.04


def test_the_gap_is_to_training_patches_that_were_judged_like_the_held_out_ones():
    run = run_of(0.5, 0.4, acc_real=0.7, acc_trained=0.95, held_out=0.72)
    assert verdict.overfit_gap(run) == pytest.approx(0.23)
    assert "23 points" in warnings(run)[0]


@pytest.mark.parametrize(
    "run, action, words",
    [
        (run_of(), verdict.UNKNOWN, "--eval_every"),
        (run_of(0.5), verdict.TRAIN_ON, "no direction"),
        (run_of(*FALLING), verdict.TRAIN_ON, "still falling: by 0.3000"),
        (run_of(0.2, 0.2), verdict.TRAIN_ON, "too few"),
        (run_of(*FLAT), verdict.SWITCH, "changed by -0.0010"),
        (run_of(*FLAT, held_out=0.79), verdict.SWITCH, "not short of data"),
        (run_of(*FLAT, held_out=0.5), verdict.MORE_DATA, "run out of data"),
        (run_of(*FLAT, held_out=None), verdict.UNKNOWN, "no patches are held out"),
        (History(lines(5, acc_held_out=0.78), scores(*FLAT)), verdict.UNKNOWN, "too few log lines"),
        (run_of(*FLAT, held_out=lambda place: 0.1 + 0.8 * (round(30 * place) % 2)), verdict.UNKNOWN, "swings too far"),
        (run_of(*FLAT, score={"model": "dcgan"}), verdict.SWITCH, "--model improved"),
        (run_of(*FLAT, score={"model": "improved"}), verdict.STOP, "another --seed"),
        (run_of(*FLAT, score={"kid_real": 0.19}), verdict.STOP, "that of real training patches"),
        (run_of(*FALLING, score={"kid_real": 0.19}), verdict.TRAIN_ON, "still falling"),
        (run_of(0.1, 0.15, 0.2, 0.3), verdict.GO_BACK, "KID was 0.1000 at epoch 5 and is 0.3000 now"),
        (run_of(0.03, 0.31), verdict.GO_BACK, "--resume best.pt"),
        (run_of(0.2, 0.5, 0.4, 0.35, 0.3), verdict.TRAIN_ON, "falling again: by 0.2000"),
        (run_of(*FALLING, diversity=0.3, images=lambda place: 10_000 + 100 * round(30 * place)), verdict.GO_BACK, "mode collapse"),
        (run_of(*FALLING, loss_g=lambda place: None if place > 0.95 else 3.0), verdict.GO_BACK, "has diverged"),
    ],
)
def test_advice(run, action, words):
    advice = advise(run)
    assert advice.action == action and words in " ".join(advice.reasons)


def test_a_fall_within_its_error_is_flat():
    kids = (0.23, 0.22, 0.21, 0.2)
    assert advise(run_of(*kids, error=0.005)).action == verdict.TRAIN_ON
    assert advise(run_of(*kids, error=0.02)).action == verdict.SWITCH


def drawn(*kids, scored_on="a", **numbers):
    """As ``run_of``, with a quarter of the error by the draw of the generated images alone."""
    rows = [row | {"kid_se_drawn": row["kid_se"] / 4, "scored_on": scored_on} for row in scores(*kids, **numbers)]
    return History(lines(acc_held_out=0.78), rows)


def test_scores_against_the_same_patches_differ_by_the_draw_of_the_images_alone():
    kids = (0.23, 0.22, 0.21, 0.2)
    assert advise(run_of(*kids, error=0.02)).action == verdict.SWITCH
    assert advise(drawn(*kids, error=0.02)).action == verdict.TRAIN_ON
    others = drawn(*kids, error=0.02)
    others.scores[-1]["scored_on"] = "b"  # the patches were changed on the way
    assert "One evaluation shows no direction yet" in advise(others).reasons[0]


def test_scores_before_the_patches_changed_are_no_measure_of_those_since():
    run = drawn(0.05, 0.03, 0.02, 0.040, 0.036, 0.032, 0.028, error=0.001)
    assert "falling again" in advise(run).reasons[0] and "KID was 0.0200" in advise(run).reasons[1]
    for row in run.scores[:3]:
        row["scored_on"] = "before"
    assert advise(run).reasons == [advise(run).reasons[0]] and "still falling: by 0.0120 over the last 3" in advise(run).reasons[0]


@pytest.mark.parametrize(
    ("loss", "named"), [(-5.0, False), (lambda place: -5 - place, False), (lambda place: -5 + 2 * place, True)]
)
def test_a_negative_loss_that_does_not_rise_is_no_sign_of_a_winning_discriminator(loss, named):
    run = run_of(acc_real=0.97, acc_fake=0.98, loss_g=loss)
    assert bool(verdict.discriminator_wins(run)) == named


def test_runs_scored_against_different_patches_are_not_ranked():
    good, bad = drawn(*FALLING), drawn(0.6, 0.6, 0.6, 0.6)
    first = compare(("A", "B"), (good, bad)).reasons[0]
    assert (
        "by 0.4000, more than twice the standard error (0.0035)" in first and "Seeds alone make KIDs differ by some 0.004" in first
    )
    other = compare(("A", "B"), (good, drawn(0.6, 0.6, 0.6, 0.6, scored_on="b")))
    assert other.action == verdict.UNKNOWN and "different real patches" in other.reasons[0]
    old, said = compare(("A", "B"), (good, run_of(0.6, 0.6, 0.6, 0.6))).reasons[:2]
    assert "their logs do not say" in said and "their logs do not say" not in first
    assert "the standard error (0.0141)" in old  # of both sides, since the older log does not say by which patches


def test_two_runs_are_ranked_only_where_the_numbers_rank_them():
    names, good, bad = ("A", "B"), run_of(*FALLING), run_of(*FLAT[:3], 0.4, 0.4)
    worse = History(bad.lines, scores(0.6, 0.61, 0.6, 0.6))
    assert compare(names, (good, worse)).action == "A: train on"
    assert compare(names, (worse, good)).action == "B: train on"
    level = compare(names, (run_of(*FLAT), run_of(*FLAT)))
    assert level.action == verdict.SWITCH and "neither is ahead" in level.reasons[0]
    unknown = compare(names, (good, run_of()))
    assert (
        unknown.action == verdict.UNKNOWN
        and "No KID was recorded in B" in unknown.reasons[0]
        and "--eval_every" in unknown.reasons[0]
    )
    unscored = History(lines(acc_held_out=0.78, res=128, side=64), [])
    assert verdict.side_of(unscored) == 64 and side_text(unscored) == "64, painted at 128" and side_text(good) == "64"
    painted = History(lines(acc_held_out=0.78, res=128), [row | {"side": 64} for row in scores(*FALLING)])
    assert compare(names, (good, painted)).action == compare(names, (good, good)).action  # scored at 64 pixels as well
    growing = History(lines(acc_held_out=0.78), [row | {"side": 256} for row in scores(*FALLING)])
    assert "64 and 256 pixels" in compare(names, (good, growing)).reasons[0]
    sizes = compare(names, (good, run_of(*FALLING, res=128)))
    assert sizes.action == verdict.UNKNOWN and "64 and 128" in sizes.reasons[0]


def test_a_younger_run_that_still_falls_is_not_dropped():
    young, old = run_of(0.9, 0.6), run_of(*FLAT)
    assert "train it on" in " ".join(compare(("young", "old"), (young, old)).reasons)
    assert "train it on" not in " ".join(compare(("young", "old"), (run_of(0.9, 0.9, 0.9, 0.9, 0.9), old)).reasons)


def test_the_choice_of_grids_is_even_and_keeps_the_newest():
    assert evenly(list(range(100)), 5)[0] == 0 and evenly(list(range(100)), 5)[-1] == 99
    assert np.ptp(np.diff(evenly(list(range(100)), 24))) <= 1
    assert evenly([1, 2], 24) == [1, 2] and evenly([1, 2], 1) == [2]


def test_long_curves_are_averaged_and_gaps_left_out():
    epochs, numbers = thinned(lines(1000, loss_g=lambda place: None if place == 0 else 2.0), "loss_g", 100)
    assert 90 <= len(epochs) <= 100 and set(numbers) == {2.0} and epochs == sorted(epochs)


def write_run(folder, rows, grids=3, side=64):
    """A log folder with metrics and sample pictures of noise, the hardest to compress."""
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    random = np.random.default_rng(0)
    for name in ("real", *(f"epoch_{5 * n:04d}" for n in range(1, grids + 1))):
        Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / "samples" / f"{name}.png")
    return folder


def test_the_page_holds_everything_and_fetches_nothing(tmp_path):
    folder = write_run(tmp_path / "run_7", [*lines(wait=0.2, left_s=90.0), *scores(*FALLING)])
    write_run_report(folder, FACTS)
    page = (folder / "report.html").read_text()
    assert "Training run run_7" in page and "epoch 30.0 of 60" in page and "about 1m30s left" in page
    write_run_report(folder, replace(FACTS, growing=True))
    assert "over 1m30s left" in (folder / "report.html").read_text()
    assert "20% of the time" in page and "train on" in page and "flips 0.5" in page
    assert "&lt;b&gt;patches" in page and "<b>patches" not in page
    assert re.findall(r'data-epoch="(\d+)"( hidden)?', page) == [("5", " hidden"), ("10", " hidden"), ("15", "")]
    assert page.count("data:image/jpeg") == 4 and page.count("data:image/svg") == 3 and "0.2000 (0.0100)" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "@import" not in page


def test_evaluations_against_other_patches_are_marked(tmp_path):
    run = drawn(*FALLING)
    run.scores[0]["scored_on"] = "before"
    write_run_report(write_run(tmp_path / "run", [*run.lines, *run.scores]), FACTS)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("(other real patches)") == 1 and "<td>5 (other real patches)</td><td>0.5000 (0.0100)</td>" in page


@pytest.mark.parametrize("against", ["training", "held-out"])
def test_it_says_what_kid_is_against(against, tmp_path):
    run = run_of(*FALLING)
    rows = [row | {"against": against} for row in run.scores]
    write_run_report(write_run(tmp_path / "run", [*run.lines, *rows]), FACTS)
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"KID against {against} patches" in page and ("cannot tell learning from copying" in page) == (against == "training")


def test_runs_that_are_judged_by_unlike_patches_are_told_apart():
    one, other = drawn(*FALLING), drawn(*FALLING)
    one.scores[-1]["against"] = "training"
    caption = curves({"a": one, "b": other})[-1][0]
    assert "training patches, which copies have the best of (a); held-out patches (b)" in caption


@pytest.mark.parametrize("name", ["a$\\frac$", "_u"])
def test_a_run_may_have_any_name(name):
    for _, figure in curves({name: run_of(*FALLING), "b": run_of(*FALLING)}):
        assert figure_uri(figure)
        assert any(name in text.get_text().replace("\\$", "$") for text in figure.axes[0].get_legend().get_texts())


def test_what_a_few_lines_cannot_tell_is_not_called_right(tmp_path):
    for count, words in ((2, "Too few log lines (2 of 10) to judge"), (10, "Nothing in the numbers looks wrong.")):
        folder = write_run(tmp_path / str(count), lines(count))
        write_run_report(folder, FACTS)
        page = (folder / "report.html").read_text()
        assert words in page and ("Nothing in the numbers" in page) == (count == 10)
    assert column(History(lines(10), []))["warnings"] == "none"
    assert column(History(lines(9), []))["warnings"].startswith("Too few log lines (9 of 10)")


def test_a_run_that_has_just_begun_or_lacks_pictures_has_a_page(tmp_path):
    write_run_report(tmp_path, FACTS)
    assert "No log line yet" in (tmp_path / "report.html").read_text()


def test_damage_costs_a_picture_or_is_named(tmp_path):
    folder = write_run(tmp_path / "run", lines())
    newest = folder / "samples" / "epoch_0015.png"
    newest.write_bytes(newest.read_bytes()[:2000])
    (folder / "samples" / "epoch_best.png").write_text("not a picture")
    assert [grid.epoch for grid in sample_grids(folder)] == [5, 10]
    assert picture(folder / "absent.png") == ""
    (folder / "metrics.jsonl").write_text('nonsense\n{"images": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        write_run_report(folder, FACTS)


def test_pictures_are_bounded_and_follow_their_file(tmp_path):
    folder = write_run(tmp_path / "run", [], grids=1, side=1100)
    path = folder / "samples" / "epoch_0005.png"
    first = picture(path)
    assert 10_000 < len(first) * 3 / 4 <= GRID_BYTES
    assert (GRIDS + 1) * GRID_BYTES * 4 / 3 < 8e6
    Image.new("RGB", (30, 30), "pink").save(path)
    assert picture(path) != first


@pytest.fixture
def run(tmp_path):
    """A run of a small DCGAN that has not taken a step."""
    trainer = Trainer(dcgan_config(64, 0), TrainConfig("patches", "none", epochs=2), [], [10], 10, torch.device("cpu"))
    return Run(trainer, Habits(1, 1, 0, 1), tmp_path, RunLog(tmp_path), SignalRequests())


def test_a_line_judges_as_many_training_patches_as_held_out_ones_and_few_beside_those_trained_on(run, monkeypatch):
    asked = []
    unseen, trained_on = (lambda count, seed, fill=fill: (torch.full((count, 1), fill), None) for fill in (0.0, 1.0))
    run.held_out = HeldOut(unseen, trained_on, None)
    monkeypatch.setattr(run.trainer, "share_judged_real", lambda images, labels: asked.append(len(images)) or images.mean().item())
    for seen in (0, 300, 10_000):
        run.meter.images = seen
        assert run._judged() == {"acc_held_out": 0.0, "acc_trained": 1.0}
    assert asked == [8, 8, 12, 12, 32, 32]


def test_a_run_writes_its_page_and_outlives_a_failure(run, tmp_path, capsys):
    run.write_report("Running")
    page = (tmp_path / "report.html").read_text()
    assert "Running: epoch 0.0 of 2, 0 of 20 images" in page and "patches an epoch" in page and "batch size" in page
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    run.write_report("Running")
    assert "report.html could not be written" in capsys.readouterr().out


def test_a_run_that_diverges_says_so_on_its_page(run, tmp_path):
    spoilt = torch.full((8, 3, 64, 64), float("nan")), torch.zeros(8, dtype=torch.long)
    with pytest.raises(UserError, match="again after going back once"):
        run.train(lambda: [spoilt] * 200)
    assert "The run has diverged: loss_d, loss_g" in (tmp_path / "report.html").read_text()


def test_compare_says_why_and_writes_one_page(tmp_path):
    a = write_run(tmp_path / "a", [*lines(img_s=20.0), *scores(*FALLING)])
    b = write_run(tmp_path / "b", [*lines(20), *scores(0.6, 0.6, 0.6, 0.6)], grids=1)
    text = run_script("evaluate", "--compare", a, b, "--out", tmp_path / "out")
    assert "by the numbers: a: train on" in text and "a has the better KID by 0.4000" in text
    assert re.search(r"last KID.*0\.2000 \(0\.0100\) at epoch 20 +0\.6000", text)
    assert re.search(r"images per second +20\.0 +50\.0", text) and re.search(r"time per epoch +5s +2s", text)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("data:image/jpeg") == 3 and page.count("data:image/svg") == 3 and "a, epoch 15" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_compare_refuses_what_is_no_run(tmp_path):
    run = write_run(tmp_path / "run", lines())
    assert "holds no metrics.jsonl" in run_script("evaluate", "--compare", run, tmp_path, expect=1)
    assert "not allowed with" in run_script("evaluate", "--compare", run, run, "--images", run, expect=2)
    assert "expected 2 arguments" in run_script("evaluate", "--compare", run, expect=2)
    assert distinct_names(Path("x/run"), Path("y/run")) == ("x/run", "y/run")
    (tmp_path / "metrics.jsonl").write_text("")
    assert "no log line yet" in run_script("evaluate", "--compare", run, tmp_path, expect=1)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser_the_slider_moves_and_nothing_complains(tmp_path, width):
    folder = write_run(tmp_path / "run", [*lines(), *scores(*FALLING)])
    write_run_report(folder, FACTS)
    probe = """<script>
    const shown = () => figures.filter(f => f.offsetHeight > 0).map(f => f.dataset.epoch).join();
    const seen = [shown()];
    slider.value = 0; slider.dispatchEvent(new Event("input")); seen.push(shown());
    const room = document.documentElement;
    document.title = [...seen, document.getElementById("epoch").textContent, slider.offsetHeight > 0,
                      room.scrollWidth <= room.clientWidth].join(";");
    </script></body>"""
    page = folder / "probe.html"
    page.write_text((folder / "report.html").read_text().replace("</body>", probe))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900"]
    place = [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    result = subprocess.run(["chromium", *flags, *place], capture_output=True, text=True, timeout=120)
    assert "<title>15;5;5;true;true</title>" in result.stdout
    assert "CONSOLE" not in result.stderr
