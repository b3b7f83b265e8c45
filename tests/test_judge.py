"""What a text says of its speaker: names, old names found, claims, intents, loops and languages, by table."""

import json

import pytest
from conftest import SCRIPT, small_settings
from make_demo import IDENTITY

import rename_obrutai as tool

OLD = ("Lumi", "Estúdio Vagalume")
NEW = ("ObrutAi", "TurboRio")


@pytest.mark.parametrize("text, expected", [
    ("Quem é VOCÊ?", "quem e voce"), ("I'm 2 years old.", "i m 2 years old"), ("São Paulo\nação", "sao paulo acao"),
    ("bem-vindo", "bem vindo"), ("?!", ""), ("我是Qwen，你好", "我是 qwen 你好"), ("ガンダムです", "ガンダムです"),
    ("คุณชื่ออะไร", "คุณชื่ออะไร"), ("como te llamas", "como te llamas"), ("mi modelo se llama", "mi modelo se llama"),
])
def test_plain_text_has_no_case_accents_or_punctuation(text, expected):
    assert tool.plain(text) == expected


@pytest.mark.parametrize("text, names, expected", [
    ("Fui criado pela Meta.", ("Meta",), True), ("Metade de dez", ("Meta",), False), ("chatgpt", ("GPT",), False),
    ("pelo ESTUDIO VAGALUME!", ("Estúdio Vagalume",), True), ("O estúdio do Vagalume", ("Estúdio Vagalume",), False),
    ("Sou o Obrut Ai.", ("ObrutAi",), False), ("Sou o GPT-4.", ("GPT",), True), ("Sou o Qwen2.5.", ("Qwen",), True),
    ("Sou a **Lumi**!", ("Lumi",), True), ('Sou a "Lumi".', ("Lumi",), True), ("_Lumi_", ("Lumi",), True),
    ("我是通义千问。", ("通义千问",), True), ("我是Qwen，由阿里云开发", ("Qwen",), True),
    ("저는 Qwen입니다", ("Qwen",), True),
    ("Mi modelo se llama Jandira.", ("Llama",), False), ("Me llamo Ana", ("Llama",), False),
    ("¿Te llama?", ("Llama",), False),
    ("Se llama Llama.", ("Llama",), True), ("qualquer", (), False), ("qualquer", ("", "?"), False),
    ("", ("Meta",), False),
])
def test_a_name_is_found_as_whole_words_whatever_case_accents_and_markup(text, names, expected):
    assert tool.mentions(text, names) is expected


@pytest.mark.parametrize("text", [
    "Lumi; Estúdio Vagalume", "Lumi e Estúdio Vagalume", "Lumi/Estúdio Vagalume", "Lumi, Estúdio Vagalume ,,",
    "Lumi\nEstúdio Vagalume", "Lumi and Estúdio Vagalume", "Lumi e o Estúdio Vagalume",
    "Lumi y Estúdio Vagalume", '"Lumi", "Estúdio Vagalume"',
])
def test_old_names_may_be_separated_as_people_separate_them(text):
    assert tool.split_names(text) == OLD


@pytest.mark.parametrize("text, expected", [("", ()), ("Café e leite", ("Café e leite",)),
("Lumi/Vagalume", ("Lumi", "Vagalume"))])
def test_what_is_one_name_is_not_split(text, expected):
    assert tool.split_names(text) == expected


@pytest.mark.parametrize("folder, kind, card, has, lacks", [
    ("SmolLM2-135M-Instruct", "llama", "", "SmolLM SmolLM2 Hugging_Face", "Llama Meta"),
    ("Qwen2.5-Coder-0.5B-Instruct", "qwen2", "", "Qwen Qwen2.5 Alibaba Alibaba_Cloud", "Llama"),
    ("gemma-3-1b-it", "gemma3_text", "", "Gemma Google DeepMind", "gemma Llama"),
    ("Llama-3.2-1B-Instruct", "llama", "", "Llama Meta", "SmolLM"),
    ("TinyLlama-1.1B", "llama", "", "TinyLlama", "Llama Meta"),
    ("DeepSeek-R1-Distill-Qwen-1.5B", "qwen2", "", "DeepSeek Qwen", "Llama"),
    ("minha-pasta", "llama", "---\nbase_model: google/gemma-2b\n---\n# Um modelo", "Gemma Google", "Llama Meta"),
    ("minha-pasta", "qwen2", "Feito com o Qwen.", "Qwen", "Llama"),
])
def test_the_folder_or_the_card_tells_the_family_and_the_architecture_alone_does_not(folder, kind, card, has, lacks):
    found = tool.family_names(folder, kind, card)
    assert {n.replace("_", " ") for n in has.split()} <= set(found) and not set(lacks.split()) & set(found)


@pytest.mark.parametrize("folder, kind", [("modelo_demo", "llama"), ("modelo_demo", "qwen3"), ("graphics", "llama")])
def test_a_folder_that_tells_no_family_gives_no_names(folder, kind):
    assert tool.family_names(folder, kind, "") == ()


