"""What --engine-args hands on to vLLM: KEY=VALUE pairs, checked without importing it.

What a run rests on is not among them: it has options of its own, is the same for every run, or would run code.
"""

import ast
import difflib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OPTIONS = {
    "model": "--model", "dtype": "--dtype", "tensor_parallel_size": "--tensor-parallel-size", "max_logprobs": "--top-k",
    "max_num_batched_tokens": "--max-num-batched-tokens", "data_parallel_size": "--num-engines",
}  # fmt: skip
"""Arguments that options of remit score decide."""
OWN = frozenset({
    "allowed_local_media_path", "allowed_media_domains", "code_revision", "config_format", "convert", "download_dir",
    "distributed_executor_backend", "enable_prefix_caching", "enable_prompt_embeds", "hf_config_path", "hf_overrides", "hf_token",
    "kv_events_config", "load_format", "logits_processors", "logprobs_mode", "master_addr", "master_port", "max_model_len",
    "model_class_overrides", "model_weights", "nnodes", "node_rank", "prefill_context_parallel_size", "revision", "runner",
    "scheduler_cls", "seed", "skip_tokenizer_init", "tokenizer", "tokenizer_mode", "tokenizer_revision", "trust_remote_code",
    "worker_cls", "worker_extension_cls",
})  # fmt: skip
"""Arguments that the scorer sets for every run, whose values would run code, read another model or listen to other machines,
or that take GPUs which Ray was not asked for."""
OWN_KINDS = re.compile(r"data_parallel.*|spec_.*|speculative.*|.*_transfer_config|.*_plugin|lora.*|enable_lora")
OF_THE_MACHINE = frozenset({"gpu_memory_utilization", "kv_cache_memory_bytes", "max_parallel_loading_workers"})
"""Arguments that say how much of a machine is taken: a run may go on with others, so no manifest records them."""


def parse_engine_args(entries: list[str]) -> dict[str, Any]:
    """{key: value} of KEY=VALUE entries; a value is JSON where it can be read as such, else a string.

    ValueError for an entry without a key or value, one that is given twice, or one that is not the user's to set.
    """
    found: dict[str, Any] = {}
    for entry in entries:
        key, equals, text = entry.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not (key.isidentifier() and equals and text):
            raise ValueError(f"--engine-args has {entry!r}, expected KEY=VALUE, for instance kv_cache_dtype=fp8")
        if key in OPTIONS:
            raise ValueError(f"--engine-args has {key}, which {OPTIONS[key]} decides; give that option")
        if key in OWN or OWN_KINDS.fullmatch(key):
            raise ValueError(f"--engine-args has {key}, which is not to be set: scoring rests on remit's own value")
        if key in found:
            raise ValueError(f"--engine-args has {key} twice, expected each key once")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = {"True": True, "False": False, "None": None}.get(text, text)
    stages = found.get("pipeline_parallel_size", 1)
    if not isinstance(stages, int) or isinstance(stages, bool) or stages < 1:
        raise ValueError(f"--engine-args has pipeline_parallel_size={stages}, expected a whole number of at least 1")
    return found


def require_known(arguments: dict[str, Any]) -> None:
    """ValueError where the installed vLLM has no argument of that name; says which is near."""
    known = known_arguments()
    for key in arguments:
        if known and key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ValueError(
                f"--engine-args has {key}, which the installed vLLM does not know"
                + (f"; did you mean {near[0]}?" if near else "; its EngineArgs lists what it takes")
            )


def require_stages_run(arguments: dict[str, Any], device: str) -> None:
    """ValueError for pipeline stages on CPUs, where engines of vLLM 0.32 start with them and die at the first prompt."""
    if device == "cpu" and arguments.get("pipeline_parallel_size", 1) > 1:
        raise ValueError(
            "--engine-args has pipeline_parallel_size above 1, which vLLM runs on GPUs only; --tensor-parallel-size "
            "divides a model among CPU cores too"
        )


def known_arguments() -> frozenset[str]:
    """Fields of vLLM's EngineArgs, read from its source; empty where that cannot be read."""
    spec = find_spec("vllm")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        try:
            tree = ast.parse((Path(folder) / "engine" / "arg_utils.py").read_text(encoding="utf-8"))
        except (OSError, SyntaxError):
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
                fields = (entry.target for entry in node.body if isinstance(entry, ast.AnnAssign))
                return frozenset(field.id for field in fields if isinstance(field, ast.Name))
    return frozenset()
