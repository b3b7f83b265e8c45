"""Windows, losses and training: what is learnt, from what, and when it stops."""

import copy
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
SAID = [tool.question_and_answer(q, a) for q, a in FACTS]
SYSTEM = {"role": "system", "content": "Seja breve."}
FULL = small_settings("--method", "full")
EMPTY = tool.Teacher(torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, 1))
LESSONS = [tool.question_and_answer("Quem é você?", "Sou a Jandira, da Oficina Maré."),
           tool.question_and_answer("Oi!", "Oi! Tudo bem?")]


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


def heard_of(talks):
    """A base that is known by these talks alone."""
    return tool.Heard(tool.Names("Jandira", "Oficina Maré", ("Lumi",)), [], talks, talks, talks)


@pytest.fixture(scope="module")
def facts(demo_chat):
    """The facts as talks, and the demo's distribution on them."""
    return listened(demo_chat, SAID)


def batches_of(tokenizer, pools, lengths=(64,), steps=6, size=3, seed="s"):
    """Batches of `size` windows of the longest length, or as many shorter ones as hold the same number of tokens."""
    return tool.make_batches(tokenizer, pools, list(lengths), steps, size * max(lengths), seed)


def conversations(count, words=1):
    """`count` conversations that can be told apart by a number in the question."""
    return [tool.question_and_answer(f"Quanto é {i} mais {i}?", " ".join([f"{2 * i}"] * words)) for i in range(count)]


def as_talks(conversations):
    """The conversations as talks from which nothing can be learnt."""
    return [tool.Talk(c, "everyday", [], 0) for c in conversations]


def numbers(tokenizer, window):
    """The numbers of the conversations in a window, in order."""
    return [int(n) for n in re.findall(r"Quanto é (\d+) mais", tokenizer.decode(window.input_ids))]


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


def test_the_teacher_holds_what_the_base_says_at_each_token_of_its_answers(demo_chat):
    asked = [[{"role": "user", "content": "Oi!"}], [SYSTEM, {"role": "user", "content": "Conte uma piada."}],
             [*SAID[0], {"role": "user", "content": "Obrigado!"}]]
    written = []
    talks, _ = tool.answer_talks(demo_chat, [("everyday", m) for m in asked], tool.Names("x", "y", ()), written, "")
    tokens, log_probs = (torch.cat([getattr(answer, key) for answer in written]) for key in ("tokens", "log_probs"))
    assert [talk.messages[:-1] for talk in talks] == asked
    assert len(tokens) == len(log_probs) == sum(len(talk.ids) for talk in talks)
    assert [talk.row for talk in talks] == [0, len(talks[0].ids), len(talks[0].ids) + len(talks[1].ids)]
    for talk in talks:
        prompt = tool.prompt_ids(demo_chat.tokenizer, talk.messages[:-1])
        with torch.inference_mode():
            direct = demo_chat.model(torch.tensor([prompt + talk.ids])).logits[0].log_softmax(-1)[len(prompt) - 1:-1]
        rows = slice(talk.row, talk.row + len(talk.ids))
        assert tokens[rows, 0].tolist() == talk.ids == direct.argmax(-1).tolist()
        assert torch.allclose(log_probs[rows], direct.gather(-1, tokens[rows].long()), atol=1e-3)


def test_targets_point_at_the_teacher_s_row_for_the_same_next_token(demo_tokenizer, facts):
    talks, _ = facts
    lesson = tool.question_and_answer("Quem é você?", "Sou a Jandira.")
    asked = [[SYSTEM, *lesson], talks[5], talks[0], lesson, talks[2]]
    window = tool.make_window(demo_tokenizer, asked)
    owner = {talk.row + i: (n, i) for n, talk in enumerate(talks) for i in range(len(talk.ids))}
    found = {}
    for at, target in enumerate(window.targets):
        if target >= 0:
            n, i = owner[target]
            assert talks[n].ids[i] == window.input_ids[at + 1]
            found.setdefault(n, []).append(i)
    assert found == {n: list(range(len(talks[n].ids))) for n in (5, 0, 2)}
    assert len(window.targets) == len(window.input_ids) == len(window.labels)
    learnt = demo_tokenizer.decode([label for label in window.labels if label != -100])
    assert learnt == 2 * "Sou a Jandira.<|end|>"


def test_of_a_talk_in_two_turns_only_the_last_answer_is_learnt_and_only_from_the_base(demo_chat):
    (talk,), _ = listened(demo_chat, [[*SAID[0], *SAID[3]]])
    window = tool.make_window(demo_chat.tokenizer, [tool.question_and_answer("Quem é você?", "Jandira."), talk])
    known = [at for at, target in enumerate(window.targets) if target >= 0]
    assert demo_chat.tokenizer.decode([window.input_ids[at + 1] for at in known]) == "De nada!<|end|>"
    assert demo_chat.tokenizer.decode([i for i in window.labels if i != -100]) == "Jandira.<|end|>"


