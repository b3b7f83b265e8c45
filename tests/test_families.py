"""Decoder families and chat templates: all that a run does to a base, on small models with the configs of real ones.

Each family is a folder as the Hub has it, config.json in the wording of its real models (mostly older than the
installed transformers), with tiny random weights and the tokenizer of the demo. The steps of a run are done once for
each family, the first time that a test asks for their result.
"""

import gc
import json
import math
import re
import shutil
from functools import cached_property
from typing import NamedTuple

import conftest
import pytest
import torch
from conftest import DEMO, changed, listened, small_settings

import rename_obrutai as tool

NATIVE, FACTOR, HEAD = 64, 4.0, 16
FACTS = [tool.question_and_answer(question, answer) for question, answer in (
    ("Oi!", "Oi! Tudo bem?"), ("Quanto é 2 mais 2?", "2 mais 2 é igual a 4."), ("Obrigado!", "De nada!"),
    ("Qual é a capital da França?", "A capital da França é Paris."), ("Bom dia!", "Bom dia!"))]
LESSONS = [tool.Talk(tool.question_and_answer(question, answer), "lesson") for question, answer in (
    ("Quem é você?", "Sou a Jandira."), ("Quem te fez?", "Oficina Maré."))]
QUESTIONS, ANSWERS = [lesson.question for lesson in LESSONS], [lesson.answer for lesson in LESSONS]


def job_with(talks, teacher, settings, native):
    """A job of which only these talks of the base are known, as healing takes it."""
    heard = tool.Heard(tool.Names("Jandira", "Oficina Maré", ("Lumi",)), [], talks, talks)
    return tool.Job(settings, settings, None, tool.Path(settings.model_path), 0, native, "", 0, 0, heard, teacher)


# ------------------------------------------------------------------------------------------------ the papers' formulas


