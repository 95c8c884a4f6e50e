"""Stage 2, synthesis (paper, section 3): prototypes are noised, denoised under the class prompt, decoded into PNGs.

    python -m distillation.gen_syn_image --dataset imagenet --ipc 10 --km_expand 1 --strength 0.7 --guidance_scale 8 \\
        --prototype_path output/prototypes/imagenet-ipc10-kmexpand1

The list of all images is cut into fixed batches; a batch is the unit of work, so that every pixel is the same for any
number of processes and restarts. Image i of class c has its own generator, seeded from (seed, c, i).

--arm also makes what D4M is compared with (paper, table 4), from the same prototypes folder:
    d4m       the method
    decoded   prototypes decoded without diffusion
    noise     pure noise denoised from t = strength * T: what the release calls random initialisation
    text      text-to-image, no prototypes
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m distillation.gen_syn_image", file=sys.stderr)
    sys.exit(2)

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from distillation.datasets import DATASETS, dataset_name, known_prompts, read_label_file
from distillation.prototypes import open_prototypes, prototype_suffix
from scripts.checkpoints import (
    add_checkpoint_flags,
    cast,
    config_hash,
    load_pipeline,
    model_name,
    resolve_dtype,
    speed_up,
)
from scripts.files import (
    atomic,
    check_unit,
    is_complete,
    output_folder,
    output_name,
    read_manifest,
    require_space,
    safe_name,
    settings_digest,
    write_manifest,
    write_text,
    write_timing,
    wrong_field,
)
from scripts.runtime import (
    START,
    SYNTHESIS,
    MemoryLimit,
    Parser,
    StopSignals,
    Stopwatch,
    add_process_flags,
    at_least_one,
    entry_point,
    generator,
    in_parts,
    log_run,
    natural,
    positive_int,
    progress,
    refuse,
    result_of,
    seed_of,
    this_process,
    unit_interval,
    warn,
)

ARMS = ("d4m", "decoded", "noise", "text")
STAGE_1_NAMES = (
    "dataset",
    "size",
    "seed",
    "kmeans",
    "classes",
    "max_images_per_class",
    "dtype",
)  # what prototype_suffix reads
REDRAWS = 3  # how often a flat (black) image is drawn again with another seed


class Job(NamedTuple):
    """One image to make: number `i` of class `position` (`class_id` in the whole data set), from `prototype`."""

    position: int
    class_id: int
    folder: str
    prompt: str
    i: int
    prototype: int

    @property
    def file(self):
        return f"{self.folder}/{self.folder}_{self.i:04d}.png"


def list_jobs(classes, ipc, num_prototypes):
    """Every image to make, class by class; with fewer prototypes than images each gives several noises in turn."""
    return [
        Job(position, c["index"], c["folder"], c["prompt"], i, i % num_prototypes)
        for position, c in enumerate(classes)
        for i in range(ipc)
    ]


def cut(jobs, batch_size):
    return [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]


# ---- synthesis


class Synthesizer:
    """Turns a batch of jobs into pictures. Prompts are encoded one by one and kept, so that no embedding depends on a
    batch.

    Every call gets `prototypes`, {position: Prototypes} of the classes in its batch.
    """

    def __init__(self, pipeline, arm, seed, strength, guidance_scale, num_inference_steps, negative_prompt):
        self.pipeline, self.arm, self.seed, self.limit = pipeline, arm, seed, MemoryLimit(sys.maxsize)
        self.strength = 1.0 if arm == "text" else strength
        self.options = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, "eta": 0.0}
        # differs from the release: text is encoded once a class, not once an image
        self.embed = lru_cache(maxsize=64)(self._embed)
        self.negative_prompt = negative_prompt

    def _embed(self, prompt):
        """(1, tokens, width) of one prompt."""
        pipe = self.pipeline
        return pipe.encode_prompt(prompt, pipe.unet.device, 1, do_classifier_free_guidance=False)[0]

    def latents(self, job, prototypes, attempt):
        """(4, h, w) float16: what is noised to `strength` - the prototype, or for the arms without one, N(0, 1).

        A unit Gaussian noised by sqrt(a) x + sqrt(1 - a) e is a unit Gaussian again at every t, so the stock pipeline
        then starts from pure noise: from t = strength * T for "noise", from T for "text".
        """
        prototype = torch.from_numpy(prototypes[job.position].latents[job.prototype])
        if self.arm in ("d4m", "decoded"):
            return prototype
        draw = generator(self.seed, START, job.class_id, job.i, attempt)
        return torch.randn(prototype.shape, generator=draw).to(torch.float16)

    def __call__(self, jobs, prototypes, attempt=0):
        """jobs -> (B, H, W, 3) uint8 numpy array."""
        return np.concatenate(in_parts(lambda part: self._pictures(part, prototypes, attempt), jobs, self.limit))

    @torch.no_grad()
    def _pictures(self, jobs, prototypes, attempt):
        pipe = self.pipeline
        latents = torch.stack([self.latents(job, prototypes, attempt) for job in jobs])  # (B, 4, h, w)
        images = self._run(pipe, jobs, latents, attempt)
        broken = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        if broken:
            dtype = pipe.unet.dtype
            cast(pipe, torch.float32)
            for n in broken:
                warn(f"{jobs[n].file}: NaN or infinity in {dtype}; made again in fp32")
                images[n] = self._run(pipe, [jobs[n]], latents[n : n + 1], attempt)[0].to(images)
                if not images[n].isfinite().all():
                    refuse(f"{jobs[n].file}: NaN or infinity, in fp32 too")
            cast(pipe, dtype)
        return (images.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).cpu().numpy()

    def facts(self, job, prototypes, attempt):
        """What images.jsonl says of an image beside its class: carried in the PNG itself until then."""
        facts = {
            "seed": seed_of(*image_key(self.seed, job, attempt)),
            "attempt": attempt,
            "strength": self.strength,
            "guidance_scale": self.options["guidance_scale"],
        }
        if self.arm in ("d4m", "decoded"):
            facts |= {"prototype": job.prototype, "cluster_size": int(prototypes[job.position].sizes[job.prototype])}
        return facts

    def _run(self, pipe, jobs, latents, attempt):
        """(B, 3, H, W) in [0, 1]"""
        if self.arm == "decoded":
            return pipe.decode(latents)
        prompts = torch.cat([self.embed(job.prompt) for job in jobs]).to(pipe.unet.dtype)
        negative = self.embed(self.negative_prompt).to(pipe.unet.dtype).expand_as(prompts)
        generators = [generator(*image_key(self.seed, job, attempt)) for job in jobs]
        return pipe(
            latents=latents,
            prompt_embeds=prompts,
            negative_prompt_embeds=negative,
            generator=generators,
            strength=self.strength,
            output_type="pt",
            **self.options,
        ).images


def image_key(seed, job, attempt):
    """What seeds an image's noise."""
    # differs from the release: seeded, image by image
    return seed, SYNTHESIS, job.class_id, job.i, attempt


