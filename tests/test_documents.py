"""README and docs: links lead somewhere, pictures are of today's code, the site builds, README is of a page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import slim
from tracking.plots import digest_of_code

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = sorted((ROOT / "docs").rglob("*.png"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(document: Path) -> set[str]:
    """The headings of a document as links name them: small letters, words joined by hyphens, without other signs."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_is_of_a_page() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 130


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_no_picture_is_older_than_the_code_that_draws_it(picture: Path) -> None:
    with Image.open(picture) as image:
        *names, digest = image.info.get("Software", "unknown:unknown").split()
    assert names, "drawn before pictures said what drew them"
    assert digest == digest_of_code(names), (
        f"{picture.name}: {' '.join(names)} changed; the document beside it has the command"
    )


def test_every_picture_is_shown_somewhere() -> None:
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert not [picture.name for picture in PICTURES if f"{picture.name})" not in text]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_documents_all_that_is_public(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr + done.stdout
    page = (tmp_path / "site" / "library" / "index.html").read_text(encoding="utf-8")
    documented = re.findall(r'<h[2-6] id="slim\.(?:\w+\.)?(\w+)" class="doc', page)
    public = {name for name, value in vars(slim).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert public <= set(documented), public - set(documented)
    assert (tmp_path / "site" / "index.html").is_file() and (
        tmp_path / "site" / "contributing" / "index.html"
    ).is_file()
