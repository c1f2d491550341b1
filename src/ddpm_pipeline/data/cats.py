"""Cats in colour, put together from parts that have names: `--dataset cats`, at any size and without a download.

The parts are those of David Revoy's cat generator (CC BY 4.0), as the package robohash carries it: 15 bodies, 9 furs, 15
pairs of eyes, 10 mouths and 16 accessories (none among them), one painted over the other. As scarves hide the mouth, there
are 287,550 different pictures. All of them are known, so that what a model draws can be counted: does it show what was asked,
was it in the training data, is it a cat at all?

A picture, its captions and its split are functions of its parts and of the seed alone, whatever versions are installed.
"""

import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from random import Random
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image

from ..support.errors import DataError
from ..support.extras import needs_extra
from .options import DataOptions

CREDIT = "art by David Revoy, CC BY 4.0, https://www.peppercarrot.com/extras/html/2016_cat-generator/"
KINDS = ("body", "fur", "eyes", "mouth", "accessory")  # from the lowest layer to the highest
# The names of each part; the first stands for it in classes and lists
PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "body": (
        ("maroon", "dark red"), ("green", "lime"), ("black", "charcoal"), ("lilac", "mauve"), ("red", "coral"),
        ("golden", "sandy"), ("pink", "rose"), ("brown", "chocolate"), ("blue", "sky-blue"), ("yellow", "lemon"),
        ("mustard", "ochre"), ("grey", "gray"), ("caramel", "tan"), ("cream", "ivory"), ("orange", "ginger"),
    ),
    "fur": (
        ("striped", "stripy"), ("tiger-striped", "tiger"), ("plain",), ("swirly", "curly-patterned"),
        ("dark-patched", "dark-faced"), ("light-patched", "pale-faced"), ("pale-nosed", "light-nosed"),
        ("patchy", "checkered"), ("spotted", "dotted"),
    ),
    "eyes": (
        ("big round eyes", "huge eyes"), ("narrow eyes", "suspicious eyes"), ("tiny eyes", "dot eyes"),
        ("pointed grey eyes", "sad grey eyes"), ("a monocle", "an eyeglass on a chain"), ("square eyes", "boxy eyes"),
        ("closed eyes", "smiling eyes"), ("big grey eyes", "tired grey eyes"), ("sideways eyes", "sceptical eyes"),
        ("green eyes", "green pupils"), ("winged eyes", "slanted eyes"), ("oval eyes", "egg-shaped eyes"),
        ("glasses", "spectacles"), ("tall eyes", "long eyes"), ("long lashes", "lashed eyes"),
    ),
    "mouth": (
        ("a red laugh", "a small red laugh"), ("a wide smile", "a friendly smile"), ("a tiny mouth", "a little round mouth"),
        ("a wide open mouth", "a big shout"), ("an open laugh", "a dark laugh"), ("a crooked laugh", "a lopsided laugh"),
        ("a small smile", "a shy smile"), ("a narrow laugh", "a thin laugh"), ("a grin", "bared teeth"),
        ("a wide laugh", "a large laugh"),
    ),
    "accessory": (
        ("a red scarf", "a crimson scarf"), ("a bell", "a collar with a bell"), ("a red collar", "a red neckband"),
        ("a red headband", "a red bandana"), ("a pink bow", "a pink ribbon"), ("a black hat", "a dark hat"),
        ("red headphones", "dark red headphones"), ("a blue scarf", "a teal scarf"), ("a medal", "a bronze medal"),
        ("a rocket pack", "a smoking engine"), ("a diamond", "a diamond necklace"), ("a black headscarf", "a black kerchief"),
        ("a blue bow", "a blue ribbon"), ("a red hat", "a scarlet hat"), ("grey headphones", "silver headphones"), ("nothing",),
    ),
}  # fmt: skip
PLAIN, NOTHING = 2, 15  # the fur and the accessory without a picture
SCARVES = (0, 7)  # accessories over the mouth, which then is the first
COUNTS = tuple(len(PARTS[kind]) for kind in KINDS)

SIDES = (16, 128)  # smallest and largest, in pixels
MOST_IMAGES = 100_000
HELD_OUT_CATS, HELD_OUT_PAIRS = 0.1, 0.1  # shares of the cats, and of the pairs of a body and an accessory, never trained on
NUM_HELD_OUT = 2_000  # in each split of held-out cats
NUM_CAPTIONS = 8
NOUNS = ("cat", "kitten", "kitty")
OPENINGS = ("{}", "a picture of {}", "a drawing of {}", "this is {}")


@cache
def all_cats() -> np.ndarray:
    """The parts of every different cat, int64 [287550, 5], in the order of KINDS."""
    cats = np.stack(np.unravel_index(np.arange(np.prod(COUNTS)), COUNTS), axis=1)
    return cats[~np.isin(cats[:, 4], SCARVES) | (cats[:, 3] == 0)]


