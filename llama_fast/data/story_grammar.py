"""The grammar of the story world: its words, its rules and its sentences, as plain data.

A story tells the facts of one small world: who the hero is, where it happened, what went wrong, who helped. A *base* field is
a fact that is chosen freely (`BASE`); a *derived* field follows from other facts (`derive`): pronouns from a name, an effect
from its cause. A plot is a row of slots; a slot is a choice of sentence templates with fields in braces, and an empty template
makes it optional. The data always say "a"; "an" is made when a text is written. `stories.py` writes documents from these data and recognises them again.
"""

from dataclasses import dataclass

Facts = dict[str, str]
Slot = tuple[str, ...]

GIRLS = ("Mia", "Lily", "Anna", "Rosa", "Ella", "Nina", "Zoe", "Ruby", "Ivy", "Lucy", "Emma", "Clara")
BOYS = ("Tom", "Ben", "Max", "Leo", "Sam", "Jack", "Finn", "Oscar", "Hugo", "Theo", "Noah", "Felix")

ABILITY = {
    **dict.fromkeys(("cat", "squirrel", "monkey"), "climb"),
    **dict.fromkeys(("owl", "crow", "parrot"), "fly"),
    **dict.fromkeys(("frog", "otter", "seal"), "swim"),
    **dict.fromkeys(("mole", "rabbit", "dog"), "dig"),
    **dict.fromkeys(("bear", "horse", "bull"), "push"),
    **dict.fromkeys(("mouse", "lamb", "hen"), "nothing"),
}

WATER = ("the lake", "the river", "the pond", "the beach", "the old bridge")
LAND = ("the park", "the farm", "the market", "the mill", "the castle", "the school", "the village")
LIGHT_TOYS = ("kite", "balloon", "hat", "scarf", "ribbon", "flag", "letter")
OTHER_TOYS = ("ball", "drum", "bell", "key", "coin", "ring", "cup", "spoon", "book", "doll", "toy boat", "toy train")

# trouble -> (abilities that end it, why the hero cannot end it)
TROUBLES = {
    "flew into a tall tree": (("climb", "fly"), "the tree was too high"),
    "fell into the water": (("swim",), "the water was too deep"),
    "fell into a hole": (("dig",), "the hole was too narrow"),
    "rolled under a rock": (("push",), "the rock was too heavy"),
}
RESCUE = {
    "climb": "climbed up the tree",
    "fly": "flew up to the top of the tree",
    "swim": "swam out",
    "dig": "dug in the ground",
    "push": "pushed the rock away",
}
WEATHER_EFFECT = {
    "sunny": "walked in the shade",
    "rainy": "took a umbrella",
    "windy": "held on to the fence",
    "snowy": "put on warm boots",
    "foggy": "walked slowly",
    "cold": "ran to keep warm",
    "hot": "drank some cool water",
    "cloudy": "looked up at the gray sky",
}
FAILURE = {
    "sing": "sang too loud",
    "dance": "fell over",
    "paint": "spilled the paint",
    "cook": "burned the soup",
    "juggle": "dropped the balls",
    "whistle": "made no sound",
    "knit": "lost the thread",
    "read": "mixed up the letters",
    "skate": "slipped on the ice",
    "draw": "broke the pencil",
}
COMFORT_EFFECT = {
    "blanket": "kept them both warm",
    "lamp": "made the dark go away",
    "flute": "filled the air with music",
    "puzzle": "kept them both busy",
    "pot of soup": "was enough for two",
}

BASE: dict[str, tuple[str, ...]] = {
    "hero": GIRLS + BOYS,
    "friend": GIRLS + BOYS,
    "kind": tuple(ABILITY),
    "friend_kind": tuple(ABILITY),
    "trait": ("brave", "clever", "shy", "funny", "quiet", "gentle", "young", "curious"),
    "home": ("in a small house", "under a old oak", "on a green hill", "in a little hut", "behind a stone wall"),
    "time": ("morning", "afternoon", "evening"),
    "weather": tuple(WEATHER_EFFECT),
    "place": WATER + LAND,
    "toy": LIGHT_TOYS + OTHER_TOYS,
    "color": ("red", "blue", "green", "yellow", "white", "pink", "brown", "golden"),
    "trouble": tuple(TROUBLES),
    "food": ("cake", "pie", "melon", "pizza", "sandwich", "pancake", "muffin", "pear", "cookie", "carrot"),
    "taste": ("big", "sweet", "fresh", "warm", "round"),
    "need": ("had not eaten all day", "had lost the lunch box", "had no food at home", "had given the last apple away"),
    "gift": ("flower", "shell", "feather", "shiny stone", "picture", "wooden star"),
    "skill": tuple(FAILURE),
    "days": ("two", "three", "four", "five", "six", "seven"),
    "shelter": ("cave", "barn", "tent", "tower", "shed", "cabin", "tunnel", "wagon"),
    "storm": ("thunder", "hail", "lightning", "rain", "wind"),
    "comfort": tuple(COMFORT_EFFECT),
    "feeling": ("sad", "upset", "worried"),
}
COMMON = ("hero", "kind", "friend", "friend_kind", "trait", "home", "time", "weather", "place")


