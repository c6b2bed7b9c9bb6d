"""Generation for evaluation: greedy or as the task says, and never as generation_config.json likes.

transformers 5 fills in whatever a call of `generate` leaves open from the checkpoint's own
generation_config.json. A repetition penalty or a minimal length in there changes the score of every
task that generates, and another checkpoint of the same model, without the file, scores otherwise.
"""

from __future__ import annotations

from typing import Any

# What the file knows better than the task: the ends of a text, and how the cache is kept.
KEPT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "cache_implementation",
    "cache_config",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "transformers_version",
)


def make_neutral(model: Any) -> dict[str, Any]:
    """Drop from `model.generation_config` all but `KEPT`; what was dropped.

    What a call gives to `generate` itself, as a task's generation_kwargs or --gen_kwargs, holds.
    """
    own = getattr(model, "generation_config", None)
    if own is None:  # a model that does not generate
        return {}
    asked = {name: value for name, value in own.to_diff_dict().items() if name[0] != "_"}
    kept = {name: value for name, value in asked.items() if name in KEPT}
    model.generation_config = type(own)(**kept)
    return {name: value for name, value in asked.items() if name not in kept}
