"""Run one of the paper's tables: every stage of every cell, skipping what is on disk, then print it beside the
paper's.

    sh validate/table2.sh --plan                                              # what it would do, time and disk; runs
                                                                              nothing
    sh validate/table2.sh --dataset imagenet --ipc 10 --student resnet18      # some cells
    sh validate/table2.sh --jobs 8                                            # stages 1-3 over 8 GPUs, then one
                                                                              student a GPU
    sh validate/table2.sh --smoke                                             # the same commands at toy scale, on a
                                                                              CPU

Each cell is a list of command lines of the stage modules; a command that several cells share is run once. Beside each
D4M number, and under the same recipe and seeds, stand as many random real images a class and hard labels (--baseline
none leaves them out). --smoke changes values of flags, never flags; its only extra commands train stand-ins for
torchvision's teachers. Some values can be changed one by one, to rehearse a cell on its real data set; the table's
heading then says so, and no other table is filled with the result.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: sh validate/table1.sh ... table6.sh", file=sys.stderr)
    sys.exit(2)

import os
import sys

if "--smoke" in sys.argv:  # hundreds of progress bars of a second each; tqdm reads this when it is imported
    os.environ.setdefault("TQDM_DISABLE", "1")

import importlib
import queue
import shlex
import signal
import subprocess
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from distillation.datasets import dataset_name
from matching.models import PUBLIC, model_name
from scripts.checkpoints import DEFAULT_CHECKPOINT
from scripts.checkpoints import model_name as checkpoint_name
from scripts.files import ARGS, is_complete, output_name, read_json, write_text
from scripts.runtime import EXIT_STOPPED, Parser, Stopwatch, natural, positive_int, refuse
from validate.paper_tables import (
    BASELINES,
    CLASSES,
    DATASET_TITLES,
    FORMATS,
    OTHER,
    TABLES,
    TITLES,
    TRAIN_IMAGES,
    differences,
    file_name,
    find_costs,
    find_results,
    find_teachers,
    generator_note,
    heading,
    match_all,
    measure_cost,
    other_rows,
    read_result,
    table_cells,
    table_rows,
)

# ---- values: of the paper's runs, and of --smoke


class Site(NamedTuple):
    """One data set at one scale: all values by which a full run, a changed one and --smoke differ."""

    dataset: str
    data_dir: str
    prompts: str
    checkpoint: str
    out: str
    size: int = 512  # pixels at which images enter the VAE
    image_size: int = 224  # of saved images and of students
    sd_batch: int = 32
    classes: tuple | None = None
    cost_classes: tuple = ("0-9",)
    workers: int = 8
    epochs: int = 300
    batch: int = 1024
    accumulation: int = 2
    bn_batch: int = 73  # the release: 1024 / 7 GPUs / 2 accumulation steps
    seeds: tuple = (0, 1, 2)
    eval_every: int = 50
    stm_iterations: int = 4000
    stm_batch: int = 100
    teacher: bool = False  # nobody publishes one: it is trained
    teacher_epochs: int | None = None
    smoke: bool = False


# The paper is silent on CIFAR and Tiny-ImageNet. CIFAR: DD-Ranking's settings (500 epochs, batch 100); five trainings,
# as the paper. Tiny-ImageNet: ImageNet's, at 64 px. Teachers: train_teacher's own recipes.
SMALL = {"epochs": 500, "batch": 100, "accumulation": 1, "bn_batch": 100, "seeds": (0, 1, 2, 3, 4)}
FULL = {
    "imagenet": {},
    "tiny_imagenet": {"image_size": 64, "teacher": True},
    "cifar10": {"image_size": 32, "teacher": True, **SMALL},
    "cifar100": {"image_size": 32, "teacher": True, **SMALL},
}
SMOKE = {
    "size": 32, "image_size": 32, "sd_batch": 8, "cost_classes": ("0-2",), "workers": 0, "epochs": 2, "batch": 8,
    "bn_batch": 8, "accumulation": 1, "eval_every": 2, "stm_iterations": 2, "stm_batch": 4, "smoke": True,
}  # fmt: skip
SMOKE_TEACHER = {
    "epochs": 2, "batch_size": 8, "learning_rate": 0.01, "weight_decay": 1e-4, "warmup_epochs": 0, "augment": "none",
    "flip": 0,
}  # fmt: skip
SMOKE_IPC = 2
SMOKE_CLASSES = ("0", "1", "2")
COST_IPC = 10


def open_site(dataset, args):
    """The Site of one of the paper's data sets, from the flags of this script."""
    full = FULL[dataset]
    if not args.smoke:
        seeds = tuple(args.seeds) if args.seeds else full.get("seeds", Site._field_defaults["seeds"])
        prompts = f"distillation/label-prompt/{dataset}.txt"
        places = (getattr(args, f"{dataset}_dir"), prompts, args.diffusion_checkpoints_path, args.out)
        return with_changes(Site(dataset, *places, **{**full, "seeds": seeds, "workers": args.num_workers}), args)
    data = f"{args.out}/smoke/data"
    seeds = tuple(args.seeds or (0, 1))[: 2 if dataset.startswith("cifar") else 1]  # two where they cost little
    places = (data, f"{data}/prompts.txt", args.diffusion_checkpoints_path, f"{args.out}/smoke/{dataset}")
    return Site("imagefolder", *places, **{**SMOKE, "teacher": "teacher" in full, "seeds": seeds})


