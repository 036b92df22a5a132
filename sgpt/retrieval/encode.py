"""A corpus of any size to files of embeddings that databases and numpy read: train/encode.py.

    <output>/00000.parquet    id (string) and vector (a list of fixed size) of the first texts; with format=npy
                              00000.npy [texts, dimensions], for a memory map, and their ids in 00000.ids.json
    <output>/_encoding.json   what they are: model and contract by their fingerprints, role, size, the files
    <output>/_reduction.safetensors
                              directions of reduce=pca and ranges of precision=int8 (sgpt/retrieval/smaller.py)
    <output>.manifest.json    of the job (sgpt/runtime/jobs.py)

Readers of Parquet take the folder as one dataset, as files that begin with _ are none to them.

Texts are streamed: in memory are all ids, for ids must differ, and the texts of one shard. A shard is embedded by one
process and renamed when it is whole, so a kill loses a shard a process. What has to be fitted on all embeddings waits
for them: they lie as float32 in `.<output>.<hash>.building/raw/` until then.

    opened = open_encoded("vectors", encoder)           for queries: refuses another model
    opened.queries(["parse a date"])                    [1, dimensions], for the stored vectors
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

from sgpt.data.formats.beir import stream_texts
from sgpt.decoder.int8 import multiplies_int8
from sgpt.decoder.model_files import first_line, read_json
from sgpt.decoder.trunk import DTYPES
from sgpt.encoder.encoder import Encoder
from sgpt.retrieval.smaller import SizeConfig, Sizing
from sgpt.runtime.distributed import from_main, world
from sgpt.runtime.embed import embed_blocks
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import replace_folder, write_whole
from sgpt.runtime.jobs import Job
from sgpt.runtime.progress import Advance, announce
from sgpt.runtime.provenance import content_hash
from sgpt.runtime.values import COUNT, THREADS, check_choice, check_ranges
from sgpt.text.markers import ROLES, Role

log = logging.getLogger(__name__)
DESCRIPTION = "_encoding.json"
FORMAT = 1
VECTOR_FORMATS = ("parquet", "npy")


@dataclass
class EncodeConfig(SizeConfig):
    """Keys of train/encode.py."""

    model: str = ""
    """Run, export, adapter, base (folder or hub id) or sentence-transformers folder."""
    dtype: str = "float32"
    """Of the model's weights: float32, bfloat16, float16, int8 (the fastest on a CPU with VNNI) or nf4."""
    texts: str = ""
    """BEIR folder, or a file of rows with _id and text: JSON lines, CSV, TSV or Parquet."""
    role: str = "document"
    """document or query: whose markers stand around the texts, and which file of a BEIR folder is read."""
    output: str = ""
    """A new folder."""
    format: str = "parquet"
    """parquet, for databases; or npy: numpy's arrays, for a memory map."""
    normalize: bool = True
    """Vectors are of length 1, so that inner products are cosines."""
    texts_per_shard: int = 16_384
    """Texts in a file: what a killed start loses at most, per process."""
    threads: int | None = None
    """Threads of each process on a CPU; null shares out the cores."""
    resume: bool = False
    """Continue a killed job of the same configuration and texts, by any number of processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("role", self.role, ROLES)
        check_choice("format", self.format, VECTOR_FORMATS)
        check_ranges(self, texts_per_shard=COUNT, threads=THREADS.or_null("to share the cores"))

    @property
    def size(self) -> SizeConfig:
        return SizeConfig(self.reduce, self.dimensions, self.precision)


@dataclass(frozen=True)
class Encoded:
    """A folder that `encode_texts` wrote, and the model that embeds queries for it."""

    folder: Path
    description: dict[str, Any]
    sizing: Sizing
    encoder: Encoder

    def queries(self, texts: list[str]) -> np.ndarray:
        """[texts, dimensions], float32, projected as the stored vectors were."""
        embeddings = self.encoder.encode_queries(texts, normalize=self.description["normalize"])
        return self.sizing.project(embeddings)

    def shards(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Ids, and vectors as they are stored, of each shard; a memory map where they are .npy."""
        for file in self.description["files"]:
            yield read_shard(self.folder / file)


def open_encoded(folder: str | Path, encoder: Encoder) -> Encoded:
    """InputError where there is no whole output, and where another model made it."""
    folder = Path(folder)
    description = _read_description(folder)
    if description["model"] != encoder.fingerprint():
        raise InputError(
            f"{folder} was encoded by another model than this one ({description['name']}, dtype "
            f"{description['dtype']}): its weights, tokenizer or contract differ; open that one"
        )
    size = SizeConfig(**description["size"])
    sizing = Sizing.load(folder, size, description["normalize"], encoder.embedding_size)
    return Encoded(folder, description, sizing, encoder)


