"""The generated pages are current, and what the other pages name exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from softprompts import errors

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "scripts" / "generate_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["recipe.md", "transfer-recipe.md", "presets.md", "cli.md", "errors.md", "tasks.md"])
def test_generated_page_is_current(name: str, generator: ModuleType):
    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert written == generator.PAGES[name](), "run `make reference`"


def test_errors_page_draws_every_error(generator: ModuleType):
    page = generator.errors_page()
    ours = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    assert {name for name in ours if re.search(rf"\b{name}\b", page)} == ours


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            assert linked.exists(), f"{target} does not exist"
            if anchor and linked.suffix == ".md":
                assert anchor in anchors(linked), f"{target} names no heading"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
