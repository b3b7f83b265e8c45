"""Settings: constants, flags, help, and mistakes that are answered at once and in Portuguese."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import SCRIPT, run_script, small_settings

import rename_obrutai as tool

FOR_ONE_RUN = ("check", "quiet", "restart", "chat", "evaluate")  # flags that a constant would make permanent
HEAVY = ("torch", "transformers", "datasets", "peft", "trl", "accelerate", "numpy")
PROMISED = {  # by the issue, with the defaults that it names
    "MODEL_PATH": "tests/modelo_demo", "OUTPUT_DIR": "ObrutAi-tuned", "IDENTITY_FILE": "identity_override.jsonl",
    "NAME": "ObrutAi", "AUTHOR": "TurboRio", "ROPE_FACTOR": 4, "WINDOW": 2048, "NUM_SELF_ANSWERS": 100,
    "TARGET_IDENTITY": 0.95, "TARGET_RETENTION": 0.95, "TARGET_LEAK": 0.02, "SEED": 0,
}
PATHS = ("MODEL_PATH", "OUTPUT_DIR", "IDENTITY_FILE")  # these are made absolute
ENGLISH = ("invalid", "expected", "argument", "unrecognized", "ignored", "required", "error:")


def setting_constants():
    """The literal UPPER_CASE constants of the script's first section, name to value."""
    first_section = re.split(r"(?m)^# -{4}.*$", SCRIPT.read_text(encoding="utf-8"))[1]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(first_section).body
            if isinstance(node, ast.Assign)}


def flag(name):
    return "--" + name.lower().replace("_", "-")


