"""What mkdocs does beside its own: README.md and CONTRIBUTING.md become pages, and links lead to files of the checkout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def on_files(files: Files, config: Any) -> None:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as the site has them: of what lies beside docs/, a copy."""
    inside = {page: source for source, page in PAGES.items()}
    folder = (ROOT / inside.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def of_the_site(found: re.Match[str]) -> str:
        target = (folder / found[1]).resolve().relative_to(ROOT).as_posix()
        if target in PAGES:
            return PAGES[target]
        if target.startswith("docs/"):
            return target.removeprefix("docs/")
        if (ROOT / target).is_file() and files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
        return target

    return _LINK.sub(of_the_site, markdown)
