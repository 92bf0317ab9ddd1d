"""A few steps in OLMo-core on what remit export --to olmo-core wrote::

    python -m benchmarks.other_trainers.olmo_core_steps --rows EXPORTED --base BASE --out OUT --steps 8 --batch-rows 16

BASE is an OLMo 2 in a Hugging Face folder. Prints a JSON object for each step, and in `rows` which rows of the shards it had.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import tyro
from olmo_core.data import NumpyDataLoaderBase
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.hf.convert import convert_state_from_hf
from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig
from olmo_core.optim import AdamWConfig
from olmo_core.train import Duration, TrainerConfig
from olmo_core.train.callbacks import Callback

from trainer.integrations.olmo_core import ScoredCollator, ScoredRows, WeightedTrainModule


@dataclass(frozen=True)
class Settings:
    rows: Path
    base: Path
    out: Path
    reference: str | None = None
    objective: str = "remit"
    epsilon: float = 0.2
    steps: int = 8
    batch_rows: int = 16
    micro_rows: int = 4
    learning_rate: float = 1e-3


def build_model(base: Path) -> Any:
    """OLMo-core's OLMo 2 in the shape of a Hugging Face folder."""
    config = transformers.AutoConfig.from_pretrained(base)
    return TransformerConfig.llama_like(
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        block_name=TransformerBlockType.reordered_norm,
        qk_norm=True,
        rope_theta=config.rope_parameters["rope_theta"],
        layer_norm_eps=config.rms_norm_eps,
        feed_forward=FeedForwardConfig(hidden_size=config.intermediate_size, bias=False),
    ).build(init_device="cpu")


def load_weights(model: Any, base: Path) -> None:
    """Give the model the weights of a Hugging Face folder; a train module begins by drawing random ones."""
    ours = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model.load_state_dict(convert_state_from_hf(ours.config, ours.state_dict(), model_type=ours.config.model_type))


class Losses(Callback):
    """Collects what was logged, and the rows of each step."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}
        self.rows: list[list[int]] = []

    def pre_step(self, batch: dict[str, Any]) -> None:
        self.rows.append(batch["index"].tolist())

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.setdefault(step, {}).update(metrics)


def train(settings: Settings) -> list[dict[str, Any]]:
    dataset = ScoredRows.open(settings.rows, settings.reference)
    model = build_model(settings.base)
    module = WeightedTrainModule(
        model,
        AdamWConfig(lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        settings.micro_rows * dataset.sequence_length,
        dataset.sequence_length,
        objective=settings.objective,
        epsilon=settings.epsilon,
        max_grad_norm=1.0,
    )
    load_weights(module.model, settings.base)
    loader = NumpyDataLoaderBase.wrap_numpy_dataset(
        dataset,
        collator=ScoredCollator(pad_token_id=dataset.pad_token_id),
        global_batch_size=settings.batch_rows * dataset.sequence_length,
        work_dir=settings.out / "work",
        seed=0,
    )
    loader.reshuffle(epoch=1)
    trainer = TrainerConfig(
        save_folder=str(settings.out),
        save_overwrite=True,
        max_duration=Duration.steps(settings.steps),
        metrics_collect_interval=1,
        no_checkpoints=True,
        no_evals=True,
    ).build(module, loader)
    losses = Losses()
    trainer.add_callback("losses", losses)
    trainer.fit()
    logged = {
        step: found for step, found in sorted(losses.steps.items()) if "train/CE loss" in found
    }  # not of the dry run
    return [
        {"step": step, "loss": found["train/weighted loss"], "ntp_loss": found["train/CE loss"], "rows": rows}
        for (step, found), rows in zip(logged.items(), losses.rows)
    ]


def main() -> None:
    for step in train(tyro.cli(Settings, description=__doc__)):
        print(json.dumps(step))


if __name__ == "__main__":
    main()
