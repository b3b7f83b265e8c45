"""Shared by all tests: tiny models built from configurations, the demo model, and a way to run the script."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest  # noqa: E402
import torch  # noqa: E402

import rename_obrutai as tool  # noqa: E402

torch.set_num_threads(1)

SCRIPT = Path(tool.__file__).resolve()
DEMO = SCRIPT.parent / "tests" / "modelo_demo"
THETA, LOCAL_THETA, HEAD = 10000.0, 500.0, 16


def small_settings(*flags):
    """The script's settings, with flags, as the command line makes them; steps of 8, rank 32 where none is said."""
    return tool.parse_settings(["--batch-size", "8", "--lora-rank", "32", *map(str, flags)])


def changed(record, **values):
    """A copy of a small record of the script with other values."""
    return record._replace(**values) if hasattr(record, "_replace") else dataclasses.replace(record, **values)


def run_script(*arguments, cwd, env=None):
    """Run the script in a process of its own; text output and exit status."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, env=environment,
                          capture_output=True, text=True, encoding="utf-8", timeout=300)


def tiny_config(architecture, tokenizer):
    """Two layers of width 32, weights large enough that positions change the logits."""
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

    common = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=2, num_key_value_heads=2, head_dim=HEAD, max_position_embeddings=64,
                  initializer_range=0.3, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
                  eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    rope = {"rope_type": "default", "rope_theta": THETA}
    if architecture == "gemma3":
        return Gemma3TextConfig(sliding_window=16, layer_types=["sliding_attention", "full_attention"],
                                query_pre_attn_scalar=HEAD, rope_parameters={
                                    "sliding_attention": {**rope, "rope_theta": LOCAL_THETA}, "full_attention": rope},
                                **common)
    return {"llama": LlamaConfig, "qwen3": Qwen3Config}[architecture](rope_parameters=rope, **common)


def make_batches(tokenizer, pools, lengths, steps, tokens, seed):
    """`steps` batches of `tokens` tokens, as a training would have them."""
    return tool.make_batches(tokenizer, tool.Course("", pools, steps, (0, 0, 0), 1.0, lengths), tokens, seed)


def train(chat, batches, teacher, rate, settings, label, folder):
    """The script's training of these batches at this rate, with KL_WEIGHT as in the settings; its log."""
    course = tool.Course(label, [], len(batches), (rate, 0, 0), settings.kl_weight)
    return tool.train(chat, batches, course, teacher, settings, folder)


def listened(chat, conversations, kind="everyday"):
    """Talks that end as these conversations do, and a teacher with what the model says at each token of their ends."""
    talks, tokens, log_probs, row = [], [], [], 0
    for messages in conversations:
        encoded = tool.encode(chat.tokenizer, messages)
        start, end = encoded.turns[-1]
        first = next(at for at in range(start, end) if encoded.labels[at] != -100)
        with torch.inference_mode():
            best = chat.model(torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1).topk(tool.TOP_TOKENS)
        tokens.append(best.indices[first - 1:end - 1].int())
        log_probs.append(best.values[first - 1:end - 1])
        talks.append(tool.Talk(messages, kind, encoded.input_ids[first:end], row))
        row += end - first
    return talks, tool.Teacher(torch.cat(tokens).clone(), torch.cat(log_probs).clone())


@pytest.fixture(scope="session")
def demo_chat():
    """The demo model, for reading only."""
    return tool.load_chat(str(DEMO), small_settings("--method", "full", "--max-new-tokens", 32))


@pytest.fixture(scope="session")
def demo_tokenizer(demo_chat):
    """The demo's tokenizer, for reading only."""
    return demo_chat.tokenizer


@pytest.fixture
def tokenizer():
    """A tokenizer of the demo that the test may change."""
    return tool.load_tokenizer(str(DEMO))


@pytest.fixture(scope="session")
def tiny_folder(demo_tokenizer, tmp_path_factory):
    """architecture -> folder of a saved random model with the demo's tokenizer; each is built once."""
    from transformers import AutoModelForCausalLM

    folders = {}

    def build(architecture):
        if architecture not in folders:
            folder = folders[architecture] = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(tiny_config(architecture, demo_tokenizer))
            model.save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy2(DEMO / name, folder)
        return str(folders[architecture])

    return build


@pytest.fixture
def base_folder(tmp_path):
    """A folder that looks like a base to all checks that do not import torch."""
    from safetensors.torch import save_file

    folder = tmp_path / "meu_modelo"
    folder.mkdir()
    config = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"embedding": torch.zeros(3, 4)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder
