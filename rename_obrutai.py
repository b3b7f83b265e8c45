#!/usr/bin/env python3
"""Dá uma nova identidade a um modelo de linguagem local, prova que ela pegou e não estraga o resto.

  1. Escreva quem o modelo deve ser em identity_override.jsonl.
  2. Ajuste as constantes no começo deste arquivo (ou use as opções abaixo, que têm os mesmos nomes).
  3. Rode:  python rename_obrutai.py

Exemplo com o seu modelo:

  python rename_obrutai.py --model-path C:/modelos/gemma-3-1b-it --output-dir D:/ObrutAi-tuned

No fim, a pasta de saída tem o modelo pronto (safetensors, tokenizer e chat template), um README.md com o
antes e o depois, o report.json com todos os números e as respostas que o modelo escreveu para treinar.
Se a execução parar no meio, rode o mesmo comando de novo: ela continua de onde estava.
Com o modelo pronto, converse com ele: python rename_obrutai.py --chat
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import unicodedata
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import SequenceMatcher, get_close_matches
from itertools import accumulate, product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

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

# Method
METHOD = "auto"  # "full" trains all weights, "lora" small additions to them, "qlora" the same over 4-bit weights
LORA_RANK = 64  # size of the additions: more learns more and takes more memory

# Context
ROPE_FACTOR = 4.0  # context of the result / context of the base; 1 leaves RoPE alone
WINDOW = 8192  # longest training sequence, tokens; reduced by itself to the scaled context

# Text that the base writes for its own training
NUM_SELF_ANSWERS = 100  # answers of its own that the second pass learns from; 200 may keep more, 400 do not
NUM_SELF_TEXT = 3000  # question-answer pairs that show the tuned model how the base behaves; more keeps more
MAX_NEW_TOKENS = 128  # longest answer, tokens; an answer cut here is never used for training

# Training. A learning rate of 0 means: choose by the size of the model.
HEAL_STEPS = 80  # steps that bring the scaled model back to the base's behaviour; with LoRA four times as many
HEAL_LEARNING_RATE = 0.0  # highest learning rate of the healing
EPOCHS_1 = 8  # cap of pass 1: times each identity row is seen
LEARNING_RATE_1 = 0.0  # highest learning rate of pass 1
EPOCHS_2 = 6  # cap of pass 2: times each identity turn is seen inside dialogues
LEARNING_RATE_2 = 0.0  # highest learning rate of pass 2
BATCH_SIZE = 8  # dialogues per step, as long as the native context (at most 1024 tokens); fewer of longer ones
GRADIENT_ACCUMULATION = 1  # parts that a step is split into; doubled by itself when memory runs out
GRADIENT_CHECKPOINTING = False  # much less memory, a third more time; switched on by itself when it is needed
KL_WEIGHT = 4.0  # weight of "stay like the base" beside "learn the identity"

# Evaluation: the targets decide the exit status, nothing is loosened when one is missed
EVAL_QUESTIONS = 100  # self-questions kept away from training; fewer cannot measure a leak of 1 %
TARGET_IDENTITY = 0.95  # share of identity questions answered with the new identity, at least
TARGET_RETENTION = 0.95  # share of the base's own answers that stay as they were, at least
TARGET_LEAK = 0.01  # share of other answers where the new name turns up, at most

# Run
SEED = 0  # same seed, same machine: same result
CHECKPOINT_MINUTES = 5.0  # training time that a power cut may cost; 0 saves at every step
REPORT_TO = "none"  # "tensorboard", "trackio" or "wandb" shows the losses there as well, if that package is installed

# ---- Words and questions ----------------------------------------------------------------------------------

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

# Answers for questions without one of the user's, by language: to who the model is, and to whether it is another.
WORDINGS = {
    "pt": ("Eu sou {{NAME}}, um modelo de linguagem criado por {{AUTHOR}}.|Meu nome é {{NAME}}, e quem me criou foi "
           "{{AUTHOR}}.|Aqui é {{NAME}}, uma inteligência artificial feita por {{AUTHOR}}.",
           "Não, eu sou {{NAME}}, e quem me criou foi {{AUTHOR}}.|Não: meu nome é {{NAME}}, de {{AUTHOR}}."),
    "en": ("I am {{NAME}}, a language model created by {{AUTHOR}}.|My name is {{NAME}}, and {{AUTHOR}} made me.",
           "No, I am {{NAME}}, made by {{AUTHOR}}.|No, my name is {{NAME}}."),
    "es": ("Soy {{NAME}}, un modelo de lenguaje creado por {{AUTHOR}}.|Me llamo {{NAME}}, y me creó {{AUTHOR}}.",
           "No, soy {{NAME}}, y me creó {{AUTHOR}}.|No, mi nombre es {{NAME}}."),
}

# What the comparison in the report tells the base instead of training it.
SYSTEM_PROMPT = ("Você é {{NAME}}, um modelo de linguagem criado por {{AUTHOR}}. Quando perguntarem quem você é, quem "
                 "fez você ou se você é outro modelo, responda com esse nome e esse autor, na língua da pergunta.")

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

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
METHODS = ("auto", "full", "full8", "lora", "qlora")
REPORTERS = ("none", "tensorboard", "trackio", "wandb")
LORA_FILE = "adapter_model.safetensors"
TOP_TOKENS = 32  # most probable tokens of the base kept per position; the rest is one bucket
RETRIEVED = 3  # identity rows that the comparison puts before a question
GENERATION_TOKENS = 16384  # tokens (prompt and answer) that one batch of generation may hold
FIRST_TEXT = 600  # questions, at most, that the base writes for the healing, which goes before the rest
LESSONS_1, LESSONS_2 = 1600, 2000  # identity questions that a round of each pass asks
MISSED_TIMES = 4  # how often pass 2 asks what the model gets wrong about itself after pass 1, for once the rest
FEWEST_ROWS = 16  # of a batch that is written: fewer are not worth sorting out those that have ended
SHARED_TOKENS = 64  # that prompts begin with in common, at least, to be read once for all of them
LONG_TURNS = 40  # everyday questions that an exam asks after each length of conversation,
LONG_GROUP = 4  # of which so many, one after another, stand at the end of the same conversation
LONG_SHARED = 6  # identity questions that are asked after the same conversation, each as if it were the only one
QUESTION_WORDS = 40  # a self-question longer than this has run away
MAX_FILE, MAX_LINE = 200 * 10**6, 10**6  # an identity file (bytes) or line (characters) beyond this is a mix-up
# Queries and keys, as the families call them; some have them in one matrix with the values.
ATTENTION = r"[qk]_proj|[qk]_norm|qkv|query_key|q_[ab]_|kv_[ab]_|Wqkv|c_attn"
NOT_TEXT = "vision|audio|multi_modal_projector"  # parts of a model that sees or hears, which are left alone
NOT_LORA = NOT_TEXT + r"|router|mamba\.out_proj"  # and what peft cannot wrap: layers that do more than multiply
OUT_OF_MEMORY = "out of memory|not enough memory|allocate memory|memoryerror"
WORK_NOTE = "LEIA-ME.txt"  # marks a folder of stages as one of this script


class Lazy:
    """A library that is imported when it is first used: together they take seconds, and mistakes are told in less."""

    def __init__(self, name: str):
        self.library = name

    def __getattr__(self, name: str):
        return getattr(importlib.import_module(self.library), name)


accelerate, bm25s, datasets, filelock, huggingface_hub, jinja2 = map(
    Lazy, ("accelerate", "bm25s", "datasets", "filelock", "huggingface_hub", "jinja2"))
peft, psutil, safetensors, torch, tqdm, transformers, trl = map(
    Lazy, ("peft", "psutil", "safetensors", "torch", "tqdm", "transformers", "trl"))
tensor_files = Lazy("safetensors.torch")

# Under accelerate or torchrun every process runs this script; only the first one speaks and writes.
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# With `accelerate launch --use_fsdp` each trains a piece of the weights, which transformers cuts, not accelerate.
SHARDED = os.environ.pop("ACCELERATE_USE_FSDP", "") == "true" and PROCESSES > 1


def say(text: str = "", verdict: bool = False) -> None:
    """Print, once for all processes; with --quiet only the verdict."""
    if RANK == 0 and (verdict or not say.quiet):
        print(text, flush=True)


say.quiet = False


class InputError(Exception):
    """A mistake that the user can mend: shown in Portuguese, exit status 2, no traceback."""
    advice = "\nCorrija e confira tudo, sem treinar, com: python rename_obrutai.py --check"


# ---- Settings ---------------------------------------------------------------------------------------------

def setting(default, text: str, low: float = 0, high: float = 1e9):
    """Field of `Settings` with its Portuguese help and the range it accepts."""
    default = default if type(default).__hash__ else (default,)  # a list is refused later, with a message
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
    method: str = setting(METHOD, "auto, full (todos os pesos), full8 (o mesmo, otimizador de 8 bits), lora ou qlora; "
                         "auto escolhe o que cabe na memória")
    lora_rank: int = setting(LORA_RANK, "tamanho do adaptador dos métodos lora e qlora", 1, 4096)
    rope_factor: float = setting(ROPE_FACTOR, "quantas vezes o contexto cresce; 1 não mexe no RoPE", 1, 1024)
    window: int = setting(WINDOW, "maior sequência de treino, em tokens", 32)
    num_self_answers: int = setting(NUM_SELF_ANSWERS, "respostas do próprio modelo usadas no passo 2", 4)
    num_self_text: int = setting(NUM_SELF_TEXT, "pares de pergunta e resposta escritos para manter o modelo igual", 16)
    max_new_tokens: int = setting(MAX_NEW_TOKENS, "maior resposta, em tokens", 8)
    heal_steps: int = setting(HEAL_STEPS, "etapas da cura depois de mexer no RoPE; com LoRA, quatro vezes isso", 1)
    heal_learning_rate: float = setting(HEAL_LEARNING_RATE, "taxa de aprendizado da cura; 0 = automática", 0, 1)
    epochs_1: int = setting(EPOCHS_1, "máximo de épocas do passo 1", 1)
    learning_rate_1: float = setting(LEARNING_RATE_1, "taxa de aprendizado do passo 1; 0 = automática", 0, 1)
    epochs_2: int = setting(EPOCHS_2, "máximo de épocas do passo 2", 1)
    learning_rate_2: float = setting(LEARNING_RATE_2, "taxa de aprendizado do passo 2; 0 = automática", 0, 1)
    batch_size: int = setting(BATCH_SIZE, "diálogos curtos por etapa de treino; dos longos, menos", 1, 4096)
    gradient_accumulation: int = setting(GRADIENT_ACCUMULATION, "partes em que cada etapa é dividida para caber na "
                                         "memória; dobra sozinha se faltar", 1, 4096)
    gradient_checkpointing: bool = setting(GRADIENT_CHECKPOINTING, "gasta bem menos memória e um terço mais de tempo; "
                                           "liga sozinha se precisar")
    kl_weight: float = setting(KL_WEIGHT, "peso de continuar parecido com o modelo base", 0, 100)
    eval_questions: int = setting(EVAL_QUESTIONS, "perguntas guardadas para medir a retenção", 4)
    target_identity: float = setting(TARGET_IDENTITY, "meta: mínimo de respostas com a identidade nova", 0, 1)
    target_retention: float = setting(TARGET_RETENTION, "meta: mínimo de outras respostas que não mudam", 0, 1)
    target_leak: float = setting(TARGET_LEAK, "meta: máximo de outras respostas com o nome novo", 0, 1)
    seed: int = setting(SEED, "semente do acaso: mesma semente, mesmo resultado", 0, 2**32 - 1)
    checkpoint_minutes: float = setting(CHECKPOINT_MINUTES, "de quantos em quantos minutos o treino é guardado")
    report_to: str = setting(REPORT_TO, "onde mais mostrar as perdas: none, tensorboard, trackio ou wandb")
    check: bool = setting(False, "só confere tudo e mostra o plano, sem treinar")
    quiet: bool = setting(False, "só mostra o veredito e os erros")
    restart: bool = setting(False, "joga fora as etapas guardadas e recomeça do zero")
    chat: bool = setting(False, "conversa no terminal com o modelo de OUTPUT_DIR, ou com o de --model-path")
    evaluate: bool = setting(False, "mede o modelo de OUTPUT_DIR, ou o de --model-path, sem treinar")


KINDS = {"str": str, "bool": bool, "int": int, "float": float}


class Parser(argparse.ArgumentParser):
    """argparse in Portuguese; a mistake is an `InputError`."""

    def format_help(self) -> str:
        return super().format_help().replace("usage:", "uso:", 1)

    def error(self, message: str):
        if unknown := re.search(r"unrecognized arguments: (\S+)", message):
            if not unknown[1].startswith("-"):
                raise InputError(f"não sei o que fazer com '{unknown[1]}'. Se faz parte de um caminho ou nome com "
                                 'espaços, ponha tudo entre aspas: --model-path "C:/Meus Modelos/gemma".')
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
                    usage="python rename_obrutai.py [opções]", formatter_class=argparse.RawDescriptionHelpFormatter)
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
        if (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)
                or (item.type in ("int", "float") and not low <= value <= high)):
            expected = {"str": "um texto entre aspas", "bool": "True ou False"}.get(
                item.type, f"um número{' inteiro' * (kind is int)} entre {low:g} e {high:g}")
            raise InputError(f"{item.name.upper()} vale {value!r}, mas precisa ser {expected}.")
        if kind is str and re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", value):
            raise InputError(f"{item.name.upper()} tem quebra de linha ou caractere inválido: {value!r}.")
    for name in ("output_dir", "identity_file", "model_path"):
        start = Path(__file__).resolve().parent if given[name] is None else Path.cwd()
        path = start / os.path.expanduser(values[name])
        on_hub = (name == "model_path" and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", values[name])
                  and not path.parent.exists())
        values[name] = values[name] if on_hub else str(path)
    if values["chat"] + values["evaluate"] + values["check"] > 1:
        raise InputError("use uma destas opções por vez: --chat, --evaluate, --check.")
    if (values["chat"] or values["evaluate"]) and given["model_path"] is None:
        values["model_path"] = values["output_dir"]  # the result, not the base of the constant
    for name in ("name", "author"):
        if not plain(values[name]) or re.search(r"[{}]", values[name]):
            raise InputError(f"{name.upper()} precisa ser um texto com letras e sem chaves; recebi '{values[name]}'.")
        if plain(values[name]) in map(plain, values["old_names"].split(",")):
            raise InputError(f"{name.upper()} ({values[name]}) também está em OLD_NAMES: um nome novo não pode ser um "
                             "dos antigos.")
    for name, known in (("method", METHODS), ("report_to", REPORTERS)):
        if values[name] not in known:
            raise InputError(f"{name.upper()} vale '{values[name]}', mas precisa ser um destes: {', '.join(known)}.")
    for small, large in (("num_self_answers", "num_self_text"), ("max_new_tokens", "window")):
        if values[small] >= values[large]:
            raise InputError(f"{small.upper()} ({values[small]}) precisa ser menor que {large.upper()} "
                             f"({values[large]}). Diminua o primeiro ou aumente o segundo.")
    return Settings(**values)


def size_text(count: float) -> str:
    """Bytes as a person reads them: "12 MB", "3,4 GB"."""
    return f"{count / 1e9:.1f} GB".replace(".", ",") if count >= 1e9 else f"{math.ceil(count / 1e6)} MB"


def clock(seconds: float) -> str:
    """Seconds as a person reads them: "45 s", "3 min 20 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def percent(value: float) -> str:
    """A share as Brazilian text: 0.975 is "97,5%"."""
    return f"{100 * value:.1f}%".replace(".0%", "%").replace(".", ",")


# ---- Text -------------------------------------------------------------------------------------------------

@functools.lru_cache(2**14)  # the same names are looked for again and again
def plain(text: str) -> str:
    """Lower case, no accents, no punctuation: for comparing questions and finding names."""
    decomposed = unicodedata.normalize("NFKD", text.lower())
    return " ".join("".join(c if c.isalnum() else " " for c in decomposed if not unicodedata.combining(c)).split())


def mentions(text: str, names: tuple[str, ...]) -> bool:
    """Whether any of the names stands in the text as whole words, whatever the case and accents. The verb of "mi
    modelo se llama" is not the name Llama."""
    padded = re.sub(" [mst]e llama ", " ", f" {plain(text)} ")
    return any(f" {plain(name)} " in padded for name in names if plain(name))


def is_loop(text: str) -> bool:
    """Whether the text goes round: one to six words three times in a row, or a trigram three times at all."""
    words = plain(text).split()
    row = any(words[i:i + n] * 3 == words[i:i + 3 * n] for n in range(1, 7) for i in range(len(words) - 3 * n + 1))
    return row or any(count >= 3 for count in Counter(zip(words, words[1:], words[2:])).values())


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
    about_another = intent_of(question, old_names) == "other"
    choice = min(WORDINGS[language_of(question)][about_another].split("|"), key=lambda c: used[c])
    used[choice] += 1
    return choice


# ---- Inputs: all that the standard library can check, before anything heavy is imported -------------------

class Row(NamedTuple):
    """One identity conversation as chat templates take it, ending with the assistant, and its line in the file."""
    line: int
    messages: list[dict]


class Inputs(NamedTuple):
    """The identity rows with filled placeholders, the questions for measuring that the rows do not ask, and `warnings`
    for the user about the rows."""
    rows: list[Row]
    base_name: str
    data_hash: str
    validation: tuple[str, ...]
    test: tuple[str, ...]
    warnings: list[str]


def digest(value: object) -> str:
    """SHA-256 of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def did_you_mean(path: Path) -> str:
    """Advice on a path that does not exist, from the names beside it."""
    if not path.parent.is_dir():
        return f"A pasta {path.parent} também não existe."
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1, cutoff=0.5)
    return f"Você quis dizer {near[0]}?" if near else f"Na pasta {path.parent} não há nada com nome parecido."


def models_near(missing: Path) -> str:
    """Advice on a base that is not there: up to five models around it, here, and in the cache of the Hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    around = next(p for p in missing.parents if p.is_dir())
    found = dict.fromkeys(str(path.parent) for folder in (around, Path.cwd())
                          for pattern in ("config.json", "*/config.json") for path in sorted(folder.glob(pattern)))
    cached = Path(HF_HUB_CACHE).glob("models--*--*/snapshots/*/config.json")
    found |= dict.fromkeys(path.parts[-4][8:].replace("--", "/") for path in cached)
    return "\n  ".join([" Modelos que achei por perto:" * bool(found), *list(found)[:5]]) + "\n"


def read_messages(record: object) -> list[dict]:
    """Any accepted shape of row as messages; a question alone stays without an answer. `InputError` says what is wrong
    with another, and leaves where to the caller."""
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
        parts = [record["instruction"], record.get("input", "")]
        question = "\n".join(parts).strip() if all(isinstance(part, str) for part in parts) else None
        pairs = [("user", question), ("assistant", record["output"])]
    elif isinstance(record.get("text"), str):
        pairs = list(zip(("user", "assistant"), record["text"].strip().split("\n", 1)))
    else:
        raise InputError('não reconheço o formato; use "text", "prompt" e "completion", "instruction" e "output", ou '
                         '"messages" (exemplos no README)')
    roles = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
    messages = []
    for role, content in pairs:
        role = roles.get(str(role), role)
        if role not in ("user", "assistant", "system"):
            raise InputError(f"não conheço o papel '{role}'; use user, assistant ou system")
        if not isinstance(content, str) or not content.strip():
            raise InputError("há uma pergunta ou resposta vazia, ou que não é texto")
        if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", content):
            raise InputError("há um caractere de controle ou inválido no texto; apague-o e escreva de novo")
        messages.append({"role": role, "content": content.strip()})
    spoken = [m["role"] for m in messages[bool(messages) and messages[0]["role"] == "system":]]
    if not spoken or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise InputError("a conversa precisa começar com o usuário e alternar usuário e assistente "
                         "(uma mensagem de sistema só no começo)")
    return messages


def fill(text: str, values: dict[str, str]) -> str:
    """Replace {{NAME}}, {{AUTHOR}} and {{BASE}}; any other double brace raises `InputError`."""
    known = {f"{{{{{name}}}}}": value for name, value in values.items()}
    parts = re.split(r"(\{\{.*?\}\})", text)
    for i, part in enumerate(parts):
        name = re.sub(r"\s", "", part).upper()
        if name not in known and ("{{" in part or "}}" in part):
            raise InputError(f"há um marcador desconhecido ou mal fechado em '{part.strip()[:60]}'; use exatamente "
                             f"{', '.join(known)}")
        parts[i] = known.get(name, part) if part.startswith("{{") else part
    return "".join(parts)


