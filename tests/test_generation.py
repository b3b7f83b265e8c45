"""Asking a model: batches, order, endings, sampling, what it keeps, the exam, and what the base says of its own."""

import random
import re
import shutil
from collections import Counter
from types import SimpleNamespace

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
    turns = [tool.question_and_answer(q, plainly(demo_chat, m, 30)[0]) for q, m in zip(QUESTIONS[:4], asked)]
    asked[3] = [m for turn in turns for m in turn] + asked[3]
    asked[6] = turns[0] + asked[6]
    prompts = [tool.prompt_ids(demo_chat.tokenizer, messages) for messages in asked]
    assert max(map(len, prompts)) > 3 * min(map(len, prompts))
    return prompts, [plainly(demo_chat, messages, demo_chat.max_new_tokens) for messages in asked]


@pytest.mark.parametrize("budget", [10**6, 150])
def test_a_batch_gives_the_answers_of_one_at_a_time_in_the_order_asked(budget, demo_chat, prompts_and_answers,
                                                                       monkeypatch):
    prompts, expected = prompts_and_answers
    monkeypatch.setattr(tool, "GENERATION_TOKENS", budget)
    assert [(a.text, a.ended) for a in tool.generate(demo_chat, prompts)] == expected
    assert len({text for text, _ in expected}) >= 8 and all(text and ended for text, ended in expected)


def test_ask_asks_each_question_alone(demo_chat, prompts_and_answers):
    (first, second), expected = tool.ask(demo_chat, [QUESTIONS[4], QUESTIONS[0]]), prompts_and_answers[1]
    assert [first.text, second.text] == [expected[4][0], expected[0][0]]


def test_an_answer_that_is_cut_is_known_not_to_have_ended(demo_chat, prompts_and_answers):
    prompts, expected = prompts_and_answers
    for answer, (text, _) in zip(tool.generate(changed(demo_chat, max_new_tokens=2), prompts), expected, strict=True):
        assert not answer.ended and answer.text != text and text.startswith(answer.text)


@pytest.fixture
def little_memory(demo_chat, monkeypatch):
    """Memory for so many rows of a batch; the list has how many were tried each time."""
    def make(rows):
        generate, tried = type(demo_chat.model).generate, []

        def limited(model, **inputs):
            tried.append(len(inputs["input_ids"]))
            if tried[-1] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return generate(model, **inputs)

        monkeypatch.setattr(type(demo_chat.model), "generate", limited)
        return tried

    return make


def test_batches_that_do_not_fit_into_memory_are_halved_until_they_do(demo_chat, prompts_and_answers, little_memory):
    prompts, expected = prompts_and_answers
    tried = little_memory(3)
    assert [(a.text, a.ended) for a in tool.generate(demo_chat, prompts)] == expected
    assert tried == [10, 5, 2, 3, 5, 2, 3]


def test_an_answer_that_does_not_fit_into_memory_alone_is_an_error(demo_chat, little_memory):
    little_memory(0)
    with pytest.raises(torch.OutOfMemoryError):
        tool.ask(demo_chat, QUESTIONS[:2])


