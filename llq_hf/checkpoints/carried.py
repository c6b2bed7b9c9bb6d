"""The small files that belong to a model and go along with it: tokenizer, templates, code, licence.

What is copied into a packed checkpoint, and what is uploaded of one, is a list of names: a folder
that somebody packed may hold anything else as well. No link of the list may lead out of the folder,
to a file of whoever runs llq-hf. Snapshots in the Hub's cache consist of links to the blobs of the
same repository, which belong to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..common.errors import LLQError
from ..common.files import copy, make_folder, read_json
from .dense import fetch_beside, is_name
from .format import CONFIG, REPORT

TOKENIZER_CONFIG = "tokenizer_config.json"
# Patterns of names in lower case.
TOKENIZERS = (
    *("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "byte_maps.json"),
    *("vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json", "tekken.json"),
    *("emoji.json", "normalizer.json", "word_shape.json", "word_pronunciation.json"),
    *("*.model", "tokenizer.model.*", "*.spm", "*.tiktoken", "prophetnet.tokenizer"),
)
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
TEMPLATES = ("*chat_template*.jinja", "chat_template.json", MORE_TEMPLATES)
PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
LICENCES = ("license*", "licence*", "copying*", "notice*", "use_policy*")
CARRIED = (*TOKENIZERS, *TEMPLATES, *PROCESSORS, *LICENCES, "generation_config.json")
# Files whose `auto_map` names the Python files of a model with code of its own.
MAPS = (CONFIG, TOKENIZER_CONFIG, *PROCESSORS)


def carried(folder: Path) -> list[str]:
    """Names, inside the folder, of the small files that packed checkpoints of this one carry along.

    LLQError where one of them is a link that leads out of the folder.
    """
    held = [*folder.glob("*"), *folder.glob(MORE_TEMPLATES)]
    names = [path.relative_to(folder).as_posix() for path in held]
    listed = {name for name in names if _is_listed(name) and own_file(folder, name)}
    return sorted(listed | set(_code(folder)))


def copy_small_files(base: Path, out: Path) -> list[str]:
    """Copy what `carried` names; the names."""
    names = carried(base)
    for name in names:
        target = out / name
        make_folder(target.parent)
        copy(own_file(base, name) or base / name, target)
    return names


def small_files(folder: Path) -> list[str]:
    """Names of the files of a packed checkpoint that hold no tensors and are hashed."""
    names = carried(folder)
    return [*names, REPORT] if (folder / REPORT).is_file() else names


def own_file(folder: Path, name: str) -> Path | None:
    """The file of this name in the folder, links resolved; None where there is no file.

    LLQError where it lies elsewhere: a link may lead to a blob of the same snapshot, but else not
    out of the folder.
    """
    path, home = folder / name, folder.resolve()
    if not path.is_file():
        return None
    real = path.resolve()
    homes = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        homes.append(home.parents[1] / "blobs")
    if not any(real.is_relative_to(each) for each in homes):
        raise LLQError(
            f"{path} is a link that leads out of its folder, to {real}, and such files are neither "
            "copied nor uploaded; put the file itself there if it belongs to the model, or delete "
            "the link"
        )
    return real


def is_licence(name: str) -> bool:
    """Whether a carried file tells the terms of use."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in LICENCES)


def _is_listed(name: str) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in CARRIED)


def _code(folder: Path) -> Iterator[str]:
    """Names of the Python files that transformers would import for a model with code of its own:
    those of every `auto_map`, and those that these import from beside them.
    """
    from transformers.dynamic_module_utils import get_relative_imports

    waiting = [module for name in MAPS for module in _mapped(folder, name)]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop() + ".py"
        if name in seen or not is_name(name):
            continue
        seen.add(name)
        fetch_beside(folder, name)
        file = own_file(folder, name)
        if file is None:  # a part of another repository's code, or of a package
            continue
        yield name
        with suppress(UnicodeDecodeError):
            waiting += get_relative_imports(file)


def _mapped(folder: Path, name: str) -> Iterator[str]:
    """Modules that the `auto_map` of a JSON file names, but for those of other repositories."""
    if own_file(folder, name) is None:
        return
    with suppress(LLQError):  # whoever needs the file says what is wrong with it
        found: Any = read_json(folder / name).get("auto_map")
        for value in found.values() if isinstance(found, dict) else ():
            for reference in value if isinstance(value, list) else [value]:
                if isinstance(reference, str) and "--" not in reference:
                    yield reference.partition(".")[0]
