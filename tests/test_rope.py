"""RoPE: the configuration is scaled before the model is built, and the scaling arrives where it must."""

import copy
import json

import pytest
import torch
from conftest import DEMO, HEAD, LOCAL_THETA, THETA, small_settings

import rename_obrutai as tool

ARCHITECTURES = ("llama", "qwen3", "gemma3")
LATE = torch.arange(3, 60)[None] % 50 + 10  # 57 tokens, none of them special


def formula(theta, factor=1.0):
    """Rotary frequencies by the book: theta^(-2i/d) / factor for i in 0 .. d/2 - 1."""
    return torch.tensor([theta ** (-2 * i / HEAD) / factor for i in range(HEAD // 2)])


def logits(model, position_ids=None):
    with torch.inference_mode():  # the mask is given because the model would take fractions for packed sequences
        return model(input_ids=LATE, attention_mask=torch.ones_like(LATE), position_ids=position_ids).logits[0]


def expect_frequencies(model, architecture, factor):
    """Compare every frequency that the built model holds with the formula."""
    found = tool.rope_frequencies(model)
    current = {name: values for name, values in found.items() if "original" not in name}
    if architecture == "gemma3":
        (scaled,) = [v for name, v in current.items() if "full_attention" in name]
        (local,) = [v for name, v in current.items() if "sliding_attention" in name]
        assert torch.allclose(local, formula(LOCAL_THETA), rtol=1e-6, atol=0)
    else:
        (scaled,) = current.values()
    assert torch.allclose(scaled, formula(THETA, factor), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------ the pure function


@pytest.mark.parametrize("given, factor, expected", [
    ({"rope_type": "default", "rope_theta": 1e4}, 4.0, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    ({"rope_theta": 5e5}, 2.5, {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.5}),
    ({"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}, 4,
     {"rope_type": "linear", "rope_theta": 1e6, "factor": 32.0}),
    ({"rope_type": "default", "rope_theta": 1e4, "factor": None}, 4.0,
     {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
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
], ids=["flat", "flat without type", "already linear", "empty factor", "partial", "per layer type",
        "per layer type, already linear"])
def test_scaling_gives_the_parameters_written_by_hand_and_leaves_the_input(given, factor, expected):
    before = copy.deepcopy(given)
    assert tool.scale_rope(given, factor) == expected
    assert given == before


@pytest.mark.parametrize("kind", ["llama3", "yarn", "dynamic", "longrope", "proportional"])
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


@pytest.mark.parametrize("config", [
    {"rope_theta": 1e4},
    {"rope_theta": 1e4, "rope_scaling": None},
    {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}}},
    {"n_positions": 1024},  # old configurations do not say whether there is RoPE; the built one is asked later
])
def test_configurations_that_can_be_scaled_pass_the_early_check(config):
    tool.check_rope(config, 4.0)


@pytest.mark.parametrize("config", [
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
])
def test_other_scalings_fail_the_early_check_unless_rope_is_left_alone(config):
    with pytest.raises(tool.InputError, match="--rope-factor 1"):
        tool.check_rope(config, 4.0)
    tool.check_rope(config, 1.0)


# ------------------------------------------------------------------------------------------------ built models


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("factor", [1.0, 4.0, 2.5])
def test_a_built_model_has_the_frequencies_of_the_formula(architecture, factor, tiny_folder):
    model = tool.load_model(tiny_folder(architecture), factor)
    expect_frequencies(model, architecture, factor)
    length = model.config.max_position_embeddings
    assert length == {1.0: 64, 4.0: 256, 2.5: 160}[factor] and type(length) is int
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_already_linear_model_is_scaled_further(tiny_folder, tmp_path):
    tool.load_model(tiny_folder("llama"), 2.0).save_pretrained(tmp_path)
    model = tool.load_model(str(tmp_path), 4.0)
    expect_frequencies(model, "llama", 8.0)
    assert model.config.max_position_embeddings == 512


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scaling_changes_the_logits_at_late_positions(architecture, tiny_folder):
    before, after = (logits(tool.load_model(tiny_folder(architecture), factor)) for factor in (1.0, 4.0))
    assert torch.equal(before[0], after[0])  # position 0 is not rotated at all
    assert (before[40:] - after[40:]).abs().amax(-1).min() > 0.01


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_scaled_model_is_the_base_with_positions_divided(architecture, tiny_folder):
    base, scaled = (tool.load_model(tiny_folder(architecture), factor) for factor in (1.0, 4.0))
    divided = logits(base, torch.arange(LATE.shape[1])[None] / 4)
    assert torch.allclose(logits(scaled), divided, atol=1e-4)


def test_of_gemma_only_the_global_layers_have_their_positions_divided(tiny_folder, monkeypatch):
    base, scaled = (tool.load_model(tiny_folder("gemma3"), factor) for factor in (1.0, 4.0))
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
    chat = tool.load_chat(folder, small_settings(), 4.0)
    expected = logits(chat.model)
    tool.save_model(chat, tmp_path / "saved", folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    expect_frequencies(again, architecture, 4.0)
    assert again.config.max_position_embeddings == 256 and again.config.use_cache is True
    assert torch.allclose(logits(again), expected, atol=1e-5)


def test_the_saved_model_keeps_the_dtype_of_the_base_and_names_its_context(tmp_path):
    from safetensors import safe_open

    chat = tool.load_chat(str(DEMO), small_settings(), 4.0)
    tool.save_model(chat, tmp_path / "saved", str(DEMO))
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}
    native = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    config = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    names = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] == names["model_max_length"] == 4 * native
    assert config["dtype"] == "bfloat16"


def test_a_base_whose_configuration_names_no_dtype_can_be_saved(tiny_folder, tmp_path):
    base = tmp_path / "base"
    tool.load_model(tiny_folder("llama")).save_pretrained(base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_bytes((DEMO / name).read_bytes())
    tool.save_model(tool.load_chat(str(base), small_settings()), tmp_path / "saved", str(base))
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size > 0


def test_a_sentencepiece_file_of_the_base_is_kept_beside_the_tokenizer(tiny_folder, tmp_path):
    base = tmp_path / "base"
    tool.load_model(tiny_folder("llama")).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_bytes((DEMO / name).read_bytes())
    chat = tool.load_chat(str(base), small_settings())
    (base / "tokenizer.model").write_bytes(b"sentencepiece")
    tool.save_model(chat, tmp_path / "saved", str(base))
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == b"sentencepiece"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_scaling_that_did_not_arrive_stops_the_run(architecture, tiny_folder):
    base, scaled = (tool.rope_frequencies(tool.load_model(tiny_folder(architecture), f)) for f in (1.0, 4.0))
    tool.check_frequencies(base, scaled, 4.0)
    with pytest.raises(RuntimeError):
        tool.check_frequencies(base, base, 4.0)
    with pytest.raises(RuntimeError):
        tool.check_frequencies(base, scaled, 2.0)


def test_changing_the_configuration_of_a_loaded_model_is_seen_as_no_scaling(tiny_folder):
    """The trap that the order in `load_model` avoids: the frequencies were computed when the model was built."""
    model = tool.load_model(tiny_folder("llama"))
    before = tool.rope_frequencies(model)
    model.config.rope_parameters = tool.scale_rope(model.config.rope_parameters, 4.0)
    with pytest.raises(RuntimeError):
        tool.check_frequencies(before, tool.rope_frequencies(model), 4.0)
