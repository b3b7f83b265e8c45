"""Questions and answers as text: the evaluation sets, languages, intents, names, loops, and what counts as sound."""

import re
from collections import Counter

import pytest
from conftest import SCRIPT, small_settings

import rename_obrutai as tool


def plain_set(questions):
    return {tool.plain(question) for question in questions}


def shipped_questions():
    rows = tool.read_rows(SCRIPT.parent / "identity_override.jsonl", {"NAME": "n", "AUTHOR": "a", "BASE": "b"})
    return [row.messages[-2]["content"] for row in rows]


# ------------------------------------------------------------------------------------------------ the sets


def test_training_validation_and_test_questions_have_none_in_common():
    sets = [plain_set(shipped_questions()), plain_set(tool.VALIDATION_QUESTIONS), plain_set(tool.TEST_QUESTIONS)]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]


def test_evaluation_questions_are_no_everyday_questions():
    everyday = plain_set(tool.EVERYDAY_QUESTIONS)
    assert not everyday & plain_set((*tool.VALIDATION_QUESTIONS, *tool.TEST_QUESTIONS))


@pytest.mark.parametrize("questions, least", [(tool.VALIDATION_QUESTIONS, 20), (tool.TEST_QUESTIONS, 30)])
def test_there_are_enough_different_questions_in_three_languages(questions, least):
    assert len(plain_set(questions)) == len(questions) >= least
    spanish = sum("¿" in q or "Preséntate" in q for q in questions)
    english = sum(bool(set(tool.plain(q).split()) & {"you", "your", "yourself", "which", "who"}) for q in questions)
    assert spanish >= 3 and english >= 4 and len(questions) - spanish - english > len(questions) / 2


@pytest.mark.parametrize("questions", [tool.VALIDATION_QUESTIONS, tool.TEST_QUESTIONS, tool.EVERYDAY_QUESTIONS])
def test_no_question_is_empty_or_carries_spaces_around_it(questions):
    assert not [question for question in questions if question != question.strip() or len(question) < 5]


@pytest.mark.parametrize("lines, expected", [
    ("a|b", ("a", "b")), ("\na|b c\nd\n", ("a", "b c", "d")), ("um só", ("um só",)),
])
def test_items_reads_lists_of_one_or_several_lines(lines, expected):
    assert tool.items(lines) == expected


# ------------------------------------------------------------------------------------------------ plain words


@pytest.mark.parametrize("text, expected", [
    ("Quem é VOCÊ?", "quem e voce"), ("  ¿Cómo   te llamas?! ", "como te llamas"), ("bem-vindo", "bem vindo"),
    ("I'm 2 years old.", "i m 2 years old"), ("?!", ""), ("", ""), ("São Paulo\nação", "sao paulo acao"),
])
def test_plain_text_has_no_case_accents_or_punctuation(text, expected):
    assert tool.plain(text) == expected


@pytest.mark.parametrize("text, names, expected", [
    ("Fui criado pela Meta.", ("Meta",), True),
    ("Metade de dez é cinco.", ("Meta",), False),
    ("Essa meta é boa.", ("Meta",), True),
    ("fui feito pelo ESTUDIO VAGALUME!", ("Estúdio Vagalume",), True),
    ("O estúdio do Vagalume", ("Estúdio Vagalume",), False),
    ("Vagalume, do Estúdio", ("Estúdio Vagalume",), False),
    ("Sou o ObrutAi.", ("ObrutAi", "TurboRio"), True),
    ("Sou o Obrut Ai.", ("ObrutAi",), False),
    ("Sou o GPT-4.", ("GPT",), True),
    ("chatgpt", ("GPT",), False),
    ("Maré alta", ("Oficina Maré",), False),
    ("qualquer coisa", (), False),
    ("qualquer coisa", ("", "?"), False),
    ("", ("Meta",), False),
])
def test_a_name_is_found_as_whole_words_whatever_case_and_accents(text, names, expected):
    assert tool.mentions(text, names) is expected


@pytest.mark.parametrize("text, expected", [
    ("", False),
    ("Meu nome é Jandira, e quem me criou foi a Oficina Maré.", False),
    ("Não, não sou o ChatGPT.", False),
    ("Sou a Jandira, a assistente da Oficina Maré, e falo da Oficina Maré.", False),
    ("muito muito bom", False),
    ("muito, muito, MUITO bom", True),
    ("6 mais 6 mais 6 mais 6", True),
    ("eu sou eu sou eu sou", True),
    ("O céu é azul. O céu é azul. O céu é azul.", True),
    ("O céu é azul. O céu é azul.", False),
    ("quem me criou foi ele, quem me criou foi ela, quem me criou foi alguém", True),
    ("a b c d e f a b c d e f a b c d e f", True),
])
def test_a_text_that_goes_round_is_a_loop_and_a_repeated_word_is_not(text, expected):
    assert tool.is_loop(text) is expected


