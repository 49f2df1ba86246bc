"""Steps recorded on the GPU and replayed: to launch some thousand small kernels one by one takes longer than they themselves do.

A recording (a CUDA graph) repeats the same kernels on the same memory. So there is one for each kind of step, and what differs from
step to step lies in tensors of its own that are filled before it is replayed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.progress import say
from training.step import Batch

WARM_UP = 2  # steps of a kind that run as usual first: libraries choose their kernels, optimisers make room for their averages
MOST = 8  # recordings held: windows and whole images, with and without penalties, with and without augmentation

Work = Callable[[Batch, bool], Tensor]


def kind(batch: Batch, penalise: bool) -> tuple:
    """What a recording cannot change."""
    seen = None if batch.view is None else (batch.view.resolution, batch.view.windowed, batch.view.averaged)
    return tuple(batch.real.shape), batch.labels is None, seen, batch.strength > 0.0, penalise


def held(batch: Batch) -> Batch:
    """A batch of the same kind whose changing parts are tensors of its own on the device."""
    copies = {name: None if value is None else value.to(batch.real.device, copy=True) for name, value in _tensors(batch).items()}
    strength = batch.real.new_zeros(()) if batch.strength > 0.0 else 0.0
    view = None if batch.view is None else replace(batch.view, share=batch.real.new_zeros(()))
    return replace(batch, strength=strength, view=view, **copies)


def fill(place: Batch, batch: Batch) -> None:
    """Put what ``batch`` holds into one of its kind that ``held`` made."""
    for name, value in _tensors(batch).items():
        if value is not None:
            getattr(place, name).copy_(value, non_blocking=True)
    if torch.is_tensor(place.strength):
        place.strength.fill_(batch.strength)
    if place.view is not None:
        place.view.share.fill_(batch.view.fade)


def _tensors(batch: Batch) -> dict[str, Tensor | None]:
    return {name: getattr(batch, name) for name in ("real", "labels", "z", "corners")}


class Stream:
    """A CUDA stream beside the usual one, where steps are recorded, and run before that."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """The result of ``work``, in order with what the usual stream does."""
        usual = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream):
            result = work()
        usual.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A function that does ``work``, which is not done here, and where it leaves the result."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


@dataclass(frozen=True)
class Recording:
    """replay: does the step. place: the batch that it reads. result: where it leaves its statistics."""

    replay: Callable[[], None]
    result: Tensor
    place: Batch

    def __call__(self, batch: Batch) -> Tensor:
        fill(self.place, batch)
        self.replay()
        return self.result.clone()


class Recorder:
    """Does steps: the first ones of a kind as usual, later ones from a recording. stream: where they are made.

    A recording knows the tensors of networks and optimisers: where some were replaced by others it takes a new recorder.
    """

    def __init__(self, stream: Stream):
        self._stream, self._refused = stream, False
        self._done: Counter[tuple] = Counter()
        self._recordings: dict[tuple, Recording] = {}

    def __call__(self, work: Work, batch: Batch, penalise: bool) -> Tensor:
        """``work(batch, penalise)``. Its random numbers must follow from the seed that was set before."""
        what = kind(batch, penalise)
        recording = self._recordings.pop(what, None)
        if recording is None and self._done[what] >= WARM_UP and not self._refused:
            recording = self._record(work, batch, penalise)
        if recording is None:
            self._done[what] += 1
            return self._stream.run(lambda: work(batch, penalise))
        self._recordings[what] = recording  # the last used is the last in order
        return recording(batch)

    def _record(self, work: Work, batch: Batch, penalise: bool) -> Recording | None:
        if len(self._recordings) >= MOST:
            del self._recordings[next(iter(self._recordings))]
        place = held(batch)
        try:
            return Recording(*self._stream.record(lambda: work(place, penalise)), place)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._refused = True
            say(f"warning: steps cannot be recorded on this GPU ({str(error).splitlines()[0]}); training goes on, slower")
            return None
