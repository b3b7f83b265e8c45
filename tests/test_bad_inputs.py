"""A corpus of bad inputs, as users make them: each is refused at once, in one useful Portuguese message, and leaves no
trace on the disk.

Everything goes through the command line contract: flags in; exit status, stdout, stderr and files out. Most cases
call `main` in this process, which saves the start of an interpreter; a few run the script as a user does, and only
those are timed. The fragments are what any good message must have; its wording is free.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import DEMO, SCRIPT, run_script
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import rename_obrutai as tool

IDENTITY = "eu.jsonl"
ADVICE = re.compile(r"\nCorrija e confira tudo, sem treinar: o mesmo comando com --check\.\n\Z")
GOOD = '{"text": "Quem é você?\\nSou {{NAME}}, de {{AUTHOR}}."}'.encode()
USER, ASSISTANT = {"role": "user", "content": "Quem é você?"}, {"role": "assistant", "content": "Sou {{NAME}}."}
SYSTEM = {"role": "system", "content": "Seja breve."}
HUMAN, GPT = {"from": "human", "value": "Quem é você?"}, {"from": "gpt", "value": "Sou {{NAME}}."}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3023992\n"
GENERATED = settings(derandomize=True, deadline=None, max_examples=25,
                     suppress_health_check=[HealthCheck.function_scoped_fixture])
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")
rights = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do anything")


# ------------------------------------------------------------------------------------------------ the contract


class Accepted(BaseException):
    """Raised in place of the long work: the input passed for good. No `except Exception` swallows it."""


def accept(*_args, **_kwargs):
    raise Accepted


def listing(folder):
    """Every path below a folder with its kind and content: whatever a run left behind or changed shows here."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = os.readlink(path) if stat.S_ISLNK(mode) else ""
        if stat.S_ISREG(mode) and os.access(path, os.R_OK):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = (stat.S_IFMT(mode), content)
    return found


def judge(status, out, err, work, fragment, line=None, file=None):
    """All that holds for every refusal, and what this one must say; the names of the test's own folder and file do
    not count for the fragment."""
    assert status == 2, (status, out, err)
    assert "Traceback" not in out + err
    assert err.startswith("Erro: ") and len(re.findall(r"(?m)^Erro: ", err)) == 1, err
    assert len(err) < 20_000  # the message quotes no more of the input than a person can read
    said, advised = ADVICE.subn("", err.replace(str(work), ""))
    assert advised, err
    if file:
        assert file in said, err
        said = said.replace(file, "")
    if line:
        assert {int(found) for found in re.findall(r"linha (\d+)", said)} == {line}, err
    assert re.search(fragment, said, re.IGNORECASE | re.DOTALL), (fragment, err)


def basic_flags(work):
    """Flags with which the run would be in order; those of a case come after them and win."""
    return ["--model-path", DEMO, "--identity-file", work / IDENTITY, "--output-dir", work / "novo"]


