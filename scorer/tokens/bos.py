"""BOS of a corpus that has token ids: as it is found, the same for all its sources.

In: the sources and the tokenizer. Out: what --bos auto comes to.
"""

from scorer.config import PackConfig
from scorer.decompress import MAX_WINDOW
from scorer.faults import BadDocument, BadFile
from scorer.sources import Source
from scorer.tokenizer import PackTokenizer, choose_bos
from scorer.tokens.documents import begins_with
from scorer.tokens.read import Reading, holds_tokens, read_tokens

LOOKED_AT = 8  # sources, until one has a document


def own_bos(tokenizer: PackTokenizer) -> int | None:
    """The id with which documents may begin; None where it is EOS too, so that nobody can tell them apart."""
    bos = tokenizer.prefix[0] if len(tokenizer.prefix) == 1 else tokenizer.bos_token_id
    return None if bos == tokenizer.eos_token_id else bos


def bos_of_corpus(config: PackConfig, sources: list[Source], tokenizer: PackTokenizer) -> str:
    """--bos, with auto made always or never where there are token ids. ValueError where text beside them would begin
    otherwise than they do."""
    tokens = [source for source in sources if holds_tokens(source, config.tokens_field)]
    if config.bos != "auto" or not tokens:
        return config.bos
    bos = own_bos(tokenizer)
    vocabulary = max(tokenizer.encoder.get_vocab(with_added_tokens=True).values()) + 1
    reading = Reading(config.tokens_field, config.tokens_dtype, vocabulary, tokenizer.eos_token_id)
    found: bool | None = None
    source = tokens[0]
    for source in tokens[:LOOKED_AT] if bos is not None else []:
        assert bos is not None
        try:
            found = begins_with(read_tokens(source, reading, MAX_WINDOW), bos, tokenizer.eos_token_id)
        except (BadDocument, BadFile):  # told when its turn comes, or left out
            continue
        if found is not None:
            break
    has_text = len(tokens) < len(sources)
    if found is None:
        return "auto" if has_text else "never"
    begins = found
    if has_text and begins != (choose_bos(tokenizer, "auto") is not None):
        one, other = ("begin with BOS", "would not") if begins else ("begin without BOS", "would begin with it")
        raise ValueError(
            f"{source.where}: its documents {one}, and those that are text {other}; --bos always puts it in front of all, --bos never "
            "takes ids as they are and puts it in front of no text"
        )
    return "always" if begins else "never"
