"""Training a base with experts: against a dense base of the same active parameters, and against transformers' own forward.

    python -m benchmarks.bench_moe        (make bench-moe; some minutes on two cores)

Variants take turns step by step in one process, each with its own optimizer: ours with the balancing loss, ours of the dense
base, and transformers' class with labels, whose loss has the balancing loss in it. In float32 and in bfloat16 with float32 weights.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
import transformers

from benchmarks.common import Claim, claim, make_shards, report
from benchmarks.training import Steps, synchronize
from shards import ShardFolder
from trainer.config import TrainConfig
from trainer.model import Base
from trainer.model_flops import count_model_flops
from trainer.setup import make_optimizer

ROUTER_AUX_LOSS = 0.001
SMALL = {"vocab_size": 16_384, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 32}
LARGE = {"vocab_size": 100_352, "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16, "head_dim": 128}
EXPERTS = {
    False: (16, 2, 256),
    True: (64, 8, 1024),
}  # on a CPU, on a GPU: experts, of which so many are chosen, and their width


def make_models(folder: Path, has_gpu: bool, seq_len: int) -> tuple[Path, Path]:
    """A base with experts and a dense one with as wide a feed-forward layer as a token's experts have together, random."""
    experts, chosen, width = EXPERTS[has_gpu]
    common = (LARGE if has_gpu else SMALL) | {
        "max_position_embeddings": seq_len, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0,
    }  # fmt: skip
    common["num_key_value_heads"] = common["num_attention_heads"]
    configs = {
        "experts": transformers.Qwen3MoeConfig(
            **common, num_experts=experts, num_experts_per_tok=chosen, moe_intermediate_size=width, norm_topk_prob=True,
            router_aux_loss_coef=ROUTER_AUX_LOSS,
        ),
        "dense": transformers.Qwen3Config(**common, intermediate_size=chosen * width),
    }  # fmt: skip
    for name, config in configs.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
    return folder / "experts", folder / "dense"


class Theirs:
    """Steps of transformers' class as it comes, on rows of full length; the optimizer is ours."""

    def __init__(self, folder: Path, ours: Steps, seq_len: int, rows: int, dtype: str, device: torch.device) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
        self.optimizer = make_optimizer(self.model, TrainConfig(("shards",), "", Path("run"), learning_rate=1e-5))
        self.autocast = Base(self.model, getattr(torch, dtype)).autocast
        vocabulary = self.model.config.vocab_size
        self.ids = torch.randint(1, vocabulary, (rows, seq_len), generator=torch.Generator().manual_seed(0)).to(device)
        self.device = device

    def step(self) -> float:
        synchronize(self.device)
        began = perf_counter()
        with self.autocast():
            loss = self.model(input_ids=self.ids, labels=self.ids, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)
        return perf_counter() - began


def compare(folder: Path, dtype: str, num_steps: int, rows: int, seq_len: int, device: torch.device) -> list[Claim]:
    """Ratios of steps in turn, in one dtype of the products."""
    experts, dense = folder / "experts", folder / "dense"
    shards = ShardFolder(folder / "packed")
    common = ("ntp", rows, rows, num_steps + 2, device, dtype)
    flops = {
        name: count_model_flops(transformers.AutoConfig.from_pretrained(path)) for name, path in
        (("experts", experts), ("dense", dense))
    }  # fmt: skip
    print(
        f"{dtype}: layers' MFLOP per token {flops['experts'].layers / 1e6:.2f} (experts) and {flops['dense'].layers / 1e6:.2f} (dense)"
    )
    trainers: dict[str, Steps | Theirs] = {
        "experts": Steps(shards, experts, *common, router_aux_loss=ROUTER_AUX_LOSS),
        "dense": Steps(shards, dense, *common),
    }
    trainers["transformers"] = Theirs(experts, trainers["experts"], seq_len, rows, dtype, device)
    for trainer in trainers.values():
        trainer.step()
    of_dense, of_theirs = [], []
    for index in range(num_steps):
        order = list(trainers) if index % 2 else list(reversed(trainers))  # who comes first gains nothing
        seconds = {name: trainers[name].step() for name in order}
        of_dense.append(seconds["dense"] / seconds["experts"])
        of_theirs.append(seconds["transformers"] / seconds["experts"])
        print(
            f"{dtype}, step {index}: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()),
            flush=True,
        )
    return [
        claim(f"experts / dense of the same active parameters, tokens/s, {dtype}", of_dense),
        claim(f"experts / transformers' own forward and loss, tokens/s, {dtype}", of_theirs, at_least=1.0),
    ]


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4, help="per step, in one forward pass")
    parser.add_argument("--seq-len", type=int, default=None, help="default 4096 on a GPU, 512 on a CPU")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    device, seq_len = torch.device("cuda" if has_gpu else "cpu"), options.seq_len or (4096 if has_gpu else 512)
    with TemporaryDirectory() as name:
        folder = Path(name)
        experts, _ = make_models(folder, has_gpu, seq_len)
        vocabulary = transformers.AutoConfig.from_pretrained(experts).vocab_size
        make_shards(folder / "packed", vocabulary, 2, max(8, 2 * options.rows), seq_len)
        claims = []
        for dtype in ["bfloat16"] if has_gpu else options.dtypes:
            claims += compare(folder, dtype, options.steps, options.rows, seq_len, device)
    return report("moe" if has_gpu else "moe_cpu", claims)


if __name__ == "__main__":
    sys.exit(main())
