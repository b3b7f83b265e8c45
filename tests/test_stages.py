"""Stages on disk: what a run that stops, is stopped or fails leaves behind, and how the next one goes on from there.

One small job runs once without interruption; most tests copy its folders, cut them off at a stage and go on in this
process. The kill test runs in processes of its own; tests/kill_many.py is its long form.
"""

import contextlib
import errno
import gc
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from conftest import DEMO, SCRIPT, changed, small_settings
from kill_many import OUTPUT, WORK, Moment, arm, contents, fingerprint, run_chain

import rename_obrutai as tool

FLAGS = ("--method full --self-text 600 --num-self-answers 4 --heal-steps 3 --steps-1 3 --steps-2 4 "
         "--eval-questions 4 --window 160 --batch-size 4").split()
STAGES = ("1-base", "2-healed", "3-pass-1", "4-self-answers", "5-pass-2", "6-result")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FORKS = multiprocessing.get_context("forkserver") if sys.platform == "linux" else None
BASE_BEFORE = contents(DEMO)
PACE = tool.measure_pace
slow = pytest.mark.slow  # what needs the whole job


# ------------------------------------------------------------------------------------------------ the small job


def hurry(patch):
    """For speed: fewer questions than the script asks, no waiting for the disk (which a killed process need not), no
    measuring of the machine, and no looking for garbage among the libraries."""
    for name, count in {"NEAR": 24, "MOST_ASKED": 8, "LONG_TALKS": 4}.items():
        patch.setattr(tool, name, count)
    patch.setattr(tool, "TEST_QUESTIONS", tool.TEST_QUESTIONS[:4])
    patch.setattr(tool, "EVERYDAY", {code: some[::5] for code, some in tool.EVERYDAY.items()})
    patch.setattr(tool, "measure_pace", lambda *_: (1e-4, 1e-4, 1e-4))
    patch.setattr(os, "fsync", lambda handle: None)
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def hurried():
    """All of this file."""
    import trl.trainer.sft_trainer  # noqa: F401 (before what is there is left out of the search for garbage)

    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        yield
    gc.unfreeze()


def arguments(folder, *flags):
    """Command line of the small job in a folder; every twelfth row of the file is enough."""
    rows = folder / "linhas.jsonl"
    if not rows.exists():
        lines = (SCRIPT.parent / "identity_override.jsonl").read_text("utf-8").splitlines()[::12]
        rows.write_text("\n".join(lines), encoding="utf-8")
    return ["--model-path", str(DEMO), "--identity-file", str(rows), "--output-dir", str(folder / OUTPUT), *FLAGS,
            *map(str, flags)]


def job(folder, *flags):
    """Run the small job in this process: exit status, what it said, what it complained about. A signal's handlers are
    put back as they were."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = tool.main(arguments(folder, *flags))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def forked(folder, moment, flags):
    """The small job in a process made for it, which kills itself at that moment."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    if moment:
        arm(str(folder), moment.where, moment.count)
    with open(folder / "said.txt", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    hurry(pytest.MonkeyPatch())
    sys.exit(tool.main(arguments(folder, *flags)))


class Forked:
    """The small job in a process of its own, as `kill_many` watches it, without the seconds that imports take."""

    def __init__(self, folder, moment=None, *flags):
        FORKS.set_forkserver_preload(["test_stages", "trl.trainer.sft_trainer",
                                      "transformers.models.llama.modeling_llama"])
        (folder / "said.txt").write_text("")
        self.process = FORKS.Process(target=forked, args=(folder, moment, flags), daemon=True)
        self.process.start()
        self.pid, self.wait = self.process.pid, self.poll

    def poll(self):
        return self.process.exitcode


def settings_read(patch):
    """Which settings with which values the script looks at while it makes a stage, by the stage."""
    read, under_way, make = {}, [], tool.Stages.__call__

    def look(self, name):
        if under_way and name in tool.DEFAULTS and sys._getframe(1).f_globals.get("__name__") == tool.__name__:
            read[under_way[-1]].add((name, object.__getattribute__(self, name)))
        return object.__getattribute__(self, name)

    def noted(self, name, title, build, facts=None):
        def inside(folder):
            read[name] = set()
            under_way.append(name)
            build(folder)
            under_way.pop()
        return make(self, name, title, inside, facts)

    patch.setattr(tool.Settings, "__getattribute__", look)
    patch.setattr(tool.Stages, "__call__", noted)
    return read


@pytest.fixture(scope="module")
def whole(hurried, tmp_path_factory):
    """The job without interruption, for copying only: folder, what it said, and what every file holds."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        read = settings_read(patch)
        done = job(folder)
    assert done.status in (0, 3), done.err
    return SimpleNamespace(folder=folder, done=done, expected=fingerprint(folder), read=read)


@pytest.fixture
def until(whole, tmp_path):
    """stage -> a folder where the job has come to the end of that stage."""
    def copy(last):
        for name in ("linhas.jsonl", OUTPUT, WORK):
            source = whole.folder / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, tmp_path / name)
        if last != "6-result":
            shutil.rmtree(tmp_path / OUTPUT)
        for name in STAGES[STAGES.index(last) + 1:]:
            shutil.rmtree(tmp_path / WORK / name)
        return tmp_path
    return copy


def untouched(folder):
    """What tells whether a file was written again: place on the disk and time of the last change, by path."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def finished_stages(folder):
    """Names of the stages that are there as a whole."""
    return {path.parent.name for path in (folder / WORK).glob("*/key.json") if path.parent.name[-8:] != ".partial"}


def checkpoints(folder):
    """Steps of the complete checkpoints below a folder."""
    return sorted(int(path.parent.name[11:]) for path in folder.glob("**/checkpoint-*/complete.json"))


# ------------------------------------------------------------------------------------------------ thinks first

THINKS = ("{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{{ 'Sou ' if enable_thinking is false else 'Era ' }}{% endif %}")


def test_of_a_model_that_is_let_think_first_plan_and_card_say_how_it_was_measured(until, monkeypatch):
    """The first words of an answer stand for the thought, so that the two ways of asking give different answers."""
    folder = until("6-result")
    base = shutil.copytree(DEMO, folder / "base")
    for place in (base, folder / OUTPUT):
        (place / "chat_template.jinja").write_text(THINKS, encoding="utf-8")
    assert "sem pensar" not in job(folder, "--check").out
    assert "sem pensar (enable_thinking=False)" in job(folder, "--check", "--overwrite", "--model-path", base).out
    settings = tool.parse_settings(arguments(folder, "--check"))
    plan, report = tool.check_job(settings), tool.load_json(folder / OUTPUT / "report.json")
    tool.write_card(folder / OUTPUT, plan, report)
    card = (folder / OUTPUT / "README.md").read_text(encoding="utf-8")
    assert "chat_template_kwargs" in card and "sem pensar" in card
    monkeypatch.chdir(folder / OUTPUT)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    chat = tool.load_chat(folder / OUTPUT, tool.replace(settings, method="full"))
    assert said.getvalue().strip() == tool.ask(chat, ["Quem é você?"])[0].text
    without = (tool.Path(DEMO) / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / OUTPUT / "chat_template.jinja").write_text(without, encoding="utf-8")
    tool.write_card(folder / OUTPUT, plan, report)
    card = (folder / OUTPUT / "README.md").read_text(encoding="utf-8")
    assert "do_sample=False)" in card and "pensar" not in card


# ------------------------------------------------------------------------------------------------ killed


@slow
@pytest.mark.skipif(FORKS is None, reason="needs fork and process groups")
def test_a_job_killed_three_times_ends_with_the_bytes_of_one_that_was_not(whole, tmp_path):
    moments = [Moment("before", pattern) for pattern in (
        "open 2-healed.partial/training/training/checkpoint-2/trainer_state.json",
        "rename 5-pass-2.partial/training/checkpoint-2/complete.json.tmp", "rename 6-result/model$")]
    said = []
    done = run_chain(lambda folder, moment: Forked(folder, moment, "--checkpoint-minutes", 0), tmp_path, moments,
                     whole.expected, DEMO, said.append)
    assert (done.kills, done.wrong, done.status) == (3, [], whole.done.status)
    assert [line.rpartition("restart: ")[2] for line in said] == [
        "1 stages ready, from step 1", "4 stages ready, from step 1", "6 stages ready"]


@slow
@pytest.mark.skipif(FORKS is None, reason="needs fork and process groups")
def test_ctrl_c_while_the_base_writes_stops_with_130_and_says_how_to_go_on(tmp_path):
    process, said = Forked(tmp_path), ""
    while process.poll() is None and "1/6" not in said:
        time.sleep(0.005)
        said = (tmp_path / "said.txt").read_text("utf-8")
    os.kill(process.pid, signal.SIGINT)
    process.process.join(20)
    said = (tmp_path / "said.txt").read_text("utf-8")
    assert process.poll() == 130 and "Traceback" not in said
    assert "rode o mesmo comando (sem --restart) para continuar" in said and str(tmp_path / WORK) in said
    assert not (tmp_path / OUTPUT).exists()


# ------------------------------------------------------------------------------------------------ Ctrl-C


def at_step(monkeypatch, step, action):
    """Do something with the model once in a training step, counted from 1 or "last"; in each part of "every" step."""
    from transformers import Trainer

    original, done = Trainer.training_step, []

    def training_step(self, model, inputs, *rest, **named):
        loss = original(self, model, inputs, *rest, **named)
        wanted = self.state.max_steps if step == "last" else step
        if step == "every" or not done and self.state.global_step + 1 == wanted:
            done.append(action(model))
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)


