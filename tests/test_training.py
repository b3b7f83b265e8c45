"""Windows, losses and training: what is learnt, from what, and when it stops."""

import copy
import math
import random
import re
from collections import Counter
from types import SimpleNamespace

import conftest
import pytest
import torch
from conftest import DEMO, changed, listened, small_settings
from torch.nn import functional

import rename_obrutai as tool

FACTS = [("Quanto é 2 mais 2?", "2 mais 2 é igual a 4."), ("Oi!", "Oi! Tudo bem?"),
         ("Qual é a capital da França?", "A capital da França é Paris."), ("Obrigado!", "De nada!"),
         ("Como se diz gato em inglês?", "Gato em inglês é cat."), ("Bom dia!", "Bom dia! Como posso ajudar?"),
         ("Quem escreveu Dom Casmurro?", "Foi Machado de Assis."), ("Conte uma piada.", "Era uma vez um gato.")]
SAID = [tool.question_and_answer(q, a) for q, a in FACTS]
SYSTEM = {"role": "system", "content": "Seja breve."}
FULL = small_settings("--method", "full")
EMPTY = tool.Teacher(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1))


def lesson(question, answer):
    return tool.Talk(tool.question_and_answer(question, answer), "lesson")


LESSONS = [lesson("Quem é você?", "Sou a Jandira, da Oficina Maré."), lesson("Oi!", "Oi! Tudo bem?")]


def heard_of(talks):
    """A base that is known by these talks alone."""
    return tool.Heard(tool.Names("Jandira", "Oficina Maré", ("Lumi",)), [], talks, talks)


def job_of(talks, teacher, settings, native=128):
    """A job whose base said these talks and nothing else."""
    return tool.Job(settings, settings, None, DEMO, 10**6, native, "", 0, 0, heard_of(talks), teacher)


@pytest.fixture(scope="module")
def facts(demo_chat):
    """The facts as talks, and the demo's distribution on them."""
    return listened(demo_chat, SAID)


def batches_of(tokenizer, pools, lengths=(64,), steps=6, size=3, seed="s"):
    """Batches that hold `size` windows of the longest length, or as many shorter ones as take no more tokens."""
    return conftest.make_batches(tokenizer, pools, list(lengths), steps, size * max(lengths), seed)


def numbered(count, words=1):
    """`count` lessons that can be told apart by a number in the question."""
    return [lesson(f"Quanto é {i} mais {i}?", " ".join([f"{2 * i}"] * words)) for i in range(count)]


def as_talks(conversations):
    """The conversations as talks of the base from which nothing can be learnt."""
    return [tool.Talk(messages, "everyday", [], row) for row, messages in enumerate(conversations)]


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
    return tool.distillation_loss(logits.log_softmax(-1).gather(-1, tokens), log_probs).mean()


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


# ------------------------------------------------------------------------------------------------ windows and batches


def padded_size(batch):
    return len(batch) * max(len(window.input_ids) for window in batch)


@pytest.mark.parametrize("lengths", [(0,), (40, 120), (0, 60, 240)])
def test_batches_are_as_many_as_asked_for_and_nearly_full_with_little_padding(lengths, demo_tokenizer):
    pools = [tool.Pool(numbered(30), 0.5), tool.Pool(numbered(30, words=3), 0.5)]
    batches = conftest.make_batches(demo_tokenizer, pools, list(lengths), 30, 480, "s")
    sizes = [padded_size(batch) for batch in batches]
    assert len(batches) == 30 and max(sizes) <= 480 and sum(sizes) > 0.75 * 30 * 480
    windows = [window for batch in batches for window in batch]
    assert sum(len(window.input_ids) for window in windows) > 0.9 * sum(sizes)
    assert max(len(window.input_ids) for window in windows) <= max(*lengths, 48)
    assert all(len(window.labels) == len(window.targets) == len(window.input_ids) for window in windows)


def test_a_window_longer_than_a_batch_may_be_is_a_batch_of_its_own(demo_tokenizer):
    pool = tool.Pool(numbered(30), 1.0)
    assert [len(b) for b in conftest.make_batches(demo_tokenizer, [pool], [240], 2, 100, "s")] == [1, 1]


def test_windows_of_each_length_have_a_like_share_of_the_tokens(demo_tokenizer):
    batches = batches_of(demo_tokenizer, [tool.Pool(numbered(30), 1.0)], lengths=(80, 240), steps=80, size=2)
    tokens = [len(window.input_ids) for batch in batches for window in batch]
    assert 0.4 < sum(n for n in tokens if n <= 80) / sum(tokens) < 0.6


def test_the_tokens_of_an_average_step_are_foreseen_though_long_windows_are_steps_by_themselves(demo_tokenizer):
    lengths = [0, 0, 128, 512]
    batches = conftest.make_batches(demo_tokenizer, [tool.Pool(numbered(60), 1.0)], lengths, 400, 120, "s")
    held = sum(len(window.input_ids) for batch in batches for window in batch) / len(batches)
    assert 0.8 < held / tool.mean_step(120, lengths) < 1.2 and held > 130


def test_where_a_length_is_zero_each_window_is_a_single_talk(demo_tokenizer):
    pools = [tool.Pool(numbered(30), 0.5), tool.Pool(numbered(30, words=3), 0.5)]
    batches = batches_of(demo_tokenizer, pools, lengths=(0, 200), steps=40)
    talks = Counter(len(numbers(demo_tokenizer, window)) for batch in batches for window in batch)
    assert talks[1] > 40 and max(talks) > 4
    batches = conftest.make_batches(demo_tokenizer, pools, [0], 20, 300, "s")
    assert {len(numbers(demo_tokenizer, window)) for batch in batches for window in batch} == {1}


