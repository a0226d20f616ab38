"""OpenAI-compatible API errors: an HTTP status and an object with message, type, field and code."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

STATUS_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error returned to the client. `param`: the invalid field of the request."""

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
        # Messages may quote client input, including lone surrogates, which cannot be encoded in a response.
        message = self.message.encode(errors="replace").decode()
        param = None if self.param is None else self.param.encode(errors="replace").decode()
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, dict(self.headers or {}))


def from_value_error(error: ValueError, renames: Mapping[str, str] | None = None) -> ApiError:
    """Converts a ValueError of the form `name: reason` or `name=value: reason`.

    `renames`: maps names in the message to fields of the request.
    """
    message = str(error)
    match = re.match(r"([a-z_]+)((?:\[\d+\])?(?:\.[a-z_]+)*)(?==|: )", message)
    if match is None:
        return ApiError(400, message)
    name = (renames or {}).get(match[1], match[1]) + match[2]
    return ApiError(400, name + message[match.end() :], param=name)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Converts pydantic's errors: reports the first invalid field with all its reasons."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    path = [part for part in first["loc"] if part != "body"]
    param = first.get("ctx", {}).get("param")  # may be '', which is a valid field name
    if not path and param is None:
        return ApiError(400, "the body must be a JSON object, sent with the header Content-Type: application/json")
    name = _dotted(path) if param is None else param
    reasons = dict.fromkeys(e["msg"] for e in errors if e["loc"][:2] == first["loc"][:2])
    message = ", or ".join(reason[:1].lower() + reason[1:] for reason in reasons)
    return ApiError(400, f"{name}: {message}", param=name)


def _dotted(path: Sequence[str | int]) -> str:
    """Returns a field name such as `messages[0].content`, without pydantic's trailing union member names."""
    name = str(path[0])
    for part in path[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif re.fullmatch(r"[a-z_]+", part) and part not in ("str", "int", "list", "constrained"):
            name += f".{part}"
        else:
            break
    return name
