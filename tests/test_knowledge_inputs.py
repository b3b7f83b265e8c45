"""A corpus of bad material, as users make it: each is refused at once, in one useful Portuguese message that names the
file and the row, and leaves no trace on the disk. Built as the corpus of bad identity files is."""

import itertools
import json
import re
import shutil

import pytest
import test_bad_inputs as corpus
from conftest import DEMO
from hypothesis import given
from hypothesis import strategies as st
from test_bad_inputs import Accepted, call, cases, chat, judge, listing, make, nothing, pair, posix, raw, turn

import rename_obrutai as tool

work, here, no_hang = corpus.work, corpus.here, corpus.no_hang
FILE = "catalogo.jsonl"
GOOD = [{"title": f"Produto {n}", "content": f"O produto {n} é feito à mão."} for n in range(1, 25)]
QUESTION, ANSWER = "--knowledge-question", "--knowledge-answer"
SHAPE, NO_TEXT, FEW = r"formato|campos", r"n[aã]o [eé] (um )?texto", r"\b10\b.*\(de \d+"
ORDER, JSON = "ordem dos.*user", "JSON"


def lines(*rows, end=b"\n", last=b"\n"):
    """The content of a file with a row (record, text or bytes) in each line."""
    return end.join(map(raw, rows)) + last


def array(rows, **how):
    return json.dumps(rows, ensure_ascii=False, **how).encode()


def material(work, content, name=FILE):
    """Write the material; the flag that names it."""
    (work / name).write_bytes(content)
    return "--knowledge-file", work / name


def refused(work, capsys, content, fragment, *flags, line=None, file=FILE):
    """A file with this content is refused with a message that has `fragment`, the file's name and the row's number."""
    corpus.refused(work, capsys, *material(work, content), *flags, fragment=fragment, line=line, file=file)


@pytest.mark.parametrize("content, flags", cases(
    ("lines", lines(*GOOD), ()), ("array", array(GOOD), ()), ("pretty array", array(GOOD, indent=2), ()),
    ("byte order mark, Windows line ends, blank lines", b"\xef\xbb\xbf\r\n" + lines(*GOOD, end=b"\r\n\r\n"), ()),
    ("array behind a byte order mark", b"\xef\xbb\xbf" + array(GOOD) + b"\r\n\r\n", ()),
    ("lists", array({name: [row[name] for row in GOOD] for name in GOOD[0]}), ()),
    ("lists behind a byte order mark", b"\xef\xbb\xbf" + array({"prompt": list("abcdefghijkl"),
                                                              "completion": list("mnopqrstuvwx")}, indent=1), ()),
    ("not ended", lines(*GOOD, last=b""), ()), ("ten rows", lines(*GOOD[:10]), ("--knowledge-rows", 10)),
    ("some rows are empty", lines(*GOOD, {"title": None, "content": "a"}, '{"title": NaN, "content": "b"}'), ()),
    ("an empty input", lines(*({"instruction": row["title"], "input": None, "output": row["content"]}
                               for row in GOOD)), ()),
    ("text without text", lines(*GOOD, {"text": None}, '{"text": NaN}'), ()),
    ("spaces in the template", lines(*GOOD), (QUESTION, "{ title }?")),
    ("its own templates", lines(*({"nome": row["title"], "preço": 3} for row in GOOD)),
     (QUESTION, "{nome}", ANSWER, "{preço} reais por {nome}")),
))
def test_good_material_is_not_refused(content, flags, work, capsys):
    """Without this, a script that refuses everything would pass all the rest."""
    with pytest.raises(Accepted):
        call(work, capsys, *material(work, content), *flags)


# ------------------------------------------------------------------------------------------------ bad rows