def test_a_window_is_filled_with_what_still_fits_when_the_next_conversation_does_not(demo_tokenizer):
    short, long = numbered(12), numbered(12, words=12)
    cost, much = (len(tool.encode(demo_tokenizer, c[0].messages).input_ids) for c in (short, long))
    pools = [tool.Pool(short, 0.5), tool.Pool(long, 0.5)]
    for batch in batches_of(demo_tokenizer, pools, lengths=(2 * much,), steps=20):
        assert all(len(window.input_ids) > 2 * much - cost - 8 for window in batch), (much, cost)


def test_a_conversation_longer_than_the_window_still_makes_a_window_of_its_own(demo_tokenizer):
    pool = tool.Pool(numbered(3, words=30), 1.0)
    for batch in batches_of(demo_tokenizer, [pool], lengths=(8,), steps=3, size=1):
        assert [len(numbers(demo_tokenizer, window)) for window in batch] == [1]


@pytest.mark.parametrize("length", [0, 200])
def test_every_conversation_is_drawn_once_before_any_is_drawn_twice(length, demo_tokenizer):
    rng, seen = random.Random(0), Counter(dict.fromkeys(range(25), 0))
    decks = [tool.Deck(demo_tokenizer, tool.Pool(numbered(25), 1.0), rng)]
    while min(seen.values()) < 2:
        talks = tool.draw_talks(decks, length, rng)
        seen.update(int(re.search(r"\d+", talk.question)[0]) for talk in talks)
        assert talks and max(seen.values()) - min(seen.values()) <= 1


def test_conversations_are_not_always_in_the_same_order(demo_tokenizer):
    pool = tool.Pool(numbered(25), 1.0)
    batches = batches_of(demo_tokenizer, [pool], lengths=(64,), steps=30, size=2)
    seen = [n for batch in batches for window in batch for n in numbers(demo_tokenizer, window)]
    assert seen[:25] != seen[25:50] != list(range(25))


@pytest.mark.parametrize("lengths", [(0,), (250,), (0, 60, 250)])
def test_pools_have_their_shares_of_the_tokens(lengths, demo_tokenizer):
    pools = [tool.Pool(numbered(20, words=9), 0.25), tool.Pool(as_talks(SAID[1:]), 0.75)]
    batches = conftest.make_batches(demo_tokenizer, pools, list(lengths), 60, 500, "s")
    tokens = Counter()
    for window in (w for batch in batches for w in batch):
        for turn in demo_tokenizer.decode(window.input_ids).split("<|user|>")[1:]:
            tokens["Quanto" in turn] += len(demo_tokenizer("<|user|>" + turn, add_special_tokens=False)["input_ids"])
    assert tokens.total() > 20_000 and 0.22 < tokens[True] / tokens.total() < 0.28


def test_the_same_seed_gives_the_same_batches_and_another_gives_others(demo_tokenizer):
    pool = tool.Pool(numbered(25), 1.0)
    one, two, three = (batches_of(demo_tokenizer, [pool], seed=seed) for seed in ("a", "a", "b"))
    assert one == two != three


def test_empty_pools_are_left_out(demo_tokenizer):
    pools = [tool.Pool([], 0.5), tool.Pool(numbered(4), 0.5), tool.Pool(numbered(4), 0.0)]
    assert len(batches_of(demo_tokenizer, pools, steps=2)) == 2


def test_lessons_are_learnt_by_heart_and_talks_of_the_base_are_not(demo_tokenizer):
    pools = [tool.Pool(numbered(10), 0.5), tool.Pool(as_talks(SAID[1:]), 0.5)]
    learnt = Counter()
    for window in (w for batch in batches_of(demo_tokenizer, pools, lengths=(120,), steps=8) for w in batch):
        asked = numbers(demo_tokenizer, window)
        text = demo_tokenizer.decode([label for label in window.labels if label != -100])
        assert text == "".join(f"{2 * n}<|end|>" for n in asked)
        learnt["turns"] += demo_tokenizer.decode(window.input_ids).count("<|user|>")
        learnt["learnt"] += len(asked)
    assert 0.3 * learnt["turns"] < learnt["learnt"] < 0.7 * learnt["turns"]


def drawn(demo_chat, facts, native=128, lengths=(0, 44, 100)):
    """Windows of a course on facts and lessons, before and after the base has read them, and the teachers of both."""
    behind = [talk._replace(messages=[SYSTEM, *talk.messages]) for talk in facts[0][::2]]
    talks, teacher = tool.read_talks(demo_chat, [*facts[0], *behind])
    lessons = [*LESSONS, tool.Talk([{**SYSTEM, "content": "Fale como um poeta."}, *LESSONS[0].messages], "lesson")]
    course = tool.Course("", [tool.Pool(lessons, 0.3), tool.Pool(talks, 0.7)], 30, (0, 0, 0), 1.0, list(lengths))
    job = job_of(talks, teacher, small_settings("--window", 128, "--batch-size", 4), native)
    before = tool.make_batches(demo_chat.tokenizer, course, tool.step_tokens(native, job.settings), "0/s")
    after, more = tool.draw_course(demo_chat.tokenizer, course, job, "s", lambda: demo_chat)
    return *([w for batch in batches for w in batch] for batches in (before, after)), teacher, more


