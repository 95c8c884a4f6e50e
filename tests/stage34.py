"""Small real inputs for the tests of stages 3 and 4: three classes of the digits, a few images, one short teacher."""

import shutil

from distillation.datasets import open_split, squash
from scripts.files import MANIFEST, content_digest, output_folder, read_json, sha256, write_json, write_manifest
from scripts.runtime import this_process

CLASSES = ["0", "1", "2"]
TEACHER = ["--dataset", "digits", "--arch", "convnet_mini", "--classes", "0-2", "--max_images_per_class", "12"]
# 12 images in batches of 5: two whole ones and a short one
PROTOCOL = ["--epochs", "3", "--batch_size", "5", "--flip", "0.5", "--mix_type", "cutmix", "--num_workers", "0"]


def make_images(root, name="digits_ipc4_random", ipc=4, size=32, first=0):
    """A folder as stage 2 leaves it, holding real digits `first`, `first` + 1, ... of each class."""
    split = open_split("digits", None, "train", classes=CLASSES)
    folder, files = root / name, []
    settings = {"dataset": "digits", "ipc": ipc, "first": first}
    with output_folder("--save_init_image_path", folder, settings, this_process("cpu")):
        for class_folder, items in zip(split.folders, split.items):
            (folder / class_folder).mkdir(exist_ok=True)
            for i in range(ipc):
                files.append(f"{class_folder}/{class_folder}_{i:04d}.png")
                squash(split.read(items[first + i]), size).save(folder / files[-1])
        classes = [
            {"index": c, "folder": f, "prompt": p} for c, f, p in zip(split.class_ids, split.folders, split.prompts)
        ]
        facts = {"dataset": "digits", "arm": "random", "ipc": ipc, "image_size": size, "count": len(files)}
        write_manifest(folder, "images", settings, files, {**facts, "classes": classes})
    return folder


def make_teacher(root, seed=0):
    from matching import train_teacher

    flags = ["--epochs", "1", "--seed", str(seed), "--num_workers", "0", "--output_dir", str(root)]
    return train_teacher.main([*TEACHER, *flags])


def redo_manifest(folder, **changes):
    """Make a changed folder consistent in itself again, as a stage that made it so would have."""
    manifest = read_json(folder / MANIFEST)
    names = [name for name in manifest["files"] if (folder / name).is_file()]
    names += [str(p.relative_to(folder)) for p in folder.glob("*/*.png") if str(p.relative_to(folder)) not in names]
    manifest["files"] = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in sorted(names)
    }
    manifest["content"] = content_digest(manifest["files"])
    manifest |= changes
    write_json(folder / MANIFEST, manifest)


def copy(folder, root):
    return shutil.copytree(folder, root / folder.name, copy_function=shutil.copy2)
