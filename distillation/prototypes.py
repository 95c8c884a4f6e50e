"""Prototype learning (paper, section 3.2): k-means of one class's latents, and the files that hold the centres.

python -m distillation.prototypes FOLDER OUT.json      # a prototype folder as the release's single {prompt: list} file
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m distillation.prototypes", file=sys.stderr)
    sys.exit(2)

import hashlib
import json
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from distillation.datasets import DATASETS, known_prompts
from scripts.files import (
    check_unit,
    output_name,
    read_json,
    read_manifest,
    refuse_changed,
    safe_name,
    write_bytes,
    write_text,
)
from scripts.runtime import Parser, entry_point, refuse

FORMATS = {"json": ".json", "safetensors": ".safetensors"}


class Prototypes(NamedTuple):
    """The prototypes of one class.

    latents    (k, 4, h, w) float16 numpy array, already times the VAE's scaling factor
    sizes      (k,) how many of the class's images are nearest to each
    """

    latents: np.ndarray
    sizes: np.ndarray


# ---- k-means


def class_prototypes(latents, k, batch_size, method="minibatch", device="cpu") -> Prototypes:
    """K-means centres of one class's latents: (N, 4, h, w) -> (k, 4, h, w), (k,) sizes.   N >= k

    method "minibatch" (the paper) is fed in buffers of `batch_size` >= k rows; "full" is Lloyd's algorithm on all
    rows; "none" takes the first k rows as they are. Works in float64, as scikit-learn does when the release hands it
    fp16 latents; the result is rounded to fp16, the precision that synthesis uses.
    """
    rows = np.ascontiguousarray(latents.reshape(len(latents), -1), dtype=np.float64)
    if method == "none":
        centres = rows[:k]
    elif method == "full":
        centres = _lloyd(rows, k)
    elif torch.device(device).type == "cuda":
        # beside the encoder, not behind it: in its stream each number read back would wait for a whole batch of images
        with torch.cuda.stream(_stream(device)):
            centres = _minibatch_torch(rows, k, batch_size, device)
    else:
        centres = _minibatch_sklearn(rows, k, batch_size)
    sizes = np.bincount(_nearest(torch.from_numpy(rows), torch.from_numpy(centres)).numpy(), minlength=k)
    return Prototypes(centres.reshape(k, *latents.shape[1:]).astype(np.float16), sizes)


@lru_cache
def _stream(device):
    """One a device, kept: PyTorch never uses memory of one stream again in another."""
    return torch.cuda.Stream(device, priority=-1)


def _buffers(rows, batch_size):
    # differs from the release: the last, shorter buffer is fitted too, for every class; the release drops it for all
    # but one
    return (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


def _minibatch_sklearn(rows, k, batch_size):
    """The release's own sequence of calls."""
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(n_clusters=k, random_state=0, batch_size=batch_size, n_init="auto")
    for buffer in _buffers(rows, batch_size):
        kmeans.partial_fit(buffer)
    return kmeans.cluster_centers_


def _minibatch_torch(rows, k, batch_size, device):
    """The same sequence as `MiniBatchKMeans.partial_fit`, in float64 on `device`; equal to it up to rounding.

    Every centre moves by  c <- (1 - m/n) c + (m/n) mean of its m new rows,  n = rows it has received so far.
    Centres with very few rows are re-drawn from the buffer now and then, with scikit-learn's rule and its random
    numbers; at ImageNet's class sizes that happens, so a plain online mean would differ.
    """
    from sklearn.cluster import kmeans_plusplus

    random = np.random.RandomState(0)
    first = rows[:batch_size]
    # scikit-learn fixes its batch size at the first call, to at most the rows it is given there
    step = min(batch_size, len(first))
    centres = torch.from_numpy(kmeans_plusplus(first, k, random_state=random)[0]).to(device)  # (k, d)
    counts = torch.zeros(k, dtype=torch.float64, device=device)
    empty, since_reassignment = True, 0
    for x in _buffers(torch.from_numpy(rows).to(device), batch_size):  # (n, d)
        since_reassignment += step
        reassign = empty or since_reassignment >= 10 * k
        since_reassignment = 0 if reassign else since_reassignment
        members = torch.nn.functional.one_hot(_nearest(x, centres), k).to(x.dtype)  # (n, k)
        new = members.sum(0)  # (k,)
        before, counts = counts, counts + new
        moved = (centres * before[:, None] + members.T @ x) * (1 / counts.clamp(min=1))[:, None]
        centres = torch.where(new[:, None] > 0, moved, centres)
        if reassign:
            centres, counts = _reassign(centres, counts, x, random)
        if empty:
            empty = bool((counts == 0).any())
    return centres.cpu().numpy()