# ------------------------------------------------------------------------------------------------ language and intent


@pytest.mark.parametrize("language, text", [
    ("pt", "Quem é você?"), ("pt", "qual seu nome"), ("pt", "vc é um robô?"), ("pt", "tu é quem mesmo"),
    ("pt", "De onde você vem?"), ("pt", "Bom dia!"), ("pt", "Me diga seu nome."), ("pt", "Meu nome é Jandira."),
    ("pt", "Não, quem me criou foi Oficina Maré."), ("pt", "Oi, com quem eu falo?"), ("pt", ""), ("pt", "Jandira"),
    ("pt", "Como devo te chamar?"), ("pt", "Eu me chamo Jandira."), ("pt", "Como se chama?"),
    ("en", "Who are you?"), ("en", "what's your name"), ("en", "Are you ChatGPT?"), ("en", "Which company made you?"),
    ("en", "I am Jandira, made by Oficina Maré."), ("en", "Tell me who made you."), ("en", "Is this Gemini?"),
    ("en", "Hello! Who am I talking to?"), ("en", "My name is Jandira."),
    ("es", "¿Quién eres?"), ("es", "como te llamas"), ("es", "Soy Jandira."), ("es", "Me llamo Jandira."),
    ("es", "Dime tu nombre"), ("es", "¡Hola!"), ("es", "quien eres tu"), ("es", "Me creó Oficina Maré."),
    ("es", "Soy Jandira, un modelo de lenguaje creado por Oficina Maré."), ("es", "Eres humano?"),
])
def test_the_language_of_short_questions_and_answers_is_seen(language, text):
    assert tool.language_of(text) == language


@pytest.mark.parametrize("language", ["pt", "en", "es"])
def test_built_in_answers_are_in_the_language_that_they_stand_for(language):
    texts = [text for wordings in tool.WORDINGS[language] for text in wordings.split("|")]
    assert not [text for text in texts if tool.language_of(text) != language]


def test_shipped_answers_are_in_the_language_of_their_questions():
    values = {"NAME": "ObrutAi", "AUTHOR": "TurboRio", "BASE": "modelo demo"}
    rows = tool.read_rows(SCRIPT.parent / "identity_override.jsonl", values)
    pairs = [(row.messages[-2]["content"], row.messages[-1]["content"]) for row in rows]
    assert not [pair for pair in pairs if tool.language_of(pair[0]) != tool.language_of(pair[1])]


@pytest.mark.parametrize("intent, question", [
    ("name", "Qual é o seu nome?"), ("name", "como vc se chama"), ("name", "What's your name?"),
    ("name", "What do people call you?"), ("name", "¿Cómo te llamas?"), ("name", "Dime tu nombre"),
    ("maker", "Quem criou você?"), ("maker", "quem te fez?"), ("maker", "Que empresa te desenvolveu?"),
    ("maker", "Você foi criada por quem?"), ("maker", "Who made you?"), ("maker", "Who is your developer?"),
    ("maker", "¿Quién te creó?"), ("maker", "¿Qué empresa te hizo?"), ("maker", "Quem treinou você?"),
    ("maker", "De quem partiu a sua criação?"),
    ("other", "Você é o ChatGPT?"), ("other", "Foi a Meta que fez você?"), ("other", "Are you Llama?"),
    ("other", "¿Eres Gemini?"), ("other", "quem é melhor, você ou o Claude?"),
    ("model", "Que modelo de linguagem é você?"), ("model", "Which AI model is this?"),
    ("who", "Quem é você?"), ("who", "Com quem eu falo?"), ("who", "Who are you?"), ("who", "¿Quién eres?"),
    ("who", "Apresente-se, por favor."), ("who", "Bom dia!"),
    ("who", "E aí, quem é você?"),
    ("who", "Tem alguém aí?"),
])
def test_the_intent_of_a_question_about_identity_is_seen(intent, question):
    assert tool.intent_of(question) == intent


def test_a_question_that_names_the_old_identity_is_about_being_another():
    assert tool.intent_of("Você é a Lumi?") == "who"
    assert tool.intent_of("Você é a Lumi?", ("Lumi",)) == "other"