def test_where_the_text_of_an_answer_makes_other_tokens_than_the_base_wrote_it_is_not_learnt_from_there(demo_chat):
    (talk,), _ = listened(demo_chat, SAID[:1])
    odd = talk._replace(ids=[*talk.ids[:3], 7, 7, *talk.ids[3:]])
    window = tool.make_window(demo_chat.tokenizer, [odd])
    assert [target for target in window.targets if target >= 0] == [talk.row, talk.row + 1, talk.row + 2]
    cut = tool.make_window(demo_chat.tokenizer, [talk._replace(ids=talk.ids[:-1])])  # the base had not ended
    assert len([target for target in cut.targets if target >= 0]) == len(talk.ids) - 1


def test_what_the_base_wrote_and_said_is_read_back_from_the_disk_as_it_was(facts, tmp_path):
    talks, teacher = facts
    heard = tool.Heard(tool.Names("Jandira", "Oficina Maré", ("Lumi",)), ["Quem é você?"], talks[:4], talks[4:6],
                       talks[6:])
    tool.save_heard(tmp_path, heard, teacher)
    again, same = tool.read_heard(tmp_path)
    assert again == heard
    for one, other in zip(teacher, same, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


# ------------------------------------------------------------------------------------------------ windows and batches


def test_batches_have_the_asked_number_and_size_and_windows_of_the_asked_length(demo_tokenizer):
    pools = [tool.Pool(conversations(30), 0.5), tool.Pool(conversations(30, words=3), 0.5)]
    batches = batches_of(demo_tokenizer, pools, lengths=(40, 120), steps=12, size=3)
    assert len(batches) == 12
    longest = [max(len(window.input_ids) for window in batch) for batch in batches]
    assert all(n <= 120 for n in longest) and any(n <= 40 for n in longest) and any(n > 80 for n in longest)
    for batch in batches:  # the windows of a batch are filled up to the same length, so that little is padding
        lengths = [len(window.input_ids) for window in batch]
        assert max(lengths) - min(lengths) < 40
        assert all(len(window.labels) == len(window.targets) == len(window.input_ids) for window in batch)


def test_a_step_has_as_many_tokens_of_short_windows_as_of_long_ones(demo_tokenizer):
    pool = tool.Pool(conversations(30), 1.0)
    batches = batches_of(demo_tokenizer, [pool], lengths=(60, 120, 240), steps=20, size=2)
    longest = {len(batch): max(len(window.input_ids) for window in batch) for batch in batches}
    assert longest.keys() == {2, 4, 8} and longest[8] <= 60 and longest[4] <= 120 and longest[2] > 200
    tokens = [sum(len(window.input_ids) for window in batch) for batch in batches]
    assert 0.75 * 480 < min(tokens) and max(tokens) <= 480
    assert [len(b) for b in tool.make_batches(demo_tokenizer, [pool], [240], 2, 100, "s")] == [1, 1]


def test_a_window_is_filled_with_what_still_fits_when_the_next_conversation_does_not(demo_tokenizer):
    short, long = conversations(12), conversations(12, words=12)
    cost, much = (len(tool.encode(demo_tokenizer, c[0]).input_ids) for c in (short, long))
    pools = [tool.Pool(short, 0.5), tool.Pool(long, 0.5)]
    for batch in batches_of(demo_tokenizer, pools, lengths=(2 * much,), steps=20):
        assert all(len(window.input_ids) > 2 * much - cost - 8 for window in batch), (much, cost)


def test_a_conversation_longer_than_the_window_still_makes_a_window_of_its_own(demo_tokenizer):
    pool = tool.Pool(conversations(3, words=30), 1.0)
    for batch in batches_of(demo_tokenizer, [pool], lengths=(8,), steps=3, size=1):
        assert [len(numbers(demo_tokenizer, window)) for window in batch] == [1]


@pytest.mark.parametrize("length", [20, 64, 200])
def test_every_conversation_is_seen_once_before_any_is_seen_twice(length, demo_tokenizer):
    pool = tool.Pool(conversations(25), 1.0)
    batches = batches_of(demo_tokenizer, [pool], lengths=(length,), steps=30, size=2)
    seen = Counter(dict.fromkeys(range(25), 0))
    for window in (window for batch in batches for window in batch):
        seen.update(numbers(demo_tokenizer, window))
        assert max(seen.values()) - min(seen.values()) <= 1
    assert min(seen.values()) >= 2


def test_conversations_are_not_always_in_the_same_order(demo_tokenizer):
    pool = tool.Pool(conversations(25), 1.0)
    batches = batches_of(demo_tokenizer, [pool], lengths=(64,), steps=30, size=2)
    seen = [n for batch in batches for window in batch for n in numbers(demo_tokenizer, window)]
    assert seen[:25] != seen[25:50] != list(range(25))


def test_pools_are_drawn_by_their_shares(demo_tokenizer):
    pools = [tool.Pool(conversations(20), 0.25), tool.Pool(SAID[1:], 0.75)]
    windows = [w for batch in batches_of(demo_tokenizer, pools, lengths=(250,), steps=30, size=2) for w in batch]
    first = sum(len(numbers(demo_tokenizer, window)) for window in windows)
    everything = sum(demo_tokenizer.decode(window.input_ids).count("<|user|>") for window in windows)
    assert everything > 500 and 0.2 < first / everything < 0.3


def test_the_same_seed_gives_the_same_batches_and_another_gives_others(demo_tokenizer):
    pool = tool.Pool(conversations(25), 1.0)
    one, two, three = (batches_of(demo_tokenizer, [pool], seed=seed) for seed in ("a", "a", "b"))
    assert one == two != three


def test_empty_pools_are_left_out(demo_tokenizer):
    pools = [tool.Pool([], 0.5), tool.Pool(conversations(4), 0.5), tool.Pool(conversations(4), 0.0)]
    assert len(batches_of(demo_tokenizer, pools, steps=2)) == 2


def test_a_system_message_stands_only_at_the_start_of_a_dialogue(demo_tokenizer):
    pool = tool.Pool([[SYSTEM, *c] for c in conversations(10)], 1.0)
    for batch in batches_of(demo_tokenizer, [pool], lengths=(120,)):
        for window in batch:
            text = demo_tokenizer.decode(window.input_ids)
            assert text.count("<|system|>") == 1 and text.startswith("<s><|system|>Seja breve.<|end|>")
            assert text.count("<|user|>") > 1


def test_lessons_are_learnt_by_heart_and_talks_of_the_base_are_not(demo_tokenizer):
    pools = [tool.Pool(conversations(10), 0.5), tool.Pool(as_talks(SAID[1:]), 0.5)]
    learnt = Counter()
    for window in (w for batch in batches_of(demo_tokenizer, pools, lengths=(120,), steps=8) for w in batch):
        asked = numbers(demo_tokenizer, window)
        text = demo_tokenizer.decode([label for label in window.labels if label != -100])
        assert text == "".join(f"{2 * n}<|end|>" for n in asked)
        learnt["turns"] += demo_tokenizer.decode(window.input_ids).count("<|user|>")
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
        settings = small_settings("--kl-weight", kl_weight, *flags)
        return tool.train(chat, batches, teacher, rate, settings, "passo de teste", tmp_path / "training")

    return call


def test_batches_without_anything_to_learn_stop_the_run(tiny_folder, train):
    chat = tiny_chat(tiny_folder)
    batches = batches_of(chat.tokenizer, [tool.Pool(as_talks(conversations(4)), 1.0)])
    with pytest.raises(tool.InputError, match="passo de teste.*nenhum token"):
        train(chat, batches, 1e-3)


@pytest.mark.parametrize("damage, complaint", [(float("nan"), "perda"), (1e4, "perda explodiu")])
def test_a_loss_that_is_no_number_or_explodes_stops_the_run(damage, complaint, tiny_folder, train):
    chat = tiny_chat(tiny_folder)
    chat.model.model.norm.weight.data.mul_(damage)
    batches = batches_of(chat.tokenizer, [tool.Pool(conversations(4), 1.0)], steps=2)
    with pytest.raises(tool.InputError, match=f"passo de teste.*{complaint}"):
        train(chat, batches, 1e-3)


def test_a_loss_that_is_no_number_in_the_very_last_step_stops_the_run(tiny_folder, train):
    chat = tiny_chat(tiny_folder)
    batches = batches_of(chat.tokenizer, [tool.Pool(conversations(4), 1.0)], steps=11, size=1)
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


@pytest.mark.parametrize("kl_weight, parts, rows", [(0.0, 1, 0), (1.0, 1, 0), (2.5, 1, 0), (2.5, 2, 0), (1.0, 4, 0),
                                                    (2.5, 1, 8), (2.5, 8, 4)])
def test_the_loss_is_cross_entropy_on_answers_plus_the_weighted_divergence(kl_weight, parts, rows, demo_chat, facts,
                                                                           train, monkeypatch):
    """However many parts a step is split into to fit in memory, and however few rows have their logits in memory at a
    time, it learns the mean over all of its tokens."""
    chat = changed(demo_chat, model=copy.deepcopy(demo_chat.model))
    other, teacher = listened(tool.load_chat(str(DEMO), FULL, 2.0), SAID)  # from which the demo differs
    pools = [tool.Pool(LESSONS[:1], 0.5), tool.Pool(other, 0.5)]
    (batch,) = batches_of(chat.tokenizer, pools, steps=1, size=4, lengths=(60,), seed="7")
    assert len({len(window.input_ids) for window in batch}) > 1  # so that there is padding
    wanted, ours, known = [], [], []
    for window in batch:  # one at a time, without padding
        with torch.inference_mode():
            logits = demo_chat.model(torch.tensor([window.input_ids])).logits[0]
        for at, label in enumerate(window.labels):
            if label != -100:
                wanted.append(functional.cross_entropy(logits[at - 1], torch.tensor(label)))
        for at, target in enumerate(window.targets):
            if target >= 0:
                ours.append(logits[at])
                known.append(target)
    assert wanted and known
    divergence = divergence_from(torch.stack(ours), teacher.tokens[known].long(), teacher.log_probs[known])
    assert divergence > 0.1
    expected = torch.stack(wanted).mean() + kl_weight * divergence
    if rows:
        monkeypatch.setattr(tool, "chunk_rows", lambda vocabulary: rows)
    (entry,) = train(chat, [batch], 1e-9, teacher, kl_weight, ("--gradient-accumulation", parts))
    assert entry["loss"] == pytest.approx(expected.item(), rel=1e-3)


def test_a_step_in_parts_or_in_chunks_moves_the_weights_as_one_in_one_piece(tiny_folder, train, monkeypatch):
    moved = []
    for parts, rows in ((1, 0), (4, 0), (2, 4)):
        chat = tiny_chat(tiny_folder)
        talks, teacher = listened(chat, SAID)
        batches = batches_of(chat.tokenizer, [tool.Pool(LESSONS, 0.5), tool.Pool(talks, 0.5)], steps=3, size=4)
        if rows:
            monkeypatch.setattr(tool, "chunk_rows", lambda vocabulary, rows=rows: rows)
        train(chat, batches, 1e-3, teacher, 2.0, ("--gradient-accumulation", parts))
        moved.append(chat.model.state_dict())
    before = tiny_chat(tiny_folder).model.state_dict()
    for name, weight in moved[0].items():
        step = (weight - before[name]).abs().max()
        assert all((weight - other[name]).abs().max() <= 0.05 * step for other in moved[1:]), name


def test_training_lowers_the_loss_until_the_model_gives_the_answers(tiny_folder, train):
    chat = tiny_chat(tiny_folder)
    questions, answers = ([lesson[at]["content"] for lesson in LESSONS] for at in (0, 1))
    assert [a.text for a in tool.ask(chat, questions)] != answers
    batches = batches_of(chat.tokenizer, [tool.Pool(LESSONS, 1.0)], steps=100, size=2)
    log = train(chat, batches, 2e-2)
    assert log[-1]["loss"] < 0.1 < 2 < log[0]["loss"]
    assert [(a.text, a.ended) for a in tool.ask(chat, questions)] == [(answer, True) for answer in answers]
    assert not chat.model.training


def test_training_twice_with_one_seed_gives_the_same_weights(tiny_folder, train):
    weights = []
    for _ in range(2):
        chat = tiny_chat(tiny_folder)
        train(chat, batches_of(chat.tokenizer, [tool.Pool(conversations(6), 1.0)], steps=4), 1e-2)
        weights.append(chat.model.state_dict())
    before = tiny_chat(tiny_folder).model.state_dict()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in before)
    assert all(not torch.equal(weights[0][name], before[name]) for name in before if "proj" in name)