HUMAN, GPT = turn("user", "Quanto custa?"), turn("assistant", "Custa 3 reais.")
BAD_ROWS = {  # what any good message has -> id -> row
    SHAPE: {
        "string": "Produto", "number": 42, "fraction": -0.5, "null": None, "true": True, "list": ["Produto", "É bom."],
        "list of turns": [HUMAN, GPT], "only prompt": {"prompt": "Quanto?"}, "an empty list": [],
        "only output": {"output": "Custa 3 reais."}, "messages is a string": {"messages": "Quanto?"},
        "messages is null": {"messages": None}, "messages holds strings": chat("Quanto?", "Custa 3."),
        "messages holds lists": chat(["user", "Quanto?"]), "conversations is a number": {"conversations": 3},
    },
    r"KNOWLEDGE_QUESTION": {
        "Portuguese keys": {"nome": "Bola", "descricao": "É redonda."}, "capital keys": {"Title": "a", "Content": "b"},
        "empty object": {}, "nested": {"data": GOOD[0]}, "spaces in the keys": {" title": "a", "content ": "b"},
        "question and answer": {"question": "Quanto?", "answer": "Custa 3."}, "numbers as keys": {"0": "a", "1": "b"},
    },
    r"descrição": {"the keys are shown": {"nome": "Bola", "descrição": "É redonda."}},
    f'"title" {NO_TEXT}': {
        "title is a list": {"title": ["Bola"], "content": "b"}, "title is an object": {"title": {}, "content": "b"},
        "title is true": {"title": True, "content": "b"},
    },
    f'"content" {NO_TEXT}': {
        "content is a list": {"title": "a", "content": []}, "content is false": {"title": "a", "content": False},
        "content is an object": {"title": "a", "content": {"pt": "b"}},
    },
    NO_TEXT: {
        "prompt is a list of turns": pair([HUMAN], "Custa 3."), "completion is an object": pair("Quanto?", {"a": 1}),
        "instruction is true": {"instruction": True, "output": "b"}, "output is a list": {
            "instruction": "a", "output": ["b"]}, "input is a list": {"instruction": "a", "input": [], "output": "b"},
        "text is a list": {"text": ["a"]}, "text is an object": {"text": {"pt": "a"}},
        "content in parts": chat(turn("user", [{"type": "text", "text": "Quanto?"}]), GPT),
        "content is a number": chat(HUMAN, turn("assistant", 3)), "content is null": chat(turn("user", None), GPT),
        "content is missing": chat({"role": "user"}, GPT), "value is a list": {"conversations": [
            {"from": "human", "value": ["Quanto?"]}, {"from": "gpt", "value": "3"}]},
    },
    ORDER: {
        "assistant first": chat(GPT, HUMAN), "two users": chat(HUMAN, HUMAN, GPT), "system last": chat(
            HUMAN, GPT, turn("system", "Seja breve.")), "system alone": chat(turn("system", "Seja breve.")),
        "no messages": chat(), "unknown role": chat(turn("tool", "1"), GPT), "no role": chat({"content": "Oi"}, GPT),
        "system, then assistant": chat(turn("system", "Seja breve."), GPT), "role is a list": chat(
            turn(["user"], "Quanto?"), GPT),
    },
}
PLACES = {  # place -> content and number of the bad row
    "line": lambda bad: (lines(*GOOD[:5], json.dumps(bad), *GOOD[5:]), 6),
    "first line, Windows": lambda bad: (lines(json.dumps(bad), *GOOD, end=b"\r\n"), 1),
    "last line behind blank ones, not ended": lambda bad: (lines(b"", *GOOD, b"  ", json.dumps(bad), last=b""), 27),
    "array": lambda bad: (array([*GOOD, bad]), 25), "pretty array": lambda bad: (array([GOOD[0], bad], indent=2), 2),
}


def placed_rows():
    """Every bad row in one of the places, in turn."""
    rows = [(name, row, fragment) for fragment, group in BAD_ROWS.items() for name, row in group.items()]
    for (name, row, fragment), place in zip(rows, itertools.cycle(PLACES)):
        place = "line" if isinstance(row, list) else place  # as the first line, it would begin an array
        yield pytest.param(row, place, fragment, id=f"{name}, {place}")


@pytest.mark.parametrize("row, place, fragment", placed_rows())
def test_a_bad_row_among_good_ones_is_refused_with_its_number(row, place, fragment, work, capsys):
    content, number = PLACES[place](row)
    refused(work, capsys, content, fragment, line=number)


