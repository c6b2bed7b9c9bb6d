"""Read the study's data sets from the Hugging Face Hub."""

from __future__ import annotations

from typing import Any

from ..common.errors import LLQError
from ..common.words import one_line


def hub_rows(
    repository: str, config: str | None = None, *, split: str, offline_cure: str, **options: Any
) -> Any:
    """One split of a Hub dataset, as a `datasets.Dataset`.

    Only data files are read: `datasets` 4 and later runs no loading script. `options` go to
    `load_dataset`. Raises LLQError, whose text ends in `offline_cure`, where it cannot be read.
    """
    import datasets

    try:
        return datasets.load_dataset(repository, config, split=split, **options)
    except Exception as error:  # OSError, ValueError, RuntimeError, types of huggingface_hub
        cause = f"{type(error).__name__}: {one_line(error)}"
        raise LLQError(
            f"The dataset {repository} could not be read from the Hugging Face Hub ({cause});"
            f" {offline_cure}"
        ) from error


def wikitext2(split: str, cure: str) -> list[str]:
    """The rows of WikiText-2 (raw)."""
    return list(
        hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split=split, offline_cure=cure)["text"]
    )


def c4(split: str, cure: str) -> list[str]:
    """The documents of the first shard of C4 (English)."""
    shard = {
        "train": "en/c4-train.00000-of-01024.json.gz",
        "validation": "en/c4-validation.00000-of-00008.json.gz",
    }
    # The file is named as the whole split: given the named config, datasets would expect the full
    # number of shards.
    files = {split: shard[split]}
    return list(hub_rows("allenai/c4", split=split, offline_cure=cure, data_files=files)["text"])


def ptb(split: str, cure: str) -> list[str]:
    """The sentences of the Penn Treebank."""
    # The repository holds a loading script; the Hub keeps the data as parquet under this revision.
    rows = hub_rows(
        "ptb-text-only/ptb_text_only",
        split=split,
        offline_cure=cure,
        revision="refs/convert/parquet",
    )
    return list(rows["sentence"])
