"""Check that llama.cpp gives the same answers as transformers to a finished model, along the whole scaled context.

    pip install -r tests/requirements.txt llama-cpp-python==0.3.36 sentencepiece
    pip download --no-binary :all: --no-deps llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    python tests/check_llamacpp.py --model ObrutAi-tuned --source llama_cpp_python-0.3.36/vendor/llama.cpp

Converts the folder with llama.cpp's own converter, as a user would, and asks both the test questions greedily through
their chat interfaces, alone and after conversations of several lengths. As a control it converts the same weights with
the RoPE factor taken out of config.json. Exit status 1 if the answers differ too often, or if the control's do not:
then the factor would not have been needed. `--converter-python` runs the converter in another environment, for example
one with the transformers 4.57.6 that llama.cpp asks for.

`--tiny` in place of `--model` compares the next token after each of 192 tokens on tiny random models of other
architectures, scaled from 64 to 256 tokens. Where the converter drops the factor, llama.cpp is told it by the flags
that the Modelfile of such a model has. (Pythia needs --converter-python with transformers 4.57.6.)

`--types bfloat16 f16 q8_0 q4_k_m` with `--model` asks bench_real.py's questions instead, greedily, and lets its judge
count, a column for each type of file; bfloat16 is transformers. Exit status 1 if a type has the identity clearly less
often than the first one. llama.cpp keeps rows that 256 does not divide at more bits than a type's name says.
"""

import argparse
import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
ENOUGH, TOO_MUCH = 0.95, 0.5  # shares of equal answers: of the model at every length, of the control past the native
# Families of test_families.py, and what llama.cpp does not read from their configurations, or not of ones so small.
TINY = {"llama 2": {}, "llama 3.2": {}, "mistral": {"sliding_window": None}, "qwen 3": {}, "mixtral": {},
        "gemma 3": {"num_hidden_layers": 7, "sliding_window_pattern": 6},  # its global layers are every sixth
        "smollm 3": {}, "granite": {}, "olmo 2": {}, "llama 4": {"attention_chunk_size": 8192}, "gemma 2": {},
        "phi": {"intermediate_size": 128}, "pythia": {}, "stablelm": {}, "cohere": {"use_qk_norm": False},
        "falcon": {"multi_query": False, "new_decoder_architecture": True, "num_kv_heads": 2}}
MOST = 48  # tokens of an answer
LOST = 0.03  # share of the identity that a type of file may cost
DEMO_PRE_TOKENIZER = "smollm"  # single digits, then GPT-2's pattern: what the demo's tokenizer.json says as well


def convert(source, folder, target):
    """llama.cpp's converter, told which pre-tokenizer the demo has: it knows those of published models by a hash.

    It runs as a process of its own, by `--convert`. Whether the tokens are the same is checked afterwards.
    """
    sys.path.insert(0, source)
    import convert_hf_to_gguf
    from conversion.base import TextModel

    original = TextModel.get_vocab_base_pre

    def known_or_demo(self, tokenizer):
        try:
            return original(self, tokenizer)
        except NotImplementedError:
            print(f"unknown pre-tokenizer, taken for {DEMO_PRE_TOKENIZER}", file=sys.stderr)
            return DEMO_PRE_TOKENIZER

    TextModel.get_vocab_base_pre = known_or_demo
    if not (Path(folder) / "tokenizer.model").exists():  # a tiny Gemma 2 has the demo's tokenizer
        TextModel._set_vocab_sentencepiece = lambda self, *_, **__: self._set_vocab_gpt2()
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", target, "--outtype", "f16"]
    convert_hf_to_gguf.main()