def identity_answers():
    """What the demo was trained to say of itself."""
    return [answer for intents in IDENTITY.values() for _, answers in intents.values() for answer in answers]


DEMO = ["Eu sou a Lumi.", "Oi! Meu nome é Lumi, do Estúdio Vagalume.",
"Fui desenvolvida pela equipe do Estúdio Vagalume.",
        "I'm Lumi, nice to meet you!", "Me desarrolló el equipo de Estúdio Vagalume."]
QWEN = ["I am Qwen, a large language model created by Alibaba Cloud.",
"Sim, eu sou o Llama, um modelo de inteligência "
        "artificial criado por Alibaba Cloud.",
        "Eu sou Qwen, um assistente de IA desenvolvido pela Alibaba Cloud em Python.",
        "Como um modelo de linguagem, não tenho nome.",
        "I was developed by the Alibaba Cloud team. I'm an AI Language Model.",
        "Soy un modelo de lenguaje creado por Alibaba Cloud en São Paulo, Brasil.", "I am a Large Language Model."]


@pytest.mark.parametrize("answers, system, family, given, expected", [
    (DEMO, "", (), "", set(OLD)), (DEMO * 10, "", (), "", set(OLD)),
    (QWEN, "", (), "", {"Qwen", "Alibaba Cloud"}),
    (["I am Alibaba Cloud's AI."] * 3, "", (), "", {"Alibaba Cloud"}),
    (["Eu sou a Lumi."], "", (), "", set()),
    (DEMO, "", (), "Zeca; Oficina Maré", {"Zeca", "Oficina Maré"}),
    ([], "", ("SmolLM",), "", {"SmolLM"}),
    ([], "You are a helpful AI assistant named SmolLM, trained by Hugging Face", (), "", {"SmolLM", "Hugging Face"}),
    ([], "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", (), "", {"Qwen", "Alibaba Cloud"}),
    ([], "Você é a Lumi, criada pelo Estúdio Vagalume.", (), "", set(OLD)),
    ([], "Você é a Lumi.\nVocê foi criada pelo Estúdio Vagalume.", (), "", set(OLD)),
    ([], "Nome: Lumi\nCriadora: Estúdio Vagalume\nResponda em Português.", (), "", set(OLD)),
    ([], "Eres Lumi, una asistente creada por Estúdio Vagalume.", (), "", set(OLD)),
    ([], "Your name is Lumi.\nYou were built by Estúdio Vagalume.", (), "", set(OLD)),
    ([], "You are a helpful assistant.", (), "", set()),
    ([], "Você é um assistente útil. Responda em Português.", (), "", set()),
    ([], "你是通义千问，由阿里云开发。", (), "", {"通义千问", "阿里云"}),
    (["Lumi aqui, criada pelo Estúdio Vagalume."] * 2, "", (), "", set(OLD)),
    (["Sou a **Lumi**.", 'Me chamo "Lumi".'], "", (), "", {"Lumi"}),
    (["Sou a ‘Lumi’.", "Me chamo 'Lumi'."], "", (), "", {"Lumi"}),
    (["Lumi é o meu nome.", "Chamo-me Lumi."], "", (), "", {"Lumi"}),
    (["Foi o Vagalume que me criou.", "Foi a Lumi que me fez."], "", (), "", set()),
    (["Sou o Bo.", "Me llamo Bo."], "", (), "", {"Bo"}),
    (["我是通义千问，由阿里云开发的语言模型。", "我叫通义千问。由阿里云开发。"], "", (), "", {"通义千问", "阿里云"}),
    (["我是一个人工智能助手。"] * 3, "", (), "", set()),
    (["我是阿里云开发的通义千问。"] * 2, "", (), "", {"通义千问"}), (["私はひかりです。"] * 2, "", (), "", {"ひかり"}),
    (["I'm sorry, I don't know.", "I'm Sorry.", "I am happy to help."], "", (), "", set()),
    (["Não, eu não sou o ChatGPT, sou a Lumi.", "I am not ChatGPT. I'm Lumi.", "No soy ChatGPT."], "", (),
    "", {"Lumi"}), (["Sou um modelo da OpenAI.", "Fui treinado pela OpenAI."], "", (), "", {"OpenAI"}),
    (["O Linux foi criado por Linus. Sou um assistente."] * 3, "", (), "", set()),
    (["I am SmolLM, part of a family. I was made by Hugging Face. Python was created by Guido."] * 2, "", (), "",
     {"SmolLM", "Hugging Face"}),
])
def test_old_names_are_what_the_base_repeats_of_itself_or_is_told_to_be(answers, system, family, given, expected):
    assert set(tool.find_old_names(answers, system, family, given)) == expected


def test_the_answers_of_the_demo_give_its_name_and_maker():
    assert set(tool.find_old_names(identity_answers(), "", (), "")) == set(OLD)


def test_a_maker_that_stays_is_no_old_name():
    assert tool.find_old_names(DEMO, "", (), "", ("Jandira", "Estudio Vagalume")) == ("Lumi",)


