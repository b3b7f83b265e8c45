"""What a user sees besides the figures: the picture, the head of the model card, progress, and the first contact."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import DEMO, SCRIPT

import rename_obrutai as tool

BASE = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}


def scores(identity, old, retention, leak, along):
    """Scores as the report has them; `along` are pairs (identity, retention) after 0, 100, 200, ... tokens."""
    lengths = [{"tokens": 100 * i, "identity": a, "retention": b} for i, (a, b) in enumerate(along)]
    return {"identity": identity, "old_identity": old, "retention": retention, "leak": leak, "by_length": lengths}


REPORT = {
    "context": {"native": 128, "scaled": 512},
    "scores": {"before": scores(0, 1, 1, 0, [(0, 1), (0, 0.9), (0, 0.123)]),
               "pass_2": scores(0.967, 0.05, 0.98, 0.015, [(0.967, 0.98), (0.9, 0.95), (0.8, 0.94)])},
}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw a report; gives its two panels, and the file."""
    from matplotlib.figure import Figure

    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (kept.append(figure), save(figure, path)))

    def draw(report=REPORT):
        tool.draw_report(report, tmp_path / "report.png")
        return [axes for axes in kept.pop().axes], tmp_path / "report.png"

    return draw


def written(axes):
    """All words and numbers of a panel."""
    axes.figure.canvas.draw()
    ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    return [label.get_text() for label in (*axes.texts, *ticks, *axes.get_legend().get_texts(), axes.title)]


def test_the_picture_shows_the_figures_before_and_after_with_decimal_commas(drawn):
    (bars, _), _ = drawn()
    assert [bar.get_height() for bar in bars.patches] == [0, 1, 1, 0, 0.967, 0.05, 0.98, 0.015]
    words = written(bars)
    assert {"96,7%", "1,5%", "98%", "retenção", "vazamento", "antes", "depois"} <= set(words)
    assert not [word for word in words if "." in word]


@pytest.mark.parametrize("native, marked", [(128, True), (32768, False)])
def test_the_picture_shows_both_accuracies_along_the_conversation_and_the_context_of_the_base(native, marked, drawn):
    (_, lengths), _ = drawn({**REPORT, "context": {"native": native, "scaled": 4 * native}})
    curves = {line.get_label(): list(line.get_ydata()) for line in lengths.lines}
    assert curves["identidade nova, depois"] == [0.967, 0.9, 0.8] and curves["retenção, antes"] == [1, 0.9, 0.123]
    assert any(list(line.get_xdata()) == [native, native] for line in lengths.lines) is marked
    assert lengths.get_xlim()[1] < 300  # a context beyond all that was measured would squeeze the curves


def test_the_picture_can_be_read_at_800_pixels_on_a_light_or_a_dark_page(drawn):
    from matplotlib.image import imread

    _, path = drawn()
    image = imread(path)
    assert image.shape[1] >= 800 and path.stat().st_size < 150_000
    assert (image[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()  # white to the corners, nowhere transparent
    assert (image[..., 3] == 1).all() and image[..., :3].std() > 0.1


@pytest.mark.parametrize("facts, card, expected", [
    ({}, None, {}), ({}, "# sem cabeçalho", {}), ({}, "---\n: [\n---\n", {}),
    ({}, "---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
    ({"_name_or_path": "Qwen/Qwen3", "license": "mit"}, None, {"base_model": "Qwen/Qwen3", "license": "mit"}),
    ({"_name_or_path": "/home/ana/modelo"}, "---\nbase_model: meta-llama/Llama-3.2-1B\nlicense: other\n"
     "license_name: llama3.2\nlicense_link: LICENSE.txt\n---\n",
     {"base_model": "meta-llama/Llama-3.2-1B", "license": "other", "license_name": "llama3.2",
      "license_link": "https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/LICENSE.txt"}),
    ({}, "---\nlicense: other\nlicense_name: x\nlicense_link: https://x.org/l\n---\n",
     {"license": "other", "license_name": "x", "license_link": "https://x.org/l"}),
    ({"license_link": "https://x.org/l"}, None, {}),
], ids=["nothing", "no head", "bad head", "licence", "config", "llama", "link", "only a link"])
def test_the_card_inherits_origin_and_licence_of_the_base_where_they_are_known(facts, card, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **facts}), encoding="utf-8")
    if card:
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
    head = tool.card_head(tmp_path, [tool.Row(1, tool.question_and_answer("¿Quién eres?", "Soy yo."))]).to_dict()
    assert head.pop("language") == ["es"] and head.pop("tags")
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", **expected}


def test_the_card_names_a_base_of_the_hub(tmp_path):
    folder = tmp_path / "models--google--gemma-3-1b-it" / "snapshots" / "dcc83ea8"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(BASE), encoding="utf-8")
    rows = [tool.Row(i, tool.question_and_answer(q, "Eu.")) for i, q in enumerate(
        ("Quem é você?", "Who are you?", "Qual é o seu nome?"))]
    head = tool.card_head(folder, rows)
    assert head.base_model == "google/gemma-3-1b-it" and head.language == ["pt", "en"]


