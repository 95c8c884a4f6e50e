"""Stages 1 and 2 in one process, with no prototype file: real images -> prototypes -> synthetic images.

    python -m distillation.distill --dataset imagenet --data_dir data/imagenet --ipc 10 --km_expand 1

The PNGs are byte-identical to those of gen_prototype followed by gen_syn_image.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m distillation.distill", file=sys.stderr)
    sys.exit(2)

from distillation.gen_prototype import (
    add_prototype_flags,
    check_size,
    class_latents,
    class_table,
    encoding,
    latent_cache,
    open_training_split,
    prototype_settings,
    prototypes_or_repeats,
    resolve_kmeans_device,
)
from distillation.gen_syn_image import add_synthesis_flags, check_steps, load_synthesis, synthesize_arms
from scripts.checkpoints import add_checkpoint_flags
from scripts.runtime import Parser, add_process_flags, entry_point, positive_int, refuse, this_process


def get_args(argv=None):
    parser = Parser(prog="distillation.distill", description=__doc__.split("\n")[0])
    add_prototype_flags(parser)
    add_synthesis_flags(parser)
    parser.add_argument("--batch_size", type=positive_int, default=32, help="images encoded, and images made, at once")
    add_checkpoint_flags(parser)
    add_process_flags(parser)
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    if args.num_prototypes not in (None, args.ipc):
        refuse(
            f"--num_prototypes {args.num_prototypes}: distill makes --ipc {args.ipc} prototypes; use the two-step way"
        )
    check_steps(["d4m"], args.strength, args.num_inference_steps)
    process = this_process(args.device, args.shard)
    kmeans_device = resolve_kmeans_device(args.kmeans_device, process.device)
    split = open_training_split(args)
    pipeline, precision, hashes = load_synthesis(args, process)
    from scripts.pipeline_stable_diffusion_gen_latents import StableDiffusionGenLatentsPipeline

    encoder = StableDiffusionGenLatentsPipeline(**pipeline.components, requires_safety_checker=False)
    settings = prototype_settings(args, split, precision, hashes["vae_sha256"])
    check_size(settings["size"], encoder)

    def stream(positions, batch_size, folder):
        """Prototypes of the classes that are still needed, made as synthesis gets to them."""
        cache = latent_cache(args.latent_cache, split, {**settings, "batch_size": batch_size}, folder)
        latents = class_latents(
            encoder, split, positions, settings["size"], batch_size, args.seed, cache, **encoding(args, process)
        )
        for position, rows, _ in latents:
            yield (
                position,
                prototypes_or_repeats(
                    rows,
                    args.ipc,
                    args.km_expand,
                    args.kmeans,
                    kmeans_device,
                    args.on_small_class,
                    split.folders[position],
                ),
            )

    origin = {"prototype_arguments": {**settings, "batch_size": None}, "prototypes": None, "prompts": None}
    return synthesize_arms(
        args, ["d4m"], process, pipeline, precision, hashes, class_table(split), stream, origin, "stages 1 and 2"
    )


if __name__ == "__main__":
    main()
