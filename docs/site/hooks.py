"""What the site needs beyond the settings of mkdocs.yml: the layout of the repository, and docstrings as Markdown."""

from __future__ import annotations

import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "benchmarks/**/*.md")
ASSETS = "docs/site/**/*"
AS_THEY_ARE = {".md", ".png", ".css", ".js", ".woff2"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces the files of docs/ by the repository's pages, under their paths, with the files that they link to.

    A link between files then works on the site and in the repository alike. The site shows source files as plain text.
    """
    root = Path(config.config_file_path).parent
    for file in [*files]:
        if file.src_dir == config.docs_dir:
            files.remove(file)
    pages = {path for pattern in PAGES for path in root.glob(pattern)}
    linked = {page.parent / link for page in pages for link in re.findall(r"\]\(([\w./-]+)", page.read_text())}
    assets = {path for path in root.glob(ASSETS) if path.suffix in AS_THEY_ARE}
    for path in sorted({path.resolve() for path in pages | linked | assets if path.is_file()}):
        file = File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path))
        if path.suffix not in AS_THEY_ARE:
            file.dest_uri += ".txt"
        files.append(file)
    return files


def referenced() -> dict[str, str]:
    """Dotted paths of what the API reference shows, by the names that docstrings call them."""
    modules, others = set(), set()
    for page in (Path(__file__).parents[1] / "api").glob("*.md"):
        for shown in page.read_text().split("\n::: ")[1:]:
            path = shown.split(maxsplit=1)[0]
            if members := re.search(r"members: \[(.*)\]", shown):
                modules.add(path)
                others |= {f"{path}.{name}" for name in re.findall(r"\w+", members[1])}
            else:
                others.add(path)
    deepest_first = sorted(others, key=lambda path: (-path.count("."), path))  # of two with one name the library's wins
    by_name = {path.rpartition(".")[2]: path for path in deepest_first}
    by_package = {f"spo_kernels.{name}": path for name, path in by_name.items()}
    return by_package | by_name | {path: path for path in modules | others}


class Docstrings(griffe.Extension):
    """Writes what docstrings do beside Google's style as its parser, and Markdown, read it; links names."""

    paths = referenced()

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            text = as_markdown(obj.docstring.value)
            if isinstance(obj, griffe.Function):  # else the parser takes what stands before a colon for the type
                text = text.replace("Returns:\n    ", f"Returns:\n    {obj.returns}: ")
            obj.docstring.value = re.sub(r"(?<![`\w])`([\w.]+)`(?!`)", lambda found: self.linked(found[1], obj), text)

    def linked(self, name: str, obj: griffe.Object) -> str:
        path = self.paths.get(f"{obj.module.path}.{name}") or self.paths.get(name)
        return f"`{name}`" if path is None or path == obj.path else f"[`{name}`][{path}]"

    def on_class_members(self, *, cls: griffe.Class, **_: object) -> None:
        """Fields of a record are described by comments beside them: those become the section "Attributes"."""
        fields = {name: field for name, field in cls.attributes.items() if field.annotation and not field.value}
        comments = {name: field.source.partition("  # ")[2] for name, field in fields.items()}
        lines = [f"    {name}: {comment}" for name, comment in comments.items() if comment]
        if cls.docstring and lines and "\nAttributes:\n" not in cls.docstring.value:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)


def as_markdown(text: str) -> str:
    # A list of parameters that share a description may take two lines.
    text = re.sub(r"^( +\w+(?:, \w+)*,)\n +(\w+(?:, \w+)*: )", r"\1 \2", text, flags=re.MULTILINE)
    # "alpha: > 0" is a range, not a quotation.
    text = re.sub(r"^( +\w+(?:, \w+)*: )>", r"\1\\>", text, flags=re.MULTILINE)
    # "Options. ...:" and indented lines "name, name: description", as in a section "Args:".
    options = re.compile(r"^(Options\..*\n)((?: {4}.*\n)+)", re.MULTILINE)
    item = re.compile(r"^ {4}(\w+(?:, \w+)*): ", re.MULTILINE)
    return options.sub(lambda found: found[1] + "\n" + item.sub(r"- `\1`: ", found[2]), text)
