"""What others read of an image folder: its data card, by the libraries that load it."""

import numpy as np
import pytest

from distillation import image_folder, random_real
from tests.conftest import picture_folder

# as words of a folder's name, these are splits for Hugging Face, some of them for timm
LIKE_SPLITS = ["train", "test_tube", "bullet train", "dev-tool", "val", "eval"]


@pytest.fixture
def made(tmp_path, capsys):
    """made(classes) -> (folder of two real images per class, the last line that was printed)"""

    def make(classes):
        picture_folder(tmp_path, classes)
        argv = ["--dataset", "imagefolder", "--data_dir", str(tmp_path), "--ipc", "2"]
        argv += ["--image_size", "8", "--num_workers", "0", "--save_init_image_path", str(tmp_path)]
        return random_real.main(argv), capsys.readouterr().out.splitlines()[-1]

    return make


def test_a_class_that_is_called_like_a_split_is_named_with_who_misreads_it(made):
    folder, line = made(["airplane", *LIKE_SPLITS])
    card = (folder / "README.md").read_text()
    for text in (line, card):
        assert 'load_dataset("imagefolder", data_dir=DIR)' in text and "search_split=False" in text
    for name in LIKE_SPLITS:
        assert f"class {name} is called like a split" in image_folder.misread(["cat", name])
    assert not image_folder.misread(["Train", "trains", "interval", "n01440764", "0"])


def test_hugging_face_and_timm_read_every_class(made, tmp_path):
    hugging_face = pytest.importorskip("datasets")
    timm_data = pytest.importorskip("timm.data")
    folder, _ = made(["airplane", *LIKE_SPLITS])
    read = hugging_face.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(read) == ["train"] and len(read["train"]) == 2 * 7
    label = read["train"].features["label"]
    assert label.names == sorted(["airplane", *LIKE_SPLITS])
    for row, path in zip(read["train"], sorted(folder.glob("*/*.png")), strict=True):
        assert label.int2str(row["label"]) == path.parent.name
        assert np.array(row["image"]).shape == (8, 8, 3)
    timm = timm_data.create_dataset("", str(folder), search_split=False)
    assert len(timm) == 2 * 7 and list(timm.reader.class_to_idx) == label.names
