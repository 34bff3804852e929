"""From an .h5ad file to what the model is trained on; from a simulation to an .h5ad file.

    python data.py FILE.h5ad                                  what the reader makes of a file
    python data.py FILE.h5ad --perturbation-column gene --control non-targeting

In reading order: opening a file that may be damaged or hostile; columns; counts; `read_h5ad`;
labels -> dosages (`read_screen`); splits; batches; the writer; `simulate`; the command line.

`read_h5ad` and all above it use h5py and numpy alone: copy them. They read the files of anndata 0.5
to 0.13, never import anndata, never unpickle, and follow no link out of the file. All that is wrong
with a file or an option is raised as a DataError, one sentence for the user.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import sys

import h5py
import numpy as np
import torch

NONE = -1  # fills the free places of a row of dosages, as in sams_vae.py
BLOCK = 2**20  # values per block of a streaming pass: small enough for the caches
COUNT_TYPES = [np.dtype(t) for t in (np.uint8, np.uint16, np.uint32, np.uint64)]


class DataError(ValueError):
    """What is wrong with a file or an option, and what to do: one sentence for the user."""


class NotCounts(DataError):
    """A matrix that could be read, but whose values are not counts."""


class NoControl(DataError):
    """A column that could be read, but in which no cell is a control."""


# ============================================================================================
# Opening a file that may be damaged or hostile
# ============================================================================================


@contextlib.contextmanager
def _h5_file(path):
    """Open an .h5ad file to read; every failure inside becomes a DataError that names the file."""
    path = os.fspath(path)
    try:
        if os.path.isdir(path):
            raise DataError("is a folder; an .h5ad file was expected")
        with open(path, "rb") as file:
            head = file.read(8)
        if not head:
            raise DataError("is empty")
        if head.startswith(b"\x1f\x8b"):
            raise DataError("is compressed as a whole; unpack it first: gunzip FILE.gz")
        if not h5py.is_hdf5(path):
            raise DataError(f"is not an HDF5 file, it starts with {head!r}")
        with h5py.File(path, "r") as file:
            top = _keys(file)
            if "obs" not in top and "matrix" in top:
                raise DataError("looks like a 10x .h5 matrix, which has no labels: read it with "
                                "scanpy.read_10x_h5, add the labels to obs and save it as .h5ad")
            if "mod" in top and "X" not in top:
                raise DataError("looks like an .h5mu file of several modalities: save the RNA "
                                "modality on its own, mdata['rna'].write('rna.h5ad')")
            yield file
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
    while parts:
        part = parts.pop(0)
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if isinstance(link, h5py.HardLink):
            node = node[part]
        elif isinstance(link, h5py.SoftLink):
            followed += 1
            if followed > 32:
                raise DataError(f"{name} is a loop of soft links")
            node = file if link.path.startswith("/") else node
            parts = [p for p in link.path.split("/") if p not in ("", ".")] + parts
        elif link is not None:
            raise DataError(f"{name} is a link out of the file, which is not followed: "
                            "copy the data into the file")
        elif followed:
            raise DataError(f"{name} is a soft link to something that is not in the file")
        elif required:
            present = _keys(node) if isinstance(node, h5py.Group) else []
            raise DataError(f"{name} is missing; beside it: {', '.join(present[:20]) or 'nothing'}")
        else:
            return None
    if isinstance(node, h5py.Dataset):
        _check_storage(file, name, node)
    elif not isinstance(node, h5py.Group):
        raise DataError(f"{name} is neither a group nor a data set")
    return node


def _check_storage(file, name, dataset):
    """Refuse a data set of a larger size than the file holds, before anything is allocated."""
    if dataset.is_virtual or dataset.external:
        raise DataError(f"{name} keeps its values in other files: copy the data into the file")
    if dataset.shape is None:
        raise DataError(f"{name} is a data set without values")
    creation = dataset.id.get_create_plist()
    declared = math.prod(dataset.shape) * dataset.id.get_type().get_size()
    stored = dataset.id.get_storage_size()
    if declared == 0:
        return
    if dataset.chunks:
        grid = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks))
        # Deflate cannot compress better than 1032 : 1.
        least = declared / 1100 if creation.get_nfilters() else declared
        complete = stored >= least and dataset.id.get_num_chunks() >= grid
    elif creation.get_layout() == h5py.h5d.CONTIGUOUS:
        offset = dataset.id.get_offset()
        complete = offset is not None and offset + declared <= file.id.get_filesize()
        stored = stored if complete else 0
    else:
        complete = stored >= declared
    if not complete:
        raise DataError(f"{name} declares {dataset.shape} values of {dataset.dtype}, {declared:,} "
                        f"bytes, and the file does not hold them ({stored:,} bytes stored): "
                        "it is truncated or was never finished")


def _keys(group):
    """Names of a group's members, sorted; names that are not UTF-8 are left out."""
    return sorted(name for name in group if isinstance(name, str))


def _attribute(node, name):
    """An attribute, decoded where it is bytes; None where there is none."""
    value = node.attrs.get(name)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


# ============================================================================================
# Columns of obs and var: all the ways in which anndata has written them
# ============================================================================================


def _objects(values):
    """Any values -> a 1-D array of objects; the None keeps numpy from guessing another type."""
    return np.array([*values, None], dtype=object)[:-1]


def _to_numpy(name, raw):
    """What h5py reads -> a 1-D array of str objects, native numbers or bools."""
    raw = np.atleast_1d(raw)
    if raw.ndim != 1:
        raise DataError(f"{name} has {raw.ndim} dimensions; a column has one")
    if raw.dtype.kind in "OS":
        if not all(isinstance(v, (bytes, str)) for v in raw):
            raise DataError(f"{name} holds values that are neither text nor numbers")
        text = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in raw.tolist()]
        return _objects(text)
    if raw.dtype.kind not in "biuf":
        raise DataError(f"{name} holds values of type {raw.dtype}, neither text nor numbers")
    return raw.astype(raw.dtype.newbyteorder("="), copy=False)


def _with_missing(values, missing):
    """Values with None where `missing` is true; unchanged if it is true nowhere."""
    if missing.any():
        values = values.astype(object)
        values[missing] = None
    return values


def _plain(file, name):
    """A data set of text or numbers."""
    node = _member(file, name)
    if not isinstance(node, h5py.Dataset):
        raise DataError(f"{name} is a group where a data set was expected")
    if _attribute(node, "encoding-type") not in (None, "array", "string-array", "string"):
        raise DataError(f"{name} has the unknown encoding {_attribute(node, 'encoding-type')!r}")
    return _to_numpy(name, node[()])


