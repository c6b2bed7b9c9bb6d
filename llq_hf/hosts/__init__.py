"""Sockets of other people's programs: transformers, lm-evaluation-harness, lmms-eval."""
