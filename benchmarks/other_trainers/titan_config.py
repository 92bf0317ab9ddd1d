"""A config of torchtitan for a tiny Qwen3 on CPUs: --module remit_rows --config benchmarks.other_trainers.titan_config.tiny_qwen3.

Environment: BASE, the Hugging Face folder that it begins with.
"""

import json
import os
from pathlib import Path

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import TrainingConfig
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.qwen3 import (
    _EMBEDDING_INIT,
    _LINEAR_INIT,
    Qwen3Model,
    _build_qwen3_layers,
    _qwen3_norm,
    model_registry,
)
from torchtitan.trainer import Trainer


def model_of(base: Path) -> Qwen3Model.Config:
    """torchtitan's Qwen3 in the shape of a Hugging Face folder."""
    config = json.loads((base / "config.json").read_text())
    dim, head_dim, vocabulary = config["hidden_size"], config["head_dim"], config["vocab_size"]
    model = Qwen3Model.Config(
        vocab_size=vocabulary,
        dim=dim,
        norm=_qwen3_norm(dim),
        tok_embeddings=Embedding.Config(num_embeddings=vocabulary, embedding_dim=dim, param_init=_EMBEDDING_INIT),
        lm_head=Linear.Config(in_features=dim, out_features=vocabulary, param_init=_LINEAR_INIT),
        layers=_build_qwen3_layers(
            fuse_qkv=False,
            n_layers=config["num_hidden_layers"],
            dim=dim,
            n_heads=config["num_attention_heads"],
            n_kv_heads=config["num_key_value_heads"],
            head_dim=head_dim,
            hidden_dim=config["intermediate_size"],
            attn_backend="flex",
            rope=CosSinRoPE.Config(
                dim=head_dim,
                max_seq_len=config["max_position_embeddings"],
                theta=config["rope_parameters"]["rope_theta"],
            ),
        ),
    )
    for layer in model.layers:  # flex attention has no gradient on a CPU; whole rows need no mask
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return model


def tiny_qwen3() -> Trainer.Config:
    base = Path(os.environ["BASE"]).absolute()
    spec = model_registry("debugmodel")
    spec.model = model_of(base)
    return Trainer.Config(
        model_spec=spec,
        hf_assets_path=str(base),
        optimizer=default_adamw(lr=1e-3, weight_decay=0.0),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0),
        training=TrainingConfig(
            local_batch_size=4, global_batch_size=16, steps=8, mixed_precision_param="float32", disable_cuda_graphs=True
        ),
        metrics=MetricsProcessor.Config(log_freq=1, enable_tensorboard=True),
        checkpoint=CheckpointManager.Config(
            enable=True, initial_load_path=str(base), initial_load_in_hf=True, interval=1000, last_save_in_hf=True
        ),
        activation_checkpoint=None,
    )
