"""llq_hashes.json: what every tensor, file and field of a checkpoint was when it was written.

Idea. A packed weight has no room for mistakes: one other bit in a scale is another model that still
loads. So the sha256 of every tensor travels in a file of its own, with a copy of config.json, which
decides what the codes mean. Older versions do not know the file and load the checkpoint as before;
a checkpoint of an older version has none, and loads unverified.

    check     at every load: the copy of config.json, and size and header of each weight file. It
              reads no tensor. Where these differ, or with LLQ_VERIFY=1, `damage` decides.
    damage    everything: what differs, by name and block
    damage_once   the same, remembered in the cache until a file changes
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict

import torch

from ..common.errors import LLQError
from ..common.files import read_json, sha256_file, write_json, write_text
from ..common.machine import cache_root
from .dense import INDEX, SINGLE, fetch_beside, header, is_name, listed_files
from .fingerprint import differences, fingerprint
from .format import CONFIG, HASHES, REPORT, PackedConfig
from .journal import Journal
from .shards import damaged_tensors, tensor_digests

VERIFY = "LLQ_VERIFY"  # environment variable: 1 verifies every tensor at every load
HASHES_VERSION = 1
# Fields of config.json that decide no logit; programs and people change them.
FREE = {
    *("_name_or_path", "transformers_version", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
CURE = "run the `llq quantize` that made it again, which mends it, or fetch it again"


class WeightFile(TypedDict):
    """What is compared of a weight file without reading its tensors."""

    bytes: int
    header: str  # sha256 of the file up to its first tensor


@dataclass(frozen=True)
class Hashes:
    """config: of config.json, as written. weights: by file name. files: sha256 of all other files,
    by name. tensors: sha256 by name (see `shards.digest_of`), of all outside the blocks, then of
    each block.
    """

    config: dict[str, Any]
    weights: dict[str, WeightFile]
    files: dict[str, str]
    tensors: list[dict[str, str]]

    # --- writing and reading ----------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        small: Sequence[str],
        tensors: Sequence[Mapping[str, str]],
    ) -> Self:
        """The hashes of a folder. small: names of the files to hash that hold no tensors. tensors:
        their hashes, as `Shards.write` gave them when they were written.
        """
        weights = sorted({file for file in listed_files(folder).values()})
        return cls(
            dict(config),
            {file.name: _weight_file(file) for file in weights},
            {name: sha256_file(folder / name) for name in sorted(small)},
            [dict(each) for each in tensors],
        )

    @classmethod
    def made(cls, folder: Path, small: Sequence[str]) -> Self:
        """The hashes of a folder that was written without: its tensors are read."""
        files = listed_files(folder)
        found = tensor_digests(files)
        return cls.of(folder, read_json(folder / CONFIG), small, _by_block(files, found))

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The hashes in a folder; None where there are none. LLQError where they are damaged."""
        path = folder / HASHES
        if not path.is_file():
            return None
        content = read_json(path)
        digest = content.pop("digest", None)
        if digest != fingerprint(content):
            raise LLQError(
                f"{path} is damaged: it does not match its own digest. Fetch it again, or delete it"
                " to load the checkpoint unverified"
            )
        if content.get("version") != HASHES_VERSION:
            raise LLQError(f"{path} is of a newer llq-hf: update llq-hf, or delete it")
        parts: Any = (content.get(key) for key in ("config", "weights", "files", "tensors"))
        found = cls(*parts)
        if not found._is_sound():
            raise LLQError(f"{path} is no file that llq-hf wrote: fetch it again, or delete it")
        return found

    def _is_sound(self) -> bool:
        """Whether all is of the right type, and names are those of files in the folder."""
        parts: tuple[Any, ...] = (self.config, self.weights, self.files)
        if not all(isinstance(part, dict) for part in parts) or not isinstance(self.tensors, list):
            return False
        names = [*self.weights, *(part for name in self.files for part in name.split("/"))]
        return all(isinstance(each, dict) for each in self.tensors) and all(map(is_name, names))

    def to_dict(self) -> dict[str, Any]:
        """What the file holds."""
        content = {
            "version": HASHES_VERSION,
            "config": self.config,
            "weights": self.weights,
            "files": self.files,
            "tensors": self.tensors,
        }
        return {**content, "digest": fingerprint(content)}

    @property
    def digest(self) -> str:
        """16 hex digits that stand for every tensor, file and field."""
        digest: str = self.to_dict()["digest"]
        return digest

    def write(self, folder: Path) -> None:
        write_json(folder / HASHES, self.to_dict())

    # --- comparing --------------------------------------------------------------------------------

    def is_as_written(self, folder: Path) -> bool:
        """Whether config.json, and sizes and headers of the weight files, are what they were, and
        the index lists these files.
        """
        if _deciding(read_json(folder / CONFIG)) != _deciding(self.config):
            return False
        with suppress(LLQError, OSError):
            if (folder / INDEX).is_file():
                listed = {file.name for file in listed_files(folder).values()}
                if listed != set(self.weights):
                    return False
            return all(_weight_file(folder / name) == file for name, file in self.weights.items())
        return False

    def damage(self, folder: Path, weights_only: bool = False) -> list[str]:
        """A phrase for everything that is not as it was written; [] where all is.

        weights_only: tensors and config.json, but not the tokenizer and other small files.
        """
        found = [f"{CONFIG}: {phrase}" for phrase in self._config_damage(folder)]
        found += list(self._tensor_damage(folder))
        return found if weights_only else [*found, *self._file_damage(folder)]

    def _config_damage(self, folder: Path) -> list[str]:
        """Fields of config.json. A file that `save_pretrained` wrote says more, and means the same:
        fields that are at transformers' defaults.
        """
        old, new = _deciding(self.config), _deciding(read_json(folder / CONFIG))
        return differences(old, new) and differences(_completed(old), _completed(new))

    def _tensor_damage(self, folder: Path) -> Iterator[str]:
        try:
            files = listed_files(folder)
        except LLQError as error:
            yield str(error)
            return
        every = {name: sha for tensors in self.tensors for name, sha in tensors.items()}
        damaged = set(damaged_tensors(files, every))
        for index, tensors in enumerate(self.tensors):
            where = f" (block {index - 1})" if index else ""
            for name in sorted(damaged & set(tensors)):
                yield f"{name}{where} is {_what(name, files)}"
        for name in sorted(set(files) - set(every)):
            yield f"{name} is no tensor of this checkpoint"
        if {file.name for file in files.values()} - {SINGLE} and (folder / SINGLE).is_file():
            yield f"{SINGLE} lies beside the shards, and would be loaded in their place"

    def _file_damage(self, folder: Path) -> Iterator[str]:
        for name, sha256 in self.files.items():
            fetch_beside(folder, name)
            if not (folder / name).is_file():
                yield f"{name} is missing"
            elif sha256_file(folder / name) != sha256:
                yield f"{name} is not as it was written"