CHANGES = ("classes", "size", "epochs", "batch_size", "teacher_epochs")  # flags that leave the paper's run


def with_changes(site, args):
    """The Site with the values of CHANGES that were given."""
    if args.batch_size:
        site = site._replace(batch=args.batch_size, bn_batch=min(site.bn_batch, args.batch_size))
    if args.classes:
        site = site._replace(classes=tuple(args.classes), cost_classes=tuple(args.classes))
    values = {"size": args.size or site.size, "epochs": args.epochs or site.epochs}
    return site._replace(**values, teacher_epochs=args.teacher_epochs)


# ---- steps


class Step(NamedTuple):
    """One command line of a stage.

    kind      prototypes, images, labels, teacher, student ...;   folder: its output, there with a manifest when it is
              done
    hours, gib    estimates for one H200 and for the disk;   once: (key, hours, gib) of what several steps share,
                  latents
    """

    kind: str
    module: str
    argv: tuple
    folder: Path
    hours: float = 0.0
    gib: float = 0.0
    once: tuple = ("", 0.0, 0.0)

    @property
    def key(self):
        return self.module, self.argv

    def line(self, processes=1):
        """As one would type it."""
        start = "python" if processes == 1 else f"torchrun --standalone --nproc_per_node {processes}"
        return f"{start} -m {self.module} {shlex.join(self.argv)}"


def flags(**values):
    """flags(ipc=10, cos=True, seeds=(0, 1), bn_batch=None) -> ('--ipc', '10', '--cos', '--seeds', '0', '1')"""
    argv = []
    for name, value in values.items():
        if value is None:
            continue
        argv.append(f"--{name}")
        if value is not True:
            argv += [str(v) for v in (value if isinstance(value, (tuple, list)) else [value])]
    return tuple(argv)


def parsed(module, argv):
    return importlib.import_module(module).get_args(list(argv))


# Estimates for one H200 (images a second), from operation counts at the utilisation that is usual there. Not measured.
ENCODE, SYNTHESIS, LABEL, TRAIN = 360, 6.5, 21000, 14000
STEP = 0.01  # seconds: no step takes less, however small its network; its kernels are started one by one
RELATIVE = {  # cost of an image at 224 px, ResNet-18 = 1
    "resnet18": 1, "resnet50": 2.6, "resnet101": 4.4, "mobilenet_v2": 1.3, "efficientnet_b0": 1.9, "swin_t": 3.2,
    "vit_b_16": 7, "convnet_w128": 0.05,
}  # fmt: skip
MILLIONS = {  # of parameters
    "resnet18": 11.7, "resnet50": 25.6, "resnet101": 44.5, "mobilenet_v2": 3.5, "efficientnet_b0": 5.3, "swin_t": 28.3,
    "vit_b_16": 86.6, "convnet_w128": 0.3,
}  # fmt: skip
PNG_KIB = {224: 60, 64: 8, 32: 2.5}