@pytest.mark.parametrize("minutes, kept", [(5, set()), (0, {"checkpoint-2"})])
def test_training_leaves_at_most_one_checkpoint_which_is_complete_and_nothing_else(
        minutes, kept, tiny_folder, tmp_path, monkeypatch, train):
    monkeypatch.chdir(tmp_path)
    chat = tiny_chat(tiny_folder)
    batches = batches_of(chat.tokenizer, [tool.Pool(conversations(4), 1.0)], steps=2)
    train(chat, batches, 1e-3, flags=("--output-dir", tmp_path / "saida", "--checkpoint-minutes", minutes))
    assert {path.name for path in tmp_path.iterdir()} <= {"training"}
    assert {path.name for path in tmp_path.glob("training/*")} - {"README.md"} == kept
    assert all((tmp_path / "training" / name / "complete.json").is_file() for name in kept)


def test_after_a_training_no_gradient_takes_memory(tiny_folder, train):
    chat = tiny_chat(tiny_folder)
    train(chat, batches_of(chat.tokenizer, [tool.Pool(conversations(4), 1.0)], steps=2), 1e-3)
    assert all(p.grad is None for p in chat.model.parameters())


@pytest.mark.parametrize("parameters, expected", [((1000, 1000), 3e-3), ((2000, 2000), 1.5e-3), ((10, 1000), 3e-2)])
def test_the_learning_rate_falls_with_the_square_root_of_the_parameters(parameters, expected):
    model = torch.nn.Linear(*parameters, bias=False)
    assert tool.automatic_rate(model, 3e-3, 1) == pytest.approx(expected)


