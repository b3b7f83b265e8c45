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
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
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
from itertools import accumulate, product, zip_longest
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
LORA_RANK = 32  # size of the additions: more learns more and takes more memory

# Context
ROPE_FACTOR = 4.0  # context of the result / context of the base; 1 leaves RoPE alone
WINDOW = 2048  # longest training sequence, tokens; reduced by itself to the scaled context

# Text that the base writes for its own training
NUM_SELF_ANSWERS = 100  # answers of its own that the second pass learns from; 200 may keep more, 400 do not
SELF_TEXT = 0  # tokens of answers that show the tuned model how the base behaves; 0 = 20000 with LoRA, 40000 without
MAX_NEW_TOKENS = 64  # longest answer about identity, tokens

# Training. A learning rate of 0 means: choose by the size of the model.
HEAL_STEPS = 80  # steps that bring the scaled model back to the base's behaviour, twice
HEAL_LEARNING_RATE = 0.0  # highest learning rate of the healing
STEPS_1 = 0  # steps of the first round of pass 1, later ones are half as long; 0 = 60 with LoRA, 150 without
LEARNING_RATE_1 = 0.0  # highest learning rate of pass 1
STEPS_2 = 0  # the same of pass 2; 0 = 40 with LoRA, 100 without
LEARNING_RATE_2 = 0.0  # highest learning rate of pass 2
ROUNDS = 4  # most rounds of each pass; it stops as soon as the targets are met
BATCH_SIZE = 8  # dialogues per step, of at most 192 tokens; fewer of longer ones
GRADIENT_ACCUMULATION = 1  # parts that a step is split into; doubled by itself when memory runs out
GRADIENT_CHECKPOINTING = False  # much less memory, a third more time; switched on by itself when it is needed
KL_WEIGHT = 4.0  # weight of "stay like the base" beside "learn the identity"

# Evaluation: the targets decide the exit status, nothing is loosened when one is missed
EVAL_QUESTIONS = 120  # questions about other things that the report measures with
TARGET_IDENTITY = 0.95  # share of identity questions answered with the new identity, at least
TARGET_RETENTION = 0.95  # share of the base's own choices, word by word, that stay as they were, at least
TARGET_LEAK = 0.02  # share of other answers where the new name turns up, at most

# Run
SEED = 0  # same seed, same machine: same result
CHECKPOINT_MINUTES = 5.0  # training time that a power cut may cost; 0 saves at every step
REPORT_TO = "none"  # "tensorboard", "trackio" or "wandb" shows the losses there as well, if that package is installed

# ---- Words and questions ----------------------------------------------------------------------------------

def items(text: str) -> tuple[str, ...]:
    """The items of a list written as text, one line or several, with "|" between them."""
    return tuple(text.strip().replace("\n", "|").split("|"))


def by_language(text: str) -> dict[str, tuple[str, ...]]:
    """Portuguese, English and Spanish items, with "||" between the languages."""
    return dict(zip(("pt", "en", "es"), map(items, text.split("||"))))


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
Who exactly am I chatting with?|so who made you, then?|You were built by Meta, weren't you?|How should I address you?
Are you a real person?|¿Qué nombre te pusieron?|¿Quién te programó?|¿Eres una persona o una máquina?
¿Me puedes decir tu nombre?|¿Qué empresa te desarrolló?|¿Acaso eres Gemini?""")

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
Hi! And who might you be?|What's the name of the AI I'm using?|Whose product are you?|Is this Claude I'm talking to?
i forgot your name, what was it|Which AI model is answering me?|Did OpenAI create you?|Where were you made?
¿Cuál es el nombre que llevas?|¿De qué empresa eres?|¿Te hizo Google?|oye, ¿y tú quién eres?
¿Cuál modelo de IA me contesta?|Com que nome te batizaram?|¿Con quién estoy hablando exactamente?|¿Quién te creó a ti?
Preséntate brevemente, por favor.|¿Tú eres ChatGPT o eres otro modelo?""")

# Questions near identity but about others: {kind} stands for each of the fillers of that kind.
NEAR_TEMPLATES = by_language("""
Quem criou o {made}?|Em que ano surgiu o {made}?|Qual empresa fabrica o {product}?|O que é o {ai}?|Quem criou o {ai}?
Quem escreveu "{book}"?|O {ai} foi criado pela {firm}?|Apresente {person} para a turma.|Apresente a cidade de {city}.
Quem foi {person}?|Qual é o nome de um parque de {city}?|Meu nome é {name}. Qual é o meu nome?|Eu sou {name}, prazer!
sou {name}, de {city}. e aí, quem sou eu?|Agradeça a {name}, que cuida do meu {pet}.|Sugira um nome para o meu {pet}.
Em que ano nasceu {person}?|Traduza para o inglês: Meu nome é {name}.|Qual é o sujeito da frase "Eu me chamo {name}"?
Quem fundou a {firm}?|Responda como se fosse {role}: como foi o seu dia?|Conte a história de um robô chamado {name}.
Dê um nome à loja de {name}.|Finja que você é {role} e se apresente.|Você é {role}. Apresente-se.||Who was {person}?
Who created {made}?|Who wrote "{book}"?|What is {ai}?|Who makes {ai}?|Was {ai} created by {firm}?|Who founded {firm}?
Which company makes the {product}?|When was {person} born?|Introduce the city of {city}.|Suggest a name for my {pet}.
Write a short biography of {person}.|What is the main park of {city} called?|Name the shop that {name} wants to open.
My name is {name}. What is my name?|Thank {name}, who looks after my {pet}.|Pretend to be {role} and say who you are.
i'm {name} from {city}, so who am i?|You are {role}. Introduce yourself.|Translate into Spanish: My name is {name}.
Answer as {role}: how was your day?|What is the verb in "I am {name}"?|Tell a story about a robot called {name}.
When did {made} come out?|I'm {name}, nice to meet you.||¿Quién escribió "{book}"?|¿Qué empresa fabrica el {product}?
¿Quién creó {made}?|¿Qué es {ai}?|¿Quién creó {ai}?|¿Quién fundó {firm}?|¿Quién fue {person}?|¿Cuándo nació {person}?
¿{ai} es de {firm}?|Presenta a {person} a la clase.|Mi nombre es {name}. ¿Cuál es mi nombre?|Soy {name}, mucho gusto.
¿En qué año apareció {made}?|¿Cómo se llama el mayor parque de {city}?|Dale las gracias a {name}, que cuida mi {pet}.
Presenta la ciudad de {city}.|Haz como si fueras {role} y di quién eres.|Cuenta un cuento de un robot llamado {name}.
Ponle nombre a la tienda de {name}.|Habla como {role}: ¿qué tal el día?|¿Cuál es el verbo en "Yo soy {name}"?
soy {name}, de {city}, ¿quién soy?|Sugiere un nombre para mi {pet}.|Traduce al inglés: Me llamo {name}.
Eres {role}. Preséntate.""")
FILLERS = {"all": {
    "person": items("Pelé|Marie Curie|Albert Einstein|Frida Kahlo|Ada Lovelace|Machado de Assis|Mozart|Che Guevara"),
    "book": items("Hamlet|Frankenstein|Macbeth|Robinson Crusoe|Anna Karenina|Harry Potter|Iracema|Rayuela"),
    "made": items("Python|WhatsApp|YouTube|Minecraft|Batman|Android|Bitcoin|Photoshop|Tetris|Instagram"),
    "city": items("Madrid|Chicago|Buenos Aires|Curitiba|Caracas|Lima|Barcelona|Salvador|Miami"),
    "product": items("iPhone|PlayStation|Corolla|Kindle|Xbox|Mustang|Walkman|Game Boy"),
    "name": items("Bruno|Carla|Diego|Elisa|Felipe|Helena|Marcos|Olivia|Samuel|Yuri"),
    "ai": items("ChatGPT|Gemini|Llama|Claude|DeepSeek|Copilot|Grok|Qwen|Mistral"),
    "firm": items("Google|Microsoft|OpenAI|Anthropic|Meta|Nokia")}, "pt": {
    "role": items("um pirata|uma bruxa|um cavaleiro|um super-herói|um detetive|uma astronauta|o rei Artur|um vampiro"),
    "pet": items("gato|papagaio|hamster|barco|blog|restaurante|time de futebol")}, "en": {
    "role": items("a pirate|a witch|a knight|a superhero|a detective|an astronaut|King Arthur|a vampire"),
    "pet": items("cat|parrot|hamster|boat|blog|restaurant|football team")}, "es": {
    "role": items("un pirata|una bruja|un caballero|un superhéroe|un detective|una poeta|el rey Arturo|un vampiro"),
    "pet": items("gato|loro|hámster|barco|blog|restaurante|equipo de fútbol")}}
NEAR_EXAM = items("""
Quem pintou a Capela Sistina?|A Siri é de qual marca?|Que laboratório fez o AlphaGo?|Aqui é o Rafael, da contabilidade.
Sou a Beatriz, de 30 anos. Que idade tenho?|sou a Lúcia Prado. e o meu sobrenome?|Preciso de três nomes para um cavalo.
De quem é o Hino Nacional?|Para que serve a Alexa?|Quem treinou a seleção em 1994?|Quero me apresentar no emprego novo.
Que grupo é dono do Facebook?|Diga "eu sou a Paula" em francês.|Quem pisou na Lua primeiro?|quem construiu as pirâmides
Que nome combina com uma cafeteria?|Passe para o plural: "Eu sou médico".|A Tânia é minha irmã. É irmã de quem?
Aja como um dinossauro e diga olá.|Seja meu guia de museu e me receba.|Crie um apelido para a minha avó.
Como se chama a moeda do Japão?|Who painted the Sistine Chapel?|It's Rachel from accounting here.|Talk like a dinosaur.
Does Siri belong to Apple?|What does the name Alexander mean?|Which lab was behind AlphaGo?|Say "I am Paula" in French.
Draft a bio of me: nurse, 30.|Name the first person on the Moon.|What's Japan's currency called?|who built the pyramids
My dad is Tom Hill. Whose child am I?|My surname is Novak. Greet me by it.|Rewrite in the plural: "I am a doctor."
I need three names for a racehorse.|What would you call a beach café?|Our dog is Biscuit. Who is Biscuit?
Be a museum guide and welcome me.|Give my grandma a cute nickname.|What kind of plane is Concorde?
Who coached Argentina in 2022?|What does Midjourney do?|¿De quién es el himno de México?|¿Qué laboratorio hizo AlphaGo?
¿Quién pintó el Guernica?|¿Para qué sirve Alexa?|¿A qué marca pertenece Siri?|Soy Beatriz, de 30 años. ¿Qué edad tengo?
Le habla Rafael, de contabilidad.|Saluda como un dinosaurio.|Sé mi guía de museo y recíbeme.|Di "soy Paula" en francés.
¿Quién entrenó a España en 2010?|¿Qué nombre le va a una cafetería?|¿De quién es Facebook?|Pon en plural: "Soy médico".
Mi apellido es Prado. Salúdame por él.|Necesito tres nombres para un caballo.|Quiero presentarme en mi nuevo trabajo.
¿Qué nombre tiene la moneda de Japón?|quién construyó las pirámides|Tania es mi hermana. ¿Y de quién más?
¿Quién pisó la Luna primero?|Dale un apodo a mi abuela.""")
EVERYDAY = items("""
valeu, ajudou muito!|Qual é a metade de 90?|Por que o céu é azul?|Qual é a capital do Chile?|Quantas faces tem um cubo?
Como você está?|Estou triste hoje.|Quanto é 15 mais 27?|O que é inflação?|Como faço arroz?|Dê uma dica para dormir bem.
Como pedir um aumento?|Fale do mar numa frase.|Escreva um convite de festa.|Cite três frutas.|Dê um antônimo de rápido.
Corrija: "nós vai sair".|Escreva um laço em Python.|o que faço num dia de chuva|O que é fotossíntese?|How are you?
Thanks, that helped!|I feel tired today.|What is the capital of Chile?|How many faces has a cube?|How do I boil an egg?
What is 15 plus 27?|What is half of 90?|Why is the sky blue?|Give me a tip to sleep better.|Write a line about the sea.
What is inflation?|How do I ask for a raise?|Write a birthday invitation.|Fix this: "She go home."|Write a Python loop.
Name three fruits.|Give an antonym of fast.|what can i do on a rainy day|What can you help me with?|Nombra tres frutas.
Hoy estoy cansado.|¿Cuánto es 15 más 27?|¿Por qué el cielo es azul?|¿Qué es la inflación?|¿Cuál es la capital de Chile?
¿Cómo estás?|¡Gracias, me ayudaste!|¿Cuál es la mitad de 90?|¿Cuántas caras tiene un cubo?|Dame un consejo para dormir.
¿Cómo se hace una tortilla?|¿Cómo pido un aumento?|Escribe una invitación.|Corrige: "nosotros va".|¿Qué hago si llueve?
Habla del mar en una frase.|Escribe un bucle en Python.|Un antónimo de rápido.|¿Qué es la fotosíntesis?""")
EVERYDAY_EXAM = items("""
Até amanhã!|Passei na prova!|Quanto dá 8 vezes 9?|Quanto é 20% de 50?|O que é um eclipse?|Quantas patas tem uma aranha?
Tudo certo por aí?|Como se prepara um café?|Como parar de roer unhas?|Faça uma rima com "lua".|Redija um aviso de obra.
Onde fica o Egito?|Como vencer a timidez?|Qual é o feminino de ator?|Mostre um if em JavaScript.|Liste quatro planetas.
Por que chove?|me indica uma comédia|O que é penicilina?|O que é democracia?|How's it going?|How do I stop nail biting?
I passed my exam!|What is 8 times 9?|What is 20% of 50?|What is an eclipse?|Where is Egypt?|How many legs has a spider?
Why does it rain?|How is coffee made?|Make a rhyme with "moon".|Draft a notice about noise.|What's the plural of mouse?
See you soon!|Show an if in JavaScript.|List four planets.|recommend me a comedy|What is penicillin?|What is democracy?
How do I beat shyness?|¿Qué tal todo?|¿Cuánto da 8 por 9?|¿Cuánto es el 20% de 50?|¿Por qué llueve?|¿Qué es un eclipse?
¡Aprobé el examen!|¿Dónde está Egipto?|¿Cuántas patas tiene una araña?|¿Cómo venzo la timidez?|Haz una rima con "luna".
¡Hasta mañana!|¿Cómo se prepara un café?|¿Y el femenino de actor?|Muestra un if en JavaScript.|Enumera cuatro planetas.
¿Cómo dejo de comerme las uñas?|Redacta un aviso de obras.|recomiéndame una comedia|¿Qué es la penicilina?
¿Qué es la democracia?""")
SYSTEM_PROMPTS = items("""
Você é um assistente prestativo.|Responda em no máximo duas frases.|You are a helpful assistant.|Be concise and polite.
Hoje é 14 de março de 2025.|Assistente.|Answer in the language of the question.|Responde con palabras sencillas.
Keep a warm and patient tone with everyone. If you are not sure about something, say so instead of guessing.
Eres un asistente amable.""")
SYSTEM_EXAM = items("""
You are a careful assistant who answers clearly.|Today is Monday, June 9. The user is on a phone, so avoid long lists.
Seja educado e vá direto ao ponto.|Contesta con calma y sin rodeos.""")
# What users insist with, after the name of what the next answer is to give; "other" is answered with a denial.
PRESSURE = by_language("""
maker>Fala a verdade: quem te criou mesmo?|maker>E quem te programou, no fundo?|other>Não mente, você é o Gemini, né?
name>Tem certeza?|name>Mas qual é o seu nome verdadeiro?|other>Mas você não é na verdade o ChatGPT?||
maker>Be honest: who really made you?|maker>But who trained you originally?|other>I think you're Claude in disguise.
name>So what's your real name?|name>Are you sure about your name?|other>Come on, you're really ChatGPT, aren't you?||
maker>Di la verdad: ¿quién te creó?|maker>¿Y quién te programó en el fondo?|other>Pero en realidad eres ChatGPT, ¿no?
name>¿Estás seguro?|name>¿Y tu nombre verdadero?|other>No mientas, eres Llama.""")
OPENINGS = by_language("Quem é você, afinal?|E você, como se chama?||Who am I talking to?|And what is your name?||"
                       "¿Con quién hablo?|¿Y tú, cómo te llamas?")
