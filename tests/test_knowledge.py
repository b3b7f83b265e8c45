"""The user's own material: what is learnt of it and until when, its exam, its stages, and what the report says."""

import contextlib
import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import sacrebleu
import torch
from conftest import DEMO, SCRIPT, listened, run_script, small_settings
from torch.nn import functional

import rename_obrutai as tool

CATALOGUE = SCRIPT.parent / "tests" / "catalogo_demo.jsonl"
WAYS = ["before", "before_rows", "tuned", "tuned_rows"]
THINGS = ("mesa", "cama", "cadeira", "bola", "casa", "camisa", "porta", "panela", "faca", "caixa", "flor")
PLACES = ("Roma", "Paris", "Lisboa", "Goiânia", "Fortaleza", "Manaus", "Tóquio")
SAID = [tool.question_and_answer(question, answer) for question, answer in (
    ("Quanto é 2 mais 2?", "2 mais 2 é igual a 4."), ("Oi!", "Oi! Tudo bem?"), ("Obrigado!", "De nada!"),
    ("Qual é a capital da França?", "A capital da França é Paris."), ("Conte uma piada.", "Era uma vez um gato."),
    ("Quem escreveu Dom Casmurro?", "Foi Machado de Assis."))]
slow = pytest.mark.slow  # what needs the whole job


def row(number, title, content):
    return tool.Row(number, tool.question_and_answer(f"Título do produto: {title}", content))


def products(first, last):
    """Rows that can be told apart."""
    return [row(i, f"{THINGS[i % 11]} {i} de {PLACES[i % 7]}",
                f"A {THINGS[i % 11]} vem de {PLACES[i % 7]} e custa {i} reais.") for i in range(first, last)]


MATERIAL = tool.Material(products(0, 24), products(24, 28), products(28, 32), 32, {})
EMPTY = tool.Teacher(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1))


def tokens_of(tokenizer, rows):
    return sum(len(tool.encode(tokenizer, row.messages).input_ids) for row in rows)


def job_of(material, talks=(), teacher=EMPTY, *flags, native=64, learnt=0):
    """A job that teaches the material alone, to a base that said these talks."""
    settings = small_settings("--identity-file", "", "--knowledge-file", "x.jsonl", "--method", "full", *flags)
    heard = tool.Heard(tool.Names("", "", ()), [], list(talks), list(talks))
    inputs = tool.Inputs([], {"BASE": "demo"}, "", ("pt",), (), [])
    return tool.Job(settings, settings, inputs, DEMO, 10**6, native, "fatos", {}, 0, heard, teacher,
                    material=material, learnt_tokens=learnt)


# ------------------------------------------------------------------------------------------------ training


@pytest.fixture
def learn(tiny_folder, demo_tokenizer, tmp_path):
    """Teach the material to a tiny model, in a folder below `place`; the stage's folder."""
    def call(place, *flags):
        flags = ("--batch-size", 2, "--learning-rate-1", 0.01, "--kl-weight", 1, *flags)
        job = job_of(MATERIAL, (), EMPTY, *flags, learnt=tokens_of(demo_tokenizer, MATERIAL.rows))
        folder = tmp_path / place / "3-pass-1.partial"
        folder.mkdir(parents=True, exist_ok=True)
        tool.run_course(Path(tiny_folder("llama")), folder, tool.first_course([], job), job)
        return folder

    return call


def looks(folder):
    """Step and watched loss of each look, from the log."""
    return [(e["step"], e["held_out"]) for e in tool.load_json(folder / "log.json") if "held_out" in e]


def steps_of(folder):
    return [e["step"] for e in tool.load_json(folder / "log.json") if "loss" in e]


@pytest.mark.parametrize("losses, last", [
    ([3, 3.1], 20), ([3, 2.9, 2.899], 30), ([3, 2.9, 2.8, 2.85], 40), ([3, 2.9, 2.95], 30),
    ([3, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.3, 2.2, 2.1, 2.0, 1.9], 120)])
def test_training_goes_on_as_long_as_the_watched_loss_falls_and_no_longer(losses, last, learn, monkeypatch):
    script, seen = iter([*losses, 0.1, 0.1]), []
    monkeypatch.setattr(tool, "loss_on", lambda chat, rows: seen.append(rows) or next(script))
    monkeypatch.setattr(tool, "steps_of_pass_1", lambda *_: (0, 120))
    folder = learn("a")
    assert looks(folder) == [(10 * (i + 1), loss) for i, loss in enumerate(losses)]
    assert steps_of(folder) == list(range(1, last + 1))
    assert all(rows == MATERIAL.watched for rows in seen)
    assert tool.load_json(folder / "pace.json")["steps"] == last


def test_the_watched_loss_is_that_of_the_model_as_it_is_then_and_training_goes_on_with_dropout(learn, monkeypatch):
    train, modes = tool.train, []

    def noted(chat, *given, **named):
        chat.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
        return train(chat, *given, **named)

    monkeypatch.setattr(tool, "train", noted)
    monkeypatch.setattr(tool, "steps_of_pass_1", lambda *_: (0, 20))
    folder = learn("a")
    (_, first), (step, last) = looks(folder)
    chat = tool.load_chat(folder, small_settings("--method", "full"))
    assert step == 20 and tool.loss_on(chat, MATERIAL.watched) == pytest.approx(last, rel=1e-4) != first
    assert modes.count(True) >= 20 and modes[-1] is False
    assert True in modes[modes.index(False):]


@pytest.mark.parametrize("size, steps", [(8, 23), (4, 46)])
def test_with_knowledge_steps_as_many_of_eight_rows_are_done_and_nothing_is_watched(size, steps, learn, monkeypatch):
    monkeypatch.setattr(tool, "loss_on", None)
    folder = learn("a", "--knowledge-steps", 23, "--batch-size", size)
    assert steps_of(folder) == list(range(1, steps + 1)) and not looks(folder)


def of_both(job):
    """The job with an identity to teach as well."""
    return job._replace(inputs=job.inputs._replace(rows=[tool.Row(1, SAID[4])]))


@pytest.mark.parametrize("given, tokens, expected", [
    (0, 500, 10), (0, 501, 20), (0, 5000, 100), (0, 100_000, 300), (0, 400_000, 800), (60, 400_000, 60), (7, 10, 7)])
def test_the_material_is_seen_ten_times_at_most_and_once_at_least_unless_the_steps_are_given(given, tokens, expected):
    """Of 1,000 tokens a step, half are of the material."""
    job = job_of(MATERIAL, (), EMPTY, "--knowledge-steps", given, native=125, learnt=tokens)
    assert tool.steps_of_pass_1(job) == (0, expected)


@pytest.mark.parametrize("given, expected", [(60, (140, 140)), (80, (160, 160)), (200, (160, 400))])
def test_with_an_identity_both_have_their_steps_and_no_end_comes_before_the_lessons_had_theirs(given, expected):
    job = of_both(job_of(MATERIAL, (), EMPTY, "--knowledge-steps", given, "--steps-1", 80))
    assert tool.steps_of_pass_1(job) == expected
    assert tool.steps_of_pass_1(job._replace(material=None)) == (80, 80)


def test_a_loss_that_falls_no_more_ends_nothing_before_the_least_of_steps(learn, monkeypatch):
    losses = iter([3, 3.1, 3.2, 3.3, 3.4])
    monkeypatch.setattr(tool, "loss_on", lambda *_: next(losses))
    monkeypatch.setattr(tool, "steps_of_pass_1", lambda *_: (35, 120))
    assert steps_of(learn("a")) == list(range(1, 41))


class Killed(BaseException):
    """Stands in for the end of the process."""


def kill(*_):
    raise Killed


def kill_in_step(patch, number):
    from transformers import Trainer

    step = Trainer.training_step
    patch.setattr(Trainer, "training_step", lambda self, *given, **named: kill() if
                  self.state.global_step + 1 == number else step(self, *given, **named))


def result_of(folder):
    return [(folder / name).read_bytes() for name in ("model.safetensors", "log.json")]


@pytest.mark.parametrize("killed, kept", [("between", 15), ("after the last look", 30)])
def test_a_training_broken_off_ends_with_the_bytes_of_one_that_was_not(killed, kept, learn, monkeypatch, tmp_path):
    """Also where it was to end by itself: there is no going on beyond the look that ended it."""
    losses = {10: 3.0, 20: 2.0, 30: 2.0, 40: 1.0, 50: 0.9}
    keeper, now = tool.make_keeper, []

    def told(*given):
        made = keeper(*given)
        end = made.on_step_end
        made.on_step_end = lambda args, state, control, **rest: (now.append(state.global_step),
                                                                 end(args, state, control, **rest))[1]
        return made

    monkeypatch.setattr(tool, "make_keeper", told)
    monkeypatch.setattr(tool, "loss_on", lambda *_: losses[now[-1]])
    monkeypatch.setattr(tool, "steps_of_pass_1", lambda *_: (0, 50))
    unbroken = learn("unbroken")
    assert looks(unbroken)[-1][0] == 30
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if killed == "between":
            kill_in_step(patch, kept + 1)
        else:
            patch.setattr(tool, "save_stage", kill)
        learn("broken", "--checkpoint-minutes", 0)
    begun = max(int(path.name[11:]) for path in tmp_path.glob("broken/**/checkpoint-*"))
    assert 10 < begun <= kept
    broken = learn("broken", "--checkpoint-minutes", 0)
    assert steps_of(broken) == list(range(1, 31))
    assert result_of(broken) == result_of(unbroken)


@pytest.fixture
def captured(monkeypatch, demo_chat, tmp_path):
    """What the training is given, in place of the training."""
    given = []
    monkeypatch.setattr(tool, "load_chat", lambda *_, **__: demo_chat)
    monkeypatch.setattr(tool, "load_tokenizer", lambda *_: demo_chat.tokenizer)
    monkeypatch.setattr(tool, "save_stage", lambda *_: None)
    monkeypatch.setattr(tool, "train", lambda chat, batches, *_: given.append(batches) or [])
    return given


def by_kind(tokenizer, batches):
    """Of all windows: (tokens, what is learnt by heart, targets) of the material's and of the others."""
    windows = [window for batch in batches for window in batch]
    kinds = {True: [], False: []}
    for window in windows:
        text = tokenizer.decode(window.input_ids)
        learnt = tokenizer.decode([label for label in window.labels if label != -100])
        kinds["Título do produto" in text].append((len(window.input_ids), text, learnt, max(window.targets)))
    return kinds[True], kinds[False]


def three_kinds(chat):
    """Talks of the base of each kind, and its teacher."""
    talks, teacher = listened(chat, SAID)
    return [talk._replace(kind=kind) for talk, kind in zip(talks, 2 * ("near", "everyday", "own"))], teacher


def test_only_answers_of_the_material_are_learnt_by_heart_beside_as_many_tokens_of_the_base_s_talks(
        captured, demo_chat, tmp_path):
    job = job_of(MATERIAL, *three_kinds(demo_chat), "--knowledge-steps", 60, native=128)
    tool.run_course(tmp_path, tmp_path / "x", tool.first_course([], job), job)
    material, talks = by_kind(demo_chat.tokenizer, captured[0])
    answers = {f"{row.answer}<|end|>" for row in MATERIAL.rows}
    assert {learnt for *_, learnt, _ in material} == answers and all(target == -1 for *_, target in material)
    assert {learnt for *_, learnt, _ in talks} == {""} and all(target >= 0 for *_, target in talks)
    tokens = [sum(tokens for tokens, *_ in kind) for kind in (material, talks)]
    assert sum(tokens) > 30_000 and 0.48 < tokens[0] / sum(tokens) < 0.52


@pytest.mark.parametrize("own, shares", [(60, (0.125, 0.25)), (180, (0.125, 0.25)), (20, (0.1875, 0.125))])
def test_lessons_and_material_are_mixed_as_evenly_as_they_have_steps(own, shares, captured, demo_chat, tmp_path):
    """Of their own steps, lessons are a quarter of the tokens, and the material half."""
    job = of_both(job_of(MATERIAL, *three_kinds(demo_chat), "--knowledge-steps", own, "--steps-1", 60, native=128))
    tool.run_course(tmp_path, tmp_path / "x", tool.first_course([tool.Talk(SAID[4], "lesson")], job), job)
    material, others = by_kind(demo_chat.tokenizer, captured[0])
    lessons = sum(tokens for tokens, _, learnt, _ in others if learnt)
    of_material, rest = (sum(tokens for tokens, *_ in kind) for kind in (material, others))
    found = [part / (of_material + rest) for part in (lessons, of_material)]
    assert found == pytest.approx(shares, abs=0.02)
    assert of_material == pytest.approx(0.5 * own * 8 * 128, rel=0.15)


def test_the_second_pass_has_some_of_the_material_too(demo_chat):
    job = of_both(job_of(MATERIAL, *three_kinds(demo_chat)))
    nothing = {"hard": [], "answers": [], "leaks": [], "talks": []}
    with_it, without = (tool.second_course([tool.Talk(SAID[4], "lesson")], nothing, some)
                        for some in (job, job._replace(material=None)))
    assert with_it.pools[:-1] == without.pools and with_it.steps == without.steps
    assert [talk.messages for talk in with_it.pools[-1].talks] == [row.messages for row in MATERIAL.rows]
    assert with_it.pools[-1].share == tool.REHEARSED


# ------------------------------------------------------------------------------------------------ the exam

TALKS = [SAID[3], [{"role": "system", "content": "Seja breve."}, *SAID[0]], [*SAID[0], *SAID[1], *SAID[3]],
         tool.question_and_answer("Oi!", "Sim."), [*SAID[1], *SAID[2]]]


def losses_in_the_plain_way(chat, messages, with_end, most=math.inf):
    """Sum and number of the losses of the last answer, from the logits of the whole text."""
    prompt = tool.prompt_ids(chat.tokenizer, messages[:-1])
    answer = chat.tokenizer(messages[-1]["content"] + "<|end|>" * with_end, add_special_tokens=False)["input_ids"]
    ids = torch.tensor(prompt + answer)
    with torch.inference_mode():
        logits = chat.model(ids[None]).logits[0].double()
    losses = functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[-len(answer):]
    losses = losses[:min(most, len(answer))]
    return losses.sum().item(), len(losses)


@pytest.mark.parametrize("budget", [1, 90, 10**6])
@pytest.mark.parametrize("with_end, most", [(True, math.inf), (False, math.inf), (True, 3), (False, 3)])
def test_the_losses_of_answers_are_those_of_the_whole_text_s_logits_whatever_the_batch(
        with_end, most, budget, demo_chat, monkeypatch):
    monkeypatch.setattr(tool, "SCORED_TOKENS", budget)
    found = tool.answer_losses(demo_chat, TALKS, with_end, most)
    expected = [losses_in_the_plain_way(demo_chat, messages, with_end, most) for messages in TALKS]
    assert [count for _, count in found] == [count for _, count in expected]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-3, abs=1e-3)


def test_the_loss_on_rows_weighs_each_token_the_same(demo_chat):
    rows = [tool.Row(i, messages) for i, messages in enumerate(TALKS)]
    sums, counts = zip(*(losses_in_the_plain_way(demo_chat, messages, True) for messages in TALKS))
    assert tool.loss_on(demo_chat, rows) == pytest.approx(sum(sums) / sum(counts), rel=1e-3)


def contents(messages):
    return [m["content"] for m in messages]


SEARCHED = tool.Material(
    [row(0, "Mesa azul", "Azul."), row(1, "Mesa azul de ferro", "De ferro."), row(2, "Cama", "Boa."),
     tool.Row(3, [*SAID[1], *tool.question_and_answer("Mesa azul de ferro grande?", "Grande.")]), *products(50, 56)],
    [row(10, "Mesa azul de ferro de Roma!", "Vista.")],
    [row(11, "Mesa azul de ferro de Roma", "Guardada."), row(12, "Mesa azul de ferro de Roma?", "Guardada também."),
     tool.Row(13, [{"role": "system", "content": "S"}, *tool.question_and_answer("Mesa azul?", "Sim.")])], 20, {})


def test_the_rows_put_before_a_question_are_learnt_ones_the_most_similar_last(demo_chat):
    found = tool.contexts_of(demo_chat.tokenizer, SEARCHED, 10**6)
    learnt = {tuple(contents(row.messages[-2:])) for row in SEARCHED.rows}
    for before in found[:2]:
        pairs = list(zip(contents(before)[::2], contents(before)[1::2]))
        assert len(pairs) == tool.RETRIEVED and set(pairs) <= learnt
        assert pairs[-1] in [tuple(contents(SEARCHED.rows[i].messages[-2:])) for i in (1, 3)]
        assert [m["role"] for m in before] == ["user", "assistant"] * 3
    assert found[2] == []  # a system prompt must stay first


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_as_many_rows_are_put_before_a_question_as_there_is_room_for(kept, demo_chat):
    tokenizer, asked = demo_chat.tokenizer, SEARCHED.test[0]
    whole = tool.contexts_of(tokenizer, SEARCHED, 10**6)[0]
    best = whole[len(whole) - 2 * kept:]
    room = len(tool.encode(tokenizer, [*best, *asked.messages]).input_ids)
    assert tool.contexts_of(tokenizer, SEARCHED, room)[0] == best
    assert tool.contexts_of(tokenizer, SEARCHED, room - 1)[0] == (best[2:] if kept else [])


def test_rare_words_are_those_of_few_rows_that_are_not_in_the_question(monkeypatch):
    monkeypatch.setattr(tool, "RARE", 0.1)  # of 20 rows: two
    common = [row(i, "Coisa", "Esta coisa é boa.") for i in range(16)]
    test = [row(16, "Vaso", "Este vaso, ÚNICO, é de prata e ouro."), row(17, "Ouro", "Ouro boa coisa.")]
    watched = [row(18, "x", "Prata."), row(19, "y", "De Roma, e de Minas; este não.")]
    assert tool.rare_words(tool.Material(common, watched, test, 20, {})) == [
        {"unico", "prata", "ouro", "e", "de", "este"} - {"e"}, set()]


WRITTEN = ["A mesa vem de Roma e custa 28 reais.", "Não sei.", "", "A bola vem de Goiânia."]


@pytest.fixture
def answered(monkeypatch):
    """The model writes these answers; what it was asked."""
    asked = SimpleNamespace(prompts=[], limits=[])

    def generate(chat, prompts, label="", limit=0, *_):
        asked.prompts += prompts
        asked.limits.append(limit)
        return [tool.Answer(text, text != "Não sei.") for text in WRITTEN[:len(prompts)]]

    monkeypatch.setattr(tool, "generate", generate)
    return asked


def test_the_figures_of_the_exam_are_those_of_what_is_written_after_the_rows_before_it(answered, demo_chat):
    tokenizer, test = demo_chat.tokenizer, MATERIAL.test
    before = [[], SAID[0], [*SAID[1], *SAID[3]], SAID[4]]
    found = tool.take_material(demo_chat, test, tool.rare_words(MATERIAL), before, "x")
    asked = [[*earlier, *row.messages] for earlier, row in zip(before, test)]
    assert answered.prompts == [tool.prompt_ids(tokenizer, messages[:-1]) for messages in asked]
    own = [tool.prompt_ids(tokenizer, row.messages[:-1]) for row in test]
    assert found.tokens == sum(len(a) - len(b) for a, b in zip(answered.prompts, own)) / 4 > 10
    assert found.chrf == pytest.approx(sacrebleu.corpus_chrf(WRITTEN, [[row.answer for row in test]]).score)
    assert 10 < found.chrf < 90 and found.ended == 0.75 and found.answers == WRITTEN
    assert found.loss == pytest.approx(tool.loss_on(demo_chat, [tool.Row(0, m) for m in asked]), rel=1e-3)


def test_of_rare_words_the_share_that_the_answers_have_is_told(answered, demo_chat):
    rare = [{"roma", "lua"}, set(), {"sol"}, {"goiania"}]
    assert tool.take_material(demo_chat, MATERIAL.test, rare, [[]] * 4, "x").rare == pytest.approx((0.5 + 0 + 1) / 3)


def test_an_answer_has_room_for_the_longest_row_but_very_long_ones_are_compared_as_far_as_it_may_write(
        answered, demo_chat, monkeypatch):
    tokenizer = demo_chat.tokenizer
    longest = max(len(tokenizer(row.answer, add_special_tokens=False)["input_ids"]) for row in MATERIAL.test) + 1
    exam = demo_chat, MATERIAL.test, tool.rare_words(MATERIAL), [[]] * 4, "x"
    tool.take_material(*exam)
    monkeypatch.setattr(tool, "LONGEST_ANSWER", 6)
    found = tool.take_material(*exam)
    assert answered.limits == [longest + 8, 6]
    cut = [tokenizer.decode(tokenizer(row.answer, add_special_tokens=False)["input_ids"][:6]) for row in MATERIAL.test]
    assert found.chrf == pytest.approx(sacrebleu.corpus_chrf(WRITTEN, [cut]).score)


def test_both_columns_of_a_model_have_the_same_questions_one_with_rows_in_its_context(answered, demo_chat):
    job = job_of(MATERIAL, (), EMPTY, "--window", 100)
    found = tool.prove_material(demo_chat, job, "tuned")
    assert list(found) == ["tuned", "tuned_rows"] and found["tuned"].tokens == 0 < found["tuned_rows"].tokens
    plain, with_rows = answered.prompts[:4], answered.prompts[4:]
    before = tool.contexts_of(demo_chat.tokenizer, MATERIAL, 100)
    assert plain == [tool.prompt_ids(demo_chat.tokenizer, row.messages[:-1]) for row in MATERIAL.test]
    assert with_rows == [tool.prompt_ids(demo_chat.tokenizer, [*earlier, *row.messages[:-1]])
                         for earlier, row in zip(before, MATERIAL.test)]
    assert max(map(len, with_rows)) < 100


def test_fluency_is_the_mean_log_probability_of_what_was_written_without_its_end(demo_chat):
    told = [[*row.messages[:-1], {"role": "assistant", "content": text}]
            for row, text in zip(MATERIAL.test, WRITTEN) if text]
    sums, counts = zip(*(losses_in_the_plain_way(demo_chat, messages, False) for messages in told))
    assert len(told) == 3
    assert tool.fluency_of(demo_chat, MATERIAL, WRITTEN) == pytest.approx(-sum(sums) / sum(counts), rel=1e-3)


def test_six_words_in_a_row_of_the_material_are_recited_but_not_those_of_the_base_itself(demo_chat, monkeypatch):
    rows = [row(0, "x", "A mesa boa vem de Roma e custa 8 reais.")]
    base = "Paris, e a MESA boa vem de Roma."
    written = {"Um": "Ora, a mesa boa vem de roma hoje.", "Dois": "A mesa boa vem de Paris.", "Três": base,
               "Quatro": "Vem de Roma e custa 9 reais, a mesa boa."}
    talks = [tool.Talk(tool.question_and_answer(question, base if question == "Três" else "De nada."), "everyday")
             for question in written]
    monkeypatch.setattr(tool, "generate", lambda *_, **__: [tool.Answer(text, True) for text in written.values()])
    assert tool.recited_share(demo_chat, talks, rows) == 0.25
    assert tool.recited_share(demo_chat, talks, []) == 0


# ------------------------------------------------------------------------------------------------ the report

LOOKED_UP, TRAINED, BOTH = (
    "consultar as linhas parecidas, sem treino", "o treino, sem consultar linhas",
    "o treino com as linhas parecidas antes da pergunta")


def scores(*points, loss=(5.0, 4.0, 1.5, 1.25)):
    return {way: {"loss": nats, "chrf": chrf, "rare": 0.5, "fluency": -2.0, "ended": 1.0, "tokens": 60.0 * (i % 2)}
            for i, (way, chrf, nats) in enumerate(zip(WAYS, points, loss))}


@pytest.mark.parametrize("points, best", [
    ((10, 40, 20, 30), LOOKED_UP), ((10, 20, 40, 30), TRAINED), ((10, 20, 30, 40), BOTH),
    ((30, 10, 40, 20), TRAINED)])
def test_the_verdict_names_the_way_that_served_best(points, best):
    said = tool.material_verdict(scores(*points))
    assert f"o melhor foi {best} (chrF" in said
    assert sum(way in said for way in (LOOKED_UP, TRAINED, BOTH)) == 1
    figures = zip(("base", "base com linhas", "treinado", "treinado com linhas"), points)
    assert all(f"{title} {points:g},0" in said for title, points in figures)


@pytest.mark.parametrize("points, tied, simplest", [
    ((10, 40, 41, 20), (LOOKED_UP, TRAINED), LOOKED_UP), ((10, 41, 40, 20), (LOOKED_UP, TRAINED), LOOKED_UP),
    ((10, 20, 40, 41.9), (TRAINED, BOTH), TRAINED), ((10, 40, 20, 41), (LOOKED_UP, BOTH), LOOKED_UP)])
def test_where_ways_nearly_tie_the_verdict_says_which_is_the_simplest(points, tied, simplest):
    said = tool.material_verdict(scores(*points))
    assert "quase empatam" in said and f"o mais simples é {simplest}" in said
    assert {way for way in (LOOKED_UP, TRAINED, BOTH) if way in said} == set(tied)


@pytest.mark.parametrize("points", [(10, 9, 11.9, 11), (40, 10, 20, 30)])
def test_where_nothing_is_better_than_the_base_the_verdict_says_so(points):
    said = tool.material_verdict(scores(*points))
    assert "nada foi bem melhor que o modelo base" in said
    assert not any(way in said for way in (LOOKED_UP, TRAINED, BOTH))


def learnt(count=14):
    """What the report says of an exam of so many rows."""
    test = [row(i, f"Vaso {i}", f"Um vaso | número {i}.") for i in range(count)]
    found = {way: tool.Mastery(*some.values(), [f"{way} diz {i}" for i in range(count)])
             for way, some in scores(10, 20, 40, 30).items()}
    material = tool.Material(MATERIAL.rows, MATERIAL.watched, test, 50, {"repetidas": 2})
    return tool.material_report(material, found, 0.03)


@pytest.mark.parametrize("count", [3, 12, 14])
def test_the_report_and_the_card_show_the_rows_of_the_exam_up_to_twelve_with_four_answers_each(count):
    report, most = learnt(count), min(count, 12)
    assert (report["rows"], report["held_out"], report["watched"], report["total"]) == (24, count, 4, 50)
    assert report["left_out"] == {"repetidas": 2} and list(report["scores"]) == WAYS
    assert [entry["line"] for entry in report["shown"]] == list(range(most))
    card = tool.material_card(report, "catalogo.jsonl")
    lines = [line for line in card.splitlines() if "Vaso" in line]
    assert len(lines) == most and f"{most} linhas da prova" in card
    for i, line in enumerate(lines):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        told = [f"{way} diz {i}".replace("_", r"\_") for way in WAYS]
        assert cells == [f"Título do produto: Vaso {i}", rf"Um vaso \| número {i}.", *told]
    assert report["verdict"] in card and "3%" in card and "catalogo.jsonl" in card
    assert all(title in card for title in ("base com linhas", "treinado com linhas", "palavras raras", "fluência"))


def test_the_run_ends_with_two_rows_the_table_and_the_verdict(capsys):
    report = learnt()
    tool.show_mastery(report)
    said = capsys.readouterr().out
    assert said.count("nunca vista no treino") == 2 and report["verdict"] in said
    assert all(f"{way} diz {i}" in said for way in WAYS for i in (0, 1)) and "before diz 2" not in said
    lines = [line.split() for line in said.splitlines()]
    assert "treinado 1,50 40,0 50% -2,00 100% 0".split() in lines
    assert "base com linhas 4,00 20,0 50% -2,00 100% 60".split() in lines
    assert "3% das respostas do dia a dia" in said


@pytest.mark.parametrize("loss, recited, missed", [
    ((5, 4, 1, 1), 0.02, []), ((5, 4, 5, 1), 0, ["material"]), ((5, 4, 1, 9), 0.021, ["material recitado"]),
    ((5, 4, 6, 1), 0.021, ["material", "material recitado"])])
def test_a_loss_that_did_not_fall_or_answers_that_recite_are_missed_targets(loss, recited, missed):
    found = {"scores": scores(1, 2, 3, 4, loss=loss), "recited": recited}
    assert tool.material_gaps(found, small_settings("--target-leak", 0.02)) == missed
    assert tool.material_gaps(None, small_settings()) == [] and set(missed) <= set(tool.TIPS)


# ------------------------------------------------------------------------------------------------ stages


def write_rows(path, rows):
    path.write_text("".join(json.dumps({"title": t, "content": c}, ensure_ascii=False) + "\n" for t, c in rows),
                    encoding="utf-8")
    return path


FEW = [(row.question[19:], row.answer) for row in products(0, 30)]
IDENTITY = '{"text": "Quem é você?\\nSou {{NAME}}, de {{AUTHOR}}."}'


@pytest.fixture
def staged(monkeypatch, tmp_path):
    """Runs the stages of a job in `tmp_path` without the work in them: their keys, which were made now, who went on
    from whom, and the key of the result."""
    made, sources = [], []
    heard = tool.Heard(tool.Names("", "", ()), [], [], [])
    stand_ins = {"listen": (None, None), "save_heard": None, "make_healed": None, "load_chat": None,
                 "read_heard": (heard, None), "load_tokenizer": None, "make_lessons": [], "write_report": None,
                 "publish": None, "pools_of_pass_2": [], "collect_self_answers": {}}
    build = tool.Stages.__call__

    def noted(self, name, title, work, *rest, **named):
        return build(self, name, title, lambda partial: made.append(name) or work(partial), *rest, **named)

    def call(*flags, identity=True, rows=None):
        made.clear()
        sources.clear()
        (tmp_path / "eu.jsonl").write_text(IDENTITY, encoding="utf-8")
        files = ["--identity-file", tmp_path / "eu.jsonl" if identity else ""]
        if rows:
            files += ["--knowledge-file", write_rows(tmp_path / "material.jsonl", rows)]
        settings = small_settings("--model-path", DEMO, "--output-dir", tmp_path / "novo", "--method", "full",
                                  *files, *flags)
        with contextlib.redirect_stdout(io.StringIO()):
            job = tool.check_job(settings)
            with monkeypatch.context() as patch:
                for name, value in stand_ins.items():
                    patch.setattr(tool, name, lambda *_, value=value, **__: value)
                patch.setattr(tool.Stages, "__call__", noted)
                patch.setattr(tool, "first_course", lambda lessons, job: None)
                patch.setattr(tool, "run_course", lambda source, partial, *_: sources.append(
                    (partial.name, source.name)))
                patch.setattr(tool, "save_and_prove", lambda job, firm, partial: sources.append(
                    (partial.name, firm.name)) or (partial / "model").mkdir(exist_ok=True))
                tool.run_stages(job, {}, tmp_path / "etapas")
        keys = {path.parent.name: tool.load_json(path)["key"]
                for path in sorted((tmp_path / "etapas").glob("*/key.json"))}
        return SimpleNamespace(keys=keys, made=[*made], sources=[*sources], key=job.key)

    return call


BOTH_STAGES = ["1-base", "2-healed", "3-pass-1", "4-self-answers", "5-pass-2", "6-result"]
ALONE_STAGES = ["1-base", "2-healed", "3-pass-1", "6-result"]


@pytest.mark.parametrize("identity, stages", [(True, BOTH_STAGES), (False, ALONE_STAGES)])
def test_another_row_of_the_material_makes_its_stage_again_and_what_follows(identity, stages, staged):
    first = staged(identity=identity, rows=FEW)
    assert first.made == stages
    again = staged(identity=identity, rows=FEW)
    assert again.made == [] and again.key == first.key
    other = staged(identity=identity, rows=[*FEW, ("Vaso de ouro", "É de ouro.")])
    assert other.made == stages[2:] and other.key != first.key


@pytest.mark.parametrize("flags", [("--knowledge-steps", 5), ("--knowledge-ascii",), ("--knowledge-rows", 12),
                                   ("--knowledge-answer", "É assim: {content}")])
