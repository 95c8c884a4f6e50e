"""Several processes, shards, jobs and nodes: the same bytes, one writer a folder, a full disk, a rank that dies."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import tree
from reliability import STAGE_1, STAGE_2
from stage34 import PROTOCOL, make_teacher

from distillation import distill, gen_prototype, gen_syn_image, random_real
from matching import generate_soft_label, train_teacher
from matching.training import load_checkpoint
from misc.kill_test import Forked, forked, free_port, rank_environment
from scripts import files
from scripts.files import MANIFEST, atomic, output_folder, read_json, settings_digest, write_manifest
from scripts.runtime import Process
from validate import train_FKD

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def slowly(main, seconds):
    """A stage that takes `seconds` longer for every batch of the VAE or the UNet, of labels, and for every epoch."""

    def run(argv):
        from diffusers import AutoencoderKL, UNet2DConditionModel

        for place, name in (
            (AutoencoderKL, "encode"),
            (UNet2DConditionModel, "forward"),
            (generate_soft_label, "teacher_logits"),
            (train_FKD, "train_epoch"),
        ):
            original = getattr(place, name)

            def wait(*args, _original=original, **kwargs):
                time.sleep(seconds)
                return _original(*args, **kwargs)

            setattr(place, name, wait)
        main(argv)

    return run


def stage_1(model, *more):
    return [*STAGE_1, *model, *more]


def stage_2(model, made, *more):
    return [*STAGE_2, *model, "--prototype_path", str(made[0]), *more]


class Stage(NamedTuple):
    """One stage with what it makes when nothing goes wrong.

    root      the folder below which it writes
    units     for each of two ranks, the files that are its own
    """

    main: object
    argv: list
    root: str
    reference: Path
    units: tuple

    @property
    def folder(self):
        return Path(self.root) / self.reference.name


@pytest.fixture(scope="module")
def stages(made, model, tmp_path_factory):
    """{1: Stage, ... 4: Stage}: three classes, three batches of images, three epochs."""
    root = tmp_path_factory.mktemp("stages")
    argv_3 = ["--data", str(made[1]), "--arch", "convnet_mini", "--teacher_checkpoint", str(make_teacher(root))]
    argv_3 += [*PROTOCOL, "--device", "cpu"]
    labels = generate_soft_label.main([*argv_3, "--fkd_path", str(root / "labels")])[0]
    argv_4 = ["--train_dir", str(made[1]), "--fkd_path", str(labels), "--model", "convnet_mini", "--bn_batch", "2"]
    argv_4 += ["--num_workers", "0", "--device", "cpu", "--eval_every", "1"]
    student = train_FKD.main([*argv_4, "--output_dir", str(root / "students")])
    pngs = [[f"{c}/{c}_{i:04d}.png" for i in (0, 1)] for c in range(3)]
    jsons, epochs = (["0000_0.json", "0002_2.json"], ["0001_1.json"]), ([0, 2], [1])
    epochs = tuple([f"epoch_{epoch:04d}.safetensors" for epoch in mine] for mine in epochs)
    return {
        1: Stage(gen_prototype.main, stage_1(model), "output/prototypes", made[0], jsons),
        2: Stage(gen_syn_image.main, stage_2(model, made), "output/images", made[1], (pngs[0] + pngs[1], pngs[2])),
        3: Stage(generate_soft_label.main, argv_3, "output/labels", labels, epochs),
        4: Stage(train_FKD.main, argv_4, "output/students", student, ([], [])),
    }


# ---- the same bytes for any number of processes


def at_once(main, argv, world, port=0):
    """All ranks of `main` at the same time, in forked processes; returns how they ended."""
    runs = [Forked(main, argv, environment=rank_environment(rank, world, port)) for rank in range(world)]
    return [run.wait() for run in runs]


@pytest.mark.parametrize(
    "world", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)]
)
def test_ranks_at_the_same_time_make_the_same_bytes(world, made, model):
    """Three classes, and three batches of images: 2 ranks get uneven parts, 4 and 7 are more than there are units."""
    assert [end.status for end in at_once(gen_prototype.main, stage_1(model), world)] == [0] * world
    assert [end.status for end in at_once(gen_syn_image.main, stage_2(model, made), world)] == [0] * world
    assert tree(Path("output/prototypes") / made[0].name) == tree(made[0])
    assert tree(Path("output/images") / made[1].name) == tree(made[1])


def test_two_independent_shards_make_the_same_bytes_and_either_may_finish(made, model):
    for shard in ("1/2", "0/2"):
        gen_prototype.main(stage_1(model, "--shard", shard))
        gen_syn_image.main(stage_2(model, made, "--shard", shard))
    assert tree(Path("output/prototypes") / made[0].name) == tree(made[0])
    assert tree(Path("output/images") / made[1].name) == tree(made[1])
    second = [
        Forked(gen_prototype.main, stage_1(model, "--shard", f"{i}/2", "--save_prototype_path", "b")) for i in (0, 1)
    ]
    assert [run.wait().status for run in second] == [0, 0]
    assert tree(Path("b") / made[0].name) == tree(made[0])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_stages_1_to_3_under_torchrun_make_the_same_bytes(processes, made, model, tmp_path):
    small = "--classes 0-2 --arch convnet_mini --epochs 1 --max_images_per_class 12 --num_workers 0"
    teacher = train_teacher.main(["--dataset", "digits", *small.split()])
    stage_3 = f"--data {made[1]} --arch convnet_mini --teacher_checkpoint {teacher} --epochs 5 --batch_size 4".split()
    stage_3 += ["--device", "cpu", "--num_workers", "0"]
    alone = generate_soft_label.main([*stage_3, "--fkd_path", "alone"])[0]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for module, argv in (
        ("distillation.gen_prototype", stage_1(model)),
        ("distillation.gen_syn_image", stage_2(model, made)),
        ("matching.generate_soft_label", stage_3),
    ):
        subprocess.run([*launch, module, *argv], check=True, env=environment, capture_output=True, timeout=300)
    assert tree(Path("output/prototypes") / made[0].name) == tree(made[0])
    assert tree(Path("output/images") / made[1].name) == tree(made[1])
    assert tree(Path("output/labels") / alone.name) == tree(alone)


@pytest.mark.parametrize(
    "module", [gen_prototype, gen_syn_image, distill, random_real, generate_soft_label, train_teacher, train_FKD]
)
def test_a_world_size_that_only_one_process_knows_is_refused_by_every_stage(module, made, model, refused, monkeypatch):
    """Doing all the work in each of two processes would be silent doubling."""
    argv = {
        gen_syn_image: stage_2(model, made),
        generate_soft_label: ["--data", str(made[1])],
        train_FKD: ["--train_dir", str(made[1]), "--fkd_path", "labels"],
        train_teacher: ["--dataset", "digits"],
        random_real: ["--dataset", "digits"],
    }.get(module, stage_1(model))
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(module.main, argv, "WORLD_SIZE=2, but this process has no RANK")
    for text in ("two", "-1", ""):
        monkeypatch.setenv("WORLD_SIZE", text)
        refused(module.main, argv, f"WORLD_SIZE={text}: expected a number")


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", "1/0", "0/", "٣/٤"])
def test_odd_shards_are_refused(shard, model, refused):
    refused(gen_prototype.main, stage_1(model, f"--shard={shard}"), f"--shard {shard}: expected I/N")


def finished_files(folder):
    """{name: bytes} of what lies under final names; a checkpoint, which is gone in the end, must load."""
    found = {name: data for name, data in tree(folder).items() if not name.startswith(".")}
    if found.pop("checkpoint_seed0.pt", None):
        load_checkpoint(folder / "checkpoint_seed0.pt", 3, settings_digest(read_json(folder / "args.json")))
    return found


def rank_dies(stage, rounds, seed):
    """SIGKILL to one of two ranks at random: the other ends its part, all files are whole, a rerun completes."""
    rng, wanted = random.Random(seed), tree(stage.reference)
    for _ in range(rounds):
        shutil.rmtree("output", ignore_errors=True)
        main = slowly(stage.main, 0.02)
        runs = [Forked(main, stage.argv, environment=rank_environment(rank, 2)) for rank in (0, 1)]
        while not any((stage.folder / name).exists() for name in sum(stage.units, [])) and runs[0].running():
            time.sleep(0.001)
        time.sleep(rng.random() * 0.2)
        victim = rng.randrange(2)
        runs[victim].send(signal.SIGKILL)
        ends = [run.wait() for run in runs]
        assert ends[1 - victim].status == 0, ends[1 - victim].err[-300:]
        found = finished_files(stage.folder)
        assert found.items() <= wanted.items() and set(found) >= {"args.json", *stage.units[1 - victim]}
        assert [end.status for end in at_once(stage.main, stage.argv, 2)] == [0, 0]
        assert tree(stage.folder) == wanted


def uninterrupted(stage, argv):
    """The bytes of two ranks that train to the end."""
    ends = at_once(stage.main, [*argv, "--output_dir", "straight"], 2, free_port())
    assert [end.status for end in ends] == [0, 0]
    return tree(Path("straight") / stage.reference.name)


def student_rank_dies(stage, rounds, seed):
    """Training needs both ranks: the other says so in one line, and the same command goes on from the checkpoint."""
    rng, argv = random.Random(seed), [*stage.argv, "--checkpoint_every", "1"]
    wanted = uninterrupted(stage, argv)
    for _ in range(rounds):
        shutil.rmtree("output", ignore_errors=True)
        port, victim, main = free_port(), rng.randrange(2), slowly(stage.main, 0.3)
        runs = [Forked(main, argv, environment=rank_environment(rank, 2, port)) for rank in (0, 1)]
        while not (stage.folder / "checkpoint_seed0.pt").exists() and runs[0].running():
            time.sleep(0.001)
        time.sleep(rng.random() * 0.3)
        runs[victim].send(signal.SIGKILL)
        end = [run.wait() for run in runs][1 - victim]
        assert end.status == 2 and "Traceback" not in end.err and len(end.errors) == 1, end.err[-500:]
        assert "another of the 2 processes has died; run the same command to go on" in end.errors[0]
        assert finished_files(stage.folder).items() <= wanted.items()
        assert (stage.folder / "checkpoint_seed0.pt").exists()
        assert [end.status for end in at_once(stage.main, argv, 2, free_port())] == [0, 0]
        assert tree(stage.folder) == wanted


@pytest.mark.parametrize("number", [1, 3])
def test_a_dying_rank_leaves_whole_files_and_a_rerun_completes(number, stages):
    rank_dies(stages[number], 1, seed=0)


def test_a_dying_rank_of_a_training_is_one_line_and_a_rerun_goes_on(stages):
    student_rank_dies(stages[4], 1, seed=0)


def stopped_after_an_epoch(main, module, argv):
    """A training that gets a stop signal in its first epoch, and leaves its checkpoint."""

    def run():
        original = module.train_step

        def signalled(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        module.train_step = signalled
        main(argv)

    assert Forked(run).wait().status == 75


TEACHER_ARGV = ["--dataset", "digits", "--arch", "convnet_mini", "--classes", "0-2", "--max_images_per_class", "12"]
TEACHER_ARGV += ["--epochs", "3", "--bn_batch", "16", "--num_workers", "0", "--device", "cpu"]


@pytest.mark.parametrize("training", [train_FKD, train_teacher], ids=["student", "teacher"])
def test_ranks_that_do_not_see_the_same_folder_are_refused(training, stages):
    """Two nodes whose --output_dir is each one's own disk: only rank 0's holds a checkpoint, or a finished run."""
    argv = stages[4].argv if training is train_FKD else TEACHER_ARGV

    def end_of_both(port):
        both = [[*argv, "--output_dir", f"node-{rank}"] for rank in (0, 1)]
        runs = [Forked(training.main, each, environment=rank_environment(r, 2, port)) for r, each in enumerate(both)]
        return [run.wait() for run in runs]

    stopped_after_an_epoch(training.main, training, [*argv, "--output_dir", "node-0"])
    for trained in (1, 3):
        for end in end_of_both(free_port()):
            assert end.status == 2 and len(end.errors) == 1, end.err[-500:]
            assert "ranks do not see the same --output_dir" in end.errors[0]
            assert f"epoch 0 and {trained}" in end.errors[0]
        training.main([*argv, "--output_dir", "node-0"])


@pytest.mark.parametrize("training", [train_FKD, train_teacher], ids=["student", "teacher"])
def test_no_rank_leaves_before_the_checkpoint_is_written(training, stages):
    """srun --kill-on-bad-exit and torchrun kill the others as soon as one has left."""
    argv, port = [*(stages[4].argv if training is train_FKD else TEACHER_ARGV), "--output_dir", "out"], free_port()

    def rank(number):
        save, step = training.save_checkpoint, training.train_step
        training.save_checkpoint = lambda *args: (time.sleep(1), save(*args))
        training.train_step = lambda *args: (number and os.kill(os.getpid(), signal.SIGTERM), step(*args))[1]
        training.main(argv)

    runs = [Forked(rank, number, environment=rank_environment(number, 2, port)) for number in (0, 1)]
    end = runs[1].wait()
    assert end.status == 75 and list(Path("out").glob("*/checkpoint_seed0.pt")), end.err[-500:]
    assert runs[0].wait().status == 75


def test_ranks_of_different_settings_are_refused(stages):
    argv, port = stages[4].argv, free_port()
    runs = [
        Forked(train_FKD.main, [*argv, "--adamw_lr", lr], environment=rank_environment(rank, 2, port))
        for rank, lr in enumerate(("0.001", "0.002"))
    ]
    for end in [run.wait() for run in runs]:
        assert end.status == 2 and "started with different settings" in end.errors[0], end.err[-500:]


@pytest.mark.slow
def test_10_kills_of_one_of_two_ranks(stages):
    for number, rounds in ((1, 3), (2, 2), (3, 3)):
        rank_dies(stages[number], rounds, seed=number)
    student_rank_dies(stages[4], 2, seed=4)


SLOW_STUDENT = """
import os, pathlib
from test_reliability_processes import slowly, train_FKD

pathlib.Path("rank-" + os.environ["RANK"]).write_text(str(os.getpid()))
slowly(train_FKD.main, 2)(None)
"""


@pytest.mark.slow
def test_torchrun_starts_a_student_again_whose_rank_died(stages):
    """--max-restarts: torchrun stops the other rank and starts both anew; they go on from the checkpoint."""
    argv = [*stages[4].argv, "--checkpoint_every", "1"]
    wanted = uninterrupted(stages[4], argv)
    Path("slow_student.py").write_text(SLOW_STUDENT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    with open("printed", "w") as printed:
        run = subprocess.Popen([*launch, "slow_student.py", *argv], env=environment, stdout=printed, stderr=printed)
    while not (stages[4].folder / "checkpoint_seed0.pt").exists() and run.poll() is None:
        time.sleep(0.01)
    first = [int(Path(f"rank-{rank}").read_text()) for rank in (0, 1)]
    os.kill(first[1], signal.SIGKILL)
    assert run.wait(300) == 0, Path("printed").read_text()[-2000:]
    assert not {int(Path(f"rank-{rank}").read_text()) for rank in (0, 1)} & set(first)
    assert tree(stages[4].folder) == wanted


# ---- one writer


def two_jobs(rounds, made, model):
    """Two jobs started at once in one folder: one works, the other says who holds it."""
    for n in range(rounds):
        argv = stage_1(model, "--save_prototype_path", f"out{n}")
        runs = [Forked(slowly(gen_prototype.main, 0.1), argv) for _ in range(2)]
        ends = [run.wait() for run in runs]
        assert sorted(end.status for end in ends) == [0, 2], [end.err for end in ends]
        loser = 0 if ends[0].status else 1
        [line] = ends[loser].errors
        assert f"out{n}" in line and f"process {runs[1 - loser].pid} on" in line and "is writing there" in line
        assert tree(Path(f"out{n}") / made[0].name) == tree(made[0])


def test_of_two_jobs_in_one_folder_one_works_and_one_says_who_holds_it(made, model):
    two_jobs(2, made, model)


@pytest.mark.slow
def test_20_starts_of_two_jobs(made, model):
    two_jobs(20, made, model)


def test_a_job_at_another_number_of_processes_is_kept_out_too(made, model):
    run = Forked(slowly(gen_prototype.main, 0.1), stage_1(model, "--shard", "0/2"))
    folder = Path("output/prototypes") / made[0].name
    while not (folder / "args.json").exists():
        time.sleep(0.01)
    end = forked(gen_prototype.main, stage_1(model))
    assert end.status == 2 and f"process {run.pid} on" in end.errors[0]
    assert run.wait().status == 0


def test_the_lock_of_a_killed_job_holds_nobody_up_even_if_its_readers_live_on():
    def job(_):
        with output_folder("--out", "out", {"a": 1}, Process(0, 1, CPU)):
            if not os.fork():  # a reading process, which inherits every open file
                time.sleep(5)
                os._exit(0)
            time.sleep(60)

    run = Forked(job, None)
    while not Path("out/.lock-0-of-1").exists() or not Path("out/args.json").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    run.send(signal.SIGKILL)
    run.wait()
    with output_folder("--out", "out", {"a": 1}, Process(0, 1, CPU)):
        pass


def test_a_finishing_process_takes_no_file_from_one_that_is_still_writing():
    """The sweep at the end removes the temporary files of the dead, not those of another rank at work."""
    with output_folder("--out", "out", {"a": 1}, Process(0, 2, CPU)):
        Path("out/unit").write_text("x")
        Path("out/.gone.another-host.1.tmp").write_text("half")

        def other(_):
            with output_folder("--out", "out", {"a": 1}, Process(1, 2, CPU)), atomic(Path("out/second")) as temporary:
                temporary.write_text("whole")
                Path("begun").touch()
                while not Path("written").exists():
                    time.sleep(0.01)

        run = Forked(other, None)
        while not Path("begun").exists():
            time.sleep(0.01)
        assert write_manifest("out", "images", {"a": 1}, ["unit"], {}) == []
        Path("written").touch()
        assert run.wait().status == 0 and Path("out/second").read_text() == "whole"
    with output_folder("--out", "out", {"a": 1}, Process(0, 2, CPU)):
        assert not list(Path("out").glob(".*.tmp"))


# ---- a full disk


def limited(main, size):
    """A stage that cannot write a file beyond `size` bytes, as on a full disk."""

    def run(argv):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        main(argv)

    return run


def disk_full(stage, sizes, *more):
    """At each size: one line that names the path, no truncated file under a final name; then the rerun completes."""
    wanted, folder, argv = tree(stage.reference), stage.folder, [*stage.argv, *more]
    for size in sizes:
        shutil.rmtree(folder, ignore_errors=True)
        end = forked(limited(stage.main, size), argv)
        assert end.status == 2, f"{size} bytes: {end.err[-300:]}"
        assert len(end.errors) == 1 and f"cannot write {folder}" in end.errors[0], (size, end.errors)
        assert "Traceback" not in end.err
        assert finished_files(folder).items() <= wanted.items(), f"{size} bytes left a truncated file"
        assert not [name for name in tree(folder) if name.endswith(".tmp")]
    assert forked(stage.main, argv).status == 0
    assert tree(folder) == wanted


def sizes_below(reference, count):
    """`count` sizes from one byte up to just below the largest file."""
    largest = max(len(data) for data in tree(reference).values())
    return sorted({1, largest - 1, *(int(largest ** (n / count)) for n in range(1, count))})


@pytest.mark.parametrize("count", [2, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_full_disk_leaves_no_truncated_file(number, count, stages):
    """6 sizes and more for each of the four stages in the long version."""
    sizes = sizes_below(stages[number].reference, count)
    assert len(sizes) >= count
    disk_full(stages[number], sizes)
    if number == 4:  # a checkpoint is larger than all that is left in the end
        disk_full(stages[4], sizes[-1:], "--checkpoint_every", "1")


def test_what_cannot_fit_is_refused_before_anything_is_made(made, model, refused, monkeypatch):
    monkeypatch.setattr(files, "free_space", lambda folder: 1000)
    refused(gen_prototype.main, stage_1(model), "--save_prototype_path", "needs about", "MiB are free there")
    refused(gen_syn_image.main, stage_2(model, made), "--save_init_image_path", "needs about")
    assert not Path("output").exists()


# ---- stop signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_finishes_the_unit_and_says_how_to_go_on(number, made, model):
    for main, argv, pattern, reference, root in (
        (gen_prototype.main, stage_1(model), "0*.json", made[0], "output/prototypes"),
        (gen_syn_image.main, stage_2(model, made), "*/*.png", made[1], "output/images"),
    ):
        folder = Path(root) / reference.name
        run = Forked(slowly(main, 0.05), argv)
        while not list(folder.glob(pattern)) and run.running():
            time.sleep(0.002)
        run.send(number)
        end = run.wait()
        assert end.status == 75 and end.err.count("run the same command to go on") == 1
        assert not (folder / MANIFEST).exists() and not list(folder.rglob(".*"))
        assert tree(folder).items() <= tree(reference).items()
        main(argv)
        assert tree(folder) == tree(reference)


def test_a_stop_signal_at_the_end_of_an_arm_begins_no_other(made, model):
    def signalled(argv):
        original = gen_syn_image.finish_folder
        gen_syn_image.finish_folder = lambda *args: (os.kill(os.getpid(), signal.SIGTERM), original(*args))[1]
        gen_syn_image.main(argv)

    end = Forked(signalled, stage_2(model, made, "--arm", "d4m", "decoded", "noise")).wait()
    assert end.status == 75 and "left at once; run the same command to go on" in end.err
    assert [folder.name for folder in Path("output/images").iterdir()] == [made[1].name]
    assert gen_syn_image.main(stage_2(model, made)) and tree(Path("output/images") / made[1].name) == tree(made[1])


@pytest.mark.parametrize("module", [gen_prototype, random_real], ids=lambda m: m.__name__)
def test_a_stop_signal_while_the_manifest_is_written_leaves_at_once(module, made, model):
    argv = stage_1(model) if module is gen_prototype else ["--dataset", "digits", "--classes", "0-2"]
    name = "write_manifest" if module is gen_prototype else "finish_folder"

    def signalled(argv):
        original = getattr(module, name)
        setattr(module, name, lambda *args: (os.kill(os.getpid(), signal.SIGTERM), original(*args))[1])
        module.main(argv)

    assert Forked(signalled, argv).wait().status == 75
    assert not list(Path("output").rglob(MANIFEST))
    assert (module.main(argv) / MANIFEST).exists()


def test_a_stop_signal_while_loading_leaves_at_once(model):
    def loading(argv):
        gen_prototype.load_pipeline = lambda *a, **k: time.sleep(30)
        gen_prototype.main(argv)

    run, begin = Forked(loading, stage_1(model)), time.monotonic()
    time.sleep(1)
    run.send(signal.SIGTERM)
    end = run.wait()
    assert end.status == 75 and "run the same command to go on" in end.err and time.monotonic() - begin < 20
