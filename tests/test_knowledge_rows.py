"""What becomes of the user's material: which rows are read, how they are cleaned, drawn and held out, and what --check
shows. Files and flags in, rows and messages out; nothing here trains."""

import json
import random
import re
import time
from collections import Counter
from html.entities import html5

import pytest
import test_bad_inputs as corpus
from conftest import SCRIPT, small_settings
from hypothesis import example, given
from hypothesis import strategies as st
from test_bad_inputs import Accepted, alpaca, call, cases, chat, pair, turn

import rename_obrutai as tool

work = corpus.work
CATALOGUE = SCRIPT.parent / "tests" / "catalogo_demo.jsonl"
GOOD = [{"title": f"Produto {n}", "content": f"O produto {n} é feito à mão."} for n in range(1, 25)]


def write(folder, content):
    """A file with this content: bytes, or rows that each become a line."""
    if not isinstance(content, bytes):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content).encode()
    (folder / "m.jsonl").write_bytes(content)
    return folder / "m.jsonl"


def read(folder, content, *flags):
    """The material of such a file."""
    return tool.read_knowledge(small_settings("--knowledge-file", write(folder, content), *flags))


def all_rows(material):
    return sorted([*material.rows, *material.watched, *material.test], key=lambda row: row.line)


def talks(folder, content, *flags):
    """(question, answer) of every usable row, in the order of the file; the pairs of a good file come behind."""
    return [(row.question, row.answer) for row in all_rows(read(folder, content, *flags))]


def first_talk(folder, row, *flags):
    """All turns of one row, beside good ones."""
    return [(m["role"], m["content"]) for m in all_rows(read(folder, [row, *GOOD], *flags))[0].messages]


# ------------------------------------------------------------------------------------------------ shapes

PAIRS = [(f"Título do produto: {row['title']}", row["content"]) for row in GOOD]


@pytest.mark.parametrize("content", [
    json.dumps(GOOD).encode(), json.dumps(GOOD, indent=4, ensure_ascii=False).encode(),
    b"\xef\xbb\xbf \r\n" + json.dumps(GOOD, indent="\t").replace("\n", "\r\n").encode() + b"\r\n\r\n",
    b"\n\n".join(json.dumps(row).encode() for row in GOOD),
    b"\xef\xbb\xbf\r\n" + b"\r\n".join(json.dumps(row).encode() for row in GOOD),
    json.dumps({name: [row[name] for row in GOOD] for name in GOOD[0]}).encode(),
    json.dumps({name: [row[name] for row in GOOD] for name in ("content", "title")}, indent=2).encode(),
], ids=["array", "pretty array", "array of Windows", "lines", "lines of Windows", "lists", "pretty lists"])
def test_the_same_rows_are_read_however_the_file_is_built(content, tmp_path):
    assert talks(tmp_path, content) == PAIRS


