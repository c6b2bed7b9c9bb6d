"""Reading data sets from the Hugging Face Hub."""

from __future__ import annotations

from typing import Any

from ..common.errors import LLQError


def hub_rows(
    repository: str, config: str | None = None, *, split: str, offline_cure: str, **options: Any
) -> Any:
    """One split of a Hub dataset (`datasets.Dataset`); LLQError that ends in `offline_cure` when
    that fails.

    Only data files are read: `datasets` 4 and later runs no loading script. `options` go to
    `load_dataset`.
    """
    import datasets

    try:
        return datasets.load_dataset(repository, config, split=split, **options)
    except (
        Exception
    ) as error:  # offline: OSError, ValueError, RuntimeError and types of huggingface_hub
        cause = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise LLQError(
            f"The dataset {repository} could not be read from the Hugging Face Hub ({cause}); {offline_cure}"
        ) from error


def wikitext2(split: str, cure: str) -> list[str]:
    return list(
        hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split=split, offline_cure=cure)["text"]
    )


def c4(split: str, cure: str) -> list[str]:
    shard = {
        "train": "en/c4-train.00000-of-01024.json.gz",
        "validation": "en/c4-validation.00000-of-00008.json.gz",
    }
    # `data_files` under a split of our naming: else datasets expects the full shard count of the
    # named config
    files = {split: shard[split]}
    return list(hub_rows("allenai/c4", split=split, offline_cure=cure, data_files=files)["text"])


def ptb(split: str, cure: str) -> list[str]:
    # the repository's own files are a loading script; the Hub keeps their parquet form under this
    # revision
    rows = hub_rows(
        "ptb-text-only/ptb_text_only",
        split=split,
        offline_cure=cure,
        revision="refs/convert/parquet",
    )
    return list(rows["sentence"])
