"""A checkpoint run: from a folder of dense weights to a folder of packed ones, never holding the
model.

Blocks are read, quantized and written one at a time. `prepare` checks everything that can be
checked before hours are spent; `execute` writes (see `packed.py`), with a journal beside the folder
that a killed run goes on from. A method may rewrite the dense tensors first, one at a time as they
are read; only what it must learn for that on the whole model is learned with all of it in memory,
once, and kept in OUT.learned.safetensors.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn

from ..checkpoints.dense import Rewritten
from ..checkpoints.fingerprint import sha256_file
from ..checkpoints.format import CONFIG
from ..checkpoints.journal import FileState, Journal
from ..checkpoints.packed import PackedFolder, finished_fingerprint, read_report
from ..common.errors import LLQError
from ..common.machine import peak_bytes
from ..common.progress import Progress
from ..data.calibration import Calibration
from ..kernels import reference
from ..method import Method, Step
from ..models.decoder import block_prefixes, quantizable
from ..models.load import auto_class
from .blocks import StreamedBlocks
from .prepare import Plan, RunOptions, prepare
from .step import quantize_step, record_tuned, steps
from .whole_model import learn, rewrite_model, shared_copy, token_ids, tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantize_checkpoint(
    model: str,
    out: Path,
    method: Method,
    calibration: Calibration,
    run: RunOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize `model` (folder or Hub id) into the folder `out`, or go on where an interrupted run
    stopped.

    Returns the report. LLQError for anything wrong with the input, before work starts where it can
    be known then.
    """
    progress = progress or Progress()
    try:
        return execute(
            prepare(model, method, calibration, run or RunOptions(), out, progress), out, progress
        )
    finally:
        progress.close()


@reference()
def execute(plan: Plan, out: Path, progress: Progress) -> dict[str, Any]:
    """Run a plan into `out`; returns the report. Of a team's processes the leader writes, the
    others compute along.
    """
    if not plan.run.team.leads:
        return _follow(plan, out, progress)
    journal = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(
            out.with_name(out.name + ".lock")
        ):  # a second process waits, then finds the work done
            if finished_fingerprint(out) == plan.fingerprint:
                if not Journal.damaged(out):
                    plan.run.team.tell(None)
                    return read_report(out)
                (
                    out / CONFIG
                ).unlink()  # not a whole checkpoint until the damaged blocks are done again
            journal = Journal.open(out, plan.identity)
            plan.run.team.tell(sorted(journal.blocks))
            report = _write(plan, out, journal, progress)
            plan.run.team.tell(None)
            return report
    except (OSError, SafetensorError) as error:
        if journal is None:
            raise LLQError(
                f"{out} cannot be written ({error}); give another folder, or free some space"
            ) from error
        for draft in out.glob("*.tmp"):
            draft.unlink(missing_ok=True)
        raise LLQError(
            f"writing to {out} failed ({error}); free some space and run the same command again: "
            f"{len(journal.blocks)} of {len(block_prefixes(plan.skeleton))} blocks are kept"
        ) from error


def _write(plan: Plan, out: Path, journal: Journal, progress: Progress) -> dict[str, Any]:
    learned = _learned(plan, out, progress)
    plan = replace(plan, method=plan.method.with_learned(learned))
    blocks, folder = _opened(plan, out, learned)
    folder.save_rest()  # also on a resume: the journal has no digest of this file
    started = time.perf_counter()
    pending: list[dict[str, Any]] = []

    def on_block(index: int, block: nn.Module) -> None:
        nonlocal started
        file = folder.save_block(index, block)
        journal.finish_block(
            {
                "block": index,
                "file": file.name,
                "sha256": sha256_file(file),
                "linears": list(pending),
                "seconds": time.perf_counter() - started,
                "peak_bytes": peak_bytes(),
            }
        )
        pending.clear()
        FileState.clear(out)
        started = time.perf_counter()

    todo = _todo(
        plan,
        blocks,
        folder,
        journal.blocks,
        progress,
        on_block=on_block,
        state_of=lambda index: FileState(out, plan.fingerprint, index),
    )
    for step in todo:
        pending += quantize_step(step, plan.method, plan.run.team)
    if plan.method.tunes:
        _tune(plan, out, folder, journal, progress)
    linears = journal.linears()
    expected = len(quantizable(plan.skeleton))
    if len(linears) != expected:
        raise LLQError(
            f"{len(linears)} linears were quantized, {expected} should have been; delete {journal.path} and start anew"
        )
    report = folder.finish(linears, plan.identity, plan.made_from)
    FileState.clear(out, kind="tuned")
    return report


