"""Draw, store, replay: the same pixels every time, torchvision's and Pillow's bytes, for any number of processes."""

import os
import signal
import threading

import numpy as np
import pytest
import torch
from conftest import tree
from PIL import Image
from safetensors.torch import load_file, save
from stage34 import CLASSES, PROTOCOL, copy, make_images, make_teacher

from distillation.datasets import DATASETS, known_prompts
from matching import generate_soft_label, soft_labels
from matching.soft_labels import (
    Batch,
    EpochLabels,
    Feed,
    LabelError,
    crop_on_cpu,
    draw_batch,
    draw_crops,
    epoch_batches,
    load_pixels,
    mix,
    normalise,
    open_images,
    protocol_of,
    resized_crop_batch,
    rows_needed,
    write_epoch,
)
from scripts.files import read_json, sha256
from scripts.runtime import generator


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teachers"))


def label(images, teacher, root, *more):
    flags = ["--arch", "convnet_mini", "--teacher_checkpoint", str(teacher), "--fkd_path", str(root)]
    return generate_soft_label.main(["--data", str(images), *flags, *PROTOCOL, *more])[0]


def photos(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def protocol(**changes):
    return protocol_of({"batch_size": 8, "mix_type": "cutmix", **changes}, 32)


def test_an_epoch_is_written_while_the_next_is_labelled(images, teacher, tmp_path, monkeypatch):
    labelling, waited = [threading.Event() for _ in range(3)], []
    label_epoch, write = generate_soft_label.label_epoch, generate_soft_label.write_epoch
    begun = iter(labelling)

    def noted(*args):
        next(begun).set()
        return label_epoch(*args)

    def slow(folder, epoch, *what):
        waited.append(epoch + 1 < len(labelling) and labelling[epoch + 1].wait(20))
        write(folder, epoch, *what)

    monkeypatch.setattr(generate_soft_label, "label_epoch", noted)
    monkeypatch.setattr(generate_soft_label, "write_epoch", slow)
    folder = label(images, teacher, tmp_path, "--epochs", "3")
    assert waited == [True, True, False] and len(list(folder.glob("epoch_*.safetensors"))) == 3


# ---- draws


def test_crops_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    n, size, scale = 4000, 64, (0.08, 1.0)
    ours = draw_crops(torch.full((n, 2), size), scale, generator(0)).double()
    image = Image.new("RGB", (size, size))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)]).double()
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all() and ours[:, 2:].min() >= 1
    for of in (lambda c: c[:, 2] * c[:, 3] / size**2, lambda c: (c[:, 3] / c[:, 2]).log(), lambda c: c[:, 0]):
        a, b = of(ours).sort().values, of(theirs).sort().values
        assert (a.mean() - b.mean()).abs() < 4 * (a.var() / n + b.var() / n).sqrt()  # mean, and every tenth quantile
        assert (a[:: n // 10] - b[:: n // 10]).abs().max() < 0.1 * b.std() + 1


def test_crops_of_odd_images_fall_back_to_the_centre():
    crops = draw_crops(torch.tensor([[10, 100], [100, 10], [50, 50]]), (0.99, 1.0), generator(1)).tolist()
    assert crops[0] == [0, 43, 10, 13] and crops[1] == [43, 0, 13, 10]
    assert crops[2][2] >= 48


def test_draws_depend_on_their_key_alone():
    index, sizes = torch.arange(8), torch.full((8, 2), 32)

    def draw(seed, epoch, number):
        return draw_batch(seed, epoch, number, index, sizes, 32, protocol())

    first = draw(42, 3, 1)
    torch.rand(7)  # the global generator is not used
    for a, b in zip(first, draw(42, 3, 1)):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    for other in (draw(43, 3, 1), draw(42, 4, 1), draw(42, 3, 2)):
        assert not torch.equal(first.crop, other.crop) and not torch.equal(first.box, other.box)
    orders = [torch.cat(epoch_batches(42, epoch, 20, 6)) for epoch in (0, 1)]
    assert all(order.sort().values.tolist() == list(range(20)) for order in orders) and not torch.equal(*orders)
    assert [len(b) for b in epoch_batches(42, 0, 20, 6)] == [6, 6, 6, 2]


def test_lambda_is_beta_and_the_boxs_real_area():
    index, sizes = torch.arange(2), torch.full((2, 2), 32)
    mixup = [draw_batch(0, 0, n, index, sizes, 32, protocol(mix_type="mixup")).lam for n in range(2000)]
    a = 0.8
    assert abs(np.mean(mixup) - 0.5) < 0.03 and abs(np.var(mixup) - 1 / (4 * (2 * a + 1))) < 0.01
    for n in range(200):
        batch = draw_batch(0, 1, n, index, sizes, 32, protocol())
        top, left, bottom, right = batch.box.tolist()
        assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 32
        assert batch.lam == 1 - (bottom - top) * (right - left) / 1024
    plain = draw_batch(0, 0, 0, index, sizes, 32, protocol(mix_type="none"))
    assert plain.lam == 1 and plain.partner.tolist() == [0, 1]


# ---- pixels


@pytest.mark.parametrize("size", [224, 64, 32])
def test_replayed_bytes_are_torchvisions(size):
    from torchvision.transforms import InterpolationMode, Normalize
    from torchvision.transforms import functional as F

    arrays = list(photos(3, size))
    index = torch.arange(24) % 3
    crops = draw_crops(torch.full((24, 2), size), (0.08, 1.0), generator(5))
    flips = torch.arange(24) % 2 == 0
    ours = crop_on_cpu(arrays, index, crops, flips, size)
    mean, std = DATASETS["imagenet"].mean, DATASETS["imagenet"].std
    x = normalise(ours, mean, std)
    for k in range(24):
        theirs = F.resized_crop(
            Image.fromarray(arrays[index[k]]), *crops[k].tolist(), [size, size], InterpolationMode.BILINEAR
        )
        theirs = F.hflip(theirs) if flips[k] else theirs
        assert np.array_equal(ours[k].numpy(), np.asarray(theirs))
        assert torch.equal(x[k], Normalize(mean, std)(F.to_tensor(theirs)))


@pytest.mark.parametrize(
    "saved, size, count",
    [(224, 224, 150), (64, 64, 300), (32, 32, 400), (224, 64, 100), (64, 224, 30), (100, 32, 150), (33, 47, 150)],
)
def test_batched_integer_crop_has_pillows_bytes(saved, size, count):
    """1,280 random crops altogether, enlarged and shrunk: 0 bytes differ."""
    images = photos(8, saved, seed=size)
    index = torch.arange(count) % 8
    crops = draw_crops(torch.full((count, 2), saved), (0.02, 1.0), generator(saved, size))
    flips = torch.rand(count, generator=generator(9)) < 0.5
    expected = crop_on_cpu(list(images), index, crops, flips, size)
    found = resized_crop_batch(torch.from_numpy(images)[index], crops, flips, size)
    assert int((found != expected).sum()) == 0


def test_batched_integer_crop_of_any_box():
    images, boxes = torch.from_numpy(photos(1, 40)), []
    for h, w in [(1, 1), (1, 40), (40, 1), (40, 40), (2, 3), (39, 17), (5, 40)]:
        boxes += [(0, 0, h, w), (40 - h, 40 - w, h, w)]
    crops, flips = torch.tensor(boxes), torch.arange(len(boxes)) % 3 == 0
    index = torch.zeros(len(boxes), dtype=torch.int64)
    for size in (8, 32, 40, 96):
        expected = crop_on_cpu([images[0].numpy()], index, crops, flips, size)
        assert torch.equal(resized_crop_batch(images[index], crops, flips, size), expected)


@pytest.mark.parametrize("mix_type", ["none", "mixup", "cutmix"])
def test_mix_is_the_formula_and_rows_are_rows_of_the_batch(mix_type):
    x = torch.randn(6, 3, 8, 8)
    batch = Batch(torch.arange(6), None, None, torch.tensor([3, 0, 5, 1, 2, 4]), torch.tensor([1, 2, 5, 7]), 0.3)
    if mix_type == "none":
        batch = batch._replace(partner=torch.arange(6))
    whole = mix(x, batch, mix_type)
    for i in range(6):
        other = x[batch.partner[i]]
        expected = {"none": x[i], "mixup": 0.3 * x[i] + 0.7 * other, "cutmix": x[i].clone()}[mix_type]
        if mix_type == "cutmix":
            expected[:, 1:5, 2:7] = other[:, 1:5, 2:7]
        torch.testing.assert_close(whole[i], expected)
    rows = torch.tensor([4, 5])
    held = rows_needed(batch, rows)
    assert torch.equal(mix(x[held], batch, mix_type, rows, held), whole[rows])


# ---- label files


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(folder, feed that draws, feed that replays) of one epoch of 21 images in batches of 8, without a teacher."""
    folder = tmp_path_factory.mktemp("stored")
    root = make_images(tmp_path_factory.mktemp("set"), ipc=7)
    arrays, images = load_pixels("--data", open_images("--data", root))
    drawn = Feed(arrays, images, protocol(), "cpu")
    batches = [item.batch for item in drawn.loader([(2, b) for b in range(3)])]
    write_epoch(folder, 2, batches, torch.randn(21, 3, generator=generator(0)).half())
    return folder, drawn, Feed(arrays, images, protocol(), "cpu", labels=(folder, {}))


def test_draw_store_replay_gives_the_same_pixels(stored):
    folder, drawn, replayed = stored
    logits = load_file(folder / "epoch_0002.safetensors")["logits"]
    keys = [(2, 0), (2, 1), (2, 2)]
    items = list(zip(drawn.loader(keys), replayed.loader(keys), replayed.loader(keys, num_workers=2)))
    for a, b, c in items:
        assert torch.equal(drawn.mixed(a), replayed.mixed(b)) and torch.equal(drawn.mixed(a), replayed.mixed(c))
        assert a.batch.lam == b.batch.lam == c.batch.lam
    assert torch.equal(torch.cat([b.logits for _, b, _ in items]), logits)


def test_images_on_the_device_give_the_same_batch(stored):
    _, drawn, _ = stored
    on_device = Feed(drawn.arrays, _set_of(drawn), drawn.protocol, "cpu", rows_of=lambda count: torch.tensor([1, 3]))
    on_device.resident = torch.from_numpy(np.stack(drawn.arrays))  # as on a CUDA device with room for them
    (whole,), (part,) = list(drawn.loader([(0, 1)])), list(on_device.loader([(0, 1)]))
    assert part.pixels is None
    assert torch.equal(on_device.mixed(part), drawn.mixed(whole)[[1, 3]])


def test_images_that_do_not_fit_the_gpu_are_cropped_on_the_cpu_with_a_warning(stored, monkeypatch, capsys):
    _, drawn, _ = stored
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**15, 2**30))  # 21 images have 63 KiB
    feed = Feed(list(drawn.arrays), _set_of(drawn), drawn.protocol, "cuda")
    assert feed.resident is None and len(feed.arrays) == 21
    [line] = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("warning: the images need 0.1 MiB of GPU memory, 0.0 MiB may") and "cropped on the CPU" in line
    )
    mixed = [*drawn.arrays[1:], np.zeros((40, 32, 3), np.uint8)]
    assert Feed(mixed, _set_of(drawn), drawn.protocol, "cuda").resident is None
    assert "images of 2 sizes, such as [32, 32] and [40, 32]" in capsys.readouterr().err


def test_gpu_memory_that_pytorch_keeps_unused_counts_as_free(monkeypatch):
    for name, answer in (("mem_get_info", (100, 1000)), ("memory_reserved", 800), ("memory_allocated", 300)):
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert soft_labels.fits_gpu("the images", 300, "cuda", "cropped on the CPU")
    assert not soft_labels.fits_gpu("the images", 301, "cuda", "cropped on the CPU")


@pytest.mark.parametrize("mix_type", ["none", "mixup", "cutmix"])
@pytest.mark.parametrize("rows_of", [None, lambda count: torch.tensor([1, 3])])
def test_a_batch_is_made_without_reading_anything_back(stored, mix_type, rows_of, monkeypatch):
    """On the meta device, which has no values: whatever would wait for a GPU's fails here."""
    _, drawn, _ = stored
    feed = Feed(list(drawn.arrays), _set_of(drawn), protocol(mix_type=mix_type), "cpu", rows_of=rows_of)
    feed.device = torch.device("meta")
    feed.resident = torch.empty((21, 32, 32, 3), dtype=torch.uint8, device="meta")
    [item] = feed.loader([(0, 1)])
    to, waits = torch.Tensor.to, []

    def noted(tensor, *args, non_blocking=False, **more):
        found = to(tensor, *args, non_blocking=non_blocking, **more)
        waits.append(found.device != tensor.device and not non_blocking)
        return found

    monkeypatch.setattr(torch.Tensor, "to", noted)
    x = feed.mixed(item)
    assert waits and not any(waits)
    assert x.device.type == "meta" and x.dtype == torch.float32 and x.shape == (2 if rows_of else 8, 3, 32, 32)


def _set_of(feed):
    return type("Images", (), {"folders": CLASSES, "dataset": "digits"})


def test_small_sets_are_replayed_once_for_all_seeds(stored, monkeypatch):
    calls = []
    original = soft_labels.crop_on_cpu
    monkeypatch.setattr(soft_labels, "crop_on_cpu", lambda *a: calls.append(1) or original(*a))
    _, drawn, _ = stored
    feed = Feed(drawn.arrays, _set_of(drawn), drawn.protocol, "cpu")
    assert len(list(feed.loader([(0, 0), (0, 1), (0, 0), (0, 1)]))) == 4 and len(calls) == 2


def test_the_next_epochs_labels_are_hashed_and_checked_ahead(tmp_path, monkeypatch, refused):
    """Beside the training of this one, in another thread; each file once, and none is used unchecked."""
    root, hashed, folder = make_images(tmp_path, ipc=7), [], tmp_path / "labels"
    folder.mkdir()
    arrays, images = load_pixels("--data", open_images("--data", root))
    drawn = Feed(arrays, images, protocol(), "cpu")
    keys = [(epoch, b) for epoch in range(3) for b in range(3)]
    for epoch in range(3):
        batches = [item.batch for item in drawn.loader([(epoch, b) for b in range(3)])]
        write_epoch(folder, epoch, batches, torch.randn(21, 3, generator=generator(epoch)).half())
    digests = {path.name: sha256(path) for path in folder.iterdir()}
    main, original = threading.get_ident(), soft_labels.sha256

    def noted(path):
        hashed.append((path.name, threading.get_ident() != main))
        return original(path)

    monkeypatch.setattr(soft_labels, "sha256", noted)
    monkeypatch.setattr(soft_labels, "KEPT_BYTES", 0)  # a second seed reads again
    feed = Feed(arrays, images, protocol(), "cpu", labels=(folder, digests))
    for item in feed.loader([*keys, *keys]):
        if item.number == 2 and item.epoch < 2 and len(hashed) < 3:  # within the epoch: the next file is at hand
            feed.ahead[item.epoch + 1].result()
            assert len(hashed) == item.epoch + 2
    assert hashed == [("epoch_0000.safetensors", False), *((f"epoch_000{e}.safetensors", True) for e in (1, 2))]
    assert feed.background is None
    # spoilt while it is not yet at hand: met before its first batch
    path = folder / "epoch_0002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    feed = Feed(arrays, images, protocol(), "cpu", labels=(folder, digests))
    seen = []
    refused(lambda argv: seen.extend(item.epoch for item in feed.loader(keys)), [], "epoch_0002", "changed since")
    assert seen == [0, 0, 0, 1, 1, 1] and feed.background is None


SPOILT = {
    "epoch": ("epoch", lambda t: t + 1, "holds epoch 3, expected 2"),
    "an image twice": ("index", lambda t: torch.where(t == 5, 6, t), "each once"),
    "crop outside": ("crop", lambda t: t + torch.tensor([20, 0, 0, 0], dtype=t.dtype), "outside the images"),
    "empty crop": ("crop", lambda t: t * torch.tensor([1, 1, 0, 1], dtype=t.dtype), "outside the images"),
    "partner outside": ("partner", lambda t: t + 8, "mix partners"),
    "box outside": ("box", lambda t: t + 32, "boxes outside 32"),
    "lambda": ("lam", lambda t: t + 2, "lambdas"),
    "other batches": ("start", lambda t: torch.tensor([0, 10, 20, 21]), "begin at [0, 10"),
    "fewer classes": ("logits", lambda t: t[:, :2], "[21, 2], expected [21, 3]"),
    "fewer images": ("logits", lambda t: t[:20], "[20, 3]"),
    "NaN": ("logits", lambda t: torch.where(t == t[9, 1], torch.nan, t), "not finite"),
    "flips": ("flip", lambda t: t.int(), "no flips"),
    "no lambda": ("lam", None, "expected ["),
}


@pytest.mark.parametrize("what", SPOILT)
def test_label_files_that_do_not_fit_are_refused(stored, tmp_path, what):
    folder, feed, _ = stored
    name, change, words = SPOILT[what]
    tensors = load_file(folder / "epoch_0002.safetensors")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).contiguous()
    (tmp_path / "epoch_0002.safetensors").write_bytes(save(tensors, {"epoch": "2"}))
    with pytest.raises(LabelError) as error:
        labels = EpochLabels(tmp_path, 2, feed.sizes, 3, 8, 32, None)
        for number in range(3):
            labels.batch(number)
    assert words in str(error.value) and "epoch_0002" in str(error.value)


def test_truncated_and_foreign_files_are_refused(stored, tmp_path):
    folder, feed, _ = stored
    data = (folder / "epoch_0002.safetensors").read_bytes()
    for content in (b"", data[:100], data[:-1], b"\x80\x04cos\nsystem\n."):
        (tmp_path / "epoch_0002.safetensors").write_bytes(content)
        with pytest.raises(LabelError, match="cannot be read"):
            EpochLabels(tmp_path, 2, feed.sizes, 3, 8, 32, None)
    with pytest.raises(LabelError, match="changed since"):
        EpochLabels(folder, 2, feed.sizes, 3, 8, 32, "0" * 64)


def test_a_bad_file_met_by_a_worker_is_one_line(stored, tmp_path, refused):
    _, feed, _ = stored
    (tmp_path / "epoch_0002.safetensors").write_bytes(b"")
    bad = Feed(feed.arrays, _set_of(feed), feed.protocol, "cpu", labels=(tmp_path, {}))
    refused(lambda argv: list(bad.loader([(2, 0)], num_workers=1)), [], "epoch_0002", "cannot be read")


# ---- stage 3


def test_stage_3_for_any_number_of_processes_and_restarts(images, teacher, tmp_path, monkeypatch):
    straight = label(images, teacher, tmp_path / "one")
    assert straight.name == "digits_ipc4_random_convnet_mini_epochs3_b5_mix-cutmix"
    for shard in ("1/2", "0/2"):
        halves = label(images, teacher, tmp_path / "two", "--shard", shard)
        assert (halves / "manifest.json").exists() == (shard == "0/2")
    assert tree(straight) == tree(halves)

    calls, original = [], generate_soft_label.teacher_logits

    def counted(teachers, x, *args):
        calls.append(len(x))
        if len(calls) == 4:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(teachers, x, *args)

    monkeypatch.setattr(generate_soft_label, "teacher_logits", counted)
    with pytest.raises(SystemExit) as leaving:
        label(images, teacher, tmp_path / "stopped")
    assert leaving.value.code == 75 and calls == [5, 5, 2] * 2
    calls.clear()
    label(images, teacher, tmp_path / "stopped")
    assert calls == [5, 5, 2]  # the third epoch only
    assert tree(tmp_path / "stopped" / straight.name) == tree(straight)
    calls.clear()
    label(images, teacher, tmp_path / "stopped")
    assert calls == []


def test_manifest_says_what_stage_4_must_know(images, teacher, tmp_path):
    folder = label(images, teacher, tmp_path)
    manifest = read_json(folder / "manifest.json")
    assert manifest["stage"] == "soft_labels" and [c["folder"] for c in manifest["classes"]] == CLASSES
    assert manifest["images"]["content"] == read_json(images / "manifest.json")["content"]
    assert (
        manifest["teacher"][0]["sha256"]
        == read_json(teacher / "manifest.json")["files"]["model.safetensors"]["sha256"]
    )
    assert manifest["arguments"]["batch_size"] == 5 and manifest["arguments"]["fkd_seed"] == 42
    assert load_file(folder / "epoch_0000.safetensors")["logits"].dtype == torch.float16
    assert not any(str(tmp_path) in (folder / name).read_text() for name in ("manifest.json", "args.json"))


def test_several_folders_and_several_teachers(images, teacher, tmp_path):
    second = make_images(tmp_path, "digits_ipc2_random", ipc=2, first=8)
    other = make_teacher(tmp_path, seed=1)
    flags = ["--fkd_path", str(tmp_path / "labels"), *PROTOCOL, "--epochs", "1", "--no_use_fp16"]
    both = generate_soft_label.main(
        ["--data", str(images), str(second), "--arch", "convnet_mini", "convnet_mini"]
        + ["--teacher_checkpoint", str(teacher), str(other), *flags]
    )
    assert [f.name.split("_convnet")[0] for f in both] == ["digits_ipc4_random", "digits_ipc2_random"]
    single = [label(images, t, tmp_path / str(i), *flags[2:]) for i, t in enumerate((teacher, other))]
    a, b, mean = (load_file(f / "epoch_0000.safetensors")["logits"] for f in (*single, both[0]))
    torch.testing.assert_close((a + b) / 2, mean)


def test_foreign_images(teacher, tmp_path, capsys):
    """Another method's folder: PNGs of several sizes, no manifest; once hashed, a changed file is another set."""
    root = tmp_path / "theirs"
    for c, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i, side in enumerate((20, 32, 40)):
            Image.fromarray(photos(1, side, seed=10 * c + i)[0]).save(root / name / f"{i}.png")
    folder = label(root, teacher, tmp_path / "labels", "--dataset", "digits", "--input_size", "32")
    assert "no manifest" in capsys.readouterr().err
    facts = read_json(folder / "manifest.json")["images"]
    assert facts["foreign"] and facts["count"] == 9 and facts["image_size"] is None
    Image.fromarray(photos(1, 32, seed=99)[0]).save(root / "1" / "1.png")
    arrays, images = load_pixels("--data", open_images("--data", root, "digits"))
    assert images.content != facts["content"] and [a.shape[0] for a in arrays] == [20, 32, 40] * 3


def test_numbered_folders_are_the_classes_in_order(tmp_path, capsys, refused):
    def folders(names):
        root = tmp_path / names[0]
        for name in names:
            (root / name).mkdir(parents=True)
            Image.fromarray(photos(1, 8)[0]).save(root / name / "a.png")
        return root

    known = tuple(known_prompts("cifar10"))
    images = open_images("--data", folders([f"new{i:03d}" for i in range(10)]), "cifar10")
    assert images.folders == known and images.files[3] == "new003/a.png"
    assert "classes in order" in capsys.readouterr().err
    unpadded = folders([f"c{i}" for i in (0, 1, 10, 2, 3, 4, 5, 6, 7, 8)])
    refused(lambda argv: open_images("--data", unpadded, "cifar10"), [], "'c0'", "cifar10")
    assert open_images("--data", folders(list(known)), None).dataset == "cifar10"
    assert open_images("--data", folders(["cat", "dog"]), None).dataset == "imagefolder"


def test_stage_3_refuses(images, teacher, tmp_path, refused, monkeypatch):
    main = generate_soft_label.main
    base = ["--data", images, "--fkd_path", tmp_path / "labels", *PROTOCOL]
    mine = [*base, "--arch", "convnet_mini", "--teacher_checkpoint", teacher]
    refused(main, ["--data", tmp_path / "none"], "--data", "none", "no such folder")
    refused(main, [*base, "--arch", "convnet_mini"], "nobody publishes")
    refused(main, [*mine, teacher], "2 paths for 1 --arch")
    refused(main, [*mine, "--input_size", "64"], "input size", "32", "64")
    refused(main, [*mine, "--min_scale_crops", "0.5", "--max_scale_crops", "0.2"], "0.5", "0.2")
    refused(main, [*mine, "--dataset", "cifar10"], "cifar10", "digits")
    refused(main, [*mine, "--gpu", "0"], "--gpu", "--device")
    refused(main, [*mine, "--seed", "1"], "--fkd_seed")
    refused(main, [*mine, "--cutmix", "0"], "--cutmix: 0 is not above 0")
    changed = copy(images, tmp_path)
    path = changed / "1" / "1_0002.png"
    Image.open(path).rotate(90).save(path)
    refused(main, ["--data", changed, *mine[2:]], "1/1_0002.png")
    monkeypatch.setattr("scripts.files.free_space", lambda folder: 1000)
    refused(main, mine, "--fkd_path", "MiB")
    assert not (tmp_path / "labels").exists()
