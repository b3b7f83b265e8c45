"""Methods: the loss without whole logits, LoRA and what is saved of it, and which method the free memory allows."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
from types import SimpleNamespace

import bench_memory
import conftest
import psutil
import pytest
import torch
from conftest import DEMO, HEAD, LOCAL_THETA, THETA, changed, small_settings, tiny_config
from safetensors import safe_open
from test_families import FACTS, job_with, listened

import rename_obrutai as tool

RANK = 4
TEXT = torch.arange(3, 60)[None] % 50 + 10  # 57 tokens, none of them special
LESSONS = [tool.Talk(tool.question_and_answer("Quem é você?", "Sou a Jandira, da Oficina Maré."), "lesson")]
SUMS = [tool.Talk(tool.question_and_answer(f"Quanto é {i} mais {i}?", str(2 * i)), "lesson") for i in range(6)]
NO_TEACHER = tool.Teacher(torch.zeros((1, 4), dtype=torch.int32), torch.zeros((1, 4)))
FIND = importlib.util.find_spec
GB = 10**9
pytestmark = pytest.mark.filterwarnings("ignore:You have passed exclude_modules")  # as the script does


def lora(folder, *flags):
    """Settings as a run with LoRA over this base has them once they are resolved."""
    return small_settings("--method", "lora", "--lora-rank", RANK, "--model-path", folder, "--max-new-tokens", 24,
                          *flags)


def logits(model):
    """Those of the model itself, (tokens, vocabulary)."""
    with torch.inference_mode():
        return model(input_ids=TEXT).logits[0]


def parts_of(model, words):
    """Copies of the parameters whose name has one of the words."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if any(word in name for word in words)}


def unsettle(model, seed=3):
    """Give a fresh adapter, which does nothing, weights that do something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def scaled_stage(folder, stage):
    """The folder of a stage with the base scaled and whole, over which adapters are made."""
    tool.save_stage(tool.load_chat(folder, small_settings("--method", "full"), 4.0), stage, [])
    return stage


def adapted_over(stage, settings):
    return tool.load_chat(stage, settings, adapt=True)


def copy_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy2(DEMO / name, folder)


@pytest.fixture(scope="session")
def untied_folder(demo_tokenizer, tmp_path_factory):
    """A tiny Llama whose output layer is not its embedding."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(2)
    config = tiny_config("llama", demo_tokenizer)
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    copy_tokenizer(folder)
    return str(folder)


@pytest.fixture
def base_of(tiny_folder, untied_folder):
    """Name of a tiny model -> its folder."""
    return lambda name: untied_folder if name == "untied" else tiny_folder(name)


@pytest.fixture(scope="module")
def talks_and_teacher(demo_chat):
    """Some answers and what the demo thinks of each token, for models that have its tokenizer."""
    return listened(demo_chat, FACTS)


@pytest.fixture(scope="module")
def batches(demo_tokenizer):
    """Batches of sums to learn by heart."""
    return conftest.make_batches(demo_tokenizer, [tool.Pool(SUMS, 1.0)], [64], 6, 192, "s")


# ------------------------------------------------------------------------------------------------ logits


def family_model(family, tokenizer):
    """A random model of a family whose logits are the product of states and output layer, and something more."""
    from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

    common = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3)
    config = {"gemma2, capped": lambda: Gemma2Config(final_logit_softcapping=3.0, head_dim=HEAD, **common),
              "granite, divided": lambda: GraniteConfig(logits_scaling=8.0, **common),
              "cohere, multiplied": lambda: CohereConfig(logit_scale=0.0625, **common)}.get(family)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config() if config else tiny_config(family, tokenizer)).eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma2, capped", "granite, divided",
                                    "cohere, multiplied"])
def test_the_logits_at_some_places_are_those_of_the_model_there(family, demo_tokenizer):
    model = family_model(family, demo_tokenizer)
    plain = model.get_output_embeddings()
    needed = torch.arange(57)[None].repeat(2, 1) % torch.tensor([[3], [5]]) == 0
    with torch.inference_mode():
        output = model(input_ids=TEXT.repeat(2, 1), output_hidden_states=True)
        found = tool.logits_at(model, model, needed, input_ids=TEXT.repeat(2, 1))
        assert found.dtype == torch.float32 and torch.allclose(found, output.logits[needed], atol=1e-5)
        bare = plain(output.hidden_states[-1][needed])
    assert torch.allclose(found, bare, atol=1e-5) is ("," not in family)  # what is more does something


@pytest.mark.parametrize("family", ["llama", "gemma2, capped", "granite, divided", "cohere, multiplied"])
def test_a_part_of_the_head_gives_the_logits_of_its_tokens_and_the_whole_head_is_there_again(family, demo_tokenizer):
    model, ids = family_model(family, demo_tokenizer), torch.tensor([3, 5, 8, 40])
    head, needed = model.get_output_embeddings(), torch.ones(1, 57, dtype=torch.bool)
    part = torch.nn.Linear(head.in_features, 4, bias=False)
    part.weight.data = head.weight.data[ids]
    with torch.inference_mode():
        found = tool.logits_at(model, model, needed, part, input_ids=TEXT)
        assert model.get_output_embeddings() is head and not part._forward_pre_hooks
        assert torch.allclose(found, tool.logits_at(model, model, needed, input_ids=TEXT)[:, ids], atol=1e-5)


def test_only_the_tokens_asked_for_get_logits_and_nothing_is_left_on_the_model(demo_tokenizer):
    model, seen = family_model("llama", demo_tokenizer), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, output: seen.append(output.shape[:-1]))
    needed = torch.zeros(3, 57, dtype=torch.bool)
    needed[0, 5] = needed[2, 7] = True
    tool.logits_at(model, model, needed, input_ids=TEXT.repeat(3, 1))
    with pytest.raises(IndexError):
        tool.logits_at(model, model, needed, input_ids=TEXT.repeat(3, 1) + 10**6)
    assert seen == [(2,)] and not head._forward_pre_hooks


# ------------------------------------------------------------------------------------------------ the loss


def reference_loss(model, batch, teacher, kl_weight):
    """The step's loss from whole logits, window by window, in the words of its definition: the mean over all learnt
    tokens of -log p, and over all known positions of the sum of b log(b/m), b the base and m the model, for the
    base's most probable tokens one by one and all others together."""
    entropies, divergences = [], []
    for window in batch:
        shares = model(input_ids=torch.tensor([window.input_ids])).logits[0].float().softmax(-1)
        for at, label in enumerate(window.labels):
            if label != -100:
                entropies.append(-shares[at - 1, label].log())
        for at, row in enumerate(window.targets):
            if row >= 0:
                base, ours = teacher.log_probs[row].exp(), shares[at, teacher.tokens[row].long()]
                base, ours = (torch.cat([p, (1 - p.sum())[None].clamp(min=1e-6)]) for p in (base, ours))
                divergences.append((base * (base / ours).log()).sum())
    assert entropies and divergences
    return torch.stack(entropies).mean() + kl_weight * torch.stack(divergences).mean()


def one_step(chat, batch, teacher, kl_weight, folder, patch, *flags):
    """Train on one batch at a rate that changes nothing: the loss of the whole step, its gradients by parameter, the
    shapes of what went through the decoder, and whether a mask did."""
    import accelerate

    settings = small_settings("--method", "full", "--kl-weight", kl_weight, *flags)
    losses, gradients, shapes, masks = [], {}, [], []
    backward = accelerate.Accelerator.backward

    def noted(self, loss, **kwargs):
        losses.append(loss.item())
        return backward(self, loss, **kwargs)

    def note(name):
        return lambda parameter: gradients.update({name: parameter.grad.clone()})

    def watch(module, given, named):
        shapes.append(tuple(named["input_ids"].shape))
        masks.append(named.get("attention_mask") is not None)

    hooks = [p.register_post_accumulate_grad_hook(note(name)) for name, p in chat.model.named_parameters()
             if p.requires_grad]
    hooks.append(tool.unwrapped(chat.model).register_forward_pre_hook(watch, with_kwargs=True))
    patch.setattr(accelerate.Accelerator, "backward", noted)
    conftest.train(chat, [batch], teacher, 1e-12, settings, "passo", folder / "training")
    for hook in hooks:
        hook.remove()
    return SimpleNamespace(loss=sum(losses), gradients=gradients, shapes=shapes, masked=masks)


