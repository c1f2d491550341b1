"""The built-in cats: the same pictures and words for ever, splits that do not meet, captions that are true."""

import hashlib
import itertools
import re
import sys
from random import Random

import numpy as np
import pytest
from PIL import Image

from data_helpers import load
from ddpm_pipeline.data import DataError, DataOptions
from ddpm_pipeline.data.cats import (
    KINDS,
    PARTS,
    SCARVES,
    _words_for,
    all_cats,
    captions,
    draw,
    layers,
    mentioned,
    names_of,
    splits,
)
from ddpm_pipeline.data.columns import find_roles
from ddpm_pipeline.data.options import ConditionColumns
from ddpm_pipeline.data.sources import load_source

COUNT = "num_images=300,seed=5"
DIGESTS = ("7e26d6bf5084abbf", "349ed85cb4359b42", "b14992e7ecf20d94")  # of its pictures, captions and parts


@pytest.fixture(scope="module")
def rows():
    return load_source(DataOptions("cats", dataset_config=COUNT, resolution=16, split="train+test+pairs")).dataset


def test_no_two_cats_look_alike():
    assert len(all_cats()) == 287_550
    shown = draw(all_cats()[::149], 32).reshape(-1, 32 * 32 * 3)
    assert len(np.unique(shown, axis=0)) == len(shown)


def test_pictures_words_and_splits_never_change(rows):
    digest = hashlib.blake2b(np.asarray(rows.with_format("numpy")["image"][:300]).tobytes(), digest_size=8).hexdigest()
    words = hashlib.blake2b(repr([rows[i]["text"] for i in range(300)]).encode(), digest_size=8).hexdigest()
    parts = hashlib.blake2b(repr([[rows[i][kind] for kind in KINDS] for i in range(300)]).encode(), digest_size=8).hexdigest()
    assert (digest, words, parts) == DIGESTS


def test_a_picture_is_its_layers_one_over_the_other():
    cat = np.array([[8, 0, 4, 1, 5]])
    painted = Image.new("RGBA", (128, 128), "white")
    for kind, part in zip(KINDS, cat[0], strict=True):
        layer = layers(128)[kind][part]
        straight = np.divide(layer[..., :3], layer[..., 3:], out=np.zeros_like(layer[..., :3]), where=layer[..., 3:] > 0)
        rgba = np.concatenate([straight, layer[..., 3:]], axis=-1)
        painted = Image.alpha_composite(painted, Image.fromarray(np.rint(rgba * 255).astype(np.uint8)))
    assert np.abs(np.asarray(painted.convert("RGB")).astype(int) - draw(cat, 128)[0]).max() <= 5  # PIL rounds each layer


def test_held_out_cats_and_pairs_are_never_trained_on():
    parts = {name: all_cats()[rows] for name, rows in splits().items()}
    assert sum(map(len, parts.values())) == len(all_cats())
    pairs = {name: set(map(tuple, some[:, [0, 4]])) for name, some in parts.items()}
    assert not pairs["pairs"] & (pairs["train"] | pairs["test"])
    assert pairs["test"] <= pairs["train"]
    assert 0.05 < len(pairs["pairs"]) / 240 < 0.15
    for place, kind in enumerate(KINDS):  # each part alone is learnt
        assert set(parts["train"][:, place]) == set(range(len(PARTS[kind])))


def test_more_images_include_the_fewer():
    fewer, more = (
        load_source(DataOptions("cats", dataset_config=f"num_images={count}", resolution=16)).dataset for count in (5, 20)
    )
    assert more[:5]["text"] == fewer[:]["text"]


def test_captions_are_true_and_the_unseen_wordings_are_never_seen(rows):
    seen = {text for texts in rows["text"] for text in texts}
    assert not seen & {text for texts in rows["unseen_text"] for text in texts}
    for row in rows.select(range(0, len(rows), 50)):
        cat = [row[kind] for kind in KINDS]
        bare = {kind: [[re.sub("^an? ", "", name) for name in part] for part in PARTS[kind]] for kind in KINDS}
        names = sorted({name for kind in KINDS for part in bare[kind] for name in part}, key=len, reverse=True)
        true = {name for kind, part in zip(KINDS, cat, strict=True) for name in bare[kind][part]}
        for text in row["text"] + row["unseen_text"]:
            rest = text
            for name in names:  # the longest first, since "red" is part of "a red scarf"
                found = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", rest)
                if found:
                    assert name in true, text
                    rest = rest[: found.start()] + "*" + rest[found.end() :]


def test_a_caption_mentions_the_parts_that_it_was_made_of():
    owners = {name: (kind, part) for kind in KINDS for part, names in enumerate(PARTS[kind]) for name in names}
    assert len(owners) == sum(len(names) for kind in KINDS for names in PARTS[kind])
    counts = set()
    for row in range(0, len(all_cats()), 1009):
        cat, again = all_cats()[row].tolist(), Random(row)
        for text in itertools.chain(*captions(cat, Random(row))):
            adjectives, phrases, _ = _words_for(cat, again)
            found = mentioned(text)
            assert found == dict(owners[name] for name in adjectives + phrases), text
            assert found and found.items() <= dict(zip(KINDS, cat, strict=True)).items(), text
            counts.add(len(found))
    assert counts == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a cat with green eyes", {"eyes": 9}),
        ("A  Red kitty with a red laugh", {"body": 4, "mouth": 0}),
        ("a dark red cat with dark red headphones", {"body": 0, "accessory": 6}),
        ("the lime kitten in the dark hat", {"body": 1, "accessory": 5}),
        ("with a collar with a bell: a cat, sky-blue and tiger-striped", {"body": 8, "fur": 1, "accessory": 1}),
        ("evergreen greenish tigers", {}),
    ],
)
def test_parts_are_named_by_whole_words_and_the_longest(text, parts):
    assert mentioned(text) == parts


def test_what_cannot_be_seen_is_not_told():
    for scarf in SCARVES:
        cat = [1, 2, 0, 0, scarf]
        assert names_of(cat) == ["green", "big round eyes", PARTS["accessory"][scarf][0]]
        texts = [text for seed in range(20) for some in captions(cat, Random(seed)) for text in some]
        assert not any(word in text for text in texts for word in ("laugh", "plain", "nothing"))


def test_trained_on_as_other_data_are(tmp_path):
    data = load("cats", condition="class", dataset_config=COUNT, resolution=16, cache_dir=str(tmp_path))
    assert (len(data), data.size, data.channels, data.class_names[1]) == (300, (16, 16), 3, "green")
    roles = find_roles(load_source(DataOptions("cats", dataset_config=COUNT)).dataset.features, None, ConditionColumns("text"))
    assert roles.text == "text"


@pytest.mark.parametrize(
    "options", [{"dataset_config": "100"}, {"dataset_config": "num_images=0"}, {"resolution": 8}, {"split": "x"}]
)
def test_impossible_cats(options):
    with pytest.raises(DataError, match=r"num_images=10000|--resolution 32|\['train', 'test', 'pairs'\]"):
        load_source(DataOptions("cats", **options))


def test_without_the_art(monkeypatch):
    layers.cache_clear()
    monkeypatch.setitem(sys.modules, "robohash", None)
    with pytest.raises(ImportError, match=r"cats.*ddpm-pipeline\[cats\]"):
        layers(17)