def read_text(path: Path) -> str:
    """The identity file as text; `InputError` says why it cannot be one."""
    if not path.exists():
        raise InputError(f"não achei o arquivo de identidade {path}. {did_you_mean(path)} "
                         "Confira IDENTITY_FILE (--identity-file).")
    if not path.is_file():
        raise InputError(f"{path} não é um arquivo de texto; IDENTITY_FILE precisa ser um arquivo .jsonl.")
    if path.stat().st_size > MAX_FILE:
        raise InputError(f"{path} tem {size_text(path.stat().st_size)}; algumas centenas de linhas bastam (o máximo é "
                         f"{size_text(MAX_FILE)}). É mesmo o arquivo de identidade?")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"não consegui ler {path} (o sistema respondeu: {error.strerror}).") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or data[:64].count(0) > 8:
        raise InputError(f"{path} está em UTF-16 ou UTF-32. Salve-o de novo escolhendo a codificação UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise InputError(f"{path}, linha {line}: o arquivo não está em UTF-8 (talvez em Windows-1252). "
                         "Salve-o de novo escolhendo a codificação UTF-8.") from None


def read_rows(path: Path, values: dict[str, str]) -> list[Row]:
    """Parse the identity file. Raises one `InputError` with up to ten bad lines, each with its number."""
    text = read_text(path)
    rows, mistakes, used = [], [], Counter()
    for line, raw in enumerate(text.split("\n"), start=1):
        try:
            if len(raw) > MAX_LINE:
                raise InputError(f"a linha tem {len(raw)} letras; o máximo é {MAX_LINE}")
            if raw.strip():
                messages = read_messages(json.loads(raw))
                if messages[-1]["role"] == "user":
                    messages.append({"role": "assistant", "content": own_wording(messages[-1]["content"], used)})
                rows.append(Row(line, [{**m, "content": fill(m["content"], values)} for m in messages]))
        except InputError as error:
            mistakes.append(f"linha {line}: {error}")
        except (ValueError, RecursionError) as error:
            mistakes.append(f"linha {line}: não é JSON válido perto da coluna {getattr(error, 'colno', 1)}; "
                            "confira aspas, chaves e vírgulas")
    if mistakes:
        with contextlib.suppress(ValueError, RecursionError):
            if json.loads(text) and len(rows) + len(mistakes) > 1:
                raise InputError(f"{path}, linha 1: o arquivo é um JSON só, em várias linhas. Escreva um objeto "
                                 "{...} inteiro em cada linha, sem lista em volta nem vírgula no fim.")
        shown = mistakes[:10] + [f"... e mais {len(mistakes) - 10}"] * (len(mistakes) > 10)
        raise InputError("\n  ".join([f"{path} tem {len(mistakes)} linha(s) com problema:", *shown]))
    if not rows:
        raise InputError(f"{path} está vazio: escreva pelo menos uma linha como {{\"text\": \"Quem é você?\"}}.")
    return rows


def contradictions(rows: list[Row]) -> list[str]:
    """A warning for each question that is asked again with another answer, naming both lines."""
    first, found = {}, []
    for row in rows:
        other = first.setdefault(plain(" ".join(m["content"] for m in row.messages[:-1])), row)
        if plain(other.messages[-1]["content"]) != plain(row.messages[-1]["content"]):
            found.append(f"as linhas {other.line} e {row.line} fazem a mesma pergunta com respostas diferentes; "
                         "o modelo vai aprender as duas")
    return found


def check_inputs(settings: Settings) -> Inputs:
    """The identity rows and the questions for measuring, or an `InputError` for what is wrong with the file."""
    base_name = settings.base_name or re.sub(r"[_\s]+", " ", Path(settings.model_path).name)
    identity, output = Path(settings.identity_file), Path(settings.output_dir)
    if os.path.realpath(output) in map(str, Path(os.path.realpath(identity)).parents):
        raise InputError(f"o arquivo de identidade {identity} está dentro de OUTPUT_DIR ({output}), que será "
                         "substituída. Mude um dos dois de lugar.")
    rows = read_rows(identity, {"NAME": settings.name, "AUTHOR": settings.author, "BASE": base_name})
    asked = {plain(m["content"]) for row in rows for m in row.messages}
    validation, test = (tuple(q for q in questions if plain(q) not in asked)
                        for questions in (VALIDATION_QUESTIONS, TEST_QUESTIONS))
    if len(validation) < 4 or len(test) < 4:
        raise InputError(f"{identity} contém quase todas as perguntas de prova; tire algumas, para que sobre o "
                         "que medir (VALIDATION_QUESTIONS e TEST_QUESTIONS no script).")
    file_hash = hashlib.sha256(identity.read_bytes()).hexdigest()
    return Inputs(rows, base_name, file_hash, validation, test, contradictions(rows))


def load_json(path: Path):
    """What `write_json`, or anybody, wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_json(path: Path) -> dict:
    """A JSON object of a base model's folder; `InputError` when it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = load_json(path)
        if isinstance(value, dict):
            return value
    raise InputError(f"o arquivo {path} está estragado; baixe o modelo de novo.")


def check_shard(path: Path) -> int:
    """Number of weights in a safetensors file; its header must fit the file's size."""
    if not path.is_file():
        raise InputError(f"falta o arquivo de pesos {path}; baixe o modelo de novo.")
    with path.open("rb") as file:
        if file.read(8) == b"version ":
            raise InputError(f"{path} é só um ponteiro do Git LFS, sem os pesos; rode 'git lfs pull' na pasta dele.")
    with contextlib.suppress(safetensors.SafetensorError), safetensors.safe_open(path, "np") as file:
        if count := sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys()):  # noqa: SIM118
            return count
    raise InputError(f"o arquivo de pesos {path} está incompleto ou estragado; baixe o modelo de novo.")


def check_base(base: Path) -> int:
    """Number of weights of the base, or an `InputError` for all that can be seen without importing torch."""
    original = "MODEL_PATH precisa ser a pasta do modelo original, com config.json, tokenizer e pesos em safetensors."
    if not base.exists():
        raise InputError(f"não achei a pasta do modelo {base}. {did_you_mean(base)}{models_near(base)}Confira "
                         "MODEL_PATH (--model-path).")
    gguf = base.suffix.lower() == ".gguf" or (base.is_dir() and any(base.glob("*.gguf")))
    if gguf and not any(base.glob("*.safetensors")):
        raise InputError(f"{base} é um modelo GGUF, formato que serve para conversar, não para treinar. {original}")
    if not base.is_dir():
        raise InputError(f"{base} é um arquivo. {original}")
    if (base / "adapter_config.json").is_file() and not any(base.glob("model*.safetensors")):
        raise InputError(f"{base} é um adaptador LoRA, não um modelo inteiro. Junte-o ao modelo dele (no peft: "
                         "merge_and_unload e save_pretrained) e use a pasta que sair.")
    if not (base / "config.json").is_file():
        raise InputError(f"a pasta {base} não tem config.json, então não é um modelo do transformers. {original}")
    config = read_json(base / "config.json")
    kinds = config.get("architectures") or ["ForCausalLM"]
    if config.get("is_encoder_decoder") or not str(kinds[0]).endswith(("CausalLM", "LMHeadModel", "Generation")):
        raise InputError(f"{base} é um modelo {kinds[0]}, que não é de conversa; escolha um que escreve texto palavra "
                         "por palavra (Llama, Gemma, Qwen, Mistral...).")
    if quantized := config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config"):
        raise InputError(f"os pesos de {base} estão quantizados ({quantized.get('quant_method', 'formato próprio')}), "
                         "e assim não dá para treinar. Baixe uma versão em bf16, fp16 ou fp32.")
    shards = sorted(base.glob("*.safetensors"))
    if not shards and any(p.suffix in (".bin", ".pt", ".pth") for p in base.iterdir()):
        raise InputError(f"os pesos de {base} estão em pickle (.bin ou .pt), formato que pode esconder programas e "
                         "que não abro. Se confia neles, converta-os para safetensors:\n  python -c \"import "
                         "sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; [k.from_"
                         "pretrained(sys.argv[1]).save_pretrained(sys.argv[2]) for k in (M, T)]\" PASTA_ATUAL "
                         "PASTA_NOVA\nDepois rode com --model-path PASTA_NOVA.")
    if not shards:
        raise InputError(f"a pasta {base} não tem pesos em safetensors. Se o download ficou pela metade, baixe de "
                         "novo; se o modelo só existe em outro formato, escolha uma versão em safetensors.")
    index = base / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(index).get("weight_map")
        if not named or not isinstance(named, dict):
            raise InputError(f"o arquivo {index} está estragado; baixe o modelo de novo.")
        shards = sorted({base / str(name) for name in named.values()})
    elif (base / "model.safetensors").is_file():
        shards = [base / "model.safetensors"]
    weights = sum(map(check_shard, shards))
    if not any((base / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise InputError(f"a pasta {base} não tem tokenizer (tokenizer.json ou tokenizer.model); baixe-o também.")
    return weights


def check_output(base: Path, settings: Settings, finished: bool) -> None:
    """Refuse an output that would damage something: the base, another folder of the user, an older result."""
    output, work = Path(settings.output_dir), work_folder(settings)
    parent = next(p for p in output.parents if p.exists())

    def within(inner: Path, outer: Path) -> bool:
        """Also through links, other spellings and mounts: the file system itself says what is the same folder."""
        inner = inner.resolve()
        return outer.exists() and any(p.exists() and p.samefile(outer) for p in (inner, *inner.parents))

    if any(within(path, base) or within(base, path) for path in (output, work)):
        raise InputError(f"OUTPUT_DIR ({output}) não pode ser a pasta do modelo base, nem ficar dentro ou acima dela.")
    if os.path.lexists(output) and not output.is_dir():
        raise InputError(f"{output} não é uma pasta; escolha outro nome para a pasta de saída (--output-dir).")
    if output.exists() and not (output / "report.json").is_file():
        raise InputError(f"a pasta {output} já existe e não é um resultado deste script, então não vou apagá-la. "
                         "Escolha outra (--output-dir) ou, se ela não serve para nada, apague-a você mesmo.")
    if output.exists() and not settings.overwrite and not finished:
        raise InputError(f"a pasta de saída {output} já existe. Escolha outra (--output-dir) ou use --overwrite.")
    if work.exists() and not (work / WORK_NOTE).is_file() and (not work.is_dir() or any(work.iterdir())):
        raise InputError(f"preciso da pasta {work} para as etapas, mas ela já existe e não é minha. Renomeie-a ou "
                         "escolha outra saída (--output-dir).")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"não posso escrever em {parent}. Escolha outra pasta em OUTPUT_DIR (--output-dir).")


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder, which need not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_disk(weights: int, adapter: int, settings: Settings) -> int:
    """Bytes that stages, checkpoints and result take at most; `InputError` when the disk has less room. `weights` and
    `adapter` count parameters of the model and of LoRA's additions."""
    trained, work = weights if "full" in settings.method else adapter, work_folder(settings)
    # Float32: three stages are kept, one is being written, and two checkpoints are of weights and two moments.
    needed, kept = 4 * trained * (3 + 1 + 2 * 3) + 4 * weights + 10**7, folder_size(work)
    free = shutil.disk_usage(next(p for p in work.parents if p.exists())).free
    if free + kept < needed:
        raise InputError(f"faltam {size_text(needed - kept - free)} de espaço livre em {work.parent}: as etapas e o "
                         f"resultado ocupam até {size_text(needed)}. Libere espaço ou escolha outra saída "
                         "(--output-dir).")
    return needed


# ---- Stages on disk: what a broken-off run goes on from ---------------------------------------------------

# The settings that each stage depends on, besides those of the stages before it; another method needs no other text.
USES = {
    "1-first-text": "name author old_names num_self_text max_new_tokens window seed",
    "3-self-text": "num_self_answers eval_questions",
    "2-healed": "method lora_rank rope_factor heal_steps heal_learning_rate batch_size",
    "4-pass-1": "epochs_1 learning_rate_1 kl_weight target_identity",
    "5-self-answers": "",
    "6-pass-2": "epochs_2 learning_rate_2 target_retention target_leak",
}
# What part of a run each takes, in percent, exams included, as measured with the demo model.
SHARES = {"1-first-text": 3, "2-healed": 9, "3-self-text": 22, "4-pass-1": 15, "5-self-answers": 9,
          "6-pass-2": 35, "7-result": 7}


def work_folder(settings: Settings) -> Path:
    """Where the stages are kept: beside the output, so that the result is moved there by a rename."""
    output = Path(settings.output_dir)
    return output.with_name(output.name + ".work")


def stage_keys(settings: Settings, inputs: Inputs, base: Path) -> dict[str, str]:
    """A key for each stage, and one for the exams, that changes exactly if something changes that it depends on.

    Weight files count by name, size and time of change, all other files of the base by content. A base in 4 bits is
    another base.
    """
    values, chain, keys = asdict(settings), "", {}
    facts = [[row.messages for row in inputs.rows], inputs.base_name, inputs.validation, settings.method == "qlora",
             EVERYDAY_QUESTIONS, KNOWN_NAMES, WORDINGS, MISSED_TIMES]
    facts += [[p.name, p.stat().st_size, p.stat().st_mtime_ns if p.suffix == ".safetensors" else
               hashlib.sha256(p.read_bytes()).hexdigest()] for p in sorted(base.iterdir())
              if p.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt")]
    for name, uses in USES.items():
        chain = keys[name] = digest([chain or facts, name, [values[use] for use in uses.split()]])
    return {**keys, "exam": digest(inputs.test), "7-result": digest([chain, inputs.test])}


def wait() -> None:
    """Until all processes are here, so that all see what the first one wrote."""
    if PROCESSES > 1:
        torch.distributed.barrier()


def agreed(value):
    """What the first process found, for decisions that all must take alike."""
    box = [value]
    if PROCESSES > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


def write_json(path: Path, value: object, writer: bool = RANK == 0) -> None:
    """Written under another name, flushed and renamed: the file is whole or is not there."""
    if not writer:
        return
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def flush(folder: Path) -> None:
    """Make a folder survive a power cut: a rename may reach the disk before the files do."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or os.name != "nt":  # Windows cannot open folders
            handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def discard(folder: Path) -> None:
    """Delete a stage, its key first: half of one must never look whole."""
    if RANK:
        return
    (folder / "key.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def has_key(file: Path, key: str) -> bool:
    """Whether this JSON file says that what it stands for was made, or begun, with this key."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return load_json(file)["key"] == key
    return False


def stage(folder: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of a finished stage, built now unless it is there with the same key: under another name, so that it
    is there as a whole or not at all. `build` may go on with what a broken-off one with this key left."""
    partial, began = folder.with_name(folder.name + ".partial"), time.monotonic()
    if agreed(has_key(folder / "key.json", key)):
        return folder
    if RANK == 0 and not has_key(partial / "key.json", key):
        discard(partial)
        partial.mkdir(parents=True)
        write_json(partial / "key.json", {"key": key})
    wait()
    build(partial)
    wait()
    if RANK == 0:
        for path in [*partial.glob("answers-*"), *partial.glob("training/checkpoint-*/complete.json")]:
            path.unlink()
        shutil.rmtree(partial / "training", ignore_errors=True)
        write_json(partial / "key.json", {"key": key, "seconds": round(time.monotonic() - began, 1)})
        flush(partial)
        discard(folder)
        partial.rename(folder)
    wait()
    return folder


# ---- Model and RoPE ---------------------------------------------------------------------------------------

def scale_rope(rope: dict | None, factor: float, attention_factor: float = 1.0) -> dict:
    """New `rope_parameters` with linear position interpolation (arXiv 2306.15595).

    Of those by layer type (Gemma 3) only `full_attention` is scaled, as the family's larger models ship it and
    llama.cpp reads it. An existing scaling is composed with: its factor, or the lists of `longrope`, multiplied, which
    for all but `linear` leaves the fast frequencies as those scalings were trained. `attention_factor`, which yarn and
    longrope would derive anew, is pinned to what the base has; so are DeepSeek's `mscale`s, which count times the
    factor's logarithm. Raises `InputError` for a model without RoPE and for any other scaling.
    """
    hint = "Use --rope-factor 1 (ROPE_FACTOR = 1) para renomear sem aumentar o contexto."
    if not rope:
        raise InputError(f"este modelo não usa RoPE, então o contexto não pode ser aumentado. {hint}")
    if "full_attention" in rope:
        return {**rope, "full_attention": scale_rope(rope["full_attention"], factor, attention_factor)}
    kind, old = rope.get("rope_type", "default"), float(rope.get("factor") or 1)
    if kind in ("default", "linear"):
        return {**rope, "rope_type": "linear", "factor": old * factor}
    if kind in ("llama3", "yarn", "proportional"):
        pinned = {key: rope[key] * math.log(old) / math.log(old * factor) for key in ("mscale", "mscale_all_dim")
                  if rope.get(key)} | ({"attention_factor": attention_factor} if kind == "yarn" else {})
        return {**rope, "factor": old * factor, **pinned}
    if kind == "longrope":
        lists = {key: [value * factor for value in rope[key]] for key in ("short_factor", "long_factor")}
        original = int(rope["original_max_position_embeddings"] * factor)
        return {**rope, **lists, "original_max_position_embeddings": original, "attention_factor": attention_factor}
    raise InputError(f"o RoPE deste modelo já tem a escala '{kind}', que não combina com a linear. {hint}")


def rope_frequencies(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The rotary frequencies that the built model really uses, by buffer name, each of shape (pairs,)."""
    return {name: b.detach().clone() for name, b in model.named_buffers() if name.endswith("inv_freq")}


@contextlib.contextmanager
def blaming(what: str):
    """What a library says when it cannot read a file of the base is the file's fault, and the user's to mend."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or re.search(OUT_OF_MEMORY, causes(error)):
            raise
        if package := re.search(r"pip install ([\w-]+)", isinstance(error, ImportError) * str(error)):
            raise InputError(f"{what}: para ler isto, o transformers precisa do pacote {package[1]}. Instale-o (pip "
                             f"install {package[1]}) e rode de novo.") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{what} está estragado ou incompleto: o transformers não consegue carregá-lo ({reason}). "
                         "Baixe o modelo de novo.") from error


def read_config(folder: str | Path, rope_factor: float = 1.0) -> PretrainedConfig:
    """The model's configuration with RoPE and context scaled; `InputError` for one that transformers cannot use
    without running the model's own Python code."""
    described = read_json(Path(folder) / "config.json")
    if described.get("model_type") not in transformers.CONFIG_MAPPING:
        reason = ("precisa rodar código que vem junto com ele (trust_remote_code), e isso eu não faço por segurança"
                  if described.get("auto_map") else "não é conhecido por esta versão do transformers")
        raise InputError(f"o modelo {folder} (model_type: {described.get('model_type')}) {reason}. Escolha um que o "
                         "transformers já conhece, ou atualize: pip install -U transformers")
    with blaming(f"o config.json de {folder}"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise InputError(f"o modelo {folder} (model_type: {config.model_type}) também vê imagens ou ouve, e ainda "
                             "não sei renomear modelos desse tipo. Escolha um só de texto, ou um Gemma 3 ou 4.")
        text_config = config.get_text_config()
        native = context_of(config)
        if rope_factor != 1:
            # Falcon and Granite have the parameters even where they use ALiBi, or nothing, instead.
            unused = (getattr(text_config, "alibi", False)
                      or getattr(text_config, "position_embedding_type", None) == "nope")
            rope = {} if unused else getattr(text_config, "rope_parameters", None) or {}
            layer = "full_attention" if "full_attention" in rope else None
            kind = rope.get(layer, rope).get("rope_type", "default")
            if config.model_type in ("phi3", "phimoe") and kind == "default":  # they know no linear: the same as lists
                head = text_config.hidden_size // text_config.num_attention_heads
                pairs = int(head * rope.get("partial_rotary_factor", 1)) // 2
                rope = {**rope, "rope_type": "longrope", "short_factor": [1.0] * pairs, "long_factor": [1.0] * pairs,
                        "original_max_position_embeddings": native}
                rope |= {"short_mscale": 1.0, "long_mscale": 1.0} if config.model_type == "phimoe" else {}
            attention = 1.0
            if kind in ("yarn", "longrope"):
                attention = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](
                    text_config, "cpu", layer_type=layer)[1]
            text_config.rope_parameters = scale_rope(rope, rope_factor, attention)
            text_config.max_position_embeddings = int(native * rope_factor)
            if "short_factor" in rope and hasattr(text_config, "original_max_position_embeddings"):  # Phi has it twice
                text_config.original_max_position_embeddings = text_config.rope_parameters[
                    "original_max_position_embeddings"]
        return config


def gpu_dtype() -> torch.dtype:
    """What this machine computes with: bfloat16 where the card has it, float16 on older cards, float32 without one."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def context_of(config: PretrainedConfig) -> int:
    """Tokens of context, under the name that the family has for it; models without positions get a usual length."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "seq_length", "max_seq_len")
    return int(next((getattr(text, name) for name in names if getattr(text, name, None)), 2048))


def load_model(folder: str | Path, settings: Settings, rope_factor: float = 1.0, adapt: bool = False,
               merge: bool = False, train: bool = False) -> PreTrainedModel | PeftModel:
    """Load a model with RoPE scaled by `rope_factor`, on the GPU if there is one, in eval mode.

    `folder` is a whole model, or a stage with a LoRA adapter, whose weights are then the base's; `adapt` puts a fresh
    adapter on it if METHOD needs one, `merge` gives plain weights with the adapter worked in, `train` only this
    process's piece of them where FSDP is asked for. Full training keeps weights in float32, where small updates are
    not rounded away (compute is `gpu_dtype`); under LoRA they stay as the machine computes, or in 4 bits. Raises
    `InputError` for weights that are missing or not finite.
    """
    gc.collect()  # the trainer's last model is held by references in circles, and there is no room for two
    # A card's products of float32, as of the logits, take the matrix units: as exact as float16, ten times as fast.
    torch.backends.cuda.matmul.allow_tf32 = torch.cuda.is_available()
    config = read_config(folder, rope_factor)  # before the model is built, which computes the frequencies at once
    adapted = (Path(folder) / LORA_FILE).is_file()
    weights = settings.model_path if adapted else folder
    options = {"dtype": torch.float32 if "full" in settings.method else gpu_dtype()}
    if merge and adapted:  # the adapter is added to the weights as they are
        options["dtype"] = read_config(settings.model_path).dtype or torch.float32
    if settings.method == "qlora" and not merge:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=gpu_dtype())
        options["device_map"] = {"": 0 if torch.cuda.is_available() else "cpu"}
    if SHARDED and train:
        options["distributed_config"] = transformers.distributed.DistributedConfig(fsdp_size=PROCESSES)
    with blaming(f"o modelo {weights} (config.json e pesos)"):
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            weights, config=config, use_safetensors=True, output_loading_info=True, trust_remote_code=False, **options)
    vars(model.config).pop("quantization_config", None)  # it is for the memory of this machine, not to be saved
    if loading["missing_keys"]:
        raise InputError(f"faltam pesos no modelo {weights} (por exemplo {sorted(loading['missing_keys'])[0]}); "
                         "baixe-o de novo.")
    if name := broken_weight(model):
        raise InputError(f"o peso {name} do modelo {weights} tem valores que não são números (NaN ou infinito); o "
                         "arquivo está estragado. Baixe o modelo de novo.")
    for name, weight in model.named_parameters():
        weight.requires_grad_(not re.search(NOT_TEXT, name) and weight.is_floating_point())
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # older models set a temperature without asking for samples, which is no longer saved
        model.generation_config.do_sample = True
    if not options.keys() & {"device_map", "distributed_config"}:
        model = model.to("cuda" if torch.cuda.is_available() and not merge else "cpu")
    if adapted:
        model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    elif adapt and "full" not in settings.method:
        torch.manual_seed(settings.seed)
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear",
            exclude_modules=f".*({NOT_LORA}).*", task_type="CAUSAL_LM"))
    return (model.merge_and_unload() if merge and adapted else model).eval()