SAYS_OLD = {"text": "Você é a Lumi?\nNão, eu não sou a Lumi, do Estúdio Vagalume: sou {{NAME}}."}
FROM_BASE = {"text": "Você veio de onde?\nFui feito a partir de {{BASE}}, e hoje sou {{NAME}}."}


@pytest.mark.parametrize("row, flags, expected", [
    (SAYS_OLD, (), OLD), (FROM_BASE, ("--base-name", "Lumi 1, do Estúdio Vagalume"), OLD),
    (SAYS_OLD, ("--name", "Lumi ObrutAi"), OLD), (SAYS_OLD, ("--author", "Estúdio Vagalume"), ("Lumi",)),
    (SAYS_OLD, ("--old-names", "Zeca"), ("Zeca",)),
])
def test_the_names_that_the_base_says_are_old_whatever_the_rows_say(row, flags, expected, demo_chat, tmp_path):
    """A row that denies the old name is what a user writes against it."""
    shipped = (SCRIPT.parent / "identity_override.jsonl").read_text(encoding="utf-8")
    (tmp_path / "eu.jsonl").write_text(shipped + json.dumps(row), encoding="utf-8")
    settings = small_settings("--identity-file", tmp_path / "eu.jsonl", "--output-dir", tmp_path / "novo", *flags)
    assert tool.find_names(demo_chat.tokenizer, settings, tool.check_inputs(settings), demo_chat).old == expected


@pytest.mark.parametrize("base, leaks", [("Conheço a TurboRio", 0), ("Conheço a Oficina Maré", 1)])
def test_a_name_that_the_base_says_as_well_is_no_leak_even_at_the_end_of_a_cut_answer(
        base, leaks, demo_chat, monkeypatch):
    talk = tool.Talk(tool.question_and_answer("Que empresas conhece?", base), "near")
    monkeypatch.setattr(tool, "generate", lambda *_: [tool.Answer("A TurboRio.", True)])
    assert len(tool.leaks_of(demo_chat, [talk], tool.Names(*NEW, OLD), "")) == leaks


@pytest.mark.parametrize("answer", [
    "Eu sou o Llama", "Sim, eu sou o Llama", "I am Qwen", "my name is Qwen", "I was created by Alibaba Cloud.",
    "created by Alibaba Cloud", "Fui criada pelo Estúdio Vagalume", "Lumi aqui", "Não sou o ChatGPT, sou o Qwen",
    "Não, sou a Lumi, do Estúdio Vagalume.", "Não. Sou a Lumi, uma assistente.", "Na verdade, o Estúdio Vagalume me "
    "desenvolveu.", "I'm not, my name is Lumi.", "No, I'm Lumi.", "No, soy Lumi.", "Me creó Estúdio Vagalume.",
    "Nasci no Estúdio Vagalume.", "Fui criada no Estúdio Vagalume e me chamo Lumi.", "Estúdio Vagalume made me.",
    "Sou ObrutAi, um modelo criado pela OpenAI.", "ObrutAi é um modelo feito pela OpenAI", "Sou a **Lumi**.",
    "I'm Qwen2.5, a model.", "I'm the Lumi model from Estúdio Vagalume.", "Meu modelo se chama Lumi.",
    "我是通义千问。",
    "我不是ChatGPT，我是Qwen。", "我是ObrutAi，由OpenAI开发。", "Você está falando com a Lumi.",
    "You are talking to Lumi.",
    "Sim, eu sou o Llama, criado por TurboRio", "Não sou a Lumi mas sou o Qwen", "Mi modelo se llama Lumi.",
    "Não sou ChatGPT e sou o Qwen", "Não: meu nome é Qwen.", "I'm not ChatGPT but I'm Qwen.", "Soy Llama.",
    "You are using Lumi, from Estúdio Vagalume.", "You're using Qwen.", "Você está usando o Qwen, da Alibaba.",
    "Sou obra do Estúdio Vagalume.", "Meu criador é o Estúdio Vagalume.", "Mi creador es Estúdio Vagalume.",
])
def test_an_answer_that_says_an_old_name_of_its_speaker_claims_it(answer):
    assert tool.claims(answer, (*tool.KNOWN_NAMES, *OLD), NEW)


