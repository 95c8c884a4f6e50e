"""An image folder in the forms of other tools, read back as those tools do."""

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from distillation import datasets, prototype_files
from matching import batches, models
from misc import export
from scripts import files
from tests.conftest import copy, picture, picture_folder, reseal, tree
from tests.test_import_labels import COUNT, imported, write_labels

SEED = 2**63 + 5


def exported(folder, form, *flags):
    argv = [folder, "--to", form, "--num_workers", "0", "--device", "cpu", *flags]
    return export.main(list(map(str, argv)))


@pytest.fixture
def ours(images, tmp_path):
    """Stage 2's images; the first has a seed that no int64 holds, the last none."""
    folder = copy(images, tmp_path)
    path = folder / "images.jsonl"
    rows = list(map(json.loads, path.read_text().splitlines()))
    rows[0]["seed"], rows[-1]["seed"] = SEED, None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reseal(folder)
    entries = files.read_json(folder / "manifest.json")["files"]
    entries["images.jsonl"] |= {"size": path.stat().st_size, "sha256": files.sha256(path)}
    reseal(folder, files=entries)
    return folder


@pytest.fixture
def foreign(tmp_path):
    """Somebody's ImageFolder: class names with dots, JPEG in capitals."""
    root = picture_folder(tmp_path / "theirs", ["a.b", "c d"]) / "train"
    Image.open(root / "a.b/0.png").save(root / "a.b/9.JPG")
    return root


# ---- Hugging Face


def loaded(folder, tmp_path):
    library = pytest.importorskip("datasets")
    return library.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]


def test_datasets_loads_pixels_names_prompts_and_seeds(ours, tmp_path):
    pytest.importorskip("datasets")
    found = loaded(exported(ours, "hf"), tmp_path)
    assert found.features["label"].names == ["0", "1", "2"]
    rows = list(map(json.loads, (ours / "images.jsonl").read_text().splitlines()))
    assert len(found) == len(rows) and found[0]["seed"] == SEED and found[-1]["seed"] is None
    for row, theirs in zip(rows, found):
        assert theirs["image"].tobytes() == Image.open(ours / row["file_name"]).tobytes()
        assert [theirs[n] for n in ("seed", "prompt", "cluster_size")] == [
            row[n] for n in ("seed", "prompt", "cluster_size")
        ]
        assert found.features["label"].int2str(theirs["label"]) == row["folder"]


def test_datasets_loads_a_foreign_folder_in_several_files(foreign, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr(export, "SHARD_BYTES", 1)
    folder = exported(foreign, "hf", "--license", "cc0-1.0")
    assert len(list(folder.glob("data/*.parquet"))) == 7
    found = loaded(folder, tmp_path)
    names = [found.features["label"].int2str(row["label"]) for row in found]
    assert names == ["a.b"] * 4 + ["c d"] * 3 and set(found["prompt"]) == {None}
    card = (folder / "README.md").read_text()
    assert "license: cc0-1.0\n" in card and "| c d |" in card


def test_the_card_names_the_model(ours):
    pytest.importorskip("pyarrow")
    card = (exported(ours, "hf") / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "other" and head["configs"][0]["data_files"][0]["split"] == "train"
    name = files.read_json(ours / "manifest.json")["inputs"]["generator"]["model"]
    assert f"base model: {name}, revision not recorded" in card and "| 2 | two |" in card


def test_push_is_one_upload_of_what_datasets_reads(foreign, monkeypatch, refused):
    pytest.importorskip("pyarrow")
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **how: calls.append(how))
    for _ in range(2):  # where all is there, nothing is sent either
        exported(foreign, "hf", "--push", "me/it", "--dry_run")
        folder = exported(foreign, "hf")
    exported(foreign, "hf", "--push", "me/it")
    [how] = calls
    assert (how["repo_id"], how["repo_type"], how["folder_path"]) == ("me/it", "dataset", folder)
    assert "log.jsonl" not in how["allow_patterns"]
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **_: 1 / 0)
    argv = [foreign, "--to", "hf", "--push", "me/it"]
    refused(export.main, argv, "--push me/it: division by zero", "hf auth login")


# ---- WebDataset


