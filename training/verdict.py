"""What the numbers of metrics.jsonl say about a run, in plain words: warnings, and whether to train on, add data, switch or stop.

Pure functions of the rows that training wrote. Every limit stands in a constant, with its reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean, stdev

from common.weights import INSTALL

WAIT_LIMIT = 0.05  # of the time; below it a faster loader is not felt
WINNING = 0.9  # D right on this share of both kinds: its gradient is saturating
WINNING_RISE = 1.05  # of loss_g within the window; a strong D alone is no fault, one that G cannot follow is
BY_HEART = 0.15  # acc_trained - acc_held_out, with room for other slides; known only where its standard error is at most half of it
COLLAPSED = 0.4  # diversity beside real batches; good runs stay above 0.6 once they have found it,
SPREAD = 0.75  # of a label's images beside its patches in Inception's features: held-out patches stay above (docs/evaluation.md)
SPREAD_FROM = 20_000  # images: small ones, enlarged, are alike (0.75 after 10 epochs of a good run, 0.77 and more from 20 on)
COLLAPSED_FROM = 10_000  # images: a young DCGAN's falls to 0.16 and comes back by itself
LINES = 10  # log lines, at least, that a mean needs to be steadier than the limits
SEEDS = 0.004  # standard deviation of KID among runs that differ by their seed alone: three seeds in docs/experiments.md
SCORES = 3  # evaluations without a new best before "not improving" is said
AS_REAL = (
    "KID is {kid:.4f}, that of real training patches against the same held-out ones {kid_real:.4f}: no difference that this many "
    "images show. Labels, copies and patterns it does not see: run evaluate.py."
)
HOW_TO_KID = f"train with --eval_every (20 is the default) and the feature weights installed: {INSTALL}"

TRAIN_ON, GO_BACK, MORE_DATA, SWITCH, STOP, UNKNOWN = (
    "train on",
    "go back",
    "more data",
    "another model",
    "stop here",
    "cannot tell",
)


@dataclass(frozen=True)
class History:
    """Rows of one run in order. lines: those of the log (losses, D accuracy, speed). scores: those of the evaluations."""

    lines: list[dict]
    scores: list[dict]

    @property
    def kids(self) -> list[dict]:
        """Evaluations that have a KID, against the same patches as the last one: a resumed run may have got others."""
        rows = [row for row in self.scores if finite(row.get("kid"))]
        return [row for row in rows if scored_alike(row, rows[-1]) is not False]

    @property
    def window(self) -> list[dict]:
        """The last tenth of the log lines, at least LINES of them; [] when there are fewer."""
        return self.lines[-max(LINES, len(self.lines) // 10) :] if len(self.lines) >= LINES else []


@dataclass(frozen=True)
class Advice:
    """What to do next (one of the actions above) and why, a sentence a reason."""

    action: str
    reasons: list[str]


def finite(value) -> bool:
    """True for a number that is not NaN or infinite; metrics.jsonl has null in their place."""
    return isinstance(value, int | float) and math.isfinite(value)


def values(rows: list[dict], name: str) -> list[float]:
    """The finite numbers called ``name``."""
    return [row[name] for row in rows if finite(row.get(name))]


def history(rows: list[dict]) -> History:
    """Sort the rows of metrics.jsonl into log lines and evaluations."""
    lines = [row for row in rows if "loss_d" in row]
    return History(lines, [row for row in rows if "loss_d" not in row and "kid" in row])


# -- warnings


def warnings(run: History) -> list[str]:
    """A sentence or two for everything that looks wrong, the worst first."""
    tests = (not_finite, collapses, a_label_collapses, discriminator_wins, learns_by_heart, kid_rises, kid_stalls, waits_for_data)
    return [text for test in tests if (text := test(run))]


def untested(run: History) -> str:
    """A sentence where ``warnings`` could not look for all that they look for; "" where they could."""
    if run.window:
        return ""
    return f"Too few log lines ({len(run.lines)} of {LINES}) to judge whether the images collapse or the discriminator wins."


def not_finite(run: History) -> str:
    """Numbers in the last log line that are NaN or infinite."""
    names = [name for name, value in run.lines[-1].items() if not finite(value)] if run.lines else []
    if not names:
        return ""
    return (
        f"The run has diverged: {', '.join(names)} at {run.lines[-1]['images']:,} images is not a finite number. "
        "Go on from the last checkpoint (--resume) with half of --lr_g and --lr_d."
    )


def collapses(run: History) -> str:
    """Images of a batch hardly differ."""
    spread = values([row for row in run.window if row["images"] >= COLLAPSED_FROM], "diversity")
    if len(spread) < LINES or mean(spread) > COLLAPSED:
        return ""
    return (
        f"The images are becoming one (mode collapse): over the last {len(spread)} log lines a batch varied {mean(spread):.0%} as "
        "much as real patches do. Look at the newest grid; go back to an earlier checkpoint with a smaller --lr_g."
    )


def a_label_collapses(run: History) -> str:
    """The images of one label look alike by the newest evaluation."""
    last = run.kids[-1] if run.kids else {}
    if last.get("images", 0) < SPREAD_FROM or not finite(last.get("spread")) or last["spread"] > SPREAD:
        return ""
    return (
        f"The images of {last.get('spread_of', 'one label')} look alike: they vary {last['spread']:.0%} as much as its patches do. "
        "Look at its row in the newest grid; it may come back by itself, else another --seed helps."
    )


def discriminator_wins(run: History) -> str:
    """D right about nearly everything while the generator's loss rises."""
    real, fake, losses = (values(run.window, name) for name in ("acc_real", "acc_fake", "loss_g"))
    if not (real and fake and len(losses) >= LINES) or min(mean(real), mean(fake)) < WINNING:
        return ""
    half = len(losses) // 2
    before, after = mean(losses[:half]), mean(losses[half:])
    if after - before < (WINNING_RISE - 1) * abs(before):
        return ""
    return (
        f"The discriminator is winning: over the last {len(losses)} log lines it was right about {mean(real):.0%} of the real and "
        f"{mean(fake):.0%} of the generated patches, while the generator's loss rose from {before:.2f} to {after:.2f}. "
        "A smaller --lr_d helps, and so do more patches."
    )


