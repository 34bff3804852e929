"""From an .h5ad file to what the model is trained on; from a simulation to an .h5ad file.

    python data.py FILE.h5ad                                  what the reader makes of a file
    python data.py FILE.h5ad --perturbation-column gene --control non-targeting
    python data.py prepare LARGE.h5ad SMALL.h5ad --subset line=K562 --genes genes.txt
    python data.py simulate SCREEN.h5ad --sparse-shift        a screen, and the truth with it

In reading order: a file and its columns; counts in memory, `Counts`, and in their file,
`StoredCounts`; `read_h5ad` and `write_h5ad`. Down to "Cut here" h5py and numpy are enough: copy
that part. Then labels -> dosages d, `Screen`; splits; batches x, d, c on the device, `Batches` and
`Shuffle`; a simulated screen; `prepare`, which writes a part of a file.

Files of anndata 0.5 to 0.13 are read, without anndata. Every count is checked, no link is
followed, nothing is unpickled. What is wrong with a file or an option is a DataError.
"""

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import hashlib
import math
import os
import re
import sys

import h5py
import numpy as np

with contextlib.suppress(ImportError):
    import hdf5plugin  # noqa: F401 (where it is installed, HDF5 knows its compressions, too)

BLOCK = 2**20  # values of a matrix that are read at once: small enough for the caches
GAP = 2**14  # shorter gaps are read and discarded: one long read beats two short ones


def printable(text):
    """Text that is safe to print: names in a file could hold commands for a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text)[:2000])


class DataError(ValueError):
    """What is wrong with a file or an option, and what to do: one sentence for the user."""

    def __str__(self):
        return printable(super().__str__())


class NotCounts(DataError):
    """A matrix was read, but its values are not counts: another matrix may hold them."""


def require(is_so, sentence, kind=DataError):
    """Raise a DataError of this sentence unless it is so."""
    if not is_so:
        raise kind(sentence)


def say(*lines):
    """Print lines, the second and later ones indented."""
    print(*map(printable, lines), sep="\n  ")


# ============================================================================================
# A file, which may be damaged or hostile
# ============================================================================================


@contextlib.contextmanager
def _naming(path):
    """Turn every failure inside into a DataError that begins with the file's name."""
    try:
        yield
    except DataError as error:  # raised below, where the path is not known
        raise type(error)(f"{path}: {error}") from None
    except BlockingIOError:
        raise DataError(f"{path}: another program, such as a notebook, has it open for writing: "
                        "close it there, or read a copy") from None
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        # On a damaged file h5py raises any of these; with a number where the file did not open.
        number, words = getattr(error, "errno", None), " ".join(str(error).split())
        raise DataError(f"{path}: {os.strerror(number)}" if number else f"{path}: cannot be read: "
                        f"truncated, damaged, or no HDF5 file? HDF5 says: {words}") from error


@contextlib.contextmanager
def _h5_file(path):
    """Open an .h5ad file to read from it; failures inside become a DataError that names it."""
    with _naming(path), h5py.File(path, "r") as file:
        require("obs" in file or "matrix" not in file, "looks like a 10x .h5 matrix: read it with "
                "scanpy.read_10x_h5, add labels to obs, save it as .h5ad")
        require("mod" not in file or "X" in file, "looks like an .h5mu file of several "
                "modalities: save the RNA alone, mdata['rna'].write('rna.h5ad')")
        yield file


def _member(file, name, required=True):
    """The group or data set `name`; None if it is absent and not required.

    No link is followed: one out of the file could make it read any file of this machine.
    """
    node = file
    for part in name.split("/"):
        # getlink asks what kind of link it is and does not follow it; node[part] would.
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            present = ", ".join(_keys(node)[:20]) if isinstance(node, h5py.Group) else ""
            require(not required, f"{name} is missing; beside it: {present or 'nothing'}")
            return None
        require(isinstance(link, h5py.HardLink),  # else it leads elsewhere
                f"{name} is behind a link, which is not followed: copy the data to its place")
        node = node[part]
    if isinstance(node, h5py.Dataset):
        _check_storage(file, name, node)
    return node


def _check_storage(file, name, dataset):
    """Refuse a data set that the file does not hold, before anything is allocated for it.

    HDF5 fills what was never stored with zeros: a file of 90 KB can declare 4 EiB, and a download
    that broke off can look like a screen whose last cells have no counts.
    """
    require(not dataset.is_virtual and not dataset.external,
            f"{name} keeps its values in other files: copy the data into the file")
    require(dataset.shape is not None, f"{name} is a data set without values")
    fields = [dataset.dtype[field] for field in dataset.dtype.names or ()] or [dataset.dtype]
    for dtype in fields:  # on other values of variable length HDF5 crashes if they are damaged
        require(dtype.kind != "O" or h5py.check_string_dtype(dtype),
                f"{name} holds values that are neither text nor numbers")
    creation = dataset.id.get_create_plist()
    for i in range(creation.get_nfilters()):
        code, _, _, title = creation.get_filter(i)
        require(h5py.h5z.filter_avail(code), f"{name} is compressed by "
                f"{title.decode('utf-8', 'replace') or code}: pip install hdf5plugin")
    declared = math.prod(dataset.shape) * dataset.id.get_type().get_size()  # bytes
    stored, offset = dataset.id.get_storage_size(), dataset.id.get_offset() or 0
    if dataset.chunks:  # all must be there; no filter does better than deflate's 1032 : 1
        grid = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks))
        complete = dataset.id.get_num_chunks() >= grid and stored >= declared / 1100
    else:  # one stretch, perhaps in the object's header, where it has no offset
        complete = stored >= declared and offset + declared <= file.id.get_filesize()
    require(complete or not declared, f"{name} declares {dataset.shape} values of {dataset.dtype}, "
            f"{declared:,} bytes, and the file does not hold them: it is truncated or unfinished")


def _keys(group):
    """Names of a group's members, sorted; names that are not UTF-8, as bytes, are left out."""
    return sorted(name for name in group if isinstance(name, str))


def _attribute(node, *names):
    """The values of the first of these attributes that exists, a list; else []."""
    for name in names:
        if name in node.attrs and not isinstance(node.attrs[name], h5py.Empty):
            return _to_numpy(f"the attribute {name}", node.attrs[name]).tolist()
    return []


# ============================================================================================
# Columns of obs and var
# ============================================================================================

# Until anndata 0.6, obs and var are compound data sets (arrays of records), their first field the
# index. Since 0.7 they are groups with an element for each column. A categorical column is
#
#     until 0.6    integer codes; its labels are in uns/<column>_categories
#     0.7          integer codes; its labels are in obs/__categories/<column> (also from R)
#     since 0.8    a group of `codes` and `categories`
#
# Since 0.8 columns with missing values, and with pandas 3 all columns of text and the index too,
# are groups of `values` and a `mask` that is true where a value is missing.


def _objects(values):
    """Any values -> a 1-D array of objects; the None keeps numpy from guessing another type."""
    return np.array([*values, None], dtype=object)[:-1]


def _numbered(texts):
    """The different texts, sorted, and the position of each text among these, an array."""
    values = sorted(set(texts))
    place = {value: i for i, value in enumerate(values)}
    return values, np.array([place[text] for text in texts], int)


def _to_numpy(name, raw):
    """What h5py reads -> a 1-D array of str objects, native numbers or bools."""
    raw = np.atleast_1d(raw)  # anndata <= 0.6 writes a single category as a scalar
    require(raw.ndim == 1 and raw.dtype.kind in "biufOSU",
            f"{name} is no column of text or numbers, but {raw.ndim}-dimensional {raw.dtype}")
    if raw.dtype.kind in "biuf":
        return raw.astype(raw.dtype.newbyteorder("="), copy=False)  # "=": this machine's byte order
    # Text comes as bytes in objects, as S where its length is fixed, as U from an attribute. Some
    # control characters would command a terminal, and a NUL could not be written again.
    return _objects(re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", (
        v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v))) for v in raw.tolist())


def _decode(name, codes, categories):
    """A categorical column: categories[codes], None where the code is -1 (from R: -2^31)."""
    require(codes.dtype.kind in "iu", f"{name} has codes of type {codes.dtype}, not integers")
    missing = (codes == -1) | (codes == -2**31)
    wrong = codes[~missing & ((codes < 0) | (codes >= len(categories)))]
    require(not len(wrong),
            f"{name} has the category code {wrong[:1]}, but only {len(categories)} categories")
    places = np.where(missing, len(categories), codes).astype(np.int64)
    return (np.append(categories, None) if missing.any() else categories)[places]


def _read(file, name):
    """The element `name`, in whichever of these encodings, as a 1-D array."""
    node = _member(file, name)
    if isinstance(node, h5py.Dataset):
        return _to_numpy(name, node[()])
    if "codes" in node and "categories" in node:
        return _decode(name, _read(file, f"{name}/codes"), _read(file, f"{name}/categories"))
    require("values" in node and "mask" in node,
            f"{name} has the unknown encoding {_attribute(node, 'encoding-type')}")
    values, mask = _read(file, f"{name}/values"), _read(file, f"{name}/mask").astype(bool)
    require(len(mask) == len(values), f"{name} has {len(values)} values and a mask of {len(mask)}")
    if mask.any():
        values = values.astype(object)
        values[mask] = None
    return values


def _columns(file, table):
    """The names of a table's columns, its index first."""
    frame = _member(file, table)
    if isinstance(frame, h5py.Dataset):  # anndata <= 0.6
        require(frame.dtype.names, f"{table} is neither a table nor a group of columns")
        return list(frame.dtype.names)
    # An attribute names the index: _index, index, CellID, ... Some writers leave it out, and the
    # one that lists the other columns.
    members = [name for name in _keys(frame) if name != "__categories"]
    index = [n for n in (*_attribute(frame, "_index"), "_index", "index") if n in members][:1]
    require(index, f"{table} has no index; it holds: {', '.join(members) or 'nothing'}")
    columns = _attribute(frame, "column-order") or members
    return index + [column for column in map(str, columns) if column != index[0]]


def _column(file, table, column):
    """A column of the table obs, var, raw/var or raw.var as a 1-D array."""
    frame, name = _member(file, table), f"{table}/{column}"
    if isinstance(frame, h5py.Dataset):  # anndata <= 0.6
        values, labels = _to_numpy(name, frame.fields(column)[()]), f"uns/{column}_categories"
    else:
        values, labels = _read(file, name), f"{table}/__categories/{column}"
    if values.dtype.kind in "iu" and _member(file, labels, required=False) is not None:
        return _decode(name, values, _read(file, labels))
    return values


def _names(file, table):
    """The index of a table: names of cells or genes, as str objects, even if it holds numbers."""
    return _objects(map(str, _column(file, table, _columns(file, table)[0])))


# ============================================================================================
# Counts, in memory
# ============================================================================================