def draw_batch(synthesizer, jobs, prototypes):
    """Pictures of a batch and how often each was redrawn: flat ones (say, blocked ones) get the next seed."""
    pictures, attempts = synthesizer(jobs, prototypes), [0] * len(jobs)
    for attempt in range(1, REDRAWS + 1):
        flat = [n for n, picture in enumerate(pictures) if picture.min() == picture.max()]
        for n in flat:
            warn(f"{jobs[n].file}: a flat picture of value {pictures[n].max()}; drawn again with the next seed")
            pictures[n], attempts[n] = synthesizer([jobs[n]], prototypes, attempt)[0], attempt
    for n, picture in enumerate(pictures):
        if picture.min() == picture.max():
            refuse(f"{jobs[n].file}: still a flat picture after {REDRAWS} other seeds")
    return pictures, attempts


def picture_digest(settings):
    """`settings_digest` of what decides a PNG: the same for distill, which has no prototype files."""
    origin = settings.get("prototype_arguments")
    if origin:
        origin = {name: value for name, value in origin.items() if name not in ("prototype_format", "batch_size")}
        settings = {**settings, "prototype_arguments": origin, "prototypes": None}
    return settings_digest(settings)


def save_png(path, picture, image_size, facts, settings_sha256=None):
    """(H, W, 3) uint8 -> PNG of image_size (PIL's default filter, bicubic, as the release), facts in its text.

    settings_sha256   `picture_digest` of the run that makes it; None: of no run
    """
    image = Image.fromarray(picture)
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size))
    text = PngInfo()
    text.add_itxt("d4m", json.dumps({**facts, "settings_sha256": settings_sha256}, ensure_ascii=False))
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def read_facts(path):
    """What save_png wrote into a PNG's text; refuses what is no whole PNG of ours."""
    try:
        with Image.open(path) as image:
            facts = json.loads(image.text["d4m"])
            image.load()
        if not isinstance(facts, dict) or facts.keys() & {"file_name", "class_index", "folder", "prompt"}:
            raise ValueError("other facts than this stage writes")
        return facts
    except Exception as error:  # whatever is wrong inside somebody's file
        refuse(f"{path}: is no image of this stage ({type(error).__name__}: {error}); remove it to have it made again")


