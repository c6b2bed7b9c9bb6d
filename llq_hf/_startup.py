"""Imported by llq_hf_startup.pth at every interpreter start, so only `sys` is imported here, and
nothing may fail.

It puts a finder on sys.meta_path that finds nothing itself: when one of the modules in `HOOKS` is
imported by somebody, the real finders do their work and a short callback runs right after. That is
how lm-eval learns of the model `llq`, lm-eval and lmms-eval of our tasks, and transformers of our
quantization configs, with no flag and no import. LLQ_DISABLE=1 switches it off.
"""

import sys

TYPE_CHECKING = False  # typing's own costs a millisecond; checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


def _on_transformers(module: "ModuleType") -> None:
    import llq_hf.hosts.hf_quantizer  # noqa: F401 (registers itself as its last statement; a no-op while it is itself being imported)


def _on_transformers_cache(module: "ModuleType") -> None:
    # One more backend of QuantizedCache, so that generate(cache_implementation="quantized",
    # cache_config={"backend": "llq", "nbits": 4}) finds it.
    from functools import wraps

    original = module.QuantizedCache.__init__

    @wraps(original)
    def __init__(self, backend, config, *args, **options):  # type: ignore[no-untyped-def]
        if backend != "llq":
            original(self, backend, config, *args, **options)
            return
        from llq_hf.layers.kv_cache import packed_layers

        names = ("nbits", "axis_key", "axis_value", "q_group_size", "residual_length")
        options.update(zip(names, args, strict=False))
        module.Cache.__init__(self, layers=packed_layers(config, **options))

    module.QuantizedCache.__init__ = __init__


def _on_lm_eval_models(module: "ModuleType") -> None:
    # After lm_eval.models ran: it is imported only while the registry is empty, so registering
    # earlier hides the rest.
    from lm_eval.api.registry import model_registry

    if "llq" not in model_registry:
        model_registry.register("llq", target="llq_hf.hosts.lm_eval_model:LLQLM")


def _on_lm_eval_huggingface(module: "ModuleType") -> None:
    # Our tasks about windows of tokens have request types of their own, which every Hugging Face
    # model gets, `hf` too.
    def llq_windows_nll(self, requests):  # type: ignore[no-untyped-def]
        from llq_hf.hosts.lm_eval_perplexity import windows_nll

        return windows_nll(self, requests)

    def llq_windows_kl(self, requests):  # type: ignore[no-untyped-def]
        from llq_hf.hosts.lm_eval_divergence import windows_kl

        return windows_kl(self, requests)

    module.HFLM.llq_windows_nll = llq_windows_nll
    module.HFLM.llq_windows_kl = llq_windows_kl


def _on_lm_eval_tasks(module: "ModuleType") -> None:
    from pathlib import Path

    from llq_hf.common.resources import tasks_folder

    original = module.TaskIndex.build
    builtin = Path(module.__file__ or "").parent
    ours = tasks_folder("lm_eval")

    def build(paths, **options):  # type: ignore[no-untyped-def]
        paths = list(paths)
        # Absent when the caller wants no defaults. Ours go before --include_path, which wins.
        if builtin in paths:
            paths.insert(paths.index(builtin) + 1, ours)
        return original(paths, **options)

    module.TaskIndex.build = staticmethod(build)


def _on_peft(module: "ModuleType") -> None:
    # An adapter of ours on a base it was not trained on is refused, however it is loaded.
    _check_adapters(module.PeftModel, lambda model_id=None, *rest, **options: model_id)


def _on_transformers_peft(module: "ModuleType") -> None:
    _check_adapters(
        module.PeftAdapterMixin, lambda peft_model_id=None, *rest, **options: peft_model_id
    )


def _check_adapters(loader: type, folder_of: "Callable[..., object]") -> None:
    from functools import wraps

    original = loader.load_adapter  # type: ignore[attr-defined]

    @wraps(original)
    def load_adapter(self, *args, **options):  # type: ignore[no-untyped-def]
        folder = folder_of(*args, **options)
        if folder:  # None: tensors are given, not a folder
            from llq_hf.checkpoints.adapter import check_base

            check_base(self, str(folder))
        return original(self, *args, **options)

    loader.load_adapter = load_adapter  # type: ignore[attr-defined]


