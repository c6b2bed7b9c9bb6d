"""Reads dense checkpoints (folders of safetensors) tensor by tensor, never as a whole."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.errors import LLQError
from ..common.files import read_json
from ..common.spec import Spec
from ..common.words import one_line
from ..demo import MODELS, resolve
from ..demo.gguf_base import source_of
from ..method import Rewrite

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHTS = (".safetensors", ".safetensors.index.json")
CARD = "README.md"
# Fields of the base's model card that the cards of its packed checkpoints repeat.
CARD_FIELDS = ("license", "license_name", "license_link", "language", "pipeline_tag")
# What is downloaded of a model on the Hub.
DOWNLOADED = (
    "*.safetensors",
    "*.json",
    "*.model",
    "*.jinja",
    "*.txt",
    "*.spm",
    "*.tiktoken",
    "LICEN[SC]E*",
    "NOTICE*",
    "USE_POLICY*",
    CARD,
)
# By their names in safetensors files, in the order in which save_file writes tensors.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint: their files and, from the headers, their shapes and dtypes.

    files: tensor name -> file that holds it. specs: tensor name -> shape and dtype. stored: tensor
    name -> its name in the file, filled in by `named`; until then names are those in the files.
    """

    path: Path
    files: dict[str, Path]
    specs: dict[str, Spec]
    config: dict[str, Any]
    stored: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    @classmethod
    def open(cls, model: str, revision: str | None = None) -> Checkpoint:
        """Read the headers of a local folder, or of a Hub snapshot, which is downloaded first.

        LLQError where a file or a tensor is missing or a file is truncated.
        """
        path = fetch(model, revision)
        config = read_config(path)
        files = listed_files(path)
        config.pop("transformers_weights", None)  # packed checkpoints name their files otherwise
        specs: dict[str, Spec] = {}
        for file in sorted(set(files.values())):
            specs.update(header(file))
        missing = [name for name in files if name not in specs]
        if missing:
            raise LLQError(
                f"the index in {path} lists {missing[0]!r}, "
                f"but {files[missing[0]].name} does not hold it"
            )
        return cls(path, files, {name: specs[name] for name in files}, config)

    def named(self, names: Mapping[str, str]) -> Checkpoint:
        """The same checkpoint with other tensor names.

        names: new name -> name in the file, for every tensor.
        """
        files = {name: self.files[stored] for name, stored in names.items()}
        specs = {name: self.specs[stored] for name, stored in names.items()}
        return replace(self, files=files, specs=specs, stored=names)

    def in_file(self, name: str) -> str:
        """The name in the files of a tensor of the model.

        A packed tensor, which the base does not have, takes the prefix of its linear's weight.
        """
        if name in self.stored:
            return self.stored[name]
        module, _, key = name.rpartition(".")
        weight = self.stored.get(f"{module}.weight")
        return name if weight is None else weight.removesuffix("weight") + key

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the named tensors.

        Files are closed again, because an open mapping counts as resident memory.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise LLQError(
                    f"{self.path} has no tensor {name!r}; "
                    "the checkpoint is incomplete or of another architecture"
                )
            by_file.setdefault(self.files[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt") as handle:
                tensors.update(
                    {name: handle.get_tensor(self.in_file(name)).clone() for name in wanted}
                )
        return tensors

    def scan(
        self, on_tensor: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[str, list[str]]:
        """The sha256 over all tensors, and the names of those with NaN or infinity.

        Tensors are read one at a time. on_tensor: receives how many are done, of how many.
        """
        digest = hashlib.sha256()
        bad = []
        for i, name in enumerate(sorted(self.files)):
            tensor = self.read([name])[name].contiguous()
            spec = self.specs[name]
            digest.update(f"{name} {spec.shape} {spec.dtype}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                bad.append(name)
            on_tensor(i + 1, len(self.files))
        return digest.hexdigest(), bad

    @property
    def is_quantized(self) -> bool:
        return "quantization_config" in self.config

    @property
    def parameters(self) -> int:
        """Parameters of the model as it was published."""
        return sum(math.prod(spec.shape) for spec in self.specs.values())


@dataclass(frozen=True)
class Rewritten(Checkpoint):
    """A checkpoint whose tensors a method rewrites before they are quantized.

    Each tensor is rewritten when it is read, and none is kept. dtype: what tensors are cast to
    before; None: they keep the base's.
    """

    base: Checkpoint
    rewrite: Rewrite
    dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls, base: Checkpoint, rewrite: Rewrite | None, dtype: torch.dtype | None = None
    ) -> Checkpoint:
        """`base` as `rewrite` changes it; `base` itself where there is nothing to rewrite."""
        if rewrite is None:
            return base
        copies = rewrite.untied
        files = {**base.files, **{name: base.files[source] for name, source in copies.items()}}
        specs = {**base.specs, **{name: base.specs[source] for name, source in copies.items()}}
        config = untied_config(base.config) if copies else base.config
        return cls(base.path, files, specs, config, base, rewrite, dtype, stored=base.stored)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {
            name: self.rewrite(name, self._dense(self.rewrite.untied.get(name, name)), self._dense)
            for name in names
        }

    def _dense(self, name: str) -> Tensor:
        return self.base.read([name])[name].to(self.dtype)

    @property
    def parameters(self) -> int:
        return self.base.parameters


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a model whose head no longer shares the embedding's matrix."""
    parts = {key: untied_config(value) for key, value in config.items() if key == "text_config"}
    return {**config, **parts, "tie_word_embeddings": False}


def fetch(model: str, revision: str | None = None) -> Path:
    """The folder of a model: a local path, what `resolve` knows, or a Hub snapshot, which is
    downloaded.

    Pickles are not downloaded, and Python files only where they go along (see `carried`). LLQError
    where there is no such model.
    """
    local = Path(resolve(model)).expanduser()
    if local.is_dir():
        return local
    if local.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise LLQError(
            f"{model} is not a folder with a model; "
            "give a folder or a Hub id such as meta-llama/Meta-Llama-3-8B"
        )
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": list(DOWNLOADED),
        "ignore_patterns": ["original/*"],
    }
    try:
        return Path(snapshot_download(model, **options))
    except Exception as error:  # offline, gated, not found, broken proxy, ...
        raise LLQError(
            f"{model} is neither a local folder nor available from the Hub ({one_line(error)}); "
            "check the name, the network, and `hf auth login` for gated models"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint. A `quantization_config` of null is none, as in transformers.

    LLQError where one is there that is no object.
    """
    path = folder / "config.json"
    config = read_json(path)
    section = config.get("quantization_config", {})
    if section is None:
        del config["quantization_config"]
    elif not isinstance(section, dict):
        raise LLQError(f"{path}: quantization_config is {section!r:.60}, which is not an object")
    return config


def provenance(path: Path) -> dict[str, Any]:
    """Where the checkpoint in a folder comes from, for the model cards of its packed checkpoints.

    model: its Hub id, or the name of the bundled model, of the GGUF file or of the folder.
    revision: the commit of a Hub snapshot, or None. card: licence, language and task from its own
    README.md. gguf: what the folder was converted from, if it was. No path of this machine is in
    it.
    """
    bundled = next((name for name, folder in MODELS.items() if folder == path), None)
    repo, revision = _snapshot(path)
    source = source_of(path)
    file = source and (source["name"] or source["file"])
    model = repo or bundled or file or path.resolve().name
    card = {key: value for key, value in _metadata(path / CARD).items() if key in CARD_FIELDS}
    found = {"model": model, "revision": revision, "card": card}
    return found if source is None else {**found, "gguf": source}


def fetch_beside(path: Path, name: str) -> None:
    """Download a file into the Hub snapshot in `path`, where it is not there and the repository
    has it: transformers downloads only the files that it knows.
    """
    repo, revision = _snapshot(path)
    if repo is None or (path / name).is_file():
        return
    from huggingface_hub import hf_hub_download

    with suppress(Exception):  # offline, no such file, ...: the caller sees that it is not there
        hf_hub_download(repo, name, revision=revision)


def _snapshot(path: Path) -> tuple[str | None, str | None]:
    """Hub id and commit of the snapshot in a folder of the Hub's cache; (None, None) elsewhere."""
    found = re.search(r"models--([^/]+)/snapshots/([0-9a-f]{40})$", path.as_posix())
    return (found[1].replace("--", "/"), found[2]) if found else (None, None)


def _metadata(card: Path) -> dict[str, Any]:
    """The front matter of a README.md; {} where there is none that can be read.

    A broken card does not stop a run, because the model does not depend on it.
    """
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        return (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, YAMLError):
        return {}


def header(file: Path) -> dict[str, Spec]:
    """Tensor names with shapes and dtypes of one safetensors file.

    LLQError where it is truncated or missing, or holds a dtype that is not supported.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
            return {
                name: Spec(tuple(s.get_shape()), _dtype(s.get_dtype(), file))
                for name, s in slices.items()
            }
    except FileNotFoundError:
        raise LLQError(f"{file} is missing, though the checkpoint's index lists it") from None
    except (SafetensorError, OSError) as error:
        raise LLQError(
            f"{file} cannot be read ({error}): it is truncated or damaged; fetch it again"
        ) from error


def _dtype(name: str, file: Path) -> torch.dtype:
    if name not in DTYPES:
        raise LLQError(
            f"{file} holds a tensor of dtype {name}, which is not supported; "
            "convert it to bf16 first"
        )
    return DTYPES[name]


def is_name(name: Any) -> bool:
    """Whether a name that a file gave is that of a file in the same folder, and no path."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def listed_files(path: Path) -> dict[str, Path]:
    """The file of every tensor, from the files that transformers would load: the one that
    config.json names, else the single file, else those of the index.

    LLQError where there is none, or where the index is no list of files in the folder.
    """
    named = _named_weights(path)
    single, index = path / (named or SINGLE), path / (named or INDEX)
    if single.is_file() and not single.name.endswith(".index.json"):
        return dict.fromkeys(header(single), single)
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(map(is_name, weight_map.values())):
            raise LLQError(f"{index} has no weight_map of tensor names to file names")
        return {name: path / file for name, file in weight_map.items()}
    hint = ""
    if list(path.glob("*.bin")):
        hint = " (its .bin files are pickles, which are never loaded; convert them to safetensors)"
    raise LLQError(f"{path} holds no {single.name} and no {index.name}{hint}")


def _named_weights(path: Path) -> str | None:
    """The file of weights, or their index, that config.json names; None where it names none."""
    if not (path / "config.json").is_file():
        return None
    named = read_json(path / "config.json").get("transformers_weights")
    if named is not None and not (is_name(named) and named.endswith(WEIGHTS)):
        raise LLQError(
            f"{path / 'config.json'} names {named!r} as transformers_weights, "
            "which is no safetensors file of this folder"
        )
    return named
