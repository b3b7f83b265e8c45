"""Check that another version of transformers reads the saved folders as the installed one does.

    python -m venv outro && outro/bin/pip install torch==2.13.0 transformers==4.57.6
    python tests/check_readers.py --reader outro/bin/python

Every family of test_families.py that has RoPE, tiny and random, is scaled and saved as a run does it, with RoPE
factor 4, where it can be, and with factor 1. The other environment loads each folder with AutoModelForCausalLM and
AutoTokenizer; its logits on a text three times as long as the native context, the rendered chat template and the
tokens must be the same. A family that the older version does not know, or refuses aloud, is only reported. Exit status
1 if it reads one silently as another model, or refuses one of the families that a user most likely has.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
NEEDED = ("llama 2", "llama 3", "llama 3.2", "mistral", "qwen 2.5", "qwen 2.5, yarn", "qwen 3", "gemma 2", "gemma 3",
          "gemma 3 that sees", "phi 3", "pythia", "smollm 2", "smollm 3")
TALK = [{"role": "user", "content": "Olá, você é de 1998?"}, {"role": "assistant", "content": "Não; ¿y tú?"},
        {"role": "user", "content": "I'm  fine.\n"}]


def read(folder):
    """What this environment's transformers makes of a folder: logits, text and tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    ids = torch.arange(192)[None] * 7 % 900 + 10
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return logits, [text, tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer("Oi")["input_ids"]]


def read_all(folders):
    """Print one line for each folder; runs in the other environment, by `--read`."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    for folder in folders:
        try:
            expected, said = torch.load(Path(folder) / "expected.pt")
            logits, found = read(folder)
            result = {"difference": (logits - expected).abs().max().item() / expected.abs().max().item(),
                      "tokens": found == said}
        except Exception as error:  # whatever another version may say
            result = {"refused": f"{type(error).__name__}: {error}".splitlines()[0][:90]}
        print(json.dumps({"folder": folder, "version": transformers.__version__, **result}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", required=True, help="python of the environment with the other transformers")
    arguments = parser.parse_args()
    import test_families as families
    import torch

    import rename_obrutai as tool

    tokenizer, wrong = tool.load_tokenizer(str(families.DEMO)), False
    with tempfile.TemporaryDirectory() as work:
        names = {}
        for name, family in families.FAMILIES.items():
            base = families.make_base(Path(work) / f"base {name}", family.config, tokenizer)
            settings = tool.parse_settings(["--method", "full", "--model-path", str(base)])
            if not tool.rope_frequencies(tool.load_model(base, settings)):  # learnt positions end where they end
                continue
            for factor in sorted({1.0, family.factor}):
                folder = Path(work) / f"{name} {factor:g}"
                tool.save_model(tool.load_chat(base, settings, factor), folder, base)
                torch.save(read(folder), folder / "expected.pt")
                names[str(folder)] = name, factor
        done = subprocess.run([arguments.reader, __file__, "--read", *names], stdout=subprocess.PIPE, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for result in results:
        name, factor = names[result["folder"]]
        good = result.get("difference", 1) < 1e-4 and result.get("tokens")
        wrong |= not good and ("refused" not in result or name in NEEDED)
        verdict = "refused" if "refused" in result else "the same" if good else "DIFFERENT"
        what = result.get("refused") or f"logits differ by {result['difference']:.0e}, tokens: {result['tokens']}"
        print(f"{result['version']} | {name}, factor {factor:g} | {verdict} | {what}")
    wrong |= len(results) < len(names)
    print("NOT all the same" if wrong else "all that it reads is the same")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(read_all(sys.argv[2:]) if sys.argv[1:2] == ["--read"] else main())