class Estimate:
    """Hours and GiB of each stage for one of the paper's data sets."""

    def __init__(self, dataset, site):
        self.real, self.classes, self.site = TRAIN_IMAGES[dataset], CLASSES[dataset], site

    def prototypes(self, ipc, classes=None):
        share = (classes or self.classes) / self.classes
        encode = self.real * share / ENCODE / 3600
        gib = self.classes * share * ipc * 115000 / 2**30
        if classes:  # table 6 keeps no latents
            return {"hours": encode, "gib": gib}
        left = 1 - self.cached()
        once = (self.site.out + self.site.data_dir, left * encode, left * self.real * 32768 / 2**30)
        return {"hours": 0.0, "gib": gib, "once": once}

    def cached(self):
        """The share of the classes whose latents an earlier run has kept."""
        folders = Path(self.site.out, "latents").glob(f"{self.site.dataset}-latents-*")
        return min(1, max((len(list(f.glob("*.safetensors"))) for f in folders), default=0) / self.classes)

    def training(self, count, epochs, batch_size, rate):
        """Hours of `epochs` over `count` images, at `rate` images a second at most."""
        steps = -(-count // batch_size)
        return epochs * max(count / rate, steps * STEP) / 3600

    def images(self, count, speed=SYNTHESIS):
        return {"hours": count / speed / 3600, "gib": count * PNG_KIB.get(self.site.image_size, 2.5) / 2**20}

    def labels(self, ipc, arch):
        count, epochs = ipc * self.classes, self.site.epochs
        hours = self.training(count, epochs, self.site.batch, LABEL / RELATIVE[arch])
        return {"hours": hours, "gib": count * epochs * (2 * self.classes + 25) / 2**30}

    def student(self, ipc, arch, seeds):
        hours = self.training(ipc * self.classes, self.site.epochs, self.site.batch, TRAIN / RELATIVE[arch])
        return {"hours": hours * seeds, "gib": MILLIONS[arch] * 4e6 * seeds / 2**30}

    def teacher(self, arch, recipe):
        hours = self.training(self.real, recipe["epochs"], recipe["batch_size"], TRAIN / RELATIVE[arch])
        return {"hours": hours, "gib": MILLIONS[arch] * 4e6 / 2**30}

    def stm(self, ipc, iterations):
        count = ipc * self.classes
        return {**self.images(count), "hours": self.training(count, iterations, self.site.stm_batch, TRAIN)}


def prototypes_step(dataset, site, ipc, root=None, classes=None):
    from distillation.prototypes import default_size, prototype_folder_name

    argv = flags(
        dataset=site.dataset, data_dir=site.data_dir, label_file_path=site.prompts,
        diffusion_checkpoints_path=site.checkpoint, size=site.size, ipc=ipc, km_expand=1,
        classes=classes or site.classes, batch_size=site.sd_batch, num_workers=site.workers,
        latent_cache=None if classes else f"{site.out}/latents", save_prototype_path=f"{root or site.out}/prototypes",
    )  # fmt: skip
    args = parsed("distillation.gen_prototype", argv)
    name = prototype_folder_name({**vars(args), "size": args.size or default_size(args.dataset)})
    cost = Estimate(dataset, site).prototypes(ipc, 10 if classes else None)
    return Step("prototypes", "distillation.gen_prototype", argv, Path(args.save_prototype_path) / name, **cost)


def images_step(dataset, site, prototypes, arm, root=None, batch_size=None):
    """Stage 2 of one arm, from the prototypes that `prototypes` makes."""
    from distillation.gen_syn_image import image_folder_name, synthesis_settings
    from distillation.prototypes import default_size

    made_by = parsed(prototypes.module, prototypes.argv)
    argv = flags(
        dataset=site.dataset, prototype_path=prototypes.folder, diffusion_checkpoints_path=site.checkpoint,
        ipc=made_by.ipc, km_expand=1, strength=0.7, guidance_scale=8, num_inference_steps=50,
        negative_prompt="cartoon, anime, painting", arm=arm, image_size=site.image_size,
        batch_size=batch_size or site.sd_batch, num_workers=site.workers,
        save_init_image_path=f"{root or site.out}/images",
    )  # fmt: skip
    args = parsed("distillation.gen_syn_image", argv)
    stage1 = {**vars(made_by), "size": made_by.size or default_size(site.dataset)}
    name = image_folder_name(synthesis_settings(args, arm, None, {}), stage1)
    count = made_by.ipc * (10 if made_by.classes else CLASSES[dataset])
    cost = Estimate(dataset, site).images(count, 1.5 if batch_size == 1 else SYNTHESIS)
    return Step("images", "distillation.gen_syn_image", argv, Path(args.save_init_image_path) / name, **cost)


def random_step(dataset, site, ipc):
    from distillation.datasets import DATASETS

    argv = flags(
        dataset=site.dataset, data_dir=site.data_dir, label_file_path=site.prompts, ipc=ipc, classes=site.classes,
        image_size=site.image_size, save_init_image_path=f"{site.out}/images",
    )  # fmt: skip
    name = output_name(
        f"{site.dataset}_ipc{ipc}_random",
        {"imagesize": site.image_size, "classes": site.classes},
        {"imagesize": DATASETS[site.dataset].image_size, "classes": None},
    )
    cost = Estimate(dataset, site).images(ipc * CLASSES[dataset], 200)
    return Step("random", "distillation.random_real", argv, Path(site.out) / "images" / name, **cost)


def taken_step(dataset, site, images, ipc):
    from distillation.take_classes import taken_folder_name

    argv = flags(
        image_path=images.folder, dataset=site.dataset, image_size=site.image_size,
        save_init_image_path=f"{site.out}/images",
    )  # fmt: skip
    name = taken_folder_name(site.dataset, ipc, images.folder.name, site.image_size)
    cost = Estimate(dataset, site).images(ipc * CLASSES[dataset], 200)
    return Step("taken", "distillation.take_classes", argv, Path(site.out) / "images" / name, **cost)


def stm_step(dataset, site, images, ipc):
    from matching.stm import default_jitter, folder_name

    argv = flags(
        image_path=images.folder, arch="resnet18", teacher_checkpoint=teacher_checkpoint(dataset, site, "resnet18"),
        iterations=site.stm_iterations, lr=0.25, r_bn=0.01, first_bn_multiplier=10, batch_size=site.stm_batch,
        num_workers=site.workers, save_init_image_path=f"{site.out}/images",
    )  # fmt: skip
    args = parsed("matching.stm", argv)
    name = folder_name(images.folder.name, {**vars(args), "jitter": default_jitter(site.image_size)}, site.image_size)
    cost = Estimate(dataset, site).stm(ipc, site.stm_iterations)
    return Step("stm", "matching.stm", argv, Path(site.out) / "images" / name, **cost)


def teacher_step(dataset, site, arch):
    """Train a teacher that nobody publishes; in --smoke also a stand-in for torchvision's."""
    from matching.train_teacher import default_recipe, recipe_of, teacher_name

    recipe = dict(SMOKE_TEACHER) if site.smoke else default_recipe(dataset, arch)._asdict()
    recipe["epochs"] = site.teacher_epochs or recipe["epochs"]
    argv = flags(
        dataset=site.dataset, data_dir=site.data_dir, classes=site.classes, arch=arch, input_size=site.image_size,
        **recipe, bn_batch=recipe["batch_size"], eval_every=10, num_workers=site.workers,
        output_dir=f"{site.out}/teachers",
    )  # fmt: skip
    args = parsed("matching.train_teacher", argv)
    cost = Estimate(dataset, site).teacher(arch, recipe)
    kind = "teacher" if site.teacher else "stand-in"
    folder = Path(site.out) / "teachers" / teacher_name(args, recipe_of(args))
    return Step(kind, "matching.train_teacher", argv, folder, **cost)


def trains_teachers(site):
    return site.teacher or site.smoke


def teacher_checkpoint(dataset, site, arch):
    return teacher_step(dataset, site, arch).folder if trains_teachers(site) else PUBLIC


def protocol_flags(site):
    """What a training batch is: the same in stages 3 and 4."""
    return {
        "epochs": site.epochs, "batch_size": site.batch, "fkd_seed": 42, "input_size": site.image_size,
        "min_scale_crops": 0.08, "max_scale_crops": 1, "mix_type": "cutmix", "cutmix": 1.0,
    }  # fmt: skip


def labels_step(dataset, site, images, ipc, arch):
    from matching.soft_labels import PROTOCOL, labels_name, protocol_of

    argv = flags(
        data=images.folder, arch=arch, teacher_checkpoint=teacher_checkpoint(dataset, site, arch),
        **protocol_flags(site), use_fp16=True, num_workers=site.workers, fkd_path=f"{site.out}/labels",
    )  # fmt: skip
    args = parsed("matching.generate_soft_label", argv)
    protocol = protocol_of({name: getattr(args, name) for name in PROTOCOL}, site.image_size)
    name = labels_name(images.folder.name, args.arch, protocol, site.image_size)
    cost = Estimate(dataset, site).labels(ipc, arch)
    return Step("labels", "matching.generate_soft_label", argv, Path(site.out) / "labels" / name, **cost)


def student_step(dataset, site, images, ipc, model, labels=None, arch=None, amp="none"):
    """Stage 4 on stored labels; with `arch` instead, labelled while it trains; with neither, on hard labels."""
    from matching.soft_labels import PROTOCOL, labels_name, protocol_of
    from validate.train_FKD import Inputs, recipe_of, student_name

    source = {"fkd_path": labels and labels.folder, "temperature": 20}
    if arch:
        checkpoint = teacher_checkpoint(dataset, site, arch)
        source = {"online": True, "arch": arch, "teacher_checkpoint": checkpoint, "temperature": 20}
    elif not labels:
        source = {"hard_label": True}
    argv = flags(
        train_dir=images.folder, **source, val_dir=site.data_dir, model=model, **protocol_flags(site),
        gradient_accumulation_steps=site.accumulation, bn_batch=site.bn_batch, adamw_lr=0.001, adamw_weight_decay=0.01,
        cos=True, seeds=site.seeds, eval_every=site.eval_every, amp=amp, num_workers=site.workers,
        output_dir=f"{site.out}/students",
    )  # fmt: skip
    args = parsed("validate.train_FKD", argv)
    if labels:
        stem = labels.folder.name
    else:
        protocol = protocol_of({n: getattr(args, n) for n in PROTOCOL}, site.image_size)
        stem = labels_name(images.folder.name, [arch or "hard"], protocol, site.image_size) + (
            "_online" if arch else ""
        )
    chunk = min(site.bn_batch, site.batch)
    inputs = dict.fromkeys(Inputs._fields) | {"stem": stem, "label_epochs": site.epochs}
    inputs["protocol"] = {"epochs": site.epochs, "batch_size": site.batch}
    name = student_name(Inputs(**inputs), recipe_of(args), chunk, args)
    cost = Estimate(dataset, site).student(ipc, model, len(site.seeds))
    return Step("student", "validate.train_FKD", argv, Path(site.out) / "students" / name, **cost)


# ---- cells


def chosen(cell, args):
    """Whether a cell fits --dataset, --ipc, --method, --teacher and --student."""
    arms = set(args.method or [])
    arms |= {"text"} if "noise" in arms else set()  # a fair run without prototypes reports both
    wanted = (
        (args.dataset, cell.dataset), (args.ipc, cell.ipc), (arms or None, cell.arm), (args.teacher, cell.teacher),
        (args.student, cell.student),
    )  # fmt: skip
    return all(not values or value is None or value in values for values, value in wanted)


def steps_of(cell, args):
    """([Step], {"result", "random", "hard": folder}) of one cell, in the order in which they run."""
    site = open_site(cell.dataset, args)
    if cell.table == 6:
        return cost_steps(cell.dataset, site)
    ipc = SMOKE_IPC if args.smoke else cell.ipc
    steps, folders = [], {}
    if cell.arm == "d4m-g" and args.classes:
        refuse(
            f"--classes: not for d4m-g, which takes every class of {DATASET_TITLES[cell.dataset]}; choose --method d4m"
        )
    if trains_teachers(site):
        archs = {"resnet18": cell.arm == "stm", cell.teacher: True}
        steps += [teacher_step(cell.dataset, site, arch) for arch, needed in archs.items() if needed]
    if cell.arm == "d4m-g":
        large = open_site("imagenet", args)
        prototypes = prototypes_step("imagenet", large, ipc)
        images = images_step("imagenet", large, prototypes, "d4m")
        steps += [prototypes, images, taken_step(cell.dataset, site, images, ipc)]
    else:
        prototypes = prototypes_step(cell.dataset, site, ipc)
        images = images_step(cell.dataset, site, prototypes, "d4m" if cell.arm == "stm" else cell.arm)
        steps += [prototypes, images]
        if cell.arm == "stm":
            steps.append(stm_step(cell.dataset, site, images, ipc))
    own = steps[-1]

    def soft(images, name):
        labels = None
        if not args.online:
            labels = labels_step(cell.dataset, site, images, ipc, cell.teacher)
            steps.append(labels)
        arch = cell.teacher if args.online else None
        steps.append(student_step(cell.dataset, site, images, ipc, cell.student, labels, arch, args.amp))
        folders[name] = steps[-1].folder

    soft(own, "result")
    if "random" in args.baseline:
        steps.append(random_step(cell.dataset, site, ipc))
        soft(steps[-1], "random")
    if "hard" in args.baseline:
        steps.append(student_step(cell.dataset, site, own, ipc, cell.student, amp=args.amp))
        folders["hard"] = steps[-1].folder
    return steps, folders


def cost_steps(dataset, site):
    """Table 6: some images made one at a time, as the paper, and in batches; their timing.json says the rest."""
    ipc, root = SMOKE_IPC if site.smoke else COST_IPC, f"{site.out}/cost"
    steps, folders = [prototypes_step(dataset, site, ipc, root, site.cost_classes)], {}
    for key, name, batch_size in (("one", "batch1", 1), ("batch", "batch32", site.sd_batch)):
        steps.append(images_step(dataset, site, steps[0], "d4m", f"{root}/{name}", batch_size))
        folders[key] = steps[-1].folder
    return steps, folders


def unique(steps):
    """Without repeats: a command that several cells share is run once."""
    return list({step.key: step for step in steps}.values())


# ---- what it will do


def duration(hours):
    if hours < 1:
        return f"{max(1, round(hours * 60))} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours / 24:.0f} days"


def size(gib):
    return f"{gib * 1024:.0f} MB" if gib < 1 else f"{gib:.0f} GB"


def total(steps):
    """'3.1 h on one H200, 14 GB' of those that are not on disk."""
    left = [step for step in unique(steps) if not is_complete(step.folder)]
    if not left:
        return "nothing"
    once = {step.once[0]: step.once for step in left}.values()
    hours = sum(s.hours for s in left) + sum(hours for _, hours, _ in once)
    return f"{duration(hours)} on one H200, {size(sum(s.gib for s in left) + sum(gib for *_, gib in once))}"


def print_plan(table, plan, estimated):
    """One line a cell: the command that makes it, and what it costs if it is run alone (`plan` of plan_of)."""
    steps = unique([step for _, own, _ in plan for step in own])
    done = sum(is_complete(step.folder) for step in steps)
    estimate = f"; left: {total(steps)} (estimates)" if estimated else ""
    count = f"{len(plan)} cell{'s' * (len(plan) > 1)}, {len(steps)} commands"
    print(f"# Table {table}, {TITLES[table]}: {count}, {done} on disk{estimate}")
    for cell, own, _ in plan:
        there = sum(is_complete(step.folder) for step in unique(own))
        alone = f"; {total(own)} if run alone" if estimated else ""
        left = f"{there} of {len(unique(own))} commands on disk{alone}" if there < len(unique(own)) else "done"
        print(f"{cell.command}  # {left}")
    sys.stdout.flush()


def command_lines(plan, jobs=1):
    """Every command of every cell, one a line, under its cell's own."""
    lines = []
    for cell, steps, _ in plan:
        lines.append(f"# {cell.command}")
        lines += [step.line(1 if step.kind == "student" else jobs) for step in steps]
    return lines


# ---- running


class Children:
    """Stage processes; SIGTERM and SIGUSR1 are handed on to them, so that each finishes its unit and leaves."""

    def __init__(self):
        self.running, self.asked = set(), False

    def __enter__(self):
        self.before = {s: signal.signal(s, self._forward) for s in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _forward(self, number, _frame):
        self.asked = True
        for child in list(self.running):
            child.send_signal(signal.SIGTERM)

    def run(self, step, processes, device=None):
        """Run one step in processes of its own; returns its exit status."""
        if self.asked:
            return EXIT_STOPPED
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment = dict(os.environ) if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
        with subprocess.Popen([*start, "-m", step.module, *step.argv], env=environment) as child:
            self.running.add(child)
            status = child.wait()
            self.running.discard(child)
        # torchrun, asked to stop, leaves with status 1 whatever its processes left with
        return EXIT_STOPPED if status and self.asked else status


def run_here(step):
    """Run one step in this process: --smoke has no time for the imports of a hundred processes."""
    import torch

    torch.set_num_threads(1)  # at this size more threads cost more than they give
    importlib.import_module(step.module).main(list(step.argv))


def run_smoke(steps):
    """Stages 1-3 in this process, then the students in two."""
    students = [step for step in steps if step.kind == "student"]
    first = [step for step in steps if step.kind != "student"]
    workers = min(2, os.cpu_count() or 1) if len(students) > 4 else 1
    if workers == 1:
        first, students = steps, []
    for number, step in enumerate(first, 1):
        print(f"[{number}/{len(steps)}] {step.line()}", flush=True)
        run_here(step)
        check_made(step)
    if students:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for number, (step, _) in enumerate(zip(students, pool.map(run_here, students)), len(first) + 1):
                print(f"[{number}/{len(steps)}] {step.line()}", flush=True)
                check_made(step)


def visible_devices(jobs):
    """Names of the GPUs to deal out, one a job; None where there is none."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]
    return [names[n % len(names)] for n in range(jobs)] if names and torch.cuda.is_available() else [None] * jobs


def run_steps(steps, jobs, smoke):
    """Run what is not on disk. One job: in order. Several: stages 1-3 over all of them, then one student a GPU."""
    steps = [step for step in unique(steps) if not is_complete(step.folder)]
    if smoke:
        run_smoke(steps)
        return
    wide = steps if jobs == 1 else [step for step in steps if step.kind != "student"]
    narrow = [] if jobs == 1 else [step for step in steps if step.kind == "student"]
    with Children() as children:
        for number, step in enumerate(wide, 1):
            print(f"[{number}/{len(steps)}] {step.line(jobs)}", flush=True)
            leave(step, children.run(step, jobs))
        devices = queue.SimpleQueue()
        for device in visible_devices(jobs) if narrow else []:
            devices.put(device)

        def one(numbered):
            number, step = numbered
            device = devices.get()
            print(f"[{number}/{len(steps)}] {step.line()}", flush=True)
            status = children.run(step, 1, device)
            devices.put(device)
            return step, status

        with ThreadPoolExecutor(jobs) as pool:
            outcomes = list(pool.map(one, enumerate(narrow, len(wide) + 1)))
        for step, status in outcomes:  # the others have finished all the same
            leave(step, status)


def leave(step, status):
    """Go on after a step that succeeded; leave with its status after another."""
    if status == EXIT_STOPPED or status in (-signal.SIGTERM, -signal.SIGUSR1):
        print("stopped; run the same command to go on", file=sys.stderr)
        raise SystemExit(EXIT_STOPPED)
    if status:
        print(f"error: left with status {status}: {step.line()}", file=sys.stderr)
        raise SystemExit(status if status > 0 else 1)
    check_made(step)


def check_made(step):
    if not is_complete(step.folder):
        refuse(f"{step.module}: did not make {step.folder}, which the next command needs")


def make_smoke_data(root):
    """A small image folder: the digits 0 to 2, 4 training and 2 test images each, 32 px, with their prompts."""
    from distillation.datasets import known_prompts, open_split, squash

    root = Path(root)
    if (root / "prompts.txt").is_file():
        return
    for split, count in (("train", 4), ("val", 2)):
        digits = open_split("digits", None, split, classes=list(SMOKE_CLASSES))
        for folder, items in zip(digits.folders, digits.items):
            (root / split / folder).mkdir(parents=True, exist_ok=True)
            for n, item in enumerate(items[:count]):
                squash(digits.read(item), 32).save(root / split / folder / f"{n:02d}.png")
    prompts = known_prompts("digits")
    write_text(root / "prompts.txt", "".join(f"{prompts[folder]}\n" for folder in SMOKE_CLASSES))


# ---- the table


def addition(args, plan):
    """What the heading says where the numbers are not of the paper's values."""
    if args.smoke:
        scale = f"three digits of 32 px, {SMOKE_IPC} images a class, two epochs"
        return f"SMOKE TEST: {scale}; the measured numbers mean nothing"
    checkpoint = checkpoint_name(args.diffusion_checkpoints_path)
    changed = [" ".join(flags(**{name: value})) for name, value in changes(args).items()]
    changed = changed or sorted(planned_differences(plan, checkpoint))
    words = [generator_note(checkpoint)]
    words += [f"Measured with {', '.join(changed)}, not as the paper"] if changed else []
    return ". ".join(filter(None, words))


def planned_differences(plan, checkpoint):
    """Why the results that this run made fill no cell of paper_tables, such as a precision or a part of the images."""
    odd = set()
    for cell, _, folders in plan if plan[0][0].table != 6 else ():
        for which, folder in folders.items():
            if is_complete(folder):
                arm, labels = BASELINES[which]
                odd.update(
                    differences(cell, read_result(folder / "results.json"), arm or cell.arm, labels, checkpoint)
                )
    return odd


def changes(args):
    """{flag: value} of CHANGES that were given and are not what every chosen cell has anyway."""
    given = {name: getattr(args, name) for name in CHANGES if getattr(args, name)}
    own = [paper_values(cell) for cell in table_cells(args.table) if chosen(cell, args)]
    return {name: value for name, value in given.items() if any(values.get(name) != value for values in own)}


def paper_values(cell):
    """The values of CHANGES that the full run of a cell has."""
    from matching.train_teacher import default_recipe

    site = {**Site._field_defaults, **FULL[cell.dataset]}
    values = {"size": site["size"], "epochs": site["epochs"], "batch_size": site["batch"]}
    if cell.teacher:
        values["teacher_epochs"] = default_recipe(cell.dataset, cell.teacher).epochs
    return values


def output_root(args):
    return Path(args.out) / "smoke" if args.smoke else Path(args.out)


def check_generator(args, plan):
    """Refuse an output root whose prototypes or images another Stable Diffusion made, or this one at another size.

    A complete folder is not made again, and no name says the model; of noise, those of before say no size either.
    """
    wanted = checkpoint_name(args.diffusion_checkpoints_path)
    for cell, steps, _ in plan:
        pixels = open_site(cell.dataset, args).size
        for step in steps:
            if step.kind not in ("prototypes", "images") or not (step.folder / ARGS).is_file():
                continue
            made = read_json(step.folder / ARGS)
            size_then = (made if step.kind == "prototypes" else made.get("prototype_arguments") or {}).get("size")
            for flag, now, then in (
                ("diffusion_checkpoints_path", wanted, made.get("model")),
                ("size", pixels, size_then),
            ):
                if then != now:
                    refuse(f"--{flag} {now}: {step.folder} was made with {then}; another --out")


def print_table(args, plan):
    """Write the table as markdown, LaTeX and JSON below the output root, and print it.

    A cell that was run now shows what its own folders hold; the others what else is found below the root, unless
    values were changed.
    """
    root, checkpoint = output_root(args), checkpoint_name(args.diffusion_checkpoints_path)
    alone = args.smoke or bool(changes(args))
    results = [] if alone else find_results(root)
    planned = {(c.dataset, c.ipc, c.arm, c.teacher, c.student): folders for c, _, folders in plan}

    def measure(cell):
        folders = planned.get((cell.dataset, cell.ipc, cell.arm, cell.teacher, cell.student))
        if folders is None:
            return {} if alone else match_all(cell, results, checkpoint)
        found = {name: folder / "results.json" for name, folder in folders.items()}
        return {name: read_result(path) for name, path in found.items() if path.is_file()}

    def costs(dataset):
        folders = planned.get((dataset, None, "d4m", None, None))
        if folders is None:
            return {"one": None, "batch": None} if alone else find_costs(root, dataset, checkpoint)
        return {name: measure_cost(folder) for name, folder in folders.items()}

    rows = table_rows(args.table, measure, {} if alone else find_teachers(root), costs)
    folder = root / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    title = heading(args.table, addition(args, plan))
    for render, suffix in FORMATS.values():
        write_text(folder / file_name(args.table, suffix), render(args.table, rows, title))
    print(FORMATS["markdown"][0](args.table, rows, title))
    own = {folder / "results.json" for folders in planned.values() for folder in folders.values()}
    others = other_rows(results, checkpoint, {cell.dataset for cell, _, _ in plan})
    others = [row for row in others if Path(row["result"]["path"]) not in own]
    if others:
        print(FORMATS["markdown"][0](OTHER, others, heading(OTHER)))
    print(f"{folder / f'table{args.table}'}.md, .tex, .json")


# ---- main


def get_args(argv=None):
    parser = Parser(prog="validate.run_table", description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=int, choices=TABLES, required=True)
    group = parser.add_argument_group("which cells (all that fit; default: the whole table)")
    group.add_argument("--dataset", type=dataset_name, nargs="+", default=None, metavar="NAME")
    group.add_argument("--ipc", type=positive_int, nargs="+", default=None)
    group.add_argument(
        "--method",
        nargs="+",
        choices=["d4m", "d4m-g", "stm", "noise", "text"],
        default=None,
        help="noise: without prototypes; it makes text-to-image as well",
    )
    group.add_argument("--teacher", type=model_name, nargs="+", default=None, metavar="NAME")
    group.add_argument("--student", type=model_name, nargs="+", default=None, metavar="NAME")
    group = parser.add_argument_group("how")
    group.add_argument("--plan", action="store_true", help="say what would be done, one command a cell, and stop")
    group.add_argument("--commands", action="store_true", help="print the commands of the stages, and stop")
    group.add_argument("--smoke", action="store_true", help="toy scale: the same flags with small values")
    group.add_argument("--jobs", type=positive_int, default=1, help="GPUs: all for stages 1-3, then one a student")
    group.add_argument(
        "--baseline",
        nargs="+",
        choices=["random", "hard", "none"],
        default=["random", "hard"],
        help="what runs beside each number: random real images, hard labels",
    )
    group.add_argument("--online", action="store_true", help="the teacher labels during training: no labels on disk")
    group.add_argument("--amp", choices=["none", "bf16"], default="none", help="precision of the student's training")
    group.add_argument("--seeds", type=int, nargs="+", default=None, help="[0 1 2; CIFAR: 0 1 2 3 4, as the paper]")
    group.add_argument("--num_workers", type=natural, default=8, help="reading processes of a stage; --smoke: none")
    group = parser.add_argument_group("other values than the paper's, for a rehearsal (the table's heading says so)")
    group.add_argument("--classes", nargs="+", default=None, metavar="C", help="only these: folders, indices, ranges")
    group.add_argument("--size", type=positive_int, default=None, help="pixels at which images enter the VAE")
    group.add_argument("--epochs", type=positive_int, default=None, help="of students, and of their labels")
    group.add_argument("--batch_size", type=positive_int, default=None, help="of students, and of their labels")
    group.add_argument("--teacher_epochs", type=positive_int, default=None, help="of teachers that are trained here")
    group = parser.add_argument_group("where")
    for dataset in FULL:
        where = {"tiny_imagenet": "tiny-imagenet-200"}.get(dataset, dataset)
        group.add_argument(f"--{dataset}_dir", default=f"data/{where}", metavar="DIR", help=DATASET_TITLES[dataset])
    group.add_argument("--diffusion_checkpoints_path", default=None, help="[Stable Diffusion v1-5; --smoke: our own]")
    group.add_argument("--out", default="output", help="everything is made below it, and found again")
    args = parser.parse_args(argv)
    model = "misc/tiny-sd-digits" if args.smoke else DEFAULT_CHECKPOINT
    args.diffusion_checkpoints_path = args.diffusion_checkpoints_path or model
    given = [name for name in CHANGES if getattr(args, name)]
    if args.smoke and given:
        refuse(f"--smoke: has its own values; drop --{given[0]}")
    if "none" in args.baseline and len(args.baseline) > 1:
        refuse(f"--baseline {' '.join(args.baseline)}: none leaves out what else is named")
    students = ("ipc", "teacher", "student", "epochs", "batch_size", "teacher_epochs")
    odd = [name for name in students if args.table == 6 and getattr(args, name)]
    if odd:
        refuse(f"--table 6: trains nothing and makes {COST_IPC} images a class; drop --{odd[0]}")
    return args


def plan_of(args):
    """[(Cell, [Step], {name: folder})] of the chosen cells."""
    cells = [cell for cell in table_cells(args.table) if chosen(cell, args)]
    if not cells:
        words = " ".join(f"{DATASET_TITLES[d]}" for d in dict.fromkeys(c.dataset for c in table_cells(args.table)))
        refuse(f"--table {args.table}: none of its {len(table_cells(args.table))} D4M cells fits ({words})")
    return [(cell, *steps_of(cell, args)) for cell in cells]


def main(argv=None):
    args = get_args(argv)
    plan = plan_of(args)
    lines = command_lines(plan, 1 if args.smoke else args.jobs)  # --smoke has no GPUs: run_smoke starts no torchrun
    if args.commands:
        print("\n".join(lines))
        return
    print_plan(args.table, plan, estimated=not (args.smoke or changes(args)))
    if args.plan:
        return
    check_generator(args, plan)
    watch = Stopwatch()
    root = output_root(args)
    (root / "tables").mkdir(parents=True, exist_ok=True)
    write_text(root / "tables" / f"table{args.table}.commands.txt", "\n".join(lines) + "\n")
    if args.smoke:
        make_smoke_data(root / "data")
    run_steps([step for _, steps, _ in plan for step in steps], args.jobs, args.smoke)
    print_table(args, plan)
    print(f"{watch.seconds:.0f} s")


if __name__ == "__main__":
    main()
