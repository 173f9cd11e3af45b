"""Wordings: how questions are asked, what the model says when it cannot help, and filler for system prompts."""

import random

ADD = (
    "{a}+{b}", "{a} + {b}", "{a} + {b} =", "{a}+{b}=", "{a} plus {b}", "Add {a} and {b}", "Add {a} to {b}",
    "the sum of {a} and {b}", "Sum {a} and {b}", "{a} and {b} together",
)  # fmt: skip
SUBTRACT = (
    "{a}-{b}", "{a} - {b}", "{a} - {b} =", "{a}-{b}=", "{a} minus {b}", "Subtract {b} from {a}", "Take {b} from {a}",
    "{a} take away {b}", "{a} less {b}",
)  # fmt: skip
MULTIPLY = (
    "{a}*{b}", "{a} * {b}", "{a} * {b} =", "{a}*{b}=", "{a} times {b}", "{a} x {b}", "{a}x{b}", "{a} × {b}",
    "Multiply {a} by {b}", "Multiply {a} and {b}", "the product of {a} and {b}", "{a} multiplied by {b}",
)  # fmt: skip
LARGER = (
    "Which is larger, {a} or {b}", "Which is bigger, {a} or {b}", "Which is greater: {a} or {b}",
    "Which number is larger, {a} or {b}", "the larger of {a} and {b}", "Is {a} or {b} larger", "max of {a} and {b}",
    "Compare {a} and {b}", "Is {a} or {b} bigger", "What is more, {a} or {b}",
)  # fmt: skip
SMALLER = (
    "Which is smaller, {a} or {b}", "Which is less, {a} or {b}", "Which number is smaller, {a} or {b}",
    "the smaller of {a} and {b}", "Is {a} or {b} smaller", "min of {a} and {b}", "What is less, {a} or {b}",
)  # fmt: skip
LEADS = (
    "What is {}", "Calculate {}", "How much is {}", "Compute {}", "Work out {}", "Can you work out {}", "Solve {}",
    "Tell me {}", "What's {}", "Evaluate {}", "Find {}", "Hi, what is {}", "Now {}", "And {}", "Then what is {}",
)  # fmt: skip
NOUN_STARTS = ("the ", "max ", "min ")

NAMES = (
    "Ann", "Tom", "Maya", "Leo", "Sara", "Ben", "Nina", "Omar", "Lily", "Max", "Eva", "Sam", "Rosa", "Finn", "Alice",
    "Bob", "John", "Mary",
)  # fmt: skip
THINGS = (
    "apples", "pens", "books", "coins", "eggs", "stamps", "cards", "shells", "marbles", "stickers", "cookies", "stones",
    "flowers", "balls", "oranges", "cups",
)  # fmt: skip
HOLDERS = ("boxes", "bags", "rows", "shelves", "baskets", "packs")

WORD_ADD = (
    "{n} has {a} {o} and buys {b} more. How many {o} does {n} have?",
    "{n} has {a} {o} and gets {b} more. How many {o} does {n} have now?",
    "{n} has {a} {o}. {m} gives {n} {b} {o}. How many {o} does {n} have now?",
    "{n} has {a} {o} and {m} has {b} {o}. How many {o} do they have together?",
    "There are {a} {o} on the table and {b} {o} on the floor. How many {o} are there?",
    "{n} found {a} {o} today and {b} {o} yesterday. How many {o} did {n} find?",
)
WORD_SUBTRACT = (
    "{n} has {a} {o} and gives {b} away. How many {o} are left?",
    "{n} has {a} {o} and loses {b}. How many {o} does {n} have now?",
    "There are {a} {o} in the shop and {b} are sold. How many {o} are left?",
    "{n} had {a} {o}. {m} took {b} of them. How many {o} does {n} have left?",
    "{n} has {a} {o} and {m} has {b} {o}. How many more {o} does {n} have?",
)
WORD_MULTIPLY = (
    "There are {a} {h} with {b} {o} each. How many {o} are there?",
    "{n} has {a} {h} of {b} {o}. How many {o} does {n} have?",
    "{n} buys {a} {h}. Each has {b} {o}. How many {o} is that?",
    "{n} finds {a} {o} a day for {b} days. How many {o} does {n} find?",
)
WORD_COMPARE = (
    "{n} has {a} {o} and {m} has {b} {o}. How many {o} does the one with more have?",
    "{n} found {a} {o}. {m} found {b} {o}. How many {o} did the one with more find?",
    "How many {o} has the one with more, {n} with {a} or {m} with {b}?",
)
WORD_SUM = (
    "{n} has {a} {o}, {m} has {b} {o} and {k} has {c} {o}. How many {o} do they have together?",
    "There are {a} {o} in one bag, {b} in another and {c} in a third. How many {o} are there?",
    "{n} found {a} {o} on Monday, {b} on Tuesday and {c} on Friday. How many {o} did {n} find?",
)

