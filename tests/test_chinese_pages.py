"""The Chinese pages say what the English ones say: the same figures, formulas, code, links and tables, section by section."""

import posixpath
import re
from collections import Counter

import pytest

from helpers import ROOT

TRANSLATED = ("equations.md", "scheduler.md")  # in docs/
PAIRS = {"README.md": "README.zh-CN.md", **{f"docs/{name}": f"docs/zh-CN/{name}" for name in TRANSLATED}}
FORMULA = r"\$\$\n[^$]+\$\$|\$[^$\n]+\$"
CODE = r"`([^`\n]+)`"
LINK = r"\]\(([^)]+)\)"


def sections(page: str) -> list[tuple[str, str]]:
    """The level of every heading and the text below it, without blocks of code; what comes before the first has no level."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    parts = re.split(r"^(#+) .*\n", "\n" + text, flags=re.MULTILINE)
    return [("", parts[0]), *zip(parts[1::2], parts[2::2], strict=True)]


def linked(target: str, page: str) -> str:
    """A link as seen from the root and, if it leads to a Chinese page, to its English counterpart instead."""
    if "://" in target:
        return target
    file, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), file)) if file else page
    english = path.replace("zh-CN/", "").replace(".zh-CN", "")
    return english if english in PAIRS else f"{english}#{anchor}"  # headings of a translated page are translated


def contents(text: str, page: str) -> dict[str, Counter]:
    """What a translation keeps."""
    prose = re.sub("|".join((FORMULA, CODE, LINK)), "", text)
    return {
        "formulas": Counter(re.findall(FORMULA, text)),
        "code": Counter(re.findall(CODE, text)),
        "links": Counter(linked(target, page) for target in re.findall(LINK, text)),
        "figures": Counter(re.findall(r"\d+(?:[.,]\d+)*", prose)),
        "columns of each row": Counter(line.count("|") for line in text.splitlines() if line.startswith("|")),
    }


def blocks_of_code(page: str) -> list[str]:
    """Without comments, which are translated."""
    return re.findall(r"^```.*?^```", re.sub(r" +# .*", "", page), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("english", PAIRS)
def test_a_chinese_page_keeps_what_the_english_one_has(english):
    names = (english, PAIRS[english])
    pages = [(ROOT / name).read_text("utf-8") for name in names]
    ours, theirs = map(sections, pages)
    assert [level for level, _ in ours] == [level for level, _ in theirs]
    for (_, text), (_, translated) in zip(ours, theirs, strict=True):
        assert contents(text, names[0]) == contents(translated, names[1])
    assert blocks_of_code(pages[0]) == blocks_of_code(pages[1])
