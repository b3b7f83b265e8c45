#!/usr/bin/env python3
"""Kill a small job of rename_obrutai.py at many moments and check that nothing is lost and nothing changes.

The job runs once on the demo model without interruption. Then it runs in chains: started, killed with SIGKILL together
with its whole process group, started again by the same command, killed at the next moment, and so on until it is
through. The moments are of four kinds, a quarter of the points each: as soon as a file or folder of a list appears,
just before a file operation of a list, after a random time, and before a random file operation while an older result
is being replaced.

After each kill the output folder must be absent or complete (or still the older result), the base untouched, and every
finished stage, byte for byte, that of the uninterrupted run. At the end of a chain so must be everything, with nothing
left over. What tells the time or how the log was cut is not compared. Exit status 1 if anything differs. Linux only.

  OMP_NUM_THREADS=1 python tests/kill_many.py --points 24
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).resolve().parents[1] / "rename_obrutai.py"
OUTPUT = "novo"
WORK = OUTPUT + ".work"
JOB = ("--self-text 2000 --num-self-answers 12 --heal-steps 12 --steps-1 24 --steps-2 30 "
       "--eval-questions 12 --window 256 --batch-size 4 --checkpoint-minutes 0").split()
UNLIKE = ("key.json", "pace.json", "log.json", "plan.json", "lock", "LEIA-ME.txt")  # they tell times or the machine
REPORTED = ("report.json", "report.png", "README.md", "self_answers.jsonl")  # written just before the result is moved
OPERATIONS = 1500  # file operations between two kills of the fourth kind, at most; the job has some ten thousand

# In the order in which the job comes by them, so that a chain can be killed at one after the other.
SEEN = """
lock
1-base.partial/key.json
1-base.partial/heard.json
1-base.partial/teacher.safetensors
1-base
2-healed.partial/training/training/checkpoint-*
2-healed.partial/training/checkpoint-*/optimizer.pt
2-healed.partial/training/checkpoint-*/complete.json
2-healed.partial/*model.safetensors
2-healed
3-pass-1.partial/training/checkpoint-*/*model.safetensors
3-pass-1.partial/training/checkpoint-2?/scheduler.pt
3-pass-1.partial/*model.safetensors
3-pass-1.partial/log.json
3-pass-1
4-self-answers.partial/key.json
4-self-answers
5-pass-2.partial/training/checkpoint-1?
5-pass-2.partial/training/checkpoint-2?/rng_state.pth
5-pass-2.partial/training/checkpoint-*/training_args.bin
5-pass-2.partial/training/checkpoint-*/trainer_state.json
5-pass-2.partial/*model.safetensors
5-pass-2
6-result.partial/model/model.safetensors
6-result.partial/model/exam.json
6-result
6-result/model/report.json
""".split()
# The same for operations; the first number says before which one that fits.
BEFORE = """
1 rename 1-base.partial/key.json.tmp
1 rename 1-base.partial/heard.json.tmp
1 rename 1-base.partial$
1 open 2-healed.partial/training/checkpoint-\\d+/complete.json.tmp
1 rename 2-healed.partial/training/checkpoint-\\d+/complete.json.tmp
1 rmdir 2-healed.partial/training/checkpoint-\\d+
4 remove 2-healed.partial/training/training/checkpoint-8/
1 rmdir 2-healed.partial/training$
1 rename 2-healed.partial$
1 remove 3-pass-1.partial/training/checkpoint-\\d+/complete.json
5 remove 3-pass-1.partial/training/checkpoint-1\\d/
7 remove 3-pass-1.partial/training/checkpoint-23/
1 rename 3-pass-1.partial/log.json.tmp
1 rename 3-pass-1.partial$
1 rename 4-self-answers.partial/self_answers.json.tmp
1 rename 4-self-answers.partial$
1 open 5-pass-2.partial/training/checkpoint-\\d+/trainer_state.json
6 remove 5-pass-2.partial/training/checkpoint-11/
9 remove 5-pass-2.partial/training/checkpoint-29/
1 rename 5-pass-2.partial/log.json.tmp
1 rename 5-pass-2.partial$
1 rename 6-result.partial/model/exam.json.tmp
1 rename 6-result.partial$
1 rename 6-result/model/report.json.tmp
1 open 6-result/model/README.md
1 rename 6-result/model$
""".strip().splitlines()


class Moment(NamedTuple):
    """When to kill: "after" so many seconds, as soon as a path in the work folder is "seen" that is new or changed, or
    "before" the `count`-th file operation that a pattern fits: what a run does, and to what in the work folder."""
    kind: str
    where: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind} {self.where}" + f" x{self.count}" * (self.count > 1)


class Running:
    """The job in a process of its own, at the head of a process group; what it says goes to a file."""

    def __init__(self, command: list[str], folder: Path, moment: Moment | None):
        self.log = folder / "said.txt"
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        if moment and moment.kind == "before":
            guard = folder / "guard"
            guard.mkdir(exist_ok=True)
            (guard / "sitecustomize.py").write_text(
                f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
                f"import kill_many; kill_many.arm({str(folder)!r}, {moment.where!r}, {moment.count})\n", "utf-8")
            environment["PYTHONPATH"] = str(guard)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log,
                                            start_new_session=True)
        self.pid, self.poll, self.wait = self.process.pid, self.process.poll, self.process.wait


def arm(folder: str, pattern: str, count: int) -> None:
    """In the job's own process: kill the process group before the `count`-th file operation that the pattern fits."""
    work, left, own = os.path.join(folder, WORK), [count], os.getpid()

    def operation(event: str, arguments: tuple) -> str:
        """What is about to be done in the work folder, and to what; "" for anything else."""
        name, path = event.rpartition(".")[2], arguments[0] if arguments else None
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return ""
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") or isinstance(path, int):
            return ""
        at = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2}.get(event)
        opened = arguments[at] if at and arguments[at] not in (None, -1) else None
        start = os.readlink(f"/proc/self/fd/{opened}") if opened is not None else os.getcwd()
        path = os.path.join(start, os.fsdecode(path))
        return f"{name} {os.path.relpath(path, work)}" if path.startswith(work + os.sep) else ""

    def watch(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and os.getpid() == own:
            if (found := operation(event, arguments)) and re.match(pattern, found):
                left[0] -= 1
                if not left[0]:
                    os.killpg(0, signal.SIGKILL)

    sys.addaudithook(watch)


def changes(folder: Path, pattern: str) -> dict[Path, int]:
    """Time of the last change of all that fits the pattern in the work folder."""
    found = {}
    for path in folder.glob(f"{WORK}/{pattern}"):
        try:
            found[path] = path.stat().st_mtime_ns
        except FileNotFoundError:
            pass
    return found


def run_until(start: Callable, folder: Path, moment: Moment | None) -> int:
    """Start the job and kill it at the moment; its exit status, which is -SIGKILL if the moment came."""
    seen = changes(folder, moment.where) if moment and moment.kind == "seen" else {}
    began, process = time.monotonic(), start(folder, moment)
    while process.poll() is None:
        if moment and moment.kind == "after" and time.monotonic() - began > float(moment.where):
            os.killpg(process.pid, signal.SIGKILL)
        elif moment and moment.kind == "seen" and changes(folder, moment.where).items() - seen.items():
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.002)
    return process.wait()


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 by path of all that is the same in every run: whole files, and what reports say besides times, paths and
    the cut of the log."""
    found = {}
    for path in sorted(folder.glob(f"{OUTPUT}*/**/*")):
        if path.is_file() and path.name not in UNLIKE:
            data = path.read_bytes()
            if path.name == "report.json":
                report = json.loads(data)
                data = json.dumps([report.get(key) for key in ("missed", "data_hash", "context", "scores")]).encode()
            if path.name == "adapter_config.json":  # it holds a set, which comes in any order
                config = json.loads(data)
                data = json.dumps({**config, "target_modules": sorted(config["target_modules"])}).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 by path of every file of a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def wrong_after_kill(folder: Path, expected: dict[str, str], older: dict[str, str]) -> list[str]:
    """What must not be: an output that is neither absent, complete nor still the older one, a finished stage that
    differs from the uninterrupted run's."""
    wrong, output, work = [], folder / OUTPUT, folder / WORK
    result = {name[len(OUTPUT) + 1:]: value for name, value in expected.items() if name.startswith(OUTPUT + "/")}

    found = fingerprint(folder)

    def checked(place: str, wanted: dict[str, str]) -> None:
        wrong.extend(f"{place}/{name}" for name in wanted if wanted[name] != found.get(f"{place}/{name}"))

    if output.exists() and not (older and contents(output) == older):
        checked(OUTPUT, result)
    for stage in work.glob("*"):
        if (stage / "key.json").is_file() and not stage.name.endswith(".partial"):
            prefix = f"{WORK}/{stage.name}/"
            checked(prefix[:-1], {k[len(prefix):]: v for k, v in expected.items() if k.startswith(prefix)})
    if (work / "6-result" / "key.json").is_file() and (work / "6-result" / "model").exists():
        checked(f"{WORK}/6-result/model", {name: value for name, value in result.items() if name not in REPORTED})
    return wrong


def where(folder: Path) -> str:
    """How far the job had come: its last finished stage and what was under way."""
    work = folder / WORK
    ready = sorted(path.name for path in work.glob("[1-5]*") if path.name[-8:] != ".partial")
    begun = [str(path.relative_to(work)) for path in sorted(work.glob("**/*.partial"))]
    steps = sorted(int(path.parent.name[11:]) for path in work.glob("**/checkpoint-*/complete.json"))
    half = [path for path in work.glob("**/checkpoint-*") if not (path / "complete.json").exists()]
    return (f"{ready[-1] if ready else 'nothing'} ready, {begun[-1] if begun else 'nothing'} under way"
            + f", checkpoint {steps[-1] if steps else ''}" * bool(steps) + ", half a checkpoint" * bool(half)
            + ", output there" * (folder / OUTPUT).exists())


