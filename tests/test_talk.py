"""Talking to a model that is ready, in a terminal and through a pipe."""

import io
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO, SCRIPT, changed, run_script, small_settings

import rename_obrutai as tool

QUESTION = [{"role": "user", "content": "Quem é você?"}]


class Terminal(io.StringIO):
    """Text in or out of a terminal; a line "^C" stands for the keys."""

    def isatty(self):
        return True

    def readline(self, *limits):
        line = super().readline(*limits)
        if line.startswith("^C"):
            raise KeyboardInterrupt
        return line


@pytest.fixture
def converse(demo_chat, monkeypatch, capsys):
    """A conversation in this process, by default in a terminal: lines -> exit status, what it said and
    noted, and the prompts that the model was given. It answers "resposta", or what `speak` gives for a prompt."""
    monkeypatch.setattr(tool, "load_chat", lambda *_: changed(demo_chat))
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*lines, flags=(), speak=lambda prompt: ("resposta", True), person=True):
        prompts = []

        def spoken(chat, ids, limit):
            prompts.append(chat.tokenizer.decode(ids))
            assert limit + len(ids) <= 128  # the context of the demo
            return speak(prompts[-1])

        with monkeypatch.context() as patch:
            if speak:
                patch.setattr(tool, "speak", spoken)
            patch.setattr(sys, "stdin", (Terminal if person else io.StringIO)("".join(f"{line}\n" for line in lines)))
            status = tool.main(["--chat", "--model-path", str(DEMO), *map(str, flags)])
        said = capsys.readouterr()
        return SimpleNamespace(status=status, out=said.out, notes=said.err, prompts=prompts)

    return run


def rendered(*contents, system=""):
    """What the demo's template makes of a conversation that ends with a question."""
    roles = ["user", "assistant"] * len(contents)
    text = "".join(f"<|{role}|>{content}<|end|>" for role, content in zip(roles, contents))
    return "<s>" + (f"<|system|>{system}<|end|>" if system else "") + text + "<|assistant|>"


@pytest.mark.parametrize("measured, asked, expected", [
    ("full", "qlora", "full"), ("qlora", "full", "qlora"), ("qlora4", "full", "qlora4"), (None, "qlora", "lora"),
    (None, "full", "lora"), ("[1]", "full", "lora")])  # a report of another program
def test_a_model_is_talked_to_in_the_precision_in_which_it_was_measured(
        measured, asked, expected, demo_chat, tmp_path, monkeypatch):
    """Not in what METHOD says now."""
    folder, loaded = Path(shutil.copytree(DEMO, tmp_path / "pronto")), []
    if measured:
        (folder / "report.json").write_text(measured if "[" in measured else
                                            f'{{"settings": {{"method": "{measured}"}}}}')
    monkeypatch.setattr(tool, "load_chat", lambda path, settings: loaded.append(settings.method) or demo_chat)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert tool.main(["--chat", "--model-path", str(folder), "--method", asked]) == 0 and loaded == [expected]


# ------------------------------------------------------------------------------------------------ in a terminal


def test_a_conversation_remembers_what_was_said_until_it_is_cleared(converse):
    said = converse("Oi!", "", "Quem é você?", "/limpar", "Tudo bem?", "/sair", "Alguém aí?")
    start = rendered("Oi!").split("<|user|>")[0]
    assert [prompt.removeprefix(start).removeprefix("<s>") for prompt in said.prompts] == [
        rendered(*turns).removeprefix("<s>")
        for turns in (["Oi!"], ["Oi!", "resposta", "Quem é você?"], ["Tudo bem?"])]
    assert said.status == 0 and said.out.count("modelo_demo: ") == 3


def test_a_system_text_stays_until_another_one_or_none_is_given(converse):
    said = converse("Oi!", "/sistema Seja breve.", "Oi!", "/limpar", "Oi!", "/sistema", "Oi!")
    with_text, without = (rendered("Oi!", system=text).removeprefix("<s>") for text in ("Seja breve.", ""))
    assert [prompt.removeprefix("<s>") for prompt in said.prompts] == [without, with_text, with_text, without]


@pytest.mark.parametrize("line", ["/ajuda", "/sai", "/"])
def test_help_is_shown_at_the_start_and_for_any_other_command_and_goes_to_no_model(line, converse):
    said = converse(line)
    assert said.notes.count("/sistema TEXTO") == 2 and not said.prompts
    assert all(command in said.notes.splitlines()[0] for command in ("/sair", "/limpar", "/ajuda", "Ctrl-C"))


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_the_end_of_the_input_leaves(converse):
    said = converse("^C", "Oi!")
    assert said.status == 0 and "escreva /sair" in said.notes and len(said.prompts) == 1
    assert said.out.endswith("\n")