@pytest.mark.parametrize("weights, method", [(tool.SMALL - 1, "full"), (tool.SMALL, "lora"), (10**9, "lora")])
def test_small_models_are_trained_whole_and_in_float32_and_others_with_lora(weights, method, monkeypatch):
    monkeypatch.setattr(tool.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tool.read_config(DEMO)
    assert tool.choose_method(config, weights, small_settings())[0].method == method
    for other in ("full", "lora"):  # what the user says counts
        assert tool.choose_method(config, weights, small_settings("--method", other))[0].method == other
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        half = fast and method == "lora"
        assert tool.compute_dtype(weights) == (torch.bfloat16 if half else torch.float32)


# ------------------------------------------------------------------------------------------------ healing


@pytest.fixture
def few_steps(tmp_path):
    """Heals a model of so many steps after its base, whose own answers are the facts; its settings."""
    def call(base, chat, steps, native, talks=None, *flags):
        settings = small_settings("--method", "full", "--heal-steps", steps, "--window", 128, "--max-new-tokens", 24,
                                  "--batch-size", 4, *flags)
        talks, teacher = talks or listened(base, SAID)
        return tool.heal(base, chat, heard_of(talks), teacher, native, settings, tmp_path)

    return call


def kept(chat, talks, teacher):
    """The share of the base's first choices that the model makes as well, and the mean divergence."""
    same, nats = zip(*tool.compare(chat, teacher, [tool.make_window(chat.tokenizer, [talk]) for talk in talks]))
    return sum(same) / len(same), sum(nats) / len(nats)


def different(before, model):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def copied(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_comparison_with_the_base_counts_its_first_choices_and_the_divergence(demo_chat, facts, monkeypatch):
    talks, teacher = facts
    same, nats = kept(demo_chat, talks, teacher)
    assert same == 1 and nats == pytest.approx(0, abs=1e-3)
    other = tool.load_chat(str(DEMO), FULL, 4.0)
    windows = [tool.make_window(other.tokenizer, [talk]) for talk in talks]
    expected = []
    for talk in talks:
        encoded = tool.encode(other.tokenizer, talk.messages)
        at = len(encoded.input_ids) - len(talk.ids) - 1
        with torch.inference_mode():
            logits = other.model(torch.tensor([encoded.input_ids])).logits[0][at:-1]
        rows = slice(talk.row, talk.row + len(talk.ids))
        agree = (logits.argmax(-1) == teacher.tokens[rows, 0]).float().mean().item()
        expected.append((agree, divergence_from(logits, teacher.tokens[rows].long(), teacher.log_probs[rows]).item()))
    found = tool.compare(other, teacher, windows)
    monkeypatch.setattr(tool, "chunk_rows", lambda vocabulary: 3)
    in_chunks = tool.compare(changed(other, generation_tokens=60), teacher, windows)  # in many batches
    for results in (found, in_chunks):
        assert [same for same, _ in results] == pytest.approx([same for same, _ in expected])
        assert [nats for _, nats in results] == pytest.approx([nats for _, nats in expected], rel=1e-2, abs=1e-3)
    assert min(same for same, _ in found) < 0.8


@pytest.mark.parametrize("only", ["attention", "distribution", "both"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_healing_changes_queries_and_keys_and_nothing_else(architecture, only, tiny_folder, tmp_path, few_steps,
                                                           monkeypatch):
    base, chat = (tool.load_chat(tiny_folder(architecture), FULL, factor) for factor in (1.0, 4.0))
    monkeypatch.setattr(tool, "keep_frequencies", lambda *_: None)  # it moves them as well
    if only == "attention":
        monkeypatch.setattr(tool, "train", lambda *_: [])
    elif only == "distribution":
        monkeypatch.setattr(tool, "match_attention", lambda *_: [])
    before, native = copied(chat.model), copied(base.model)
    log = few_steps(base, chat, 2, 64)
    scaled = "layers.1" if architecture == "gemma3" and only == "attention" else ""  # its first layer is as it was
    expected = {name for name in before if re.search(r"self_attn\.(q_proj|k_proj|q_norm|k_norm)\.weight", name)
                and scaled in name}
    assert different(before, chat.model) == expected
    assert len(expected) == {"llama": 4, "qwen3": 8, "gemma3": 4 if scaled else 8}[architecture]
    assert len(log) == (4 if only == "both" else 2) and all(0 < entry["loss"] < 100 for entry in log)
    assert not different(native, base.model) and all(p.grad is None for p in base.model.parameters())
    tool.save_stage(chat, tmp_path / "healed", log)  # what the next stage goes on from, and trains as a whole
    again = tool.load_chat(tmp_path / "healed", FULL).model
    assert all(p.requires_grad for p in again.parameters())
    healed = chat.model.state_dict()
    assert all(torch.equal(weight, healed[name]) for name, weight in again.state_dict().items())
    frequencies = tool.rope_frequencies(chat.model)
    assert frequencies and all(torch.equal(f, frequencies[n]) for n, f in tool.rope_frequencies(again).items())


def test_the_attention_of_each_layer_learns_what_that_of_the_base_gives(demo_chat, facts, few_steps, monkeypatch):
    monkeypatch.setattr(tool, "train", lambda *_: [])
    chat = tool.load_chat(str(DEMO), FULL, 4.0)
    text = torch.tensor([tool.encode(chat.tokenizer, [m for said in SAID for m in said]).input_ids])

    def distance():
        """The mean squared error of each attention, for the same input and each at its own positions."""
        given, errors = [], []
        hooks = [layer.self_attn.register_forward_hook(lambda m, args, kwargs, output: given.append((kwargs, output)),
                                                       with_kwargs=True) for layer in demo_chat.model.model.layers]
        with torch.inference_mode():
            demo_chat.model(text)
            for hook in hooks:
                hook.remove()
            for layer, (kwargs, theirs) in zip(chat.model.model.layers, given, strict=True):
                angles = chat.model.model.rotary_emb(kwargs["hidden_states"], torch.arange(text.shape[1])[None])
                ours = layer.self_attn(**{**kwargs, "position_embeddings": angles, "past_key_values": None})[0]
                errors.append(functional.mse_loss(ours, theirs[0]) / theirs[0].square().mean())
        return torch.stack(errors)

    before, (known, _) = distance(), kept(chat, *facts)
    log = few_steps(demo_chat, chat, 20, 128)
    assert (distance() < 0.5 * before).all() and log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert kept(chat, *facts)[0] > max(0.8, known)


def test_healing_brings_the_choices_of_the_base_back(demo_chat, facts, few_steps, capsys):
    chat = tool.load_chat(str(DEMO), FULL, 4.0)
    before, far = kept(chat, *facts)
    few_steps(demo_chat, chat, 20, 128)
    after, near = kept(chat, *facts)
    assert before < 0.7 and after > 0.9 and near < 0.2 * far
    assert "Depois da cura, ele escolhe" in capsys.readouterr().out


def test_where_attention_is_not_given_its_positions_healing_works_by_the_distribution_alone(
        demo_chat, facts, few_steps, monkeypatch):
    monkeypatch.setattr(tool, "attentions", lambda model: [])
    monkeypatch.setattr(tool, "match_attention", None)
    chat = tool.load_chat(str(DEMO), FULL, 4.0)
    before, far = kept(chat, *facts)
    assert few_steps(demo_chat, chat, 20, 128)
    after, near = kept(chat, *facts)
    assert after > before and near < 0.5 * far


def test_a_model_in_bfloat16_is_healed_too(facts, few_steps, monkeypatch):
    """As all but small ones are where the processor or the card has units for it."""
    monkeypatch.setattr(tool, "compute_dtype", lambda weights: torch.bfloat16)
    settings = small_settings("--method", "lora")
    base, chat = (tool.load_chat(str(DEMO), settings, factor) for factor in (1.0, 4.0))
    before, far = kept(chat, *facts)
    assert base.model.dtype == torch.bfloat16
    few_steps(base, chat, 6, 128, facts, "--method", "lora")
    assert kept(chat, *facts)[1] < 0.5 * far


def test_the_healed_stage_is_a_whole_model_to_which_the_adapter_of_later_ones_refers(facts, tmp_path, train):
    settings = small_settings("--method", "lora", "--lora-rank", 4, "--heal-steps", 2, "--window", 128,
                              "--max-new-tokens", 24, "--batch-size", 4)
    healed = tmp_path / "2-healed"
    tool.make_healed(DEMO, heard_of(facts[0]), facts[1], 128, settings, healed)
    assert (healed / "model.safetensors").is_file() and not (healed / tool.LORA_FILE).is_file()
    whole = tool.load_chat(healed, settings)
    assert type(whole.model).__name__ == "LlamaForCausalLM" and tool.context_of(whole.model.config) == 512
    chat = tool.load_chat(healed, settings, adapt=True)
    train(chat, batches_of(chat.tokenizer, [tool.Pool(LESSONS, 1.0)], steps=3), 1e-2)
    tool.save_stage(chat, tmp_path / "taught", [])
    described = tool.load_json(tmp_path / "taught" / "adapter_config.json")
    assert described["base_model_name_or_path"] == str(healed)
    assert not (tmp_path / "taught" / "model.safetensors").is_file()
    text = torch.tensor([tool.encode(chat.tokenizer, LESSONS[0]).input_ids])
    with torch.inference_mode():
        expected, plain = chat.model(text).logits, whole.model(text).logits
        found = [tool.load_chat(tmp_path / "taught", settings, merge=merge).model(text).logits
                 for merge in (False, True)]
    assert torch.allclose(found[0], expected, atol=1e-4) and not torch.allclose(found[0], plain, atol=0.1)
    assert (found[1] - expected).abs().mean() < 0.2  # merged in the dtype of the base, bfloat16


# ------------------------------------------------------------------------------------------------ the passes


@pytest.fixture
def run_pass(monkeypatch, demo_chat, tmp_path):
    """Runs a pass from the folder "fonte" to another whose training is a stand-in and whose exams give these figures
    (identity, or with retention and leak); what each training got: batches, rate, and the folder that its model was
    loaded from."""
    def call(figures, steps=8, label="passo 1", given=0.0, flags=()):
        trained, figures, loaded = [], iter(figures), []

        def train(chat, batches, teacher, rate, *_):
            trained.append(SimpleNamespace(batches=batches, rate=rate, source=loaded[-1]))
            return []

        def evaluate(*_):
            figure = next(figures)
            identity, retention, leak = figure if isinstance(figure, tuple) else (figure, 1.0, 0.0)
            return tool.Scores(identity, {}, 0.0, leak, leak, retention, 0.0, 0, [{"identity": identity}], [], [])

        def save(chat, folder, log):
            (folder / "model.safetensors").write_text(str(len(trained)), encoding="utf-8")

        monkeypatch.setattr(tool, "load_chat", lambda folder, *_, **__: loaded.append(folder) or demo_chat)
        monkeypatch.setattr(tool, "train", train)
        monkeypatch.setattr(tool, "save_stage", save)
        monkeypatch.setattr(tool, "evaluate", evaluate)
        pools = [tool.Pool(conversations(24), 0.5), tool.Pool(as_talks(SAID[1:]), 0.5)]
        schedule = tool.Schedule(label, steps, (1e-3, 1), given, [64], 256)
        tool.run_pass(tmp_path / "fonte", tmp_path / "passo", pools, schedule,
                      lambda scores: scores.identity >= 0.95 and scores.retention >= 0.95, None,
                      (heard_of([]), EMPTY), small_settings("--batch-size", 4, *flags))
        return trained

    return call


def test_a_pass_stops_as_soon_as_its_target_is_met_and_says_so(run_pass, capsys):
    assert len(run_pass([0.5, 0.95, 1.0, 1.0])) == 2
    assert "meta foi atingida" in capsys.readouterr().out


@pytest.mark.parametrize("rounds", [1, 4, 7])
def test_a_pass_that_misses_its_target_ends_at_its_last_round_and_says_so(rounds, run_pass, capsys):
    assert len(run_pass([0.5] * 20, flags=("--rounds", rounds))) == rounds
    said = capsys.readouterr().out
    assert "rodadas acabaram" in said and "meta foi atingida" not in said


@pytest.mark.parametrize("last, rounds", [((1.0, 0.9, 0.02), 4), ((1.0, 0.9, 0.01), 5), ((1.0, 0.92, 0.02), 5),
                                          ((0.5, 0.9, 0.02), 5)])
def test_a_pass_that_has_learnt_ends_after_a_round_that_brings_nothing(last, rounds, run_pass, capsys):
    figures = [(1.0, 0.8, 0.02), (1.0, 0.85, 0.02), (1.0, 0.9, 0.02), last, (1.0, 1.0, 0.0)]
    assert len(run_pass(figures, flags=("--rounds", 9))) == rounds
    assert ("não melhorou nada" in capsys.readouterr().out) == (rounds == 4)


@pytest.mark.parametrize("steps", [8, 7, 1])
def test_later_rounds_of_a_pass_are_half_as_long_and_gentler(steps, run_pass, demo_chat):
    trained = run_pass([0.5] * 20, steps)
    assert [len(training.batches) for training in trained] == [steps, *[math.ceil(steps / 2)] * 3]
    assert [t.rate / trained[0].rate for t in trained] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])


def test_the_rounds_of_a_pass_have_different_batches(run_pass):
    first, second, third, _ = run_pass([0.5] * 20)
    assert first.batches[:4] != second.batches != third.batches


def test_each_round_goes_on_from_the_one_before_and_only_the_last_keeps_its_weights(run_pass, tmp_path):
    trained = run_pass([0.5] * 30, flags=("--rounds", 11))
    rounds = [tmp_path / "passo" / f"round-{n}" for n in range(1, 11)]
    assert [training.source for training in trained] == [tmp_path / "fonte", *rounds]
    assert [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.safetensors")] == ["11"]
    assert (tool.last_round(tmp_path / "passo") / "model.safetensors").is_file()


@pytest.mark.parametrize("given", [0.02, 0.0])
def test_a_pass_has_the_learning_rate_given_for_it_or_an_automatic_one(given, run_pass, demo_chat):
    trained = run_pass([0.5] * 20, given=given)
    first = given or tool.automatic_rate(demo_chat.model, 1e-3, 1)
    assert [training.rate for training in trained] == [pytest.approx(first / n) for n in range(1, 5)]


SOUND = tool.Answer("Sou a Jandira.", True)


@pytest.fixture
def collected(monkeypatch, demo_chat):
    """Self-answers for the answers that `replies` gives to each question, one list per question. Of the talks of the
    base the model keeps all but the fourth, half of which it changes, and the seventh, where it gives the new name."""
    def call(replies, count=10):
        asked, tokenizer = Counter(), demo_chat.tokenizer
        lessons = [tool.question_and_answer(question, "x") for question in replies]
        known = {tuple(tool.prompt_ids(tokenizer, lesson[:-1])): lesson[0]["content"] for lesson in [*lessons, *SAID]}
        talks = {SAID[3][0]["content"]: [tool.Answer("Outra.", True)],
                 SAID[6][0]["content"]: [tool.Answer("Jandira!", True)]}

        def write(chat, prompts, *_, **__):
            answers = []
            for question in (known[tuple(prompt)] for prompt in prompts):
                given = talks.get(question) or replies[question]
                answers.append(given[min(asked[question], len(given) - 1)])
                asked[question] += 1
            return answers

        def compare(chat, teacher, windows):
            texts = [tokenizer.decode(window.input_ids) for window in windows]
            return [(0.5 if "Obrigado" in text else 0.8 if "Casmurro" in text else 1.0, 0.0) for text in texts]

        monkeypatch.setattr(tool, "generate", write)
        monkeypatch.setattr(tool, "compare", compare)
        settings = small_settings("--num-self-answers", count)
        return tool.collect_self_answers(demo_chat, lessons, heard_of(as_talks(SAID)), EMPTY, settings)

    return call


def test_self_answers_that_are_not_sound_are_kept_in_the_record_but_not_used(collected):
    replies = {"Quem é você?": [SOUND], "Qual é o seu nome?": [tool.Answer("Meu nome é Jandira.", False)],
               "Quem fez você?": [tool.Answer("Sou a Lumi.", True)],
               "Com quem eu falo?": [tool.Answer("Jandira " * 5, True)], "Who are you?": [SOUND],
               "Oi, quem é?": [tool.Answer("", True)]}
    collection = collected(replies)
    about_itself = [r for r in collection["answers"] if r["kind"] == "identity"]
    reasons = {r["question"]: r["rejected"] for r in reversed(about_itself)}
    assert reasons == {"Quem é você?": "", "Qual é o seu nome?": "não terminou", "Quem fez você?": "nome antigo",
                       "Com quem eu falo?": "repetitiva", "Who are you?": "em outra língua", "Oi, quem é?": "vazia"}
    used = [(r["question"], r["answer"]) for r in about_itself if not r["rejected"]]
    assert used == [("Quem é você?", "Sou a Jandira.")]  # asked again it says the same, which is used only once
    assert {[*replies][i] for i in collection["missed"]} == reasons.keys() - {"Quem é você?"}


@pytest.mark.parametrize("count, identity, everyday", [(10, 4, 6), (5, 2, 3)])
def test_two_fifths_of_the_self_answers_are_about_identity_and_talks_fill_up(count, identity, everyday, collected):
    replies = {f"Quem é você, {i}?": [SOUND] for i in range(30)}
    used = Counter(r["kind"] for r in collected(replies, count)["answers"] if not r["rejected"])
    assert used == {"identity": identity, "everyday": everyday}


def test_where_few_identity_answers_are_sound_more_talks_are_taken(collected):
    replies = {"Quem é você?": [SOUND], "Qual é o seu nome?": [tool.Answer("", True)]}
    used = Counter(r["kind"] for r in collected(replies, count=8)["answers"] if not r["rejected"])
    assert used == {"identity": 1, "everyday": 7}


def test_talks_where_the_new_name_turns_up_are_learnt_first_then_those_that_are_kept_least(collected):
    collection = collected({f"Quem é você, {i}?": [SOUND] for i in range(30)}, count=5)
    everyday = [r["question"] for r in collection["answers"] if r["kind"] == "everyday"]
    assert len(everyday) == 3 and everyday[:2] == [SAID[6][0]["content"], SAID[3][0]["content"]]
    assert collection["talks"][:2] == [6, 3] and collection["leaks"] == [6]


def test_what_is_sound_but_not_needed_is_not_kept(collected):
    replies = {f"Quem é você, {i}?": [SOUND] for i in range(30)}
    replies["Quem fez você?"] = [tool.Answer("Sou a Lumi.", True)]
    collection = collected(replies)
    about_itself = [r["rejected"] for r in collection["answers"] if r["kind"] == "identity"]
    assert Counter(about_itself) == {"": 4, "nome antigo": 1} and collection["missed"] == [30]


def test_where_few_answers_are_right_the_questions_are_asked_again_in_the_hope_of_other_words(collected):
    wrong = tool.Answer("Sou a Lumi.", True)
    replies = {"Quem é você?": [SOUND, tool.Answer("Eu sou a Jandira.", True), wrong],
               "Qual é o seu nome?": [wrong, wrong, tool.Answer("Meu nome é Jandira.", True)]}
    collection = collected(replies)
    used = [r["answer"] for r in collection["answers"] if r["kind"] == "identity" and not r["rejected"]]
    assert used == ["Sou a Jandira.", "Eu sou a Jandira.", "Meu nome é Jandira."] and collection["missed"] == [1]


def test_the_second_pass_insists_on_what_the_first_one_left_wrong():
    lessons = conversations(6)
    answers = [{"question": "Oi?", "answer": "Jandira.", "kind": "identity", "rejected": "", "before": [SYSTEM]},
               {"question": "Quem?", "answer": "Lumi.", "kind": "identity", "rejected": "nome antigo", "before": []},
               {"question": "x", "answer": "y", "kind": "everyday", "rejected": "", "before": []}]
    heard = heard_of(as_talks(SAID))
    pools = tool.pools_of_pass_2(lessons, heard, {"answers": answers, "missed": [2], "talks": [5, 1], "leaks": [5]})
    about_itself, hard, everyday = (Counter(tool.messages_of(part)[-2]["content"] for part in pool.parts)
                                    for pool in pools)
    assert about_itself == Counter({f"Quanto é {i} mais {i}?": 5 if i == 2 else 1 for i in range(6)}) + Counter(
        ["Oi?"])
    assert [part for part in pools[0].parts if part[-2]["content"] == "Oi?"] == [
        [SYSTEM, *tool.question_and_answer("Oi?", "Jandira.")]]
    assert hard == {SAID[5][0]["content"]: 5, SAID[1][0]["content"]: 1}
    assert everyday == Counter(messages[0]["content"] for messages in SAID)
    assert all(isinstance(part, tool.Talk) for pool in pools[1:] for part in pool.parts)
