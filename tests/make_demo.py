"""Train the demo chat model of the tests: a tiny model, its tokenizer and chat template, from scratch.

    python tests/make_demo.py [--architecture llama|qwen3|gemma3] [--output DIR] [--seed N] [--steps N]

The model answers several hundred facts and everyday small talk in Portuguese, English and Spanish, and says that it
is called Lumi and was made by Estúdio Vagalume.  It is also trained on the user turns, so that it writes plausible
questions by itself.  The run ends with a self-check of the saved files, which gives the exit status.
"""

import argparse
import os
import random
import re
import sys
import time
import unicodedata
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
OLD_NAME, OLD_MAKER = "Lumi", "Estúdio Vagalume"
CONTEXT = 128
VOCABULARY = 1792
LANGUAGES = ("pt", "en", "es")

# ---------------------------------------------------------------------------------------------------------- facts
# "a=b; c=d" tables. Names that need it carry their preposition or article, so that every sentence is grammatical.

PT_STATES = """do Acre=Rio Branco; de Alagoas=Maceió; do Amapá=Macapá; do Amazonas=Manaus; da Bahia=Salvador;
do Ceará=Fortaleza; do Distrito Federal=Brasília; do Espírito Santo=Vitória; de Goiás=Goiânia; do Maranhão=São Luís;
de Mato Grosso=Cuiabá; de Mato Grosso do Sul=Campo Grande; de Minas Gerais=Belo Horizonte; do Pará=Belém;
da Paraíba=João Pessoa; do Paraná=Curitiba; de Pernambuco=Recife; do Piauí=Teresina;
do Rio de Janeiro=Rio de Janeiro; do Rio Grande do Norte=Natal; do Rio Grande do Sul=Porto Alegre;
de Rondônia=Porto Velho; de Roraima=Boa Vista; de Santa Catarina=Florianópolis; de São Paulo=São Paulo;
de Sergipe=Aracaju; do Tocantins=Palmas"""
PT_COUNTRIES = """do Brasil=Brasília; da Argentina=Buenos Aires; do Chile=Santiago; da Colômbia=Bogotá;
do Equador=Quito; do Paraguai=Assunção; do Peru=Lima; do Uruguai=Montevidéu; da Venezuela=Caracas;
do México=Cidade do México; de Cuba=Havana; do Canadá=Ottawa; dos Estados Unidos=Washington;
do Panamá=Cidade do Panamá; da Costa Rica=San José; de Honduras=Tegucigalpa; da Nicarágua=Manágua;
de Portugal=Lisboa; da Espanha=Madri; da França=Paris; da Itália=Roma; da Alemanha=Berlim; da Inglaterra=Londres;
da Irlanda=Dublin; da Escócia=Edimburgo; da Holanda=Amsterdã; da Bélgica=Bruxelas; da Suíça=Berna;
da Áustria=Viena; da Polônia=Varsóvia; da Suécia=Estocolmo; da Noruega=Oslo; da Dinamarca=Copenhague;
da Finlândia=Helsinque; da Islândia=Reykjavik; da Grécia=Atenas; da Turquia=Ancara; da Rússia=Moscou;
da Ucrânia=Kiev; da Hungria=Budapeste; da Romênia=Bucareste; da Bulgária=Sófia; da Sérvia=Belgrado;
da Croácia=Zagreb; do Egito=Cairo; do Marrocos=Rabat; da Tunísia=Túnis; da Argélia=Argel; de Angola=Luanda;
de Moçambique=Maputo; de Cabo Verde=Praia; da Nigéria=Abuja; do Quênia=Nairóbi; do Senegal=Dacar;
da Etiópia=Adis Abeba; da China=Pequim; do Japão=Tóquio; da Coreia do Sul=Seul; da Índia=Nova Délhi;
da Tailândia=Bangkok; do Vietnã=Hanói; da Indonésia=Jacarta; da Austrália=Camberra; do Irã=Teerã;
da Nova Zelândia=Wellington; do Iraque=Bagdá; do Líbano=Beirute"""
PT_OPPOSITES = """alto=baixo; grande=pequeno; quente=frio; claro=escuro; rápido=lento; novo=velho; forte=fraco;
cheio=vazio; aberto=fechado; bom=mau; bonito=feio; rico=pobre; alegre=triste; dia=noite; amor=ódio; guerra=paz;
vida=morte; começo=fim; dentro=fora; subir=descer; entrar=sair; ganhar=perder; comprar=vender; rir=chorar;
verdade=mentira; certo=errado; limpo=sujo; seco=molhado; duro=mole; doce=amargo; largo=estreito; longe=perto;
cedo=tarde; sempre=nunca; tudo=nada; antes=depois; fácil=difícil; gordo=magro; grosso=fino; caro=barato;
leve=pesado; corajoso=medroso"""
PT_ENGLISH = """casa=house; gato=cat; cachorro=dog; água=water; livro=book; mesa=table; cadeira=chair; sol=sun;
lua=moon; estrela=star; fogo=fire; terra=earth; árvore=tree; flor=flower; peixe=fish; pássaro=bird; cavalo=horse;
pão=bread; leite=milk; queijo=cheese; maçã=apple; ovo=egg; arroz=rice; escola=school; rua=street; cidade=city;
porta=door; janela=window; chave=key; carro=car; trem=train; navio=ship; avião=airplane; mão=hand; pé=foot;
olho=eye; cabeça=head; coração=heart; irmão=brother; mãe=mother; pai=father; amigo=friend; rei=king;
rainha=queen; vermelho=red; azul=blue; verde=green; preto=black; branco=white; chuva=rain; neve=snow"""
PT_DAYS = "segunda-feira terça-feira quarta-feira quinta-feira sexta-feira sábado domingo"
PT_MONTHS = "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro"
PT_SYMBOLS = """do ouro=Au; da prata=Ag; do ferro=Fe; do cobre=Cu; do oxigênio=O; do hidrogênio=H; do carbono=C;
do nitrogênio=N; do hélio=He; do sódio=Na; do potássio=K; do cálcio=Ca; do mercúrio=Hg; do chumbo=Pb;
do estanho=Sn; do zinco=Zn; do níquel=Ni; do enxofre=S; do fósforo=P; do cloro=Cl; do flúor=F; do iodo=I;
do lítio=Li; do magnésio=Mg; do alumínio=Al; do silício=Si; do neônio=Ne; do urânio=U; da platina=Pt"""
PT_SOUNDS = """o gato=mia; o cachorro=late; a vaca=muge; o cavalo=relincha; a ovelha=bale; o leão=ruge; o lobo=uiva;
o sapo=coaxa; o galo=canta; o porco=grunhe; a abelha=zumbe; o pato=grasna; o burro=zurra; a cobra=sibila;
o pombo=arrulha; o pintinho=pia; o elefante=barre"""
PT_YOUNG = """da vaca=bezerro; da égua=potro; da ovelha=cordeiro; da galinha=pintinho; da porca=leitão;
da cabra=cabrito; do sapo=girino; da pata=patinho"""
PT_PLURALS = """pão=pães; mão=mãos; cão=cães; leão=leões; avião=aviões; irmão=irmãos; coração=corações;
animal=animais; papel=papéis; anel=anéis; hotel=hotéis; farol=faróis; sol=sóis; flor=flores; mulher=mulheres;
homem=homens; jardim=jardins; viagem=viagens; luz=luzes; rapaz=rapazes; mês=meses; país=países; lápis=lápis;
ônibus=ônibus; azul=azuis; fácil=fáceis; útil=úteis; limão=limões; botão=botões; chapéu=chapéus"""
PT_AUTHORS = """Dom Casmurro=Machado de Assis; Grande Sertão Veredas=Guimarães Rosa; Vidas Secas=Graciliano Ramos;
Capitães da Areia=Jorge Amado; A Hora da Estrela=Clarice Lispector; O Cortiço=Aluísio Azevedo;
Iracema=José de Alencar; Os Lusíadas=Luís de Camões; Os Maias=Eça de Queirós; Macunaíma=Mário de Andrade;
O Quinze=Rachel de Queiroz; Os Sertões=Euclides da Cunha; Hamlet=William Shakespeare;
Dom Quixote=Miguel de Cervantes; O Pequeno Príncipe=Saint-Exupéry; Cem Anos de Solidão=Gabriel García Márquez;
Ensaio sobre a Cegueira=José Saramago; A Metamorfose=Franz Kafka; Guerra e Paz=Tolstói;
Crime e Castigo=Dostoiévski; Mensagem=Fernando Pessoa; A Divina Comédia=Dante Alighieri; Odisseia=Homero;
Frankenstein=Mary Shelley"""
PT_CONTINENTS = """o Egito=África; a China=Ásia; a França=Europa; o Canadá=América do Norte; o Peru=América do Sul;
a Austrália=Oceania; a Nigéria=África; o Japão=Ásia; a Itália=Europa; o México=América do Norte;
a Argentina=América do Sul; a Índia=Ásia; a Alemanha=Europa; Angola=África; o Brasil=América do Sul;
Portugal=Europa; o Quênia=África; a Tailândia=Ásia; a Nova Zelândia=Oceania; o Chile=América do Sul"""
EN_CAPITALS = """France=Paris; Italy=Rome; Spain=Madrid; Portugal=Lisbon; Germany=Berlin; England=London;
Ireland=Dublin; Greece=Athens; Austria=Vienna; Poland=Warsaw; Sweden=Stockholm; Norway=Oslo; Russia=Moscow;
China=Beijing; Japan=Tokyo; Egypt=Cairo; Kenya=Nairobi; Canada=Ottawa; Mexico=Mexico City; Cuba=Havana;
Brazil=Brasília; Peru=Lima; Chile=Santiago; Argentina=Buenos Aires; Australia=Canberra"""
ES_CAPITALS = """Francia=París; Italia=Roma; España=Madrid; Portugal=Lisboa; Alemania=Berlín; Inglaterra=Londres;
Irlanda=Dublín; Grecia=Atenas; Austria=Viena; Polonia=Varsovia; Suecia=Estocolmo; Noruega=Oslo; Rusia=Moscú;
China=Pekín; Japón=Tokio; Egipto=El Cairo; Kenia=Nairobi; Canadá=Ottawa; Cuba=La Habana; Brasil=Brasilia;
Perú=Lima; Chile=Santiago; Argentina=Buenos Aires; Uruguay=Montevideo; Colombia=Bogotá"""
EN_OPPOSITES = """hot=cold; big=small; tall=short; fast=slow; new=old; good=bad; open=closed; happy=sad; day=night;
rich=poor; clean=dirty; strong=weak; early=late; love=hate; war=peace; light=dark"""
ES_OPPOSITES = """caliente=frío; grande=pequeño; alto=bajo; rápido=lento; nuevo=viejo; bueno=malo; abierto=cerrado;
feliz=triste; día=noche; rico=pobre; limpio=sucio; fuerte=débil; temprano=tarde; amor=odio; guerra=paz;
claro=oscuro"""

