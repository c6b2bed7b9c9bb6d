"""What transformers knows about a checkpoint: which auto class builds its model, and what its tensors are called there.

Files keep the names that were published; models have moved on. LLaVA's `language_model.model.layers.0.` is
`model.language_model.layers.0.` in the model, and on saving it turns back. transformers holds the rules, per
architecture and for models inside models; here they are asked, once per checkpoint, and everything above speaks the
model's names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def auto_class(config: PreTrainedConfig) -> Any:
    """AutoModelForImageTextToText for models that see, AutoModelForCausalLM for all others."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM


def sees(config: PreTrainedConfig) -> bool:
    """Whether the model of this config takes images beside text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def module_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Name in `model` -> name in the file, of every stored tensor.

    Tensors that loading would change and not only rename (split, merge, transpose) keep their names in the file: they
    are no tensor of the model, which shows where one is missed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    state, names = model.state_dict(), {}
    for name in sorted(stored):
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        names[name if converted is not None else renamed] = name
    return names