def test_tar_files_are_what_webdataset_takes_and_equal_in_every_run(foreign, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 4000)
    folder = exported(foreign, "webdataset")
    again = exported(foreign, "webdataset", "--export_path", "again")
    assert tree(folder) == tree(again)
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as file:
            members = {member.name: file.extractfile(member).read() for member in file}
        for key in dict.fromkeys(name.split(".")[0] for name in members):  # webdataset's rule
            mine = {name.partition(".")[2]: members[name] for name in members if key in name}
            about = json.loads(mine.pop("json"))
            assert int(mine.pop("cls")) == ["a.b", "c d"].index(about["folder"])
            [(kind, data)] = mine.items()
            assert data == (foreign / about["file_name"]).read_bytes() and kind in ("png", "jpg")
            found.append(about["folder"])
    assert len(found) == 7 and found[:4] == ["a.b", "c d"] * 2  # classes are mixed


# ---- the release


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """130 images of 100 folders, whose order as text is that of their numbers."""
    root = tmp_path_factory.mktemp("images") / "theirs"
    for n in range(COUNT):
        path = root / f"{n % 100:02d}" / f"{n // 100}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(n, (40, 32))).save(path)
    return root


@pytest.mark.parametrize("mix_type, epochs", [("cutmix", 2), ("mixup", 1)])
def test_batches_say_what_the_releases_own_said(numbered, mix_type, epochs, tmp_path, capsys):
    source = write_labels(tmp_path / "labels", numbered, mix_type, epochs)
    labels = imported(numbered, source)
    flags = ["--dataset", "cifar100", "--fkd_path", labels]
    folder = exported(numbered, "release", *flags)
    written = sorted(path.relative_to(source) for path in source.glob("*/*"))
    assert written == sorted(path.relative_to(folder / "fkd") for path in folder.glob("fkd/*/*"))
    for name in written:
        theirs = torch.load(source / name, weights_only=False)
        mine = torch.load(folder / "fkd" / name, weights_only=True)
        lam, box, *tensors = theirs[3], theirs[4], *(theirs[n] for n in (0, 1, 2, 5))
        assert [type(part) for part in mine[:3]] == [type(part) for part in theirs[:3]]
        for one, two in zip(tensors, (mine[n] for n in (0, 1, 2, 5))):
            assert one is two or (one.dtype == two.dtype and torch.equal(one, two))
        assert mine[4] == (box and list(map(int, box)))
        assert mix_type == "cutmix" or mine[3] == lam  # CutMix's is not known any more
    again = imported(folder / "images", folder / "fkd", "--fkd_path", "again")
    assert "name the class" not in capsys.readouterr().err
    for path in labels.glob("*.safetensors"):
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_labels_in_another_order_are_refused(random, labels, numbered, tmp_path, refused):
    argv = [random, "--to", "release", "--fkd_path", labels]
    refused(export.main, argv, f"--fkd_path {labels}", "order of the release's sampler")
    theirs = shutil.copytree(numbered, tmp_path / "theirs")
    for n in range(10):  # 0, 1, 10, 11 ... as text
        (theirs / f"{n:02d}").rename(theirs / str(n))
    source = imported(theirs, write_labels(tmp_path / "labels", theirs, "none"))
    argv = [theirs, "--to", "release", "--dataset", "cifar100", "--fkd_path", source]
    refused(export.main, argv, "order of the release's sampler")


def test_prototypes_are_the_releases_json_and_of_these_images(images, prototypes, refused):
    flags = ["--to", "release", "--prototype_path", prototypes]
    refused(export.main, [images, *flags], "the release's form needs each")  # 3 of 10 classes
    folder = exported(images, "release", "--export_path", "other")
    pairs = {"0/0-image0000": "0/0_0000", "2/2-image0001": "2/2_0001"}
    for theirs, mine in pairs.items():
        data = (folder / "images" / f"{theirs}.png").read_bytes()
        assert data == (images / f"{mine}.png").read_bytes()
    other = copy(images, Path("copies").resolve())
    reseal(other, inputs={**files.read_json(other / "manifest.json")["inputs"], "prototypes": "x"})
    refused(export.main, [other, *flags], f"--prototype_path {prototypes}", "other prototypes")


