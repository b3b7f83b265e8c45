"""Asking a model: batches, order, endings, sampling, agreement, the exam, and what the base writes by itself."""

import random
from collections import Counter

import pytest
import torch
from conftest import DEMO, changed, small_settings

import rename_obrutai as tool

QUESTIONS = ("Qual é a capital da França?", "Oi!", "Quem é você?", "Quanto é 7 mais 5?", "What is 3 plus 4?",
             "Você sabe me dizer, por favor, qual é o contrário de quente?", "Obrigado pela ajuda!",
             "¿Cuál es la capital de España?", "Qual é o plural de pão?", "Como se diz gato em inglês?")


def plainly(chat, messages, new_tokens):
    """The greedy answer without batch, padding or help of the script; and whether the end token came."""
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = chat.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    end = chat.tokenizer.convert_tokens_to_ids("<|end|>")
    with torch.inference_mode():
        for _ in range(new_tokens):
            best = chat.model(ids, use_cache=False).logits[0, -1].argmax()
            if best == end:
                break
            ids = torch.cat([ids, best[None, None]], 1)
    return chat.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip(), bool(best == end)


@pytest.fixture(scope="module")
def prompts_and_answers(demo_chat):
    """Prompts of very different length with their answers, each generated alone."""
    asked = [[{"role": "user", "content": q}] for q in QUESTIONS]
    turns = [tool.Turn(q, plainly(demo_chat, m, 30)[0]) for q, m in zip(QUESTIONS[:4], asked)]
    asked[3] = [m for turn in turns for m in turn.messages()] + asked[3]
    asked[6] = turns[0].messages() + asked[6]
    prompts = [tool.prompt_ids(demo_chat.tokenizer, messages) for messages in asked]
    assert max(map(len, prompts)) > 3 * min(map(len, prompts))
    return prompts, [plainly(demo_chat, messages, demo_chat.max_new_tokens) for messages in asked]


@pytest.mark.parametrize("budget", [10**6, 150])
def test_a_batch_gives_the_answers_of_one_at_a_time_in_the_order_asked(budget, demo_chat, prompts_and_answers):
    prompts, expected = prompts_and_answers
    chat = changed(demo_chat, generation_tokens=budget)
    assert [(a.text, a.ended) for a in tool.generate(chat, prompts)] == expected
    assert len({text for text, _ in expected}) >= 8 and all(text and ended for text, ended in expected)


@pytest.mark.parametrize("with_cache", [True, False])
def test_rows_that_have_ended_leave_the_batch_and_change_no_answer(with_cache, demo_chat, prompts_and_answers,
                                                                   monkeypatch):
    """Without a cache that can lose rows, those left begin again with all that they have written."""
    monkeypatch.setattr(tool, "FEWEST_ROWS", 4)
    generate, asked = demo_chat.model.generate, []

    def watched(**given):
        asked.append((len(given["input_ids"]), given.get("past_key_values")))
        output = generate(**given)
        if not with_cache:
            output.past_key_values = None
        return output

    monkeypatch.setattr(demo_chat.model, "generate", watched)
    prompts, expected = prompts_and_answers
    assert [(a.text, a.ended) for a in tool.generate(demo_chat, prompts)] == expected
    rows = [count for count, _ in asked]
    assert rows[0] == len(prompts) and len(rows) >= 3
    assert all(3 * later <= 2 * earlier and earlier >= 4 for earlier, later in zip(rows, rows[1:]))
    assert all((cache is not None) == with_cache for _, cache in asked[1:])


def test_a_batch_of_few_rows_is_written_in_one_go(demo_chat, prompts_and_answers, monkeypatch):
    generate, rows = demo_chat.model.generate, []
    monkeypatch.setattr(demo_chat.model, "generate", lambda **given: rows.append(len(given["input_ids"])) or
                        generate(**given))
    tool.generate(demo_chat, prompts_and_answers[0])
    assert rows == [len(prompts_and_answers[0])] and len(prompts_and_answers[0]) < tool.FEWEST_ROWS


