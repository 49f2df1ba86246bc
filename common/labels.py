"""What a label's name says, for every stage alike."""

from __future__ import annotations

from collections.abc import Iterable

PROVIDERS = ("karolinska", "radboud")  # PANDA's hospitals

_NONE = {"unlabelled", "unknown", "unconditional"}  # the last: images of a model without labels


def known(label: str) -> str:
    """The label, or "" where it says that there is none. "unlabelled" is ours alone, so that any hospital may follow it."""
    name, _, follows = label.partition("-")
    says_none = label in _NONE or name == "unlabelled" or (name in _NONE and follows in PROVIDERS)
    return "" if says_none else label


def provider_in(label: str, providers: Iterable[str] = PROVIDERS) -> str:
    """The longest of ``providers`` that the name of a class ends with, also where it says no label: "radboud" of
    unlabelled-radboud; else ""."""
    return max((provider for provider in providers if label.endswith(f"-{provider}")), key=len, default="")
