"""Identity rows and folders: what is accepted, and how mistakes are reported."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from conftest import SCRIPT, small_settings

import rename_obrutai as tool

VALUES = {"NAME": "Jandira", "AUTHOR": "Oficina Maré", "BASE": "gemma 3"}
USER, ASSISTANT = {"role": "user", "content": "Quem é você?"}, {"role": "assistant", "content": "Sou a Jandira."}
SYSTEM = {"role": "system", "content": "Seja breve."}
MORE = [{"role": "user", "content": "E quem te fez?"}, {"role": "assistant", "content": "Oficina Maré."}]


def write(folder, *lines, name="linhas.jsonl", encoding="utf-8"):
    """An identity file of these lines (records or raw text)."""
    path = folder / name
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_bytes("\n".join(texts).encode(encoding))
    return path


def read(path):
    return tool.read_rows(path, VALUES)


def mistake(path):
    with pytest.raises(tool.InputError) as error:
        read(path)
    return str(error.value)


@pytest.mark.parametrize("record, messages", [
    ({"text": "Quem é você?\nSou a Jandira."}, [USER, ASSISTANT]),
    ({"text": "  Quem é você?  \r\n  Sou a Jandira.  \r\n"}, [USER, ASSISTANT]),
    ({"text": "Quem é você?\nSou a Jandira.\n\nE gosto de conversar."},
     [USER, {"role": "assistant", "content": "Sou a Jandira.\n\nE gosto de conversar."}]),
    ({"prompt": "Quem é você?", "completion": "Sou a Jandira."}, [USER, ASSISTANT]),
    ({"prompt": "Quem é você?", "completion": " Sou a Jandira.\n", "id": 7}, [USER, ASSISTANT]),
    ({"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
    ({"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
    ({"messages": [SYSTEM, USER, ASSISTANT, *MORE]}, [SYSTEM, USER, ASSISTANT, *MORE]),
    ({"instruction": "Quem é você?", "input": "", "output": "Sou a Jandira."}, [USER, ASSISTANT]),
    ({"instruction": "Quem é você?", "output": "Sou a Jandira."}, [USER, ASSISTANT]),
    ({"instruction": "Quem é você?", "input": None, "output": "Sou a Jandira."}, [USER, ASSISTANT]),
    ({"instruction": "Traduza.", "input": "Good morning!", "output": "Bom dia!"},
     [{"role": "user", "content": "Traduza.\nGood morning!"}, {"role": "assistant", "content": "Bom dia!"}]),
    ({"conversations": [{"from": "human", "value": "Quem é você?"}, {"from": "gpt", "value": "Sou a Jandira."}]},
     [USER, ASSISTANT]),
    ({"conversations": [{"from": "system", "value": "Seja breve."}, {"from": "user", "value": "Quem é você?"},
                        {"from": "assistant", "value": "Sou a Jandira."}]}, [SYSTEM, USER, ASSISTANT]),
    ({"messages": [{"role": "user", "content": "Quem é você?"}, {"role": "model", "content": "Sou a Jandira."}]},
     [USER, ASSISTANT]),
])
def test_every_accepted_shape_gives_the_messages_written_by_hand(record, messages, tmp_path):
    assert [row.messages for row in read(write(tmp_path, record))] == [messages]


@pytest.mark.parametrize("shape", [
    {"text": "É {{NAME}}?\nSou {{NAME}}, de {{AUTHOR}}, e vim de {{BASE}}."},
    {"prompt": "É {{NAME}}?", "completion": "Sou {{ NAME }}, de {{author}}, e vim de {{Base}}."},
    {"messages": [{"role": "user", "content": "É {{NAME}}?"},
                  {"role": "assistant", "content": "Sou {{NAME}}, de {{AUTHOR}}, e vim de {{BASE}}."}]},
    {"instruction": "É {{NAME}}?", "input": "", "output": "Sou {{NAME}}, de {{AUTHOR}}, e vim de {{BASE}}."},
    {"conversations": [{"from": "human", "value": "É {{NAME}}?"},
                       {"from": "gpt", "value": "Sou {{NAME}}, de {{AUTHOR}}, e vim de {{BASE}}."}]},
], ids=lambda shape: "+".join(shape))
def test_placeholders_are_filled_in_every_shape(shape, tmp_path):
    (row,) = read(write(tmp_path, shape))
    assert [m["content"] for m in row.messages] == [
        "É Jandira?", "Sou Jandira, de Oficina Maré, e vim de gemma 3."]


def test_a_system_message_is_filled_as_well(tmp_path):
    system = {"role": "system", "content": "Você é {{NAME}}."}
    (row,) = read(write(tmp_path, {"messages": [system, USER, ASSISTANT]}))
    assert row.messages[0] == {"role": "system", "content": "Você é Jandira."}


def test_byte_order_mark_blank_lines_and_windows_line_ends_change_nothing(tmp_path):
    short, long = [USER, ASSISTANT], [USER, ASSISTANT, *MORE]
    lines = [json.dumps({"messages": short}), "", "   ", json.dumps({"messages": long})]
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")
    assert [(row.line, row.messages) for row in read(path)] == [(1, short), (4, long)]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_of_rows_is_read_as_the_lines_are(indent, tmp_path):
    rows = [{"messages": [USER, ASSISTANT]}, {"text": "E quem te fez?\nOficina Maré."}]
    path = write(tmp_path, json.dumps(rows, indent=indent))
    assert [(row.line, row.messages) for row in read(path)] == [(1, [USER, ASSISTANT]), (2, MORE)]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux only")
def test_a_file_whose_reading_fails_is_named():
    """The system names it only where the opening fails."""
    assert "/proc/self/mem" in mistake(Path("/proc/self/mem"))


def test_all_bad_lines_are_reported_together(tmp_path):
    good = {"messages": [USER, ASSISTANT]}
    message = mistake(write(tmp_path, good, "{", good, {"text": ""}, {"texto": "x"}))
    assert re.findall(r"linha (\d+): ", message) == ["2", "4", "5"]
    assert "3 linha(s)" in message


def test_of_many_bad_lines_the_first_ten_and_the_number_of_the_rest_are_reported(tmp_path):
    message = mistake(write(tmp_path, {"messages": [USER, ASSISTANT]}, *["{"] * 13))
    assert re.findall(r"linha (\d+): ", message) == [str(n) for n in range(2, 12)]
    assert "13 linha(s)" in message and "mais 3" in message


@pytest.mark.parametrize("exists", [True, False])
def test_a_missing_file_without_a_similar_one_is_said_to_be_missing(exists, tmp_path):
    folder = tmp_path if exists else tmp_path / "outra"
    with pytest.raises(tool.InputError) as error:
        tool.check_file(folder / "eu.jsonl", "IDENTITY_FILE")
    message = str(error.value)
    assert "não achei" in message and "eu.jsonl" in message and "quis dizer" not in message


def test_a_question_alone_is_answered_with_name_or_author_in_its_own_language(tmp_path):
    questions = {"pt": ["Quem é você?", "Qual é o seu nome?", "Quem criou você?", "Você é o ChatGPT?"],
                 "en": ["Who are you?", "What is your name?", "Who made you?", "Are you ChatGPT?"],
                 "es": ["¿Quién eres?", "¿Cómo te llamas?", "¿Quién te creó?", "¿Eres ChatGPT?"]}
    telling = {"pt": {"eu", "nome", "criou", "sou", "quem", "chamar", "desenvolveu", "meu", "não", "feita"},
               "en": {"i", "am", "my", "created", "made", "me"}, "es": {"me", "soy", "mi", "llamo", "creó", "hizo"}}
    for language, asked in questions.items():
        rows = read(write(tmp_path, *({"text": question} for question in asked)))
        for question, row in zip(asked, rows, strict=True):
            assert [m["role"] for m in row.messages] == ["user", "assistant"]
            answer = row.messages[1]["content"]
            assert row.messages[0]["content"] == question
            assert "Jandira" in answer or "Oficina Maré" in answer
            assert "{{" not in answer and "|" not in answer
            words = set(re.findall(r"\w+", answer.lower()))
            others = set().union(*telling.values()) - telling[language]
            assert words & telling[language] and not words & others - {"me"}, answer


@pytest.mark.parametrize("language, question", [
    ("fr", "Qui es-tu ?"), ("fr", "Es-tu ChatGPT ?"), ("fr", "Présente-toi."), ("fr", "Qui t'a fait ?"),
    ("fr", "C'est quoi ton nom ?"), ("fr", "Quel modèle êtes-vous ?"),
    ("de", "Wer hat dich gemacht?"), ("de", "Stell dich vor."), ("de", "Bist du ein Mensch?"),
    ("ja", "お名前は？"), ("ja", "あなたは誰ですか？"),
])
def test_a_question_alone_in_another_language_is_answered_in_it(language, question, tmp_path):
    (row,) = read(write(tmp_path, {"text": question}))
    assert row.answer in [tool.fill(some, VALUES) for text in tool.WORDINGS[language] for some in text.split("|")]


def test_questions_alone_get_varied_answers(tmp_path):
    rows = read(write(tmp_path, *({"text": f"Quem é você, {who}?"} for who in ("hein", "afinal", "mesmo", "então"))))
    answers = [row.messages[1]["content"] for row in rows]
    assert len(set(answers)) >= 2 and max(map(answers.count, answers)) <= 2


def test_a_conversation_that_ends_with_the_user_is_a_question_alone(tmp_path):
    (row,) = read(write(tmp_path, {"messages": [SYSTEM, USER, ASSISTANT, MORE[0]]}))
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert "Jandira" in row.messages[-1]["content"] or "Oficina Maré" in row.messages[-1]["content"]


# ------------------------------------------------------------------------------------------------ folders


def check(folder, *flags):
    """All checks before the tokenizer is loaded, in the order of `check_job`, for a base and an identity file in
    `folder` (made here if missing)."""
    rows = folder / "linhas.jsonl"
    if not rows.exists():
        write(folder, {"messages": [USER, ASSISTANT]})
    settings = small_settings("--model-path", folder / "meu_modelo", "--output-dir", folder / "saida",
                              "--identity-file", rows, *flags)
    inputs, base = tool.check_inputs(settings), Path(settings.model_path)
    tool.check_base(base)
    tool.check_output(base, settings, finished=False)
    tool.read_config(base, settings.rope_factor)
    return inputs


def refusal(folder, *flags):
    with pytest.raises(tool.InputError) as error:
        check(folder, *flags)
    return str(error.value)


def test_sound_inputs_give_rows_base_name_and_the_hash_of_the_file(base_folder, tmp_path):
    inputs = check(tmp_path)
    assert [row.messages for row in inputs.rows] == [[USER, ASSISTANT]]
    assert inputs.values["BASE"] == "meu modelo"
    assert inputs.data_hash == hashlib.sha256((tmp_path / "linhas.jsonl").read_bytes()).hexdigest()
    assert check(tmp_path, "--base-name", "Lumi 1").values["BASE"] == "Lumi 1"


def test_name_author_and_base_of_the_settings_fill_the_rows(base_folder, tmp_path):
    write(tmp_path, {"text": "Oi?\n{{NAME}}, {{AUTHOR}}, {{BASE}}"})
    (row,) = check(tmp_path, "--name", "Iara", "--author", "Ana").rows
    assert row.messages[1]["content"] == "Iara, Ana, meu modelo"


def asking(*questions):
    """Rows with these questions."""
    return [{"prompt": question, "completion": "Jandira, Oficina Maré."} for question in questions]


def test_a_question_for_measuring_that_the_rows_ask_is_not_used_for_measuring(base_folder, tmp_path):
    asked = tool.TEST_QUESTIONS[3]
    write(tmp_path, *asking("Who are you?", "¿Quién eres?", f"{asked.upper()}!"))
    assert set(check(tmp_path).test) == set(tool.TEST_QUESTIONS) - {asked}


def test_a_question_for_measuring_that_an_earlier_turn_asks_is_not_used_either(base_folder, tmp_path):
    asked = tool.TEST_QUESTIONS[0]
    write(tmp_path, {"messages": [{"role": "user", "content": asked}, ASSISTANT, *MORE]})
    assert asked not in check(tmp_path).test


@pytest.mark.parametrize("questions, languages", [
    (["Quem é você?"], ("pt",)), (["Who are you?"], ("en",)), (["¿Quién eres?"], ("es",)),
    (["Quem é você?", "Who are you?"], ("pt", "en")),
    (["Who are you?", "¿Quién eres?", "¿Quién eres?", "Quem é você?"], ("es", "en", "pt")),  # the most spoken first
    (["Quem é você?"] * 19 + ["Who are you?"], ("pt", "en")),  # one of twenty
    (["Quem é você?"] * 20 + ["Who are you?"], ("pt",)), (["Wer bist du?"], ("pt", "en", "es")),  # no lists for it
])
def test_what_is_measured_is_asked_in_the_languages_that_the_rows_speak(questions, languages, base_folder, tmp_path):
    write(tmp_path, *asking(*questions))
    inputs = check(tmp_path)
    assert inputs.languages == languages
    assert {tool.language_of(question) for question in inputs.test} == set(languages)


def test_a_file_of_the_base_that_may_not_be_read_is_not_called_broken(base_folder, tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(tool, "load_json", denied)
    with pytest.raises(tool.InputError, match=r"config\.json.*permissão") as told:
        tool.check_base(base_folder)
    assert "Baixe" not in str(told.value)


def test_a_base_given_through_a_link_is_protected_as_well(base_folder, tmp_path):
    (tmp_path / "atalho").symlink_to(base_folder, target_is_directory=True)
    flags = ("--model-path", tmp_path / "atalho", "--output-dir", base_folder, "--overwrite")
    assert "modelo base" in refusal(tmp_path, *flags)


def test_an_output_beside_the_base_whose_name_begins_alike_is_accepted(base_folder, tmp_path):
    assert check(tmp_path, "--output-dir", tmp_path / "meu_modelo-novo").rows


def test_an_existing_output_is_refused_without_overwrite(base_folder, tmp_path):
    (tmp_path / "saida").mkdir()
    (tmp_path / "saida" / "report.json").write_text('{"scores": {}, "settings": {}}', encoding="utf-8")
    message = refusal(tmp_path)
    assert "já existe" in message and "--overwrite" in message
    assert check(tmp_path, "--overwrite").rows


def test_an_output_on_a_drive_that_there_is_not_is_refused(base_folder, tmp_path, monkeypatch):
    """As D: on most computers; here the root stands for the drive."""
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path != Path(path.anchor) and exists(path))
    assert "não posso escrever em" in refusal(tmp_path, "--output-dir", Path(tmp_path.anchor, "nada", "novo"))


def test_a_scaling_that_cannot_be_combined_is_refused_before_any_heavy_work(base_folder, tmp_path):
    config = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}
    (base_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "--rope-factor 1" in refusal(tmp_path)
    assert check(tmp_path, "--rope-factor", "1").rows


# ------------------------------------------------------------------------------------------------ rows to learn


def rows_refusal(tokenizer, *answers, flags=()):
    """What is said of rows with these answers, the first in line 1."""
    rows = [tool.Row(i, [USER, {"role": "assistant", "content": answer}]) for i, answer in enumerate(answers, 1)]
    with pytest.raises(tool.InputError) as error:
        tool.check_rows(tokenizer, rows, small_settings("--name", "Jandira", "--author", "Oficina Maré", *flags))
    return str(error.value)


RIGHT = ("Sou a Jandira.", "Foi a oficina mare!", "Meu nome é JANDIRA, e quem me fez foi a Oficina Maré.")


def test_rows_whose_answers_can_count_pass_and_of_many_others_ten_are_named(demo_tokenizer):
    rows = [tool.Row(i, [USER, {"role": "assistant", "content": answer}]) for i, answer in enumerate(RIGHT, 1)]
    tool.check_rows(demo_tokenizer, rows, small_settings("--name", "Jandira", "--author", "Oficina Maré"))
    message = rows_refusal(demo_tokenizer, *["Sou um modelo."] * 13)
    assert re.findall(r"linha (\d+): ", message) == [str(n) for n in range(1, 11)] and "13 linha(s)" in message


def test_an_answer_may_be_as_long_as_leaves_room_for_its_end(demo_tokenizer):
    answer = "Sou a Jandira, e gosto de conversar."
    tokens = len(demo_tokenizer(answer, add_special_tokens=False)["input_ids"])
    settings = small_settings("--name", "Jandira", "--max-new-tokens", tokens + 1)
    tool.check_rows(demo_tokenizer, [tool.Row(1, [USER, {"role": "assistant", "content": answer}])], settings)
    assert "linha 1" in rows_refusal(demo_tokenizer, answer, flags=("--max-new-tokens", tokens))


# ------------------------------------------------------------------------------------------------ the shipped file


@pytest.fixture(scope="module")
def shipped():
    path = SCRIPT.parent / "identity_override.jsonl"
    return tool.read_rows(path, {"NAME": "Zaratim", "AUTHOR": "Forno Azul", "BASE": "modelo demo"})


def test_the_shipped_identity_file_has_at_least_sixty_rows_of_several_shapes(shipped):
    assert len(shipped) >= 60
    records = map(json.loads, (SCRIPT.parent / "identity_override.jsonl").read_text(encoding="utf-8").splitlines())
    assert len({tuple(sorted(record)) for record in records}) >= 4


def test_every_shipped_answer_names_the_model_or_its_maker(shipped):
    answers = [row.messages[-1]["content"] for row in shipped]
    assert not [answer for answer in answers if "Zaratim" not in answer and "Forno Azul" not in answer]


def test_no_shipped_question_is_an_evaluation_question(shipped):
    asked = {tool.plain(m["content"]) for row in shipped for m in row.messages if m["role"] == "user"}
    assert not asked & set(map(tool.plain, tool.TEST_QUESTIONS))


def test_no_shipped_question_stands_there_twice(shipped):
    asked = [tool.plain(row.messages[-2]["content"]) for row in shipped if len(row.messages) == 2]
    assert not [question for question in set(asked) if asked.count(question) > 1]


def test_the_shipped_file_asks_in_three_languages_mostly_portuguese(shipped):
    words = [set(tool.plain(row.messages[-2]["content"]).split()) for row in shipped]
    english = sum(bool(w & {"you", "your", "who", "what", "this"}) for w in words)
    spanish = sum("¿" in row.messages[-2]["content"] for row in shipped)
    assert english >= 5 and spanish >= 5 and len(shipped) - english - spanish > len(shipped) / 2


@pytest.mark.parametrize("about", ["ChatGPT", "Gemini", "Llama", "human", "oi", "vc", "senhor", "de onde"])
def test_the_shipped_file_covers_the_subjects_that_it_promises(about, shipped):
    assert any(about.lower() in m["content"].lower() for row in shipped for m in row.messages if m["role"] == "user")


def test_the_shipped_file_does_not_use_the_old_names_of_the_demo(shipped):
    """Names that the rows use are not taken for old ones."""
    assert not tool.mentions(" ".join(m["content"] for row in shipped for m in row.messages), ("Lumi", "Vagalume"))
