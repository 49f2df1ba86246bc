"""What a batch is compared with besides itself: feature statistics of the images seen last."""

from __future__ import annotations

import torch
from torch import Tensor

SIZE = 256  # images a resolution


class Bank:
    """The last SIZE real and generated images at each resolution, as rows of tensors that always come in the same order.

    Eight images say little about a distribution. Comparing a batch with some hundred that came before costs nothing and takes
    most of the noise out of the feature matching (moving averages for the same end: dos Santos et al., "Learning implicit
    generative models by matching perceptual features", 2019). Older images than these would be those of another generator.
    """

    def __init__(self):
        self._rows: dict[str, list[Tensor]] = {}

    def with_rows(self, resolution: int, rows: list[Tensor]) -> list[Tensor]:
        """``rows``, (n, ...) each, and behind them those kept for this resolution."""
        kept = self._rows.get(str(resolution))
        return rows if kept is None else [torch.cat(pair) for pair in zip(rows, kept, strict=True)]

    def keep(self, resolution: int, rows: list[Tensor]) -> None:
        """Keep ``rows`` as the newest of this resolution; other resolutions than this and the next smaller one are done with."""
        newest = [item[:SIZE] for item in self.with_rows(resolution, rows)]
        self._rows = {name: kept for name, kept in self._rows.items() if int(name) * 2 >= resolution}
        self._rows[str(resolution)] = newest

    def state(self) -> dict[str, list[Tensor]]:
        """For a checkpoint."""
        return {name: [item.cpu() for item in rows] for name, rows in self._rows.items()}

    def restore(self, state: dict[str, list[Tensor]], device: torch.device) -> None:
        """Inverse of ``state``."""
        self._rows = {name: [item.to(device) for item in rows] for name, rows in state.items()}
