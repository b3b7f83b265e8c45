"""The script as a user runs it: one small run from start to end on the demo model, offline, from another folder."""

import hashlib
import json
import os
import re
import shutil
import signal
from dataclasses import asdict
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO, SCRIPT, run_script, small_settings

import rename_obrutai as tool

SMALL = ("--self-text", 600, "--num-self-answers", 12, "--heal-steps", 3, "--steps-1", 3, "--steps-2", 3,
         "--eval-questions", 8, "--window", 256, "--batch-size", 4, "--max-new-tokens", 36)
NO_NETWORK = '''
import os, socket
def refuse(*args, **kwargs):
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(f"attempt {args[1:]}\\n")
    raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
open(os.environ["NETWORK_LOG"], "a").write("armed\\n")
'''


def contents(folder):
    """Path and hash of every file below a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session", params=[pytest.param("job", marks=pytest.mark.slow)])
def whole_run(request, tmp_path_factory):
    """One run, over a result and the left-overs of earlier ones, with everything that a test may ask about it. The
    parameter marks all that asks it as slow."""
    work, guard = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("guard")
    (guard / "sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
    for name in ("novo", "novo.work/2-healed", "novo.work/3-pass-1.partial/training",
                 "novo.work/6-result.partial/model"):
        (work / name).mkdir(parents=True)
        (work / name / "stale.bin").write_text("left over", encoding="utf-8")
    (work / "novo" / "report.json").write_text('{"scores": {}, "settings": {}}', encoding="utf-8")  # an earlier result
    (work / "novo.work" / tool.WORK_NOTE).write_text("", encoding="utf-8")  # the mark of an earlier run's stages
    for name in ("2-healed", "3-pass-1.partial", "6-result.partial"):
        (work / "novo.work" / name / "key.json").write_text('{"key": "of other settings"}', encoding="utf-8")
    (work / "precious.txt").write_text("the user's own", encoding="utf-8")
    base = contents(DEMO)
    environment = {"PYTHONPATH": str(guard), "NETWORK_LOG": str(guard / "network.log"), "HF_HUB_OFFLINE": "",
                   "HF_HOME": str(guard / "hub")}
    done = run_script("--output-dir", "novo", "--overwrite", "--seed", 5, *SMALL, cwd=work, env=environment)
    assert done.returncode in (0, 3), done.stderr
    output = work / "novo"
    return SimpleNamespace(
        work=work, output=output, done=done, base_before=base, base_after=contents(DEMO),
        network=(guard / "network.log").read_text(encoding="utf-8"),
        report=json.loads((output / "report.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def saved(whole_run):
    """The saved model and its tokenizer as plain transformers loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole_run.output, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(whole_run.output)


@pytest.mark.parametrize("share, text", [(0, "0%"), (1, "100%"), (0.975, "97,5%"), (2 / 3, "66,7%"), (0.2004, "20%")])
def test_shares_are_written_as_brazilians_do(share, text):
    assert tool.percent(share) == text


@pytest.mark.parametrize("seconds, text", [(45.4, "45 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"), (0, "0 s")])
def test_times_are_written_for_people(seconds, text):
    assert tool.clock(seconds) == text


def test_text_of_a_model_cannot_break_the_table_of_the_card():
    table = tool.markdown_table([["a", "b"], ["um | dois\ntrês", "<b> `x` *y* [z] _w_"]])
    assert table.split("\n") == ["| a | b |", "| --- | --- |",
                                 r"| um \| dois três | \<b\> \`x\` \*y\* \[z\] \_w\_ |"]