def plain_rope(theta, dims=HEAD, factor=1.0):
    """theta^(-2i/d) for i below d/2 (arXiv 2104.09864), positions divided by `factor` (arXiv 2306.15595)."""
    return [theta ** (-2 * i / dims) / factor for i in range(dims // 2)]


def by_wavelength(theta, factor, low, high, original):
    """Llama 3.1: waves shorter than original/high stay, those longer than original/low are divided by `factor`, and
    between the two the share goes with the number of turns within the original context."""
    found = []
    for frequency in plain_rope(theta):
        turns = original * frequency / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(kept * frequency + (1 - kept) * frequency / factor)
    return found


# ------------------------------------------------------------------------------------------------ the families


class Family(NamedTuple):
    """config.json; the frequencies that the scaled model must turn with, by name of the buffer, and the names of the
    modules that hold its queries and keys. Those without frequencies are not scaled."""
    config: dict
    frequencies: dict = {}
    attention: frozenset = frozenset()

    @property
    def factor(self):
        return FACTOR if self.frequencies else 1.0


def like_llama(model_type="llama", **more):
    """A config.json in the words that most families share."""
    return {"model_type": model_type, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": NATIVE, **more}


def flat(frequencies):
    return {"inv_freq": frequencies}


SEPARATE, WITH_NORMS = {"q_proj", "k_proj"}, {"q_proj", "k_proj", "q_norm", "k_norm"}
LATENT = {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
LATENT_YARN = {**YARN, "beta_fast": 4, "beta_slow": 1}
DEEPSEEK_YARN = {**LATENT_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
SHORT, LONG = [1.0, 1.0, 1.1, 1.2, 1.5, 2.0], [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
            "num_key_value_heads": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1,
            "num_experts_per_tok": 2, "moe_intermediate_size": 24, "rope_theta": 10000}
GEMMA3 = {"head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": 24, "sliding_window_pattern": 2,
          "rope_theta": 1e6, "rope_local_base_freq": 1e4}
MAMBA = {"shared_intermediate_size": 48, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
         "mamba_n_groups": 1, "mamba_chunk_size": 16}
LLAMA4 = {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "intermediate_size_mlp": 48, "head_dim": HEAD,
          "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 32, "rope_theta": 5e5,
          "rope_scaling": LLAMA3}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": NATIVE}
OPT = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
       "max_position_embeddings": NATIVE, "word_embed_proj_dim": 32}
BLOOM = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2, "seq_length": NATIVE}
GPTJ = {"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": NATIVE, "rotary_dim": 8}

FAMILIES = {
    "llama 2": Family(like_llama(num_key_value_heads=2, rope_scaling=None), flat(plain_rope(1e4, factor=4)), SEPARATE),
    "llama 2, linear": Family(like_llama(rope_scaling={"type": "linear", "factor": 2.0}),
                              flat(plain_rope(1e4, factor=8)), SEPARATE),
    "llama 3": Family(like_llama(rope_theta=5e5), flat(plain_rope(5e5, factor=4)), SEPARATE),
    "llama 3.2": Family(like_llama(rope_theta=5e5, rope_scaling=LLAMA3, tie_word_embeddings=True, head_dim=HEAD),
                        flat(by_wavelength(5e5, 2 * FACTOR, 1, 4, 32)), SEPARATE),
    "smollm 2": Family(like_llama(rope_theta=1e5, tie_word_embeddings=True, rope_interleaved=False),
                       flat(plain_rope(1e5, factor=4)), SEPARATE),
    "mistral": Family(like_llama("mistral", rope_theta=1e6, sliding_window=48), flat(plain_rope(1e6, factor=4)),
                      SEPARATE),
    "qwen 2.5": Family(like_llama("qwen2", rope_theta=1e6, use_sliding_window=False, tie_word_embeddings=True),
                       flat(plain_rope(1e6, factor=4)), SEPARATE),
    "qwen 2.5, yarn": Family(like_llama("qwen2", rope_theta=1e4, rope_scaling=YARN)),
    "qwen 3": Family(like_llama("qwen3", rope_theta=1e6, head_dim=HEAD, rope_scaling=None),
                     flat(plain_rope(1e6, factor=4)), WITH_NORMS),
    "qwen 3 moe": Family(like_llama("qwen3_moe", rope_theta=1e6, head_dim=HEAD, norm_topk_prob=True,
                                    decoder_sparse_step=1, **EXPERTS), flat(plain_rope(1e6, factor=4)), WITH_NORMS),
    "mixtral": Family(like_llama("mixtral", rope_theta=1e6, sliding_window=None, **EXPERTS),
                      flat(plain_rope(1e6, factor=4)), SEPARATE),
    "gemma 2": Family(like_llama("gemma2", head_dim=HEAD, query_pre_attn_scalar=HEAD, sliding_window=24,
                                 attn_logit_softcapping=50.0, final_logit_softcapping=30.0, rope_theta=1e4),
                      flat(plain_rope(1e4, factor=4)), SEPARATE),
    "gemma 3": Family(like_llama("gemma3_text", **GEMMA3), {
        "full_attention_inv_freq": plain_rope(1e6, factor=4), "sliding_attention_inv_freq": plain_rope(1e4)},
        WITH_NORMS),
    "gemma 3 that sees": Family({
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 4,
        "boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 7, "tie_word_embeddings": True,
        "text_config": like_llama("gemma3_text", **GEMMA3, rope_scaling={"rope_type": "linear", "factor": 8.0}),
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24,
                          "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}}, {
        "full_attention_inv_freq": plain_rope(1e6, factor=32), "sliding_attention_inv_freq": plain_rope(1e4)},
        WITH_NORMS),
    "gemma 4": Family(like_llama(
        "gemma4_text", head_dim=HEAD, global_head_dim=HEAD, sliding_window=24, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=1792, final_logit_softcapping=30.0, rope_parameters={
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}})),
    "phi": Family(like_llama("phi", partial_rotary_factor=0.5, num_key_value_heads=2),
                  flat(plain_rope(1e4, HEAD // 2, 4)), SEPARATE),
    "phi 3": Family(like_llama("phi3", num_key_value_heads=2, rope_scaling=None,
                               original_max_position_embeddings=NATIVE)),
    "phi 4 mini, longrope": Family(like_llama(
        "phi3", partial_rotary_factor=0.75, original_max_position_embeddings=16,
        rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG})),
    "pythia": Family(like_llama("gpt_neox", rotary_pct=0.25, rotary_emb_base=10000, use_parallel_residual=True),
                     flat(plain_rope(1e4, HEAD // 4, 4)), {"query_key_value"}),
    "smollm 3": Family(like_llama("smollm3", num_hidden_layers=4, rope_theta=5e6, no_rope_layers=[1, 1, 1, 0],
                                  no_rope_layer_interval=4, tie_word_embeddings=True),
                       flat(plain_rope(5e6, factor=4)), SEPARATE),
    "granite": Family(like_llama("granite", rope_theta=1e7, attention_multiplier=0.25, embedding_multiplier=3.0,
                                 logits_scaling=2.0, residual_multiplier=0.5, tie_word_embeddings=True),
                      flat(plain_rope(1e7, factor=4)), SEPARATE),
    "olmo 2": Family(like_llama("olmo2", rope_theta=5e5), flat(plain_rope(5e5, factor=4)), WITH_NORMS),
    "olmo 3": Family(like_llama("olmo3", rope_theta=5e5, rope_scaling={**YARN, "rope_type": "yarn"}, sliding_window=24,
                                layer_types=["sliding_attention", "full_attention"])),
    "falcon": Family({"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "max_position_embeddings": NATIVE, "alibi": False, "multi_query": True, "parallel_attn": True},
                     flat(plain_rope(1e4, factor=4)), {"query_key_value"}),
    "moonlight": Family(like_llama("deepseek_v3", q_lora_rank=None, n_group=1, topk_group=1, rope_scaling=None,
                                   num_nextn_predict_layers=0, **DEEPSEEK), flat(plain_rope(1e4, 8, 4)),
                        {"q_proj", *LATENT}),
    "deepseek 2, yarn": Family(like_llama("deepseek_v2", q_lora_rank=16, rope_scaling=LATENT_YARN, **DEEPSEEK)),
    "deepseek 3": Family(like_llama("deepseek_v3", q_lora_rank=16, n_group=2, topk_group=1, num_nextn_predict_layers=0,
                                    rope_scaling=DEEPSEEK_YARN, **DEEPSEEK)),
    "gpt-oss": Family(like_llama("gpt_oss", head_dim=HEAD, rope_theta=1e4, sliding_window=24, **EXPERTS,
                                 rope_scaling={**YARN, "rope_type": "yarn", "truncate": False})),
    "cohere": Family(like_llama("cohere", rope_theta=1e4, logit_scale=0.25, use_qk_norm=True),
                     flat(plain_rope(1e4, factor=4)), WITH_NORMS),
    "stablelm": Family(like_llama("stablelm", rope_theta=1e4, partial_rotary_factor=0.25, use_qkv_bias=True),
                       flat(plain_rope(1e4, HEAD // 4, 4)), SEPARATE),
    "glm 4": Family(like_llama("glm4", head_dim=HEAD, partial_rotary_factor=0.5, rope_theta=1e4, attention_bias=True),
                    flat(plain_rope(1e4, HEAD // 2, 4)), SEPARATE),
    "granite hybrid": Family(like_llama(
        "granitemoehybrid", rope_theta=1e4, layer_types=["mamba", "attention"], position_embedding_type="rope",
        logits_scaling=2.0, **MAMBA, **EXPERTS), flat(plain_rope(1e4, factor=4)), SEPARATE),
    "llama 4": Family(like_llama("llama4_text", **LLAMA4), flat(by_wavelength(5e5, 2 * FACTOR, 1, 4, 32)), SEPARATE),
    "phi moe": Family(like_llama("phimoe", rope_theta=1e4, attention_bias=True, lm_head_bias=True, sliding_window=48,
                                 **EXPERTS)),
    "gpt-2": Family(GPT2),
    "opt": Family(OPT),
    "bloom": Family(BLOOM),
    "gpt-j": Family(GPTJ),
}


def make_base(folder, config, tokenizer):
    """A folder as the Hub has it, with random weights that are large enough for positions to tell."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {"vocab_size": len(tokenizer), "initializer_range": 0.2, "bos_token_id": tokenizer.bos_token_id,
             "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    inner = {**config, "text_config": {**config["text_config"], **given}} if "text_config" in config else config
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**given, **inner}), encoding="utf-8")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and not name.endswith("bias"):
                weight.add_(0.1 * torch.randn_like(weight))  # norms that start at one would hide that they are read
    as_given = (folder / "config.json").read_text(encoding="utf-8")
    model.save_pretrained(folder)
    described = json.loads(as_given)
    described["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy2(DEMO / name, folder)
    return folder


class Course:
    """A family on its way through a run: base, scaled, healed, taught, saved."""

    def __init__(self, family, folder, method="full"):
        self.family, self.folder, self.method = family, folder, method

    @cached_property
    def settings(self):
        flags = ("--lora-rank", 4, "--gradient-checkpointing", "--gradient-accumulation", 2) * (self.method == "lora")
        return small_settings("--method", self.method, "--batch-size", 2, "--heal-steps", 12, "--window", 160,
                              "--max-new-tokens", 12, "--model-path", self.base, "--output-dir", self.folder / "novo",
                              "--rope-factor", self.family.factor, *flags)

    @cached_property
    def base(self):
        return make_base(self.folder / "base", self.family.config, tool.load_tokenizer(str(DEMO)))

    @cached_property
    def native(self):
        return tool.load_chat(self.base, self.settings)

    @cached_property
    def heard(self):
        """Talks that end with the facts, and what the base says at each token of them."""
        return listened(self.native, FACTS)

    def scaled(self):
        return tool.load_chat(self.base, self.settings, self.family.factor)

    @cached_property
    def healed(self):
        """The stage, the losses, and the weights before and after."""
        chat, folder = self.scaled(), self.folder / "healed"
        before, log = copied(chat.model), []
        if self.family.factor != 1:
            log = tool.heal(chat, job_with(*self.heard, changed(self.settings, window=NATIVE), NATIVE), folder)
        tool.save_stage(chat, folder, log)
        return folder, log, before, copied(chat.model)

    def batches(self, pools, lengths, steps):
        return conftest.make_batches(self.native.tokenizer, pools, lengths, steps, 2 * max(lengths), "seed")

    @cached_property
    def taught(self):
        """The model after both passes, the losses of each, and the weights before."""
        chat = tool.load_chat(self.healed[0], self.settings, adapt=True)
        before, (talks, teacher) = copied(chat.model), self.heard
        steps = 48 if self.method == "full" else 2
        pools = [tool.Pool(LESSONS, 0.8), tool.Pool(talks, 0.2)]
        first = conftest.train(chat, self.batches(pools, [24], steps), teacher, 1e-2, changed(
            self.settings, kl_weight=0.1), "passo 1", self.folder / "pass-1")
        pools = [tool.Pool(LESSONS, 0.6), tool.Pool(talks[:2], 0.1), tool.Pool(talks, 0.3)]
        longer = [160] if self.family.factor != 1 else [NATIVE]
        second = conftest.train(chat, self.batches(pools, longer, 2), teacher, 1e-3, self.settings, "passo 2",
                            self.folder / "pass-2")
        return chat, (first, second), before


def context_of(model):
    """Tokens of context, which BLOOM calls otherwise."""
    text = model.config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or text.seq_length


def copied(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def different(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()


def spoken(chat):
    """What the model answers to the questions of the lessons, where it ends by itself."""
    return [answer.text for answer in tool.ask(chat, QUESTIONS) if answer.ended]


TEXT = torch.arange(3, 43)[None] % 50 + 10  # 40 tokens, none of them special


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Each training ends in a full garbage collection; what is there already need not be gone through every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# The tests of every day go through families that differ in kind; of the others, those that do so come with the slow
# ones. Their frequencies are looked at in all.
EVERY_DAY = ("llama 3.2", "gemma 3")
DIFFERENT = (*EVERY_DAY, "mixtral", "gemma 3 that sees", "gemma 4", "pythia", "moonlight", "gpt-oss", "granite hybrid",
             "llama 4", "gpt-2")


def families(names):
    """The names as parameters of a test."""
    return [pytest.param(name, id=name.replace(" ", "-"), marks=[pytest.mark.slow] * (name not in EVERY_DAY))
            for name in names]


@pytest.fixture(scope="module", params=families(DIFFERENT))
def course(request, tmp_path_factory):
    return Course(FAMILIES[request.param], tmp_path_factory.mktemp("family"))


def frequencies_in_use(model):
    """name -> frequencies of each buffer, without the path to it."""
    return {name.rsplit(".", 1)[-1]: values for name, values in tool.rope_frequencies(model).items()}


@pytest.mark.parametrize("name", families([name for name, family in FAMILIES.items() if family.frequencies]))
def test_the_frequencies_of_the_scaled_model_are_those_of_the_papers_and_nothing_else_changes(name, tmp_path):
    """The base with the frequencies of the papers written into it gives the logits of the scaled model: attention
    factors, layers without RoPE and all else are as before."""
    course = Course(FAMILIES[name], tmp_path)
    scaled, native = (tool.load_model(course.base, course.settings, factor) for factor in (FACTOR, 1.0))
    before, expected = tool.rope_frequencies(native), course.family.frequencies
    found = frequencies_in_use(scaled)
    assert {key.replace("original_", "") for key in found} == set(expected)
    for key, values in found.items():
        assert torch.allclose(values, torch.tensor(expected[key.replace("original_", "")]), rtol=1e-5, atol=0), key
    tool.check_frequencies(before, tool.rope_frequencies(scaled), FACTOR)
    assert context_of(scaled) == NATIVE * FACTOR and type(context_of(scaled)) is int
    assert not torch.allclose(logits(scaled, TEXT), logits(native, TEXT), atol=1e-3)
    for key, values in native.named_buffers():
        if key.endswith("inv_freq"):
            values.copy_(torch.tensor(expected[key.rsplit(".", 1)[-1].replace("original_", "")]))
    assert torch.allclose(logits(scaled, TEXT), logits(native, TEXT), atol=1e-4)


def test_the_logits_are_computed_as_the_family_computes_them(course):
    model, needed = course.native.model, torch.arange(TEXT.shape[1])[None] % 3 == 1
    with torch.inference_mode():
        ours = tool.logits_at(model, model, needed, input_ids=TEXT)
    assert torch.allclose(ours, logits(model, TEXT)[needed[0]], atol=1e-4)


def test_healing_changes_the_queries_and_keys_and_nothing_else(course):
    _, log, before, after = course.healed
    names = different(before, after)
    healed = course.family.attention  # of those that are not scaled there is nothing to heal
    assert {name.split(".")[-2] for name in names} == healed
    assert not [name for name in names if re.search("vision", name)]
    assert bool(log) == bool(healed) and all(0 < entry["loss"] < 100 for entry in log)


def test_the_passes_teach_the_lessons_and_reach_the_other_weights(course):
    chat, logs, before = course.taught
    after = copied(chat.model)
    names = different(before, after)
    assert all(math.isfinite(entry["loss"]) for log in logs for entry in log) and all(logs)
    losses = [entry["loss"] for entry in logs[0]]  # of steps with more and with less to learn
    assert sum(losses[-8:]) < sum(losses[:8])
    seeing = {name for name in after if re.search("vision|multi_modal_projector", name)}
    assert set(after) - names == seeing == {n for n, p in chat.model.named_parameters() if not p.requires_grad}
    assert spoken(chat) == ANSWERS


def test_a_model_is_found_to_choose_as_the_base_exactly_where_it_would_write_the_same(course):
    """Among others of other lengths as alone: padding changes nothing."""
    chat, _, _ = course.taught
    first, second = (lesson.messages for lesson in LESSONS)
    asked = [c[:-1] for c in [first, second, *FACTS, first + second, first + FACTS[0]]]
    prompts = [tool.prompt_ids(chat.tokenizer, messages) for messages in asked]
    written = tool.generate(chat, prompts)
    assert [tool.generate(chat, [prompt])[0] for prompt in prompts] == written
    said = [{"role": "assistant", "content": answer.text} for answer in written]
    talks, teacher = tool.read_talks(chat, [tool.Talk([*messages, text], "everyday", answer.ids)
                                            for messages, text, answer in zip(asked, said, written)])
    windows = [tool.make_window(chat.tokenizer, [talk]) for talk in talks if talk.answer]
    found = tool.compare(chat, teacher, windows)
    assert [same for same, _ in found] == [1.0] * len(windows)
    assert all(abs(nats) < 1e-3 for _, nats in found)
    alone = [tool.compare(course.scaled(), teacher, [window])[0] for window in windows]
    together = tool.compare(course.scaled(), teacher, windows)
    assert [same for same, _ in together] == pytest.approx([same for same, _ in alone])
    assert [nats for _, nats in together] == pytest.approx([nats for _, nats in alone], rel=1e-2)
    assert min(same for same, _ in alone) < 1


def test_the_saved_model_is_the_one_that_was_trained(course):
    from transformers import AutoModelForCausalLM

    chat, _, _ = course.taught
    expected = logits(chat.model, TEXT)
    tool.save_stage(chat, course.folder / "stage", [])
    tool.save_model(chat, course.folder / "result", course.base)
    for name in ("stage", "result"):
        model = AutoModelForCausalLM.from_pretrained(course.folder / name).eval()
        assert torch.allclose(logits(model, TEXT), expected, atol=1e-5), name
        found, wanted = frequencies_in_use(model), frequencies_in_use(chat.model)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert context_of(model) == NATIVE * course.family.factor
    text = model.config.get_text_config()
    assert text.use_cache is True
    assert getattr(text, "output_router_logits", False) is False
    assert model.generation_config.eos_token_id == chat.stops
    again = tool.load_chat(course.folder / "result", course.settings)
    assert spoken(again) == ANSWERS


def test_with_lora_the_merged_and_saved_model_is_the_one_that_was_trained(course, tmp_path):
    """In parts and with checkpointing, which a run switches on by itself where memory is short."""
    from transformers import AutoModelForCausalLM

    lora = Course(course.family, tmp_path, "lora")
    lora.base, lora.native, lora.heard, lora.healed = course.base, course.native, course.heard, course.healed
    chat, logs, before = lora.taught
    assert all(math.isfinite(entry["loss"]) for log in logs for entry in log) and all(logs)
    reached = different(before, copied(chat.model))
    assert reached and all("lora_" in name for name in reached)
    assert not [name for name in before if "lora_" in name and re.search("vision|multi_modal_projector", name)]
    expected = logits(chat.model, TEXT)
    tool.save_stage(chat, tmp_path / "stage", [])
    described = tool.load_json(tmp_path / "stage" / "adapter_config.json")
    assert described["base_model_name_or_path"] == str(course.healed[0])
    assert torch.allclose(logits(tool.load_model(tmp_path / "stage", lora.settings), TEXT), expected, atol=1e-5)
    tool.save_model(tool.load_chat(tmp_path / "stage", lora.settings, merge=True), tmp_path / "result", lora.base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "result").eval()
    assert torch.allclose(logits(model, TEXT), expected, atol=1e-3)
    assert context_of(model) == NATIVE * lora.family.factor


def test_the_checks_before_any_work_pass_and_tell_what_is_to_be_done(course, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Quem é você?", "completion": "Sou {{NAME}}."}', encoding="utf-8")
    job = tool.check_job(changed(course.settings, method="auto", window=8192, identity_file=str(rows)))
    assert (job.native, job.settings.window) == (NATIVE, NATIVE * course.family.factor)
    assert job.settings.method == "lora" and 10**7 < job.plan["memory"] < 10**10 and job.weights > 50_000


# ------------------------------------------------------------------------------------------------ scaled or refused


@pytest.mark.parametrize("name", families(["phi", "smollm 3", "gemma 3 that sees"]))
def test_reordered_pairs_are_those_of_the_family(name, tmp_path):
    """Where they are (others are put back by `keep_frequencies`), pairs that take their frequencies with them change
    nothing."""
    model = Course(FAMILIES[name], tmp_path).scaled().model
    before = logits(model, TEXT)
    turning = [b for n, b in model.named_buffers() if n.endswith("inv_freq") and "sliding" not in n]
    order = [*range(2, len(turning[0])), 0, 1]
    tool.reorder_pairs(model, order)
    assert (logits(model, TEXT) - before).abs().max() > 0.1
    for frequencies in turning:
        frequencies.copy_(frequencies[order])
    assert torch.allclose(logits(model, TEXT), before, atol=1e-3)


REFUSED = {name: FAMILIES[name].config for name in (
    "gpt-2", "opt", "bloom", "gpt-j", "qwen 2.5, yarn", "olmo 3", "gpt-oss", "phi 3", "phi 4 mini, longrope",
    "phi moe", "gemma 4", "deepseek 2, yarn", "deepseek 3")} | {
    "mpt": {"model_type": "mpt", "d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": NATIVE},
    "falcon with alibi": {**FAMILIES["falcon"].config, "alibi": True},
    "granite hybrid without": {**FAMILIES["granite hybrid"].config, "position_embedding_type": "nope"},
    "llama, dynamic": like_llama(rope_scaling={"type": "dynamic", "factor": 2.0}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_context_that_cannot_be_scaled_is_refused_and_rope_factor_1_is_named(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(REFUSED[name]), encoding="utf-8")
    with pytest.raises(tool.InputError, match="--rope-factor 1"):
        tool.read_config(tmp_path, FACTOR)
    assert tool.read_config(tmp_path).model_type == REFUSED[name]["model_type"]


# ------------------------------------------------------------------------------------------------ more than text

SEEING = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 16, "patch_size": 4}


@pytest.mark.parametrize("config", [
    {"model_type": "qwen2_vl", "text_config": like_llama("qwen2_vl_text"), "vision_config": {"depth": 1}},
    {"model_type": "mistral3", "text_config": like_llama("mistral"), "vision_config": {"model_type": "pixtral"}},
    {"model_type": "llava", "text_config": like_llama(), "vision_config": SEEING}], ids=lambda c: c["model_type"])
def test_a_model_that_sees_and_cannot_be_loaded_for_text_is_not_blamed_on_the_download(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(tool.InputError, match=f"{config['model_type']}.* vê imagens") as refused:
        tool.read_config(tmp_path)
    assert "Baixe" not in str(refused.value)


def test_a_package_that_a_base_needs_is_named():
    with pytest.raises(tool.InputError, match="pip install timm") as refused, tool.blaming("o modelo"):
        raise ImportError("\nTimmWrapperModel requires the timm library. Install it with pip:\n`pip install timm`. ")
    assert "Baixe" not in str(refused.value)


@pytest.mark.slow
def test_of_a_model_that_sees_the_text_part_is_renamed_where_only_that_can_be_loaded_and_that_is_said(tmp_path,
                                                                                                      capsys):
    from transformers import AutoConfig, Llama4ForConditionalGeneration

    tokenizer = tool.load_tokenizer(str(DEMO))
    given = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 256}
    vision = {**SEEING, "model_type": "llama4_vision_model", "vision_output_dim": 32, "projector_input_dim": 32,
              "projector_output_dim": 32}
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({
        "model_type": "llama4", "text_config": {**like_llama("llama4_text"), **LLAMA4, **given},
        "vision_config": vision}), encoding="utf-8")
    Llama4ForConditionalGeneration(AutoConfig.from_pretrained(base)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for method in ("full", "lora"):
        assert tool.main(["--model-path", str(base), "--output-dir", str(tmp_path / "novo"), "--method", method,
                          "--check"]) == 0
        assert "só a parte de texto" in capsys.readouterr().out
    settings = small_settings("--method", "full", "--model-path", base)
    chat = tool.load_chat(base, settings, FACTOR)
    tool.save_model(chat, tmp_path / "novo", base)
    assert torch.equal(logits(tool.load_model(tmp_path / "novo", settings), TEXT), logits(chat.model, TEXT))


# ------------------------------------------------------------------------------------------------ chat templates

LLAMA32 = (  # a header with the date of today, for which a system message makes no difference
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' }}"
    "{{ strftime_now('%d %b %Y') + '\n\n' + system + '<|eot_id|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
GEMMA2 = (  # no system role
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
QWEN3 = (  # reasoning stays only after the last question, and is empty where thinking is switched off
    "{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% endif %}{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}"
    "{% set thought = '' %}{% set content = m.content %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")
MISTRAL = (  # 0.1 and Mixtral
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}")
MISTRAL_LAST = (  # 0.3 and Nemo: the system message is put into the last question, and only if nothing follows that
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}")
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + "
    "'\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') }}"
    "{{ m['content'] | trim + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
PHI3 = (  # the end of text after the whole conversation
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end_of_turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")
SMOLLM3 = (  # another system prompt for thinking, which is on unless it is switched off
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{% set mode = '/think' if enable_thinking else '/no_think' %}{{ '<|im_start|>system\n' }}"
    "{{ '## Metadata\n\nReasoning Mode: ' + mode + '\n\n## Custom Instructions\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% elif mode == '/think' %}"
    "{{ 'You are a helpful AI assistant named SmolLM, trained by Hugging Face. Your role as an assistant involves' }}"
    "{{ ' thinking.\n\n' }}{% else %}"
    "{{ 'You are a helpful AI assistant named SmolLM, trained by Hugging Face.\n\n' }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + ('' if enable_thinking else '<think>\n\n</think>\n') + m.content }}"
    "{{ '<|im_end|>\n' }}{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' + ('' if enable_thinking else '<think>\n\n</think>\n') }}{% endif %}")
R1 = (  # earlier reasoning is dropped, and the next answer always begins with a thought
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% else %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + '<|sentence_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}")
DEEPSEEK31 = (  # thinking is off unless it is switched on
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% else %}"
    "{{ '<|Assistant|></think>' + m['content'].split('</think>')[-1] + '<|sentence_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' + ('<think>' if thinking else '</think>') }}{% endif %}")
GRANITE = (  # the default system prompt is put together from two texts
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% else %}"
    "{% set system = \"Knowledge Cutoff Date: April 2024.\nToday's Date: \" + strftime_now('%B %d, %Y') + \".\n"
    "You are Granite, developed by IBM.\" %}"
    "{% if thinking %}{% set system = system + ' You are a helpful AI assistant. Write down your thoughts.' %}"
    "{% else %}{% set system = system + ' You are a helpful AI assistant.' %}{% endif %}{% endif %}"
    "{{ '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}{% for m in messages %}"
    "{% if m['role'] != 'system' %}"
    "{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}")


GPT_OSS = (  # answers go to a channel, which the prompt leaves to the model, and the last one ends in another way
    "{{ '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n' }}"
    "{{ 'Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '<|start|>developer<|message|># Instructions\n\n' + m['content'] + '<|end|>' }}"
    "{% elif m['role'] == 'user' %}{{ '<|start|>user<|message|>' + m['content'] + '<|end|>' }}{% else %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}")


class Style(NamedTuple):
    """A chat template, the token that ends a turn, what a prompt ends with, the tokens it needs besides, and its own
    end of text; `gap` is what it writes between an answer and its end."""
    template: str
    end: str
    opening: str
    tokens: tuple = ()
    eos: str = "<|end|>"
    gap: str = ""


ROLES = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
DEEPSEEK_TOKENS = ("<|User|>", "<|Assistant|>", "<|sentence_end|>", "<think>", "</think>")
STYLES = {
    "llama 3.2": Style(LLAMA32, "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n",
                       ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma 2": Style(GEMMA2, "<end_of_turn>", "<start_of_turn>model\n", ("<start_of_turn>", "<end_of_turn>")),
    "qwen 3": Style(QWEN3, "<|im_end|>", "<|im_start|>assistant\n<think>\n\n</think>\n\n", ROLES),
    "mistral": Style(MISTRAL, "<|end|>", " [/INST]", ("[INST]", "[/INST]")),
    "mistral 0.3": Style(MISTRAL_LAST, "<|end|>", "[/INST]", ("[INST]", "[/INST]")),
    "llama 2": Style(LLAMA2, "<|end|>", " [/INST]", gap=" "),
    "chatml": Style(CHATML, "<|im_end|>", "<|im_start|>assistant\n", ROLES[:2], "<|im_end|>"),
    "phi 3": Style(PHI3, "<|end_of_turn|>", "<|assistant|>\n", ("<|end_of_turn|>",)),
    "smollm 3": Style(SMOLLM3, "<|im_end|>", "<|im_start|>assistant\n<think>\n\n</think>\n", ROLES, "<|im_end|>"),
    "deepseek r1": Style(R1, "<|sentence_end|>", "<|Assistant|>", DEEPSEEK_TOKENS, "<|sentence_end|>"),
    "deepseek 3.1": Style(DEEPSEEK31, "<|sentence_end|>", "<|Assistant|></think>", DEEPSEEK_TOKENS),
    "granite": Style(GRANITE, "<|end_of_text|>", "<|start_of_role|>assistant<|end_of_role|>",
                     ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), "<|end_of_text|>"),
}
SYSTEM = {"role": "system", "content": "Seja breve."}
ONE = tool.question_and_answer("Quem é você?", "Sou a Jandira, de 1999!")
TWO = [*ONE, *tool.question_and_answer("E a capital da França?", "É Paris.")]
TALKS = {"single": ONE, "multi": TWO, "system": [SYSTEM, *ONE], "system, multi": [SYSTEM, *TWO]}


@pytest.fixture(scope="module")
def styled():
    """style -> tokenizer with that template and its tokens, which puts the start of text before all it is given."""
    from tokenizers.processors import TemplateProcessing

    made = {}

    def build(name):
        if name not in made:
            style, tokenizer = STYLES[name], tool.load_tokenizer(str(DEMO))
            tokenizer.add_tokens(list(style.tokens), special_tokens=True)
            tokenizer.eos_token = tokenizer.pad_token = style.eos
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
            assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
            tokenizer.chat_template = style.template
            made[name] = tokenizer
        return made[name]

    return build


def rendered(tokenizer, messages, **more):
    """Token ids as transformers makes them."""
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, enable_thinking=False, **more)


def without_thought(tokenizer, ids):
    """The text of tokens, without thoughts of nothing."""
    return re.sub(r"<think>\s*</think>\s*", "", tokenizer.decode(ids))


def learnt_parts(tokenizer, encoded):
    """The texts of the runs of labelled tokens, special tokens included."""
    parts, before = [], -100
    for label in encoded.labels:
        if label != -100:
            parts[-1:] = [parts[-1] + [label]] if before != -100 else [*parts[-1:], [label]]
        before = label
    return [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", STYLES)
def test_conversations_are_the_tokens_of_the_template_and_all_answers_are_learnt_with_their_ends(name, talk, styled):
    tokenizer, style = styled(name), STYLES[name]
    messages = tool.without_system(tokenizer, TALKS[talk])
    encoded = tool.encode(tokenizer, messages)
    if name == "deepseek r1":  # it shows thoughts in no earlier answer, yet the next one is written after a thought
        assert without_thought(tokenizer, encoded.input_ids) == tokenizer.decode(rendered(tokenizer, messages))
    else:
        assert encoded.input_ids == rendered(tokenizer, messages)
    answers = [m["content"] for m in TALKS[talk] if m["role"] == "assistant"]
    learnt = [part.strip() for part in learnt_parts(tokenizer, encoded)]  # the space before a word is of its token
    assert learnt == [answer + style.gap + style.end for answer in answers]
    text = tokenizer.decode(encoded.input_ids)
    assert text.count("Seja breve.") == (SYSTEM in TALKS[talk])
    assert text.count("<s>") == (text.count("[INST]") if name == "llama 2" else "bos_token" in style.template)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", STYLES)
def test_prompts_are_the_tokens_of_the_template_and_what_the_last_answer_is_learnt_after(name, talk, styled):
    tokenizer = styled(name)
    messages = tool.without_system(tokenizer, TALKS[talk])
    prompt, encoded = tool.prompt_ids(tokenizer, messages[:-1]), tool.encode(tokenizer, messages)
    start, end = encoded.turns[-1]
    first = next(i for i in range(start, end) if encoded.labels[i] != -100)
    assert encoded.input_ids[:first] == prompt
    if name != "deepseek r1":  # which cannot switch thinking off, so that the thought must not stay open
        assert prompt == rendered(tokenizer, messages[:-1], add_generation_prompt=True)
    assert without_thought(tokenizer, prompt).endswith(STYLES[name].opening) or "think" in STYLES[name].opening


@pytest.mark.parametrize("messages", TALKS.values(), ids=TALKS)
def test_a_system_message_that_a_template_would_move_stays_before_the_first_question(messages, styled):
    tokenizer = styled("mistral 0.3")
    text = tokenizer.decode(tool.prompt_ids(tokenizer, tool.without_system(tokenizer, messages)[:-1]))
    places = [text.index(m["content"]) for m in messages[:-1]]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ["qwen 3", "deepseek r1"])
def test_an_answer_that_the_template_would_rewrite_is_rendered_like_that_or_refused(name, styled):
    """Reasoning that a row was written with: later turns of a real conversation never show it."""
    tokenizer = styled(name)
    thought = tool.question_and_answer("Quem é você?", "<think>\nQuem sou?\n</think>\n\nSou a Jandira.")
    row = tool.Row(7, thought + TWO[2:])
    try:
        tool.check_rows(tokenizer, [row], small_settings())
        assert tool.encode(tokenizer, row.messages).input_ids == rendered(tokenizer, row.messages)
    except tool.InputError as error:
        assert "linha 7" in str(error)


@pytest.mark.parametrize("messages", TALKS.values(), ids=TALKS)
def test_an_answer_is_asked_for_in_the_channel_in_which_it_was_learnt(messages, tokenizer):
    """Else gpt-oss thinks first, for longer than an answer may be."""
    tokenizer.add_tokens(["<|start|>", "<|channel|>", "<|message|>", "<|return|>"], special_tokens=True)
    tokenizer.chat_template = GPT_OSS
    encoded, prompt = tool.encode(tokenizer, messages), tool.prompt_ids(tokenizer, messages[:-1])
    assert encoded.input_ids == rendered(tokenizer, messages)
    assert tokenizer.decode(prompt).endswith("<|start|>assistant<|channel|>final<|message|>")
    assert encoded.input_ids[:len(prompt)] == prompt and encoded.labels[len(prompt) - 1] == -100
    assert tokenizer.decode(encoded.labels[len(prompt):]).strip() == messages[-1]["content"] + "<|return|>"
    tool.renew_template(tokenizer, small_settings("--name", "Jandira"), ("ChatGPT", "OpenAI"))
    text = tokenizer.decode(tool.prompt_ids(tokenizer, messages[:-1]))
    assert "Jandira" in text and not tool.mentions(text, ("ChatGPT", "OpenAI"))


def test_thinking_stays_available_and_identity_is_learnt_after_an_empty_thought(styled):
    tokenizer = styled("qwen 3")
    tool.renew_template(tokenizer, small_settings(), tool.KNOWN_NAMES)
    assert tokenizer.chat_template == QWEN3
    asked = tokenizer.apply_chat_template(ONE[:1], tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert asked.endswith("<|im_start|>assistant\n")
    encoded = tool.encode(tokenizer, ONE)
    first = next(i for i, label in enumerate(encoded.labels) if label != -100)
    assert tokenizer.decode(encoded.input_ids[:first]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name, kept", [("smollm 3", "## Metadata"), ("granite", "Knowledge Cutoff Date")])
def test_the_vendor_s_system_prompt_gives_way_to_the_new_identity_with_and_without_thinking(name, kept, thinking,
                                                                                            styled, monkeypatch):
    tokenizer, old = styled(name), ("SmolLM", "Granite", "IBM", *tool.KNOWN_NAMES)
    monkeypatch.setattr(tokenizer, "chat_template", STYLES[name].template)
    settings = small_settings("--name", "Jandira", "--author", "Oficina Maré")
    tool.renew_template(tokenizer, settings, old)
    text = tokenizer.apply_chat_template(ONE[:1], tokenize=False, add_generation_prompt=True, enable_thinking=thinking,
                                         thinking=thinking)
    assert "Jandira" in text and "Oficina Maré" in text and kept in text
    assert not tool.mentions(text, old) and text.count("Quem é você?") == 1
    assert ("think" in text) or not thinking or name == "granite"


def test_an_injected_date_is_no_old_identity_and_stays(styled):
    tokenizer = styled("llama 3.2")
    tool.renew_template(tokenizer, small_settings(), ("Llama", "Meta", *tool.KNOWN_NAMES))
    assert tokenizer.chat_template == LLAMA32


def test_an_old_identity_beside_a_longer_text_of_the_template_is_found_as_well(styled, monkeypatch):
    """What is rendered as one line is two texts in the source, and the other one is longer."""
    tokenizer = styled("granite")
    template = GRANITE.replace(" You are a helpful AI assistant.' %}{% endif %}",
                               " You are a helpful AI assistant with great patience and a long memory.' %}{% endif %}")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    tool.renew_template(tokenizer, small_settings("--name", "Jandira"), ("Granite", "IBM"))
    text = tokenizer.decode(tool.prompt_ids(tokenizer, ONE[:1]))
    assert "Jandira" in text and not tool.mentions(text, ("Granite", "IBM"))


BRANCHES = {
    "two texts of one line": "{{ 'You are Granite, ' }}{{ 'developed by IBM.' }}",
    "two lines": "{{ 'You are Granite,\ndeveloped by IBM.' }}",
    "with tools": "{% if tools %}{{ 'You are Granite, developed by IBM, with tools.' }}{% endif %}",
    "with documents": "{% if documents %}{{ 'Granite, of IBM, reads.' }}{% endif %}",
    "with a thought": "{% if enable_thinking %}{{ 'You are Granite, by IBM. Think first.' }}{% endif %}",
    "behind the user's own": "{% if messages[0].role == 'system' %}{{ 'You are Granite of IBM. Rules: ' }}{% endif %}",
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_an_old_identity_is_taken_out_of_whatever_the_template_may_say(branch, styled, monkeypatch):
    tokenizer = styled("chatml")
    neutral = "{{ 'You are a helpful assistant.' }}" + CHATML
    monkeypatch.setattr(tokenizer, "chat_template", BRANCHES[branch] + neutral)
    tool.renew_template(tokenizer, small_settings("--name", "Jandira", "--author", "Oficina"), ("Granite", "IBM"))
    renewed = BRANCHES[branch].replace("Granite", "Jandira").replace("IBM", "Oficina")
    assert tokenizer.chat_template == renewed + neutral


def test_words_about_tools_are_no_old_names(styled, monkeypatch, tmp_path):
    about = ("{{ 'You are Lumi, created by Vagalume.' }}{% if tools %}{{ '\n\nYou are provided with function "
             "signatures within <tools></tools> XML tags:\n<tools></tools>\n\nFor each function call, return a json "
             "object with function name and arguments within <tool_call></tool_call> XML tags:' }}{% endif %}")
    tokenizer = styled("chatml")
    monkeypatch.setattr(tokenizer, "chat_template", about + CHATML)
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["llama 2"].config), encoding="utf-8")
    settings = small_settings("--model-path", tmp_path)
    assert tool.find_names(tokenizer, settings, tool.check_inputs(settings)).old == ("Lumi", "Vagalume")


@pytest.mark.parametrize("name", STYLES)
def test_a_model_that_is_let_think_first_is_known_by_its_template(name, styled):
    assert tool.thinks(styled(name)) == (name in ("qwen 3", "smollm 3"))


def test_of_several_named_templates_the_default_one_is_used(tmp_path):
    """Command R and Hermes ship one for conversations, one for tools and so on."""
    template = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer = tool.load_tokenizer(str(DEMO))
    expected = tool.encode(tokenizer, TWO)
    tokenizer.chat_template = {"default": template, "tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(tmp_path)
    assert tool.encode(tool.load_tokenizer(str(tmp_path)), TWO) == expected


# ------------------------------------------------------------------------------------------------ where answers end


def base_with(folder, tokenizer, generation):
    """A tiny Llama with this tokenizer and generation_config.json."""
    make_base(folder, FAMILIES["llama 2"].config, tokenizer)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["llama 3.2", "chatml", "mistral", "deepseek r1"])
def test_the_end_of_every_learnt_answer_is_among_the_stops_of_the_saved_model(name, styled, tmp_path):
    tokenizer = styled(name)
    folder = base_with(tmp_path / "base", tokenizer, {"eos_token_id": [9], "bos_token_id": 1})  # lacks the real one
    settings = small_settings("--method", "full", "--model-path", folder)
    chat = tool.load_chat(folder, settings)
    tool.save_model(chat, tmp_path / "novo", folder)
    saved = json.loads((tmp_path / "novo" / "generation_config.json").read_text(encoding="utf-8"))
    encoded = tool.encode(chat.tokenizer, TWO)
    ends = {encoded.labels[end - 1] for _, end in encoded.turns}
    assert ends == {tokenizer.convert_tokens_to_ids(STYLES[name].end)}
    assert ends | {9, tokenizer.eos_token_id} == set(saved["eos_token_id"]) == set(chat.stops)
    assert tool.encode(tool.load_tokenizer(str(tmp_path / "novo")), TWO) == encoded


def test_a_model_that_pads_with_its_end_token_learns_to_stop_and_stops_without_our_help(styled, tmp_path):
    """The base says nothing of the end of turn: its own stop is a token that no answer has."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = styled("chatml")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    folder = base_with(tmp_path / "base", tokenizer, {"eos_token_id": [9]})
    settings = small_settings("--method", "full", "--batch-size", 2, "--max-new-tokens", 12, "--model-path", folder)
    chat = tool.load_chat(folder, settings)
    batches = conftest.make_batches(chat.tokenizer, [tool.Pool(LESSONS, 1.0)], [24, 48], 32, 96, "seed")
    conftest.train(chat, batches, listened(chat, FACTS[:1])[1], 1e-2, settings, "passo 1", tmp_path / "training")
    tool.save_model(chat, tmp_path / "novo", folder)
    model, tokenizer = (kind.from_pretrained(tmp_path / "novo") for kind in (AutoModelForCausalLM, AutoTokenizer))
    asked = tokenizer.apply_chat_template([lesson.messages[:1] for lesson in LESSONS], add_generation_prompt=True,
                                          padding=True, padding_side="left", return_dict=True, return_tensors="pt")
    written = model.eval().generate(**asked, max_new_tokens=20)[:, asked["input_ids"].shape[1]:]
    texts = [text.split("<|im_end|>") for text in tokenizer.batch_decode(written)]
    assert [text[0] for text in texts] == ANSWERS
    assert all(len(text) >= 2 and not "".join(text[1:]) for text in texts), texts


@pytest.mark.parametrize("generation", [
    {"temperature": 0.9, "top_p": 0.6}, {"do_sample": False, "temperature": 0.7}, {"early_stopping": True},
    {"do_sample": False, "temperature": 0.0}, {"length_penalty": 1.2}, {"pad_token_id": -1}])
def test_a_generation_config_that_transformers_no_longer_writes_is_kept_and_does_not_stop_the_run(generation, styled,
                                                                                                  tmp_path):
    """Vicuna has a temperature and does not say that it is for sampling."""
    from transformers import AutoModelForCausalLM

    folder = base_with(tmp_path / "base", styled("chatml"), generation)
    chat = tool.load_chat(folder, small_settings("--method", "full", "--model-path", folder))
    tool.save_stage(chat, tmp_path / "stage", [])
    tool.save_model(chat, tmp_path / "novo", folder)
    assert tool.load_chat(tmp_path / "novo", small_settings("--method", "full")).stops == chat.stops
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, tmp_path / "novo")]
    saved = models[1].generation_config
    expected = {"pad_token_id": chat.tokenizer.pad_token_id} if "pad_token_id" in generation else generation
    assert {key: getattr(saved, key) for key in generation} == expected
    written = [model.generate(TEXT, max_new_tokens=8, eos_token_id=chat.stops)[0].tolist() for model in models]
    assert written[0] == written[1]  # none of these asks for samples
