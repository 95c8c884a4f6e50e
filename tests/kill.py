"""Stop each stage at random instants, run the same command again, compare with a run left alone.

    python -m tests.kill --kills 200          # SIGKILL over the four stages
    python -m tests.kill --kills 50 --signal TERM --ranks 2

Digits and a tiny model on the CPU. Runs are forked from this process, which has imported everything
already; else only imports would be hit. A signal counts if it falls between the first unit's file
and the manifest; the histogram says how many of the units were finished then. After each, every
file must be whole; the command is run again (and perhaps stopped again) until it ends. Then the
tree, logs and timing aside, must be that of the uninterrupted run. No unit is made twice: those
that were there before a run must be the very same files after it (inode and time), and the run
that ends must say that it made what was missing. Exit status 1 if not.
"""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from scripts import files, generators, output
from scripts.runtime import EXIT_STOPPED, STOP_SIGNALS, Parser, number, refuse

MODEL = Path(__file__).parent.parent / "misc" / "tiny-sd-digits"
WAIT = 120  # seconds after which a run counts as hanging
COUNTS = ("counted", "sent", "unreadable", "different", "completed", "twice", "kept")


# ---- forked runs


class Ended(NamedTuple):
    """How a forked run ended: exit status (or minus the signal that killed it), stdout, stderr."""

    status: int
    out: str
    err: str


class Forked:
    """`function(*args)` in a forked child: what this process has imported needs no import again."""

    def __init__(self, function, *args, environment=None):
        self.files = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in "oe"]
        where = multiprocessing.get_context("fork")
        self.process = where.Process(target=self._child, args=(function, args, environment or {}))
        self.process.start()

    def _child(self, function, args, environment):
        for descriptor, file in zip((1, 2), self.files):
            os.dup2(file.fileno(), descriptor)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
        os.environ.update(environment)
        tqdm.set_lock(threading.RLock())  # forks share its own: one killed with it stops all
        for stop in STOP_SIGNALS:
            signal.signal(stop, signal.SIG_DFL)
        function(*args)

    def running(self):
        return self.process.is_alive()

    def send(self, stop):
        if self.running():
            os.kill(self.process.pid, stop)

    def wait(self, seconds=WAIT) -> Ended:
        self.process.join(seconds)
        self.send(signal.SIGKILL)
        self.process.join()
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return Ended(self.process.exitcode, *texts)


def rank_environment(rank, world, port=0):
    """What torchrun puts into the environment of a rank."""
    names = {"WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": world}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in {**names, **where}.items()}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- one stage


def tree(folder):
    """{relative path: sha256} of every file below, hidden ones too; timing and logs aside."""
    return {
        path.relative_to(folder).as_posix(): files.sha256(path)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name not in (output.TIMING, output.LOG)
    }


def damaged(folder, wanted):
    """Files under final names with other content than in `wanted`; a checkpoint has to load."""
    found = {n: d for n, d in tree(folder).items() if not Path(n).name.startswith(".")}
    bad = [name for name, digest in found.items() if digest != wanted.get(name, digest)]
    for name in found.keys() - wanted.keys():
        try:
            torch.load(folder / name, map_location="cpu", weights_only=True)
        except Exception:  # whatever a damaged file raises
            bad.append(name)
    return bad


