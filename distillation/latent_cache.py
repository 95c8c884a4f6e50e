"""Latents kept for another run of stage 1: another IPC costs minutes instead of a whole encode."""

import hashlib
import json
from pathlib import Path

import numpy as np

from distillation import prototype_files
from scripts import files, output
from scripts.runtime import refuse

# the settings that decide a latent, or which images of a class there are
DECISIVE = ("size", "seed", "batch_size", "channels_last", "compile", "on_bad_image")
DECISIVE += ("max_images_per_class",)


class LatentCache:
    """One safetensors file per class.

    The folder's name hashes all that decides the latents, so files of another model, size or seed
    are never found. The names of a class's images stand in its file: a changed data set is noticed.

    log    function that is told, as keywords, what the encoding of each class once took
    """

    def __init__(self, root, split, settings, generator_facts, log):
        key = {name: settings[name] for name in DECISIVE}
        key |= {name: generator_facts[name] for name in ("precision", "vae_sha256")}
        self.folder = Path(root) / f"{split.dataset}-latents-{files.digest_of(key)[:12]}"
        self.split, self.log = split, log
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [row for row in output.log_rows(self.folder) if row.get("event") == "encode"]
        self.took = {row.get("file"): row.get("seconds") for row in rows}

    def _path(self, position):
        where = (self.split.class_ids[position], self.split.folders[position], "safetensors")
        return self.folder / prototype_files.class_file(*where)

    def _names(self, position):
        return self.split.fingerprint([position], missing_ok=True)  # links were checked before

    def _read(self, position):
        """(facts, function that reads the latents) of a class's file."""
        from safetensors import safe_open

        try:
            file = safe_open(self._path(position), "numpy")
            return json.loads(file.metadata()["facts"]), lambda: file.get_tensor("latents")
        except Exception as error:  # whatever is wrong inside somebody's file
            self._refuse(position, error)

    def _refuse(self, position, reason):
        refuse(f"--latent_cache {self._path(position)}: {reason}; remove this file")

    def __contains__(self, position):
        """Whether the class is cached and its images are the same; reads no latents."""
        exists = self._path(position).exists()
        return exists and self._read(position)[0]["names"] == self._names(position)

    def load(self, position):
        """(latents, skipped) of a class that is cached."""
        name, (facts, read) = self._path(position).name, self._read(position)
        self.log(event="cached", file=name, seconds=self.took.get(name))
        latents = read()
        if hashlib.sha256(latents).hexdigest() != facts["sha256"]:
            self._refuse(position, "its latents are not those that were written")
        return latents, facts["skipped"]

    def save(self, position, latents, skipped, seconds):
        """seconds: what encoding took; only the log holds it, so that equal files stay equal."""
        from safetensors.numpy import save

        latents, path = np.ascontiguousarray(latents), self._path(position)
        facts = {"names": self._names(position), "skipped": skipped}
        facts["sha256"] = hashlib.sha256(latents).hexdigest()
        files.write(path, save({"latents": latents}, {"facts": json.dumps(facts)}))
        output.append_log(self.folder, event="encode", file=path.name, seconds=seconds)


def open_cache(root, split, settings, model, log):
    """The LatentCache; None without --latent_cache, and for a few chosen images of each class."""
    if root and settings["kmeans"] != "none":
        return LatentCache(root, split, settings, model.facts, log)