def _read_description(folder: Path) -> dict[str, Any]:
    """InputError where it is missing, damaged, or of another version."""
    file = folder / DESCRIPTION
    if not file.is_file():
        raise InputError(f"{file}: no such file; encode with output={folder} first, or resume with resume=true")
    description = read_json(file)
    if description.get("format") != FORMAT:
        raise InputError(
            f"{file}: format {description.get('format')!r:.40} is of another version of this framework, and format "
            f"{FORMAT} is read here; use that version, or encode the texts again"
        )
    kinds = {"name": str, "dtype": str, "model": str, "size": dict, "normalize": bool, "files": list}
    for key, kind in kinds.items():
        if not isinstance(description.get(key), kind):
            raise InputError(f"{file}: key {key!r} is {description.get(key)!r:.60}; encode the texts again")
    if description["size"].keys() != {one.name for one in fields(SizeConfig)}:
        raise InputError(f"{file}: key 'size' is {description['size']!r:.60}; encode the texts again")
    sizes = description.get("bytes", {})  # which older outputs do not state
    for name in map(str, description["files"]):
        shard = folder / name
        if not shard.is_file() or sizes.get(name, shard.stat().st_size) != shard.stat().st_size:
            problem = "is missing" if not shard.is_file() else f"has {shard.stat().st_size:,} of {sizes[name]:,} bytes"
            raise InputError(
                f"{shard}: the file {problem}; put the whole folder back, or remove it to encode the texts again"
            )
    return description


