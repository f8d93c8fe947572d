"""Several processes of this machine as one group of ranks, over gloo."""

import contextlib
import gc
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

_PATIENCE = timedelta(minutes=2)  # with a rank that does not come to a collective, before the others raise


@contextlib.contextmanager
def local_group(rank: int, ranks: int, rendezvous: str | Path) -> Iterator[None]:
    """Be one of `ranks` processes that find each other by a file.

    What refers to the group, as DistributedDataParallel's reducer does, must not outlive it: have it in the locals of a
    function that has returned. If the reducer is the last to let go, torch waits for gloo's threads to end and holds
    the interpreter's lock meanwhile, which a thread that drops a tensor needs: now and then that waits forever
    (pytorch/pytorch#56297).

    Args:
        rendezvous: The same path for all of them, of a file that does not exist yet.
    """
    dist.init_process_group("gloo", f"file://{rendezvous}", _PATIENCE, world_size=ranks, rank=rank)
    try:
        yield
    finally:
        gc.collect()  # a wrapped model is in reference cycles
        dist.destroy_process_group()
