"""Nothing is unpickled, no code comes from a model's folder, no name becomes a path elsewhere."""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from distillation import gen_syn_image
from scripts import generators
from tests.conftest import HOSTILE, everything

QUICK = ["--max_images_per_class", "2", "--ipc", "1"]
RELEASE = ["--dataset", "imagefolder", "--arm", "decoded", "--image_size", "32"]


@pytest.fixture(scope="module")
def loaded():
    """generators.load that reads each checkpoint once."""
    original = generators.load

    @cache
    def load(checkpoint, device, **how):
        return original(checkpoint, device, **how)

    return load


def ends_well(main, argv):
    """A stage's folder, or None if it refused; anything else, such as a traceback, fails the test."""
    try:
        folder = main([str(a) for a in argv])
    except SystemExit as leaving:
        assert leaving.code == 2
        return None
    return folder[0] if isinstance(folder, list) else folder


@pytest.fixture(params=HOSTILE)
def text(request, loaded, monkeypatch, tmp_path):
    """A hostile name; afterwards nothing may stand beside `output` and what the test made."""
    monkeypatch.setattr(generators, "load", loaded)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield HOSTILE[request.param]
    assert everything(tmp_path) >= {"here"} and os.listdir(tmp_path) == ["here"]
    assert not Path(HOSTILE["absolute"]).exists()


def release_file(*prompts):
    latents = np.zeros((1, 4, 8, 8)).tolist()
    Path("release.json").write_text(json.dumps(dict.fromkeys(prompts, latents)))
    return ["--prototype_path", "release.json"]


def test_as_a_prompt_of_the_releases_file(text, model):
    folder = ends_well(gen_syn_image.main, [*RELEASE, *model, *release_file(text, "a cat")])
    if folder:
        assert {path.name for path in folder.iterdir() if path.is_dir()} == {"0000", "0001"}
    assert set(os.listdir()) <= {"release.json", "output"}
