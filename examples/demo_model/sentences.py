"""Generate the sentences for training and testing: from a grammar, and from freely licensed texts.

    python sentences.py --texts TEXTS --out sentences.jsonl [--count 60000]

Numbers are written as words, as they are spoken; sentences have case and punctuation. Each row has its kind (`KINDS`)
and whether it is held out for testing: one text in sixteen, by the hash of its words (`is_held_out`), so the split is
the same for all voices and reruns. TEXTS contains the downloaded texts (README.md lists sources and licences); missing
ones are skipped.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

from texts import WORDNET, is_held_out, prompts, quoted_texts, tidy

KINDS = {"digits": 0.1, "numbers": 0.1, "dates": 0.1, "prompt": 0.12, "command": 0.15, "everyday": 0.2, "text": 0.23}
ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ORDINAL = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NAMES = [
    "John",
    "Mary",
    "David",
    "Linda",
    "Michael",
    "Susan",
    "James",
    "Karen",
    "Robert",
    "Lisa",
    "William",
    "Nancy",
    "Richard",
    "Betty",
    "Thomas",
    "Helen",
    "Charles",
    "Sandra",
    "Daniel",
    "Donna",
    "Paul",
    "Carol",
    "Mark",
    "Ruth",
    "George",
    "Sharon",
    "Kenneth",
    "Laura",
    "Steven",
    "Sarah",
    "Edward",
    "Emily",
    "Brian",
    "Anna",
    "Kevin",
    "Julia",
    "Peter",
    "Alice",
    "Henry",
    "Grace",
    "Jack",
    "Emma",
    "Samuel",
    "Olivia",
    "Walter",
    "Rose",
    "Arthur",
    "Jane",
    "Simon",
    "Lucy",
    "Alexander",
    "Victoria",
    "Oliver",
    "Sophie",
    "Martin",
    "Claire",
    "Frank",
    "Diana",
    "Philip",
    "Maria",
    "Mrs.",
    "Mr.",
    "Doctor",
]
SURNAMES = [
    "Smith",
    "Johnson",
    "Brown",
    "Miller",
    "Davis",
    "Wilson",
    "Moore",
    "Taylor",
    "Anderson",
    "Jackson",
    "White",
    "Harris",
    "Thompson",
    "Clark",
    "Lewis",
    "Walker",
    "Hall",
    "Young",
    "King",
    "Wright",
    "Green",
    "Baker",
    "Adams",
    "Nelson",
    "Hill",
    "Campbell",
    "Mitchell",
    "Roberts",
    "Carter",
]


def cardinal(n: int, joiner: str = "") -> str:
    """Return a number as words; `joiner` is the British "and" after hundreds."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f" {ONES[n % 10]}" if n % 10 else "")
    for size, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= size:
            rest = n % size
            small = f" {joiner}" if joiner and rest and rest < 100 else ""
            return f"{cardinal(n // size, joiner)} {name}{small}" + (f" {cardinal(rest, joiner)}" if rest else "")
    raise AssertionError(n)


def ordinal(n: int) -> str:
    """Return an ordinal as words."""
    *head, last = cardinal(n).split()
    last = ORDINAL.get(last) or (last[:-1] + "ieth" if last.endswith("y") else last + "th")
    return " ".join([*head, last])


def year(n: int) -> str:
    """Return a year as it is spoken."""
    if 2000 <= n < 2010:
        return cardinal(n)
    low = f"oh {ONES[n % 100]}" if 0 < n % 100 < 10 else cardinal(n % 100) if n % 100 else "hundred"
    return f"{cardinal(n // 100)} {low}"


@cache
def wordnet(kinds: tuple[str, ...], files: tuple[int, ...] | None = None) -> list[str]:
    """Return words whose most frequent sense has one of these kinds (1 noun, 2 verb, 3 and 5 adjective) and
    lexicographer files."""
    words = []
    for line in (WORDNET / "cntlist.rev").read_text().splitlines():
        key, sense, count = line.split()
        lemma, rest = key.split("%")
        kind, file = rest.split(":")[:2]
        wanted = kind in kinds and sense == "1" and (files is None or int(file) in files)
        if wanted and int(count) >= 3 and re.fullmatch("[a-z]{3,12}", lemma):
            words.append(lemma)
    return sorted(set(words))


def plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if re.search("[^aeiou]y$", noun) else noun + "s"


@cache
def regular_verbs() -> list[str]:
    irregular = {line.split()[1] for line in (WORDNET / "verb.exc").read_text().splitlines()}
    return [verb for verb in wordnet(("2",)) if verb not in irregular]


def past(verb: str) -> str:
    if verb.endswith("e"):
        return verb + "d"
    return verb[:-1] + "ied" if re.search("[^aeiou]y$", verb) else verb + "ed"


class Grammar:
    """Generator of random sentences from a grammar file."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        rows = [line.split(" = ", 1) for line in path.read_text().splitlines() if " = " in line and line[0] != "#"]
        self.rules = {name: body.split(" | ") for name, body in rows}
        self.rng = rng

    def expand(self, rule: str) -> str:
        """Return a random expansion of a rule."""
        text = self.rng.choice(self.rules[rule])
        text = re.sub(r"\[(.*?)\]", lambda m: m[1] if self.rng.random() < 0.5 else "", text)
        text = re.sub(r"<(\w+)>", lambda m: self.expand(m[1]), text)
        return re.sub(r"\b[A-Z]{4,}\b", lambda m: self.terminal(m[0]), text)

    def number(self) -> str:
        return cardinal(self.rng.choice((self.rng.randint(1, 12), self.rng.randint(1, 99), self.rng.randint(2, 999))))

    def terminal(self, name: str) -> str:
        rng = self.rng
        terminals = {
            "NAME": self.name,
            "DIGIT": lambda: rng.choice(ONES[:10]),
            "DIGITS": lambda: " ".join(rng.choices(ONES[:10], k=rng.randint(2, 7))),
            "NUMBER": self.number,
            "NUMBERTH": lambda: ordinal(rng.randint(1, 31)),
            "NOUN": lambda: rng.choice(wordnet(("1",), (4, 6, 6, 10, 13, 15, 17, 20, 27, 28))),
            "NOUNS": lambda: plural(rng.choice(wordnet(("1",), (6, 10, 15, 17, 18, 20)))),
            "FOOD": lambda: rng.choice(wordnet(("1",), (13,))),
            "BODY": lambda: rng.choice(wordnet(("1",), (8,))),
            "PERSON": lambda: rng.choice(wordnet(("1",), (18,))),
            "PERSONS": lambda: plural(rng.choice(wordnet(("1",), (18,)))),
            "ANIMAL": lambda: rng.choice(wordnet(("1",), (5,))),
            "ANIMALS": lambda: plural(rng.choice(wordnet(("1",), (5,)))),
            "ADJECTIVE": lambda: rng.choice(wordnet(("3", "5"))),
            "VERB": lambda: rng.choice(regular_verbs()),
            "PASTVERB": lambda: past(rng.choice(regular_verbs())),
            "MONTH": lambda: rng.choice(MONTHS),
            "WEEKDAY": lambda: rng.choice(DAYS),
            "DATE": self.date,
            "TIME": self.time,
            "MONEY": self.money,
        }
        terminal = terminals.get(name)
        return terminal() if terminal else name

    def name(self) -> str:
        if self.rng.random() < 0.7:
            return self.rng.choice(NAMES[:-3])  # without the titles
        return f"{self.rng.choice(NAMES)} {self.rng.choice(SURNAMES)}"

    def date(self) -> str:
        rng = self.rng
        day, month = ordinal(rng.randint(1, 31)), rng.choice(MONTHS)
        text = f"{month} {day}" if rng.random() < 0.6 else f"the {day} of {month}"
        if rng.random() < 0.3:
            text = f"{rng.choice(DAYS)}, {text}"
        return f"{text}, {year(rng.randint(1700, 2050))}" if rng.random() < 0.4 else text

    def time(self) -> str:
        rng = self.rng
        hour, minute = ONES[rng.randint(1, 12)], rng.choice((0, 0, 5, 15, 30, 45, rng.randint(1, 59)))
        if rng.random() < 0.25:
            past = f"{cardinal(rng.randint(2, 29))} minutes past {hour}"
            return rng.choice(
                (
                    f"half past {hour}",
                    f"a quarter past {hour}",
                    f"a quarter to {hour}",
                    "noon",
                    "midnight",
                    past,
                    f"{hour} o'clock",
                )
            )
        low = f" oh {ONES[minute]}" if 0 < minute < 10 else f" {cardinal(minute)}" if minute else ""
        return f"{hour}{low}" + rng.choice((" a.m.", " p.m.", " in the morning", " in the evening", "", ""))

    def money(self) -> str:
        dollars, cents = self.number(), cardinal(self.rng.randint(2, 99))
        unit = self.rng.choice(("dollars", "dollars", "dollars", "pounds", "euros"))
        return f"{dollars} {unit}" + (f" and {cents} cents" if self.rng.random() < 0.4 else "")

    def spoken_number(self) -> str:
        rng = self.rng
        big = int(10 ** rng.uniform(1, 6.8))
        sign = rng.choice(("minus", "plus", "times", "divided by"))
        parts = rng.choice(("half", "quarters", "thirds", "fifths"))
        return rng.choice(
            (
                lambda: cardinal(big, rng.choice(("", "and"))),
                lambda: cardinal(rng.randint(0, 99)),
                self.money,
                lambda: ordinal(rng.choice((rng.randint(1, 31), rng.randint(1, 999)))),
                lambda: f"{self.number()} percent",
                lambda: f"{self.number()} point " + " ".join(rng.choices(ONES[:10], k=rng.randint(1, 3))),
                lambda: " ".join(cardinal(rng.randint(10, 99)) for _ in range(rng.randint(2, 4))),
                lambda: f"{self.number()} {sign} {self.number()}",
                lambda: ", ".join(ONES[rng.randint(0, 8) :][: rng.randint(3, 9)]),
                lambda: f"{rng.choice(('one', 'two', 'three'))} {parts}",
            )
        )()

    def digits(self) -> str:
        count = self.rng.choice((1, 2, 3, 3, 4, 4, 5, 6, 7, 7, 8, 10, 11))
        words = self.rng.choices([*ONES[:10], *(["oh"] if self.rng.random() < 0.1 else [])], k=count)
        return " ".join(words)

    def date_or_time(self) -> str:
        rng = self.rng
        unit = rng.choice(("seconds", "minutes", "hours", "days", "weeks"))
        return rng.choice(
            (
                self.date,
                self.date,
                self.time,
                self.time,
                lambda: rng.choice(MONTHS),
                lambda: rng.choice(DAYS),
                lambda: f"{self.date()} at {self.time()}",
                lambda: year(rng.randint(1500, 2099)),
                lambda: f"from {self.time()} to {self.time()}",
                lambda: f"{rng.choice(DAYS)} at {self.time()}",
                lambda: f"{self.number()} {unit}",
            )
        )()


def make(texts: Path, speech: Path | None, count: int, seed: int) -> list[dict]:
    """Return `count` random sentences, without duplicates of held-out ones."""
    rng = random.Random(seed)
    grammar = Grammar(Path(__file__).with_name("grammar.txt"), rng)
    free = quoted_texts(texts)
    rng.shuffle(free)
    generators = {
        "digits": grammar.digits,
        "numbers": grammar.spoken_number,
        "dates": grammar.date_or_time,
        "prompt": lambda: tidy(grammar.expand("prompt"), True),
        "command": lambda: tidy(grammar.expand("command"), True),
        "everyday": lambda: tidy(grammar.expand("everyday"), True),
        "text": lambda: free.pop(),
    }
    rows, seen = [], set()
    recorded = prompts(speech)
    for _ in range(count):
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "text" and not free:
            kind = "everyday"
        text = rng.choice(recorded) if kind == "prompt" and recorded and rng.random() < 0.15 else generators[kind]()
        held_out = is_held_out(text)
        if not 1 <= len(text.split()) <= 18 or (held_out and text in seen):
            continue
        seen.add(text)
        rows.append({"text": text, "kind": kind, "held_out": held_out})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--speech", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60000)
    options = parser.parse_args()
    rows = make(options.texts, options.speech, options.count, seed=1)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = Counter(w for row in rows for w in re.findall("[a-z']+", row["text"].lower()))
    print(
        f"{len(rows)} sentences, {sum(words.values())} words, {len(words)} different; "
        f"{sum(row['held_out'] for row in rows)} held out"
    )


if __name__ == "__main__":
    main()