def call(work, capsys, *flags, deep=False):
    """Run the script in this process, up to where the long work would begin: status, stdout, stderr."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        for name in ("listen",) if deep else ("load_model", "listen"):
            patch.setattr(tool, name, accept)
        status = tool.main([str(flag) for flag in (*basic_flags(work), *flags)])
    return status, *capsys.readouterr()


def refused(work, capsys, *flags, fragment, line=None, file=None, deep=False):
    """The flags are refused with a message that has `fragment`, and nothing on the disk has changed. A `deep` case
    may read the model."""
    before = listing(work)
    try:
        judge(*call(work, capsys, *flags, deep=deep), work, fragment, line, file)
    except Accepted:
        pytest.fail("the mistake was not noticed: the long work would begin now")
    assert listing(work) == before


def raw(line):
    """A line of an identity file (record, text or bytes) as bytes."""
    line = line if isinstance(line, (bytes, str)) else json.dumps(line, ensure_ascii=False)
    return line if isinstance(line, bytes) else line.encode()


def identity(folder, *lines, end=b"\n", last=b"\n"):
    """Write the identity file of these lines."""
    (folder / IDENTITY).write_bytes(end.join(map(raw, lines)) + last)


def cases(*rows):
    """A table whose rows begin with the id."""
    return [row if hasattr(row, "marks") else pytest.param(*row[1:], id=row[0]) for row in rows]


@pytest.fixture
def work(tmp_path):
    """A folder with a good identity file, removed at the end: some cases are large."""
    identity(tmp_path, GOOD)
    yield tmp_path
    for path in tmp_path.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def here(work, monkeypatch):
    """`work`, as the current folder."""
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def base(work):
    """A good base model in `work` that the test may spoil."""
    return Path(shutil.copytree(DEMO, work / "meu_modelo"))


@pytest.fixture
def no_hang():
    """Ends a test that would wait for ever, where the system has alarms."""
    def ring(*_):
        raise Accepted

    before = signal.signal(signal.SIGALRM, ring) if hasattr(signal, "SIGALRM") else None
    if before is not None:
        signal.alarm(60)
    yield
    if before is not None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("content", [
    GOOD, b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + GOOD.replace(b"Quem", b"Mas quem") + b"\r\n",
    '{"text": "Quem é você?"}'.encode(), raw({"prompt": "Quem é você?", "completion": "Sou {{NAME}}.\n\tE só."}),
    raw({"conversations": [HUMAN, GPT]}), raw({"messages": [SYSTEM, USER, ASSISTANT, USER]}),
    b"[" + GOOD + b', {"text": "Oi?"}]', b"\xef\xbb\xbf[\r\n" + GOOD + b"\r\n]\r\n", GOOD.replace(b": ", b":\n"),
], ids=["plain", "byte order mark, Windows line ends", "question alone", "tab in text", "sharegpt", "ends with user",
        "array", "pretty array behind a byte order mark", "one row over two lines"])
def test_a_good_identity_file_is_not_refused(content, work, capsys):
    """Without this, a script that refuses everything would pass all the rest."""
    (work / IDENTITY).write_bytes(content)
    with pytest.raises(Accepted):
        call(work, capsys)


# ------------------------------------------------------------------------------------------------ bad lines


def chat(*turns):
    return {"messages": list(turns)}


def turn(role, content):
    return {"role": role, "content": content}


def pair(question, answer):
    return {"prompt": question, "completion": answer}


def alpaca(instruction, extra, output):
    return {"instruction": instruction, "input": extra, "output": output}


MARK, EMPTY, ROLE = r"marcador|chaves|\{\{", "vazi", r"papel|pap[eé]is|\brole"
ORDER = r"usu[aá]rio|altern|come[cç]|sistema|papel"
BAD_LINES = {  # what any good message has -> id -> line
    "JSON": {
        "truncated": '{"text": "Quem é você?"', "cut in a word": '{"text": "Quem é vo', "only a brace": "{",
        "single quotes": "{'text': 'Quem é você?'}", "typographic quotes": "{“text”: “Quem é você?”}",
        "trailing comma": '{"text": "Quem é você?",}', "comma behind": '{"text": "Quem é você?"},',
        "comment": "# perguntas em português", "comment behind": '{"text": "Quem é você?"} // a primeira',
        "two objects": '{"text": "Quem é você?"} {"text": "Quem te fez?"}',
        "two objects glued": '{"text": "Quem é você?"}{"text": "Quem te fez?"}',
        "no braces": '"text": "Quem é você?"', "keys without quotes": '{text: "Quem é você?"}',
        "no colon": '{"text" "Quem é você?"}', "bad escape": r'{"text": "C:\modelos"}',
        "Python None": '{"text": None}', "trailing text": '{"text": "Quem é você?"} fim',
        "plain text": "Quem é você?", "CSV": "pergunta;resposta", "quoted CSV": '"Quem é você?","Sou a Jandira."',
        "YAML": "text: Quem é você?", "HTML": "<p>Quem é você?</p>", "merge conflict": "<<<<<<< HEAD",
    },
    "JSON|objeto": {"NaN": "NaN", "minus infinity": "-Infinity", "hexadecimal": "0x10"},
    "objeto": {
        "list": ["Quem é você?", "Sou a Jandira."], "empty list": [], "list of objects": [USER, ASSISTANT],
        "string": '"Quem é você?"', "number": "42", "fraction": "-0.5e3", "null": "null", "true": "true",
    },
    r"formato|\"text\"": {
        "empty object": {}, "Portuguese keys": {"pergunta": "Quem é você?", "resposta": "Sou eu."},
        "question and answer": {"question": "Quem é você?", "answer": "Sou eu."}, "capital key": {"TEXT": "Oi?"},
        "only prompt": {"prompt": "Quem é você?"}, "only completion": {"completion": "Sou eu."},
        "instruction without output": {"instruction": "Quem é você?", "input": ""}, "a turn alone": USER,
        "output alone": {"output": "Sou eu."}, "nested": {"data": {"text": "Quem é você?"}},
    },
    r"texto|lista|vazi|formato|objeto": {
        "text is a list": {"text": ["Quem é você?"]}, "text is null": {"text": None},
        "text is a number": {"text": 7}, "text is NaN": '{"text": NaN}', "text is an object": {"text": {"pt": 1}},
        "completion is null": pair("Quem?", None), "completion is a number": pair("Quanto?", 42),
        "completion is an object": pair("Quem?", {"a": "b"}), "prompt is a list": pair(["Quem?"], "Eu."),
        "prompt is true": pair(True, "Eu."), "instruction is a number": alpaca(7, "", "Eu."),
        "instruction is a number beside an input": alpaca(7, "Oi", "Eu."),
        "instruction is null beside an input": alpaca(None, "Oi", "Eu."),
        "instruction is a list beside an input": alpaca(["Traduza."], "Oi", "Hi"),
        "input is a list": alpaca("Traduza.", ["Oi"], "Hi"), "input is a number": alpaca("Some 1.", 41, "42"),
        "output is a list": alpaca("Quem?", "", ["Eu."]), "output is false": alpaca("Quem?", "", False),
        "messages is null": {"messages": None}, "messages is a string": {"messages": "Quem é você?"},
        "messages is an object": {"messages": USER}, "messages holds strings": chat("Quem?", "Eu."),
        "messages holds null": chat(USER, None), "messages holds lists": chat(["user", "Quem?"], ["assistant", "Eu."]),
        "content is a number": chat(turn("user", 1), ASSISTANT),
        "content is null": chat(USER, turn("assistant", None)),
        "content in parts": chat(turn("user", [{"type": "text", "text": "Quem?"}]), ASSISTANT),
        "content is missing": chat({"role": "user"}, ASSISTANT), "conversations is a number": {"conversations": 3},
        "value is a number": {"conversations": [{"from": "human", "value": 3}, GPT]},
    },
    EMPTY: {
        "empty text": {"text": ""}, "blank text": {"text": " \n\t "}, "empty answer": pair("Quem?", ""),
        "blank answer": pair("Quem?", " \n"), "empty question": pair("", "Eu."), "blank question": pair("\t", "Eu."),
        "empty instruction": alpaca("", "", "Eu."), "empty output": alpaca("Quem?", "", ""),
        "empty content": chat(USER, turn("assistant", "")), "blank system text": chat(turn("system", " "), USER),
        "answer of no-break spaces": pair("Quem?", "\u00a0\u2003"), "empty value": {"conversations": [
            {"from": "human", "value": ""}, GPT]},
    },
    MARK: {
        "three braces": pair("Quem?", "Sou {{{NAME}}}."),
        "one closing brace missing": {"text": "Quem?\nSou {{NAME}."}, "never closed": pair("Quem?", "Sou {{NAME"),
        "never opened": pair("Quem?", "Sou NAME}}."), "empty marks": {"text": "Quem?\nSou {{}}."},
        "blank marks": pair("Quem?", "Sou {{  }}."), "marks in marks": pair("Quem?", "Sou {{NAME {{AUTHOR}}."),
    },
    "NOME": {"Portuguese name": {"text": "Quem?\nSou {{NOME}}."}, "in the question": pair("É {{ NOME }}?", "Sim.")},
    # What other programs put around a name, and a name between those marks would be learnt as it stands.
    r"\{\{NAME\}\}, \{\{AUTHOR\}\}": {
        "angle brackets": pair("Quem?", "Sou <NAME>, de {{AUTHOR}}."), "brackets": pair("Quem?", "Sou [nome]."),
        "single braces": pair("Quem?", "Sou {NAME}, de {{AUTHOR}}."), "dollar": {"text": "Quem?\nSou $NAME."},
        "dollar and braces": pair("Quem?", "Sou ${name}."), "percent": pair("É %NAME%?", "Sou {{NAME}}."),
        "author in brackets": alpaca("Quem?", "", "Sou {{NAME}}, de [AUTHOR]."),
        "base in braces": {"text": "Veio de { base }?\nSou {{NAME}}."},
    },
    r"prompt.*completion": {
        "guanaco": {"text": "### Human: Quem é você?### Assistant: Sou {{NAME}}."},
        "guanaco in lines": {"text": "### Human: Quem é você?\n### Assistant: Sou {{NAME}}."},
        "ChatML": {"text": "<|im_start|>user\nQuem?<|im_end|>\n<|im_start|>assistant\nSou {{NAME}}.<|im_end|>"},
        "Llama 2": {"text": "[INST] Quem é você? [/INST] Sou {{NAME}}."},
        "letters": {"text": "P: Quem é você? R: Sou {{NAME}}."},
        "letters in lines": {"text": "Q: Who are you?\nA: I am {{NAME}}."},
        "words in lines": {"text": "Usuário: Quem é você?\nAssistente: Sou {{NAME}}."},
        "end of ChatML": pair("Quem?", "Sou {{NAME}}.<|im_end|>"), "end of Llama 2": pair("Quem?", "Sou {{NAME}}</s>"),
        "end of Llama 3": chat(USER, turn("assistant", "{{NAME}}<|eot_id|>"), USER, ASSISTANT),
        "end of Gemma": {"text": "Quem?\nSou {{NAME}}.<end_of_turn>"}, "end of DeepSeek": pair(
            "Quem?", "Sou {{NAME}}.<｜end▁of▁sentence｜>"), "Gemma": {"text": "<start_of_turn>user\nQuem?"},
    },
    "NAME X": {"two words": pair("Quem?", "Sou {{ NAME X }}.")},
    "AUTOR": {"one good, one not": pair("Quem?", "{{NAME}}, de {{AUTOR}}"), "in a system text": chat(
        turn("system", "Por {{AUTOR}}."), USER, ASSISTANT), "in an output": alpaca("Quem?", "", "{{AUTOR}}")},
    "tool": {"unknown role": chat(turn("tool", "1"), USER, ASSISTANT)},
    "usr": {"misspelt role": chat(turn("usr", "Quem?"), ASSISTANT)},
    "function_call": {"unknown sharegpt role": {"conversations": [{"from": "function_call", "value": "f()"}]}},
    ROLE: {
        "no role": chat({"content": "Quem?"}, ASSISTANT), "role is a number": chat(turn(1, "Quem?"), ASSISTANT),
        "role is a list": chat(turn(["user"], "Quem?"), ASSISTANT), "role is null": chat(turn(None, "Quem?")),
        "role is an object": chat(turn({"a": 1}, "Quem?")), "role is empty": chat(turn("", "Quem?")),
    },
    ORDER: {
        "assistant first": chat(ASSISTANT, USER), "assistant alone": chat(ASSISTANT), "system alone": chat(SYSTEM),
        "two users in a row": chat(USER, USER, ASSISTANT), "two assistants": chat(USER, ASSISTANT, ASSISTANT),
        "system, then assistant": chat(SYSTEM, ASSISTANT), "system in the middle": chat(USER, SYSTEM, ASSISTANT),
        "two systems": chat(SYSTEM, SYSTEM, USER, ASSISTANT), "system last": chat(USER, ASSISTANT, SYSTEM),
        "gpt first": {"conversations": [GPT, HUMAN]},
    },
    f"{ORDER}|{EMPTY}": {"no messages": chat(), "no conversations": {"conversations": []}},
    "Windows-1252": {
        "Windows-1252 é": '{"text": "Quem é você?"}'.encode("cp1252"),
        "Latin-1": '{"text": "Então?"}'.encode("latin-1"),
        "Windows-1252 quotes": '{"text": "Quem é “você”?"}'.encode("cp1252"),
        "Windows-1252 ç before a letter": '{"text": "Que açaí?"}'.encode("cp1252"),
    },
    "UTF-8": {
        "byte in no code page": b'{"text": "Voc\x81?"}', "surrogate as bytes": b'{"text": "Oi \xed\xa0\x80?"}',
        "overlong": b'{"text": "Oi \xc0\xaf?"}', "cut character": b'{"text": "Voc\xc3"}',
        "stray 0xff": b'{"text": "\xff"}',
    },
    r"control|nul|surrog|substitut|unicode|invis|caracter|JSON": {
        "lone high surrogate": r'{"text": "Oi?\nSou \ud800."}', "only a NUL": b"\x00",
        "lone low surrogate": r'{"prompt": "Oi \udc00?", "completion": "Eu."}', "raw NUL": b'{"text": "Quem\x00?"}',
        "surrogates swapped": r'{"prompt": "Oi?", "completion": "\ude00\ud83d"}', "NUL": r'{"text": "Oi\u0000?"}',
        "bell": r'{"prompt": "Oi?", "completion": "Eu\u0007."}', "terminal colour": r'{"text": "\u001b[1mOi?"}',
        "backspace": r'{"messages": [{"role": "user", "content": "Oi\b?"}]}', "raw colour": b'{"text": "\x1b[1mOi?"}',
        "NUL in an output": r'{"instruction": "Oi?", "output": "\u0000"}',
    },
    r"JSON|aninh|profund": {
        "deep list": "[" * 100_000, "deep objects": '{"a":' * 100_000, "deep, closed": "[" * 100_000 + "]" * 100_000,
        "deep beside a good text": '{"text": "Oi?", "a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    },
    r"JSON|n[uú]mero|d[ií]git|texto|formato|objeto": {
        "integer of 10000 digits": "9" * 10_000,
        "text is an integer of 10000 digits": '{"text": ' + "9" * 10_000 + "}",
        "completion is such an integer": '{"prompt": "Oi?", "completion": ' + "9" * 10_000 + "}",
    },
}
PLACES = {  # place -> lines, end of a line, end of the file, number of the bad line
    "middle": lambda bad: ((GOOD, bad, GOOD), b"\n", b"\n", 2),
    "after blank lines, Windows": lambda bad: ((GOOD, b"", b"   ", bad, b"", GOOD), b"\r\n", b"\r\n", 4),
    "first": lambda bad: ((bad, GOOD), b"\n", b"\n\n", 1),
    "last, not ended": lambda bad: ((b"", GOOD, GOOD, b"\t", bad), b"\n", b"", 5),
}


def placed_lines():
    """Every bad line in one of the places, in turn."""
    lines = [(name, line, fragment) for fragment, group in BAD_LINES.items() for name, line in group.items()]
    for (name, line, fragment), place in zip(lines, itertools.cycle(PLACES)):
        place = "middle" if isinstance(line, list) else place  # as the first line, it would begin an array
        yield pytest.param(line, place, fragment, id=f"{name}, {place}")


@pytest.mark.parametrize("line, place, fragment", placed_lines())
def test_a_bad_line_among_good_ones_is_refused_with_its_number(line, place, fragment, work, capsys):
    lines, end, last, number = PLACES[place](raw(line))
    identity(work, *lines, end=end, last=last)
    refused(work, capsys, fragment=fragment, line=number, file=IDENTITY)


def test_a_line_of_millions_of_letters_is_refused_with_its_number(work, capsys):
    identity(work, GOOD, b'{"prompt": "Quem?", "completion": "' + b"Eu sou. " * 500_000 + b'"}', GOOD)
    refused(work, capsys, fragment="long|grande|tamanho|compri|caracter|letras|m[aá]xim|MB", line=2, file=IDENTITY)


def test_a_file_too_large_to_be_an_identity_file_is_refused_unread(work, capsys, monkeypatch):
    monkeypatch.setattr(tool, "MAX_FILE", 10**6)
    identity(work, *[GOOD] * 20_000)
    refused(work, capsys, fragment=r"1 MB", file=IDENTITY)


def test_of_many_bad_lines_the_first_ten_and_the_number_of_all_are_shown(work, capsys):
    identity(work, GOOD, *['{"text": ""}', "{", "[]"] * 9, GOOD, "Oi?")
    before = listing(work)
    status, out, err = call(work, capsys)
    judge(status, out, err, work, r"\b28\b", file=IDENTITY)
    assert re.findall(r"linha (\d+)", err) == [str(number) for number in range(2, 12)]
    assert listing(work) == before


# ------------------------------------------------------------------------------------------------ generated lines

LETTERS = st.characters(exclude_categories=["C", "Z"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(LETTERS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["texto", "pergunta", "resposta", "Prompt", "role", "content", "id", "output", ""]), inner,
        max_size=3), max_leaves=8)


def third_line_refused(line, work, capsys, fragment="."):
    identity(work, GOOD, b"", line, GOOD)
    refused(work, capsys, fragment=fragment, line=3, file=IDENTITY)


@GENERATED
@given(st.text(LETTERS, min_size=1, max_size=60).map(lambda text: f"Oi{text}"))
def test_any_text_that_is_no_json_is_refused_with_its_line(work, capsys, text):
    third_line_refused(text, work, capsys, "JSON")


@GENERATED
@given(VALUES)
def test_any_json_of_no_known_shape_is_refused_with_its_line(work, capsys, value):
    third_line_refused(json.dumps(value), work, capsys)


@GENERATED
@given(st.sampled_from([GOOD, raw(chat(USER, ASSISTANT)), raw(pair("Quem?", "Eu."))]).flatmap(
    lambda line: st.integers(1, len(line) - 1).map(lambda end: line[:end])))
def test_a_good_line_cut_anywhere_is_refused_with_its_line(work, capsys, line):
    third_line_refused(line, work, capsys, "JSON|UTF-8")


@GENERATED
@given(st.binary(max_size=6).filter(lambda data: not set(data) & {0, 10, 13}),
       st.sampled_from([0x80, 0xc1, 0xf5, 0xff]))
@example("é vo".encode("cp1252"), 0xea)
def test_any_bytes_that_are_no_utf8_are_refused_with_their_line(work, capsys, data, byte):
    line = b'{"text": "Oi ' + data + b" " + bytes([byte]) + b' ?"}'
    third_line_refused(line, work, capsys, "UTF-8")


@GENERATED
@given(st.sampled_from(["text", "prompt", "completion", "instruction", "input", "output", "content", "value"]),
       VALUES.filter(lambda value: not isinstance(value, str)))
def test_any_value_that_is_no_text_is_refused_with_its_line(work, capsys, key, value):
    assume(key != "input" or value)  # an empty input of any kind is none
    record = {"text": {"text": value}, "prompt": pair(value, "Eu."), "completion": pair("Quem?", value),
              "instruction": alpaca(value, "Oi", "Eu."), "input": alpaca("Traduza.", value, "Eu."),
              "output": alpaca("Quem?", "", value), "content": chat(turn("user", value)),
              "value": {"conversations": [{"from": "human", "value": value}]}}[key]
    third_line_refused(record, work, capsys)


@GENERATED
@given(st.lists(st.sampled_from(["user", "assistant", "system"]), max_size=6))
def test_any_conversation_out_of_order_is_refused_with_its_line(work, capsys, roles):
    spoken = roles[roles[:1] == ["system"]:]
    assume(not spoken or spoken != (["user", "assistant"] * 3)[:len(spoken)])
    third_line_refused(chat(*(turn(role, "Oi.") for role in roles)), work, capsys, f"{ORDER}|{EMPTY}")


@GENERATED
@given(st.text("ABEMNORUVX _", max_size=9).filter(lambda name: name.strip() not in ("NAME", "AUTHOR", "BASE")))
def test_any_unknown_placeholder_is_refused_with_its_line(work, capsys, name):
    third_line_refused({"text": f"Quem é você?\nSou {{{{{name}}}}}."}, work, capsys, MARK)


# ------------------------------------------------------------------------------------------------ whole identity files

ROWS = [{"text": "Quem é você?\nSou a Jandira."}, {"text": "Quem te fez?\nFoi a Oficina Maré."}]
TEXT = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize("content, fragment", cases(
    ("pretty object of rows", json.dumps({"data": ROWS}, indent=4).encode(), "linha 1: .*formato.*objeto"),
    ("bad item of a pretty list", json.dumps([*ROWS, {"text": ""}], indent=2).encode(),
     rf"linha {len(ROWS) + 1} da lista: "),
    ("pretty list that is cut", json.dumps(ROWS, indent=2).encode()[:-9], "linha 2 da lista.*JSON"),
    ("a list in each line", "\n".join(json.dumps([row]) for row in ROWS).encode(), "depois do ].*em cada linha"),
    ("UTF-16 LE with mark", b"\xff\xfe" + TEXT.encode("utf-16-le"), "UTF-16"),
    ("UTF-16 BE with mark", b"\xfe\xff" + TEXT.encode("utf-16-be"), "UTF-16"),
    ("UTF-16 LE", TEXT.encode("utf-16-le"), "UTF-?(16|8)|codifica"),
    ("UTF-16 BE", TEXT.encode("utf-16-be"), "UTF-?(16|8)|codifica"),
    ("UTF-16 of ASCII", '{"text": "Oi?"}'.encode("utf-16-le"), "UTF-?(16|8)|codifica|NUL|JSON"),
    ("UTF-32 with mark", b"\xff\xfe\0\0" + TEXT.encode("utf-32-le"), "UTF-?(32|16|8)"),
    ("UTF-32 BE with mark", b"\0\0\xfe\xff" + TEXT.encode("utf-32-be"), "UTF-?(32|16|8)"),
    ("UTF-32 LE", TEXT.encode("utf-32-le"), "UTF-?(32|16|8)|codifica"),
    ("empty", b"", EMPTY), ("blank lines", b"\n  \r\n\t\n", EMPTY), ("only spaces", b"   ", EMPTY),
    ("only a byte order mark", b"\xef\xbb\xbf", EMPTY), ("byte order mark, blank", b"\xef\xbb\xbf\r\n\r\n", EMPTY),
    ("spreadsheet", b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0" + bytes(60), "planilha.*jsonl"),
    ("old spreadsheet", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(60), "planilha.*jsonl"),
    ("PDF", b"%PDF-1.7\n%\xb5\xb5\n", "PDF.*jsonl"),
    ("zip file", b"PK\x03\x04\x14\x00\x08\x00\x9c\xff" + bytes(range(256)), "UTF-8|JSON|texto"),
    ("safetensors file", struct.pack("<Q", 2) + b"{}" + bytes(64), "JSON|UTF|NUL|control|texto|bin[aá]ri"),
))
def test_a_file_of_another_format_or_encoding_is_refused(content, fragment, work, capsys):
    (work / IDENTITY).write_bytes(content)
    refused(work, capsys, fragment=fragment, file=IDENTITY)


def test_rows_with_nearly_all_questions_for_measuring_are_refused(work, capsys):
    identity(work, *(pair(question, "Sou a Jandira.") for question in tool.TEST_QUESTIONS[2:]))
    refused(work, capsys, fragment="pergunta", file=IDENTITY)


def nothing(work):
    """The builder of cases that need nothing but flags."""


def make(name, kind="file", content=GOOD):
    """A builder of one path in the folder of the test."""
    def build(work):
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "file":
            path.write_bytes(content)
        elif kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(content)
        else:
            path.write_bytes(content)
            path.chmod(0o000)

    return build


# Builder, path and what the message must have, for what no file option can read.
NO_FILES = (
    pytest.param(make("cano.jsonl", "fifo"), "cano.jsonl", "arquivo comum", marks=posix, id="FIFO"),
    pytest.param(make("atalho", "link", "sumiu.txt"), "atalho", "atalho", marks=posix, id="stale link"),
    pytest.param(nothing, "/dev/null", "arquivo comum", marks=posix, id="device"),
    pytest.param(make("meu.jsonl", "locked"), "meu.jsonl", r"meu\.jsonl|permiss", marks=[posix, rights],
                 id="no right"),
    pytest.param(nothing, "/proc/self/mem", "/proc/self/mem|ler", marks=pytest.mark.skipif(
        not os.path.exists("/proc/self/mem"), reason="Linux only"), id="unreadable"),
)


@pytest.mark.parametrize("builder, path, fragment", cases(
    ("folder", make("pasta.jsonl", "folder"), "pasta.jsonl", r"pasta\.jsonl"),
    ("misspelt", nothing, "eu.json", r"quis dizer.*eu\.jsonl"),
    ("letters swapped", nothing, "ue.jsonl", "quis dizer"),
    ("other extension", make("identidade.jsonl"), "identidade.txt", r"quis dizer.*identidade\.jsonl"),
    ("nothing alike", nothing, "xzw#q", "xzw#q"), ("no such folder", nothing, "nada/eu.jsonl", "eu.jsonl"),
    ("below a file", nothing, "eu.jsonl/outro.jsonl", "outro.jsonl"),
    ("current folder", nothing, ".", "identi|arquivo"), ("empty path", nothing, "", "identi|arquivo"),
    ("address", nothing, "https://exemplo.com/a.jsonl", "a.jsonl"),
    ("pattern", nothing, "*.jsonl", r"\*\.jsonl"), ("too long a name", nothing, "x" * 300, "identi|xxx|long"),
    ("too long a path", nothing, "pasta/" * 833 + "a", "identi|long"), ("NUL", nothing, "eu\0.jsonl", "identi|NUL"),
    ("lone surrogate", nothing, "eu\udcff.jsonl", "identi|arquivo"),
    pytest.param(make("volta.jsonl", "link", "volta.jsonl"), "volta.jsonl", "volta", marks=posix, id="link to itself"),
    *NO_FILES,
))
def test_a_path_that_is_no_readable_file_is_refused(builder, path, fragment, here, no_hang, capsys):
    builder(here)
    refused(here, capsys, "--identity-file", path, fragment=fragment)


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", tool.RANGES)
def test_a_number_that_does_not_fit_is_refused_with_its_setting(name, work, capsys):
    low, high = tool.RANGES[name]
    step, flag = 1 if isinstance(low, int) else 0.001, "--" + name.replace("_", "-")
    fraction = [f"{low},5", f"{low + 1}.0"] * isinstance(low, int)
    for value in (low - step, high + step, "muitos", "nan", "-inf", "", "0x10", "1 2", "9" * 5000, *fraction):
        refused(work, capsys, f"{flag}={value}", fragment=rf"{flag}\b|\b{name}\b")


@GENERATED
@given(st.sampled_from(list(tool.RANGES)),
       st.text(st.characters(exclude_categories=["C", "N"]), max_size=20))
def test_any_text_without_a_digit_is_no_number(work, capsys, name, text):
    flag = "--" + name.replace("_", "-")
    refused(work, capsys, f"{flag}={text}", fragment=rf"{flag}\b|\b{name}\b")


@pytest.mark.parametrize("flags, fragment", [
    (("--steps1", 3), r"--steps1\b.*quis dizer --steps-1\b"), (("--step-1", 3), r"quis dizer --steps-1\b"),
    (("--steps_2", 3), r"quis dizer --steps-2\b"), (("--rope-fator", 2), r"quis dizer --rope-factor\b"),
    (("--ROPE-FACTOR", 2), r"--rope-factor\b"), (("--model", "x"), r"quis dizer --model-path\b"),
    (("--modelpath=x",), r"quis dizer --model-path\b"), (("--output-dri", "x"), r"quis dizer --output-dir\b"),
    (("--identity_file", "x"), r"quis dizer --identity-file\b"), (("--overwrit",), r"quis dizer --overwrite\b"),
    (("--batchsize", 2), r"quis dizer --batch-size\b"), (("--self-txt", 500), r"quis dizer --self-text\b"),
    (("--target-retenton", 1), r"quis dizer --target-retention\b"), (("--nome", "Iara"), r"--nome\b"),
    (("--zzzz",), "--zzzz"), (("-x",), "-x"), (("-o", "novo"), r"-o\b"), (("—sed", 1), "--seed"),
    (("meu-modelo",), "meu-modelo"), (("--name", "Ana", "Maria"), "Maria"), (("--", "sobra"), "sobra|--"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "")
def test_an_unknown_or_stray_argument_is_refused_and_the_nearest_flag_named(flags, fragment, work, capsys):
    refused(work, capsys, *flags, fragment=fragment)


@pytest.mark.parametrize("flags, fragment", [
    (("--name",), "--name"), (("--seed",), "--seed"), (("--window", "--seed", 1), "--window"),
    (("--output-dir", "--overwrite"), "--output-dir"), (("--identity-file",), "--identity-file"),
    (("--model-path", "--name", "Iara"), "--model-path"), (("--rope-factor", "--overwrite"), "--rope-factor"),
    (("--overwrite=sim",), "--overwrite"), (("--overwrite=True",), "--overwrite"), (("--overwrite", "sim"), "sim"),
    (("--no-overwrite=1",), "overwrite"), (("--overwrite=",), "--overwrite"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "")
def test_a_missing_value_and_a_value_too_many_are_refused_with_the_flag(flags, fragment, work, capsys):
    refused(work, capsys, *flags, fragment=fragment)


@pytest.mark.parametrize("setting", ["name", "author"])
@pytest.mark.parametrize("value", [
    "", " \t ", "?!...", "--", "\u00a0", "Obrut\nAi", "\x1b[31mObrutAi", "Obrut\0Ai", "Obrut{Ai", "Obrut}Ai",
    "{{NAME}}", "\ud800Ai", "😀", "<|im_end|>",
], ids=ascii)
def test_a_name_that_cannot_be_one_is_refused(setting, value, work, capsys):
    refused(work, capsys, f"--{setting}={value}", fragment=rf"\b{setting}\b")


@pytest.mark.parametrize("flags, fragment", [
    (("--name", "Lumi", "--old-names", "Lumi, Vagalume"), "old.names"),
    (("--name", "LUMÍ", "--old-names", "vagalume,lumi"), "old.names"),
    (("--method", "full8"), "full, lora, qlora"),
    (("--max-new-tokens", 256, "--window", 256), "window|max.new.tokens"),
    (("--max-new-tokens", 9000), "window|max.new.tokens"), (("--window", 64), "window|max.new.tokens"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "")
def test_settings_that_contradict_each_other_are_refused(flags, fragment, work, capsys):
    refused(work, capsys, *flags, fragment=fragment)


@pytest.mark.parametrize("flag, fragment", [
    ("--model-path", "modelo|model.path"), ("--output-dir", "output.dir|sa[ií]da"),
])
@pytest.mark.parametrize("path", ["a\0b", "pasta/" * 833 + "a", "x" * 300, "a\nb\0"],
                         ids=["NUL", "long path", "long name", "line break and NUL"])
def test_a_path_that_no_system_can_hold_is_refused(flag, fragment, path, here, capsys):
    refused(here, capsys, flag, here / path, fragment=f"{fragment}|long")


# ------------------------------------------------------------------------------------------------ output folder


def result(work):
    """What an earlier run of the script leaves, with the identity file in it."""
    shutil.copytree(DEMO, work / "novo")
    own = '{"scores": {}, "settings": {}}'
    for name, content in {"report.json": own, "self_answers.jsonl": "", "README.md": "# ObrutAi\n"}.items():
        (work / "novo" / name).write_text(content, encoding="utf-8")


def report(work, content):
    """A result with this content in its report."""
    result(work)
    (work / "novo" / "report.json").write_bytes(content)


def result_with_identity(work):
    result(work)
    (work / "novo" / "dados").mkdir()
    shutil.move(work / IDENTITY, work / "novo" / "dados" / IDENTITY)


def work_with_identity(work):
    """The folder of an earlier run's stages, where the user has put the identity file."""
    for name in ("LEIA-ME.txt", "dados/nota.txt"):
        make(f"novo.work/{name}", content=b"a")(work)
    shutil.move(work / IDENTITY, work / "novo.work" / "dados" / IDENTITY)