def expect_the_reference(step, model, batch, teacher, kl_weight):
    """Compare loss and every gradient of a step with the reference."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = reference_loss(model, batch, teacher, kl_weight)
    expected = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    assert step.loss == pytest.approx(loss.item(), rel=1e-5)
    assert step.gradients.keys() == expected.keys() and len(expected) > 10
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(step.gradients[name], gradient, rtol=1e-3, atol=1e-5 * largest), name
    assert largest > 1e-3


def mixed_batch(tokenizer, talks, padding):
    """Windows with lessons and with talks that the teacher knows; of one length unless there is to be padding."""
    dialogue = [LESSONS[0], talks[0]]
    dialogues = [dialogue, [*dialogue, talks[1]], LESSONS] if padding else [dialogue] * 3
    batch = [tool.make_window(tokenizer, part) for part in dialogues]
    assert (len({len(window.input_ids) for window in batch}) > 1) is padding and len(batch) == 3
    return batch


@pytest.mark.parametrize("architecture, padding, again", [
    ("llama", True, False), ("llama", False, True), ("gemma3", True, True), ("qwen3", True, False)])
def test_loss_and_gradients_are_those_of_the_definition(architecture, padding, again, tiny_folder, talks_and_teacher,
                                                        tmp_path, monkeypatch):
    chat = tool.load_chat(tiny_folder(architecture), small_settings("--method", "full"))
    talks, teacher = talks_and_teacher
    batch, calls = mixed_batch(chat.tokenizer, talks, padding), []
    chat.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    step = one_step(chat, batch, teacher, 2.5, tmp_path, monkeypatch, *["--gradient-checkpointing"] * again)
    assert len(calls) == 1 + again  # a layer is gone through again on the way back
    longest = max(len(window.input_ids) for window in batch)
    assert step.shapes == [(3, longest)] and step.masked == [False]  # padding stands where no token sees it
    expect_the_reference(step, chat.model, batch, teacher, 2.5)


@pytest.mark.parametrize("parts", [2, 3])
def test_the_gradients_of_the_parts_of_a_step_add_up_to_those_of_the_step(parts, tiny_folder, talks_and_teacher,
                                                                          tmp_path, monkeypatch):
    chat = tool.load_chat(tiny_folder("llama"), small_settings("--method", "full"))
    talks, teacher = talks_and_teacher
    batch = mixed_batch(chat.tokenizer, talks, True)
    step = one_step(chat, batch, teacher, 2.5, tmp_path, monkeypatch, "--gradient-accumulation", parts,
                    "--batch-size", 3)
    assert [rows for rows, _ in step.shapes] == {2: [2, 1], 3: [1, 1, 1]}[parts]
    expect_the_reference(step, chat.model, batch, teacher, 2.5)


def test_loss_and_gradients_of_an_adapter_are_those_of_the_definition(tiny_folder, talks_and_teacher, tmp_path,
                                                                      monkeypatch):
    folder = tiny_folder("llama")
    chat = tool.load_chat(folder, lora(folder), 4.0, adapt=True)
    unsettle(chat.model)
    talks, teacher = talks_and_teacher
    batch = mixed_batch(chat.tokenizer, talks, True)
    monkeypatch.setattr(tool, "STANDS_FOR", 1)  # each token for itself
    step = one_step(chat, batch, teacher, 2.5, tmp_path, monkeypatch, "--gradient-checkpointing")
    expect_the_reference(step, chat.model, batch, teacher, 2.5)


@pytest.fixture
def tiny_adapted(tiny_folder):
    """A tiny model with an adapter that does something, and its head."""
    folder = tiny_folder("llama")
    chat = tool.load_chat(folder, lora(folder), 4.0, adapt=True)
    unsettle(chat.model)
    return chat, tool.unwrapped(chat.model).get_output_embeddings()


def test_an_adapter_learns_with_logits_of_the_words_that_are_spoken_and_in_each_step_of_others(
        tiny_adapted, talks_and_teacher, tmp_path, monkeypatch):
    (chat, head), (talks, teacher) = tiny_adapted, talks_and_teacher
    batch, seen, heads = mixed_batch(chat.tokenizer, talks, True), [], []
    known = {label for w in batch for label in w.labels if label >= 0} | {
        token for w in batch for row in w.targets if row >= 0 for token in teacher.tokens[row].tolist()}
    places = {tuple(row): token for token, row in enumerate(head.weight.tolist())}
    find = tool.words_of

    def watched(*given):
        words = find(*given)
        words.head.register_forward_hook(
            lambda part, *_: seen.append([places[tuple(row)] for row in part.weight.tolist()]))
        return words

    monkeypatch.setattr(tool, "words_of", watched)
    head.register_forward_hook(lambda *_: heads.append("the whole head"))
    conftest.train(chat, [batch] * (tool.STANDS_FOR + 1), teacher, 1e-12, small_settings("--kl-weight", 2.5), "passo",
                   tmp_path / "training")
    drawn = [set(tokens) - known for tokens in seen]
    assert all(known < set(tokens) and len(set(tokens)) == len(tokens) for tokens in seen) and not heads
    assert len(drawn) == tool.STANDS_FOR + 1 and drawn[0] == drawn[-1] and len(drawn[0]) > 10
    assert sum(map(len, drawn[:-1])) == len(set().union(*drawn)) > len(head.weight) - len(known) - tool.STANDS_FOR


def test_what_an_adapter_loses_with_a_part_of_the_words_is_about_what_it_loses_with_all(
        tiny_adapted, talks_and_teacher, tmp_path, monkeypatch):
    (chat, _), (talks, teacher) = tiny_adapted, talks_and_teacher
    batch = mixed_batch(chat.tokenizer, talks, True)
    step = one_step(chat, batch, teacher, 2.5, tmp_path, monkeypatch)
    assert step.loss == pytest.approx(reference_loss(chat.model, batch, teacher, 2.5).item(), rel=0.05)


def test_where_most_words_are_spoken_the_whole_head_is_used(tiny_adapted, talks_and_teacher):
    (chat, head), (talks, teacher) = tiny_adapted, talks_and_teacher
    batch, inner, counts = mixed_batch(chat.tokenizer, talks, True), tool.unwrapped(chat.model), []
    for share in (0.5, 0.6, 0.8):
        spoken = torch.arange(int(share * len(head.weight)), dtype=torch.int32).expand(len(teacher.tokens), -1)
        words = tool.words_of(inner, [batch], teacher._replace(tokens=spoken))
        counts.append(words and words.head.out_features / len(head.weight))
    assert counts[0] < counts[1] < 0.7 and counts[2] is None


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_head_that_is_trained_too_gives_the_logits_of_all_words(method, tiny_folder, talks_and_teacher):
    chat = tool.load_chat(tiny_folder("llama"), small_settings("--method", method), adapt=True)
    batch = mixed_batch(chat.tokenizer, talks_and_teacher[0], True)
    words = tool.words_of(tool.unwrapped(chat.model), [batch], talks_and_teacher[1])
    assert (words is None) is (method == "full")


# ------------------------------------------------------------------------------------------------ LoRA


@pytest.mark.parametrize("name", ["untied", "gemma3"])
def test_a_fresh_adapter_leaves_every_logit_as_it_was(name, base_of):
    folder = base_of(name)
    settings = lora(folder)
    plain, adapted = (tool.load_model(folder, settings, 4.0, adapt=adapt) for adapt in (False, True))
    assert plain is tool.unwrapped(plain) and adapted is not tool.unwrapped(adapted)
    assert not plain.training and not adapted.training
    assert torch.equal(logits(plain), logits(adapted))


@pytest.mark.parametrize("name", ["untied", "gemma3"])
def test_only_the_adapter_is_trained_and_it_is_on_every_linear_layer_but_the_output(name, base_of):
    folder = base_of(name)
    model = tool.load_model(folder, lora(folder), adapt=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {re.sub(r".*\.layers\.(\d+)\.(\w+)\.(\w+)\.lora_[AB]\.default\.weight", r"\1 \3", name)
              for name in trained}
    assert layers == {f"{i} {kind}_proj" for i in (0, 1) for kind in ("q", "k", "v", "o", "gate", "up", "down")}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name} and len(trained) == 28
    assert {min(p.shape) for name, p in model.named_parameters() if name in trained} == {RANK}


@pytest.mark.parametrize("flags, layers", [
    (("--rope-factor", 1), {"1"}), (("--rope-factor", 4), {"0", "1"}),
    (("--rope-factor", 1, "--knowledge-file", "x.jsonl"), {"0", "1"})])
def test_an_identity_alone_is_learnt_by_the_upper_half(flags, layers, base_of):
    folder = base_of("untied")
    model = tool.load_model(folder, lora(folder, *flags), adapt=True)
    assert {re.search(r"layers\.(\d+)", name)[1] for name, p in model.named_parameters() if p.requires_grad} == layers


@pytest.mark.parametrize("flags", [("--rope-factor", 1), ("--rope-factor", 4)])
def test_the_size_of_an_adapter_is_near_what_is_told_beforehand(flags, base_of):
    folder = base_of("untied")
    for rank in (RANK, 2 * RANK):
        settings = lora(folder, "--lora-rank", rank, *flags)
        count = sum(p.numel() for p in tool.load_model(folder, settings, adapt=True).parameters() if p.requires_grad)
        assert tool.adapter_size(tool.read_config(folder), settings) == pytest.approx(count, rel=0.1)


def test_a_fresh_adapter_is_the_same_each_time_with_the_same_seed_alone(base_of):
    folder = base_of("llama")
    drawn = []
    for seed in (0, 0, 1):
        torch.rand(len(drawn) + 1)
        drawn.append(parts_of(tool.load_model(folder, lora(folder, "--seed", seed), adapt=True), ["lora_A"]))
    assert drawn[0] and all(torch.equal(weight, drawn[1][name]) for name, weight in drawn[0].items())
    assert not any(torch.equal(weight, drawn[2][name]) for name, weight in drawn[0].items())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_what_is_healed_is_the_whole_model_however_it_is_trained_later_and_only_in_queries_and_keys(
        name, base_of, talks_and_teacher, tmp_path):
    """An adapter goes over the healed weights, so that it holds the identity alone."""
    folder, (talks, teacher) = base_of(name), talks_and_teacher
    settings = lora(folder, "--heal-steps", 15, "--window", 128, "--batch-size", 4)
    healed = tmp_path / "healed"
    healed.mkdir()
    tool.make_healed(job_with(talks, teacher, settings, 128), healed)
    with safe_open(healed / "model.safetensors", "pt") as after, safe_open(
            f"{folder}/model.safetensors", "pt") as base:
        assert set(after.keys()) == set(base.keys())
        different = {key for key in base.keys() if not torch.equal(after.get_tensor(key), base.get_tensor(key))}
    assert len(different) >= 2 and all(re.search(r"[qk]_(proj|norm)", key) for key in different)
    assert {f"layers.{i}.self_attn.{kind}_proj" for i in (0, 1) for kind in "qk"} <= {
        part for key in different for part in re.findall(r"layers.*_proj", key)} or name == "gemma3"
    again = tool.load_model(healed, settings, adapt=True)  # what the next stage goes on from
    assert all("lora_" in key for key, p in again.named_parameters() if p.requires_grad)
    assert again.config.max_position_embeddings == 256
    log = json.loads((healed / "log.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in log] == [1, 2, 3]


@pytest.fixture(params=["untied", "gemma3"])
def adapted(request, base_of, tmp_path):
    """A stage with an adapter that does something over a scaled base: base folder, settings, chat, stage folder."""
    folder = base_of(request.param)
    settings = lora(folder)
    chat = adapted_over(scaled_stage(folder, tmp_path / "healed"), settings)
    unsettle(chat.model)
    tool.save_stage(chat, tmp_path / "stage", [{"loss": 1.0}])
    return SimpleNamespace(folder=folder, settings=settings, chat=chat, stage=tmp_path / "stage", name=request.param)


def test_a_stage_holds_the_adapter_and_no_weight_of_the_base(adapted):
    assert [path.name for path in adapted.stage.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt")] == [
        tool.LORA_FILE]
    with safe_open(adapted.stage / tool.LORA_FILE, "pt") as weights:
        names = list(weights.keys())
    assert len(names) == 28 and all("lora_" in name for name in names)
    assert json.loads((adapted.stage / "log.json").read_text(encoding="utf-8")) == [{"loss": 1.0}]


def test_a_loaded_stage_gives_the_logits_that_were_saved(adapted):
    expected = logits(adapted.chat.model)
    again = tool.load_chat(adapted.stage, adapted.settings)
    assert torch.equal(logits(again.model), expected)
    assert not torch.allclose(logits(tool.load_model(adapted.folder, adapted.settings, 4.0)), expected, atol=1e-2)
    assert not again.model.training and again.stops == adapted.chat.stops
    for name, frequencies in tool.rope_frequencies(tool.unwrapped(adapted.chat.model)).items():
        assert torch.equal(tool.rope_frequencies(tool.unwrapped(again.model))[name], frequencies)


def test_the_merged_and_saved_model_gives_the_logits_of_base_and_adapter(adapted, tmp_path):
    from transformers import AutoModelForCausalLM

    expected = logits(adapted.chat.model)
    merged = tool.load_chat(adapted.stage, adapted.settings, merge=True)
    assert merged.model is tool.unwrapped(merged.model)
    tool.save_model(merged, tmp_path / "saved", tool.Path(adapted.folder))
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    with safe_open(f"{adapted.folder}/model.safetensors", "pt") as weights:
        assert names == set(weights.keys())
    assert ("lm_head.weight" in names) is (adapted.name == "untied")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.allclose(logits(plain), expected, atol=1e-4)
    assert plain.config.max_position_embeddings == 256 and plain.config.use_cache is True
    turning = tool.rope_frequencies(plain)
    scaled = [values for name, values in turning.items() if "sliding" not in name and "original" not in name]
    formula = torch.tensor([THETA ** (-2 * i / HEAD) / 4 for i in range(HEAD // 2)])
    assert len(scaled) == 1 and torch.allclose(scaled[0], formula, rtol=1e-6, atol=0)
    local = torch.tensor([LOCAL_THETA ** (-2 * i / HEAD) for i in range(HEAD // 2)])
    assert all(torch.allclose(values, local) for name, values in turning.items() if "sliding_attention_inv" in name)


def test_merging_rounds_no_weight_of_the_base_where_the_machine_computes_in_half_precision(base_of, tmp_path,
                                                                                          monkeypatch):
    """A base in float32 is saved in float32, so a way through bfloat16 would be seen in every weight of it."""
    folder = base_of("untied")
    expected = tool.load_model(folder, small_settings("--method", "full")).state_dict()
    monkeypatch.setattr(tool, "compute_dtype", lambda weights: torch.bfloat16)
    settings = lora(folder)
    chat = tool.load_chat(folder, settings, adapt=True)  # its adapter does nothing yet
    tool.save_stage(chat, tmp_path / "stage", [])
    tool.save_model(tool.load_chat(tmp_path / "stage", settings, merge=True), tmp_path / "saved", tool.Path(folder))
    saved = tool.load_model(tmp_path / "saved", small_settings("--method", "full")).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in saved.items())


def test_with_the_adapter_off_a_stage_without_scaling_is_the_base(base_of, batches, tmp_path):
    folder = base_of("gemma3")
    settings = lora(folder, "--rope-factor", 1)
    chat = tool.load_chat(folder, settings, adapt=True)
    conftest.train(chat, batches[:4], NO_TEACHER, 1e-2, settings, "passo", tmp_path / "training")
    tool.save_stage(chat, tmp_path / "stage", [])
    base = logits(tool.load_model(folder, settings))
    for model in (chat.model, tool.load_model(tmp_path / "stage", settings)):
        assert not torch.allclose(logits(model), base, atol=1e-2)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)


@pytest.mark.slow
def test_a_training_with_an_adapter_goes_on_from_its_checkpoint_bit_by_bit(base_of, batches, tmp_path, capsys):
    folder = base_of("llama")
    settings = lora(folder, "--checkpoint-minutes", 0)
    training = tmp_path / "training"
    fresh = tool.load_chat(folder, settings, 4.0, adapt=True)

    def train(chat):
        conftest.train(chat, batches, NO_TEACHER, 1e-2, settings, "passo", training)
        return parts_of(chat.model, ["lora_"])

    expected = train(fresh)
    shutil.rmtree(training)
    cut = tool.load_chat(folder, settings, 4.0, adapt=True)
    start, steps = parts_of(cut.model, ["lora_"]), []

    def power_cut(module, given):
        steps.append(1)
        if len(steps) == 4:
            raise OSError("power cut")

    tool.unwrapped(cut.model).base_model.register_forward_pre_hook(power_cut)
    with pytest.raises(OSError, match="power cut"):
        train(cut)
    held = parts_of(cut.model, ["lora_"])
    checkpoints = [path.name for path in training.glob("checkpoint-*")]
    assert checkpoints == ["checkpoint-3"] and not list(training.rglob("model.safetensors"))
    capsys.readouterr()
    found = train(tool.load_chat(folder, settings, 4.0, adapt=True))
    assert "continuando da etapa 3" in capsys.readouterr().out
    for name, weight in expected.items():
        assert torch.equal(found[name], weight) and not torch.equal(held[name], weight), name
        assert not torch.equal(start[name], weight)


# ------------------------------------------------------------------------------------------------ few bits

needs_bitsandbytes = pytest.mark.skipif(FIND("bitsandbytes") is None, reason="bitsandbytes is not installed")


@needs_bitsandbytes
def test_over_weights_in_four_bits_an_adapter_is_trained_kept_and_worked_into_the_whole_ones(talks_and_teacher,
                                                                                             tmp_path):
    settings = lora(DEMO, "--batch-size", 3, "--gradient-checkpointing")
    four_bits, whole = changed(settings, method="qlora", kl_weight=1.0), tool.load_model(DEMO, settings)
    talks, teacher = talks_and_teacher
    chat = tool.load_chat(DEMO, four_bits, 4.0, adapt=True, train=True)
    packed = {name: p.clone() for name, p in chat.model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == sum("proj" in name for name, _ in whole.named_parameters())
    rate = tool.automatic_rate(tool.load_model(DEMO, settings, adapt=True), 1e-3, 2e-3)  # the packed ones count whole
    assert tool.automatic_rate(chat.model, 1e-3, 2e-3) == pytest.approx(rate)
    log = conftest.train(chat, [mixed_batch(chat.tokenizer, talks, True)] * 12, teacher, 1e-2, four_bits, "passo",
                     tmp_path / "training")
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert all(torch.equal(p, packed[name]) for name, p in chat.model.named_parameters() if name in packed)
    tool.save_stage(chat, tmp_path / "stage", [])
    assert "quantization_config" not in (tmp_path / "stage" / "config.json").read_text(encoding="utf-8")
    assert torch.equal(logits(tool.load_model(tmp_path / "stage", four_bits, 4.0, train=True)), logits(chat.model))
    merged = dict(tool.load_model(tmp_path / "stage", four_bits, merge=True).named_parameters())
    adapter = dict(chat.model.named_parameters())
    for name, weight in whole.named_parameters():
        if "proj" in name:
            layer = "base_model.model." + name.removesuffix("weight")
            a, b = (adapter[f"{layer}lora_{part}.default.weight"] for part in "AB")
            weight = (weight.bfloat16().float() + 2 * b @ a).bfloat16()
        assert torch.allclose(merged[name].float(), weight.float(), rtol=0.01, atol=1e-6), name


@pytest.mark.parametrize("method, how, packed, on_card", [
    ("lora", {"train": True}, False, True), ("qlora", {}, False, True), ("qlora", {"train": True}, True, None),
    ("qlora4", {}, True, None), ("qlora4", {"train": True}, True, None),  # transformers moves what it packs
    ("lora", {"merge": True}, False, True), ("qlora", {"merge": True}, False, False),
    ("qlora4", {"merge": True}, False, False)])
def test_only_what_a_card_needs_in_few_bits_is_packed_and_what_is_saved_is_whole_and_beside_the_card(
        method, how, packed, on_card, monkeypatch):
    """With "qlora" the training alone, as 16 bits fit otherwise; with "qlora4" all that does not write weights."""
    options, places = {}, []
    stand_in = SimpleNamespace(to=lambda place: places.append(place) or stand_in, eval=lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(tool, "load_weights", lambda *_, **given: options.update(given) or stand_in)
    monkeypatch.setattr(tool.transformers, "BitsAndBytesConfig", SimpleNamespace, raising=False)
    tool.load_model(DEMO, changed(lora(DEMO), method=method), **how)
    assert ("quantization_config" in options) is packed
    assert places == {True: ["cuda"], False: ["cpu"], None: []}[on_card]


# ------------------------------------------------------------------------------------------------ parts that see


@pytest.fixture(scope="module")
def seeing(demo_tokenizer, tmp_path_factory):
    """Folder of a tiny Gemma 3 that also sees."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    folder = tmp_path_factory.mktemp("seeing")
    vision = SiglipVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                image_size=16, patch_size=4)
    torch.manual_seed(1)
    config = Gemma3Config(text_config=tiny_config("gemma3", demo_tokenizer).to_dict(), vision_config=vision.to_dict(),
                          mm_tokens_per_image=4, image_token_index=5, boi_token_index=6, eoi_token_index=7)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    copy_tokenizer(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_parts_of_a_model_that_see_get_no_gradient_and_no_adapter_and_are_saved_as_they_were(
        method, seeing, talks_and_teacher, tmp_path):
    """Without pictures there is nothing to learn for them."""
    settings = lora(seeing, "--method", method, "--batch-size", 3)
    untouched = parts_of(tool.load_model(seeing, settings), ["vision", "multi_modal"])
    assert len(untouched) > 10
    chat = adapted_over(scaled_stage(seeing, tmp_path / "healed"), settings)
    trained = {name for name, p in chat.model.named_parameters() if p.requires_grad}
    assert trained and not any(re.search("vision|multi_modal", name) for name in trained)
    text = [name for name, _ in tool.unwrapped(chat.model).named_parameters() if re.search("language_model", name)]
    assert any("q_proj" in name for name in text)
    assert len(trained) == (28 if method == "lora" else len(text))
    talks, teacher = talks_and_teacher
    batch = mixed_batch(chat.tokenizer, talks, True)
    before = parts_of(chat.model, ["language_model"])
    conftest.train(chat, [batch] * 3, teacher, 1e-2, settings, "passo", tmp_path / "training")
    different = {name for name, p in chat.model.named_parameters() if name in before
                 and not torch.equal(p, before[name])}
    assert different == trained
    tool.save_stage(chat, tmp_path / "stage", [])
    expected = logits(chat.model)
    assert torch.equal(logits(tool.load_model(tmp_path / "stage", settings)), expected)
    tool.save_model(tool.load_chat(tmp_path / "stage", settings, merge=True), tmp_path / "saved", tool.Path(seeing))
    saved = tool.load_model(tmp_path / "saved", small_settings("--method", "full"))
    after = parts_of(saved, ["vision", "multi_modal"])
    assert after.keys() == untouched.keys()
    assert all(torch.equal(weight, untouched[name]) for name, weight in after.items())
    assert torch.allclose(logits(saved), expected, atol=1e-4)
    assert type(saved).__name__ == "Gemma3ForConditionalGeneration"
    assert saved.config.get_text_config().max_position_embeddings == 256


# ------------------------------------------------------------------------------------------------ learning rates


class Sized(torch.nn.Module):
    """So many weights, in no memory; with an adapter, so many more in it."""

    def __init__(self, weights, adapter=0):
        super().__init__()
        self.base = torch.nn.Linear(weights // 1000, 1000, bias=False, device="meta")
        if adapter:
            self.lora_A = torch.nn.Linear(adapter // 1000, 1000, bias=False, device="meta")
            self.get_base_model = lambda: self.base


@pytest.mark.parametrize("weights, full, adapter", [
    (10**6, 1e-3, 2e-3), (4 * 10**6, 5e-4, 2e-3 * 2**(-2 / 3)), (64 * 10**6, 1e-3 / 8, 5e-4), (10**9, 3.162e-5, 2e-4),
    (8 * 10**9, 1.118e-5, 1e-4),
])
def test_the_rate_falls_with_the_size_of_the_model_and_less_for_an_adapter(weights, full, adapter):
    assert tool.automatic_rate(Sized(weights), 1e-3, 2e-3) == pytest.approx(full, rel=1e-3)
    for size in (1000, 64000):  # its own size does not count
        assert tool.automatic_rate(Sized(weights, size), 1e-3, 2e-3) == pytest.approx(adapter)


# ------------------------------------------------------------------------------------------------ memory


def shapes():
    """Configurations of real models with their numbers of weights."""
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

    def described(kind, layers, hidden, heads, shared, head, mlp, words):
        return kind(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, head_dim=head,
                    num_key_value_heads=shared, intermediate_size=mlp, vocab_size=words)

    return {"Gemma 3 1B": (described(Gemma3TextConfig, 26, 1152, 4, 1, 256, 6912, 262144), 999_885_952),
            "Llama 3.2 3B": (described(LlamaConfig, 28, 3072, 24, 8, 128, 8192, 128256), 3_212_749_824),
            "Qwen 3 8B": (described(Qwen3Config, 36, 4096, 32, 8, 128, 12288, 151936), 8_190_735_360)}


def estimate(name="Gemma 3 1B", **values):
    config, weights = shapes()[name]
    settings = changed(small_settings("--method", "lora", "--rope-factor", 1, "--knowledge-file", "x.jsonl"), **values)
    return tool.estimate_memory(config, weights, settings)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "qlora4"])
def test_the_estimate_grows_with_window_batch_and_vocabulary(method, again):
    given = {"method": method, "gradient_checkpointing": again}
    windows = [estimate(window=window, **given) for window in (8192, 16384, 32768, 65536)]
    assert windows == sorted(windows)
    steps = [after - before for before, after in zip(windows, windows[1:])]
    assert steps[1] == pytest.approx(2 * steps[0], rel=1e-3) and steps[2] == pytest.approx(2 * steps[1], rel=1e-3)
    batches = [estimate(batch_size=size, **given) for size in (8, 16, 32, 64)]
    assert batches == sorted(batches) and len(set(batches)) == 4
    config, weights = shapes()["Gemma 3 1B"]
    small = type(config)(**{**config.to_dict(), "vocab_size": 32000})
    settings = changed(small_settings(), **given)
    assert tool.estimate_memory(small, weights, settings) < tool.estimate_memory(config, weights, settings)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("material", ["", "x.jsonl"])
def test_the_estimate_covers_what_pytorch_would_allocate_for_a_window_and_not_much_more(material, again, monkeypatch):
    monkeypatch.setattr(tool, "compute_dtype", lambda weights: torch.bfloat16)
    config, window = bench_memory.shapes()["Gemma 3 1B"], 1024 if material else 512
    settings = tool.parse_settings(["--method", "lora", "--lora-rank", "32", "--rope-factor", "1", "--batch-size", "1",
                                    "--knowledge-file", material, *["--gradient-checkpointing"] * again])
    peak, weights = bench_memory.alive_at_peak(config, settings, window)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = estimate(window=window, gradient_checkpointing=again, lora_rank=32, batch_size=1, knowledge_file=material)
    assert weights == shapes()["Gemma 3 1B"][1] and peak < asked < 1.5 * peak


@pytest.mark.parametrize("again", [False, True])
def test_half_of_what_a_step_takes_is_saved_by_splitting_it_in_two(again):
    given = {"method": "full", "gradient_checkpointing": again, "window": 1024, "batch_size": 512}
    totals = [estimate(gradient_accumulation=parts, **given) for parts in (1, 2, 4, 8)]
    saved = [before - after for before, after in zip(totals, totals[1:])]
    assert all(later == pytest.approx(earlier / 2, rel=1e-3) for earlier, later in zip(saved, saved[1:]))
    assert saved[0] > (0.1 if again else 0.4) * totals[0]


def test_a_window_takes_what_it_takes_however_many_parts_a_step_has():
    """A step of long windows has fewer of them: at 8192 tokens it has one, which cannot be split."""
    whole, split = (estimate(window=8192, gradient_accumulation=parts, batch_size=8) for parts in (1, 8))
    assert whole == split > estimate(window=4096, gradient_accumulation=8, batch_size=8)


@pytest.mark.parametrize("gpu", [True, False])
def test_small_steps_take_less_of_a_card_but_on_a_processor_what_steps_of_a_thousand_tokens_do(gpu, free):
    """Windows of many sizes break its heap up: Qwen 0.5B took 6 GB in steps of 384 tokens."""
    free(10**12, gpu=gpu)
    least, small, more = (estimate(knowledge_file="", batch_size=size) for size in (3, 5, 8))
    assert least < small < more if gpu else least == small < more


@pytest.mark.parametrize("name", ["Gemma 3 1B", "Qwen 3 8B"])
def test_window_takes_memory_only_where_there_are_windows_so_long(name):
    """Identity and everyday talks are short."""
    given = {"gradient_checkpointing": True, "gradient_accumulation": 8}
    short = [estimate(name, knowledge_file="", window=window, **given) for window in (512, 2048, 65536)]
    assert len(set(short)) == 1
    assert short[0] < estimate(name, **given) < estimate(name, knowledge_file="", rope_factor=4.0, **given)


@pytest.mark.parametrize("name", ["Gemma 3 1B", "Qwen 3 8B"])
def test_checkpointing_and_an_adapter_and_four_bits_each_take_less(name, free):
    free(10**12, gpu=True)
    _, weights = shapes()[name]
    for method in ("full", "lora", "qlora"):
        again, kept = (estimate(name, method=method, gradient_checkpointing=on) for on in (True, False))
        assert again < kept
    full, adapter, trained, four_bits = (estimate(name, method=method, gradient_checkpointing=True) for method in
                                         ("full", "lora", "qlora", "qlora4"))
    assert full > 16 * weights and adapter > 2 * weights and trained > 2 * weights and four_bits > 0.5 * weights
    assert four_bits <= trained < adapter < full / 2
    small, large = (estimate(name, lora_rank=rank, gradient_checkpointing=True) for rank in (8, 256))
    assert small < adapter < large


def test_with_few_bits_for_training_alone_the_model_in_16_bits_must_fit_and_with_few_bits_for_all_it_need_not(free):
    free(10**12, gpu=True)
    small = {"window": 256, "batch_size": 1, "gradient_checkpointing": True}
    _, weights = shapes()["Qwen 3 8B"]
    trained, four_bits = (estimate("Qwen 3 8B", method=method, **small) for method in ("qlora", "qlora4"))
    assert 2 * weights < trained < 2.2 * weights and 0.7 * weights < four_bits < 1.1 * weights
    again = estimate("Qwen 3 8B", method="qlora", window=65536)  # where training takes more than the weights do
    assert again == estimate("Qwen 3 8B", method="qlora4", window=65536)


@pytest.mark.parametrize("name, adamw", [("Llama 3.2 3B", 28 * 3072 * 4096), ("Qwen 3 8B", 36 * 4096 * 5120)])
def test_queries_and_keys_that_are_healed_take_more_than_an_adapter_over_the_same_weights(name, adamw, free):
    """Each has a value, a gradient and two moments in float32; without healing, they are like the others."""
    free(10**12, gpu=True)
    _, weights = shapes()[name]
    for method in ("lora", "qlora"):
        again, healed = (estimate(name, method=method, rope_factor=factor) for factor in (1, 4))
        assert healed > again and healed > 2 * weights + 16 * adamw
    small = estimate(name, method="lora", rope_factor=4, gradient_checkpointing=True, window=256, batch_size=1)
    assert small == pytest.approx(2 * weights + 18 * adamw, rel=0.07)


def test_a_family_whose_heads_differ_by_layer_is_estimated_without_a_longer_context_which_it_cannot_have():
    config = tool.transformers.CONFIG_MAPPING["gemma4_text"]()
    for method in ("full", "lora", "qlora", "qlora4"):
        settings = changed(small_settings("--rope-factor", 1), method=method)
        assert tool.estimate_memory(config, 10**9, settings) > 5 * 10**8


def test_the_embeddings_stay_in_16_bits_once_if_the_head_shares_them(free):
    free(10**12, gpu=True)
    config, weights = shapes()["Llama 3.2 3B"]
    settings = changed(small_settings(), method="qlora4")
    shared = type(config)(**{**config.to_dict(), "tie_word_embeddings": True})
    saved = tool.estimate_memory(config, weights, settings) - tool.estimate_memory(shared, weights, settings)
    assert saved == pytest.approx(1.48 * config.vocab_size * config.hidden_size, rel=1e-3)


def test_the_widest_mlp_of_a_model_counts():
    layers = SimpleNamespace(intermediate_size=[128, 256])  # as Gemma 3n has it
    assert tool.widest(layers, "intermediate_size", 64) == 256 and tool.widest(layers, "head_dim", 64) == 64


# ------------------------------------------------------------------------------------------------ the choice


@pytest.fixture
def free(monkeypatch):
    """Pretend that a GPU, or the machine without one, has so many bytes free."""
    def pretend(count, gpu=False, bitsandbytes=False):
        def find(name, *more):
            found = SimpleNamespace(name=name) if bitsandbytes else None
            return found if name == "bitsandbytes" else FIND(name, *more)

        def no_gpu(*_):
            raise RuntimeError("there is no GPU")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", (lambda *_: (int(count), 10**15)) if gpu else no_gpu)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**15 if gpu else int(count)))
        monkeypatch.setattr(importlib.util, "find_spec", find)

    return pretend


def simple_estimate(config, weights, settings):
    """In place of the real one: 100, 40 or 20 for the state, and 8 for each row of 800 tokens, or 2 when layers are
    gone through again."""
    rows = -(-settings.batch_size // settings.gradient_accumulation)
    row = settings.window / 100 / (4 if settings.gradient_checkpointing else 1)
    return {"full": 100, "lora": 40, "qlora": 20, "qlora4": 20}[settings.method] + rows * row


@pytest.mark.parametrize("usable, flags, bitsandbytes, expected", [
    (104, (), True, ("lora", 1, False)),  # all of it fits
    (103, (), True, ("lora", 2, False)), (71, (), True, ("lora", 4, False)),
    (71, (), False, ("lora", 4, False)),  # without bitsandbytes
    (55, (), True, ("lora", 8, False)),  # more parts before anything is computed again
    (47, (), True, ("lora", 4, True)), (42, (), True, ("lora", 8, True)),
    (41, (), True, ("qlora", 4, False)), (22, (), True, ("qlora", 8, True)),
    (200, ("--method", "lora"), True, ("lora", 1, False)),  # what is asked for is kept, more and less free
    (200, ("--method", "qlora"), True, ("qlora", 1, False)),
    (164, ("--method", "full"), True, ("full", 1, False)), (102, ("--method", "full"), True, ("full", 8, True)),
    (200, ("--gradient-checkpointing",), True, ("lora", 1, True)),
    (200, ("--gradient-accumulation", 4), True, ("lora", 4, False)),
    (47, ("--gradient-accumulation", 8), True, ("lora", 8, True)),
])
def test_what_fits_best_is_chosen(usable, flags, bitsandbytes, expected, free, monkeypatch):
    free((usable + 0.01) * GB / 0.9, True, bitsandbytes)
    given = small_settings("--window", 800, "--batch-size", 8, *flags)
    monkeypatch.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
    chosen, needed = tool.choose_method(None, 1, given)
    assert (chosen.method, chosen.gradient_accumulation, chosen.gradient_checkpointing) == expected
    assert needed == GB * simple_estimate(None, 1, chosen) <= usable * GB
    assert chosen == changed(given, method=expected[0], gradient_accumulation=expected[1],
                             gradient_checkpointing=expected[2])


def test_a_step_is_never_in_more_parts_than_batch_size(monkeypatch, free):
    free(22 * GB / 0.9 + 1, False, False)
    tried = []
    monkeypatch.setattr(tool, "estimate_memory", lambda *values: tried.append(values[2]) or 10**15)
    with pytest.raises(tool.InputError):
        tool.choose_method(None, 1, small_settings("--method", "lora", "--batch-size", 2))
    assert {settings.gradient_accumulation for settings in tried} == {1, 2}


@pytest.mark.parametrize("weights, flags, expected", [
    (tool.SMALL - 1, (), (1600, 800, 40000, 64)), (tool.SMALL, (), (320, 160, 40000, 32)),
    (tool.SMALL, ("--rope-factor", 1), (480, 240, 24000, 32)),
    (tool.SMALL, ("--knowledge-file", "x.jsonl", "--rope-factor", 1), (320, 160, 40000, 32)),
    (tool.SMALL, ("--steps-1", 51, "--lora-rank", 7, "--rope-factor", 1), (51, 26, 24000, 7)),
    (1, ("--steps-1", 51, "--self-text", 70), (51, 26, 70, 64)), (1, ("--steps-2", 7), (1600, 7, 40000, 64))])
def test_zero_stands_for_steps_text_and_rank_that_suit_the_size_of_the_model(weights, flags, expected):
    filled = tool.with_automatic(tool.parse_settings(list(map(str, flags))), weights)
    assert (filled.steps_1, filled.steps_2, filled.self_text, filled.lora_rank) == expected


@pytest.mark.parametrize("usable, flags, bitsandbytes", [
    (101, ("--method", "full"), True), (41, ("--method", "lora"), True), (41, (), False), (21, (), True)])
def test_the_window_is_not_made_smaller_so_that_a_model_fits(usable, flags, bitsandbytes, free, monkeypatch):
    free((usable + 0.01) * GB / 0.9, True, bitsandbytes)
    monkeypatch.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
    with pytest.raises(tool.InputError, match="--window"):
        tool.choose_method(None, 1, small_settings("--window", 800, "--batch-size", 8, *flags))


def test_few_bits_that_are_asked_for_are_used_on_a_machine_without_a_gpu_as_well(free, monkeypatch):
    monkeypatch.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
    free(1000 * GB, False, True)
    assert tool.choose_method(None, 1, small_settings("--method", "qlora"))[0].method == "qlora"


def test_not_all_weights_are_trained_unless_asked_for(free, monkeypatch):
    monkeypatch.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
    free(1000 * GB, True, True)
    for weights, flags, method in ((tool.SMALL - 1, (), "lora"), (tool.SMALL, (), "lora"),
                                   (tool.SMALL, ("--method", "full"), "full")):
        assert tool.choose_method(None, weights, small_settings(*flags))[0].method == method


def test_without_a_gpu_the_memory_of_the_machine_counts_and_few_bits_are_no_choice(free, monkeypatch):
    monkeypatch.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
    free(42.5 * GB / 0.9, False, True)
    assert tool.choose_method(None, 1, small_settings("--window", 800))[0].method == "lora"
    free(41.5 * GB / 0.9, False, True)
    with pytest.raises(tool.InputError, match="memória livre"):
        tool.choose_method(None, 1, small_settings("--window", 800))


@pytest.mark.parametrize("method, gpu, bitsandbytes, advice", [
    ("auto", True, True, ()), ("auto", True, False, ("pip install bitsandbytes",)), ("auto", False, False, ()),
    ("full", True, True, ("--method lora",)), ("lora", True, True, ()),
])
def test_a_model_that_no_method_makes_fit_is_refused_with_what_to_do(method, gpu, bitsandbytes, advice, free,
                                                                     monkeypatch):
    monkeypatch.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
    free(18.05 * GB / 0.9, gpu, bitsandbytes)
    with pytest.raises(tool.InputError) as error:
        tool.choose_method(None, 1, small_settings("--window", 800, "--method", method))
    message, least = str(error.value), {"full": 102, "lora": 42, "auto": 22 if bitsandbytes else 42}[method]
    available, needed = (float(n.replace(",", ".")) for n in re.findall(r"([\d,]+) GB", message))
    assert needed == least and available == pytest.approx(18, abs=0.15)
    assert "Feche outros programas" in message and "modelo menor" in message and "--window" in message
    told = [text for text in ("pip install bitsandbytes", "--method lora") if text in message]
    assert told == list(advice) and not re.search(r"[a-z]+ing\b", message)


@pytest.mark.parametrize("flags, most", [
    (("--gradient-accumulation", 16), 8), (("--gradient-accumulation", 9), 8),
    (("--batch-size", 1, "--gradient-accumulation", 2), 1), (("--batch-size", 5, "--gradient-accumulation", 3), 5),
])
def test_more_parts_than_dialogues_or_a_number_of_them_that_is_no_power_of_two_is_no_mistake(flags, most, free):
    config, weights = shapes()["Gemma 3 1B"]
    free(10**14)
    chosen, needed = tool.choose_method(config, weights, small_settings(*flags))
    assert chosen.method == "lora" and needed < 10**14
    assert min(most, chosen.gradient_accumulation) >= min(most, small_settings(*flags).gradient_accumulation)


@pytest.mark.parametrize("name, memory, bitsandbytes, window, method", [
    ("Gemma 3 1B", 6, False, 2048, "lora"), ("Llama 3.2 3B", 10, False, 2048, "lora"),
    ("Llama 3.2 3B", 8.8, True, 2048, "lora"), ("Llama 3.2 3B", 8, True, 2048, "qlora"),
    ("Llama 3.2 3B", 6, True, 2048, "qlora4"), ("Qwen 3 8B", 24, False, 2048, "lora"),
    ("Qwen 3 8B", 19.9, True, 2048, "qlora"), ("Qwen 3 8B", 16, True, 2048, "qlora4")])
def test_a_real_model_is_trained_on_a_common_card(name, memory, bitsandbytes, window, method, free):
    config, weights = shapes()[name]
    free(memory * GB, True, bitsandbytes)
    chosen, needed = tool.choose_method(config, weights, small_settings("--rope-factor", 1, "--window", window))
    assert (chosen.method, chosen.window) == (method, window)
    assert needed == tool.estimate_memory(config, weights, chosen) <= 0.9 * memory * GB


@pytest.mark.parametrize("name, memory, method", [
    ("Gemma 3 1B", 6, "lora"), ("Llama 3.2 3B", 12, None), ("Llama 3.2 3B", 17, "lora"), ("Qwen 3 8B", 24, None),
    ("Qwen 3 8B", 40, "lora")])
def test_a_context_is_made_longer_only_where_its_healing_fits(name, memory, method, free):
    config, weights = shapes()[name]
    free(memory * GB, True)
    if method:
        assert tool.choose_method(config, weights, small_settings())[0].method == method
        return
    with pytest.raises(tool.InputError, match="--rope-factor 1 .sem a cura"):
        tool.choose_method(config, weights, small_settings())


def test_few_bits_that_are_asked_for_are_used_for_all_where_16_bits_do_not_fit(free):
    config, weights = shapes()["Llama 3.2 3B"]
    settings = small_settings("--rope-factor", 1, "--method", "qlora")
    for memory, method in ((100, "qlora"), (7, "qlora4")):
        free(memory * GB, True, True)
        assert tool.choose_method(config, weights, settings)[0].method == method


# ------------------------------------------------------------------------------------------------ the command line


def call(*arguments):
    """The script's command line in this process: exit status, what it said, what it complained about."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = tool.main([str(argument) for argument in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


@pytest.fixture
def guest(monkeypatch):
    """This process is not the script's own."""
    monkeypatch.setattr(tool, "quiet_libraries", lambda _: None)
    return monkeypatch


@pytest.mark.parametrize("gpu", [False, True])
def test_few_bits_without_what_they_need_are_refused_with_the_command_to_get_it(gpu, free, guest, tmp_path):
    guest.setattr(tool, "load_chat", lambda *_, **__: pytest.fail("a model was loaded"))
    free(10**12, gpu, False)
    guest.setattr(torch.cuda, "device_count", lambda: int(gpu))
    done = call("--method", "qlora", "--output-dir", tmp_path / "novo")
    assert done.status == 2 and "pip install bitsandbytes" in done.err and "METHOD" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_does_not_exist_is_refused(guest, tmp_path):
    done = call("--method", "dora", "--output-dir", tmp_path / "novo")
    assert done.status == 2 and "auto, full, lora, qlora" in done.err and list(tmp_path.iterdir()) == []


@pytest.fixture
def without_models(guest):
    """The script makes its plan without a model."""
    guest.setattr(tool, "make_plan", lambda _: {})
    return guest


@pytest.fixture
def planned(without_models, free, tmp_path):
    """Runs the script up to its first stage with so much memory free; the job and the seconds that the stages were
    given, how often they were measured, and what plan.json holds."""
    without_models.setattr(tool, "conclude", lambda _: 0)
    measured = []

    def make_plan(job):
        measured.append(job)
        return {"1-base": 10.0 * len(measured)}

    def plan(memory, *flags):
        given, seconds = [], {}
        without_models.setattr(tool, "make_plan", make_plan)
        without_models.setattr(tool, "run_stages", lambda job, plan, _: given.append(job) or seconds.update(plan))
        measured.clear()
        free(memory)
        done = call("--output-dir", tmp_path / "novo", *flags)
        assert done.status == 0, done.err
        file = tmp_path / "novo.work" / "plan.json"
        return SimpleNamespace(settings=given[0].settings if given else None,
                               memory=given[0].plan["memory"] if given else 0,
                               seconds=seconds, measured=len(measured),
                               written=json.loads(file.read_text(encoding="utf-8")) if file.exists() else None)

    return plan


def test_a_context_that_would_be_healed_in_few_bits_is_refused_before_any_work_with_what_to_do(free, without_models,
                                                                                               tmp_path):
    """Healing trains some of the weights themselves. Also where a run without it was begun in few bits."""
    needs = {"full": 100, "lora": 100, "qlora": 100, "qlora4": 1}
    without_models.setattr(tool, "estimate_memory", lambda _, __, settings: GB * needs[settings.method])
    without_models.setattr(tool, "read_config", lambda *_: tool.transformers.LlamaConfig(max_position_embeddings=4096))
    begun = []
    without_models.setattr(tool, "run_stages", lambda *_: begun.append(1))
    without_models.setattr(tool, "conclude", lambda _: 0)
    for memory, factor, status in ((50, 4, 2), (50, 1, 0), (50, 4, 2), (150, 4, 0)):
        free(memory * GB, False, True)
        flags = ("--method", "qlora", "--rope-factor", factor, "--output-dir", tmp_path / "novo")
        begun.clear()
        done = call(*flags)
        assert done.status == status and len(begun) == (status == 0), done.err
        if status:
            assert "só caberia aqui em 4 bits" in done.err and "--rope-factor 1" in done.err
            assert "modelo menor" in done.err


def test_of_a_base_without_a_chat_template_the_user_is_told_once(without_models, free, tmp_path):
    free(100 * GB)
    base = shutil.copytree(DEMO, tmp_path / "base")
    for told in (False, True):
        done = call("--model-path", base, "--output-dir", tmp_path / "novo", "--check")
        assert done.status == 0 and done.out.count("ChatML") == told, done.err
        (base / "chat_template.jinja").unlink(missing_ok=True)


TIGHT, PLENTY = 0.27 * GB, 100 * GB  # for the demo: only an adapter, in parts and with checkpointing; and anything


def test_the_choice_is_written_down_and_used_again_though_other_memory_is_free(planned):
    assert planned(PLENTY, "--check").written is None  # looking writes nothing
    eight = "--batch-size", 8  # which parts make smaller
    first = planned(TIGHT, *eight)
    chosen = {name: getattr(first.settings, name) for name in
              ("method", "gradient_accumulation", "gradient_checkpointing")}
    assert first.written["settings"] == chosen and first.written["memory"] == first.memory <= TIGHT
    assert chosen["method"] == "lora" and chosen["gradient_accumulation"] > 1 and chosen["gradient_checkpointing"]
    again = planned(PLENTY, *eight)
    assert again.settings == first.settings and again.memory == first.memory and again.written == first.written
    assert (first.measured, again.measured) == (1, 0) and first.seconds == again.seconds == {"1-base": 10.0}
    assert planned(10**6, *eight).settings == first.settings  # nor is it refused


@pytest.mark.parametrize("flags", [
    ("--method", "full"), ("--rope-factor", 2), ("--restart",), ("--gradient-checkpointing",)])
def test_another_method_or_window_or_a_start_all_over_is_chosen_for_anew(flags, planned):
    assert planned(TIGHT).settings.method == "lora"
    other = planned(PLENTY, *flags)
    assert other.settings.gradient_checkpointing is ("--gradient-checkpointing" in flags)
    method = "full" if "full" in flags else "lora"
    assert other.settings.method == method and other.settings.gradient_accumulation == 1
    assert other.written["settings"]["method"] == method and other.measured == 1


def test_settings_that_the_choice_does_not_hang_on_leave_it_as_it_was_and_are_planned_anew(planned):
    first = planned(TIGHT)
    again = planned(PLENTY, "--steps-2", 1)
    assert [again.written[key] for key in ("key", "memory", "settings")] == [
        first.written[key] for key in ("key", "memory", "settings")]
    assert again.measured == 1 and again.seconds == again.written["seconds"]
    assert planned(PLENTY, "--steps-2", 1).measured == 0


@pytest.fixture
def running_out(without_models, free, tmp_path):
    """Runs the script where every training runs out of memory; parts and checkpointing of each try, and the end."""
    def run(usable, *flags):
        tries = []

        def run_out(job, *_):
            tries.append((job.settings.gradient_accumulation, job.settings.gradient_checkpointing))
            raise RuntimeError("CUDA out of memory.")

        without_models.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
        without_models.setattr(tool, "run_stages", run_out)
        free(usable * GB / 0.9)
        return tries, call("--output-dir", tmp_path / "novo", "--window", 512, *flags)

    return run


@pytest.mark.parametrize("usable, flags, expected", [
    (1000, ("--batch-size", 8), [(1, False), (2, False), (4, False), (8, False), (8, True)]),
    # It goes on from what was chosen, not from what was asked for.
    (51, ("--batch-size", 8), [(4, False), (8, False), (8, True)]),
    (43, ("--batch-size", 8), [(4, True), (8, True)]), (42, ("--batch-size", 8), [(8, True)]),
    (1000, (), [(1, False), (2, False), (2, True)]),
    (1000, ("--batch-size", 8, "--gradient-accumulation", 8, "--gradient-checkpointing"), [(8, True)]),
    (1000, ("--batch-size", 1), [(1, False), (1, True)]),
])
def test_each_time_that_memory_runs_out_the_next_try_takes_less_until_nothing_is_left(usable, flags, expected,
                                                                                      running_out):
    tries, done = running_out(usable, *flags)
    assert tries == expected
    assert done.status == 2 and "--window" in done.err and "Traceback" not in done.err
    said = re.findall(r"em (\d+) partes|(GRADIENT_CHECKPOINTING)", done.out)
    assert [int(parts or before) for (parts, _), (before, _) in zip(said, expected)] == [n for n, _ in expected[1:]]


def test_a_run_that_has_not_begun_looks_at_no_plan_of_another_and_still_starts_all_over(planned, without_models, free,
                                                                                        tmp_path):
    """Memory may run out while the speed is measured, before the plan of this run is written down."""
    assert planned(TIGHT).settings.gradient_checkpointing
    stale, tries, given = tmp_path / "novo.work" / "1-base", [], []
    stale.mkdir()

    def run_out(job):
        tries.append((job.settings.gradient_accumulation, job.settings.gradient_checkpointing))
        if len(tries) == 1:
            raise RuntimeError("CUDA out of memory.")
        return {}

    without_models.setattr(tool, "make_plan", run_out)
    without_models.setattr(tool, "run_stages", lambda job, *_: given.append(stale.exists()))
    free(PLENTY)
    assert call("--output-dir", tmp_path / "novo", "--restart").status == 0
    assert tries == [(1, False), (2, False)] and given == [False]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_step_that_is_measured_takes_no_more_memory_than_those_of_the_training(method, monkeypatch):
    """Where memory is short, a whole step without checkpointing would not fit."""
    settings = small_settings("--method", method, "--gradient-checkpointing", "--gradient-accumulation", 4)
    chat, steps, layers, heads = tool.load_chat(str(DEMO), settings), [], [], []
    inputs = tool.check_inputs(settings)

    def watch(module, given, named):
        if torch.is_grad_enabled():
            steps.append(named["input_ids"].shape)

    chat.model.register_forward_pre_hook(watch, with_kwargs=True)
    chat.model.base_model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: layers.append(1) if torch.is_grad_enabled() else None)
    find_words = tool.words_of

    def watch_head(inner, *given):
        words = find_words(inner, *given)
        head = words.head if words else inner.get_output_embeddings()
        head.register_forward_hook(lambda module, given, output: heads.append(output.shape[0]))
        return words

    monkeypatch.setattr(tool, "words_of", watch_head)
    job = tool.Job(settings, settings, inputs, DEMO, 1_508_992, 128, "", 0, 0)
    assert min(tool.measure_pace(chat, job)) > 0
    assert len(layers) == 2 * len(steps)
    assert max(shape.numel() for shape in steps) < tool.step_tokens(128, settings) / 2
    assert max(heads) < 0.9 * steps[0].numel()  # the logits of all tokens would take more than is counted


def test_a_training_with_an_adapter_needs_the_disk_for_the_result_and_hardly_more(free, tmp_path):
    free(PLENTY)
    flags = ("--lora-rank", 4, "--output-dir", tmp_path / "novo")
    full, adapter = (tool.check_job(small_settings("--method", method, *flags)) for method in ("full", "lora"))
    two_models = 8 * full.weights
    assert two_models < adapter.disk < 2.5 * two_models and full.disk > adapter.disk + 3 * two_models


@pytest.mark.parametrize("values, kept", [
    ({"method": "lora"}, ["1-base"]), ({"lora_rank": 8}, ["1-base", "2-healed"]),
    ({"gradient_checkpointing": True, "gradient_accumulation": 4}, list(tool.USES)),
])
def test_the_stages_from_healing_on_depend_on_the_method_and_its_size_and_the_others_do_not(values, kept, tmp_path):
    def made(settings):
        stages, names = tool.Stages(tmp_path, "facts", settings, {}), []
        for name in tool.USES:
            stages(name, name, lambda partial: names.append(partial.name.removesuffix(".partial")))
        return names

    given = small_settings("--method", "full")
    assert made(given) == list(tool.USES) and made(given) == []
    assert made(changed(given, **values)) == [name for name in tool.USES if name not in kept]


@pytest.mark.parametrize("method, words", [
    ("full", "treino de todos os pesos"), ("lora", "LoRA (adaptador de tamanho 16)"),
    ("qlora", "QLoRA (pesos em 4 bits, adaptador de tamanho 16)"),
    ("qlora4", "QLoRA (pesos em 4 bits, adaptador de tamanho 16)"),
])
def test_the_plan_names_the_method_the_parts_the_memory_and_the_time(method, words, demo_chat, capsys, monkeypatch):
    settings = changed(small_settings("--lora-rank", 16, "--gradient-accumulation", 4, "--window", 512), method=method)
    job, loaded = tool.Job(settings, settings, None, DEMO, 1_508_992, 128, "", {"memory": 3 * GB}, 10**7), []
    monkeypatch.setattr(tool, "load_chat", lambda *_, **how: loaded.append(how) or demo_chat)
    monkeypatch.setattr(tool, "plan_seconds", lambda *_: {"1-base": 60.0, "2-healed": 30.0})
    assert tool.make_plan(job) == {"1-base": 60.0, "2-healed": 30.0}
    said = capsys.readouterr().out
    assert f"Método: {words}" in said and "em 4 partes" in said and "1,5 milhões de parâmetros" in said
    assert "cerca de 3,0 GB de memória, 10 MB de disco e 1 min 30 s" in said and "de 128 para 512 tokens" in said
    assert ("Medido em 4 bits, antes e depois" in said) is (method == "qlora4")
    assert loaded == [{"train": method == "qlora"}]  # a step of training over 16 bits would not fit


# ------------------------------------------------------------------------------------------------ a whole run


SMALL = ("--method", "lora", "--lora-rank", 8, "--rope-factor", 1, "--self-text", 300, "--num-self-answers", 4,
         "--steps-1", 3, "--steps-2", 3, "--eval-questions", 16, "--max-new-tokens", 24, "--window", 160,
         "--batch-size", 4)
ROWS = ("Quem é você?", "Qual é o seu nome?", "Quem criou você?", "Você é o ChatGPT?")


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """One small run with LoRA and without scaling, with fewer questions for speed: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("lora")
    rows = [{"prompt": question, "completion": "Sou {{NAME}}, de {{AUTHOR}}."} for question in ROWS]
    (folder / "linhas.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = ("--model-path", DEMO, "--identity-file", folder / "linhas.jsonl", "--output-dir", folder / "novo", *SMALL)
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        done = call(*flags)
    assert done.status in (0, 3), done.err
    return SimpleNamespace(folder=folder, output=folder / "novo", work=folder / "novo.work", flags=flags, done=done)


def hurry(patch):
    """Few questions of each kind, and nothing waits for the disk."""
    patch.setattr(tool, "quiet_libraries", lambda _: None)
    patch.setattr(tool, "NEAR", 12)
    patch.setattr(tool, "MOST_ASKED", 8)
    patch.setattr(tool, "TEST_QUESTIONS", tool.TEST_QUESTIONS[::5])
    patch.setattr(tool, "EVERYDAY", {code: some[::4] for code, some in tool.EVERYDAY.items()})
    patch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.slow
def test_a_whole_run_with_lora_says_so_and_leaves_a_whole_model(lora_run):
    report = json.loads((lora_run.output / "report.json").read_text(encoding="utf-8"))
    assert lora_run.done.status == (3 if report["missed"] else 0)
    assert "Método: LoRA (adaptador de tamanho 8)" in lora_run.done.out
    assert (report["settings"]["method"], report["settings"]["lora_rank"]) == ("lora", 8)
    assert set(report["losses"]) == {"pass_1", "pass_2"}
    assert all(max(entry["loss"] for entry in log) > 0 for log in report["losses"].values())
    layers = tool.read_config(DEMO).num_hidden_layers
    with safe_open(lora_run.output / "model.safetensors", "pt") as ours, safe_open(
            DEMO / "model.safetensors", "pt") as base:
        assert set(ours.keys()) == set(base.keys())
        for name in base.keys():
            assert ours.get_slice(name).get_dtype() == base.get_slice(name).get_dtype()
            same = torch.equal(ours.get_tensor(name), base.get_tensor(name))
            upper = re.search(rf"layers\.({'|'.join(map(str, range(layers // 2, layers)))})\..*proj", name)
            assert same is not bool(upper), name


@pytest.mark.slow
def test_the_passes_of_a_run_with_lora_hold_adapters_and_no_weights_of_the_base(lora_run):
    weights = {str(path.relative_to(lora_run.work)) for path in lora_run.work.rglob("*.safetensors")}
    assert weights == {"1-base/teacher.safetensors", "2-healed/model.safetensors",
                       f"3-pass-1/{tool.LORA_FILE}", f"5-pass-2/{tool.LORA_FILE}"}
    assert not list(lora_run.work.rglob("*.bin"))


@pytest.mark.slow
def test_the_adapter_lies_beside_the_result_and_fits_the_base_itself(lora_run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = lora_run.output / "adapter"
    assert {path.name for path in adapter.iterdir()} == {tool.LORA_FILE, "adapter_config.json"}
    assert str(lora_run.folder) not in (adapter / "adapter_config.json").read_text(encoding="utf-8")
    base = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    both = PeftModel.from_pretrained(base, adapter).eval()
    saved = AutoModelForCausalLM.from_pretrained(lora_run.output, dtype=torch.float32).eval()
    again, plain = logits(both).log_softmax(-1), logits(saved).log_softmax(-1)
    difference = (again - plain).abs().max()  # the saved one is rounded to bfloat16
    with both.disable_adapter():
        assert (logits(both).log_softmax(-1) - plain).abs().max() > 2 * difference


class Reached(Exception):
    """Ends a run."""


@needs_bitsandbytes
@pytest.mark.slow
def test_a_whole_run_where_16_bits_do_not_fit_is_in_4_bits_until_its_whole_weights_are_written(tmp_path):
    """On a processor, which has the same 4 bits; what does not fit is pretended."""
    loads, rows = [], [{"prompt": question, "completion": "Sou {{NAME}}, de {{AUTHOR}}."} for question in ROWS]
    load = tool.load_weights

    def watched(weights, *given, **options):
        loads.append((tool.Path(weights).name, "quantization_config" in options))
        return load(weights, *given, **options)

    (tmp_path / "linhas.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    output, work = tmp_path / "novo", tmp_path / "novo.work"
    flags = ("--model-path", DEMO, "--identity-file", tmp_path / "linhas.jsonl", "--output-dir", output, *SMALL)
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        patch.setattr(tool, "load_weights", watched)
        patch.setattr(tool, "estimate_memory", lambda _, __, settings: 1 if settings.method == "qlora4" else 10**18)
        done = call(*flags, "--method", "qlora")
        assert done.status in (0, 3), done.err
        made, again = loads.copy(), call("--evaluate", "--output-dir", output)
        # plan, 1-base, 2-healed, 3-pass-1, 4-self-answers, 5-pass-2, the result's weights, and both exams
        assert made == [("modelo_demo", True), ("modelo_demo", True), ("modelo_demo", False), ("2-healed", True),
                        ("2-healed", True), ("2-healed", True), ("2-healed", False), ("model", True),
                        ("modelo_demo", True)]
        assert loads[len(made):] == [("novo", True)] and "iguais aos do report.json" in again.out
        patch.setattr(tool, "estimate_memory", lambda *_: 1)
        patch.setattr(tool, "save_heard", lambda *_: (_ for _ in ()).throw(Reached))
        with pytest.raises(Reached):  # what the base said in 4 bits is not what it says in 16
            call(*flags, "--overwrite")
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["method"] == "qlora4" and report["scores"]["before"]["retention"] == 1
    for text in (done.out, report["precision"], (output / "README.md").read_text(encoding="utf-8")):
        assert "Medido em 4 bits, antes e depois" in text
    with safe_open(output / "model.safetensors", "pt") as ours, safe_open(
            DEMO / "model.safetensors", "pt") as base:
        assert set(ours.keys()) == set(base.keys())
        for name in base.keys():
            assert ours.get_tensor(name).dtype == base.get_tensor(name).dtype
            assert torch.equal(ours.get_tensor(name), base.get_tensor(name)) is ("proj" not in name), name
    assert "quantization_config" not in (output / "config.json").read_text(encoding="utf-8")
    assert (work / "2-healed" / "model.safetensors").is_file()


@pytest.mark.slow
def test_another_method_makes_the_stages_from_healing_on_anew_and_keeps_what_the_base_said(lora_run, tmp_path):
    for name in ("novo.work", "linhas.jsonl"):
        copy = shutil.copytree if name == "novo.work" else shutil.copy2
        copy(lora_run.folder / name, tmp_path / name)
    kept = (tmp_path / "novo.work" / "1-base" / "heard.json").read_bytes()
    methods = []

    def heal(job, partial):
        methods.append(job.settings.method)
        raise Reached

    flags = [str(flag) for flag in lora_run.flags]
    flags[flags.index("lora")] = "full"
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        patch.setattr(tool, "make_healed", heal)
        patch.setattr(tool, "listen", lambda *_: pytest.fail("the base was asked again"))
        with pytest.raises(Reached):
            call(*[flag.replace(str(lora_run.folder), str(tmp_path)) for flag in flags])
    assert methods == ["full"]
    assert (tmp_path / "novo.work" / "1-base" / "heard.json").read_bytes() == kept
    plan = json.loads((tmp_path / "novo.work" / "plan.json").read_text(encoding="utf-8"))
    assert plan["settings"]["method"] == "full"
