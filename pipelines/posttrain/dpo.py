"""Direct preference optimisation with TRL's DPOTrainer; the reference is the model that it starts from."""

from typing import Any

from pipelines.posttrain.run import Job, Stage, post_train, trl_config
from pipelines.posttrain.settings import DpoConfig
from pipelines.terminal import ShouldStop

FIELDS = ("prompt", "chosen", "rejected")


def dpo(config: DpoConfig, should_stop: ShouldStop) -> int:
    def trainer(job: Job) -> Any:
        import datasets
        import trl

        options = {"max_length": None, "beta": config.beta}
        arguments = trl_config(trl.DPOConfig, job.arguments, options, config.trainer_args())
        rows = [{field: example[field] for field in FIELDS} for example in job.examples]
        return trl.DPOTrainer(
            job.base.model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=job.tokenizer,
        )

    return post_train(config, Stage(FIELDS, ("chosen", "rejected"), 0, trainer), should_stop)