def _plain_or_nullable(file, name):
    """A data set, or a group of `values` and a `mask` that is true where a value is missing."""
    node = _member(file, name)
    if isinstance(node, h5py.Dataset):
        return _plain(file, name)
    encoding = _attribute(node, "encoding-type")
    known = (None, "nullable-integer", "nullable-boolean", "nullable-string-array")
    if encoding not in known or "values" not in node or "mask" not in node:
        raise DataError(f"{name} has the unknown encoding {encoding!r}")
    values, mask = _plain(file, f"{name}/values"), _plain(file, f"{name}/mask")
    if len(mask) != len(values):
        raise DataError(f"{name} has {len(values)} values and a mask of {len(mask)}")
    return _with_missing(values, mask.astype(bool))


def _decode(name, codes, categories):
    """A categorical column: categories[codes], None where the code is -1."""
    if codes.dtype.kind not in "iu":
        raise DataError(f"{name} has category codes of type {codes.dtype}; integers were expected")
    codes = codes.astype(np.int64)
    wrong = np.flatnonzero((codes < -1) | (codes >= len(categories)))
    if len(wrong):
        raise DataError(f"{name} has the category code {codes[wrong[0]]} in row {wrong[0]}, but "
                        f"only {len(categories)} categories")
    if not len(categories):
        return np.full(len(codes), None, dtype=object)
    return _with_missing(categories[codes], codes == -1)


def _column(file, table, column):
    """The column `column` of the table obs, var, raw/var or raw.var, as a numpy array."""
    frame, name = _member(file, table), f"{table}/{column}"
    if isinstance(frame, h5py.Dataset):  # anndata <= 0.6: one compound data set
        values = _to_numpy(name, frame[column])
        coded = values.dtype.kind in "iu" and column != _index_name(file, table)
        if coded and _member(file, f"uns/{column}_categories", required=False) is not None:
            return _decode(name, values, _plain(file, f"uns/{column}_categories"))
        return values
    node = _member(file, name)
    if isinstance(node, h5py.Group) and "codes" in node and "categories" in node:  # since 0.8
        categories = _plain_or_nullable(file, f"{name}/categories")
        return _decode(name, _plain(file, f"{name}/codes"), categories)
    values = _plain_or_nullable(file, name)
    categories = node.attrs.get("categories")
    if isinstance(categories, h5py.Reference):  # 0.7: a reference into obs/__categories
        categories = file[categories]
        if not isinstance(categories, h5py.Dataset):
            raise DataError(f"{name} refers to categories that are not a data set")
        _check_storage(file, f"categories of {name}", categories)
        return _decode(name, values, _to_numpy(name, categories[()]))
    return values


def _index_name(file, table):
    frame = _member(file, table)
    if isinstance(frame, h5py.Dataset):
        if not frame.dtype.names:
            raise DataError(f"{table} is neither a table nor a group of columns")
        return frame.dtype.names[0]
    for name in (_attribute(frame, "_index"), "_index", "index"):
        if name in _keys(frame):
            return name
    raise DataError(f"{table} has no index; it holds: {', '.join(_keys(frame)) or 'nothing'}")


def _names(file, table):
    """The index of a table: names of cells or genes, as str objects."""
    values = _column(file, table, _index_name(file, table))
    return _objects(map(str, values))


def _column_names(file, table):
    frame, index = _member(file, table), _index_name(file, table)
    if isinstance(frame, h5py.Dataset):
        return [name for name in frame.dtype.names if name != index]
    names = [c for c in _keys(frame) if c not in (index, "__categories")]
    order = [c.decode("utf-8", "replace") if isinstance(c, bytes) else c
             for c in np.ravel(frame.attrs.get("column-order", [])).tolist()]
    return [c for c in order if c in names] + [c for c in names if c not in order]


# ============================================================================================
# Counts: every value checked in the one pass that reads it, kept in the narrowest exact type
# ============================================================================================


@dataclasses.dataclass
class Counts:
    """A matrix of counts, cells x genes, in memory: dense, or compressed sparse rows (CSR).

    values      (N, G) if dense, (entries,) if sparse; uint8, uint16, uint32 or uint64
    columns     (entries,) gene of each entry, or None if dense
    indptr      (N + 1,) where each cell's entries start and end, or None if dense
    """

    shape: tuple
    values: np.ndarray
    columns: np.ndarray | None = None
    indptr: np.ndarray | None = None

    def dense(self, rows=None):
        """The counts of the given rows (indices, a slice or a boolean mask; all by default).

        Returns a numpy array of exact integers, rows x genes.
        """
        rows = np.atleast_1d(np.arange(self.shape[0])[slice(None) if rows is None else rows])
        if self.indptr is None:
            return self.values[rows]
        row, entry = _entries_of(self.indptr[rows], self.indptr[rows + 1])
        out = np.zeros((len(rows), self.shape[1]), self.values.dtype)
        out[row, self.columns[entry]] = self.values[entry]
        return out

    def library(self):
        """Total counts of each cell, (N,) int64."""
        if self.indptr is None:
            return self.values.sum(1, dtype=np.int64)
        total = np.concatenate([[0], np.cumsum(self.values, dtype=np.int64)])
        return total[self.indptr[1:]] - total[self.indptr[:-1]]

    def of_genes(self, keep):
        """The Counts of the genes where keep (G,) is true, in their order."""
        shape = (self.shape[0], int(keep.sum()))
        if self.indptr is None:
            return Counts(shape, self.values[:, keep])
        kept = keep[self.columns]
        before = np.concatenate([[0], np.cumsum(kept)])
        new_column = np.cumsum(keep) - 1
        return Counts(shape, self.values[kept],
                      new_column[self.columns[kept]].astype(self.columns.dtype),
                      before[self.indptr])


def _entries_of(start, end):
    """Row r holds entries start[r]..end[r]: row number and position of all entries, in order."""
    length = end - start
    row = np.repeat(np.arange(len(length)), length)
    first = np.cumsum(length) - length
    return row, np.arange(len(row)) + np.repeat(start - first, length)


def _as_counts(name, values, dtype, place):
    """Values in the first of COUNT_TYPES, from `dtype` on, that holds them all exactly.

    A cast is exact if and only if its result compares equal, NaN, inf and negative values included:
    one cast and one comparison check every value. place(i) names the cell and gene of value i.
    Returns the counts and how many values were rounded because they were within 1e-6 of one.
    """
    with np.errstate(invalid="ignore"):
        for candidate in COUNT_TYPES[COUNT_TYPES.index(dtype):]:
            counts = values.astype(candidate)
            if (counts == values).all() and (candidate.itemsize < 8 or counts.max() < 2**53):
                return counts, 0
        values = values.astype(np.float64)
        rounded = np.rint(values)
        near = (np.abs(values - rounded) <= 1e-6) & (rounded >= 0) & (rounded < 2**53)
    if near.all():
        return _as_counts(name, rounded, dtype, place)[0], int((rounded != values).sum())
    first = int(np.argmin(near.ravel()))
    value = values.ravel()[first]
    what = ("not a finite number" if not np.isfinite(value) else "negative" if value < 0 else
            "too large" if value >= 2**53 else
            "not an integer; the values look normalised or log-transformed")
    raise NotCounts(f"{name} holds {value:g} for {place(first)}, which is no count: it is {what}")