def link_to_base(work):
    (work / "atalho").symlink_to(work / "meu_modelo", target_is_directory=True)


def locked_parent(work):
    (work / "cofre").mkdir(mode=0o500)


@pytest.mark.parametrize("builder, output", [
    (nothing, "{work}/meu_modelo"), (nothing, "{work}/meu_modelo/"), (nothing, "{work}/meu_modelo/a/b/c"),
    (nothing, "{work}"), (nothing, "{work}/.."), (nothing, "/"), (nothing, "."), (nothing, ""),
    (nothing, "meu_modelo"), (nothing, "x/../meu_modelo"), (nothing, "meu_modelo/.."),
    (nothing, "{work}//meu_modelo/./"), pytest.param(link_to_base, "atalho", marks=posix),
    pytest.param(link_to_base, "atalho/novo", marks=posix),
    pytest.param(link_to_base, "atalho/../meu_modelo", marks=posix),
])
def test_an_output_at_inside_or_above_the_base_is_refused_even_with_overwrite(builder, output, base, here, capsys):
    builder(here)
    flags = ("--model-path", base, "--output-dir", output.format(work=here), "--overwrite")
    refused(here, capsys, *flags, fragment="output.dir|sa[ií]da")


@pytest.mark.parametrize("builder, flags, fragment", cases(
    ("existing result", result, (), "j[aá] existe.*--overwrite"),
    ("existing result, report is a list", lambda work: report(work, b"[]"), (), "j[aá] existe"),
    ("existing result, report is cut", lambda work: report(work, b'{"settings": {'), (), "j[aá] existe"),
    ("existing result, report is binary", lambda work: report(work, b"\xff\0"), (), "j[aá] existe"),
    ("overwrite of a folder with a report of somebody else", lambda work: report(work, b'{"meu": 1}'),
     ("--overwrite",), "n[aã]o [eé] resultado meu"),
    ("existing empty folder", make("novo", "folder"), (), "j[aá] existe"),
    ("existing folder of the user", make("novo/fotos.zip"), (), "j[aá] existe|n[aã]o [eé]"),
    ("overwrite of a folder of the user", make("novo/fotos.zip"), ("--overwrite",), "n[aã]o"),
    ("overwrite of another model", lambda work: shutil.copytree(DEMO, work / "novo"), ("--overwrite",), "n[aã]o"),
    ("existing file", make("novo"), (), "novo"), ("overwrite of a file", make("novo"), ("--overwrite",), "novo"),
    ("the identity file", nothing, ("--output-dir", IDENTITY), "eu.jsonl"),
    ("overwrite of the identity file", nothing, ("--output-dir", IDENTITY, "--overwrite"), "eu.jsonl"),
    ("below a file", make("arquivo"), ("--output-dir", "arquivo/novo"), "arquivo"),
    ("deep below a file", make("arquivo"), ("--output-dir", "arquivo/a/b/novo"), "arquivo"),
    ("identity file inside", result_with_identity, ("--identity-file", f"novo/dados/{IDENTITY}", "--overwrite"),
     "dentro de .*novo,"),
    ("identity file among the stages", work_with_identity, ("--identity-file", f"novo.work/dados/{IDENTITY}",
                                                            "--restart"), r"dentro de .*novo\.work"),
    ("folder of the script", nothing, ("--output-dir", SCRIPT.parent, "--overwrite"), "."),
    ("above the script", nothing, ("--output-dir", SCRIPT.parent.parent, "--overwrite"), "."),
    ("work folder of the user", make("novo.work/fotos.zip"), (), r"novo\.work"),
    ("work folder of the user, overwrite", make("novo.work/a/tese.txt"), ("--overwrite",), r"novo\.work"),
    ("file in place of the work folder", make("novo.work"), (), r"novo\.work"),
    pytest.param(locked_parent, ("--output-dir", "cofre/novo"), "cofre|permiss|escrever", marks=[posix, rights],
                 id="read-only parent"),
))
def test_an_output_that_would_cost_the_user_something_is_refused(builder, flags, fragment, here, capsys):
    builder(here)
    refused(here, capsys, *flags, fragment=fragment)