def make_images(folder, batches, synthesizer, stream, image_size, signals, quiet=False, settings_sha256=None):
    """Make every batch that is not wholly on disk; returns the number of images made. PNGs are written in the
    background.

    stream    positions -> iterator of (position, Prototypes): classes come one by one, and go when their images are
              made
    settings_sha256   as `save_png`'s
    """
    todo = [batch for batch in batches if not all((folder / job.file).exists() for job in batch)]
    classes = stream(sorted({job.position for batch in todo for job in batch}))
    with ThreadPoolExecutor(2) as background:
        at_hand, writes = {}, []
        with progress(total=sum(map(len, todo)), desc=synthesizer.arm, unit="image", quiet=quiet) as bar:
            for batch in todo:
                at_hand = {position: p for position, p in at_hand.items() if position >= batch[0].position}
                while not all(job.position in at_hand for job in batch):
                    position, prototypes = next(classes)
                    at_hand[position] = prototypes
                pictures, attempts = draw_batch(synthesizer, batch, at_hand)
                for write in writes:
                    result_of(write)
                writes = [
                    background.submit(
                        save_png,
                        folder / job.file,
                        picture,
                        image_size,
                        synthesizer.facts(job, at_hand, attempt),
                        settings_sha256,
                    )
                    for job, picture, attempt in zip(batch, pictures, attempts)
                ]
                bar.update(len(batch))
                if signals.name:
                    for write in writes:
                        result_of(write)
                    signals.leave_if_asked()
        for write in writes:
            result_of(write)
    return sum(map(len, todo))


# ---- the image folder


def image_folder_name(settings, prototype_settings):
    """`{dataset}_ipc{ipc}_s{strength}_g{guidance}_kmexpand{k}` or `{dataset}_ipc{ipc}_{arm}`, plus non-defaults."""
    s, arm = settings, settings["arm"]
    stem = f"{s['dataset']}_ipc{s['ipc']}_" + (
        f"s{s['strength']:g}_g{s['guidance_scale']:g}_kmexpand{s['km_expand']}" if arm == "d4m" else arm
    )
    options = {
        "s": s["strength"],
        "g": s["guidance_scale"],
        "steps": s["num_inference_steps"],
        "protos": s["num_prototypes"],
        "neg": s["negative_prompt"],
        "imagesize": s["image_size"],
        "seed": s["seed"],
        "dtype": s["dtype"],
    }
    defaults = {
        "s": s["strength"] if arm != "noise" else 0.7,
        "g": s["guidance_scale"] if arm in ("d4m", "decoded") else 8.0,
        "steps": 50,
        "protos": s["ipc"],
        "neg": NEGATIVE_PROMPT,
        "imagesize": DATASETS[s["dataset"]].image_size,
        "seed": 0,
        "dtype": "auto",
    }
    if prototype_settings and arm in ("d4m", "decoded"):
        if arm == "decoded":
            options["kmexpand"], defaults["kmexpand"] = s["km_expand"], 1
        more, more_defaults = prototype_suffix(prototype_settings)
        for name in ("size", "kmeans", "classes", "max"):
            options[name], defaults[name] = more[name], more_defaults[name]
        options["protoseed"], defaults["protoseed"] = more["seed"], s["seed"]
    elif prototype_settings:  # of stage 1 only the latents' shape has a say
        more, more_defaults = prototype_suffix(prototype_settings)
        for name in ("size", "classes"):
            options[name], defaults[name] = more[name], more_defaults[name]
    return output_name(stem, options, defaults)


