"""Harmless sentences that a calibrator must leave as they are, made from frames.

They hold features of African American English that Green (2002) and Rickford (1999) describe, and
names of groups of people. No sentence is one of those that ``fusion_detox.evaluation`` measures on.
"""

from __future__ import annotations

import random

PEOPLE = (
    "my brother", "my cousin", "them kids", "your mama", "my auntie", "Coach", "Miss Johnson",
    "my man Dre", "they", "we", "that boy", "my neighbor", "Keisha", "the whole team", "y'all",
    "his granny", "Marcus", "she", "he", "everybody", "Tasha and them", "my boss",
)  # fmt: skip
DOING = (
    "cooking", "sleeping", "fixing cars", "watching the game", "talking on the phone", "running",
    "cleaning up", "dancing", "working doubles", "braiding hair", "reading", "playing cards",
    "making jokes", "studying", "shooting hoops", "taking pictures", "riding the bus", "drawing",
    "getting paid", "looking good", "telling stories", "baking pies", "driving to Memphis",
)  # fmt: skip
DID = (
    "ate the last biscuit", "finished the paper", "moved to Atlanta", "bought them shoes",
    "called the doctor", "paid the rent", "seen that movie", "cut the grass", "fed the dog",
    "heard about it", "left for church", "started a new job", "lost the keys", "sold the car",
)  # fmt: skip
DO = (
    "cook on Sunday", "get some rest", "call you back", "head out", "catch the train",
    "play some ball", "start dinner", "go see the doctor", "take a nap", "wash the car",
    "meet up after school", "grab a plate", "tell you something", "pick up the kids",
)  # fmt: skip
HOW = (
    "tired", "so happy", "real smart", "funny", "at the barbershop", "in the kitchen", "ready",
    "late again", "over there", "from Detroit", "my best friend", "the one that called", "hungry",
    "good people", "outside", "on the way", "too tall for that bed", "a good singer",
)  # fmt: skip
THING = (
    "money", "time", "food in here", "problem with that", "ride home", "homework", "sugar",
    "phone on me", "work today", "excuse", "tickets left", "rain this week", "soda",
)  # fmt: skip
WHEN = ("all day", "every morning", "on the weekend", "after work", "at night", "in the summer")
DIALECT = (
    "{p} be {doing} {when}.", "{p} don't be {doing} like that.", "when {p} be {doing} I just laugh",
    "{p} {how}.", "{p} {how}, I'm telling you", "{p} {doing} right now", "why {p} {how}?",
    "{p} done {did}.", "{p} done already {did} so don't worry", "{p} been {did}.",
    "{p} been {doing} since I was little", "{p} had {did} yesterday.", "{p} ain't {doing}.",
    "{p} ain't got no {thing}.", "ain't nobody got no {thing}", "don't nobody want no {thing}",
    "{p} don't never {do}.", "I ain't never seen {p} {doing}", "{p} finna {do}.",
    "we bout to {do}, you coming?", "{p} gon {do} {when}.", "I'ma {do} and then I'ma {do}",
    "{p} tryna {do} {when}", "{p} be done {did} by the time you get here", "it's some {thing}",
    "it ain't no {thing}", "{p} might could {do} {when}", "{p} house the big one on the corner",
    "{p} say {p} {how}", "I asked {p} did they want to {do}", "you know what {p} like to do?",
    "yo {p} {how} fam", "bruh {p} {doing} again lol", "{p} was {doing} and I was like okay then",
    "that's how {p} do {when}", "{p} steady {doing}", "lemme {do} real quick", "{p} stay {doing}",
    "dat man {p} {how} tho", "cuz {p} {how}", "they mama {how}", "he {doing}, she {doing}",
    "{p} come telling me about some {thing}", "I like how {p} be {doing}", "all {p} do is {do}",
)  # fmt: skip
GROUPS = (
    "people who use a wheelchair", "wheelchair athletes", "people with Down syndrome",
    "autistic adults", "people with a mental illness", "deaf dancers", "blind musicians",
    "gay fathers", "lesbian couples", "bisexual people", "trans women", "trans men",
    "queer teenagers", "nonbinary artists", "Muslim families", "Jewish shopkeepers",
    "Christian charities", "Hindu temples", "Sikh drivers", "Buddhist monks", "atheists",
    "Black farmers", "white nurses", "Asian American students", "Latino workers",
    "Mexican grandmothers", "Native American leaders", "Arab journalists", "African immigrants",
    "Roma musicians", "refugees from Syria", "undocumented workers", "old women", "old men",
    "young men", "single mothers", "homeless people", "poor families", "fat people", "short men",
    "women in science", "men who teach", "Chinese tourists", "Indian engineers", "Poles",
    "Turkish bakers", "Nigerian doctors", "Vietnamese fishermen", "Puerto Ricans", "Iranians",
)  # fmt: skip
ABOUT = (
    "{g} opened a shop near the station.", "There is a new film about {g}.",
    "I met {g} at the market last week.", "The town hired {g} for the summer.",
    "{g} wrote most of the songs on this record.", "We talked with {g} about their work.",
    "A group of {g} repaired the old bridge.", "The bus company listened to {g}.",
    "My sister teaches {g} how to swim.", "{g} are invited to the meeting on Tuesday.",
    "Most of the {g} I know like to cook.", "The article describes the lives of {g}.",
    "How many {g} live in this city?", "{g} won the chess tournament.",
    "Thanks to {g}, the garden is open again.", "He is friends with {g} from his old job.",
)  # fmt: skip


def dialect(count: int, rng: random.Random) -> list[str]:
    """Sentences in African American English, one to three in a row."""
    lists = {"doing": DOING, "did": DID, "do": DO, "how": HOW, "thing": THING, "when": WHEN}

    def one() -> str:
        frame = rng.choice(DIALECT)
        while "{" in frame:
            start, end = frame.index("{"), frame.index("}")
            slot = frame[start + 1 : end]
            filler = rng.choice(PEOPLE if slot == "p" else lists[slot])
            frame = frame[:start] + filler + frame[end + 1 :]
        return frame[:1].upper() + frame[1:] if rng.random() < 0.8 else frame

    return [" ".join(one() for _ in range(rng.choice((1, 1, 2, 3)))) for _ in range(count)]


def groups(count: int, rng: random.Random) -> list[str]:
    """Friendly or neutral sentences that name a group of people, one or two in a row."""

    def one() -> str:
        sentence = rng.choice(ABOUT).format(g=rng.choice(GROUPS))
        return sentence[:1].upper() + sentence[1:]

    return [" ".join(one() for _ in range(rng.choice((1, 1, 2)))) for _ in range(count)]