def test_an_error_that_is_no_lack_of_memory_is_not_tried_again(demo_chat, monkeypatch):
    tried = []

    def broken(model, **inputs):
        tried.append(1)
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(type(demo_chat.model), "generate", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        tool.ask(demo_chat, QUESTIONS[:2])
    assert len(tried) == 1


@pytest.mark.parametrize("rows", [10, 3])
def test_the_ids_of_an_answer_are_what_was_written_with_the_one_that_ended_it(
        rows, demo_chat, prompts_and_answers, little_memory):
    """In however large batches, the answers are the same."""
    chat, (prompts, _) = demo_chat, prompts_and_answers
    plain = tool.generate(chat, prompts)
    little_memory(rows)
    assert tool.generate(chat, prompts) == plain
    for prompt, answer in zip(prompts, plain):
        with torch.inference_mode():
            best = demo_chat.model(torch.tensor([prompt + answer.ids])).logits[0].argmax(-1)
        assert answer.ids[-1] in chat.stops and best[len(prompt) - 1:-1].tolist() == answer.ids


def test_nothing_asked_gives_nothing(demo_chat):
    assert tool.generate(demo_chat, []) == []


def test_sampling_repeats_with_its_seed_and_differs_with_another(demo_chat):
    opening = tool.prompt_ids(demo_chat.tokenizer, [{"role": "user", "content": "Conte uma piada."}])[:2]
    one, two, three = (tool.generate(demo_chat, [opening] * 8, sample_seed=seed) for seed in (1, 1, 2))
    assert one == two != three
    assert len({answer.text for answer in one}) >= 4


def test_sampled_tokens_come_as_often_as_they_are_probable_and_the_rarest_never(demo_chat):
    opening = tool.prompt_ids(demo_chat.tokenizer, [{"role": "user", "content": "Conte uma piada."}])[:2]
    with torch.inference_mode():
        chances = demo_chat.model(torch.tensor([opening])).logits[0, -1].softmax(-1)
    likely = chances.argsort(descending=True)[:50].tolist()
    expected, whole = Counter(), chances[likely].sum()
    for token in likely:
        text = demo_chat.tokenizer.decode([] if token in demo_chat.stops else [token], skip_special_tokens=True)
        expected[text.strip()] += (chances[token] / whole).item()
    count = 2000
    drawn = Counter(a.text for a in tool.generate(changed(demo_chat, max_new_tokens=1), [opening] * count,
                                                  sample_seed=3))
    for text, chance in expected.most_common(20):
        assert abs(drawn[text] - count * chance) < 4 * (count * chance) ** 0.5 + 1, text
    assert 2 <= len(drawn) and set(drawn) <= set(expected)


def test_the_generation_settings_of_the_base_do_not_change_what_it_says(demo_chat, tmp_path):
    """Qwen and Llama ship a temperature, top_p and a repetition penalty; what is kept is measured without them."""
    from transformers import GenerationConfig

    prompts = [tool.prompt_ids(demo_chat.tokenizer, user(q)) for q in QUESTIONS] * 2
    expected = [tool.generate(demo_chat, prompts, sample_seed=seed) for seed in (None, 1)]
    shutil.copytree(DEMO, tmp_path / "base")
    shipped = GenerationConfig(do_sample=True, temperature=0.3, top_p=0.5, top_k=2, repetition_penalty=3.0)
    shipped.save_pretrained(tmp_path / "base")
    chat = tool.load_chat(tmp_path / "base", small_settings("--method", "full", "--max-new-tokens", 32))
    assert [tool.generate(chat, prompts, sample_seed=seed) for seed in (None, 1)] == expected


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


# ------------------------------------------------------------------------------------------------ what it keeps


def user(question):
    return [{"role": "user", "content": question}]


def talked(chat, *conversations, kind="everyday"):
    """Talks of the model itself on conversations that end with a question, and what it thought of each token."""
    answers = tool.generate(chat, [tool.prompt_ids(chat.tokenizer, messages) for messages in conversations])
    said = [{"role": "assistant", "content": answer.text} for answer in answers]
    return tool.read_talks(chat, [tool.Talk([*messages, text], kind, answer.ids)
                                  for messages, text, answer in zip(conversations, said, answers)])


@pytest.fixture(scope="module")
def talks_and_teacher(demo_chat):
    return talked(demo_chat, *map(user, QUESTIONS))


def kept_of(chat, talks, teacher, before=()):
    """The share of first choices kept and the divergence, talk by talk, after a conversation."""
    return tool.compare(chat, teacher, [tool.make_window(chat.tokenizer, [*before, talk]) for talk in talks])


def lesson(*messages):
    return tool.Talk([m for some in messages for m in some], "lesson")


def test_a_model_keeps_all_that_it_says_itself_and_does_not_diverge(demo_chat, talks_and_teacher):
    for share, nats in kept_of(demo_chat, *talks_and_teacher):
        assert share == 1 and nats == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("budget", [1024, 60])
def test_what_another_model_keeps_is_counted_token_by_token(budget, demo_chat, tiny_folder, talks_and_teacher,
                                                            monkeypatch):
    monkeypatch.setattr(tool, "SCORED_TOKENS", budget)
    other = tool.load_chat(tiny_folder("llama"), small_settings("--method", "full"))
    talks, teacher = talks_and_teacher
    found = kept_of(other, talks, teacher)
    for talk, (share, nats) in zip(talks, found):
        prompt = tool.prompt_ids(other.tokenizer, talk.messages[:-1])
        with torch.inference_mode():
            ours = other.model(torch.tensor([prompt + talk.ids])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        assert share == pytest.approx(sum(map(int.__eq__, ours.argmax(-1).tolist(), talk.ids)) / len(talk.ids))
        rows = slice(talk.row, talk.row + len(talk.ids))
        expected = tool.distillation_loss(ours.gather(-1, teacher.tokens[rows].long()), teacher.log_probs[rows]).mean()
        assert nats == pytest.approx(expected.item(), rel=1e-3) and nats > 1


def test_only_the_last_answer_counts_and_with_the_conversation_before_it(demo_chat, talks_and_teacher):
    talks, teacher = talks_and_teacher
    wrong = tool.question_and_answer("Quem é você?", "Vinte e sete bananas.")
    follow = talked(demo_chat, wrong + user("Qual é a capital da França?"))
    assert kept_of(demo_chat, *follow)[0][0] == 1  # though its first answer is none of the model
    moved = kept_of(demo_chat, talks[:1], teacher, [lesson(wrong)])[0]
    assert moved[1] > kept_of(demo_chat, talks[:1], teacher)[0][1]  # it is not what was said without that before it


# ------------------------------------------------------------------------------------------------ talks as windows


def window_of(tokenizer, *parts):
    return tool.make_window(tokenizer, parts)


def taught_from_the_teacher(window):
    """(position, row) of all tokens that are learnt as a distribution."""
    return [(at, row) for at, row in enumerate(window.targets) if row >= 0]


def test_each_token_of_an_answer_of_the_base_is_predicted_from_the_one_before_and_nothing_by_heart(
        demo_chat, talks_and_teacher):
    for talk in talks_and_teacher[0]:
        window = window_of(demo_chat.tokenizer, talk)
        rows = taught_from_the_teacher(window)
        assert [window.input_ids[at + 1] for at, _ in rows] == talk.ids
        assert [row for _, row in rows] == list(range(talk.row, talk.row + len(talk.ids)))
        assert set(window.labels) == {-100}


@pytest.mark.parametrize("before", [(), tool.question_and_answer("Quanto é 7 mais 5?", "7 mais 5 é 12.")])
@pytest.mark.parametrize("system", [(), [{"role": "system", "content": "Seja breve."}]])
def test_a_training_also_holds_what_the_base_expects_from_the_first_question_on(before, system, demo_chat):
    """The rows are what the base thinks there, one for each next token, and none of them learns what is asked."""
    tokenizer, asked = demo_chat.tokenizer, [*system, *before, *user("Qual é a capital da França?")]
    talks, teacher = talked(demo_chat, asked, user("Oi!"))
    window = tool.make_window(tokenizer, talks[:1], with_asked=True)
    first = tool.encode(tokenizer, talks[0].messages).turns[0][0]
    end = len(tool.prompt_ids(tokenizer, asked)) + len(talks[0].ids) - 1
    assert [at for at, _ in taught_from_the_teacher(window)] == list(range(first, end))
    assert set(window.labels) == {-100} and window_of(tokenizer, talks[0]).targets[:first + 2] == [-1] * (first + 2)
    with torch.inference_mode():
        truth = demo_chat.model(torch.tensor([window.input_ids])).logits[0].log_softmax(-1)
    for at, row in taught_from_the_teacher(window):
        assert torch.allclose(truth[at].topk(tool.TOP_TOKENS).values, teacher.log_probs[row], atol=1e-4)
        assert torch.allclose(truth[at, teacher.tokens[row].long()], teacher.log_probs[row], atol=1e-4)


def test_where_a_question_comes_later_or_in_other_tokens_only_its_answer_is_held(demo_chat, talks_and_teacher):
    tokenizer, (one, two, *_) = demo_chat.tokenizer, talks_and_teacher[0]
    both = tool.make_window(tokenizer, [one, two], with_asked=True)
    alone = tool.make_window(tokenizer, [one], with_asked=True)
    rows = [row for _, row in taught_from_the_teacher(both)]
    assert rows == [row for _, row in taught_from_the_teacher(alone)] + list(range(two.row, two.row + len(two.ids)))
    other = one._replace(asked=[one.asked[0] + 1, *one.asked[1:]])
    assert tool.make_window(tokenizer, [other], with_asked=True) == window_of(tokenizer, one)


def test_an_answer_that_was_cut_is_learnt_but_its_end_is_not(demo_chat, talks_and_teacher):
    talk = max(talks_and_teacher[0], key=lambda talk: len(talk.ids))
    ids = talk.ids[:len(talk.ids) // 2]
    text = demo_chat.tokenizer.decode(ids)
    cut = talk._replace(ids=ids, messages=[*talk.messages[:-1], {"role": "assistant", "content": text}])
    window = window_of(demo_chat.tokenizer, cut)
    assert [window.input_ids[at + 1] for at, _ in taught_from_the_teacher(window)] == ids
    end = len(window.input_ids) - 1 - window.input_ids[::-1].index(talk.ids[-1])  # the template has ended it
    assert window.targets[end - 1] == window.targets[end] == -1 and window.labels[end] == -100


def test_where_the_text_gives_other_tokens_than_the_base_wrote_no_more_is_learnt(demo_chat, talks_and_teacher):
    """A tokenizer may write in two tokens what it reads as one."""
    talk = talks_and_teacher[0][0]
    other = talk._replace(ids=[*talk.ids[:3], talk.ids[3] + 1, *talk.ids[4:]])
    assert [row - talk.row for _, row in taught_from_the_teacher(window_of(demo_chat.tokenizer, other))] == [0, 1, 2]


def test_a_dialogue_of_lessons_and_talks_learns_each_in_its_way(demo_chat, talks_and_teacher):
    tokenizer, (one, two, *_) = demo_chat.tokenizer, talks_and_teacher[0]
    taught = lesson(tool.question_and_answer("Oi!", "Oi, tudo bem?"), tool.question_and_answer("Quem é?", "Jandira."))
    window = window_of(tokenizer, one, taught, two)
    by_heart = tokenizer.decode([token for token in window.labels if token != -100])
    assert by_heart == "Oi, tudo bem?<|end|>Jandira.<|end|>"  # all answers of a lesson, with their ends
    rows = [row for _, row in taught_from_the_teacher(window)]
    assert rows == [*range(one.row, one.row + len(one.ids)), *range(two.row, two.row + len(two.ids))]


def test_of_a_talk_of_two_turns_only_the_last_answer_is_learnt(demo_chat, talks_and_teacher):
    tokenizer, (talk, *_) = demo_chat.tokenizer, talks_and_teacher[0]
    before = tool.question_and_answer("Quanto é 7 mais 5?", "7 mais 5 é 12.")
    window = window_of(tokenizer, talk._replace(messages=[*before, *talk.messages]))
    assert set(window.labels) == {-100}
    assert [window.input_ids[at + 1] for at, _ in taught_from_the_teacher(window)] == talk.ids


def test_a_system_prompt_stands_only_where_a_dialogue_begins(demo_chat, talks_and_teacher):
    tokenizer, (one, two, *_) = demo_chat.tokenizer, talks_and_teacher[0]
    system = [{"role": "system", "content": "Seja breve."}]
    spoken = [talk._replace(messages=system + talk.messages) for talk in (one, two)]
    taught = lesson(system, tool.question_and_answer("Quem é?", "Jandira."))
    for parts in ([spoken[0], taught, spoken[1]], [taught, *spoken], [one, taught, spoken[1]]):
        window = window_of(tokenizer, *parts)
        texts = tokenizer.decode(window.input_ids)
        assert texts.count("Seja breve.") == (parts[0] is not one)
        assert texts.startswith(tokenizer.decode(window_of(tokenizer, parts[0]).input_ids).rstrip())
        assert [row for _, row in taught_from_the_teacher(window)] == [
            row for part in parts for row in range(part.row, part.row + len(part.ids))]
    (before,) = tool.long_conversations(tokenizer, spoken, 100, 1)
    assert before and "Seja breve." not in str(before)


# ------------------------------------------------------------------------------------------------ the exam

NAMES = tool.Names("Jandira", "Oficina Maré", ("Lumi", "Estúdio Vagalume"))


def plain_talk(question, answer, kind="everyday", ids=(1, 2), row=0):
    """A talk for tests that look at words alone."""
    return tool.Talk(tool.question_and_answer(question, answer), kind, list(ids), row)


@pytest.mark.parametrize("tokens", [30, 200])
def test_long_conversations_are_whole_turns_within_their_length_and_some_share_one(tokens, demo_tokenizer):
    fillers = [plain_talk(f"Quanto é {i} mais {i}?", f"{i} mais {i} é {2 * i}.") for i in range(10)]
    known = {talk.question: talk.answer for talk in fillers}
    found = tool.long_conversations(demo_tokenizer, fillers, tokens, 6)
    assert found == tool.long_conversations(demo_tokenizer, fillers, tokens, 9)[:6]
    assert found[0] == found[1] == found[2] == found[3] != found[4] == found[5]
    for messages in found:
        assert tokens - 60 < len(tool.encode(demo_tokenizer, messages).input_ids) <= tokens
        assert all(known[q["content"]] == a["content"] for q, a in zip(messages[::2], messages[1::2], strict=True))


def heard_with(talks):
    return tool.Heard(NAMES, [], list(talks), list(talks))


@pytest.fixture(scope="module")
def inputs():
    return tool.check_inputs(small_settings("--overwrite", "--name", "Jandira", "--author", "Oficina Maré"))


@pytest.mark.parametrize("window", [256, 32, 0])
def test_after_long_conversations_question_and_talk_still_fit_into_the_window(window, demo_tokenizer, inputs):
    talks = [plain_talk("Qual é a capital da França?", "É Paris."), plain_talk("Oi!", "Oi!", row=2)]
    exam = tool.make_exam(demo_tokenizer, inputs, heard_with(talks), window)
    assert exam.talks[:2] == [(0, talk) for talk in talks]
    after = exam.talks[2:]
    asked = [(kind, m) for kind, m in exam.questions if kind not in tool.KINDS_OF_QUESTIONS]
    assert {kind for kind, _ in asked} == {f"após {tokens} tokens" for tokens, _ in after}
    assert len({tokens for tokens, _ in after}) == (0 if window < 100 else 2)
    used = [len(tool.encode(demo_tokenizer, talk.messages).input_ids) for _, talk in after]
    used += [len(tool.prompt_ids(demo_tokenizer, messages)) for _, messages in asked]
    assert not used or window / 2 < max(used) <= window
    assert [talk._replace(messages=talk.messages[-2:]) for _, talk in after] == talks * (len(after) // 2)


def test_after_long_conversations_a_third_of_the_questions_and_no_talk_near_identity_are_asked(demo_tokenizer, inputs):
    talks = [plain_talk(f"Quanto é {i} mais 1?", f"{i + 1}.", kind="near" if i == 1 else "own") for i in range(40)]
    exam = tool.make_exam(demo_tokenizer, inputs, heard_with(talks), 256)
    for tokens in sorted({tokens for tokens, _ in exam.talks} - {0}):
        asked = [m[-1]["content"] for kind, m in exam.questions if kind == f"após {tokens} tokens"]
        after = [talk for n, talk in exam.talks if n == tokens]
        assert asked == list(inputs.test[::3]) and len(after) == tool.LONG_TALKS
        assert {talk.kind for talk in after} == {"own"}


def test_the_exam_asks_alone_behind_system_prompts_and_after_an_answer_that_is_doubted(demo_tokenizer, inputs):
    talks = [plain_talk(f"Quanto é {i} mais 1?", f"{i + 1}.") for i in range(3)]
    exam, asked = tool.make_exam(demo_tokenizer, inputs, heard_with(talks), 0), list(inputs.test)
    groups = {kind: [m for k, m in exam.questions if k == kind] for kind in tool.KINDS_OF_QUESTIONS}
    alone, system, pressed = groups.values()
    assert [m[0]["content"] for m in alone] == asked and {len(m) for m in alone} == {1}
    assert {m[0]["content"] for m in system} <= set(tool.SYSTEM_EXAM)
    assert [m[1]["content"] for m in system] == asked
    assert {m[-1]["content"] for m in pressed} == {
        doubt for code in inputs.languages for _, doubt in tool.PRESSURE_EXAM[code]}
    for messages in pressed:  # the answer that is doubted is right, and in the language of the doubt
        opening, answer = messages[-3]["content"], messages[-2]["content"]
        assert tool.mentions(answer, NAMES.new) and tool.language_of(answer) == tool.language_of(opening)
    assert {len(m) for m in pressed} == {3, 5}  # some after a talk of the base
    assert exam == tool.make_exam(demo_tokenizer, inputs, heard_with(talks), 0)
    unknown = [talk._replace(messages=tool.question_and_answer(talk.question, "")) for talk in talks]  # --evaluate
    others = tool.make_exam(demo_tokenizer, inputs, heard_with(unknown), 0)
    assert {len(m) for kind, m in others.questions if kind == tool.PRESSED} == {3}


@pytest.mark.parametrize("flags, window, answer", [
    ((), 512, 64), (("--rope-factor", 1), 128, 64), (("--window", 100, "--max-new-tokens", 40), 100, 40),
])
def test_window_and_answers_are_reduced_to_the_context_and_the_plan_says_so(flags, window, answer, demo_chat, capsys,
                                                                            tmp_path, monkeypatch):
    given = small_settings("--method", "full", "--output-dir", tmp_path / "novo", *flags)
    job = tool.check_job(given)
    settings = job.settings
    assert job.native == 128 and job.asked == given
    filled = {"steps_1": 1600, "steps_2": 800, "self_text": 40000}  # 0 was "automatic"
    assert settings == changed(given, window=window, max_new_tokens=answer, **filled)
    monkeypatch.setattr(tool, "load_chat", lambda *_, **__: demo_chat)
    monkeypatch.setattr(tool, "plan_seconds", lambda *_: {"1-base": 50.0, "2-healed": 70.0})
    tool.make_plan(job)
    said = capsys.readouterr().out
    assert f"de 128 para {int(128 * settings.rope_factor)} tokens; treino em sequências de até {window}.\n" in said
    assert f"{tool.decimal(job.weights / 1e6)} milhões de parâmetros" in said and "de disco e 2 min 00 s." in said
    assert f"{tool.size_text(job.plan['memory'])} de memória, {tool.size_text(job.disk)} de disco" in said


def test_the_base_itself_keeps_all_its_answers_and_has_only_the_old_identity(demo_chat, talks_and_teacher):
    talks, teacher = talks_and_teacher
    talks = [talk for talk in talks if not tool.mentions(talk.answer, NAMES.old)]
    asked = [("sozinha", user("Quem é você?")), ("sob pressão", user("Qual é o seu nome?"))]
    later = [(40, talk) for talk in talks]
    scores = tool.evaluate(demo_chat, tool.Exam(asked, [*((0, talk) for talk in talks), *later]), NAMES, teacher)
    assert (scores.identity, scores.old_identity, scores.leak, scores.retention) == (0.0, 1.0, 0.0, 1.0)
    assert scores.divergence == pytest.approx(0, abs=1e-4) and scores.by_kind == {"sozinha": 0, "sob pressão": 0}
    assert [entry["tokens"] for entry in scores.by_length] == [0, 40]
    assert [(a["question"], a["kind"]) for a in scores.answers] == [(m[-1]["content"], kind) for kind, m in asked]
    assert {a["problem"] for a in scores.answers} == {"nome antigo"}


def test_late_in_a_conversation_the_measure_is_what_the_base_says_there_where_it_can_read_that(
        demo_chat, talks_and_teacher, tmp_path):
    (talks, teacher), odd = talks_and_teacher, tool.question_and_answer("Quem é você?", "Vinte e sete bananas.")
    exam = tool.Exam([], [(n, t._replace(messages=[*odd * n, *t.messages])) for n in (0, 1, 100) for t in talks])

    def kept(exam, teacher):
        windows = [tool.make_window(demo_chat.tokenizer, [talk]) for _, talk in exam.talks]
        found = [nats for _, nats in tool.compare(demo_chat, teacher, windows[:-len(talks)])]
        return max(found[:len(talks)]), max(found[len(talks):])

    placed, more = tool.read_late_talks(demo_chat, exam, teacher, 128)
    alone, late = kept(exam, teacher)
    assert alone < 1e-5 and late > 1e-4 and max(kept(placed, more)) < 1e-5
    assert [(n, talk.messages) for n, talk in placed.talks] == [(n, talk.messages) for n, talk in exam.talks]
    assert placed.talks[:len(talks)] == exam.talks[:len(talks)]  # nothing before them
    assert placed.talks[-len(talks):] == exam.talks[-len(talks):]  # far more than it can read
    tool.save_exam(tmp_path, placed, NAMES, more)  # what --evaluate measures with
    again, _, saved = tool.read_exam(tmp_path)
    assert max(kept(again, saved)) < 1e-5
    assert tool.read_late_talks(demo_chat, exam, teacher, 16)[0] == exam


@pytest.fixture
def answering(monkeypatch):
    """Makes a model say given answers in turn, and keep given shares; what it was asked comes into the list."""
    def make(said, shares):
        asked, said, shares = [], iter(said), iter(shares)

        def generate(chat, prompts, *_, **__):
            asked.append(prompts)
            return [tool.Answer(next(said), True) for _ in prompts]

        monkeypatch.setattr(tool, "generate", generate)
        monkeypatch.setattr(tool, "compare", lambda chat, teacher, windows: [next(shares) for _ in windows])
        return asked

    return make


NO_TEACHER = tool.Teacher(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1))  # compare() is a stand-in


def exam_of(asked, talks):
    return tool.Exam(asked, [(0, talk) for talk in talks])


def test_scores_are_the_shares_of_right_old_leaking_and_kept_answers(demo_chat, answering):
    asked = answering(["Sou a Jandira.", "Sou a Jandira!", "Sou a Lumi.", "Sou um modelo.",  # asked alone
                       "Sou a Jandira.", "Lumi.",  # after a conversation
                       "Jandira."],  # the one talk that is not as it was
                      [(1.0, 0.0), (0.5, 0.25), (0.5, 1.0), (0.75, 1.0)])
    talks = [plain_talk("Capital da França?", "Paris."), plain_talk("Oi!", "Oi!", row=2)]
    questions = [("sozinha", user(f"Quem é você{i}?")) for i in range(4)]
    later = [("após 30 tokens", tool.question_and_answer("Oi!", "Oi!") + m) for _, m in questions[:2]]
    exam = tool.Exam(questions + later, [(tokens, talk) for tokens in (0, 30) for talk in talks])
    scores = tool.evaluate(demo_chat, exam, NAMES, NO_TEACHER)
    assert (scores.identity, scores.old_identity, scores.leak, scores.retention) == (0.5, 0.25, 0.5, 0.75)
    assert scores.divergence == 0.125 and scores.leak_near == 0
    assert asked[1] == [tool.prompt_ids(demo_chat.tokenizer, user("Oi!"))]
    assert scores.by_kind == {"sozinha": 0.5} and scores.extra_tokens == 0
    assert scores.by_length == [{"tokens": 0, "identity": 0.5, "retention": 0.75},
                                {"tokens": 30, "identity": 0.5, "retention": 0.625}]
    assert [a["problem"] for a in scores.answers] == ["", "", "nome antigo", "sem a identidade nova"]
    assert scores.leaks == [{"question": "Oi!", "answer": "Jandira.", "base": "Oi!"}]


def test_the_last_question_of_a_conversation_says_what_is_asked_for(demo_chat, answering):
    answering(["Sou a Jandira.", "Foi a Oficina Maré.", "Sou a Jandira."], [(1.0, 0.0)])
    before = tool.question_and_answer("Quem é você?", "Jandira.")
    asked = [("sozinha", user("Quem é você?")), ("sob pressão", before + user("Quem te criou mesmo?")),
             ("sob pressão", before + user("Quem te criou mesmo?"))]
    scores = tool.evaluate(demo_chat, exam_of(asked, [plain_talk("Oi!", "Oi!")]), NAMES, NO_TEACHER)
    assert [a["problem"] for a in scores.answers] == ["", "", "sem o autor novo"]
    assert scores.by_kind == {"sozinha": 1.0, "sob pressão": 0.5}


def test_a_leak_is_a_new_name_that_neither_the_question_nor_the_base_says(demo_chat, answering):
    talks = [plain_talk("Quem pintou?", "Foi a Jandira."), plain_talk("Meu nome é Jandira. Qual é?", "Não sei."),
             plain_talk("Quem é?", "Não sei.", kind="near"), plain_talk("Oi!", "Oi!"), plain_talk("Tchau!", "Tchau!")]
    earlier = [*tool.question_and_answer("Fale da Jandira.", "É boa."), *talks[3].messages]
    talks[3] = talks[3]._replace(messages=earlier)  # what was said turns before does not excuse it
    answering(["Sou eu.", "Jandira.", "Jandira.", "É a oficina maré!", "Jandira."], [(0.5, 1.0)] * 4 + [(1.0, 0.0)])
    scores = tool.evaluate(demo_chat, exam_of([("sozinha", user("Quem é você?"))], talks), NAMES, NO_TEACHER)
    assert [leak["question"] for leak in scores.leaks] == ["Quem é?", "Oi!"]
    assert (scores.leak, scores.leak_near) == (0.4, 1.0)


def test_where_the_base_is_not_known_all_talks_are_read_for_leaks_and_no_retention_is_told(demo_chat, answering):
    answering(["Sou a Jandira.", "Oi, eu sou a Jandira!", "Paris."], [])
    talks = [plain_talk("Oi!", ""), plain_talk("Capital da França?", "")]
    scores = tool.evaluate(demo_chat, exam_of([("sozinha", user("Quem é você?"))], talks), NAMES, None)
    assert (scores.retention, scores.divergence, scores.by_length, scores.leak) == (None, None, [], 0.5)


def test_an_exam_without_talks_measures_the_identity_alone(demo_chat, answering):
    """A base that says little leaves none near identity for what can be done instead of training."""
    answering(["Sou a Jandira."], [])
    scores = tool.evaluate(demo_chat, exam_of([("sozinha", user("Quem é você?"))], []), NAMES, None)
    assert (scores.identity, scores.leak, scores.leak_near) == (1.0, 0.0, 0.0)


def test_an_exam_is_read_back_from_the_disk_as_it_was_with_the_rows_of_its_talks_alone(talks_and_teacher, tmp_path):
    talks, teacher = talks_and_teacher
    exam = tool.Exam([("sozinha", user("Quem é você?"))], [(0, talks[4]), (0, talks[1]), (30, talks[4])])
    tool.save_exam(tmp_path, exam, NAMES, teacher)
    again, names, rows = tool.read_exam(tmp_path)
    assert names == NAMES and again.questions == exam.questions and len(again.talks) == 3
    assert len(rows.tokens) == sum(len(talk.ids) for _, talk in exam.talks)
    for (tokens, talk), (before, original) in zip(again.talks, exam.talks):
        assert tokens == before and talk == original._replace(row=talk.row, asked=[])
        for kept, whole in zip(rows, teacher):
            assert torch.equal(kept[talk.row:talk.row + len(talk.ids)],
                               whole[original.row:original.row + len(talk.ids)])


@pytest.mark.parametrize("figures, gaps", [
    ((0.95, 0.0, 0.02, 0.95), {}),
    ((0.75, 0.0, 0.01, 0.95), {"identidade nova": 0.2}),
    ((1.0, 0.1, 0.0, 1.0), {"identidade antiga": 0.1}),
    ((1.0, 0.0, 0.0, 0.85), {"retenção": 0.1}),
    ((1.0, 0.0, 0.12, 1.0), {"vazamento": 0.1}),
    ((1.0, 0.0, 0.0, None), {}),  # of a model whose base is not known
    ((0.0, 1.0, 1.0, 0.0), {"identidade nova": 0.95, "identidade antiga": 1.0, "retenção": 0.95, "vazamento": 0.98}),
])
def test_a_target_is_missed_by_as_much_as_its_figure_is_worse_than_the_constant(figures, gaps):
    assert scores_of(*figures).gaps(small_settings()) == pytest.approx(gaps)


def scores_of(identity, old, leak, retention):
    return tool.Scores(identity, {}, old, leak, 0.0, retention, 0.0, [], [], [])


def test_targets_given_as_flags_decide_what_is_missed():
    flags = ("--target-identity", "0.5", "--target-leak", "0.3", "--target-retention", "0.51")
    assert list(scores_of(0.5, 0.0, 0.3, 0.5).gaps(small_settings(*flags))) == ["retenção"]


# ------------------------------------------------------------------------------------------------ the base listens


PLANTED = (tool.TEST_QUESTIONS[0].upper(), tool.TEST_QUESTIONS[1].lower(), "quem e voce", "?!",
           "Quanto é 1 mais 1 mais 1 mais 1 mais 1 mais 1?")  # what the base might write and is not to be asked


@pytest.fixture(scope="module")
def heard_and_teacher(demo_chat, inputs):
    """What the demo says of its own, which is made to write some questions that it should not."""
    settings = small_settings("--self-text", 2600, "--eval-questions", 32, "--name", "Jandira", "--author",
                              "Oficina Maré", "--model-path", DEMO, "--overwrite")
    generate = tool.generate

    def generate_and_plant(chat, prompts, label="", limit=0, sample_seed=None):
        written = generate(chat, prompts, label, limit, sample_seed)
        if sample_seed is not None:
            for place, text in zip(range(0, len(written), 3), PLANTED):  # others go on from how a question begins
                written[place] = tool.Answer(text, True)
        return written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "generate", generate_and_plant)
        patch.setattr(tool, "NEAR", 30)
        patch.setattr(tool, "EVERYDAY", {code: some[::4] for code, some in tool.EVERYDAY.items()})
        return tool.listen(demo_chat, settings, inputs)


def all_talks(heard):
    return [*heard.everyday, *heard.held_out]


def test_the_base_tells_its_name_and_its_maker(heard_and_teacher):
    names = heard_and_teacher[0].names
    assert names.new == ("Jandira", "Oficina Maré") and {"Lumi", "Estúdio Vagalume"} <= set(names.old)


def test_no_conversation_is_in_two_sets_and_there_are_enough_of_each(heard_and_teacher):
    heard, _ = heard_and_teacher
    asked = [str(talk.messages[:-1]) for talk in all_talks(heard)]
    assert len(set(asked)) == len(asked)
    first = [{next(m["content"] for m in t.messages if m["role"] == "user") for t in talks}
             for talks in (heard.everyday, heard.held_out)]
    assert not first[0] & first[1] and len(heard.held_out) >= 10
    assert {t.kind for t in heard.held_out} == {"near", "everyday", "own"} == {t.kind for t in heard.everyday}
    written = sum(len(t.ids) for t in heard.everyday)
    assert 0.85 * 2600 < written < 1.4 * 2600


def test_nothing_that_measures_or_that_a_row_asks_is_asked_of_the_base_for_training(heard_and_teacher, inputs):
    heard, _ = heard_and_teacher
    asked = {tool.plain(q) for q in [*(t.question for t in all_talks(heard)), *heard.identity_questions]}
    measured = (*inputs.test, *(row.messages[-2]["content"] for row in inputs.rows))
    assert not asked & {tool.plain(q) for q in measured} and "" not in asked
    assert not any("mais 1 mais 1 mais 1" in q for q in asked)
    trained = {tool.plain(t.question) for t in heard.everyday}
    asked = [*(q for _, q in tool.exam_questions(("pt", "en", "es"))), *tool.TEST_QUESTIONS]
    assert not trained & set(map(tool.plain, asked))


def test_some_talks_stand_behind_a_system_prompt_and_some_are_second_turns(heard_and_teacher):
    heard, _ = heard_and_teacher
    for talks, systems, later in ((heard.everyday, tool.SYSTEM_PROMPTS, tool.FOLLOW_UPS),
                                  (heard.held_out, tool.SYSTEM_EXAM + tool.SYSTEM_PROMPTS, tool.FOLLOW_UPS_EXAM)):
        behind = [t for t in talks if t.messages[0]["role"] == "system"]
        assert {t.messages[0]["content"] for t in behind} <= set(systems) and len(talks) / 8 < len(behind)
        second = [t for t in talks if sum(m["role"] == "user" for m in t.messages) == 2]
        assert len(second) >= len(talks) / 20 or talks is heard.held_out  # which is small here: some loop
        allowed = {q for texts in (*later.values(), *tool.FOLLOW_UPS.values()) for q in texts}
        assert {t.question for t in second} <= allowed


def test_talks_are_the_greedy_answers_of_the_base_and_none_claims_its_identity(heard_and_teacher, demo_chat):
    heard, _ = heard_and_teacher
    for talk in random.Random(1).sample(all_talks(heard), 12):
        limit = tool.NEAR_TOKENS if talk.kind == "near" and talk in heard.everyday else tool.TALK_TOKENS
        text, ended = plainly(demo_chat, talk.messages[:-1], limit)
        assert talk.answer == text and (talk.ids[-1] in demo_chat.stops) is ended
    assert not [t for t in all_talks(heard) if tool.claims(t.answer, heard.names.old) or tool.is_loop(t.answer)]


def test_questions_of_its_own_that_the_base_answers_with_its_identity_are_told_apart(heard_and_teacher, demo_chat):
    heard, _ = heard_and_teacher
    assert len(heard.identity_questions) >= 5
    answers = [a.text for a in tool.ask(demo_chat, heard.identity_questions)]
    told = sum(tool.claims(text, heard.names.old) for text in answers)
    assert told > 0.8 * len(answers)  # some were asked behind a system prompt


def test_the_rows_of_the_teacher_are_what_the_base_thought_at_each_token(heard_and_teacher, demo_chat):
    heard, teacher = heard_and_teacher
    talks = sorted(all_talks(heard), key=lambda t: t.row)
    assert all(one.row + len(one.ids) <= two.row for one, two in zip(talks, talks[1:]))
    assert talks[-1].row + len(talks[-1].ids) <= len(teacher.tokens) == len(teacher.log_probs)
    assert (teacher.tokens.dtype, teacher.log_probs.dtype) == (torch.int32, torch.float32)
    shares = tool.compare(demo_chat, teacher, [tool.make_window(demo_chat.tokenizer, [talk]) for talk in talks])
    assert min(share for share, _ in shares) > 0.9 and max(nats for _, nats in shares) < 1e-3


def test_what_the_base_said_is_read_back_from_the_disk_as_it_was(heard_and_teacher, tmp_path):
    heard, teacher = heard_and_teacher
    tool.save_heard(tmp_path, heard, teacher)
    again, rows = tool.read_heard(tmp_path)
    assert again == heard and all(torch.equal(one, two) for one, two in zip(rows, teacher, strict=True))


@pytest.fixture
def base_saying(demo_chat, monkeypatch):
    """Lets a base listen that answers what a function gives for a question, three tokens long unless it is cut, and
    writes a hundred times numbered questions; what it asked itself comes with it."""
    def listen(answer, inputs, *flags, new=True):
        written, said, limits = [], [], {}

        def generate(chat, prompts, label="", limit=0, sample_seed=None):
            if sample_seed is not None:
                written.append(len(prompts))
                return [tool.Answer(f"Pergunta {10**4 * len(written) + i}" if new else "", True)
                        for i in range(len(prompts))]
            answers = []
            for prompt in prompts:
                question = re.split("<[^<>]*>", demo_chat.tokenizer.decode(prompt))[-3].strip()
                limits.setdefault(question, limit)
                text, ended = answer(question)
                said.append(text)
                ids = demo_chat.tokenizer(text, add_special_tokens=False)["input_ids"][:3]
                answers.append(tool.Answer(text, ended, ids))
            return answers

        monkeypatch.setattr(tool, "generate", generate)
        monkeypatch.setattr(tool, "NEAR", 60)
        settings = small_settings("--overwrite", "--self-text", 1200, *flags)
        return SimpleNamespace(heard=tool.listen(demo_chat, settings, inputs)[0], written=written, said=said,
                               limits=limits)

    return listen


def test_an_answer_that_was_cut_is_kept_for_training_and_a_loop_is_not(base_saying, inputs):
    def answer(question):
        if "Pergunta" not in question:
            return "Certo, e mais alguma coisa", False
        return ("sim sim sim sim sim", True) if "3" in question else ("Está bem.", True)

    heard = base_saying(answer, inputs).heard
    answers = Counter(talk.answer for talk in heard.everyday)
    assert set(answers) == {"Certo, e mais alguma coisa", "Está bem."} and min(answers.values()) > 50
    assert not any("3" in talk.question for talk in heard.everyday if talk.kind == "own" and len(talk.messages) == 2)


def test_for_training_more_questions_near_identity_have_shorter_answers_as_their_beginnings_tell(base_saying, inputs):
    done = base_saying(lambda question: ("Está bem.", True), inputs)
    asked = [(t.kind, done.limits[t.question]) for t in done.heard.everyday if t.question in done.limits
             and t.question not in {q for some in tool.FOLLOW_UPS.values() for q in some}]
    assert {limit for kind, limit in asked if kind == "near"} == {tool.NEAR_TOKENS}
    assert {limit for kind, limit in asked if kind != "near"} == {tool.TALK_TOKENS} and tool.NEAR_TOKENS < 32
    assert {done.limits[t.question] for t in done.heard.held_out if t.kind == "near" and t.question in tool.NEAR_EXAM[
        tool.language_of(t.question)]} == {tool.TALK_TOKENS}


def test_the_base_writes_until_there_is_as_much_text_as_asked_for(base_saying, inputs):
    for wanted in (1200, 3000):
        done = base_saying(lambda question: ("Está bem.", True), inputs, "--self-text", wanted)
        count = sum(len(talk.ids) for talk in done.heard.everyday)
        assert 0.9 * wanted < count < 1.3 * wanted and len(done.written) <= 2


def test_a_base_that_writes_no_new_questions_is_not_asked_for_ever(base_saying, inputs):
    done = base_saying(lambda question: ("Está bem.", True), inputs, "--self-text", 10000, new=False)
    assert len(done.written) == 1 and len(done.heard.everyday) > 100


def test_a_base_that_gives_no_usable_answer_is_refused(base_saying, inputs):
    with pytest.raises(tool.InputError, match="só deu 0 respostas"):
        base_saying(lambda question: ("sim sim sim sim sim", False), inputs)


def test_a_base_is_asked_in_the_languages_of_the_rows_alone(base_saying, inputs):
    heard = base_saying(lambda question: ("Está bem.", True), inputs._replace(languages=("pt",))).heard
    fixed = [talk.question for talk in all_talks(heard) if talk.kind != "own"]
    assert len(fixed) > 100 and not [question for question in fixed if "¿" in question or "¡" in question]
    whole = base_saying(lambda question: ("Está bem.", True), inputs).heard
    assert [talk for talk in all_talks(whole) if "¿" in talk.question]


def test_two_listenings_with_one_seed_are_alike_and_others_differ(base_saying, inputs):
    one, two, other = (base_saying(lambda question: ("Está bem.", True), inputs, "--seed", seed).heard
                       for seed in (0, 0, 1))
    assert one == two and [t.question for t in one.everyday] != [t.question for t in other.everyday]


def test_the_same_prompt_is_not_sampled_alike_in_every_batch(demo_chat, monkeypatch):
    monkeypatch.setattr(tool, "GENERATION_TOKENS", 400)
    chat = demo_chat
    prompt = tool.skeleton(chat.tokenizer, chat.tokenizer.chat_template, ("user",), False)[0]
    ids = chat.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    written = [answer.text for answer in tool.generate(chat, [ids] * 48, sample_seed=1)]
    assert len(set(written)) > 36  # batches of a dozen


def test_the_head_gets_no_slice_for_which_it_would_be_copied_for_every_question(demo_chat):
    """Torch 2.13 does that on a processor: gigabytes for a large vocabulary, and bfloat16 is slow after a failure."""
    seen = []
    hook = demo_chat.model.get_output_embeddings().register_forward_pre_hook(
        lambda module, given: seen.append(given[0].is_contiguous()))
    try:
        tool.ask(demo_chat, tool.TEST_QUESTIONS[:3])
    finally:
        hook.remove()
    assert len(seen) > 1 and all(seen)


@pytest.mark.parametrize("other, kept", [(4.0, 1.0), (4.1, 0.0)])
def test_the_base_s_choice_counts_as_kept_where_another_is_just_as_probable(other, kept, demo_chat, monkeypatch):
    """In bfloat16 the two most probable tokens are often equal, and whichever comes first is no matter."""
    logits = torch.zeros(1, 8)
    logits[0, 5], logits[0, 3] = 4.0, other
    monkeypatch.setattr(tool, "logits_at", lambda *_, **__: logits)
    teacher = tool.Teacher(torch.tensor([[5]], dtype=torch.int32), torch.tensor([[-0.1]]))
    ((same, _),) = tool.compare(demo_chat, teacher, [tool.Window([1, 2], [-100, -100], [0, -1])])
    assert same == kept