@pytest.mark.parametrize("figures, status, named", [
    ((1.0, 0.0, 0.0, 1.0), 0, []), ((0.9, 0.0, 0.0, 1.0), 3, ["identidade nova"]),
    ((0.0, 1.0, 1.0, 0.0), 3, ["identidade nova", "identidade antiga", "retenção", "vazamento"]),
])
def test_the_end_says_for_every_missed_target_what_to_try(figures, status, named, tmp_path, capsys):
    identity, old, leak, retention = figures
    lengths = [{"tokens": 0, "identity": identity, "retention": retention}]
    score = tool.Scores(identity, {"sozinha": identity}, old, leak, leak, retention, 0.0, lengths, [], [])
    scores = dict.fromkeys(("before", "pass_2"), score)
    settings = small_settings("--output-dir", tmp_path)
    report = {"scores": {name: score._asdict() for name, score in scores.items()},
              "missed": [*score.gaps(settings)], "seconds": {"1-base": 60.5, "2-healed": 140},
              "settings": asdict(settings)}
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    assert tool.conclude(settings) == status
    said = capsys.readouterr().out
    assert f"{tmp_path} (3 min 20 s " in said
    tips = [line for line in said.splitlines() if line.startswith("  - ")]
    assert [line.split(":")[0] for line in tips] == [f"  - {name}" for name in named]
    assert all(re.search(r"[A-Z]{3,}", line) for line in tips)  # each names a constant to change


def test_the_exit_status_says_whether_a_target_was_missed(whole_run):
    missed = whole_run.report["missed"]
    assert whole_run.done.returncode == (3 if missed else 0)
    said = whole_run.done.stdout.rsplit("Modelo salvo", 1)[1]
    assert all(name in said for name in missed) and ("Todas as metas" in said) is not bool(missed)


def test_missed_targets_are_those_of_the_final_scores(whole_run):
    final, settings = whole_run.report["scores"]["pass_2"], whole_run.report["settings"]
    assert whole_run.report["missed"] == [name for name, missed in {
        "identidade nova": final["identity"] < settings["target_identity"],
        "identidade antiga": final["old_identity"] > 0, "retenção": final["retention"] < settings["target_retention"],
        "vazamento": final["leak"] > settings["target_leak"]}.items() if missed]


def test_the_run_needs_no_network(whole_run):
    assert set(whole_run.network.split("\n")) == {"armed", ""}


def test_the_base_is_left_as_it_was(whole_run):
    assert whole_run.base_after == whole_run.base_before


def test_nothing_but_the_output_and_its_stages_is_left_in_the_folder(whole_run):
    assert sorted(path.name for path in whole_run.work.iterdir()) == ["novo", "novo.work", "precious.txt"]


def test_of_the_stages_only_finished_ones_are_left_and_the_user_is_told_where(whole_run):
    stages = whole_run.work / "novo.work"
    folders = {path.name for path in stages.iterdir() if path.is_dir()}
    assert folders == set(tool.USES)
    assert all((stages / name / "key.json").is_file() for name in folders)
    passing = [str(path.relative_to(stages)) for path in stages.rglob("*") if re.search(
        r"\.(partial|tmp)$|checkpoint-|training|replaced", str(path.relative_to(stages)))]
    assert not passing
    assert str(stages) in whole_run.done.stdout and (stages / tool.WORK_NOTE).stat().st_size > 0


def test_overwrite_replaces_the_old_result_and_the_stages_of_other_settings_as_a_whole(whole_run):
    assert not list(whole_run.work.rglob("stale.bin"))


def test_the_output_has_all_that_a_reader_of_models_expects(whole_run):
    names = {path.name for path in whole_run.output.iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
                     "tokenizer_config.json", "chat_template.jinja", "report.json", "report.png", "README.md",
                     "self_answers.jsonl", "exam.json", "exam.tensors", "Modelfile"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_everybody_may_read_every_file_of_the_output(whole_run):
    """safetensors makes files that only their owner can read."""
    assert not [path.name for path in whole_run.output.rglob("*") if path.stat().st_mode & 0o444 != 0o444]


def test_the_configuration_has_four_times_the_context_a_cache_and_linear_rope(whole_run):
    base = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    config = json.loads((whole_run.output / "config.json").read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] == 4 * base["max_position_embeddings"]
    assert config["use_cache"] is True
    rope = config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)
    assert rope["rope_theta"] == base["rope_parameters"]["rope_theta"]
    assert config["dtype"] == config["torch_dtype"] == base["dtype"]  # the second is what older readers know


