"""What engines are compared with before they get work: asked for once in a run, by whatever starts engines first."""

from collections.abc import Callable

from scorer.canary import Forwards
from scorer.config import ScoreConfig
from scorer.engine import EngineConfig
from scorer.fake import faults, hashed_forwards
from scorer.forwards import ForwardTask, find_prompts
from shards.folder import ShardFolder


class SecondOpinion:
    """Call it: the forwards once transformers has computed them, else None; without prompts where they are not wanted.

    known: from the choice of the dtype.
    """

    def __init__(
        self,
        config: ScoreConfig,
        shards: ShardFolder,
        engine: EngineConfig,
        note: Callable[[str], None],
        known: Forwards | None = None,
    ) -> None:
        self._config, self._shards, self._engine, self._note = config, shards, engine, note
        self._forwards = known
        self._task: ForwardTask | None = None

    def begin(self, parts: list[str]) -> None:
        """Have it computed on rows of the first of `parts` that can be read, unless it is on its way."""
        if self._forwards is not None or self._task is not None:
            return
        engine, prompts, fake = self._engine, [], self._engine.kind == "fake"
        if self._config.canary and (not fake or faults().get("canary")):
            prompts = find_prompts(self._shards, parts, self._config.context, engine.vocab_size)
        if fake or not prompts:
            self._forwards = hashed_forwards(prompts, engine.dtype, engine.kept, engine.vocab_size)
            return
        dtypes = () if engine.dtype == "float32" else (engine.dtype,)
        self._task = ForwardTask(engine, prompts, dtypes, self._note)

    def __call__(self) -> Forwards | None:
        if self._forwards is None and self._task is not None:
            self._forwards = self._task.result()
        return self._forwards

    def tell(self, waited_for: bool) -> None:
        """Say when it begins and ends to be what the run waits for."""
        if self._task is not None:
            self._task.tell(waited_for)
