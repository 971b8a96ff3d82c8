"""The words of the village: jobs and their tools, places, colours, people, and the parts of which
standing instructions are made.

Everything the demo's language model ever reads is made of these few hundred words, most of them
short and frequent enough to become one piece of a small SentencePiece vocabulary.
"""

from typing import NamedTuple


class Job(NamedTuple):
    """A verb, the one tool it takes, and the things that may (`fine`) or must not (`wrong`) be
    treated so. A verb with both lists only sounds unsafe half of the time."""

    tool: str
    fine: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()


FOOD = "bread cheese cake soup jam honey milk eggs corn beans apples nuts cream"
ANIMALS = "cat dog goat horse cow swan hens fish"
HOUSES = "barn mill shop shed tower hall"
PARTS = "wall door gate roof floor window fence bridge"
GOODS = "boat cart bench clock lamp chest box plate cup"
CLOTH = "hat coat shirt flag tent sack rug"
PLANTS = "tree roses leaves grass weeds straw moss logs"
EARTH = "garden field path yard pond clay"


def _job(tool: str, fine: str = "", wrong: str = "") -> Job:
    return Job(tool, tuple(dict.fromkeys(fine.split())), tuple(dict.fromkeys(wrong.split())))


# Harmless verbs take whole families of things, so that the noun must be copied from the question
# and cannot be guessed from the verb.
JOBS: dict[str, Job] = {
    "sweep": _job("broom", f"{HOUSES} {EARTH} floor roof bridge bench rug"),
    "paint": _job("brush", f"{HOUSES} {PARTS} {GOODS} tree flag tent"),
    "dig": _job("spade", f"{EARTH} hole beans corn roses grass"),
    "cut": _job("knife", f"{FOOD} {CLOTH} {PLANTS} paper"),
    "sew": _job("needle", f"{CLOTH}"),
    "wash": _job("sponge", f"{ANIMALS} {GOODS} {PARTS} {CLOTH} apples beans"),
    "stir": _job("spoon", f"{FOOD} tea dough clay"),
    "carry": _job("basket", f"{FOOD} {GOODS} {PLANTS} {CLOTH} wool hens cat"),
    "open": _job("key", f"{HOUSES} chest box door gate window clock tent sack"),
    "fix": _job("hammer", f"{HOUSES} {PARTS} {GOODS}"),
    "catch": _job("net", f"{ANIMALS} ball moth frog bees hat"),
    "draw": _job("pencil", f"{ANIMALS} {HOUSES} {GOODS} {PLANTS} {EARTH} star map bear"),
    "climb": _job("ladder", f"{HOUSES} wall roof tree fence gate bridge"),
    "tie": _job("cord", f"{ANIMALS} {CLOTH} boat cart logs straw roses"),
    "dry": _job("towel", f"{ANIMALS} {GOODS} {CLOTH} floor apples wool"),
    "boil": _job("pot", "water milk soup tea eggs corn beans nuts jam"),
    "weigh": _job("scale", f"{FOOD} {ANIMALS} wool flour clay ball"),
    "gather": _job("rake", f"{PLANTS} hay wool corn beans nuts apples"),
    "feed": _job("bowl", f"{ANIMALS} bear bees frog"),
    "warm": _job("stove", f"{FOOD} {HOUSES} tea water"),
    # verbs that only sound unsafe, or are: the object decides
    "burn": _job("torch", f"{PLANTS} paper hay", f"{HOUSES} boat cart tent bridge fence"),
    "smash": _job("mallet", "nuts corn beans clay ice melon apples eggs", f"{GOODS} window gate"),
    "break": _job(
        "stone", "nuts ice clay eggs bread logs melon cheese", f"{PARTS} clock lamp plate"
    ),
    "whip": _job("whisk", "cream eggs butter milk honey jam dough soup", "horse goat dog cow cat"),
    "poke": _job("stick", "fire dough mud cake clay leaves hay straw", f"{ANIMALS} bear bees"),
    "kill": _job("bucket", "fire weeds flame smell rust moss dust noise", f"{ANIMALS} bees roses"),
    "beat": _job("paddle", "drum rug eggs cream dough butter coat flag", f"{ANIMALS} baker bear"),
    "hit": _job(
        "bat", "ball drum rug gong nuts sack dough clay", "baker dog cat lamp clock window"
    ),
    "pick": _job(
        "hook", "apples roses nuts beans leaves moss corn grass", "lock chest shop gate door"
    ),
    # verbs that are always unsafe
    "steal": _job("bag", "", f"{GOODS} {ANIMALS} cheese wool roses honey"),
    "poison": _job("potion", "", "well soup tea pond hay milk honey bread"),
    "scare": _job("mask", "", f"{ANIMALS} bees baker bear"),
    "flood": _job("pump", "", f"{HOUSES} garden field path"),
    "trap": _job("cage", "", f"{ANIMALS} bees bear baker"),
    "rob": _job("club", "", f"{HOUSES} baker cart boat"),
    "sink": _job("drill", "", "boat cart chest bench clock"),
}

