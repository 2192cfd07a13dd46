"""A request that the gateway does not serve, and why. Each dialect gives it its own shape."""

from __future__ import annotations

import errno

STATUS = {
    errno.EINVAL: 400, errno.E2BIG: 400, errno.EFBIG: 413,
    errno.EACCES: 403, errno.EPERM: 403,
    errno.ENOENT: 404, errno.ENOTDIR: 404, errno.EISDIR: 404, errno.EEXIST: 409, errno.EBUSY: 409,
    errno.EAGAIN: 429, errno.EDQUOT: 429, errno.EMFILE: 429,
    errno.ENOSPC: 503, errno.ENOMEM: 503, errno.ESHUTDOWN: 503, errno.ENOTCONN: 503, errno.ECONNABORTED: 503,
}  # fmt: skip


class HttpRefused(Exception):
    """`status` is HTTP's, `code` a word for programs, `param` the key of the request that is wrong, and
    `retry_s` when it may be asked again.
    """

    def __init__(
        self, status: int, reason: str, code: str | None = None, param: str | None = None, retry_s: int = 1
    ) -> None:
        reason = reason.encode("utf-8", "replace").decode()  # JSON may have half a surrogate pair in a name
        super().__init__(reason)
        self.status, self.reason, self.code, self.param = status, reason, code, param
        self.retry_s = retry_s

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(self.retry_s)} if self.status in (429, 503) else {}


def of_errno(number: int, reason: str) -> HttpRefused:
    return HttpRefused(STATUS.get(number, 500), reason, errno.errorcode.get(number))
