"""What `verify` checks of the tokenizer's copy, and of what the folder says of the ids that its rows have."""

import numpy as np

from shards.fingerprint import tokenizer_fingerprint
from shards.folder import TOKEN_IDS, TOKENIZER, ShardFolder
from shards.tokens import added_tokens


class VocabularyCount:
    """Which ids the rows have, against what the folder says of them."""

    def __init__(self, folder: ShardFolder) -> None:
        self._folder, self._tokenizer = folder, folder.manifest.tokenizer
        self._occurrences_V = np.zeros(self._tokenizer["vocab_size"], dtype=np.int64)

    def add(self, ids: np.ndarray) -> None:
        """Count the ids of a record batch, int [tokens], all below vocab_size."""
        self._occurrences_V += np.bincount(ids, minlength=len(self._occurrences_V))

    def problems(self) -> list[str]:
        """Of a whole folder; where rows were selected, it may have fewer ids and tokens than the packed corpus."""
        if not self._folder.knows_token_ids:  # of an earlier release
            return []
        try:
            occurs_V = np.zeros(len(self._occurrences_V), dtype=bool)
            known_V = self._folder.token_ids()
            occurs_V[: len(known_V)] = known_V
            added = added_tokens(self._folder.tokenizer_json())
        except ValueError as error:
            return [str(error)]
        selected, problems = bool(self._folder.manifest.selections), []
        where = self._folder.store.where(f"{TOKENIZER}/{TOKEN_IDS}")
        found_V = self._occurrences_V > 0
        if np.any(found_V & ~occurs_V) or (not selected and np.any(occurs_V & ~found_V)):
            index = int(np.flatnonzero(found_V != occurs_V)[0])
            problems.append(f"{where}: says otherwise than the rows whether id {index} occurs")
        found = {token: int(self._occurrences_V[index]) for token, index in added.items() if found_V[index]}
        if not selected and found != self._tokenizer["added_tokens"]:
            problems.append(f"{where}: added tokens {found} found, the manifest says {self._tokenizer['added_tokens']}")
        return problems


def tokenizer_problems(folder: ShardFolder) -> list[str]:
    """What is wrong with the copy of the tokenizer."""
    problems = []
    try:
        for name in folder.tokenizer_files():
            try:
                folder.tokenizer_file(name)
            except ValueError as error:
                problems.append(str(error))
        if tokenizer_fingerprint(folder.tokenizer_json()) != folder.manifest.tokenizer["fingerprint"]:
            problems.append(
                f"{folder.store.where(TOKENIZER)}: is not the tokenizer of the manifest; copy that one back"
            )
    except ValueError as error:
        problems.append(str(error))
    return list(dict.fromkeys(problems))
