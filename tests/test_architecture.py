"""The picture of docs/explanation/architecture.md, enforced; and the checker itself, on trees that break each rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import architecture as rules

ROOT = Path(__file__).resolve().parent.parent

RULES = [
    rules.layer_violations,
    rules.eager_root_imports,
    rules.import_cycles,
    rules.relative_imports,
    rules.long_files,
    rules.long_functions,
    rules.banned_names,
    rules.local_imports,
    rules.export_violations,
]

Rule = Callable[[rules.Tree], list[str]]


@pytest.fixture(scope="module")
def source() -> rules.Tree:
    modules = rules.read_tree(ROOT / "src")
    assert {"softprompts", "softprompts.config", "softprompts.cli.main"} <= modules.keys()
    return modules


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps_the_rule(rule: Rule, source: rules.Tree):
    assert rule(source) == []


def test_every_test_can_fail():
    assert rules.empty_tests(rules.read_tree(ROOT / "tests")) == []


def test_test_files_are_short_enough_to_read():
    assert rules.long_files(rules.read_tree(ROOT / "tests")) == []


# --------------------------------------------------------------------------------------------------------------------
# The checker on fabricated trees: each of these breaks exactly one rule in exactly one place.
# --------------------------------------------------------------------------------------------------------------------

CLEAN = {
    "softprompts/__init__.py": '"""Root."""\n',
    "softprompts/errors.py": '__all__ = ["Oops"]\n\n\nclass Oops(Exception):\n    pass\n',
    "softprompts/prompts/__init__.py": "",
    "softprompts/prompts/base.py": 'from softprompts.errors import Oops\n__all__ = ["f"]\ndef f():\n    raise Oops\n',
    "softprompts/training/__init__.py": 'from softprompts.training.loop import fit\n\n__all__ = ["fit"]\n',
    "softprompts/training/loop.py": 'from softprompts.prompts import base\n\n__all__ = ["fit"]\n\nfit = base.f\n',
}


def tree(tmp_path: Path, changed: dict[str, str] | None = None) -> rules.Tree:
    """Write CLEAN with some files replaced; ``training/loop`` stands for ``softprompts/training/loop.py``."""
    files = CLEAN | {f"softprompts/{name}.py": text for name, text in (changed or {}).items()}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return rules.read_tree(tmp_path)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_a_clean_tree(rule: Rule, tmp_path: Path):
    assert rule(tree(tmp_path)) == []


BROKEN = [
    ("upwards", rules.layer_violations, {"prompts/base": "import softprompts.training.loop\n"}, "'training'"),
    ("from upwards", rules.layer_violations, {"prompts/base": "from softprompts import training\n"}, "'training'"),
    ("sideways", rules.layer_violations, {"models/frozen": "from softprompts.prompts.base import f\n"}, "'prompts'"),
    (
        "for type checking",
        rules.layer_violations,
        {"errors": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import softprompts.prompts\n"},
        "'prompts'",
    ),
    ("in a function", rules.layer_violations, {"errors": "def f():\n    import softprompts.prompts\n"}, "'prompts'"),
    ("unknown unit", rules.layer_violations, {"attic/old": "x = 1\n"}, "'attic' has no place"),
    ("through the root", rules.layer_violations, {"errors": "from softprompts import PromptedLM\n"}, "package itself"),
    ("eager root", rules.eager_root_imports, {"__init__": "from softprompts.errors import Oops\n"}, "prompts.errors"),
    (
        "cycle",
        rules.import_cycles,
        {"prompts/a": "import softprompts.prompts.b\n", "prompts/b": "from softprompts.prompts import a\n"},
        "softprompts.prompts.a -> softprompts.prompts.b -> softprompts.prompts.a",
    ),
    ("relative", rules.relative_imports, {"training/loop": "from . import base\n"}, "loop.py:1"),
    ("long file", rules.long_files, {"errors": "\n" * 401}, "401 lines"),
    ("long function", rules.long_functions, {"errors": "def f():\n" + "    x = 1\n" * 60}, "'f' has 61 lines"),
    ("long method", rules.long_functions, {"errors": "class C:\n  def f():\n" + "    x = 1\n" * 60}, "'f' has 61"),
    ("banned name", rules.banned_names, {"prompts/utils": ""}, "utils.py"),
    ("banned folder", rules.banned_names, {"common/text": ""}, "text.py"),
    ("local import", rules.local_imports, {"errors": "def f():\n    from json import loads\n"}, "inside 'f'"),
    ("no exports", rules.export_violations, {"errors": "x = 1\n"}, "no __all__"),
    ("unlisted", rules.export_violations, {"errors": '__all__ = ["x"]\nx = 1\ny: int = 2\n'}, "defines 'y'"),
    ("unlisted branch", rules.export_violations, {"errors": "__all__ = []\nif 1:\n    def z(): ...\n"}, "defines 'z'"),
    ("undefined", rules.export_violations, {"errors": '__all__ = ["x", "y"]\nx = 1\n'}, "lists 'y'"),
    ("imported only", rules.export_violations, {"prompts/base": 'import json\n__all__ = ["json"]\n'}, "lists 'json'"),
    ("twice", rules.export_violations, {"errors": '__all__ = ["x", "x"]\nx = 1\n'}, "twice"),
    ("no assertion", rules.empty_tests, {"errors": "def test_f():\n    print(1)\n"}, "'test_f' cannot fail"),
    ("assert True", rules.empty_tests, {"errors": "def test_f():\n    assert True\n"}, "'test_f' cannot fail"),
]


@pytest.mark.parametrize(("rule", "changed", "said"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_rule_finds_what_breaks_it(rule: Rule, changed: dict[str, str], said: str, tmp_path: Path):
    found = rule(tree(tmp_path, changed))
    assert len(found) == 1, found
    assert said in found[0]


ALLOWED = [
    ("docstring is not counted", rules.long_functions, {"errors": 'def f():\n    """' + "x\n" * 70 + '    """\n'}),
    (
        "cycle of types",
        rules.import_cycles,
        {
            "prompts/a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import softprompts.prompts.b\n",
            "prompts/b": "import softprompts.prompts.a\n",
        },
    ),
    ("verbs import late", rules.local_imports, {"cli/train": "def train():\n    import torch\n"}),
    ("version", rules.layer_violations, {"prompts/base": "from softprompts import __version__\n"}),
    ("type variable", rules.export_violations, {"errors": "from typing import TypeVar\nT = TypeVar('T')\n"}),
    ("expects an error", rules.empty_tests, {"errors": "def test_f():\n    with pytest.raises(E):\n        g()\n"}),
    ("asserts elsewhere", rules.empty_tests, {"errors": "def test_f():\n    torch.testing.assert_close(a, b)\n"}),
]


@pytest.mark.parametrize(("rule", "changed"), [row[1:] for row in ALLOWED], ids=[row[0] for row in ALLOWED])
def test_rule_lets_pass_what_is_meant_to(rule: Rule, changed: dict[str, str], tmp_path: Path):
    assert rule(tree(tmp_path, changed)) == []
