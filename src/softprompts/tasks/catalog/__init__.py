"""The known tasks, one short file per benchmark: a new file in this folder that calls ``register`` is all it takes."""

from __future__ import annotations

import importlib
import pkgutil

from softprompts.config import TaskConfig
from softprompts.tasks.task import TASKS, Task

__all__ = ["get_task", "load_catalog"]


def load_catalog() -> list[str]:
    """Import every file of this folder, which fills :data:`~softprompts.tasks.task.TASKS`; return the tasks' names."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return TASKS.names()


def get_task(task: str | TaskConfig) -> Task:
    """Look a task up, by name or as a recipe describes it (then its sources, templates and separator are set).

    Raises:
        ConfigError: There is no such task (the nearest name is in the message), or the recipe does not fit it.
    """
    load_catalog()
    if isinstance(task, str):
        return TASKS.get(task)
    return TASKS.get(task.name).configured(task)
