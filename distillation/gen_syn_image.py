"""Stage 2, synthesis (paper, section 3): prototypes -> noised, denoised under the prompt, decoded.

    python -m distillation.gen_syn_image --dataset imagenet --ipc 10 --km_expand 1 \\
        --strength 0.7 --guidance_scale 8 \\
        --prototype_path output/prototypes/imagenet-ipc10-kmexpand1

The list of all images is cut into fixed batches; a batch is the unit of work, so that every pixel
is the same for any number of processes and restarts. Image i of class c has its own generator of
noise, seeded from (seed, c, i).

--arm also makes what D4M is compared with (paper, table 4), from the same prototype folder:
    d4m       the method
    decoded   prototypes decoded without diffusion
    noise     noise denoised from t = strength * T: what the release calls random initialisation
    text      text-to-image, no prototypes
"""

import io
import json
import sys
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from distillation import datasets, prototypes
from scripts import files, generators, output, runtime
from scripts.runtime import Parser, entry_point, number, refuse, warn

ARMS = ("d4m", "decoded", "noise", "text")
FROM_PROTOTYPES = ("d4m", "decoded")
# of stage 2's settings, those that stage 1 has too
SHARED = ("dataset", "ipc", "km_expand", "seed", "batch_size", *generators.SETTINGS)
REDRAWS = 3  # how often a flat (black) image is drawn again with another seed


class Job(NamedTuple):
    """One image to make: number `i` of class `position`, from prototype number `prototype`."""

    position: int
    class_id: int  # in the whole data set
    folder: str
    prompt: str
    i: int
    prototype: int

    @property
    def file(self):
        return f"{self.folder}/{self.folder}_{self.i:04d}.png"


def list_jobs(classes, ipc, num_prototypes):
    """Every image, class by class; where prototypes are fewer, each gives several noises."""
    return [
        Job(position, c["index"], c["folder"], c["prompt"], i, i % num_prototypes)
        for position, c in enumerate(classes)
        for i in range(ipc)
    ]


def cut(jobs, batch_size):
    return [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]


# ---- synthesis


def image_key(seed, job, attempt):
    """What seeds an image's noise."""
    # differs from the release: seeded, image by image
    return seed, runtime.SYNTHESIS, job.class_id, job.i, attempt


class Synthesizer:
    """Turns batches of jobs into pictures with the settings of one arm.

    at_hand    {position: Prototypes} of the classes in the batch
    """

    def __init__(self, model, settings):
        self.model, self.settings, self.limit = model, settings, runtime.MemoryLimit(sys.maxsize)

    def draw(self, jobs, at_hand):
        """(B, H, W, 3) uint8 and how often each was redrawn: flat pictures get the next seed."""
        pictures, attempts = self.pictures(jobs, at_hand), [0] * len(jobs)
        for attempt in range(1, REDRAWS + 2):
            for n in [n for n, picture in enumerate(pictures) if picture.min() == picture.max()]:
                if attempt > REDRAWS:
                    refuse(f"{jobs[n].file}: still a flat picture after {REDRAWS} other seeds")
                flat = f"a flat picture of value {pictures[n].max()}"
                warn(f"{jobs[n].file}: {flat}; drawn again with the next seed")
                pictures[n], attempts[n] = self.pictures([jobs[n]], at_hand, attempt)[0], attempt
        return pictures, attempts

    def pictures(self, jobs, at_hand, attempt=0):
        """(B, H, W, 3) uint8 of one seed each, in as many parts as fit the GPU."""
        parts = runtime.in_parts(lambda p: self._part(p, at_hand, attempt), jobs, self.limit)
        return np.concatenate(parts)

    @torch.no_grad()
    def _part(self, jobs, at_hand, attempt):
        starts = torch.stack([self.start(job, at_hand, attempt) for job in jobs])  # (B, c, h, w)
        images = self._images(jobs, starts, attempt)  # (B, 3, H, W)

        def again(n):
            return self._images([jobs[n]], starts[n : n + 1], attempt)

        generators.mend(self.model, images, again, [job.file for job in jobs])
        return (images.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).cpu().numpy()

    def start(self, job, at_hand, attempt):
        """(c, h, w) float16: the prototype, or for the arms without one N(0, 1).

        A unit Gaussian noised by sqrt(a) x + sqrt(1 - a) e is a unit Gaussian again at every t, so
        the stock pipeline then starts from pure noise: "noise" at t = strength * T, "text" at T.
        """
        prototype = torch.from_numpy(at_hand[job.position].latents[job.prototype])
        if self.settings["arm"] in FROM_PROTOTYPES:
            return prototype
        key = (self.settings["seed"], runtime.START, job.class_id, job.i, attempt)
        return torch.randn(prototype.shape, generator=runtime.generator(*key)).to(torch.float16)

    def _images(self, jobs, starts, attempt):
        """(B, 3, H, W) in [0, 1]"""
        s, model = self.settings, self.model
        if s["arm"] == "decoded":
            return model.decode(starts, check=False)
        conditions = [model.condition(job.prompt) for job in jobs]
        negative = model.condition(s["negative_prompt"])
        draws = [runtime.generator(*image_key(s["seed"], job, attempt)) for job in jobs]
        how = (s["strength"], s["guidance_scale"], s["num_inference_steps"])
        return model.decode(model.denoise(starts, conditions, negative, draws, *how))


