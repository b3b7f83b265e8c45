"""Several processes, as `accelerate launch` and `torchrun` start them: two on the processor, talking over gloo."""

import json
import os
import subprocess
import sys

import pytest
from conftest import DEMO, SCRIPT, run_script
from safetensors.torch import load_file

SMALL = ("--num-self-text", 40, "--num-self-answers", 12, "--heal-steps", 6, "--epochs-1", 2, "--epochs-2", 3,
         "--eval-questions", 8, "--max-new-tokens", 24, "--window", 128, "--batch-size", 4, "--output-dir", "novo")


def launch(*arguments, cwd):
    """The script in two processes; no exit status of theirs but 0 comes through the launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT)]
    command += map(str, arguments)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8",
                          timeout=400)


@pytest.mark.slow
def test_two_processes_make_the_same_model_as_one_and_speak_once(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    alone = run_script(*SMALL, cwd=tmp_path / "one")
    assert alone.returncode in (0, 3), alone.stderr
    together = launch(*SMALL, cwd=tmp_path / "two")
    assert (tmp_path / "two" / "novo" / "report.json").is_file(), together.stderr
    steps = [[line for line in done.stdout.splitlines() if line[1:2] == "/"] for done in (alone, together)]
    assert steps[0] == steps[1] and len(steps[0]) == 6
    texts = [json.loads((tmp_path / name / "novo.work" / "1-self-text" / "self_text.json").read_text(encoding="utf-8"))
             for name in ("one", "two")]
    assert texts[0]["everyday"] == texts[1]["everyday"] and texts[0]["rows"] == texts[1]["rows"]
    healed = [load_file(tmp_path / name / "novo.work" / "2-healed" / "model.safetensors") for name in ("one", "two")]
    base = load_file(DEMO / "model.safetensors")
    moved = max((healed[0][key] - base[key].float()).abs().max().item() for key in base)
    apart = max((healed[0][key] - healed[1][key]).abs().max().item() for key in base)
    assert apart < 0.05 * moved  # sums in another order, nothing else
    reports = [json.loads((tmp_path / name / "novo" / "report.json").read_text(encoding="utf-8"))["scores"]
               for name in ("one", "two")]
    assert reports[0]["before"] == reports[1]["before"]
    for figure in ("identity", "old_identity", "retention"):
        assert abs(reports[0]["pass_2"][figure] - reports[1]["pass_2"][figure]) <= 0.25  # a few of 30 and 8 questions
    files = [{path.name for path in (tmp_path / name / "novo").iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_mistake_is_told_once_and_nothing_is_written(tmp_path):
    done = launch("--model-path", tmp_path / "nada", "--output-dir", "novo", cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("Erro: ") == 1 and "nada" in done.stderr
    assert list(tmp_path.iterdir()) == []
