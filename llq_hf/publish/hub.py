"""Uploads a packed checkpoint to a repository of the Hub, in one commit, with its card.

It uploads the files that belong to a model (see `carried`), the report, the run's journal (which
lies beside the folder), and evaluation results without what they say about the machine. Any other
file stays, and a link that leads out of the folder is refused. Only `push` uploads anything. The
token stays in huggingface_hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.carried import carried, own_file, small_files
from ..checkpoints.dense import CARD, INDEX, listed_files
from ..checkpoints.format import CONFIG, HASHES, REPORT
from ..checkpoints.hashes import Hashes, damage, is_known, refuse
from ..checkpoints.inspection import Inspection, inspect_checkpoint
from ..checkpoints.journal import Journal
from ..common.errors import LLQError
from ..common.files import read_json
from .benchmarks import eval_results
from .card import RESULTS, check_scored, make_card, results_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

JOURNAL = "llq_journal.jsonl"
WEIGHTS = ".safetensors"
# What a results file keeps in the repository: figures and what they are figures of, but no paths,
# processors and drivers.
KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "date",
)
KEPT_VERSIONS = ("lm_eval_version", "lmms_eval_version", "transformers_version")


@dataclass(frozen=True)
class Upload:
    """Everything that goes into the repository. files: name there -> file here, or its content."""

    repo: str
    files: dict[str, Path | bytes]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {
            name: file.stat().st_size if isinstance(file, Path) else len(file)
            for name, file in sorted(self.files.items())
        }


def prepare_upload(
    path: Path, repo: str, *, base: str | None = None, results: Iterable[Path] | None = None
) -> Upload:
    """Check the checkpoint in `path` and gather the files to upload; uploads nothing.

    A README.md in `path` is taken as it is, else the card is made. Results on benchmarks of the Hub
    go into `.eval_results/`, too. LLQError for a name that no
    repository can have, a checkpoint or a tokenizer that is not as it was written, or a results
    file of another checkpoint.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise LLQError(
            f"{repo!r} cannot be a repository's name ({error}); give USER/NAME"
        ) from None
    checkpoint = inspect_checkpoint(path)
    _check_whole(path, checkpoint["quantized_linears"])
    files: dict[str, Path | bytes] = _own_files(path)
    if HASHES not in files:  # of an older version, or of save_pretrained
        made = Hashes.made(path, small_files(path))
        files[HASHES] = json.dumps(made.to_dict(), indent=2, sort_keys=True).encode()
    journal = Journal.beside(path.absolute())
    if own_file(journal.parent, journal.name):
        files[JOURNAL] = journal
    scored = results_files(path, results)
    for file in scored:
        if results is None:
            own_file(path, file.relative_to(path).as_posix())
        files[f"{RESULTS}/{file.name}"] = _without_machine(file, checkpoint)
    files |= eval_results(
        [(f"{RESULTS}/{file.name}", read_json(file)) for file in scored],
        repo,
        f"{checkpoint['method']}, {checkpoint['stored_bits']:.3f} stored bits a weight",
    )
    if CARD not in files:
        card = make_card(path, repo=repo, base=base, results=scored)
        files[CARD] = str(card).encode()
    return Upload(repo, files)


def _own_files(path: Path) -> dict[str, Path | bytes]:
    """The files of a checkpoint by name: weights, configuration, card, and what belongs to a model.

    LLQError where one is a link out of the folder, or where the hashes list one that is none of
    these: it would not be uploaded, and `llq verify` would miss it.
    """
    weights = sorted({file.name for file in listed_files(path).values()})
    names = [*weights, INDEX, CONFIG, REPORT, HASHES, CARD, *carried(path)]
    files: dict[str, Path | bytes] = {
        name: file for name in names if (file := own_file(path, name)) is not None
    }
    hashes = Hashes.read(path)
    strangers = sorted(set(hashes.files) - set(files)) if hashes else []
    if strangers:
        raise LLQError(
            f"{path / HASHES} lists {strangers[0]}, which belongs to no model and is not uploaded;"
            f" look at it, delete it and {HASHES}, and push again"
        )
    return files


def _check_whole(path: Path, linears: int) -> None:
    """LLQError unless the checkpoint has all of its linears, and every file as it was written."""
    if linears != read_json(path / CONFIG)["quantization_config"]["quantized_linears"]:
        raise LLQError(f"{path} holds {linears} packed linears, and not what its config.json says")
    if is_known(path):
        refuse(path, damage(path))


def _without_machine(file: Path, checkpoint: Inspection) -> bytes:
    """A results file's JSON without what it says about the machine."""
    content = read_json(file)
    check_scored(file, content, checkpoint)
    kept = {key: content[key] for key in (*KEPT, *KEPT_VERSIONS) if key in content}
    config = content.get("config") or {}
    scored = {
        "llq": config.get("llq") or content.get("llq"),
        "batch_size": config.get("batch_size"),
    }
    return json.dumps({**kept, "config": scored}, indent=2, sort_keys=True, default=str).encode()


def push(upload: Upload, *, private: bool = False, token: str | None = None) -> str:
    """Upload everything in one commit; returns the repository's address.

    The repository is made if there is none. Weights of an earlier checkpoint, which would be loaded
    in place of these or beside them, are deleted in the same commit. token: by default the one of
    `hf auth login` or HF_TOKEN. LLQError where the Hub does not accept the upload.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    try:
        url = api.create_repo(upload.repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(upload.repo).private:
            raise LLQError("it exists and is public; make it private first, or push elsewhere")
        add = [CommitOperationAdd(name, file) for name, file in sorted(upload.files.items())]
        stale = [CommitOperationDelete(name) for name in _stale(api, upload)]
        api.create_commit(upload.repo, [*add, *stale], commit_message="Packed checkpoint by llq-hf")
    except Exception as error:
        # Of the Hub client, of its HTTP library, or a RuntimeError around either.
        raise LLQError(
            f"{upload.repo} was not uploaded ({_one_line(error, token)}); check the name, the "
            "network, and that `hf auth login` knows a token that may write there"
        ) from None
    return str(url)


def _stale(api: HfApi, upload: Upload) -> list[str]:
    """Weight files in the repository that are not of this checkpoint."""
    there = api.list_repo_files(upload.repo)
    return [
        name
        for name in there
        if (name.endswith(WEIGHTS) or name == INDEX) and name not in upload.files
    ]


def _one_line(error: Exception, token: str | None) -> str:
    """The message of an error and of its cause, on one line, with no token in it."""
    from huggingface_hub import get_token

    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    text = ": ".join(" ".join(str(each).split()) or type(each).__name__ for each in causes)
    # Part by part, because a message may quote and escape a token.
    secrets = [part for secret in (token, get_token()) if secret for part in secret.split()]
    return re.sub("|".join([r"hf_\w+", *map(re.escape, secrets)]), "***", text)