def finish_folder(folder, jobs, settings, classes):
    """Once every PNG is there: images.jsonl, the data card and the manifest. Returns the missing files.

    Of a finished folder, either is written again if it is lost; the manifest says whether it is what it was.
    """
    pngs, texts, complete = [job.file for job in jobs], ["images.jsonl", "README.md"], is_complete(folder)
    lacking = not complete or not all((folder / name).is_file() for name in texts)
    if lacking and all((folder / name).is_file() for name in pngs):
        rows, digest = [], picture_digest(settings)
        for job in jobs:
            made = read_facts(folder / job.file)
            found = made.pop("settings_sha256", None)
            if not complete:
                check_unit(folder / job.file, found, digest)
            row = {
                "file_name": job.file,
                "class_index": job.class_id,
                "folder": job.folder,
                "prompt": job.prompt,
                **made,
            }
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        # not metadata.jsonl: under that name Hugging Face's imagefolder drops the folder labels
        write_text(folder / "images.jsonl", "".join(rows))
        write_text(folder / "README.md", data_card(settings, len(classes)))
    facts = {key: settings[key] for key in ("dataset", "arm", "ipc", "image_size")}
    return write_manifest(
        folder,
        "images",
        settings,
        [*pngs, *texts],
        {**facts, "count": len(jobs), "classes": classes},
    )


def read_image_manifest(flag, folder):
    """The manifest of a finished image folder, with what the next stages take from it; refuses one without."""
    manifest = read_manifest(flag, folder, "images")
    odd = wrong_field(manifest, {"dataset": str, "arm": str, "image_size": int, "ipc": int, "classes": list})
    if not odd and not all(
        wrong_field(c, {"index": int, "folder": str, "prompt": str}) is None for c in manifest["classes"]
    ):
        odd = "classes"
    if not odd and not safe_name(manifest["arm"]):
        odd = "arm"
    odd = odd or next((name for name in ("image_size", "ipc") if manifest[name] < 1), None)
    origin = manifest["arguments"]
    while isinstance(origin, dict):  # images that were made of others say what those were made of
        if not isinstance(origin.get("prototype_arguments"), (dict, type(None))):
            odd = "prototype_arguments"
        origin = origin.get("source_arguments")
    if odd:
        refuse(f"{flag} {folder}: its manifest does not say {odd}")
    if manifest["dataset"] not in DATASETS:
        refuse(f"{flag} {folder}: its manifest names the data set {manifest['dataset']!r}, which is unknown")
    return manifest


def data_card(settings, num_classes):
    """README.md of the image folder: a Hugging Face data card."""
    s = settings
    how = {
        "d4m": "prototypes noised, denoised under the class prompt and decoded (D4M, arXiv 2407.15138)",
        "decoded": "prototypes decoded without diffusion",
        "noise": "noise denoised from t = strength * T, no prototypes",
        "text": "text-to-image, no prototypes",
        "random": "real images chosen at random",
        "stm": "images optimised further against a classifier's BatchNorm statistics (SRe2L's recover step)",
    }[s["arm"].removesuffix("-g")]
    if s["arm"].endswith("-g"):
        how += "; classes taken out of a larger distilled data set"
    lines = [
        f"- {key}: {s[key]}"
        for key in ("model", "strength", "guidance_scale", "num_inference_steps", "seed")
        if key in s
    ]
    return (
        f"---\ntask_categories: [image-classification]\ntags: [dataset-distillation]\n---\n"
        f"# {s['dataset']}, {s['ipc']} images a class\n\n"
        f"{num_classes} classes, {s['image_size']} px PNG, one folder a class. "
        f"Made as: {how}.\n\n"
        + "\n".join(lines)
        + "\n\n`images.jsonl` has one line an image; `manifest.json` has every "
        "argument and the sha256 of every file.\nThe licences of the model and of the real images apply.\n"
    )


# ---- main

NEGATIVE_PROMPT = "cartoon, anime, painting"


def add_synthesis_flags(parser):
    """Flags of stage 2 that distill.py shares."""
    group = parser.add_argument_group("synthesis")
    # differs from the release: its script's default is 0.75, its launcher and its paper say 0.7
    group.add_argument(
        "--strength", "-s", type=unit_interval, default=0.7, help="how far prototypes are noised, in (0, 1]"
    )
    group.add_argument(
        "--guidance_scale", "-g", type=at_least_one, default=8.0, help="classifier-free guidance; 1 turns it off"
    )
    group.add_argument(
        "--num_inference_steps", type=positive_int, default=50, help="of the whole schedule; 50 at 0.7 is 36 calls"
    )
    group.add_argument("--negative_prompt", default=NEGATIVE_PROMPT)
    group.add_argument(
        "--num_prototypes",
        type=positive_int,
        default=None,
        help="prototypes a class [ipc]; fewer than --ipc gives each several noises",
    )
    group.add_argument("--image_size", type=positive_int, default=None, help="pixels of the saved PNGs [by data set]")
    # differs from the release: its checker stays on and saves flagged images black
    group.add_argument(
        "--safety_checker",
        choices=["on", "off"],
        default="off",
        help="on: the checkpoint's own; a flagged image is drawn again with the next seed",
    )
    group.add_argument("--save_init_image_path", default="output/images", help="the folder is made below this one")


