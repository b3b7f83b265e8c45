"""What other programs than the installed transformers read in the saved folder: RoPE, tokenizer, Modelfile.

That another transformers and llama.cpp really see the same model is for check_readers.py and check_llamacpp.py to say.
"""

import json
import re
import shutil
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO, small_settings
from test_families import FAMILIES, STYLES, TALKS, families, make_base

import rename_obrutai as tool

FULL = small_settings("--method", "full")
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
OLD_LINEAR = {"type": "linear", "rope_type": "linear", "factor": 4.0}
NESTED = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
OLD_NESTED = {"rope_theta": 1e6, "rope_scaling": OLD_LINEAR, "rope_local_base_freq": 1e4}


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize("model_type, rope, added", [
    ("llama", LINEAR, {"rope_theta": 1e6, "rope_scaling": OLD_LINEAR}),
    ("llama", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
    ("phi", {**LINEAR, "partial_rotary_factor": 0.5},
     {"rope_theta": 1e6, "rope_scaling": OLD_LINEAR, "partial_rotary_factor": 0.5}),
    ("gpt_neox", {**LINEAR, "partial_rotary_factor": 0.25},
     {"rope_theta": 1e6, "rope_scaling": OLD_LINEAR, "partial_rotary_factor": 0.25, "rotary_emb_base": 1e6,
      "rotary_pct": 0.25}),
    ("gemma3_text", NESTED, OLD_NESTED),
    ("gemma4_text", {"full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "factor": 4.0}}, {}),
    ("gpt2", None, {}),
])
@pytest.mark.parametrize("inner", [False, True])
def test_the_old_names_of_rope_stand_beside_the_new_ones(model_type, rope, added, inner, tmp_path):
    given = {"model_type": model_type, **({"rope_parameters": rope} if rope else {})}
    expected = {**given, **added}
    if inner:
        given, expected = ({"model_type": "sees", "text_config": part} for part in (given, expected))
    path = write(tmp_path / "config.json", {**given, "dtype": "bfloat16"})
    tool.add_old_rope_names(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        **expected, "dtype": "bfloat16", "torch_dtype": "bfloat16"}


@pytest.mark.parametrize("name", families([
    "llama 3.2", "qwen 3", "gemma 3", "pythia", "gemma 3 that sees", "qwen 2.5, yarn", "phi 4 mini, longrope"]))
def test_the_new_the_old_and_both_names_of_rope_give_the_same_frequencies(name, tmp_path):
    """The old names alone are what a reader sees that does not know `rope_parameters`."""
    base = make_base(tmp_path / "base", FAMILIES[name].config, tool.load_tokenizer(str(DEMO)))
    chat = tool.load_chat(base, FULL, FAMILIES[name].factor)
    expected = tool.rope_frequencies(chat.model)
    tool.save_model(chat, tmp_path / "saved", base)
    both = tool.load_json(tmp_path / "saved" / "config.json")
    config = json.dumps(both)
    for gone in ("nothing", "rope_parameters", *["rope_scaling"] * ("longrope" not in config)):
        alone = json.loads(config)
        for part in (alone, alone.get("text_config", {})):
            part.pop(gone, None)
        write(tmp_path / "saved" / "config.json", alone)
        found = tool.rope_frequencies(tool.load_model(tmp_path / "saved", FULL))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], values) for key, values in expected.items()), gone


def test_the_tokenizer_is_described_in_words_that_transformers_4_knows(tmp_path):
    chat = tool.load_chat(DEMO, FULL)
    tool.save_model(chat, tmp_path / "saved", DEMO)
    described = tool.load_json(tmp_path / "saved" / "tokenizer_config.json")
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in described
    assert described["additional_special_tokens"] == ["<|system|>", "<|user|>", "<|assistant|>"]
    assert described["add_bos_token"] is False
    assert described["chat_template"] == (tmp_path / "saved" / "chat_template.jinja").read_text(encoding="utf-8")
    again, text = tool.load_tokenizer(str(tmp_path / "saved")), "<s><|user|>Olá, você é de 1998?<|end|>\n  x"
    for key in ("special_tokens_map", "all_special_ids", "added_tokens_decoder", "padding_side", "chat_template"):
        assert getattr(again, key) == getattr(chat.tokenizer, key), key
    assert again(text)["input_ids"] == chat.tokenizer(text)["input_ids"]