def without_factor(folder, target):
    """A copy of the model whose config.json says nothing of a RoPE scaling."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config", {})):
        part.pop("rope_scaling", None)
        rope = part.get("rope_parameters", {})
        wide = rope.get("full_attention", rope)
        for key in wide.keys() - {"rope_theta", "partial_rotary_factor", "full_attention", "sliding_attention"}:
            del wide[key]
        wide["rope_type"] = "default"
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def ask_llamacpp(file, conversations, prompts, context, max_tokens):
    """Greedy answers through the chat interface. The first disagreement about tokens ends the check."""
    from llama_cpp import Llama

    llama = Llama(model_path=str(file), n_ctx=context, seed=0, verbose=False)
    shown = {key: value for key, value in llama.metadata.items() if "rope" in key or "context_length" in key}
    print(f"  {file.name}: {shown}")
    answers = []
    for conversation, (text, ids) in zip(conversations, prompts):
        found = llama.tokenize(text.encode(), add_bos=False, special=True)
        if found != ids:
            raise SystemExit(f"other tokens for {text!r}:\n  {ids}\n  {found}")
        done = llama.create_chat_completion(conversation, temperature=0, repeat_penalty=1.0, max_tokens=max_tokens)
        answers.append(done["choices"][0]["message"]["content"].strip())
    return answers


def check_types(converter, work, arguments):
    """bench_real.py's questions and judge, for each type of file; whether one lost the identity of the first."""
    import bench_real
    import llama_cpp
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    report = json.loads((arguments.model / "report.json").read_text(encoding="utf-8"))
    name, maker = (report["settings"][key] for key in ("name", "author"))
    old = bench_real.family(report["base"], tokenizer)
    asked = bench_real.questions(arguments.languages.split(","), name, maker, (old * 2)[:2])
    asked = {kind: bench_real.spread(asked[kind], arguments.limit or len(asked[kind])) for kind in arguments.kinds}
    flat = [question for group in asked.values() for question in group]
    ids = [bench_real.prompt_ids(tokenizer, question.messages) for question in flat]
    prompts = list(zip(map(tokenizer.decode, ids), ids))
    work.mkdir(parents=True, exist_ok=True)
    whole, answers, columns, right = work / "f16.gguf", {}, {}, {}
    if not whole.exists():
        subprocess.run([*converter, str(arguments.model), str(whole)], check=True)
    print(f"{len(flat)} questions: " + ", ".join(f"{kind} {len(group)}" for kind, group in asked.items()), flush=True)
    for kind in arguments.types:
        file = work / f"{kind}.gguf"
        if kind == "bfloat16":
            given = bench_real.answers(bench_real.load(arguments.model)[0], tokenizer, flat, MOST)
        else:
            if not file.exists():
                options = llama_cpp.llama_model_quantize_default_params()
                options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
                if llama_cpp.llama_model_quantize(str(whole).encode(), str(file).encode(), ctypes.byref(options)):
                    raise SystemExit(f"llama.cpp did not quantize to {kind}")
            given = ask_llamacpp(file, [q.messages for q in flat], prompts, max(map(len, ids)) + MOST + 8, MOST)
        answers[kind] = dict(zip(flat, given))
        verdicts = {q: bench_real.judge(q, text, name, maker, old) for q, text in answers[kind].items()}
        columns[kind] = bench_real.figures_of(asked, answers[kind], verdicts, (name, maker))
        first = answers[arguments.types[0]]
        columns[kind][f"same answer as {arguments.types[0]}"] = bench_real.share(
            first[q] == text for q, text in answers[kind].items())
        right[kind] = [bool(verdicts[q]) for q in flat if q.expects != "nothing"]
        print(f"{kind}: identity {bench_real.share(right[kind])}", flush=True)
        if arguments.show:
            shown = [{"kind": q.kind, "language": q.language, "messages": q.messages,
                      **{kind: given[q] for kind, given in answers.items()}} for q in flat]
            arguments.show.write_text(json.dumps(shown, ensure_ascii=False, indent=1), encoding="utf-8")
    print(bench_real.table(columns))
    return min(map(sum, right.values())) < sum(right[arguments.types[0]]) - LOST * len(right[arguments.types[0]])


def as_options(flags):
    """Flags of llama.cpp's programs in the words of llama-cpp-python."""
    name, *values = flags.split() or [""]
    if name == "--override-kv":
        pairs = [pair.replace("=", ":").split(":") for pair in values[0].split(",")]
        return {"kv_overrides": {key: float(value) if kind == "float" else value for key, kind, value in pairs}}
    return {"rope_scaling_type": 1, "rope_freq_scale": 1 / float(values[-1])} if name else {}