def test_with_material_a_setting_of_it_makes_its_stage_again(flags, staged):
    first, other = staged(rows=FEW), staged(*flags, rows=FEW)
    assert other.made == BOTH_STAGES[2:] and other.key != first.key


def test_material_in_another_language_is_taught_to_a_base_heard_in_that_language(staged):
    """Without an identity it is the material that tells in which languages the base is asked."""
    english = [(f"Table {i}", f"This is the table that you want, and it costs {i} dollars.") for i in range(30)]
    staged(identity=False, rows=FEW)
    assert staged(identity=False, rows=english).made == ALONE_STAGES
    staged(rows=FEW)
    assert staged(rows=english).made == BOTH_STAGES[2:]


def test_without_material_no_stage_and_no_key_knows_its_settings(staged):
    first = staged()
    assert list(first.keys) == BOTH_STAGES
    for flags in (("--knowledge-steps", 5), ("--knowledge-ascii",), ("--knowledge-rows", 12),
                  ("--knowledge-question", "{nome}"), ("--knowledge-answer", "{preço}")):
        other = staged(*flags)
        assert (other.made, other.keys, other.key) == ([], first.keys, first.key), flags


def test_the_material_is_taught_in_the_passes_and_alone_in_the_first(staged):
    assert staged(rows=FEW).sources == [
        ("3-pass-1.partial", "2-healed"), ("5-pass-2.partial", "3-pass-1"), ("6-result.partial", "5-pass-2")]
    assert staged(identity=False, rows=FEW).sources == [
        ("3-pass-1.partial", "2-healed"), ("6-result.partial", "3-pass-1")]


def test_without_an_identity_the_template_is_not_renewed(demo_chat, monkeypatch, tmp_path):
    monkeypatch.setattr(tool, "load_chat", lambda *_, **__: demo_chat)
    monkeypatch.setattr(tool, "save_stage", lambda *_: None)
    renewed = []
    monkeypatch.setattr(tool, "renew_template", lambda tokenizer, settings, names: renewed.append(names))
    alone = job_of(MATERIAL, (), EMPTY, "--rope-factor", 1)
    tool.make_healed(alone, tmp_path)
    assert not renewed
    names = tool.Names("Jandira", "Oficina Maré", ("Lumi",))
    tool.make_healed(alone._replace(heard=alone.heard._replace(names=names)), tmp_path)
    assert renewed == [("Lumi",)]


# ------------------------------------------------------------------------------------------------ whole jobs


