"""Kill test: stop each stage at random instants, run the same command again, compare with the run that was let alone.

    python -m misc.kill_test --kills 200            # SIGKILL over the four stages, about 10 minutes on 2 cores
    python -m misc.kill_test --kills 50 --signal TERM --ranks 2

Digits and a tiny model on the CPU. Every run is forked from this process, in which everything is imported already;
else imports would be all that is hit. A kill counts if it falls between the first unit's file and the manifest; the
histogram says how many of the units were finished then. After each, every file must be whole; the command is run
again (and perhaps killed again) until it ends; then the tree, logs and timing aside, must be that of the uninterrupted
run, and the units that were there before a run must be the very files that are there after it (inode and time). Exit
status 1 if not.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m misc.kill_test", file=sys.stderr)
    sys.exit(2)

import contextlib
import fcntl
import hashlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from scripts.files import MANIFEST, VOLATILE
from scripts.runtime import EXIT_STOPPED, Parser, positive_int, refuse

EMBEDDED_MODEL = Path(__file__).parent / "tiny-sd-digits"
WAIT = 120  # seconds after which a run counts as hanging


# ---- forked runs


class Ended(NamedTuple):
    """How a forked run ended: exit status (or minus the signal that killed it), its stdout and stderr."""

    status: int
    out: str
    err: str

    @property
    def errors(self):
        """Its refusals: a progress bar is written over with carriage returns."""
        return [line for line in self.err.replace("\r", "\n").split("\n") if line.startswith("error: ")]


class Forked:
    """`function(*args)` in a forked child: what this process has imported needs no importing again."""

    def __init__(self, function, *args, environment=None):
        sys.stdout.flush()
        sys.stderr.flush()
        pipes = [os.pipe(), os.pipe()]
        self.pid = os.fork()
        if not self.pid:
            self._child(function, args, environment or {}, [write for _, write in pipes])
        for read, write in pipes:
            os.close(write)
            os.set_blocking(read, False)
            with contextlib.suppress(OSError):
                fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, 2**20)
        self.reads, self.texts, self.status = [read for read, _ in pipes], [b"", b""], None

    @staticmethod
    def _child(function, args, environment, writes):
        status = 70
        try:
            for number, write in zip((1, 2), writes):
                os.dup2(write, number)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False, encoding="utf-8") for n in (1, 2))
            os.environ.update(environment)
            tqdm.set_lock(threading.RLock())  # its own is shared by all forks: one killed while it holds it stops all
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            function(*args)
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _drain(self):
        for n, read in enumerate(self.reads):
            with contextlib.suppress(BlockingIOError):
                while chunk := os.read(read, 2**16):
                    self.texts[n] += chunk

    def running(self):
        self._drain()
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is None

    def send(self, number):
        if self.running():
            os.kill(self.pid, number)

    def wait(self, seconds=WAIT) -> Ended:
        end = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
            time.sleep(0.002)
        self._drain()
        for read in self.reads:
            os.close(read)
        self.reads = []
        return Ended(self.status, *(text.decode(errors="replace") for text in self.texts))


def forked(function, *args, **kwargs) -> Ended:
    """Run to its end in a forked child."""
    return Forked(function, *args, **kwargs).wait()


def rank_environment(rank, world, port=0):
    """What torchrun puts into the environment of a rank."""
    return {
        "WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- trees


def tree(folder):
    """{relative path: sha256} of every file below, hidden ones too; timing and logs aside."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and p.name not in VOLATILE
    }


def is_temporary(name):
    return Path(name).name.startswith(".")


