"""A checkpoint run: from a folder of dense weights to a folder of packed ones, never holding the model.

Blocks are read, quantized and written one at a time. `prepare` checks everything that can be checked before hours are
spent; `execute` writes (see `packed.py`), with a journal beside the folder that a killed run goes on from. A method may
rewrite the dense tensors first, one at a time as they are read; only what it must learn for that on the whole model
is learned with all of it in memory, once, and kept in OUT.learned.safetensors.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn

from ..checkpoints.dense import Checkpoint, Rewritten, origin
from ..checkpoints.journal import FileState, Journal, fingerprint, sha256_file
from ..checkpoints.packed import CONFIG, PackedFolder, finished_fingerprint, read_report
from ..common.errors import LLQError
from ..data.pairs import Pairs, read_pairs
from ..data.windows import Calibration, ids_sha256
from ..kernels import reference
from ..method import FORMAT_VERSION, Method, Step
from ..models.decoder import block_prefixes, quantizable
from ..models.load import auto_class, module_names, sees
from .prepare import estimate, problems_of
from .step import (
    Progress,
    RunOptions,
    learn,
    quantize_step,
    record_tuned,
    rewrite_model,
    shared_copy,
    steps,
    token_ids,
    tune,
)
from .team import edges_of
from .walk import StreamedBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Plan:
    """A checkpoint run that passed its checks."""

    checkpoint: Checkpoint
    skeleton: PreTrainedModel
    method: Method
    data: Tensor | Pairs | None  # token ids [N, S], or image-text pairs
    identity: dict[str, Any]
    made_from: dict[str, Any]
    run: RunOptions
    dtype: torch.dtype
    estimates: dict[str, float]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)


def quantize_checkpoint(
    model: str,
    out: Path,
    method: Method,
    calibration: Calibration,
    run: RunOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize `model` (folder or Hub id) into the folder `out`, or go on where an interrupted run stopped.

    Returns the report. LLQError for anything wrong with the input, before work starts where it can be known then.
    """
    progress = progress or Progress()
    try:
        return execute(prepare(model, method, calibration, run or RunOptions(), out, progress), out, progress)
    finally:
        progress.close()


@reference()
def prepare(
    model: str,
    method: Method,
    calibration: Calibration,
    run: RunOptions,
    out: Path | None,
    progress: Progress,
) -> Plan:
    """Everything that can be checked before hours are spent; all problems in one error."""
    progress.stage("reading checkpoint headers")
    checkpoint = Checkpoint.open(model, run.revision)
    if checkpoint.is_quantized:
        kind = checkpoint.config["quantization_config"].get("quant_method", "unknown")
        raise LLQError(f"{model} is quantized already ({kind}); give the full-precision model")
    skeleton = build_skeleton(checkpoint.path)
    method = method.fitted(skeleton)
    dtype = _dtype(run.dtype, skeleton)
    check_device(run.device)
    progress.stage("hashing the base model", len(checkpoint.files))
    base, not_finite = checkpoint.scan(lambda done, total: progress.advance())
    checkpoint = checkpoint.named(module_names(skeleton, checkpoint.files))
    problems = problems_of(checkpoint, skeleton, method)
    problems += [f"{name} holds NaN or infinity" for name in not_finite]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise LLQError(f"{model} cannot be quantized: " + "; ".join(problems[:8]) + more)
    if run.team.size > 1 and not method.shares_out:
        raise LLQError(
            f"{method.name} reads activations or trains while it quantizes, which processes cannot share; run it in one"
        )
    data, described = calibration_data(calibration, method, skeleton.config, checkpoint.path, progress)
    if isinstance(data, Pairs) and run.shards > 1:
        raise LLQError(f"shards={run.shards}: image-text pairs of different lengths are not shared out; give 1")
    if data is not None:
        run.team.own(edges_of(len(data), run.shards))
    identity = {
        "format_version": FORMAT_VERSION,
        "base_sha256": base,
        "method": method.name,
        "config": method.to_dict(),
        "calibration": described,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.device(run.device).type,
        **({"shards": run.shards} if described and run.shards > 1 else {}),
    }
    made_from = {**origin(checkpoint.path), "calibration": calibration.described if described else None}
    source = Rewritten.of(checkpoint, method.rewrite(skeleton, {}))
    estimates = estimate(source, skeleton, method, data, dtype, run, out, progress)
    progress.estimates(estimates)
    return Plan(checkpoint, skeleton, method, data, identity, made_from, run, dtype, estimates)