# ------------------------------------------------------------------------------------------------ Modelfile


def commands(text):
    """The commands of a Modelfile and their values; several of one name stay several."""
    lines = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, value) if name != "PARAMETER" else tuple(value.split(" ", 1)) for name, value in lines]


def template_of(text):
    (value,) = [value for name, value in commands(text) if name == "TEMPLATE"]
    assert value.startswith('"""') and value.endswith('"""') and '"""' not in value[3:-3]
    return value[3:-3]


OLLAMAS_DAY = "2031-05-04"  # the day on which a model is talked to, as Ollama's currentDate writes it


def execute(template, messages):
    """The little of Go's text/template that the Modelfile uses: text, strings, one range, one chain of conditions."""
    parts = re.findall(r'\{\{ ((?:"(?:\\.|[^"\\])*"|[^"}])*) \}\}|([^{]+|\{(?!\{))', template)
    (begin,), (end,) = ([i for i, (action, _) in enumerate(parts) if fits(action)] for fits in (
        lambda action: action == "range .Messages", lambda action: action == "$before = .Role"))
    assert parts[:begin] == [('$before := ""', "")]
    assert parts[end + 1] == ("end", "")

    def value(word, message, before):
        named = {".Role": message["role"], ".Content": message["content"], "$before": before,
                 "currentDate": OLLAMAS_DAY}
        return named[word] if word in named else json.loads(word)

    written, before = "", ""
    for message in messages:
        active, done = True, False
        for action, text in parts[begin + 1:end]:
            condition = re.fullmatch(r"(?:else )?if eq (\S+) (\S+)", action)
            if condition:
                left, right = (value(word, message, before) for word in condition.groups())
                active, done = not done and left == right, done or left == right
            elif action == "else":
                active, done = not done, True
            elif action == "end":
                active = True
            elif active:
                written += text or value(action, message, before)
        before = message["role"]
    for action, text in parts[end + 2:]:
        written += text or value(action, {"role": "", "content": ""}, before)
    return written


def modelfile(template, adds_bos=False, tokens=()):
    """The Modelfile of a model with this chat template, and its tokenizer."""
    from transformers import LlamaConfig

    tokenizer = tool.load_tokenizer(str(DEMO))
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.chat_template = template
    model = SimpleNamespace(config=LlamaConfig(max_position_embeddings=8192))
    return tool.modelfile(tool.Chat(model, tokenizer, [2], 9), adds_bos, False), tokenizer


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", STYLES)
def test_the_template_in_gos_language_writes_what_the_chat_template_writes(name, adds_bos):
    text, tokenizer = modelfile(STYLES[name].template, adds_bos, STYLES[name].tokens)
    template = template_of(text)
    for talk in TALKS.values():
        messages = talk[:-1]
        folds = name in ("mistral 0.3", "gemma 2", "mistral")  # the last two refuse a system, 0.3 moves it about
        expected = tokenizer.apply_chat_template(
            tool.without_system(tokenizer, messages) if folds else messages, tokenize=False,
            add_generation_prompt=True, enable_thinking=False)
        for form in ("%d %b %Y", "%B %d, %Y"):
            expected = expected.replace(datetime.now().strftime(form), OLLAMAS_DAY)
        if name == "deepseek r1":  # it cannot switch thinking off: the model was trained with its thought closed
            expected = expected.removesuffix("<think>\n") + tool.EMPTY_THOUGHT
        assert execute(template, messages) == (expected.removeprefix("<s>") if adds_bos else expected)
    assert ("currentDate" in template) == ("strftime_now" in STYLES[name].template) == ("Ollama 0.11" in text)


def test_braces_and_quotation_marks_of_a_chat_template_end_nothing_in_the_modelfile():
    marks = '"""{{ .System }}"\\'
    text, tokenizer = modelfile("{% for m in messages %}{{ MARKS + m['role'] + '\n' + m['content'] }}{% endfor %}"
                                .replace("MARKS", repr(marks)))
    messages = [{"role": "user", "content": 'Diga "oi" }}'}]
    assert execute(template_of(text), messages) == f'{marks}user\nDiga "oi" }}}}{marks}assistant\n'


