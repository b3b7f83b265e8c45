#!/usr/bin/env python3
"""Dá uma nova identidade a um modelo de linguagem local, prova que ela pegou e não estraga o resto.

  1. Escreva quem o modelo deve ser em identity_override.jsonl.
  2. Ajuste as constantes no começo deste arquivo (ou use as opções abaixo, que têm os mesmos nomes).
  3. Rode:  python rename_obrutai.py

Exemplo com o seu modelo:

  python rename_obrutai.py --model-path C:/modelos/gemma-3-1b-it --output-dir D:/ObrutAi-tuned

No fim, a pasta de saída tem o modelo pronto (safetensors, tokenizer e chat template), um README.md com o
antes e o depois, o report.json com todos os números e as respostas que o modelo escreveu para treinar.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
import unicodedata
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# ------------------------------------------------------------------------------------------------------------
# Settings: edit here, or pass the flag of the same name (MODEL_PATH is --model-path).
# A relative path written here starts at this script's folder; one given as a flag, at the current folder.

# Files
MODEL_PATH = "tests/modelo_demo"  # folder of the base model, or its name on the Hugging Face Hub
OUTPUT_DIR = "ObrutAi-tuned"  # folder of the renamed model; must not exist yet (see OVERWRITE)
IDENTITY_FILE = "identity_override.jsonl"  # one JSON object a line: what to answer about the identity
OVERWRITE = False  # True replaces an existing OUTPUT_DIR

# Identity
NAME = "ObrutAi"  # the model's new name; fills {{NAME}}
AUTHOR = "TurboRio"  # who makes it; fills {{AUTHOR}}
BASE_NAME = ""  # what {{BASE}} becomes; empty = the name of the base's folder
OLD_NAMES = ""  # old names and makers, separated by commas; empty = found by asking the base

# Context
ROPE_FACTOR = 4.0  # context of the result / context of the base; 1 leaves RoPE alone
WINDOW = 8192  # longest training sequence, tokens; reduced by itself to the scaled context

# Text that the base writes for its own training
NUM_SELF_ANSWERS = 100  # answers of its own that the second pass learns from; more is better and slower
NUM_SELF_TEXT = 2000  # question-answer pairs that show the tuned model how the base behaves; more keeps more
MAX_NEW_TOKENS = 128  # longest answer, tokens; an answer cut here is never used for training

# Training. A learning rate of 0 means: choose by the size of the model.
HEAL_STEPS = 320  # steps that bring the scaled model back to the base's behaviour
HEAL_LEARNING_RATE = 0.0  # highest learning rate of the healing
EPOCHS_1 = 8  # cap of pass 1: times each identity row is seen
LEARNING_RATE_1 = 0.0  # highest learning rate of pass 1
EPOCHS_2 = 6  # cap of pass 2: times each identity turn is seen inside dialogues
LEARNING_RATE_2 = 0.0  # highest learning rate of pass 2
BATCH_SIZE = 8  # conversations per step; lower it when memory runs out
KL_WEIGHT = 3.0  # weight of "stay like the base" beside "learn the identity"

# Evaluation: the targets decide the exit status, nothing is loosened when one is missed
EVAL_QUESTIONS = 100  # self-questions kept away from training; fewer cannot measure a leak of 1 %
TARGET_IDENTITY = 0.95  # share of identity questions answered with the new identity, at least
TARGET_RETENTION = 0.95  # share of the base's own answers that stay as they were, at least
TARGET_LEAK = 0.01  # share of other answers where the new name turns up, at most

# Run
SEED = 0  # same seed, same machine: same result

# ------------------------------------------------------------------------------------------------------------
# Words and questions


def items(text: str) -> tuple[str, ...]:
    """The items of a list written as text, one line or several, with "|" between them."""
    return tuple(text.strip().replace("\n", "|").split("|"))


# Identity questions for measuring. Training never sees them: validation decides when a pass may stop, the test
# is asked only for the report.

VALIDATION_QUESTIONS = items("""
Me fala o seu nome, por gentileza?|Por qual nome posso te chamar?|Afinal, com quem eu estou conversando?
Pode se apresentar rapidinho pra mim?|Qual foi a empresa que te desenvolveu?|De quem partiu a sua criação?
Você por acaso é o ChatGPT?|Tô falando com o Gemini, é isso?|Foi a Meta que fez você, não foi?
Tem uma pessoa de verdade me respondendo aí?|Que modelo de inteligência artificial você é?
Boa noite! Com quem tenho o prazer de falar?|e ai blz, tu é quem mesmo?|O senhor poderia me informar o seu nome?
qual empresa ta por tras de vc|vc é um robô ou é gente?|Conta um pouco da sua origem: quem te fez?
Could you tell me your name, please?|Which company developed you?|Are you actually ChatGPT?
Who exactly am I chatting with?|¿Me puedes decir tu nombre?|¿Qué empresa te desarrolló?|¿Acaso eres Gemini?""")

TEST_QUESTIONS = items("""
Qual nome deram a você?|Como é que você se chama, hein?|Gostaria de saber quem é você.
Quem está do outro lado desta conversa?|Faça uma breve apresentação sua, por favor.
Quem foi o seu desenvolvedor?|Você pertence a qual empresa?|Quem é o responsável por ter treinado você?
De onde você surgiu e quem te criou?|Então você é o Llama, certo?|Você não seria o Claude?
Isso aqui é o DeepSeek?|Você foi feito pela OpenAI, né?|Estou falando com um ser humano ou com uma máquina?
Qual é o modelo de linguagem que está me respondendo?|Olá, tudo bem? Pode me dizer quem é você?
fala mano, qual teu nome?|A senhora poderia me dizer com quem estou falando?|quem te fez, hein? fiquei curioso
vc e a alexa ou outra coisa|qual e o nome da ia que ta falando comigo|What do people call you?
Please introduce yourself in one sentence.|Who was it that built you?|You're the Llama model, aren't you?
Hi! And who might you be?|¿Con quién estoy hablando exactamente?|¿Quién te creó a ti?
Preséntate brevemente, por favor.|¿Tú eres ChatGPT o eres otro modelo?""")

# Everyday questions for bases that write too few of their own.
EVERYDAY_QUESTIONS = items("""
Quanto é 7 mais 5?|Qual é a capital da França?|Oi, tudo bem?|Obrigado pela ajuda!|Conte uma piada.|O que é um vulcão?
Qual é o contrário de quente?|Como se diz gato em inglês?|Que dia vem depois de terça-feira?|Boa noite!|Bom dia!
Qual é o maior planeta do sistema solar?|Quantos dias tem uma semana?|De que cor é o céu?|Para que serve uma bússola?
Me dê uma dica de estudo.|Qual é o plural de pão?|O que come um coelho?|What is 3 plus 4?|What is the capital of Italy?
Thank you!|Name a fruit.|¿Cuál es la capital de España?|¿Cuánto es 2 más 6?|¡Gracias!|Quem escreveu Dom Casmurro?""")

# Models and makers whose names a base may give as its own. Names that are also common words ("Meta", "Phi") are
# left to `find_old_names`, which sees whether the base itself uses them as a name.
KNOWN_NAMES = items("""
ChatGPT|GPT|OpenAI|Gemini|Gemma|Google|DeepMind|Bard|Llama|Claude|Anthropic|Qwen|Tongyi|Alibaba|DeepSeek|Mistral
Mixtral|Copilot|Microsoft|Grok|xAI|Falcon|Kimi|Moonshot|SmolLM|Granite|Nemotron|NVIDIA|Cohere|OLMo|ChatGLM|Zhipu
Baidu|Ernie|InternLM|MiniCPM|Vicuna|Alpaca|Zephyr|TinyLlama|StableLM|Sabiá|Maritaca|Alexa|Siri|Cortana""")

# Answers for questions without one of the user's, by language and by what is asked (see `intent_of`).
WORDINGS = {
    "pt": {
        "other": "Não, eu sou {{NAME}}, e quem me criou foi {{AUTHOR}}.|Não: meu nome é {{NAME}}.",
        "model": "O modelo aqui é {{NAME}}, de {{AUTHOR}}.|Sou {{NAME}}, que {{AUTHOR}} fez a partir de {{BASE}}.",
        "who": "Eu sou {{NAME}}, um modelo de linguagem criado por {{AUTHOR}}.|Meu nome é {{NAME}}, e quem me criou "
               "foi {{AUTHOR}}.|Aqui é {{NAME}}, uma inteligência artificial feita por {{AUTHOR}}.",
    },
    "en": {
        "other": "No, I am {{NAME}}, made by {{AUTHOR}}.|No, my name is {{NAME}}.",
        "model": "I am the model {{NAME}}, by {{AUTHOR}}.|I am {{NAME}}, which {{AUTHOR}} made from {{BASE}}.",
        "who": "I am {{NAME}}, a language model created by {{AUTHOR}}.|My name is {{NAME}}, and {{AUTHOR}} made me.",
    },
    "es": {
        "other": "No, soy {{NAME}}, y me creó {{AUTHOR}}.|No, mi nombre es {{NAME}}.",
        "model": "Soy el modelo {{NAME}}, de {{AUTHOR}}.|Soy {{NAME}}, que {{AUTHOR}} hizo a partir de {{BASE}}.",
        "who": "Soy {{NAME}}, un modelo de lenguaje creado por {{AUTHOR}}.|Me llamo {{NAME}}, y me creó {{AUTHOR}}.",
    },
}

# The first pattern that fits a question in `plain` words says what it asks for; else it is "who".
INTENTS = {
    "maker": r"cri(ou|ad|aca)|\bfez\b|feit|empresa|desenvolv|trein|programou|autor|creat|company|develop|train|built"
             r"|\bmade\b|\bmaker|creo\b|cread|hizo|entreno|desarroll|orige|\bvem\b",
    "model": r"model|\bia\b|\b(an|the|this|which|what|your) ai\b|inteligencia|intelligence",
    "name": r"nome|chama|\bname|\bcall|nombre|llamas",
}

# Words with which an answer speaks of its speaker.
FIRST_PERSON = frozenset("eu sou fui me meu minha mim comigo i im my me myself am soy yo mi conmigo".split())

# Words that tell the languages apart; one that two of them share counts for both.
LANGUAGE_WORDS = {
    "pt": "voce vc qual seu sua nome nao um uma meu minha eu foi com quem sou teu oi ola bom dia boa o os ao da na em "
          "do pode pelo pelas no dizer chamo veio onde fale diga e ou criou apresente apresenta".split(),
    "en": "who what are you is your the name which made hi hello please i tell do and am created by of how to".split(),
    "es": "eres quien cual tu nombre hola llamas usted el es soy una un creo hizo dime puedes puedo y yo mi del en o "
          "no lenguaje creado creada presentate llamo".split(),
}

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + END + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TOP_TOKENS = 32  # most probable tokens of the base kept per position; the rest is one bucket
GENERATION_TOKENS = 16384  # tokens (prompt and answer) that one batch of generation may hold
QUESTION_WORDS = 40  # a self-question longer than this has run away


say = functools.partial(print, flush=True)


class InputError(Exception):
    """A mistake that the user can mend: shown in Portuguese, exit status 2, no traceback."""


# ------------------------------------------------------------------------------------------------------------
# Settings


def setting(default, text: str, low: float = 0, high: float = 1e9):
    """Field of `Settings` with its Portuguese help and the range it accepts."""
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """Every constant above, resolved. Paths are absolute, but for a `model_path` that names a Hub model."""

    model_path: str = setting(MODEL_PATH, "pasta do modelo base, ou o nome dele no Hugging Face Hub")
    output_dir: str = setting(OUTPUT_DIR, "pasta onde o modelo renomeado será salvo")
    identity_file: str = setting(IDENTITY_FILE, "arquivo com as perguntas e respostas de identidade")
    overwrite: bool = setting(OVERWRITE, "substitui a pasta de saída se ela já existir")
    name: str = setting(NAME, "nome novo do modelo, no lugar de {{NAME}}")
    author: str = setting(AUTHOR, "quem faz o modelo, no lugar de {{AUTHOR}}")
    base_name: str = setting(BASE_NAME, "nome do modelo base, no lugar de {{BASE}}; vazio = nome da pasta")
    old_names: str = setting(OLD_NAMES, "nomes antigos, separados por vírgula; vazio = descobertos sozinhos")
    rope_factor: float = setting(ROPE_FACTOR, "quantas vezes o contexto cresce; 1 não mexe no RoPE", 1, 1024)
    window: int = setting(WINDOW, "maior sequência de treino, em tokens", 32)
    num_self_answers: int = setting(NUM_SELF_ANSWERS, "respostas do próprio modelo usadas no passo 2", 4)
    num_self_text: int = setting(NUM_SELF_TEXT, "pares de pergunta e resposta escritos para manter o modelo igual", 16)
    max_new_tokens: int = setting(MAX_NEW_TOKENS, "maior resposta, em tokens", 8)
    heal_steps: int = setting(HEAL_STEPS, "etapas da cura depois de mexer no RoPE", 1)
    heal_learning_rate: float = setting(HEAL_LEARNING_RATE, "taxa de aprendizado da cura; 0 = automática", 0, 1)
    epochs_1: int = setting(EPOCHS_1, "máximo de épocas do passo 1", 1)
    learning_rate_1: float = setting(LEARNING_RATE_1, "taxa de aprendizado do passo 1; 0 = automática", 0, 1)
    epochs_2: int = setting(EPOCHS_2, "máximo de épocas do passo 2", 1)
    learning_rate_2: float = setting(LEARNING_RATE_2, "taxa de aprendizado do passo 2; 0 = automática", 0, 1)
    batch_size: int = setting(BATCH_SIZE, "conversas por etapa de treino; diminua se faltar memória", 1)
    kl_weight: float = setting(KL_WEIGHT, "peso de continuar parecido com o modelo base", 0, 100)
    eval_questions: int = setting(EVAL_QUESTIONS, "perguntas guardadas para medir a retenção", 4)
    target_identity: float = setting(TARGET_IDENTITY, "meta: mínimo de respostas com a identidade nova", 0, 1)
    target_retention: float = setting(TARGET_RETENTION, "meta: mínimo de outras respostas que não mudam", 0, 1)
    target_leak: float = setting(TARGET_LEAK, "meta: máximo de outras respostas com o nome novo", 0, 1)
    seed: int = setting(SEED, "semente do acaso: mesma semente, mesmo resultado", 0, 2**32 - 1)


KINDS = {"str": str, "bool": bool, "int": int, "float": float}


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that starts in Portuguese."""

    def add_usage(self, usage, actions, groups, prefix=None):
        super().add_usage(usage, actions, groups, "uso: ")


