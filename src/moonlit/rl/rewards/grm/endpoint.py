"""A judge behind any endpoint that speaks OpenAI's ``/chat/completions``."""

import asyncio
import base64
import io
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from PIL.Image import Image as PILImage

from moonlit.agents.environment import VerifierError
from moonlit.chat.messages import Message
from moonlit.chat.openai_form import openai_messages
from moonlit.rl.rewards.grm.retries import TransientError

MAX_REPLY_BYTES = 1 << 20
RETRIED = frozenset({408, 409, 425, 429})
"""And every status from 500."""


class Endpoint:
    """Asks a model over HTTP. The limits are those of one process: ranks have one each.

    Args:
        base_url: up to and without ``/chat/completions``.
        model: its name there.
        api_key_env: environment variable that holds the key; None: the endpoint wants none.
        timeout_s: of a request from its start to the last byte of the reply.
        max_concurrent: requests under way at the same time.
        requests_per_s: begun in a second; None: as many as there are.
        max_tokens: of a reply; a reply that reaches it counts as malformed.
        temperature: of the judge's sampling.
        body: further fields of the request, such as ``response_format``.

    Raises:
        ValueError: if the URL is none, a number is outside its range, or the variable holds no key.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str | None,
        timeout_s: float,
        max_concurrent: int,
        requests_per_s: float | None,
        max_tokens: int,
        temperature: float,
        body: Mapping[str, Any],
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url={base_url!r}: want http://... or https://...")
        numbers = (timeout_s, max_concurrent, max_tokens)
        if min(numbers) <= 0 or (requests_per_s is not None and requests_per_s <= 0):
            raise ValueError(
                f"timeout_s={timeout_s}, max_concurrent={max_concurrent}, max_tokens={max_tokens}, "
                f"requests_per_s={requests_per_s}: want them above 0"
            )
        self.headers: dict[str, str] = {}
        if api_key_env is not None:
            key = os.environ.get(api_key_env, "").strip()
            if not key:
                raise ValueError(
                    f"the judge at {base_url} has no key: the environment variable {api_key_env} "
                    "is not set; set it, or api_key_env=null for an endpoint that wants none"
                )
            self.headers["Authorization"] = f"Bearer {key}"
        self.url, self.model = base_url.rstrip("/") + "/chat/completions", model
        self.api_key_env, self.timeout_s = api_key_env, timeout_s
        self.body = {**body, "model": model, "max_tokens": max_tokens, "temperature": temperature}
        self.room = asyncio.Semaphore(max_concurrent)
        self.interval_s = 0.0 if requests_per_s is None else 1 / requests_per_s
        self.next_start_s = 0.0
        self.session: aiohttp.ClientSession | None = None

    @property
    def name(self) -> str:
        """Model and place."""
        return f"{self.model} at {self.url}"

    async def ask(self, messages: Sequence[Message], *, seed: int) -> str:
        """Return the reply's words.

        Raises:
            TransientError: if the endpoint is slow, busy, broken, or its reply is no completion.
            VerifierError: if it refuses the request.
        """
        written = openai_messages(messages, data_url)
        async with self.slot() as session:
            try:
                async with session.post(
                    self.url,
                    json={**self.body, "messages": written, "seed": seed},
                    allow_redirects=False,  # the key goes nowhere else
                ) as response:
                    data = await read(response)
                    self.require_success(response, data)
            except (aiohttp.ClientError, TimeoutError) as error:
                told = f"{type(error).__name__} {error}".strip()
                raise TransientError(f"{self.name}: {told}") from error
        return self.words(data)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[aiohttp.ClientSession]:
        """Wait for a place under both limits."""
        async with self.room:
            loop = asyncio.get_running_loop()
            start_s = max(loop.time(), self.next_start_s)
            self.next_start_s = start_s + self.interval_s
            await asyncio.sleep(start_s - loop.time())
            if self.session is None:
                timeout = aiohttp.ClientTimeout(total=self.timeout_s)
                self.session = aiohttp.ClientSession(timeout=timeout, headers=self.headers)
            yield self.session

    def require_success(self, response: aiohttp.ClientResponse, data: bytes) -> None:
        """Refuse a reply whose status says that it is none."""
        if response.status == 200:
            return
        told = f"{self.name}: status {response.status}: {data[:200].decode('utf-8', 'replace')!r}"
        if response.status in RETRIED or response.status >= 500:
            raise TransientError(told, seconds(response.headers.get("Retry-After")))
        if response.status in (401, 403):
            told += f"; the key comes from api_key_env={self.api_key_env}"
        raise VerifierError(told)

    def words(self, data: bytes) -> str:
        """Return the words of a completion that ended by itself."""
        try:
            choice = json.loads(data)["choices"][0]
            content, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise TransientError(f"{self.name}: no completion: {data[:200]!r}") from error
        if not isinstance(content, str) or reason not in ("stop", None):
            raise TransientError(f"{self.name}: finish_reason={reason!r}, content={content!r:.200}")
        return content

    async def aclose(self) -> None:
        """Close the connections."""
        if self.session is not None:
            await self.session.close()
            self.session = None


async def read(response: aiohttp.ClientResponse) -> bytes:
    """Read a reply whole.

    Raises:
        TransientError: if it is larger than any verdict.
    """
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > MAX_REPLY_BYTES:
            raise TransientError(f"{response.url}: a reply of more than {MAX_REPLY_BYTES} bytes")
    return bytes(data)


def seconds(retry_after: str | None) -> float | None:
    """Read a Retry-After in seconds; its form as a date is left to our own back-off."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else None


def data_url(image: PILImage) -> str:
    """Write a picture into a URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
