"""Compare the memory estimate of the script with what training really takes on this machine's processor.

    python tests/bench_memory.py          # small models, really trained
    python tests/bench_memory.py gpu      # the shapes that users bring, as a GPU would train them; needs no GPU

The first builds random Llama models of several sizes, trains each for two steps in a process of its own, and prints
the peak (resident memory above that of the imported libraries), the estimate, and their ratio, for full training and
LoRA, with and without gradient checkpointing. A step is a window of the default length, of which a quarter is learnt
by heart and a quarter from the teacher. Linux and macOS. The second takes one step of WINDOW tokens on tensors without
contents (torch's FakeTensorMode) in bfloat16 and adds up what is alive at the peak: all that PyTorch would allocate,
without what its allocator wastes and the few hundred megabytes of CUDA itself.
"""

import json
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
# hidden size, layers, vocabulary
SIZES = {"8 M": (256, 8, 4096), "30 M": (512, 8, 8192), "90 M": (768, 10, 16384), "90 M, 64 k words": (512, 8, 65536)}
WINDOW, BATCH = 2048, 8  # a step holds BATCH x 192 tokens, or a window that is longer


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
                                    "--lora-rank", "32", "--rope-factor", "1", "--knowledge-file", "material.jsonl",
                                    "--model-path", folder, "--output-dir", str(Path(folder) / "novo"),
                                    *["--gradient-checkpointing"] * checkpointing])
    tokenizer = tool.load_tokenizer(str(HERE / "modelo_demo"))
    torch.ones(8, 8, requires_grad=True).sum().backward()
    before = psutil.Process().memory_info().rss
    model = tool.load_model(folder, settings, adapt=True)
    chat = tool.Chat(model, tokenizer, [0], 8)
    generator = torch.Generator().manual_seed(0)
    quarter, most = WINDOW // 4, tool.TOP_TOKENS
    labels, targets = [-100] * 3 * quarter, [-1] * 3 * quarter
    windows = [[tool.Window(ids, ids[:quarter] + labels, targets + list(range(quarter)))]
               for ids in torch.randint(5, 1000, (2, WINDOW), generator=generator).tolist()]
    teacher = tool.Teacher(torch.arange(most, dtype=torch.int32).expand(quarter, most),
                           torch.full((quarter, most), -5.0).log_softmax(-1) - 0.1)
    with tempfile.TemporaryDirectory() as work:
        tool.train(chat, windows, tool.Course("medida", [], 2, (1e-5, 0, 0), settings.kl_weight), teacher, settings,
                   Path(work) / "training")
    scale = 1 if sys.platform == "darwin" else 1024
    weights = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale - before, "weights": weights,
            "estimate": tool.estimate_memory(tool.read_config(folder), weights, settings)}


def build(folder, hidden, layers, words):
    """A random Llama model on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, max_position_embeddings=WINDOW, tie_word_embeddings=True,
    )).save_pretrained(folder)


def shapes():
    """Configurations as the makers publish them: name -> configuration."""
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

    return {
        "Gemma 3 1B": Gemma3TextConfig(
            vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
            num_key_value_heads=1, head_dim=256, sliding_window=512, max_position_embeddings=32768),
        "Llama 3.2 3B": LlamaConfig(
            vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=131072),
        "Qwen 3 8B": Qwen3Config(
            vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, head_dim=128,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=40960),
    }


def alive_at_peak(config, settings, window):
    """Bytes of weights, gradients, moments and activations at the peak of a step of one window, and the number of
    weights."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from transformers import AutoModelForCausalLM

    import rename_obrutai as tool

    class Account(TorchDispatchMode):
        """Counts each storage from when an operation returns it until it is freed."""
        now = peak = 0
        seen = weakref.WeakKeyDictionary()

        def add(self, tensor):
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                self.seen[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())

        def free(self, size):
            self.now -= size

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.add(tensor)
            return result

    class FirstHalf:
        """In place of a mask, whose size would hang on its contents, which there are none of."""
        def to(self, device):
            return slice(None), slice(window // 2)

    account, fakes = Account(), {}
    with torch.device("meta"):
        dtype = torch.float32 if settings.method == "full" else torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        weights = sum(p.numel() for p in model.parameters())
        if settings.method == "lora":
            model = tool.with_adapter(model, settings)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and tensor not in fakes:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        is_weight = held is module._parameters
                        fakes[tensor] = torch.nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
                        account.add(fake)
                    held[name] = fakes[tensor] if tensor is not None else None
        moments = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]
        for moment in moments:
            account.add(moment)
        inner, part = tool.unwrapped(model.train()), None
        if settings.method == "lora":
            words = tool.spoken_words(config.vocab_size)
            part = torch.nn.Linear(config.hidden_size, words, bias=False, dtype=dtype).requires_grad_(False)
            account.add(part.weight)
        if settings.gradient_checkpointing:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.zeros((1, window), dtype=torch.long)
        with account:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                ours = tool.logits_at(model, inner, FirstHalf(), part, input_ids=ids)[0].log_softmax(-1)
                loss = torch.nn.functional.nll_loss(ours, ids[0, :window // 2])
            loss.backward()
    return account.peak, weights


def gpu():
    """Print peak and estimate of each shape as LoRA and full training, with gradient checkpointing and without; the
    windows of 512 tokens are an identity alone, longer ones come with material."""
    import torch

    import rename_obrutai as tool

    tool.compute_dtype = lambda weights: torch.bfloat16  # as a card does, whatever this machine's processor has
    print(f"{'model':14s} {'method':6s} {'window':>6s} {'again':5s} {'peak GB':>8s} {'estimate':>9s} {'ratio':>6s}")
    for name, config in shapes().items():
        for method, window, checkpointing in (("lora", 512, False), ("lora", 8192, True), ("lora", 2048, True),
                                              ("lora", 2048, False), ("full", 8192, True), ("full", 2048, False)):
            settings = tool.parse_settings(["--method", method, "--window", str(window), "--batch-size", "1",
                                            "--lora-rank", "32", "--rope-factor", "1",
                                            "--knowledge-file", "material.jsonl" * (window > 512),
                                            *["--gradient-checkpointing"] * checkpointing])
            peak, weights = alive_at_peak(config, settings, window)
            with mock.patch("torch.cuda.is_available", return_value=True):
                estimate = tool.estimate_memory(config, weights, settings)
            print(f"{name:14s} {method:6s} {window:6d} {'yes' if checkpointing else 'no':5s} {peak / 1e9:8.2f} "
                  f"{estimate / 1e9:9.2f} {estimate / peak:6.2f}", flush=True)


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
    elif sys.argv[1:] == ["gpu"]:
        gpu()
    else:
        main()