def overfit_gap(run: History) -> float | None:
    """acc_trained - acc_held_out, the mean of the recent log lines; None where too few of them have both.

    Of many lines, because D swings: a DCGAN's takes all of the held-out patches for real at one moment and none a minute later.
    """
    name = judged_like_held_out(run)
    both = [line for line in run.window if finite(line.get(name)) and finite(line.get("acc_held_out"))]
    gaps = [line[name] - line["acc_held_out"] for line in both]
    return mean(gaps) if len(gaps) >= LINES and 2 * stdev(gaps) <= BY_HEART * math.sqrt(len(gaps)) else None


def judged_like_held_out(run: History) -> str:
    """What to hold acc_held_out against. acc_real, of augmented patches and windows, is lower: it serves logs of before."""
    return "acc_trained" if values(run.lines, "acc_trained") else "acc_real"


def learns_by_heart(run: History) -> str:
    """D knows its training patches and not the tissue."""
    gap = overfit_gap(run)
    if gap is None or gap < BY_HEART:
        return ""
    return (
        "The discriminator is learning its patches by heart: it takes "
        f"{100 * gap:.0f} points fewer of the held-out patches for real than of those it trains on. "
        "More slides or more patches help; longer training does as long as KID falls."
    )


def kid_rises(run: History) -> str:
    """The newest KID is worse than the best, and not on its way back."""
    return rise_since_best(run) if len(run.kids) > 1 and not still_falls(run) else ""


def kid_stalls(run: History) -> str:
    """No evaluation among the last few was the best one."""
    kids = run.kids
    if len(kids) <= SCORES:
        return ""
    best, last = min(kids, key=lambda row: row["kid"]), kids[-1]
    if best["images"] >= kids[-SCORES]["images"]:
        return ""
    if still_falls(run) or rise_since_best(run):
        return ""  # what then is wrong or not is said by others
    return (
        f"KID has not improved over the last {SCORES} evaluations: {best['kid']:.4f} at epoch {best['epoch']:.0f} "
        f"and {last['kid']:.4f} now."
    )


def waits_for_data(run: History) -> str:
    """The networks stand still for a noticeable share of the time."""
    waits = values(run.window or run.lines, "wait")
    if not waits or mean(waits) <= WAIT_LIMIT:
        return ""
    return f"{mean(waits):.0%} of the time is spent waiting for patches; raise --workers, or put the patches on a faster disk."


# -- what to do next


