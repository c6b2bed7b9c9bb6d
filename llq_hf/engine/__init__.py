"""Runs a quantization: takes a model block by block, and writes or replaces what is packed."""