def _reassign(centres, counts, x, random, ratio=0.01):
    """scikit-learn's rule: centres with under 1 % of the largest count get a random row of the buffer each."""
    device, counts = counts.device, counts.cpu().numpy().copy()
    weak = counts < ratio * counts.max()
    if weak.sum() > 0.5 * len(x):
        weak[np.argsort(counts)[int(0.5 * len(x)) :]] = False
    if weak.any():
        chosen = random.choice(len(x), replace=False, size=weak.sum())
        centres = centres.clone()
        centres[torch.from_numpy(np.flatnonzero(weak)).to(device)] = x[torch.from_numpy(chosen).to(device)]
        counts[weak] = counts[~weak].min()
    return centres, torch.from_numpy(counts).to(device)


def _nearest(rows, centres):
    """(n, d), (k, d) -> (n,) index of the nearest centre; the first one among equals, on every device."""
    distance = centres.square().sum(1) - rows @ (2 * centres.T)  # |x|^2 is the same for every centre
    first = torch.arange(len(centres), device=rows.device).expand_as(distance)
    return torch.where(distance == distance.amin(1, keepdim=True), first, len(centres)).amin(1)


def _lloyd(rows, k):
    from sklearn.cluster import KMeans

    return KMeans(n_clusters=k, random_state=0, n_init=1).fit(rows).cluster_centers_


# ---- files


def prototype_folder_name(settings):
    """`{dataset}-ipc{ipc}-kmexpand{k}` as the release, plus what is not the default."""
    stem = f"{settings['dataset']}-ipc{settings['ipc']}-kmexpand{settings['km_expand']}"
    return output_name(stem, *prototype_suffix(settings))


def prototype_suffix(settings):
    """The options of stage 1 that enter its folder's name and those of the images made from it, and their defaults."""
    options = {
        "size": settings["size"],
        "seed": settings["seed"],
        "kmeans": settings["kmeans"],
        "classes": settings["classes"],
        "max": settings["max_images_per_class"],
        "dtype": settings["dtype"],
    }
    defaults = {
        "size": default_size(settings["dataset"]),
        "seed": 0,
        "kmeans": "minibatch",
        "classes": None,
        "max": 0,
        "dtype": "auto",
    }
    return options, defaults


def default_size(dataset):
    """Pixels at which real images enter the VAE: 512 as the release; 32 for digits and their tiny model."""
    return 32 if dataset == "digits" else 512


def class_file(position, folder, form="json"):
    """`0000_n01440764.json`"""
    return f"{position:04d}_{folder}{FORMATS[form]}"


def write_class(path, prototypes, facts):
    """One class's prototypes as JSON or safetensors, by the path's suffix. facts: class_index, folder, prompt, ...

    JSON holds fp16 in shortest decimals, one prototype a line: reading them back as fp16 gives the same bits.
    """
    if path.suffix == ".safetensors":
        from safetensors.numpy import save

        arrays = {
            "prototypes": np.ascontiguousarray(prototypes.latents),
            "cluster_sizes": prototypes.sizes.astype(np.int64),
        }
        write_bytes(path, save(arrays, {"facts": json.dumps(facts, ensure_ascii=False)}))
        return
    head = {**facts, "latent_shape": list(prototypes.latents.shape[1:]), "cluster_sizes": prototypes.sizes.tolist()}
    bits = prototypes.latents.astype(np.float16, copy=False).view(np.uint16)
    lines = ",\n".join("[" + ",".join(_decimals()[row].tolist()) + "]" for row in bits.reshape(len(bits), -1))
    write_text(path, json.dumps(head, ensure_ascii=False, indent=1)[:-2] + ',\n "prototypes": [\n' + lines + "\n]}\n")


