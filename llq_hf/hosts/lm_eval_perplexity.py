"""Token perplexity in fixed windows, as a task of lm-evaluation-harness.

The YAML files in `tasks/lm_eval` name the class `WindowPerplexity` here.

Protocol
--------
It is that of the GPTQ repository, and differs from lm-eval's `wikitext` (words, documents, rolling
windows) and from its rolling log-likelihood. The text is tokenized once and cut into N disjoint
windows of S tokens. The first token of a window is context only, so N * (S - 1) tokens are scored;
perplexity is exp of their mean negative log-likelihood.

How lm-eval runs it
-------------------
lm-eval has no request type for this, so the task has its own, `llq_windows_nll`. The evaluator
calls the model's method of that name, which is `windows_nll` below; `llq_hf._startup` adds it to
HFLM. The windows are spread over `SHARDS` documents, because data-parallel ranks divide the work by
documents.

Options
-------
`--metadata '{"text_file": "...", "seqlen": 256, "windows": 16}'` reaches every task as
`config.metadata`, together with the task's own metadata and with all model_args. Other keys are
ignored.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from torch import Tensor

from ..common.errors import LLQError
from ..data.evaluation import EVALUATION_TEXTS, load_evaluation
from ..data.windows import check_ids

SHARDS = 16
AUTO_BATCH_WINDOWS = 8  # where batch_size=auto begins; halved when the device runs out of memory
REQUEST_TYPE = "llq_windows_nll"
METRIC = "token_perplexity"

Scored = TypeVar("Scored")
_log = logging.getLogger("llq_hf")


class WindowPerplexity(ConfigurableTask):  # type: ignore[misc]  # lm_eval has no types
    """Token perplexity of one evaluation text; see the head of the file.

    The YAML says `dataset_kwargs: {text: NAME}`, a name of `EVALUATION_TEXTS`, and `metadata:
    {seqlen: S}`. The user's metadata may say `seqlen`, `windows` (only the first so many) and
    `text_file` (a path). The latter two may be objects by the name of a text. The `demo` text is
    bundled: only a file given under its own name replaces it.
    """

    request_type = REQUEST_TYPE

    def __init__(self, config: dict[str, Any]) -> None:
        # lm-eval checks that the output type is one of its own; the requests then carry ours
        checked = {"output_type": "loglikelihood_rolling", "metric_list": []}
        super().__init__(config=without_class(config) | checked)
        self.OUTPUT_TYPE = self.request_type

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Load the text; `ConfigurableTask.__init__` calls this."""
        import datasets

        name = (dataset_kwargs or {})["text"]
        metadata = self.config.metadata
        self.seqlen = _count("seqlen", metadata.get("seqlen"), least=2)
        asked = _for_text("windows", metadata.get("windows"), name)
        windows = None if asked is None else _count("windows", asked)
        text = load_evaluation(name, _text_file(metadata.get("text_file"), name))
        self.source = replace(text, first=windows)
        metadata.update(
            seqlen=self.seqlen, text_source=self.source.source, text_sha256=self.source.sha256
        )
        shards = [{"text": name, "shard": shard, "shards": SHARDS} for shard in range(SHARDS)]
        self.dataset = datasets.DatasetDict(test=datasets.Dataset.from_list(shards))

    def build_all_requests(self, **kwargs: Any) -> None:
        # the cache of --cache_requests goes by the task's name, and would mix up texts and seqlens
        super().build_all_requests(**kwargs | {"cache_requests": False})

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> str:
        return ""

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> str:
        return ""

    def fewshot_context(self, doc: Any, *args: Any, **kwargs: Any) -> str:
        return ""  # no shots, system prompt or chat template around a window

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Instance:
        """One request per shard. `arguments` are logged and hashed, so the text itself travels in
        `doc`.
        """
        arguments = (str(self.source), self.seqlen, doc["shard"], doc["shards"], *self.more())
        return Instance(
            request_type=self.request_type,
            doc={**doc, "source": self.source},
            arguments=arguments,
            idx=0,
            metadata=kwargs["metadata"],
        )

    def more(self) -> tuple[Any, ...]:
        """What else a request carries."""
        return ()

    def process_results(
        self, doc: Any, results: Sequence[tuple[float, int, int]]
    ) -> dict[str, Any]:
        logprob, tokens, seqlen = results[0]
        # the length that was scored, which is less than asked for where the model takes less
        self.config.metadata["seqlen"] = seqlen
        return {METRIC: (logprob, tokens)}

    def aggregation(self) -> dict[str, Callable[[Any], float]]:
        return {METRIC: token_perplexity}

    def higher_is_better(self) -> dict[str, bool]:
        return {METRIC: False}


def token_perplexity(shards: Sequence[tuple[float, int]]) -> float:
    """exp(mean negative log-likelihood) of shards `(sum of log-probabilities, tokens)`; those
    without windows weigh 0.
    """
    tokens = sum(count for _, count in shards)
    if tokens == 0:
        raise LLQError("No window was scored; drop --samples, or name shards that have windows.")
    nats = -math.fsum(logprob for logprob, _ in shards) / tokens
    if math.isnan(nats):
        _log.warning(
            "The model gives logits that are no numbers (NaN); its token perplexity is reported as"
            " NaN."
        )
    return math.inf if nats > 700 else math.exp(nats)