def make_images(out, batches, synthesizer, stream):
    """Make `batches`, each whole; PNGs are written beside the next batch.

    stream    positions -> iterator of (position, Prototypes); a class goes when its images are made
    """
    classes, at_hand = stream(sorted({job.position for batch in batches for job in batch})), {}
    arm, total = synthesizer.settings["arm"], sum(map(len, batches))
    with out.progress(total=total, desc=arm, unit="image") as bar:
        for batch in batches:
            for position in [p for p in at_hand if p < batch[0].position]:
                del at_hand[position]
            while batch[-1].position not in at_hand:
                position, found = next(classes)
                at_hand[position] = found
                # images.jsonl is made from these rows of the log
                out.log(event="prototypes", position=position, sizes=found.sizes.tolist())
            pictures, attempts = synthesizer.draw(batch, at_hand)
            for job, attempt in zip(batch, attempts):
                if attempt:
                    out.log(event="redrawn", file=job.file, attempt=attempt)
            out.later(_save_all, out, batch, pictures)
            bar.update(len(batch))
            out.made += len(batch)
            out.leave_if_asked()


def _save_all(out, jobs, pictures):
    for job, picture in zip(jobs, pictures):
        save_png(out, job.file, picture, out.settings["image_size"])


def save_png(out, name, picture, image_size):
    """(H, W, 3) uint8 -> a PNG of image_size: Pillow's default filter, bicubic, as the release."""
    image, stream = Image.fromarray(picture), io.BytesIO()
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size))
    image.save(stream, format="PNG")
    out.write(name, stream.getvalue())


# ---- the image folder


def folder_name(settings, parts, prototype_seed):
    """`{dataset}_ipc{ipc}_s{strength}_g{guidance}_kmexpand{k}` or `{dataset}_ipc{ipc}_{arm}`, plus
    what is not the default in stage 2, then in stage 1.

    parts    {setting of stage 1: [what it adds]};   prototype_seed: None if not known
    """
    s, arm = settings, settings["arm"]
    method = f"s{s['strength']:g}_g{s['guidance_scale']:g}_kmexpand{s['km_expand']}"
    stem = f"{s['dataset']}_ipc{s['ipc']}_{method if arm == 'd4m' else arm}"
    silent = {"noise": (), "text": ("strength",)}.get(arm, ("strength", "guidance_scale"))
    words = s.only([name for name in s if name not in silent]).parts()
    if arm == "decoded" and parts and s["km_expand"] != 1:
        words.append(f"kmexpand{s['km_expand']}")
    for name, more in parts.items():
        if arm in FROM_PROTOTYPES and name not in ("seed", "dtype") or name in ("size", "classes"):
            words += more
    if arm in FROM_PROTOTYPES and prototype_seed not in (None, s["seed"]):
        words.append(f"protoseed{prototype_seed}")
    return output.folder_name(stem, *words)


