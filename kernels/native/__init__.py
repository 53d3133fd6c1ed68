"""Triton's kernels compiled for the CPU: TTIR -> LLVM IR -> machine code, run on PyTorch's own threads.

machine.py     what code generation must know of a CPU
drivers.py     the LLVM IR around a kernel: a thread's share of the programs
codegen.py     LLVM IR text -> machine code in this process (llvmlite_compat.py: or there is no llvmlite);
               cache.py keeps it on disk, perf.py tells `perf` the names
threads.py     a launch on the threads of the OpenMP that PyTorch has loaded, and how many it gets
failures.py    what a kernel's asserts and bounds checks tell its launch
launch.py      a compiled kernel, and its launches as functions of Python
recorded.py    many launches by one native call: what a CUDA graph is to a GPU
"""