@lru_cache(1)
def _decimals():
    """The shortest decimals of all 65,536 fp16 numbers, by their bits: a look-up takes a seventh of the conversion."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype("U")


def read_class(path, flag="--prototype_path", digest=None):
    """The inverse of `write_class`: (Prototypes, facts). Refuses, naming the file, what is not such a file.

    digest   sha256 that the bytes must have which are read here, once; None: any
    """
    try:
        data = path.read_bytes()
        if digest and hashlib.sha256(data).hexdigest() != digest:
            refuse_changed(flag, path.parent, path.name)
        if path.suffix == ".safetensors":
            from safetensors.numpy import load

            arrays, head = load(data), json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            facts = json.loads(head["__metadata__"]["facts"])
            latents, sizes = arrays["prototypes"], arrays["cluster_sizes"]
        else:
            facts = read_json(path, data)
            if not isinstance(facts, dict):
                raise ValueError("expected a JSON object")
            rows, sizes = facts.pop("prototypes"), np.asarray(facts.pop("cluster_sizes"), dtype=np.int64)
            latents = np.asarray(rows, dtype=np.float16).reshape(len(rows), *facts.pop("latent_shape"))
    except Exception as error:  # whatever is wrong inside a foreign file: one line that names it
        refuse(f"{flag} {path}: is no prototype file: {type(error).__name__}: {error}")
    if not isinstance(facts, dict):
        refuse(f"{flag} {path}: is no prototype file: its facts are no JSON object")
    check_latents(latents, f"{flag} {path}")
    if sizes.shape != (len(latents),):
        refuse(f"{flag} {path}: {len(latents)} prototypes, but cluster sizes of shape {sizes.shape}")
    return Prototypes(latents, sizes), facts


def check_class(path, settings_sha256, flag="--save_prototype_path"):
    """Refuse a file that is no prototype file, or one made with other settings."""
    check_unit(path, read_class(path, flag)[1].get("settings_sha256"), settings_sha256)


def check_latents(latents, where):
    """Refuse prototypes that are not finite (k, 4, h, w)."""
    if latents.ndim != 4 or latents.shape[1] != 4 or not len(latents):
        refuse(f"{where}: expected prototypes of shape (k, 4, h, w), found {latents.shape}")
    half = latents.dtype == np.float16  # whose isfinite takes 15 times longer than this look at the exponents
    if not ((latents.view(np.uint16) & 0x7FFF).max() < 0x7C00 if half else np.isfinite(latents).all()):
        refuse(f"{where}: prototype {int(np.argwhere(~np.isfinite(latents))[0][0])} holds NaN or infinity")


class _Streamed:
    """What has `source[position]` can be read as a stream."""

    def stream(self, positions):
        """Yield (position, Prototypes), one class in memory at a time."""
        return ((position, self[position]) for position in positions)


def _check_facts(manifest):
    """Raises ValueError, KeyError or TypeError for facts that no run of stage 1 writes."""
    classes, settings, shape = manifest["classes"], manifest["arguments"], manifest["latent_shape"]
    names = [c["folder"] for c in classes]
    for c in classes:
        if not (safe_name(c["folder"]) and isinstance(c["prompt"], str) and _is_count(c["index"], 0)):
            raise ValueError(f"class {c}")
    if not classes or len(set(names)) < len(names) or len({c["index"] for c in classes}) < len(names):
        raise ValueError("no classes, or one twice")
    if not (isinstance(shape, list) and len(shape) == 3 and all(_is_count(n) for n in shape)):
        raise ValueError(f"latent_shape {shape}")
    checks = {
        **dict.fromkeys(("ipc", "km_expand", "size"), _is_count),
        **dict.fromkeys(("seed", "max_images_per_class"), lambda value: _is_count(value, 0)),
        **dict.fromkeys(("kmeans", "dtype", "prototype_format"), safe_name),
    }
    for name, fits in checks.items():
        if name in settings and not fits(settings[name]):
            raise ValueError(f"{name} {settings[name]!r}")
    if not _is_count(manifest["ipc"]):
        raise ValueError(f"ipc {manifest['ipc']!r}")
    chosen = settings.get("classes")
    if chosen is not None and not (isinstance(chosen, list) and all(isinstance(c, str) for c in chosen)):
        raise ValueError(f"classes {chosen!r}")
    if manifest["dataset"] not in DATASETS or not isinstance(manifest["vae_sha256"], str):
        raise ValueError(f"dataset {manifest['dataset']!r} or vae_sha256 {manifest['vae_sha256']!r}")


def _is_count(value, least=1):
    return type(value) is int and value >= least


class PrototypeFolder(_Streamed):
    """A finished prototype folder, read class by class: never more than what is asked for is in memory.

    classes      [{"index", "folder", "prompt"}] in class order
    settings     stage 1's arguments;   content: digest of all files;   latent_shape: (4, h, w);   vae_sha256
    """

    def __init__(self, folder, flag="--prototype_path", verify=False):
        self.folder, self.flag = Path(folder), flag
        self.manifest = read_manifest(flag, folder, "prototypes", verify)
        try:
            self.classes, self.settings = self.manifest["classes"], self.manifest["arguments"]
            self.content, self.vae_sha256 = self.manifest["content"], self.manifest["vae_sha256"]
            self.latent_shape = tuple(self.manifest["latent_shape"])
            self.per_class, self.dataset = self.manifest["ipc"], self.manifest["dataset"]
            _check_facts(self.manifest)
            self._files = [
                class_file(n, c["folder"], self.settings["prototype_format"]) for n, c in enumerate(self.classes)
            ]
        except KeyError as error:
            refuse(f"{flag} {folder}: its manifest lacks {error}")
        except (TypeError, ValueError) as error:
            refuse(f"{flag} {folder}: its manifest is damaged: {error}")
        if sorted(self._files) != sorted(self.manifest["files"]):
            refuse(f"{flag} {folder}: its manifest lists other files than its {len(self.classes)} classes'")

    def __getitem__(self, position) -> Prototypes:
        name = self._files[position]
        prototypes, facts = read_class(self.folder / name, self.flag, self.manifest["files"][name]["sha256"])
        here = self.classes[position]
        wanted = {"class_index": here["index"], "folder": here["folder"], "prompt": here["prompt"]}
        for key, value in wanted.items():
            if facts.get(key) != value:
                refuse(f"{self.flag} {self.folder / name}: {key} is {facts.get(key)!r}, the manifest says {value!r}")
        shape = (self.per_class, *self.latent_shape)
        if prototypes.latents.shape != shape:
            refuse(
                f"{self.flag} {self.folder / name}: prototypes of shape {prototypes.latents.shape}, expected {shape}"
            )
        return prototypes


class ReleaseFile(_Streamed):
    """The release's single `{prompt: (k, 4, h, w) nested lists}` JSON, seen as a prototype folder.

    It says neither which VAE nor which settings made it, and is keyed by prompt: refused where two classes share one.
    """

    vae_sha256 = None

    def __init__(self, path, dataset, flag="--prototype_path"):
        table = read_json(path)
        if not isinstance(table, dict) or not table:
            refuse(f"{flag} {path}: expected a JSON object {{prompt: prototypes}}")
        odd = next((prompt for prompt in table if not prompt.isprintable() or not prompt.strip()), None)
        if odd is not None:
            refuse(f"{flag} {path}: {odd!r} is no prompt")
        folders = {prompt: folder for folder, prompt in known_prompts(dataset).items()}
        shared = [p for p, n in Counter(known_prompts(dataset).values()).items() if n > 1 and p in table]
        unknown = [prompt for prompt in table if prompt not in folders] if folders else []
        if shared or unknown:
            refuse(
                f"{flag} {path}: {(shared + unknown)[0]!r} "
                + ("is the prompt of two classes" if shared else f"is not a prompt of {dataset}")
            )
        # a folder is never named by a prompt: the classes of an unknown data set are numbered
        numbered = {prompt: f"{n:04d}" for n, prompt in enumerate(sorted(table))}
        order = list(known_prompts(dataset)) or list(numbered.values())
        named = {folders.get(prompt, numbered[prompt]): prompt for prompt in table}
        self.dataset, self.classes, self._latents = dataset, [], []
        for index, folder in enumerate(order):
            if folder in named:
                self.classes.append({"index": index, "folder": folder, "prompt": named[folder]})
                try:
                    latents = np.asarray(table[named[folder]], dtype=np.float16)
                except (ValueError, TypeError):
                    refuse(f"{flag} {path}: the prototypes of {named[folder]!r} are no rectangular list of numbers")
                check_latents(latents, f"{flag} {path}: {named[folder]!r}")
                self._latents.append(latents)
        shapes = {latents.shape for latents in self._latents}
        if len(shapes) > 1:
            refuse(f"{flag} {path}: prototypes of different shapes, {' and '.join(map(str, sorted(shapes)[:2]))}")
        self.per_class, *self.latent_shape = shapes.pop()
        self.latent_shape = tuple(self.latent_shape)
        self.settings = None
        self.content = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def __getitem__(self, position) -> Prototypes:
        return Prototypes(self._latents[position], np.ones(self.per_class, dtype=np.int64))


def open_prototypes(path, dataset, verify=False):
    """--prototype_path -> PrototypeFolder or ReleaseFile."""
    path = Path(path)
    if path.is_file():
        return ReleaseFile(path, dataset)
    return PrototypeFolder(path, verify=verify)


@entry_point
def main(argv=None):
    parser = Parser(prog="distillation.prototypes", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a finished prototype folder")
    parser.add_argument("json", help="the single file to write, in the release's form")
    args = parser.parse_args(argv)
    if Path(args.json).is_dir():
        refuse(f"{args.json}: is a folder, expected the name of a file")
    source = PrototypeFolder(args.folder, "FOLDER")
    repeated = [p for p, n in Counter(c["prompt"] for c in source.classes).items() if n > 1]
    if repeated:
        refuse(
            f"FOLDER {args.folder}: two classes have the prompt {repeated[0]!r}, which the release's form cannot hold"
        )
    table = {c["prompt"]: source[n].latents.astype(np.float64).tolist() for n, c in enumerate(source.classes)}
    write_text(Path(args.json), json.dumps(table, ensure_ascii=False))
    print(f"{len(table)} classes written to {args.json}")


if __name__ == "__main__":
    sys.exit(main())
