"""From an .h5ad file to what the model is trained on; from a simulation to an .h5ad file.

    python data.py FILE.h5ad                                  what the reader makes of a file
    python data.py FILE.h5ad --perturbation-column gene --control non-targeting
    python data.py prepare LARGE.h5ad SMALL.h5ad --subset line=K562 --variable-genes 2000
    python data.py simulate SCREEN.h5ad --sparse-shift        a screen, and the truth with it

In reading order:

    h5ad in and out    a file, that may be damaged or hostile -> columns and counts: `read_h5ad`,
                       `H5ad`, `StoredCounts`; arrays -> a file: `write_h5ad`
    -- cut here --     what stands above needs h5py and numpy alone: copy it
    labels             what was done to each cell, as the dosages d of the model: `read_screen`
    prepare            a file of any size -> one of the cells and genes that are wanted: `prepare`
    splits             train, validation and test cells, the paper's three ways: `split_cells`
    batches            of a screen on the device, in memory or in its file: `Batches`, `Shuffle`
    simulation         a screen whose true latents, masks and effects are known: `simulate`

A matrix is read in two phases. `read_h5ad` reads names and a first block of values, to find where
the counts are. `H5ad.counts` reads the cells and genes that are wanted, checks every value, and
keeps them in the narrowest integer type: what is not wanted never takes memory. Counts that are
larger than memory stay in the file (`H5ad.stored`) and are read piece by piece, as they are needed.

The reader takes files of anndata 0.5 to 0.13. It never imports anndata, never unpickles, and
follows no link out of the file; text, on which HDF5 may crash or hang, is first read in a child
process. All that is wrong with a file or an option is raised as a DataError, one sentence for the
user.
"""

import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import errno
import glob
import hashlib
import math
import mmap
import os
import platform
import re
import shutil
import signal
import sys
import time
import warnings

import h5py
import numpy as np

BLOCK = 2**20  # values per block of a streaming pass: small enough for the caches
GAP = 2**14  # so many unwanted values between wanted ones are read with them: that is faster
COUNT_TYPES = [np.dtype(t) for t in (np.uint8, np.uint16, np.uint32, np.uint64)]
# And line separators and changes of the direction of writing.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text, most=2000):
    """Text for a line on a terminal: control characters as \\x1b, and so many characters at most.
    A file's names of columns and layers can be anything."""
    text = CONTROL_CHARACTERS.sub(lambda match: repr(match[0])[1:-1], str(text))
    return text if len(text) <= most else text[:most - 3] + "..."


def say(*lines):
    """Print lines that hold text from files, the second and later ones indented."""
    print(*map(printable, lines), sep="\n  ")


class DataError(ValueError):
    """What is wrong with a file or an option, and what to do: one sentence for the user."""

    def __str__(self):
        return printable(super().__str__())


class NotCounts(DataError):
    """A matrix that could be read, but whose values are not counts: another one may hold them."""


# ============================================================================================
# h5ad in and out: opening a file that may be damaged or hostile
# ============================================================================================


@contextlib.contextmanager
def _h5_file(path):
    """Open an .h5ad file to read; every failure inside becomes a DataError that names the file."""
    path = os.fspath(path)
    with _reading(path):
        # HDF5 calls all of these "unable to open file (file signature not found)".
        if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would wait for ever
            raise DataError("is a folder, a pipe or a device; an .h5ad file was expected")
        with open(path, "rb") as file:
            head = file.read(8)
        if not head:
            raise DataError("is empty")
        if head.startswith(b"\x1f\x8b"):  # as it comes from GEO
            raise DataError("is compressed as a whole; unpack it first: gunzip FILE.gz")
        if not h5py.is_hdf5(path):
            raise DataError(f"is not an HDF5 file, it starts with {head!r}")
        _try_text(path)
        with h5py.File(path, "r") as file:
            # Two other formats of single cells that are HDF5 too.
            top = _keys(file)
            if "obs" not in top and "matrix" in top:
                raise DataError("looks like a 10x .h5 matrix, which has no labels: read it with "
                                "scanpy.read_10x_h5, add the labels to obs and save it as .h5ad")
            if "mod" in top and "X" not in top:
                raise DataError("looks like an .h5mu file of several modalities: save the RNA "
                                "modality on its own, mdata['rna'].write('rna.h5ad')")
            yield file


@contextlib.contextmanager
def _reading(path):
    """Every failure inside becomes a DataError that names the file."""
    try:
        yield
    # The functions below know nothing of the path; it is put before their sentences here.
    except NotCounts as error:
        raise NotCounts(f"{path}: {error}") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except PermissionError:
        raise DataError(f"{path}: you have no permission to read it") from None
    except MemoryError as error:
        raise DataError(f"{path}: not enough memory to read it ({error})") from None
    except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:
        # What h5py raises on a damaged file can be any of these; the cause stays attached.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read, it may be truncated or damaged; "
                        f"HDF5 says: {reason}") from error


def _member(file, name, required=True):
    """The group or data set `name`, or None. Links are followed one by one, so none leads outside.

    An external link, an external raw storage or a virtual data set could make a file read any other
    file of this machine; they are refused, and so are links that dangle or loop.
    """
    node, parts, followed = file, [p for p in name.split("/") if p], 0
    of_link = 0  # how many of the parts, from here on, come from a link
    while parts:
        part, of_link = parts.pop(0), of_link - 1
        # getlink asks what kind of link it is and does not follow it; file[name] would.
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if isinstance(link, h5py.HardLink):  # the usual case: the object itself
            node = node[part]
        elif isinstance(link, h5py.SoftLink):
            # A path within the file, from its root or from here: its parts are walked like ours.
            followed += 1
            if followed > 32:
                raise DataError(f"{name} is a loop of soft links")
            node = file if link.path.startswith("/") else node
            target = [p for p in link.path.split("/") if p not in ("", ".")]
            parts, of_link = target + parts, len(target) + max(of_link, 0)
        elif link is not None:
            raise DataError(f"{name} is a link out of the file, which is not followed: "
                            "copy the data into the file")
        elif of_link >= 0:  # this part does
            raise DataError(f"{name} is a soft link to something that is not in the file")
        elif required:
            present = _keys(node) if isinstance(node, h5py.Group) else []
            raise DataError(f"{name} is missing; beside it: {', '.join(present[:20]) or 'nothing'}")
        else:
            return None
    if isinstance(node, h5py.Dataset):
        _check_storage(file, name, node)
    elif not isinstance(node, h5py.Group):  # a named type
        raise DataError(f"{name} is neither a group nor a data set")
    return node


def _check_storage(file, name, dataset):
    """Refuse a data set of a larger size than the file holds, before anything is allocated.

    HDF5 fills what was never stored with zeros: a file of 90 KB can declare 4 EiB, and a download
    that broke off can look like a screen whose last cells have no counts.
    """
    if dataset.is_virtual or dataset.external:
        raise DataError(f"{name} keeps its values in other files: copy the data into the file")
    if dataset.shape is None:
        raise DataError(f"{name} is a data set without values")
    creation = dataset.id.get_create_plist()
    declared = math.prod(dataset.shape) * dataset.id.get_type().get_size()  # bytes
    stored = dataset.id.get_storage_size()
    if declared == 0:
        return
    if dataset.chunks:
        # Every chunk must be there. A filter may have compressed it, but deflate cannot do better
        # than 1032 : 1.
        grid = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks))
        least = declared / 1100 if creation.get_nfilters() else declared
        complete = stored >= least and dataset.id.get_num_chunks() >= grid
        if complete and grid <= 10**5 and hasattr(dataset.id, "chunk_iter"):  # 0.4 s at most
            places = []  # a chunk that a damaged index puts elsewhere would be read as zeros
            dataset.id.chunk_iter(lambda chunk: places.append(chunk.chunk_offset))
            places = np.array(places)
            inside = ((places % dataset.chunks == 0) & (places < dataset.shape)).all(1)
            complete = len(np.unique(places[inside], axis=0)) == grid
    elif creation.get_layout() == h5py.h5d.CONTIGUOUS:
        # One stretch of the file; the storage size is only what is declared, so look where it ends.
        offset = dataset.id.get_offset()  # None: never allocated
        complete = offset is not None and offset + declared <= file.id.get_filesize()
        stored = stored if complete else 0
    else:  # compact: inside of the object's header
        complete = stored >= declared
    if not complete:
        raise DataError(f"{name} declares {dataset.shape} values of {dataset.dtype}, {declared:,} "
                        f"bytes, and the file does not hold them ({stored:,} bytes stored): "
                        "it is truncated or was never finished")


def _keys(group):
    """Names of a group's members, sorted; names that are not UTF-8, as bytes, are left out."""
    return sorted(name for name in group if isinstance(name, str))


def _attribute(node, name):
    """An attribute, decoded where it is bytes (fixed-length strings); None where there is none."""
    if name not in node.attrs:
        return None
    _check_type(f"the attribute {name} of {node.name}", node.attrs.get_id(name).dtype)
    value = node.attrs[name]
    if isinstance(value, h5py.Empty):
        return None
    if np.ndim(value) and name not in ("column-order", "shape", "h5sparse_shape"):
        raise DataError(f"the attribute {name} of {node.name} holds several values")
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _check_type(name, dtype):
    """Refuse values of variable length that are no text: HDF5 crashes on damaged ones."""
    if dtype.kind == "O" and not (h5py.check_string_dtype(dtype) or h5py.check_ref_dtype(dtype)):
        raise DataError(f"{name} holds values that are neither text nor numbers")


# ============================================================================================
# h5ad in and out: columns of obs and var, in all the ways in which anndata has written them
# ============================================================================================

# Until anndata 0.6, obs and var are compound data sets (arrays of records), their first field the
# index. Since 0.7 they are groups with a data set for each column; categorical columns are
#
#     until 0.6    integer codes; the labels are in uns/<column>_categories
#     0.7          integer codes, with an attribute that refers to obs/__categories/<column>
#     since 0.8    a group of `codes` and `categories`
#
# Since 0.8 columns with missing values, and with pandas 3 all columns of text and the index too,
# are groups of `values` and a `mask`.


def _objects(values):
    """Any values -> a 1-D array of objects; the None keeps numpy from guessing another type."""
    return np.array([*values, None], dtype=object)[:-1]


def _to_numpy(name, raw):
    """What h5py reads -> a 1-D array of str objects, native numbers or bools."""
    raw = np.atleast_1d(raw)  # anndata <= 0.6 writes a single category as a scalar
    if raw.ndim != 1:
        raise DataError(f"{name} has {raw.ndim} dimensions; a column has one")
    if raw.dtype.kind in "OS":  # text of variable length comes as bytes in objects, of fixed as S
        if not all(isinstance(v, (bytes, str)) for v in raw):
            raise DataError(f"{name} holds values that are neither text nor numbers")
        text = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in raw.tolist()]
        # Like what is no UTF-8, control characters become the replacement character: some would
        # command the terminal, and a NUL could not be written again.
        return _objects(v if v.isprintable() else CONTROL_CHARACTERS.sub("\ufffd", v) for v in text)
    if raw.dtype.kind not in "biuf":
        raise DataError(f"{name} holds values of type {raw.dtype}, neither text nor numbers")
    return raw.astype(raw.dtype.newbyteorder("="), copy=False)  # "=": this machine's byte order


def _with_missing(values, missing):
    """Values with None where `missing` is true; unchanged if it is true nowhere."""
    if missing.any():
        values = values.astype(object)  # numbers have no None
        values[missing] = None
    return values


def _plain(file, name, rows=()):
    """A data set of text or numbers, as a 1-D array; of it, the slice `rows`."""
    node = _member(file, name)
    if not isinstance(node, h5py.Dataset):
        raise DataError(f"{name} is a group where a data set was expected")
    _check_type(name, node.dtype)
    # Until 0.7 there is no such attribute. An unknown one may mean that values are no values.
    if _attribute(node, "encoding-type") not in (None, "array", "string-array", "string"):
        raise DataError(f"{name} has the unknown encoding {_attribute(node, 'encoding-type')!r}")
    return _to_numpy(name, node[rows])


def _numbers(file, name):
    """A data set of numbers, of any shape."""
    node = _member(file, name)
    if not isinstance(node, h5py.Dataset) or node.dtype.kind not in "biuf":
        raise DataError(f"{name} holds no numbers")
    return node[()]


def _plain_or_nullable(file, name, rows=()):
    """A data set, or a group of `values` and a `mask` that is true where a value is missing."""
    node = _member(file, name)
    if isinstance(node, h5py.Dataset):
        return _plain(file, name, rows)
    encoding = _attribute(node, "encoding-type")
    known = (None, "nullable-integer", "nullable-boolean", "nullable-string-array")
    if encoding not in known or "values" not in node or "mask" not in node:
        raise DataError(f"{name} has the unknown encoding {encoding!r}")
    values, mask = (_plain(file, f"{name}/{part}", rows) for part in ("values", "mask"))
    if len(mask) != len(values):
        raise DataError(f"{name} has {len(values)} values and a mask of {len(mask)}")
    return _with_missing(values, mask.astype(bool))


def _decode(name, codes, categories):
    """A categorical column: categories[codes], None where the code is -1."""
    if codes.dtype.kind not in "iu":
        raise DataError(f"{name} has category codes of type {codes.dtype}; integers were expected")
    wrong = np.flatnonzero((codes < -1) | (codes >= len(categories)))
    if len(wrong):
        raise DataError(f"{name} has the category code {codes[wrong[0]]} in row {wrong[0]}, but "
                        f"only {len(categories)} categories")
    if not len(categories):  # all codes are -1, and categories[-1] would be an IndexError
        return np.full(len(codes), None, dtype=object)
    codes = codes.astype(np.int64)  # they come as int8 and up, and unsigned ones have no -1
    return _with_missing(categories[codes], codes == -1)


def _column(file, table, column, rows=()):
    """The column `column` of the table obs, var, raw/var or raw.var, as a 1-D array; of it, the
    slice `rows`."""
    frame, name = _member(file, table), f"{table}/{column}"
    if isinstance(frame, h5py.Dataset):  # anndata <= 0.6: one compound data set
        _check_type(name, frame.dtype[column])
        values = _to_numpy(name, frame.fields(column)[rows])
        coded = values.dtype.kind in "iu" and column != _index_name(file, table)
        if coded and _member(file, f"uns/{column}_categories", required=False) is not None:
            return _decode(name, values, _plain(file, f"uns/{column}_categories"))
        return values
    node = _member(file, name)
    if isinstance(node, h5py.Group) and "codes" in node and "categories" in node:  # since 0.8
        categories = _plain_or_nullable(file, f"{name}/categories")
        return _decode(name, _plain(file, f"{name}/codes", rows), categories)
    values = _plain_or_nullable(file, name, rows)
    if "categories" in node.attrs:  # 0.7: it refers to this data set
        return _decode(name, values, _plain(file, f"{table}/__categories/{column}"))
    return values


def _index_name(file, table):
    """The name of the column that holds the names of cells or genes."""
    frame = _member(file, table)
    if isinstance(frame, h5py.Dataset):  # anndata <= 0.6: the first field
        if not frame.dtype.names:
            raise DataError(f"{table} is neither a table nor a group of columns")
        return frame.dtype.names[0]
    # Since 0.7 an attribute says it: _index, index, CellID, ... Some writers leave it out.
    for name in (_attribute(frame, "_index"), "_index", "index"):
        if name in _keys(frame):
            return name
    raise DataError(f"{table} has no index; it holds: {', '.join(_keys(frame)) or 'nothing'}")


def _names(file, table, rows=()):
    """The index of a table: names of cells or genes, as str objects, even if it holds numbers."""
    return _objects(map(str, _column(file, table, _index_name(file, table), rows)))


def _n_rows(file, table, column=None):
    """How many rows a column has, by default the index, which need not be read for it."""
    node = _member(file, table)
    if isinstance(node, h5py.Group):
        node = _member(file, f"{table}/{column or _index_name(file, table)}")
    for part in ("codes", "values"):  # of a categorical or nullable index
        if isinstance(node, h5py.Group) and part in node:
            node = _member(file, f"{node.name}/{part}")
    if not isinstance(node, h5py.Dataset) or node.ndim != 1:
        raise DataError(f"{table}/{column} is no column" if column else
                        f"the index of {table} is no column of names")
    return len(node)


