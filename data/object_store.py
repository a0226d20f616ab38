"""Files in object stores: what is named by a URL (`s3://`, `gs://`, `hf://`, ...), read and written by fsspec.

Credentials and endpoints are never part of a URL or a config: each backend finds them as its own tools do, in the
environment, in its files or by the machine's role. What fails is tried again a bounded number of times and told in one
line; what no second try can mend is an error at once.
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

PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try
THREADS = 8  # transfers at a time
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "huggingface"}
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the role of the machine",
    "gcs": "`gcloud auth application-default login`, GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
    "huggingface": "HF_TOKEN, or `hf auth login`",
}
_SECRETS = re.compile(r"[?&](x-amz-signature|x-goog-signature|signature|sig|token|password|secret)=", re.IGNORECASE)
# One file may be told of in many ways; the first that a store has says which version it is.
_VERSION = ("ETag", "etag", "md5Hash", "generation", "blob_id", "LastModified", "last_modified", "updated", "mtime")
_MODIFIED = ("LastModified", "last_modified", "updated", "mtime", "created")


class ObjectStoreError(RuntimeError):
    """A store did not do what it was asked, however often."""


class StoredObject(NamedTuple):
    """What a store says of a file."""

    size: int  # bytes
    version: str  # another one where the content is another
    modified: float | None  # seconds since 1970


def is_url(path: str) -> bool:
    return re.match(r"[a-zA-Z][\w+.-]*://", path) is not None


def check_url(url: str, key: str) -> None:
    """Raises: ValueError where a secret stands in `url`, which would be written into configs and logs."""
    parts = urlsplit(url)
    if (parts.password or "@" in parts.netloc) or _SECRETS.search(url):
        bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ValueError(
            f"{key}={bare}: was given with a secret in it, which would be written into configs and logs; leave it out, "
            f"and give {_credentials(url)}"
        )


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def _credentials(url: str) -> str:
    return CREDENTIALS.get(EXTRAS.get(_scheme(url), ""), "the credentials that its fsspec backend reads")


@lru_cache(maxsize=32)
def file_system(scheme: str) -> Any:
    """The fsspec file system of a scheme. Raises: ValueError where it is unknown, or its package is not there."""
    extra = EXTRAS.get(scheme)
    way = f"pip install -e '.[{extra}]'" if extra else "install the package that fsspec names"
    try:
        import fsspec

        # Others write into the same folders: a listing that was kept would be an old one.
        more = {"auto_mkdir": True} if scheme in ("file", "local") else {}  # other stores have no folders to make
        return fsspec.filesystem(scheme, use_listings_cache=False, **more)
    except ImportError as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{scheme}://: needs a package that is not installed ({why}): {way}") from None
    except ValueError as error:
        raise ValueError(f"{scheme}://: is no store that fsspec knows ({error})") from None


def _no_second_try(url: str, error: BaseException) -> Exception | None:
    """What to raise at once: only another command, bucket or account mends it."""
    name = type(error).__name__
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | ObjectStoreError | ValueError):
        return error
    if "Credential" in name or "credentials" in str(error)[:200].lower():
        return ValueError(f"{url}: no credentials were found, or they are no longer good; give {_credentials(url)}")
    if isinstance(error, PermissionError):
        said = _first_line(error)
        return ValueError(f"{url}: access was denied ({said}); give an account that may: {_credentials(url)}")
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def with_retries(url: str, action: Callable[[], T], say: Say = lambda text: None) -> T:
    """What `action` returns, after some more tries where it fails; the first failure is told.

    Raises: FileNotFoundError as it came; ValueError for credentials and rights; StoreFailed after the last try.
    """
    for failed, pause in enumerate((*PAUSES, None)):
        try:
            return action()
        except Exception as error:
            final = _no_second_try(url, error)
            if final is error:
                raise
            if final is not None:
                raise final from error
            if pause is None:
                raise ObjectStoreError(f"{url}: {_first_line(error)} (tried {len(PAUSES) + 1} times)") from error
            if failed == 0:
                say(f"{url}: {_first_line(error)}; trying again, {len(PAUSES)} times at most")
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
    """A folder in an object store; names in it are relative to it, with slashes."""

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

    def inside(self, name: str) -> "Store":
        return Store(f"{self.url}/{name}", self.say)

    def files(self, under: str = "") -> dict[str, StoredObject]:
        """All files, of the folder `under` or all, by name. Of a bucket that is not there FileNotFoundError."""
        root = self._full(under)
        found = self._try(under, lambda: self._fs.find(root, detail=True))
        prefix = f"{under}/" if under else ""
        of = lambda full: prefix + str(PurePosixPath(full).relative_to(PurePosixPath(root)))
        return {of(full): _stored(info) for full, info in found.items() if full != root}

    def folders(self) -> list[str]:
        """Names of the folders directly in it."""
        return self.top()[1]

    def top(self) -> tuple[list[str], list[str]]:
        """Names of the files and of the folders directly in it. FileNotFoundError where the bucket is not there."""
        try:
            found = self._try("", lambda: self._fs.ls(self._full(""), detail=True))
        except FileNotFoundError:  # of a folder there is nothing to see before the first file in it
            return list(self.files()), []
        names = lambda kind: sorted(PurePosixPath(i["name"]).name for i in found if i["type"] == kind)
        return names("file"), names("directory")

    def has(self, name: str) -> bool:
        return self._try(name, lambda: self._fs.isfile(self._full(name)))

    def read(self, name: str) -> bytes | None:
        """The whole of a small file; None where it is not there."""
        try:
            return self._try(name, lambda: self._fs.cat_file(self._full(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        try:
            self._try(name, lambda: self._fs.pipe_file(self._full(name), content))
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.url}: cannot be written to ({_first_line(error)}); make the bucket first"
            ) from None

    def put(self, files: Mapping[str, Path]) -> None:
        """Uploads local files, several at a time."""
        say = _once(self.say)

        def one(name: str) -> None:
            self._try(name, lambda: self._fs.put_file(str(files[name]), self._full(name)), say)

        _each(one, list(files))

    def get(self, names: Sequence[str], folder: Path) -> None:
        """Downloads files to the same names below `folder`; each appears there whole."""
        say = _once(self.say)

        def one(name: str) -> None:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            half = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
            try:
                self._try(name, lambda: self._fs.get_file(self._full(name), str(half)), say)
                half.rename(target)
            finally:
                half.unlink(missing_ok=True)

        _each(one, list(names))

    def delete(self, names: Sequence[str]) -> None:
        """Those that are gone already are none the less gone."""
        say = _once(self.say)

        def one(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._try(name, lambda: self._fs.rm_file(self._full(name)), say)

        _each(one, list(names))

    def copy(self, names: Mapping[str, str]) -> None:
        """From each name to another, inside of the store."""
        say = _once(self.say)

        def one(name: str) -> None:
            self._try(name, lambda: self._fs.cp_file(self._full(name), self._full(names[name])), say)

        _each(one, list(names))


def _once(say: Say) -> Say:
    """Of many files that fail alike the first is told."""
    told: list[str] = []

    def perhaps(text: str) -> None:
        told.append(text)
        if len(told) == 1:
            say(text)

    return perhaps


def _each(action: Callable[[str], Any], names: Sequence[str]) -> None:
    """Several at a time; where one fails those that have not begun are left."""
    if not names:
        return
    pool = ThreadPoolExecutor(min(THREADS, len(names)))
    try:
        for done in as_completed([pool.submit(action, name) for name in names]):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


# Single files, as sources name them

_listed: dict[
    str, StoredObject
] = {}  # of the newest listing, so that a folder is asked for once and not each of its files


def find_files(url: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    """The file, the files in the folder or those that a glob matches, in a fixed order, as URLs.

    Raises: ValueError where the bucket, or anything in it, is not there.
    """
    fs, bare = file_system(_scheme(url)), url.rstrip("/")
    path = fs._strip_protocol(bare)
    star = any(c in path for c in "*?[")
    look = lambda: fs.glob(path, detail=True) if star else fs.find(path, detail=True)
    try:
        found = {name: info for name, info in with_retries(bare, look).items() if info["type"] == "file"}
    except FileNotFoundError as error:
        raise ValueError(f"{url}: is not there ({_first_line(error)})") from None
    if path not in found:
        fixed = re.split(r"[*?\[]", path)[0].rpartition("/")[0] if star else path
        hidden = lambda name: any(part.startswith(".") for part in name[len(fixed) :].split("/"))
        wanted = lambda name: not hidden(name) and (star or name.endswith(suffixes or ""))
        found = {name: info for name, info in found.items() if wanted(name)}
    named = {fs.unstrip_protocol(name): _stored(info) for name, info in found.items()}
    _listed.update(named)
    return sorted(named, key=lambda name: name.split("/"))


def stored(url: str) -> StoredObject:
    """Size and version of a file."""
    if url not in _listed:
        fs = file_system(_scheme(url))
        _listed[url] = _stored(with_retries(url, lambda: fs.info(fs._strip_protocol(url))))
    return _listed[url]


@contextlib.contextmanager
def on_disk(file: str) -> Iterator[str]:
    """The path of a local file, or of a copy of one in a store, which is gone thereafter.

    A copy and not a stream: readers seek in it, and what breaks off in the middle is simply fetched again.
    Raises: StoreFailed where it cannot be had: nothing of it may be left out in silence.
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
                raise OSError(f"gave {copy.stat().st_size} bytes of {expected}; is it being written?")

        try:
            with_retries(file, fetch, lambda text: print(text, flush=True))
        except (OSError, ValueError) as error:
            raise ObjectStoreError(f"{file}: {_first_line(error)}") from error
        yield str(copy)
