"""Settings of remit weights. Light to import, so that --help answers at once."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from pipelines.pages import check_output_file
from shards.ranges import require_at_least, require_not_negative
from trainer.mixture import Mixture, given_mixture
from trainer.objectives.settings import check_epsilon


@dataclass(frozen=True)
class WeightsConfig:
    """What an epsilon would do to a scored corpus: clipped shares and most affected tokens, without a model."""

    shards: tuple[str, ...] = ()
    """Shard folder with the log-probs of both: remit score, once with each of them; or several, as for remit train: A=0.7 B=0.3."""
    mix: Path | None = None
    """In place of --shards: file that describes a mixture, as for remit train. Its first weights count."""
    reference: str = "rl"
    """Name of the reference's log-probs (--name of remit score)."""
    base: str = "base"
    """Name of the base's log-probs."""
    json: Path | None = None
    """File to write the figures to, as JSON."""
    epsilons: str = "0.05,0.1,0.2,0.3,0.5,inf"
    """Clips to compare, with commas between; inf: no clip."""
    show_epsilon: float = 0.2
    """Clip at which the tokens of the vocabulary are ranked."""
    centring: Literal["row", "document", "none"] = "row"
    """As for remit train."""
    weight_map: Literal["sigmoid", "exp", "linear"] = "sigmoid"
    """As for remit train."""
    rows: int = 10_000
    """Random rows to read; 0: all. Of a mixture those of each source by its share."""
    top: int = 20
    """Tokens to show, of the most up-weighted and of the most down-weighted."""
    min_count: int = 20
    """Tokens that occur less often in the rows are not ranked."""
    seed: int = 0
    """Decides which rows are read."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    @cached_property
    def mixture(self) -> Mixture:
        """The folder or folders."""
        return given_mixture(self.shards, self.mix)

    def __post_init__(self) -> None:
        if isinstance(self.shards, str | Path):
            object.__setattr__(self, "shards", (str(self.shards),))
        if self.mix is None or self.shards:  # a file is read when it is asked for
            _ = self.mixture
        if self.reference == self.base:
            raise ValueError(
                f"--reference and --base are both {self.base!r}, expected the names of two columns; score the folder "
                "with the other model too, under another --name"
            )
        require_not_negative(self, "rows", expected="0 (all) or more")
        require_at_least(self, 1, "top", "min_count")
        require_at_least(self, 0, "seed")
        check_epsilon("--show-epsilon", self.show_epsilon)
        _ = self.epsilon_values
        if self.json is not None:
            check_output_file("--json", self.json)

    @property
    def epsilon_values(self) -> tuple[float, ...]:
        """Those of --epsilons, in its order, each once."""
        values = []
        for text in self.epsilons.split(","):
            try:
                values.append(float(text))
            except ValueError:
                raise ValueError(
                    f"--epsilons is {self.epsilons!r}, expected numbers with commas between, for instance 0.1,0.2,inf"
                ) from None
            check_epsilon("--epsilons", values[-1], "has")
        return tuple(dict.fromkeys(values))