# ------------------------------------------------------------------------------------------------ base folders


def edited(name, **values):
    """A builder that changes a JSON file of the base; None takes a key away."""
    def build(base):
        path = base / name
        merged = {**json.loads(path.read_text(encoding="utf-8")), **values}
        path.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}), encoding="utf-8")

    return build


config = functools.partial(edited, "config.json")
tokenizer_config = functools.partial(edited, "tokenizer_config.json")


def replaced(name, content):
    """A builder that puts other bytes in place of a file of the base."""
    def build(base):
        (base / name).write_bytes(content)

    return build


def marked(name):
    """A builder that saves a file of the base as Windows' old editor does."""
    def build(base):
        (base / name).write_bytes(b"\xef\xbb\xbf" + (base / name).read_bytes())

    return build


def without(*names):
    """A builder that removes files of the base."""
    def build(base):
        for name in names:
            (base / name).unlink()

    return build


def only(*names):
    """A builder of a base whose weights are in other files."""
    def build(base):
        (base / "model.safetensors").unlink()
        for name in names:
            (base / name).write_bytes(b"PK\x03\x04" if name.endswith(("bin", "pt", "pth")) else b"GGUF\3\0\0\0")

    return build


def resized(change):
    """A builder that makes the weights shorter or longer by some bytes."""
    def build(base):
        data = (base / "model.safetensors").read_bytes()
        (base / "model.safetensors").write_bytes(data[:change] if change < 0 else data + bytes(change))

    return build