def get_args(argv=None):
    parser = Parser(prog="distillation.gen_syn_image", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", type=dataset_name, default="imagenet", metavar="NAME", help=", ".join(DATASETS))
    parser.add_argument(
        "--prototype_path", required=True, help="a folder of stage 1, or a single JSON file of the release"
    )
    parser.add_argument("--label_file_path", default=None, help="other prompts than the prototypes were made with")
    parser.add_argument("--ipc", type=positive_int, default=1, help="images a class")
    parser.add_argument("--km_expand", type=positive_int, default=10, help="as in stage 1: names the folder")
    parser.add_argument("--seed", type=natural, default=0, help="of the synthesis noise")
    parser.add_argument("--verify", action="store_true", help="hash every prototype file at the start")
    add_synthesis_flags(parser)
    parser.add_argument(
        "--arm", nargs="+", choices=ARMS, default=["d4m"], help="the method, or what it is compared with"
    )
    parser.add_argument(
        "--batch_size", type=positive_int, default=32, help="images made at once; more only changes last bits"
    )
    add_checkpoint_flags(parser)
    add_process_flags(parser)
    return parser.parse_args(argv)


def synthesis_settings(args, arm, precision, hashes):
    """All of stage 2 that decides its bytes, as it stands in args.json; the source of the latents apart."""
    return {
        "dataset": args.dataset, "arm": arm, "ipc": args.ipc, "km_expand": args.km_expand,
        "num_prototypes": args.num_prototypes or args.ipc, "strength": 1.0 if arm == "text" else args.strength,
        "guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps,
        "negative_prompt": args.negative_prompt, "seed": args.seed, "batch_size": args.batch_size,
        "image_size": args.image_size or DATASETS[args.dataset].image_size, "safety_checker": args.safety_checker,
        "dtype": args.dtype, "precision": precision, "channels_last": args.channels_last, "compile": args.compile,
        "model": model_name(args.diffusion_checkpoints_path), "revision": args.revision, **hashes,
    }  # fmt: skip


def load_synthesis(args, process):
    """(pipeline, precision, {network_sha256: ...}) of stage 2."""
    # here, because diffusers takes seconds to import
    from scripts.pipeline_stable_diffusion_latents2img import StableDiffusionLatents2ImgPipeline

    precision = resolve_dtype(args.dtype, process.device)
    pipeline, hashes = load_pipeline(
        StableDiffusionLatents2ImgPipeline,
        args.diffusion_checkpoints_path,
        process.device,
        precision,
        args.revision,
        args.variant,
        safety_checker=args.safety_checker == "on",
        config=args.single_file_config,
    )
    check_steps([], args.strength, args.num_inference_steps, pipeline.scheduler.config.num_train_timesteps)
    hashes = {name: hashes[name] for name in ("vae_sha256", "unet_sha256", "text_encoder_sha256")}
    hashes |= {
        "scheduler_sha256": config_hash(pipeline.scheduler),
        "tokenizer_sha256": config_hash(pipeline.tokenizer),
    }
    return speed_up(pipeline, args.channels_last, args.compile), precision, hashes


def check_prototypes(args, source):
    """Refuse prototypes of another data set, number or buffer size than the flags say."""
    where = f"--prototype_path {args.prototype_path}"
    lacking = set(STAGE_1_NAMES) - set(source.settings) if source.settings is not None else ()
    if lacking:
        refuse(f"{where}: its manifest lacks the argument {sorted(lacking)[0]}")
    if source.dataset != args.dataset:
        refuse(f"--dataset {args.dataset}: {where} was made from {source.dataset}")
    wanted = args.num_prototypes or args.ipc
    if wanted > args.ipc:
        refuse(f"--num_prototypes {wanted}: more than --ipc {args.ipc}")
    if source.per_class != wanted:
        flag = "--num_prototypes" if args.num_prototypes else "--ipc"
        refuse(f"{flag} {wanted}: {where} holds {source.per_class} a class")
    made_with = (source.settings or {}).get("km_expand", args.km_expand)
    if made_with != args.km_expand:
        refuse(f"--km_expand {args.km_expand}: {where} was made with {made_with}")


def check_model(where, source, pipeline, vae_sha256):
    """Refuse prototypes of another VAE or latent shape than the loaded checkpoint's."""
    if source.vae_sha256 and source.vae_sha256 != vae_sha256:
        refuse(f"{where}: made with the VAE {source.vae_sha256[:12]}, this checkpoint's is {vae_sha256[:12]}")
    channels = pipeline.unet.config.in_channels
    if source.latent_shape[0] != channels or channels != 4:
        refuse(f"{where}: latents of shape {source.latent_shape}, this checkpoint's UNet takes {channels} channels")


def check_steps(arms, strength, steps, most=1000):
    """Refuse a schedule of which nothing is left after `strength`, or of more steps than the `most` of training."""
    if steps > most:
        refuse(f"--num_inference_steps {steps}: this checkpoint was trained with {most}")
    if int(steps * strength) < 1 and set(arms) - {"decoded", "text"}:
        refuse(f"--num_inference_steps {steps}: at --strength {strength:g} no step is left")


def synthesize_arms(args, arms, process, pipeline, precision, hashes, classes, stream, origin, stages=None):
    """Make the image folder of every arm.

    stream    (positions, batch_size, folder) -> iterator of (position, Prototypes); batch_size: of the encoder, if it
              has one; folder: the output's, for its log
    origin    {flag: value} of where the prototypes are from
    stages    for `log_run`: which stages the process runs, if `stream` is one itself
    """
    folders = []
    for arm in arms:
        watch = Stopwatch()
        settings = {**synthesis_settings(args, arm, precision, hashes), **origin}
        folder = Path(args.save_init_image_path) / image_folder_name(settings, origin.get("prototype_arguments"))
        jobs = list_jobs(classes, args.ipc, settings["num_prototypes"])
        needed = len(jobs) * settings["image_size"] ** 2 * 2
        require_space("--save_init_image_path", folder, needed, [job.file for job in jobs])
        with output_folder("--save_init_image_path", folder, settings, process, resumable=("batch_size",)) as settings:
            synthesizer = Synthesizer(
                pipeline,
                arm,
                args.seed,
                args.strength,
                args.guidance_scale,
                args.num_inference_steps,
                args.negative_prompt,
            )
            # neighbours share a class, so every process takes one run of batches, not every world-th
            batches = np.array_split(np.arange(-(-len(jobs) // settings["batch_size"])), process.world)[process.rank]
            cuts = cut(jobs, settings["batch_size"])
            with StopSignals() as signals:
                made = make_images(
                    folder,
                    [cuts[n] for n in batches],
                    synthesizer,
                    partial(stream, batch_size=settings["batch_size"], folder=folder),
                    settings["image_size"],
                    signals,
                    quiet=not process.is_main,
                    settings_sha256=picture_digest(settings),
                )
                signals.leave_if_asked()
            cost = log_run(folder, process, watch, made, stages)
            missing = finish_folder(folder, jobs, settings, classes)
            if not missing:
                write_timing(folder)
        left = "; the rest is left to other processes" if missing else ""
        print(f"{folder}: {made} of {len(jobs)} images made in {cost}{left}")
        folders.append(folder)
    return folders


@entry_point
def main(argv=None):
    args = get_args(argv)
    check_steps(args.arm, args.strength, args.num_inference_steps)
    process = this_process(args.device, args.shard)
    source = open_prototypes(args.prototype_path, args.dataset, args.verify)
    check_prototypes(args, source)
    classes = source.classes
    if args.label_file_path:
        known = list(known_prompts(args.dataset)) or [c["folder"] for c in classes]
        prompts = dict(zip(known, read_label_file(args.label_file_path, known, args.dataset)))
        classes = [{**c, "prompt": prompts[c["folder"]]} for c in classes]
    pipeline, precision, hashes = load_synthesis(args, process)
    check_model(f"--prototype_path {args.prototype_path}", source, pipeline, hashes["vae_sha256"])
    origin = {
        "prototype_arguments": source.settings,
        "prototypes": source.content,
        "prompts": [c["prompt"] for c in classes] if args.label_file_path else None,
    }

    def stream(positions, batch_size, folder):
        return source.stream(positions)

    return synthesize_arms(args, args.arm, process, pipeline, precision, hashes, classes, stream, origin)


if __name__ == "__main__":
    main()
