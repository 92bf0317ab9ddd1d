"""Supervised fine-tuning with TRL's SFTTrainer: the loss is on the completion and the end token."""

from typing import Any

from pipelines.posttrain.run import Job, Stage, post_train, trl_config
from pipelines.posttrain.settings import SftConfig
from pipelines.terminal import ShouldStop

FIELDS = ("prompt", "completion")


def sft(config: SftConfig, should_stop: ShouldStop) -> int:
    def trainer(job: Job) -> Any:
        import datasets
        import trl

        arguments = trl_config(trl.SFTConfig, job.arguments, {"max_length": None}, config.trainer_args())
        rows = [{field: example[field] for field in FIELDS} for example in job.examples]
        return trl.SFTTrainer(
            job.base.model, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=job.tokenizer
        )

    return post_train(config, Stage(FIELDS, ("completion",), 0, trainer), should_stop)