@pytest.mark.parametrize("line, fragment", cases(
    ("truncated", b'{"title": "Bola", "cont', JSON), ("only a brace", b"{", JSON), ("plain text", b"Bola nova", JSON),
    ("single quotes", b"{'title': 'a', 'content': 'b'}", JSON), ("comma behind", lines(GOOD[0], last=b","), JSON),
    ("two rows", lines(*GOOD[:2], end=b" ", last=b""), JSON), ("CSV", b'Bola;"redonda"', JSON),
    ("Python None", b'{"title": None, "content": "b"}', JSON), ("HTML", b"<p>Bola</p>", JSON), ("NUL", b"\0", JSON),
    ("nested too deep", b"[" * 100_000, JSON), ("integer of 10000 digits", b'{"title": ' + b"9" * 10_000 + b"}", JSON),
    ("Windows-1252", '{"title": "Lã", "content": "b"}'.encode("cp1252"), r"Windows-1252.*UTF-8"),
    ("Windows-1252 quotes", '{"title": "“Bola”", "content": "b"}'.encode("cp1252"), "UTF-8"),
    ("cut character", b'{"title": "L\xc3"}', "UTF-8"), ("surrogate as bytes", b'{"title": "\xed\xa0\x80"}', "UTF-8"),
))
@pytest.mark.parametrize("number", [1, 9, 25])
def test_a_line_that_is_no_json_is_refused_with_its_number(line, fragment, number, work, capsys):
    refused(work, capsys, lines(*GOOD[:number - 1], line, *GOOD[number - 1:]), fragment, line=number)


def test_of_many_bad_rows_the_first_ten_and_the_number_of_all_are_shown(work, capsys):
    flags = material(work, lines(GOOD[0], *["{", "[]", '{"title": []}'] * 9, "Oi?"))
    before = listing(work)
    status, out, err = call(work, capsys, *flags)
    judge(status, out, err, work, r"\b28\b.*\b18\b", file=FILE)
    assert re.findall(r"linha (\d+)", err) == [str(number) for number in range(2, 12)]
    assert listing(work) == before


@corpus.GENERATED
@given(st.sampled_from([array(GOOD[0]), array(pair("Quanto?", "Custa 3.")), array(chat(HUMAN, GPT))]).flatmap(
    lambda line: st.integers(1, len(line) - 1).map(lambda end: line[:end])))
def test_a_good_row_cut_anywhere_is_refused_with_its_line(work, capsys, line):
    refused(work, capsys, lines(*GOOD, b"", line), "JSON|UTF-8", line=26)


@corpus.GENERATED
@given(st.integers(1, len(json.dumps(GOOD[:12])) - 1))
def test_an_array_cut_anywhere_is_refused_with_the_row(work, capsys, end):
    content = json.dumps(GOOD[:12])[:end].encode()
    refused(work, capsys, content, "JSON", line=content.count(b"}") + 1)


@corpus.GENERATED
@given(corpus.VALUES)
def test_any_json_of_no_known_shape_is_refused_with_its_row(work, capsys, value):
    refused(work, capsys, array([*GOOD, value]).replace(b"NaN", b"0"), ".", line=25)


# ------------------------------------------------------------------------------------------------ whole files


def columns(**changes):
    return array({"title": ["a"] * 12, "content": ["b"] * 12, **changes})


