"""What processes that train together say to each other: sums, and whether they agree.

Own sums of gradients, not DDP: that averages over processes, which may hold different numbers of
chunks, also none. So a step is exact for any number of processes.
"""

import contextlib
import os

import torch

from scripts import files
from scripts.runtime import refuse


@contextlib.contextmanager
def joined(process, tracker=None, folder=None):
    """accelerate's Accelerator for several processes or a tracker, else None.

    Without CUDA it needs `cpu=True`: else every process believes that it is rank 0 of 1.
    """
    if process.dry_run or (process.world == 1 and tracker is None):
        yield None
        return
    from accelerate import Accelerator

    try:
        on_cpu = process.device.type == "cpu"
        accelerator = Accelerator(cpu=on_cpu, log_with=tracker, project_dir=folder)
    except (ValueError, RuntimeError) as error:  # an invalid port, a host that does not answer
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        apart = f"{process.world} processes cannot meet at {at}"
        what = apart if process.world > 1 else f"--tracker {tracker}"
        refuse(f"{what}: {str(error).splitlines()[0]}")
    if accelerator.num_processes != process.world:
        found = accelerator.num_processes
        refuse(f"{process.world} processes were asked for, accelerate sees {found}; use torchrun")
    if tracker and not accelerator.log_with:
        refuse(f"--tracker {tracker}: this package is not installed")
    yield accelerator
    accelerator.end_training()


def sum_over_ranks(tensors, world):
    """Add up lists of tensors over all processes, in place, in one message per dtype."""
    if world == 1:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        _all_reduce(flat, world, "SUM")
        for t, part in zip(same, flat.split([t.numel() for t in same])):
            t.copy_(part.view_as(t))


def _all_reduce(flat, world, operation):
    import torch.distributed as dist

    try:
        dist.all_reduce(flat, getattr(dist.ReduceOp, operation))
    except RuntimeError as error:
        reason = str(error).split("\n")[0][:200]
        again = "run the same command to go on"
        refuse(f"another of the {world} processes has died; {again} ({reason})")


def check_ranks(out, trained):
    """Refuse processes that were started with different settings, or see different checkpoints.

    Each node's own disk, or a late network file system: their gradients are summed, so nothing
    else would show it.

    trained   epochs that this process finds trained, one number per seed
    """
    process, where = out.process, f"{out.flag} {out.folder}"
    if process.world == 1:
        return
    settings = int(files.digest_of([out.settings, out.inputs])[:12], 16)
    low, high = _extremes([settings], process)[0]
    if low != high:  # first, as the seeds are settings
        refuse(f"{where}: the {process.world} processes were started with different settings")
    for low, high in _extremes(trained, process):
        if low != high:
            refuse(f"ranks do not see the same {where}: epoch {low} and {high}")


def _extremes(values, process):
    """The least and the largest over all processes of each of some integers."""
    found = torch.tensor([[v, -v] for v in values], device=process.device)
    _all_reduce(found, process.world, "MIN")
    return [(low, -high) for low, high in found.tolist()]


def sum_gradients(model, world):
    """Every process gets the sum of all gradients; one that had no chunk counts as zero."""
    if world > 1:
        parameters = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        sum_over_ranks([p.grad for p in parameters], world)


@torch.no_grad()
def average_buffers(model, chunks, world):
    """BatchNorm's statistics: the mean over processes, weighted by the chunks that each saw."""
    if world == 1:
        return
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    counters = [b for b in model.buffers() if not b.is_floating_point() and b.ndim == 0]
    seen = torch.tensor([float(chunks)], device=next(model.parameters()).device)
    for b in buffers:
        b.mul_(chunks)
    sum_over_ranks([*buffers, *counters, seen], world)
    for b in buffers:
        b.div_(seen.to(b.dtype)[0])
    for b in counters:
        b.div_(world, rounding_mode="floor")


def stop_asked(out):
    """Whether a stop signal has reached any of the processes: all leave, or none."""
    asked = torch.tensor([float(out.signals.name is not None)], device=out.process.device)
    sum_over_ranks([asked], out.process.world)
    return bool(asked)


def leave_together(out):
    """Exit with status 75 once all are here: who leaves while rank 0 saves may get it killed."""
    sum_over_ranks([torch.zeros(1, device=out.process.device)], out.process.world)
    out.signals.name = out.signals.name or "SIGTERM"
    out.leave_if_asked()
