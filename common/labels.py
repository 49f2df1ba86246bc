"""What a label's name says, for every stage alike."""

from __future__ import annotations


def known(label: str) -> str:
    """The label, or "" where it says that there is none."""
    return "" if label.partition("-")[0] in {"unlabelled", "unknown"} else label  # a provider may follow
