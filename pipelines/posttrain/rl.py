"""Reinforcement learning with TRL's GRPOTrainer and a verifiable reward; all columns of the data reach the reward."""

from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

from pipelines.posttrain.rewards import load_reward
from pipelines.posttrain.run import Job, Stage, post_train, trl_config
from pipelines.posttrain.settings import RlConfig
from pipelines.terminal import ShouldStop


def rl(config: RlConfig, should_stop: ShouldStop) -> int:
    """As post_train; also raises ValueError for a --reward that cannot be found, or --use-vllm without vLLM."""
    if config.use_vllm and find_spec("vllm") is None:
        raise ValueError(
            "--use-vllm needs vLLM, which is not installed; in your checkout of remit: pip install '.[gpu]', or leave it out"
        )
    reward: Any = load_reward(config.reward)
    fields = ("prompt", "answer") if config.reward == "answer" else ("prompt",)

    def trainer(job: Job) -> Any:
        import datasets

        # TRL imports vLLM wherever it is installed, which takes seconds and changes transformers' classes
        unseen = patch("trl.import_utils.is_vllm_available", return_value=False)
        with nullcontext() if config.use_vllm else unseen:
            from trl import GRPOConfig, GRPOTrainer

        class Trainer(GRPOTrainer):
            def _get_train_sampler(self, dataset: Any = None) -> Any:
                sampler: Any = super()._get_train_sampler(dataset)
                if sampler.shuffle:
                    # TRL's draws each epoch's order after the one before: a run that resumes in the second epoch would
                    # see the first one's again. transformers says which epoch it is to samplers that ask.
                    sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(self.args.seed + epoch)
                return sampler

        options = {
            "beta": config.beta,
            "num_generations": config.num_generations,
            "max_completion_length": config.max_completion_length,
            "temperature": config.temperature,
            "use_vllm": config.use_vllm,
        }
        return Trainer(
            job.base.model,
            reward_funcs=reward,
            args=trl_config(GRPOConfig, job.arguments, options, config.trainer_args()),
            train_dataset=datasets.Dataset.from_list(job.examples),
            processing_class=job.tokenizer,
        )

    return post_train(config, Stage(fields, (), config.max_completion_length, trainer), should_stop)
