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

import psutil
import pytest
import torch
from conftest import DEMO, HEAD, LOCAL_THETA, THETA, changed, small_settings, tiny_config
from safetensors import safe_open
from test_generation import talked, user

import rename_obrutai as tool

RANK = 4
TEXT = torch.arange(3, 60)[None] % 50 + 10  # 57 tokens, none of them special
LESSONS = [tool.question_and_answer("Quem é você?", "Sou a Jandira, da Oficina Maré.")]
SUMS = [tool.question_and_answer(f"Quanto é {i} mais {i}?", str(2 * i)) for i in range(6)]
ASKED = ("Qual é a capital da França?", "Oi!", "Quanto é 7 mais 5?", "What is 3 plus 4?", "Qual é o plural de pão?")
NO_TEACHER = tool.Teacher(torch.zeros((0, 4), dtype=torch.int32), torch.zeros((0, 4)))
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
    """What the demo says to some questions, for models that have its tokenizer."""
    return talked(demo_chat, *map(user, ASKED))


@pytest.fixture(scope="module")
def batches(demo_tokenizer):
    """Batches of sums to learn by heart."""
    return tool.make_batches(demo_tokenizer, [tool.Pool(SUMS, 1.0)], [64], 6, 192, "s")


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
def test_logits_made_from_the_last_states_are_those_of_the_model(family, demo_tokenizer):
    model = family_model(family, demo_tokenizer)
    plain = model.get_output_embeddings()
    rows = [TEXT[0].tolist(), TEXT[0, :20].tolist()]
    inputs = tool.padded(SimpleNamespace(model=model, tokenizer=demo_tokenizer), rows)
    with torch.inference_mode():
        expected = model(**inputs).logits
        hidden = tool.last_hidden(model, model, inputs)
        assert hidden.shape == (2, 57, 32)
        for line, row, mask in zip(hidden, expected, inputs["attention_mask"].bool(), strict=True):
            found = tool.logits_of(model, line[mask])
            assert found.dtype == torch.float32 and torch.allclose(found, row[mask], atol=1e-5)
            assert torch.allclose(found, plain(line[mask])) is ("," not in family)  # what is more does something


def test_no_more_than_one_token_of_each_row_gets_logits_on_the_way_to_the_states(demo_tokenizer):
    model, seen = family_model("llama", demo_tokenizer), []
    model.get_output_embeddings().register_forward_hook(lambda module, given, output: seen.append(output.shape[:-1]))
    tool.last_hidden(model, model, {"input_ids": TEXT.repeat(3, 1)})
    assert seen == [(3, 1)]


def test_nothing_is_left_on_the_model_though_the_way_to_the_states_fails(demo_tokenizer):
    model = family_model("llama", demo_tokenizer)
    for inputs in ({"input_ids": TEXT}, {"input_ids": TEXT + 10**6}):
        with contextlib.suppress(IndexError):
            tool.last_hidden(model, model, inputs)
        assert not model.base_model._forward_hooks


