"""The release's way of working, in a small reference of ours at the settings of its launchers.

fp16 on a GPU; stage 1 in batches of 10; stage 2 one image at a time with its text encoded each time; stages 3 and 4 in
batches of 1024, workers spawned each epoch, crops by Pillow from PNGs that are opened anew, a pickle a batch.
Spawned workers import this file: nothing heavier than what the release's own import.
"""

import numpy as np
import torch
from PIL import Image
from sklearn.cluster import MiniBatchKMeans
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from distillation import gen_prototype, gen_syn_image
from distillation.datasets import DATASETS
from matching.soft_labels import mix
from matching.training import chunks_of, make_optimizer, soft_loss
from scripts.runtime import POSTERIOR, generator

NEGATIVE = gen_syn_image.NEGATIVE_PROMPT

# ---- stages 1 and 2


def release_latents(pipeline, text, split, size, batch_size, workers, ipc):
    """Stage 1: floats from the readers, batches of 10, text encoded for every image and thrown away, a wait for each
    latent, k-means between the batches. km_expand 1: buffers of ipc rows, the last one dropped."""
    order = gen_prototype.class_order(split, 0, 0)
    loader = torch.utils.data.DataLoader(
        [(split, i, size) for i in order], batch_size=batch_size, num_workers=workers, collate_fn=release_images
    )
    latents, buffer = [], []
    kmeans = MiniBatchKMeans(n_clusters=ipc, random_state=0, batch_size=ipc, n_init="auto")
    for number, images in enumerate(loader):
        keys = order[number * batch_size : (number + 1) * batch_size]
        for _ in keys:
            text()
        found = pipeline(images.to(pipeline.vae.device), [generator(0, POSTERIOR, 0, i) for i in keys])
        for latent in found:
            latents.append(latent.to(torch.float16).cpu().numpy())
            buffer.append(latents[-1].reshape(-1))
            if len(buffer) == ipc:
                kmeans.partial_fit(np.stack(buffer).astype(np.float64))
                buffer = []
    return np.stack(latents)


def release_images(items):
    images = []
    for split, i, size in items:
        with open(split.items[0][i], "rb") as file:
            image = Image.open(file).convert("RGB")
        images.append(F.to_tensor(image.resize((size, size), Image.Resampling.BILINEAR)))
    return torch.stack(images)


def release_synthesis(pipeline, jobs, prototypes, folder, options):
    """Stage 2: one image at a time, both prompts encoded for each, resized and saved before the next."""
    for job in jobs:
        latents = torch.from_numpy(prototypes[job.position].latents[job.prototype : job.prototype + 1])
        noise = generator(*gen_syn_image.image_key(0, job, 0))
        image = pipeline([job.prompt], latents, negative_prompt=[NEGATIVE], generator=[noise], **options).images[0]
        (folder / job.folder).mkdir(parents=True, exist_ok=True)
        image.resize((224, 224)).save(folder / job.file)


# ---- stages 3 and 4


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

    def loader(self, workers):
        """Its workers are spawned: each imports torch anew, every epoch."""
        return torch.utils.data.DataLoader(
            self,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def mixed(self, device, workers):
        """(batch, mixed images, logits) of an epoch, on the device."""
        for number, x, logits in self.loader(workers):
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