def _follow(plan: Plan, out: Path, progress: Progress) -> dict[str, Any]:
    """What a process of a team does that does not lead: the same walk, its share of the work, no
    files.
    """
    done = plan.run.team.tell(None)
    if done is None:
        return read_report(out)
    blocks, folder = _opened(plan, out, {})
    for step in _todo(plan, blocks, folder, done, progress):
        quantize_step(step, plan.method, plan.run.team)
    plan.run.team.tell(None)  # until the leader has written all
    return read_report(out)


def _opened(
    plan: Plan, out: Path, learned: dict[str, Tensor]
) -> tuple[StreamedBlocks, PackedFolder]:
    """Where the run reads its blocks, and the folder that they go to."""
    rewrite = plan.method.rewrite(plan.skeleton, learned)
    source = Rewritten.of(plan.checkpoint, rewrite, plan.dtype)
    blocks = StreamedBlocks(source, plan.skeleton, plan.dtype, torch.device(plan.run.device))
    return blocks, PackedFolder(
        out, Rewritten.of(plan.checkpoint, rewrite), blocks.prefixes, plan.method
    )


def _todo(
    plan: Plan,
    blocks: StreamedBlocks,
    folder: PackedFolder,
    done: Collection[int],
    progress: Progress,
    **hooks: Any,
) -> Iterator[Step]:
    """The steps of all blocks but those `done`; hooks: `on_block` and `state_of` of `walk`."""
    return steps(
        blocks,
        plan.method,
        plan.data,
        progress,
        done=len(done),
        restore=folder.restore_block,
        finished=lambda index: index in done,
        offload=plan.run.offload,
        shards=plan.run.shards,
        team=plan.run.team,
        **hooks,
    )


def _tune(
    plan: Plan, out: Path, folder: PackedFolder, journal: Journal, progress: Progress
) -> None:
    """Train the packed model as a whole, which is in memory for that long, and put what changed
    into its files.

    A killed run trains on from OUT.training.safetensors, or has the result in OUT.tuned.safetensors
    already.
    """
    result = FileState(out, plan.fingerprint, "model", kind="tuned")
    tuned = result.load()
    if tuned is None:
        progress.stage("loading the model")
        teacher = _whole_model(plan)
        if isinstance(folder.base, Rewritten):
            rewrite_model(teacher, folder.base.rewrite)
        student = shared_copy(teacher)
        for index, prefix in enumerate(folder.prefixes):
            folder.restore_block(index, student.get_submodule(prefix))
        tuned = tune(
            student,
            teacher,
            plan.method,
            token_ids(plan.data),
            progress,
            FileState(out, plan.fingerprint, "model"),
        )
        result.save(tuned)
        FileState.clear(out)
    for index, line in sorted(journal.blocks.items()):
        for record in line["linears"]:
            name, shape = record["name"], record["shape"]
            packed = folder.packed(index, name) | _under(name, tuned)
            restored_OI = plan.method.for_linear(name).dequantize(packed, *shape)
            record_tuned(
                record, folder.base.read([f"{name}.weight"])[f"{name}.weight"], restored_OI
            )

        def note(draft: Path, line: dict[str, Any] = line) -> None:
            untuned = line.get("untuned_sha256", line["sha256"])
            journal.tuned_block(
                {**line, "sha256": sha256_file(draft), "untuned_sha256": untuned, "tuned": True}
            )

        folder.tune_block(index, tuned, note)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module, by their names in it."""
    return {
        n.removeprefix(prefix + "."): t for n, t in tensors.items() if n.startswith(prefix + ".")
    }


def _learned(plan: Plan, out: Path, progress: Progress) -> dict[str, Tensor]:
    """What the method learns on the whole model, which is in memory for that long; kept beside OUT
    for resumed runs.
    """
    if not plan.method.learns:
        return {}
    state = FileState(out, plan.fingerprint, "model", kind="learned")
    found = state.load()
    if found is None:
        found = learn(_whole_model(plan).eval(), plan.method, token_ids(plan.data), progress)
        state.save(found)
    return found


def _whole_model(plan: Plan) -> PreTrainedModel:
    """The dense model in memory."""
    kind = auto_class(plan.skeleton.config)
    return kind.from_pretrained(plan.checkpoint.path, dtype=plan.dtype).to(plan.run.device)
