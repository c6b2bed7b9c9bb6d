"""The model behind `lmms-eval --model llq`: quantize (once, cached), load the packed
checkpoint, ask it about images.

    lmms-eval --model llq --model_args ARGS --tasks llq_mllm --batch_size 8

ARGS                              | what is scored
pretrained=MODEL,method=M,bits=4  | a dense model, quantized first
pretrained=FOLDER                 | a packed checkpoint, as it is
method=none                       | the full-precision baseline

lmms-eval finds the class by an entry point.

Departures from lmms-eval's own models
--------------------------------------
* A row that cannot be asked (its image is missing or damaged, it has no image, its prompt is too
  long) ends the evaluation with an error that names the row. The others answer such rows with an
  empty string, which is then scored.
* With `text_only=true` rows without an image are asked as text, and counted in the results.
* Results carry method, options, nominal and stored bits, and the fingerprint under `llq`.
* The command exits with 1 where an evaluation failed. See the hooks at the end of this file, which
  `_startup` puts in place.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm  # type: ignore[import-untyped]

from ..common.errors import LLQError
from ..common.machine import usable_device
from ..common.words import one_line
from ..layers.kv_cache import generate_packed
from ..models.vision import Prompt, VisionModel, truncated_images_refused
from .hf_quantizer import check_quantized, described
from .model_args import ModelArgs
from .neutral import make_neutral

DEFAULT_MODEL = "llava-hf/llama3-llava-next-8b-hf"
HOST_OPTIONS = {"device", "dtype", "batch_size", "text_only"}
# generation_kwargs of a task: those that generate() takes, and those that mean something only to
# llava's own code (how it cuts images) or are done here.
GENERATION = {"do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty"}
NOT_FOR_GENERATE = {"image_aspect_ratio", "until", "max_new_tokens"}


class LLQ(lmms):  # type: ignore[misc]
    """Its model_args are those of `ModelArgs`, of the method, and dtype, device, batch_size,
    text_only.
    """

    is_simple = True  # requests carry a text and a function that finds the images

    def __init__(self, **options: Any) -> None:
        super().__init__()
        asked, host = ModelArgs.split(options, DEFAULT_MODEL, HOST_OPTIONS)
        if asked.base is not None:
            raise LLQError("base=... is what llq_kl compares with, a task of lm-eval; leave it out")
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        several = self._world_size > 1
        device = str(self.accelerator.device) if several else usable_device(host.get("device"))
        dtype = host.get("dtype", "auto")
        loadable = asked.loadable(device, dtype)
        self.vision = VisionModel.load(loadable.path, loadable.revision, device, dtype)
        if loadable.quantized:
            check_quantized(self.vision.model)
        self._dropped = make_neutral(self.vision.model)
        if asked.kv_cache_bits is not None:
            generate_packed(self.vision.model, asked.kv_cache_bits)
        self.batch_size = _batch_size(host.get("batch_size"))
        self.text_only = bool(host.get("text_only", False))
        self.asked_as_text = 0

    @property
    def device(self) -> torch.device:
        found: torch.device = self.vision.model.device
        return found

    def llq(self) -> dict[str, Any]:
        """What the results file says about what was scored."""
        ignored = {"generation_config_ignored": self._dropped} if self._dropped else {}
        return {
            **described(self.vision.model),
            **ignored,
            "rows_without_image_asked_as_text": self.asked_as_text,
        }

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise LLQError(
            "llq answers questions; it cannot serve tasks that score given answers by"
            " log-likelihood"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise LLQError("llq answers single questions; it cannot serve tasks of several rounds")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer per request, in their order; LLQError, which names the row, for the first that
        cannot be asked.
        """
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0) as bar:
            for indices, options, until in self._batches(requests):
                prompts = [self._prompt(requests[index]) for index in indices]
                found = self.vision.answers(prompts, **options)
                for index, answer in zip(indices, found, strict=True):
                    for stop in until:
                        answer = answer.split(stop)[0]
                    answers[index] = answer
                    context, generation = requests[index].args[:2]
                    self.cache_hook.add_partial("generate_until", (context, generation), answer)
                bar.update(len(indices))
        return [answers[index] for index in range(len(requests))]

    def _batches(
        self, requests: list[Instance]
    ) -> Iterator[tuple[list[int], dict[str, Any], list[str]]]:
        """Batches (indices, options of generate(), strings to stop at): questions of like length
        that are to be answered in the same way.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        for indices in groups.values():
            options, until = _generation(requests[indices[0]])
            indices.sort(key=lambda index: len(requests[index].args[0]))
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size], options, until

    def _prompt(self, request: Instance) -> Prompt:
        context, _, doc_to_visual, doc_id, task, split = request.args
        where = f"{task}/{split} row {doc_id}"
        try:
            with truncated_images_refused():
                images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
                for image in images:
                    getattr(image, "load", bool)()  # Pillow reads no pixel before it must
        except Exception as error:  # of the task's own code, of datasets, of Pillow
            raise LLQError(
                f"{where}: its image is missing or damaged ({one_line(error)})"
            ) from error
        if any(not hasattr(image, "convert") for image in images):
            kind = type(images[0]).__name__
            raise LLQError(f"{where}: llq can be asked about images, and this row has {kind}")
        if not images and not self.text_only:
            raise LLQError(
                f"{where}: a question without an image; text_only=true in model_args asks it as"
                " text"
            )
        self.asked_as_text += not images
        return Prompt(context, images, where)


def _generation(request: Instance) -> tuple[dict[str, Any], list[str]]:
    """(options of generate(), strings that end an answer) of a task; LLQError for an option that
    would be ignored.
    """
    given = dict(request.args[1])  # a copy: requests share the object
    task = request.args[4]
    unknown = set(given) - GENERATION - NOT_FOR_GENERATE
    if unknown:
        raise LLQError(
            f"{task} asks for {', '.join(sorted(unknown))} in its generation_kwargs, which llq does"
            " not know"
        )
    until: str | Sequence[str] = given.get("until") or []
    taken = GENERATION
    if not given.get("temperature"):  # greedy: options of sampling would only raise warnings
        taken = GENERATION - {"temperature", "top_p", "top_k"}
        given["do_sample"] = False
    options = {key: given[key] for key in given if key in taken and given[key] is not None}
    options["max_new_tokens"] = int(given.get("max_new_tokens") or 1024)
    return options, [until] if isinstance(until, str) else list(until)


def _batch_size(value: Any) -> int:
    try:
        size = int(value or 1)
    except ValueError:
        size = 0
    if size < 1:
        raise LLQError(f"batch_size={value!r} is no number of questions; give 1 or more")
    return size


# --- hooks ----------------------------------------------------------------------------------------


def carrying_llq(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap lmms-eval's `evaluate` so that its results say what was scored."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        results = evaluate(*args, **kwargs)
        lm = kwargs.get("lm", args[0] if args else None)
        if results is not None and isinstance(lm, LLQ):
            results["llq"] = lm.llq()
        return results

    return wrapped


def failing_loudly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of lmms-eval's command, so that an error ends the command with `--model llq`;
    its caller would only log it.

    The command's arguments are the function's only argument, or its `cli_args`. Without them a
    program called it, and the error is raised as it is.
    """

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        command = kwargs.get("cli_args") or (args[0] if args else None)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if getattr(command, "model", None) != "llq":
                raise
            if not isinstance(error, LLQError):
                traceback.print_exc()
            print(f"Error: {error}", file=sys.stderr)
            raise SystemExit(1) from error

    return wrapped
