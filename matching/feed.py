"""Batches on their way to the device: drawn or replayed, cropped, normalised, mixed.

    feed = Feed(arrays, images, protocol, device, labels=(folder, {file: sha256}))
    for item in feed.loader([(epoch, 0), (epoch, 1), ...], num_workers=4):  # or (epoch, 0, seed)
        x = feed.mixed(item)                                            # (B, 3, S, S)

Stages 3 and 4 both read their batches here.
"""

from typing import NamedTuple

import torch

from distillation import datasets
from matching import batches, crops
from matching.images import fits_gpu
from matching.labels import EpochLabels, LabelError
from scripts.runtime import PATCHES, generator, read_ahead, refuse, warn

KEPT_BYTES = 2**28  # of the pixels of batches that are kept for the next seed


class Item(NamedTuple):
    """One batch, of which this process wants n rows."""

    epoch: int
    number: int
    seed: int  # of its draws
    batch: batches.Batch
    rows: torch.Tensor  # (n,) the rows that are wanted, sorted
    cropped: torch.Tensor  # (m,) the rows that are cropped: those, then what only mixing takes
    partners: torch.Tensor  # (n,) where in `cropped` the partners are
    patches: torch.Tensor | None  # (m, 2, factor) their order in height and width, if shuffled
    pixels: torch.Tensor | None  # (m, S, S, 3) uint8; None: the device crops
    logits: torch.Tensor | None  # (B, classes), of stored labels; with --label_top_k (B, K + 1)
    top: torch.Tensor | None  # and (B, K) the classes of the first K


