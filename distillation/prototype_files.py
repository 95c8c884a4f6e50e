"""Prototype files: one JSON or safetensors file per class, and the release's single JSON.

python -m distillation.prototypes FOLDER OUT.json    # a folder as the release's {prompt: list} file
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from distillation import datasets
from distillation.prototypes import Prototypes
from scripts import files, output
from scripts.runtime import Parser, entry_point, refuse

FORMATS = ("json", "safetensors")


def class_file(position, folder, form="json"):
    """`0000_n01440764.json`"""
    return f"{position:04d}_{folder}.{form}"


def class_bytes(prototypes, facts, form="json"):
    """One class's file.   facts: class_index, folder, prompt, ...

    JSON holds fp16 in shortest decimals, one prototype per line: read as fp16 the same bits.
    """
    if form == "safetensors":
        from safetensors.numpy import save

        arrays = {"prototypes": np.ascontiguousarray(prototypes.latents)}
        arrays["cluster_sizes"] = prototypes.sizes.astype(np.int64)
        return save(arrays, {"facts": json.dumps(facts, ensure_ascii=False)})
    facts = {**facts, "latent_shape": list(prototypes.latents.shape[1:])}
    facts["cluster_sizes"] = prototypes.sizes.tolist()
    bits = prototypes.latents.astype(np.float16, copy=False).view(np.uint16)
    rows = (_decimals()[row].tolist() for row in bits.reshape(len(bits), -1))
    lines = ",\n".join("[" + ",".join(row) + "]" for row in rows)
    text = json.dumps(facts, ensure_ascii=False, indent=1)[:-2]
    return f'{text},\n "prototypes": [\n{lines}\n]}}\n'.encode()


@lru_cache(1)
def _decimals():
    """Shortest decimals of all 65,536 fp16 numbers, by their bits: seven times faster."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype("U")


def read_class(path, data=None, flag="--prototype_path"):
    """The inverse of `class_bytes`: (Prototypes, facts).   data: the file's bytes, if at hand"""
    where = f"{flag} {path}"
    try:
        data = Path(path).read_bytes() if data is None else data
        if str(path).endswith(".safetensors"):
            from safetensors.numpy import load

            head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            facts, arrays = dict(json.loads(head["__metadata__"]["facts"])), load(data)
            latents, sizes = arrays["prototypes"].astype(np.float16), arrays["cluster_sizes"]
        else:
            facts = files.read_json(path, data)
            rows, sizes = facts.pop("prototypes"), np.asarray(facts.pop("cluster_sizes"), np.int64)
            latents = np.asarray(rows, np.float16).reshape(len(rows), *facts.pop("latent_shape"))
        if sizes.shape != (len(latents),):
            raise ValueError(f"{len(latents)} prototypes, cluster sizes of shape {sizes.shape}")
    except Exception as error:  # whatever is wrong inside somebody's file
        refuse(f"{where}: not a prototype file: {type(error).__name__}: {error}")
    check_latents(latents, where)
    return Prototypes(latents, sizes), facts


def check_latents(latents, where):
    """Refuse prototypes that are not finite (k, c, h, w) float16."""
    if latents.ndim != 4 or not latents.size:
        refuse(f"{where}: expected prototypes of shape (k, c, h, w), found {latents.shape}")
    # exponents of fp16 that are all ones; numpy's isfinite takes 15 times longer
    if (latents.view(np.uint16) & 0x7FFF).max() >= 0x7C00:
        refuse(f"{where}: holds NaN or infinity")


class PrototypeFolder:
    """A finished prototype folder; `folder[position]` reads the Prototypes of one class.

    classes       [{"index", "folder", "prompt"}] in class order
    per_class     how many prototypes each has
    latent_shape  (c, h, w)
    settings      stage 1's arguments
    parts         {setting: [what it adds to a folder's name]}
    """

    def __init__(self, folder, flag="--prototype_path", verify=False):
        self.folder, self.flag = Path(folder), flag
        self.manifest = manifest = output.read_manifest(flag, folder, "prototypes", verify)
        self.classes, self.settings = manifest["classes"], manifest["arguments"]
        self.content, self.parts = manifest["content"], manifest["parts"]
        self.per_class, self.dataset = manifest["ipc"], manifest["dataset"]
        self.latent_shape = tuple(manifest["latent_shape"])
        self.vae_sha256 = manifest["inputs"]["generator"]["vae_sha256"]
        self.images, self.real_images = (manifest["inputs"][n] for n in ("images", "real_images"))
        form = self.settings["prototype_format"]
        self.names = [class_file(n, c["folder"], form) for n, c in enumerate(self.classes)]
        safe = all(files.safe_name(c["folder"]) for c in self.classes)
        if not safe or sorted(self.names) != sorted(manifest["files"]):
            refuse(f"{flag} {folder}: its manifest lists other files than its classes'")

    def __getitem__(self, position) -> Prototypes:
        path, c = self.folder / self.names[position], self.classes[position]
        data = path.read_bytes()
        output.check_file(self.flag, self.folder, path.name, self.manifest, data)
        prototypes, facts = read_class(path, data, self.flag)
        found = [facts.get(name) for name in ("class_index", "folder", "prompt")]
        found += prototypes.latents.shape
        expected = [*c.values(), self.per_class, *self.latent_shape]
        if found != expected:
            refuse(f"{self.flag} {path}: holds {found}, the manifest says {expected}")
        return prototypes