def synthesize(model, settings, classes, stream, inputs, parts, root, process, words="images"):
    """Make the image folder of one arm; returns it.

    settings   stage 2's, with the arm;   classes: [{"index", "folder", "prompt"}]
    stream     (positions, out) -> iterator of (position, Prototypes)
    inputs     for args.json;   parts: of stage 1's settings, as `folder_name` takes them
    """
    seed = (inputs["prototype_arguments"] or {}).get("seed")
    where = ("--save_init_image_path", root, folder_name(settings, parts, seed), "images")
    jobs = list_jobs(classes, settings["ipc"], settings["num_prototypes"])
    with output.Output(*where, settings, inputs, process, resumable=("batch_size",)) as out:
        batches = cut(jobs, out.settings["batch_size"])
        bytes_each = len(batches[0]) * settings["image_size"] ** 2 * 2
        todo = out.todo(batches, lambda batch: [job.file for job in batch], bytes_each, runs=True)
        synthesizer = Synthesizer(model, out.settings)
        make_images(out, todo, synthesizer, lambda positions: stream(positions, out))
        rows = output.log_rows(out.folder)
        attempts = {r.get("file"): r.get("attempt") for r in rows if r.get("event") == "redrawn"}
        sizes = {r.get("position"): r.get("sizes") for r in rows if r.get("event") == "prototypes"}

        def row_of(job):
            attempt = attempts.get(job.file, 0)
            seed = runtime.seed_of(*image_key(settings["seed"], job, attempt))
            row = {"seed": seed, "attempt": attempt, "strength": settings["strength"]}
            row["guidance_scale"] = settings["guidance_scale"]
            if settings["arm"] in FROM_PROTOTYPES:
                row["prototype"] = job.prototype
                row["cluster_size"] = sizes.get(job.position, {job.prototype: None})[job.prototype]
            return row

        finish_images(out, jobs, classes, row_of, words)
    return out.folder


def finish_images(out, jobs, classes, row_of, words="images", **facts):
    """Write images.jsonl, the data card and the manifest, once every PNG is there.

    row_of    job -> what images.jsonl says of it beside its class
    facts     dataset, arm, ipc and image_size, where they are not among the settings
    """
    names = ("dataset", "arm", "ipc", "image_size")
    facts = {name: facts[name] if name in facts else out.settings[name] for name in names}
    facts |= {"count": len(jobs), "classes": classes}

    def line(job):
        row = {"file_name": job.file, "class_index": job.class_id, "folder": job.folder}
        return json.dumps({**row, "prompt": job.prompt, **row_of(job)}, ensure_ascii=False) + "\n"

    # not metadata.jsonl: under that name Hugging Face's imagefolder drops the folder labels
    derived = {"images.jsonl": lambda: "".join(map(line, jobs))}
    details = {**out.settings, **out.inputs.get("generator", {})}
    out.finish(facts, {**derived, "README.md": lambda: data_card(facts, details)}, words)


MADE_AS = {
    "d4m": "prototypes noised, denoised under the class prompt and decoded (D4M, arXiv 2407.15138)",
    "decoded": "prototypes decoded without diffusion",
    "noise": "noise denoised from t = strength * T, no prototypes",
    "text": "text-to-image, no prototypes",
    "random": "real images chosen at random",
    "stm": "images optimised further against a classifier's BatchNorm statistics (SRe2L's recover)",
}


def data_card(facts, details):
    """README.md of the image folder: a Hugging Face data card."""
    arm, taken = facts["arm"].removesuffix("-g"), facts["arm"].endswith("-g")
    how = MADE_AS[arm] + "; classes taken out of a larger distilled data set" * taken
    names = ("model", "strength", "guidance_scale", "num_inference_steps", "seed")
    listed = "".join(f"- {name}: {details[name]}\n" for name in names if name in details)
    return (
        "---\ntask_categories: [image-classification]\ntags: [dataset-distillation]\n---\n"
        f"# {facts['dataset']}, {facts['ipc']} images per class\n\n"
        f"{len(facts['classes'])} classes, {facts['image_size']} px PNG, one folder per class. "
        f"Made as: {how}.\n\n{listed}\n"
        "`images.jsonl` has one line per image; `manifest.json` has every argument and the sha256 "
        "of every file.\nThe licences of the model and of the real images apply.\n"
    )


