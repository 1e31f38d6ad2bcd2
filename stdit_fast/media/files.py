"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike, *, durable: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to: it takes the place of `path` at the end, or is removed on an exception.

    Folders that are not there are made.

    Args:
        durable: whether the content is on the disk before it takes its name, so that no power failure leaves a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        if durable:
            flush(draft)
        os.replace(draft, path)
        if durable:
            flush(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def flush(path: str | os.PathLike) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
