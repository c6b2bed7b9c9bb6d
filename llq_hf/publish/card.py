"""Makes the model card of a packed checkpoint from its files; nothing in it is typed by hand.

The text is `model_cards/template.md`; this module fills it in. Evaluation results come from the
results files of lm-eval and lmms-eval, and only where their fingerprint says that they scored this
very checkpoint. The licence is the base's, where its card or its LICENSE file came along.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..checkpoints.carried import carried, is_licence
from ..checkpoints.format import CONFIG
from ..checkpoints.inspection import Inspection, inspect_checkpoint
from ..common.errors import LLQError
from ..common.files import read_json
from ..common.markup import markdown, markdown_code, on_one_line
from ..common.resources import template_path
from ..method import Method, field_defaults
from ..methods import build

RESULTS = "results"  # folder in a checkpoint, and in its repository
HARNESSES = {"lm_eval_version": "lm-evaluation-harness", "lmms_eval_version": "lmms-eval"}
SHOWN_DIGITS = 4


@dataclass(frozen=True)
class Result:
    """One figure of one task."""

    task: str
    metric: str
    value: float
    error: float | None  # standard error
    shots: int | None
    higher_is_better: bool | None
    # As EvalResult names it: dataset_type, dataset_config, dataset_split.
    dataset: dict[str, str | None]
    harness: str

    @property
    def shown(self) -> str:
        value = f"{self.value:.{SHOWN_DIGITS}g}"
        return value if not self.error else f"{value} ± {self.error:.2g}"


def make_card(
    path: Path,
    *,
    repo: str | None = None,
    base: str | None = None,
    results: Iterable[Path] | None = None,
) -> ModelCard:
    """The card of the packed checkpoint in the folder `path`.

    repo: its repository, "user/name". base: Hub id of the base model, where the checkpoint does not
    know it. results: results files and folders of them, by default those in `path`/results.
    LLQError where the folder is no whole checkpoint of ours, or a results file is of another one.
    """
    packed = inspect_checkpoint(path)
    method = build(packed["method"], **packed["config"])
    unknown: dict[str, Any] = {"model": "unknown", "revision": None, "card": {}}
    made_from: dict[str, Any] = packed["made_from"] or unknown
    base_card, converted = made_from["card"], made_from.get("converted") or {}
    base = base or made_from["model"]
    repo = on_one_line(repo or f"USER/{path.resolve().name}")
    name = repo.rpartition("/")[2]
    scored = read_results(results_files(path, results), packed)
    vision = "vision_config" in read_json(path / CONFIG)
    task = base_card.get("pipeline_tag") or ("image-text-to-text" if vision else "text-generation")
    texts = [name for name in carried(path) if is_licence(name)]
    licence = _licence(base_card, texts)
    takes_images = task == "image-text-to-text"
    data = ModelCardData(
        base_model=base if _is_repo(base) else None,
        base_model_relation="quantized" if _is_repo(base) else None,
        language=base_card.get("language"),
        library_name="transformers",
        pipeline_tag=task,
        tags=["llq-hf", "quantized", method.name, f"{method.nominal_bits:g}-bit"],
        model_name=name,
        eval_results=[_as_eval_result(each, task) for each in scored] or None,
        **licence,
    )
    return ModelCard.from_template(
        data,
        template_path=str(template_path()),
        text=markdown,
        code=markdown_code,
        quoted=json.dumps,
        word=shlex.quote,
        model_name=name,
        repo=repo,
        version=version("llq-hf"),
        base=base,
        base_revision=made_from["revision"] or converted.get("revision"),
        made=_made(method, converted),
        nominal=f"{method.nominal_bits:g}",
        stored=f"{packed['stored_bits']:.3f}",
        whole_model=f"{packed['whole_model_bits']:.3f}" if packed["whole_model_bits"] else None,
        linears=packed["quantized_linears"],
        rewritten=packed["rewritten"],
        size=f"{packed['bytes'] / 2**20:.1f} MiB",
        auto_class="AutoModelForImageTextToText" if takes_images else "AutoModelForCausalLM",
        processor="AutoProcessor" if takes_images else "AutoTokenizer",
        method=method.name,
        options=packed["config"],
        calibration=f"that of {markdown(base)}"
        if converted
        else _calibration(packed["calibration"], made_from.get("calibration")),
        fingerprint=packed["fingerprint"],
        content=packed["content"],
        command=_command(method, base, name, made_from, packed["identity"])
        if packed["identity"]
        else None,
        results=scored,
        harness=" and ".join(sorted({each.harness for each in scored})),
        activations=not method.weight_only,
        attention=_attention(method),
        cache_bits=_cache_bits(path),
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_files=", ".join(map(markdown_code, texts)),
    )


def _licence(base_card: dict[str, Any], texts: list[str]) -> dict[str, str]:
    """The licence fields of the front matter: the base's own, or a link to its text, or nothing."""
    passed = {key: str(value) for key, value in base_card.items() if key.startswith("license")}
    text = next((name for name in texts if name.lower().startswith(("license", "licence"))), None)
    return passed or ({"license": "other", "license_link": text} if text else {})