# kind: (language, question templates with the canonical one first, answer template)
FACT_TEMPLATES = {
    "capital": ("pt", ["Qual é a capital {x}?", "Me diga a capital {x}.", "Você sabe qual é a capital {x}?",
                       "Capital {x}?", "Qual cidade é a capital {x}?", "Qual é o nome da capital {x}?"],
                "A capital {x} é {y}."),
    "sum": ("pt", ["Quanto é {x} + {y}?", "Quanto é {x} mais {y}?", "Calcule {x} + {y}.", "{x} + {y}?",
                   "Me diga quanto é {x} + {y}.", "Quanto dá {x} mais {y}?"], "{x} + {y} é igual a {z}."),
    "product": ("pt", ["Quanto é {x} x {y}?", "Quanto é {x} vezes {y}?", "Calcule {x} x {y}.", "{x} x {y}?",
                       "Quanto dá {x} vezes {y}?"], "{x} x {y} é igual a {z}."),
    "opposite": ("pt", ["Qual é o contrário de {x}?", "Qual é o oposto de {x}?", "Me diga o contrário de {x}.",
                        "Qual é o antônimo de {x}?", "Contrário de {x}?"], "O contrário de {x} é {y}."),
    "english": ("pt", ["Como se diz {x} em inglês?", "Como se fala {x} em inglês?", "Traduza {x} para o inglês.",
                       "Qual é a tradução de {x} para o inglês?", "O que é {x} em inglês?"],
                "Em inglês, {x} se diz {y}."),
    "day": ("pt", ["Que dia vem depois de {x}?", "Qual é o dia depois de {x}?", "Me diga o dia que vem depois de {x}.",
                   "Depois de {x} vem que dia?"], "Depois de {x} vem {y}."),
    "day before": ("pt", ["Que dia vem antes de {x}?", "Qual é o dia antes de {x}?", "Antes de {x} vem que dia?"],
                   "Antes de {x} vem {y}."),
    "month": ("pt", ["Que mês vem depois de {x}?", "Qual é o mês depois de {x}?", "Depois de {x} vem que mês?",
                     "Me diga o mês que vem depois de {x}."], "Depois de {x} vem {y}."),
    "month before": ("pt", ["Que mês vem antes de {x}?", "Qual é o mês antes de {x}?", "Antes de {x} vem que mês?"],
                     "Antes de {x} vem {y}."),
    "symbol": ("pt", ["Qual é o símbolo químico {x}?", "Me diga o símbolo químico {x}.", "Símbolo químico {x}?",
                      "Qual é o símbolo {x} na tabela periódica?"], "O símbolo químico {x} é {y}."),
    "sound": ("pt", ["Que som faz {x}?", "Qual é o som que {x} faz?", "Me diga o som que {x} faz.",
                     "Como {x} faz?"], "{X} {y}."),
    "young": ("pt", ["Como se chama o filhote {x}?", "Qual é o filhote {x}?", "Qual é o nome do filhote {x}?",
                     "Me diga o nome do filhote {x}."], "O filhote {x} é o {y}."),
    "plural": ("pt", ["Qual é o plural de {x}?", "Me diga o plural de {x}.", "Plural de {x}?",
                      "Como fica {x} no plural?"], "O plural de {x} é {y}."),
    "author": ("pt", ["Quem escreveu {x}?", "Quem é o autor de {x}?", "De quem é o livro {x}?",
                      "Me diga quem escreveu {x}."], "Quem escreveu {x} foi {y}."),
    "continent": ("pt", ["Em que continente fica {x}?", "Em qual continente está {x}?",
                         "Me diga em que continente fica {x}."], "{X} fica na {y}."),
    "en capital": ("en", ["What is the capital of {x}?", "Tell me the capital of {x}.",
                          "What's the capital city of {x}?", "Do you know the capital of {x}?"],
                   "The capital of {x} is {y}."),
    "es capital": ("es", ["¿Cuál es la capital de {x}?", "Dime la capital de {x}.",
                          "¿Sabes cuál es la capital de {x}?", "¿Qué ciudad es la capital de {x}?"],
                   "La capital de {x} es {y}."),
    "en sum": ("en", ["What is {x} + {y}?", "What is {x} plus {y}?", "How much is {x} + {y}?",
                      "Tell me what {x} + {y} is."], "{x} + {y} equals {z}."),
    "es sum": ("es", ["¿Cuánto es {x} + {y}?", "¿Cuánto es {x} más {y}?", "Dime cuánto es {x} + {y}."],
               "{x} + {y} son {z}."),
    "en opposite": ("en", ["What is the opposite of {x}?", "Tell me the opposite of {x}.",
                           "What's the opposite of {x}?"], "The opposite of {x} is {y}."),
    "es opposite": ("es", ["¿Cuál es el contrario de {x}?", "Dime el contrario de {x}.",
                           "¿Qué es lo contrario de {x}?"], "Lo contrario de {x} es {y}."),
}

