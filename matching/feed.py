"""Batches on their way to the device: drawn or replayed, cropped, normalised, mixed.

    feed = Feed(arrays, images, protocol, device, labels=(folder, {file: sha256}))
    for item in feed.loader([(epoch, 0), (epoch, 1), ...], num_workers=4):
        x = feed.mixed(item)                                            # (B, 3, S, S)

Stages 3 and 4 both read their batches here.
"""

from typing import NamedTuple

import numpy as np
import torch

from distillation import datasets
from matching import batches
from matching.images import fits_gpu
from matching.labels import EpochLabels, LabelError
from scripts.runtime import refuse, warn

KEPT_BYTES = 2**28  # of the pixels of batches that are kept for the next seed


class Item(NamedTuple):
    """One batch.

    rows     the rows of the batch that this process wants; None: all
    pixels   (n, S, S, 3) uint8, cropped: the rows that mixing `rows` takes; None: the device crops
    logits   (B, classes) if they come from stored labels, else None
    """

    epoch: int
    number: int
    batch: batches.Batch
    rows: torch.Tensor | None
    pixels: torch.Tensor | None
    logits: torch.Tensor | None


class Feed(torch.utils.data.Dataset):
    """Item (epoch, number) -> that batch, replayed from stored labels or drawn from the seed.

    One `__getitem__` is one batch, so stock PyTorch loads it, and its worker processes live for all
    epochs. A CUDA device with room for the images keeps them and crops whole batches, to the same
    bytes; else Pillow crops on the CPU, and only what the wanted rows take.

    arrays    list of (H, W, 3) uint8; emptied when they have gone to the device
    labels    (folder, {file: sha256}) of stored labels, or None
    rows_of   count -> the rows of a batch of `count` that this process wants, sorted; None: all
    """

    def __init__(self, arrays, images, protocol, device, labels=None, rows_of=None):
        self.arrays, self.protocol, self.device = arrays, protocol, torch.device(device)
        self.labels, self.rows_of, self.classes = labels, rows_of, len(images.folders)
        self.sizes = torch.tensor([array.shape[:2] for array in arrays])
        self.facts = datasets.ALL[images.dataset]
        self.order = self.opened = (None, None)  # of the last epoch asked for
        self.checked, self.kept, self.memory = set(), {}, None
        self.resident = self._on_device()

    def _on_device(self):
        """All images on the CUDA device, (N, H, W, 3) uint8, or None."""
        if self.device.type != "cuda":
            return None
        shapes, otherwise = self.sizes.unique(dim=0).tolist(), "cropped on the CPU, not the GPU"
        if len(shapes) > 1:
            few = f"such as {shapes[0]} and {shapes[-1]}"
            warn(f"images of {len(shapes)} sizes, {few}: {otherwise}")
            return None
        needed = sum(array.nbytes for array in self.arrays)
        if not fits_gpu("the images", needed, self.device, otherwise):
            return None
        shape = (len(self.arrays), *self.arrays[0].shape)
        resident = torch.empty(shape, dtype=torch.uint8, device=self.device)
        for i in range(0, len(resident), 1024):
            resident[i : i + 1024].copy_(torch.from_numpy(np.stack(self.arrays[i : i + 1024])))
        self.arrays.clear()  # no second copy in host memory
        return resident

    # ---- in the loader's processes

    def __getitem__(self, key):
        if key in self.kept:
            return self.kept[key]
        try:
            batch, logits = self._replayed(*key) if self.labels else (self._drawn(*key), None)
        except LabelError as error:
            return error  # raised in a worker process it would come with a traceback
        rows, pixels = self.rows_of and self.rows_of(len(batch.index)), None
        if self.resident is None:
            held = self._held(batch, rows)
            draws = (t[held] for t in (batch.index, batch.crop, batch.flip))
            pixels = batches.crop_on_cpu(self.arrays, *draws, self.protocol["input_size"])
        return Item(*key, batch, rows, pixels, logits)

    def _held(self, batch, rows):
        """The rows of a batch that are cropped so that `rows` can be mixed, sorted."""
        if rows is None or self.resident is not None:
            return torch.arange(len(batch.index))
        return torch.unique(torch.cat([rows, batch.partner[rows]]))

    def _drawn(self, epoch, number):
        seed, count = self.protocol["fkd_seed"], len(self.sizes)
        if self.order[0] != epoch:
            batch_size = self.protocol["batch_size"]
            self.order = epoch, batches.epoch_batches(seed, epoch, count, batch_size)
        index = self.order[1][number]
        return batches.draw_batch(self.protocol, epoch, number, index, self.sizes[index])

    def _replayed(self, epoch, number):
        if self.opened[0] != epoch:
            folder, digests = self.labels
            count, batch_size = len(self.sizes), self.protocol["batch_size"]
            opened = EpochLabels(folder, epoch, count, batch_size)
            # who reads batch 0 answers for the file: the loader keeps the order, so what is wrong
            # is met before anything else of that epoch
            if number == 0 and epoch not in self.checked:
                digest = digests.get(opened.path.name)
                opened.check(self.sizes, self.classes, self.protocol["input_size"], digest)
                self.checked.add(epoch)
            self.opened = epoch, opened
        return self.opened[1].batch(number)

    def loader(self, keys, num_workers=0):
        """Iterator of Items for a list of (epoch, number), over all epochs."""
        workers = 0 if self.resident is not None else min(num_workers, len(keys))
        pixels = len(set(keys)) * self.protocol["batch_size"] * self.protocol["input_size"] ** 2
        keep = not workers and len(set(keys)) < len(keys) and 3 * pixels < KEPT_BYTES
        # forked, not spawned: the images are shared, not copied, and torch is not imported again
        methods = torch.multiprocessing.get_all_start_methods()
        loader = torch.utils.data.DataLoader(
            self,
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            multiprocessing_context="fork" if workers and "fork" in methods else None,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws a seed from the global one
        )
        for item in loader:
            if isinstance(item, LabelError):
                refuse(item)
            if keep:
                self.kept[item.epoch, item.number] = item
            yield item

    # ---- in the process that trains

    def mixed(self, item, before_mix=None):
        """The wanted rows, cropped, normalised and mixed: (n, 3, S, S) float32 on the device.

        before_mix   (x, rows, count) -> x: changes normalised images before they are mixed: those
                     in the rows `rows` of a batch of `count`
        On a CPU the next call may write to the same memory.
        """
        batch, mix_type = item.batch, self.protocol["mix_type"]
        pixels, held, rows, partners = self._cropped(item)
        if mix_type == "mixup" or before_mix:
            x = batches.normalise(pixels, self.facts.mean, self.facts.std)
            x = before_mix(x, held, len(batch.index)) if before_mix else x
            return batches.mix(x, batch, mix_type, rows, partners)
        count = len(pixels if rows is None else rows)
        if self.device.type == "cpu" and (self.memory is None or len(self.memory) < count):
            self.memory = torch.empty((count, 3, *pixels.shape[1:3]))
        cutmix = (partners, batch.box.tolist()) if mix_type == "cutmix" else None
        facts = self.facts
        return batches.normalise(pixels, facts.mean, facts.std, rows, cutmix, self.memory)

    def unmixed(self, item):
        """The same rows as `mixed` gives, not mixed."""
        pixels, _, rows, _ = self._cropped(item)
        return batches.normalise(pixels, self.facts.mean, self.facts.std, rows)

    def _cropped(self, item):
        """(pixels, held, rows, partners) of an item.

        pixels   (n, S, S, 3) uint8 on the device: the rows `held` of the batch, cropped
        rows, partners   where the wanted rows (None: all) and their partners are in `pixels`
        """
        batch, held = item.batch, self._held(item.batch, item.rows)
        if item.pixels is None:
            images = self.resident[batches.sent(batch.index, self.device)]
            size = self.protocol["input_size"]
            pixels = batches.resized_crop_batch(images, batch.crop, batch.flip, size)
        else:
            pixels = batches.sent(item.pixels, self.device)
        if item.rows is None:
            return pixels, held, None, batches.sent(batch.partner, self.device)
        places = (torch.searchsorted(held, t) for t in (item.rows, batch.partner[item.rows]))
        return pixels, held, *(batches.sent(t, self.device) for t in places)
