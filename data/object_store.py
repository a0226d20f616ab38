"""Reads and writes object stores (`s3://`, `gs://`, `hf://`, ...) through fsspec.

Credentials and endpoints are never part of a URL or a config: each backend finds them as its own tools do, in the
environment, in its config files or through the machine's role. Transient failures are retried a bounded number of times
and logged once; permanent ones raise immediately.
"""

import contextlib
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
Say = Callable[[str], None]

PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry
THREADS = 8  # concurrent transfers
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "huggingface"}
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the role of the machine",
    "gcs": "`gcloud auth application-default login`, GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
    "huggingface": "HF_TOKEN, or `hf auth login`",
}
_SECRETS = re.compile(r"[?&](x-amz-signature|x-goog-signature|signature|sig|token|password|secret)=", re.IGNORECASE)
# Metadata keys that identify the version of a file, in order of preference; stores differ.
_VERSION = ("ETag", "etag", "md5Hash", "generation", "blob_id", "LastModified", "last_modified", "updated", "mtime")
_MODIFIED = ("LastModified", "last_modified", "updated", "mtime", "created")


class ObjectStoreError(RuntimeError):
    """An operation failed after all retries."""


class StoredObject(NamedTuple):
    """Metadata of a file in a store."""

    size: int  # bytes
    version: str  # changes whenever the content changes
    modified: float | None  # seconds since 1970


def is_url(path: str) -> bool:
    return re.match(r"[a-zA-Z][\w+.-]*://", path) is not None


def check_url(url: str, key: str) -> None:
    """Raises: ValueError if `url` contains a secret, which would be written to configs and logs."""
    parts = urlsplit(url)
    if (parts.password or "@" in parts.netloc) or _SECRETS.search(url):
        bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ValueError(
            f"{key}={bare}: the URL contains a secret, which would be written to configs and logs; remove it and "
            f"provide {_credentials(url)}"
        )


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def _credentials(url: str) -> str:
    return CREDENTIALS.get(EXTRAS.get(_scheme(url), ""), "the credentials that its fsspec backend reads")


@lru_cache(maxsize=32)
def file_system(scheme: str) -> Any:
    """Returns the fsspec file system of a scheme. Raises: ValueError if it is unknown or its package is missing."""
    extra = EXTRAS.get(scheme)
    fix = f"pip install -e '.[{extra}]'" if extra else "install the package that fsspec names"
    try:
        import fsspec

        # Other processes write to the same folders, so cached listings could be stale.
        options = {"auto_mkdir": True} if scheme in ("file", "local") else {}  # object stores have no folders to create
        return fsspec.filesystem(scheme, use_listings_cache=False, **options)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{scheme}://: needs a package that is not installed ({reason}): {fix}") from None
    except ValueError as error:
        raise ValueError(f"{scheme}://: is not a file system known to fsspec ({error})") from None


def _permanent_error(url: str, error: BaseException) -> Exception | None:
    """Returns the exception to raise for a failure that retries cannot fix; None for a transient failure."""
    name = type(error).__name__
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | ObjectStoreError | ValueError):
        return error
    if "Credential" in name or "credentials" in str(error)[:200].lower():
        return ValueError(f"{url}: credentials are missing or have expired; provide {_credentials(url)}")
    if isinstance(error, PermissionError):
        reason = _first_line(error)
        return ValueError(f"{url}: access denied ({reason}); use an account with access: {_credentials(url)}")
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def with_retries(url: str, action: Callable[[], T], say: Say = lambda text: None) -> T:
    """Runs `action` with retries and returns its result; logs the first failure.

    Raises: FileNotFoundError unchanged; ValueError for missing credentials or permissions; ObjectStoreError after the
    last retry.
    """
    for failed, pause in enumerate((*PAUSES, None)):
        try:
            return action()
        except Exception as error:
            final = _permanent_error(url, error)
            if final is error:
                raise
            if final is not None:
                raise final from error
            if pause is None:
                raise ObjectStoreError(f"{url}: {_first_line(error)} (tried {len(PAUSES) + 1} times)") from error
            if failed == 0:
                say(f"{url}: {_first_line(error)}; retrying up to {len(PAUSES)} times")
            time.sleep(pause)
    raise AssertionError


def _stored(info: Mapping[str, Any]) -> StoredObject:
    version = next((str(info[name]) for name in (*_VERSION, "created") if info.get(name)), "")
    modified = next((info[name] for name in _MODIFIED if info.get(name)), None)
    if isinstance(modified, str):
        with contextlib.suppress(ValueError):
            modified = datetime.fromisoformat(modified)
    if isinstance(modified, datetime):
        modified = modified.timestamp()
    return StoredObject(int(info.get("size") or 0), version, modified if isinstance(modified, int | float) else None)


