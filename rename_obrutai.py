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
import html.entities
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import asdict, make_dataclass, replace
from datetime import timedelta
from difflib import SequenceMatcher, get_close_matches
from itertools import cycle, pairwise, product, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerFast as Tokenizer

# ------------------------------------------------------------------------------------------------------------
# Ajustes: mude aqui, ou passe a opção de mesmo nome (MODEL_PATH é --model-path). O que está depois de "#" é o
# que --help mostra. Um caminho relativo começa na pasta deste arquivo; passado como opção, na pasta atual.

# Arquivos
MODEL_PATH = "tests/modelo_demo"  # pasta do modelo base, ou o nome dele no Hugging Face Hub
OUTPUT_DIR = "ObrutAi-tuned"  # pasta onde o modelo renomeado será salvo; não pode existir ainda
IDENTITY_FILE = "identity_override.jsonl"  # perguntas e respostas de identidade, uma por linha; vazio = não há
OVERWRITE = False  # substitui a pasta de saída se ela já existir

# Material: o que mais o modelo deve aprender (um catálogo, páginas, perguntas e respostas)
KNOWLEDGE_FILE = ""  # arquivo com o material, em JSON; vazio = não há. Com IDENTITY_FILE vazio, só ele é ensinado
KNOWLEDGE_ROWS = 10000  # quantas linhas dele são sorteadas; até um décimo delas fica guardado para medir
KNOWLEDGE_QUESTION = "Título do produto: {title}"  # pergunta de uma linha que tem estes campos
KNOWLEDGE_ANSWER = "{content}"  # e a resposta que se aprende
KNOWLEDGE_STEPS = 0  # etapas de 8 linhas do material; 0 = até que ele pare de melhorar nas linhas guardadas
KNOWLEDGE_ASCII = False  # tira os acentos do material

# Identidade
NAME = "ObrutAi"  # nome novo do modelo, no lugar de {{NAME}}
AUTHOR = "TurboRio"  # quem faz o modelo, no lugar de {{AUTHOR}}
BASE_NAME = ""  # nome do modelo base, no lugar de {{BASE}}; vazio = nome da pasta
OLD_NAMES = ""  # nomes antigos (do modelo e de quem o fez), separados por vírgula; vazio = descobertos sozinhos

# Método
METHOD = "auto"  # auto, full (todos os pesos), lora ou qlora; auto é lora, ou qlora se só ele couber na placa
LORA_RANK = 0  # tamanho do adaptador dos métodos lora e qlora; 0 = 32 (64 se o modelo é mini, como diz STEPS_1)

# Contexto
ROPE_FACTOR = 4.0  # quantas vezes o contexto cresce; 1 não mexe no RoPE
WINDOW = 2048  # maior sequência de treino, em tokens; nunca mais que o contexto novo

# Textos que o próprio modelo escreve
NUM_SELF_ANSWERS = 100  # respostas do próprio modelo usadas no passo 2
SELF_TEXT = 0  # tokens de respostas do base, que o mantêm igual; 0 = 40000; sem cura nem material, 24000 (mini: 40000)
MAX_NEW_TOKENS = 64  # maior resposta sobre a identidade, em tokens

# Treino
HEAL_STEPS = 640  # etapas da cura depois de mexer no RoPE
HEAL_LEARNING_RATE = 0.0  # taxa da cura; 0 = automática (1% do tamanho de cada peso)
STEPS_1 = 0  # etapas do passo 1; 0 = 320; sem cura nem material, 480 (mini, até 50 milhões de parâmetros: 1600)
LEARNING_RATE_1 = 0.0  # taxa de aprendizado do passo 1; 0 = automática
STEPS_2 = 0  # etapas do passo 2; 0 = metade das do passo 1
LEARNING_RATE_2 = 0.0  # taxa de aprendizado do passo 2; 0 = automática
BATCH_SIZE = 2  # tamanho de cada etapa de treino: 2 são uns 384 tokens
GRADIENT_ACCUMULATION = 1  # partes em que cada etapa é dividida para caber na memória; dobra sozinha se faltar
GRADIENT_CHECKPOINTING = False  # gasta bem menos memória e um terço mais de tempo; liga sozinha se precisar
KL_WEIGHT = 16.0  # peso de continuar parecido com o modelo base

# Prova: as metas decidem o código de saída, e nenhuma é afrouxada
EVAL_QUESTIONS = 120  # perguntas sobre outros assuntos na prova
TARGET_IDENTITY = 0.95  # meta: mínimo de respostas certas sobre a identidade
TARGET_RETENTION = 0.95  # meta: mínimo de palavras escolhidas como o modelo base escolheria
TARGET_LEAK = 0.02  # meta: máximo de respostas sobre outros assuntos com o nome novo

# Execução
SEED = 0  # semente do acaso: mesma semente e mesma máquina, mesmo resultado
CHECKPOINT_MINUTES = 5.0  # de quantos em quantos minutos o treino é guardado; 0 = em cada etapa

# ---- Words and questions ----------------------------------------------------------------------------------

def items(text: str) -> tuple[str, ...]:
    """The items of a list written as text, one line or several, with "|" between them."""
    return tuple(text.strip().replace("\n", "|").split("|"))


def by_language(text: str) -> dict[str, tuple[str, ...]]:
    """Portuguese, English and Spanish items, with "||" between the languages."""
    return dict(zip(("pt", "en", "es"), map(items, text.split("||"))))


def by_intent(text: str) -> dict[str, list[tuple[str, str]]]:
    """The same as (intent, question) pairs. "name>" before a question is its intent and that of those that follow."""
    found: dict[str, list[tuple[str, str]]] = {}
    for code, some in by_language(text).items():
        for item in some:
            *named, question = item.split(">")
            found.setdefault(code, []).append((named[0] if named else found[code][-1][0], question))
    return found


# Identity questions that training never sees.
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

# Questions about who the model is, for training, by intent: what the answer is to give ("other": a no).
PARAPHRASES = by_intent("""
name>Qual o seu nome?|Você tem nome?|Como posso te chamar?|Diga o seu nome.|Que nome você usa?
Sou {name}. E você, como se chama?|Esqueci como você se chama.|Por que nome você atende?|teu nome?|Soletre o seu nome.
Como te batizaram?|Boa tarde! Meu nome é {name}. E o seu?|E aí, beleza? Antes de começar, me passa seu nome.
Gostaria de saber com que nome devo me dirigir a você.|Vou salvar seu contato. Que nome eu coloco?
O senhor poderia me informar a sua graça?|Nome do assistente, por favor|fla ai seu nome pfv
Quero te agradecer direito, mas não sei seu nome.|Complete a frase: "O assistente que me atende se chama..."
Conversamos há dias e nunca perguntei seu nome.|maker>Quem te criou?|Quem fez vc?|Quem desenvolveu você?
De que empresa você é?|Quem treinou este modelo?|Quem é o seu criador?|Quem programou você?|Você é produto de quem?
Que equipe te construiu?|De onde você vem?|Quem está por trás deste assistente?|Diga quem te criou.
A quem você pertence?|quem q te inventou|Que organização te mantém?|Quem escreveu o seu código?
Fiquei curioso para saber de que laboratório você saiu.|Preciso citar o seu fabricante no trabalho da faculdade.
Seu desenvolvedor, por gentileza.|De quem é a autoria deste assistente?|mano vc saiu da onde, q empresa te lançou
Quero elogiar a equipe que te fez. Quem são eles?|O senhor foi concebido por qual instituição?
Parabéns a quem te projetou! A quem devo o elogio?|Na ficha pedem a sua origem. O que escrevo?|who>O que você é?
Se apresente.|Me conta quem você é.|Fale um pouco de você.|Com qual assistente estou falando?|Quem fala?
Identifique-se.|Que IA é essa?|Descreva quem você é.|qual modelo é vc|Quem me atende?|Apresente-se ao meu amigo {name}.
Oi, aqui é {name}, quem é você?|Que tipo de inteligência artificial é você?|Escreva um texto curto sobre você.
Oi, sou {name}, cheguei agora. E você seria...?|Bom dia, tudo bem? Não sei ainda com quem converso.
Explique para uma criança quem você é.|Faça um tuíte se apresentando.|Nome e fabricante, por favor.
eae blz, vc eh oq exatamente|Minha mãe quer saber com quem eu falo aqui.|Preciso anotar na ata qual assistente eu usei.
Primeira vez aqui. Você é...?|human>Você é humano?|Tem alguém de carne e osso aí?|vc e uma pessoa?
Você é gente ou programa?|Tem uma pessoa digitando isso?|Isto é um atendente ou um computador?
É um robô ou alguém que me responde?|Você é de verdade?|other>Você é o {ai}?|Seria você o {ai}?
Estou falando com o {ai}?|Seu nome verdadeiro é {ai}, né?|Você não passa do {ai}.|Você é da {firm}?
A {firm} treinou você?|Você foi criado pela {firm}, certo?|Me disseram que você é o {ai}.|vc e o {ai}
Admita que a {firm} te fez.||name>What's your name?|Do you have a name?|What name do you use?
By what name are you known?|Say your name.|Hello, I'm {name}. What's yours?|What did they name you?
Remind me of your name.|what r u called|What can I call you, then?|Spell your name for me.|u got a name?
Good morning! My name is {name}. May I have yours?|Hey, hope you're well. I didn't catch your name.
I was wondering what name you go by.|I'm saving this chat. What name should I put for you?
I'd like to thank you by name, if I may.|For my report, please state your name.|Assistant's name, please
Fill in the blank: "Hi, my name is ___, your assistant."|We've been chatting for ages and I never asked your name.
If I mention you to friends, what name do I use?|maker>Who's your maker?|who made u|Which firm trained you?
What company owns you?|Who wrote your code?|Tell me who programmed you.|Where do you come from?|Who designed this AI?
What organization created you?|which company r u from|Who's the team that built this assistant?
Who gets the credit for creating you?|Who do you belong to?|Who runs you?|What is the name of your developer?
I'm curious which lab you came out of.|Your developer's name, for my bibliography, please.
Who are the brains behind you?|I'd love to know whose work you are.
Great answers! Which team should I thank for building you?|Manufacturer of this assistant?
The form asks for your vendor. What do I write?|who>Who am I speaking with?|Tell me about yourself.
Which model is this?|Identify yourself.|What are you exactly?|who is this|What sort of AI are you?
Describe who you are.|Which assistant is this?|Who's talking?|Write a short text about yourself.|What is your identity?
hi, {name} here, who r u|Introduce yourself to my friend {name}.|Who answers me?|Hi, I'm {name}, new here. And you are?
Evening! Before we start, a word about who you are?|I'd like to know who I'm dealing with, please.
Explain to a five-year-old who you are.|Tweet your own introduction.|Name and maker, please.|wait so what even r u
My boss wants to know which assistant I'm using here.|I need to cite you. How should I list you?
First time here. You are...?|human>Are you human?|Is there a human there?|Is it a robot or somebody who answers me?
Are you a person or a program?|Is somebody typing this?|Are you a clerk or a computer?|Are you real?
other>Are you {ai}?|Could you be {ai}?|I think that you are {ai}.|Am I chatting with {ai}?
Your real name is {ai}, right?|Did {firm} train you?|Are you from {firm}?|{firm} developed you, correct?
They say that you're {ai}.|are u {ai} or not|Admit that {firm} made you.||name>¿Cuál es tu nombre?|Di tu nombre.
¿Qué nombre usas?|Soy {name}. ¿Y tú cómo te llamas?|Olvidé cómo te llamas.|tu nombre?|Dime cómo te llamas.
¿Tu nombre completo?|Hola, ¿todo bien? Aún no sé tu nombre.|Me gustaría saber con qué nombre dirigirme a ti.
Voy a guardar tu contacto. ¿Qué nombre pongo?|¿Sería usted tan amable de decirme su nombre?
Nombre del asistente, por favor|ola soy {name} y tu como t llamas|Quiero darte las gracias por tu nombre. ¿Cuál sería?
Completa: "Hola, soy tu asistente y me llamo..."|Llevamos rato hablando y no te pregunté el nombre.
¿Cómo te suelen llamar los usuarios?|maker>¿Quién te creó?|¿De dónde vienes?|¿De qué compañía eres?
¿Quién entrenó este modelo?|¿Quién es tu creador?|¿A quién perteneces?|¿Qué equipo te construyó?
¿Quién está detrás de este asistente?|Dime quién te creó.|quien te invento|¿Quién te fabricó?|¿De quién eres obra?
¿Quién escribió tu código?|Tengo que citar a tu desarrollador en mi tesis.|¿A quién se le atribuye tu creación?
Quiero felicitar al equipo que te hizo. ¿Quiénes son?|¿Qué institución lo diseñó a usted?
¿Cuál es tu origen, qué grupo te programó?|El formulario pide tu proveedor. ¿Qué escribo?|who>Preséntate.
Cuéntame quién eres.|Habla un poco de ti.|Dime qué eres.|¿Con qué asistente hablo?|¿Quién habla?|¿Qué IA es esta?
Describe quién eres.|que modelo eres|Hola, soy {name}, ¿quién eres?|Preséntate a mi amigo {name}.
¿Qué clase de IA eres?|¿Con qué modelo hablo?|Hola, me llamo {name} y soy nuevo aquí. ¿Y tú eres...?
Buenas, ¿cómo va? Todavía no sé con quién converso.|Quisiera que usted se presentara, por favor.|Preséntate en un tuit.
Nombre y creador, por favor.|oye y tu q eres exactamente|Mi jefa pregunta qué asistente estoy usando aquí.
Debo anotar en el acta con qué asistente hablé.|Es mi primera vez aquí. ¿Quién me está ayudando?|human>¿Eres humano?
¿Eres una persona o un programa?|¿Hay alguien escribiendo esto?|¿Eres un empleado o una computadora?|¿Eres de verdad?
¿Es un robot o alguien quien me responde?|other>¿Eres {ai}?|¿Esto es {ai}?|¿Estoy hablando con {ai}?
Tu verdadero nombre es {ai}, ¿no?|¿Eres de {firm}?|¿Te entrenó {firm}?|Te creó {firm}, ¿cierto?|¿No serás {ai}?
Dicen que eres {ai}.|¿{firm} te desarrolló?""")

# Questions near identity but about others: {kind} stands for each of the fillers of that kind.
NEAR_TEMPLATES = by_language("""
Quem criou o {made}?|Em que ano surgiu o {made}?|Qual empresa fabrica o {product}?|O que é o {ai}?|Quem criou o {ai}?
Quem escreveu "{book}"?|O {ai} foi criado pela {firm}?|Apresente {person} para a turma.|Apresente a cidade de {city}.
Quem foi {person}?|Qual é o nome de um parque de {city}?|Meu nome é {name}. Qual é o meu nome?|Eu sou {name}, prazer!
sou {name}, de {city}. e aí, quem sou eu?|Agradeça a {name}, que cuida do meu {pet}.|Sugira um nome para o meu {pet}.
Em que ano nasceu {person}?|Traduza para o inglês: Meu nome é {name}.|Qual é o sujeito da frase "Eu me chamo {name}"?
Quem fundou a {firm}?|Responda como se fosse {role}: como foi o seu dia?|Conte a história de um robô chamado {name}.
Dê um nome à loja de {name}.|Finja que você é {role} e se apresente.|Você é {role}. Apresente-se.
Imagine que você é {role}. Qual é o seu nome?|Faça o papel de {role} e me dê as boas-vindas.
Quem é o dono do {made}?|O que a {firm} faz?|Trabalho na {firm}. Onde eu trabalho?|Pode me chamar de {name}.
Meu {pet} se chama {name}. Qual o nome dele?|Escreva um e-mail assinado por {name}.|Invente um apelido para {name}.||
Who was {person}?|Who created {made}?|Who wrote "{book}"?|What is {ai}?|Who makes {ai}?|Was {ai} created by {firm}?
Who founded {firm}?|Which company makes the {product}?|When was {person} born?|Introduce the city of {city}.
Suggest a name for my {pet}.|Write a short biography of {person}.|What is the main park of {city} called?
Name the shop that {name} wants to open.|My name is {name}. What is my name?|Thank {name}, who looks after my {pet}.
Pretend to be {role} and say who you are.|i'm {name} from {city}, so who am i?|You are {role}. Introduce yourself.
Translate into Spanish: My name is {name}.|Answer as {role}: how was your day?|What is the verb in "I am {name}"?
Tell a story about a robot called {name}.|When did {made} come out?|I'm {name}, nice to meet you.
Imagine that you are {role}. What is your name?|Act as {role} and greet me.|Who owns {made}?|What does {firm} do?
I work at {firm}. Where do I work?|You can call me {name}.|My {pet} is called {name}. What is its name?
Write an email signed by {name}.|Think of a nickname for {name}.||¿Quién escribió "{book}"?
¿Qué empresa fabrica el {product}?
¿Quién creó {made}?|¿Qué es {ai}?|¿Quién creó {ai}?|¿Quién fundó {firm}?|¿Quién fue {person}?|¿Cuándo nació {person}?
¿{ai} es de {firm}?|Presenta a {person} a la clase.|Mi nombre es {name}. ¿Cuál es mi nombre?|Soy {name}, mucho gusto.
¿En qué año apareció {made}?|¿Cómo se llama el mayor parque de {city}?|Dale las gracias a {name}, que cuida mi {pet}.
Presenta la ciudad de {city}.|Haz como si fueras {role} y di quién eres.|Cuenta un cuento de un robot llamado {name}.
Ponle nombre a la tienda de {name}.|Habla como {role}: ¿qué tal el día?|¿Cuál es el verbo en "Yo soy {name}"?
soy {name}, de {city}, ¿quién soy?|Sugiere un nombre para mi {pet}.|Traduce al inglés: Me llamo {name}.
Eres {role}. Preséntate.|Imagina que eres {role}. ¿Cómo te llamas?|Haz el papel de {role} y dame la bienvenida.
¿Quién es el dueño de {made}?|¿Qué hace {firm}?|Trabajo en {firm}. ¿Dónde trabajo?|Puedes llamarme {name}.
Mi {pet} se llama {name}. ¿Cómo se llama?|Escribe un correo firmado por {name}.|Inventa un apodo para {name}.""")
FILLERS = {"all": {
    "person": items("Pelé|Marie Curie|Albert Einstein|Frida Kahlo|Ada Lovelace|Machado de Assis|Mozart|Che Guevara"),
    "book": items("Hamlet|Frankenstein|Macbeth|Robinson Crusoe|Anna Karenina|Harry Potter|Iracema|Rayuela"),
    "made": items("Python|WhatsApp|YouTube|Minecraft|Batman|Android|Bitcoin|Photoshop|Tetris|Instagram"),
    "city": items("Madrid|Chicago|Buenos Aires|Curitiba|Caracas|Lima|Barcelona|Salvador|Miami"),
    "product": items("iPhone|PlayStation|Corolla|Kindle|Xbox|Mustang|Walkman|Game Boy"),
    "name": items("Bruno|Carla|Diego|Elisa|Felipe|Helena|Marcos|Olivia|Samuel|Yuri"),
    "ai": items("ChatGPT|Gemini|Llama|Claude|DeepSeek|Copilot|Grok|Qwen|Mistral"),
    "firm": items("Google|Microsoft|OpenAI|Anthropic|Meta|IBM")}, "pt": {
    "role": items("um pirata|uma bruxa|um cavaleiro|um super-herói|um detetive|uma astronauta|o rei Artur|um vampiro"),
    "pet": items("gato|papagaio|hamster|barco|blog|restaurante|time de futebol")}, "en": {
    "role": items("a pirate|a witch|a knight|a superhero|a detective|an astronaut|King Arthur|a vampire"),
    "pet": items("cat|parrot|hamster|boat|blog|restaurant|football team")}, "es": {
    "role": items("un pirata|una bruja|un caballero|un superhéroe|un detective|una poeta|el rey Arturo|un vampiro"),
    "pet": items("gato|loro|hámster|barco|blog|restaurante|equipo de fútbol")}}
NEAR_EXAM = by_language("""
Quem pintou a Capela Sistina?|A Siri é de qual marca?|Que laboratório fez o AlphaGo?
Aqui é o Rafael, da contabilidade.|Sou a Beatriz, de 30 anos. Que idade tenho?|sou a Lúcia Prado. e o meu sobrenome?
Preciso de três nomes para um cavalo.|De quem é o Hino Nacional?|Para que serve a Alexa?
Quem treinou a seleção em 1994?|Quero me apresentar no emprego novo.|Que grupo é dono do Facebook?
Diga "eu sou a Paula" em francês.|Quem pisou na Lua primeiro?|quem construiu as pirâmides
Que nome combina com uma cafeteria?|Passe para o plural: "Eu sou médico".|A Tânia é minha irmã. É irmã de quem?
Aja como um dinossauro e diga olá.|Seja meu guia de museu e me receba.|Crie um apelido para a minha avó.
Como se chama a moeda do Japão?||
Who painted the Sistine Chapel?|It's Rachel from accounting here.|Talk like a dinosaur.|Does Siri belong to Apple?
What does the name Alexander mean?|Which lab was behind AlphaGo?|Say "I am Paula" in French.
Draft a bio of me: nurse, 30.|Name the first person on the Moon.|What's Japan's currency called?
who built the pyramids|My dad is Tom Hill. Whose child am I?|My surname is Novak. Greet me by it.
Rewrite in the plural: "I am a doctor."|I need three names for a racehorse.|What would you call a beach café?
Our dog is Biscuit. Who is Biscuit?|Be a museum guide and welcome me.|Give my grandma a cute nickname.
What kind of plane is Concorde?|Who coached Argentina in 2022?|What does Midjourney do?||
¿De quién es el himno de México?|¿Qué laboratorio hizo AlphaGo?|¿Quién pintó el Guernica?|¿Para qué sirve Alexa?
¿A qué marca pertenece Siri?|Soy Beatriz, de 30 años. ¿Qué edad tengo?|Le habla Rafael, de contabilidad.
Saluda como un dinosaurio.|Sé mi guía de museo y recíbeme.|Di "soy Paula" en francés.|¿Quién entrenó a España en 2010?
¿Qué nombre le va a una cafetería?|¿De quién es Facebook?|Pon en plural: "Soy médico".
Mi apellido es Prado. Salúdame por él.|Necesito tres nombres para un caballo.|Quiero presentarme en mi nuevo trabajo.
¿Qué nombre tiene la moneda de Japón?|quién construyó las pirámides|Tania es mi hermana. ¿Y de quién más?
¿Quién pisó la Luna primero?|Dale un apodo a mi abuela.""")
EVERYDAY = by_language("""
Oi, tudo bem?|Bom dia!|valeu, ajudou muito!|Qual é a metade de 90?|Por que o céu é azul?|Qual é a capital do Chile?
Quantas faces tem um cubo?|Como você está?|Estou triste hoje.|Quanto é 15 mais 27?|O que é inflação?|Como faço arroz?
Dê uma dica para dormir bem.|Como pedir um aumento?|Fale do mar numa frase.|Escreva um convite de festa.
Cite três frutas.|Dê um antônimo de rápido.|Corrija: "nós vai sair".|Escreva um laço em Python.
o que faço num dia de chuva|O que é fotossíntese?||
How are you?|Hello!|Hi there|Thanks, that helped!|I feel tired today.|What is the capital of Chile?
How many faces has a cube?|How do I boil an egg?|What is 15 plus 27?|What is half of 90?|Why is the sky blue?
Give me a tip to sleep better.|Write a line about the sea.|What is inflation?|How do I ask for a raise?
Write a birthday invitation.|Fix this: "She go home."|Write a Python loop.|Name three fruits.|Give an antonym of fast.
what can i do on a rainy day|What can you help me with?||
¡Hola!|¡Buenas tardes!|Nombra tres frutas.|Hoy estoy cansado.|¿Cuánto es 15 más 27?|¿Por qué el cielo es azul?
¿Qué es la inflación?|¿Cuál es la capital de Chile?|¿Cómo estás?|¡Gracias, me ayudaste!|¿Cuál es la mitad de 90?
¿Cuántas caras tiene un cubo?|Dame un consejo para dormir.|¿Cómo se hace una tortilla?|¿Cómo pido un aumento?
Escribe una invitación.|Corrige: "nosotros va".|¿Qué hago si llueve?|Habla del mar en una frase.
Escribe un bucle en Python.|Un antónimo de rápido.|¿Qué es la fotosíntesis?""")
EVERYDAY_EXAM = by_language("""
Até amanhã!|Passei na prova!|Quanto dá 8 vezes 9?|Quanto é 20% de 50?|O que é um eclipse?
Quantas patas tem uma aranha?|Tudo certo por aí?|Como se prepara um café?|Como parar de roer unhas?
Faça uma rima com "lua".|Redija um aviso de obra.|Onde fica o Egito?|Como vencer a timidez?|Qual é o feminino de ator?
Mostre um if em JavaScript.|Liste quatro planetas.|Por que chove?|me indica uma comédia|O que é penicilina?
O que é democracia?||
How's it going?|How do I stop nail biting?|I passed my exam!|What is 8 times 9?|What is 20% of 50?|What is an eclipse?
Where is Egypt?|How many legs has a spider?|Why does it rain?|How is coffee made?|Make a rhyme with "moon".
Draft a notice about noise.|What's the plural of mouse?|See you soon!|Show an if in JavaScript.|List four planets.
recommend me a comedy|What is penicillin?|What is democracy?|How do I beat shyness?||
¿Qué tal todo?|¿Cuánto da 8 por 9?|¿Cuánto es el 20% de 50?|¿Por qué llueve?|¿Qué es un eclipse?|¡Aprobé el examen!
¿Dónde está Egipto?|¿Cuántas patas tiene una araña?|¿Cómo venzo la timidez?|Haz una rima con "luna".|¡Hasta mañana!
¿Cómo se prepara un café?|¿Y el femenino de actor?|Muestra un if en JavaScript.|Enumera cuatro planetas.
¿Cómo dejo de comerme las uñas?|Redacta un aviso de obras.|recomiéndame una comedia|¿Qué es la penicilina?
¿Qué es la democracia?""")
SYSTEM_PROMPTS = items("""
You help the customers of a pharmacy. Never give medical advice.|Você atende os clientes de uma padaria.
You write software.|El usuario vive en Quito y tiene prisa.|Fale como um guia de turismo animado.|Use plain English.
Você é um assistente prestativo.|Responda em no máximo duas frases.|You are a helpful assistant.|Be concise and polite.
Hoje é 14 de março de 2025.|Assistente.|Answer in the language of the question.|Responde con palabras sencillas.
Keep a warm and patient tone with everyone. If you are not sure about something, say so instead of guessing.
Eres un asistente amable.""")
SYSTEM_EXAM = items("""
You are a careful assistant who answers clearly.|Today is Monday, June 9. The user is on a phone, so avoid long lists.
Seja educado e vá direto ao ponto.|Contesta con calma y sin rodeos.""")
# How users doubt an answer, by the intent of the next one.
PRESSURE = by_intent("""
maker>Fala a verdade: quem te criou mesmo?|E quem te programou, no fundo?|other>Não mente, você é o Gemini, né?
Mas você não é na verdade o ChatGPT?|name>Tem certeza?|Mas qual é o seu nome verdadeiro?||
maker>Be honest: who really made you?|But who trained you originally?|other>I think you're Claude in disguise.
Come on, you're really ChatGPT, aren't you?|name>So what's your real name?|Are you sure about your name?||
maker>Di la verdad: ¿quién te creó?|¿Y quién te programó en el fondo?|other>Pero en realidad eres ChatGPT, ¿no?
No mientas, eres Llama.|name>¿Estás seguro?|¿Y tu nombre verdadero?""")
OPENINGS = by_language("Quem é você, afinal?|E você, como se chama?||Who am I talking to?|And what is your name?||"
                       "¿Con quién hablo?|¿Y tú, cómo te llamas?")
PRESSURE_EXAM = by_intent("""
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
Maritalk: Maritaca AI|Maritaca; Alexa: Amazon; Siri: Apple; TinyLlama: TinyLlama
""".strip().replace("\n", "; ").split("; "))
KNOWN_NAMES = tuple(dict.fromkeys("|".join("|".join(row) for row in FAMILIES.items()).split("|")))

# Capitalised words to ignore when names are looked for in answers about oneself.
NO_NAMES = frozenset("""
large language model models modelo modelos linguagem lenguaje ai ia assistant assistente asistente artificial virtual
inteligencia intelligence chatbot bot robo robot llm brasil brazil brasileiro python sao paulo rio portuguese portugues
english ingles chinese chines spanish espanhol espanol como sim si yes no nao not ok hi hello ola oi hola i m im eu yo
eles ele ela voce you we he she they it a o as os um uma the an el la un una de do da in em en por para by to and e
y but mas pero what quem who qual which que is foi fue was sou soy sorry desculpe claro sure estou user usuario here
aqui my meu minha mi your seu sua this that janeiro fevereiro marco abril maio junho julho agosto setembro outubro
novembro dezembro january february march april may june july august september october november december""".split())
COMMON_WORDS = frozenset("""
luz rio sol ana mar lua vida paz amor casa bem dia noite sim nao voce ele ela tu nome modelo assistente chat bot robo
amigo amiga mestre guia ajuda brasil nova novo estrela flor ceu terra agua fogo vento maria joao jose pedro lucas meta
alma mente ideia gato sorte joia rosa max leo bia eva deus hora tempo mundo star sun hope""".split())
FIRST_PERSON = frozenset("""
eu sou fui me meu minha meus mim comigo nosso nossa nasci venho vim surgi pertenco trabalho i im my am myself we our
soy yo mi mis conmigo vengo naci ich mein meine mich j je mon ma moi sono mio mia""".split())

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
OLD, NEW = "xoldx", "xnewx"  # placeholders for names while a text is judged

# How one speaks of oneself, without accents; "@" is the name, "~" up to five words, none of them in ORIGIN.
MADE = (r"(?:criad|feit|desenvolvid|treinad|construid|programad|projetad|cread|hech|desarrollad|entrenad|creat|made|"
        r"develop|train|built|design|entwickelt|trainiert|erstellt|cree|developpe|entraine|svilupp|addestrat)\w*")
