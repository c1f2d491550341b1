"""The docs as a site, in build/site: pip install -e '.[docs]' && sphinx-build -W --keep-going docs build/site

Nothing is loaded from other servers: formulas are set by the MathJax of the package sphinx-mathjax-offline.
"""

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import sphinx.search
from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish

import ddpm_pipeline

DOCS = Path(__file__).parent
ROOT = DOCS.parent
REPOSITORY = os.environ.get("GITHUB_REPOSITORY") and f"https://github.com/{os.environ['GITHUB_REPOSITORY']}"  # in its workflows

project = "ddpm-pipeline"
author = "The ddpm-pipeline authors"
version = release = ddpm_pipeline.__version__
exclude_patterns = ["pictures"]
extensions = [
    "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton",
    "sphinx-mathjax-offline",
]  # fmt: skip

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # notebooks keep the outputs that they were committed with
nb_render_markdown_format = "myst"  # of outputs: with tables
highlight_language = "none"  # of blocks that name no language
suppress_warnings = ["misc.highlighting_failure"]  # of languages without colours, such as csv

default_role = "code"  # docstrings mark code by single backticks
smartquotes_action = "qe"  # quotes and ellipses: the dashes of --options stay
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "ddpm-pipeline"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = html_show_copyright = False


class SearchBoth(SearchEnglish):
    """English words, and in Chinese, which has no spaces, every pair of neighbouring characters as well."""

    def split(self, text: str) -> list[str]:
        runs = re.findall(r"[\u4e00-\u9fff]+", text)
        return [*super().split(text), *(a + b for run in runs for a, b in pairwise(run))]


def prepare_source(app: Sphinx, page: str, source: list[str]) -> None:
    """Links that lead out of docs/, such as ../src/file.py, lead to the repository's page of that file; where the repository is
    unknown, their text stays. Anchors of notebooks, in which Jupyter keeps capitals, become those of the site.
    Punctuation stays on the line of the formula before it. Links named after a file show its title instead.
    """

    def address(link: re.Match) -> str:
        text, path, anchor = link.groups()
        file = (DOCS / page).parent.joinpath(path).resolve()
        if file.is_relative_to(DOCS):
            return link[0]
        return f"[{text}]({REPOSITORY}/blob/main/{file.relative_to(ROOT).as_posix()}{anchor})" if REPOSITORY else text

    source[0] = re.sub(r"(?<!\")\$(?! )[^$\n]+(?<! )\$[，。；：、）,.;:)]", r"<span class=nowrap>\g<0></span>", source[0])
    source[0] = re.sub(r"\]\(#[^)]*", lambda link: link[0].lower(), source[0])
    source[0] = re.sub(r"(?<!!)\[([^][]*)\]\((\.\./[^)#]*)([^)]*)\)", address, source[0])
    source[0] = re.sub(r"\[[\w./-]+\.md\](?=\([\w./-]+\.md)", "[]", source[0])


def name_language(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Chinese pages say so, which decides how browsers draw their characters."""
    context["language"] = context["language_attr"] = "zh-CN" if "zh-CN" in page else "en"


def setup(app: Sphinx) -> None:
    sphinx.search.languages["en"] = SearchBoth
    app.connect("source-read", prepare_source)
    app.connect("html-page-context", name_language)