class Store:
    """A folder in an object store; file names are relative to it, with slashes."""

    def __init__(self, url: str, say: Say = lambda text: None):
        self.url, self.say = url.rstrip("/"), say

    def __str__(self) -> str:
        return self.url

    @property
    def _fs(self) -> Any:
        return file_system(_scheme(self.url))

    def _full(self, name: str) -> str:
        return self._fs._strip_protocol(f"{self.url}/{name}" if name else self.url)

    def _try(self, name: str, action: Callable[[], T], say: Say | None = None) -> T:
        return with_retries(f"{self.url}/{name}".rstrip("/"), action, say or self.say)

    def subfolder(self, name: str) -> "Store":
        """Returns the subfolder `name` as a store."""
        return Store(f"{self.url}/{name}", self.say)

    def files(self, under: str = "") -> dict[str, StoredObject]:
        """Returns all files below the folder `under`, by name. Raises: FileNotFoundError if the bucket is missing."""
        root = self._full(under)
        found = self._try(under, lambda: self._fs.find(root, detail=True))
        prefix = f"{under}/" if under else ""
        of = lambda full: prefix + str(PurePosixPath(full).relative_to(PurePosixPath(root)))
        return {of(full): _stored(info) for full, info in found.items() if full != root}

    def folders(self) -> list[str]:
        """Returns the names of the direct subfolders."""
        return self.list_dir()[1]

    def list_dir(self) -> tuple[list[str], list[str]]:
        """Returns the names of direct files and subfolders. Raises: FileNotFoundError if the bucket is missing."""
        try:
            found = self._try("", lambda: self._fs.ls(self._full(""), detail=True))
        except FileNotFoundError:  # an empty folder does not exist in an object store
            return list(self.files()), []
        names = lambda kind: sorted(PurePosixPath(i["name"]).name for i in found if i["type"] == kind)
        return names("file"), names("directory")

    def has(self, name: str) -> bool:
        return self._try(name, lambda: self._fs.isfile(self._full(name)))

    def read(self, name: str) -> bytes | None:
        """Returns the content of a small file; None if it does not exist."""
        try:
            return self._try(name, lambda: self._fs.cat_file(self._full(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        try:
            self._try(name, lambda: self._fs.pipe_file(self._full(name), content))
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.url}: cannot be written to ({_first_line(error)}); create the bucket first"
            ) from None

    def put(self, files: Mapping[str, Path]) -> None:
        """Uploads local files, several concurrently."""
        say = _once(self.say)

        def one(name: str) -> None:
            self._try(name, lambda: self._fs.put_file(str(files[name]), self._full(name)), say)

        _each(one, list(files))

    def get(self, names: Sequence[str], folder: Path) -> None:
        """Downloads files to the same names below `folder`, each renamed into place when complete."""
        say = _once(self.say)

        def one(name: str) -> None:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
            try:
                self._try(name, lambda: self._fs.get_file(self._full(name), str(partial)), say)
                partial.rename(target)
            finally:
                partial.unlink(missing_ok=True)

        _each(one, list(names))

    def delete(self, names: Sequence[str]) -> None:
        """Deletes files; missing ones are ignored."""
        say = _once(self.say)

        def one(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._try(name, lambda: self._fs.rm_file(self._full(name)), say)

        _each(one, list(names))

    def copy(self, names: Mapping[str, str]) -> None:
        """Copies files within the store, from each key to its value."""
        say = _once(self.say)

        def one(name: str) -> None:
            self._try(name, lambda: self._fs.cp_file(self._full(name), self._full(names[name])), say)

        _each(one, list(names))


def _once(say: Say) -> Say:
    """Returns a logger that passes on only the first message."""
    logged: list[str] = []

    def log_first(text: str) -> None:
        logged.append(text)
        if len(logged) == 1:
            say(text)

    return log_first


def _each(action: Callable[[str], Any], names: Sequence[str]) -> None:
    """Runs `action` on names concurrently; after a failure, pending ones are cancelled."""
    if not names:
        return
    pool = ThreadPoolExecutor(min(THREADS, len(names)))
    try:
        for done in as_completed([pool.submit(action, name) for name in names]):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


# Single files, by URL

_listed: dict[str, StoredObject] = {}  # metadata from the latest listing, to avoid one request per file


def find_files(url: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Returns the URLs of a file, of the files in a folder or of the matches of a glob, in a fixed order.

    Raises: ValueError if the bucket or path does not exist.
    """
    fs, bare = file_system(_scheme(url)), url.rstrip("/")
    path = fs._strip_protocol(bare)
    star = any(c in path for c in "*?[")
    look = lambda: fs.glob(path, detail=True) if star else fs.find(path, detail=True)
    try:
        found = {name: info for name, info in with_retries(bare, look).items() if info["type"] == "file"}
    except FileNotFoundError as error:
        raise ValueError(f"{url}: does not exist ({_first_line(error)})") from None
    if path not in found:
        fixed = re.split(r"[*?\[]", path)[0].rpartition("/")[0] if star else path
        hidden = lambda name: any(part.startswith(".") for part in name[len(fixed) :].split("/"))
        wanted = lambda name: not hidden(name) and (star or name.endswith(suffixes or ""))
        found = {name: info for name, info in found.items() if wanted(name)}
    named = {fs.unstrip_protocol(name): _stored(info) for name, info in found.items()}
    _listed.update(named)
    return sorted(named, key=lambda name: name.split("/"))


def stored(url: str) -> StoredObject:
    """Returns the metadata of a file; cached from the latest listing."""
    if url not in _listed:
        fs = file_system(_scheme(url))
        _listed[url] = _stored(with_retries(url, lambda: fs.info(fs._strip_protocol(url))))
    return _listed[url]


@contextlib.contextmanager
def on_disk(file: str) -> Iterator[str]:
    """Yields the path of a local file, or of a temporary copy of a file in a store.

    Copies instead of streaming, because readers seek and an interrupted transfer can be restarted.
    Raises: ObjectStoreError if the download fails: a source must not silently lose documents.
    """
    if not is_url(file):
        yield file
        return
    fs, expected = file_system(_scheme(file)), stored(file).size
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        copy = Path(folder) / PurePosixPath(file).name

        def fetch() -> None:
            fs.get_file(fs._strip_protocol(file), str(copy))
            if copy.stat().st_size != expected:
                raise OSError(f"received {copy.stat().st_size} of {expected} bytes; is the file being written?")

        try:
            with_retries(file, fetch, lambda text: print(text, flush=True))
        except (OSError, ValueError) as error:
            raise ObjectStoreError(f"{file}: {_first_line(error)}") from error
        yield str(copy)
