"""`python -m llq_hf ...` = `llq ...`; `python -m llq_hf lm_eval ...`, or lmms_eval, where .pth
files are not read.
"""

import runpy
import sys

if __name__ == "__main__":
    harness = sys.argv[1] if len(sys.argv) > 1 else ""
    if harness in ("lm_eval", "lmms_eval"):
        import llq_hf._startup  # noqa: F401

        sys.argv = sys.argv[1:]
    if harness == "lm_eval":
        runpy.run_module("lm_eval", run_name="__main__")
    elif harness == "lmms_eval":
        # Imported, not run as a module: `_startup` hooks into imports
        from lmms_eval.__main__ import (
            cli_evaluate,
        )

        cli_evaluate()
    else:
        from llq_hf.cli import main

        main()
