"""Stages 1 and 2 in one process, with no prototype file: real images -> synthetic images.

    python -m distillation.distill --dataset imagenet --data_dir data/imagenet \\
        --ipc 10 --km_expand 1

The PNGs are those of gen_prototype followed by gen_syn_image, byte for byte.
"""

from distillation import datasets, gen_prototype, gen_syn_image, latent_cache
from scripts import generators, runtime
from scripts.runtime import Parser, entry_point, refuse


def get_args(argv=None):
    """The flags, the names of stage 1's settings, and those of stage 2's."""
    parser = Parser("distillation.distill", __doc__)
    first = gen_prototype.declare(parser)
    second = [*gen_syn_image.declare(parser), *gen_syn_image.SHARED]
    runtime.add_process_flags(parser)
    return parser.parse_args(argv), first, second


@entry_point
def main(argv=None):
    args, first, second = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    if args.num_prototypes != args.ipc:
        refuse(f"--num_prototypes {args.num_prototypes}: distill makes --ipc {args.ipc} prototypes")
    stage_1 = args.settings.only(first)
    kmeans_device = gen_prototype.resolve_kmeans_device(args.kmeans_device, process.device)
    files_of = (args.data_dir, args.label_file_path, args.download)
    split = gen_prototype.open_images(stage_1, *files_of, quiet=not process.is_main)
    how = {name: getattr(args, name) for name in generators.FLAGS}
    model = generators.load(args.diffusion_checkpoints_path, process.device, **how)
    of_stage_2, label_file = args.settings.only(second), args.label_file_path
    stage_2 = gen_syn_image.fitted(of_stage_2, ["d4m"], model, label_file)
    stage_2 = gen_syn_image.of_arm(stage_2, "d4m")
    stage_1 = gen_prototype.with_size(stage_1, model)
    if process.is_main:
        classes = datasets.class_table(split)
        gen_syn_image.warn_of_long_prompts(model, classes, stage_2["negative_prompt"])

    def stream(positions, out):
        """Prototypes of the classes that are still needed, made as synthesis gets to them."""
        s = {**stage_1, "batch_size": out.settings["batch_size"]}  # of a folder that was begun
        cache = latent_cache.open_cache(args.latent_cache, split, s, model, out.log)
        how = (s, cache, args.num_workers, not process.is_main)
        for position, latents, _ in gen_prototype.class_latents(model, split, positions, *how):
            name = split.folders[position]
            yield position, gen_prototype.cluster(latents, s, kmeans_device, name)

    inputs = gen_prototype.inputs_of(split, model, stage_1)
    inputs |= {"prototypes": None, "prototype_arguments": {**stage_1, "batch_size": None}}
    what = (datasets.class_table(split), stream, inputs, gen_prototype.parts_of(stage_1))
    where, words = (args.save_init_image_path, process), "images (stages 1 and 2)"
    return [gen_syn_image.synthesize(model, stage_2, *what, *where, words)]


if __name__ == "__main__":
    main()