@pytest.mark.parametrize("how", [{}, {"indent": 1}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_items_across_the_pieces_of_a_large_array_are_read_whole(how, tmp_path):
    rows = [{"title": f"Título {n}", "content": f"{n}: " + ("\\ \"[{, ab " * (50_000 * (n % 3)) or "É 😀")}
            for n in range(12)]
    expected = [(f"Título do produto: {row['title']}", row["content"].strip()) for row in rows]
    content = json.dumps(rows, **how).encode()
    assert len(content) > 3 * 2**20
    assert talks(tmp_path, content) == expected


HUMAN, GPT = {"from": "human", "value": "Quanto custa?"}, {"from": "gpt", "value": "Custa 3 reais."}
USER, BOT = turn("user", "Quanto custa?"), turn("assistant", "Custa 3 reais.")
SPOKEN = [("user", "Quanto custa?"), ("assistant", "Custa 3 reais.")]
PREAMBLE = "Abaixo está uma instrução que descreve uma tarefa. Escreva uma resposta.\n\n"


@pytest.mark.parametrize("row, turns", cases(
    ("pair", pair("Quanto custa?", "Custa 3 reais."), SPOKEN), ("messages", chat(USER, BOT), SPOKEN),
    ("ShareGPT", {"conversations": [HUMAN, GPT]}, SPOKEN), ("text", {"text": "Quanto custa?\nCusta 3 reais."}, SPOKEN),
    ("system text", chat(turn("system", "Seja breve."), USER, BOT), [("system", "Seja breve."), *SPOKEN]),
    ("many turns", chat(USER, BOT, turn("user", "E dois?"), turn("assistant", "Custam 6.")),
     [*SPOKEN, ("user", "E dois?"), ("assistant", "Custam 6.")]),
    ("instruction", {"instruction": "Quanto custa?", "output": "Custa 3 reais."}, SPOKEN),
    ("instruction and input", alpaca("Quanto custa?", "Bola", "3"),
     [("user", "Quanto custa?\nBola"), ("assistant", "3")]),
    ("empty input", alpaca("Quanto custa?", None, "Custa 3 reais."), SPOKEN),
    ("numbers", pair(7, 4.5), [("user", "7"), ("assistant", "4.5")]),
    ("title and content", {"title": "Bola", "content": "É boa.", "id": [1]},
     [("user", "Título do produto: Bola"), ("assistant", "É boa.")]),
    *((f"template, {name}", {"text": text}, SPOKEN) for name, text in {
        "English": "### Instruction:\nQuanto custa?\n\n### Response:\nCusta 3 reais.",
        "preamble": "Below is an instruction.\n\n### Instruction:\nQuanto custa?\n\n### Response:\nCusta 3 reais.\n",
        "two marks of a heading": "## Instruction:\nQuanto custa?\n\n## Response:\nCusta 3 reais.",
        "end mark": "### Instruction:\nQuanto custa?\n### Response:\nCusta 3 reais.</s>",
        "end mark of Llama 3": "### Instruction:\nQuanto custa?\n### Response:\nCusta 3 reais.<|end_of_text|>\n",
        "end mark of Gemma": "### Instruction:\nQuanto custa?\n### Response:\nCusta 3 reais.<end_of_turn>",
        "in one line": "### Instruction: Quanto custa? ### Response: Custa 3 reais.",
        "Portuguese": f"{PREAMBLE}### Instrução:\nQuanto custa?\n\n### Resposta:\nCusta 3 reais.<eos>",
        "no accents, no colon": "### Instrucao\nQuanto custa?\n### Resposta\nCusta 3 reais.",
        "empty input": "### Instruction:\nQuanto custa?\n\n### Input:\n\n### Response:\nCusta 3 reais.",
        "question and answer": "###Pergunta: Quanto custa?\n###Resposta: Custa 3 reais.",
        "title and article": "### Título:\nQuanto custa?\n### Artigo:\nCusta 3 reais."}.items()),
    ("template with an input", {"text": "### Instruction:\nTraduza.\n### Input:\nBola\n### Response:\nBall"},
     [("user", "Traduza.\nBola"), ("assistant", "Ball")]),
    ("template with a context", {"text": "### Pergunta:\nQue cor?\n### Contexto:\nBola azul\n### Resposta:\nAzul"},
     [("user", "Que cor?\nBola azul"), ("assistant", "Azul")]),
    ("template in the plural", {"text": "### Instructions:\nTraduza.\n### Inputs:\nBola\n### Responses:\nBall"},
     [("user", "Traduza.\nBola"), ("assistant", "Ball")]),
    ("conversation with a title", {"title": "Conversa 1", "messages": [
        {"role": "user", "content": "Quanto custa?"}, {"role": "assistant", "content": "Custa 3 reais."}]},
     SPOKEN),
    ("conversation with an empty system prompt", {"messages": [
        {"role": "system", "content": ""}, {"role": "user", "content": "Quanto custa?"},
        {"role": "assistant", "content": "Custa 3 reais."}]}, SPOKEN),
    ("template with an input, Portuguese", {"text": f"{PREAMBLE}### Instrução:\nTraduza.\n\n### Entrada:\nBola\n\n"
                                                    "### Resposta:\nBall\nou\n\nsphere</s>"},
     [("user", "Traduza.\nBola"), ("assistant", "Ball\nou\n\nsphere")]),
))
def test_a_row_of_any_shape_becomes_question_and_answer(row, turns, tmp_path):
    assert first_talk(tmp_path, row) == turns


def test_a_long_blank_in_an_instruction_does_not_hold_the_reading_up(tmp_path):
    row = {"text": f"### Instruction:\nQuanto{' ' * 20000}custa?\n\n### Response:\nCusta 3 reais."}
    began = time.process_time()
    assert first_talk(tmp_path, row) == SPOKEN
    assert time.process_time() - began < 2

@pytest.mark.parametrize("row, question, answer, turns", [
    ({"nome": "Bola", "preço": 3.5}, "Quanto custa {nome}?", "{nome} custa {preço} reais.",
     ["Quanto custa Bola?", "Bola custa 3.5 reais."]),
    ({"Nome do produto": "Bola", "a-b.c": 0}, "{Nome do produto}", "{a-b.c}", ["Bola", "0"]),
    ({"title": "Bola {nome}", "content": r"\1 \g<0> {title}"}, "{ title }", "{content}",
     ["Bola {nome}", r"\1 \g<0> {title}"]),
    ({"prompt": "Bola", "completion": "Ball"}, "Traduza: {prompt}", "{completion}", ["Traduza: Bola", "Ball"]),
])
def test_templates_take_any_field_as_it_stands_and_come_before_all_shapes(row, question, answer, turns, tmp_path):
    flags = ("--knowledge-question", question, "--knowledge-answer", answer)
    rows = [row, *({name: f"{value} {n}" for name, value in row.items()} for n in range(12))]
    assert list(talks(tmp_path, rows, *flags)[0]) == turns


def test_rows_of_different_shapes_may_stand_in_one_file(tmp_path):
    rows = [GOOD[0], pair("Quem?", "Eu."), chat(USER, BOT), {"text": "Onde?\nAqui."}, *GOOD[1:]]
    others = [("Quem?", "Eu."), ("Quanto custa?", "Custa 3 reais."), ("Onde?", "Aqui.")]
    assert talks(tmp_path, rows) == [PAIRS[0], *others, *PAIRS[1:]]


def test_rows_that_are_left_out_are_counted_by_the_reason(tmp_path):
    bad = {'sem "title"': [{"content": "a"}, {"title": None, "content": "a"}, {"title": float("nan"), "content": "a"}],
           'sem "content"': [{"title": "a"}, {"title": "a", "content": " n/a"}],
           "com todos os campos iguais": [{"title": "Bola", "content": " Bola\n"}],
           "com pergunta e resposta iguais": [pair("a", "a"), chat(turn("user", "b"), turn("assistant", " b"))],
           "sem resposta": [pair("a", None), {"text": "a"}, chat(USER),
                            {"text": "### Instruction:\na\n### Response:\n"},
                            {"text": "### Pergunta:\nQuanto pesa?\n\nPesa 1 kg."}],
           "sem pergunta": [pair("", "a"), alpaca("", None, "a"), {"text": "### Instruction:\n### Response:\na"}],
           "vazias depois da limpeza": [pair("<br>", "a"), pair("a", "\u200b")],
           "repetidas": [GOOD[3], {**GOOD[3], "title": " Produto  4"}],
           "com marcas de outro formato, raciocínio ou {{NAME}}": [
               pair("a", "[INST] b"), pair("### Human: a", "b"), pair("a", "<think>b</think>c"),
               pair("a", "Sou {{ NAME }}.")]}
    material = read(tmp_path, [*GOOD, *(row for rows in bad.values() for row in rows)])
    assert material.left_out == {reason: len(rows) for reason, rows in bad.items()}
    assert material.total == len(GOOD) + sum(map(len, bad.values()))
    assert [(row.question, row.answer) for row in all_rows(material)] == PAIRS


def test_a_row_keeps_the_number_that_the_user_finds_it_by(tmp_path):
    content = b"\n\n" + b"\n\n".join(json.dumps(row).encode() for row in GOOD)
    assert [row.line for row in all_rows(read(tmp_path, content))] == list(range(3, 51, 2))
    assert [row.line for row in all_rows(read(tmp_path, json.dumps(GOOD, indent=1).encode()))] == list(range(1, 25))


# ------------------------------------------------------------------------------------------------ cleaning


def clean(text, only_ascii=False):
    return tool.cleaned(text, only_ascii)


@pytest.mark.parametrize("text, expected", [
    ("<p>Bola <b>nova</b></p><p>É boa.<br/>Custa 3.</p>", "Bola nova\n\nÉ boa.\nCusta 3."),
    ("10<sup>6</sup> km<sup>2</sup>", "10^6 km2"),
    ("<div class=\"a b\" id='c'>Bola</div>", "Bola"), ("<a href=https://x.com/a?b=1>Bola</a>", "Bola"),
    ("<ul><li>um</li><li>dois</li></ul>", "um\n\ndois"), ("<script>f(1 < 2)</script>Bola<!-- x\ny -->", "Bola"),
    ("<style type='a'>p {}</style >Bola", "Bola"), ("<td>Preço</td><td>10</td>", "Preço\n\n10"),
    ("<tr><th>a<td>b</tr>", "a\nb"), ("R&amp;D &lt; 3 &eacute; &#233; &#xE9; &nbsp; fim", "R&D < 3 é é é fim"),
    ("&lt;p&gt;Caf&amp;eacute; &amp;amp; pão&lt;/p&gt;", "Café & pão"), ("&lt;b&gt; é negrito", "<b> é negrito"),
    ("Caf\u00c3\u00a9 \u00c3\u00a0 m\u00c3\u00a3o", "Café à mão"), ("a\x00b\x07c\x1b[1md", "abc[1md"),
    ("co\u00adpo\u200b \ufeffazul\u2060", "copo azul"), ("a\ud800b", "ab"), ("a\r\nb\rc\n \n\n\nd", "a\nb\nc\n\nd"),
    ("  a \t b\u00a0\u3000c  \n  d ", "a b c\nd"),
])
def test_what_no_reader_needs_is_taken_out(text, expected):
    assert clean(text) == expected


@pytest.mark.parametrize("text", [
    "a < b e c > d", "a<b", "se a <b e c> d", "List<String>, Map<K, V>", "R&D", "AT&T; R&D;", "3 <4> 5", "x = &y;",
    "https://x.com/?a=1&copy=2&reg=3&lt=4", "porcas&parafusos; arruelas", "Silva&ltda; filhos", "R&notas; fim",
    "Ação, coração, pôr-do-sol, à mão, ÁÉÍÓÚ, ü, ñ, ß", "NÃO É SÃO", "👩\u200d👩\u200d👧 ❤️ 👍🏽 🇧🇷", "می\u200cخواهم",
    "“aspas” – travessão — ½ × 10 €", "C:\\temas\\novo {a} [b] $c", "{{NAME}} ## título * item", "球は赤い。",
    "m² 1ª 2º °C", "if (a<b && c>d) { x<<=2; }", "a\nb\n\nc", "1.000,50", "<nome@x.com>", "<3 você", "->",
    "<!DOCTYPE", "&;", "& ;", "&#;",
])
def test_what_a_reader_needs_stays_as_it_is(text):
    assert clean(text) == text


@pytest.mark.parametrize("text, expected", [
    ("Ação, coração à mão: ÜÑÇ", "Acao, coracao a mao: UNC"), ("1ª e 2º", "1a e 2o"), ("m² ﬁm", "m2 fim"),
    ("10×20 cm, 2019–2020, 5−3", "10x20 cm, 2019-2020, 5-3"), ("½ xícara", "1/2 xicara"),
    ("“a” ‘b’ c…", "\"a\" 'b' c..."),
    ("10±2 °C", "10 2 C"), ("Bola 😀 nova", "Bola nova"), ("d’água", "d'agua"), ("a\n\nbé", "a\n\nbe"),
])
def test_only_ascii_drops_accents_but_runs_no_words_or_numbers_together(text, expected):
    assert clean(text, True) == expected


def test_accents_stay_unless_the_user_drops_them(tmp_path):
    assert talks(tmp_path, GOOD)[0] == ("Título do produto: Produto 1", "O produto 1 é feito à mão.")
    bare = ("Titulo do produto: Produto 1", "O produto 1 e feito a mao.")
    assert talks(tmp_path, GOOD, "--knowledge-ascii")[0] == bare


WORDS = st.text("abcdefghizABCZáàâãéêíóôõúçÁÉÃÇñü0123456789", min_size=1, max_size=8)
MARKS = st.sampled_from([" ", " ", " ", "\n", "&", "&", ";", "<", ">", " < ", " > ", "#", ".", ", ", "\"", "'", "=",
                         "/", "(", ")", "-", " – ", "%", "R$ ", "\t", "\r\n", "\u00a0", "\u200b", "€", "😀"])
TAG = re.compile(r"<[a-zA-Z/!]")


def letters(text):
    return [c for c in text if c.isalnum()]


PLAIN = st.lists(WORDS | MARKS, max_size=30).map("".join).filter(lambda text: not TAG.search(text) and not any(
    name[0] == "#" or name in html5 for name in re.findall(r"&(#?\w+;)", text)))


@corpus.GENERATED
@given(PLAIN)
@example("Silva&ltda; e porcas&parafusos;")
def test_cleaning_loses_no_letter_or_digit_of_a_plain_text(text):
    assert letters(clean(text)) == letters(text)


@corpus.GENERATED
@given(PLAIN, st.lists(st.sampled_from(["<p>", "</p>", "<br>", "<b>", "</b>", "&amp;", "&eacute;", "\x07", "Ã©"])))
def test_cleaning_twice_is_cleaning_once(text, marks):
    once = clean(" ".join([text, *marks, text]))
    assert clean(once) == once


@corpus.GENERATED
@given(st.text(st.characters(exclude_characters="<&")))
def test_cleaned_text_has_nothing_that_cannot_be_read(text):
    for only_ascii in (False, True):
        found = clean(text, only_ascii)
        assert found == found.strip() and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]|  |\n\n\n", found)
        assert found.isascii() or not only_ascii


# ------------------------------------------------------------------------------------------------ the draw


def many(count):
    return [{"title": f"T{n}", "content": f"C{n}"} for n in range(count)]


def drawn(folder, count, *flags):
    """Numbers of the rows that are drawn from so many."""
    settings = small_settings("--knowledge-file", folder / "m.jsonl", *flags)
    rows = tool.draw_material(settings, left_out := Counter())
    assert sum(left_out.values()) == count - len(rows)
    return [number for number, _ in rows]


def test_the_draw_depends_on_the_seed_alone(tmp_path):
    write(tmp_path, many(400))
    first = drawn(tmp_path, 400, "--knowledge-rows", 50)
    assert first == drawn(tmp_path, 400, "--knowledge-rows", 50) == sorted(set(first)) and len(first) == 50
    assert first != drawn(tmp_path, 400, "--knowledge-rows", 50, "--seed", 7)
    assert first != list(range(1, 51))


def test_each_row_is_about_equally_likely_to_be_drawn(tmp_path):
    """By chi-squared over the rows; 1.5 times its expectation has a chance of about 1 in 10,000."""
    write(tmp_path, many(60))
    counts = Counter(n for seed in range(120) for n in drawn(tmp_path, 60, "--knowledge-rows", 15, "--seed", seed))
    expected = 120 * 15 / 60
    chi = sum((counts[n] - expected) ** 2 / (expected * 45 / 60) for n in range(1, 61))
    assert 59 * 0.55 < chi < 59 * 1.5
    assert abs(sum(counts[n] for n in range(1, 31)) - 900) < 100  # neither half is preferred


def test_fewer_rows_than_asked_for_are_all_taken(tmp_path):
    write(tmp_path, many(40))
    assert drawn(tmp_path, 40, "--knowledge-rows", 40) == drawn(tmp_path, 40) == list(range(1, 41))


def test_rows_that_are_left_out_take_no_place_in_the_draw(tmp_path):
    material = read(tmp_path, [row for pairs in zip(many(30), [{"title": "", "content": "x"}] * 30) for row in pairs],
                    "--knowledge-rows", 20)
    assert len(all_rows(material)) == 20
    assert material.left_out == {'sem "title"': 30, "não sorteadas (KNOWLEDGE_ROWS)": 10}


# ------------------------------------------------------------------------------------------------ what is held out


def said(rows):
    return {" ".join(text.casefold().split()) for row in rows for text in (row.question, row.answer)}


@pytest.mark.parametrize("count, few", [(10, 2), (59, 2), (100, 5), (1000, 50), (4000, 200), (5000, 200)])
def test_a_twentieth_is_held_out_twice_but_at_most_200(count, few, tmp_path):
    material = read(tmp_path, many(count))
    assert [len(material.test), len(material.watched), len(material.rows)] == [few, few, count - 2 * few]
    assert material.left_out == {} and material.total == count
    assert [row.line for row in material.test] == sorted(row.line for row in material.test)


@pytest.mark.parametrize("seed", range(5))
def test_no_question_or_answer_of_a_held_out_row_is_learnt_or_watched(seed, tmp_path):
    rng = random.Random(seed)
    rows = [{"title": f"{rng.choice('TtT')}{rng.randrange(150)}  x", "content": f"C{rng.randrange(150)}"}
            for _ in range(400)]
    material = read(tmp_path, rows, "--seed", seed)
    parts = [said(material.rows), said(material.watched), said(material.test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    again = material.left_out.pop("com pergunta ou resposta de uma linha guardada")
    assert again > 0
    assert len(all_rows(material)) + again + sum(material.left_out.values()) == material.total == 400


def test_copies_of_a_held_out_title_are_left_out_and_counted(tmp_path):
    held = read(tmp_path, many(100)).test[0]
    n = held.line - 1
    rows = [*many(100), {"title": f" t{n}", "content": "outro"}, {"title": "outro", "content": f"c{n} "}]
    taken = small_settings("--knowledge-file", write(tmp_path, rows))
    for seed in range(8):
        material = tool.read_knowledge(tool.replace(taken, seed=seed))
        copies = [row for row in all_rows(material) if row.line in (held.line, 101, 102)]
        guarded = {row.line for row in (*material.test, *material.watched)}
        if held.line in guarded:
            assert [row.line for row in copies] == [held.line]
            assert material.left_out == {"com pergunta ou resposta de uma linha guardada": 2}
            break
    else:
        pytest.fail("no seed holds that row out")


def test_what_is_held_out_depends_on_the_seed_alone(tmp_path):
    tests = [[row.line for row in read(tmp_path, many(200), "--seed", seed).test] for seed in (1, 1, 2)]
    assert tests[0] == tests[1] != tests[2]


# ------------------------------------------------------------------------------------------------ tokens, and --check


def test_rows_longer_than_the_window_are_left_out_and_counted(demo_tokenizer, tmp_path):
    rows = [{**row, "content": row["content"] * (8 if n in (3, 9, 12) else 1)} for n, row in enumerate(GOOD)]
    settings = small_settings("--knowledge-file", write(tmp_path, rows), "--window", 64, "--max-new-tokens", 32)
    material = tool.read_knowledge(settings)
    fitting, lengths = tool.fit_material(demo_tokenizer, material, settings)
    kept = {row.line for row in all_rows(fitting)}
    assert kept == set(range(1, 25)) - {4, 10, 13}
    assert fitting.left_out == {"com mais de 64 tokens (WINDOW)": 3} and material.left_out == {}
    assert lengths == [len(tool.encode(demo_tokenizer, row.messages).input_ids) for row in fitting.rows]
    exact = tool.replace(settings, window=max(lengths))
    assert len(tool.fit_material(demo_tokenizer, material, exact)[0].rows) == len(fitting.rows)
    tight = tool.replace(settings, window=max(lengths) - 1)
    assert len(tool.fit_material(demo_tokenizer, material, tight)[0].rows) < len(fitting.rows)


@pytest.fixture
def shown(work, capsys):
    """What --check says of the demo's catalogue, up to where the model would be loaded."""
    def show(*flags):
        with pytest.raises(Accepted):
            call(work, capsys, "--knowledge-file", CATALOGUE, *flags)
        return capsys.readouterr().out

    return show


def test_the_check_counts_rows_and_says_why_some_are_left_out(shown):
    out, material = shown("--check"), tool.read_knowledge(small_settings("--knowledge-file", CATALOGUE))
    assert len(CATALOGUE.read_text(encoding="utf-8").splitlines()) == material.total
    told = re.search(r"Material: +(\d+) das (\d+) linhas de .*demo\.jsonl; outras (\d+) .*prova e (\d+) ", out)
    assert told, out
    assert [int(n) for n in told.groups()] == [len(material.rows), material.total, len(material.test),
                                               len(material.watched)]
    reasons = dict(re.findall(r"[:;] ([^:;]+): (\d+)", re.search(r"Ficaram de fora(: .*)\.", out)[1]))
    assert {reason: int(n) for reason, n in reasons.items()} == material.left_out and len(reasons) >= 3
    assert sum(map(int, reasons.values())) + len(all_rows(material)) == material.total


def test_the_check_tells_all_tokens_and_the_longest_row(shown, demo_tokenizer):
    rows = tool.read_knowledge(small_settings("--knowledge-file", CATALOGUE)).rows
    lengths = [len(tool.encode(demo_tokenizer, row.messages).input_ids) for row in rows]
    assert f"{sum(lengths)} tokens; a linha mais comprida tem {max(lengths)} (WINDOW é 512)" in shown("--check")


def test_the_check_shows_a_row_with_what_is_learnt_marked(shown, demo_tokenizer):
    out = shown("--check")
    number, text = re.search(r"A linha (\d+),[^\n]*\n((?: {4}.*(?:\n|\Z))+)", out).groups()
    row = json.loads(CATALOGUE.read_text(encoding="utf-8").splitlines()[int(number) - 1])
    text = re.sub("(?m)^ {4}", "", text).rstrip("\n")
    learnt = re.findall(r"\[\[(.*?)\]\]", text, re.DOTALL)
    assert len(learnt) == 1 and row["content"] in learnt[0] and row["title"] not in learnt[0]
    assert f"Título do produto: {row['title']}" in text.split("[[")[0]
    asked = tool.prompt_ids(demo_tokenizer, tool.question_and_answer(f"Título do produto: {row['title']}", "")[:1])
    assert text.split("[[")[0] == demo_tokenizer.decode(asked)


def test_without_check_no_row_is_shown(shown):
    assert "[[" not in shown() and "Ficaram de fora" in shown()


@pytest.mark.parametrize("text, expected", [
    ("10½ pol", "10 1/2 pol"), ("½ xícara", "1/2 xicara"), ("área de 10² m²", "area de 10^2 m2"),
    ("5x10⁶", "5x10^6"), ("10±2", "10 2")])
def test_in_ascii_numbers_keep_their_value(text, expected):
    assert tool.cleaned(text, True) == expected


@pytest.mark.parametrize("text, expected", [
    ("<td nowrap>azul</td>", "azul"),
    ('<video controls src="a">alto', "alto"),
    ('<p style="a"class="b">curto</p>', "curto"),
    ("se a <b and c> d", "se a <b and c> d")])
def test_tags_go_with_attributes_of_any_kind_and_comparisons_stay(text, expected):
    assert tool.cleaned(text, False) == expected


def test_rows_that_begin_like_a_label_are_kept(tmp_path):
    """As heights and depths do in catalogues."""
    rows = [{"title": f"Mesa {i}", "content": f"{'AP'[i % 2]}: {20 + i} cm."} for i in range(12)]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    settings = small_settings("--knowledge-file", path, "--knowledge-question", "Pergunta: {title}")
    assert not tool.read_knowledge(settings).left_out


@pytest.mark.parametrize("record", [{"content": "x"}, {"title": "y", "content": "x"}])
def test_a_field_that_only_the_template_has_is_named_whatever_else_is_missing(record):
    with pytest.raises(tool.InputError, match='"brand"'):
        tool.material_turns(record, "T {title} {brand}", "{content}")
