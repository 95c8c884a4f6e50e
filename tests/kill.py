"""Stop each stage at random instants, run the same command again, compare with a run left alone.

    python -m tests.kill --kills 200          # SIGKILL over the four stages
    python -m tests.kill --kills 50 --signal TERM --ranks 2

Digits and a tiny model on the CPU. Runs are forked from this process, which has imported everything
already; else only imports would be hit. A signal counts if it falls between the first unit's file
and the manifest; the histogram says how many of the units were finished then. After each, every
file must be whole; the command is run again (and perhaps stopped again) until it ends. Then the
tree, logs and timing aside, must be that of the uninterrupted run. No unit is made twice: those
that were there before a run must be the very same files after it (inode and time). Exit status 1 if
not.
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
from scripts.runtime import EXIT_STOPPED, STOP_SIGNALS, Parser, entry_point, number, refuse

MODEL = Path(__file__).parent.parent / "misc" / "tiny-sd-digits"
WAIT = 120  # seconds after which a run counts as hanging
COUNTS = ("counted", "sent", "unreadable", "different", "completed", "twice", "kept")


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

    units   groups of files that are made together
    epochs  of a training, which has a checkpoint instead of units; else 0
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
        """{unit: [(inode, time of change)] of its files} of what is finished."""
        found = {}
        for unit, group in enumerate(self.units):
            with contextlib.suppress(FileNotFoundError):
                stats = [(self.folder / name).stat() for name in group]
                found[unit] = [(stat.st_ino, stat.st_mtime_ns) for stat in stats]
        return found

    def share(self):
        """Of the units, or of the epochs, that are finished."""
        path = self.folder / "checkpoint_seed0.pt"
        if self.epochs and path.exists():
            return len(torch.load(path, weights_only=True)["rows"]) / self.epochs
        return len(self.done()) / len(self.units) if not self.epochs else float(self.begun())

    def made_twice(self, before):
        """Units that were there `before` a run and were written again by it."""
        after = self.done() if not self.epochs else before  # a checkpoint is written again
        return [self.units[n] for n, stamps in before.items() if after.get(n) != stamps]

    # ---- its processes

    def start(self, world):
        """Forked processes: what this one has imported needs no import again."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": probe.getsockname()[1]}
        where |= {"WORLD_SIZE": world, "LOCAL_RANK": 0}
        places = [{**where, "RANK": rank} if world > 1 else {} for rank in range(world)]
        fork = multiprocessing.get_context("fork")
        runs = [fork.Process(target=self._child, args=(place,)) for place in places]
        for run in runs:
            run.start()
        return runs

    def _child(self, place):
        log = open(f"{self.root}.{os.getpid()}.log", "w", buffering=1)
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        sys.stdout = sys.stderr = log
        os.environ.update({name: str(value) for name, value in place.items()})
        tqdm.set_lock(threading.RLock())  # forks share its own: one killed with it stops all
        for stop in STOP_SIGNALS:
            signal.signal(stop, signal.SIG_DFL)
        self.main(self.argv)
        for stop in STOP_SIGNALS:  # nothing is left to stop
            signal.signal(stop, signal.SIG_IGN)

    def ended(self, runs):
        """[(exit status, or minus the signal that killed it; what it printed)] of its processes."""
        for run in runs:
            run.join(WAIT)
            run.kill()
            run.join()
        logs = [Path(f"{self.root}.{run.pid}.log") for run in runs]
        texts = [log.read_text() if log.exists() else "" for log in logs]
        return [(run.exitcode, text) for run, text in zip(runs, texts)]


def wait_while(runs, condition):
    while any([run.is_alive() for run in runs]) and condition():
        time.sleep(0.0005)