def windows_nll(lm: Any, requests: Sequence[Instance]) -> list[tuple[float, int, int]]:
    """Serve requests of the type `llq_windows_nll` with an HFLM.

    Gives (sum of log-probabilities, tokens, window length) for each shard. Log-softmax is float32
    whatever the model's dtype.
    """

    def score(batch_BS: Tensor) -> list[float]:
        return _batch_logprobs(lm, batch_BS)

    return [
        (math.fsum(sums), len(sums) * (length - 1), length)
        for sums, length in scored_shards(lm, requests, lambda _: score)
    ]


def scored_shards(
    lm: Any,
    requests: Sequence[Instance],
    scorer: Callable[[Instance], Callable[[Tensor], list[Scored]]],
) -> list[tuple[list[Scored], int]]:
    """For each request, what is scored of each window of its shard, and the windows' length.

    Shard i of n is windows i, i + n, i + 2n, ... Where windows are longer than the model allows,
    they get the model's length, with a warning. scorer: gives, for one of the requests of a text, a
    function that scores the windows [B, S] of a batch.
    """
    results: list[tuple[list[Scored], int]] = [([], 0)] * len(requests)
    for indices in _by_text(requests):
        first = requests[indices[0]]
        source = first.doc["source"]
        used = _usable_seqlen(lm, first.args[1], source.name)
        windows_NS = source.windows(lm.tokenizer, used)
        check_ids(windows_NS, getattr(lm.config, "vocab_size", None), f"The text {source.name!r}")
        chosen = {index: _shard_windows(requests[index], len(windows_NS)) for index in indices}
        # each window once, though data-parallel padding repeats a request
        needed = sorted({window for windows in chosen.values() for window in windows})
        scores = _in_batches(lm, windows_NS[needed], source.name, scorer(first))
        by_window = dict(zip(needed, scores, strict=True))
        for index, windows in chosen.items():
            results[index] = ([by_window[window] for window in windows], windows_NS.shape[1])
    return results


def _by_text(requests: Sequence[Instance]) -> list[list[int]]:
    """Indices of the requests, grouped by text (its name and digest), window length and whatever
    else they carry.
    """
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        text, seqlen, _, _, *more = request.args
        groups[(text, seqlen, *more)].append(index)
    return list(groups.values())


def _shard_windows(request: Instance, windows: int) -> range:
    _, _, shard, shards, *_ = request.args
    return range(shard, windows, shards)


def _usable_seqlen(lm: Any, seqlen: int, name: str) -> int:
    if seqlen <= lm.max_length:
        return seqlen
    _log.warning(
        "%s: the model takes at most %d tokens, so its windows are %d tokens long and not %d; the"
        " perplexity is not comparable with that of longer windows.",
        name,
        lm.max_length,
        lm.max_length,
        seqlen,
    )
    return int(lm.max_length)


def _in_batches(
    lm: Any, windows_NS: Tensor, name: str, score: Callable[[Tensor], list[Scored]]
) -> list[Scored]:
    """What `score` gives for each window, in batches of the size that lm-eval was asked for."""
    from accelerate.utils import find_executable_batch_size
    from tqdm import tqdm  # type: ignore[import-untyped]

    def all_of(batch_size: int) -> list[Scored]:
        found: list[Scored] = []
        with tqdm(total=len(windows_NS), desc=f"{name} windows", disable=lm.rank != 0) as bar:
            for batch_BS in torch.split(windows_NS, batch_size):
                found += score(batch_BS)
                bar.update(len(batch_BS))
        return found

    if len(windows_NS) == 0:  # all shards of this rank are empty
        return []
    if lm.batch_size != "auto":
        return all_of(int(lm.batch_size))
    return list(find_executable_batch_size(all_of, starting_batch_size=AUTO_BATCH_WINDOWS)())


def _batch_logprobs(lm: Any, batch_BS: Tensor) -> list[float]:
    with torch.no_grad():
        batch_BS = batch_BS.to(lm.device)
        logits_BSV = lm._model_call(batch_BS)
        # One window at a time: its float32 logits take 1 GiB (2048 tokens, vocabulary of 128k).
        losses = [
            torch.nn.functional.cross_entropy(
                logits_SV[:-1].float(), ids_S[1:].to(logits_SV.device), reduction="none"
            ).double()
            for logits_SV, ids_S in zip(logits_BSV, batch_BS, strict=True)
        ]
        return [-float(loss.sum()) for loss in losses]


def _count(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise LLQError(f"{name}={value!r} in the metadata should be an integer of {least} or more.")
    return value


def _text_file(value: Any, name: str) -> str | None:
    """The file for the text `name`; None: from the Hub, or for `demo` the bundled text."""
    if name == "demo" and not isinstance(value, Mapping):
        return None
    value = _for_text("text_file", value, name)
    if value is not None and not isinstance(value, str):
        raise LLQError(
            f"text_file={value!r} in the metadata is no path; give a string or an object of"
            " strings."
        )
    return value


def _for_text(key: str, value: Any, name: str) -> Any:
    """What the metadata say for the text `name`, where they may say it text by text."""
    if not isinstance(value, Mapping):
        return value
    unknown = [text for text in value if text not in EVALUATION_TEXTS]
    if unknown:
        known = ", ".join(EVALUATION_TEXTS)
        raise LLQError(
            f"{key} names the text {unknown[0]!r} in the metadata; the texts are {known}."
        )
    return value.get(name)


def without_class(config: dict[str, Any]) -> dict[str, Any]:
    """The config for ConfigurableTask, which does not know the key that chose this class."""
    return {key: value for key, value in config.items() if key != "class"}