def read_images(flag, folder):
    """The manifest of a finished image folder, whose names cannot leave the folder."""
    manifest = output.read_manifest(flag, folder, "images")
    for name in (manifest["arm"], *(c["folder"] for c in manifest["classes"])):
        if not files.safe_name(name):
            refuse(f"{flag} {folder}: its manifest holds {name!r}, which is not a plain name")
    for job in list_jobs(manifest["classes"], manifest["ipc"], 1):
        if job.file not in manifest["files"]:
            refuse(f"{flag} {folder}: its manifest does not list {job.file}")
    if manifest["dataset"] not in datasets.ALL:
        refuse(f"{flag} {folder}: its manifest names an unknown data set {manifest['dataset']!r}")
    return manifest


def origin(manifest):
    """{"generator": facts or None, "real_images": count or None}: what the images were made from,
    also where they were made of other images."""
    inputs = manifest["inputs"]
    while "source_manifest" in inputs:
        inputs = inputs["source_manifest"]["inputs"]
    return {name: inputs.get(name) for name in ("generator", "real_images")}


# ---- main


def declare(parser):
    """The flags of stage 2 that distill has too; returns the settings' names."""
    before, count = set(parser.shorts), number(int, 1)
    share, factor = number(float, above=0, most=1), number(float, 1)
    parser.heading("synthesis")
    # differs from the release: its script's default is 0.75, its launcher and its paper say 0.7
    far = "how far prototypes are noised, in (0, 1]"
    parser.setting("--strength", "-s", type=share, default=0.7, short="s", help=far)
    free = "classifier-free guidance; 1 turns it off"
    parser.setting("--guidance_scale", "-g", type=factor, default=8.0, short="g", help=free)
    steps = "of the whole schedule; 50 at 0.7 is 36 calls"
    parser.setting("--num_inference_steps", type=count, default=50, short="steps", help=steps)
    ipc, few = attrgetter("ipc"), "per class [ipc]; fewer than --ipc gives each several noises"
    parser.setting("--num_prototypes", type=count, default=ipc, short="protos", help=few)
    parser.setting("--negative_prompt", default="cartoon, anime, painting", short="neg")
    add_size_flags(parser)
    # differs from the release: its checker stays on and saves flagged images black
    checker = "on: the checkpoint's own; a flagged image is drawn again with the next seed"
    parser.setting("--safety_checker", choices=["on", "off"], default="off", help=checker)
    return [name for name in parser.shorts if name not in before]


def add_size_flags(parser):
    """The flags of everything that writes images."""
    size, pixels = datasets.default("image_size"), "pixels of the saved PNGs [by data set]"
    whole = number(int, 1)
    parser.setting("--image_size", type=whole, default=size, short="imagesize", help=pixels)
    below = "the folder is made below this one"
    parser.flag("--save_init_image_path", default="output/images", help=below)


def get_args(argv=None):
    parser, count = Parser("distillation.gen_syn_image", __doc__), number(int, 1)
    parser.setting(
        "--dataset", type=datasets.name, default="imagenet", help=", ".join(datasets.ALL)
    )
    made = "a folder of stage 1, or a single JSON file of the release"
    parser.flag("--prototype_path", required=True, help=made)
    parser.flag("--label_file_path", help="other prompts than the prototypes were made with")
    parser.flag("--verify", action="store_true", help="hash every prototype file at the start")
    arms = "the method, or what it is compared with"
    parser.flag("--arm", nargs="+", choices=ARMS, default=["d4m"], help=arms)
    parser.setting("--ipc", type=count, default=1, help="images per class")
    parser.setting("--km_expand", type=count, default=10, help="as in stage 1: names the folder")
    declare(parser)
    noise = "of the synthesis noise"
    parser.setting("--seed", type=number(int, 0), default=0, short="seed", help=noise)
    more = "images made at once; more only changes last bits"
    parser.setting("--batch_size", type=count, default=32, help=more)
    generators.add_generator_flags(parser)
    runtime.add_process_flags(parser)
    return parser.parse_args(argv)


def of_arm(settings, arm):
    """Stage 2's settings of one arm."""
    changed = {"arm": arm, **settings}
    if arm == "text":  # from pure noise
        changed["strength"] = 1.0
    return runtime.Settings(changed, settings.defaults, settings.shorts)