def derive(facts: Facts) -> Facts:
    """`facts` with every field that follows from them. A field whose cause is not (yet) known is left out."""
    derived = dict(facts)
    for who, prefix in (("hero", ""), ("friend", "friend_")):
        if who in facts:
            he, his, him = ("she", "her", "her") if facts[who] in GIRLS else ("he", "his", "him")
            derived |= {f"{prefix}he": he, f"{prefix}his": his, f"{prefix}him": him, f"{prefix}He": he.capitalize()}
    effects = (("weather", WEATHER_EFFECT), ("skill", FAILURE), ("comfort", COMFORT_EFFECT))
    for cause, table in effects:
        if cause in facts:
            derived[f"{cause}_effect"] = table[facts[cause]]
    if "trouble" in facts:
        derived["reason"] = TROUBLES[facts["trouble"]][1]
        derived["rescue"] = RESCUE.get(ABILITY[facts["friend_kind"]], "") if "friend_kind" in facts else ""
    return derived


DERIVED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("he", "friend_he"), ("he", "she")),
    **dict.fromkeys(("He", "friend_He"), ("He", "She")),
    **dict.fromkeys(("his", "friend_his"), ("his", "her")),
    **dict.fromkeys(("him", "friend_him"), ("him", "her")),
    "weather_effect": tuple(WEATHER_EFFECT.values()),
    "skill_effect": tuple(FAILURE.values()),
    "comfort_effect": tuple(COMFORT_EFFECT.values()),
    "reason": tuple(reason for _, reason in TROUBLES.values()),
    "rescue": tuple(RESCUE.values()),
}


def contradiction(facts: Facts) -> str | None:
    """Why these facts cannot all be true in one story; None when they can."""
    if facts["hero"] == facts["friend"]:
        return f"{facts['hero']} is hero and friend at once"
    if "trouble" not in facts:
        return None
    trouble, toy = facts["trouble"], facts["toy"]
    abilities = TROUBLES[trouble][0]
    if ABILITY[facts["friend_kind"]] not in abilities:
        return f"a {facts['friend_kind']} cannot help when the {toy} {trouble}"
    if ABILITY[facts["kind"]] in abilities:
        return f"a {facts['kind']} needs no help when the {toy} {trouble}"
    if (trouble == "flew into a tall tree") != (toy in LIGHT_TOYS):
        return f"a {toy} never {trouble}"
    if trouble == "fell into the water" and facts["place"] not in WATER:
        return f"there is no water at {facts['place']}"
    return None


@dataclass(frozen=True)
class Plot:
    """One kind of story. `fields[0]` is what the story is about, and together with hero and place it decides the split."""

    fields: tuple[str, ...]
    opening: int  # how many slots it takes until hero, place and `fields[0]` are told
    slots: tuple[Slot, ...]
    questions: tuple[tuple[str, str], ...]
    summaries: tuple[str, ...]


_BEGIN: tuple[Slot, ...] = (
    (
        "Once upon a time, there was a {trait} {kind} named {hero}.",
        "There once was a {kind} named {hero}. Everyone knew that {he} was {trait}.",
        "Once there lived a {kind} named {hero}, who was very {trait}.",
    ),
    ("", "{hero} lived {home}.", "{He} lived {home}."),
    (
        "One {weather} {time}, {hero} went to {place}.",
        "One {weather} {time}, {hero} the {kind} walked to {place}.",
        "It was a {weather} {time}, and {hero} went to {place}.",
    ),
    ("", "It was {weather}, so {he} {weather_effect}.", "{He} {weather_effect} because it was {weather}."),
)
_FRIENDS: Slot = (
    "From that day on, {hero} and {friend} were good friends.",
    "{friend} was glad to have a {trait} friend like {hero}.",
    "{hero} and {friend} never forgot that {weather} {time}.",
)
_QUESTIONS = (
    ("Who was {hero}?", "{hero} was a {kind}."),
    ("Who was {friend}?", "{friend} was a {friend_kind}."),
    ("What was {hero} like?", "{hero} was {trait}."),
    ("Where did {hero} live?", "{He} lived {home}."),
    ("Where did {hero} go?", "{He} went to {place}."),
    ("When did {hero} go to {place}?", "In the {time}."),
    ("What was the weather like?", "It was {weather}."),
)

