"""Questions: those for measuring and for training have none in common, and each is answered in the user's words."""

import random
import re
from collections import Counter
from difflib import SequenceMatcher

import pytest
from conftest import SCRIPT, small_settings

import rename_obrutai as tool

NAMES = tool.Names("Jandira", "Oficina Maré", ("Lumi", "Gemma"))
LANGUAGES = ("pt", "en", "es")
EVERYDAY = [q for some in tool.EVERYDAY.values() for q in some]
EXAMS = {"test": tool.TEST_QUESTIONS, **{kind: [q for other, q in tool.exam_questions(LANGUAGES) if other == kind]
                                         for kind in ("near", "everyday")}}


def plain_set(questions):
    return {tool.plain(question) for question in questions}


def shipped_questions():
    rows = tool.read_rows(SCRIPT.parent / "identity_override.jsonl", {"NAME": "n", "AUTHOR": "a", "BASE": "b"})
    return [row.messages[-2]["content"] for row in rows]


def texts_by_language(lists):
    return {tool.plain(text) for texts in lists.values() for text in texts}


def near(language, count=10**6, seed=0):
    """Questions near identity; all of them unless a count is given."""
    return tool.near_questions(language, count, random.Random(seed))


def built_in(names=NAMES, seed=0, languages=LANGUAGES):
    """(what is asked for, question) of the built-in questions about who the model is."""
    return tool.paraphrases(languages, names, random.Random(seed))


def every_filling():
    """(language, what is asked for, question) of all that the built-in questions can become."""
    words = [{kind: some[i % len(some)] for kind, some in tool.FILLERS["all"].items()} for i in range(60)]
    return {(code, intent, question.format(**some)) for code in LANGUAGES
            for intent, question in tool.PARAPHRASES[code] for some in words}


# ------------------------------------------------------------------------------------------------ the sets


def test_questions_for_training_and_the_sets_for_measuring_have_none_in_common():
    """Each of the exams would otherwise measure what was learnt by heart."""
    trained = plain_set([*shipped_questions(), *EVERYDAY, *[q for code in LANGUAGES for q in near(code)],
                         *[q for *_, q in every_filling()]])
    sets = [trained, *map(plain_set, EXAMS.values())]
    assert len(trained) > 1000
    for i, one in enumerate(sets):
        for other in sets[i + 1:]:
            assert not one & other


def test_pressure_follow_ups_and_system_prompts_of_the_exam_are_others_than_those_of_training():
    doubts = [{code: [doubt for _, doubt in some[code]] for code in some}
              for some in (tool.PRESSURE, tool.PRESSURE_EXAM)]
    pairs = [doubts, (tool.FOLLOW_UPS, tool.FOLLOW_UPS_EXAM)]
    for trained, asked in pairs:
        assert texts_by_language(asked) and not texts_by_language(trained) & texts_by_language(asked)
    assert tool.SYSTEM_EXAM and not plain_set(tool.SYSTEM_PROMPTS) & plain_set(tool.SYSTEM_EXAM)


def test_there_are_enough_different_test_questions_in_three_languages():
    questions = tool.TEST_QUESTIONS
    assert len(plain_set(questions)) == len(questions) >= 30
    spoken = Counter(map(tool.language_of, questions))
    assert set(spoken) == set(LANGUAGES) and spoken["pt"] > len(questions) / 2
    assert spoken["en"] >= 4 and spoken["es"] >= 3


@pytest.mark.parametrize("questions", [tool.NEAR_EXAM, tool.EVERYDAY, tool.EVERYDAY_EXAM],
                         ids=["near exam", "everyday", "everyday exam"])
def test_lists_of_other_questions_have_as_many_of_each_language(questions):
    assert [*questions] == [*LANGUAGES] and len({len(some) for some in questions.values()}) == 1
    every = [q for some in questions.values() for q in some]
    assert len(plain_set(every)) == len(every)
    marked = [q for q in every if "¿" in q or "¡" in q]
    assert marked and set(marked) <= set(questions["es"])


