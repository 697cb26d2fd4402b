"""Closed records as Parquet files, and questions over them and the hot ones alike.

schema    what is in a file, by version; how it is written and read
files     a file's name, its making on disk, its own description
manifest  the list of files in the database
archive   the thread that makes files of closed segments
retain    how long files are kept, and how much disk is left
recover   opening a store: orphans, damage, a list that is lost
imports   files of other nodes
source    hot and closed records as one relation
gaps      where records may be missing, over all nodes
after     records as they were committed, for those who follow them
"""

from netflow.history.archive import Archiver, start, stop
from netflow.history.files import FileError
from netflow.history.gaps import facts, first, gaps
from netflow.history.imports import take
from netflow.history.recover import open_store
from netflow.history.retain import Keeping
from netflow.history.source import Among, Source, raw, reading, source

__all__ = [
    "Among",
    "Archiver",
    "FileError",
    "Keeping",
    "Source",
    "facts",
    "first",
    "gaps",
    "open_store",
    "raw",
    "reading",
    "source",
    "start",
    "stop",
    "take",
]