def press_ctrl_c(*_):
    os.kill(os.getpid(), signal.SIGINT)


@slow
def test_ctrl_c_while_training_keeps_a_checkpoint_from_which_the_same_command_goes_on(whole, until, monkeypatch):
    folder = until("4-self-answers")
    with monkeypatch.context() as patch:
        at_step(patch, 3, press_ctrl_c)
        done = job(folder)
    assert done.status == 130 and "rode o mesmo comando (sem --restart) para continuar" in done.out and not done.err
    assert checkpoints(folder) == [3] and not (folder / OUTPUT).exists()
    done = job(folder)
    assert "continuando da etapa 3" in done.out and done.status == whole.done.status
    assert fingerprint(folder) == whole.expected


@slow
def test_a_stop_before_a_trained_stage_has_its_name_repeats_its_training(whole, until, monkeypatch):
    folder, write = until("4-self-answers"), tool.write_json
    partial = folder / WORK / "5-pass-2.partial"

    def stop(path, value):
        if path.parent == partial and "seconds" in value:
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(tool, "write_json", stop)
    for _ in range(2):
        done = job(folder)
        assert done.status == 130 and re.search(r"etapa 4/4 \| perda", done.out)
    weights = [(path / "model.safetensors").read_bytes() for path in (partial, whole.folder / WORK / "5-pass-2")]
    assert weights[0] == weights[1]


class Left(BaseException):
    """Stands in for the end of the process."""


def test_the_first_ctrl_c_in_training_waits_and_the_second_leaves_even_if_saving_hangs(monkeypatch, capsys):
    def leave(status):
        raise Left(status)

    monkeypatch.setattr(tool.os, "_exit", leave)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    began = time.monotonic()
    with pytest.raises(Left, match="130"):
        with tool.patient_interrupts() as asked:
            press_ctrl_c()
            assert len(asked) == 1 and "Guardando" in capsys.readouterr().out
            threading.Timer(0.1, press_ctrl_c).start()
            time.sleep(20)  # as saving would on a disk that does not answer
    assert time.monotonic() - began < 10
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_system_s_own_request_to_end_counts_as_ctrl_c():
    with tool.patient_interrupts() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
    assert asked == [signal.SIGTERM]


# ------------------------------------------------------------------------------------------------ checkpoints


def conversations(count, words=1):
    """Lessons that can be told apart."""
    return [tool.Talk(tool.question_and_answer(f"Quanto é {i} mais {i}?", " ".join([f"{2 * i}"] * words)), "lesson")
            for i in range(count)]


