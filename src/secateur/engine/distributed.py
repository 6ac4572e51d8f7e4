"""The little that several processes need (``torchrun`` sets the environment)."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from secateur.core.errors import SecateurError, UsageError


def start() -> None:
    """Join the process group of ``torchrun``; nothing in a single process.

    Raises:
        UsageError: when this machine has fewer CUDA devices than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return
    mine, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if mine >= there:
        raise UsageError(
            f"process {mine + 1} of this machine has no CUDA device of its own: there are {there}. Start "
            f"`--nproc_per_node {there}` processes, or set CUDA_VISIBLE_DEVICES= to compute on the processor."
        )
    torch.cuda.set_device(mine)  # before NCCL, which talks through the current device: of all processes device 0
    dist.init_process_group("nccl")


def stop() -> None:
    """Leave the process group."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # reducers of DDP must not outlive their group
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 in a single process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """Number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


def anywhere(here: bool, where: torch.device) -> bool:
    """Whether something is so in any of the processes; all of them must ask.

    Args:
        here: whether it is so in this one.
        where: the device that the processes talk through.
    """
    if world() == 1:
        return here
    flag = torch.tensor(float(here), device=where)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def first(work: Callable[[], object]) -> None:
    """Do something in the first process while the others wait; when it fails, none goes on.

    Raises:
        SecateurError: in the other processes, with the words of the first one's error.
    """
    if world() == 1:
        work()
        return
    told: list[Any] = [None]
    failure: Exception | None = None
    if rank() == 0:
        try:
            work()
        except Exception as error:  # raised again below, when the others know
            failure, told = error, [str(error) or type(error).__name__]
    dist.broadcast_object_list(told, 0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        raise SecateurError(f"the first process stopped: {told[0]}")


def device() -> torch.device:
    """The device this process computes on: its CUDA device when there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
