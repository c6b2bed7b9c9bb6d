"""What plugs llq-hf into transformers, lm-evaluation-harness and lmms-eval."""
