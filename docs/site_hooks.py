"""Hooks of the site (mkdocs.yml): pages that lie beside docs/, and links to files of the repository.

README, CONTRIBUTING and CHANGELOG become pages. A file that a page links to is copied as text under `repository/`; a folder has no page, and of
a link to one the words stay. So a link means the same in the repository and on the site.
"""

import re
from os.path import normpath
from pathlib import Path, PurePosixPath
from posixpath import relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# an inline link or picture; what code shows is left alone
LINK = re.compile(r"(```.*?```|`[^`\n]*`)|\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    linked: set[str] = set()
    pages = [file for file in files.documentation_pages() if file.abs_src_path]
    pages += [File.generated(config, page, abs_src_path=str(ROOT / name)) for name, page in PAGES.items()]
    for file in pages:
        source = Path(str(file.abs_src_path))
        text = _rewritten(source.read_text(encoding="utf-8"), source, file.src_uri, linked)
        if file.src_uri in files.src_uris:
            files.remove(files.src_uris[file.src_uri])
        files.append(File.generated(config, file.src_uri, content=text))
    for path in sorted(linked):
        files.append(File.generated(config, f"repository/{path}.txt", abs_src_path=str(ROOT / path)))
    return files


def _rewritten(text: str, source: Path, page: str, linked: set[str]) -> str:
    """The text of a page with the links it needs on the site; adds the files that it links to."""

    def link(match: re.Match[str]) -> str:
        code, words, target = match.groups()
        if code or "://" in target:
            return match[0]
        address, hash_sign, anchor = target.partition("#")
        # the second heading of one name is -1 on GitHub, and _1 here
        anchor = hash_sign + re.sub(r"-(\d)$", r"_\1", anchor)
        if not address:
            return f"[{words}]({anchor})"
        path = PurePosixPath(Path(normpath(source.parent / address)).relative_to(ROOT))
        if str(path) in PAGES:
            place = PAGES[str(path)]
        elif path.is_relative_to("docs"):
            place = str(path.relative_to("docs"))
        elif (ROOT / path).is_dir():
            return str(words)
        else:
            linked.add(str(path))
            place = f"repository/{path}.txt"
        return f"[{words}]({relpath(place, str(PurePosixPath(page).parent))}{anchor})"

    return LINK.sub(link, text)