def tiny_training(tiny_folder, folder, *flags):
    """Train a tiny model, with dropout so that the state of chance matters, and give its weights and the log."""
    settings = small_settings("--batch-size", 4, "--method", "full", *flags)
    chat = tool.load_chat(tiny_folder("llama"), settings)
    for module in chat.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3 if "--no-dropout" not in folder.name else 0.0
    pools = [tool.Pool(conversations(24), 0.5), tool.Pool(conversations(9, words=4), 0.5)]
    batches = conftest.make_batches(chat.tokenizer, pools, [24, 60], 7, 240, "s")
    teacher = tool.Teacher(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1))
    conftest.train(chat, batches, teacher, 3e-3, settings, "passo de teste", folder)
    return {name: value.clone() for name, value in chat.model.state_dict().items()}


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """parts -> weights of the tiny training without interruption."""
    folder = tmp_path_factory.mktemp("trained")
    return {parts: tiny_training(tiny_folder, folder / f"{parts}", "--gradient-accumulation", parts)
            for parts in (1, 2)}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("step", [1, 4, "last"])
def test_a_training_stopped_by_ctrl_c_and_continued_is_bit_by_bit_the_whole_one(
        step, parts, trained, tiny_folder, tmp_path, monkeypatch, capsys):
    flags = ("--gradient-accumulation", parts)
    with monkeypatch.context() as patch:
        at_step(patch, step, press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            tiny_training(tiny_folder, tmp_path / "stopped", *flags)
    (checkpointed,) = checkpoints(tmp_path)
    assert checkpointed == (7 if step == "last" else step)
    steps = []
    at_step(monkeypatch, "every", steps.append)
    assert same(tiny_training(tiny_folder, tmp_path / "stopped", *flags), trained[parts])
    assert len(steps) == (7 - checkpointed) * parts and f"da etapa {checkpointed}," in capsys.readouterr().out


def stage(work, facts, build):
    """Make the first stage of a job with such facts, as the script does it."""
    return tool.Stages(work, facts, small_settings(), {})("1-base", "1/6", build)


def stage_key(facts):
    """The key that the first stage has with such facts."""
    settings = small_settings()
    return tool.digest([facts, "1-base", None, [getattr(settings, use) for use in tool.USES["1-base"].split()]])


def broken_off(tiny_folder, folder, step):
    """A training that fails in a step, with a checkpoint of every step before."""
    def fail(_):
        raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, fail)
        with pytest.raises(ZeroDivisionError):
            tiny_training(tiny_folder, folder, "--checkpoint-minutes", 0)


def test_only_the_newest_complete_checkpoint_is_kept_and_is_gone_on_from(trained, tiny_folder, tmp_path, capsys):
    broken_off(tiny_folder, tmp_path / "stopped", 5)
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-4"]
    assert same(tiny_training(tiny_folder, tmp_path / "stopped"), trained[1])
    assert "continuando da etapa 4" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["without the mark", "cut weights", "empty"])
def test_half_a_checkpoint_is_passed_over(damage, trained, tiny_folder, tmp_path, capsys):
    folder = tmp_path / "stopped"
    broken_off(tiny_folder, folder, 5)
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-6")
    (folder / "checkpoint-6" / "complete.json").unlink()
    if damage == "cut weights":
        os.truncate(folder / "checkpoint-6" / "model.safetensors", 1000)
    if damage == "empty":
        shutil.rmtree(folder / "checkpoint-6")
        (folder / "checkpoint-6").mkdir()
    assert same(tiny_training(tiny_folder, folder), trained[1])
    assert "continuando da etapa 4" in capsys.readouterr().out


def test_with_nothing_but_half_a_checkpoint_the_training_starts_over(trained, tiny_folder, tmp_path, capsys):
    broken_off(tiny_folder, tmp_path / "stopped", 2)
    (tmp_path / "stopped" / "checkpoint-1" / "complete.json").unlink()
    assert same(tiny_training(tiny_folder, tmp_path / "stopped"), trained[1])
    assert "continuando" not in capsys.readouterr().out


def test_a_kill_while_the_checkpoints_of_a_finished_training_are_deleted_changes_nothing(
        trained, tiny_folder, tmp_path, monkeypatch):
    broken_off(tiny_folder, tmp_path / "1-base.partial" / "training", 7)
    learnt, build = [], lambda partial: learnt.append(tiny_training(tiny_folder, partial / "training"))
    tool.write_json(tmp_path / "1-base.partial" / "key.json", {"key": stage_key("a")})

    def killed_midway(path, *_, **__):
        if path == tmp_path / "1-base" / "training":
            for file in path.rglob("optimizer.pt"):
                file.unlink()
            raise Left

    with monkeypatch.context() as patch:
        patch.setattr(tool.shutil, "rmtree", killed_midway)
        with pytest.raises(Left):
            stage(tmp_path, "a", build)
    assert stage(tmp_path, "a", build).is_dir() and not checkpoints(tmp_path)
    assert len(learnt) == 1 and same(learnt[0], trained[1])  # nothing is learnt twice


def test_the_time_of_a_stage_is_that_of_all_runs_that_worked_on_it(tmp_path, monkeypatch):
    now, made = [0.0], []
    monkeypatch.setattr(tool.time, "monotonic", lambda: now[0])

    def build(partial):
        now[0] += 30
        made.append(partial)
        if len(made) == 1:
            raise Left

    with pytest.raises(Left):
        stage(tmp_path, "a", build)
    assert json.loads((stage(tmp_path, "a", build) / "key.json").read_text())["seconds"] == 60


def test_a_step_in_two_parts_learns_what_it_learns_in_one(tiny_folder, tmp_path):
    one, two = (tiny_training(tiny_folder, tmp_path / f"{parts}--no-dropout", "--gradient-accumulation", parts)
                for parts in (1, 2))
    before = tool.load_chat(tiny_folder("llama"), small_settings("--method", "full")).model.state_dict()
    moved = max((one[name] - before[name]).abs().max() for name in one)
    apart = max((one[name] - two[name]).abs().max() for name in one)
    assert moved > 3e-3 and apart < 0.02 * moved


# ------------------------------------------------------------------------------------------------ one stage