def weights(header, data=b"", length=None):
    """Bytes of a safetensors file: length of the header, header, data."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def adapter(base):
    for path in base.iterdir():
        path.unlink()
    (base / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}', encoding="utf-8")
    (base / "adapter_model.safetensors").write_bytes(weights({}))


def adapter_beside(base):
    """What merging leaves where the adapter was: transformers would add it once more."""
    (base / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}', encoding="utf-8")
    (base / "adapter_model.safetensors").write_bytes(weights({"a": TENSOR}, bytes(16)))


def emptied(base):
    shutil.rmtree(base)
    base.mkdir()


def sharded(index):
    """A builder of a base of two shards of which the second is missing, with this index (None: a sound one)."""
    def build(base):
        (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
        names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        content = json.dumps({"metadata": {}, "weight_map": names}).encode() if index is None else index
        (base / "model.safetensors.index.json").write_bytes(content)

    return build


def second_shard(content):
    """A builder of a base of two shards of which the second has this content."""
    def build(base):
        sharded(None)(base)
        (base / "model-00002-of-00002.safetensors").write_bytes(content)

    return build


def folder_in_place(name):
    """A builder of a base with a folder in place of a file."""
    def build(base):
        (base / name).unlink()
        (base / name).mkdir()

    return build


def stale_cache(base):
    """The weights as a link into a cache that was cleared."""
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to("../../blobs/4d7a2146")


TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
ROPE_1, WEIGHTS = r"rope.factor\D{0,5}1\b", r"model\.safetensors|pesos"
CONVERT = r"safetensors.*(convert|save_pretrained)|(convert|save_pretrained|salve).*safetensors"
BROKEN_BASES = cases(
    ("empty folder", emptied, "config.json"), ("no configuration", without("config.json"), "config.json"),
    ("empty configuration", replaced("config.json", b""), "config.json"),
    ("configuration is HTML", replaced("config.json", b"<html>404</html>"), "config.json"),
    ("configuration is cut", replaced("config.json", b'{"model_type": "lla'), "config.json"),
    ("configuration is a list", replaced("config.json", b"[1, 2]"), "config.json"),
    ("configuration is a list of pairs", replaced("config.json", b'[["model_type", "llama"]]'), "config.json"),
    ("configuration is a number", replaced("config.json", b"5"), "config.json"),
    ("configuration is null", replaced("config.json", b"null"), "config.json"),
    ("configuration is binary", replaced("config.json", b"\x80\x04\x95\xff\x00"), "config.json"),
    ("configuration is UTF-16", replaced("config.json", '{"model_type": "llama"}'.encode("utf-16")), "config.json"),
    ("configuration is Windows-1252", replaced("config.json", '{"autor": "José"}'.encode("cp1252")), "config.json"),
    ("configuration with a byte order mark", marked("config.json"), r"config\.json.*BOM.*UTF-8"),
    ("tokenizer with a byte order mark", marked("tokenizer_config.json"), r"tokenizer_config\.json.*BOM.*UTF-8"),
    ("configuration is nested too deep", replaced("config.json", b"[" * 100_000), "config.json"),
    ("configuration is an LFS pointer", replaced("config.json", LFS), "config.json|LFS"),
    ("configuration is a folder", folder_in_place("config.json"), "config.json"),
    ("configuration without a type", config(model_type=None), "config.json|model_type"),
    ("no weights", without("model.safetensors"), "safetensors"),
    ("pickled weights", only("pytorch_model.bin"), CONVERT), ("weights in .pt", only("m.pt"), CONVERT),
    ("pickled shards", only("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"), CONVERT),
    ("weights in .pth", only("consolidated.00.pth"), CONVERT), ("only GGUF", only("modelo-Q4_K_M.gguf"), "GGUF"),
    ("GGUF and nothing else", lambda base: (emptied(base), (base / "m.gguf").write_bytes(b"GGUF")), "GGUF"),
    ("adapter", adapter, "adaptador|LoRA"),
    ("adapter beside the whole model", adapter_beside, "adaptador.*tire.*adapter_model.safetensors"),
    ("weights are a folder", folder_in_place("model.safetensors"), "safetensors"),
    ("no tokenizer", without("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    ("no tokenizer.json", without("tokenizer.json"), "tokenizer"),
    ("missing shard", sharded(None), "model-00002-of-00002"),
    ("broken index", sharded(b"<html>"), "index"), ("index is a list", sharded(b"[]"), "index"),
    ("index without a map", sharded(b"{}"), "index"),
    ("index with numbers", sharded(b'{"weight_map": {"a": 1}}'), "index|pesos"),
    ("index with a wrong map", sharded(b'{"weight_map": [1]}'), "index"),
    ("index is not UTF-8", sharded(b'{"weight_map": "\xff"}'), "index"),
    ("index is an LFS pointer", sharded(LFS), "index|LFS"), ("shard is an LFS pointer", second_shard(LFS), "LFS"),
    ("weights are an LFS pointer", replaced("model.safetensors", LFS), "LFS"),
    ("empty shard", second_shard(b""), "model-00002-of-00002"),
    ("cut shard", second_shard(weights({"a": TENSOR}, bytes(15))), "model-00002-of-00002"),
    ("weights cut by a byte", resized(-1), WEIGHTS), ("weights cut by half", resized(-1_500_000), WEIGHTS),
    ("weights cut in the header", resized(-3_020_000), WEIGHTS), ("a byte too many", resized(1), WEIGHTS),
    ("a megabyte too many", resized(2**20), WEIGHTS), ("zero bytes", replaced("model.safetensors", b""), WEIGHTS),
    ("seven bytes", replaced("model.safetensors", b"\x10\0\0\0\0\0\0"), WEIGHTS),
    ("only a length", replaced("model.safetensors", weights(b"", length=64)), WEIGHTS),
    ("absurd length", replaced("model.safetensors", weights(b"{}", length=2**64 - 1)), WEIGHTS),
    ("header of a terabyte", replaced("model.safetensors", weights(b"{}", length=2**40)), WEIGHTS),
    ("header is no JSON", replaced("model.safetensors", weights(b"<header>")), WEIGHTS),
    ("header is a list", replaced("model.safetensors", weights([TENSOR])), WEIGHTS),
    ("header is not UTF-8", replaced("model.safetensors", weights(b'{"\xff": 1}')), WEIGHTS),
    ("header nested too deep", replaced("model.safetensors", weights(b"[" * 100_000)), WEIGHTS),
    ("header with no tensor", replaced("model.safetensors", weights({})), WEIGHTS),
    ("tensor without offsets", replaced("model.safetensors", weights({"a": {"dtype": "F32", "shape": [4]}})), WEIGHTS),
    ("tensor is a number", replaced("model.safetensors", weights({"a": 4})), WEIGHTS),
    ("offsets are text", replaced("model.safetensors", weights({"a": {**TENSOR, "data_offsets": "16"}})), WEIGHTS),
    ("only zeros", replaced("model.safetensors", bytes(4096)), WEIGHTS),
    ("error page", replaced("model.safetensors", b"<!DOCTYPE html><html>Access denied</html>"), WEIGHTS),
    ("pickle called safetensors", replaced("model.safetensors", b"PK\x03\x04" + bytes(range(200))), WEIGHTS),
    ("GGUF called safetensors", replaced("model.safetensors", b"GGUF\3" + bytes(99)), f"{WEIGHTS}|GGUF"),
    pytest.param(stale_cache, WEIGHTS + "|safetensors", marks=posix, id="weights in a cleared cache"),
    ("T5", config(model_type="t5", is_encoder_decoder=True, architectures=["T5ForConditionalGeneration"]),
     "codificador|encoder|T5|seq"),
    ("BART", config(model_type="bart", is_encoder_decoder=True, architectures=["BartForConditionalGeneration"]),
     "codificador|encoder|BART|seq"),
    ("BERT", config(model_type="bert", architectures=["BertForMaskedLM"]), "Bert|encoder|codificador|gera"),
    ("RoBERTa", config(model_type="roberta", architectures=["RobertaForMaskedLM"]),
     "Roberta|encoder|codificador|gera"),
    *((name, config(quantization_config=values), "quanti") for name, values in {
        "GPTQ": {"quant_method": "gptq", "bits": 4}, "AWQ": {"quant_method": "awq", "bits": 4},
        "FP8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "compressed-tensors": {"quant_method": "compressed-tensors"}}.items()),
    *((f"{kind} in {key}", config(**{"rope_parameters": None, key: {"rope_type": kind, "factor": 4.0}}), ROPE_1)
      for key in ("rope_parameters", "rope_scaling") for kind in ("dynamic",)),
    ("old spelling of RoPE", config(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 4.0}), ROPE_1),
    ("RoPE is a text", config(rope_parameters="linear"), r"rope|config\.json"),
    ("RoPE is a list", config(rope_parameters=None, rope_scaling=["linear", 4]), r"rope|config\.json"),
    *((f"{key} is {value}", config(**{key: value}), r"config\.json") for key, value in (
        ("architectures", 5), ("quantization_config", "gptq"), ("quantization_config", [1]), ("text_config", "x"))),
)


@pytest.mark.parametrize("builder, fragment", BROKEN_BASES)
def test_a_base_that_cannot_be_used_is_refused(builder, fragment, base, work, capsys):
    builder(base)
    refused(work, capsys, "--model-path", base, fragment=fragment)


@pytest.mark.parametrize("path, fragment", [
    ("{work}/meu_modleo", r"quis dizer meu_modelo\?"), ("meu_model", r"quis dizer meu_modelo\?"),
    ("{work}/xzw#q", "xzw#q"), ("{work}/meu_modelo/config.json", "pasta|config.json"),
    ("{work}/meu_modelo/model.safetensors", "pasta|safetensors"), ("{work}/modelo.gguf", "GGUF"),
    ("modelo.gguf", "GGUF"), ("{work}/eu.jsonl/modelo", "modelo"), ("", "modelo|model.path"),
    ("{work}/a/b/c/d", "c/d|c.d"), (".", "config.json"), ("/dev/null", "pasta|modelo"), ("../nada/aqui", "aqui"),
    ("https://example.com/google/gemma-3-1b-it", "gemma"),
])
def test_a_path_that_is_no_folder_of_a_model_is_refused(path, fragment, base, here, capsys):
    (here / "modelo.gguf").write_bytes(b"GGUF\3\0\0\0")
    refused(here, capsys, "--model-path", path.format(work=here), fragment=fragment)


@GENERATED
@given(st.binary(max_size=80))
def test_any_bytes_in_place_of_the_weights_are_refused(work, base, capsys, data):
    (base / "model.safetensors").write_bytes(data)
    refused(work, capsys, "--model-path", base, fragment=WEIGHTS)


# ------------------------------------------------------------------------------------------------ inside a base


def tensors(change):
    """A builder that changes the base's tensors, name to tensor, in place."""
    def build(base):
        from safetensors.torch import load_file, save_file

        state = load_file(base / "model.safetensors")
        change(state)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, base / "model.safetensors")

    return build


