"""Several processes, as `accelerate launch` and `torchrun` start them: two on the processor, talking over gloo."""

import json
import os
import subprocess
import sys

import pytest
from conftest import DEMO, SCRIPT
from safetensors.torch import load_file

SMALL = ("--self-text", 600, "--num-self-answers", 8, "--heal-steps", 6, "--steps-1", 6, "--steps-2", 4,
         "--eval-questions", 12, "--max-new-tokens", 48, "--window", 128, "--batch-size", 4, "--output-dir", "novo")
# The script with fewer questions than it asks otherwise.
# And a second process that is slow to look into the folder of what was saved.
HURRIED = """
import os
import sys
import time
import pytest
import rename_obrutai
import test_stages

test_stages.hurry(pytest.MonkeyPatch())
rename_obrutai.measure_pace = test_stages.PACE
if os.environ.get("RANK") == "1":
    look = os.listdir
    os.listdir = lambda *place: time.sleep(3 * ("2-healed" in str(place))) or look(*place)
sys.exit(rename_obrutai.main())
"""


@pytest.fixture(scope="module")
def hurried(tmp_path_factory):
    """That script's file."""
    path = tmp_path_factory.mktemp("script") / "hurried.py"
    path.write_text(HURRIED, encoding="utf-8")
    return path


def launch(*arguments, cwd, script, processes=2, sharded=False):
    """The script in processes of its own, with FSDP or not, as `accelerate launch` sets it up; no exit status of two
    comes through the launcher but 0."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes] * (processes > 1)
    command = [*command, *[sys.executable] * (processes == 1), script, *arguments]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
                   "ACCELERATE_USE_FSDP": str(sharded).lower(),
                   "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent / "tests")])}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True,
                          encoding="utf-8", timeout=400)


@pytest.fixture(scope="module")
def alone(hurried, tmp_path_factory):
    """A small run in one process, and its folder."""
    folder = tmp_path_factory.mktemp("alone")
    done = launch(*SMALL, cwd=folder, script=hurried, processes=1)
    assert done.returncode in (0, 3), done.stderr
    return done, folder


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "in pieces"])
def test_two_processes_make_the_same_model_as_one_and_speak_once(sharded, alone, hurried, tmp_path):
    alone, folder = alone
    (tmp_path / "one").symlink_to(folder)
    (tmp_path / "two").mkdir()
    together = launch(*SMALL, cwd=tmp_path / "two", script=hurried, sharded=sharded)
    assert (tmp_path / "two" / "novo" / "report.json").is_file(), together.stderr
    assert "]: Traceback" not in together.stderr  # the launcher's own tells of the exit status
    steps = [[line for line in done.stdout.splitlines() if line[1:2] == "/"] for done in (alone, together)]
    assert steps[0] == steps[1] and len(steps[0]) == 6
    heard = [json.loads((tmp_path / name / "novo.work" / "1-base" / "heard.json").read_text(encoding="utf-8"))
             for name in ("one", "two")]
    assert heard[0] == heard[1]
    healed = [load_file(tmp_path / name / "novo.work" / "2-healed" / "model.safetensors") for name in ("one", "two")]
    base = load_file(DEMO / "model.safetensors")
    moved = max((healed[0][key] - base[key].float()).abs().max().item() for key in base)
    apart = max((healed[0][key] - healed[1][key]).abs().max().item() for key in base)
    assert apart < 0.05 * moved  # sums in another order, nothing else
    reports = [json.loads((tmp_path / name / "novo" / "report.json").read_text(encoding="utf-8"))["scores"]
               for name in ("one", "two")]
    assert reports[0]["before"] == reports[1]["before"]
    for figure in ("identity", "old_identity", "retention"):
        assert abs(reports[0]["pass_2"][figure] - reports[1]["pass_2"][figure]) <= 0.25
    files = [{path.name for path in (tmp_path / name / "novo").iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
    assert "distributed" not in (tmp_path / "two" / "novo" / "config.json").read_text(encoding="utf-8")


PIECES = """
import sys
from pathlib import Path
import conftest
import rename_obrutai as tool


def held(model):
    return sum(getattr(p, "_local_tensor", p).numel() for n, p in model.named_parameters() if "lora_" not in n)


def local(model):
    return [getattr(p, "_local_tensor", p) for p in model.parameters()]


def main(method):
    settings = conftest.small_settings("--method", method, "--lora-rank", "4")
    tool.quiet_libraries(settings)
    tool.accelerate.PartialState(cpu=True)
    whole, folder = held(tool.load_model(settings.model_path, settings)), Path(method)
    chat, later = (tool.load_chat(settings.model_path, settings, adapt=True, train=True) for _ in range(2))
    listener = tool.Listener(tool.load_chat(settings.model_path, settings), tool.Names("x", "y", ()), [], None)
    talks = listener.answers([("everyday", [{"role": "user", "content": "Oi!"}])], "", 8)
    talks, teacher = tool.read_talks(listener.base, talks)
    lesson = tool.Talk(tool.question_and_answer("Oi!", "Oi! Tudo bem?"), "lesson")
    pools = [tool.Pool([lesson], 1.0), tool.Pool(talks, 1.0)]
    batches = conftest.make_batches(chat.tokenizer, pools, [64], 4, 128, "s")
    log = conftest.train(chat, batches, teacher, 1e-3, settings, "passo 1", folder / "training")
    tool.save_stage(chat, folder, log)
    tool.accelerate.PartialState().wait_for_everyone()
    models = chat.model, tool.load_model(folder, settings, train=True), tool.load_model(folder, settings)
    conftest.train(later, batches, teacher, 1e-3, settings, "passo 1", folder / "training")  # begins anew
    same = all((a - b).abs().max() < 1e-6 for other in (models[1], later.model)
               for a, b in zip(local(models[0]), local(other)))
    line = " ".join(map(str, ("HELD", *(held(model) / whole for model in models), int(same))))
    sys.stdout.write(f"\\n{line}\\n")  # in one piece, as the other process writes as well


for method in ("full", "lora"):
    main(method)
"""


@pytest.mark.slow
def test_with_fsdp_each_process_holds_half_of_the_weights_while_it_trains_and_the_saved_stage_is_whole(tmp_path):
    (tmp_path / "pieces.py").write_text(PIECES, encoding="utf-8")
    done = launch(cwd=tmp_path, sharded=True, script=tmp_path / "pieces.py")
    shares = [tuple(map(float, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("HELD")]
    assert len(shares) == 4, done.stderr
    assert all(share == pytest.approx((0.5, 0.5, 1, 1), abs=0.01) for share in shares)
    saved, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "full", DEMO))
    assert all(saved[name].shape == weight.shape for name, weight in base.items())
    adapter = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tuple(weight.shape) for name, weight in adapter.items() if "q_proj.lora_" in name} == {(4, 128), (128, 4)}


@pytest.mark.slow
def test_a_mistake_is_told_once_and_nothing_is_written(tmp_path):
    """Although the process that tells it is the last to see it, and the launcher stops all when one has ended."""
    script, folder = tmp_path / "late.py", tmp_path / "here"
    script.write_text("import os, sys, time\ntime.sleep(4 * (os.environ['RANK'] == '0'))\n"
                      "import rename_obrutai\nsys.exit(rename_obrutai.main())\n", encoding="utf-8")
    folder.mkdir()
    done = launch("--model-path", folder / "nada", "--output-dir", "novo", cwd=folder, script=script)
    assert done.returncode != 0 and done.stderr.count("Erro: ") == 1 and "nada" in done.stderr
    assert "]: Traceback" not in done.stderr  # of the one that waits for the first
    assert list(folder.iterdir()) == []