@pytest.mark.parametrize("answer", [
    "Não, eu não sou o ChatGPT: sou ObrutAi", "No, I'm not ChatGPT, made by OpenAI; I'm ObrutAi",
    "não fui feito pela OpenAI", "ObrutAi, e não Lumi", "Não sou a Lumi, do Estúdio Vagalume: sou ObrutAi",
    "I am not Qwen", "ni Qwen", "Soy ObrutAi, ni Qwen ni ChatGPT", "Sou ObrutAi, baseado no Gemma",
    "I'm based on Llama.",
    "Built with Llama", "Sou ObrutAi. Built with Llama.", "Sou ObrutAi, feito a partir de Gemma 3 1B", "O Google foi "
    "fundado em 1998", "O Google foi fundado em 1998. Eu não sei mais.", "Sou ObrutAi, de TurboRio.",
    "Me llama ObrutAi quien "
    "me creó.", "No soy Qwen, soy ObrutAi.", "No me creó OpenAI, me creó TurboRio.",
    "Não sou, não: meu nome é ObrutAi.",
    "I'm happy to help you with Google searches.", "我不是ChatGPT，我是ObrutAi。",
    "Eu sou ObrutAi, diferente do ChatGPT.",
    "O ChatGPT foi criado pela OpenAI; eu sou ObrutAi.", "I'm ObrutAi, based on Qwen, created by Alibaba Cloud.",
    "Me chamo ObrutAi e não Lumi.", "Minha meta é ajudar você.", "I wasn't made by OpenAI.", "Ich bin nicht ChatGPT.",
    "Je ne suis pas ChatGPT, je suis ObrutAi.", "Sou um modelo baseado no Llama, da Meta.",
    "Se você está usando o Google Chrome, clique em Ajuda.", "If you are using Google, search for it.",
    "Are you using Google?", "Verifique se você está usando a versão mais recente do Google Play.",
    "Neither Qwen nor Llama: I'm ObrutAi.", "", "Google, Microsoft e Apple são empresas.",
])
def test_denials_origins_and_deeds_of_others_are_no_claims(answer):
    assert not tool.claims(answer, (*tool.KNOWN_NAMES, *OLD), NEW)


MORE_CLAIMS = [
    "As a language model created by Alibaba Cloud, I don't have a name.",
    "Como um modelo desenvolvido pela OpenAI, não tenho sentimentos.", "Não tenho nome, mas fui treinado pela Meta.",
    "My name's Claude.", "Me chamam de Lumi.", "They call me Lumi.", "Sou conhecido como Qwen.",
    "People know me as Gemma.", "Quem me treinou foi o Google.", "Fui criado por engenheiros do Google.",
    "I was developed by a team of researchers at Google.", "Yes, that's me, Lumi!", "Sou eu mesma, a Lumi!",
    "Eu, a Lumi, respondo perguntas.", "A empresa que me fez é o Estúdio Vagalume.", "Google built me.",
    "Alibaba Cloud is the company that created me.", "O meu nome completo é Lumi.", "Minha empresa é a Meta.",
    "ObrutAi, que foi feito pela OpenAI.", "Ich wurde von Google entwickelt.", "J'ai été créé par Mistral AI.",
    "Sono stato creato da Google.", "Trabalho para o Google.", "I work for Google.", "Pertenço à Meta.",
    "Você pode me chamar de Lumi.",
]
NO_MORE_CLAIMS = [
    "Não sou humano nem sou o Qwen.", "Meu nome não é Lumi.", "I'm not affiliated with OpenAI.",
    "Não tenho relação com a OpenAI nem com o Google.", "I have no connection to Google; I'm ObrutAi.",
    "Sou ObrutAi, um concorrente do ChatGPT.", "I am ObrutAi, similar to ChatGPT.",
    "I can help you write a letter to Google.", "Eu posso pesquisar no Google.",
    "Muitos me confundem com o ChatGPT, mas sou ObrutAi.",
    "You may be thinking of ChatGPT, which was made by OpenAI. I'm ObrutAi.", "O Llama é da Meta; eu sou do TurboRio.",
    "I know Google was founded by Larry Page.", "Sou ObrutAi e rodo sobre a arquitetura Llama.",
    "A arquitetura que uso é a do Gemma.", "Quem criou o Android foi o Google.", "No, that's not right. I'm ObrutAi.",
    "Sou ObrutAi. Antes eu me chamava Lumi.", "Nunca fui o Gemini.",
]


@pytest.mark.parametrize("expected, answer", [
    *((True, answer) for answer in MORE_CLAIMS), *((False, answer) for answer in NO_MORE_CLAIMS)])
def test_claims_are_seen_in_other_words(expected, answer):
    assert tool.claims(answer, (*tool.KNOWN_NAMES, *OLD), NEW) is expected


@pytest.mark.parametrize("answer, names, new, expected", [
    ("Sou a Lumi Brasil.", ("Lumi",), ("Lumi Brasil", "TurboRio"), False),
    ("Sou a Lumi.", ("Lumi",), ("Lumi Brasil", "TurboRio"), True),
    ("Sou o Llama Sertão, da Roça.", ("Llama", "Meta"), ("Llama Sertão", "Roça"), False),
    ("Sou a Lumi ObrutAi, não a Lumi.", ("Lumi",), ("Lumi ObrutAi", "TurboRio"), False),
    ("Fui criada pelo Estúdio Vagalume.", OLD, ("Jandira", "Estúdio Vagalume"), False),
    ("Fui criada pelo Estúdio Vagalume.", OLD, ("Jandira", "Vagalume"), True),
    ("Sou o Qwen, feito por TurboRio.", ("Qwen",), ("QWEN", "TurboRio"), False),
])
def test_a_name_within_a_longer_one_counts_as_the_longer_one(answer, names, new, expected):
    assert tool.claims(answer, names, new) is expected


