"""Write local text as a split of a corpus, one file per document, without the tags of tagged words."""

import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from symphony_hf.errors import ConfigError, DataError
from symphony_hf.files import replacing_folder
from symphony_hf.results import check_folder_of

from .datasets import TABLE_FORMATS
from .documents import SPLITS, pieces_of
from .files import warn_of_tables

_WORD = re.compile(r"\S+")
_BLANK_LINES = re.compile(r"\n\s*\n")
_NOT_TEXT = re.compile(r"(readme|contents|cats|licen[cs]e)(\.\w+)?", re.IGNORECASE)


@dataclass(frozen=True)
class PreparedSplit:
    """Folder of a split of a corpus, and the numbers of its documents, one file each, and words."""

    folder: Path
    num_documents: int
    num_words: int


def prepare_split(
    source: str | Path, output: str | Path, *, split: str = "train", strip_tags: str | None = None
) -> PreparedSplit:
    """Write a text file, a folder or a zip archive as a split of a corpus that `load_corpus` reads.

    A single file is cut at blank lines into documents of about 2,000 characters, as `load_corpus` does. Each file of a
    folder or archive is one document and keeps its path. Lists of contents, licences and README files are skipped, and
    tables are left out. The output folder gets its name only when it is complete.

    Args:
        source: UTF-8 text file, folder, or zip archive.
        output: Folder of the corpus. Documents are written to `<output>/<split>/<name of source>/`.
        split: `train`, `validation` or `test`.
        strip_tags: Character that separates a word from its tag. Each word is cut at its last occurrence, unless that
            leaves nothing. Blank lines are removed too, since tagged text has them around each sentence.

    Raises:
        ConfigError: If there is no such split, `strip_tags` is not a single character, or nothing can be written to
            `output`.
        DataError: If `source` has no text, is a table, cannot be read or is not UTF-8, two documents have one name, or
            the output folder exists.

    Warns:
        SymphonyWarning: If tables are left out of a folder or archive.
    """
    if split not in SPLITS:
        raise ConfigError(f"prepare: split must be train, validation or test; got {split!r}")
    if strip_tags is not None and (len(strip_tags) != 1 or strip_tags.isspace()):
        raise ConfigError(f"prepare: strip_tags must be one character, such as /; got {strip_tags!r}")
    source = Path(source).expanduser()
    folder = Path(output).expanduser() / split / source.name
    check_folder_of(folder, "prepare")
    if folder.exists():
        raise DataError(f"{folder}: something is there already; remove it, or give another --output")
    texts: dict[PurePosixPath, str] = {}
    tables: list[str] = []
    for name, text in _texts(source, tables):
        if text.strip():
            _add(texts, name, _plain(text, strip_tags), source)
    if not texts:
        only = f": `{tables[0]}` is a table, and `data.path` reads tables directly" if tables else ""
        raise DataError(f"{source}: no text in it{only}")
    warn_of_tables(source, tables)
    _write(texts, folder)
    return PreparedSplit(folder, len(texts), sum(len(text.split()) for text in texts.values()))


def _add(texts: dict[PurePosixPath, str], name: PurePosixPath, text: str, source: Path) -> None:
    """Add a document under the path of its file.

    Raises:
        DataError: If another document has the path, or a file has the name of its folder.
    """
    file = name.with_name(f"{name.name}.txt")
    for taken in (file, *file.parents):
        if taken in texts:
            raise DataError(f"{source}: `{name}` would overwrite another document, `{taken}`: rename one")
    texts[file] = text


def _write(texts: Mapping[PurePosixPath, str], folder: Path) -> None:
    with replacing_folder(folder) as written:
        for file, text in texts.items():
            (written / file).parent.mkdir(parents=True, exist_ok=True)
            (written / file).write_text(text, encoding="utf-8")


def _plain(text: str, separator: str | None) -> str:
    if separator is None:
        return text
    words = _WORD.sub(lambda match: match[0].rpartition(separator)[0] or match[0], text)
    return _BLANK_LINES.sub("\n", words).lstrip("\n")


def _texts(source: Path, tables: list[str]) -> Iterator[tuple[PurePosixPath, str]]:
    """Yield the path within the source and the text of each document. The names of tables are added to `tables`."""
    if source.is_dir():
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            name = PurePosixPath(path.relative_to(source).as_posix())
            if _is_text(name, tables):
                yield name, _decoded(path.read_bytes(), path)
    elif zipfile.is_zipfile(source) or (source.is_file() and source.suffix.lower() == ".zip"):
        yield from _archived(source, tables)
    elif source.is_file():
        if _is_table(PurePosixPath(source.name), tables):
            return
        # Lines as of a file in text mode: a form feed does not end one.
        lines = io.StringIO(_decoded(source.read_bytes(), source), newline=None)
        for number, piece in enumerate(pieces_of(lines)):
            yield PurePosixPath(f"{number:05d}"), piece
    else:
        raise DataError(f"{source}: no such file or folder")


def _archived(source: Path, tables: list[str]) -> Iterator[tuple[PurePosixPath, str]]:
    where = f"{source}"
    try:
        with zipfile.ZipFile(source) as archive:
            for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
                where = f"{source}: {entry.filename}"
                name = PurePosixPath(entry.filename.lstrip("/"))  # an absolute one would be written outside
                if not entry.is_dir() and _is_text(name, tables):
                    yield name, _decoded(archive.read(entry), where)
    # RuntimeError: encrypted; NotImplementedError, a kind of it: another compression.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(
            f"{where}: cannot be read from the archive ({error}): unpack it, and give the folder"
        ) from error


def _is_text(name: PurePosixPath, tables: list[str]) -> bool:
    """Whether a file of a folder or archive is a document. The name of a table is added to `tables`."""
    hidden = any(part.startswith(".") for part in name.parts)  # `..` too
    return not hidden and not _NOT_TEXT.fullmatch(name.name) and not _is_table(name, tables)


def _is_table(name: PurePosixPath, tables: list[str]) -> bool:
    if name.suffix.lower() not in TABLE_FORMATS:
        return False
    tables.append(str(name))
    return True


def _decoded(contents: bytes, where: Path | str) -> str:
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason}); convert it first") from error