@dataclasses.dataclass
class Counts:
    """Counts of N cells x G genes in memory, as compressed sparse rows (CSR)."""

    shape: tuple  # (N, G)
    values: np.ndarray  # (entries,) the counts that are not 0, in the narrowest unsigned type
    columns: np.ndarray  # (entries,) the gene of each, rising within a cell, likewise
    indptr: np.ndarray  # (N + 1,) int64: the entries of cell i are indptr[i] to indptr[i + 1]

    @property
    def n_bytes(self):
        """The memory that it takes."""
        return self.values.nbytes + self.columns.nbytes + self.indptr.nbytes

    def take(self, cells):
        """The Counts of some cells, given by their positions (n,), in that order."""
        # Each cell's stretch of entries, one after the other: faster than an index of all of them.
        starts, ends = self.indptr[cells].tolist(), self.indptr[np.add(cells, 1)].tolist()
        parts = list(map(slice, starts, ends))
        values, columns = (np.concatenate([v[:0], *(v[part] for part in parts)])
                           for v in (self.values, self.columns))
        indptr = np.append(0, np.cumsum([part.stop - part.start for part in parts], dtype=np.int64))
        return Counts((len(cells), self.shape[1]), values, columns, indptr)

    def dense(self, cells=slice(None)):
        """The counts of some cells (positions or a mask), cells x genes, in the narrowest unsigned
        type: cast before computing, in uint8 200 + 100 is 44."""
        cells = np.arange(self.shape[0])[cells]
        out = np.zeros((len(cells), self.shape[1]), self.values.dtype)
        ends = zip(self.indptr[cells].tolist(), self.indptr[cells + 1].tolist())
        for row, (start, end) in zip(out, ends):
            row[self.columns[start:end].astype(np.intp)] = self.values[start:end]
        return out

    def parts(self):
        """Yield all cells in order, as Counts of about a BLOCK of entries: views of this one."""
        for a, b in _runs(np.arange(self.shape[0]), self.indptr[:-1], self.indptr[1:]):
            start, end = self.indptr[a], self.indptr[b]
            yield Counts((b - a, self.shape[1]), self.values[start:end], self.columns[start:end],
                         self.indptr[a:b + 1] - start)

    def without_empty(self, has_counts):
        """The cells where has_counts (N,) is true; the others have no entry. Copies no count."""
        return Counts((int(has_counts.sum()), self.shape[1]), self.values, self.columns,
                      self.indptr[np.append(True, has_counts)])


def cell_sums(counts):
    """Of a Counts or StoredCounts: library sizes and hashes of its cells, (2, N) int64. A hash is
    the sum of a cell's counts modulo 2^64, each gene with a fixed random weight."""
    weights = np.frombuffer(hashlib.shake_128(b"genes").digest(8 * counts.shape[1]), "<i8")
    sums = [np.zeros((2, 0), np.int64)]
    for part in counts.parts():
        values = np.zeros((2, len(part.values) + 1), np.int64)  # one more, for cells at the end
        values[:, :-1] = part.values
        values[1, :-1] *= weights[part.columns]
        of_cells = np.add.reduceat(values, part.indptr[:-1], axis=1)
        sums.append(of_cells * (np.diff(part.indptr) > 0))  # else it is the next one's first
    return np.concatenate(sums, axis=1)


def _runs(rows, start, end):
    """Rows (positions) whose values lie at start:end -> runs rows[a:b] to be read at once, rising,
    of about a BLOCK of values, without a long gap between two rows."""
    cut = (np.diff(rows) < 0) | (start[1:] > end[:-1] + GAP) | (
        start[1:] // BLOCK != start[:-1] // BLOCK)
    cuts = [0, *(np.flatnonzero(cut) + 1).tolist(), len(rows)]
    return list(zip(cuts, cuts[1:])) if len(rows) else []


def _narrowest(values):
    """Values in the narrowest unsigned type that holds them all exactly; None if there is none."""
    with np.errstate(invalid="ignore"):  # casting NaN or 1e30 to an integer warns
        # A cast is exact if and only if its result compares equal: NaN, inf, fractions, negative
        # and too large values never do.
        for candidate in (np.uint8, np.uint16, np.uint32):
            counts = values.astype(candidate, copy=False)
            if (counts == values).all():
                return counts


def from_dense(x):
    """Counts of a dense array, cells x genes."""
    some, genes = x != 0, np.arange(x.shape[1], dtype=np.min_scalar_type(x.shape[1]))
    entries = np.flatnonzero(some)  # `take` by these is four times as fast as x[some]
    indptr = np.append(0, np.cumsum(np.count_nonzero(some, axis=1)))
    return Counts(x.shape, x.ravel().take(entries), np.tile(genes, len(x)).take(entries), indptr)


def _tidy(counts):
    """Sort the entries of each cell by gene, add up entries of the same gene, drop zeros: an .h5ad
    file may contain unsorted, repeated and zero entries."""
    values, columns, indptr = counts.values, counts.columns, counts.indptr
    rises, starts = columns[1:] > columns[:-1], indptr[1:-1]
    rises[starts[(starts > 0) & (starts < len(columns))] - 1] = True  # the first of a cell
    if rises.all() and values.all():  # as nearly always
        return counts
    row = np.repeat(np.arange(counts.shape[0]), np.diff(indptr))
    key, entry = np.unique(row * counts.shape[1] + columns, return_inverse=True)
    sums = np.bincount(entry, weights=values)
    row, columns = np.divmod(key[sums > 0], counts.shape[1])
    indptr = np.append(0, np.cumsum(np.bincount(row, minlength=counts.shape[0])))
    return Counts(counts.shape, _narrowest(sums[sums > 0]), columns.astype(counts.columns.dtype),
                  indptr)


def _gather(blocks, n_genes):
    """Blocks of successive cells -> one Counts. They are in memory twice while this runs."""
    nothing = from_dense(np.zeros((0, n_genes), np.uint8))
    values, columns, n_entries = (np.concatenate(parts) for parts in zip(*(
        (block.values, block.columns, np.diff(block.indptr)) for block in [nothing, *blocks])))
    indptr = np.append(0, np.cumsum(n_entries, dtype=np.int64))
    return Counts((len(n_entries), n_genes), values, columns, indptr)


def _transposed(counts):
    """Counts of genes x cells -> of cells x genes."""
    n_genes, n_cells = counts.shape
    order = np.argsort(counts.columns, kind="stable")  # genes stay rising within a cell
    genes = np.repeat(np.arange(n_genes, dtype=np.min_scalar_type(n_genes)), np.diff(counts.indptr))
    indptr = np.append(0, np.cumsum(np.bincount(counts.columns, minlength=n_cells)))
    return Counts((n_cells, n_genes), counts.values[order], genes[order], indptr)


# ============================================================================================
# Counts, from the file
# ============================================================================================


class StoredCounts:
    """A matrix of counts that stays in its file, read anew by each `take` and `parts`.

    form         what it is in words: dense, sparse CSR (by rows) or sparse CSC (by columns)
    rows, genes  (N,), (G,) the positions in the file of the cells and genes that are wanted
    order        1, or -1 for a matrix by columns, whose blocks are genes x cells
    streams      True if a few cells can be read without reading many others
    """

    def __init__(self, path, file, name, cell_names, gene_names):
        """Open the matrix `name` of a file, such as "layers/counts", and check a first block."""
        self.path, self.file, self.name, self.names = path, file, name, (cell_names, gene_names)
        self.rows, self.genes = map(np.arange, map(len, self.names))
        require(0 not in self.shape, f"{name} has {self.shape[0]} cells and {self.shape[1]} genes")
        node = _member(file, name)
        if isinstance(node, h5py.Dataset):
            declared, self.form, self.order = node.shape, f"dense {node.dtype}", 1
            self.streams = not node.chunks or node.chunks[0] <= 512
        else:
            # The h5sparse attributes are of anndata <= 0.6.
            form = "".join(map(str, _attribute(node, "encoding-type", "h5sparse_format")))
            require(form in ("csr_matrix", "csr", "csc_matrix", "csc"),
                    f"{name} has the unknown encoding {form!r}")
            declared = _attribute(node, "shape", "h5sparse_shape")
            self.form, self.streams = f"sparse {form[:3].upper()}", form.startswith("csr")
            self.order = 1 if self.streams else -1
        require(not declared or tuple(declared) == self.shape,
                f"{name} has the shape {declared}, but obs and var say {self.shape}")
        self.data, self.indptr = node, None
        if isinstance(node, h5py.Group):
            self._open_sparse()
        require(self.data.dtype.kind in "biuf",
                f"{name} holds values of type {self.data.dtype}, not counts", NotCounts)
        block = next(self._stored_blocks(self.rows))
        self.density = 1.1 * (len(block.values) / math.prod(block.shape) if self.indptr is None
                              else len(self.indices) / math.prod(self.shape))
        self.value_type = block.values.dtype

    def _open_sparse(self):
        """Open data and indices; read and check indptr, which says which entries are whose.

        In a matrix by rows (CSR) the entries indptr[i] to indptr[i + 1] belong to row i, and their
        indices are columns; in one by columns (CSC), the reverse. No index is used unchecked.
        """
        self.data, self.indices, indptr = parts = [
            _member(self.file, f"{self.name}/{part}") for part in ("data", "indices", "indptr")]
        n, n_entries = self.shape[::self.order][0] + 1, math.prod(self.indices.shape)
        require([part.shape for part in parts] == [(n_entries,), (n_entries,), (n,)]
                and {self.indices.dtype.kind, indptr.dtype.kind} <= {*"iu"},
                f"{self.name} is inconsistent: data and indices must have the same number of "
                f"values, and indptr {n}; indices and indptr must be integers")
        self.indptr = indptr = indptr[()].astype(np.int64)
        # Seen in real files of more than 2**31 entries, written with 32-bit integers.
        overflow = ": it has overflowed 32 bits" * bool(indptr.min() < 0)
        require(indptr[0] == 0 and indptr[-1] == n_entries and (indptr[1:] >= indptr[:-1]).all(),
                f"{self.name}/indptr must rise from 0 to {n_entries}, and does not{overflow}")

    @property
    def shape(self):
        """(cells, genes)."""
        return len(self.rows), len(self.genes)

    @property
    def n_bytes(self):
        """About how many bytes these counts take in memory; if dense, judged by a first block."""
        n_bytes = self.value_type.itemsize + np.min_scalar_type(len(self.genes)).itemsize
        return int(self.density * math.prod(self.shape) * n_bytes + 8 * len(self.rows))

    def without_empty(self, has_counts):
        """As Counts.without_empty."""
        some = copy.copy(self)
        some.rows = self.rows[has_counts]
        return some

    def take(self, cells=slice(None)):
        """Read some cells, positions among the N without repetition. -> Counts, or NotCounts."""
        return _gather(ahead(self._blocks(self.rows[cells])), self.shape[1])

    def parts(self):
        """Yield all cells in order, as Counts of a block each. The next one is read in a thread."""
        return ahead(self._blocks(self.rows))

    def _blocks(self, rows):
        """Yield the Counts of some rows of the file, a block of whole rows at a time."""
        with _naming(self.path):
            blocks = self._stored_blocks(rows)
            # A matrix by columns is read as a whole and transposed in memory.
            yield from blocks if self.order > 0 else [_transposed(_gather(blocks, len(rows)))]

    def _stored_blocks(self, rows):
        """Yield blocks of these rows; of a matrix by columns, genes x rows. Below, `majors` are the
        rows, or genes, that are stored side by side, and `minors` the others."""
        majors, minors = (rows, self.genes)[::self.order]
        n_minor = len(self.names[::self.order][1])
        place = np.full(n_minor, -1)  # of each minor in the result; -1: not wanted
        place[minors] = np.arange(len(minors))
        if self.indptr is None:  # chunks that are side by side are read together, each once
            height = min(self.data.chunks[0] if self.data.chunks else 1, 2**27 // n_minor + 1)
            start = majors // height * (height * n_minor)
            end = start + height * n_minor
        else:
            start, end = self.indptr[majors], self.indptr[majors + 1]
        everything = np.array_equal(minors, np.arange(n_minor))
        for a, b in _runs(majors, start, end):
            part = majors[a:b]
            if self.indptr is None:
                tile = self.data[part[0]:part[-1] + 1][part - part[0]]
                block = from_dense(tile if everything else tile[:, minors])
            else:
                block = self._read(part[0], part[-1] + 1, n_minor)
                if b - a < block.shape[0]:
                    block = block.take(part - part[0])
                if not everything:
                    columns = place[block.columns]
                    kept = columns >= 0
                    block = Counts((b - a, len(minors)), block.values[kept], columns[kept],
                                   np.append(0, np.cumsum(kept))[block.indptr])
            yield self._checked(block, part, minors)

    def _read(self, start, stop, n_minor):
        """The majors from start to stop of a sparse matrix, their values unchecked, as Counts."""
        indptr = self.indptr[start:stop + 1]
        minor, values = (v[indptr[0]:indptr[-1]] for v in (self.indices, self.data))
        require(0 <= minor.min(initial=0) and minor.max(initial=0) < n_minor,  # before it is used
                f"{self.name}/indices must be at least 0 and below {n_minor}, and are not")
        return Counts((stop - start, n_minor), values, minor.astype(np.min_scalar_type(n_minor)),
                      indptr - indptr[0])

    def _checked(self, block, majors, minors):
        """The block with its values as counts, those within 1e-6 of an integer rounded; tidy."""
        counts = _narrowest(block.values)
        if counts is None:
            values = block.values.astype(np.float64)
            whole = np.rint(values)
            with np.errstate(invalid="ignore"):  # inf - inf
                good = (np.abs(values - whole) <= 1e-6) & (whole >= 0) & (whole < 2**32)
            if not good.all():
                i = int(np.argmin(good))  # the first that is not
                major = majors[np.searchsorted(block.indptr, i, "right") - 1]
                cell, gene = (major, minors[block.columns[i]])[::self.order]
                raise NotCounts(
                    f"{self.name} holds {values[i]:g} for cell {self.names[0][cell]!r}, gene "
                    f"{self.names[1][gene]!r}, which is no count: not a whole number from 0 to "
                    "2^32, as if normalised or estimated: start from the raw counts (--layer can "
                    f"be: {', '.join(_places_of_counts(self.file))})")
            counts = _narrowest(whole)
        columns = block.columns.astype(np.min_scalar_type(len(minors)), copy=False)
        return _tidy(Counts(block.shape, counts, columns, block.indptr))


def ahead(items):
    """The items of an iterator, each made in a thread while the one before it is in use."""
    pool, end = concurrent.futures.ThreadPoolExecutor(1), object()
    try:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item
    finally:  # also if the caller stops early
        pool.shutdown(wait=False, cancel_futures=True)


# ============================================================================================
# read_h5ad
# ============================================================================================


class H5ad:
    """An .h5ad file whose names are in memory; counts and columns are read when asked for.

    path, found               the file, and in words where its counts are and in which form
    shape                     (cells, genes)
    cell_names, gene_names    (cells,), (genes,) arrays of str; they may repeat
    obs_columns, var_columns  lists of the columns of obs and var other than the index
    streams                   see StoredCounts
    """

    def __init__(self, matrix, var):
        self.path, self.found = matrix.path, f"{matrix.name}, {matrix.form}"
        self.shape, self.streams = matrix.shape, matrix.streams
        self.cell_names, self.gene_names = matrix.names
        self._matrix, self._var = matrix.name, var
        (_, *self.obs_columns), (_, *self.var_columns) = (
            _columns(matrix.file, table) for table in ("obs", var))

    def obs(self, column):
        """An obs column (cells,), None where missing. DataError if there is no such column."""
        return self._column("obs", column, self.obs_columns, len(self.cell_names))

    def var(self, column):
        """The column of the table that describes the genes of the counts, (genes,), likewise."""
        return self._column(self._var, column, self.var_columns, len(self.gene_names))

    def _column(self, table, column, columns, n):
        with _h5_file(self.path) as file:
            require(column in columns, f"{table} has no column {column!r}; its columns are: "
                    + (", ".join(columns) or "none"))
            values = _column(file, table, column)
            require(len(values) == n, f"{table}/{column} has {len(values)} values for {n} rows")
            return values

    def counts(self, rows=slice(None), genes=slice(None), stored=False):
        """Counts of some cells and genes, all checked: a Counts or, if stored, a StoredCounts.

        rows, genes    a boolean mask, (cells,) or (genes,), or a list of positions in any order,
                       each once
        """
        with _naming(self.path):
            counts = StoredCounts(self.path, h5py.File(self.path, "r"), self._matrix,
                                  self.cell_names, self.gene_names)
        counts.rows, counts.genes = counts.rows[rows], counts.genes[genes]
        for positions in (counts.rows, counts.genes):
            require(positions.ndim == 1 and len(np.unique(positions)) == len(positions),
                    "counts() needs masks or lists of positions, each position once")
        return counts if stored else counts.take()


def read_h5ad(path, layer=None):
    """Open an .h5ad file (anndata 0.5 to 0.13) and find its counts. Returns an H5ad.

    layer   a layer's name, or "raw"; by default X, or, where X is absent or its first block has no
            counts, layers/counts or raw/X: a line then says so.
    """
    path = os.fspath(path)
    with _h5_file(path) as file:
        places, problem, cell_names = _places_of_counts(file), None, _names(file, "obs")
        asked = [n for n in ("X", "counts", "raw") if n in places] if layer is None else [layer]
        require(asked and asked[0] in places,
                f"has no {layer or 'X, counts or raw'}; --layer can be: {', '.join(places)}")
        for name, var in (places[n] for n in asked):
            try:
                matrix = StoredCounts(path, file, name, cell_names, _names(file, var))
            except NotCounts as error:
                problem = problem or error  # of X, if there is one: users care most about that
                continue
            if layer is None and name != "X":
                say(f"{path}: there {'are no counts in' if 'X' in places else 'is no'} X; the "
                    f"counts are taken from {name}")
            return H5ad(matrix, var)
        raise problem


def _places_of_counts(file):
    """Every matrix that could hold counts: {what --layer calls it: (its path, its var's path)}."""
    layers = _member(file, "layers", required=False)
    places, members = {n: (f"layers/{n}", "var") for n in _keys(layers or {})}, _keys(file)
    # raw has genes of its own, mostly more of them; its members are raw.X and raw.var until 0.6.
    for layer, matrix in (("X", "X"), ("raw", "raw/X"), ("raw", "raw.X")):
        if matrix.split("/")[0] in members:
            places[layer] = matrix, matrix[:-1] + "var"
    return places


# ============================================================================================
# write_h5ad
# ============================================================================================


def write_h5ad(path, X, obs, var, layers=None, obsm=None, uns=None):
    """Write an .h5ad file that anndata (0.8 or newer) and read_h5ad open. Nothing half-written.

    X             a 2-D array (cells x genes); None; or an iterator of Counts of successive cells,
                  which are written sparse, in the narrowest types
    obs, var      dicts of columns, or functions that return one: numbers or text, None where a
                  value is missing; the first is the index
    layers, obsm  dicts of 2-D arrays (cells x genes; cells x anything)
    uns           dict of arrays, numbers, text, lists of text, and such dicts
    """
    # Without a cache of chunks, which HDF5 would empty at the end: on a full disk it then crashes.
    with replacing(path) as temporary, h5py.File(temporary, "w", rdcc_nbytes=0) as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        if hasattr(X, "__next__"):
            _write_counts(file, X)
        elif X is not None:
            _write(file, "X", X)
        for name, columns in (("obs", obs), ("var", var)):
            _write_table(file, name, columns)
        # anndata expects these groups even if there is nothing in them.
        for name, members in (("layers", layers), ("obsm", obsm), ("uns", uns)):
            _write(file, name, members or {})


def _write(group, name, value):
    """Add an element, with the attributes by which anndata tells what it is."""
    if isinstance(value, dict):
        node, kind, version = group.create_group(name), "dict", "0.1.0"
        for key, item in value.items():
            _write(node, key, item)
    else:
        value = np.asarray(value)
        text = value.dtype.kind in "OU"  # HDF5 has no numpy text: strings of variable length
        node = group.create_dataset(name, data=value.astype(object) if text else value,
                                    dtype=h5py.string_dtype() if text else None)
        kind = ("numeric-scalar", "array", "string", "string-array")[2 * text + (value.ndim > 0)]
        version = "0.2.0"
    node.attrs.update({"encoding-type": kind, "encoding-version": version})


def _write_table(file, name, columns):
    """Add obs or var: a group of columns, whose attributes name the index and the order."""
    (index, names), *columns = columns.items()
    _write(file, name, {index: names})
    table, order = file[name], []
    for column, values in columns:
        name = column.encode("utf-8", "replace").decode()  # a damaged one may be no text
        column = free(name.replace("/", "_"), table)  # HDF5 takes a/b for a path
        try:
            _write_column(table, column, np.asarray(values() if callable(values) else values))
            order.append(column)
        except DataError as error:  # of a function: the column is damaged where it comes from
            say(f"{error}: this column is left out")
    # The order with its type, since an empty list would become floats.
    table.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": index,
                        "column-order": np.array(order, dtype=h5py.string_dtype())})