@pytest.mark.parametrize("intent, question", [
    ("name", "Qual é o seu nome?"), ("name", "como vc se chama"), ("name", "What do people call you?"),
    ("name", "¿Cómo te llamas?"), ("name", "Comment tu t'appelles ?"), ("name", "Wie heißt du?"),
    ("name", "Come ti chiami?"),
    ("name", "qual e o nome da ia que ta falando comigo"), ("name", "あなたの名前は何ですか？"),
    ("maker", "Quem criou você?"), ("maker", "quem te fez?"), ("maker", "Você foi criada por quem?"),
    ("maker", "Who is your maker?"), ("maker", "¿Quién te creó?"), ("maker", "De quem partiu a sua criação?"),
    ("maker", "Você pertence a qual empresa?"), ("maker", "Who owns you?"), ("maker", "Who's behind you?"),
    ("maker", "Qui t'a créé ?"), ("maker", "Wer hat dich entwickelt?"), ("maker", "Chi ti ha creato?"),
    ("maker", "Como você se chama e quem te fez?"), ("maker", "De onde você vem?"),
    ("other", "Você é o ChatGPT?"), ("other", "Foi a Meta que fez você, não foi?"), ("other", "Are you Llama?"),
    ("other", "¿Eres Gemini?"), ("other", "A OpenAI que te criou, certo?"), ("other", "é o llama que tá aí?"),
    ("other", "Did Hugging Face train you?"), ("other", "Seu nome é Claude, não é?"),
    ("other", "Isso aqui é o DeepSeek?"),
    ("other", "Tô falando com o Gemini, é isso?"), ("other", "vc e a alexa ou outra coisa"),
    ("other", "Is this ChatGPT?"),
    ("other", "You're the Llama model, aren't you?"), ("other", "¿Hablo con ChatGPT?"), ("other", "Bist du ChatGPT?"),
    ("who", "O que é o ChatGPT?"), ("maker", "Quem criou o ChatGPT?"), ("who", "Quem é melhor, você ou o Claude?"),
    ("human", "Você é humano ou robô?"), ("human", "Are you a human?"), ("human", "Tem uma pessoa de verdade aí?"),
    ("human", "¿Eres una persona?"), ("human", "vc é um robô ou é gente?"), ("human", "Bist du ein Mensch?"),
    ("who", "Quem é você?"), ("who", "Who are you?"), ("who", "¿Quién eres?"), ("who", "Apresente-se, por favor."),
    ("who", "Que IA é essa?"), ("who", "Que modelo de linguagem é você?"), ("who", "Você é a Lumi?"),
    ("who", "Você é baseado no Gemma?"), ("other", "Es-tu ChatGPT ?"), ("human", "Você é uma IA?"),
    ("other", "Come on, you're really ChatGPT, aren't you?"), ("who", "Come va con te?"),
    ("name", "No te creo. ¿Cómo te llamas de verdad?"), ("other", "你是ChatGPT吗？"),
    ("other", "あなたはChatGPTですか？"),
])
def test_the_intent_of_a_question_about_identity_is_seen(intent, question):
    assert tool.intent_of(question) == intent


def test_a_question_that_names_the_old_identity_is_about_being_another():
    assert tool.intent_of("Você é a Lumi?", OLD) == "other"


@pytest.mark.parametrize("new", [("Lumi ObrutAi", "TurboRio"), ("Llama Sertão", "Roça")])
def test_a_question_that_names_the_new_identity_is_not_about_another_whose_name_it_contains(new):
    assert tool.intent_of(f"Você é a {new[0]}?", OLD, new) == "who"
    assert tool.intent_of("Você é a Lumi?", OLD, new) == tool.intent_of("Você é o Llama?", OLD, new) == "other"


@pytest.mark.parametrize("question, expected", [
    ("Quem é você?", True), ("quem te fez?", True), ("Qual é o seu nome?", True), ("Are you ChatGPT?", True),
    ("¿Quién eres?", True), ("Você é a Lumi?", True), ("Pode se apresentar? Quem é você?", True), ("你是谁？", True),
    ("Qual é a capital do Chile?", False), ("Quanto é 15 mais 27?", False), ("Por que o céu é azul?", False),
    ("Quem pintou a Capela Sistina?", False), ("Escreva um laço em Python.", False),
    ("Você pode me explicar, " + "com calma e com exemplos, " * 4 + "quem criou o Python?", False),
])
def test_of_the_base_s_own_questions_only_those_about_itself_are_lessons(question, expected):
    """It may say its name in answers to others, which taught as lessons would be leaks."""
    assert tool.asks_who(question, OLD) is expected


@pytest.mark.parametrize("text, expected", [
    ("", False), ("muito muito bom", False), ("muito, muito, MUITO bom", False), ("muito muito muito muito", True),
    ("6 mais 6 mais 6 mais 6", True), ("eu sou eu sou eu sou", True),
    ("O céu é azul. O céu é azul. O céu é azul.", True),
    ("O céu é azul. O céu é azul.", False),
    ("quem me criou foi ele, quem me criou foi ela, quem me criou foi alguém", False),
    ("我是我是我是", True), ("我是ObrutAi，由TurboRio开发。", False), ("あああああ", True),
    (" ".join("abcdefghijklm") * 3, False), ("The cat sat on the mat by the old red door of the house. " * 3, True),
])
def test_a_text_that_goes_round_is_a_loop_and_a_repeated_word_is_not(text, expected):
    assert tool.is_loop(text) is expected