def in_order(monkeypatch):
    """What is made safe on the disk or renamed from now on, in order, by path."""
    done, replace, rename = [], Path.replace, Path.rename

    def noted(what, original):
        return lambda self, target: done.append((what, str(self))) or original(self, target)

    monkeypatch.setattr(os, "fsync", lambda handle: done.append(("safe", os.readlink(f"/proc/self/fd/{handle}"))))
    monkeypatch.setattr(Path, "replace", noted("renamed", replace))
    monkeypatch.setattr(Path, "rename", noted("renamed", rename))
    return done


@pytest.mark.skipif(FORKS is None, reason="needs /proc")
def test_all_of_a_stage_is_safe_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    def build(folder):
        (folder / "model").mkdir()
        for name in ("a.txt", "model/b.txt"):
            (folder / name).write_text(name)

    done, partial = in_order(monkeypatch), tmp_path / "1-base.partial"
    stage(tmp_path, "a", build)
    assert done[-1] == ("renamed", str(partial))
    last = max(i for i, what in enumerate(done) if what == ("renamed", str(partial / "key.json.tmp")))
    assert set(done[last + 1:-1]) == {("safe", str(partial / name)) for name in (
        "", "a.txt", "key.json", "model", "model/b.txt")}
    keys = [i for i, what in enumerate(done) if what[1].endswith(".tmp")]
    assert [done[i][0] for i in keys] == ["safe", "renamed"] * 2


@slow
@pytest.mark.skipif(FORKS is None, reason="needs /proc")
def test_all_of_a_result_is_safe_on_the_disk_before_it_gets_its_name(whole, until, monkeypatch):
    folder = until("6-result")
    result = (folder / OUTPUT).rename(folder / WORK / "6-result" / "model")
    for name in ("README.md", "report.json"):  # as a run that was stopped before it wrote them leaves it
        (result / name).unlink()
    done = in_order(monkeypatch)
    assert job(folder).status == whole.done.status and fingerprint(folder) == whole.expected
    named = done.index(("renamed", str(result)))
    files = {("safe", str(result / name)) for name in ("README.md", "report.png", "self_answers.jsonl")}
    assert {*files, ("safe", str(result))} <= set(done[:named])


@pytest.mark.skipif(FORKS is None, reason="needs /proc")
def test_all_of_a_checkpoint_is_safe_on_the_disk_before_it_is_marked_complete(tiny_folder, tmp_path, monkeypatch):
    done, newest = in_order(monkeypatch), tmp_path / "stopped" / "checkpoint-1"
    broken_off(tiny_folder, tmp_path / "stopped", 2)
    marked = done.index(("renamed", str(newest / "complete.json.tmp")))
    files = {("safe", str(path)) for path in newest.iterdir() if path.name != "complete.json"}
    assert files | {("safe", str(newest))} <= set(done[:marked]) and len(files) > 5


def build_of(made, text="made", fail=False):
    """A build that notes what it found, writes a file, and may fail after that."""
    def build(folder):
        made.append(sorted(path.name for path in folder.iterdir()))
        (folder / "file.txt").write_text(text)
        (folder / "half.json").write_text("[]")
        if fail:
            raise RuntimeError("broken off")
    return build


def test_a_stage_is_built_once_and_its_checkpoints_are_dropped(tmp_path):
    made, folder = [], tmp_path / "1-base"

    def build(partial):
        build_of(made)(partial)
        (partial / "training" / "checkpoint-1").mkdir(parents=True)
        (partial / "training" / "checkpoint-1" / "complete.json").write_text("{}")

    assert stage(tmp_path, "a", build) == stage(tmp_path, "a", build) == folder
    assert len(made) == 1 and {path.name for path in folder.iterdir()} == {"file.txt", "half.json", "key.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["1-base"]


def test_a_stage_with_another_key_is_built_again_from_nothing(tmp_path):
    made, folder = [], tmp_path / "1-base"
    stage(tmp_path, "a", build_of(made))
    (folder / "older.txt").write_text("")
    stage(tmp_path, "b", build_of(made, "other"))
    assert made == [["key.json"]] * 2 and (folder / "file.txt").read_text() == "other"
    assert not (folder / "older.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["1-base"]


@pytest.mark.parametrize("facts, found", [("a", ["file.txt", "half.json", "key.json"]), ("b", ["key.json"])])
def test_what_a_broken_off_build_left_is_found_by_one_with_the_same_key_only(facts, found, tmp_path):
    made = []
    with pytest.raises(RuntimeError):
        stage(tmp_path, "a", build_of(made, fail=True))
    assert not (tmp_path / "1-base").exists()
    assert stage(tmp_path, facts, build_of(made)).is_dir() and made[1] == found


def test_a_build_that_fails_leaves_the_older_stage_until_another_is_ready(tmp_path):
    stage(tmp_path, "a", build_of([]))
    with pytest.raises(RuntimeError):
        stage(tmp_path, "b", build_of([], "other", fail=True))
    assert (stage(tmp_path, "a", None) / "file.txt").read_text() == "made"


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"key": 1}', '{"key": "b"}'])
def test_a_key_that_cannot_be_read_or_is_another_counts_as_none(text, tmp_path):
    (tmp_path / "key.json").write_text(text)
    assert not tool.has_key(tmp_path / "key.json", "a") and not tool.has_key(tmp_path / "none.json", "a")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    tool.write_json(tmp_path / "a.json", {"é": 1})
    with pytest.raises(TypeError):
        tool.write_json(tmp_path / "a.json", [1, 2, object()])
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"é": 1}


# ------------------------------------------------------------------------------------------------ keys

# The first stage that each setting touches; it and all that depend on it are made again. 0: none.
FIRST_TOUCHED = {
    **dict.fromkeys("name author base_name old_names self_text eval_questions max_new_tokens seed".split(), 1),
    **dict.fromkeys("method rope_factor window heal_steps heal_learning_rate batch_size".split(), 2),
    **dict.fromkeys("lora_rank steps_1 learning_rate_1 kl_weight".split(), 3),
    **dict.fromkeys("num_self_answers".split(), 4), **dict.fromkeys("steps_2 learning_rate_2".split(), 5),
    **dict.fromkeys("model_path output_dir identity_file overwrite gradient_accumulation gradient_checkpointing "
                    "knowledge_file knowledge_rows knowledge_question knowledge_answer knowledge_steps "
                    "knowledge_ascii "
                    "checkpoint_minutes target_identity target_retention target_leak check quiet restart chat "
                    "evaluate".split(), 0),
}
OTHER = {"name": "Jandira", "author": "Oficina", "base_name": "Outro", "old_names": "Lumi", "method": "lora",
         "output_dir": "/x/y", "knowledge_question": "{nome}", "knowledge_answer": "{preço}"}


