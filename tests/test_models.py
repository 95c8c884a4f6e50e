"""Teachers and students: parameter counts, shapes at 32, 64 and 224 px, weights in all their wrappings, columns."""

import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from stage34 import CLASSES, make_teacher, redo_manifest

from distillation.datasets import known_prompts
from matching.models import MODELS, Columns, count_parameters, create_model, load_teacher, model_name
from scripts.files import read_json

NETTE = list(known_prompts("imagenette"))


def test_convnet_has_the_literatures_size():
    assert count_parameters(create_model("convnet_w128", 10, 32)) == 320_010
    # each block 147,840 after the first 3,840; the head 128 * 16 + 1 a class
    assert count_parameters(create_model("convnet_w128", 200, 64)) == 3_840 + 3 * 147_840 + 200 * 2_049


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", ["convnet_w128", "convnet_mini", "resnet_ap10", "resnet18", "mobilenet_v2"])
def test_small_images(name, size):
    model = create_model(name, 7, size).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_every_model_is_built_and_sized_as_published():
    published = {"resnet18": 11_689_512, "resnet50": 25_557_032, "mobilenet_v2": 3_504_872, "swin_t": 28_288_354}
    with torch.device("meta"):
        for name in MODELS:
            model = create_model(name, 1000, 224)
            assert model(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)
            if name in published:
                assert count_parameters(model) == published[name]


def test_small_resnet_keeps_its_map_and_large_one_does_not():
    small, large = create_model("resnet18", 10, 64), create_model("resnet18", 10, 224)
    assert small.conv1.kernel_size == (3, 3) and isinstance(small.maxpool, torch.nn.Identity)
    assert large.conv1.kernel_size == (7, 7)


def test_unknown_model_and_missing_timm(refused):
    refused(lambda argv: model_name(argv[0]), ["resnet19"], "resnet19", "convnet_w128")
    try:
        import timm  # noqa: F401
    except ImportError:
        refused(lambda argv: create_model(argv[0], 10, 224), ["timm:vit_tiny"], "timm is not installed")


# ---- weights


@pytest.fixture(scope="module")
def imagenet_net():
    torch.manual_seed(0)
    return create_model("mobilenet_v2", 1000, 224)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, imagenet_net):
    path = tmp_path_factory.mktemp("teacher") / "net.pt"
    torch.save(imagenet_net.state_dict(), path)
    return path


def _load(path, dataset="imagenette", folders=NETTE, name="mobilenet_v2", size=224):
    return load_teacher(name, path, dataset, folders, size)


def test_subset_takes_the_right_columns(imagenet_net, checkpoint):
    model, facts = _load(checkpoint)
    x = torch.randn(2, 3, 64, 64)
    expected = imagenet_net.eval()(x)[:, [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]]  # as public listings say
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert facts["columns"] == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701] and facts["classes"] == 1000
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_tiny_imagenet_and_own_wnid_folders_are_subsets_too(checkpoint):
    tiny = list(known_prompts("tiny_imagenet"))
    assert len(_load(checkpoint, "tiny_imagenet", tiny)[1]["columns"]) == 200
    assert _load(checkpoint, "imagefolder", ["n01440764", "n02102040"])[1]["columns"] == [0, 217]
    assert _load(checkpoint, "imagenet", list(known_prompts("imagenet")))[1]["columns"] is None


@pytest.mark.parametrize("wrapping", ["module", "state_dict", "model", "compiled", "safetensors"])
def test_weights_in_every_wrapping(tmp_path, imagenet_net, checkpoint, wrapping):
    state = imagenet_net.state_dict()
    path = tmp_path / "net.pt"
    if wrapping == "safetensors":
        path = tmp_path / "net.safetensors"
        save_file(state, path)
    elif wrapping in ("module", "compiled"):
        prefix = "module." if wrapping == "module" else "_orig_mod."
        torch.save({prefix + k: v for k, v in state.items()}, path)
    else:
        torch.save({wrapping: {"module." + k: v for k, v in state.items()}, "epoch": 3}, path)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(_load(path)[0](x), _load(checkpoint)[0](x), rtol=0, atol=0)


def test_bad_checkpoints_are_one_line(tmp_path, checkpoint, imagenet_net, refused):
    def run(argv):
        return _load(*argv)

    refused(lambda argv: _load(tmp_path / "none.pt"), [], "none.pt", "no such file")
    (tmp_path / "text.pt").write_text("no weights")
    refused(lambda argv: _load(tmp_path / "text.pt"), [], "text.pt", "cannot be read as weights")
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    refused(lambda argv: _load(tmp_path / "empty.pt"), [], "no state dict")
    refused(lambda argv: _load(checkpoint, name="resnet18"), [], "fc.bias", "resnet18")
    state = imagenet_net.state_dict()
    state["features.0.0.weight"] = torch.zeros(32, 3, 5, 5)
    torch.save(state, tmp_path / "shape.pt")
    refused(lambda argv: _load(tmp_path / "shape.pt"), [], "[32, 3, 5, 5]", "[32, 3, 3, 3]")


