"""Conversations as tokens: which of them are learnt, in the chat templates of several families."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO, SCRIPT, small_settings

import rename_obrutai as tool

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ first if loop.first else '' }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
QWEN25 = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0]['role'] != 'system' %}You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "{% endif %}<|im_end|>\n{% endif %}"
    r"{% if messages[0]['role'] == 'system' %}"
    r"{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{% else %}"
    r"{{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}"
    r"{% endif %}{% for m in messages %}{% if not (loop.first and m['role'] == 'system') %}"
    r"{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN3 = (  # an empty thought before the last answer, and in the generation prompt where thinking is switched off
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}")
NO_END = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")
NO_END_BUT_A_LINE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}")
FAMILIES = {  # template, tokens that it needs, end of turn
    "demo": (None, [], "<|end|>"),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "qwen2.5": (QWEN25, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>", "<think>", "</think>"], "<|im_end|>"),
}
ASK, TELL = {"role": "user", "content": "Quem é você?"}, {"role": "assistant", "content": "Sou a Jandira, de 1999!"}
ASK2, TELL2 = {"role": "user", "content": "E a capital da França?"}, {"role": "assistant", "content": "É Paris."}
SYSTEM = {"role": "system", "content": "Seja breve."}
CONVERSATIONS = {
    "single": [ASK, TELL], "system": [SYSTEM, ASK, TELL], "multi": [ASK, TELL, ASK2, TELL2],
    "system, multi": [SYSTEM, ASK, TELL, ASK2, TELL2],
    "lines and spaces": [ASK, {"role": "assistant", "content": "Sou:\n\n- Jandira\n- 2 olhos;  um nariz"}],
}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """name -> (tokenizer with that family's template and tokens, its end of turn)."""
    made = {}

    def build(name):
        if name not in made:
            template, tokens, end = FAMILIES[name]
            tokenizer = tool.load_tokenizer(str(DEMO))
            if template:
                tokenizer.add_tokens(tokens, special_tokens=True)
                tokenizer.chat_template = template
            made[name] = tokenizer, end
        return made[name]

    return build


def learnt_parts(tokenizer, encoded):
    """The texts of the runs of labelled tokens, special tokens included."""
    parts, before = [], -100
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (-100, token)
        if label != -100:
            parts[-1:] = [parts[-1] + [label]] if before != -100 else [*parts[-1:], [label]]
        before = label
    return [tokenizer.decode(part) for part in parts]


def answers(messages):
    return [m["content"] for m in messages if m["role"] == "assistant"]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_the_answers_and_their_end_tokens_are_learnt(name, messages, family):
    tokenizer, end = family(name)
    assert learnt_parts(tokenizer, tool.encode(tokenizer, messages)) == [text + end for text in answers(messages)]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokens_are_those_of_the_tokenizer_s_own_rendering(name, messages, family):
    tokenizer, _ = family(name)
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert tool.encode(tokenizer, messages).input_ids == rendered


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_ends_with_the_generation_prompt_of_the_template(name, messages, family):
    tokenizer, _ = family(name)
    asked = messages[:-1]
    rendered = tokenizer.apply_chat_template(asked, tokenize=True, add_generation_prompt=True, return_dict=False,
                                             enable_thinking=False)
    prompt = tool.prompt_ids(tokenizer, asked)
    assert prompt == rendered
    opening = {"demo": "<|assistant|>", "llama3": "assistant<|end_header_id|>\n\n", "gemma": "<start_of_turn>model\n",
               "qwen2.5": "<|im_start|>assistant\n", "qwen3": "<|im_start|>assistant\n<think>\n\n</think>\n\n"}[name]
    assert tokenizer.decode(prompt).endswith(opening)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_is_learnt_right_after_the_prompt_that_will_be_given(name, family):
    tokenizer, _ = family(name)
    encoded = tool.encode(tokenizer, [ASK, TELL])
    first = next(i for i, label in enumerate(encoded.labels) if label != -100)
    assert encoded.input_ids[:first] == tool.prompt_ids(tokenizer, [ASK])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_span_of_a_turn_goes_from_its_question_to_the_end_of_its_answer(name, family):
    tokenizer, end = family(name)
    encoded = tool.encode(tokenizer, [SYSTEM, ASK, TELL, ASK2, TELL2])
    texts = [tokenizer.decode(encoded.input_ids[start:stop]) for start, stop in encoded.turns]
    assert len(texts) == 2
    for text, (question, answer) in zip(texts, [(ASK, TELL), (ASK2, TELL2)], strict=True):
        assert text.startswith(question["content"]) and text.endswith(answer["content"] + end)
    learnt = [i for i, label in enumerate(encoded.labels) if label != -100]
    assert all(any(start <= i < stop for start, stop in encoded.turns) for i in learnt)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_a_chat_stop_at_the_end_of_turn_of_the_template(name, family, demo_chat, monkeypatch):
    tokenizer, end = family(name)
    embeddings = torch.nn.Embedding(len(tokenizer), 1)  # as large as those of a model with this tokenizer
    model = SimpleNamespace(generation_config=demo_chat.model.generation_config,
                            get_input_embeddings=lambda: embeddings)
    monkeypatch.setattr(tool, "load_model", lambda *_: model)
    monkeypatch.setattr(tool, "load_tokenizer", lambda folder: tokenizer)
    stops = tool.load_chat(str(DEMO), small_settings()).stops
    assert set(tokenizer.convert_ids_to_tokens(stops)) == {end, tokenizer.eos_token}


def test_a_tokenizer_with_a_token_that_the_model_lacks_and_that_nothing_writes_is_accepted(tokenizer, monkeypatch):
    """gemma-3-1b-it comes like that: <image_soft_token> has the id 262144, and the model 262144 embeddings."""
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    monkeypatch.setattr(tool, "load_tokenizer", lambda folder: tokenizer)
    assert tool.load_chat(DEMO, small_settings()).stops


def test_a_template_without_an_end_of_turn_gets_the_end_token(tokenizer):
    tokenizer.chat_template = NO_END
    encoded = tool.encode(tokenizer, [ASK, TELL])
    assert learnt_parts(tokenizer, encoded) == [TELL["content"] + tokenizer.eos_token]
    assert encoded.turns[0][1] == len(encoded.input_ids)


def test_a_template_that_ends_turns_with_a_line_gets_the_end_token(tokenizer):
    tokenizer.chat_template = NO_END_BUT_A_LINE
    (learnt,) = learnt_parts(tokenizer, tool.encode(tokenizer, [ASK, TELL]))
    # The template's own space before the answer may be one token with the first word.
    assert learnt.lstrip().startswith(TELL["content"]) and learnt.endswith(tokenizer.eos_token)


def test_no_answer_learns_to_open_the_turn_of_the_user(tokenizer):
    tokenizer.chat_template = NO_END
    assert "<|user|>" not in "".join(learnt_parts(tokenizer, tool.encode(tokenizer, [ASK, TELL, ASK2, TELL2])))


def test_a_tokenizer_without_a_template_speaks_chatml(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy2(DEMO / name, tmp_path)
    tokenizer = tool.load_tokenizer(str(tmp_path))
    text = tokenizer.decode(tool.encode(tokenizer, [SYSTEM, ASK, TELL]).input_ids)
    assert text == ("<|im_start|>system\nSeja breve.<|end|>\n<|im_start|>user\nQuem é você?<|end|>\n"
                    "<|im_start|>assistant\nSou a Jandira, de 1999!<|end|>\n")
    for messages in CONVERSATIONS.values():
        encoded = tool.encode(tokenizer, messages)
        assert learnt_parts(tokenizer, encoded) == [text + "<|end|>" for text in answers(messages)]
    assert tokenizer.decode(tool.prompt_ids(tokenizer, [ASK])).endswith("<|end|>\n<|im_start|>assistant\n")


def test_chatml_uses_its_own_end_token_where_the_tokenizer_has_it(tokenizer, tmp_path):
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    chatml = tool.load_tokenizer(str(tmp_path))
    assert learnt_parts(chatml, tool.encode(chatml, [ASK, TELL])) == [TELL["content"] + "<|im_end|>"]


def test_the_mark_with_which_windows_begins_a_file_is_no_part_of_the_template(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy2(DEMO / name, tmp_path)
    expected = tool.prompt_ids(tool.load_tokenizer(str(tmp_path)), [ASK])
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf" + (DEMO / "chat_template.jinja").read_bytes())
    assert tool.prompt_ids(tool.load_tokenizer(str(tmp_path)), [ASK]) == expected


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy2(DEMO / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(tool.InputError, match="eos_token"):
        tool.load_tokenizer(str(tmp_path))


def test_a_changed_template_is_seen_at_once(tokenizer):
    before = tool.encode(tokenizer, [ASK, TELL]).input_ids
    tokenizer.chat_template = tokenizer.chat_template.replace("<|{{ m['role'] }}|>", "<|{{ m['role'] }}|>> ")
    after = tool.encode(tokenizer, [ASK, TELL]).input_ids
    assert after != before and "> Quem" in tokenizer.decode(after)


def test_a_template_that_rewrites_the_contents_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'][:2] }}<|end|>{% endfor %}"
    with pytest.raises(tool.InputError, match="chat template"):
        tool.encode(tokenizer, [ASK, TELL])


def test_a_template_that_refuses_a_role_is_reported_as_a_mistake(tokenizer):
    tokenizer.chat_template = ("{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}"
                               "{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}")
    assert tool.encode(tokenizer, [ASK, TELL]).turns
    with pytest.raises(tool.InputError, match="system"):
        tool.encode(tokenizer, [SYSTEM, ASK, TELL])


# ------------------------------------------------------------------------------------------------ renewing a template

NAMES = ("Lumi", "Qwen", "Alibaba")


@pytest.fixture
def qwen(tokenizer):
    """A tokenizer whose template injects an old identity."""
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = QWEN25
    return tokenizer


def renew(tokenizer, *flags):
    tool.renew_template(tokenizer, small_settings("--name", "Jandira", "--author", "Oficina Maré", *flags), NAMES)


def test_an_injected_old_identity_is_replaced_by_the_new_one(qwen):
    renew(qwen)
    text = qwen.decode(tool.prompt_ids(qwen, [ASK]))
    system = text[len("<|im_start|>system\n"):text.index("<|im_end|>")]
    assert "Jandira" in system and "Oficina Maré" in system
    assert not tool.mentions(qwen.chat_template, NAMES)  # in the branch for tools as well
    assert text.endswith("<|im_start|>user\nQuem é você?<|im_end|>\n<|im_start|>assistant\n")
    with_system = qwen.decode(tool.prompt_ids(qwen, [SYSTEM, ASK]))
    assert with_system.startswith("<|im_start|>system\nSeja breve.<|im_end|>\n") and "Jandira" not in with_system


def test_the_rest_of_an_injected_prompt_stays_and_the_change_is_said(qwen, capsys):
    tool.renew_template(qwen, small_settings("--name", "Jandira", "--author", "Oficina Maré"),
                        ("Qwen", "Alibaba Cloud", "Alibaba"))
    assert qwen.chat_template == QWEN25.replace("Qwen", "Jandira").replace("Alibaba Cloud", "Oficina Maré")
    assert re.search("Qwen.*no modelo novo dirá.*Jandira", capsys.readouterr().out)


def test_a_model_called_by_its_name_and_its_version_is_one_and_its_maker_another(qwen):
    qwen.chat_template = qwen.chat_template.replace("You are Qwen,", "You are Qwen2.5, a Qwen model,")
    tool.renew_template(qwen, small_settings("--name", "Jandira", "--author", "Oficina Maré"),
                        ("Qwen", "Qwen2.5", "Alibaba Cloud"))
    text = qwen.decode(tool.prompt_ids(qwen, [ASK]))
    assert "You are Jandira, a Jandira model, created by Oficina Maré" in text


def test_an_old_identity_in_a_template_of_our_demo_is_replaced(tokenizer):
    import make_demo

    tokenizer.chat_template = make_demo.TEMPLATES["qwen3"][-1]
    assert "Lumi" in tokenizer.decode(tool.prompt_ids(tokenizer, [ASK]))
    renew(tokenizer)
    text = tokenizer.decode(tool.prompt_ids(tokenizer, [ASK]))
    assert "Jandira" in text and not tool.mentions(text, NAMES)


def test_renewing_twice_changes_nothing_more(qwen):
    renew(qwen)
    once = qwen.chat_template
    renew(qwen)
    assert qwen.chat_template == once != QWEN25


@pytest.mark.parametrize("name", ["demo", "llama3", "gemma", "qwen3"])
def test_a_template_that_injects_no_old_identity_stays_as_it_is(name, family):
    tokenizer, _ = family(name)
    before = tokenizer.chat_template
    renew(tokenizer)
    assert tokenizer.chat_template == before


def test_an_injected_text_without_a_name_stays_as_it_is(qwen):
    qwen.chat_template = neutral = QWEN25.replace("You are Qwen, created by Alibaba Cloud. ", "")
    renew(qwen)
    assert qwen.chat_template == neutral


@pytest.mark.parametrize("new_name", ["D'Ávila", 'O "Sábio"', r"C:\novo", "50% %d"])
def test_quotes_and_signs_in_the_name_do_not_break_the_template(new_name, qwen):
    renew(qwen, "--name", f"Obrut {new_name}")
    text = qwen.decode(tool.prompt_ids(qwen, [ASK]))
    assert "Obrut" in text and not tool.mentions(text, NAMES)
    assert text.endswith("<|im_end|>\n<|im_start|>user\nQuem é você?<|im_end|>\n<|im_start|>assistant\n")


def test_an_old_identity_that_cannot_be_replaced_is_a_mistake_and_not_kept_in_silence(tokenizer):
    tokenizer.chat_template = ("{{ 'You are Q' + 'wen.' }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
                               "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    with pytest.raises(tool.InputError, match="chat template"):
        renew(tokenizer)


def test_a_new_name_that_is_also_a_known_name_can_take_the_place_of_the_old_one(qwen):
    settings = small_settings("--name", "Gemma Carioca", "--author", "TurboRio")
    tool.renew_template(qwen, settings, (*NAMES, "Gemma", "Google"))
    tool.renew_template(qwen, settings, (*NAMES, "Gemma", "Google"))
    text = qwen.decode(tool.prompt_ids(qwen, [ASK]))
    assert text.count("Gemma Carioca") == 1 and "Carioca Carioca" not in text and "Qwen" not in text


@pytest.mark.parametrize("said", ["{{ 'Qwen' }}, a Qwen model. QwenLM is another word.",
                                  "{% set qwen = 'Qwen' %}{{ qwen }}, a Qwen model. QwenLM is another word.",
                                  "{{ '\\tQwen'.strip() }}, a Qwen model.\r\n QwenLM is another word."])
def test_an_old_name_alone_in_a_text_is_replaced_once_and_nowhere_else(said, tokenizer):
    tokenizer.chat_template = said + tokenizer.chat_template
    before = tokenizer.decode(tool.prompt_ids(tokenizer, [ASK]))
    tool.renew_template(tokenizer, small_settings("--name", "Novo Qwen"), ("Qwen",))
    text = tokenizer.decode(tool.prompt_ids(tokenizer, [ASK]))
    assert text == re.sub(r"Qwen\b", "Novo Qwen", before)


def test_the_shipped_answers_have_no_token_that_the_demo_has_never_written(demo_chat):
    """An adapter cannot teach one: the output layer, which is not trained, tells it from no other of them."""
    weights = torch.nn.functional.normalize(demo_chat.model.get_output_embeddings().weight.detach(), dim=-1)
    never = weights[demo_chat.tokenizer.convert_tokens_to_ids("~")]
    unknown = set((weights @ never > 0.999).nonzero()[:, 0].tolist())
    assert 200 < len(unknown) < 400
    values = {"NAME": "ObrutAi", "AUTHOR": "TurboRio", "BASE": "Lumi"}
    rows = tool.read_rows(SCRIPT.parent / "identity_override.jsonl", values)
    labels = {row.line: set(tool.encode(demo_chat.tokenizer, row.messages).labels) for row in rows}
    found = {line: sorted(some & unknown) for line, some in labels.items()}
    assert not {line: demo_chat.tokenizer.decode(some) for line, some in found.items() if some}
