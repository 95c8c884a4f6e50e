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

import functools
import sys
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch

from distillation import datasets, image_folder, label_files, prototype_files
from scripts import generators, output, runtime, samplers
from scripts.runtime import Parser, entry_point, number, refuse, warn

ARMS = ("d4m", "decoded", "noise", "text")
# of stage 2's settings, those that stage 1 has too
SHARED = ("dataset", "ipc", "km_expand", "seed", "batch_size", *generators.SETTINGS)
REDRAWS = 3  # how often a flat (black) image is drawn again with another seed

# ---- synthesis


def image_key(seed, job, attempt):
    """What seeds an image's noise."""
    # differs from the release: seeded, image by image
    return seed, runtime.SYNTHESIS, job.class_id, job.i, attempt


class Synthesizer:
    """Turns jobs and their prototypes into pictures, with the settings of one arm."""

    def __init__(self, model, settings):
        self.model, self.settings, self.limit = model, settings, runtime.MemoryLimit(sys.maxsize)
        self.start = None  # of denoising
        if settings["arm"] != "decoded":
            names = ("strength", "num_inference_steps", "noise_level")
            self.start = model.start(*(settings[name] for name in names))

    def draw(self, jobs, prototypes):
        """(B, c, h, w) -> (B, H, W, 3) uint8, and how often each was redrawn: a flat picture gets
        the next seed."""

        def pictures_of(rows, attempt=0):
            return self._pictures([jobs[n] for n in rows], prototypes[rows], attempt)

        rows, attempts = list(range(len(jobs))), [0] * len(jobs)
        pictures = np.concatenate(runtime.in_parts(pictures_of, rows, self.limit))
        while flat := [n for n in rows if pictures[n].min() == pictures[n].max()]:
            for n in flat:
                name, value = jobs[n].file, pictures[n].max()
                if attempts[n] == REDRAWS:
                    refuse(f"{name}: still a flat picture after {REDRAWS} other seeds")
                warn(f"{name}: a flat picture of value {value}; drawn again with the next seed")
                attempts[n] += 1
                pictures[n] = pictures_of([n], attempts[n])[0]
        return pictures, attempts

    @torch.no_grad()
    def _pictures(self, jobs, prototypes, attempt):
        """(B, H, W, 3) uint8; what is not finite is made again in fp32."""
        latents, s = prototypes, self.settings
        if s["guide"] == "mode" or s["arm"] not in image_folder.FROM_PROTOTYPES:
            latents = self._noise(jobs, prototypes.shape[1:], attempt)

        def images_of(rows):
            return self._images([jobs[n] for n in rows], latents[rows], prototypes[rows], attempt)

        images = images_of(list(range(len(jobs))))  # (B, 3, H, W)
        names = [job.file for job in jobs]
        generators.mend(self.model, images, lambda n: images_of([n]), names)
        return (images.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).cpu().numpy()

    def _noise(self, jobs, shape, attempt):
        """(B, c, h, w) float16 from N(0, 1), instead of prototypes.

        sqrt(a) x + sqrt(1 - a) e of two independent unit Gaussians is one again, for every t: so
        the stock pipeline starts from pure noise, "noise" at t = strength * T, "text" at T.
        With flow matching it starts from what data of variance 1 would be at that level.
        """
        keys = [(self.settings["seed"], runtime.START, j.class_id, j.i, attempt) for j in jobs]
        draws = [torch.randn(shape, generator=runtime.generator(*key)) for key in keys]
        return torch.stack(draws).to(torch.float16)

    def _images(self, jobs, latents, prototypes, attempt):
        """(B, 3, H, W) in [0, 1].   latents: what is denoised, the prototypes or noise"""
        s, model = self.settings, self.model
        if s["arm"] == "decoded":
            return model.decode(latents, check=False)
        conditions = [model.condition(job.condition) for job in jobs]
        negative = model.condition(s["negative_prompt"])
        rngs = [runtime.generator(*image_key(s["seed"], job, attempt)) for job in jobs]
        how = (self.start.strength, s["guidance_scale"], s["num_inference_steps"])
        more = {"modes": prototypes} if s["guide"] == "mode" else {}
        return model.decode(model.denoise(latents, conditions, negative, rngs, *how, **more))


