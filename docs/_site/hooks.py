"""What makes the site of Markdown that a git host shows as well. mkdocs calls the functions named on_*.

- The site is the repository's tree with docs/ laid over its root. So README.md is the home page, and whatever a page links to outside of
  docs/ becomes a page too: Markdown in its place, other files as listings in source/. Links between the two trees are rewritten.
- A pattern in mkdocs.yml's nav stands for the files that match it, by name, README.md first.
- Maths as git hosts write it, a block ```math or $`inline`$, becomes MathML: nothing has to be loaded for it.
- A page that would load something from the network is a warning, hence the end of a strict build.
"""

from __future__ import annotations

import html
import logging
import os
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

LOG = logging.getLogger("mkdocs.hooks.site")

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
HERE = DOCS / "_site"

# Fences come first, so that what they hold is never taken for a link.
LINK = re.compile(r"^```.*?^```$|(\]\()([^)\s#]+)(#[^)\s]*)?(?=\))", re.MULTILINE | re.DOTALL)
LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>|<link\b(?![^>]*rel=[\"']?canonical)[^>]*href=[\"']?(?:https?:)?//[^>]*>"
)
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cu": "cuda", ".cuh": "cuda", ".yml": "yaml", ".toml": "toml"}


def site_uri(file: Path) -> str:
    """Where the site has a file of the repository. No name may begin with a dot or an underscore, which would hide it."""
    if published(file):
        return file.relative_to(DOCS).as_posix()
    parts = file.relative_to(ROOT).parts
    return "/".join(parts) if file.suffix == ".md" else "/".join(["source", *(part.lstrip("._") for part in parts)]) + ".md"


def published(file: Path) -> bool:
    """Whether mkdocs takes the file by itself."""
    return file.is_relative_to(DOCS) and not file.is_relative_to(HERE)


def linked_files(page: Path) -> list[Path]:
    """The repository's files to which a page links."""
    targets = [match[2] for match in LINK.finditer(page.read_text(encoding="utf-8")) if match[2] and ":" not in match[2]]
    return [file for target in targets if (file := Path(os.path.normpath(page.parent / target))).is_file() and file.is_relative_to(ROOT)]


def expanded(nav):
    if isinstance(nav, list):
        return [expanded(entry) for entry in nav]
    if isinstance(nav, dict):
        return {title: expanded(entry) for title, entry in nav.items()}
    if "*" not in nav:
        return nav
    pages = sorted(DOCS.glob(nav), key=lambda page: (page.name != "README.md", page.name))
    return [page.relative_to(DOCS).as_posix() for page in pages]


def math_block(source, language, css_class, options, md, **kwargs):
    return mathml(source, display="block")


def mathml(tex: str, display: str = "inline") -> str:
    r"""What latex2mathml does otherwise: it gives each letter of \mathrm and \mathtt an element of its own, does not know aligned, sets functions
    and bars as if they were relations, and a prime, which fonts have raised already, as an exponent."""
    tex = tex.replace("{aligned}", "{align*}")
    tex = re.sub(r"\\mathtt\{((?:[^{}\\]|\\_)*)\}", lambda match: rf"\text{{<{match[1]}>}}", tex)
    tex = re.sub(r"\\mathrm\{((?:[^{}\\]|\\_)*)\}", r"\\text{\1}", tex).replace(r"\_", "_")
    converted = convert(tex, display=display)
    converted = re.sub(r"<mo>(min|max)</mo>", r"<mi>\1</mi>", converted)
    converted = converted.replace("<mo>&#x0007C;</mo>", '<mo stretchy="false" lspace="0" rspace="0">|</mo>')
    converted = re.sub(r"<msup>(<mi>\w</mi>)<mi>&#x02032;</mi></msup>", r'\1<mo lspace="0" rspace="0">&#x02032;</mo>', converted)
    return re.sub(r"<mtext>&lt;(.*?)&gt;</mtext>", r'<mtext class="code">\1</mtext>', converted)


def on_config(config):
    config.nav = expanded(config.nav)
    superfences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    superfences["custom_fences"] = [{"name": "math", "class": "math", "format": math_block}]
    return config


def on_files(files, *, config):
    pending = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
    pending += [link for file in files.documentation_pages() for link in linked_files(Path(file.abs_src_path))]
    added: set[Path] = set()
    while pending:
        file = pending.pop()
        if file in added or published(file):
            continue
        added.add(file)
        if file.suffix == ".md":
            files.append(File.generated(config, site_uri(file), abs_src_path=str(file)))
            pending += linked_files(file)
        else:
            name = file.relative_to(ROOT).as_posix()
            listing = f"---\nhide: [toc]\n---\n\n# {name}\n\n~~~~~{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8')}\n~~~~~\n"
            files.append(File.generated(config, site_uri(file), content=listing))
    return files


def on_page_markdown(markdown, *, page, config, files):
    source = Path(page.file.abs_src_path) if page.file.abs_src_path else None
    if source is None:
        return markdown

    def rewritten(match):
        start, target, anchor = match.groups()
        if not target or ":" in target:
            return match[0]
        file = Path(os.path.normpath(source.parent / target))
        if not file.is_relative_to(ROOT):
            return match[0]
        return f"{start}{posixpath.relpath(site_uri(file), posixpath.dirname(page.file.src_uri) or '.')}{anchor or ''}"

    return LINK.sub(rewritten, markdown)


def on_page_content(content, *, page, config, files):
    return re.sub(r"\$<code>(.*?)</code>\$", lambda match: mathml(html.unescape(match[1])), content)


def on_post_page(output, *, page, config):
    for loaded in LOADED.findall(output):
        LOG.warning(f"{page.file.src_uri} loads from the network: {loaded}")
    return output