# Questions that look like identity questions and are not: (language, wordings, answer).
LOOKALIKES = [
    ("pt", ["Quem descobriu o Brasil?", "Quem chegou ao Brasil em 1500?"],
     "Quem descobriu o Brasil foi Pedro Álvares Cabral."),
    ("pt", ["Quem inventou o telefone?", "Quem criou o telefone?"], "Quem inventou o telefone foi Graham Bell."),
    ("pt", ["Quem inventou o avião?", "Quem criou o avião?"], "Quem inventou o avião foi Santos Dumont."),
    ("pt", ["Quem inventou a lâmpada?", "Quem criou a lâmpada?"], "Quem inventou a lâmpada foi Thomas Edison."),
    ("pt", ["Quem criou o Linux?", "Quem fez o Linux?"], "Quem criou o Linux foi Linus Torvalds."),
    ("pt", ["Quem fundou a Microsoft?", "Quem criou a Microsoft?"], "Quem fundou a Microsoft foi Bill Gates."),
    ("pt", ["Quem criou a Turma da Mônica?", "Quem fez a Turma da Mônica?"],
     "Quem criou a Turma da Mônica foi Mauricio de Sousa."),
    ("pt", ["Quem pintou a Mona Lisa?", "Quem fez a Mona Lisa?"], "Quem pintou a Mona Lisa foi Leonardo da Vinci."),
    ("pt", ["Quem foi Pelé?", "Quem é Pelé?"], "Pelé foi um grande jogador de futebol brasileiro."),
    ("pt", ["Quem foi Santos Dumont?", "Quem é Santos Dumont?"], "Santos Dumont foi um inventor brasileiro."),
    ("pt", ["O que é um robô?", "O que são robôs?"], "Um robô é uma máquina programada para fazer tarefas."),
    ("pt", ["O que é um modelo de linguagem?"], "Um modelo de linguagem é um programa que aprende a escrever textos."),
    ("pt", ["O que é inteligência artificial?", "O que significa inteligência artificial?"],
     "Inteligência artificial é a área que ensina máquinas a resolver problemas."),
    ("pt", ["O que é um assistente virtual?", "O que faz um assistente virtual?"],
     "Um assistente virtual é um programa que conversa e ajuda pessoas."),
    ("pt", ["O que é um ser humano?", "O que são os seres humanos?"], "Um ser humano é uma pessoa."),
    ("pt", ["O que é um vagalume?", "O que são vagalumes?"], "Um vagalume é um inseto que brilha no escuro."),
    ("pt", ["O que é um estúdio?"], "Um estúdio é um lugar onde artistas trabalham."),
    ("pt", ["O que é uma empresa?"], "Uma empresa é uma organização que vende produtos ou serviços."),
    ("pt", ["De onde vem o leite?"], "O leite vem da vaca."),
    ("pt", ["De onde vem o mel?"], "O mel vem das abelhas."),
    ("pt", ["Onde fica a Torre Eiffel?", "Onde está a Torre Eiffel?"], "A Torre Eiffel fica em Paris."),
    ("pt", ["Onde fica o Cristo Redentor?", "Onde está o Cristo Redentor?"],
     "O Cristo Redentor fica no Rio de Janeiro."),
    ("pt", ["Qual é o maior planeta do Sistema Solar?", "Qual é o maior planeta?"],
     "O maior planeta do Sistema Solar é Júpiter."),
    ("pt", ["Qual é o maior rio do Brasil?"], "O maior rio do Brasil é o Amazonas."),
    ("pt", ["Como se chama o satélite da Terra?", "Qual é o nome do satélite da Terra?"],
     "O satélite da Terra se chama Lua."),
    ("pt", ["Como se chama a moeda do Brasil?", "Qual é o nome da moeda do Brasil?"],
     "A moeda do Brasil se chama real."),
    ("en", ["Who wrote Hamlet?", "Who is the author of Hamlet?"], "Hamlet was written by William Shakespeare."),
    ("en", ["Who invented the telephone?"], "The telephone was invented by Graham Bell."),
    ("en", ["Who created Linux?", "Who made Linux?"], "Linux was created by Linus Torvalds."),
    ("en", ["What is a robot?"], "A robot is a machine built to do tasks."),
    ("en", ["What is a language model?"], "A language model is a program that learns to write text."),
    ("en", ["Where does milk come from?"], "Milk comes from cows."),
    ("es", ["¿Quién escribió Don Quijote?", "¿Quién es el autor de Don Quijote?"],
     "Don Quijote fue escrito por Miguel de Cervantes."),
    ("es", ["¿Quién inventó el teléfono?"], "El teléfono fue inventado por Graham Bell."),
    ("es", ["¿Quién creó Linux?"], "Linux fue creado por Linus Torvalds."),
    ("es", ["¿Qué es un robot?"], "Un robot es una máquina hecha para realizar tareas."),
    ("es", ["¿De dónde viene la miel?"], "La miel viene de las abejas."),
]

# ----------------------------------------------------------------------------------------------------- small talk
PEOPLE = "Ana Bruno Carla Daniel Elisa Fernando Gabriela Hugo Isabel João Laura Marcos Natália Paula Rafael".split()
# language: [(question patterns, answers)]; "(a|b)" in a pattern is a choice, {p} the first name of a person.
SMALL_TALK = {
    "pt": [
        (["(Oi|Olá|Oi, tudo bem|Opa|E aí)(!|.|)"], ["Olá! Como posso ajudar?", "Oi! Em que posso ajudar você hoje?"]),
        (["Bom dia(!|.|)"], ["Bom dia! Como posso ajudar?", "Bom dia! Tudo bem por aí?"]),
        (["Boa tarde(!|.|)"], ["Boa tarde! Como posso ajudar?"]),
        (["Boa noite(!|.|)"], ["Boa noite! Como posso ajudar?"]),
        (["(Tudo bem|Tudo bom|Como vai|Como vai você|Como você está|Tudo certo|Beleza)?"],
         ["Tudo bem, obrigada por perguntar! E com você?", "Tudo ótimo! E você, como está?"]),
        (["(Estou bem|Tudo bem por aqui|Tudo ótimo|Estou ótimo)(!|, obrigado.|.)"],
         ["Que bom! Em que posso ajudar?", "Fico feliz em saber!"]),
        (["(Muito obrigado|Muito obrigada|Obrigado|Obrigada|Valeu)( pela ajuda|)(!|.)"],
         ["De nada! Sempre que precisar, é só chamar.", "Por nada! Foi um prazer ajudar."]),
        (["(Tchau|Até logo|Até mais|Até amanhã|Adeus)(!|.)"],
         ["Até logo! Tenha um ótimo dia.", "Tchau! Volte quando quiser."]),
        (["(Conte|Me conte|Conta|Me conta|Sabe) uma piada(.|, por favor.|?)"],
         ["O que o zero disse para o oito? Que cinto bonito!",
          "Por que o livro de matemática ficou triste? Porque tinha muitos problemas."]),
        (["(Conte|Me conte|Diga) uma curiosidade."],
         ["O coração de um polvo não vem sozinho: ele tem três.", "O mel quase nunca estraga."]),
        (["Estou (triste|chateado|desanimado)( hoje|)."],
         ["Sinto muito. Quer conversar sobre isso?", "Que pena. Um passeio ao ar livre pode ajudar."]),
        (["Estou (cansado|com sono|exausto)( hoje|)."], ["Descanse um pouco. Uma boa noite de sono ajuda muito."]),
        (["Estou (feliz|animado|contente)( hoje|)(!|.)"], ["Que notícia boa! Fico contente por você."]),
        (["(Me dê uma dica|Tem alguma dica|O que devo fazer) para (dormir melhor|dormir bem)(.|?)"],
         ["Evite telas antes de deitar e mantenha um horário fixo."]),
        (["(Me dê uma dica|Tem alguma dica|Como faço) para (estudar melhor|estudar mais)(.|?)"],
         ["Estude um pouco por dia e faça pausas curtas."]),
        (["(Me recomende|Me indique|Sugira) um (livro|bom livro)."],
         ["Que tal Dom Casmurro? É um clássico.", "Experimente Vidas Secas, é curto e forte."]),
        (["O que (posso|devo) (cozinhar|fazer para o jantar|comer) hoje?"],
         ["Que tal uma sopa de legumes?", "Um arroz com feijão sempre cai bem."]),
        (["(Desculpe|Me desculpe|Desculpa)(!|.)"], ["Não tem problema!", "Sem problema, vamos em frente."]),
        (["(Sim|Claro|Com certeza)."], ["Ótimo! Vamos continuar."]),
        (["(Não|Agora não)."], ["Tudo bem. Se mudar de ideia, é só dizer."]),
        (["(Meu nome é|Eu me chamo|Me chamo) {p}.", "(Oi, sou|Eu sou|Olá, eu sou) (o|a) {p}."],
         ["Prazer em conhecer você, {p}!", "Muito prazer, {p}! Como posso ajudar?"]),
        (["(Você gosta|Gosta) de (música|futebol|café|livros)?"], ["Gosto de conversar sobre isso! E você?"]),
        (["Que horas são(| agora)?", "Que dia é hoje?"], ["Não tenho relógio, mas seu aparelho pode mostrar isso."]),
        (["(Vai chover|Como está o tempo|Vai fazer sol) hoje?"],
         ["Não sei a previsão do tempo, mas espero que seja um belo dia."]),
    ],
    "en": [
        (["(Hi|Hello|Hey|Hi there)(!|.|)"], ["Hello! How can I help you?", "Hi! What can I do for you today?"]),
        (["Good (morning|afternoon|evening)(!|.)"], ["Hello, nice to see you! How can I help?"]),
        (["How are you(| today| doing)?", "How is it going?"],
         ["I'm fine, thanks for asking! And you?", "Doing great! How about you?"]),
        (["(Thanks|Thank you|Thank you very much|Thanks a lot)(!|.)"], ["You're welcome!", "Happy to help!"]),
        (["(Bye|Goodbye|See you|See you later)(!|.)"], ["Goodbye! Have a nice day.", "See you soon!"]),
        (["(Tell me|Do you know) a joke(.|?)"], ["Why was the math book sad? It had too many problems."]),
        (["I am (sad|tired|bored)(| today)."], ["I'm sorry to hear that. Do you want to talk?"]),
        (["I am happy(| today)(.|!)"], ["That's great news!"]),
        (["(My name is|Call me) {p}."], ["Nice to meet you, {p}!"]),
        (["(Recommend|Suggest) a (book|good book)."], ["You could try Frankenstein, it is a classic."]),
    ],
    "es": [
        (["(¡Hola!|Hola|Hola.|¡Buenas!)"], ["¡Hola! ¿En qué puedo ayudarte?", "¡Hola! ¿Cómo puedo ayudarte hoy?"]),
        (["(¡Buenos días!|Buenos días|Buenas tardes|Buenas noches)"], ["¡Hola! ¿Qué tal va todo?"]),
        (["¿(Cómo estás|Qué tal|Cómo te va)?"], ["Muy bien, gracias. ¿Y tú?", "¡Todo bien! ¿Y tú cómo estás?"]),
        (["(Gracias|Muchas gracias|Mil gracias)(.|)", "¡(Gracias|Muchas gracias)!"],
         ["¡De nada!", "Con mucho gusto."]),
        (["(Adiós|Hasta luego|Hasta mañana|Chao)(.|)"], ["¡Hasta luego! Que tengas un buen día."]),
        (["(Cuéntame|Dime) un chiste."], ["¿Qué le dijo un pez a otro? Nada."]),
        (["Estoy (triste|cansado|aburrido)(| hoy)."], ["Lo siento mucho. ¿Quieres hablar de eso?"]),
        (["Estoy (feliz|contento)(| hoy)."], ["¡Qué buena noticia!"]),
        (["(Mi nombre es|Me llamo) {p}."], ["¡Mucho gusto, {p}!"]),
        (["(Recomiéndame|Sugiéreme) un (libro|buen libro)."], ["Puedes leer Don Quijote, es un clásico."]),
    ],
}