def test_the_oldest_turns_are_dropped_with_a_note_when_the_context_is_full(converse, demo_tokenizer):
    lines = [f"Pergunta de número {i} sobre a capital da França" for i in range(6)]
    said = converse(*lines, flags=("--max-new-tokens", 64))
    assert said.status == 0 and said.notes.count("esqueci o começo da conversa") >= 1
    asked = [[i for i in range(6) if f"número {i} " in prompt] for prompt in said.prompts]
    assert all(turns[-1] == i for i, turns in enumerate(asked)) and asked[5][0] > 0
    assert all(turns == list(range(turns[0], turns[-1] + 1)) for turns in asked)
    for first, last in [(turns[0], turns[-1]) for turns in asked if turns[0]]:  # no more is dropped than needed
        longer = [text for line in lines[first - 1:last + 1] for text in (line, "resposta")][:-1]
        assert len(demo_tokenizer(rendered(*longer), add_special_tokens=False)["input_ids"]) > 128 - 64


def test_a_question_that_does_not_fit_at_all_is_refused_and_the_conversation_stays(converse):
    said = converse("Oi!", "palavra " * 200, "Tudo bem?")
    assert len(said.prompts) == 2 and "não cabe no contexto" in said.notes and "128" in said.notes
    assert "Oi!" in said.prompts[1] and "palavra" not in said.prompts[1]


def test_an_answer_that_was_cut_short_is_marked_and_remembered(converse):
    said = converse("Oi!", "Tudo bem?", speak=lambda prompt: ("metade", False))
    assert said.notes.count("(parou aqui)") == 2 and "metade" in said.prompts[1]
    said = converse("Oi!", "Tudo bem?", speak=lambda prompt: ("", False))
    assert "Oi!" not in said.prompts[1]  # nothing was said to it


# ------------------------------------------------------------------------------------------------ answers


def streamed(chat, capsys, limit=32):
    """What `speak` gives for a question, and what it printed."""
    answer = tool.speak(chat, tool.prompt_ids(chat.tokenizer, QUESTION), limit)
    return answer, capsys.readouterr().out


def test_a_streamed_answer_is_the_greedy_one_and_comes_piece_by_piece(demo_chat, capsys, monkeypatch):
    (expected,) = tool.ask(demo_chat, ["Quem é você?"])
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: pieces.append("".join(text)))
    answer, _ = streamed(demo_chat, capsys)
    assert answer == (expected.text, True) and expected.ended
    assert "".join(pieces) == expected.text and len([piece for piece in pieces if piece]) > 2


def test_an_answer_ends_at_a_stop_that_is_an_ordinary_token_and_does_not_show_it(demo_chat, capsys, tmp_path):
    """Which only the model's own generation_config.json names."""
    (usual,) = tool.ask(demo_chat, ["Quem é você?"])
    stop = usual.ids[len(usual.ids) // 2]
    folder = shutil.copytree(DEMO, tmp_path / "base")
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [2, {stop}]}}', encoding="utf-8")
    answer, printed = streamed(tool.load_chat(folder, small_settings("--method", "full")), capsys)
    cut = demo_chat.tokenizer.decode(usual.ids[:usual.ids.index(stop)]).strip()
    assert answer == (cut, True) and printed.strip() == cut and len(cut) < len(usual.text)


def test_an_answer_without_an_end_stops_at_the_limit_and_says_so(demo_chat, capsys):
    (text, ended), printed = streamed(demo_chat, capsys, limit=3)
    assert not ended and text and printed == text + "\n"


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(converse, demo_chat, monkeypatch):
    (usual,) = tool.ask(demo_chat, ["Quem é você?"])
    forward, calls = demo_chat.model.forward, []

    def interrupted(*given, **named):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(*given, **named)

    monkeypatch.setattr(demo_chat.model, "forward", interrupted)
    said = converse("Quem é você?", "Quem é você?", speak=None)
    first, second = (text.split("Você: ")[0].strip() for text in said.out.split("modelo_demo: ")[1:])
    assert first and usual.text.startswith(first) and len(first) < len(usual.text)
    assert first == demo_chat.tokenizer.decode(usual.ids[:5]).strip()  # the last word too, though it may go on
    assert said.status == 0 and said.notes.count("(parou aqui)") == 1 and second