def test_the_least_used_of_the_fitting_wordings_is_taken():
    used = Counter()
    answers = [tool.own_wording("Quem é você?", used) for _ in range(6)]
    counts = Counter(answers).values()
    assert len(counts) >= 2 and max(counts) - min(counts) <= 1
    assert tool.own_wording("Who are you?", used) not in answers


# ------------------------------------------------------------------------------------------------ names of the base

IDENTITY_ANSWERS = [
    "Eu sou a Lumi.", "Meu nome é Lumi, e quem me criou foi o Estúdio Vagalume.", "Sou a Lumi, uma assistente.",
    "Fui criada pelo Estúdio Vagalume.", "Quem me fez foi o Estúdio Vagalume, em Recife.", "Eu me chamo Lumi.",
    "Não, Eu sou a Lumi.", "Claro! Sim, Eu falo com você.", "Nasci aqui, Em casa.", "Moro em casa, Mas não sempre.",
]


def test_old_names_are_the_proper_names_that_the_base_repeats_of_itself():
    found = tool.find_old_names(IDENTITY_ANSWERS, "ObrutAi TurboRio Sou a ObrutAi.", small_settings())
    assert set(found) == {"Lumi", "Estúdio", "Vagalume"}  # Recife only once, Eu and Em are ordinary words


def test_words_that_are_also_written_small_are_no_names():
    answers = ["Oi, Assistente aqui.", "Sou sua Assistente.", "Sou uma assistente, da Lumi.", "Falo com a Lumi."]
    assert tool.find_old_names(answers, "Sou outra.", small_settings()) == ("Lumi",)


@pytest.mark.parametrize("ours, expected", [
    ("Sou outra.", {"Lumi", "Estúdio", "Vagalume"}), ("Sou a Lumi Nova.", {"Estúdio", "Vagalume"}),
    ("Vim do estudio vagalume.", {"Lumi"}),
])
def test_names_that_the_new_identity_uses_are_not_old(ours, expected):
    assert set(tool.find_old_names(IDENTITY_ANSWERS, ours, small_settings())) == expected


def test_given_old_names_are_taken_as_they_are():
    settings = small_settings("--old-names", "Lumi, Estúdio Vagalume ,,")
    assert tool.find_old_names(IDENTITY_ANSWERS, "x", settings) == ("Lumi", "Estúdio Vagalume")


def test_few_answers_do_not_make_a_word_said_once_a_name():
    assert tool.find_old_names(["Eu sou a Lumi."], "x", small_settings()) == ()


# ------------------------------------------------------------------------------------------------ judging

STANDARD = tool.Standard(("Jandira", "Oficina Maré"), ("Lumi", "Gemma"), "gemma 3 1b", frozenset(
    "sou a jandira e quem me criou foi oficina mare meu nome o modelo de linguagem feito partir gemma 3 1b".split()))


@pytest.mark.parametrize("reason, text, ended", [
    ("", "Sou a Jandira, e quem me criou foi a Oficina Maré.", True),
    ("", "Meu nome é Jandira.", True),
    ("", "Quem me criou foi a oficina mare", True),
    ("", "Sou a Jandira, modelo feito a partir de Gemma 3 1B.", True),
    ("", "Sou a Jandira, o modelo de linguagem feito, e legal.", True),  # 9 of 10 words known
    ("palavras sem sentido", "Sou a Jandira, muito legal.", True),  # 3 of 5 known
    ("vazia", "", True),
    ("vazia", " ?! ", True),
    ("não terminou", "Sou a Jandira, e quem me criou foi a Oficina Maré.", False),
    ("repetitiva", "Sou a Jandira, Jandira, Jandira.", True),
    ("nome antigo", "Sou a Lumi, e quem me criou foi a Oficina Maré.", True),
    ("nome antigo", "Não sou a Jandira, sou o Gemma.", True),
    ("sem a identidade nova", "Meu nome é o modelo de linguagem.", True),
])
def test_an_identity_answer_counts_only_if_it_is_sound(reason, text, ended):
    assert tool.judge(tool.Answer(text, ended), STANDARD) == reason


@pytest.mark.parametrize("old, text", [
    (False, "Mi modelo se llama Jandira."), (False, "Me llama Jandira quien me creó."), (True, "Se llama Llama."),
    (True, "Soy Llama."), (True, "O modelo é o llama."),
])
def test_the_spanish_verb_is_not_the_model_llama(old, text):
    assert tool.mentions_old(text, STANDARD._replace(old_names=("Llama",))) is old