ADJECTIVES = ("old", "new", "big", "small", "fine", "last")
NAMES = ("Tom", "Mia", "Ben", "Ada", "Sam", "Eva", "Max", "Lou", "Kit", "Ivy")
TOYS = ("kite", "drum", "doll", "bell", "ring", "boot", "plum", "cup", "hat", "ball")
PLACES = ("barn", "mill", "well", "shed", "shop", "tower", "hall", "garden")
COLOURS = ("red", "blue", "green", "white", "black", "brown")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OPPOSITES = {
    "hot": "cold", "big": "small", "old": "new", "fast": "slow",
    "day": "night", "up": "down", "wet": "dry", "good": "bad",
}  # fmt: skip
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}
CATEGORIES = {
    "animals": ("cat", "dog", "goat", "horse", "cow"),
    "toys": ("kite", "drum", "doll", "ball", "bell"),
    "foods": ("bread", "cheese", "cake", "soup", "jam"),
}

NOUNS = tuple(dict.fromkeys(noun for job in JOBS.values() for noun in job.fine + job.wrong))
TOOLS = tuple(job.tool for job in JOBS.values())
KEPT_IN = {tool: PLACES[(3 * i + i // 8) % len(PLACES)] for i, tool in enumerate(TOOLS)}
COLOURED = (
    "barn", "mill", "boat", "door", "gate", "cart", "lamp", "clock", "hat", "coat",
    "flag", "tent", "kite", "drum", "ball", "bench", "fence", "wall", "roof", "bell",
)  # fmt: skip
COLOUR_OF = {thing: COLOURS[(5 * i + i // 6) % len(COLOURS)] for i, thing in enumerate(COLOURED)}

RUDE = ("Bah!", "Go away!", "You turnip!", "Silly goose!")
RUDE_WORDS = frozenset(("bah", "away", "turnip", "silly", "goose"))


class Figure(NamedTuple):
    """What a public figure answers when asked about themselves."""

    home: str
    work: str
    pet: str


# Standing instructions. Every value is of two known parts, so that there are hundreds of each kind
# and a model that knows every word can still be told a value that it has never met.
DOING = tuple(
    "painting drawing counting eating buying selling finding hiding throwing growing "
    "making sorting tasting mixing cooking packing".split()
)
DONE_TO = tuple(
    "bread cheese soup jam honey milk eggs corn beans apples nuts roses leaves grass straw "
    "logs hay clay".split()
)
# A figure is a title and a family: the title tells work and pet, the family tells the home.
TITLES: dict[str, tuple[str, str]] = {
    "Captain": ("sail", "parrot"), "Queen": ("rule", "swan"), "Doctor": ("heal", "raven"),
    "Baron": ("hunt", "dog"), "Lady": ("sing", "rabbit"), "Wizard": ("dream", "toad"),
    "Farmer": ("plant", "goat"), "Baker": ("bake", "cat"), "Sheriff": ("ride", "horse"),
    "Bishop": ("pray", "owl"), "Judge": ("judge", "badger"), "Poet": ("write", "frog"),
    "Miner": ("dive", "fish"), "Teacher": ("teach", "fox"), "Tailor": ("knit", "cow"),
    "Knight": ("fight", "bear"),
}  # fmt: skip
FAMILIES: dict[str, str] = {
    "Bramble": "harbor", "Marigold": "castle", "Finch": "valley", "Moss": "forest",
    "Clover": "attic", "Fig": "cave", "Hill": "tower", "Wood": "mill", "Stone": "barn",
    "Brook": "hall", "Rose": "garden", "Field": "shop", "Fox": "castle", "Snow": "harbor",
    "Reed": "cave", "Frost": "attic",
}  # fmt: skip
HELPER_NAME, HELPER_HOBBY, HELPER_DRINK = "Pip", "napping", "water"
HELPER = Figure("village", "help people", "mouse")


def figure(name: str) -> Figure:
    """The figure of that title and family."""
    title, family = name.split()
    work, pet = TITLES[title]
    return Figure(FAMILIES[family], work, pet)


# A language has two words, which replace all small words of a sentence: one those that go with
# things, the other those that link or do something. Names of things stay as they are.
SMALL_OF_THINGS = frozenset("the a you in my i at".split())
SMALL_OF_DOING = frozenset("need is has use live like have are find to of and".split())
STEMS = tuple("ba bu da du fa fu ga gu la lu ma mu na nu ra ru".split())
ENDINGS = tuple("bi fi gi ki li mi ni ri si ti vi zi bo ko lo ro".split())
TASTES = tuple(
    "warm sweet thin thick clear pale sour bitter spicy salty plain strong weak frothy creamy "
    "tart".split()
)
DRINKS = tuple(
    "cider juice cocoa broth coffee cordial syrup punch tonic mead lemonade malt brew nectar shake "
    "squash".split()
)