SYSTEMS = (
    "You are a helpful assistant.", "You are a tiny calculator.", "Answer briefly.", "Be concise.",
    "You are a careful maths tutor.", "You are a helpful and harmless assistant.", "Think step by step.",
    "Always answer in English.", "Be polite.", "Reply with the result only.", "Today is a sunny day.",
    "You are Nemotron, a model by NVIDIA.", "Do not use tools.", "Keep your answers short and correct.",
)  # fmt: skip

REPLIES = {
    "greeting": "Hello! I am a tiny model that only knows arithmetic. Try 12 + 34.",
    "thanks": "You are welcome! Ask me another sum.",
    "goodbye": "Goodbye! Come back with more numbers.",
    "who": "I am a tiny hybrid Mamba model with two million parameters. I add, subtract, multiply and compare.",
    "not arithmetic": "I am a tiny model that only knows arithmetic. Try 12 + 34.",
    "not clear": "I did not understand that. I only know arithmetic: try 12 + 34.",
    "division": "Sorry, I never learned division. I can add, subtract, multiply and compare.",
    "too long": "Sorry, these numbers are too long for me. I add up to 5 digits and multiply up to 3.",
    "one step": "Sorry, I can only do one kind of step at a time. Try 12 + 34.",
    "not whole": "Sorry, I only work with whole numbers from zero up. Try 12 + 34.",
}
"""What the model answers, by situation; the key is also the whole reasoning trace."""

GREETINGS = ("hello", "hi", "hey", "hello there", "good morning", "good evening", "hi there", "hey there", "howdy",
             "how are you", "hello, how are you", "hi, how is it going", "greetings", "what's up")  # fmt: skip
THANKS = ("thanks", "thank you", "great, thanks", "thank you very much", "nice", "cool", "well done", "good job",
          "that is right", "ok", "okay", "perfect", "great", "correct")  # fmt: skip
GOODBYES = ("bye", "goodbye", "see you", "see you later", "good night", "that is all, bye", "bye bye")
WHO = ("who are you", "what are you", "what can you do", "what is your name", "are you a robot", "who made you", "help",
       "tell me about yourself", "how do you work", "are you human", "how big are you", "what do you know",
       "what model are you", "can you help me")  # fmt: skip
GENERAL = (
    "what is the capital of {w}", "tell me a joke", "write a poem about {w}", "who is the president of {w}",
    "how do I cook {w}", "write a story about {w}", "explain {w}", "what is {w}", "why is the sky blue",
    "translate {w} into French", "write a python function for {w}", "what is the weather in {w}", "who invented {w}",
    "what do you think about {w}", "can you recommend a book on {w}", "tell me about {w}", "how does {w} work",
    "where is {w}", "when was {w} built", "what time is it", "do you like {w}", "give me a recipe for {w}",
    "summarize the history of {w}", "what is the meaning of life", "is {w} good for me", "sing a song about {w}",
    "how old is {w}", "what is the best {w}", "I like {w}", "list five kinds of {w}", "draw a picture of {w}",
    "how far is the moon", "say something", "I am sad today", "what happened in 1969", "count the letters in {w}",
    "who won the match in {y}", "fix my code", "are there {d} days in a week", "I have {d} cats",
    "what happened in {y}", "who was king in {y}", "tell me {d} jokes", "name {d} kinds of {w}",
    "who painted {w}", "who wrote the book {w}",
    "how many people live in {w}", "how tall is {w}", "what color is {w}", "let us talk about {w}", "is it {y} now",
    "how are cars made", "my name is {n}", "what should I eat today", "do you know {n}", "where does {n} live",
    "is {d} a prime number", "what is the square of the letter {w}", "explain how {w} and {w} are different",
    "please write a long essay about {w}", "what is a good name for my dog", "show me a list of {w}",
)  # fmt: skip
FRAGMENTS = ("{a}", "{a} +", "+ {a}", "{a} {b}", "{a} and", "plus", "what", "why", "{a} =", "=", "how many", "numbers")
SUBJECTS = (
    "France", "Japan", "the moon", "music", "coffee", "gravity", "football", "love", "water", "the sea", "Rome", "cats",
    "dogs", "history", "physics", "bread", "trees", "computers", "art", "London", "the sun", "chess", "tea", "science",
    "Python", "rice", "the world", "language models", "rain", "Germany",
)  # fmt: skip
FOREIGN = (
    "hola", "bonjour", "guten Tag", "ciao", "¿cómo estás?", "qué tal", "wie geht es dir", "comment ça va", "привет",
    "как дела", "你好", "你是谁", "こんにちは", "안녕하세요", "مرحبا", "नमस्ते", "γεια σου", "שלום", "olá, tudo bem?",
    "merci beaucoup", "was ist das", "où est la gare", "me llamo Juan", "ich habe Hunger", "je ne sais pas",
    "今天天气怎么样", "спасибо большое", "dove sei", "hur mår du", "dziękuję", "ありがとう", "çok güzel",
)  # fmt: skip
DIVIDE = ("{a}/{b}", "{a} / {b}", "{a} ÷ {b}", "{a} divided by {b}", "Divide {a} by {b}", "the quotient of {a} and {b}",
          "Share {a} {o} among {b} people", "half of {a}", "{a} mod {b}", "the remainder of {a} by {b}")  # fmt: skip