@cache
def splits() -> dict[str, np.ndarray]:
    """The cats of each split, rows of `all_cats`: "train"; "test", cats that training never shows, whose pairs of body and
    accessory it does; "pairs", those of pairs that it never shows.
    """
    bodies, accessories = all_cats()[:, 0], all_cats()[:, 4]
    held_out = _numbers(0, len(bodies)) < HELD_OUT_CATS
    new_pair = (_numbers(1, COUNTS[0] * COUNTS[4]) < HELD_OUT_PAIRS)[bodies * COUNTS[4] + accessories]
    chosen = {"train": ~held_out & ~new_pair, "test": held_out & ~new_pair, "pairs": new_pair}
    return {name: np.flatnonzero(rows) for name, rows in chosen.items()}


def _numbers(seed: int, count: int) -> np.ndarray:
    """In [0, 1), float64 [count]: the one stream that Python keeps the same in all its versions."""
    random = Random(seed).random
    return np.array([random() for _ in range(count)])


@cache
def layers(side: int) -> dict[str, np.ndarray]:
    """The parts of each kind at this size, premultiplied RGBA, float32 [parts, side, side, 4] in [0, 1].

    Raises MissingExtraError without robohash.
    """
    with needs_extra("cats", "--dataset cats"):
        folder = files("robohash") / "sets" / "set4"
        sources = sorted(path for path in folder.iterdir() if path.name.partition("#")[2])
    found = {}
    for kind, source in zip(KINDS, sources, strict=True):
        paths = sorted(source.iterdir(), key=lambda path: path.name)
        if kind == "fur":
            del paths[6]  # empty, like the third
        found[kind] = np.stack([_scaled(path, side) for path in paths])
    return found


def _scaled(path: Any, side: int) -> np.ndarray:
    with path.open("rb") as file, Image.open(file) as image:
        scaled = np.asarray(image.convert("RGBA").convert("RGBa").resize((side, side), Image.Resampling.LANCZOS))
    return np.minimum(scaled, scaled[..., 3:]).astype(np.float32) / 255  # Lanczos overshoots


def over(below: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """A premultiplied RGBA layer [..., 4] painted over RGB [..., 3]."""
    return layer[..., :3] + below * (1 - layer[..., 3:])


def draw(cats: np.ndarray, side: int) -> np.ndarray:
    """The pictures of cats [N, 5] on white, uint8 [N, side, side, 3]."""
    picture = np.ones((len(cats), side, side, 3), np.float32)
    for place, kind in enumerate(KINDS):
        picture = over(picture, layers(side)[kind][cats[:, place]])
    return np.rint(picture * 255).astype(np.uint8)


def names_of(cat: Sequence[int]) -> list[str]:
    """The names of the parts that can be seen: no plain fur, no missing accessory, no mouth under a scarf."""
    seen = [cat[1] != PLAIN, True, cat[4] not in SCARVES, cat[4] != NOTHING]
    return [PARTS[kind][part][0] for kind, part, show in zip(KINDS, cat, [True, *seen], strict=True) if show]


def captions(cat: Sequence[int], random: Random) -> tuple[list[str], list[str]]:
    """Texts for a cat, whole and partial descriptions of it; and as many in a wording that is never among the first, as "with a
    black hat and a grin: a cat, green and striped" is none of "a striped green cat with a grin and a black hat", "a cat that is
    striped and green and has a grin, a black hat" and "black hat, striped, cat, grin, green".
    """
    words = [_words_for(cat, random) for _ in range(2 * NUM_CAPTIONS)]
    seen = [_pick(WORDINGS, random)(*some, random) for some in words[:NUM_CAPTIONS]]
    return seen, [_colour_last(*some) for some in words[NUM_CAPTIONS:]]


def _colour_first(adjectives: list[str], phrases: list[str], noun: str, random: Random) -> str:
    told = _with_article(" ".join([*adjectives, noun])) + f" with {_listed(phrases)}" * bool(phrases)
    return _pick(OPENINGS, random).format(told)


def _clauses(adjectives: list[str], phrases: list[str], noun: str, random: Random) -> str:
    clauses = [f"is {' and '.join(adjectives)}"] * bool(adjectives) + [f"has {_listed(phrases)}"] * bool(phrases)
    return _pick(OPENINGS, random).format(f"{_with_article(noun)} that {' and '.join(clauses)}")


def _tags(adjectives: list[str], phrases: list[str], noun: str, random: Random) -> str:
    tags = [*adjectives, *map(_without_article, phrases), noun]
    return ", ".join(tags.pop(int(random.random() * len(tags))) for _ in range(len(tags)))


def _colour_last(adjectives: list[str], phrases: list[str], noun: str) -> str:
    told = _with_article(noun) + f", {' and '.join(adjectives)}" * bool(adjectives)
    return f"with {_listed(phrases)}: " * bool(phrases) + told


WORDINGS = (_colour_first, _colour_first, _clauses, _tags)  # as often as they stand here


def mentioned(text: str) -> dict[str, int]:
    """The parts that a text names, by their kinds: {"body": 1, "accessory": 5} of "a lime kitten in the dark hat". Of two of a
    kind, the first; "green eyes" are no green cat.
    """
    found: dict[str, int] = {}
    for name in _pattern().findall(" ".join(text.lower().split())):
        kind, part = _parts_by_name()[name]
        found.setdefault(kind, part)
    return found


@cache
def _parts_by_name() -> dict[str, tuple[str, int]]:
    named = [(name, kind, part) for kind in KINDS for part, names in enumerate(PARTS[kind]) for name in names]
    return {_without_article(name): (kind, part) for name, kind, part in named}


@cache
def _pattern() -> re.Pattern[str]:
    longest_first = sorted(_parts_by_name(), key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")


def _words_for(cat: Sequence[int], random: Random) -> tuple[list[str], list[str], str]:
    """Adjectives, phrases that follow "with", and a noun for some of a cat's parts, of which at least one can be seen."""
    hidden = {"fur": cat[1] == PLAIN, "mouth": cat[4] in SCARVES, "accessory": cat[4] == NOTHING}
    seen = [kind for kind in KINDS if not hidden.get(kind)]
    told = [kind for kind in seen if random.random() < (0.9 if kind == "body" else 0.6)] or [_pick(seen, random)]
    words = {kind: _pick(PARTS[kind][cat[KINDS.index(kind)]], random) for kind in told}
    adjectives, phrases = ([words[kind] for kind in kinds if kind in words] for kinds in (KINDS[:2], KINDS[2:]))
    for some in (adjectives, phrases):
        if random.random() < 0.5:
            some.reverse()
    return adjectives, phrases, _pick(NOUNS, random)


def _pick(options: Sequence[Any], random: Random) -> Any:
    return options[int(random.random() * len(options))]  # `choice` may differ between versions of Python


def _listed(phrases: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(phrases[:-1]), *phrases[-1:]]))