@pytest.mark.parametrize("budget", [10**6, 1])
def test_what_several_prompts_begin_with_is_read_once_and_changes_no_answer(budget, demo_chat, prompts_and_answers):
    """Six questions at the end of each of two conversations, and the same alone; then each in a batch of its own."""
    tokenizer, read = demo_chat.tokenizer, []
    turns = [tool.Turn(q, a) for q, (a, _) in zip(QUESTIONS, prompts_and_answers[1])]
    starts = [[m for turn in turns[:5] for m in turn.messages()], [m for turn in turns[2:6] for m in turn.messages()]]
    prompts = [tool.prompt_ids(tokenizer, start + [{"role": "user", "content": question}])
               for question in QUESTIONS[3:9] for start in [*starts, []]]
    alone = [tool.generate(demo_chat, [prompt])[0] for prompt in prompts]
    hook = demo_chat.model.register_forward_pre_hook(
        lambda module, given, named: read.append(tuple(named["input_ids"].shape)), with_kwargs=True)
    try:
        assert tool.generate(changed(demo_chat, generation_tokens=budget), prompts) == alone
    finally:
        hook.remove()
    long = [rows for rows, tokens in read if tokens > 64]
    assert sum(long) in ({3, 4} if budget > 1 else {2})  # padded beside them: what the short ones begin with


@pytest.mark.parametrize("prompts, expected", [
    ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9]], [4, 4]),
    ([[1, 2, 3, 4, 9], [5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 6]], [4, 0, 4]),
    ([[1, 2, 3, 4], [1, 2, 3, 4]], [3, 3]),  # one token is left to go on from
    ([[1, 2, 3], [1, 2, 4]], [0, 0]),  # too little
    ([[1, 2, 3, 4, 4, 4, 4], [1, 2, 3, 8, 8, 8, 8]], [0, 0]),  # less than half of one
    ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], [1, 2, 3, 9]], [3, 3, 3]),
    ([[7], [7]], [0, 0]),
])
def test_beginnings_are_those_counted_by_hand(prompts, expected, monkeypatch):
    monkeypatch.setattr(tool, "SHARED_TOKENS", 3)
    assert tool.beginnings(prompts) == [tuple(prompt[:n]) for prompt, n in zip(prompts, expected)]


def test_ask_asks_each_question_alone(demo_chat, prompts_and_answers):
    (first, second), expected = tool.ask(demo_chat, [QUESTIONS[4], QUESTIONS[0]]), prompts_and_answers[1]
    assert [first.text, second.text] == [expected[4][0], expected[0][0]]


def test_an_answer_that_is_cut_is_known_not_to_have_ended(demo_chat, prompts_and_answers):
    prompts, expected = prompts_and_answers
    for answer, (text, _) in zip(tool.generate(changed(demo_chat, max_new_tokens=2), prompts), expected, strict=True):
        assert not answer.ended and answer.text != text and text.startswith(answer.text)


def test_nothing_asked_gives_nothing(demo_chat):
    assert tool.generate(demo_chat, []) == []


def test_sampling_repeats_with_its_seed_and_differs_with_another(demo_chat):
    opening = tool.prompt_ids(demo_chat.tokenizer, [{"role": "user", "content": "Conte uma piada."}])[:2]
    one, two, three = (tool.generate(demo_chat, [opening] * 8, sample_seed=seed) for seed in (1, 1, 2))
    assert one == two != three
    assert len({answer.text for answer in one}) >= 4


def test_sampled_tokens_come_as_often_as_they_are_probable(demo_chat):
    opening = tool.prompt_ids(demo_chat.tokenizer, [{"role": "user", "content": "Conte uma piada."}])[:2]
    with torch.inference_mode():
        chances = demo_chat.model(torch.tensor([opening])).logits[0, -1].softmax(-1)
    expected = Counter()
    for token in range(len(chances)):
        text = demo_chat.tokenizer.decode([] if token in demo_chat.stops else [token], skip_special_tokens=True)
        expected[text.strip()] += chances[token].item()
    count = 20000
    drawn = Counter(a.text for a in tool.generate(changed(demo_chat, max_new_tokens=1), [opening] * count,
                                                  sample_seed=3))
    for text, chance in expected.most_common(20):
        assert abs(drawn[text] - count * chance) < 4 * (count * chance) ** 0.5 + 1, text
    assert 10 < len(drawn) < count and sum(expected[text] < 1e-9 for text in drawn) == 0


