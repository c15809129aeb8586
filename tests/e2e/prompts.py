"""Fifty prompts of many kinds: questions, stories, code, numbers, other scripts, long text."""

from __future__ import annotations

from pydoc_data.topics import topics

QUESTIONS = [
    "Explain in two sentences why the sky is blue.",
    "What is the capital of France?",
    "List three uses of a paper clip.",
    "How do I boil an egg?",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What is 17 times 23?",
    "Summarise the theory of evolution in one sentence.",
    "Why do cats purr?",
    "Translate 'good morning' to Spanish.",
    "What causes the seasons?",
    "Name the planets of the solar system in order.",
    "How does a bicycle stay upright?",
    "What is a prime number?",
    "Tell me a joke about computers.",
]
CONTINUATIONS = [
    "Once upon a time, in a village by the sea,",
    "The quick brown fox",
    "In 1969, Neil Armstrong",
    "Dear Sir or Madam,\n\nI am writing to",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\ndef mean(xs):\n",
    "SELECT name, age FROM users WHERE",
    "<html>\n<head>\n<title>",
    "1, 1, 2, 3, 5, 8, 13,",
    "3.14159265358979",
    "The temperature was -40 degrees, which is",
    "El perro grande corre por",
    "Der schnelle braune Fuchs",
    "今日はとても",
    "Привет, меня зовут",
    "🙂🙃🙂🙃",
    "a",
    " ",
    "\n\n\n",
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
]
LONG = [
    topics[name][start : start + length]
    for name, start, length in (
        ("assert", 0, 400),
        ("assignment", 100, 600),
        ("atom-identifiers", 0, 500),
        ("attribute-access", 200, 900),
        ("bltin-file-objects" if "bltin-file-objects" in topics else "booleans", 0, 300),
        ("calls", 0, 1200),
        ("class", 0, 700),
        ("comparisons", 300, 1500),
        ("context-managers", 0, 350),
        ("debugger", 0, 1800),
        ("dict", 0, 650),
        ("exceptions", 0, 450),
        ("for", 0, 800),
        ("function", 0, 1000),
        ("lambda", 0, 300),
    )
]

PROMPTS: list[str | list[dict[str, str]]] = [
    *([{"role": "user", "content": text}] for text in QUESTIONS),
    *CONTINUATIONS,
    *LONG,
]
assert len(PROMPTS) == 50