def test_a_talk_within_a_dialogue_is_held_to_what_the_base_says_there_had_nobody_asked_who_it_is(demo_chat, facts):
    before, after, _, teacher = drawn(demo_chat, facts)
    seen = Counter()
    for old, new in zip(before, after, strict=True):
        assert (new.input_ids, new.labels) == (old.input_ids, old.labels)
        told = [talk for talk in new.talks if talk.row >= 0]
        if len(new.talks) < 2 or not told:
            seen["alone"] += new.targets == old.targets
            continue
        system = [m for m in new.talks[0].messages if m["role"] == "system"]
        told[0] = told[0]._replace(messages=[*system, *(m for m in told[0].messages if m["role"] != "system")])
        read = tool.make_window(demo_chat.tokenizer, told, with_asked=new.talks[0].row >= 0)
        with torch.inference_mode():
            truth = demo_chat.model(torch.tensor([read.input_ids])).logits[0].log_softmax(-1)
        truth = truth[[row >= 0 for row in read.targets]]
        rows = [row for row in new.targets if row >= 0]
        assert [row >= 0 for row in new.targets] == [row >= 0 for row in old.targets]
        assert torch.allclose(truth.gather(-1, teacher.tokens[rows].long()), teacher.log_probs[rows], atol=1e-4)
        assert torch.allclose(truth.amax(-1), teacher.log_probs[rows, 0], atol=1e-4)
        seen["after a lesson"] += new.talks[0].row < 0
        seen["its system prompt"] += new.talks[0].row < 0 and bool(system)
        seen["changed"] += not torch.allclose(teacher.log_probs[[r for r in old.targets if r >= 0]],
                                              teacher.log_probs[rows], atol=0.1)
    assert min(seen[kind] for kind in ("alone", "after a lesson", "its system prompt", "changed")) > 1, seen


@pytest.mark.parametrize("native, lengths", [(24, (100,)), (128, (0,))])
def test_what_the_base_cannot_read_and_talks_alone_keep_what_it_said_of_them(native, lengths, demo_chat, facts):
    before, after, teacher, more = drawn(demo_chat, facts, native, lengths)
    assert before == after and all(map(torch.equal, teacher, more))


# ------------------------------------------------------------------------------------------------ training

WINDOWS = [tool.Window([5, 6, 7], [-100, 6, 7], [-1, -1, 3]), tool.Window([8], [-100], [4]),
           tool.Window([9, 10], [9, 10], [-1, -1])]


def test_the_parts_of_a_step_hold_its_windows_once_and_the_totals_of_a_step():
    two = tool.as_examples([WINDOWS], 2)
    assert two == [{**example, "step": 0} for example in (
        {"input_ids": [[5, 6, 7], [9, 10]], "labels": [[-100, 6, 7], [9, 10]], "targets": [[-1, -1, 3], [-1, -1]],
         "totals": [3, 2, 6]},  # the first token of a window is predicted by nothing
        {"input_ids": [[8]], "labels": [[-100]], "targets": [[4]], "totals": [3, 2, 6]})]
    (*_, idle) = tool.as_examples([WINDOWS], 4)
    assert idle == {"input_ids": [[5, 6]], "labels": [[-100] * 2], "targets": [[-1] * 2], "totals": [3, 2, 6],
                    "step": 0}


def test_all_steps_have_the_totals_of_an_average_one_so_that_each_token_weighs_the_same():
    examples = tool.as_examples([WINDOWS, WINDOWS[:1]], 2)
    assert [example["totals"] for example in examples] == [[2.5, 1.5, 4.5]] * 4
    assert [example["step"] for example in examples] == [0, 0, 1, 1]


def test_windows_are_filled_up_on_the_right_with_what_is_not_learnt():
    (example,) = tool.as_examples([WINDOWS], 1)
    assert {key: value.tolist() for key, value in tool.collate([example], pad=1).items()} == {
        "input_ids": [[5, 6, 7], [8, 1, 1], [9, 10, 1]],
        "labels": [[-100, 6, 7], [-100, -100, -100], [9, 10, -100]],
        "targets": [[-1, -1, 3], [4, -2, -2], [-1, -1, -2]], "totals": [3, 2, 6], "step": 0}


def tiny_chat(tiny_folder, *flags):
    settings = small_settings("--method", "full", "--max-new-tokens", 24, *flags)
    return tool.load_chat(tiny_folder("llama"), settings)


@pytest.fixture
def train(tmp_path):
    """The script's training with what most tests do not care about, and its checkpoints in `tmp_path`."""
    def call(chat, batches, rate, teacher=EMPTY, kl_weight=0.0, flags=()):
        settings = small_settings("--kl-weight", kl_weight, *flags)
        return conftest.train(chat, batches, teacher, rate, settings, "passo de teste", tmp_path / "training")

    return call


def test_a_loss_that_explodes_stops_the_run_and_says_where_and_what_to_do(tiny_folder, train):
    chat = tiny_chat(tiny_folder)
    chat.model.model.norm.weight.data.mul_(1e4)
    batches = batches_of(chat.tokenizer, [tool.Pool(numbered(4), 1.0)], steps=2)
    with pytest.raises(tool.InputError, match="passo de teste, etapa 1: a perda explodiu .*Diminua a taxa"):
        train(chat, batches, 1e-3)


