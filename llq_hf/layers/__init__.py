"""Modules that replace a model's own: packed linears, attention with low-bit keys and values."""