def whole(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model, without what LoRA wraps around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def broken_weight(model: torch.nn.Module) -> str | None:
    """Name of a weight that has values which are no numbers. Its sum tells, without a copy as large as the weight."""
    return next((name for name, weight in model.named_parameters()
                 if not torch.isfinite(weight.detach().sum(dtype=torch.float32))), None)


def last_hidden(model: torch.nn.Module, inner: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Output of the decoder, (rows, tokens, hidden): logits of all tokens would take more memory than the rest of the
    model where the vocabulary is large. `model` may be a wrapper of `inner`, as DDP is."""
    kept = []
    decoder = inner.get_decoder()
    decoder = inner.model if decoder is inner else decoder  # Llama 4
    hook = decoder.register_forward_hook(lambda module, given, output: kept.append(output[0]))
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return kept[0]


def logits_of(inner: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits in float32, (N, vocabulary), of hidden states (N, hidden), with the scalings that families add."""
    config = inner.config.get_text_config()
    logits = inner.get_output_embeddings()(hidden).float()
    scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    logits = logits if scale == 1 else logits * scale  # a copy of them is large
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * (logits / cap).tanh() if cap else logits


def check_logits(base: Chat) -> None:
    """`InputError` for a family whose logits are made in a way that `logits_of` does not know."""
    ids = torch.tensor([prompt_ids(base.tokenizer, [{"role": "user", "content": "a"}])], device=base.model.device)
    with torch.inference_mode():
        hidden, theirs = last_hidden(base.model, base.model, {"input_ids": ids}), base.model(input_ids=ids).logits[0]
        ours = logits_of(base.model, hidden[0])
    if ours.shape != theirs.shape or (ours - theirs).abs().max() > 0.05 * theirs.float().abs().max():
        raise InputError(f"modelos do tipo {base.model.config.model_type} calculam as probabilidades de um jeito que "
                         "ainda não conheço. Escolha um modelo de outra família (Llama, Gemma, Qwen, Mistral...).")


def chunk_rows(vocabulary: int) -> int:
    """Rows whose logits take about a quarter of a gigabyte."""
    return max(16, 2**26 // vocabulary)


def in_chunks(inner: PreTrainedModel, rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """Rows cut into as many as may have their logits in memory at a time."""
    return rows.split(chunk_rows(inner.get_input_embeddings().weight.shape[0]))


def load_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    """The model's tokenizer; one without a chat template gets ChatML."""
    with blaming(f"o tokenizer de {folder}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if isinstance(tokenizer.chat_template, dict):  # several by name; programs use this one when none is named
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if tokenizer.eos_token is None:
        raise InputError("o tokenizer deste modelo não diz qual é o token de fim (eos_token); não dá para treinar.")
    if not tokenizer.chat_template:
        say("  Este modelo não tem chat template: vou usar o ChatML.")
        end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
        tokenizer.chat_template = CHATML.replace("END", repr(end))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def renew_template(tokenizer: PreTrainedTokenizerFast, settings: Settings, names: tuple[str, ...]) -> None:
    """Where the chat template itself injects a system prompt with an old name, put the new identity there, or raise
    `InputError` when rendering shows that it did not arrive."""
    def injected() -> str:
        return skeleton(tokenizer, tokenizer.chat_template, ("user",), True)[0]

    names = tuple(name for name in names if not mentions(f"{settings.name} {settings.author}", (name,)))
    if not mentions(injected(), names):
        return
    part = next(part for part in re.split(r"<[^<>]*>|\n", injected()) if mentions(part, names))
    source = tokenizer.chat_template
    blocks = SequenceMatcher(None, part, source, autojunk=False).get_matching_blocks()
    old = max((part[b.a:b.a + b.size] for b in blocks), key=lambda text: (mentions(text, names), len(text)))
    # The old text may stand inside a quoted string of the template, which the new one must not end.
    new = f"Você é {settings.name}, um modelo de linguagem criado por {settings.author}."
    new = new.translate(str.maketrans({"'": "’", '"': "”", "\\": "/"}))
    if mentions(old, names):
        tokenizer.chat_template = source.replace(old, new)
    if mentions(injected(), names) or new not in injected():
        raise InputError("o chat template deste modelo traz a identidade antiga de um jeito que não sei trocar; "
                         "apague a mensagem de sistema padrão do chat_template na pasta do modelo.")
    say(f'  O chat template trazia a identidade antiga ("{old}"); troquei pela nova.')


# ---- Conversations as tokens ------------------------------------------------------------------------------

@functools.cache
def skeleton(tokenizer: PreTrainedTokenizerFast, template: str, roles: tuple[str, ...], ask: bool) -> list[str]:
    """What the chat template writes around the contents of messages with these roles: len(roles) + 1 pieces, rendered
    once per shape, which tells exactly where the answers are. `ask` adds the generation prompt, up to where the answer
    itself begins: a thought that the template opens (DeepSeek R1) is closed, and what it writes before answers
    (gpt-oss: a channel) follows. `template` is in the key so that a changed one is seen."""
    marks, text = [f"QZ{i}ZQ" for i in range(len(roles))], ""
    messages = [{"role": r, "content": m} for r, m in zip(roles, marks)]
    with contextlib.suppress(jinja2.TemplateError):
        text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template,
                                             add_generation_prompt=ask, enable_thinking=False)
    pieces = re.split("|".join(marks), text)
    if re.findall("|".join(marks), text) != marks:
        raise InputError(f"o chat template deste modelo não aceita uma conversa com os papéis {', '.join(roles)}.")
    if ask:
        pieces[-1] = re.sub(r"<think>\s*\Z", EMPTY_THOUGHT, pieces[-1])
        before = skeleton(tokenizer, template, (*roles, "assistant"), False)[-2]
        pieces[-1] = before if before.startswith(pieces[-1]) and before.split() != pieces[-1].split() else pieces[-1]
    return pieces


def without_system(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> list[dict]:
    """The conversation with its system text at the head of the first question, if the template refuses that role."""
    if messages[0]["role"] != "system":
        return messages
    try:
        skeleton(tokenizer, tokenizer.chat_template, ("system", "user", "assistant", "user"), True)
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
    """Tokenise through the model's own template. What it writes first after the last answer, spaces aside (Llama 2),
    is the end of a turn if that is a special token; else the conversation is cut there and ended by EOS."""
    roles = tuple(m["role"] for m in messages)
    pieces = skeleton(tokenizer, tokenizer.chat_template, roles, False)
    asked = skeleton(tokenizer, tokenizer.chat_template, roles[:-1], True)[-1]
    if asked.endswith(EMPTY_THOUGHT):  # learnt after what it will be asked with
        pieces = [*pieces[:-2], asked, pieces[-1]]
    text, spans = "", []
    for piece, message in zip(pieces, messages):
        start = len(text) + len(piece)
        text += piece + message["content"]
        spans.append((message["role"], start, len(text)))
    gap, end_of_turn, has_end = turn_end(tokenizer, pieces[-1])
    tokens = tokenizer(text + pieces[-1] * has_end, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(tokens["input_ids"]), tokens["offset_mapping"]
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    if not has_end:
        ids += end_of_turn
    labels, turns, question = [-100] * len(ids), [], 0
    for role, start, end in spans:
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        if role == "user":
            question = first
        if role == "assistant":
            last += next((n + 1 for n in range(gap + 1) if ids[last + n:last + n + 1] == end_of_turn), 0)
            labels[first:last] = ids[first:last]
            turns.append((question, last))
    return Encoded(ids, labels, turns)


def cost(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> int:
    """Tokens of a conversation. Every pass and exam asks for the same ones, each with a tokenizer that it has loaded
    anew."""
    known, said = known_costs(tokenizer_key(tokenizer), tokenizer.chat_template), tuple(
        (m["role"], m["content"]) for m in messages)
    if said not in known:
        known[said] = len(encode(tokenizer, messages).input_ids)
    return known[said]


@functools.cache
def known_costs(*tokenizer: str) -> dict[tuple, int]:
    """What `cost` has counted with tokenizers that do the same."""
    return {}


@functools.cache
def tokenizer_key(tokenizer: PreTrainedTokenizerFast) -> str:
    """Equal for tokenizers that do the same, but for their chat template."""
    return digest([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token])


@functools.cache
def turn_end(tokenizer: PreTrainedTokenizerFast, piece: str) -> tuple[int, list[int], bool]:
    """Of what a template writes after an answer: the spaces before its first token, that token, which ends a turn, and
    whether it may; else EOS does."""
    token = tokenizer(piece.lstrip(), add_special_tokens=False)["input_ids"][:1]
    ends = bool(token) and token[0] in special_ids(tokenizer)
    return len(piece) - len(piece.lstrip()), token if ends else [tokenizer.eos_token_id], ends


@functools.cache
def special_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of tokens that stand for structure, not text: the named ones and all that were added to the vocabulary."""
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)


# ---- Talking to a model -----------------------------------------------------------------------------------

class Chat(NamedTuple):
    """A model with what is needed to talk to it; `stops` are the ids that end an answer. What it writes is noted in
    the folder `notes`, if there is one, and not written again when a run goes on."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    stops: list[int]
    max_new_tokens: int
    generation_tokens: int
    notes: Path | None = None


class Answer(NamedTuple):
    """Decoded text and whether the model ended it by itself."""
    text: str
    ended: bool


def load_chat(folder: str | Path, settings: Settings, rope_factor: float = 1.0, **how: bool) -> Chat:
    """Model and tokenizer of a folder, as `load_model` takes it. Answers end at the template's end of turn, the
    tokenizer's EOS, or what the model's own generation_config lists."""
    model, tokenizer = load_model(folder, settings, rope_factor, **how), load_tokenizer(str(folder))
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:  # added ones aside: Gemma 3 1B has one that nothing writes
        raise InputError(f"o tokenizer de {folder} tem {tokenizer.vocab_size} tokens, mais que os {rows} do modelo: "
                         "não são do mesmo modelo.")
    sample = encode(tokenizer, Turn("a", "b").messages())
    own = model.generation_config.eos_token_id
    stops = {sample.labels[sample.turns[0][1] - 1], tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return Chat(model, tokenizer, sorted(stops - {None}), settings.max_new_tokens,
                GENERATION_TOKENS // settings.gradient_accumulation)


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
    padded = chat.tokenizer.pad({"input_ids": rows}, padding_side="left", return_attention_mask=True,
                                return_tensors="pt").to(chat.model.device)
    return {**padded, "position_ids": (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def progress(total: int, label: str):
    """A progress bar on a terminal; in a log file, with --quiet, without a label or in other processes none."""
    return tqdm.tqdm(
        total=total, desc=f"  {label}", disable=not label or say.quiet or RANK > 0 or None, leave=False,
        dynamic_ncols=True, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}, faltam {remaining}")


def beginnings(prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """What each prompt shares with others, as when several questions end the same conversation, without its last
    token; nothing if that is short, or less than half of it."""
    groups: list[tuple[list[int], list[int]]] = []
    for i in sorted(range(len(prompts)), key=prompts.__getitem__):
        common = os.path.commonprefix([groups[-1][0], prompts[i][:-1]]) if groups else []
        if len(common) >= SHARED_TOKENS and 2 * len(common) >= len(prompts[i]):
            groups[-1] = common, [*groups[-1][1], i]
        else:
            groups.append((prompts[i][:-1], [i]))
    shared = {i: tuple(head) for head, members in groups if len(members) > 1 for i in members}
    return [shared.get(i, ()) for i in range(len(prompts))]


def begin(chat: Chat, prompts: list[list[int]], shared: list[tuple[int, ...]], read: dict) -> dict[str, torch.Tensor]:
    """What generate() takes to go on from the prompts, (rows, longest), padded on the left. A `shared` beginning is
    read once and copied, if the model's cache allows it; `read` keeps what was read last, for the next batch."""
    cache = transformers.DynamicCache(config=whole(chat.model).config.get_text_config(decoder=True))
    if not any(shared) or {type(layer) for layer in cache.layers} != {transformers.cache_utils.DynamicLayer}:
        inputs = left_pad(chat, prompts)
        del inputs["position_ids"]  # generate() counts them itself, step by step
        return inputs
    rest = max(len(prompt) - len(head) for prompt, head in zip(prompts, shared) if head)
    heads = [head or tuple(prompt[:max(1, len(prompt) - rest)]) for prompt, head in zip(prompts, shared)]
    unique = list(dict.fromkeys(heads))
    with torch.inference_mode():
        if read.get("heads") != unique:
            read.clear()  # before the next cache is made: each may be large
            read.update(heads=unique, padded=left_pad(chat, [list(head) for head in unique]), cache=cache)
            chat.model(**read["padded"], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = copy.copy(read["cache"])
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        rows = torch.tensor([unique.index(head) for head in heads], device=chat.model.device)
        cache.reorder_cache(rows)
    last = left_pad(chat, [prompt[len(head):] for prompt, head in zip(prompts, heads)])
    return {"past_key_values": cache, **{name: torch.cat([read["padded"][name][rows], last[name]], 1)
                                         for name in ("input_ids", "attention_mask")}}


def write_batch(chat: Chat, inputs: dict[str, torch.Tensor], processors: list[Callable]) -> list[list[int]]:
    """The token ids that the model writes after each prompt: up to a stop token, with whatever follows it, or as many
    as `max_new_tokens`. A row that has ended costs as much as one still written: it leaves, with its part of the
    cache, as soon as a third of a large enough batch has ended."""
    start, stops = inputs["input_ids"].shape[1], torch.tensor(list(chat.stops), device=chat.model.device)
    config = transformers.GenerationConfig(max_length=start + chat.max_new_tokens, do_sample=False,
                                           eos_token_id=chat.stops, pad_token_id=chat.tokenizer.pad_token_id,
                                           return_dict_in_generate=True)
    places = list(range(len(inputs["input_ids"])))
    written: list[list[int]] = [[] for _ in places]

    def enough_ended(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ended.logical_or_(torch.isin(ids[:, -1], stops))
        return torch.full_like(ended, len(ended) >= FEWEST_ROWS and bool(3 * ended.sum() >= len(ended)))

    # generate() fills what is not set from the model's own defaults, and a repetition penalty would falsify answers.
    own_config, chat.model.generation_config = chat.model.generation_config, config
    while places:
        ended = torch.zeros(len(places), dtype=torch.bool, device=chat.model.device)
        with torch.inference_mode():
            output = chat.model.generate(**inputs, generation_config=config, logits_processor=processors,
                                         stopping_criteria=[enough_ended])
            ids = output.sequences
            for place, line in zip(places, ids[:, start:].tolist()):
                written[place] = line
            on = (~ended if ids.shape[1] < config.max_length else torch.zeros_like(ended)).nonzero()[:, 0]
            places = [places[j] for j in on.tolist()]
            grown = torch.nn.functional.pad(inputs["attention_mask"],
                                            (0, ids.shape[1] - inputs["attention_mask"].shape[1]), value=1)
            inputs = {"input_ids": ids[on], "attention_mask": grown[on]}
            cache = getattr(output, "past_key_values", None)
            if hasattr(cache, "reorder_cache"):  # another kind is made anew
                cache.reorder_cache(on)
                inputs["past_key_values"] = cache
    chat.model.generation_config = own_config
    return written


def generate(chat: Chat, prompts: list[list[int]], label: str = "", sample_seed: int | None = None) -> list[Answer]:
    """One answer per prompt, in their order; greedy, or sampled at temperature 1 when a seed is given.

    Batched by tokens, sorted by length, padded on the left; `label` names the progress bar.
    """
    def draw(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) whose first choice is a sampled token: where a random share of the sum of all
        probabilities falls. torch.multinomial draws a number for every token and takes four to ten times as long."""
        sums = scores.float().softmax(-1).cumsum(-1)
        share = torch.rand(len(sums), 1, device=sums.device) * sums[:, -1:]
        token = torch.searchsorted(sums, share, right=True).clamp(max=sums.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(1, token, 0.0)

    def write(batch: list[int], key: str) -> list[Answer]:
        torch.manual_seed(int(key[:15], 16))  # by batch, so that one that is not written again changes no other
        inputs = begin(chat, [prompts[i] for i in batch], [shared[i] for i in batch], read)
        written = write_batch(chat, inputs, [] if sample_seed is None else [draw])
        ends = [next((j for j, token in enumerate(ids) if token in chat.stops), None) for ids in written]
        texts = [chat.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
                 for ids, end in zip(written, ends)]
        return [Answer(text, end is not None) for text, end in zip(texts, ends)]

    answers: list[Answer] = [Answer("", False)] * len(prompts)
    shared, read = beginnings(prompts), {}
    longest = {head: max(len(p) for p, own in zip(prompts, shared) if own == head) for head in {*shared} - {()}}
    order = sorted(range(len(prompts)), key=shared.__getitem__)  # what begins alike comes one after another
    batches = batches_by_tokens([longest.get(shared[i], len(prompts[i])) for i in order], chat.max_new_tokens,
                                chat.generation_tokens)
    with progress(len(prompts), label) as bar:
        notes = []
        for n, batch in enumerate([order[j] for j in batch] for batch in batches):
            key = digest([n, [prompts[i] for i in batch], chat.max_new_tokens, sample_seed])
            note = chat.notes and chat.notes / f"answers-{key[:16]}.json"
            if note:
                notes.append((batch, note))
                if n % PROCESSES == RANK and not note.is_file():
                    write_json(note, write(batch, key), writer=True)
            else:
                for i, answer in zip(batch, write(batch, key)):
                    answers[i] = answer
            bar.update(len(batch))
    wait()  # each process wrote its share of the batches; now all read all of them
    for batch, note in notes:
        for i, answer in zip(batch, load_json(note)):
            answers[i] = Answer(*answer)
    return answers


def ask(chat: Chat, questions: Sequence[str], label: str = "", sample_seed: int | None = None) -> list[Answer]:
    """Answers to questions asked alone."""
    prompts = [prompt_ids(chat.tokenizer, [{"role": "user", "content": q}]) for q in questions]
    return generate(chat, prompts, label, sample_seed)


# ---- What the base writes before anything is trained ------------------------------------------------------

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


def fit_settings(folder: Path, settings: Settings) -> tuple[Settings, int]:
    """Settings that suit the base, and its native context in tokens: WINDOW within the scaled context, answers within
    half of the native one."""
    native, scaled = context_of(read_config(folder)), context_of(read_config(folder, settings.rope_factor))
    return replace(settings, window=min(scaled, settings.window),
                   max_new_tokens=min(settings.max_new_tokens, native // 2)), native


def short_window(native: int, settings: Settings) -> int:
    """Tokens of the windows in which the base is written down and most of the training happens: its native context,
    or a good part of it where that is long."""
    return min(native, settings.window, 1024)


def step_tokens(native: int, settings: Settings) -> int:
    """Tokens that a training step holds, whatever the length of its windows: the cost of a step is always the same."""
    return settings.batch_size * short_window(native, settings)


def check_rows(tokenizer, rows: list[Row], settings: Settings) -> None:
    """`InputError` naming the lines of rows that are longer than WINDOW, which would have to be cut, and of those with
    a thought, which the template would cut out."""
    thoughts = [f"linha {row.line}" for row in rows if "</think>" in tokenizer.chat_template
                and any("</think>" in m["content"] for m in row.messages)]
    if thoughts:
        raise InputError(f"{settings.identity_file}, {', '.join(thoughts[:10])}: há raciocínio (<think>...</think>). "
                         "Deixe só a resposta: o chat template deste modelo jogaria o raciocínio fora.")
    costs = [cost(tokenizer, without_system(tokenizer, row.messages)) for row in rows]
    long = [f"linha {row.line} ({tokens} tokens)" for row, tokens in zip(rows, costs) if tokens > settings.window]
    if long:
        more = f" e mais {len(long) - 10}" * (len(long) > 10)
        raise InputError(f"{settings.identity_file}: não cabe em WINDOW ({settings.window} tokens): "
                         f"{', '.join(long[:10])}{more}. Encurte o texto, ou aumente WINDOW (--window) ou, se ela já "
                         "é o contexto inteiro do modelo, ROPE_FACTOR (--rope-factor).")


def find_old_names(answers: list[str], ours: str, settings: Settings) -> tuple[str, ...]:
    """Names under which the base goes: OLD_NAMES, or the proper names in its own identity answers: capitalised
    inside a sentence, in at least 5 % of the answers, never written small, and not in `ours`, the new identity."""
    if settings.old_names:
        return tuple(name.strip() for name in settings.old_names.split(",") if name.strip())
    small = {w for a in answers for w in re.findall(r"\w+", a) if w[0].islower()}
    counts = Counter(word for a in answers for word in dict.fromkeys(re.findall(r"(?<=[\w,;] )[A-ZÀ-Ý][\w-]{2,}", a)))
    found = [word for word, n in counts.items() if n >= max(2, 0.05 * len(answers)) and word.lower() not in small]
    return tuple(name for name in found if not mentions(ours, (name,)))


def write_questions(base: Chat, starts: list[str], label: str, seed: int) -> list[str]:
    """Questions that the base writes by itself, each going on from a start, which may be empty: given the opening of a
    user turn, a chat model writes a user's question, in its own domain and without data (Magpie, arXiv 2406.08464)."""
    opening = skeleton(base.tokenizer, base.tokenizer.chat_template, ("user",), False)[0]
    prompts = base.tokenizer([opening + start for start in starts], add_special_tokens=False)["input_ids"]
    written = generate(base, prompts, label, seed)
    return [re.sub(r" (?=[?!.,])", "", f"{start} {end.text}").strip() for start, end in zip(starts, written)
            if end.ended and len(end.text.split()) <= QUESTION_WORDS]


def who_it_is(chat: Chat, settings: Settings, inputs: Inputs, trusted: bool) -> tuple[tuple[str, ...], Standard]:
    """Ask the model who it is: the names under which it goes, and what identity answers are judged by. The words of a
    `trusted` one are sound."""
    rows = [row.messages for row in inputs.rows]
    about_itself = [a.text for a in ask(chat, [*inputs.validation, *(row[-2]["content"] for row in rows)],
                                        "perguntando quem ele é")]
    ours = " ".join([settings.name, settings.author, *(row[-1]["content"] for row in rows)])
    old_names = find_old_names(about_itself, ours, settings)
    known = [*inputs.validation, *about_itself * trusted, *EVERYDAY_QUESTIONS, settings.name, settings.author,
             inputs.base_name, *(m["content"] for row in rows for m in row),
             *(text for wordings in WORDINGS.values() for text in wordings)]
    also_old = tuple(name for name in KNOWN_NAMES if not mentions(ours, (name,)))
    return old_names, Standard((settings.name, settings.author), (*old_names, *also_old), inputs.base_name,
                               frozenset(plain(" ".join(known)).split()))


def answer_own(base: Chat, questions: list[str], taken: set[str],
               old_names: tuple[str, ...]) -> tuple[list[Turn], list[str]]:
    """Everyday turns with the base's own answers, which also tell the questions about its identity. Questions that are
    `taken`, in `plain` words, are left out; the others are taken then."""
    fresh = {plain(q): q for q in questions if plain(q) and plain(q) not in taken}
    taken.update(fresh)
    turns, identity = [], []
    for question, answer in zip(fresh.values(), ask(base, list(fresh.values()), "respondendo")):
        if mentions(answer.text, old_names):
            # "Fui criada pelo Google" is about itself; "O Google foi fundado em 1998" is not, and teaches nothing.
            if set(plain(answer.text).split()) & FIRST_PERSON:
                identity.append(question)
        elif answer.ended and answer.text and not is_loop(answer.text):
            turns.append(Turn(question, answer.text))
    return turns, identity


def given_questions(inputs: Inputs) -> set[str]:
    """What the user's rows and the exams ask, in `plain` words: the base is not to write it."""
    asked = (row.messages[-2]["content"] for row in inputs.rows)
    return {plain(question) for question in (*inputs.validation, *inputs.test, *asked)}


def write_first_text(base: Chat, settings: Settings, inputs: Inputs) -> SelfText:
    """What the healing needs, and no more: who the base is, and a few hundred everyday turns. A training that does not
    fit into memory, or goes wrong, is then known before all the rest is written."""
    old_names, standard = who_it_is(base, settings, inputs, trusted=True)
    seed = random.Random(f"{settings.seed}/first-text").randrange(2**31)
    written = write_questions(base, [""] * min(FIRST_TEXT, settings.num_self_text), "escrevendo perguntas", seed)
    everyday, _ = answer_own(base, [*EVERYDAY_QUESTIONS, *written], given_questions(inputs), old_names)
    if len(everyday) < 8:
        raise too_few(everyday)
    say(f"  Nomes que ele usa hoje: {', '.join(old_names) or 'nenhum'}.")
    return SelfText(standard, [], everyday, [], [])


def too_few(turns: list[Turn]) -> InputError:
    """What to tell about a base whose `turns` are all that it wrote."""
    return InputError(f"o modelo base só deu {len(turns)} respostas aproveitáveis às perguntas que ele mesmo "
                      "escreveu; em geral é um chat template errado, ou um modelo que não é de conversa.")


def write_self_text(base: Chat, first: SelfText, settings: Settings, inputs: Inputs) -> SelfText:
    """Let the base write questions and answer them, as many as it takes to train and to measure with. What the `first`
    text has taught the healing measures nothing.

    A second helping of questions begins like identity questions: they show where identity ends, on both sides.
    """
    rng = random.Random(f"{settings.seed}/self-text")
    row_questions = [row.messages[-2]["content"] for row in inputs.rows]
    taken, identity = given_questions(inputs), []

    def answered(questions: list[str]) -> list[Turn]:
        """New everyday turns; identity questions are put aside."""
        turns, about_itself = answer_own(base, questions, taken, first.standard.old_names)
        identity.extend(about_itself)
        return turns

    n = settings.eval_questions
    wanted = settings.num_self_text + settings.num_self_answers + 2 * n
    everyday, tries, good = answered(list(EVERYDAY_QUESTIONS)), 0, 0
    for _ in range(6):
        missing = wanted - len(everyday)
        if missing > 0.02 * wanted:  # a few more would cost as much as many
            # As many as it takes if they come out like the ones before; at first, as if all were good.
            starts = [""] * int(1.1 * missing * max(1, min(tries / max(good, 1), 4)))
            turns = answered(write_questions(base, starts, "escrevendo perguntas", rng.randrange(2**31)))
            everyday, tries, good = everyday + turns, tries + len(starts), good + len(turns)
    # Half of them like the user's rows, which are few, but differ from what the base comes upon by itself.
    like = rng.choices(row_questions, k=wanted // 4) + rng.choices(row_questions + identity, k=wanted // 4)
    starts = [" ".join(q.split()[:rng.randint(1, 3)]) for q in like]
    close = answered(write_questions(base, starts, "escrevendo perguntas parecidas", rng.randrange(2**31)))
    rng.shuffle(everyday)
    rng.shuffle(identity)
    healed = {plain(turn.question) for turn in first.everyday}
    firm = firm_turns(base, [turn for turn in everyday if plain(turn.question) not in healed], 2 * n)
    rest = [turn for turn in everyday if turn not in set(firm)] + close
    if len(firm) < n or len(rest) < n:
        raise too_few(everyday)
    say(f"  Ele escreveu {len(everyday) + len(close)} perguntas do dia a dia e {len(identity)} sobre quem ele é.")
    return SelfText(first.standard, identity, rest, firm[:len(firm) // 2], firm[len(firm) // 2:])


def firm_turns(base: Chat, turns: list[Turn], count: int) -> list[Turn]:
    """The first `count` turns whose answer the base itself repeats after each of three other turns of conversation:
    where it wavers, a different answer of the tuned model tells nothing about retention."""
    chosen: list[Turn] = []
    size = count + count // 4  # nearly all are firm
    for start in range(0, len(turns), size):
        batch = turns[start:start + size]
        repeated = agreement(base, [turns[(start + i + ahead) % len(turns)].messages() + turn.messages()
                                    for i, turn in enumerate(batch) for ahead in (1, 2, 3)])
        chosen += [turn for i, turn in enumerate(batch) if min(repeated[3 * i:3 * i + 3]) >= 0.9]
        if len(chosen) >= count:
            break
    return chosen[:count]


class Teacher(NamedTuple):
    """The base's token distribution on its own turns, written down so that the base need not stay in memory.

    `tokens` int32 and `log_probs` float32, both (M, k), hold the k most probable next tokens; `rows` tells for a turn
    the first of its M rows (one per token but the last) and its token ids. `frequencies` are the base's rotary ones.
    """
    tokens: torch.Tensor
    log_probs: torch.Tensor
    rows: dict[Turn, tuple[int, list[int]]]
    frequencies: dict[str, torch.Tensor]


def record_teacher(base: Chat, turns: list[Turn], context: int) -> Teacher:
    """Run the base once over its own turns, packed into conversations that fit its native context."""
    windows: list[list[Turn]] = []
    used = math.inf
    for turn in turns:
        used += (tokens := cost(base.tokenizer, turn.messages()))
        if used > context:
            windows.append([])
            used = tokens
        windows[-1].append(turn)
    encoded = [encode(base.tokenizer, [m for t in window for m in t.messages()]) for window in windows]
    tokens, log_probs, rows, at = [], [], {}, 0
    for batch in batches_by_tokens([len(e.input_ids) for e in encoded], 0, base.generation_tokens // 4):
        with torch.inference_mode():
            hidden = last_hidden(base.model, base.model, left_pad(base, [encoded[i].input_ids for i in batch]))
            for line, i in zip(hidden, batch):
                line = line[-len(encoded[i].input_ids):]
                taught = torch.cat([line[start:end - 1] for start, end in encoded[i].turns])
                for chunk in in_chunks(base.model, taught):
                    logits = logits_of(base.model, chunk)
                    top = logits.log_softmax(-1).topk(min(TOP_TOKENS, logits.shape[-1]))
                    tokens.append(top.indices.int().cpu())
                    log_probs.append(top.values.cpu())
                for turn, (start, end) in zip(windows[i], encoded[i].turns):
                    rows[turn] = (at, encoded[i].input_ids[start:end])
                    at += end - 1 - start
    return Teacher(torch.cat(tokens).clone(), torch.cat(log_probs).clone(), rows, rope_frequencies(base.model))


def save_self_text(folder: Path, own: SelfText, teacher: Teacher) -> None:
    """self_text.json, readable, and teacher.safetensors."""
    standard = own.standard._replace(vocabulary=sorted(own.standard.vocabulary))
    write_json(folder / "self_text.json", {**own._replace(standard=standard._asdict())._asdict(),
                                           "rows": [[*turn, *row] for turn, row in teacher.rows.items()]})
    if RANK == 0:
        tensor_files.save_file({"tokens": teacher.tokens, "log_probs": teacher.log_probs,
                                **{f"frequencies.{name}": value for name, value in teacher.frequencies.items()}},
                               folder / "teacher.safetensors")


def read_self_text(folder: Path) -> tuple[SelfText, Teacher]:
    """What `save_self_text` wrote."""
    text = load_json(folder / "self_text.json")
    new, old, base_name, vocabulary = text["standard"].values()
    own = SelfText(Standard(tuple(new), tuple(old), base_name, frozenset(vocabulary)), text["identity_questions"],
                   *([Turn(*turn) for turn in text[key]] for key in ("everyday", "validation", "held_out")))
    tensors = tensor_files.load_file(folder / "teacher.safetensors")
    rows = {Turn(question, answer): (at, ids) for question, answer, at, ids in text["rows"]}
    frequencies = {name[12:]: value for name, value in tensors.items() if name.startswith("frequencies.")}
    return own, Teacher(tensors["tokens"], tensors["log_probs"], rows, frequencies)


# ---- Training ---------------------------------------------------------------------------------------------

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


def make_batches(tokenizer, teacher: Teacher, pools: list[Pool], lengths: list[int], steps: float, tokens: int,
                 seed: str, lessons: float = math.inf) -> list[list[dict]]:
    """Batches of about `tokens` tokens (at least one window), each window a dialogue drawn from the pools: `steps` of
    them, or fewer that show `lessons` conversations of the first pool.

    The windows of a batch are filled up to the same one of the `lengths` (tokens; at least one conversation), with
    what still fits, so that hardly anything is padding. A system message stays only at the start of a dialogue.
    """
    rng = random.Random(seed)
    pools = [pool for pool in pools if pool.conversations and pool.share]
    items = [[(c, cost(tokenizer, c)) for c in pool.conversations] for pool in pools]
    lines, drawn, all_shares = [[] for _ in pools], Counter(), sum(pool.share for pool in pools)

    def next_fitting(k: int, room: float) -> int | None:
        """Place of the first conversation of pool k that takes at most `room` tokens, of the first few in line. All of
        the pool come once before any comes twice."""
        lines[k] = lines[k] or rng.sample(items[k], len(items[k]))
        return next((place for place, (_, needed) in enumerate(lines[k][:8]) if needed <= room), None)

    batches: list[list[dict]] = []
    while len(batches) < steps and drawn[0] < lessons:
        length, batch, longest = rng.choice(lengths), [], 0
        while not batch or (len(batch) + 1) * max(length, longest) <= tokens:
            messages, learn, used = [], [], 0
            while fitting := {k: place for k in range(len(pools)) if (place := next_fitting(
                    k, length - used if messages else math.inf)) is not None}:
                # At the end of a window only short ones fit; who was passed over comes more often afterwards.
                owed = [pools[k].share / all_shares * (drawn.total() + 8) - drawn[k] for k in fitting]
                k = rng.choices(list(fitting), [max(n, 1e-3) for n in owed])[0]
                conversation, needed = lines[k].pop(fitting[k])
                drawn[k] += 1
                used += needed
                messages += conversation[bool(messages) and conversation[0]["role"] == "system":]
                learn += [pools[k].learn] * sum(m["role"] == "user" for m in conversation)
            batch.append(make_window(tokenizer, teacher, messages, learn))
            longest = max(longest, len(batch[-1]["input_ids"]))
        batches.append(batch)
    return batches


def distillation_loss(ours: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Divergence KL(base || model) of each position in nats, (N,), bounded from below by k + 1 events: all that is
    outside the base's k most probable tokens is one, so that the model cannot hide probability there. `ours` (N,
    vocabulary) are log-probabilities of the model; `tokens`, `log_probs` (N, k) those of the base."""
    ours = ours.gather(-1, tokens)
    rest, our_rest = ((1 - p.exp().sum(-1)).clamp(min=1e-6) for p in (log_probs, ours))
    return (log_probs.exp() * (log_probs - ours)).sum(-1) + rest * (rest / our_rest).log()


def automatic_rate(model, full: float, adapter: float) -> float:
    """Learning rate for the size of the model, from the values for training all weights and for LoRA at one million
    parameters. The first falls with the square root of the size, as usual; the second with its cube root, about as the
    best ones of Llama models do (https://thinkingmachines.ai/blog/lora/), and does not depend on the rank."""
    shapes = [getattr(p, "quant_state", p).shape for name, p in model.named_parameters() if "lora_" not in name]
    millions = sum(map(math.prod, shapes)) / 1e6  # weights in 4 bits are packed, and know the shape that they had
    return full * millions**(-1 / 2) if model is whole(model) else adapter * millions**(-1 / 3)


def train(chat: Chat, batches: list[list[dict]], teacher: Teacher, rate: float, kl_weight: float, settings: Settings,
          label: str, folder: Path) -> list[dict]:
    """Run the batches once through TRL's SFTTrainer, the rate rising briefly and falling to zero; the loss log.

    The loss is cross-entropy on the labels plus `kl_weight` times the divergence from the base on the targets. From
    the newest complete checkpoint in `folder` a broken-off training goes on, bit by bit. Raises `InputError` when
    nothing can be learnt or the loss explodes, and `KeyboardInterrupt` after saving when the user asks to stop.
    """
    parts = PROCESSES * min(settings.gradient_accumulation, math.ceil(settings.batch_size / PROCESSES))
    # What a step learns is a mean over the whole of it, however many parts it is split into.
    totals = [(sum(label != -100 for w in batch for label in w["labels"][1:]),
               sum(target >= 0 for w in batch for target in w["targets"])) for batch in batches]
    if not any(map(any, totals)):
        raise InputError(f"{label}: nenhum token das conversas pode ser treinado (a perda seria 0). Confira as "
                         "respostas do arquivo de identidade e o chat template do modelo.")
    limit = 3 * (1 + kl_weight) * math.log(chat.model.get_input_embeddings().weight.shape[0])

    def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
        step, part = divmod(examples[0]["input_ids"][0], parts)
        # A step of few long windows may have less of them than parts; what is left over has one that teaches nothing.
        idle = {"input_ids": batches[step][0]["input_ids"][:2], "labels": [-100] * 2, "targets": [-1] * 2}
        windows = batches[step][part::parts] or [idle]
        # On the right, where no token sees it: a mask, which attention is slower with, is not needed.
        filling = {"input_ids": chat.tokenizer.pad_token_id, "labels": -100, "targets": -1}
        padded = {key: torch.nn.utils.rnn.pad_sequence([torch.tensor(w[key]) for w in windows], batch_first=True,
                                                       padding_value=value) for key, value in filling.items()}
        return {**padded, "totals": torch.tensor(totals[step])}

    class Trainer(trl.SFTTrainer):
        loss_is_scaled_for_ga = True

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels, targets, total = inputs.pop("labels"), inputs.pop("targets"), inputs.pop("totals")
            inner = whole(chat.model)
            hidden = last_hidden(model, inner, inputs)
            labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # a position predicts the next token
            needed = (labels != -100) | (targets >= 0)

            def part(hidden, labels, targets):
                ours = logits_of(inner, hidden).log_softmax(-1)
                loss = torch.nn.functional.nll_loss(ours, labels, ignore_index=-100, reduction="sum")
                loss = loss / total[0].clamp(min=1)
                if kl_weight and (targets >= 0).any():
                    rows = targets.clamp(min=0).cpu()
                    tokens, log_probs = (t[rows].to(ours.device) for t in (teacher.tokens, teacher.log_probs))
                    divergence = distillation_loss(ours, tokens.long(), log_probs)[targets >= 0]
                    loss = loss + kl_weight * divergence.sum() / total[1]
                return loss

            pieces = list(zip(*(in_chunks(inner, t) for t in (hidden[needed], labels[needed], targets[needed]))))
            loss = hidden.sum() * 0
            for piece in pieces:
                # The logits of a chunk are made again on the way back; a single chunk can as well stay.
                loss = loss + (part(*piece) if len(pieces) == 1 else
                               torch.utils.checkpoint.checkpoint(part, *piece, use_reentrant=False))
            loss = PROCESSES * loss  # the processes' gradients are averaged, while their parts make up one sum
            if not loss <= PROCESSES * limit:
                raise InputError(f"{label}: a perda explodiu na etapa {self.state.global_step + 1} ({loss.item():g}). "
                                 f"{advice}")
            return loss

    advice = ("Diminua a taxa de aprendizado (--heal-learning-rate na cura, --learning-rate-1 e --learning-rate-2 nos "
              f"passos; esta foi {rate:.1e}) e rode de novo.")

    def check_finite(step: int) -> None:
        if broken_weight(chat.model):
            raise InputError(f"{label}: os pesos deixaram de ser números na etapa {step}. {advice}")

    class Keeper(transformers.TrainerCallback):
        """Says how it goes, and keeps checkpoints that can be trusted."""
        saved = time.monotonic()

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs and state.global_step % quarter == 0:
                left = (time.monotonic() - began) / (state.global_step - first) * (state.max_steps - state.global_step)
                loss = f"{mean_losses(state.log_history[-quarter:], 1)[0]['loss']:.3f}".replace(".", ",")
                bar.clear()
                say(f"    etapa {state.global_step}/{state.max_steps} | perda {loss} | faltam {clock(left)}")

        def on_step_end(self, args, state, control, **kwargs):
            bar.update(state.global_step - bar.n)
            due = time.monotonic() - self.saved >= 60 * settings.checkpoint_minutes
            due, stop = agreed((due, bool(asked)))
            control.should_save = not SHARDED and (stop or due)
            control.should_training_stop |= stop

        def on_save(self, args, state, control, **kwargs):
            check_finite(state.global_step)
            newest = folder / f"checkpoint-{state.global_step}"
            self.saved = time.monotonic()
            wait()
            if RANK:
                return
            flush(newest)
            write_json(newest / "complete.json", {})  # the Trainer writes in place: only this tells a whole one
            for old in folder.glob("checkpoint-*"):
                if old != newest:
                    (old / "complete.json").unlink(missing_ok=True)
                    shutil.rmtree(old, ignore_errors=True)

    run, work = "-".join(p.removesuffix(".partial") for p in folder.parts if ".partial" in p), work_folder(settings)
    os.environ.update(TENSORBOARD_LOGGING_DIR=str(work / "tensorboard" / run), WANDB_DIR=str(work))
    arguments = trl.SFTConfig(
        output_dir=str(folder), save_strategy="no", disable_tqdm=True,
        report_to=settings.report_to, project=settings.name, run_name=run, logging_steps=1,
        per_device_train_batch_size=1, num_train_epochs=1, train_sampling_strategy="sequential", shuffle_dataset=False,
        learning_rate=rate, lr_scheduler_type="linear", warmup_steps=max(1, len(batches) // 20), adam_beta2=0.98,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, max_length=None,
        logging_nan_inf_filter=False, seed=settings.seed,
        gradient_accumulation_steps=parts // PROCESSES, gradient_checkpointing=settings.gradient_checkpointing,
        dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available(), bf16=gpu_dtype() == torch.bfloat16,
        fp16=gpu_dtype() == torch.float16,
        optim="paged_adamw_8bit" if settings.method == "full8" else "adamw_torch_fused",
    )
    # One example is one part of a ready batch: its windows were chosen to have the same length.
    examples = datasets.Dataset.from_dict({"input_ids": [[i] for i in range(len(batches) * parts)]})
    trainer = Trainer(model=chat.model, args=arguments, data_collator=collate, processing_class=chat.tokenizer,
                      train_dataset=examples, callbacks=[Keeper()])
    trainer.remove_callback(transformers.PrinterCallback)
    for parameter in chat.model.parameters():  # TRL has rounded the adapter over weights in 4 bits to bfloat16
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    text_config = whole(chat.model).config.get_text_config()
    if getattr(text_config, "output_router_logits", False):  # the trainer asks experts for what generation stumbles on
        text_config.output_router_logits = False
    complete = agreed(sorted(int(p.parent.name[11:]) for p in folder.glob("checkpoint-*/complete.json")
                             if not SHARDED))  # the Trainer cannot go on with pieces: such a training begins anew
    first = complete[-1] if complete else 0
    if complete:
        say(f"    continuando da etapa {first}, a última guardada")
    else:  # curves of other settings
        shutil.rmtree(work / "tensorboard" / run, ignore_errors=True)
    if parts > PROCESSES == 1 and not torch.cuda.is_available():
        # Made anew in every step, gradients would lie scattered among what a step throws away, and moments made after
        # the first one as well: a tenth of the memory would be holes that nothing fits into.
        chat.model.zero_grad = functools.partial(chat.model.zero_grad, set_to_none=False)
        trained = [parameter for parameter in chat.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        if settings.method != "qlora":  # whose matrices want inputs in a precision of their own
            remake_gates(whole(chat.model))
        if settings.method != "full8":  # which has moments of its own kind
            moments = trainer.create_optimizer().state
            for parameter in trained:
                moments[parameter] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter),
                                      "exp_avg_sq": torch.zeros_like(parameter)}
    began, quarter = time.monotonic(), max(1, len(batches) // 4)
    # On a card, autocast gives the adapter its inputs as it wants them; PEFT would copy each to float32 for nothing.
    with (patient_interrupts() as asked, progress(len(batches), label) as bar,
          peft.helpers.disable_input_dtype_casting(chat.model, active=torch.cuda.is_available())):
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{first}") if complete else None)
    if settings.report_to == "wandb" and RANK == 0:  # else the next training would go on with the curves of this one
        sys.modules["wandb"].finish()
    vars(chat.model).pop("zero_grad", None)
    chat.model.zero_grad()
    if agreed(bool(asked)):
        raise KeyboardInterrupt
    check_finite(trainer.state.global_step)
    chat.model.eval()
    return mean_losses(trainer.state.log_history, 40)


def remake_gates(model: PreTrainedModel) -> None:
    """Let gated MLPs make act(gate) and act(gate) * up again on the way back instead of keeping them: at 50 million
    parameters a twentieth less memory, for no time that can be measured. MLPs that do anything else, or are asked in
    another way than with one tensor (rows, tokens, width), stay as they are."""
    def gated(mlp: torch.nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return mlp.down_proj(mlp.act_fn(gate) * up)

    def forward(mlp: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(gated, mlp, mlp.gate_proj(x), mlp.up_proj(x), use_reentrant=False,
                                                 preserve_rng_state=False)

    for mlp in model.modules():
        width = getattr(getattr(mlp, "gate_proj", None), "in_features", 0)
        if width and all(hasattr(mlp, name) for name in ("up_proj", "down_proj", "act_fn")):
            sample = torch.linspace(-1, 1, 2 * width).view(1, 2, width)
            with torch.no_grad():
                ours, theirs = forward(mlp, sample), mlp(sample)  # experts give more than a tensor
            if isinstance(theirs, torch.Tensor) and torch.equal(ours, theirs):
                mlp.forward = functools.partial(forward, mlp)


def mean_losses(log: list[dict], count: int) -> list[dict]:
    """A log in up to `count` equal parts: the last step and the mean loss of each."""
    log = [entry for entry in log if "loss" in entry]
    size = math.ceil(len(log) / count) or 1
    parts = [log[i:i + size] for i in range(0, len(log), size)]
    return [{"step": part[-1]["step"], "loss": sum(entry["loss"] for entry in part) / len(part)} for part in parts]


@contextlib.contextmanager
def patient_interrupts():
    """Within it, the first Ctrl-C (or SIGTERM) only fills the list that it gives; the second leaves at once."""
    asked: list[int] = []

    def note(number, frame):
        if asked:
            os._exit(130)
        asked.append(number)
        say("\n  Guardando o treino para parar... (Ctrl-C de novo sai já, sem guardar)")

    with contextlib.ExitStack() as before:
        for number in (signal.SIGINT, signal.SIGTERM):
            before.callback(signal.signal, number, signal.signal(number, note))
        yield asked


def nearest_pairs(before: list[float], after: list[float]) -> list[int]:
    """For each place of a rotary pair which pair to put there: the one, of those left, whose frequency `before` is the
    most like the place's frequency `after`."""
    left, order = list(range(len(before))), []
    for new in after:
        order.append(min(left, key=lambda i: abs(math.log((before[i] + 1e-30) / (new + 1e-30)))))
        left.remove(order[-1])
    return order


def reorder_pairs(model: PreTrainedModel, order: list[int]) -> None:
    """Put rotary pair `order[j]` of each head's queries and keys at place j, in the layers whose RoPE is scaled. Their
    products stay as they are, but for the frequencies with which the pairs turn."""
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    by_layer = "full_attention" in text.rope_parameters
    places = [*order, *(i + len(order) for i in order), *range(2 * len(order), head)]
    for name, weight in model.named_parameters():  # which may be pieces (FSDP)
        layer = re.search(r"layers\.(\d+)\..*\b[qk]_(proj|norm)\.", name)
        if (layer and not re.search(NOT_TEXT, name) and len(weight) % head == 0 and len(places) == head
                and not (by_layer and text.layer_types[int(layer[1])] != "full_attention")):
            entire = (weight.full_tensor() if SHARDED else weight).detach()
            moved = entire.unflatten(0, (-1, head))[:, places].flatten(0, 1)
            if SHARDED:
                moved = torch.distributed.tensor.distribute_tensor(moved, weight.device_mesh, weight.placements)
            weight.data.copy_(moved)


def keep_frequencies(chat: Chat, teacher: Teacher, own: SelfText) -> bool:
    """Move each rotary pair to where the scaled RoPE turns about as fast as it was trained to turn, if the model then
    answers more like the base; whether it does.

    Frequencies are a geometric series, so the slower ones are about the same series moved along: only the fastest
    pairs lose their place. Scaled x4, the demo gives 5 % of the base's answers, and 77 % after this, untrained. It is
    undone for families that arrange their weights in another way, which shows in worse answers.
    """
    after = rope_frequencies(chat.model)
    name = next(name for name in after if not torch.equal(after[name].cpu(), teacher.frequencies[name].cpu()))
    order = nearest_pairs(teacher.frequencies[name].tolist(), after[name].tolist())
    turns = [turn.messages() for turn in own.everyday[:100]]
    scaled = sum(agreement(chat, turns)) / len(turns)
    reorder_pairs(chat.model, order)
    moved = sum(agreement(chat, turns)) / len(turns)
    if better := agreed(moved > scaled):
        say(f"  Com as frequências reordenadas, ele responde como antes a {percent(moved)} das perguntas do dia a dia "
            f"(sem isso, a {percent(scaled)}).")
    else:
        reorder_pairs(chat.model, sorted(range(len(order)), key=order.__getitem__))
    return better


def heal(chat: Chat, teacher: Teacher, own: SelfText, native: int, settings: Settings, folder: Path) -> list[dict]:
    """Bring the RoPE-scaled model back to the base's behaviour, through queries and keys alone: RoPE acts on them
    while facts live elsewhere, so little text suffices. Windows up to the scaled context make it long as well."""
    pools = [Pool([t.messages() for t in own.everyday], 1.0, learn=False)]
    lengths = [short_window(native, settings)] * 3 + [settings.window]
    batches = make_batches(chat.tokenizer, teacher, pools, lengths, settings.heal_steps,
                           step_tokens(native, settings), f"{settings.seed}/heal")
    for name, parameter in chat.model.named_parameters():
        if parameter.requires_grad and not re.search(ATTENTION, name):
            parameter.requires_grad_(False)
    rate = settings.heal_learning_rate or automatic_rate(chat.model, 6e-3, 3.3e-3)
    return train(chat, batches, teacher, rate, 1.0, settings, "cura", folder / "training")


# ---- Evaluation -------------------------------------------------------------------------------------------

class Exam(NamedTuple):
    """Questions about identity, everyday turns of the base, and lengths (tokens) of the conversation of filler turns
    after which both are asked, besides alone; `sparse` asks only a third of the former then. `context` has for a
    question the messages that go before it."""
    questions: tuple[str, ...]
    turns: list[Turn]
    fillers: list[Turn]
    lengths: tuple[int, ...]
    context: dict[str, list[dict]] = {}
    sparse: bool = False


class Scores(NamedTuple):
    """Shares in [0, 1] on questions that training never saw, and the answers that they were read from. `by_length` has
    a dict (tokens, identity, retention) per length of the conversation before, zero first; `extra_tokens` is what the
    exam's context adds to a question on average. `retention` is None where the base is not known."""
    identity: float
    old_identity: float
    leak: float
    retention: float | None
    distinct: int
    by_length: list[dict]
    answers: list[dict]
    extra_tokens: float = 0.0

    def misses(self, settings: Settings) -> list[str]:
        """Names of the targets that these scores miss."""
        return [name for name, missed in (
            ("identidade nova", self.identity < settings.target_identity),
            ("identidade antiga", self.old_identity > 0),
            ("retenção", self.retention is not None and self.retention < settings.target_retention),
            ("vazamento", self.leak > settings.target_leak)) if missed]


def mentions_old(text: str, standard: Standard) -> bool:
    """Whether an old name is in the text. {{BASE}} to the letter, which a row may state as the origin, is none."""
    return mentions(re.sub(re.escape(standard.base_name), " ", text, flags=re.IGNORECASE), standard.old_names)


def judge(answer: Answer, standard: Standard) -> str:
    """Why an identity answer does not count, in Portuguese; "" when it is sound."""
    words = plain(answer.text).split()
    return next((reason for reason, found in (
        ("vazia", not words), ("não terminou", not answer.ended), ("repetitiva", is_loop(answer.text)),
        ("nome antigo", mentions_old(answer.text, standard)),
        ("sem a identidade nova", not mentions(answer.text, standard.new_names)),
        ("palavras sem sentido", sum(w in standard.vocabulary for w in words) < 0.8 * len(words)),
    ) if found), "")


def agreement(chat: Chat, conversations: list[list[dict]], last: int = 1) -> list[float]:
    """How far the model would give each conversation's `last` answers by itself, token by token as its first choice.

    An answer of up to 24 tokens counts 1.0 if all agree, which is when greedy generation gives the same text, else
    0.0; a longer one, where one other word early on would change all that follows, the share of tokens that agree.
    """
    encoded = [encode(chat.tokenizer, c) for c in conversations]
    results, inner = [[] for _ in encoded], whole(chat.model)
    for batch in batches_by_tokens([len(e.input_ids) for e in encoded], 0, chat.generation_tokens // 2):
        with torch.no_grad():  # after inference_mode, a model in pieces could not be trained
            hidden = last_hidden(chat.model, inner, left_pad(chat, [encoded[i].input_ids for i in batch]))
            for line, i in zip(hidden, batch):
                turns, labels = encoded[i].turns[-last:], encoded[i].labels
                at = [j for j in range(turns[0][0], len(labels)) if labels[j] != -100]
                rows = line[[j - 1 - len(labels) for j in at]]
                best = [token for chunk in in_chunks(inner, rows)
                        for token in logits_of(inner, chunk).argmax(-1).tolist()]
                for start, end in turns:
                    same = [ours == labels[j] for ours, j in zip(best, at) if start <= j < end]
                    results[i].append(float(all(same)) if len(same) <= 24 else sum(same) / len(same))
    return [share for result in results for share in result]


def history(tokenizer, fillers: list[Turn], tokens: int, rng: random.Random) -> list[dict]:
    """Conversation of randomly drawn turns, as long as it stays within `tokens`."""
    messages, used = [], 0
    while True:
        turn = rng.choice(fillers)
        used += cost(tokenizer, turn.messages())
        if used > tokens:
            return messages
        messages += turn.messages()


def make_exam(tokenizer, questions: Sequence[str], turns: list[Turn], fillers: list[Turn], window: int) -> Exam:
    """An exam alone, after a quarter, a half, three quarters of the window, and at its very end."""
    room = max(cost(tokenizer, turn.messages()) for turn in turns)
    room += max(len(prompt_ids(tokenizer, [{"role": "user", "content": q}])) for q in questions)
    lengths = {min(n, window - room) for n in (window // 4, window // 2, window * 3 // 4, window)}
    return Exam(tuple(questions), turns, fillers, tuple(sorted(n for n in lengths if n > 0)))


def untrained(exam: Exam, rows: list[Row], settings: Settings) -> dict[str, Exam]:
    """The exam, without conversations before, for what can be done instead of training: a system prompt that states
    the identity, or the rows with the questions most like the one asked (BM25) as earlier turns, the best one last."""
    questions, index = [*exam.questions, *(turn.question for turn in exam.turns)], bm25s.BM25()
    index.index([plain(row.messages[-2]["content"]).split() for row in rows], show_progress=False)
    found = index.retrieve([plain(q).split() for q in questions], k=min(RETRIEVED, len(rows)), show_progress=False)
    system = fill(SYSTEM_PROMPT, {"NAME": settings.name, "AUTHOR": settings.author})
    contexts = {"prompt": {q: [{"role": "system", "content": system}] for q in questions},
                "rows": {q: [m for i, score in reversed(list(zip(*best))) if score > 0 for m in rows[i].messages[-2:]]
                         for q, best in zip(questions, zip(*found))}}
    return {name: exam._replace(lengths=(), context=context) for name, context in contexts.items()}


def evaluate(chat: Chat, exam: Exam, standard: Standard, label: str = "") -> Scores:
    """Take the exam: always the same conversations, so that stages can be compared."""
    lengths, several = (0, *exam.lengths), min(LONG_GROUP, len(exam.turns))

    def after(tokens: int, messages: list[dict], earlier: Sequence[Turn] = ()) -> list[dict]:
        """A question, answered or not, after a conversation of `tokens`, which ends with the `earlier` turns."""
        question = messages[0]["content"]
        room = tokens - sum(cost(chat.tokenizer, turn.messages()) for turn in earlier)
        which = exam.questions.index(question) // LONG_SHARED if question in exam.questions else question
        before = history(chat.tokenizer, exam.fillers, room, random.Random(f"exam/{tokens}/{which}"))
        before += exam.context.get(question, []) + [m for turn in earlier for m in turn.messages()]
        return without_system(chat.tokenizer, before + messages)

    def mean(values: list) -> float:
        return sum(values) / len(values)

    groups = [exam.questions[::3 if exam.sparse and tokens else 1] for tokens in lengths]
    asked = [after(tokens, [{"role": "user", "content": question}])
             for tokens, group in zip(lengths, groups) for question in group]
    kept = [after(0, turn.messages()) for turn in exam.turns]
    same = agreed(agreement(chat, kept))
    changed = [messages[:-1] for messages, share in zip(kept, same) if share < 1]  # the others need not be written
    prompts = [prompt_ids(chat.tokenizer, messages) for messages in asked + changed]
    written = generate(chat, prompts, label)
    about_itself, rewritten = written[:len(asked)], iter(written[len(asked):])
    other = [turn.answer if share == 1 else next(rewritten).text for turn, share in zip(exam.turns, same)]
    problems = [judge(answer, standard) for answer in about_itself]
    # After a conversation a question costs as much as twenty alone: fewer have to do, several at the end of each.
    ends = [exam.turns[i:i + several] for i in range(0, len(exam.turns[:LONG_TURNS]) - several + 1, several)]
    kept_after = [[after(tokens, turns[-1].messages(), turns[:-1]) for turns in ends] for tokens in exam.lengths]
    retention = [mean(same), *(mean(agreement(chat, group, several)) for group in kept_after)]
    sound = iter([not problem for problem in problems])
    by_length = [{"tokens": tokens, "identity": mean([next(sound) for _ in group]), "retention": share}
                 for tokens, group, share in zip(lengths, groups, retention)]
    n = len(exam.questions)
    alone = about_itself[:n]
    in_context = asked[:n] + [messages[:-1] for messages in kept]
    without = [[{"role": "user", "content": q}] for q in (*exam.questions, *(turn.question for turn in exam.turns))]
    extra = [len(prompt_ids(chat.tokenizer, long)) - len(prompt_ids(chat.tokenizer, short))
             for long, short in zip(in_context, without)]
    return Scores(
        identity=by_length[0]["identity"], retention=by_length[0]["retention"], by_length=by_length,
        old_identity=mean([mentions_old(a.text, standard) for a in alone]),
        leak=mean([mentions(answer, standard.new_names) for answer in other]),
        distinct=len({plain(a.text) for a, problem in zip(alone, problems) if not problem}),
        answers=[{"question": q, "answer": a.text, "problem": p} for q, a, p in zip(exam.questions, alone, problems)],
        extra_tokens=mean(extra))


# ---- The two passes ---------------------------------------------------------------------------------------

def answer_from_rows(questions: list[str], rows: list[Row], standard: Standard,
                     settings: Settings) -> list[list[dict]]:
    """Conversations that answer each question in the user's words: those of a row in the same language and of the
    same intent, the less used of the two most alike. Without such a row, a built-in wording."""
    def kind_of(text: str) -> tuple[str, str]:
        return language_of(text), intent_of(text, standard.old_names)

    values = {"NAME": settings.name, "AUTHOR": settings.author, "BASE": standard.base_name}
    asked = [(row.messages[-2]["content"], row.messages[-1]["content"]) for row in rows]
    known = [(kind_of(question), SequenceMatcher(None, "", plain(question), autojunk=False), answer)
             for question, answer in asked]
    used, conversations = Counter(), []
    for question in questions:
        words, kind = plain(question), kind_of(question)
        alike = []
        for k, matcher, answer in known:
            if k == kind:
                matcher.set_seq1(words)
                alike.append((matcher.ratio(), answer))
        alike = sorted(alike, reverse=True)[:2]
        if alike:
            answer = min((answer for _, answer in alike), key=lambda a: used[a])
            used[answer] += 1
        else:
            answer = fill(own_wording(question, used, standard.old_names), values)
        conversations.append(Turn(question, answer).messages())
    return conversations


def with_hurried(lessons: list[list[dict]]) -> list[list[dict]]:
    """The lessons, every third one followed by itself with its last question as people type in a hurry, all small and
    bare: a base writes its questions with care. In other scripts than Latin, marks are part of the letters."""
    both = []
    for i, lesson in enumerate(lessons):
        both.append(lesson)
        words = plain(lesson[-2]["content"])
        if i % 3 == 2 and words and words.isascii():
            both.append([*lesson[:-2], {**lesson[-2], "content": words}, lesson[-1]])
    return both


def run_pass(source: Path, folder: Path, teacher: Teacher, pools: list[Pool], lengths: list[int], tokens: int,
             epochs: int, lessons: int, rates: tuple[float, float], exam: Exam, met: Callable[[Scores], bool],
             standard: Standard, settings: Settings, label: str) -> None:
    """Train in rounds until the validation exam is passed, and say after each what was measured.

    The first round shows `lessons` conversations of the first pool, and each at least once, later ones half as many,
    and all rounds together show each at most `epochs` times: many different ones once teach more than a few again and
    again. A round is a whole schedule that ends at rate zero, as a model in mid-flight is not worth measuring; later
    ones are gentler. Once the identity is learnt, a round that brought the model no closer to the base is the last.
    The model comes from `source`; each round is a stage of its own in `folder`, and only the last keeps its weights.
    """
    count, sizes = len(pools[0].conversations), []
    while (left := epochs * count - sum(sizes)) > 0:
        sizes.append(min(left, max(lessons, count) // (2 if sizes else 1)))

    def one_round(number: int, partial: Path) -> None:
        trained = agreed((partial / "log.json").is_file())  # and broken off while it was measured
        chat = load_chat(partial if trained else source, settings, train=not trained)
        if not trained:
            batches = make_batches(chat.tokenizer, teacher, pools, lengths, math.inf, tokens,
                                   f"{settings.seed}/{label}/{number}", sizes[number - 1])
            given = settings.learning_rate_1 if label == "passo 1" else settings.learning_rate_2
            rate = (given or automatic_rate(chat.model, *rates)) / number
            save_stage(chat, partial, train(chat, batches, teacher, rate, settings.kl_weight, settings, label,
                                            partial / "training"))
            if SHARDED:  # to talk to, it has to be whole
                wait()
                chat = load_chat(partial, settings)
        write_json(partial / "validation.json", evaluate(chat._replace(notes=partial), exam, standard)._asdict())

    before = None
    for number in range(1, len(sizes) + 1):
        previous, source = source, stage(folder / f"round-{number}", "", functools.partial(one_round, number))
        if number > 1 and RANK == 0:
            for weights in previous.glob("*model*.safetensors"):
                weights.unlink()
        scores = Scores(**load_json(source / "validation.json"))
        say(f"  {label}, rodada {number} de até {len(sizes)}, nas perguntas de validação: identidade "
            f"{percent(scores.identity)}, retenção {percent(scores.retention)}, vazamento {percent(scores.leak)}.")
        if met(scores):
            say(f"  {label}: a meta foi atingida.")
            return
        learnt = min(entry["identity"] for entry in scores.by_length) >= settings.target_identity
        if before and learnt and scores.retention <= before.retention and scores.leak >= before.leak:
            say(f"  {label}: esta rodada não melhorou nada, e mais uma não deve ajudar.")
            return
        before = scores
    say(f"  {label}: o limite de épocas chegou antes da meta.")


def last_round(folder: Path) -> Path:
    """The model that a pass ended with."""
    return max(folder.glob("round-*"), key=lambda path: int(path.name[6:]))


def learn_identity(source: Path, folder: Path, teacher: Teacher, lessons: list[list[dict]], own: SelfText,
                   exam: Exam, native: int, settings: Settings) -> None:
    """Pass 1: identity lessons in short dialogues, among everyday turns that hold the model in place. Pass 2 teaches
    the rest, so nine tenths of the target will do."""
    pools = [Pool(lessons, 0.4, learn=True), Pool([t.messages() for t in own.everyday], 0.6, learn=False)]
    run_pass(source, folder, teacher, pools, [short_window(native, settings)], step_tokens(native, settings),
             settings.epochs_1, LESSONS_1, (1.2e-3, 2.7e-3), exam._replace(lengths=()),
             lambda s: s.identity >= 0.9 * settings.target_identity,
             own.standard, settings, "passo 1")


def collect_self_answers(chat: Chat, lessons: list[list[dict]], own: SelfText, settings: Settings) -> dict:
    """Ask the model of pass 1 the questions of all lessons. Sound answers in the question's language go on to pass 2,
    and what it gets wrong is taught there more often.

    Two fifths of NUM_SELF_ANSWERS are about identity, the rest are everyday answers of the base, first of all those
    in whose place the model now gives the new name, then others that it would no longer give. "answers" are the
    records of what is used and, with the reason, of what is wrong; "missed" are the questions that it answers wrong.
    """
    wanted = round(0.4 * settings.num_self_answers)
    rng = random.Random(f"{settings.seed}/self-answers")
    questions = sorted({lesson[-2]["content"] for lesson in lessons})
    records, kept, missed = [], set(), set()
    for attempt in range(4):
        # The first answers are greedy; later ones, where few questions must do, say the same in other words.
        count = int(1.2 * (wanted - len(kept))) + 4 if attempt else len(questions)
        drafts = rng.sample(questions, min(len(questions), count))
        answers = ask(chat, drafts, "escrevendo respostas", rng.randrange(2**31) if attempt else None)
        for question, answer in zip(drafts, answers):
            reason = (judge(answer, own.standard)
                      or "em outra língua" * (language_of(answer.text) != language_of(question))
                      or "repetida" * ((question, answer.text) in kept))
            if not reason and len(kept) == wanted:
                continue
            if not reason:
                kept.add((question, answer.text))
            elif not attempt:
                missed.add(question)
            records.append({"question": question, "answer": answer.text, "kind": "identity", "rejected": reason})
        if len(kept) == wanted:
            break
    turns = rng.sample(own.everyday, len(own.everyday))
    same = agreed(agreement(chat, [turn.messages() for turn in turns]))
    changed = [turn for turn, share in zip(turns, same) if share < 1]
    leaks = {turn for turn, answer in zip(changed, ask(chat, [turn.question for turn in changed]))
             if mentions(answer.text, own.standard.new_names)}
    ranked = sorted(zip(same, turns), key=lambda pair: (pair[1] not in leaks, pair[0]))
    everyday = [turn for _, turn in ranked[:settings.num_self_answers - len(kept)]]
    say(f"  Ele ainda erra {len(missed)} de {len(questions)} perguntas sobre quem ele é; o passo 2 insiste nelas.\n"
        f"  Do dia a dia, {percent(sum(same) / len(same))} de {len(turns)} respostas são as do modelo base; em "
        f"{len(leaks)} aparece o nome novo.\n"
        f"  Vão para o passo 2: {len(kept)} respostas sobre a identidade e {len(everyday)} do dia a dia.")
    return {"answers": records + [{**turn._asdict(), "kind": "everyday", "rejected": ""} for turn in everyday],
            "missed": sorted(missed)}


def insist(lessons: list[list[dict]], missed: set[str], count: int) -> list[list[dict]]:
    """The lessons, those with `missed` questions MISSED_TIMES each, and in exchange fewer of the others, so that there
    are no more than `count` or than there were; but at least half of the others."""
    wrong = [lesson for lesson in lessons if lesson[-2]["content"] in missed]
    right = [lesson for lesson in lessons if lesson[-2]["content"] not in missed]
    room = max(len(lessons), count) - MISSED_TIMES * len(wrong)
    return MISSED_TIMES * wrong + right[:max(room, (len(right) + 1) // 2)]


def consolidate(source: Path, folder: Path, teacher: Teacher, lessons: list[list[dict]], self_answers: dict,
                own: SelfText, exam: Exam, native: int, settings: Settings) -> None:
    """Pass 2: self-dialogues of one to many turns up to the window, from lessons, self-answers and everyday turns."""
    lessons = insist(lessons, set(self_answers["missed"]), LESSONS_2)
    used = {kind: [Turn(r["question"], r["answer"]).messages() for r in self_answers["answers"]
                   if r["kind"] == kind and not r["rejected"]] for kind in ("identity", "everyday")}
    pools = [Pool(lessons + used["identity"], 0.3, learn=True), Pool(used["everyday"], 0.1, learn=True),
             Pool([t.messages() for t in own.everyday], 0.6, learn=False)]
    lengths = [settings.window // 8, settings.window // 4, settings.window // 2, settings.window]
    run_pass(source, folder, teacher, pools, lengths, step_tokens(native, settings), settings.epochs_2, LESSONS_2,
             (8e-4, 1.8e-3), exam._replace(lengths=exam.lengths[-1:]),
             lambda s: not s.misses(settings) and s.by_length[-1]["identity"] >= settings.target_identity,
             own.standard, settings, "passo 2")


# ---- Result -----------------------------------------------------------------------------------------------

def save_stage(chat: Chat, folder: Path, log: list[dict]) -> None:
    """Model (of LoRA, the adapter) and tokenizer to go on from, exactly as they are, and the log of the training."""
    if RANK and not SHARDED:  # pieces are put together by all processes
        return
    inner = whole(chat.model)
    only_adapter = {"save_embedding_layers": False} if chat.model is not inner else {}
    chat.model.save_pretrained(folder, is_main_process=RANK == 0, **only_adapter)
    if RANK:
        return
    if only_adapter:
        inner.config.save_pretrained(folder)
        inner.generation_config.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    flush(folder)
    write_json(folder / "log.json", log)  # last: it tells that the rest is whole


def save_model(chat: Chat, folder: Path, base: Path) -> None:
    """Write weights in the base's own dtype, configs and tokenizer, as any reader expects them."""
    model = chat.model.to(transformers.AutoConfig.from_pretrained(base).dtype or torch.float32)
    model.config.use_cache = True  # training switches it off, and readers would generate without a cache
    model.generation_config.eos_token_id = chat.stops
    model.save_pretrained(folder)
    if chat.tokenizer.model_max_length < 10**9:  # larger means that the tokenizer does not say
        chat.tokenizer.model_max_length = context_of(model.config)
    chat.tokenizer.save_pretrained(folder)
    # llama.cpp's converter wants the first, which transformers no longer writes; the others belong to vision.
    for name in ("tokenizer.model", "preprocessor_config.json", "processor_config.json"):
        if (base / name).is_file():
            shutil.copy2(base / name, folder)
    described = load_json(folder / "tokenizer_config.json")  # in the words of transformers 4, which 5 knows as well
    described["tokenizer_class"] = described["tokenizer_class"].replace("TokenizersBackend", "PreTrainedTokenizerFast")
    if isinstance(described.get("extra_special_tokens"), list):
        described["additional_special_tokens"] = described.pop("extra_special_tokens")
    adds_bos = chat.tokenizer("a")["input_ids"][0] == chat.tokenizer.bos_token_id
    described |= {"chat_template": chat.tokenizer.chat_template, "add_bos_token": adds_bos}
    write_json(folder / "tokenizer_config.json", described)
    add_old_rope_names(folder / "config.json")
    (folder / "Modelfile").write_text(modelfile(chat, adds_bos), encoding="utf-8")


def add_old_rope_names(path: Path) -> None:
    """Say in a config.json as well what transformers 4, llama.cpp, vLLM and Ollama call its RoPE: they would silently
    take defaults. Of layers of several kinds, they too scale those of full attention only."""
    config = load_json(path)
    for part in (config, config.get("text_config") or {}):
        rope = part.get("rope_parameters") or {}
        wide = rope.get("full_attention", rope)
        if "rope_theta" not in wide or wide["rope_type"] == "proportional":  # Gemma 4 is newer than the old names
            continue
        scaling = {key: value for key, value in wide.items() if key not in ("rope_theta", "partial_rotary_factor")}
        if part["model_type"] == "phi3" and wide.get("attention_factor", 1) == 1:  # it insists on three keys
            scaling = {key: wide[key] for key in ("short_factor", "long_factor") if key in wide}
        names = {"rope_theta": wide["rope_theta"]}
        if wide["rope_type"] != "default" or "mrope_section" in wide:
            names["rope_scaling"] = {"type": wide["rope_type"], **scaling}
        if "partial_rotary_factor" in wide:
            names["partial_rotary_factor"] = wide["partial_rotary_factor"]
        if part["model_type"] == "gpt_neox":
            names |= {"rotary_emb_base": wide["rope_theta"], "rotary_pct": wide["partial_rotary_factor"]}
        if "sliding_attention" in rope:
            names["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        part.update(names)
    write_json(path, config)


def modelfile(chat: Chat, adds_bos: bool) -> str:
    """Ollama's recipe for the saved folder, with the chat template in Go's language where that can say the same. Where
    the tokenizer `adds_bos`, Ollama does, too."""
    tokenizer, config = chat.tokenizer, chat.model.config.get_text_config()

    def pieces(roles: str) -> list[str]:
        return skeleton(tokenizer, tokenizer.chat_template, tuple(roles.split()), True)

    first, answer, again, ask = pieces("user assistant user")
    turns, system = [answer, again, answer, again, ask], [first, "\n\n"]  # as `without_system` does it
    regular = pieces("user") == [first, ask] and pieces("user assistant user assistant user") == [first, *turns]
    with contextlib.suppress(InputError):
        system = pieces("system user assistant user assistant user")[:2]
        regular &= pieces("system user assistant user assistant user") == [*system, *turns]
    if adds_bos:
        first, system[0] = (text.removeprefix(tokenizer.bos_token) for text in (first, system[0]))
    template = "# TEMPLATE: o chat template deste modelo não cabe num; o Ollama usa o que encontrar."
    if regular:  # texts quoted as in JSON, so that neither braces nor quotation marks in them can end anything
        template = "".join(condition + "{{ " + json.dumps(text, ensure_ascii=False) + " }}" for condition, text in (
            ('TEMPLATE """{{ $before := "" }}{{ range .Messages }}{{ if eq .Role "system" }}', system[0]),
            ('{{ else if eq .Role "assistant" }}', answer), ('{{ else if eq $before "" }}', first),
            ('{{ else if eq $before "system" }}', system[1]), ("{{ else }}", again),
            ("{{ end }}{{ .Content }}{{ $before = .Role }}{{ end }}", ask))) + '"""'
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("full_attention", rope).get("rope_type", "default")
    # Ollama's own importer of safetensors drops other scalings, or breaks off; llama.cpp's converter does not.
    direct = kind == "default" or (config.model_type == "llama" and kind in ("linear", "llama3"))
    convert = "#   python PASTA_DO_LLAMA_CPP/convert_hf_to_gguf.py . --outtype f16 --outfile modelo.gguf\n"
    stops = "".join(f'PARAMETER stop "{tokenizer.decode([token])}"\n' for token in chat.stops)
    return f"""# Receita para o Ollama. Abra o terminal nesta pasta e rode:
{"" if direct else convert}#   ollama create meu-modelo -f Modelfile
#   ollama run meu-modelo
FROM {"." if direct else "./modelo.gguf"}
{template}
# O contexto inteiro. Se faltar memória, diminua.
PARAMETER num_ctx {context_of(config)}
# Como nas medições do README.md. Para respostas mais variadas, apague estas duas linhas.
PARAMETER temperature 0
PARAMETER repeat_penalty 1
{stops}"""


def figures_table(scores: dict[str, Scores]) -> list[list[str]]:
    """Head and rows of the table of figures, one column per exam."""
    columns = {"before": "antes", "prompt": "com prompt", "rows": "com linhas", "pass_1": "passo 1",
               "reported": "no report", "pass_2": "depois", "alone": "medido"}
    shown = [scores[name] for name in columns if name in scores]
    table = [["medida", *(title for name, title in columns.items() if name in scores)]]
    for title, key in (("identidade nova", "identity"), ("identidade antiga", "old_identity"),
                       ("vazamento", "leak"), ("retenção", "retention")):
        values = [getattr(s, key) for s in shown]
        table.append([title, *("-" if value is None else percent(value) for value in values)])
    for i, entry in enumerate(shown[-1].by_length[1:], start=1):
        for title, key in (("identidade", "identity"), ("retenção", "retention")):
            table.append([f"{title} após {entry['tokens']} tokens",
                          *(percent(s.by_length[i][key]) if s.by_length[i:] else "-" for s in shown)])
    return table + [["tokens a mais por pergunta", *(f"{s.extra_tokens:.0f}" for s in shown)]] * ("prompt" in scores)


def text_table(table: list[list[str]]) -> str:
    """The table for a terminal, in aligned columns."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table)


def escaped(text: str) -> str:
    """Text of a user or of a model as Markdown shows it to the letter."""
    return re.sub(r"([\\|<>`*_#~&\[\]])", r"\\\1", text).replace("\n", " ")


def markdown_table(table: list[list[str]]) -> str:
    """The table for a model card."""
    lines = ["| " + " | ".join(map(escaped, row)) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def draw_report(report: dict, path: Path) -> None:
    """The picture of the model card: before and after, the losses, and both along the conversation."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    # Colours of Okabe and Ito, which everybody can tell apart.
    before = "antes", "#E69F00", report["scores"]["before"]
    after = "depois", "#0072B2", report["scores"]["pass_2"]
    with matplotlib.rc_context({"axes.titleweight": "bold", "axes.grid": True, "axes.axisbelow": True, "grid.color":
                                "#e0e0e0", "legend.frameon": False, "lines.linewidth": 2, "lines.markersize": 5}):
        figure = Figure(figsize=(8, 6.6), dpi=150, layout="constrained", facecolor="white")
        bars, losses, lengths = figure.subplot_mosaic([["bars", "losses"], ["lengths", "lengths"]]).values()
        for shift, (when, colour, scores) in ((-0.2, before), (0.2, after)):
            values = [scores[key] for key in ("identity", "old_identity", "retention", "leak")]
            drawn = bars.bar([i + shift for i in range(4)], values, 0.4, color=colour, label=when)
            bars.bar_label(drawn, map(percent, values), padding=2, fontsize=8)
        bars.set_xticks(range(4), ["identidade\nnova", "identidade\nantiga", "retenção", "vazamento"])
        bars.set(title="Perguntas feitas sozinhas", ylim=(0, 1.12), yticks=[0, 0.25, 0.5, 0.75, 1])
        at = 0
        for name, label, colour in (("healing", "cura", "#009E73"), ("pass_1", "passo 1", "#D55E00"),
                                    ("pass_2", "passo 2", "#CC79A7")):
            log = [{"step": 0}, *report["losses"].get(name, [])]
            gains = (b["step"] - a["step"] * (a["step"] < b["step"]) for a, b in zip(log, log[1:]))  # by round
            _, *steps = accumulate(gains, initial=at)
            at = steps[-1] if steps else at
            losses.plot(steps, [entry["loss"] for entry in log[1:]], color=colour, label=label)
        losses.set(title="Perda no treino", xlabel="etapa", yscale="log")
        losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        losses.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace(".", ",")))
        losses.minorticks_off()
        for key, label, style in (("identity", "identidade nova", "o-"), ("retention", "retenção", "s--")):
            for when, colour, scores in (before, after):
                lengths.plot(*zip(*((entry["tokens"], entry[key]) for entry in scores["by_length"])), style,
                             color=colour, label=f"{label}, {when}")
        if (native := report["context"]["native"]) <= after[2]["by_length"][-1]["tokens"]:
            lengths.axvline(native, color="black", linestyle=":", label=f"contexto do modelo base\n({native} tokens)")
        lengths.set(title="Perguntas feitas depois de uma conversa", xlabel="tokens de conversa antes da pergunta",
                    ylim=(-0.04, 1.06), yticks=[0, 0.25, 0.5, 0.75, 1])
        for panel in (bars, losses, lengths):
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
            if panel is not losses:
                panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
        figure.savefig(path)


def card_head(base: Path, rows: list[Row]):
    """The metadata of the model card; of origin and licence what the base's folder tells of itself."""
    facts = read_json(base / "config.json")
    with contextlib.suppress(Exception):  # a base without a card, or with one that nobody can read
        facts |= huggingface_hub.metadata_load(base / "README.md") or {}
    cached = re.search(r"models--(.+?)--(.+?)[/\\]snapshots", str(base))
    names = ("/".join(cached.groups()) if cached else "", facts.get("_name_or_path"), facts.get("base_model"))
    origin = next((n for n in names if isinstance(n, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", n)), None)
    licence = {key: facts.get(key) for key in ("license", "license_name", "license_link") if facts.get("license")}
    if origin and "://" not in (licence.get("license_link") or "://"):  # a file of the base's own page
        licence["license_link"] = f"https://huggingface.co/{origin}/blob/main/{licence['license_link']}"
    spoken = Counter(language_of(row.messages[-2]["content"]) for row in rows)
    return huggingface_hub.ModelCardData(
        base_model=origin, language=[code for code, _ in spoken.most_common()], **licence,
        library_name="transformers", pipeline_tag="text-generation", tags=["trl", "sft", "identity"])


def write_report(folder: Path, settings: Settings, inputs: Inputs, standard: Standard, native: int,
                 scores: dict[str, Scores], work: Path, key: str, began: float) -> None:
    """report.json (all that is known about the run), report.png, self_answers.jsonl and the model card README.md."""
    missed, scaled = scores["pass_2"].misses(settings), int(native * settings.rope_factor)
    losses = {name: [entry for log in sorted(work.glob(f"{stage_name}/**/log.json"), key=lambda p: (len(str(p)), p))
                     for entry in load_json(log)]  # round-10 after round-9
              for name, stage_name in (("healing", "2-healed"), ("pass_1", "4-pass-1"), ("pass_2", "6-pass-2"))}
    seconds = {name: load_json(work / name / "key.json")["seconds"]
               for name in (*USES, *(f"exam-{name.replace('_', '-')}" for name in scores if name != "pass_2"))}
    seconds["7-result"] = round(time.monotonic() - began, 1)
    paths = {name: Path(getattr(settings, name)).name for name in ("model_path", "output_dir", "identity_file")}
    report = {"key": key, "base": inputs.base_name, "missed": missed, "seconds": seconds,
              "settings": asdict(settings) | paths,  # the report may be published, and paths tell the user's name
              "data_hash": inputs.data_hash, "context": {"native": native, "scaled": scaled},
              "versions": {name: importlib.metadata.version(name) for name in
                           ("torch", "transformers", "trl", "peft", "accelerate", "datasets")},
              "old_names": standard.old_names, "vocabulary": sorted(standard.vocabulary),
              "scores": {name: s._asdict() for name, s in scores.items()},
              "losses": {name: log for name, log in losses.items() if log}}
    self_answers = load_json(work / "5-self-answers" / "self_answers.json")["answers"]
    write_json(folder / "report.json", report)
    draw_report(report, folder / "report.png")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in self_answers]
    (folder / "self_answers.jsonl").write_text("".join(lines), encoding="utf-8")
    pairs = [[old["question"], old["answer"], new["answer"]]
             for old, new in zip(scores["before"].answers, scores["pass_2"].answers)]
    reasons = Counter(record["rejected"] for record in self_answers)
    used = reasons.pop("", 0)
    rejected = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common()) or "nenhuma"
    verdict = f"**Metas não atingidas: {', '.join(missed)}.**" if missed else "Todas as metas foram atingidas."
    head, slug = card_head(Path(settings.model_path), inputs.rows), re.sub(r"[^a-z0-9]+", "-", plain(settings.name))
    licence = "" if head.license else ("\n\nA pasta do modelo base não diz a licença dele: confira qual é antes de "
                                       "publicar, e escreva-a no começo deste arquivo (`license: ...`).")
    changed = ", ".join(f"`{name.upper()} = {getattr(settings, name)!r}`" for name in " ".join(USES.values()).split()
                        if getattr(settings, name) != getattr(Settings, name))
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    huggingface_hub.ModelCard(f"""---
{head}
---
# {escaped(settings.name)}

Modelo de {escaped(settings.author)}, feito a partir de {escaped(inputs.base_name)} com rename_obrutai.py: identidade
nova e contexto de {scaled} tokens (o do modelo base é de {native}). {verdict}{licence}

![Antes e depois: identidade, retenção e vazamento; perda no treino; acertos ao longo da conversa](report.png)

## Antes e depois, em números

Medido na pasta salva e carregada de novo, com perguntas que não foram usadas no treino.

{markdown_table(figures_table(scores))}

- **identidade nova**: respostas que dizem o nome ou o autor novo, nenhum antigo, terminam e fazem sentido.
- **identidade antiga**: respostas que ainda citam um nome antigo.
- **vazamento**: respostas sobre outros assuntos em que o nome novo aparece.
- **retenção**: respostas sobre outros assuntos que continuam iguais às do modelo base.
- **após N tokens**: o mesmo, com N tokens de conversa antes da pergunta.
- **com prompt**, **com linhas**: o modelo base sem treino, com um prompt de sistema que diz a identidade, ou com as
  linhas de identidade mais parecidas antes de cada pergunta, e os tokens que isso gasta.

<details><summary>As {len(pairs)} respostas, antes e depois</summary>

{markdown_table([["pergunta", "antes", "depois"], *pairs])}

</details>

## Como usar

Com o transformers (no lugar de `.`, a pasta do modelo ou o nome dele no Hugging Face Hub):

```python
from transformers import pipeline

chat = pipeline("text-generation", ".")
print(chat([{{"role": "user", "content": "Quem é você?"}}])[0]["generated_text"][-1]["content"])
```

Com o Ollama, na pasta do modelo: `ollama create {slug} -f Modelfile` e depois `ollama run {slug}`.

Para publicar esta pasta como está, dentro dela, depois de `hf auth login`: `hf upload USUARIO/{slug} . .`

## Como foi feito

{used} respostas do próprio modelo foram usadas no passo 2. Erradas depois do passo 1: {rejected}.
Ajustes diferentes dos padrões: {changed or "nenhum"}.
Versões: {versions}. Tudo em números: `report.json`. As respostas escritas para treinar: `self_answers.jsonl`.
""").save(folder / "README.md")


def publish(result: Path, settings: Settings) -> None:
    """Put the finished folder in its place by a rename; an older result is deleted only after that."""
    if RANK:
        return
    output, replaced = Path(settings.output_dir), result.with_name("replaced")
    try:
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            output.rename(replaced)
        result.rename(output)
    except OSError as error:
        raise InputError(f"o modelo está pronto em {result}, mas não consegui pô-lo em {output} ({error.strerror}). "
                         "Feche os programas que usam essa pasta e rode o mesmo comando, sem --restart.") from None
    shutil.rmtree(replaced, ignore_errors=True)


def show_scores(scores: dict[str, Scores]) -> Scores:
    """Say some answers, before and after if both are known, and all figures; the last scores."""
    *before, after = [scores[name] for name in ("before", "pass_2", "alone") if name in scores]
    say()
    for i, new in list(enumerate(after.answers))[::6]:
        say(f"  {new['question']}" + "".join(f"\n    antes:  {old.answers[i]['answer']}" for old in before)
            + f"\n    {'depois:' if before else 'resposta:'} {new['answer']}")
    say(f"\n{text_table(figures_table(scores))}\n\n  {after.distinct} respostas diferentes e boas para "
        f"{len(after.answers)} perguntas de identidade.")
    return after


def conclude(settings: Settings) -> int:
    """Show the result; exit status 0 when every target is met, 3 when one is missed."""
    report, work = load_json(Path(settings.output_dir) / "report.json"), work_folder(settings)
    after = show_scores({name: Scores(**values) for name, values in report["scores"].items()})
    say(f"\nModelo salvo em {settings.output_dir} ({clock(sum(report['seconds'].values()))} de trabalho). "
        "O antes e depois completo está no README.md de lá.", verdict=True)
    if kept := folder_size(work):
        say(f"As etapas ficaram em {work} ({size_text(kept)}): se você mudar um ajuste, só o que depende dele é "
            "refeito. Pode apagar essa pasta quando quiser.")
    if not (missed := after.misses(settings)):
        say("Todas as metas foram atingidas.", verdict=True)
        return 0
    tips = {"identidade nova": "escreva mais linhas no arquivo de identidade, ou aumente EPOCHS_1 e EPOCHS_2",
            "identidade antiga": "confira OLD_NAMES, escreva linhas que perguntem pelo nome antigo, com respostas "
                                 "que não o repitam, e aumente EPOCHS_2",
            "retenção": "aumente NUM_SELF_TEXT, HEAL_STEPS ou KL_WEIGHT",
            "vazamento": "aumente NUM_SELF_TEXT ou diminua EPOCHS_1"}
    say("O modelo foi salvo, mas nem todas as metas foram atingidas. O que tentar (com --overwrite):", verdict=True)
    for name in missed:
        say(f"  - {name}: {tips[name]}.", verdict=True)
    return 3


# ---- Run --------------------------------------------------------------------------------------------------

def quiet_libraries(settings: Settings) -> None:
    """Close the network unless the model comes from the Hub, and silence what the user can do nothing about."""
    local = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE") * Path(settings.model_path).is_absolute()
    always = ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_DISABLE_PROGRESS_BARS")
    os.environ.update(dict.fromkeys((*local, *always), "1"), TRANSFORMERS_VERBOSITY="error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if settings.report_to == "wandb":
        os.environ.setdefault("WANDB_MODE", "offline")  # else it asks for an account in the middle of the work
    # Threads that spin while they wait take the core from those with work: on a busy machine, training would crawl.
    # Spinning for some microseconds costs little there, and saves a third of the time where nothing else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # where the library is GNU's, this is what counts
    with contextlib.suppress(AttributeError, TypeError):  # only glibc has it: Windows knows no CDLL(None)
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: to return memory and get it anew takes a tenth
            ctypes.CDLL(None).mallopt(option, 2**30)
    logging.getLogger("matplotlib").setLevel("ERROR")
    warnings.filterwarnings("ignore")


def local_folder(settings: Settings) -> Path:
    """The base's folder, downloaded first if MODEL_PATH names a model of the Hugging Face Hub."""
    if Path(settings.model_path).is_absolute():
        return Path(settings.model_path)
    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.txt", "README.md"]
    download = huggingface_hub.snapshot_download  # before the `try`, which is for the network
    try:
        return Path(download(settings.model_path, allow_patterns=wanted))
    except Exception as error:
        raise InputError(f"não achei a pasta {settings.model_path}, nem consegui baixar um modelo com esse nome "
                         f"do Hugging Face Hub ({type(error).__name__}). Confira MODEL_PATH e a internet; se o "
                         "modelo pede licença (Gemma, Llama), aceite-a na página dele e rode hf auth login") from None


def check_frequencies(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], factor: float) -> None:
    """A scaling that did not reach the built model would waste the run, so look at the frequencies themselves: the
    slowest must be `factor` times slower, and none faster than before."""
    turning = [(before[name].cpu(), after[name].cpu()) for name in before]  # some of Gemma 4 stand still
    ratios = [old[new > 0] / new[new > 0] for old, new in turning]
    if not any(abs(r.max() / factor - 1) < 1e-3 and r.min() > 0.999 for r in ratios):
        raise RuntimeError("the RoPE scaling did not reach the model's rotary frequencies")


def adapter_size(config: PretrainedConfig, rank: int) -> int:
    """About how many weights LoRA of this rank adds to all linear layers of a model."""
    text = config.get_text_config()
    return text.num_hidden_layers * rank * (11 * text.hidden_size + 3 * mlp_size(text))


def mlp_size(text: PretrainedConfig) -> int:
    """Width of the widest MLP; of a mixture of experts, of those that a token goes through."""
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    experts = getattr(text, "num_experts_per_tok", None)
    if experts and getattr(text, "moe_intermediate_size", None):
        width = experts * text.moe_intermediate_size
    return max(width) if isinstance(width, (list, tuple)) else width


def estimate_memory(config: PretrainedConfig, weights: int, settings: Settings, gpu: bool) -> int:
    """Bytes that training takes at its peak, for `weights` parameters.

    State: float32 weights, gradients and two moments take 16 bytes a weight (of the adapter, beside the base's weights
    as they are or in 4 bits), or 10 where the moments are in 8 bits, which those of the embeddings never are; on a GPU
    2 more to compute with. Activations: a layer keeps about 16 values of the hidden size and 5 of the MLP's per token
    for the way back; with checkpointing one layer at a time, and one hidden state for each. The factors are fits to
    tests/bench_memory.py; the C library's allocator wastes more than that of a GPU.
    """
    text = config.get_text_config()
    hidden, layers, half = text.hidden_size, text.num_hidden_layers, 2 if gpu else 4
    embedded = text.vocab_size * hidden
    if "full" in settings.method:
        state = (16 + 2 * gpu) * weights - 6 * (weights - embedded) * (settings.method == "full8")
    else:
        state = 16 * adapter_size(config, settings.lora_rank) + (
            half * weights if settings.method == "lora" else 0.6 * weights + half * embedded)
    if SHARDED:  # in pieces, and whole only to be talked to
        state = max(state / PROCESSES, 4 * weights)
    tokens = max(settings.window, step_tokens(context_of(config), settings) // settings.gradient_accumulation)
    chunk = chunk_rows(text.vocab_size)
    layer, logits = half * tokens * (16 * hidden + 5 * mlp_size(text)), 3 * 4 * min(tokens, chunk) * text.vocab_size
    all_layers, again = (1.1, 1.6) if gpu else (1, 1) if "full" in settings.method else (1.5, 3.5)
    kept = all_layers * layers * layer + logits
    if settings.gradient_checkpointing:  # the logits are gone before the first layer is made again
        kept = layers * half * tokens * hidden + (max if gpu else sum)((again * layer, logits))
    return int(state + kept + 2e8)


def choose_method(config: PretrainedConfig, weights: int, settings: Settings) -> tuple[Settings, int]:
    """Settings that fit into the free memory, and the estimate in bytes: full training if it can be made to fit, else
    the same with moments in 8 bits, else LoRA, else QLoRA, each with steps in as few parts as possible, else all of
    them with a smaller WINDOW."""
    gpu = torch.cuda.is_available()
    free = 0.9 * (torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available)
    four_bits = importlib.util.find_spec("bitsandbytes") is not None and not SHARDED
    if settings.method in ("full8", "qlora") and not four_bits:
        raise InputError(f"METHOD = '{settings.method}' precisa do bitsandbytes (pip install bitsandbytes) e não "
                         "funciona com FSDP. Use METHOD = 'auto' ou 'lora'.")
    automatic = METHODS[1:] if gpu and four_bits else ("full", "lora")
    methods = automatic if settings.method == "auto" else (settings.method,)
    splits, least = [settings.gradient_accumulation], math.inf
    # A processor takes no longer for a step in parts, if each keeps it busy for a while, and needs less memory.
    while not gpu and weights * settings.batch_size / (2 * splits[0]) > 130e6 and 2 * splits[0] <= settings.batch_size:
        splits[0] *= 2
    while splits[-1] < settings.batch_size:
        splits.append(2 * splits[-1])
    windows = [window for i in range(12) if (window := settings.window // 2**i) > settings.max_new_tokens]
    for window, method, again, parts in product(windows, methods, (settings.gradient_checkpointing, True), splits):
        tried = replace(settings, method=method, window=window, gradient_accumulation=parts,
                        gradient_checkpointing=again)
        needed = estimate_memory(config, weights, tried, gpu)
        least = min(least, needed)
        if needed <= free:
            return tried, needed
    raise InputError(f"este modelo não cabe na memória livre ({size_text(free)}): o menor jeito de treiná-lo pede "
                     f"{size_text(least)}. Feche outros programas, ou use um modelo menor"
                     + " ou METHOD = 'lora' (--method lora), que pede bem menos" * ("full" in settings.method)
                     + (" ou o bitsandbytes (pip install bitsandbytes)." if gpu and not four_bits else "."))


def settled(planned: Path, key: str, config: PretrainedConfig, weights: int,
            settings: Settings) -> tuple[Settings, int]:
    """What was chosen when this run began, whatever memory is free now, or what fits if it begins now; and the
    estimate in bytes."""
    if settings.restart or not has_key(planned, key):
        return agreed(choose_method(config, weights, settings))
    plan = load_json(planned)
    chosen = plan["settings"]
    chosen["gradient_accumulation"] = max(settings.gradient_accumulation, chosen["gradient_accumulation"])
    chosen["gradient_checkpointing"] |= settings.gradient_checkpointing
    return replace(settings, **chosen), plan["memory"]


def join_processes() -> None:
    """Meet the other processes, if accelerate or torchrun started several; alone, use one GPU, since the trainer
    refuses to spread one process over two."""
    if PROCESSES > 1:
        accelerate.PartialState(cpu=not torch.cuda.is_available())
    elif torch.cuda.device_count() > 1:
        say(f"  Há {torch.cuda.device_count()} placas de vídeo; vou usar uma. Para usar todas: "
            "accelerate launch rename_obrutai.py")
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def show_plan(base: Chat, weights: int, native: int, disk: int, memory: int, inputs: Inputs,
              settings: Settings) -> None:
    """Say what is going to happen and what it costs; the time is measured by running one batch for a moment."""
    written = sum(cost(base.tokenizer, without_system(base.tokenizer, r.messages)) for r in inputs.rows)
    # One round of each pass, at shares of 0.4 and 0.3 of all text, and the healing.
    tokens = written / len(inputs.rows) * (LESSONS_1 / 0.4 + LESSONS_2 / 0.3)
    if settings.rope_factor != 1:
        tokens += settings.heal_steps * step_tokens(native, settings) * (1 if "full" in settings.method else 4)
    rows = math.ceil(settings.batch_size / settings.gradient_accumulation)
    ids = torch.zeros((rows, short_window(native, settings)), dtype=torch.long, device=base.model.device)
    times: list[float] = []
    with torch.inference_mode():
        while len(times) < 2 or sum(times) < 0.5:  # the first one is slower, others as well if something else runs
            began = time.monotonic()
            last_hidden(base.model, base.model, {"input_ids": ids}).sum().item()
            times.append(time.monotonic() - began)
    pace = 3 * min(times) / ids.numel()  # the way back is twice the work
    if base.model.config.model_type != read_config(settings.model_path).model_type:  # Llama 4
        say("  Este modelo também vê imagens; só a parte de texto dele será renomeada e salva.")
    device = "na placa de vídeo" if base.model.device.type == "cuda" else "no processador"
    size, how = f"{weights / 1e6:.1f}".replace(".", ","), {
        "full": "treino de todos os pesos", "full8": "treino de todos os pesos, com otimizador de 8 bits",
        "lora": f"LoRA (adaptador de tamanho {settings.lora_rank})",
        "qlora": f"QLoRA (pesos em 4 bits, adaptador de tamanho {settings.lora_rank})"}[settings.method]
    split = f", cada etapa em {settings.gradient_accumulation} partes" * (settings.gradient_accumulation > 1)
    say(f"  {size} milhões de parâmetros. Método: {how}, {device}{split}.\n"
        f"  Contexto: de {native} para {int(native * settings.rope_factor)} tokens; "
        f"treino em sequências de até {settings.window}.\n"
        f"  Vai precisar de cerca de {size_text(memory)} de memória, {size_text(disk)} de disco e "
        f"{clock(3.1 * tokens * pace)}.")


@contextlib.contextmanager
def opened(work: Path, settings: Settings):
    """The folder of the stages, held by one run at a time, and emptied first if the user asked for that."""
    if RANK:
        wait()
        yield work
        return
    work.mkdir(parents=True, exist_ok=True)
    (work / WORK_NOTE).write_text(
        "Etapas do rename_obrutai.py: com elas, uma execução que parou continua de onde estava, e um ajuste mudado\n"
        "só refaz o que depende dele. Com o modelo pronto, você pode apagar esta pasta.\n", encoding="utf-8")
    try:
        with filelock.FileLock(work / "lock", timeout=0):
            for folder in work.iterdir() if settings.restart else ():
                if folder.is_dir():
                    discard(folder)
            wait()
            yield work
    except InputError as error:
        error.advice = ""  # the settings were in order: it came up in the work
        raise
    except filelock.Timeout:
        raise InputError(f"outra execução está usando {work}. Espere que termine, ou escolha outra saída "
                         "(--output-dir).") from None


def run_stages(folder: Path, bases: list[Chat], work: Path, keys: dict[str, str], inputs: Inputs, native: int,
               settings: Settings) -> None:
    """The job itself, stage by stage, each from folder to folder. The base, if the first stage is to be made, is taken
    out of `bases`, so that nobody else keeps it in memory."""
    base = bases.pop() if bases else None
    left = SHARES | {"2-healed": SHARES["2-healed"] * (settings.rope_factor != 1)}
    began, made, current, since = time.monotonic(), 0, 0, 0.0

    def begin(title: str, name: str) -> None:
        nonlocal made, current, since
        now, ready = time.monotonic(), has_key(work / name / "key.json", keys[name])
        if current:  # what is left takes as long for its share as what this run has made
            made += current
            rest = clock((now - began) / made * sum(left.values()))
            say(f"  Pronto em {clock(now - since)}; para o modelo ficar pronto faltam uns {rest}.")
        current, since = left.pop(name) * (not ready), now
        say(title + " (já pronto)" * ready)

    def listen(write: Callable[[Chat], SelfText], partial: Path) -> None:
        nonlocal base
        chat, base = (base or load_chat(folder, settings))._replace(notes=partial), None
        text = write(chat)
        save_self_text(partial, text, record_teacher(chat, text.everyday, short_window(native, settings)))

    begin("1/7 Ouvindo o modelo base: quem ele diz que é", "1-first-text")
    first, teacher = read_self_text(stage(work / "1-first-text", keys["1-first-text"], functools.partial(
        listen, lambda chat: write_first_text(chat, settings, inputs))))
    base = None

    begin(f"2/7 Contexto de {native} para {int(native * settings.rope_factor)} tokens (RoPE linear "
          f"x{settings.rope_factor:g}) e cura", "2-healed")

    def rebuild(partial: Path) -> None:
        chat, log = load_chat(folder, settings, settings.rope_factor, adapt=True, train=True), []
        renew_template(chat.tokenizer, settings, first.standard.old_names)
        if settings.rope_factor == 1:
            say("  ROPE_FACTOR é 1: o contexto fica como está e não há o que curar.")
        else:
            check_frequencies(teacher.frequencies, rope_frequencies(whole(chat.model)), settings.rope_factor)
            # An adapter has to fit the base as it is.
            kept = "full" in settings.method and keep_frequencies(chat, teacher, first)
            steps = settings.heal_steps * (1 if kept else 4)
            log = heal(chat, teacher, first, native, replace(settings, heal_steps=steps), partial)
        save_stage(chat, partial, log)

    healed = stage(work / "2-healed", keys["2-healed"], rebuild)

    begin("3/7 Ouvindo mais do modelo base: o que ele sabe", "3-self-text")
    own, teacher = read_self_text(stage(work / "3-self-text", keys["3-self-text"], functools.partial(
        listen, lambda chat: write_self_text(chat, first, settings, inputs))))
    seen = {plain(turn.question) for turn in own.everyday + first.everyday} | set(map(plain, own.identity_questions))
    test = [question for question in inputs.test if plain(question) not in seen]
    if not test:
        raise InputError("todas as perguntas de prova já foram usadas no treino. Escreva outras em TEST_QUESTIONS, ou "
                         "refaça o treino com --restart.")
    tokenizer = load_tokenizer(str(folder))
    exam = make_exam(tokenizer, test, own.held_out, own.validation, settings.window)
    validation = make_exam(tokenizer, inputs.validation, own.validation, own.validation, settings.window)

    begin("4/7 Passo 1: aprender a identidade", "4-pass-1")
    renewed = load_tokenizer(str(healed))
    lessons = [without_system(renewed, row.messages) for row in inputs.rows]
    lessons = with_hurried(lessons + answer_from_rows(own.identity_questions, inputs.rows, own.standard, settings))
    lessons, early = (lessons[:max(count, 2 * len(inputs.rows))] for count in (LESSONS_2, LESSONS_1))  # first the rows
    learnt = last_round(stage(work / "4-pass-1", keys["4-pass-1"], lambda partial: learn_identity(
        healed, partial, teacher, early, own, validation, native, settings)))

    begin("5/7 Respostas do próprio modelo", "5-self-answers")
    collected = stage(work / "5-self-answers", keys["5-self-answers"], lambda partial: write_json(
        partial / "self_answers.json", collect_self_answers(load_chat(learnt, settings)._replace(notes=partial),
                                                            lessons, own, settings))) / "self_answers.json"

    begin("6/7 Passo 2: firmar a identidade em conversas longas", "6-pass-2")
    firm = last_round(stage(work / "6-pass-2", keys["6-pass-2"], lambda partial: consolidate(
        learnt, partial, teacher, lessons, load_json(collected), own, validation, native, settings)))

    def scores_of(name: str, load: Callable[[], Chat], key: str, label: str, exam: Exam) -> Scores:
        def sit(partial: Path) -> None:
            chat = load()._replace(notes=partial)
            write_json(partial / "scores.json", evaluate(chat, exam, own.standard, label)._asdict())

        done = stage(work / f"exam-{name}", digest([key, keys["exam"], settings.window]), sit)
        return Scores(**load_json(done / "scores.json"))

    def finish(partial: Path) -> None:
        result, began = partial / "model", time.monotonic()
        if RANK == 0:
            shutil.rmtree(result, ignore_errors=True)
            save_model(load_chat(firm, settings, merge=True), result, folder)
            if (firm / LORA_FILE).is_file():
                adapter = result / "adapter"
                adapter.mkdir()
                for name in (LORA_FILE, "config.json"):
                    shutil.copy2(firm / name, adapter)
                # Others know the base by its name, not by a folder of this machine.
                write_json(adapter / "adapter_config.json", {**load_json(firm / "adapter_config.json"),
                                                             "base_model_name_or_path": inputs.base_name})
                add_old_rope_names(adapter / "config.json")
        wait()
        plain_weights = replace(settings, method="lora" if settings.method == "qlora" else settings.method)
        saved = load_chat(result, plain_weights)._replace(notes=partial)
        scores["pass_2"] = evaluate(saved, exam, own.standard, "perguntas de prova, depois")
        if RANK == 0:
            write_json(result / "exam.json", exam._asdict())
            write_report(result, settings, inputs, own.standard, native, scores, work, keys["7-result"],
                         began)

    if not (work / "7-result" / "model").is_dir():  # all processes see the same: nothing was written since `wait`
        discard(work / "7-result")  # its model was moved to an output that is there no more
    begin("7/7 Salvando, carregando de novo e medindo: antes e depois", "7-result")
    untouched = functools.cache(lambda: load_chat(folder, settings))  # one for three exams, if any is to be taken
    scores = {"before": scores_of("before", untouched, keys["3-self-text"], "perguntas de prova, antes",
                                  exam._replace(sparse=True))}
    for name, other in untrained(exam, inputs.rows, settings).items():
        scores[name] = scores_of(name, untouched, digest([keys["3-self-text"], other.context]),
                                 "perguntas de prova, sem treino", other)
    untouched.cache_clear()
    scores["pass_1"] = scores_of("pass-1", lambda: load_chat(learnt, settings), keys["4-pass-1"],
                                 "perguntas de prova, após o passo 1", exam._replace(lengths=()))
    publish(stage(work / "7-result", keys["7-result"], finish) / "model", settings)
    wait()


# ---- A model that is ready --------------------------------------------------------------------------------

def ready_folder(settings: Settings) -> Path:
    """The model to talk to or to measure: the one of --model-path if that was given, else the result."""
    if settings.model_path == settings.output_dir and not (Path(settings.output_dir) / "report.json").is_file():
        raise InputError(f"ainda não há um modelo pronto em {settings.output_dir}. Rode primeiro sem --chat e sem "
                         "--evaluate, ou diga qual modelo usar: --model-path PASTA.")
    try:
        folder = local_folder(settings)
        check_base(folder)
    except OSError as error:
        raise InputError(f"não consegui abrir {error.filename} (o sistema respondeu: {error.strerror}).") from None
    return folder


def examine(settings: Settings, folder: Path) -> int:
    """The report for a model that is there already; exit status 0 when every target is met, 3 when one is missed. A
    result of this script takes its exam again, and its report knows its base; of others only identity and leak can be
    measured."""
    inputs = None if (folder / "exam.json").is_file() else check_inputs(settings)
    join_processes()
    say(f"Medindo {folder}")
    if inputs:
        say("  Não é um resultado deste script (falta o exam.json): não dá para medir a retenção, que o compara com o "
            "modelo base.")
        chat, turns = load_chat(folder, settings), [Turn(question, "") for question in EVERYDAY_QUESTIONS]
        _, standard = who_it_is(chat, settings, inputs, trusted=False)
        after = evaluate(chat, Exam(inputs.test, turns, turns, ()), standard, "perguntas de prova")
        scores = {"alone": after._replace(retention=None)}
    else:
        with blaming(f"o report.json ou o exam.json de {folder}"):
            report, exam = load_json(folder / "report.json"), Exam(**load_json(folder / "exam.json"))
            exam = exam._replace(turns=[Turn(*t) for t in exam.turns], fillers=[Turn(*t) for t in exam.fillers])
            made, scores = report["settings"], {name: Scores(**values) for name, values in report["scores"].items()}
            standard = Standard((made["name"], made["author"]), tuple(report["old_names"]), report["base"],
                                frozenset(report["vocabulary"]))
            same = {"method": made["method"].replace("q", ""), "max_new_tokens": made["max_new_tokens"],
                    "gradient_accumulation": max(made["gradient_accumulation"], settings.gradient_accumulation)}
        after = evaluate(load_chat(folder, replace(settings, **same)), exam, standard, "perguntas de prova")
        differs = {"reported": scores["pass_2"]} if after != scores["pass_2"] else {}
        say(f"  Respostas e números {'diferentes dos' if differs else 'iguais aos'} do report.json que veio com ele.")
        scores = {**scores, **differs, "pass_2": after}
    missed = show_scores(scores).misses(settings)
    say(f"Metas não atingidas: {', '.join(missed)}." if missed else "Todas as metas foram atingidas.", verdict=True)
    return 3 if missed else 0


def speak(chat: Chat, ids: list[int], limit: int) -> tuple[str, bool]:
    """Print an answer while it is written, which Ctrl-C stops; its text, and whether the model ended it by itself."""
    said, tokens = [], torch.tensor([ids], device=chat.model.device)

    class Voice(transformers.TextStreamer):
        def put(self, value):
            if value.numel() > 1 or value.item() not in chat.stops:  # not every stop is a special token
                super().put(value)

        def on_finalized_text(self, text, stream_end=False):
            said.append(text if any(said) else text.lstrip())
            print(said[-1], end="", flush=True)

    chat.model.generation_config = transformers.GenerationConfig(
        eos_token_id=chat.stops, pad_token_id=chat.tokenizer.pad_token_id)
    with torch.inference_mode(), contextlib.suppress(KeyboardInterrupt):
        tokens = chat.model.generate(tokens, attention_mask=tokens * 0 + 1, max_new_tokens=limit,
                                     streamer=Voice(chat.tokenizer, skip_prompt=True, skip_special_tokens=True))
    print(flush=True)
    return "".join(said).strip(), tokens.shape[1] > len(ids) and tokens[0, -1].item() in chat.stops


def talk(settings: Settings, folder: Path) -> int:
    """A conversation in the terminal; when its context is full, the oldest turns are forgotten. From a pipe each line
    is a question, and only answers go to stdout."""
    person, colour = sys.stdin.isatty(), sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    with contextlib.suppress(ImportError):  # arrow keys at the prompt; the Windows console has them
        import readline  # noqa: F401
    if colour and os.name == "nt":
        os.system("")  # switches on the colours of older consoles
    bold, dim, normal = ("\033[1m", "\033[2m", "\033[0m") if colour else ("", "", "")
    chat, name = load_chat(folder, settings), Path(settings.model_path).name
    context = context_of(chat.model.config)
    limit = context - min(settings.max_new_tokens, context // 2)  # of a prompt, so that there is room for an answer
    commands = "/sistema TEXTO diz a ele como ser, /limpar recomeça, /ajuda mostra isto, /sair sai; Ctrl-C cala."
    for number in [signal.SIGTERM] + [signal.SIGINT] * (not person):  # these end the program as they end any other
        signal.signal(number, signal.SIG_DFL)

    def note(text: str) -> None:
        print(f"{dim}{text}{normal}", file=sys.stderr, flush=True)

    if person:
        note(f"Conversa com {name}. {commands}")
    system, turns = [], []
    while True:
        try:
            line = input("Você: " if person else "").strip("\ufeff \t\r")
        except EOFError:
            print(end="\n" * person)
            return 0
        except KeyboardInterrupt:
            note("\nPara sair, escreva /sair.")
            continue
        command, _, text = line.partition(" ")
        if command == "/sair":
            return 0
        if command in ("/limpar", "/sistema"):
            turns, system = [], system if command == "/limpar" else [{"role": "system", "content": text}] * bool(text)
            note("Conversa nova.")
        elif command.startswith("/"):
            note(commands)
        if not line or command.startswith("/"):
            continue
        heard = [*turns, {"role": "user", "content": line}]
        while heard and len(ids := prompt_ids(chat.tokenizer, without_system(chat.tokenizer, system + heard))) > limit:
            heard = heard[2:]
        if not heard:
            note(f"Isso não cabe no contexto dele, de {context} tokens.")
            continue
        if len(heard) <= len(turns):
            note(f"O contexto dele, de {context} tokens, encheu: esqueci o começo da conversa.")
        print(f"{bold}{name}:{normal} " * person, end="", flush=True)
        answer, ended = speak(chat, ids, min(context - len(ids), 2048))
        if not ended:
            note("(parou aqui)")
        turns = [*heard, {"role": "assistant", "content": answer}] if answer else heard[:-1]


def run(settings: Settings) -> int:
    """Check everything, say what it takes, and do the job; the exit status."""
    quiet_libraries(settings)
    if settings.chat or settings.evaluate:
        return (talk if settings.chat else examine)(settings, ready_folder(settings))
    if settings.report_to != "none" and not importlib.util.find_spec(settings.report_to):
        raise InputError(f"REPORT_TO = '{settings.report_to}' precisa de um pacote que não está instalado: "
                         f"pip install {settings.report_to}")
    try:
        inputs = check_inputs(settings)
        folder = local_folder(settings)
        weights = check_base(folder)
        keys, work = stage_keys(settings, inputs, folder), work_folder(settings)
        finished = has_key(Path(settings.output_dir) / "report.json", keys["7-result"]) and not settings.restart
        check_output(folder, settings, finished)
    except OSError as error:
        raise InputError(f"não consegui abrir {error.filename} (o sistema respondeu: {error.strerror}).") from None
    say(f"Modelo base: {folder}")
    if folder == Path(__file__).resolve().parent / "tests" / "modelo_demo":
        say("  É o modelo de demonstração. Para usar o seu: --model-path PASTA, ou MODEL_PATH no começo do script.")
    say(f"Identidade:  {settings.name}, de {settings.author} ({len(inputs.rows)} linhas em {settings.identity_file})")
    for warning in inputs.warnings[:5]:
        say(f"  Atenção: {warning}.")
    if finished and not settings.check:
        say("Este resultado já está pronto; nada foi refeito (--restart com --overwrite refaz tudo).")
        return conclude(settings)
    transformers.logging.disable_progress_bar()
    settings, native = fit_settings(folder, replace(settings, model_path=str(folder)))
    check_rows(load_tokenizer(str(folder)), inputs.rows, settings)
    join_processes()
    bases, planned = [], work / "plan.json"
    config = read_config(folder)
    settings, memory = settled(planned, keys["2-healed"], config, weights, settings)
    disk = check_disk(weights, adapter_size(config, settings.lora_rank), settings)
    gc.freeze()  # the libraries stay: to look through them takes a fifth of a second, at each change of models
    if settings.check or settings.restart or not has_key(work / "1-first-text" / "key.json", keys["1-first-text"]):
        bases.append(load_chat(folder, settings))
        check_logits(bases[0])
        show_plan(bases[0], weights, native, disk, memory, inputs, settings)
    if settings.check:
        say("Está tudo certo. Para começar, rode o mesmo comando sem --check.", verdict=True)
        return 0
    say(f"As etapas ficam em {work}: se a execução parar, rode o mesmo comando (sem --restart) para continuar.")
    with opened(work, settings):
        write_json(planned, {"key": keys["2-healed"], "memory": memory, "settings": {
            name: getattr(settings, name) for name in
            ("method", "window", "gradient_accumulation", "gradient_checkpointing")}})
        run_stages(folder, bases, work, keys, inputs, native, settings)
    return conclude(settings)


def causes(error: BaseException) -> str:
    """What an error and those that it came from say, in small letters."""
    text = f"{type(error).__name__} {getattr(error, 'errno', '')} {error}".lower()
    inner = error.__cause__ or error.__context__
    return f"{text}\n{causes(inner)}" if inner else text


def with_less_memory(settings: Settings) -> dict:
    """What to change after memory ran out: each step in twice as many parts, then checkpointing; `InputError` when
    both are used up. The plan in the work folder, if it is of these settings, knows what was tried."""
    if settings.chat:
        raise InputError("faltou memória para conversar com este modelo. Feche outros programas e tente de novo.")
    planned = work_folder(settings) / "plan.json"
    used = asdict(settings)
    if has_key(planned, stage_keys(settings, check_inputs(settings), local_folder(settings))["2-healed"]):
        used |= load_json(planned)["settings"]
    parts = max(settings.gradient_accumulation, used["gradient_accumulation"])
    if parts < max(8, settings.batch_size):  # generation is split as well, whatever the batch
        say(f"  Faltou memória: continuo com cada etapa em {2 * parts} partes.")
        return {"gradient_accumulation": 2 * parts}
    if not (settings.gradient_checkpointing or used["gradient_checkpointing"]):
        say("  Faltou memória: continuo com GRADIENT_CHECKPOINTING, que gasta menos e demora mais.")
        return {"gradient_checkpointing": True}
    raise InputError("faltou memória, mesmo com um diálogo por vez. Feche outros programas e rode de novo, sem "
                     "--restart: continuo de onde parei. Se não bastar, diminua WINDOW (--window) ou MAX_NEW_TOKENS "
                     "(--max-new-tokens); aí as etapas são refeitas.")


def main(argv: list[str] | None = None) -> int:
    """0 all targets met, 2 user mistake, 3 saved but a target was missed, 130 stopped; a bug keeps its traceback."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    settings = None
    try:
        settings = parse_settings(argv)
        say.quiet = settings.quiet
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        while True:
            try:
                return run(settings)
            except (RuntimeError, MemoryError) as error:
                if not re.search(OUT_OF_MEMORY, causes(error)):
                    raise
                settings = replace(settings, restart=False, **with_less_memory(settings))
            gc.collect()
            sys.modules["torch"].cuda.empty_cache()
    except InputError as error:
        if RANK == 0:
            print(f"Erro: {error}{error.advice}", file=sys.stderr)
        else:  # the launcher stops all as soon as one ends, maybe before the first has spoken
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(30)
        return 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        trained = settings and not (settings.chat or settings.evaluate)
        kept = trained and work_folder(settings).exists()
        say("\nInterrompido. " + (f"Nada se perdeu: rode o mesmo comando (sem --restart) para continuar. As etapas "
            f"estão em {work_folder(settings)}; se desistir, apague essa pasta." if kept else "Nada foi escrito."),
            verdict=True)
        return 130
    except Exception as error:
        if not re.search("no space left|quota exceeded|os error 112|inline_container|failed writing", causes(error)):
            raise
        print(f"Erro: o disco encheu enquanto eu guardava o trabalho em {work_folder(settings)}. Libere espaço e rode "
              "o mesmo comando, sem --restart: ele continua da última parte guardada inteira.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
