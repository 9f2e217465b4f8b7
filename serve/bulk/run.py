"""The making of what is missing: files are encoded and put by threads while the model makes the next.

What keeps a store from ever mixing two jobs, however they end: a file is whole or not there; the manifest names a job
only once nothing else has the names of that job's files; and one process at a time holds a folder. An object store has
no locks, so its shards have names of their own for each job.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby

import numpy as np

from serve.bulk import formats
from serve.bulk.card import README, readme
from serve.bulk.job import File, Job, from_json, to_json
from serve.bulk.store import MANIFEST, Store, is_passing
from serve.card import Card
from serve.encoding import ENDINGS, ENDS, contact_sheet, whole
from serve.errors import JobError
from serve.model import GenerativeModel, Images

GRID = "grid.png"
AHEAD = 8  # batches that may wait to be encoded and put: bounds memory

Done = Callable[[int, int, bool], None]  # how many more samples there are, their bytes, whether they were made now


@dataclass(frozen=True)
class Receipt:
    """A file that is in the store.

    Attributes:
        name: As `File.name`.
        count: Its samples.
        bytes: Its size.
        sha256: Of its bytes.
        made: Whether it was made now.
    """

    name: str
    count: int
    bytes: int
    sha256: str
    made: bool


@dataclass
class Kept:
    """What is in the store.

    Attributes:
        made: Samples that were made now.
        found: Samples that were there.
        receipts: Of shards; there are none of single pictures.
    """

    made: int = 0
    found: int = 0
    receipts: list[Receipt] = field(default_factory=list)

    def add(self, receipt: Receipt) -> None:
        """Count a file."""
        if receipt.made:
            self.made += receipt.count
        else:
            self.found += receipt.count
        if receipt.sha256:
            self.receipts.append(receipt)


@contextmanager
def held(job: Job, store: Store, replace_other: bool = False, worker: int | None = None) -> Iterator[Job]:
    """Make a store this job's as long as the block lasts; give the job as it is kept: of as many samples as ever.

    Args:
        job: What is wanted.
        store: Where.
        replace_other: Whether a store with other files may be taken over. They stay, unless of the same names.
        worker: As `Store.hold`.

    Raises:
        JobError: another job holds the store, it holds something else, or it cannot be written.
    """
    formats.check_installed(job)
    kept = [job]

    def begin() -> None:
        kept[0] = _claim(job, store, replace_other)

    with store.hold(begin, worker):
        yield kept[0]


def complete(
    job: Job,
    model: GenerativeModel,
    store: Store,
    done: Done = lambda count, size, made: None,
    *,
    count: int | None = None,
    part: int = 0,
    parts: int = 1,
) -> Kept:
    """Make what is missing of a job, in a store that is held.

    Args:
        job: As `held` gives it.
        model: Makes the samples.
        store: Where.
        done: Called with how many more samples were there, or are made and encoded, and in between with none. It may
            raise, to end the job.
        count: How many samples of the job; None for all.
        part: Which of so many parts to make, as `Job.groups` shares them out.
        parts: How many there are.

    Raises:
        JobError: the store cannot be written.
    """
    until, kept = job.start + (job.count if count is None else count), Kept()
    with ThreadPoolExecutor() as pool:
        puts = _Puts(pool, done, kept)
        try:
            for group in job.groups(part, parts):
                files = [each for each in map(job.file, group) if each.first < until]
                (_pictures if job.format in ENDINGS else _shards)(job, files, model, store, puts)
            puts.wait(0)
        finally:
            puts.cancel()
    return kept


def finish(job: Job, card: Card, store: Store, receipts: Sequence[Receipt]) -> None:
    """Write what is written last: the manifest with all shards, and a page that describes those that others load."""
    if receipts:
        store.sweep()  # what nodes that a cluster lost have left half-written
        listed = [{"name": each.name, "bytes": each.bytes, "sha256": each.sha256} for each in receipts]
        if job.tagged:
            store.put(README, readme(job, card).encode())
        store.put(MANIFEST, to_json(job, complete=True, files=listed))


def tar_stream(job: Job, model: GenerativeModel) -> Iterator[bytes]:
    """Yield one tar of a whole job, a batch at a time: encoded by threads while the model makes the next."""
    batches = model.stream(job.seed, job.start, job.count, job.temperature)
    with ThreadPoolExecutor() as pool:
        waiting: deque[Future[bytes]] = deque()

        def members(first: int, images: Images) -> bytes:
            return formats.tar(job, first, [bytes(each) for each in formats.encoded(job, images)])

        for first, images in batches:
            waiting.append(pool.submit(members, first, images))
            while len(waiting) > AHEAD or waiting[0].done():
                yield waiting.popleft().result()
                if not waiting:
                    break
        while waiting:
            yield waiting.popleft().result()
    yield formats.END_OF_TAR


def grid(
    job: Job, model: GenerativeModel, store: Store, columns: int, rows: int, check: Callable[[], None] = lambda: None
) -> str:
    """Put a contact sheet of the job's first samples into its store, held; return its name.

    Args:
        job: What is wanted.
        model: Makes the samples.
        store: Where.
        columns: Of the sheet.
        rows: Of the sheet.
        check: Called now and then. It may raise, to end this.

    Raises:
        JobError: it cannot be written.
    """
    count = min(columns * rows, job.count)
    cells = []
    for _, images in model.stream(job.seed, job.start, count, job.temperature):
        check()
        cells.append(images)
    store.put(GRID, contact_sheet(np.concatenate(cells), min(columns, count)))
    return GRID


def manifest(store: Store) -> Job | None:
    """Return the job of a store; None where it has none.

    Raises:
        JobError: its manifest is damaged.
    """
    data = store.read(MANIFEST)
    try:
        return None if data is None else from_json(data)
    except ValueError:
        raise JobError(f"{store}/{MANIFEST} is damaged, or not of a range of samples") from None


class _Puts:
    """What threads do, in the order in which it was asked for, and no more of it than memory should hold."""

    def __init__(self, pool: ThreadPoolExecutor, done: Done, kept: Kept) -> None:
        self._pool, self._done, self.kept = pool, done, kept
        self._waiting: deque[Future[Receipt] | Future[formats.Part]] = deque()

    def encode(self, job: Job, images: Images) -> Future[formats.Part]:
        """Encode a batch."""
        encoding = self._pool.submit(formats.encoded, job, images)
        self._waiting.append(encoding)
        self.wait(AHEAD)
        return encoding

    def put(self, put: Callable[[], Receipt]) -> None:
        """Put a file, or several."""
        self._waiting.append(self._pool.submit(put))
        self.wait(AHEAD)

    def found(self, receipt: Receipt) -> None:
        """Count what was there."""
        self.kept.add(receipt)
        self._done(receipt.count, receipt.bytes, receipt.made)

    def wait(self, most: int) -> None:
        """Wait until at most so many are left."""
        while self._waiting and (len(self._waiting) > most or self._waiting[0].done()):
            result = self._waiting.popleft().result()
            if not isinstance(result, Receipt):  # of a shard, which may be minutes from its end
                size = sum(map(len, result)) if isinstance(result, list) else result.nbytes
                self._done(len(result), size, True)
            elif result.sha256:  # its batches were counted
                self.kept.add(result)
                self._done(0, 0, True)
            else:
                self.found(result)

    def cancel(self) -> None:
        """Begin nothing more."""
        for each in self._waiting:
            each.cancel()


def _shards(job: Job, files: Sequence[File], model: GenerativeModel, store: Store, puts: _Puts) -> None:
    for file in files:
        found = _found(job, file, model, store)
        if found:
            puts.found(found)
            continue
        # Encoded while the rest is made. The threads take these in order, so no put waits for what has not begun.
        parts = [puts.encode(job, images) for _, images in _stream(job, file, model)]

        def put(file: File = file, parts: Sequence[Future[formats.Part]] = parts) -> Receipt:
            return _put(job, file, [part.result() for part in parts], store)

        puts.put(put)


def _pictures(job: Job, files: Sequence[File], model: GenerativeModel, store: Store, puts: _Puts) -> None:
    """Make what is missing of one folder, whole batches at a time."""
    if not files:
        return
    there = store.names(files[0].name.rpartition("/")[0])

    def present(file: File) -> bool:
        if file.name not in there:
            return False
        ends = store.ends(file.name, ENDS)
        return ends is not None and whole(*ends, job.encoding)

    for is_there, group in groupby(files, present):
        run = list(group)
        if is_there:
            puts.found(Receipt("", len(run), 0, "", made=False))
            continue
        for first, images in _stream(job, File("", run[0].first, len(run)), model):

            def put(first: int = first, images: Images = images) -> Receipt:
                size = 0
                for index, picture in enumerate(formats.encoded(job, images), first):
                    # Thousands of these would wait for the disk; one that a power cut damaged is found and made again.
                    store.put(job.name(index, 1), bytes(picture), lasting=False)
                    size += len(picture)
                return Receipt("", len(images), size, "", made=True)

            puts.put(put)


def _stream(job: Job, file: File, model: GenerativeModel) -> Iterator[tuple[int, Images]]:
    return model.stream(job.seed, file.first, file.count, job.temperature)


def _found(job: Job, file: File, model: GenerativeModel, store: Store) -> Receipt | None:
    data = store.read(file.name)
    if data is None or not formats.whole(job, file, model.card.image_shape, data):
        return None
    return Receipt(file.name, file.count, len(data), hashlib.sha256(data).hexdigest(), made=False)


def _put(job: Job, file: File, parts: Sequence[formats.Part], store: Store) -> Receipt:
    data = formats.joined(job, file, parts)
    store.put(file.name, data)
    return Receipt(file.name, file.count, len(data), hashlib.sha256(data).hexdigest(), made=True)


def _claim(job: Job, store: Store, replace_other: bool) -> Job:
    """Make the store this job's: from here on, what has the name of a file of the job is that file."""
    try:
        before = manifest(store)
    except JobError as error:
        if not replace_other:
            raise JobError(f"{error}; choose another --out, or pass --mix to make all anew") from None
        before = None
    if before is None and not replace_other and any(not is_passing(name) for name in store.walk()):
        before = manifest(store)  # an object store has no locks: another part of the job may have begun just now
        if before is None:
            raise JobError(f"{store} holds files that are not of a job; choose another --out, or pass --mix")
    same = before is not None and job.same_but_longer(before)
    if before is not None and not same and not replace_other:
        was, now = asdict(before), asdict(job)
        key = next(key for key in now if was[key] != now[key] and key not in ("count", "model"))
        raise JobError(
            f"{store} holds another job's files ({key} {was[key]}, not {now[key]}); choose another --out, or pass --mix"
        )
    there = before.count if before is not None and same else 0
    kept = replace(job, count=max(job.count, there))
    if kept == before:
        return kept
    if kept.tagged and same:
        store.remove(README)  # until all of it is there
    for name in store.walk():
        if kept.tagged:
            # The last shard of a job that was shorter; in a folder below, or of another range, it is another job's.
            ours = "/" not in name and name.endswith(kept.ending)
            if ours and 0 <= kept.first(name) - kept.start < kept.count and not kept.has(name):
                store.remove(name)
        elif kept.has(name) and kept.first(name) >= kept.start + there:
            if not replace_other:
                raise JobError(f"{store}/{name} is not of this job; choose another --out, or pass --mix to replace it")
            store.remove(name)
    store.put(MANIFEST, to_json(kept))
    return kept