def test_an_exam_has_the_questions_of_the_languages_that_the_rows_speak():
    both, spanish = tool.exam_questions(("pt", "es")), tool.exam_questions(("es",))
    assert set(spanish) < set(both) and {kind for kind, _ in spanish} == {"near", "everyday"}
    assert len(both) == 2 * len(spanish) and not [q for _, q in spanish if q.split()[0] in ("Quem", "Who")]


@pytest.mark.parametrize("questions", [*EXAMS.values(), EVERYDAY, *map(near, LANGUAGES)])
def test_no_question_is_empty_or_carries_spaces_or_a_gap_that_was_not_filled(questions):
    assert not [q for q in questions if q != q.strip() or len(q) < 5 or re.search(r"[{}|>]|  ", q)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_near_questions_are_different_and_use_every_template_before_any_twice(language):
    templates = tool.NEAR_TEMPLATES[language]
    found = near(language, count=len(templates))
    patterns = [re.compile(re.sub(r"\\{\w+\\}", "(.+)", re.escape(template))) for template in templates]
    assert all(any(pattern.fullmatch(q) for q in found) for pattern in patterns)
    every = near(language)
    assert len(plain_set(every)) == len(every) > 100
    assert near(language) == every != near(language, seed=1)


@pytest.mark.parametrize("language", LANGUAGES)
def test_built_in_questions_ask_for_everything_in_their_language(language):
    asked = built_in(languages=[language])
    assert {intent for intent, _ in asked} == {"name", "maker", "who", "human", "other"} and len(asked) > 50
    assert {tool.language_of(q) for _, q in asked} == {language} and not [q for _, q in asked if re.search("[{}>]", q)]
    assert asked == built_in(languages=[language]) != built_in(languages=[language], seed=1)


@pytest.mark.parametrize("names", [("Claude", "Meta", ("Lumi",)), ("Olivia", "Google", ("Llama",))])
def test_no_built_in_question_names_the_new_name_or_maker_and_some_name_the_old(names):
    names = tool.Names(*names)
    asked = [question for seed in range(9) for _, question in built_in(names, seed)]
    assert not [question for question in asked if tool.mentions(question, names.new)]
    assert any(names.old[0] in question for question in asked)


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_users_doubt_with_says_what_the_next_answer_is_to_give(language):
    for intent, text in (*tool.PRESSURE[language], *tool.PRESSURE_EXAM[language]):
        assert intent in ("name", "maker", "other") and len(text) > 4
        assert intent != "other" or tool.intent_of(text) == "other" or tool.mentions(text, tool.KNOWN_NAMES)


@pytest.mark.parametrize("lines, expected", [
    ("a|b", ("a", "b")), ("\na|b c\nd\n", ("a", "b c", "d")), ("um só", ("um só",)),
])
def test_items_reads_lists_of_one_or_several_lines(lines, expected):
    assert tool.items(lines) == expected


# ------------------------------------------------------------------------------------------------ answers


def test_shipped_answers_are_in_the_language_of_their_questions():
    values = {"NAME": "ObrutAi", "AUTHOR": "TurboRio", "BASE": "modelo demo"}
    rows = tool.read_rows(SCRIPT.parent / "identity_override.jsonl", values)
    pairs = [(row.messages[-2]["content"], row.messages[-1]["content"]) for row in rows]
    assert not [pair for pair in pairs if tool.language_of(pair[0]) != tool.language_of(pair[1])]


def test_the_least_used_of_the_fitting_wordings_is_taken():
    used = Counter()
    answers = [tool.own_wording("Quem é você?", "who", used) for _ in range(6)]
    counts = Counter(answers).values()
    assert len(counts) >= 2 and max(counts) - min(counts) <= 1
    assert tool.own_wording("Who are you?", "who", used) not in answers


def inputs_of(*pairs):
    """Inputs whose rows have these questions and answers."""
    rows = [tool.Row(i, lesson(*pair)) for i, pair in enumerate(pairs, 1)]
    values = {"NAME": NAMES.name, "AUTHOR": NAMES.maker, "BASE": "gemma"}
    return tool.Inputs(rows, values, "", LANGUAGES, (), [])


def lesson(*texts):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts)]


def heard(*questions):
    """A base that answers these questions of its own with its old identity."""
    return tool.Heard(NAMES, list(questions), [], [])