def calibration_data(
    calibration: Calibration, method: Method, config: Any, path: Path, progress: Progress, tokenizer: Any = None
) -> tuple[Tensor | Pairs | None, dict[str, Any] | None]:
    """(token ids [N, S] or pairs, what a checkpoint says about them) for a method that reads any.

    config, path: the model's; tokenizer: another one than lies there. LLQError where data, model and method do not fit.
    """
    if not method.reads_data:
        return None, None
    text_config = config.get_text_config()
    if not calibration.has_images:
        progress.stage("tokenizing the calibration data")
        if tokenizer is None and calibration.needs_tokenizer:
            tokenizer = load_tokenizer(path)
        ids_NS = calibration.ids(tokenizer, text_config.vocab_size)
        return ids_NS, {"ids_sha256": ids_sha256(ids_NS), "samples": ids_NS.shape[0], "seqlen": ids_NS.shape[1]}
    if not sees(config):
        raise LLQError(f"{calibration.source} holds images and {path} takes none; calibrate on text")
    if method.learns or method.tunes:
        raise LLQError(f"{method.name} trains the whole model, on token ids; calibrate it on text")
    pairs = read_pairs(calibration.source, load_processor(path), calibration.samples, calibration.seed)
    progress.stage("reading the calibration images", len(pairs))
    pairs = pairs.measured(text_config.max_position_embeddings, progress.advance)
    return pairs, pairs.described()


@reference()
def execute(plan: Plan, out: Path, progress: Progress) -> dict[str, Any]:
    """Run a plan into `out`; returns the report. Of a team's processes the leader writes, the others compute along."""
    if not plan.run.team.leads:
        return _follow(plan, out, progress)
    journal = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.with_name(out.name + ".lock")):  # a second process waits, then finds the work done
            if finished_fingerprint(out) == plan.fingerprint:
                if not Journal.damaged(out):
                    plan.run.team.tell(None)
                    return read_report(out)
                (out / CONFIG).unlink()  # not a whole checkpoint until the damaged blocks are done again
            journal = Journal.open(out, plan.identity)
            plan.run.team.tell(sorted(journal.blocks))
            report = _write(plan, out, journal, progress)
            plan.run.team.tell(None)
            return report
    except (OSError, SafetensorError) as error:
        if journal is None:
            raise LLQError(f"{out} cannot be written ({error}); give another folder, or free some space") from error
        for draft in out.glob("*.tmp"):
            draft.unlink(missing_ok=True)
        raise LLQError(
            f"writing to {out} failed ({error}); free some space and run the same command again: "
            f"{len(journal.blocks)} of {len(block_prefixes(plan.skeleton))} blocks are kept"
        ) from error


def _write(plan: Plan, out: Path, journal: Journal, progress: Progress) -> dict[str, Any]:
    learned = _learned(plan, out, progress)
    plan = replace(plan, method=plan.method.taught(learned))
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
    """What a process of a team does that does not lead: the same walk, its share of the work, no files."""
    done = plan.run.team.tell(None)
    if done is None:
        return read_report(out)
    blocks, folder = _opened(plan, out, {})
    for step in _todo(plan, blocks, folder, done, progress):
        quantize_step(step, plan.method, plan.run.team)
    plan.run.team.tell(None)  # until the leader has written all
    return read_report(out)


