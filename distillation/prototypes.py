"""Prototype learning (paper, section 3.2): k-means of one class's latents, and the prototype files.

python -m distillation.prototypes FOLDER OUT.json    # a folder as the release's {prompt: list} file
"""

import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from distillation import datasets
from scripts import files, output
from scripts.runtime import Parser, entry_point, refuse

FORMATS = ("json", "safetensors")


class Prototypes(NamedTuple):
    """The prototypes of one class.

    latents    (k, c, h, w) float16 numpy array, already times the VAE's scaling factor
    sizes      (k,) how many of the class's images are nearest to each
    """

    latents: np.ndarray
    sizes: np.ndarray


# ---- k-means


def class_prototypes(latents, k, batch_size, method="minibatch", device="cpu") -> Prototypes:
    """K-means centres of one class's latents: (N, c, h, w) -> (k, c, h, w), (k,) sizes.   N >= k

    method   "minibatch" (the paper) is fed in buffers of `batch_size` >= k rows; "full" is Lloyd's
             algorithm on all rows; "none" takes the first k rows as they are
    Works in float64, as scikit-learn does when the release hands it fp16 latents; the result is
    rounded to fp16, the precision that synthesis uses.
    """
    rows = np.ascontiguousarray(latents.reshape(len(latents), -1), dtype=np.float64)
    if method == "none":
        centres = rows[:k]
    elif method == "full":
        centres = _lloyd(rows, k)
    elif torch.device(device).type == "cuda":
        # in the encoder's stream, each number read back would wait for a whole batch of images
        with torch.cuda.stream(_stream(device)):
            centres = _minibatch_torch(rows, k, batch_size, device)
    else:
        centres = _minibatch_sklearn(rows, k, batch_size)
    nearest = _nearest(torch.from_numpy(rows), torch.from_numpy(centres)).numpy()
    shape = (k, *latents.shape[1:])
    return Prototypes(centres.reshape(shape).astype(np.float16), np.bincount(nearest, minlength=k))


@lru_cache
def _stream(device):
    """One per device, kept: PyTorch never uses memory of one stream again in another."""
    return torch.cuda.Stream(device, priority=-1)