def test_the_whole_json_opens_as_the_releases_file(model, tmp_path, monkeypatch):
    from distillation import gen_prototype, gen_syn_image

    root = picture_folder(tmp_path / "data", ["cat", "dog"])
    common = ["--dataset", "imagefolder", *model, "--ipc", "1", "--km_expand", "2", "--num_workers"]
    argv = [*common, "0", "--data_dir", str(root), "--size", "32"]
    source = Path(gen_prototype.main(argv))
    argv = [*common, "0", "--prototype_path", str(source), "--image_size", "32"]
    [images] = gen_syn_image.main([*argv, "--num_inference_steps", "2"])
    folder = exported(images, "release", "--prototype_path", source)
    found = prototype_files.ReleaseFile(folder / f"{source.name}.json", "imagefolder")
    assert [c["prompt"] for c in found.classes] == ["cat", "dog"]
    for position, mine in enumerate(
        map(prototype_files.PrototypeFolder(source).__getitem__, (0, 1))
    ):
        assert (found[position].latents == mine.latents).all()


# ---- DD-Ranking


def blocks(width, norm):
    """The layers of DD-Ranking's ConvNet-3."""
    for n in range(3):
        yield from (nn.Conv2d(width if n else 3, width, 3, padding=1), norm(), nn.ReLU())
        yield nn.AvgPool2d(2)


@pytest.fixture
def cifar(tmp_path):
    """One image of each class of CIFAR-10, foreign."""
    return picture_folder(tmp_path / "ten", datasets.known_prompts("cifar10"), 1) / "train"


@pytest.mark.parametrize("arch, dataset", [("convnet_w128", "cifar10"), ("convnet_bn", "cifar100")])
def test_a_teacher_gives_its_logits_in_ddrankings_network(arch, dataset):
    facts, count = datasets.ALL[dataset], len(datasets.known_prompts(dataset))
    torch.manual_seed(0)
    ours = models.create_model(arch, count, 32).eval()
    norm = {"convnet_bn": lambda: nn.BatchNorm2d(128)}.get(arch, lambda: nn.GroupNorm(128, 128))
    theirs = nn.Module()
    theirs.features = nn.Sequential(*blocks(128, norm))
    theirs.classifier = nn.Linear(128 * 16, count)
    colours = (facts.mean, facts.std), export.CIFAR_COLOURS
    data = export.weights(ours, *colours)
    theirs.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    pixels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    mine, x = (batches.normalise(pixels, *pair) for pair in colours)
    with torch.no_grad():
        found = theirs.eval().classifier(theirs.features(x).flatten(1))
        expected, wrong = ours(mine), ours(x)
    worst = (found - expected).abs().max()
    assert worst < (1e-5 if dataset == "cifar10" else 0.2 * (wrong - expected).abs().max())


def test_ddrankings_folder_is_complete(cifar):
    state = models.create_model("convnet_w128", 10, 32).state_dict()
    torch.save(state, "teacher.pth")
    folder = exported(cifar, "ddranking", "--teacher_checkpoint", "teacher.pth")
    config = yaml.safe_load((folder / "ddranking.yaml").read_text())
    [network], path = config["teacher_model_names"], folder / config["teacher_dir"]
    assert (path / config["dataset"] / network / "ckpt_best.pt").is_file()  # as it looks for it
    assert (config["ipc"], config["model_name"], config["soft_label_mode"]) == (1, "ConvNet-3", "M")
    assert len(list(folder.glob("images/0000[0-9]/00000.png"))) == 10


def test_what_no_form_takes_is_one_line(cifar, random, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    refused(export.main, [cifar, "--to", "hf"], "pip install pyarrow")
    judged = ["--to", "ddranking"]
    refused(export.main, [random, *judged], "one number of images for every class of cifar10")
    refused(export.main, [cifar, *judged, "--arch", "vgg11"], "--arch vgg11")
    refused(export.main, [cifar, "--to", "hf", "--fkd_path", "x"], "--fkd_path: only with")
    folder = exported(cifar, "webdataset")
    path = next(cifar.glob("*/*.png"))
    shutil.copy(next(random.glob("*/*.png")), path)
    refused(export.main, [cifar, "--to", "webdataset"], folder, "begun with images")
    mine = copy(random, Path("copies").resolve())
    path = next(mine.glob("*/*.png"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    refused(export.main, [mine, "--to", "webdataset"], path.name, "changed since it was made")
    assert not list(Path("output/exports").glob("digits*/*.tar"))