class Boom:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_of_a_checkpoint_is_run(tmp_path, refused):
    torch.save({"state_dict": Boom(tmp_path / "executed")}, tmp_path / "evil.pt")
    refused(lambda argv: _load(tmp_path / "evil.pt"), [], "evil.pt", "only plain tensors")
    assert not (tmp_path / "executed").exists()


def test_a_1000_class_teacher_needs_wnids(checkpoint, refused):
    refused(lambda argv: _load(checkpoint, "imagefolder", ["cat", "dog"]), [], "wnid", "'cat'")
    refused(lambda argv: _load(checkpoint, "cifar10", list(known_prompts("cifar10"))), [], "wnid", "airplane")


def test_a_head_of_another_number_of_classes_is_refused(tmp_path, refused):
    net = create_model("convnet_mini", 3, 32)
    torch.save(net.state_dict(), tmp_path / "three.pt")
    refused(
        lambda argv: load_teacher("convnet_mini", tmp_path / "three.pt", "digits", ["0", "1"], 32),
        [],
        "3 classes",
        "2",
    )


def test_public_weights_without_internet(monkeypatch, tmp_path, refused):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    line = refused(lambda argv: _load(None, name="resnet18"), [], "resnet18-f37072fd.pth", "put it at")
    assert str(tmp_path / "checkpoints") in line
    refused(lambda argv: _load(None, name="resnet18", size=32), [], "train_teacher")
    refused(lambda argv: _load(None, name="convnet_w128"), [], "nobody publishes")


@pytest.fixture
def timm_net(monkeypatch):
    """timm_net(**pretrained_cfg) puts a module `timm` in place whose every model is one linear layer with that."""

    def place(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), **cfg):
        def create(_, pretrained, num_classes=1000):
            net = torch.nn.Sequential(
                torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, num_classes)
            )
            net.pretrained_cfg = {"mean": mean, "std": std, **cfg}
            return net

        monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create))

    return place


def test_timms_weights_want_the_images_that_they_were_trained_on(timm_net, refused):
    def load(size=224):
        return lambda argv: _load(None, name="timm:net", size=size)

    timm_net(input_size=(3, 224, 224), fixed_input_size=True)
    model, facts = load()([])
    assert facts["weights"] == "timm pretrained" and model(torch.zeros(2, 3, 224, 224)).shape == (2, 10)
    refused(load(256), [], "--input_size 256", "timm:net takes 224 x 224 px")
    timm_net(input_size=(3, 224, 224), fixed_input_size=False)
    assert load(256)([])[1]["classes"] == 1000  # a convolutional net takes any
    timm_net(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    refused(load(), [], "timm:net", "(0.5, 0.5, 0.5)", "(0.485, 0.456, 0.406)")
    timm_net(std=(1.0, 1.0, 1.0))
    refused(load(), [], "std (1.0, 1.0, 1.0)")


def test_teacher_folder_is_checked(tmp_path, refused):
    folder = make_teacher(tmp_path)

    def load(name="convnet_mini", dataset="digits", folders=CLASSES, size=32):
        return lambda argv: load_teacher(name, folder, dataset, list(folders), size)

    model, facts = load()([])
    assert facts["weights"] == "train_teacher" and facts["columns"] is None
    assert (facts["arguments"]["arch"], facts["arguments"]["epochs"]) == ("convnet_mini", 1)
    assert load(folders=["0", "2"])([])[0](torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    assert isinstance(load(folders=["0", "2"])([])[0][1], Columns)
    refused(load(folders=["2", "0"]), [], "class order", "column 2", "column 0")
    refused(load(folders=["0", "7"]), [], "'7'", "not among")
    refused(load(name="convnet_w128"), [], "architecture", "convnet_mini", "convnet_w128")
    refused(load(size=64), [], "input size", "32", "64")
    refused(load(dataset="cifar10"), [], "data set", "digits", "cifar10")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    refused(load(), [], "model.safetensors", "changed")
    manifest = read_json(folder / "manifest.json")
    redo_manifest(folder, classes=manifest["classes"][:2])
    refused(load(folders=["0", "1"]), [], "3 classes", "2")
