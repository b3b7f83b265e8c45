"""RoPE: the configuration is scaled before the model is built, and the scaling arrives where it must."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEMO, HEAD, LOCAL_THETA, THETA, small_settings
from test_families import job_with, listened

import rename_obrutai as tool

ARCHITECTURES = ("llama", "qwen3", "gemma3")
LATE = torch.arange(3, 60)[None] % 50 + 10  # 57 tokens, none of them special
FULL = small_settings("--method", "full")


def load(folder, factor=1.0):
    """The model as full training takes it."""
    return tool.load_model(folder, FULL, factor)


def formula(theta, factor=1.0):
    """Rotary frequencies by the book: theta^(-2i/d) / factor for i in 0 .. d/2 - 1."""
    return torch.tensor([theta ** (-2 * i / HEAD) / factor for i in range(HEAD // 2)])


def logits(model, position_ids=None):
    with torch.inference_mode():  # the mask is given because the model would take fractions for packed sequences
        return model(input_ids=LATE, attention_mask=torch.ones_like(LATE), position_ids=position_ids).logits[0]


def current(model):
    """The frequencies that the built model turns with, without the copies that it may go back to."""
    return {name: values for name, values in tool.rope_frequencies(model).items() if "original" not in name}


def expect_frequencies(model, architecture, factor):
    """Compare every frequency that the built model holds with the formula."""
    found = current(model)
    if architecture == "gemma3":
        (scaled,) = [v for name, v in found.items() if "full_attention" in name]
        (local,) = [v for name, v in found.items() if "sliding_attention" in name]
        assert torch.allclose(local, formula(LOCAL_THETA), rtol=1e-6, atol=0)
    else:
        (scaled,) = found.values()
    assert torch.allclose(scaled, formula(THETA, factor), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------ the pure function


@pytest.mark.parametrize("given, factor, expected", [
    ({"rope_type": "default", "rope_theta": 1e4}, 4.0, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    ({"rope_theta": 5e5}, 2.5, {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.5}),
    ({"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}, 4,
     {"rope_type": "linear", "rope_theta": 1e6, "factor": 32.0}),
    ({"rope_type": "default", "rope_theta": 1e4, "factor": None}, 4.0,
     {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    ({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192}, 4.0,
     {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192}),
    ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}, 4.0,
     {"rope_type": "linear", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "factor": 4.0}),
    ({"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      "full_attention": {"rope_type": "default", "rope_theta": 1e6}}, 4.0,
     {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}}),
    ({"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}, 4.0,
     {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 32.0},
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
], ids=["flat", "flat without type", "already linear", "empty factor", "llama3", "partial", "per layer type",
        "per layer type, already linear"])
def test_scaling_gives_the_parameters_written_by_hand_and_leaves_the_input(given, factor, expected):
    before = copy.deepcopy(given)
    assert tool.scale_rope(given, factor) == expected
    assert given == before


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "proportional"])
@pytest.mark.parametrize("nested", [False, True])
def test_another_scaling_is_refused_and_says_what_to_set(kind, nested):
    given = {"rope_type": kind, "rope_theta": 1e4, "factor": 8.0}
    if nested:
        given = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": given}
    with pytest.raises(tool.InputError, match="--rope-factor 1") as error:
        tool.scale_rope(given, 4.0)
    assert kind in str(error.value)


@pytest.mark.parametrize("nothing", [None, {}])
def test_a_model_without_rope_is_refused_and_says_what_to_set(nothing):
    with pytest.raises(tool.InputError, match="--rope-factor 1"):
        tool.scale_rope(nothing, 4.0)


def describe(folder, config):
    """Make `config` the configuration of the base in `folder`."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}), encoding="utf-8")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 512}


@pytest.mark.parametrize("config", [
    {"rope_theta": 1e4},
    {"rope_theta": 1e4, "rope_scaling": None},
    {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    {"model_type": "gemma3_text", "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    {"model_type": "gemma3", "text_config": {"rope_theta": 1e6,
                                             "rope_scaling": {"rope_type": "linear", "factor": 8.0}}},
])
def test_configurations_that_can_be_scaled_pass_the_check_before_the_weights_are_read(config, base_folder):
    describe(base_folder, {"max_position_embeddings": 2048, **config})
    lengths = [tool.read_config(base_folder, factor).get_text_config().max_position_embeddings for factor in (1, 4)]
    assert lengths[1] == 4 * lengths[0] > 0