def damaged(folder, wanted):
    """Files under their final names that are not what the uninterrupted run has; a checkpoint must load."""
    bad = []
    for name, digest in tree(folder).items():
        if is_temporary(name):
            continue
        if name in wanted:
            if digest != wanted[name]:
                bad.append(name)
        else:
            try:
                torch.load(folder / name, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever a damaged file raises
                bad.append(f"{name} ({type(error).__name__})")
    return bad


# ---- the stages


class Stage(NamedTuple):
    """One stage of the test.

    units     the final names of its units, in groups that are made together; for stage 4, its epochs
    first     a pattern of the first file that says that a unit is finished
    tally     a file that gets a byte for every epoch that stage 4 trains, which leaves no file of its own
    """

    name: str
    main: object
    argv: list
    folder: Path
    units: list
    first: str
    tally: Path | None = None


def tallied(module, name, path):
    """`module.main` with a byte in `path` for every call of `module.name` in rank 0; only in a forked child."""

    def main(argv):
        original = getattr(module, name)

        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            if os.environ.get("RANK", "0") == "0":
                with open(path, "ab") as file:
                    file.write(b".")
            return result

        setattr(module, name, call)
        return module.main(argv)

    return main


DIGITS = ["--dataset", "digits", "--num_workers", "0", "--device", "cpu"]
IPC, EPOCHS, BATCH = 4, 24, 4


def build_stages(root, model, size="full"):
    """The four stages and the teacher between them, with outputs below `root`; a `small` size for a quick look."""
    from distillation import gen_prototype, gen_syn_image
    from matching import generate_soft_label, train_teacher
    from validate import train_FKD

    classes, most, epochs = (10, 40, EPOCHS) if size == "full" else (5, 12, 8)
    chosen, last = ["--classes", f"0-{classes - 1}"], f"0-{classes - 1}"
    prototypes = root / f"prototypes/digits-ipc{IPC}-kmexpand1_classes-{last}_max{most}"
    images = root / f"images/digits_ipc{IPC}_s0.7_g8_kmexpand1_steps3_classes-{last}_max{most}"
    model_flags = ["--diffusion_checkpoints_path", str(model)]
    pngs = [f"{c}/{c}_{i:04d}.png" for c in range(classes) for i in range(IPC)]
    teachers = root / "teachers"
    stages = [
        Stage(
            "1 prototypes",
            gen_prototype.main,
            [*DIGITS, *model_flags, *chosen, "--ipc", str(IPC), "--km_expand", "1", "--batch_size", "8",
             "--max_images_per_class", str(most), "--save_prototype_path", str(root / "prototypes")],
            prototypes,
            [[f"{c:04d}_{c}.json"] for c in range(classes)],
            "0*.json",
        ),
        Stage(
            "2 images",
            gen_syn_image.main,
            [*DIGITS, *model_flags, "--ipc", str(IPC), "--km_expand", "1", "--prototype_path", str(prototypes),
             "--num_inference_steps", "3", "--batch_size", str(BATCH), "--save_init_image_path", str(root / "images")],
            images,
            [pngs[i : i + BATCH] for i in range(0, len(pngs), BATCH)],
            "*/*.png",
        ),
        Stage(
            "teacher",
            train_teacher.main,
            [*DIGITS, *chosen, "--arch", "convnet_mini", "--epochs", "2", "--max_images_per_class", "30",
             "--output_dir", str(teachers)],
            teachers,
            [],
            "*/model.safetensors",
        ),
    ]  # fmt: skip

    def matching(teacher):
        labels = [*DIGITS, "--data", str(images), "--arch", "convnet_mini", "--teacher_checkpoint", str(teacher),
                  "--epochs", str(epochs), "--batch_size", "16", "--fkd_path", str(root / "labels")]  # fmt: skip
        return Stage(
            "3 soft labels", generate_soft_label.main, labels, root / "labels",
            [[f"epoch_{e:04d}.safetensors"] for e in range(epochs)], "*/epoch_*.safetensors",
        )  # fmt: skip

    def training(labels):
        return Stage(
            "4 student",
            tallied(train_FKD, "train_epoch", root / "tally"),
            [*DIGITS, "--train_dir", str(images), "--fkd_path", str(labels), "--model", "convnet_mini", "--bn_batch",
             "16", "--eval_every", "4", "--checkpoint_every", "1", "--output_dir", str(root / "students")],
            root / "students",
            [[epoch] for epoch in range(epochs)],
            "*/[cs]*seed0.*",
            root / "tally",
        )  # fmt: skip

    return stages, matching, training


def only_child(folder):
    """The one folder that a stage made below its output root."""
    [child] = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    return child


class Harness:
    """Runs one stage under signals; `wanted` is the tree of the uninterrupted run."""

    def __init__(self, stage, world, rng):
        self.stage, self.world, self.rng = stage, world, rng
        self.run_seconds, self.wanted = 0.0, {}

    def start(self):
        """The stage's processes."""
        if self.world == 1:
            return [Forked(self.stage.main, self.stage.argv)]
        port = free_port()
        return [
            Forked(self.stage.main, self.stage.argv, environment=rank_environment(rank, self.world, port))
            for rank in range(self.world)
        ]

    def reference(self):
        """The uninterrupted run; keeps its tree, and how long it lasts from the first unit's file to the manifest."""
        runs, first, begin = self.start(), None, time.monotonic()
        while any([run.running() for run in runs]):
            if first is None and self.begun():
                first = time.monotonic()
            if self.finished() or time.monotonic() > begin + WAIT:
                break
            time.sleep(0.0005)
        self.run_seconds = time.monotonic() - (first or time.monotonic())
        ends = [run.wait() for run in runs]
        if any(end.status for end in ends):
            refuse(f"{self.stage.name}: the uninterrupted run failed: {ends[0].err[-500:]} {ends[-1].err[-500:]}")
        self.wanted = tree(self.stage.folder)

    def begun(self):
        return next(self.stage.folder.glob(self.stage.first), None) is not None

    def finished(self):
        folder = self.stage.folder
        return (folder / MANIFEST).exists() or next(folder.glob(f"*/{MANIFEST}"), None) is not None

    def base(self):
        """The folder that holds the units: stage 3 and 4 make one below their root."""
        return self.stage.folder if self.stage.name[0] in "12" else only_child(self.stage.folder)

    def epochs_done(self):
        """Epochs of stage 4 that need not be trained again."""
        files = [self.base() / name for name in ("student_seed0.safetensors", "seed0.json", "checkpoint_seed0.pt")]
        with contextlib.suppress(FileNotFoundError):  # the checkpoint goes when the other two are there
            if not all(path.exists() for path in files[:2]):
                return torch.load(files[2], map_location="cpu", weights_only=True)["epoch"]
        return len(self.stage.units) if all(path.exists() for path in files[:2]) else 0

    def finished_units(self):
        """{name: (inode, time of its last change)} of the files of whole units; stage 4 has none."""
        stamps = {}
        for group in self.stage.units if self.begun() and not self.stage.tally else []:
            paths = [self.base() / name for name in group]
            with contextlib.suppress(FileNotFoundError):
                stamps |= {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}
        return stamps

    def progress(self):
        """Share of the units that are finished."""
        if not self.begun():
            return 0.0
        done = self.epochs_done() if self.stage.tally else len(self.finished_units())
        return done / sum(map(len, self.stage.units))

    def too_much(self, before, done, ended):
        """What a run made that was there already, from what `before` and `done` were before it; says so, or None."""
        if self.stage.tally:
            made = self.stage.tally.stat().st_size if self.stage.tally.exists() else 0
            most = len(self.stage.units) - done
            return f"{made} epochs trained, {most} were missing" if made > most or (ended and made < most) else None
        after = self.finished_units()
        redone = sorted(name for name, stamp in before.items() if after.get(name) != stamp)
        return f"{redone[:3]} were there and were written again" if redone else None

    def stop_once(self, number, whom):
        """Start, send signal `number` at a random instant to `whom` ("all", or one rank); (share of the units, ends).

        The share of the units that were finished then; None if the signal came before the first unit's file, or after
        the manifest or the end of the process.
        """
        fresh = not self.begun()
        runs, begin = self.start(), time.monotonic()
        while fresh and not self.begun() and any([run.running() for run in runs]) and time.monotonic() < begin + WAIT:
            time.sleep(0.0005)
        # a rerun is hit anywhere, from its start on
        length = self.run_seconds if fresh else self.run_seconds + (time.monotonic() - begin)
        end = time.monotonic() + self.rng.random() * length * 1.1
        while time.monotonic() < end and any([run.running() for run in runs]):
            time.sleep(0.0005)
        victims = runs if whom == "all" else [runs[whom]]
        begun, share = self.begun(), self.progress()
        for run in victims:
            run.send(number)
        if number == signal.SIGKILL:
            while any([run.running() for run in victims]):
                pass
            share = self.progress() if begun else None  # what the dead one left
        hit = begun and not self.finished()
        collective = self.stage.name.startswith("4") and whom != "all"  # the others wait for the dead one
        if collective:
            time.sleep(0.2)
            for run in runs:
                run.send(signal.SIGKILL)
        ends = [run.wait() for run in runs]
        hit = hit and all(ends[runs.index(run)].status != 0 for run in victims)
        self.run_seconds *= 1.03 if hit else 0.93  # the machine is busier or less busy than at the first run
        return (share if hit else None), ends

    def new_tally(self):
        if self.stage.tally:
            self.stage.tally.unlink(missing_ok=True)

    def check_made(self, before, done, report, ended=False):
        """After a run: whether it made what was there already; returns what is there now, and starts a new tally."""
        problem = self.too_much(before, done, ended)
        if problem:
            report["too_much"] += 1
            report["problems"].append(f"{self.stage.name}: {problem}")
        report["kept"] += done or len(before)
        self.new_tally()
        return self.finished_units(), self.epochs_done() if self.stage.tally and self.begun() else 0

    def finish(self):
        """Run to the end."""
        ends = [run.wait() for run in self.start()]
        return [end for end in ends if end.status]


def check_end(end, number):
    """What is wrong with how a run ended that got signal `number`, or None."""
    if end.status in (0, -int(signal.SIGKILL)):
        return None
    if end.status == -int(number) and not end.err:  # before the process had begun
        return None
    if end.status == EXIT_STOPPED and "run the same command to go on" in end.err and "Traceback" not in end.err:
        return None if number != signal.SIGKILL else "left by itself"
    return f"status {end.status}: {end.err[-300:]}"


def torture(harness, number, kills, seconds, report):
    """`kills` counted signals for one stage: fills `report`."""
    stage, start = harness.stage, time.monotonic()
    while report["counted"] < kills:
        if time.monotonic() - start > seconds:
            report["problems"].append(f"{stage.name}: only {report['counted']} signals within {seconds:.0f} s")
            break
        shutil.rmtree(stage.folder)
        harness.new_tally()
        before, done, chance = {}, 0, 1.0
        while harness.rng.random() < chance and not harness.finished() and report["counted"] < kills:
            chance = 0.5
            whom = "all" if number != signal.SIGKILL or harness.world == 1 else harness.rng.randrange(harness.world)
            share, ends = harness.stop_once(number, whom)
            report["sent"] += 1
            before, done = harness.check_made(before, done, report)
            if share is not None:
                report["counted"] += 1
                report["shares"].append(share)
                if number != signal.SIGKILL:
                    report["problems"] += [f"{stage.name}: {p}" for p in (check_end(e, number) for e in ends) if p]
            report["temporary"] += sum(map(is_temporary, tree(stage.folder)))
            bad = damaged(stage.folder, harness.wanted)
            report["unreadable"] += len(bad)
            report["problems"] += [f"{stage.name}: {name} is damaged" for name in bad]
        failed = harness.finish()
        harness.check_made(before, done, report, ended=not failed)
        report["problems"] += [f"{stage.name}: the rerun failed: {end.err[-300:]}" for end in failed]
        report["completed"] += 1
        if tree(stage.folder) != harness.wanted:
            report["different"] += 1
            new = tree(stage.folder)
            odd = sorted(k for k in {**new, **harness.wanted} if new.get(k) != harness.wanted.get(k))
            report["problems"].append(f"{stage.name}: {odd[:5]} differ from the uninterrupted run")


BINS = 10


def histogram(shares):
    """Counts by tenths of the units; the last: all units were there, and no manifest."""
    counts = [0] * (BINS + 1)
    for share in shares:
        counts[int(share * BINS + 1e-9)] += 1
    return counts


def print_report(reports, number, world, seconds):
    print(f"\n{signal.Signals(number).name}, {world} process{'es' * (world > 1)}, {seconds:.0f} s")
    print(f"{'stage':<15}{'counted':>8}{'sent':>6}  by tenths of the units finished when it fell; last: all of them")
    for name, r in reports.items():
        bars = " ".join(f"{n:>3}" for n in histogram(r["shares"]))
        print(f"{name:<15}{r['counted']:>8}{r['sent']:>6}  {bars}")
    total = {key: sum(r[key] for r in reports.values()) for key in COUNTS}
    print(
        f"{total['counted']} counted: {total['unreadable']} unreadable files, {total['different']} of "
        f"{total['completed']} finished trees differ, {total['too_much']} runs made more than was missing "
        f"({total['kept']} units were there before a run, {total['temporary']} temporary files seen)"
    )


COUNTS = ("counted", "sent", "unreadable", "different", "completed", "too_much", "kept", "temporary")


def run(root, model, kills, number=signal.SIGKILL, world=1, seed=0, numbers="1234", size="full", seconds=3600):
    """The whole test; returns {stage name: report}. `numbers`: which stages are hit."""
    rng, reports = random.Random(seed), {}
    stages, matching, training = build_stages(root, model, size)
    hit = [n for n in "1234" if n in numbers]
    share = {n: kills // len(hit) + (i < kills % len(hit)) for i, n in enumerate(hit)}

    def hit_stage(stage):
        harness = Harness(stage, world, rng)
        harness.reference()
        n = stage.name[0]
        print(f"{stage.name}: {harness.run_seconds:.2f} s from the first file to the manifest", file=sys.stderr)
        if n in hit and share[n]:
            report = reports[stage.name] = {**dict.fromkeys(COUNTS, 0), "shares": [], "problems": []}
            torture(harness, number, share[n], seconds, report)
        return stage.folder

    for stage in stages:
        if stage.name == "teacher" and not set(hit) & set("34"):
            return reports
        if stage.name[0] != "1" and hit == ["1"]:
            return reports
        hit_stage(stage)
    labels = only_child(hit_stage(matching(only_child(root / "teachers"))))
    if "4" in hit:
        hit_stage(training(labels))
    return reports


def get_args(argv=None):
    parser = Parser(prog="misc.kill_test", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=positive_int, default=200, help="signals that count, over all stages")
    parser.add_argument("--stages", default="1234", help="which of them, such as 13")
    parser.add_argument("--signal", choices=("KILL", "TERM", "USR1"), default="KILL")
    parser.add_argument("--ranks", type=positive_int, default=1, help="processes; SIGKILL then hits one of them")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="of the work that is interrupted")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--diffusion_checkpoints_path", default=str(EMBEDDED_MODEL), help="a tiny Stable Diffusion")
    parser.add_argument("--minutes", type=float, default=60, help="at most, for each stage")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    if set(args.stages) - set("1234"):
        refuse(f"--stages {args.stages}: expected some of 1234")
    torch.set_num_threads(1)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import accelerate  # noqa: F401  (once, before the forks)
    import sklearn.cluster  # noqa: F401

    import scripts.pipeline_stable_diffusion_gen_latents
    import scripts.pipeline_stable_diffusion_latents2img  # noqa: F401

    number, start = signal.Signals[f"SIG{args.signal}"], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="d4m-kill-test-") as root:
        reports = run(
            Path(root), args.diffusion_checkpoints_path, args.kills, number, args.ranks, args.seed, args.stages,
            args.size, 60 * args.minutes,
        )  # fmt: skip
    print_report(reports, number, args.ranks, time.monotonic() - start)
    problems = [problem for r in reports.values() for problem in r["problems"]]
    for problem in problems[:20]:
        print(f"PROBLEM {problem}")
    if problems:
        raise SystemExit(1)
    return reports


if __name__ == "__main__":
    main()
