"""Where the packages lie; everything else is in pyproject.toml.

`kernels/` and `benchmarks/` stand at the top of the repository and ship inside `llama_fast`: a top-level package named
`kernels` would overwrite the files of Hugging Face's `kernels`, which transformers imports. Every package is named here,
because a search for packages loses both folders on the way from sdist to wheel.
"""

from setuptools import setup

setup(
    packages=[
        "llama_fast",
        "llama_fast.data",
        "llama_fast.fusion",
        "llama_fast.kernels",
        "llama_fast.profiler",
        "llama_fast.benchmarks",
    ],
    package_dir={"llama_fast.kernels": "kernels", "llama_fast.benchmarks": "benchmarks"},
    package_data={
        "llama_fast": ["py.typed", "demo_model/*"],
        "llama_fast.kernels": ["tuned_plans.json"],
        "llama_fast.profiler": ["page.css", "page.html.jinja"],
    },
)