def check(folder: Path) -> None:
    """LLQError where a checkpoint that is about to be loaded is not as it was written: by what can
    be compared without reading a tensor, and with LLQ_VERIFY=1 by every tensor.
    """
    if os.environ.get(VERIFY, "0") in ("", "0"):
        check_quickly(folder)
    else:
        fetch_beside(folder, HASHES)
        refuse(folder, damage(folder, weights_only=True))


def check_quickly(folder: Path) -> None:
    """The same without reading a tensor, unless something differs."""
    hashes = Hashes.read(folder)
    if hashes is not None and not hashes.is_as_written(folder):
        refuse(folder, hashes.damage(folder, weights_only=True))


def damage(folder: Path, weights_only: bool = False) -> list[str]:
    """A phrase for everything in a checkpoint that is not as it was written: by its hashes, or else
    by the journal beside it. LLQError where there is neither.
    """
    hashes = Hashes.read(folder)
    if hashes is not None:
        return hashes.damage(folder, weights_only)
    if not is_known(folder):
        raise LLQError(
            f"{folder} holds no {HASHES}, so nothing tells whether it is as it was written:"
            " an older llq-hf wrote it, or save_pretrained"
        )
    return [f"{name} is not as it was written" for name in Journal.damaged(folder)]


def is_known(folder: Path) -> bool:
    """Whether hashes in a folder, or a journal beside it, tell how its files were written."""
    return (folder / HASHES).is_file() or Journal.beside(folder).is_file()


def is_whole(folder: Path) -> bool:
    """Whether nothing in a finished folder is known to be missing or damaged, its hashes included:
    a journal with hashes of tensors is of a version that writes them.
    """
    if not (folder / HASHES).is_file() and Journal.names_tensors(folder):
        return False
    try:
        return not is_known(folder) or not damage(folder)
    except LLQError:  # the hashes themselves
        return False