def _on_peft_tuners(module: "ModuleType") -> None:
    from llq_hf.hosts.peft_tuners import checking_targets, merging_dense

    tuner = module.BaseTuner
    tuner._check_target_module_compatiblity = checking_targets(
        tuner._check_target_module_compatiblity
    )
    tuner.merge_adapter = merging_dense(tuner.merge_adapter)
    tuner.merge_and_unload = merging_dense(tuner.merge_and_unload)


def _on_lmms_eval_tasks(module: "ModuleType") -> None:
    from llq_hf.common.resources import tasks_folder

    original = module.TaskManager.initialize_tasks

    def initialize_tasks(self, include_path=None, include_defaults=True):  # type: ignore[no-untyped-def]
        paths = [include_path] if isinstance(include_path, str) else list(include_path or [])
        if include_defaults:  # earlier folders win
            paths.append(str(tasks_folder("lmms_eval")))
        return original(self, include_path=paths, include_defaults=include_defaults)

    module.TaskManager.initialize_tasks = initialize_tasks


def _on_lmms_eval_evaluator(module: "ModuleType") -> None:
    _wrap(module, "evaluate", "carrying_llq")
    # Of `python -m lmms_eval`, whose main module is not imported
    _wrap(module, "simple_evaluate", "failing_loudly")


def _on_lmms_eval_main(module: "ModuleType") -> None:
    _wrap(module, "cli_evaluate_single", "failing_loudly")


def _wrap(module: "ModuleType", name: str, wrapper: str) -> None:
    """Put a wrapper of lmms_eval.py, which is imported when it is called, around a function of
    `module`.
    """
    original = module.__dict__[name]

    def wrapped(*args, **kwargs):  # type: ignore[no-untyped-def]
        from llq_hf.hosts import lmms_eval_model

        return getattr(lmms_eval_model, wrapper)(original)(*args, **kwargs)

    module.__dict__[name] = wrapped


def lmms_eval_models():  # type: ignore[no-untyped-def]
    """Entry point `lmms_eval.models`: here, since it is loaded whichever model lmms-eval runs."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llq", simple_class_path="llq_hf.hosts.lmms_eval_model.LLQ")


HOOKS = {
    "transformers.quantizers.auto": _on_transformers,
    "transformers.cache_utils": _on_transformers_cache,
    "transformers.integrations.peft": _on_transformers_peft,
    "peft.peft_model": _on_peft,
    "peft.tuners.tuners_utils": _on_peft_tuners,
    "lm_eval.models": _on_lm_eval_models,
    "lm_eval.models.huggingface": _on_lm_eval_huggingface,
    "lm_eval.tasks._index": _on_lm_eval_tasks,
    "lmms_eval.tasks": _on_lmms_eval_tasks,
    "lmms_eval.evaluator": _on_lmms_eval_evaluator,
    "lmms_eval.__main__": _on_lmms_eval_main,
}


def _run(hook: "Callable[[ModuleType], None]", module: "ModuleType") -> None:
    try:
        hook(module)
    except Exception as error:  # a bug of ours must never break `import transformers`
        import warnings

        text = (
            f"llq-hf could not hook into {module.__name__} ({type(error).__name__}: {error}); "
            "LLQ_DISABLE=1 skips it"
        )
        warnings.warn(text, stacklevel=2)


class _Finder:
    @staticmethod
    def find_spec(fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        hook = HOOKS.get(fullname)
        if hook is None:
            return None
        for finder in sys.meta_path:
            find = None if finder is _Finder else getattr(finder, "find_spec", None)
            spec = find and find(fullname, path, target)
            if spec is not None and spec.loader is not None:
                break
        else:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            execute(module)
            _run(hook, module)

        try:
            # on the instance: type, source and pickling of the loader are unchanged
            spec.loader.exec_module = exec_module
        except (
            AttributeError
        ):  # a loader that takes no attributes: the module works, only we are not in it
            return None
        return spec


def install() -> None:
    """Put the finder in place, once, and serve modules that are imported already."""
    import os

    if os.environ.get("LLQ_DISABLE", "") not in ("", "0") or _Finder in sys.meta_path:
        return
    sys.meta_path.insert(0, _Finder)
    for name, hook in HOOKS.items():
        if name in sys.modules:
            _run(hook, sys.modules[name])


install()