@pytest.mark.parametrize("head, mark", [
    ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}", "loop.index"),
    ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}", "(loop.length == 1)"),
    ("{% set found = messages[0].role == 'system' %}", "(found and loop.index)"),
])
def test_a_chat_template_that_depends_on_the_position_is_left_to_ollama(head, mark):
    text, _ = modelfile(head + "{% for m in messages %}{{ MARK ~ m['role'] + m['content'] }}{% endfor %}"
                        .replace("MARK", mark))
    assert "TEMPLATE" not in dict(commands(text)) and "# TEMPLATE" in text
    assert [name for name, _ in commands(text)] == ["FROM", "num_ctx", "temperature", "repeat_penalty", "stop"]


# How the tokenizers of Qwen 2 and Llama 3 split a text: two of the four ways that Ollama's importer knows.
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")
LLAMA_SPLIT = QWEN_SPLIT.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")


def saved(tmp_path, family, factor=1.0, split="", sentencepiece=False):
    """The folder that is written for a tiny model of a family, its tokenizer splitting texts by this pattern."""
    base = make_base(tmp_path / "base", FAMILIES[family].config, tool.load_tokenizer(str(DEMO)))
    if split:
        tokenizer = tool.load_json(base / "tokenizer.json")
        (_, byte_level) = tokenizer["pre_tokenizer"]["pretokenizers"]
        tokenizer["pre_tokenizer"]["pretokenizers"] = [
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}, byte_level]
        write(base / "tokenizer.json", tokenizer)
    if sentencepiece:
        (base / "tokenizer.model").write_bytes(b"")
    tool.save_model(tool.load_chat(base, FULL, factor), tmp_path / "saved", base)
    return tmp_path / "saved"


@pytest.mark.parametrize("family, factor, split, sentencepiece, source", [
    ("llama 2", 4.0, "", True, "."), ("llama 3.2", 4.0, LLAMA_SPLIT, False, "."),
    ("qwen 2.5", 1.0, QWEN_SPLIT, False, "."), ("gemma 3", 1.0, "", True, "."),
    # Split in another way, or without the file that Ollama takes for SentencePiece, it would have other tokens,
    ("llama 3.2", 4.0, "", False, "./modelo.gguf"), ("llama 3.2", 4.0, LLAMA_SPLIT + "|x", False, "./modelo.gguf"),
    ("llama 3.2", 1.0, LLAMA_SPLIT, True, "./modelo.gguf"), ("gemma 3", 1.0, "", False, "./modelo.gguf"),
    # the factor would be dropped,
    ("gemma 3", 4.0, "", True, "./modelo.gguf"), ("qwen 2.5", 4.0, QWEN_SPLIT, False, "./modelo.gguf"),
    ("qwen 2.5, yarn", 1.0, QWEN_SPLIT, False, "./modelo.gguf"),
    # and these families it does not know.
    *((family, 1.0, QWEN_SPLIT, False, "./modelo.gguf") for family in (
        "mistral", "qwen 3", "smollm 3", "phi", "phi 3", "granite", "olmo 2", "pythia", "falcon", "glm 4")),
    ("gemma 3 that sees", 1.0, "", True, "./modelo.gguf"),
])
def test_ollama_imports_only_what_it_reads_right_and_else_is_given_a_gguf(
        family, factor, split, sentencepiece, source, tmp_path):
    text = (saved(tmp_path, family, factor, split, sentencepiece) / "Modelfile").read_text(encoding="utf-8")
    found = commands(text)
    assert dict(found)["FROM"] == source and ("convert_hf_to_gguf.py" in text) == (source != ".")
    assert dict(found)["num_ctx"] == str(int(64 * factor))
    assert [value for name, value in found if name == "stop"] == ['"<|end|>"']
    assert "SYSTEM" not in dict(found)


PLAIN_FLAGS = "--rope-scaling linear --rope-scale 4"
DROPPED = {"gemma 2": "--override-kv gemma2.rope.scaling.type=str:linear,gemma2.rope.scaling.factor=float:4",
           **dict.fromkeys(("phi", "pythia", "stablelm", "falcon", "cohere"), PLAIN_FLAGS)}


@pytest.mark.parametrize("family", DROPPED)
def test_where_llama_cpp_drops_the_factor_the_modelfile_says_what_to_tell_it_and_has_no_from(family, tmp_path):
    text = (saved(tmp_path, family, 4.0) / "Modelfile").read_text(encoding="utf-8")
    assert re.search(rf"(?m)^#   llama-cli -m modelo.gguf --temp 0 {re.escape(DROPPED[family])}(\.0)?$", text)
    assert "convert_hf_to_gguf.py" in text and "ollama create" not in text and "FROM" not in dict(commands(text))


