"""VllmClient: one vLLM's HTTP server, over a Unix socket or at a URL."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from dsq.errors import DsqError, InputError
from dsq.runtime.server.backend import GenerateRequest, WorkerDied
from dsq.runtime.server.vllm_protocol import problem_of

if TYPE_CHECKING:
    import httpx

_CONNECT_S, _ASK_S = 10.0, 5.0
# vLLM closes a connection after 5 idle seconds; one that it is closing must not be used again.
_KEEP_CONNECTION_S = 2.0
KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own


class VllmClient:
    """`socket` or `url`. A key that vLLM wants comes from VLLM_API_KEY."""

    def __init__(self, *, socket: str | None = None, url: str | None = None) -> None:
        import httpx

        limits = httpx.Limits(
            max_connections=None,
            max_keepalive_connections=64,
            keepalive_expiry=_KEEP_CONNECTION_S,
        )
        key = os.environ.get(KEY_VARIABLE)
        self._http = httpx.AsyncClient(
            base_url="http://vllm" if url is None else url.rstrip("/").removesuffix("/v1"),
            transport=httpx.AsyncHTTPTransport(uds=socket, limits=limits) if socket else None,
            limits=limits,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            trust_env=socket is None,
        )
        self._open: set[httpx.Response] = set()

    async def alive(self) -> bool:
        import httpx

        try:
            found = await self._http.get("/health", timeout=_ASK_S)
        except httpx.TransportError:
            return False
        return found.status_code == 200

    async def model(self) -> tuple[str, int]:
        """The name that requests say, and the context. Raises InputError for what is no vLLM."""
        import httpx

        try:
            found = await self._http.get("/v1/models", timeout=_ASK_S)
        except httpx.TransportError as error:
            raise InputError(f"it does not answer ({_name(error)})") from None
        if found.status_code in (401, 403):
            raise InputError(f"it wants a key (HTTP {found.status_code}); set {KEY_VARIABLE}")
        try:
            first = found.json()["data"][0]
            return str(first["id"]), int(first["max_model_len"])
        except (ValueError, LookupError, TypeError):
            raise InputError(
                f"/v1/models (HTTP {found.status_code}) names no model with a max_model_len, as "
                "vLLM's does"
            ) from None

    async def metrics(self) -> str:
        """Prometheus' text; nothing when vLLM does not answer."""
        import httpx

        try:
            found = await self._http.get("/metrics", timeout=_ASK_S)
        except httpx.TransportError:
            return ""
        return found.text if found.status_code == 200 else ""

    async def events(
        self, body: dict[str, Any], request: GenerateRequest, n_ctx: int
    ) -> AsyncGenerator[str, None]:
        """What /v1/completions sends, an event at a time.

        Closing this closes the connection, by which vLLM knows that the request is cancelled.
        """
        import httpx

        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                self._open.add(response)
                try:
                    if response.status_code != 200:
                        raise await _refusal(response, request, n_ctx)
                    # Not httpx's lines: they also end at U+2028, which stands in JSON as it is.
                    rest = b""
                    async for data in response.aiter_bytes():
                        *lines, rest = (rest + data).split(b"\n")
                        for line in lines:
                            if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                                yield line[5:].decode("utf-8", "replace")
                finally:
                    self._open.discard(response)
        except (httpx.TransportError, httpx.StreamError) as error:
            raise WorkerDied(
                f"the connection to vLLM was lost ({_name(error)}); send the request again"
            ) from None

    async def close(self) -> None:
        """Requests in flight lose their connections."""
        for response in list(self._open):
            await response.aclose()
        await self._http.aclose()


async def _refusal(response: httpx.Response, request: GenerateRequest, n_ctx: int) -> DsqError:
    await response.aread()
    try:
        content: object = response.json()
    except ValueError:
        content = {"message": response.text or response.reason_phrase}
    return problem_of(content, request, status=response.status_code, n_ctx=n_ctx)


def _name(error: Exception) -> str:
    return type(error).__name__ + (f": {error}" if str(error) else "")