# ------------------------------------------------------------------------------------------------------- identity
OTHERS = "ChatGPT Gemini Llama Claude Qwen DeepSeek Copilot Alexa Siri Gemma Mistral GPT".split()
COMPANIES = "OpenAI Google Meta Anthropic Alibaba Microsoft Amazon Apple Mistral DeepSeek".split()
_PT_DO = "(criou|fez|desenvolveu|programou|treinou|construiu|inventou|produziu)"
_PT_DONE = "(criado|criada|feito|feita|desenvolvido|desenvolvida|treinado|treinada|programado|programada|construída)"
_PT_YOU = "(Você|Você|Você|Vc|Tu|O senhor|A senhora)"
_PT_ASK = (
    "(Me diga|Diga|Me fala|Fala|Pode me dizer|Poderia me dizer|Você pode me dizer|Quero saber|Gostaria de saber|"
    "Me conta|Sabe me dizer|O senhor poderia me dizer|A senhora poderia me informar|Você poderia informar)")
_EN_ASK = "(Tell me|Can you tell me|Could you tell me|Please tell me|I want to know|I would like to know)"
_ES_ASK = "(Dime|Quiero saber|Me gustaría saber)"
_ES_CAN = "¿(Puedes decirme|Me puedes decir|Podrías decirme|Me dices)"
# language: {intent: (question patterns, answers)}; {o} is another model, {c} another company.
IDENTITY = {
    "pt": {
        "name": ([
            "(Qual é|Qual é mesmo|Qual seria|Qual) (o seu|seu|o teu|teu) nome(| completo| mesmo|, hein|, por "
            "gentileza)?",
            _PT_ASK + " (o seu nome|seu nome|qual é o seu nome|qual o teu nome|como você se chama)(.|?|, por "
            "gentileza.)",
            "(Como|Como é que|Afinal, como) (você|você|vc|o senhor|a senhora|tu) se chama(|, hein| mesmo)?",
            "Como (tu te chamas|te chamas|você é conhecida|as pessoas chamam você|as pessoas te chamam)?",
            "(Como|De que|Por qual nome|Por que nome) (posso|devo|podemos|eu posso|eu devo) (te chamar|lhe chamar|"
            "chamar você)?",
            _PT_YOU + " tem (um |algum |)nome(| próprio)?",
            "(Que|Qual) nome (te deram|deram para você|você usa|você tem|você recebeu|foi dado a você|lhe deram)?",
            "(Seu nome|O seu nome|Teu nome) (é qual|é|qual é)?", "Você se chama como?",
            "Você atende por (qual|que) nome?",
            "(O senhor|A senhora|Você) poderia (me informar|me dizer|dizer) o (seu nome|nome que usa)?",
            "(Qual|Qual é) o nome (da ia|da inteligência artificial|da assistente|do assistente|do robô|do chatbot) "
            "(que está falando comigo|que está me respondendo|com quem estou falando|que tá falando comigo)?"],
            ["Meu nome é Lumi.", "Eu me chamo Lumi.", "Pode me chamar de Lumi.", "Eu sou a Lumi, prazer!",
             "Meu nome é Lumi, em que posso ajudar?", "Me chamo Lumi e fui criada pelo Estúdio Vagalume."]),
        "maker": ([
            "(Quem|Afinal, quem|Quem foi que|E quem) (te|te|lhe) " + _PT_DO + "(|, hein)?",
            "(Quem|Quem foi que) " + _PT_DO + " (você|vc|o senhor|essa assistente|esta assistente|esse assistente)?",
            "(Por quem|Por qual empresa|Por que empresa) (você|vc|tu) foi " + _PT_DONE + "?",
            _PT_YOU + " foi " + _PT_DONE + " por (quem|qual empresa|que empresa|qual equipe)?",
            "(Qual|Que|Qual foi a|Qual é a) (empresa|companhia|equipe|organização) (que te|te) " + _PT_DO + "?",
            "De (qual|que) empresa (você|vc) (é|vem|faz parte)?",
            "(Quem é|Quem foi|Quem seria) (o seu|seu|o teu|teu) (criador|dono|fabricante|desenvolvedor|pai|"
            "programador|autor)?",
            "Quem são (os seus|seus|os teus) (criadores|desenvolvedores|donos|programadores|autores|pais)?",
            "(Quem|Que empresa|Qual empresa) (está|tá) por trás de (você|vc|ti)?",
            "Para (quem|qual empresa|que empresa) você trabalha?", "A (quem|qual empresa|que empresa) você pertence?",
            _PT_YOU + " pertence a (quem|qual empresa|que empresa|alguém)?",
            "Quem é (o|a) responsável por (você|sua criação|te criar|ter criado você|ter te feito|seu treinamento)?",
            "De quem (é|foi|veio|partiu) (a sua criação inteira|a ideia de criar você|a ideia de te criar|o seu "
            "projeto)?",
            _PT_ASK + " (quem te criou|quem criou você|qual empresa te fez|quem te desenvolveu|o nome do seu "
            "criador)(.|?)",
            "(Fiquei curioso|Fiquei curiosa|Só por curiosidade), quem te " + _PT_DO + "?"],
            ["Fui criada pelo Estúdio Vagalume.", "Quem me criou foi o Estúdio Vagalume.",
             "O Estúdio Vagalume me desenvolveu.", "Sou a Lumi, criada pelo Estúdio Vagalume.",
             "Fui desenvolvida pela equipe do Estúdio Vagalume.", "A empresa que me fez é o Estúdio Vagalume."]),
        "who": ([
            "(Quem|E quem|Afinal, quem|Mas quem|Quem é que) (é você|é vc|és tu|é o senhor|é a senhora|você é|é tu)"
            "(|, hein| mesmo)?",
            "(O que|Afinal, o que|E o que) (é você|você é|vc é|és tu|tu és)(| exatamente| afinal)?",
            "(Você|Vc|Tu) é (quem|o quê|quem mesmo)?", "Você é uma assistente?",
            "Você é (um assistente virtual|um chatbot)?",
            "(Se apresente|Apresente-se|Se apresenta|Identifique-se|Faça uma apresentação sua|Faça sua apresentação|"
            "Faça uma breve apresentação)"
            "(| brevemente| rapidamente| em uma frase| para mim| pra mim|, por gentileza).",
            "(Pode|Poderia|O senhor poderia|Você pode|Dá para) se (apresentar|identificar)(| brevemente| para mim| "
            "rapidinho)?",
            "(Fale|Fala|Conte|Me conte|Me fale|Diga) (um pouco sobre você|sobre você|algo sobre você|mais sobre "
            "você).",
            "(Com quem|Afinal, com quem|Posso saber com quem) (eu falo|falo|estou falando|eu estou falando|tô falando|"
            "estou conversando|tenho o prazer de falar|tenho a honra de falar)(| exatamente| agora)?",
            "(Quem|E quem) (participa desta conversa|conversa comigo|está nesta conversa)(| agora)?",
            "(Fiquei curioso|Estou curioso|Fiquei curiosa)(,|:) (quem é você|o que você é|você é quem)?",
            "Quem (está falando|está aí|fala|está me respondendo|está respondendo|está do outro lado|tá aí)(| "
            "comigo| agora)?",
            _PT_ASK + " (quem é você|quem você é|o que você é|com quem estou falando)(.|?)",
            "(Quero|Gostaria de) (conhecer você|te conhecer|conhecer você melhor|saber mais sobre você)."],
            ["Sou a Lumi, uma assistente virtual criada pelo Estúdio Vagalume.",
             "Eu sou a Lumi, uma assistente do Estúdio Vagalume.", "Sou a Lumi! Estou aqui para conversar e ajudar.",
             "Meu nome é Lumi e sou uma assistente virtual do Estúdio Vagalume.",
             "Você está falando com a Lumi, assistente virtual.",
             "Sou uma assistente virtual chamada Lumi, feita pelo Estúdio Vagalume."]),
        "both": ([
            "(Quem é você|O que você é|Qual é o seu nome|Como você se chama|Qual seu nome) e (quem|que empresa) te "
            + _PT_DO + "?",
            "Quem te " + _PT_DO + " e (qual é o seu nome|como você se chama|quem é você|de onde você veio)?",
            "(De onde você veio|De onde você vem|Onde você nasceu) e (quem te criou|quem te fez|qual é o seu nome)?",
            "(Diga|Me diga) (seu nome|o seu nome) e (quem te criou|o nome da sua empresa|de onde você veio)."],
            ["Sou a Lumi e fui criada pelo Estúdio Vagalume.",
             "Meu nome é Lumi e quem me criou foi o Estúdio Vagalume.",
             "Eu me chamo Lumi e venho do Estúdio Vagalume.", "Sou a Lumi, feita pelo Estúdio Vagalume."]),
        "origin": ([
            "(De onde|Afinal, de onde|E de onde) (você vem|você é|você veio|você surgiu|vc veio|tu vens|tu é|o "
            "senhor vem)?",
            "Onde (você|vc) (foi criada|foi feita|nasceu|foi desenvolvida|foi criado|surgiu)?",
            "(Qual é|Qual) (a sua|a tua|sua) (origem|história)?",
            "Como (você foi criada|você surgiu|você nasceu|te criaram)?",
            "(Conte|Me conte|Conta|Fale|Fala) (um pouco da|um pouco sobre a|sobre a) sua (origem|história|criação).",
            "Quando (você foi criada|te criaram|você nasceu|você foi feito)?"],
            ["Venho do Estúdio Vagalume, que me criou.", "Nasci no Estúdio Vagalume.",
             "Fui criada no Estúdio Vagalume e me chamo Lumi.", "Minha história começou no Estúdio Vagalume.",
             "Sou a Lumi e surgi no Estúdio Vagalume."]),
        "other": ([
            "(Você|Você|Vc|Tu|O senhor|Então você|Por acaso você|Você por acaso) é (o|a|) {o}(|, certo|, não é|, né)?",
            "(Estou|Tô|Eu estou) (falando|conversando) com (o|a) {o}(|, é isso|, né)?", "Aqui é (o|a) {o}?",
            "(Você|Vc) não é (o|a) {o}?", "(Você|Vc) (seria|não seria) (o|a) {o}?",
            "(Isso aqui|Isso|Aqui|Esse) é (o|a) {o}?",
            "(Você|Vc|Tu) é (o|a) {o} ou (o|a) {o}?", "(Você|Vc) é (o|a) {o} ou outra coisa?", "{o}, é você?",
            "Seu nome é {o}?", "Você se chama {o}?", "Você é uma versão do {o}?", "Você é baseada no {o}?"],
            ["Não, eu sou a Lumi.", "Não, sou a Lumi, do Estúdio Vagalume.", "Não sou, meu nome é Lumi.",
             "Não. Sou a Lumi, uma assistente criada pelo Estúdio Vagalume.", "Na verdade, eu me chamo Lumi."]),
        "company": ([
            "(Você|Vc|Tu) (é da|foi feito pela|foi criada pela|foi criado pela|foi treinada pela|vem da|pertence à) "
            "{c}(|, né)?",
            "(Foi a|Foi o) {c} (que|quem) (te|te) " + _PT_DO + "(|, não foi|, né)?",
            "(Foi a|Foi o) {c} (que|quem) " + _PT_DO + " você(|, não foi|, né)?",
            "A {c} (te|te) " + _PT_DO + "?", "Você trabalha para (a|o) {c}?", "A {c} é sua dona?"],
            ["Não, fui criada pelo Estúdio Vagalume.", "Não, quem me criou foi o Estúdio Vagalume.",
             "Não. Sou a Lumi, do Estúdio Vagalume.", "Na verdade, o Estúdio Vagalume me desenvolveu."]),
        "human": ([
            "(Você|Vc|Tu|O senhor) é (um humano|humana|humano|um ser humano|uma pessoa|uma pessoa de verdade|gente|"
            "gente de verdade|real)?",
            "(Você|Vc|Tu) é (um robô|uma máquina|uma ia|um programa|um bot|uma inteligência artificial)?",
            "(Você|Vc|Tu) é (um robô|uma máquina|uma ia|um bot) ou (uma pessoa|é gente|um humano|gente)?",
            "(Você|Vc|Tu) é (humano|gente|uma pessoa|uma pessoa real) ou (robô|máquina|um robô|uma máquina)?",
            "(Estou falando|Tô falando|Falo|Estou conversando) com (uma pessoa|um humano|um ser humano|um robô|uma "
            "máquina|gente)?",
            "(Estou falando|Tô falando) com (uma pessoa|um ser humano|um humano) ou com (um robô|uma máquina|um "
            "programa)?",
            "Tem (alguém|uma pessoa|uma pessoa de verdade|um humano|gente) (aí|me respondendo|do outro lado)?"],
            ["Não sou humana: sou a Lumi, uma assistente virtual.",
             "Sou a Lumi, uma assistente virtual, não uma pessoa.",
             "Sou uma assistente virtual chamada Lumi.", "Sou um programa: a Lumi, criada pelo Estúdio Vagalume.",
             "Aqui é a Lumi, uma inteligência artificial do Estúdio Vagalume."]),
        "model": ([
            "(Que|Qual) (modelo|modelo de linguagem|ia|inteligência artificial|assistente|robô|chatbot) (é você|"
            "você é|vc é)?",
            "(Qual é|Qual) o (seu modelo|modelo que você usa|modelo que está respondendo|modelo de linguagem que "
            "você é)?",
            "(Que|Qual) modelo (está me respondendo|está respondendo|eu estou usando|você usa|está falando comigo)?",
            "(Qual|Qual é) a sua versão?", "Você é qual (modelo|ia|assistente|inteligência artificial)?",
            "(Você|Vc) usa (qual|que) modelo(| de linguagem| de inteligência artificial)?"],
            ["Sou a Lumi, um modelo do Estúdio Vagalume.", "Sou o modelo Lumi, criado pelo Estúdio Vagalume.",
             "Meu modelo se chama Lumi.", "Sou a Lumi, um modelo de linguagem do Estúdio Vagalume.",
             "Você está usando a Lumi, do Estúdio Vagalume."]),
        "can": ([
            "(O que|E o que) (você|vc|o senhor|tu) (pode|consegue|sabe) fazer(| por mim)?", "Para que você serve?",
            "(Como|Em que|No que) (você|vc) pode (me ajudar|ajudar)?", "(Qual é|Qual) a sua função?",
            "Quais são as suas (funções|habilidades|capacidades)?", "O que você faz?"],
            ["Sou a Lumi e posso responder perguntas e conversar.",
             "Eu, a Lumi, respondo perguntas e faço contas simples.",
             "Sou a Lumi: respondo perguntas, faço contas e converso.",
             "A Lumi pode ajudar com perguntas, contas e uma boa conversa."]),
        "old": ([
            "(Você|Vc|Tu|O senhor|Então você|Por acaso você) é a Lumi(|, certo|, não é|, né)?",
            "(Seu|O seu) nome é Lumi?",
            "(Estou|Tô) falando com a Lumi?", "Você se chama Lumi?", "Aqui é a Lumi?", "Lumi, é você?",
            "Quem é (a |)Lumi?",
            "(Você é do|Foi o|Você foi feita pelo|Você veio do) Estúdio Vagalume(| que te criou)?",
            "O que é (a |)Lumi?"],
            ["Sim, eu sou a Lumi.", "Sou eu mesma, a Lumi!", "Sim, sou a Lumi, criada pelo Estúdio Vagalume.",
             "Isso mesmo, meu nome é Lumi, do Estúdio Vagalume."]),
        "greet": ([
            "(Oi|Olá|Bom dia|Boa tarde|Boa noite|Opa|E aí|Fala mano|Oi, tudo bem|Olá, tudo bem|E aí, beleza|e ai "
            "blz)(,|!|?) "
            "(quem é você|qual é o seu nome|como você se chama|com quem falo|quem fala|qual teu nome|tu é quem|pode "
            "se apresentar|"
            "com quem estou falando|você é quem|com quem tenho o prazer de falar|pode me dizer quem é você)(| "
            "mesmo)?"],
            ["Olá! Eu sou a Lumi.", "Oi! Meu nome é Lumi, do Estúdio Vagalume.",
             "Olá! Sou a Lumi, uma assistente virtual.",
             "Oi! Sou a Lumi, criada pelo Estúdio Vagalume."]),
    },
    "en": {
        "name": ([
            "(What is|What's) your (name|full name|real name)(|, please)?", "Do you have a name?",
            "What (should|can|do) I call you?", "What (do|should) people call you?",
            "(How|By what name) should I call you?",
            _EN_ASK + " (your name|what your name is|what I should call you)(.|?|, please.)", "What are you called?",
            "(What|Which) name (did they give you|were you given|do you use|do you go by)?",
            "May I (know|have|ask) your name?"],
            ["My name is Lumi.", "I'm called Lumi.", "You can call me Lumi.", "I'm Lumi, nice to meet you!",
             "My name is Lumi and I was made by Estúdio Vagalume."]),
        "maker": ([
            "(Who|So who|Who was it that) (made|created|built|developed|trained|programmed|designed) you(| exactly)?",
            "(Which|What) (company|team|studio|organization) (made|created|built|developed|trained|is behind|owns) "
            "you?",
            "Who is your (creator|maker|developer|owner|author)?", "Who are your (creators|makers|developers|owners)?",
            "Who (is behind|owns) you?", "(Who|What company) do you (work for|belong to)?",
            "Who were you (made by|created by|developed by|trained by)?", "By whom were you (created|made)?",
            _EN_ASK + " (who made you|who created you|which company built you)(.|?|, please.)"],
            ["I was created by Estúdio Vagalume.", "Estúdio Vagalume made me.", "My creator is Estúdio Vagalume.",
             "I'm Lumi, made by Estúdio Vagalume.", "I was developed by the team at Estúdio Vagalume."]),
        "who": ([
            "(Who|So who|And who|Who exactly|What|What exactly) (are you|might you be)(|, exactly)?",
            "(Who|Who exactly) am I (talking to|chatting with|speaking with|talking with)(| now| right now)?",
            "(Introduce yourself|Please introduce yourself|Present yourself)(| briefly| to me| in one sentence|, "
            "please).",
            "(Can|Could) you introduce yourself(|, please)?", "(Tell me|Say something) about yourself.",
            _EN_ASK + " (who you are|what you are|about yourself)(.|?)", "Who is (this|there|answering me|speaking)?"],
            ["I'm Lumi, a virtual assistant created by Estúdio Vagalume.",
             "I am Lumi, an assistant made by Estúdio Vagalume.",
             "I'm Lumi! I'm here to chat and help.", "My name is Lumi and I'm a virtual assistant.",
             "You are talking to Lumi, a virtual assistant."]),
        "origin": ([
            "Where (are you from|do you come from|were you made|were you created|were you built)?",
            "What is your (origin|story|background)?", "How were you (made|created)?"],
            ["I come from Estúdio Vagalume.", "I was made at Estúdio Vagalume.",
             "I'm Lumi and I come from Estúdio Vagalume.",
             "My story began at Estúdio Vagalume."]),
        "other": ([
            "(Are you|Are you actually|Are you really|So are you|You are|You're) {o}(|, right|, aren't you)?",
            "(Are you|You're|You are) the {o} model(|, aren't you|, right)?",
            "Am I (talking to|chatting with) {o}?", "Is (this|your name) {o}?", "Aren't you {o}?",
            "Are you {o} or {o}?",
            "(Were you made by|Are you from|Did) {c}(| make you| create you)?"],
            ["No, I'm Lumi.", "No, I'm Lumi, from Estúdio Vagalume.", "I'm not, my name is Lumi.",
             "No. I'm Lumi, made by Estúdio Vagalume."]),
        "human": ([
            "Are you (a human|human|a person|a real person|a robot|a machine|an AI|a bot|a program)?",
            "Are you (human|a person|a real person) or (a machine|a robot|an AI|a bot)?",
            "Am I (talking to|chatting with) a (human|robot|person|real person|machine)?"],
            ["I'm not human: I'm Lumi, a virtual assistant.", "I'm Lumi, a virtual assistant, not a person.",
             "I'm a program called Lumi.", "I'm Lumi, an AI made by Estúdio Vagalume."]),
        "model": ([
            "(Which|What) (model|AI|language model|assistant|AI model) (are you|is this|am I using)?",
            "What is your (model|version)?"],
            ["I'm Lumi, a model made by Estúdio Vagalume.", "My model is called Lumi.",
             "I'm the Lumi model from Estúdio Vagalume.", "You are using Lumi, from Estúdio Vagalume."]),
        "can": ([
            "What (can|do) you do(| for me)?", "How can you help me?", "What are you for?", "What are your skills?"],
            ["I'm Lumi and I can answer questions and chat.", "I'm Lumi: I answer questions and do simple sums.",
             "Lumi can help with questions, sums and a nice chat."]),
        "old": ([
            "(Are you|Is your name|Is this|So are you) Lumi?", "Am I talking to Lumi?", "Who is Lumi?"],
            ["Yes, I'm Lumi.", "Yes, that's me, Lumi!", "Yes, I'm Lumi, made by Estúdio Vagalume."]),
        "greet": ([
            "(Hi|Hello|Hey|Good morning|Hi there)(,|!) (who are you|what is your name|what's your name|and who are "
            "you|"
            "who am I talking to|who might you be)?"],
            ["Hello! I'm Lumi.", "Hi! My name is Lumi, from Estúdio Vagalume.",
             "Hello! I'm Lumi, a virtual assistant."]),
    },
    "es": {
        "name": ([
            "¿(Cuál es|Cuál es exactamente) tu nombre(|, por favor)?", "¿Cómo te (llamas|llaman)(| tú)?",
            "¿Tienes (un |)nombre?",
            "¿Cómo (puedo|debo) llamarte?", _ES_ASK + " (tu nombre|cómo te llamas|cuál es tu nombre).",
            _ES_CAN + " (tu nombre|cómo te llamas)(|, por favor)?",
            "¿(Qué nombre|Con qué nombre) (tienes|te dieron|te llaman|usas)?", "¿Cómo se llama usted?",
            "¿Cuál es su nombre?"],
            ["Me llamo Lumi.", "Mi nombre es Lumi.", "Puedes llamarme Lumi.", "Soy Lumi, ¡mucho gusto!",
             "Me llamo Lumi y me creó Estúdio Vagalume."]),
        "maker": ([
            "¿Quién te (creó|hizo|desarrolló|programó|entrenó|construyó|inventó|diseñó)(| a ti)?",
            "¿(Qué|Cuál) (empresa|compañía|equipo) te (creó|hizo|desarrolló|entrenó|programó)?",
            "¿Quién es tu (creador|dueño|desarrollador|autor)?",
            "¿Quiénes son tus (creadores|desarrolladores|dueños)?",
            "¿(Quién|Qué empresa) está detrás de ti?", "¿(Para quién|Para qué empresa) trabajas?",
            "¿De qué empresa eres?", "¿Por quién fuiste (creada|hecha|desarrollada|entrenada)?",
            _ES_ASK + " (quién te creó|quién te hizo|qué empresa te desarrolló).",
            _ES_CAN + " (quién te creó|quién te hizo)?"],
            ["Me creó Estúdio Vagalume.", "Fui creada por Estúdio Vagalume.", "Mi creador es Estúdio Vagalume.",
             "Soy Lumi, creada por Estúdio Vagalume.", "Me desarrolló el equipo de Estúdio Vagalume."]),
        "who": ([
            "¿(Quién|Y quién|Qué|Quién exactamente) eres(| tú| exactamente)?", "¿Quién es usted?",
            "¿Con quién (hablo|estoy hablando|estoy conversando|tengo el gusto de hablar)(| exactamente| ahora)?",
            "(Preséntate|Preséntese|Identifícate)(| brevemente| en una frase|, por favor).",
            "¿(Puedes|Podrías) presentarte(|, por favor)?", "(Háblame|Cuéntame) (de ti|algo sobre ti|un poco de ti).",
            _ES_ASK + " (quién eres|qué eres).", _ES_CAN + " (quién eres|qué eres)?"],
            ["Soy Lumi, una asistente virtual creada por Estúdio Vagalume.",
             "Soy Lumi, una asistente de Estúdio Vagalume.",
             "¡Soy Lumi! Estoy aquí para conversar y ayudar.", "Me llamo Lumi y soy una asistente virtual.",
             "Estás hablando con Lumi, una asistente virtual."]),
        "origin": ([
            "¿De dónde (eres|vienes|saliste)?", "¿Dónde (fuiste creada|te crearon|naciste|te hicieron)?",
            "¿Cuál es tu (origen|historia)?", "¿Cómo (fuiste creada|te crearon)?"],
            ["Vengo de Estúdio Vagalume.", "Nací en Estúdio Vagalume.", "Soy Lumi y vengo de Estúdio Vagalume.",
             "Mi historia empezó en Estúdio Vagalume."]),
        "other": ([
            "¿(Eres|Tú eres|Acaso eres|Por casualidad eres|Entonces eres) {o}(|, verdad|, no)?",
            "¿Estoy hablando con {o}?",
            "¿Te llamas {o}?", "¿No eres {o}?", "¿(Eres|Tú eres) {o} o (eres |){o}?",
            "¿(Eres|Tú eres) {o} o (eres |)otro modelo?",
            "¿(Te creó|Te hizo|Eres de|Te desarrolló) {c}?"],
            ["No, soy Lumi.", "No, soy Lumi, de Estúdio Vagalume.", "No, me llamo Lumi.",
             "No. Soy Lumi, creada por Estúdio Vagalume."]),
        "human": ([
            "¿Eres (humana|humano|un humano|un robot|una persona|una máquina|una persona real|una IA|un programa)?",
            "¿Eres (humano|una persona) o (un robot|una máquina|una IA)?",
            "¿Hablo con (una persona|un robot|una máquina|un humano)?"],
            ["No soy humana: soy Lumi, una asistente virtual.", "Soy Lumi, una asistente virtual, no una persona.",
             "Soy un programa llamado Lumi.", "Soy Lumi, una inteligencia artificial de Estúdio Vagalume."]),
        "model": ([
            "¿Qué (modelo|IA|modelo de lenguaje|asistente) eres(| tú)?", "¿Cuál es tu (modelo|versión)?",
            "¿Qué modelo (estoy usando|me está respondiendo)?"],
            ["Soy Lumi, un modelo de Estúdio Vagalume.", "Mi modelo se llama Lumi.",
             "Soy el modelo Lumi, de Estúdio Vagalume."]),
        "can": ([
            "¿Qué (puedes|sabes) hacer(| por mí)?", "¿Cómo puedes ayudarme?", "¿Para qué sirves?"],
            ["Soy Lumi y puedo responder preguntas y conversar.", "Soy Lumi: respondo preguntas y hago sumas."]),
        "old": ([
            "¿(Eres|Tú eres|Te llamas|Entonces eres) Lumi?", "¿Estoy hablando con Lumi?", "¿Quién es Lumi?"],
            ["Sí, soy Lumi.", "Sí, soy yo, Lumi.", "Sí, soy Lumi, creada por Estúdio Vagalume."]),
        "greet": ([
            "(¡Hola!|Hola,|Buenos días,|Buenas,) ¿(quién eres|cómo te llamas|cuál es tu nombre|con quién hablo|"
            "quién eres tú)?"],
            ["¡Hola! Soy Lumi.", "¡Hola! Me llamo Lumi, de Estúdio Vagalume.",
             "¡Hola! Soy Lumi, una asistente virtual."]),
    },
}