def _put(out, where, counts):
    """out[where] = counts; returns out, widened first if its type does not hold these counts."""
    if counts.dtype.itemsize > out.dtype.itemsize:
        out = out.astype(counts.dtype)
    out[where] = counts
    return out


def _read_dense(name, dataset, shape, cell_and_gene):
    """A dense matrix, in blocks of whole chunks."""
    if dataset.shape != shape:
        raise DataError(f"{name} has shape {dataset.shape}, but obs and var say {shape}")
    if dataset.dtype.kind not in "biuf":
        raise NotCounts(f"{name} holds values of type {dataset.dtype}, not counts")
    chunk_rows, chunk_columns = dataset.chunks or (1, shape[1])
    # Whole rows, unless one row of chunks is larger than a block: then tiles of whole chunks.
    width = min(shape[1], max(1, BLOCK // (chunk_rows * chunk_columns)) * chunk_columns)
    height = max(1, BLOCK // (chunk_rows * width)) * chunk_rows
    buffer = np.empty(min(height, shape[0]) * width, dataset.dtype.newbyteorder("="))
    out, n_rounded = np.empty(shape, COUNT_TYPES[0]), 0
    for r in range(0, shape[0], height):
        for c in range(0, shape[1], width):
            rows, columns = slice(r, min(r + height, shape[0])), slice(c, min(c + width, shape[1]))
            tile = (rows.stop - r, columns.stop - c)
            block = buffer[:tile[0] * tile[1]].reshape(tile)
            dataset.read_direct(block, (rows, columns))

            def place(i, r=r, c=c, n_columns=tile[1]):
                """The cell and gene of the i-th value of the tile, for an error."""
                return cell_and_gene(r + i // n_columns, c + i % n_columns)

            counts, n = _as_counts(name, block, out.dtype, place)
            out, n_rounded = _put(out, (rows, columns), counts), n_rounded + n
    return Counts(shape, out), n_rounded


def _read_sparse(name, file, shape, by_row, cell_and_gene):
    """A sparse matrix, stored by rows (CSR) or by columns (CSC, which is transposed)."""
    data, indices = _member(file, f"{name}/data"), _member(file, f"{name}/indices")
    indptr = _member(file, f"{name}/indptr")
    for part, node in (("data", data), ("indices", indices), ("indptr", indptr)):
        if not isinstance(node, h5py.Dataset) or node.ndim != 1:
            raise DataError(f"{name}/{part} is not a one-dimensional data set")
        if part != "data" and node.dtype.kind not in "iu":
            raise DataError(f"{name}/{part} holds values of type {node.dtype}; integers were "
                            "expected")
    if data.dtype.kind not in "biuf":
        raise NotCounts(f"{name} holds values of type {data.dtype}, not counts")
    n_major, n_minor = shape if by_row else shape[::-1]
    n_entries = len(indices)

    # No index is used before it was checked.
    if len(indptr) != n_major + 1:
        raise DataError(f"{name}/indptr has {len(indptr)} values; a matrix of shape {shape} needs "
                        f"{n_major + 1}")
    indptr = indptr[()].astype(np.int64)
    falls = np.flatnonzero(np.diff(indptr) < 0)
    if indptr[0] != 0:
        raise DataError(f"{name}/indptr starts at {indptr[0]} and not at 0")
    if len(falls):
        i = falls[0]
        raise DataError(f"{name}/indptr falls from {indptr[i]} to {indptr[i + 1]} at position "
                        f"{i + 1}" + (": it has overflowed 32 bits" if indptr[i + 1] < 0 else ""))
    if len(data) != n_entries or indptr[-1] != n_entries:
        raise DataError(f"{name} is inconsistent: data has {len(data)} values, indices "
                        f"{n_entries}, and indptr ends at {indptr[-1]}")

    def checked_indices(start, end):
        """A block of indices; raises DataError if one of them lies outside."""
        minor = indices[start:end]
        wrong = np.flatnonzero((minor < 0) | (minor >= n_minor))
        if len(wrong):
            raise DataError(f"{name}/indices holds {minor[wrong[0]]} at position "
                            f"{start + wrong[0]}; it must be at least 0 and below {n_minor}")
        return minor.astype(np.int64)

    blocks = [(s, min(s + BLOCK, n_entries)) for s in range(0, n_entries, BLOCK)]
    columns = np.empty(n_entries, next(t for t in COUNT_TYPES if shape[1] <= np.iinfo(t).max + 1))
    values, n_rounded = np.empty(n_entries, COUNT_TYPES[0]), 0
    if by_row:
        row_ends = indptr
    else:  # where each row will start: one pass over the indices
        per_row = sum((np.bincount(checked_indices(*b), minlength=n_minor) for b in blocks),
                      start=np.zeros(n_minor, np.int64))
        row_ends = np.concatenate([[0], np.cumsum(per_row)])
        free = row_ends[:-1].copy()  # the next free place of each row
    for start, end in blocks:
        minor = checked_indices(start, end)

        def place(i, start=start, minor=minor):
            """The cell and gene of the i-th value of the block, for an error."""
            major = np.searchsorted(indptr, start + i, side="right") - 1
            return cell_and_gene(*((major, minor[i]) if by_row else (minor[i], major)))

        counts, n = _as_counts(name, data[start:end], values.dtype, place)
        n_rounded += n
        if by_row:
            where = slice(start, end)
            columns[where] = minor
        else:
            # Entries of one row keep their order: they go to its next free places, one by one.
            order, per_row = np.argsort(minor, kind="stable"), np.bincount(minor, minlength=n_minor)
            shift = free - (np.cumsum(per_row) - per_row)  # from the place in `order` to the final
            where = np.arange(len(order)) + np.repeat(shift, per_row)
            free += per_row
            major = np.searchsorted(indptr, order + start, side="right") - 1
            columns[where], counts = major, counts[order]
        values = _put(values, where, counts)
    return _sum_duplicates(Counts(shape, values, columns, row_ends)), n_rounded


def _sum_duplicates(counts):
    """Sort the entries of each row by gene, add up those of the same gene; in place, by blocks."""
    values, columns, indptr = counts.values, counts.columns, counts.indptr
    new_indptr, written = np.zeros_like(indptr), 0
    starts = np.arange(0, len(values), BLOCK)
    first_rows = np.unique(np.searchsorted(indptr, starts, side="right") - 1).tolist()
    for r, r_end in zip(first_rows, [*first_rows[1:], len(indptr) - 1]):
        start, end = indptr[r], indptr[r_end]
        row = np.repeat(np.arange(r_end - r), np.diff(indptr[r:r_end + 1]))
        column, block = columns[start:end], values[start:end]
        key = row * counts.shape[1] + column
        if not (np.diff(key) > 0).all():
            order = np.argsort(key, kind="stable")
            first = np.flatnonzero(np.diff(key[order], prepend=-1) > 0)
            sums = np.add.reduceat(block[order], first, dtype=np.uint64)
            block, _ = _as_counts("a sum of duplicate entries", sums, values.dtype, str)
            row, column = row[order[first]], column[order[first]]
        where = slice(written, written + len(row))
        values, columns[where] = _put(values, where, block), column
        new_indptr[r + 1:r_end + 1] = written + np.cumsum(np.bincount(row, minlength=r_end - r))
        written += len(row)
    return Counts(counts.shape, values[:written], columns[:written], new_indptr)


# ============================================================================================
# read_h5ad
# ============================================================================================


class H5ad:
    """An .h5ad file whose counts are in memory; columns of obs and var are read when asked for.

    path, found      the file, and in words where its counts were found and in which form
    shape            (cells, genes)
    counts           a Counts
    gene_names, cell_names    arrays of str
    """

    def __init__(self, path, found, counts, gene_names, cell_names, obs_columns, var):
        self.path, self.found, self.counts = path, found, counts
        self.gene_names, self.cell_names = gene_names, cell_names
        self.shape, self.obs_columns, self._var = counts.shape, obs_columns, var

    def obs(self, column):
        """The obs column as a numpy array (cells,); a missing label is None.

        Raises DataError where there is no such column or it is damaged.
        """
        return self._read("obs", column, self.shape[0], "cells")

    def var(self, column):
        """The same of var, (genes,)."""
        return self._read(self._var, column, self.shape[1], "genes")

    def _read(self, table, column, n, what):
        with _h5_file(self.path) as file:
            columns = _column_names(file, table)
            if column not in columns:
                raise DataError(f"{table} has no column {column!r}; its columns are: "
                                + (", ".join(columns) or "none"))
            values = _column(file, table, column)
            if len(values) != n:
                raise DataError(f"{table}/{column} has {len(values)} values for {n} {what}")
            return values


def read_h5ad(path, layer=None):
    """Read counts and names of an .h5ad file. Returns an H5ad.

    layer   a layer's name, or "raw"; by default X, or, where X is absent or holds no counts, the
            counts in layers/counts or raw/X: a line then says so.

    Every value is checked. Raises DataError, one sentence, for all that is wrong with the file.
    """
    with _h5_file(path) as file:
        cell_names = _names(file, "obs")
        layers = _member(file, "layers", required=False)
        choices = {n: (f"layers/{n}", "var") for n in _keys(layers or {})}
        raw = ("raw/X", "raw/var") if "raw" in _keys(file) else ("raw.X", "raw.var")
        choices |= {"X": ("X", "var")} if "X" in _keys(file) else {}
        choices |= {"raw": raw} if _member(file, raw[0], required=False) is not None else {}
        asked = [n for n in ("X", "counts", "raw") if n in choices] if layer is None else [layer]
        if not asked:
            raise DataError("has neither X nor layers/counts nor raw/X")
        if asked[0] not in choices:
            raise DataError(f"has no layer {layer!r}; --layer can be: "
                            + (", ".join(choices) or "nothing"))

        problem = None
        for name, var in (choices[n] for n in asked):
            try:
                counts, gene_names, form, n_rounded = _read_matrix(file, name, var, cell_names)
            except NotCounts as error:
                problem = problem or error
                continue
            if layer is None and name != "X":
                print(f"{path}: {problem or 'there is no X'}; the counts are taken from {name}")
            if n_rounded:
                print(f"{path}: {n_rounded:,} values of {name} within 1e-6 of an integer were "
                      "rounded to it")
            return H5ad(os.fspath(path), f"{name}, {form}", counts, gene_names, cell_names,
                        _column_names(file, "obs"), var)

        # None of them holds counts: say what is wrong with the first, and what could be asked for.
        others = [n for n in choices if n not in asked]
        good = [n for n in others if _holds_counts(file, *choices[n], cell_names)]
        advice = (f"use --layer {good[0]}" if good else
                  f"there are no counts in {', '.join(choices)}: start from the file with the raw "
                  "counts")
        raise NotCounts(f"{problem}; {advice}")


def _read_matrix(file, name, var, cell_names):
    """Counts, gene names, form and number of rounded values of a matrix; raises NotCounts."""
    gene_names = _names(file, var)
    shape = (len(cell_names), len(gene_names))
    if 0 in shape:
        raise DataError(f"{name} has {shape[0]} cells and {shape[1]} genes")
    node = _member(file, name)

    def cell_and_gene(row, column):
        """The names of a place in the matrix, for an error message."""
        return f"cell {cell_names[row]!r}, gene {gene_names[column]!r}"

    if isinstance(node, h5py.Dataset):
        form = f"dense {node.dtype}"
        counts, n_rounded = _read_dense(name, node, shape, cell_and_gene)
    else:
        encoding = _attribute(node, "encoding-type") or _attribute(node, "h5sparse_format")
        if encoding not in ("csr_matrix", "csr", "csc_matrix", "csc"):
            raise DataError(f"{name} has the unknown encoding {encoding!r}")
        declared = node.attrs.get("shape", node.attrs.get("h5sparse_shape", shape))
        if np.ravel(declared).tolist() != list(shape):
            raise DataError(f"{name} declares the shape {declared}, but obs and var say {shape}")
        form = f"sparse {encoding[:3].upper()}"
        counts, n_rounded = _read_sparse(name, file, shape, form == "sparse CSR", cell_and_gene)
    return counts, gene_names, form, n_rounded


def _holds_counts(file, name, var, cell_names):
    try:
        return bool(_read_matrix(file, name, var, cell_names))
    except (DataError, OSError, RuntimeError):
        return False


# ============================================================================================
# Labels -> dosages
# ============================================================================================

# How perturbation labels look in the files of others, tried in this order where no column is named.
# A control's name may contain *. Only `condition` is known to join combinations, by "+": nothing
# else is split unless asked for, since "_" joins combinations in one family and numbers the guides
# of a single gene (ZAP70_1) in another. A column named by the user is read as its family would be.
FAMILIES = [  # obs column (or prefix of one-hot columns), names of controls, separator
    ("sgID_AB", ["*non-targeting*"], None),  # Replogle et al., the SAMS-VAE paper's file
    ("guide_", [], None),  # Norman et al., the paper's file: 0/1 columns, one per guide
    ("condition", ["ctrl", "control", "DMSO", "Vehicle"], "+"),  # GEARS, CPA, PerturBench
    ("perturbation", ["control"], None),  # scPerturb
    ("gene", ["non-targeting"], None),  # Replogle et al., original; Arc
    ("target_gene", ["non-targeting"], None),  # Arc, Virtual Cell Challenge
    ("gene_target", ["NT"], None),  # Mixscape
]
ONE_HOT = "guide_"


@dataclasses.dataclass
class Screen:
    """A perturbation screen: the cells of a file that can be used, with their dosages.

    counts          all cells of the file; `rows` (N,) are the rows of those that are kept
    d               (N, P) int64, perturbations of each kept cell; NONE in free places and controls
    perturbations   the T names that d refers to, sorted
    conditions      (N,) str: names of the cell's perturbations joined by "+", or "control"
    split           (N,) str or None: what a column of the file says of each cell's split
    notes           lines that say what was chosen and what was dropped
    file            the H5ad it was read from
    """

    path: str
    counts: Counts
    rows: np.ndarray
    gene_names: np.ndarray
    cell_names: np.ndarray
    d: np.ndarray
    perturbations: list
    conditions: np.ndarray
    split: np.ndarray | None
    notes: list
    file: H5ad

    def obs(self, column):
        """The obs column of the kept cells, (N,). Raises DataError where there is none."""
        return self.file.obs(column)[self.rows]

    def fingerprint(self):
        """A hash of all names, dosages and library sizes in order: the same for the same screen."""
        names = "\n".join([*self.gene_names, *self.cell_names, *self.perturbations])
        digest = hashlib.sha256(names.encode("utf-8", "replace"))
        digest.update(self.d.tobytes() + self.counts.library()[self.rows].tobytes())
        return digest.hexdigest()


def read_screen(path, perturbation_column=None, control=None, combination_separator=None,
                one_hot_prefix=None, layer=None, split_column=None, gene_column=None, subset=None):
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

    Raises DataError where the file, or the choice of column and control, is wrong.
    """
    if one_hot_prefix is not None and (perturbation_column, control, combination_separator) != (
            None, None, None):
        raise DataError("--one-hot-prefix needs no --perturbation-column, no --control and no "
                        "--combination-separator: leave them out")
    data = read_h5ad(path, layer)
    n_genes = data.shape[1]
    if gene_column:
        keep = np.array([str(v).lower() in ("true", "1", "1.0") for v in data.var(gene_column)])
        if not keep.any():
            raise DataError(f"{path}: var column {gene_column!r} is true for no gene; leave "
                            "--gene-column out to keep all")
        data.counts, data.gene_names = data.counts.of_genes(keep), data.gene_names[keep]
    chosen = _read_subset(data, subset or [])
    if perturbation_column is not None:
        labels = _read_labels(data, perturbation_column, control, combination_separator)
    elif one_hot_prefix is not None:
        labels = _read_one_hot(data, one_hot_prefix)
    else:
        labels = _find_family(data, control, combination_separator)
    column, sets, note = labels
    split = _read_split(data, split_column) if split_column else None

    library, missing = data.counts.library(), np.array([names is None for names in sets])
    keep = (library > 0) & ~missing & chosen
    notes = [f"{data.found}: {data.shape[0]:,} cells x {n_genes:,} genes, "
             f"{int(library.sum()):,} counts", note]
    notes += [f"{data.counts.shape[1]:,} genes kept, true in var column {gene_column!r}"
              ] if gene_column else []
    for n, why in ((int((~chosen).sum()), f"outside of {' '.join(subset or [])}"),
                   (int(((library == 0) & chosen).sum()), "without any count"),
                   (int((missing & chosen).sum()), f"without a label in {column}")):
        notes += [f"dropped {n:,} cells {why}"] if n else []

    if split is not None:
        unknown = [word for word, part in zip(*split) if part is None]
        notes += [f"{len(unknown):,} cells are in no split, obs column {split_column!r} says "
                  f"{_commonest(unknown, 3)}"] if unknown else []

    rows = np.flatnonzero(keep)
    sets = [sets[i] for i in rows]
    perturbations = sorted(set().union(*sets))
    pairs = len({names for names in sets if len(names) > 1})
    for name in perturbations:  # the names of conditions, below, must tell them apart
        if name == "control" or (pairs and "+" in name):
            raise DataError(f"{path}: a perturbation is called {name!r}, which cannot be told from "
                            "the control or from a combination: check --control and "
                            "--combination-separator, or rename it")
    index = {name: t for t, name in enumerate(perturbations)}
    d = np.full((len(rows), max(map(len, sets), default=0)), NONE)
    for i, names in enumerate(sets):
        d[i, :len(names)] = [index[name] for name in sorted(names)]
    conditions = np.array(["+".join(sorted(s)) or "control" for s in sets], dtype=object)

    controls = int((d == NONE).all(1).sum())
    if not controls or controls == len(rows):
        raise DataError(f"{path}: {'all' if controls else 'none'} of the {len(rows):,} cells with "
                        f"counts and a label in {column} are controls; training needs controls "
                        "and perturbed cells")
    notes.append(f"{len(rows):,} cells kept, {controls:,} of them controls; {len(perturbations):,} "
                 f"perturbations, {pairs:,} combinations; commonest: {_commonest(conditions, 5)}")
    few = sum(n < 10 for n in collections.Counter(conditions.tolist()).values())
    notes += [f"{few:,} conditions have fewer than 10 cells; they are kept"] if few else []
    return Screen(os.fspath(path), data.counts, rows, data.gene_names, data.cell_names[rows], d,
                  perturbations, conditions, None if split is None else split[1][rows], notes,
                  data)


def _read_subset(data, subset):
    """Which cells are kept, (cells,) bool."""
    wanted = {}
    for text in subset:
        column, equals, value = text.partition("=")
        if not equals:
            raise DataError(f"--subset needs COLUMN=VALUE, not {text!r}")
        wanted.setdefault(column, []).append(value)
    chosen = np.ones(data.shape[0], bool)
    for column, values in wanted.items():
        found = data.obs(column).astype(str)
        for value in values:
            if value not in found:
                raise DataError(f"{data.path}: no cell has {value!r} in obs column {column!r}; its "
                                f"values are {_commonest(found, 12)}")
        chosen &= np.isin(found, values)
    if not chosen.any():
        raise DataError(f"{data.path}: no cell is in the subset {' '.join(subset)}")
    return chosen


def one_label_per_cell(screen):
    """The same screen with every combination as a perturbation of its own: d (N, 1), as for SVAE+.

    Its perturbations are the names of the conditions other than "control", sorted.
    """
    names = sorted(set(screen.conditions) - {"control"})
    index = {name: t for t, name in enumerate(names)} | {"control": NONE}
    d = np.array([[index[name]] for name in screen.conditions])
    return dataclasses.replace(screen, d=d, perturbations=names)


def _read_labels(data, column, control, separator):
    """Column, each cell's set of perturbation names (None: missing), a line on what was read."""
    values = ["" if v is None or v != v else str(v).strip() for v in data.obs(column).tolist()]
    families = {name: family for name, *family in FAMILIES}
    everyone = list(dict.fromkeys(c for controls, _ in families.values() for c in controls))
    known, family_separator = families.get(column, (everyone, None))
    controls = known if control is None else [control.strip()]
    separator = family_separator if separator is None else separator  # "" splits nothing
    parsed = {label: _parse(data.path, label, controls, separator)
              for label in dict.fromkeys(values)}
    found = [label for label, names in parsed.items() if names == frozenset()]
    if not found:
        raise NoControl(f"{data.path}: no control cell in obs column {column!r}, looked for "
                        f"{' or '.join(map(repr, controls))}: name it with --control; "
                        f"its labels are {_commonest(values, 12)}")
    if len(found) > 1 and control is None and column not in families:
        raise DataError(f"{data.path}: obs column {column!r} holds several names of controls, "
                        f"{', '.join(found[:5])}: name the one to use with --control")
    note = f"labels in obs column {column!r}; control: {', '.join(found[:3])}"
    note += f" and {len(found) - 3} more" if len(found) > 3 else ""
    joined = [c for c in "+_|" if any(c in label for label in parsed)]
    if separator:
        occurs = any(separator in label for label in parsed)
        note += f"; combinations are split at {separator!r}" + (
            "" if occurs else ", which is in no label")
    elif joined:
        note += (f"; some contain {' and '.join(map(repr, joined))}, nothing was split "
                 "(--combination-separator would, if it joins combinations)")
    return column, [parsed[value] for value in values], note


def _parse(path, label, controls, separator):
    """A label -> the set of its perturbations: None if missing, empty if it is a control."""
    def is_control(part):
        """Whether it is the name of a control; * in a name stands for any characters."""
        return any(re.fullmatch(".*".join(map(re.escape, c.split("*"))), part) for c in controls)

    if label == "":
        return None
    if is_control(label):
        return frozenset()
    if label in ("nan", "NaN", "None", "<NA>"):  # what others have written for a missing label
        return None
    parts = [part.strip() for part in label.split(separator)] if separator else [label]
    if not all(parts):
        raise DataError(f"{path}: the label {label!r}, split at {separator!r}, has an empty part")
    return frozenset(part for part in parts if not is_control(part))


def _read_one_hot(data, prefix):
    """The same from 0/1 columns of obs, one per perturbation; a cell with none is a control."""
    columns = {c: data.obs(c) for c in data.obs_columns if c.startswith(prefix)}
    columns = {c: np.array([np.nan if v is None else v for v in values], np.float64)
               for c, values in columns.items()
               if not any(isinstance(v, str) for v in values.tolist())}
    for c, values in columns.items():
        wrong = values[~np.isnan(values) & ~np.isin(values, (0, 1))]
        if len(wrong):
            raise NoControl(f"{data.path}: obs column {c!r} holds {wrong[0]:g}; a one-hot column "
                            "holds 0 and 1")
    if not columns:
        raise NoControl(f"{data.path}: no column of obs starts with {prefix!r} and holds 0 and 1")
    table = np.stack(list(columns.values()), axis=1)  # (N, T); NaN: missing
    names = np.array([c.removeprefix(prefix) for c in columns], dtype=object)
    sets = [None if np.isnan(row).any() else frozenset(names[row == 1]) for row in table]
    if frozenset() not in sets:
        raise NoControl(f"{data.path}: every cell has a 1 in one of the columns {prefix}*, and so "
                        "none is a control")
    return f"{prefix}*", sets, f"{len(names)} one-hot columns {prefix}*; control: cells with none"


def _find_family(data, control, separator):
    """The first of FAMILIES that fits; an error where families that fit disagree, or none fits."""
    fits = []
    for column, *_ in FAMILIES:
        with contextlib.suppress(NoControl):
            if column == ONE_HOT and control is None:
                fits.append(_read_one_hot(data, column))
            elif column in data.obs_columns:
                fits.append(_read_labels(data, column, control, separator))
    # Columns that agree on the control cells describe the same screen, at most in other detail
    # (guide or gene): the first is taken. If they disagree, guessing would be gambling.
    for other in fits[1:]:
        if any((a == frozenset()) != (b == frozenset()) for a, b in zip(fits[0][1], other[1])):
            raise DataError(f"{data.path}: obs columns {fits[0][0]!r} and {other[0]!r} both look "
                            "like perturbation labels but disagree on the control cells: choose "
                            f"with --perturbation-column; {_describe_obs(data)}")
    if not fits:
        wanted = "control cells" if control is None else f"cells labelled {control!r}"
        raise DataError(f"{data.path}: no obs column of a well-known name has {wanted}: name one "
                        f"with --perturbation-column and --control; {_describe_obs(data)}")
    return fits[0]


def _commonest(values, n):
    """The n commonest values with their numbers, long ones cut, as one line of text."""
    counter = collections.Counter(map(str, values))
    ranked = sorted(counter, key=lambda label: (-counter[label], label))
    words = [f"{label if len(label) <= 60 else label[:57] + '...'} ({counter[label]:,})"
             for label in ranked[:n]]
    return " ".join(", ".join(words).split()) + (
        f" and {len(ranked) - n:,} more" if len(ranked) > n else "")


def _describe_obs(data):
    """The columns of obs, with the commonest values of each that could be labels."""
    described = []
    for column in data.obs_columns[:30]:
        try:
            values = data.obs(column)
        except DataError:
            described.append(f"{column} (damaged)")
            continue
        n = len({*values.tolist()})
        could_be_labels = values.dtype.kind != "f" and n <= max(20, len(values) / 2)
        described.append(f"{column}: {_commonest(values, 3)}" if could_be_labels else column)
    more = len(data.obs_columns) - len(described)
    return "obs has the columns " + "; ".join(described) + (f"; and {more} more" if more else "")


def _read_split(data, column):
    """What the column says of each cell, and that as train, validation, test or None."""
    known = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
             "validation": "validation", "test": "test", "ood": "test"}
    words = [str(v) for v in data.obs(column).tolist()]
    return words, _objects(known.get(word.lower()) for word in words)


# ============================================================================================
# Splits
# ============================================================================================


def train_test_split(n, train_size, seed):
    """Positions (train, test) of n cells: scikit-learn's train_test_split(range(n), train_size=..,
    random_state=seed), to the last element, without scikit-learn.
    """
    n_train = math.floor(train_size * n)
    shuffled = np.random.RandomState(seed).permutation(n)
    return shuffled[n - n_train:], shuffled[:n - n_train]


SPLITS = ("random", "norman-ood", "norman-data-efficiency")


def split_cells(screen, seed=0, split="random", train_combinations=1.0):
    """{"train", "validation", "test"}: positions among the screen's kept cells.

    The file's own split where the screen has one; else one of the paper's, SPLITS:

    random   of all cells 80 / 20 into rest / test, of the rest 80 / 20 into train / validation.
             Replogle (4.1).
    norman-ood   tests on combinations that were not trained on (4.2). Combinations are put into
             random order: the first train_combinations (a fraction) of them are for training and
             validation, the last quarter for testing. Their cells are split as in `random` first,
             so that training cells accumulate while the fraction grows, test cells stay the same,
             and at a fraction of 1 the test combinations are trained on, in other cells.
    norman-data-efficiency   tests on cells of all combinations, split as in `random`, and trains on
             the first train_combinations (a fraction) of their training cells.

    In the Norman splits all other cells are split 80 / 20 into train / validation.
    """
    n_perturbed = (screen.d != NONE).sum(1)
    if split != "random" and screen.split is None and n_perturbed.max() < 2:
        raise DataError(f"{screen.path}: --split {split} needs combinations, and no cell has two "
                        "perturbations: check --combination-separator or --one-hot-prefix")

    def of_80_20(cells):
        """Split cells in two."""
        first, second = train_test_split(len(cells), 0.8, seed)
        return cells[first], cells[second]

    if screen.split is not None:
        parts = {name: np.flatnonzero(screen.split == name)
                 for name in ("train", "validation", "test")}
    else:
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
        if split != "random":
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
    return parts


# ============================================================================================
# Batches: the whole screen lies on the device, a batch is an index
# ============================================================================================


def _tensor(array, device):
    """A numpy array of counts or indices as a tensor on the device, in the narrowest integer type.

    torch computes with uint8 but hardly with wider unsigned types: those become signed, by a free
    change of view where the largest value allows it.
    """
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        size = array.dtype.itemsize
        fits = array.max(initial=0) <= np.iinfo(f"i{size}").max
        array = array.view(f"i{size}") if fits else array.astype(f"i{2 * size}")
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


class Batches:
    """A screen that lies on the device. batches(cells) -> counts x (B, G) floats, dosages d (B, P).

    cells are positions among the screen's kept cells, a tensor on the device. Sparse counts stay
    sparse: rows are made dense a batch at a time.
    """

    def __init__(self, screen, device="cpu"):
        counts = screen.counts
        self.device, self.n_genes = torch.device(device), counts.shape[1]
        self.rows = torch.from_numpy(screen.rows).to(device)
        self.d = torch.from_numpy(screen.d).to(device)
        self.values = _tensor(counts.values, device)
        self.sparse = counts.indptr is not None
        if self.sparse:
            self.columns = _tensor(counts.columns, device)
            self.indptr = _tensor(counts.indptr, device)
            self.most = torch.arange(int(np.diff(counts.indptr).max()), device=device)

    def __call__(self, cells):
        rows = self.rows[cells]
        if not self.sparse:
            return self.values[rows].float(), self.d[cells]
        # Every row is read as if it were the longest one, and what is too much goes to a column
        # that is cut off: fixed shapes, so that a GPU need not tell the host how many there are.
        start, end = self.indptr[rows, None], self.indptr[rows + 1, None]
        entry = start + self.most  # (B, entries of the longest row)
        inside = entry < end
        entry = torch.where(inside, entry, 0)
        column = torch.where(inside, self.columns[entry].long(), self.n_genes)
        x = torch.zeros(len(rows), self.n_genes + 1, device=self.device)
        x.scatter_(1, column, self.values[entry].float())
        return x[:, :-1].contiguous(), self.d[cells]

    def in_order(self, cells, size=512):
        """All the given cells (a numpy array of positions) once, in batches of at most `size`."""
        for part in torch.from_numpy(cells).to(self.device).split(size):
            yield self(part)


class Shuffle:
    """Endless random batches of the given cells: every epoch visits each once, in a new order.

    cells (n,) positions. All batches have the same size; one that reaches the end of an epoch goes
    on in the next. The state is two numbers, epoch and position, so that training can be resumed in
    the middle of an epoch. The order lies on the device: it is copied once per epoch.
    """

    def __init__(self, cells, size, seed, device="cpu", epoch=0, position=0):
        self.cells, self.size, self.seed, self.device = cells, size, seed, device
        self.epoch, self.position = epoch, position
        self.order = self._order()

    def _order(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        return torch.from_numpy(rng.permutation(self.cells)).to(self.device)

    def __next__(self):
        parts, missing = [], self.size
        while missing:
            parts.append(self.order[self.position:self.position + missing])
            missing -= len(parts[-1])
            self.position += len(parts[-1])
            if self.position == len(self.order):
                self.epoch, self.position = self.epoch + 1, 0
                self.order = self._order()
        return torch.cat(parts)


def training_statistics(batches, cells):
    """Mean and standard deviation of log(1 + x) of each gene over the given cells, (G,) each."""
    mean = sum(torch.log1p(x).double().sum(0) for x, _ in batches.in_order(cells)) / len(cells)
    square = sum(((torch.log1p(x).double() - mean) ** 2).sum(0) for x, _ in batches.in_order(cells))
    return mean.float(), (square / len(cells)).sqrt().float()


# ============================================================================================
# Writing .h5ad files
# ============================================================================================


def write_h5ad(path, X, obs, var, layers=None, obsm=None, uns=None):
    """Write an .h5ad file that anndata (0.8 or newer) and read_h5ad open. Nothing half-written.

    X, layers' values    2-D arrays (obs x var); X may be None
    obsm                 dict of 2-D arrays with a row for each of obs
    obs, var             dicts of columns, numbers or text; the first one is the index
    uns                  dict of arrays, numbers, text, lists of text, and such dicts
    """
    def write(group, name, value):
        """One element of the file with the attributes that anndata asks for."""
        if isinstance(value, dict):
            node = group.create_group(name)
            node.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
            for key, item in value.items():
                write(node, key, item)
            return
        value = np.asarray(value)
        text = value.dtype.kind in "OU"
        if text:
            node = group.create_dataset(name, data=value.astype(object), dtype=h5py.string_dtype())
        else:
            node = group.create_dataset(name, data=value)
        kind = ("string-array" if value.ndim else "string") if text else (
            "array" if value.ndim else "numeric-scalar")
        node.attrs.update({"encoding-type": kind, "encoding-version": "0.2.0"})

    def write_table(file, name, columns):
        """obs or var."""
        index, *others = columns
        write(file, name, columns)
        file[name].attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0",
                                 "_index": index})
        file[name].attrs.create("column-order", np.array(others, dtype=object), (len(others),),
                                h5py.string_dtype())

    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        if X is not None:
            write(file, "X", X)
        write_table(file, "obs", obs)
        write_table(file, "var", var)
        write(file, "layers", layers or {})
        write(file, "obsm", obsm or {})
        write(file, "uns", uns or {})


@contextlib.contextmanager
def replacing(path):
    """A temporary name beside `path` that is renamed to it if and only if the block succeeds."""
    temporary = f"{os.fspath(path)}.{os.getpid()}.writing"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


# ============================================================================================
# A simulated screen with known masks and effects
# ============================================================================================


def simulate(path, seed=0, n_perturbations=500, cells_per_condition=25, effect_size=4.0,
             n_latent=6, n_genes=200, n_pairs=60, n_controls=100):
    """Simulate a screen from the SAMS-VAE process (Algorithm 1) and write it as an .h5ad file.

    Each perturbation alone and n_pairs random pairs, cells_per_condition cells each, and n_controls
    controls. Every perturbation touches one latent dimension, and each further one with probability
    0.05; effects are +-N(effect_size, 0.5). Two-layer decoder, Gamma-Poisson counts with inverse
    dispersion 10, library sizes log-normal around 5,000. Half of the pairs are held out: all their
    cells are in `split` test, the others 64/16/20 in train, validation and test.

    Written beside the counts: obs `condition` and `split`; uns `simulation` with the perturbations'
    names and the true `mask` and `effect` (T, L); uns `pathways`, where a pathway is ten or more
    perturbations that share a mask.

    Why so many perturbations of few cells each? N(0, I), the prior of the basal state, looks the
    same from every angle, and so do decoder and encoder, which can undo any rotation of the latent
    space. What pins the axes down is the sparsity of the masks alone. Rotating the axes by a little
    makes masks denser, and each further entry of 1 costs about log(1 / alpha) nats, once for each
    perturbation and however many cells it has: so many perturbations are a strong force towards the
    true axes, and many cells are not. Effects must be clear against the unit variance of the basal
    state, or too few entries are found in the first place. With 60 perturbations of 115 cells each,
    as many cells in all, effects are predicted as well but the masks come out too dense.
    """
    rng = np.random.default_rng(seed)
    mask = rng.random((n_perturbations, n_latent)) < 0.05
    mask[np.arange(n_perturbations), rng.integers(n_latent, size=n_perturbations)] = True
    effect = rng.choice([-1, 1], mask.shape) * rng.normal(effect_size, 0.5, mask.shape)

    # Conditions, then the dosages of all cells: two places a cell, and a zero row for NONE.
    all_pairs = np.stack(np.triu_indices(n_perturbations, 1), axis=1)
    n_pairs = min(n_pairs, len(all_pairs))
    pairs = all_pairs[np.sort(rng.choice(len(all_pairs), n_pairs, replace=False))]
    singles = np.stack([np.arange(n_perturbations), np.full(n_perturbations, NONE)], axis=1)
    conditions = np.concatenate([singles, pairs])
    d = np.concatenate([np.full((n_controls, 2), NONE),
                        np.repeat(conditions, cells_per_condition, axis=0)])
    held_out = np.zeros(len(conditions), bool)
    held_out[n_perturbations:] = rng.permutation(n_pairs) < n_pairs // 2
    held_out = np.append(np.zeros(n_controls, bool), np.repeat(held_out, cells_per_condition))
    order = rng.permutation(len(d))
    d, held_out, n = d[order], held_out[order], len(d)

    # Algorithm 1 and the likelihood of section 2.2.
    offset = np.concatenate([mask * effect, np.zeros((1, n_latent))])
    z = rng.normal(size=(n, n_latent)) + offset[d].sum(axis=1)  # eq. 1
    hidden = z @ rng.normal(0, 1.5 / np.sqrt(n_latent), (n_latent, 64)) + rng.normal(size=64)
    hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    logits = hidden @ rng.normal(0, 0.6 / np.sqrt(64), (64, n_genes)) + rng.normal(size=n_genes)
    rho = np.exp(logits - logits.max(axis=1, keepdims=True))
    rho /= rho.sum(axis=1, keepdims=True)
    library = rng.lognormal(np.log(5000), 0.3, (n, 1))
    x = rng.poisson(library * rho * rng.gamma(10, 1 / 10, rho.shape))

    names = np.array([*(f"P{t + 1:03d}" for t in range(n_perturbations)), ""], dtype=object)
    pathways = {}
    for row in np.unique(mask, axis=0):
        members = names[:-1][(mask == row).all(1)]
        if len(members) >= 10:
            pathways["latent " + " and ".join(map(str, np.flatnonzero(row) + 1))] = members
    split = rng.choice(["train", "validation", "test"], n, p=[0.64, 0.16, 0.2])
    split = np.where(held_out, "test", split)
    write_h5ad(
        path, X=x.astype(np.uint16),
        obs={"cell": [f"cell{i}" for i in range(n)],
             "condition": ["+".join(filter(None, names[row])) or "control" for row in d],
             "split": split.astype(object)},
        var={"gene": [f"G{g + 1:03d}" for g in range(n_genes)]},
        uns={"simulation": {"perturbations": names[:-1], "mask": mask, "effect": effect},
             "pathways": pathways})


def read_simulation(path):
    """(perturbation names, true mask, true effect) of a simulated screen; None for other files."""
    with _h5_file(path) as file:
        parts = [f"uns/simulation/{part}" for part in ("perturbations", "mask", "effect")]
        if any(_member(file, part, required=False) is None for part in parts):
            return None
        names, (mask, effect) = _plain(file, parts[0]), (file[part][()] for part in parts[1:])
        return list(names), mask.astype(bool), effect


def read_layers(path):
    """{layer: array} of a file that write_h5ad wrote."""
    with _h5_file(path) as file:
        return {name: _member(file, f"layers/{name}")[()] for name in _keys(file["layers"])}


def read_pathways(path):
    """{pathway: list of its genes} of uns/pathways, or of a .json file; None if there is none."""
    if os.fspath(path).endswith(".json"):
        try:
            with open(path, encoding="utf-8") as file:
                pathways = json.load(file)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise DataError(f"{path}: cannot be read as JSON: {error}") from None
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


SCREEN_OPTIONS = ("perturbation_column", "control", "combination_separator", "one_hot_prefix",
                  "layer", "split_column", "gene_column", "subset")  # the arguments of read_screen


def add_screen_options(parser):
    """The options that say how a file is read, the same for data.py and train.py."""
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
    group.add_argument("--split-column", metavar="COLUMN",
                       help="obs column with train, validation, test (default: see --split)")
    group.add_argument("--gene-column", metavar="COLUMN",
                       help="var column that is true for the genes to keep (default: all are kept)")
    group.add_argument("--subset", metavar="COLUMN=VALUE", action="append",
                       help="keep cells with this value in this obs column; may be repeated")


def run(main):
    """Run a command; a DataError becomes one sentence on standard error and exit status 2."""
    try:
        main()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main():
    """Print what the reader makes of a file."""
    parser = argparse.ArgumentParser(description="Print what the reader makes of an .h5ad file.")
    parser.add_argument("file")
    add_screen_options(parser)
    args = parser.parse_args()
    screen = read_screen(args.file, **{name: getattr(args, name) for name in SCREEN_OPTIONS})
    print(f"{screen.path}")
    for note in screen.notes:
        print(f"  {note}")
    sizes = {name: len(cells) for name, cells in split_cells(screen).items()}
    print("  split: " + ", ".join(f"{n:,} {name}" for name, n in sizes.items()))


if __name__ == "__main__":
    run(main)