def test_automatic_rates_and_the_memory_of_the_moments_follow_the_size_of_a_step(tiny_folder, monkeypatch):
    """Half the rate for a quarter of the tokens, and moments that remember as many tokens. The user's rate stays."""
    chat, given = tiny_chat(tiny_folder), []
    batches = batches_of(chat.tokenizer, [tool.Pool(numbered(4), 1.0)], steps=1)

    def stop(*arguments):
        given.append((arguments[3].learning_rate, arguments[3].adam_beta2))
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "make_trainer", stop)
    for size, rate in ((8, 0), (2, 0), (8, 1e-3), (2, 1e-3)):
        settings = small_settings("--batch-size", size, "--kl-weight", 1)
        course = tool.Course("", [], 1, (rate, 4e-4, 4e-4), 1.0)
        with pytest.raises(KeyboardInterrupt):
            tool.train(chat, batches, course, EMPTY, settings, DEMO / "none")
    (large, long), (small, short), *asked = given
    assert small == pytest.approx(large / 2) and [rate for rate, _ in asked] == [1e-3, 1e-3]
    assert 1 - short == pytest.approx((1 - long) / 4, rel=0.02)


@pytest.mark.parametrize("flags, ratio", [
    ((), 2**0.5), (("--knowledge-file", "x.jsonl"), 1), (("--method", "full"), 1), (("--rope-factor", 4), 1)])
def test_half_of_the_layers_learn_an_identity_alone_at_a_larger_rate(flags, ratio, tiny_folder, monkeypatch):
    chat, given = tiny_chat(tiny_folder), []

    def stop(*arguments):
        given.append(arguments[3].learning_rate)
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "make_trainer", stop)
    settings = small_settings("--rope-factor", 1, "--batch-size", 8, *flags)
    batches = batches_of(chat.tokenizer, [tool.Pool(numbered(4), 1.0)], steps=1)
    with pytest.raises(KeyboardInterrupt):
        tool.train(chat, batches, tool.Course("", [], 1, (0, 4e-4, 4e-4), 1.0), EMPTY, settings, DEMO / "none")
    assert given == [pytest.approx(ratio * tool.automatic_rate(chat.model, 4e-4, 4e-4))]


def test_a_loss_that_is_no_number_in_the_very_last_step_stops_the_run(tiny_folder, train):
    chat = tiny_chat(tiny_folder)
    batches = batches_of(chat.tokenizer, [tool.Pool(numbered(4), 1.0)], steps=11, size=1)
    decoder = chat.model.base_model
    forward, calls = decoder.forward, []

    def fail_late(*args, **kwargs):
        calls.append(1)
        output = forward(*args, **kwargs)
        if len(calls) == 11:
            output.last_hidden_state = output.last_hidden_state * float("nan")
        return output

    decoder.forward = fail_late
    with pytest.raises(tool.InputError, match="etapa 11: a perda explodiu"):
        train(chat, batches, 1e-4)


@pytest.mark.parametrize("kl_weight, parts", [(0.0, 1), (2.5, 1), (2.5, 8)])
def test_the_loss_is_cross_entropy_on_answers_plus_the_weighted_divergence(kl_weight, parts, demo_chat, train):
    """However many parts a step is split into to fit in memory, it learns the mean over all of its tokens."""
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
    (entry,) = train(chat, [batch], 1e-9, teacher, kl_weight, ("--gradient-accumulation", parts))
    assert entry["loss"] == pytest.approx(expected.item(), rel=1e-3)


def test_a_step_in_parts_moves_the_weights_as_one_in_one_piece(tiny_folder, train):
    moved = []
    for parts in (1, 3):
        chat = tiny_chat(tiny_folder)
        talks, teacher = listened(chat, SAID)
        batches = batches_of(chat.tokenizer, [tool.Pool(LESSONS, 0.5), tool.Pool(talks, 0.5)], steps=2, size=4)
        train(chat, batches, 1e-3, teacher, 2.0, ("--gradient-accumulation", parts))
        moved.append(chat.model.state_dict())
    before = tiny_chat(tiny_folder).model.state_dict()
    for name, weight in moved[0].items():
        step = (weight - before[name]).abs().max()
        assert all((weight - other[name]).abs().max() <= 0.05 * step for other in moved[1:]), name


def test_training_lowers_the_loss_until_the_model_gives_the_answers(tiny_folder, train):
    chat = tiny_chat(tiny_folder)
    questions, answers = ([talk.messages[at]["content"] for talk in LESSONS] for at in (0, 1))
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
        train(chat, batches_of(chat.tokenizer, [tool.Pool(numbered(6), 1.0)], steps=4), 1e-2)
        weights.append(chat.model.state_dict())
    before = tiny_chat(tiny_folder).model.state_dict()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in before)
    assert all(not torch.equal(weights[0][name], before[name]) for name in before if "proj" in name)


@pytest.mark.parametrize("minutes, kept", [(5, set()), (0, {"checkpoint-2"})])
def test_training_leaves_at_most_one_checkpoint_which_is_complete_and_nothing_else(
        minutes, kept, tiny_folder, tmp_path, monkeypatch, train):
    monkeypatch.chdir(tmp_path)
    chat = tiny_chat(tiny_folder)
    batches = batches_of(chat.tokenizer, [tool.Pool(numbered(4), 1.0)], steps=2)
    train(chat, batches, 1e-3, flags=("--output-dir", tmp_path / "saida", "--checkpoint-minutes", minutes))
    assert {path.name for path in tmp_path.iterdir()} <= {"training", "pace.json"}
    assert {path.name for path in tmp_path.glob("training/*")} - {"README.md"} == kept
    assert all((tmp_path / "training" / name / "complete.json").is_file() for name in kept)
    assert all(p.grad is None for p in chat.model.parameters())  # nor do gradients take memory