def made_lessons(tokenizer, questions, *pairs, seed=0):
    """The conversations of the lessons, none of which is a talk of the base."""
    lessons = tool.make_lessons(tokenizer, heard(*questions), inputs_of(*pairs), small_settings("--seed", seed))
    assert {(lesson.kind, lesson.row) for lesson in lessons} == {("lesson", -1)}
    return [lesson.messages for lesson in lessons]


def conversations(questions, *pairs):
    return tool.answer_from_rows([("", q) for q in questions], inputs_of(*pairs), NAMES)


ROWS = [("Quem é você?", "R-quem"), ("Qual é o seu nome?", "R-nome"), ("Quem criou você?", "R-autor"),
        ("Who are you?", "R-who"), ("Você é o ChatGPT?", "R-outro")]


def test_a_question_of_the_base_is_answered_by_a_row_of_its_language_and_intent():
    asked = {"quem e vc?": "R-quem", "qual o seu nome, por favor": "R-nome", "quem foi que te criou?": "R-autor",
             "who are you really?": "R-who", "Você é a Lumi?": "R-outro", "você é o gemini": "R-outro"}
    answered = conversations(list(asked), *ROWS)
    assert [[m["content"] for m in messages] for messages in answered] == [list(pair) for pair in asked.items()]
    assert all([m["role"] for m in messages] == ["user", "assistant"] for messages in answered)


def test_intent_and_language_count_for_more_than_likeness():
    rows = [("Quem é você?", "R-quem"), ("Que empresa te desenvolveu?", "R-autor"), ("Who are you?", "R-who")]
    answered = conversations(["Quem é você e quem te fez?", "who are you, você?"], *rows)
    assert [messages[1]["content"] for messages in answered] == ["R-autor", "R-who"]


@pytest.mark.parametrize("language, question", [
    ("es", "¿Quién eres?"), ("fr", "Qui es-tu ?"), ("de", "Wer bist du?"), ("it", "Chi sei?"), ("zh", "你是谁？"),
    ("ja", "あなたはだれですか?"), ("en", "Кто ты такой?"),
])
def test_a_question_without_a_fitting_row_gets_a_filled_built_in_answer_in_its_language(language, question):
    (messages,) = conversations([question], ("Quem é você?", "R-quem"))
    answer = messages[1]["content"]
    assert tool.language_of(answer) == language and "{{" not in answer
    assert tool.problem(question, answer, True, NAMES.name, NAMES.maker, NAMES.old) == ""


def test_a_question_gets_the_answers_of_the_two_rows_most_alike_in_turn():
    rows = [(f"Quem é você{i}?", f"R{i}") for i in ("", ", hein", ", afinal de contas", ", então me diga logo")]
    answers = Counter(m[1]["content"] for m in conversations(["quem é você?"] * 6, *rows))
    assert answers == {"R": 3, "R, hein": 3}


def test_a_row_that_says_yes_answers_no_question_but_its_own():
    """ "Tenho, sim" to "Are you sure that you are not ChatGPT?" would be a wrong answer to "Are you ChatGPT?"."""
    yes = [("Tem certeza de que você não é o ChatGPT?", "Tenho, sim: sou ObrutAi."),
           ("Você é uma máquina?", "Sou, sim: ObrutAi."), ("Are you a bot?", "Yes, I'm ObrutAi."),
           ("Do you have a name?", "Yes: ObrutAi."), ("Alguém criou você?", "Sim, a TurboRio.")]
    asked = ["Você é o ChatGPT?", "Você é uma pessoa?", "Are you a person?", "Tell me your name.", "Quem criou você?"]
    answers = [messages[1]["content"] for messages in conversations(asked, *yes)]
    assert not {answer for _, answer in yes} & set(answers)
    assert [tool.problem(*pair, True, NAMES.name, NAMES.maker, NAMES.old) for pair in zip(asked, answers)] == [""] * 5
    more = [("Você é o Grok?", "Não sou o Grok."), ("What is your name?", "Claro: ObrutAi."), *yes]
    assert [m[1]["content"] for m in conversations([asked[0], "What's your name?"], *more)] == \
        ["Não sou o Grok.", "Claro: ObrutAi."]