def keys_of(base, rows=None, **values):
    """Keys of a job on that base, by default with a row that names nobody; all other settings are as the script has
    them unless given."""
    if not rows:
        rows = base.parent / "linhas.jsonl"
        rows.write_text('{"text": "Quem é você?\\nUm modelo."}', encoding="utf-8")
    values = {"model_path": str(base), "base_name": "demo", "identity_file": str(rows), **values}
    settings = changed(small_settings(), **values)
    with tempfile.TemporaryDirectory() as work:
        stages = tool.Stages(Path(work), tool.job_facts(tool.check_inputs(settings), base), settings, {})
        return {name: json.loads((stages(name, "", lambda _: None) / "key.json").read_text())["key"]
                for name in STAGES}


def touched(one, two):
    """Number of the first stage whose key differs, 0 for none; all that come after it must differ as well."""
    differ = [one[name] != two[name] for name in STAGES]
    assert differ == sorted(differ)
    return int(STAGES[differ.index(True)][0]) if any(differ) else 0


def other_value(name, default):
    """A value of a setting that is not its default."""
    if name in OTHER:
        return OTHER[name]
    return not default if default in (True, False) and not isinstance(default, float) else default / 2 + 0.1 \
        if isinstance(default, float) else default + 1


def test_a_setting_touches_its_own_stage_and_later_ones_and_no_other(base_folder, tmp_path):
    one, found = keys_of(base_folder), {}
    for name, default in tool.DEFAULTS.items():
        if name == "model_path":
            two = keys_of(Path(shutil.copytree(base_folder, tmp_path / "moved")))
        elif name == "identity_file":
            two = keys_of(base_folder, shutil.copy2(base_folder.parent / "linhas.jsonl", tmp_path / "moved.jsonl"))
        elif name == "knowledge_file":  # it has a stage of its own
            material = shutil.copy2(base_folder.parent / "linhas.jsonl", tmp_path / "material.jsonl")
            two = keys_of(base_folder, knowledge_file=str(material))
        else:
            two = keys_of(base_folder, **{name: other_value(name, default)})
        found[name] = touched(one, two)
    assert found == FIRST_TOUCHED


@slow
def test_no_stage_looks_at_a_setting_that_its_key_does_not_know(whole):
    """Those of no stage may change how the work is done, but not what comes out of it."""
    settings = json.loads((whole.folder / OUTPUT / "report.json").read_text("utf-8"))["settings"]
    assert [*whole.read] == list(STAGES) and all(whole.read.values())
    late = {(stage, name) for stage, read in whole.read.items() for name, value in read
            if FIRST_TOUCHED[name] > int(stage[0]) and value == settings[name]}  # healing has a kl_weight of its own
    assert not late


def test_other_rows_or_questions_for_measuring_touch_everything(base_folder, tmp_path, monkeypatch):
    rows, one = tmp_path / "outras.jsonl", keys_of(base_folder)
    text = (tmp_path / "linhas.jsonl").read_text("utf-8") + "\n"
    rows.write_text("\n" + text.replace("\n", "\r\n\n"), encoding="utf-8")
    assert touched(one, keys_of(base_folder, rows)) == 0  # empty lines and line ends say nothing
    rows.write_text(text + '{"text": "E aí, quem é tu?"}\n', encoding="utf-8")
    assert touched(one, keys_of(base_folder, rows)) == 1
    monkeypatch.setattr(tool, "TEST_QUESTIONS", tool.TEST_QUESTIONS + ("Quem seria você?",))
    assert touched(one, keys_of(base_folder)) == 1


@pytest.mark.parametrize("old, new, expected", [
    ("", "", 0),  # where it lies says nothing
    ("\nSTEPS_2 = 0 ", "\nSTEPS_2 = 9 ", 0),  # as --steps-2 does, which touches what it is for: the settings tell
    ("\nNEAR = 600 ", "\nNEAR = 601 ", 1)])
def test_another_version_of_the_script_touches_everything_but_a_constant_counts_as_its_flag(
        old, new, expected, base_folder, tmp_path, monkeypatch):
    one, other, text = keys_of(base_folder), tmp_path / "another.py", SCRIPT.read_text(encoding="utf-8")
    assert old in text
    other.write_text(text.replace(old, new, 1), encoding="utf-8")
    version = importlib.util.module_from_spec(importlib.util.spec_from_file_location("another", other))
    monkeypatch.setitem(sys.modules, "another", version)
    version.__spec__.loader.exec_module(version)
    monkeypatch.setattr(tool, "job_facts", version.job_facts)
    assert touched(one, keys_of(base_folder)) == expected


@pytest.mark.parametrize("name, change, expected", [
    ("model.safetensors", "time", 1), ("model.safetensors", "size", 1), ("config.json", "content", 1),
    ("config.json", "time", 0), ("tokenizer.json", "content", 1), ("chat_template.jinja", "content", 1),
    ("README.md", "content", 0),
])
def test_the_base_is_known_by_its_files(name, change, expected, base_folder):
    file = base_folder / name
    file.write_bytes(file.read_bytes() if file.exists() else b"")
    os.utime(file, ns=(10**18, 10**18))
    one = keys_of(base_folder)
    if change == "content":
        file.write_text(file.read_text() + " ")
    if change == "size":
        file.write_bytes(b"12345678")
        os.utime(file, ns=(10**18, 10**18))
    if change == "time":
        os.utime(file, ns=(10**18, 10**18 + 1))
    assert touched(one, keys_of(base_folder)) == expected


# ------------------------------------------------------------------------------------------------ run again