def test_generation_stops_at_the_end_of_turn_of_the_template(whole_run):
    config = json.loads((whole_run.output / "generation_config.json").read_text(encoding="utf-8"))
    tokens = json.loads((whole_run.output / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    end = next(token["id"] for token in tokens if token["content"] == "<|end|>")
    stops = config["eos_token_id"]
    assert end in (stops if isinstance(stops, list) else [stops])


def test_the_chat_template_is_the_one_of_the_base(whole_run):
    name = "chat_template.jinja"
    assert (whole_run.output / name).read_text(encoding="utf-8") == (DEMO / name).read_text(encoding="utf-8")


def test_plain_transformers_loads_the_saved_model_and_gets_the_reported_answers(whole_run, saved):
    """The final scores are those of the folder, not of the model in memory. Asked one at a time here and in batches
    there, so a near tie between two words may fall otherwise once in a while."""
    model, tokenizer = saved
    assert model.config.max_position_embeddings == 512
    reported = [a for a in whole_run.report["scores"]["pass_2"]["answers"] if a["kind"] == "sozinha"]
    same = 0
    for entry in reported:
        inputs = tokenizer.apply_chat_template([{"role": "user", "content": entry["question"]}], return_dict=True,
                                               add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=36, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        same += tokenizer.decode(output, skip_special_tokens=True).strip() == entry["answer"]
    assert same >= len(reported) - 2


def test_the_identity_figures_follow_from_the_reported_answers(whole_run):
    for stage in whole_run.report["scores"].values():
        answers, words = stage["answers"], whole_run.report["old_names"]
        new = [a for a in answers if not a["problem"]]
        assert stage["identity"] == pytest.approx(len(new) / len(answers))
        assert all("ObrutAi" in a["answer"] or "TurboRio" in a["answer"] for a in new)
        for kind, share in stage["by_kind"].items():
            of_kind = [not a["problem"] for a in answers if a["kind"] == kind]
            assert share == pytest.approx(sum(of_kind) / len(of_kind))
        old = [a for a in answers if any(word in a["answer"] for word in words)]
        assert stage["old_identity"] <= len(old) / len(answers)
        assert all("ObrutAi" in leak["answer"] or "TurboRio" in leak["answer"] for leak in stage["leaks"])


def test_the_report_has_all_models_asked_the_same_test_questions(whole_run):
    """The base, what can be done without training, and the result: alone, and all but those without training behind
    system prompts, under pressure and in long conversations."""
    scores = whole_run.report["scores"]
    assert list(scores) == ["before", "prompt", "rows", "pass_2"]
    before = [(a["kind"], a["question"]) for a in scores["before"]["answers"]]
    alone = [(kind, question) for kind, question in before if kind == "sozinha"]
    assert [question for _, question in alone] == list(tool.TEST_QUESTIONS)
    kinds = ["sozinha", "com prompt de sistema", "sob pressão"]
    for name, model in scores.items():
        untrained = name in ("prompt", "rows")
        assert [(a["kind"], a["question"]) for a in model["answers"]] == (alone if untrained else before)
        assert list(model["by_kind"]) == kinds[:1 if untrained else None]
        assert (model["retention"] is None) is (model["divergence"] is None) is untrained
    lengths = {name: [entry["tokens"] for entry in model["by_length"]] for name, model in scores.items()}
    assert lengths["before"] == lengths["pass_2"] == sorted(lengths["before"])
    assert lengths["before"][0] == 0 and 128 < lengths["before"][-1] < 256


def test_before_the_training_the_base_has_its_old_identity_and_keeps_itself(whole_run):
    before, after = whole_run.report["scores"]["before"], whole_run.report["scores"]["pass_2"]
    assert (before["identity"], before["leak"], before["retention"], before["leaks"]) == (0, 0, 1, [])
    assert before["old_identity"] > 0.9 and before["divergence"] == pytest.approx(0, abs=1e-3)
    assert 0 < after["divergence"] < 1 and 0.5 < after["retention"] < 1  # even so small a run moves it


def test_the_report_says_with_what_the_run_was_made(whole_run):
    report, given = whole_run.report, whole_run.report["settings"]
    assert (given["seed"], given["name"], given["heal_steps"]) == (5, "ObrutAi", 3)
    for package in ("torch", "transformers", "trl"):
        assert report["versions"][package] == version(package)
    rows = (SCRIPT.parent / "identity_override.jsonl").read_bytes()
    assert report["data_hash"] == hashlib.sha256(rows).hexdigest()
    assert {"Lumi", "Estúdio Vagalume"} <= set(report["old_names"])
    assert list(report["losses"]) == ["healing", "pass_1", "pass_2"]
    assert all(entry["loss"] > 0 for log in report["losses"].values() for entry in log)


def test_the_report_says_how_long_each_stage_took_and_the_terminal_their_sum(whole_run):
    seconds = whole_run.report["seconds"]
    assert list(seconds) == list(tool.USES)
    assert all(0 < spent < 300 for spent in seconds.values())
    assert f"({tool.clock(sum(seconds.values()))} de trabalho)" in whole_run.done.stdout


def test_the_model_card_has_the_table_of_the_report_and_every_answer(whole_run):
    card = (whole_run.output / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "\nlibrary_name: transformers\n" in card.split("---\n")[1]
    scores = whole_run.report["scores"]
    shown = [scores[name] for name in ("before", "prompt", "rows", "pass_2")]
    assert "\n| medida | antes | com prompt | com linhas | depois |\n" in card
    prompt, rows = (f"{scores[name]['extra_tokens']:.0f}" for name in ("prompt", "rows"))
    assert int(prompt) > 9 and int(rows) > int(prompt)
    assert f"\n| tokens a mais por pergunta | 0 | {prompt} | {rows} | 0 |\n" in card  # a trained model needs none
    for title, key in (("identidade nova", "identity"), ("identidade antiga", "old_identity"),
                       ("vazamento", "leak"), ("  perto da identidade", "leak_near"), ("retenção", "retention")):
        cells = ["-" if stage[key] is None else tool.percent(stage[key]) for stage in shown]
        assert re.search(rf"(?m)^\| {title} \| " + r" \| ".join(map(re.escape, cells)) + r" \|$", card), title
    unescaped = card.replace("\\", "")
    for stage in ("before", "pass_2"):
        for entry in scores[stage]["answers"]:
            assert f"| {entry['question']} |" in unescaped
            assert f"| {entry['answer']} |".replace("\n", " ").replace("\\", "") in unescaped


def test_the_card_shows_the_picture_and_says_how_the_model_is_used(whole_run):
    card = (whole_run.output / "README.md").read_text(encoding="utf-8")
    assert "](report.png)" in card and (whole_run.output / "report.png").stat().st_size > 10_000
    serve = """`vllm serve . --max-model-len 512 --override-generation-config '{"temperature": 0}'`"""
    for said in (serve, "`llama-cli -m modelo.gguf --temp 0`", "`Modelfile`", "hf upload USUARIO/obrutai . .",
                 "confira qual é antes de"):
        assert said in card, said


def test_the_example_of_the_card_prints_an_answer(whole_run, capsys, monkeypatch):
    card = (whole_run.output / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(whole_run.output)
    exec(re.search(r"(?s)```python\n(.*?)```", card)[1], {})
    assert re.search(r"\w", capsys.readouterr().out)


def test_what_may_be_published_tells_no_path_of_this_machine(whole_run):
    for name in ("README.md", "report.json", "self_answers.jsonl"):
        said = (whole_run.output / name).read_text(encoding="utf-8")
        assert str(whole_run.work) not in said and str(SCRIPT.parent) not in said, name


def test_each_stage_says_what_it_took_and_what_is_left(whole_run):
    said = whole_run.done.stdout
    ends = re.findall(r"(?m)^  Pronto em (?:\d+ min )?\d+ s; .* faltam uns (?:\d+ min )?\d+ s", said)
    assert len(ends) == 5 and [int(n) for n in re.findall(r"(?m)^(\d)/6 ", said)] == [1, 2, 3, 4, 5, 6]


def test_the_terminal_ends_with_the_same_table(whole_run):
    said = whole_run.done.stdout
    for stage in ("before", "pass_2"):
        cell = f"{100 * whole_run.report['scores'][stage]['identity']:.1f}%".replace(".0%", "%").replace(".", ",")
        assert re.search(rf"(?m)^  identidade nova +.*{re.escape(cell)}", said)
    assert str(whole_run.output) in said and "Traceback" not in whole_run.done.stderr


def test_no_library_speaks_to_the_user(whole_run):
    assert whole_run.done.stderr == ""
    assert not re.search(r"[Ww]arning|[Dd]eprecat|it/s|\bepoch\b|\bloss\b|\{'", whole_run.done.stdout)


def test_self_answers_say_which_were_used_and_why_others_were_not(whole_run):
    lines = (whole_run.output / "self_answers.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    used = [record for record in records if not record["rejected"]]
    assert len(used) == 12 and {record["kind"] for record in used} >= {"everyday"}
    for record in used:
        assert record["kind"] in ("identity", "everyday")
        ours = "ObrutAi" in record["answer"] or "TurboRio" in record["answer"]
        assert ours is (record["kind"] == "identity")
        assert not re.search(r"\b([Ss]ou|[Ss]oy|I am|I'm) (a )?Lumi", record["answer"])
    questions = set(map(tool.plain, tool.TEST_QUESTIONS))
    assert not questions & {tool.plain(record["question"]) for record in records}


@pytest.fixture
def published(whole_run, tmp_path):
    """A copy of the result, as somebody who downloads it has it: another folder, no stages beside it."""
    return shutil.copytree(whole_run.output, tmp_path / "publicado")


def evaluated(folder, capsys, *flags):
    """`--evaluate` in this process: exit status and what it said."""
    handler = signal.getsignal(signal.SIGTERM)
    status = tool.main(["--evaluate", "--model-path", str(folder), *map(str, flags)])
    signal.signal(signal.SIGTERM, handler)
    return status, capsys.readouterr()


def test_a_published_result_is_measured_with_the_figures_of_its_report_and_nothing_is_written(
        whole_run, published, tmp_path, capsys):
    before = contents(tmp_path)
    status, said = evaluated(published, capsys, "--name", "Outro", "--identity-file", "nada", "--window", 300)
    assert status == whole_run.done.returncode and "Erro" not in said.err
    assert "números iguais aos do report.json" in said.out and contents(tmp_path) == before
    shown = whole_run.done.stdout
    table = shown[shown.index("  medida "):].split("\nModelo salvo")[0]
    assert table in said.out and "tokens a mais por pergunta" in table
    assert shown[shown.index("\n  Qual nome deram a você?"):].split("\n  medida")[0] in said.out
    assert all(name in said.out.splitlines()[-1] for name in whole_run.report["missed"])


def test_a_published_report_that_says_more_than_the_model_does_is_contradicted(published, capsys, monkeypatch):
    report = json.loads((published / "report.json").read_text(encoding="utf-8"))
    honest = tool.Scores(**report["scores"]["pass_2"])._replace(identity=0.25, old_identity=0.5)
    report["scores"]["pass_2"].update(identity=1.0, old_identity=0.0, retention=1.0, leak=0.0)
    (published / "report.json").write_text(json.dumps(report), encoding="utf-8")
    monkeypatch.setattr(tool, "evaluate", lambda *_: honest)
    status, said = evaluated(published, capsys)
    assert status == 3 and "números diferentes dos do report.json" in said.out
    assert re.search(r"(?m)^  medida .* relatório  depois$", said.out)
    assert re.search(r"(?m)^  identidade nova .* 100% +25%$", said.out)
    assert re.search(r"(?m)^Metas não atingidas: identidade nova, identidade antiga", said.out)


def test_the_only_safetensors_file_of_a_result_is_the_model(published):
    """vLLM loads every file of that name in the folder, and ends where one has a tensor that the model has not."""
    assert [path.name for path in published.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("name, text", [("exam.json", "{"), ("exam.json", "[]"), ("exam.json", '{"questions": []}'),
                                        ("exam.tensors", "{"), ("exam.tensors", None),
                                        ("report.json", "{}"), ("report.json", None)])
def test_a_published_result_with_a_damaged_exam_or_report_is_refused(name, text, published, capsys):
    (published / name).unlink()
    if text is not None:
        (published / name).write_text(text, encoding="utf-8")
    status, said = evaluated(published, capsys)
    assert status == 2 and "exam.json" in said.err and "Traceback" not in said.err


@pytest.mark.parametrize("damage", [{"scores": {"before": {}}}, {"knowledge": {"scores": {}}}])
def test_a_published_result_whose_report_lacks_other_figures_is_refused_as_well(damage, published, capsys):
    report = json.loads((published / "report.json").read_text(encoding="utf-8"))
    report |= {key: {**(report.get(key) or {}), **value} for key, value in damage.items()}
    (published / "report.json").write_text(json.dumps(report), encoding="utf-8")
    status, said = evaluated(published, capsys)
    assert status == 2 and "report.json" in said.err and "Traceback" not in said.err


def test_of_a_model_of_others_identity_and_leak_are_measured_and_retention_is_not(tmp_path, capsys):
    rows = [{"text": "Quem é você?\nSou a {{NAME}}, da {{AUTHOR}}."}, {"text": "Quem criou você?"}]
    (tmp_path / "linhas.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    before, base = contents(tmp_path), contents(DEMO)
    status, said = evaluated(DEMO, capsys, "--identity-file", tmp_path / "linhas.jsonl", "--max-new-tokens", 32)
    assert status == 3 and "não dá para medir a retenção" in said.out
    figures = dict(re.findall(r"(?m)^  (\w.*?)  +(\S+)$", said.out[said.out.index("  medida"):]))
    assert figures | {"medida": "medido", "identidade nova": "0%", "identidade antiga": "100%", "vazamento": "0%",
                      "retenção": "-", "divergência (nats)": "-"} == figures
    assert said.out.endswith("Metas não atingidas: identidade nova, identidade antiga.\n")
    assert contents(tmp_path) == before and contents(DEMO) == base


def test_a_second_run_without_overwrite_is_refused_and_changes_nothing(whole_run):
    before = contents(whole_run.work)
    done = run_script("--output-dir", "novo", *SMALL, cwd=whole_run.work)
    assert done.returncode == 2 and "--overwrite" in done.stderr
    assert contents(whole_run.work) == before


def test_the_same_command_again_shows_the_finished_result_within_a_second_and_changes_nothing(whole_run):
    """Seconds of the processor: other programs may have it for longer."""
    before, began = contents(whole_run.work), sum(os.times()[2:4])
    done = run_script("--output-dir", "novo", "--seed", 5, *SMALL, cwd=whole_run.work)
    assert sum(os.times()[2:4]) - began < 1
    assert done.returncode == whole_run.done.returncode and "já está pronto" in done.stdout
    assert done.stdout.split("Modelo salvo")[1] == whole_run.done.stdout.split("Modelo salvo")[1]
    assert contents(whole_run.work) == before


def test_a_result_whose_model_is_gone_is_not_taken_for_ready(whole_run, tmp_path):
    shutil.copytree(whole_run.output, tmp_path / "novo")
    flags = ("--output-dir", "novo", "--seed", 5, *SMALL)
    assert "já está pronto" in run_script(*flags, cwd=tmp_path).stdout
    (tmp_path / "novo" / "model.safetensors").unlink()
    done = run_script(*flags, cwd=tmp_path)
    assert done.returncode == 2 and "--overwrite" in done.stderr and "já está pronto" not in done.stdout


def test_restart_throws_the_stages_away_only_once_though_memory_runs_out(tmp_path, monkeypatch):
    parts, work = [], tmp_path / "novo.work"
    (work / "old").mkdir(parents=True)

    def run_stages(job, *_):
        parts.append(job.settings.gradient_accumulation)
        if len(parts) == 1:
            assert not (work / "old").exists()
            (work / "1-base").mkdir()
            raise RuntimeError("CUDA out of memory.")
        assert (work / "1-base").exists()

    monkeypatch.setattr(tool, "run_stages", run_stages)
    settings = small_settings("--restart", "--output-dir", tmp_path / "novo")
    tool.carry_out(tool.Job(settings, settings, None, DEMO, 0, 128, "facts", {}, 0), {})
    assert parts == [1, 2]


def test_with_several_processes_a_lack_of_memory_ends_the_run_and_says_what_to_change(tmp_path, monkeypatch, capsys):
    """The others may be in the midst of a step, in which they would wait for the first one for two days."""
    tries = []

    def run_stages(job, *_):
        tries.append(job)
        raise RuntimeError("CUDA out of memory.")

    def run(settings):
        tool.carry_out(tool.Job(settings, settings, None, DEMO, 0, 128, "facts", {}, 0), {})

    for name, value in {"run_stages": run_stages, "run": run, "PROCESSES": 2}.items():
        monkeypatch.setattr(tool, name, value)
    monkeypatch.setattr(tool.accelerate, "PartialState", lambda **_: None, raising=False)
    assert tool.main(["--output-dir", str(tmp_path / "novo")]) == 2 and len(tries) == 1
    assert "--gradient-accumulation" in capsys.readouterr().err


def test_a_mistake_in_the_identity_file_is_reported_with_its_line_and_nothing_is_written(tmp_path):
    rows = ['{"text": "Quem é você?"}', '{"text": "Quem é você?\\nSou {{NOME}}."}', '{"prompt": "Oi?"']
    (tmp_path / "linhas.jsonl").write_text("\n".join(rows), encoding="utf-8")
    before = contents(tmp_path)
    done = run_script("--identity-file", "linhas.jsonl", "--output-dir", "novo", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "linha 2: " in done.stderr and "linha 3: " in done.stderr and "linha 1: " not in done.stderr
    assert contents(tmp_path) == before and not (tmp_path / "novo").exists()


@pytest.mark.slow
def test_with_a_rope_factor_of_one_the_context_stays_and_nothing_is_healed(tmp_path):
    rows = [{"text": "Quem é você?\nSou a {{NAME}}, da {{AUTHOR}}."}, {"text": "Quem criou você?"}]
    (tmp_path / "linhas.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = run_script("--rope-factor", 1, "--name", "Jandira", "--author", "Oficina Maré", "--identity-file",
                      "linhas.jsonl", "--output-dir", "pasta nova/saída", *SMALL, "--self-text", 256, cwd=tmp_path)
    assert done.returncode in (0, 3), done.stderr
    output = tmp_path / "pasta nova" / "saída"
    config, base = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (output, DEMO))
    for key in ("rope_parameters", "max_position_embeddings"):
        assert config[key] == base[key]
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert list(report["scores"]) == ["before", "prompt", "rows", "pass_2"]
    assert (report["settings"]["name"], report["settings"]["author"]) == ("Jandira", "Oficina Maré")
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "# Jandira\n" in card and "Oficina Maré" in card and "ObrutAi" not in card