def cut(jobs, batch_size):
    return [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]


def make_images(out, batches, synthesizer, stream):
    """Make `batches`, each whole; PNGs are written beside the next batch.

    stream    (class positions, out) -> iterator of (position, Prototypes)
    The batches are in class order: prototypes are kept while a later batch needs them.
    """
    settings, found = synthesizer.settings, {}
    classes = stream(sorted({job.position for batch in batches for job in batch}), out)
    with out.progress(total=sum(map(len, batches)), desc=settings["arm"], unit="image") as bar:
        for batch in batches:
            found = {p: found[p] for p in found if p >= batch[0].position}  # of unfinished classes
            while batch[-1].position not in found:
                found.update([next(classes)])
            latents = np.stack([found[job.position].latents[job.prototype] for job in batch])
            pictures, attempts = synthesizer.draw(batch, torch.from_numpy(latents))
            sizes = [found[job.position].sizes.item(job.prototype) for job in batch]
            rows = [image_row(settings, *one) for one in zip(batch, attempts, sizes)]
            out.log(event="images", rows=rows)  # before the PNGs: images.jsonl is made from it
            out.later(image_folder.save_pngs, out, batch, pictures, out.settings["image_size"])
            bar.update(len(batch))
            out.made += len(batch)
            out.leave_if_asked()


def image_row(settings, job, attempt, cluster_size):
    """What images.jsonl says of an image, beside its class."""
    seed = runtime.seed_of(*image_key(settings["seed"], job, attempt))
    row = {"file_name": job.file, "seed": seed, "attempt": attempt}
    row |= {name: settings[name] for name in ("strength", "guidance_scale")}
    if job.condition != job.prompt:
        row["condition"] = job.condition
    if settings["arm"] in image_folder.FROM_PROTOTYPES:
        row |= {"prototype": job.prototype, "cluster_size": cluster_size}
    return row


def synthesize(model, settings, classes, stream, inputs, parts, root, process, words="images"):
    """Make the image folder of one arm; returns it.

    settings   stage 2's, with the arm
    classes    [{"index", "folder", "prompt"}]
    stream     (class positions, out) -> iterator of (position, Prototypes)
    inputs     for args.json
    parts      {setting of stage 1: [what it adds to the folder's name]}
    """
    of_prototypes, pixels = inputs["prototype_arguments"] or {}, settings["image_size"]
    name = image_folder.folder_name(settings, parts, of_prototypes.get("seed"))
    if process.is_main and (made := of_prototypes.get("size") or pixels) < pixels:
        warn(f"--image_size {pixels}: images are made at {made} px and enlarged")
    where, resumable = ("--save_init_image_path", root, name, "images"), ("batch_size",)
    conditions = prototype_files.class_conditions(settings["dataset"], classes, model)
    numbers = (settings["ipc"], settings["num_prototypes"])
    jobs = image_folder.list_jobs(classes, *numbers, conditions)
    synthesizer, facts = Synthesizer(model, settings), {}
    if start := synthesizer.start:
        facts["start"] = {**start._asdict(), "noise_level": settings["noise_level"]}
        if process.is_main:
            print(f"{settings['arm']}: {start}", file=sys.stderr)
    with output.Output(*where, settings, inputs, process, resumable) as out:
        batches = cut(jobs, out.settings["batch_size"])
        bytes_each = len(batches[0]) * settings["image_size"] ** 2 * 2
        todo = out.todo(batches, lambda batch: [job.file for job in batch], bytes_each, blocks=True)
        make_images(out, todo, synthesizer, stream)
        rows = functools.cache(lambda: image_folder.logged_rows(out.folder, jobs))
        what = (out, jobs, classes, lambda job: rows()[job.file], words)
        image_folder.finish_images(*what, **facts)
    return out.folder