class Chain(NamedTuple):
    """How a chain ended: kills, what was wrong, the exit status of the last run, the moments that did not come."""
    kills: int
    wrong: list[str]
    status: int
    missed: list[Moment]


def run_chain(start: Callable, folder: Path, moments: list[Moment], expected: dict[str, str], base: Path,
              tell: Callable = print) -> Chain:
    """Run, kill, run again ... until the job is through; `start` takes the folder and the moment."""
    before, older, everything, line, kills = contents(base), contents(folder / OUTPUT), [], "", 0
    for moment in [*moments, None]:
        status = run_until(start, folder, moment)
        said = (folder / "said.txt").read_text("utf-8", "replace")
        if line:
            step = re.search(r"continuando da etapa (\d+)", said)
            tell(f"{line} | restart: {said.count('(já pronto)')} stages ready" + f", from step {step and step[1]}"
                 * bool(step))
        if status != -signal.SIGKILL:
            break
        kills += 1
        wrong = wrong_after_kill(folder, expected, older)
        wrong += ["the base was changed"] * (contents(base) != before)
        everything += [f"{moment}: {what}" for what in wrong]
        line = f"{moment} | {where(folder)} | {', '.join(wrong) or 'sound'}"
    found = fingerprint(folder)
    everything += [f"end: {name}" for name in sorted(expected.keys() | found.keys())
                   if expected.get(name) != found.get(name)]
    everything += ["end: the base was changed"] * (contents(base) != before)
    if status not in (0, 3):
        everything.append(f"end: exit status {status}: {said.strip()[-600:]}")
    return Chain(kills, everything, status, moments[kills:])