LOST = Plot(
    fields=("toy", "color", "trouble", "feeling"),
    opening=len(_BEGIN) + 1,
    slots=(
        *_BEGIN,
        (
            "{He} had a {color} {toy} with {him}.",
            "There {he} played with a {color} {toy}.",
            "{He} took along {his} new {color} {toy}.",
        ),
        ("Suddenly, the {toy} {trouble}.", "But the {color} {toy} {trouble}.", "But then the {toy} {trouble}."),
        (
            "{hero} was {feeling}. {He} could not get it back because {reason}.",
            "{hero} was {feeling}, because {reason}.",
            "{He} was very {feeling}. {He} could do nothing because {reason}.",
        ),
        (
            "Then a {friend_kind} named {friend} came by.",
            "{friend} the {friend_kind} heard {him} and came to help.",
            "Soon {friend} the {friend_kind} came along.",
        ),
        ("", '"Do not worry," said {friend}. "I can help you."', '"I know what to do!" said {friend}.'),
        (
            "{friend} {rescue} and brought the {toy} back.",
            "{friend_He} {rescue} and got the {toy}.",
            "{friend} {rescue}, and soon {hero} had the {color} {toy} again.",
        ),
        ("", '"Thank you, {friend}!" said {hero}.', "{hero} gave {friend} a big hug."),
        (*_FRIENDS, "The two friends played with the {toy} until it was dark."),
    ),
    questions=(
        *_QUESTIONS,
        ("What did {hero} lose?", "{He} lost a {color} {toy}."),
        ("What color was the {toy}?", "The {toy} was {color}."),
        ("What happened to the {toy}?", "The {toy} {trouble}."),
        ("Why was {hero} {feeling}?", "{He} was {feeling} because the {toy} {trouble}."),
        ("Why could {hero} not get the {toy} back?", "Because {reason}."),
        ("Who helped {hero}?", "{friend} the {friend_kind} helped {him}."),
        ("How did {friend} help?", "{friend_He} {rescue}."),
    ),
    summaries=(
        "The {color} {toy} of {hero} the {kind} {trouble}. {friend} the {friend_kind} {rescue} and got it back.",
        "At {place}, {hero} the {kind} lost a {color} {toy}. {friend} the {friend_kind} helped {him}.",
    ),
)

SHARE = Plot(
    fields=("food", "taste", "need", "gift", "feeling"),
    opening=len(_BEGIN) + 1,
    slots=(
        *_BEGIN,
        (
            "{He} had a {taste} {food} in {his} basket.",
            "{He} carried a {taste} {food} in a basket.",
            "{He} wanted to eat a {taste} {food} there.",
        ),
        (
            "There {he} met a {friend_kind} named {friend}.",
            "A {friend_kind} named {friend} sat under a tree.",
            "Soon {friend} the {friend_kind} came by.",
        ),
        (
            "{friend} was {feeling} because {friend_he} {need}.",
            '"Why are you {feeling}?" asked {hero}. {friend} {need}.',
            "{friend} looked {feeling}, for {friend_he} {need}.",
        ),
        (
            '"We can share my {food}," said {hero}.',
            "So {hero} gave half of the {food} to {friend}.",
            "{hero} cut the {food} in two, and they both ate.",
        ),
        ("", '"That was very good!" said {friend}.', "After that, {friend} was not {feeling} any more."),
        (
            "To say thank you, {friend} gave {him} a {gift}.",
            "{friend} thanked {hero} and gave {him} a {gift}.",
            "The next day, {friend} brought {hero} a {gift}.",
        ),
        (*_FRIENDS, "{hero} kept the {gift} for a long time."),
    ),
    questions=(
        *_QUESTIONS,
        ("What did {hero} have?", "{He} had a {taste} {food}."),
        ("Who did {hero} meet?", "{He} met {friend} the {friend_kind}."),
        ("Why was {friend} {feeling}?", "{friend_He} was {feeling} because {friend_he} {need}."),
        ("What did {hero} share?", "{He} shared {his} {food} with {friend}."),
        ("What did {friend} give {hero}?", "{friend_He} gave {him} a {gift}."),
    ),
    summaries=(
        "{hero} the {kind} shared a {food} with {friend} the {friend_kind}. {friend} gave {him} a {gift}.",
        "At {place}, {friend} the {friend_kind} was {feeling}. {hero} the {kind} shared a {food} with {friend_him}.",
    ),
)