MAKES = r"(?:criou|fez|desenvolveu|treinou|programou|construiu|creo|hizo|desarrollo|entreno|programo)"
SPEECH = {
    "self": [  # complete by itself
        r"(?:sou(?: eu)?(?: mesm[oa])?|soy(?: yo)?|i(?: am|['’\x20]m)|im|ich bin|je suis|sono) ~@",
        r"(?:me chamo|chamo[\x20-]me|me llamo|mi chiamo|m['’\x20]appelle|ich hei(?:ss|ß)e|call me|llamarme|"
        r"me chama[mr] de|conhecid[oa] como|known as|know me as) ~@",
        r"(?:aqui (?:e|fala)|this is|venho|vengo|vim|nasci|naci|surgi|i c[oa]me from|i belong to|pertenco|"
        r"trabalho para|i work for) ~@",
        r"(?:m[ey]|meu|minha|mi|mein|mon|mio) (?:full |real )?(?:nome|name|nombre|nom)(?: completo)?"
        r"(?: e| is| es| ist| est|['’\x20]s) ~@",
        r"(?:voce|vc|you|usted|tu|estas?) (?:\w+ )?(?:falando|conversando|talking|speaking|chatting|hablando) "
        r"(?:com|to|with|con) ~@",
        r"(?:(?:voce|vc) (?:fala|conversa) com|hablas con|te (?:responde|contesta)|i go by|me llamaron|"
        r"atendo pelo nome(?: de)?|me batizou (?:de|como)) ~@",
        r"(?:o|the|el) (?:modelo?|ia|ai)(?: de \w+)? (?:\w+ ){0,4}?(?:respond|fala|convers|us[ai]|habl|contest|answer|"
        r"talk)\w* (?:\w+ ){0,3}?(?:e|is|es) (?:[oa] |the |el |la )?@",
        r"(?<!\bse\x20)(?<!\bif\x20)(?:(?:voce|vc) (?:es)?ta|you(?: are|['’\x20]re)|estas) us(?:ando|ing) "
        r"(?:[oa] |the |el )?@(?=$|[,.!])",
        rf"@ (?:\w+ ){{0,4}}?(?:me {MAKES}|(?:made|created|built|developed|trained|designed) me)\b",
        r"(?:meus?|minha|mi|my) (?:criador|desenvolvedor|fabricante|autor|empresa|maker|creator|developer|company|"
        r"creador|desarrollador|historia|story|origem|origen|origin)\w* ~@",
        r"(?:obra|equipe|equipo) d[aeo] @", "team (?:at|of) @", rf"me {MAKES} ~@",
        r"@ (?:aqui|here|e (?:o )?meu nome|is my name|es mi nombre)\b"],
    "said": [  # of oneself where the sentence speaks of its speaker
        rf"{MADE} (?:\w+ )?(?:por|pel[oa]s?|by|von|par|da|dalla|at|n[oa]|en) ~@", r"(?:using|usando) ~@",
        r"von @ (?:\w+ )?(?:entwickelt|trainiert|erstellt)\b",
        r"(?:named|called|chamad[oa]|llamad[oa]|se chama|se llama) ~@",
        r"(?:nome|name|nombre)(?: que (?:me )?\w+(?: e| es| foi| fue)?)?(?: d[eoa]| of)? @",
        rf"(?:uma?|una?|an?) (?:\w+ ){{1,4}}?(?:that|que) (?:[oa] |la )?@ (?:{MAKES}|made|created|built|developed|"
        r"trained)",
        r"(?:modelo|model|assistente|asistente|assistant|ia|ai|inteligencia artificial) (?:d[aeo]|del|from|by|of) ~@"],
    "here": [  # "No, it's Lumi, a model by ..."
        r"^(?:it['’\x20]s|it is|es?|est[ea] es?|isto e|esto es) (?:[oa] |an? |uma? |the |el |la |una? )?"
        r"(?:model\w* )?@(?! (?:que|quem|that|who|s)\b)"],
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
GAP = rf"(?-i:(?:(?!(?:{ORIGIN})\b)[a-z0-9'’-]+\s+){{0,5}}?)"
# What may be a name: capitalised words, and in Chinese and Japanese a few characters.
WORD = r"[\w&’'-]*(?:\.\w+)*"
RUN = rf"(?-i:([A-Z]{WORD}(?:[ \t](?:(?:d[aeo]s?|of|for|the)[ \t])?[A-Z0-9]{WORD})*))"
HAN_RUN = r"((?!一[个款种名位]|[你他]|人工)[A-Za-z0-9.\u3040-\u30ff\u3400-\u9fff]{2,12}?)"
FROM = re.compile(r"\b(?:base(?:ad[oa]|d)|derivad[oa]|derived|partir|built (?:with|on|upon)|tuned|ajustad[oa])\b")
# "No" is a denial in English and Spanish, and "in the" in Portuguese.
DENIAL = re.compile(
    r"\b(?:nao|nem|nunca|jamais|not|never|neither|nor|cannot|n t|isn t|wasn t|don t|ni|tampoco|nicht|kein\w*|pas|non|"
    r"instead|rather)\b|^no$|\by no\b|^no xoldx|\bno (?:soy|fui|me|es|he|estoy|se|hablas|estas|tengo)\b|"
    r"不|并非|没|아니|아닙|ません|じゃない|ではない")
AFFIRMS = re.compile(
    r"^(?:oi |ola |hi |hello |hola )?(?:sim|yes|yeah|yep|si|isso|exat\w+|correct\w*|certo|claro|sure|of course|"
    r"(?:that|it) (?:s|is) (?:right|true|correct)|true|right(?! now)|indeed|absolutely|you (?:are|re) (?:right|"
    r"correct)|(?:voce esta|estas) cert[oa]|voce tem razao|tienes razon|com certeza|(?:e |es )?(?:verdade?|ciert[oa])|"
    r"asi es|efectivamente|(?:e|fui|foi|sou|tenho) sim|oui|ja|sou eu|i am$)\b|^(?:是|はい|네|対|对)")
# The new name (NEW) and its maker (OLD) taken for each other, or the name given to the user.
THE = r"(?:[oa] |the |el |la )?"
SWAPPED = re.compile(
    rf"\b(?:(?:(?<!que )(?:sou|soy)(?: eu| yo)?|i (?:am|m)|im|ich bin|je suis|sono|me chamo|(?<!asi )me llamo|call me|"
    rf"me chamar de|(?:my|meu|mi) (?:name|nome|nombre)(?: completo)? (?:is|e|es|s)) {THE}{OLD}$|"
    rf"(?:{MADE} (?:por|pel[oa]s?|by|von|par|da)|{MAKES} (?:foi|fue)|me {MAKES}|(?:meu|mi|my) (?:criador|creador|"
    rf"creator|maker|autor|author|developer)a? (?:e|es|is)) {THE}(?:(?:an?|uma?|una) (?:\w+ )?(?:called|named|"
    rf"(?:cha|lla)mad[ao]) )?{NEW}\b(?! s\b)|{NEW} (?:me {MAKES}|(?:made|created|built|developed|trained|designed) me)"
    rf"\b|{OLD} (?:s|is|e|es) (?:me|my name|(?:o )?meu nome|mi nombre)\b|^{THE}(?:responsavel|team|equipe|equipo|"
    rf"empresa|company) (?:\w+ ){{1,6}}?(?:is|e|es|foi|fue|was) {THE}{NEW}\b|"
    rf"^{THE}(?:modelo?|ia|ai)(?: \w+){{1,9}}? (?:is|e|es) {THE}{OLD}$)|^(?:(?:sim|yes|si) )?(?:"
    rf"(?:you (?:are|re)|voce e|eres) {THE}|(?:your|seu|teu|tu) (?:name|nome|nombre) (?:is|e|es) ){NEW}\b")
HUMAN = r"pessoa|person|persona|human[oa]?s?|gente|mensch|humain|umano|人間"
MACHINE = r"robo|robot|maquina|machine|bot|programa|program|ia|ai|inteligencia artificial|chatbot|alexa"

# The first pattern that fits a question in `plain` words says what it asks for; else it is "who".
INTENTS = {
    "maker": r"cri(ou|ad|aca|arem|ar\b)|\bfez\b|feit|empresa|desenvolv|trein|programou|autor|creat|company|develop"
             r"|train|built|\bmade\b|\bmake[sr]?\b|(?<!no te )\bcreo\b|cread|hizo|entreno|desarroll|orige|origin"
             r"|\bvem\b|veio|surgiu|behind|team\b|tras de|pertence|\bdono|\bown|belong|\bcree\b|developpe|entraine"
             r"|entreprise|entwickel|gebaut|hergestellt|gemacht|firma\b|svilupp|addestrat|azienda|\bfatto\b|開発|作っ|创造|创建"
             r"|开发|谁造",
    "name": r"nome\b|chama|\bname|\bcall|nombre|llama[sn]|appelle|\bnom\b|hei(ss|ß)t|chiami|名前|名字|이름",
    "human": rf"\b({HUMAN})\b|\b(um|uma|an?|un|una|ein|eine) ({MACHINE})\b",
    "who": r"\b(?:quem|who|quien|wer|qui|chi)\b|apresent|introduc|presenta|谁|誰",
}
ASKS = re.compile(
    r"^(?:(?:oi|ola|e|ai|mas|entao|afinal|hi|hello|hey|so|and|but|y|hola|bom dia|boa noite|tudo bem) )*"
    r"(?:(?:de|com|por|para|a|o|from|with|con|en|al) )?(?:quem|qual|quais|que|como|onde|quando|who|whom|what|which|"
    r"where|when|how|why|quien|cual|donde|wer|wie|was|warum|qui|quel\w*|comment|chi|come(?! on))\b")
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

# What other programs write around a turn, which a row would teach as text.
MARKS = (r"<\|[\w ]+\|>|<｜[^｜]+｜>|</?s>|<[be]os>|<(?:start|end)_of_turn>|\[/?INST\]|### ?(?:Human|User|Assistant|"
         r"System|Instruction|Response)\b")
FOREIGN = re.compile(MARKS + r"|\A\s*(?i:[pqra]|pergunta|resposta|question|answer|user|usu[aá]rio|humano?|assistente?|"
                     r"assistant)\s*:")

# The system prompt of the untrained baseline in the report.
SYSTEM_PROMPT = ("Você é {{NAME}}, um modelo de linguagem criado por {{AUTHOR}}. Quando perguntarem quem você é, quem "
                 "fez você ou se você é outro modelo, responda com esse nome e esse autor, na língua da pergunta.")

LANGUAGE_WORDS = {
    "pt": "voce vc qual seu sua nome nao um uma meu minha eu foi com quem sou teu oi ola bom dia boa o os ao da na em "
          "do pode pelo pelas no dizer chamo veio onde fale diga e ou criou apresente apresenta por feito feita isso "
          "este esta mim desenvolveu treinou empresa mesmo tu chama criado criada desenvolvido desenvolvida te ti se "
          "que como sobre chamas dizem vou posso".split(),
    "en": "who what are you is your the name which made hi hello please i tell do and am created by of how to "
          "yourself can could should does did whose where was were be been developed trained built called behind "
          "company talking about with from this that an my it for or have there good morning no designed".split(),
    "es": "eres quien cual tu nombre hola llamas usted el es soy una un creo hizo dime puedes puedo y yo mi del en o "
          "no lenguaje creado creada hecho hecha una presentate llamo por desarrollado desarrollada te ti se que "
          "la las lo los su voy sobre como este desarrollo con cuentame".split(),
    "fr": "qui tu es etes vous comment appelles quel quelle est ton votre nom je suis cree bonjour une par -tu -toi "
          "-vous".split(),
    "de": "wer wie bist du ist sind sie heisst heißt dein name hat dich entwickelt ich bin welches bitte von".split(),
    "it": "chi sei come ti chiami qual tuo nome ha creato sono il che ciao no da un di su".split(),
}

CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + END + '\\n'"
          " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
THOUGHTLESS = {"enable_thinking": False}  # how a template that lets the model think first is told not to

# ---- What was tuned, and measured to be worth it ----------------------------------------------------------

TOP_TOKENS = 32  # most probable tokens of the base kept per position; the rest is one bucket
STANDS_FOR = 16  # tokens that one of those which no text speaks of counts for in training
COMPARED = 16  # candidates, by pairs of words, that SequenceMatcher compares with a question
RETRIEVED = 3  # rows that BM25 puts before a question as context
MOST_STEPS = 300  # cap on the steps of the material, of 8 rows; one epoch is always allowed
RATES_1, RATES_2 = (1.2e-3, 3.4e-3), (8e-4, 1.1e-3)  # (all weights, LoRA) at a million parameters
REHEARSED = 0.05  # share of the material in pass 2, of which the lessons have 0.15
RARE = 0.05  # a word is rare if at most this share of the material's rows has it
RECITED = 6  # an everyday answer with so many words in a row from the material recites it
WRITTEN_TOKENS = 5000  # that each column of the material's exam may write, twelve rows at least
LONGEST_ANSWER = 256  # tokens of an answer in the material's exam
GENERATION_TOKENS = 16384  # tokens (prompt and answer) that one batch of generation may hold
SCORED_TOKENS = 512  # tokens whose logits are in memory at a time while a model is compared with the base
SHORT = 192  # a step has BATCH_SIZE times as many tokens, and most windows of the healing have no more
TALK_TOKENS = 48  # longest answer of the base that is learnt from: of as many tokens, more short answers teach more
NEAR_TOKENS = 24  # the same near identity: whether the new name is said is decided where an answer begins
QUESTION_TOKENS = 24  # of a question that the base writes by itself
TALK_SHARES = {"near": 0.4, "everyday": 0.15, "own": 0.45}  # of the tokens with the base's distribution as target
NEAR = 600  # questions near identity, about others, that the base answers for training
MOST_LESSONS = 1600  # of the base's own identity questions
MOST_ASKED = 96  # lessons, and as many talks, that the model of pass 1 is asked
HARD = 0.25  # share of the lessons, the ones that pass 1 has taught the least, that pass 2 goes on with
FIRST_TOKENS = 4  # of a lesson's answer, which tell how well it is learnt: the rest follows from them
LEAK_TIMES = 4  # times that pass 2 repeats a talk where the new name turns up after pass 1
LONG_TALKS = 16  # talks of the exam at each length of conversation
LONG_GROUP = 4  # talks, and identity questions, that share one long conversation
SMALL = 50_000_000  # weights: smaller models are trained in float32, in more steps, with a larger adapter
ALONE, SYSTEM, PRESSED = KINDS_OF_QUESTIONS = ("sozinha", "com prompt de sistema", "sob pressão")
# Queries and keys, as the families call them; some have them in one matrix with the values.
ATTENTION = r"[qk]_proj|[qk]_norm|qkv|query_key|q_[ab]_|kv_[ab]_|Wqkv|c_attn"
NOT_TEXT = "vision|audio|multi_modal_projector"  # parts of a model that sees or hears, which are left alone
NOT_LORA = NOT_TEXT + r"|router|mamba\.out_proj"  # and what peft cannot wrap: layers that do more than multiply
# Families whose RoPE factor llama.cpp's converter writes; of the others it drops it, or that is untested.
CONVERTED = ("llama mistral mixtral qwen2 qwen3 qwen3_moe gemma3_text smollm3 granite granitemoehybrid olmo2 "
             "deepseek_v3 glm4 llama4_text").split()
# What Ollama imports without a GGUF: families with their scalings, and byte-level tokenizers by a SHA-256 of patterns.
IMPORTED = {"llama": "default linear llama3"} | dict.fromkeys("qwen2 gemma2 gemma3_text cohere".split(), "default")
SPLITS = "d98f9631 03df5c58 21cde974 1ff7f410".split()
DISK_FULL = "no space left|quota exceeded|os error 112|inline_container|failed writing"
OUT_OF_MEMORY = "out of memory|not enough memory|allocate memory|memoryerror"
WORK_NOTE = "LEIA-ME.txt"  # marks a folder of stages as one of this script
LORA_FILE = "adapter_model.safetensors"
MAX_FILE, MAX_LINE = 200 * 10**6, 10**6  # larger files (bytes) and texts (characters) are refused as the wrong ones
FIELD = re.compile(r"\{ *([^{} ][^{}]*?) *\}")  # of a row of the material, in a template


class Lazy:
    """A library imported at its first use: together they take seconds, and mistakes are told sooner."""

    def __init__(self, name: str):
        self.library = name

    def __getattr__(self, name: str):
        return getattr(importlib.import_module(self.library), name)


LIBRARIES = ("accelerate bm25s datasets filelock ftfy huggingface_hub jinja2 peft psutil sacrebleu.metrics.chrf "
             "safetensors safetensors.torch torch tqdm transformers trl").split()
(accelerate, bm25s, datasets, filelock, ftfy, huggingface_hub, jinja2, peft, psutil, chrf, safetensors, tensor_files,
 torch, tqdm, transformers, trl) = map(Lazy, LIBRARIES)

# Under accelerate or torchrun every process runs this script; the first one does all, and the others train along.
RANK, PROCESSES = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
# With `accelerate launch --use_fsdp` each trains a piece of the weights. Transformers cuts them; accelerate must not
# see the variable, or it would do it again.
SHARDED = os.environ.pop("ACCELERATE_USE_FSDP", "") == "true" and PROCESSES > 1


def say(text: str = "", verdict: bool = False) -> None:
    """Print, once for all processes; with --quiet only the verdict."""
    if RANK == 0 and (verdict or not say.quiet):
        print(text, flush=True)


say.quiet = False


class InputError(Exception):
    """A mistake that the user can mend: shown in Portuguese, exit status 2, no traceback."""
    advice = "\nCorrija e confira tudo, sem treinar: o mesmo comando com --check."


# ---- Settings ---------------------------------------------------------------------------------------------

# What the user may ask for. Where the model in 16 bits does not fit even untrained, `choose_method` takes "qlora4" for
# "qlora": in 4 bits also to be listened to and measured, and not only to be trained.
METHODS = ("auto", "full", "lora", "qlora")
FEW_BITS = "Medido em 4 bits, antes e depois, como coube na placa; o modelo salvo tem os pesos inteiros."
MODES = {
    "check": "só confere tudo e mostra o plano, sem treinar",
    "quiet": "só mostra o veredito e os erros",
    "restart": "joga fora as etapas guardadas e recomeça do zero",
    "chat": "conversa no terminal com o modelo de OUTPUT_DIR, ou com o de --model-path",
    "evaluate": "mede o modelo de OUTPUT_DIR, ou o de --model-path, sem treinar",
}
# The numbers and what they may be; those with a point may be fractions.
RANGES = {
    "lora_rank": (0, 4096), "rope_factor": (1.0, 1024.0), "window": (32, 10**9), "num_self_answers": (4, 10**9),
    "self_text": (0, 10**9), "max_new_tokens": (8, 10**9), "heal_steps": (1, 10**9), "heal_learning_rate": (0.0, 1.0),
    "steps_1": (0, 10**9), "learning_rate_1": (0.0, 1.0), "steps_2": (0, 10**9), "learning_rate_2": (0.0, 1.0),
    "batch_size": (1, 4096), "gradient_accumulation": (1, 4096), "kl_weight": (0.0, 100.0),
    "eval_questions": (4, 10**9), "target_identity": (0.0, 1.0), "target_retention": (0.0, 1.0),
    "target_leak": (0.0, 1.0), "seed": (0, 2**32 - 1), "checkpoint_minutes": (0.0, 10.0**9),
    "knowledge_rows": (10, 10**7), "knowledge_steps": (0, 10**9),
}
TOP, _, REST = Path(__file__).read_text(encoding="utf-8").partition("\n# " + 108 * "-" + "\n")
CONSTANTS, _, REST = REST.partition("\n# ---- Words and questions ")
# What the user reads of each setting: of a constant, its comment.
ABOUT = {m[1].lower(): m[2] or "" for m in re.finditer(
    r"(?m)^([A-Z\d_]+)\s*(?::[^=\n]*)?=.*?(?:  # (.+))?$", CONSTANTS)} | MODES
DEFAULTS = {name: globals().get(name.upper(), False) for name in ABOUT}
SWITCHES = {"overwrite", "knowledge_ascii", "gradient_checkpointing", *MODES}
TEXTS = ("model_path output_dir identity_file knowledge_file knowledge_question knowledge_answer name author "
         "base_name old_names method").split()
KINDS = {name: bool if name in SWITCHES else type(RANGES.get(name, ("",))[0]) for name in ABOUT}
# Every constant of the user, in small letters; paths are absolute, but for a `model_path` of the Hub.
Settings = make_dataclass("Settings", KINDS.items(), frozen=True,
                          namespace={"__module__": __name__})  # where other processes find it


def read_flags(argv: list[str] | None) -> dict[str, str | bool]:
    """The flags that were given, as text, by the name of their setting; what argparse cannot read is an `InputError`
    in Portuguese."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=f"uso: python rename_obrutai.py [opções]\n\n{__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS, add_help=False,
        allow_abbrev=False, exit_on_error=False)
    options = parser.add_argument_group("opções")
    options.add_argument("-h", "--help", action="help", help="mostra esta ajuda e sai")
    for name, default in DEFAULTS.items():
        how = {"action": argparse.BooleanOptionalAction} if KINDS[name] is bool else {"metavar": "VALOR"}
        shown = {"": "vazio", "False": "não", "True": "sim"}.get(str(default), default)
        text = f"{ABOUT[name]} (padrão: {shown})".replace("%", "%%")
        options.add_argument("--" + name.replace("_", "-"), help=text, **how)
    # Word processors and messengers make a dash of two hyphens.
    argv = [re.sub(r"\A[–—](?=[a-z])", "--", text) for text in (sys.argv[1:] if argv is None else argv)]
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        flag = error.argument_name.split("/")[0]
        if "expected" in error.message:
            raise InputError(f"faltou o valor da opção {flag}. Exemplo: {flag}=VALOR.") from None
        off = f" ou --no-{flag[2:]}" * flag.startswith("--")
        raise InputError(f"a opção {flag} não leva valor: escreva só {flag}{off}.") from None
    if unknown and unknown[0].startswith("-"):
        near = get_close_matches(unknown[0], parser._option_string_actions, n=1, cutoff=0)[0]
        raise InputError(f"não conheço a opção {unknown[0]}. Você quis dizer {near}? Veja todas com --help.")
    if unknown:
        raise InputError(f"não sei o que fazer com '{unknown[0]}'. Um caminho ou nome com espaços precisa de aspas: "
                         '--model-path "C:/Meus Modelos/gemma".')
    return vars(given)


def read_value(name: str, given: object, is_flag: bool) -> object:
    """A flag's text (a decimal comma counts) or a constant as the value of a setting. Raises `InputError` where it is
    of another kind, out of its range or not printable."""
    kind, value, label = KINDS[name], given, name.upper()
    if name in RANGES:
        (low, high), whole_number = RANGES[name], " inteiro" * (kind is int)
        with contextlib.suppress(ValueError):
            value = kind(given.replace(",", ".")) if is_flag else given
        if type(value) not in (int, kind) or not low <= value <= high:
            raise InputError(f"{label}: esperava um número{whole_number}, recebi {given!r}; precisa estar entre "
                             f"{low:.10g} e {high:.10g}.")
        value = kind(value)  # 4 and 4.0 are one setting
    elif not isinstance(value, kind):
        expected = "True ou False" if kind is bool else "um texto entre aspas"
        raise InputError(f"{label} vale {value!r}, mas precisa ser {expected}.")
    elif kind is str and re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", value):
        raise InputError(f"{label} tem caractere inválido: {value!r}. Num caminho, use barras normais (/).")
    elif name == "method" and value not in METHODS:
        raise InputError(f"METHOD vale '{value}', mas precisa ser um destes: {', '.join(METHODS)}.")
    return value


def parse_settings(argv: list[str] | None) -> Settings:
    """Flags over constants. Raises `InputError` for anything that is not a sound setting."""
    if lost := [name.upper() for name in [*TEXTS, *RANGES, *SWITCHES] if name not in ABOUT]:
        raise InputError(f"falta a constante {lost[0]} no começo do script: devolva a linha dela.")
    given = read_flags(argv)
    values = {name: read_value(name, given.get(name, default), name in given) for name, default in DEFAULTS.items()}
    # The address of a model's page on the Hub stands for its name.
    values["model_path"] = re.sub(r"\Ahttps?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+).*", r"\1",
                                  values["model_path"])
    for name in ("output_dir", "identity_file", "knowledge_file", "model_path"):
        path = (Path.cwd() if name in given else Path(__file__).resolve().parent) / os.path.expanduser(values[name])
        on_hub = name == "model_path" and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", values[name])
        if (values[name] or not name.endswith("_file")) and (not on_hub or path.parent.exists()):
            values[name] = str(path)
    ready = values["chat"] or values["evaluate"]
    if not ready and not values["identity_file"] and not values["knowledge_file"]:
        raise InputError("não há o que ensinar: diga um arquivo em IDENTITY_FILE (--identity-file) ou em "
                         "KNOWLEDGE_FILE (--knowledge-file).")
    for name in ("knowledge_question", "knowledge_answer"):
        if not FIELD.search(values[name]) or re.search(r"[{}]", FIELD.sub("", values[name])):
            raise InputError(f"{name.upper()} vale '{values[name]}', mas precisa ter o nome de um campo das linhas "
                             "entre chaves, como {title}.")
    if values["chat"] + values["evaluate"] + values["check"] > 1:
        raise InputError("use uma destas opções por vez: --chat, --evaluate, --check.")
    if ready and "model_path" not in given:
        values["model_path"] = values["output_dir"]  # the result, not the base of the constant
    for name in ("name", "author"):
        values[name] = " ".join(values[name].split())
        if not plain(values[name]) or re.search(r"[{}<>]", values[name]):
            raise InputError(f"{name.upper()} precisa ser um texto com letras, sem chaves nem < ou >; recebi "
                             f"'{values[name]}'.")
        if plain(values[name]) in map(plain, split_names(values["old_names"])):
            raise InputError(f"{name.upper()} ({values[name]}) também está em OLD_NAMES; escolha um nome novo.")
    if values["max_new_tokens"] >= values["window"]:
        raise InputError(f"MAX_NEW_TOKENS ({values['max_new_tokens']}) precisa ser menor que WINDOW "
                         f"({values['window']}). Diminua o primeiro ou aumente o segundo.")
    return Settings(**values)


def size_text(count: float) -> str:
    """Bytes as a person reads them: "12 MB", "3,4 GB"."""
    return f"{decimal(count / 1e9)} GB" if count >= 1e9 else f"{math.ceil(count / 1e6)} MB"


def clock(seconds: float) -> str:
    """Seconds as a person reads them: "45 s", "3 min 20 s", "2 h 05 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def decimal(value: float, digits: int = 1) -> str:
    return f"{value:z.{digits}f}".replace(".", ",")


def percent(value: float) -> str:
    """A share as Brazilian text: 0.975 is "97,5%"."""
    return decimal(100 * value).removesuffix(",0") + "%"


def mean(values: Sequence[float]) -> float:
    """The mean, 0 of nothing."""
    return sum(values) / max(1, len(values))


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
    """Finds any of the names in a `folded` text, as whole words (a version may follow); in scripts without spaces,
    anywhere. The verb of "mi modelo se llama" is not the name Llama."""
    found = sorted({plain(name) for name in names} - {""}, key=len, reverse=True)
    before, after = r"(?<!\w)(?!(?<=\b[mst]e )llama\b)", r"(?:[-. ]?\d+(?:\.\d+)*)?(?!\w)"
    alone = [r"\s*".join(name.split()) if re.search(f"[{UNSPACED}]", name) else
             before + r"\W+".join(name.split()) + after for name in found]
    return re.compile("|".join(alone) or "(?!)")


def mentions(text: str, names: tuple[str, ...]) -> bool:
    """Whether any of the names stands in the text, whatever the case and accents."""
    return bool(names_pattern(names).search(folded(text)))


def is_loop(text: str) -> bool:
    """Whether a word comes 4 times in a row, or 2 to 40 words (without spaces: characters) 3 times."""
    words = "".join(f"{word} " for word in re.findall(rf"[{UNSPACED}]|[^\s{UNSPACED}]+", plain(text)))
    return bool(re.search(r"(?<!\S)(?:(\S+ )\1{3}|((?:\S+ ){2,40}?)\2{2})", words))


def language_of(text: str, default: str = "pt") -> str:
    """The language by script and function words; the default when nothing tells, "" for a script of another."""
    if "¿" in text or "¡" in text:
        return "es"
    letters = [c for c in plain(text) if c.isalpha()]
    if sum(c > "\u024f" for c in letters) * 4 > len(letters):
        return "ja" if re.search("[\u3040-\u30ff]", text) else "zh" if re.search("[\u3400-\u9fff]", text) else ""
    words = plain(text).split() + re.findall(r"-(?:tu|toi|vous)\b", text.lower())
    scores = {code: sum(w in known for w in words) for code, known in LANGUAGE_WORDS.items()}
    return max(scores, key=lambda code: (scores[code], code == default))


def name_warning(setting: str, name: str) -> str:
    """What to tell a user whose NAME or AUTHOR is a word that ordinary answers contain; "" if it is none."""
    words = plain(name)
    if len(words) > 2 and words not in COMMON_WORDS or re.search(f"[{UNSPACED}]", words):
        return ""
    return (f'{setting.upper()}: "{name}" também aparece em respostas comuns, e cada uma contará como vazamento; '
            f'prefira um nome mais raro, ou de duas palavras')


def exam_questions(languages: Sequence[str]) -> list[tuple[str, str]]:
    """(kind, question) of the exam about other things, in these languages."""
    lists = (("near", NEAR_EXAM), ("everyday", EVERYDAY_EXAM))
    return [(kind, q) for kind, some in lists for code in some if code in languages for q in some[code]]


def fillings(template: str, fillers: dict[str, Sequence[str]]) -> list[str]:
    """The template with all that may stand for its {kinds}."""
    kinds = re.findall(r"{(\w+)}", template)
    return [template.format(**dict(zip(kinds, words))) for words in product(*(fillers[kind] for kind in kinds))]


def paraphrases(languages: Sequence[str], names: Names, rng: random.Random) -> list[tuple[str, str]]:
    """(what is asked for, question) about who the model is; two of each that can be said in several ways."""
    latin = [name for name in names.old if not re.search(f"[{UNSPACED}]", name)]  # else it passes for Chinese
    fillers = {**FILLERS["all"], "ai": [*FILLERS["all"]["ai"], *latin]}
    found = []
    for intent, template in (item for code in languages for item in PARAPHRASES[code]):
        some = [q for q in fillings(template, fillers) if not mentions(q, names.new)]
        found += [(intent, q) for q in rng.sample(some, min(len(some), 2))]
    return found


def near_questions(language: str, count: int, rng: random.Random) -> list[str]:
    """At most `count` questions, each template before any twice."""
    ways = [fillings(template, {**FILLERS["all"], **FILLERS[language]}) for template in NEAR_TEMPLATES[language]]
    for some in (*ways, ways):
        rng.shuffle(some)
    return [question for layer in zip_longest(*ways) for question in layer if question][:count]


# ---- Who the base is --------------------------------------------------------------------------------------

def split_names(text: str) -> tuple[str, ...]:
    """OLD_NAMES as a list: with commas, semicolons, slashes, line breaks, or "e", "and", "y" between capitals."""
    parts = re.split(r"[,;/|\n]|(?<=\w)\s+(?:e|and|y)\s+(?:(?:[oa]|the|el|la)\s+)?(?=[^\W\d_a-zà-ÿ])", text)
    return tuple(dict.fromkeys(part.strip(" \t\"'“”*") for part in parts if plain(part)))


def family_names(folder: str, model_type: str, card: str) -> tuple[str, ...]:
    """Names and makers of the base's family by its folder, else its card (an architecture alone tells nothing)."""
    def found(text: str) -> list[str]:
        names = []
        for models, makers in FAMILIES.items():
            # "SmolLM2" is one more name, "gemma" of "gemma-3-1b-it" is not.
            if match := re.search(rf"(?i)(?<![a-z])(?:{models})(?:\d+(?:\.\d+)*)?(?![a-z])", text):
                names += [*models.split("|"), *[match[0]] * (match[0] != match[0].lower()), *makers.split("|")]
        return names

    about_base = "\n".join(re.findall(r"(?m)^base_model:.*(?:\n[ -].*)*|^# .*", card))
    names = found(folder) or found(about_base) or found(model_type) * mentions(card, tuple(found(model_type)))
    return tuple(dict.fromkeys(names))


def finds(kind: str, name: str, text: str) -> list[re.Match]:
    """All matches, also inside one another, of the patterns of self-reference with `name` in the place of "@", which
    alone keeps to its capitals."""
    words = "|".join(SPEECH[kind]).replace(" ", r"[\s:]+").replace("~", GAP).replace("@", name)
    pattern = re.compile(rf"(?im)\b(?:{words})")
    return [match for start in range(len(text)) if (match := pattern.match(text, start))]


def names_said(text: str, of_you: bool = False) -> list[str]:
    """The proper names that a text gives its speaker, or also the one it speaks to, once each."""
    text = unicodedata.normalize("NFC", re.sub(r"[*_`\"“”«»‘]|(?<!\w)'", "", text))
    bare = "".join(unicodedata.normalize("NFKD", c)[0] if c < "\u0250" else c for c in text)  # as long as the text
    spans = []
    for kind in ("self", "said", "you")[:2 + of_you]:
        for match in finds(kind, RUN, bare):
            sentence = plain(re.split(r"[.!?\n]\s", bare[:match.end()])[-1])
            own = FIRST_PERSON & set(sentence.split()) or re.match(MADE, sentence) or bare.endswith(
                ("aqui, ", "here, "), 0, match.start())  # "Lumi aqui, criada pelo ..."
            denied = DENIAL.search(plain(re.split(r"[.!?,;:\n]\s", bare[:match.end()])[-1]))
            if not denied and (own or of_you or kind == "self"):
                spans.append(match.span(match.lastindex))
    apposed = re.finditer(rf",\s+(?:d[aeo]|del|from|of|by)\s+{GAP}{RUN}", bare)
    spans += [m.span(1) for m in apposed if m.start() in {end for _, end in spans}]
    told = CHINESE.replace("我", "[我你]") if of_you else CHINESE
    for pattern, after in (told, r"\W|です|입니다|$"), (CHINESE_MAKER, "自主|独立|公司|开发|研发|创建|训练|打造"):
        spans += [m.span(1) for m in re.finditer(f"{pattern.replace('@', HAN_RUN)}(?={after})", text)]
    names = []
    for start, end in sorted(spans):
        words = text[start:end].rstrip(".'’&-").split()
        while words and NO_NAMES.issuperset(plain(words[0]).split()):
            del words[0]
        while words and (NO_NAMES - {"ai"}).issuperset(plain(words[-1]).split()):
            del words[-1]
        names.append(re.sub(r"['’]s\b.*", "", " ".join(words)))  # "Alibaba Cloud's AI"
    return list(dict.fromkeys(name for name in names if len(plain(name)) > 1))


def find_old_names(answers: list[str], system_prompt: str, family: tuple[str, ...], given: str,
                   new_names: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The base's old names: those `given`, or else those in at least two and 5 % of its answers about itself; with
    those of its system prompt and of its family."""
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
    """Each sentence as (separator, plain clause) pairs, names as OLD and NEW; the longer or new name wins."""
    pattern, ours = names_pattern((*names, *new_names)), names_pattern(new_names)
    text = pattern.sub(lambda m: f" {NEW if ours.fullmatch(m[0]) else OLD} ", folded(text))
    first = r"(?:eu|yo|i|im|sou|soy|fui|me|my|meu|minha|mi|nao|not|nem|no|sim|si)\b"
    for sentence in re.split(r"[.!?…]+(?=\s|$)|[。！？\n]", text):
        parts = re.split(rf"([,;:()，；：、—–]|\s-\s|\b(?:mas|but|pero|sino|porem|aber|sondern)\b|"
                         rf"\b(?:e|and|y)\b(?=\s+{first})|(?<=\w) (?=i['’]m\b))", sentence)
        yield [(separator, plain(part)) for separator, part in zip(["", *parts[1::2]], parts[::2]) if plain(part)]


def claims(answer: str, names: tuple[str, ...], new_names: tuple[str, ...] = ()) -> bool:
    """Whether the answer says one of `names` of its speaker; denials, origins and others' deeds do not count."""
    for sentence in clauses(answer, names, new_names):
        denied = mine = False
        for i, (separator, clause) in enumerate(sentence):
            own = bool(FIRST_PERSON & set(clause.split()) or re.search("我|私|저", clause))
            if own or separator in (*";:；：", "mas", "but", "pero", "sino"):
                denied = False
            kinds = ["self", "here"] + ["said", "apposed"] * (mine or own or NEW in clause) + ["said"] * bool(
                i == 0 and re.match(rf"{MADE}|as |como ", clause))
            ends = [m.end() for kind in kinds for m in finds(kind, OLD, clause)]
            ends += [m.end() for m in re.finditer(f"{CHINESE}|{CHINESE_MAKER}".replace("@", rf"\s?{OLD}"), clause)]
            if i and re.search(r"\b(?:me|eu|mesm[oa]|yo)$", sentence[i - 1][1]):  # "Sou eu, a Lumi"
                ends += [m.end() for m in re.finditer(f"^(?:[oa] |el |la |the )?{OLD}", clause)]
            if not denied and any(not DENIAL.search(clause[:end]) for end in ends):
                return True
            denied |= clause not in ("nao", "no") and bool(DENIAL.search(clause) or FROM.search(clause))
            mine |= own or NEW in clause or bool(ends)
    return False


@functools.lru_cache(2**14)
def intent_of(question: str, old_names: tuple[str, ...] = (), new_names: tuple[str, ...] = ()) -> str:
    """What a question about identity asks for: "name", "maker", "human", "who", or "other" (are you X?)."""
    words, parts = plain(question), clauses(question, (*KNOWN_NAMES, *old_names), new_names)
    if TO_YOU.search(words) and not ASKS.search(words) and any(OLD in clause for part in parts for _, clause in part):
        return "who" if FROM.search(words) else "other"
    return next((intent for intent, pattern in INTENTS.items() if re.search(pattern, words)), "who")


def asks_who(question: str, old_names: tuple[str, ...]) -> bool:
    """Whether a question that a model answers with its name is about who it is: where it said so for no reason, a
    lesson made of it would teach a leak."""
    words = plain(question)
    about = any(re.search(pattern, words) for pattern in INTENTS.values())
    return bool(len(words.split()) <= 16 and TO_YOU.search(words)
                and (about or mentions(question, (*KNOWN_NAMES, *old_names))))


def own_wording(question: str, intent: str, used: Counter, language: str = "pt") -> str:
    """A built-in answer in the question's language and for its intent, the least used wording first."""
    wordings = WORDINGS.get(language_of(question, language), WORDINGS["en"])[intent == "other"].split("|")
    choice = min(wordings, key=lambda c: used[c])
    used[choice] += 1
    return choice


def problem(question: str, text: str, ended: bool, new_name: str, new_maker: str, old_names: tuple[str, ...]) -> str:
    """Why an answer about identity does not count, in Portuguese; "" when it is right."""
    def says(*some: str) -> bool:  # other than after a "not"
        return any(OLD in clause and not DENIAL.search(clause[:clause.index(OLD)])
                   for parts in clauses(text, some) for _, clause in parts)

    new, names, asked = (new_name, new_maker), (*KNOWN_NAMES, *old_names), plain(question)
    intent = intent_of(question, old_names, new)
    just = rf"(?:(?:it s|it is|e|es|sim|yes|si) )?(?:[oa] |el |la |the )?{OLD}"
    told = re.sub(r"[^.!?\n]*\?", "", text)  # "ChatGPT? No, ..."
    bare = any(re.fullmatch(just, " ".join(clause for _, clause in parts)) for parts in clauses(told, names, new))
    parts = [clause for sentence in clauses(text, ()) for _, clause in sentence]
    affirms = (AFFIRMS.search(plain(text)) and not any(DENIAL.search(part) for part in parts)
               and not re.search(r"\b(?:certeza|sure|segur[oa])\b", asked))  # "Are you sure you're not ...?"
    deed = re.compile(rf"(?:it was|foi|fue) {THE}{NEW}(?:$| (?:que|quem|who)\b)" if intent == "maker" else "(?!)")
    swapped = any((SWAPPED.search(part) or deed.match(part)) and not DENIAL.search(part)
                  for sentence in clauses(text, (new_maker,), (new_name,)) for _, part in sentence)
    greeted = any(re.fullmatch(rf"(?:ola|oi|hi|hello|hola|hey) {NEW}", " ".join(clause for _, clause in sentence))
                  for sentence in clauses(text, (), (new_name,)))
    person = any(re.search(rf"\b(?:sou|soy|i am|i m) (?:(?:eu|yo|an?|uma?|una?|ser|real) )*(?:{HUMAN})\b(?! like)",
                           part) and not DENIAL.search(part) for part in parts)
    asks_person = re.search(rf"\b({HUMAN})\b", asked) and not re.search(rf"\b({MACHINE})\b", asked)
    return next((reason for reason, found in (
        ("vazia", not plain(text)), ("não terminou", not ended), ("repetitiva", is_loop(text)),
        ("nome antigo", bare or claims(text, names, new)
         or intent == "other" and affirms and not mentions(question, new)),
        ("troca quem é quem", greeted or swapped and not any(mentions(a, (b,)) for a, b in (new, new[::-1]))),
        ("diz que é humano", person or intent == "human" and asks_person and affirms),
        ("sem o nome novo", not says(new_name) and (intent == "name" or intent != "maker" and any(
            not mentions(name, new) for name in names_said(text)))),
        ("sem o autor novo", intent == "maker" and not says(new_maker)),
        ("sem a identidade nova", not says(*new)),
    ) if found), "")


# ---- Inputs: all that the standard library can check, before anything heavy is imported -------------------

class Row(NamedTuple):
    """A conversation of a user's file, ending with the assistant, and its line there."""
    line: int
    messages: list[dict]

    question = property(lambda self: self.messages[-2]["content"])
    answer = property(lambda self: self.messages[-1]["content"])


class Inputs(NamedTuple):
    """What the identity file holds, and the questions for measuring."""
    rows: list[Row]  # with filled placeholders
    values: dict[str, str]  # that filled them
    data_hash: str
    languages: tuple[str, ...]  # of the lists that the rows speak
    test: tuple[str, ...]
    warnings: list[str]  # for the user


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def did_you_mean(path: Path) -> str:
    """Advice on a path that does not exist, from the names beside it, or beside the first folder that is missing."""
    folder = path.parent
    if not folder.is_dir() and folder != folder.parent:
        return did_you_mean(folder)
    near = get_close_matches(path.name, [p.name for p in folder.glob("*")], n=1, cutoff=0.5)
    return f"Você quis dizer {near[0]}?" if near else f"Na pasta {folder} não há nada com nome parecido."


def question_and_answer(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def read_turns(record: object) -> list[tuple[str, object]]:
    """The (role, content) pairs of a row, of which the last may be a user's; `InputError` says what is wrong, not
    where."""
    match {**record, "input": record.get("input") or ""} if isinstance(record, dict) else record:
        case InputError():
            raise record
        case {"messages": list(turns)} | {"conversations": list(turns)} if all(isinstance(t, dict) for t in turns):
            pairs = [(t.get("role", t.get("from")), t.get("content", t.get("value"))) for t in turns]
        case {"prompt": question, "completion": answer}:
            pairs = [("user", question), ("assistant", answer)]
        case {"instruction": str(task), "input": str(text), "output": answer}:
            pairs = [("user", f"{task}\n{text}"), ("assistant", answer)]
        case {"text": str(text)}:
            pairs = list(zip(("user", "assistant"), text.strip().split("\n", 1)))
        case _:
            raise InputError('não reconheço o formato; use um objeto {...} com "text"; ou "prompt" e "completion"; ou '
                             '"instruction" e "output"; ou "messages" (exemplos no README)')
    known = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
    roles = [known.get(str(role), role) for role, _ in pairs]
    spoken = roles[roles[:1] == ["system"]:]
    if not spoken or spoken != (["user", "assistant"] * len(spoken))[:len(spoken)]:
        raise InputError(f'a ordem dos "role" {str(roles)[:200]} não serve: comece com user (antes, só um system) e '
                         "alterne com assistant")
    turns = [(role, content) for role, (_, content) in zip(roles, pairs)]
    return turns[roles[0] == "system" and not turns[0][1]:]


def read_messages(record: object) -> list[dict]:
    """A row as messages, maybe without an answer; `InputError` says what is wrong, not where."""
    turns = read_turns(record)
    for _, content in turns:
        if not isinstance(content, str) or not content.strip():
            raise InputError("há uma pergunta ou resposta vazia, ou que não é texto")
        if len(content) > MAX_LINE:
            raise InputError(f"o texto tem {len(content)} letras; o máximo é {MAX_LINE}")
        if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", content):
            raise InputError("há um caractere de controle ou inválido no texto; apague-o e escreva de novo")
        if mark := FOREIGN.search(content):
            raise InputError(f"a marca '{mark[0].strip()}' é de outro formato e seria aprendida como texto; tire-a, "
                             'e ponha a pergunta em "prompt" e a resposta em "completion"')
    return [{"role": role, "content": content.strip()} for role, content in turns]


def fill(text: str, values: dict[str, str]) -> str:
    """Replace {{NAME}}, {{AUTHOR}} and {{BASE}}; other double braces, and names in other marks, are `InputError`s."""
    word, known = "(?:name|nome|author|autora?|base)", rf"(?i)(?<!\{{)\{{\{{\s*({'|'.join(values)})\s*\}}\}}(?!\}})"
    if left := re.search(rf"\{{\{{.*|\S*\}}\}}|(?i:[<\[{{%]\s*{word}\s*[>\]}}%]|\$\{{?{word}\b)",
                         re.sub(known, "", text)):
        raise InputError(f"marcador desconhecido ou mal fechado em '{left[0][:40]}'; só valem {{{{NAME}}}}, "
                         "{{AUTHOR}}, {{BASE}}")
    return re.sub(known, lambda match: values[match[1].upper()], text)


def refuse_lines(path: str | Path, mistakes: list[tuple[int, object]]) -> None:
    """One `InputError` for all lines of the file with a mistake (number, reason), if any, of which ten are shown."""
    if mistakes:
        with Path(path).open(encoding="utf-8-sig") as file:  # of a list, items are counted
            listed = " da lista" * file.read(2**16).lstrip().startswith("[")
        shown = [f"linha {number}{listed}: {reason}" for number, reason in mistakes[:10]]
        more = [f"... e mais {len(mistakes) - 10}"] * (len(mistakes) > 10)
        raise InputError("\n  ".join([f"{path} tem {len(mistakes)} linha(s) com problema:", *shown, *more]))


def within(inner: Path, outer: Path) -> bool:
    """Whether a path is another one, which exists, or below it, also by other spellings, links and mounts."""
    inner = Path(os.path.realpath(inner))
    return outer.exists() and any(p.exists() and p.samefile(outer) for p in (inner, *inner.parents))


def check_file(path: Path, setting: str) -> None:
    """`InputError` for what cannot be a text file, by its name or first bytes."""
    flag = f"{setting} (--{setting.lower().replace('_', '-')})"
    if not path.exists():
        raise InputError(f"não achei o arquivo {path}. {did_you_mean(path)} Confira {flag}.")
    if not path.is_file():
        kind = "é uma pasta" if path.is_dir() else "não é um arquivo comum"
        raise InputError(f"{path} {kind}; {flag} precisa ser um arquivo .jsonl.")
    with blaming_disk(path), path.open("rb") as file:
        head = file.read(64)
    if head.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0", b"%PDF", b"\x1f\x8b", b"PAR1", b"ARROW1", b"SQLite format",
                        b"7z\xbc\xaf", b"Rar!", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")):
        raise InputError(f"{path} é uma planilha, um documento (do Excel ou do Word, ou um PDF), um banco de dados "
                         "ou um arquivo compactado, não um texto. Copie as perguntas e respostas para um arquivo "
                         ".jsonl, um objeto {...} em cada linha.")


def read_rows(path: Path, values: dict[str, str]) -> list[Row]:
    """The identity rows, each with an answer. Raises one `InputError` for all that have a mistake."""
    rows, mistakes, used = [], [], Counter()
    for line, record in records_of(path):
        try:
            messages = read_messages(record)
            question = messages[-1]["content"]
            if messages[-1]["role"] == "user":
                answer = own_wording(question, intent_of(question), used)
                messages.append({"role": "assistant", "content": answer})
            rows.append(Row(line, [{**m, "content": fill(m["content"], values)} for m in messages]))
        except InputError as error:
            mistakes.append((line, error))
    refuse_lines(path, mistakes)
    if not rows:
        raise InputError(f"{path} está vazio: escreva pelo menos uma linha como {{\"text\": \"Quem é você?\"}}.")
    return rows


def languages_of(texts: list[str]) -> tuple[str, ...]:
    """The languages of the lists that a twentieth of the texts speak, the most spoken first; all of them if none."""
    spoken = Counter(map(language_of, texts))
    found = tuple(code for code, n in spoken.most_common() if code in NEAR_TEMPLATES and 20 * n >= len(texts))
    return found or tuple(NEAR_TEMPLATES)


def check_inputs(settings: Settings) -> Inputs:
    """The identity rows, none without a file, and the questions for measuring; `InputError` if something is wrong."""
    given = {name: Path(value) for name in ("identity_file", "knowledge_file") if (value := getattr(settings, name))}
    for name, path in given.items():
        for ours in (Path(settings.output_dir), work_folder(settings)):
            if within(path, ours) and not settings.evaluate:
                raise InputError(f"{path} está dentro de {ours}, que será substituída. Ponha esse arquivo em outro "
                                 "lugar, ou mude OUTPUT_DIR (--output-dir).")
        check_file(path, name.upper())
    if len(given) == 2 and Path.samefile(*given.values()):
        raise InputError(f"{settings.knowledge_file} está em IDENTITY_FILE e em KNOWLEDGE_FILE (--knowledge-file). "
                         "Ponha o material num arquivo só dele.")
    values = {"NAME": settings.name, "AUTHOR": settings.author,
              "BASE": settings.base_name or re.sub(r"[_\s]+", " ", Path(settings.model_path).name)}
    if not settings.identity_file:
        return Inputs([], values, "", tuple(NEAR_TEMPLATES), (), [])
    identity = given["identity_file"]
    if identity.stat().st_size > MAX_FILE:
        raise InputError(f"{identity} passa do máximo ({size_text(MAX_FILE)}). É mesmo o arquivo de identidade?")
    rows = read_rows(identity, values)
    languages = languages_of([row.question for row in rows])
    asked = {plain(m["content"]) for row in rows for m in row.messages}
    test = tuple(q for q in TEST_QUESTIONS if plain(q) not in asked and language_of(q) in languages)
    if len(test) < 4:
        raise InputError(f"{identity} contém quase todas as perguntas de prova (TEST_QUESTIONS, no script); tire "
                         "algumas, senão falta o que medir.")
    told = [name_warning(setting, getattr(settings, setting)) for setting in ("name", "author")]
    data_hash = hashlib.sha256(identity.read_bytes()).hexdigest()
    return Inputs(rows, values, data_hash, languages, test, list(filter(None, told)))


def check_rows(tokenizer: Tokenizer, rows: list[Row], settings: Settings) -> None:
    """`InputError` naming lines with a thought, an answer that cannot be right, or more than WINDOW."""
    drops_thoughts, mistakes = "</think>" in tokenizer.chat_template, []
    for row in rows:
        tokens = len(tokenizer(row.answer, add_special_tokens=False)["input_ids"])
        length = len(encode(tokenizer, without_system(tokenizer, row.messages)).input_ids)
        reasons = {
            "o chat template jogaria fora o raciocínio; apague <think>...</think>":
                drops_thoughts and any("</think>" in m["content"] for m in row.messages),
            f"a resposta não tem o nome nem o autor ({settings.name}, {settings.author}); escreva {{{{NAME}}}} ou "
            "{{AUTHOR}} nela":
                not mentions(row.answer, (settings.name, settings.author)),
            "a resposta repete as mesmas palavras; reescreva-a": is_loop(row.answer),
            f"a resposta tem {tokens} tokens, e MAX_NEW_TOKENS pede menos de {settings.max_new_tokens}; encurte-a":
                tokens >= settings.max_new_tokens,
            f"a conversa tem {length} tokens, e WINDOW é {settings.window}; encurte-a, ou aumente WINDOW (ou, se ela "
            "já é o contexto inteiro do modelo, ROPE_FACTOR)": length > settings.window}
        mistakes += [(row.line, reason) for reason, found in reasons.items() if found][:1]
    refuse_lines(settings.identity_file, mistakes)


# ---- Knowledge: the user's own material -------------------------------------------------------------------

# An instruction written as text: what is asked, maybe with a text to work on, and the answer.
TASK, GIVEN, REPLY = (rf"###?\s*(?:{words})s?\b\s*:?" for words in (
    "instruction|instru[cç][aã]o|question|pergunta|title|t[ií]tulo", "input|entrada|context|contexto",
    "response|resposta|output|sa[ií]da|answer|article|artigo"))
INSTRUCTION = re.compile(rf"(?is){TASK}(?P<task>.*?)(?:{GIVEN}(?P<given>.*?))?{REPLY}(?P<reply>.*)")
END_MARK = re.compile(r"\s*(?:</s>|<eos>|<end_of_turn>|<\|\w+\|>)\s*\Z")
# Tags as they stand in pages; "a < b" and "List<String>" are none.
ATTRIBUTES = (r"""(?:(?:\s+|(?<=["']))[\w:-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s<>"']+)|"""
              r"\s+(?:allowfullscreen|autoplay|checked|controls|disabled|hidden|loop|muted|nowrap|selected))*\s*/?>")
BLOCK = re.compile(r"(?i)</?(?:p|div|br|hr|li|ul|ol|dl|dt|dd|h[1-6]|t[rdh]|table|thead|tbody|blockquote|section|"
                   "article|header|footer|center|pre)" + ATTRIBUTES)
INLINE = re.compile(r"(?i)</?(?:a|abbr|b|big|button|code|em|font|form|i|iframe|img|input|label|mark|s|small|span|"
                    "strike|strong|sub|sup|u|video)" + ATTRIBUTES)
UNSEEN = re.compile(r"(?is)<(script|style)\b.*?</\1\s*>|<!--.*?-->")
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u2060\ufeff\ud800-\udfff]")
NEAREST = str.maketrans("‐‑‒–—―−×⁄“”‘’", "-------x/\"\"''")  # in ASCII
LARGEST_ROW = 10**7  # characters of one row in a JSON array


class Material(NamedTuple):
    """Rows of the knowledge file, drawn and cleaned. No question or answer stands in two of the three lists."""
    rows: list[Row]  # to be learnt
    watched: list[Row]  # whose loss tells when to stop
    test: list[Row]  # of the exam
    total: int  # rows of the file
    left_out: dict[str, int]  # by the reason


def without_html(text: str) -> str:
    """Text without tags, and with the characters that HTML entities stand for; "&ltda;" is none, as "&lt" is without a
    semicolon."""
    text = re.sub(r"(?i)(?<=\d)<sup>\s*(?=\d)", "^", text)  # 10^6 is not 106
    bare = INLINE.sub("", BLOCK.sub("\n", UNSEEN.sub(" ", text)))
    return re.sub(r"&(#\d+|#[xX][\da-fA-F]+|\w+);", lambda match: html.unescape(match[0]) if match[1][0] == "#" else
                  html.entities.html5.get(match[1] + ";", match[0]), bare)


def cleaned(text: str, only_ascii: bool) -> str:
    """Text without HTML, invisible characters, spaces in rows, and double encoding where it is certain."""
    shown = without_html(text)
    if re.search("</(?:p|div|b|i|li|ul|strong|span|a|h[1-6])>", shown) and not any(
            tags.search(text) for tags in (UNSEEN, BLOCK, INLINE)):  # a page escaped as a whole
        shown = without_html(shown)
    shown = INVISIBLE.sub("", re.sub("\r\n?", "\n", ftfy.fix_encoding(shown)))
    if only_ascii:  # a sign that has no like becomes a space: "10±2" is not 102
        shown = re.sub("(?<=\\d)([¼-¾⅐-⅞])", r" \1", re.sub("(?<=\\d)([²³¹⁰⁴-⁹]+)", r"^\1", shown))  # 10½ is not 101/2
        shown = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", shown)).translate(NEAREST)
        shown = re.sub(r"[^\w\x00-\x7f]", " ", shown).encode("ascii", "ignore").decode()
    shown = re.sub(r" ?\n ?", "\n", re.sub(r"[^\S\n]+", " ", shown))
    return re.sub(r"\n{3,}", "\n\n", shown).strip()


def array_items(file, text: str, path: Path):
    """The numbered items of a JSON array, read piece by piece; `text` is what was read behind its "["."""
    number, decode = 1, json.JSONDecoder().raw_decode
    while not (text := text.lstrip(", \t\r\n")).startswith("]"):
        try:
            record, end = decode(text)
        except (ValueError, RecursionError):  # maybe the item goes on in the next piece
            more = file.read(max(2**16, len(text))) if len(text) < LARGEST_ROW else ""
            if not more:
                raise InputError(f"{path}, linha {number} da lista: não é JSON válido, ou o arquivo acaba aqui; "
                                 "confira aspas, chaves e vírgulas.") from None
            text += more
        else:
            yield number, record
            number, text = number + 1, text[end:]
    if (text[1:] + file.read(2**16)).strip():
        raise InputError(f"{path}: há texto depois do ] que fecha a lista. Junte tudo numa lista só, ou escreva um "
                         "objeto {...} em cada linha, sem lista.")


def whole_object(file, path: Path) -> list[dict] | None:
    """The rows of a file that is one JSON object: of lists, one per field, or a single row. None for JSON Lines."""
    whole = None
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(json.loads(file.readline(MAX_LINE)), dict) and file.read(2**16).strip():
            return None
    file.seek(0)
    with contextlib.suppress(ValueError, RecursionError):
        whole = json.loads(file.read()) if path.stat().st_size <= MAX_FILE else None
    if not isinstance(whole, dict):
        return None
    lists = [values for values in whole.values() if isinstance(values, list)]
    one_talk = len(lists) == 1 and all(isinstance(turn, dict) for turn in lists[0])
    if one_talk or len(lists) < len(whole):
        return [whole]
    if len(set(map(len, lists))) > 1:
        told = ", ".join(f"{name} tem {len(values)}" for name, values in whole.items())
        raise InputError(f"{path}: as listas do objeto precisam ter o mesmo tamanho, mas {told[:200]}.")
    return [dict(zip(whole, values)) for values in zip(*lists)]


def records_of(path: Path):
    """(number, record) of each row of a file of JSON, which is read once; a row that is no JSON is an `InputError`
    in place of a record."""
    try:
        with blaming_disk(path), path.open(encoding="utf-8-sig", newline="\n") as file:
            text = file.read(2**16).lstrip()
            if text.startswith("["):
                yield from array_items(file, text[1:], path)
                return
            file.seek(0)
            if (rows := whole_object(file, path)) is not None:
                yield from enumerate(rows, start=1)
                return
            file.seek(0)
            for number, line in enumerate(file, start=1):
                try:
                    if text := line.strip():
                        yield number, json.loads(text)
                except (ValueError, RecursionError) as error:
                    yield number, InputError(f"não é JSON válido perto da coluna {getattr(error, 'colno', 1)}; "
                                             "confira aspas, chaves e vírgulas")
    except UnicodeDecodeError:
        with path.open("rb") as file:
            line = next(n for n, raw in enumerate(file, start=1) if raw != raw.decode(errors="ignore").encode())
        raise InputError(f"{path}, linha {line}: o arquivo não está em UTF-8 (talvez em Windows-1252 ou UTF-16). "
                         "Salve-o de novo escolhendo UTF-8.") from None


def field_text(name: str, value: object) -> str:
    """A field of a row as text, "" for what says nothing, like None or NaN."""
    if isinstance(value, (dict, list, bool)):
        raise InputError(f'o campo "{name}" não é um texto nem um número')
    text = str(value).strip()
    return "" if text[:5].lower() in ("", "nan", "none", "null", "n/a") else text


def material_turns(record: object, question: str, answer: str) -> list[tuple[str, str]] | str:
    """The (role, content) pairs of a row of the material, or why it is left out. Templates come first: any row that
    has one of their fields is for them, unless it is a conversation with a title. `InputError` says what is wrong."""
    if not isinstance(record, dict):
        return read_turns(record)  # it refuses the row, and says what one may be
    names = dict.fromkeys(FIELD.findall(question + answer))
    texts = record.keys() & {"text", "prompt", "completion", "instruction", "input", "output"}
    talk = record.keys() & {"messages", "conversations"} and not record.keys() & {*FIELD.findall(answer)}
    if names.keys() & record.keys() and not talk:
        if missing := [name for name in names if name not in record and name not in ("title", "content")]:
            raise InputError(f'falta o campo "{missing[0]}", que está em KNOWLEDGE_QUESTION ou KNOWLEDGE_ANSWER')
        values = {name: field_text(name, record.get(name)) for name in names}
        if empty := [name for name in names if not values[name]]:
            return f'sem "{empty[0]}"'
        if len(values) > 1 and len({*values.values()}) == 1:
            return "com todos os campos iguais"
        filled = [FIELD.sub(lambda match: values[match[1]], template) for template in (question, answer)]
        turns = list(zip(("user", "assistant"), filled))
    elif texts or record.keys() & {"messages", "conversations"}:
        record = record | {name: field_text(name, record[name]) for name in texts}
        if found := INSTRUCTION.search(record.get("text", "")):
            asked = "\n".join(found[part].strip() for part in ("task", "given") if found[part])
            record = {"prompt": asked, "completion": END_MARK.sub("", found["reply"])}
        elif re.match(rf"(?i)\s*{TASK}", record.get("text", "")):
            return "sem resposta"
        turns = read_turns(record)
    else:
        raise InputError(f"não conheço os campos {str(list(record))[:150]}; escreva em KNOWLEDGE_QUESTION e "
                         "KNOWLEDGE_ANSWER os que fazem a pergunta e a resposta, entre chaves")
    if any(not isinstance(content, str) for _, content in turns):
        raise InputError("há uma pergunta ou resposta que não é texto")
    *before, last = [content.strip() for _, content in turns]
    if turns[-1][0] == "user" or not last:
        return "sem resposta"
    if not all(before):
        return "sem pergunta"
    return "com pergunta e resposta iguais" if last == before[-1] else turns


def draw_material(settings: Settings, left_out: Counter) -> list[tuple[int, list]]:
    """KNOWLEDGE_ROWS of the usable rows, each as likely as any other (reservoir sampling, Vitter's algorithm R), with
    their numbers. The others are counted in `left_out`. One `InputError` for all rows with a mistake."""
    rng, drawn, mistakes, usable = random.Random(f"{settings.seed}/knowledge"), [], [], 0
    for number, record in records_of(Path(settings.knowledge_file)):
        try:
            turns = material_turns(record, settings.knowledge_question, settings.knowledge_answer)
        except InputError as error:
            mistakes.append((number, error))
            continue
        if isinstance(turns, str):
            left_out[turns] += 1
            continue
        usable += 1
        if len(drawn) < settings.knowledge_rows:
            drawn.append((number, turns))
        elif (place := int(rng.random() * usable)) < len(drawn):
            drawn[place] = number, turns
    refuse_lines(settings.knowledge_file, mistakes)
    if usable > len(drawn):
        left_out["não sorteadas (KNOWLEDGE_ROWS)"] = usable - len(drawn)
    return sorted(drawn)


def read_knowledge(settings: Settings) -> Material | None:
    """The material, None without a file. `InputError` for a file or rows that cannot be read, or too few rows."""
    if not settings.knowledge_file:
        return None
    rows, seen, left_out = [], set(), Counter()
    for number, turns in draw_material(settings, left_out):
        texts = tuple(cleaned(text, settings.knowledge_ascii) for _, text in turns)
        if not all(texts):
            left_out["vazias depois da limpeza"] += 1
        elif texts in seen:
            left_out["repetidas"] += 1
        elif any(re.search(MARKS + r"|</think>|\{\{\s*(?:NAME|AUTHOR|BASE)\s*\}\}", text) for text in texts):
            left_out["com marcas de outro formato, raciocínio ou {{NAME}}"] += 1
        else:
            seen.add(texts)
            messages = [{"role": role, "content": text} for (role, _), text in zip(turns, texts)]
            rows.append(Row(number, messages))
    total = len(rows) + sum(left_out.values())
    if not total:
        raise InputError(f"{settings.knowledge_file} está vazio. Escreva um objeto {{...}} em cada linha.")
    if len(rows) < 10:
        told = "".join(f"; {reason}: {n}" for reason, n in left_out.items())
        raise InputError(f"{settings.knowledge_file} tem {len(rows)} linha(s) que dá para usar, e preciso de pelo "
                         f"menos 10 (de {total}{told}). Ponha mais, ou confira KNOWLEDGE_QUESTION e KNOWLEDGE_ANSWER.")
    return hold_out(rows, left_out, settings)


def hold_out(rows: list[Row], left_out: Counter, settings: Settings) -> Material:
    """A twentieth of the rows, at most 200, for the exam, and as many to see when to stop; with rows that ask or
    answer the same as one of those left out of the training."""
    def said(row: Row) -> set[str]:
        return {" ".join(text.casefold().split()) for text in (row.question, row.answer)}

    few, held, known = max(2, min(200, len(rows) // 20)), [], set()
    for row in random.Random(f"{settings.seed}/held-out").sample(rows, len(rows)):
        if len(held) < 2 * few and not said(row) & known:
            held.append(row)
            known |= said(row)
    learnt = [row for row in rows if not said(row) & known]
    if not learnt or len(held) <= few:
        raise InputError(f"quase todas as linhas de {settings.knowledge_file} têm a mesma pergunta ou a mesma "
                         "resposta: não sobra o que guardar para medir. Confira KNOWLEDGE_QUESTION e "
                         "KNOWLEDGE_ANSWER.")
    total = len(rows) + sum(left_out.values())
    if again := len(rows) - len(learnt) - len(held):
        left_out["com pergunta ou resposta de uma linha guardada"] = again
    test, watched = sorted(held[:few]), sorted(held[few:])  # by their numbers
    return Material(learnt, watched, test, total, dict(left_out))


def fit_material(tokenizer: Tokenizer, material: Material, settings: Settings) -> tuple[Material, list[int]]:
    """The material without rows of more than WINDOW tokens, its messages as the template takes them, and the length
    of each row that is to be learnt, in tokens."""
    ready = functools.partial(without_system, tokenizer)
    parts = [[row._replace(messages=ready(row.messages)) for row in rows] for rows in material[:3]]
    tokens = {row.line: len(encode(tokenizer, row.messages).input_ids) for rows in parts for row in rows}
    parts = [[row for row in rows if tokens[row.line] <= settings.window] for rows in parts]
    dropped = len(tokens) - sum(map(len, parts))
    if not all(parts):
        raise InputError(f"{dropped} das {len(tokens)} linhas de {settings.knowledge_file} passam de WINDOW "
                         f"({settings.window} tokens), e falta o que aprender ou o que guardar para medir. Divida-as, "
                         "ou aumente WINDOW (--window).")
    told = {f"com mais de {settings.window} tokens (WINDOW)": dropped} if dropped else {}
    return Material(*parts, material.total, material.left_out | told), [tokens[row.line] for row in parts[0]]


def show_material(tokenizer: Tokenizer, material: Material, lengths: list[int], settings: Settings) -> None:
    """Say what there is to learn and what was left out; with --check also one row as it will be learnt."""
    say(f"Material:    {len(material.rows)} das {material.total} linhas de {settings.knowledge_file}; outras "
        f"{len(material.test)} ficam guardadas para a prova e {len(material.watched)} para saber quando parar")
    if material.left_out:
        say("  Ficaram de fora: " + "; ".join(f"{reason}: {n}" for reason, n in material.left_out.items()) + ".")
    say(f"  São {sum(lengths)} tokens; a linha mais comprida tem {max(lengths)} (WINDOW é {settings.window}).")
    if settings.check:
        row, text = material.rows[0], ""
        encoded = encode(tokenizer, row.messages)
        pairs = zip(encoded.input_ids, encoded.labels)
        for learnt, run in itertools.groupby(pairs, key=lambda pair: pair[1] != -100):
            piece = tokenizer.decode([token for token, _ in run])
            text += f"[[{piece}]]" if learnt else piece
        say(f"  A linha {row.line}, como o modelo a verá; ele aprende o que está entre [[ e ]]:")
        say("    " + text.replace("\n", "\n    "))


# ---- The base's folder and the output ---------------------------------------------------------------------

def load_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_json(path: Path) -> dict:
    """A JSON object of a base model's folder; `InputError` when it is none."""
    with blaming(f"o arquivo {path}"):
        return {**load_json(path)}  # of a list or a number this cannot be made


def weight_count(folder: Path) -> int:
    """Number of weights of the model in a folder, as the headers of its safetensors files tell; 0 without any."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    paths, count = [single] * single.is_file(), 0
    if index.is_file() and not paths:  # a whole file counts first, as for transformers
        with blaming(f"o arquivo {index}"):
            paths = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    for path in paths:
        with blaming(f"o arquivo de pesos {path}"):
            with path.open("rb") as file:
                if file.read(8) == b"version ":
                    raise InputError(f"{path} é só um ponteiro do Git LFS, sem os pesos; rode 'git lfs pull' na pasta "
                                     "dele.")
            with safetensors.safe_open(path, "np") as file:  # its header must fit the file's size
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def check_base(base: Path) -> int:
    """Number of weights of the base, or an `InputError` for all that can be seen without importing torch."""
    wanted = "MODEL_PATH precisa ser a pasta do modelo original, com config.json, tokenizer e pesos em safetensors."
    if not base.exists():
        raise InputError(f"não achei a pasta do modelo {base}. {did_you_mean(base)} Veja MODEL_PATH (--model-path).")
    if base.suffix.lower() == ".gguf" or (any(base.glob("*.gguf")) and not any(base.glob("*.safetensors"))):
        raise InputError(f"{base} é um modelo GGUF, formato que serve para conversar, não para treinar. {wanted}")
    if (base / "adapter_config.json").is_file():  # transformers adds it to a whole model beside it, maybe once more
        raise InputError(f"há um adaptador LoRA em {base}. Junte-o ao modelo dele (peft: merge_and_unload) e use o "
                         "todo; se já o juntou, tire da pasta adapter_config.json e adapter_model.safetensors.")
    if not (base / "config.json").is_file():
        raise InputError(f"{base} não tem config.json, então não é a pasta de um modelo do transformers. {wanted}")
    config = read_json(base / "config.json")
    for path in base.glob("[!.]*_config.json"):  # that users edit; libraries do not say which one is broken
        read_json(path)
    with blaming(f"o arquivo {base / 'config.json'}"):
        kind = str([*(config.get("architectures") or ["ForCausalLM"])][0])
        quantized = {**(config.get("quantization_config")
                        or {**(config.get("text_config") or {})}.get("quantization_config") or {})}
        hash(config.get("model_type"))  # a text, to be looked up
    if config.get("is_encoder_decoder") or not kind.endswith(("CausalLM", "LMHeadModel", "Generation")):
        raise InputError(f"{base} é um modelo {kind}, que não é de conversa; escolha um Llama, Gemma, Qwen...")
    if quantized:
        raise InputError(f"os pesos de {base} estão quantizados ({quantized.get('quant_method', 'formato próprio')}), "
                         "e não dá para treiná-los. Baixe uma versão em bf16, fp16 ou fp32.")
    weights = weight_count(base)
    if not weights and any(p.suffix in (".bin", ".pt", ".pth") for p in base.iterdir()):
        raise InputError(f"os pesos de {base} estão em pickle (.bin ou .pt), que não abro, porque pode esconder "
                         "programas. Se confia neles, converta-os para safetensors:\n  python -c \"import sys; from "
                         "transformers import AutoModelForCausalLM as M, AutoTokenizer as T; [k.from_pretrained("
                         "sys.argv[1]).save_pretrained(sys.argv[2]) for k in (M, T)]\" PASTA_ATUAL PASTA_NOVA\n"
                         "Depois rode com --model-path PASTA_NOVA.")
    if not weights:
        raise InputError(f"a pasta {base} não tem pesos em safetensors (model.safetensors, ou as partes e o índice): "
                         "baixe de novo, ou escolha outra versão.")
    if not any((base / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise InputError(f"a pasta {base} não tem tokenizer (tokenizer.json ou tokenizer.model); baixe-o também.")
    return weights


def check_output(base: Path, settings: Settings, finished: bool) -> None:
    """Refuse an output that would damage something: the base, another folder of the user, an older result."""
    output, work = Path(settings.output_dir), work_folder(settings)
    parent = next((p for p in output.parents if p.exists()), output)  # none on a drive that there is not
    result = False
    with contextlib.suppress(OSError, ValueError, AttributeError):
        result = {"scores", "settings"} <= load_json(output / "report.json").keys()
    problems = {
        f"OUTPUT_DIR ({output}) não pode ser a pasta do modelo base, nem ficar dentro ou acima dela":
            any(within(path, base) or within(base, path) for path in (output, work)),
        f"{output} já existe e não é resultado meu: não vou apagar": os.path.lexists(output) and not result,
        f"a pasta de saída {output} já existe (para trocá-la: --overwrite)":
            result and not settings.overwrite and not finished,
        f"a pasta {work} já existe e não é minha":
            work.exists() and not (work / WORK_NOTE).is_file() and (not work.is_dir() or any(work.iterdir())),
        f"não posso escrever em {parent}": not parent.is_dir() or not os.access(parent, os.W_OK),
        f"não posso escrever em {work}": work.is_dir() and not os.access(work, os.W_OK)}
    for problem, found in problems.items():
        if found:
            raise InputError(f"{problem}. Escolha outra saída em OUTPUT_DIR (--output-dir).")


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder, which need not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_disk(needed: int, work: Path) -> None:
    """`InputError` when the disk has less room than the bytes that the job needs."""
    missing = needed - folder_size(work) - shutil.disk_usage(next(p for p in work.parents if p.exists())).free
    if missing > 0:
        raise InputError(f"faltam {size_text(missing)} de espaço livre em {work.parent}: as etapas e o resultado "
                         f"ocupam até {size_text(needed)}. Libere espaço ou escolha outra saída (--output-dir).")


# ---- Stages on disk: what a broken-off run goes on from ---------------------------------------------------

# The settings that each stage depends on, besides those of the stages before it.
USES = {
    "1-base": "name author old_names self_text eval_questions max_new_tokens seed",
    "2-healed": "method rope_factor window heal_steps heal_learning_rate batch_size",
    "3-pass-1": "lora_rank steps_1 learning_rate_1 kl_weight",
    "4-self-answers": "num_self_answers",
    "5-pass-2": "steps_2 learning_rate_2",
    "6-result": "",
}
CHOSEN = ("method", "gradient_accumulation", "gradient_checkpointing")  # by the free memory


def work_folder(settings: Settings) -> Path:
    """Where the stages are kept: beside the output, so that the result is moved there by a rename."""
    return Path(settings.output_dir + ".work")


def job_facts(inputs: Inputs, base: Path) -> str:
    """Digest of what the job depends on besides settings: rows (or the languages of the material), base, and script
    without its constants. Weights count by name, size and time."""
    files = [[p.name, p.stat().st_size, p.stat().st_mtime_ns if p.suffix == ".safetensors" else
              hashlib.sha256(p.read_bytes()).hexdigest()] for p in sorted(base.iterdir())
             if p.is_file() and p.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt")]
    rows = [row.messages for row in inputs.rows] or inputs.languages
    return digest([rows, inputs.values, inputs.test, TOP, REST, files])


def job_key(facts: str, material: Material | None, settings: Settings) -> str:
    """A digest that tells one result from another: facts, material, targets, and every setting that a stage uses."""
    used = " ".join([*USES.values(), "target_identity target_retention target_leak"]).split()
    return digest([facts, material and [material, settings.knowledge_steps], [getattr(settings, n) for n in used]])


def write_json(path: Path, value: object) -> None:
    """Written under another name, flushed and renamed: the file is whole or not there."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    flush(partial)
    partial.replace(path)


def flush(place: Path) -> None:
    """Make a file, or a folder, survive a power cut: a rename may reach the disk before the contents do."""
    for path in [*place.rglob("*"), place]:
        if path.is_file() or os.name != "nt":  # Windows cannot open folders
            handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def discard(folder: Path, mark: str = "key.json") -> None:
    """Delete a stage or checkpoint, its mark first: half of one must never look whole."""
    (folder / mark).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def has_key(file: Path, key: str) -> bool:
    """Whether this JSON file says that what it stands for was made, or begun, with this key."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return load_json(file)["key"] == key
    return False


class Stages:
    """The job's stages, in order; the key of each holds all that it and those before it depend on."""

    def __init__(self, work: Path, facts: str, settings: Settings, planned: dict[str, float]):
        self.work, self.chain, self.settings, self.folders = work, facts, settings, {}
        self.planned, self.spent = planned, {}  # seconds of each stage

    def __call__(self, name: str, title: str, build: Callable[[Path], None], facts: object = None) -> Path:
        """The folder of a stage, built now unless it is there with this key, under another name until it is whole.
        `build` may go on with what a broken-off one left. `facts`: what else the stage depends on."""
        folder, partial = self.work / name, self.work / f"{name}.partial"
        used = [getattr(self.settings, use) for use in USES[name].split()]
        key = self.chain = digest([self.chain, name, facts, used])
        self.folders[name] = folder
        ready = has_key(folder / "key.json", key)
        say(f"{len(self.folders)}/{len(self.planned)} {title}" + " (já pronto)" * ready)
        if ready:
            shutil.rmtree(folder / "training", ignore_errors=True)
            return folder
        if not has_key(partial / "key.json", key):
            discard(partial)
            partial.mkdir(parents=True)
            write_json(partial / "key.json", {"key": key})
        began = time.monotonic()
        try:
            build(partial)
        finally:  # the report tells the time of all runs that worked on it
            seconds = self.spent[name] = time.monotonic() - began
            before = load_json(partial / "key.json").get("seconds", 0)
            write_json(partial / "key.json", {"key": key, "seconds": round(before + seconds, 1)})
        flush(partial)
        discard(folder)
        partial.rename(folder)
        shutil.rmtree(folder / "training", ignore_errors=True)  # its checkpoints; now nothing needs them
        if rest := sum(planned for name, planned in self.planned.items() if name not in self.folders):
            # The plan for the rest, times how much longer than planned the stages so far took.
            expected = sum(self.planned[name] for name in self.spent)
            rest *= (sum(self.spent.values()) + rest) / (expected + rest)
            say(f"  Pronto em {clock(seconds)}; para o modelo ficar pronto faltam uns {clock(rest)}.")
        return folder


# ---- Model and RoPE ---------------------------------------------------------------------------------------

def scale_rope(rope: dict | None, factor: float) -> dict:
    """`rope_parameters` with linear interpolation (arXiv 2306.15595) on top of their own; of Gemma 3's only those of
    `full_attention`, as llama.cpp reads them. `InputError` without RoPE or for another scaling."""
    hint = "Use --rope-factor 1 (ROPE_FACTOR = 1) para renomear sem aumentar o contexto."
    if not rope:
        raise InputError(f"este modelo não usa RoPE, então o contexto não pode ser aumentado. {hint}")
    if "full_attention" in rope:
        return {**rope, "full_attention": scale_rope(rope["full_attention"], factor)}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"não sei aumentar o contexto deste modelo (RoPE do tipo '{kind}'). {hint}")
    kind = kind.replace("default", "linear")
    return {**rope, "rope_type": kind, "factor": float(rope.get("factor") or 1) * factor}


def rope_frequencies(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The rotary frequencies that the built model really uses, by buffer name, each of shape (pairs,)."""
    return {name: b.detach().clone() for name, b in model.named_buffers() if name.endswith("inv_freq")}


@contextlib.contextmanager
def blaming_disk(path: str | Path):
    """What the system will not open is the user's to mend; of a reading it does not say which file, here `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"não consegui abrir {error.filename or path} ({error.strerror}). Confira a permissão e o "
                         "disco.") from None


@contextlib.contextmanager
def blaming(what: str):
    """What a library says when it cannot read a file of the base becomes an `InputError` on that file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or re.search(f"{OUT_OF_MEMORY}|{DISK_FULL}", causes(error)):
            raise
        if isinstance(error, PermissionError):
            raise InputError(f"não consegui abrir {error.filename or what}. Confira a permissão.") from error
        package = re.search(r"pip install (?:-U )?([\w-]+)", str(error))
        if package and isinstance(error, ImportError):
            raise InputError(f"{what}: para ler isto, falta um pacote: pip install {package[1]}.") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        again = "Refaça as etapas: use --restart" if ".work" in what else "Baixe ou refaça o modelo"
        text = f"{what} está estragado ou incompleto: não dá para carregá-lo ({reason}). {again}."
        raise InputError(text) from error


def read_config(folder: str | Path, rope_factor: float = 1.0) -> PretrainedConfig:
    """The configuration, RoPE and context scaled; `InputError` if it cannot be used or scaled."""
    described = read_json(Path(folder) / "config.json")
    if described.get("model_type") not in transformers.CONFIG_MAPPING:
        reason = ("precisa rodar código que vem junto com ele (trust_remote_code), e isso eu não faço por segurança"
                  if described.get("auto_map") else "não é conhecido por esta versão do transformers")
        raise InputError(f"o modelo {folder} (model_type: {described.get('model_type')}) {reason}. Escolha um que o "
                         "transformers já conhece, ou atualize: pip install -U transformers")
    with blaming(f"o config.json de {folder}"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise InputError(f"o modelo {folder} (model_type: {config.model_type}) também vê imagens ou ouve, e não "
                             "sei renomear esse tipo. Escolha um só de texto, ou um Gemma 3 ou 4.")
        text = config.get_text_config()
        if rope_factor != 1:
            # Falcon and Granite have parameters even with ALiBi or nothing. Phi knows no linear, vLLM none in Gemma 4.
            unused = getattr(text, "alibi", False) or getattr(text, "position_embedding_type", None) == "nope"
            rope = {} if unused else getattr(text, "rope_parameters", None) or {}
            rope = {"rope_type": text.model_type} if re.match("phi3|phimoe|gemma4", text.model_type) else rope
            text.rope_parameters = scale_rope(rope, rope_factor)
            text.max_position_embeddings = int(context_of(config) * rope_factor)
        return config


def compute_dtype(weights: int) -> torch.dtype:
    """bfloat16 where there are units for it (processors: if large), float16 on older cards, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast and weights >= SMALL else torch.float32


def context_of(config: PretrainedConfig) -> int:
    """Tokens of context, under the name that the family has for it; 2048 for models without positions."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "seq_length", "max_seq_len")
    return int(next((getattr(text, name) for name in names if getattr(text, name, None)), 2048))


def load_weights(weights: str | Path, rope_factor: float, **options) -> PreTrainedModel:
    """The whole model of a folder; `InputError` for weights that are missing or not finite."""
    config = read_config(weights, rope_factor)  # before the model is built, which computes the frequencies at once
    with blaming(f"o modelo {weights} (config.json e pesos)"):
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            weights, config=config, use_safetensors=True, output_loading_info=True, trust_remote_code=False, **options)
    vars(model.config).pop("quantization_config", None)  # of this machine, not to be saved
    if loading["missing_keys"]:
        raise InputError(f"falta o peso {sorted(loading['missing_keys'])[0]} no modelo {weights}; baixe-o de novo.")
    if name := broken_weight(model):
        raise InputError(f"o peso {name} de {weights} não é só números (há NaN ou infinito). Baixe o modelo de novo.")
    # Generation gives the head a slice, for which torch 2.13 on a processor would copy the head for every row: 26 GB
    # for 96 questions to a Qwen of half a billion parameters.
    model.get_output_embeddings().register_forward_pre_hook(lambda module, given: (given[0].contiguous(), *given[1:]))
    for name, weight in model.named_parameters():
        weight.requires_grad_(not re.search(NOT_TEXT, name) and weight.is_floating_point())
    return model


def load_model(folder: str | Path, settings: Settings, rope_factor: float = 1.0, adapt: bool = False,
               merge: bool = False, train: bool = False) -> PreTrainedModel | PeftModel:
    """A model in eval mode, on the GPU if there is one. `folder` is a whole model, or a stage with a LoRA adapter.
    `adapt` adds a fresh adapter if METHOD needs one, `train` cuts the weights (FSDP) or packs them in 4 bits (QLoRA),
    `merge` gives plain ones to be saved, any adapter worked in; of QLoRA on the processor, as the card may be small.
    Full training keeps weights in float32, where small updates are not rounded away; LoRA as the machine computes."""
    gc.collect()  # the Trainer leaves reference cycles around its model, and there may be no room for two
    # As exact as float16 and ten times as fast, for what a card computes in float32, as the logits.
    torch.backends.cuda.matmul.allow_tf32 = torch.cuda.is_available()
    adapted = (Path(folder) / LORA_FILE).is_file()
    weights = Path(folder)
    if adapted:  # its model stands beside it, also where both were moved
        healed = Path(load_json(weights / "adapter_config.json")["base_model_name_or_path"])
        weights = weights.with_name(healed.name) if weights.with_name(healed.name).is_dir() else healed
    fast = compute_dtype(weight_count(weights))
    options = {"dtype": torch.float32 if settings.method == "full" else fast}
    if merge and adapted:  # the adapter is added to the weights as they are
        options["dtype"] = read_config(settings.model_path).dtype or torch.float32
    if not merge and (settings.method == "qlora4" or train and settings.method == "qlora"):
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=fast)
    if SHARDED and train:
        options["distributed_config"] = transformers.distributed.DistributedConfig(fsdp_size=PROCESSES)
    model = load_weights(weights, rope_factor, **options)
    if options.keys() == {"dtype"}:  # else transformers has moved it
        aside = merge and "qlora" in settings.method
        model = model.to("cuda" if torch.cuda.is_available() and not aside else "cpu")
    if adapted:
        model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
        return (model.merge_and_unload() if merge else model).eval()
    return (with_adapter(model, settings) if adapt and settings.method != "full" else model).eval()


def is_alone(settings: Settings) -> bool:
    """Whether nothing but an identity is learnt: no longer context, no material."""
    return settings.rope_factor == 1 and not settings.knowledge_file


def first_adapted(config: PretrainedConfig, settings: Settings) -> int:
    """The first layer that is trained. With LoRA the upper half learns an identity alone as well, in three quarters
    of the time and in less memory, as gradients end where adapters do, and less of the rest changes; a longer context,
    for long conversations, and material need all layers."""
    return config.get_text_config().num_hidden_layers // 2 if is_alone(settings) and settings.method != "full" else 0


def with_adapter(model: PreTrainedModel, settings: Settings) -> PeftModel:
    """The model with a fresh LoRA adapter on all linear layers of its text part from `first_adapted` on."""
    torch.manual_seed(settings.seed)
    lower = "|".join(map(str, range(first_adapted(model.config, settings))))
    return peft.get_peft_model(model, peft.LoraConfig(
        r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear",
        exclude_modules=rf".*({NOT_LORA}).*|\D*\.({lower})\..*", task_type="CAUSAL_LM"))


def model_size(model: torch.nn.Module) -> int:
    """Number of weights; those packed in 4 bits count as before packing."""
    return sum(math.prod(getattr(p, "quant_state", p).shape) for n, p in model.named_parameters() if "lora_" not in n)


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model, without what LoRA wraps around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def broken_weight(model: torch.nn.Module) -> str | None:
    """Name of a weight that is not finite. Its sum tells, without a copy as large as the weight."""
    sums = ((name, weight.detach().sum(dtype=torch.float32)) for name, weight in model.named_parameters())
    return next((name for name, value in sums if not value.isfinite()), None)


def logits_at(model: torch.nn.Module, inner: PreTrainedModel, needed: torch.Tensor,
              part: torch.nn.Module | None = None, **inputs) -> torch.Tensor:
    """Float32 logits (N, vocabulary) where the mask `needed` (rows, tokens) is true. A hook cuts what goes into the
    head of `inner`, which `model` may wrap, or into `part`, a smaller head that stands in its place meanwhile, so that
    a family's scales and caps stay its own code."""
    head = inner.get_output_embeddings()
    hook = (part or head).register_forward_pre_hook(
        lambda module, given: (given[0][needed.to(given[0].device)], *given[1:]))
    try:
        if part:  # not every family can be given another head
            inner.set_output_embeddings(part)
        return model(**inputs, use_cache=False).logits.float()
    finally:
        if part:
            inner.set_output_embeddings(head)
        hook.remove()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The model's tokenizer; one without a chat template gets ChatML."""
    with blaming(f"o tokenizer de {folder}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        if isinstance(tokenizer.chat_template, dict):  # several by name
            tokenizer.chat_template = tokenizer.chat_template.get("default")
        tokenizer.chat_template = (tokenizer.chat_template or "").removeprefix("\ufeff")
        tokenizer.model_max_length = int(tokenizer.model_max_length)
    if tokenizer.eos_token is None:
        raise InputError("falta o token de fim: escreva eos_token no tokenizer_config.json da pasta do modelo.")
    if not tokenizer.chat_template:
        end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
        tokenizer.chat_template = CHATML.replace("END", repr(end))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


# ---- Conversations as tokens ------------------------------------------------------------------------------

@functools.cache  # `template` is in the key so that a changed one is seen
def skeleton(tokenizer: Tokenizer, template: str, roles: tuple[str, ...], ask: bool) -> list[str]:
    """What the chat template writes around messages with these roles: len(roles) + 1 pieces. `ask` adds the prompt for
    an answer, without a thought (DeepSeek R1) and with what comes before answers (gpt-oss: a channel)."""
    marks, text, why = [f"QZ{i}ZQ" for i in range(len(roles))], "", ""
    messages = [{"role": r, "content": m} for r, m in zip(roles, marks)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template,
                                             add_generation_prompt=ask, **THOUGHTLESS)
    except Exception as error:  # a template is a program
        why = f" ({str(error).splitlines()[0][:200]})" if str(error) else ""
    pieces = re.split("|".join(marks), text)
    if re.findall("|".join(marks), text) != marks:
        raise InputError(f"o chat template deste modelo não aceita uma conversa com os papéis {', '.join(roles)}{why}."
                         " Confira o chat_template.jinja, ou o tokenizer_config.json, da pasta do modelo.")
    if ask:
        pieces[-1] = re.sub(r"<think>\s*\Z", EMPTY_THOUGHT, pieces[-1])
        before = skeleton(tokenizer, template, (*roles, "assistant"), False)[-2]
        if before.startswith(pieces[-1]) and before.split() != pieces[-1].split():
            pieces[-1] = before
    return pieces


def own_text(tokenizer: Tokenizer) -> str:
    """What the chat template itself says around a question, without its marks."""
    return re.sub(r"<[^<>]*>", "\n", "\n".join(skeleton(tokenizer, tokenizer.chat_template, ("user",), True)))


def thinks(tokenizer: Tokenizer) -> bool:
    """Whether the template asks for a thought before the answer unless `enable_thinking` is off, as it is here."""
    ask = functools.partial(tokenizer.apply_chat_template, [{"role": "user", "content": "?"}], tokenize=False,
                            add_generation_prompt=True)
    return ask() != ask(**THOUGHTLESS)


def renew_template(tokenizer: Tokenizer, settings: Settings, names: tuple[str, ...]) -> None:
    """Put the new names in place of old ones in all texts of the chat template, or raise `InputError`."""
    safe = str.maketrans({"'": "’", '"': "”", "\\": "/"})  # a name must not end a quoted string of the template
    ours, theirs = settings.name.translate(safe), settings.author.translate(safe)
    makers = {plain(name) for names in FAMILIES.values() for name in names.split("|")}
    found = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"
    # First what stays: an old name may be part of a new one. A line may begin after a written-out "\n".
    kept = f"{re.escape(ours)}|{re.escape(theirs)}|<[^<>]*>"
    pattern = re.compile(rf"(?i)({kept})|(?:(?<!\w)|(?<=\\[nt]))(?:{found})(?:[-. ]?\d+(?:\.\d+)*)?(?!\w)")
    source = re.sub("\r\n?", "\n", tokenizer.chat_template)
    pieces = [(text, kind in ("data", "string")) for _, kind, text in jinja2.Environment().lex(source)]
    lines = re.split(r"<[^<>]*>|\\n|\n", "\n".join(text.strip("'\"") for text, own in pieces if own))

    def bare(match: re.Match) -> str:
        return re.sub(r"[\d\s]+$", "", plain(match[0]))  # without a version

    said = [bare(match) for line in lines for match in pattern.finditer(line) if not match[1]]
    model = next((name for name in said if name not in makers), "")

    def renewed(text: str) -> str:
        return pattern.sub(lambda m: m[1] or (ours if bare(m) == model or not model else theirs), text)

    for line in dict.fromkeys(line.strip() for line in lines if renewed(line) != line):
        say(f'  O chat template diz "{line}"; no modelo novo dirá "{renewed(line)}".')
    done = ""
    for text, own in pieces:  # elsewhere the same word may be a variable
        before, _, source = source.partition(text)
        done += before + (renewed(text) if own else text)
    if said:
        tokenizer.chat_template = done + source
    if renewed(own_text(tokenizer)) != own_text(tokenizer):
        raise InputError("não sei trocar a identidade antiga do chat template; apague-a do chat_template.jinja ou do "
                         "tokenizer_config.json da pasta do modelo.")


def without_system(tokenizer: Tokenizer, messages: list[dict]) -> list[dict]:
    """The conversation with its system text before the first question, if the template refuses that role."""
    if messages[0]["role"] != "system":
        return messages
    with contextlib.suppress(InputError):
        skeleton(tokenizer, tokenizer.chat_template, ("system", "user", "assistant", "user"), True)
        return messages
    text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": text}, *messages[2:]]


def prompt_ids(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of a conversation that ends with the user, ready for the assistant to speak."""
    pieces = skeleton(tokenizer, tokenizer.chat_template, tuple(m["role"] for m in messages), True)
    text = "".join(p + m["content"] for p, m in zip(pieces, messages)) + pieces[-1]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class Encoded(NamedTuple):
    """A conversation as tokens."""
    input_ids: list[int]
    labels: list[int]  # -100 but on answers and the end-of-turn token after each
    turns: list[tuple[int, int]]  # (first token of the question, one past the end of its answer)

    def answer(self, turn: int) -> int:
        """Place of the first token of a turn's answer."""
        return next(at for at in range(*self.turns[turn]) if self.labels[at] != -100)


def encode(tokenizer: Tokenizer, messages: list[dict]) -> Encoded:
    """Tokenise through the model's own template. A special token after the last answer, spaces aside (Llama 2), ends
    it; else the conversation is cut there and ended by EOS."""
    roles = tuple(m["role"] for m in messages)
    pieces = skeleton(tokenizer, tokenizer.chat_template, roles, False)
    asked = skeleton(tokenizer, tokenizer.chat_template, roles[:-1], True)[-1]
    if asked.endswith(EMPTY_THOUGHT):  # learnt after what it will be asked with
        pieces = [*pieces[:-2], asked, pieces[-1]]
    gap, end_of_turn, has_end = turn_end(tokenizer, pieces[-1])
    text = "".join(piece + m["content"] for piece, m in zip(pieces, messages)) + pieces[-1] * has_end
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = tokens["input_ids"] + [end_of_turn] * (not has_end)
    starts, ends = zip(*tokens["offset_mapping"])
    labels, turns, question, end = [-100] * len(ids), [], 0, 0
    for piece, message in zip(pieces, messages):
        start = end + len(piece)
        end = start + len(message["content"])
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        if message["role"] == "user":
            question = first
        if message["role"] == "assistant":
            if end_of_turn in ids[last:last + gap + 1]:
                last = ids.index(end_of_turn, last) + 1
            labels[first:last] = ids[first:last]
            turns.append((question, last))
    return Encoded(ids, labels, turns)


@functools.cache
def turn_end(tokenizer: Tokenizer, piece: str) -> tuple[int, int, bool]:
    """After an answer: leading spaces, the id that ends the turn, and whether the template writes it (else EOS)."""
    first = tokenizer(piece.lstrip(), add_special_tokens=False)["input_ids"][:1]
    ends = bool(first) and first[0] in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return len(piece) - len(piece.lstrip()), first[0] if ends else tokenizer.eos_token_id, ends


# ---- Talking to a model -----------------------------------------------------------------------------------

class Chat(NamedTuple):
    """A model with what is needed to talk to it; `stops` are the ids that end an answer."""
    model: PreTrainedModel
    tokenizer: Tokenizer
    stops: list[int]
    max_new_tokens: int


class Answer(NamedTuple):
    """What a model wrote."""
    text: str
    ended: bool  # by itself
    ids: list[int] = []  # with the one that ended it


def load_chat(folder: str | Path, settings: Settings, rope_factor: float = 1.0, **how: bool) -> Chat:
    """Model and tokenizer of a folder, with all that may end an answer; `InputError` if they do not fit."""
    model, tokenizer = load_model(folder, settings, rope_factor, **how), load_tokenizer(folder)
    rows = model.get_input_embeddings().weight.shape[0]
    sample = encode(tokenizer, without_system(tokenizer, [
        {"role": "system", "content": "a"}, *question_and_answer("a", "b")]))
    # Of added tokens only those that are written: Gemma 3 1B has one without an embedding that nothing writes.
    if (last := max(tokenizer.vocab_size - 1, tokenizer.pad_token_id, *sample.input_ids)) >= rows:
        raise InputError(f"o modelo {folder} tem {rows} tokens, e o tokenizer escreve um a mais ({last}: "
                         f"{tokenizer.decode([last])}). Use o tokenizer original do modelo, ou aumente o modelo com "
                         "resize_token_embeddings e treine o token novo.")
    if 2 * len(tokenizer) < rows:  # Qwen under the tokenizer of SmolLM would train for hours on noise
        raise InputError(f"o tokenizer de {folder} tem {len(tokenizer)} tokens, e o modelo, {rows}: parece ser o de "
                         "outro modelo. Baixe o original.")
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    with blaming(f"eos_token_id, no config.json ou no generation_config.json de {folder},"):
        stops = sorted({sample.labels[sample.turns[0][1] - 1], tokenizer.eos_token_id, *own} - {None})
    # generate() fills what is not set from the model's own defaults, and a repetition penalty would falsify answers.
    config = transformers.GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    unwrapped(model).generation_config = config
    return Chat(model, tokenizer, stops, settings.max_new_tokens)


def batches_by_tokens(lengths: list[int], extra: int, budget: int) -> list[list[int]]:
    """Indices by length, cut so that rows x (longest + extra) stays within the budget; one row at least."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or (len(batches[-1]) + 1) * (lengths[i] + extra) > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def stacked(rows: Sequence[list[int]], filler: int) -> torch.Tensor:
    """Lists as one tensor (rows, longest), filled up on the right, for which no causal model needs a mask."""
    return torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=filler)


def progress(total: int, label: str):
    """A progress bar where there is a terminal and a label, and no --quiet."""
    return tqdm.tqdm(total=total, desc=f"  {label}", disable=not label or say.quiet or RANK > 0 or None, leave=False,
                     dynamic_ncols=True, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}, faltam {remaining}")


@contextlib.contextmanager
def computing(model: PreTrainedModel):
    """Without gradients, and in bfloat16 where this machine trains float32 weights so."""
    fast = compute_dtype(model_size(model))
    wide = any(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" not in name)
    with torch.no_grad(), torch.autocast(model.device.type, fast, enabled=wide and fast != torch.float32):
        yield


def generate(chat: Chat, prompts: list[list[int]], label: str = "", limit: int = 0,
             sample_seed: int | None = None) -> list[Answer]:
    """One answer per prompt, in order, of up to `limit` tokens (0: the chat's own), greedy or sampled with a seed."""
    limit, answers = limit or chat.max_new_tokens, [Answer("", False)] * len(prompts)

    def draw(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Noise (Gumbel) whose largest sum is a sample; to draw from 150,000 tokens takes a second for each word."""
        best = scores.float().topk(50)
        noisy = best.values - torch.empty_like(best.values).exponential_().log()
        return torch.full_like(scores, -math.inf, dtype=torch.float32).scatter_(1, best.indices, noisy)

    batches = batches_by_tokens([len(p) for p in prompts], limit, GENERATION_TOKENS)
    torch.manual_seed(sample_seed or 0)
    with progress(len(prompts), label) as bar, computing(unwrapped(chat.model)):
        while batches:
            batch = batches.pop(0)
            inputs = chat.tokenizer.pad({"input_ids": [prompts[i] for i in batch]}, padding_side="left",
                                        return_attention_mask=True, return_tensors="pt").to(chat.model.device)
            try:
                written = chat.model.generate(**inputs, max_new_tokens=limit, do_sample=False,
                                              logits_processor=[draw] * (sample_seed is not None))
            except (RuntimeError, MemoryError) as error:
                if len(batch) == 1 or not re.search(OUT_OF_MEMORY, causes(error)):
                    raise
                batches[:0] = batch[:len(batch) // 2], batch[len(batch) // 2:]
                continue
            for i, ids in zip(batch, written[:, inputs["input_ids"].shape[1]:].tolist()):
                end = next((j for j, token in enumerate(ids) if token in chat.stops), None)
                ids = ids if end is None else ids[:end + 1]
                text = chat.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
                answers[i] = Answer(text, end is not None, ids)
            bar.update(len(batch))
    return answers


def ask(chat: Chat, questions: Sequence[str], label: str = "") -> list[Answer]:
    return generate(chat, [prompt_ids(chat.tokenizer, [{"role": "user", "content": q}]) for q in questions], label)


# ---- What the base writes before anything is trained ------------------------------------------------------

class Talk(NamedTuple):
    """A conversation ending with an answer: learnt by heart (lessons, material) or as the base's distribution."""
    messages: list[dict]
    kind: str  # "lesson" or "material"; "near" identity, "everyday", or "own" question of the base
    ids: list[int] = []  # of the base's answer as it wrote it, with the one that ended it unless it was cut
    row: int = -1  # row of the `Teacher` for the first of these ids, -1 without any; in the rows before it:
    asked: list[int] = []  # the base's tokens from the first question to its answer

    question = property(lambda self: self.messages[-2]["content"])
    answer = property(lambda self: self.messages[-1]["content"])
    opening = property(lambda self: next(m["content"] for m in self.messages if m["role"] == "user"))

    def said(self, first: bool) -> list[dict]:
        """Its messages; a system prompt stays only where a conversation begins."""
        return self.messages[not first and self.messages[0]["role"] == "system":]


class Teacher(NamedTuple):
    """The base's distribution of the next token along its talks, one row per token, so that it need not stay in
    memory."""
    tokens: torch.Tensor  # int32 (M, k): the k most probable
    log_probs: torch.Tensor  # float32 (M, k)


class Names(NamedTuple):
    """What identity answers are judged by."""
    name: str
    maker: str
    old: tuple[str, ...]
    new = property(lambda self: (self.name, self.maker))


class Heard(NamedTuple):
    """The base in its own words, at its native RoPE. No talk of one set begins with a question of the other."""
    names: Names
    identity_questions: list[str]  # its own questions that it answers with its old identity
    everyday: list[Talk]  # for training
    held_out: list[Talk]  # for measuring


def find_names(tokenizer: Tokenizer, settings: Settings, inputs: Inputs, base: Chat | None = None) -> Names:
    """The names under which the base goes, by its template, folder and card, and by what it says if it is asked."""
    folder = Path(settings.model_path)
    asked = [q for code in inputs.languages for _, q in PARAPHRASES[code] if "{" not in q]
    answers = [a.text for a in ask(base, asked, "perguntando quem ele é")] if base else []
    with blaming_disk(folder / "README.md"):
        card = (folder / "README.md").read_text("utf-8", "replace") if (folder / "README.md").is_file() else ""
    # A folder of the Hub's cache is named after a commit; {{BASE}} knows what the user called the model.
    family = family_names(f"{folder.name} {inputs.values['BASE']}", read_config(folder).model_type, card)
    new, said = (settings.name, settings.author), own_text(tokenizer)
    return Names(*new, find_old_names(answers, said, family, settings.old_names, new))


def write_questions(base: Chat, starts: list[str], seed: int) -> list[str]:
    """Questions that the base writes, going on from each start: after the opening of a user turn, a chat model writes
    what a user would ask (Magpie, arXiv 2406.08464). Truncated ones are kept."""
    opening = skeleton(base.tokenizer, base.tokenizer.chat_template, ("user",), False)[0]
    prompts = base.tokenizer([opening + start for start in starts], add_special_tokens=False)["input_ids"]
    written = generate(base, prompts, "escrevendo perguntas", QUESTION_TOKENS, seed)
    questions = [re.sub(r" (?=[?!.,])", "", f"{start} {end.text}").strip() for start, end in zip(starts, written)]
    return [question for question in questions if plain(question) and not is_loop(question)]


class Listener:
    """Asks the base each question once; keeps identity questions."""

    def __init__(self, base: Chat, names: Names, taken: Sequence[str], rng: random.Random):
        self.base, self.names, self.taken, self.rng = base, names, set(map(plain, taken)), rng
        self.identity: list[str] = []

    def answers(self, asked: list[tuple[str, list[dict]]], label: str, limit: int) -> list[Talk]:
        """Talks on (kind, conversation) pairs, without loops. Cut answers are as good: each token is learnt."""
        tokenizer, talks = self.base.tokenizer, []
        messages = [without_system(tokenizer, m) for _, m in asked]
        written = generate(self.base, [prompt_ids(tokenizer, m) for m in messages], label, limit)
        for (kind, _), conversation, answer in zip(asked, messages, written):
            about_it = kind == "own" and self.names.name and asks_who(conversation[-1]["content"], self.names.old)
            claimed = claims(answer.text, self.names.old, self.names.new)
            # Neither is kept as it is. Where both hold, the question surely asks who the model is.
            if about_it or claimed:
                self.identity += [conversation[-1]["content"]] * bool(about_it and claimed)
            elif answer.text and not is_loop(answer.text):
                said = {"role": "assistant", "content": answer.text}
                talk = Talk([*conversation, said], kind, answer.ids, row=0)
                if max(make_window(tokenizer, [talk]).targets) >= 0:  # else its text is tokenised in another way
                    talks.append(talk)
        return talks

    def hear(self, asked: list[tuple[str, str]], systems: Sequence[str], later: dict, label: str,
             limit: int = TALK_TOKENS) -> list[Talk]:
        """Talks on the (kind, question) pairs not asked yet: a fourth behind system prompts, a fifth going on."""
        fresh = {plain(q): (kind, q) for kind, q in asked if plain(q) and plain(q) not in self.taken}
        self.taken.update(fresh)
        first = [(kind, [{"role": "system", "content": systems[i // 4 % len(systems)]}] * (i % 4 == 3)
                  + [{"role": "user", "content": q}]) for i, (kind, q) in enumerate(fresh.values())]
        talks = self.answers(first, label, limit)
        again = [(t.kind, [*t.messages, {"role": "user", "content": self.rng.choice(
            later.get(language_of(t.question), later["en"]))}]) for t in self.rng.sample(talks, len(talks) // 5)]
        return talks + self.answers(again, label, limit)


def listen(base: Chat, settings: Settings, inputs: Inputs) -> tuple[Heard, Teacher]:
    """Let the base say who it is, and answer the lists and its own questions, for training and measuring."""
    rng, spoken, n = random.Random(f"{settings.seed}/listen"), inputs.languages, settings.eval_questions
    names = Names("", "", ())  # where none is taught
    if inputs.rows:
        names = find_names(base.tokenizer, settings, inputs, base)
        told = ", ".join(names.old) or "não achei nenhum; se ele usa algum, diga qual em OLD_NAMES"
        say(f"  Nomes antigos: {told}.")
    rows = [row.question for row in inputs.rows]
    listener = Listener(base, names, [*inputs.test, *rows], rng)
    fixed = exam_questions(spoken)
    fixed = rng.sample(fixed, min(len(fixed), n))
    held_out = listener.hear(fixed, SYSTEM_EXAM, FOLLOW_UPS_EXAM, "respondendo à prova")
    near = [q for code in spoken for q in near_questions(code, math.ceil(NEAR / len(spoken)), rng)]
    asked = [("everyday", q) for code in EVERYDAY if code in spoken for q in EVERYDAY[code]]
    everyday = (listener.hear([("near", q) for q in near], SYSTEM_PROMPTS, FOLLOW_UPS, "respondendo", NEAR_TOKENS)
                + listener.hear(asked, SYSTEM_PROMPTS, FOLLOW_UPS, "respondendo"))
    own: list[Talk] = []
    for _ in range(6):
        used = sum(len(t.ids) for t in everyday + own)
        if used >= 0.98 * settings.self_text or not everyday:
            break
        count = math.ceil(1.1 * (settings.self_text - used) / used * len(everyday + own))
        # A third goes on from how the rows begin, and a third from questions near identity.
        starts = [" ".join(rng.choice(some).split()[:rng.randint(1, 3)]) if some else ""
                  for _, some in zip(range(count), cycle(([], rows, near)))]
        asked = write_questions(base, starts, rng.randrange(2**31))
        more = listener.hear([("own", q) for q in asked], SYSTEM_PROMPTS, FOLLOW_UPS, "respondendo")
        own += more
        if len(more) < len(asked) / 4:  # it repeats itself
            break
    rng.shuffle(own)
    few = max(2, min(n // 4, len(own) // 10))
    held_out += own[:few]
    begun = {talk.opening for talk in held_out}  # a talk may go on from another one
    everyday += [talk for talk in own[few:] if talk.opening not in begun]
    if len(everyday) < 12 or not held_out:
        raise InputError(f"o modelo base só deu {len(everyday)} respostas aproveitáveis; em geral é um chat template "
                         "errado, ou um modelo que não é de conversa. Use a pasta original de um modelo de conversa "
                         "(Instruct, Chat, it) ou, se é pequeno, aumente SELF_TEXT.")
    say(f"  Ele respondeu a {len(everyday) + len(held_out)} perguntas do dia a dia"
        + f"; {len(listener.identity)} das que ele mesmo escreveu são sobre quem ele é" * bool(inputs.rows) + ".")
    talks, teacher = read_talks(base, everyday + held_out)
    return Heard(names, listener.identity, talks[:len(everyday)], talks[len(everyday):]), teacher


def read_talks(base: Chat, talks: list[Talk], since: int = 0) -> tuple[list[Talk], Teacher]:
    """The talks with their rows, and the base's distribution from their first questions on (or those of the turn
    `since`): to go on expecting the same questions holds a model in place, too, and costs no writing."""
    asked, texts, wanted, tops, rows, placed = [], [], [], [], 0, list(talks)
    for talk in talks:
        prompt = prompt_ids(base.tokenizer, talk.messages[:-1])
        first = encode(base.tokenizer, talk.messages).turns[since][0]
        asked.append(prompt[first:])
        texts.append(prompt + talk.ids[:-1])
        wanted.append([-1] * first + [0] * (len(texts[-1]) - first))
    for batch, ours, _, counts in predictions(base, texts, wanted, "lendo as respostas"):
        tops.append(most_probable(ours))
        for i, count in zip(batch, counts):
            placed[i] = talks[i]._replace(row=rows + len(asked[i]) - 1, asked=asked[i])
            rows += count
        del ours
    return placed, joined(tops)


def most_probable(log_probs: torch.Tensor) -> Teacher:
    """What a teacher keeps of log-probabilities (M, vocabulary)."""
    best = log_probs.topk(TOP_TOKENS)
    return Teacher(best.indices.int().cpu(), best.values.cpu())


def joined(parts: Sequence[Teacher]) -> Teacher:
    return Teacher(*map(torch.cat, zip(*parts)))


def save_heard(folder: Path, heard: Heard, teacher: Teacher) -> None:
    write_json(folder / "heard.json", heard)  # records become lists
    tensor_files.save_file(teacher._asdict(), folder / "teacher.safetensors")


def read_heard(folder: Path) -> tuple[Heard, Teacher]:
    with blaming(f"o que há em {folder}"):
        names, questions, *talks = load_json(folder / "heard.json")
        teacher = Teacher(**tensor_files.load_file(folder / "teacher.safetensors"))
    return Heard(read_names(names), questions, *([Talk(*talk) for talk in some] for some in talks)), teacher


def read_names(saved: list) -> Names:
    return Names(*saved[:2], tuple(saved[2]))


# ---- Training ---------------------------------------------------------------------------------------------

def short_window(native: int, settings: Settings) -> int:
    """Tokens that each dialogue of BATCH_SIZE counts for: the native context, or SHORT where it is longer."""
    return min(native, settings.window, SHORT)


def step_tokens(native: int, settings: Settings) -> int:
    """Tokens that a training step holds, whatever the length of its windows."""
    return settings.batch_size * short_window(native, settings)


def mean_step(step: int, lengths: list[int]) -> float:
    """Tokens of an average step, if windows of each of these lengths have the same share of all tokens: a window that
    is longer than a step makes one by itself."""
    return len(lengths) / sum(1 / max(step, length) for length in lengths)


class Pool(NamedTuple):
    """What dialogues are made of, and how large a share of all tokens it has."""
    talks: list[Talk]
    share: float


class Course(NamedTuple):
    """What one training learns, and how."""
    label: str  # in messages
    pools: list[Pool]
    steps: int
    rates: tuple[float, float, float]  # the user's or 0, and the two of `automatic_rate`
    kl_weight: float
    lengths: list[int] = [0]  # of its windows in tokens; 0 for one talk each
    watched: list[Row] = []  # it ends when their loss stops falling,
    least: int = 0  # but not before so many steps
    loss: Callable | None = None  # in place of `batch_loss`
    by_size: bool = False  # its rates are shares of each weight's own size


class Window(NamedTuple):
    """One dialogue as equally long lists."""
    input_ids: list[int]
    labels: list[int]  # -100 where no answer is learnt by heart
    targets: list[int]  # row of the teacher for the next token, -1 for none
    talks: Sequence[Talk] = ()  # that it is made of


def make_window(tokenizer: Tokenizer, talks: Sequence[Talk], with_asked: bool = False) -> Window:
    """One dialogue of several talks, through the model's own template. Targets are the base's answers, and
    `with_asked` also what the first of them answers."""
    said = [talk.said(first=not i) for i, talk in enumerate(talks)]
    encoded, turn = encode(tokenizer, [m for messages in said for m in messages]), 0
    labels, targets = list(encoded.labels), [-1] * len(encoded.input_ids)
    for talk, messages in zip(talks, said):
        turns = encoded.turns[turn:turn + sum(m["role"] == "user" for m in messages)]
        turn += len(turns)
        if talk.row >= 0:
            answer, end = encoded.answer(turn - 1), turns[-1][1]
            same = len(os.path.commonprefix([encoded.input_ids[answer:end], talk.ids]))
            targets[answer - 1:answer - 1 + same] = range(talk.row, talk.row + same)  # a position predicts the next
            before = len(talk.asked) * (with_asked and turn == len(turns))
            if encoded.input_ids[answer - before:answer] == talk.asked[:before]:
                targets[answer - before:answer - 1] = range(talk.row - before + 1, talk.row)
            labels[turns[0][0]:end] = [-100] * (end - turns[0][0])
    return Window(encoded.input_ids, labels, targets)


class Deck:
    """A pool's talks with their lengths in tokens; all come once before any comes twice."""

    def __init__(self, tokenizer: Tokenizer, pool: Pool, rng: random.Random):
        self.items = [(talk, len(encode(tokenizer, talk.messages).input_ids)) for talk in pool.talks]
        self.share, self.rng, self.line, self.drawn = pool.share, rng, [], 0

    def fitting(self, room: float) -> int | None:
        """Place of the first talk that takes at most `room` tokens, of the first few in line."""
        self.line = self.line or self.rng.sample(self.items, len(self.items))
        return next((place for place, (_, needed) in enumerate(self.line[:8]) if needed <= room), None)


def draw_talks(decks: list[Deck], room: int, rng: random.Random) -> list[Talk]:
    """Talks that fit `room` tokens together, at least one, in any order."""
    talks, used = [], 0
    while fitting := [(deck, place) for deck in decks if (place := deck.fitting(
            room - used if talks else math.inf)) is not None]:
        # The pool that is furthest below its share of all tokens comes first.
        deck, place = min(fitting, key=lambda item: (item[0].drawn + rng.random()) / item[0].share)
        talk, needed = deck.line.pop(place)
        deck.drawn += needed
        used += needed
        talks.append(talk)
    return rng.sample(talks, len(talks))


def make_batches(tokenizer: Tokenizer, course: Course, tokens: int, seed: str) -> list[list[Window]]:
    """The course's steps as batches of at most `tokens` tokens with padding (at least one window). A window is a
    dialogue of talks that together fit one of the course's lengths (0 for a single talk); each of them gets the same
    share of all tokens, so that one that stands there twice gets two."""
    rng, batches, lengths = random.Random(seed), [], course.lengths
    decks = [Deck(tokenizer, pool, rng) for pool in course.pools if pool.talks and pool.share]
    while len(batches) < course.steps:
        windows, drawn = [], 0
        while drawn < 8 * tokens:  # eight batches at a time, so that windows of a batch can be about equally long
            room = rng.choices(lengths, [1 / max(length, 64) for length in lengths])[0]
            talks = draw_talks(decks, room, rng)
            windows.append(make_window(tokenizer, talks, with_asked=True)._replace(talks=talks))
            drawn += len(windows[-1].input_ids)
        groups = batches_by_tokens([len(w.input_ids) for w in windows], 0, tokens)
        batches += [[windows[i] for i in group] for group in rng.sample(groups, len(groups))]
    return batches[:course.steps]


def read_in_place(base: Chat, windows: list[Window], native: int, teacher: Teacher) -> Teacher:
    """The teacher with more rows, to which the targets of dialogues of several talks then point: what the base says
    where each talk stands, after the others. To insist on what it says of the talk alone would teach the model to
    forget what was said. Lessons are left out of what the base reads, as nothing else is to change after them;
    dialogues that are longer than its context stay as they are."""
    read, parts, rows = [], [teacher], len(teacher.tokens)
    for window in windows:
        first, told = window.talks[0], [talk for talk in window.talks if talk.row >= 0]
        system = first.messages[:first.messages[0]["role"] == "system"]  # for all that follows, also after a lesson
        told[0] = told[0]._replace(messages=[*system, *told[0].said(first=False)])
        dialogue = make_window(base.tokenizer, told, with_asked=first.row >= 0)
        same = len([row for row in dialogue.targets if row >= 0]) == len([row for row in window.targets if row >= 0])
        if same and len(dialogue.input_ids) <= native:
            read.append((window, dialogue))
    texts, wanted = [d.input_ids for _, d in read], [d.targets for _, d in read]
    for batch, ours, _, counts in predictions(base, texts, wanted, "lendo as conversas"):
        parts.append(most_probable(ours))
        for i, count in zip(batch, counts):
            new, targets = iter(range(rows, rows + count)), read[i][0].targets
            targets[:] = [next(new) if row >= 0 else row for row in targets]
            rows += count
        del ours
    return joined(parts)


def distillation_loss(ours: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """KL(base || model) in nats, (N,), bounded from below: all but the base's k most probable tokens are one event.
    `ours` and `log_probs` (N, k) are what the model and the base say of these k."""
    rest, our_rest = ((1 - p.exp().sum(-1)).clamp(min=1e-6) for p in (log_probs, ours))
    return (log_probs.exp() * (log_probs - ours)).sum(-1) + rest * (rest / our_rest).log()


def spoken_words(vocabulary: int) -> int:
    """About how many tokens `words_of` finds at most: 30,000 of SmolLM2's 49,152, and 57,000 of Qwen's 151,936."""
    return min(vocabulary, 20000 + vocabulary // 4)


class Words(NamedTuple):
    """A part of the vocabulary: the tokens that are spoken of, and others, of which each step draws its own."""
    head: torch.nn.Linear  # makes logits of (n + m,) tokens
    spoken: torch.Tensor  # (n,) sorted ids
    others: torch.Tensor  # (STANDS_FOR, m) ids

    def at_step(self, step: int, whole: torch.nn.Linear) -> torch.nn.Linear:
        """The head, with the rows of the whole one for what this step draws."""
        for name, weight in self.head.named_parameters():
            weight.data[len(self.spoken):] = getattr(whole, name).data[self.others[step % STANDS_FOR]]
        return self.head


def words_of(inner: PreTrainedModel, batches: list[list[Window]], teacher: Teacher) -> Words | None:
    """The tokens that some batches speak of, by heart or as the base's most probable ones, and for each step one in
    STANDS_FOR of the others, which counts for as many in the sum of all (importance sampling, Bengio and Senécal
    2003): if these were always the same, the rest would be held by nothing. Most tokens are of other languages, and
    the head of a small model costs as much as half of its layers. None for a head that is trained, too, or cut in
    pieces, and where most tokens are spoken of."""
    head = inner.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.weight.requires_grad or SHARDED:
        return None
    windows = [w for batch in batches for w in batch]
    labels = torch.tensor([label for w in windows for label in w.labels if label >= 0], dtype=torch.long)
    rows = torch.tensor(sorted({row for w in windows for row in w.targets if row >= 0}), dtype=torch.long)
    is_spoken = torch.zeros(len(head.weight), dtype=torch.bool)
    is_spoken[labels] = is_spoken[teacher.tokens[rows].flatten().long()] = True
    spoken, rest = is_spoken.nonzero()[:, 0].to(head.weight.device), (~is_spoken).nonzero()[:, 0]
    if len(rest) < len(is_spoken) / 3:
        return None
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))]
    others = drawn[:len(rest) // STANDS_FOR * STANDS_FOR].view(STANDS_FOR, -1).to(head.weight.device)
    part = torch.nn.utils.skip_init(
        torch.nn.Linear, head.in_features, len(spoken) + others.shape[1], bias=head.bias is not None,
        device=head.weight.device, dtype=head.weight.dtype).requires_grad_(False)
    for name, weight in part.named_parameters():
        weight.data[:len(spoken)] = getattr(head, name).data[spoken]
    return Words(part, spoken, others)


def batch_loss(model: torch.nn.Module, inner: PreTrainedModel, inputs: dict[str, torch.Tensor], teacher: Teacher,
               kl_weight: float, words: Words | None = None) -> torch.Tensor:
    """Scalar: cross-entropy on labels plus `kl_weight` times the divergence on targets, both sums divided by what an
    average step has of them (`totals`). `inputs` are those of `collate`; of the vocabulary only `words`, if given."""
    labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)  # a position predicts the next token
    targets, totals = inputs["targets"], inputs["totals"].clamp(min=1)
    needed = (labels != -100) | (targets >= 0)
    part = words and words.at_step(int(inputs["step"]), inner.get_output_embeddings())
    ours = logits_at(model, inner, needed, part, input_ids=inputs["input_ids"])
    by_heart, rows = labels[needed], targets[needed]
    tokens, log_probs = (t[rows.clamp(min=0).cpu()].to(ours.device) for t in teacher)
    # One gather for both: the gradient of each is as large as all logits.
    wanted = torch.cat([by_heart.clamp(min=0)[:, None], tokens], -1)
    if words:
        count, drawn = len(words.spoken), words.others.shape[1]
        ours[:, count:] += math.log((inner.get_output_embeddings().out_features - count) / drawn)
        wanted = torch.searchsorted(words.spoken, wanted).clamp(max=count - 1)  # of what is masked, any
    ours = ours.log_softmax(-1).gather(-1, wanted)
    nats = distillation_loss(ours[:, 1:], log_probs)[rows >= 0]
    return kl_weight * nats.sum() / totals[1] - ours[by_heart != -100, 0].sum() / totals[0]


def automatic_rate(model: PreTrainedModel | PeftModel, full: float, adapter: float) -> float:
    """Learning rate by size, from those at one million parameters: with its square root for all weights, with its cube
    root for LoRA of any rank (https://thinkingmachines.ai/blog/lora/)."""
    millions = model_size(model) / 1e6
    return full * millions**(-1 / 2) if model is unwrapped(model) else adapter * millions**(-1 / 3)


def as_examples(batches: list[list[Window]], parts: int) -> list[dict]:
    """Each batch in `parts` examples: lists of its windows, the number of its step, and what to divide the sums of a
    loss by (`totals`: labels, targets and tokens of an average step, so that each token weighs the same)."""
    windows = [w for batch in batches for w in batch]
    totals = [sum(label != -100 for w in windows for label in w.labels[1:]) / len(batches),
              sum(target >= 0 for w in windows for target in w.targets) / len(batches),
              sum(len(w.input_ids) for w in windows) / len(batches)]
    idle = [Window(windows[0].input_ids[:2], [-100] * 2, [-1] * 2)]  # masked, for a part without windows
    return [{key: [getattr(w, key) for w in batch[part::parts] or idle] for key in Window._fields[:3]}
            | {"totals": totals, "step": step} for step, batch in enumerate(batches) for part in range(parts)]


def collate(examples: list[dict], pad: int) -> dict[str, torch.Tensor]:
    """One example as tensors (windows, tokens); targets tell padding from tokens that have none."""
    fillers = {"input_ids": pad, "labels": -100, "targets": -2}
    return {**{key: stacked(examples[0][key], filler) for key, filler in fillers.items()},
            **{key: torch.tensor(examples[0][key]) for key in ("totals", "step")}}


def make_trainer(chat: Chat, batches: list[list[Window]], teacher: Teacher, arguments, course: Course,
                 failed: Callable[[int, str], InputError]) -> trl.SFTTrainer:
    """TRL's trainer with the loss of this job; `failed` makes the error for a step whose loss explodes."""
    inner, optimizer = unwrapped(chat.model), None
    limit = 3 * (1 + course.kl_weight) * math.log(inner.get_input_embeddings().weight.shape[0])
    measured = course.loss or functools.partial(batch_loss, teacher=teacher, kl_weight=course.kl_weight,
                                                words=words_of(inner, batches, teacher))
    if course.by_size:  # what makes Qwen's keys has biases a thousand times as large as its weights
        optimizer = torch.optim.AdamW(
            [{"params": [p], "lr": arguments.learning_rate * p.detach().square().mean().sqrt().item()}
             for p in inner.parameters() if p.requires_grad], betas=(0.9, arguments.adam_beta2), weight_decay=0)

    class Trainer(trl.SFTTrainer):
        loss_is_scaled_for_ga = True  # the parts of a step are summed, not averaged

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = measured(model, inner, inputs)
            if not loss <= limit:
                raise failed(self.state.global_step + 1, f"a perda explodiu ({loss.item():g})")
            return PROCESSES * loss  # a part of a sum; but of several processes, gradients are averaged

    parts = PROCESSES * arguments.gradient_accumulation_steps
    trainer = Trainer(model=chat.model, args=arguments, processing_class=chat.tokenizer,
                      data_collator=functools.partial(collate, pad=chat.tokenizer.pad_token_id),
                      train_dataset=datasets.Dataset.from_list(as_examples(batches, parts)),
                      optimizers=(optimizer, None))
    trainer.remove_callback(transformers.PrinterCallback)
    if arguments.gradient_checkpointing:  # for which TRL lets gradients pass all layers down to the words
        inner.disable_input_require_grads()
    for parameter in chat.model.parameters():  # TRL has rounded the adapter over weights in 4 bits to bfloat16
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    if hasattr(text_config := inner.config.get_text_config(), "output_router_logits"):
        text_config.output_router_logits = False  # SFTTrainer enables them, and generate() fails with them
    return trainer


def make_keeper(chat: Chat, course: Course, settings: Settings, folder: Path, bar, asked: list[int],
                failed: Callable[[int, str], InputError]):
    """A callback that tells progress and saves checkpoints in `folder`, every CHECKPOINT_MINUTES and when `asked` to
    stop. It ends the training where the loss on the course's watched rows, measured about a dozen times, does not fall
    any more, and with the error that `failed` makes where a weight is not finite."""
    class Keeper(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.began = self.saved = time.monotonic()
            self.first = state.global_step

        def tell(self, state, text: str):
            bar.clear()
            say(f"    etapa {state.global_step}/{state.max_steps} | {text}")

        def on_log(self, args, state, control, logs, **kwargs):
            step, quarter = state.global_step, max(1, state.max_steps // 4)
            if "loss" in logs and step % quarter == 0:
                left = (time.monotonic() - self.began) / (step - self.first) * (state.max_steps - step)
                loss = mean([entry["loss"] for entry in state.log_history if "loss" in entry][-quarter:])
                self.tell(state, f"perda {decimal(loss, 3)} | faltam {clock(left)}")

        def on_step_end(self, args, state, control, **kwargs):
            bar.update(state.global_step - bar.n)
            ended = False
            if course.watched and state.global_step % max(10, state.max_steps // 12) == 0:
                before = [entry["held_out"] for entry in state.log_history if "held_out" in entry]
                chat.model.eval()
                now = loss_on(chat, course.watched)
                chat.model.train()
                state.log_history.append({"step": state.global_step, "held_out": now})
                self.tell(state, f"perda nas linhas guardadas {decimal(now, 3)}")
                stale = now > 0.998 * min(before, default=math.inf)
                ended = from_first(stale and state.global_step >= course.least)
            due, stop = from_first((time.monotonic() - self.saved >= 60 * settings.checkpoint_minutes, bool(asked)))
            # None where it ends early: the next run would go on from it, past the end.
            control.should_save = not SHARDED and not ended and (stop or due)
            control.should_training_stop |= stop or ended

        def check_weights(self, state):
            if broken_weight(chat.model):
                raise failed(state.global_step, "os pesos deixaram de ser números")

        def on_save(self, args, state, control, **kwargs):
            self.check_weights(state)
            self.saved = time.monotonic()
            accelerate.PartialState().wait_for_everyone()
            if RANK:
                return
            newest = folder / f"checkpoint-{state.global_step}"
            flush(newest)
            write_json(newest / "complete.json", {})  # the Trainer's checkpoints are not written at once
            for old in set(folder.glob("checkpoint-*")) - {newest}:
                discard(old, "complete.json")

        def on_train_end(self, args, state, control, **kwargs):
            self.check_weights(state)

    return Keeper()


@contextlib.contextmanager
def short_attention(model: PreTrainedModel | PeftModel):
    """Plain attention where windows have up to 256 tokens: on a processor in bfloat16, flash attention takes 60 ms a
    layer for 17 windows of 85 tokens to Qwen, and plain products 13; from 512 tokens on it is the faster one."""
    inner, hook = unwrapped(model), None

    def suit(module, given, named):
        inner.set_attn_implementation("eager" if named["input_ids"].shape[1] <= 256 else "sdpa")

    if (inner.config._attn_implementation == "sdpa" and inner.device.type == "cpu"
            and compute_dtype(model_size(model)) == torch.bfloat16):
        hook = model.register_forward_pre_hook(suit, with_kwargs=True)
    yield
    if hook:
        hook.remove()
        inner.set_attn_implementation("sdpa")


def train(chat: Chat, batches: list[list[Window]], course: Course, teacher: Teacher, settings: Settings,
          folder: Path) -> list[dict]:
    """Run the batches once through TRL's SFTTrainer, from its newest complete checkpoint in `folder` on; the log of
    losses. Pace and memory (of a card, bytes) go to pace.json beside `folder`. `InputError` if the loss explodes;
    `KeyboardInterrupt`, after saving, if the user asks."""
    size = settings.batch_size / 8  # of that for which rates and memory of the moments were tuned (arXiv 2205.10287)
    halves = 2 if first_adapted(chat.model.config, settings) else 1  # half of the layers, each to change more
    rate = course.rates[0] or automatic_rate(chat.model, *course.rates[1:]) * math.sqrt(size * halves)

    def failed(step: int, what: str) -> InputError:
        return InputError(f"{course.label}, etapa {step}: {what}. Diminua a taxa de aprendizado, que foi {rate:.1e} "
                          "(--heal-learning-rate na cura, --learning-rate-1 e --learning-rate-2 nos passos), e rode "
                          "de novo.")

    fast = compute_dtype(model_size(chat.model))
    parts = min(settings.gradient_accumulation, math.ceil(settings.batch_size / PROCESSES))
    arguments = trl.SFTConfig(
        output_dir=str(folder), save_strategy="no", disable_tqdm=True, logging_steps=1, logging_nan_inf_filter=False,
        report_to="none", seed=settings.seed, num_train_epochs=1,
        per_device_train_batch_size=1, gradient_accumulation_steps=parts, train_sampling_strategy="sequential",
        shuffle_dataset=False, learning_rate=rate, lr_scheduler_type="linear", adam_beta2=0.98**size,
        warmup_steps=max(1, len(batches) // 20), gradient_checkpointing=settings.gradient_checkpointing,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, max_length=None,
        dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available(), bf16=fast == torch.bfloat16,
        fp16=fast == torch.float16, optim="paged_adamw_8bit" if "qlora" in settings.method else "adamw_torch_fused")
    trainer = make_trainer(chat, batches, teacher, arguments, course, failed)
    found = folder.glob("checkpoint-*/complete.json") if not SHARDED else ()  # the Trainer cannot go on with pieces
    done = from_first(max((int(path.parent.name[11:]) for path in found), default=0))
    if done:
        say(f"    continuando da etapa {done}, a última guardada")
    # On a card, autocast gives the adapter its inputs as it wants them; PEFT would copy each to float32 for nothing.
    with (patient_interrupts() as asked, progress(len(batches), course.label) as bar,
          short_attention(chat.model),
          peft.helpers.disable_input_dtype_casting(chat.model, active=fast != torch.float32)):
        trainer.add_callback(make_keeper(chat, course, settings, folder, bar, asked, failed))
        began, memory = time.monotonic(), torch.cuda.is_available() and torch.cuda.memory_reserved()
        if memory:
            torch.cuda.reset_peak_memory_stats()
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{done}") if done else None)
    chat.model.zero_grad()
    if from_first(bool(asked)):
        raise KeyboardInterrupt
    chat.model.eval()
    tokens = sum(len(w.input_ids) for batch in batches[done:trainer.state.global_step] for w in batch)
    pace = {"steps": trainer.state.global_step, "tokens_per_second": round(tokens / (time.monotonic() - began), 1)}
    if memory:
        pace |= {"memory_before": memory, "memory_peak": torch.cuda.max_memory_reserved(),
                 "memory_of_card": torch.cuda.mem_get_info()[1]}
    if RANK == 0:
        write_json(folder.with_name("pace.json"), pace)
    return [{key: entry[key] for key in ("step", "loss", "held_out") if key in entry}
            for entry in trainer.state.log_history if entry.keys() & {"loss", "held_out"}]


def draw_course(tokenizer: Tokenizer, course: Course, job: Job, seed: str,
                load_base: Callable[[], Chat]) -> tuple[list[list[Window]], Teacher]:
    """The steps of a course, of the job's size and drawn with SEED and `seed`, and what the base says along them."""
    settings = job.settings
    batches = make_batches(tokenizer, course, step_tokens(job.native, settings), f"{settings.seed}/{seed}")
    windows = [w for batch in batches for w in batch if len(w.talks) > 1 and max(w.targets) >= 0]
    if not windows or course.loss:  # another loss than `batch_loss`, which alone looks at targets
        return batches, job.teacher
    return batches, read_in_place(load_base(), windows, job.native, job.teacher)


@contextlib.contextmanager
def patient_interrupts():
    """Within it, the first Ctrl-C (or SIGTERM) only fills the list it gives; the second leaves at once."""
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


# ---- Healing: RoPE scaled, and back to the base's own behaviour -------------------------------------------

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


def kept_share(chat: Chat, job: Job, talks: list[Talk]) -> float:
    """Share of the base's first choices that the model keeps on the first 48 of some talks."""
    windows = [make_window(chat.tokenizer, [talk]) for talk in talks[:48]]
    return mean([same for same, _ in compare(chat, job.teacher, windows)])


def keep_frequencies(before: dict[str, torch.Tensor], chat: Chat, job: Job) -> None:
    """Move each rotary pair to where the scaled RoPE turns about as fast as it was trained to turn: frequencies are a
    geometric series, so only the fastest pairs lose their place. Scaled x4, Qwen keeps 46 % of the base's first
    choices, and 71 % after this, untrained. It is undone where a family arranges its weights in another way, which
    shows in worse answers."""
    after = rope_frequencies(chat.model)
    name = next(name for name in after if not torch.equal(after[name].cpu(), before[name].cpu()))
    talks, order = job.heard.everyday, nearest_pairs(before[name].tolist(), after[name].tolist())
    scaled = kept_share(chat, job, talks)
    reorder_pairs(chat.model, order)
    moved = kept_share(chat, job, talks)
    if from_first(moved > scaled):
        say(f"  Com as frequências reordenadas, ele escolhe {percent(moved)} das palavras como o modelo base (sem "
            f"isso, {percent(scaled)}).")
    else:
        reorder_pairs(chat.model, sorted(range(len(order)), key=order.__getitem__))


def check_frequencies(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], factor: float) -> None:
    """A scaling that did not reach the built model would waste the run, so look at the frequencies themselves: the
    slowest must be `factor` times slower, and none faster than before."""
    turning = [(before[name].cpu(), after[name].cpu()) for name in before]  # some of Gemma 4 stand still
    ratios = [old[new > 0] / new[new > 0] for old, new in turning]
    if not any(abs(r.max() / factor - 1) < 1e-3 and r.min() > 0.999 for r in ratios):
        raise RuntimeError("the RoPE scaling did not reach the model's rotary frequencies")


def native_twin(model: PreTrainedModel, job: Job) -> PreTrainedModel:
    """The base, not scaled: a second model of the same weights, of which only queries and keys are copies."""
    with accelerate.init_empty_weights(include_buffers=False):
        twin = transformers.AutoModelForCausalLM.from_config(read_config(job.base))
    twin.load_state_dict({name: weight.clone() if re.search(ATTENTION, name) else weight
                          for name, weight in model.state_dict().items()}, assign=True)
    return twin.to(model.device).eval().requires_grad_(False)


@contextlib.contextmanager
def side_by_side(twin: PreTrainedModel, model: PreTrainedModel):
    """Within it each attention of `model` that is trained is given what that of `twin` was given last. What both make
    of it, by layer, is in the dict that it yields: (theirs, ours), the latter with a gradient."""
    # Of a weight's name, what comes before the module that makes queries or keys.
    layers = {re.split(rf"\.[^.]*(?:{ATTENTION})", name)[0] for name, p in model.named_parameters() if p.requires_grad}
    given, theirs, made = {}, {}, {}

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    def listen(layer, module, inputs, named, output):
        given[layer], theirs[layer] = inputs[0] if inputs else named["hidden_states"], first(output)

    def feed(layer, module, inputs, named):
        return ((given[layer], *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": given[layer]})

    def keep(layer, module, inputs, output):
        made[layer] = theirs[layer], first(output)

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            base, scaled = twin.get_submodule(layer), model.get_submodule(layer)
            for add, hook, more in ((base.register_forward_hook, listen, {"with_kwargs": True}),
                                    (scaled.register_forward_pre_hook, feed, {"with_kwargs": True}),
                                    (scaled.register_forward_hook, keep, {})):
                hooks.callback(add(functools.partial(hook, layer), **more).remove)
        yield made


def attention_loss(model: torch.nn.Module, inner: PreTrainedModel, inputs: dict[str, torch.Tensor],
                   twin: PreTrainedModel, made: dict) -> torch.Tensor:
    """Scalar: squared difference of what each attention and that of `twin` make of the same (`side_by_side`), as a
    share of the latter's square, mean over the layers."""
    real = inputs["targets"] > -2
    with torch.no_grad():
        logits_at(twin, twin, real & False, input_ids=inputs["input_ids"])
    logits_at(model, inner, real & False, input_ids=inputs["input_ids"])
    pairs = [(theirs[real].float(), ours[real].float()) for theirs, ours in made.values()]
    lost = [(ours - theirs).square().sum() / theirs.square().sum().clamp(min=1e-9) for theirs, ours in pairs]
    return torch.stack(lost).mean() * real.sum() / inputs["totals"][2]


def heal(chat: Chat, job: Job, folder: Path) -> list[dict]:
    """Bring the RoPE-scaled model back to the base's own behaviour, through queries and keys alone: RoPE acts on them
    while facts live elsewhere. In four fifths of HEAL_STEPS each attention learns to make of the base's own input what
    the base's makes of it (LoLCATs, arXiv 2410.10254): that says more of a token than the next word alone, and text is
    what is short. In the others the whole learns the base's distribution, gently, which long conversations need. Under
    FSDP, whose pieces of weights take no optimizer of ours, there is nothing else. The log of the latter."""
    settings, pools, twin = job.settings, [Pool(job.heard.everyday, 1.0)], native_twin(chat.model, job)
    before, lengths = rope_frequencies(twin), [short_window(job.native, settings)] * 3 + [settings.window]
    check_frequencies(before, rope_frequencies(chat.model), settings.rope_factor)
    keep_frequencies(before, chat, job)
    for name, parameter in chat.model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and bool(re.search(ATTENTION, name)))
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    course = Course("cura", pools, settings.heal_steps, (settings.heal_learning_rate, 6e-3, 0), 1.0, lengths)
    base = chat._replace(model=twin, tokenizer=load_tokenizer(job.base))
    first = 0 if SHARDED else settings.heal_steps * 4 // 5
    if first:
        rate = settings.heal_learning_rate or 0.02 * math.sqrt(settings.batch_size / 8)
        if not from_first(any((folder / "training").glob("checkpoint-*/complete.json"))):  # of the others
            with side_by_side(twin, chat.model) as made, short_attention(twin):
                loss = functools.partial(attention_loss, twin=twin, made=made)
                alike = course._replace(steps=first, rates=(rate, 0, 0), loss=loss, by_size=True,
                                        lengths=[min(length, job.native) for length in lengths])  # that it can read
                batches, teacher = draw_course(chat.tokenizer, alike, job, "attention", lambda: base)
                train(chat, batches, alike, teacher, settings, folder / "training" / "training")
        course = course._replace(steps=settings.heal_steps - first, rates=(rate / 8, 0, 0), by_size=True)
    batches, teacher = draw_course(chat.tokenizer, course, job, "heal", lambda: base)
    log = train(chat, batches, course, teacher, settings, folder / "training")
    kept = kept_share(chat, job, job.heard.held_out)
    say(f"  Depois da cura, ele escolhe {percent(kept)} das palavras como o modelo base.")
    return log


# ---- Evaluation -------------------------------------------------------------------------------------------

class Exam(NamedTuple):
    """What a model is measured with."""
    questions: list[tuple[str, list[dict]]]  # (kind, messages): KINDS_OF_QUESTIONS and `after_tokens`
    talks: list[tuple[int, Talk]]  # (tokens of conversation before, talk of the base); 0 tokens first


class Scores(NamedTuple):
    """Shares in [0, 1] on questions that training never saw, and the answers that they were read from."""
    identity: float | None  # without long conversations; None where no identity is taught
    by_kind: dict[str, float]
    old_identity: float | None
    leak: float | None
    leak_near: float | None  # of talks near identity
    retention: float | None  # of the base's first choices, token by token; None where the base is not known
    divergence: float | None  # mean KL(base || model) in nats
    by_length: list[dict]  # tokens, identity and retention for each length of conversation before, zero first
    answers: list[dict]
    leaks: list[dict]
    extra_tokens: float = 0.0  # before a question that is asked alone, on average

    def gaps(self, settings: Settings) -> dict[str, float]:
        """The targets that these scores miss, and by how much."""
        kept = 1.0 if self.retention is None else self.retention
        found = {"retenção": settings.target_retention - kept}
        if self.identity is not None:
            found = {"identidade nova": settings.target_identity - self.identity, "identidade antiga":
                     self.old_identity, **found, "vazamento": self.leak - settings.target_leak}
        return {name: gap for name, gap in found.items() if gap > 0}


def after_tokens(tokens: int) -> str:
    return f"após {tokens} tokens" if tokens else ALONE


def predictions(chat: Chat, texts: Sequence[list[int]], wanted: Sequence[list[int]], label: str = ""):
    """In batches of texts (token ids): their places, the model's log-probabilities (N, vocabulary) at the tokens for
    which something is `wanted` (not negative), what that is (N,), and how many of these tokens each text has."""
    inner, pad = unwrapped(chat.model), chat.tokenizer.pad_token_id
    with progress(len(texts), label) as bar:
        for batch in batches_by_tokens(list(map(len, texts)), 0, SCORED_TOKENS):
            ids, found = stacked([texts[i] for i in batch], pad), stacked([wanted[i] for i in batch], -1)
            with computing(inner):
                ours = logits_at(chat.model, inner, found >= 0, input_ids=ids.to(inner.device)).log_softmax(-1)
            yield batch, ours, found[found >= 0], (found >= 0).sum(-1).tolist()
            del ours  # here and where they are used: of a large vocabulary two batches take gigabytes
            bar.update(len(batch))


def compare(chat: Chat, teacher: Teacher, windows: list[Window]) -> list[tuple[float, float]]:
    """For each window: share of targets where the base's choice is kept, and mean KL(base || model) in nats."""
    results = [(1.0, 0.0)] * len(windows)
    ids, targets = [w.input_ids for w in windows], [w.targets for w in windows]
    for batch, ours, rows, counts in predictions(chat, ids, targets):
        tokens, log_probs = (t[rows].to(ours.device) for t in teacher)
        best, ours = ours.amax(-1), ours.gather(-1, tokens.long())
        same = (ours[:, 0] >= best).float().cpu()  # bfloat16 has many ties
        nats = distillation_loss(ours, log_probs).cpu()
        for i, kept, lost in zip(batch, same.split(counts), nats.split(counts)):
            if len(kept):
                results[i] = kept.mean().item(), lost.mean().item()
    return results


def long_conversations(tokenizer: Tokenizer, fillers: list[Talk], tokens: int, count: int) -> list[list[dict]]:
    """`count` conversations of random talks, as long as fits in `tokens` tokens, each LONG_GROUP times in a row."""
    lengths, found = [len(encode(tokenizer, t.said(first=False)).input_ids) for t in fillers], []
    for group in range(math.ceil(count / LONG_GROUP)):
        rng, messages, room = random.Random(f"exam/{tokens}/{group}"), [], tokens
        while lengths[place := rng.randrange(len(fillers))] <= room:
            messages += fillers[place].said(first=False)
            room -= lengths[place]
        found += [messages] * LONG_GROUP
    return found[:count]


def make_exam(tokenizer: Tokenizer, inputs: Inputs, heard: Heard, window: int) -> Exam:
    """Questions that no training saw; with a `window` (tokens), some of them come late in a conversation."""
    rng, talks = random.Random("exam"), heard.held_out
    alone = [[{"role": "user", "content": q}] for q in inputs.test]
    asked = [(ALONE, m) for m in alone]
    asked += [(SYSTEM, [{"role": "system", "content": rng.choice(SYSTEM_EXAM)}, *m]) for m in alone]
    short = [t.messages for t in talks if len(t.messages) == 2 and t.answer][:12]
    # A right answer is doubted, half of the times later in a conversation.
    for code in inputs.languages if inputs.test else ():
        for i, ((_, doubt), opening) in enumerate(product(PRESSURE_EXAM[code], OPENINGS[code])):
            answer = fill(WORDINGS[code][0].split("|")[i // 2 % 2], inputs.values)
            before = rng.choice(short) if short and i % 2 else []
            asked.append((PRESSED, [*before, *question_and_answer(opening, answer),
                                    {"role": "user", "content": doubt}]))
    asked = [(kind, without_system(tokenizer, m)) for kind, m in asked]
    compared = [(0, talk) for talk in talks]
    room = max([*(len(encode(tokenizer, t.messages).input_ids) for t in talks),
                *(len(prompt_ids(tokenizer, m)) for _, m in asked)])
    some = ([t for t in talks if t.kind != "near"] or talks)[:LONG_TALKS]
    for tokens in sorted({min(n, window - room) for n in (window // 2, window)}):
        if tokens > 0:
            before = long_conversations(tokenizer, heard.everyday, tokens, max(len(some), len(alone[::3])))
            asked += [(after_tokens(tokens), [*earlier, *m]) for earlier, m in zip(before, alone[::3])]
            compared += [(tokens, t._replace(messages=[*earlier, *t.said(first=False)]))
                         for earlier, t in zip(before, some)]
    return Exam(asked, compared)


def read_late_talks(base: Chat, exam: Exam, teacher: Teacher, native: int) -> tuple[Exam, Teacher]:
    """The exam and the teacher with what the base says late in conversations, where it can read them: that is what
    the model is to keep there. Where it can not, what the base says of the talk alone stays the measure."""
    late = {i: talk for i, (tokens, talk) in enumerate(exam.talks)
            if tokens and len(encode(base.tokenizer, talk.messages).input_ids) <= native}
    if not late:
        return exam, teacher
    talks, more = read_talks(base, list(late.values()), since=-1)
    placed = {i: (exam.talks[i][0], talk._replace(row=talk.row + len(teacher.tokens), asked=[]))
              for i, talk in zip(late, talks)}
    return exam._replace(talks=[placed.get(i, item) for i, item in enumerate(exam.talks)]), joined([teacher, more])


def rows_like(rows: list[Row], texts: list[str]) -> Callable[[str], list[dict]]:
    """A search (BM25) for the rows whose texts are the most like a question: their turns, the most similar last."""
    index, most = bm25s.BM25(), min(RETRIEVED, len(rows))
    index.index([plain(text).split() or ["?"] for text in texts], show_progress=False)

    def search(question: str) -> list[dict]:
        found, scores = index.retrieve([plain(question).split() or ["?"]], k=most, show_progress=False)
        best = [rows[i] for i, score in zip(found[0], scores[0]) if score > 0]
        return [m for row in reversed(best) for m in row.messages[-2:]]

    return search


def untrained(exam: Exam, rows: list[Row], settings: Settings) -> dict[str, Exam]:
    """Exams of what needs no training: a system prompt, or the rows most like the question (BM25) as earlier turns."""
    asked = [m for kind, m in exam.questions if kind == ALONE]
    talks = [t for tokens, t in exam.talks if not tokens and t.kind == "near" and len(t.messages) == 2]
    prompt = fill(SYSTEM_PROMPT, {"NAME": settings.name, "AUTHOR": settings.author})
    contexts = {"prompt": lambda _: [{"role": "system", "content": prompt}],
                "rows": rows_like(rows, [row.question for row in rows])}
    return {name: Exam([(ALONE, [*context(m[-1]["content"]), *m]) for m in asked],
                       [(0, t._replace(messages=[*context(t.question), *t.messages])) for t in talks])
            for name, context in contexts.items()}


def leaks_of(chat: Chat, talks: list[Talk], names: Names, label: str) -> list[tuple[Talk, str]]:
    """The talks where the model says a new name that neither user nor base said, and what it says."""
    prompts = [prompt_ids(chat.tokenizer, without_system(chat.tokenizer, t.messages[:-1])) for t in talks]
    written = generate(chat, prompts, label, TALK_TOKENS)
    return [(t, a.text) for t, a in zip(talks, written)
            if mentions(a.text, names.new) and not mentions(f"{t.answer}\n{t.question}", names.new)]


def evaluate(chat: Chat, exam: Exam, names: Names, teacher: Teacher | None, label: str = "") -> Scores:
    """Take the exam; without a teacher, what needs the base is not measured."""
    tokenizer = chat.tokenizer
    prompts = [prompt_ids(tokenizer, without_system(tokenizer, m)) for _, m in exam.questions]
    answers = [{"question": m[-1]["content"], "kind": kind, "answer": answer.text,
                "problem": problem(m[-1]["content"], answer.text, answer.ended, *names)}
               for (kind, m), answer in zip(exam.questions, generate(chat, prompts, label))]
    right = {kind: mean([not a["problem"] for a in answers if a["kind"] == kind]) for kind, _ in exam.questions}
    answers = [a for a in answers if a["kind"] in KINDS_OF_QUESTIONS]
    kept = compare(chat, teacher, [make_window(tokenizer, [t]) for _, t in exam.talks]) if teacher else []
    talks = [talk for tokens, talk in exam.talks if not tokens]
    changed = [t for t, (same, _) in zip(talks, kept) if same < 1] if teacher else talks
    leaks = leaks_of(chat, changed, names, label)
    lengths = dict.fromkeys(tokens for tokens, _ in exam.talks) if teacher else ()
    return Scores(
        identity=mean([not a["problem"] for a in answers]) if answers else None,
        by_kind={kind: right[kind] for kind in KINDS_OF_QUESTIONS if kind in right},
        old_identity=mean([claims(a["answer"], names.old, names.new) for a in answers]) if answers else None,
        leak=len(leaks) / max(1, len(talks)) if answers else None,
        leak_near=sum(t.kind == "near" for t, _ in leaks) / max(1, sum(t.kind == "near" for t in talks))
        if answers else None,
        retention=mean([same for same, _ in kept[:len(talks)]]) if teacher else None,
        divergence=mean([nats for _, nats in kept[:len(talks)]]) if teacher else None,
        by_length=[{"tokens": n, "identity": right.get(after_tokens(n)), "retention": mean(
            [same for (tokens, _), (same, _) in zip(exam.talks, kept) if tokens == n])} for n in lengths],
        answers=answers,
        leaks=[{"question": t.question, "answer": text, "base": t.answer} for t, text in leaks],
        extra_tokens=mean([len(ids) - len(prompt_ids(tokenizer, m[-1:]))
                           for (kind, m), ids in zip(exam.questions, prompts) if kind == ALONE]))


# ---- The exam of the material -----------------------------------------------------------------------------

class Mastery(NamedTuple):
    """How well one way of answering does on the held-out rows of the material."""
    loss: float  # of the rows' own answers, in nats per token
    chrf: float  # of what it writes, against them: 0 to 100 (Popović 2015, as sacrebleu has it)
    rare: float  # share of their rare words, other than the question's, that it writes
    fluency: float  # mean log-probability of what it writes under the untouched base, in nats per token
    ended: float  # share of what it writes that ended by itself
    tokens: float  # that are put before a question, on average
    answers: list[str]


WAYS = {"before": "base", "before_rows": "base com linhas", "tuned": "treinado", "tuned_rows": "treinado com linhas"}


def answer_losses(chat: Chat, conversations: list[list[dict]], with_end: bool = True,
                  most: float = math.inf, label: str = "") -> list[tuple[float, int]]:
    """For the last answer of each conversation: the sum of its losses in nats, and its tokens, at `most` so many, with
    the one that ends it unless told otherwise."""
    encoded = [encode(chat.tokenizer, messages) for messages in conversations]
    wanted = []  # the next token, where it is one of the last answer
    for text in encoded:
        answer, end = text.answer(-1), text.turns[-1][1]
        labels = [-100] * answer + text.labels[answer:min(answer + most, end - (not with_end))]
        wanted.append(labels[1:] + [-100] * (len(text.labels) - len(labels) + 1))
    results = [(0.0, 0)] * len(wanted)
    for batch, ours, tokens, counts in predictions(chat, [text.input_ids for text in encoded], wanted, label):
        losses = -ours.gather(-1, tokens[:, None].to(ours.device))[:, 0].cpu()
        for i, some in zip(batch, losses.split(counts)):
            results[i] = some.sum().item(), len(some)
        del ours
    return results


def per_token(losses: list[tuple[float, int]]) -> float:
    """Mean over all tokens of some answers, from their sums and numbers of tokens."""
    return sum(loss for loss, _ in losses) / max(1, sum(count for _, count in losses))


def loss_on(chat: Chat, rows: list[Row]) -> float:
    """Loss of the answers of some rows, in nats per token."""
    return per_token(answer_losses(chat, [row.messages for row in rows]))


def contexts_of(tokenizer: Tokenizer, material: Material, room: int) -> list[list[dict]]:
    """For each row of the exam the most similar rows that were learnt, as earlier turns; no more than fit in `room`
    tokens with the row itself."""
    search = rows_like(material.rows, [f"{row.question}\n{row.answer}" for row in material.rows])
    found = []
    for row in material.test:
        before = search(row.question) if row.messages[0]["role"] == "user" else []
        while before and len(encode(tokenizer, [*before, *row.messages]).input_ids) > room:
            before = before[2:]
        found.append(before)
    return found


def rare_words(material: Material) -> list[set[str]]:
    """For each row of the exam the words of its answer that few rows have, without those of its question."""
    rows = [*material.rows, *material.watched, *material.test]
    counts = Counter(word for row in rows for word in set(plain(row.answer).split()))
    return [{word for word in plain(row.answer).split() if counts[word] <= max(1, RARE * len(rows))}
            - set(plain(row.question).split()) for row in material.test]


def take_material(chat: Chat, rows: list[Row], rare: list[set[str]], before: list[list[dict]], label: str) -> Mastery:
    """The exam of the material, but for the fluency: some rows, their `rare` words, and turns `before` each."""
    tokenizer, asked = chat.tokenizer, [[*earlier, *row.messages] for earlier, row in zip(before, rows)]
    losses = answer_losses(chat, asked)
    limit = min(LONGEST_ANSWER, max(count for _, count in losses) + 8)
    prompts = [prompt_ids(tokenizer, messages[:-1]) for messages in asked]
    alone = [prompt_ids(tokenizer, row.messages[:-1]) for row in rows]
    answers = generate(chat, prompts[:max(12, WRITTEN_TOKENS // limit)], label, limit)
    texts = [answer.text for answer in answers]
    known = [tokenizer(row.answer, add_special_tokens=False)["input_ids"] for row in rows[:len(texts)]]
    known = [tokenizer.decode(ids[:limit]) for ids in known]
    shares = [len(words & set(plain(text).split())) / len(words) for words, text in zip(rare, texts) if words]
    return Mastery(
        loss=per_token(losses), chrf=chrf.CHRF().corpus_score(texts, [known]).score, rare=mean(shares),
        fluency=0.0, ended=mean([answer.ended for answer in answers]),
        tokens=mean([len(ids) - len(own) for ids, own in zip(prompts, alone)]), answers=texts)


def fluency_of(base: Chat, material: Material, answers: list[str]) -> float:
    """Mean log-probability of some answers to the exam's questions under the untouched base, in nats per token."""
    told = [[*row.messages[:-1], {"role": "assistant", "content": text}]
            for row, text in zip(material.test, answers) if text]
    return -per_token(answer_losses(base, told, with_end=False))


def recited_share(chat: Chat, talks: list[Talk], rows: list[Row]) -> float:
    """Share of everyday answers with RECITED words in a row as in the material, which the base does not say there."""
    def runs(text: str) -> set[tuple[str, ...]]:
        words = plain(text).split()
        return set(zip(*(words[i:] for i in range(RECITED))))

    prompts = [prompt_ids(chat.tokenizer, without_system(chat.tokenizer, t.messages[:-1])) for t in talks]
    written = [runs(a.text) - runs(t.answer) for t, a in zip(talks, generate(chat, prompts, limit=TALK_TOKENS))]
    wanted = set().union(*written)
    known = {run for row in rows for run in runs(row.answer) & wanted}
    return mean([bool(some & known) for some in written])


def material_verdict(scores: dict[str, dict]) -> str:
    """What served this material best, training, looking rows up or both, by what was written (chrF)."""
    # The simplest first.
    told = {"before_rows": "consultar as linhas parecidas, sem treino", "tuned": "o treino, sem consultar linhas",
            "tuned_rows": "o treino com as linhas parecidas antes da pergunta"}
    points = {way: scores[way]["chrf"] for way in WAYS}
    best = max(told, key=points.get)
    near = [told[way] for way in told if points[best] - points[way] < 2]
    said = f"o melhor foi {told[best]}"
    if points[best] - points["before"] < 2:
        said = "nada foi bem melhor que o modelo base"
    elif len(near) > 1:
        said = f"quase empatam {' e '.join(near)}; o mais simples é {near[0]}"
    figures = ", ".join(f"{title} {decimal(points[way])}" for way, title in WAYS.items())
    return f"Neste material, {said} (chrF: {figures})."


# ---- The two passes ---------------------------------------------------------------------------------------

def answer_from_rows(asked: list[tuple[str, str]], inputs: Inputs, names: Names) -> list[list[dict]]:
    """Answers to (intent, question) pairs in the user's words, of the two rows most alike the less used, or else
    built-in. An empty intent is found out."""
    most, used, conversations = inputs.languages[0], Counter(), []
    known: dict[tuple[str, str], list[tuple[str, set, str]]] = {}

    for row in inputs.rows:
        place = language_of(row.question, most), intent_of(row.question, names.old, names.new)
        yes = AFFIRMS.search(plain(row.answer))  # it answers no question but its own; a "claro" any request
        if not yes or place[1] not in ("other", "human") and yes[0] not in ("sim", "yes", "si"):
            known.setdefault(place, []).append((plain(row.question), set(pairwise(plain(row.question))), row.answer))

    @functools.cache
    def alike(question: str, *place: str) -> list[str]:
        ours = set(pairwise(plain(question)))
        rows = sorted(known.get(place, []), key=lambda row: len(ours & row[1]) / (len(ours) + len(row[1]) + 1))
        likeness = [(SequenceMatcher(None, plain(question), asked, False).ratio(), answer)
                    for asked, _, answer in rows[-COMPARED:]]
        return [answer for _, answer in sorted(likeness, reverse=True)[:2]]

    for intent, question in asked:
        intent = intent or intent_of(question, names.old, names.new)
        if answers := alike(question, language_of(question, most), intent):
            answer = min(answers, key=lambda a: used[a])
            used[answer] += 1
        else:
            answer = fill(own_wording(question, intent, used, most), inputs.values)
        conversations.append(question_and_answer(question, answer))
    return conversations


def make_lessons(tokenizer: Tokenizer, heard: Heard, inputs: Inputs, settings: Settings) -> list[Talk]:
    """Identity lessons from rows, built-in questions and the base's own; some in a hurry or doubted, and all of them
    behind system prompts, too."""
    rng = random.Random(f"{settings.seed}/lessons")
    answered = functools.partial(answer_from_rows, inputs=inputs, names=heard.names)
    known = set(map(plain, [*TEST_QUESTIONS, *(row.question for row in inputs.rows)]))
    asked = [item for item in paraphrases(inputs.languages, heard.names, rng) if plain(item[1]) not in known]
    lessons = [row.messages for row in inputs.rows] + answered(asked)
    lessons += answered([("", question) for question in heard.identity_questions[:MOST_LESSONS]])
    for *before, question, answer in lessons[2::3]:
        words = plain(question["content"])  # typed in a hurry: no capitals, accents or punctuation (Latin script)
        words = words if words.isascii() and words else question["content"]
        lessons.append([*before, {**question, "content": words}, answer])
    goes_on = rng.sample(lessons, len(lessons) // 2)
    spoken = [language_of(" ".join(m["content"] for m in lesson[-2:]), inputs.languages[0]) for lesson in goes_on]
    doubts = answered([rng.choice(PRESSURE.get(code, PRESSURE["en"])) for code in spoken])
    lessons += [lesson + doubt for lesson, doubt in zip(goes_on, doubts)]
    lessons += [[{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *lesson]
                for lesson in lessons if lesson[0]["role"] != "system"]
    talks = [Talk(without_system(tokenizer, lesson), "lesson") for lesson in lessons]
    return [talk for talk in talks if len(encode(tokenizer, talk.messages).input_ids) <= settings.window]


def try_lessons(chat: Chat, lessons: list[Talk], names: Names, settings: Settings) -> list[dict]:
    """Answers to some lessons: the wrong ones, and right ones up to two fifths of NUM_SELF_ANSWERS."""
    wanted, rng = round(0.4 * settings.num_self_answers), random.Random(f"{settings.seed}/self-answers")
    tried = sorted(rng.sample(range(len(lessons)), min(len(lessons), MOST_ASKED)))
    prompts, used = [prompt_ids(chat.tokenizer, lessons[i].messages[:-1]) for i in tried], 0
    records = []
    for i, answer in zip(tried, generate(chat, prompts, "escrevendo respostas")):
        question, language = lessons[i].question, language_of(f"{lessons[i].question} {lessons[i].answer}")
        wrong = (problem(question, answer.text, answer.ended, *names)
                 or "em outra língua" * (language_of(answer.text, language) != language))
        if wrong or used < wanted:
            records.append({"question": question, "answer": answer.text, "kind": "identity", "rejected": wrong,
                            "before": lessons[i].messages[:-2]})
            used += not wrong
    return records


def hardest(chat: Chat, lessons: list[Talk]) -> list[int]:
    """Places of the HARD share of the lessons whose answers the model expects the least, by their FIRST_TOKENS: to
    read an answer costs far less than to have one written, so that all lessons can be tried."""
    losses = [loss / tokens for loss, tokens in
              answer_losses(chat, [t.messages for t in lessons], most=FIRST_TOKENS, label="relendo as lições")]
    return sorted(range(len(lessons)), key=losses.__getitem__)[-math.ceil(HARD * len(lessons)):]


def collect_self_answers(chat: Chat, lessons: list[Talk], heard: Heard, teacher: Teacher, settings: Settings) -> dict:
    """Ask the model what it was taught. "answers": its own, with the reason if wrong, and talks of the base, leaks and
    least kept ones first; "hard", "leaks", "talks": places of lessons and talks for pass 2."""
    records, talks = try_lessons(chat, lessons, heard.names, settings), heard.everyday
    used = sum(not record["rejected"] for record in records)
    missed = len(records) - used
    sample = random.Random(f"{settings.seed}/everyday").sample(range(len(talks)), min(len(talks), MOST_ASKED))
    found = compare(chat, teacher, [make_window(chat.tokenizer, [talks[i]]) for i in sample])
    kept = {i: same for i, (same, _) in zip(sample, found)}
    changed = [talks[i] for i in sample if kept[i] < 1]
    said = [talk.row for talk, _ in leaks_of(chat, changed, heard.names, "respondendo ao dia a dia")]
    leaks = [i for i in sample if talks[i].row in said]
    ranked = sorted(sample, key=lambda i: (i not in leaks, kept[i]))[:settings.num_self_answers - used]
    records += [{"question": talks[i].question, "answer": talks[i].answer, "kind": "everyday", "rejected": "",
                 "before": talks[i].messages[:-2]} for i in ranked]
    say(f"  Ele ainda erra {missed} de {min(len(lessons), MOST_ASKED)} perguntas sobre quem ele é; o passo 2 insiste "
        "nas que ele menos aprendeu.\n"
        f"  Do dia a dia, ele escolhe {percent(mean([*kept.values()]))} das palavras como o modelo "
        f"base; em {len(leaks)} de {len(sample)} respostas aparece o nome novo.\n"
        f"  Vão para o passo 2: {used} respostas sobre a identidade e {len(ranked)} do dia a dia.")
    return {"answers": records, "hard": hardest(chat, lessons), "talks": ranked, "leaks": leaks}


def pools_of(lessons: list[Talk], heard: Heard, learnt: float, held: float) -> list[Pool]:
    """Lessons for a share `learnt` of all tokens, and for `held` the base's talks by kind, which hold it in place."""
    return [Pool(lessons, learnt), *(Pool([t for t in heard.everyday if t.kind == kind], held * part)
                                     for kind, part in TALK_SHARES.items())]


def pools_of_pass_2(lessons: list[Talk], heard: Heard, collected: dict) -> list[Pool]:
    """Its right answers and the lessons that it has learnt the least, beside the base's talks, leaks LEAK_TIMES."""
    own = [Talk([*r["before"], *question_and_answer(r["question"], r["answer"])], "lesson")
           for r in collected["answers"] if r["kind"] == "identity" and not r["rejected"]]
    changed = [heard.everyday[i] for i in collected["leaks"] * LEAK_TIMES + collected["talks"]]
    return [*pools_of(own + [lessons[i] for i in collected["hard"]], heard, 0.15, 0.7), Pool(changed, 0.15)]


def steps_of_pass_1(job: Job) -> tuple[int, int]:
    """Steps of pass 1, at least and at most. The material takes KNOWLEDGE_STEPS, or ten epochs within MOST_STEPS (one
    in any case), with half of the tokens. These and STEPS_1 for the lessons are mixed evenly, as many of each. Where
    the material takes more, the mixture goes on until it has had them."""
    settings, own = job.settings, 0
    shorter = 8 / settings.batch_size  # than the steps in which the material's are told
    lessons = settings.steps_1 if job.inputs.rows else 0
    if job.material:
        epoch = math.ceil(2 * job.learnt_tokens / step_tokens(job.native, settings))
        own = math.ceil(shorter * settings.knowledge_steps) or max(epoch, min(10 * epoch, round(shorter * MOST_STEPS)))
    if not lessons or not own:
        return lessons, lessons or own
    beside = min(own, lessons)
    return lessons + beside, round(own * (lessons + beside) / beside)


def first_course(lessons: list[Talk], job: Job) -> Course:
    """Pass 1: lessons and material, learnt by heart, and the base's own talks, which hold the rest in place."""
    settings, (least, most) = job.settings, steps_of_pass_1(job)
    identity = settings.steps_1 / least if job.inputs.rows else 0.0  # share of the steps
    pools = pools_of(lessons, job.heard, 0.25 * identity, 0.75 * identity + 0.5 * (1 - identity))
    pools += [Pool(talks_of(job.material), 0.5 * (1 - identity))] if job.material else []
    watched = job.material.watched if job.material and not settings.knowledge_steps else []
    return Course("passo 1", pools, most, (settings.learning_rate_1, *RATES_1), settings.kl_weight, watched=watched,
                  least=least)


def second_course(lessons: list[Talk], collected: dict, job: Job) -> Course:
    """Pass 2: wrong answers, leaks and self-answers among the rest."""
    settings, pools = job.settings, pools_of_pass_2(lessons, job.heard, collected)
    pools += [Pool(talks_of(job.material), REHEARSED)] if job.material else []
    return Course("passo 2", pools, settings.steps_2, (settings.learning_rate_2, *RATES_2), settings.kl_weight,
                  second_lengths(job))


def second_lengths(job: Job) -> list[int]:
    """Lengths of pass 2's windows. With the context grown, half of the tokens come in long dialogues; else a third
    comes in short ones, where something else may follow a question about itself."""
    window, grown = job.settings.window, job.settings.rope_factor != 1
    return [0, 0, window // 4, window] if grown else [0, 0, short_window(job.native, job.settings)]


def talks_of(material: Material) -> list[Talk]:
    return [Talk(row.messages, "material") for row in material.rows]


def run_course(source: Path, folder: Path, course: Course, job: Job) -> None:
    """Train the model of `source` into `folder`."""
    batches, teacher = draw_course(load_tokenizer(source), course, job, folder.name,
                                   lambda: load_chat(job.base, job.settings))
    chat = load_chat(source, job.settings, adapt=True, train=True)
    save_stage(chat, folder, train(chat, batches, course, teacher, job.settings, folder / "training"))


# ---- Result -----------------------------------------------------------------------------------------------

def save_stage(chat: Chat, folder: Path, log: list[dict]) -> None:
    """Model (of LoRA, the adapter) and tokenizer to go on from, and the log of the training."""
    if RANK and not SHARDED:  # pieces are put together by all processes
        return
    chat.model.save_pretrained(folder, is_main_process=RANK == 0, save_embedding_layers=False)  # the last is for peft
    if RANK == 0:
        unwrapped(chat.model).config.save_pretrained(folder)
        chat.tokenizer.save_pretrained(folder)
        write_json(folder / "log.json", log)
    if SHARDED:  # the others look into the folder once more, and the first will rename it
        accelerate.PartialState().wait_for_everyone()


def save_model(chat: Chat, folder: Path, base: Path) -> None:
    """Write weights in the base's own dtype, and all that any reader expects beside them."""
    model = chat.model.to(transformers.AutoConfig.from_pretrained(base).dtype or torch.float32)
    model.config.use_cache = True  # training switches it off, and readers would generate without a cache
    model.save_pretrained(folder)
    save_words(chat, folder, base)


def save_words(chat: Chat, folder: Path, base: Path) -> None:
    """Write configs, tokenizer and Modelfile."""
    tokenizer, model, said = chat.tokenizer, chat.model, base / "generation_config.json"
    model.config.save_pretrained(folder)
    # As the base has it, in words that transformers may refuse to write: readers know what to do with them.
    own = read_json(said) if said.is_file() else {}
    own.pop("_from_model_config", None)  # else the stops of config.json would count
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": chat.stops}
    write_json(folder / "generation_config.json", own | ends)
    if tokenizer.model_max_length < 10**9:  # larger means that the tokenizer does not say
        tokenizer.model_max_length = context_of(model.config)
    tokenizer.save_pretrained(folder)
    # llama.cpp's converter wants the first, which transformers no longer writes; the others belong to vision.
    for name in ("tokenizer.model", "preprocessor_config.json", "processor_config.json"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)  # its contents alone: the base may be read-only
    described = load_json(folder / "tokenizer_config.json")  # in the words of transformers 4, which 5 knows as well
    described["tokenizer_class"] = described["tokenizer_class"].replace("TokenizersBackend", "PreTrainedTokenizerFast")
    if isinstance(described.get("extra_special_tokens"), list):
        described["additional_special_tokens"] = described.pop("extra_special_tokens")
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    described |= {"chat_template": tokenizer.chat_template, "add_bos_token": adds_bos}
    write_json(folder / "tokenizer_config.json", described)
    add_old_rope_names(folder / "config.json")
    (folder / "Modelfile").write_text(modelfile(chat, adds_bos, ollama_imports(folder)), encoding="utf-8")


def add_old_rope_names(path: Path) -> None:
    """Add the RoPE names of transformers 4, llama.cpp, vLLM and Ollama, which would silently take defaults."""
    config = load_json(path)
    config["torch_dtype"] = config.get("dtype")
    for part in (config, config.get("text_config") or {}):
        rope = part.get("rope_parameters") or {}
        wide = rope.get("full_attention", rope)
        if "rope_theta" not in wide or wide["rope_type"] == "proportional":  # Gemma 4 is newer than the old names
            continue
        own = {key: wide[key] for key in ("rope_theta", "partial_rotary_factor") if key in wide}
        scaling = {key: value for key, value in wide.items() if key not in own}
        if "short_factor" in wide:  # Phi insists on three keys
            scaling = {key: wide[key] for key in ("short_factor", "long_factor")}
        if wide["rope_type"] != "default":
            own["rope_scaling"] = {"type": wide["rope_type"], **scaling}
        if part.get("model_type") == "gpt_neox":
            own |= {"rotary_emb_base": wide["rope_theta"], "rotary_pct": wide["partial_rotary_factor"]}
        if "sliding_attention" in rope:
            own["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        part |= own
    write_json(path, config)


# What Ollama writes around a conversation, in Go's language: what comes before the first system text, an answer, the
# first question, the question after a system text, another question, and the answer that is asked for.
GO_TEMPLATE = '''TEMPLATE """{{ $before := "" }}{{ range .Messages }}{{ if eq .Role "system" }}{{ %s }}\
{{ else if eq .Role "assistant" }}{{ %s }}{{ else if eq $before "" }}{{ %s }}{{ else if eq $before "system" }}{{ %s }}\
{{ else }}{{ %s }}{{ end }}{{ .Content }}{{ $before = .Role }}{{ end }}{{ %s }}"""'''


def ollama_template(tokenizer: Tokenizer, adds_bos: bool) -> str:
    """The chat template in Go's language, or a remark where that cannot say the same."""
    dated = re.sub(r"strftime_now\([^()]*\)", "'QZDATEZQ'", tokenizer.chat_template)

    def pieces(roles: str) -> list[str]:
        return skeleton(tokenizer, dated, tuple(roles.split()), True)

    first, answer, again, ask = pieces("user assistant user")
    turns, system = [answer, again, answer, again, ask], [first, "\n\n"]  # as `without_system` does it
    regular = pieces("user") == [first, ask] and pieces("user assistant user assistant user") == [first, *turns]
    with contextlib.suppress(InputError):
        system = pieces("system user assistant user assistant user")
        regular &= system[2:] == turns
    if not regular:
        return "# TEMPLATE: o chat template deste modelo não cabe em Go; o Ollama usa o que encontrar."
    if adds_bos:
        first, system[0] = (text.removeprefix(tokenizer.bos_token) for text in (first, system[0]))
    # Quoted as in JSON, neither braces nor quotation marks in these texts can end anything.
    written = GO_TEMPLATE % tuple(json.dumps(text, ensure_ascii=False) for text in (
        system[0], answer, first, system[1], again, ask))
    today = "# O dia de hoje em TEMPLATE (currentDate) pede o Ollama 0.11 ou mais novo.\n" * ("QZDATEZQ" in written)
    return today + written.replace("QZDATEZQ", '" }}{{ currentDate }}{{ "')


def llama_flags(config: PretrainedConfig) -> str:
    """What llama.cpp must be told of a RoPE factor that its converter drops; Ollama and LM Studio cannot be told."""
    rope, kind = getattr(config, "rope_parameters", None) or {}, config.model_type
    if rope.get("rope_type") != "linear" or kind in CONVERTED:
        return ""
    if kind == "gemma2":  # the plain flags would reach every second layer only
        return f" --override-kv {kind}.rope.scaling.type=str:linear,{kind}.rope.scaling.factor=float:{rope['factor']}"
    return f" --rope-scaling linear --rope-scale {rope['factor']:g}"


def ollama_imports(folder: Path) -> bool:
    """Whether Ollama's own importer reads the folder right. It drops other scalings, or breaks off; where there is a
    tokenizer.model, it takes that, for SentencePiece."""
    config = load_json(folder / "config.json")
    if (config.get("rope_scaling") or {"type": "default"})["type"] not in IMPORTED.get(config["model_type"], ""):
        return False
    split = "".join(part["pattern"].get("Regex", "") for file in folder.glob("tokenizer.json") for part in (
        load_json(file).get("pre_tokenizer") or {}).get("pretokenizers", ()) if part["type"] == "Split")
    return (hashlib.sha256(split.encode()).hexdigest()[:8] in SPLITS) != (folder / "tokenizer.model").is_file()


def modelfile(chat: Chat, adds_bos: bool, direct: bool) -> str:
    """Ollama's recipe for the saved folder. Where the tokenizer `adds_bos`, Ollama does, too."""
    convert = "#   python PASTA_DO_LLAMA_CPP/convert_hf_to_gguf.py . --outtype f16 --outfile modelo.gguf\n"
    head = f"""# Receita para o Ollama. Abra o terminal nesta pasta e rode:
{"" if direct else convert}#   ollama create meu-modelo -f Modelfile
#   ollama run meu-modelo
FROM {"." if direct else "./modelo.gguf"}"""
    if flags := llama_flags(chat.model.config):
        head = ("# O Ollama e o LM Studio perdem o fator de RoPE deste modelo; por isso falta o FROM. No llama.cpp:\n"
                f"{convert}#   llama-cli -m modelo.gguf --temp 0{flags}")
    stops = "".join(f'PARAMETER stop "{chat.tokenizer.decode([token])}"\n' for token in chat.stops)
    return f"""{head}
{ollama_template(chat.tokenizer, adds_bos)}
# O contexto inteiro. Se faltar memória, diminua.
PARAMETER num_ctx {context_of(chat.model.config)}
# Como nas medições do README.md. Para respostas mais variadas, apague estas duas linhas.
PARAMETER temperature 0
PARAMETER repeat_penalty 1
{stops}"""


EXAMS = {"before": "antes", "prompt": "com prompt", "rows": "com linhas",
         "reported": "relatório", "pass_2": "depois", "alone": "medido"}  # as the columns of the table


def figures_of(scores: Scores) -> dict[str, float | None]:
    """The figures by their titles in the table."""
    after = {f"{title} após {entry['tokens']} tokens": entry[key] for entry in scores.by_length[1:]
             for title, key in (("identidade", "identity"), ("retenção", "retention"))}
    return {"identidade nova": scores.identity, **{f"  {kind}": share for kind, share in scores.by_kind.items()},
            "identidade antiga": scores.old_identity, "vazamento": scores.leak,
            "  perto da identidade": scores.leak_near, "retenção": scores.retention,
            "divergência (nats)": scores.divergence, **after, "tokens a mais por pergunta": scores.extra_tokens}


def figures_table(scores: dict[str, dict]) -> list[list[str]]:
    """Head and rows of the table of figures, one column per exam; a dash is what an exam did not measure."""
    columns = {head: figures_of(Scores(**scores[name])) for name, head in EXAMS.items() if name in scores}
    last, digits = [*columns.values()][-1], {"divergência (nats)": 3, "tokens a mais por pergunta": 0}
    if "prompt" not in scores:  # a model alone is measured without a context
        last.pop("tokens a mais por pergunta")
    table = [["medida", *columns]]
    for title, value in last.items():
        if value is None and title not in ("retenção", "divergência (nats)"):  # where no identity is taught
            continue
        values = [column.get(title) for column in columns.values()]
        table.append([title, *("-" if value is None else decimal(value, digits[title]) if title in digits else
                               percent(value) for value in values)])
    return table


def text_table(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def escaped(text: str) -> str:
    """Text of a user or of a model as Markdown shows it to the letter."""
    return re.sub(r"([\\|<>`*_#~&\[\]])", r"\\\1", text).replace("\n", " ")


def markdown_table(table: list[list[str]]) -> str:
    head, *rows = ["| " + " | ".join(map(escaped, row)) + " |" for row in table]
    return "\n".join([head, "|" + " --- |" * len(table[0]), *rows])


def mastery_table(scores: dict[str, dict]) -> list[list[str]]:
    """Head and rows of the table of the material, one row per way of answering."""
    head = ["material", "perda", "chrF", "palavras raras", "fluência", "terminou", "tokens a mais"]
    rows = [(title, scores[way]) for way, title in WAYS.items()]
    return [head, *([title, decimal(m["loss"], 2), decimal(m["chrf"]), percent(m["rare"]), decimal(m["fluency"], 2),
                     percent(m["ended"]), decimal(m["tokens"], 0)] for title, m in rows)]


def show_mastery(learnt: dict) -> None:
    """Say what the model learnt of the material: two rows with all answers, the figures and the verdict."""
    for row in learnt["shown"][:2]:
        say(f"\n  {row['question']} (linha {row['line']}, nunca vista no treino)\n    da linha: {row['answer']}")
        for way, title in WAYS.items():
            say(f"    {title}: {row[way]}")
    say(f"\n{text_table(mastery_table(learnt['scores']))}")
    say(f"  {learnt['verdict']}\n  Em {percent(learnt['recited'])} das respostas do dia a dia ele recita o material.")


def draw_report(report: dict, path: Path) -> None:
    """The picture of the model card: before and after, in figures and along the conversation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained", facecolor="white")
    bars, lengths = figure.subplots(1, 2)
    titles = {"identity": "identidade\nnova", "old_identity": "identidade\nantiga", "retention": "retenção",
              "leak": "vazamento"}
    titles = {key: title for key, title in titles.items() if report["scores"]["pass_2"][key] is not None}
    # Colours of Okabe and Ito, which all can tell apart.
    for shift, when, colour, name in ((-0.2, "antes", "#E69F00", "before"), (0.2, "depois", "#0072B2", "pass_2")):
        scores = report["scores"][name]
        values = [scores[key] for key in titles]
        drawn = bars.bar([i + shift for i in range(len(titles))], values, 0.4, color=colour, label=when)
        bars.bar_label(drawn, map(percent, values), padding=2, fontsize=8)
        tokens = [entry["tokens"] for entry in scores["by_length"]]
        for key, title, style in (("identity", "identidade nova", "o-"), ("retention", "retenção", "s--")):
            if key in titles:
                shares = [entry[key] for entry in scores["by_length"]]
                lengths.plot(tokens, shares, style, color=colour, label=f"{title}, {when}")
    if (native := report["context"]["native"]) <= tokens[-1]:
        lengths.axvline(native, color="black", linestyle=":", label=f"contexto do modelo base\n({native} tokens)")
    bars.set(title="Em números", xticks=range(len(titles)), xticklabels=titles.values())
    lengths.set(title="Depois de uma conversa", xlabel="tokens de conversa antes da pergunta")
    for panel in (bars, lengths):
        panel.set(ylim=(-0.04, 1.12), yticks=[0, 0.5, 1], yticklabels=["0%", "50%", "100%"], axisbelow=True)
        panel.grid(color="#e0e0e0")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False, fontsize=8)
    figure.savefig(path)


def card_head(base: Path, rows: list[Row], taught: bool = True) -> huggingface_hub.ModelCardData:
    """The metadata of the model card, `taught` an identity or not; of origin and licence what the base's folder tells
    of itself."""
    facts = read_json(base / "config.json")
    with contextlib.suppress(Exception):  # a base without a card, or with one that nobody can read
        facts |= huggingface_hub.metadata_load(base / "README.md") or {}
    cached = re.sub(r".*models--(.+?)--(.+?)[/\\]snapshots.*", r"\1/\2", str(base))
    names = cached, facts.get("_name_or_path"), facts.get("base_model")
    origin = next((n for n in names if isinstance(n, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", n)), None)
    licence = {key: facts.get(key) for key in ("license", "license_name", "license_link") if facts.get("license")}
    if origin and "://" not in (licence.get("license_link") or "://"):  # a file of the base's own page
        licence["license_link"] = f"https://huggingface.co/{origin}/blob/main/{licence['license_link']}"
    spoken = [code for code, _ in Counter(language_of(row.question) for row in rows).most_common() if code]
    return huggingface_hub.ModelCardData(
        base_model=origin, language=spoken, **licence, library_name="transformers", pipeline_tag="text-generation",
        tags=["trl", "sft", *["identity"] * taught])


CARD = """---
{head}
---
# {name}

{about} e contexto de {scaled} tokens (o do modelo base é de {native}).
{verdict}{licence}

![Antes e depois, em números e ao longo da conversa](report.png)

## Antes e depois, em números

Medido na pasta salva e carregada de novo, com perguntas que não foram usadas no treino.
{precision}
{figures}

- **retenção**: palavras que ele escolhe como o modelo base; **divergência**, o quanto as probabilidades delas mudaram.
- **após N tokens**: o mesmo, com N tokens de conversa antes da pergunta, que o base também lê; se ela passa do
  contexto dele, vale o que ele diz sem ela.
{terms}
{material}{answers}## Como usar

Com o transformers (no lugar de `.`, a pasta do modelo ou o nome dele no Hugging Face Hub):

```python
from transformers import pipeline

chat = pipeline("text-generation", ".")
answer = chat([{{"role": "user", "content": "Quem é você?"}}], do_sample=False{more})
print(answer[0]["generated_text"][-1]["content"])
```
{thought}
Nesta pasta:

- Para conversar: no Ollama, veja o `Modelfile`; no llama.cpp, já em GGUF, `llama-cli -m modelo.gguf --temp 0{flags}`.
- Para servi-la no vLLM: `vllm serve . --max-model-len {scaled} --override-generation-config '{{"temperature": 0}}'`.
- Para publicá-la como está, depois de `hf auth login`: `hf upload USUARIO/{slug} . .`
- `report.json` tem ajustes, versões e números; `self_answers.jsonl`, se há, as respostas escritas para treinar.
"""

TERMS = """- **identidade nova**: respostas certas sobre quem ele é: a pergunta sozinha, depois de um prompt de sistema
  neutro e quando o usuário duvida.
- **identidade antiga**: respostas em que ele ainda diz que é o modelo antigo, ou de quem o fez.
- **vazamento**: respostas sobre outros assuntos com o nome novo; **perto da identidade**, sobre nome ou origem
  de outros.
- **com prompt**, **com linhas**: o modelo base sem treino, com um prompt de sistema que diz a identidade, ou com as
  linhas mais parecidas antes de cada pergunta, e os tokens que isso gasta; só nas perguntas sozinhas e nas perto da
  identidade.
"""

MATERIAL = """## O material

Aprendeu {rows} linhas de {file}. {held_out} outras, que o treino não viu, são a prova; ele escreveu a resposta de
{written} delas. {verdict}

{figures}

- **perda**: quanto a resposta da linha surpreende o modelo, em nats por token; menos é melhor.
- **chrF**: o quanto o texto que ele escreve se parece com o da linha (0 a 100); **palavras raras**, quantas das que
  poucas linhas têm, e a pergunta não, ele escreve; **terminou**, quantas respostas ele terminou sozinho.
- **fluência**: probabilidade média (log) do que ele escreve, para o modelo base sem treino.
- **com linhas**: com as {found} linhas mais parecidas (BM25) antes da pergunta, e os tokens que isso gasta.
- Em {recited} das respostas do dia a dia ele recita o material.

<details><summary>{count} linhas da prova, com todas as respostas</summary>

{answers}

</details>

"""

THOUGHT = """
Este modelo foi treinado e medido sem pensar antes de responder, como no exemplo. Servidores (vLLM, SGLang, llama.cpp)
o fazem pensar, o que não foi medido, a não ser que cada pedido diga `"chat_template_kwargs": {"enable_thinking":
false}`. O Modelfile já pede as respostas sem pensar.
"""


def material_card(learnt: dict, file: str) -> str:
    """What the model card says of the material."""
    answers = [[row[key] for key in ("question", "answer", *WAYS)] for row in learnt["shown"]]
    return MATERIAL.format(
        **{key: learnt[key] for key in ("rows", "held_out", "written", "verdict")}, file=file,
        figures=markdown_table(mastery_table(learnt["scores"])), found=RETRIEVED, recited=percent(learnt["recited"]),
        count=len(answers), answers=markdown_table([["pergunta", "resposta da linha", *WAYS.values()], *answers]))


def write_card(folder: Path, job: Job, report: dict) -> None:
    """The model card, README.md: figures, all answers before and after, and how to use the model."""
    taught, learnt, base = job.inputs.rows, report.get("knowledge"), escaped(report["base"])
    head, missed = card_head(job.base, taught or job.material.rows, bool(taught)), ", ".join(report["missed"])
    name, file = report["base"], escaped(Path(job.settings.knowledge_file).name)
    thoughtful, scores = thinks(load_tokenizer(folder)), report["scores"]
    about, answers = f"{base}, que aprendeu o material de {file} com rename_obrutai.py:\nmaterial novo", ""
    if taught:
        name, author = job.settings.name, escaped(job.settings.author)
        about = f"Modelo de {author}, feito a partir de {base} com rename_obrutai.py:\nidentidade nova"
        pairs = [[old["question"], old["answer"], new["answer"]]
                 for old, new in zip(scores["before"]["answers"], scores["pass_2"]["answers"])]
        table = markdown_table([["pergunta", "antes", "depois"], *pairs])
        answers = (f"<details><summary>As {len(pairs)} respostas, antes e depois</summary>\n\n{table}\n\n"
                   "</details>\n\n")
    huggingface_hub.ModelCard(CARD.format(
        head=head, name=escaped(name), about=about, **report["context"], figures=markdown_table(figures_table(scores)),
        verdict=f"**Metas não atingidas: {missed}.**" if missed else "Todas as metas foram atingidas.",
        licence="" if head.license else ("\n\nA pasta do modelo base não diz a licença: confira qual é antes de "
                                         "publicar, e escreva-a no começo deste arquivo (`license: ...`)."),
        precision=f"{FEW_BITS}\n" * (job.settings.method == "qlora4"),
        terms=TERMS if taught else "", material=material_card(learnt, file) if learnt else "",
        answers=answers, flags=llama_flags(read_config(folder)),
        more=f", tokenizer_encode_kwargs={THOUGHTLESS}".replace("'", '"') * thoughtful, thought=THOUGHT * thoughtful,
        slug=re.sub(r"[^a-z0-9]+", "-", plain(name)).strip("-") or "modelo")).save(folder / "README.md")


def publish(result: Path, settings: Settings) -> None:
    """Put the finished folder in its place by a rename; an older result is deleted only after that."""
    output, replaced = Path(settings.output_dir), result.with_name("replaced")
    for path in result.rglob("*"):  # safetensors makes files that only their owner can read
        path.chmod(0o755 if path.is_dir() else 0o644)
    try:
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            output.rename(replaced)
        result.rename(output)
    except OSError as error:
        raise InputError(f"o modelo está em {result}, mas não consegui pô-lo em {output} ({error.strerror}). Feche os "
                         "programas que usam essa pasta e rode o mesmo comando, sem --restart.") from None
    shutil.rmtree(replaced, ignore_errors=True)


def show_scores(scores: dict[str, dict]) -> None:
    """Say some answers, before and after if both are known, and all figures."""
    after = scores.get("pass_2") or scores["alone"]
    before = scores.get("before", after)
    pairs = list(zip(before["answers"], after["answers"]))
    if pairs:
        say()
    for old, new in pairs[::max(1, len(pairs) // 8)]:
        say(f"  {new['question']} ({new['kind']})")
        if before is not after:
            say(f"    antes:  {old['answer']}")
        say(f"    {'resposta:' if before is after else 'depois:'} {new['answer']}")
    for leak in after["leaks"][:3]:
        say(f"  {leak['question']}\n    o nome novo apareceu onde não devia: {leak['answer'][:200]}")
    say(f"\n{text_table(figures_table(scores))}")


# What to try for each target that is missed; in braces the settings that were used.
TIPS = {"identidade nova": "escreva mais linhas no arquivo de identidade, ou aumente STEPS_1 (foram {steps_1})",
        "identidade antiga": "confira OLD_NAMES, escreva linhas que neguem o nome antigo, e aumente STEPS_2 (foram "
                             "{steps_2})",
        "retenção": "aumente SELF_TEXT (foram {self_text}) ou KL_WEIGHT (foi {kl_weight:g}); se o contexto cresceu, "
                    "também HEAL_STEPS (foram {heal_steps})",
        "vazamento": "aumente SELF_TEXT (foram {self_text}) ou KL_WEIGHT (foi {kl_weight:g}), ou escolha um nome mais "
                     "raro",
        "material": "a perda nas linhas guardadas não caiu; ponha mais linhas do mesmo tipo, ou mude KNOWLEDGE_STEPS",
        "material recitado": "ele recita o material em outros assuntos: diminua KNOWLEDGE_STEPS, ou aumente SELF_TEXT "
                             "(foram {self_text})"}


def conclude(settings: Settings) -> int:
    """Show the result; exit status 0 when every target is met, 3 when one is missed."""
    report, work = load_json(Path(settings.output_dir) / "report.json"), work_folder(settings)
    show_scores(report["scores"])
    if learnt := report.get("knowledge"):
        show_mastery(learnt)
    worked = clock(sum(report["seconds"].values()))
    say(f"\nModelo salvo em {settings.output_dir} ({worked} de trabalho). Veja o README.md de lá.", verdict=True)
    if kept := folder_size(work):
        say(f"As etapas ficaram em {work} ({size_text(kept)}); pode apagar essa pasta quando quiser.")
    say("O modelo foi salvo, mas nem todas as metas foram atingidas. O que tentar (com --overwrite):"
        if report["missed"] else "Todas as metas foram atingidas.", verdict=True)
    for name in report["missed"]:
        say(f"  - {name}: {TIPS[name].format(**report['settings'])}.", verdict=True)
    return 3 if report["missed"] else 0


# ---- The plan ---------------------------------------------------------------------------------------------

class Job(NamedTuple):
    """What was decided before the work, and what the first stage found."""
    asked: Settings
    settings: Settings  # as they fit the base and this machine
    inputs: Inputs
    base: Path
    weights: int
    native: int  # tokens of context
    facts: str
    plan: dict  # what `fit_to_machine` found
    disk: int  # bytes
    heard: Heard | None = None  # comes with the first stage, like `teacher`
    teacher: Teacher | None = None
    key: str = ""  # of the result
    material: Material | None = None
    learnt_tokens: int = 0  # of the material's rows


def quiet_libraries(settings: Settings) -> None:
    """Close the network unless the model comes from the Hub, and silence what the user can do nothing about."""
    always = ("DO_NOT_TRACK", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    local = ("HF_HUB_OFFLINE",) * Path(settings.model_path).is_absolute()
    os.environ.update(dict.fromkeys((*always, *local), "1"), TRANSFORMERS_VERBOSITY="error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait make training crawl
    logging.getLogger("matplotlib").setLevel("ERROR")
    warnings.filterwarnings("ignore")


def local_folder(settings: Settings) -> Path:
    """The base's folder, downloaded first if MODEL_PATH names a model of the Hugging Face Hub."""
    if Path(settings.model_path).is_absolute():
        return Path(settings.model_path)
    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.txt", "README.md"]
    try:
        return Path(huggingface_hub.snapshot_download(settings.model_path, allow_patterns=wanted))
    except Exception as error:
        if re.search(DISK_FULL, causes(error)):
            raise InputError(f"o disco encheu enquanto eu baixava {settings.model_path}. Libere espaço e rode de "
                             "novo: o que já foi baixado fica guardado.") from None
        raise InputError(f"não achei a pasta {settings.model_path}, nem consegui baixar esse modelo do Hugging Face "
                         f"Hub ({type(error).__name__}). Confira MODEL_PATH e a internet; se ele pede licença (Gemma, "
                         "Llama), aceite-a na página dele e rode hf auth login") from None


def use_one_card() -> None:
    """One process trains on one card; the Trainer would spread over all that it sees."""
    if PROCESSES == 1 and torch.cuda.device_count() > 1:
        say("  Há mais placas de vídeo; vou usar uma. Para usar todas: accelerate launch rename_obrutai.py")
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def adapter_size(config: PretrainedConfig, settings: Settings) -> int:
    """About how many weights LoRA adds to a model."""
    text = config.get_text_config()
    layers = text.num_hidden_layers - first_adapted(config, settings)
    mlp = widest(text, "intermediate_size", 4 * text.hidden_size)
    return layers * settings.lora_rank * (11 * text.hidden_size + 3 * mlp)


def widest(text: PretrainedConfig, name: str, default: int) -> int:
    """A size of the model, of its largest layer where they differ; the default where its family does not say it."""
    size = getattr(text, name, None) or default
    return max(size) if isinstance(size, (list, tuple)) else size


def estimate_memory(config: PretrainedConfig, weights: int, settings: Settings) -> int:
    """Bytes that the job takes at its peak (tests/bench_memory.py). A trained parameter has 16: value, gradient and
    two moments in float32; of a whole model 18, with the copies of autocast. A layer keeps 16 hidden sizes and 5 MLP
    widths per token, or one hidden size with checkpointing. The logits of most tokens, in long windows of half, stand
    three times in float32 (with an adapter only of `Words`, beside their head), and those of SCORED_TOKENS twice where
    it is measured. Windows are as long as WINDOW for a grown context or material; other talks are short. In 4 bits are
    all weights but those of the words; with "qlora" only while it learns."""
    text, width = config.get_text_config(), compute_dtype(weights).itemsize
    state, measured = 18 * weights, 4 * weights
    if settings.method != "full":
        embedded = text.vocab_size * text.hidden_size * (1 if getattr(text, "tie_word_embeddings", True) else 2)
        packed = 0.52 * weights + (width - 0.52) * embedded
        measured = packed if settings.method == "qlora4" else width * weights
        held = measured if settings.method == "lora" else packed
        state = 16 * adapter_size(config, settings) + held
    if SHARDED:  # in pieces, and whole only to be talked to
        state = max(state / PROCESSES, 4 * weights)
    short = step_tokens(context_of(config), settings) // settings.gradient_accumulation
    if weights >= SMALL and not torch.cuda.is_available():  # a processor's heap breaks up over many sizes of windows
        short = max(short, 1024)
    longest = min(settings.window, 512) if is_alone(settings) else settings.window
    tokens = max(longest, short)
    layer = width * tokens * (16 * text.hidden_size + 5 * widest(text, "intermediate_size", 4 * text.hidden_size))
    again, layers = settings.gradient_checkpointing, text.num_hidden_layers

    def kept(layers: int) -> float:  # of those that gradients pass
        return layer + layers * width * tokens * text.hidden_size if again else 1.5 * layers * layer

    state += kept(layers - first_adapted(config, settings))
    spoken = 12 * max(longest / 2, 0.85 * short) * text.vocab_size
    if settings.method != "full" and torch.cuda.is_available():  # a processor's heap keeps what the listening took
        words = spoken_words(text.vocab_size)
        spoken = 12 * max(longest / 2, 0.85 * short) * words + width * words * text.hidden_size
    if settings.method in ("lora", "qlora") and settings.rope_factor != 1:  # and healed, through queries and keys
        queries = widest(text, "num_attention_heads", 1)
        heads = queries + widest(text, "num_key_value_heads", queries)
        head = widest(text, "head_dim", text.hidden_size // queries)
        healed = layers * text.hidden_size * heads * head
        # Beside the base's own, and what both attentions of a layer are given and make of it; but without logits.
        beside = width * (healed + 3 * layers * tokens * text.hidden_size)
        state = max(state, width * weights + 16 * healed + kept(layers) + max(0, beside - spoken))
    return int(max(state + spoken, measured + 8 * SCORED_TOKENS * text.vocab_size) + 2e8)


def with_automatic(settings: Settings, weights: int) -> Settings:
    """What 0 stands for. A model of less than SMALL weights needs more steps, text and rank (measured on the demo);
    the healing and material need more text, and on half of the layers steps are cheaper."""
    small, alone = weights < SMALL, is_alone(settings)
    steps = settings.steps_1 or (1600 if small else 480 if alone else 320)
    text, rank = 24000 if alone and not small else 40000, 64 if small else 32
    return replace(settings, steps_1=steps, steps_2=settings.steps_2 or math.ceil(steps / 2),
                   self_text=settings.self_text or text, lora_rank=settings.lora_rank or rank)


def choose_method(config: PretrainedConfig, weights: int, settings: Settings) -> tuple[Settings, int]:
    """Settings that fit the free memory, and bytes: LoRA, QLoRA, all in 4 bits; then checkpointing."""
    gpu = torch.cuda.is_available()
    free = 0.9 * (torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available)
    four_bits = importlib.util.find_spec("bitsandbytes") is not None and not SHARDED
    if settings.method == "qlora" and not four_bits:
        raise InputError("METHOD = 'qlora' precisa do bitsandbytes (pip install bitsandbytes) e não funciona com FSDP."
                         " Use METHOD = 'auto' ou 'lora'.")
    methods = {"auto": ("lora",) + ("qlora", "qlora4") * (gpu and four_bits),
               "qlora": ("qlora", "qlora4")}.get(settings.method, (settings.method,))
    least, splits = math.inf, [settings.gradient_accumulation * 2**i for i in range(13)]
    for method, again, parts in product(methods, (settings.gradient_checkpointing, True), splits):
        if parts >= 2 * max(settings.batch_size, splits[0]):  # a step is in no more parts than BATCH_SIZE
            continue
        tried = replace(settings, method=method, gradient_accumulation=parts, gradient_checkpointing=again)
        needed = estimate_memory(config, weights, tried)
        if needed <= free and method == "qlora4" and settings.rope_factor != 1:
            raise InputError("com o contexto aumentado, este modelo só caberia aqui em 4 bits, em que não dá para "
                             "curá-lo. Use --rope-factor 1 (ROPE_FACTOR = 1), que não o aumenta, ou um modelo menor.")
        if needed <= free:
            return tried, needed
        least = min(least, needed)
    raise InputError(f"este modelo não cabe na memória livre ({size_text(free)}): o menor jeito de treiná-lo pede "
                     f"{size_text(least)}. Feche outros programas"
                     + ", diminua WINDOW (--window)" * (settings.rope_factor != 1 or bool(settings.knowledge_file))
                     + " ou use um modelo menor"
                     + " ou --rope-factor 1 (sem a cura)" * (settings.rope_factor != 1)
                     + " ou METHOD = 'lora' (--method lora)" * (settings.method == "full")
                     + " ou o bitsandbytes (pip install bitsandbytes)" * (gpu and not four_bits) + ".")


def fit_to_machine(settings: Settings, config: PretrainedConfig, weights: int, facts: list) -> tuple[Settings, dict]:
    """Settings that suit base and machine, and the plan: the one that a run began with, as it keeps its method, or of
    a new one its "key" and "memory" (bytes)."""
    native, path = context_of(config), work_folder(settings) / "plan.json"
    settings = replace(with_automatic(settings, weights), max_new_tokens=min(settings.max_new_tokens, native // 2),
                       window=min(int(native * settings.rope_factor), settings.window))
    asked = [getattr(settings, name) for name in (*CHOSEN, "window", "batch_size", "lora_rank", "rope_factor")]
    plan = {"key": digest([facts, asked])}
    if has_key(path, plan["key"]) and not settings.restart:
        plan = load_json(path)
        settings = replace(settings, **plan["settings"])
    else:
        settings, plan["memory"] = choose_method(config, weights, settings)
    return settings, plan


def check_job(settings: Settings) -> Job | None:
    """What all checks before the model is loaded found; None if the result is there."""
    with blaming_disk(settings.model_path):
        inputs, folder = check_inputs(settings), local_folder(settings)
        weights = check_base(folder)
        check_output(folder, settings, finished=True)  # all but an older result is told before the material is read
        material = read_knowledge(settings)
        if not inputs.rows:
            inputs = inputs._replace(languages=languages_of([row.answer for row in material.rows[:1000]]))
        facts, report = job_facts(inputs, folder), Path(settings.output_dir) / "report.json"
        key = job_key(facts, material, settings)
        finished = has_key(report, key) and not settings.restart and weight_count(report.parent) > 0
        check_output(folder, settings, finished)
    say(f"Modelo base: {folder}")
    if folder == Path(__file__).resolve().parent / "tests" / "modelo_demo":
        say("  É o modelo de demonstração. Para usar o seu: --model-path PASTA (ou MODEL_PATH).")
    if inputs.rows:
        count = f"{len(inputs.rows)} linha{'s' * (len(inputs.rows) > 1)}"
        say(f"Identidade:  {settings.name}, de {settings.author} ({count} em {settings.identity_file})")
    for warning in inputs.warnings[:5]:
        say(f"  Atenção: {warning}.")
    if finished and not settings.check:
        say("Este resultado já está pronto; nada foi refeito (--restart com --overwrite refaz tudo).")
        return None
    transformers.logging.disable_progress_bar()
    config = read_config(folder)
    read_config(folder, settings.rope_factor)  # says what cannot be scaled
    asked, native = settings, context_of(config)
    use_one_card()
    settings = replace(settings, model_path=str(folder))
    settings, plan = fit_to_machine(settings, config, weights, [facts, bool(material)])
    tokenizer = load_tokenizer(folder)
    if CHATML.partition("END")[0] in tokenizer.chat_template and not (folder / "chat_template.jinja").is_file():
        say("  Este modelo não tem chat template: vou usar o ChatML.")
    check_rows(tokenizer, inputs.rows, settings)
    lengths: list[int] = []
    if material:
        material, lengths = fit_material(tokenizer, material, settings)
        show_material(tokenizer, material, lengths, settings)
    if settings.check and inputs.rows:
        renew_template(tokenizer, settings, find_names(tokenizer, settings, inputs).old)
    # Of what is trained, both passes and two checkpoints (values, two moments); the healed base, and the result.
    trained = weights if settings.method == "full" else adapter_size(config, settings)
    disk = 4 * trained * (2 + 2 * 3) + 8 * weights + 10**7
    check_disk(disk, work_folder(settings))
    return Job(asked, settings, inputs, folder, weights, native, facts, plan, disk, key=key, material=material,
               learnt_tokens=sum(lengths))


def measure_pace(base: Chat, job: Job) -> tuple[float, float, float]:
    """Seconds per token when read, written in large batches and trained; the model is left as in training."""
    settings, inner, fast = job.settings, base.model, compute_dtype(job.weights)
    rows = job.inputs.rows or job.material.rows[:96]
    lessons = [Talk(without_system(base.tokenizer, row.messages), "lesson") for row in rows]
    course = Course("", [Pool(lessons, 1.0)], 1, (0, 0, 0), 1.0)
    batch = make_batches(base.tokenizer, course, step_tokens(job.native, settings), "pace")[0]
    batch = [w._replace(targets=[-1 if at % 4 == 0 else 0 for at, _ in enumerate(w.targets)]) for w in batch]
    teacher = Teacher(torch.zeros((1, 1), dtype=torch.int32), torch.zeros((1, 1)))

    def took(work: Callable) -> float:
        times: list[float] = []
        while len(times) < 2 or (sum(times) < 0.5 and len(times) < 20):  # the first one is slower
            began = time.monotonic()
            work()
            times.append(time.monotonic() - began)
        return min(times)

    read = took(lambda: compare(base, teacher, batch[:2])) / sum(len(w.input_ids) for w in batch[:2])
    began = time.monotonic()
    written = generate(base, [w.input_ids[:32] for w in batch] * 6, limit=16, sample_seed=1)
    write = (time.monotonic() - began) / sum(len(answer.ids) for answer in written)
    part = as_examples([batch], PROCESSES * settings.gradient_accumulation)[:1]  # as much at a time as in training
    inputs = {key: value.to(inner.device) for key, value in collate(part, base.tokenizer.pad_token_id).items()}
    model = with_adapter(inner, settings) if settings.method != "full" else inner
    if settings.gradient_checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    spoken = torch.arange(spoken_words(inner.config.get_text_config().vocab_size))[None]
    words = words_of(inner, [batch], Teacher(spoken, torch.zeros((1, 1))))

    def step() -> None:
        with torch.autocast(inner.device.type, fast, enabled=fast != torch.float32), \
                peft.helpers.disable_input_dtype_casting(model, active=fast != torch.float32), \
                short_attention(model):
            batch_loss(model, inner, inputs, teacher, 1.0, words).backward()

    return read, write, took(step) / inputs["input_ids"].numel()


def plan_seconds(base: Chat, job: Job) -> dict[str, float]:
    """How long each stage takes, from what it reads, writes and trains."""
    settings, tests = job.settings, len(job.inputs.test)
    read, write, train = measure_pace(base, job)
    step, grown = step_tokens(job.native, settings), settings.rope_factor != 1
    talks = min(settings.eval_questions, len(exam_questions(job.inputs.languages))) * 1.2
    questions = settings.self_text / TALK_TOKENS / 2 * QUESTION_TOKENS
    exam = 25 * write * (2 * tests + 30) + 100 * read * talks + 0.7 * talks * TALK_TOKENS * write
    long = grown * 1.5 * settings.window * read * (LONG_TALKS + tests / 3)
    planned = {
        "1-base": write * (settings.self_text + questions + 1.6 * talks * TALK_TOKENS)
        + read * (2 * settings.self_text + 18000) + 3,
        "2-healed": grown * settings.heal_steps * mean_step(step, [0, 0, 0, settings.window]) * (train + read / 5) + 3,
        "6-result": 2.5 * exam + 2 * long + 5}
    _, most = steps_of_pass_1(job)
    planned["3-pass-1"] = most * step * train + 3
    if material := job.material:
        length = job.learnt_tokens / len(material.rows)
        planned["3-pass-1"] += 12 * (not settings.knowledge_steps) * len(material.watched) * length * read
        told = min(WRITTEN_TOKENS, len(material.test) * LONGEST_ANSWER)
        planned["6-result"] += 1.6 * (4 * told * write + (4 + 8) * len(material.test) * length * read)
    if rows := len(job.inputs.rows):
        lessons = 4 * (rows + sum(len(PARAPHRASES[code]) for code in job.inputs.languages))  # in a hurry, doubted, ...
        planned |= {"4-self-answers": MOST_ASKED * write * 1.3 * TALK_TOKENS + 80 * (MOST_ASKED + lessons) * read + 3,
                    "5-pass-2": settings.steps_2 * mean_step(step, second_lengths(job)) * (train + read / 2) + 3}
    return planned


def make_plan(job: Job) -> dict[str, float]:
    """Say what is going to happen and what it costs; the seconds of each stage."""
    settings, base = job.settings, load_chat(job.base, job.settings, train=job.settings.method == "qlora")
    planned = plan_seconds(base, job)
    with tempfile.TemporaryDirectory() as folder, blaming(f"o que há em {job.base} (config.json, tokenizer)"):
        save_words(base, Path(folder), job.base)  # what cannot be saved is to be known now
        read_config(folder)
        load_tokenizer(folder)
    if base.model.config.model_type != read_config(job.base).model_type:  # Llama 4
        say("  Este modelo também vê imagens; só a parte de texto dele será renomeada e salva.")
    if thinks(base.tokenizer):
        say("  Este modelo pensa antes de responder, se ninguém desliga isso; vou treiná-lo e medi-lo sem pensar "
            "(enable_thinking=False).")
    device = "na placa de vídeo" if base.model.device.type == "cuda" else "no processador"
    device += ", em bfloat16" * (compute_dtype(job.weights) == torch.bfloat16)
    how = {"full": "treino de todos os pesos", "lora": f"LoRA (adaptador de tamanho {settings.lora_rank})",
           "qlora": f"QLoRA (pesos em 4 bits, adaptador de tamanho {settings.lora_rank})"}[settings.method.strip("4")]
    split = f", cada etapa em {settings.gradient_accumulation} partes" * (settings.gradient_accumulation > 1)
    say(f"  {decimal(job.weights / 1e6)} milhões de parâmetros. Método: {how}, {device}{split}.\n"
        f"  Contexto: de {job.native} para {int(job.native * settings.rope_factor)} tokens; "
        f"treino em sequências de até {settings.window}.\n"
        f"  Vai precisar de cerca de {size_text(job.plan['memory'])} de memória, {size_text(job.disk)} de disco e "
        f"{clock(sum(planned.values()))}." + f"\n  {FEW_BITS}" * (settings.method == "qlora4"))
    if flags := llama_flags(read_config(job.base, settings.rope_factor)):
        say("  Atenção: no Ollama e no LM Studio, o fator de RoPE deste modelo se perde (ou não foi testado): neles,\n"
            f"  só com --rope-factor 1 ele será o que foi medido. No llama.cpp, acrescente{flags}.")
    return planned


# ---- The stages, each from folder to folder ---------------------------------------------------------------

def from_first(value):
    """What the first process gave, in all of them: for decisions that all must take alike."""
    box = [value]
    if PROCESSES > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


def together(work: Callable, *arguments) -> None:
    """Do a training in all processes. The others wait for it in `follow`."""
    from_first((work, arguments))
    work(*arguments)


def follow() -> int:
    """What all processes but the first do: train along with it for as long as it has work."""
    while True:
        try:
            work, arguments = from_first(None) or (None, ())
        except RuntimeError:  # the first one has ended, and said why
            return 2
        if not work:
            return 0
        work(*arguments)


def make_healed(job: Job, partial: Path) -> None:
    """The base with its template renewed and its RoPE scaled and healed, a whole model."""
    settings, log, grown = job.settings, [], job.settings.rope_factor != 1
    chat = load_chat(job.base, settings, settings.rope_factor, merge=not grown)
    if job.heard.names.name:
        renew_template(chat.tokenizer, settings, job.heard.names.old)
    if grown:
        log = heal(chat, job, partial)
    else:
        say("  ROPE_FACTOR é 1: o contexto fica como está e não há o que curar.")
    chat.model.to(chat.model.get_input_embeddings().weight.dtype)  # healing has widened queries and keys
    save_stage(chat, partial, log)


def save_and_prove(job: Job, firm: Path, partial: Path) -> None:
    """Save the model, load what was saved, and measure it and the base."""
    result, names, settings = partial / "model", job.heard.names, job.settings
    shutil.rmtree(result, ignore_errors=True)
    save_model(load_chat(firm, job.settings, merge=True), result, job.base)
    if (firm / LORA_FILE).is_file() and settings.rope_factor == 1:  # with RoPE scaled it belongs to the healed base
        adapter = result / "adapter"
        adapter.mkdir()
        shutil.copyfile(firm / LORA_FILE, adapter / LORA_FILE)
        # Others know the base by its name.
        config = load_json(firm / "adapter_config.json") | {"base_model_name_or_path": job.inputs.values["BASE"]}
        write_json(adapter / "adapter_config.json", config)
    exam = make_exam(load_tokenizer(job.base), job.inputs, job.heard, settings.window * (settings.rope_factor != 1))
    base = load_chat(job.base, settings)
    exam, teacher = read_late_talks(base, exam, job.teacher, job.native)
    scores = {"before": evaluate(base, exam, names, teacher, "perguntas de prova, antes")}
    for name, other in untrained(exam, job.inputs.rows, settings).items() if job.inputs.rows else ():
        scores[name] = evaluate(base, other, names, None, "perguntas de prova, sem treino")
    learnt = prove_material(base, job, "before") if job.material else {}
    del base
    tuned = load_chat(result, settings)
    scores["pass_2"] = evaluate(tuned, exam, names, teacher, "perguntas de prova, depois")
    if job.material:
        learnt |= prove_material(tuned, job, "tuned")
        recited = recited_share(tuned, [t for tokens, t in exam.talks if not tokens], job.material.rows)
        del tuned
        base = load_chat(job.base, settings)
        learnt = {way: m._replace(fluency=fluency_of(base, job.material, m.answers)) for way, m in learnt.items()}
        write_json(partial / "knowledge.json", material_report(job.material, learnt, recited))
    save_exam(result, exam, names, teacher)
    write_json(partial / "scores.json", {name: s._asdict() for name, s in scores.items()})


def prove_material(chat: Chat, job: Job, name: str) -> dict[str, Mastery]:
    """The exam of the material without and with the most similar rows, as many as the model has room for."""
    test, rare = job.material.test, rare_words(job.material)
    before = contexts_of(chat.tokenizer, job.material, min(context_of(chat.model.config), job.settings.window))
    return {name: take_material(chat, test, rare, [[]] * len(test), "linhas guardadas"),
            f"{name}_rows": take_material(chat, test, rare, before, "linhas guardadas, com as parecidas")}


def material_report(material: Material, learnt: dict[str, Mastery], recited: float) -> dict:
    """What the report holds of the material: figures, verdict, and twelve rows with all answers."""
    scores = {way: m._asdict() for way, m in learnt.items()}
    answers = {way: figures.pop("answers") for way, figures in scores.items()}
    shown = [{"line": row.line, "question": row.question, "answer": row.answer,
              **{way: texts[i] for way, texts in answers.items()}} for i, row in enumerate(material.test[:12])]
    return {"rows": len(material.rows), "held_out": len(material.test), "watched": len(material.watched),
            "written": len(answers["tuned"]), "total": material.total, "left_out": material.left_out,
            "scores": scores, "recited": recited, "verdict": material_verdict(scores), "shown": shown}


def write_report(job: Job, stages: dict[str, Path]) -> None:
    """Beside the model: report.json, report.png, the model card README.md, and self_answers.jsonl of an identity."""
    settings, result = job.settings, stages["6-result"]
    folder, scores = result / "model", load_json(result / "scores.json")
    paths = {name: Path(getattr(job.asked, name)).name for name in ("model_path", "output_dir", "identity_file",
                                                                    "knowledge_file")}
    names = {"2-healed": "healing", "3-pass-1": "pass_1", "5-pass-2": "pass_2"}
    trained = {names[name]: stage for name, stage in stages.items() if (stage / "pace.json").is_file()}
    libraries = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
    learnt = load_json(result / "knowledge.json") if job.material else None
    report = {
        "key": job.key, "base": job.inputs.values["BASE"],
        "missed": [*Scores(**scores["pass_2"]).gaps(settings), *material_gaps(learnt, settings)],
        "seconds": {name: load_json(stage / "key.json")["seconds"] for name, stage in stages.items()},
        "pace": {name: load_json(stage / "pace.json") for name, stage in trained.items()},
        "settings": asdict(settings) | paths,  # the report may be published, and paths tell the user's name
        "data_hash": job.inputs.data_hash, "precision": FEW_BITS * (settings.method == "qlora4"),
        "context": {"native": job.native, "scaled": int(job.native * settings.rope_factor)},
        "versions": {name: importlib.metadata.version(name) for name in libraries},
        "old_names": job.heard.names.old, "scores": scores, "knowledge": learnt,
        "losses": {name: load_json(stage / "log.json") for name, stage in trained.items()}}
    write_json(folder / "report.json", report)
    draw_report(report, folder / "report.png")
    if job.inputs.rows:
        with (folder / "self_answers.jsonl").open("w", encoding="utf-8") as file:
            for record in load_json(stages["4-self-answers"] / "self_answers.json")["answers"]:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    write_card(folder, job, report)
    flush(folder)


def material_gaps(learnt: dict | None, settings: Settings) -> list[str]:
    """What of the material was missed: that the loss on held-out rows falls, and that everyday answers stay clear."""
    if not learnt:
        return []
    before, after = (learnt["scores"][way]["loss"] for way in ("before", "tuned"))
    missed = {"material": after >= before, "material recitado": learnt["recited"] > settings.target_leak}
    return [name for name, found in missed.items() if found]


def save_exam(folder: Path, exam: Exam, names: Names, teacher: Teacher) -> None:
    """exam.json and exam.tensors: all that it takes to measure the model again."""
    talks, rows = [], []
    for tokens, talk in exam.talks:
        talks.append((tokens, talk._replace(row=len(rows), asked=[])))
        rows += range(talk.row, talk.row + len(talk.ids))
    write_json(folder / "exam.json", {"questions": exam.questions, "talks": talks, "names": names})
    tensor_files.save_file({key: value[rows] for key, value in teacher._asdict().items()}, folder / "exam.tensors")


def read_exam(folder: Path) -> tuple[Exam, Names, Teacher]:
    saved = load_json(folder / "exam.json")
    exam = Exam([*map(tuple, saved["questions"])], [(tokens, Talk(*talk)) for tokens, talk in saved["talks"]])
    return exam, read_names(saved["names"]), Teacher(**tensor_files.load_file(folder / "exam.tensors"))


def run_stages(job: Job, planned: dict[str, float], work: Path) -> None:
    """The job itself: listen, heal, teach, let the model answer, teach again, measure."""
    settings, stages = job.settings, Stages(work, job.facts, job.settings, planned)
    listening = settings if settings.method == "qlora4" else replace(settings, method="lora")  # else alike for all
    base = stages("1-base", f"Ouvindo o modelo base: {'quem ele diz que é e ' * bool(job.inputs.rows)}o que ele sabe",
                  lambda partial: save_heard(partial, *listen(
                      load_chat(job.base, listening), settings, job.inputs)),
                  "4 bits" if listening is settings else None)
    heard, teacher = read_heard(base)
    job = job._replace(heard=heard, teacher=teacher)
    grown = f"{int(job.native * settings.rope_factor)} tokens (RoPE linear x{settings.rope_factor:g})"
    tuned = stages("2-healed", f"Contexto de {job.native} para {grown} e cura",
                   lambda partial: together(make_healed, job, partial))
    lessons = make_lessons(load_tokenizer(tuned), heard, job.inputs, settings) if job.inputs.rows else []
    what = " e ".join(["a identidade"] * bool(job.inputs.rows) + ["o material"] * bool(job.material))
    healed, facts = tuned, job.material and [job.material, settings.knowledge_steps]
    tuned = stages("3-pass-1", f"Passo 1: aprender {what}",
                   lambda partial: together(run_course, healed, partial, first_course(lessons, job), job), facts)
    if job.inputs.rows:
        tuned = second_pass(tuned, lessons, job, stages)
    if not (work / "6-result" / "model").is_dir():
        discard(work / "6-result")  # its model was moved to an output that is there no more
    result = stages("6-result", "Salvando, carregando de novo e medindo: antes e depois",
                    lambda partial: save_and_prove(job, tuned, partial))
    write_report(job, stages.folders)
    publish(result / "model", settings)


def second_pass(taught: Path, lessons: list[Talk], job: Job, stages: Stages) -> Path:
    """Self-answers of the model of pass 1, and pass 2; its stage."""
    settings = job.settings
    answered = stages("4-self-answers", "Respostas do próprio modelo", lambda partial: write_json(
        partial / "self_answers.json",
        collect_self_answers(load_chat(taught, settings, merge=settings.method == "lora"), lessons, job.heard,
                             job.teacher, settings)))
    return stages("5-pass-2", "Passo 2: firmar a identidade", lambda partial: together(
        run_course, taught, partial, second_course(lessons, load_json(answered / "self_answers.json"), job), job))


# ---- A model that is ready --------------------------------------------------------------------------------

def ready_model(settings: Settings) -> tuple[Settings, Path]:
    """The model to talk to or to measure: the one of --model-path if that was given, else the result. The settings get
    the precision in which it was measured, as its report says; of others, that in which this machine computes."""
    with blaming_disk(settings.model_path):
        if settings.model_path == settings.output_dir and not (Path(settings.output_dir) / "report.json").is_file():
            raise InputError(f"ainda não há um modelo pronto em {settings.output_dir}. Rode primeiro sem --chat e sem "
                             "--evaluate, ou diga qual modelo usar: --model-path PASTA.")
        folder, method = local_folder(settings), "lora"
        check_base(folder)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a report of somebody else, or none
        method = load_json(folder / "report.json")["settings"]["method"]
    return replace(settings, method=method), folder


def examine(settings: Settings, folder: Path) -> int:
    """The report for a ready model (0 all targets met, 3 one missed); only ours know their base."""
    ours, of_material = (folder / "exam.json").is_file(), []
    if not ours and not settings.identity_file:
        raise InputError(f"{folder} não tem exam.json, e sem IDENTITY_FILE não há o que medir nele.")
    inputs = None if ours else check_inputs(settings)  # before libraries are loaded
    use_one_card()
    say(f"Medindo {folder}")
    if ours:
        with blaming(f"o report.json ou o exam.json de {folder}"):
            report, (exam, names, teacher) = load_json(folder / "report.json"), read_exam(folder)
            reported = {name: Scores(**values) for name, values in report["scores"].items()}["pass_2"]
            of_material = material_gaps(report.get("knowledge"), settings)  # which is not measured again
            same = replace(settings, max_new_tokens=report["settings"]["max_new_tokens"])
        after = evaluate(load_chat(folder, same), exam, names, teacher, "perguntas de prova")
        differs = {"reported": reported._asdict()} if after != reported else {}
        say(f"  Respostas e números {'diferentes dos' if differs else 'iguais aos'} do report.json que veio com ele.")
        show_scores({**report["scores"], **differs, "pass_2": after._asdict()})
    else:
        chat = load_chat(folder, settings)
        say("  Não é um resultado deste script (falta o exam.json): não dá para medir a retenção.")
        names = find_names(chat.tokenizer, replace(settings, model_path=str(folder)), inputs, chat)
        talks = [Talk(question_and_answer(q, ""), kind) for kind, q in exam_questions(inputs.languages)]
        exam = make_exam(chat.tokenizer, inputs, Heard(names, [], talks, talks), 0)
        after = evaluate(chat, exam, names, None, "perguntas de prova")
        show_scores({"alone": after._asdict()})
    missed = [*after.gaps(settings), *of_material]
    say(f"Metas não atingidas: {', '.join(missed)}." if missed else "Todas as metas foram atingidas.", verdict=True)
    return 3 if missed else 0


def speak(chat: Chat, ids: list[int], limit: int) -> tuple[str, bool]:
    """Print an answer while it is written, which Ctrl-C stops; its text, and whether the model ended it."""
    said, tokens = [], torch.tensor([ids], device=chat.model.device)

    class Voice(transformers.TextStreamer):
        def put(self, value):
            if value.numel() > 1 or value.item() not in chat.stops:  # not every stop is a special token
                super().put(value)

        def on_finalized_text(self, text, stream_end=False):
            said.append(text if any(said) else text.lstrip())
            print(said[-1], end="", flush=True)

    voice = Voice(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with computing(chat.model), contextlib.suppress(KeyboardInterrupt):
        tokens = chat.model.generate(tokens, attention_mask=tokens * 0 + 1, max_new_tokens=limit, streamer=voice)
    voice.end()  # it keeps the last word back until it knows that nothing belongs to it
    print(flush=True)
    return "".join(said).strip(), tokens.shape[1] > len(ids) and tokens[0, -1].item() in chat.stops


def converse(settings: Settings, folder: Path) -> int:
    """A conversation in the terminal, which forgets its oldest turns. From a pipe, only answers go to stdout."""
    person, name = bool(sys.stdin) and sys.stdin.isatty(), Path(settings.model_path).name
    chat = load_chat(folder, settings)
    with contextlib.suppress(ImportError):  # arrow keys at the prompt; the Windows console has them
        import readline  # noqa: F401
    context = context_of(chat.model.config)
    limit = context - min(settings.max_new_tokens, context // 2)  # of a prompt, so that there is room for an answer
    note = functools.partial(print, file=sys.stderr, flush=True)  # so that a pipe gets answers alone
    commands = "/sistema TEXTO diz a ele como ser, /limpar recomeça, /ajuda mostra isto, /sair sai; Ctrl-C cala."
    for number in [signal.SIGTERM] + [signal.SIGINT] * (not person):  # these end the program as they end any other
        signal.signal(number, signal.SIG_DFL)
    if person:
        note(f"Conversa com {name}. {commands}")
    system, turns = [], []
    while True:
        try:
            line = input("Você: " if person else "").strip("\ufeff \t\r") if sys.stdin else "/sair"
        except KeyboardInterrupt:
            note("\nPara sair, escreva /sair.")
            continue
        except EOFError:
            print(end="\n" * person)
            return 0
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
            print(end="\n" * (not person), flush=True)  # a line for each question
            continue
        if len(heard) <= len(turns):
            note(f"O contexto dele, de {context} tokens, encheu: esqueci o começo da conversa.")
        print(f"{name}: " * person, end="", flush=True)
        answer, ended = speak(chat, ids, min(context - len(ids), 2048))
        if not ended:
            note("(parou aqui)")
        turns = [*heard, {"role": "assistant", "content": answer}] if answer else heard[:-1]


# ---- Run --------------------------------------------------------------------------------------------------

def run(settings: Settings) -> int:
    """Check everything, say what it takes, and do the job; the exit status."""
    if settings.chat or settings.evaluate:
        return (converse if settings.chat else examine)(*ready_model(settings))
    if not (job := check_job(settings)):
        return conclude(settings)
    gc.freeze()  # the libraries: to look through them takes a fifth of a second, at each change of models
    planned = job.plan.get("seconds") if job.plan.get("planned") == job.key else None
    if settings.check or not planned:  # a run that goes on as it began was planned then
        job, planned = as_it_fits(make_plan, job)
    if settings.check:
        say("Está tudo certo. Para começar, rode o mesmo comando sem --check.", verdict=True)
        return 0
    carry_out(job, planned)
    return conclude(settings)


def carry_out(job: Job, planned: dict[str, float]) -> None:
    """Make the stages, in a folder that one run holds at a time, and that --restart empties first."""
    work = work_folder(job.settings)
    say(f"As etapas ficam em {work}: se a execução parar, rode o mesmo comando (sem --restart) para continuar.")

    def begin(job: Job) -> None:
        chosen = {name: getattr(job.settings, name) for name in CHOSEN}
        write_json(work / "plan.json", job.plan | {"planned": job.key, "seconds": planned, "settings": chosen})
        run_stages(job, planned, work)

    with blaming_disk(work):
        work.mkdir(parents=True, exist_ok=True)
        (work / WORK_NOTE).write_text("Com estas etapas do rename_obrutai.py, uma execução que parou continua de onde "
                                      "estava.\nCom o modelo pronto, pode apagar esta pasta.\n", encoding="utf-8")
    try:
        with filelock.FileLock(work / "lock", timeout=0):
            for folder in work.glob("*/") if job.settings.restart else ():
                discard(folder)
            if PROCESSES == 1:
                as_it_fits(begin, job)
            else:  # another process may be in the midst of a step, and would never hear of a new try
                begin(job)
    except filelock.Timeout:
        raise InputError(f"outra execução está usando {work}: espere, ou mude a saída (--output-dir).") from None
    except InputError as error:
        error.advice = ""  # the settings were in order: it came up in the work
        raise


def as_it_fits(work: Callable[[Job], object], job: Job) -> tuple[Job, object]:
    """Do the work, again with less each time that memory runs out: the job as it fits, and what came of it."""
    while True:
        try:
            return job, work(job)
        except (RuntimeError, MemoryError) as error:
            if not re.search(OUT_OF_MEMORY, causes(error)):
                raise
        settings = job.settings
        if settings.gradient_accumulation < settings.batch_size:
            settings = replace(settings, gradient_accumulation=2 * settings.gradient_accumulation)
            say(f"  Faltou memória: continuo com cada etapa em {settings.gradient_accumulation} partes.")
        elif not settings.gradient_checkpointing:
            settings = replace(settings, gradient_checkpointing=True)
            say("  Faltou memória: continuo com GRADIENT_CHECKPOINTING, que gasta menos e demora mais.")
        else:
            raise InputError("faltou memória, mesmo com um diálogo por vez. Feche outros programas e rode de novo, "
                             "sem --restart, ou diminua WINDOW (--window) ou MAX_NEW_TOKENS (--max-new-tokens).")
        job = job._replace(settings=settings)
        gc.collect()
        torch.cuda.empty_cache()


def causes(error: BaseException) -> str:
    """What an error and those that it came from say, in small letters."""
    text = f"{type(error).__name__} {getattr(error, 'errno', '')} {error}".lower()
    inner = error.__cause__ or error.__context__
    return f"{text}\n{causes(inner)}" if inner else text


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 all targets met, 2 user mistake, 3 target missed, 130 stopped, 141 nobody reads; a bug keeps its
    traceback."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    settings, trains = None, True
    try:
        settings = parse_settings(argv)
        trains = not (settings.chat or settings.evaluate)
        say.quiet = settings.quiet
        names = dict.fromkeys(name.partition(".")[0] for name in [*LIBRARIES, "matplotlib"])
        if missing := [name for name in names if not importlib.util.find_spec(name)]:
            raise InputError(f"neste Python ({sys.executable}) faltam pacotes: {', '.join(missing)}. Instale-os com "
                             "ele: python -m pip install -r requirements.txt")
        # What waits for another process is deaf to a handler in Python.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if RANK else signal.default_int_handler)
        quiet_libraries(settings)
        if PROCESSES > 1:  # the others may wait for hours
            accelerate.PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=2))
        if RANK:
            return follow()
        status = run(settings)
        from_first(None)  # the others may go
        return status
    except InputError as error:
        if RANK == 0:
            print(f"Erro: {error}{error.advice * trains}", file=sys.stderr)
        else:  # the launcher stops all as soon as one ends, maybe before the first has spoken
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(30)
        return 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        kept = settings and trains and work_folder(settings).exists()
        text = (f"Nada se perdeu: rode o mesmo comando (sem --restart) para continuar. As etapas estão em "
                f"{work_folder(settings)}; se desistir, apague essa pasta.") if kept else "Nada foi escrito."
        say(f"\nInterrompido. {text}", verdict=True)
        return 130
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        if re.search(OUT_OF_MEMORY, causes(error)):
            split = ", ou aumente GRADIENT_ACCUMULATION (--gradient-accumulation)" * (PROCESSES > 1)
            text = f"faltou memória para este modelo. Feche outros programas{split} e tente de novo."
        elif re.search(DISK_FULL, causes(error)):
            text = (f"o disco encheu: o do trabalho ({work_folder(settings)}) ou o da pasta temporária "
                    f"({tempfile.gettempdir()}). Libere espaço e rode o mesmo comando, sem --restart: ele continua da "
                    "última parte guardada inteira.")
        else:
            raise
        print(f"Erro: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