def _is_repo(name: str) -> bool:
    """Whether the name can be a Hub id, "user/name", and is not that of a folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _attention(method: Method) -> str:
    """What is rounded where attention reads it, for people; "" where nothing is."""
    if method.attention is None:
        return ""
    bits = {name: value for name, value in method.attention.described.items() if "_bits" in name}
    return ", ".join(f"{name.removesuffix('_bits')} {value:g} bits" for name, value in bits.items())


def _cache_bits(path: Path) -> int | None:
    """The width of the packed key/value cache that generation_config.json asks for."""
    file = path / "generation_config.json"
    asked = read_json(file).get("cache_config") if file.is_file() else None
    if not asked:
        return None
    from ..layers.kv_cache import BACKEND  # it imports transformers, which takes seconds

    return asked.get("nbits") if asked.get("backend") == BACKEND else None


def _made(method: Method, converted: dict[str, Any]) -> str:
    """How the base became this, between the base's name and the bits."""
    if not converted:
        return f"quantized by {method.title} to"
    return f"taken over from the format {converted['format']}, codes unchanged, of"


def _calibration(used: dict[str, Any] | None, drawn: dict[str, Any] | None) -> str:
    if used is None:
        return "none: the method needs no data"
    source = f"{markdown_code(drawn['source'])}, seed {drawn['seed']}, " if drawn else ""
    if "pairs_sha256" in used:
        name, digest = "sha256", used["pairs_sha256"]
        size = f"{used['samples']} image-text pairs, {used['tokens']} tokens"
    else:
        name, digest = "ids sha256", used["ids_sha256"]
        size = f"{used['samples']} x {used['seqlen']} tokens"
    return f"{source}{markdown(size)} ({name} {markdown_code(digest[:16])})"


def _command(
    method: Method, base: str, name: str, made_from: dict[str, Any], identity: dict[str, Any]
) -> str:
    """The `llq quantize` command with every option that differs from its default, or the
    `llq convert`.
    """
    if converted := made_from.get("converted"):
        revision = ["--revision", converted["revision"]] if converted["revision"] else []
        return shlex.join(map(on_one_line, ["llq", "convert", base, name, *revision]))
    words = ["llq", "quantize", base, name, "--method", method.name]
    defaults = field_defaults(type(method))
    for field, value in method.to_dict().items():
        option = field.replace("_", "-")
        if field != "bits" and value == defaults.get(field):
            continue
        words += (
            [f"--{option}" if value else f"--no-{option}"]
            if isinstance(value, bool)
            else [f"--{option}", value]
        )
    if drawn := made_from.get("calibration"):
        for key in ("samples", "seqlen", "seed"):
            words += [f"--calibration-{key}", drawn[key]]
        words += ["--calibration", drawn["source"]]
    if made_from["revision"]:
        words += ["--revision", made_from["revision"]]
    words += ["--shards", identity["shards"]] if "shards" in identity else []
    words += ["--dtype", identity["dtype"], "--device", identity["device"]]
    return shlex.join(map(on_one_line, words))


