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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoints.dense import Rewritten
from ..checkpoints.format import CONFIG
from ..checkpoints.journal import FileState, Journal
from ..checkpoints.packed import PackedFolder, finished_fingerprint, read_report
from ..checkpoints.records import BlockLine, LinearRecord, Report
from ..checkpoints.shards import digest_of
from ..common.errors import LLQError
from ..common.machine import peak_bytes
from ..common.progress import Progress
from ..data.calibration import Calibration
from ..kernels import reference
from ..method import Method
from ..models.decoder import block_prefixes, quantizable
from ..models.load import auto_class
from .blocks import StreamedBlocks
from .options import RunOptions
from .prepare import Plan, prepare
from .step import quantize_step, record_tuned
from .walk import walk
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
) -> Report:
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
def execute(plan: Plan, out: Path, progress: Progress) -> Report:
    """Run a plan into `out`; returns the report. Of a team's processes the leader writes, the
    others compute along.
    """
    if not plan.run.team.leads:
        return _follow(plan, out, progress)
    journal = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A second process waits here, then finds the work done.
        with FileLock(out.with_name(out.name + ".lock")):
            if finished_fingerprint(out) == plan.fingerprint:
                if not Journal.damaged(out):
                    plan.run.team.tell(None)
                    return read_report(out)
                (out / CONFIG).unlink()  # nothing loads it until the damaged blocks are done again
            journal = Journal.open(out, plan.identity)
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


def _write(plan: Plan, out: Path, journal: Journal, progress: Progress) -> Report:
    """Run the plan as the leader of its team."""
    learned = _learned(plan, out, progress)
    plan = replace(plan, method=plan.method.with_learned(learned))
    blocks, folder = _opened(plan, out, learned)
    tuned = FileState(out, plan.fingerprint, "model", kind="tuned")
    folder.open()
    journal.verify(out, rewritten=_in_files(folder, tuned.load() or {}))
    done = sorted(journal.blocks)
    plan.run.team.tell(done)
    total = len(blocks.prefixes)
    progress.blocks(len(done), total)
    started = time.perf_counter()
    for block in walk(blocks, plan.data, plan.method, progress, plan.run):
        if block.index in journal.blocks:
            if block.feeds_next:
                folder.restore_block(block.index, block.module)
            continue
        linears: list[LinearRecord] = []
        for step in block.steps(FileState(out, plan.fingerprint, block.index)):
            linears += quantize_step(step, plan.method, plan.run.team)
        line: BlockLine = {
            "block": block.index,
            "tensors": folder.save_block(block.index, block.module),
            "linears": linears,
            "seconds": time.perf_counter() - started,
            "peak_bytes": peak_bytes(),
        }
        journal.finish_block(line)
        FileState.clear(out)
        progress.blocks(block.index + 1, total)
        started = time.perf_counter()
    if plan.method.tunes:
        _tune(plan, out, folder, journal, progress)
    records = journal.linears()
    if len(records) != len(folder.linears):
        raise LLQError(
            f"{len(records)} linears were quantized, {len(folder.linears)} should have been; "
            f"delete {journal.path} and start anew"
        )
    report = folder.finish(records, plan.identity, plan.made_from)
    FileState.clear(out, kind="tuned")
    return report


def _follow(plan: Plan, out: Path, progress: Progress) -> Report:
    """Run the plan as a process that does not lead: the same walk, its share of the work, and no
    files.
    """
    done = plan.run.team.tell(None)
    if done is None:
        return read_report(out)
    blocks, folder = _opened(plan, out, {})
    for block in walk(blocks, plan.data, plan.method, progress, plan.run):
        if block.index in done:
            if block.feeds_next:
                folder.restore_block(block.index, block.module)
            continue
        for step in block.steps():
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
    base = Rewritten.of(plan.checkpoint, rewrite)
    shapes = {
        name: (linear.out_features, linear.in_features)
        for name, linear in quantizable(plan.skeleton).items()
    }
    return blocks, PackedFolder(out, base, blocks.prefixes, plan.method, shapes)


def _in_files(folder: PackedFolder, tensors: dict[str, Tensor]) -> set[str]:
    """Names that these tensors of the model have in the folder's files."""
    return {folder.base.in_file(name) for name in tensors}


def _tune(
    plan: Plan, out: Path, folder: PackedFolder, journal: Journal, progress: Progress
) -> None:
    """Train the packed model as a whole, which is in memory for that long, and write what changed.

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
            name = record["name"]
            packed = folder.packed(name) | _under(name, tuned)
            restored_OI = plan.method.for_linear(name).dequantize(packed, *folder.linears[name])
            weight_OI = folder.base.read([f"{name}.weight"])[f"{name}.weight"]
            record_tuned(record, weight_OI, restored_OI)
        changed = folder.tuned(index, tuned)
        digests = {name: digest_of(tensor) for name, tensor in changed.items()}
        # The line comes first: a kill in between leaves tensors that the next run writes anew.
        journal.replace_block({**line, "tensors": {**line["tensors"], **digests}, "tuned": True})
        folder.shards.write(changed)


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
