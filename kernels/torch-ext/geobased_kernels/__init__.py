"""Kernels of geobased: one op, one file, its plain PyTorch twin beside it.

Also a Hub kernel project (universal Triton): imports in this folder are relative and it depends on torch and triton alone.
"""
