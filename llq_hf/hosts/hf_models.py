"""QuantizedLlama and QuantizedLlavaNext: model classes that quantize while they load.

They are optional: the auto classes of transformers load the same files.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from transformers import LlamaForCausalLM, LlavaNextForConditionalGeneration

from ..checkpoints.carried import copy_small_files, small_files
from ..checkpoints.dense import fetch, provenance
from ..checkpoints.format import CONFIG, REPORT
from ..checkpoints.hashes import Hashes, check_quickly
from ..common.errors import LLQError
from ..common.files import read_json, write_json
from ..data.calibration import CalibrationOptions
from ..demo import resolve
from ..layers.kv_cache import generate_packed
from ..methods import METHODS, method_type
from ..publish.hub import prepare_upload, push
from .hf_quantizer import CONFIGS, LLQConfig, check_quantized


class _Quantized:
    """Adds to a model class: quantizing in from_pretrained, saving under the plain class's name."""

    plain: ClassVar[type]

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *args: Any,
        method: str | None = None,
        kv_cache_bits: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load `model`: a folder, a Hub id, or the name of a bundled model.

        `method` and its options (those of the method's config type) quantize a dense model on
        loading. kv_cache_bits: `generate` keeps keys and values in so many bits.
        """
        calibration = {key for key in kwargs if key.startswith("calibration")}
        CalibrationOptions.split({key: kwargs[key] for key in calibration})
        owned = {key for each in METHODS.values() for key in each.field_names()} & set(kwargs)
        if method is None and (owned or calibration):
            names = ", ".join(sorted(owned | calibration))
            raise LLQError(
                f"{names} is an option of a method: give method=... (llq methods lists them)"
            )
        if method is not None:
            if kwargs.get("quantization_config") is not None:
                raise LLQError(
                    "give either method=... with its options or quantization_config=..., not both"
                )
            keys = {*method_type(method).field_names(), *calibration, "preset", "tokenizer"}
            options = {key: kwargs.pop(key) for key in list(kwargs) if key in keys}
            kwargs["quantization_config"] = CONFIGS[method](**options)
        folder = resolve(model) if isinstance(model, str) else model
        if (Path(folder) / CONFIG).is_file():
            check_quickly(
                Path(folder)
            )  # before transformers fails somewhere inside for an edited field
        found = super().from_pretrained(folder, *args, **kwargs)  # type: ignore[misc]
        if kv_cache_bits is not None:
            loaded: Any = found[0] if isinstance(found, tuple) else found  # with loading info
            generate_packed(loaded, kv_cache_bits)
        return found

    def save_pretrained(
        self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save an ordinary checkpoint, whose config.json names the plain class."""
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        path = Path(save_directory) / "config.json"
        write_json(path, {**read_json(path), "architectures": [self.plain.__name__]})
        if isinstance(getattr(self.config, "quantization_config", None), LLQConfig):  # type: ignore[attr-defined]
            _write_hashes(Path(save_directory))
        if push_to_hub:
            self.push_to_hub(repo_id)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        base_model: str | None = None,
        results: Iterable[Path] | None = None,
    ) -> str:
        """Upload the packed model with its tokenizer and its card, as `llq push` uploads a folder.

        base_model: Hub id of the base, where the model was loaded from a folder. results: see
        `card.make_card`. Returns the address.
        """
        model: Any = self
        source = fetch(
            resolve(str(model.name_or_path)), getattr(model.config, "_commit_hash", None)
        )
        config = check_quantized(model)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder)
            copy_small_files(source, folder)
            if (source / REPORT).is_file():  # it was loaded packed
                shutil.copyfile(source / REPORT, folder / REPORT)
            else:
                used = config.calibration if config.calibration_used else None
                drawn = used.described if used else None
                made_from = {**provenance(source), "calibration": drawn}
                write_json(
                    folder / REPORT, {"made_from": made_from, "linears": config.records, "bits": {}}
                )
            _write_hashes(folder)
            upload = prepare_upload(folder, repo_id, base=base_model, results=results)
            return push(upload, private=private, token=token)


def _write_hashes(folder: Path) -> None:
    Hashes.made(folder, small_files(folder)).write(folder)


class QuantizedLlama(_Quantized, LlamaForCausalLM):  # type: ignore[misc]
    """A Llama with packed low-bit weights.

    QuantizedLlama.from_pretrained("meta-llama/Meta-Llama-3-8B", method="quip", bits=2) quantizes a
    dense model. QuantizedLlama.from_pretrained(PACKED), a folder or a Hub id, loads a packed
    checkpoint. What it saves and pushes is an ordinary LlamaForCausalLM checkpoint, which
    AutoModelForCausalLM loads.
    """

    plain = LlamaForCausalLM


class QuantizedLlavaNext(_Quantized, LlavaNextForConditionalGeneration):  # type: ignore[misc]
    """A LLaVA-Next whose language model has packed low-bit weights; vision tower and projector stay
    as they are.

    QuantizedLlavaNext.from_pretrained("llava-hf/llama3-llava-next-8b-hf", method="...", bits=4)
    quantizes a dense model; without `method` it loads a packed checkpoint. What it saves and pushes
    is an ordinary checkpoint, which AutoModelForImageTextToText loads.
    """

    plain = LlavaNextForConditionalGeneration
