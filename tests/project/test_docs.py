"""Links between README and the docs lead to files and headings. `mkdocs build --strict` checks the site."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md"),
     *(ROOT / "benchmarks" / "cifar").glob("*.md")]
)  # fmt: skip


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_in_the_site_s_navigation():
    class Loader(yaml.SafeLoader):
        """Tags of Python objects are left alone."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def files(nav: object) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        return [file for item in (nav.values() if isinstance(nav, dict) else nav) for file in files(item)]

    named = files(settings["nav"])
    site = ROOT / settings["docs_dir"]
    assert all((site / name).is_file() for name in named)
    assert {(site / name).resolve() for name in named} == set(PAGES)
    # In the order in which a user needs them.
    order = ["README", "guide", "data", "models", "mllm", "records", "metrics", "methods", "decisions", "benchmarks",
             "architecture", "security"]  # fmt: skip
    places = [next(i for i, name in enumerate(named) if Path(name).stem == page) for page in order]
    assert places == sorted(places)


def test_the_architecture_page_names_files_that_are_there_and_the_layers_as_they_are_checked():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:megu_cli|docs)/[\w./]*)`", page)
    assert len(paths) > 20
    assert not [path for path in paths if not (ROOT / path).exists()]
    contract = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    units = re.findall(r"\w+", contract.replace("__main__", ""))
    drawn = re.search(r"```mermaid\n(.*?)```", page, re.DOTALL)[1]
    boxes = re.findall(r'^ *\w+\["([\w, ]+)', drawn, re.MULTILINE)
    assert [name for box in boxes for name in box.split(", ")] == units