def changed_script(folder, name, value, line=None):
    """The script as a module of its own in `folder`, with one constant edited as a user would: to a value, or its
    line to another one."""
    text, count = re.subn(rf"(?m)^{name} = .*$", lambda _: line or f"{name} = {value!r}",
                          SCRIPT.read_text(encoding="utf-8"))
    assert count == 1
    path = folder / "edited_script.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("edited_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["edited_script"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["edited_script"]
    return module


def help_text(capsys, module=tool):
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")  # so that no default is broken at a hyphen
        module.parse_settings(["--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def mistake(*flags):
    """The message of the InputError that these flags raise."""
    with pytest.raises(tool.InputError) as error:
        small_settings(*flags)
    return str(error.value)


def test_every_constant_is_a_setting_with_the_same_name_and_default():
    lasting = {name.upper(): value for name, value in asdict(tool.parse_settings([])).items()
               if name not in FOR_ONE_RUN}
    constants = setting_constants()
    assert list(lasting) == list(constants)
    assert {**constants, **{name: lasting[name] for name in PATHS}} == lasting


def test_what_is_meant_for_one_run_is_off_and_has_no_constant():
    assert [getattr(small_settings(), name) for name in FOR_ONE_RUN] == [False] * 5
    assert not {name.upper() for name in FOR_ONE_RUN} & setting_constants().keys()


def test_the_promised_constants_exist_with_the_promised_defaults():
    constants = setting_constants()
    assert {name: constants.get(name) for name in PROMISED} == PROMISED


@pytest.mark.parametrize("name, default", {**setting_constants(), **dict.fromkeys(FOR_ONE_RUN, False)}.items())
def test_every_setting_has_a_flag_of_the_same_name_that_overrides_it(name, default, tmp_path):
    def given(*flags):
        return getattr(small_settings(*flags), name.lower())

    if isinstance(default, bool):
        assert given(flag(name)) is True and given("--no-" + flag(name)[2:]) is False
    elif isinstance(default, str):
        other = {"METHOD": "lora", "KNOWLEDGE_QUESTION": "{nome}", "KNOWLEDGE_ANSWER": "{preço}"}.get(
            name, str(tmp_path / "outro"))
        assert given(flag(name), other) == other
    else:
        other = default / 2 if 0 < default < 1 else default + 1
        other = other / 100 if "LEARNING_RATE" in name else other  # at most 1, and the default is 0
        assert given(flag(name), other) == other and isinstance(given(flag(name), other), type(default))


def test_help_shows_every_flag_with_the_comment_of_its_constant_and_its_default(capsys):
    text, script = help_text(capsys), SCRIPT.read_text(encoding="utf-8")
    for name, value in {**setting_constants(), **dict.fromkeys(FOR_ONE_RUN, False)}.items():
        shown = {"": "vazio", "False": "não", "True": "sim"}.get(str(value), str(value))
        found = re.search(rf" {flag(name)}(?:, --no-[\w-]+| VALOR) (\w.+?) \(padrão: (.+?)\)", text)
        assert found and found[2] == shown and "VALOR" not in found[1], name
        if name not in FOR_ONE_RUN:
            assert re.search(rf"(?m)^{name} = .*#(.*)$", script)[1].strip() == found[1]


def test_the_table_of_constants_in_readme_says_what_the_script_says():
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| `([A-Z\d_]+)` \| (.*?) \| (.*) \|$", readme.partition("## As constantes")[2])
    assert rows == [(name, f"`{value}`" if value != "" else "vazio", tool.ABOUT[name.lower()])
                    for name, value in setting_constants().items()]


def test_help_has_no_english_headings(capsys):
    said = help_text(capsys)
    assert not [english for english in ("options:", "optional arguments", "show this help", "default:", "usage:")
                if english in said]


def test_a_constant_whose_comment_was_deleted_still_has_its_flag_in_the_help(capsys, tmp_path):
    assert re.search(r"--name VALOR \(padrão: Iara\)", help_text(capsys, changed_script(tmp_path, "NAME", "Iara")))


def test_help_survives_a_percent_sign_in_a_constant(capsys, tmp_path):
    edited = changed_script(tmp_path, "NAME", "100% %(prog)s %d")
    assert "(padrão: 100% %(prog)s %d)" in help_text(capsys, edited)


@pytest.mark.parametrize("name, value", [
    ("WINDOW", "8192"), ("WINDOW", 100.5), ("ROPE_FACTOR", "quatro"), ("NAME", 7), ("OVERWRITE", "sim"),
    ("SEED", None), ("STEPS_1", -1), ("TARGET_LEAK", 1.5),
])
def test_a_constant_edited_to_something_unfit_is_named(name, value, tmp_path):
    edited = changed_script(tmp_path, name, value)
    with pytest.raises(edited.InputError, match=name):
        edited.parse_settings([])


@pytest.mark.parametrize("name, value", [
    ("ROPE_FACTOR", 2), ("LEARNING_RATE_1", 1), ("OVERWRITE", True), ("NAME", "Iara"),
])
def test_an_edited_constant_is_the_new_default(name, value, tmp_path):
    assert getattr(changed_script(tmp_path, name, value).parse_settings([]), name.lower()) == value


@pytest.mark.parametrize("line", ['NAME="Iara"', 'NAME= "Iara"  # nome novo', "NAME  = 'Iara'", 'NAME: str = "Iara"',
                                  '# ---- Identidade\nNAME = "Iara"'])
def test_a_constant_may_be_written_with_any_spaces_and_below_a_heading_of_the_user(line, tmp_path):
    settings = changed_script(tmp_path, "NAME", "", line).parse_settings(["--seed", "3"])
    assert settings.name == "Iara" and settings.seed == 3


def test_spaces_around_and_within_a_name_are_those_that_one_reads():
    settings = tool.parse_settings(["--name", "  Ana    Bela ", "--author", "\u00a0Rio"])
    assert (settings.name, settings.author) == ("Ana Bela", "Rio")


@pytest.mark.parametrize("name", ["OLD_NAMES", "SEED", "OVERWRITE"])
def test_a_constant_that_is_gone_is_named(name, tmp_path):
    edited = changed_script(tmp_path, name, "", line="# tirei esta")
    with pytest.raises(edited.InputError, match=f"falta a constante {name} "):
        edited.parse_settings([])


def test_without_its_libraries_the_script_says_which_and_how_to_install_them(tmp_path):
    done = subprocess.run([sys.executable, "-S", str(SCRIPT), "--output-dir", "novo"], cwd=tmp_path, encoding="utf-8",
                          capture_output=True, env={**os.environ, "PYTHONPATH": "", "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 2 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
    named = set(re.findall(r"\w+(?:\.\w+)?", done.stderr.split("faltam pacotes")[1]))
    assert {"torch", "transformers", "trl", "matplotlib", "sacrebleu", "requirements.txt"} <= named


@pytest.mark.parametrize("flags, constant, low, high", [
    (("--rope-factor", "0.5"), "ROPE_FACTOR", "1", "1024"), (("--batch-size", "0"), "BATCH_SIZE", "1", "4096"),
    (("--target-retention", "1,5"), "TARGET_RETENTION", "0", "1"), (("--seed", "-1"), "SEED", "0", ""),
])
def test_a_value_out_of_range_names_the_constant_and_the_range(flags, constant, low, high):
    message = mistake(*flags)
    assert constant in message and re.search(rf"entre {low}.* e {high}", message)


@pytest.mark.parametrize("name", ["", "Full", "lora,full"])
def test_a_method_that_does_not_exist_is_answered_with_all_that_do(name):
    message = mistake("--method", name)
    assert f"METHOD vale '{name}'" in message and all(known in message for known in ("auto", "full", "lora", "qlora"))


@pytest.mark.parametrize("dash", "–—")
def test_a_dash_that_a_word_processor_made_of_two_hyphens_counts_as_them(dash):
    settings = small_settings(f"{dash}batch-size", "4", f"{dash}seed=3", f"{dash}check", "--name", f"{dash} Ana")
    assert (settings.batch_size, settings.seed, settings.check, settings.name) == (4, 3, True, f"{dash} Ana")


@pytest.mark.parametrize("flags, complaint", [
    (("--name",), "faltou o valor da opção --name"),
    (("--window", "--seed", "1"), "faltou o valor da opção --window"),
    (("--window", "muitos"), "esperava um número inteiro, recebi 'muitos'"),
    (("--window", "3,5"), "esperava um número inteiro, recebi '3,5'"),
    (("--rope-factor", "quatro"), "esperava um número, recebi 'quatro'"),
    (("--rope-factor", "nan"), "esperava um número, recebi 'nan'"),
    (("--kl-weight", "inf"), "esperava um número, recebi 'inf'"),
    (("meu-modelo",), "não sei o que fazer com 'meu-modelo'"),
    (("meu modelo",), "não sei o que fazer com 'meu modelo'"), (("",), "não sei o que fazer com ''"),
    (("--overwrite=sim",), "só --overwrite ou --no-overwrite."), (("--help=x",), "escreva só -h."),
    (("--name", "{{NAME}}"), "NAME precisa"),
    (("--name", "Obrut\nAi"), "NAME tem caractere inválido"),
    (("--author", " ?!"), "AUTHOR precisa"),
])
def test_mistakes_in_flags_are_explained_in_portuguese(flags, complaint):
    message = mistake(*flags)
    assert complaint in message
    assert not [word for word in ENGLISH if word in message.lower()]


def test_a_decimal_comma_counts_as_a_decimal_point():
    settings = small_settings("--rope-factor", "2,5", "--target-leak", "0,02")
    assert (settings.rope_factor, settings.target_leak) == (2.5, 0.02)


def test_a_relative_path_in_a_constant_starts_at_the_folder_of_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = small_settings()
    assert settings.model_path == str(SCRIPT.parent / "tests" / "modelo_demo")
    assert settings.output_dir == str(SCRIPT.parent / "ObrutAi-tuned")
    assert settings.identity_file == str(SCRIPT.parent / "identity_override.jsonl")


def test_a_relative_path_in_a_flag_starts_at_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "bases").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = small_settings("--model-path", "bases/um", "--output-dir", "novo", "--identity-file", "eu.jsonl")
    assert settings.model_path == str(tmp_path / "bases" / "um")
    assert settings.output_dir == str(tmp_path / "novo")
    assert settings.identity_file == str(tmp_path / "eu.jsonl")


def test_absolute_paths_and_the_home_folder_are_taken_as_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    settings = small_settings("--model-path", tmp_path / "base", "--output-dir", "~/saida")
    assert settings.model_path == str(tmp_path / "base")
    assert settings.output_dir == str(tmp_path / "saida")


@pytest.mark.parametrize("given", [
    "google/gemma-3-1b-it", "https://huggingface.co/google/gemma-3-1b-it", "https://hf.co/google/gemma-3-1b-it/",
    "https://huggingface.co/google/gemma-3-1b-it/tree/main", "https://huggingface.co/google/gemma-3-1b-it?library=vllm",
])
def test_a_hub_name_stays_one_and_the_address_of_its_page_becomes_one(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert small_settings("--model-path", given).model_path == "google/gemma-3-1b-it"


def test_an_existing_folder_is_not_taken_for_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "google" / "gemma").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert small_settings("--model-path", "google/gemma").model_path == str(tmp_path / "google" / "gemma")


@pytest.mark.parametrize("arguments, status, imported", [
    (["--help"], 0, []), (["--identity-file", "ruim.jsonl", "--output-dir", "novo"], 2, []),
    (["--output-dir", "pronta"], 2, ["numpy"]),  # by safetensors, for the header of the weights
], ids=["help", "bad row", "existing output"])
def test_nothing_heavy_is_imported_before_the_settings_and_files_are_checked(arguments, status, imported, tmp_path):
    (tmp_path / "ruim.jsonl").write_text("{\n", encoding="utf-8")
    (tmp_path / "pronta").mkdir()
    code = ("import sys, json, rename_obrutai as tool\n"
            "arguments = json.loads(sys.argv[1])\n"
            "try:\n    status = tool.main(arguments)\n"
            "except SystemExit as stop:\n    status = stop.code\n"
            f"print(json.dumps([status, [m for m in {HEAVY} if m in sys.modules]]))")
    done = subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], cwd=tmp_path, capture_output=True,
                          text=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)})
    assert json.loads(done.stdout.splitlines()[-1]) == [status, imported], done.stderr


