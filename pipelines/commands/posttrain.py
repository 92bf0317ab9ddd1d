"""remit sft, dpo and rl: post-train a model with TRL."""

from pipelines.models import resolve_model
from pipelines.posttrain.settings import DpoConfig, RlConfig, SftConfig
from pipelines.terminal import ShouldStop


def sft(config: SftConfig, should_stop: ShouldStop) -> int:
    resolve_model("--model", config.model)  # a mistyped path is told before the seconds of the imports
    from pipelines.posttrain.sft import sft

    return sft(config, should_stop)


def dpo(config: DpoConfig, should_stop: ShouldStop) -> int:
    resolve_model("--model", config.model)  # a mistyped path is told before the seconds of the imports
    from pipelines.posttrain.dpo import dpo

    return dpo(config, should_stop)


def rl(config: RlConfig, should_stop: ShouldStop) -> int:
    resolve_model("--model", config.model)  # a mistyped path is told before the seconds of the imports
    from pipelines.posttrain.rl import rl

    return rl(config, should_stop)