@pytest.mark.parametrize("config", [
    {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    {"model_type": "gemma3_text", "rope_parameters": {
        "full_attention": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    {"model_type": "gpt2"},
])
def test_others_fail_the_check_before_the_weights_are_read_unless_rope_is_left_alone(config, base_folder):
    describe(base_folder, config)
    with pytest.raises(tool.InputError, match="--rope-factor 1"):
        tool.read_config(base_folder, 4.0)
    assert tool.read_config(base_folder, 1.0)


# ------------------------------------------------------------------------------------------------ built models


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("factor", [1.0, 4.0, 2.5])
def test_a_built_model_has_the_frequencies_of_the_formula(architecture, factor, tiny_folder):
    model = load(tiny_folder(architecture), factor)
    expect_frequencies(model, architecture, factor)
    length = model.config.max_position_embeddings
    assert length == {1.0: 64, 4.0: 256, 2.5: 160}[factor] and type(length) is int
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_already_linear_model_is_scaled_further(tiny_folder, tmp_path):
    load(tiny_folder("llama"), 2.0).save_pretrained(tmp_path)
    model = load(str(tmp_path), 4.0)
    expect_frequencies(model, "llama", 8.0)
    assert model.config.max_position_embeddings == 512


@pytest.fixture
def already_scaled(tiny_folder, tmp_path):
    """The tiny Llama as a base that has been given this scaling before."""
    def build(rope):
        folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "base"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["rope_parameters"] = {"rope_theta": THETA, **rope}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return build


def test_of_a_scaling_by_frequency_only_what_it_had_stretched_is_stretched_further(tiny_folder, tmp_path):
    """The three first frequencies turn many times within the 512 tokens that the scaling began from, those from the
    fifth on hardly once."""
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"] = {"rope_theta": THETA, **LLAMA3}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    base, chat = load(folder), tool.load_chat(folder, FULL, 4.0)
    (before,), (after,) = (current(model).values() for model in (base, chat.model))
    for found, factor in ((before, 8.0), (after, 32.0)):
        assert torch.allclose(found[:3], formula(THETA)[:3], rtol=1e-6, atol=0)
        assert torch.allclose(found[4:], formula(THETA, factor)[4:], rtol=1e-6, atol=0)
    assert 1 < before[3] / after[3] < 4
    assert (chat.model.config.max_position_embeddings, base.config.max_position_embeddings) == (256, 64)
    tool.check_frequencies(tool.rope_frequencies(base), tool.rope_frequencies(chat.model), 4.0)
    expected = logits(chat.model)
    tool.save_model(chat, tmp_path / "saved", folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(*(values for model in (again, chat.model) for values in current(model).values()))
    assert torch.allclose(logits(again), expected, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scaling_changes_the_logits_at_late_positions(architecture, tiny_folder):
    before, after = (logits(load(tiny_folder(architecture), factor)) for factor in (1.0, 4.0))
    assert torch.equal(before[0], after[0])  # position 0 is not rotated at all
    assert (before[40:] - after[40:]).abs().amax(-1).min() > 0.01


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_scaled_model_is_the_base_with_positions_divided(architecture, tiny_folder):
    base, scaled = (load(tiny_folder(architecture), factor) for factor in (1.0, 4.0))
    divided = logits(base, torch.arange(LATE.shape[1])[None] / 4)
    assert torch.allclose(logits(scaled), divided, atol=1e-4)


def test_of_gemma_only_the_global_layers_have_their_positions_divided(tiny_folder, monkeypatch):
    base, scaled = (load(tiny_folder("gemma3"), factor) for factor in (1.0, 4.0))
    rotary = base.model.rotary_emb
    original = rotary.forward

    def divided(x, position_ids, layer_type=None):
        return original(x, position_ids / 4 if layer_type == "full_attention" else position_ids, layer_type)

    monkeypatch.setattr(rotary, "forward", divided)
    assert torch.allclose(logits(scaled), logits(base), atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_model_loads_with_the_same_frequencies_and_logits(architecture, tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(architecture)
    chat = tool.load_chat(folder, FULL, 4.0)
    expected = logits(chat.model)
    tool.save_model(chat, tmp_path / "saved", Path(folder))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    expect_frequencies(again, architecture, 4.0)
    assert again.config.max_position_embeddings == 256 and again.config.use_cache is True
    assert torch.allclose(logits(again), expected, atol=1e-5)


def test_the_saved_model_keeps_the_dtype_of_the_base_and_names_its_context(tmp_path):
    from safetensors import safe_open

    chat = tool.load_chat(str(DEMO), FULL, 4.0)
    tool.save_model(chat, tmp_path / "saved", DEMO)
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}
    native = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    config = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    names = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] == names["model_max_length"] == 4 * native
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_a_base_whose_configuration_names_no_dtype_can_be_saved(tiny_folder, tmp_path):
    base = tmp_path / "base"
    load(tiny_folder("llama")).save_pretrained(base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_bytes((DEMO / name).read_bytes())
    tool.save_model(tool.load_chat(base, FULL), tmp_path / "saved", base)
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size > 0


def test_a_sentencepiece_file_of_the_base_is_kept_beside_the_tokenizer(tiny_folder, tmp_path):
    base = tmp_path / "base"
    load(tiny_folder("llama")).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_bytes((DEMO / name).read_bytes())
    chat = tool.load_chat(base, FULL)
    (base / "tokenizer.model").write_bytes(b"sentencepiece")
    tool.save_model(chat, tmp_path / "saved", base)
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == b"sentencepiece"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_scaling_that_did_not_arrive_stops_the_run(architecture, tiny_folder):
    base, scaled = (tool.rope_frequencies(load(tiny_folder(architecture), f)) for f in (1.0, 4.0))
    tool.check_frequencies(base, scaled, 4.0)
    with pytest.raises(RuntimeError):
        tool.check_frequencies(base, base, 4.0)
    with pytest.raises(RuntimeError):
        tool.check_frequencies(base, scaled, 2.0)


def test_changing_the_configuration_of_a_loaded_model_is_seen_as_no_scaling(tiny_folder):
    """The trap that the order in `load_model` avoids: the frequencies were computed when the model was built."""
    model = load(tiny_folder("llama"))
    before = tool.rope_frequencies(model)
    model.config.rope_parameters = tool.scale_rope(model.config.rope_parameters, 4.0)
    with pytest.raises(RuntimeError):
        tool.check_frequencies(before, tool.rope_frequencies(model), 4.0)


# ------------------------------------------------------------------------------------------------ reordered pairs


def test_each_place_gets_the_pair_that_turned_the_most_like_it():
    base = [10 ** (-i / 4) for i in range(8)]
    assert tool.nearest_pairs(base, base) == list(range(8))
    assert tool.nearest_pairs(base, [f / 10 ** 0.5 for f in base]) == [2, 3, 4, 5, 6, 7, 1, 0]
    fast = [*base[:3], *(f / 10 ** 0.25 for f in base[3:])]  # as llama3 scales: the fast ones stay
    assert tool.nearest_pairs(base, fast) == [0, 1, 2, 4, 5, 6, 7, 3]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pairs_that_move_together_with_their_frequencies_change_no_logit(architecture, tiny_folder):
    model = load(tiny_folder(architecture))
    before, order = logits(model), [3, 0, 7, 1, 6, 2, 5, 4]
    tool.reorder_pairs(model, order)
    assert (logits(model) - before).abs().max() > 0.1
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and "sliding" not in name:
            buffer.copy_(buffer[order])
    assert torch.allclose(logits(model), before, atol=1e-3)


SUMS = [tool.question_and_answer(f"Quanto é {i} mais {j}?", f"{i} + {j} é igual a {i + j}.") for i in range(1, 6)
        for j in range(1, 6)]


def test_the_demo_keeps_more_of_its_choices_when_its_pairs_keep_their_frequencies(demo_chat, capsys):
    chat, job = tool.load_chat(str(DEMO), FULL, 4.0), job_with(*listened(demo_chat, SUMS), FULL, 128)
    talks = job.heard.everyday
    before = tool.kept_share(chat, job, talks)
    tool.keep_frequencies(tool.rope_frequencies(demo_chat.model), chat, job)
    assert tool.kept_share(demo_chat, job, talks) == 1
    assert before < 0.75 and tool.kept_share(chat, job, talks) > before + 0.1
    assert "frequências reordenadas" in capsys.readouterr().out


def test_pairs_go_back_to_where_they_were_when_the_model_then_chooses_less_like_the_base(tiny_folder, monkeypatch):
    base, chat = (tool.load_chat(tiny_folder("qwen3"), FULL, factor) for factor in (1.0, 4.0))
    found, seen = iter([0.2, 0.1]), []

    def kept_share(chat, job, talks):
        seen.append(chat.model.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone())
        return next(found)

    monkeypatch.setattr(tool, "kept_share", kept_share)
    tool.keep_frequencies(tool.rope_frequencies(base.model), chat, job_with([], None, FULL, 64))
    assert not torch.equal(*seen)  # they were moved
    assert all(torch.equal(a, b) for a, b in zip(base.model.parameters(), chat.model.parameters(), strict=True))
