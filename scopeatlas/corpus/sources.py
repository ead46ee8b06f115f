"""Where documents come from: Hugging Face datasets, local files, and the Wikipedia sample inside gensim's wheel.

What belongs here: one function per source that streams `Document`s, and `open_source`, which picks one. What does
not: any choice about which documents to keep (`sampling.py`).
"""

import bz2
import glob
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scopeatlas.corpus.documents import Document, make_conversation, make_document
from scopeatlas.errors import CorpusError

SourceKind = Literal["wikipedia-sample", "files", "huggingface"]


@dataclass(frozen=True)
class Source:
    """A named source of documents.

    kind: `wikipedia-sample`, `files` (globs of parquet, jsonl or txt) or `huggingface` (a dataset, streamed).
    paths: globs, for `files`. dataset, subset, split, revision: for `huggingface`. text_field: the text's column, or
    that of conversations: a list of {role, content} in each row.
    """

    kind: SourceKind
    paths: tuple[str, ...] = ()
    dataset: str = ""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    min_characters: int = 500
    max_documents: int | None = None


def open_source(source: Source) -> Iterator[Document]:
    """Stream the documents of `source` that have at least `min_characters`, at most `max_documents` read.

    Raises CorpusError if nothing is there to read, naming what was looked for.
    """
    readers = {"wikipedia-sample": _wikipedia_sample, "files": _files, "huggingface": _huggingface}
    if source.kind not in readers:
        raise CorpusError(f"unknown corpus source '{source.kind}'; use one of {', '.join(readers)}")
    for number, document in enumerate(readers[source.kind](source)):
        if source.max_documents is not None and number >= source.max_documents:
            return
        if len(document.text) >= source.min_characters:
            yield document


def source_fingerprint(source: Source) -> list[object]:
    """What tells, without reading any text, whether a source may have changed since it was last read."""
    if source.kind == "files":
        paths = _matching_files(source)
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    if source.kind == "wikipedia-sample":
        from importlib.metadata import version

        return ["gensim", version("gensim")]
    # A dataset's content is pinned by its revision; without one, a corpus once built stays as it is.
    return [source.dataset, source.revision]


def _wikipedia_sample(source: Source) -> Iterator[Document]:
    """The articles of the dump excerpt that gensim's wheel carries, stripped of markup by gensim's own parser."""
    try:
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki
        from gensim.test.utils import datapath
    except ImportError as error:
        raise CorpusError("the wikipedia-sample needs gensim: pip install 'scope-atlas[demo]'") from error
    dump = datapath("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")
    with bz2.open(dump) as stream:
        for title, markup, page_id in extract_pages(stream, filter_namespaces=("0",)):  # pyright: ignore[reportArgumentType]
            if not markup.lstrip().lower().startswith("#redirect"):
                text = _tidy_wikitext(filter_wiki(markup))
                yield make_document(text, source=source.kind, metadata={"title": title, "page": page_id})


def _tidy_wikitext(text: str) -> str:
    """Drop what gensim's parser leaves behind: quote marks of bold and italics, bare bullets, empty sections."""
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"^[ \t]*[*#:;|!]+[ \t]*$", "", text, flags=re.M)
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n", text)
    empty_heading = re.compile(r"^=+[^=\n]+=+\n+(?==|\Z)", flags=re.M)
    return empty_heading.sub("", text)


def _files(source: Source) -> Iterator[Document]:
    for path in _matching_files(source):
        for value in _values_of(path, source.text_field):
            yield _document_of(value, str(path), source.text_field, source=path.name, metadata={"file": path.name})


def _document_of(value: object, origin: str, text_field: str, *, source: str, metadata: dict[str, str] | None = None) -> Document:
    """The document that one row's text, or list of {role, content}, is."""
    if isinstance(value, str):
        return make_document(value, source=source, metadata=metadata)
    try:
        turns = [(turn["role"], turn["content"] or "") for turn in value]  # type: ignore[attr-defined]
    except (TypeError, KeyError):
        turns = [("", None)]
    if not all(isinstance(part, str) for turn in turns for part in turn):
        raise CorpusError(f"{origin}: '{text_field}' holds neither text nor a list of {{role, content}}; set corpus.text_field")
    return make_conversation(turns, source=source, metadata=metadata)


def _matching_files(source: Source) -> list[Path]:
    patterns = [str(Path(pattern).expanduser()) for pattern in source.paths]
    paths = sorted({Path(found) for pattern in patterns for found in glob.glob(pattern, recursive=True)})
    if not paths:
        raise CorpusError(
            f"no file matches {', '.join(patterns) or '(no paths given)'}; set corpus.paths to globs of parquet, jsonl or txt"
        )
    return paths


def _values_of(path: Path, text_field: str) -> Iterator[object]:
    try:
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
        elif path.suffix in {".jsonl", ".ndjson"}:
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    if line.strip() and (value := json.loads(line)[text_field]):
                        yield value
        elif path.suffix == ".parquet":
            import pyarrow.parquet as pq

            for batch in pq.ParquetFile(path).iter_batches(columns=[text_field], batch_size=256):
                yield from (value for value in batch.column(0).to_pylist() if value)
        else:
            raise CorpusError(f"{path}: a corpus file is .parquet, .jsonl, .ndjson or .txt")
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise CorpusError(
            f"{path}: cannot read a '{text_field}' column ({error}); mend the file or set corpus.text_field"
        ) from error


def _huggingface(source: Source) -> Iterator[Document]:
    import datasets

    try:
        rows = datasets.load_dataset(source.dataset, source.subset, split=source.split, revision=source.revision, streaming=True)
        for row in rows:
            if source.text_field not in row:
                raise CorpusError(
                    f"{source.dataset} has no field '{source.text_field}'; it has {', '.join(row)}: set corpus.text_field"
                )
            yield _document_of(row[source.text_field] or "", source.dataset, source.text_field, source=source.dataset)
    except (OSError, ValueError, RuntimeError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorpusError(
            f"cannot stream dataset {source.dataset!r}: {message}; check its name, its split and the network"
        ) from error
