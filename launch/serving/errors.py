"""Errors as OpenAI's clients expect them: a status, and an object that says what was wrong and where."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

STATUS_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What the client is told. `param`: the field of its request that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else STATUS_TYPES.get(self.status, "invalid_request_error")
        # What a client wrote may stand in it, halves of surrogate pairs included, which no answer can hold.
        message = self.message.encode(errors="replace").decode()
        param = None if self.param is None else self.param.encode(errors="replace").decode()
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, dict(self.headers or {}))


def from_value_error(error: ValueError, instead: Mapping[str, str] | None = None) -> ApiError:
    """Of `name: why` or `name=value: why`, as our errors are written. `instead`: what the client calls these names."""
    message = str(error)
    match = re.match(r"([a-z_]+)((?:\[\d+\])?(?:\.[a-z_]+)*)(?==|: )", message)
    if match is None:
        return ApiError(400, message)
    name = (instead or {}).get(match[1], match[1]) + match[2]
    return ApiError(400, name + message[match.end() :], param=name)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Of what pydantic found: the first field that is wrong, with every reason that it gave for it."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    path = [part for part in first["loc"] if part != "body"]
    param = first.get("ctx", {}).get("param")  # '' is a name, too
    if not path and param is None:
        return ApiError(400, "the body must be a JSON object, sent with the header Content-Type: application/json")
    name = _dotted(path) if param is None else param
    reasons = dict.fromkeys(e["msg"] for e in errors if e["loc"][:2] == first["loc"][:2])
    said = ", or ".join(reason[:1].lower() + reason[1:] for reason in reasons)
    return ApiError(400, f"{name}: {said}", param=name)


def _dotted(path: Sequence[str | int]) -> str:
    """`messages[0].content`; the rest of a path says which form of a value was tried, in pydantic's words."""
    name = str(path[0])
    for part in path[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif re.fullmatch(r"[a-z_]+", part) and part not in ("str", "int", "list", "constrained"):
            name += f".{part}"
        else:
            break
    return name