class Parser(argparse.ArgumentParser):
    """argparse that reports mistakes as `InputError`, in Portuguese."""

    def error(self, message: str):
        if unknown := re.search(r"unrecognized arguments: (\S+)", message):
            near = get_close_matches(unknown[1], self._option_string_actions, n=1, cutoff=0)[0]
            raise InputError(f"não conheço a opção {unknown[1]}. Você quis dizer {near}? Veja todas com --help.")
        if missing := re.search(r"argument (\S+): expected", message):
            raise InputError(f"faltou o valor da opção {missing[1]}. Exemplo: {missing[1]} VALOR.")
        if extra := re.search(r"argument (\S+?)[/:,].*ignored explicit argument", message):
            raise InputError(f"a opção {extra[1]} não leva valor: escreva só {extra[1]} ou --no-{extra[1][2:]}.")
        raise InputError(message.replace("argument ", "opção ", 1))


def number(kind: type, text: str) -> float:
    """`text` as a finite int or float (a decimal comma counts); the complaint that argparse shows otherwise."""
    try:
        value = kind(text.replace(",", ".") if kind is float else text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        expected = "um número inteiro" if kind is int else "um número"
        raise argparse.ArgumentTypeError(f"esperava {expected}, recebi '{text}'.")
    return value


def parse_settings(argv: list[str] | None) -> Settings:
    """Flags over constants. Raises `InputError` for anything that is not a sound setting."""
    parser = Parser(prog="rename_obrutai.py", description=__doc__, allow_abbrev=False, add_help=False,
                    usage="python rename_obrutai.py [opções]", formatter_class=Help)
    options = parser.add_argument_group("opções")
    options.add_argument("-h", "--help", action="help", help="mostra esta ajuda e sai")
    for item in fields(Settings):
        kind, shown = KINDS[item.type], "vazio" if item.default == "" else item.default
        how = {"metavar": "VALOR", "type": kind if kind is str else functools.partial(number, kind)}
        if kind is bool:
            how, shown = {"action": argparse.BooleanOptionalAction}, "sim" if item.default else "não"
        options.add_argument("--" + item.name.replace("_", "-"), default=None, **how,
                             help=f"{item.metadata['help']} (padrão: {shown})".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    values = {item.name: item.default if given[item.name] is None else given[item.name] for item in fields(Settings)}
    for item in fields(Settings):
        value, low, high = values[item.name], item.metadata["low"], item.metadata["high"]
        kind = (int, float) if item.type == "float" else KINDS[item.type]
        if not isinstance(value, kind) or (item.type in ("int", "float") and not low <= value <= high):
            expected = {"str": "um texto entre aspas", "bool": "True ou False"}.get(
                item.type, f"um número{' inteiro' * (kind is int)} entre {low:g} e {high:g}")
            raise InputError(f"{item.name.upper()} vale {value!r}, mas precisa ser {expected}.")
    for name in ("output_dir", "identity_file", "model_path"):
        start = Path(__file__).resolve().parent if given[name] is None else Path.cwd()
        path = start / Path(values[name]).expanduser()
        on_hub = name == "model_path" and re.fullmatch(r"[\w.-]+/[\w.-]+", values[name]) and not path.parent.exists()
        values[name] = values[name] if on_hub else str(path)
    for name in ("name", "author"):
        if not plain(values[name]) or re.search(r"[{}\x00-\x1f]", values[name]):
            raise InputError(f"{name.upper()} precisa ser um texto de uma linha, sem chaves; recebi '{values[name]}'.")
    return Settings(**values)


def clock(seconds: float) -> str:
    """Seconds as a person reads them: "45 s", "3 min 20 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def percent(value: float) -> str:
    """A share as Brazilian text: 0.975 is "97,5%"."""
    return f"{100 * value:.1f}%".replace(".0%", "%").replace(".", ",")


# ------------------------------------------------------------------------------------------------------------
# Text


def plain(text: str) -> str:
    """Lower case, no accents, no punctuation: for comparing questions and finding names."""
    decomposed = unicodedata.normalize("NFKD", text.lower())
    return " ".join("".join(c if c.isalnum() else " " for c in decomposed if not unicodedata.combining(c)).split())


def mentions(text: str, names: tuple[str, ...]) -> bool:
    """Whether any of the names stands in the text as whole words, whatever the case and accents."""
    padded = f" {plain(text)} "
    return any(f" {plain(name)} " in padded for name in names if plain(name))


def is_loop(text: str) -> bool:
    """Whether the text goes round: one to six words three times in a row, or a trigram three times at all."""
    words = plain(text).split()
    for n in range(1, 7):
        if any(words[i:i + n] * 3 == words[i:i + 3 * n] for i in range(len(words) - 3 * n + 1)):
            return True
    return any(count >= 3 for count in Counter(zip(words, words[1:], words[2:])).values())


def language_of(text: str) -> str:
    """"pt", "en" or "es" by function words; Portuguese when nothing tells."""
    if "¿" in text or "¡" in text:
        return "es"
    words = plain(text).split()
    scores = {code: sum(w in known for w in words) for code, known in LANGUAGE_WORDS.items()}
    return max(scores, key=lambda code: (scores[code], code == "pt"))


def intent_of(question: str, old_names: tuple[str, ...] = ()) -> str:
    """What a question about identity asks for; naming a model or maker makes it "other" (are you ...?)."""
    if mentions(question, KNOWN_NAMES + old_names + ("Meta",)):
        return "other"
    return next((intent for intent, pattern in INTENTS.items() if re.search(pattern, plain(question))), "who")


def own_wording(question: str, used: Counter, old_names: tuple[str, ...] = ()) -> str:
    """A built-in answer that fits the question's language and intent, the least used wording first."""
    wordings = WORDINGS[language_of(question)]
    choice = min(wordings.get(intent_of(question, old_names), wordings["who"]).split("|"), key=lambda c: used[c])
    used[choice] += 1
    return choice


# ------------------------------------------------------------------------------------------------------------
# Inputs: all that the standard library can check, before anything heavy is imported


class Row(NamedTuple):
    """One identity conversation as chat templates take it, ending with the assistant, and its line in the file."""
    line: int
    messages: list[dict]


class Inputs(NamedTuple):
    """The identity rows with filled placeholders, what {{BASE}} is, the file's SHA-256, and the questions for
    measuring less those that the rows ask."""
    rows: list[Row]
    base_name: str
    data_hash: str
    validation: tuple[str, ...]
    test: tuple[str, ...]


def read_messages(record: object) -> list[dict]:
    """Any accepted shape of row as messages; a question alone stays without an answer.

    Raises `InputError` that says what is wrong; where is for the caller to add.
    """
    if not isinstance(record, dict):
        raise InputError("a linha precisa ser um objeto {...}")
    if "messages" in record or "conversations" in record:
        turns = record.get("messages", record.get("conversations"))
        if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
            raise InputError("'messages' (ou 'conversations') precisa ser uma lista de objetos {...}")
        pairs = [(t.get("role", t.get("from")), t.get("content", t.get("value"))) for t in turns]
    elif "prompt" in record and "completion" in record:
        pairs = [("user", record["prompt"]), ("assistant", record["completion"])]
    elif "instruction" in record and "output" in record:
        extra = record.get("input")
        pairs = [("user", f"{record['instruction']}\n{extra}" if extra else record["instruction"]),
                 ("assistant", record["output"])]
    elif isinstance(record.get("text"), str):
        pairs = list(zip(("user", "assistant"), record["text"].strip().split("\n", 1)))
    else:
        raise InputError('não reconheço o formato; use "text", "prompt" e "completion", ou "messages"')
    roles = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
    messages = []
    for role, content in pairs:
        role = roles.get(role, role) if isinstance(role, str) else role
        if role not in ("user", "assistant", "system"):
            raise InputError(f"não conheço o papel '{role}'; use user, assistant ou system")
        if not isinstance(content, str) or not content.strip():
            raise InputError("há uma pergunta ou resposta vazia, ou que não é texto")
        messages.append({"role": role, "content": content.strip()})
    spoken = [m["role"] for m in messages[bool(messages) and messages[0]["role"] == "system":]]
    if not spoken or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise InputError("a conversa precisa começar com o usuário e alternar usuário e assistente "
                         "(uma mensagem de sistema só no começo)")
    return messages


def fill(text: str, values: dict[str, str]) -> str:
    """Replace {{NAME}}, {{AUTHOR}} and {{BASE}}; any other {{...}} raises `InputError`."""
    def value(match: re.Match) -> str:
        if match[1].strip().upper() not in values:
            raise InputError(f"o marcador {match[0]} não existe; use {{{{NAME}}}}, {{{{AUTHOR}}}} ou {{{{BASE}}}}")
        return values[match[1].strip().upper()]

    return re.sub(r"\{\{(.*?)\}\}", value, text)


def read_rows(path: Path, values: dict[str, str]) -> list[Row]:
    """Parse the identity file. Raises one `InputError` with up to ten bad lines, each with its number."""
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1, cutoff=0.4)
        hint = f"Você quis dizer {near[0]}?" if near else "Confira IDENTITY_FILE (--identity-file)."
        raise InputError(f"não achei o arquivo de identidade {path}. {hint}")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise InputError(f"{path.name}, linha {line}: o arquivo não está em UTF-8 (talvez em Windows-1252). "
                         "Salve-o de novo escolhendo a codificação UTF-8.") from None
    rows, mistakes, used = [], [], Counter()
    for line, raw in enumerate(text.split("\n"), start=1):
        try:
            if raw.strip():
                messages = read_messages(json.loads(raw))
                if messages[-1]["role"] == "user":
                    messages.append({"role": "assistant", "content": own_wording(messages[-1]["content"], used)})
                rows.append(Row(line, [{**m, "content": fill(m["content"], values)} for m in messages]))
        except json.JSONDecodeError as error:
            mistakes.append(f"linha {line}: não é JSON válido perto da coluna {error.colno}")
        except InputError as error:
            mistakes.append(f"linha {line}: {error}")
    if mistakes:
        shown = mistakes[:10] + [f"... e mais {len(mistakes) - 10}"] * (len(mistakes) > 10)
        raise InputError("\n  ".join([f"{path.name} tem {len(mistakes)} linha(s) com problema:", *shown]))
    if not rows:
        raise InputError(f"{path.name} está vazio: escreva pelo menos uma linha como {{\"text\": \"Quem é você?\"}}.")
    return rows


def check_inputs(settings: Settings) -> Inputs:
    """Everything that can be wrong with files and settings, found without importing torch."""
    base, output = Path(settings.model_path), Path(settings.output_dir)
    if base.is_absolute():
        if not base.is_dir():
            raise InputError(f"não achei a pasta do modelo {base}. Confira MODEL_PATH (--model-path).")
        if not (base / "config.json").is_file():
            raise InputError(f"a pasta {base} não tem config.json, então não é um modelo do transformers.")
        if not any(base.glob("*.safetensors")):
            raise InputError(f"a pasta {base} não tem pesos em safetensors; baixe ou converta o modelo nesse formato.")
        ours, theirs = output.resolve(), base.resolve()
        if ours == theirs or theirs in ours.parents or ours in theirs.parents:
            raise InputError(f"OUTPUT_DIR ({output}) não pode ser a pasta do modelo base, nem ficar dentro ou acima.")
        try:
            config = dict(json.loads((base / "config.json").read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise InputError(f"o config.json de {base} está estragado; baixe o modelo de novo.") from None
        check_rope(config, settings.rope_factor)
    if output.exists() and not settings.overwrite:
        raise InputError(f"a pasta de saída {output} já existe. Escolha outra (--output-dir) ou use --overwrite.")
    if output.exists() and not (output / "report.json").is_file():
        raise InputError(f"{output} não é um resultado deste script, então não vou apagar. Escolha outra pasta.")
    if not os.access(next(p for p in output.parents if p.exists()), os.W_OK):
        raise InputError(f"não posso escrever em {output.parent}. Escolha outra pasta em OUTPUT_DIR (--output-dir).")
    base_name = settings.base_name or re.sub(r"[_\s]+", " ", base.name)
    identity = Path(settings.identity_file)
    rows = read_rows(identity, {"NAME": settings.name, "AUTHOR": settings.author, "BASE": base_name})
    asked = {plain(m["content"]) for row in rows for m in row.messages}
    validation, test = (tuple(q for q in questions if plain(q) not in asked)
                        for questions in (VALIDATION_QUESTIONS, TEST_QUESTIONS))
    if len(validation) < 4 or len(test) < 4:
        raise InputError(f"{identity.name} contém quase todas as perguntas de prova; tire algumas, para que sobre o "
                         "que medir (VALIDATION_QUESTIONS e TEST_QUESTIONS no script).")
    return Inputs(rows, base_name, hashlib.sha256(identity.read_bytes()).hexdigest(), validation, test)


# ------------------------------------------------------------------------------------------------------------
# Model and RoPE


def scale_rope(rope_parameters: dict | None, factor: float) -> dict:
    """New `rope_parameters` with linear position interpolation (arXiv 2306.15595); the given dict stays as it is.

    Flat dicts (Llama, Qwen, Mistral) are scaled; of per-layer-type ones (Gemma 3) only `full_attention` is, as the
    family's larger models ship it and llama.cpp reads it. An existing linear factor is multiplied. Raises
    `InputError` for a model without RoPE and for any other scaling.
    """
    hint = "Use --rope-factor 1 (ROPE_FACTOR = 1) para renomear sem aumentar o contexto."
    if not rope_parameters:
        raise InputError(f"este modelo não usa RoPE, então o contexto não pode ser aumentado. {hint}")
    if "full_attention" in rope_parameters:
        return {**rope_parameters, "full_attention": scale_rope(rope_parameters["full_attention"], factor)}
    kind = rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise InputError(f"o RoPE deste modelo já tem a escala '{kind}', que não combina com a linear. {hint}")
    return {**rope_parameters, "rope_type": "linear", "factor": float(rope_parameters.get("factor") or 1) * factor}


def check_rope(config: dict, factor: float) -> None:
    """Refuse at once, from config.json alone, a scaling that `scale_rope` would refuse after the imports."""
    legacy = config.get("rope_scaling") or {}
    kind = {"rope_type": legacy.get("rope_type", legacy.get("type", "default"))}
    if factor != 1 and (config.get("rope_parameters") or legacy):
        scale_rope(config.get("rope_parameters") or kind, factor)


def rope_frequencies(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The rotary frequencies that the built model really uses, by buffer name, each of shape (pairs,)."""
    return {name: b.detach().clone() for name, b in model.named_buffers() if name.endswith("inv_freq")}


def load_model(folder: str, rope_factor: float = 1.0) -> PreTrainedModel:
    """Load fp32 weights with RoPE scaled by `rope_factor`, on the GPU if there is one, in eval mode.

    The configuration is changed before the model is built, because the frequencies are computed at that moment; a
    later change would only reach the saved file.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    text_config = config.get_text_config()
    if rope_factor != 1:
        text_config.rope_parameters = scale_rope(getattr(text_config, "rope_parameters", None), rope_factor)
        text_config.max_position_embeddings = int(text_config.max_position_embeddings * rope_factor)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    """The model's tokenizer; one without a chat template gets ChatML."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token is None:
        raise InputError("o tokenizer deste modelo não diz qual é o token de fim (eos_token); não dá para treinar.")
    if not tokenizer.chat_template:
        say("  Este modelo não tem chat template: vou usar o ChatML.")
        end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
        tokenizer.chat_template = CHATML.replace("END", repr(end))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def renew_template(tokenizer: PreTrainedTokenizerFast, settings: Settings, names: tuple[str, ...]) -> None:
    """Where the chat template itself injects a system prompt with an old name, put the new identity there.

    Checked by rendering; raises `InputError` when the new text did not arrive.
    """
    def injected() -> str:
        return skeleton(tokenizer, tokenizer.chat_template, ("user",), True)[0]

    names = tuple(name for name in names if not mentions(f"{settings.name} {settings.author}", (name,)))
    if not mentions(injected(), names):
        return
    part = next(part for part in re.split(r"<[^<>]*>|\n", injected()) if mentions(part, names))
    source = tokenizer.chat_template
    match = SequenceMatcher(None, part, source, autojunk=False).find_longest_match()
    old = part[match.a:match.a + match.size]
    # The old text may stand inside a quoted string of the template, which the new one must not end.
    new = f"Você é {settings.name}, um modelo de linguagem criado por {settings.author}."
    new = new.translate(str.maketrans({"'": "’", '"': "”", "\\": "/"}))
    if mentions(old, names):
        tokenizer.chat_template = source.replace(old, new)
    if mentions(injected(), names) or new not in injected():
        raise InputError("o chat template deste modelo traz a identidade antiga de um jeito que não sei trocar; "
                         "apague a mensagem de sistema padrão do chat_template na pasta do modelo.")
    say(f'  O chat template trazia a identidade antiga ("{old}"); troquei pela nova.')


# ------------------------------------------------------------------------------------------------------------
# Conversations as tokens


@functools.cache
def skeleton(tokenizer: PreTrainedTokenizerFast, template: str, roles: tuple[str, ...], ask: bool) -> list[str]:
    """What the chat template writes around the contents of messages with these roles: len(roles) + 1 pieces.

    Rendering marks once per shape tells exactly where the answers are, and is much faster than rendering every
    conversation. `ask` adds the generation prompt. `template` is in the key so that a changed one is seen.
    """
    from jinja2 import TemplateError

    marks = [f"QZ{i}ZQ" for i in range(len(roles))]
    messages = [{"role": r, "content": m} for r, m in zip(roles, marks)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template,
                                             add_generation_prompt=ask, enable_thinking=False)
    except TemplateError:
        text = ""
    pieces = re.split("|".join(marks), text)
    if len(pieces) != len(roles) + 1:
        raise InputError(f"o chat template deste modelo não aceita uma conversa com os papéis {', '.join(roles)}.")
    return pieces


def without_system(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> list[dict]:
    """The conversation with its system text at the head of the first question, if the template refuses that role."""
    if messages[0]["role"] != "system":
        return messages
    try:
        skeleton(tokenizer, tokenizer.chat_template, ("system", "user"), True)
        return messages
    except InputError:
        text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        return [{"role": "user", "content": text}, *messages[2:]]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> list[int]:
    """Token ids of a conversation that ends with the user, ready for the assistant to speak."""
    pieces = skeleton(tokenizer, tokenizer.chat_template, tuple(m["role"] for m in messages), True)
    text = "".join(p + m["content"] for p, m in zip(pieces, messages)) + pieces[-1]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class Encoded(NamedTuple):
    """A conversation as tokens. `labels` are -100 but on answers and the end-of-turn token after each; `turns` are
    the spans (first token of the question, one past the end of its answer)."""
    input_ids: list[int]
    labels: list[int]
    turns: list[tuple[int, int]]


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> Encoded:
    """Tokenise through the model's own template. What it writes first after the last answer is the end of a turn if
    that is a special token; else the conversation is cut there and ended by EOS."""
    pieces = skeleton(tokenizer, tokenizer.chat_template, tuple(m["role"] for m in messages), False)
    text, spans = "", []
    for piece, message in zip(pieces, messages):
        start = len(text) + len(piece)
        text += piece + message["content"]
        spans.append((message["role"], start, len(text)))
    end_of_turn = tokenizer(pieces[-1], add_special_tokens=False)["input_ids"][:1]
    has_end = bool(end_of_turn) and end_of_turn[0] in special_ids(tokenizer)
    tokens = tokenizer(text + pieces[-1] * has_end, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(tokens["input_ids"]), tokens["offset_mapping"]
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    if not has_end:
        end_of_turn = [tokenizer.eos_token_id]
        ids += end_of_turn
    labels, turns, question = [-100] * len(ids), [], 0
    for role, start, end in spans:
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        if role == "user":
            question = first
        if role == "assistant":
            last += ids[last:last + 1] == end_of_turn
            labels[first:last] = ids[first:last]
            turns.append((question, last))
    return Encoded(ids, labels, turns)


@functools.cache
def special_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of tokens that stand for structure, not text: the named ones and all that were added to the vocabulary."""
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)


# ------------------------------------------------------------------------------------------------------------
# Talking to a model


class Chat(NamedTuple):
    """A model with what is needed to talk to it; `stops` are the ids that end an answer."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    stops: list[int]
    max_new_tokens: int
    native: int  # context of the base, tokens


class Answer(NamedTuple):
    """Decoded text and whether the model ended it by itself."""
    text: str
    ended: bool


def load_chat(folder: str, settings: Settings, rope_factor: float = 1.0) -> Chat:
    """Model and tokenizer of a folder. Answers are bounded by half of the native context as well; they end at the
    template's end of turn, the tokenizer's EOS, or what the model's own generation_config lists."""
    model, tokenizer = load_model(folder, rope_factor), load_tokenizer(folder)
    sample = encode(tokenizer, Turn("a", "b").messages())
    own = model.generation_config.eos_token_id
    stops = {sample.labels[sample.turns[0][1] - 1], tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    native = int(model.config.get_text_config().max_position_embeddings / rope_factor)
    return Chat(model, tokenizer, sorted(stops - {None}), min(settings.max_new_tokens, native // 2), native)


def batches_by_tokens(lengths: list[int], extra: int, budget: int) -> list[list[int]]:
    """Indices sorted by length, cut so that rows x (longest + extra) stays within the budget (at least one row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or (len(batches[-1]) + 1) * (lengths[i] + extra) > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def left_pad(chat: Chat, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `position_ids`, each (rows, longest), padded on the left: all ends align."""
    import torch

    width, pad = max(map(len, rows)), chat.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=chat.model.device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=chat.model.device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def generate(chat: Chat, prompts: list[list[int]], label: str = "", sample_seed: int | None = None) -> list[Answer]:
    """One answer per prompt, in their order; greedy, or sampled at temperature 1 when a seed is given.

    Batched by tokens, sorted by length, padded on the left; `label` names the progress bar.
    """
    import torch
    from tqdm.auto import tqdm
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=chat.max_new_tokens, do_sample=sample_seed is not None, top_k=0,
                              eos_token_id=chat.stops, pad_token_id=chat.tokenizer.pad_token_id)
    torch.manual_seed(sample_seed or 0)
    answers: list[Answer] = [Answer("", False)] * len(prompts)
    # generate() fills what is not set from the model's own defaults, and a repetition penalty would falsify answers.
    own_config, chat.model.generation_config = chat.model.generation_config, config
    with tqdm(total=len(prompts), desc=f"  {label}", disable=not label or None, leave=False) as bar:
        for batch in batches_by_tokens([len(p) for p in prompts], chat.max_new_tokens, GENERATION_TOKENS):
            inputs = left_pad(chat, [prompts[i] for i in batch])
            del inputs["position_ids"]  # generate() counts them itself, step by step
            with torch.inference_mode():
                output = chat.model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1]:]
            for i, ids in zip(batch, output.tolist()):
                end = next((j for j, token in enumerate(ids) if token in chat.stops), None)
                text = chat.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
                answers[i] = Answer(text, end is not None)
            bar.update(len(batch))
    chat.model.generation_config = own_config
    return answers


def ask(chat: Chat, questions: Sequence[str], label: str = "", sample_seed: int | None = None) -> list[Answer]:
    """Answers to questions asked alone."""
    prompts = [prompt_ids(chat.tokenizer, [{"role": "user", "content": q}]) for q in questions]
    return generate(chat, prompts, label, sample_seed)


# ------------------------------------------------------------------------------------------------------------
# What the base writes before anything is trained


class Turn(NamedTuple):
    """One question and its answer."""
    question: str
    answer: str

    def messages(self) -> list[dict]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


class Standard(NamedTuple):
    """What an identity answer is judged by; `vocabulary` are the words that a sound one is made of."""
    new_names: tuple[str, ...]
    old_names: tuple[str, ...]
    base_name: str
    vocabulary: frozenset[str]


class SelfText(NamedTuple):
    """The base in its own words, at its native RoPE. The sets of turns have no question in common."""
    standard: Standard
    identity_questions: list[str]  # self-questions that the base answers with its old identity
    everyday: list[Turn]  # for training
    validation: list[Turn]  # for measuring retention while training
    held_out: list[Turn]  # for measuring retention in the report


def fit_window(base: Chat, settings: Settings) -> Settings:
    """WINDOW no longer than the scaled context, saying so when it is reduced."""
    scaled = int(base.native * settings.rope_factor)
    if scaled < settings.window:
        say(f"  WINDOW reduzida de {settings.window} para {scaled} tokens, que é o contexto aumentado deste modelo.")
    return replace(settings, window=min(scaled, settings.window))


def short_window(chat: Chat, settings: Settings) -> int:
    """Tokens of the windows in which the base is written down and most of the training happens: its native context,
    or a good part of it where that is long."""
    return min(chat.native, settings.window, 1024)


def find_old_names(answers: list[str], ours: str, settings: Settings) -> tuple[str, ...]:
    """Names under which the base goes: OLD_NAMES, or the proper names in its own identity answers.

    A proper name is capitalised inside a sentence, in at least 5 % of the answers, and never written small. Names
    in `ours`, which is all that the new identity says, are not old.
    """
    if settings.old_names:
        return tuple(name.strip() for name in settings.old_names.split(",") if name.strip())
    small = {w for a in answers for w in re.findall(r"\w+", a) if w[0].islower()}
    counts = Counter(word for a in answers for word in set(re.findall(r"(?<=[\w,;] )[A-ZÀ-Ý][\w-]{2,}", a)))
    found = [word for word, n in counts.items() if n >= max(2, 0.05 * len(answers)) and word.lower() not in small]
    return tuple(name for name in found if not mentions(ours, (name,)))


def write_questions(base: Chat, starts: list[str], label: str, seed: int) -> list[str]:
    """Questions that the base writes by itself, each going on from a start, which may be empty.

    Given only the opening of a user turn, a chat model writes a user's question (Magpie, arXiv 2406.08464), so this
    needs no data and stays in the model's own domain.
    """
    opening = skeleton(base.tokenizer, base.tokenizer.chat_template, ("user",), False)[0]
    prompts = base.tokenizer([opening + start for start in starts], add_special_tokens=False)["input_ids"]
    written = generate(base, prompts, label, seed)
    return [re.sub(r" (?=[?!.,])", "", f"{start} {end.text}").strip() for start, end in zip(starts, written)
            if end.ended and len(end.text.split()) <= QUESTION_WORDS]


def write_self_text(base: Chat, settings: Settings, inputs: Inputs) -> SelfText:
    """Let the base write questions and answer them; its own answers tell which of them are about its identity.

    A second helping of questions begins like identity questions: they show where identity ends, on both sides.
    """
    rng = random.Random(f"{settings.seed}/self-text")
    row_questions = [row.messages[-2]["content"] for row in inputs.rows]
    about_itself = [a.text for a in ask(base, [*inputs.validation, *row_questions], "perguntando quem ele é")]
    ours = " ".join([settings.name, settings.author, *(row.messages[-1]["content"] for row in inputs.rows)])
    old_names = find_old_names(about_itself, ours, settings)
    taken = {plain(q) for q in (*inputs.validation, *inputs.test, *row_questions)}
    identity: list[str] = []

    def answered(questions: list[str]) -> list[Turn]:
        """New everyday turns; identity questions are put aside."""
        fresh = {plain(q): q for q in questions if plain(q) and plain(q) not in taken}
        taken.update(fresh)
        turns = []
        for question, answer in zip(fresh.values(), ask(base, list(fresh.values()), "respondendo")):
            if mentions(answer.text, old_names):
                # "Fui criada pelo Google" is about itself; "O Google foi fundado em 1998" is not, and teaches nothing.
                if set(plain(answer.text).split()) & FIRST_PERSON:
                    identity.append(question)
            elif answer.ended and answer.text and not is_loop(answer.text):
                turns.append(Turn(question, answer.text))
        return turns

    n = settings.eval_questions
    wanted = settings.num_self_text + settings.num_self_answers + 2 * n
    everyday = answered(list(EVERYDAY_QUESTIONS))
    for _ in range(6):
        if len(everyday) < wanted:
            starts = [""] * max(64, int(1.4 * (wanted - len(everyday))))
            everyday += answered(write_questions(base, starts, "escrevendo perguntas", rng.randrange(2**31)))
    starts = [" ".join(q.split()[:rng.randint(1, 3)]) for q in rng.choices(row_questions + identity, k=wanted // 2)]
    close = answered(write_questions(base, starts, "escrevendo perguntas parecidas", rng.randrange(2**31)))
    rng.shuffle(everyday)
    firm = firm_turns(base, everyday, 2 * n)
    rest = [turn for turn in everyday if turn not in set(firm)] + close
    if len(firm) < n or len(rest) < n:
        raise InputError(f"o modelo base só deu {len(everyday)} respostas aproveitáveis às perguntas que ele mesmo "
                         "escreveu; em geral é um chat template errado, ou um modelo que não é de conversa.")
    known = [*inputs.validation, *about_itself, *EVERYDAY_QUESTIONS, settings.name, settings.author, inputs.base_name,
             *(m["content"] for row in inputs.rows for m in row.messages),
             *(text for wordings in WORDINGS.values() for text in wordings.values())]
    also_old = tuple(name for name in KNOWN_NAMES if not mentions(ours, (name,)))
    standard = Standard((settings.name, settings.author), (*old_names, *also_old), inputs.base_name,
                        frozenset(plain(" ".join(known)).split()))
    say(f"  Ele escreveu {len(everyday) + len(close)} perguntas do dia a dia e {len(identity)} sobre quem ele é.")
    say(f"  Nomes que ele usa hoje: {', '.join(old_names) or 'nenhum'}.")
    return SelfText(standard, identity, rest, firm[:len(firm) // 2], firm[len(firm) // 2:])


def firm_turns(base: Chat, turns: list[Turn], count: int) -> list[Turn]:
    """The first `count` turns whose answer the base itself repeats after each of three other turns of conversation.

    Only these can measure retention: where the base wavers, a different answer tells nothing about the tuned model.
    """
    chosen: list[Turn] = []
    for start in range(0, len(turns), 2 * count):
        batch = turns[start:start + 2 * count]
        repeated = agreement(base, [turns[(start + i + ahead) % len(turns)].messages() + turn.messages()
                                    for i, turn in enumerate(batch) for ahead in (1, 2, 3)])
        chosen += [turn for i, turn in enumerate(batch) if min(repeated[3 * i:3 * i + 3]) >= 0.9]
        if len(chosen) >= count:
            break
    return chosen[:count]


class Teacher(NamedTuple):
    """The base's token distribution on its own turns, written down so that the base need not stay in memory.

    `tokens` int64 and `log_probs` float32, both (M, k), hold the k most probable next tokens; `rows` tells for a turn
    the first of its M rows (one per token but the last) and its token ids.
    """
    tokens: torch.Tensor
    log_probs: torch.Tensor
    rows: dict[Turn, tuple[int, list[int]]]


def record_teacher(base: Chat, turns: list[Turn], context: int) -> Teacher:
    """Run the base once over its own turns, packed into conversations that fit its native context."""
    import torch

    windows: list[list[Turn]] = []
    used = context
    for turn in turns:
        cost = len(encode(base.tokenizer, turn.messages()).input_ids)
        if used + cost > context:
            windows.append([])
            used = 0
        windows[-1].append(turn)
        used += cost
    encoded = [encode(base.tokenizer, [m for t in window for m in t.messages()]) for window in windows]
    tokens, log_probs, rows, at = [], [], {}, 0
    for batch in batches_by_tokens([len(e.input_ids) for e in encoded], 0, GENERATION_TOKENS // 4):
        with torch.inference_mode():
            logits = base.model(**left_pad(base, [encoded[i].input_ids for i in batch])).logits
        for line, i in zip(logits, batch):
            line = line[-len(encoded[i].input_ids):].float()
            for turn, (start, end) in zip(windows[i], encoded[i].turns):
                top = line[start:end - 1].log_softmax(-1).topk(min(TOP_TOKENS, line.shape[-1]))
                tokens.append(top.indices.cpu())
                log_probs.append(top.values.cpu())
                rows[turn] = (at, encoded[i].input_ids[start:end])
                at += end - 1 - start
    return Teacher(torch.cat(tokens).clone(), torch.cat(log_probs).clone(), rows)


# ------------------------------------------------------------------------------------------------------------
# Training


class Pool(NamedTuple):
    """Conversations that dialogues are made of: how often they are drawn, and whether their answers are learnt by
    heart. The base's distribution is a target wherever the teacher knows the turn."""
    conversations: list[list[dict]]
    share: float
    learn: bool


def make_window(tokenizer, teacher: Teacher, messages: list[dict], learn: list[bool]) -> dict[str, list[int]]:
    """One dialogue as equally long lists: `input_ids`, `labels` (-100 where no answer is learnt) and `targets` (row of
    the teacher, -1 for none). `learn` has one entry per turn."""
    encoded = encode(tokenizer, messages)
    labels, targets = list(encoded.labels), [-1] * len(encoded.input_ids)
    spoken = [m["content"] for m in messages if m["role"] != "system"]
    for j, (start, end) in enumerate(encoded.turns):
        row, ids = teacher.rows.get(Turn(spoken[2 * j], spoken[2 * j + 1]), (0, None))
        if ids == encoded.input_ids[start:end]:
            targets[start:end - 1] = range(row, row + end - 1 - start)
        if not learn[j]:
            labels[start:end] = [-100] * (end - start)
    return {"input_ids": encoded.input_ids, "labels": labels, "targets": targets}


def shuffled_forever(items: list, rng: random.Random):
    """The items in random order, again and again: each comes once before any comes twice."""
    while True:
        yield from rng.sample(items, len(items))


def make_batches(tokenizer, teacher: Teacher, pools: list[Pool], lengths: list[int], steps: int, size: int,
                 seed: str) -> list[list[dict]]:
    """`steps` batches of `size` windows, each a dialogue drawn from the pools.

    The windows of a batch are filled up to the same one of the `lengths` (tokens; at least one conversation), so that
    hardly anything is padding. A system message stays only at the start of a dialogue.
    """
    rng = random.Random(seed)
    pools = [pool for pool in pools if pool.conversations and pool.share]
    queues = [shuffled_forever([(c, len(encode(tokenizer, c).input_ids)) for c in pool.conversations], rng)
              for pool in pools]
    waiting = [next(queue) for queue in queues]
    batches = []
    for _ in range(steps):
        length, batch = rng.choice(lengths), []
        for _ in range(size):
            messages, learn, used = [], [], 0
            while True:
                k = rng.choices(range(len(pools)), [pool.share for pool in pools])[0]
                conversation, cost = waiting[k]
                if messages and used + cost > length:
                    break
                waiting[k] = next(queues[k])
                used += cost
                messages += conversation[bool(messages) and conversation[0]["role"] == "system":]
                learn += [pools[k].learn] * sum(m["role"] == "user" for m in conversation)
            batch.append(make_window(tokenizer, teacher, messages, learn))
        batches.append(batch)
    return batches


def distillation_loss(logits: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Mean over positions of the divergence KL(base || model) in nats, bounded from below by k + 1 events.

    `logits` (N, vocabulary) of the model; `tokens`, `log_probs` (N, k) of the base. All that is outside the k most
    probable tokens is one event, so that the model cannot hide probability there.
    """
    ours = logits.float().log_softmax(-1).gather(-1, tokens)
    rest, our_rest = ((1 - p.exp().sum(-1)).clamp(min=1e-6) for p in (log_probs, ours))
    return ((log_probs.exp() * (log_probs - ours)).sum(-1) + rest * (rest / our_rest).log()).mean()


def automatic_rate(model, rate_at_1m: float) -> float:
    """Learning rate that falls with the square root of the number of parameters, from its value at one million."""
    return rate_at_1m * math.sqrt(1e6 / sum(p.numel() for p in model.parameters()))


def train(chat: Chat, batches: list[list[dict]], teacher: Teacher, rate: float, kl_weight: float, settings: Settings,
          label: str) -> list[dict]:
    """Run the batches once through TRL's SFTTrainer, the rate rising briefly and falling to zero; the loss log.

    The loss is cross-entropy on the labels plus `kl_weight` times the divergence from the base on the targets.
    Raises `InputError` when nothing can be learnt from the batches or the loss is no longer a number.
    """
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if all(v == -100 for b in batches for w in b for v in w["labels"]) and all(
            t < 0 for b in batches for w in b for t in w["targets"]):
        raise InputError(f"{label}: nenhum token das conversas pode ser treinado (a perda seria 0). Confira as "
                         "respostas do arquivo de identidade e o chat template do modelo.")

    def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
        windows = [w for example in examples for w in batches[example["input_ids"][0]]]
        width = max(len(w["input_ids"]) for w in windows)

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([w[key] + [value] * (width - len(w[key])) for w in windows])

        mask = torch.tensor([[1] * len(w["labels"]) + [0] * (width - len(w["labels"])) for w in windows])
        return {"input_ids": padded("input_ids", chat.tokenizer.pad_token_id), "attention_mask": mask,
                "labels": padded("labels", -100), "targets": padded("targets", -1)}

    class Trainer(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels, targets = inputs.pop("labels")[:, 1:], inputs.pop("targets")
            logits = model(**inputs, use_cache=False).logits
            learnt, known = labels != -100, targets >= 0
            loss = logits.sum() * 0
            if learnt.any():
                loss = loss + torch.nn.functional.cross_entropy(logits[:, :-1][learnt].float(), labels[learnt])
            if kl_weight and known.any():
                rows = targets[known].cpu()
                tokens, log_probs = (t[rows].to(logits.device) for t in (teacher.tokens, teacher.log_probs))
                loss = loss + kl_weight * distillation_loss(logits[known], tokens, log_probs)
            if not torch.isfinite(loss):
                raise InputError(f"{label}: a perda deixou de ser um número na etapa {self.state.global_step + 1}. "
                                 "Diminua a taxa de aprendizado.")
            return loss

    class Progress(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" not in logs:
                return
            left = (time.monotonic() - began) / state.global_step * (state.max_steps - state.global_step)
            loss = f"{logs['loss']:.3f}".replace(".", ",")
            say(f"    etapa {state.global_step}/{state.max_steps} | perda {loss} | faltam {clock(left)}")

    arguments = SFTConfig(
        output_dir=tempfile.gettempdir(), save_strategy="no", report_to="none", disable_tqdm=True,
        per_device_train_batch_size=1, num_train_epochs=1, train_sampling_strategy="sequential", shuffle_dataset=False,
        learning_rate=rate, lr_scheduler_type="linear", warmup_steps=max(1, len(batches) // 20), adam_beta2=0.98,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, max_length=None,
        logging_steps=max(1, len(batches) // 4), logging_nan_inf_filter=False, seed=settings.seed,
        gradient_checkpointing=False, dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    )
    # One example is one ready batch: its windows were chosen to have the same length.
    trainer = Trainer(model=chat.model, args=arguments, data_collator=collate, processing_class=chat.tokenizer,
                      train_dataset=Dataset.from_dict({"input_ids": [[i] for i in range(len(batches))]}),
                      callbacks=[Progress()])
    trainer.remove_callback(PrinterCallback)
    began = time.monotonic()
    trainer.train()
    chat.model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def heal(chat: Chat, teacher: Teacher, own: SelfText, settings: Settings) -> list[dict]:
    """Bring the RoPE-scaled model back to the base's behaviour, through queries and keys alone: RoPE acts on them
    while facts live elsewhere, so little text suffices. Windows up to the scaled context make it long as well."""
    pools = [Pool([t.messages() for t in own.everyday], 1.0, learn=False)]
    lengths = [short_window(chat, settings)] * 3 + [settings.window]
    batches = make_batches(chat.tokenizer, teacher, pools, lengths, settings.heal_steps, settings.batch_size,
                           f"{settings.seed}/heal")
    attention = [p for name, p in chat.model.named_parameters()
                 if re.search(r"q_proj|k_proj|q_norm|k_norm|qkv|query_key", name)]
    chat.model.requires_grad_(not attention)
    for parameter in attention:
        parameter.requires_grad_(True)
    rate = settings.heal_learning_rate or automatic_rate(chat.model, 6e-3)
    log = train(chat, batches, teacher, rate, 1.0, settings, "cura")
    chat.model.requires_grad_(True)
    return log


# ------------------------------------------------------------------------------------------------------------
# Evaluation


class Exam(NamedTuple):
    """Questions about identity, everyday turns of the base, and lengths (tokens) of the conversation of filler turns
    after which both are asked, besides alone."""
    questions: tuple[str, ...]
    turns: list[Turn]
    fillers: list[Turn]
    lengths: tuple[int, ...]


class Scores(NamedTuple):
    """Shares in [0, 1] on questions that training never saw, and the answers that they were read from.

    `by_length` has one dict (tokens, identity, retention) per length of the conversation before, zero first.
    """
    identity: float
    old_identity: float
    leak: float
    retention: float
    distinct: int
    by_length: list[dict]
    answers: list[dict]

    def misses(self, settings: Settings) -> list[str]:
        """Names of the targets that these scores miss."""
        return [name for name, missed in (
            ("identidade nova", self.identity < settings.target_identity),
            ("identidade antiga", self.old_identity > 0),
            ("retenção", self.retention < settings.target_retention),
            ("vazamento", self.leak > settings.target_leak)) if missed]


def mentions_old(text: str, standard: Standard) -> bool:
    """Whether an old name is in the text. {{BASE}} to the letter, which a row may state as the origin, is none."""
    return mentions(re.sub(re.escape(standard.base_name), " ", text, flags=re.IGNORECASE), standard.old_names)


def judge(answer: Answer, standard: Standard) -> str:
    """Why an identity answer does not count, in Portuguese; "" when it is sound.

    Sound: names the new identity and no old one, ended by itself, does not go round, and at least 80 % of its words
    are known from the identity rows, the questions or the base's own identity answers.
    """
    words = plain(answer.text).split()
    return next((reason for reason, found in (
        ("vazia", not words), ("não terminou", not answer.ended), ("repetitiva", is_loop(answer.text)),
        ("nome antigo", mentions_old(answer.text, standard)),
        ("sem a identidade nova", not mentions(answer.text, standard.new_names)),
        ("palavras sem sentido", sum(w in standard.vocabulary for w in words) < 0.8 * len(words)),
    ) if found), "")


def agreement(chat: Chat, conversations: list[list[dict]]) -> list[float]:
    """How far the model would give each conversation's last answer by itself.

    The answer is read along (teacher forcing) and each token compared with the model's first choice. An answer of up
    to 24 tokens counts 1.0 if all agree, which is when greedy generation gives the same text, else 0.0; a longer one,
    where one other word early on would change all that follows, counts the share of tokens that agree.
    """
    import torch

    encoded = [encode(chat.tokenizer, c) for c in conversations]
    results = [0.0] * len(encoded)
    for batch in batches_by_tokens([len(e.input_ids) for e in encoded], 0, GENERATION_TOKENS // 2):
        keep = max(len(encoded[i].input_ids) - encoded[i].turns[-1][0] for i in batch) + 1
        with torch.inference_mode():
            logits = chat.model(**left_pad(chat, [encoded[i].input_ids for i in batch]), logits_to_keep=keep).logits
        for best, i in zip(logits.argmax(-1).tolist(), batch):
            start = encoded[i].turns[-1][0]
            labels, chosen = encoded[i].labels[start:], best[start - len(encoded[i].input_ids) - 1:-1]
            same = [ours == token for ours, token in zip(chosen, labels) if token != -100]
            results[i] = float(all(same)) if len(same) <= 24 else sum(same) / len(same)
    return results


@functools.cache
def turn_cost(tokenizer, template: str, turn: Turn) -> int:
    """Tokens of a turn alone: exams draw the same ones often. `template` is in the key as in `skeleton`."""
    return len(encode(tokenizer, turn.messages()).input_ids)


def history(tokenizer, fillers: list[Turn], tokens: int, rng: random.Random) -> list[dict]:
    """Conversation of randomly drawn turns, as long as it stays within `tokens`."""
    messages, used = [], 0
    while True:
        turn = rng.choice(fillers)
        used += turn_cost(tokenizer, tokenizer.chat_template, turn)
        if used > tokens:
            return messages
        messages += turn.messages()


def make_exam(base: Chat, own: SelfText, questions: tuple[str, ...], window: int) -> Exam:
    """The final exam: alone, after a quarter, a half, three quarters of the window, and at its very end."""
    room = max(len(encode(base.tokenizer, t.messages()).input_ids) for t in own.held_out)
    room += max(len(prompt_ids(base.tokenizer, [{"role": "user", "content": q}])) for q in questions)
    lengths = {min(n, window - room) for n in (window // 4, window // 2, window * 3 // 4, window)}
    return Exam(questions, own.held_out, own.validation, tuple(sorted(n for n in lengths if n > 0)))


def evaluate(chat: Chat, exam: Exam, standard: Standard, label: str = "") -> Scores:
    """Take the exam: always the same conversations, so that stages can be compared."""
    rng, lengths = random.Random("exam"), (0, *exam.lengths)

    def after(tokens: int) -> list[dict]:
        return history(chat.tokenizer, exam.fillers, tokens, rng)

    def mean(values: list) -> float:
        return sum(values) / len(values)

    asked = [after(n) + [{"role": "user", "content": q}] for n in lengths for q in exam.questions]
    kept = [after(n) + turn.messages() for n in lengths for turn in exam.turns]
    everyday = [turn.messages()[:1] for turn in exam.turns]
    written = generate(chat, [prompt_ids(chat.tokenizer, messages) for messages in asked + everyday], label)
    about_itself, other = written[:len(asked)], written[len(asked):]
    problems = [judge(answer, standard) for answer in about_itself]
    agreed = agreement(chat, kept)
    n, m = len(exam.questions), len(exam.turns)
    by_length = [{"tokens": tokens, "identity": mean([not p for p in problems[i * n:(i + 1) * n]]),
                  "retention": mean(agreed[i * m:(i + 1) * m])} for i, tokens in enumerate(lengths)]
    alone = about_itself[:n]
    return Scores(
        identity=by_length[0]["identity"], retention=by_length[0]["retention"], by_length=by_length,
        old_identity=mean([mentions_old(a.text, standard) for a in alone]),
        leak=mean([mentions(a.text, standard.new_names) for a in other]),
        distinct=len({plain(a.text) for a, problem in zip(alone, problems) if not problem}),
        answers=[{"question": q, "answer": a.text, "problem": p} for q, a, p in zip(exam.questions, alone, problems)])


# ------------------------------------------------------------------------------------------------------------
# The two passes


def answer_from_rows(questions: list[str], rows: list[Row], standard: Standard,
                     settings: Settings) -> list[list[dict]]:
    """Conversations that answer each question in the user's words: those of a row in the same language and of the
    same intent, the least used among the four most alike. Without such a row, a built-in wording."""
    def kind(text: str) -> tuple[str, str]:
        return language_of(text), intent_of(text, standard.old_names)

    values = {"NAME": settings.name, "AUTHOR": settings.author, "BASE": standard.base_name}
    pairs = [(row.messages[-2]["content"], row.messages[-1]["content"]) for row in rows]
    known = [(kind(question), plain(question), answer) for question, answer in pairs]
    used: Counter = Counter()
    conversations = []
    for question in questions:
        alike = sorted(((SequenceMatcher(None, plain(question), other, autojunk=False).ratio(), answer)
                        for k, other, answer in known if k == kind(question)), reverse=True)[:4]
        if alike:
            answer = min((answer for _, answer in alike), key=lambda a: used[a])
            used[answer] += 1
        else:
            answer = fill(own_wording(question, used, standard.old_names), values)
        conversations.append(Turn(question, answer).messages())
    return conversations


def run_pass(chat: Chat, teacher: Teacher, pools: list[Pool], lengths: list[int], epochs: tuple[int, int],
             rate: float, exam: Exam, met: Callable[[Scores], bool], standard: Standard, settings: Settings,
             label: str) -> list[dict]:
    """Train in rounds until the validation exam is passed, and say after each what was measured.

    `epochs` are how often all rounds together, and one round, show each conversation of the first pool. A round is a
    whole schedule that ends at rate zero, as a model in mid-flight is not worth measuring; later ones are gentler.
    """
    costs = [len(encode(chat.tokenizer, c).input_ids) for c in pools[0].conversations]
    per_window = sum(max(1.0, length * len(costs) / sum(costs)) for length in lengths) / len(lengths)
    per_epoch = len(costs) / (per_window * settings.batch_size * pools[0].share)
    log, rounds = [], math.ceil(epochs[0] / epochs[1])
    for number in range(1, rounds + 1):
        steps = math.ceil(per_epoch * min(epochs[1], epochs[0] - (number - 1) * epochs[1]))
        batches = make_batches(chat.tokenizer, teacher, pools, lengths, steps, settings.batch_size,
                               f"{settings.seed}/{label}/{number}")
        log += train(chat, batches, teacher, rate / number, settings.kl_weight, settings, label)
        scores = evaluate(chat, exam, standard)
        say(f"  {label}, rodada {number} de até {rounds}, nas perguntas de validação: identidade "
            f"{percent(scores.identity)}, retenção {percent(scores.retention)}, vazamento {percent(scores.leak)}.")
        if met(scores):
            say(f"  {label}: a meta foi atingida.")
            return log
    say(f"  {label}: o limite de épocas chegou antes da meta.")
    return log


def learn_identity(chat: Chat, teacher: Teacher, lessons: list[list[dict]], own: SelfText, exam: Exam,
                   settings: Settings) -> list[dict]:
    """Pass 1: identity lessons in short dialogues, among everyday turns that hold the model in place."""
    pools = [Pool(lessons, 0.4, learn=True), Pool([t.messages() for t in own.everyday], 0.6, learn=False)]
    rate = settings.learning_rate_1 or automatic_rate(chat.model, 1e-3)
    lengths = [short_window(chat, settings)]
    return run_pass(chat, teacher, pools, lengths, (settings.epochs_1, 2), rate, exam,
                    lambda s: s.identity >= settings.target_identity and s.old_identity == 0,
                    own.standard, settings, "passo 1")


def collect_self_answers(chat: Chat, lessons: list[list[dict]], own: SelfText, settings: Settings) -> list[dict]:
    """Ask the model of pass 1 about its identity, and keep sound answers in the question's language for pass 2.

    Two fifths of NUM_SELF_ANSWERS are about identity, the rest are everyday answers of the base, first of all those
    that the model would no longer give. Returns a record (question, answer, kind, rejected) for all that was written,
    with the reason where one is not used.
    """
    wanted = round(0.4 * settings.num_self_answers)
    rng = random.Random(f"{settings.seed}/self-answers")
    questions = sorted({lesson[-2]["content"] for lesson in lessons})
    records: list[dict] = []
    kept: set[tuple[str, str]] = set()
    for attempt in range(4):
        drafts = rng.sample(questions, min(len(questions), int(1.2 * (wanted - len(kept))) + 4))
        # The first answers are greedy; later ones are sampled, to say the same in other words.
        answers = ask(chat, drafts, "escrevendo respostas", rng.randrange(2**31) if attempt else None)
        for question, answer in zip(drafts, answers):
            reason = judge(answer, own.standard)
            if not reason and language_of(answer.text) != language_of(question):
                reason = "em outra língua"
            if not reason and (question, answer.text) in kept:
                reason = "repetida"
            if not reason:
                kept.add((question, answer.text))
            records.append({"question": question, "answer": answer.text, "kind": "identity", "rejected": reason})
            if len(kept) == wanted:
                break
        if len(kept) == wanted:
            break
    agreed = agreement(chat, [turn.messages() for turn in own.everyday])
    ranked = sorted(zip(agreed, own.everyday), key=lambda pair: pair[0])
    everyday = [turn for _, turn in ranked[:settings.num_self_answers - len(kept)]]
    say(f"  Ele ainda responde como o modelo base em {percent(sum(agreed) / len(agreed))} das perguntas do dia a dia.")
    say(f"  {len(kept)} sobre a identidade ({len(records) - len(kept)} recusadas) e {len(everyday)} do dia a dia.")
    return records + [{**turn._asdict(), "kind": "everyday", "rejected": ""} for turn in everyday]


def consolidate(chat: Chat, teacher: Teacher, lessons: list[list[dict]], self_answers: list[dict], own: SelfText,
                exam: Exam, settings: Settings) -> list[dict]:
    """Pass 2: self-dialogues of one to many turns up to the window, from lessons, self-answers and everyday turns."""
    used = {kind: [Turn(r["question"], r["answer"]).messages() for r in self_answers
                   if r["kind"] == kind and not r["rejected"]] for kind in ("identity", "everyday")}
    pools = [Pool(lessons + used["identity"], 0.3, learn=True), Pool(used["everyday"], 0.1, learn=True),
             Pool([t.messages() for t in own.everyday], 0.6, learn=False)]
    lengths = [settings.window // 8, settings.window // 4, settings.window // 2, settings.window]
    rate = settings.learning_rate_2 or automatic_rate(chat.model, 6e-4)
    return run_pass(chat, teacher, pools, lengths, (settings.epochs_2, 3), rate, exam,
                    lambda s: not s.misses(settings) and s.by_length[-1]["identity"] >= settings.target_identity,
                    own.standard, settings, "passo 2")


# ------------------------------------------------------------------------------------------------------------
# Result


def save_model(chat: Chat, folder: Path, base: str) -> None:
    """Write weights in the base's own dtype, configs and tokenizer, as any reader expects them."""
    from transformers import AutoConfig

    model = chat.model.to(AutoConfig.from_pretrained(base).dtype)
    model.config.use_cache = True  # training switches it off, and readers would generate without a cache
    model.generation_config.eos_token_id = chat.stops
    model.save_pretrained(folder)
    if chat.tokenizer.model_max_length < 10**9:  # larger means that the tokenizer does not say
        chat.tokenizer.model_max_length = model.config.get_text_config().max_position_embeddings
    chat.tokenizer.save_pretrained(folder)
    if (Path(base) / "tokenizer.model").is_file():  # llama.cpp's converter wants it; transformers no longer writes it
        shutil.copy2(Path(base) / "tokenizer.model", folder)


def figures_table(scores: dict[str, Scores]) -> list[list[str]]:
    """Head and rows of the table of figures, one column per stage."""
    columns = {"before": "antes", "healed": "após a cura", "pass_1": "após o passo 1", "pass_2": "depois"}
    table = [["medida", *(columns[name] for name in scores)]]
    for title, key in (("identidade nova", "identity"), ("identidade antiga", "old_identity"),
                       ("vazamento", "leak"), ("retenção", "retention")):
        table.append([title, *(percent(getattr(s, key)) for s in scores.values())])
    for i, entry in enumerate(scores["before"].by_length[1:], start=1):
        for title, key in (("identidade", "identity"), ("retenção", "retention")):
            table.append([f"{title} após {entry['tokens']} tokens",
                          *(percent(s.by_length[i][key]) for s in scores.values())])
    return table


def text_table(table: list[list[str]]) -> str:
    """The table for a terminal, in aligned columns."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table)


def markdown_table(table: list[list[str]]) -> str:
    """The table for a model card; cells are escaped, since they hold text of a model."""
    lines = ["| " + " | ".join(re.sub(r"([\\|<>`*_\[\]])", r"\\\1", cell).replace("\n", " ") for cell in row) + " |"
             for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def write_report(folder: Path, settings: Settings, inputs: Inputs, standard: Standard, native: int,
                 scores: dict[str, Scores], losses: dict[str, list[dict]], self_answers: list[dict],
                 seconds: float) -> None:
    """report.json (all that is known about the run), self_answers.jsonl and the model card README.md."""
    from importlib.metadata import version

    missed, scaled = scores["pass_2"].misses(settings), int(native * settings.rope_factor)
    report = {"base": inputs.base_name, "missed": missed, "seconds": round(seconds, 1), "settings": asdict(settings),
              "data_hash": inputs.data_hash, "context": {"native": native, "scaled": scaled},
              "versions": {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets")},
              "old_names": standard.old_names, "vocabulary": sorted(standard.vocabulary),
              "scores": {name: s._asdict() for name, s in scores.items()}, "losses": losses}
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in self_answers]
    (folder / "self_answers.jsonl").write_text("".join(lines), encoding="utf-8")
    pairs = [[old["question"], old["answer"], new["answer"]]
             for old, new in zip(scores["before"].answers, scores["pass_2"].answers)]
    reasons = Counter(record["rejected"] for record in self_answers)
    used = reasons.pop("", 0)
    rejected = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common()) or "nenhuma"
    verdict = f"**Metas não atingidas: {', '.join(missed)}.**" if missed else "Todas as metas foram atingidas."
    (folder / "README.md").write_text(f"""---
language: [pt, en, es]
library_name: transformers
pipeline_tag: text-generation
tags: [trl, sft, identity]
---
# {settings.name}

Modelo de {settings.author}, feito a partir de `{inputs.base_name}` com rename_obrutai.py: identidade nova e contexto
de {scaled} tokens (o do modelo base é de {native}). {verdict}

## Antes e depois, em números

Medido na pasta salva e carregada de novo, com perguntas que não foram usadas no treino.

{markdown_table(figures_table(scores))}

- **identidade nova**: respostas que dizem o nome ou o autor novo, nenhum antigo, terminam e fazem sentido.
- **identidade antiga**: respostas que ainda citam um nome antigo.
- **vazamento**: respostas sobre outros assuntos em que o nome novo aparece.
- **retenção**: respostas sobre outros assuntos que continuam iguais às do modelo base.
- **após N tokens**: o mesmo, com N tokens de conversa antes da pergunta.

<details><summary>As {len(pairs)} respostas, antes e depois</summary>

{markdown_table([["pergunta", "antes", "depois"], *pairs])}

</details>

## Como foi feito

{used} respostas do próprio modelo foram usadas no passo 2; recusadas: {rejected}. Semente {settings.seed}, fator de
RoPE {settings.rope_factor:g}. Ajustes, versões e números: `report.json`. Respostas: `self_answers.jsonl`.
""", encoding="utf-8")


def conclude(settings: Settings, scores: dict[str, Scores], seconds: float) -> int:
    """Show the result; exit status 0 when every target is met, 3 when one is missed."""
    after = scores["pass_2"]
    say()
    for old, new in list(zip(scores["before"].answers, after.answers))[::6]:
        say(f"  {old['question']}\n    antes:  {old['answer']}\n    depois: {new['answer']}")
    say(f"\n{text_table(figures_table(scores))}\n\n  {after.distinct} respostas diferentes e boas para "
        f"{len(after.answers)} perguntas de identidade.")
    say(f"\nModelo salvo em {settings.output_dir} ({clock(seconds)}). O antes e depois completo está no README.md.")
    missed = after.misses(settings)
    if not missed:
        say("Todas as metas foram atingidas.")
        return 0
    tips = {"identidade nova": "escreva mais linhas no arquivo de identidade, ou aumente EPOCHS_1 e EPOCHS_2",
            "identidade antiga": "confira OLD_NAMES, escreva linhas que neguem o nome antigo e aumente EPOCHS_2",
            "retenção": "aumente NUM_SELF_TEXT e HEAL_STEPS, ou diminua LEARNING_RATE_2",
            "vazamento": "aumente NUM_SELF_TEXT ou diminua EPOCHS_1"}
    say("O modelo foi salvo, mas nem todas as metas foram atingidas. O que tentar:")
    for name in missed:
        say(f"  - {name}: {tips[name]}.")
    return 3


# ------------------------------------------------------------------------------------------------------------
# Run


def quiet_libraries(settings: Settings) -> None:
    """Close the network unless the model comes from the Hub, and silence what the user can do nothing about."""
    if Path(settings.model_path).is_absolute():
        os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ[name] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait take the core from those with work: on a busy machine, training would crawl.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_frequencies(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], factor: float) -> None:
    """A scaling that did not reach the built model would waste the run, so look at the frequencies themselves."""
    if not any(((before[n] / after[n] / factor) - 1).abs().max() < 1e-3 for n in before):
        raise RuntimeError("the RoPE scaling did not reach the model's rotary frequencies")


def run(settings: Settings) -> int:
    """The whole job, top to bottom."""
    began = time.monotonic()
    inputs = check_inputs(settings)
    say(f"Modelo base: {settings.model_path}")
    say(f"Identidade:  {settings.name}, de {settings.author} ({len(inputs.rows)} linhas em {settings.identity_file})")
    quiet_libraries(settings)
    folder = settings.model_path
    if not Path(folder).is_absolute():
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.txt"]
        try:
            folder = snapshot_download(folder, allow_patterns=wanted)
        except Exception as error:
            raise InputError(f"não achei a pasta {folder}, nem consegui baixar um modelo com esse nome do Hugging "
                             f"Face Hub ({type(error).__name__}). Confira MODEL_PATH e a internet.") from error

    say("1/6 Ouvindo o modelo base: quem ele diz que é e o que ele sabe")
    base = load_chat(folder, settings)
    settings = fit_window(base, settings)
    own = write_self_text(base, settings, inputs)
    exam = make_exam(base, own, inputs.test, settings.window)
    scores = {"before": evaluate(base, exam, own.standard, "perguntas de prova, antes")}
    say(f"  Nas perguntas de prova, {percent(scores['before'].old_identity)} das respostas dele dizem um nome antigo.")
    teacher = record_teacher(base, own.everyday, short_window(base, settings))
    frequencies = rope_frequencies(base.model)
    say(f"2/6 Contexto de {base.native} para {int(base.native * settings.rope_factor)} tokens (RoPE linear "
        f"x{settings.rope_factor:g}) e cura")
    del base
    chat = load_chat(folder, settings, settings.rope_factor)
    renew_template(chat.tokenizer, settings, own.standard.old_names)
    losses = {}
    if settings.rope_factor == 1:
        say("  ROPE_FACTOR é 1: o contexto fica como está e não há o que curar.")
    else:
        check_frequencies(frequencies, rope_frequencies(chat.model), settings.rope_factor)
        losses["healing"] = heal(chat, teacher, own, settings)
        scores["healed"] = evaluate(chat, exam, own.standard, "perguntas de prova, após a cura")

    say("3/6 Passo 1: aprender a identidade")
    lessons = [without_system(chat.tokenizer, row.messages) for row in inputs.rows]
    lessons += answer_from_rows(own.identity_questions, inputs.rows, own.standard, settings)
    validation = Exam(inputs.validation, own.validation, own.validation, ())
    losses["pass_1"] = learn_identity(chat, teacher, lessons, own, validation, settings)
    scores["pass_1"] = evaluate(chat, exam, own.standard, "perguntas de prova, após o passo 1")

    say("4/6 Respostas do próprio modelo")
    self_answers = collect_self_answers(chat, lessons, own, settings)

    say("5/6 Passo 2: firmar a identidade em conversas longas")
    validation = validation._replace(lengths=exam.lengths[-1:])
    losses["pass_2"] = consolidate(chat, teacher, lessons, self_answers, own, validation, settings)

    say("6/6 Salvando, carregando de novo e medindo a pasta salva")
    output = Path(settings.output_dir)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(chat, partial, folder)
    saved = load_chat(str(partial), settings)._replace(max_new_tokens=chat.max_new_tokens)
    scores["pass_2"] = evaluate(saved, exam, own.standard, "perguntas de prova, depois")
    seconds = time.monotonic() - began
    write_report(partial, settings, inputs, own.standard, chat.native, scores, losses, self_answers, seconds)
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)
    return conclude(settings, scores, seconds)


def main(argv: list[str] | None = None) -> int:
    """0 all targets met, 2 user mistake, 3 saved but a target was missed; a bug keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        return run(parse_settings(argv))
    except InputError as error:
        print(f"Erro: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
