"""`Registry`: every release of the recommender, where it came from, and which one is served.

    registry.sqlite                     which releases there are, their parents, and the one that is current
    releases/0007/model.safetensors     the tensors
    releases/0007/student.safetensors   the tensors of its device student, where there is one
    releases/0007/manifest.json         what they are and what they were measured at
    catalogs/<digest>.json              the items they know, written once

A release exists when its row is committed, and its files are on the disk before that. The row holds the digest of the
manifest and the manifest holds the digests of the model and the catalogue, so one changed byte anywhere is noticed.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from safetensors import numpy as safetensors

from fedrec.clock import system_clock
from fedrec.data.catalog import ItemCatalog
from fedrec.errors import DataError, FedrecError, RegistryError
from fedrec.params import Params, digest
from fedrec.server.files import is_file, make_folder, mend, place_folder, refusal, sweep
from fedrec.server.release import (
    Manifest,
    Release,
    ReleaseRow,
    Student,
    checked_part,
    corrupt,
    read_part,
    sha256_of,
    tensor_bytes,
)

LAYOUT = 1
BUSY_SECONDS = 60.0
MODEL, STUDENT, MANIFEST = "model.safetensors", "student.safetensors", "manifest.json"
_TABLES = (
    """CREATE TABLE release(
        version INTEGER PRIMARY KEY, run TEXT NOT NULL, slice INTEGER NOT NULL,
        parent INTEGER REFERENCES release(version), digest TEXT NOT NULL, catalog_digest TEXT NOT NULL,
        experiment_digest TEXT NOT NULL, created_at INTEGER NOT NULL, promoted INTEGER NOT NULL, UNIQUE(run, slice))""",
    "CREATE TABLE current(one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER NOT NULL REFERENCES release)",
    """CREATE TABLE history(
        step INTEGER PRIMARY KEY AUTOINCREMENT, action TEXT NOT NULL CHECK (action IN ('promote', 'rollback')),
        version INTEGER NOT NULL REFERENCES release, at INTEGER NOT NULL)""",
)
_ROWS = """SELECT version, run, slice, parent, digest, catalog_digest, experiment_digest, created_at, promoted,
    version IN (SELECT version FROM current) FROM release ORDER BY version"""


Rows = list[ReleaseRow]  # `list` means the method inside the class
Problems = list[str]


class Registry:
    """The releases in one folder; safe to use from several threads and processes.

    Making the object does nothing. `publish` creates the registry; everything else asks for one that exists.
    """

    def __init__(self, root: Path, now: Callable[[], int] = system_clock) -> None:
        """Name the folder and the clock, in seconds since 1970 UTC, that dates releases and promotions."""
        self.root = root
        self._now = now
        self._path = root / "registry.sqlite"

    def prepare(self) -> None:
        """Create what is missing and sweep what killed writers left; call it before a long run to fail early.

        Raises:
            RegistryError: the folder cannot be written, or another fedrec wrote the registry.
        """
        for folder in (self.root, self.root / "releases", self.root / "catalogs"):
            make_folder(folder)
        with self._open("rwc") as db:
            db.execute("BEGIN IMMEDIATE")
            if not self._layout(db):
                for statement in _TABLES:
                    db.execute(statement)
            db.execute(f"PRAGMA user_version = {LAYOUT}")  # each time: a read-only place is refused here and now
            # Temporary names are made only under this lock, so whatever bears one now has lost its writer.
            for folder in (self.root / "catalogs", self.root / "releases", *(self.root / "releases").iterdir()):
                sweep(folder)
            db.execute("COMMIT")

    def publish(
        self,
        params: Params,
        catalog: ItemCatalog,
        *,
        run: str,
        slice: int,
        parent: int | None,
        model: Mapping[str, Any],
        experiment: Mapping[str, Any],
        experiment_digest: str,
        metrics: Mapping[str, Any],
        privacy: Mapping[str, Any],
        lesson: Mapping[str, Any] | None = None,
        student: Student | None = None,
        promote: bool = True,
    ) -> Release:
        """Write a release and make it current, once per ``(run, slice)``.

        A resumed run publishes its last slice again: the same content gives the same version and mends missing files,
        and a promotion or rollback made since then stands.

        Args:
            params: the model's tensors.
            catalog: the items that they know.
            run: name of the run.
            slice: index of the time slice.
            parent: version that the release grew from, as remembered by the run; None for the first.
            model: the model's configuration.
            experiment: the whole experiment.
            experiment_digest: its digest.
            metrics: what was measured; numbers that are not finite are written as null.
            privacy: what was spent.
            lesson: who taught it, if anybody did.
            student: a small recommender for devices, kept beside it.
            promote: whether it becomes the current release.

        Raises:
            RegistryError: this slice of this run is published with other content, the parent is unknown, or the
                registry cannot be written.
        """
        weights = tensor_bytes(params)
        files = {MODEL: weights} if student is None else {MODEL: weights, STUDENT: tensor_bytes(student.params)}
        self.prepare()
        with self._transaction() as db:
            known = {(row.run, row.slice): row for row in self._rows(db)}
            row = known.get((run, slice))
            version = row.version if row else len(known) + 1  # rows are never removed
            manifest = Manifest(
                version=version,
                run=run,
                slice=slice,
                parent=parent,
                model=dict(model),
                catalog_digest=catalog.digest(),
                n_items=len(catalog),
                experiment=dict(experiment),
                experiment_digest=experiment_digest,
                metrics=dict(metrics),
                privacy=dict(privacy),
                lesson=None if lesson is None else dict(lesson),
                student=None if student is None else student.document(sha256_of(files[STUDENT])),
                sha256=sha256_of(weights),
                params_digest=digest(params),
            )
            document = manifest.to_bytes()
            if row and row.digest != sha256_of(document):
                raise RegistryError(
                    f"Slice {slice} of run '{run}' is already published as release {version} with other content; "
                    "give the new run another name."
                )
            if parent is not None and not 1 <= parent <= len(known):
                raise RegistryError(
                    f"Cannot publish slice {slice} of run '{run}': its parent, release {parent}, is not in the "
                    f"registry at '{self.root}'; point --registry at the one that the run began with."
                )
            mend(self.root / "catalogs" / f"{manifest.catalog_digest}.json", catalog.to_json().encode())
            place_folder(self._folder(version), files | {MANIFEST: document})
            if row is None:
                columns = (version, run, slice, parent, sha256_of(document), manifest.catalog_digest, experiment_digest)
                db.execute("INSERT INTO release VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)", (*columns, self._now()))
            if promote and not (row and row.promoted):
                self._point(db, "promote", version)
        return Release(version, manifest, dict(params), catalog, None if student is None else dict(student.params))

    def load(self, version: int | str = "latest") -> Release:
        """Read a release and check every byte of it.

        Args:
            version: a number, ``latest`` (the current release) or ``newest`` (the highest number).

        Raises:
            RegistryError: there is no such release.
            CorruptRelease: a file is missing, or does not hold what was published.
        """
        row = self.row(version)
        manifest = self._manifest(row)
        folder = self._folder(row.version)
        weights = checked_part(row.version, folder / MODEL, manifest.sha256)
        student = None
        if manifest.student is not None:
            student = safetensors.load(checked_part(row.version, folder / STUDENT, manifest.student["sha256"]))
        return Release(row.version, manifest, safetensors.load(weights), self._catalog(row), student)

    def manifest(self, version: int | str = "latest") -> Manifest:
        """Read only the manifest of a release; errors as `load`."""
        return self._manifest(self.row(version))

    def row(self, version: int | str = "latest") -> ReleaseRow:
        """Return the line of a release; `version` and errors as `load`."""
        rows = self.list()
        if not rows:
            raise RegistryError(f"The registry at '{self.root}' holds no release yet; run `fedrec simulate` first.")
        current = next((row for row in rows if row.current), None)
        named = {str(row.version): row for row in rows} | {"newest": rows[-1], "latest": current}
        found = named.get(str(version))
        if found is None and version == "latest":
            raise RegistryError(
                f"No release is promoted in '{self.root}'; choose one of 1 to {len(rows)} with "
                "`fedrec releases promote VERSION`."
            )
        if found is None:
            there = f"1 to {len(rows)}" if len(rows) > 1 else "only release 1"
            names = f"'latest' ({current.version}) and 'newest'" if current else "'newest'"
            raise RegistryError(f"No release '{version}' in '{self.root}': there is {there}, {names}.")
        return found

    def list(self) -> Rows:
        """Return all releases, oldest first."""
        with self._open() as db:
            return self._rows(db)

    def lineage(self, version: int | str = "latest") -> Rows:
        """Return a release, its parent, and so on back to the first of its line; errors as `row`."""
        rows = {row.version: row for row in self.list()}
        line = [self.row(version)]
        while (parent := line[-1].parent) is not None:
            line.append(rows[parent])
        return line

    def promote(self, version: int | str) -> int:
        """Make a release the current one and return its number; nothing changes if it is already.

        Raises:
            RegistryError: there is no such release, or the registry cannot be written.
            CorruptRelease: its files are damaged.
        """
        number = self.load(version).version
        with self._transaction() as db:
            if number not in [row.version for row in self._rows(db) if row.current]:
                self._point(db, "promote", number)
        return number

    def rollback(self) -> int:
        """Make the release current again that was current before the present one was promoted; return its number.

        Rolling back twice goes back two promotions.

        Raises:
            RegistryError: no release was promoted before the current one, or the registry cannot be written.
            CorruptRelease: the files of that release are damaged.
        """
        with self._transaction() as db:
            promotions = _promotions(db)
            if len(promotions) < 2:
                raise RegistryError(
                    f"Cannot roll back in '{self.root}': no release was promoted before the current one; choose one "
                    "with `fedrec releases promote VERSION`."
                )
            number = self.load(promotions[-2]).version
            self._point(db, "rollback", number)
        return number

    def verify(self) -> Problems:
        """Read everything and return one sentence for each thing that is wrong.

        Raises:
            RegistryError: there is no registry, or its list of releases cannot be read at all.
        """
        with self._open() as db:
            problems = [f"'{self._path}': {text}." for (text,) in db.execute("PRAGMA integrity_check") if text != "ok"]
            for table, rowid, *_ in db.execute("PRAGMA foreign_key_check"):
                problems.append(f"'{self._path}': row {rowid} of table {table} names a release that is not there.")
            current = [row.version for row in self._rows(db) if row.current]
            if current != _promotions(db)[-1:]:
                problems.append(f"'{self._path}': the current release and the history disagree; restore a backup.")
        for row in self.list():
            try:
                self.load(row.version)
            except FedrecError as error:
                problems.append(str(error))
        return problems

    def _folder(self, version: int) -> Path:
        return self.root / "releases" / f"{version:04d}"

    def _manifest(self, row: ReleaseRow) -> Manifest:
        path = self._folder(row.version) / MANIFEST
        document = read_part(row.version, path)
        try:
            manifest = Manifest.model_validate_json(document)
        except ValidationError as error:
            raise corrupt(row.version, path, "is not a manifest that this fedrec can read") from error
        if sha256_of(document) != row.digest:
            raise corrupt(row.version, path, "does not match its SHA-256")
        return manifest

    def _catalog(self, row: ReleaseRow) -> ItemCatalog:
        path = self.root / "catalogs" / f"{row.catalog_digest}.json"
        document = read_part(row.version, path)
        try:
            catalog = ItemCatalog.from_json(document.decode(), str(path))
        except (DataError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise corrupt(row.version, path, "is not a catalogue") from error
        if catalog.digest() != row.catalog_digest:
            raise corrupt(row.version, path, "does not match its SHA-256")
        return catalog

    def _rows(self, db: sqlite3.Connection) -> Rows:
        return [ReleaseRow(*[*row, bool(promoted), bool(current)]) for *row, promoted, current in db.execute(_ROWS)]

    def _point(self, db: sqlite3.Connection, action: Literal["promote", "rollback"], version: int) -> None:
        db.execute("INSERT INTO history(action, version, at) VALUES (?, ?, ?)", (action, version, self._now()))
        db.execute("INSERT OR REPLACE INTO current VALUES (1, ?)", (version,))
        db.execute("UPDATE release SET promoted = 1 WHERE version = ?", (version,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")  # after an error, closing the connection rolls back

    @contextmanager
    def _open(self, mode: Literal["rw", "rwc"] = "rw") -> Iterator[sqlite3.Connection]:
        """Yield a connection; one per use, so that threads and forked processes never share one."""
        missing = RegistryError(f"No registry at '{self.root}'; run `fedrec simulate` first or pass --registry.")
        if mode == "rw" and not is_file(self._path):
            raise missing
        try:
            uri = f"{self._path.absolute().as_uri()}?mode={mode}"
            db = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
            try:
                db.execute("PRAGMA foreign_keys = ON")
                db.execute("PRAGMA synchronous = EXTRA")  # a run forgets a slice once it is committed
                if mode == "rw" and not self._layout(db):
                    raise missing
                yield db
            finally:
                db.close()
        except sqlite3.DatabaseError as error:
            raise _sentence(self._path, error) from error

    def _layout(self, db: sqlite3.Connection) -> bool:
        """Return whether the tables are there; 0 is what an interrupted creation leaves."""
        (found,) = db.execute("PRAGMA user_version").fetchone()
        if found not in (0, LAYOUT):
            raise RegistryError(
                f"The registry at '{self.root}' has layout {found}, this fedrec reads {LAYOUT}; update."
            )
        return bool(found)


def _promotions(db: sqlite3.Connection) -> list[int]:
    """Return the promotions still in force, oldest first: the last is current, a rollback takes one away."""
    promotions: list[int] = []
    for action, version in db.execute("SELECT action, version FROM history ORDER BY step"):
        if action == "promote":
            promotions.append(version)
        else:
            promotions.pop()
    return promotions


def _sentence(path: Path, error: sqlite3.DatabaseError) -> RegistryError:
    """Return the error that tells a person what SQLite means."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY):
        return refusal(path, OSError(errno.ENOSPC if code == sqlite3.SQLITE_FULL else errno.EROFS, str(error)))
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return RegistryError(
            f"Another process has kept '{path}' locked for {BUSY_SECONDS:.0f} seconds; wait for it, then run again."
        )
    return RegistryError(
        f"The list of releases '{path}' cannot be opened ({error}); check its permissions and the disk, or restore it "
        "from a backup."
    )