# --- results --------------------------------------------------------------------------------------


def results_files(path: Path, given: Iterable[Path] | None) -> list[Path]:
    """Results files: those given, and those in the folders given; by default in `path`/results."""
    files: list[Path] = []
    for each in given if given is not None else [path / RESULTS]:
        if not each.exists() and given is not None:
            raise LLQError(
                f"{each} does not exist; give a results file of lm-eval or lmms-eval, or a folder "
                "of them"
            )
        if each.is_dir():
            files += sorted(each.rglob("*results*.json"))
        elif each.is_file():
            files.append(each)
    return files


def read_results(files: Iterable[Path], checkpoint: Inspection) -> list[Result]:
    """The figures in results files, the newest of each task and metric.

    checkpoint: as `inspect_checkpoint` gives it. LLQError for a file that scored another model.
    """
    newest: dict[tuple[str, str], tuple[float, Result]] = {}
    for file in files:
        content = read_json(file)
        check_scored(file, content, checkpoint)
        date = content.get("date") or 0
        seconds = file.stat().st_mtime if isinstance(date, str) else float(date)
        for result in _figures(content):
            key = (result.task, result.metric)
            if key not in newest or seconds >= newest[key][0]:
                newest[key] = (seconds, result)
    return [result for _, result in newest.values()]


def check_scored(file: Path, content: dict[str, Any], checkpoint: Inspection) -> None:
    """LLQError unless the file says that it scored this checkpoint."""
    config = content.get("config")
    scored = (config.get("llq") if isinstance(config, dict) else None) or content.get("llq")
    if not isinstance(content.get("results"), dict) or not isinstance(scored, dict):
        raise LLQError(
            f"{file} holds no results of a model that `--model llq` scored; "
            "score the checkpoint with that"
        )
    for key in ("fingerprint", "method", "config"):
        if scored.get(key) != checkpoint[key]:
            raise LLQError(
                f"{file} scored another model: its {key} is {scored.get(key)}, "
                f"the checkpoint's {checkpoint[key]}"
            )


def _figures(content: dict[str, Any]) -> Iterable[Result]:
    harness = next(
        (name for key, name in HARNESSES.items() if key in content), HARNESSES["lm_eval_version"]
    )
    for task, values in content["results"].items():
        dataset = _dataset(task, content.get("configs", {}).get(task, {}))
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not kind or metric.endswith("_stderr") or not number:
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            yield Result(
                task=task,
                metric=metric if kind == "none" else f"{metric} ({kind})",
                value=value,
                error=error if isinstance(error, int | float) else None,
                shots=content.get("n-shot", {}).get(task),
                higher_is_better=content.get("higher_is_better", {}).get(task, {}).get(metric),
                dataset=dataset,
                harness=harness,
            )


def _dataset(task: str, config: dict[str, Any]) -> dict[str, str | None]:
    """The dataset of a task, by its Hub id if it has one."""
    path = config.get("dataset_path")
    known = isinstance(path, str) and _is_repo(path)
    return {
        "dataset_type": path if known else task,
        "dataset_config": config.get("dataset_name") if known else None,
        "dataset_split": config.get("test_split") or config.get("validation_split"),
    }


def _as_eval_result(result: Result, task_type: str) -> EvalResult:
    return EvalResult(
        task_type=task_type,
        task_name=result.task,
        dataset_name=result.task,
        metric_type=result.metric,
        metric_name=result.metric,
        metric_value=result.value,
        metric_args={"num_fewshot": result.shots} if result.shots is not None else None,
        **result.dataset,
    )
