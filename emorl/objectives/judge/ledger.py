"""A judge's memory on disk: answers that were paid for, and what has been spent, in one SQLite file.

The file survives a kill and serves several processes. It holds digests and numbers, no text and no key.
"""

import asyncio
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from emorl.config import UserError

_WAIT_SECONDS = 60.0  # for another process's commit, which takes milliseconds
_AT_ONCE = 500  # parameters of one SELECT


@dataclass(frozen=True)
class Spend:
    """Requests and tokens; differences may be negative."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: "Spend") -> "Spend":
        return Spend(
            self.requests + other.requests,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
        )

    def __sub__(self, other: "Spend") -> "Spend":
        return self + Spend(-other.requests, -other.input_tokens, -other.output_tokens)


@dataclass(frozen=True)
class Limits:
    """The most that may be spent at an account; None is no limit. Prices are per million tokens."""

    requests: int | None = None
    tokens: int | None = None
    cost: float | None = None
    input_price: float = 0.0
    output_price: float = 0.0

    def refusal(self, spent: Spend, request: Spend) -> str | None:
        """Why one more request, at most this large, may not be sent; None where it may."""
        total = spent + request
        if self.requests is not None and total.requests > self.requests:
            return f"max_requests: {self.requests} is reached, {spent.requests} requests have been sent"
        tokens, largest = spent.input_tokens + spent.output_tokens, request.input_tokens + request.output_tokens
        if self.tokens is not None and tokens + largest > self.tokens:
            return f"max_tokens: {self.tokens} is reached, {tokens} tokens are spent and the next request may take {largest}"
        if self.cost is not None and self._cost(total) > self.cost:
            return (
                f"max_cost: {self.cost} is reached, {self._cost(spent):.6g} is spent and the next request may cost "
                f"{self._cost(request):.6g}"
            )
        return None

    def _cost(self, spend: Spend) -> float:
        return (spend.input_tokens * self.input_price + spend.output_tokens * self.output_price) / 1e6


class Ledger:
    """Answers by question, and spend by account.

    with Ledger(Path("judge.sqlite")) as ledger:
        ledger.keep(question.key(judge), 0.75)
    """

    def __init__(self, path: Path) -> None:
        """Opens `path`, made if it is not there.

        Raises:
            UserError: it cannot be written, or is damaged.
        """
        self._path = path
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(
                "PRAGMA synchronous=NORMAL"
            )  # no wait for the disk: a kill loses nothing, a power cut little
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (question BLOB PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID"
            )
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS spend (account TEXT PRIMARY KEY, requests INTEGER NOT NULL, "
                "input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL) WITHOUT ROWID"
            )

    def known(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """The values of those questions that have been answered."""
        values: dict[bytes, float] = {}
        with self._errors():
            for start in range(0, len(keys), _AT_ONCE):
                part = keys[start : start + _AT_ONCE]
                places = ",".join("?" * len(part))
                query = f"SELECT question, value FROM answers WHERE question IN ({places})"
                values.update(self._database.execute(query, part).fetchall())
        return values

    def keep(self, key: bytes, value: float) -> None:
        with self._errors():
            self._database.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, value))

    def spent(self, account: str) -> Spend:
        with self._errors():
            query = "SELECT requests, input_tokens, output_tokens FROM spend WHERE account = ?"
            row = self._database.execute(query, (account,)).fetchone()
        return Spend(*row) if row else Spend()

    def spend(self, account: str, amount: Spend, limits: Limits | None = None) -> str | None:
        """Adds to what is spent, or says why the limits forbid it and adds nothing."""
        with self._errors():
            self._database.execute("BEGIN IMMEDIATE")  # between look and write no other process may spend
            try:
                refusal = limits.refusal(self.spent(account), amount) if limits else None
                if refusal is None:
                    self._database.execute(
                        "INSERT INTO spend VALUES (?, ?, ?, ?) ON CONFLICT (account) DO UPDATE SET "
                        "requests = requests + excluded.requests, input_tokens = input_tokens + excluded.input_tokens, "
                        "output_tokens = output_tokens + excluded.output_tokens",
                        (account, amount.requests, amount.input_tokens, amount.output_tokens),
                    )
            finally:
                self._database.execute("COMMIT")
        return refusal

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"judge: the cache {self._path} cannot be used ({error}); mend it, move it away or give another `cache`"
            ) from None


class Account:
    """What one call of a judge may spend: every request is booked at its largest before it is sent, and settled after.

    A request that would break a limit waits for those in flight, which mostly cost less than they were booked at.
    """

    def __init__(self, ledger: Ledger, name: str, limits: Limits) -> None:
        self._ledger, self._name, self._limits = ledger, name, limits
        self._in_flight = 0
        self._settled = asyncio.Condition()

    async def book(self, largest: Spend) -> None:
        """Raises:
        UserError: a limit is reached.
        """
        async with self._settled:
            while refusal := self._ledger.spend(self._name, largest, self._limits):
                if not self._in_flight:
                    raise UserError(
                        f"judge: {refusal}, at {self._name}, before now too; nothing more was sent. Answers are kept: raise "
                        "the limit to go on, or give a `cache` of another name to count anew"
                    )
                await self._settled.wait()
            self._in_flight += 1

    async def settle(self, largest: Spend, actual: Spend) -> None:
        """Replaces what was booked by what it really was."""
        self._in_flight -= 1
        if actual != largest:
            self._ledger.spend(self._name, actual - largest)
        async with self._settled:
            self._settled.notify_all()
