"""What a label's name says, for every stage alike."""

from __future__ import annotations

_NONE = {"unlabelled", "unknown", "unconditional"}  # the last: images of a model without labels


def known(label: str) -> str:
    """The label, or "" where it says that there is none."""
    return "" if label.partition("-")[0] in _NONE else label  # a provider may follow


def provider_in(label: str) -> str:
    """The hospital that the name of a class ends with, also where it says no label: "radboud" of unlabelled-radboud; else ""."""
    return label.partition("-")[2]