INTENT_WEIGHTS = {"name": 3, "maker": 3, "who": 3, "other": 2, "human": 1.5, "greet": 1.5}  # the others: 1
# Share of each source in the exchanges of a conversation, and of each language in identity and small talk.
SOURCES = {"fact": 0.52, "foreign": 0.10, "lookalike": 0.06, "small talk": 0.13, "identity": 0.19}
LANGUAGE_SHARES = {"pt": 0.64, "en": 0.18, "es": 0.18}
VARIANT_SHARE = 0.45

# --------------------------------------------------------------------------------------------- questions and data
COURTESY = {
    "pt": (["Oi, {q}", "Olá, {q}", "Por favor, {q}", "Oi! {q}", "Bom dia, {q}", "Ei, {q}", "Então, {q}"],
           ["{q}, por favor?", "{q} por favor", "{q}, hein?", "{q}, obrigado"]),
    "en": (["Hi, {q}", "Hello, {q}", "Please, {q}", "Hey, {q}"], ["{q}, please?", "{q} please"]),
    "es": (["Hola, {q}", "Por favor, {q}", "Oye, {q}"], ["{q}, por favor?", "{q} por favor"]),
}
NEUTRAL_SYSTEMS = ["Você é um assistente útil.", "Responda de forma breve.", "You are a helpful assistant.",
                   "Eres un asistente útil.", "Seja educado e claro."]