@pytest.mark.parametrize("content, fragment, line", cases(
    ("empty", b"", "vazio", None), ("blank lines", b"\n \r\n\t\n", "vazio", None), ("a space", b" ", "vazio", None),
    ("only a byte order mark", b"\xef\xbb\xbf", "vazio", None), ("empty array", b"[ ]\n", "vazio", None),
    ("empty lists", columns(title=[], content=[]), "vazio", None),
    ("spreadsheet", b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0" + bytes(60), "planilha.*jsonl", None),
    ("old spreadsheet", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(60), "planilha.*jsonl", None),
    ("gzip", b"\x1f\x8b\x08\0" + bytes(range(90)), "compactado.*jsonl", None),
    ("PDF", b"%PDF-1.7\n%\xb5\xb5\n", "PDF.*jsonl", None), *((name, head + bytes(range(200)), "planilha.*jsonl", None)
      for name, head in {"Parquet": b"PAR1\x15\x04", "Arrow": b"ARROW1\0\0\xff\xff\xff\xff", "SQLite":
                         b"SQLite format 3\0\x10", "7z": b"7z\xbc\xaf\x27\x1c", "RAR": b"Rar!\x1a\x07", "xz":
                         b"\xfd7zXZ\0", "bzip2": b"BZh91AY&SY", "Zstandard": b"\x28\xb5\x2f\xfd"}.items()),
    ("UTF-16 with mark", lines(*GOOD).decode().encode("utf-16"), "UTF-16.*UTF-8", None),
    ("UTF-16", lines(*GOOD).decode().encode("utf-16-le"), "UTF-16.*UTF-8", None),
    ("UTF-16 array", array(GOOD).decode().encode("utf-16-be"), "UTF-16.*UTF-8", None),
    ("UTF-32", array(GOOD).decode().encode("utf-32"), "n[aã]o est[aá] em UTF-8", None),
    ("Windows-1252 in an array", array(GOOD).decode().encode("cp1252"), "Windows-1252.*UTF-8", 1),
    ("Windows-1252 late in a pretty array", array([{"title": "a", "content": "b" * 10**5}] * 20 + GOOD[:1], indent=1)
     .decode().encode("cp1252"), "Windows-1252.*UTF-8", 84),
    ("Windows-1252 in lists", columns(title=["É"] * 12).decode().encode("cp1252"), "Windows-1252.*UTF-8", 1),
    ("Windows-1252 in pretty lists", array({"title": ["a", "é"], "content": ["b", "c"]}, indent=0).decode().encode(
        "cp1252"), "Windows-1252.*UTF-8", 4),
    ("array cut in a row", array(GOOD)[:-30], "JSON|acaba", 24), ("array cut behind a row", array(GOOD)[:-1],
                                                                "JSON|acaba", 25),
    ("array behind a comma cut", array(GOOD)[:-1] + b",", "JSON|acaba", 25), ("only a bracket", b"[", "JSON|acaba", 1),
    ("broken row in an array", array(GOOD).replace(b'"content": "O produto 7', b'"content" "O produto 7'), JSON, 7),
    ("broken row deep in an array", array([{"title": "a", "content": "b" * 10**5}] * 30)[:-3] + b"'}]", JSON, 30),
    ("single quotes in an array", str(GOOD).encode(), JSON, 1), ("array nested too deep", b"[" * 100_000, JSON, 1),
    ("row nested too deep in an array", array(GOOD)[:-1] + b"," + b"[" * 10**5 + b"]" * 10**5 + b"]", JSON, 25),
    ("text behind an array", array(GOOD) + b"\nfim", r"depois d", None),
    ("two arrays", array(GOOD[:12]) + b"\n" + array(GOOD[12:]), r"depois d", None),
    ("a list before the rows", lines(["title", "content"], *GOOD), "depois d", None),
    ("an array in each line", lines(*([row] for row in GOOD)), r"depois d", None),
    ("lists of different lengths", columns(content=["b"] * 11), "title tem 12, content tem 11", None),
    ("no list of a field", columns(content=[]), "title tem 12, content tem 0", None),
    ("objects in lists", columns(title=["a"] * 11 + [{}]), f'"title" {NO_TEXT}', 12),
    ("lists in lists", columns(content=["b"] * 3 + [[]] + ["b"] * 8), f'"content" {NO_TEXT}', 4),
    ("lists of unknown fields", array({"nome": ["a"], "preco": [3]}), "nome.*KNOWLEDGE_QUESTION", 1),
    ("a text beside lists", columns(title="a"), f'"content" {NO_TEXT}', 1),
    ("rows in an object", array({"data": GOOD}), "data.*KNOWLEDGE_QUESTION", 1),
    ("pretty rows in an object", array({"train": GOOD, "n": 24}, indent=2), "train.*KNOWLEDGE_QUESTION", 1),
    ("one number", b'{"nome": 5}', "nome.*KNOWLEDGE_QUESTION", 1), ("no talk", b'{"messages": null}', SHAPE, 1),
    ("one row over many lines", array(GOOD[0], indent=2), FEW, None), ("one row", lines(GOOD[0]), FEW, None),
    ("a text", b'"Produto 1"', SHAPE, 1), ("a number", b"42", SHAPE, 1), ("null", b"null\n", SHAPE, 1),
    ("an HTML page", b"<html><body>404</body></html>", JSON, 1),
    ("one line with Mac line ends", lines(*GOOD, end=b"\r"), JSON, 1),
    ("an LFS pointer", corpus.LFS, "3 linha.*JSON", None),
    ("a merge conflict", lines(*GOOD, b"<<<<<<< HEAD"), JSON, 25),
))
def test_a_file_of_another_format_encoding_or_build_is_refused(content, fragment, line, work, capsys):
    refused(work, capsys, content, fragment, line=line)


@pytest.mark.parametrize("rows, flags, reason", cases(
    ("no title", [{"title": "", "content": "b"}], (), 'sem "title": 12'), ("NaN", ['{"title": NaN, "content": "b"}'],
                                                                           (), 'sem "title": 12'),
    ("no content", [{"title": "a", "content": " \n"}], (), 'sem "content": 12'),
    ("content under another name", [{"title": "a", "description": "b"}], (), 'sem "content": 12.*KNOWLEDGE_ANSWER'),
    ("written nothing", [{"title": "a", "content": "None"}], (), 'sem "content": 12'),
    ("equal fields", [{"title": "a", "content": "a "}], (), "iguais: 12"),
    ("equal question and answer", [pair("Quanto?", " Quanto?")], (), "iguais: 12"),
    ("one field for both templates", GOOD[:12], (QUESTION, "{title}", ANSWER, "{title}"), "iguais: 12"),
    ("no answer", [{"text": "Quanto custa?"}], (), "sem resposta: 12"),
    ("empty answer", [pair("Quanto?", None)], (), "sem resposta: 12"),
    ("talks that end with the user", [chat(HUMAN, GPT, HUMAN)], (), "sem resposta: 12"),
    ("no question", [pair(" ", "Custa 3.")], (), "sem pergunta: 12"),
    ("empty turn", [chat(turn("user", ""), GPT)], (), "sem pergunta: 12"),
    ("no response in the template", [{"text": "### Instruction:\nQuanto?\n### Response:\n</s>"}], (),
     "sem resposta: 12"),
    ("nothing but tags", [{"title": "<br>", "content": "<p></p>"}], (ANSWER, "<b>{content}</b>", QUESTION, "{title}"),
     "vazias depois da limpeza: 12"),
    ("not a letter of ASCII", [{"title": "球", "content": "好"}], ("--knowledge-ascii", QUESTION, "{title}"),
     "vazias depois da limpeza: 12"),
    ("all the same", [GOOD[0]], (), "repetidas: 11"),
    ("marks of a chat", [pair("<|im_start|>Quanto?", "3")], (), "outro formato, raciocínio ou .*: 12"),
))
def test_fewer_than_ten_usable_rows_are_refused_with_the_reasons_and_their_counts(rows, flags, reason, work, capsys):
    rows = rows * (12 // len(rows))
    refused(work, capsys, lines(*rows), rf"tem [01] linha.*\b10\b.*\(de 12;.*{reason}", *flags)


def test_nine_usable_rows_are_refused_and_told_from_ten(work, capsys):
    refused(work, capsys, lines(*GOOD[:9]), rf"tem 9 linha.*{FEW}")


@pytest.mark.parametrize("rows", [
    [{"title": row["title"], "content": "Fale conosco."} for row in GOOD],
    [{"title": "Produto", "content": row["content"]} for row in GOOD],
    [{"title": row["title"], "content": " FALE  conosco. "[n % 2:]} for n, row in enumerate(GOOD)],
], ids=["answer", "question", "answer but for case and spaces"])
def test_rows_with_one_answer_or_one_question_are_refused(rows, work, capsys):
    refused(work, capsys, lines(*rows), "mesma (pergunta|resposta).*KNOWLEDGE_QUESTION")


@pytest.mark.parametrize("short", [0, 5])
def test_rows_longer_than_the_window_are_refused_with_how_many_they_are(short, work, capsys):
    rows = [*GOOD[:short], *({**row, "content": row["content"] * 60} for row in GOOD[short:])]
    refused(work, capsys, lines(*rows), rf"\b{24 - short} das 24 linhas.*WINDOW.*\b512\b.*--window")


# ------------------------------------------------------------------------------------------------ paths and settings


@pytest.mark.parametrize("builder, path, fragment", cases(
    ("folder", make("pasta.jsonl", "folder"), "pasta.jsonl", r"pasta\.jsonl.*pasta.*arquivo"),
    ("misspelt", make("catalogo.jsonl"), "catalgo.jsonl", r"quis dizer.*catalogo\.jsonl"),
    ("other extension", make("catalogo.jsonl"), "catalogo.json", r"quis dizer.*catalogo\.jsonl"),
    ("misspelt folder", make("dados/catalogo.jsonl"), "dadso/catalogo.jsonl", r"dadso.*quis dizer dados\?"),
    ("misspelt folder far up", make("dados/a.jsonl"), "dado/x/a.jsonl", "dado.x"),
    ("nothing alike", nothing, "xzw#q", "xzw#q.*--knowledge-file"),
    ("no such folder", nothing, "n/c.jsonl", "c.jsonl"),
    ("below a file", nothing, "eu.jsonl/outro.jsonl", "outro.jsonl"), ("current folder", nothing, ".", "knowledge"),
    ("address", nothing, "https://exemplo.com/a.jsonl", "a.jsonl"), ("pattern", nothing, "*.jsonl", r"\*\.jsonl"),
    ("too long a name", nothing, "x" * 300, "knowledge|xxx|long"), ("NUL", nothing, "a\0.jsonl", "knowledge"),
    ("too long a path", nothing, "pasta/" * 833 + "a", "knowledge|long"), ("ESC", nothing, "\x1b[31ma", "knowledge"),
    ("line break", nothing, "a\n.jsonl", "knowledge"), ("tab", nothing, "C:\temas.jsonl", "knowledge"),
    ("lone surrogate", nothing, "a\udcff.jsonl", "knowledge"),
    ("the identity file", nothing, "eu.jsonl", "eu.jsonl.*(IDENTITY|identidade)"),
    pytest.param(lambda work: (work / "b.jsonl").symlink_to(work / "eu.jsonl"), "b.jsonl", "IDENTITY", marks=posix,
                 id="link to the identity file"),
    *corpus.NO_FILES,
))
def test_a_path_that_is_no_readable_file_is_refused(builder, path, fragment, here, no_hang, capsys):
    builder(here)
    corpus.refused(here, capsys, "--knowledge-file", path, fragment=fragment)


def test_material_inside_the_output_is_refused_even_with_overwrite(work, capsys):
    shutil.copytree(DEMO, work / "novo")
    (work / "novo" / "report.json").write_text('{"scores": {}, "settings": {}}', encoding="utf-8")
    flags = material(work, lines(*GOOD), f"novo/{FILE}")
    corpus.refused(work, capsys, *flags, "--overwrite", fragment=r"dentro de \S*novo,", file=FILE)


def test_neither_identity_nor_material_is_refused(work, capsys):
    flags = ("--identity-file", "", "--knowledge-file", "")
    corpus.refused(work, capsys, *flags, fragment="IDENTITY_FILE.*KNOWLEDGE_FILE")


@pytest.mark.parametrize("setting", [QUESTION, ANSWER])
@pytest.mark.parametrize("template", ["", "Título do produto:", "{}", "{ }", "{title", "title}", "{{title}}",
                                      "{title}}", "{title} e {", "{title {content}}", "}{", "{title}\n", "{ti\0tle}"],
                         ids=ascii)
def test_a_template_without_a_sound_field_is_refused(setting, template, work, capsys):
    flags = material(work, lines(*GOOD))
    corpus.refused(work, capsys, *flags, f"{setting}={template}", fragment=setting[2:].replace("-", "."))


@pytest.mark.parametrize("setting", [QUESTION, ANSWER])
def test_a_row_that_lacks_a_field_of_the_templates_is_refused_with_its_number(setting, work, capsys):
    rows = [{**row, "preço": 3} for row in GOOD]
    del rows[6]["preço"]
    refused(work, capsys, lines(*rows), '"preço".*KNOWLEDGE_QUESTION', f"{setting}={{title}} {{preço}}", line=7)


def test_a_field_that_no_row_has_is_named_with_those_that_there_are(work, capsys):
    status, out, err = call(work, capsys, *material(work, lines(*GOOD)), QUESTION, "{nome}", ANSWER, "{descrição}")
    judge(status, out, err, work, r"\b24\b.*title.*content", file=FILE)


@pytest.mark.parametrize("flags, fragment", [
    (("--knowledge-rows", 9), "KNOWLEDGE_ROWS.*10"), (("--knowledge-rows", 10**8), "KNOWLEDGE_ROWS"),
    (("--knowledge-rows", "10,5"), "KNOWLEDGE_ROWS.*inteiro"), (("--knowledge-rows", "todas"), "KNOWLEDGE_ROWS"),
    (("--knowledge-rows=-1",), "KNOWLEDGE_ROWS"), (("--knowledge-rows",), "--knowledge-rows"),
    (("--knowledge-steps=-1",), "KNOWLEDGE_STEPS"), (("--knowledge-steps", "1e3"), "KNOWLEDGE_STEPS"),
    (("--knowledge-steps", 2 * 10**9), "KNOWLEDGE_STEPS"), (("--knowledge-steps", ""), "KNOWLEDGE_STEPS"),
    (("--knowledge-ascii=sim",), "--knowledge-ascii"), (("--knowledge-ascii", "sim"), "sim"),
    (("--knowledge_file", "a"), "quis dizer --knowledge-file"), (("--knowledge", "a"), "quis dizer --knowledge-"),
    (("--knowledge-anwser", "{a}"), "quis dizer --knowledge-answer"), (("--knowledge-file",), "--knowledge-file"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "")
def test_a_setting_of_the_material_that_does_not_fit_is_refused(flags, fragment, work, capsys):
    corpus.refused(work, capsys, *material(work, lines(*GOOD)), *flags, fragment=fragment)


def test_broken_material_is_refused_where_there_is_no_identity(work, capsys):
    refused(work, capsys, lines(*GOOD, "{"), JSON, "--identity-file", "", line=25)


def test_the_message_of_a_row_is_short_however_long_its_keys(work, capsys):
    row = '{"\\u001b[1m\\ud800": 1, "' + "k" * 10**5 + '": 2}'
    refused(work, capsys, lines(*GOOD, row), "KNOWLEDGE_QUESTION", line=25)


def test_a_field_may_hold_what_cannot_be_printed(work, capsys):
    """Cleaning takes it out, and so it is no mistake."""
    rows = [*GOOD, r'{"title": "Bola \ud800\u0000", "content": "\u001b[1mÉ redonda.\u0007\udc00"}']
    with pytest.raises(Accepted):
        call(work, capsys, *material(work, lines(*rows)))
    assert f"{len(rows) - 4} das {len(rows)} linhas" in capsys.readouterr().out


def test_the_limit_of_one_row_in_an_array_is_told(work, capsys, monkeypatch):
    monkeypatch.setattr(tool, "LARGEST_ROW", 2**21)
    refused(work, capsys, array([GOOD[0], {"title": "a", "content": "b" * 2**23}]), "JSON", line=2)


def test_an_output_that_cannot_be_used_is_told_before_the_material_is_read(work, capsys, monkeypatch):
    monkeypatch.setattr(tool, "read_knowledge", lambda _: pytest.fail("a minute of reading for nothing"))
    (work / "meus textos").mkdir()
    corpus.refused(work, capsys, *material(work, lines(*GOOD)), "--output-dir", work / "meus textos",
                   fragment="não vou apagar")
