"""Lets a packed model say a few words as soon as its files are written.

A model that says nothing, one token for ever, or NaN was quantized in vain, and its maker should be
the first to know. Prompts are continued greedily, without a chat template. The words go into the
report as they are: whether they are true is not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ..common.machine import gpu_free_bytes
from ..common.words import one_line
from ..models.load import auto_class, no_bars
from .neutral import make_neutral

PROMPTS = ("The capital of France is", "Two plus two is", "Once upon a time")
TOKENS = 24  # of each answer at most
ROOM = 1.2  # memory to load a checkpoint in, as a multiple of its bytes
EMPTY, REPEATED, NOT_FINITE = "nothing", "one token again and again", "logits that are not finite"


def first_words(folder: Path, config: dict[str, Any], nbytes: int, device: str) -> dict[str, Any]:
    """What the model of a folder answers to `PROMPTS`, for its report.

    config: the whole config.json, which the folder need not hold yet. nbytes: of its tensors. Keys:
    "answers", a list of [prompt, answer]; "problem", where one of them is no language; instead of
    both "skipped", where the folder has no tokenizer or the model does not fit.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    where = torch.device(device)
    free = gpu_free_bytes(where)
    free = psutil.virtual_memory().available if free is None else free
    if nbytes * ROOM > free:
        need, have = (f"{part / 2**30:.1f} GiB" for part in (nbytes * ROOM, free))
        return {"skipped": f"loading the model takes {need}, and {have} are free"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        return {"skipped": "the folder has no tokenizer"}
    built = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    try:
        with no_bars():
            model = auto_class(built).from_pretrained(folder, config=built, dtype="auto").to(where)
        make_neutral(model)
        asked = [_answer(model.eval(), tokenizer, prompt) for prompt in PROMPTS]
    except Exception as error:  # whatever it is: hours of work are in the files
        return {"problem": f"an error ({one_line(error)})"}
    found: dict[str, Any] = {"answers": [[prompt, text] for prompt, text, _ in asked]}
    problems = sorted({problem for _, _, problem in asked if problem is not None})
    return {**found, "problem": ", ".join(problems)} if problems else found


def _answer(model: Any, tokenizer: Any, prompt: str) -> tuple[str, str, str | None]:
    """The prompt, what the model says next, and what is wrong with that."""
    ids_1T = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    new, problem = _continued(model, ids_1T)
    return prompt, tokenizer.decode(new, skip_special_tokens=True), problem


@torch.no_grad()
def _continued(model: Any, ids_1T: Tensor) -> tuple[list[int], str | None]:
    """The tokens that follow greedily, and what is wrong with them."""
    given = model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = given.sequences[0, ids_1T.shape[1] :].tolist()
    finite = all(bool(torch.isfinite(logits).all()) for logits in given.logits)
    return new, problem_of(new, finite)


def problem_of(tokens: Sequence[int], finite: bool) -> str | None:
    """What is wrong with an answer: EMPTY, REPEATED, NOT_FINITE, or None."""
    if not finite:
        return NOT_FINITE
    if len(tokens) <= 1:  # the end of the text at once
        return EMPTY
    return REPEATED if len(tokens) == TOKENS and len(set(tokens)) == 1 else None
