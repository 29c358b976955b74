"""What every verb has in common: quick help, one clear paragraph for a user's mistake, exit codes."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import softprompts
from softprompts.cli import main as cli
from softprompts.errors import ConfigError, DataNotFoundError, MissingExtraError, TrainingInterrupted

HEAVY = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "matplotlib", "sacrebleu")


def in_new_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Make a function the only verb, called ``probe``."""

    def register(function: Callable[..., Any]) -> None:
        module = types.ModuleType("softprompts.cli.probe")
        module.__spec__ = types.SimpleNamespace(name=module.__name__)  # find_spec reads it and asks for no more
        module.probe = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "VERBS", (cli.Verb("probe", module.__name__, "probe", "Probe it."),))

    return register


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    return exit_info.value.code


def failing(error: BaseException) -> Callable[[], None]:
    def probe() -> None:
        raise error

    return probe


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_answers_in_half_a_second():
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = in_new_process("-m", "softprompts", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    # Processor time: on a free machine that is what the clock shows, and other programs do not add to it.
    assert statistics.median(seconds) < 0.5, seconds


HELP = [["--help"], ["--version"], *([*verb.name.split(), "--help"] for verb in cli.VERBS)]


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_imports_nothing_heavy(arguments: Sequence[str]):
    name = " ".join(word for word in arguments if not word.startswith("-"))
    if name in {verb.name for verb in cli.VERBS} - registered():
        pytest.skip(f"{name} is not in this build")
    code = (
        "import sys\nfrom softprompts.cli.main import main\n"
        f"try:\n    main({list(arguments)!r})\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = in_new_process("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def registered() -> set[str]:
    """The verbs that the command line offers; those of a group with its name in front."""
    app = cli.build_app()
    names = {command.name or "" for command in app.registered_commands}
    for group in app.registered_groups:
        assert group.typer_instance is not None
        names |= {f"{group.name} {command.name}" for command in group.typer_instance.registered_commands}
    return names


def test_help_lists_every_verb_with_its_line():
    done = in_new_process("-m", "softprompts", "--help", COLUMNS="120")
    known = registered()
    for verb in cli.VERBS:
        group, _, _ = verb.name.rpartition(" ")
        if not group:
            assert (f" {verb.name} " in done.stdout) == (verb.name in known)
            assert (verb.help in done.stdout) == (verb.name in known)
        elif verb.name in known:
            assert f" {group} " in done.stdout


def test_help_of_a_group_lists_its_verbs():
    known = registered()
    for group in sorted({verb.name.split()[0] for verb in cli.VERBS if " " in verb.name and verb.name in known}):
        done = in_new_process("-m", "softprompts", group, "--help", COLUMNS="120")
        for verb in cli.VERBS:
            name = verb.name.removeprefix(f"{group} ")
            if name != verb.name and verb.name in known:
                assert f" {name} " in done.stdout
                assert verb.help in done.stdout


def test_verbs_have_the_options_of_their_functions():
    for verb in cli.VERBS:
        if verb.name in registered():
            assert callable(cli.verb_function(verb))
            done = in_new_process("-m", "softprompts", *verb.name.split(), "--help")
            assert done.returncode == 0, done.stderr
            assert f"softprompts {verb.name}" in done.stdout


def test_help_names_a_verb_once():
    names = [verb.name for verb in cli.VERBS]
    assert len(names) == len(set(names))


def test_version(capsys: pytest.CaptureFixture[str]):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"softprompts {softprompts.__version__}\n"


def test_no_arguments_shows_help(capsys: pytest.CaptureFixture[str]):
    assert run() in {0, 2}  # typer before and after 0.15.2
    captured = capsys.readouterr()
    assert "Usage: softprompts" in captured.out + captured.err


def test_unknown_verb_names_the_nearest(verb, capsys: pytest.CaptureFixture[str]):
    verb(lambda: None)
    assert run("prob") == 2
    assert "probe" in capsys.readouterr().err


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("unknown key 'a':\n  did you mean 'b'?"),
        DataNotFoundError("no file 'x'"),
        MissingExtraError("install softprompts[serve]"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_users_mistake_is_one_paragraph_and_exit_2(error: Exception, verb, capsys: pytest.CaptureFixture[str]):
    verb(failing(error))
    assert run("probe") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: {' '.join(str(error).split())}\n"


def test_debug_shows_the_traceback_too(verb, capsys: pytest.CaptureFixture[str]):
    verb(failing(ConfigError("wrong")))
    assert run("--debug", "probe") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last)")
    assert printed.endswith("error: wrong\n")


def test_debug_can_be_set_in_the_environment(verb, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOFTPROMPTS_DEBUG", "1")
    verb(failing(ConfigError("wrong")))
    assert run("probe") == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupted_training_says_how_to_resume(verb, capsys: pytest.CaptureFixture[str]):
    verb(failing(TrainingInterrupted("step 7 is saved; go on with softprompts train r.yaml --resume")))
    assert run("probe") == 130
    assert capsys.readouterr().err == "interrupted: step 7 is saved; go on with softprompts train r.yaml --resume\n"


def test_control_c_is_no_traceback(verb, capsys: pytest.CaptureFixture[str]):
    verb(failing(KeyboardInterrupt()))
    assert run("probe") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_mistake_of_ours_keeps_its_traceback(verb):
    verb(failing(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main(["probe"])


def test_a_wrong_option_is_exit_2(verb, capsys: pytest.CaptureFixture[str]):
    verb(lambda: None)
    assert run("probe", "--no-such-option") == 2
    assert "--no-such-option" in capsys.readouterr().err


# --- the environment and the package ---------------------------------------------------------------------------------


def test_thread_settings_of_the_user_win():
    code = (
        "import os\nfrom softprompts.cli.main import main\n"
        "try:\n    main(['--version'])\nexcept SystemExit:\n    pass\nprint(os.environ['OMP_WAIT_POLICY'])"
    )
    unset = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=unset, check=True)
    assert done.stdout.splitlines()[-1] == "PASSIVE"
    assert in_new_process("-c", code, OMP_WAIT_POLICY="ACTIVE").stdout.splitlines()[-1] == "ACTIVE"


def test_importing_the_package_imports_nothing_heavy():
    done = in_new_process("-c", f"import sys, softprompts\nprint([name for name in {HEAVY!r} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_every_public_name_can_be_had():
    for name in softprompts.__all__:
        assert getattr(softprompts, name) is not None
        assert name in dir(softprompts)
    assert set(softprompts._HOME) | {"__version__"} == set(softprompts.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'FrozenLm'"):
        _ = softprompts.FrozenLm
