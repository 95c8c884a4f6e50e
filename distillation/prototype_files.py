"""Prototype files: one JSON or safetensors file per class, and the release's single JSON.

python -m distillation.prototypes FOLDER OUT.json    # a folder as the release's {prompt: list} file
"""

import json
from collections import Counter
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

    JSON holds fp16 in shortest decimals, one prototype per line; read as fp16 they are the same
    bits. safetensors is ten times smaller and some hundred times faster to read.
    """
    if form == "safetensors":
        from safetensors.numpy import save

        latents, sizes = np.ascontiguousarray(prototypes.latents), prototypes.sizes.astype(np.int64)
        facts = {"facts": json.dumps(facts, ensure_ascii=False)}
        return save({"prototypes": latents, "cluster_sizes": sizes}, facts)
    shape, sizes = list(prototypes.latents.shape[1:]), prototypes.sizes.tolist()
    head = {**facts, "latent_shape": shape, "cluster_sizes": sizes}
    bits = prototypes.latents.astype(np.float16, copy=False).view(np.uint16)
    rows = (_decimals()[row].tolist() for row in bits.reshape(len(bits), -1))
    lines = ",\n".join("[" + ",".join(row) + "]" for row in rows)
    text = json.dumps(head, ensure_ascii=False, indent=1)[:-2]
    return f'{text},\n "prototypes": [\n{lines}\n]}}\n'.encode()


@lru_cache(1)
def _decimals():
    """Shortest decimals of all 65,536 fp16 numbers, by their bits: seven times faster."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype("U")


def read_class(path, data=None, flag="--prototype_path"):
    """The inverse of `class_bytes`: (Prototypes, facts).   data: the file's bytes, if read already

    Refuses, naming the file, anything else.
    """
    where = f"{flag} {path}"
    try:
        data = Path(path).read_bytes() if data is None else data
        if str(path).endswith(".safetensors"):
            from safetensors.numpy import load

            head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            facts, arrays = json.loads(head["__metadata__"]["facts"]), load(data)
            latents, sizes = arrays["prototypes"].astype(np.float16), arrays["cluster_sizes"]
        else:
            facts = files.read_json(path, data)
            rows, sizes = facts.pop("prototypes"), np.asarray(facts.pop("cluster_sizes"), np.int64)
            latents = np.asarray(rows, np.float16).reshape(len(rows), *facts.pop("latent_shape"))
        if sizes.shape != (len(latents),) or not isinstance(facts, dict):
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
        first = np.argwhere(~np.isfinite(latents))[0][0]
        refuse(f"{where}: prototype {first} holds NaN or infinity")


class PrototypeFolder:
    """A finished prototype folder; `folder[position]` reads the Prototypes of one class.

    classes       [{"index", "folder", "prompt"}] in class order;   per_class: prototypes of each
    settings      stage 1's arguments;   parts: {setting: what it adds to a folder's name}
    content       digest of all files;   latent_shape: (c, h, w)
    vae_sha256    of the VAE that made it;   real_images: how many images it was made from
    """

    def __init__(self, folder, flag="--prototype_path", verify=False):
        self.folder, self.flag = Path(folder), flag
        self.manifest = manifest = output.read_manifest(flag, folder, "prototypes", verify)
        self.classes, self.settings = manifest["classes"], manifest["arguments"]
        self.content, self.parts = manifest["content"], manifest["parts"]
        self.per_class, self.dataset = manifest["ipc"], manifest["dataset"]
        self.latent_shape = tuple(manifest["latent_shape"])
        self.vae_sha256 = manifest["inputs"]["generator"]["vae_sha256"]
        self.real_images = manifest["inputs"]["real_images"]
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
        facts["shape"] = prototypes.latents.shape
        expected = {"class_index": c["index"], "folder": c["folder"], "prompt": c["prompt"]}
        expected["shape"] = (self.per_class, *self.latent_shape)
        for key, value in expected.items():
            if facts.get(key) != value:
                found = f"{key} is {facts.get(key)!r}, the manifest says {value!r}"
                refuse(f"{self.flag} {path}: {found}")
        return prototypes