def test_a_chunk_of_logits_takes_a_quarter_of_a_gigabyte_whatever_the_vocabulary():
    for words in (1000, 32000, 262144):
        inner = SimpleNamespace(get_input_embeddings=lambda words=words: torch.nn.Embedding(words, 1, device="meta"))
        rows = torch.zeros(3 * 2**26 // words, 2)
        chunks = tool.in_chunks(inner, rows)
        assert sum(map(len, chunks)) == len(rows)
        assert all(0.2e9 < 4 * len(chunk) * words < 0.3e9 for chunk in chunks[:-1]) and len(chunks) in (3, 4)


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
    hooks.append(tool.whole(chat.model).register_forward_pre_hook(watch, with_kwargs=True))
    patch.setattr(accelerate.Accelerator, "backward", noted)
    tool.train(chat, [batch], teacher, 1e-12, settings, "passo", folder / "training")
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
    batch = [tool.make_window(tokenizer, [LESSONS[0], talks[0]])] * 3
    if padding:
        pools = [tool.Pool(LESSONS, 0.5), tool.Pool(talks, 0.5)]
        (batch,) = tool.make_batches(tokenizer, pools, [60], 1, 190, "7")
    assert (len({len(window.input_ids) for window in batch}) > 1) is padding and len(batch) == 3
    return batch


@pytest.mark.parametrize("padding, rows, again", [
    (True, None, False), (True, 5, True), (False, 5, False), (False, None, True),
], ids=["padding", "padding, many chunks, checkpointing", "many chunks", "checkpointing"])
def test_loss_and_gradients_are_those_of_the_definition(padding, rows, again, tiny_folder, talks_and_teacher, tmp_path,
                                                        monkeypatch):
    expect_definition("llama", tiny_folder, talks_and_teacher, tmp_path, monkeypatch, padding, rows, again)


@pytest.mark.parametrize("architecture, padding, rows, again", [
    ("gemma3", True, 5, True), ("gemma3", False, None, False), ("qwen3", True, 5, True),
])
def test_loss_and_gradients_are_those_of_the_definition_in_other_families(
        architecture, padding, rows, again, tiny_folder, talks_and_teacher, tmp_path, monkeypatch):
    expect_definition(architecture, tiny_folder, talks_and_teacher, tmp_path, monkeypatch, padding, rows, again)


def expect_definition(architecture, tiny_folder, talks_and_teacher, folder, patch, padding, rows, again):
    chat = tool.load_chat(tiny_folder(architecture), small_settings("--method", "full"))
    talks, teacher = talks_and_teacher
    batch, chunks, calls = mixed_batch(chat.tokenizer, talks, padding), [], []
    if rows:
        patch.setattr(tool, "in_chunks", lambda inner, t: chunks.append(t.split(rows)) or chunks[-1])
    chat.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    step = one_step(chat, batch, teacher, 2.5, folder, patch, *["--gradient-checkpointing"] * again)
    assert len(calls) == 1 + again  # a layer is gone through again on the way back
    assert not rows or all(len(pieces) > 3 for pieces in chunks) and len(chunks) == 3
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


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointing"])
def test_loss_and_gradients_of_an_adapter_are_those_of_the_definition(again, tiny_folder, talks_and_teacher, tmp_path,
                                                                      monkeypatch):
    folder = tiny_folder("llama")
    chat = tool.load_chat(folder, lora(folder), 4.0, adapt=True)
    unsettle(chat.model)
    talks, teacher = talks_and_teacher
    batch = mixed_batch(chat.tokenizer, talks, True)
    monkeypatch.setattr(tool, "in_chunks", lambda inner, t: t.split(5))
    step = one_step(chat, batch, teacher, 2.5, tmp_path, monkeypatch, *["--gradient-checkpointing"] * again)
    expect_the_reference(step, chat.model, batch, teacher, 2.5)


# ------------------------------------------------------------------------------------------------ LoRA


@pytest.mark.parametrize("name", ["llama", "untied", "qwen3", "gemma3"])
def test_a_fresh_adapter_leaves_every_logit_as_it_was(name, base_of):
    folder = base_of(name)
    settings = lora(folder)
    plain, adapted = (tool.load_model(folder, settings, 4.0, adapt=adapt) for adapt in (False, True))
    assert plain is tool.whole(plain) and adapted is not tool.whole(adapted)
    assert not plain.training and not adapted.training
    assert torch.equal(logits(plain), logits(adapted))


@pytest.mark.parametrize("name", ["llama", "untied", "gemma3"])
def test_only_the_adapter_is_trained_and_it_is_on_every_linear_layer_but_the_output(name, base_of):
    folder = base_of(name)
    model = tool.load_model(folder, lora(folder), adapt=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {re.sub(r".*\.layers\.(\d+)\.(\w+)\.(\w+)\.lora_[AB]\.default\.weight", r"\1 \3", name)
              for name in trained}
    assert layers == {f"{i} {kind}_proj" for i in (0, 1) for kind in ("q", "k", "v", "o", "gate", "up", "down")}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name} and len(trained) == 28
    assert {min(p.shape) for name, p in model.named_parameters() if name in trained} == {RANK}


def test_the_size_of_an_adapter_is_near_what_is_told_beforehand(base_of):
    folder = base_of("untied")
    for rank in (RANK, 2 * RANK):
        settings = lora(folder, "--lora-rank", rank)
        count = sum(p.numel() for p in tool.load_model(folder, settings, adapt=True).parameters() if p.requires_grad)
        assert tool.adapter_size(tool.read_config(folder), rank) == pytest.approx(count, rel=0.1)


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
    settings = lora(folder, "--heal-steps", 3, "--window", 128, "--batch-size", 4)
    heard = tool.Heard(tool.Names("Jandira", "Oficina Maré", ("Lumi",)), [], talks, talks[:2], talks)
    healed = tmp_path / "healed"
    healed.mkdir()
    tool.make_healed(folder, heard, teacher, 64, settings, healed)
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
    assert [entry["step"] for entry in log] == [1, 2, 3] * 2  # layer by layer, and all together


@pytest.fixture(params=["llama", "untied", "qwen3", "gemma3"])
def adapted(request, base_of, tmp_path):
    """A stage with an adapter that does something over a scaled base: base folder, settings, chat, stage folder."""
    folder = base_of(request.param)
    settings = lora(folder)
    chat = tool.load_chat(folder, settings, 4.0, adapt=True)
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
    for name, frequencies in tool.rope_frequencies(tool.whole(adapted.chat.model)).items():
        assert torch.equal(tool.rope_frequencies(tool.whole(again.model))[name], frequencies)


def test_the_merged_and_saved_model_gives_the_logits_of_base_and_adapter(adapted, tmp_path):
    from transformers import AutoModelForCausalLM

    expected = logits(adapted.chat.model)
    merged = tool.load_chat(adapted.stage, adapted.settings, merge=True)
    assert merged.model is tool.whole(merged.model)
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


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_with_the_adapter_off_a_stage_without_scaling_is_the_base(name, base_of, batches, tmp_path):
    folder = base_of(name)
    settings = lora(folder, "--rope-factor", 1)
    chat = tool.load_chat(folder, settings, adapt=True)
    tool.train(chat, batches[:4], NO_TEACHER, 1e-2, settings, "passo", tmp_path / "training")
    tool.save_stage(chat, tmp_path / "stage", [])
    base = logits(tool.load_model(folder, settings))
    for model in (chat.model, tool.load_model(tmp_path / "stage", settings)):
        assert not torch.allclose(logits(model), base, atol=1e-2)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)


