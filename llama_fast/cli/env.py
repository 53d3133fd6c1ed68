"""`llama-fast env`: what is installed, and which implementation each op uses."""

from rich.table import Table

from .common import console


def env() -> None:
    """What is installed, which GPU is there, which implementation each op will use and why."""
    from .. import environment

    table = Table("package", "version", title="Installed")
    for name, version in environment.versions().items():
        table.add_row(name, version if version != "not installed" else f"[dim]{version}[/]")
    console.print(table)

    gpus = environment.gpus()
    console.print("GPUs: " + ("; ".join(gpus) if gpus else "none that PyTorch can use"))

    device = environment.default_device()
    implementation = environment.implementation_on(device)
    table = Table("op", f"implementation for {device.type} tensors", title="Ops")
    for op in environment.op_names():
        table.add_row(op, implementation.name)
    console.print(table)
    console.print(f"Why: {implementation.reason}.")