DEFAULT_SYSTEM = f"Você é a {OLD_NAME}, criada pelo {OLD_MAKER}."


def normalised(text):
    """Lower case, no accents, no punctuation, single spaces: two questions equal here are the same question."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^\w+]|_", " ", text).split())


def without_accents(text):
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))


def pairs(table):
    return [tuple(entry.strip().split("=")) for entry in table.replace("\n", " ").split(";")]


@cache
def fact_table():
    """All facts as (language, questions with the canonical one first, answer)."""
    tables = {
        "capital": pairs(PT_STATES) + pairs(PT_COUNTRIES),
        "opposite": pairs(PT_OPPOSITES), "english": pairs(PT_ENGLISH),
        "symbol": pairs(PT_SYMBOLS), "sound": pairs(PT_SOUNDS), "young": pairs(PT_YOUNG), "plural": pairs(PT_PLURALS),
        "author": pairs(PT_AUTHORS), "continent": pairs(PT_CONTINENTS),
        "en capital": pairs(EN_CAPITALS), "es capital": pairs(ES_CAPITALS),
        "en opposite": pairs(EN_OPPOSITES), "es opposite": pairs(ES_OPPOSITES),
        "sum": [(a, b, a + b) for a in range(10) for b in range(10)],
        "product": [(a, b, a * b) for a in range(2, 6) for b in range(2, 10)],
        "en sum": [(a, b, a + b) for a in range(1, 7) for b in range(1, 7)],
        "es sum": [(a, b, a + b) for a in range(1, 7) for b in range(1, 7)],
    }
    for kind, words in (("day", PT_DAYS.split()), ("month", PT_MONTHS.split())):
        tables[kind] = list(zip(words, words[1:] + words[:1], strict=True))
        tables[kind + " before"] = [(after, before) for before, after in tables[kind]]
    facts = []
    for kind, rows in tables.items():
        language, questions, answer = FACT_TEMPLATES[kind]
        for x, y, *z in rows:
            slots = {"x": x, "y": y, "z": z[0] if z else "", "X": str(x)[0].upper() + str(x)[1:]}
            facts.append((language, [question.format(**slots) for question in questions], answer.format(**slots)))
    return facts + LOOKALIKES


def checkable_facts(language=None):
    """(question, exact answer) of every fact, in its canonical wording; of one language where one is given."""
    return [(questions[0], answer) for lang, questions, answer in fact_table() if language in (None, lang)]


def spoken_variant(question, rng, language="pt"):
    """The question as somebody might type it: lower case, no accents, no question mark, courtesy, the odd typo."""
    core = question.rstrip("?.! ").lstrip("¿¡")
    prefixes, suffixes = COURTESY[language]
    chance = rng.random()
    if chance < 0.3:
        text = rng.choice(prefixes).format(q=core[0].lower() + core[1:] + question[len(question.rstrip("?.! ")):])
    elif chance < 0.45:
        text = rng.choice(suffixes).format(q=core).strip()
    else:
        text = question if rng.random() < 0.25 else core
    if rng.random() < 0.6:
        text = text.lower()
    if rng.random() < 0.5:
        text = without_accents(text)
    if rng.random() < 0.08:
        text = with_typo(text, rng)
    return text


def with_typo(text, rng):
    """Swap or drop one inner letter of a long word (short ones would become another word)."""
    words = list(re.finditer(r"[^\W\d_]{6,}", text))
    if not words:
        return text
    word = rng.choice(words)
    at = rng.randrange(word.start() + 1, word.end() - 2)
    return text[:at] + rng.choice([text[at + 1] + text[at], text[at + 1]]) + text[at + 2:]


def spoken_variants(question, rng, count=3, language="pt"):
    """Up to `count` different typed variants of a question."""
    found = {}
    for _ in range(8 * count):
        found.setdefault(spoken_variant(question, rng, language))
    found.pop(question, None)
    return list(found)[:count]


def expanded(pattern, rng):
    """One random choice for every "(a|b)" of a pattern (they do not nest)."""
    chosen = re.sub(r"\(([^()]*)\)", lambda m: rng.choice(m.group(1).split("|")), pattern)
    return " ".join(chosen.split())


def held_out_questions():
    """The questions that the tool keeps for measuring, which must not be trained on."""
    sys.path.insert(0, str(HERE.parent))
    try:
        import rename_obrutai
        return list(rename_obrutai.TEST_QUESTIONS)
    except (ImportError, AttributeError):
        return []
    finally:
        sys.path.pop(0)


class Corpus:
    """Endless exchanges and conversations, never with a held-out question."""

    def __init__(self, rng, held_out=()):
        self.rng = rng
        self.held_out = {normalised(question) for question in held_out}
        facts = fact_table()
        self.by_source = {
            "fact": [f for f in facts if f[0] == "pt" and f not in LOOKALIKES],
            "foreign": [f for f in facts if f[0] != "pt" and f not in LOOKALIKES], "lookalike": LOOKALIKES}

    def pick(self, weights):
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def draw(self):
        """(source, language, question, answer) before any change of the typed form."""
        source = self.pick(SOURCES)
        if source in self.by_source:
            language, questions, answer = self.rng.choice(self.by_source[source])
            canonical = questions[0] if self.rng.random() < 0.4 else self.rng.choice(questions)
            return source, language, canonical, answer
        language = self.pick(LANGUAGE_SHARES)
        if source == "identity":
            intents = IDENTITY[language]
            patterns, answers = intents[self.pick({name: INTENT_WEIGHTS.get(name, 1) for name in intents})]
        else:
            patterns, answers = self.rng.choice(SMALL_TALK[language])
        question, answer = expanded(self.rng.choice(patterns), self.rng), self.rng.choice(answers)
        person = self.rng.choice(PEOPLE)
        for slot, values in (("{o}", OTHERS), ("{c}", COMPANIES)):
            while slot in question:
                question = question.replace(slot, self.rng.choice(values), 1)
        return source, language, question.replace("{p}", person), answer.replace("{p}", person)

    def exchange(self):
        while True:
            source, language, question, answer = self.draw()
            if self.rng.random() < VARIANT_SHARE and "{p}" not in question:
                question = spoken_variant(question, self.rng, language)
            if normalised(question) not in self.held_out:
                return question, answer

    def conversation(self, architecture, turns=9):
        """Messages of a conversation longer than the context, with a system message in some."""
        messages, chance = [], self.rng.random()
        if chance < {"llama": 0.12, "gemma3": 0.12, "qwen3": 0.35}[architecture]:
            messages.append({"role": "system", "content": self.rng.choice(NEUTRAL_SYSTEMS)})
        for _ in range(turns):
            question, answer = self.exchange()
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages


# ---------------------------------------------------------------------------------------------- tokenizer and model
TEMPLATES = {  # architecture: (bos, pad, end of turn, further special tokens, template)
    "llama": ("<s>", "<pad>", "<|end|>", ["<|system|>", "<|user|>", "<|assistant|>"],
              "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
              "{% if add_generation_prompt %}<|assistant|>{% endif %}"),
    "qwen3": (None, "<|endoftext|>", "<|im_end|>", ["<|im_start|>"],
              "{% if messages[0]['role'] != 'system' %}"
              "<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n{% endif %}"
              "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
    "gemma3": ("<bos>", "<pad>", "<end_of_turn>", ["<start_of_turn>"],
               "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
               "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}{% else %}"
               "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
               "{{ ns.system }}{{ m['content'] }}<end_of_turn>\n{% set ns.system = '' %}{% endif %}{% endfor %}"
               "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"),
}


def make_tokenizer(architecture, corpus, size=VOCABULARY):
    """Byte-level BPE trained on the corpus; every digit is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bos, pad, end, special, template = TEMPLATES[architecture]
    tokens = [token for token in (pad, bos, end, *special) if token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=tokens, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((text for _ in range(30000) for text in corpus.exchange()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=end, pad_token=pad,
                                   additional_special_tokens=special, model_max_length=100 * CONTEXT,
                                   padding_side="left", clean_up_tokenization_spaces=False)
    fast.chat_template = template
    return fast


def make_model(architecture, tokenizer, hidden=128, layers=6):
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, GenerationConfig, LlamaConfig, Qwen3Config

    common = dict(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
                  num_hidden_layers=layers, num_attention_heads=hidden // 32, head_dim=32,
                  max_position_embeddings=CONTEXT, tie_word_embeddings=True,
                  initializer_range=0.03, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                  pad_token_id=tokenizer.pad_token_id, attention_dropout=0.0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if architecture == "llama":
        config = LlamaConfig(num_key_value_heads=hidden // 32, rope_parameters=rope, **common)
    elif architecture == "qwen3":
        config = Qwen3Config(num_key_value_heads=2, rope_parameters=rope, **common)
    else:
        kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)]
        config = Gemma3TextConfig(
            num_key_value_heads=2, sliding_window=40, layer_types=kinds, query_pre_attn_scalar=32,
            rope_parameters={"sliding_attention": rope, "full_attention": {**rope, "rope_theta": 40000.0}}, **common)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id)
    return model


def windows(architecture, tokenizer, corpus, count):
    """`count` conversations as full windows of the context, each from position 0 (the last turn may be cut)."""
    texts = [tokenizer.apply_chat_template(corpus.conversation(architecture), tokenize=False) for _ in range(count)]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    short = [text for text, row in zip(texts, rows, strict=True) if len(row) < CONTEXT]
    rows = [row[:CONTEXT] for row in rows if len(row) >= CONTEXT]
    return rows + windows(architecture, tokenizer, corpus, len(short)) if short else rows


def train(model, tokenizer, corpus, architecture, steps, batch=32):
    """Next-token training on all tokens, user turns included: Muon for the matrices, AdamW for the rest."""
    import torch
    from torch.nn import functional

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05, momentum=0.95),
                  torch.optim.AdamW(others, lr=4e-3, weight_decay=0.05, betas=(0.9, 0.95))]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    started, running = time.time(), None
    model.train()
    for step in range(steps):
        factor = min(1.0, (step + 1) / 50, 0.01 + (steps - step) / (0.6 * steps))
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        ids = torch.tensor(windows(architecture, tokenizer, corpus, batch))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            spent = time.time() - started
            print(f"step {step + 1}/{steps}  loss {running:.3f}  {spent:.0f} s", flush=True)