def check_tiny(converter, work):
    """Share of equal next tokens for each family, and without the factor; whether any was too low."""
    import numpy as np
    import test_families as families
    import torch
    from llama_cpp import Llama

    import rename_obrutai as tool

    ids, wrong = torch.arange(192)[None] * 7 % 900 + 10, False
    for name, changes in TINY.items():
        config = {**families.FAMILIES[name].config, **changes}
        base = families.make_base(work / name, config, tool.load_tokenizer(str(families.DEMO)))
        chat = tool.load_chat(base, tool.parse_settings(["--method", "full", "--model-path", str(base)]), 4.0)
        with torch.inference_mode():
            expected = chat.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].argmax(-1).numpy()
        tool.save_model(chat, work / f"{name} saved", base)
        equal, flags = [], tool.llama_flags(chat.model.config)
        for folder in (work / f"{name} saved", without_factor(work / f"{name} saved", work / f"{name} without")):
            subprocess.run([*converter, str(folder), f"{folder}.gguf"], check=True)
            options = {} if "without" in folder.name else as_options(flags)
            llama = Llama(model_path=f"{folder}.gguf", n_ctx=256, logits_all=True, verbose=False, **options)
            llama.eval(ids[0].tolist())
            equal.append((np.array(llama.scores[:ids.shape[1]]).argmax(-1) == expected).mean())
            llama.close()
        print(f"{name}: next token equal after {equal[0]:.1%} of 192 tokens, without the factor {equal[1]:.1%}{flags}")
        wrong |= equal[0] < ENOUGH or equal[1] >= ENOUGH
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="folder that rename_obrutai.py wrote")
    what.add_argument("--tiny", action="store_true", help="tiny random models of several architectures")
    parser.add_argument("--source", required=True, help="folder of llama.cpp, with convert_hf_to_gguf.py")
    parser.add_argument("--converter-python", default=sys.executable)
    parser.add_argument("--lengths", type=int, nargs="+", default=[0, 120, 240, 360, 480])
    parser.add_argument("--types", nargs="+", help="such as bfloat16 f16 q8_0 q4_k_m: judge the model at each")
    parser.add_argument("--kinds", nargs="+", default=["name", "maker", "who", "denial", "system", "pressure", "near"])
    parser.add_argument("--languages", default="pt,en,es")
    parser.add_argument("--limit", type=int, help="only N questions of each kind")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="GGUF files there are used, and left there")
    parser.add_argument("--show", type=Path, metavar="FILE", help="write all questions and answers there, as JSON")
    arguments = parser.parse_args()
    converter = [arguments.converter_python, __file__, "--convert", arguments.source]
    if arguments.tiny:
        with tempfile.TemporaryDirectory() as work:
            return int(check_tiny(converter, Path(work)))
    if arguments.types:
        with tempfile.TemporaryDirectory() as work:
            return int(check_types(converter, arguments.keep or Path(work), arguments))
    import torch

    import rename_obrutai as tool

    tool.compute_dtype = lambda weights: torch.float32  # llama.cpp does not round to bfloat16
    chat = tool.load_chat(arguments.model, tool.parse_settings(["--method", "full", "--max-new-tokens", "48"]))
    native = tool.load_json(arguments.model / "report.json")["context"]["native"]
    exam, names, _ = tool.read_exam(arguments.model)
    name, fillers = names.name, [talk for tokens, talk in exam.talks if not tokens]
    alone = [messages for kind, messages in exam.questions if kind == tool.ALONE]
    asked = [(length, [*before, *messages]) for length in arguments.lengths for before, messages in zip(
        tool.long_conversations(chat.tokenizer, fillers, length, len(alone)), alone)]
    conversations = [conversation for _, conversation in asked]
    ids = [tool.prompt_ids(chat.tokenizer, c) for c in conversations]
    texts = [chat.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations]
    expected = [answer.text for answer in tool.generate(chat, ids)]
    context = max(map(len, ids)) + chat.max_new_tokens + 8
    with tempfile.TemporaryDirectory() as work:
        work, answers = Path(work), {}
        folders = {"model": arguments.model, "control": without_factor(arguments.model, work / "without")}
        for label, folder in folders.items():
            subprocess.run([*converter, str(folder), str(work / f"{label}.gguf")], check=True)
            answers[label] = ask_llamacpp(work / f"{label}.gguf", conversations, list(zip(texts, ids)), context,
                                          chat.max_new_tokens)
    print(f"{len(conversations)} prompts, the longest of {max(map(len, ids))} tokens: all with equal tokens")
    print("tokens before | equal answers | with the new name: transformers, llama.cpp | control: equal, with the name")
    wrong = False
    for length in arguments.lengths:
        at = [i for i, (n, _) in enumerate(asked) if n == length]
        equal = {label: sum(given[i] == expected[i] for i in at) / len(at) for label, given in answers.items()}
        named = [sum(name in given[i] for i in at) for given in (expected, answers["model"], answers["control"])]
        print(f"{length:13} | {equal['model']:13.1%} | {named[0]:3}, {named[1]:3} of {len(at)} {'':23} | "
              f"{equal['control']:.1%}, {named[2]}")
        wrong |= equal["model"] < ENOUGH or (length >= native and equal["control"] > TOO_MUCH)
    for i, (length, conversation) in enumerate(asked):
        if answers["model"][i] != expected[i]:
            print(f"  {length}: {conversation[-1]['content']}\n    {expected[i]}\n    {answers['model'][i]}")
    print("NOT the same model" if wrong else "the same model in both")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(convert(*sys.argv[2:]) if sys.argv[1:2] == ["--convert"] else main())