class Feed(torch.utils.data.Dataset):
    """Item (epoch, number[, seed]) -> that batch, replayed from stored labels or drawn from the
    seed (fkd_seed).

    One `__getitem__` is one batch, so stock PyTorch loads it, and its worker processes live for all
    epochs. A CUDA device with room for the images keeps them and crops; else Pillow does, to the
    same bytes.

    arrays    list of (H, W, 3) uint8; emptied when they have gone to the device
    labels    (folder, {file: sha256}) of stored labels, or None
    rows_of   count -> the rows of a batch of `count` that this process wants, sorted; None: all
    """

    def __init__(self, arrays, images, protocol, device, labels=None, rows_of=None):
        self.arrays, self.protocol, self.labels = arrays, protocol, labels
        self.device, self.classes = torch.device(device), len(images.folders)
        self.rows_of = rows_of or torch.arange
        self.sizes = torch.tensor([array.shape[:2] for array in arrays])
        self.facts, self.size = datasets.ALL[images.dataset], protocol["input_size"]
        self.opened = (None, None)  # the last epoch asked for, its EpochLabels
        self.checked, self.kept, self.memory = set(), {}, None
        self.resident = self._on_device() if self.device.type == "cuda" else None

    def _on_device(self):
        """All images on the device, (N, H, W, 3) uint8, or None."""
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
        for place, array in zip(resident, self.arrays):
            place.copy_(torch.tensor(array))
        self.arrays.clear()  # no second copy in host memory
        return resident

    # ---- in the loader's processes

    def __getitem__(self, key):
        if key in self.kept:
            return self.kept[key]
        epoch, number, seed = key if len(key) == 3 else (*key, self.protocol["fkd_seed"])
        try:
            stored = self._replayed(epoch, number) if self.labels else None
        except LabelError as error:
            return error  # raised in a worker process it would come with a traceback
        batch, logits, top = stored or (self._drawn(epoch, number, seed), None, None)
        every, rows = torch.arange(len(batch.index)), self.rows_of(len(batch.index))
        others = torch.isin(every, batch.partner[rows]) & ~torch.isin(every, rows)
        cropped = torch.cat([rows, every[others]])
        partners = torch.empty_like(every).scatter_(0, cropped, every[: len(cropped)])
        partners, pixels, patches = partners[batch.partner[rows]], None, None
        factor = self.protocol.get("shuffle_patches", 1)  # labels are never stored with it
        if factor > 1:
            g = generator(seed, PATCHES, epoch, number)
            patches = torch.rand(len(every), 2, factor, generator=g).argsort(-1)[cropped]
        if self.resident is None:
            index, crop, flip = (t[cropped] for t in batch[:3])
            arrays = [self.arrays[i] for i in index.tolist()]
            if factor > 1:
                pairs = ((torch.from_numpy(a)[None], p[None]) for a, p in zip(arrays, patches))
                arrays = [crops.shuffled(*pair)[0].numpy() for pair in pairs]
            pixels = crops.crop_on_cpu(arrays, range(len(arrays)), crop, flip, self.size)
        draws = batch, rows, cropped, partners, patches
        return Item(epoch, number, seed, *draws, pixels, logits, top)

    def _drawn(self, epoch, number, seed):
        protocol, batch_size = {**self.protocol, "fkd_seed": seed}, self.protocol["batch_size"]
        which = len(self.sizes), batch_size, protocol["order"]
        index = batches.epoch_batches(seed, epoch, *which)[number]
        return batches.draw_batch(protocol, epoch, number, index, self.sizes[index])

    def _replayed(self, epoch, number):
        if self.opened[0] != epoch:
            folder, digests = self.labels
            opened = EpochLabels(folder, epoch, len(self.sizes), self.protocol["batch_size"])
            # who reads batch 0 answers for the file: the loader keeps the order, so what is wrong
            # is met before anything else of that epoch
            if number == 0 and epoch not in self.checked:
                made = digests.get(opened.path.name), self.protocol.get("temperature")
                opened.check(self.sizes, self.classes, self.size, *made)
                self.checked.add(epoch)
            self.opened = epoch, opened
        return self.opened[1].batch(number)

    def loader(self, keys, num_workers=0):
        """Iterator of Items for a list of (epoch, number), over all epochs."""
        workers = 0 if self.resident is not None else min(num_workers, len(keys))
        kept_bytes = 3 * len(set(keys)) * self.protocol["batch_size"] * self.size**2
        keep = not workers and len(set(keys)) < len(keys) and kept_bytes < KEPT_BYTES
        # forked, not spawned: the images are shared, not copied, and torch is not imported again
        fork = workers and "fork" in torch.multiprocessing.get_all_start_methods()
        pinned, how = self.device.type == "cuda", "fork" if fork else None
        how = {"multiprocessing_context": how, "pin_memory": pinned}
        # not in a variable: a traceback would keep it, and its processes, alive
        for item, key in zip(read_ahead(self, keys, workers, **how), keys):
            if isinstance(item, LabelError):
                refuse(item)
            if keep:
                self.kept[key] = item
            yield item

    # ---- in the process that trains

    def mixed(self, item, before_mix=None):
        """The wanted rows, cropped, normalised and mixed: (n, 3, S, S) float32 on the device.

        before_mix   (x, rows, count) -> x: changes normalised images before they are mixed: those
                     in the rows `rows` of a batch of `count`
        On a CPU the next call may write to the same memory.
        """
        batch, mix_type, pixels = item.batch, self.protocol["mix_type"], self._cropped(item)
        colours = self.facts.mean, self.facts.std
        partners = batches.sent(item.partners, self.device)
        if mix_type == "mixup" or before_mix:
            x = batches.normalise(pixels, *colours)
            x = before_mix(x, item.cropped, len(batch.index)) if before_mix else x
            return batches.mix(x, batch, mix_type, partners)
        count = len(partners)
        if self.device.type == "cpu" and (self.memory is None or len(self.memory) < count):
            self.memory = torch.empty((count, 3, self.size, self.size))
        cutmix = (partners, batch.box.tolist()) if mix_type == "cutmix" else None
        return batches.normalise(pixels, *colours, cutmix, self.memory)

    def _cropped(self, item):
        """(m, S, S, 3) uint8 on the device."""
        if item.pixels is not None:
            return batches.sent(item.pixels, self.device)
        index, crop, flip = (t[item.cropped] for t in item.batch[:3])
        images = self.resident[batches.sent(index, self.device)]
        if item.patches is not None:
            images = crops.shuffled(images, item.patches)
        return crops.resized_crop_batch(images, crop, flip, self.size)