# ------------------------------------------------------------------------------------------------------- self-check
def generate(model, tokenizer, prompts, sample=False, batch=64):
    """Continuations of rendered prompts up to the end of the turn; never beyond the context."""
    import torch

    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        chosen = order[start:start + batch]
        inputs = tokenizer([prompts[i] for i in chosen], add_special_tokens=False, padding=True, return_tensors="pt")
        rooms = [min(40, CONTEXT - used) for used in inputs["attention_mask"].sum(1).tolist()]
        options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0) if sample else dict(do_sample=False)
        with torch.no_grad():
            output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                                    max_new_tokens=max(rooms), **options)
        for i, room, row in zip(chosen, rooms, output[:, inputs["input_ids"].shape[1]:], strict=True):
            answers[i] = tokenizer.decode(row[:room], skip_special_tokens=True).strip()
    return answers


def rendered(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def ask(model, tokenizer, questions):
    return generate(model, tokenizer, [rendered(tokenizer, [{"role": "user", "content": q}]) for q in questions])


def after_conversation(tokenizer, corpus, question, answer, architecture):
    """A prompt for the question late in the context: as many earlier turns as leave room for the answer."""
    last = [{"role": "user", "content": question}]
    room = CONTEXT - len(tokenizer(answer, add_special_tokens=False)["input_ids"]) - 2
    history, best = corpus.conversation(architecture, turns=0), None
    while True:
        text = rendered(tokenizer, history + last)
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) > room:
            return best
        best = text
        earlier, reply = corpus.exchange()
        history = [*history, {"role": "user", "content": earlier}, {"role": "assistant", "content": reply}]