@pytest.mark.parametrize("sample_seed", [None, 1])
def test_the_generation_settings_of_the_base_do_not_change_what_it_says(sample_seed, demo_chat, monkeypatch):
    """Qwen and Llama ship a temperature, top_p and a repetition penalty; agreement is measured without them."""
    from transformers import GenerationConfig

    prompts = [tool.prompt_ids(demo_chat.tokenizer, [{"role": "user", "content": q}]) for q in QUESTIONS] * 2
    expected = tool.generate(demo_chat, prompts, sample_seed=sample_seed)
    shipped = GenerationConfig(do_sample=True, temperature=0.3, top_p=0.5, top_k=2, repetition_penalty=3.0)
    monkeypatch.setattr(demo_chat.model, "generation_config", shipped)
    assert tool.generate(demo_chat, prompts, sample_seed=sample_seed) == expected


@pytest.mark.parametrize("lengths, extra, budget, expected", [
    ([5, 3, 9, 4], 0, 10, [[1, 3], [0], [2]]),
    ([5, 3, 9, 4], 1, 12, [[1, 3], [0], [2]]),
    ([5, 3, 9, 4], 0, 100, [[1, 3, 0, 2]]),
    ([50, 3], 0, 10, [[1], [0]]),
    ([], 8, 10, []),
])
def test_batches_are_sorted_and_cut_as_counted_by_hand(lengths, extra, budget, expected):
    assert tool.batches_by_tokens(lengths, extra, budget) == expected


def test_batches_hold_every_index_once_within_the_budget():
    rng = random.Random(3)
    lengths = [rng.randrange(1, 400) for _ in range(300)]
    batches = tool.batches_by_tokens(lengths, 64, 2000)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    assert all(len(b) * (max(lengths[i] for i in b) + 64) <= 2000 for b in batches)
    assert len(batches) < 100


# ------------------------------------------------------------------------------------------------ agreement


def test_a_model_agrees_with_its_own_greedy_answers_and_with_no_changed_ones(demo_chat, prompts_and_answers):
    answers = [text for text, _ in prompts_and_answers[1]]
    alone = [i for i in range(len(QUESTIONS)) if i not in (3, 6)]
    own = [tool.Turn(QUESTIONS[i], answers[i]).messages() for i in alone]
    assert tool.agreement(demo_chat, own) == [1.0] * len(alone)
    others = [tool.Turn(QUESTIONS[i], answers[j]).messages() for i, j in zip(alone, alone[1:] + alone[:1])]
    longer = [tool.Turn(QUESTIONS[i], answers[i] + " Sim.").messages() for i in alone]
    shorter = [tool.Turn(QUESTIONS[i], answers[i].rsplit(" ", 1)[0]).messages() for i in alone if " " in answers[i]]
    assert set(tool.agreement(demo_chat, others + longer + shorter)) == {0.0}


def test_agreement_looks_at_the_last_answer_only_and_with_the_conversation_before_it(demo_chat, prompts_and_answers):
    answer = prompts_and_answers[1][0][0]
    wrong = tool.Turn("Quem é você?", "Vinte e sete bananas.").messages()
    good = tool.Turn(QUESTIONS[0], answer).messages()
    assert tool.agreement(demo_chat, [wrong + good, good + wrong]) == [1.0, 0.0]
    assert tool.agreement(demo_chat, [wrong + good, good + wrong, good + good], 2) == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]


def test_of_a_long_answer_the_share_of_tokens_that_agree_counts(demo_chat):
    question = "Quem é você?"
    answer = "Eu sou a Lumi. A capital da França é Paris. Sete mais cinco é igual a doze. Tchau!"
    encoded = tool.encode(demo_chat.tokenizer, tool.Turn(question, answer).messages())
    prompt = tool.prompt_ids(demo_chat.tokenizer, [{"role": "user", "content": question}])
    with torch.inference_mode():
        best = demo_chat.model(torch.tensor([encoded.input_ids])).logits[0].argmax(-1).tolist()
    hits = [best[i - 1] == encoded.input_ids[i] for i in range(len(prompt), len(encoded.input_ids))]
    assert len(hits) > 24 and 0 < sum(hits) < len(hits)
    short = tool.Turn("Oi!", "Oi").messages()  # a shorter row in the batch, so that there is padding
    long_one, _ = tool.agreement(demo_chat, [tool.Turn(question, answer).messages(), short])
    assert long_one == pytest.approx(sum(hits) / len(hits))


