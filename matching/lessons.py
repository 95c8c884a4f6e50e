"""What a student learns from: images with labels that are stored, made now, or their classes.

lessons = Lessons(images, settings, process, num_workers)
lessons.replay(fkd_path, checkpoints, verify)   # the labels of stage 3; or
lessons.draw(checkpoints)                       # the same draws, labelled during training
"""

from functools import partial

import torch

from matching import batches, generate_soft_label, labels, models, ranks, training
from matching import images as image_sets
from matching.feed import Feed
from scripts.runtime import JITTER, generator

BATCH_SETTINGS = tuple(batches.PROTOCOL)


def drawn(images, settings, size):
    """(name, settings) of batches that are drawn now.

    images   name of the image folder;   size: pixels of its images
    """
    settings = settings.filled(**{**batches.PROTOCOL, "input_size": size, "use_fp16": True})
    if settings["hard_label"]:
        return labels.labels_name(images, ["hard"], settings.only(BATCH_SETTINGS)), settings
    settings = settings.filled(arch=["resnet18"])
    named = settings.only([*BATCH_SETTINGS, "use_fp16"])
    return f"{labels.labels_name(images, settings['arch'], named)}_online", settings


class Lessons:
    """What a student learns from: see training.train.

    stem      name of the labels, stored or not, which names the result
    facts     of each teacher;   made: {"amp", "channels_last"} of its labels; None: hard labels
    content   digest of stored labels;   labelled: their epochs
    weights   (N,) with --loss_weights: what each image counts in the loss
    """

    def __init__(self, images, settings, process, num_workers):
        self.arrays, self.process, self.num_workers = None, process, num_workers
        self.weights = None
        if settings["loss_weights"]:
            self.weights = image_sets.cluster_weights("--train_dir", images)
        if images.foreign:  # its content is known only from its pixels
            self.arrays, images = image_sets.load_pixels("--train_dir", images, num_workers)
        self.images, self.settings = images, settings.filled(dataset=images.dataset)
        self.teachers, self.facts, self.stored, self.count = [], [], None, len(images.files)
        self.content = self.made = self.labelled = None
        hard = settings["hard_label"]
        self.loss = training.hard_loss if hard else training.LOSSES[settings["loss"]]

    def replay(self, path, checkpoints, verify):
        """Take the labels that stage 3 made of these images; refuses others."""
        given = {**self.settings, "teacher_checkpoint": checkpoints}
        folder, manifest = labels.open_labels(path, self.images, given, verify)
        made, self.facts = manifest["arguments"], manifest["teacher"]
        fixed = {name: made[name] for name in (*BATCH_SETTINGS, "use_fp16", "arch")}
        self.settings, self.stem = self.settings.filled(**fixed), folder.resolve().name
        self.stored = folder, {name: entry["sha256"] for name, entry in manifest["files"].items()}
        self.content, self.labelled = manifest["content"], made["epochs"]
        known = ["amp", "channels_last", *["label_top_k"] * bool(made.get("label_top_k"))]
        self.made = {name: made[name] for name in known}

    def draw(self, checkpoints):
        """Draw the batches now, for teachers that label them (--online) or for the classes."""
        images, size = self.images, self.images.pixels
        self.stem, settings = drawn(images.name, self.settings, size)
        batches.check_scales(settings["min_scale_crops"], settings["max_scale_crops"])
        self.settings = settings
        if not settings["hard_label"]:
            where = images.dataset, images.folders, settings["input_size"], self.process.device
            loaded = generate_soft_label.load_teachers(settings["arch"], checkpoints, *where)
            self.teachers, self.facts = loaded
            self.made = {"amp": "none", "channels_last": False}

    def network(self):
        classes, size = len(self.images.folders), self.settings["input_size"]
        return models.create_model(self.settings["model"], classes, size)

    def files_of(self, seed):
        return [f"student_seed{seed}.safetensors", f"seed{seed}.json"]

    def loader(self, keys):
        arrays = self.arrays
        if arrays is None:
            arrays, _ = image_sets.load_pixels("--train_dir", self.images, self.num_workers)
        where, s = (self.process.device, self.stored, self.needed), self.settings
        self.feed = Feed(arrays, self.images, s, *where)
        # as the release, all seeds share every draw: only their initial weights differ
        drawn = [(epoch, n, s["fkd_seed"] + s["vary_draws"] * seed) for epoch, n, seed in keys]
        return self.feed.loader(drawn, self.num_workers)

    def own(self, count):
        """The rows of a batch of `count` that this process trains on."""
        return ranks.rank_chunks(count, self.settings["bn_batch"], self.process)[1]

    def needed(self, count):
        """Its own rows; with --online the blocks in which the teacher takes a batch, whatever the
        number of processes."""
        rows, every, size = self.own(count), torch.arange(count), generate_soft_label.TEACHER_ROWS
        return every[torch.isin(every // size, rows // size)] if self.teachers else rows

    def part(self, item):
        """The training.Part of an item of the feed."""
        s, count, device = self.settings, len(item.batch.index), self.process.device
        own, logits, top, change = self.own(count), item.logits, item.top, None
        if s["color_jitter"] or s["lighting"]:
            g = generator(item.seed, JITTER, item.epoch, item.number)
            strength = s["color_jitter"], s["lighting"]
            change = partial(color_jitter, strength=strength, facts=self.feed.facts, g=g)
        x = self.feed.mixed(item, change)
        if self.teachers:
            logits = generate_soft_label.teacher_logits(self.teachers, x, half=s["use_fp16"])
            if len(own) < len(item.rows):  # the teacher took more than this process trains on
                where = batches.sent(torch.searchsorted(item.rows, own), device)
                x, logits = x[where], logits[where]
        elif logits is not None:
            logits = batches.sent(logits if len(own) == count else logits[own], device)
            top = None if top is None else batches.sent(top[own], device)
        lam, weights = item.batch.lam, None
        both = item.batch.index[own], item.batch.index[item.batch.partner[own]]
        classes = (batches.sent(self.images.targets[i], device) for i in both)
        if self.weights is not None:
            image, partner = (self.weights[i] for i in both)
            weights = batches.sent(lam * image + (1 - lam) * partner, device)
        return training.Part(count, x, training.Goal(logits, *classes, lam, top, weights))


GRAY = (0.299, 0.587, 0.114)
# of ImageNet's RGB covariance (Krizhevsky et al. 2012), as the whole field uses them
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


def color_jitter(x, rows, count, strength, facts, g):
    """Minimax: brightness, contrast and saturation in random order, then PCA noise.

    x          (n, 3, S, S) normalised: the rows `rows` of a batch of `count`, which is drawn for
    strength   (largest change of the three, standard deviation of the noise);   facts: mean, std
    """
    jitter, lighting = strength
    order = torch.rand(count, 3, generator=g).argsort(1)[rows].to(x.device)  # which comes when
    alpha = (torch.rand(count, 3, generator=g) * 2 - 1)[rows].to(x.device) * jitter
    noise = torch.randn(count, 3, generator=g)[rows].to(x.device) * lighting
    constants = (facts.mean, facts.std, GRAY)
    mean, std, gray = (batches.per_channel(values, x.device) for values in constants)
    x = x * std + mean
    for place in range(3):
        kind = order[:, place].view(-1, 1, 1, 1)
        shade = (x * gray).sum(1, keepdim=True)  # (n, 1, S, S)
        flat = shade.mean((2, 3), keepdim=True)
        towards = torch.where(kind == 0, 0, torch.where(kind == 1, flat, shade))
        x = x + alpha[:, place].view(-1, 1, 1, 1) * (towards - x)
    values, vectors = (torch.tensor(v, device=x.device) for v in (EIGENVALUES, EIGENVECTORS))
    x = x + ((noise * values) @ vectors.T).view(-1, 3, 1, 1)
    return (x - mean) / std
