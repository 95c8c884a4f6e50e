"""Synthesis-time matching (STM; paper, table 3): D4M images, optimised further against a teacher.

    python -m matching.stm --image_path output/images/imagenet_ipc10_s0.7_g8_kmexpand1

SRe2L's recover step (arXiv 2306.13092), by its published numbers, from the images and not noise:

    min over x of   CE(f(a(x)), y) + r_bn sum_l w_l (|m_l - running m_l| + |v_l - running v_l|)

with m_l and v_l the mean and variance of the input of BatchNorm l, w = first_bn_multiplier for the
first and 1 for the others, and one random crop, flip and shift a() for the whole batch in each of
4000 Adam steps. A batch, image i of `batch_size` classes, is the unit of work.
"""

import contextlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from distillation import datasets, image_folder
from matching import batches, models
from matching import images as image_sets
from matching.generate_soft_label import missing_inputs
from scripts import output, runtime
from scripts.runtime import Parser, entry_point, number, refuse

CROP_SCALE = (0.08, 1.0)  # torchvision's RandomResizedCrop as SRe2L calls it

# ---- the objective


@contextlib.contextmanager
def batchnorm_distance(teacher, first_multiplier):
    """Gives a function that returns R_BN of SRe2L, of the teacher's last forward pass."""
    distances = {}

    def note(layer, inputs, _):
        x = inputs[0]  # (B, C, h, w)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        distances[layer] = (layer.running_mean - mean).norm() + (layer.running_var - var).norm()

    layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    weights = [first_multiplier] + [1.0] * (len(layers) - 1)
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield lambda: sum(w * distances[layer] for w, layer in zip(weights, layers))
    finally:
        for hook in hooks:
            hook.remove()


def augment(x, jitter, g):
    """One crop, flip and cyclic shift of at most `jitter` pixels for a batch (B, 3, S, S)."""
    size = x.shape[-1]
    top, left, height, width = batches.draw_crops(torch.tensor([[size] * 2]), CROP_SCALE, g)[0]
    flip = bool(torch.rand((), generator=g) < 0.5)
    shift = torch.randint(0, jitter + 1, (2,), generator=g).tolist()  # down, right
    x = x[:, :, top : top + height, left : left + width]
    # it always enlarges: no antialias
    x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
    return torch.roll(x.flip(3) if flip else x, shift, (2, 3))


def match_batch(teacher, x, targets, g, settings, facts, bar):
    """Optimise a batch of normalised images; returns it and its last losses {"ce", "bn"}.

    teacher   frozen, in eval mode;   x (B, 3, S, S);   targets (B,);   g: the batch's own generator
    """
    iterations, x = settings["iterations"], x.clone().requires_grad_(True)
    scales = list(zip(facts.mean, facts.std))
    limits = (tuple((v - m) / s for m, s in scales) for v in (0.0, 1.0))
    black, white = (batches.per_channel(limit, x.device) for limit in limits)
    optimizer = torch.optim.Adam([x], settings["lr"], betas=(0.5, 0.9), eps=1e-8)
    with batchnorm_distance(teacher, settings["first_bn_multiplier"]) as distance:
        for t in range(iterations):
            cosine = 1 + math.cos(math.pi * t / iterations)
            optimizer.param_groups[0]["lr"] = settings["lr"] * cosine / 2
            outputs = teacher(augment(x, settings["jitter"], g))
            ce, bn = F.cross_entropy(outputs, targets), distance()
            optimizer.zero_grad()
            (ce + settings["r_bn"] * bn).backward()
            optimizer.step()
            with torch.no_grad():
                torch.clamp(x, black, white, out=x)  # a pixel stays within 0 .. 255
            bar.update()
    return x.detach(), {"ce": round(ce.item(), 4), "bn": round(bn.item(), 4)}


def to_pictures(x, facts):
    """(B, 3, S, S) normalised -> (B, S, S, 3) uint8 numpy array."""
    mean, std = (batches.per_channel(values, x.device) for values in (facts.mean, facts.std))
    x = (x * std + mean).clamp(0, 1)
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


# ---- main