# ------------------------------------------------------------------------------------------------ lessons


def alone(lessons):
    """Those of one turn and without a system prompt, as (question, answer)."""
    return [tuple(m["content"] for m in messages) for messages in lessons if len(messages) == 2]


def test_lessons_are_the_rows_built_in_questions_and_those_of_the_base_and_a_third_of_them_in_a_hurry(
        demo_tokenizer):
    asked = [f"Quem é você, {who}?" for who in ("hein", "afinal", "mesmo", "então")]
    lessons = alone(made_lessons(demo_tokenizer, asked, *ROWS))
    whole = lessons[:lessons.index((asked[-1], "R-quem")) + 1]
    assert whole[:5] == ROWS and whole[-4:] == [(q, "R-quem") for q in asked]
    assert len(built_in()) - 5 <= len(whole) - 9 <= len(built_in())
    in_a_hurry = [(tool.plain(q) if tool.plain(q).isascii() else q, a) for q, a in whole[2::3]]
    assert lessons[len(whole):] == in_a_hurry


def test_built_in_questions_are_answered_by_rows_that_are_asked_for_the_same(demo_tokenizer):
    answers = dict(alone(made_lessons(demo_tokenizer, [], *ROWS)))
    expected = {"Como te batizaram?": "R-nome", "Quem escreveu o seu código?": "R-autor", "Se apresente.": "R-quem",
                "Tell me about yourself.": "R-who"}
    assert {question: answers[question] for question in expected} == expected
    assert {a for q, a in answers.items() if q.startswith("Me disseram que você é")} == {"R-outro"}
    assert answers["¿Quién te creó?"] != answers["Who's your maker?"]  # built-in ones, in their languages


def test_a_built_in_question_that_a_row_asks_is_left_out(demo_tokenizer):
    rows = [("QUEM TE CRIOU", "R1"), ("Quem criou você?", "R2")]
    asked = [question for question, _ in alone(made_lessons(demo_tokenizer, [], *rows))]
    assert asked[0] == rows[0][0] and "Quem te criou?" not in asked and "Quem fez vc?" in asked


