"""What can be wrong with a document or a file of a corpus, each said in one line."""


class BadDocument(ValueError):
    """A document that cannot be packed; the message names file, place, value and remedy."""


class BadFile(ValueError):
    """A file whose bytes are at fault, so that it cannot be packed: where it is, and the reason."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.reason = reason

    def __str__(self) -> str:
        where, reason = self.args
        return f"{where}: {reason}; or pass --on-bad-file reject to leave such files out whole"