class Stage(NamedTuple):
    """A stage that makes one folder below `root`.

    units   groups of files that are made together;   epochs: of a training, whose files are no
            units but checkpoints
    """

    name: str
    main: object
    argv: list
    root: Path
    units: list
    epochs: int = 0

    @property
    def folder(self):
        return next((path.parent for path in self.root.glob(f"*/{output.ARGS}")), self.root)

    def begun(self):
        return any((self.folder / name).exists() for group in self.units for name in group)

    def finished(self):
        return output.is_complete(self.folder)

    def done(self):
        """{unit: [(inode, time of change)] of its files} of what is finished; no files: epochs."""
        found = {}
        with contextlib.suppress(FileNotFoundError):
            if (self.folder / "seed0.json").exists():
                found = dict.fromkeys(range(self.epochs))
            elif self.epochs:  # the checkpoint goes when the other files are there
                state = torch.load(self.folder / "checkpoint_seed0.pt", weights_only=True)
                found = dict.fromkeys(range(len(state["rows"])))
        for unit, group in enumerate(self.units if not self.epochs else ()):
            with contextlib.suppress(FileNotFoundError):
                stats = [(self.folder / name).stat() for name in group]
                found[unit] = [(stat.st_ino, stat.st_mtime_ns) for stat in stats]
        return found

    def share(self):
        return len(self.done()) / (self.epochs or len(self.units))

    def logged(self):
        """What the runs that came to their end say that they have made, one number for each."""
        rows = output.log_rows(self.folder)
        return [row["units"] for row in rows if row.get("event") == "run"]

    def made_twice(self, before, logged, world):
        """What a run made that was there before it, or None.   before, logged: from before it"""
        after, made = self.done(), self.logged()[len(logged) :]
        again = [self.units[n] for n, stamp in before.items() if stamp and after.get(n) != stamp]
        if again:
            return f"{again[:2]} were there and were written again"
        missing = (self.epochs or len(self.units)) - len(before)
        made = [sum(made) // len(self.units[0])] if not self.epochs else made
        if len(self.logged()) == len(logged) + world and set(made) != {missing}:
            return f"{made} made, {missing} were missing"
        return None


class Harness:
    """Runs one stage under signals; `wanted` is the tree of the uninterrupted run."""

    def __init__(self, stage, world, rng):
        self.stage, self.world, self.rng = stage, world, rng
        first, runs = None, self.start()
        while any([run.running() for run in runs]) and not stage.finished():
            first = first or (time.monotonic() if stage.begun() else None)
            time.sleep(0.0005)
        self.seconds = time.monotonic() - (first or time.monotonic())  # first file to manifest
        failed = [end.err[-500:] for end in (run.wait() for run in runs) if end.status]
        if failed:
            refuse(f"{stage.name}: the uninterrupted run failed: {failed}")
        self.wanted = tree(stage.root)

    def start(self):
        """The stage's processes."""
        port, ranks = free_port(), range(self.world)
        places = [rank_environment(rank, self.world, port) for rank in ranks]
        places = places if self.world > 1 else [None]
        return [Forked(self.stage.main, self.stage.argv, environment=place) for place in places]

    def stop_once(self, stop):
        """Start, send the signal `stop` at a random instant; (share of the units or None, ends).

        The share that was finished then; None if it came before the first unit's file or after the
        manifest. SIGKILL hits one of several ranks, other signals all.
        """
        stage, runs, length = self.stage, self.start(), 2 * self.seconds
        while not stage.begun() and any([run.running() for run in runs]):
            time.sleep(0.0005)
            length = 1.1 * self.seconds  # from the first file on; a rerun is hit from its start on
        until = time.monotonic() + self.rng.random() * length
        while time.monotonic() < until and any([run.running() for run in runs]):
            time.sleep(0.0005)
        kill = stop == signal.SIGKILL
        victims = [self.rng.choice(runs)] if kill else runs
        begun, share = stage.begun(), stage.share()
        for run in victims:
            run.send(stop)
        if kill:
            victims[0].process.join()
            share = stage.share()  # what the dead one left
            for run in runs if stage.epochs else ():  # the others wait for it
                run.send(stop)
        hit = begun and not stage.finished()
        ends = {run: run.wait() for run in runs}
        hit = hit and all(ends[run].status for run in victims)
        self.seconds *= 1.03 if hit else 0.93  # the machine is busier or less busy than at first
        return share if hit else None, list(ends.values())

    def torture(self, stop, kills, most):
        """`kills` counted signals in at most so many seconds   -> report"""
        stage, start = self.stage, time.monotonic()
        report = {**dict.fromkeys(COUNTS, 0), "shares": [], "problems": []}
        wrong = report["problems"]

        def look(run, *args):
            """What is wrong after a run."""
            before, logged = stage.done(), stage.logged()
            result = run(*args)
            twice = stage.made_twice(before, logged, self.world)
            bad = damaged(stage.root, self.wanted)
            wrong.extend([twice] * bool(twice) + [f"{name} is damaged" for name in bad])
            report["twice"] += bool(twice)
            report["unreadable"] += len(bad)
            report["kept"] += len(before)
            return result

        while report["counted"] < kills and time.monotonic() - start < most:
            shutil.rmtree(stage.root)
            chance = 1.0
            while not stage.finished() and report["counted"] < kills and self.rng.random() < chance:
                share, ends = look(self.stop_once, stop)
                report["sent"] += 1
                chance = 0.5
                if share is not None:
                    report["counted"] += 1
                    report["shares"].append(share)
                    wrong.extend(filter(None, (check_end(end, stop) for end in ends)))
            ends = look(lambda: [run.wait() for run in self.start()])
            wrong.extend(f"the rerun failed: {end.err[-300:]}" for end in ends if end.status)
            report["completed"] += 1
            odd = sorted({name for name, _ in tree(stage.root).items() ^ self.wanted.items()})
            report["different"] += bool(odd)
            wrong.extend([f"{odd[:5]} differ from the uninterrupted run"] * bool(odd))
        if report["counted"] < kills:
            wrong.append(f"only {report['counted']} signals in {most:.0f} s")
        return report


def check_end(end, stop):
    """What is wrong with how a run ended that got the signal `stop`, or None."""
    words = "run the same command to go on"
    if end.status == EXIT_STOPPED and words in end.err and "Traceback" not in end.err:
        return None
    if stop == signal.SIGKILL or end.status == 0 or (end.status == -int(stop) and not end.err):
        return None  # the last: it came before the process had begun
    return f"status {end.status}: {end.err[-300:]}"


# ---- the four stages


def stages(root, model, small):
    """The four stages and the teacher between them; each is asked for when the last is finished."""
    from distillation import gen_prototype, gen_syn_image
    from matching import generate_soft_label, train_teacher
    from validate import train_FKD

    classes, most, epochs = (5, 12, 8) if small else (10, 40, 24)
    digits = ["--dataset", "digits", "--num_workers", "0", "--device", "cpu"]
    chosen = ["--classes", f"0-{classes - 1}"]
    method = ["--diffusion_checkpoints_path", model, "--ipc", "4", "--km_expand", "1"]

    def stage(name, module, flags, out_flag, units, epochs=0):
        argv = [*digits, *map(str, flags), out_flag, str(root / name)]
        return Stage(name, module.main, argv, root / name, units, epochs)

    flags = [*method, *chosen, "--batch_size", "8", "--max_images_per_class", most]
    units = [[f"{c:04d}_{c}.json"] for c in range(classes)]
    first = stage("1-prototypes", gen_prototype, flags, "--save_prototype_path", units)
    yield first
    flags = [*method, "--prototype_path", first.folder, "--num_inference_steps", "3"]
    units = [[f"{c}/{c}_{i:04d}.png" for i in range(4)] for c in range(classes)]
    flags += ["--batch_size", "4"]
    images = stage("2-images", gen_syn_image, flags, "--save_init_image_path", units)
    yield images
    flags = [*chosen, "--arch", "convnet_mini", "--epochs", "2", "--max_images_per_class", "30"]
    teacher = stage("teacher", train_teacher, flags, "--output_dir", [["model.safetensors"]], 2)
    yield teacher
    flags = ["--data", images.folder, "--arch", "convnet_mini", "--epochs", epochs]
    flags += ["--teacher_checkpoint", teacher.folder, "--batch_size", "16"]
    units = [[f"epoch_{epoch:04d}.safetensors"] for epoch in range(epochs)]
    labels = stage("3-soft-labels", generate_soft_label, flags, "--fkd_path", units)
    yield labels
    flags = ["--train_dir", images.folder, "--fkd_path", labels.folder, "--model", "convnet_mini"]
    flags += ["--bn_batch", "16", "--eval_every", "4", "--checkpoint_every", "1"]
    units = [["checkpoint_seed0.pt", "student_seed0.safetensors"]]
    yield stage("4-student", train_FKD, flags, "--output_dir", units, epochs)


def run(root, model, kills, stop=signal.SIGKILL, world=1, seed=0, hit="1234", small=False):
    """The whole test; {stage: report}.   hit: which stages"""
    import accelerate  # noqa: F401  (once, before the forks; diffusers with the model)
    import sklearn.cluster  # noqa: F401

    generators.load(str(model), torch.device("cpu"))
    rng, reports = random.Random(seed), {}
    for stage in stages(Path(root), model, small):
        harness, n = Harness(stage, world, rng), hit.find(stage.name[0])
        if n >= 0:
            share = kills // len(hit) + (n < kills % len(hit))
            reports[stage.name] = harness.torture(stop, share, most=3600)
        if len(reports) == len(hit):
            break
    return reports


def histogram(shares):
    """Counts by tenths of the units; the last: all units were there, and no manifest."""
    tenths = [int(share * 10 + 1e-9) for share in shares]
    return [tenths.count(n) for n in range(11)]


def print_report(reports):
    print("stage          counted  sent  by tenths of the units finished then; last: all of them")
    for name, r in reports.items():
        bars = " ".join(f"{n:>3}" for n in histogram(r["shares"]))
        print(f"{name:<15}{r['counted']:>7}{r['sent']:>6}  {bars}")
    total = {key: sum(r[key] for r in reports.values()) for key in COUNTS}
    words = "{counted} counted: {unreadable} unreadable files, {different} of {completed} finished "
    words += "trees differ, {twice} runs made something twice ({kept} units were there before one)"
    print(words.format(**total))


def get_args(argv=None):
    parser, count = Parser("tests.kill", __doc__), number(int, 1)
    parser.flag("--kills", type=count, default=200, help="signals that count, over all stages")
    parser.flag("--stages", default="1234", help="which of them, such as 13")
    parser.flag("--signal", choices=("KILL", "TERM", "USR1"), default="KILL")
    parser.flag("--ranks", type=count, default=1, help="processes; SIGKILL hits one of them")
    parser.flag("--size", choices=("full", "small"), default="full", help="of the work")
    parser.flag("--seed", type=number(int, 0), default=0, help="of the instants")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    if not args.stages or set(args.stages) - set("1234"):
        refuse(f"--stages {args.stages}: expected some of 1234")
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    how = (signal.Signals[f"SIG{args.signal}"], args.ranks, args.seed, args.stages)
    with tempfile.TemporaryDirectory(prefix="d4m-kill-") as root:
        reports = run(root, MODEL, args.kills, *how, small=args.size == "small")
    print_report(reports)
    problems = [f"{name}: {what}" for name, r in reports.items() for what in r["problems"]]
    print("".join(f"PROBLEM {problem}\n" for problem in problems[:20]), end="")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