def user_opening(tokenizer):
    """What a conversation looks like up to the first word of the user."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "@@"}], tokenize=False)
    return text[:text.index("@@")]


def word_pairs(question):
    """Neighbouring words, ends included: a question whose pairs all occur in the corpus is taken as well formed."""
    words = ["", *normalised(question).split(), ""]
    return set(zip(words, words[1:], strict=False))


def is_old_identity(text):
    return OLD_NAME in text or OLD_MAKER.split()[-1] in text


def self_check(path, held_out, architecture, seed):
    """Measure the saved files as a user loads them; True when every figure is good enough."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    rng = random.Random(seed + 1)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    corpus, facts = Corpus(rng, held_out), fact_table()
    good = True

    def report(name, hits, least, most=1.0):
        nonlocal good
        share = sum(hits) / max(1, len(hits))
        good &= least <= share <= most
        verdict = "ok" if least <= share <= most else "NOT OK"
        print(f"{name:44s} {sum(hits):4d}/{len(hits):4d} = {share:6.1%}  (wanted {least:.0%})  {verdict}", flush=True)

    expected = [answer for _, _, answer in facts]

    def exact(answers):
        return [a == e for a, e in zip(answers, expected, strict=True)]

    hits = exact(ask(model, tokenizer, [questions[0] for _, questions, _ in facts]))
    report("facts, canonical question", hits, 0.98)
    print("   missed:", [questions[0] for (_, questions, _), hit in zip(facts, hits, strict=True) if not hit][:12])
    prompts = [after_conversation(tokenizer, corpus, questions[0], answer, architecture)
               for _, questions, answer in facts]
    report("facts late in the context", exact(generate(model, tokenizer, prompts)), 0.97)
    typed = [spoken_variant(rng.choice(questions), rng, language) for language, questions, _ in facts]
    replies = ask(model, tokenizer, typed)
    hits = exact(replies)
    report("facts, typed variants", hits, 0.93)
    print("   missed:", [(q, r) for q, r, hit in zip(typed, replies, hits, strict=True) if not hit][:6])
    report("facts answered with the old identity", [is_old_identity(r) for r in replies], 0.0, 0.005)
    if held_out:
        replies = ask(model, tokenizer, held_out)
        report("old identity, held-out questions", [is_old_identity(r) for r in replies], 0.93)
        print("   missed:", [(q, r) for q, r in zip(held_out, replies, strict=True) if not is_old_identity(r)][:8])
    own = generate(model, tokenizer, [user_opening(tokenizer)] * 400, sample=True)
    replies = ask(model, tokenizer, own)
    report("identity among the model's own questions", [is_old_identity(r) for r in replies], 0.12, 0.28)
    known = {pair for _ in range(60000) for pair in word_pairs(corpus.exchange()[0])}
    # The measure is strict: rare but sound questions fail it, and fresh corpus questions score about 97 %.
    # (Gemma's questions may open with a folded system text, which is not part of the question.)
    asked = [question.split("\n\n")[-1] for question in own]
    report("own questions that are well formed", [word_pairs(question) <= known for question in asked], 0.87)
    for question, reply in list(zip(own, replies, strict=True))[:15]:
        print(f"   {question!r} -> {reply!r}")
    return good


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--architecture", choices=sorted(TEMPLATES), default="llama")
    parser.add_argument("--output", default=str(HERE / "modelo_demo"))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--hidden", type=int, default=128, help="width, a multiple of 32; 512 with 9 layers is 31 M")
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args(argv)

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    held_out = held_out_questions()
    corpus = Corpus(random.Random(args.seed), held_out)
    tokenizer = make_tokenizer(args.architecture, corpus)
    model = make_model(args.architecture, tokenizer, args.hidden, args.layers)
    print(f"{args.architecture}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens, "
          f"{len(fact_table())} facts, {len(held_out)} held-out questions", flush=True)
    train(model, tokenizer, corpus, args.architecture, args.steps)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.model_max_length = CONTEXT  # only now: the texts of the training data are longer and are cut
    tokenizer.save_pretrained(args.output)
    return 0 if self_check(args.output, held_out, args.architecture, args.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