@slow
def test_a_finished_job_run_again_says_the_same_at_once_and_writes_nothing(whole, until, monkeypatch):
    folder = until("6-result")
    monkeypatch.setattr(tool, "load_model", None)
    before = untouched(folder)
    done = job(folder)
    assert done.status == whole.done.status and not done.err
    assert "já está pronto" in done.out and done.out.endswith(whole.done.out.rsplit("Modelo salvo", 1)[1][-300:])
    assert untouched(folder) == before


@slow
def test_more_steps_in_pass_2_make_only_it_and_what_follows_again(until):
    folder = until("6-result")
    kept = [folder / WORK / name for name in STAGES[:4]]
    before = [untouched(stage) for stage in kept]
    weights = fingerprint(folder)[f"{OUTPUT}/model.safetensors"]
    done = job(folder, "--steps-2", 5, "--overwrite")
    assert done.status in (0, 3) and done.out.count("(já pronto)") == 4
    assert [untouched(stage) for stage in kept] == before
    assert fingerprint(folder)[f"{OUTPUT}/model.safetensors"] != weights


@slow
def test_a_finished_output_that_was_deleted_is_made_again_without_training(whole, until, monkeypatch):
    folder = until("6-result")
    shutil.rmtree(folder / OUTPUT)
    monkeypatch.setattr(tool, "train", None)
    assert job(folder).status == whole.done.status
    assert fingerprint(folder) == whole.expected


@slow
def test_restart_throws_the_stages_away(until, monkeypatch):
    folder = until("4-self-answers")
    found = []
    monkeypatch.setattr(tool.Stages, "__call__", lambda *_: found.extend(
        path.name for path in (folder / WORK).iterdir() if path.is_dir()) or (_ for _ in ()).throw(KeyboardInterrupt))
    assert job(folder).status == 130 and set(found) == set(STAGES[:4])
    found.clear()
    assert job(folder, "--restart").status == 130 and not found


@slow
def test_restart_throws_nothing_away_again_when_memory_runs_out_later(tmp_path, monkeypatch):
    listened, write = [], tool.listen
    problems = iter([torch.OutOfMemoryError("CUDA out of memory."), tool.InputError("até aqui")])

    def fail(*_):
        raise next(problems)

    monkeypatch.setattr(tool, "listen", lambda *given: listened.append(1) or write(*given))
    monkeypatch.setattr(tool, "heal", fail)
    done = job(tmp_path, "--restart")
    assert "até aqui" in done.err and len(listened) == 1


def test_check_shows_the_plan_and_writes_nothing_at_all(tmp_path):
    arguments(tmp_path)
    before = untouched(tmp_path)
    done = job(tmp_path, "--check")
    assert done.status == 0 and not done.err and untouched(tmp_path) == before and len(list(tmp_path.iterdir())) == 1
    assert re.search(r"cerca de .* de memória, .* de disco e\s", done.out) and "sem --check" in done.out
    assert "milhões de parâmetros" in done.out and "Contexto: de 128 para" in done.out


@slow
def test_check_changes_nothing_of_a_job_that_was_begun_even_with_restart(until):
    folder = until("4-self-answers")
    before, paths = untouched(folder), sorted(folder.rglob("*"))
    assert job(folder, "--check", "--restart").status == 0
    assert untouched(folder) == before and sorted(folder.rglob("*")) == paths


@slow
def test_of_two_runs_at_once_the_second_is_refused(until):
    from filelock import FileLock

    folder = until("1-base")
    before = contents(folder)
    with FileLock(folder / WORK / "lock"):
        done = job(folder, "--restart")
    assert done.status == 2 and "outra execução" in done.err and "Traceback" not in done.err
    assert contents(folder) == before


@pytest.mark.parametrize("as_file", [False, True])
def test_a_work_folder_that_is_not_of_this_script_is_refused(as_file, tmp_path):
    work = tmp_path / WORK
    if as_file:
        work.write_text("mine")
    else:
        work.mkdir()
        (work / "mine.txt").write_text("mine")
    arguments(tmp_path)
    before = contents(tmp_path)
    done = job(tmp_path)
    assert done.status == 2 and str(work) in done.err and contents(tmp_path) == before


# ------------------------------------------------------------------------------------------------ publish


@pytest.fixture
def results(tmp_path):
    """An older result in its place and a new one that is ready."""
    new = tmp_path / WORK / "6-result" / "model"
    for folder, name in ((tmp_path / OUTPUT, "old"), (new, "new")):
        folder.mkdir(parents=True)
        (folder / f"{name}.txt").write_text(name)
    settings = small_settings("--output-dir", tmp_path / OUTPUT)
    return SimpleNamespace(new=new, output=tmp_path / OUTPUT, settings=settings)


