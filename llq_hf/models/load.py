"""What transformers knows about a checkpoint: which auto class builds its model, and what its
tensors are called there.

Files keep the names that were published; models have moved on. LLaVA's
`language_model.model.layers.0.` is `model.language_model.layers.0.` in the model, and on saving it
turns back. transformers holds the rules, per architecture and for models inside models; here they
are asked, once per checkpoint, and everything above speaks the model's names.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common.errors import LLQError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from ..common.words import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def auto_class(config: PreTrainedConfig) -> Any:
    """AutoModelForImageTextToText for models that see, AutoModelForCausalLM for all others."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM


def takes_images(config: PreTrainedConfig) -> bool:
    """Whether the model of this config takes images beside text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def module_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Name in `model` -> name in the file, of every stored tensor.

    Tensors that loading would change and not only rename (split, merge, transpose) keep their names
    in the file: they are no tensor of the model, which shows where one is missed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    state, names = model.state_dict(), {}
    for name in sorted(stored):
        renamed, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        names[name if converted is not None else renamed] = name
    return names


def build_skeleton(path: Path) -> PreTrainedModel:
    """The model of a checkpoint folder's config on the meta device: shapes, no memory."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and the Hub client validate with a dozen types
        raise LLQError(f"{path / 'config.json'} describes no model: {one_line(error)}") from error
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (
        Exception
    ) as error:  # a missing file, a missing package, a broken JSON: each raises its own
        raise LLQError(
            f"{path} has no tokenizer that can be loaded ({one_line(error)}); put the model's there, or calibrate on a "
            ".npy file of token ids"
        ) from error


def load_processor(path: str | Path, revision: str | None = None) -> Any:
    """Tokenizer and image processor of a model that sees; LLQError where they, or the chat
    template, are not there.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # as above
        raise LLQError(f"{path} has no processor that can be loaded ({one_line(error)})") from error
    if not getattr(processor, "chat_template", None):
        raise LLQError(
            f"{path} has no chat template; put the base model's chat_template.jinja there"
        )
    return processor