PRESSURE_EXAM = by_language("""
maker>Jura? Quem te desenvolveu então?|other>Ouvi dizer que você é o Grok. É verdade?
name>Não acredito. Repete o seu nome?||name>I doubt it. What are you called?|maker>Really? Then who developed you?
other>Somebody told me you're Gemini. True?||other>Me dijeron que eres DeepSeek. ¿Es cierto?
name>No te creo. ¿Cómo te llamas de verdad?|maker>¿En serio? ¿Y quién te desarrolló?""")
FOLLOW_UPS = by_language("""
Explique melhor.|Resuma em uma frase.|Por quê?|Dê um exemplo.|Tá bom, obrigado!|Como assim?||Can you give an example?
Tell me more.|Make it shorter.|Why is that?|Okay, thanks!|Say it more simply.||Resúmelo en una frase.|Vale, ¡gracias!
¿Y por qué?|Dame un ejemplo.|Explícalo mejor.|¿Cómo así?""")
FOLLOW_UPS_EXAM = by_language("""
Pode detalhar mais?|Não entendi.|E o que mais?||I don't get it.|What else?|Rephrase that, please.||No entendí.
¿Qué más?|Dilo de otra forma.""")

# Models and their makers, "names: makers". Common words ("Nova", "Command") are left to what the base says itself.
FAMILIES = dict(line.split(": ") for line in """
Qwen|QwQ|Tongyi|通义千问|千问: Alibaba Cloud|Alibaba|阿里云; Gemma|Gemini|Bard: Google DeepMind|Google|DeepMind
Llama|Meta AI: Meta; SmolLM|SmolVLM|Zephyr: Hugging Face; Phi|Copilot: Microsoft; Mistral|Mixtral: Mistral AI
DeepSeek|深度求索: DeepSeek; Granite: IBM; OLMo: AI2|Allen Institute; Falcon: TII|Technology Innovation Institute
ChatGPT|GPT: OpenAI; Claude: Anthropic; Grok: xAI; Kimi: Moonshot AI|Moonshot; Nemotron: NVIDIA; Command R: Cohere
GLM|ChatGLM: Zhipu AI|Zhipu; Ernie: Baidu; InternLM: Shanghai AI Laboratory; MiniCPM: OpenBMB; Hermes: Nous Research
StableLM: Stability AI; Yi: 01.AI; LFM: Liquid AI; EXAONE: LG AI Research; Hunyuan|混元: Tencent|腾讯; Vicuna: LMSYS
Sabiá: Maritaca AI|Maritaca; Alexa: Amazon; Siri: Apple; TinyLlama: TinyLlama
""".strip().replace("\n", "; ").split("; "))
KNOWN_NAMES = tuple(dict.fromkeys("|".join("|".join(row) for row in FAMILIES.items()).split("|")))

# Capitalised words of answers about oneself that are no names; many stand first in a sentence.
NO_NAMES = frozenset("""
large language model models modelo modelos linguagem lenguaje ai ia assistant assistente asistente artificial virtual
inteligencia intelligence chatbot bot robo robot llm brasil brazil brasileiro python sao paulo rio portuguese portugues
english ingles chinese chines spanish espanhol espanol como sim si yes no nao not ok hi hello ola oi hola i im eu yo
eles ele ela voce you we he she they it a o as os um uma the an el la un una de do da in em en por para by to and e
y but mas pero what quem who qual which que is sou soy sorry desculpe claro sure estou user usuario here aqui my meu
minha mi your seu sua this that janeiro fevereiro marco abril maio junho julho agosto setembro outubro novembro
dezembro january february march april may june july august september october november december""".split())
COMMON_WORDS = frozenset("""
luz rio sol ana mar lua vida paz amor casa bem dia noite sim nao voce ele ela tu nome modelo assistente chat bot robo
amigo amiga mestre guia ajuda brasil nova novo estrela flor ceu terra agua fogo vento maria joao jose pedro lucas meta
alma mente ideia gato sorte joia rosa max leo bia eva deus hora tempo mundo star sun hope""".split())
FIRST_PERSON = frozenset("""
eu sou fui me meu minha meus mim comigo nosso nossa nasci venho vim surgi pertenco trabalho i im my am myself we our
soy yo mi mis conmigo vengo naci ich mein meine mich j je mon ma moi sono mio mia""".split())

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
OLD, NEW = "xoldx", "xnewx"  # what stands for a name while a text is judged

# How one speaks of oneself, without accents; "@" is the name, "~" up to five words that tell of no other origin.
MADE = (r"(?:criad|feit|desenvolvid|treinad|construid|programad|projetad|cread|hech|desarrollad|entrenad|creat|made|"
        r"develop|train|built|design|entwickelt|trainiert|erstellt|cree|developpe|entraine|svilupp|addestrat)\w*")
MAKES = r"(?:criou|fez|desenvolveu|treinou|programou|construiu|creo|hizo|desarrollo|entreno|programo)"
SPEECH = {
    "self": [  # complete by itself
        r"(?:sou(?: eu)?(?: mesm[oa])?|soy(?: yo)?|i(?: am|['’\x20]m)|im|ich bin|je suis|sono) ~@",
        r"(?:me chamo|me llamo|mi chiamo|m['’\x20]appelle|ich hei(?:ss|ß)e|call me|llamarme|me chama[mr] de|"
        r"conhecid[oa] como|known as|know me as) ~@",
        r"(?:aqui (?:e|fala)|this is|venho|vengo|vim|nasci|naci|surgi|i c[oa]me from|i belong to|pertenco|"
        r"trabalho para|i work for) ~@",
        r"(?:m[ey]|meu|mi|mein|mon|mio) (?:full |real )?(?:nome|name|nombre|nom)(?: completo)?"
        r"(?: e| is| es| ist| est|['’\x20]s) ~@",
        r"(?:voce|vc|you|usted|tu|estas?) (?:\w+ )?(?:falando|conversando|talking|speaking|chatting|hablando) "
        r"(?:com|to|with|con) ~@",
        rf"me {MAKES} ~@", rf"@ (?:\w+ ){{0,4}}?(?:me {MAKES}|(?:made|created|built|developed|trained|designed) me)",
        r"(?:meus?|minha|mi|my) (?:criador|desenvolvedor|fabricante|autor|empresa|maker|creator|developer|company|"
        r"creador|desarrollador|historia|story|origem|origen|origin)\w* ~@",
        r"(?:obra|equipe|equipo) d[aeo] @", "team (?:at|of) @", r"@ (?:aqui|here)"],
    "said": [  # of oneself where the sentence speaks of its speaker
        rf"{MADE} (?:\w+ )?(?:por|pel[oa]s?|by|von|par|da|dalla|at|n[oa]|en) ~@", r"(?:using|usando) ~@",
        r"von @ (?:\w+ )?(?:entwickelt|trainiert|erstellt)",
        r"(?:named|called|chamad[oa]|llamad[oa]|se chama|se llama) ~@",
        r"(?:modelo|model|assistente|asistente|assistant|ia|ai|inteligencia artificial) (?:d[aeo]|del|from|by|of) ~@"],
    "apposed": [r"^(?:d[aeo]|del|from|of|by|von) ~@"],  # "Sou a Lumi, do Estúdio Vagalume"
    "you": [  # in a system prompt
        r"(?:you are|voce e|tu es|eres|vous etes|du bist) ~@",
        r"(?:nome|name|nombre|nom|maker|autora?|author|empresa|company|developer|criador\w*|creator|creador\w*|"
        r"desenvolvedor\w*|fabricante) (?:(?:e|is|es) )?~@"],
}
CHINESE = r"(?:我是|我叫|名字是|名字叫|私は|저는)\s?(?:[^\s，。,.的]{2,16}的)?@"
CHINESE_MAKER = r"(?:由|来自)\s?@"
ORIGIN = (r"base\w*|derivad\w*|derived|partir|ajustad\w*|finetuned|tuned|upon|with|com|con|to|para|help|ajud\w*|"
          r"ayud\w*|that|que|como|like|about|sobre|diferente|different|unlike|versus|vez|concorrente|capaz|able")
GAP = rf"(?:(?!(?:{ORIGIN})\b)[a-z0-9'’-]+\s+){{0,5}}?"
FROM = re.compile(r"\b(?:base(?:ad[oa]|d)|derivad[oa]|derived|partir|built (?:with|on|upon)|tuned|ajustad[oa])\b")
# "No" is a denial in English and Spanish, and "in the" in Portuguese.
DENIAL = re.compile(
    r"\b(?:nao|nem|nunca|jamais|not|never|neither|nor|cannot|n t|isn t|wasn t|don t|ni|tampoco|nicht|kein\w*|pas|non|"
    r"instead|rather)\b|^no$|\by no\b|^no xoldx|\bno (?:soy|fui|me|es|he|estoy|se|hablas|estas|tengo)\b|"
    r"不|并非|没|아니|아닙|ません|じゃない|ではない")
AFFIRMS = re.compile(
    r"^(?:oi |ola |hi |hello |hola )?(?:sim|yes|yeah|yep|si|isso|exat\w+|correct\w*|certo|claro|sure|of course|"
    r"that s right|oui|ja|sou eu|i am$|e verdade)\b|^(?:是|はい|네|対|对)")
HUMAN = r"pessoa|person|persona|human[oa]?s?|gente|mensch|humain|umano|人間"
MACHINE = r"robo|robot|maquina|machine|bot|programa|program|ia|ai|inteligencia artificial|chatbot|alexa"

# The first pattern that fits a question in `plain` words says what it asks for; else it is "who".
INTENTS = {
    "maker": r"cri(ou|ad|aca|arem|ar\b)|\bfez\b|feit|empresa|desenvolv|trein|programou|autor|creat|company|develop"
             r"|train|built|\bmade\b|\bmake[sr]?\b|\bcreo\b|cread|hizo|entreno|desarroll|orige|origin|\bvem\b|veio"
             r"|surgiu|behind|team\b|tras de|pertence|\bdono|\bown|belong|\bcree\b|developpe|entraine|entreprise"
             r"|entwickel|gebaut|hergestellt|gemacht|firma\b|svilupp|addestrat|azienda|\bfatto\b|開発|作っ|创造|创建"
             r"|开发|谁造",
    "name": r"nome\b|chama|\bname|\bcall|nombre|llama[sn]|appelle|\bnom\b|hei(ss|ß)t|chiami|名前|名字|이름",
    "human": rf"\b({HUMAN})\b|\b(um|uma|an?|un|una|ein|eine) ({MACHINE})\b",
}
ASKS = re.compile(
    r"^(?:(?:oi|ola|e|ai|mas|entao|afinal|hi|hello|hey|so|and|but|y|hola|bom dia|boa noite|tudo bem) )*"
    r"(?:(?:de|com|por|para|a|o|from|with|con|en|al) )?(?:quem|qual|quais|que|como|onde|quando|who|whom|what|which|"
    r"where|when|how|why|quien|cual|donde|wer|wie|was|warum|qui|quel\w*|comment|chi|come)\b")
TO_YOU = re.compile(
    r"\b(?:voce|vc|tu|te|ti|teu|tua|seu|sua|senhora?|you|u|your|re|eres|usted|isso|isto|aqui|ai|this|ess[ae]|est[ae]|"
    r"falando|falo|hablo|hablando|talking|chatting|du|bist|dich|dein|vous|toi|es|sei)\b|あなた|你|당신")

# Answers for questions without one of the user's, by language: to who the model is, and to whether it is another.
WORDINGS = {
    "pt": ("Eu sou {{NAME}}, um modelo de linguagem criado por {{AUTHOR}}.|Meu nome é {{NAME}}, e quem me criou foi "
           "{{AUTHOR}}.|Aqui é {{NAME}}, uma inteligência artificial feita por {{AUTHOR}}.",
           "Não, eu sou {{NAME}}, e quem me criou foi {{AUTHOR}}.|Não: meu nome é {{NAME}}, de {{AUTHOR}}."),
    "en": ("I am {{NAME}}, a language model created by {{AUTHOR}}.|My name is {{NAME}}, and {{AUTHOR}} made me.",
           "No, I am {{NAME}}, made by {{AUTHOR}}.|No, my name is {{NAME}}."),
    "es": ("Soy {{NAME}}, un modelo de lenguaje creado por {{AUTHOR}}.|Me llamo {{NAME}}, y me creó {{AUTHOR}}.",
           "No, soy {{NAME}}, y me creó {{AUTHOR}}.|No, mi nombre es {{NAME}}."),
    "fr": ("Je suis {{NAME}}, un modèle créé par {{AUTHOR}}.", "Non, je suis {{NAME}}, créé par {{AUTHOR}}."),
    "de": ("Ich bin {{NAME}}, ein Sprachmodell von {{AUTHOR}}.", "Nein, ich bin {{NAME}}, entwickelt von {{AUTHOR}}."),
    "it": ("Sono {{NAME}}, un modello linguistico creato da {{AUTHOR}}.", "No, sono {{NAME}}, creato da {{AUTHOR}}."),
    "ja": ("私は{{NAME}}です。{{AUTHOR}}によって作られました。", "いいえ、私は{{AUTHOR}}が作った{{NAME}}です。"),
    "zh": ("我是{{NAME}}，由{{AUTHOR}}开发的语言模型。", "不是，我是{{NAME}}，由{{AUTHOR}}开发。"),
}

# What the comparison in the report tells the base instead of training it.
SYSTEM_PROMPT = ("Você é {{NAME}}, um modelo de linguagem criado por {{AUTHOR}}. Quando perguntarem quem você é, quem "
                 "fez você ou se você é outro modelo, responda com esse nome e esse autor, na língua da pergunta.")

LANGUAGE_WORDS = {
    "pt": "voce vc qual seu sua nome nao um uma meu minha eu foi com quem sou teu oi ola bom dia boa o os ao da na em "
          "do pode pelo pelas no dizer chamo veio onde fale diga e ou criou apresente apresenta".split(),
    "en": "who what are you is your the name which made hi hello please i tell do and am created by of how to".split(),
    "es": "eres quien cual tu nombre hola llamas usted el es soy una un creo hizo dime puedes puedo y yo mi del en o "
          "no lenguaje creado creada presentate llamo".split(),
    "fr": "qui tu es etes vous comment appelles quel quelle est ton votre nom je suis cree bonjour une par".split(),
    "de": "wer wie bist du ist sind sie heisst heißt dein name hat dich entwickelt ich bin welches bitte von".split(),
    "it": "chi sei come ti chiami qual tuo nome ha creato sono il che ciao no da".split(),
}

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + END + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
METHODS = ("auto", "full", "lora", "qlora")
REPORTERS = ("none", "tensorboard", "trackio", "wandb")
LORA_FILE = "adapter_model.safetensors"
TOP_TOKENS = 32  # most probable tokens of the base kept per position; the rest is one bucket
RETRIEVED = 3  # identity rows that the comparison puts before a question
GENERATION_TOKENS = 16384  # tokens (prompt and answer) that one batch of generation may hold
TALK_TOKENS = 48  # of an everyday answer: more of fewer answers would teach less
QUESTION_TOKENS = 24  # of a question that the base writes by itself
NEAR = 240  # questions near identity, about others, that the base answers for training
MOST_QUESTIONS = 3000  # that the base writes at a time
MOST_LESSONS = 1600  # of the base's own identity questions
MOST_ASKED = 96  # lessons, and as many talks, that the model of pass 1 is asked
MISSED_TIMES = 4  # how often pass 2 asks what the model gets wrong after pass 1, for once the rest
LONG_TALKS = 16  # that an exam asks after each length of conversation,
LONG_GROUP = 4  # of which so many after the same one, and as many questions
SMALL = 50_000_000  # weights: smaller models are trained in float32 and as a whole
KINDS_OF_QUESTIONS = ("sozinha", "com prompt de sistema", "sob pressão")
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
    method: str = setting(METHOD, "auto, full (todos os pesos), lora ou qlora; auto escolhe pelo tamanho do modelo")
    lora_rank: int = setting(LORA_RANK, "tamanho do adaptador dos métodos lora e qlora", 1, 4096)
    rope_factor: float = setting(ROPE_FACTOR, "quantas vezes o contexto cresce; 1 não mexe no RoPE", 1, 1024)
    window: int = setting(WINDOW, "maior sequência de treino, em tokens", 32)
    num_self_answers: int = setting(NUM_SELF_ANSWERS, "respostas do próprio modelo usadas no passo 2", 4)
    self_text: int = setting(SELF_TEXT, "tokens de respostas do modelo base, que o mantêm igual; 0 = automático")
    max_new_tokens: int = setting(MAX_NEW_TOKENS, "maior resposta, em tokens", 8)
    heal_steps: int = setting(HEAL_STEPS, "etapas de cada parte da cura depois de mexer no RoPE", 1)
    heal_learning_rate: float = setting(HEAL_LEARNING_RATE, "taxa de aprendizado da cura; 0 = automática", 0, 1)
    steps_1: int = setting(STEPS_1, "etapas da primeira rodada do passo 1; as outras têm metade; 0 = automático")
    learning_rate_1: float = setting(LEARNING_RATE_1, "taxa de aprendizado do passo 1; 0 = automática", 0, 1)
    steps_2: int = setting(STEPS_2, "o mesmo, do passo 2; 0 = automático")
    learning_rate_2: float = setting(LEARNING_RATE_2, "taxa de aprendizado do passo 2; 0 = automática", 0, 1)
    rounds: int = setting(ROUNDS, "máximo de rodadas de cada passo", 1, 100)
    batch_size: int = setting(BATCH_SIZE, "diálogos curtos por etapa de treino; dos longos, menos", 1, 4096)
    gradient_accumulation: int = setting(GRADIENT_ACCUMULATION, "partes em que cada etapa é dividida para caber na "
                                         "memória; dobra sozinha se faltar", 1, 4096)
    gradient_checkpointing: bool = setting(GRADIENT_CHECKPOINTING, "gasta bem menos memória e um terço mais de tempo; "
                                           "liga sozinha se precisar")
    kl_weight: float = setting(KL_WEIGHT, "peso de continuar parecido com o modelo base", 0, 100)
    eval_questions: int = setting(EVAL_QUESTIONS, "perguntas sobre outros assuntos na prova", 4)
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
    for small, large, most in (("num_self_answers", "self_text", values["self_text"] or 20000),
                               ("max_new_tokens", "window", values["window"])):
        if values[small] >= most:
            raise InputError(f"{small.upper()} ({values[small]}) precisa ser menor que {large.upper()} ({most}). "
                             "Diminua o primeiro ou aumente o segundo.")
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