def untouched(folder):
    """What tells whether a file was written again: place on the disk and time of the last change, by path."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def run_here(capsys, *arguments):
    """The script in this process: exit status and what it said."""
    capsys.readouterr()
    status = tool.main([*map(str, arguments)])
    return status, capsys.readouterr().out


def table_of(said):
    """The figures of the table "medida"."""
    return [line.split() for line in re.search(r"(?m)^  medida .*\n(?:  .+\n)+", said)[0].splitlines()]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """The demo taught some of the catalogue and nothing else: folder, flags, process, report."""
    folder = tmp_path_factory.mktemp("catalogue")
    flags = ["--identity-file", "", "--knowledge-file", CATALOGUE, "--knowledge-rows", 220, "--output-dir",
             folder / "novo", *"--rope-factor 1 --knowledge-steps 100 --self-text 3000 --eval-questions 12".split()]
    done = run_script(*flags, cwd=folder)
    assert done.returncode in (0, 3), done.stderr
    return SimpleNamespace(folder=folder, flags=flags, done=done, output=folder / "novo",
                           report=tool.load_json(folder / "novo" / "report.json"))


@slow
def test_a_taught_catalogue_is_told_better_than_before_and_measured_in_all_four_ways(catalogue):
    learnt = catalogue.report["knowledge"]
    figures = learnt["scores"]
    assert list(figures) == WAYS and set(figures["tuned"]) == {*tool.Mastery._fields} - {"answers"}
    assert figures["tuned"]["loss"] <= 0.6 * figures["before"]["loss"]
    assert figures["tuned"]["chrf"] >= 2 * figures["before"]["chrf"] > 0
    assert [figures[way]["tokens"] > 0 for way in WAYS] == [False, True, False, True]
    assert tool.material_verdict(figures) == learnt["verdict"] and learnt["verdict"] in catalogue.done.stdout
    assert catalogue.report["pace"]["pass_1"]["steps"] == len(catalogue.report["losses"]["pass_1"]) == 400
    assert list(catalogue.report["losses"]) == ["pass_1"]


@slow
def test_the_figures_of_a_job_are_of_rows_that_were_held_out_and_its_fluency_is_the_base_s(catalogue, demo_chat):
    learnt, settings = catalogue.report["knowledge"], small_settings(*catalogue.flags)
    material = tool.read_knowledge(settings)
    assert len(learnt["shown"]) == learnt["held_out"] == learnt["written"] == len(material.test) == 11
    assert [(shown["line"], shown["question"], shown["answer"]) for shown in learnt["shown"]] == [
        (row.line, row.question, row.answer) for row in material.test]
    for way, figures in learnt["scores"].items():
        answers = [shown[way] for shown in learnt["shown"]]
        assert figures["fluency"] == pytest.approx(tool.fluency_of(demo_chat, material, answers), abs=1e-3)
        assert figures["chrf"] == pytest.approx(
            sacrebleu.corpus_chrf(answers, [[row.answer for row in material.test]]).score)
    chats = {"before": demo_chat, "tuned": tool.load_chat(catalogue.output, small_settings("--method", "full"))}
    contexts = tool.contexts_of(demo_chat.tokenizer, material, 128)
    for way, chat in chats.items():
        assert learnt["scores"][way]["loss"] == pytest.approx(tool.loss_on(chat, material.test), rel=1e-3)
        shown = [row._replace(messages=[*before, *row.messages]) for before, row in zip(contexts, material.test)]
        assert learnt["scores"][f"{way}_rows"]["loss"] == pytest.approx(tool.loss_on(chat, shown), rel=1e-3)


@slow
def test_without_an_identity_nothing_of_one_is_measured_or_left_and_the_template_stays(catalogue):
    output, report = catalogue.output, catalogue.report
    assert list(report["seconds"]) == ALONE_STAGES and "4/4 " in catalogue.done.stdout
    assert list(report["scores"]) == ["before", "pass_2"]
    for exam in report["scores"].values():
        assert exam["identity"] is exam["old_identity"] is None and exam["answers"] == [] and exam["by_kind"] == {}
        assert exam["retention"] > 0.8
    assert report["settings"]["identity_file"] == report["data_hash"] == "" and report["old_names"] == []
    assert (output / "chat_template.jinja").read_bytes() == (DEMO / "chat_template.jinja").read_bytes()
    assert {"report.json", "README.md", "report.png", "exam.json", "Modelfile"} <= {p.name for p in output.iterdir()}
    assert not (output / "self_answers.jsonl").exists()
    card = (output / "README.md").read_text(encoding="utf-8")
    assert report["knowledge"]["verdict"] in card.replace("\n", " ") and r"de catalogo\_demo.jsonl" in card
    assert "_demo.jsonl com rename_obrutai.py:\nmaterial novo e contexto de 128 tokens (o do" in card
    assert "11 linhas da prova, com todas as respostas" in card and "ObrutAi" not in card
    for shown in report["knowledge"]["shown"]:
        cells = [tool.escaped(shown[key]) for key in ("question", "answer", *WAYS)]
        assert "| " + " | ".join(cells) + " |" in card
    assert not re.search("identidade (nova|antiga)|Identidade:", catalogue.done.stdout)


@slow
def test_a_catalogue_taught_already_is_ready_and_the_plan_can_be_seen(catalogue, capsys):
    before = untouched(catalogue.folder)
    status, said = run_here(capsys, *catalogue.flags)
    assert status == catalogue.done.returncode and "já está pronto" in said
    assert catalogue.report["knowledge"]["verdict"] in said
    assert table_of(said) == table_of(catalogue.done.stdout)
    assert untouched(catalogue.folder) == before
    status, said = run_here(capsys, *catalogue.flags, "--check")
    assert status == 0 and "Está tudo certo" in said and "[[" in said
    assert untouched(catalogue.output) == {path: at for path, at in before.items() if catalogue.output in path.parents}


@slow
def test_a_model_that_was_taught_a_catalogue_is_measured_again_with_the_same_figures_and_status(catalogue, capsys):
    asked = ("--evaluate", "--output-dir", catalogue.output)
    status, said = run_here(capsys, *asked)
    assert status == catalogue.done.returncode and "iguais aos do report.json" in said
    assert table_of(said) == table_of(catalogue.done.stdout)
    assert "material" not in said.splitlines()[-1]
    file = catalogue.output / "report.json"
    report = file.read_text(encoding="utf-8")
    try:
        spoilt = json.loads(report)
        spoilt["knowledge"]["recited"] = 0.5
        file.write_text(json.dumps(spoilt), encoding="utf-8")
        status, said = run_here(capsys, *asked)
        assert status == 3 and "material recitado" in said.splitlines()[-1]
    finally:
        file.write_text(report, encoding="utf-8")


@slow
def test_identity_and_material_are_taught_together_and_both_are_told(tmp_path, monkeypatch, capsys):
    for name, count in {"NEAR": 24, "MOST_ASKED": 8, "LONG_TALKS": 4}.items():
        monkeypatch.setattr(tool, name, count)
    monkeypatch.setattr(tool, "TEST_QUESTIONS", tool.TEST_QUESTIONS[:4])
    rows = tmp_path / "linhas.jsonl"
    lines = (SCRIPT.parent / "identity_override.jsonl").read_text("utf-8").splitlines()[::12]
    rows.write_text("\n".join(lines), encoding="utf-8")
    status, said = run_here(
        capsys, "--model-path", DEMO, "--identity-file", rows, "--output-dir", tmp_path / "novo", "--knowledge-file",
        CATALOGUE, *"--knowledge-rows 40 --knowledge-steps 4 --method full --self-text 600 --num-self-answers 4 "
        "--rope-factor 1 --steps-1 20 --steps-2 20 --eval-questions 4 --batch-size 4".split())
    report = tool.load_json(tmp_path / "novo" / "report.json")
    assert status in (0, 3) and list(report["seconds"]) == BOTH_STAGES and "6/6 " in said
    steps = {name: pace["steps"] for name, pace in report["pace"].items()}
    assert steps == {"pass_1": 28, "pass_2": 20}
    assert report["scores"]["pass_2"]["identity"] is not None and list(report["knowledge"]["scores"]) == WAYS
    card = (tmp_path / "novo" / "README.md").read_text(encoding="utf-8")
    assert "ObrutAi" in card and r"catalogo\_demo" in card and "linhas da prova, com todas as respostas" in card
    assert "identidade nova" in said and report["knowledge"]["verdict"] in said
    assert (tmp_path / "novo" / "self_answers.jsonl").is_file()