def kid_fall(run: History) -> tuple[float, float]:
    """How far KID fell over the last evaluations (at most SCORES steps), and the standard error of that difference.

    The evaluations share their latents, so the error is rather too large than too small.
    """
    first, last = run.kids[-SCORES - 1 :][0], run.kids[-1]
    return first["kid"] - last["kid"], difference_error(first, last)


def still_falls(run: History) -> bool:
    """Whether KID fell over the last evaluations by more than twice its standard error."""
    fall, error = kid_fall(run)
    return fall > 2 * error


def rise_since_best(run: History) -> str:
    """A sentence where the newest KID is worse than the best by more than chance and what seeds make; "" where it is not."""
    best, last = min(run.kids, key=lambda row: row["kid"]), run.kids[-1]
    rise, error = last["kid"] - best["kid"], difference_error(best, last)
    if rise <= 2 * error + SEEDS:
        return ""
    return (
        f"KID was {best['kid']:.4f} at epoch {best['epoch']:.0f} and is {last['kid']:.4f} now, worse by more than twice the "
        f"standard error ({error:.4f}) and what a seed makes: best.pt holds the better state."
    )


def as_near_as_real(row: dict) -> bool:
    """Whether generated images are no further from held-out patches than training patches are, as far as the error tells."""
    return finite(row.get("kid_real")) and row["kid"] <= row["kid_real"] + 2 * (row.get("kid_se") or 0.0)


def scored_alike(one: dict, other: dict) -> bool | None:
    """Whether two evaluations were against the same real patches; None where logs of before do not say."""
    digests = one.get("scored_on"), other.get("scored_on")
    return digests[0] == digests[1] if all(digests) else None


def difference_error(one: dict, other: dict) -> float:
    """Standard error of the difference of two KIDs. What the choice of real patches adds is in both where they are the same."""
    name = "kid_se_drawn" if scored_alike(one, other) else "kid_se"
    return math.hypot(one.get(name) or 0.0, other.get(name) or 0.0)


def judged_by_training(run: History) -> bool:
    """Whether the newest KID is against patches that the networks were trained on."""
    return bool(run.kids) and run.kids[-1].get("against") == "training"


def advise(run: History) -> Advice:
    """Go back where the run broke or got worse; train on while KID falls by more than twice its error; stop where it is that of
    real patches; else more data if D overfits, else another model, or what else the best one can be given."""
    broken = not_finite(run) or collapses(run)
    advice = Advice(GO_BACK, [broken]) if broken else _by_kid(run)
    if not judged_by_training(run):
        return advice
    caution = (
        "KID is against the training patches here, and cannot tell learning from copying: hold slides out (README.md, Slides)."
    )
    return Advice(advice.action, [*advice.reasons, caution])


def _by_kid(run: History) -> Advice:
    kids = run.kids
    if not kids:
        return Advice(UNKNOWN, [f"No KID was recorded, and losses say nothing about quality; {HOW_TO_KID}."])
    if len(kids) < 2:
        return Advice(TRAIN_ON, ["One evaluation shows no direction yet."])
    fall, error = kid_fall(run)
    steps = min(len(kids) - 1, SCORES)
    over = f"over the last {steps} evaluation{'s' if steps > 1 else ''}"
    worse = rise_since_best(run)
    if still_falls(run):
        falling = f"by {fall:.4f} {over}, more than twice its standard error ({error:.4f})."
        return Advice(TRAIN_ON, [f"KID is falling again: {falling}", worse] if worse else [f"KID is still falling: {falling}"])
    if worse:
        way = "Generate from it, or go on from it with smaller steps: --resume best.pt and half of --lr_g and --lr_d."
        return Advice(GO_BACK, [worse, way])
    if as_near_as_real(kids[-1]):
        return Advice(STOP, [AS_REAL.format(**kids[-1])])
    if steps < SCORES:
        return Advice(TRAIN_ON, [f"KID is not clearly falling, but {len(kids)} evaluations are too few to call it flat."])
    change = f"KID rose by {-fall:.4f}" if -fall > 2 * error else f"KID is flat: it changed by {-fall:+.4f}"
    return _when_flat(run, f"{change} {over}, its standard error is {error:.4f}.")


