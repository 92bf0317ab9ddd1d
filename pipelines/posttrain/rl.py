"""Reinforcement learning with TRL's GRPOTrainer and a verifiable reward; all columns of the data reach the reward."""

from typing import Any

from pipelines.console import ShouldStop
from pipelines.posttrain.rewards import load_reward
from pipelines.posttrain.run import Job, Stage, post_train, trl_config
from pipelines.posttrain.settings import RlConfig


def rl(config: RlConfig, should_stop: ShouldStop) -> int:
    reward = load_reward(config.reward)
    fields = ("prompt", "answer") if config.reward == "answer" else ("prompt",)

    def trainer(job: Job) -> Any:
        import datasets
        import trl

        options = {
            "beta": config.beta,
            "num_generations": config.num_generations,
            "max_completion_length": config.max_completion_length,
            "temperature": config.temperature,
            "use_vllm": config.use_vllm,
        }
        arguments = trl_config(trl.GRPOConfig, job.arguments, options, config.trainer_args())
        return trl.GRPOTrainer(
            job.base.model,
            reward_funcs=reward,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(job.examples),
            processing_class=job.tokenizer,
        )

    return post_train(config, Stage(fields, (), config.max_completion_length, trainer), should_stop)