def _opened(plan: Plan, out: Path, learned: dict[str, Tensor]) -> tuple[StreamedBlocks, PackedFolder]:
    """Where the run reads its blocks, and the folder that they go to."""
    rewrite = plan.method.rewrite(plan.skeleton, learned)
    source = Rewritten.of(plan.checkpoint, rewrite, plan.dtype)
    blocks = StreamedBlocks(source, plan.skeleton, plan.dtype, torch.device(plan.run.device))
    return blocks, PackedFolder(out, Rewritten.of(plan.checkpoint, rewrite), blocks.prefixes, plan.method)


def _todo(
    plan: Plan, blocks: StreamedBlocks, folder: PackedFolder, done: Collection[int], progress: Progress, **hooks: Any
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


def _tune(plan: Plan, out: Path, folder: PackedFolder, journal: Journal, progress: Progress) -> None:
    """Train the packed model as a whole, which is in memory for that long, and put what changed into its files.

    A killed run trains on from OUT.training.safetensors, or has the result in OUT.tuned.safetensors already.
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
            student, teacher, plan.method, token_ids(plan.data), progress, FileState(out, plan.fingerprint, "model")
        )
        result.save(tuned)
        FileState.clear(out)
    for index, line in sorted(journal.blocks.items()):
        for record in line["linears"]:
            name, shape = record["name"], record["shape"]
            packed = folder.packed(index, name) | _under(name, tuned)
            restored_OI = plan.method.at(name).dequantize(packed, *shape)
            record_tuned(record, folder.base.read([f"{name}.weight"])[f"{name}.weight"], restored_OI)

        def note(draft: Path, line: dict[str, Any] = line) -> None:
            untuned = line.get("untuned_sha256", line["sha256"])
            journal.tuned_block({**line, "sha256": sha256_file(draft), "untuned_sha256": untuned, "tuned": True})

        folder.tune_block(index, tuned, note)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module, by their names in it."""
    return {n.removeprefix(prefix + "."): t for n, t in tensors.items() if n.startswith(prefix + ".")}


def _learned(plan: Plan, out: Path, progress: Progress) -> dict[str, Tensor]:
    """What the method learns on the whole model, which is in memory for that long; kept beside OUT for resumed runs."""
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


def peak_bytes() -> int:
    """Peak resident memory of this process, or peak allocated GPU memory where a GPU is used."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build_skeleton(path: Path) -> PreTrainedModel:
    """The model of a checkpoint folder's config on the meta device: shapes, no memory."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and the Hub client validate with a dozen types
        raise LLQError(f"{path / 'config.json'} describes no model: {one_line(error)}") from error
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a missing file, a missing package, a broken JSON: each raises its own
        raise LLQError(
            f"{path} has no tokenizer that can be loaded ({one_line(error)}); put the model's there, or calibrate on a "
            ".npy file of token ids"
        ) from error


def load_processor(path: str | Path, revision: str | None = None) -> Any:
    """Tokenizer and image processor of a model that sees; LLQError where they, or the chat template, are not there."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # as above
        raise LLQError(f"{path} has no processor that can be loaded ({one_line(error)})") from error
    if not getattr(processor, "chat_template", None):
        raise LLQError(f"{path} has no chat template; put the base model's chat_template.jinja there")
    return processor


def one_line(error: Exception) -> str:
    """The first line of other people's many."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_device(name: str) -> None:
    """LLQError unless a tensor can be put there."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise LLQError(f"device={name!r} cannot be used here ({one_line(error)}); give cpu, or auto") from error


def _dtype(name: str | None, skeleton: PreTrainedModel) -> torch.dtype:
    if name in (None, "auto"):
        found = getattr(skeleton.config, "dtype", None) or getattr(skeleton.config.get_text_config(), "dtype", None)
        return found if isinstance(found, torch.dtype) else torch.float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if str(dtype) == f"torch.{name}":
            return dtype
    raise LLQError(f"dtype={name!r} is not one of auto, float32, bfloat16, float16")
