"""YAML files of options and captions: words stay as they are written, and a file that is none ends in an error at once."""

import pytest

from ddpm_pipeline.support.yaml_files import read_yaml

# what YAML 1.1 makes a truth value, a number in base 8, 16 or 60, a float, a date, or nothing of
WORDS = ["yes", "No", "on", "OFF", "010", "0x10", "12:30", "1e3", "1_000", ".5", ".nan", "2024-05-01", "=", "Null", "y", "0b1"]


def test_words_stay_as_they_are_written(tmp_path):
    lines = [*(f"w{index}: {word}" for index, word in enumerate(WORDS)), f"all: [{', '.join(WORDS)}]", "null: [null, ~]"]
    (tmp_path / "a.yaml").write_text("\ufeff" + "\r\n".join(lines), "utf-8")
    read = read_yaml(tmp_path / "a.yaml")
    assert list(read.values()) == [*WORDS, WORDS, ["null", "~"]] and "null" in read


def test_an_entry_without_a_value_is_none_and_in_quotes_a_text(tmp_path):
    (tmp_path / "a.yaml").write_text("a:\nb: null\nc: ~\nd: 'null'\ne: ''\nf: \"~\"\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": None, "b": None, "c": None, "d": "null", "e": "", "f": "~"}


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))


@pytest.mark.parametrize(
    "content",
    [
        BOMB, "[" * 400_000, "- " * 200_000, "{a: " * 100_000, "a: 1\na: 2", "? [a]\n: 1", "a: [", "a: 1\n---\nb: 2", "\0",
        b"\xff", "#" * 2**21,
    ],
    ids=["bomb", "brackets", "dashes", "braces", "twice", "key", "open", "two", "nul", "utf-8", "size"],
)  # fmt: skip
def test_what_cannot_be_meant_is_an_error_and_costs_nothing(content, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError):
        read_yaml(tmp_path / "a.yaml")
