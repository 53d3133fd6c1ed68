"""Triton's kernels compiled for the CPU: TTIR -> LLVM IR -> machine code, run on PyTorch's own threads.

machine.py     what code generation must know of a CPU
drivers.py     the LLVM IR around a kernel: a thread's share of the programs, launches, recordings
codegen.py     LLVM IR text -> machine code in this process; cache.py keeps it on disk, perf.py tells `perf` its names
threads.py     the OpenMP runtime that PyTorch has loaded, and how many threads a launch gets
launch.py      a compiled kernel, and its launches
recorded.py    many launches by one native call: what a CUDA graph is to a GPU
"""
