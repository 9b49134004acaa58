"""Bare mlx-lm, what benchmarks compare with: it makes as many tokens as it is asked for."""

import json

from stage_worker.baseline import Baseline
from stage_worker.loading import DTypePolicy
from stage_worker.tiny_models import write_tiny_model


def test_an_answer_goes_on_behind_the_models_end_of_sequence(tmp_path):
    write_tiny_model(tmp_path, "llama")
    free = Baseline(tmp_path, DTypePolicy.F32)
    made = free.single([5, 6, 7], 12)["tokens"]
    names = {value: key for key, value in free.tokenizer.get_vocab().items()}
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["eos_token"] = names[made[3]]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ended = Baseline(tmp_path, DTypePolicy.F32)
    assert ended.tokenizer.eos_token_id == made[3]
    assert ended.single([5, 6, 7], 12)["tokens"] == made
