"""``softprompts VERB``: the table of verbs, and what every verb has in common.

A verb is a plain typer function in a module of its own beside this one. Its module is imported when the verb is
called, never for ``softprompts --help``, and torch is imported inside the verb, never by its module. So help is
quick, and a mistake in the options is reported before anything heavy is loaded.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import typer

from softprompts import __version__
from softprompts.errors import SoftPromptsError, TrainingInterrupted

__all__ = ["VERBS", "Verb", "build_app", "main", "verb_function"]

_EXIT_USER_ERROR = 2
_EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


class Verb(NamedTuple):
    """Where a verb lives, and the line that ``softprompts --help`` shows for it. A name of two words is of a group."""

    name: str
    module: str
    function: str
    help: str


VERBS = (
    Verb("quickstart", "softprompts.cli.quickstart", "quickstart", "Train a prompt on the bundled model, offline."),
    Verb("pretrain", "softprompts.cli.pretrain", "pretrain", "Train a small language model from raw text."),
    Verb("train", "softprompts.cli.train", "train", "Train what a recipe describes: a prompt or a baseline."),
    Verb("evaluate", "softprompts.cli.evaluate", "evaluate", "Score a prompt on a task, with standard errors."),
    Verb("score", "softprompts.cli.score", "score", "Score a file of predictions; compare two."),
    Verb("generate", "softprompts.cli.generate", "generate", "Lines in, lines out, each with a prompt of its own."),
    Verb("inspect", "softprompts.cli.inspect", "inspect", "Say what a saved prompt is and which model it is for."),
    Verb("similarity", "softprompts.cli.similarity", "similarity", "Compare prompts: a matrix, a heat map, a tree."),
    Verb("library", "softprompts.cli.library", "library", "List and search a folder of prompts."),
    Verb("bench", "softprompts.cli.bench", "bench", "Measure speed against PEFT, the plain model and the floor."),
    Verb("study", "softprompts.cli.study", "study", "Run an ablation of the papers; killed and restarted, it goes on."),
    Verb("report", "softprompts.cli.study", "report", "Tables, plots and verdicts of studies, as one HTML file."),
    Verb("convert", "softprompts.cli.convert", "convert", "Turn a saved prompt into PEFT's format, or back."),
    Verb("serve", "softprompts.cli.serve", "serve", "Serve a model with all prompts of a folder; OpenAI's protocol."),
    Verb("ensemble train", "softprompts.cli.ensemble", "train", "Train several prompts of one task in one pass."),
    Verb("ensemble predict", "softprompts.cli.ensemble", "predict", "Lines in, lines out, all prompts in one pass."),
    Verb("ensemble evaluate", "softprompts.cli.ensemble", "evaluate", "Average, best prompt and ensemble on a task."),
    Verb("transfer tasks", "softprompts.cli.transfer", "tasks", "Every prompt on every task, without training."),
    Verb("transfer models", "softprompts.cli.transfer", "models", "Prompts for another model out of prompts for this."),
    Verb("transfer steps", "softprompts.cli.transfer", "steps", "Updates until runs reach another run's score."),
)

_GROUPS = {
    "ensemble": "Several prompts of one task answer together.",
    "transfer": "What prompts do on other tasks, and how they come to other models.",
}
"""The line that ``softprompts --help`` shows for the first word of verbs with two."""


@dataclass
class _Session:
    """What the options in front of the verb said."""

    debug: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command line and exit: 0 done, 2 a user's mistake, 130 interrupted, 1 anything else.

    Args:
        arguments: The words after ``softprompts``; those of this process where left out.
    """
    _be_a_good_neighbour()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    build_app(arguments)(args=arguments, prog_name="softprompts")


def build_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """Make the typer application for one command line.

    Args:
        arguments: The command line. Only a verb that stands in it is imported; the others are listed by name.
    """
    session = _Session()
    app = typer.Typer(
        help="Steer a frozen language model with a few learned vectors.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(
        debug: Annotated[
            bool, typer.Option("--debug", envvar="SOFTPROMPTS_DEBUG", help="Show the traceback of every error.")
        ] = False,
        version: Annotated[
            bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        session.debug = debug

    groups: dict[str, typer.Typer] = {"": app}
    for verb in VERBS:
        if importlib.util.find_spec(verb.module) is not None:
            group, _, name = verb.name.rpartition(" ")
            if group not in groups:
                groups[group] = typer.Typer(no_args_is_help=True)
                app.add_typer(groups[group], name=group, help=_GROUPS[group])
            called = all(word in arguments for word in verb.name.split())
            function = _guarded(verb_function(verb), session) if called else _listed
            groups[group].command(name, help=None if called else verb.help)(function)
    return app


def verb_function(verb: Verb) -> Callable[..., Any]:
    """Import the function behind ``verb``."""
    function: Callable[..., Any] = getattr(importlib.import_module(verb.module), verb.function)
    return function


def _listed() -> None:
    """Stand in for a verb that is named in the help and not called."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"softprompts {__version__}")
        raise typer.Exit


def _guarded(function: Callable[..., Any], session: _Session) -> Callable[..., None]:
    """Turn the errors that a user can mend into one paragraph and an exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except SoftPromptsError as error:
            code = _EXIT_INTERRUPTED if isinstance(error, TrainingInterrupted) else _EXIT_USER_ERROR
            _fail(error, "interrupted" if isinstance(error, TrainingInterrupted) else "error", code, session)
        except KeyboardInterrupt as error:
            _fail(error, "interrupted", _EXIT_INTERRUPTED, session)

    return run


def _fail(error: BaseException, word: str, code: int, session: _Session) -> None:
    if session.debug:
        traceback.print_exception(error, file=sys.stderr)
    paragraph = " ".join(str(error).split())
    sys.stderr.write(f"{word}: {paragraph}\n" if paragraph else f"{word}\n")
    raise typer.Exit(code)


def _be_a_good_neighbour() -> None:
    """Set what the numerical libraries read when they are first imported, unless the user has set it.

    Threads that wait for work sleep instead of spinning: with more threads than free cores, spinning ones take the
    cores from those that have work. Tokenizers start no thread pool of their own, which would warn after a fork. The
    hub's and the loader's progress bars are for a terminal; in a log they are noise.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