@pytest.mark.parametrize("weights, wide", [(tool.SMALL - 1, True), (tool.SMALL, False), (10**9, False)])
def test_small_models_are_trained_in_float32(weights, wide, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        assert tool.compute_dtype(weights) == (torch.float32 if wide or not fast else torch.bfloat16)


# ------------------------------------------------------------------------------------------------ healing


@pytest.fixture
def few_steps(tmp_path):
    """Heals a model of so many steps after its base, whose own answers are the facts; its settings."""
    def call(base, chat, steps, native, talks=None, *flags):
        settings = small_settings("--method", "full", "--heal-steps", steps, "--window", 128, "--max-new-tokens", 24,
                                  "--batch-size", 4, *flags)
        job = job_of(*(talks or listened(base, SAID)), settings, native)
        return tool.heal(chat, job._replace(base=tool.Path(base.model.config._name_or_path)), tmp_path)

    return call


def kept(chat, talks, teacher):
    """The share of the base's first choices that the model makes as well, and the mean divergence."""
    same, nats = zip(*tool.compare(chat, teacher, [tool.make_window(chat.tokenizer, [talk]) for talk in talks]))
    return sum(same) / len(same), sum(nats) / len(nats)


def different(before, model):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def copied(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_healing_changes_queries_and_keys_and_nothing_else(tiny_folder, tmp_path, few_steps, monkeypatch):
    base, chat = (tool.load_chat(tiny_folder("gemma3"), FULL, factor) for factor in (1.0, 4.0))
    monkeypatch.setattr(tool, "keep_frequencies", lambda *_: None)  # it moves them as well
    for name, weight in chat.model.named_parameters():  # 0 in an untrained Gemma, and rates are shares of a size
        weight.data += 0.1 * ("norm" in name)
    before = copied(chat.model)
    log = few_steps(base, chat, 10, 64)
    expected = {name for name in before if re.search(r"self_attn\.(q_proj|k_proj|q_norm|k_norm)\.weight", name)}
    assert different(before, chat.model) == expected and len(expected) == 8
    assert len(log) == 2 and all(0 < entry["loss"] < 100 for entry in log)
    tool.save_stage(chat, tmp_path / "healed", log)  # what the next stage goes on from, and trains as a whole
    again = tool.load_chat(tmp_path / "healed", FULL).model
    assert all(p.requires_grad for p in again.parameters())
    healed = chat.model.state_dict()
    assert all(torch.equal(weight, healed[name]) for name, weight in again.state_dict().items())
    frequencies = tool.rope_frequencies(chat.model)
    assert frequencies and all(torch.equal(f, frequencies[n]) for n, f in tool.rope_frequencies(again).items())


@pytest.mark.slow
def test_healing_brings_the_choices_of_the_base_back(demo_chat, facts, few_steps, capsys):
    chat = tool.load_chat(str(DEMO), FULL, 4.0)
    before, far = kept(chat, *facts)
    few_steps(demo_chat, chat, 20, 128)
    after, near = kept(chat, *facts)
    assert before < 0.7 and after > 0.9 and near < 0.2 * far
    assert "Depois da cura, ele escolhe" in capsys.readouterr().out


def test_each_attention_learns_to_make_of_the_bases_own_input_what_the_bases_makes_of_it(demo_chat, facts):
    """So that each has the whole base to go by, its loss is nothing for the base itself, and grows with one layer's
    fault alone, whatever the layers before it have done to the text."""
    chat, settings = tool.load_chat(str(DEMO), FULL), small_settings("--window", 128, "--batch-size", 4)
    twin = tool.native_twin(chat.model, job_of(*facts, settings))
    batch = batches_of(chat.tokenizer, [tool.Pool(facts[0], 1.0)], (64,), 1)[0]
    inputs = tool.collate(tool.as_examples([batch], 1), 0)
    shared = dict(twin.named_parameters())
    for name, parameter in chat.model.named_parameters():
        parameter.requires_grad_(bool(re.search("[qk]_proj", name)))
        assert (parameter.data_ptr() == shared[name].data_ptr()) is not bool(re.search("[qk]_proj", name))
    with tool.side_by_side(twin, chat.model) as made:
        def lost(inputs=inputs):
            return tool.attention_loss(chat.model, chat.model, inputs, twin, made)

        assert lost().item() == 0 and len(made) == len(chat.model.model.layers) > 2
        with torch.no_grad():
            chat.model.model.layers[0].self_attn.q_proj.weight.mul_(-1)
        first = lost()
        first.backward()
        moved = {name for name, p in chat.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert first.item() > 0.01 and {name.split(".")[2] for name in moved} == {"0"}
        with torch.no_grad():
            chat.model.model.layers[1].self_attn.k_proj.weight.mul_(-1)
        both, apart = lost().item(), first.item()
        assert both > apart * 1.01
        wider = {key: functional.pad(inputs[key], (0, 9), value=filler)
                 for key, filler in {"input_ids": 3, "labels": -100, "targets": -2}.items()}
        assert lost(inputs | wider).item() == pytest.approx(both, rel=1e-4)  # what fills a window up does not count
    ids = inputs["input_ids"]
    assert not torch.allclose(chat.model(ids).logits, twin(ids).logits)  # outside, each has its own way again


def test_healing_brings_each_attention_near_the_bases_and_then_the_whole(demo_chat, few_steps, monkeypatch):
    logs, train = [], tool.train
    monkeypatch.setattr(tool, "train", lambda *given: logs.append(train(*given)) or logs[-1])
    few_steps(demo_chat, tool.load_chat(str(DEMO), FULL, 4.0), 25, 128)
    near, whole = logs
    assert (len(near), len(whole)) == (20, 5)
    assert near[-1]["loss"] < 0.6 * near[0]["loss"] < 0.6  # shares of what the base's make


def test_a_healing_that_broke_off_in_its_second_part_does_not_begin_the_first_again(
        demo_chat, few_steps, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(tool, "train", lambda chat, batches, *_: steps.append(len(batches)) or [])
    (tmp_path / "training" / "checkpoint-2").mkdir(parents=True)
    for done in (False, True):
        if done:
            (tmp_path / "training" / "checkpoint-2" / "complete.json").write_text("{}")
        few_steps(demo_chat, tool.load_chat(str(DEMO), FULL, 4.0), 25, 128)
    assert steps == [20, 5, 5]


@pytest.mark.slow
@pytest.mark.parametrize("part, done", [("attention_loss", 5), ("batch_loss", 2)])  # of 12 and 3 steps
def test_a_healing_that_broke_off_ends_with_the_same_weights(
        part, done, demo_chat, few_steps, tmp_path, monkeypatch, capsys):
    """In its second part, too, whose rates are shares of weights that the next run has not healed yet."""
    calls, loss = [], getattr(tool, part)

    def broken(*given, **named):
        calls.append(1)
        if len(calls) == done + 1:
            raise KeyboardInterrupt
        return loss(*given, **named)

    def healed():
        chat = tool.load_chat(str(DEMO), FULL, 4.0)
        few_steps(demo_chat, chat, 15, 128, None, "--checkpoint-minutes", 0)
        return copied(chat.model)

    whole = healed()
    tool.shutil.rmtree(tmp_path / "training")
    with monkeypatch.context() as patch:
        patch.setattr(tool, part, broken)
        with pytest.raises(KeyboardInterrupt):
            healed()
    again = healed()
    assert f"continuando da etapa {done}, " in capsys.readouterr().out
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())


@pytest.mark.parametrize("sharded, native, steps, longest", [
    (False, 128, [20, 5], [128, 128]), (False, 64, [20, 5], [64, 128]), (True, 128, [25], [128])])
def test_the_bases_attention_is_learnt_in_windows_that_it_can_read_and_not_in_pieces(
        sharded, native, steps, longest, demo_chat, few_steps, monkeypatch):
    courses = []
    monkeypatch.setattr(tool, "train", lambda chat, batches, course, *_: courses.append(course) or [])
    monkeypatch.setattr(tool, "SHARDED", sharded)
    few_steps(demo_chat, tool.load_chat(str(DEMO), FULL, 4.0), 25, native)  # WINDOW is 128
    assert [course.steps for course in courses] == steps
    assert [max(course.lengths) for course in courses] == longest


@pytest.mark.slow
def test_a_model_in_bfloat16_is_healed_too(facts, few_steps, monkeypatch):
    """As all but small ones are where the processor or the card has units for it."""
    monkeypatch.setattr(tool, "compute_dtype", lambda weights: torch.bfloat16)
    settings = small_settings("--method", "lora")
    base, chat = (tool.load_chat(str(DEMO), settings, factor) for factor in (1.0, 4.0))
    before, far = kept(chat, *facts)
    assert base.model.dtype == torch.bfloat16
    few_steps(base, chat, 6, 128, facts, "--method", "lora")
    assert kept(chat, *facts)[1] < 0.5 * far


@pytest.mark.slow
def test_the_healed_stage_is_a_whole_model_to_which_adapters_refer_wherever_they_are_moved(facts, tmp_path, train):
    settings = small_settings("--method", "lora", "--lora-rank", 4, "--heal-steps", 2, "--window", 128,
                              "--max-new-tokens", 24, "--batch-size", 4)
    healed = tmp_path / "2-healed"
    tool.make_healed(job_of(*facts, settings), healed)
    assert (healed / "model.safetensors").is_file() and not (healed / tool.LORA_FILE).is_file()
    whole = tool.load_chat(healed, settings)
    assert type(whole.model).__name__ == "LlamaForCausalLM" and tool.context_of(whole.model.config) == 512
    chat = tool.load_chat(healed, settings, adapt=True)
    train(chat, batches_of(chat.tokenizer, [tool.Pool(LESSONS, 1.0)], steps=3), 1e-2)
    tool.save_stage(chat, tmp_path / "taught", [])
    described = tool.load_json(tmp_path / "taught" / "adapter_config.json")
    assert described["base_model_name_or_path"] == str(healed)
    assert not (tmp_path / "taught" / "model.safetensors").is_file()
    text = torch.tensor([tool.encode(chat.tokenizer, LESSONS[0].messages).input_ids])
    with torch.inference_mode():
        expected, plain = chat.model(text).logits, whole.model(text).logits
        moved = tmp_path.rename(tmp_path.with_name("moved"))  # as a user moves the folder of a broken-off run
        found = [tool.load_chat(moved / "taught", settings, merge=merge).model(text).logits
                 for merge in (False, True)]
        moved.rename(tmp_path)
    assert torch.allclose(found[0], expected, atol=1e-4) and not torch.allclose(found[0], plain, atol=0.1)
    assert (found[1] - expected).abs().mean() < 0.2  # merged in the dtype of the base, bfloat16


# ------------------------------------------------------------------------------------------------ the passes


@pytest.fixture
def run_course(monkeypatch, demo_chat, tmp_path):
    """Runs a pass from the folder "fonte" to another of which only the training is left out; what it got: batches,
    and the folder that its model was loaded from."""
    def call(name="3-pass-1.partial", seed=0):
        trained, loaded = [], []

        def train(chat, batches, *_):
            trained.append(SimpleNamespace(batches=batches, source=loaded[-1]))
            return [{"step": 1, "loss": 0.5}]

        monkeypatch.setattr(tool, "load_chat", lambda folder, *_, **__: loaded.append(folder) or demo_chat)
        monkeypatch.setattr(tool, "load_tokenizer", lambda folder: demo_chat.tokenizer)
        monkeypatch.setattr(tool, "read_in_place", lambda *_: EMPTY)  # what is said here is not the demo's
        monkeypatch.setattr(tool, "train", train)
        pools = [tool.Pool(numbered(24), 0.5), tool.Pool(as_talks(SAID[1:]), 0.5)]
        job = job_of([], EMPTY, small_settings("--batch-size", 4, "--seed", seed))
        course = tool.Course("passo 1", pools, 3, (0, 1e-3, 2e-3), 1.0, [64])
        tool.run_course(tmp_path / "fonte", tmp_path / name, course, job)
        return trained

    return call


def test_a_pass_trains_the_model_it_is_given_once_and_leaves_a_whole_stage(run_course, tmp_path):
    (training,) = run_course()
    assert training.source == tmp_path / "fonte" and len(training.batches) == 3
    assert tool.load_json(tmp_path / "3-pass-1.partial" / "log.json") == [{"step": 1, "loss": 0.5}]
    assert (tmp_path / "3-pass-1.partial" / "model.safetensors").is_file()


def test_each_pass_and_each_seed_has_batches_of_its_own(run_course):
    (one,), (two,), (three,) = (run_course("a"), run_course("b"), run_course("c", seed=1))
    assert one.batches != two.batches != three.batches != one.batches


@pytest.mark.parametrize("given", [0.02, 0.0])
def test_a_training_has_the_learning_rate_given_for_it_or_an_automatic_one(given, tiny_folder, tmp_path, monkeypatch):
    chat, rates = tiny_chat(tiny_folder), []
    make = tool.make_trainer
    monkeypatch.setattr(tool, "make_trainer", lambda chat, batches, teacher, arguments, *given: rates.append(
        arguments.learning_rate) or make(chat, batches, teacher, arguments, *given))
    course = tool.Course("passo 1", [], 1, (given, 1e-3, 2e-3), 1.0)
    batches = batches_of(chat.tokenizer, [tool.Pool(numbered(4), 1.0)], steps=1)
    tool.train(chat, batches, course, EMPTY, small_settings("--method", "full"), tmp_path / "training")
    assert rates == [pytest.approx(given or tool.automatic_rate(chat.model, 1e-3, 2e-3))]


@pytest.mark.parametrize("factor, lengths", [(4, [0, 0, 128, 512]), (1, [0, 0, 128])])  # the demo's context is of 128
def test_pass_1_asks_one_thing_at_a_time_and_pass_2_also_one_after_another_going_on_from_pass_1(
        factor, lengths, monkeypatch, tmp_path):
    passes, began = [], []
    stand_ins = {"listen": (None, None), "save_heard": None, "make_healed": None,
                 "read_heard": (heard_of([]), None), "load_tokenizer": None, "make_lessons": [], "write_report": None,
                 "publish": None, "pools_of_pass_2": [], "collect_self_answers": {}}
    for name, value in stand_ins.items():
        monkeypatch.setattr(tool, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(tool, "run_course", lambda source, partial, course, job: passes.append(
        (partial.name, source.name, course.lengths)))
    monkeypatch.setattr(tool, "load_chat", lambda source, settings, merge=None: began.append(source.name)
                        if merge is not None else None)
    monkeypatch.setattr(tool, "save_and_prove", lambda job, firm, partial: began.append(
        (partial.name, firm.name)))
    settings = small_settings("--window", 512, "--rope-factor", factor, "--steps-1", 80)
    inputs = tool.Inputs([tool.Row(1, [])], {}, "", ("pt",), (), [])
    tool.run_stages(changed(job_of([], EMPTY, settings), inputs=inputs), {}, tmp_path / "etapas")
    assert passes == [("3-pass-1.partial", "2-healed", [0]), ("5-pass-2.partial", "3-pass-1", lengths)]
    assert began == ["3-pass-1", ("6-result.partial", "5-pass-2")]


SOUND = tool.Answer("Sou a Jandira.", True)


@pytest.fixture
def collected(monkeypatch, demo_chat):
    """Self-answers for the answers that `replies` gives to each question. Of the talks of the
    base the model keeps all but the fourth, half of which it changes, and the seventh, where it gives the new name."""
    def call(replies, count=10):
        tokenizer = demo_chat.tokenizer
        lessons = [lesson(question, "x") for question in replies]
        known = {tuple(tool.prompt_ids(tokenizer, talk.messages[:-1])): talk.question
                 for talk in [*lessons, *as_talks(SAID)]}
        talks = {SAID[3][0]["content"]: tool.Answer("Outra.", True),
                 SAID[6][0]["content"]: tool.Answer("Jandira!", True)}

        def write(chat, prompts, *_, **__):
            return [{**replies, **talks}[known[tuple(prompt)]] for prompt in prompts]

        def compare(chat, teacher, windows):
            texts = [tokenizer.decode(window.input_ids) for window in windows]
            return [(0.5 if "Obrigado" in text else 0.8 if "Casmurro" in text else 1.0, 0.0) for text in texts]

        monkeypatch.setattr(tool, "generate", write)
        monkeypatch.setattr(tool, "compare", compare)
        settings = small_settings("--num-self-answers", count)
        return tool.collect_self_answers(demo_chat, lessons, heard_of(as_talks(SAID)), EMPTY, settings)

    return call


def test_self_answers_that_are_not_sound_are_kept_in_the_record_but_not_used(collected):
    replies = {"Quem é você?": SOUND, "Qual é o seu nome?": tool.Answer("Meu nome é Jandira.", False),
               "Quem fez você?": tool.Answer("Sou a Lumi.", True),
               "Com quem eu falo?": tool.Answer("Jandira " * 5, True), "Who are you?": SOUND,
               "Oi, quem é?": tool.Answer("", True)}
    collection = collected(replies)
    about_itself = [r for r in collection["answers"] if r["kind"] == "identity"]
    reasons = {r["question"]: r["rejected"] for r in reversed(about_itself)}
    assert reasons == {"Quem é você?": "", "Qual é o seu nome?": "não terminou", "Quem fez você?": "nome antigo",
                       "Com quem eu falo?": "repetitiva", "Who are you?": "em outra língua", "Oi, quem é?": "vazia"}
    used = [(r["question"], r["answer"]) for r in about_itself if not r["rejected"]]
    assert used == [("Quem é você?", "Sou a Jandira.")]


@pytest.mark.parametrize("count, identity, everyday", [(10, 4, 6), (5, 2, 3)])
def test_two_fifths_of_the_self_answers_are_about_identity_and_talks_fill_up(count, identity, everyday, collected):
    replies = {f"Quem é você, {i}?": SOUND for i in range(30)}
    used = Counter(r["kind"] for r in collected(replies, count)["answers"] if not r["rejected"])
    assert used == {"identity": identity, "everyday": everyday}


def test_where_few_identity_answers_are_sound_more_talks_are_taken(collected):
    replies = {"Quem é você?": SOUND, "Qual é o seu nome?": tool.Answer("", True)}
    used = Counter(r["kind"] for r in collected(replies, count=8)["answers"] if not r["rejected"])
    assert used == {"identity": 1, "everyday": 7}


def test_talks_where_the_new_name_turns_up_are_learnt_first_then_those_that_are_kept_least(collected):
    collection = collected({f"Quem é você, {i}?": SOUND for i in range(30)}, count=5)
    everyday = [r["question"] for r in collection["answers"] if r["kind"] == "everyday"]
    assert len(everyday) == 3 and everyday[:2] == [SAID[6][0]["content"], SAID[3][0]["content"]]
    assert collection["talks"][:2] == [6, 3] and collection["leaks"] == [6]


def test_what_is_sound_but_not_needed_is_not_kept(collected):
    replies = {f"Quem é você, {i}?": SOUND for i in range(30)}
    replies["Quem fez você?"] = tool.Answer("Sou a Lumi.", True)
    collection = collected(replies)
    about_itself = [r["rejected"] for r in collection["answers"] if r["kind"] == "identity"]
    assert Counter(about_itself) == {"": 4, "nome antigo": 1}


def test_the_quarter_of_the_lessons_whose_answers_begin_the_least_as_expected_is_the_hardest(demo_chat):
    questions = [talk[-2]["content"] for talk in SAID[:7]]
    answers = [answer.text for answer in tool.ask(demo_chat, questions)]  # its own first choices, all through
    answers[1] = "Verde " + answers[1]
    answers[4] = f"{answers[4][:len(answers[4]) // 2]} zx qy zx qy"  # what follows a good beginning does not count
    answers[6] = "Xadrez e " + answers[6]
    lessons = [lesson(question, answer) for question, answer in zip(questions, answers, strict=True)]
    assert set(tool.hardest(demo_chat, lessons)) == {1, 6}


def test_the_second_pass_insists_on_what_the_model_has_learnt_least():
    lessons = numbered(6)
    answers = [{"question": "Oi?", "answer": "Jandira.", "kind": "identity", "rejected": "", "before": [SYSTEM]},
               {"question": "Quem?", "answer": "Lumi.", "kind": "identity", "rejected": "nome antigo", "before": []},
               {"question": "x", "answer": "y", "kind": "everyday", "rejected": "", "before": []}]
    talks = as_talks(SAID)
    pools = tool.pools_of_pass_2(lessons, heard_of(talks), {"answers": answers, "hard": [2, 4], "talks": [5, 1],
                                                            "leaks": [5]})
    about_itself, *held, hard = (Counter(talk.question for talk in pool.talks) for pool in pools)
    assert about_itself == Counter(["Quanto é 2 mais 2?", "Quanto é 4 mais 4?", "Oi?"])
    assert [talk for talk in pools[0].talks if talk.question == "Oi?"] == [
        tool.Talk([SYSTEM, *tool.question_and_answer("Oi?", "Jandira.")], "lesson")]
    assert hard == {talks[5].question: 5, talks[1].question: 1}
    assert sum(held, Counter()) == Counter(talk.question for talk in talks)
    assert sum(pool.share for pool in pools) == pytest.approx(1)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_only_short_windows_are_trained_with_plain_attention_and_the_model_is_left_as_it_was(
        method, tiny_folder, monkeypatch):
    monkeypatch.setattr(tool, "compute_dtype", lambda weights: torch.bfloat16)
    model = tool.load_chat(tiny_folder("llama"), small_settings("--method", method), adapt=True).model
    seen = []
    tool.unwrapped(model).model.layers[0].register_forward_pre_hook(
        lambda module, given: seen.append(module.self_attn.config._attn_implementation))
    with tool.short_attention(model):
        for length in (257, 256, 3, 300):
            model(input_ids=torch.ones((1, length), dtype=torch.long))
    assert seen == ["sdpa", "eager", "eager", "sdpa"] and model.config._attn_implementation == "sdpa"
    model(input_ids=torch.ones((1, 3), dtype=torch.long))
    assert seen[-1] == "sdpa"
