"""Compare the memory estimate of the script with what training really takes on this machine's processor.

    python tests/bench_memory.py

Builds random Llama models of several sizes, trains each for two steps in a process of its own, and prints the peak
(resident memory above that of the imported libraries), the estimate, and their ratio, for full training and LoRA, with
and without gradient checkpointing. Linux and macOS.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
# hidden size, layers, vocabulary
SIZES = {"8 M": (256, 8, 4096), "30 M": (512, 8, 8192), "90 M": (768, 10, 16384), "90 M, 64 k words": (512, 8, 65536)}
WINDOW, BATCH = 512, 4


def measure(folder, method, checkpointing):
    """Peak bytes above the imported libraries, and the script's estimate; runs in a process of its own."""
    import resource

    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import psutil
    import torch
    import trl  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    import rename_obrutai as tool

    settings = tool.parse_settings(["--method", method, "--window", str(WINDOW), "--batch-size", str(BATCH),
                                    "--model-path", folder, *["--gradient-checkpointing"] * checkpointing])
    tokenizer = tool.load_tokenizer(str(HERE / "modelo_demo"))
    torch.ones(8, 8, requires_grad=True).sum().backward()
    before = psutil.Process().memory_info().rss
    model = tool.load_model(folder, settings, adapt=True)
    chat = tool.Chat(model, tokenizer, [0], 8, 1024)
    generator = torch.Generator().manual_seed(0)
    windows = [[{"input_ids": ids, "labels": ids, "targets": [-1] * WINDOW}
                for ids in torch.randint(5, 1000, (BATCH, WINDOW), generator=generator).tolist()] for _ in range(2)]
    with tempfile.TemporaryDirectory() as work:
        tool.train(chat, windows, None, 1e-5, 0.0, settings, "medida", Path(work) / "training")
    scale = 1 if sys.platform == "darwin" else 1024
    weights = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale - before, "weights": weights,
            "estimate": tool.estimate_memory(tool.read_config(folder), weights, settings, False)}


def build(folder, hidden, layers, words):
    """A random Llama model on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, max_position_embeddings=WINDOW, tie_word_embeddings=True,
    )).save_pretrained(folder)


def main():
    print(f"{'model':18s} {'method':6s} {'again':5s} {'peak MB':>9s} {'estimate':>9s} {'ratio':>6s}")
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            build(folder, *size)
            for method, checkpointing in (("full", False), ("full", True), ("lora", False), ("lora", True)):
                done = subprocess.run([sys.executable, __file__, "measure", folder, method, str(int(checkpointing))],
                                      capture_output=True, text=True, check=True)
                figures = json.loads(done.stdout.splitlines()[-1])
                print(f"{name:18s} {method:6s} {'yes' if checkpointing else 'no':5s} {figures['peak'] / 1e6:9.0f} "
                      f"{figures['estimate'] / 1e6:9.0f} {figures['estimate'] / figures['peak']:6.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], sys.argv[4] == "1")))
    else:
        main()
