"""Triton kernels for packed weights on NVIDIA GPUs. `ready` says whether they can run; modules that
import triton are imported when a kernel is first called.
"""