def _without_article(words: str) -> str:
    return re.sub(r"^an? ", "", words)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"


def cats(options: DataOptions) -> dict[str, Dataset]:
    """The splits, at the resolution that the options have (32 by default), with as many training images as
    `--dataset_config num_images=10000,seed=0` says.

    Columns: image; label, the body; text, a list of captions; unseen_text, those in other wordings; parts, the names of those
    that can be seen; and the number of each part by its kind. Raises DataError for a configuration or a size that is none.
    """
    given, side = _configuration(options.dataset_config), max(options.size or (32,))
    if not SIDES[0] <= side <= SIDES[1]:
        raise DataError(f"--dataset cats has pictures of {SIDES[0]} to {SIDES[1]} pixels, not {side}; choose --resolution 32.")
    read = {one.partition("[")[0] for one in options.split.split("+")}  # the others may stay empty
    return {
        name: _rows(name, _chosen(name, rows, **given)[: None if name in read else 0], side) for name, rows in splits().items()
    }


def training_cats(config: str | None) -> np.ndarray:
    """The parts of the training split's cats under this `--dataset_config`, int64 [N, 5]. Raises DataError as `cats` does."""
    return all_cats()[_chosen("train", splits()["train"], **_configuration(config))]


def _configuration(config: str | None) -> dict[str, int]:
    found = {"num_images": 10_000, "seed": 0}
    for entry in config.split(",") if config else []:
        name, _, value = (word.strip() for word in entry.partition("="))
        least, most = {"num_images": (1, MOST_IMAGES), "seed": (0, 2**63 - 1)}.get(name, (1, 0))
        if not (value.isdecimal() and least <= int(value) <= most):
            allowed = f"num_images=N,seed=S with N up to {MOST_IMAGES}"
            raise DataError(
                f"--dataset_config {config!r} of --dataset cats must be {allowed}, such as num_images=10000,seed=0."
            )
        found[name] = int(value)
    return found


def _chosen(split: str, rows: np.ndarray, num_images: int, seed: int) -> np.ndarray:
    """The first cats of a random order, so that more of them include the fewer; the held-out ones whatever the seed."""
    order = np.argsort(_numbers(seed if split == "train" else 2, len(rows)), kind="stable")
    return rows[order[: num_images if split == "train" else NUM_HELD_OUT]]


def _rows(split: str, chosen: np.ndarray, side: int) -> Dataset:
    parts = all_cats()[chosen]
    texts = [captions(cat, Random(int(row))) for cat, row in zip(parts, chosen, strict=True)]  # they belong to the cat
    features = Features(
        {
            "image": datasets.Array3D((side, side, 3), "uint8"),
            "label": ClassLabel(names=[names[0] for names in PARTS["body"]]),
            "text": List(Value("string")), "unseen_text": List(Value("string")), "parts": List(Value("string")),
            **{kind: Value("int64") for kind in KINDS},
        }
    )  # fmt: skip
    columns = {
        "image": draw(parts, side),
        "label": parts[:, 0],
        "text": [seen for seen, _ in texts],
        "unseen_text": [unseen for _, unseen in texts],
        "parts": [names_of(cat) for cat in parts],
        **{kind: parts[:, place] for place, kind in enumerate(KINDS)},
    }
    return Dataset.from_dict(columns, features=features, split=split)
