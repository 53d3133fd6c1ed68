"""Where the packages lie; everything else is in pyproject.toml.

`kernels/` and `benchmarks/` stand at the top of the repository and ship inside `llama_fast`: a top-level package named
`kernels` would overwrite the files of Hugging Face's `kernels`, which transformers imports. Every package is named here,
because a search for packages loses both folders on the way from sdist to wheel.
"""

from setuptools import setup

setup(
    packages=[
        "llama_fast",
        "llama_fast.cli",
        "llama_fast.data",
        "llama_fast.data.read",
        "llama_fast.data.report",
        "llama_fast.data.run",
        "llama_fast.data.sources",
        "llama_fast.data.steps",
        "llama_fast.decoder",
        "llama_fast.decoder.gguf",
        "llama_fast.demo_model",
        "llama_fast.engine",
        "llama_fast.evaluate",
        "llama_fast.evaluate.report",
        "llama_fast.fusion",
        "llama_fast.kernels",
        "llama_fast.kernels.native",
        "llama_fast.kernels.native.lowering",
        "llama_fast.kernels.native.lowering.products",
        "llama_fast.kernels.native.math",
        "llama_fast.profiler",
        "llama_fast.profiler.attribute",
        "llama_fast.profiler.measure",
        "llama_fast.profiler.report",
        "llama_fast.reports",
        "llama_fast.tasks",
        "llama_fast.train",
        "llama_fast.train.report",
        "llama_fast.benchmarks",
        "llama_fast.benchmarks.engines",
        "llama_fast.benchmarks.report",
        "llama_fast.benchmarks.suite",
    ],
    package_dir={"llama_fast.kernels": "kernels", "llama_fast.benchmarks": "benchmarks"},
    package_data={
        "llama_fast": ["py.typed"],
        "llama_fast.data.report": ["*.css", "*.jinja"],
        "llama_fast.demo_model": ["*"],
        "llama_fast.kernels": ["tuned_plans.json"],
        "llama_fast.evaluate.report": ["*.css", "*.jinja"],
        "llama_fast.profiler.report": ["*.css", "*.jinja"],
        "llama_fast.reports": ["*.css", "*.jinja"],
        "llama_fast.train.report": ["*.css", "*.jinja"],
        "llama_fast.benchmarks.report": ["*.css", "*.jinja"],
    },
)