def check_prototypes(where, source, settings):
    """Refuse prototypes of another data set, number or buffer size than the flags say."""
    s, wanted = settings, settings["num_prototypes"]
    if source.dataset != s["dataset"]:
        refuse(f"--dataset {s['dataset']}: {where} was made from {source.dataset}")
    if source.per_class != wanted:
        flag = "--ipc" if wanted == s["ipc"] else "--num_prototypes"
        refuse(f"{flag} {wanted}: {where} holds {source.per_class} per class")
    made_with = (source.settings or s)["km_expand"]
    if made_with != s["km_expand"]:
        refuse(f"--km_expand {s['km_expand']}: {where} was made with {made_with}")


def check_model(where, source, model):
    """Refuse prototypes of another VAE or number of channels than the generator's."""
    ours, channels = model.facts["vae_sha256"], model.latent_shape(model.native_size)[0]
    if source.vae_sha256 not in (None, ours):
        theirs = f"made with the VAE {source.vae_sha256[:12]}"
        refuse(f"{where}: {theirs}, this checkpoint's is {ours[:12]}")
    if source.latent_shape[0] != channels:
        refuse(
            f"{where}: latents of shape {source.latent_shape}, the model has {channels} channels"
        )


def check_steps(settings, arms, most):
    """Refuse a schedule of which nothing is left, or longer than the `most` of the training."""
    steps, strength = settings["num_inference_steps"], settings["strength"]
    if settings["num_prototypes"] > settings["ipc"]:
        refuse(f"--num_prototypes {settings['num_prototypes']}: more than --ipc {settings['ipc']}")
    if steps > most:
        refuse(f"--num_inference_steps {steps}: this checkpoint was trained with {most}")
    if int(steps * strength) < 1 and set(arms) - {"decoded", "text"}:
        refuse(f"--num_inference_steps {steps}: at --strength {strength:g} no step is left")


def with_prompts(classes, label_file, dataset):
    """The classes with the prompts of a label file."""
    folders = list(datasets.known_prompts(dataset)) or [c["folder"] for c in classes]
    prompts = dict(zip(folders, datasets.read_label_file(label_file, folders, dataset)))
    return [{**c, "prompt": prompts[c["folder"]]} for c in classes]


def every_arm(arms, make):
    """[make(arm)]; with --dry_run, the plan of one arm ends in status 0: go on with the others."""
    folders = []
    for arm in arms:
        try:
            folders.append(make(arm))
        except SystemExit as leaving:
            if leaving.code or arm == arms[-1]:
                raise
    return folders


def plan_arm(settings, prototype_path, root):
    """--dry_run where stage 1 has not made the prototypes yet."""
    count = len(datasets.known_prompts(settings["dataset"])) * settings["ipc"]
    waits_for = f"{prototype_path}: python -m distillation.gen_prototype makes it"
    folder, each = Path(root) / folder_name(settings, {}, None), settings["image_size"] ** 2 * 2
    output.plan(folder, 0, count, count * each, waits_for)


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    path, root, source = args.prototype_path, args.save_init_image_path, None
    if not args.dry_run or Path(path).is_file() or output.is_complete(path):
        source = prototypes.open_prototypes(path, args.dataset, args.verify)
        check_prototypes(f"--prototype_path {path}", source, args.settings)
        classes = source.classes
        if args.label_file_path:
            classes = with_prompts(classes, args.label_file_path, args.dataset)
    how = {name: getattr(args, name) for name in generators.FLAGS}
    how["safety_checker"] = args.safety_checker == "on"
    model = generators.load(args.diffusion_checkpoints_path, process.device, **how)
    check_steps(args.settings, args.arm, model.most_steps)
    if source is None:
        return every_arm(args.arm, lambda arm: plan_arm(of_arm(args.settings, arm), path, root))
    check_model(f"--prototype_path {path}", source, model)
    inputs = {
        "generator": model.facts,
        "prototypes": source.content,
        "prototype_arguments": source.settings,
        "real_images": source.real_images,
        "prompts": [c["prompt"] for c in classes] if args.label_file_path else None,
    }

    def stream(positions, _out):
        return ((position, source[position]) for position in positions)

    def make(arm):
        where = (inputs, source.parts, root, process)
        return synthesize(model, of_arm(args.settings, arm), classes, stream, *where)

    return every_arm(args.arm, make)


if __name__ == "__main__":
    main()