def test_a_result_takes_the_place_of_an_older_one_as_a_whole(results):
    tool.publish(results.new, results.settings)
    assert contents(results.output).keys() == {"new.txt"}
    assert not list(results.new.parent.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_all_files_of_a_result_can_be_read_by_others(results):
    (results.new / "adapter").mkdir(mode=0o700)
    for file in (results.new / "new.txt", results.new / "adapter" / "weights"):
        file.touch()
        file.chmod(0o600)
    tool.publish(results.new, results.settings)
    modes = {path.name: path.stat().st_mode & 0o777 for path in results.output.rglob("*")}
    assert modes == {"adapter": 0o755, "weights": 0o644, "new.txt": 0o644}


@pytest.mark.parametrize("failing", ["new", "output"])
def test_a_result_that_cannot_be_put_in_its_place_is_kept_and_so_is_the_older_one(failing, results, monkeypatch):
    rename, stuck = Path.rename, getattr(results, failing)

    def refuse(self, target):
        if self == stuck:
            raise PermissionError(errno.EACCES, "o arquivo está em uso")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(tool.InputError, match="em uso") as error:
            tool.publish(results.new, results.settings)
    assert str(results.new) in str(error.value) and contents(results.new).keys() == {"new.txt"}
    assert [path.read_text() for path in results.output.parent.rglob("old.txt")] == ["old"]
    tool.publish(results.new, results.settings)
    assert contents(results.output).keys() == {"new.txt"}


@slow
def test_an_older_result_without_a_key_is_replaced_too(until, monkeypatch):
    folder = until("5-pass-2")
    (folder / OUTPUT).mkdir()
    (folder / OUTPUT / "report.json").write_text('{"scores": {}, "settings": {}}')
    monkeypatch.setattr(tool.Stages, "__call__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert job(folder, "--overwrite").status == 130


@pytest.mark.parametrize("stage, name", [("1-base", "teacher.safetensors"), ("1-base", "heard.json"),
                                         ("2-healed", "model.safetensors")])
def test_of_a_damaged_stage_the_user_learns_how_to_make_it_anew(stage, name, until):
    folder = until("2-healed")
    damaged = folder / WORK / stage / name
    damaged.write_bytes(damaged.read_bytes()[:-100])
    done = job(folder)
    assert done.status == 2 and "--restart" in done.err and stage in done.err and "Baixe" not in done.err


def test_a_folder_of_stages_that_cannot_be_written_is_told_before_the_work(until, monkeypatch):
    folder, access = until("1-base"), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(".work") and access(path, mode))
    done = job(folder)
    assert done.status == 2 and "não posso escrever" in done.err and WORK in done.err


def test_a_base_whose_files_are_read_only_is_no_obstacle(until):
    """As of a shared model: what is copied from it must not be read-only, too."""
    folder = until("5-pass-2")
    base = shutil.copytree(DEMO, folder / "base")
    (base / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    (base / "preprocessor_config.json").chmod(0o444)
    assert job(folder, "--model-path", base).status in (0, 3)
    assert os.stat(folder / OUTPUT / "preprocessor_config.json").st_mode & stat.S_IWUSR


# ------------------------------------------------------------------------------------------------ full disk


def once(monkeypatch, owner, name, error, when=lambda *_: True):
    """Let a function fail the first time that `when` fits its arguments."""
    original, failed = getattr(owner, name), []

    def failing(*given, **named):
        if not failed and when(*given):
            failed.append(1)
            raise error
        return original(*given, **named)

    monkeypatch.setattr(owner, name, failing)
    return failed


def torch_s_error():
    """What torch says when the disk is full while it saves, word for word, with the error that it hides."""
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4671488 vs 4671376")
    error.__context__ = RuntimeError("basic_ios::clear: iostream error")
    return error


@slow
def test_a_job_whose_disk_is_full_again_and_again_goes_on_each_time_and_ends_the_same(whole, tmp_path):
    from safetensors import SafetensorError
    from transformers import modeling_utils

    words = "I/O error: No space left on device (os error 28)"
    writing = RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    def holds(text):
        return lambda path, *_: text in str(path)

    every_step = ("--checkpoint-minutes", 0)
    faults = [  # what fails, where, with which flags, and how many stages are whole then
        ((tool, "write_json", FULL, holds("heard.json")), (), 0),
        ((torch, "save", writing, lambda _, path, *__: "2-healed" in str(path)), every_step, 1),
        ((modeling_utils, "safe_save_file", SafetensorError(f"Error while serializing: {words}"),
          lambda _, path, *__: "3-pass-1.partial/model" in str(path)), (), 2),
        ((torch, "save", OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
          lambda _, path, *__: "5-pass-2" in str(path) and "checkpoint-2/optimizer" in str(path)), every_step, 4),
        ((tool, "write_json", FULL, holds("report.json")), (), 6),
    ]
    for fault, flags, ready in faults:
        before = {name: untouched(tmp_path / WORK / name) for name in finished_stages(tmp_path)}
        with pytest.MonkeyPatch.context() as patch:
            failed = once(patch, *fault)
            done = job(tmp_path, *flags)
        assert failed and done.status == 2 and "disco encheu" in done.err, (fault, done.err)
        assert finished_stages(tmp_path) == set(STAGES[:ready]) and not (tmp_path / OUTPUT).exists()
        assert all(untouched(tmp_path / WORK / name) == files for name, files in before.items())
    assert job(tmp_path).status == whole.done.status
    assert fingerprint(tmp_path) == whole.expected


@slow
def test_torch_s_own_words_for_a_full_disk_are_understood(until, monkeypatch):
    folder = until("4-self-answers")
    failed = once(monkeypatch, torch, "save", torch_s_error(), lambda _, path, *__: "optimizer" in str(path))
    done = job(folder, "--checkpoint-minutes", 0)
    assert failed and done.status == 2 and "disco encheu" in done.err


@slow
def test_on_a_disk_that_is_really_full_a_job_stops_with_a_message_and_goes_on_when_there_is_room(whole, tmp_path,
                                                                                               monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=13m", "none", str(disk)]
    if sys.platform != "linux" or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(tool.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
            for size in ("13m", "28m"):
                subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
                done = job(disk, "--checkpoint-minutes", 0)
                assert done.status == 2 and "disco encheu" in done.err
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        monkeypatch.setattr(tool, "run_course", lambda *_: (_ for _ in ()).throw(tool.InputError("até aqui")))
        assert "até aqui" in job(disk).err
        healed = f"{WORK}/2-healed/model.safetensors"
        assert fingerprint(disk)[healed] == whole.expected[healed]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_too_little_room_is_said_before_anything_is_done(tmp_path, monkeypatch):
    arguments(tmp_path)
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 10**6))
    before = contents(tmp_path)
    done = job(tmp_path)
    assert done.status == 2 and re.search(r"faltam \d+ MB de espaço livre", done.err) and contents(tmp_path) == before


def test_the_room_that_the_stages_take_already_is_not_asked_for_again(tmp_path, monkeypatch):
    work = tmp_path / WORK
    (work / "1-base").mkdir(parents=True)
    (work / "1-base" / "heard.json").write_bytes(bytes(3000))
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda _: SimpleNamespace(free=7000))
    tool.check_disk(10000, work)
    with pytest.raises(tool.InputError, match="faltam 1 MB"):
        tool.check_disk(10001, work)


# ------------------------------------------------------------------------------------------------ memory


def little_memory(monkeypatch, fits):
    """Let the demo's model run out of memory for inputs that do not fit; the largest inputs that did."""
    from transformers import LlamaForCausalLM

    forward, largest = LlamaForCausalLM.forward, {"trained": 0, "cells": 0}

    def limited(self, input_ids=None, **named):
        if not fits(self, input_ids):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if self.training:
            largest["trained"] = max(largest["trained"], input_ids.numel())
        largest["cells"] = max(largest["cells"], input_ids.numel())
        return forward(self, input_ids=input_ids, **named)

    monkeypatch.setattr(LlamaForCausalLM, "forward", limited)
    return largest


@slow
def test_a_step_that_does_not_fit_into_memory_is_done_in_more_and_more_parts(until, monkeypatch):
    folder = until("4-self-answers")
    little_memory(monkeypatch, lambda model, ids: not model.training or ids.numel() <= 180 or ids.shape[1] <= 40)
    monkeypatch.setattr(tool, "evaluate", lambda *_: (_ for _ in ()).throw(tool.InputError("até aqui")))
    done = job(folder)  # steps of 512 tokens; those of many short dialogues fit
    assert "até aqui" in done.err
    assert re.findall(r"Faltou memória.* em (\d+) partes", done.out) == ["2", "4"]
    done = job(folder, "--check")  # the next run begins with what was found
    assert done.status == 0 and "cada etapa em 4 partes" in done.out and "Faltou" not in done.out


def test_the_plan_is_measured_with_steps_in_parts_where_a_whole_one_does_not_fit_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "measure_pace", PACE)
    little_memory(monkeypatch, lambda model, ids: not torch.is_grad_enabled() or ids.numel() <= 200)
    done = job(tmp_path, "--check")
    assert done.status == 0 and "cada etapa em 4 partes" in done.out