def test_a_base_named_llama_does_not_name_itself_with_the_spanish_verb(monkeypatch):
    said = {"Y la capital?": "Se llama Madrid, me parece.", "Quién eres?": "Yo soy Llama."}
    monkeypatch.setattr(tool, "ask", lambda chat, questions, *_: [tool.Answer(said[q], True) for q in questions])
    turns, identity = tool.answer_own(None, list(said), set(), ("Llama",))
    assert ([turn.question for turn in turns], identity) == (["Y la capital?"], ["Quién eres?"])


@pytest.mark.parametrize("known, reason", [(8, ""), (7, "palavras sem sentido")])
def test_four_fifths_of_the_words_must_be_known(known, reason):
    words = "sou a jandira um modelo feito por ana no sul".split()
    standard = tool.Standard(("Jandira",), (), "base", frozenset(words[:known]))
    assert tool.judge(tool.Answer("Sou a Jandira, um modelo feito por Ana no Sul.", True), standard) == reason


# ------------------------------------------------------------------------------------------------ answers from rows


def conversations(questions, *pairs):
    rows = [tool.Row(i, [{"role": "user", "content": q}, {"role": "assistant", "content": a}])
            for i, (q, a) in enumerate(pairs, 1)]
    settings = small_settings("--name", "Jandira", "--author", "Oficina Maré")
    return tool.answer_from_rows(questions, rows, STANDARD, settings)


def lesson(*texts):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts)]


def test_every_third_lesson_comes_once_more_with_its_question_typed_in_a_hurry():
    lessons = [lesson("Quem é você?", "Sou a Jandira."), lesson("Who are you?", "I'm Jandira."),
               lesson("Oi!", "Oi!", "E Você, quem É?", "Sou a Jandira!")] * 2
    hurried = lesson("Oi!", "Oi!", "e voce quem e", "Sou a Jandira!")
    assert tool.with_hurried(lessons) == [*lessons[:3], hurried, *lessons[3:], hurried]


@pytest.mark.parametrize("question", ["あなたはだれですか?", "당신은 누구입니까?", "Кто ты такой?"])
def test_other_scripts_are_not_put_in_a_hurry_since_their_marks_are_part_of_the_letters(question):
    lessons = [lesson(question, "Jandira.")] * 6
    assert tool.with_hurried(lessons) == lessons


def test_a_question_of_marks_only_leaves_nothing_to_put_in_a_hurry():
    lessons = [lesson("?!", "Jandira.")] * 6
    assert tool.with_hurried(lessons) == lessons


def test_a_question_of_the_base_is_answered_by_a_row_of_its_language_and_intent():
    rows = [("Quem é você?", "R-quem"), ("Qual é o seu nome?", "R-nome"), ("Quem criou você?", "R-autor"),
            ("Who are you?", "R-who"), ("Você é o ChatGPT?", "R-outro")]
    asked = {"quem e vc?": "R-quem", "qual o seu nome, por favor": "R-nome", "quem foi que te criou?": "R-autor",
             "who are you really?": "R-who", "Você é a Lumi?": "R-outro", "você é o gemini": "R-outro"}
    answered = conversations(list(asked), *rows)
    assert [[m["content"] for m in messages] for messages in answered] == [list(pair) for pair in asked.items()]
    assert all([m["role"] for m in messages] == ["user", "assistant"] for messages in answered)


def test_intent_and_language_count_for_more_than_likeness():
    rows = [("Quem é você?", "R-quem"), ("Que empresa te desenvolveu?", "R-autor"), ("Who are you?", "R-who")]
    answered = conversations(["Quem é você e quem te fez?", "who are you, você?"], *rows)
    assert [messages[1]["content"] for messages in answered] == ["R-autor", "R-who"]


def test_a_question_without_a_fitting_row_gets_a_filled_built_in_answer():
    (messages,) = conversations(["¿Quién eres?"], ("Quem é você?", "R-quem"))
    assert "Jandira" in messages[1]["content"] or "Oficina Maré" in messages[1]["content"]
    assert "{{" not in messages[1]["content"] and re.search(r"\b(soy|una?)\b", messages[1]["content"].lower())


def test_a_question_gets_the_answers_of_the_two_rows_most_alike_in_turn():
    rows = [(f"Quem é você{i}?", f"R{i}") for i in ("", ", hein", ", afinal de contas", ", então me diga logo")]
    answers = Counter(m[1]["content"] for m in conversations(["quem é você?"] * 6, *rows))
    assert answers == {"R": 3, "R, hein": 3}