def damage_once(folder: Path) -> list[str]:
    """The same, where it is not known that the files are unchanged since they were found whole.

    They are known by path, size and time of their last change. [] where nothing can be verified.
    """
    if not is_known(folder):
        return []
    state = {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(folder.iterdir())
        if file.is_file()
    }
    known = {"path": str(folder.resolve()), "files": state}
    note = cache_root() / "verified" / f"{fingerprint({'path': known['path']})}.json"
    with suppress(LLQError):
        if read_json(note) == known:
            return []
    found = damage(folder)
    if not found:
        with suppress(OSError):  # a read-only cache: it is verified again next time
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, known)
    return found


def refuse(folder: Path, found: Sequence[str]) -> None:
    """LLQError that lists the damage, if there is any."""
    if not found:
        return
    more = f" (and {len(found) - 4} more: `llq verify` lists them)" if len(found) > 4 else ""
    raise LLQError(
        f"{folder} is not as it was written: {'; '.join(found[:4])}{more}. To have it whole,"
        f" {CURE}. If the change is meant, delete {HASHES}"
    )


def restore_journal(folder: Path, run: str) -> None:
    """Write the journal of a finished run again from its hashes and its report, so that the run can
    be resumed; nothing where one of them is missing or damaged, or of another run.

    run: its fingerprint.
    """
    try:
        hashes = Hashes.read(folder)
    except LLQError:
        return
    file = folder / REPORT
    if hashes is None or not file.is_file() or hashes.files.get(REPORT) != sha256_file(file):
        return
    report = read_json(file)
    if report["fingerprint"] != run:
        return
    blocks: dict[str, list[Any]] = {}
    for record in report["linears"]:
        blocks.setdefault(_prefix(record["name"]), []).append(record)
    lines: list[dict[str, Any]] = [
        {"fingerprint": report["fingerprint"], "identity": report["identity"]}
    ]
    for index, (tensors, linears) in enumerate(
        zip(hashes.tensors[1:], blocks.values(), strict=False)
    ):
        tuned = {"tuned": True} if any(record.get("tuned") for record in linears) else {}
        line = {"block": index, "tensors": tensors, "linears": linears, **tuned}
        lines.append({**line, "seconds": 0.0, "peak_bytes": 0})
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    write_text(Journal.beside(folder), text)


def _weight_file(file: Path) -> WeightFile:
    """LLQError for a file that cannot be read as safetensors."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = handle.read(8)
        most = int.from_bytes(length, "little")
        if most > size:
            raise LLQError(f"{file} is truncated or damaged: its header does not fit into it")
        head = length + handle.read(most)
    return {"bytes": size, "header": hashlib.sha256(head).hexdigest()}


def _by_block(files: Mapping[str, Path], digests: Mapping[str, str]) -> list[dict[str, str]]:
    """Hashes of all outside the blocks, then of each block: those in which linears are packed."""
    specs = {name: spec for file in set(files.values()) for name, spec in header(file).items()}
    prefixes = {
        _prefix(name)
        for name, spec in specs.items()
        if name.endswith(".weight") and spec.dtype == torch.int32
    } - {""}
    blocks: dict[str, dict[str, str]] = {"": {}}
    for prefix in sorted(prefixes, key=lambda each: int(each.rpartition(".")[2])):
        blocks[prefix] = {}
    for name, digest in sorted(digests.items()):
        own = _prefix(name)
        blocks[own if own in blocks else ""][name] = digest
    return list(blocks.values())


def _prefix(name: str) -> str:
    """The block of a linear or a tensor: "model.layers.3"; "" outside of numbered modules."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else ""


def _what(name: str, files: Mapping[str, Path]) -> str:
    return "not as it was written" if name in files else "missing"


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the fields that decide nothing, in parts such as text_config as well."""
    return {
        key: _deciding(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in FREE
    }


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the defaults of transformers and of the method written out; as it is, where
    they cannot read it.
    """
    from transformers import CONFIG_MAPPING

    section = config.get("quantization_config")
    try:
        kind = CONFIG_MAPPING[config["model_type"]]
        whole = kind.from_dict({k: v for k, v in config.items() if k != "quantization_config"})
        full = _deciding(json.loads(whole.to_json_string(use_diff=False)))
        packed = PackedConfig.from_section(section) if isinstance(section, dict) else None
    except Exception:  # whatever a damaged config makes transformers raise
        return config
    return {**full, "quantization_config": packed.to_section() if packed else section}