class ReleaseFile:
    """The release's single `{prompt: (k, c, h, w) nested lists}` JSON, seen as a PrototypeFolder.

    It says neither which VAE nor which settings made it, and is keyed by prompt: refused where two
    classes share one.
    """

    settings, parts, vae_sha256, real_images = None, {}, None, None

    def __init__(self, path, dataset, flag="--prototype_path"):
        where, table = f"{flag} {path}", files.read_json(path)
        known = datasets.known_prompts(dataset)
        counts = Counter(known.values())
        if not isinstance(table, dict) or not table:
            refuse(f"{where}: expected a JSON object {{prompt: prototypes}}")
        for prompt in table:
            if not prompt.isprintable() or not prompt.strip():
                refuse(f"{where}: {prompt!r} is not a prompt")
            if known and prompt not in counts:
                refuse(f"{where}: {prompt!r} is not a prompt of {dataset}")
            if counts[prompt] > 1:
                refuse(f"{where}: {prompt!r} is the prompt of two classes")
        # a folder is never named by a prompt: the classes of an unknown data set are numbered
        order = known or {f"{n:04d}": prompt for n, prompt in enumerate(sorted(table))}
        classes = enumerate(order.items())
        classes = [{"index": n, "folder": f, "prompt": p} for n, (f, p) in classes if p in table]
        try:
            self.latents = np.asarray([table[c["prompt"]] for c in classes], np.float16)
        except (ValueError, TypeError, OverflowError) as error:
            refuse(f"{where}: not rectangular lists of one shape: {error}")
        for c, latents in zip(classes, self.latents):
            check_latents(latents, f"{where}: {c['prompt']!r}")
        _, self.per_class, *shape = self.latents.shape
        self.dataset, self.classes, self.latent_shape = dataset, classes, tuple(shape)
        self.content = files.sha256(path)

    def __getitem__(self, position) -> Prototypes:
        return Prototypes(self.latents[position], np.ones(self.per_class, dtype=np.int64))


def open_prototypes(path, dataset, verify=False):
    """--prototype_path -> PrototypeFolder or ReleaseFile."""
    if Path(path).is_file():
        return ReleaseFile(path, dataset)
    return PrototypeFolder(path, verify=verify)


def check_settings(path, source, settings):
    """Refuse prototypes of another data set, number or buffer size than the flags say."""
    where, s, wanted = f"--prototype_path {path}", settings, settings["num_prototypes"]
    if source.dataset != s["dataset"]:
        refuse(f"--dataset {s['dataset']}: {where} was made from {source.dataset}")
    if source.per_class != wanted:
        flag = "--ipc" if wanted == s["ipc"] else "--num_prototypes"
        refuse(f"{flag} {wanted}: {where} holds {source.per_class} per class")
    made_with = (source.settings or s)["km_expand"]
    if made_with != s["km_expand"]:
        refuse(f"--km_expand {s['km_expand']}: {where} was made with {made_with}")


def check_model(path, source, model):
    """Refuse prototypes of another VAE or number of channels than the generator's."""
    where, ours, theirs = f"--prototype_path {path}", model.facts["vae_sha256"], source.vae_sha256
    if theirs not in (None, ours):
        refuse(f"{where}: made with the VAE {theirs[:12]}, this checkpoint's is {ours[:12]}")
    if source.latent_shape[0] != model.channels:
        shape = f"latents of shape {source.latent_shape}"
        refuse(f"{where}: {shape}, the model has {model.channels} channels")


@entry_point
def main(argv=None):
    parser = Parser("distillation.prototypes", __doc__)
    parser.flag("folder", help="a finished prototype folder")
    parser.flag("json", help="the single file to write, in the release's form")
    args = parser.parse_args(argv)
    if Path(args.json).is_dir():
        refuse(f"{args.json}: is a folder, expected the name of a file")
    source, table = PrototypeFolder(args.folder, "FOLDER"), {}
    for position, c in enumerate(source.classes):
        if c["prompt"] in table:  # the release's form cannot hold both
            refuse(f"FOLDER {args.folder}: two classes have the prompt {c['prompt']!r}")
        table[c["prompt"]] = source[position].latents.astype(np.float64).tolist()
    files.write(args.json, json.dumps(table, ensure_ascii=False))
    print(f"{len(table)} classes written to {args.json}")
