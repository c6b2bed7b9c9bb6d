"""The model behind `lm_eval --model llq`: quantize (once, cached), load the packed checkpoint,
score it.

    lm_eval --model llq --model_args ARGS --tasks llq_wikitext2

ARGS                  | what is scored
method=quip,bits=2    | a dense model, quantized first
pretrained=FOLDER     | a packed checkpoint, as it is
pretrained=ADAPTER    | an adapter, on the base that it belongs to
method=none           | the full-precision baseline

`_startup` registers the class. Results carry method, options, nominal and stored bits, and the
fingerprint, and what of the checkpoint's generation_config.json was ignored (`neutral`). A
vision-language model is scored on text, by its language part.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from typing import Any

from lm_eval.models.huggingface import HFLM

from ..checkpoints.adapter import base_of, is_adapter
from ..checkpoints.dense import fetch
from ..checkpoints.packed import named_base
from ..common.errors import LLQError
from ..layers.kv_cache import generate_packed
from ..models.load import auto_class, takes_images
from .hf_quantizer import check_quantized, described
from .model_args import ModelArgs
from .neutral import make_neutral

DEFAULT_MODEL = "meta-llama/Meta-Llama-3-8B"
HOST_OPTIONS = set(inspect.signature(HFLM).parameters) - {"kwargs"}


class LLQLM(HFLM):  # type: ignore[misc]
    """HFLM over a packed model. It takes the model_args of `ModelArgs`, of the method, of HFLM."""

    def __init__(self, **options: Any) -> None:
        asked, host = ModelArgs.split(options, DEFAULT_MODEL, HOST_OPTIONS)
        if is_adapter(asked.pretrained):
            host["peft"] = asked.pretrained
            asked = replace(asked, pretrained=base_of(asked.pretrained))
        loadable = asked.loadable(host.get("device"), host.get("dtype"))
        self._asked, self._loadable = asked, loadable
        host.setdefault("softmax_dtype", "float32")  # log-softmax in bf16 shifts perplexities
        super().__init__(pretrained=loadable.path, revision=loadable.revision, **host)
        # HFLM takes the ranks from its accelerator only where it sees several GPUs.
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.num_processes > 1 and self.world_size == 1:
            self._rank = accelerator.process_index
            self._world_size = accelerator.num_processes
        if loadable.quantized:
            check_quantized(self.model)
        self._dropped = make_neutral(self.model)
        self._answers = self._empty_answers = 0
        if asked.kv_cache_bits is not None:
            generate_packed(self.model, asked.kv_cache_bits)

    def _check_no_cache(self, requests: str) -> None:
        """LLQError where a packed cache was asked for, and there would be none."""
        if self._asked.kv_cache_bits is not None:
            raise LLQError(
                f"kv_cache_bits={self._asked.kv_cache_bits} serves tasks that generate; requests of"
                f" the kind {requests} run each text at once, without a cache: leave it out"
            )

    def _get_backend(self, config: Any, backend: Any = "default", **kwargs: Any) -> None:
        """lm-eval takes only models of AutoModelForCausalLM as causal; a vision-language model is
        causal too, but has another auto class.
        """
        if takes_images(config):
            self.AUTO_MODEL_CLASS = auto_class(config)
            backend = "causal"
        super()._get_backend(config, backend=backend, **kwargs)

    def _create_model(self, *args: Any, peft: str | None = None, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # lm-eval gives the checkpoint's own quantization_config back to from_pretrained, which
            # warns about that.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            super()._create_model(*args, **kwargs)
        if peft is not None:
            # lm-eval itself would first resize the embeddings where the tokenizer has other tokens.
            from peft import PeftModel

            self._model: Any = PeftModel.from_pretrained(self._model, peft)

    def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        answers = super().generate_until(requests, *args, **kwargs)
        self._answers += len(answers)
        self._empty_answers += sum(not answer.strip() for answer in answers)
        return answers

    def loglikelihood(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_no_cache("loglikelihood")
        return super().loglikelihood(requests, *args, **kwargs)

    def loglikelihood_rolling(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_no_cache("loglikelihood_rolling")
        return super().loglikelihood_rolling(requests, *args, **kwargs)

    def llq_windows_nll(self, requests: Any) -> Any:
        self._check_no_cache("llq_windows_nll")
        return super().llq_windows_nll(requests)

    def llq_windows_kl(self, requests: Any) -> Any:
        self._check_no_cache("llq_windows_kl")
        return super().llq_windows_kl(requests)

    def llq_base(self) -> str | None:
        """The folder of the full-precision model that `llq_kl` compares with: "" where that is the
        model itself, None where nothing names it. A Hub model is downloaded.
        """
        loaded = self._loadable
        if self._asked.base is not None:
            return str(fetch(self._asked.base))
        if loaded.base is None:
            folder = named_base(fetch(loaded.path, loaded.revision))
            return None if folder is None else str(folder)
        itself = not loaded.quantized and self.peft is None
        return "" if itself else str(fetch(loaded.base, self._asked.revision))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the results file; `llq` says what was really scored."""
        more = {} if self.peft is None else {"adapter": self.peft}
        more |= {"generation_config_ignored": self._dropped} if self._dropped else {}
        if self._answers:
            more |= {"answers": self._answers, "empty_answers": self._empty_answers}
        return {**super().get_model_info(), "llq": {**described(self.model), **more}}
