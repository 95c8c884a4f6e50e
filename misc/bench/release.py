"""The release's way of working in stages 3 and 4, in a small reference of ours at the settings of its launchers.

Batches of 1024, workers spawned each epoch, crops by Pillow from PNGs that are opened anew, a pickle a batch. Spawned
workers import this file: it must not be heavier than the release's own imports.
"""

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from distillation.datasets import DATASETS
from matching.soft_labels import mix
from matching.training import chunks_of, make_optimizer, soft_loss


def save_pickle(folder, number, batch, logits):
    """What its stage 3 stores of a batch."""
    what = [batch.crop.float(), batch.flip, batch.partner, batch.lam, batch.box.tolist(), logits.clone()]
    torch.save(what, folder / f"batch_{number}.tar")


def load_pickle(folder, number):
    return torch.load(folder / f"batch_{number}.tar", weights_only=True)


class ReleaseFeed(torch.utils.data.Dataset):
    """Batch by batch: every PNG opened anew, cropped, flipped and normalised by itself, stacked; labels unpickled."""

    def __init__(self, files, batches, size, pickles=None):
        self.files, self.batches, self.size, self.pickles = files, batches, size, pickles
        self.facts = DATASETS["imagenet"]

    def __len__(self):
        return len(self.batches)

    def crop(self, i, box, flip):
        with open(self.files[i], "rb") as file:
            image = Image.open(file).convert("RGB")
        image = F.resized_crop(image, *box, [self.size, self.size], InterpolationMode.BILINEAR)
        return F.hflip(image) if flip else image

    def __getitem__(self, number):
        batch, rows = self.batches[number], []
        for i, box, flip in zip(batch.index.tolist(), batch.crop.tolist(), batch.flip.tolist()):
            rows.append(F.normalize(F.to_tensor(self.crop(i, box, flip)), self.facts.mean, self.facts.std))
        x = torch.utils.data.default_collate(rows)
        return number, x, load_pickle(self.pickles, number)[5] if self.pickles else None

    def loader(self, workers, device):
        """Its workers are spawned: each imports torch anew, every epoch."""
        return torch.utils.data.DataLoader(
            self,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
            pin_memory=device.type == "cuda",
        )

    def mixed(self, device, workers):
        """(batch, mixed images, logits) of an epoch, on the device."""
        for number, x, logits in self.loader(workers, device):
            batch = self.batches[number]
            x = mix(x.to(device), batch, "cutmix")
            yield batch, x, logits if logits is None else logits.to(device)


class One(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, _):
        return torch.zeros(1)


def start_workers(workers):
    """Start an epoch's workers, take one item, end them."""
    for _ in torch.utils.data.DataLoader(One(), num_workers=workers, multiprocessing_context="spawn"):
        pass


def release_epoch(model, release, device, workers, temperature=20.0):
    """Stage 4: an epoch in two accumulation steps a batch, meters read after each."""
    optimizer, losses = make_optimizer(model, False, 1e-3, 0.01), []
    model.train()
    for batch, x, logits in release.mixed(device, workers):
        optimizer.zero_grad()
        for first, end in chunks_of(len(batch.index), -(-len(batch.index) // 2)):
            loss = soft_loss(model(x[first:end]), logits[first:end], temperature) / len(batch.index)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return sum(losses)