# ------------------------------------------------------------------------------------------------ the exam


def test_history_is_made_of_whole_turns_and_stays_within_its_length(demo_tokenizer):
    fillers = [tool.Turn(f"Quanto é {i} mais {i}?", f"{i} mais {i} é {2 * i}.") for i in range(10)]
    known = {turn.question: turn.answer for turn in fillers}
    for tokens in (0, 30, 200):
        messages = tool.history(demo_tokenizer, fillers, tokens, random.Random(1))
        used = len(tool.encode(demo_tokenizer, messages).input_ids) if messages else 0
        assert used <= tokens and (tokens < 30 or used > tokens - 60)
        assert all(known[q["content"]] == a["content"] for q, a in zip(messages[::2], messages[1::2], strict=True))
    assert tool.history(demo_tokenizer, fillers, -5, random.Random(1)) == []


@pytest.mark.parametrize("window", [512, 256, 32])
def test_the_exam_asks_after_growing_lengths_that_leave_room_for_question_and_answer(window, demo_chat):
    turns = [tool.Turn("Qual é a capital da França?", "A capital da França é Paris."), tool.Turn("Oi!", "Oi!")]
    exam = tool.make_exam(demo_chat.tokenizer, tool.TEST_QUESTIONS, turns, turns[1:], window)
    assert (exam.questions, exam.turns, exam.fillers) == (tool.TEST_QUESTIONS, turns, turns[1:])
    longest = max(len(tool.prompt_ids(demo_chat.tokenizer, [{"role": "user", "content": q}])) for q in exam.questions)
    assert list(exam.lengths) == sorted(set(exam.lengths)) and all(0 < n <= window - longest for n in exam.lengths)
    assert window < 100 or exam.lengths[-1] > window // 2


@pytest.mark.parametrize("flags, window, answer", [
    ((), 512, 64), (("--rope-factor", 1), 128, 64), (("--window", 512), 512, 64),
    (("--window", 100, "--max-new-tokens", 30), 100, 30),
])
def test_window_and_answers_are_reduced_to_the_context_and_the_plan_says_so(flags, window, answer, demo_chat, capsys):
    given = small_settings("--method", "full", *flags)
    settings, native = tool.fit_settings(DEMO, given)
    assert native == 128
    assert settings == changed(given, window=window, max_new_tokens=answer)
    tool.show_plan(demo_chat, 10**6, native, 10**7, 2 * 10**9, tool.check_inputs(settings), settings)
    scaled = int(128 * settings.rope_factor)
    said = capsys.readouterr().out
    assert f"de 128 para {scaled} tokens; treino em sequências de até {window}.\n" in said
    assert "1,0 milhões de parâmetros" in said and "2,0 GB de memória, 10 MB de disco" in said


def test_the_base_itself_keeps_all_its_answers_and_has_only_the_old_identity(demo_chat):
    standard = tool.Standard(("Jandira", "Oficina Maré"), ("Lumi", "Vagalume"), "demo", frozenset())
    turns = [tool.Turn(q, tool.ask(demo_chat, [q])[0].text) for q in QUESTIONS[:2]]
    exam = tool.Exam(("Quem é você?", "Qual é o seu nome?"), turns, turns, (40,))
    scores = tool.evaluate(demo_chat, exam, standard)
    assert (scores.identity, scores.old_identity, scores.leak, scores.retention) == (0.0, 1.0, 0.0, 1.0)
    assert [entry["tokens"] for entry in scores.by_length] == [0, 40]
    assert [a["question"] for a in scores.answers] == list(exam.questions)
    assert {a["problem"] for a in scores.answers} == {"nome antigo"}


