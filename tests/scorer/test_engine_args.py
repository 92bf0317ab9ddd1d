"""--engine-args: what may be handed on to vLLM, what is recorded of it, and what an engine's environment says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import score_to

from scorer.config import ScoreConfig
from scorer.engine import EngineConfig, compiled_code, environment
from scorer.engine_args import known_arguments, parse_engine_args, require_known
from scorer.placement import cpus_per_engine


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("kv_cache_dtype=fp8", {"kv_cache_dtype": "fp8"}),
        ("--kv-cache-dtype=fp8", {"kv_cache_dtype": "fp8"}),
        ("pipeline_parallel_size=2", {"pipeline_parallel_size": 2}),
        ("enable_expert_parallel=true", {"enable_expert_parallel": True}),
        ("enable_expert_parallel=True", {"enable_expert_parallel": True}),
        ("gpu_memory_utilization=0.9", {"gpu_memory_utilization": 0.9}),
        ('compilation_config={"level": 0}', {"compilation_config": {"level": 0}}),
        ("attention_backend=A=B", {"attention_backend": "A=B"}),
    ],
)
def test_values(entry: str, expected: dict[str, Any]) -> None:
    assert parse_engine_args([entry]) == expected


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["fp8"], "expected KEY=VALUE"),
        (["=fp8"], "expected KEY=VALUE"),
        (["kv cache=fp8"], "expected KEY=VALUE"),
        (["kv_cache_dtype="], "expected KEY=VALUE"),
        (["dtype=float16"], "which --dtype decides"),
        (["tensor-parallel-size=2"], "which --tensor-parallel-size decides"),
        (["data_parallel_size=2"], "which --num-engines decides"),
        (["data_parallel_rank=2"], "not to be set"),
        (["trust_remote_code=true"], "not to be set"),
        (["enable_prefix_caching=true"], "not to be set"),
        (["worker_extension_cls=mine.Worker"], "not to be set"),
        (['kv_transfer_config={"kv_connector_module_path": "mine"}'], "not to be set"),
        (["reasoning_parser_plugin=mine.py"], "not to be set"),
        (['speculative_config={"model": "other"}'], "not to be set"),
        (["master_addr=0.0.0.0"], "not to be set"),
        (["prefill_context_parallel_size=2"], "not to be set"),
        (["max_num_seqs=2", "max-num-seqs=3"], "twice"),
        (["pipeline_parallel_size=0"], "at least 1"),
        (["pipeline_parallel_size=two"], "at least 1"),
        (["pipeline_parallel_size=true"], "at least 1"),
    ],
)
def test_refused(tmp_path: Path, entries: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreConfig(str(tmp_path / "in"), "model", str(tmp_path / "out"), engine_args=entries)


@pytest.mark.usefixtures("starts_processes")
def test_known_names_are_those_of_vllm() -> None:
    code = (
        "import dataclasses, json; from vllm.engine.arg_utils import EngineArgs\n"
        "print(json.dumps([field.name for field in dataclasses.fields(EngineArgs)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert known_arguments() == set(json.loads(done.stdout.splitlines()[-1]))


def test_a_name_that_vllm_does_not_know() -> None:
    require_known({"kv_cache_dtype": "fp8", "attention_backend": "TRITON_ATTN"})
    with pytest.raises(ValueError, match="did you mean kv_cache_dtype"):
        require_known({"kv_cache_dtypes": "fp8"})


def test_an_engine_of_several_stages_takes_their_cores(tmp_path: Path) -> None:
    config = ScoreConfig(
        str(tmp_path / "in"),
        "m",
        str(tmp_path / "out"),
        tensor_parallel_size=2,
        engine_args=["pipeline_parallel_size=3"],
    )
    assert config.devices_per_engine == 6
    assert cpus_per_engine(config, 4) == 6


def engine_config(**settings: Any) -> EngineConfig:
    return EngineConfig(Path("m"), settings.pop("dtype", "bfloat16"), 64, 100, "", "", **settings)


def test_environment_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    values = environment(engine_config(device="cuda"), {}, [], 8192)
    assert values["NCCL_SOCKET_IFNAME"] == values["GLOO_SOCKET_IFNAME"] == "lo"
    assert values["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert "TRITON_F32_DEFAULT" not in values
    exact = environment(engine_config(device="cuda", dtype="float32"), {}, [], 8192)
    assert (exact["TRITON_F32_DEFAULT"], exact["NVIDIA_TF32_OVERRIDE"]) == ("ieee", "0")


def test_cores_are_divided_among_all_ranks() -> None:
    config = engine_config(tensor_parallel_size=2, arguments={"pipeline_parallel_size": 2})
    values = environment(config, {}, list(range(8)), 256)
    assert values["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,3|4,5|6,7"


def test_compiled_code_has_a_place_where_there_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert compiled_code() == str(tmp_path / "cache" / "vllm")
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert Path(compiled_code()).parent == tmp_path


@pytest.mark.usefixtures("engine")
def test_recorded_and_refused_when_they_differ(tmp_path: Path, packed: Path, reference_model: Path) -> None:
    out = tmp_path / "scored"
    given = ["max_num_seqs=3", "gpu_memory_utilization=0.5"]
    folder = score_to(out, packed, reference_model, engine_args=given)
    assert folder.manifest.references["rl"]["engine_args"] == {"max_num_seqs": 3}
    again = score_to(out, packed, reference_model, engine_args=["max_num_seqs=3", "gpu_memory_utilization=0.4"])
    assert again.manifest == folder.manifest
    for part in out.glob("**/*.arrow"):
        part.unlink()
    with pytest.raises(ValueError, match=r"--engine-args max_num_seqs is 3 there, 4 asked for now"):
        score_to(out, packed, reference_model, engine_args=["max_num_seqs=4"])
    with pytest.raises(ValueError, match="did you mean max_num_seqs"):
        score_to(tmp_path / "other", packed, reference_model, engine_args=["max_nun_seqs=4"])
    shutil.rmtree(out)


@pytest.mark.usefixtures("ray_session")
def test_stages_are_refused_on_cpus(tmp_path: Path, packed: Path, reference_model: Path) -> None:
    with pytest.raises(ValueError, match="runs on GPUs only"):
        score_to(tmp_path / "staged", packed, reference_model, engine_args=["pipeline_parallel_size=2"])
    assert not (tmp_path / "staged").exists()