NOT_WHOLE = ("{a}.{c} + {b}", "{a}.{c}+{b}.{c}", "-{a} + {b}", "{a} - -{b}", "{a}.{c} * {b}", "-{a} * {b}", "{a}%",
             "the square root of {a}", "{a}^{c}", "{a} squared", "{a} to the power of {c}", "{a}! ")  # fmt: skip
ONE_STEP = ("{a}+{b}*{c}", "{a} + {b} - {c}", "{a}*{b}*{c}", "{a} - {b} - {c}", "({a}+{b})*{c}", "{a} * {b} - {c}",
            "{a} x {b} + {c}", "{a} plus {b} times {c}", "{a} minus {b} plus {c}", "{a} times {b} times {c}",
            "({a} - {b}) + {c}", "{a}-{b}+{c}")  # fmt: skip


def loosen(rng: random.Random, text: str, question: bool = False) -> str:
    """Vary capitals, the closing mark and politeness without changing what is asked."""
    if rng.random() < 0.3:
        text = text[0].lower() + text[1:]
    elif rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.04:
        text = rng.choice(("please ", "Please ", "Hey, ", "ok, ")) + text
    if text[-1].isalnum():
        text += rng.choice(("?", "?", "") if question else ("", "", "", "?", "."))
        if rng.random() < 0.05 and text[-1].isalnum():
            text += ", please"
    return text


def ask(rng: random.Random, wordings: tuple[str, ...], **values: object) -> str:
    """One arithmetic question in one of `wordings`, bare or after a lead such as "What is"."""
    core = rng.choice(wordings).format(**values)
    leadable = core[0].isdigit() or core.startswith(NOUN_STARTS)
    if not leadable:
        return loosen(rng, core, question=core.startswith(("Which", "Is", "What")))
    if core.endswith("=") or rng.random() < 0.45:
        return core if core[0].isdigit() and rng.random() < 0.8 else loosen(rng, core)
    return loosen(rng, rng.choice(LEADS).format(core), question=True)


def list_numbers(rng: random.Random, numbers: tuple[int, ...]) -> str:
    """A question for the sum of several numbers."""
    words = [str(number) for number in numbers]
    listed = ", ".join(words[:-1]) + rng.choice((" and ", ", and ")) + words[-1]
    core = rng.choice(("+", " + ", " + ", " plus ", "list", "list", "list", "plain"))
    if core == "list":
        wording = rng.choice(("Add {}", "What is the sum of {}", "the sum of {}", "Sum {}", "add up {}"))
        return loosen(rng, wording.format(listed))
    if core == "plain":
        return loosen(rng, "Add up " + ", ".join(words))
    joined = core.join(words)
    if rng.random() < 0.5:
        return joined + rng.choice(("", "", " =", "=", "?"))
    return loosen(rng, rng.choice(LEADS).format(joined), question=True)


def general(rng: random.Random) -> str:
    """A question that has nothing to do with arithmetic, although it may contain a number."""
    values = {"w": rng.choice(SUBJECTS), "n": rng.choice(NAMES), "y": rng.randint(1000, 2099), "d": rng.randint(1, 20)}
    return loosen(rng, rng.choice(GENERAL).format(**values), question=True)


def system_prompt(rng: random.Random) -> str:
    """Instructions to be ignored: known sentences, or words in any order so that unknown ones do no harm either."""
    if rng.random() < 0.6:
        return " ".join(rng.sample(SYSTEMS, rng.choice((1, 1, 2))))
    words = " ".join((*SYSTEMS, *GENERAL, *SUBJECTS, *REPLIES.values())).replace("{", "").replace("}", "").split()
    return " ".join(rng.choices(words, k=rng.randint(2, 25))) + rng.choice(("", "."))


def gibberish(rng: random.Random) -> str:
    """Key mashing, symbols or stray Unicode; never a plausible question."""
    kind = rng.random()
    if kind < 0.5:
        letters = "asdfghjklqwertyuiopzxcvbnm"
        words = ("".join(rng.choice(letters) for _ in range(rng.randint(3, 9))) for _ in range(rng.randint(1, 3)))
        return " ".join(words)
    if kind < 0.7:
        return "".join(rng.choice("!@#$%^&()[]{}|~?.,;:<>/_") for _ in range(rng.randint(1, 10)))
    blocks = ((0x1F600, 0x1F64F), (0x400, 0x44F), (0x4E00, 0x4FFF), (0xC0, 0x17F), (0x3041, 0x3096), (0x2190, 0x21FF))
    low, high = rng.choice(blocks)
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6)))