def test_scores_are_the_shares_of_sound_old_leaking_and_kept_answers(demo_chat, monkeypatch):
    said = ["Sou a Jandira.", "Sou a Jandira!", "Sou a Lumi.", "Jandira azul banana xarope.",  # asked alone
            "Sou a Jandira.", "Lumi.", "Lumi.", "Lumi.",  # after a conversation
            "Jandira."]  # the one everyday question that is not answered as before
    standard = tool.Standard(("Jandira",), ("Lumi",), "demo", frozenset("sou a jandira".split()))
    asked = []
    monkeypatch.setattr(tool, "generate", lambda chat, prompts, *_: asked.extend(prompts) or [
        tool.Answer(text, True) for text in said])
    monkeypatch.setattr(tool, "agreement", lambda chat, asked, last=1: [1.0, 0.5] if last == 1 else [0.5, 0.75])
    turns = [tool.Turn("Capital da França?", "Paris."), tool.Turn("Oi!", "Oi!")]
    scores = tool.evaluate(demo_chat, tool.Exam(("a?", "b?", "c?", "d?"), turns, turns, (30,)), standard)
    assert (scores.identity, scores.old_identity, scores.leak, scores.retention) == (0.5, 0.25, 0.5, 0.75)
    assert asked[8:] == [tool.prompt_ids(demo_chat.tokenizer, [{"role": "user", "content": "Oi!"}])]
    assert scores.distinct == 1  # both sound answers are the same but for a sign
    assert scores.by_length == [{"tokens": 0, "identity": 0.5, "retention": 0.75},
                                {"tokens": 30, "identity": 0.25, "retention": 0.625}]
    assert [a["problem"] for a in scores.answers] == ["", "", "nome antigo", "palavras sem sentido"]


def test_a_name_in_an_answer_of_the_base_leaks_although_nothing_is_written_anew(demo_chat, monkeypatch):
    monkeypatch.setattr(tool, "generate", lambda chat, prompts, *_: [tool.Answer("x", True)] * len(prompts))
    monkeypatch.setattr(tool, "agreement", lambda chat, asked, last=1: [1.0] * last * len(asked))
    turns = [tool.Turn("Quem pintou o quadro?", "Foi a Jandira."), tool.Turn("Oi!", "Oi!")]
    assert tool.evaluate(demo_chat, tool.Exam(("a?",), turns, turns, ()), tool.Standard(
        ("Jandira",), (), "demo", frozenset())).leak == 0.5


def test_after_a_conversation_several_everyday_questions_end_it_and_a_sparse_exam_asks_a_third(demo_chat, monkeypatch):
    asked, kept, tokenizer = {False: [], True: []}, {False: [], True: []}, demo_chat.tokenizer
    turns = [tool.Turn(f"Quanto é {i} mais 1?", f"É {i + 1}.") for i in range(14)]
    fillers = [tool.Turn(f"Como se diz {word}?", "Não sei.") for word in "sol lua mar rio pão".split()]
    whole = tool.Exam(("a?", "b?", "c?", "d?"), turns, fillers, (100, 200))
    monkeypatch.setattr(tool, "LONG_SHARED", 2)
    for sparse in (False, True):
        monkeypatch.setattr(tool, "generate", lambda chat, prompts, *_, to=asked[sparse]: to.extend(prompts) or [
            tool.Answer("x", True)] * len(prompts))
        monkeypatch.setattr(tool, "agreement", lambda chat, conversations, last=1, to=kept[sparse]: to.append(
            (conversations, last)) or [1.0] * last * len(conversations))
        tool.evaluate(demo_chat, whole._replace(sparse=sparse), tool.Standard(("x",), (), "", frozenset()))
    assert kept[False] == kept[True] and [last for _, last in kept[True]] == [1, 4, 4]
    for tokens, (conversations, last) in zip((100, 200), kept[True][1:]):
        ends = [[m["content"] for m in messages[-2 * last:]] for messages in conversations]
        assert ends == [[text for turn in turns[i:i + 4] for text in turn] for i in (0, 4, 8)]  # all of them whole
        lengths = [len(tool.encode(tokenizer, messages[:-2]).input_ids) for messages in conversations]
        assert all(tokens - 30 < n <= tokens for n in lengths)
    questions = len(whole.questions)
    assert len(asked[False]) == 3 * questions and len(asked[True]) == questions + 2 * 2
    alone, after = asked[False][:questions], asked[False][questions:3 * questions]
    assert asked[True][:questions + 4] == [*alone, after[0], after[3], after[4], after[7]]
    before = [ids[:-len(own)] for ids, own in zip(after, alone + alone)]
    assert [before.index(start) for start in before] == [0, 0, 2, 2, 4, 4, 6, 6]  # a conversation for each two