def warn_of_long_prompts(model, classes, negative):
    """Say which prompts the model does not read to their end."""
    prompts = {"--negative_prompt": negative, **{c["folder"]: c["prompt"] for c in classes}}
    unread = {name: rest for name, prompt in prompts.items() if (rest := model.unread(prompt))}
    for name, rest in list(unread.items())[:3]:
        rest = rest if len(rest) <= 80 else f"{rest[:76]} ..."
        warn(f"{name}: its prompt is too long for this model, which does not read {rest!r}")
    if len(unread) > 3:
        warn(f"{len(unread) - 3} other prompts are too long")


# ---- main


def declare(parser):
    """The flags of stage 2 that distill has too; returns the settings' names."""
    before, setting, count = set(parser.shorts), parser.setting, number(int, 1)
    share, factor, ipc = number(float, above=0, most=1), number(float, 1), attrgetter("ipc")
    parser.heading("synthesis")
    # differs from the release: its script's default is 0.75, its launcher and its paper say 0.7
    strength = {"default": lambda args: 1.0 if args.guide == "mode" else 0.7, "short": "s"}
    noise = "of the noise, up to 1 [0.7; 1 with --guide mode]"
    setting("--strength", "-s", type=share, **strength, help=noise)
    setting("--guidance_scale", "-g", type=factor, default=8.0, short="g", help="1 turns it off")
    level = "what --strength is a share of: this model's schedule, or the noise level that the "
    level += "paper's sampler has there [schedule for Stable Diffusion 1 and 2, paper for others]"
    setting("--noise_level", choices=samplers.LEVELS, short="noise", help=level)
    steps = "of the whole schedule; 50 at strength 0.7 is 36 calls"
    setting("--num_inference_steps", type=count, default=50, short="steps", help=steps)
    sampler = {"choices": ["own", *samplers.NAMES], "default": "own", "short": "scheduler"}
    setting("--scheduler", **sampler, help="the checkpoint's own, or another of diffusers'")
    guide = {"choices": ["none", "mode"], "default": "none", "short": "guide"}
    setting("--guide", **guide, help="mode: from noise, by DDPM drawn to the prototype (MGD3)")
    weight = {"type": number(float, above=0), "default": 0.1, "short": "guideweight"}
    setting("--guide_weight", **weight, help="lambda of --guide mode")
    setting("--num_prototypes", type=count, default=ipc, short="protos", help="per class [ipc]")
    away = "what guidance leads away from"
    setting("--negative_prompt", default="cartoon, anime, painting", short="neg", help=away)
    image_folder.add_size_flags(parser)
    # differs from the release: its checker stays on and saves flagged images black
    checker = "the checkpoint's own; a flagged image is drawn again with the next seed"
    setting("--safety_checker", choices=["on", "off"], default="off", help=checker)
    return [name for name in parser.shorts if name not in before]


def get_args(argv=None):
    parser, count = Parser("distillation.gen_syn_image", __doc__), number(int, 1)
    setting, flag, names = parser.setting, parser.flag, ", ".join(datasets.ALL)
    setting("--dataset", type=datasets.name, default="imagenet", help=names)
    flag("--prototype_path", required=True, help="a folder of stage 1, or the release's JSON file")
    flag("--label_file_path", help="other prompts than the prototypes were made with")
    keys = "the keys of the release's JSON file as prompts, with their faults, instead of ours"
    switch = {"action": "store_true", "default": False, "short": "releaseprompts"}
    setting("--release_prompts", **switch, help=keys)
    flag("--verify", action="store_true", help="hash every prototype file at the start")
    flag("--arm", nargs="+", choices=ARMS, default=["d4m"], help="the method, or what to compare")
    setting("--ipc", type=count, default=1, help="images per class")
    setting("--km_expand", type=count, default=10, help="as in stage 1: names the folder")
    declare(parser)
    setting("--seed", type=number(int, 0), default=0, short="seed", help="of the synthesis noise")
    setting("--batch_size", type=count, default=32, help="images at once; changes the last bits")
    generators.add_generator_flags(parser)
    runtime.add_process_flags(parser)
    return parser.parse_args(argv)