def _write_column(table, name, values):
    """Add a column: text as categorical; numbers, where some are missing, as floats with NaN."""
    missing = np.array([value is None for value in values.tolist()], bool)
    if not any(isinstance(value, str) for value in values[~missing][:1]):
        return _write(table, name, values.astype(float) if missing.any() else values)
    codes = np.full(len(values), -1, np.int32)
    categories, codes[~missing] = _numbered(values[~missing].tolist())
    _write(table, name, {"codes": codes, "categories": _objects(categories)})
    table[name].attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0",
                              "ordered": False})


def _write_counts(file, parts):
    """Add X, sparse by rows, from Counts of successive cells. Indices are int32, as scipy has them
    (from 2^31 entries on it wants int64: anndata then opens the file with backed="r")."""
    group, indptr = file.create_group("X"), [np.zeros(1, np.int64)]

    def create(name, dtype, n=0):
        return group.create_dataset(name, (n,), dtype, maxshape=(None,), chunks=(2**16,))

    values, indices = create("data", np.uint8), create("indices", np.int32)
    for counts in parts:
        start, end = indptr[-1][-1], indptr[-1][-1] + counts.indptr[-1]
        if counts.values.dtype.itemsize > values.dtype.itemsize:  # mostly in a first part
            narrow = values
            del group["data"]
            values = create("data", counts.values.dtype, start)
            for i in range(0, start, BLOCK):
                values[i:i + BLOCK] = narrow[i:i + BLOCK]
        for stored, part in ((values, counts.values), (indices, counts.columns)):
            stored.resize((end,))
            stored[start:end] = part
        indptr.append(counts.indptr[1:] + start)
    indptr = np.concatenate(indptr)
    group["indptr"] = indptr.astype(np.int32 if indptr[-1] < 2**31 else np.int64)
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0",
                        "shape": (len(indptr) - 1, counts.shape[1])})


def free(name, taken):
    """The name, or one like it that is not taken."""
    while name in taken:
        name += "_"
    return name


@contextlib.contextmanager
def replacing(path):
    """A temporary name beside `path` that is renamed to it, in one step, if and only if the block
    succeeds. DataError where it cannot be written."""
    require(os.path.isfile(path) or not os.path.exists(path), f"{path}: cannot be written: is a "
            "folder, a pipe or a device")
    target = os.path.realpath(path)  # a link stays, and its file is replaced
    temporary = f"{target}.writing"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # the latter by HDF5
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number else " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or never made
            os.remove(temporary)


# ============================================================================================
# Cut here: everything above needs h5py and numpy alone
# ============================================================================================
# The other imports stand here, and not at the top, so that the part above can be cut out as it is.
import argparse
import ctypes
import inspect
import itertools
import json