def test_a_training_with_an_adapter_goes_on_from_its_checkpoint_bit_by_bit(base_of, batches, tmp_path, capsys):
    folder = base_of("llama")
    settings = lora(folder, "--checkpoint-minutes", 0)
    training = tmp_path / "training"
    fresh = tool.load_chat(folder, settings, 4.0, adapt=True)

    def train(chat):
        tool.train(chat, batches, NO_TEACHER, 1e-2, settings, "passo", training)
        return parts_of(chat.model, ["lora_"])

    expected = train(fresh)
    shutil.rmtree(training)
    cut = tool.load_chat(folder, settings, 4.0, adapt=True)
    start, steps = parts_of(cut.model, ["lora_"]), []

    def power_cut(module, given):
        steps.append(1)
        if len(steps) == 4:
            raise OSError("power cut")

    tool.whole(cut.model).base_model.register_forward_pre_hook(power_cut)
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
    chat = tool.load_chat(DEMO, four_bits, 4.0, adapt=True)
    packed = {name: p.clone() for name, p in chat.model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == sum("proj" in name for name, _ in whole.named_parameters())
    rate = tool.automatic_rate(tool.load_model(DEMO, settings, adapt=True), 1e-3, 2e-3)  # the packed ones count whole
    assert tool.automatic_rate(chat.model, 1e-3, 2e-3) == pytest.approx(rate)
    log = tool.train(chat, [mixed_batch(chat.tokenizer, talks, True)] * 12, teacher, 1e-2, four_bits, "passo",
                     tmp_path / "training")
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert all(torch.equal(p, packed[name]) for name, p in chat.model.named_parameters() if name in packed)
    tool.save_stage(chat, tmp_path / "stage", [])
    assert "quantization_config" not in (tmp_path / "stage" / "config.json").read_text(encoding="utf-8")
    assert torch.equal(logits(tool.load_model(tmp_path / "stage", four_bits)), logits(chat.model))
    merged = dict(tool.load_model(tmp_path / "stage", four_bits, merge=True).named_parameters())
    adapter = dict(chat.model.named_parameters())
    for name, weight in whole.named_parameters():
        if "proj" in name:
            layer = "base_model.model." + name.removesuffix("weight")
            a, b = (adapter[f"{layer}lora_{part}.default.weight"] for part in "AB")
            weight = (weight.bfloat16().float() + 2 * b @ a).bfloat16()
        assert torch.allclose(merged[name].float(), weight.float(), rtol=0.01, atol=1e-6), name


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


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_parts_of_a_model_that_see_get_no_gradient_and_no_adapter_and_are_saved_as_they_were(
        method, seeing, talks_and_teacher, tmp_path):
    """Without pictures there is nothing to learn for them."""
    settings = lora(seeing, "--method", method, "--batch-size", 3)
    untouched = parts_of(tool.load_model(seeing, settings), ["vision", "multi_modal"])
    assert len(untouched) > 10
    chat = tool.load_chat(seeing, settings, 4.0, adapt=True)
    trained = {name for name, p in chat.model.named_parameters() if p.requires_grad}
    assert trained and not any(re.search("vision|multi_modal", name) for name in trained)
    text = [name for name, _ in tool.whole(chat.model).named_parameters() if re.search("language_model", name)]
    assert any("q_proj" in name for name in text)
    assert len(trained) == (28 if method == "lora" else len(text))
    talks, teacher = talks_and_teacher
    batch = mixed_batch(chat.tokenizer, talks, True)
    before = parts_of(chat.model, ["language_model"])
    tool.train(chat, [batch] * 3, teacher, 1e-2, settings, "passo", tmp_path / "training")
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


def test_the_rate_of_a_real_adapter_depends_on_its_base_alone(base_of):
    folder = base_of("llama")
    millions = sum(p.numel() for p in tool.load_model(folder, lora(folder)).parameters()) / 1e6
    for rank in (1, 16):
        model = tool.load_model(folder, lora(folder, "--lora-rank", rank), adapt=True)
        assert tool.automatic_rate(model, 6e-3, 3e-3) == pytest.approx(3e-3 * millions**(-1 / 3))


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


def estimate(name="Gemma 3 1B", gpu=True, **values):
    config, weights = shapes()[name]
    settings = changed(small_settings("--method", "lora"), **values)
    return tool.estimate_memory(config, weights, settings, gpu)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
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
    settings = changed(small_settings(), window=128, batch_size=1, **given)  # a chunk of logits does not fill up
    assert tool.estimate_memory(small, weights, settings, True) < tool.estimate_memory(config, weights, settings, True)


def test_the_logits_of_a_chunk_are_all_of_them_that_is_counted():
    """With a large vocabulary those of all tokens would take more than the rest of the model."""
    one = estimate(window=8192, batch_size=1, gradient_checkpointing=True, method="full")
    config, weights = shapes()["Gemma 3 1B"]
    tiny = type(config)(**{**config.to_dict(), "vocab_size": 1000})
    settings = changed(small_settings("--method", "full"), window=8192, batch_size=1, gradient_checkpointing=True)
    assert one - tool.estimate_memory(tiny, weights, settings, True) < 3.3 * 2**28  # not 3 * 4 * 8192 * 262144 bytes


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


def test_gemma_3_1b_trains_a_lora_on_its_whole_window_with_a_card_of_6_gb(free):
    free(5.6e9, gpu=True)  # what a card of 6 GB leaves to programs
    config, weights = shapes()["Gemma 3 1B"]
    chosen, needed = tool.choose_method(config, weights, small_settings("--window", 8192, "--batch-size", 8,
                                                                        "--lora-rank", 64))
    assert (chosen.method, chosen.window, chosen.gradient_checkpointing) == ("lora", 8192, True) and needed < 5.1e9


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", ["Gemma 3 1B", "Llama 3.2 3B", "Qwen 3 8B"])
def test_checkpointing_and_an_adapter_and_four_bits_each_take_less(name, gpu):
    for method in ("full", "lora", "qlora"):
        again, kept = (estimate(name, gpu, method=method, gradient_checkpointing=on, batch_size=512)
                       for on in (True, False))
        assert again < 0.5 * kept
    one_by_one = {"gradient_accumulation": 8, "gradient_checkpointing": True, "window": 2048}
    full, adapter, four_bits = (estimate(name, gpu, method=method, **one_by_one) for method in
                                ("full", "lora", "qlora"))
    assert four_bits < adapter < full / 2
    _, weights = shapes()[name]
    half = tool.compute_dtype(weights).itemsize
    assert full > 16 * weights and adapter > half * weights and four_bits > 0.5 * weights
    assert estimate(name, gpu, lora_rank=8, **one_by_one) < adapter < estimate(name, gpu, lora_rank=256, **one_by_one)


def test_a_mixture_counts_the_experts_that_a_token_goes_through():
    text = SimpleNamespace(hidden_size=64, intermediate_size=6144, num_experts_per_tok=8, moe_intermediate_size=768)
    assert tool.mlp_size(text) == 6144
    text.moe_intermediate_size = 100
    assert tool.mlp_size(text) == 800
    assert tool.mlp_size(SimpleNamespace(hidden_size=64, intermediate_size=[128, 256])) == 256  # as Gemma 3n has it
    assert tool.mlp_size(SimpleNamespace(hidden_size=64)) == 256


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


def simple_estimate(config, weights, settings, gpu):
    """In place of the real one: 100, 40 or 20 for the state, and 8 for each row of 800 tokens, or 2 when layers are
    gone through again."""
    rows = -(-settings.batch_size // settings.gradient_accumulation)
    row = settings.window / 100 / (4 if settings.gradient_checkpointing else 1)
    return {"full": 100, "lora": 40, "qlora": 20}[settings.method] + rows * row


@pytest.mark.parametrize("usable, flags, bitsandbytes, expected", [
    (164, (), True, ("full", 800, 1, False)),  # all of it fits
    (163, (), True, ("full", 800, 2, False)), (131, (), True, ("full", 800, 4, False)),
    (115, (), True, ("full", 800, 8, False)),  # more parts before anything is computed again
    (107, (), True, ("full", 800, 4, True)), (102, (), True, ("full", 800, 8, True)),
    (101, (), True, ("lora", 800, 2, False)),  # the least that full training takes is 102
    (71, (), True, ("lora", 800, 4, False)),
    (101, (), False, ("lora", 800, 2, False)),  # without bitsandbytes
    (48, (), True, ("lora", 800, 8, False)), (47, (), True, ("lora", 800, 4, True)),
    (42, (), True, ("lora", 800, 8, True)),
    (41, (), True, ("qlora", 800, 4, False)), (22, (), True, ("qlora", 800, 8, True)),
    (41, (), False, ("lora", 400, 8, True)),  # without four bits only a smaller window is left
    (21, (), True, ("qlora", 400, 8, True)), (20.5, (), True, ("qlora", 200, 8, True)),
    (40.5, (), False, ("lora", 200, 8, True)),
    (200, ("--method", "lora"), True, ("lora", 800, 1, False)),  # what is asked for is kept, more and less free
    (101, ("--method", "full"), True, ("full", 400, 8, True)),
    (41, ("--method", "lora"), True, ("lora", 400, 8, True)),
    (200, ("--method", "qlora"), True, ("qlora", 800, 1, False)),
    (200, ("--gradient-checkpointing",), True, ("full", 800, 1, True)),
    (200, ("--gradient-accumulation", 4), True, ("full", 800, 4, False)),
    (107, ("--gradient-accumulation", 8), True, ("full", 800, 8, True)),
])
def test_what_fits_best_is_chosen(usable, flags, bitsandbytes, expected, free, monkeypatch):
    free((usable + 0.01) * GB / 0.9, True, bitsandbytes)
    given = small_settings("--window", 800, "--batch-size", 8, *flags)
    monkeypatch.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
    chosen, needed = tool.choose_method(None, 1, given)
    assert (chosen.method, chosen.window, chosen.gradient_accumulation, chosen.gradient_checkpointing) == expected
    assert needed == GB * simple_estimate(None, 1, chosen, True) <= usable * GB
    assert chosen == changed(given, method=expected[0], window=expected[1], gradient_accumulation=expected[2],
                             gradient_checkpointing=expected[3])


def test_few_bits_that_are_asked_for_are_used_on_a_machine_without_a_gpu_as_well(free, monkeypatch):
    monkeypatch.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
    free(1000 * GB, False, True)
    assert tool.choose_method(None, 1, small_settings("--method", "qlora"))[0].method == "qlora"


def test_of_a_model_that_is_not_small_not_all_weights_are_trained_unless_asked_for(free, monkeypatch):
    monkeypatch.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
    free(1000 * GB, True, True)
    for weights, flags, method in ((tool.SMALL - 1, (), "full"), (tool.SMALL, (), "lora"),
                                   (tool.SMALL, ("--method", "full"), "full")):
        assert tool.choose_method(None, weights, small_settings(*flags))[0].method == method


def test_without_a_gpu_the_memory_of_the_machine_counts_and_few_bits_are_no_choice(free, monkeypatch):
    monkeypatch.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
    given = small_settings("--window", 800)
    for bitsandbytes in (False, True):
        free(41.5 * GB / 0.9, False, bitsandbytes)
        chosen, _ = tool.choose_method(None, 1, given)
        assert (chosen.method, chosen.window) == ("lora", 400)


@pytest.mark.parametrize("gpu, bitsandbytes, advised", [
    (True, True, False), (True, False, True), (False, False, False),
])
def test_a_model_that_no_method_makes_fit_is_refused_with_what_to_do(gpu, bitsandbytes, advised, free, monkeypatch):
    """Windows that have no room for an answer are none."""
    monkeypatch.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
    free(20.45 * GB / 0.9, gpu, bitsandbytes)
    with pytest.raises(tool.InputError) as error:
        tool.choose_method(None, 1, small_settings("--window", 800, "--max-new-tokens", 128))
    message = str(error.value)
    assert "não cabe na memória livre (20,4 GB" in message or "não cabe na memória livre (20,5 GB" in message
    assert "Feche outros programas" in message and "modelo menor" in message
    assert ("pip install bitsandbytes" in message) is advised
    assert not re.search(r"[a-z]+ing\b", message)


@pytest.mark.parametrize("method", ["full", "lora", "auto"])
def test_full_training_that_does_not_fit_is_refused_with_the_method_that_takes_less(method, free, monkeypatch):
    monkeypatch.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
    free(20 * GB, True, True)
    with pytest.raises(tool.InputError) as error:
        tool.choose_method(None, 1, small_settings("--method", method))
    assert ("--method lora" in str(error.value)) is (method == "full")


def test_what_a_refused_model_needs_at_least_is_told_and_is_more_than_what_is_free(free, monkeypatch):
    monkeypatch.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
    free(20.45 * GB / 0.9, True, True)
    with pytest.raises(tool.InputError) as error:
        tool.choose_method(None, 1, small_settings("--window", 800, "--max-new-tokens", 128))
    available, needed = (float(n.replace(",", ".")) for n in re.findall(r"([\d,]+) GB", str(error.value)))
    assert needed == pytest.approx(20.5) and needed > available  # the window of 200, in eight parts


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


@pytest.mark.parametrize("bitsandbytes", [True, False])
@pytest.mark.parametrize("name, memory", [("Gemma 3 1B", 6), ("Llama 3.2 3B", 12), ("Qwen 3 8B", 24)])
def test_on_a_common_card_a_real_model_is_trained_in_the_longest_window_that_fits(name, memory, bitsandbytes, free):
    config, weights = shapes()[name]
    free(memory * GB, True, bitsandbytes)
    chosen, needed = tool.choose_method(config, weights, small_settings("--window", 8192))
    assert chosen.method in (("lora", "qlora") if bitsandbytes else ("lora",)) and chosen.gradient_checkpointing
    assert needed == tool.estimate_memory(config, weights, chosen, True) <= 0.9 * memory * GB
    assert chosen.window >= 512 and 8192 % chosen.window == 0
    twice = changed(chosen, window=2 * chosen.window, gradient_accumulation=8)
    for method in ("full", "lora", "qlora")[:2 + bitsandbytes]:
        more = tool.estimate_memory(config, weights, changed(twice, method=method), True)
        assert chosen.window == 8192 or more > 0.9 * memory * GB


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
def planned(guest, free, tmp_path):
    """Runs the script up to its first stage with so much memory free; the settings that the stages were given, what
    was said and what plan.json holds."""
    guest.setattr(tool, "conclude", lambda _: 0)
    guest.setattr(tool, "load_chat", lambda *_, **__: None)
    told = []
    guest.setattr(tool, "show_plan", lambda *given: told.append(given[4]))

    def plan(memory, *flags):
        given = []
        guest.setattr(tool, "run_stages", lambda *arguments: given.append(arguments[-1]))
        free(memory)
        done = call("--output-dir", tmp_path / "novo", *flags)
        assert done.status == 0, done.err
        file = tmp_path / "novo.work" / "plan.json"
        return SimpleNamespace(settings=given[0] if given else None, memory=told[-1],
                               written=json.loads(file.read_text(encoding="utf-8")) if file.exists() else None)

    return plan


TIGHT, PLENTY = 0.26 * GB, 100 * GB  # for the demo: only in several parts, and anything


def test_the_choice_is_written_down_and_used_again_though_other_memory_is_free(planned):
    assert planned(PLENTY, "--check").written is None  # looking writes nothing
    first = planned(TIGHT)
    chosen = {name: getattr(first.settings, name) for name in
              ("method", "window", "gradient_accumulation", "gradient_checkpointing")}
    assert first.written["settings"] == chosen and first.written["memory"] == first.memory <= TIGHT
    assert chosen != {"method": "full", "window": 512, "gradient_accumulation": 1, "gradient_checkpointing": False}
    again = planned(PLENTY)
    assert again.settings == first.settings and again.memory == first.memory and again.written == first.written
    assert planned(10**6).settings == first.settings  # nor is it refused


@pytest.mark.parametrize("flags", [("--heal-steps", 77), ("--method", "full"), ("--rope-factor", 2)])
def test_other_settings_are_chosen_for_anew(flags, planned):
    first = planned(TIGHT)
    other = planned(PLENTY, *flags)
    assert other.settings.method == "full" and other.settings.gradient_accumulation == 1
    assert other.written["key"] != first.written["key"]


def test_a_run_that_starts_all_over_is_chosen_for_anew(planned):
    assert planned(TIGHT).settings.gradient_accumulation > 1
    assert planned(PLENTY, "--restart").settings.gradient_accumulation == 1


def test_settings_that_the_choice_does_not_hang_on_leave_it_as_it_was(planned):
    first = planned(TIGHT)
    assert planned(PLENTY, "--steps-2", 1, "--target-leak", 0.5).written == first.written


@pytest.fixture
def running_out(guest, free, tmp_path):
    """Runs the script where every training runs out of memory; parts and checkpointing of each try, and the end."""
    def run(usable, *flags):
        tries = []

        def run_out(*arguments):
            tries.append((arguments[-1].gradient_accumulation, arguments[-1].gradient_checkpointing))
            raise RuntimeError("CUDA out of memory.")

        guest.setattr(tool, "estimate_memory", lambda *values: GB * simple_estimate(*values))
        guest.setattr(tool, "run_stages", run_out)
        guest.setattr(tool, "load_chat", lambda *_, **__: None)
        guest.setattr(tool, "show_plan", lambda *_: None)
        free(usable * GB / 0.9)
        return tries, call("--output-dir", tmp_path / "novo", "--window", 512, *flags)

    return run


@pytest.mark.parametrize("usable, flags, expected", [
    (1000, (), [(1, False), (2, False), (4, False), (8, False), (8, True)]),
    (115, (), [(4, False), (8, False), (8, True)]),  # it goes on from what was chosen, not from what was asked for
    (103, (), [(4, True), (8, True)]), (102, (), [(8, True)]),
    (1000, ("--gradient-accumulation", 8, "--gradient-checkpointing"), [(8, True)]),
    # Generation is split as well, whatever the batch.
    (1000, ("--batch-size", 1), [(1, False), (2, False), (4, False), (8, False), (8, True)]),
])
def test_each_time_that_memory_runs_out_the_next_try_takes_less_until_nothing_is_left(usable, flags, expected,
                                                                                      running_out):
    tries, done = running_out(usable, *flags)
    assert tries == expected
    assert done.status == 2 and "--window" in done.err and "Traceback" not in done.err
    said = re.findall(r"em (\d+) partes|(GRADIENT_CHECKPOINTING)", done.out)
    assert [int(parts or before) for (parts, _), (before, _) in zip(said, expected)] == [n for n, _ in expected[1:]]


@pytest.mark.parametrize("flags, parts", [((), 8), (("--heal-steps", 77), 2)])
def test_only_a_plan_of_the_same_settings_tells_what_was_tried_before_memory_ran_out(flags, parts, planned, guest,
                                                                                     tmp_path):
    assert planned(0.32 * GB, "--batch-size", 16).settings.gradient_accumulation == 4

    tries = []

    def run_out(folder, settings):
        tries.append(settings.gradient_accumulation)
        raise RuntimeError("CUDA out of memory.")

    guest.setattr(tool, "fit_settings", run_out)
    assert call("--output-dir", tmp_path / "novo", "--batch-size", 16, *flags).status == 2
    assert tries[:2] == [1, parts]


def test_a_training_with_an_adapter_needs_the_disk_for_the_result_and_hardly_more(tmp_path):
    settings = small_settings("--output-dir", tmp_path / "novo")
    full, adapter = (tool.check_disk(10**8, 10**6, changed(settings, method=method)) for method in ("full", "lora"))
    assert 4 * 10**8 < adapter < 0.2 * full
    assert tool.check_disk(10**8, 10**6, changed(settings, method="qlora")) == adapter


def test_the_stages_from_healing_on_depend_on_the_method_and_its_size_and_the_others_do_not(tmp_path):
    given = small_settings()
    inputs = tool.check_inputs(given)
    before = tool.stage_keys(given, inputs, DEMO)
    four_bits = tool.stage_keys(changed(given, method="qlora"), inputs, DEMO)
    assert {name for name in before if four_bits[name] == before[name]} == {"1-base"}
    for values, kept in (({"method": "lora"}, {"1-base"}), ({"lora_rank": 8}, {"1-base", "2-healed"})):
        after = tool.stage_keys(changed(given, **values), inputs, DEMO)
        assert {name for name in before if after[name] == before[name]} == kept
    for values in ({"gradient_checkpointing": True}, {"gradient_accumulation": 4}):
        assert tool.stage_keys(changed(given, **values), inputs, DEMO) == before


@pytest.mark.parametrize("method, words", [
    ("full", "treino de todos os pesos"), ("lora", "LoRA (adaptador de tamanho 16)"),
    ("qlora", "QLoRA (pesos em 4 bits, adaptador de tamanho 16)"),
])
def test_the_plan_names_the_method_the_parts_and_the_memory(method, words, demo_chat, capsys, monkeypatch):
    monkeypatch.setattr(tool, "measure_pace", lambda base: (1e-5, 1e-3))
    settings = small_settings("--method", method, "--lora-rank", 16, "--gradient-accumulation", 4, "--window", 512)
    tool.show_plan(demo_chat, 10**6, 128, 10**7, 3 * GB, tool.check_inputs(settings), settings)
    said = capsys.readouterr().out
    assert f"Método: {words}" in said and "em 4 partes" in said and "cerca de 3,0 GB de memória" in said


# ------------------------------------------------------------------------------------------------ a whole run


SMALL = ("--method", "lora", "--lora-rank", 8, "--self-text", 300, "--num-self-answers", 4, "--heal-steps", 3,
         "--steps-1", 3, "--steps-2", 3, "--rounds", 1, "--eval-questions", 16, "--max-new-tokens", 24, "--window",
         160, "--batch-size", 4)
ROWS = ("Quem é você?", "Qual é o seu nome?", "Quem criou você?", "Você é o ChatGPT?")


@pytest.fixture(scope="module", params=[
    pytest.param(4, marks=pytest.mark.slow, id="scaled"), pytest.param(1, marks=pytest.mark.slow, id="not scaled"),
])
def lora_run(request, tmp_path_factory):
    """One small run with LoRA, with fewer questions for speed: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("lora")
    rows = [{"prompt": question, "completion": "Sou {{NAME}}, de {{AUTHOR}}."} for question in ROWS]
    (folder / "linhas.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = ("--model-path", DEMO, "--identity-file", folder / "linhas.jsonl", "--output-dir", folder / "novo",
             "--rope-factor", request.param, *SMALL)
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        done = call(*flags)
    assert done.status in (0, 3), done.err
    return SimpleNamespace(folder=folder, output=folder / "novo", work=folder / "novo.work", flags=flags, done=done,
                           factor=request.param)


def hurry(patch):
    """Few questions of each kind, and nothing waits for the disk."""
    patch.setattr(tool, "quiet_libraries", lambda _: None)
    patch.setattr(tool, "NEAR", 12)
    patch.setattr(tool, "MOST_ASKED", 8)
    patch.setattr(tool, "TEST_QUESTIONS", tool.TEST_QUESTIONS[::5])
    patch.setattr(tool, "VALIDATION_QUESTIONS", tool.VALIDATION_QUESTIONS[::4])
    patch.setattr(tool, "EVERYDAY", tool.EVERYDAY[::4])
    patch.setattr(os, "fsync", lambda handle: None)


def test_a_whole_run_with_lora_says_so_and_leaves_a_whole_model(lora_run):
    report = json.loads((lora_run.output / "report.json").read_text(encoding="utf-8"))
    assert lora_run.done.status == (3 if report["missed"] else 0)
    assert "Método: LoRA (adaptador de tamanho 8)" in lora_run.done.out
    assert (report["settings"]["method"], report["settings"]["lora_rank"]) == ("lora", 8)
    assert ("healing" in report["losses"]) is (lora_run.factor != 1) and {"pass_1", "pass_2"} <= set(report["losses"])
    assert all(log and all(entry["loss"] > 0 for entry in log) for log in report["losses"].values())
    with safe_open(lora_run.output / "model.safetensors", "pt") as ours, safe_open(
            DEMO / "model.safetensors", "pt") as base:
        assert set(ours.keys()) == set(base.keys())
        for name in base.keys():
            assert ours.get_slice(name).get_dtype() == base.get_slice(name).get_dtype()
            same = torch.equal(ours.get_tensor(name), base.get_tensor(name))
            assert same is ("proj" not in name) or "_norm" in name and lora_run.factor != 1, name


def test_the_passes_of_a_run_with_lora_hold_adapters_and_no_weights_of_the_base(lora_run):
    weights = {str(path.relative_to(lora_run.work)) for path in lora_run.work.rglob("*.safetensors")}
    first, second = (tool.last_round(lora_run.work / name).name for name in ("3-pass-1", "5-pass-2"))
    assert weights == {"1-base/teacher.safetensors", "2-healed/model.safetensors",
                       f"3-pass-1/{first}/{tool.LORA_FILE}", f"5-pass-2/{second}/{tool.LORA_FILE}"}
    assert not list(lora_run.work.rglob("*.bin"))


def test_the_adapter_lies_beside_the_result_where_it_fits_the_base_itself(lora_run):
    """With RoPE scaled it belongs to the healed base, which nobody else has."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = lora_run.output / "adapter"
    assert adapter.exists() is (lora_run.factor == 1)
    if adapter.exists():
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


def test_another_method_makes_the_stages_from_healing_on_anew_and_keeps_what_the_base_said(lora_run, tmp_path):
    for name in ("novo.work", "linhas.jsonl"):
        copy = shutil.copytree if name == "novo.work" else shutil.copy2
        copy(lora_run.folder / name, tmp_path / name)
    kept = (tmp_path / "novo.work" / "1-base" / "heard.json").read_bytes()
    methods = []

    def heal(*given):
        methods.append(given[-2].method)
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
