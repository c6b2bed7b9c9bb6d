"""`python -m llq_hf ...` = `llq ...`; `python -m llq_hf lm_eval ...` runs lm-eval where .pth files are not read."""

import runpy
import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["lm_eval"]:
        import llq_hf._startup  # noqa: F401

        sys.argv = sys.argv[1:]
        runpy.run_module("lm_eval", run_name="__main__")
    else:
        from llq_hf.cli import main

        main()