# Two settings that make a CPU fast, for two of our commands alone, before torch is imported: GNU
# OpenMP's threads spin 1,000 turns while they wait (more is slow beside other programs, none is
# slow alone), and glibc keeps freed arrays (M_MMAP_MAX is -4, M_TRIM_THRESHOLD -1).
if os.path.basename(sys.argv[0]) in ("train.py", "evaluate.py"):
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries
        for _parameter, _value in ((-4, 0), (-1, -1)):
            ctypes.CDLL(None).mallopt(_parameter, _value)

import torch

NONE = -1  # fills the free places of a row of dosages or covariates, as in sams_vae.py


# ============================================================================================
# Labels -> dosages
# ============================================================================================

AT_LEAST_0 = (0, 2**32 - 1, "at least 0 and below 2^32")  # least, largest, the same in words
AT_LEAST_1 = (1, 2**32 - 1, "at least 1 and below 2^32")
MIN_CELLS = 10  # what the commands take for --min-cells where nothing is said
# How a screen is read, by `read_screen` and by all commands: {option: (default, what is allowed or
# a placeholder, help)}. Where the default is [], it may be repeated. The first six concern labels.
READING = {
    "perturbation_column": (None, "COLUMN", "obs column of labels (default: the first well-known "
                            "one with a control)"),
    "control": ([], "LABEL", "label of control cells; * stands for any characters, '' for a missing"
                " label; with --one-hot-prefix: columns that are controls"),
    "combination_separator": (None, "TEXT", "what joins perturbations in a label, such as +, or '' "
                              "for nothing (default: + in a column `condition`, else nothing)"),
    "one_hot_prefix": (None, "PREFIX", "in place of labels: 0/1 columns of obs with this prefix; "
                       "without --control, cells that have none are controls"),
    "label_pattern": (None, "REGEX", "its first group is a perturbation's name within each part of "
                      "a label: (.+)_g[0-9]+ where a gene has several guides"),
    "exclude": ([], "LABEL", "leave out cells with this label; * as in --control"),
    "layer": (None, "NAME", "layer of the counts, or raw (default: X, layers/counts or raw/X)"),
    "gene_column": (None, "COLUMN[=VALUE]", "var column that is true, or has this value, for genes "
                    "to keep (default: feature_types=Gene Expression, if var has that, else all)"),
    "gene_names": (None, "COLUMN", "var column of the genes' names (default: the index)"),
    "subset": ([], "COLUMN=VALUE", "keep cells with this value in this obs column"),
    "min_cells": (0, AT_LEAST_0, "leave out perturbations of fewer cells (0 with a preset of the "
                  "paper, and to prepare)"),
    "split_column": (None, "COLUMN", "obs column that says train, val or test (default: random)"),
    "covariate": ([], "COLUMN", "obs column, such as a donor, that the networks see (ours)")}
LABEL_OPTIONS = list(READING)[:6]

# Labels in the files of others: obs columns, tried in this order where none is named, and labels of
# controls, in any case of letters. Labels are split on request only, but in `condition` also at +:
# "_" joins combinations in one family and numbers the guides of a gene (ZAP70_1) in another.
LABEL_COLUMNS = ["sgID_AB",  # the SAMS-VAE paper's file of Replogle et al.
                 "condition",  # GEARS, CPA, PerturBench
                 "perturbation",  # scPerturb
                 "gene", "target_gene",  # Replogle et al., original; Arc, Virtual Cell Challenge
                 "gene_target", "grna_target", "target_gene_name"]  # Mixscape; sceptre; 10x
CONTROLS = ["control", "ctrl", "NT", "NTC", "*non-targeting*", "non_targeting*", "non targeting*",
            "nontargeting*", "negctrl*", "DMSO", "Vehicle"]
# What guide callers and demultiplexers write where they have no label.
UNASSIGNED = ["", "nan", "none", "<na>", "na", "n/a", "null", "unassigned", "unknown",
              "undetermined", "unmapped", "negative", "ambiguous", "doublet", "doublets",
              "multiplet", "multiplets", "multiple", "multi", "no guide", "no_guide", "noguide"]


@dataclasses.dataclass
class Screen:
    """A perturbation screen: the N cells of a file that can be used, with their dosages."""

    file: H5ad  # that it was read from
    path: str  # its name
    counts: Counts | StoredCounts  # of these cells and of the G genes that are kept
    rows: np.ndarray  # (N,) the cells' positions in the file
    cell_names: np.ndarray  # (N,) str
    gene_names: np.ndarray  # (G,) str
    d: np.ndarray  # (N, P) int64: perturbations of each cell; NONE in free places and controls
    perturbations: list  # the T names that d refers to, sorted
    conditions: np.ndarray  # (N,) str: names of a cell's perturbations, joined; or "control"
    joiner: str  # joins these: "+", or " + " where a perturbation's own name has a +
    c: np.ndarray  # (N, C) int64: covariates, positions in `covariates`; NONE where missing
    covariates: list  # the names of all their values, such as "donor=A"
    label_column: str | None  # the obs column of labels; None where they are one-hot columns
    split: np.ndarray | None  # (N,) "train", "validation", "test", None, by a column of the file
    library: np.ndarray  # (N,) int64: total counts of each cell
    hashes: np.ndarray  # (N,) int64, see `cell_sums`
    notes: list  # lines that say what was chosen and what was dropped

    def obs(self, column):
        """The obs column of the kept cells, (N,). Raises DataError where there is none."""
        return self.file.obs(column)[self.rows]

    def fingerprint(self):
        """A hash of all names, dosages, covariates and counts in order. A trained model belongs to
        one: its parameters are in the order of genes and perturbations, its splits are positions.
        """
        names = "\n".join([*self.gene_names, *self.cell_names, *self.perturbations,
                           *self.covariates])
        digest = hashlib.sha256(names.encode("utf-8", "replace"))
        for array in (self.d, self.hashes, self.c):
            digest.update(array.tobytes())
        return digest.hexdigest()


def read_screen(path, stream=None, genes_of=None, only_controls=False, **options):
    """Read an .h5ad file and turn its labels into dosages. Returns a Screen.

    stream          whether the counts stay in the file; by default if they are large
    genes_of        names (G,) of the genes to keep, in this order; all must be in the file
    only_controls   keep control cells alone, and do not ask for perturbed ones
    options         see READING; what may be repeated is a list, or one text

    Cells without a label or any count of the kept genes are dropped; a note says how many.
    """
    how = reading(options)
    # First names and labels, which say what cells and genes are wanted.
    file = read_h5ad(path, how["layer"])
    notes = [f"{file.found}: {file.shape[0]:,} cells x {file.shape[1]:,} genes"]
    column, sets = read_labels(file, how, notes)
    genes, gene_names = _choose_genes(file, how, genes_of)
    wanted = np.array([names == set() if only_controls else names is not None for names in sets])
    split = _read_split(file, how["split_column"], notes)

    # Then their counts.
    stored = file.counts(wanted, genes, stored=True)
    if stream is None:
        stream = stored.n_bytes > memory() / (3 if file.streams else 1)  # twice while it is read
    require(file.streams or not stream, f"{path}: {file.found}, is not stored cell by cell, as "
            "--stream or its size asks for: python data.py prepare IN.h5ad OUT.h5ad")
    counts = stored if stream else stored.take()
    sums = cell_sums(counts)
    has_counts = sums[0] > 0  # a cell without any says nothing of frequencies; its l_i would be 0
    rows, counts = np.flatnonzero(wanted)[has_counts], counts.without_empty(has_counts)
    library, hashes = sums[:, has_counts]
    if not has_counts.all():
        notes.append(f"dropped {(~has_counts).sum():,} cells without any count")

    d, perturbations, conditions, joiner = _dosages(path, [sets[i] for i in rows])
    is_control = (d == NONE).all(1)
    require(is_control.any() and (only_controls or not is_control.all()), f"{path}: "
            f"{is_control.sum():,} of {len(rows):,} cells with counts and a label are controls; "
            "training needs controls and perturbed cells")
    c, covariates = _read_covariates(file, how["covariate"], rows, is_control, notes)
    n_pairs = len({*conditions[(d != NONE).sum(1) > 1]})
    notes.append(f"{len(rows):,} cells x {len(genes):,} genes kept, {is_control.sum():,} cells are "
                 f"controls; {len(perturbations):,} perturbations, {n_pairs:,} combinations; "
                 f"commonest: {_commonest(conditions, 5)}")
    if file.var_columns and gene_names[0].startswith("ENS"):
        notes.append(f"genes are called {gene_names[0]} and the like: --gene-names COLUMN, if var "
                     f"has a column of symbols ({', '.join(file.var_columns[:8])})")
    deep = library >= 50  # shallower cells may be equal by chance
    n_twice = int(deep.sum()) - len(np.unique(hashes[deep]))
    if n_twice > 0.01 * len(library):
        notes.append(f"warning: {n_twice:,} cells have exactly the counts of another cell: copies "
                     "end up in both train and test: keep one of each")
    low, middle, high = np.quantile(library, [0.1, 0.5, 0.9])
    if high - low < 0.02 * middle:
        notes.append(f"warning: nearly all cells have the same total, {middle:,.0f}, like "
                     "normalised values that were rounded: start from the raw counts")
    return Screen(file, file.path, counts, rows, file.cell_names[rows], gene_names, d,
                  perturbations, conditions, joiner, c, covariates, column,
                  None if split is None else split[rows], library, hashes, notes)


def reading(options):
    """All of READING: what is given, else the default."""
    how = {name: default for name, (default, *_) in READING.items()}
    how |= {name: value for name, value in options.items() if value is not None}
    if how.keys() != READING.keys():
        raise TypeError(f"the options are {', '.join(READING)}")
    return {name: [value] if READING[name][0] == [] and isinstance(value, str) else value
            for name, value in how.items()}


def one_label_per_cell(screen):
    """The same screen with every combination as a perturbation of its own: d (N, 1), as for SVAE+.

    Its perturbations are the names of the conditions other than "control", sorted."""
    names = sorted(set(screen.conditions) - {"control"})
    index = {"control": NONE} | {name: t for t, name in enumerate(names)}
    return dataclasses.replace(screen, perturbations=names,
                               d=np.array([[index[name]] for name in screen.conditions]))


def renumbered(screen, perturbations):
    """The same screen with d as positions in this list, which has all of its perturbations."""
    place = {name: t for t, name in enumerate(perturbations)}
    index = np.array([*(place[name] for name in screen.perturbations), NONE])  # NONE is the last
    return dataclasses.replace(screen, d=index[screen.d], perturbations=list(perturbations))


def interactions_of(screen, k, cells, min_cells):
    """Which perturbations get an effect for which values of covariate column k: pairs [t, v] of
    positions in the screen's perturbations and covariates that at least min_cells of these cells
    (positions) have, if a perturbation has two or more."""
    n = np.zeros((len(screen.perturbations) + 1, len(screen.covariates) + 1), int)
    np.add.at(n, (screen.d[cells], screen.c[cells, k, None]), 1)  # NONE: the last row and column
    enough = n[:-1, :-1] >= max(1, min_cells)
    return np.argwhere(enough & (enough.sum(1, keepdims=True) > 1)).tolist()


def interaction_name(screen, name, v):
    """`NAME @ value` of a perturbation or condition and covariate v, a position."""
    return f"{name} @ {screen.covariates[v].split('=', 1)[1]}"