def _when_flat(run: History, flat: str) -> Advice:
    gap = overfit_gap(run)
    if gap is None:
        return Advice(UNKNOWN, [flat, f"Whether more data would help is unknown: {_why_no_gap(run)}."])
    points = f"{100 * gap:.0f} points"
    if gap >= BY_HEART:
        return Advice(MORE_DATA, [flat, f"D knows its own patches better than held-out ones by {points}: it has run out of data."])
    reason = f"D judges held-out patches as it judges its own (difference {points}), so it is not short of data."
    if run.kids[-1].get("model") == "improved":
        more = "There is no better model here: another --seed may do better, and patches of more slides bring variety."
        return Advice(STOP, [flat, reason, more])
    return Advice(
        SWITCH, [flat, reason, "What limits the images is then the model or its settings: --model improved is the default."]
    )


def _why_no_gap(run: History) -> str:
    """Why the log does not tell D's accuracy on held-out patches from that on its own."""
    count = len(values(run.window, "acc_held_out"))
    if not values(run.lines, "acc_held_out"):
        return "no patches are held out (README.md, Slides)"
    if count < LINES:
        return f"too few log lines have D's accuracy on held-out patches ({count} of {LINES})"
    return "D's accuracy on held-out patches swings too far to tell"


# -- two runs


def side_of(run: History) -> int | None:
    """Side in pixels of the images that come out: those of 64 are painted at 128. None where nothing says."""
    newest = [*run.lines[-1:], *run.kids[-1:]]
    return next((row[name] for name in ("side", "res") for row in reversed(newest) if finite(row.get(name))), None)


def compare(names: tuple[str, str], runs: tuple[History, History]) -> Advice:
    """What to do with two runs: which is ahead by KID, whether that can be told, and what the better one needs."""
    missing = [name for name, run in zip(names, runs, strict=True) if not run.kids]
    if missing:
        reason = f"No KID was recorded in {' and '.join(missing)}, so the runs cannot be ranked; {HOW_TO_KID}."
        return Advice(UNKNOWN, [reason, *_each(names, runs)])
    sizes = [side_of(run) for run in runs]
    if all(sizes) and sizes[0] != sizes[1]:
        reason = f"The runs are of {sizes[0]} and {sizes[1]} pixels: KID of different sizes cannot be compared."
        return Advice(UNKNOWN, [reason, *_each(names, runs)])
    bests = [min(run.kids, key=lambda row: row["kid"]) for run in runs]
    if scored_alike(*bests) is False:
        reason = "The runs were scored against different real patches, so their KIDs cannot be ranked; "
        reason += "evaluate.py --checkpoint scores both against the same."
        return Advice(UNKNOWN, [reason, *_each(names, runs)])
    unknown = [] if scored_alike(*bests) else ["Whether both were scored against the same real patches, their logs do not say."]
    lead, error = abs(bests[0]["kid"] - bests[1]["kid"]), difference_error(*bests)
    if lead <= 2 * error:
        reason = f"Their best KIDs differ by {lead:.4f}, no more than twice the standard error ({error:.4f}): neither is ahead."
        return Advice(_together([advise(run).action for run in runs]), [reason, *unknown, *_each(names, runs)])
    winner = int(bests[1]["kid"] < bests[0]["kid"])
    advice = _with_winner(names, runs, winner, f"by {lead:.4f}, more than twice the standard error ({error:.4f})")
    return Advice(advice.action, [advice.reasons[0], *unknown, *advice.reasons[1:]])


def _with_winner(names: tuple[str, str], runs: tuple[History, History], winner: int, lead: str) -> Advice:
    better, other = runs[winner], runs[1 - winner]
    reasons = [f"{names[winner]} has the better KID {lead}. Seeds alone make KIDs differ by some {SEEDS:g}."]
    seen, less = better.kids[-1]["images"], other.kids[-1]["images"]
    if less < 0.9 * seen and advise(other).action == TRAIN_ON:
        reasons.append(
            f"{names[1 - winner]} has seen {less:,} images and {names[winner]} {seen:,}: train it on to as many before dropping it."
        )
    advice = advise(better)
    return Advice(f"{names[winner]}: {advice.action}", reasons + advice.reasons)


def _each(names: tuple[str, str], runs: tuple[History, History]) -> list[str]:
    advices = [advise(run) for run in runs]
    return [
        f"{name}: {advice.action}. {' '.join(advice.reasons)}"
        for name, advice in zip(names, advices, strict=True)
        if advice.action != UNKNOWN or len(advice.reasons) > 1
    ]


def _together(actions: list[str]) -> str:
    """One action for two runs that are level: the cheapest that either still asks for."""
    return next(action for action in (TRAIN_ON, GO_BACK, MORE_DATA, SWITCH, STOP, UNKNOWN) if action in actions)