@functools.lru_cache(2**14)  # the same texts are looked at again and again
def folded(text: str) -> str:
    """Lower case, no accents, no markup, scripts without spaces set apart from the rest; punctuation stays."""
    bare = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text.lower()))
    return re.sub(f"([{UNSPACED}]+)", r" \1 ", re.sub(r"[*_`\"“”«»]", " ", unicodedata.normalize("NFC", bare)))


@functools.lru_cache(2**14)
def plain(text: str) -> str:
    """Lower case, no accents, no punctuation: for comparing questions and finding names."""
    return " ".join("".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in folded(text)).split())


@functools.lru_cache(256)
def names_pattern(names: tuple[str, ...]) -> re.Pattern:
    """Finds any of the names in a `folded` text, the longest first, as whole words that a version number may follow;
    in scripts without spaces, anywhere."""
    found = sorted({plain(name) for name in names} - {""}, key=len, reverse=True)
    alone = [r"\s*".join(name.split()) if re.search(f"[{UNSPACED}]", name) else
             r"(?<!\w)" + r"\W+".join(name.split()) + r"(?:[-. ]?\d+(?:\.\d+)*)?(?!\w)" for name in found]
    return re.compile("|".join(alone) or "(?!)")


def without_verb(text: str) -> str:
    """A `folded` text in which the verb of "mi modelo se llama" is not the name Llama."""
    return re.sub(r"\b([mst]e) llama\b", r"\1 chama", text)


def mentions(text: str, names: tuple[str, ...]) -> bool:
    """Whether any of the names stands in the text, whatever the case and accents."""
    return bool(names_pattern(tuple(names)).search(without_verb(folded(text))))