def with_interactions(screen, k, pairs):
    """The same screen; a cell with perturbation t and value v of covariate column k also has the
    perturbation `interaction_name`, if [t, v] is one of the pairs. d is (N, 2 P)."""
    place = np.full((len(screen.perturbations) + 1, len(screen.covariates) + 1), NONE)
    place[tuple(np.transpose(pairs))] = len(screen.perturbations) + np.arange(len(pairs))
    names = [*screen.perturbations,
             *(interaction_name(screen, screen.perturbations[t], v) for t, v in pairs)]
    return dataclasses.replace(screen, perturbations=names, d=np.concatenate(
        [screen.d, place[screen.d, screen.c[:, k, None]]], axis=1))


def targets(perturbations, gene_names):
    """The gene that each perturbation targets, by its name: a list of positions, or None.

    A perturbation's name, or its first part, is a gene's in any case of letters: KLF1, KLF1_2,
    Klf1|KLF1. The part ends at what is no letter, digit or hyphen."""
    place = {}
    for g, name in enumerate(gene_names):
        place.setdefault(str(name).upper(), g)
    names = [str(name).upper() for name in perturbations]
    return [place.get(name, place.get(re.split("[^A-Z0-9-]", name)[0])) for name in names]


def read_labels(file, how, notes):
    """What each cell of an H5ad received: the obs column that says it, None if one-hot columns do,
    and a list (cells,) of sets of perturbations' names, empty for a control, None for a cell that
    is left out: outside of the subset, without a label, of a rare perturbation."""
    inside = _in_subset(file, how)
    column, labels, meaning = _find_labels(file, inside, how, notes)
    n_cells = collections.Counter(itertools.compress(labels, inside))  # far fewer labels than cells
    missing = collections.Counter({t: n for t, n in n_cells.items() if meaning[t] is None})
    if missing:
        notes.append(f"dropped {missing.total():,} cells whose label is missing or left out: "
                     + _commonest(missing, 8))
    rare, few, dropped = set(), True, 0
    while few:  # the cells of a rare perturbation may leave another one with too few
        n_of = collections.Counter()
        for label, names in meaning.items():
            n_of.update(dict.fromkeys(names or (), n_cells[label]))
        few = {name for name, n in n_of.items() if n < how["min_cells"]}
        rare |= few
        for label, names in meaning.items():
            if names and names & few:
                meaning[label], dropped = None, dropped + n_cells[label]
    if rare:
        notes.append(f"dropped {dropped:,} cells of {len(rare):,} perturbations that have fewer "
                     f"than {how['min_cells']} (--min-cells)")
    return column, [meaning[label] if kept else None for label, kept in zip(labels, inside)]


def _find_labels(file, inside, how, notes):
    """The first obs column that has a control, None for one-hot columns; its labels (cells,); and
    what the labels of the cells `inside` mean, see `_parsed`."""
    prefix, columns = how["one_hot_prefix"], [how["perturbation_column"]]
    if prefix is None and how["perturbation_column"] is None:
        columns = [column for column in LABEL_COLUMNS if column in file.obs_columns]
    controls = how["control"] or (CONTROLS if prefix is None else [""])
    is_control = _matcher(controls, 0 if how["control"] else re.IGNORECASE)
    require(columns, f"{file.path}: no obs column has a well-known name: name one with "
            "--perturbation-column and --control, or 0/1 columns with --one-hot-prefix; obs has "
            f"the columns {', '.join(file.obs_columns[:50])}")
    for column in columns:
        if prefix is not None:
            column, (labels, separator) = None, _one_hot_labels(file, prefix)
        else:
            labels, separator = _texts(file.obs(column)), how["combination_separator"]
            if separator is None:
                separator = "+" if column == "condition" else ""
        different = list(dict.fromkeys(itertools.compress(labels, inside)))
        meaning = _parsed(file.path, different, separator, is_control, how)
        found = [label or "cells without any" for label in different if meaning[label] == set()]
        if found:
            break
    else:
        raise DataError(f"{file.path}: no cell has only {', '.join(map(repr, controls))} in "
                        f"{' or '.join(columns) if prefix is None else f'{prefix}*'}: say what "
                        "controls have with --control (* is any characters, '' no label); the "
                        f"labels are {_commonest(labels, 12)}")
    note = f"labels in obs column {column!r}" if column else f"labels in one-hot columns {prefix}*"
    note += f"; control: {', '.join(found[:3])}" + f" and {len(found) - 3} more" * (len(found) > 3)
    # All that follows depends on whether combinations were recognised, so the note says it.
    joined = [repr(c) for c in "+_|;" if any(c in label for label in different)]
    if separator and column is not None:
        note += f"; combinations are split at {separator!r}"
    elif joined and not separator and not how["label_pattern"]:
        note += (f"; some contain {' and '.join(joined)}, nothing was split (if it joins "
                 "combinations, --combination-separator; if it numbers guides, --label-pattern)")
    notes.append(note)
    return column, labels, meaning


def _texts(values):
    """A column's values as a list of texts, "" where one is missing."""
    # v != v: NaN, the missing value of a column of numbers.
    return ["" if v is None or v != v else str(v).strip() for v in values.tolist()]


def _one_hot_labels(file, prefix):
    """Labels (cells,) that join the names of each cell's 0/1 columns, and what joins them."""
    hot = {}
    for column in file.obs_columns:
        values = file.obs(column).tolist() if column.startswith(prefix) else [""]
        # Columns of text may share the prefix, such as guide_identity in the paper's Norman file.
        if column != prefix and not any(isinstance(v, str) for v in values):
            hot[column.removeprefix(prefix)] = values = np.array(values, float)  # None: NaN
            require(np.isin(values[~np.isnan(values)], (0, 1)).all(),
                    f"{file.path}: obs column {column!r} holds other values than 0 and 1")
    require(hot, f"{file.path}: no column of obs starts with {prefix!r} and holds 0 and 1")
    joiner, names = _joiner(hot), _objects(hot)
    return ["nan" if np.isnan(row).any() else joiner.join(names[row == 1])
            for row in np.stack(list(hot.values()), axis=1)], joiner


def _parsed(path, labels, separator, is_control, how):
    """{label: the perturbations that it names, a frozenset, empty for a control; None if none}.

    `separator` joins perturbations in a label; is_control is a function of a text."""
    is_excluded = _matcher(how["exclude"])
    try:
        pattern = re.compile(how["label_pattern"] or "(.*)", re.DOTALL)
        require(pattern.groups, "no group in parentheses says what names the perturbation")
    except (re.error, DataError) as error:
        raise DataError(f"--label-pattern {how['label_pattern']!r}: {error}") from None
    meaning = {}
    for label in labels:
        parts = [part.strip() for part in label.split(separator)] if separator else [label]
        require(label == "" or all(parts), f"{path}: the label {label!r}, split at {separator!r}, "
                "has an empty part: choose another --combination-separator")
        matches = [pattern.fullmatch(part) for part in parts]
        names = [match and match[1] or part for match, part in zip(matches, parts)]
        words = {label, *parts, *names}
        if any(is_excluded(word) or word.lower() in UNASSIGNED and not is_control(word)
               for word in words):
            meaning[label] = None
        else:  # GENE+ctrl is GENE
            meaning[label] = frozenset(name for part, name in zip(parts, names)
                                       if not is_control(part) and not is_control(name))
    return meaning


def _matcher(patterns, flags=0):
    """A function: is a text one of these patterns, in which * stands for any characters?"""
    words = (".*".join(map(re.escape, pattern.strip().split("*"))) for pattern in patterns)
    return re.compile("|".join(f"(?:{word})" for word in words) or "(?!)", flags).fullmatch


def _joiner(names):
    """What joins these names of perturbations in the name of a combination."""
    return " + " if any("+" in name for name in names) else "+"


def _dosages(path, sets):
    """Each cell's set of perturbations -> d (N, P), the names it refers to, the names of the cells'
    conditions (N,), and what joins names in these."""
    perturbations = sorted(set().union(*sets))
    joiner, has_pairs = _joiner(perturbations), any(len(names) > 1 for names in sets)
    for name in perturbations:  # the names of conditions must tell them apart
        require(name != "control" and not (joiner in name and has_pairs), f"{path}: a perturbation "
                f"is called {name!r}, like the control or a combination: check --control and "
                "--combination-separator, or rename it")
    index = {name: t for t, name in enumerate(perturbations)}
    d = np.full((len(sets), max(map(len, sets), default=0)), NONE)
    for i, names in enumerate(sets):
        d[i, :len(names)] = [index[name] for name in sorted(names)]  # A+B and B+A are the same
    conditions = np.array([joiner.join(sorted(s)) or "control" for s in sets], dtype=object)
    return d, perturbations, conditions, joiner


def _in_subset(file, how):
    """Which cells --subset keeps, (cells,) bool: of each column, any of the values given for it."""
    wanted, chosen = collections.defaultdict(set), np.ones(file.shape[0], bool)
    for text in how["subset"]:
        column, equals, value = text.partition("=")
        require(equals, f"--subset needs COLUMN=VALUE, not {text!r}")
        wanted[column].add(value)
    for column, values in wanted.items():
        found = _texts(file.obs(column))
        chosen &= np.array([value in values for value in found])
        require(chosen.any(), f"{file.path}: no cell of the subset has {sorted(values)[:5]} in "
                f"obs column {column!r}; its values are {_commonest(found, 12)}")
    return chosen


def _choose_genes(file, how, genes_of=None):
    """Positions of the genes that are kept and their names, (G,) each.

    With genes_of, these genes in this order, found by the names asked for, by var's index or by
    another of its columns. Raises DataError where one of them is missing, or there twice."""
    asked, genes = how["gene_column"], np.arange(file.shape[1])
    if not asked and "feature_types" in file.var_columns and (
            "Gene Expression" in _texts(file.var("feature_types"))):  # not guides, say
        asked = "feature_types=Gene Expression"
    if asked:
        column, equals, value = asked.partition("=")
        found = _texts(file.var(column))
        # Booleans, 0 and 1, or, from a table that once was a .csv file, the words.
        genes = np.flatnonzero([v == value if equals else v.lower() in ("true", "1", "1.0")
                                for v in found])
        require(len(genes), f"{file.path}: --gene-column {asked} keeps no gene; its values are "
                + _commonest(found, 5))
    index = file.gene_names[genes]
    names = index if how["gene_names"] is None else _objects(
        name or own for name, own in zip(_texts(file.var(how["gene_names"])[genes]), index))
    if genes_of is None or list(names) == list(genes_of):
        return genes, names
    wrong = genes_of
    for found in (names, index, *(_texts(file.var(column)[genes]) for column in file.var_columns)):
        n, place = collections.Counter(found), dict(zip(found, genes))
        wrong = min(wrong, [name for name in genes_of if n[name] != 1], key=len)
        if not len(wrong):
            return np.array([place[name] for name in genes_of]), _objects(genes_of)
    raise DataError(f"{file.path}: {len(wrong):,} of the {len(genes_of):,} genes wanted are not "
                    f"there, or more than once, such as {', '.join(wrong[:5])} (the file has "
                    f"{', '.join(names[:3])}, ...)")


def _read_covariates(file, columns, rows, is_control, notes):
    """Covariates (N, C) as positions in the names of all values, and these names.

    Raises DataError if no perturbed cell shares its covariates with a control cell: effects in the
    data are compared within covariates."""
    c, names = np.full((len(rows), len(columns)), NONE), []
    for j, column in enumerate(columns):
        found = _objects(_texts(file.obs(column)[rows]))
        missing = found == ""
        values, place = _numbered(found[~missing].tolist())
        require(2 <= len(values) <= min(50, max(2, len(rows) / 10)) and column not in columns[:j],
                f"{file.path}: --covariate {column!r} has {len(values):,} values for {len(rows):,} "
                "cells: different columns are needed, of 2 to 50 values of many cells each")
        c[~missing, j] = len(names) + place
        names += [f"{column}={value}" for value in values]
    if columns:
        stratum = np.unique(c, axis=0, return_inverse=True)[1].ravel()
        compared = np.isin(stratum, stratum[is_control])  # with controls of the same covariates
        require(is_control.all() or (compared & ~is_control).any(), f"{file.path}: no perturbed "
                f"cell has the covariates of a control: leave out --covariate {', '.join(columns)}")
        if not compared.all():
            notes.append(f"warning: {(~compared).sum():,} cells have covariates that no control "
                         "has: effects in the data leave them out")
    return c, names


