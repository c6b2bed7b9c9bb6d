"""Builds a model, its tokenizer and its processor from a checkpoint, and maps the names of its
tensors.

Checkpoint files keep the tensor names that were published, and models in transformers may use newer
ones: LLaVA's `language_model.model.layers.0.` is `model.language_model.layers.0.` in the model, and
gets its old name back on saving. transformers holds these rules for each architecture.
`module_names` asks for them once per checkpoint; everything above uses the model's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common.errors import LLQError
from ..common.words import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MOST_LAYERS = 4096


def auto_class(config: PreTrainedConfig) -> Any:
    """AutoModelForImageTextToText for vision-language models, else AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM


def takes_images(config: PreTrainedConfig) -> bool:
    """Whether the model of this config takes images as well as text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def module_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Name in `model` -> name in the file, for every stored tensor.

    A tensor that loading would split, merge or transpose keeps its name in the file. The model has
    no tensor of that name, so it is reported where the model's tensor is missed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    state = model.state_dict()
    names = {}
    for name in sorted(stored):
        renamed, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        names[name if converted is not None else renamed] = name
    return names


def build_skeleton(path: Path) -> PreTrainedModel:
    """The model of a checkpoint folder's config, on the meta device: it takes no memory."""
    from transformers import AutoConfig

    source = path / "config.json"
    with _described_by(source):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return skeleton_of(config, source)


def skeleton_of(config: PreTrainedConfig, source: Path | str = "config.json") -> PreTrainedModel:
    """The model of a config that was read from `source`, on the meta device. LLQError where it has
    no end of layers, or is of a type that transformers does not know.
    """
    with _described_by(source), torch.device("meta"):
        check_depth(config)
        model: PreTrainedModel = auto_class(config).from_config(config)
        return model


@contextmanager
def _described_by(source: Path | str) -> Iterator[None]:
    """Make every error inside an LLQError about the config: transformers and the Hub client
    validate with a dozen types, and what they do not validate fails inside of a model.
    """
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, LLQError | ValueError | OSError) else type(error).__name__
        text = f"{kind}: {one_line(error)}".removeprefix(": ")
        raise LLQError(f"{source} describes no model: {text}") from error


def load_dense(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device | str
) -> PreTrainedModel:
    """The dense model of a checkpoint folder, in memory."""
    with no_bars():
        model: PreTrainedModel = auto_class(config).from_pretrained(
            path, dtype=dtype, trust_remote_code=False
        )
    return model.to(device).eval()


@contextmanager
def no_bars() -> Iterator[None]:
    """Inside, transformers shows no progress bars: their lines would break ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_depth(config: Any) -> None:
    """LLQError for more layers than a model has: building each takes time and memory, even on the
    meta device.
    """
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        layers = getattr(part, "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise LLQError(f"num_hidden_layers={layers} is more than {MOST_LAYERS}")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint folder; LLQError if there is none that can be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # A missing file, a missing package and broken JSON raise unrelated types.
    except Exception as error:
        raise LLQError(
            f"{path} has no tokenizer that can be loaded ({one_line(error)}); "
            "put the model's there, or calibrate on a .npy file of token ids"
        ) from error


def load_processor(path: str | Path, revision: str | None = None) -> Any:
    """Tokenizer and image processor of a vision-language model.

    LLQError if they cannot be loaded or if there is no chat template.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # as in load_tokenizer
        raise LLQError(f"{path} has no processor that can be loaded ({one_line(error)})") from error
    if not getattr(processor, "chat_template", None):
        raise LLQError(
            f"{path} has no chat template; put the base model's chat_template.jinja there"
        )
    return processor