def _column_names(file, table):
    """The columns of a table other than its index, in the table's order."""
    frame, index = _member(file, table), _index_name(file, table)
    if isinstance(frame, h5py.Dataset):
        return [name for name in frame.dtype.names if name != index]
    names = [c for c in _keys(frame) if c not in (index, "__categories")]
    # Members of a group have no order: an attribute lists them. One that is listed and not there
    # stays in the list, so that whoever needs it says so.
    listed = _attribute(frame, "column-order")
    order = [c.decode("utf-8", "replace") if isinstance(c, bytes) else str(c)
             for c in np.ravel([] if listed is None else listed).tolist()]
    return list(dict.fromkeys(c for c in [*order, *names] if c != index))


# ============================================================================================
# h5ad in and out: counts, in memory
# ============================================================================================


@dataclasses.dataclass
class Counts:
    """A matrix of counts, cells x genes, in memory: dense, or compressed sparse rows (CSR).

    shape       (N, G)
    values      (N, G) if dense, (entries,), none of them 0, if sparse; uint8, 16, 32 or 64
    columns     (entries,) gene of each entry, rising within a cell, or None if dense
    indptr      (N + 1,) where each cell's entries start and end, or None if dense
    """

    shape: tuple
    values: np.ndarray
    columns: np.ndarray | None = None
    indptr: np.ndarray | None = None

    @property
    def n_bytes(self):
        """The memory that it takes."""
        return sum(v.nbytes for v in (self.values, self.columns, self.indptr) if v is not None)

    def take(self, rows):
        """The Counts of some rows, given by their positions."""
        if self.indptr is None:
            return Counts((len(rows), self.shape[1]), self.values[rows])
        # Each row's stretch of entries, one after the other: faster than an index of all of them.
        parts = [slice(*ends) for ends in zip(self.indptr[rows].tolist(),
                                              self.indptr[np.add(rows, 1)].tolist())]
        values, columns = (np.concatenate([v[:0], *(v[part] for part in parts)])
                           for v in (self.values, self.columns))
        indptr = np.append(0, np.cumsum([part.stop - part.start for part in parts], dtype=np.int64))
        return Counts((len(rows), self.shape[1]), values, columns, indptr)

    def sparse(self):
        """The same, sparse."""
        if self.indptr is not None:
            return self
        some = self.values != 0
        entries, indptr = np.flatnonzero(some), np.cumsum(np.count_nonzero(some, axis=1))
        return Counts(self.shape, self.values.ravel()[entries],
                      (entries % self.shape[1]).astype(np.uint32), np.append(0, indptr))

    def dense(self, rows=None):
        """The counts of the given rows (indices, a slice or a boolean mask; all by default).

        Returns a numpy array of exact integers, rows x genes, in the narrowest unsigned type: cast
        it before computing, since in uint8 200 + 100 is 44.
        """
        rows = np.atleast_1d(np.arange(self.shape[0])[slice(None) if rows is None else rows])
        if self.indptr is None:
            return self.values[rows]
        out = np.zeros((len(rows), self.shape[1]), self.values.dtype)
        for row, start, end in zip(out, self.indptr[rows].tolist(), self.indptr[rows + 1].tolist()):
            row[self.columns[start:end].astype(np.intp)] = self.values[start:end]
        return out

    def library(self, weights=None):
        """Total counts of each cell, (N,) int64; with weights (G,) int64, their weighted sum."""
        total, height = np.zeros(self.shape[0], np.int64), max(1, BLOCK // max(1, self.shape[1]))
        for r in range(0, len(total), height):  # a block at a time: what follows makes copies
            if self.indptr is None:
                block = self.values[r:r + height]
                total[r:r + height] = (block.sum(1, dtype=np.int64) if weights is None else
                                       block.astype(np.int64) @ weights)
                continue
            indptr = self.indptr[r:r + height + 1]
            block = self.values[indptr[0]:indptr[-1]]
            if weights is not None:
                block = block.astype(np.int64) * weights[self.columns[indptr[0]:indptr[-1]]]
            # It adds from each start to the next, and where these are the same it takes one entry.
            some = np.flatnonzero(np.diff(indptr))
            total[r + some] = np.add.reduceat(block, indptr[some] - indptr[0], dtype=np.int64)
        return total

    def hashes(self):
        """A hash of each cell's counts, (N,) int64, the same however they are stored: their sum
        modulo 2^64, with a fixed random weight for each gene."""
        weights = hashlib.shake_128(b"genes").digest(8 * self.shape[1])
        return self.library(np.frombuffer(weights, np.dtype("<i8")).astype(np.int64))

    def drop_empty_cells(self):
        """Forget the cells without any count. Returns which of the cells remain, (N,) bool.

        In place, since a second copy of the matrix may not fit into memory.
        """
        kept = self.library() > 0
        if self.indptr is not None:
            # They have no entries (_tidy), so only the places where they end are left out.
            self.indptr = self.indptr[np.append(True, kept)]
        elif not kept.all():
            # Rows move up, a block at a time; values[...][mask] is a copy, so they may overlap.
            n, height = 0, max(1, BLOCK // max(1, self.shape[1]))
            for r in range(0, len(kept), height):
                block = self.values[r:r + height][kept[r:r + height]]
                self.values[n:n + len(block)] = block
                n += len(block)
            self.values = self.values[:n]
        self.shape = (int(kept.sum()), self.shape[1])
        return kept


def _as_counts(name, values, dtype, name_of):
    """Values in the first of COUNT_TYPES, from `dtype` on, that holds them all exactly.

    Returns the counts and how many values were rounded because they were within 1e-6 of one.
    Raises NotCounts for the first value that is none; name_of(i) names its cell and gene.
    """
    if values.dtype in COUNT_TYPES[:COUNT_TYPES.index(dtype) + 1] and dtype.itemsize < 8:
        return values, 0  # there is nothing that they could be but counts
    with np.errstate(invalid="ignore"):  # casting NaN or 1e30 to an integer warns
        # A cast is exact if and only if its result compares equal. NaN, inf, fractions, negative
        # and too large values never do: one cast and one comparison check every value. From 2**53
        # on a double cannot tell neighbouring integers apart, and what was counted may be lost.
        for candidate in COUNT_TYPES[COUNT_TYPES.index(dtype):]:
            counts = values.astype(candidate)
            small = candidate.itemsize < 8 or counts.max(initial=0) < 2**53
            if small and (counts == values).all():
                return counts, 0
        # Almost integers come from a file that was normalised and multiplied back.
        values = values.astype(np.float64)
        rounded = np.rint(values)
        near = (np.abs(values - rounded) <= 1e-6) & (rounded >= 0) & (rounded < 2**53)
    if near.all():
        return _as_counts(name, rounded, dtype, name_of)[0], int((rounded != values).sum())
    first = int(np.argmin(near.ravel()))  # the first False
    value = values.ravel()[first]
    what = ("not a finite number" if not np.isfinite(value) else "negative" if value < 0 else
            "too large" if value >= 2**53 else
            "not an integer; the values look normalised or log-transformed")
    raise NotCounts(f"{name} holds {value:g} for {name_of(first)}, which is no count: it is {what}")


def _put(out, where, counts):
    """out[where] = counts; returns out, widened first if its type does not hold these counts.

    Widening is the one moment at which a matrix is in memory twice, at 1 + 2 bytes a count or
    2 + 4. It mostly happens in a first block, when what is to come has taken no memory yet.
    """
    if counts.dtype.itemsize > out.dtype.itemsize:
        out = out.astype(counts.dtype)
    out[where] = counts
    return out


def _tidy(counts):
    """Sort the entries of each row by gene, add up those of the same gene, drop explicit zeros.

    All of these are allowed in an .h5ad file, and none in a Counts. In place: what is tidy never
    takes more room than what was there, so it is written over what has been read, block by block.
    """
    values, columns, indptr = counts.values, counts.columns, counts.indptr
    new_indptr, written = np.zeros_like(indptr), 0
    # Blocks of whole rows: each starts with a row in which a multiple of BLOCK lies.
    starts = np.arange(0, len(values), BLOCK)
    first_rows = np.unique(np.searchsorted(indptr, starts, side="right") - 1).tolist()
    for r, r_end in zip(first_rows, [*first_rows[1:], len(indptr) - 1]):
        ends = indptr[r:r_end + 1] - indptr[r]  # of the block's rows, within the block
        column, block = columns[indptr[r]:indptr[r_end]], values[indptr[r]:indptr[r_end]]
        # Tidy already, as nearly always? Then every gene is above the one before it, but for the
        # first of a row.
        rises = column[1:] > column[:-1]
        rises[ends[(ends > 0) & (ends < len(column))] - 1] = True
        if not (rises.all() and block.all()):
            row = np.repeat(np.arange(r_end - r), np.diff(ends))
            key = row * counts.shape[1] + column  # rising by row, then by gene
            order = np.argsort(key, kind="stable")
            first = np.flatnonzero(np.diff(key[order], prepend=-1) > 0)  # of each run of equals
            sums = np.add.reduceat(block[order], first, dtype=np.uint64)
            row, column = row[order[first]][sums > 0], column[order[first]][sums > 0]
            block, _ = _as_counts("a sum of duplicate entries", sums[sums > 0], values.dtype, str)
            ends = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=r_end - r))])
        where = slice(written, written + len(block))
        values, columns[where] = _put(values, where, block), column
        new_indptr[r + 1:r_end + 1] = written + ends[1:]
        written += len(block)
    return Counts(counts.shape, values[:written], columns[:written], new_indptr)


# ============================================================================================
# h5ad in and out: counts, from the file, block by block
# ============================================================================================