def _buffers(rows, batch_size):
    # differs from the release: the last, shorter buffer is fitted too, for every class; the release
    # drops it for all but one
    return (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


def _minibatch_sklearn(rows, k, batch_size):
    """The release's own sequence of calls."""
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(n_clusters=k, random_state=0, batch_size=batch_size, n_init="auto")
    for buffer in _buffers(rows, batch_size):
        kmeans.partial_fit(buffer)
    return kmeans.cluster_centers_


def _minibatch_torch(rows, k, batch_size, device):
    """The sequence of `MiniBatchKMeans.partial_fit` in float64 on `device`; equal up to rounding.

    Every centre moves by  c <- (1 - m/n) c + (m/n) mean of its m new rows,  n = its rows so far.
    Centres with very few rows are re-drawn from the buffer now and then, with scikit-learn's rule
    and random numbers; at ImageNet's class sizes that happens, so a plain online mean would differ.
    """
    from sklearn.cluster import kmeans_plusplus

    random = np.random.RandomState(0)
    first = rows[:batch_size]  # scikit-learn takes the length of its first buffer for batch_size
    centres, _ = kmeans_plusplus(first, k, random_state=random)
    centres = torch.from_numpy(centres).to(device)  # (k, d)
    counts = torch.zeros(k, dtype=torch.float64, device=device)
    empty, since_reassignment = True, 0
    for x in _buffers(torch.from_numpy(rows).to(device), batch_size):  # (n, d)
        since_reassignment += len(first)
        reassign = empty or since_reassignment >= 10 * k
        since_reassignment = 0 if reassign else since_reassignment
        members = torch.nn.functional.one_hot(_nearest(x, centres), k).to(x.dtype)  # (n, k)
        new = members.sum(0)  # (k,)
        before, counts = counts, counts + new
        moved = centres * before[:, None] + members.T @ x
        moved = moved * (1 / counts.clamp(min=1))[:, None]
        centres = torch.where(new[:, None] > 0, moved, centres)
        if reassign:
            centres, counts = _reassign(centres, counts, x, random)
        if empty:
            empty = bool((counts == 0).any())
    return centres.cpu().numpy()


def _reassign(centres, counts, x, random, ratio=0.01):
    """scikit-learn's rule: a centre with under 1 % of the largest count gets a random row."""
    device, counts = counts.device, counts.cpu().numpy().copy()
    weak = counts < ratio * counts.max()
    if weak.sum() > 0.5 * len(x):
        weak[np.argsort(counts)[int(0.5 * len(x)) :]] = False
    if weak.any():
        chosen = random.choice(len(x), replace=False, size=weak.sum())
        centres = centres.clone()
        rows = x[torch.from_numpy(chosen).to(device)]
        centres[torch.from_numpy(np.flatnonzero(weak)).to(device)] = rows
        counts[weak] = counts[~weak].min()
    return centres, torch.from_numpy(counts).to(device)


def _nearest(rows, centres):
    """(n, d), (k, d) -> (n,) index of the nearest centre; the first one of equals everywhere."""
    distance = centres.square().sum(1) - rows @ (
        2 * centres.T
    )  # |x|^2 is the same for every centre
    first = torch.arange(len(centres), device=rows.device).expand_as(distance)
    return torch.where(distance == distance.amin(1, keepdim=True), first, len(centres)).amin(1)


def _lloyd(rows, k):
    from sklearn.cluster import KMeans

    return KMeans(n_clusters=k, random_state=0, n_init=1).fit(rows).cluster_centers_


# ---- files


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
    rows = bits.reshape(len(bits), -1)
    lines = ",\n".join("[" + ",".join(_decimals()[row].tolist()) + "]" for row in rows)
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
    """Refuse prototypes that are not finite (k, c, h, w)."""
    if latents.ndim != 4 or not latents.size:
        refuse(f"{where}: expected prototypes of shape (k, c, h, w), found {latents.shape}")
    # exponents of fp16 that are all ones; numpy's isfinite takes 15 times longer
    if (latents.astype(np.float16, copy=False).view(np.uint16) & 0x7FFF).max() >= 0x7C00:
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
        self.manifest = output.read_manifest(flag, folder, "prototypes", verify)
        self.classes, self.settings = self.manifest["classes"], self.manifest["arguments"]
        self.content, self.parts = self.manifest["content"], self.manifest["parts"]
        self.latent_shape = tuple(self.manifest["latent_shape"])
        self.per_class, self.dataset = self.manifest["ipc"], self.manifest["dataset"]
        self.vae_sha256 = self.manifest["inputs"]["generator"]["vae_sha256"]
        self.real_images = self.manifest["inputs"]["real_images"]
        form = self.settings["prototype_format"]
        self.names = [class_file(n, c["folder"], form) for n, c in enumerate(self.classes)]
        safe = all(files.safe_name(c["folder"]) for c in self.classes)
        if not safe or sorted(self.names) != sorted(self.manifest["files"]):
            refuse(f"{flag} {folder}: its manifest lists other files than its classes'")

    def __getitem__(self, position) -> Prototypes:
        path, here = self.folder / self.names[position], self.classes[position]
        data = path.read_bytes()
        output.check_file(self.flag, self.folder, path.name, self.manifest, data)
        prototypes, facts = read_class(path, data, self.flag)
        wanted = {"class_index": here["index"], "folder": here["folder"], "prompt": here["prompt"]}
        for key, value in wanted.items():
            if facts.get(key) != value:
                found = f"{key} is {facts.get(key)!r}, the manifest says {value!r}"
                refuse(f"{self.flag} {path}: {found}")
        found, shape = prototypes.latents.shape, (self.per_class, *self.latent_shape)
        if found != shape:
            refuse(f"{self.flag} {path}: prototypes of shape {found}, expected {shape}")
        return prototypes


class ReleaseFile:
    """The release's single `{prompt: (k, c, h, w) nested lists}` JSON, seen as a PrototypeFolder.

    It says neither which VAE nor which settings made it, and is keyed by prompt: refused where two
    classes share one.
    """

    settings, parts, vae_sha256, real_images = None, {}, None, None

    def __init__(self, path, dataset, flag="--prototype_path"):
        where, table = f"{flag} {path}", files.read_json(path)
        if not isinstance(table, dict) or not table:
            refuse(f"{where}: expected a JSON object {{prompt: prototypes}}")
        known = datasets.known_prompts(dataset)
        counts = Counter(known.values())
        for prompt in table:
            if not prompt.isprintable() or not prompt.strip():
                refuse(f"{where}: {prompt!r} is not a prompt")
            if known and prompt not in counts:
                refuse(f"{where}: {prompt!r} is not a prompt of {dataset}")
            if counts[prompt] > 1:
                refuse(f"{where}: {prompt!r} is the prompt of two classes")
        # a folder is never named by a prompt: the classes of an unknown data set are numbered
        order = known or {f"{n:04d}": prompt for n, prompt in enumerate(sorted(table))}
        self.dataset, self.classes, self._latents = dataset, [], []
        for index, (folder, prompt) in enumerate(order.items()):
            if prompt in table:
                self.classes.append({"index": index, "folder": folder, "prompt": prompt})
                try:
                    latents = np.asarray(table[prompt], dtype=np.float16)
                except (ValueError, TypeError):
                    refuse(f"{where}: the prototypes of {prompt!r} are not a rectangular list")
                check_latents(latents, f"{where}: {prompt!r}")
                self._latents.append(latents)
        shapes = {latents.shape for latents in self._latents}
        if len(shapes) > 1:
            two = " and ".join(map(str, sorted(shapes)[:2]))
            refuse(f"{where}: prototypes of different shapes, {two}")
        self.per_class, *shape = shapes.pop()
        self.latent_shape = tuple(shape)
        self.content = files.sha256(path)

    def __getitem__(self, position) -> Prototypes:
        return Prototypes(self._latents[position], np.ones(self.per_class, dtype=np.int64))


def open_prototypes(path, dataset, verify=False):
    """--prototype_path -> PrototypeFolder or ReleaseFile."""
    if Path(path).is_file():
        return ReleaseFile(path, dataset)
    return PrototypeFolder(path, verify=verify)


@entry_point
def main(argv=None):
    parser = Parser("distillation.prototypes", __doc__)
    parser.flag("folder", help="a finished prototype folder")
    parser.flag("json", help="the single file to write, in the release's form")
    args = parser.parse_args(argv)
    if Path(args.json).is_dir():
        refuse(f"{args.json}: is a folder, expected the name of a file")
    source = PrototypeFolder(args.folder, "FOLDER")
    counts = Counter(c["prompt"] for c in source.classes)
    repeated = [prompt for prompt, count in counts.items() if count > 1]
    if repeated:
        refuse(
            f"FOLDER {args.folder}: two classes have the prompt {repeated[0]!r}, "
            "which the release's form cannot hold"
        )
    table = {}
    for n, c in enumerate(source.classes):
        table[c["prompt"]] = source[n].latents.astype(np.float64).tolist()
    files.write(args.json, json.dumps(table, ensure_ascii=False))
    print(f"{len(table)} classes written to {args.json}")


if __name__ == "__main__":
    main()
