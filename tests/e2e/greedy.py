"""Greedy answers of an engine, and when two of them count as equal."""

READ = """
def greedy_answers(outputs):
    found = []
    for output in outputs:
        steps = output.outputs[0].logprobs
        found.append({"tokens": list(output.outputs[0].token_ids),
                      "top": [{str(token): value.logprob for token, value in step.items()} for step in steps]})
    return found
"""
"""Part of a script that runs an engine: what ``agree`` compares, of outputs with the logprobs of two candidates."""


def agree(first: dict, second: dict, tolerance: float = 0.05) -> bool:
    """Whether two greedy answers are equal, or part where two candidates are within ``tolerance``, of logprob."""
    for one, other, candidates in zip(first["tokens"], second["tokens"], first["top"], strict=True):
        if one != other:
            return str(other) in candidates and abs(candidates[str(one)] - candidates[str(other)]) < tolerance
    return True