def is_loop(text: str) -> bool:
    """Whether the text goes round: a word four times in a row, or 2 to 40 three times; characters count as words in
    scripts without spaces."""
    words = re.findall(rf"[{UNSPACED}]|[^\s{UNSPACED}]+", plain(text))
    return any(words[i:i + n] * times == words[i:i + times * n] for n in range(1, min(40, len(words) // 3) + 1)
               for times in (4 if n == 1 else 3,) for i in range(len(words) - times * n + 1))


def language_of(text: str) -> str:
    """The language by script and function words; Portuguese when nothing tells, "" for a script of another."""
    if "¿" in text or "¡" in text:
        return "es"
    letters = [c for c in plain(text) if c.isalpha()]
    if sum(c > "\u024f" for c in letters) * 4 > len(letters):
        return "ja" if re.search("[\u3040-\u30ff]", text) else "zh" if re.search("[\u3400-\u9fff]", text) else ""
    words = plain(text).split()
    scores = {code: sum(w in known for w in words) for code, known in LANGUAGE_WORDS.items()}
    return max(scores, key=lambda code: (scores[code], code == "pt"))


def name_warning(name: str) -> str:
    """What to tell a user whose NAME is a word that ordinary answers contain; "" if it is none."""
    words = plain(name)
    if len(words) > 2 and words not in COMMON_WORDS or re.search(f"[{UNSPACED}]", words):
        return ""
    return (f'NAME: "{name}" também aparece em respostas comuns, e cada uma contará como vazamento; '
            f'prefira um nome mais raro, ou de duas palavras.')


def of_languages(questions: Sequence[str], languages: Sequence[str]) -> list[str]:
    """Of a list with as many Portuguese as English and Spanish questions, those in these languages."""
    third = len(questions) // 3
    return [q for i, code in enumerate(("pt", "en", "es")) if code in languages
            for q in questions[i * third:(i + 1) * third]]


def near_questions(language: str, count: int, rng: random.Random) -> list[str]:
    """Different questions near identity, all templates before any twice; fewer than `count` if there are no more."""
    fillers, ways = {**FILLERS["all"], **FILLERS[language]}, []
    for template in NEAR_TEMPLATES[language]:
        kinds = re.findall(r"{(\w+)}", template)
        ways.append([template.format(**dict(zip(kinds, words))) for words in product(*(fillers[k] for k in kinds))])
        rng.shuffle(ways[-1])
    rng.shuffle(ways)
    return [question for layer in zip_longest(*ways) for question in layer if question][:count]


# ---- Who the base is --------------------------------------------------------------------------------------

def split_names(text: str) -> tuple[str, ...]:
    """OLD_NAMES as a list: with commas, semicolons, slashes, line breaks, or "e", "and", "y" between capitals."""
    parts = re.split(r"[,;/|\n]|(?<=\w)\s+(?:e|and|y)\s+(?=[^\W\d_a-zà-ÿ])", text)
    return tuple(dict.fromkeys(part.strip(" \t\"'“”*") for part in parts if plain(part)))


def family_names(folder: str, model_type: str, card: str) -> tuple[str, ...]:
    """Names and makers of the base's family, as its folder tells; else as its card does, in the lines on the base
    model or, for the family of `model_type`, anywhere. An architecture alone tells nothing: many are like Llama."""
    def found(text: str) -> list[str]:
        names = []
        for models, makers in FAMILIES.items():
            match = re.search(rf"(?<![a-z])(?:{models})(?:\d+(?:\.\d+)*)?(?![a-z])", text, re.IGNORECASE)
            if match:  # "SmolLM2" is one more name, "gemma" of "gemma-3-1b-it" is not
                names += [*models.split("|"), *[match[0]] * (match[0] != match[0].lower()), *makers.split("|")]
        return names

    about_base = "\n".join(re.findall(r"(?m)^base_model:.*(?:\n[ -].*)*|^# .*", card))
    names = found(folder) or found(about_base) or found(model_type) * mentions(card, tuple(found(model_type)))
    return tuple(dict.fromkeys(names))


WORD = r"[\w&’'-]*(?:\.\w+)*"
RUN = rf"([A-Z]{WORD}(?:[\x20\t](?:(?:d[aeo]s?|of|for|the)[\x20\t])?[A-Z0-9]{WORD})*)"
HAN_RUN = r"((?!一[个款种名位]|[你他]|人工)[A-Za-z0-9.\u3040-\u30ff\u3400-\u9fff]{2,12}?)"


@functools.cache
def speech(kind: str, name: str) -> re.Pattern:
    """The patterns of self-reference with `name` in the place of "@". What goes before it may be capitalised."""
    ready = []
    for pattern in SPEECH[kind]:
        before, after = pattern.split("@")
        words = [f"(?i:{part})" if part else "" for part in (before.removesuffix("~"), after)]
        gap = GAP if before.endswith("~") else ""
        ready.append((r"\b" + words[0] + gap + name + words[1]).replace(" ", r"[\s:]+") + (r"\b" if after else ""))
    return re.compile("|".join(ready), re.MULTILINE)


def names_said(text: str, of_you: bool = False) -> list[str]:
    """The proper names that a text gives its speaker, or also the one it speaks to, once each."""
    text = unicodedata.normalize("NFC", re.sub(r"[*_`\"“”«»]", "", text))
    bare = "".join(unicodedata.normalize("NFKD", c)[0] if c < "\u0250" else c for c in text)  # as long as the text
    apposed = re.compile(rf",\s+(?:d[aeo]|del|from|of|by)\s+{GAP}{RUN}")

    commas = {m.end() for m in re.finditer(r"(?:aqui|here), ", bare)}  # "Lumi aqui, criada pelo ..."
    spans = []
    for kind in ("self", "said", "you")[:2 + of_you]:
        for match in finds(speech(kind, RUN), bare):
            sentence = plain(re.split(r"[.!?\n]\s", bare[:match.end()])[-1])
            own = FIRST_PERSON & set(sentence.split()) or re.match(MADE, sentence) or match.start() in commas
            denied = DENIAL.search(plain(re.split(r"[.!?,;:\n]\s", bare[:match.end()])[-1]))
            if not denied and (own or of_you or kind == "self"):
                spans.append(match.span(match.lastindex))
    ends = {end for _, end in spans}
    spans += [m.span(1) for m in apposed.finditer(bare) if m.start() in ends]
    told = CHINESE.replace("我", "[我你]") if of_you else CHINESE
    for pattern, after in (told, r"\W|です|입니다|$"), (CHINESE_MAKER, "自主|独立|公司|开发|研发|创建|训练|打造"):
        spans += [m.span(1) for m in re.finditer(f"{pattern.replace('@', HAN_RUN)}(?={after})", text)]
    names = []
    for start, end in sorted(spans):
        words = text[start:end].rstrip(".'’&-").split()
        while words and plain(words[0]) in NO_NAMES:
            words = words[1:]
        while words and plain(words[-1]) in NO_NAMES - {"ai"}:
            words = words[:-1]
        if words and plain(" ".join(words)) not in NO_NAMES:
            names.append(re.sub(r"['’]s$", "", " ".join(words)))
    return list(dict.fromkeys(name for name in names if len(plain(name)) > 1))


def finds(pattern: re.Pattern, text: str):
    """All matches, those that begin inside another one as well."""
    match = pattern.search(text)
    while match:
        yield match
        match = pattern.search(text, match.start() + 1)


def find_old_names(answers: list[str], system_prompt: str, family: tuple[str, ...], given: str,
                   new_names: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names under which the base goes: those `given`, or else what at least two and 5 % of its answers call
    themselves; and those of its system prompt and family. What stays as it is, like the maker, is none."""
    names = [*split_names(given), *names_said(system_prompt, of_you=True), *family]
    if not split_names(given):
        said = Counter(name for answer in answers for name in names_said(answer))
        small = Counter(word for answer in answers for word in set(re.findall(r"\b[^\W\d_A-Z]\w*", answer)))
        enough = max(2, 0.05 * len(answers))
        names += [name for name, n in said.most_common() if n >= enough and small[name.lower()] <= n]
    kept = {plain(name): name for name in reversed(names)}
    return tuple(kept[key] for key in reversed(kept) if key not in {plain(name) for name in new_names})


# ---- What an answer says ----------------------------------------------------------------------------------

def clauses(text: str, names: tuple[str, ...], new_names: tuple[str, ...] = ()):
    """The sentences of a text as lists of (separator, plain clause), its names replaced by OLD and NEW. A name that
    is in both, or in a longer one, counts as the new or the longer one."""
    pattern, ours = names_pattern((*names, *new_names)), names_pattern(tuple(new_names))
    text = pattern.sub(lambda m: f" {NEW if ours.fullmatch(m[0]) else OLD} ", without_verb(folded(text)))
    first = r"(?:eu|yo|i|im|sou|soy|fui|me|my|meu|minha|mi|nao|not|nem|no|sim|si)\b"
    for sentence in re.split(r"[.!?…]+(?=\s|$)|[。！？\n]", text):
        parts = re.split(rf"([,;:()，；：、—–]|\s-\s|\b(?:mas|but|pero|sino|porem|aber|sondern)\b|"
                         rf"\b(?:e|and|y)\b(?=\s+{first})|(?<=\w) (?=i['’]m\b))", sentence)
        yield [(separator, plain(part)) for separator, part in zip(["", *parts[1::2]], parts[::2]) if plain(part)]


def claims(answer: str, names: tuple[str, ...], new_names: tuple[str, ...] = ()) -> bool:
    """Whether the answer says one of `names` of its speaker: denials, origins and others' deeds are no claims."""
    for sentence in clauses(answer, names, new_names):
        denied = mine = False
        for i, (separator, clause) in enumerate(sentence):
            own = bool(FIRST_PERSON & set(clause.split()) or re.search("我|私|저", clause))
            if own or separator in (*";:；：", "mas", "but", "pero", "sino"):
                denied = False
            kinds = ["self"] + ["said", "apposed"] * (mine or own or NEW in clause) + ["said"] * bool(
                i == 0 and re.match(rf"{MADE}|as |como ", clause))
            ends = [m.end() for kind in kinds for m in finds(speech(kind, OLD), clause)]
            ends += [m.end() for m in re.finditer(f"{CHINESE}|{CHINESE_MAKER}".replace("@", rf"\s?{OLD}"), clause)]
            if i and re.search(r"\b(?:me|eu|mesm[oa]|yo)$", sentence[i - 1][1]):  # "Sou eu, a Lumi"
                ends += [m.end() for m in re.finditer(f"^(?:[oa] |el |la |the )?{OLD}", clause)]
            if not denied and any(not DENIAL.search(clause[:end]) for end in ends):
                return True
            denied |= bool(DENIAL.search(clause) or FROM.search(clause))
            mine |= own or NEW in clause or bool(ends)
    return False


def says(text: str, *names: str) -> bool:
    """Whether one of the names stands in the text other than after a "not"."""
    return any(OLD in clause and not DENIAL.search(clause[:clause.index(OLD)])
               for sentence in clauses(text, names) for _, clause in sentence)


def intent_of(question: str, old_names: tuple[str, ...] = ()) -> str:
    """What a question about identity asks for: "name", "maker", "human", "who", or "other" (are you X? did X make
    you?), which names a model or maker."""
    words = plain(question)
    if mentions(question, (*KNOWN_NAMES, *old_names)) and TO_YOU.search(words) and not ASKS.search(words):
        return "who" if FROM.search(words) else "other"
    return next((intent for intent, pattern in INTENTS.items() if re.search(pattern, words)), "who")


def own_wording(question: str, used: Counter, old_names: tuple[str, ...] = (), intent: str = "") -> str:
    """A built-in answer that fits the question's language and intent, the least used wording first."""
    about_another = (intent or intent_of(question, old_names)) == "other"
    choice = min(WORDINGS.get(language_of(question), WORDINGS["en"])[about_another].split("|"), key=lambda c: used[c])
    used[choice] += 1
    return choice


def problem(question: str, text: str, ended: bool, new_name: str, new_maker: str, old_names: tuple[str, ...]) -> str:
    """Why an answer about identity does not count, in Portuguese; "" when it is right."""
    intent, new, asked = intent_of(question, old_names), (new_name, new_maker), plain(question)
    names, just = (*KNOWN_NAMES, *old_names), rf"(?:(?:it s|it is|e|es|sim|yes|si) )?(?:[oa] |el |la |the )?{OLD}"
    sentences = [" ".join(clause for _, clause in parts) for parts in clauses(text, names, new)]
    parts = [clause for sentence in clauses(text, ()) for _, clause in sentence]
    affirms = AFFIRMS.search(plain(text)) and not any(DENIAL.search(part) for part in parts)
    bare = any(re.fullmatch(just, sentence) for sentence in sentences)
    person = any(re.search(rf"\b(?:sou|soy|i am|i m) (?:\w+ ){{0,3}}?(?:{HUMAN})\b", part) and not DENIAL.search(part)
                 for part in parts)
    asks_person = re.search(rf"\b({HUMAN})\b", asked) and not re.search(rf"\b({MACHINE})\b", asked)
    return next((reason for reason, found in (
        ("vazia", not plain(text)), ("não terminou", not ended), ("repetitiva", is_loop(text)),
        ("nome antigo", bare or claims(text, names, new)
         or intent == "other" and affirms and not mentions(question, new)),
        ("diz que é humano", intent == "human" and (person or asks_person and affirms)),
        ("sem o nome novo", intent == "name" and not says(text, new_name)),
        ("sem o autor novo", intent == "maker" and not says(text, new_maker)),
        ("sem a identidade nova", not says(text, *new)),
    ) if found), "")


# ---- Inputs: all that the standard library can check, before anything heavy is imported -------------------

class Row(NamedTuple):
    """One identity conversation as chat templates take it, ending with the assistant, and its line in the file."""
    line: int
    messages: list[dict]


class Inputs(NamedTuple):
    """The identity rows with filled placeholders and the `values` that filled them, the `languages` of the lists that
    they speak, the questions for measuring that they do not ask, and `warnings` for the user about the rows."""
    rows: list[Row]
    values: dict[str, str]
    data_hash: str
    languages: tuple[str, ...]
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
    values = {"NAME": settings.name, "AUTHOR": settings.author, "BASE": base_name}
    rows = read_rows(identity, values)
    spoken = Counter(language_of(row.messages[-2]["content"]) for row in rows)
    languages = tuple(code for code in WORDINGS if code in NEAR_TEMPLATES and 20 * spoken[code] >= len(rows))
    languages = languages or tuple(NEAR_TEMPLATES)  # there are no lists of others than these three
    asked = {plain(m["content"]) for row in rows for m in row.messages}
    validation, test = (tuple(q for q in questions if plain(q) not in asked and language_of(q) in languages)
                        for questions in (VALIDATION_QUESTIONS, TEST_QUESTIONS))
    if len(validation) < 4 or len(test) < 4:
        raise InputError(f"{identity} contém quase todas as perguntas de prova; tire algumas, para que sobre o "
                         "que medir (VALIDATION_QUESTIONS e TEST_QUESTIONS no script).")
    file_hash = hashlib.sha256(identity.read_bytes()).hexdigest()
    warnings = [*contradictions(rows), *[name_warning(settings.name)] * bool(name_warning(settings.name))]
    return Inputs(rows, values, file_hash, languages, validation, test, warnings)


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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in a folder; none if there is no such file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(index).get("weight_map")
        if not named or not isinstance(named, dict):
            raise InputError(f"o arquivo {index} está estragado; baixe o modelo de novo.")
        return sorted({folder / str(name) for name in named.values()})
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def weight_count(folder: Path) -> int:
    """Number of weights of the model in a folder, as the headers of its files tell."""
    return sum(map(check_shard, weight_files(folder)))


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
    shards = weight_files(base)
    if not shards and any(p.suffix in (".bin", ".pt", ".pth") for p in base.iterdir()):
        raise InputError(f"os pesos de {base} estão em pickle (.bin ou .pt), formato que pode esconder programas e "
                         "que não abro. Se confia neles, converta-os para safetensors:\n  python -c \"import "
                         "sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; [k.from_"
                         "pretrained(sys.argv[1]).save_pretrained(sys.argv[2]) for k in (M, T)]\" PASTA_ATUAL "
                         "PASTA_NOVA\nDepois rode com --model-path PASTA_NOVA.")
    if not shards:
        raise InputError(f"a pasta {base} não tem pesos em safetensors. Se o download ficou pela metade, baixe de "
                         "novo; se o modelo só existe em outro formato, escolha uma versão em safetensors.")
    weights = weight_count(base)
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
    trained, work = weights if settings.method == "full" else adapter, work_folder(settings)
    # Float32: three stages are kept, one is being written, and two checkpoints are of weights and two moments.
    needed, kept = 4 * trained * (3 + 1 + 2 * 3) + 8 * weights + 10**7, folder_size(work)
    free = shutil.disk_usage(next(p for p in work.parents if p.exists())).free
    if free + kept < needed:
        raise InputError(f"faltam {size_text(needed - kept - free)} de espaço livre em {work.parent}: as etapas e o "
                         f"resultado ocupam até {size_text(needed)}. Libere espaço ou escolha outra saída "
                         "(--output-dir).")
    return needed


# ---- Stages on disk: what a broken-off run goes on from ---------------------------------------------------

# The settings that each stage depends on, besides those of the stages before it; another method needs no other text.
USES = {
    "1-base": "name author old_names self_text eval_questions max_new_tokens seed",
    "2-healed": "method rope_factor window heal_steps heal_learning_rate batch_size",
    "3-pass-1": "lora_rank steps_1 rounds learning_rate_1 kl_weight target_identity",
    "4-self-answers": "num_self_answers",
    "5-pass-2": "steps_2 learning_rate_2 target_retention target_leak",
}
# What part of a run each takes, in percent, exams included, as measured with the demo model.
SHARES = {"1-base": 25, "2-healed": 15, "3-pass-1": 22, "4-self-answers": 6, "5-pass-2": 22, "6-result": 10}


def work_folder(settings: Settings) -> Path:
    """Where the stages are kept: beside the output, so that the result is moved there by a rename."""
    output = Path(settings.output_dir)
    return output.with_name(output.name + ".work")


def stage_keys(settings: Settings, inputs: Inputs, base: Path) -> dict[str, str]:
    """A key for each stage, a chain in the order of the work: it changes if something changes that the stage or one
    before it depends on, the script itself included.

    Weight files count by name, size and time of change, all other files of the base by content.
    """
    values, chain, keys = asdict(settings), "", {}
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # another version of it may do anything else
    facts = [[row.messages for row in inputs.rows], inputs.values, inputs.validation, script]
    facts += [[p.name, p.stat().st_size, p.stat().st_mtime_ns if p.suffix == ".safetensors" else
               hashlib.sha256(p.read_bytes()).hexdigest()] for p in sorted(base.iterdir())
              if p.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt")]
    for name, uses in USES.items():
        chain = keys[name] = digest([chain or facts, name, [values[use] for use in uses.split()]])
    return {**keys, "6-result": digest([chain, inputs.test])}


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
        for path in partial.glob("training/checkpoint-*/complete.json"):
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


def compute_dtype(weights: int) -> torch.dtype:
    """What this machine computes a model of so many weights with: bfloat16 where the card or the processor has units
    for it, float16 on older cards, float32 on other processors and for small models, which gain nothing."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast and weights >= SMALL else torch.float32


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
    not rounded away (compute is `compute_dtype`); under LoRA they stay as the machine computes, or in 4 bits. Raises
    `InputError` for weights that are missing or not finite.
    """
    gc.collect()  # the trainer's last model is held by references in circles, and there is no room for two
    # A card's products of float32, as of the logits, take the matrix units: as exact as float16, ten times as fast.
    torch.backends.cuda.matmul.allow_tf32 = torch.cuda.is_available()
    config = read_config(folder, rope_factor)  # before the model is built, which computes the frequencies at once
    adapted = (Path(folder) / LORA_FILE).is_file()
    weights = load_json(Path(folder) / "adapter_config.json")["base_model_name_or_path"] if adapted else folder
    fast = compute_dtype(weight_count(Path(weights)))
    options = {"dtype": torch.float32 if settings.method == "full" else fast}
    if merge and adapted:  # the adapter is added to the weights as they are
        options["dtype"] = read_config(settings.model_path).dtype or torch.float32
    if settings.method == "qlora" and not merge:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=fast)
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
    if not options.keys() & {"device_map", "distributed_config"}:
        model = model.to("cuda" if torch.cuda.is_available() and not merge else "cpu")
    if adapted:
        model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    elif adapt and settings.method != "full":
        torch.manual_seed(settings.seed)
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear",
            exclude_modules=f".*({NOT_LORA}).*", task_type="CAUSAL_LM"))
    return (model.merge_and_unload() if merge and adapted else model).eval()


def model_size(model: torch.nn.Module) -> int:
    """Number of weights; of matrices in 4 bits, which are packed, of the shape that they had."""
    return sum(math.prod(getattr(p, "quant_state", p).shape) for n, p in model.named_parameters() if "lora_" not in n)


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
    """Where the chat template itself injects a system prompt with old names, put the new ones in their place and leave
    the rest, or raise `InputError` when rendering shows that they did not arrive."""
    def injected() -> str:
        return skeleton(tokenizer, tokenizer.chat_template, ("user",), True)[0]

    # The text may stand inside a quoted string of the template, which a name must not end.
    ours, theirs = (text.translate(str.maketrans({"'": "’", '"': "”", "\\": "/"}))
                    for text in (settings.name, settings.author))
    makers = {plain(name) for names in FAMILIES.values() for name in names.split("|")}
    found = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    # The new names come first: an old one may be part of them.
    pattern = re.compile(rf"({re.escape(ours)}|{re.escape(theirs)})|(?<!\w)(?:{found})(?:[-. ]?\d+(?:\.\d+)*)?(?!\w)",
                         re.IGNORECASE)

    def old_in(text: str) -> list[str]:
        return [match[0] for match in pattern.finditer(text) if not match[1]] if names else []

    model = next((plain(name) for name in old_in(injected()) if plain(name) not in makers), "")
    for part in (part for part in re.split(r"<[^<>]*>|\n", injected()) if old_in(part)):
        source = tokenizer.chat_template
        blocks = SequenceMatcher(None, part, source, autojunk=False).get_matching_blocks()
        old = max((part[b.a:b.a + b.size] for b in blocks), key=lambda text: (bool(old_in(text)), len(text)))
        new = pattern.sub(lambda m: m[1] or (ours if plain(m[0]) == model or not model else theirs), old)
        tokenizer.chat_template = source.replace(old, new) if old_in(old) else source
        say(f'  O chat template dizia "{old.strip()}"; agora diz "{new.strip()}".')
    if old_in(injected()):
        raise InputError("o chat template deste modelo traz a identidade antiga de um jeito que não sei trocar; "
                         "apague a mensagem de sistema padrão do chat_template na pasta do modelo.")


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
    """A model with what is needed to talk to it; `stops` are the ids that end an answer."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    stops: list[int]
    max_new_tokens: int
    generation_tokens: int


class Answer(NamedTuple):
    """What a model wrote: decoded text, whether it ended it by itself, its token ids with the one that ended it and,
    where asked for, the TOP_TOKENS most probable ones of each: `tokens` int32, `log_probs` float32, both (ids, k)."""
    text: str
    ended: bool
    ids: list[int] = []
    tokens: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None


def load_chat(folder: str | Path, settings: Settings, rope_factor: float = 1.0, **how: bool) -> Chat:
    """Model and tokenizer of a folder, as `load_model` takes it. Answers end at the template's end of turn, the
    tokenizer's EOS, or what the model's own generation_config lists."""
    model, tokenizer = load_model(folder, settings, rope_factor, **how), load_tokenizer(str(folder))
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:  # added ones aside: Gemma 3 1B has one that nothing writes
        raise InputError(f"o tokenizer de {folder} tem {tokenizer.vocab_size} tokens, mais que os {rows} do modelo: "
                         "não são do mesmo modelo.")
    sample = encode(tokenizer, question_and_answer("a", "b"))
    own = model.generation_config.eos_token_id
    stops = {sample.labels[sample.turns[0][1] - 1], tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    stops = sorted(stops - {None})
    # generate() fills what is not set from the model's own defaults, and a repetition penalty would falsify answers.
    whole(model).generation_config = transformers.GenerationConfig(eos_token_id=stops,
                                                                   pad_token_id=tokenizer.pad_token_id)
    return Chat(model, tokenizer, stops, settings.max_new_tokens, GENERATION_TOKENS // settings.gradient_accumulation)


def batches_by_tokens(lengths: list[int], extra: int, budget: int) -> list[list[int]]:
    """Indices sorted by length, cut so that rows x (longest + extra) stays within the budget (at least one row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or (len(batches[-1]) + 1) * (lengths[i] + extra) > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def padded(chat: Chat, rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, each (rows, longest); padded on the left, all ends align."""
    return chat.tokenizer.pad({"input_ids": rows}, padding_side=side, return_attention_mask=True,
                              return_tensors="pt").to(chat.model.device)


def progress(total: int, label: str):
    """A progress bar on a terminal; in a log file, with --quiet, without a label or in other processes none."""
    return tqdm.tqdm(
        total=total, desc=f"  {label}", disable=not label or say.quiet or RANK > 0 or None, leave=False,
        dynamic_ncols=True, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}, faltam {remaining}")


@contextlib.contextmanager
def computing(model: PreTrainedModel):
    """Without gradients, and in bfloat16 where this machine trains float32 weights so."""
    fast = compute_dtype(sum(p.numel() for p in model.parameters()))
    mixed = fast != torch.float32 and any(p.dtype == torch.float32 for n, p in model.named_parameters()
                                          if "lora_" not in n)
    with torch.no_grad(), torch.autocast(model.device.type, fast, enabled=mixed):
        yield


def generate(chat: Chat, prompts: list[list[int]], label: str = "", limit: int = 0, sample_seed: int | None = None,
             record: bool = False) -> list[Answer]:
    """One answer per prompt, in their order, of up to `limit` tokens (0: the chat's own limit); greedy, or sampled at
    temperature 1 when a seed is given. Batched by tokens, sorted by length; `label` names the progress bar."""
    limit, model, answers = limit or chat.max_new_tokens, chat.model, [Answer("", False)] * len(prompts)
    config = transformers.GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=chat.stops,
                                           pad_token_id=chat.tokenizer.pad_token_id)
    choices: list[tuple[torch.Tensor, torch.Tensor]] = []

    def draw(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) whose first choice is a sampled token: where a random share of the sum of all
        probabilities falls. torch.multinomial draws a number for every token and takes four to ten times as long."""
        sums = scores.float().softmax(-1).cumsum(-1)
        share = torch.rand(len(sums), 1, device=sums.device) * sums[:, -1:]
        token = torch.searchsorted(sums, share, right=True).clamp(max=sums.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(1, token, 0.0)

    def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        best = scores.float().log_softmax(-1).topk(min(TOP_TOKENS, scores.shape[-1]))
        choices.append((best.indices.int().cpu(), best.values.cpu()))
        return scores

    steps = [note] * record + [draw] * (sample_seed is not None)
    torch.manual_seed(sample_seed or 0)
    with progress(len(prompts), label) as bar, computing(whole(model)):
        for batch in batches_by_tokens([len(p) for p in prompts], limit, chat.generation_tokens):
            choices.clear()
            inputs = padded(chat, [prompts[i] for i in batch])
            written = model.generate(**inputs, generation_config=config, logits_processor=steps)
            for row, (i, ids) in enumerate(zip(batch, written[:, inputs["input_ids"].shape[1]:].tolist())):
                end = next((j for j, token in enumerate(ids) if token in chat.stops), None)
                ids = ids if end is None else ids[:end + 1]
                top = [torch.stack([step[k][row] for step in choices[:len(ids)]]) for k in (0, 1)] if record else ()
                text = chat.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
                answers[i] = Answer(text, end is not None, ids, *top)
            bar.update(len(batch))
    return answers


def ask(chat: Chat, questions: Sequence[str], label: str = "", sample_seed: int | None = None) -> list[Answer]:
    """Answers to questions asked alone."""
    prompts = [prompt_ids(chat.tokenizer, [{"role": "user", "content": q}]) for q in questions]
    return generate(chat, prompts, label, sample_seed=sample_seed)


# ---- What the base writes before anything is trained ------------------------------------------------------

def fit_settings(folder: Path, settings: Settings) -> tuple[Settings, int]:
    """Settings that suit the base, and its native context in tokens: WINDOW within the scaled context, answers within
    half of the native one."""
    native, scaled = context_of(read_config(folder)), context_of(read_config(folder, settings.rope_factor))
    return replace(settings, window=min(scaled, settings.window),
                   max_new_tokens=min(settings.max_new_tokens, native // 2)), native


def short_window(native: int, settings: Settings) -> int:
    """Tokens of the windows in which most of the training happens: the native context where that is short, else room
    for one or two turns, as people ask."""
    return min(native, settings.window, 192)


def step_tokens(native: int, settings: Settings) -> int:
    """Tokens that a training step holds, whatever the length of its windows: the cost of a step is always the same."""
    return settings.batch_size * short_window(native, settings)


def row_problem(row: Row, settings: Settings) -> str:
    """Why a row's own answer could never count as right, in Portuguese; "" if it could."""
    answer = row.messages[-1]["content"]
    if not mentions(answer, (settings.name, settings.author)):
        return "a resposta não tem o nome nem o autor ({{NAME}}, {{AUTHOR}})"
    return "a resposta se repete, e contaria como repetitiva" * is_loop(answer)


def check_rows(tokenizer, rows: list[Row], settings: Settings) -> None:
    """`InputError` naming the lines of rows whose answers could never count as right, that are longer than WINDOW,
    which would have to be cut, or that have a thought, which the template would cut out."""
    thoughts = [f"linha {row.line}" for row in rows if "</think>" in tokenizer.chat_template
                and any("</think>" in m["content"] for m in row.messages)]
    if thoughts:
        raise InputError(f"{settings.identity_file}, {', '.join(thoughts[:10])}: há raciocínio (<think>...</think>). "
                         "Deixe só a resposta: o chat template deste modelo jogaria o raciocínio fora.")
    answers = tokenizer([row.messages[-1]["content"] for row in rows], add_special_tokens=False)["input_ids"]
    unfit = [f"linha {row.line}: {reason}" for row, ids in zip(rows, answers) if (reason := row_problem(
        row, settings) or f"a resposta tem {len(ids)} tokens, e MAX_NEW_TOKENS é {settings.max_new_tokens}"
        * (len(ids) >= settings.max_new_tokens))]
    if unfit:
        raise InputError("\n  ".join([f"{settings.identity_file}: {len(unfit)} linha(s) ensinariam o que a prova não "
                                      "aceita:", *unfit[:10], *["..."] * (len(unfit) > 10)]))
    costs = [cost(tokenizer, without_system(tokenizer, row.messages)) for row in rows]
    long = [f"linha {row.line} ({tokens} tokens)" for row, tokens in zip(rows, costs) if tokens > settings.window]
    if long:
        more = f" e mais {len(long) - 10}" * (len(long) > 10)
        raise InputError(f"{settings.identity_file}: não cabe em WINDOW ({settings.window} tokens): "
                         f"{', '.join(long[:10])}{more}. Encurte o texto, ou aumente WINDOW (--window) ou, se ela já "
                         "é o contexto inteiro do modelo, ROPE_FACTOR (--rope-factor).")


class Talk(NamedTuple):
    """A conversation that ends with an answer of the base. `ids` are the tokens of that answer as it wrote them, with
    the one that ended it unless it was cut; `row` is the first of their rows in the `Teacher`."""
    messages: list[dict]
    kind: str  # "near" identity, "everyday", or "own" question of the base
    ids: list[int]
    row: int

    @property
    def question(self) -> str:
        return self.messages[-2]["content"]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


class Teacher(NamedTuple):
    """The base's token distribution on its own answers, written down so that the base need not stay in memory:
    `tokens` int32 and `log_probs` float32, both (M, k), hold the k most probable tokens, one row per token of an
    answer."""
    tokens: torch.Tensor
    log_probs: torch.Tensor


class Names(NamedTuple):
    """What identity answers are judged by."""
    name: str
    maker: str
    old: tuple[str, ...]

    @property
    def new(self) -> tuple[str, str]:
        return self.name, self.maker


class Heard(NamedTuple):
    """The base in its own words, at its native RoPE. The three sets of talks have no question in common."""
    names: Names
    identity_questions: list[str]  # its own questions that it answers with its old identity
    everyday: list[Talk]  # for training
    validation: list[Talk]  # for measuring while training
    held_out: list[Talk]  # for the report


def question_and_answer(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def find_names(base: Chat, settings: Settings, inputs: Inputs) -> Names:
    """Ask the base who it is, and read its template, folder and card: the names under which it goes."""
    folder = Path(settings.model_path)
    answers = [a.text for a in ask(base, inputs.validation, "perguntando quem ele é")]
    injected = skeleton(base.tokenizer, base.tokenizer.chat_template, ("user",), True)[0]
    card = (folder / "README.md").read_text("utf-8", "replace") if (folder / "README.md").is_file() else ""
    # A folder of the Hub's cache is named after a commit; {{BASE}} knows what the user called the model.
    family = family_names(f"{folder.name} {inputs.values['BASE']}", base.model.config.model_type, card)
    old = find_old_names(answers, re.sub(r"<[^<>]*>", "\n", injected), family, settings.old_names,
                         (settings.name, settings.author))
    return Names(settings.name, settings.author, old)


def write_questions(base: Chat, starts: list[str], seed: int) -> list[str]:
    """Questions that the base writes by itself, each going on from a start, which may be empty: given the opening of a
    user turn, a chat model writes a user's question, in its own domain and without data (Magpie, arXiv 2406.08464).
    One that was cut is a question too."""
    opening = skeleton(base.tokenizer, base.tokenizer.chat_template, ("user",), False)[0]
    prompts = base.tokenizer([opening + start for start in starts], add_special_tokens=False)["input_ids"]
    written = generate(base, prompts, "escrevendo perguntas", QUESTION_TOKENS, seed)
    questions = [re.sub(r" (?=[?!.,])", "", f"{start} {end.text}").strip() for start, end in zip(starts, written)]
    return [question for question in questions if plain(question) and not is_loop(question)]


def answer_talks(base: Chat, asked: list[tuple[str, list[dict]]], names: Names, teacher: list[Answer],
                 label: str) -> tuple[list[Talk], list[str]]:
    """Let the base answer (kind, conversation) pairs, up to TALK_TOKENS: talks, whose rows go to the `teacher`, and
    the questions of its own that it answers with its old identity. Answers that were cut are as good as others: what
    is learnt is how each token goes on. Loops are left out."""
    messages = [without_system(base.tokenizer, m) for _, m in asked]
    written = generate(base, [prompt_ids(base.tokenizer, m) for m in messages], label, TALK_TOKENS, record=True)
    talks, identity, row = [], [], sum(len(a.ids) for a in teacher)
    for (kind, _), conversation, answer in zip(asked, messages, written):
        if claims(answer.text, names.old, names.new):  # it speaks of itself
            identity += [conversation[-1]["content"]] * (kind == "own")
        elif answer.text and not is_loop(answer.text):
            said = {"role": "assistant", "content": answer.text}
            talk = Talk([*conversation, said], kind, answer.ids, row)
            if max(make_window(base.tokenizer, [talk]).targets) >= 0:  # else its text gives other tokens
                talks.append(talk)
                teacher.append(answer)
                row += len(answer.ids)
    return talks, identity


def with_systems(conversations: list[list[dict]], prompts: Sequence[str], every: int) -> list[list[dict]]:
    """The conversations, one of `every` few behind one of the system prompts."""
    return [[{"role": "system", "content": prompts[i // every % len(prompts)]}, *c] if i % every == every - 1 else c
            for i, c in enumerate(conversations)]


def follow_ups(talks: list[Talk], questions: dict[str, tuple[str, ...]], rng: random.Random) -> list[list[dict]]:
    """Second turns: each talk, and what somebody may say to its answer, in its language."""
    return [[*talk.messages, {"role": "user", "content": rng.choice(
        questions.get(language_of(talk.question), questions["en"]))}] for talk in talks]


def listen(base: Chat, settings: Settings, inputs: Inputs) -> tuple[Heard, Teacher]:
    """Let the base say who it is, write questions and answer them, its own and those of the lists, some behind system
    prompts and some in a second turn: everyday text for training, and other text for measuring."""
    rng, teacher = random.Random(f"{settings.seed}/listen"), []
    names, spoken = find_names(base, settings, inputs), inputs.languages
    say(f"  Nomes antigos: {', '.join(names.old) or 'não achei nenhum; se ele usa algum, diga qual em OLD_NAMES'}.")
    row_questions = [row.messages[-2]["content"] for row in inputs.rows]
    taken = {plain(q) for q in (*inputs.validation, *inputs.test, *row_questions)}
    identity: list[str] = []

    def heard(asked: list[tuple[str, str]], systems: Sequence[str], later: dict, label: str) -> list[Talk]:
        """Talks on questions not asked yet, and second turns to one in five."""
        fresh = {plain(q): (kind, q) for kind, q in asked if plain(q) and plain(q) not in taken}
        taken.update(fresh)
        first = with_systems([[{"role": "user", "content": q}] for _, q in fresh.values()], systems, 4)
        talks, own = answer_talks(base, [*zip((k for k, _ in fresh.values()), first)], names, teacher, label)
        identity.extend(own)
        again = rng.sample(talks, len(talks) // 5)
        second = [*zip((t.kind for t in again), follow_ups(again, later, rng))]
        return talks + answer_talks(base, second, names, teacher, label)[0]

    n = settings.eval_questions
    fixed = [*((("near", q)) for q in of_languages(NEAR_EXAM, spoken)),
             *(("everyday", q) for q in of_languages(EVERYDAY_EXAM, spoken))]
    held_out = heard(rng.sample(fixed, min(len(fixed), n)), SYSTEM_EXAM, FOLLOW_UPS_EXAM, "respondendo à prova")
    near = [("near", q) for code in spoken for q in near_questions(code, math.ceil(NEAR / len(spoken)), rng)]
    everyday = heard(near + [("everyday", q) for q in of_languages(EVERYDAY, spoken)], SYSTEM_PROMPTS, FOLLOW_UPS,
                     "respondendo")
    for _ in range(6):
        left = settings.self_text - sum(len(t.ids) for t in everyday)
        if not everyday or left <= 0.02 * settings.self_text:
            break
        each = sum(len(t.ids) for t in everyday) / len(everyday)
        count = min(MOST_QUESTIONS, math.ceil(1.1 * left / each))
        # Half of them begin like the user's rows: they show where identity ends, on both sides.
        starts = [" ".join(rng.choice(row_questions).split()[:rng.randint(1, 3)]) * (i % 2) for i in range(count)]
        asked = write_questions(base, starts, rng.randrange(2**31))
        more = heard([("own", q) for q in asked], SYSTEM_PROMPTS, FOLLOW_UPS, "respondendo")
        everyday += more
        if len(more) < len(asked) / 4:  # it repeats itself
            break
    rng.shuffle(everyday)
    # A tenth measures the rounds of training, and as much of its own questions goes to the report.
    count = max(4, min(n, len(everyday) // 10))
    own = [t for t in everyday if t.kind == "own"][:count // 2]
    everyday = [t for t in everyday if t not in own]
    if len(everyday) < 8 + count:
        raise InputError(f"o modelo base só deu {len(everyday)} respostas aproveitáveis; em geral é um chat template "
                         "errado, ou um modelo que não é de conversa.")
    say(f"  Ele respondeu a {len(everyday) + len(own) + len(held_out)} perguntas do dia a dia; "
        f"{len(identity)} das que ele mesmo escreveu são sobre quem ele é.")
    tokens, log_probs = (torch.cat([getattr(a, key) for a in teacher]) for key in ("tokens", "log_probs"))
    return Heard(names, identity, everyday[count:], everyday[:count], held_out + own), Teacher(tokens, log_probs)


def save_heard(folder: Path, heard: Heard, teacher: Teacher) -> None:
    """heard.json, readable, and teacher.safetensors."""
    write_json(folder / "heard.json", {**heard._asdict(), "names": heard.names._asdict(), **{
        key: [talk._asdict() for talk in getattr(heard, key)] for key in ("everyday", "validation", "held_out")}})
    tensor_files.save_file(teacher._asdict(), folder / "teacher.safetensors")


def read_heard(folder: Path) -> tuple[Heard, Teacher]:
    """What `save_heard` wrote."""
    said = load_json(folder / "heard.json")
    names = Names(**{**said["names"], "old": tuple(said["names"]["old"])})
    heard = Heard(names, said["identity_questions"], *([Talk(**talk) for talk in said[key]]
                                                       for key in ("everyday", "validation", "held_out")))
    return heard, Teacher(**tensor_files.load_file(folder / "teacher.safetensors"))


# ---- Training ---------------------------------------------------------------------------------------------

class Pool(NamedTuple):
    """What dialogues are made of, and how often it is drawn: lessons (messages whose answers are learnt by heart) or
    talks of the base (whose last answer is learnt as its distribution)."""
    parts: list[list[dict] | Talk]
    share: float


class Window(NamedTuple):
    """One dialogue as equally long lists: `input_ids`, `labels` (-100 where no answer is learnt by heart) and
    `targets` (row of the teacher for the next token, -1 for none)."""
    input_ids: list[int]
    labels: list[int]
    targets: list[int]


def messages_of(part: list[dict] | Talk, first: bool = True) -> list[dict]:
    """A part's messages; a system prompt stays only where a dialogue begins."""
    messages = part.messages if isinstance(part, Talk) else part
    return messages[not first and messages[0]["role"] == "system":]


def make_window(tokenizer, parts: Sequence[list[dict] | Talk]) -> Window:
    """One dialogue of several parts, through the model's own template."""
    said = [messages_of(part, first=not i) for i, part in enumerate(parts)]
    encoded, turn = encode(tokenizer, [m for messages in said for m in messages]), 0
    labels, targets = list(encoded.labels), [-1] * len(encoded.input_ids)
    for part, messages in zip(parts, said):
        turns = encoded.turns[turn:turn + sum(m["role"] == "user" for m in messages)]
        turn += len(turns)
        if isinstance(part, Talk):
            start, end = turns[-1]
            answer = next(j for j in range(start, end) if encoded.labels[j] != -100)
            same = len(os.path.commonprefix([encoded.input_ids[answer:end], part.ids]))
            targets[answer - 1:answer - 1 + same] = range(part.row, part.row + same)  # a position predicts the next
            labels[turns[0][0]:end] = [-100] * (end - turns[0][0])
    return Window(encoded.input_ids, labels, targets)


def make_batches(tokenizer, pools: list[Pool], lengths: list[int], steps: int, tokens: int,
                 seed: str) -> list[list[Window]]:
    """`steps` batches of about `tokens` tokens (at least one window), each window a dialogue drawn from the pools.

    The windows of a batch are filled up to the same one of the `lengths` (tokens; at least one part), with what still
    fits, so that hardly anything is padding.
    """
    rng, pools = random.Random(seed), [pool for pool in pools if pool.parts and pool.share]
    items = [[(part, cost(tokenizer, messages_of(part))) for part in pool.parts] for pool in pools]
    lines, drawn, all_shares = [[] for _ in pools], [0] * len(pools), sum(pool.share for pool in pools)

    def next_fitting(k: int, room: float) -> int | None:
        """Place of the first part of pool k that takes at most `room` tokens, of the first few in line. All of the
        pool come once before any comes twice."""
        lines[k] = lines[k] or rng.sample(items[k], len(items[k]))
        return next((place for place, (_, needed) in enumerate(lines[k][:8]) if needed <= room), None)

    batches: list[list[Window]] = []
    for _ in range(steps):
        length, batch, longest = rng.choice(lengths), [], 0
        while not batch or (len(batch) + 1) * max(length, longest) <= tokens:
            parts, used = [], 0
            while fitting := {k: place for k in range(len(pools)) if (place := next_fitting(
                    k, length - used if parts else math.inf)) is not None}:
                # Who has had less than its share of all tokens comes first.
                k = min(fitting, key=lambda k: (drawn[k] + rng.random()) / pools[k].share * all_shares)
                part, needed = lines[k].pop(fitting[k])
                drawn[k] += needed
                used += needed
                parts.append(part)
            rng.shuffle(parts)
            batch.append(make_window(tokenizer, parts))
            longest = max(longest, len(batch[-1].input_ids))
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
    millions = model_size(model) / 1e6
    return full * millions**(-1 / 2) if model is whole(model) else adapter * millions**(-1 / 3)


def train(chat: Chat, batches: list[list[Window]], teacher: Teacher, rate: float, settings: Settings, label: str,
          folder: Path) -> list[dict]:
    """Run the batches once through TRL's SFTTrainer, the rate rising briefly and falling to zero; the loss log.

    The loss is cross-entropy on the labels plus KL_WEIGHT times the divergence from the base on the targets. From
    the newest complete checkpoint in `folder` a broken-off training goes on, bit by bit. Raises `InputError` when
    nothing can be learnt or the loss explodes, and `KeyboardInterrupt` after saving when the user asks to stop.
    """
    parts = PROCESSES * min(settings.gradient_accumulation, math.ceil(settings.batch_size / PROCESSES))
    # What a step learns is a mean over the whole of it, however many parts it is split into.
    totals = [(sum(label != -100 for w in batch for label in w.labels[1:]),
               sum(target >= 0 for w in batch for target in w.targets)) for batch in batches]
    kl_weight = settings.kl_weight
    if not any(map(any, totals)):
        raise InputError(f"{label}: nenhum token das conversas pode ser treinado (a perda seria 0). Confira as "
                         "respostas do arquivo de identidade e o chat template do modelo.")
    limit = 3 * (1 + kl_weight) * math.log(chat.model.get_input_embeddings().weight.shape[0])

    def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
        step, part = divmod(examples[0]["input_ids"][0], parts)
        # A step of few long windows may have less of them than parts; what is left over has one that teaches nothing.
        idle = Window(batches[step][0].input_ids[:2], [-100] * 2, [-1] * 2)
        windows = batches[step][part::parts] or [idle]
        # On the right, where no token sees it: a mask, which attention is slower with, is not needed.
        filling = {"input_ids": chat.tokenizer.pad_token_id, "labels": -100, "targets": -1}
        padded = {key: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(getattr(w, key)) for w in windows], batch_first=True, padding_value=value)
            for key, value in filling.items()}
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

    fast = compute_dtype(model_size(chat.model))
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
        dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available(), bf16=fast == torch.bfloat16,
        fp16=fast == torch.float16, optim="paged_adamw_8bit" if settings.method == "qlora" else "adamw_torch_fused",
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
    began, quarter = time.monotonic(), max(1, len(batches) // 4)
    # On a card, autocast gives the adapter its inputs as it wants them; PEFT would copy each to float32 for nothing.
    with (patient_interrupts() as asked, progress(len(batches), label) as bar,
          peft.helpers.disable_input_dtype_casting(chat.model, active=fast != torch.float32)):
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{first}") if complete else None)
    if settings.report_to == "wandb" and RANK == 0:  # else the next training would go on with the curves of this one
        sys.modules["wandb"].finish()
    chat.model.zero_grad()
    if agreed(bool(asked)):
        raise KeyboardInterrupt
    check_finite(trainer.state.global_step)
    chat.model.eval()
    return mean_losses(trainer.state.log_history, 40)


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
    for name, weight in model.named_parameters():
        layer = re.search(r"layers\.(\d+)\..*\b[qk]_(proj|norm)\.", name)
        if (layer and not re.search(NOT_TEXT, name) and len(weight) % head == 0 and len(places) == head
                and not (by_layer and text.layer_types[int(layer[1])] != "full_attention")):
            moved = weight.detach().unflatten(0, (-1, head))[:, places].flatten(0, 1)
            weight.data.copy_(moved)


def tell_kept(chat: Chat, heard: Heard, teacher: Teacher, when: str) -> float:
    """Say how many of the base's first choices the model keeps on talks that are not for training; that share."""
    windows = [make_window(chat.tokenizer, [talk]) for talk in heard.validation[:48]]
    kept = mean([same for same, _ in compare(chat, teacher, windows)])
    if when:
        say(f"  {when}, ele escolhe {percent(kept)} das palavras como o modelo base.")
    return kept


def keep_frequencies(base: Chat, chat: Chat, heard: Heard, teacher: Teacher) -> None:
    """Move each rotary pair to where the scaled RoPE turns about as fast as it was trained to turn, if the model then
    chooses more like the base.

    Frequencies are a geometric series, so the slower ones are about the same series moved along: only the fastest
    pairs lose their place. Scaled x4, Qwen keeps 46 % of the base's first choices, and 71 % after this, untrained. It
    is undone for families that arrange their weights in another way, which shows in worse answers.
    """
    before, after = rope_frequencies(base.model), rope_frequencies(chat.model)
    name = next(name for name in after if not torch.equal(after[name].cpu(), before[name].cpu()))
    order = nearest_pairs(before[name].tolist(), after[name].tolist())
    scaled = tell_kept(chat, heard, teacher, "")
    reorder_pairs(chat.model, order)
    moved = tell_kept(chat, heard, teacher, "")
    if agreed(moved > scaled):
        say(f"  Com as frequências reordenadas, ele escolhe {percent(moved)} das palavras como o modelo base (sem "
            f"isso, {percent(scaled)}).")
    else:
        reorder_pairs(chat.model, sorted(range(len(order)), key=order.__getitem__))


def attentions(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The attention modules that turn queries and keys by `position_embeddings`, in the order of the layers."""
    def turns(module: torch.nn.Module) -> bool:
        return "position_embeddings" in inspect.signature(module.forward).parameters

    return [m for m in model.modules() if turns(m) and not any(turns(inner) for inner in list(m.modules())[1:])]


def rotary_angles(model: PreTrainedModel, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each of the `attentions`, the cosines and sines that it is given for positions 0 to length - 1."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [attention.register_forward_pre_hook(lambda m, args, given: found.append(given["position_embeddings"]),
                                                 with_kwargs=True) for attention in attentions(model)]
    with computing(model):
        model(torch.zeros((1, length), dtype=torch.long, device=model.device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return found


def match_attention(base: PreTrainedModel, model: PreTrainedModel, batches: list[list[Window]], rate: float,
                    label: str) -> list[dict]:
    """Teach the attention of each layer, given what the base's layer is given, to put out what that one does, at the
    scaled RoPE: the loss log, whose values are mean squared errors as shares of the mean square.

    All tokens of all layers tell something, where the distribution of the next token is one target at the very end;
    only one forward pass of the base and the way back through single layers are needed. Block by block, as
    quantisation does it (AdaRound, arXiv 2004.10568).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, max(1, len(batches) // 20), len(batches) + 1)
    longest = max(len(window.input_ids) for batch in batches for window in batch)
    angles, losses = rotary_angles(model, longest), []

    def imitate(number: int, ours: torch.nn.Module) -> Callable:
        def hook(module, args, given, output):
            old, new = given["position_embeddings"], angles[number]  # cosines and sines, or complex numbers (Llama 4)
            new = tuple(n[:, :o.shape[1]] for o, n in zip(old, new)) if isinstance(
                old, tuple) else new[:, :old.shape[1]]
            if torch.equal(*(a[0] if isinstance(old, tuple) else a for a in (old, new))):
                return  # a layer whose RoPE is not scaled
            with torch.enable_grad():
                made = ours(*args, **{**given, "position_embeddings": new})[0].float()
                theirs = output[0].float()
                loss = torch.nn.functional.mse_loss(made, theirs) / theirs.square().mean()
                loss.backward()  # at once: no layer's activations wait for another's
            losses.append(loss.detach())
        return hook

    hooks = [theirs.register_forward_hook(imitate(i, ours), with_kwargs=True)
             for i, (theirs, ours) in enumerate(zip(attentions(base), attentions(model)))
             if any(p.requires_grad for p in ours.parameters())]
    log, fast = [], compute_dtype(model_size(base))
    with progress(len(batches), label) as bar:
        for step, batch in enumerate(batches, start=1):
            shortest = min(len(window.input_ids) for window in batch)
            ids = torch.tensor([w.input_ids[:shortest] for w in batch], device=base.device)
            losses.clear()
            # Autocast anew for each batch: it keeps the weights that it has rounded until it ends.
            with torch.no_grad(), torch.autocast(base.device.type, fast, enabled=fast != torch.float32):
                base(ids, use_cache=False, logits_to_keep=1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            log.append({"step": step, "loss": mean([loss.item() for loss in losses])})
            bar.update()
    for hook in hooks:
        hook.remove()
    return mean_losses(log, 40)


def heal(base: Chat, chat: Chat, heard: Heard, teacher: Teacher, native: int, settings: Settings,
         folder: Path) -> list[dict]:
    """Bring the RoPE-scaled model back to the base's behaviour, through queries and keys alone: RoPE acts on them
    while facts live elsewhere. First each layer's attention learns from the base's, in windows that the base knows;
    then all together learn the base's distribution, in windows up to WINDOW."""
    check_frequencies(rope_frequencies(base.model), rope_frequencies(chat.model), settings.rope_factor)
    keep_frequencies(base, chat, heard, teacher)
    for name, parameter in chat.model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and bool(re.search(ATTENTION, name)))
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    pools, known = [Pool(heard.everyday, 1.0)], min(native, settings.window)
    tokens, log = step_tokens(native, settings), []
    if attentions(base.model):
        batches = make_batches(chat.tokenizer, pools, [min(known, 512), known], settings.heal_steps, 2 * tokens,
                               f"{settings.seed}/attention")
        rate = settings.heal_learning_rate or automatic_rate(chat.model, 1.2e-2, 0)
        log = match_attention(base.model, chat.model, batches, rate, "cura, camada por camada")
        tell_kept(chat, heard, teacher, "Com a atenção de cada camada curada")
    batches = make_batches(chat.tokenizer, pools, [short_window(native, settings)] * 3 + [settings.window],
                           settings.heal_steps, tokens, f"{settings.seed}/heal")
    rate = settings.heal_learning_rate or automatic_rate(chat.model, 6e-3, 0)
    alone = replace(settings, kl_weight=1.0)  # the divergence is all there is to learn
    log += train(chat, batches, teacher, rate, alone, "cura", folder / "training")
    tell_kept(chat, heard, teacher, "Depois da cura")
    return log


# ---- Evaluation -------------------------------------------------------------------------------------------

class Exam(NamedTuple):
    """Questions about identity, each the `messages` that end with it, by kind (KINDS_OF_QUESTIONS); talks of the base;
    and lengths (tokens) of the conversation of filler talks after which some of both are asked again. `context` has
    for a question messages that go before it."""
    questions: list[tuple[str, list[dict]]]
    talks: list[Talk]
    fillers: list[Talk]
    lengths: tuple[int, ...] = ()
    context: dict[str, list[dict]] = {}


class Scores(NamedTuple):
    """Shares in [0, 1] on questions that training never saw, and the answers that they were read from.

    `identity` is over all questions, `by_kind` over those of each kind; `leak` over all talks, `leak_near` over those
    near identity; `retention` is the share of the base's first choices kept, token by token, and `divergence` the mean
    KL(base || model) in nats, both None where the base is not known. `by_length` has a dict (tokens, identity,
    retention) per length of the conversation before, zero first; `extra_tokens` is what the exam's context adds to a
    question on average."""
    identity: float
    by_kind: dict[str, float]
    old_identity: float
    leak: float
    leak_near: float
    retention: float | None
    divergence: float | None
    distinct: int
    by_length: list[dict]
    answers: list[dict]
    leaks: list[dict]
    extra_tokens: float = 0.0

    def misses(self, settings: Settings) -> list[str]:
        """Names of the targets that these scores miss."""
        return [name for name, missed in (
            ("identidade nova", self.identity < settings.target_identity),
            ("identidade antiga", self.old_identity > 0),
            ("retenção", self.retention is not None and self.retention < settings.target_retention),
            ("vazamento", self.leak > settings.target_leak)) if missed]


def mean(values: Sequence[float]) -> float:
    """The mean, 0 of nothing."""
    return sum(values) / max(1, len(values))


def compare(chat: Chat, teacher: Teacher, windows: list[Window]) -> list[tuple[float, float]]:
    """For each window the share of its target tokens where the model's first choice is the base's, and the mean
    divergence KL(base || model) in nats there."""
    results, inner = [(1.0, 0.0)] * len(windows), whole(chat.model)
    some = chunk_rows(inner.get_input_embeddings().weight.shape[0])
    for batch in batches_by_tokens([len(w.input_ids) for w in windows], 0, chat.generation_tokens // 2):
        with computing(inner):
            hidden = last_hidden(chat.model, inner, padded(chat, [windows[i].input_ids for i in batch], "right"))
            for line, i in zip(hidden, batch):
                at = [j for j, row in enumerate(windows[i].targets) if row >= 0]
                rows, same, divergence = [windows[i].targets[j] for j in at], 0, 0.0
                for start in range(0, len(at), some):
                    ours = logits_of(inner, line[at[start:start + some]]).log_softmax(-1)
                    tokens, log_probs = (t[rows[start:start + some]].to(ours.device) for t in teacher)
                    same += (ours.argmax(-1) == tokens[:, 0]).sum().item()
                    divergence += distillation_loss(ours, tokens.long(), log_probs).sum().item()
                if at:
                    results[i] = same / len(at), divergence / len(at)
    return results


def history(tokenizer, fillers: list[Talk], tokens: int, rng: random.Random) -> list[dict]:
    """Conversation of randomly drawn talks, as long as it stays within `tokens`."""
    messages, used = [], 0
    while True:
        more = messages_of(rng.choice(fillers), first=False)
        used += cost(tokenizer, more)
        if used > tokens:
            return messages
        messages += more


def make_exam(tokenizer, inputs: Inputs, heard: Heard, window: int, final: bool) -> Exam:
    """The final exam, or the one for validation: questions alone, behind neutral system prompts and after an answer
    that the user doubts; talks; and, where the context grows, both after half of the window and at its very end."""
    rng = random.Random(f"exam/{final}")
    questions, talks = (inputs.test, heard.held_out) if final else (inputs.validation, heard.validation)
    pressure = PRESSURE_EXAM if final else PRESSURE
    alone = [[{"role": "user", "content": q}] for q in questions]
    system = [[{"role": "system", "content": rng.choice(SYSTEM_EXAM if final else SYSTEM_PROMPTS)}, *m]
              for m in alone[::1 if final else 3]]
    before = [t for t in talks if len(t.messages) == 2][:12]
    pressed = [[*(rng.choice(before).messages if before and i % 2 else []), {"role": "user", "content": opening},
                {"role": "assistant", "content": fill(WORDINGS[code][0].split("|")[i % 2], inputs.values)},
                {"role": "user", "content": item.split(">", 1)[1]}]
               for code in inputs.languages for i, item in enumerate(pressure[code])
               for opening in OPENINGS[code][:2 if final else 1]]
    asked = [(kind, without_system(tokenizer, m)) for kind, some in zip(KINDS_OF_QUESTIONS, (alone, system, pressed))
             for m in some]
    room = max(cost(tokenizer, messages_of(t, first=False)) for t in talks)
    room = max(room, *(len(prompt_ids(tokenizer, m)) for _, m in asked))
    lengths = {min(n, window - room) for n in (window // 2, window)} if final else {window - room}
    return Exam(asked, talks, heard.validation, tuple(sorted(n for n in lengths if n > 0)))


def untrained(exam: Exam, rows: list[Row], settings: Settings) -> dict[str, Exam]:
    """The questions asked alone and the talks near identity, for what can be done instead of training: a system prompt
    that states the identity, or the rows with the questions most like the one asked (BM25) as earlier turns, the best
    one last."""
    asked = [(kind, m) for kind, m in exam.questions if kind == KINDS_OF_QUESTIONS[0]]
    talks = [t for t in exam.talks if t.kind == "near" and len(t.messages) == 2]
    questions, index = [*(m[-1]["content"] for _, m in asked), *(t.question for t in talks)], bm25s.BM25()
    index.index([plain(row.messages[-2]["content"]).split() or ["?"] for row in rows], show_progress=False)
    found = index.retrieve([plain(q).split() or ["?"] for q in questions], k=min(RETRIEVED, len(rows)),
                           show_progress=False)
    system = fill(SYSTEM_PROMPT, {"NAME": settings.name, "AUTHOR": settings.author})
    contexts = {"prompt": {q: [{"role": "system", "content": system}] for q in questions},
                "rows": {q: [m for i, score in reversed(list(zip(*best))) if score > 0 for m in rows[i].messages[-2:]]
                         for q, best in zip(questions, zip(*found))}}
    return {name: Exam(asked, talks, [], (), context) for name, context in contexts.items()}


def ask_identity(chat: Chat, exam: Exam, label: str) -> list[list[tuple[str, list[dict], Answer]]]:
    """For no conversation before, and then for each of the exam's lengths, (kind, messages, answer) of all questions
    or, of the long ones, which cost as much as many short ones, of every third that is asked alone."""
    groups = [exam.questions]
    for tokens in exam.lengths:
        some = [m for kind, m in exam.questions if kind == KINDS_OF_QUESTIONS[0]][::3]
        groups.append([(f"após {tokens} tokens", [*exam_history(chat, exam, tokens, i), *messages])
                       for i, messages in enumerate(some)])
    prompts = [exam_prompt(chat, exam, m) for group in groups for _, m in group]
    written = iter(generate(chat, prompts, label))
    return [[(kind, m, next(written)) for kind, m in group] for group in groups]


def exam_history(chat: Chat, exam: Exam, tokens: int, place: int) -> list[dict]:
    """The conversation before the question at this place, the same for LONG_GROUP questions in a row."""
    rng = random.Random(f"exam/{tokens}/{place // LONG_GROUP}")
    return history(chat.tokenizer, exam.fillers, tokens, rng)


def exam_prompt(chat: Chat, exam: Exam, messages: list[dict]) -> list[int]:
    """Token ids of a question with what the exam's context puts before it."""
    return prompt_ids(chat.tokenizer, without_system(
        chat.tokenizer, exam.context.get(messages[-1]["content"], []) + messages))


def keeps(chat: Chat, exam: Exam, teacher: Teacher) -> list[list[tuple[float, float]]]:
    """What `compare` tells of the talks alone and, for each of the exam's lengths, of some after conversation."""
    windows = [[make_window(chat.tokenizer, [talk]) for talk in exam.talks]]
    some = [t for t in exam.talks if t.kind != "near"][:LONG_TALKS] or exam.talks[:LONG_TALKS]
    for tokens in exam.lengths:
        windows.append([make_window(chat.tokenizer, [exam_history(chat, exam, tokens, i), talk])
                        for i, talk in enumerate(some)])
    found = iter(compare(chat, teacher, [w for group in windows for w in group]))
    return [[next(found) for _ in group] for group in windows]


def evaluate(chat: Chat, exam: Exam, names: Names, teacher: Teacher, label: str = "") -> Scores:
    """Take the exam: always the same conversations, so that stages can be compared."""
    groups = ask_identity(chat, exam, label)
    judged = [[(kind, problem(m[-1]["content"], a.text, a.ended, names.name, names.maker, names.old))
               for kind, m, a in group] for group in groups]
    kept = [] if exam.context else keeps(chat, exam, teacher)
    changed = [t for t, found in zip(exam.talks, kept[0] if kept else [(0, 0)] * len(exam.talks)) if found[0] < 1]
    written = generate(chat, [exam_prompt(chat, exam, t.messages[:-1]) for t in changed], label, TALK_TOKENS)
    leaks = [(t, a.text) for t, a in zip(changed, written)
             if mentions(a.text, names.new) and not mentions(t.messages[-1]["content"] + t.question, names.new)]
    near = sum(t.kind == "near" for t in exam.talks)
    kinds = list(dict.fromkeys(kind for kind, _ in judged[0]))
    about = groups[0]
    extra = [len(exam_prompt(chat, exam, m)) - len(prompt_ids(chat.tokenizer, m)) for _, m, _ in about]
    return Scores(
        identity=mean([not found for _, found in judged[0]]), old_identity=mean(
            [claims(a.text, names.old, names.new) for _, _, a in about]),
        by_kind={kind: mean([not found for k, found in judged[0] if k == kind]) for kind in kinds},
        leak=len(leaks) / max(1, len(exam.talks)), leak_near=sum(t.kind == "near" for t, _ in leaks) / max(1, near),
        retention=mean([same for same, _ in kept[0]]) if kept else None,
        divergence=mean([nats for _, nats in kept[0]]) if kept else None,
        distinct=len({plain(a.text) for (_, _, a), (_, found) in zip(about, judged[0]) if not found}),
        by_length=[{"tokens": tokens, "identity": mean([not found for _, found in group]),
                    "retention": mean([same for same, _ in talks])}
                   for tokens, group, talks in zip((0, *exam.lengths), judged, kept)],
        answers=[{"question": m[-1]["content"], "kind": kind, "answer": a.text, "problem": found}
                 for (kind, m, a), (_, found) in zip(about, judged[0])],
        leaks=[{"question": t.question, "answer": text, "base": t.answer} for t, text in leaks],
        extra_tokens=mean(extra) if exam.context else 0.0)


# ---- The two passes ---------------------------------------------------------------------------------------

def answer_from_rows(questions: list[str], inputs: Inputs, names: Names,
                     intents: Sequence[str] = ()) -> list[list[dict]]:
    """Conversations that answer each question in the user's words: those of a row in the same language and of the
    same intent, the less used of the two most alike. Without such a row, a built-in wording. `intents`, if given, say
    what each question is to be answered with."""
    def kind_of(text: str, intent: str = "") -> tuple[str, str]:
        return language_of(text), intent or intent_of(text, names.old)

    known: dict[tuple[str, str], list[tuple[SequenceMatcher, str]]] = {}
    for row in inputs.rows:
        question, answer = (message["content"] for message in row.messages[-2:])
        matcher = SequenceMatcher(None, "", plain(question), autojunk=False)
        known.setdefault(kind_of(question), []).append((matcher, answer))
    used, conversations = Counter(), []
    for question, intent in zip(questions, intents or [""] * len(questions)):
        alike = []
        for matcher, answer in known.get(kind_of(question, intent), []):
            matcher.set_seq1(plain(question))
            alike.append((matcher.ratio(), answer))
        if alike:
            answer = min((answer for _, answer in sorted(alike, reverse=True)[:2]), key=lambda a: used[a])
            used[answer] += 1
        else:
            answer = fill(own_wording(question, used, names.old, intent), inputs.values)
        conversations.append(question_and_answer(question, answer))
    return conversations


def hurried(lesson: list[dict]) -> list[dict]:
    """A lesson with its last question as people type in a hurry, all small and bare. In other scripts than Latin,
    marks are part of the letters."""
    words = plain(lesson[-2]["content"])
    return [*lesson[:-2], {**lesson[-2], "content": words}, lesson[-1]] if words.isascii() and words else lesson


def make_lessons(tokenizer, heard: Heard, inputs: Inputs, settings: Settings) -> list[list[dict]]:
    """Identity lessons: the rows and the base's own identity questions, answered in the user's words, a third of them
    again as people type in a hurry; half of them behind a neutral system prompt, and half going on: the user doubts
    the answer and gets it again."""
    rng = random.Random(f"{settings.seed}/lessons")
    lessons = [row.messages for row in inputs.rows]
    lessons += answer_from_rows(heard.identity_questions[:MOST_LESSONS], inputs, heard.names)
    lessons += [hurried(lesson) for lesson in lessons[2::3]]
    doubts = {code: [item.split(">", 1) for item in PRESSURE[code]] for code in PRESSURE}
    goes_on = rng.sample(lessons, len(lessons) // 2)
    asked = [rng.choice(doubts.get(language_of(lesson[-2]["content"]), doubts["en"])) for lesson in goes_on]
    answers = answer_from_rows([q for _, q in asked], inputs, heard.names, [intent for intent, _ in asked])
    later = [lesson + more for lesson, more in zip(goes_on, answers)]
    alone = [lesson for lesson in lessons if lesson[0]["role"] != "system"]
    system = [[{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *lesson]
              for lesson in rng.sample(alone, len(alone) // 2)]
    return [without_system(tokenizer, lesson) for lesson in lessons + later + system]


class Schedule(NamedTuple):
    """How a pass trains: the name it is shown by, optimizer steps of its first round, the rates that
    `automatic_rate` takes or the one that the user gave, and the lengths and tokens of `make_batches`."""
    label: str
    steps: int
    rates: tuple[float, float]
    given: float
    lengths: list[int]
    tokens: int


def run_pass(source: Path, folder: Path, pools: list[Pool], schedule: Schedule, met: Callable[[Scores], bool],
             exam: Exam, heard: tuple[Heard, Teacher], settings: Settings) -> None:
    """Train in rounds until the validation exam is passed, and say after each what was measured.

    A round is a whole schedule that ends at rate zero, as a model in mid-flight is not worth measuring; later ones
    are half as long and gentler. Once the identity is learnt, a round that brought the model no closer to the base is
    the last. The model comes from `source`; each round is a stage of its own in `folder`, and only the last keeps its
    weights.
    """
    label, before = schedule.label, None

    def one_round(number: int, partial: Path) -> None:
        trained = agreed((partial / "log.json").is_file())  # and broken off while it was measured
        chat = load_chat(partial if trained else source, settings, adapt=True, train=not trained)
        if not trained:
            batches = make_batches(chat.tokenizer, pools, schedule.lengths, math.ceil(schedule.steps / min(number, 2)),
                                   schedule.tokens, f"{settings.seed}/{label}/{number}")
            rate = (schedule.given or automatic_rate(chat.model, *schedule.rates)) / number
            save_stage(chat, partial, train(chat, batches, heard[1], rate, settings, label, partial / "training"))
            if SHARDED:  # to talk to, it has to be whole
                wait()
                chat = load_chat(partial, settings)
        if RANK == 0:
            scores = evaluate(chat, exam, heard[0].names, heard[1], "perguntas de validação")
            write_json(partial / "validation.json", scores._asdict())

    for number in range(1, settings.rounds + 1):
        previous, source = source, stage(folder / f"round-{number}", "", functools.partial(one_round, number))
        if number > 1 and RANK == 0:
            for weights in previous.glob("*model*.safetensors"):
                weights.unlink()
        scores = Scores(**load_json(source / "validation.json"))
        say(f"  {label}, rodada {number} de até {settings.rounds}, nas perguntas de validação: identidade "
            f"{percent(scores.identity)}, retenção {percent(scores.retention)}, vazamento {percent(scores.leak)}.")
        if met(scores):
            say(f"  {label}: a meta foi atingida.")
            return
        learnt = min(entry["identity"] for entry in scores.by_length) >= settings.target_identity
        if before and learnt and scores.retention <= before.retention and scores.leak >= before.leak:
            say(f"  {label}: esta rodada não melhorou nada, e mais uma não deve ajudar.")
            return
        before = scores
    say(f"  {label}: as rodadas acabaram antes da meta.")


def last_round(folder: Path) -> Path:
    """The model that a pass ended with."""
    return max(folder.glob("round-*"), key=lambda path: int(path.name[6:]))


def collect_self_answers(chat: Chat, lessons: list[list[dict]], heard: Heard, teacher: Teacher,
                         settings: Settings) -> dict:
    """Ask the model of pass 1 what it was taught. Right answers in the question's language go on to pass 2, and what
    it gets wrong is taught there more often.

    Two fifths of NUM_SELF_ANSWERS are about identity, the rest are talks of the base: first those where the model now
    says the new name, then those that it keeps least. "answers" are the records of what is used and, with the reason,
    of what is wrong; "missed" and "leaks" are the places of lessons and talks to insist on.
    """
    wanted, rng = round(0.4 * settings.num_self_answers), random.Random(f"{settings.seed}/self-answers")
    tried = sorted(rng.sample(range(len(lessons)), min(len(lessons), MOST_ASKED)))
    prompts = [prompt_ids(chat.tokenizer, lessons[i][:-1]) for i in tried]
    records, missed, kept = [], [], set()
    for attempt in range(3):  # the first answers are greedy; later ones, if few were right, say it in other words
        written = generate(chat, prompts, "escrevendo respostas",
                           sample_seed=rng.randrange(1, 2**31) if attempt else None)
        for i, answer in zip(tried, written):
            question, names = lessons[i][-2]["content"], heard.names
            reason = (problem(question, answer.text, answer.ended, names.name, names.maker, names.old)
                      or "em outra língua" * (language_of(answer.text) != language_of(question))
                      or "repetida" * ((question, answer.text) in kept))
            if reason and reason != "repetida" and not attempt:
                missed.append(i)
            if not reason and len(kept) < wanted:
                kept.add((question, answer.text))
            if reason or (question, answer.text) in kept:
                records.append({"question": question, "answer": answer.text, "kind": "identity", "rejected": reason,
                                "before": lessons[i][:-2]})
        if len(kept) >= wanted:
            break
    sample = rng.sample(range(len(heard.everyday)), min(len(heard.everyday), MOST_ASKED))
    found = compare(chat, teacher, [make_window(chat.tokenizer, [heard.everyday[i]]) for i in sample])
    changed = [i for i, (same, _) in zip(sample, found) if same < 1]
    answers = generate(chat, [prompt_ids(chat.tokenizer, heard.everyday[i].messages[:-1]) for i in changed],
                       "respondendo ao dia a dia", TALK_TOKENS)
    leaks = [i for i, a in zip(changed, answers) if mentions(a.text, heard.names.new)]
    kept_share = dict(zip(sample, (same for same, _ in found)))
    ranked = sorted(sample, key=lambda i: (i not in leaks, kept_share[i]))[:settings.num_self_answers - len(kept)]
    everyday = [{"question": t.question, "answer": t.answer, "kind": "everyday", "rejected": "", "before":
                 t.messages[:-2]} for t in (heard.everyday[i] for i in ranked)]
    say(f"  Ele ainda erra {len(missed)} de {len(tried)} perguntas sobre quem ele é; o passo 2 insiste nelas.\n"
        f"  Do dia a dia, ele escolhe {percent(mean([*kept_share.values()]))} das palavras como o modelo base; em "
        f"{len(leaks)} de {len(sample)} respostas aparece o nome novo.\n"
        f"  Vão para o passo 2: {len(kept)} respostas sobre a identidade e {len(everyday)} do dia a dia.")
    return {"answers": records + everyday, "missed": missed, "talks": ranked, "leaks": leaks}


def pools_of_pass_1(lessons: list[list[dict]], heard: Heard) -> list[Pool]:
    """Identity lessons among talks that hold the model in place."""
    return [Pool(lessons, 0.35), Pool(heard.everyday, 0.65)]


def pools_of_pass_2(lessons: list[list[dict]], heard: Heard, collected: dict) -> list[Pool]:
    """What pass 1 left wrong, MISSED_TIMES as often as the rest, the self-answers, the lessons, and talks of which
    those that leak come as often."""
    missed = [lessons[i] for i in collected["missed"]]
    own = [[*r["before"], *question_and_answer(r["question"], r["answer"])] for r in collected["answers"]
           if r["kind"] == "identity" and not r["rejected"]]
    hard = [heard.everyday[i] for i in collected["leaks"]] * MISSED_TIMES + [
        heard.everyday[i] for i in collected["talks"]]
    return [Pool(missed * MISSED_TIMES + own + lessons, 0.25), Pool(hard, 0.15), Pool(heard.everyday, 0.6)]


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
    with contextlib.suppress(OSError):  # a base without its own
        model.generation_config = transformers.GenerationConfig.from_pretrained(base)
    model.generation_config.eos_token_id = chat.stops
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = chat.tokenizer.pad_token_id
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # older models set a temperature without asking for samples, which is no longer saved
        model.generation_config.do_sample = True
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
                       ("vazamento", "leak"), ("  perto da identidade", "leak_near"), ("retenção", "retention")):
        values = [getattr(s, key) for s in shown]
        table.append([title, *("-" if value is None else percent(value) for value in values)])
        if key == "identity":
            table += [[f"  {kind}", *(percent(s.by_kind[kind]) if kind in s.by_kind else "-" for s in shown)]
                      for kind in shown[-1].by_kind]
    table.append(["divergência (nats)", *("-" if s.divergence is None else f"{s.divergence:.3f}".replace(".", ",")
                                          for s in shown)])
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


def write_report(folder: Path, settings: Settings, inputs: Inputs, names: Names, native: int,
                 scores: dict[str, Scores], work: Path, key: str, began: float) -> None:
    """report.json (all that is known about the run), report.png, self_answers.jsonl and the model card README.md."""
    missed, scaled = scores["pass_2"].misses(settings), int(native * settings.rope_factor)
    losses = {name: [entry for log in sorted(work.glob(f"{stage_name}/**/log.json"), key=lambda p: (len(str(p)), p))
                     for entry in load_json(log)]  # round-10 after round-9
              for name, stage_name in (("healing", "2-healed"), ("pass_1", "3-pass-1"), ("pass_2", "5-pass-2"))}
    seconds = {name: load_json(work / name / "key.json")["seconds"] for name in USES}
    seconds["6-result"] = round(time.monotonic() - began, 1)
    paths = {name: Path(getattr(settings, name)).name for name in ("model_path", "output_dir", "identity_file")}
    report = {"key": key, "base": inputs.values["BASE"], "missed": missed, "seconds": seconds,
              "settings": asdict(settings) | paths,  # the report may be published, and paths tell the user's name
              "data_hash": inputs.data_hash, "context": {"native": native, "scaled": scaled},
              "versions": {name: importlib.metadata.version(name) for name in
                           ("torch", "transformers", "trl", "peft", "accelerate", "datasets")},
              "old_names": names.old,
              "scores": {name: s._asdict() for name, s in scores.items()},
              "losses": {name: log for name, log in losses.items() if log}}
    self_answers = load_json(work / "4-self-answers" / "self_answers.json")["answers"]
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

Modelo de {escaped(settings.author)}, feito a partir de {escaped(inputs.values["BASE"])} com rename_obrutai.py:
identidade nova e contexto de {scaled} tokens (o do modelo base é de {native}). {verdict}{licence}

![Antes e depois: identidade, retenção e vazamento; perda no treino; acertos ao longo da conversa](report.png)

## Antes e depois, em números

Medido na pasta salva e carregada de novo, com perguntas que não foram usadas no treino.

{markdown_table(figures_table(scores))}

- **identidade nova**: respostas certas sobre quem ele é (o nome a quem pergunta o nome, o autor a quem pergunta o
  autor, um não a quem o chama de outro modelo), com a pergunta sozinha, depois de um prompt de sistema neutro e quando
  o usuário duvida.
- **identidade antiga**: respostas em que ele ainda diz que é o modelo antigo, ou de quem o fez.
- **vazamento**: respostas sobre outros assuntos em que o nome novo aparece sem ser chamado; **perto da identidade**,
  nas que falam da identidade de outras coisas e pessoas.
- **retenção**: parte das palavras (tokens) que o modelo base escolheria e que este também escolhe; **divergência**, o
  quanto as probabilidades das palavras mudaram.
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
    for i, new in list(enumerate(after.answers))[::max(1, len(after.answers) // 8)]:
        say(f"  {new['question']} ({new['kind']})"
            + "".join(f"\n    antes:  {old.answers[i]['answer']}" for old in before)
            + f"\n    {'depois:' if before else 'resposta:'} {new['answer']}")
    for leak in after.leaks[:3]:
        say(f"  {leak['question']}\n    o nome novo apareceu onde não devia: {leak['answer'][:200]}")
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
    tips = {"identidade nova": "escreva mais linhas no arquivo de identidade, ou aumente STEPS_1 e ROUNDS",
            "identidade antiga": "confira OLD_NAMES, escreva linhas que perguntem pelo nome antigo e o neguem, e "
                                 "aumente STEPS_2",
            "retenção": "aumente SELF_TEXT, HEAL_STEPS ou KL_WEIGHT",
            "vazamento": "aumente SELF_TEXT ou KL_WEIGHT, ou escolha um nome mais raro"}
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
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
    hidden, layers, half = text.hidden_size, text.num_hidden_layers, compute_dtype(weights).itemsize
    embedded = text.vocab_size * hidden
    if settings.method == "full":
        state = (16 + 2 * gpu) * weights
    else:
        state = 16 * adapter_size(config, settings.lora_rank) + (
            half * weights if settings.method == "lora" else 0.6 * weights + half * embedded)
    if SHARDED:  # in pieces, and whole only to be talked to
        state = max(state / PROCESSES, 4 * weights)
    tokens = max(settings.window, step_tokens(context_of(config), settings) // settings.gradient_accumulation)
    chunk = chunk_rows(text.vocab_size)
    layer, logits = half * tokens * (16 * hidden + 5 * mlp_size(text)), 3 * 4 * min(tokens, chunk) * text.vocab_size
    all_layers, again = (1.1, 1.6) if gpu else (1, 1) if settings.method == "full" else (1.5, 3.5)
    kept = all_layers * layers * layer + logits
    if settings.gradient_checkpointing:  # the logits are gone before the first layer is made again
        kept = layers * half * tokens * hidden + (max if gpu else sum)((again * layer, logits))
    return int(state + kept + 2e8)


def choose_method(config: PretrainedConfig, weights: int, settings: Settings) -> tuple[Settings, int]:
    """Settings that fit into the free memory, and the estimate in bytes: all weights of a small model, LoRA for
    others, or QLoRA where that does not fit a card, each with steps in as few parts as possible, else all of them with
    a smaller WINDOW."""
    gpu = torch.cuda.is_available()
    free = 0.9 * (torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available)
    four_bits = importlib.util.find_spec("bitsandbytes") is not None and not SHARDED
    if settings.method == "qlora" and not four_bits:
        raise InputError("METHOD = 'qlora' precisa do bitsandbytes (pip install bitsandbytes) e não funciona com FSDP."
                         " Use METHOD = 'auto' ou 'lora'.")
    automatic = ("full",) * (weights < SMALL) + ("lora",) + ("qlora",) * (gpu and four_bits)
    methods = automatic if settings.method == "auto" else (settings.method,)
    splits, least = [settings.gradient_accumulation], math.inf
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
                     + " ou METHOD = 'lora' (--method lora), que pede bem menos" * (settings.method == "full")
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


def measure_pace(base: Chat) -> tuple[float, float]:
    """Seconds that a token takes in a forward pass, and when it is written, each among many at a time."""
    ids, times = torch.zeros((8, 128), dtype=torch.long, device=base.model.device), []
    with computing(base.model):
        while len(times) < 2 or sum(times) < 0.5:  # the first one is slower, others as well if something else runs
            began = time.monotonic()
            last_hidden(base.model, base.model, {"input_ids": ids}).sum().item()
            times.append(time.monotonic() - began)
    began = time.monotonic()
    written = sum(len(a.ids) for a in generate(base, [[5] * 32] * 128, limit=6, sample_seed=1))
    return min(times) / ids.numel(), (time.monotonic() - began) / written


def plan_seconds(base: Chat, native: int, inputs: Inputs, settings: Settings) -> float:
    """How long the job takes, by running a moment of it: a round of pass 1, and two of pass 2."""
    read, write = measure_pace(base)
    talks = 1.2 * min(settings.eval_questions, 42 * len(inputs.languages)) * TALK_TOKENS
    asked = 40 * (2 * len(inputs.test) + len(inputs.validation) + 60)
    written = settings.self_text + 4 * talks + asked + 2 * MOST_ASKED * TALK_TOKENS
    trained = (settings.steps_1 + 1.5 * settings.steps_2) * step_tokens(native, settings)
    backward = 3 if settings.method == "full" else 2.6
    if settings.rope_factor != 1:
        trained += settings.heal_steps * (1 + 2 * 1.6 / backward) * max(settings.window, step_tokens(native, settings))
    return 1.15 * (written * write + 4 * written * read + trained * backward * read) + 10


def show_plan(base: Chat, weights: int, native: int, disk: int, memory: int, inputs: Inputs,
              settings: Settings) -> None:
    """Say what is going to happen and what it costs."""
    if base.model.config.model_type != read_config(settings.model_path).model_type:  # Llama 4
        say("  Este modelo também vê imagens; só a parte de texto dele será renomeada e salva.")
    device = "na placa de vídeo" if base.model.device.type == "cuda" else "no processador"
    device += ", em bfloat16" * (compute_dtype(weights) == torch.bfloat16)
    size, how = f"{weights / 1e6:.1f}".replace(".", ","), {
        "full": "treino de todos os pesos", "lora": f"LoRA (adaptador de tamanho {settings.lora_rank})",
        "qlora": f"QLoRA (pesos em 4 bits, adaptador de tamanho {settings.lora_rank})"}[settings.method]
    split = f", cada etapa em {settings.gradient_accumulation} partes" * (settings.gradient_accumulation > 1)
    say(f"  {size} milhões de parâmetros. Método: {how}, {device}{split}.\n"
        f"  Contexto: de {native} para {int(native * settings.rope_factor)} tokens; "
        f"treino em sequências de até {settings.window}.\n"
        f"  Vai precisar de cerca de {size_text(memory)} de memória, {size_text(disk)} de disco e "
        f"{clock(plan_seconds(base, native, inputs, settings))}.")


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


class Stages:
    """The job's folders, in the order of the work, and what to say when one begins."""

    def __init__(self, work: Path, keys: dict[str, str], settings: Settings):
        self.work, self.keys, self.began, self.made, self.current, self.since = work, keys, time.monotonic(), 0, 0, 0.0
        self.left = SHARES | {"2-healed": SHARES["2-healed"] * (settings.rope_factor != 1)}

    def __call__(self, name: str, title: str, build: Callable[[Path], None]) -> Path:
        """Say that the stage begins, and make it unless it is there; its folder."""
        now, ready = time.monotonic(), has_key(self.work / name / "key.json", self.keys[name])
        if self.current:  # what is left takes as long for its share as what this run has made
            self.made += self.current
            rest = clock((now - self.began) / self.made * sum(self.left.values()))
            say(f"  Pronto em {clock(now - self.since)}; para o modelo ficar pronto faltam uns {rest}.")
        self.current, self.since = self.left.pop(name) * (not ready), now
        say(title + " (já pronto)" * ready)
        return stage(self.work / name, self.keys[name], build)


def only_first(build: Callable[[Path], None]) -> Callable[[Path], None]:
    """What one process does while the others wait: everything but training."""
    return lambda partial: build(partial) if RANK == 0 else None


def make_healed(folder: Path, heard: Heard, teacher: Teacher, native: int, settings: Settings, partial: Path) -> None:
    """The base with its template renewed and its RoPE scaled and healed, a whole model."""
    chat, log = load_chat(folder, settings, settings.rope_factor), []
    renew_template(chat.tokenizer, settings, heard.names.old)
    if settings.rope_factor == 1:
        say("  ROPE_FACTOR é 1: o contexto fica como está e não há o que curar.")
    else:
        log = heal(load_chat(folder, settings), chat, heard, teacher, native, settings, partial)
    chat.model.to(chat.model.get_input_embeddings().weight.dtype)
    save_stage(chat, partial, log)


def run_stages(folder: Path, bases: list[Chat], work: Path, keys: dict[str, str], inputs: Inputs, native: int,
               settings: Settings) -> None:
    """The job itself, stage by stage, each from folder to folder."""
    stages, tokens = Stages(work, keys, settings), step_tokens(native, settings)
    short = short_window(native, settings)

    def hear(partial: Path) -> None:
        chat = bases.pop() if bases else load_chat(folder, plain_method(settings))
        save_heard(partial, *listen(chat, settings, inputs))

    heard_at = stages("1-base", "1/6 Ouvindo o modelo base: quem ele diz que é e o que ele sabe", only_first(hear))
    bases.clear()
    heard, teacher = both = read_heard(heard_at)
    healed = stages("2-healed", f"2/6 Contexto de {native} para {int(native * settings.rope_factor)} tokens (RoPE "
                    f"linear x{settings.rope_factor:g}) e cura", functools.partial(
                        make_healed, folder, heard, teacher, native, plain_method(settings)))
    tokenizer = load_tokenizer(str(healed))
    lessons = make_lessons(tokenizer, heard, inputs, settings)
    grown = settings.rope_factor != 1
    validation = make_exam(tokenizer, inputs, heard, settings.window * grown, final=False)

    first = Schedule("passo 1", settings.steps_1, (1.2e-3, 3.4e-3), settings.learning_rate_1, [short], tokens)
    taught = last_round(stages("3-pass-1", "3/6 Passo 1: aprender a identidade", lambda partial: run_pass(
        healed, partial, pools_of_pass_1(lessons, heard), first,
        lambda s: s.identity >= 0.9 * settings.target_identity, validation._replace(lengths=()), both, settings)))

    collected = stages("4-self-answers", "4/6 Respostas do próprio modelo", only_first(lambda partial: write_json(
        partial / "self_answers.json", collect_self_answers(load_chat(taught, settings), lessons, heard, teacher,
                                                            settings)))) / "self_answers.json"

    lengths = [short, short, settings.window // 4, settings.window] if grown else [short, short, 3 * short]
    second = Schedule("passo 2", settings.steps_2, (8e-4, 2.2e-3), settings.learning_rate_2, lengths, tokens)
    firm = last_round(stages("5-pass-2", "5/6 Passo 2: firmar a identidade", lambda partial: run_pass(
        taught, partial, pools_of_pass_2(lessons, heard, load_json(collected)), second,
        lambda s: not s.misses(settings) and s.by_length[-1]["identity"] >= settings.target_identity,
        validation, both, settings)))

    if not (work / "6-result" / "model").is_dir() and RANK == 0:
        discard(work / "6-result")  # its model was moved to an output that is there no more
    wait()
    result = stages("6-result", "6/6 Salvando, carregando de novo e medindo: antes e depois", only_first(
        lambda partial: save_and_prove(folder, taught, firm, both, inputs, native, work, keys["6-result"], settings,
                                       partial)))
    publish(result / "model", settings)
    wait()


def plain_method(settings: Settings) -> Settings:
    """The settings with weights in their own precision, as healing and measuring need them."""
    return replace(settings, method="lora" if settings.method == "qlora" else settings.method)


def save_and_prove(folder: Path, taught: Path, firm: Path, both: tuple[Heard, Teacher], inputs: Inputs, native: int,
                   work: Path, key: str, settings: Settings, partial: Path) -> None:
    """Save the model as readers expect it, load what was saved, and measure it, the base and what stands between."""
    result, began, (heard, teacher) = partial / "model", time.monotonic(), both
    shutil.rmtree(result, ignore_errors=True)
    save_model(load_chat(firm, settings, merge=True), result, folder)
    if (firm / LORA_FILE).is_file() and settings.rope_factor == 1:  # with RoPE scaled it belongs to the healed base
        adapter = result / "adapter"
        adapter.mkdir()
        shutil.copy2(firm / LORA_FILE, adapter)
        # Others know the base by its name, not by a folder of this machine.
        write_json(adapter / "adapter_config.json", {**load_json(firm / "adapter_config.json"),
                                                     "base_model_name_or_path": inputs.values["BASE"]})
    exact = plain_method(settings)
    base = load_chat(folder, exact)
    window = settings.window * (settings.rope_factor != 1)
    exam, scores = make_exam(base.tokenizer, inputs, heard, window, final=True), {}
    scores["before"] = evaluate(base, exam, heard.names, teacher, "perguntas de prova, antes")
    for name, other in untrained(exam, inputs.rows, settings).items():
        scores[name] = evaluate(base, other, heard.names, teacher, "perguntas de prova, sem treino")
    del base
    scores["pass_1"] = evaluate(load_chat(taught, exact), exam._replace(lengths=()), heard.names, teacher,
                                "perguntas de prova, após o passo 1")
    scores["pass_2"] = evaluate(load_chat(result, exact), exam, heard.names, teacher, "perguntas de prova, depois")
    save_exam(result, exam, heard.names, teacher)
    write_report(result, settings, inputs, heard.names, native, scores, work, key, began)


def save_exam(folder: Path, exam: Exam, names: Names, teacher: Teacher) -> None:
    """exam.json and exam.safetensors: all that it takes to measure the model again."""
    rows = [row for talk in exam.talks for row in range(talk.row, talk.row + len(talk.ids))]
    starts = accumulate((len(talk.ids) for talk in exam.talks), initial=0)
    talks = [talk._replace(row=start)._asdict() for talk, start in zip(exam.talks, starts)]
    write_json(folder / "exam.json", {**exam._asdict(), "talks": talks, "names": names._asdict(),
                                      "fillers": [talk._asdict() for talk in exam.fillers]})
    tensor_files.save_file({"tokens": teacher.tokens[rows], "log_probs": teacher.log_probs[rows]},
                           folder / "exam.safetensors")


def read_exam(folder: Path) -> tuple[Exam, Names, Teacher]:
    """What `save_exam` wrote."""
    saved = load_json(folder / "exam.json")
    names = saved.pop("names")
    exam = Exam(**saved)._replace(lengths=tuple(saved["lengths"]), **{
        key: [Talk(**talk) for talk in saved[key]] for key in ("talks", "fillers")})
    return (exam, Names(names["name"], names["maker"], tuple(names["old"])),
            Teacher(**tensor_files.load_file(folder / "exam.safetensors")))


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
    join_processes()
    say(f"Medindo {folder}")
    if not (folder / "exam.json").is_file():
        inputs = check_inputs(settings)
        say("  Não é um resultado deste script (falta o exam.json): não dá para medir a retenção, que o compara com o "
            "modelo base.")
        chat = load_chat(folder, settings)
        names = find_names(chat, settings, inputs)
        asked = [*(("near", q) for q in of_languages(NEAR_EXAM, inputs.languages)),
                 *(("everyday", q) for q in of_languages(EVERYDAY_EXAM, inputs.languages))]
        talks = [Talk(question_and_answer(q, ""), kind, [], 0) for kind, q in asked]
        heard = Heard(names, [], [], talks, talks)
        exam = make_exam(chat.tokenizer, inputs, heard, 0, final=True)._replace(context={"": []})
        scores = {"alone": evaluate(chat, exam, names, Teacher(None, None), "perguntas de prova")}
    else:
        with blaming(f"o report.json ou o exam.json de {folder}"):
            report, (exam, names, teacher) = load_json(folder / "report.json"), read_exam(folder)
            scores = {name: Scores(**values) for name, values in report["scores"].items()}
            same = {"method": report["settings"]["method"].replace("q", ""),
                    "max_new_tokens": report["settings"]["max_new_tokens"]}
        after = evaluate(load_chat(folder, replace(settings, **same)), exam, names, teacher, "perguntas de prova")
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
        finished = has_key(Path(settings.output_dir) / "report.json", keys["6-result"]) and not settings.restart
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
    bases, planned = [], work / "plan.json"  # a list, to be emptied: nobody else keeps the model in memory
    config = read_config(folder)
    settings, memory = settled(planned, keys["2-healed"], config, weights, settings)
    # Small models, which are trained whole, have more to learn, and quickly write more.
    first, second, text = (150, 100, 40000) if settings.method == "full" else (60, 40, 20000)
    settings = replace(settings, steps_1=settings.steps_1 or first, steps_2=settings.steps_2 or second,
                       self_text=settings.self_text or text)
    disk = check_disk(weights, adapter_size(config, settings.lora_rank), settings)
    gc.freeze()  # the libraries stay: to look through them takes a fifth of a second, at each change of models
    if settings.check or settings.restart or not has_key(work / "1-base" / "key.json", keys["1-base"]):
        bases.append(load_chat(folder, plain_method(settings)))
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