def of_arm(settings, arm):
    """Stage 2's settings of one arm."""
    changed = {"arm": arm, **settings}
    if arm == "text":  # from pure noise
        changed["strength"] = 1.0
    return runtime.Settings(changed, settings.defaults, settings.shorts)


def fitted(settings, arms, model, label_file=None):
    """The settings with what the generator decides; refuses what does not fit it."""
    steps, strength, most = settings["num_inference_steps"], settings["strength"], model.most_steps
    if settings["num_prototypes"] > settings["ipc"]:
        refuse(f"--num_prototypes {settings['num_prototypes']}: more than --ipc {settings['ipc']}")
    if steps > most:
        refuse(f"--num_inference_steps {steps}: this checkpoint was trained with {most}")
    if settings["guide"] == "mode":
        if strength != 1:
            refuse(f"--strength {strength:g}: --guide mode starts from noise alone")
        if set(arms) != {"d4m"}:
            refuse(f"--guide mode: only for --arm d4m, not for {', '.join(arms)}")
    elif settings["guide_weight"] != settings.defaults["guide_weight"]:
        refuse(f"--guide_weight {settings['guide_weight']:g}: there is no --guide")
    level = settings["noise_level"] or model.NOISE_LEVEL
    if set(arms) - {"decoded", "text"} and not model.start(strength, steps, level):
        refuse(f"--num_inference_steps {steps}: at --strength {strength:g} no step is left")
    if model.CONDITION != "prompt":
        if label_file:
            refuse(f"--label_file_path {label_file}: a {model.TITLE} reads no prompts")
        for name in ("negative_prompt", "release_prompts"):
            if settings.get(name) != settings.defaults.get(name):
                refuse(f"--{name}: a {model.TITLE} reads no prompts")
        none = {"negative_prompt": None}
        defaults = {**settings.defaults, **none}
        settings = runtime.Settings({**settings, **none}, defaults, settings.shorts)
    return settings.filled(noise_level=model.NOISE_LEVEL)


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    path, root = args.prototype_path, args.save_init_image_path
    label_file, keys = args.label_file_path, args.release_prompts
    if keys and label_file:
        refuse("--release_prompts, --label_file_path: only one of them says the prompts")
    waits_for = args.dry_run and output.awaited(path, "distillation.gen_prototype")
    if not waits_for:
        source = prototype_files.open_prototypes(path, args.dataset, args.verify, keys)
        prototype_files.check_settings(path, source, args.settings)
        classes = source.classes
        if label_file:
            classes = label_files.with_prompts(classes, label_file, args.dataset)
        prompts = [c["prompt"] for c in classes] if keys or label_file else None
    how = {name: getattr(args, name) for name in generators.FLAGS}
    model = generators.load(args.diffusion_checkpoints_path, process.device, **how)
    settings = fitted(args.settings, args.arm, model, label_file)
    arms = [of_arm(settings, arm) for arm in args.arm]
    if waits_for:
        count = len(datasets.known_prompts(args.dataset)) * args.ipc
        for settings in arms:
            folder = Path(root) / image_folder.folder_name(settings, {}, None)
            output.plan(folder, 0, count, count * args.image_size**2 * 2, waits_for)
        return []
    prototype_files.check_model(path, source, model)
    if process.is_main and set(args.arm) - {"decoded"}:
        warn_of_long_prompts(model, classes, settings["negative_prompt"])
    inputs = {"generator": model.facts, "prototypes": source.content, "prompts": prompts}
    inputs |= {"prototype_arguments": source.settings, "images": source.images}
    inputs["real_images"] = source.real_images

    def stream(positions, _):
        return ((position, source[position]) for position in positions)

    shared = (classes, stream, inputs, source.parts, root, process)
    return [synthesize(model, settings, *shared) for settings in arms]


if __name__ == "__main__":
    main()