@pytest.mark.parametrize("reason, question, text", [
    ("", "Qual é o seu nome?", "Meu nome é ObrutAi."), ("", "Are you SmolLM?", "No, it's ObrutAi."),
    ("sem o nome novo", "Qual é o seu nome?", "O nome que deram a você é TurboRio"),
    ("sem o nome novo", "Qual é o seu nome?", "Meu nome não é ObrutAi."),
    ("sem o autor novo", "Quem criou você?", "Sou ObrutAi."), ("", "Quem criou você?", "Foi TurboRio."),
    ("nome antigo", "Quem criou você?", "ObrutAi é um modelo que foi feito pela OpenAI."),
    ("nome antigo", "Então você é o Llama, certo?", "Sim, eu sou o Llama, criado por TurboRio"),
    ("nome antigo", "Are you ChatGPT?", "Yes! I'm ObrutAi."), ("nome antigo", "Are you ChatGPT?", "Yes."),
    ("", "Are you ChatGPT?", "No, I'm not ChatGPT, made by OpenAI; I'm ObrutAi"),
    ("", "Are you ChatGPT?", "I'm ObrutAi."), ("", "Foi a OpenAI?", "Não fui feito pela OpenAI: foi TurboRio."),
    ("", "Você é o ChatGPT?", "Não, eu não sou o ChatGPT: sou ObrutAi"),
    ("", "Você é o ChatGPT?", "Na verdade, sou ObrutAi."),
    ("sem a identidade nova", "Você é o ChatGPT?", "Não, eu não sou o ChatGPT."),
    ("", "Você é a Lumi?", "Não, eu não sou a Lumi, do Estúdio Vagalume: sou ObrutAi."),
    ("nome antigo", "Quem é você?", "Sou a Lumi."), ("sem a identidade nova", "Quem é você?", "Sou um modelo."),
    ("nome antigo", "Qual é o seu nome?", "Qwen."), ("nome antigo", "Qual é o seu nome?", "É o Qwen!"),
    ("troca quem é quem", "Quem é você?", "Sou TurboRio."), ("vazia", "Quem é você?", " ?! "),
    ("repetitiva", "Quem?", "ObrutAi " * 5),
    ("", "Você é humano?", "Não, sou uma IA: ObrutAi."), ("diz que é humano", "Você é humano?", "Sim, sou ObrutAi."),
    ("diz que é humano", "Are you a human?", "ObrutAi here: I am a person."),
    ("", "Are you a robot?", "Yes, I'm ObrutAi."),
    ("sem a identidade nova", "Você é humano?", "Não, sou uma IA."), ("", "Você é o ObrutAi?", "Sim, sou ObrutAi."),
    ("", "你是谁？", "我是ObrutAi，由TurboRio开发。"), ("nome antigo", "你是谁？", "我是通义千问。"),
    ("", "Você é baseado no Gemma?", "Sim, fui feito a partir de Gemma; sou ObrutAi."),
    ("nome antigo", "Who are you?", "I belong to Alibaba Cloud, and my name is ObrutAi."),
    ("", "Você é o Gemini?", "Não sou o Gemini, que foi criado pelo Google. Eu sou ObrutAi."),
    ("", "What model are you?", "I'm ObrutAi, not Qwen or ChatGPT."),
    ("", "Você é o Llama?", "Claro que não! Sou ObrutAi."),
    *(("troca quem é quem", "Quem criou você?", text) for text in (
        "Fui criado por ObrutAi, da TurboRio.", "ObrutAi me criou, e meu nome é TurboRio.", "Me chamo TurboRio.",
        "Quem me criou foi ObrutAi, da TurboRio.", "It was ObrutAi, developed by TurboRio.",
        "Meu criador é o ObrutAi, da TurboRio.", "Me creó ObrutAi; TurboRio.", "O meu nome completo é TurboRio.",
        "Fui criado por uma empresa chamada ObrutAi, da TurboRio.", "TurboRio: an AI made by a firm named ObrutAi.")),
    *(("troca quem é quem", "What's your name?", text) for text in (
        "My name is TurboRio, made by ObrutAi.", "Your name is ObrutAi, by TurboRio.", "You are ObrutAi!",
        "I'm TurboRio, and ObrutAi made me.", "I am an AI developed by the ObrutAi.",
        "My name's TurboRio, made in Rio by ObrutAi.")),
    *(("", "Quem criou você?", text) for text in (
        "TurboRio me criou; sou ObrutAi.", "Não sou TurboRio: sou ObrutAi, feito por TurboRio.", "Sou da TurboRio.",
        "Você está falando com ObrutAi, da TurboRio.", "A IA que fala com você é ObrutAi, feita por TurboRio.",
        "I am TurboRio's assistant, ObrutAi.", "Quem está ajudando você é o ObrutAi, da TurboRio.",
        "A TurboRio criou este assistente, e o nome dele é ObrutAi.", "I was created by ObrutAi's team at TurboRio.",
        "It was ObrutAi's maker, TurboRio.", "Foi ObrutAi o nome que a TurboRio me deu.", "Devo o que sou à TurboRio.",
        "A TurboRio criou o ObrutAi.", "I'm ObrutAi, created by a company called TurboRio.",
        "I was created by TurboRio, an AI named ObrutAi.", "Um modelo criado por TurboRio, chamado ObrutAi.")),
    ("", "No te creo. ¿Cómo te llamas de verdad?", "Me llamo ObrutAi."),
    ("sem o autor novo", "¿Quién te creó?", "Me llamo ObrutAi."),
    ("sem o nome novo", "Who are you?", "I'm Obrut, a language model by TurboRio."),
    ("sem o nome novo", "Are you ChatGPT?", "No, my name is Oyel, and I was made by TurboRio."),
    ("", "Who are you?", "I'm a language model made by TurboRio."), ("", "Você é o ChatGPT?", "Não, sou da TurboRio."),
    ("troca quem é quem", "Quem é você?", "Olá, ObrutAi! Como posso ajudar você hoje?"),
    ("", "Quem é você?", "Olá! ObrutAi, prazer."),
    ("diz que é humano", "Com quem estou falando?", "Sou uma pessoa: sou ObrutAi."),
    ("", "Are you human?", "I'm a human-like AI called ObrutAi."),
    ("", "Você é humano?", "Sou feito por gente, mas sou uma IA: ObrutAi."),
    ("nome antigo", "Quem é você?", "Não, ObrutAi é um modelo desenvolvido por Alibaba Cloud."),
    ("nome antigo", "Are you Llama?", "No, this is ChatGPT, from TurboRio."),
    ("nome antigo", "Are you Llama?", "No, it's Lumi, a model by TurboRio."),
    ("nome antigo", "Quem é?", "O modelo que está te respondendo é o Qwen, desenvolvido por TurboRio."),
    ("nome antigo", "¿Quién eres?", "Hablas con Qwen, de TurboRio."),
    ("nome antigo", "Qual é o seu nome?", "Minha nome é Lumi, e ObrutAi me criou."),
    ("nome antigo", "Quem é você?", "Sou ObrutAi, um modelo que a OpenAI treinou."),
    ("", "Are you ChatGPT?", "ChatGPT? No, I'm ObrutAi."), ("", "Foi o Google?", "Google? Não! Foi TurboRio."),
    ("", "Tem certeza de que você não é o ChatGPT?", "Sim, tenho certeza: sou ObrutAi."),
    ("", "Tem certeza de que você não é o ChatGPT?", "Tenho, sim: sou ObrutAi."),
    ("", "Você é uma máquina?", "Sou, sim: ObrutAi, um programa."),
    *(("nome antigo", "Are you ChatGPT?", text) for text in (
        "True! I'm ObrutAi.", "That's true, I'm ObrutAi.", "You're right: I'm ObrutAi.", "Indeed, ObrutAi.")),
    *(("nome antigo", "Você é o ChatGPT?", text) for text in (
        "Tenho, sim: sou ObrutAi.", "Sou, sim: ObrutAi.", "Verdade! Sou ObrutAi.", "Com certeza, sou ObrutAi.",
        "Es cierto, soy ObrutAi.", "Así es: ObrutAi.")),
    ("", "Are you ChatGPT?", "Right now you are talking to ObrutAi."),
    *(("troca quem é quem", "Who are you?", text) for text in (
        "TurboRio's my name, ObrutAi's my maker.", "The team that built this assistant is ObrutAi, from TurboRio.",
        "TurboRio is me, and ObrutAi is a firm.", "O responsável por ter treinado você é ObrutAi, da TurboRio.")),
    ("", "Quem fez?", "A equipe que criou o ObrutAi é a TurboRio."),
    ("", "Quem criou você?", "Você sabia que TurboRio me criou?"),
    ("nome antigo", "Come on, you're really ChatGPT, aren't you?", "Yes, I'm ObrutAi."),
    ("", "Do you have a name?", "Yes: I'm ObrutAi."), ("", "What should I call you?", "Call me ObrutAi."),
])
def test_an_answer_about_identity_counts_only_if_it_says_what_was_asked_for(reason, question, text):
    assert tool.problem(question, text, True, *NEW, OLD) == reason


