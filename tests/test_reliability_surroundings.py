"""What else goes wrong around a run: one line for each of the things that no check of ours had foreseen."""

import math
import os
import shutil
import signal
import threading
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from reliability import STAGE_1, STAGE_2, image_folder
from safetensors.torch import load_file, save_file
from stage34 import PROTOCOL, TEACHER, copy, make_images, make_teacher, redo_manifest

from distillation import gen_prototype, gen_syn_image, prototypes, take_classes
from matching import generate_soft_label, soft_labels, stm, train_teacher
from matching.training import Forward
from misc.kill_test import forked
from scripts.files import LOG, MANIFEST, TIMING, log_rows, output_name, read_json, write_json
from scripts.runtime import EXIT_INTERRUPTED, Process, entry_point, join_processes
from validate import train_FKD


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(images, teacher, labels) of three digits; nobody writes into them."""
    root = tmp_path_factory.mktemp("base")
    images, teacher = make_images(root, ipc=2), make_teacher(root)
    argv = ["--data", str(images), "--arch", "convnet_mini", "--teacher_checkpoint", str(teacher), *PROTOCOL]
    return images, teacher, generate_soft_label.main([*argv, "--fkd_path", str(root / "labels")])[0]


LONG = "x" * 300


def of_folder(model):
    return [
        "--dataset",
        "imagefolder",
        "--data_dir",
        "data",
        "--ipc",
        "2",
        "--size",
        "32",
        "--num_workers",
        "0",
        *model,
    ]


# ---- real images and their folders


def a_folder_inside_itself():
    os.symlink(".", "data/train/cat/loop")
    return "data/train/cat/loop", "a folder that it is in"


def a_class_that_is_a_broken_link():
    os.symlink("/gone/dog", "data/train/dog2")
    return "data/train/dog2 is a broken link, to /gone/dog"


def an_image_that_is_a_broken_link():
    os.symlink("/gone.png", "data/train/cat/z.png")
    return "data/train/cat/z.png", "No such file"


def a_name_that_is_not_utf_8():
    os.rename("data/train/cat/0.png", "data/train/cat/caf\udce9.png")
    return "caf\\udce9.png", "not UTF-8"


def a_pipe_among_the_images():
    os.mkfifo("data/train/cat/z.png")
    return "data/train/cat/z.png", "not a file"


@pytest.mark.parametrize(
    "spoil",
    [
        a_folder_inside_itself,
        a_class_that_is_a_broken_link,
        an_image_that_is_a_broken_link,
        a_name_that_is_not_utf_8,
        a_pipe_among_the_images,
    ],
    ids=lambda f: f.__name__,
)
def test_odd_folders_of_images(spoil, model, refused):
    image_folder("data", ["cat", "dog"])
    words = spoil()
    refused(gen_prototype.main, of_folder(model), *([words] if isinstance(words, str) else words))
    assert not Path("output").exists()


def test_a_link_to_a_class_of_someone_elses_images_is_broken(base, refused):
    mine = copy(base[0], Path("."))
    for name in (MANIFEST, "args.json"):
        (mine / name).unlink()
    os.symlink("/gone", mine / "3")
    refused(generate_soft_label.main, ["--data", mine, "--dataset", "digits"], f"{mine / '3'} is a broken link")


@pytest.mark.parametrize("split, flag", [("train", "--data_dir"), ("val", "--val_dir")])
def test_a_teachers_class_without_images(split, flag, refused):
    for root in ("data", "more"):
        image_folder(root, ["cat", "dog"])
    Path("more/train").rename("data/val")
    for path in Path("data", split, "dog").iterdir():
        path.unlink()
    argv = ["--dataset", "imagefolder", "--data_dir", "data", "--arch", "convnet_mini", "--device", "cpu"]
    refused(train_teacher.main, argv, flag, "class dog has no images")


@pytest.mark.parametrize("name", ["test_sha256", "val_sha256"])
def test_other_test_images_are_not_taken_for_those_of_a_finished_run(name, refused):
    """As many, in the same classes: a --val_dir that was repaired."""
    for root in ("data", "more", "other"):
        image_folder(root, ["cat", "dog"])
    Path("more/train").rename("data/val")
    shared = [
        "--dataset",
        "imagefolder",
        "--val_dir",
        "data",
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--epochs",
        "1",
    ]
    main, argv = train_teacher.main, [*shared, "--data_dir", "data", "--arch", "convnet_mini", "--bn_batch", "2"]
    if name == "test_sha256":
        main, argv = train_FKD.main, [*shared, "--train_dir", "data/train", "--model", "convnet_mini", "--hard_label"]
    assert (main(argv) / MANIFEST).exists() and (main(argv) / MANIFEST).exists()
    Image.new("RGB", (24, 24)).save("data/val/cat/0.png")
    refused(main, argv, f"begun with {name}")


def test_a_download_without_internet(monkeypatch, model, refused):
    import torchvision

    def download(self):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    Path("data").mkdir()
    argv = ["--dataset", "cifar10", "--data_dir", "data", "--download", *model]
    refused(gen_prototype.main, argv, "--data_dir data", "no route to host", "cifar-10-batches-py")


GROUND_TRUTH = {
    "a column is missing": ("LOC_val_solution.csv", b"ImageId,Label\na,b\n", "KeyError"),
    "a wnid is missing": ("LOC_val_solution.csv", b"ImageId,PredictionString\na,\n", "IndexError"),
    "not text": ("imagenet_2012_validation_synset_labels.txt", b"\xff\xfe\x00", "UnicodeDecodeError"),
    "not MATLAB's": ("meta.mat", b"half a file", "meta.mat"),
}


@pytest.mark.parametrize("what", GROUND_TRUTH)
def test_damaged_ground_truth_of_a_flat_val_folder(what, base, refused):
    name, content, word = GROUND_TRUTH[what]
    Path("data/val").mkdir(parents=True)
    (Path("data") / name).write_bytes(content)
    Path("data/ILSVRC2012_validation_ground_truth.txt").write_text("1\n")
    argv = ["--dataset", "imagenette", "--data_dir", "data", "--val_dir", "data", "--device", "cpu"]
    image_folder("data", ["n01440764"])
    refused(lambda a: train_FKD.open_test("imagenette", "data", ["n01440764"]), argv, name, "ground truth", word)


# ---- names, numbers, devices


@pytest.mark.parametrize(
    "flag",
    ["--data_dir", "--save_prototype_path", "--latent_cache", "--label_file_path", "--diffusion_checkpoints_path"],
)
def test_a_name_that_is_too_long_for_the_system(flag, model, refused):
    image_folder("data", ["cat", "dog"])
    refused(gen_prototype.main, [*of_folder(model), flag, f"./{LONG}/{LONG}"], LONG)


NUMBERS = [
    (train_FKD, ["--adamw_lr", "0"]),
    (train_FKD, ["--sgd", "--momentum", "1"]),
    (train_FKD, ["--temperature", "1e39"]),  # infinite in float32
    (train_FKD, ["--ce_weight=-1"]),
    (train_FKD, ["--warmup_epochs", "3"]),
    (train_FKD, ["--seeds", str(2**63)]),
    (generate_soft_label, ["--epochs", "1000001"]),
    (generate_soft_label, ["--mixup", "0"]),
    (train_teacher, ["--weight_decay=-1"]),
    (train_teacher, ["--min_scale_crops", "0.9", "--max_scale_crops", "0.1"]),
    (gen_syn_image, ["--num_inference_steps", "1001"]),
    (gen_syn_image, ["--guidance_scale", "0.5"]),  # as good as 1
    (gen_syn_image, ["--negative_prompt", "caf\udce9"]),  # bytes that are not UTF-8
    (stm, ["--lr", "nan"]),
    (stm, ["--jitter=-1"]),
    (gen_prototype, ["--device", "meta"]),
    (gen_prototype, ["--device", "mps"]),
]


@pytest.mark.parametrize("module, flags", NUMBERS, ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_numbers_that_make_no_sense(module, flags, base, made, model, refused, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    images, teacher, labels = base
    argv = {
        train_FKD: ["--train_dir", images, "--fkd_path", labels, "--model", "convnet_mini"],
        generate_soft_label: ["--data", images, "--arch", "convnet_mini", "--teacher_checkpoint", teacher],
        train_teacher: TEACHER,
        stm: ["--image_path", images],
        gen_syn_image: [*STAGE_2, *model, "--prototype_path", made[0]],
        gen_prototype: [*STAGE_1, *model],
    }[module]
    word = "not UTF-8" if "\udce9" in flags[-1] else flags[-2] if flags[-1][0] != "-" else flags[-1].split("=")[0]
    refused(module.main, [*argv, *flags], word)
    assert not Path("output").exists()


def test_a_schedule_of_fewer_steps_than_are_asked_for(made, model, refused):
    other = spoilt_model(
        model, "scheduler/scheduler_config.json", b'"num_train_timesteps": 1000', b'"num_train_timesteps": 1'
    )
    refused(gen_syn_image.main, [*STAGE_2, *other, "--prototype_path", made[0]], "--num_inference_steps 2", "with 1")


def test_every_digit_of_a_seed_is_in_the_folders_name():
    names = {output_name("x", {"seed": seed}, {"seed": 0}) for seed in (1234567, 1234568, 10**6)}
    assert names == {"x_seed1234567", "x_seed1234568", "x_seed1000000"}


def test_a_port_that_is_none():
    """In a process of its own: accelerate remembers half a start."""
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}
    end = forked(lambda: join_processes(Process(0, 2, torch.device("cpu"))), environment=environment)
    assert end.status == 2 and "Traceback" not in end.err and len(end.errors) == 1
    assert "2 processes cannot meet at 127.0.0.1:x" in end.errors[0]


# ---- a Stable Diffusion that is not whole


def spoilt_model(model, name, old, new):
    folder = Path(shutil.copytree(model[1], "other-model"))
    (folder / name).write_bytes((folder / name).read_bytes().replace(old, new))
    return ["--diffusion_checkpoints_path", str(folder), "--device", "cpu"]


@pytest.fixture
def errors_only():
    """What the user wants to read must not matter."""
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
@pytest.mark.parametrize("how", ["lacks a weight", "is cut off", "is empty"])
def test_weights_that_are_not_whole(how, part, made, model, refused, errors_only):
    """transformers and diffusers take what is there, and draw the rest at random, anew at each start."""
    folder = Path(shutil.copytree(model[1], "other-model"))
    [path] = (folder / part).glob("*.safetensors")
    if how == "lacks a weight":
        weights = load_file(path)
        lost = sorted(name for name, value in weights.items() if value.ndim == 2)[0]
        save_file({name: value for name, value in weights.items() if name != lost}, path, {"format": "pt"})
        words = ["weights are missing from it", lost.split(".")[-1]]
    else:
        path.write_bytes(path.read_bytes()[:-50] if how == "is cut off" else b"")
        words = ["cannot be loaded"]
    flags = ["--diffusion_checkpoints_path", folder, "--device", "cpu", "--prototype_path", made[0]]
    refused(gen_syn_image.main, [*STAGE_2, *flags], "--diffusion_checkpoints_path", *words)


def test_a_tokenizer_that_is_gone(made, model, refused):
    """transformers makes one of a few words up."""
    folder = Path(shutil.copytree(model[1], "other-model"))
    for path in (folder / "tokenizer").glob("*"):
        if path.name != "tokenizer_config.json":
            path.unlink()
    flags = ["--diffusion_checkpoints_path", folder, "--device", "cpu", "--prototype_path", made[0]]
    refused(gen_syn_image.main, [*STAGE_2, *flags], "its tokenizer has", "words, its text_encoder 190")


CONFIGS = [
    ("vae/config.json", "scaling_factor", "0"),  # all prototypes would be zero
    ("vae/config.json", "scaling_factor", '"x"'),
    ("vae/config.json", "norm_num_groups", "0"),
    ("unet/config.json", "attention_head_dim", "0"),
    ("text_encoder/config.json", "hidden_size", "7"),
    ("scheduler/scheduler_config.json", "num_train_timesteps", "0"),
]


@pytest.mark.parametrize("file, key, value", CONFIGS)
def test_numbers_in_a_models_configuration(file, key, value, made, model, refused):
    now = read_json(Path(model[1]) / file)[key]
    other = spoilt_model(model, file, f'"{key}": {now}'.encode(), f'"{key}": {value}'.encode())
    refused(gen_syn_image.main, [*STAGE_2, *other, "--prototype_path", made[0]], "--diffusion_checkpoints_path")


# ---- numbers that are none, in training


@pytest.mark.parametrize("value", [math.nan, 1e30], ids=["NaN", "beyond fp16"])
def test_logits_that_are_not_finite_are_not_stored(value, base, refused):
    images, teacher, _ = base
    spoilt = copy(teacher, Path("."))
    weights = load_file(spoilt / "model.safetensors")
    save_file({name: torch.full_like(w, value) if "bias" in name else w for name, w in weights.items()},
              spoilt / "model.safetensors")  # fmt: skip
    redo_manifest(spoilt)
    argv = ["--data", images, "--arch", "convnet_mini", "--teacher_checkpoint", spoilt, *PROTOCOL]
    refused(generate_soft_label.main, argv, "logits of epoch 0 are NaN or infinite")
    assert not list(Path("output").rglob("epoch_*"))


def student(base, *more):
    images, _, labels = base
    argv = ["--train_dir", images, "--fkd_path", labels, "--model", "convnet_mini", "--num_workers", "0"]
    return [str(a) for a in [*argv, "--device", "cpu", "--checkpoint_every", "1", "--eval_every", "1", *more]]


def test_a_loss_that_is_no_number_ends_the_training(base, refused):
    refused(train_FKD.main, student(base, "--adamw_lr", "1e30"), "the loss is nan; lower --adamw_lr")
    teacher = [*TEACHER, "--epochs", "3", "--num_workers", "0", "--learning_rate", "1e30"]
    refused(train_teacher.main, teacher, "the loss is nan; lower --learning_rate")


# ---- files of a run that is not finished, edited by hand


def stopped(base):
    """The folder of a student after two of its three epochs."""

    def two_epochs(argv):
        original, calls = train_FKD.train_epoch, []

        def train_epoch(*args):
            calls.append(args)
            if len(calls) > 2:
                os._exit(9)
            return original(*args)

        train_FKD.train_epoch = train_epoch
        train_FKD.main(argv)

    assert forked(two_epochs, student(base)).status == 9
    [folder] = Path("output/students").iterdir()
    return folder


CHECKPOINTS = {
    "no optimiser": {"optimizer": None},
    "an optimiser of nothing": {"optimizer": {}},
    "another network": {"model": {"w": torch.zeros(2)}},
    "an epoch that is text": {"epoch": "2"},
    "an epoch after the last": {"epoch": 99},
    "fewer rows than epochs": {"rows": []},
    "rows that are none": {"rows": [1, 2]},
    "NaN weights": None,
}


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_checkpoints_that_are_not_this_runs(what, base, refused):
    path = stopped(base) / "checkpoint_seed0.pt"
    state = torch.load(path, weights_only=True)
    changes = CHECKPOINTS[what] or {"model": {k: v * math.nan for k, v in state["model"].items()}}
    torch.save({k: v for k, v in {**state, **changes}.items() if v is not None}, path)
    refused(train_FKD.main, student(base), "the loss is nan" if what == "NaN weights" else "remove it to begin anew")


def test_a_seeds_rows_that_no_run_wrote(base, refused):
    folder = train_FKD.main(student(base))
    (folder / MANIFEST).unlink()
    rows = (folder / "seed0.json").read_text()
    for edited, word in (("{}", "3 epochs"), (rows.replace('"top5"', '"top9"'), "top5"), ('{"rows": [1, 2, 3]}', "3")):
        (folder / "seed0.json").write_text(edited)
        refused(train_FKD.main, student(base), "seed0.json", word)


OTHERS = {  # {stage: (file to take from another run, flags of that run)}
    "prototypes": ("0001_1.json", ["--seed", "1"]),
    "images": ("1/1_0000.png", ["--guidance_scale", "4"]),
    "labels": ("epoch_0001.safetensors", ["--fkd_seed", "7"]),
    "weights": ("student_seed0.safetensors", ["--adamw_lr", "0.5"]),
    "rows": ("seed0.json", ["--adamw_lr", "0.5"]),
}


def again(stage, base, made, model):
    """(main, flags) of a stage, as `base` and `made` were made."""
    images, teacher, _ = base
    label = ["--data", str(images), "--arch", "convnet_mini", "--teacher_checkpoint", str(teacher), *PROTOCOL]
    return {
        "prototypes": (gen_prototype.main, [*STAGE_1, *model]),
        "images": (gen_syn_image.main, [*STAGE_2, *model, "--prototype_path", str(made[0])]),
        "labels": (generate_soft_label.main, [*label, "--device", "cpu"]),
    }.get(stage, (train_FKD.main, student(base)))


def the_folder(made):
    return made[0] if isinstance(made, list) else made


@pytest.mark.parametrize("stage", OTHERS)
def test_a_unit_of_another_run_is_not_adopted(stage, base, made, model, refused):
    """In a folder that is not finished; without it the run goes on to the bytes that it had."""
    (name, flags), (main, argv) = OTHERS[stage], again(stage, base, made, model)
    folder, other = the_folder(main(argv)), the_folder(main([*argv, *flags]))
    before = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).unlink()
    shutil.copy(other / name, folder / name)
    for _ in range(2):  # nor by the rerun
        refused(main, argv, name, "remove")
        assert not (folder / MANIFEST).exists()
    (folder / name).unlink()
    main(argv)
    assert (folder / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("stage", ["prototypes", "images", "labels"])
def test_an_empty_unit_is_not_adopted(stage, base, made, model, refused):
    name, (main, argv) = OTHERS[stage][0], again(stage, base, made, model)
    folder = the_folder(main(argv))
    (folder / MANIFEST).unlink()
    (folder / name).write_bytes(b"")
    refused(main, argv, name)
    assert not (folder / MANIFEST).exists()


@pytest.mark.parametrize("stage", ["student", "teacher"])
def test_a_checkpoint_of_another_run_is_not_adopted(stage, base, refused):
    main, argv, flag = train_FKD.main, student(base), "--adamw_lr"
    if stage == "teacher":
        main, flag = train_teacher.main, "--learning_rate"
        argv = [*TEACHER, "--epochs", "3", "--num_workers", "0", "--device", "cpu", "--checkpoint_every", "1"]
    module = train_FKD if stage == "student" else train_teacher

    def first_epoch(argv):
        original = module.save_checkpoint
        module.save_checkpoint = lambda *args: (original(*args), os._exit(9))
        main(argv)

    for root, rate in (("one", "0.001"), ("other", "0.5")):
        assert forked(first_epoch, [*argv, "--output_dir", root, flag, rate]).status == 9
    [mine], [other] = (list(Path(root).glob("*/checkpoint_seed0.pt")) for root in ("one", "other"))
    shutil.copy(other, mine)
    refused(main, [*argv, "--output_dir", "one", flag, "0.001"], mine, "not made with the settings", "remove it")


@pytest.mark.parametrize("text", ["[1]", '{"file_name": "other.png"}', "no JSON"])
def test_facts_in_a_picture_that_no_run_wrote(text, made, model, refused):
    main, argv = again("images", (None, None, None), made, model)
    [folder] = main(argv)
    (folder / MANIFEST).unlink()
    with Image.open(folder / "1/1_0000.png") as image:
        image.load()
        facts = PngInfo()
        facts.add_itxt("d4m", text)
        image.save(folder / "1/1_0000.png", pnginfo=facts)
    refused(main, argv, "1/1_0000.png", "remove it")


@pytest.mark.parametrize("name", ["images.jsonl", "README.md"])
def test_what_a_finished_image_folder_lost_is_written_again(name, made, model):
    main, argv = again("images", (None, None, None), made, model)
    [folder] = main(argv)
    before = (folder / name).read_bytes(), (folder / MANIFEST).read_bytes()
    (folder / name).unlink()
    main(argv)
    assert ((folder / name).read_bytes(), (folder / MANIFEST).read_bytes()) == before


@pytest.mark.parametrize("training", ["student", "teacher"])
def test_a_training_killed_just_after_its_manifest_gets_its_timing(training, base):
    main, argv = train_FKD.main, student(base)
    if training == "teacher":
        main, argv = train_teacher.main, [*TEACHER, "--epochs", "1", "--num_workers", "0", "--device", "cpu"]
    folder = main(argv)
    before = read_json(folder / TIMING)
    (folder / TIMING).unlink()
    main(argv)
    assert read_json(folder / TIMING) == before and before["units"] > 0


def test_rows_without_their_weights_are_not_a_finished_seed(base):
    folder = train_FKD.main(student(base))
    before = (folder / MANIFEST).read_bytes()
    for name in (MANIFEST, "student_seed0.safetensors"):
        (folder / name).unlink()
    assert (train_FKD.main(student(base)) / MANIFEST).read_bytes() == before


def test_a_log_of_anything_does_not_stop_a_run(made, model):
    folder = Path(shutil.copytree(made[0], f"output/{made[0].name}"))
    for name in (MANIFEST, TIMING):
        (folder / name).unlink()
    (folder / LOG).write_bytes(
        b'5\n{"event": "run", "rank": []}\n\xff\n{"event": "run", "rank": 0, "units": 1, "seconds": 2}\n{"h\n'
    )
    gen_prototype.main([*STAGE_1, *model, "--save_prototype_path", "output"])
    assert read_json(folder / TIMING)["units"] == 1 and len(log_rows(folder)) == 3
    (folder / MANIFEST).unlink()
    (folder / LOG).unlink()
    (folder / LOG).mkdir()
    gen_prototype.main([*STAGE_1, *model, "--save_prototype_path", "output"])
    assert (folder / MANIFEST).exists()


def test_folders_where_locks_and_units_should_be(made, model, refused):
    folder = Path(shutil.copytree(made[0], f"output/{made[0].name}"))
    for name in (".lock-1-of-3", ".unit.host.1.tmp"):
        (folder / name).mkdir()
    gen_prototype.main([*STAGE_1, *model, "--save_prototype_path", "output"])
    (folder / ".lock").mkdir()
    refused(gen_prototype.main, [*STAGE_1, *model, "--save_prototype_path", "output"], "Is a directory")
    images = Path(shutil.copytree(made[1], f"output/{made[1].name}"))
    (images / MANIFEST).unlink()
    shutil.rmtree(images / "0")
    (images / "0").write_text("a file where a class folder should be")
    argv = [*STAGE_2, *model, "--prototype_path", made[0], "--save_init_image_path", "output"]
    refused(gen_syn_image.main, argv, f"{images}/0", "File exists")


@pytest.mark.parametrize(
    "name, value",
    [
        ("ipc", None),
        ("ipc", 3),
        ("classes", [{}]),
        ("arm", "../x"),
        ("image_size", 0),
        ("arguments", {"source_arguments": {"prototype_arguments": 1}}),
    ],
)
def test_a_manifest_of_images_whose_classes_are_taken(name, value, made, refused):
    mine = Path(shutil.copytree(made[1], "images"))
    changed = {**read_json(mine / MANIFEST), name: value}
    write_json(mine / MANIFEST, {key: entry for key, entry in changed.items() if entry is not None})
    refused(take_classes.main, ["--image_path", mine, "--dataset", "imagefolder"], "images: its manifest", name[-3:])
    assert not Path("output").exists()


def test_labels_of_a_billion_epochs(base, refused):
    images, _, labels = base
    mine = copy(labels, Path("."))
    for file in (MANIFEST, "args.json"):
        (mine / file).write_text((mine / file).read_text().replace('"epochs": 3', f'"epochs": {10**9}'))
    refused(train_FKD.main, student((images, None, mine)), "3 files for 1000000000 epochs")


def test_the_releases_file_is_not_written_over_a_folder(made, refused):
    refused(prototypes.main, [made[0], "."], "is a folder")


# ---- what vanishes, dies, or is interrupted meanwhile


def test_an_image_that_vanishes_between_listing_and_reading(base, refused, monkeypatch):
    images, teacher, _ = base
    mine, original = copy(images, Path(".")), soft_labels.load_pixels

    def load_pixels(*args):
        (mine / "1/1_0001.png").unlink()
        return original(*args)

    monkeypatch.setattr(generate_soft_label, "load_pixels", load_pixels)
    argv = ["--data", mine, "--arch", "convnet_mini", "--teacher_checkpoint", teacher, *PROTOCOL]
    refused(generate_soft_label.main, argv, "1/1_0001.png: No such file")


def test_labels_that_vanish_during_training(base, refused, monkeypatch):
    images, _, labels = base
    mine, original = copy(labels, Path(".")), train_FKD.train_epoch

    def train_epoch(*args):
        (mine / "epoch_0001.safetensors").unlink(missing_ok=True)
        return original(*args)

    monkeypatch.setattr(train_FKD, "train_epoch", train_epoch)
    refused(train_FKD.main, student((images, None, mine)), "epoch_0001.safetensors: No such file")


def test_a_reading_process_that_dies_is_one_line(base):
    """As the kernel does when memory runs out."""

    def killing(argv):
        parent, original = os.getpid(), soft_labels.crop_on_cpu

        def crop(*args):
            if os.getpid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        soft_labels.crop_on_cpu = crop
        train_FKD.main(argv)

    end = forked(killing, student(base, "--num_workers", "1"))
    assert end.status == 2 and "Traceback" not in end.err
    assert end.errors == [
        "error: a reading process died, most likely for want of memory; --num_workers 0 reads in this one"
    ]


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_a_machine_without_memory_for_it_is_one_line(library, base, refused, monkeypatch):
    """The real exceptions, of an exabyte."""

    def load_pixels(*args):
        return torch.empty(2**60, dtype=torch.uint8) if library == "torch" else np.empty(2**60, np.uint8)

    monkeypatch.setattr(train_FKD, "load_pixels", load_pixels)
    refused(train_FKD.main, student(base), "out of memory", "allocate")


def test_a_gpu_without_memory_for_the_weights_is_one_line(base, refused, monkeypatch):
    def place(self, model):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    monkeypatch.setattr(Forward, "place", place)
    argv = ["--evaluate", base[1] / "model.safetensors", "--train_dir", base[0], "--model", "convnet_mini"]
    refused(train_FKD.main, argv, "out of GPU memory: CUDA out of memory")


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(base):
    def interrupted(argv):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores Ctrl-C
        original = train_FKD.train_epoch

        def train_epoch(job, run, *args):
            if run.epoch == 1:
                threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
                time.sleep(10)
            return original(job, run, *args)

        train_FKD.train_epoch = train_epoch
        train_FKD.main(argv)

    straight = train_FKD.main(student(base, "--output_dir", "straight"))
    end = forked(interrupted, student(base))
    assert end.status == EXIT_INTERRUPTED and "Traceback" not in end.err
    assert end.err.count("interrupted; run the same command to go on") == 1
    again = train_FKD.main(student(base))
    assert (again / MANIFEST).read_bytes() == (straight / MANIFEST).read_bytes()


def test_what_is_no_trouble_with_files_keeps_its_traceback():
    """A mistake of ours is not dressed up as one of the user's."""

    for error in (RuntimeError("shapes"), KeyError("x"), BrokenPipeError(32, "Broken pipe")):

        def main(argv, error=error):
            raise error

        with pytest.raises(type(error)):
            entry_point(main)([])


def test_a_broken_link_is_an_image_that_can_be_skipped(model, capsys):
    image_folder("data", ["cat"])
    os.symlink("/gone", "data/train/cat/zz.png")
    folder = gen_prototype.main([*of_folder(model), "--km_expand", "1", "--on_bad_image", "skip"])
    assert (folder / MANIFEST).exists() and "zz.png" in next(folder.glob("0000_*.json")).read_text()
