"""The configuration: every setting declared once (schema), read from YAML (loading), in presets and templates."""

from megu_cli.config.base import Section, checked_path
from megu_cli.config.loading import changed, load_config, parse_override, section
from megu_cli.config.model_sources import has_weights
from megu_cli.config.presets import PRESETS, preset_settings
from megu_cli.config.schema import (
    CompareConfig,
    Config,
    EvalConfig,
    FinetuneConfig,
    LabelsConfig,
    NoiseConfig,
    ProxyConfig,
    TrainConfig,
    TransitionConfig,
    get,
)
from megu_cli.config.sources import DataConfig, ForgetConfig, MLLMConfig, ModelConfig, RandomForget

__all__ = [
    "PRESETS", "CompareConfig", "Config", "DataConfig", "EvalConfig", "FinetuneConfig", "ForgetConfig",
    "LabelsConfig", "MLLMConfig", "ModelConfig", "NoiseConfig", "ProxyConfig", "RandomForget", "Section", "TrainConfig",
    "TransitionConfig", "changed", "checked_path", "get", "has_weights", "load_config", "parse_override",
    "preset_settings", "section",
]  # fmt: skip
