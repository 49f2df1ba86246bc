"""What came of an extraction, for the terminal: what was left out, a table by label, what is short, and what to do next."""

from __future__ import annotations

from collections import Counter

from common.progress import say
from data.panda import LABELS
from data.patches import ExtractResult, ExtractSettings
from data.quality_rows import magnifications
from data.staging import FAILED_NAME

MAX_SHOWN = 10


def report(settings: ExtractSettings, result: ExtractResult) -> int:
    """Print what came of it; the exit code."""
    for reason, count in result.left_out.items():
        say(f"left out: {count} slide(s) {reason}")
    _report_empty(result.empty)
    _report_table(result)
    if result.rejected:
        say("rejected places: " + ", ".join(f"{count} {reason}" for reason, count in sorted(result.rejected.items())))
    missing = settings.max_patches - len(result.patches)
    if missing > 0:
        say(f"{missing} short of --max_patches {settings.max_patches}: {_why_short(settings, result)}")
    _warn_of_magnifications(result)
    rate = f" ({result.made / result.seconds:.0f} patches/s)" if result.made else ""
    say(f"{len(result.patches)} patches from {result.slides} slides in {settings.output_dir}")
    say(f"{result.made} made now in {result.seconds:.1f} s{rate}")
    say(f"next: python check_data.py --patches {settings.output_dir}")
    if result.failed:
        failed = settings.output_dir / FAILED_NAME
        say(f"error: {len(result.failed)} slide(s) could not be used, the reasons are in {failed}; mend them and start again")
    elif not result.patches:
        say("error: no patch at all; the warnings above say why")
    return int(bool(result.failed) or not result.patches)


def _why_short(settings: ExtractSettings, result: ExtractResult) -> str:
    if result.failed and not result.patches:
        return "no slide could be used"
    full = Counter(patch.slide_id for patch in result.patches).values()
    if settings.max_per_slide in full:
        return f"--max_per_slide {settings.max_per_slide} allows no more of these slides; raise it in another folder, or add slides"
    others = " in the other slides" if result.failed else ""
    return f"no more usable tissue{others}; add slides or lower --min_tissue"


def _warn_of_magnifications(result: ExtractResult) -> None:
    if mixed := magnifications(result.patches):
        say(
            f"warning: the patches are of different magnifications, {mixed[0]} to {mixed[1]} micrometres a pixel; "
            f"--mpp {mixed[1]} in another --output_dir makes them alike"
        )


def _report_empty(empty: dict[str, str]) -> None:
    wanted = {slide_id: cause for slide_id, cause in empty.items() if cause != "no patch was needed from it"}
    for slide_id, cause in list(wanted.items())[:MAX_SHOWN]:
        say(f"warning: slide {slide_id} gives no patch: {cause}")
    if len(wanted) > MAX_SHOWN:
        say(f"warning: {len(wanted) - MAX_SHOWN} more slides give no patch")


def _report_table(result: ExtractResult) -> None:
    providers = sorted({patch.data_provider for patch in result.patches})
    columns = [
        *((provider or "unknown", "data_provider", provider) for provider in providers),
        ("train", "split", "train"),
        ("test", "split", "test"),
    ]
    say("".join(f"{name:>12}" for name in ("label", *(name for name, _, _ in columns), "all")))
    for label in LABELS:
        rows = [patch for patch in result.patches if patch.label == label]
        counts = [Counter(getattr(patch, field) for patch in rows)[value] for _, field, value in columns]
        say("".join(f"{value:>12}" for value in (label, *counts, len(rows))))