# ------------------------------------------------------------------------------------------------ from a pipe


def test_through_a_pipe_only_answers_come_back_in_utf_8_and_nothing_is_written(demo_chat, tmp_path, monkeypatch):
    """Whatever encoding the system would take for it."""
    questions = "\ufeffQuem é você?\r\n\r\n/sistema Você é o Zé.\r\n/limpar\r\nQual é a capital da França?"
    pipes = [io.BytesIO(questions.encode()), io.BytesIO(), io.BytesIO()]
    for name, pipe in zip(("stdin", "stdout", "stderr"), pipes):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(pipe, encoding="cp1252"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    assert tool.main(["--chat", "--model-path", str(DEMO), "--output-dir", "novo"]) == 0
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with_system = [{"role": "system", "content": "Você é o Zé."}, {"role": "user",
                                                                 "content": "Qual é a capital da França?"}]
    expected = tool.generate(demo_chat, [tool.prompt_ids(demo_chat.tokenizer, m) for m in (QUESTION, with_system)])
    assert pipes[1].getvalue().decode("utf-8").splitlines() == [answer.text for answer in expected]
    assert "Conversa nova" in pipes[2].getvalue().decode("utf-8") and not list(tmp_path.iterdir())


def test_of_a_question_that_does_not_fit_a_pipe_gets_an_empty_line(converse):
    said = converse("Oi!", "palavra " * 200, "Tudo bem?", person=False)
    assert said.out == "\n" and len(said.prompts) == 2  # the answers come from `speak`


def test_without_a_standard_input_a_conversation_ends_at_once(converse, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert tool.main(["--chat", "--model-path", str(DEMO)]) == 0


def test_when_nobody_reads_its_answers_any_more_a_conversation_ends_without_a_word(tmp_path):
    """As of `head -1`."""
    done = subprocess.Popen([sys.executable, str(SCRIPT), "--chat", "--model-path", str(DEMO)], cwd=tmp_path,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    done.stdout.close()
    notes = done.communicate("Quem é você?\nOi!\n".encode())[1]
    assert done.returncode == 141 and not notes


# ------------------------------------------------------------------------------------------------ which model


@pytest.mark.parametrize("option", ["--chat", "--evaluate"])
def test_without_a_result_the_user_learns_what_to_do(option, tmp_path):
    (tmp_path / "novo").mkdir()  # of somebody else
    done = run_script(option, "--output-dir", "novo", cwd=tmp_path)
    assert done.returncode == 2 and "ainda não há um modelo pronto" in done.stderr and "--model-path" in done.stderr
    assert str(tmp_path / "novo") in done.stderr and not list((tmp_path / "novo").iterdir())


@pytest.mark.parametrize("option", ["--chat", "--evaluate"])
def test_the_result_is_meant_unless_a_model_is_named(option, tmp_path):
    settings = small_settings(option, "--output-dir", tmp_path / "novo")
    assert settings.model_path == settings.output_dir == str(tmp_path / "novo")
    settings = small_settings(option, "--output-dir", tmp_path / "novo", "--model-path", "ana/ObrutAi")
    assert settings.model_path == "ana/ObrutAi"
    assert small_settings("--output-dir", tmp_path / "novo").model_path == str(DEMO)


def test_a_result_in_its_place_is_talked_to(converse, tmp_path, monkeypatch):
    folder = shutil.copytree(DEMO, tmp_path / "novo")
    (folder / "report.json").write_text("{}", encoding="utf-8")
    assert tool.ready_model(small_settings("--chat", "--output-dir", folder))[1] == folder


@pytest.mark.parametrize("option", ["--chat", "--evaluate"])
def test_a_folder_without_a_whole_model_is_refused(option, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}', encoding="utf-8")
    assert tool.main([option, "--model-path", str(tmp_path)]) == 2
    assert "não tem pesos em safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--chat", "--evaluate"), ("--check", "--chat"), ("--evaluate", "--check")])
def test_two_wishes_at_once_are_refused(options):
    with pytest.raises(tool.InputError, match="uma destas opções por vez"):
        small_settings(*options)


def test_a_model_to_talk_to_that_does_not_fit_into_memory_is_one_clear_sentence(converse, monkeypatch):
    def load(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(tool, "load_chat", load)
    said = converse("Oi!")
    assert said.status == 2 and said.notes.startswith("Erro: faltou memória para este modelo. Feche")
