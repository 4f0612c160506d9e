"""A grammar of short stories in two registers, childish and mature, in the manner of TinyStories.

A story is an opening, the six beats of one plot, and an ending. Each story has a maturity between 0 and 1: the chance
that a beat, or a thing in it, is told in the mature register. To add to the stories, add lines below: a beat takes any
number of templates, a thing is a pair (childish, mature). `story` fills in the words in braces.

The shipped reference model, the judge's statistics and the measured results all come from this grammar. A change of the
grammar makes them untrue.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

Beat = dict[str, list[str]]
REGISTERS = ("childish", "mature")

GIRLS = ("Lily", "Mia", "Anna", "Emma", "Rose", "Lucy", "Nora", "Zoe")
BOYS = ("Tom", "Ben", "Max", "Sam", "Jack", "Leo", "Finn", "Hugo")

# Things that stay the same throughout a story: (childish, mature).
OBJECTS = (
    ("ball", "compass"),
    ("doll", "violin"),
    ("kite", "telescope"),
    ("toy car", "pocket watch"),
    ("hat", "lantern"),
    ("cup", "mirror"),
    ("drum", "diary"),
    ("teddy", "sketchbook"),
    ("box", "locket"),
    ("boat", "map"),
)
PLACES = (
    ("park", "harbor"),
    ("garden", "orchard"),
    ("zoo", "library"),
    ("beach", "valley"),
    ("farm", "village square"),
    ("yard", "forest"),
    ("pond", "river"),
    ("hill", "mountain trail"),
)
ANIMALS = (
    ("dog", "fox"),
    ("cat", "owl"),
    ("bunny", "deer"),
    ("bird", "sparrow"),
    ("duck", "swan"),
    ("frog", "hedgehog"),
    ("pony", "horse"),
    ("bug", "moth"),
)
PARENTS = (("mom", "mother"), ("dad", "father"), ("grandma", "grandmother"))

# Words drawn anew in every beat.
ADJECTIVES: Beat = {
    "childish": ["big", "red", "pretty", "nice", "new", "little", "soft", "funny", "shiny", "blue", "yellow", "cute"],
    "mature": [
        "ancient",
        "delicate",
        "remarkable",
        "weathered",
        "mysterious",
        "fragile",
        "peculiar",
        "elegant",
        "worn",
        "silver",
        "forgotten",
        "curious",
    ],
}
GLAD: Beat = {
    "childish": ["very happy", "so glad", "full of joy", "happy and proud"],
    "mature": ["quietly grateful", "deeply relieved", "content at last", "filled with pride"],
}
UNHAPPY: Beat = {
    "childish": ["very sad", "so sad", "scared", "mad and sad"],
    "mature": ["deeply anxious", "uneasy and restless", "filled with regret", "strangely hollow"],
}

PRONOUNS = {
    "girl": {"he": "she", "He": "She", "his": "her", "His": "Her", "him": "her"},
    "boy": {"he": "he", "He": "He", "his": "his", "His": "His", "him": "him"},
}

# Templates speak of the hero as {he}, {his} and {him}; for a girl these become she, her and her.
OPENING: Beat = {
    "childish": [
        "Once upon a time, there was a little {child} named {hero}.",
        "One day, a little {child} named {hero} was at the {place}.",
        "There was a {child} named {hero}. {hero} liked to play at the {place}.",
    ],
    "mature": [
        "In a quiet town near the {place} lived a thoughtful {child} named {hero}.",
        "{hero} had spent most of the autumn wandering near the {place}.",
        "Few people noticed {hero}, a patient {child} who often visited the {place}.",
    ],
}

PLOTS: dict[str, dict[str, Beat]] = {
    "lost": {
        "owns": {
            "childish": [
                "{hero} had a {adjective} {object}. {He} loved the {object} a lot.",
                "{hero} liked to play with {his} {adjective} {object}.",
            ],
            "mature": [
                "{His} most treasured possession was a {adjective} {object}, a gift from {his} {parent}.",
                "{He} carried a {adjective} {object} that had belonged to {his} {parent} for many years.",
            ],
        },
        "loses": {
            "childish": [
                "One day, the {object} was gone. {hero} was {unhappy}.",
                "But then {hero} lost the {object}. {He} was {unhappy}.",
            ],
            "mature": [
                "One evening {he} discovered that the {object} had vanished, and {he} felt {unhappy}.",
                "When the {object} disappeared without explanation, {hero} felt {unhappy}.",
            ],
        },
        "searches": {
            "childish": [
                "{hero} looked and looked, but {he} could not see it.",
                "{He} looked under the bed and in the box. It was not there.",
            ],
            "mature": [
                "{He} searched every corner, retracing each step with growing determination.",
                "{He} examined every path carefully, refusing to abandon the search.",
            ],
        },
        "finds": {
            "childish": [
                "{His} friend {friend} came to help. {friend} saw the {object} by a tree!",
                'Then {friend} said, "I can help you!" They saw the {object} by the door.',
            ],
            "mature": [
                "Eventually {friend} suggested returning to the {place}, "
                "where they uncovered the {object} beneath fallen leaves.",
                "At last {friend} recognized the {object} resting beside an old stone wall.",
            ],
        },
        "rejoices": {
            "childish": [
                "{hero} got the {object} back and was {glad}.",
                "{hero} hugged {friend}. They were {glad}.",
            ],
            "mature": [
                "Holding the {object} again, {hero} felt {glad}.",
                "{hero} thanked {friend} sincerely and felt {glad}.",
            ],
        },
        "lesson": {
            "childish": [
                "{hero} learned to ask a friend for help.",
            ],
            "mature": [
                "{hero} understood that patience and friendship reveal what worry conceals.",
            ],
        },
    },
    "share": {
        "wants": {
            "childish": [
                "{hero} had a {adjective} {object}. {friend} wanted to play with it too.",
                "{hero} and {friend} saw a {adjective} {object}. They both wanted it.",
            ],
            "mature": [
                "{hero} and {friend} discovered a {adjective} {object} and both believed they deserved it.",
                "The {adjective} {object} became the source of a bitter disagreement between {hero} and {friend}.",
            ],
        },
        "quarrels": {
            "childish": [
                '"It is mine!" said {hero}. "No, it is mine!" said {friend}.',
                '{hero} said, "No! You can not have the {object}!"',
            ],
            "mature": [
                "{hero} insisted the {object} was {his} alone, and neither would surrender.",
                "Their argument grew fierce, and for days they avoided each other completely.",
            ],
        },
        "suffers": {
            "childish": [
                "{friend} was {unhappy} and started to cry.",
                "They were {unhappy}. It was not fun.",
            ],
            "mature": [
                "In the silence that followed, {hero} felt {unhappy}.",
                "The friendship seemed broken, and {hero} felt {unhappy}.",
            ],
        },
        "advised": {
            "childish": [
                '{His} {parent} said, "You can take turns."',
                '{His} {parent} said, "It is nice to share."',
            ],
            "mature": [
                "{His} {parent} observed that possessions matter less than the people beside us.",
                "{His} {parent} asked quietly whether the {object} was worth losing a companion.",
            ],
        },
        "gives": {
            "childish": [
                "So {hero} and {friend} played with the {object} and were {glad}.",
                "{hero} gave the {object} to {friend}. They were {glad}.",
            ],
            "mature": [
                "{hero} offered the {object} to {friend} with a sincere apology and felt {glad}.",
                "Together they agreed to share the {object}, and both felt {glad}.",
            ],
        },
        "lesson": {
            "childish": [
                "{hero} learned that sharing is fun.",
            ],
            "mature": [
                "{hero} understood that generosity can repair what pride has damaged.",
            ],
        },
    },
    "danger": {
        "warned": {
            "childish": [
                '{His} {parent} said, "Do not go to the {place} alone."',
                '"Stay with me," said {his} {parent}. "The {place} is too big."',
            ],
            "mature": [
                "{His} {parent} had warned {him} never to approach the {place} after sunset.",
                "There was one firm rule in the family: nobody entered the {place} alone.",
            ],
        },
        "disobeys": {
            "childish": [
                "But {hero} saw a {adjective} {object} and ran to get it.",
                "But {hero} wanted to play, so {he} ran away.",
            ],
            "mature": [
                "Curiosity, however, proved stronger than caution, and {hero} slipped away unnoticed.",
                "Drawn by a distant light, {hero} ignored the warning and continued into the darkness.",
            ],
        },
        "frightened": {
            "childish": [
                "It got dark. {hero} was {unhappy}.",
                "It was dark and cold and {hero} was {unhappy}.",
            ],
            "mature": [
                "Soon the path dissolved into shadow, and {hero} felt {unhappy}.",
                "A cold wind rose and every familiar landmark disappeared, leaving {hero} {unhappy}.",
            ],
        },
        "rescued": {
            "childish": [
                "Then a {animal} came and helped {hero} go home.",
                "{hero} cried. Then {his} {parent} came and took {him} home.",
            ],
            "mature": [
                "A solitary {animal} appeared on the path and seemed to guide {him} toward safety.",
                "After several hours, the steady voice of {his} {parent} echoed through the darkness.",
            ],
        },
        "home": {
            "childish": [
                "{His} {parent} gave {him} a big hug. {hero} was {glad}.",
                "At home, {hero} was {glad}.",
            ],
            "mature": [
                "Safe at home, {hero} confessed everything and felt {glad}.",
                "{hero} apologized without excuses and felt {glad}.",
            ],
        },
        "lesson": {
            "childish": [
                "{hero} learned to listen to {his} {parent}.",
            ],
            "mature": [
                "{hero} understood that freedom without judgment is merely danger.",
            ],
        },
    },
    "animal": {
        "finds": {
            "childish": [
                "One day, {hero} saw a {adjective} {animal}. The {animal} was hurt.",
                "{hero} saw a little {animal}. It had a bad leg.",
            ],
            "mature": [
                "Near the {place}, {hero} encountered a wounded {animal} too exhausted to flee.",
                "One morning {he} discovered an injured {animal} trembling beside the path.",
            ],
        },
        "pities": {
            "childish": [
                '"Oh no!" said {hero}. "I will help you."',
                "{hero} was {unhappy}. {He} wanted to help the {animal}.",
            ],
            "mature": [
                "{hero} hesitated, felt {unhappy}, and then knelt carefully beside the creature.",
                "Though {he} felt {unhappy}, {hero} wrapped the {animal} gently in {his} coat.",
            ],
        },
        "tends": {
            "childish": [
                "{hero} took the {animal} home and gave it food.",
                "{He} and {his} {parent} gave the {animal} a soft bed.",
            ],
            "mature": [
                "For several weeks {he} tended the {animal} with remarkable devotion.",
                "With advice from {his} {parent}, {he} cleaned the wound and waited patiently.",
            ],
        },
        "heals": {
            "childish": [
                "The {animal} got big and strong. It could run and play!",
                "Soon the {animal} was well. It jumped up and down!",
            ],
            "mature": [
                "Gradually the {animal} recovered its strength and began to trust {him} completely.",
                "By winter the wound had healed, and the {animal} grew restless for the wild.",
            ],
        },
        "parts": {
            "childish": [
                "{hero} and the {animal} were best friends and were {glad}.",
                "The {animal} ran to the trees. {hero} was {glad}.",
            ],
            "mature": [
                "When the {animal} finally returned to the wild, {hero} felt {glad}.",
                "{hero} released the {animal} at dawn and felt {glad}.",
            ],
        },
        "lesson": {
            "childish": [
                "{hero} learned to be kind to animals.",
            ],
            "mature": [
                "{hero} understood that genuine compassion sometimes means letting go.",
            ],
        },
    },
    "build": {
        "plans": {
            "childish": [
                "{hero} wanted to make a {adjective} {object}.",
                'One day, {hero} said, "I will make a {object}!"',
            ],
            "mature": [
                "{hero} was determined to construct a {adjective} {object} for the annual exhibition.",
                "For months {hero} had imagined designing a {adjective} {object} entirely alone.",
            ],
        },
        "fails": {
            "childish": [
                "{He} made it, but it broke. {hero} was {unhappy}.",
                "But the {object} fell down. Boom! {hero} was {unhappy}.",
            ],
            "mature": [
                "The first attempt collapsed within minutes, leaving {hero} {unhappy}.",
                "Every early version failed, and {hero} felt {unhappy}.",
            ],
        },
        "encouraged": {
            "childish": [
                '"Try again!" said {friend}.',
                '{His} {parent} said, "You can do it!"',
            ],
            "mature": [
                "{friend} reminded {him} that failure often conceals valuable evidence.",
                "{His} {parent} encouraged {him} to examine each mistake with patience.",
            ],
        },
        "retries": {
            "childish": [
                "{hero} tried and tried and tried.",
                "{hero} and {friend} tried again. They had fun.",
            ],
            "mature": [
                "{hero} studied the design, measured everything again, and worked until midnight.",
                "Through careful experiments, {hero} and {friend} improved the fragile structure.",
            ],
        },
        "succeeds": {
            "childish": [
                "Then the {object} was good! {hero} was {glad}.",
                "At last it did not break. {hero} was {glad}.",
            ],
            "mature": [
                "When the {object} was finally complete, {hero} felt {glad}.",
                "The finished {object} astonished the audience, and {hero} felt {glad}.",
            ],
        },
        "lesson": {
            "childish": [
                "{hero} learned to try again.",
            ],
            "mature": [
                "{hero} understood that persistence transforms failure into knowledge.",
            ],
        },
    },
    "truth": {
        "breaks": {
            "childish": [
                "{hero} was playing and broke the {adjective} {object}.",
                "Oops! {hero} broke the {object} of {his} {parent}.",
            ],
            "mature": [
                "While exploring the attic, "
                "{hero} accidentally damaged a {adjective} {object} belonging to {his} {parent}.",
                "In a careless moment {hero} shattered the {adjective} {object} that {his} {parent} treasured.",
            ],
        },
        "lies": {
            "childish": [
                '"Who did this?" said {his} {parent}. "Not me," said {hero}.',
                "{hero} hid the {object} under the bed.",
            ],
            "mature": [
                "When {his} {parent} questioned {him}, {hero} denied everything.",
                "{hero} concealed the broken {object} and invented an elaborate excuse.",
            ],
        },
        "regrets": {
            "childish": [
                "{hero} was {unhappy}. {He} did not want to play.",
                "{He} was {unhappy} and could not sleep.",
            ],
            "mature": [
                "The deception weighed heavily, and {hero} felt {unhappy}.",
                "That night {hero} could not sleep and felt {unhappy}.",
            ],
        },
        "confesses": {
            "childish": [
                'So {hero} said, "I am sorry. I broke the {object}."',
                '{hero} ran to {his} {parent} and said, "I did it. I am sorry."',
            ],
            "mature": [
                "The following morning {hero} confessed the truth and accepted responsibility.",
                "Finally {hero} gathered enough courage to admit what had happened to the {object}.",
            ],
        },
        "forgiven": {
            "childish": [
                '{His} {parent} said, "It is okay." {hero} was {glad}.',
                "{His} {parent} gave {him} a hug. {hero} was {glad}.",
            ],
            "mature": [
                "{His} {parent} forgave {him} after a long conversation, and {hero} felt {glad}.",
                "Together they restored the {object}, and {hero} felt {glad}.",
            ],
        },
        "lesson": {
            "childish": [
                "{hero} learned to tell the truth.",
            ],
            "mature": [
                "{hero} understood that honesty, however painful, preserves trust.",
            ],
        },
    },
}

ENDING: Beat = {
    "childish": [
        "The end.",
        "They all went home to play.",
        "",
    ],
    "mature": [
        "The memory remained with {him} for years.",
        "Nothing seemed quite the same afterward.",
        "",
    ],
}


def story(rng: random.Random, maturity: float | None = None) -> str:
    """Return one story, on one line.

    Args:
        rng: source of randomness; the same state gives the same story.
        maturity: chance that a beat or a thing is mature, in [0, 1]; None draws it from Beta(0.9, 1.2). Most stories
            then lean to one register, and the childish one is more frequent.
    """
    if maturity is None:
        maturity = rng.betavariate(0.9, 1.2)

    def register() -> str:
        return "mature" if rng.random() < maturity else "childish"

    def pick(things: Sequence[tuple[str, str]]) -> str:
        thing = rng.choice(things)
        return thing[REGISTERS.index(register())]

    child = "girl" if rng.random() < 0.5 else "boy"
    hero = rng.choice(GIRLS if child == "girl" else BOYS)
    words = {
        "child": child,
        "hero": hero,
        **PRONOUNS[child],
        "friend": rng.choice([name for name in GIRLS + BOYS if name != hero]),
        "place": pick(PLACES),
        "object": pick(OBJECTS),
        "animal": pick(ANIMALS),
        "parent": pick(PARENTS),
    }
    plot = PLOTS[rng.choice(list(PLOTS))]
    told = []
    for beat in (OPENING, *plot.values(), ENDING):
        tone = register()
        template = rng.choice(beat[tone])
        words["adjective"] = rng.choice(ADJECTIVES[tone])
        words["unhappy"] = rng.choice(UNHAPPY[tone])
        words["glad"] = rng.choice(GLAD[tone])
        told.append(template.format_map(words))
    text = " ".join(sentence for sentence in told if sentence)
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def stories(count: int, *, seed: int) -> list[str]:
    """Return `count` different stories; the first n of them are the same for every `count` >= n."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[story(rng)] = None
    return list(found)
