"""Each recipe's launcher against its repository: values and formulas written down here anew."""

from math import cos, pi

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distillation import random_real
from matching import batches, generate_soft_label, images, labels, models, training
from matching.crops import crop_on_cpu
from scripts import files, runtime
from scripts.runtime import WEIGHTS
from tests.test_launchers import RECIPES, commands, parsed
from validate import train_FKD

SMALL = ["--epochs", "4", "--batch_size", "10", "--input_size", "32", "--num_workers", "0"]
SMALL += ["--device", "cpu"]
SCRIPT = {"d4m": "validate/train_FKD.sh"}
SCRIPT |= {name: f"validate/train_FKD_{name}.sh" for name in RECIPES}


def launched(recipe, **variables):
    return parsed(SCRIPT[recipe], **variables)


# ---- loss


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One real digit per class."""
    root = str(tmp_path_factory.mktemp("images"))
    return random_real.main(["--dataset", "digits", "--ipc", "1", "--save_init_image_path", root])


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Four networks with random weights, sharp enough that their labels differ from uniform."""
    paths = []
    for seed in range(1, 5):
        torch.manual_seed(seed)
        state = models.create_model("convnet_mini", 10, 32).state_dict()
        last = list(state)[-2]
        state[last] = state[last] * 30
        paths.append(str(tmp_path_factory.mktemp("teacher") / "weights.safetensors"))
        save_file(state, paths[-1])
    return paths


def softmax(x, temperature=1.0):
    e = np.exp((x - x.max(1, keepdims=True)) / temperature)
    return e / e.sum(1, keepdims=True)


def formula(recipe, z, t, y, y2, lam):
    """The mean loss over a batch.   z student's, t teacher's logits (B, C); y, y2 classes (B,)"""
    rows = np.arange(len(z))
    own, other = (-np.log(softmax(z)[rows, of]) for of in (y, y2))
    if recipe == "minimax":
        return (lam * own + (1 - lam) * other).mean()
    if recipe == "edc":
        return ((z - t) ** 2).mean() + 0.025 * own.mean()  # not mixed
    p, q = softmax(z, 20), softmax(t, 20)
    return (q * (np.log(q) - np.log(p))).sum(1).mean()  # no T^2


@pytest.mark.parametrize("recipe", SCRIPT)
def test_the_loss_of_a_recipe_on_one_batch(recipe, made, teachers, tmp_path):
    [(_, _, argv)] = commands(SCRIPT[recipe])
    args = train_FKD.get_args(argv)
    own = teachers[: len(args.arch or [""])]
    teacher = ["--arch", *["convnet_mini"] * len(own), "--teacher_checkpoint", *own]
    drawn = ["--min_scale_crops", str(args.min_scale_crops), "--mix_type", args.mix_type]
    drawn += ["--no_use_fp16"] if args.use_fp16 is False else []
    flags = ["--data", str(made), "--fkd_path", str(tmp_path), *teacher, *SMALL, *drawn]
    [stored] = generate_soft_label.main(flags)
    argv = [*argv, *SMALL, "--train_dir", str(made), "--model", "convnet_mini", "--seeds", "0"]
    argv += ["--bn_batch", "10", "--eval_every", "4", "--output_dir", str(tmp_path / "students")]
    if args.online:
        argv += [*teacher, "--shuffle_patches", "1"]
    elif args.hard_label:
        argv += ["--color_jitter", "0", "--lighting", "0"]
    else:
        argv += ["--fkd_path", str(stored)]
    rows = files.read_json(train_FKD.main(argv) / "results.json")["seeds"][0]["rows"]

    arrays, image_set = images.load_pixels("", images.open_images("", made))
    batch, logits, _ = labels.EpochLabels(stored, 0, 10, 10).batch(0)
    pixels = crop_on_cpu(arrays, batch.index, batch.crop, batch.flip, 32)
    x = batches.mix(batches.normalise(pixels, (0.5,) * 3, (0.5,) * 3), batch, "cutmix")
    with training.seeded(0, WEIGHTS):
        student = models.create_model("convnet_mini", 10, 32)
    with torch.no_grad():
        z = student.train()(x).double().numpy()
    y = image_set.targets[batch.index].numpy()
    other = y[batch.partner.numpy()]
    expected = formula(recipe, z, logits.double().numpy(), y, other, batch.lam)
    assert rows[0]["loss"] == pytest.approx(expected, rel=2e-4)