class _Matrix:
    """A matrix of an open file: dense, or sparse by rows (CSR) or by columns (CSC).

    name     its path in the file, such as "layers/counts"
    form     what it is in words, such as "sparse CSR"
    by_row   whether some rows can be read without the others: not in CSC
    shape    (cells, genes), as obs and var say; DataError where the matrix says something else

    It is read as a stream of blocks (row, column, values) that hold wanted values alone. row and
    column say where these go in the result: two slices for a tile of a dense matrix, two arrays
    for entries of a sparse one.
    """

    def __init__(self, file, name, gene_names):
        self.file, self.name, self.gene_names = file, name, gene_names
        self.shape = (_n_rows(file, "obs"), len(gene_names))
        if 0 in self.shape:
            raise DataError(f"{name} has {self.shape[0]} cells and {self.shape[1]} genes")
        node = _member(file, name)
        self.dense = isinstance(node, h5py.Dataset)
        if self.dense:
            self.form, self.data, self.by_row = f"dense {node.dtype}", node, True
            self.height = node.chunks[0] if node.chunks else 1  # rows that are stored together
            if node.shape != self.shape:
                raise DataError(f"{name} has shape {node.shape}, but obs and var say {self.shape}")
        else:
            # The h5sparse attributes are those of anndata <= 0.6.
            encoding = _attribute(node, "encoding-type") or _attribute(node, "h5sparse_format")
            if encoding not in ("csr_matrix", "csr", "csc_matrix", "csc"):
                raise DataError(f"{name} has the unknown encoding {encoding!r}")
            declared = _attribute(node, "shape")
            declared = _attribute(node, "h5sparse_shape") if declared is None else declared
            if declared is not None and np.ravel(declared).tolist() != list(self.shape):
                raise DataError(f"{name} declares the shape {declared}, but obs and var say "
                                f"{self.shape}")
            self.form, self.by_row = f"sparse {encoding[:3].upper()}", encoding.startswith("csr")
            self.height = 1
            self._open_sparse(file)
        if self.data.dtype.kind not in "biuf":
            raise NotCounts(f"{name} holds values of type {self.data.dtype}, not counts")

    def _open_sparse(self, file):
        """Open data and indices; read and check indptr, which says which entries are whose.

        In a matrix by rows (CSR) the entries indptr[i] to indptr[i + 1] are those of row i, and
        their indices are columns; in one by columns (CSC), the reverse. Below, `major` is what
        indptr counts and `minor` what indices hold.
        """
        name, parts = self.name, []
        for part in ("data", "indices", "indptr"):
            node = _member(file, f"{name}/{part}")
            if not isinstance(node, h5py.Dataset) or node.ndim != 1:
                raise DataError(f"{name}/{part} is not a one-dimensional data set")
            if part != "data" and node.dtype.kind not in "iu":
                raise DataError(f"{name}/{part} holds values of type {node.dtype}; integers were "
                                "expected")
            parts.append(node)
        self.data, self.indices, indptr = parts
        # No index is used before it was checked.
        n_major, n_entries = self.shape[0 if self.by_row else 1], len(self.indices)
        if len(indptr) != n_major + 1:
            raise DataError(f"{name}/indptr has {len(indptr)} values; a matrix of shape "
                            f"{self.shape} needs {n_major + 1}")
        self.indptr = indptr = indptr[()].astype(np.int64)
        falls = np.flatnonzero(np.diff(indptr) < 0)
        if indptr[0] != 0:
            raise DataError(f"{name}/indptr starts at {indptr[0]} and not at 0")
        if len(falls):
            i = falls[0]
            # Seen in real files of more than 2**31 entries, written with 32-bit integers.
            overflow = ": it has overflowed 32 bits" if indptr[i + 1] < 0 else ""
            raise DataError(f"{name}/indptr falls from {indptr[i]} to {indptr[i + 1]} at position "
                            f"{i + 1}{overflow}")
        if len(self.data) != n_entries or indptr[-1] != n_entries:
            raise DataError(f"{name} is inconsistent: data has {len(self.data)} values, indices "
                            f"{n_entries}, and indptr ends at {indptr[-1]}")

    def n_values(self, rows):
        """How many values rows (positions) have in the file."""
        if self.dense:
            return len(rows) * self.shape[1]
        return int((self.indptr[rows + 1] - self.indptr[rows]).sum()) if self.by_row else (
            int(self.indptr[-1]) * len(rows) // self.shape[0])

    def check_first_block(self):
        """Raise NotCounts if a first block of the values shows that they are no counts."""
        rows, genes = np.arange(self.shape[0]), np.ones(self.shape[1], bool)
        for block in self._tiles(rows, genes) if self.dense else self._entries(rows, genes):
            self._counts_of(block, COUNT_TYPES[0], rows, genes)
            break

    def read(self, rows, genes):
        """The counts of some rows, rising positions, where genes (genes,), a boolean mask, is true.

        Returns a Counts and how many of its values were rounded. The memory that it takes is that
        of the result, of one block and, for a sparse matrix, of indptr.
        """
        shape, n_rounded = (len(rows), int(genes.sum())), 0
        if self.dense:
            values = np.empty(shape, COUNT_TYPES[0])
            for block in self._tiles(rows, genes):
                counts, n = self._counts_of(block, values.dtype, rows, genes)
                values, n_rounded = _put(values, block[:2], counts), n_rounded + n
            return Counts(shape, values), n_rounded

        # How many entries will each row have? indptr says it, or else a pass over the indices.
        if self.by_row and genes.all():
            per_row = np.diff(self.indptr)[rows]
        else:
            per_row = np.zeros(shape[0], np.int64)
            for row, _, _ in self._entries(rows, genes, with_values=False):
                per_row += np.bincount(row, minlength=shape[0])
        indptr = np.concatenate([[0], np.cumsum(per_row)])
        # Genes are numbered in the narrowest type, too.
        index_type = next(t for t in COUNT_TYPES if shape[1] <= np.iinfo(t).max + 1)
        columns, values = np.empty(indptr[-1], index_type), np.empty(indptr[-1], COUNT_TYPES[0])

        # Then every block's entries go to the next free places of their rows.
        free, done = indptr[:-1].copy(), 0
        for block in self._entries(rows, genes):
            counts, n = self._counts_of(block, values.dtype, rows, genes)
            row, column, _ = block
            if self.by_row:  # row after row, as in the result
                where = slice(done, done + len(row))
                done += len(row)
            else:
                # Transposed, a block at a time. A stable sort keeps the order of a row's entries;
                # entry j of the sorted block is then number j - before[row] of its row.
                order = np.argsort(row, kind="stable")
                per_row = np.bincount(row, minlength=shape[0])
                before = np.cumsum(per_row) - per_row
                where = np.arange(len(row)) + np.repeat(free - before, per_row)
                free += per_row
                column, counts = column[order], counts[order]
            columns[where] = column
            values, n_rounded = _put(values, where, counts), n_rounded + n
        return _tidy(Counts(shape, values, columns, indptr)), n_rounded

    def _counts_of(self, block, dtype, rows, genes):
        """The checked counts of a block, of type `dtype` or wider, and how many were rounded."""
        row, column, values = block

        def name_of(i):
            """The cell and gene of value i, for an error."""
            if self.dense:
                i_row, i_column = divmod(i, values.shape[1])
                r, c = row.start + i_row, column.start + i_column
            else:
                r, c = row[i], column[i]
            cell, = _names(self.file, "obs", slice(rows[r], rows[r] + 1))
            return f"cell {cell!r}, gene {self.gene_names[genes][c]!r}"

        return _as_counts(self.name, values, dtype, name_of)

    def _stretches(self, wanted):
        """Cut rows (of CSC: columns), rising positions, into parts a:b of them to be read at once.

        A part is about a BLOCK of values, and has no long gap of unwanted ones. Rows of the same
        chunk of a dense matrix stay together, so that each chunk is read and unpacked once.
        """
        if self.dense:
            first = wanted // self.height
            start, end = (n * self.height * self.shape[1] for n in (first, first + 1))
        else:
            start, end = self.indptr[wanted], self.indptr[wanted + 1]
        cut = (start[1:] > end[:-1] + GAP) | (start[1:] // BLOCK > start[:-1] // BLOCK)
        cuts = (np.flatnonzero(cut) + 1).tolist()
        return zip([0, *cuts], [*cuts, len(wanted)]) if len(wanted) else ()

    def _tiles(self, rows, genes):
        """The blocks of a dense matrix: tiles of whole chunks.

        The values may lie in a buffer that the next tile is read into.
        """
        genes_before = np.append(0, np.cumsum(genes))  # the place of each gene in the result
        chunk_columns = self.data.chunks[1] if self.data.chunks else self.shape[1]
        buffer = np.empty(0, self.data.dtype.newbyteorder("="))
        for a, b in self._stretches(rows):
            r, r_end = rows[a], rows[b - 1] + 1
            # Whole rows, unless one row of chunks is larger than a block: then a part of it.
            width = max(1, BLOCK // ((r_end - r) * chunk_columns)) * chunk_columns
            for c in range(0, self.shape[1], width):
                c_end = min(c + width, self.shape[1])
                column = slice(genes_before[c], genes_before[c_end])
                if column.start == column.stop:
                    continue  # nothing of this tile is wanted
                shape = (r_end - r, c_end - c)
                if buffer.size < math.prod(shape):
                    buffer = np.empty(math.prod(shape), buffer.dtype)
                tile = buffer[:math.prod(shape)].reshape(shape)
                self.data.read_direct(tile, (slice(r, r_end), slice(c, c_end)))
                if b - a < r_end - r:  # a part of it is wanted: copy that
                    tile = tile[rows[a:b] - r]
                if column.stop - column.start < c_end - c:
                    tile = tile[:, genes[c:c_end]]
                yield slice(a, b), column, tile

    def _entries(self, rows, genes, with_values=True):
        """The blocks of a sparse matrix: stretches of data and indices.

        Their values are None where only their places are asked for.
        """
        # Where each row and column of the file goes in the result; -1: it is not wanted.
        columns, n_minor = np.flatnonzero(genes), self.shape[1 if self.by_row else 0]
        majors, minors = (rows, columns) if self.by_row else (columns, rows)
        place = np.full(n_minor, -1)
        place[minors] = np.arange(len(minors))
        for a, b in self._stretches(majors):
            # Those without another between them are one slice of what is read.
            part = majors[a:b]
            ends = np.append(np.flatnonzero(np.diff(part) > 1), b - a - 1)
            firsts = self.indptr[part[np.append(0, ends[:-1] + 1)]]
            start, slices = firsts[0], list(map(slice, firsts - firsts[0],
                                                self.indptr[part[ends] + 1] - firsts[0]))
            end = start + slices[-1].stop

            def read(dataset):
                """Of data or indices, the entries of these majors."""
                values = dataset[start:end]
                return values if len(slices) == 1 else np.concatenate([values[s] for s in slices])

            minor = read(self.indices)
            if len(minor) and (minor.min() < 0 or minor.max() >= n_minor):  # before it is used
                wrong = minor[(minor < 0) | (minor >= n_minor)][0]
                i = start + np.argmax(self.indices[start:end] == wrong)
                raise DataError(f"{self.name}/indices holds {wrong} at position {i}; it must be at "
                                f"least 0 and below {n_minor}")
            # The place of each entry in the result: the one coordinate from indptr, the other from
            # indices.
            major = np.repeat(np.arange(a, b, dtype=np.int32),
                              self.indptr[part + 1] - self.indptr[part])
            wanted = ...  # all of them
            if len(minors) < n_minor:
                minor = place[minor.astype(np.intp)]
                wanted = minor >= 0
                major, minor = major[wanted], minor[wanted]
            if not len(minor):
                continue
            values = read(self.data)[wanted] if with_values else None
            yield (major, minor, values) if self.by_row else (minor, major, values)


# ============================================================================================
# h5ad in and out: read_h5ad
# ============================================================================================


class H5ad:
    """An .h5ad file whose names are in memory; counts and columns are read when asked for.

    path, found      the file, and in words where its counts were found and in which form
    shape            (cells, genes)
    gene_names       (genes,) array of str; they may repeat
    obs_columns, var_columns    lists of the columns of obs and var other than the index
    """

    def __init__(self, path, matrix, var):
        self.path, self.found, self.shape = path, f"{matrix.name}, {matrix.form}", matrix.shape
        self.gene_names, self._matrix_name, self._var = matrix.gene_names, matrix.name, var
        self.obs_columns, self.var_columns = (
            _column_names(matrix.file, table) for table in ("obs", var))

    @property
    def cell_names(self):
        """(cells,) array of str; they may repeat. Read anew each time: millions take memory."""
        with _h5_file(self.path) as file:
            return _names(file, "obs")

    def counts(self, rows=None, genes=None):
        """Read the counts of some cells and genes. Returns a Counts of these, in the file's order.

        rows, genes    boolean masks, (cells,) and (genes,); by default all

        Every one of these values is checked: raises NotCounts, a DataError, with the cell and gene
        of one that is no count. What is not wanted need not be read, and is never kept.
        """
        stored = self.stored(rows, genes)
        counts = stored.take()
        stored.say_rounded()
        return counts

    def stored(self, rows=None, genes=None):
        """The same, but the counts stay in the file: a StoredCounts."""
        masks = []
        for mask, n in zip((rows, genes), self.shape):
            mask = np.ones(n, bool) if mask is None else np.asarray(mask)
            if mask.dtype != bool or mask.shape != (n,):
                raise ValueError(f"a boolean mask of shape ({n},) is needed, not {mask!r}")
            masks.append(mask)
        with _reading(self.path):
            matrix = _Matrix(h5py.File(self.path, "r"), self._matrix_name, self.gene_names)
        return StoredCounts(self.path, matrix, *masks)

    def obs(self, column):
        """The obs column as a numpy array (cells,); a missing label is None.

        Raises DataError where there is no such column or it is damaged.
        """
        return self._read("obs", column, self.shape[0], "cells")

    def var(self, column):
        """The column of the table that describes the genes of the counts, (genes,), likewise."""
        return self._read(self._var, column, self.shape[1], "genes")

    def _read(self, table, column, n, what):
        columns = self.obs_columns if table == "obs" else self.var_columns
        with _h5_file(self.path) as file:
            if column not in columns:
                raise DataError(f"{table} has no column {column!r}; its columns are: "
                                + (", ".join(columns) or "none"))
            n_found = _n_rows(file, table, column)
            if n_found != n:  # before they take memory
                raise DataError(f"{table}/{column} has {n_found} values for {n} {what}")
            return _column(file, table, column)


class StoredCounts:
    """Counts that stay in their file: what a Counts can, read anew each time.

    shape      (N, G), of the cells and genes that are wanted
    rows       (N,) positions of these cells in the file, rising
    n_bytes    what they would take in memory, at most about
    by_row     whether some cells can be read without many others: not where they are sparse by
               columns (CSC), or dense in tall chunks
    """

    PART = 2**24  # values of a part of it

    def __init__(self, path, matrix, rows, genes):
        self.path, self._matrix, self._genes, self._sums = path, matrix, genes, None
        self._n_rounded = 0
        self.rows, self.by_row = np.flatnonzero(rows), matrix.by_row and matrix.height <= 512
        self.shape = (len(self.rows), int(genes.sum()))
        n_values = matrix.n_values(self.rows) * self.shape[1] / len(genes)
        self.n_bytes = int(n_values * (2 if matrix.dense else 4))
        # Of CSC every part takes a pass over the file: fewer of them.
        self._n_parts = math.ceil(n_values / (self.PART if self.by_row else 4 * self.PART)) or 1

    def take(self, cells=None):
        """Read some cells, rising positions among the N; all by default. Returns a Counts.

        Raises NotCounts, a DataError, with the cell and gene of a value that is no count."""
        with _reading(self.path):
            try:
                counts, n_rounded = self._matrix.read(
                    self.rows if cells is None else self.rows[cells], self._genes)
            except NotCounts as error:  # in a later block than the one that read_h5ad looked at
                advice = _where_counts_may_be(self._matrix.file, [self._matrix.name])
                raise NotCounts(f"{error}; {advice}") from None
        self._n_rounded += n_rounded
        return counts

    def say_rounded(self):
        """Print how many of the values read so far were rounded, if any were."""
        if self._n_rounded:
            say(f"{self.path}: {self._n_rounded:,} values of {self._matrix.name} within 1e-6 of an "
                "integer were rounded to it")

    def parts(self, what, function):
        """function(Counts) of all cells, part after part in order. On a terminal, says how far
        `what` is. Two threads: one reads while the other looks at what it has read."""
        cells, start = np.array_split(np.arange(self.shape[0]), self._n_parts), time.monotonic()
        for i, result in enumerate(ahead(lambda part: function(self.take(part)), cells, 2)):
            yield result
            if sys.stderr.isatty() and self._n_parts > 10:
                left = (time.monotonic() - start) * (self._n_parts / (i + 1) - 1)
                print(f"\r{what}: {(i + 1) / self._n_parts:.0%}, {clock(left)} left ",
                      end="\n" if i + 1 == self._n_parts else "", file=sys.stderr, flush=True)

    def _all_sums(self):
        """Library sizes and hashes, (2, N). The first time, all is read, and so checked."""
        if self._sums is None:
            self._sums = np.concatenate(list(self.parts("reading", lambda counts: np.stack(
                [counts.library(), counts.hashes()]))), axis=1)
            self.say_rounded()
        return self._sums

    def library(self):
        """Total counts of each cell, (N,) int64."""
        return self._all_sums()[0]

    def hashes(self):
        """As Counts.hashes."""
        return self._all_sums()[1]

    def dense(self, rows):
        """As Counts.dense."""
        cells, place = np.unique(np.arange(self.shape[0])[rows], return_inverse=True)
        return self.take(cells).dense(place)

    def drop_empty_cells(self):
        """As Counts.drop_empty_cells."""
        kept = self.library() > 0
        self.rows, self._sums = self.rows[kept], self._sums[:, kept]
        self.shape = (len(self.rows), self.shape[1])
        return kept


def ahead(function, items, n):
    """function(item) of all items, in order, n of them computed ahead in threads."""
    pool, waiting = concurrent.futures.ThreadPoolExecutor(n), collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > n:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also where the caller has enough
        pool.shutdown(wait=False, cancel_futures=True)


def clock(seconds):
    """90 -> 1:30."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"


def read_h5ad(path, layer=None):
    """Open an .h5ad file (anndata 0.5 to 0.13) and find its counts. Returns an H5ad.

    layer   a layer's name, or "raw"; by default X, or, where X is absent or holds no counts, the
            counts in layers/counts or raw/X: a line then says so.

    Whether a matrix holds counts is decided by a first block of it; H5ad.counts checks the rest.
    Raises DataError, one sentence, for all that is wrong with the file.
    """
    with _h5_file(path) as file:
        matrices = _matrices(file)
        asked = [n for n in ("X", "counts", "raw") if n in matrices] if layer is None else [layer]
        if not asked:
            raise DataError("has neither X nor layers/counts nor raw/X")
        if asked[0] not in matrices:
            raise DataError(f"has no layer {layer!r}; --layer can be: "
                            + (", ".join(matrices) or "nothing"))
        problem = None  # the first one: what is wrong with X interests more than with raw
        for name, var in (matrices[n] for n in asked):
            try:
                matrix = _Matrix(file, name, _names(file, var))
                matrix.check_first_block()
            except NotCounts as error:
                problem = problem or error
                continue
            if layer is None and name != "X":
                say(f"{path}: {problem or 'there is no X'}; the counts are taken from {name}")
            return H5ad(os.fspath(path), matrix, var)
        tried = [matrices[n][0] for n in asked]
        raise NotCounts(f"{problem}; {_where_counts_may_be(file, tried)}")


def _matrices(file):
    """Every matrix that could hold counts: {what --layer calls it: (its path, that of its var)}."""
    layers = _member(file, "layers", required=False)
    matrices = {n: (f"layers/{n}", "var") for n in _keys(layers or {})}
    matrices |= {"X": ("X", "var")} if "X" in _keys(file) else {}
    # raw has genes of its own, mostly more of them; its members are raw.X and raw.var until 0.6.
    raw = ("raw/X", "raw/var") if "raw" in _keys(file) else ("raw.X", "raw.var")
    matrices |= {"raw": raw} if _member(file, raw[0], required=False) is not None else {}
    return matrices


def _where_counts_may_be(file, tried):
    """What to do where the matrices of the paths `tried` hold no counts: one that may, or none."""
    matrices = _matrices(file)
    for layer, (name, var) in matrices.items():
        # A damaged one is no advice; what is wrong with it is not what this sentence is about.
        with contextlib.suppress(DataError, OSError, RuntimeError):
            if name not in tried:
                _Matrix(file, name, _names(file, var)).check_first_block()
                return f"use --layer {layer}"
    return (f"there are no counts in {', '.join(matrices)}: start from the file with the raw "
            "counts")


# ============================================================================================
# h5ad in and out: text, on which HDF5 may hang, is tried in a child process
# ============================================================================================

SECONDS = 5  # of computing that this may take, and 20 more for each million strings, which take 1
ATTRIBUTES = ("_index", "column-order", "encoding-type", "shape", "h5sparse_format",
              "h5sparse_shape")  # all that are read
_tried = {}  # (file, its size and time): what is wrong with its text, "" if nothing is


def _try_text(path):
    """Read the text of a file in a child process; raise DataError if that does not end well.

    HDF5 keeps text of variable length in heaps. With a hole in one of them, as a broken download
    may have, it loops for ever, and Ctrl-C does not stop it; and heaps can be made so that a small
    file holds gigabytes of text. (Windows has no fork: nothing is tried there.)
    """
    path, status = os.path.abspath(path), os.stat(path)
    version = path, status.st_size, status.st_mtime_ns
    if version not in _tried and hasattr(os, "fork"):
        with contextlib.suppress(OSError, MemoryError):  # no fork now
            _tried[version] = _outcome_of_reading(path, status.st_size)
    if _tried.get(version):
        raise DataError(_tried[version])


def _outcome_of_reading(path, n_bytes):
    """What is wrong with the text of a file of n_bytes, or "". What reading it raises does not
    count: the reading that follows raises it, too."""
    shared = mmap.mmap(-1, 4096)  # memory that both processes see: an outcome, what is being read
    with warnings.catch_warnings():  # of threads, which the child does without
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        outcome = b"."
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if _read_text(path, n_bytes, shared):
                outcome = b">"
        finally:
            shared[:1] = outcome
            os._exit(0)
    ended = signal.SIGXCPU  # unless we hear otherwise: where SIGCHLD is ignored, we hear nothing
    try:
        with contextlib.suppress(ChildProcessError):
            ended = os.waitpid(child, 0)[1] & 127  # the number of the signal, if it was one
    except BaseException:  # Ctrl-C
        os.kill(child, signal.SIGKILL)
        raise
    name = shared[1:].rstrip(b"\0").decode("utf-8", "replace") or "it"
    if shared[:1] == b">":
        return f"{name} holds more text than the file has bytes"
    crashed = ended in (signal.SIGXCPU, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT,
                        signal.SIGFPE, signal.SIGILL)  # and was not killed by somebody
    return (f"{name} holds damaged text, on which HDF5 crashes or hangs: copy or download the file "
            "anew") if crashed and shared[:1] != b"." else ""


def _read_text(path, n_bytes, shared):
    """Read all text that the functions above may ask for; whether it is longer than the file."""
    import resource  # not on Windows

    seen, n_values, length = set(), 0, 0
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    if sys.platform == "linux":  # elsewhere this limit means nothing
        with open("/proc/self/statm") as file:
            n_now = int(file.read().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        if limits[1] == resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_AS, (n_now + 4 * n_bytes + 2**29, limits[1]))

    def read(function):
        """The length of the longest text that function() returns. What it raises does not count,
        unless memory was too little."""
        nonlocal n_values, length
        # Time of computing, so that a slow disk is not taken for damage.
        seconds = int(SECONDS + len(seen) / 50 + n_values / 50_000)
        resource.setrlimit(resource.RLIMIT_CPU, (
            seconds if most == resource.RLIM_INFINITY else min(seconds, most), most))
        try:
            lengths = [len(value) for value in function() if isinstance(value, bytes | str)]
        except Exception as error:
            no_memory = isinstance(error, MemoryError) or "alloc" in str(error)
            lengths = [n_bytes + 1] if no_memory else []
        n_values, length = n_values + len(lengths), length + sum(lengths)
        return max(lengths, default=1)

    with h5py.File(path, "r") as file:
        names = ["obs", "var", "raw/var", "raw.var", "X", "raw/X", "raw.X", "layers", "uns"]
        while names and length <= n_bytes:
            name = names.pop()
            shared[1:] = name.encode()[:len(shared) - 1].ljust(len(shared) - 1, b"\0")
            columns, address = [], name
            with contextlib.suppress(Exception):
                node = _member(file, name)
                with contextlib.suppress(Exception):  # by it, loops of links are known
                    address = h5py.h5o.get_info(node.id).addr
                if address in seen:
                    continue
                seen.add(address)
                for attribute in ATTRIBUTES:
                    read(lambda: np.ravel(_attribute(node, attribute)))
                if isinstance(node, h5py.Group) and not re.match(r"X|raw[./]X|layers/", name):
                    names += [f"{name}/{key}" for key in _keys(node) if name != "uns" or (
                        key in ("pathways", "simulation") or key.endswith("_categories"))]
                elif isinstance(node, h5py.Dataset):
                    columns = ([(node, node.dtype)] if not node.dtype.names else
                               [(node.fields(n), node.dtype[n]) for n in node.dtype.names])
            for column, dtype in columns:
                a, n = 0, 1  # in growing parts: all of a part may share one long text
                while (dtype.kind == "O" and h5py.check_string_dtype(dtype) and a < node.size
                       and length <= n_bytes):
                    longest = read(lambda: column[a:a + n] if node.shape else [column[()]])
                    a, n = a + n, max(1, min(2 * n, 2**16, n_bytes // max(longest, 1)))
    return length > n_bytes


# ============================================================================================
# h5ad in and out: write_h5ad
# ============================================================================================


def write_h5ad(path, X, obs, var, layers=None, obsm=None, uns=None):
    """Write an .h5ad file that anndata (0.8 or newer) and read_h5ad open. Nothing half-written.

    X, layers' values    2-D arrays (obs x var); X may be None, or an iterator of Counts, of
                         successive cells: these are written sparse, in the narrowest types
    obsm                 dict of 2-D arrays with a row for each of obs
    obs, var             dicts of columns, numbers or text, in which None is a missing value, or
                         functions without arguments that return one; the first is the index
    uns                  dict of arrays, numbers, text, lists of text, and such dicts
    """
    def check_room(n_bytes):
        """Raise OSError if the disk may be too full. HDF5 must not notice it: while it closes, it
        would fail again and again, with tracebacks or a crash."""
        folder = os.path.dirname(os.path.abspath(path))
        if shutil.disk_usage(folder).free < n_bytes + 2**24:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(group, name, value):
        """Add one element, with the attributes by which anndata tells what it is."""
        if isinstance(value, dict):
            node = group.create_group(name)
            node.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
            for key, item in value.items():
                write(node, key, item)
            return
        value = np.asarray(value)
        text = value.dtype.kind in "OU"  # HDF5 has no numpy text: strings of variable length
        check_room(sum(16 + 4 * len(str(v)) for v in value.flat) if text else value.nbytes)
        if text:
            node = group.create_dataset(name, data=value.astype(object), dtype=h5py.string_dtype())
        else:
            node = group.create_dataset(name, data=value)
        kind = ("string-array" if value.ndim else "string") if text else (
            "array" if value.ndim else "numeric-scalar")
        node.attrs.update({"encoding-type": kind, "encoding-version": "0.2.0"})

    def write_table(file, name, columns):
        """Add obs or var: a dict of columns whose attributes name the index and the order."""
        (index, names), *columns = columns.items()
        write(file, name, {index: names() if callable(names) else names})
        others = []
        for column, values in columns:
            # HDF5 takes a name for a path.
            column = free("_" if column in ("", ".") else column.replace("/", "_"), file[name])
            try:
                write_column(file[name], column, values() if callable(values) else values)
                others.append(column)
            except DataError as error:
                say(f"{error}: this column is left out")
        file[name].attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0",
                                 "_index": index})
        # With its type, since an empty list would become floats.
        file[name].attrs.create("column-order", np.array(others, dtype=object), (len(others),),
                                h5py.string_dtype())

    def write_column(group, name, values):
        """Add a column. Text that repeats or is missing becomes categorical."""
        values = np.asarray(values)
        distinct = {*values.tolist()} if values.dtype.kind in "OU" else ()
        missing, distinct = None in distinct, {*distinct} - {None}
        if any(isinstance(value, str) for value in distinct) and (
                missing or len(distinct) <= len(values) / 2):
            place = {value: i for i, value in enumerate(sorted(distinct))} | {None: -1}
            codes = np.array([place[value] for value in values.tolist()], np.int32)
            write(group, name, {"codes": codes, "categories": sorted(distinct)})
            group[name].attrs.update({"encoding-type": "categorical", "ordered": False,
                                      "encoding-version": "0.2.0"})
        elif missing:  # numbers, or booleans
            is_missing = np.array([value is None for value in values])
            values = np.array([0 if value is None else value for value in values.tolist()])
            if set(map(type, distinct)) == {bool}:
                values = values.astype(bool)
            write(group, name, {"values": values, "mask": is_missing})
            kind = "boolean" if values.dtype == bool else "integer"
            group[name].attrs.update({"encoding-type": f"nullable-{kind}",
                                      "encoding-version": "0.1.0"})
        else:
            write(group, name, values)

    def write_counts(file, parts):
        """Add X, sparse by rows. Indices are int32, as scipy has them. (From 2**31 entries on it
        wants int64, twice the size: then anndata opens the file with backed="r" only.)"""
        group, indptr, options = file.create_group("X"), [np.zeros(1, np.int64)], None
        for counts in parts:
            check_room(2 * counts.n_bytes)  # it may be read once more, to be widened
            start, end = indptr[-1][-1], indptr[-1][-1] + counts.indptr[-1]
            if options is None:  # chunks that suit a small file, too
                options = dict(maxshape=(None,), chunks=(int(min(2**16, end + 1)),),
                               fill_time="never")
                values, columns = (group.create_dataset(name, (0,), dtype, **options) for
                                   name, dtype in (("data", np.uint8), ("indices", np.int32)))
            if counts.values.dtype.itemsize > values.dtype.itemsize:  # one of the first, mostly
                narrow = values
                del group["data"]
                values = group.create_dataset("data", narrow.shape, counts.values.dtype, **options)
                for i in range(0, start, BLOCK):
                    values[i:i + BLOCK] = narrow[i:i + BLOCK]
            for dataset, part in ((values, counts.values), (columns, counts.columns)):
                dataset.resize((end,))
                dataset[start:end] = part
            indptr.append(counts.indptr[1:] + start)
        indptr = np.concatenate(indptr)
        group["indptr"] = indptr.astype(np.int32 if indptr[-1] < 2**31 else np.int64)
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0",
                            "shape": (len(indptr) - 1, counts.shape[1])})

    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        if isinstance(X, collections.abc.Iterator):
            write_counts(file, X)
        elif X is not None:
            write(file, "X", X)
        write_table(file, "obs", obs)
        write_table(file, "var", var)
        # anndata expects these groups even if there is nothing in them.
        write(file, "layers", layers or {})
        write(file, "obsm", obsm or {})
        write(file, "uns", uns or {})


def free(name, taken):
    """The name, or one like it that is not taken."""
    while name in taken:
        name += "_"
    return name


@contextlib.contextmanager
def replacing(path):
    """A temporary name beside `path` that is renamed to it if and only if the block succeeds.

    Renaming is one step within a file system: `path` is the old file or the new one, never a part,
    also where the power fails. Raises DataError where it cannot be written: a full disk, say.
    """
    path = os.fspath(path)
    ours = f"{path}.{platform.node()}"  # other machines may write there, too
    temporary = f"{ours}.{os.getpid()}.writing"
    try:
        for left in glob.glob(f"{glob.escape(ours)}.*.writing"):
            pid = re.fullmatch(r"\d{1,9}", left.split(".")[-2])
            with contextlib.suppress(OSError):  # a process of another user, say
                try:
                    if pid and os.name == "posix":
                        os.kill(int(pid[0]), 0)
                except ProcessLookupError:  # the process that was writing it has ended
                    os.remove(left)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter by HDF5
        numbers = [getattr(e, "errno", None) for e in (error, error.__context__)]
        reason = os.strerror(next(filter(None, numbers))) if any(numbers) else " ".join(
            str(error).split())[:200]
        raise DataError(f"{path}: cannot be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or never made
            os.remove(temporary)


# ============================================================================================
# Cut here: everything above needs h5py and numpy alone
# ============================================================================================

# The other imports stand here, and not at the top, so that the part above can be cut out as it is.
import argparse
import itertools
import json

import torch

NONE = -1  # fills the free places of a row of dosages, as in sams_vae.py


class NoControl(DataError):
    """A column that could be read, but in which no cell is a control: another one may fit."""


# ============================================================================================
# Labels -> dosages
# ============================================================================================

# How perturbation labels look in the files of others, tried in this order where no column is named.
# Only `condition` is known to join combinations, by "+": nothing else is split unless asked for,
# since "_" joins combinations in one family and numbers the guides of a single gene (ZAP70_1) in
# another. A column named by the user is read as its family would be. In these lists * stands for
# any characters, and capitals do not matter; in what the user writes they do.
CONTROLS = ["control", "ctrl", "NT", "NTC", "non-targeting*", "non_targeting*", "non targeting*",
            "nontargeting*", "negctrl*"]
FAMILIES = [  # obs column (or prefix of one-hot columns), names of controls, separator
    ("sgID_AB", ["*non-targeting*"], None),  # Replogle et al., the SAMS-VAE paper's file
    ("guide_", [], None),  # Norman et al., the paper's file: 0/1 columns, one per guide
    ("condition", [*CONTROLS, "DMSO", "Vehicle"], "+"),  # GEARS, CPA, PerturBench
    ("perturbation", CONTROLS, None),  # scPerturb
    ("gene", CONTROLS, None),  # Replogle et al., original; Arc
    ("target_gene", CONTROLS, None),  # Arc, Virtual Cell Challenge
    ("gene_target", CONTROLS, None),  # Mixscape
    ("grna_target", CONTROLS, None),  # sceptre
    ("target_gene_name", CONTROLS, None),  # Cell Ranger
]
ONE_HOT = "guide_"

# What guide callers and demultiplexers write where they have no label: it names no perturbation.
# (--keep says that it does, in a file.)
UNASSIGNED = ["nan", "none", "<na>", "na", "n/a", "null", "unassigned", "unknown", "undetermined",
              "unmapped", "negative", "ambiguous", "doublet", "doublets", "multiplet", "multiplets",
              "multiple", "multi", "no guide", "no_guide", "noguide"]


@dataclasses.dataclass
class Screen:
    """A perturbation screen: the N cells of a file that can be used, with their dosages.

    path            the file
    counts          the Counts, or StoredCounts, of these cells and of the G genes that are kept
    rows            (N,) the cells' positions in the file, rising; only obs() needs them
    gene_names      (G,) str
    d               (N, P) int64, perturbations of each cell; NONE in free places and controls
    perturbations   the T names that d refers to, sorted
    conditions      (N,) str: names of the cell's perturbations with `joiner` between, or "control"
    c               (N, columns) int64, or None: covariates of each cell, as positions in
    covariates      the names of all their values, such as "donor=A"
    joiner          "+", or " + " where a perturbation's own name has a +
    label_column    the obs column of labels, or None where they are one-hot columns
    split           (N,) str or None: what a column of the file says of each cell's split
    notes           lines that say what was chosen and what was dropped
    file            the H5ad it was read from
    """

    path: str
    counts: Counts | StoredCounts
    rows: np.ndarray
    gene_names: np.ndarray
    d: np.ndarray
    perturbations: list
    c: np.ndarray | None
    covariates: list
    conditions: np.ndarray
    joiner: str
    label_column: str | None
    split: np.ndarray | None
    notes: list
    file: H5ad

    @property
    def cell_names(self):
        """(N,) str, read anew each time."""
        return self.file.cell_names[self.rows]

    def obs(self, column):
        """The obs column of the kept cells, (N,). Raises DataError where there is none."""
        return self.file.obs(column)[self.rows]

    def fingerprint(self):
        """A hash of all names, dosages and counts in order: the same for the same screen.

        A trained model belongs to one: its parameters are in the order of genes and perturbations,
        and its splits are positions of cells.
        """
        names = "\n".join([*self.gene_names, *self.cell_names, *self.perturbations,
                           *self.covariates])
        digest = hashlib.sha256(names.encode("utf-8", "replace"))
        digest.update(self.d.tobytes() + self.counts.hashes().tobytes())
        if self.c is not None:
            digest.update(self.c.tobytes())
        return digest.hexdigest()


def read_screen(path, perturbation_column=None, control=None, combination_separator=None,
                one_hot_prefix=None, layer=None, split_column=None, gene_column=None, subset=None,
                exclude=None, keep=None, min_cells=0, covariate=None, only_controls=False,
                stream=None, genes_of=None):
    """Read an .h5ad file and turn its labels into dosages. Returns a Screen.

    perturbation_column    obs column of labels; by default the FAMILIES are tried in their order
    control                label of the control cells, "*" stands for any characters; by default
                           that of the column's family
    combination_separator  what joins the perturbations of a combination; "" splits nothing; by
                           default that of the column's family, for other columns nothing
    one_hot_prefix         instead of a column of labels, 0/1 columns with this prefix
    layer                  as in read_h5ad
    split_column           obs column that says train, validation or test
    gene_column            var column that is true for the genes to keep; by default all are kept
    subset                 list of "COLUMN=VALUE", the cells to keep by their obs columns: of
                           several values of one column, any; of several columns, all
    exclude                list of labels, or of parts of combinations, whose cells are left out;
                           with "*" as in control
    keep                   list of such labels that are perturbations though UNASSIGNED has them
    min_cells              perturbations of fewer cells are left out, with all their cells
    covariate              list of obs columns, such as a donor or a batch, for c
    only_controls          control cells alone are kept, and no perturbed ones are needed
    stream                 whether the counts stay in the file; by default if they are large
    genes_of               names of genes, (G',): only genes of these names are kept, and if the
                           file's are not the same list, only names that each of both has once

    Cells outside of the subset, without a label or with one that is left out, or without any count
    of the kept genes are dropped; a note says how many. Raises DataError where the file, or the
    choice of column and control, is wrong.
    """
    # Phase one: names and labels, which say what cells and genes are wanted.
    file = read_h5ad(path, layer)
    genes = _read_gene_column(file, gene_column)
    if genes_of is not None and file.gene_names[genes].tolist() != list(genes_of):
        found = collections.Counter(file.gene_names[genes].tolist())
        both = [name for name, n in collections.Counter(genes_of).items() if n == found[name] == 1]
        genes &= np.isin(file.gene_names, both)
        if not both:
            raise DataError(f"{path}: no gene has a name of those wanted; its genes are "
                            f"{_commonest(list(found), 3)}, and {_commonest(genes_of, 3)} are "
                            "wanted")
    labels = _read_any_labels(file, perturbation_column, control, combination_separator,
                              one_hot_prefix, exclude, keep)
    column, _, sets, label_notes = labels
    in_subset = _read_subset(file, subset or [])
    wanted, rare, dropped = _choose_cells(in_subset, labels, min_cells, only_controls)
    split = _read_split(file, split_column) if split_column else None

    # Phase two: their counts. A cell without any says nothing of frequencies; its l_i would be 0.
    counts, rows = file.stored(wanted, genes), np.flatnonzero(wanted)
    if not counts.by_row and (stream or stream is None and counts.n_bytes > memory()):
        raise DataError(f"{path}: {file.found}, is stored so that cells cannot be read one by one, "
                        "as --stream does and memory asks for: python data.py prepare IN.h5ad "
                        "OUT.h5ad writes them by rows")
    if not (counts.by_row and counts.n_bytes > memory() / 2 if stream is None else stream):
        counts = file.counts(wanted, genes)
    n_wanted, rows = len(rows), rows[counts.drop_empty_cells()]

    notes = [f"{file.found}: {file.shape[0]:,} cells x {file.shape[1]:,} genes", *label_notes]
    if gene_column:
        notes.append(f"{counts.shape[1]:,} genes kept, true in var column {gene_column!r}")
    without_counts = n_wanted - len(rows)
    notes += [_outside(in_subset, subset)] if not in_subset.all() else []
    notes += dropped + ([f"dropped {without_counts:,} cells without any count"]
                        if without_counts else [])
    if split is not None:
        unknown = [word for word, part in zip(*split) if part is None]
        notes += [f"{len(unknown):,} cells are in no split, obs column {split_column!r} says "
                  f"{_commonest(unknown, 3)}"] if unknown else []

    # Names -> positions in the sorted list of all perturbations.
    sets = [sets[i] for i in rows]
    perturbations = sorted(set().union(*sets))
    pairs = len({names for names in sets if len(names) > 1})
    joiner = " + " if any("+" in name for name in perturbations) else "+"
    for name in perturbations:  # the names of conditions, below, must tell them apart
        if name == "control" or (pairs and joiner in name):
            raise DataError(f"{path}: a perturbation is called {name!r}, which cannot be told from "
                            "the control or from a combination: check --control and "
                            "--combination-separator, or rename it")
    index = {name: t for t, name in enumerate(perturbations)}
    d = np.full((len(rows), max(map(len, sets), default=0)), NONE)
    for i, names in enumerate(sets):
        d[i, :len(names)] = [index[name] for name in sorted(names)]  # A+B and B+A are the same
    conditions = np.array([joiner.join(sorted(s)) or "control" for s in sets], dtype=object)

    controls = int((d == NONE).all(1).sum())
    if not controls or (controls == len(rows) and not only_controls):
        raise DataError(f"{path}: {'all' if controls else 'none'} of the {len(rows):,} cells with "
                        f"counts and a label in {column} are controls; training needs controls "
                        "and perturbed cells" + (f" ({len(rare):,} perturbations have fewer than "
                                                 f"{min_cells}: --min-cells)" if rare else ""))
    notes.append(f"{len(rows):,} cells kept, {controls:,} of them controls; {len(perturbations):,} "
                 f"perturbations, {pairs:,} combinations; commonest: {_commonest(conditions, 5)}")
    few = sum(n < 10 for n in collections.Counter(conditions.tolist()).values())
    notes += [f"{few:,} conditions have fewer than 10 cells; they are kept"] if few else []
    c, names_of_values = _read_covariates(file, covariate or [], rows)
    if covariate:
        notes.append(f"covariates: {', '.join(names_of_values)}")
        of_controls = {tuple(row) for row in c[(d == NONE).all(1)].tolist()}
        n_alone = sum(tuple(row) not in of_controls for row in c.tolist())
        alone = set(conditions) - {"control"} - {
            condition for condition, row in zip(conditions, c.tolist())
            if tuple(row) in of_controls}
        if len(alone) == len(set(conditions)) - 1:
            raise DataError(f"{path}: no perturbed cell has the covariates of a control cell: "
                            f"leave out --covariate {' --covariate '.join(covariate)}")
        notes += [f"warning: {n_alone:,} cells, with all cells of {len(alone):,} conditions, have "
                  "covariates that no control cell has: trained on, but no part of the effects by "
                  "the data"] if n_alone else []
    if not only_controls:
        stratum = np.zeros(len(rows), int) if c is None else np.unique(
            c, axis=0, return_inverse=True)[1].reshape(-1)
        notes += _unbalanced(file, rows, (d == NONE).all(1).astype(int), stratum, column,
                             [column, split_column, *(covariate or [])])
    return Screen(os.fspath(path), counts, rows, file.gene_names[genes], d, perturbations, c,
                  names_of_values, conditions, joiner,
                  column if column in file.obs_columns else None,
                  None if split is None else split[1][rows], notes, file)


def _outside(in_subset, subset):
    """A line on the cells that are not."""
    return f"dropped {(~in_subset).sum():,} cells outside of {_shortened(' '.join(subset))}"


def _choose_cells(in_subset, labels, min_cells, only_controls=False):
    """Which cells of in_subset (cells,) are wanted, (cells,) bool; the perturbations that are too
    rare, a set; and lines on what is dropped for its label."""
    column, values, sets, _ = labels
    has_label = np.array([names is not None for names in sets])
    # The cells of a rare perturbation may leave another one with too few: until nothing changes.
    wanted, rare = in_subset & has_label, set()
    if only_controls:
        wanted &= np.array([names == frozenset() for names in sets])
    while True:
        n_cells = collections.Counter(name for i in np.flatnonzero(wanted) for name in sets[i])
        few = {name for name, n in n_cells.items() if n < min_cells}
        if not few:
            break
        rare |= few
        wanted &= np.array([not (names and names & few) for names in sets])
    without = in_subset & ~has_label
    notes = []
    for n, why in ((int(without.sum()), f"whose label in {column} is missing or left out"
                    + (f": {_commonest(values[without], 8)}" if any(values[without]) else "")),
                   (int((in_subset & has_label & ~wanted).sum()), f"of {len(rare):,} perturbations "
                    f"that have fewer than {min_cells} (--min-cells)")):
        notes += [f"dropped {n:,} cells {why}"] if n else []
    return wanted, rare, notes


def one_label_per_cell(screen):
    """The same screen with every combination as a perturbation of its own: d (N, 1), as for SVAE+.

    Its perturbations are the names of the conditions other than "control", sorted.
    """
    names = sorted(set(screen.conditions) - {"control"})
    index = {name: t for t, name in enumerate(names)} | {"control": NONE}
    d = np.array([[index[name]] for name in screen.conditions])
    return dataclasses.replace(screen, d=d, perturbations=names)


def renumbered(screen, perturbations):
    """The same screen with d as positions in this list, which has all of its perturbations."""
    place = {name: t for t, name in enumerate(perturbations)}
    index = np.array([*(place[name] for name in screen.perturbations), NONE])  # NONE is the last
    return dataclasses.replace(screen, d=index[screen.d], perturbations=list(perturbations))


def _read_covariates(file, columns, rows):
    """(cells, columns) positions in the names of all values, NONE where a cell has none; the names.
    None and [] if there are no columns."""
    c, names = np.full((len(rows), len(columns)), NONE), []
    if len(set(columns)) < len(columns):
        raise DataError(f"--covariate {' --covariate '.join(columns)}: one column twice")
    for j, column in enumerate(columns):
        found = file.obs(column)[rows]
        missing = np.array([v is None or v != v or v == "" for v in found.tolist()])
        values, c[~missing, j] = np.unique(found[~missing].astype(str), return_inverse=True)
        if not 2 <= len(values) <= min(50, max(2, len(rows) / 10)):
            raise DataError(f"{file.path}: --covariate {column!r} has {len(values):,} values for "
                            f"{len(rows):,} cells: a column of 2 to 50, each with many cells, is "
                            "needed")
        c[~missing, j] += len(names)
        names += [f"{column}={value}" for value in values]
    if columns and len(np.unique(c, axis=0)) > 200:
        raise DataError(f"{file.path}: the covariates have more than 200 combinations of values: "
                        "cells are compared within each, so that few would be left in most")
    return (c, names) if columns else (None, [])


def _unbalanced(file, rows, is_control, stratum, labels, not_these):
    """Lines on columns of obs, such as a batch, over which controls and perturbed cells are spread
    unlike: what differs between batches would be taken for what perturbations do.

    Of perturbed cells, those count whose value controls have, too, a tenth at least: other values
    describe the perturbation. Unlike means a total variation distance above 0.1 within the strata
    (cells,) of covariates, with a chi-squared statistic four standard deviations above its mean by
    chance. Columns that divide the cells alike are one.
    """
    notes = {}
    for column in file.obs_columns:
        if column in not_these or (labels.endswith("*") and column.startswith(labels[:-1])):
            continue
        with contextlib.suppress(DataError):
            found = file.obs(column)[rows]
            if found.dtype.kind == "f":  # a measurement
                continue
            values, first, v = np.unique(found.astype(str), return_index=True, return_inverse=True)
            if not 2 <= len(values) <= 50:
                continue
            n = np.zeros((stratum.max() + 1, 2, len(values)))
            np.add.at(n, (stratum, 1 - is_control, v), 1)  # controls, perturbed cells
            shared = n * (n[:, :1] > 0)
            if not shared[:, 1].sum() > 0.1 * n[:, 1].sum():
                continue
            p = shared / np.maximum(shared.sum(2, keepdims=True), 1)
            expected = shared.sum(1, keepdims=True) * shared.sum(2, keepdims=True) / np.maximum(
                shared.sum((1, 2), keepdims=True), 1)
            chi2 = ((shared - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
            df = np.maximum((shared[:, 0] > 0).sum(1) - 1, 0).sum()
            perturbed = shared[:, 1].sum(1)
            distance = np.abs(p[:, 0] - p[:, 1]).sum(1) / 2 @ perturbed / perturbed.sum()
            if distance > 0.1 and chi2 > df + 4 * math.sqrt(2 * df):
                p = shared.sum(0) / shared.sum((0, 2))[:, None]
                most = np.argmax(np.abs(p[0] - p[1]))
                alike = notes.setdefault(np.argsort(np.argsort(first))[v].tobytes(), [])
                alike.append((column, f"{p[0, most]:.0%} of the controls and {p[1, most]:.0%} of "
                              f"the perturbed cells have {column}={values[most]}"))
    return [f"warning: {alike[0][1]}"
            + "".join(f" (as {column} says, too)" for column, _ in alike[1:])
            + f": if that is no result of perturbations, --covariate {alike[0][0]} compares like "
            "with like" for alike in notes.values()]


def _read_gene_column(file, column):
    """Which genes are kept, (genes,) bool: all, or those where the var column is true."""
    if not column:
        return np.ones(file.shape[1], bool)
    # Booleans, 0 and 1, or, from a table that once was a .csv file, the words.
    keep = np.array([str(v).lower() in ("true", "1", "1.0") for v in file.var(column)])
    if not keep.any():
        raise DataError(f"{file.path}: var column {column!r} is true for no gene; leave "
                        "--gene-column out to keep all")
    return keep


def _read_subset(file, subset):
    """Which cells are kept, (cells,) bool: those of every column, with any of its values."""
    wanted = {}
    for text in subset:
        column, equals, value = text.partition("=")
        if not equals:
            raise DataError(f"--subset needs COLUMN=VALUE, not {text!r}")
        wanted.setdefault(column, []).append(value)
    chosen = np.ones(file.shape[0], bool)
    for column, values in wanted.items():
        found, values = list(map(str, file.obs(column).tolist())), set(values)
        for value in values - set(found):  # a value that is nowhere is a misspelt one
            raise DataError(f"{file.path}: no cell has {value!r} in obs column {column!r}; its "
                            f"values are {_commonest(found, 12)}")
        chosen &= np.array([value in values for value in found])
    if not chosen.any():
        raise DataError(f"{file.path}: no cell is in the subset {_shortened(' '.join(subset))}")
    return chosen


# The next four return the column's name, what it says of each cell, each cell's set of names of
# perturbations (None: no label, empty: a control), and lines on what was read.


def _read_any_labels(file, perturbation_column=None, control=None, combination_separator=None,
                     one_hot_prefix=None, exclude=None, keep=None):
    """The sets from what is said of these (see read_screen), or from what the file looks like."""
    how = control, combination_separator, exclude or [], keep or []
    if one_hot_prefix is None:
        return (_find_family(file, *how) if perturbation_column is None else
                _read_labels(file, perturbation_column, *how))
    if (perturbation_column, *how) != (None, None, None, [], []):
        raise DataError("--one-hot-prefix needs no --perturbation-column, --control, "
                        "--combination-separator, --exclude and --keep: leave them out")
    return _read_one_hot(file, one_hot_prefix)


def _read_labels(file, column, control, separator, exclude, keep):
    """The sets from a column of labels. Raises NoControl where none of them is a control."""
    # v != v: NaN, the missing value of a column of numbers.
    values = ["" if v is None or v != v else str(v).strip() for v in file.obs(column).tolist()]
    # What is not said is as in the column's family; in a column of no family, any family's names
    # of controls will do.
    families = {name: family for name, *family in FAMILIES}
    everyone = list(dict.fromkeys(c for controls, _ in families.values() for c in controls))
    known, family_separator = families.get(column, (everyone, None))
    separator = family_separator if separator is None else separator  # "" splits nothing

    def is_control(label, wildcards=True):
        """Whether it is the name of a control."""
        names = [c for c in (known if control is None else [control.strip()])
                 if wildcards or "*" not in c]
        return _matches(names, label, re.IGNORECASE if control is None else 0)

    def parts_of(label):
        """The names that a label joins."""
        return [part.strip() for part in label.split(separator)] if separator else [label]

    def parse(label):
        """A label -> the set of its perturbations: None if missing, empty if it is a control."""
        parts = parts_of(label)
        if label == "" or _matches(exclude, label):
            return None
        # Before what is unassigned, since a user may call the controls "None". In a combination *
        # must not reach beyond a part: with nt_*, nt_1|CCNE2_2 is perturbed.
        if is_control(label, wildcards=len(parts) == 1):
            return frozenset()
        if not all(parts):
            raise DataError(f"{file.path}: the label {label!r}, split at {separator!r}, has an "
                            "empty part: another --combination-separator, or '' to split nothing")
        for part in parts:
            if _matches(exclude, part) or (part.lower() in UNASSIGNED and not is_control(part)
                                           and not _matches(keep, part)):
                return None
        return frozenset(part for part in parts if not is_control(part))  # GENE+ctrl is GENE

    n_cells = collections.Counter(values)  # far fewer labels than cells: parse each once
    parsed = {label: parse(label) for label in n_cells}
    found = [label for label, names in parsed.items() if names == frozenset()]
    if not found:
        raise NoControl(f"{file.path}: no control cell in obs column {column!r}, looked for "
                        f"{' or '.join(known if control is None else [control])}: name it with "
                        f"--control; its labels are {_commonest(values, 12)}")
    for pattern in exclude + keep:  # one that is nowhere is a misspelt one
        if not any(_matches([pattern], part) for label in parsed
                   for part in [label, *parts_of(label)]):
            raise DataError(f"{file.path}: no label in obs column {column!r} is {pattern!r}, of "
                            "--exclude or --keep, where * stands for any characters; its labels "
                            f"are {_commonest(values, 12)}")
    if control is None and not any(  # one name, with its *, should be that of all
            all(_matches([c], part, re.IGNORECASE) for label in found for part in parts_of(label))
            for c in known):
        raise DataError(f"{file.path}: obs column {column!r} holds several names of controls, "
                        f"{', '.join(found[:5])}: name the one to use with --control")
    note = f"labels in obs column {column!r}; control: {', '.join(found[:3])}"
    note += f" and {len(found) - 3} more" if len(found) > 3 else ""
    # Whether combinations were taken for what they are decides about everything after: say it.
    joined = [c for c in "+_|" if any(c in label for label in parsed)]
    if separator:
        occurs = any(separator in label for label in parsed)
        note += f"; combinations are split at {separator!r}" + (
            "" if occurs else ", which is in no label")
    elif joined:
        note += (f"; some contain {' and '.join(map(repr, joined))}, nothing was split "
                 "(--combination-separator would, if it joins combinations)")
    notes = [note]
    for c in "+|,;&" if not separator else "":
        mixed = [label for label in parsed if parsed[label] is not None
                 and len({is_control(part.strip()) for part in label.split(c)}) == 2]
        if mixed:
            as_control = [label for label in mixed if not parsed[label]]
            notes.append(
                f"warning: {sum(n_cells[label] for label in mixed):,} cells have labels such as "
                f"{mixed[0]!r}, a control's name beside another; "
                f"{sum(n_cells[label] for label in as_control):,} of them count as controls: if "
                f"{c!r} joins combinations, use --combination-separator '{c}'")
    return column, np.array(values, dtype=object), [parsed[value] for value in values], notes


def _matches(patterns, text, flags=0):
    """Whether one of the patterns, in which * stands for any characters, is the whole text."""
    return any(re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text, flags)
               for pattern in patterns)


def _read_one_hot(file, prefix):
    """The sets from 0/1 columns of obs, one per perturbation; a cell with none is a control."""
    columns = {c: file.obs(c) for c in file.obs_columns if c.startswith(prefix)}
    # Columns of text may share the prefix, such as guide_identity in the paper's Norman file.
    columns = {c: np.array([np.nan if v is None else v for v in values], np.float64)
               for c, values in columns.items()
               if not any(isinstance(v, str) for v in values.tolist())}
    if prefix in columns:
        raise DataError(f"{file.path}: obs column {prefix!r} is all prefix and names no "
                        "perturbation: rename it, or name labels with --perturbation-column")
    for c, values in columns.items():
        wrong = values[~np.isnan(values) & ~np.isin(values, (0, 1))]
        if len(wrong):
            raise NoControl(f"{file.path}: obs column {c!r} holds {wrong[0]:g}; a one-hot column "
                            "holds 0 and 1")
    if not columns:
        raise NoControl(f"{file.path}: no column of obs starts with {prefix!r} and holds 0 and 1")
    table = np.stack(list(columns.values()), axis=1)  # (cells, T); NaN: missing
    names = np.array([c.removeprefix(prefix) for c in columns], dtype=object)
    sets = [None if np.isnan(row).any() else frozenset(names[row == 1]) for row in table]
    if frozenset() not in sets:
        raise NoControl(f"{file.path}: every cell has a 1 in one of the columns {prefix}*, and so "
                        "none is a control")
    note = f"{len(names)} one-hot columns {prefix}*; control: cells with none"
    return f"{prefix}*", np.full(len(sets), "", dtype=object), sets, [note]


def _find_family(file, control, separator, exclude, keep):
    """The sets of the first of FAMILIES that fits; DataError where they disagree or none does."""
    fits = []
    for column, *_ in FAMILIES:
        # Another meaning of the same name, say `gene`, has no controls: that is no error, yet.
        with contextlib.suppress(NoControl):
            if column == ONE_HOT and control is None and not exclude + keep:
                fits.append(_read_one_hot(file, column))
            elif column in file.obs_columns:
                fits.append(_read_labels(file, column, control, separator, exclude, keep))
    # Columns that agree on the control cells describe the same screen, at most in other detail
    # (guide or gene): the first is taken. If they disagree, guessing would be gambling.
    for other in fits[1:]:
        if any((a == frozenset()) != (b == frozenset()) for a, b in zip(fits[0][2], other[2])):
            raise DataError(f"{file.path}: obs columns {fits[0][0]!r} and {other[0]!r} both look "
                            "like perturbation labels but disagree on the control cells: choose "
                            f"with --perturbation-column; {_describe_obs(file)}")
    if not fits:
        wanted = "control cells" if control is None else f"cells labelled {control!r}"
        raise DataError(f"{file.path}: no obs column of a well-known name has {wanted}: name one "
                        f"with --perturbation-column and --control; {_describe_obs(file)}")
    return fits[0]


def _commonest(values, n):
    """The n commonest values with their numbers, long ones cut, as one line of text."""
    counter = collections.Counter(map(str, values))
    ranked = sorted(counter, key=lambda label: (-counter[label], label))
    words = [f"{_shortened(label) or 'none'} ({counter[label]:,})" for label in ranked[:n]]
    return " ".join(", ".join(words).split()) + (
        f" and {len(ranked) - n:,} more" if len(ranked) > n else "")


def _shortened(text):
    """Text of at most 60 characters."""
    return text if len(text) <= 60 else text[:57] + "..."


def _describe_obs(file):
    """The columns of obs, with the commonest values of each that could be labels, for an error."""
    described = []
    for column in file.obs_columns[:30]:
        try:
            values = file.obs(column)
        except DataError:
            described.append(f"{column} (damaged)")
            continue
        # Labels repeat. A column of barcodes or of measurements is only named.
        n = len({*values.tolist()})
        could_be_labels = values.dtype.kind != "f" and n <= max(20, len(values) / 2)
        described.append(f"{column}: {_commonest(values, 3)}" if could_be_labels else column)
    more = len(file.obs_columns) - len(described)
    return "obs has the columns " + "; ".join(described) + (f"; and {more} more" if more else "")


def _read_split(file, column):
    """What the column says of each cell, and that as train, validation, test or None."""
    known = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
             "validation": "validation", "test": "test", "ood": "test"}  # ood: CPA
    words = [str(v) for v in file.obs(column).tolist()]
    return words, _objects(known.get(word.lower()) for word in words)


# ============================================================================================
# prepare: of a file of any size, what is wanted, sparse
# ============================================================================================

RECIPES = {  # what takes the place of the options of `prepare`, and what is expected to be kept
    # Replogle et al. 2022 as in the paper (4.1), whose text has 118,461 cells. The controls are
    # those that its authors' code draws.
    "replogle-filtered": (dict(perturbation_column="sgID_AB", control="*non-targeting*"),
                          dict(n_controls=2000, seed=0), (118_641, 1187, 722))}
RECIPE_FILE = "replogle_filtered.json"  # beside this file


def prepare(path, out, genes_file=None, gene_column=None, n_variable=None, n_controls=None, seed=0,
            layer=None, subset=None, min_cells=0, recipe=None, **labels):
    """Write some cells and genes of an .h5ad file of any size to another, counts sparse by rows.

    path, out      the files; cells and genes stay in their order, as splits depend on it
    genes_file     a text file, a gene a line: of these names, in the index of var or in that of
                   its columns which has most of them
    gene_column    a var column that is true for the genes to keep
    n_variable     of these, so many most variable ones: see `binomial_deviance`
    n_controls     at most so many control cells, drawn by numpy's legacy generator from `seed`
    layer, subset, min_cells, labels    as in read_screen; labels are read if one of them is given
    recipe         one of RECIPES

    Kept are all columns of obs and var, and uns/pathways. Takes a few hundred bytes of memory a
    cell, and half a gigabyte. Prints what is kept. Raises DataError for a wrong file or option.
    """
    uns, lists, expected, start = {}, {}, None, time.monotonic()
    if recipe is not None:
        labels, controls, expected = RECIPES[recipe]
        n_controls, seed = controls["n_controls"], controls["seed"]
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), RECIPE_FILE)) as f:
            lists = json.load(f)
        uns = {"pathways": lists["pathways"]}
    file = read_h5ad(path, layer)
    notes = [f"{file.found}: {file.shape[0]:,} cells x {file.shape[1]:,} genes"]
    if not lists:
        try:
            uns = {"pathways": read_pathways(path) or {}}
        except DataError as error:
            notes.append(f"{error}: uns/pathways is left out")

    # The cells.
    if lists:
        targets, of_target = {*lists["perturbation_genes"]}, file.obs("gene").tolist()
        wanted = np.array([gene in targets or gene == "non-targeting" for gene in of_target])
        missing = targets - set(of_target)
        notes += [f"{len(missing)} of the {len(targets)} targets are in no cell: "
                  f"{_shortened(', '.join(sorted(missing)))}"] if missing else []
    else:
        wanted = _read_subset(file, subset or [])
    notes += [_outside(wanted, subset or ["them"])] if not wanted.all() else []
    sets = None
    if n_controls is not None or min_cells or any(v is not None for v in labels.values()):
        found = _read_any_labels(file, **labels)
        wanted, _, dropped = _choose_cells(wanted, found, min_cells)
        sets, notes = found[2], notes + [*found[3], *dropped]
    if n_controls is not None:
        controls = np.flatnonzero(wanted & [names == frozenset() for names in sets])
        surplus = np.random.RandomState(seed).permutation(len(controls))[n_controls:]
        wanted[controls[surplus]] = False
        notes += [f"dropped {len(surplus):,} of {len(controls):,} controls"] if len(surplus) else []
    rows = np.flatnonzero(wanted)
    n_perturbations = len(set().union(*(sets[i] for i in rows))) if sets is not None else None
    if not len(rows) or n_perturbations == 0:
        raise DataError(f"{path}: no {'perturbed ' if len(rows) else ''}cell is left: "
                        f"{'; '.join(notes)}")

    # The genes.
    genes = _read_gene_column(file, gene_column)
    notes += [f"{genes.sum():,} genes are true in {gene_column}"] if gene_column else []
    if genes_file or lists:
        names = lists.get("measured_gene_names") or _read_lines(genes_file)
        in_list, note = _listed_genes(file, set(names))
        genes, notes = genes & in_list, [*notes, note]
    if n_variable is not None and n_variable >= genes.sum():
        notes.append(f"no more than {genes.sum():,} genes: --variable-genes leaves none out")
    elif n_variable is not None:
        deviance = binomial_deviance(file.stored(wanted, genes))
        rank = np.argsort(np.argsort(-deviance, kind="stable"))
        notes.append(f"the {n_variable:,} of {genes.sum():,} genes of largest binomial deviance")
        genes[genes] = rank < n_variable
    if not genes.any():
        raise DataError(f"{path}: no gene is left: {'; '.join(notes)}")
    say(path, *notes)

    stored = file.stored(wanted, genes)
    write_h5ad(
        out, X=stored.parts("writing", lambda counts: counts.sparse()),
        obs={free("_index", file.obs_columns): lambda: file.cell_names[rows]} | {
            column: lambda column=column: file.obs(column)[rows] for column in file.obs_columns},
        var={free("_index", file.var_columns): file.gene_names[genes]} | {
            column: lambda column=column: file.var(column)[genes] for column in file.var_columns},
        uns=uns)
    stored.say_rounded()
    kept = len(rows), int(genes.sum()), n_perturbations
    words = "cells", "genes", "perturbations"
    print(f"{out}: " + ", ".join(f"{n:,} {w}" for n, w in zip(kept, words) if n is not None))
    if expected and kept != expected:
        print("  expected were " + ", ".join(f"{n:,} {w}" for n, w in zip(expected, words))
              + ": this is not the file that the recipe is for, or it has changed")
    with contextlib.suppress(ImportError):  # on Windows
        print(f"  in {clock(time.monotonic() - start)}, peak memory {size_in_words(peak_memory())}")


def binomial_deviance(stored):
    """By how much the counts of each gene vary more than if it had the same share of the counts of
    every cell: the binomial deviance from that null model, (G,), by which Townes, Hicks, Aryee and
    Irizarry (Genome Biology 2019, 20:295) select genes. stored is a StoredCounts.

    2 sum_i [x log(x / (l p)) + (l - x) log((l - x) / (l (1 - p)))], with l a cell's library and p
    the gene's part of all counts. One pass: cells without the gene add nothing but -l log(1 - p).
    """
    def sums(counts):
        """Of one part: (2, G), sums over cells that need no p, and the counts of each gene."""
        counts = counts.sparse()
        x, l = counts.values.astype(float), np.repeat(counts.library(), np.diff(counts.indptr))
        rest = np.where(x < l, (l - x) * np.log1p(-np.minimum(x, l - 0.5) / l), 0.0)
        return np.stack([np.bincount(counts.columns, weights, counts.shape[1])
                         for weights in (x * np.log(x / l) + rest, x)])

    terms, total = sum(stored.parts("variable genes", sums))
    if not total.any():
        raise DataError(f"{stored.path}: the wanted cells have no counts of the wanted genes")
    p, every = np.maximum(total, 1e-300) / total.sum(), total.sum()
    return 2 * (terms - total * np.log(p) - (every - total) * np.log1p(-np.minimum(p, 1 - 1e-16)))


def _read_lines(path):
    """The lines of a text file that are not empty."""
    try:
        with open(path, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from None


def _listed_genes(file, names):
    """Which genes are in a set of names, (genes,) bool, and a line on it: by the index of var, or
    by that of its columns which has most of them."""
    best = None
    for column in [None, *file.var_columns]:
        with contextlib.suppress(DataError):
            found = (file.gene_names if column is None else file.var(column)).tolist()
            n = len(names & {name for name in found if isinstance(name, str)})
            if best is None or n > best[0]:
                best = n, f"var column {column!r}" if column else "the index of var", found
    n, where, found = best
    missing = sorted(names - {name for name in found if isinstance(name, str)})
    note = f"{n:,} of the {len(names):,} listed genes are in {where}"
    if missing:
        note += f"; not there: {_shortened(', '.join(missing))}"
    if not n:
        note += f", where genes are called {_shortened(', '.join(map(str, found[:3])))}"
    return np.array([name in names for name in found]), note


# ============================================================================================
# Splits
# ============================================================================================


def train_test_split(n, train_size, seed):
    """Positions (train, test) of n cells: scikit-learn's train_test_split(range(n), train_size=..,
    random_state=seed), to the last element, without scikit-learn.
    """
    n_train = math.floor(train_size * n)
    # The legacy generator, as scikit-learn uses it. Its test part comes first in the permutation.
    shuffled = np.random.RandomState(seed).permutation(n)
    return shuffled[n - n_train:], shuffled[:n - n_train]


SPLITS = ("random", "norman-ood", "norman-data-efficiency")


def split_cells(screen, seed=0, split="random", train_combinations=1.0):
    """{"train", "validation", "test"}: positions among the screen's kept cells.

    The file's own split where the screen has one; else one of SPLITS, the tasks of the paper. (The
    proportions, and what comes first, are those of its authors' code.)

    random   of all cells 80 / 20 into rest / test, of the rest 80 / 20 into train / validation.
             Replogle (4.1).
    norman-ood   tests on combinations that were not trained on (4.2). Combinations are put into
             random order: the first train_combinations (a fraction) of them are for training and
             validation, the last quarter for testing. Their cells are split as in `random` first,
             so that training cells accumulate while the fraction grows, test cells stay the same,
             and at a fraction of 1 the test combinations are trained on, in other cells.
    norman-data-efficiency   tests on cells of all combinations, split as in `random`, and trains on
             the first train_combinations (a fraction) of their training cells.

    In the Norman splits all other cells are split 80 / 20 into train / validation. Raises DataError
    where a part is left without cells, or training without controls.
    """
    n_perturbed = (screen.d != NONE).sum(1)  # (N,) perturbations of each cell
    if split != "random" and screen.split is None and n_perturbed.max() < 2:
        raise DataError(f"{screen.path}: --split {split} needs combinations, and no cell has two "
                        "perturbations: check --combination-separator or --one-hot-prefix")

    def of_80_20(cells):
        """80 % and 20 % of the cells, always by the same seed."""
        first, second = train_test_split(len(cells), 0.8, seed)
        return cells[first], cells[second]

    if screen.split is not None:
        parts = {name: np.flatnonzero(screen.split == name)
                 for name in ("train", "validation", "test")}
    else:
        # The Norman splits test on combinations alone: it is these that are split in three.
        rest, test = of_80_20(np.flatnonzero(n_perturbed > 1) if split != "random"
                              else np.arange(len(screen.rows)))
        train, validation = of_80_20(rest)
        if split == "norman-ood":
            # The order starts from sorted labels: to get the paper's, those of the paper's file.
            has_labels = "guide_identity" in screen.file.obs_columns
            labels = screen.obs("guide_identity") if has_labels else screen.conditions
            labels = labels.astype(str)
            order = np.unique(labels[n_perturbed > 1])
            np.random.default_rng(seed).shuffle(order)
            n_train, n_test = int(train_combinations * len(order)), math.ceil(0.25 * len(order))
            train = train[np.isin(labels[train], order[:n_train])]
            validation = validation[np.isin(labels[validation], order[:n_train])]
            test = test[np.isin(labels[test], order[len(order) - n_test:])]
        elif split == "norman-data-efficiency":
            train = train[:int(train_combinations * len(train))]
        if split != "random":  # controls and single perturbations are never tested on
            more_train, more_validation = of_80_20(np.flatnonzero(n_perturbed <= 1))
            train = np.concatenate([more_train, train])
            validation = np.concatenate([more_validation, validation])
        parts = {"train": train, "validation": validation, "test": test}
    for name, cells in parts.items():
        if not len(cells):
            raise DataError(f"{screen.path}: no cells are left for {name} ({len(screen.rows):,} "
                            "cells in all)")
    if n_perturbed[parts["train"]].min() > 0:
        raise DataError(f"{screen.path}: no control among the {len(parts['train']):,} training "
                        "cells: effects are differences from control cells")
    if not n_perturbed[parts["train"]].any():
        raise DataError(f"{screen.path}: no perturbed cell among the {len(parts['train']):,} "
                        "training cells: there is nothing to learn effects from")
    return parts


# ============================================================================================
# Batches: of a screen that lies on the device, in memory or in its file
# ============================================================================================

PIECE = 2**16  # cells that are on the device at once where the whole screen is not, at most
STRIP = 64  # neighbours in a file that are read together


def memory():
    """Bytes of memory for this process: the machine's or its container's, which the processes of
    torchrun share."""
    limit = 2**63
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(ValueError, OSError), open("/sys/fs/cgroup/memory.max") as file:
        limit = min(limit, int(file.read()))
    return limit // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_memory():
    """The most memory that this process has held up to now, in bytes."""
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _tensor(array, device, pinned=False):
    """A numpy array of counts or indices as a tensor on the device, in the narrowest integer type.

    torch computes with uint8 but hardly with wider unsigned types: those become signed, by a free
    change of view where the largest value allows it.
    """
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        size = array.dtype.itemsize
        fits = array.max(initial=0) <= np.iinfo(f"i{size}").max
        array = array.view(f"i{size}") if fits else array.astype(f"i{2 * size}")
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=pinned)


class Piece:
    """Cells that lie on the device. piece(cells) -> counts x (B, G) floats, dosages d (B, P), and
    covariates c (B, C) if the screen has some; `cells` (B,) are positions among those of the piece.

    Counts stay in their integer type, sparse ones sparse: what becomes floats and dense is a batch
    at a time.
    """

    def __init__(self, counts, labels, device, pinned=False):
        self.counts, self.device, self.n_genes = counts, device, counts.shape[1]
        self.labels = [_tensor(v, device, pinned) for v in labels]
        self.sparse, self.tensors = counts.indptr is not None, []
        if not self.sparse or device.type != "cpu":
            self.tensors = [_tensor(v, device, pinned) for v in (
                counts.values, counts.columns, counts.indptr) if v is not None]
        most = int(np.diff(counts.indptr).max(initial=0)) if self.sparse else 0
        self.most = torch.arange(most, device=device)  # entries of the longest row

    def __call__(self, cells):
        if not self.sparse:
            x = self.tensors[0][cells].float()
        elif self.device.type == "cpu":
            x = torch.from_numpy(self.counts.dense(cells.numpy()).astype(np.float32))
        else:
            x = self._dense(cells)
        return x, *(v[cells] for v in self.labels)

    def _dense(self, cells):
        """Counts.dense, on a GPU. Every row is read as if it were the longest one, and what is too
        much goes to a column that is cut off: fixed shapes, so that the GPU need not tell the host
        how many there are."""
        values, columns, indptr = self.tensors
        start, end = indptr[cells, None], indptr[cells + 1, None]  # (B, 1)
        entry = start + self.most  # (B, most)
        inside = entry < end
        entry = torch.where(inside, entry, 0)
        column = torch.where(inside, columns[entry].long(), self.n_genes)
        x = torch.zeros(len(cells), self.n_genes + 1, device=self.device)
        x.scatter_(1, column, values[entry].float())
        return x[:, :-1].contiguous()


class Batches:
    """Batches of a screen's cells: x (B, G), d (B, P) and, if there are covariates, c (B, C).

    Of the screen, its counts (N, G), d (N, P) and c (N, C) are used; cells are positions 0..N-1.
    Where the screen does not fit on the device, it goes there piece by piece, each made in a thread
    while the one before it is in use: from memory, or from the file (StoredCounts).

    where    in words, where the counts lie
    """

    def __init__(self, screen, device="cpu", piecewise=None):
        self.counts, self.device = screen.counts, torch.device(device)
        self.n_genes = self.counts.shape[1]
        self.labels = [labels for labels in (screen.d, screen.c) if labels is not None]
        self.from_file, n_bytes = isinstance(self.counts, StoredCounts), self.counts.n_bytes
        # About 1 GB of counts at most, in whole batches of 512.
        self.n_piece = min(PIECE, max(1, 2**21 * self.counts.shape[0] // max(1, n_bytes)) * 512)
        self.where = f"in memory ({size_in_words(n_bytes)})"
        if self.from_file:
            self.where = "in the file " + (
                "(as asked for)" if n_bytes <= memory() / 2 else
                f"(they may take {size_in_words(n_bytes)}, of {size_in_words(memory())} of memory)")
        elif self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            piecewise = n_bytes > 0.6 * free if piecewise is None else piecewise
            self.where = (f"{self.where[:-1]}, {self.device} has {size_in_words(free)} free)"
                          if piecewise else f"on {self.device} ({size_in_words(n_bytes)})")
        self.whole = None if piecewise or self.from_file else Piece(
            self.counts, self.labels, self.device)

    def __call__(self, cells):
        """The batch of these cells, (B,) positions, a numpy array."""
        piece, places = self.load(cells)
        return piece(places)

    def load(self, cells):
        """A Piece that has these cells, and a tensor (B,) of where each is in it."""
        if self.whole is not None:
            return self.whole, torch.from_numpy(cells).to(self.device)
        rising, places = np.unique(cells, return_inverse=True)
        counts, labels = self.counts.take(rising), [v[rising] for v in self.labels]
        if self.device.type == "cpu":
            return Piece(counts, labels, self.device), torch.from_numpy(places)
        # A stream of its own: the copies need not wait for the computation that is under way.
        with torch.cuda.stream(torch.cuda.Stream(self.device)):
            piece = Piece(counts, labels, self.device, pinned=True)
            places = _tensor(places, self.device, pinned=True)
            for tensor in (places, piece.most, *piece.labels, *piece.tensors):
                # This memory must not be used anew before the batches from it are done.
                tensor.record_stream(torch.cuda.default_stream(self.device))
            torch.cuda.current_stream().synchronize()
        return piece, places

    def pieces(self, cells):
        """`load` of each of these arrays of cells; where there is something to load, ahead."""
        return map(self.load, cells) if self.whole is not None else ahead(self.load, cells, 1)

    def cut(self, order, start=0):
        """order[start:] (an array of cells) in pieces to be loaded: always at the same places."""
        size = self.n_piece if self.whole is None else max(1, len(order))
        for a in range(start - start % size, len(order), size):
            yield order[max(a, start):a + size]

    def in_order(self, cells, size=512):
        """All the given cells (a numpy array) once, in batches of at most `size`."""
        for piece, places in self.pieces(self.cut(cells)):
            for part in places.split(size):
                yield piece(part)


def size_in_words(n_bytes):
    """2.1e9 -> 2.1 GB."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


class Shuffle:
    """Endless random batches of the given cells: every epoch visits each once, in a new order.

    cells (n,) positions. All batches have the same size; one that reaches the end of an epoch goes
    on in the next. The state is two numbers, epoch and position, so that training can be resumed in
    the middle of an epoch. Of several processes, each gets its share of every batch.

    From a file, reading cell by cell would be too slow. There an epoch takes strips of 64
    neighbours (cells must rise) in random order, and shuffles the cells of each piece of 1,024
    strips, fewer where cells are large. In a file sorted by perturbation, the number of a
    perturbation's cells in a batch then has 1 + 64 size / 65,536 times the variance that it has in
    random order: 1.5 in batches of 512, 1.25 in batches of 256.
    """

    def __init__(self, batches, cells, size, seed, epoch=0, position=0, rank=0, n_ranks=1):
        self.batches, self.cells, self.size, self.seed = batches, cells, size, seed
        self.epoch, self.position, self.rank, self.n_ranks = epoch, position, rank, n_ranks
        self.pieces, self.left = batches.pieces(self._shares()), ()

    def order(self, epoch):
        """The cells in the order of this epoch, which follows from seed and epoch alone."""
        rng, n = np.random.default_rng((self.seed, epoch)), len(self.cells)
        if not self.batches.from_file:
            return rng.permutation(self.cells)
        strips = rng.permutation(-(-n // STRIP))[:, None]
        order = (strips * STRIP + np.arange(STRIP)).ravel()
        order = order[order < n]  # the last strip may be shorter
        for start in range(0, n, self.batches.n_piece):
            rng.shuffle(order[start:start + self.batches.n_piece])
        return self.cells[order]

    def _shares(self):
        """This process's cells, in the order in which it will need them, a piece at a time."""
        epoch, start, n = self.epoch, self.position, len(self.cells)
        before = epoch * n + start  # cells that all processes have taken so far
        while True:
            for cells in self.batches.cut(self.order(epoch), start):
                places = (before + np.arange(len(cells))) % self.size  # in their batch
                before += len(cells)
                yield cells[places * self.n_ranks // self.size == self.rank]
            epoch, start = epoch + 1, 0

    def __next__(self):
        parts, missing = [], self.size // self.n_ranks
        while missing:  # a batch may begin in one piece, or epoch, and end in another
            if not len(self.left):
                self.piece, self.left = next(self.pieces)
            parts.append(self.piece(self.left[:missing]))
            self.left = self.left[missing:]
            missing -= len(parts[-1][0])
        epochs, self.position = divmod(self.position + self.size, len(self.cells))
        self.epoch += epochs
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts)))


def training_statistics(batches, cells):
    """Of these cells, by gene, (G,) each: mean and standard deviation of log(1 + x), which the
    encoder standardises by; log frequency f and log inverse dispersion theta, for `start_from`.

    By the likelihood of 2.2 without latents, x ~ NB(mean l f, theta): f is the gene's part of all
    counts (half a count is added to each gene), and theta the one by which what x varies more than
    a Poisson count adds up, sum (x - l f)^2 - l f = sum (l f)^2 / theta, from exp(-8) to exp(6).

    One pass, in double precision. The squares are summed around the mean of a batch and merged: a
    mean of squares minus a squared mean would lose digits.
    """
    n = mean = squares = x1 = x2 = l1 = l2 = lx = 0.0
    for x, *_ in batches.in_order(cells):
        log = torch.log1p(x).double()
        shift, part = log.mean(0) - mean, len(x) / (n + len(x))
        mean, n = mean + shift * part, n + len(x)
        squares = squares + ((log - log.mean(0)) ** 2).sum(0) + shift**2 * part * (n - len(x))
        x = x.double()
        library = x.sum(1, keepdim=True)
        x1, x2, lx = x1 + x.sum(0), x2 + (x**2).sum(0), lx + (library * x).sum(0)
        l1, l2 = l1 + library.sum(), l2 + (library**2).sum()
    f = (x1 + 0.5) / (x1 + 0.5).sum()
    excess = x2 - 2 * f * lx + f**2 * l2 - f * l1
    log_theta = (f**2 * l2 / excess.clamp(min=1e-9)).log().clamp(-8, 6)
    return mean.float(), (squares / n).sqrt().float(), f.log().float(), log_theta.float()


# ============================================================================================
# A simulated screen with known latents, masks and effects
# ============================================================================================


SPARSE_SHIFT = dict(  # the arguments of `simulate` for the benchmark of Lopez et al. (CLeaR 2023)
    sparse_shift=True, n_perturbations=100, cells_per_condition=375, effect_size=5.0, n_latent=15,
    n_genes=100, n_pairs=0, n_controls=375)


def simulate(path, seed=0, n_perturbations=500, cells_per_condition=25, effect_size=4.0,
             n_latent=6, n_genes=200, n_pairs=60, n_controls=100, batch_effect=0.0, library=5000,
             sparse_shift=False):
    """Simulate a screen from the SAMS-VAE process (Algorithm 1) and write it as an .h5ad file.

    Each perturbation alone and n_pairs random pairs, cells_per_condition cells each, and n_controls
    controls. Every perturbation touches one latent dimension, and each further one with probability
    0.05; effects are +-N(effect_size, 0.5). Two-layer decoder, Gamma-Poisson counts with inverse
    dispersion 10, library sizes log-normal around `library`. Half of the pairs are held out: all
    their cells are in `split` test, the others 64/16/20 in train, validation and test. The default
    screen has 14,100 cells: 500 perturbations and 60 pairs, 25 cells each, and 100 controls.
    Numbers of cells and sizes of effects may differ: arrays (n_perturbations + n_pairs,) and
    (n_perturbations,).

    With a batch_effect there are two batches, obs `batch`: the second, of three in four controls
    and of half of the perturbed cells, adds N(0, batch_effect^2) to the log frequency of each gene.

    With sparse_shift, the process of the SVAE+ paper: 1, 2 or 3 latent dimensions of a perturbation
    are drawn with replacement, and from 2/3 to 4/3 of cells_per_condition as its cells; the decoder
    has four layers, orthonormal but for a factor, without biases, and logits of standard deviation
    1 (before a batch is added); counts are Poisson. Frequencies are normalised over cells, not over
    genes, as in its authors' code: each gene has 1e6 counts in all cells together, and some cells
    have more than others.

    Written beside the counts: obs `condition` and `split`; obsm `X_true_z`, the latent states z
    (N, L); uns `simulation` with the perturbations' names, the true `mask` and `effect` (T, L) and
    the decoder, `weight_1`, `bias_1` and so on (`decode`); uns `pathways`, where a pathway is ten
    or more perturbations that share a mask.

    Why so many perturbations of few cells each? The sparsity of the masks is all that says which
    latent axes are the true ones (see `sparsest_axes` in sams_vae.py). Rotating them by a little
    makes masks denser, and each further entry of 1 costs about log(1 / alpha) nats, once for each
    perturbation and however many cells it has: so many perturbations are a strong force towards the
    true axes, and many cells are not. Effects must be clear against the unit variance of the basal
    state, or too few entries are found in the first place. The harder screen of the README has 60
    perturbations of 115 cells each, as many cells in all.
    """
    rng = np.random.default_rng(seed)
    # m_t and e_t, (T, L) each.
    if sparse_shift:
        n_targets, mask = rng.integers(1, 4, n_perturbations), np.zeros(
            (n_perturbations, n_latent), bool)
        for i in range(3):
            t = np.flatnonzero(n_targets > i)
            mask[t, rng.integers(n_latent, size=len(t))] = True
    else:  # the second line gives every perturbation its one sure dimension
        mask = rng.random((n_perturbations, n_latent)) < 0.05
        mask[np.arange(n_perturbations), rng.integers(n_latent, size=n_perturbations)] = True
    size = np.broadcast_to(effect_size, n_perturbations)[:, None]
    effect = rng.choice([-1, 1], mask.shape) * rng.normal(size, 0.5, mask.shape)

    # Conditions, then the dosages of all cells: two places a cell, and a zero row for NONE.
    all_pairs = np.stack(np.triu_indices(n_perturbations, 1), axis=1)
    n_pairs = min(n_pairs, len(all_pairs))
    pairs = all_pairs[np.sort(rng.choice(len(all_pairs), n_pairs, replace=False))]
    singles = np.stack([np.arange(n_perturbations), np.full(n_perturbations, NONE)], axis=1)
    conditions = np.concatenate([singles, pairs])
    cells = np.broadcast_to(cells_per_condition, len(conditions))
    if sparse_shift:
        cells = rng.integers(-(-2 * cells // 3), 4 * cells // 3 + 1)
    d = np.concatenate([np.full((n_controls, 2), NONE), np.repeat(conditions, cells, axis=0)])
    held_out = np.zeros(len(conditions), bool)
    held_out[n_perturbations:] = rng.permutation(n_pairs) < n_pairs // 2
    held_out = np.append(np.zeros(n_controls, bool), np.repeat(held_out, cells))
    order = rng.permutation(len(d))
    d, held_out, n = d[order], held_out[order], len(d)

    # Algorithm 1 and the likelihood of section 2.2.
    offset = np.concatenate([mask * effect, np.zeros((1, n_latent))])
    z = rng.normal(size=(n, n_latent)) + offset[d].sum(axis=1)  # eq. 1
    if sparse_shift:
        widths, decoder = [n_latent, 40, 40, 40, n_genes], []
        for n_in, n_out in itertools.pairwise(widths):
            q, _ = np.linalg.qr(rng.normal(size=(max(n_in, n_out), min(n_in, n_out))))
            scale = math.sqrt(2 / (1 + 0.2**2) * 2 / (n_in + n_out))
            decoder.append((scale * (q if n_in > n_out else q.T), np.zeros(n_out)))
        decoder[-1] = decoder[-1][0] / decode(z, decoder).std(), decoder[-1][1]
    else:
        decoder = [(rng.normal(0, scale / np.sqrt(n_in), (n_in, n_out)), rng.normal(size=n_out))
                   for n_in, n_out, scale in ((n_latent, 64, 1.5), (64, n_genes, 0.6))]
    logits = decode(z, decoder)
    batch = np.zeros((n, 1), int)
    if batch_effect:
        batch = rng.random((n, 1)) < np.where(d == NONE, 0.75, 0.5).min(axis=1, keepdims=True)
        logits = logits + batch * rng.normal(0, batch_effect, n_genes)
    over = 0 if sparse_shift else 1  # softmax
    rho = np.exp(logits - logits.max(axis=over, keepdims=True))
    rho /= rho.sum(axis=over, keepdims=True)
    if sparse_shift:
        x = rng.poisson(1e6 * rho)
    else:
        library = rng.lognormal(np.log(library), 0.3, (n, 1))
        # Gamma noise of mean 1 and shape theta = 10 makes Poisson counts negative binomial ones.
        x = rng.poisson(library * rho * rng.gamma(10, 1 / 10, rho.shape))

    # The last name is that of NONE = -1: filter(None, ...) below leaves it out.
    names = np.array([*(f"P{t + 1:03d}" for t in range(n_perturbations)), ""], dtype=object)
    pathways = {}
    for row in np.unique(mask, axis=0):
        members = names[:-1][(mask == row).all(1)]
        if len(members) >= 10:
            pathways["latent " + " and ".join(map(str, np.flatnonzero(row) + 1))] = members
    split = rng.choice(["train", "validation", "test"], n, p=[0.64, 0.16, 0.2])
    split = np.where(held_out, "test", split)
    write_h5ad(
        path, X=x.astype(np.uint16 if x.max() < 2**16 else np.uint32),
        obs={"cell": [f"cell{i}" for i in range(n)],
             "condition": ["+".join(filter(None, names[row])) or "control" for row in d],
             "split": split.astype(object)}
        | ({"batch": batch[:, 0].astype(int)} if batch_effect else {}),
        var={"gene": [f"G{g + 1:03d}" for g in range(n_genes)]},
        obsm={"X_true_z": z},
        uns={"simulation": {"perturbations": names[:-1], "mask": mask, "effect": effect} | {
                f"{name}_{i + 1}": value for i, layer in enumerate(decoder)
                for name, value in zip(("weight", "bias"), layer)},
             "pathways": pathways})


def decode(z, decoder):
    """Logits (N, G) of latent states z (N, L) by the layers [(weight, bias), ...] of a simulation:
    linear maps, with leaky ReLU of slope 0.2 between them."""
    for i, (weight, bias) in enumerate(decoder):
        z = np.where(z > 0, z, 0.2 * z) if i else z
        z = z @ weight + bias
    return z


def read_simulation(path):
    """(names of the T perturbations, true mask (T, L) bool, true effect (T, L), true z (cells, L),
    None in files of earlier versions) of a simulated screen; None for other files.
    """
    with _h5_file(path) as file:
        # uns is never walked: only what is asked for by name is read.
        parts = [f"uns/simulation/{part}" for part in ("perturbations", "mask", "effect")]
        if any(_member(file, part, required=False) is None for part in parts):
            return None
        names, mask, effect = _plain(file, parts[0]), *(_numbers(file, p) for p in parts[1:])
        z = _member(file, "obsm/X_true_z", required=False)
        return list(names), mask.astype(bool), effect, z if z is None else _numbers(
            file, "obsm/X_true_z")


def read_layers(path):
    """{layer: array (obs x var)} of a file that write_h5ad wrote, such as predictions."""
    with _h5_file(path) as file:
        return {name: _numbers(file, f"layers/{name}") for name in _keys(_member(file, "layers"))}


def read_pathways(path):
    """{pathway: list of its genes} of uns/pathways, or of a .json file; None if there is none."""
    if os.fspath(path).endswith(".json"):
        try:
            with open(path, encoding="utf-8") as file:
                pathways = json.load(file)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: cannot be read as JSON: {error}") from None
        # Either the pathways themselves, or an object that has them beside its source, say.
        pathways = pathways.get("pathways", pathways) if isinstance(pathways, dict) else None
        if not isinstance(pathways, dict) or not all(
                isinstance(genes, list) and all(isinstance(gene, str) for gene in genes)
                for genes in pathways.values()):
            raise DataError(f"{path}: must hold an object of pathways, each a list of genes")
        return pathways
    with _h5_file(path) as file:
        group = _member(file, "uns/pathways", required=False)
        if not isinstance(group, h5py.Group):
            return None
        return {name: [str(gene) for gene in np.ravel(_plain(file, f"uns/pathways/{name}"))]
                for name in _keys(group)}


# ============================================================================================
# The command line
# ============================================================================================


AT_LEAST_0 = (0, 2**32 - 1, "at least 0 and below 2^32")  # least, largest, the same in words
AT_LEAST_1 = (1, 2**32 - 1, "at least 1 and below 2^32")
LABEL_OPTIONS = ("perturbation_column", "control", "combination_separator", "one_hot_prefix",
                 "exclude", "keep")
SCREEN_OPTIONS = (*LABEL_OPTIONS, "layer", "split_column", "gene_column", "subset", "min_cells",
                  "covariate")  # the arguments of read_screen


MIN_CELLS = 10  # what the commands take for --min-cells where nothing is said

SIMULATION_OPTIONS = [  # of a simulated screen (ours)
    ("--sparse-shift", False, bool, "its process is that of Lopez et al. (2023), the paper of "
     "SVAE+, and the other defaults are theirs: 100 perturbations of 375 cells, effects of 5, no "
     "pairs"),
    ("--perturbations", 500, (2, 2**32 - 1, "at least 2 and below 2^32"), "its perturbations"),
    ("--cells", 25, AT_LEAST_1, "its cells per perturbation and pair"),
    ("--pairs", 60, AT_LEAST_0, "its pairs; half of them are held out of training"),
    ("--effect", 4.0, AT_LEAST_0, "size of its effects, in sd of the basal state"),
    ("--batch", 0.0, AT_LEAST_0, "sd of what its second batch (obs column batch) adds to log "
     "frequencies, 0 for one batch"),
    ("--seed", 0, AT_LEAST_0, "its seed"),
]
ARGUMENTS = {  # of `simulate`, by option
    "sparse_shift": "sparse_shift", "perturbations": "n_perturbations", "pairs": "n_pairs",
    "cells": "cells_per_condition", "effect": "effect_size", "batch": "batch_effect",
    "seed": "seed"}


def add_screen_options(parser, training=True):
    """The options that say how a file is read, the same for data.py and train.py; but for those
    that a file is not prepared by."""
    group = parser.add_argument_group("reading the file")
    group.add_argument("--perturbation-column", metavar="COLUMN",
                       help="obs column of labels (default: well-known names are tried)")
    group.add_argument("--control", metavar="LABEL",
                       help="label of control cells; * stands for any characters")
    group.add_argument("--combination-separator", metavar="TEXT",
                       help="what joins perturbations in a label, such as +; empty: nothing "
                            "(default: + for a column called condition, else nothing)")
    group.add_argument("--one-hot-prefix", metavar="PREFIX",
                       help="in place of labels: 0/1 columns of obs with this prefix")
    group.add_argument("--layer", help="layer that holds the counts, or raw (default: X, else "
                                       "layers/counts, else raw/X)")
    group.add_argument("--gene-column", metavar="COLUMN",
                       help="var column that is true for the genes to keep (default: all are kept)")
    group.add_argument("--subset", metavar="COLUMN=VALUE", action="append",
                       help="keep cells with this value in this obs column; may be repeated")
    group.add_argument("--exclude", metavar="LABEL", action="append",
                       help="leave out cells with this label; * as in --control; may be repeated")
    group.add_argument("--keep", metavar="LABEL", action="append",
                       help="a label such as negative or unknown that does name a perturbation; "
                            "may be repeated")
    group.add_argument("--min-cells", metavar="N", type=int,
                       help=f"leave out perturbations of fewer cells (default: {MIN_CELLS}; with a "
                            "preset of the paper, and to prepare a file, none)")
    if not training:
        return
    group.add_argument("--split-column", metavar="COLUMN",
                       help="obs column that says train, validation or test (default: random)")
    group.add_argument("--covariate", metavar="COLUMN", action="append",
                       help="obs column, such as a donor or a batch, that the networks see; may be "
                            "repeated (ours)")


def add_options(parser, rows):
    """Add options given as (--name, default, what is allowed, text): bool for a switch, a list of
    words, or (least, largest, the same in words). One that is not given is absent from the result.
    """
    for flag, default, allowed, text in rows:
        if allowed is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(allowed[0], str):
            how = {"choices": allowed}
        else:
            how = {"type": number_within(type(default), *allowed)}
        text += "" if default is None else f" [{default}]"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **how)


def option_name(flag):
    """--like-this -> like_this."""
    return flag[2:].replace("-", "_")


def number_within(kind, least, largest, words):
    """A function text -> number for argparse, which refuses what is outside of the bounds."""
    def parse(text):
        """The number; raises what argparse turns into a message."""
        value = kind(text)
        if not least <= value <= largest:  # also where it is NaN
            raise argparse.ArgumentTypeError(f"must be {words}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def run(main):
    """Run a command; what is wrong with a file, an option or the machine becomes one sentence on
    standard error and exit status 2."""
    try:
        if sys.stdout:
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
        main()
        if sys.stdout:
            sys.stdout.flush()
        return
    except DataError as error:
        problem = str(error)
    except BrokenPipeError:
        problem = "standard output is closed"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python will write there
    except OSError as error:
        problem = (f"{os.fsdecode(error.filename or 'reading or writing failed')}: "
                   f"{error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1]
        if isinstance(error, RuntimeError) and not re.search(
                "out of memory|allocate memory|(multiplic|calcul)ation overflow", reason):
            raise
        problem = ("not enough memory: a smaller model or fewer particles, cells in a batch or "
                   f"genes take less ({reason})")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"error: {printable(problem)}", file=sys.stderr)
    sys.exit(2)


def main_of_prepare(arguments):
    """The command line of `prepare`."""
    parser = argparse.ArgumentParser(
        prog="data.py prepare", allow_abbrev=False,
        description="Write some cells and genes of an .h5ad file of any size to another one: X "
        "sparse by rows, uncompressed, in the narrowest integer type (cast before computing), all "
        "columns of obs and var, and uns/pathways. Where an option concerns labels (--controls, "
        "--min-cells, --exclude, those that say where they are), cells without one are left out.")
    parser.add_argument("file", metavar="IN.h5ad")
    parser.add_argument("out", metavar="OUT.h5ad")
    parser.add_argument("--recipe", choices=list(RECIPES), help="the paper's cells and genes; "
                        "leave out all that follows")
    parser.add_argument("--genes", metavar="FILE", help="the genes to keep, a name a line")
    parser.add_argument("--variable-genes", metavar="N", type=int,
                        help="of these, the N most variable ones (binomial deviance)")
    parser.add_argument("--controls", metavar="N", type=int, help="keep at most N control cells")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    add_screen_options(parser, training=False)
    args = parser.parse_args(arguments)
    given = {k for k, v in vars(args).items() if v not in (None, 0)} - {"file", "out", "layer"}
    if args.recipe and given > {"recipe"}:
        raise DataError("--recipe says which cells and genes are kept: leave the other options out")
    for n, least, option in ((args.variable_genes, 1, "--variable-genes"),
                             (args.controls, 1, "--controls"), (args.seed, 0, "--seed"),
                             (args.min_cells, 0, "--min-cells")):
        if n is not None and not least <= n < 2**32:
            raise DataError(f"{option} must be at least {least} and below 2^32, not {n}")
    # Before hours of reading.
    folder, exists = os.path.dirname(os.path.abspath(args.out)), os.path.exists(args.out)
    if exists and os.path.exists(args.file) and os.path.samefile(args.file, args.out):
        raise DataError(f"{args.out} is the file that is read: choose another name")
    if exists and not os.path.isfile(args.out) or not os.access(folder, os.W_OK):
        raise DataError(f"{args.out} cannot be written: a file in a folder that exists, and that "
                        "you may write to, was expected")
    prepare(args.file, args.out, args.genes, args.gene_column, args.variable_genes, args.controls,
            args.seed, args.layer, args.subset, args.min_cells or 0, args.recipe,
            **{k: getattr(args, k) for k in LABEL_OPTIONS})


def main_of_simulate(arguments):
    """The command line of `simulate`."""
    parser = argparse.ArgumentParser(
        prog="data.py simulate", allow_abbrev=False,
        description="Write a simulated screen, and the truth with it: train.py without --data "
        "makes the same. A file that is there is replaced.")
    parser.add_argument("out", metavar="OUT.h5ad")
    add_options(parser, SIMULATION_OPTIONS)
    args = vars(parser.parse_args(arguments))
    out = args.pop("out")
    simulate(out, **(SPARSE_SHIFT if args.get("sparse_shift") else {})
             | {ARGUMENTS[option]: value for option, value in args.items()})
    n_cells, n_genes = read_h5ad(out).shape
    say(f"written: {out}, {n_cells:,} cells x {n_genes:,} genes; their split is obs column split, "
        "and the truth is in obsm/X_true_z and uns/simulation")


def main():
    """Print what the reader makes of a file, or prepare or simulate another one."""
    for command in (main_of_prepare, main_of_simulate):
        if sys.argv[1:2] == [command.__name__.removeprefix("main_of_")]:
            return command(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description="Print what the reader makes of an .h5ad file. (python data.py prepare --help: "
        "write some of its cells and genes to another; python data.py simulate --help: a simulated "
        "screen.)", allow_abbrev=False)
    parser.add_argument("file")
    add_screen_options(parser)
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in SCREEN_OPTIONS}
    options["min_cells"] = MIN_CELLS if args.min_cells is None else args.min_cells
    screen = read_screen(args.file, **options)
    say(screen.path, *screen.notes)
    sizes = {name: len(cells) for name, cells in split_cells(screen).items()}
    print("  split: " + ", ".join(f"{n:,} {name}" for name, n in sizes.items()))


if __name__ == "__main__":
    run(main)