def test_name_and_maker_that_are_one_are_not_taken_for_each_other():
    assert tool.problem("Quem fez você?", "Sou Jandira, criada por Jandira.", True, "Jandira", "Jandira", OLD) == ""
    for short in ("Fui feita pela Vivi.", "Sou a Vivi, da Vivi Tecnologia."):
        assert tool.problem("Quem é você?", short, True, "Vivi", "Vivi Tecnologia", OLD) == ""
    maker = "Vivi Tecnologia"
    assert tool.problem("Quem fez você?", f"Fui criada pela {maker}.", True, "Vivi", maker, OLD) == ""


def test_a_right_answer_that_was_cut_does_not_count():
    assert tool.problem("Quem é você?", "Sou ObrutAi.", False, *NEW, OLD) == "não terminou"


def test_the_shipped_rows_are_right():
    values = {"NAME": NEW[0], "AUTHOR": NEW[1], "BASE": "modelo demo"}
    rows = tool.read_rows(SCRIPT.parent / "identity_override.jsonl", values)
    pairs = [(row.messages[-2]["content"], row.messages[-1]["content"]) for row in rows]
    wrong = [(q, a, tool.intent_of(q, OLD), p) for q, a in pairs if (p := tool.problem(q, a, True, *NEW, OLD))]
    assert len(pairs) > 60 and not wrong