def spread(values: list, count: int) -> list:
    """`count` of the values, evenly spread; all of them if they are fewer."""
    return [values[i * len(values) // count] for i in range(count)] if count < len(values) else list(values)


def main() -> int:
    """Run the chains and print a line for each kill; 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=24, help="kills, at least (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--keep", type=Path, help="folder to work in, which is kept")
    parser.add_argument("--method", default="full", help="METHOD of the job (default: full)")
    parser.add_argument("--script", type=Path, default=SCRIPT, help="the script to run")
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        print("kill_many.py runs on Linux only: it needs process groups and /proc.")
        return 1
    root = (options.keep or Path(tempfile.mkdtemp(prefix="kill_many_"))).resolve()
    script, rng = options.script.resolve(), random.Random(options.seed)
    base = script.parent / "tests" / "modelo_demo"

    command = [sys.executable, str(script), "--output-dir", OUTPUT, "--overwrite", "--method", options.method, *JOB]

    def start(folder: Path, moment: Moment | None) -> Running:
        return Running(command, folder, moment)

    whole = root / "uninterrupted"
    whole.mkdir(parents=True)
    began = time.monotonic()
    status = run_until(start, whole, None)
    seconds, expected = time.monotonic() - began, fingerprint(whole)
    if status not in (0, 3):
        print((whole / "said.txt").read_text("utf-8"))
        return 1
    print(f"uninterrupted: {seconds:.0f} s, exit status {status}, {len(expected)} files to compare", flush=True)

    quarter = max(1, options.points // 4)
    chains = {
        "seen": [Moment("seen", pattern) for pattern in spread(SEEN, quarter)],
        "before": [Moment("before", pattern, int(count)) for count, pattern in
                   (line.split(" ", 1) for line in spread(BEFORE, quarter))],
        "after": [Moment("after", f"{rng.uniform(1, seconds / 3):.2f}") for _ in range(quarter)],
        "older": [*(Moment("before", "", rng.randint(1, OPERATIONS)) for _ in range(options.points - 3 * quarter)),
                  Moment("before", "rename 6-result/model$"), Moment("before", "rmdir 6-result/replaced$")],
    }
    kills, wrong, number = 0, [], 0
    for name, left in chains.items():
        while left:
            number += 1
            folder = root / f"chain-{number}-{name}"
            folder.mkdir()
            if name == "older":
                shutil.copytree(whole / OUTPUT, folder / OUTPUT)
                (folder / OUTPUT / "report.json").write_text('{"key": "older", "scores": {}, "settings": {}}')
            print(f"chain {number}, {name}:", flush=True)
            done = run_chain(start, folder, left, expected, base, lambda line: print(f"  {line}", flush=True))
            # A moment that comes at the very end of one chain may be over before it is seen; the others get another.
            left = done.missed[not done.kills:]
            kills, wrong = kills + done.kills, wrong + [f"chain {number}: {what}" for what in done.wrong]
            print(f"  through: exit status {done.status}, {done.kills} kills, "
                  f"{'all identical' if not done.wrong else f'{len(done.wrong)} DIFFERENCES'}", flush=True)
    print(f"\n{kills} kills in {number} chains: {'all identical' if not wrong else 'DIFFERENCES'}")
    print("\n".join(wrong))
    if not options.keep and not wrong:
        shutil.rmtree(root)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
