"""Triton's kernels compiled for the CPU: TTIR -> LLVM IR -> machine code, run on PyTorch's own threads.

compiled.py    a plan's kernel as machine code: where all of this comes together
front_end.py   a plan's kernel as TTIR, by Triton's own front end; ttir.py reads it, lowering/ makes LLVM IR of it (math/: its
               functions)
inspection.py  what the machine code of a kernel holds
machine.py     what code generation must know of a CPU
drivers.py     the LLVM IR around a kernel: a thread's share of the programs
codegen.py     LLVM IR text -> machine code in this process (llvmlite_compat.py: or there is no llvmlite);
               cache.py keeps it on disk, perf.py tells `perf` the names
once.py        one lock for compiling, and what is made once in a process
threads.py     a launch on the threads of the OpenMP that PyTorch has loaded, and how many it gets
failures.py    what a kernel's asserts and bounds checks tell its launch
launch.py      a compiled kernel, and its launches as functions of Python
remembered.py  ops that skip planning where they have seen the shapes; tensors.py looks into tensors for them
recorded.py    many launches by one native call: what a CUDA graph is to a GPU
"""