def run_alone(stage, world):
    """(tree of the uninterrupted run, seconds from its first file to its manifest)"""
    runs = stage.start(world)
    wait_while(runs, lambda: not stage.begun())
    start = time.monotonic()
    wait_while(runs, lambda: not stage.finished())
    seconds = time.monotonic() - start
    failed = [printed[-500:] for status, printed in stage.ended(runs) if status]
    if failed:
        refuse(f"{stage.name}: the uninterrupted run failed: {failed}")
    return tree(stage.root), seconds


def stop_once(stage, world, stop, seconds, rng):
    """Start, send `stop` at a random instant; (share of the units finished then or None, ends).

    None if it came before the first unit's file or after the manifest. SIGKILL hits one of several
    ranks, other signals all.
    """
    # the length of a first run counts from its first file on; a rerun may be hit while it loads
    runs, length = stage.start(world), seconds * (2 if stage.begun() else 1.1)
    wait_while(runs, lambda: not stage.begun())
    until = time.monotonic() + rng.random() * length
    wait_while(runs, lambda: time.monotonic() < until)
    victims, begun = [rng.choice(runs)] if stop == signal.SIGKILL else runs, stage.begun()
    for run in victims:
        if run.is_alive():
            os.kill(run.pid, stop)
    if stop == signal.SIGKILL:
        victims[0].join()
        for run in runs if stage.epochs else ():  # the others wait for it
            run.kill()
    ends = stage.ended(runs)
    hit = begun and not stage.finished() and all(run.exitcode for run in victims)
    return stage.share() if hit else None, ends


def odd_end(status, printed, stop):
    """What is wrong with how a run ended that got the signal `stop`, or None."""
    if status == EXIT_STOPPED:
        fine = "run the same command to go on" in printed and "Traceback" not in printed
    else:  # the last: it came before the process had begun
        fine = stop == signal.SIGKILL or status == 0 or (status == -int(stop) and not printed)
    return None if fine else f"status {status}: {printed[-300:]}"


def torture(stage, world, stop, kills, rng, most=3600):
    """`kills` counted signals in at most so many seconds   -> report"""
    (wanted, seconds), start = run_alone(stage, world), time.monotonic()
    report = {**dict.fromkeys(COUNTS, 0), "shares": [], "problems": []}
    wrong = report["problems"]

    def look(run, *args):
        """Run, and note what is wrong afterwards."""
        before = stage.done()
        result = run(*args)
        twice, bad = stage.made_twice(before), damaged(stage.root, wanted)
        wrong.extend(f"{names} were there and were written again" for names in twice)
        wrong.extend(f"{name} is damaged" for name in bad)
        report["twice"] += bool(twice)
        report["unreadable"] += len(bad)
        report["kept"] += len(before)
        return result

    while report["counted"] < kills and time.monotonic() - start < most:
        shutil.rmtree(stage.root)
        chance = 1.0
        while not stage.finished() and report["counted"] < kills and rng.random() < chance:
            share, ends = look(stop_once, stage, world, stop, seconds, rng)
            report["sent"] += 1
            chance = 0.5
            seconds *= 0.93 if share is None else 1.03  # the machine is more or less busy now
            if share is not None:
                report["counted"] += 1
                report["shares"].append(share)
                wrong.extend(filter(None, (odd_end(*end, stop) for end in ends)))
        ends = look(lambda: stage.ended(stage.start(world)))
        wrong.extend(f"the rerun failed: {printed[-300:]}" for status, printed in ends if status)
        report["completed"] += 1
        odd = sorted({name for name, _ in tree(stage.root).items() ^ wanted.items()})
        report["different"] += bool(odd)
        wrong.extend([f"{odd[:5]} differ from the uninterrupted run"] * bool(odd))
    if report["counted"] < kills:
        wrong.append(f"only {report['counted']} signals in {most:.0f} s")
    return report


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
        n = hit.find(stage.name[0])
        if n < 0:
            run_alone(stage, world)
            continue
        share = kills // len(hit) + (n < kills % len(hit))
        reports[stage.name] = torture(stage, world, stop, share, rng)
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


@entry_point
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