LEARN = Plot(
    fields=("skill", "days", "feeling"),
    opening=len(_BEGIN) + 1,
    slots=(
        *_BEGIN,
        (
            "{He} wanted to learn to {skill}.",
            "There {he} tried to {skill}.",
            "{He} had always wanted to {skill}.",
        ),
        (
            "But {he} {skill_effect}.",
            "{hero} did {his} best, but {he} {skill_effect}.",
            "At first, {he} {skill_effect}.",
        ),
        ("{hero} was {feeling} and sat down.", "That made {him} very {feeling}.", '"I am so {feeling}," said {hero}.'),
        (
            "{friend} the {friend_kind} saw {him}.",
            "A {friend_kind} named {friend} came by.",
            "Then {he} met a {friend_kind} named {friend}.",
        ),
        (
            '"I can {skill}," said {friend}. "I will show you how."',
            "{friend} knew how to {skill} and showed {him} how.",
            "{friend_He} wanted to teach {hero} to {skill}.",
        ),
        (
            "They practiced for {days} days.",
            "For {days} days, {hero} and {friend} practiced at {place}.",
            "It took {days} days.",
        ),
        ("", '"Well done, {hero}!" said {friend}.', "{hero} was very proud."),
        ("In the end, {hero} could {skill} as well as {friend}.", "Now {he} can {skill} very well.", *_FRIENDS),
    ),
    questions=(
        *_QUESTIONS,
        ("What did {hero} want to learn?", "{He} wanted to learn to {skill}."),
        ("Why was {hero} {feeling}?", "{He} was {feeling} because {he} {skill_effect}."),
        ("Who taught {hero}?", "{friend} the {friend_kind} taught {him}."),
        ("How long did they practice?", "They practiced for {days} days."),
    ),
    summaries=(
        "{hero} the {kind} learned to {skill} in {days} days. {friend} the {friend_kind} taught {him}.",
        "At {place}, {friend} the {friend_kind} taught {hero} the {kind} to {skill}.",
    ),
)

STORM = Plot(
    fields=("shelter", "storm", "comfort"),
    opening=len(_BEGIN) + 2,
    slots=(
        *_BEGIN,
        ("Soon there was a lot of {storm}.", "But then the {storm} came.", "Suddenly, there was {storm} all around."),
        (
            "{hero} was afraid of the {storm} and ran into a {shelter}.",
            "{He} was afraid, so {he} hid in a {shelter}.",
            "{He} found a {shelter} and hid from the {storm}.",
        ),
        (
            "Inside was a {friend_kind} named {friend}.",
            "In the {shelter} sat {friend} the {friend_kind}.",
            "{friend} the {friend_kind} was there too.",
        ),
        ("", '"You are safe here," said {friend}.', '"Come in, {hero}!" said {friend}.'),
        ("{friend} had a {comfort}.", "{friend_He} took out a {comfort}.", "There was a {comfort} in the {shelter}."),
        ("The {comfort} {comfort_effect}.", "It {comfort_effect}."),
        (
            "{hero} was not afraid any more.",
            "After a while, the {storm} went away.",
            "They sat in the {shelter} until the {storm} was over.",
        ),
        (*_FRIENDS, '"Come and see me again," said {friend}.'),
    ),
    questions=(
        *_QUESTIONS,
        ("Why was {hero} afraid?", "{He} was afraid because of the {storm}."),
        ("Where did {hero} hide?", "{He} hid in a {shelter}."),
        ("Who was in the {shelter}?", "{friend} the {friend_kind} was in the {shelter}."),
        ("What was in the {shelter}?", "There was a {comfort} in the {shelter}."),
        ("How did the {comfort} help?", "It {comfort_effect}."),
    ),
    summaries=(
        "{hero} the {kind} hid from the {storm} in a {shelter}. {friend} the {friend_kind} was there with a {comfort}.",
        "There was {storm} at {place}. {hero} the {kind} and {friend} the {friend_kind} were safe in a {shelter}.",
    ),
)

PLOTS = (LOST, SHARE, LEARN, STORM)
REQUESTS = (
    "Tell me a story.",
    "Tell me a story about {hero}.",
    "Tell me a story about a {kind} named {hero}.",
    "Tell me a story about {hero} and {friend}.",
    "Tell me about {hero} the {kind} at {place}.",
)
SUM_UP = ("Sum up the story.", "What is the story about?")