def unbalanced(screen, given=()):
    """Lines on columns of obs, such as a batch, in which controls and perturbed cells differ:
    differences between batches would be mistaken for effects of perturbations. Columns `given` are
    left out; of a screen with covariates nothing is said, as they may account for the rest.

    They differ if, among values that controls have, the total variation distance is 0.1 above
    chance."""
    notes, perturbed = [], (screen.d != NONE).any(1)
    for column in screen.file.obs_columns if not screen.covariates else ():
        try:
            values, place = _numbered(_texts(screen.obs(column)))
        except DataError:  # a damaged column that nobody asked for
            continue
        if column in given or not 2 <= len(values) <= 50:  # a measurement, a barcode
            continue
        n = np.array([np.bincount(place[cells], minlength=len(values))
                      for cells in (~perturbed, perturbed)])
        n[1, n[0] == 0] = 0
        if n[1].sum() < 0.1 * perturbed.sum():
            continue  # a column that describes perturbations, such as their number
        p = n / n.sum(1, keepdims=True)
        # The mean distance of n cells from their own distribution, were it uniform.
        chance = 0.4 * math.sqrt((len(values) - 1) / n.sum(1).min())
        if np.abs(p[0] - p[1]).sum() / 2 > 0.1 + chance:
            most = np.argmax(np.abs(p[0] - p[1]))
            notes.append(f"warning: {p[0, most]:.0%} of the controls and {p[1, most]:.0%} of the "
                         f"perturbed cells have {column}={values[most]}: if that is no result of "
                         f"perturbations, --covariate {column} compares like with like")
    return notes


def _commonest(values, n):
    """The n commonest texts with their numbers, long ones cut, as one line."""
    counter = collections.Counter(values)
    ranked = sorted(counter, key=lambda label: (-counter[label], label))
    words = [f"{label[:60] or repr('')} ({counter[label]:,})" for label in ranked[:n]]
    return ", ".join(words) + f" and {len(ranked) - n:,} more" * (len(ranked) > n)


# ============================================================================================
# Splits
# ============================================================================================

SPLITS = ("random", "norman-ood", "norman-data-efficiency")
SPLIT_WORDS = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
               "validation": "validation", "test": "test", "ood": "test"}  # in any case of letters


def _read_split(file, column, notes):
    """The part that an obs column puts each cell in, (cells,), None for other words."""
    if not column:
        return None
    found = _texts(file.obs(column))
    split = _objects(SPLIT_WORDS.get(word.lower()) for word in found)
    if "validation" not in split and "ood" in found:  # CPA's: test validates, ood tests
        split[_objects(found) == "test"] = "validation"
        notes.append(f"obs column {column!r} has ood and no validation, as CPA writes it: test is "
                     "for validation, ood for testing")
    require({"train", "test"} <= {*split}, f"{file.path}: obs column {column!r} has no cells for "
            f"training or testing: it says {_commonest(found, 8)}; words: {', '.join(SPLIT_WORDS)}")
    return split


def train_test_split(n, train_size, seed):
    """Positions (train, test) of n cells: scikit-learn's train_test_split(range(n), train_size=..,
    random_state=seed), to the last element, without scikit-learn."""
    n_train = math.floor(train_size * n)
    # The legacy generator, as scikit-learn uses it. Its test part comes first in the permutation.
    shuffled = np.random.RandomState(seed).permutation(n)
    return shuffled[n - n_train:], shuffled[:n - n_train]


def split_cells(screen, seed=0, split="random", train_combinations=1.0):
    """{"train", "validation", "test"}: positions among the screen's kept cells.

    The file's own split where the screen has one; else one of SPLITS, the tasks of the paper (their
    proportions, and what comes first, are from its authors' code):

    random       80 / 20 into rest / test, the rest 80 / 20 into train / validation. Replogle (4.1).
    norman-ood   tests on combinations that were not trained on (4.2). In random order the first
                 train_combinations (a fraction) are for training and validation, the last quarter
                 for testing, and their cells are split as in `random`: so training cells
                 accumulate while the fraction grows, and test cells stay the same.
    norman-data-efficiency   tests on cells of all combinations, split as in `random`, and trains on
                 the first train_combinations (a fraction) of their training cells.

    All other cells, and a file's training cells if it names none for validation, are split 80 / 20
    into training and validation.
    """
    n_perturbed = (screen.d != NONE).sum(1)  # (N,) perturbations of each cell

    def of_80_20(cells):
        """80 % and 20 % of the cells, always by the same seed."""
        first, second = train_test_split(len(cells), 0.8, seed)
        return cells[first], cells[second]

    if screen.split is not None:
        train, validation, test = (np.flatnonzero(screen.split == name)
                                   for name in ("train", "validation", "test"))
        if not len(validation):
            train, validation = of_80_20(train)
    else:
        # The Norman splits test on combinations alone: it is these that are split in three.
        rest, test = of_80_20(np.flatnonzero(n_perturbed > (1 if split != "random" else -1)))
        train, validation = of_80_20(rest)
        if split == "norman-ood":
            # The order starts from sorted labels, which must be spelled as in the paper's file.
            has_labels = "guide_identity" in screen.file.obs_columns
            labels = screen.obs("guide_identity") if has_labels else screen.conditions
            labels = labels.astype(str)
            order = np.unique(labels[n_perturbed > 1])
            np.random.default_rng(seed).shuffle(order)
            n_train, n_test = int(train_combinations * len(order)), math.ceil(0.25 * len(order))
            train, validation = (cells[np.isin(labels[cells], order[:n_train])]
                                 for cells in (train, validation))
            test = test[np.isin(labels[test], order[len(order) - n_test:])]
        elif split == "norman-data-efficiency":
            train = train[:int(train_combinations * len(train))]
        if split != "random":  # controls and single perturbations are never tested on
            more_train, more_validation = of_80_20(np.flatnonzero(n_perturbed <= 1))
            train = np.concatenate([more_train, train])
            validation = np.concatenate([more_validation, validation])
    parts = {"train": train, "validation": validation, "test": test}
    of_train = {"control": train[n_perturbed[train] == 0],
                "perturbed": train[n_perturbed[train] > 0]}
    for name, cells in (parts | of_train).items():
        require(len(cells), f"{screen.path}: no {name} cells are left to split "
                f"({len(screen.rows):,} cells in all, {len(train):,} for training)")
    return parts


# ============================================================================================
# Batches: of a screen that lies on the device, in memory or in its file
# ============================================================================================

PIECE = 2**16  # cells that are on the device at once where the whole screen is not, at most
STRIP = 64  # neighbours in a file that are read together


def memory():
    """Bytes of memory of the machine, or of its container."""
    limit = 2**63
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(ValueError, OSError), open("/sys/fs/cgroup/memory.max") as file:
        limit = min(limit, int(file.read()))
    return limit


def _tensor(array, device):
    """A numpy array of counts or indices as a tensor on the device, in the narrowest integer type:
    torch hardly computes with unsigned types wider than uint8, so these become signed ones."""
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        size = array.dtype.itemsize
        fits = array.max(initial=0) <= np.iinfo(f"i{size}").max
        array = array.view(f"i{size}") if fits else array.astype(f"i{2 * size}")
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def dense_rows(values, columns, indptr, longest, cells, n_genes):
    """Counts.dense on a GPU, of its three arrays as tensors; longest is arange(entries of the
    longest row). Returns (B, G) floats.

    Every row is read as if it were the longest, and padding lands in an extra column that is
    dropped: with fixed shapes the GPU need not tell the host how many entries there are.
    """
    start, end = indptr[cells, None], indptr[cells + 1, None]  # (B, 1)
    entry = start + longest  # (B, longest)
    inside = entry < end
    entry = torch.where(inside, entry, 0)
    column = torch.where(inside, columns[entry].long(), n_genes)
    x = torch.zeros(len(cells), n_genes + 1, device=values.device)
    x.scatter_(1, column, values[entry].float())
    return x[:, :-1].contiguous()


class Batches:
    """Batches x (B, G), d (B, P), c (B, C) of a screen's cells, which are positions 0..N-1.

    Counts lie on the device sparse, as integers, and become dense floats batch by batch. Where they
    do not fit there, they go there in pieces, from memory or from the file (StoredCounts), each
    made in a thread while the one before it is in use.

    whole     the one piece that has all cells; None where there are several
    n_piece   cells of a piece: all, or at most PIECE and about 1 GB of counts, a multiple of 512
    where     in words, where the counts lie
    """

    def __init__(self, screen, device="cpu"):
        self.counts, self.device = screen.counts, torch.device(device)
        self.n_genes, self.labels = self.counts.shape[1], [screen.d, screen.c]
        self.from_file, n_bytes = isinstance(self.counts, StoredCounts), self.counts.n_bytes
        fits, self.where = not self.from_file, "in the file" if self.from_file else "in memory"
        if self.device.type == "cuda":
            self.copying = torch.cuda.Stream(self.device)  # one: each keeps memory of its own
            torch.cuda.empty_cache()  # frees the memory of any earlier screen
            fits = fits and n_bytes < 0.6 * torch.cuda.mem_get_info(self.device)[0]
            self.where = f"on {self.device}" if fits else self.where
        self.where += f" ({n_bytes / 1e6:,.1f} MB)"
        self.whole = self._piece(self.counts, self.labels) if fits else None
        n_cells = max(1, self.counts.shape[0])
        self.n_piece = n_cells if fits else min(
            PIECE, max(1, 2**21 * n_cells // max(1, n_bytes)) * 512)

    def __call__(self, cells):
        """The batch of these cells, (B,) positions, a numpy array."""
        return self._batch(*self._load(cells))

    def in_order(self, cells, size=512):
        """All the given cells (a numpy array) once, in batches of at most `size`."""
        return self.stream(self.cut(cells), size)

    def cut(self, order, start=0):
        """order[start:] (an array of cells) in pieces to be loaded: always at the same places."""
        for a in range(start - start % self.n_piece, len(order), self.n_piece):
            yield order[max(a, start):a + self.n_piece]

    def stream(self, pieces, size):
        """Batches of `size` cells from an iterator of arrays of cells, each to be loaded at once. A
        batch may begin in one of them and end in another; the last may be smaller."""
        loaded = map(self._load, pieces)
        parts, missing = [], size
        for piece, places in ahead(loaded) if self.whole is None else loaded:
            while len(places):
                parts.append(self._batch(piece, places[:missing]))
                places, missing = places[missing:], missing - len(parts[-1][0])
                if not missing:
                    yield parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts)))
                    parts, missing = [], size
        if parts:
            yield tuple(map(torch.cat, zip(*parts)))

    def _load(self, cells):
        """A piece that has these cells, and a tensor (B,) of where each is in it."""
        if self.whole is not None:
            return self.whole, torch.from_numpy(cells).to(self.device)
        rising, places = np.unique(cells, return_inverse=True)
        counts, labels = self.counts.take(rising), [v[rising] for v in self.labels]
        if self.device.type == "cpu":
            return self._piece(counts, labels), torch.from_numpy(places)
        # Copied beside the computation that is under way, which need not wait for it.
        with torch.cuda.stream(self.copying):
            piece, places = self._piece(counts, labels), _tensor(places, self.device)
            for tensor in (places, *piece[0], *piece[1:]):
                # This memory must not be used anew before the batches from it are done.
                tensor.record_stream(torch.cuda.default_stream(self.device))
            self.copying.synchronize()
        return piece, places

    def _piece(self, counts, labels):
        """Cells on the device: their counts (on a GPU what `dense_rows` takes), d and c."""
        labels = [_tensor(v, self.device) for v in labels]
        if self.device.type != "cpu":
            longest = torch.arange(int(np.diff(counts.indptr).max(initial=0)), device=self.device)
            counts = [*(_tensor(v, self.device) for v in (
                counts.values, counts.columns, counts.indptr)), longest]
        return counts, *labels

    def _batch(self, piece, cells):
        """x, d, c of some cells of a piece, a tensor (B,) of positions in it."""
        counts, d, c = piece
        if self.device.type == "cpu":  # a loop over rows is two to four times as fast there
            x = torch.from_numpy(counts.dense(cells.numpy()).astype(np.float32))
        else:
            x = dense_rows(*counts, cells, self.n_genes)
        return x, d[cells], c[cells]