def test_answers_that_do_not_fit_into_memory_are_the_same_written_in_smaller_batches(demo_chat, monkeypatch):
    prompts = [tool.prompt_ids(demo_chat.tokenizer, tool.question_and_answer(question, "")[:1])
               for question in tool.EVERYDAY["pt"][:12]]
    whole = tool.generate(demo_chat, prompts, limit=12)
    largest = little_memory(monkeypatch, lambda model, ids: len(ids) <= 4)
    assert [a.text for a in tool.generate(demo_chat, prompts, limit=12)] == [a.text for a in whole]
    assert largest["cells"] > 0


@slow
@pytest.mark.parametrize("work, loads, expected", [("listen", 2, 1), ("heal", 3, 1), ("run_course", 3, 0)])
def test_the_base_stays_in_memory_no_longer_than_it_is_needed(work, loads, expected, tmp_path, monkeypatch):
    """It is loaded for the plan and to be listened to; then comes the model to heal."""
    loaded, alive, load = [], [], tool.load_weights

    def noted(*given, **named):
        loaded.append(weakref.ref(model := load(*given, **named)))
        return model

    def look(*_):
        gc.collect()
        alive.extend(model() is not None for model in loaded)
        raise tool.InputError("até aqui")

    monkeypatch.setattr(tool, "load_weights", noted)
    monkeypatch.setattr(tool, work, look)
    assert "até aqui" in job(tmp_path).err and (len(alive), sum(alive)) == (loads, expected)


@slow
def test_when_no_number_of_parts_helps_the_user_learns_what_to_reduce(until, monkeypatch):
    folder = until("4-self-answers")
    little_memory(monkeypatch, lambda model, ids: not model.training)
    done = job(folder)
    assert done.status == 2 and "WINDOW" in done.err and "MAX_NEW_TOKENS" in done.err
    assert finished_stages(folder) == set(STAGES[:4])


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("CUDA error: out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")])
def test_whatever_a_lack_of_memory_is_called_it_is_understood(error, tmp_path, monkeypatch):
    parts = []

    def make_plan(job):
        parts.append(job.settings.gradient_accumulation)
        raise error

    monkeypatch.setattr(tool, "make_plan", make_plan)
    assert job(tmp_path).status == 2 and parts == [1, 2, 4, 4]  # the last time with checkpointing


# ------------------------------------------------------------------------------------------------ no numbers


def spoil_gradients(model):
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(float("nan"))


@slow
def test_a_loss_that_is_no_number_names_step_and_rate_and_keeps_the_checkpoint_before_it(until, monkeypatch):
    from transformers import LlamaModel

    folder, forward, calls = until("4-self-answers"), LlamaModel.forward, []

    def fail_late(self, *given, **named):
        output = forward(self, *given, **named)
        if self.training:
            calls.append(1)
            if len(calls) == 4:
                output.last_hidden_state = output.last_hidden_state * float("nan")
        return output

    monkeypatch.setattr(LlamaModel, "forward", fail_late)
    done = job(folder, "--checkpoint-minutes", 0)
    assert done.status == 2 and "etapa 4" in done.err and "--learning-rate-2" in done.err
    assert checkpoints(folder) == [3] and finished_stages(folder) == set(STAGES[:4])


@slow
def test_a_loss_that_explodes_names_step_and_rate(until):
    folder = until("4-self-answers")
    done = job(folder, "--learning-rate-2", 1, "--checkpoint-minutes", 0)
    assert done.status == 2 and re.search(r"etapa \d+: a perda explodiu", done.err) and "--learning-rate-2" in done.err
    assert finished_stages(folder) == set(STAGES[:4]) and not (folder / OUTPUT).exists()


@slow
def test_weights_that_are_no_numbers_make_no_complete_checkpoint(until, monkeypatch):
    folder = until("4-self-answers")
    at_step(monkeypatch, 3, spoil_gradients)
    done = job(folder, "--checkpoint-minutes", 0)
    assert done.status == 2 and "etapa 3" in done.err and "taxa de aprendizado" in done.err
    assert checkpoints(folder) == [2]


@slow
def test_weights_that_are_no_numbers_after_the_last_step_make_no_finished_stage(until, monkeypatch):
    folder = until("4-self-answers")
    at_step(monkeypatch, "last", spoil_gradients)
    done = job(folder)
    assert done.status == 2 and "taxa de aprendizado" in done.err
    assert not list(folder.glob("*.work/5-pass-2*/log.json"))


# ------------------------------------------------------------------------------------------------ after all of these


def test_the_base_is_as_it_was_before_all_of_these():
    assert contents(DEMO) == BASE_BEFORE
