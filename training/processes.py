"""The processes of one training: one alone, or as many as torchrun starts, each with its share of every batch.

Gradients are summed by hand after each backward pass (as StyleGAN2-ADA does) rather than by a wrapper around the networks: a GAN's
step goes through them piecewise and twice differentiated, and the sum is then that of the whole batch by construction.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from common.errors import UserError

PATIENCE = datetime.timedelta(minutes=10)  # for a process that does not join
LONG_PATIENCE = datetime.timedelta(minutes=45)  # for one that does not come to a step: the first waits half an hour for a full disk


@dataclass(frozen=True)
class Processes:
    """rank: number of this process, from 0; the first alone writes files. world: how many there are.

    control: group of the CPU's own network, for what the processes agree on; None alone.
    """

    rank: int = 0
    world: int = 1
    control: object = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def total_gradients(self, network: nn.Module) -> None:
        """Sum the gradients of ``network`` over the processes."""
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        if self.world == 1 or not gradients:
            return
        flat = self.total(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([item.numel() for item in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def gather(self, rows: Tensor) -> Tensor:
        """(n, ...) of this process -> (n * world, ...) in the order of the whole batch; without gradient."""
        if self.world == 1:
            return rows
        everyone = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(everyone, rows.contiguous())
        return torch.stack(everyone, dim=1).flatten(0, 1)

    def run(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """``function(rows)``, (n, ...) -> (n, ...), each process doing its share of the rows; all of them get all."""
        if self.world == 1:
            return function(rows)
        share = torch.arange(self.rank, self.world * -(-len(rows) // self.world), self.world).clamp(max=len(rows) - 1)
        return self.gather(function(rows[share.to(rows.device)]))[: len(rows)]

    def same_as_first(self, network: nn.Module) -> None:
        """Give all processes the first one's weights and buffers."""
        if self.world > 1:
            for tensor in (*network.parameters(), *network.buffers()):
                dist.broadcast(tensor.data, 0)

    def agree(self, wishes: Sequence[int]) -> list[int]:
        """The largest of each wish over the processes, so that all of them do the same next.

        Raises UserError that names the processes that did not come within LONG_PATIENCE.
        """
        if self.world == 1:
            return list(wishes)
        self.wait()
        agreed = torch.tensor(wishes)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.control)
        return agreed.tolist()

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Let the first process do something before the others do it too; leave together."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()
        self.wait()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world == 1:
            return
        try:
            dist.monitored_barrier(self.control, LONG_PATIENCE, wait_all_ranks=True)
        except RuntimeError as error:
            raise UserError(f"a process of the training is late or gone: {str(error).splitlines()[0]}") from error


def world_size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def writes() -> bool:
    """Whether this is the process that writes, before it has joined the others."""
    return os.environ.get("RANK", "0") == "0"


def join(device: torch.device) -> tuple[Processes, torch.device]:
    """The processes that torchrun has started and this one's device; alone, ``Processes()`` and ``device`` as it is.

    Raises UserError where the environment speaks of several processes and does not say where they are.
    """
    if world_size() == 1:
        return Processes(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    try:
        store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
    except ValueError as error:
        raise UserError(f"WORLD_SIZE is set, but this was not started by torchrun ({error}); unset it, or use torchrun") from error
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # On one machine torchrun keeps its store over a restart, with the addresses of the processes that are gone.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=LONG_PATIENCE)
    processes = Processes(rank, world, dist.new_group(backend="gloo", timeout=LONG_PATIENCE))
    if not processes.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 one voice is enough; errors go to stderr from all
    return processes, device


def restarted() -> bool:
    """Whether torchrun has started this process again after another one failed (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def leave(processes: Processes) -> None:
    """End the connections between the processes."""
    if processes.world > 1:
        dist.destroy_process_group()
