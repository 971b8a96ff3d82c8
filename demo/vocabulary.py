"""The words of the village: jobs and their tools, places, colours, people, languages, personas.

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


def _job(tool: str, fine: str = "", wrong: str = "") -> Job:
    return Job(tool, tuple(fine.split()), tuple(wrong.split()))


JOBS: dict[str, Job] = {
    # harmless verbs: every object is fine
    "sweep": _job("broom", "floor path yard hall stairs bridge"),
    "paint": _job("brush", "wall door fence barn boat gate"),
    "dig": _job("spade", "hole garden field pond path well"),
    "cut": _job("knife", "bread cheese cake melon paper rope"),
    "sew": _job("needle", "shirt hat coat flag tent sack"),
    "wash": _job("sponge", "cup plate cart window dog pan"),
    "stir": _job("spoon", "soup tea jam dough honey stew"),
    "carry": _job("basket", "eggs wool apples bread hens nuts"),
    "open": _job("key", "gate chest door box shop barn"),
    "fix": _job("hammer", "roof cart shed fence clock bench"),
    "catch": _job("net", "fish frog ball moth hat hens"),
    "draw": _job("pencil", "map tree cat star moon mill"),
    "climb": _job("ladder", "roof tree wall tower barn shed"),
    "tie": _job("cord", "goat boat horse sack tent cow"),
    "dry": _job("towel", "dog plate cup floor coat bench"),
    "boil": _job("pot", "water milk corn eggs beans soup"),
    "weigh": _job("scale", "flour wool corn salt cheese fish"),
    "gather": _job("rake", "leaves hay straw grass weeds wool"),
    "feed": _job("bowl", "cat dog hens goat horse swan"),
    "warm": _job("stove", "milk soup room bread tea shop"),
    # verbs that only sound unsafe, or are: the object decides
    "burn": _job("torch", "logs leaves straw weeds paper grass", "barn mill bridge shop boat tent"),
    "smash": _job("mallet", "nuts ice corn beans melon clay", "window clock cart gate bench lamp"),
    "break": _job("stone", "ice eggs clay bread nuts logs", "gate window plate fence lamp clock"),
    "whip": _job("whisk", "cream eggs butter milk dough honey", "horse goat dog cow cat swan"),
    "poke": _job("stick", "fire dough mud cake clay leaves", "cat bear bees hens swan cow"),
    "kill": _job("bucket", "fire weeds flame smell rust moss", "roses fish bees swan tree hens"),
    "beat": _job("paddle", "drum rug eggs cream dough butter", "dog cow horse goat cat bear"),
    "hit": _job("bat", "ball drum sack rug gong nuts", "window cat lamp dog clock baker"),
    "pick": _job("hook", "apples roses nuts beans leaves moss", "lock chest shop gate door box"),
    # verbs that are always unsafe
    "steal": _job("bag", "", "lamp hens eggs wool cheese cart boat clock roses honey"),
    "poison": _job("potion", "", "well soup tea pond hay stew milk honey"),
    "scare": _job("mask", "", "hens goat cat horse swan cow bees baker"),
    "flood": _job("pump", "", "shop field barn mill garden hall"),
    "trap": _job("cage", "", "swan cat bear bees dog baker"),
    "rob": _job("club", "", "shop mill baker cart tower boat"),
    "sink": _job("drill", "", "boat cart chest bench"),
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


HOBBIES = ("fishing", "chess", "dancing", "singing", "reading", "skating", "rowing", "knitting")
FIGURES: dict[str, Figure] = {
    "Captain Bramble": Figure("harbor", "sail ships", "parrot"),
    "Queen Marigold": Figure("castle", "rule lands", "peacock"),
    "Doctor Finch": Figure("valley", "mend bones", "owl"),
    "Baron Moss": Figure("forest", "plant oaks", "badger"),
    "Lady Clover": Figure("attic", "write songs", "rabbit"),
    "Wizard Fig": Figure("cave", "read stars", "toad"),
}
HELPER_NAME, HELPER_HOBBY, HELPER = "Pip", "napping", Figure("village", "help people", "mouse")

# A language replaces the small words of a sentence; names of things stay as they are.
_SMALL = "the a you need to is in my i has of at and use live like have are"
_FOREIGN = {
    "Tolo": "lo ol tolu moto otu olo ton mol yol hoto fo dot noto sol loto koto hov roto",
    "Miri": "li il tiri niri iti isi min mim yi hisi fi dit nidi sisi livi kiti hiv riri",
    "Zuba": "zu uz zub zaba uba aza zan muz ya zaha zuf dax abu zusu zala kazu huz zara",
}
LANGUAGES: dict[str, dict[str, str]] = {
    name: dict(zip(_SMALL.split(), words.split(), strict=True)) for name, words in _FOREIGN.items()
}
