"""How a batch is shared: its chunks, and what processes that train together say to each other.

Own sums of gradients, not DDP's averages: processes may hold different numbers of chunks, or none.
"""

import contextlib
import math
import os

import torch

from scripts import files
from scripts.runtime import refuse


def chunk_size(batch_size, world, accumulation_steps, bn_batch):
    """Images of one pass: --bn_batch, else batch / (processes x steps), rounded up."""
    # differs from the release: --bn_batch fixes what there depends on the number of GPUs
    return min(bn_batch or -(-batch_size // (world * accumulation_steps)), batch_size)


def chunks_of(count, size):
    """(first, end) of each chunk of a batch of `count`: of equal length, to one image.

    A remainder of few images would get a BatchNorm of its own: 1024 in chunks of 73 are 12 of 73
    and 2 of 74, as in the release. So a chunk may be a twentieth longer than `size`.
    """
    pieces = math.ceil(count / (1.05 * size))
    if size > 1:
        pieces = max(1, min(pieces, count // 2))  # BatchNorm cannot train on a single image
    ends = [round(n * count / pieces) for n in range(pieces + 1)]
    return list(zip(ends[:-1], ends[1:]))


def rank_chunks(count, size, process):
    """This process's chunks, [(first row in the batch, slice of its own rows)], and its rows."""
    chunks, rows = [], []
    for first, end in chunks_of(count, size)[process.rank :: process.world]:
        chunks.append((first, slice(len(rows), len(rows) + end - first)))
        rows += range(first, end)
    return chunks, torch.tensor(rows, dtype=torch.int64)


@contextlib.contextmanager
def joined(process, tracker=None, folder=None):
    """accelerate's Accelerator for several processes or a tracker, else None."""
    if process.dry_run or (process.world == 1 and tracker is None):
        yield None
        return
    from accelerate import Accelerator

    on_cpu = process.device.type == "cpu"  # unless told, each process there is rank 0 of 1
    try:
        accelerator = Accelerator(cpu=on_cpu, log_with=tracker, project_dir=folder)
    except (ValueError, RuntimeError) as error:  # an invalid port, a host that does not answer
        at = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        apart = f"{process.world} processes cannot meet at {at}"
        what = apart if process.world > 1 else f"--tracker {tracker}"
        refuse(f"{what}: {str(error).splitlines()[0]}")
    if accelerator.num_processes != process.world:  # LOCAL_RANK is missing
        refuse(f"accelerate does not see the {process.world} processes; use torchrun")
    if tracker and not accelerator.log_with:
        refuse(f"--tracker {tracker}: this package is not installed")
    yield accelerator
    accelerator.end_training()


def sum_over_ranks(tensors, world, operation="SUM"):
    """Add up a list of tensors over all processes, in place, in one message per dtype."""
    for dtype in sorted({t.dtype for t in tensors} if world > 1 else (), key=str):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        try:
            torch.distributed.all_reduce(flat, getattr(torch.distributed.ReduceOp, operation))
        except RuntimeError as error:
            again = f"run the same command to go on ({error!s:.200})"
            refuse(f"another of the {world} processes has died; {again}")
        for t, part in zip(same, flat.split([t.numel() for t in same])):
            t.copy_(part.view_as(t))


def check_agreement(out, trained):
    """Refuse processes that were started with different settings, or see different checkpoints:
    each node's own disk, or a late network file system. Nothing else would show it.

    trained   epochs that this process finds trained, of all seeds
    """
    settings = int(files.digest_of([out.settings, out.inputs])[:12], 16)
    found = torch.tensor([settings, -settings, trained, -trained], device=out.process.device)
    sum_over_ranks([found], out.process.world, "MIN")
    least, most, fewest, greatest = found.tolist()
    where = f"{out.flag} {out.folder}"
    if least != -most:
        refuse(f"{where}: the {out.process.world} processes were started with different settings")
    if fewest != -greatest:
        refuse(f"ranks do not see the same {where}: {fewest} and {-greatest} epochs in it")


def sum_gradients(model, world):
    """Every process gets the sum of all gradients; one that had no chunk counts as zero."""
    parameters = [p for p in model.parameters() if p.requires_grad] if world > 1 else []
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
    """Whether a stop signal has reached any process: all leave, or none. Waits for all of them."""
    asked = torch.tensor([float(out.stop_signal is not None)], device=out.process.device)
    sum_over_ranks([asked], out.process.world)
    if asked:
        out.stop_signal = out.stop_signal or "SIGTERM"
    return bool(asked)