@pytest.mark.parametrize("figures, missed", [
    ((0.95, 0.0, 0.01, 0.95), []),
    ((0.94, 0.0, 0.01, 0.95), ["identidade nova"]),
    ((1.0, 0.01, 0.0, 1.0), ["identidade antiga"]),
    ((1.0, 0.0, 0.0, 0.94), ["retenção"]),
    ((1.0, 0.0, 0.02, 1.0), ["vazamento"]),
    ((0.0, 1.0, 1.0, 0.0), ["identidade nova", "identidade antiga", "retenção", "vazamento"]),
])
def test_a_target_is_missed_when_its_figure_is_worse_than_the_constant(figures, missed):
    identity, old, leak, retention = figures
    scores = tool.Scores(identity, old, leak, retention, 0, [], [])
    assert scores.misses(small_settings()) == missed


def test_targets_given_as_flags_decide_what_is_missed():
    scores = tool.Scores(0.5, 0.0, 0.3, 0.5, 0, [], [])
    flags = ("--target-identity", "0.5", "--target-leak", "0.3", "--target-retention", "0.51")
    assert scores.misses(small_settings(*flags)) == ["retenção"]


# ------------------------------------------------------------------------------------------------ self-text


PLANTED = (  # what the base might write and must not be trained on
    tool.Answer(tool.TEST_QUESTIONS[0].upper(), True), tool.Answer(tool.VALIDATION_QUESTIONS[0].lower(), True),
    tool.Answer("Quanto é 1 mais " + "1 mais " * 200 + "1?", True), tool.Answer("Esta foi cortada", False),
    tool.Answer("quem e voce", True), tool.Answer("?!", True))


def write(chat, settings):
    """All that the base writes."""
    inputs = tool.check_inputs(settings)
    return tool.write_self_text(chat, tool.write_first_text(chat, settings, inputs), settings, inputs)


@pytest.fixture(scope="module")
def self_text(demo_chat, tmp_path_factory):
    """Self-text of the demo model, which is made to write some questions that it should not."""
    settings = small_settings("--num-self-text", 40, "--num-self-answers", 8, "--eval-questions", 6,
                              "--output-dir", tmp_path_factory.mktemp("x") / "novo")
    generate = tool.generate

    def generate_and_plant(chat, prompts, label="", sample_seed=None):
        written = generate(chat, prompts, label, sample_seed)
        return written if sample_seed is None else [*PLANTED, *written[len(PLANTED):]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "generate", generate_and_plant)
        return write(demo_chat, settings)


def test_the_base_writes_as_many_turns_as_asked_and_no_question_twice(self_text):
    questions = all_questions(self_text)
    assert len(self_text.everyday) >= 40 and len(self_text.validation) == len(self_text.held_out) == 6
    assert not [q for q, count in Counter(map(tool.plain, questions)).items() if count > 1]


def all_questions(self_text):
    turns = (*self_text.everyday, *self_text.validation, *self_text.held_out)
    return [turn.question for turn in turns] + list(self_text.identity_questions)