def match_images(out, jobs, images, teacher, num_workers):
    """Optimise and write every batch of `jobs` that is not on disk yet."""
    settings, size, facts = out.settings, images.image_size, datasets.ALL[images.dataset]
    rows, columns = settings["batch_size"], [jobs[i :: images.ipc] for i in range(images.ipc)]
    # image i of `rows` consecutive classes, as SRe2L: a batch mixes classes
    units = [c[k : k + rows] for c in columns for k in range(0, len(images.folders), rows)]
    needed = len(units[0]) * size**2 * 3
    todo = out.todo(enumerate(units), lambda unit: [job.file for job in unit[1]], needed)
    arrays = image_sets.load_pixels("--image_path", images, num_workers)[0] if todo else []
    arrays, steps = dict(zip(images.files, arrays)), len(todo) * settings["iterations"]
    with out.progress(total=steps, desc="stm", unit="step") as bar:
        for nth, jobs in todo:
            pixels = torch.stack([torch.tensor(arrays[job.file]) for job in jobs])
            x = batches.normalise(pixels.to(out.process.device), facts.mean, facts.std)
            targets = torch.tensor([job.position for job in jobs], device=x.device)
            g = runtime.generator(settings["seed"], runtime.STM, nth)
            x, losses = match_batch(teacher, x, targets, g, settings, facts, bar)
            if not x.isfinite().all():
                problem = f"batch {nth} became NaN or infinite; use a smaller one"
                refuse(f"--lr {settings['lr']}: {problem}")
            image_folder.save_pngs(out, jobs, to_pictures(x, facts), size)
            out.log(event="batch", batch=nth, **losses)
            bar.set_postfix(losses)
            out.made += len(jobs)
            out.leave_if_asked()


def get_args(argv=None):
    # the defaults are SRe2L's for ResNet-18 on ImageNet-1K; its L2 and TV weights are 0
    parser = Parser("matching.stm", __doc__)
    setting, count, weight = parser.setting, number(int, 1), number(float, 0)
    rate, natural, name = number(float, above=0), number(int, 0), models.model_name
    parser.flag("--image_path", required=True, metavar="DIR", help="images of stage 2")
    setting("--iterations", type=count, default=4000, short="it", help="steps of Adam")
    setting("--lr", type=rate, default=0.25, short="lr", help="in normalised pixels; cosine to 0")
    setting("--r_bn", type=weight, default=0.01, short="bn", help="of the BatchNorm term")
    setting("--first_bn_multiplier", type=weight, default=10.0, short="first", help="of layer 1")
    setting("--batch_size", type=count, default=100, short="b", help="classes optimised together")
    setting("--arch", type=name, default="resnet18", short="arch", help="what is matched")
    weights = "its weights: a folder of train_teacher, or a file [torchvision's]"
    parser.flag("--teacher_checkpoint", help=weights)
    setting("--jitter", type=natural, short="jitter", help="largest shift in pixels [32 at 224 px]")
    setting("--seed", type=natural, default=0, short="stmseed", help="of crops, flips and shifts")
    where = "the folder is made below this one"
    parser.flag("--save_init_image_path", default="output/images", help=where)
    runtime.add_process_flags(parser)
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    flag, path, checkpoint = "--image_path", args.image_path, args.teacher_checkpoint
    where = "--save_init_image_path", args.save_init_image_path
    name, size, _, count = image_sets.outlook(flag, path)
    # SRe2L shifts 224-px images by up to 32 pixels
    settings = args.settings.filled(jitter=round((size or 0) * 32 / 224))
    name = output.folder_name(f"{name}_stm", *settings.parts())
    if args.dry_run and (waits_for := missing_inputs(path, [checkpoint])):
        return output.plan(Path(where[1]) / name, 0, count, 3 * count * (size or 0) ** 2, waits_for)
    manifest, images = image_folder.read_images(flag, path), image_sets.open_images(flag, path)
    classes, known = manifest["classes"], (images.dataset, images.folders, size)
    teacher, teacher_facts = models.load_teacher(args.arch, checkpoint, *known)
    if not any(isinstance(m, nn.BatchNorm2d) for m in teacher.modules()):
        refuse(f"--arch {args.arch}: has no BatchNorm layer whose statistics could be matched")
    source = {name: manifest[name] for name in ("arguments", "inputs")}
    inputs = {"source": images.content, "source_manifest": source}
    inputs["teacher"] = teacher_facts["sha256"]
    with output.Output(*where, name, "images", settings, inputs, process) as out:
        jobs = image_folder.list_jobs(classes, images.ipc, images.ipc)
        match_images(out, jobs, images, teacher.to(process.device), args.num_workers)
        facts = {"dataset": images.dataset, "arm": "stm", "ipc": images.ipc, "image_size": size}
        rows = {job: {"source": job.file, "matched": args.arch} for job in jobs}
        image_folder.finish_images(out, jobs, classes, rows.get, **facts)
    return out.folder


if __name__ == "__main__":
    main()
