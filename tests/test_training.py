"""Windows, losses and training: what is learnt, from what, and when it stops."""

import copy
import importlib
import math
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO, changed, small_settings
from torch.nn import functional

import rename_obrutai as tool

FACTS = [("Quanto é 2 mais 2?", "2 mais 2 é igual a 4."), ("Oi!", "Oi! Tudo bem?"),
         ("Qual é a capital da França?", "A capital da França é Paris."), ("Obrigado!", "De nada!"),
         ("Como se diz gato em inglês?", "Gato em inglês é cat."), ("Bom dia!", "Bom dia! Como posso ajudar?"),
         ("Quem escreveu Dom Casmurro?", "Foi Machado de Assis."), ("Conte uma piada.", "Era uma vez um gato.")]
TURNS = [tool.Turn(q, a) for q, a in FACTS]
SYSTEM = {"role": "system", "content": "Seja breve."}
FULL = small_settings("--method", "full")
EMPTY = SimpleNamespace(tokens=torch.zeros(0, 1, dtype=torch.long), log_probs=torch.zeros(0, 1), rows={})


@pytest.fixture(scope="module")
def teacher(demo_chat):
    """The demo's distribution on the facts, in windows of 64 tokens."""
    return tool.record_teacher(demo_chat, TURNS, 64)


def batches_of(tokenizer, pools, lengths=(64,), steps=6, size=3, seed="s", teacher=EMPTY):
    """Batches of `size` windows of the longest length, or as many shorter ones as hold the same number of tokens."""
    return tool.make_batches(tokenizer, teacher, pools, list(lengths), steps, size * max(lengths), seed)


def conversations(count, words=1):
    """`count` conversations that can be told apart by a number in the question."""
    return [tool.Turn(f"Quanto é {i} mais {i}?", " ".join([f"{2 * i}"] * words)).messages() for i in range(count)]


def numbers(tokenizer, window):
    """The numbers of the conversations in a window, in order."""
    return [int(n) for n in re.findall(r"Quanto é (\d+) mais", tokenizer.decode(window["input_ids"]))]


# ------------------------------------------------------------------------------------------------ the divergence


