"""The pages, and functions that read them."""

import re

from tests.helpers import ROOT

PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')])


def page(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(name: str, language: str) -> list[str]:
    """Return the contents of the fenced blocks of a page."""
    return re.findall(rf'```{language}\n(.*?)```', page(name), re.DOTALL)