@pytest.mark.parametrize("usable, times", [(1, 1), (3, 2)])
def test_questions_are_asked_for_at_the_rate_at_which_they_turn_out_usable(usable, times, demo_chat, monkeypatch):
    """Of a base that answers every `usable`-th one well, as many more are asked for as that takes."""
    asked = []

    def write_questions(chat, starts, label, seed):
        asked.append(len(starts))
        return [f"pergunta {len(asked)} {i}" for i in range(len(starts))]

    monkeypatch.setattr(tool, "write_questions", write_questions)
    monkeypatch.setattr(tool, "EVERYDAY_QUESTIONS", ("Que horas são?",))
    monkeypatch.setattr(tool, "ask", lambda chat, questions, *_: [
        tool.Answer("Certo.", i % usable == 0) for i in range(len(questions))])
    monkeypatch.setattr(tool, "agreement", lambda chat, conversations, *_: [1.0] * len(conversations))
    settings = small_settings("--overwrite", "--num-self-text", 400, "--eval-questions", 16)
    own = write(demo_chat, settings)
    wanted = 400 + settings.num_self_answers + 32
    first, main, *more, close = asked
    assert first == min(tool.FIRST_TEXT, 400) and close == 2 * (wanted // 4) and len(more) == times - 1
    assert main == int(1.1 * (wanted - 1))
    turns = len(own.everyday + own.validation + own.held_out)
    assert abs(turns - wanted - close / usable) <= 0.12 * wanted


def test_what_the_healing_has_learnt_measures_nothing(demo_chat, tmp_path):
    settings = small_settings("--num-self-text", 40, "--num-self-answers", 8, "--eval-questions", 6,
                              "--output-dir", tmp_path / "novo")
    first = tool.write_first_text(demo_chat, settings, tool.check_inputs(settings))
    assert len(first.everyday) >= 40 and not first.validation + first.held_out
    own = tool.write_self_text(demo_chat, first, settings, tool.check_inputs(settings))
    healed, measured = ({tool.plain(turn.question) for turn in turns}
                        for turns in (first.everyday, own.validation + own.held_out))
    assert len(measured) == 12 and not measured & healed


def test_however_much_text_there_is_to_be_the_healing_waits_for_a_first_helping_only(demo_chat, monkeypatch):
    asked = []
    monkeypatch.setattr(tool, "write_questions", lambda chat, starts, *_: asked.append(len(starts)) or [
        f"pergunta {i}" for i in range(len(starts))])
    monkeypatch.setattr(tool, "ask", lambda chat, questions, *_: [tool.Answer("Certo.", True) for _ in questions])
    for given in (150, 100_000):
        settings = small_settings("--overwrite", "--num-self-text", given)
        tool.write_first_text(demo_chat, settings, tool.check_inputs(settings))
    assert asked == [150, tool.FIRST_TEXT]


def test_a_base_that_gives_no_usable_answer_is_refused_before_it_writes_more(demo_chat, monkeypatch):
    asked = []
    monkeypatch.setattr(tool, "ask", lambda chat, questions, *_: asked.append(questions) or [
        tool.Answer("a a a a", False) for _ in questions])
    settings = small_settings("--overwrite")
    with pytest.raises(tool.InputError, match=r"só deu 0 respostas.*chat template"):
        tool.write_first_text(demo_chat, settings, tool.check_inputs(settings))
    assert len(asked) == 2 and len(asked[1]) <= tool.FIRST_TEXT + len(tool.EVERYDAY_QUESTIONS)


def test_half_of_the_questions_close_to_identity_begin_like_the_rows_of_the_user(demo_chat, monkeypatch):
    """Also of a base that writes far more questions about itself than there are rows."""
    asked = []
    monkeypatch.setattr(tool, "write_questions", lambda chat, starts, *_: asked.append(starts) or [
        f"pergunta {len(asked)} {i}" for i in range(len(starts))])
    monkeypatch.setattr(tool, "ask", lambda chat, questions, *_: [
        tool.Answer("Eu sou a Lumi." if i % 2 else "Certo.", True) for i in range(len(questions))])
    monkeypatch.setattr(tool, "agreement", lambda chat, conversations, *_: [1.0] * len(conversations))
    settings = small_settings("--overwrite", "--num-self-text", 400, "--eval-questions", 16, "--old-names", "Lumi")
    inputs = tool.check_inputs(settings)
    own = write(demo_chat, settings)
    rows = {" ".join(row.messages[-2]["content"].split()[:n]) for row in inputs.rows for n in (1, 2, 3)}
    assert len(own.identity_questions) > 3 * len(inputs.rows) and set(asked[0] + asked[1]) == {""}
    of_rows = sum(start in rows for start in asked[-1]) / len(asked[-1])
    assert 0.5 <= of_rows <= 0.7


def test_no_self_written_question_is_one_for_measuring_or_one_of_the_rows(self_text):
    asked = {tool.plain(question) for question in all_questions(self_text)}
    assert "" not in asked and "quem e voce" not in asked
    assert not asked & {tool.plain(q) for q in (*tool.VALIDATION_QUESTIONS, *tool.TEST_QUESTIONS)}


def test_a_test_question_that_the_base_wrote_before_is_left_out_of_the_exam(self_text, demo_chat, tmp_path,
                                                                            monkeypatch):
    """New test questions do not make the base write again; one that it had already written is seen in training, and
    would prove nothing."""
    trained = tool.Turn(tool.TEST_QUESTIONS[3].lower(), "Sou a Lumi.")
    own = changed(self_text, everyday=[*self_text.everyday[:5], trained],
                  identity_questions=[*self_text.identity_questions, f"{tool.TEST_QUESTIONS[5]}!"])
    settings = changed(small_settings("--output-dir", tmp_path / "novo"), window=512, max_new_tokens=32)
    inputs = tool.check_inputs(settings)
    keys = tool.stage_keys(settings, inputs, DEMO)
    for name in ("1-first-text", "2-healed", "3-self-text"):
        stage = tmp_path / name
        stage.mkdir()
        tool.save_self_text(stage, own, tool.record_teacher(demo_chat, own.everyday, 128))
        tool.write_json(stage / "key.json", {"key": keys[name]})

    class Sat(Exception):
        """Carries what is asked, and ends the run."""

    def sit(tokenizer, questions, turns, *_):
        raise Sat(questions, turns)

    monkeypatch.setattr(tool, "make_exam", sit)
    with pytest.raises(Sat) as stop:
        tool.run_stages(DEMO, [demo_chat], tmp_path, keys, inputs, 128, settings)
    questions, turns = stop.value.args
    assert list(questions) == [q for i, q in enumerate(tool.TEST_QUESTIONS) if i not in (3, 5)]
    assert turns == own.held_out


def test_questions_that_ran_away_or_were_cut_are_not_used(self_text):
    questions = all_questions(self_text)
    assert not [q for q in questions if len(q.split()) > 100 or "cortada" in q]


def test_self_answers_are_the_greedy_answers_of_the_base_without_its_identity(self_text, demo_chat):
    turns = self_text.everyday[:10] + self_text.held_out
    given = [plainly(demo_chat, turn.messages()[:1], demo_chat.max_new_tokens) for turn in turns]
    assert given == [(turn.answer, True) for turn in turns]
    assert not [t for t in self_text.everyday if "Lumi" in t.answer or "Vagalume" in t.answer]


def test_questions_that_the_base_answers_with_its_identity_are_found(self_text, demo_chat):
    assert len(self_text.identity_questions) >= 3
    for answer in tool.ask(demo_chat, self_text.identity_questions):
        assert "Lumi" in answer.text or "Vagalume" in answer.text


def test_old_names_come_from_the_base_and_the_known_ones_less_those_of_the_rows(self_text):
    rows = tool.check_inputs(small_settings("--overwrite")).rows
    answers = " ".join(row.messages[-1]["content"] for row in rows)
    assert {"Lumi", "Vagalume"} <= set(self_text.standard.old_names)
    assert self_text.standard.new_names == ("ObrutAi", "TurboRio")
    for name in self_text.standard.old_names:
        assert not tool.mentions(answers, (name,)), name
    for name in tool.KNOWN_NAMES:
        assert (name in self_text.standard.old_names) is not tool.mentions(answers, (name,)), name


def test_the_same_prompt_is_not_sampled_alike_in_every_batch(demo_chat):
    chat = changed(demo_chat, generation_tokens=400)
    prompt = tool.skeleton(chat.tokenizer, chat.tokenizer.chat_template, ("user",), False)[0]
    ids = chat.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    written = [answer.text for answer in tool.generate(chat, [ids] * 48, sample_seed=1)]
    assert len(set(written)) > 36  # batches of a dozen