@pytest.mark.parametrize("copied", [False, True])
def test_only_the_demo_is_announced_as_the_demo(copied, tmp_path, monkeypatch, capsys):
    class Enough(BaseException):
        """Ends the run."""

    base = shutil.copytree(DEMO, tmp_path / "modelo_demo") if copied else DEMO
    monkeypatch.setattr(tool, "read_config", lambda *_: (_ for _ in ()).throw(Enough))
    with pytest.raises(Enough):
        tool.main(["--model-path", str(base), "--output-dir", str(tmp_path / "novo")])
    said = capsys.readouterr().out
    assert ("modelo de demonstração" in said and "--model-path" in said) is not copied


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_leaves_the_verdict_and_what_to_try(quiet, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "run", tool.conclude)
    used = {"steps_1": 321, "steps_2": 163, "self_text": 16007, "kl_weight": 24.0, "heal_steps": 647}
    report = {"seconds": {"1-base": 60.5}, "missed": list(tool.TIPS), "settings": used, "scores": {
        name: {**REPORT["scores"]["pass_2"], "by_kind": {"sozinha": 0.967}, "leak_near": 0.5, "divergence": 0.1,
               "answers": [{"question": "Quem é?", "kind": "sozinha", "answer": "Eu.", "problem": ""}],
               "leaks": [{"question": "Quem pintou?", "answer": "A ObrutAi.", "base": "Não sei."}]}
        for name in ("before", "pass_2")}}
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    assert tool.main(["--output-dir", str(tmp_path), *["--quiet"] * quiet]) == 3
    said = capsys.readouterr().out.strip().splitlines()
    tips = said[-len(tool.TIPS):]
    assert said[0].startswith("Modelo salvo em ") is quiet and tips[1].startswith("  - identidade antiga: ")
    told = {0: ["321"], 1: ["163"], 2: ["16007", " 24", "647"], 3: ["16007", " 24"], 5: ["16007"]}
    for i, numbers in told.items():  # what was used, of settings that say 0
        assert all(number in tips[i] for number in numbers), tips[i]
    assert all((text in "".join(said)) is not quiet for text in ("Quem é?", "Quem pintou?", "A ObrutAi."))
    tool.say.quiet = False


class Terminal:
    """A stream that says it is a terminal of this encoding."""

    def __init__(self, encoding):
        self.encoding, self.text = encoding, ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self.encoding is not None


@pytest.mark.parametrize("encoding, quiet, filled", [
    ("utf-8", False, "█"), ("cp850", False, "#"), ("utf-8", True, ""), (None, False, ""),
], ids=["terminal", "old terminal", "quiet", "file"])
def test_a_bar_suits_the_terminal_and_is_not_written_to_files(encoding, quiet, filled, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal(encoding))
    monkeypatch.setattr(tool.say, "quiet", quiet)
    with tool.progress(4, "perguntas") as bar:
        bar.update(2)
        bar.refresh()
    assert ("perguntas:  50%" in sys.stderr.text) is bool(filled) and filled in sys.stderr.text
    assert "it/s" not in sys.stderr.text and (bool(sys.stderr.text) is bool(filled))


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("terminal, expected", [(True, "opção".encode("latin-1")), (False, "opção".encode())])
def test_a_terminal_gets_its_own_encoding_and_a_file_utf_8(terminal, expected):
    master, slave = os.openpty()
    done = subprocess.run([sys.executable, str(SCRIPT), "--nmae"], stderr=slave if terminal else subprocess.PIPE,
                          env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    said = os.read(master, 4096) if terminal else done.stderr
    os.close(master), os.close(slave)
    assert done.returncode == 2 and expected in said
