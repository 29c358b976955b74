"""Recipes: YAML files that map to frozen dataclasses.

``load_recipe(path, TrainRecipe, overrides)`` reads a file, applies ``a.b=c`` overrides, refuses unknown keys with the
nearest known one and checks every type. ``to_dict`` gives the resolved recipe back; it is saved with every run.
"""

from softprompts.config.reading import decode, load_recipe, override, parse_override, replaced, to_dict
from softprompts.config.schema import (
    DecodingConfig,
    EvaluationConfig,
    InitConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    ReparamConfig,
    ScheduleConfig,
    SettingConfig,
    TaskConfig,
    TrainingConfig,
    TrainRecipe,
)
from softprompts.config.together import member_recipes, varied

__all__ = [
    "DecodingConfig",
    "EvaluationConfig",
    "InitConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PromptConfig",
    "ReparamConfig",
    "ScheduleConfig",
    "SettingConfig",
    "TaskConfig",
    "TrainRecipe",
    "TrainingConfig",
    "decode",
    "load_recipe",
    "member_recipes",
    "override",
    "parse_override",
    "replaced",
    "to_dict",
    "varied",
]