class Shuffle:
    """Endless random batches of the given cells: every epoch visits each once, in a new order.

    cells (n,) positions. All batches have the same size; one that reaches the end of an epoch goes
    on in the next. Epoch and position say where it is.

    From a file, an epoch takes strips of 64 neighbours (cells must rise) in random order, and
    shuffles the cells of each piece. In a file sorted by perturbation, the number of a
    perturbation's cells in a batch then has 1 + 64 size / n_piece times the variance that it has in
    random order: 1.5 in batches of 512 from pieces of 65,536 cells.
    """

    def __init__(self, batches, cells, size, seed, epoch=0, position=0):
        self.batches, self.cells, self.size, self.seed = batches, cells, size, seed
        self.epoch, self.position = epoch, position
        self.stream = batches.stream(self._pieces(epoch, position), size)

    def order(self, epoch):
        """The cells in the order of this epoch, which follows from seed and epoch alone."""
        rng, n = np.random.default_rng((self.seed, epoch)), len(self.cells)
        if not self.batches.from_file:
            return rng.permutation(self.cells)
        strips = rng.permutation(-(-n // STRIP))[:, None]
        order = (strips * STRIP + np.arange(STRIP)).ravel()
        order = order[order < n]  # the last strip may be shorter
        for piece in self.batches.cut(order):
            rng.shuffle(piece)  # a view of order
        return self.cells[order]

    def _pieces(self, epoch, start):
        """The cells in the order in which they are needed, a piece at a time."""
        while True:
            yield from self.batches.cut(self.order(epoch), start)
            epoch, start = epoch + 1, 0

    def __next__(self):
        batch = next(self.stream)
        epochs, self.position = divmod(self.position + self.size, len(self.cells))
        self.epoch += epochs
        return batch


def training_statistics(batches, cells):
    """Of these cells, by gene, (G,) each: mean and standard deviation of log(1 + x), which the
    encoder standardises by; log frequency f and log inverse dispersion theta, for `start_from`.

    By the likelihood of 2.2 without latents, x ~ NB(mean l f, theta): f is the gene's part of all
    counts (half a count is added to each gene), and theta is such that the variance beyond Poisson
    adds up, sum (x - l f)^2 - l f = sum (l f)^2 / theta, between exp(-8) and exp(6).

    One pass, in double precision. The squares are summed around the mean of a batch and merged: a
    mean of squares minus a squared mean would lose digits.
    """
    n = mean = squares = x1 = x2 = l1 = l2 = lx = 0.0
    for x, _, _ in batches.in_order(cells):
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
    sparse_shift=True, perturbations=100, cells=375, effect=5.0, pairs=0, n_latent=15, n_genes=100,
    n_controls=375)


def simulate(path, seed=0, perturbations=500, cells=25, pairs=60, effect=4.0, batch=0.0,
             contexts=0, sparse_shift=False, n_latent=6, n_genes=200, n_controls=100, library=5000):
    """Simulate a screen from the SAMS-VAE process (Algorithm 1) and write it as an .h5ad file.

    Each perturbation alone and random pairs of them, `cells` of each, and n_controls controls.
    Every perturbation touches one latent dimension, and each further one with probability 0.05;
    effects are +-N(effect, 0.5). Two-layer decoder, Gamma-Poisson counts with inverse dispersion
    10, library sizes log-normal around `library`. Half of the pairs are held out: all their cells
    are in `split` test, the others 64/16/20 in train, validation and test. cells and effect may be
    arrays, (perturbations + pairs,) and (perturbations,). With batch > 0 there are two batches, obs
    `batch`: the second, of three in four controls and of half of the perturbed cells, adds
    N(0, batch^2) to the log frequency of each gene. With contexts > 0 each cell is in one of these,
    obs `context`, which adds N(0, 0.3^2) likewise, and every other perturbation has one more mask
    and effect in each, called `P002 @ 0` and so on.

    sparse_shift is the process of the SVAE+ paper: 1 to 3 latent dimensions of a perturbation,
    drawn with replacement; 2/3 to 4/3 of `cells`; four orthonormal layers, logits of standard
    deviation 1; Poisson counts of frequencies normalised over cells, as in its authors' code.

    Beside the counts are written: obs `condition` and `split`; obsm `X_true_z`, `X_true_z_basal`,
    the latent states (N, L); uns `simulation`, the true `mask` and `effect` (T, L) and the decoder
    (`decode`); uns `pathways`, each of ten or more perturbations that share a mask.

    There are many perturbations of few cells, since only the sparsity of masks says which latent
    axes are true, and an entry of 1 costs log(1 / alpha) nats however many cells there are.
    """
    rng = np.random.default_rng(seed)
    names = [f"P{t + 1:03d}" for t in range(perturbations)]
    size = np.broadcast_to(effect, perturbations)
    mask, effect = _random_effects(rng, perturbations, n_latent, size, sparse_shift)
    d, held_out = _random_conditions(rng, perturbations, pairs, cells, n_controls, sparse_shift)
    received, obs = d, {}
    if contexts:
        obs["context"] = context = rng.integers(contexts, size=len(d))
        names += [f"{name} @ {v}" for name in names for v in range(contexts)]
        received, *more = _in_contexts(rng, d, context, contexts, size, n_latent, sparse_shift)
        mask, effect = map(np.concatenate, zip((mask, effect), more))
    offset = np.concatenate([mask * effect, np.zeros((1, n_latent))])  # the last row is NONE's
    z_basal = rng.normal(size=(len(d), n_latent))
    z = z_basal + offset[received].sum(axis=1)  # eq. 1
    decoder = _random_decoder(rng, z, n_genes, sparse_shift)
    logits = decode(z, decoder)
    if contexts:
        logits = logits + rng.normal(0, 0.3, (contexts, n_genes))[context]
    if batch:
        in_second = rng.random((len(d), 1)) < np.where(d == NONE, 0.75, 0.5).min(1, keepdims=True)
        logits = logits + in_second * rng.normal(0, batch, n_genes)
        obs["batch"] = in_second[:, 0].astype(int)
    x = _random_counts(rng, logits, library, sparse_shift)
    split = rng.choice(["train", "validation", "test"], len(d), p=[0.64, 0.16, 0.2])

    layers = {f"{name}_{i + 1}": value for i, layer in enumerate(decoder)
              for name, value in zip(("weight", "bias"), layer)}
    write_h5ad(
        path, X=x.astype(np.uint16 if x.max() < 2**16 else np.uint32),
        obs={"cell": [f"cell{i}" for i in range(len(d))],
             "condition": ["+".join(names[t] for t in row if t != NONE) or "control" for row in d],
             "split": np.where(held_out, "test", split).astype(object)} | obs,
        var={"gene": [f"G{g + 1:03d}" for g in range(n_genes)]},
        obsm={"X_true_z": z, "X_true_z_basal": z_basal},
        uns={"simulation": {"perturbations": names, "mask": mask, "effect": effect} | layers,
             "pathways": _pathways_of_masks(names[:perturbations], mask[:perturbations])})


def _pathways_of_masks(names, mask):
    """{pathway: names} of each ten or more perturbations that share a mask, (T, L)."""
    pathways = {}
    for row in np.unique(mask, axis=0):
        members = [name for name, same in zip(names, (mask == row).all(1)) if same]
        if len(members) >= 10:
            pathways["latent " + " and ".join(map(str, np.flatnonzero(row) + 1))] = members
    return pathways


def _random_effects(rng, n_perturbations, n_latent, effect, sparse_shift):
    """The masks m_t, bool, and effects e_t of a simulation, (T, L) each."""
    mask = np.zeros((n_perturbations, n_latent), bool)
    if sparse_shift:
        n_targets = rng.integers(1, 4, n_perturbations)
        for i in range(3):
            t = np.flatnonzero(n_targets > i)
            mask[t, rng.integers(n_latent, size=len(t))] = True
    else:  # the second line gives every perturbation its one sure dimension
        mask |= rng.random(mask.shape) < 0.05
        mask[np.arange(n_perturbations), rng.integers(n_latent, size=n_perturbations)] = True
    size = np.broadcast_to(effect, n_perturbations)[:, None]
    return mask, rng.choice([-1, 1], mask.shape) * rng.normal(size, 0.5, mask.shape)


def _in_contexts(rng, d, context, n_contexts, size, n_latent, sparse_shift):
    """With a context for each cell (N,): d (N, 2 P), of perturbations and of these in the context,
    and masks and effects of the latter, of every other perturbation."""
    n = len(size) * n_contexts
    mask, effect = _random_effects(rng, n, n_latent, np.repeat(size, n_contexts), sparse_shift)
    mask[np.arange(n) // n_contexts % 2 == 0] = False
    further = np.where(d == NONE, NONE, len(size) + d * n_contexts + context[:, None])
    return np.concatenate([d, further], axis=1), mask, effect


def _random_conditions(rng, n_perturbations, n_pairs, cells, n_controls, sparse_shift):
    """Of a simulation's cells, in random order: d (N, 2), and which are of held-out pairs (N,)."""
    all_pairs = np.stack(np.triu_indices(n_perturbations, 1), axis=1)
    n_pairs = min(n_pairs, len(all_pairs))
    pairs = all_pairs[np.sort(rng.choice(len(all_pairs), n_pairs, replace=False))]
    singles = np.stack([np.arange(n_perturbations), np.full(n_perturbations, NONE)], axis=1)
    conditions = np.concatenate([singles, pairs])
    cells = np.broadcast_to(cells, len(conditions))
    if sparse_shift:
        cells = rng.integers(-(-2 * cells // 3), 4 * cells // 3 + 1)
    held_out = np.append(np.zeros(n_perturbations, bool), rng.permutation(n_pairs) < n_pairs // 2)
    d = np.concatenate([np.full((n_controls, 2), NONE), np.repeat(conditions, cells, axis=0)])
    held_out = np.append(np.zeros(n_controls, bool), np.repeat(held_out, cells))
    order = rng.permutation(len(d))
    return d[order], held_out[order]


def _random_decoder(rng, z, n_genes, sparse_shift):
    """The layers [(weight, bias), ...] of a simulation, for latent states z (N, L)."""
    n_latent = z.shape[1]
    if not sparse_shift:
        return [(rng.normal(0, scale / np.sqrt(n_in), (n_in, n_out)), rng.normal(size=n_out))
                for n_in, n_out, scale in ((n_latent, 64, 1.5), (64, n_genes, 0.6))]
    layers = []
    for n_in, n_out in itertools.pairwise([n_latent, 40, 40, 40, n_genes]):
        q, _ = np.linalg.qr(rng.normal(size=(max(n_in, n_out), min(n_in, n_out))))
        scale = math.sqrt(2 / (1 + 0.2**2) * 2 / (n_in + n_out))
        layers.append((scale * (q if n_in > n_out else q.T), np.zeros(n_out)))
    layers[-1] = layers[-1][0] / decode(z, layers).std(), layers[-1][1]
    return layers


def decode(z, decoder):
    """Logits (N, G) of latent states z (N, L) by the layers [(weight, bias), ...] of a simulation:
    linear maps, with leaky ReLU of slope 0.2 between them."""
    for i, (weight, bias) in enumerate(decoder):
        z = np.where(z > 0, z, 0.2 * z) if i else z
        z = z @ weight + bias
    return z


def _random_counts(rng, logits, library, sparse_shift):
    """Counts x (N, G) of a simulation (2.2)."""
    over = 0 if sparse_shift else 1  # softmax
    rho = np.exp(logits - logits.max(axis=over, keepdims=True))
    rho /= rho.sum(axis=over, keepdims=True)
    if sparse_shift:
        return rng.poisson(1e6 * rho)
    library = rng.lognormal(np.log(library), 0.3, (len(logits), 1))
    # Gamma noise of mean 1 and shape theta = 10 makes Poisson counts negative binomial ones.
    return rng.poisson(library * rho * rng.gamma(10, 1 / 10, rho.shape))


def read_simulation(path):
    """(names of the T perturbations, true mask (T, L) bool, true effect (T, L), true z and z_basal
    (cells, L)) of a simulated screen; None for other files."""
    with _h5_file(path) as file:
        if _member(file, "obsm/X_true_z_basal", required=False) is None:
            return None
        mask, *others = (_member(file, name)[()] for name in (
            "uns/simulation/mask", "uns/simulation/effect", "obsm/X_true_z", "obsm/X_true_z_basal"))
        return list(_read(file, "uns/simulation/perturbations")), mask.astype(bool), *others


def read_layers(path):
    """{layer: array (obs x var)} of a file that write_h5ad wrote, such as predictions."""
    with _h5_file(path) as file:
        return {name: _member(file, f"layers/{name}")[()]
                for name in _keys(_member(file, "layers"))}


def read_pathways(path):
    """{pathway: list of its genes} of uns/pathways, or of a .json file; None if there is none."""
    if os.fspath(path).endswith(".json"):
        try:
            with open(path, encoding="utf-8") as file:
                pathways = json.load(file)
            # Either the pathways themselves, or an object that has them beside its source, say.
            pathways = pathways.get("pathways", pathways)
            require(all(isinstance(genes, list) for genes in pathways.values()), "no lists")
        except (OSError, ValueError, AttributeError) as error:  # among these is DataError
            raise DataError(f"{path}: is no JSON object of pathways, each a list of genes: "
                            f"{error}") from None
        return pathways
    with _h5_file(path) as file:
        group = _member(file, "uns/pathways", required=False)
        return {name: [str(gene) for gene in _read(file, f"uns/pathways/{name}")]
                for name in _keys(group)} if isinstance(group, h5py.Group) else None


# ============================================================================================
# prepare: write the wanted part of a large file, sparse
# ============================================================================================

# Replogle et al. 2022 as in the paper (4.1), whose text has 118,461 cells; here 118,641 are left,
# with 1,187 genes and 722 perturbations. Targets and genes are listed in a file beside this one;
# the controls are those that the authors' code draws.
RECIPES = {"replogle-filtered": dict(
    perturbation_column="sgID_AB", control=["*non-targeting*"], gene_names="gene_name")}
RECIPE_FILE = "replogle_filtered.json"


def prepare(path, out, genes=None, controls=None, seed=0, recipe=None, **options):
    """Write some cells and genes of an .h5ad file of any size to another, counts sparse by rows.

    genes       a text file with the names of the genes to keep, one a line
    controls    at most so many control cells, drawn by numpy's legacy generator from `seed`
    recipe      one of RECIPES, in place of all other options
    options     as in `read_screen`; labels are read if an option asks for them

    Cells and genes keep their order and all their columns. A matrix by columns is read into memory.
    """
    lists = {}
    if recipe is not None:
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), RECIPE_FILE)) as lines:
            lists = json.load(lines)
        controls, seed, options = 2000, 0, RECIPES[recipe] | {
            "subset": [f"gene={name}" for name in [*lists["perturbation_genes"], "non-targeting"]]}
    elif genes is not None:
        with open(genes, encoding="utf-8", errors="replace") as lines:
            lists = {"measured_gene_names": list(filter(None, map(str.strip, lines)))}
    how = reading(options)
    file = read_h5ad(path, how["layer"])
    notes = [f"{file.found}: {file.shape[0]:,} cells x {file.shape[1]:,} genes"]

    if controls is not None or any(how[name] for name in [*LABEL_OPTIONS, "min_cells"]):
        _, sets = read_labels(file, how, notes)
        is_control = np.array([names == set() for names in sets])
        drawn = np.random.RandomState(seed).permutation(is_control.sum())[:controls]
        rows = np.union1d(np.flatnonzero([bool(names) for names in sets]),
                          np.flatnonzero(is_control)[drawn])
    else:
        rows = np.flatnonzero(_in_subset(file, how))
    places, names = _choose_genes(file, how)
    if lists:
        listed = set(lists["measured_gene_names"])
        missing = sorted(listed - set(names))
        places = places[[name in listed for name in names]]
        notes.append(
            f"{len(listed) - len(missing):,} of the {len(listed):,} listed genes are there, where "
            f"genes are called {', '.join(names[:3])}; missing: {', '.join(missing[:5]) or 'none'}")
    require(len(rows) and len(places), f"{path}: no {'gene' if len(rows) else 'cell'} is left: "
            + "; ".join(notes))
    say(path, *notes)

    write_h5ad(
        out, X=file.counts(rows, places, stored=True).parts(),
        obs={free("_index", file.obs_columns): file.cell_names[rows]} | {
            column: lambda column=column: file.obs(column)[rows] for column in file.obs_columns},
        var={free("_index", file.var_columns): file.gene_names[places]} | {
            column: lambda column=column: file.var(column)[places] for column in file.var_columns},
        uns={"pathways": lists.get("pathways") or read_pathways(path) or {}})
    print(f"{out}: {len(rows):,} cells, {len(places):,} genes")


# ============================================================================================
# The command line
# ============================================================================================

_default = {name: p.default for name, p in inspect.signature(simulate).parameters.items()}
SIMULATION_OPTIONS = [(f"--{name.replace('_', '-')}", _default[name], allowed, text)
                      for name, allowed, text in (
    ("sparse_shift", bool, "its process and its other defaults are those of Lopez et al. (2023)"),
    ("perturbations", (2, 2**32 - 1, "at least 2 and below 2^32"), "its perturbations"),
    ("cells", AT_LEAST_1, "its cells per perturbation and pair"),
    ("pairs", AT_LEAST_0, "its pairs; half of them are held out of training"),
    ("effect", AT_LEAST_0, "size of its effects, in sd of the basal state"),
    ("batch", AT_LEAST_0, "sd of what its second batch (obs column batch) adds to log frequencies, "
     "0 for one batch"),
    ("contexts", AT_LEAST_0, "contexts (obs column context); in each, every other perturbation has "
     "one more effect; 0 for none"),
    ("seed", AT_LEAST_0, "its seed"))]


def add_screen_options(parser, training=True):
    """The options of READING; if not training, without the ones that only training uses."""
    add_options(parser.add_argument_group("reading the file"), [
        (f"--{name.replace('_', '-')}", MIN_CELLS if name == "min_cells" else default, *row)
        for name, (default, *row) in READING.items()
        if training or name not in ("split_column", "covariate")])


def add_options(parser, rows):
    """Add options given as (--name, default, what is allowed, text): bool for a switch, a list of
    words, (least, largest, the same in words), or a placeholder where any text is; [] for an option
    that may be repeated. One that is not given is absent from the result."""
    for flag, default, allowed, text in rows:
        if allowed is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(allowed, str):
            how = {"metavar": allowed, "action": "append" if default == [] else "store"}
        elif isinstance(allowed[0], str):
            how = {"choices": allowed}
        else:
            how = {"type": number_within(int if default is None else type(default), *allowed)}
        text += {"[]": "; may be repeated", "None": ""}.get(str(default), f" [{default}]")
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


OUT_OF_MEMORY = "MemoryError|out of memory|allocate|(multiplic|calcul)ation overflow"


def run(main):
    """Run a command; what is wrong with a file, an option or the machine becomes one sentence on
    standard error and exit status 2."""
    try:
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
        main()
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
        if not re.search(OUT_OF_MEMORY, repr(error)):  # which torch calls a RuntimeError
            raise
        problem = ("not enough memory: a smaller model, fewer particles, cells in a batch or genes "
                   "take less")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def main_of_prepare(arguments):
    """The command line of `prepare`."""
    parser = argparse.ArgumentParser(
        prog="data.py prepare", allow_abbrev=False, description="Write some cells and genes of an "
        ".h5ad file of any size to another one: X sparse by rows, in the narrowest integer type "
        "(cast before computing), all columns of obs and var, and uns/pathways. An option about "
        "labels (--controls, --min-cells, --exclude and the like) leaves out cells without one.")
    parser.add_argument("path", metavar="IN.h5ad")
    parser.add_argument("out", metavar="OUT.h5ad")
    add_options(parser, [
        ("--recipe", None, list(RECIPES), "the paper's cells and genes, in place of what follows"),
        ("--genes", None, "FILE", "the genes to keep, a name a line"),
        ("--controls", None, AT_LEAST_1, "keep at most so many control cells"),
        ("--seed", 0, AT_LEAST_0, "which ones")])
    add_screen_options(parser, training=False)
    args = parser.parse_args(arguments)
    require(not os.path.exists(args.out) or not os.path.samefile(args.path, args.out),
            f"{args.out} is the file that is read: choose another name")
    prepare(**vars(args))


def main_of_simulate(arguments):
    """The command line of `simulate`."""
    parser = argparse.ArgumentParser(
        prog="data.py simulate", allow_abbrev=False, description="Write a simulated screen, and "
        "the truth with it: train.py without --data makes the same. A file that is there is "
        "replaced.")
    parser.add_argument("path", metavar="OUT.h5ad")
    add_options(parser, SIMULATION_OPTIONS)
    options = vars(parser.parse_args(arguments))
    simulate(**(SPARSE_SHIFT if options.get("sparse_shift") else {}) | options)
    print(f"{options['path']}: the split is obs column split, and the truth is in obsm/X_true_z "
          "and uns/simulation")


def main(arguments=None):
    """Print what the reader makes of a file, or prepare or simulate another one."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"prepare": main_of_prepare, "simulate": main_of_simulate}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    parser = argparse.ArgumentParser(
        prog="data.py", allow_abbrev=False, description="Print what the reader makes of an .h5ad "
        "file. (python data.py prepare --help: write some of its cells and genes to another; "
        "python data.py simulate --help: a simulated screen.)")
    parser.add_argument("path", metavar="FILE.h5ad")
    add_screen_options(parser)
    options = {"min_cells": MIN_CELLS} | vars(parser.parse_args(arguments))
    screen = read_screen(**options)
    say(screen.path, *screen.notes,
        *unbalanced(screen, [screen.label_column, options.get("split_column")]))
    sizes = {name: len(cells) for name, cells in split_cells(screen).items()}
    print("  split: " + ", ".join(f"{n:,} {name}" for name, n in sizes.items()))


if __name__ == "__main__":
    run(main)