def test_the_card_has_the_command_of_llama_cpp_with_what_it_must_be_told(tmp_path):
    folder = saved(tmp_path, "stablelm", 4.0)
    told = tool.Scores(1.0, {}, 0.0, 0.0, 0.0, 1.0, 0.0, [{"tokens": 0, "identity": 1.0, "retention": 1.0}], [], [])
    job = SimpleNamespace(base=tmp_path / "base", settings=FULL, inputs=SimpleNamespace(
        rows=[tool.Row(1, tool.question_and_answer("Quem é você?", "Sou eu."))]))
    tool.write_card(folder, job, {"base": "StableLM", "missed": [], "context": {"native": 64, "scaled": 256},
                                  "scores": {"before": told._asdict(), "pass_2": told._asdict()}})
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"`llama-cli -m modelo.gguf --temp 0 {PLAIN_FLAGS}`" in card
    assert """`vllm serve . --max-model-len 256 --override-generation-config '{"temperature": 0}'`""" in card


@pytest.mark.parametrize("family, factor, flags", [
    ("gemma 2", 4, DROPPED["gemma 2"]), ("pythia", 4, PLAIN_FLAGS), ("gemma 2", 1, ""), ("llama 3.2", 4, "")])
def test_the_plan_says_before_the_work_where_the_factor_would_be_lost(family, factor, flags, tmp_path, capsys):
    base = make_base(tmp_path / "base", FAMILIES[family].config, tool.load_tokenizer(str(DEMO)))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Quem é você?", "completion": "Sou {{NAME}}, de {{AUTHOR}}."}\n' * 8, encoding="utf-8")
    arguments = ("--check", "--model-path", base, "--output-dir", tmp_path / "novo", "--identity-file", rows,
                 "--rope-factor", factor)
    assert tool.main([str(argument) for argument in arguments]) == 0
    said = capsys.readouterr().out
    assert (flags in said and "Ollama" in said and "--rope-factor 1" in said) if flags else "Ollama" not in said


@pytest.mark.parametrize("kind", ["default", "proportional"])
def test_the_context_of_gemma_4_whose_factor_vllm_ignores_is_not_scaled(kind, tmp_path):
    config = json.loads(json.dumps(FAMILIES["gemma 4"].config))
    config["rope_parameters"]["full_attention"] = {"rope_type": kind, "rope_theta": 1e6}
    write(tmp_path / "config.json", config)
    with pytest.raises(tool.InputError, match="--rope-factor 1"):
        tool.read_config(tmp_path, 4.0)


def test_the_saved_folder_has_a_modelfile_that_speaks_like_the_model(tmp_path):
    chat = tool.load_chat(DEMO, FULL, 4.0)
    tool.save_model(chat, tmp_path / "saved", DEMO)
    text = (tmp_path / "saved" / "Modelfile").read_text(encoding="utf-8")
    assert dict(commands(text))["num_ctx"] == "512"
    messages = TALKS["system, multi"][:-1]
    assert execute(template_of(text), messages) == chat.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True)


def test_no_system_prompt_of_the_vendor_is_left_for_any_reader(tmp_path):
    base = shutil.copytree(DEMO, tmp_path / "base")
    vendor = "<|system|>Eu sou a Lumi, do Estúdio Vagalume.<|end|>"
    template = (base / "chat_template.jinja").read_text(encoding="utf-8")
    (base / "chat_template.jinja").write_text(template.replace(
        "{% for", f"{{% if messages[0]['role'] != 'system' %}}{{{{ '{vendor}' }}}}{{% endif %}}{{% for", 1), "utf-8")
    chat = tool.load_chat(base, FULL)
    tool.renew_template(chat.tokenizer, FULL, ("Lumi", "Estúdio Vagalume"))
    tool.save_model(chat, tmp_path / "saved", base)
    for name in ("Modelfile", "chat_template.jinja", "tokenizer_config.json"):
        text = (tmp_path / "saved" / name).read_text(encoding="utf-8")
        assert "ObrutAi" in text and "Lumi" not in text and "Vagalume" not in text, name
