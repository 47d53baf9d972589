"""When two greedy answers count as equal."""


def agree(first: dict, second: dict) -> bool:
    """Whether two greedy answers are equal, or part where two candidates are within 0.05."""
    for one, other, candidates in zip(first["tokens"], second["tokens"], first["top"], strict=True):
        if one != other:
            return str(other) in candidates and abs(candidates[str(one)] - candidates[str(other)]) < 0.05
    return True