class ReleaseFile:
    """The release's single `{prompt: (k, c, h, w) nested lists}` JSON, seen as a PrototypeFolder.

    Key number k, in file order, holds the prototypes of class k, whatever the key says: some of the
    release's prompts are those of other classes. The prompts are ours; the keys only with
    `release_prompts`, or where the classes are not known. Which VAE made it is not known.
    """

    settings, parts, vae_sha256, images, real_images = None, {}, None, None, None

    def __init__(self, path, dataset, release_prompts=False):
        where, table = f"--prototype_path {path}", files.read_json(path)
        known = datasets.known_prompts(dataset)
        if not isinstance(table, dict) or not table:
            refuse(f"{where}: expected a JSON object {{prompt: prototypes}}")
        if known and len(table) != len(known):
            why = "key number k is class k, and classes that share a prompt are one key there"
            refuse(f"{where}: has {len(table)} keys, {dataset} has {len(known)} classes ({why})")
        # a folder is never named by a prompt: the classes of an unknown data set are numbered
        folders = list(known) or [f"{n:04d}" for n in range(len(table))]
        prompts = list(known.values() if known and not release_prompts else table)
        for prompt in prompts:
            if not prompt.isprintable():
                refuse(f"{where}: the prompt {prompt!a} holds what cannot be printed")
        try:
            self.latents = np.asarray(list(table.values()), np.float16)
        except (ValueError, TypeError, OverflowError) as error:
            refuse(f"{where}: not rectangular lists of one shape: {error}")
        for prompt, latents in zip(table, self.latents):
            check_latents(latents, f"{where}: {prompt!a}")
        _, self.per_class, *shape = self.latents.shape
        pairs = enumerate(zip(folders, prompts))
        self.classes = [{"index": n, "folder": f, "prompt": prompt} for n, (f, prompt) in pairs]
        self.dataset, self.latent_shape = dataset, tuple(shape)
        self.content = files.sha256(path)

    def __getitem__(self, position) -> Prototypes:
        return Prototypes(self.latents[position], np.full(self.per_class, None))


def open_prototypes(path, dataset, verify=False, release_prompts=False):
    """--prototype_path -> PrototypeFolder or ReleaseFile."""
    if Path(path).is_file():
        return ReleaseFile(path, dataset, release_prompts)
    if release_prompts:
        refuse(f"--release_prompts: --prototype_path {path} is not the release's JSON file")
    return PrototypeFolder(path, verify=verify)


def check_settings(path, source, settings):
    """Refuse prototypes of another data set, number or buffer size than the flags say."""
    number = "ipc" if settings["num_prototypes"] == settings["ipc"] else "num_prototypes"
    made_with = {"dataset": source.dataset, number: source.per_class}
    made_with["km_expand"] = (source.settings or settings)["km_expand"]
    for name, value in made_with.items():
        if settings[name] != value:
            refuse(f"--{name} {settings[name]}: --prototype_path {path} was made with {value}")


def class_conditions(dataset, classes, model):
    """What the generator takes for each class: its prompt, or its place among ImageNet-1K's.

    classes   [{"index", "folder", "prompt"}];   refuses classes that the generator does not know
    """
    if model.CONDITION == "prompt":
        return [c["prompt"] for c in classes]
    places = {wnid: place for place, wnid in enumerate(sorted(datasets.known_prompts("imagenet")))}
    for c in classes:
        if c["folder"] not in places:
            knows = f"a {model.TITLE} knows only the 1000 classes of ImageNet-1K, by their wnids"
            refuse(f"--dataset {dataset}: {knows}, not {c['folder']}")
    return [places[c["folder"]] for c in classes]


def check_model(path, source, model):
    """Refuse prototypes of another VAE, number of channels or size than the generator's."""
    where, ours, theirs = f"--prototype_path {path}", model.facts["vae_sha256"], source.vae_sha256
    if theirs not in (None, ours):
        refuse(f"{where}: made with the VAE {theirs[:12]}, this checkpoint's is {ours[:12]}")
    channels = source.latent_shape[0]
    if channels != model.channels:
        refuse(f"{where}: latents of {channels} channels, the model's have {model.channels}")
    if model.ONE_SIZE and source.latent_shape != model.latent_shape(model.native_size):
        made = "x".join(map(str, source.latent_shape[1:]))
        refuse(f"{where}: latents of {made}, this checkpoint makes only {model.native_size} px")


@entry_point
def main(argv=None):
    parser = Parser("distillation.prototypes", __doc__)
    parser.flag("folder", help="a finished prototype folder")
    parser.flag("json", help="the single file to write, in the release's form")
    args = parser.parse_args(argv)
    if Path(args.json).is_dir():
        refuse(f"{args.json}: is a folder, expected the name of a file")
    source, table = PrototypeFolder(args.folder, "FOLDER"), {}
    count = len(datasets.known_prompts(source.dataset)) or len(source.classes)
    if [c["index"] for c in source.classes] != list(range(count)):  # the form has no numbers
        held = f"{len(source.classes)} of the {count} classes of {source.dataset}"
        refuse(f"FOLDER {args.folder}: holds {held}; the release's form needs each, in order")
    for position, c in enumerate(source.classes):
        if c["prompt"] in table:  # the release's form cannot hold both
            refuse(f"FOLDER {args.folder}: two classes have the prompt {c['prompt']!r}")
        table[c["prompt"]] = source[position].latents.astype(np.float64).tolist()
    files.write(args.json, json.dumps(table, ensure_ascii=False))
    print(f"{len(table)} classes written to {args.json}")