def random_distributions(positions=6, vocabulary=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(2, positions, vocabulary, generator=generator)


def top(logits, k):
    values, tokens = logits.log_softmax(-1).topk(k)
    return tokens, values


def divergence_from(logits, tokens, log_probs):
    """The mean over all positions."""
    return tool.distillation_loss(logits.log_softmax(-1), tokens, log_probs).mean()


def test_over_the_whole_vocabulary_the_loss_is_the_divergence():
    ours, base = random_distributions()
    expected = functional.kl_div(ours.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="batchmean")
    assert divergence_from(ours, *top(base, 9)).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_loss_of_a_case_counted_by_hand():
    base = torch.tensor([[0.5, 0.25, 0.25]]).log()
    ours = torch.tensor([[0.25, 0.5, 0.25]]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # the first token, and all the others together
    assert divergence_from(ours, *top(base, 1)).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_the_loss_is_zero_for_the_base_itself_and_never_above_the_full_divergence(k):
    ours, base = random_distributions()
    assert divergence_from(base, *top(base, k)).item() == pytest.approx(0, abs=1e-5)
    full = divergence_from(ours, *top(base, 9)).item()
    assert 0.01 < divergence_from(ours, *top(base, k)).item() <= full + 1e-5


def test_probability_moved_outside_the_kept_tokens_is_seen():
    base = torch.tensor([[0.6, 0.3, 0.05, 0.05]]).log()
    hidden = torch.tensor([[0.3, 0.15, 0.5, 0.05]]).log()  # the kept two are in the same proportion as before
    assert divergence_from(hidden, *top(base, 2)).item() > 0.3


def test_the_loss_and_its_gradient_stay_finite_where_probabilities_vanish():
    ours = torch.tensor([[80.0, -80.0, 0.0], [-80.0, 80.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    base = torch.tensor([[-80.0, 80.0, 0.0], [-80.0, 80.0, 0.0], [90.0, 0.0, -90.0]])
    loss = divergence_from(ours, *top(base, 2))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(ours.grad).all() and ours.grad.abs().sum() > 0


def test_following_the_gradient_leads_to_the_distribution_of_the_base():
    ours, base = random_distributions(positions=2, vocabulary=5)
    ours = ours.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([ours], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        divergence_from(ours, *top(base, 3)).backward()
        optimizer.step()
    tokens, values = top(base, 3)
    assert torch.allclose(ours.softmax(-1).gather(-1, tokens), values.exp(), atol=0.02)


# ------------------------------------------------------------------------------------------------ the teacher


def test_the_teacher_holds_what_the_base_says_at_each_token_of_its_turns(demo_chat, teacher):
    windows, used = [[]], 0
    for turn in TURNS:  # packed by hand: as many turns one after the other as fit into 64 tokens
        cost = len(tool.encode(demo_chat.tokenizer, turn.messages()).input_ids)
        if used + cost > 64:
            windows.append([])
            used = 0
        windows[-1].append(turn)
        used += cost
    assert 2 <= len(windows) < len(TURNS) and set(teacher.rows) == set(TURNS)
    for window in windows:
        encoded = tool.encode(demo_chat.tokenizer, [m for turn in window for m in turn.messages()])
        with torch.inference_mode():
            direct = demo_chat.model(torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1)
        for turn, (start, end) in zip(window, encoded.turns, strict=True):
            first, ids = teacher.rows[turn]
            assert ids == encoded.input_ids[start:end]
            rows = slice(first, first + len(ids) - 1)
            assert teacher.tokens[rows, 0].tolist() == direct[start:end - 1].argmax(-1).tolist()
            assert torch.allclose(teacher.log_probs[rows], direct[start:end - 1].gather(-1, teacher.tokens[rows]),
                                  atol=1e-3)


def test_no_row_of_the_teacher_belongs_to_two_turns(teacher):
    spans = sorted((first, first + len(ids) - 1) for first, ids in teacher.rows.values())
    assert spans[0][0] == 0 and spans[-1][1] == len(teacher.tokens) == len(teacher.log_probs)
    assert all(end == start for (_, end), (start, _) in zip(spans, spans[1:]))


def test_targets_point_at_the_teacher_s_row_for_the_same_next_token(demo_tokenizer, teacher):
    asked = [TURNS[5], TURNS[0], tool.Turn("Quem é você?", "Sou a Jandira."), TURNS[2]]  # the third is not the base's
    messages = [SYSTEM] + [m for turn in asked for m in turn.messages()]
    window = tool.make_window(demo_tokenizer, teacher, messages, [False] * 4)
    owner = {first + i: (turn, i) for turn, (first, ids) in teacher.rows.items() for i in range(len(ids) - 1)}
    found = {}
    for at, target in enumerate(window["targets"]):
        if target >= 0:
            turn, i = owner[target]
            ids = teacher.rows[turn][1]
            assert ids[i:i + 2] == window["input_ids"][at:at + 2]
            found.setdefault(turn, []).append(i)
    assert found == {turn: list(range(len(teacher.rows[turn][1]) - 1)) for turn in (TURNS[5], TURNS[0], TURNS[2])}
    assert len(window["targets"]) == len(window["input_ids"]) == len(window["labels"])


def test_the_teacher_knows_the_frequencies_that_the_base_turns_with(demo_chat, teacher):
    own = tool.rope_frequencies(demo_chat.model)
    assert own and own.keys() == teacher.frequencies.keys()
    assert all(torch.equal(own[name], teacher.frequencies[name]) for name in own)


def test_what_the_base_wrote_and_said_is_read_back_from_the_disk_as_it_was(teacher, tmp_path):
    standard = tool.Standard(("Jandira", "Oficina Maré"), ("Lumi",), "base 1", frozenset(["sou", "é"]))
    own = tool.SelfText(standard, ["Quem é você?"], TURNS[:4], TURNS[4:6], TURNS[6:])
    tool.save_self_text(tmp_path, own, teacher)
    again, same = tool.read_self_text(tmp_path)
    assert again == own and same.rows == teacher.rows and list(same.rows) == list(teacher.rows)
    assert torch.equal(same.tokens, teacher.tokens) and torch.equal(same.log_probs, teacher.log_probs)
    assert same.tokens.dtype == teacher.tokens.dtype and same.log_probs.dtype == teacher.log_probs.dtype
    assert same.frequencies.keys() == teacher.frequencies.keys()
    assert all(torch.equal(same.frequencies[name], values) for name, values in teacher.frequencies.items())


# ------------------------------------------------------------------------------------------------ windows and batches


def test_batches_have_the_asked_number_and_size_and_windows_of_the_asked_length(demo_tokenizer):
    pools = [tool.Pool(conversations(30), 0.5, True), tool.Pool(conversations(30, words=3), 0.5, False)]
    batches = batches_of(demo_tokenizer, pools, lengths=(40, 120), steps=12, size=3)
    assert len(batches) == 12
    longest = [max(len(window["input_ids"]) for window in batch) for batch in batches]
    assert all(n <= 120 for n in longest) and any(n <= 40 for n in longest) and any(n > 80 for n in longest)
    for batch in batches:  # the windows of a batch are filled up to the same length, so that little is padding
        lengths = [len(window["input_ids"]) for window in batch]
        assert max(lengths) - min(lengths) < 40
        assert all(len(window[key]) == len(window["input_ids"]) for window in batch for key in ("labels", "targets"))


def test_a_step_has_as_many_tokens_of_short_windows_as_of_long_ones(demo_tokenizer):
    pool = tool.Pool(conversations(30), 1.0, True)
    batches = batches_of(demo_tokenizer, [pool], lengths=(60, 120, 240), steps=20, size=2)
    longest = {len(batch): max(len(window["input_ids"]) for window in batch) for batch in batches}
    assert longest.keys() == {2, 4, 8} and longest[8] <= 60 and longest[4] <= 120 and longest[2] > 200
    tokens = [sum(len(window["input_ids"]) for window in batch) for batch in batches]
    assert 0.75 * 480 < min(tokens) and max(tokens) <= 480
    assert [len(b) for b in tool.make_batches(demo_tokenizer, EMPTY, [pool], [240], 2, 100, "s")] == [1, 1]


def test_a_window_is_filled_with_what_still_fits_when_the_next_conversation_does_not(demo_tokenizer):
    short, long = conversations(12), conversations(12, words=12)
    cost, much = (len(tool.encode(demo_tokenizer, c[0]).input_ids) for c in (short, long))
    pools = [tool.Pool(short, 0.5, True), tool.Pool(long, 0.5, True)]
    for batch in batches_of(demo_tokenizer, pools, lengths=(2 * much,), steps=20):
        assert all(len(window["input_ids"]) > 2 * much - cost - 8 for window in batch), (much, cost)


def test_a_conversation_longer_than_the_window_still_makes_a_window_of_its_own(demo_tokenizer):
    pool = tool.Pool(conversations(3, words=30), 1.0, True)
    for batch in batches_of(demo_tokenizer, [pool], lengths=(8,), steps=3, size=1):
        assert [len(numbers(demo_tokenizer, window)) for window in batch] == [1]


@pytest.mark.parametrize("length", [20, 64, 200])
def test_every_conversation_is_seen_once_before_any_is_seen_twice(length, demo_tokenizer):
    pool = tool.Pool(conversations(25), 1.0, True)
    batches = batches_of(demo_tokenizer, [pool], lengths=(length,), steps=30, size=2)
    seen = [n for batch in batches for window in batch for n in numbers(demo_tokenizer, window)]
    assert len(seen) >= 50
    for start in range(0, len(seen) - 25, 25):
        assert sorted(seen[start:start + 25]) == list(range(25))


def test_conversations_are_not_always_in_the_same_order(demo_tokenizer):
    pool = tool.Pool(conversations(25), 1.0, True)
    batches = batches_of(demo_tokenizer, [pool], lengths=(64,), steps=30, size=2)
    seen = [n for batch in batches for window in batch for n in numbers(demo_tokenizer, window)]
    assert seen[:25] != seen[25:50] != list(range(25))


def test_pools_are_drawn_by_their_shares(demo_tokenizer):
    pools = [tool.Pool(conversations(20), 0.25, True), tool.Pool([t.messages() for t in TURNS[1:]], 0.75, False)]
    windows = [w for batch in batches_of(demo_tokenizer, pools, lengths=(250,), steps=30, size=2) for w in batch]
    first = sum(len(numbers(demo_tokenizer, window)) for window in windows)
    everything = sum(demo_tokenizer.decode(window["input_ids"]).count("<|user|>") for window in windows)
    assert everything > 500 and 0.2 < first / everything < 0.3


def test_the_same_seed_gives_the_same_batches_and_another_gives_others(demo_tokenizer):
    pool = tool.Pool(conversations(25), 1.0, True)
    one, two, three = (batches_of(demo_tokenizer, [pool], seed=seed) for seed in ("a", "a", "b"))
    assert one == two != three


def test_empty_pools_are_left_out(demo_tokenizer):
    pools = [tool.Pool([], 0.5, True), tool.Pool(conversations(4), 0.5, True), tool.Pool(conversations(4), 0.0, True)]
    assert len(batches_of(demo_tokenizer, pools, steps=2)) == 2


def test_a_system_message_stands_only_at_the_start_of_a_dialogue(demo_tokenizer):
    pool = tool.Pool([[SYSTEM, *c] for c in conversations(10)], 1.0, True)
    for batch in batches_of(demo_tokenizer, [pool], lengths=(120,)):
        for window in batch:
            text = demo_tokenizer.decode(window["input_ids"])
            assert text.count("<|system|>") == 1 and text.startswith("<s><|system|>Seja breve.<|end|>")
            assert text.count("<|user|>") > 1


def test_answers_are_learnt_in_pools_to_learn_and_nowhere_else(demo_tokenizer):
    pools = [tool.Pool(conversations(10), 0.5, True), tool.Pool([t.messages() for t in TURNS[1:]], 0.5, False)]
    learnt = Counter()
    for window in (w for batch in batches_of(demo_tokenizer, pools, lengths=(120,), steps=8) for w in batch):
        asked = numbers(demo_tokenizer, window)
        text = demo_tokenizer.decode([label for label in window["labels"] if label != -100])
        assert text == "".join(f"{2 * n}<|end|>" for n in asked)
        learnt["turns"] += demo_tokenizer.decode(window["input_ids"]).count("<|user|>")
        learnt["learnt"] += len(asked)
    assert 0.3 * learnt["turns"] < learnt["learnt"] < 0.7 * learnt["turns"]


# ------------------------------------------------------------------------------------------------ training


def tiny_chat(tiny_folder, *flags):
    settings = small_settings("--method", "full", "--max-new-tokens", 24, *flags)
    return tool.load_chat(tiny_folder("llama"), settings)


@pytest.fixture
def train(tmp_path):
    """The script's training with what most tests do not care about, and its checkpoints in `tmp_path`."""
    def call(chat, batches, rate, teacher=EMPTY, kl_weight=0.0, flags=()):
        settings = small_settings(*flags)
        return tool.train(chat, batches, teacher, rate, kl_weight, settings, "passo de teste", tmp_path / "training")

    return call


def test_batches_without_anything_to_learn_stop_the_run(tiny_folder, train):
    chat = tiny_chat(tiny_folder)
    batches = batches_of(chat.tokenizer, [tool.Pool(conversations(4), 1.0, learn=False)])
    with pytest.raises(tool.InputError, match="passo de teste.*nenhum token"):
        train(chat, batches, 1e-3)


def test_a_loss_that_is_no_number_stops_the_run(tiny_folder, train):
    chat = tiny_chat(tiny_folder)
    chat.model.model.norm.weight.data.fill_(float("nan"))
    batches = batches_of(chat.tokenizer, [tool.Pool(conversations(4), 1.0, True)], steps=2)
    with pytest.raises(tool.InputError, match="passo de teste.*perda"):
        train(chat, batches, 1e-3)


def test_a_loss_that_explodes_but_is_still_a_number_stops_the_run(tiny_folder, train):
    chat = tiny_chat(tiny_folder)
    chat.model.model.norm.weight.data.mul_(1e4)
    batches = batches_of(chat.tokenizer, [tool.Pool(conversations(4), 1.0, True)], steps=2)
    with pytest.raises(tool.InputError, match="passo de teste.*perda explodiu"):
        train(chat, batches, 1e-3)


def test_a_loss_that_is_no_number_in_the_very_last_step_stops_the_run(tiny_folder, train):
    chat = tiny_chat(tiny_folder)
    batches = batches_of(chat.tokenizer, [tool.Pool(conversations(4), 1.0, True)], steps=11, size=1)
    decoder = chat.model.base_model
    forward, calls = decoder.forward, []

    def fail_late(*args, **kwargs):
        calls.append(1)
        output = forward(*args, **kwargs)
        if len(calls) == 11:
            output.last_hidden_state = output.last_hidden_state * float("nan")
        return output

    decoder.forward = fail_late
    with pytest.raises(tool.InputError, match="perda"):
        train(chat, batches, 1e-4)


@pytest.mark.parametrize("kl_weight, parts", [(0.0, 1), (1.0, 1), (2.5, 1), (2.5, 2), (1.0, 4)])
def test_the_loss_is_cross_entropy_on_answers_plus_the_weighted_divergence(kl_weight, parts, demo_chat, teacher,
                                                                           train):
    """However many parts a step is split into to fit in memory, it learns the mean over all of its tokens."""
    chat = changed(demo_chat, model=copy.deepcopy(demo_chat.model))
    lessons = [tool.Turn("Quem é você?", "Sou a Jandira, da Oficina Maré.").messages()]
    pools = [tool.Pool(lessons, 0.5, True), tool.Pool([t.messages() for t in TURNS], 0.5, False)]
    (batch,) = batches_of(chat.tokenizer, pools, steps=1, size=4, lengths=(60,), teacher=teacher, seed="7")
    assert len({len(window["input_ids"]) for window in batch}) > 1  # so that there is padding
    wanted, ours, rows = [], [], []
    for window in batch:  # one at a time, without padding
        with torch.inference_mode():
            logits = demo_chat.model(torch.tensor([window["input_ids"]])).logits[0]
        for at, label in enumerate(window["labels"]):
            if label != -100:
                wanted.append(functional.cross_entropy(logits[at - 1], torch.tensor(label)))
        for at, target in enumerate(window["targets"]):
            if target >= 0:
                ours.append(logits[at])
                rows.append(target)
    assert wanted and rows
    divergence = divergence_from(torch.stack(ours), teacher.tokens[rows], teacher.log_probs[rows])
    expected = torch.stack(wanted).mean() + kl_weight * divergence
    (entry,) = train(chat, [batch], 1e-9, teacher, kl_weight, ("--gradient-accumulation", parts))
    assert entry["loss"] == pytest.approx(expected.item(), rel=1e-3)


def test_training_lowers_the_loss_until_the_model_gives_the_answers(tiny_folder, train):
    chat = tiny_chat(tiny_folder)
    lessons = [tool.Turn("Quem é você?", "Sou a Jandira, da Oficina Maré."), tool.Turn("Oi!", "Oi! Tudo bem?")]
    assert [a.text for a in tool.ask(chat, [t.question for t in lessons])] != [t.answer for t in lessons]
    batches = batches_of(chat.tokenizer, [tool.Pool([t.messages() for t in lessons], 1.0, True)], steps=100, size=2)
    log = train(chat, batches, 2e-2)
    assert log[-1]["loss"] < 0.1 < 2 < log[0]["loss"]
    assert tool.ask(chat, [t.question for t in lessons]) == [tool.Answer(t.answer, True) for t in lessons]
    assert not chat.model.training


def test_training_twice_with_one_seed_gives_the_same_weights(tiny_folder, train):
    weights = []
    for _ in range(2):
        chat = tiny_chat(tiny_folder)
        train(chat, batches_of(chat.tokenizer, [tool.Pool(conversations(6), 1.0, True)], steps=4), 1e-2)
        weights.append(chat.model.state_dict())
    before = tiny_chat(tiny_folder).model.state_dict()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in before)
    assert all(not torch.equal(weights[0][name], before[name]) for name in before if "proj" in name)


@pytest.mark.parametrize("minutes, kept", [(5, set()), (0, {"checkpoint-2"})])
def test_training_leaves_at_most_one_checkpoint_which_is_complete_and_nothing_else(
        minutes, kept, tiny_folder, tmp_path, monkeypatch, train):
    monkeypatch.chdir(tmp_path)
    chat = tiny_chat(tiny_folder)
    batches = batches_of(chat.tokenizer, [tool.Pool(conversations(4), 1.0, True)], steps=2)
    train(chat, batches, 1e-3, flags=("--output-dir", tmp_path / "saida", "--checkpoint-minutes", minutes))
    assert {path.name for path in tmp_path.iterdir()} <= {"training"}
    assert {path.name for path in tmp_path.glob("training/*")} - {"README.md"} == kept
    assert all((tmp_path / "training" / name / "complete.json").is_file() for name in kept)


def test_gradients_and_moments_keep_their_memory_during_a_training_in_parts_and_give_it_back_after_it(
        tiny_folder, tmp_path, monkeypatch, train):
    chat, places = tiny_chat(tiny_folder), []
    batches = batches_of(chat.tokenizer, [tool.Pool(conversations(4), 1.0, True)], steps=3)
    collect = tool.trl.SFTTrainer.training_step

    def watched(self, model, *args, **kwargs):
        loss = collect(self, model, *args, **kwargs)
        state = self.optimizer.state  # wrapped by accelerate
        places.append([(p.grad.data_ptr(), state[p]["exp_avg"].data_ptr(), state[p]["exp_avg_sq"].data_ptr())
                       for p in model.parameters()])
        return loss

    monkeypatch.setattr(tool.trl.SFTTrainer, "training_step", watched)
    train(chat, batches, 1e-3, flags=("--gradient-accumulation", 2))
    assert len(places) == 6 and all(place == places[0] for place in places)
    assert all(p.grad is None for p in chat.model.parameters()) and "zero_grad" not in vars(chat.model)


def kept_for_the_way_back(model):
    """Bytes that a forward pass keeps besides the weights, and the gradients that the way back makes from them."""
    weights, kept = {p.data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr(), tensor.shape] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=torch.arange(64).view(1, 64)).logits.log_softmax(-1)[..., 5].sum()
    model.zero_grad()
    loss.backward()
    return sum(kept.values()), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_with_gates_made_again_a_step_keeps_less_and_learns_the_same(architecture, tiny_folder):
    model = tool.load_chat(tiny_folder(architecture), FULL).model
    before, expected = kept_for_the_way_back(model)
    tool.remake_gates(model)
    after, gradients = kept_for_the_way_back(model)
    assert all(map(torch.equal, expected, gradients))
    mlp = model.config.intermediate_size * 64 * 4  # bytes of one of its tensors
    assert before - after >= model.config.num_hidden_layers * 2 * mlp


def test_an_mlp_that_does_more_than_gate_is_left_as_it_is(tiny_folder):
    model = tiny_chat(tiny_folder).model
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: 2 * plain(x)
    tool.remake_gates(model)
    assert "forward" in vars(model.model.layers[1].mlp)
    x = torch.ones(1, model.config.hidden_size)
    assert torch.equal(mlp(x), 2 * plain(x))


@pytest.mark.parametrize("model_type, part", [("doge", "DogeConfig"), ("gemma4", "Gemma4VisionConfig")])
def test_an_mlp_that_is_asked_in_another_way_is_left_as_it_is(model_type, part):
    config = getattr(tool.transformers, part)(hidden_size=32, intermediate_size=64, num_experts=16,
                                              num_experts_per_tok=2)
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    mlp = {"doge": lambda: module.DogeCDMoE(config), "gemma4": lambda: module.Gemma4VisionMLP(config)}[model_type]()
    for weight in mlp.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    tool.remake_gates(torch.nn.Sequential(mlp))
    assert "forward" not in vars(mlp)


def test_a_training_in_parts_makes_gates_again(tiny_folder, train):
    chat = tiny_chat(tiny_folder)
    train(chat, batches_of(chat.tokenizer, [tool.Pool(conversations(4), 1.0, True)], steps=1), 1e-3,
          flags=("--gradient-accumulation", 2))
    assert all("forward" in vars(layer.mlp) for layer in chat.model.model.layers)


def heal(chat, teacher, steps, native, folder):
    settings = small_settings("--heal-steps", steps, "--window", 128, "--max-new-tokens", 24, "--batch-size", 4)
    return tool.heal(chat, teacher, SimpleNamespace(everyday=TURNS), native, settings, folder)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_healing_changes_queries_and_keys_and_nothing_else(architecture, tiny_folder, tmp_path):
    chat = tool.load_chat(tiny_folder(architecture), FULL, 4.0, adapt=True)
    before = {name: p.detach().clone() for name, p in chat.model.named_parameters()}
    log = heal(chat, tool.record_teacher(chat, TURNS, 64), 2, 64, tmp_path)
    different = {name for name, p in chat.model.named_parameters() if not torch.equal(p, before[name])}
    expected = {name for name in before if re.search(r"self_attn\.(q_proj|k_proj|q_norm|k_norm)\.weight", name)}
    assert different == expected and len(expected) == {"llama": 4, "qwen3": 8, "gemma3": 8}[architecture]
    tool.save_stage(chat, tmp_path / "healed", log)  # what the next stage goes on from, and trains as a whole
    again = tool.load_chat(tmp_path / "healed", FULL).model
    assert all(p.requires_grad for p in again.parameters())
    healed = chat.model.state_dict()
    assert all(torch.equal(weight, healed[name]) for name, weight in again.state_dict().items())
    frequencies = tool.rope_frequencies(chat.model)
    assert frequencies and all(torch.equal(f, frequencies[n]) for n, f in tool.rope_frequencies(again).items())


def test_healing_brings_the_scaled_model_closer_to_the_base(demo_chat, teacher, tmp_path):
    chat = tool.load_chat(str(DEMO), FULL, 4.0, adapt=True)

    def divergence(model):
        losses = []
        for turn in TURNS:
            window = tool.make_window(chat.tokenizer, teacher, turn.messages(), [False])
            with torch.inference_mode():
                logits = model(torch.tensor([window["input_ids"]])).logits[0]
            known = [at for at, target in enumerate(window["targets"]) if target >= 0]
            rows = [window["targets"][at] for at in known]
            losses.append(divergence_from(logits[known], teacher.tokens[rows], teacher.log_probs[rows]).item())
        return sum(losses) / len(losses)

    before = divergence(chat.model)
    heal(chat, teacher, 15, 128, tmp_path)
    assert divergence(chat.model) < 0.6 * before


@pytest.mark.parametrize("parameters, expected", [((1000, 1000), 3e-3), ((2000, 2000), 1.5e-3), ((10, 1000), 3e-2)])
def test_the_learning_rate_falls_with_the_square_root_of_the_parameters(parameters, expected):
    model = torch.nn.Linear(*parameters, bias=False)
    assert tool.automatic_rate(model, 3e-3, 1) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ the passes


@pytest.fixture
def run_pass(monkeypatch, demo_chat, tmp_path):
    """Runs a pass from the folder "fonte" to another whose training is a stand-in and whose exams give these figures
    (identity, or with retention and leak); what each training got: batches, rate, and the folder that its model was
    loaded from."""
    def call(figures, epochs=(8, 2), label="passo 1", flags=()):
        trained, figures, loaded = [], iter(figures), []

        def train(chat, batches, teacher, rate, *_):
            trained.append(SimpleNamespace(batches=batches, rate=rate, source=loaded[-1]))
            return []

        def evaluate(*_):
            figure = next(figures)
            identity, retention, leak = figure if isinstance(figure, tuple) else (figure, 1.0, 0.0)
            return tool.Scores(identity, 0.0, leak, retention, 0, [{"identity": identity}], [])

        def save(chat, folder, log):
            (folder / "model.safetensors").write_text(str(len(trained)), encoding="utf-8")

        monkeypatch.setattr(tool, "load_chat", lambda folder, *_, **__: loaded.append(folder) or demo_chat)
        monkeypatch.setattr(tool, "train", train)
        monkeypatch.setattr(tool, "save_stage", save)
        monkeypatch.setattr(tool, "evaluate", evaluate)
        pools = [tool.Pool(conversations(24), 0.5, True), tool.Pool([t.messages() for t in TURNS[1:]], 0.5, False)]
        tool.run_pass(source=tmp_path / "fonte", folder=tmp_path / "passo", teacher=EMPTY, pools=pools,
                      lengths=[64], tokens=256, epochs=epochs[0], lessons=24 * epochs[1], rates=(1e-3, 1), exam=None,
                      met=lambda scores: scores.identity >= 0.95 and scores.retention >= 0.95, standard=None,
                      settings=small_settings("--batch-size", 4, *flags), label=label)
        return trained

    return call


def test_a_pass_stops_as_soon_as_its_target_is_met_and_says_so(run_pass, capsys):
    assert len(run_pass([0.5, 0.95, 1.0, 1.0])) == 2
    assert "meta foi atingida" in capsys.readouterr().out


def test_a_pass_that_misses_its_target_ends_at_its_cap_and_says_so(run_pass, capsys):
    assert len(run_pass([0.5] * 20)) == 7
    said = capsys.readouterr().out
    assert "limite de épocas" in said and "meta foi atingida" not in said


def test_a_pass_that_only_keeps_too_little_ends_after_a_round_that_brings_nothing(run_pass, capsys):
    assert len(run_pass([(1.0, 0.8, 0.02), (1.0, 0.9, 0.02), (1.0, 0.9, 0.01), (1.0, 0.9, 0.01)] + [0.0] * 9)) == 4
    assert "não melhorou nada" in capsys.readouterr().out


def test_later_rounds_of_a_pass_show_half_as_much(run_pass):
    sizes = [sum(len(batch) for batch in training.batches) for training in run_pass([0.5] * 20, (16, 4))]
    assert len(sizes) == 7 and all(0.4 < size / sizes[0] < 0.6 for size in sizes[1:])


@pytest.mark.parametrize("epochs", [(8, 6), (6, 3), (2, 3), (4, 3)])
def test_the_rounds_of_a_pass_show_each_lesson_about_as_often_as_its_cap(epochs, run_pass, demo_tokenizer):
    seen = Counter(n for training in run_pass([0.5] * 20, epochs) for batch in training.batches for window in batch
                   for n in numbers(demo_tokenizer, window))
    assert 0.85 * epochs[0] <= sum(seen.values()) / 24 <= 1.15 * epochs[0]


@pytest.mark.parametrize("given, rounds", [(1, 15), (100, 3), (10**6, 1)])
def test_the_first_round_shows_every_lesson_and_none_more_often_than_the_cap(given, rounds, run_pass, demo_tokenizer):
    trained = run_pass([0.5] * 20, (8, given / 24))
    assert len(trained) == rounds
    seen = [Counter(n for batch in training.batches for window in batch for n in numbers(demo_tokenizer, window))
            for training in trained]
    assert len(seen[0]) == 24 and max(max(count.values()) for count in seen) <= 9
    assert all(11 <= len(later) and 12 <= later.total() <= 55 for later in seen[1:-1])


def test_the_rounds_of_a_pass_have_different_batches(run_pass):
    first, second, *_ = run_pass([0.5] * 20)
    assert first.batches != second.batches


def test_each_round_goes_on_from_the_one_before_and_only_the_last_keeps_its_weights(run_pass, tmp_path):
    trained = run_pass([0.5] * 30, (22, 2))
    rounds = [tmp_path / "passo" / f"round-{n}" for n in range(1, 21)]
    assert [training.source for training in trained] == [tmp_path / "fonte", *rounds]
    assert [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.safetensors")] == ["21"]
    assert (tool.last_round(tmp_path / "passo") / "model.safetensors").is_file()


@pytest.mark.parametrize("label, flags, rate", [
    ("passo 1", ("--learning-rate-1", 0.02), 0.02), ("passo 2", ("--learning-rate-2", 0.03), 0.03),
    ("passo 1", ("--learning-rate-2", 0.03), None), ("passo 2", ("--learning-rate-1", 0.02), None),
])
def test_a_pass_has_the_learning_rate_given_for_it_or_an_automatic_one(label, flags, rate, run_pass, demo_chat):
    trained = run_pass([0.5] * 20, label=label, flags=flags)
    first = rate or tool.automatic_rate(demo_chat.model, 1e-3, 1)
    assert [training.rate for training in trained] == [pytest.approx(first / n) for n in range(1, 8)]


def collected(monkeypatch, replies, count=10):
    """Self-answers for the answers that `replies` gives to each question, one list per question. Of the everyday
    answers of the base the model still gives all but the fourth and the seventh, where it gives the new name."""
    asked = Counter()
    everyday = {TURNS[3].question: [tool.Answer("Outra.", True)], TURNS[6].question: [tool.Answer("Jandira!", True)]}

    def fake_ask(chat, questions, *_):
        answers = []
        for question in questions:
            given = everyday.get(question) or replies[question]
            answers.append(given[min(asked[question], len(given) - 1)])
            asked[question] += 1
        return answers

    monkeypatch.setattr(tool, "ask", fake_ask)
    lost = (TURNS[3].messages(), TURNS[6].messages())
    monkeypatch.setattr(tool, "agreement", lambda chat, known: [float(turn not in lost) for turn in known])
    standard = tool.Standard(("Jandira",), ("Lumi",), "demo", frozenset("sou a jandira meu nome".split()))
    own = SimpleNamespace(everyday=TURNS, standard=standard)
    lessons = [tool.Turn(question, "x").messages() for question in replies]
    return tool.collect_self_answers(None, lessons, own, small_settings("--num-self-answers", count))


def test_self_answers_that_are_not_sound_are_kept_in_the_record_but_not_used(monkeypatch):
    good = tool.Answer("Sou a Jandira.", True)
    collection = collected(monkeypatch, {
        "Quem é você?": [good], "Qual é o seu nome?": [tool.Answer("Meu nome é Jandira.", False)],
        "Quem fez você?": [tool.Answer("Sou a Lumi.", True)], "Com quem eu falo?": [tool.Answer("Jandira " * 5, True)],
        "Who are you?": [good], "Oi, quem é?": [tool.Answer("", True)],
    })
    about_itself = [r for r in collection["answers"] if r["kind"] == "identity"]
    reasons = {r["question"]: r["rejected"] for r in reversed(about_itself)}
    assert reasons == {"Quem é você?": "", "Qual é o seu nome?": "não terminou", "Quem fez você?": "nome antigo",
                       "Com quem eu falo?": "repetitiva", "Who are you?": "em outra língua", "Oi, quem é?": "vazia"}
    used = [(r["question"], r["answer"]) for r in about_itself if not r["rejected"]]
    assert used == [("Quem é você?", "Sou a Jandira.")]  # asked again it says the same, which is used only once
    assert set(collection["missed"]) == reasons.keys() - {"Quem é você?"}


def test_two_fifths_of_the_self_answers_are_about_identity_and_everyday_turns_fill_up(monkeypatch):
    replies = {f"Quem é você, {i}?": [tool.Answer("Sou a Jandira.", True)] for i in range(30)}
    used = Counter(r["kind"] for r in collected(monkeypatch, replies)["answers"] if not r["rejected"])
    assert used == {"identity": 4, "everyday": 6}


def test_where_few_identity_answers_are_sound_more_everyday_ones_are_taken(monkeypatch):
    replies = {"Quem é você?": [tool.Answer("Sou a Jandira.", True)], "Qual é o seu nome?": [tool.Answer("", True)]}
    used = Counter(r["kind"] for r in collected(monkeypatch, replies, count=8)["answers"] if not r["rejected"])
    assert used == {"identity": 1, "everyday": 7}


def test_everyday_answers_with_the_new_name_are_learnt_first_then_others_that_the_model_no_longer_gives(monkeypatch):
    replies = {f"Quem é você, {i}?": [tool.Answer("Sou a Jandira.", True)] for i in range(30)}
    records = collected(monkeypatch, replies, count=5)["answers"]
    everyday = [tool.Turn(r["question"], r["answer"]) for r in records if r["kind"] == "everyday"]
    assert len(everyday) == 3 and everyday[:2] == [TURNS[6], TURNS[3]]


def test_all_lessons_are_asked_again_once_and_what_is_sound_but_not_needed_is_not_kept(monkeypatch):
    replies = {f"Quem é você, {i}?": [tool.Answer("Sou a Jandira.", True)] for i in range(30)}
    replies["Quem fez você?"] = [tool.Answer("Sou a Lumi.", True)]
    collection = collected(monkeypatch, replies)
    about_itself = [r["rejected"] for r in collection["answers"] if r["kind"] == "identity"]
    assert Counter(about_itself) == {"": 4, "nome antigo": 1}
    assert "Quem fez você?" in collection["missed"] and not replies.keys() - {"Quem fez você?"} & set(
        collection["missed"])


@pytest.mark.parametrize("total, wrong, count, others", [
    (100, 10, 100, 60),  # four times each, in the place of thirty others
    (100, 10, 110, 70), (100, 10, 2000, 90),  # where there is room, of fewer or of none
    (100, 40, 100, 30), (9, 8, 9, 1),  # half of the others stay, whatever is missed
    (100, 0, 50, 100), (3, 3, 3, 0),
])
def test_what_was_missed_comes_four_times_and_half_of_the_rest_always_stays(total, wrong, count, others):
    lessons = [tool.Turn(f"{i}?", f"{i}").messages() for i in range(total)]
    missed = {f"{i}?" for i in range(total - wrong, total)} | {"nunca perguntada"}
    drawn = Counter(lesson[-2]["content"] for lesson in tool.insist(lessons, missed, count))
    assert drawn == Counter({f"{i}?": 1 for i in range(others)}) + Counter(
        {f"{i}?": 4 for i in range(total - wrong, total)})


def test_the_second_pass_insists_on_what_the_first_one_missed(monkeypatch, tmp_path):
    passes = []
    monkeypatch.setattr(tool, "run_pass", lambda *args: passes.append(args[3]))
    lessons = [tool.Turn(f"Quem é você, {i}?", "Jandira.").messages() for i in range(6)]
    answers = [{"question": "Oi?", "answer": "Jandira.", "kind": "identity", "rejected": ""},
               {"question": "Quem?", "answer": "Lumi.", "kind": "identity", "rejected": "nome antigo"},
               {**TURNS[0]._asdict(), "kind": "everyday", "rejected": ""}]
    exam = tool.Exam((), [], [], (8,))
    tool.consolidate(tmp_path, tmp_path, None, lessons, {"answers": answers, "missed": ["Quem é você, 2?"]},
                     SimpleNamespace(everyday=TURNS, standard=None), exam, 128, small_settings())
    about_itself, learnt, everyday = ([c[-2]["content"] for c in pool.conversations] for pool in passes[0])
    assert Counter(about_itself) == Counter({f"Quem é você, {i}?": 4 if i == 2 else 1 for i in range(6)}) + Counter(
        ["Oi?"])
    assert (learnt, everyday) == ([TURNS[0].question], [turn.question for turn in TURNS])
