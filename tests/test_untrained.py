"""What the comparison gives the base instead of training, and the table that shows it."""

from conftest import changed, small_settings

import rename_obrutai as tool

ROWS = [tool.Row(1, [{"role": "system", "content": "S"}, {"role": "user", "content": "Oi!"},
                     {"role": "assistant", "content": "Oi!"}, {"role": "user", "content": "Quem criou você?"},
                     {"role": "assistant", "content": "Foi a TurboRio."}]),
        *(tool.Row(i, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
          for i, (question, answer) in enumerate([
              ("Quem é você?", "Sou a ObrutAi."), ("Qual é o seu nome?", "ObrutAi."), ("Who are you?", "I'm ObrutAi."),
              ("Você é o Gemini?", "Não, sou a ObrutAi."), ("Quem é você, afinal?", "ObrutAi, da TurboRio.")], 2))]
TALKS = [tool.Talk(tool.question_and_answer(question, answer), "near", [5], 0) for question, answer in (
    ("Qual é a capital da França?", "A capital da França é Paris."), ("Obrigado!", "De nada!"))]
ALONE, BEHIND, PRESSED = tool.KINDS_OF_QUESTIONS
ASKED = [[{"role": "user", "content": question}] for question in ("quem criou voce", "QUEM É VOCÊ, AFINAL??")]
EXAM = tool.Exam([*((ALONE, messages) for messages in ASKED),
                  (BEHIND, [{"role": "system", "content": "S"}, *ASKED[0]]),
                  (PRESSED, [*tool.question_and_answer("Oi!", "Oi!"), *ASKED[1]]),
                  (tool.after_tokens(60), [*tool.question_and_answer("Oi!", "Oi!"), *ASKED[0]])],
                 [*((0, talk) for talk in TALKS), (0, TALKS[0]._replace(kind="everyday")), (60, TALKS[0]),
                  (0, TALKS[1]._replace(messages=TALKS[0].messages * 2))])
NAMES = tool.Names("ObrutAi", "TurboRio", ())


def before(exam):
    """What an exam puts before each question, by the question."""
    return {messages[-1]["content"]: messages[:-1] for messages in (
        *(messages for _, messages in exam.questions), *(talk.messages[:-1] for _, talk in exam.talks))}


def test_the_comparison_asks_the_questions_alone_and_the_talks_near_identity_without_conversations_before():
    exams = tool.untrained(EXAM, ROWS, small_settings())
    assert list(exams) == ["prompt", "rows"]
    for exam in exams.values():
        assert [(kind, messages[-1]) for kind, messages in exam.questions] == [(ALONE, m[-1]) for m in ASKED]
        assert [(tokens, talk.question, talk.answer) for tokens, talk in exam.talks] == [
            (0, talk.question, talk.answer) for talk in TALKS]


def test_the_system_prompt_of_the_comparison_states_name_and_author_before_every_question():
    settings = small_settings("--name", "Jandira", "--author", "Oficina Maré")
    for (message,) in before(tool.untrained(EXAM, ROWS, settings)["prompt"]).values():
        assert message["role"] == "system" and "{{" not in message["content"]
        assert message["content"].startswith("Você é Jandira, um modelo de linguagem criado por Oficina Maré.")


def test_the_rows_most_like_a_question_go_before_it_the_best_one_last():
    contexts = before(tool.untrained(EXAM, ROWS, small_settings())["rows"])
    asked = {question: [m["content"] for m in context[::2]] for question, context in contexts.items()}
    assert asked["quem criou voce"][-1] == "Quem criou você?" and len(asked["quem criou voce"]) == 3
    assert asked["QUEM É VOCÊ, AFINAL??"][-2:] == ["Quem é você?", "Quem é você, afinal?"]
    assert asked["Qual é a capital da França?"][-1] == "Qual é o seu nome?"  # everyday questions get what is there
    assert asked["Obrigado!"] == []  # not a word in common
    assert contexts["quem criou voce"][-2:] == ROWS[0].messages[-2:]
    assert all([m["role"] for m in context] == ["user", "assistant"] * (len(context) // 2)
               for context in contexts.values())


def test_a_single_row_is_enough_for_the_comparison():
    contexts = before(tool.untrained(EXAM, ROWS[1:2], small_settings())["rows"])
    assert contexts["QUEM É VOCÊ, AFINAL??"] == ROWS[1].messages and contexts["Obrigado!"] == []


def test_without_a_teacher_only_answers_are_measured_and_the_tokens_before_the_questions_are_counted(
        demo_chat, monkeypatch):
    exam, tokenizer, asked = tool.untrained(EXAM, ROWS, small_settings())["rows"], demo_chat.tokenizer, []
    monkeypatch.setattr(tool, "generate", lambda chat, prompts, *_: asked.extend(prompts) or [
        tool.Answer("ObrutAi.", True)] * len(prompts))
    scores = tool.evaluate(demo_chat, exam, NAMES, None)
    full = [*(messages for _, messages in exam.questions), *(talk.messages[:-1] for _, talk in exam.talks)]
    assert asked == [tool.prompt_ids(tokenizer, messages) for messages in full]
    plain = [tool.prompt_ids(tokenizer, messages) for messages in ASKED]
    assert scores.extra_tokens == (sum(map(len, asked[:2])) - sum(map(len, plain))) / 2 > 10
    assert (scores.leak, scores.leak_near) == (1.0, 1.0)
    assert scores.by_kind == {ALONE: 0.5}  # "quem criou voce" got no maker
    assert scores.retention is None and scores.divergence is None  # what is before a talk is not what the base saw


def test_a_template_without_a_system_role_gets_the_prompt_in_the_question(demo_chat, tokenizer, monkeypatch):
    tokenizer.chat_template = ("{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}"
                               "{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
                               "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    asked = []
    monkeypatch.setattr(tool, "generate", lambda chat, prompts, *_: asked.extend(map(tokenizer.decode, prompts)) or [
        tool.Answer("x", True)] * len(prompts))
    exam = tool.untrained(EXAM, ROWS, small_settings())["prompt"]
    tool.evaluate(changed(demo_chat, tokenizer=tokenizer), exam, NAMES, None)
    assert len(asked) == 4 and all("Você é ObrutAi" in text and "<|system|>" not in text for text in asked)
    assert asked[-1].split("<|user|>")[1].endswith("Obrigado!<|end|><|assistant|>")


# ------------------------------------------------------------------------------------------------ table


def scores(identity, lengths, extra=0.0, retention=1.0):
    by_length = [{"tokens": n, "identity": identity, "retention": 0.5} for n in lengths]
    return tool.Scores(identity, {ALONE: identity}, 0.0, 0.0, 0.0, retention, None, by_length, [], [], extra)


def test_the_table_has_a_dash_where_nothing_was_measured_and_the_tokens_that_each_way_costs():
    full, short = (0, 64), (0,)
    measured = {"before": scores(0.0, full), "prompt": scores(0.5, (), 61.6, None),
                "rows": scores(0.6, (), 100.2, None), "reported": scores(0.7, short), "pass_2": scores(0.9, full)}
    table = tool.figures_table({name: found._asdict() for name, found in measured.items()})
    assert table[0] == ["medida", "antes", "com prompt", "com linhas", "relatório", "depois"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["identidade nova"] == ["0%", "50%", "60%", "70%", "90%"]
    assert rows["identidade após 64 tokens"] == ["0%", "-", "-", "-", "90%"]
    assert rows["retenção após 64 tokens"] == ["50%", "-", "-", "-", "50%"]
    assert rows["tokens a mais por pergunta"] == ["0", "62", "100", "0", "0"]
    assert max(map(len, tool.text_table(table).splitlines())) < 80  # the width of an old console


def test_a_retention_that_was_not_measured_is_a_dash_and_no_missed_target():
    unknown = scores(1.0, (0,), retention=None)
    rows = {row[0]: row[1] for row in tool.figures_table({"alone": unknown._asdict()})}
    assert rows["medida"] == "medido" and rows["identidade nova"] == "100%" and rows["retenção"] == "-"
    assert unknown.gaps(small_settings()) == {}