# ---- values by data set


def cos2(t, n):
    late = (1 + cos(5 * pi / 12)) / 2 * (n - t) / n
    return FACTOR["half"](t, n) if t <= 5 * n / 6 else late


FACTOR = {  # of the peak, in epoch t of n
    "cosine": lambda t, n: (1 + cos(pi * t / n)) / 2,
    "half": lambda t, n: (1 + cos(pi * t / (2 * n))) / 2,
    "line": lambda t, n: 1 - t / (2 * n),
    "cos2": cos2,
    "x0.2": lambda t, n: 0.2 ** sum(t >= at for at in (2 * n // 3, 5 * n // 6)),
    "x0.5": lambda t, n: 0.5 ** sum(t >= share * n for share in (0.8, 0.9, 0.95)),
}
# optimiser, its peak, epochs at IPC 10; batch at IPC 1, 10, 50; crops from, patches, test resize
TABLE = """
    d4m      imagenet       adamw  0.001   300  cosine  1024 1024 1024  0.08  1  None
    cda      imagenet       adamw  0.001   300  cosine   128  128  128  0.08  1  None
    rded     imagenet       adamw  0.001   300  half      20  100  200  0.5   2  256
    rded     imagenet100    adamw  0.001   300  half      20  100  200  0.5   2  256
    rded     imagenette     adamw  0.001   300  half      10   50  100  0.5   2  256
    rded     imagewoof      adamw  0.001   300  half      10   50  100  0.5   2  256
    rded     tiny_imagenet  adamw  0.001   300  half     100  100  100  1     1  72
    rded     cifar10        adamw  0.001   300  half      10   50  100  1     1  32
    rded     cifar100       adamw  0.001   300  half      20  100  200  1     1  32
    rd3      imagenet       adamw  0.001   400  cosine    50   50   50  0.5   1  None
    edc      imagenet       adamw  0.001   300  line     100  100  100  0.5   1  None
    edc      imagenet100    adamw  0.001  1000  cos2      50   50   50  0.5   1  None
    edc      imagenette     adamw  0.001  1000  cos2      50   50   50  0.5   1  None
    edc      tiny_imagenet  sgd    0.1     300  half     100  100  100  0.5   1  None
    edc      cifar10        adamw  0.001  1000  x0.5      10   50   50  0.08  1  None
    edc      cifar100       sgd    0.1    1000  cos2      50   50   50  0.5   1  None
    minimax  imagenet       sgd    0.1    2000  x0.2     128  128  128  0.5   1  224
    minimax  imagenet100    sgd    0.01   1300  x0.2      64   64   64  0.5   1  224
    minimax  imagenette     sgd    0.01   2000  x0.2      64   64   64  0.5   1  224
"""


@pytest.mark.parametrize(
    "row", TABLE.strip().splitlines(), ids=lambda row: "-".join(row.split()[:2])
)
def test_the_values_of_a_recipe(row):
    recipe, dataset, kind, peak, epochs, factor, *batch, least, patches, resize = row.split()
    runs = [launched(recipe, DATASET=dataset, IPC=ipc) for ipc in ("1", "10", "50")]
    assert [args.batch_size for args in runs] == list(map(int, batch))
    assert recipe == "d4m" or all(args.bn_batch == args.batch_size for args in runs)
    args, epochs = runs[1], int(epochs)
    settings = args.settings.filled(**batches.PROTOCOL)
    found = settings["epochs"], settings["min_scale_crops"], args.shuffle_patches
    assert found == (epochs, float(least), int(patches)) and args.mix_type == "cutmix"
    assert (str(args.test_resize), args.sgd) == (resize, kind == "sgd")
    assert args.bn_refresh == (recipe in ("rded", "rd3"))
    assert args.ema == (0.99 if recipe == "edc" else 0)
    extra = (args.color_jitter, args.lighting, args.decay_on)
    assert extra == ((0.4, 0.1, "all") if recipe == "minimax" else (0, 0, "weights"))
    decay = args.weight_decay if args.sgd else args.adamw_weight_decay
    small = 1e-4 if (recipe, dataset) == ("minimax", "imagenet") else 5e-4
    assert decay == (0.01 if kind == "adamw" else small)
    assert not args.sgd or args.momentum == (0.9 if recipe == "minimax" else 0.875)
    assert not args.online or args.use_fp16 == ((recipe, dataset) == ("edc", "imagenet"))
    steps = (2 * epochs // 3 - 1, 2 * epochs // 3, 11 * epochs // 12)
    for epoch in (0, epochs // 4, *steps, epochs - 1):
        ours = training.lr_factor(epoch=epoch, **settings)
        ours *= args.learning_rate if args.sgd else args.adamw_lr
        assert ours == pytest.approx(float(peak) * FACTOR[factor](epoch, epochs), rel=1e-12)


def test_values_by_student():
    rates = {"resnet101": 1e-3, "efficientnet_b0": 2e-3, "mobilenet_v2": 2.5e-3, "vgg11": 5e-4}
    rates |= dict.fromkeys(("alexnet", "swin_v2_t", "vit_b_16"), 1e-4)
    for student, rate in rates.items():
        args = launched("rded", STUDENT=student)
        assert args.adamw_lr == rate and args.model in models.MODELS
    conv = launched("rded", DATASET="cifar100", TEACHER="convnet_bn", STUDENT="convnet_bn")
    assert (conv.batch_size, conv.adamw_lr) == (25, 2e-3)
    assert launched("rd3", STUDENT="resnet50").cos_stretch == 2


def test_epochs_by_ipc():
    """Minimax's ipc_epoch: int(2 / 3 x epochs), rounded down to hundreds, on 100 classes."""
    table = {1: 3000, 10: 2000, 20: 1500, 50: 1500, 100: 1000, 200: 1000, 300: 500, 600: 300}
    for ipc, epochs in table.items():
        assert launched("minimax", IPC=str(ipc)).epochs == epochs
        fewer = int((2 / 3) * epochs) // 100 * 100
        assert launched("minimax", IPC=str(ipc), DATASET="imagenet100").epochs == fewer
    assert launched("edc", DATASET="tiny_imagenet", IPC="1").epochs == 1000


def test_a_crop_of_scale_1_is_the_whole_image():
    """RDED on CIFAR and Tiny-ImageNet."""
    whole = batches.draw_crops(torch.full((500, 2), 32), (1.0, 1.0), runtime.generator(0))
    assert (whole == torch.tensor([0, 0, 32, 32])).all()


@pytest.mark.parametrize("recipe, name", [("rded", "batch_size"), ("minimax", "epochs")])
def test_other_images_have_the_values_of_their_own_ipc(recipe, name):
    """IMAGES=imagenet_ipc50_random says how many there are; IPC does for a name that does not."""
    long, short = {"batch_size": (200, 100), "epochs": (1500, 2000)}[name]
    for given in ("x_ipc50_random", "x_ipc50_s0.7_g8_kmexpand1_stm", "a_ipc50_from_b_ipc10_text"):
        args = launched(recipe, IMAGES=given, DATASET="imagenet")
        assert args.train_dir == f"output/images/{given}" and getattr(args, name) == long
    for given in ("x_ipc9", "of_ipcs"):
        assert getattr(launched(recipe, IMAGES=given, DATASET="imagenet"), name) == short
    assert getattr(launched(recipe, IMAGES="mine", IPC="50", DATASET="imagenet"), name) == long


# ---- weight decay


@pytest.mark.parametrize("network, tables", [("swin_t", 12), ("vit_b_16", 2), ("resnet18", 0)])
@pytest.mark.parametrize("recipe", SCRIPT)
def test_what_a_recipe_decays(recipe, network, tables):
    """All with Minimax; else no bias table of Swin, class token or position embedding of ViT."""
    args = launched(recipe, STUDENT=network)
    with torch.device("meta"):
        model = models.create_model(network, 1000, 224)
    decay = args.weight_decay if args.sgd else args.adamw_weight_decay
    how = args.sgd, 1e-3, decay, args.momentum, False, args.decay_on
    decayed, others = training.make_optimizer(model, *how).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (5e-4 if args.sgd else 0.01, 0)
    ids = {id(p) for p in decayed["params"]}
    free = {name: p for name, p in model.named_parameters() if id(p) not in ids}
    assert {id(p) for p in free.values()} == {id(p) for p in others["params"]}
    assert recipe == "minimax" or all(p.ndim > 1 for p in decayed["params"])
    odd = [name for name, p in free.items() if p.ndim > 1]
    assert all(name.endswith(("bias_table", "class_token", "pos_embedding")) for name in odd)
    assert len(odd) == tables if recipe != "minimax" else not free