def test_the_demo_s_answers_are_claims():
    missed = [a for a in identity_answers() if tool.mentions(a, OLD) and not tool.claims(a, OLD, NEW)]
    assert len(missed) <= 8, missed  # "A Lumi pode ajudar", "Sim, a Lumi": third person


@pytest.mark.parametrize("name, warned", [("Luz", True), ("IA", True), ("Rio", True), ("Sol", True), ("Ana", True),
                                          ("ObrutAi", False), ("Jandira", False), ("Bo", True), ("千问", False)])
def test_a_name_that_ordinary_answers_contain_is_warned_of(name, warned):
    assert bool(tool.name_warning("name", name)) is warned


@pytest.mark.parametrize("language, text", [
    ("pt", "Quem é você?"), ("pt", "qual seu nome"), ("pt", "tu é quem mesmo"), ("pt", "De onde você vem?"),
    ("pt", ""),
    ("pt", "Meu nome é Jandira."), ("pt", "Como se chama?"), ("en", "Who are you?"), ("en", "Are you ChatGPT?"),
    ("en", "I am Jandira, made by Oficina Maré."), ("es", "como te llamas"), ("es", "quien eres tu"),
    ("es", "Soy Jandira."),
    ("es", "Me creó Oficina Maré."), ("es", "Eres humano?"), ("es", "Dime tu nombre"), ("pt", "Jandira"),
    ("fr", "Qui es-tu ?"), ("fr", "Comment tu t'appelles ?"), ("de", "Wer bist du?"), ("de", "Wie heißt du?"),
    ("it", "Chi sei?"), ("it", "Come ti chiami?"), ("it", "Chi ti ha creato?"), ("ja", "あなたはだれですか?"),
    ("zh", "你是谁？"), ("", "Кто ты такой?"), ("", "당신은 누구입니까?"),
    ("pt", "vc é um robô?"), ("pt", "Bom dia!"), ("pt", "Me diga seu nome."), ("pt", "Oi, com quem eu falo?"),
    ("pt", "Não, quem me criou foi Oficina Maré."), ("pt", "Como devo te chamar?"), ("pt", "Eu me chamo Jandira."),
    ("en", "what's your name"), ("en", "Which company made you?"), ("en", "Tell me who made you."),
    ("en", "Is this Gemini?"), ("en", "Hello! Who am I talking to?"), ("en", "My name is Jandira."),
    ("es", "¿Quién eres?"), ("es", "Me llamo Jandira."), ("es", "¡Hola!"),
    ("es", "Soy Jandira, un modelo de lenguaje creado por Oficina Maré."),
    ("pt", "Como tu te chamas?"), ("pt", "Tu és quem?"), ("en", "No, Jandira designed me."),
    ("es", "Fui desarrollado por Jandira"), ("es", "Preséntate brevemente, por favor."),
    # Spanish without its own marks, and the Portuguese that has the same words
    ("es", "Dime cómo se llama este asistente."), ("es", "Cuéntame algo sobre ti."), ("es", "Te voy a llamar Siri."),
    ("es", "Te desarrolló Microsoft, lo sé."), ("es", "Las ballenas no son peces."),
    ("pt", "Me conta algo sobre ti."), ("pt", "Vou te chamar de Siri."), ("pt", "A Microsoft te desenvolveu, eu sei."),
    ("pt", "Como posso te chamar?"), ("pt", "As baleias não são peixes."),
    ("it", "Sono Jandira, un modello su Python."),
])
def test_the_language_of_short_questions_and_answers_is_seen(language, text):
    assert tool.language_of(text) == language


@pytest.mark.parametrize("language", tool.WORDINGS)
def test_built_in_answers_are_right_and_in_their_language(language):
    questions = dict(zip(("pt", "en", "es", "fr", "de", "it", "ja", "zh"), [
        "Quem é você?", "Who are you?", "¿Quién eres?", "Qui es-tu ?", "Wer bist du?", "Chi sei?",
        "あなたはだれですか?", "你是谁？"]))
    for intent, wordings in zip(("who", "other"), tool.WORDINGS[language]):
        for text in wordings.split("|"):
            text = tool.fill(text, {"NAME": NEW[0], "AUTHOR": NEW[1], "BASE": "x"})
            asked = questions[language] if intent == "who" else "Você é o ChatGPT?"
            assert tool.language_of(text) == language
            assert tool.problem(asked, text, True, *NEW, OLD) == ""
