"""Runs a plan: reads, quantizes and writes one decoder block at a time.

The run keeps a journal beside the output folder, from which the same command resumes it after a
kill. What needs the whole model in memory is done once, and kept beside the folder too: what a
method learns before the first block, and how it tunes the packed model after the last one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoints.dense import Rewritten
from ..checkpoints.format import CONFIG
from ..checkpoints.hashes import is_whole, restore_journal
from ..checkpoints.journal import FileState, Journal, clean, clean_drafts
from ..checkpoints.packed import PackedFolder, Speak, finished_fingerprint, read_report
from ..checkpoints.records import BlockLine, LinearRecord, Report
from ..checkpoints.shards import digest_of
from ..common.errors import LLQError
from ..common.files import locked, make_folder, remove
from ..common.machine import peak_bytes
from ..common.prefix import below
from ..common.progress import Progress
from ..data.calibration import Calibration
from ..kernels import reference
from ..method import Method
from ..models.decoder import block_prefixes, quantizable
from ..models.load import load_dense
from .base import check_as_loaded
from .blocks import StreamedBlocks
from .options import RunOptions
from .precision import full_precision
from .prepare import Plan, prepare
from .step import quantize_step, record_tuned
from .walk import walk
from .whole_model import learn, rewrite_model, shared_copy, tune

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
    """Quantize `model` (folder or Hub id) into the folder `out`; the report.

    An interrupted run in `out` is resumed. LLQError for anything that is wrong with the input,
    before the first block if it can be known then.
    """
    progress = progress or Progress()
    try:
        plan = prepare(model, method, calibration, run or RunOptions(), out, progress)
        return execute(plan, out, progress)
    finally:
        progress.close()


def execute(plan: Plan, out: Path, progress: Progress) -> Report:
    """Run a plan into the folder `out`; the report.

    In a distributed run the first process writes all files. LLQError where `out` cannot be written.
    """
    out = out.absolute()  # "." has no name, beside which the journal could lie
    if not plan.run.team.leads:
        with reference(), full_precision():
            return _compute(plan, out, progress)
    journal = None
    try:
        make_folder(out.parent)
        # A second run of the same command waits here, and then finds the work done.
        with locked(out.with_name(out.name + ".lock")):
            if not _is_done(out, plan.fingerprint):
                with reference(), full_precision():
                    check_as_loaded(
                        plan.checkpoint,
                        plan.skeleton,
                        plan.dtype,
                        torch.device(plan.run.device),
                        plan.data,
                        plan.identity,
                        progress,
                    )
                    journal = _journal(out, plan)
                    finish = _compute_and_write(plan, out, journal, progress)
                finish(plan.run.speak)  # as a user runs it: with kernels
            clean(out)
            plan.run.team.broadcast_json(None)  # all is written
            return read_report(out)
    except (OSError, SafetensorError) as error:
        if journal is None:
            raise LLQError(
                f"{out} cannot be written ({error}); give another folder, or free some space"
            ) from error
        raise LLQError(
            f"writing to {out} failed ({error}); free some space and run the same command again: "
            f"{len(journal.blocks)} of {len(block_prefixes(plan.skeleton))} blocks are kept"
        ) from error


def _is_done(out: Path, run: str) -> bool:
    """Whether the run of this fingerprint finished the folder, and all is there as it was then."""
    try:
        return finished_fingerprint(out) == run and is_whole(out)
    except LLQError:  # config.json cannot be read
        return False


def _journal(out: Path, plan: Plan) -> Journal:
    """The journal of a run that begins, goes on, or mends a finished folder.

    LLQError where the folder belongs to something else.
    """
    if not Journal.beside(out).is_file():
        restore_journal(out, plan.fingerprint)
    journal = Journal.open(out, plan.identity)
    remove(out / CONFIG)  # nothing loads the folder until all is done
    clean_drafts(out)
    return journal


def _compute_and_write(
    plan: Plan, out: Path, journal: Journal, progress: Progress
) -> Callable[[Speak | None], Report]:
    """Run the plan in the only process, or in the first of several. What is left is to finish the
    folder.
    """
    learned = _load_or_learn(plan, out, progress)
    plan = replace(plan, method=plan.method.with_learned(learned))
    blocks, folder = _open(plan, out, learned)
    outside = folder.open()
    tuned = FileState(out, plan.fingerprint, "model", kind="tuned")
    journal.verify(out, rewritten={folder.base.in_file(name) for name in tuned.load() or {}})
    done = sorted(journal.blocks)
    plan.run.team.broadcast_json(done)
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
    digests = [outside, *(line["tensors"] for _, line in sorted(journal.blocks.items()))]
    return partial(folder.finish, records, plan.identity, plan.made_from, digests)


def _compute(plan: Plan, out: Path, progress: Progress) -> Report:
    """Run the plan in a process that is not the first: compute its share, write no files."""
    done = plan.run.team.broadcast_json(None)
    if done is None:  # the folder is finished
        return read_report(out)
    blocks, folder = _open(plan, out, {})
    for block in walk(blocks, plan.data, plan.method, progress, plan.run):
        if block.index in done:
            if block.feeds_next:
                folder.restore_block(block.index, block.module)
            continue
        for step in block.steps():
            quantize_step(step, plan.method, plan.run.team)
    plan.run.team.broadcast_json(None)  # waits until the first process has written all
    return read_report(out)


def _open(plan: Plan, out: Path, learned: dict[str, Tensor]) -> tuple[StreamedBlocks, PackedFolder]:
    """The blocks to read, and the folder to write.

    A method that rewrites the dense model does so tensor by tensor, as they are read.
    """
    rewrite = plan.method.rewrite(plan.skeleton, learned)
    source = Rewritten.of(plan.checkpoint, rewrite, plan.dtype)
    blocks = StreamedBlocks(source, plan.skeleton, plan.dtype, torch.device(plan.run.device))
    base = Rewritten.of(plan.checkpoint, rewrite)
    shapes = {
        name: (linear.out_features, linear.in_features)
        for name, linear in quantizable(plan.skeleton).items()
    }
    return blocks, PackedFolder(out, base, blocks.prefixes, plan.method, shapes)


def _tune(
    plan: Plan, out: Path, folder: PackedFolder, journal: Journal, progress: Progress
) -> None:
    """Train the packed model as a whole, which is in memory meanwhile, and write what changed.

    A killed run resumes the training from OUT.training.safetensors. Once the training is done, its
    result is in OUT.tuned.safetensors.
    """
    result = FileState(out, plan.fingerprint, "model", kind="tuned")
    tuned = result.load()
    if tuned is None and journal.is_tuned:
        return  # by a run that finished, whose folder is mended
    if tuned is None:
        progress.stage("loading the model")
        teacher = _whole_model(plan)
        if isinstance(folder.base, Rewritten):
            rewrite_model(teacher, folder.base.rewrite)
        student = shared_copy(teacher)
        for index, prefix in enumerate(folder.prefixes):
            folder.restore_block(index, student.get_submodule(prefix))
        state = FileState(out, plan.fingerprint, "model")
        tuned = tune(student, teacher, plan.method, plan.data, progress, state)
        result.save(tuned)
        FileState.clear(out)
    _write_tuned(plan, folder, journal, tuned)


def _write_tuned(
    plan: Plan, folder: PackedFolder, journal: Journal, tuned: dict[str, Tensor]
) -> None:
    """Write the tuned tensors to their places, and what they change in the journal."""
    for index, line in sorted(journal.blocks.items()):
        stored = folder.packed(record["name"] for record in line["linears"])
        for record in line["linears"]:
            name = record["name"]
            packed = stored[name] | below(f"{name}.", tuned)
            restored_OI = plan.method.for_linear(name).dequantize(packed, *folder.linears[name])
            weight_OI = folder.base.read([f"{name}.weight"])[f"{name}.weight"]
            record_tuned(record, weight_OI, restored_OI)
        changed = folder.tuned(index, tuned)
        digests = {name: digest_of(tensor) for name, tensor in changed.items()}
        # The line comes first: a kill in between leaves tensors that the next run writes anew.
        journal.replace_block({**line, "tensors": {**line["tensors"], **digests}, "tuned": True})
        folder.shards.write(changed.items())


def _load_or_learn(plan: Plan, out: Path, progress: Progress) -> dict[str, Tensor]:
    """What the method learns on the whole model, which is in memory meanwhile.

    A resumed run finds it in OUT.learned.safetensors.
    """
    if not plan.method.learns:
        return {}
    state = FileState(out, plan.fingerprint, "model", kind="learned")
    learned = state.load()
    if learned is None:
        learned = learn(_whole_model(plan), plan.method, plan.data, progress)
        state.save(learned)
    return learned


def _whole_model(plan: Plan) -> PreTrainedModel:
    """The dense model in memory."""
    return load_dense(
        plan.checkpoint.path, plan.skeleton.config, plan.dtype, torch.device(plan.run.device)
    )
