"""A parent as an embedding model: every request at its own precision, by ``PoolingParams.extra_kwargs``."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from calibrate.evaluate.sliced_model import load_sliced_model

from .test_features import COMMON, WIDTHS
from .test_llm_api import answer_of, run_engine

pytestmark = pytest.mark.engine

SCRIPT = """
from vllm import PoolingParams

llm = engine(sys.argv[1], runner="pooling", convert="embed", **PRECISION)
asked = [PoolingParams(extra_kwargs={"precision": width}) for width in WIDTHS] + [PoolingParams()]
outputs = llm.embed(prompts(len(asked), 20), pooling_params=asked, use_tqdm=False)
print(json.dumps([[output.prompt_token_ids, output.outputs.embedding] for output in outputs]))
"""


def test_embeddings_are_those_of_the_slice(profiled_parent: Path) -> None:
    found = answer_of(run_engine(COMMON + SCRIPT, profiled_parent))
    for width, (ids, embedding) in zip([*WIDTHS, "8"], found, strict=True):
        slices = {name: load_sliced_model(profiled_parent, name) for name in (width, "2" if width != "2" else "8")}
        with torch.inference_mode():
            wanted, other = (normalize(model.model(torch.tensor([ids])).last_hidden_state[0, -1].float(), dim=0)
                             for model in slices.values())  # fmt: skip
        assert torch.dist(torch.tensor(embedding), wanted) < 0.02
        assert torch.dist(torch.tensor(embedding), other) > 0.05
