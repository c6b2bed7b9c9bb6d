"""Modules that take the place of a model's own: packed linears and attention with low-bit keys and
values.
"""