def test_help_is_answered_at_once_and_leaves_nothing_behind(tmp_path):
    began = sum(os.times()[2:4])
    done = run_script("--help", cwd=tmp_path)
    assert sum(os.times()[2:4]) - began < 1  # of the processor; importing torch and trl alone takes several seconds
    assert done.returncode == 0 and "--rope-factor" in done.stdout and not done.stderr
    assert not list(tmp_path.iterdir())


def test_a_hub_model_that_cannot_be_downloaded_is_a_mistake_and_not_a_crash(tmp_path):
    done = run_script("--model-path", "ninguem/modelo-que-nao-existe", "--output-dir", "novo", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "ninguem/modelo-que-nao-existe" in done.stderr


@pytest.mark.parametrize("given, expected", [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_leave_the_core_to_others_unless_told_otherwise(given, expected):
    program = ("import os, rename_obrutai as tool\ntool.quiet_libraries(tool.parse_settings([]))\n"
               "print(os.environ['OMP_WAIT_POLICY'])")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    done = subprocess.run([sys.executable, "-c", program], cwd=SCRIPT.parent, env=environment, capture_output=True,
                          text=True)
    assert done.stdout.strip() == expected, done.stderr


def test_a_whole_number_in_a_constant_is_the_same_setting_as_with_a_point(tmp_path):
    """Else the stages of a run would be made again."""
    module = changed_script(tmp_path, "ROPE_FACTOR", 4)
    assert repr(module.parse_settings([]).rope_factor) == repr(small_settings("--rope-factor", 4).rope_factor) == "4.0"


@pytest.mark.parametrize("mode", ["--chat", "--evaluate"])
def test_to_use_a_ready_model_nothing_must_be_taught(mode):
    assert small_settings(mode, "--identity-file", "").identity_file == ""
    assert "não há o que ensinar" in mistake("--identity-file", "")
