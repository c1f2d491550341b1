"""docs/equations.md covers the report and names code that exists; its formulas, also in Chinese, render everywhere."""

import re
from importlib import import_module
from typing import Any

import pytest

from ddpm_pipeline import AlphaDDPMScheduler
from helpers import ROOT

ENGLISH, CHINESE = (ROOT / "docs" / name for name in ("equations.md", "zh-CN/equations.md"))
PAGES = {page: page.read_text("utf-8") for page in (ENGLISH, CHINESE)}
NUMBERED = [f"{chapter}.{number}" for chapter, last in ((4, 12), (5, 8), (6, 12)) for number in range(1, last + 1)]
FORMULA = re.compile(r"\$\$\n(.+?)\n\$\$|\$([^$\n]+)\$", re.DOTALL)
CODE_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE_CODE = re.compile(r"`([^`\n]+)`")


def rows(page: str) -> list[list[str]]:
    """The cells of all tables that tell which function computes what, without their headings."""
    tables = re.findall(r"^\| [^|]+ \| [^|]+ \| function \|\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for table in tables for line in table.splitlines()]


def found(name: str) -> Any:
    """A method of the scheduler, or what a dotted path into the package names."""
    bare = name.partition("(")[0]
    if "." not in bare:
        return getattr(AlphaDDPMScheduler, bare)
    *modules, last = bare.split(".")
    here = import_module("ddpm_pipeline")
    for part in modules:
        here = getattr(here, part) if hasattr(here, part) else import_module(f"{here.__name__}.{part}")
    return getattr(here, "__annotations__", {}).get(last) or getattr(here, last)


def test_every_equation_of_the_report_is_in_a_table():
    listed = " ".join(row[0] for row in rows(PAGES[ENGLISH]))
    assert [number for number in NUMBERED if not re.search(rf"(?<![\d§.]){re.escape(number)}(?!\d)", listed)] == []


def test_every_relation_names_code_that_exists():
    for relation in rows(PAGES[ENGLISH]):
        names = [name for name in INLINE_CODE.findall(relation[-1]) if not name.startswith("--")]
        assert names, relation
        for name in names:
            if name not in ("unet", "timesteps", "output_trajectory"):  # the network, and arguments
                assert found(name), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_formulas_render_on_github_as_on_the_site(page):
    """GitHub reads Markdown first: it drops a backslash before punctuation, takes `}_t ..._` for emphasis and `|` for the end
    of a cell. It wants a space or a bracket before an opening dollar sign, and no letter after a closing one."""
    text = CODE_BLOCK.sub("", PAGES[page])
    for match in FORMULA.finditer(text):
        formula = match[1] or match[2]
        assert not re.search(r"\\[^A-Za-z]|[^A-Za-z0-9]_|[*|<>~`]|\n[=+#-]", formula), formula
        assert formula.count("{") == formula.count("}"), formula
        if match[2]:
            assert re.match(r'[\s(*"]', text[match.start() - 1]), text[match.start() - 20 : match.end()]
            assert not re.match(r"\w", text[match.end()]), text[match.start() : match.end() + 20]