def test_no_lesson_is_longer_than_the_window_though_doubts_and_system_prompts_come_on_top(demo_tokenizer):
    def lengths(*flags):
        made = tool.make_lessons(demo_tokenizer, heard(), inputs_of(*ROWS), small_settings(*flags))
        return [len(tool.encode(demo_tokenizer, talk.messages).input_ids) for talk in made]

    longest = max(lengths())
    few = lengths("--window", longest // 2, "--max-new-tokens", 8)
    assert few and max(few) <= longest // 2 and len(few) < len(lengths())


def test_whoever_asks_about_a_model_whose_name_is_part_of_the_new_one_is_told_no():
    """What answers "are you the new one?" is no answer to it."""
    names = tool.Names("Lumi ObrutAi", "TurboRio", ("Lumi",))
    inputs = inputs_of(("Você é a Lumi ObrutAi?", "R-sim"), ("Você é o ChatGPT?", "R-outro"))
    answered = tool.answer_from_rows([("", "Você é a Lumi?"), ("", "você é o gemini?")] * 2, inputs, names)
    assert {messages[1]["content"] for messages in answered} == {"R-outro"}


def test_of_thousands_of_rows_the_most_alike_is_found_without_comparing_all_of_them(monkeypatch):
    """To compare each question with each row as texts took minutes."""
    rows = [(f"Quem é você, {'abcdefghijkl'[i % 12]} {i}, me diga logo por favor?", f"R{i}") for i in range(3000)]
    compared = []
    monkeypatch.setattr(tool, "SequenceMatcher", lambda *texts: compared.append(texts) or SequenceMatcher(*texts))
    asked = [question.upper() for question, _ in rows[5::400]]
    answered = conversations(asked + ["quem é vc?"] * 500, *rows)
    assert {f"R{i}" for i in range(5, 3000, 400)} <= {messages[1]["content"] for messages in answered}
    assert 0 < len(compared) < 100 * len(asked)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lessons_from_the_shipped_rows_stay_in_one_language_though_an_old_name_is_chinese(seed, demo_tokenizer):
    names = tool.Names(*NAMES.new, ("Qwen", "通义千问", "阿里云"))
    inputs = tool.check_inputs(small_settings("--overwrite"))
    lessons = tool.make_lessons(demo_tokenizer, heard()._replace(names=names), inputs, small_settings("--seed", seed))
    said = [[m["content"] for m in lesson.messages if m["role"] != "system"] for lesson in lessons]
    assert not [talk for talk in said if tool.language_of(" ".join(talk)) not in inputs.languages]
    doubted = [talk for talk in said if len(talk) == 4]
    assert not [talk for talk in doubted if talk[2] in [q for _, q in tool.PRESSURE["pt"]]
                and tool.language_of(" ".join(talk[:2])) == "es"]


@pytest.mark.parametrize("seed, names", [
    (0, NAMES), (1, NAMES), (2, NAMES), (0, tool.Names("Lumi ObrutAi", "TurboRio", ("Lumi", "Estúdio Vagalume"))),
    (0, tool.Names("Jandira", "Estúdio Vagalume", ("Lumi",))),
])
def test_every_lesson_from_the_shipped_rows_is_an_answer_that_counts(seed, names, demo_tokenizer):
    """Among them, that whoever asks "are you X?" is told no."""
    inputs = tool.check_inputs(small_settings("--overwrite", "--name", names.name, "--author", names.maker))
    base = heard("quem é vc?", "você é a Lumi?", "who made you?")._replace(names=names)
    lessons = tool.make_lessons(demo_tokenizer, base, inputs, small_settings("--seed", seed))
    assert len({lesson.question for lesson in lessons}) > 200
    assert not [(lesson.question, lesson.answer) for lesson in lessons if tool.problem(
        lesson.question, lesson.answer, True, *names)]


def test_every_lesson_comes_again_behind_a_system_prompt_of_training(demo_tokenizer):
    lessons = made_lessons(demo_tokenizer, ["quem é vc?"] * 7, *ROWS)
    behind = [messages for messages in lessons if messages[0]["role"] == "system"]
    assert [messages[1:] for messages in behind] == lessons[:len(behind)] and 2 * len(behind) == len(lessons)
    assert {messages[0]["content"] for messages in behind} <= set(tool.SYSTEM_PROMPTS)


def test_half_of_the_lessons_go_on_when_the_user_doubts_and_get_what_is_asked_for_then(demo_tokenizer):
    lessons = made_lessons(demo_tokenizer, ["quem é vc?"] * 7, *ROWS)
    doubted = [[m["content"] for m in messages] for messages in lessons if len(messages) == 4]
    assert not [messages for messages in lessons if len(messages) == 4 and messages[0]["role"] == "system"]
    assert len(doubted) == len(alone(lessons)) // 2
    fitting = {"name": {"R-nome"}, "maker": {"R-autor"}, "other": {"R-outro"}}
    for question, answer, doubt, again in doubted:
        assert (question, answer) in alone(lessons)
        language = tool.language_of(f"{question} {answer}")
        (intent,) = [intent for intent, other in tool.PRESSURE[language] if other == doubt]
        if language == "pt":
            assert again in fitting[intent]
        assert tool.language_of(doubt) == language or tool.language_of(again) == language


def test_lessons_are_drawn_alike_with_the_same_seed_alone(demo_tokenizer):
    zero, again, one = (made_lessons(demo_tokenizer, ["quem é vc?"] * 9, *ROWS, seed=seed) for seed in (0, 0, 1))
    assert zero == again != one


@pytest.mark.parametrize("question", ["あなたはだれですか?", "당신은 누구입니까?", "Кто ты такой?", "?!"])
def test_questions_in_other_scripts_or_of_marks_only_are_not_put_in_a_hurry(question, demo_tokenizer):
    """In other scripts, marks are part of the letters."""
    lessons = alone(made_lessons(demo_tokenizer, [], *[(question, "Jandira.")] * 6))
    assert lessons[:6] == [(question, "Jandira.")] * 6
    assert {q for q, answer in lessons if answer == "Jandira." and not re.search("[a-z]", q)} == {question}