def encode_texts(config: EncodeConfig, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Writes the folder, or resumes a killed job; returns what _encoding.json says, {} on all but the main process."""
    if not config.model or not config.texts or not config.output:
        raise InputError("set model=<folder>, texts=<BEIR folder or file> and output=<folder>")
    announce(f"{config.output}: the texts of {config.texts} are embedded by {config.model}, on {device}")
    with Job(config, "encoded") as job:
        return _encode_texts(config, job, device)


def _encode_texts(config: EncodeConfig, job: Job, device: torch.device | str) -> dict[str, Any]:
    role: Role = "query" if config.role == "query" else "document"
    encoder = Encoder.from_pretrained(config.model, dtype=config.dtype).to(device)
    _check_size(config, encoder.embedding_size)
    number, texts_hash = from_main(lambda: _counted(Path(config.texts), role))
    config.size.check_texts(number)
    model = encoder.fingerprint()
    inputs: dict[str, str | int] = {f"model {config.model}": model, f"texts of {config.texts}": texts_hash}
    if config.dtype == "int8":  # a processor without rounds no activation, and gives other vectors
        inputs["products in int8"] = int(multiplies_int8(encoder.device))
    if not job.start(inputs):
        _read_description(job.output)  # whole still
        log.info("%s was finished at %s; nothing is encoded", job.output, job.manifest["finished"])
        return job.results
    layout = [role, config.normalize, config.format, config.texts_per_shard]
    of_these = content_hash(inputs, asdict(config.size), layout)[:8]
    shards = _Shards(config, job.output.with_name(f".{job.output.name}.{of_these}.building"), number)
    done = job.blocks.done["block"]
    missing = [] if job.output.exists() else from_main(lambda: shards.start(done, resumed=job.resumed))
    _embed(config, role, encoder, job, shards, missing)

    def write() -> dict[str, Any]:
        if not job.output.exists():  # else it was killed between the output and the word that it is finished
            description = {
                "format": FORMAT, "name": config.model, "dtype": config.dtype, "model": model,
                "contract": encoder.contract.fingerprint(), "role": role, "texts": number, "texts_hash": texts_hash,
                "size": asdict(config.size), "normalize": config.normalize,
                "dimensions": config.dimensions or encoder.embedding_size,
            }  # fmt: skip
            shards.finish(description)
            replace_folder(shards.folder, job.output)
        return json.loads((job.output / DESCRIPTION).read_text(encoding="utf-8"))

    return job.finish(write)


def _check_size(config: EncodeConfig, embedding_size: int) -> None:
    if config.dimensions and config.dimensions > embedding_size:
        raise InputError(f"dimensions={config.dimensions}: {config.model} has {embedding_size}; take at most as many")
    if config.precision == "binary" and (config.dimensions or embedding_size) % 8:
        raise InputError(
            f"precision=binary packs eight dimensions a byte, and {config.model} has {embedding_size}; "
            "set reduce and dimensions=<a multiple of 8>"
        )


def _counted(path: Path, role: Role) -> tuple[int, str]:
    """How many texts, and a hash of their ids and contents, all of which are checked on the way."""
    number = 0

    def counted() -> Iterator[tuple[str, str]]:
        nonlocal number
        for row in stream_texts(path, role):
            number += 1
            yield row

    texts_hash = content_hash(counted())
    if not number:
        raise InputError(f"{path}: no texts in it; give a file with at least one")
    return number, texts_hash


def _embed(config: EncodeConfig, role: Role, encoder: Encoder, job: Job, shards: "_Shards", missing: list[int]) -> None:
    """This process's share of the missing shards, and a line with the speed of all processes."""
    stream = _Stream(Path(config.texts), role)
    started = time.monotonic()
    ids: list[str] = []

    def embed(rows: slice, advance: Advance) -> np.ndarray:
        ids_and_texts = stream.read(rows)
        ids[:] = [identifier for identifier, _ in ids_and_texts]
        texts = [text for _, text in ids_and_texts]
        return encoder.encode(texts, role, normalize=config.normalize, progress=advance)

    def save(shard: int, rows: slice, embeddings: np.ndarray) -> None:
        shards.write(shard, ids, embeddings)
        job.blocks.append({"block": shard})

    size = config.texts_per_shard
    embed_blocks(embed, save, missing, size, f"encoding {shards.texts:,} texts in {shards.count:,} shards")
    if missing:
        texts = sum(min(size, shards.texts - shard * size) for shard in missing)
        seconds = time.monotonic() - started
        log.info(
            "encoded %s texts in %.1f s, %.1f texts/s, by %d process(es)",
            f"{texts:,}", seconds, texts / seconds, world()[1],
        )  # fmt: skip


class _Stream:
    """Ids and texts of slices that follow each other, of a source that is read once."""

    def __init__(self, path: Path, role: Role) -> None:
        self.rows, self.position = stream_texts(path, role), 0

    def read(self, rows: slice) -> list[tuple[str, str]]:
        ids_and_texts = list(islice(self.rows, rows.start - self.position, rows.stop - self.position))
        self.position = rows.stop
        return ids_and_texts


class _Shards:
    """The files in the folder that is built: as they are wanted, or float32 in raw/ until what they need is fitted."""

    def __init__(self, config: EncodeConfig, folder: Path, texts: int) -> None:
        self.config, self.folder, self.texts = config, folder, texts
        self.count = math.ceil(texts / config.texts_per_shard)
        self.raw = [folder / "raw" / f"{shard:05}.npy" for shard in range(self.count)]
        self.files = [folder / f"{shard:05}.{config.format}" for shard in range(self.count)]
        self.embedded = self.raw if config.size.is_fitted else self.files

    def start(self, done: Collection[int], *, resumed: bool) -> list[int]:
        """The shards that are to be embedded, as they are not done, or somebody removed them."""
        if not resumed:
            shutil.rmtree(self.folder, ignore_errors=True)  # of a job whose manifest somebody removed
        for half in self.folder.rglob(".*.tmp"):
            half.unlink()
        if (self.folder / DESCRIPTION).is_file():
            return []
        self.embedded[0].parent.mkdir(parents=True, exist_ok=True)
        return [shard for shard, file in enumerate(self.embedded) if shard not in done or not file.is_file()]

    def write(self, shard: int, ids: list[str], embeddings: np.ndarray) -> None:
        """It is whole when its file is there."""
        size = self.config.size
        stored = embeddings if size.is_fitted else Sizing(size, self.config.normalize).encode(embeddings)
        write_shard(self.embedded[shard], ids, stored)

    def finish(self, description: dict[str, Any]) -> None:
        """Fits what has to be, writes the shards anew with it, and last of all the description."""
        if not (self.folder / DESCRIPTION).is_file():
            if self.config.size.is_fitted:
                self._fit()
            sizes = {file.name: file.stat().st_size for file in self.files}
            description = {**description, "files": list(sizes), "bytes": sizes}
            write_whole(self.folder / DESCRIPTION, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        shutil.rmtree(self.folder / "raw", ignore_errors=True)

    def _fit(self) -> None:
        sizing = Sizing.fit(self.config.size, self.config.normalize, self._raw_embeddings)
        sizing.save(self.folder)
        for raw, file in zip(self.raw, self.files, strict=True):
            ids, embeddings = read_shard(raw)
            write_shard(file, ids, sizing.encode(embeddings))

    def _raw_embeddings(self) -> Iterator[np.ndarray]:
        return (read_shard(file)[1] for file in self.raw)


def ids_file(file: Path) -> Path:
    """Next to a shard of .npy."""
    return file.with_suffix(".ids.json")


def write_shard(file: Path, ids: list[str], vectors: np.ndarray) -> None:
    """Under a temporary name first; the ids of a .npy before it. vectors [texts, width]."""
    temporary = file.with_name(f".{file.name}.tmp")
    if file.suffix == ".npy":
        write_whole(ids_file(file), json.dumps(ids, ensure_ascii=False))
        with temporary.open("wb") as out:
            np.save(out, vectors)
    else:
        values = pa.array(vectors.ravel())
        column = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
        parquet.write_table(pa.table({"id": pa.array(ids, pa.string()), "vector": column}), temporary)
    temporary.replace(file)


def read_shard(file: Path) -> tuple[list[str], np.ndarray]:
    """Ids and vectors [texts, width] as they are stored. InputError for a damaged file."""
    try:
        if file.suffix == ".npy":
            return json.loads(ids_file(file).read_text(encoding="utf-8")), np.load(file, mmap_mode="r")
        table = parquet.read_table(file)
    except (OSError, ValueError, EOFError) as error:  # pyarrow's are among them
        raise InputError(f"{file}: cannot be read ({first_line(error)}); encode the texts again") from error
    vectors = table["vector"].combine_chunks()
    return table["id"].to_pylist(), vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