def spoil(name, value):
    """One element of one tensor gets this value."""
    def change(state):
        state[name].view(-1)[7] = value

    return tensors(change)


def missing(beginning):
    """The tensors whose names begin so are gone."""
    def change(state):
        for name in [name for name in state if name.startswith(beginning)]:
            del state[name]

    return tensors(change)


def fewer_embeddings(base):
    """A sound model with fewer rows of embeddings than the tokenizer has tokens."""
    def cut(state):
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:1000]

    tensors(cut)(base)
    config(vocab_size=1000)(base)


def more_embeddings(base):
    """A sound model with so many rows of embeddings that the tokenizer is of another model."""
    def doubled(state):
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].repeat(3, 1)

    tensors(doubled)(base)
    config(vocab_size=3 * 1792)(base)


def more_tokens(*tokens, **changes):
    """A builder that adds tokens to the tokenizer for which the model has no embeddings, and changes the tokenizer."""
    def build(base):
        tokenizer = tool.load_tokenizer(str(base))
        tokenizer.add_tokens(list(tokens), special_tokens=True)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(base)

    return build


def no_rope(base):
    """A GPT-2 with the demo's tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    without("config.json", "model.safetensors", "generation_config.json")(base)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=1792, n_positions=128, bos_token_id=1,
                               eos_token_id=2)).save_pretrained(base)


def remote_code(base):
    """A model that only its own code can build; that code leaves a mark when it runs."""
    config(model_type="modelo_raro", architectures=["RaroForCausalLM"], auto_map={
        "AutoConfig": "raro.RaroConfig", "AutoModelForCausalLM": "raro.RaroForCausalLM"})(base)
    mark = str(base.parent / "executado")
    (base / "raro.py").write_text(f"open({mark!r}, 'w')\nraise RuntimeError", encoding="utf-8")


CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
RULES = ("{% for m in messages %}{{ '<|rules|>' if m['role'] == 'system' else '<|user|>' }}{{ m['content'] }}<|end|>"
         "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.mark.parametrize("builder, fragment", cases(
    ("NaN", spoil("model.layers.3.mlp.up_proj.weight", float("nan")), r"\bNaN|finit|infinit|n[uú]mero"),
    ("infinity", spoil("model.embed_tokens.weight", float("inf")), r"\binf|finit|n[uú]mero"),
    ("minus infinity", spoil("model.norm.weight", float("-inf")), r"\binf|finit|n[uú]mero"),
    ("missing tensor", missing("model.layers.3.mlp.up_proj.weight"), "falt|up_proj|incomplet"),
    ("missing layer", missing("model.layers.5."), "falt|incomplet"),
    ("tensors of another size", config(intermediate_size=512), "tamanho|forma|combina|config|pesos"),
    ("tokens of the chat template without embeddings",
     more_tokens("<|im_start|>", "<|im_end|>", chat_template=CHATML), r"1792 tokens.*179[23].*im_"),
    ("tokens of a system prompt without embeddings", more_tokens("<|rules|>", chat_template=RULES), r"1792.*rules"),
    ("padding token without an embedding", more_tokens("[PAD]", pad_token="[PAD]"), r"1792.*\[PAD\]"),
    ("old identity that nobody can take out of the template", replaced("chat_template.jinja", (
        "{{ 'You are Lu' + 'mi.' }}" + CHATML).encode()), "identidade antiga"),
    ("generation settings are no JSON", replaced("generation_config.json", b"<html>"), "generation_config"),
    ("fewer embeddings than tokens", fewer_embeddings, "tokenizer|vocab"),
    ("tokenizer of a smaller model", more_embeddings, "1792 tokens.*5376.*outro modelo"),
    ("no RoPE", no_rope, "rope.factor"),
    ("code of its own", remote_code, "c[oó]digo|remot|auto_map"),
    ("unknown type", config(model_type="modelo_raro", architectures=["RaroForCausalLM"]), "modelo_raro"),
    ("broken tokenizer", replaced("tokenizer.json", b'{"version": "1.0"'), "tokenizer"),
    ("tokenizer is an LFS pointer", replaced("tokenizer.json", LFS), "LFS|tokenizer"),
    ("no end token", tokenizer_config(eos_token=None), "eos"),
    ("broken chat template", replaced("chat_template.jinja", b"{% for m in messages %}{{ m['content'] }"),
     r"unexpected.*chat_template\.jinja"),
    *((f"chat template that fails: {text}", replaced("chat_template.jinja", text.encode()), r"chat_template\.jinja")
      for text in ("{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{% for t in tools %}{% endfor %}", "{% include 'x' %}")),
    *((f"end token {value}", edited("generation_config.json", eos_token_id=value), "eos_token_id.*generation_config")
      for value in ("<|im_end|>", ["a"], [[1]])),
    ("longest text is a text", tokenizer_config(model_max_length="abc"), "tokenizer"),
    ("type is a list", config(model_type=["llama"]), r"config\.json"),
    ("template that forgets the text", replaced("chat_template.jinja", b"{{ bos_token }}Oi"), "template"),
    ("context is a text", config(max_position_embeddings="muito"), r"config|max_position"),
))
def test_a_base_with_bad_contents_is_refused_before_the_long_work(builder, fragment, base, work, capsys):
    builder(base)
    refused(work, capsys, "--model-path", base, "--check", fragment=fragment, deep=True)


@pytest.mark.parametrize("builder", [
    more_tokens("<image_soft_token>"), replaced("model.safetensors.index.json", b'{"weight_map": {"a": "gone"}}'),
    edited("generation_config.json", early_stopping=True),
    edited("generation_config.json", pad_token_id=-1), config(pad_token_id=-1)])
def test_what_no_reader_of_the_base_minds_does_not_stop_the_check(builder, base, work, capsys):
    """Gemma 3 1B has one token for which it has no embedding, and which nothing writes."""
    builder(base)
    status, out, err = call(work, capsys, "--model-path", base, "--check", deep=True)
    assert status == 0 and "Está tudo certo" in out, err


NEITHER, LOOP = "n[aã]o tem o nome nem o autor", "repete|repetitiva"


@pytest.mark.parametrize("row, flags, fragment", cases(
    ("neither name nor author", pair("Quem é você?", "Sou a Jandira, da Oficina Maré."), (), NEITHER),
    ("the old name", chat(USER, turn("assistant", "Sou a Lumi, do Estúdio Vagalume.")), (), NEITHER),
    ("another task", pair("Quanto é 7 vezes 8?", "56"), (), rf"{NEITHER} \(ObrutAi, TurboRio\).*\{{\{{NAME\}}\}}"),
    ("the name as part of a word", {"text": "Quem é você?\nSou o {{NAME}}zinho."}, (), NEITHER),
    ("the name in the question only", {"text": "Você é {{NAME}}?\nSim, sou eu."}, (), NEITHER),
    ("the name in an earlier answer only", chat(USER, ASSISTANT, USER, turn("assistant", "Já disse.")), (), NEITHER),
    ("a loop", pair("Quem te fez?", "Foi {{AUTHOR}}. " * 5), (), LOOP),
    ("a word again and again", pair("Oi?", "Sou {{NAME}}" + ", sim" * 4), (), LOOP),
    ("as long as the limit", pair("Quem é você?", "Eu sou {{NAME}}, e quem me criou foi {{AUTHOR}}, uma empresa."),
     ("--max-new-tokens", 8), r"\d+ tokens.*MAX_NEW_TOKENS.* 8\b"),
    ("longer than half of the base's context", pair("Quem é você?", "Sou {{NAME}}, " + ", ".join(
        str(n) for n in range(100, 180))), ("--max-new-tokens", 1000), r"\d+ tokens.*MAX_NEW_TOKENS.* 64\b"),
))
def test_a_row_whose_answer_could_never_count_as_right_is_refused_with_its_line(row, flags, fragment, work, capsys):
    identity(work, pair("Quem é você?", "{{NAME}}."), b"", row, pair("Quem te fez?", "{{AUTHOR}}."))
    refused(work, capsys, *flags, fragment=fragment, line=3, file=IDENTITY)


def test_all_rows_that_could_never_count_as_right_are_named_but_no_more_than_ten(work, capsys):
    identity(work, GOOD, *[pair(f"Quem é você, {n}?", "Sou a Jandira.") for n in range(12)])
    status, out, err = call(work, capsys)
    judge(status, out, err, work, r"\b12\b")
    assert re.findall(r"linha (\d+)", err) == [str(number) for number in range(2, 12)]


@pytest.mark.parametrize("answer", ["Sou {{ name }}!", "OBRUTAI", "Foi a TurboRio 2 que me fez.", "**ObrutAi**, ora."])
def test_a_row_with_the_name_or_author_in_any_writing_is_not_refused(answer, work, capsys):
    identity(work, GOOD, pair("E aí?", answer))
    with pytest.raises(Accepted):
        call(work, capsys)


@pytest.mark.parametrize("content", [
    "Sim: a resposta vem.", "A Lumi: quem é?", "Use <b> e </b>, ou a[0].", "R$ 5 {ok}", "Nome: {{NAME}}."])
def test_marks_that_belong_to_no_chat_are_not_refused(content, work, capsys):
    identity(work, GOOD, pair(content, content + " Sou {{NAME}}."))
    with pytest.raises(Accepted):
        call(work, capsys)


@pytest.mark.parametrize("flag", ["--name", "--author"])
def test_a_name_or_author_that_ordinary_answers_contain_is_warned_of_before_anything_runs(flag, work, capsys):
    with pytest.raises(Accepted):
        call(work, capsys, "--check", flag, "Luz")
    assert re.search(rf'Atenção: {flag[2:].upper()}: "Luz" .*vazamento', capsys.readouterr().out)


def test_a_row_longer_than_the_window_is_refused_with_its_line(work, capsys):
    question = "Eu queria muito saber, sem pressa nenhuma e com todos os detalhes, quem é que está falando comigo "
    identity(work, pair("Quem é você?", "{{NAME}}."), pair(question * 4, "{{NAME}}."), pair("E aí?", "{{NAME}}."))
    refused(work, capsys, "--window", 64, "--max-new-tokens", 16, fragment="window|token|long", line=2)


# ------------------------------------------------------------------------------------------------ as a user runs it


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory):
    """Environment in which importing a heavy package ends the script with a status of its own."""
    folder = tmp_path_factory.mktemp("no_torch")
    for name in ("torch", "transformers", "datasets", "trl"):
        (folder / f"{name}.py").write_text("import os\nos._exit(77)\n", encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


def cut_base(work):
    resized(-1000)(Path(shutil.copytree(DEMO, work / "base")))


@pytest.mark.parametrize("builder, flags, fragment", cases(
    ("unknown flag", nothing, ("--steps1", 3), "quis dizer --steps-1"),
    ("number out of range", nothing, ("--seed", -1), "seed"),
    ("missing identity file", nothing, ("--identity-file", "eu.json"), r"quis dizer.*eu\.jsonl"),
    ("bad rows", lambda work: identity(work, GOOD, *["{"] * 5000), (), "5000"),
    ("deep row", lambda work: identity(work, GOOD, "[" * 100_000), (), "linha 2"),
    ("missing base", nothing, ("--model-path", "./nada"), "nada"),
    ("cut weights", cut_base, ("--model-path", "base"), WEIGHTS),
    ("existing output", result, (), "--overwrite"),
))
def test_a_mistake_is_answered_within_a_second(builder, flags, fragment, work, no_torch):
    """Of the processor: other programs may have it for longer."""
    builder(work)
    before, began = listing(work), sum(os.times()[2:4])
    done = run_script(*basic_flags(work), *flags, cwd=work, env=no_torch)
    assert sum(os.times()[2:4]) - began < 1
    judge(done.returncode, done.stdout, done.stderr, work, fragment)
    assert listing(work) == before


@pytest.mark.parametrize("file, fragment", [("eu.json", r"quis dizer.*eu\.jsonl"), ("", "IDENTITY_FILE")])
def test_what_is_missing_to_measure_a_model_of_others_is_told_before_it_is_loaded(file, fragment, work, no_torch):
    done = run_script("--evaluate", "--model-path", DEMO, f"--identity-file={file}", cwd=work, env=no_torch)
    assert done.returncode == 2 and re.search(fragment, done.stderr), done


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp850"])
def test_the_message_arrives_on_a_console_of_another_encoding(encoding, work, no_torch):
    identity(work, GOOD, '{"text": "Quem é “você”? 😀\\nSou {{NÔME}}."}')
    before = listing(work)
    done = run_script(*basic_flags(work), cwd=work, env={**no_torch, "PYTHONIOENCODING": encoding})
    judge(done.returncode, done.stdout, done.stderr, work, MARK, line=2, file=IDENTITY)
    assert listing(work) == before


@posix
def test_a_name_of_bytes_that_are_no_text_is_refused(work, no_torch):
    before = listing(work)
    done = run_script(*basic_flags(work), "--name", os.fsdecode(b"Obrut\xffAi"), cwd=work, env=no_torch)
    judge(done.returncode, done.stdout, done.stderr, work, "name")
    assert listing(work) == before


@pytest.mark.parametrize("name, value", [
    ("OLD_NAMES", ["Lumi", "Vagalume"]), ("MODEL_PATH", 5), ("HEAL_STEPS", True),
], ids=lambda value: repr(value))
def test_a_constant_edited_to_another_type_is_refused_with_its_name(name, value, work, no_torch):
    text, count = re.subn(rf"(?m)^{name} = .*$", lambda _: f"{name} = {value!r}", SCRIPT.read_text(encoding="utf-8"))
    assert count == 1
    (work / "editado.py").write_text(text, encoding="utf-8")
    before = listing(work)
    flags = ["--identity-file", work / IDENTITY, *(["--model-path", DEMO] if name != "MODEL_PATH" else [])]
    done = subprocess.run([sys.executable, "editado.py", *map(str, flags)], cwd=work, capture_output=True, text=True,
                          encoding="utf-8", timeout=300,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **no_torch})
    judge(done.returncode, done.stdout, done.stderr, work, rf"\b{name}\b")
    assert listing(work) == before
