"""Recipes: YAML files that map to frozen dataclasses.

``load_recipe(path, TrainRecipe, overrides)`` reads a file, applies ``a.b=c`` overrides, refuses unknown keys with the
nearest known one and checks every type. ``to_dict`` gives the resolved recipe back; it is saved with every run.
"""

from softprompts.config.reading import decode, load_recipe, override, parse_override, replaced, to_dict
from softprompts.config.schema import (
    AutoPromptConfig,
    BaselineConfig,
    DecodingConfig,
    EvaluationConfig,
    FewShotConfig,
    InitConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    ReparamConfig,
    ScheduleConfig,
    SettingConfig,
    TaskConfig,
    TopLayersConfig,
    TrainingConfig,
    TrainRecipe,
)
from softprompts.config.together import member_recipes, varied
from softprompts.config.transfer import JudgeConfig, MatchConfig, PairConfig, ProjectorConfig, TransferRecipe

__all__ = [
    "AutoPromptConfig",
    "BaselineConfig",
    "DecodingConfig",
    "EvaluationConfig",
    "FewShotConfig",
    "InitConfig",
    "JudgeConfig",
    "LoraConfig",
    "MatchConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PairConfig",
    "ProjectorConfig",
    "PromptConfig",
    "ReparamConfig",
    "ScheduleConfig",
    "SettingConfig",
    "TaskConfig",
    "TopLayersConfig",
    "TrainRecipe",
    "TrainingConfig",
    "TransferRecipe",
    "decode",
    "load_recipe",
    "member_recipes",
    "override",
    "parse_override",
    "replaced",
    "to_dict",
    "varied",
]
