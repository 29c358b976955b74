"""Text: records of a task become examples, and examples become batches (:mod:`softprompts.tasks.encode`)."""

from softprompts.tasks.catalog import get_task
from softprompts.tasks.formats import END_TOKEN, Format, TextFormat, template_format
from softprompts.tasks.sources import data_root, read_records
from softprompts.tasks.task import SPLITS, TASKS, Source, Task, register

__all__ = [
    "END_TOKEN",
    "SPLITS",
    "TASKS",
    "Format",
    "Source",
    "Task",
    "TextFormat",
    "data_root",
    "get_task",
    "read_records",
    "register",
    "template_format",
]
